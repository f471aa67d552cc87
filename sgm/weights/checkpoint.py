"""Load and save weights in the SAT checkpoint format, with strict checks of names and shapes.

The SAT checkpoint format of a network (more in docs/checkpoints.md)::

    DIR/latest                                  the iteration to load, e.g. 1000
    DIR/1000/mp_rank_00_model_states.pt         {"module": {"model.diffusion_model.<name>": tensor}}
    DIR/1000/mp_rank_01_model_states.pt         the second of several shards, after tensor parallel training

and of an autoencoder: ``{"state_dict": {<name>: tensor}}``. A ``.safetensors`` file with the same names may
replace either file. LoRA training saves only the adapters, with their description in the entry "lora".
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sgm.io import atomic_file
from sgm.util import InputError, RunError
from sgm.weights.adapters import ENTRY, AdapterInfo, adapters_alone, initial_matrix, is_adapter
from sgm.weights.architecture import CONTROL_WEIGHT, PATCH_WEIGHTS
from sgm.weights.checksums import require_finite, save_torch, write_safetensors
from sgm.weights.files import PREFIX, SHARD_NAME, shard_name
from sgm.weights.lazy import AnyTensor, Tensors, compute
from sgm.weights.lora.dora import initial_magnitude, is_magnitude
from sgm.weights.lora.names import starts_at_zero
from sgm.weights.match import Match, match_autoencoder, match_network
from sgm.weights.partition import UNSHARDED, Shard, take_shard
from sgm.weights.quantize import Storage, linear_layers, store, stored_text
from sgm.weights.stored import StoredTensor, checked_ahead, require_in_range, source_of


@dataclass(frozen=True)
class LoadReport:
    """Summary of a load.

    Attributes:
        path: the file.
        num_tensors: tensors taken from the file and its base.
        file_dtype: their dtypes there, e.g. ``"bfloat16"``.
        dropped: names in the file that the module does not have, by reason.
        new_adapters: LoRA matrices and the columns of a control missing in the file, initialised.
        missing: other tensors missing in the file, unchanged.
        base: base checkpoint of an adapters-only file.
        warnings: for the caller to log.
        stored: how many layers are stored in eight bits; empty without any.
    """

    path: Path
    num_tensors: int
    file_dtype: str
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    new_adapters: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    base: Path | None = None
    warnings: tuple[str, ...] = ()
    stored: str = ""

    def __str__(self) -> str:
        """Return one line for the log."""
        on_base = f" on the base {self.base}" if self.base else ""
        parts = [f"loaded {self.num_tensors:,} tensors ({self.file_dtype}) from {self.path}{on_base}"]
        parts += [f"left out {len(names):,} {reason}" for reason, names in self.dropped.items()]
        if matrices := sum(map(is_adapter, self.new_adapters)):
            parts.append(f"initialised {matrices:,} LoRA matrices that the file does not hold")
        if CONTROL_WEIGHT in self.new_adapters:
            parts.append("the columns of the control start at zero")
        parts += [self.stored] if self.stored else []
        return "; ".join(parts)


def load_network(
    network: nn.Module,
    path: str | Path,
    *,
    base: str | Path | None = None,
    adapters: Tensors | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    allow_missing_adapters: bool = True,
    allow_missing: bool = False,
    generator: torch.Generator | None = None,
    storage: Storage | None = None,
    storage_device: torch.device | None = None,
) -> LoadReport:
    """Load the weights of a file into a diffusion transformer, replacing its parameters one by one.

    The network may have been built under :func:`sgm.util.without_allocating`. It is not changed unless
    everything matches. Parameters are replaced: create optimizers after loading.

    A tensor parallel network takes its shard of each tensor, from files with any number of shards.

    The patch projection may have the shape [D, C, p, p] or [D, C·p·p] on either side. A file without LoRA loads into
    a network with LoRA: the adapters are then initialised (:func:`sgm.weights.adapters.initial_matrix`). With an
    adapters-only file, all other tensors are read from its base, whose digest must match the recorded one.

    Args:
        network: has the parameter names of the SAT checkpoint format.
        path: as for :func:`sgm.weights.files.find_weights`.
        base: likewise, for the base of adapters; None uses the path recorded in their file.
        adapters: the matrices of the network's adapters, which the files then lack; see `sgm.weights.lora.several`.
        dtype: of floating-point tensors; None keeps that of each parameter.
        device: of the parameters; None keeps that of each.
        allow_missing_adapters: accept a file without LoRA for a network with LoRA.
        allow_missing: keep the values of tensors missing in the file. The network must then be in memory.
        generator: CPU generator for new adapters; None uses torch's global one.
        storage: store the linear layers of the blocks in eight bits, each as soon as it is loaded; see
            `sgm.weights.quantize`. The network then is for sampling, and cannot be saved.
        storage_device: where that is computed; None computes it on `device`.

    Raises:
        InputError: a tensor is missing, unexpected, or has another shape; or the base is missing or has another digest.
        ValueError: a missing tensor has no value to keep, since the network was built without memory.
    """
    smaller = {} if storage is None else _layers_to_store(network)
    match = match_network(
        network,
        path,
        base=base,
        adapters=adapters,
        allow_missing_adapters=allow_missing_adapters,
        allow_missing=allow_missing,
    )
    empty = [name for name in match.missing if match.targets[name].is_meta]
    if empty:
        raise ValueError(
            f"{match.path} lacks {sorted(empty)[:5]}, which have no value yet: build the network in memory"
        )
    whole = match.shard.size == 1  # a shard reads only a part of each tensor
    used = [match.tensors[name] for name in match.targets if name in match.tensors]
    with checked_ahead(_computed(used) if whole else ()), ThreadPoolExecutor(1) as beside:
        for name, old in match.targets.items():
            if name in match.new_adapters and is_magnitude(name):
                value = initial_magnitude(network, name)  # its weight comes before it
            elif name in match.new_adapters:
                value = initial_matrix(name, old.shape, match.shard, generator)
            elif name in match.zeroed:
                value = torch.zeros(old.shape)
            elif name in match.missing:
                value = old
            else:
                value = match.tensors[name]
                if not (whole and isinstance(value, StoredTensor)):
                    value = take_shard(name, value, match.shard)
            source = source_of(name, match.tensors.get(name, old))
            _replace(network, name, value, source=source, dtype=dtype, device=device, beside=beside)
            if name in smaller and storage is not None:
                store(smaller[name], storage, device=storage_device)
    _require_memory(network)
    report = _report(match)
    return replace(report, stored=stored_text(network, smaller.values(), storage)) if storage else report


def _layers_to_store(network: Any) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks, by the names of their weights."""
    shard: Shard = getattr(network, "tensor_shard", UNSHARDED)
    if shard.size > 1:
        raise InputError(f"weights in eight bits are for whole layers, and this network is one of {shard.size} shards")
    layers = {id(layer) for block in network.blocks for layer in linear_layers(block)}
    return {f"{name}.weight": module for name, module in network.named_modules() if id(module) in layers}


def load_autoencoder(
    vae: nn.Module,
    path: str | Path,
    *,
    ignore_keys: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LoadReport:
    """Load the weights of a file into an autoencoder, replacing its parameters one by one.

    Args:
        vae: has the parameter names of the released autoencoder; may be built without memory.
        path: the file.
        ignore_keys: prefixes of names in the file to skip, besides ``loss.``.
        dtype: of floating-point tensors; None keeps that of each parameter.
        device: of the parameters; None keeps that of each.

    Raises:
        InputError: a tensor is missing, unexpected, or of another shape.
    """
    match = match_autoencoder(vae, path, ignore_keys=ignore_keys)
    used = [match.tensors[name] for name in match.targets]
    with checked_ahead(_computed(used)), ThreadPoolExecutor(1) as beside:
        for name, lazy in zip(match.targets, used, strict=True):
            value = lazy if isinstance(lazy, StoredTensor) else compute(lazy)
            _replace(vae, name, value, source=source_of(name, lazy), dtype=dtype, device=device, beside=beside)
    _require_memory(vae)
    return _report(match)


def _computed(tensors: Iterable[AnyTensor]) -> list[AnyTensor]:
    """Return those that `_replace` does not check itself."""
    return [tensor for tensor in tensors if not isinstance(tensor, StoredTensor)]


def _replace(
    module: nn.Module,
    name: str,
    value: torch.Tensor | StoredTensor,
    *,
    source: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    beside: Executor,
) -> None:
    """Replace a parameter or buffer by a copy of `value`, keeping requires_grad and marks such as model_parallel."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    old = owner.get_parameter(leaf) if leaf in owner._parameters else owner.get_buffer(leaf)
    if device is None:
        device = torch.device("cpu") if old.is_meta else old.device
    target_dtype = dtype if dtype is not None and old.is_floating_point() else old.dtype
    # Always a copy: rewriting the mapped file in place must not change or invalidate a parameter.
    if isinstance(value, StoredTensor):
        stored, value = value, torch.empty(value.shape, device=device, dtype=target_dtype)
        stored.copy_to(value, beside)
    else:
        given, value = value, value.detach().to(device=device, dtype=target_dtype, copy=True).contiguous()
        require_in_range(source, given, value)
    if leaf in owner._parameters:
        parameter = nn.Parameter(value, requires_grad=old.requires_grad)
        for mark, setting in vars(old).items():
            setattr(parameter, mark, setting)
        owner.register_parameter(leaf, parameter)
    else:
        owner.register_buffer(leaf, value, persistent=True)


def _require_memory(module: nn.Module) -> None:
    """Raise RunError if a tensor of `module` is still on the meta device: a table that must be computed lazily."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    if left:
        raise RunError(f"built without memory and not filled by the checkpoint: {', '.join(left[:5])}")


def _report(match: Match) -> LoadReport:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in match.tensors.values()})
    missing = tuple(name for name in match.targets if name in match.missing)
    return LoadReport(
        path=match.path,
        num_tensors=len(match.tensors),
        file_dtype=" and ".join(dtypes),
        dropped=match.dropped,
        new_adapters=tuple(name for name in match.targets if name in match.new_adapters),
        missing=missing,
        base=match.base,
        warnings=tuple(_warnings(match, missing)),
    )


def _warnings(match: Match, missing: Sequence[str]) -> Iterable[str]:
    trained = [tensor for name, tensor in match.tensors.items() if starts_at_zero(name)]
    if trained and not any(bool(compute(tensor).any()) for tensor in trained):
        what = "every matrix B is zero, or w2 of LoKr, as before any training"
        yield f"the adapters in {match.path} have no effect: {what}"
    if missing:
        more = f" and {len(missing) - 10:,} more" if len(missing) > 10 else ""
        yield f"{match.path} lacks {len(missing):,} tensors, which keep their values: {', '.join(missing[:10])}{more}"


def released_layout(
    state_dict: Mapping[str, torch.Tensor], patch_size: int | Sequence[int] | None
) -> dict[str, torch.Tensor]:
    """Return a network's tensors under the names and in the shapes of the released checkpoints.

    Args:
        state_dict: the tensors of the network, by the network's own names.
        patch_size: p, meaning (1, p, p), or (pt, p, p). With pt = 1 the patch projection takes the shape
            [D, C, p, p], otherwise [D, C·pt·p·p] in the order C, pt, p, p. None keeps its shape.
    """
    tensors = {PREFIX + name: tensor.detach() for name, tensor in state_dict.items()}
    for name in (PREFIX + name for name in PATCH_WEIGHTS):
        if name in tensors and patch_size is not None:
            tensors[name] = released_patch(patch_size, tensors[name])
    return tensors


def released_patch(patch_size: int | Sequence[int], weight: torch.Tensor) -> torch.Tensor:
    """Return a patch projection in the shape of the released checkpoints; see `released_layout`."""
    pt, height, width = (1, patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    return weight.flatten(1).unflatten(1, (-1, height, width)) if pt == 1 else weight.flatten(1)


def save_network(
    folder: str | Path,
    iteration: int | str,
    network: nn.Module | Mapping[str, torch.Tensor],
    *,
    patch_size: int | Sequence[int] | None,
    file_format: Literal["pt", "safetensors"] = "pt",
    adapters: AdapterInfo | None = None,
    latest: bool = True,
    shard: Shard = UNSHARDED,
    any_values: bool = False,
) -> Path:
    """Save a network in the SAT layout, then update ``latest``.

    Each tensor parallel rank saves its shard; after all have finished, one of them calls :func:`write_latest`.

    Args:
        folder: output; ``<iteration>/mp_rank_00_model_states.pt`` and ``latest``.
        iteration: name of the iteration folder.
        network: the network, or tensors by the network's own names: all of them, or only its adapters.
        patch_size: see :func:`released_layout`.
        file_format: ``"pt"`` or ``"safetensors"``.
        adapters: description of the adapters among the tensors, saved with them; required for adapters-only files.
        latest: update ``latest``; :func:`write_latest` can do so later.
        shard: which shard of the network the tensors are: ``network.tensor_shard``.
        any_values: write NaN and infinity too, as of a training that failed.

    Returns:
        The weights file.

    Raises:
        InputError: values are not finite.
        RunError: the disk is full or the folder cannot be written to; no partial file is left.
        ValueError: `adapters` does not describe the tensors; `shard` is not the network's; or `latest` would name a
            single shard.
    """
    if isinstance(network, nn.Module) and getattr(network, "tensor_shard", UNSHARDED) != shard:
        raise ValueError(f"`shard` is {shard}, and the network is {getattr(network, 'tensor_shard', UNSHARDED)}")
    if latest and shard.size > 1:
        raise ValueError("`latest` may move only when all shards are saved; pass latest=False, then call write_latest")
    tensors = released_layout(network.state_dict() if isinstance(network, nn.Module) else network, patch_size)
    _require_described(tensors, adapters)
    path = Path(folder) / str(iteration) / shard_name(shard.index, file_format)
    entries = {} if adapters is None else {ENTRY: adapters.to_entry()}
    write_tensors(path, "module", tensors, entries, any_values=any_values)
    _remove_replaced(path, shard)
    if latest:
        write_latest(folder, iteration)
    return path


def _remove_replaced(path: Path, shard: Shard) -> None:
    """Remove files of an earlier save of the same iteration, in another format or with more shards."""
    for other in path.parent.iterdir():
        match = SHARD_NAME.fullmatch(other.name)
        if match is None or other == path:
            continue
        index = int(match[1])
        # Every rank removes its own shard; the first one also those beyond the number of ranks.
        if index == shard.index or (shard.index == 0 and index >= shard.size):
            other.unlink(missing_ok=True)


def _require_described(tensors: Mapping[str, torch.Tensor], adapters: AdapterInfo | None) -> None:
    """Refuse to save adapters without a description, or with a wrong one."""
    if adapters is None:
        if any(map(is_adapter, tensors)) and adapters_alone(tensors):
            raise ValueError("adapters alone cannot be loaded without their description; pass `adapters`")
    elif problem := adapters.mismatch(tensors):
        raise ValueError(f"`adapters` does not describe the tensors: {problem}")


def write_latest(folder: str | Path, iteration: int | str) -> None:
    """Point ``latest`` to an iteration.

    Raises:
        RunError: the folder cannot be written to; ``latest`` is then unchanged.
    """
    with atomic_file(Path(folder) / "latest") as temporary:
        temporary.write_text(f"{iteration}\n", encoding="utf-8")


def save_autoencoder(path: str | Path, vae: nn.Module | Tensors) -> Path:
    """Save an autoencoder as ``{"state_dict": {...}}``, or as safetensors if `path` has that suffix.

    Raises:
        InputError: values are not finite.
        RunError: the disk is full or the folder cannot be written to; no partial file is left.
    """
    write_tensors(Path(path), "state_dict", vae.state_dict() if isinstance(vae, nn.Module) else vae, {})
    return Path(path)


def write_tensors(
    path: Path, key: str, tensors: Tensors, entries: Mapping[str, Any], *, any_values: bool = False
) -> None:
    """Write tensors as safetensors, or with torch.save under `key`, from any device; see `read_entry`.

    Both have checksums.

    Args:
        path: the file.
        key: for torch.save.
        tensors: by name.
        entries: plain values beside them.
        any_values: see `save_network`.

    Raises:
        InputError: values are not finite.
    """
    if path.suffix == ".safetensors":
        metadata = {name: json.dumps(entry) for name, entry in entries.items()}
        write_safetensors(path, tensors, metadata=metadata, any_values=any_values)
        return
    alone = {}
    for name, tensor in tensors.items():
        alone[name] = owned(compute(tensor))  # torch.save writes the full storage of a view
        if not any_values:
            require_finite(path, name, tensor, alone[name])
    with atomic_file(path, need_bytes=sum(tensor.nbytes for tensor in alone.values())) as temporary:
        save_torch({key: alone, **entries}, temporary)


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous CPU tensor with its own storage, for writing."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
