"""Encode the clips and captions of a training run once, ahead of it; ``tools/prepare_dataset.py`` calls this.

Legend: F frames, H W pixels, L text tokens, D their size, z channels of the latents.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from tqdm import tqdm

import sgm.distributed
from sgm.checks.sampling import check_files, params_of
from sgm.checks.training import check_training_data
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, ConfigError
from sgm.config.precision import resolve_training_precision
from sgm.data.cache import SHARD_BYTES, Description, Kind, begin, divide, read_shard, write_shard
from sgm.data.clips.decode import ClipError
from sgm.io import remove_leftovers, require_writable
from sgm.log import get_logger, is_rank_zero
from sgm.modules.geometry import Geometry
from sgm.training.caches import clip_source, require_repeatable, shapes_of, text_encoder_of, text_source, texts
from sgm.training.data import open_folder
from sgm.training.state import lock_folder
from sgm.util import PRECISIONS, InputError, default, instantiate_from_config, without_allocating
from sgm.weights.checkpoint import load_autoencoder

logger = get_logger(__name__)

Shape = tuple[int, int, int]
Encode = Callable[[Sequence[str]], Iterator[torch.Tensor | str]]


@dataclass(frozen=True)
class Job:
    """What is to be encoded of one kind.

    Attributes:
        description: of the results.
        num_bytes: of all of them, about.
        loaded: has the encoder in memory inside its block, and gives what encodes keys in order; a string in place of
            a result says why there is none.
    """

    description: Description
    num_bytes: int
    loaded: Callable[[], AbstractContextManager[Encode]]


def plan_jobs(
    config: Config, kinds: Sequence[Kind], *, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> list[Job]:
    """Find out what is to be encoded; no weights are read, and clips only where buckets need their sizes.

    Args:
        config: of the training run.
        kinds: of results.
        dtype: in which results are stored; None keeps the precision that they are computed in.
        shard_bytes: of results in a file.

    Raises:
        InputError: configuration, files or data cannot be used.
    """
    args = config.args
    assert isinstance(args, TrainingArgs)
    geometry = Geometry.from_network(params_of(config.model["network_config"]))
    if problems := [*check_files(config), *check_training_data(config, geometry)]:
        raise ConfigError(config.located(problems))
    datasets = [open_folder(config, folder) for folder in args.train_data]
    jobs = []
    for kind in kinds:
        if kind == "text":
            jobs.append(_text_job(config, datasets, dtype, shard_bytes))
        else:
            jobs.append(_clip_job(config, kind, datasets, geometry, dtype, shard_bytes))
    return jobs


def run_jobs(jobs: Sequence[Job], folder: Path) -> dict[str, str]:
    """Encode what `folder` lacks, each rank a share of the shards; all ranks call together.

    What could not be encoded before is tried again.

    Returns:
        Key → reason of what the folder still lacks.

    Raises:
        InputError: another cache lies there, or another process works on it.
        RunError: results cannot be written.
    """
    with ExitStack() as stack:
        begun: list[list[int]] | InputError = []
        if sgm.distributed.rank() == 0:
            try:
                begun = _begin(jobs, folder, stack)
            except InputError as error:
                begun = error
        begun = sgm.distributed.broadcast_from_rank_zero(begun)
        if isinstance(begun, InputError):
            raise begun
        failures: dict[str, str] = {}
        for job, unfinished in zip(jobs, begun, strict=True):
            failures |= _run(job, folder, unfinished)
        return failures


def _begin(jobs: Sequence[Job], folder: Path, stack: ExitStack) -> list[list[int]]:
    """Make the folder ready, locked until `stack` is closed; return the shards that each job is to write."""
    require_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if lock := lock_folder(folder):
        stack.enter_context(lock)
    remove_leftovers(folder)
    for job in jobs:
        begin(folder, job.description)
    return [job.description.unfinished(folder) for job in jobs]


def _run(job: Job, folder: Path, unfinished: Sequence[int]) -> dict[str, str]:
    """Encode shards, and return key → reason of what no rank could encode."""
    rank, world = sgm.distributed.rank(), sgm.distributed.world_size()
    description, failures, own = job.description, {}, unfinished[rank::world]
    num = sum(len(description.shards[shard]) for shard in own)
    bar = tqdm(total=num, desc=description.kind, disable=None if is_rank_zero() and num else True)
    with ExitStack() as stack:
        stack.enter_context(bar)
        encode = stack.enter_context(job.loaded()) if own else None
        if own:
            logger.info("encoding %s: %d on this rank, in %d shards", description.kind, num, len(own))
        # A shard of each rank at a time, so that none waits at the end for longer than collective operations live.
        for start in range(0, len(unfinished), world):
            found: dict[str, str] = {}
            if encode is not None and start + rank < len(unfinished):
                shard = unfinished[start + rank]
                found = write_shard(
                    folder, description, shard, _counted(_results(folder, description, shard, encode), bar)
                )
            for more in sgm.distributed.all_gather_objects(found):
                failures |= more
    for key, reason in failures.items() if is_rank_zero() else ():
        logger.warning("not encoded: %s: %s", key, reason)
    return failures


def _results(folder: Path, description: Description, shard: int, encode: Encode) -> Iterator[torch.Tensor | str]:
    """Yield the results of a shard in order: those that an earlier run wrote, and the others anew."""
    there = read_shard(folder, description, shard)
    anew = encode([key for key in description.shards[shard] if key not in there])
    for key in description.shards[shard]:
        yield there[key] if key in there else next(anew)


def _counted(results: Iterator[Any], bar: tqdm) -> Iterator[Any]:
    for result in results:
        bar.update()
        yield result


def _text_job(config: Config, datasets: Sequence[Any], dtype: str | None, shard_bytes: int) -> Job:
    conditioner = instantiate_from_config(config.model["conditioner_config"])
    encoder, device = text_encoder_of(conditioner), sgm.distributed.device()
    source, keys = text_source(conditioner), texts(datasets, conditioner)
    stored = default(dtype, source["precision"])
    size = encoder.max_length * encoder.embed_dim * PRECISIONS[stored].itemsize

    @contextmanager
    def loaded() -> Iterator[Encode]:
        encoder.to(device)
        try:
            yield lambda keys: (encoder([key])[0] for key in keys)
        finally:
            encoder.release()

    description = Description("text", stored, source, divide(keys, [size] * len(keys), shard_bytes))
    return Job(description, size * len(keys), loaded)


@dataclass(frozen=True)
class _Clip:
    """Where a clip, or the picture that it starts from, is found."""

    dataset: Any
    index: int
    path: str
    shape: Shape | str  # or why it cannot be read

    def pixels(self, kind: Kind) -> torch.Tensor | str:
        """Decode it: (F, 3, H, W), or why that cannot be done."""
        if isinstance(self.shape, str):
            return self.shape
        frames, *size = self.shape
        try:
            sample = self.dataset.sample(self.index, None, (frames if kind == "latents" else 1, *size))
        except ClipError as error:
            return error.reason
        return sample["image"][None] if kind == "images" and sample["image"] is not None else sample["mp4"]


def _clip_job(
    config: Config, kind: Kind, datasets: Sequence[Any], geometry: Geometry, dtype: str | None, shard_bytes: int
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
    sizes = [_num_bytes(clip.shape, geometry, kind) * PRECISIONS[stored].itemsize for clip in clips.values()]

    @contextmanager
    def loaded() -> Iterator[Encode]:
        vae = _load_vae(config, PRECISIONS[source["precision"]])

        def encode(keys: Sequence[str]) -> Iterator[torch.Tensor | str]:
            for pixels in _read_ahead([clips[key] for key in keys], kind, max(args.num_workers, 1)):
                yield pixels if isinstance(pixels, str) else _moments(vae, pixels)

        yield encode

    shapes = tuple(None if isinstance(clip.shape, str) else "x".join(map(str, clip.shape)) for clip in clips.values())
    description = Description(kind, stored, source, divide([*clips], sizes, shard_bytes), shapes, tuple(left_out))
    return Job(description, sum(sizes), loaded)


def _clips(config: Config, kind: Kind, datasets: Sequence[Any]) -> tuple[dict[str, _Clip], list[str]]:
    """Return key → clip, each once, and the keys of those that fit no bucket.

    Raises:
        InputError: two clips have the same key.
    """
    clips: dict[str, _Clip] = {}
    left_out: dict[str, None] = {}
    for dataset in datasets:
        keys = dataset.cache_keys(images=kind == "images")
        shapes = sgm.distributed.broadcast_from_rank_zero(
            shapes_of(config, dataset) if sgm.distributed.rank() == 0 else None
        )
        for index, path in enumerate(dataset.paths):
            if path not in keys:  # it cannot be trained on, as the data set itself says
                continue
            key, shape = keys[path], shapes[path]
            if shape is None:
                left_out[key] = None
                continue
            clip = _Clip(dataset, index, path, shape)
            other = clips.setdefault(key, clip)
            if Path(other.path).absolute() != Path(path).absolute():
                raise InputError(
                    f"{other.path} and {path} cannot be told apart in a cache: the names of their data folders are "
                    "alike, theirs too, and their sizes; rename one of the folders"
                )
    return clips, [*left_out]


def _num_bytes(shape: Shape | str, geometry: Geometry, kind: Kind) -> int:
    """Return the numbers in the moments of a clip."""
    if isinstance(shape, str):
        return 0
    frames, height, width = shape if kind == "latents" else (1, *shape[1:])
    latents = (frames - 1) // geometry.time_compression + 1
    return 2 * geometry.out_channels * latents * (height // 8) * (width // 8)


def _load_vae(config: Config, dtype: torch.dtype) -> Any:
    section = config.model["first_stage_config"]
    params = {**section["params"], "cp_size": 1}  # every rank has clips of its own
    with without_allocating():
        vae = instantiate_from_config({**section, "params": params})
    vae.eval().requires_grad_(False)
    logger.info(
        "%s",
        load_autoencoder(vae, vae.ckpt_path, ignore_keys=vae.ignore_keys, dtype=dtype, device=sgm.distributed.device()),
    )
    return vae


@torch.no_grad()
def _moments(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Clip (F, 3, H, W) in −1..1 → mean and log-variance (2z, (F−1)/4+1, H/8, W/8)."""
    like = next(vae.parameters())
    return vae.encode_moments(rearrange(pixels, "f c h w -> 1 c f h w").to(like.device, like.dtype))[0]


def _read_ahead(clips: Sequence[_Clip], kind: Kind, num: int) -> Iterator[torch.Tensor | str]:
    """Yield the pixels of clips in their order, while up to `num` more are being decoded."""
    waiting: deque[Future[torch.Tensor | str]] = deque()
    with ThreadPoolExecutor(num) as pool:
        for clip in clips:
            waiting.append(pool.submit(clip.pixels, kind))
            if len(waiting) > num:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
