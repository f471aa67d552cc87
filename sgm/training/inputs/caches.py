"""Caches of encoded clips and captions: their sources, and opening them for training."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sgm.distributed
from sgm.checks.estimate import Encodes, in_step
from sgm.checks.sampling import params_of, takes_control
from sgm.checks.training import fitted_buckets, geometry_of
from sgm.config.args import TrainingArgs
from sgm.config.load import Config
from sgm.config.precision import autoencoder_dtype, precision_name
from sgm.data.buckets.assign import NOWHERE, Buckets, ClassBuckets, clip_sizes
from sgm.data.cache import KINDS, CachedTensors, Kind, has_kind
from sgm.data.cache_folder import LocalFolder
from sgm.data.clips.decode import READER
from sgm.data.contents import Contents
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.training.inputs.clips import Data, store_of
from sgm.urls import is_url, redacted
from sgm.util import InputError, instantiate_from_config
from sgm.weights.files import weights_digest

# Parameters of the autoencoder without effect on its encoder.
_NOT_ENCODING = ("ckpt_path", "ignore_keys", "cp_size", "decoder_config", "loss_config", "monitor", "input_key")
_NEEDED = ("cached", "cache_keys", "random_flip", "reshape_mode")  # attributes of a data set


@dataclass(frozen=True)
class Caches:
    """The caches of a run; None for each one not used.

    Attributes:
        latents: moments of the training clips.
        images: moments of the first frames for image-to-video.
        text: embeddings of the training captions.
        vae: reason to load the autoencoder; empty if it is not loaded.
        text_encoder: reason to load the text encoder; empty if it is not loaded.
        vae_waits: the autoencoder only serves samples of evaluations, and waits in host memory between them.
        vae_encodes: what the autoencoder encodes beside training.
        text_encodes: what the text encoder encodes beside training.
    """

    latents: CachedTensors | None
    images: CachedTensors | None
    text: CachedTensors | None
    vae: str
    text_encoder: str
    vae_waits: bool = False
    vae_encodes: Encodes = False
    text_encodes: Encodes = False

    @property
    def encodes(self) -> dict[str, Encodes]:
        """What the encoders do beside training, as `sgm.checks.estimate.training_estimate` takes it."""
        return {"vae": self.vae_encodes, "text_encoder": self.text_encodes}

    @property
    def in_step(self) -> bool:
        """Whether an encoder works in a step of training."""
        return any(map(in_step, self.encodes.values()))

    def report(self) -> dict[str, str]:
        """Return rows of the report: name → text."""
        rows = {}
        if self.latents is not None:
            rows["latents"] = _line(self.latents, "clips", "VAE", self.vae)
        if self.images is not None:
            rows["images"] = f"{len(self.images):,} from {self.images.folder}, without the noise that training adds"
        if self.text is not None:
            rows["text"] = _line(self.text, "captions", "T5", self.text_encoder)
        return rows


def _line(cache: CachedTensors, items: str, encoder: str, reason: str) -> str:
    return f"{len(cache):,} {items} from {cache.folder}; {encoder} is {_loaded(reason)}"


def _loaded(reason: str) -> str:
    return f"loaded: {reason}" if reason else "not loaded"


def open_latents(
    config: Config, data: Data, dtype: torch.dtype
) -> tuple[Data, CachedTensors | None, CachedTensors | None]:
    """Open ``args.latent_cache`` and check it against the configuration.

    Validation clips are taken from it too, if it holds them all in the shape in which they are evaluated.

    Returns:
        The data with clips from the cache, the cache of clips, and the cache of first frames or None.

    Raises:
        InputError: the cache is missing, unfinished, or for another configuration; or clips vary between epochs.
    """
    assert isinstance(config.args, TrainingArgs)
    if config.args.latent_cache is None:
        return data, None, None
    if config.model.get("latent_input"):
        raise InputError("the data are latents already (model.latent_input); remove args.latent_cache")
    require_repeatable(config, data.sources)
    opened = partial(CachedTensors, config.args.latent_cache, store=store_of(config))
    latents = opened("latents")
    keys = [dataset.cache_keys() for dataset in data.sources]
    require_distinct(keys)
    latents.require(_values(keys), clip_source(config, data.sources[0], dtype, "latents"))
    _require_contents(latents, data.sources, "latents")
    images, image_keys, has_image = None, keys, bool(config.model.get("noised_image_input"))
    if has_image and has_kind(latents.folder, "images"):
        images = opened("images")
        image_keys = [dataset.cache_keys(images=True) for dataset in data.sources]
        images.require(_values(image_keys), clip_source(config, data.sources[0], dtype, "images"))
        _require_contents(images, data.sources, "images")
    controls, control_keys = None, keys
    if takes_control(config):
        controls = opened("controls")
        control_keys = [dataset.cache_keys(controls=True) for dataset in data.sources]
        controls.require(_values(control_keys), clip_source(config, data.sources[0], dtype, "controls"))
        _require_contents(controls, data.sources, "controls")

    def cached(dataset: Any, of_clips: Any, of_images: Any, of_controls: Any) -> Any:
        given = {} if controls is None else {"controls": controls, "control_keys": of_controls}
        return dataset.cached(latents, of_clips, images=images, image_keys=of_images, first_frames=has_image, **given)

    train = [cached(*each) for each in zip(data.sources, keys, image_keys, control_keys, strict=True)]
    valid: list[Any] | None = []
    if _buckets(config) is not None:  # validation clips have one shape
        valid = None
    elif data.split is None:
        valid = _cached_valid(data.valid, cached, latents, images, controls)
    return data.with_cached(train, valid), latents, images


def _cached_valid(
    datasets: Sequence[Any], cached: Callable[..., Any], *caches: CachedTensors | None
) -> list[Any] | None:
    """Return validation data sets with samples from caches of clips, images and controls; None if those lack any."""
    found = []
    for dataset in datasets:
        if not all(hasattr(dataset, name) for name in _NEEDED):
            return None
        keys = []
        for cache, kind in zip(caches, KINDS[:3], strict=True):
            keys.append({} if cache is None else dataset.cache_keys(**part_of(kind)))
            if cache is None:
                continue
            if any(key not in cache for key in keys[-1].values()):
                return None
            contents = contents_of([dataset], kind)
            if contents is not None and cache.changed(contents):  # clips of the same names: they are decoded
                return None
        found.append(cached(dataset, *keys))
    return found


def part_of(kind: Kind) -> dict[str, bool]:
    """Return the arguments with which a data set gives the keys of a kind of results."""
    return {"images": {"images": True}, "controls": {"controls": True}}.get(kind, {})


def contents_of(datasets: Sequence[Any], kind: Kind) -> Contents | None:
    """Return the contents of the files of clips; None if a data set does not tell its files."""
    if not all(hasattr(dataset, "cache_files") for dataset in datasets):
        return None
    return Contents({key: of_one for each in datasets for key, of_one in each.cache_files(**part_of(kind)).items()})


def require_distinct(keys: Sequence[Mapping[str, str]]) -> None:
    """Check that no two clips of data sets, each given as path → key in a cache, have the same key.

    Raises:
        InputError: two have.
    """
    paths: dict[str, str] = {}
    for path, key in (pair for of_one in keys for pair in of_one.items()):
        if Path(other := paths.setdefault(key, path)).absolute() != Path(path).absolute():
            raise InputError(
                f"{other} and {path} cannot be told apart in a cache: name of the data folder, path below it and file "
                "size are the same; rename one of the folders"
            )


def _require_contents(cache: CachedTensors, datasets: Sequence[Any], kind: Kind) -> None:
    if (contents := contents_of(datasets, kind)) is not None:
        cache.require_contents(contents)


def _values(keys: Sequence[Mapping[str, str]]) -> list[str]:
    return [key for of_one in keys for key in of_one.values()]


def open_text(config: Config, data: Data) -> CachedTensors | None:
    """Open ``args.text_cache`` and check it against the configuration and the captions of `data`.

    Raises:
        InputError: the cache is missing, unfinished, or for another configuration.
    """
    assert isinstance(config.args, TrainingArgs)
    if config.args.text_cache is None:
        return None
    text = CachedTensors(config.args.text_cache, "text", store=store_of(config))
    conditioner = instantiate_from_config(config.model["conditioner_config"])
    text.require(texts(data.sources, conditioner), text_source(conditioner))
    return text


def require_repeatable(config: Config, datasets: Sequence[Any]) -> None:
    """Check that data sets return the same tensor for a clip in every epoch, and have the interface for caches.

    Raises:
        InputError: they do not; says how to fix it.
    """
    for dataset in datasets:
        if missing := [name for name in _NEEDED if not hasattr(dataset, name)]:
            kind = type(dataset).__name__
            raise InputError(f"{kind} lacks {', '.join(missing)}, which caches need; see data_video.SFTDataset")
        if dataset.random_flip > 0:
            raise InputError(
                f"data.params.random_flip is {dataset.random_flip:g}: a cache holds each clip once, and cannot mirror "
                "it; set it to 0, or train without args.latent_cache"
            )
        if dataset.reshape_mode == "random":
            raise InputError(
                "data.params.reshape_mode is random: a cache holds one part of each clip; set it to center, or train "
                "without args.latent_cache"
            )
    buckets = _buckets(config)
    if isinstance(buckets, ClassBuckets):
        kept = (rate for entry in buckets.classes for rule in entry.rules for rate in (rule.keep, rule.keep_frames))
        if any(0 < rate < 1 for rate in kept):
            raise InputError(
                "data.params.buckets keeps clips with probabilities below 1, so that a clip has other shapes in other "
                "epochs, and a cache holds one; give probabilities 0 and 1, or a list of shapes, or train without "
                "args.latent_cache"
            )


def _buckets(config: Config) -> Buckets | None:
    return fitted_buckets(config, geometry_of(config))


def shapes_of(config: Config, dataset: Any) -> dict[str, tuple[int, int, int] | str | None]:
    """Return path → shape (F, H, W) of each clip; None if it fits no bucket, a reason (str) if it is unreadable.

    With buckets, clips missing from the index are opened.
    """
    buckets, keys = _buckets(config), dataset.cache_keys()
    if buckets is None:
        return dict.fromkeys(keys, (dataset.max_num_frames, *dataset.video_size))
    infos = dataset.clip_infos()
    chosen = buckets.choose(
        clip_sizes(infos, fps=dataset.fps, skip=dataset.skip), np.zeros((len(infos), buckets.num_draws))
    )
    shapes = [
        info if isinstance(info, str) else None if index == NOWHERE else buckets.buckets[index].shape
        for info, index in zip(infos, chosen.tolist(), strict=True)
    ]
    return {path: shape for path, shape in zip(dataset.paths, shapes, strict=True) if path in keys}


def clip_source(config: Config, dataset: Any, dtype: torch.dtype, kind: Kind) -> dict[str, Any]:
    """Return everything that the moments of clips or first frames depend on, except the clips.

    `dataset` is any data set of the run, since all have the same parameters; `dtype` is that of the network.
    """
    section = config.model["first_stage_config"]
    params = params_of(section)
    encoder = {name: value for name, value in params.items() if name not in _NOT_ENCODING}
    buckets = _buckets(config)
    shapes: dict[str, Any] = {"video_size": list(dataset.video_size)}
    if kind != "images":
        shapes |= {"max_num_frames": dataset.max_num_frames, "fps": dataset.fps}
    if buckets is not None:
        shapes = {"fps": dataset.fps, "buckets": _rules(buckets)}
    return {
        "vae": {"weights": weights_digest(params["ckpt_path"]), "target": section["target"], **encoder},
        "precision": precision_name(autoencoder_dtype(dtype)),
        "clip_reader": READER,
        "data": {**shapes, "skip_frames": list(dataset.skip), "reshape_mode": dataset.reshape_mode},
    }


def _rules(buckets: Buckets) -> Any:
    """Return the rules that assign clips to buckets, for JSON."""
    if not isinstance(buckets, ClassBuckets):
        return [str(bucket) for bucket in buckets.buckets]
    return {
        entry.name: {
            "sizes": [f"{height}x{width}" for height, width in entry.sizes],
            "keep": {str(rule.frames): [rule.keep, rule.keep_frames] for rule in entry.rules},
        }
        for entry in buckets.classes
    }


def text_encoder_of(conditioner: Any) -> FrozenT5Embedder:
    """Return the only text encoder of a conditioner.

    Raises:
        InputError: it has several, or one of another class.
    """
    embedders = list(conditioner.embedders)
    if len(embedders) != 1 or not isinstance(embedders[0], FrozenT5Embedder):
        kinds = ", ".join(type(embedder).__name__ for embedder in embedders)
        raise InputError(f"a text cache needs one FrozenT5Embedder in model.conditioner_config, which has: {kinds}")
    return embedders[0]


def text_source(conditioner: Any) -> dict[str, Any]:
    """Return everything that the embeddings depend on, except the captions."""
    encoder = text_encoder_of(conditioner)
    digests = [weights_digest(shard) for shard in encoder.folder.shards]
    return {
        "t5": {
            "weights": hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
            "tokenizer": hashlib.sha256(Path(encoder.folder.path, "spiece.model").read_bytes()).hexdigest(),
            "max_length": encoder.max_length,
            **encoder.folder.unreleased,
        },
        "precision": precision_name(encoder.dtype_on(sgm.distributed.device())),
    }


def texts(datasets: Sequence[Any], conditioner: Any) -> list[str]:
    """Return the texts that training encodes: captions, the empty caption, and the value for dropped captions.

    Raises:
        InputError: a data set has no captions.
    """
    if lacking := [type(dataset).__name__ for dataset in datasets if not hasattr(dataset, "captions")]:
        raise InputError(f"{lacking[0]} has no captions, which a text cache needs; see data_video.SFTDataset")
    dropped = [entry.legacy_ucg_value for entry in conditioner.entries if entry.legacy_ucg_value is not None]
    captions = [caption for dataset in datasets for caption in dataset.captions]
    return list(dict.fromkeys(["", *dropped, *captions]))


def reasons_to_load(config: Config, data: Data, images: Any, text: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the fields of `Caches` that say why autoencoder and text encoder are loaded despite caches.

    Args:
        config: of the run.
        data: from `open_latents`.
        images: cache of first frames.
        text: cache of captions.
        prompts: of ``args.valid_prompts``.
    """
    args = config.args
    assert isinstance(args, TrainingArgs)
    reason = ""
    if args.eval_interval is not None and text is not None:
        of_data = [getattr(dataset, "captions", None) for dataset in data.valid]
        needed = [*prompts, *filter(None, [args.negative_prompt]), *(one for each in of_data for one in each or ())]
        unknown = [prompt for prompt in dict.fromkeys(needed) if prompt not in text]
        if unknown or None in of_data:
            reason = f"evaluation encodes {len(unknown) or 'its'} texts that are not in the cache"
    vae = _vae_fields(config, images=images is not None, valid=bool(data.encoded))
    return vae | _text_fields(cached=text is not None, evaluation=reason)


def _text_fields(*, cached: bool, evaluation: str) -> dict[str, Any]:
    """Return the fields of `Caches` about the text encoder; `evaluation`: why it is loaded for evaluations alone."""
    if not cached:
        return {"text_encoder": "captions are encoded", "text_encodes": True}
    return {"text_encoder": evaluation, "text_encodes": "validation" if evaluation else False}


def _vae_fields(config: Config, *, images: bool, valid: bool) -> dict[str, Any]:
    """Return the fields of `Caches` about the autoencoder.

    Args:
        config: of the run.
        images: first frames are cached.
        valid: ``args.latent_cache`` holds the validation clips.
    """
    args, model = config.args, config.model
    assert isinstance(args, TrainingArgs)
    cached, evaluates = args.latent_cache is not None, args.eval_interval is not None
    takes_images, uncached = bool(model.get("noised_image_input")), evaluates and cached and not valid
    if not (cached or model.get("latent_input")):
        return {"vae": "clips are encoded", "vae_encodes": True}
    if takes_images and not images:
        return {"vae": "first frames are encoded, with noise", "vae_encodes": uncached or "first frames"}
    if uncached:
        reason = "evaluation encodes validation clips, which are not in the cache"
        return {"vae": reason, "vae_encodes": "validation"}
    if evaluates and (not args.only_log_video_latents or takes_images or takes_control(config)):
        return {"vae": "evaluation samples videos, and it waits in host memory between them", "vae_waits": True}
    return {"vae": ""}


def expected_caches(config: Config) -> tuple[Caches, dict[str, str]]:
    """Return what a run from caches will load, before they are there or can be opened, and the rows of its report.

    Of a cache that is there, its kinds count; another is taken to be as ``tools/prepare_dataset.py`` writes it without
    further switches: with latents and captions of ``args.train_data``, without first frames. Clips and texts of
    evaluations that come from elsewhere are taken to be encoded.
    """
    args = config.args
    assert isinstance(args, TrainingArgs)
    there = {name: folder is not None and (is_url(folder) or Path(folder).is_dir()) for name, folder in _given(args)}
    images = False
    if there["latent_cache"] and args.latent_cache is not None and not is_url(args.latent_cache):
        images = has_kind(LocalFolder(Path(args.latent_cache)), "images")
    fields = _vae_fields(config, images=images, valid=args.valid_data is None and _buckets(config) is None)
    elsewhere = args.valid_data is not None or args.valid_prompts is not None or bool(args.negative_prompt)
    reason = "evaluation encodes texts that may not be in the cache"
    uncached = args.eval_interval is not None and elsewhere
    fields |= _text_fields(cached=args.text_cache is not None, evaluation=reason if uncached else "")
    found = Caches(None, None, None, **fields)
    reasons = {"latent_cache": ("latents", "VAE", found.vae), "text_cache": ("text", "T5", found.text_encoder)}
    rows = {}
    for name, folder in _given(args):
        kind, encoder, reason = reasons[name]
        if folder is not None:
            missing = "" if there[name] else ", which is not there yet"
            rows[kind] = f"from {redacted(folder)}{missing}; {encoder} is {_loaded(reason)}"
    if found.vae_encodes == "first frames" and not there["latent_cache"]:
        rows["latents"] += "; tools/prepare_dataset.py --images caches them, without the noise"
    return found, rows


def _given(args: TrainingArgs) -> tuple[tuple[str, str | None], ...]:
    return ("latent_cache", args.latent_cache), ("text_cache", args.text_cache)
