"""Sequence parallelism against one rank; sequence_ranks.py runs the ranks and writes the results asserted here."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sgm.parallel import ring_attention as ring
from sgm.parallel.sequence import gather_sequence, shard_sizes, split_sequence, ulysses_attention
from tests.processes import run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "results.json"
    done = run("tests/sgm/parallel/sequence_ranks.py", [str(path)], world=4)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.fixture(params=(2, 3, 4))
def figures(results, request):
    """The results for a group size."""
    return results[str(request.param)]


def test_shard_sizes_differ_by_one_at_most():
    assert shard_sizes(10, 4) == [3, 3, 2, 2]
    assert shard_sizes(8, 4) == [2, 2, 2, 2]
    assert shard_sizes(2, 3) == [1, 1, 0]


def test_attention_equals_one_rank(figures):
    assert len(figures["attention"]) == 36
    assert {case: error for case, error in figures["attention"].items() if error > 2e-5} == {}


def test_gradients_of_inputs_are_complete_and_those_of_weights_sum_up(figures):
    assert figures["linear"].keys() == {"input", "weights"}
    assert max(figures["linear"].values()) < 2e-6


def test_a_block_has_the_gradients_of_one_rank(figures):
    assert len(figures["block"]) == 4
    assert max(figures["block"].values()) < 1e-5


def test_half_precision_is_kept_and_exact_to_its_last_bits(figures):
    assert figures["half precision"].keys() == {"ulysses", "ring"}
    assert max(figures["half precision"].values()) < 8e-3  # outputs up to 1, 8-bit mantissa


def test_a_rank_saves_less_for_the_backward_pass(results):
    """Slightly less than proportional with Ulysses, which saves attention outputs by heads and by tokens."""
    for size, least in ((2, 1.7), (3, 2.5), (4, 3.3)):
        ratios = results[str(size)]["memory"]
        assert ratios.keys() == {"ulysses", "ring"}
        assert all(least < ratio < size + 0.01 for ratio in ratios.values()), ratios


def test_wrong_sizes_are_refused_before_anything_is_sent(figures):
    messages = figures["messages"]
    assert messages["few heads"].startswith("InputError") and "use ring attention" in messages["few heads"]
    assert messages["no token"].startswith("InputError") and "use fewer ranks" in messages["no token"]
    for case in ("few sizes", "wrong size", "wrong shard"):
        assert messages[case].startswith("ValueError") and "give one per rank" in messages[case]


def test_without_a_group_nothing_is_communicated():
    q, k, v = torch.randn(3, 2, 7, 4, 8).unbind()
    expected = ring.ring_attention(q, k, v, None, [7])
    torch.testing.assert_close(ulysses_attention(q, k, v, None, [7], full_attention), expected)
    torch.testing.assert_close(full_attention(q, k, v), expected)
    assert split_sequence(q, None) is q and gather_sequence(q, None, 1, 7) is q


def full_attention(q, k, v):
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("kernel", (ring.CPU_FLASH, ring.PLAIN), ids=("flash", "plain"))
def test_kernels_attend_block_by_block(kernel, monkeypatch):
    monkeypatch.setattr(ring, "PLAIN_SCORES", 2 * 3 * 5 * 4)  # four queries at a time
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, n, 16) for n in (9, 12, 12, 9))
    assert ring._kernel(q) is ring.CPU_FLASH
    for ours, expected in zip(in_two_blocks(kernel, q, k, v, grad), at_once(q, k, v, grad), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator: its kernels run nowhere else")
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float32, 1e-4)))
def test_kernels_of_the_accelerator_attend_block_by_block(dtype, tolerance):
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator()
    q, k, v, grad = (torch.randn(2, 3, n, 64, device=device).to(dtype) for n in (300, 270, 270, 300))
    ours = in_two_blocks(ring._kernel(q), q, k, v, grad)
    for mine, expected in zip(ours, at_once(*(x.float() for x in (q, k, v, grad))), strict=True):
        torch.testing.assert_close(mine, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_of_the_accelerator_have_the_signatures_of_this_torch(dtype):
    """Private operators, whose arguments, results and shapes any build of torch states on fake tensors."""
    with FakeTensorMode():
        q, k, v, grad = (torch.empty(2, 3, n, 64, dtype=dtype, device="cuda") for n in (9, 12, 12, 9))
        out, lse, state = ring.FLASH.forward(q, k, v)
        grads = ring.FLASH.backward(grad, q, k, v, out, lse, state)
    for made, like in zip((out, *grads), (q, q, k, v), strict=True):
        assert (made.shape, made.dtype, made.device) == (like.shape, dtype, like.device)
    assert (lse.shape, lse.dtype, lse.device) == (q.shape[:3], torch.float32, q.device)


def in_two_blocks(kernel, q, k, v, grad):
    """Output and gradients, in float32, where the first five keys are one block and the others the second."""
    blocks = list(zip(*(x.split((5, x.shape[2] - 5), dim=2) for x in (k, v)), strict=True))
    out, lse, state = kernel.forward(q, *blocks[0])
    out, lse = ring._join(out.float(), lse, *kernel.forward(q, *blocks[1])[:2])
    grads = [kernel.backward(grad, q, *block, out.to(q.dtype), lse.contiguous(), state) for block in blocks]
    of_q, of_k, of_v = zip(*grads, strict=True)
    return out, torch.stack(of_q).float().sum(0), torch.cat(of_k, 2).float(), torch.cat(of_v, 2).float()


def at_once(q, k, v, grad):
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    out = full_attention(*leaves)
    grads = torch.autograd.grad(out, leaves, grad.transpose(1, 2))
    return [x.detach().transpose(1, 2) for x in (out, *grads)]
