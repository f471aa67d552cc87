import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import sgm.distributed
from sgm.util import InputError

ROOT = Path(__file__).parents[2]

TWO_RANKS = """
import torch, torch.distributed as dist
import sgm.distributed as d
d.initialize()
d.initialize()
x = torch.tensor([d.data_parallel_rank() + 1.0], device=d.device())
dist.all_reduce(x)
assert d.data_parallel_size() == 2 and x.item() == 3.0
rank = d.data_parallel_rank()
assert d.reduce_over_ranks(torch.tensor([rank, 5 - rank])).tolist() == [1, 9]
assert d.reduce_over_ranks(torch.tensor([rank, 5 - rank]), largest=True).tolist() == [1, 5]
assert d.from_rank_zero({"rank": rank}) == {"rank": 0}
assert d.from_all_ranks(rank) == [0, 1]
d.barrier()
d.shutdown()
assert not dist.is_initialized()
"""


def test_a_single_process_needs_no_launcher_and_opens_no_port(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    sgm.distributed.initialize()
    sgm.distributed.initialize()
    assert dist.get_world_size() == 1
    assert (sgm.distributed.data_parallel_rank(), sgm.distributed.data_parallel_size()) == (0, 1)
    assert sgm.distributed.reduce_over_ranks(torch.tensor([2.0])).tolist() == [2.0]
    assert (sgm.distributed.from_rank_zero("x"), sgm.distributed.from_all_ranks("x")) == ("x", ["x"])


def test_groups_can_be_made_again_after_a_shutdown():
    sgm.distributed.initialize()
    sgm.distributed.shutdown()
    assert not dist.is_initialized() and sgm.distributed.data_parallel_size() == 1
    sgm.distributed.initialize()
    assert dist.is_initialized()


def test_two_ranks(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_tensor_parallel_sizes_are_refused():
    with pytest.raises(InputError, match="model_parallel_size: 1"):
        sgm.distributed.initialize(model_parallel_size=2)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_the_device_is_the_cpu_where_there_is_nothing_else():
    assert sgm.distributed.device() == torch.device("cpu")
    sgm.distributed.prepare_import()
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_sizes_that_cannot_share_are_refused_with_the_legal_ones(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(InputError, match="cp_size=4 ranks .* among 6 processes; legal are 1, 2, 3, 6"):
        sgm.distributed.initialize(mesh=sgm.distributed.Mesh(context=4))
    with pytest.raises(InputError, match="cp_size=2 and args.sequence_parallel_size=3 differ"):
        sgm.distributed.initialize(mesh=sgm.distributed.Mesh(context=2, sequence=3))
    assert sgm.distributed.context_group() is None and sgm.distributed.context_parallel_size() == 1
