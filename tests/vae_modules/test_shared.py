"""One clip on several ranks: equal to one rank, whatever its length. Real processes under torchrun."""

import json

import pytest

from tests.processes import run
from vae_modules.cp_ops import shares


@pytest.mark.parametrize(("size", "world"), [(2, 2), (3, 3), (4, 4), (2, 4)])
def test_sharing_a_clip_changes_nothing(size, world):
    done = run("tests/vae_modules/shared_ranks.py", [str(size)], world)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) == 3 * 5 * 4
    assert max(found.values()) <= 1e-5, {case: value for case, value in found.items() if value > 1e-5}


@pytest.mark.parametrize(
    ("num", "size", "expected"), [(13, 4, [4, 3, 3, 3]), (1, 3, [1, 0, 0]), (0, 2, [0, 0]), (6, 2, [3, 3])]
)
def test_shares_are_even_and_the_first_ones_larger(num, size, expected):
    assert shares(num, size) == expected


def test_one_rank_shares_nothing():
    import sgm.distributed

    assert sgm.distributed.context_group() is None and sgm.distributed.context_parallel_size() == 1
