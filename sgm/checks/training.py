"""Check the clips of a training run (frames, size, buckets) against the network."""

import dataclasses
import inspect
from collections.abc import Collection, Iterator

from sgm.checks.sampling import params_of, takes_control
from sgm.checks.sampling_plan import scaling_problems, size_problems, with_scaling
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, ConfigError, Problem, text_encoders
from sgm.data.buckets.assign import Bucket, Buckets
from sgm.data.buckets.config import parse_buckets
from sgm.modules.geometry import Geometry
from sgm.util import default, get_obj_from_str

_DATA = "data.params"


def geometry_of(config: Config) -> Geometry:
    """Return the shapes of clips that a network can be trained on."""
    return with_scaling(config.args, Geometry.from_network(params_of(config.model["network_config"])))


def check_training_data(config: Config, geometry: Geometry) -> list[Problem]:
    """Check frame count, size and buckets of the clips against the network.

    Parameters that another class of data set lacks are not checked.

    Args:
        config: of a training run.
        geometry: of its network.

    Returns:
        Illegal values, with the nearest legal ones.
    """
    cls = get_obj_from_str(config.data["target"])
    signature = inspect.signature(cls)
    defaults = {name: entry.default for name, entry in signature.parameters.items() if entry.default is not entry.empty}
    params = defaults | (config.data.get("params") or {})
    problems = _frame_problems(params.get("max_num_frames"), geometry)
    problems += scaling_problems(geometry)
    problems += size_problems(f"{_DATA}.video_size", params.get("video_size"), geometry)
    problems += _control_problems(config, "control" in signature.parameters, geometry)
    problems += mask_problems(config)
    problems += _text_problems(config, getattr(cls, "TEXTS", None))
    try:
        fitted_buckets(config, geometry)
    except ConfigError as error:
        problems += error.problems
    return problems


def _text_problems(config: Config, texts: Collection[str] | None) -> Iterator[Problem]:
    """Yield input keys of text encoders that samples do not have; None if the data set does not say its texts."""
    for path, embedder in text_encoders(config.model):
        name = "input_key" if "input_key" in embedder else "input_keys"
        keys = [embedder[name]] if name == "input_key" else embedder.get(name) or []
        if texts is not None and (unknown := [key for key in keys if key not in texts]):
            found, cure = f"is {unknown[0]}, which no clip has", f"give {' or '.join(texts)}, the caption"
            yield Problem(f"{path}.{name}", "", found, cure)


def takes_pairs(config: Config) -> bool:
    """Whether the loss compares pairs of clips, see `sgm.modules.diffusionmodules.preference`."""
    target = (config.model.get("loss_fn_config") or {}).get("target")
    return target is not None and getattr(get_obj_from_str(target), "takes_pairs", False)


def pair_problems(config: Config, *, trains_adapters: bool) -> Iterator[Problem]:
    """Yield what contradicts training on pairs, or pairs without such a loss."""
    args, data, path = config.args, config.data.get("params") or {}, "model.loss_fn_config.target"
    assert isinstance(args, TrainingArgs)
    column = data.get("rejected_column")
    if not takes_pairs(config):
        if column is not None:
            found = f"is {column}, and the loss takes no pairs of clips"
            cure = "remove it, or add configs/loss/preferences.yaml"
            yield Problem(f"{_DATA}.rejected_column", "", found, cure)
        return
    loss = config.model["loss_fn_config"]["target"].rpartition(".")[2]
    if not trains_adapters:
        found = f"is {loss}, whose reference is the network without its adapters, and all weights are trained"
        yield Problem(path, "", found, "train a LoRA: add a lora_config, as in the shipped *_lora.yaml files")
    if takes_control(config):
        found = f"is given, and the reference of {loss} would have the columns that are trained for a control"
        yield Problem("model.network_config.params.control_channels", "", found, "remove configs/control/video.yaml")
    if column is None:
        found = f"is missing, and {loss} compares pairs of clips"
        cure = "name the column of a manifest with the clips that are not preferred, such as rejected"
        yield Problem(f"{_DATA}.rejected_column", "", found, cure)
    if args.latent_cache or (args.precompute and "latents" in args.precomputed):
        key = "latent_cache" if args.latent_cache else "precompute"
        cure = "remove it; args.text_cache works, alone or with precompute"
        yield Problem(f"args.{key}", "", f"is given, and a cache has no rejected clips, which {loss} needs", cure)
    if config.model.get("latent_input"):
        yield Problem("model.latent_input", "", f"is true, and {loss} takes videos", "set it to false")


def mask_problems(config: Config) -> list[Problem]:
    """Return what contradicts masks in the data."""
    if not (config.data.get("params") or {}).get("mask"):
        return []
    target = (config.model.get("loss_fn_config") or {}).get("target")
    problems = []
    if target is not None and not getattr(get_obj_from_str(target), "takes_mask", False):
        found = f"is true, and {target.rpartition('.')[2]} takes no mask"
        cure = "remove it, or train with sgm.modules.diffusionmodules.loss.VideoDiffusionLoss"
        problems.append(Problem(f"{_DATA}.mask", "", found, cure))
    if config.model.get("latent_input"):
        found = "is true, and masks are those of videos"
        problems.append(Problem("model.latent_input", "", found, f"set it to false, or remove {_DATA}.mask"))
    return problems


def _control_problems(config: Config, has_controls: bool, geometry: Geometry) -> list[Problem]:
    """Return the contradiction of a network and data of which only one has a control."""
    given = (config.data.get("params") or {}).get("control")
    channels = f"the network's control_channels is {geometry.control_channels}"
    if geometry.control_channels and not has_controls:
        found = f"has no parameter control, and {channels}"
        return [Problem("data.target", "", found, "take data_video.SFTDataset, or remove control_channels")]
    if given is None or bool(given) == bool(geometry.control_channels):
        return []
    cure = "remove it: clips have a control if the network takes one (configs/control/video.yaml)"
    return [Problem(f"{_DATA}.control", "", f"is {str(given).lower()}, and {channels}", cure)]


def fitted_buckets(config: Config, geometry: Geometry) -> Buckets | None:
    """Return the buckets of the training clips that the network supports; None without buckets.

    Raises:
        ConfigError: they are malformed, or the network does not support one of them.
    """
    given = (config.data.get("params") or {}).get("buckets")
    return None if given is None else parse_buckets(given).supported_by(geometry)


def longest_latents(config: Config, geometry: Geometry) -> int | None:
    """Return the latent frames of the longest training clip; None if the data section does not say."""
    buckets = fitted_buckets(config, geometry)
    given = (config.data.get("params") or {}).get("max_num_frames")
    frames = max((bucket.frames for bucket in buckets.buckets), default=given) if buckets is not None else given
    return None if frames is None else (frames - 1) // geometry.time_compression + 1


def with_largest_bucket(config: Config, geometry: Geometry) -> tuple[Config, str]:
    """Return the configuration restricted to the bucket with the most patches, and a description; for estimates.

    Without buckets, return the same configuration and "".

    Args:
        config: of a checked training run.
        geometry: of its network.
    """
    buckets = fitted_buckets(config, geometry)
    if buckets is None:
        return config, ""
    micro_batch = config.deepspeed["train_micro_batch_size_per_gpu"]

    def batch_size(bucket: Bucket) -> int:
        return default(bucket.batch_size, micro_batch)

    def patches(bucket: Bucket) -> int:
        latents = (bucket.frames - 1) // geometry.time_compression + 1
        return batch_size(bucket) * geometry.num_patches(latents, (bucket.height, bucket.width))

    largest = max(buckets.buckets, key=patches)
    params = {"video_size": [largest.height, largest.width], "max_num_frames": largest.frames, "buckets": None}
    alone = dataclasses.replace(
        config,
        data={**config.data, "params": {**config.data["params"], **params}},
        deepspeed={**config.deepspeed, "train_micro_batch_size_per_gpu": batch_size(largest)},
    )
    return alone, f"{largest}, {batch_size(largest)} at a time"


def _frame_problems(frames: int | None, geometry: Geometry) -> list[Problem]:
    if frames is None or geometry.frames_are_legal(frames):
        return []
    legal = geometry.legal_frames()
    closest = min(legal, key=lambda count: abs(count - frames))
    step = geometry.time_compression
    cure = f"nearest legal: {_DATA}.max_num_frames={closest}; legal: 1 + multiples of {step}, up to {legal[-1]}"
    if frames > legal[-1] and (frames - 1) % step == 0 and not geometry.fixed_size:
        cure += "; args.time_scaling=riflex scales rotary positions to more; if the weights were trained on so many, "
        cure += f"model.network_config.params.num_frames={frames} allows it"
    return [Problem(f"{_DATA}.max_num_frames", "", f"is {frames}, which the network does not support", cure)]
