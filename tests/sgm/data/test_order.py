import hashlib
from collections import Counter

import pytest

from sgm.data.order import TrainingOrder, derive_seed, split_indices
from sgm.util import InputError


def drawn(order, start, stop):
    return [order[number] for number in range(start, stop)]


def test_each_epoch_shows_every_clip_once_in_a_new_order():
    order = TrainingOrder([5, 8], seed=1)
    everything = sorted((dataset, clip) for dataset, size in enumerate([5, 8]) for clip in range(size))
    epochs = [drawn(order, epoch * 13, epoch * 13 + 13) for epoch in range(4)]
    assert order.epoch_length == 13
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert {dataset for dataset, _ in epochs[0][:5]} == {0, 1}, "data sets are mixed within an epoch"


@pytest.mark.parametrize(
    ("weights", "digest"),
    [(None, "2ecfe2f4e140963e"), ([1, 5, 1], "8cb5e39aa6364e46"), ([0, 1, 0.1], "bf6555ab0393ce54")],
)
def test_epochs_and_single_samples_agree_and_the_order_is_pinned(weights, digest):
    order = TrainingOrder([7, 3, 11], seed=2, weights=weights)
    assert order.every_clip_once == (weights is None)
    for epoch in (0, 1, 6, 2):
        datasets, clips = order.epoch(epoch)
        numbers = range(epoch * order.epoch_length, (epoch + 1) * order.epoch_length)
        fresh = TrainingOrder([7, 3, 11], seed=2, weights=weights)
        assert list(zip(datasets.tolist(), clips.tolist(), strict=True)) == [fresh[number] for number in numbers]
    # Another value would change what every resumed run trains on.
    shown = drawn(order, 0, 200) + drawn(order, 10**9, 10**9 + 50)
    assert hashlib.sha256(repr(shown).encode()).hexdigest()[:16] == digest


def test_a_number_always_gives_the_same_clip():
    forward = drawn(TrainingOrder([5, 8], seed=1), 0, 60)
    backward = TrainingOrder([5, 8], seed=1)
    assert forward == [backward[number] for number in reversed(range(60))][::-1]
    assert forward != drawn(TrainingOrder([5, 8], seed=2), 0, 60)
    assert TrainingOrder([5, 8], seed=1)[10**12] == backward[10**12]


def test_weights_mix_data_sets_and_each_is_still_drawn_without_replacement():
    order = TrainingOrder([4, 16], seed=3, weights=[3, 1])
    samples = drawn(order, 0, 20 * 16)
    assert Counter(dataset for dataset, _ in samples) == {0: 240, 1: 80}
    for dataset, size in enumerate([4, 16]):
        clips = [clip for of, clip in samples if of == dataset]
        rounds = [clips[i : i + size] for i in range(0, len(clips), size)]
        assert all(sorted(round_) == list(range(size)) for round_ in rounds)
        assert len({tuple(round_) for round_ in rounds}) > 1
    share = [dataset for dataset, _ in samples[:20]].count(0)
    assert share == 15, "every epoch is mixed so"


def test_a_small_weight_still_counts_and_zero_leaves_out():
    assert Counter(d for d, _ in drawn(TrainingOrder([10, 10, 10], seed=0, weights=[1000, 1, 0]), 0, 30)) == {
        0: 29,
        1: 1,
    }


def test_without_shuffling_clips_come_in_order():
    order = TrainingOrder([2, 3], seed=0, shuffle=False)
    assert drawn(order, 0, 7) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (0, 0), (0, 1)]


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, float("nan")], [1, float("inf")], [1e308, 1e308]])
def test_unusable_weights_are_refused(weights):
    with pytest.raises(InputError, match=r"args\.train_data_weights .*each of the 2 folders"):
        TrainingOrder([3, 3], seed=0, weights=weights)


def test_there_are_no_negative_numbers():
    with pytest.raises(IndexError):
        TrainingOrder([3], seed=0)[-1]


def test_seeds_of_neighbours_are_unrelated():
    seeds = {derive_seed(seed, "noise", number) for seed in range(20) for number in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    # Pinned: another value would change the order of every resumed run.
    assert derive_seed(42, "clips", 0) == 6176453321521428718


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        ("1,0,0", (60, 0)),
        ("0.9,0.1,0", (54, 6)),
        ("8,1,1", (48, 6)),
        ("9,1", (54, 6)),
        ("1", (60, 0)),
        ("1,0.001", (59, 1)),
    ],
)
def test_splits_have_the_shares_asked_for_and_share_no_clip(split, sizes):
    train, valid = split_indices(60, split, seed=7)
    assert (len(train), len(valid)) == sizes
    assert not set(train) & set(valid)
    assert set(train) | set(valid) <= set(range(60))
    assert (train, valid) == split_indices(60, split, seed=7)
    assert train == sorted(train)


def test_a_split_follows_the_seed():
    assert split_indices(60, "1,1", seed=0) != split_indices(60, "1,1", seed=1)


@pytest.mark.parametrize("split", ["", "a,b", "1;0", "-1,2", "0,1", "1,0,0,0", "nan", "inf,1", "1e308,1e308"])
def test_unusable_splits_are_refused(split):
    with pytest.raises(InputError, match="args.split is"):
        split_indices(60, split, seed=0)


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(InputError, match="leaves none to train on"):
        split_indices(3, "1,99", seed=0)
