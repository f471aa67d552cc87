"""Weights in the SAT layout or as safetensors: found, checked strictly, put into a network, and saved.

The SAT checkpoint format of a network (more in docs/checkpoints.md)::

    DIR/latest                                  the iteration to load, e.g. 1000
    DIR/1000/mp_rank_00_model_states.pt         {"module": {"model.diffusion_model.<name>": tensor}}

and of an autoencoder: ``{"state_dict": {<name>: tensor}}``. A ``.safetensors`` file with the same names may take the
place of either file. Shapes: `D` hidden size, `C` input channels, ``(pt, p, p)`` patch along time, height and width.
Reading and writing stand in one file, longer than others, because they must agree on every name and shape.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import nn

from sgm.architecture import PATCH_WEIGHT, POSITION_TABLE, describe_architecture
from sgm.files import atomic_file, read_tensors
from sgm.log import get_logger
from sgm.util import InputError, RunError

__all__ = [
    "LoadReport",
    "atomic_file",
    "find_weights",
    "load_autoencoder",
    "load_network",
    "read_tensors",
    "released_layout",
    "save_autoencoder",
    "save_network",
]

logger = get_logger(__name__)

PREFIX = "model.diffusion_model."
WEIGHTS = "mp_rank_00_model_states"
# Tables that SAT's transformer creates and that no forward pass of this network reads: a file may hold them or not.
UNUSED_TABLES = ("transformer.word_embeddings.weight", "transformer.position_embeddings.weight")

_RECOMPUTED = re.compile(r"^mixins\.pos_embed\.freqs_(sin|cos)$")
_ADAPTER = re.compile(r"\.matrix_[AB]\.\d+$")
_WRAPPED = re.compile(r"\.original\.(weight|bias)$")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded.

    Attributes:
        path: the file.
        num_tensors: tensors that the module took from the file.
        file_dtype: their dtypes in the file, e.g. ``"bfloat16"``.
        dropped: names that the file holds and the module does without, by reason.
        fresh_adapters: LoRA matrices that the file does not hold and that were initialised.
    """

    path: Path
    num_tensors: int
    file_dtype: str
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fresh_adapters: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line for the log."""
        parts = [f"loaded {self.num_tensors:,} tensors ({self.file_dtype}) from {self.path}"]
        parts += [f"left out {len(names):,} {reason}" for reason, names in self.dropped.items()]
        if self.fresh_adapters:
            parts.append(f"initialised {len(self.fresh_adapters):,} LoRA matrices that the file does not hold")
        return "; ".join(parts)


def find_weights(load: str | Path) -> Path:
    """Return the weights file that `load` means.

    Args:
        load: a file, a folder with ``latest``, or the folder of one iteration.

    Raises:
        InputError: there is none; the message names what is there and what to do.
    """
    load = Path(load)
    if load.is_file():
        return load
    if not load.is_dir():
        raise InputError(f"there is no checkpoint at {load}; give a weights file, or the folder that holds 'latest'")
    if (load / f"{WEIGHTS.replace('00', '01')}.pt").exists():
        raise InputError(f"{load} was saved by a tensor-parallel run, in several files; merge them with SAT first")
    for suffix in (".pt", ".safetensors"):
        if (load / (WEIGHTS + suffix)).is_file():
            return load / (WEIGHTS + suffix)
    return _latest_weights(load)


def _latest_weights(folder: Path) -> Path:
    """Follow ``latest``."""
    names = {file.parent.name for file in folder.glob(f"*/{WEIGHTS}.*")}
    iterations = sorted(names, key=lambda name: (len(name), name))  # 500 before 1000
    present = f"; iterations here: {', '.join(iterations)}" if iterations else "; there is no iteration folder"
    latest = folder / "latest"
    if not latest.is_file():
        if iterations:
            cure = f"name the one to load: echo {iterations[-1]} > {latest}"
        elif (folder / "transformer").is_dir():
            cure = f"give {folder / 'transformer'}"
        else:
            cure = f"expected {folder}/<iteration>/{WEIGHTS}.pt and a file 'latest' with <iteration> in it"
        raise InputError(f"{folder} has no file 'latest'{present}; {cure}")
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not name or not (folder / name).is_dir():
        problem = f"names the folder '{name}', which does not exist" if name else "is empty"
        raise InputError(f"{latest} {problem}{present}; write the name of an iteration folder into it")
    if name not in iterations:
        raise InputError(f"{folder / name} has no {WEIGHTS}.pt or .safetensors{present}; complete it, or edit {latest}")
    return find_weights(folder / name)


def load_network(
    network: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    allow_missing_adapters: bool = True,
    generator: torch.Generator | None = None,
) -> LoadReport:
    """Put the weights of a file into a diffusion transformer, by replacing its parameters one by one.

    The network may have been built under :func:`sgm.util.without_allocating`. It is not touched unless everything
    fits. Optimizers made before keep the replaced parameters: load first.

    The patch projection may have the shape [D, C, p, p] or [D, C·p·p] on either side. A file without LoRA loads into
    a network with LoRA: the adapters then start without effect (A uniform as in He et al. 2015 with a = √5, B zero).

    Args:
        network: has the parameter names of the SAT checkpoint format.
        path: what :func:`find_weights` understands.
        dtype: of floating-point tensors; each parameter keeps its own without it.
        device: where the parameters go; each stays where it is without it.
        allow_missing_adapters: whether a file without LoRA may be loaded into a network with LoRA.
        generator: CPU generator that the A matrices are drawn from; torch's default one without it.

    Raises:
        InputError: a tensor is missing, unexpected, or of another shape.
    """
    match = _match(network, path, allow_missing_adapters)
    wanted, held, fresh, blank = match.wanted, match.held, match.fresh, match.blank
    for name, old in wanted.items():
        if name in fresh:
            value = _initial_adapter(name, old, generator)
        else:
            value = torch.zeros(old.shape) if name in blank else held[name]
        _replace(network, name, value, dtype=dtype, device=device)
    _require_real(network)
    return _report(match.path, held, match.dropped, tuple(name for name in wanted if name in fresh))


def check_network(network: nn.Module, path: str | Path, *, allow_missing_adapters: bool = True) -> None:
    """Raise what :func:`load_network` would raise, having read names and shapes only."""
    _match(network, path, allow_missing_adapters)


@dataclass(frozen=True)
class _Match:
    """Which tensor of a file goes where; see :func:`load_network`."""

    path: Path
    wanted: dict[str, torch.Tensor]
    held: dict[str, torch.Tensor]
    dropped: dict[str, tuple[str, ...]]
    fresh: set[str] = field(default_factory=set)
    blank: set[str] = field(default_factory=set)


def _match(network: nn.Module, path: str | Path, allow_missing_adapters: bool) -> _Match:
    """Hold a file against a network; the tensors are mapped, not read."""
    path = find_weights(path)
    content = read_tensors(path)
    wanted = _targets(network)
    held, dropped = _network_part(path, content, wanted)
    adapters = {name for name in wanted if _ADAPTER.search(name)}
    # An adapter set is complete or absent; a part of it comes from another layer_range and is reported as missing.
    fresh = set() if adapters & held.keys() else adapters
    if fresh and not allow_missing_adapters:
        raise InputError(
            f"{path} holds no LoRA, but the configuration has a lora_config; use the one without it, or "
            "args.force_inference=true to sample the base model"
        )
    blank = {name for name in UNUSED_TABLES if name in wanted and name not in held}
    _check(path, {name: tensor for name, tensor in wanted.items() if name not in fresh | blank}, held)
    return _Match(path, wanted, held, dropped, fresh, blank)


def load_autoencoder(
    vae: nn.Module,
    path: str | Path,
    *,
    ignore_keys: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LoadReport:
    """Put the weights of a file into an autoencoder, by replacing its parameters one by one.

    Args:
        vae: has the parameter names of the released autoencoder; may be built without memory.
        path: the file.
        ignore_keys: beginnings of names in the file that are left out, besides ``loss.``.
        dtype: of floating-point tensors; each parameter keeps its own without it.
        device: where the parameters go; each stays where it is without it.

    Raises:
        InputError: a tensor is missing, unexpected, or of another shape.
    """
    match = _match_autoencoder(vae, Path(path), ignore_keys)
    for name in match.wanted:
        _replace(vae, name, match.held[name], dtype=dtype, device=device)
    _require_real(vae)
    return _report(match.path, match.held, match.dropped, ())


def check_autoencoder(vae: nn.Module, path: str | Path, *, ignore_keys: Sequence[str] = ()) -> None:
    """Raise what :func:`load_autoencoder` would raise, having read names and shapes only."""
    _match_autoencoder(vae, Path(path), ignore_keys)


def _match_autoencoder(vae: nn.Module, path: Path, ignore_keys: Sequence[str]) -> _Match:
    """Hold a file against an autoencoder; the tensors are mapped, not read."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; ckpt_path of the autoencoder names its file, e.g. {path / '3d-vae.pt'}")
    content = read_tensors(path)
    wanted = _targets(vae)
    ignored = tuple(name for name in content if name.startswith(("loss.", *ignore_keys)))
    held = {name: tensor for name, tensor in content.items() if name not in ignored}
    _check(path, wanted, held)
    return _Match(path, wanted, held, {"ignored tensors": ignored} if ignored else {})


def _targets(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint of `module` holds: its parameters and persistent buffers."""
    return dict(module.state_dict(keep_vars=True))


def _network_part(
    path: Path, content: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[str, ...]]]:
    """Return the tensors of a file in the names and layout of the network, and the names left out, by reason."""
    held = {name.removeprefix(PREFIX): tensor for name, tensor in content.items() if name.startswith(PREFIX)}
    if not held:
        raise InputError(f"{path} holds no tensor under '{PREFIX}' but e.g. '{next(iter(content))}'; {_guess(content)}")
    others = tuple(name for name in content if not name.startswith(PREFIX))
    recomputed = tuple(name for name in held if _RECOMPUTED.match(name))
    unused = tuple(
        name
        for name in UNUSED_TABLES
        if name in held and (name not in wanted or wanted[name].shape != held[name].shape)
    )
    for name in recomputed + unused:
        del held[name]
    for name in wanted:
        plain = _WRAPPED.sub(r".\1", name)
        if name not in held and plain in held:
            held[name] = held.pop(plain)
    if PATCH_WEIGHT in held and PATCH_WEIGHT in wanted:
        held[PATCH_WEIGHT] = _patch_as(wanted[PATCH_WEIGHT], held[PATCH_WEIGHT])
    dropped = {"tensors of other parts": others, "recomputed tables": recomputed, "unused tables": unused}
    return held, {reason: names for reason, names in dropped.items() if names}


def _guess(content: Mapping[str, torch.Tensor]) -> str:
    """Return what a file that is not a network in the SAT layout may be."""
    if any(name.startswith("transformer_blocks.") for name in content):
        return "it is a transformer in the diffusers layout; convert it to the SAT layout first"
    if any(name.startswith(("encoder.", "decoder.")) for name in content):
        return "it is an autoencoder: first_stage_config.params.ckpt_path names it, args.load names the transformer"
    return "give the transformer's weights in the SAT layout (docs/checkpoints.md)"


def _patch_as(wanted: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Give the patch projection of a file the network's layout: [D, C, p, p] and [D, C·p·p] hold the same order."""
    same = {wanted.ndim, held.ndim} == {2, 4} and (held.shape[0], held.numel()) == (wanted.shape[0], wanted.numel())
    return held.reshape(wanted.shape) if same else held


def _check(path: Path, wanted: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError unless a file holds the wanted names in the wanted shapes, and nothing else."""
    file_shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    own_shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    built, found = describe_architecture(own_shapes), describe_architecture(file_shapes)
    lora = [name for name in held if _ADAPTER.search(name)]
    if lora and found and not any(_ADAPTER.search(name) for name in wanted):
        raise InputError(
            f"{path} holds LoRA matrices (rank {found.lora_rank}), e.g. {lora[0]}, and the configuration "
            f"has no lora_config; {found.config_hint()}"
        )
    problems = [
        f"{name} has the shape {file_shapes[name]} in the file, expected {shape}"
        for name, shape in own_shapes.items()
        if name in file_shapes and file_shapes[name] != shape
    ]
    missing = [f"{name} {shape} is missing" for name, shape in own_shapes.items() if name not in file_shapes]
    unexpected = [f"{name} {shape} is unexpected" for name, shape in file_shapes.items() if name not in own_shapes]
    if not problems and not missing and not unexpected:
        return
    lines = [f"{path} does not fit the configured network:"]
    for group in (problems, missing, unexpected):
        lines += [f"  {line}" for line in group[:4]]
        lines += [f"  ... and {len(group) - 4:,} more of this kind"] if len(group) > 4 else []
    if POSITION_TABLE in file_shapes and file_shapes[POSITION_TABLE] != own_shapes.get(POSITION_TABLE):
        lines.append(
            "  (rows of a position table = text_length + patches of num_frames x latent_height x latent_width)"
        )
    if built and found:
        lines.append(f"the configuration builds: {built}")
        lines.append(f"the file holds: {found}; {found.config_hint()}")
    raise InputError("\n".join(lines))


def _initial_adapter(name: str, old: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Return a fresh LoRA matrix in float32: A [r, D_in] random, B [D_out, r] zero."""
    value = torch.zeros(old.shape)
    if ".matrix_A." in name:
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def _replace(
    module: nn.Module,
    name: str,
    value: torch.Tensor,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Replace a parameter or buffer by a copy of `value`, keeping requires_grad and marks such as model_parallel."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    old = owner.get_parameter(leaf) if leaf in owner._parameters else owner.get_buffer(leaf)
    if device is None:
        device = torch.device("cpu") if old.is_meta else old.device
    target_dtype = dtype if dtype is not None and old.is_floating_point() else old.dtype
    # Always a copy: a parameter must not change, or fault, when another program rewrites the mapped file in place.
    value = value.detach().to(device=device, dtype=target_dtype, copy=True).contiguous()
    if leaf in owner._parameters:
        parameter = nn.Parameter(value, requires_grad=old.requires_grad)
        for mark, setting in vars(old).items():
            setattr(parameter, mark, setting)
        owner.register_parameter(leaf, parameter)
    else:
        owner.register_buffer(leaf, value, persistent=True)


def _require_real(module: nn.Module) -> None:
    """Raise RunError if a tensor of `module` still has no memory: a table that the module must compute lazily."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    if left:
        raise RunError(f"built without memory and not filled by the checkpoint: {', '.join(left[:5])}")


def _report(
    path: Path,
    held: Mapping[str, torch.Tensor],
    dropped: Mapping[str, tuple[str, ...]],
    fresh_adapters: tuple[str, ...],
) -> LoadReport:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in held.values()})
    return LoadReport(path, len(held), " and ".join(dtypes), dropped, fresh_adapters)


def released_layout(state_dict: Mapping[str, torch.Tensor], patch_size: int | Sequence[int]) -> dict[str, torch.Tensor]:
    """Return a network's tensors under the names and in the shapes of the released checkpoints.

    Args:
        state_dict: the tensors of the network, by the network's own names.
        patch_size: p, meaning (1, p, p), or (pt, p, p). With pt = 1 the patch projection takes the shape
            [D, C, p, p], otherwise [D, C·pt·p·p] in the order C, pt, p, p.
    """
    pt, height, width = (1, patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    tensors = {PREFIX + name: tensor.detach() for name, tensor in state_dict.items()}
    if PREFIX + PATCH_WEIGHT in tensors:
        weight = tensors[PREFIX + PATCH_WEIGHT].flatten(1)
        tensors[PREFIX + PATCH_WEIGHT] = weight.unflatten(1, (-1, height, width)) if pt == 1 else weight
    return tensors


def save_network(
    folder: str | Path,
    iteration: int | str,
    network: nn.Module | Mapping[str, torch.Tensor],
    *,
    patch_size: int | Sequence[int],
    file_format: Literal["pt", "safetensors"] = "pt",
) -> Path:
    """Save a network in the SAT layout; ``latest`` names it once everything is on the disk.

    Args:
        folder: gets ``<iteration>/mp_rank_00_model_states.pt`` and ``latest``.
        iteration: name of the iteration folder.
        network: the network, or its tensors by the network's own names.
        patch_size: see :func:`released_layout`.
        file_format: ``"pt"`` or ``"safetensors"``.

    Returns:
        The weights file.

    Raises:
        RunError: the disk is full or the folder cannot be written to; nothing half-written is left.
    """
    tensors = released_layout(network.state_dict() if isinstance(network, nn.Module) else network, patch_size)
    path = Path(folder) / str(iteration) / f"{WEIGHTS}.{file_format}"
    _write_tensors(path, "module", tensors)
    for other in set(path.parent.glob(f"{WEIGHTS}.*")) - {path}:
        other.unlink()  # the same iteration in the other format, which would be found instead
    latest = Path(folder) / "latest"
    with atomic_file(latest) as temporary:
        temporary.write_text(f"{iteration}\n", encoding="utf-8")
    return path


def save_autoencoder(path: str | Path, vae: nn.Module | Mapping[str, torch.Tensor]) -> Path:
    """Save an autoencoder as ``{"state_dict": {...}}``, or as safetensors where the suffix says so.

    Raises:
        RunError: the disk is full or the folder cannot be written to; nothing half-written is left.
    """
    _write_tensors(Path(path), "state_dict", vae.state_dict() if isinstance(vae, nn.Module) else vae)
    return Path(path)


def _write_tensors(path: Path, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, or with torch.save under `key`, whatever device they are on."""
    # A view would drag its whole storage into the file, and safetensors refuses tensors that share one.
    owned = {name: _owned(tensor) for name, tensor in tensors.items()}
    with atomic_file(path, need_bytes=sum(tensor.nbytes for tensor in owned.values())) as temporary:
        if path.suffix == ".safetensors":
            save_file(owned, temporary)
        else:
            torch.save({key: owned}, temporary)


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
