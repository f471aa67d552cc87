"""Which tensor of a weights file goes where in a module, and what does not fit; nothing is read but names and shapes.

The names are those of the SAT checkpoint format (docs/checkpoints.md). Shapes: `D` hidden size, `C` input channels,
``(pt, p, p)`` patch along time, height and width.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sgm.util import InputError
from sgm.weights.adapters import find_base, is_adapter, read_adapter_info
from sgm.weights.architecture import PATCH_WEIGHT, POSITION_TABLE, describe_architecture
from sgm.weights.files import find_weights, read_tensors
from sgm.weights.partition import UNSHARDED, Shard, unsharded_shape

PREFIX = "model.diffusion_model."
# Tables that SAT's transformer creates and that no forward pass of this network reads: a file may hold them or not.
UNUSED_TABLES = ("transformer.word_embeddings.weight", "transformer.position_embeddings.weight")

_RECOMPUTED = re.compile(r"^mixins\.pos_embed\.freqs_(sin|cos)$")
WRAPPED = re.compile(r"\.original\.(weight|bias)$")


@dataclass(frozen=True)
class Match:
    """Which tensor goes where.

    Attributes:
        path: the weights file.
        wanted: the tensors of the module, by name.
        held: what the files hold of them, in the names and shapes of the module; mapped, not read.
        dropped: names that the files hold and the module does without, by reason.
        fresh: LoRA matrices that are to be initialised.
        blank: unused tables that the file lacks; they become zero.
        missing: tensors that keep their present values.
        base: the file under adapters that come alone.
        shard: which part of the tensors in `held`, which are whole, the module has.
    """

    path: Path
    wanted: Mapping[str, torch.Tensor]
    held: Mapping[str, torch.Tensor]
    dropped: Mapping[str, tuple[str, ...]]
    fresh: frozenset[str] = frozenset()
    blank: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    base: Path | None = None
    shard: Shard = UNSHARDED


def match_network(
    network: nn.Module,
    path: str | Path,
    *,
    base: str | Path | None = None,
    allow_missing_adapters: bool = True,
    allow_missing: bool = False,
) -> Match:
    """Hold a file against a network; see :func:`sgm.weights.checkpoint.load_network` for the arguments.

    Raises:
        InputError: something does not fit.
    """
    path = find_weights(path)
    targets = _targets(network)
    shard: Shard = getattr(network, "tensor_shard", UNSHARDED)
    wanted = {name: _whole(name, tensor, shard) for name, tensor in targets.items()}
    base = find_base(path, base)
    held, dropped, source = _held(path, base, wanted)
    adapters = {name for name in wanted if is_adapter(name)}
    # An adapter set is complete or absent; a part of it comes from another layer_range and is reported as missing.
    fresh = set() if adapters & held.keys() else adapters
    if fresh and not allow_missing_adapters:
        raise InputError(
            f"{path} holds no LoRA, but the configuration has a lora_config; use the one without it, or "
            "args.force_inference=true to sample the base model"
        )
    blank = {name for name in UNUSED_TABLES if name in wanted and name not in held}
    missing = wanted.keys() - held.keys() - fresh - blank if allow_missing else set()
    expected = {name: tensor for name, tensor in wanted.items() if name not in fresh | blank | missing}
    _check(source, expected, held)
    return Match(path, targets, held, dropped, frozenset(fresh), frozenset(blank), frozenset(missing), base, shard)


def match_autoencoder(vae: nn.Module, path: Path, *, ignore_keys: Sequence[str] = ()) -> Match:
    """Hold a file against an autoencoder; see :func:`sgm.weights.checkpoint.load_autoencoder` for the arguments.

    Raises:
        InputError: something does not fit.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; ckpt_path of the autoencoder names its file, e.g. {path / '3d-vae.pt'}")
    content = read_tensors(path)
    wanted = _targets(vae)
    ignored = tuple(name for name in content if name.startswith(("loss.", *ignore_keys)))
    held = {name: tensor for name, tensor in content.items() if name not in ignored}
    _check(str(path), wanted, held)
    return Match(path, wanted, held, {"ignored tensors": ignored} if ignored else {})


def _targets(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint of `module` holds: its parameters and persistent buffers."""
    return dict(module.state_dict(keep_vars=True))


def _whole(name: str, tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Return the tensor itself where it is not divided; otherwise one in the shape of the whole, without numbers."""
    shape = unsharded_shape(name, tensor.shape, shard.size)
    return tensor if shape == tensor.shape else torch.empty(shape, dtype=tensor.dtype, device="meta")


def _held(
    path: Path, base: Path | None, wanted: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[str, ...]], str]:
    """Return what a file, with the base under it, holds for a network; names left out; how to call the files."""
    held, dropped = _network_part(path, read_tensors(path), wanted)
    if base is None:
        return held, dropped, str(path)
    if not any(is_adapter(name) for name in wanted):
        info = read_adapter_info(path)
        params = "{r: ..., lora_alpha: ...} of their training"
        if info is not None:
            params = f"{{r: {info.rank}, lora_alpha: {info.alpha:g}, layer_range: {list(info.layers)}}}"
        raise InputError(f"{path} holds LoRA adapters alone, and the network has no lora_config; add one with {params}")
    under, dropped = _network_part(base, read_tensors(base), wanted)
    # A base with adapters of its own: those of the file continue them.
    under = {name: tensor for name, tensor in under.items() if not is_adapter(name)}
    return under | held, dropped, f"{path} on the base {base}"


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
        plain = WRAPPED.sub(r".\1", name)
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


def _check(source: str, wanted: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError unless a file holds the wanted names in the wanted shapes, and nothing else."""
    file_shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    own_shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    built, found = describe_architecture(own_shapes), describe_architecture(file_shapes)
    lora = [name for name in held if is_adapter(name)]
    if lora and found and not any(is_adapter(name) for name in wanted):
        raise InputError(
            f"{source} holds LoRA matrices (rank {found.lora_rank}), e.g. {lora[0]}, and the configuration "
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
    lines = [f"{source} does not fit the configured network:"]
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
