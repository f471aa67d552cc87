"""Blocks skipped at some steps of a sampler."""

import pytest
import torch

import sgm.distributed
from sgm.modules.step_cache import StepCache
from sgm.util import InputError
from tests.test_dit_golden import GOLDEN, load

SHAPE = (8, 3, 4, 1)  # hidden size, blocks, channels, temporal patch
NUM_TEXT = 2


class Blocks:
    """Three blocks that add given values to the rows of tokens (B, 5, 8), of which the last returns patches."""

    def __init__(self, cache):
        self.cache, self.calls = cache, []

    def step(self, x, added, emb=None):
        """Run a step whose first block adds `added` (B,) and the others twice and three times that."""
        emb = torch.ones(len(x), 4) if emb is None else emb
        for index in range(3):

            def run(x, rows, index=index):
                self.calls.append((index, rows))
                own = added if rows is None else added[rows]
                x = x.add_((index + 1) * own[:, None, None])  # blocks overwrite their input
                return x[:, NUM_TEXT:] if index == 2 else x

            x = self.cache.block(index, run, x, emb=emb, num_text=NUM_TEXT, group=None)
        return x


def tokens(num_rows):
    return torch.arange(num_rows * 40, dtype=torch.float32).view(num_rows, 5, 8)


def test_a_sample_is_computed_where_its_first_block_has_changed():
    cache = StepCache("first_block", 0.1, SHAPE)
    blocks = Blocks(cache)
    with cache.sampling(num_steps=5, num_samples=2):
        whole = blocks.step(tokens(2), torch.tensor([1.0, 1.0]))
        assert torch.equal(whole, tokens(2)[:, NUM_TEXT:] + 6)
        # The first row has changed by 5 %, the second by half.
        one = blocks.step(tokens(2), torch.tensor([1.05, 1.5]))
        assert torch.allclose(one[0], tokens(2)[0, NUM_TEXT:] + 1.05 + 5) and torch.equal(one[1] - 9, tokens(2)[1, 2:])
        # Changes add up: 5 % and 6 % of the step at which it was computed.
        blocks.step(tokens(2), torch.tensor([1.11, 1.5]))
        blocks.step(tokens(2), torch.tensor([1.11, 1.5]))
        blocks.step(tokens(2), torch.tensor([1.11, 1.5]))  # the last step
    rows = [rows for index, rows in blocks.calls if index == 1]
    assert rows == [None, [1], [0], None]
    assert [rows for index, rows in blocks.calls if index == 0] == [None] * 5
    assert cache.share_run == pytest.approx((5 * 2 + 2 * (2 + 1 + 1 + 2)) / 30)
    assert not cache.in_use


def test_the_branches_of_a_sample_are_computed_together():
    cache = StepCache("first_block", 0.1, SHAPE)
    blocks = Blocks(cache)
    with cache.sampling(num_steps=9, num_samples=2):
        blocks.step(tokens(4), torch.ones(4))
        blocks.step(tokens(4), torch.tensor([1.0, 1.0, 1.0, 2.0]))
        assert blocks.calls[-1] == (2, [1, 3])
        blocks.step(tokens(2), torch.ones(2))  # guidance has ended: other rows
        assert blocks.calls[-1] == (2, None)


def test_a_threshold_of_zero_runs_all_blocks():
    cache = StepCache("first_block", 0.0, SHAPE)
    blocks = Blocks(cache)
    with cache.sampling(num_steps=3, num_samples=1):
        for _ in range(3):
            assert torch.equal(blocks.step(tokens(1), torch.ones(1)), tokens(1)[:, NUM_TEXT:] + 6)
    assert [rows for _, rows in blocks.calls] == [None] * 9 and cache.share_run == 1


def test_teacache_with_a_threshold_of_zero_runs_all_blocks_though_its_polynomial_is_negative_near_zero():
    cache = StepCache("teacache", 0.0, (3072, 42, 16, 1))
    cache._num_blocks = 3
    blocks, emb = Blocks(cache), torch.ones(1, 4)
    with cache.sampling(num_steps=4, num_samples=1):
        for _ in range(4):
            blocks.step(tokens(1), torch.ones(1), emb)
            emb = emb * 1.001
    assert cache.share_run == 1


def test_teacache_sums_what_its_polynomial_says():
    cache = StepCache("teacache", 0.1, (1920, 30, 16, 1))
    cache._num_blocks = 3
    blocks, emb, ran = Blocks(cache), torch.ones(1, 4), []
    with cache.sampling(num_steps=20, num_samples=1):
        for step in range(18):
            num_calls = len(blocks.calls)
            blocks.step(tokens(1), torch.ones(1), emb)
            ran += [step] * (len(blocks.calls) > num_calls)
            emb = emb * 1.01
    # 1 % of the embedding is 0.0134 of the output, by the polynomial of the 2B model, so that 8 steps exceed 0.1.
    assert ran == [0, 8, 16]


@pytest.mark.parametrize(
    ("kind", "shape", "text"), [("teacache", SHAPE, "first_block"), ("first_block", (8, 1, 4, 1), "one block")]
)
def test_what_no_cache_serves_is_refused(kind, shape, text):
    with pytest.raises(InputError, match=text):
        StepCache(kind, 0.1, shape)


def test_a_network_runs_the_rows_that_it_is_told(monkeypatch):
    network, (x, timesteps, context), _ = load(GOLDEN / "dit_t2v_5b_lora")
    x, timesteps, context = (torch.cat([part[:1]] * 2) for part in (x, timesteps, context))
    with torch.no_grad():
        expected = network(x, timesteps, context)
        cache = network.use_step_cache("first_block", 1e9)
        assert torch.equal(network(x, timesteps, context), expected)  # no sampler is running
        with cache.sampling(num_steps=3, num_samples=1):
            first = network(x, timesteps, context)
            again = network(x, timesteps, context)
            monkeypatch.setattr(StepCache, "_choose", lambda *_: [1])
            half = network(x * 1.1, timesteps, context)
        other = network(x * 1.1, timesteps, context)
    assert torch.equal(first, expected)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(half[1], other[1], rtol=0, atol=1e-6)
    assert (half[0] - other[0]).abs().max() > 1e-4
    assert sgm.distributed.cfg_group() is None
