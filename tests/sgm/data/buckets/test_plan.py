"""Micro-batches of one shape, the same for every number of ranks: 10,000 clips of mixed sizes and lengths."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from sgm.data.buckets.assign import ClipSizes
from sgm.data.buckets.config import parse_buckets
from sgm.data.buckets.plan import BucketPlan, Division
from sgm.data.order import TrainingOrder
from sgm.util import InputError

CLASSES = {
    "720p": {1: [0.5, 4], 49: [0.25, 1]},
    "480p": {1: [0.6, 8], 33: [0.4, 4], 49: [[0.7, 0.3], 2]},
    "256": {1: [1.0, 16], 17: [0.9, 6]},
}
LISTED = ["49x480x720", {"shape": "17x256x256", "batch_size": 4}, "49x720x480", "1x480x720"]
SCHEMES = {"classes": CLASSES, "listed": LISTED}
SHAPES = [(480, 720), (720, 1280), (1080, 1920), (1280, 720), (768, 1360), (256, 256), (100, 100)]


def mixed_clips(num=10_000, seed=0) -> ClipSizes:
    rng = np.random.default_rng(seed)
    heights, widths = np.array(SHAPES)[rng.integers(len(SHAPES), size=num)].T
    frames = np.where(rng.random(num) < 0.2, 1, rng.integers(0, 120, num))
    return ClipSizes(frames, heights, widths)


def plan_of(
    value=CLASSES, clips=None, sizes=None, *, ranks=1, seed=3, weights=None, micro_batch=2, **more
) -> BucketPlan:
    clips = mixed_clips() if clips is None else clips
    order = TrainingOrder(sizes or [len(clips) - len(clips) // 3, len(clips) // 3], seed=seed, weights=weights)
    return BucketPlan(
        order, Division(buckets=parse_buckets(value), ranks=ranks, micro_batch=micro_batch, **more), clips
    )


def batches(plan, rank=0, first=0, steps=None, epochs=1):
    steps = plan.steps(epochs) if steps is None else steps
    return list(plan.rank_batches(rank, first=first, stop=first + steps * plan.division.accumulation))


def shown(plan, epochs=1):
    """Count (clip, bucket) of all samples without padding, and return the batches of each rank."""
    taken = [batches(plan, rank, epochs=epochs) for rank in range(plan.division.ranks)]
    real = [
        (plan.order[number], batch.shape)
        for rank in taken
        for batch in rank
        for number, weight in zip(batch.numbers, batch.weights, strict=True)
        if weight
    ]
    return Counter(real), taken


@pytest.mark.parametrize("name", SCHEMES)
def test_every_number_of_ranks_shows_the_same_clips_in_the_same_buckets(name):
    alone, _ = shown(plan_of(SCHEMES[name]))
    assert set(alone.values()) == {1} and len(alone) > 3000
    for ranks in (2, 4, 8):
        plan = plan_of(SCHEMES[name], ranks=ranks)
        together, taken = shown(plan)
        assert together == alone
        assert len({len(rank) for rank in taken}) == 1
        for parts in zip(*taken, strict=True):
            assert len({(part.shape, len(part.numbers)) for part in parts}) == 1, "one shape at a time on all ranks"
            real = [sum(weight > 0 for weight in part.weights) for part in parts]
            assert max(real) - min(real) <= 1


def test_buckets_only_get_clips_that_fill_them():
    plan = plan_of(LISTED)
    clips, offset = plan.clips, plan.order.sizes[0]
    for (dataset, clip), (frames, _, _) in shown(plan)[0]:
        index = clip + dataset * offset
        longest = max((count for count in (1, 17, 49) if count <= clips.frames[index]), default=None)
        assert frames == longest
    assert sum(shown(plan)[0].values()) == int((clips.frames > 0).sum())


def test_the_observed_probabilities_are_those_of_the_configuration():
    clips = ClipSizes(*(np.full(10_000, side) for side in (60, 1080, 1920)))
    plan = plan_of(CLASSES, clips)
    names = [*map(str, plan.division.buckets.buckets), None]  # NOWHERE is the last
    longer = 0.75 * 0.3
    expected = {
        "49x720x1280": 0.25,
        "49x480x848": longer * 0.7,
        "33x480x848": 0.75 * 0.7 * 0.4,
        "17x192x336": (longer * 0.3 + 0.75 * 0.7 * 0.6) * 0.9,
    }
    expected[None] = 1 - sum(expected.values())
    found = Counter(names[index] for index in plan.bucket_of_clips(0))
    assert found.keys() == expected.keys()
    for name, share in expected.items():
        assert abs(found[name] - 10_000 * share) < 3 * (10_000 * share * (1 - share)) ** 0.5, name


def test_draws_depend_on_seed_epoch_and_clip_index_alone():
    clips = mixed_clips()
    fewer = ClipSizes(clips.frames[:100], clips.heights[:100], clips.widths[:100])
    whole = plan_of(clips=clips)
    assert (plan_of(clips=fewer).bucket_of_clips(4) == whole.bucket_of_clips(4)[:100]).all()
    assert (plan_of(clips=clips, ranks=8, accumulation=2).bucket_of_clips(4) == whole.bucket_of_clips(4)).all()
    differing = [
        (whole.bucket_of_clips(4) != other).mean()
        for other in (whole.bucket_of_clips(5), plan_of(seed=4).bucket_of_clips(4))
    ]
    assert min(differing) > 0.2


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("drop_partial", [False, True])
def test_each_sample_of_a_step_counts_equally(accumulation, drop_partial):
    plans = [plan_of(clips=mixed_clips(300), ranks=4, accumulation=accumulation, drop_partial=drop_partial)]
    ranks = [batches(plans[0], rank) for rank in range(4)]
    assert len(ranks[0]) == plans[0].steps(1) * accumulation
    for step in range(plans[0].steps(1)):
        parts = [part for rank in ranks for part in rank[step * accumulation : (step + 1) * accumulation]]
        # The mean over rows, then over ranks and micro-batches.
        factors = [(w / len(part.numbers) / (4 * accumulation)) for part in parts for w in part.weights]
        real = [factor for factor in factors if factor]
        assert real == pytest.approx([1 / len(real)] * len(real))
        if drop_partial:
            assert len(real) == len(factors)


def test_whole_micro_batches_have_the_weight_one():
    plan = plan_of(["1x480x720"], ranks=4, drop_partial=True, accumulation=2)
    assert {weight for batch in batches(plan) for weight in batch.weights} == {1.0}


def test_partial_micro_batches_are_taken_or_dropped():
    clips = ClipSizes(*(np.full(21, side) for side in (9, 480, 720)))
    kept, dropped = (plan_of(["9x480x720"], clips, ranks=4, drop_partial=drop) for drop in (False, True))
    assert kept.steps(1) == 3 and dropped.steps(1) == 2
    assert kept.samples_before(3) == 21 and dropped.samples_before(2) == 16
    assert sum(shown(kept)[0].values()) == 21 and sum(shown(dropped)[0].values()) == 16
    last = [next(b for b in batches(kept, rank) if len(b.numbers) * 4 > 5 and 0.0 in b.weights) for rank in (1, 2, 3)]
    assert all(sum(w > 0 for w in batch.weights) == 1 for batch in last), "5 clips on 4 ranks: 2, 1, 1, 1"
    assert shown(dropped, epochs=2)[0] != shown(dropped)[0], "another epoch drops other clips"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_resumed_run_continues_with_the_next_micro_batch(name):
    straight = batches(plan_of(SCHEMES[name], mixed_clips(500), ranks=2, accumulation=2), 1, epochs=3)
    for first in (0, 2, 50, len(straight) - 2):
        plan = plan_of(SCHEMES[name], mixed_clips(500), ranks=2, accumulation=2)
        rest = plan.rank_batches(1, first=first, stop=len(straight))
        assert list(rest) == straight[first:]


def test_samples_are_counted_once_over_epochs():
    plan = plan_of(clips=mixed_clips(400), ranks=3)
    everything = [batch for rank in range(3) for batch in batches(plan, rank, epochs=3)]
    total = sum(weight > 0 for batch in everything for weight in batch.weights)
    assert plan.samples_before(plan.steps(3)) == total
    assert plan.steps(3, first=4) == plan.steps(3) - 4 and plan.steps(1, first=plan.steps(2)) == 0
    assert plan.samples_before(7) == sum(
        w > 0 for rank in range(3) for b in batches(plan, rank, steps=7) for w in b.weights
    )


@pytest.mark.parametrize(
    "scheme, more",
    [({"256": {17: [0.5, 4]}}, {}), (["17x256x256"], {"drop_partial": True}), (CLASSES, {"weights": [3, 1]})],
)
def test_epochs_are_counted_by_their_own_micro_batches(scheme, more):
    plan = plan_of(scheme, micro_batch=64, **more)
    for epoch in range(1, 4):
        end = plan.steps(epoch)
        assert plan.epochs_before(end) == epoch and plan.epochs_before(end - 1) == epoch - 1


def test_data_sets_are_drawn_by_their_weights():
    plan = plan_of(LISTED, mixed_clips(300), [200, 100], weights=[1, 3])
    by_dataset = Counter(dataset for (dataset, _), _ in shown(plan)[0].elements())
    assert by_dataset[1] / by_dataset[0] == pytest.approx(3, rel=0.1)
    assert plan.steps(4) == len(batches(plan, epochs=4))


def test_each_epoch_has_a_new_order():
    plan = plan_of(["1x480x720", "17x256x256"], mixed_clips(200))
    first, second = (
        list(islice(plan.rank_batches(0, first=start, stop=start + 50), 50)) for start in (0, plan.steps(1))
    )
    assert [batch.shape for batch in first] != [batch.shape for batch in second]
    assert [plan.order[n] for b in first for n in b.numbers] != [plan.order[n] for b in second for n in b.numbers]


def test_the_table():
    clips = ClipSizes(*map(np.array, ([49] * 5 + [0], [480] * 6, [720] * 6)))
    text = plan_of(["49x480x720", "9x480x720"], clips, [6], ranks=2).table()
    assert text.splitlines() == [
        "    bucket  samples  batch size of a rank  micro-batches",
        "49x480x720        5                     2              2",
        "1 of 6 clips fit no bucket, or cannot be used",
    ]
    text = plan_of({"480p": {49: [0.5, 1]}}, clips, [6]).table()
    assert "6 samples of the first epoch are in no bucket" in text


def test_a_plan_without_samples_is_refused():
    clips = ClipSizes(*(np.full(5, side) for side in (9, 100, 100)))
    with pytest.raises(InputError, match="none of the 5 clips fits a bucket"):
        plan_of({"480p": {9: [1.0, 1]}}, clips, [5])
    with pytest.raises(InputError, match="leaves nothing to train on"):
        plan_of(["9x480x720"], clips, [5], ranks=4, drop_partial=True).steps(2000)


def test_different_plans_have_different_digests():
    plans = [plan_of(), plan_of(ranks=2), plan_of(LISTED), plan_of(LISTED, micro_batch=3), plan_of(drop_partial=True)]
    assert len({plan.division.digest for plan in plans}) == 5
    assert plan_of().division.digest == plan_of(accumulation=2).division.digest
