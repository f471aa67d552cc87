"""Parallel network and VAE on several ranks against one rank. Real processes."""

import json

import pytest

from tests.marks import thorough
from tests.processes import run


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), thorough(4)])
def test_ranks_that_share_a_sample_equal_one_rank(size):
    done = run("tests/shared_ranks.py", [str(size)], size)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert sum(case.startswith("VAE") for case in found) == 3 * 4 * 4
    assert sum(case.startswith("DiT") for case in found) >= 4 * 4
    assert sum(case.startswith("DiT") and "Ulysses" in case for case in found) == 4 * (5 if size == 2 else 1)
    layers = {case for case in found if case.startswith("layers")}
    assert len(layers) == (5 * 4 if size % 2 == 0 else 0)
    # Outputs of the networks are compared with the reference, with its tolerance.
    above = {case: v for case, v in found.items() if v > (2e-5 if "VAE" not in case and "output" in case else 1e-5)}
    assert above == {}
