"""Precompute latents and text embeddings of a training run: ``tools/prepare_dataset.py`` and ``args.precompute``.

Legend: F frames, H W pixels, z channels of the latents.
"""

import copy
import gc
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

import sgm.distributed
from sgm.checks.estimate import text_encoder_bytes
from sgm.checks.measure import encode_usage, once
from sgm.checks.sampling import check_files
from sgm.checks.training import check_training_data, geometry_of
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, ConfigError, digest_of
from sgm.config.precision import resolve_training_precision
from sgm.data.cache import SHARD_BYTES, Description, Kind, begin, changes, divide, read_shard, write_shard
from sgm.data.clips.decode import ClipError
from sgm.data.contents import Contents
from sgm.data.rows import listed
from sgm.io import lock_folder, remove_leftovers, require_writable
from sgm.log import bar, get_logger, is_rank_zero
from sgm.modules.geometry import Geometry
from sgm.training.bad_clips import unusable
from sgm.training.inputs.caches import (
    clip_source,
    contents_of,
    part_of,
    require_distinct,
    require_repeatable,
    shapes_of,
    text_encoder_of,
    text_source,
    texts,
)
from sgm.training.inputs.clips import open_folder
from sgm.util import PRECISIONS, InputError, default, instantiate_from_config, without_allocating
from sgm.weights.checkpoint import load_autoencoder

logger = get_logger(__name__)

Shape = tuple[int, int, int]
Encode = Callable[[Sequence[str]], Iterator[torch.Tensor | str]]


@dataclass(frozen=True)
class Job:
    """The encoding of one kind of results: latents, first frames or text embeddings.

    Attributes:
        description: of the cache.
        num_bytes: approximate size of the cache.
        memory: estimate of the bytes that weights and activations take on the device while they encode.
        loaded: context with the encoder in memory; yields a function from keys to an iterator over results, or strings
            with the reason of a failure.
        contents: of the files of clips, if the data set tells them.
    """

    description: Description
    num_bytes: int
    loaded: Callable[[], AbstractContextManager[Encode]]
    contents: Contents | None = None
    memory: Callable[[], float] = lambda: 0.0


def plan_jobs(
    config: Config,
    kinds: Sequence[Kind],
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    batch_size: int = 1,
) -> list[Job]:
    """Return the encoding jobs, without reading weights; clips are opened only if buckets need their sizes.

    Args:
        config: of the training run.
        kinds: of results.
        dtype: of the stored results; None for the encoder's.
        shard_bytes: size of a file.
        batch_size: clips or captions encoded at once; with more than one, results depend on their neighbours, by
            rounding.

    Raises:
        InputError: configuration, files or data cannot be used.
    """
    args = config.args
    assert isinstance(args, TrainingArgs)
    geometry = geometry_of(config)
    if problems := [*check_files(config), *check_training_data(config, geometry)]:
        raise ConfigError(config.located(problems))
    datasets = [open_folder(config, folder) for folder in args.train_data]
    rows = [report for dataset in datasets if hasattr(dataset, "row_reports") for report in dataset.row_reports()]
    for path, reason in unusable(rows, args).items():
        logger.warning("left out %s: %s", path, reason)
    if geometry.control_channels and "latents" in kinds:  # neither is of use without the other
        kinds = [*kinds, "controls"]
    jobs = []
    for kind in kinds:
        if kind == "text":
            jobs.append(_text_job(config, datasets, dtype, shard_bytes, batch_size))
        else:
            jobs.append(_clip_job(config, kind, datasets, geometry, dtype, shard_bytes, batch_size))
    return jobs


def before_encoding(config: Config) -> Config:
    """Return the configuration of a run without its caches, which ``args.precompute`` has yet to fill."""
    assert isinstance(config.args, TrainingArgs)
    latents = "latents" in config.args.precomputed  # which not every loss takes, see `sgm.checks.training`
    return replace(config, args=replace(config.args, latent_cache=None, text_cache=None, precompute=latents))


def after_encoding(config: Config) -> Config:
    """Return the configuration of a run with the caches that ``args.precompute`` fills."""
    args = config.args
    assert isinstance(args, TrainingArgs)
    folders = {"latent_cache": args.precomputed.get("latents"), "text_cache": args.precomputed.get("text")}
    settings = [f"args.{name}={json.dumps(folder)}" for name, folder in folders.items() if folder is not None]
    return replace(config, args=replace(args, **folders), overrides=(*config.overrides, *settings))


def encode_ahead(config: Config) -> Config:
    """Encode what ``args.precompute`` asks for and is missing; return the configuration with the caches.

    Collective, after `sgm.distributed.initialize`.

    Raises:
        InputError: data or settings cannot be cached, or a folder holds a cache of others.
    """
    args = config.args
    assert isinstance(args, TrainingArgs)
    folders = args.precomputed
    kinds: dict[str, list[Kind]] = {}
    for kind, folder in folders.items():
        kinds.setdefault(folder, []).append(kind)
    planned = {folder: plan_jobs(config, of_folder) for folder, of_folder in kinds.items()}
    for folder, jobs in planned.items():
        failures = run_jobs(jobs, Path(folder), name="args.latent_cache and args.text_cache")
        logger.info("encoded ahead: %s in %s, %d failed", " and ".join(kinds[folder]), folder, len(failures))
    gc.collect()  # the encoders, before the network is built
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
    return after_encoding(config)


def run_jobs(jobs: Sequence[Job], folder: Path, *, verify: bool = False, name: str = "--out") -> dict[str, str]:
    """Encode results missing in `folder`, with shards divided among ranks. Collective: all ranks call it.

    Retries keys that failed before, and encodes clips again that were replaced. Files of a wrong size or with another
    header count as missing.

    Args:
        jobs: of one cache.
        folder: of the cache.
        verify: read all finished results, and encode damaged ones again.
        name: of the option that names the folder, for messages.

    Returns:
        Key → reason of failed keys.

    Raises:
        InputError: the folder holds another cache, or is locked by another process; or ranks see other data.
        RunError: results cannot be written.
    """
    _require_same([job.description for job in jobs])
    with ExitStack() as stack:
        begun = sgm.distributed.run_on_rank_zero(lambda: _begin(jobs, folder, stack, verify, name))
        failures: dict[str, str] = {}
        for job, unfinished in zip(jobs, begun, strict=True):
            failures |= _run(job, folder, unfinished)
        return failures


def _require_same(own: Sequence[Description]) -> None:
    """Check that the caches of all ranks are those of rank zero, whose numbers of shards they will fill.

    Raises:
        InputError: they are not; the message names rank and differences.
    """
    digest = digest_of([asdict(each) for each in own])
    if not sgm.distributed.any_rank(sgm.distributed.broadcast_from_rank_zero(digest) != digest):
        return
    first = sgm.distributed.broadcast_from_rank_zero(list(own))
    found = [line for before, after in zip(first, own, strict=True) for line in changes(before, after)]
    shown = {rank: lines for rank, lines in enumerate(sgm.distributed.all_gather_objects(listed(found))) if lines}
    said = "\n".join(f"rank {rank}:\n{lines}" for rank, lines in shown.items())
    cure = "let all machines see the same files and settings"
    raise InputError(f"ranks would encode other data than rank 0; {cure}. Compared with rank 0,\n{said}")


def _begin(jobs: Sequence[Job], folder: Path, stack: ExitStack, verify: bool, name: str) -> list[list[int]]:
    """Create the folder and lock it until `stack` is closed; return the unfinished shards of each job."""
    require_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if lock := lock_folder(folder, cure=f"name another folder with {name}"):
        stack.enter_context(lock)
    remove_leftovers(folder)
    for job in jobs:
        begin(folder, job.description, name=name)
    return [job.description.unfinished(folder, verify=verify, contents=job.contents) for job in jobs]


def _run(job: Job, folder: Path, unfinished: Sequence[int]) -> dict[str, str]:
    """Encode shards; return key → reason of failed keys, of all ranks."""
    rank, world = sgm.distributed.rank(), sgm.distributed.world_size()
    description, failures, own = job.description, {}, unfinished[rank::world]
    num = sum(len(description.shards[shard]) for shard in own)
    with ExitStack() as stack:
        done = stack.enter_context(bar(what=description.kind, total=num, leave=True))
        if own:
            encode = stack.enter_context(job.loaded())
            logger.info("encoding %s: %d on this rank, in %d shards", description.kind, num, len(own))
            for shard in own:
                results = _results(folder, job, shard, encode, done)
                failures |= write_shard(folder, description, shard, results, job.contents)
    # In the store: a rank with slow files or large shards may take longer than the timeout of a collective.
    sgm.distributed.wait_for_all()
    for of_rank in sgm.distributed.all_gather_any(failures):
        failures |= of_rank
    for key, reason in failures.items() if is_rank_zero() else ():
        logger.warning("not encoded: %s: %s", key, reason)
    return failures


def _results(folder: Path, job: Job, shard: int, encode: Encode, done: Any) -> Iterator[torch.Tensor | str]:
    """Yield the results of a shard in order, read from an earlier run or encoded."""
    keys = job.description.shards[shard]
    written = read_shard(folder, job.description, shard, job.contents)
    encoded = encode([key for key in keys if key not in written])
    for key in keys:
        result = written[key] if key in written else next(encoded)
        done.update()
        yield result


def _text_job(config: Config, datasets: Sequence[Any], dtype: str | None, shard_bytes: int, batch_size: int) -> Job:
    conditioner = instantiate_from_config(config.model["conditioner_config"])
    encoder, device = text_encoder_of(conditioner), sgm.distributed.device()
    source, keys = text_source(conditioner), texts(datasets, conditioner)
    stored = default(dtype, source["precision"])
    size = encoder.max_length * encoder.embed_dim * PRECISIONS[stored].itemsize

    @contextmanager
    def loaded() -> Iterator[Encode]:
        encoder.to(device)
        try:
            yield lambda keys: (each for texts in _batches(keys, batch_size) for each in encoder(texts, batch_size))
        finally:
            encoder.release()

    description = Description("text", stored, source, divide(keys, [size] * len(keys), shard_bytes))
    return Job(description, size * len(keys), loaded, memory=lambda: text_encoder_bytes(config).device)


@dataclass(frozen=True)
class _Clip:
    """A clip of a data set."""

    dataset: Any
    index: int
    path: str
    shape: Shape | str  # a string is the reason why the clip is unreadable

    def taken(self, kind: Kind) -> Shape:
        """Return frames, height and width of what is encoded of a readable clip."""
        assert not isinstance(self.shape, str)
        return (1, *self.shape[1:]) if kind == "images" else self.shape

    def pixels(self, kind: Kind) -> torch.Tensor | str:
        """Return the clip or its first frame, (F, 3, H, W); or the reason why decoding fails.

        Its mask is in no cache, so that one that cannot be read costs no latents.
        """
        if isinstance(self.shape, str):
            return self.shape
        try:
            dataset = copy.copy(self.dataset)
            dataset.mask = False
            sample = dataset.sample(self.index, None, self.taken(kind))
        except ClipError as error:
            return error.reason
        if kind == "controls":
            return sample["control"]
        return sample["image"][None] if kind == "images" and sample["image"] is not None else sample["mp4"]


def _clip_job(
    config: Config,
    kind: Kind,
    datasets: Sequence[Any],
    geometry: Geometry,
    dtype: str | None,
    shard_bytes: int,
    batch_size: int,
) -> Job:
    if kind == "images" and not geometry.image_conditioned:
        raise InputError("--images: the network takes no image; it is for image-to-video models")
    args = config.args
    assert isinstance(args, TrainingArgs)
    require_repeatable(config, datasets)
    clips, left_out = _clips(config, kind, datasets)
    if all(isinstance(clip.shape, str) for clip in clips.values()):
        raise InputError(f"args.train_data={list(args.train_data)} has no clip that can be trained on")
    precision = resolve_training_precision(config, sgm.distributed.device().type)
    source = clip_source(config, datasets[0], precision, kind)
    stored = default(dtype, source["precision"])
    sizes = [_num_elements(clip.shape, geometry, kind) * PRECISIONS[stored].itemsize for clip in clips.values()]

    @contextmanager
    def loaded() -> Iterator[Encode]:
        vae = _load_vae(config, PRECISIONS[source["precision"]])

        def encode(keys: Sequence[str]) -> Iterator[torch.Tensor | str]:
            ahead = _read_ahead([clips[key] for key in keys], kind, max(args.num_workers, batch_size))
            for batch in _batches(ahead, batch_size):
                yield from _encode_together(vae, batch)

        yield encode

    shapes = tuple(None if isinstance(clip.shape, str) else "x".join(map(str, clip.shape)) for clip in clips.values())
    description = Description(kind, stored, source, divide([*clips], sizes, shard_bytes), shapes, tuple(left_out))
    largest = max((clip.taken(kind) for clip in clips.values() if not isinstance(clip.shape, str)), key=math.prod)
    memory = partial(_encoding_bytes, config, largest, PRECISIONS[source["precision"]], min(batch_size, len(clips)))
    return Job(description, sum(sizes), loaded, contents_of(datasets, kind), memory)


def _clips(config: Config, kind: Kind, datasets: Sequence[Any]) -> tuple[dict[str, _Clip], list[str]]:
    """Return key → clip, and the keys of clips that fit no bucket.

    Raises:
        InputError: two clips have the same key.
    """
    clips: dict[str, _Clip] = {}
    left_out: dict[str, None] = {}
    keys_of = [dataset.cache_keys(**part_of(kind)) for dataset in datasets]
    require_distinct(keys_of)
    for dataset, keys in zip(datasets, keys_of, strict=True):
        shapes = sgm.distributed.run_on_rank_zero(partial(shapes_of, config, dataset))
        for index, path in enumerate(dataset.paths):
            if path not in keys:  # the data set cannot use it
                continue
            # Rank zero may not know the path; then the ranks differ, which `_require_same` says.
            key, shape = keys[path], shapes.get(path, "rank 0 does not have it")
            if shape is None:
                left_out[key] = None
                continue
            clips.setdefault(key, _Clip(dataset, index, path, shape))
    return clips, [*left_out]


def _num_elements(shape: Shape | str, geometry: Geometry, kind: Kind) -> int:
    """Return the number of elements in the moments of a clip."""
    if isinstance(shape, str):
        return 0
    frames, height, width = (1, *shape[1:]) if kind == "images" else shape
    latents = (frames - 1) // geometry.time_compression + 1
    return 2 * geometry.out_channels * latents * (height // 8) * (width // 8)


def _load_vae(config: Config, dtype: torch.dtype) -> Any:
    section = config.model["first_stage_config"]
    params = {**section["params"], "cp_size": 1}  # ranks encode different clips
    with without_allocating():
        vae = instantiate_from_config({**section, "params": params})
    vae.eval().requires_grad_(False)
    device = sgm.distributed.device()
    logger.info("%s", load_autoencoder(vae, vae.ckpt_path, ignore_keys=vae.ignore_keys, dtype=dtype, device=device))
    return vae


def _batches(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` values in order; the last one may be shorter."""
    left = iter(values)
    while batch := list(itertools.islice(left, size)):
        yield batch


def _encode_together(vae: Any, clips: Sequence[torch.Tensor | str]) -> list[torch.Tensor | str]:
    """Return the moments of clips (F, 3, H, W), encoded at once with those of the same shape; reasons stay."""
    results, places = list(clips), {}
    for place, pixels in enumerate(clips):
        if not isinstance(pixels, str):
            places.setdefault(pixels.shape, []).append(place)
    for same in places.values():
        moments = _moments(vae, torch.stack([clips[place] for place in same]))
        for place, each in zip(same, moments, strict=True):
            results[place] = each
    return results


@torch.no_grad()
def _moments(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode clips (B, F, 3, H, W) in [−1, 1] into mean and log-variance (B, 2z, (F−1)/4+1, H/8, W/8)."""
    parameter = next(vae.parameters())
    return vae.encode_moments(rearrange(pixels, "b f c h w -> b c f h w").to(parameter.device, parameter.dtype))


def _encoding_bytes(config: Config, shape: Shape, dtype: torch.dtype, batch_size: int) -> float:
    """Return the bytes of the VAE, and of its activations when it encodes a batch of clips of a shape."""
    usage = once(encode_usage, config, shape, dtype, batch_size)
    return usage.weights * dtype.itemsize + usage.peak


def _read_ahead(clips: Sequence[_Clip], kind: Kind, num: int) -> Iterator[torch.Tensor | str]:
    """Yield the pixels of clips in order, prefetching up to `num` clips in threads."""
    waiting: deque[Future[torch.Tensor | str]] = deque()
    with ThreadPoolExecutor(num) as pool:
        for clip in clips:
            waiting.append(pool.submit(clip.pixels, kind))
            if len(waiting) > num:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
