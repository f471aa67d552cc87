"""The order in which clips are trained on: a pure function of a seed and the sample number."""

import hashlib
import math
from collections.abc import Sequence

import torch

from sgm.util import InputError


def derive_seed(*parts: int | str) -> int:
    """Return a seed below 2**63 for one purpose, from the seed of the run and the name of the purpose.

    Unlike sums of seeds, similar inputs give unrelated seeds.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class TrainingOrder:
    """The clip of every training sample: ``order[number]``.

    An epoch has as many samples as there are clips. The share of each data set is the same in every epoch,
    proportional to its size or weight. A data set is reshuffled when all its clips have been drawn; without weights, an
    epoch has every clip once.

    Args:
        sizes: number of clips of each data set.
        seed: of the run.
        weights: how often each data set is drawn, in any unit; None draws by size.
        shuffle: False keeps the order of clips and data sets.

    Raises:
        InputError: there is not one usable weight per data set.
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
        self._counts = self.sizes if weights is None else _samples_per_epoch(weights, sizes)
        self._epoch: tuple[int, tuple[torch.Tensor, torch.Tensor]] | None = None  # the latest one

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Return (data set, clip) of sample `number`, from 0."""
        if number < 0:
            raise IndexError(f"samples are numbered from 0, got {number}")
        epoch, index = divmod(number, self.epoch_length)
        datasets, clips = self.epoch(epoch)
        return int(datasets[index]), int(clips[index])

    @property
    def digest(self) -> str:
        """SHA-256 of all inputs of the order."""
        parts = (self.sizes, self._counts, self.seed, self.shuffle)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def every_clip_once(self) -> bool:
        """Whether every epoch shows each clip once."""
        return self._counts == self.sizes

    def epoch(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return data set and clip of every sample of an epoch, by number: two tensors (`epoch_length`,) int64."""
        if self._epoch is None or self._epoch[0] != epoch:
            datasets = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self._counts))
            if len(self.sizes) > 1 and self.shuffle:
                datasets = datasets[self._permutation(self.epoch_length, "mixture", epoch)]
            clips = torch.empty_like(datasets)
            for dataset, count in enumerate(self._counts):
                clips[datasets == dataset] = self._drawn(dataset, epoch * count, count)
            self._epoch = epoch, (datasets, clips)
        return self._epoch[1]

    def _drawn(self, dataset: int, start: int, count: int) -> torch.Tensor:
        """Return the clips of draws `start` to `start + count` from a data set, over all of its permutations."""
        size = self.sizes[dataset]
        if not self.shuffle:
            return torch.arange(start, start + count) % size
        rounds = range(start // size, -(-(start + count) // size))
        clips = [self._permutation(size, "clips", dataset, round_) for round_ in rounds]
        return torch.cat(clips)[start - rounds[0] * size :][:count] if clips else torch.empty(0, dtype=torch.int64)

    def _permutation(self, size: int, *purpose: int | str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *purpose))
        return torch.randperm(size, generator=generator)


def _samples_per_epoch(weights: Sequence[float], sizes: Sequence[int]) -> tuple[int, ...]:
    """Distribute the samples of an epoch by weights, at least 1 for a weight above 0."""
    usable = len(weights) == len(sizes) and all(weight >= 0 for weight in weights)
    if not usable or not 0 < sum(weights) < math.inf:
        raise InputError(
            f"args.train_data_weights is {list(weights)}; give a number of at least 0 for each of the {len(sizes)} "
            "folders of args.train_data, not all 0"
        )
    length, total = sum(sizes), sum(weights)
    exact = [weight * length / total for weight in weights]
    counts = [max(int(count), 1 if count > 0 else 0) for count in exact]
    while sum(counts) != length:
        step = 1 if sum(counts) < length else -1
        candidates = [i for i, count in enumerate(counts) if exact[i] > 0 and count + step >= 1]
        chosen = max(candidates, key=lambda i: step * (exact[i] - counts[i]))
        counts[chosen] += step
    return tuple(counts)


def split_indices(num_clips: int, split: str, *, seed: int) -> tuple[list[int], list[int]]:
    """Split clips at random into training and validation clips; both ascending and disjoint.

    Args:
        num_clips: number of clips.
        split: shares of training, validation and the rest, e.g. ``"0.9,0.1,0"`` or ``"9,1"``.
        seed: of the run.

    Raises:
        InputError: `split` is malformed, or leaves nothing to train on.
    """
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(s >= 0 for s in shares) or shares[0] == 0 or sum(shares) == math.inf:
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
