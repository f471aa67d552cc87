"""Weights in the SAT layout or as safetensors: checked strictly, put into a network, and saved.

The SAT checkpoint format of a network (more in docs/checkpoints.md)::

    DIR/latest                                  the iteration to load, e.g. 1000
    DIR/1000/mp_rank_00_model_states.pt         {"module": {"model.diffusion_model.<name>": tensor}}
    DIR/1000/mp_rank_01_model_states.pt         the second of several parts, if ranks shared the layers

and of an autoencoder: ``{"state_dict": {<name>: tensor}}``. A ``.safetensors`` file with the same names may take the
place of either file. LoRA training saves the adapters alone and says in a further entry, "lora", what they belong to.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from sgm.io import atomic_file
from sgm.util import RunError
from sgm.weights.adapters import ENTRY, AdapterInfo, adapter_layer, is_adapter
from sgm.weights.architecture import PATCH_WEIGHT
from sgm.weights.files import SHARD_NAME, find_weights, read_tensors, shard_name
from sgm.weights.match import PREFIX, Match, match_autoencoder, match_network
from sgm.weights.partition import UNSHARDED, Shard, take_shard, unsharded_shape

__all__ = [
    "LoadReport",
    "atomic_file",
    "check_autoencoder",
    "check_network",
    "find_weights",
    "load_autoencoder",
    "load_network",
    "owned",
    "read_tensors",
    "released_layout",
    "save_autoencoder",
    "save_network",
    "write_latest",
]


@dataclass(frozen=True)
class LoadReport:
    """What was loaded.

    Attributes:
        path: the file.
        num_tensors: tensors that the module took from the file and its base.
        file_dtype: their dtypes there, e.g. ``"bfloat16"``.
        dropped: names that the file holds and the module does without, by reason.
        fresh_adapters: LoRA matrices that the file does not hold and that were initialised.
        missing: other tensors that the file does not hold and that kept their values.
        base: the file that the rest came from, where `path` holds adapters alone.
        warnings: what the user should know, for the caller to log.
    """

    path: Path
    num_tensors: int
    file_dtype: str
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fresh_adapters: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    base: Path | None = None
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line for the log."""
        on_base = f" on the base {self.base}" if self.base else ""
        parts = [f"loaded {self.num_tensors:,} tensors ({self.file_dtype}) from {self.path}{on_base}"]
        parts += [f"left out {len(names):,} {reason}" for reason, names in self.dropped.items()]
        if self.fresh_adapters:
            parts.append(f"initialised {len(self.fresh_adapters):,} LoRA matrices that the file does not hold")
        return "; ".join(parts)


def load_network(
    network: nn.Module,
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    allow_missing_adapters: bool = True,
    allow_missing: bool = False,
    generator: torch.Generator | None = None,
) -> LoadReport:
    """Put the weights of a file into a diffusion transformer, by replacing its parameters one by one.

    The network may have been built under :func:`sgm.util.without_allocating`. It is not touched unless everything
    fits. Optimizers made before keep the replaced parameters: load first.

    A network that shares its layers with other ranks takes its part of the tensors, whatever the number of parts in
    the files. What it begins with besides is that part of what one rank begins with.

    The patch projection may have the shape [D, C, p, p] or [D, C·p·p] on either side. A file without LoRA loads into
    a network with LoRA: the adapters then start without effect (A uniform as in He et al. 2015 with a = √5, B zero).
    Where a file holds adapters alone, everything else comes from their base, whose digest must be the recorded one.

    Args:
        network: has the parameter names of the SAT checkpoint format.
        path: what :func:`sgm.weights.files.find_weights` understands.
        base: the same, for adapters that come alone; without it, the path that their file records.
        dtype: of floating-point tensors; each parameter keeps its own without it.
        device: where the parameters go; each stays where it is without it.
        allow_missing_adapters: whether a file without LoRA may be loaded into a network with LoRA.
        allow_missing: whether tensors that the file lacks may keep their values. The network then needs memory.
        generator: CPU generator that the A matrices are drawn from; torch's default one without it.

    Raises:
        InputError: a tensor is missing, unexpected, or of another shape, or the base is not found or another one.
        ValueError: a tensor should keep its value and has none, since the network was built without memory.
    """
    match = match_network(
        network, path, base=base, allow_missing_adapters=allow_missing_adapters, allow_missing=allow_missing
    )
    empty = [name for name in match.missing if match.wanted[name].is_meta]
    if empty:
        raise ValueError(
            f"{match.path} lacks {sorted(empty)[:5]}, which have no value yet: build the network in memory"
        )
    for name, old in match.wanted.items():
        if name in match.fresh:
            shape = unsharded_shape(name, old.shape, match.shard.size)
            value = take_shard(name, _initial_adapter(name, shape, generator), match.shard)
        elif name in match.blank:
            value = torch.zeros(old.shape)
        else:
            value = old if name in match.missing else take_shard(name, match.held[name], match.shard)
        _replace(network, name, value, dtype=dtype, device=device)
    _require_real(network)
    return _report(match)


def check_network(
    network: nn.Module,
    path: str | Path,
    *,
    base: str | Path | None = None,
    allow_missing_adapters: bool = True,
    allow_missing: bool = False,
) -> None:
    """Raise the InputError that :func:`load_network` would raise, having read names, shapes and digests only."""
    match_network(network, path, base=base, allow_missing_adapters=allow_missing_adapters, allow_missing=allow_missing)


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
    match = match_autoencoder(vae, Path(path), ignore_keys=ignore_keys)
    for name in match.wanted:
        _replace(vae, name, match.held[name], dtype=dtype, device=device)
    _require_real(vae)
    return _report(match)


def check_autoencoder(vae: nn.Module, path: str | Path, *, ignore_keys: Sequence[str] = ()) -> None:
    """Raise what :func:`load_autoencoder` would raise, having read names and shapes only."""
    match_autoencoder(vae, Path(path), ignore_keys=ignore_keys)


def _initial_adapter(name: str, shape: Sequence[int], generator: torch.Generator | None) -> torch.Tensor:
    """Return a fresh LoRA matrix in float32: A [r, D_in] random, B [D_out, r] zero."""
    value = torch.zeros(tuple(shape))
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


def _report(match: Match) -> LoadReport:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in match.held.values()})
    missing = tuple(name for name in match.wanted if name in match.missing)
    return LoadReport(
        path=match.path,
        num_tensors=len(match.held),
        file_dtype=" and ".join(dtypes),
        dropped=match.dropped,
        fresh_adapters=tuple(name for name in match.wanted if name in match.fresh),
        missing=missing,
        base=match.base,
        warnings=tuple(_warnings(match, missing)),
    )


def _warnings(match: Match, missing: Sequence[str]) -> Iterable[str]:
    grown = [tensor for name, tensor in match.held.items() if is_adapter(name) and ".matrix_B." in name]
    if grown and not any(bool(tensor.any()) for tensor in grown):
        yield f"the adapters in {match.path} have no effect: every matrix B is zero, as before any training"
    if missing:
        more = f" and {len(missing) - 10:,} more" if len(missing) > 10 else ""
        yield f"{match.path} lacks {len(missing):,} tensors, which keep their values: {', '.join(missing[:10])}{more}"


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
    adapters: AdapterInfo | None = None,
    latest: bool = True,
    shard: Shard = UNSHARDED,
) -> Path:
    """Save a network in the SAT layout; ``latest`` names it once everything is on the disk.

    Where ranks share the layers, every one saves its part; once all have, one of them calls :func:`write_latest`.

    Args:
        folder: gets ``<iteration>/mp_rank_00_model_states.pt`` and ``latest``.
        iteration: name of the iteration folder.
        network: the network, or tensors by the network's own names: all of them, or its adapters alone.
        patch_size: see :func:`released_layout`.
        file_format: ``"pt"`` or ``"safetensors"``.
        adapters: description of the adapters among the tensors, which the file keeps; needed for adapters alone.
        latest: whether ``latest`` moves here; otherwise :func:`write_latest` can move it later.
        shard: which part of the network the tensors are: ``network.tensor_shard``.

    Returns:
        The weights file.

    Raises:
        RunError: the disk is full or the folder cannot be written to; nothing half-written is left.
        ValueError: `adapters` and the tensors do not fit each other; `shard` is another than the network's; or `latest`
            should name a part.
    """
    if isinstance(network, nn.Module) and getattr(network, "tensor_shard", UNSHARDED) != shard:
        raise ValueError(f"`shard` is {shard}, and the network is {getattr(network, 'tensor_shard', UNSHARDED)}")
    if latest and shard.size > 1:
        raise ValueError("`latest` may move only when all parts are saved; pass latest=False, then call write_latest")
    tensors = released_layout(network.state_dict() if isinstance(network, nn.Module) else network, patch_size)
    _require_described(tensors, adapters)
    path = Path(folder) / str(iteration) / shard_name(shard.index, file_format)
    _write_tensors(path, "module", tensors, {} if adapters is None else {ENTRY: adapters.to_entry()})
    _remove_former(path, shard)
    if latest:
        write_latest(folder, iteration)
    return path


def _remove_former(path: Path, shard: Shard) -> None:
    """Remove what an earlier save of the same iteration, in another format or number of parts, has beside `path`."""
    for other in path.parent.iterdir():
        match = SHARD_NAME.fullmatch(other.name)
        if match is None or other == path:
            continue
        index = int(match[1])
        # Every rank removes its own, and the first one those of ranks that are no more.
        if index == shard.index or (shard.index == 0 and index >= shard.size):
            other.unlink(missing_ok=True)


def _require_described(tensors: Mapping[str, torch.Tensor], adapters: AdapterInfo | None) -> None:
    """Refuse to write a file that could not be loaded again, or that says wrong things about itself."""
    ranks = {name: tensor.shape[0] for name, tensor in tensors.items() if is_adapter(name) and ".matrix_A." in name}
    if adapters is None:
        if ranks and all(is_adapter(name) for name in tensors):
            raise ValueError("adapters alone cannot be loaded without their description; pass `adapters`")
        return
    layers = tuple(sorted({layer for name in ranks if (layer := adapter_layer(name)) is not None}))
    if layers != adapters.layers or set(ranks.values()) != {adapters.rank}:
        found = f"rank {sorted(set(ranks.values()))} on the layers {list(layers)}"
        raise ValueError(f"`adapters` says rank {adapters.rank} on {list(adapters.layers)}, the tensors have {found}")


def write_latest(folder: str | Path, iteration: int | str) -> None:
    """Make ``latest`` name an iteration.

    Raises:
        RunError: the folder cannot be written to; ``latest`` is then as before.
    """
    with atomic_file(Path(folder) / "latest") as temporary:
        temporary.write_text(f"{iteration}\n", encoding="utf-8")


def save_autoencoder(path: str | Path, vae: nn.Module | Mapping[str, torch.Tensor]) -> Path:
    """Save an autoencoder as ``{"state_dict": {...}}``, or as safetensors where the suffix says so.

    Raises:
        RunError: the disk is full or the folder cannot be written to; nothing half-written is left.
    """
    _write_tensors(Path(path), "state_dict", vae.state_dict() if isinstance(vae, nn.Module) else vae, {})
    return Path(path)


def _write_tensors(path: Path, key: str, tensors: Mapping[str, torch.Tensor], entries: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, or with torch.save under `key`, whatever device they are on; see `read_entry`."""
    # A view would drag its whole storage into the file, and safetensors refuses tensors that share one.
    alone = {name: owned(tensor) for name, tensor in tensors.items()}
    with atomic_file(path, need_bytes=sum(tensor.nbytes for tensor in alone.values())) as temporary:
        if path.suffix == ".safetensors":
            metadata = {name: json.dumps(entry) for name, entry in entries.items()}
            save_file(alone, temporary, metadata=metadata or None)
        else:
            torch.save({key: alone, **entries}, temporary)


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU, contiguous and alone in its storage, as files need it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
