"""Text conditioning: the conditioner, and the frozen T5 encoder.

Legend: B samples, L text tokens, D hidden size of the text encoder.

transformers and sentencepiece are imported when T5 is first used.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from sgm.config.values import spelled
from sgm.log import get_logger
from sgm.modules.encoders.t5_folder import T5Folder, UnknownText
from sgm.util import PRECISIONS, InputError, default, instantiate_from_config, nearest, to_device
from sgm.weights.offload import Offload
from sgm.weights.quantize import Storage, linear_layers, store, stored_text

log = get_logger(__name__)

WORDS_CURE = "T5 reads English: translate it, or set args.allow_unknown_text=true"
OFFLOADS = ("none", "cpu", "blocks", "release")
ENTRY_KEYS = ["target", "params", "input_key", "input_keys", "is_trainable", "ucg_rate", "legacy_ucg_value"]


@dataclass(frozen=True)
class _Entry:
    """One element of ``emb_models``, apart from the embedder itself."""

    input_keys: tuple[str, ...]
    ucg_rate: float
    legacy_ucg_value: str | None


class GeneralConditioner(nn.Module):
    """Encode a batch of raw conditions with the embedders of ``emb_models``; concatenate the embeddings along D.

    Args:
        emb_models: a list, possibly empty, of sections with

            * ``target`` and ``params``: an ``nn.Module`` whose forward takes the batch entries named by ``input_key``
              (or, in order, ``input_keys``), each a list of B strings, and returns (B, L, D);
            * ``ucg_rate`` (0): the probability with which training drops a sample's embedding;
            * ``legacy_ucg_value`` (null): text of a dropped sample; null zeroes its embedding instead;
            * ``is_trainable`` (false): only false is supported.

    An embedder may also have ``check()``, which raises InputError if files are missing; ``release()``, which frees its
    weights and is called after use if its attribute ``offload`` is ``release``; a context manager ``keep_loaded()``,
    which defers offloading (with it, the embedder offloads itself); ``unknown_texts(texts)`` and
    ``cut_texts(texts)``, see below.

    Example:
        ``conditioner({"txt": ["a red ball"]})["crossattn"]`` is (1, L, D).
    """

    def __init__(self, emb_models: Sequence[Mapping[str, Any]]):
        super().__init__()
        self.entries = [_read_entry(i, config) for i, config in enumerate(emb_models)]
        self._num_holds = 0
        self.embedders = nn.ModuleList(
            instantiate_from_config({key: config[key] for key in ("target", "params") if key in config})
            for config in emb_models
        )

    def forward(
        self,
        batch: Mapping[str, Any],
        *,
        generator: torch.Generator | None = None,
        force_zero: Iterable[str] = (),
    ) -> dict[str, torch.Tensor]:
        """Encode a batch.

        Args:
            batch: for every input key a list of B strings.
            generator: if given (training), drop each sample independently with the embedder's ``ucg_rate``; None
                drops nothing.
            force_zero: input keys whose embeddings are zeroed for the whole batch.

        Returns:
            ``{"crossattn": (B, L, D)}`` in the dtype of the embedder; empty without embedders.

        Raises:
            InputError: the batch lacks an input key, or `force_zero` names an unknown one.
        """
        force_zero = self._known_keys(force_zero)
        embeddings = []
        with self.keep_loaded():
            for entry, embedder in zip(self.entries, self.embedders, strict=True):
                inputs = _inputs(batch, entry)
                dropped = _draw_dropped(len(inputs[0]), entry.ucg_rate, generator)
                embedding = _encode(embedder, entry, inputs, dropped)
                zero = not force_zero.isdisjoint(entry.input_keys)
                embeddings.append(torch.zeros_like(embedding) if zero else embedding)
        return _join(embeddings)

    def get_unconditional_conditioning(
        self,
        batch: Mapping[str, Any],
        batch_uc: Mapping[str, Any] | None = None,
        force_uc_zero_embeddings: Iterable[str] | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Encode a batch for both branches of classifier-free guidance.

        The unconditional branch is that of a dropped sample in training: zeros, or the encoded ``legacy_ucg_value``.
        A non-empty text in `batch_uc` (a negative prompt) is encoded instead.

        Args:
            batch: for every input key a list of B strings.
            batch_uc: negative prompts under the same keys, a list of B strings each; missing keys and empty strings
                mean none.
            force_uc_zero_embeddings: input keys whose unconditional embedding is zero, negative prompt or not.

        Returns:
            (cond, uncond), each as forward returns it.
        """
        force_zero = self._known_keys(force_uc_zero_embeddings or ())
        conds, unconds = [], []
        with self.keep_loaded():
            for entry, embedder in zip(self.entries, self.embedders, strict=True):
                inputs = _inputs(batch, entry)
                num = len(inputs[0])
                cond = _encode(embedder, entry, inputs, torch.zeros(num, dtype=torch.bool))
                given = batch_uc is not None and all(key in batch_uc for key in entry.input_keys)
                negative = _inputs(batch_uc, entry) if batch_uc is not None and given else [[""] * num for _ in inputs]
                if len(negative[0]) != num:
                    raise InputError(f"{len(negative[0])} negative prompts for {num} prompts; give one for each")
                empty = torch.tensor([all(not text.strip() for text in texts) for texts in zip(*negative, strict=True)])
                forced = not force_zero.isdisjoint(entry.input_keys)
                if forced or (entry.legacy_ucg_value is None and bool(empty.all())):
                    uncond = torch.zeros_like(cond)
                else:
                    uncond = _encode(embedder, entry, negative, empty)
                conds.append(cond)
                unconds.append(uncond)
        return _join(conds), _join(unconds)

    @contextlib.contextmanager
    def keep_loaded(self) -> Iterator[None]:
        """Defer offloading to the end of the outermost block, so that many prompts load the weights once."""
        self._num_holds += 1
        try:
            with contextlib.ExitStack() as stack:
                for keep in self._hooks("keep_loaded").values():
                    stack.enter_context(keep())
                yield
        finally:
            self._num_holds -= 1
            if self._num_holds == 0:
                keeping = self._hooks("keep_loaded")
                for embedder, release in self._hooks("release").items():
                    if embedder not in keeping and getattr(embedder, "offload", None) == "release":
                        release()

    def check(self) -> None:
        """Check the files of every embedder without reading weights.

        Raises:
            InputError: files are missing or unreadable; the message lists all of them.
        """
        problems = []
        for check in self._hooks("check").values():
            try:
                check()
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError("\n".join(problems))

    def unknown_texts(self, texts: Sequence[str]) -> dict[str, UnknownText]:
        """Return text → what no embedder knows of it, of texts with characters that all embedders lack.

        Raises:
            InputError: a tokenizer cannot be read.
        """
        unknown = [method(texts) for method in self._hooks("unknown_texts").values()]
        if not unknown or len(unknown) < len(self.embedders):
            return {}
        shared = [text for text in unknown[0] if all(text in found for found in unknown)]
        # The embedder that knows most decides.
        return {text: min((found[text] for found in unknown), key=lambda one: one.wholly) for text in shared}

    def cut_texts(self, texts: Sequence[str]) -> dict[str, str]:
        """Return text → what an embedder drops of it.

        Raises:
            InputError: a tokenizer cannot be read.
        """
        return {text: cut for find in self._hooks("cut_texts").values() for text, cut in find(texts).items()}

    def release(self) -> None:
        """Free the weights of the embedders; the next use reads them again."""
        for release in self._hooks("release").values():
            release()

    def _hooks(self, name: str) -> dict[nn.Module, Callable[..., Any]]:
        """Return the method `name` of every embedder that has one."""
        return {embedder: getattr(embedder, name) for embedder in self.embedders if hasattr(embedder, name)}

    def _known_keys(self, keys: Iterable[str]) -> set[str]:
        keys = {keys} if isinstance(keys, str) else set(keys)
        known = [key for entry in self.entries for key in entry.input_keys]
        for key in keys.difference(known):
            raise InputError(f"no embedder reads the input key '{key}' (known: {known}){nearest(key, known)}")
        return keys


class FrozenT5Embedder(nn.Module):
    """The T5 encoder of a local folder, frozen: B strings → (B, L = max_length, D).

    Texts are padded to `max_length` with the pad token and encoded without an attention mask, as CogVideoX was
    trained. Every distinct text is encoded alone unless asked, so an embedding does not depend on its batch.

    The weights are read on first use. They are not parameters of this module: never saved, cast or optimized.
    `.to(device)` on this module or a parent sets the device of T5.

    Args:
        model_dir: a folder in the released layout: ``config.json``, ``spiece.model`` and safetensors weights, one
            file or shards with their index. Nothing is downloaded.
        max_length: tokens per text, the end token included. Longer texts are truncated, with a warning. In a model file
            without it, the ``text_length`` of the network.
        device: device of T5; null follows the module.
        dtype: ``fp32``, ``fp16`` or ``bf16``; null takes the dtype of the stored weights, except that fp16 weights run
            in fp32 on a CPU. Independent of the network's precision and of autocast.
        offload: after use, ``none`` keeps the weights on the device, ``cpu`` moves them to the CPU, ``release``
            frees them; the next use reads them again. With ``blocks`` they are always on the CPU, and two blocks at
            most on the device while T5 runs. See `keep_loaded`.

    Raises:
        InputError: a parameter has an unsupported value. Files are checked by `check` and before the weights are read.
    """

    IGNORED_PARAMS: ClassVar[dict[str, str]] = {
        "cache_dir": "T5 is read from the folder model_dir and never downloaded",
    }

    def __init__(
        self,
        model_dir: str = "google/t5-v1_1-xxl",
        *,
        max_length: Annotated[int, Field(ge=2, le=100_000)] = 77,
        device: str | None = None,
        dtype: str | None = None,
        offload: str = "none",
    ):
        super().__init__()
        if dtype is not None and dtype not in PRECISIONS:
            raise InputError(f"FrozenT5Embedder: dtype: {dtype!r} is not one of {[*PRECISIONS]} or null")
        if offload not in OFFLOADS:
            raise InputError(f"FrozenT5Embedder: offload: {offload!r} is not one of {list(OFFLOADS)}")
        if max_length < 2:
            raise InputError(f"FrozenT5Embedder: max_length: {max_length} leaves no room for text; use at least 2")
        self.max_length = max_length
        self.offload = offload
        self.known: Mapping[str, torch.Tensor] = {}  # embeddings (L, D) of cached texts
        self.folder = T5Folder(Path(model_dir).expanduser())
        self._dtype = PRECISIONS[dtype] if dtype else None
        self._run_device = _device_named(device) if device else None
        self._module_device = torch.device("cpu")
        # In a list, which nn.Module does not register: T5 must not appear among the parameters.
        self._loaded: list[nn.Module] = []
        self.storage: Storage | None = None  # of the linear layers, see `sgm.weights.quantize`
        self._offload: Offload | None = None
        self._is_on_device = False  # while weights are offloaded
        self._num_holds = 0
        self._warned: set[tuple[str, int]] = set()

    @property
    def embed_dim(self) -> int:
        """Hidden size D, from the folder's configuration."""
        return int(self.folder.config["d_model"])

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return bool(self._loaded)

    def check(self) -> None:
        """Check the folder without reading weights; see `T5Folder.check`."""
        self.folder.check()

    def release(self) -> None:
        """Free the weights; the next use reads them again."""
        self._loaded.clear()
        self._offload, self._is_on_device = None, False

    @contextlib.contextmanager
    def keep_loaded(self) -> Iterator[None]:
        """Defer offloading to the end of the outermost block, also on errors."""
        self._num_holds += 1
        try:
            yield
        finally:
            self._num_holds -= 1
            if self._num_holds == 0:
                if self._offload is not None and self._is_on_device:
                    self._offload.__exit__()
                    self._is_on_device = False
                if self.offload == "release":
                    self.release()

    @torch.no_grad()
    def forward(self, texts: Sequence[str], together: int = 1) -> torch.Tensor:
        """Encode texts.

        Args:
            texts: B strings; an empty one is encoded as well (the end token alone).
            together: different texts that T5 takes at once; with more than one, embeddings depend on their
                neighbours, by rounding.

        Returns:
            (B, L, D) on the module's device, in T5's dtype.

        Raises:
            InputError: the folder or its weights are unusable, or T5 cannot run in this dtype on this device.
        """
        if isinstance(texts, str):
            raise InputError(f"expected a list of texts, got the single string {texts!r}; write [text]")
        distinct = list(dict.fromkeys(texts))
        embeddings = {
            text: to_device(self.known[text][None], self._module_device) for text in distinct if text in self.known
        }
        if len(embeddings) < len(distinct):
            embeddings |= self._encode([text for text in distinct if text not in embeddings], together)
        if not distinct:
            return torch.zeros(0, self.max_length, self.embed_dim, device=self._module_device)
        return torch.cat([embeddings[text] for text in texts])

    def _encode(self, texts: Sequence[str], together: int) -> dict[str, torch.Tensor]:
        """Run T5 on different texts; return the embedding (1, L, D) of each."""
        with self.keep_loaded():
            model, device = self._model_on_device()
            hidden = {}
            # T5 keeps its own precision under the network's autocast.
            with torch.autocast(device.type, enabled=False):
                for first in range(0, len(texts), together):
                    batch = texts[first : first + together]
                    tokens = to_device(self.tokenize(batch), device)
                    hidden |= zip(batch, model(input_ids=tokens).last_hidden_state.split(1), strict=True)
        return {text: embedding.to(self._module_device) for text, embedding in hidden.items()}

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the token ids of B texts, cut or padded to L: (B, L) int64 on the CPU.

        Source: pieces of T5's sentencepiece model, then always the end token (Raffel et al. 2020).
        """
        tokenizer = self.folder.tokenizer
        rows = []
        for text in texts:
            pieces = tokenizer.encode(text)
            if tokenizer.unk_id() in pieces:
                self._warn_unknown(text)
            if len(pieces) >= self.max_length and ("cut", hash(text)) not in self._warned:
                self._warned.add(("cut", hash(text)))
                log.warning("prompt cut: %s (prompt: '%s')", self._cut(pieces), _beginning(text))
            ids = [*pieces[: self.max_length - 1], tokenizer.eos_id()]
            rows.append(ids + [tokenizer.pad_id()] * (self.max_length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_length)

    def unknown_texts(self, texts: Sequence[str]) -> dict[str, UnknownText]:
        """Return text → what the tokenizer does not know of it; see `T5Folder.unknown_texts`."""
        return self.folder.unknown_texts(texts)

    def cut_texts(self, texts: Sequence[str]) -> dict[str, str]:
        """Return text → what is dropped, of texts with more than `max_length` tokens."""
        rows = zip(texts, self.folder.tokenizer.encode(list(texts)), strict=True)
        return {text: self._cut(pieces) for text, pieces in rows if len(pieces) >= self.max_length}

    def _warn_unknown(self, text: str) -> None:
        if ("unknown", hash(text)) not in self._warned:  # captions repeat every epoch
            self._warned.add(("unknown", hash(text)))
            unknown = self.folder.unknown_texts([text])[text]
            log.warning("unknown to the tokenizer, and lost: %s (prompt: '%s')", unknown, _beginning(text))

    def _cut(self, pieces: Sequence[int]) -> str:
        kept = self.max_length - 1
        dropped = _beginning(self.folder.tokenizer.decode([*pieces[kept:]]))
        return f"it has {len(pieces) + 1:,} tokens and max_length is {self.max_length}; dropped: '{dropped}'"

    def _model_on_device(self) -> tuple[nn.Module, torch.device]:
        device = default(self._run_device, self._module_device)
        if device.type == "cpu" and self._dtype is torch.float16:
            raise InputError("FrozenT5Embedder: a CPU cannot run dtype: fp16; use fp32 or bf16, or leave it out (null)")
        if not self._loaded:
            if self._run_device is not None:
                _require_present(device)
            self.check()
            self._loaded.append(self._load(device))
        model = self._loaded[0]
        if self._offload is None:
            model.to(device)
        elif not self._is_on_device:
            self._offload.__enter__()
            self._is_on_device = True
        return model, device

    def _load(self, device: torch.device) -> nn.Module:
        """Read T5 to the CPU and prepare it for `storage` and `offload`."""
        model: Any = self.folder.load(self.dtype_on(device))
        blocks = model.encoder.block
        if self.storage is not None:
            layers = linear_layers(blocks)
            for layer in layers:
                store(layer, self.storage, device=device)
            log.info("T5: %s", stored_text(model, layers, self.storage))
        if self.offload == "blocks":
            self._offload = offload = Offload(model, device, [[block] for block in blocks])
            for index, block in enumerate(blocks):  # the hooks do not hold the block, which `release` frees at once
                block.register_forward_pre_hook(lambda *_, index=index: offload.bring(index))
                block.register_forward_hook(lambda *_, index=index: offload.free(index), always_call=True)
        elif self.offload == "cpu" and device.type != "cpu":
            self._offload = Offload(model, device)
        return model

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Return the precision of T5 on `device`: `dtype`, or else that of its files."""
        dtype = default(self._dtype, self.folder.stored_dtype)
        return torch.float32 if device.type == "cpu" and dtype is torch.float16 else dtype

    def _apply(self, fn, recurse: bool = True):  # type: ignore[override]
        # nn.Module calls this to move or cast itself: there are no tensors to move, only the device to record.
        self._module_device = fn(torch.empty(0, device=self._module_device)).device
        return super()._apply(fn, recurse)


def texts_without_words(conditioner: Any, texts: Sequence[str]) -> dict[str, str]:
    """Return text → reason to refuse it, of texts of which the tokenizer of a conditioner knows no word.

    A conditioner without a method ``unknown_texts`` is not asked.

    Raises:
        InputError: the tokenizer cannot be read.
    """
    find = getattr(conditioner, "unknown_texts", None)
    found = {} if find is None else find(list(dict.fromkeys(texts)))
    return {
        text: f"the tokenizer knows no word of '{_beginning(text)}' (unknown: {unknown})"
        for text, unknown in found.items()
        if unknown.wholly
    }


def _beginning(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _device_named(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"FrozenT5Embedder: device: {name!r} is none that torch knows; leave it out (null) to follow the network"
        ) from error


def _require_present(device: torch.device) -> None:
    """Raise InputError for a device that this machine has not, before T5 is read for it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    num = torch.accelerator.device_count() if accelerator is not None and accelerator.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= num:
        raise InputError(
            f"FrozenT5Embedder: device: '{device}' is not on this machine, which has {num} of that kind; leave it out "
            "(null) to follow the network"
        )


def _read_entry(i: int, config: Mapping[str, Any]) -> _Entry:
    where = f"conditioner emb_models[{i}]"
    for key in config:
        if key not in ENTRY_KEYS:
            raise InputError(f"{where}: unknown key '{key}'{nearest(str(key), ENTRY_KEYS)} (known: {ENTRY_KEYS})")
    if ("input_key" in config) == ("input_keys" in config):
        raise InputError(f"{where}: give either input_key or input_keys, the names of batch entries (e.g. txt)")
    keys = [config["input_key"]] if "input_key" in config else config["input_keys"]
    is_list = isinstance(keys, Sequence) and not isinstance(keys, str)
    if not is_list or not keys or not all(isinstance(key, str) and key for key in keys):
        raise InputError(f"{where}: input keys: {spelled(keys)}; list at least one batch entry (e.g. txt)")
    rate = config.get("ucg_rate", 0.0)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise InputError(f"{where}: ucg_rate: {rate!r} is not a probability; use a number from 0 to 1")
    legacy = config.get("legacy_ucg_value")
    if not isinstance(legacy, str | None):
        cure = "quote it, or leave it out (null) for an embedding of zeros"
        raise InputError(f"{where}: legacy_ucg_value: {spelled(legacy)} is no text; {cure}")
    return _Entry(tuple(keys), float(rate), legacy)


def _inputs(batch: Mapping[str, Any], entry: _Entry) -> list[list[str]]:
    """Return the batch entries that an embedder reads, as equally long lists."""
    for key in entry.input_keys:
        if key not in batch:
            raise InputError(f"the batch has no '{key}', which the conditioner reads; it has {sorted(batch)}")
    inputs = [list(batch[key]) for key in entry.input_keys]
    if len({len(values) for values in inputs}) > 1:
        raise InputError(f"batch entries {list(entry.input_keys)} differ in length: {[len(v) for v in inputs]}")
    return inputs


def _draw_dropped(num: int, rate: float, generator: torch.Generator | None) -> torch.Tensor:
    """Draw which of `num` samples drop their condition: (B,) bool on the CPU."""
    if generator is None or rate == 0:
        return torch.zeros(num, dtype=torch.bool)
    return (torch.rand(num, generator=generator, device=generator.device) < rate).cpu()


def _encode(embedder: nn.Module, entry: _Entry, inputs: list[list[str]], dropped: torch.Tensor) -> torch.Tensor:
    """Encode to (B, L, D), with the dropped samples (B,) zeroed or replaced by the legacy value."""
    legacy = entry.legacy_ucg_value
    if legacy is not None:
        drops = dropped.tolist()
        inputs = [[legacy if drop else v for v, drop in zip(values, drops, strict=True)] for values in inputs]
    embedding = embedder(*inputs)
    if embedding.ndim != 3:
        raise InputError(f"{type(embedder).__name__} returned shape {tuple(embedding.shape)}; expected (B, L, D)")
    if legacy is not None:
        return embedding
    return embedding.masked_fill(to_device(dropped, embedding.device)[:, None, None], 0.0)


def _join(embeddings: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"crossattn": torch.cat(embeddings, dim=-1)} if embeddings else {}
