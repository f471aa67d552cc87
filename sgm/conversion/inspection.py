"""Describe a file or folder of weights from headers and names, without reading values."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sgm.config.values import spelled
from sgm.conversion.diffusers.to_sat import read_json
from sgm.conversion.modelspec import CONFIG_DIGEST, KEYS, PREFIX
from sgm.conversion.trainers.sources import find_files, find_state, named_folder, network_tensors
from sgm.conversion.trainers.zero import MODEL_FILE, deepspeed_objects, read_state_entries, read_zero_state
from sgm.io import readable_size, reason_of, refusing_denied, require_local
from sgm.util import InputError
from sgm.weights.adapters import (
    TITLES,
    AdapterInfo,
    Kind,
    adapters_alone,
    is_adapter,
    kind_of,
    ranks_and_layers,
    read_adapter_info,
)
from sgm.weights.architecture import CONFIGS, Architecture, describe_architecture
from sgm.weights.files import WEIGHTS, find_weights, read_metadata, read_shards, read_tensors, verify_file
from sgm.weights.lazy import AnyTensor, Tensors, meta
from sgm.weights.lora.foreign import _configs, _number, read_diffusers_lora
from sgm.weights.lora.names import FILE as LORA_FILE
from sgm.weights.lora.names import QKV_PARTS, LoraName, is_comfyui, parse_lora_name

_MODELS = {
    "toy": "toy",
    "toy_i2v": "toy I2V",
    "toy1.5_i2v": "toy 1.5 I2V",
    "cogvideox_2b": "CogVideoX-2B",
    "cogvideox_5b": "CogVideoX-5B",
    "cogvideox_5b_i2v": "CogVideoX-5B-I2V",
    "cogvideox1.5_5b": "CogVideoX1.5-5B",
    "cogvideox1.5_5b_i2v": "CogVideoX1.5-5B-I2V",
}
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_PIPELINE_PARTS = ("transformer", "vae", "text_encoder")
# One tensor of each adapted module.
_LORA = re.compile(r".+(?:(?:\.lora_A|[._]lora[._]down|\.lora_linear_layer\.down)(?:\..+)?|\.lokr_w2(?:_b)?)")

_SAT_LORA = re.compile(r"\.(?:matrix_[AB]|lokr_\w+)\.")


@dataclass(frozen=True, kw_only=True)
class LoraFacts:
    """LoRA matrices in a file.

    Attributes:
        rank: of the matrices; the largest if they differ.
        alpha: numerator of the scale; None if unknown.
        layers: layers with adapters, ascending.
        base: checkpoint they were trained on, as recorded in the file.
        kind: the method.
    """

    rank: int
    alpha: float | None
    layers: tuple[int, ...]
    base: str | None
    kind: Kind = "lora"


@dataclass(frozen=True, kw_only=True)
class StateFacts:
    """A state to resume training from.

    Attributes:
        zero_stage: 0 to 3.
        ranks: number of ranks that wrote it.
        iteration: optimizer steps done.
        ema: whether it holds EMA weights; None if unknown.
    """

    zero_stage: int
    ranks: int
    iteration: int
    ema: bool | None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Description of a file or folder. Sizes are of all parts for a pipeline, of the weights for a run.

    Attributes:
        path: the file or folder.
        kind: e.g. ``SAT network``, ``diffusers pipeline``, ``ZeRO state``.
        candidates: shipped models that match, for weights or adapters.
        generation: ``1.0`` or ``1.5``, of a transformer.
        num_tensors: number of tensors.
        num_parameters: number of their elements.
        num_bytes: their size.
        dtypes: number of tensors by dtype.
        architecture: of a transformer.
        lora: of LoRA matrices.
        state: of a training state.
        metadata: what the header says by the ModelSpec convention, see `sgm.conversion.modelspec`.
        iterations: iteration folders of a run or of the SAT layout.
        parts: components of a pipeline; of a run, its newest weights and its state.
        tensors: shape and dtype by name; empty if there are parts.
    """

    path: str
    kind: str
    candidates: tuple[str, ...] = ()
    generation: str | None = None
    num_tensors: int = 0
    num_parameters: int = 0
    num_bytes: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    architecture: Architecture | None = None
    lora: LoraFacts | None = None
    state: StateFacts | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    iterations: tuple[str, ...] = ()
    parts: tuple["Inspection", ...] = ()
    tensors: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> str | None:
        """The only shipped model with these shapes, otherwise None."""
        return self.candidates[0] if len(self.candidates) == 1 else None

    def to_json(self, *, tensors: bool = False) -> dict[str, Any]:
        """Return plain values under the names of the attributes; `tensors` includes those of all tensors.

        Files of others and of training have no ``metadata``.
        """
        content: dict[str, Any] = {"path": self.path, "kind": self.kind, "model": self.model}
        content |= dataclasses.asdict(dataclasses.replace(self, parts=(), tensors={}))
        content["parts"] = [part.to_json(tensors=tensors) for part in self.parts]
        del content["tensors"]
        if not self.metadata:
            del content["metadata"]
        if tensors:
            content["tensors"] = {name: {"shape": list(s), "dtype": dtype} for name, (s, dtype) in self.tensors.items()}
        return content

    def table(self, *, tensors: bool = False) -> str:
        """Return a readable description; `tensors` adds a line for each tensor."""
        lines = [self.path, *(f"  {name:<12}{text}" for name, text in self._rows())]
        if tensors:
            width = max((len(name) for name in self.tensors), default=0)
            lines += [f"    {name:<{width}}  {dtype:<9} {list(shape)}" for name, (shape, dtype) in self.tensors.items()]
        for part in self.parts:
            lines += [f"  {line}" for line in part.table(tensors=tensors).splitlines()]
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "kind", self.kind
        if self.generation or self.candidates:
            model = " or ".join(self.candidates) or "none of the shipped ones"
            yield "model", model + (f" (generation {self.generation})" if self.generation else "")
        if self.architecture is not None:
            yield "shape", str(self.architecture)
        if self.lora is not None:
            alpha = "unknown" if self.lora.alpha is None else f"{self.lora.alpha:g}"
            base = f", of {self.lora.base}" if self.lora.base else ""
            yield TITLES[self.lora.kind], f"rank {self.lora.rank}, alpha {alpha}, {len(self.lora.layers)} layers{base}"
        if self.state is not None:
            ema = ", with moving averages" if self.state.ema else ""
            ranks = f"{self.state.ranks} rank{'s' if self.state.ranks > 1 else ''}"
            yield "state", f"iteration {self.state.iteration}, ZeRO stage {self.state.zero_stage}, {ranks}{ema}"
        if title := self.metadata.get(f"{PREFIX}title"):
            known = [self.metadata.get(PREFIX + name) for name in ("architecture", "resolution")]
            yield "title", f"{title} ({', '.join(filter(None, known))})"
        if digest := self.metadata.get(CONFIG_DIGEST):
            yield "trained", f"with the configuration of digest {digest[:12]}"
        if self.iterations:
            yield "iterations", ", ".join(self.iterations)
        yield "precision", ", ".join(sorted(self.dtypes)) or "none"
        yield "parameters", f"{self.num_parameters:,} in {self.num_tensors:,} tensors, {readable_size(self.num_bytes)}"


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Describe a file or folder.

    Raises:
        InputError: it does not exist, is damaged, or holds nothing of CogVideoX.
    """
    require_local(path)
    path = Path(path)
    try:
        with refusing_denied():
            if not path.exists():
                raise InputError(f"there is nothing at {path}; give a file or folder of weights")
            return next(found for look in DETECTORS if (found := look(path)) is not None)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}; correct the path or its permissions") from error


def verify_checkpoint(path: str | Path) -> dict[str, int]:
    """Read all bytes of a file, or of all weights and states in a folder, and compare them with their checksums.

    Returns:
        The number of files with and without checksums.

    Raises:
        InputError: tensors or entries are damaged, or weights are not finite; all of them are named.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(f for f in _files_below(path) if f.suffix in _SUFFIXES and f.is_file())
    counts, problems = Counter({"with_checksums": 0, "without": 0}), []
    for file in tqdm(files, desc="verifying", leave=False, disable=None):
        try:
            counts["with_checksums" if verify_file(file) else "without"] += 1
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return dict(counts)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder, also in linked ones, such as those of a text encoder that models share."""
    seen: set[str] = set()
    for own, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(own)) in seen:  # a link to it, or to a folder above
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(own) / name for name in names)


def _run_folder(path: Path) -> Inspection | None:
    """Describe a run of train_video.py: its newest weights and its training state."""
    if not (path / "resume" / "latest").is_file():
        return None
    state = named_folder(path / "resume" / "latest")
    parts = [_state(state) or _weights(state)]
    if (path / "latest").is_file():
        parts.insert(0, _weights(find_weights(path)))
    first = dataclasses.replace(parts[0], state=None, architecture=None, lora=None, tensors={})
    return dataclasses.replace(
        first, path=str(path), kind="run folder", iterations=_iterations(path), parts=tuple(parts)
    )


def _state(path: Path) -> Inspection | None:
    """Describe a state of DeepSpeed, of any trainer."""
    folder = find_state(path)
    if folder is None:
        file = path / MODEL_FILE
        steps, ranks = read_state_entries(file, "global_steps", "dp_world_size") if file.is_file() else (None, None)
        if steps is None:
            return None
        if not isinstance(steps, int) or not isinstance(ranks, int | None):
            raise InputError(f"{file}: global_steps or dp_world_size is no whole number; copy it again")
        with deepspeed_objects():
            tensors: Tensors = read_tensors(file)
        facts = StateFacts(zero_stage=0, ranks=ranks or 1, iteration=steps, ema=None)
    else:
        state = read_zero_state(folder)
        tensors, ema = state.tensors(), state.averages is not None
        facts = StateFacts(zero_stage=state.stage, ranks=state.world_size, iteration=state.iteration, ema=ema)
    found = _described(path, tensors, adapters=None)
    return dataclasses.replace(found, kind="ZeRO state" if facts.zero_stage else "training state", state=facts)


def _pipeline(path: Path) -> Inspection | None:
    """Describe a pipeline of diffusers."""
    if not (path / "model_index.json").is_file():
        return None
    index = read_json(path / "model_index.json")
    # Of a pipeline that was saved without one, diffusers writes [null, null].
    parts = [_weights(path / name) for name in _PIPELINE_PARTS if index.get(name) not in (None, [None, None])]
    if (path / LORA_FILE).is_file():  # --lora keep
        parts.append(_weights(path / LORA_FILE))
    if not parts:
        raise InputError(f"{path / 'model_index.json'} names none of {', '.join(_PIPELINE_PARTS)}; copy it again")
    return _sum(path, f"diffusers pipeline ({index.get('_class_name')})", parts)


def _sat_model(path: Path) -> Inspection | None:
    """Describe the folder of a model in the SAT layout, as tools/convert_weight_hf2sat.py writes it."""
    if not (path / "model.yaml").is_file():
        return None
    parts = [_weights(path / name) for name in ("transformer", "vae", "t5") if (path / name).is_dir()]
    return _sum(path, "model in the SAT layout", parts) if parts else None


def _sum(path: Path, kind: str, parts: Sequence[Inspection]) -> Inspection:
    """Describe a folder of several components."""
    return Inspection(
        path=str(path),
        kind=kind,
        candidates=parts[0].candidates,
        generation=parts[0].generation,
        num_tensors=sum(part.num_tensors for part in parts),
        num_parameters=sum(part.num_parameters for part in parts),
        num_bytes=sum(part.num_bytes for part in parts),
        dtypes=dict(sum((Counter(part.dtypes) for part in parts), Counter())),
        parts=tuple(parts),
    )


def _weights(path: Path) -> Inspection:
    """Describe a file of weights, or a folder with one set of them."""
    if (path / "adapter_config.json").is_file():
        files = sorted(path.glob("adapter_model.*"))
    else:
        files = find_files(path)
    if not files:
        raise InputError(f"{path} has an adapter_config.json and no adapter_model file beside it; copy both")
    tensors: dict[str, AnyTensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    header = read_metadata(files[0])
    described = {name: text for name, text in header.items() if name.startswith(PREFIX) or name in KEYS}
    if any(map(_LORA.fullmatch, tensors)):
        return dataclasses.replace(_foreign_lora(path, files[0], tensors), metadata=described)
    adapters = read_adapter_info(files[0]) if len(files) == 1 else None
    iterations = _iterations(path) if (path / "latest").is_file() else ()
    return dataclasses.replace(_described(path, tensors, adapters=adapters), iterations=iterations, metadata=described)


# Order matters: a run folder contains a state and weights, and a state looks like SAT weights.
DETECTORS: Sequence[Callable[[Path], Inspection | None]] = (_run_folder, _state, _pipeline, _sat_model, _weights)


def _iterations(path: Path) -> tuple[str, ...]:
    """Return the iterations in a folder of the SAT layout, ascending."""
    names = {file.parent.name for file in path.glob(f"*/{WEIGHTS}.*")}
    return tuple(sorted(names, key=lambda name: (int(re.sub(r"\D", "", name) or 0), name)))


def _counted(path: Path, kind: str, tensors: Tensors, **more: Any) -> Inspection:
    """Count tensors, elements and bytes."""
    metas = {name: meta(tensor) for name, tensor in tensors.items()}
    named = {name: (tuple(each.shape), str(each.dtype).removeprefix("torch.")) for name, each in metas.items()}
    return Inspection(
        path=str(path),
        kind=kind,
        num_tensors=len(metas),
        num_parameters=sum(each.numel() for each in metas.values()),
        num_bytes=sum(each.numel() * each.dtype.itemsize for each in metas.values()),
        dtypes=dict(Counter(dtype for _, dtype in named.values())),
        tensors=named,
        **more,
    )


def _described(path: Path, tensors: Tensors, adapters: AdapterInfo | None) -> Inspection:
    """Describe the tensors of a transformer, an autoencoder or a T5 encoder by their names.

    Raises:
        InputError: they are not those of a CogVideoX model.
    """
    for kind, pattern in (
        ("SAT autoencoder", r"encoder\.down\.\d"),
        ("diffusers autoencoder", r"encoder\.down_blocks\.\d"),
        ("T5 encoder", r"encoder\.block\.\d+\.layer\.0\.SelfAttention\."),
    ):
        if any(re.match(pattern, name) for name in tensors):
            return _counted(path, kind, tensors)
    network, of_diffusers = network_tensors(tensors, path)
    _require_matrices(path, {name: tensor for name, tensor in network.items() if _SAT_LORA.search(name)})
    shapes = {name: tuple(tensor.shape) for name, tensor in network.items()}
    lora = _sat_lora(network, adapters)
    if lora is not None and adapters_alone(network):
        width = _width(shapes)
        return _counted(
            path, f"SAT adapters ({TITLES[lora.kind]})", tensors, lora=lora, candidates=_models(width, lora.layers)
        )
    found = describe_architecture(shapes)
    return _counted(
        path,
        ("ComfyUI" if is_comfyui(tensors) else "diffusers") + " transformer"
        if of_diffusers
        else "SAT network" + (f" with {TITLES[lora.kind]}" if lora else ""),
        tensors,
        candidates=() if found is None else _models(found.hidden_size, range(found.num_layers), found),
        generation=None if found is None else {1: "1.0", 2: "1.5"}.get(found.temporal_patch or 0),
        architecture=found,
        lora=lora,
    )


def _width(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the hidden size of adapters by SAT's names, of their attention; 0 if unknown."""
    for name, shape in shapes.items():
        if ".query_key_value.matrix_A." in name:
            return shape[1]
        if ".query_key_value.lokr_w1.0" in name:
            whole, last = (shapes.get(name.replace("lokr_w1", kind)) for kind in ("lokr_w2", "lokr_w2_b"))
            second = whole or last
            return shape[1] * second[1] if second else 0
    return 0


def _models(hidden_size: int, layers: Sequence[int], found: Architecture | None = None) -> tuple[str, ...]:
    """Return the shipped models with this hidden size and these layers; with `found`, those with exactly this shape."""
    exact = found and (found.hidden_size, found.num_layers, found.in_channels, found.temporal_patch)
    keys = [key for key in CONFIGS if key[0] == hidden_size and max(layers, default=0) < key[1]]
    return tuple(_MODELS[CONFIGS[key]] for key in keys if exact in (None, key))


def _sat_lora(tensors: Tensors, adapters: AdapterInfo | None) -> LoraFacts | None:
    ranks, layers = ranks_and_layers(tensors)
    if not layers or not any(map(is_adapter, tensors)):
        return None
    alpha, base = (None, None) if adapters is None else (adapters.alpha, adapters.base)
    rank = max(ranks) if adapters is None else adapters.rank
    return LoraFacts(rank=rank, alpha=alpha, layers=layers, base=base, kind=kind_of(tensors))


def _foreign_lora(path: Path, file: Path, tensors: Tensors) -> Inspection:
    """Describe LoRA matrices under the names of diffusers or another tool."""
    matches = {name: parse_lora_name(name) for name in tensors if _LORA.fullmatch(name)}
    _require_matrices(file, {name: tensors[name] for name in matches})
    known = {name: each for name, each in matches.items() if isinstance(each, LoraName)}
    config = file.parent / "adapter_config.json"
    described = [*_configs(file)]
    alphas = {_alpha(file, *each) for each in described if each[1].get("lora_alpha") is not None}
    stored = {name: _number(each) for name, each in read_shards(file)[0].items() if name.endswith(".alpha")}
    having = {(each.layer, each.module) for each in map(parse_lora_name, stored) if isinstance(each, LoraName)}
    alphas |= {*stored.values()}
    if having:  # the rank is the alpha of the others
        alphas |= {tensors[name].shape[0] for name, own in known.items() if (own.layer, own.module) not in having}
    first = next(iter(matches))
    sides = [each.side for each in map(parse_lora_name, tensors) if isinstance(each, LoraName)]
    method: Kind = "dora" if "magnitude" in sides else "lokr" if "lokr_w2" in sides or "lokr_w2_b" in sides else "lora"
    kinds = {"base_model.": "of PEFT", "diffusion_model.": "for ComfyUI", "lora_": "of kohya's scripts"}
    kind = next((kind for lead, kind in kinds.items() if first.startswith(lead)), "for diffusers")
    kind = f"{TITLES[method]} {'of PEFT' if config.is_file() else kind}"
    lora = LoraFacts(
        rank=max(tensors[name].shape[0] for name in matches),
        alpha=alphas.pop() if len(alphas) == 1 else None,
        layers=tuple(sorted({each.layer for each in known.values() if each.layer is not None})),
        base=next(
            (str(each["base_model_name_or_path"]) for _, each in described if each.get("base_model_name_or_path")), None
        ),
        kind=method,
    )
    if method == "lokr":
        other = read_diffusers_lora(file)
        lora = dataclasses.replace(lora, rank=other.rank, alpha=other.alpha)
        return _counted(path, kind, tensors, lora=lora)
    widths = {tensors[name].shape[1] for name, each in known.items() if each.module == QKV_PARTS[0]}
    candidates = _models(widths.pop(), lora.layers) if lora.layers and len(widths) == 1 else ()
    return _counted(path, kind, tensors, lora=lora, candidates=candidates)


def _require_matrices(path: Path, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if len(meta(tensor).shape) < 2:
            raise InputError(f"{path}: {name} has the shape {tuple(tensor.shape)}, expected a matrix; save it again")


def _alpha(file: Path, source: str, config: Mapping[str, Any]) -> float:
    """Return the alpha of a configuration that has one."""
    try:
        return float(config["lora_alpha"])
    except (TypeError, ValueError, OverflowError) as error:
        shown = spelled(config["lora_alpha"])
        raise InputError(f"{file}: lora_alpha is {shown} in {source}; expected a number above 0") from error
