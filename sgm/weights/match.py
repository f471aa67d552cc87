"""Match the tensors of a weights file to those of a module by name and shape; values are not read.

The names are those of the SAT checkpoint format (docs/checkpoints.md). Shapes: `D` hidden size, `C` input channels,
``(pt, p, p)`` patch along time, height and width.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sgm.util import InputError
from sgm.weights.adapters import TITLES, WRAPPED, find_base, is_adapter, kind_of, read_adapter_info
from sgm.weights.architecture import CONTROL_WEIGHT, PATCH_WEIGHTS, POSITION_TABLE, describe_architecture
from sgm.weights.files import PREFIX, find_weights, read_weights
from sgm.weights.lazy import LazyTensor, Tensors
from sgm.weights.partition import UNSHARDED, Shard, unsharded_shape
from sgm.weights.stored import StoredTensor, require_floating

# Unused tables of SAT's transformer; optional in a file.
UNUSED_TABLES = ("transformer.word_embeddings.weight", "transformer.position_embeddings.weight")

_RECOMPUTED = re.compile(r"^mixins\.pos_embed\.freqs_(sin|cos)$")


@dataclass(frozen=True)
class Match:
    """Tensors of a module, matched to tensors of the files.

    Attributes:
        path: the weights file.
        targets: parameters and persistent buffers of the module, by name.
        tensors: unsharded tensors from the files, under the names and in the layout of the module.
        dropped: names in the files that the module does not have, by reason.
        new_adapters: LoRA matrices to initialise, and the columns of a control.
        zeroed: unused tables that the file lacks, to be filled with zeros.
        missing: other tensors that the files lack, which keep their values.
        base: base checkpoint of an adapters-only file.
        shard: the module's shard of `tensors`.
    """

    path: Path
    targets: Mapping[str, torch.Tensor]
    tensors: Mapping[str, LazyTensor]
    dropped: Mapping[str, tuple[str, ...]]
    new_adapters: frozenset[str] = frozenset()
    zeroed: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    base: Path | None = None
    shard: Shard = UNSHARDED


def match_network(
    network: nn.Module,
    path: str | Path,
    *,
    base: str | Path | None = None,
    adapters: Tensors | None = None,
    allow_missing_adapters: bool = True,
    allow_missing: bool = False,
) -> Match:
    """Match a file to a network; see :func:`sgm.weights.checkpoint.load_network` for the arguments.

    Only names, shapes and digests are read, so it also serves as a check.

    Raises:
        InputError: something does not fit.
    """
    path = find_weights(path)
    targets = _state(network)
    shard: Shard = getattr(network, "tensor_shard", UNSHARDED)
    shapes = {name: unsharded_shape(name, tensor.shape, shard.size) for name, tensor in targets.items()}
    base = find_base(path, base)
    tensors, dropped = _read_network(path, base, shapes)
    given = {name: LazyTensor((tensor,)) for name, tensor in (adapters or {}).items()}
    tensors = _of_kind(tensors | given | _reshaped_patches(given, shapes), targets)
    source = str(path) if base is None else f"{path} on the base {base}"
    all_adapters = {name for name in shapes if is_adapter(name)}
    # Adapters must be all present or all new; only some present means another layer_range.
    new_adapters = set() if all_adapters & tensors.keys() else all_adapters
    if new_adapters and not allow_missing_adapters:
        raise InputError(
            f"{path} holds no LoRA, but the configuration has a lora_config; use the one without it, or "
            "args.force_inference=true to sample the base model"
        )
    if CONTROL_WEIGHT in shapes and CONTROL_WEIGHT not in tensors:
        if not allow_missing_adapters:
            raise InputError(
                f"{source} holds no weights for a control video, and the configuration has control_channels; give "
                "weights that were trained with it, or remove configs/control/video.yaml"
            )
        new_adapters |= {CONTROL_WEIGHT}
    zeroed = {name for name in UNUSED_TABLES if name in shapes and name not in tensors}
    missing = shapes.keys() - tensors.keys() - new_adapters - zeroed if allow_missing else set()
    expected = {name: shape for name, shape in shapes.items() if name not in new_adapters | zeroed | missing}
    _require_equal(source, expected, tensors)
    return Match(
        path, targets, tensors, dropped, frozenset(new_adapters), frozenset(zeroed), frozenset(missing), base, shard
    )


def match_autoencoder(vae: nn.Module, path: str | Path, *, ignore_keys: Sequence[str] = ()) -> Match:
    """Match a file to an autoencoder; see :func:`sgm.weights.checkpoint.load_autoencoder` for the arguments.

    Raises:
        InputError: something does not fit.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; ckpt_path of the autoencoder names its file, e.g. {path / '3d-vae.pt'}")
    tensors = read_weights(path, quick=True)
    targets = _state(vae)
    ignored = tuple(name for name in tensors if name.startswith(("loss.", *ignore_keys)))
    for name in ignored:
        del tensors[name]
    tensors = _of_kind(tensors, targets)
    _require_equal(str(path), {name: tuple(tensor.shape) for name, tensor in targets.items()}, tensors)
    return Match(path, targets, tensors, {"ignored tensors": ignored} if ignored else {})


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict(keep_vars=True))


Shapes = Mapping[str, tuple[int, ...]]
Stored = dict[str, LazyTensor]
Dropped = dict[str, tuple[str, ...]]


def _read_network(path: Path, base: Path | None, shapes: Shapes) -> tuple[Stored, Dropped]:
    """Read a file and its base for a network of unsharded `shapes`; also return the dropped names."""
    tensors, dropped = _read_one(path, shapes)
    if base is None:
        return tensors, dropped
    if not any(map(is_adapter, shapes)):
        info = read_adapter_info(path)
        params = "{r: ..., lora_alpha: ...} of their training"
        if info is not None:
            given = info.lora_params(0) | {"lora_alpha": f"{info.alpha:g}"}
            listed = {name: f"[{', '.join(map(str, v))}]" if isinstance(v, list) else v for name, v in given.items()}
            params = f"{{{', '.join(f'{name}: {value}' for name, value in listed.items())}}}"
        raise InputError(f"{path} holds LoRA adapters alone, and the network has no lora_config; add one with {params}")
    base_tensors, dropped = _read_one(base, shapes)
    # Adapters in the base are replaced by those of the file, which continue their training.
    return {name: tensor for name, tensor in base_tensors.items() if not is_adapter(name)} | tensors, dropped


def _read_one(path: Path, shapes: Shapes) -> tuple[Stored, Dropped]:
    """Read a file for a network of unsharded `shapes`: tensors under its names and in its layout, dropped names."""
    content = read_weights(path, quick=True)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in content.items() if name.startswith(PREFIX)}
    if not tensors:
        raise InputError(f"{path} holds no tensor under '{PREFIX}' but e.g. '{next(iter(content))}'; {_cure(content)}")
    others = tuple(name for name in content if not name.startswith(PREFIX))
    recomputed = tuple(name for name in tensors if _RECOMPUTED.match(name))
    unused = tuple(name for name in UNUSED_TABLES if name in tensors and shapes.get(name) != tuple(tensors[name].shape))
    for name in recomputed + unused:
        del tensors[name]
    for name in shapes:
        plain = WRAPPED.sub(r".\1", name)
        if name not in tensors and plain in tensors:
            tensors[name] = tensors.pop(plain)
    tensors |= _reshaped_patches(tensors, shapes)
    dropped = {"tensors of other parts": others, "recomputed tables": recomputed, "unused tables": unused}
    return tensors, {reason: names for reason, names in dropped.items() if names}


def _of_kind(tensors: Stored, targets: Mapping[str, torch.Tensor]) -> Stored:
    """Refuse other than floating-point numbers in the place of weights; buffers may be integers."""
    others = {name for name, target in targets.items() if not target.is_floating_point()}
    require_floating({name: tensor for name, tensor in tensors.items() if name not in others})
    return {
        name: tensor.of_any_kind() if name in others and isinstance(tensor, StoredTensor) else tensor
        for name, tensor in tensors.items()
    }


def _cure(names: Mapping[str, object]) -> str:
    """Return advice for a file that is not a network in the SAT layout."""
    if any(name.startswith("transformer_blocks.") for name in names):
        return "it is a transformer in the diffusers layout; convert it to the SAT layout first"
    if any(name.startswith(("encoder.", "decoder.")) for name in names):
        return "it is an autoencoder: first_stage_config.params.ckpt_path names it, args.load names the transformer"
    return "give the transformer's weights in the SAT layout (docs/checkpoints.md)"


def _reshaped_patches(tensors: Stored, shapes: Shapes) -> Stored:
    """Return the patch projection and its adapters in the layout of a network of `shapes`."""
    return {
        name: _reshape_patch(tensors[name], shapes[name]) for name in PATCH_WEIGHTS if name in tensors.keys() & shapes
    }


def _reshape_patch(patch: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Reshape a patch projection between [D, C, p, p] and [D, C·p·p] (same element order)."""
    is_other_layout = {len(shape), len(patch.shape)} == {2, 4} and patch.shape[0] == shape[0]
    if not is_other_layout or math.prod(patch.shape) != math.prod(shape):
        return patch
    return LazyTensor((patch,), lambda tensor: tensor.reshape(shape))


def _require_equal(source: str, expected: Shapes, tensors: Stored) -> None:
    """Raise InputError unless names and shapes in a file match exactly."""
    file_shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    built, found = describe_architecture(expected), describe_architecture(file_shapes)
    lora = [name for name in tensors if is_adapter(name)]
    if lora and found and not any(map(is_adapter, expected)):
        raise InputError(
            f"{source} holds LoRA matrices (rank {found.lora_rank}), e.g. {lora[0]}, and the configuration "
            f"has no lora_config; {found.config_hint()}"
        )
    kinds = kind_of(expected), kind_of(tensors)
    if lora and any(map(is_adapter, expected)) and kinds[0] != kinds[1]:
        raise InputError(
            f"{source} holds {TITLES[kinds[1]]}, and the configuration says kind: {kinds[0]} in its lora_config; set "
            f"{kinds[1]}, or merge the adapters first to train others: tools/merge_lora_weight.py"
        )
    problems = [
        f"{name} has the shape {file_shapes[name]} in the file, expected {shape}"
        for name, shape in expected.items()
        if name in file_shapes and file_shapes[name] != shape
    ]
    missing = [f"{name} {shape} is missing" for name, shape in expected.items() if name not in file_shapes]
    unexpected = [f"{name} {shape} is unexpected" for name, shape in file_shapes.items() if name not in expected]
    if not problems and not missing and not unexpected:
        return
    lines = [f"{source} does not fit the configured network:"]
    if CONTROL_WEIGHT in file_shapes and CONTROL_WEIGHT not in expected:
        control = f"{source} takes a control video, and the configuration none; add configs/control/video.yaml"
        if len(problems + missing + unexpected) == 1:
            raise InputError(control)
        lines.insert(0, control)
    if built and found and built.kind() != found.kind():
        what = "a LoRA" if lora else "the weights"
        lines.insert(0, f"{what} of {found.kind()}, and the configuration builds {built.kind()}; {found.config_hint()}")
    for group in (problems, missing, unexpected):
        lines += [f"  {line}" for line in group[:4]]
        lines += [f"  ... and {len(group) - 4:,} more of this kind"] if len(group) > 4 else []
    if POSITION_TABLE in file_shapes and file_shapes[POSITION_TABLE] != expected.get(POSITION_TABLE):
        lines.append(
            "  (rows of a position table = text_length + patches of num_frames x latent_height x latent_width)"
        )
    if built and found:
        lines.append(f"the configuration builds: {built}")
        lines.append(f"the file holds: {found}; {found.config_hint()}")
    raise InputError("\n".join(lines))
