"""Report the memory of a run, and fit it into a card: the settings that it needs, or the preset for sampling.

Estimates are those of `sgm.checks.estimate`; a tenth of a card stays free for kernels and the allocator.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from sgm.checks.estimate import Encodes, Estimate, clip_of, memory_text, rank_row, sampling_estimate, training_estimate
from sgm.checks.mesh import mesh_of, with_batch
from sgm.checks.recomputation import attention_share, cheapest, kept_attention_problem
from sgm.checks.sampling import LARGE_FRAME, params_of
from sgm.checks.sampling_plan import check_sampling
from sgm.checks.training import geometry_of, with_largest_bucket
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, ConfigError, load_config
from sgm.distributed import device
from sgm.modules.geometry import FREE_SIZE, Geometry
from sgm.util import InputError, default
from sgm.weights.adapters import is_added, with_adapters
from sgm.weights.lora.several import with_loras

ROOM = 0.9  # of a card

# Settings of files in configs/memory that matter to sampling, from the fastest to the smallest. All are exact, except
# the tiles of frames above 480×720 pixels.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "80gb": {"network_offload": "none", "text_encoder_offload": "cpu"},
    "24gb": {"network_offload": "cpu", "text_encoder_offload": "blocks"},
    "8gb": {"network_offload": "blocks", "text_encoder_offload": "blocks", "vae_tiling": "large"},
}


@dataclass(frozen=True)
class Change:
    """A setting that takes less memory.

    Attributes:
        setting: ``section.key=value``.
        phases: of `Estimate`, which get smaller.
        cost: what it costs, for the report.
        exact: results stay the same.
        needs: what must be installed.
    """

    setting: str
    phases: frozenset[str]
    cost: str
    exact: bool = True
    needs: str = ""

    def __str__(self) -> str:
        """Return the text of the report."""
        needs = f"; needs {self.needs}" if self.needs else ""
        return f"{'exact' if self.exact else 'approximate'}; {self.cost}{needs}"


def _phases(names: str) -> frozenset[str]:
    return frozenset(names.split())


_LOWMEM = "pip install 'cogvideox-sat[lowmem]'"
_TILES = "the VAE works in tiles, which are blended"

# Exact ones first, and among them those that cost least.
SAMPLING = (
    Change("args.text_encoder_offload=release", _phases("encode network decode"), "T5 leaves after the last prompt"),
    Change("args.network_offload=cpu", _phases("encode decode"), "copies the network once a prompt"),
    Change("args.text_encoder_offload=blocks", _phases("text"), "T5 passes through the device block by block"),
    Change(
        "args.network_offload=blocks",
        _phases("encode network decode"),
        "copies the network in each step, while it computes",
    ),
    Change("args.vae_tiling=true", _phases("encode decode"), _TILES, exact=False),
    Change("args.weights=int8", _phases("encode network decode"), "the network in 8 bits", exact=False, needs=_LOWMEM),
    Change("args.text_encoder_weights=int8", _phases("text"), "T5 in 8 bits", exact=False, needs=_LOWMEM),
)
_ALL = "text encode network optimizer validation"
TRAINING = (
    Change("args.text_encoder_offload=cpu", _phases(_ALL), "copies T5 once a step"),
    Change("args.checkpoint_activations=true", _phases("network"), "a third more time a step"),
    Change(
        "args.network_offload=cpu",
        _phases("text encode optimizer validation"),
        "copies the network once a step, from caches once a video",
    ),
    Change("args.text_encoder_offload=blocks", _phases(_ALL), "T5 passes through the device block by block"),
    Change("args.offload_activations=true", _phases("network"), "copies activations, while the network computes"),
    Change("args.network_offload=blocks", _phases(_ALL), "copies the network three times a step, while it computes"),
    Change(
        "deepspeed.zero_optimization.offload_optimizer.device=cpu",
        _phases(_ALL),
        "the optimizer runs on the CPU, from host memory",
    ),
    Change(
        "model.first_stage_config.params.encode_chunk=8",
        _phases("encode validation"),
        "the VAE encodes 8 frames at a time, as in diffusers",
        exact=False,
    ),
    Change("args.vae_tiling=true", _phases("validation"), _TILES, exact=False),
    Change("args.base_weights=int8", _phases(_ALL), "the frozen network in 8 bits", exact=False, needs=_LOWMEM),
)

EstimateOf = Callable[[Sequence[str]], Estimate]

NEXT_OF_SAMPLING = (
    "sample fewer or smaller frames (args.sampling_num_frames, args.sampling_image_size), or share a sample among "
    "devices (configs/parallel/sample_2.yaml)"
)


def config_with(config: Config, settings: Sequence[str] = ()) -> Config:
    """Load the files of `config` again, with its overrides and then `settings`.

    Raises:
        ConfigError: they do not go with this model.
    """
    loaded = config
    if settings:
        overrides = [*config.overrides, *settings]
        loaded = load_config(config.bases, overrides, mode=config.mode, trust=config.trust)
    try:
        loaded = with_loras(with_adapters(loaded))
    except InputError:  # the weights are not there yet
        pass
    return with_batch(loaded) if loaded.mode == "train" else loaded


# Where weights, prompts and clips are named: what a run needs is known before they are there.
_FILES = frozenset(
    (
        "args.load",
        "args.base",
        "args.input_file",
        "args.train_data",
        "args.latent_cache",
        "args.text_cache",
        "model.first_stage_config.params.ckpt_path",
        "model.conditioner_config",
    )
)
_PRECISION = frozenset(("args.fp16", "deepspeed.fp16.enabled"))  # which this machine may not have, and a card does


@contextmanager
def written_without_files(report: Callable[[], str], write: Callable[[str], object]) -> Iterator[None]:
    """Context of checks: if they find only that files are missing, `write` the `report` before that is said."""
    try:
        yield
    except ConfigError as error:
        if not error.elsewhere and all(problem.path in _FILES | _PRECISION for problem in error.problems):
            write(report())
        raise


def room_on(device: torch.device) -> float | None:
    """Return the bytes that a run may take on a device now; None for a CPU, and a device in the host's memory."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):  # one that shares the host's memory
        return None
    free, total = module.mem_get_info(device)
    return min(free, ROOM * total)


def room_for(card: float | None) -> float | None:
    """Return the bytes that a run may take on a card of so many GiB; None takes the accelerator, if there is one."""
    return room_on(device()) if card is None else ROOM * card * 2**30


def fit(estimate_of: EstimateOf, room: float, changes: Iterable[Change]) -> tuple[list[Change], Estimate]:
    """Choose changes until a run fits into `room` bytes, or none helps any more.

    Args:
        estimate_of: of the run with some settings changed; a ConfigError refuses them.
        room: bytes on the device.
        changes: in the order in which they are tried.

    Returns:
        The changes that are needed, and the estimate with them.
    """

    def with_changes(made: Iterable[Change]) -> Estimate | None:
        try:
            return estimate_of([change.setting for change in made])
        except ConfigError:  # not for this model, or not with these settings
            return None

    chosen: list[Change] = []
    current, changes = estimate_of(()), list(changes)
    before: list[Change] | None = None
    while chosen != before:  # what did not help at first may, after others
        before = chosen
        for change in changes:
            if change in chosen or not _over(current, room) & change.phases:
                continue
            found = with_changes([*chosen, change])
            if found and any(found.device.get(name, 0.0) < current.device[name] for name in _over(current, room)):
                chosen, current = [*chosen, change], found
    for change in chosen[:-1]:  # a later one may do the work of an earlier one, unless it needs that
        fewer = [other for other in chosen if other is not change]
        found = with_changes(fewer)
        if found and found.peak <= max(room, current.peak):
            chosen, current = fewer, found
    return chosen, current


def _over(estimate: Estimate, room: float) -> frozenset[str]:
    return frozenset(name for name, size in estimate.device.items() if size > room)


def with_preset(config: Config, dtype: torch.dtype, room: float | None) -> tuple[Config, str]:
    """Return the configuration of a sampling run with the first of `PRESETS` that fits, and which one for a report.

    A setting that the run gives stays: one on the command line, or one in a file that is not the default.

    Args:
        config: with ``args.memory: auto``.
        dtype: of the network.
        room: bytes on the device; None has room for everything.

    Raises:
        InputError: none fits.
    """
    peaks = {}
    for name, settings in PRESETS.items():
        chosen = {key: value for key, value in settings.items() if not _is_given(config, key)}
        changed = replace(config, args=replace(config.args, memory=None, **chosen))
        if room is None or (peak := sampling_estimate(changed, dtype).peak) <= room:
            return changed, _preset_text(changed, name, settings.keys() - chosen.keys())
        peaks[name] = peak
    smallest = min(peaks, key=lambda name: peaks[name])
    given = _as_given(config, [key for key in PRESETS[smallest] if _is_given(config, key)])
    raise InputError(
        f"args.memory=auto: no preset fits into {memory_text(room or 0)}: configs/memory/{smallest}.yaml takes "
        f"{memory_text(peaks[smallest])}{given}; remove args.memory, and see what --check says"
    )


def _is_given(config: Config, name: str) -> bool:
    """Whether a run has its own value of a key of ``args`` that presets set."""
    on_command_line = any(override.partition("=")[0] == f"args.{name}" for override in config.overrides)
    return on_command_line or getattr(config.args, name) != getattr(type(config.args), name)


def _preset_text(config: Config, name: str, given: Collection[str]) -> str:
    """Return which preset `config` has, whether it is exact, and which of its settings are `given` instead."""
    tiles = config.args.vae_tiling is True or (config.args.vae_tiling == "large" and _is_large(config))
    effect = "approximate: the VAE decodes in tiles" if tiles else "exact"
    return f"configs/memory/{name}.yaml, {effect}" + _as_given(config, given)


def _as_given(config: Config, given: Collection[str]) -> str:
    values = {key: getattr(config.args, key) for key in sorted(given)}
    kept = ", ".join(f"args.{key}={str(v).lower() if isinstance(v, bool) else v}" for key, v in values.items())
    return f"; {kept} as given" if kept else ""


def _is_large(config: Config) -> bool:
    geometry = Geometry.from_network(params_of(config.model["network_config"]))
    height, width = default(check_sampling(config.args, geometry).size, geometry.nearest_size(*FREE_SIZE))
    return height * width > LARGE_FRAME


def card_rows(
    estimate_of: EstimateOf, size: float | None, changes: Iterable[Change], next_steps: str
) -> dict[str, str]:
    """Return the rows of the report about a card: whether the run fits, what makes it fit, or the next steps.

    Args:
        estimate_of: of the run with some settings changed.
        size: GiB of the card; None takes the accelerator of this process, if there is one.
        changes: that may be made.
        next_steps: what to do if none of them is enough.
    """
    room = room_for(size)
    if room is None:
        return {}
    own = estimate_of(())
    name = device() if size is None else f"{size:g} GiB"
    card = f"{name}, of which a run may take {memory_text(room)}"
    if own.peak <= room:
        return {"card": f"{card}: it fits"}
    over = ", ".join(f"{phase} {memory_text(own.device[phase])}" for phase in sorted(_over(own, room)))
    chosen, found = fit(estimate_of, room, changes)
    rows = {"card": f"{card}: it does not fit ({over})"}
    if found.peak <= room:
        rows["it fits with"] = f"{' '.join(change.setting for change in chosen)} ({memory_text(found.peak)})"
    elif chosen:
        least = f"{' '.join(change.setting for change in chosen)} takes {memory_text(found.peak)}"
        rows["the smallest"] = f"{least}, which does not fit; {next_steps}"
    else:
        rows["next"] = next_steps
    return rows | {f"  {change.setting}": str(change) for change in chosen}


def sampling_rows(config: Config, dtype: torch.dtype, card: float | None = None) -> dict[str, str]:
    """Return the rows about ranks, memory, card and traffic of a sampling run.

    Args:
        config: of the run; its weights may be missing.
        dtype: of the network.
        card: GiB of the card to plan for; None takes the accelerator, if there is one.
    """
    rows = {"ranks": rank_row(mesh_of(config))}
    if config.args.memory is not None:
        try:
            config, rows["preset"] = with_preset(config, dtype, room_for(card))
        except InputError as error:
            if card is None:  # the run on this device is refused, too
                raise
            rows["preset"] = str(error)

    def estimate_of(settings: Sequence[str]) -> Estimate:
        return sampling_estimate(config_with(config, settings) if settings else config, dtype)

    return rows | _memory_rows(estimate_of, card, SAMPLING, NEXT_OF_SAMPLING)


def training_rows(
    config: Config,
    dtype: torch.dtype,
    trained: Collection[str],
    *,
    vae: Encodes = True,
    text_encoder: Encodes = True,
    card: float | None = None,
) -> dict[str, str]:
    """Return the rows about ranks, memory, card and traffic of a training run.

    With buckets, for the bucket with the most patches.

    Args:
        config: of the run; weights and clips may be missing.
        dtype: of the network.
        trained: names of the trained parameters.
        vae: what the VAE encodes.
        text_encoder: what the text encoder encodes.
        card: as in `sampling_rows`.
    """
    geometry = geometry_of(config)
    rows = {"ranks": rank_row(mesh_of(config))}
    if getattr(config.args, "checkpoint_activations", None) == "auto":
        room = room_for(card)
        number, keeps = recomputed_blocks(config, dtype, trained, room, vae=vae, text_encoder=text_encoder)
        depth = params_of(config.model["network_config"])["num_layers"]
        beside = " without their attention" if number and keeps else ""
        rows["recomputed"] = f"{number} of {depth} blocks{beside} (args.checkpoint_activations=auto)"
        chosen = [f"args.checkpoint_activations={number or 'false'}", f"args.keep_attention={bool(number and keeps)}"]
        config = config_with(config, [setting.lower() for setting in chosen])
    alone, largest = with_largest_bucket(config, geometry)
    rows |= {"largest bucket": largest} if largest else {}
    if clip_of(alone) is None:
        return rows | {"memory": "not estimated: data.params do not say how large clips are"}

    def estimate_of(settings: Sequence[str]) -> Estimate:
        changed, _ = with_largest_bucket(config_with(config, settings), geometry)
        return training_estimate(changed, dtype, trained, vae=vae, text_encoder=text_encoder)

    next_steps = next_of_training(encodes=bool(vae or text_encoder), adapters=all(map(is_added, trained)))
    return rows | _memory_rows(estimate_of, card, TRAINING, next_steps)


def next_of_training(*, encodes: bool, adapters: bool) -> str:
    """Return what to do where no settings are enough.

    Args:
        encodes: encoders are loaded beside training.
        adapters: only adapters are trained.
    """
    steps = []
    if encodes:
        steps.append(
            "encode clips and captions before (tools/prepare_dataset.py, then args.latent_cache and args.text_cache)"
        )
    if not adapters:
        steps.append("train adapters instead of all weights")
    steps.append("take fewer or smaller frames (data.params.max_num_frames, video_size)")
    return ", ".join([*steps, "or share clips among devices (configs/parallel/train_2.yaml)"])


def recomputed_blocks(
    config: Config,
    dtype: torch.dtype,
    trained: Collection[str],
    room: float | None,
    *,
    vae: Encodes = True,
    text_encoder: Encodes = True,
) -> tuple[int, bool]:
    """Return what ``args.checkpoint_activations: auto`` recomputes: see `cheapest` for the choice.

    Args:
        config: as in `training_rows`, like all others.
        dtype: of the network.
        trained: names of the trained parameters.
        room: bytes on the device; None has room for everything.
        vae: what the VAE encodes.
        text_encoder: what the text encoder encodes.

    Returns:
        The number of blocks, and whether their attention is kept.

    Raises:
        InputError: memory cannot be estimated.
    """
    args, params = config.args, params_of(config.model["network_config"])
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    if room is None:
        return 0, bool(args.keep_attention)
    largest, _ = with_largest_bucket(config, geometry := geometry_of(config))
    if (clip := clip_of(largest)) is None:
        raise InputError("args.checkpoint_activations=auto: data.params do not say how large clips are; give true")

    def peak(recomputed: int, keeps: bool) -> float:
        changes = {"checkpoint_activations": recomputed or False, "keep_attention": keeps}
        changed = replace(largest, args=replace(largest.args, **changes))
        estimate = training_estimate(changed, dtype, trained, vae=vae, text_encoder=text_encoder)
        return estimate.device["network"]

    choices = (True, False) if kept_attention_problem(config) is None else (False,)
    text = params_of((params.get("modules") or {}).get("pos_embed_config")).get("text_length", 0)
    tokens = text + geometry.num_patches((clip[0] - 1) // geometry.time_compression + 1, clip[1])
    return cheapest(
        params["num_layers"],
        room,
        peak,
        keeps=choices if args.keep_attention is None else (args.keep_attention,),
        share=attention_share(tokens, params["hidden_size"]),
    )


def _memory_rows(
    estimate_of: EstimateOf, card: float | None, changes: Iterable[Change], next_steps: str
) -> dict[str, str]:
    try:
        return estimate_of(()).rows() | card_rows(estimate_of, card, changes, next_steps)
    except Exception as error:  # a user's class may raise anything, and a run does not need the estimate
        reason = (str(error).splitlines() or [""])[0]
        return {"memory": f"not estimated: {type(error).__name__} on meta tensors: {reason}"}
