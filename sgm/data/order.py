"""In which order clips are trained on: a pure function of a seed and the number of a training sample."""

import hashlib
import math
from collections.abc import Sequence

import torch

from sgm.util import InputError


def derive_seed(*parts: int | str) -> int:
    """Return a seed below 2**63 for one purpose, from the seed of the run and what names the purpose.

    Unlike sums of seeds, neighbouring parts give unrelated results.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class TrainingOrder:
    """Which clip of which data set every training sample shows: ``order[number]``.

    Samples come in epochs of as many as there are clips. Each data set has the same share of every epoch: its size or,
    with weights, what they say. A data set is shown in a new permutation each time that all of it has been shown, so
    without weights every clip comes once an epoch.

    Args:
        sizes: the number of clips of each data set.
        seed: of the run.
        weights: how often each data set is drawn, in any unit; null draws by size.
        shuffle: false keeps the order of the clips and of the data sets within an epoch.

    Raises:
        InputError: there is not one usable weight for each data set.
    """

    def __init__(
        self, sizes: Sequence[int], *, seed: int, weights: Sequence[float] | None = None, shuffle: bool = True
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"expected data sets with clips, got sizes {list(sizes)}")
        self.sizes = tuple(sizes)
        self.seed = seed
        self.shuffle = shuffle
        self.epoch_length = sum(sizes)
        self._shares = self.sizes if weights is None else _shares(weights, sizes)
        self._epoch: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self._clips: dict[int, tuple[int, torch.Tensor]] = {}

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Return (data set, clip) of sample `number`, from 0."""
        if number < 0:
            raise IndexError(f"samples are numbered from 0, got {number}")
        epoch, place = divmod(number, self.epoch_length)
        datasets, ranks = self._mixture(epoch)
        dataset = int(datasets[place])
        drawn_before = epoch * self._shares[dataset] + int(ranks[place])
        round_, clip = divmod(drawn_before, self.sizes[dataset])
        return dataset, int(self._permutation(dataset, round_)[clip])

    @property
    def digest(self) -> str:
        """SHA-256 of what decides about the order."""
        parts = (self.sizes, self._shares, self.seed, self.shuffle)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def alike(self) -> bool:
        """Whether every epoch shows each clip once."""
        return self._shares == self.sizes

    def epoch(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return data set and clip of every sample of an epoch, in their order: two tensors (`epoch_length`,) int64."""
        datasets, ranks = self._mixture(epoch)
        clips = torch.empty_like(datasets)
        for dataset, size in enumerate(self.sizes):
            places = (datasets == dataset).nonzero()[:, 0]
            drawn_before = epoch * self._shares[dataset] + ranks[places]
            for round_ in (drawn_before // size).unique().tolist():
                chosen = drawn_before // size == round_
                clips[places[chosen]] = self._permutation(dataset, round_)[drawn_before[chosen] % size]
        return datasets, clips

    def _mixture(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, for each place of an epoch, its data set and how often that came before in this epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            shares = torch.tensor(self._shares)
            datasets = torch.repeat_interleave(torch.arange(len(self.sizes)), shares)
            ranks = torch.cat([torch.arange(share) for share in self._shares])
            if len(self.sizes) > 1 and self.shuffle:
                datasets = datasets[self._shuffled(self.epoch_length, "mixture", epoch)]
                for dataset, share in enumerate(self._shares):
                    ranks[datasets == dataset] = torch.arange(share)
            self._epoch = epoch, datasets, ranks
        return self._epoch[1:]

    def _permutation(self, dataset: int, round_: int) -> torch.Tensor:
        if dataset not in self._clips or self._clips[dataset][0] != round_:
            size = self.sizes[dataset]
            clips = self._shuffled(size, "clips", dataset, round_) if self.shuffle else torch.arange(size)
            self._clips[dataset] = round_, clips
        return self._clips[dataset][1]

    def _shuffled(self, size: int, *purpose: int | str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *purpose))
        return torch.randperm(size, generator=generator)


def _shares(weights: Sequence[float], sizes: Sequence[int]) -> tuple[int, ...]:
    """Divide an epoch by weights: whole numbers that sum up, at least 1 where the weight is not 0."""
    usable = len(weights) == len(sizes) and all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if not usable or sum(weights) == 0:
        raise InputError(
            f"args.train_data_weights is {list(weights)}; give a number of at least 0 for each of the {len(sizes)} "
            "folders of args.train_data, not all 0"
        )
    length, total = sum(sizes), sum(weights)
    exact = [weight * length / total for weight in weights]
    shares = [max(int(share), 1 if share > 0 else 0) for share in exact]
    while sum(shares) != length:
        step = 1 if sum(shares) < length else -1
        candidates = [i for i, share in enumerate(shares) if exact[i] > 0 and share + step >= 1]
        chosen = max(candidates, key=lambda i: step * (exact[i] - shares[i]))
        shares[chosen] += step
    return tuple(shares)


def split_indices(num_clips: int, split: str, *, seed: int) -> tuple[list[int], list[int]]:
    """Divide clips at random into those to train on and those to validate on; both ascending, no clip in both.

    Args:
        num_clips: how many there are.
        split: shares of training, validation and the rest, e.g. ``"0.9,0.1,0"`` or ``"9,1"``.
        seed: of the run.

    Raises:
        InputError: `split` is not of that form, or leaves nothing to train on.
    """
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or any(not 0 <= s < math.inf for s in shares) or shares[0] == 0:
        raise InputError(
            f"args.split is '{split}'; give the shares of training, validation and test, e.g. 0.9,0.1,0, the first "
            "above 0"
        )
    train, valid = shares[0], sum(shares[1:2])
    num_valid = round(num_clips * valid / sum(shares))
    num_train = round(num_clips * (train + valid) / sum(shares)) - num_valid
    if valid and num_clips > 1:
        num_valid = max(num_valid, 1)
        num_train = min(num_train, num_clips - num_valid)
    if num_train < 1:
        raise InputError(
            f"args.split: '{split}' of {num_clips} clips leaves none to train on; give a larger share or more clips"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "split"))
    shuffled = torch.randperm(num_clips, generator=generator).tolist()
    return sorted(shuffled[num_valid : num_valid + num_train]), sorted(shuffled[:num_valid])
