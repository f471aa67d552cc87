"""Check the clips of a training run (frames, size, buckets) against the network."""

import dataclasses
import inspect

from sgm.checks.sampling import size_problems
from sgm.config.load import Config, ConfigError, Problem
from sgm.data.buckets.assign import Bucket, Buckets
from sgm.data.buckets.config import parse_buckets
from sgm.modules.geometry import Geometry
from sgm.util import default, get_obj_from_str

_DATA = "data.params"


def check_training_data(config: Config, geometry: Geometry) -> list[Problem]:
    """Check frame count, size and buckets of the clips against the network.

    Parameters that another class of data set lacks are not checked.

    Args:
        config: of a training run.
        geometry: of its network.

    Returns:
        Illegal values, with the nearest legal ones.
    """
    signature = inspect.signature(get_obj_from_str(config.data["target"]))
    defaults = {name: entry.default for name, entry in signature.parameters.items() if entry.default is not entry.empty}
    params = defaults | (config.data.get("params") or {})
    problems = _frame_problems(params.get("max_num_frames"), geometry)
    problems += size_problems(f"{_DATA}.video_size", params.get("video_size"), geometry)
    problems += _control_problems(config, "control" in signature.parameters, geometry)
    try:
        fitted_buckets(config, geometry)
    except ConfigError as error:
        problems += error.problems
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
    legal = geometry.legal_frames()
    if frames is None or frames in legal:
        return []
    closest = min(legal, key=lambda count: abs(count - frames))
    step = geometry.time_compression
    cure = f"nearest legal: {_DATA}.max_num_frames={closest}; legal: 1 + multiples of {step}, up to {legal[-1]}"
    if frames > legal[-1] and (frames - 1) % step == 0 and not geometry.fixed_size:
        cure += f"; rotary positions have no limit, so model.network_config.params.num_frames={frames} allows it"
    return [Problem(f"{_DATA}.max_num_frames", "", f"is {frames}, which the network does not support", cure)]
