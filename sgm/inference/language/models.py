"""Language models that write text: folders of Hugging Face transformers, and endpoints that a user names.

No folder is downloaded, and no code in one is run. transformers and requests are imported when they are needed.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from sgm.io import parse_json, require_local
from sgm.util import InputError, RunError

Message = dict[str, str]  # role and content, as chat templates and endpoints have them

ENDPOINT_KEY = "PROMPT_ENHANCER_KEY"  # variable with the key that an endpoint asks for
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_TIMEOUT = (10, 600)  # seconds to connect, and to answer
_RETRIED = (429, 502, 503, 504)  # the endpoint is busy
_BACKOFF, _LONGEST_WAIT = 1.0, 60.0  # seconds between attempts: a factor; of what the endpoint asks for


class Cut(str):
    """An answer that breaks off, since it reached the longest length."""


class Writer(Protocol):
    """What answers a chat, and the name that records give it."""

    name: str

    def answer(self, messages: Sequence[Message]) -> str:
        """Return the answer to a chat, as the model wrote it; as `Cut` if it breaks off."""
        ...


@dataclass(frozen=True)
class Kind:
    """A kind of folder of transformers.

    Attributes:
        does: what its models do, for messages.
        fetch: how to get one, for messages.
        models: name of the class of transformers that reads the weights, such as ``AutoModelForCausalLM``.
        mapping: name of its mapping in ``transformers.models.auto.modeling_auto``.
        reader: name of the class that reads tokenizer or processor.
        lacks: what a reader lacks, or None.
    """

    does: str
    fetch: str
    models: str
    mapping: str
    reader: str
    lacks: Callable[[Any], str | None]


CHAT = Kind(
    does="answer a chat",
    fetch="fetch a language model tuned to instructions first, with: hf download NAME --local-dir FOLDER",
    models="AutoModelForCausalLM",
    mapping="MODEL_FOR_CAUSAL_LM_MAPPING",
    reader="AutoTokenizer",
    lacks=lambda tokenizer: None if tokenizer.chat_template else "chat template",
)


def read_folder(folder: Path, kind: Kind, *, dtype: torch.dtype | None = None, weights: bool = True) -> tuple[Any, Any]:
    """Return the reader (tokenizer or processor) of a folder and its model, on the CPU.

    Args:
        folder: ``config.json``, safetensors, the files of the reader and a chat template.
        kind: of model that is expected.
        dtype: of the weights; None takes that of the files.
        weights: whether to read them; otherwise the model is None, and the rest is checked.

    Raises:
        InputError: the folder holds no such model; the message gives the reason.
    """
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.utils import logging

    require_local(folder)
    if not (folder / "config.json").is_file():
        found = "has no config.json" if folder.is_dir() else "does not exist"
        raise InputError(f"model folder '{folder}' {found}; nothing is downloaded: {kind.fetch}")
    logging.disable_progress_bar()
    loaded: Any = (None, {"missing_keys": ()})
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        if type(config) not in getattr(modeling_auto, kind.mapping):
            held = f"model folder '{folder}' holds a model of type '{config.model_type}'"
            raise InputError(f"{held}, which does not {kind.does}; {kind.fetch}")
        reader: Any = getattr(transformers, kind.reader).from_pretrained(folder, **_LOCAL)
        if lack := kind.lacks(reader):
            raise InputError(f"model folder '{folder}' has no {lack}; take a model that was tuned to instructions")
        if weights:
            loaded = getattr(transformers, kind.models).from_pretrained(
                folder, **_LOCAL, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
            )
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"the weights in '{folder}' are cut off or damaged ({error}); copy them again") from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError, TypeError) as error:
        # The advice that follows is about downloads and code that is not run here.
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = f"it needs Python code of its own, which is not run; {kind.fetch}"
        raise InputError(f"model folder '{folder}' cannot be used: {reason[:600]}") from error
    model, info = loaded
    if lacking := sorted(info["missing_keys"]):
        raise InputError(f"the weights in '{folder}' lack {len(lacking)} tensors, e.g. {lacking[0]}; copy it again")
    return reader, model if model is None else model.eval().requires_grad_(False)


class ChatModel:
    """A chat model from a folder; it answers greedily, so that equal chats have equal answers.

    Args:
        folder: see `read_folder`.
        device: to compute on.
        dtype: of the weights; None takes that of the files.
        max_new_tokens: longest answer, thoughts included.

    Raises:
        InputError: the folder is not such a model.
    """

    def __init__(
        self, folder: Path, *, device: torch.device, dtype: torch.dtype | None = None, max_new_tokens: int
    ) -> None:
        self.name = str(folder)
        self._max_new_tokens = max_new_tokens
        self._tokenizer, model = read_folder(folder, CHAT, dtype=dtype)
        self._model = model.to(device)

    @torch.inference_mode()
    def answer(self, messages: Sequence[Message]) -> str:
        """Return the answer to a chat.

        Raises:
            InputError: the chat template cannot be used.
        """
        from jinja2 import TemplateError

        try:
            inputs = self._tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                enable_thinking=False,  # a variable of the templates of models that can do without
            ).to(self._model.device)
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the chat template of '{self.name}' cannot be used: {error}") from error
        inputs.pop("token_type_ids", None)
        sampling = {"temperature": None, "top_p": None, "top_k": None}  # of the folder, which would be warned about
        ids = self._model.generate(
            **inputs, max_new_tokens=self._max_new_tokens, do_sample=False, num_beams=1, **sampling
        )
        written = ids[0, inputs["input_ids"].shape[1] :]
        ends = self._model.generation_config.eos_token_id
        ended = len(written) < self._max_new_tokens or written[-1].item() in (
            ends if isinstance(ends, list) else [ends]
        )
        text = self._tokenizer.decode(written, skip_special_tokens=True)
        return text if ended else Cut(text)


class Endpoint:
    """A chat model behind an address with OpenAI's interface: ``POST <url>/chat/completions``.

    Args:
        url: such as ``http://127.0.0.1:8000/v1``.
        model: its name there.
        with_key: whether to send the key in the variable `ENDPOINT_KEY`, if there is one.

    Raises:
        InputError: `url` is no address.
    """

    def __init__(self, url: str, model: str, *, with_key: bool) -> None:
        port = re.fullmatch(r"https?:/{2}(?:\[[^\s/@\[\]]+\]|[^\s/@:\[\]]+)(?::(\d{1,5}))?(?:/[^\s?#]*)?", url)
        if port is None or int(port[1] or 1) not in range(1, 2**16):
            raise InputError(f"'{url}' is no address of an endpoint; write it as http://127.0.0.1:8000/v1")
        self.name = f"{model} at {url}"
        self._url, self._model = f"{url.rstrip('/')}/chat/completions", model
        self._key = os.environ.get(ENDPOINT_KEY) if with_key else None

    def answer(self, messages: Sequence[Message]) -> str:
        """Return the answer to a chat.

        Raises:
            InputError: the endpoint refuses the request, which is our user's choice of address, model or key.
            RunError: it cannot be reached, or answers nothing usable.
        """
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        class Patience(Retry):
            def get_retry_after(self, response: Any) -> float | None:
                asked = super().get_retry_after(response)
                return None if asked is None else min(asked, _LONGEST_WAIT)

        # Nobody waits four times for an answer that does not come.
        retry = Patience(
            total=3,
            connect=0,
            read=0,
            backoff_factor=_BACKOFF,
            status_forcelist=_RETRIED,
            allowed_methods=None,
            raise_on_status=False,
        )
        body = {"model": self._model, "messages": list(messages), "temperature": 0, "seed": 0}
        with requests.Session() as session:
            for scheme in ("https://", "http://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            try:
                # A redirect would send prompts elsewhere; without `auth`, a password of ~/.netrc would be sent.
                response = session.post(
                    self._url, json=body, auth=self._authorize, timeout=_TIMEOUT, allow_redirects=False
                )
            except requests.RequestException as error:
                said = f"the endpoint {self._url} cannot be reached: {_network_reason(error)}"
                raise RunError(f"{said}; start it, or correct the address") from error
        said = " ".join(response.text.split())[:300]
        if response.status_code in _RETRIED:
            raise RunError(f"the endpoint {self._url} is busy ({response.status_code}: {said}); try again later")
        if response.status_code != 200:
            cure = f"check address, model and key (the key is read from the variable {ENDPOINT_KEY}"
            raise InputError(
                f"the endpoint {self._url} answers {response.status_code}: {said}; {cure}, and only sent to an "
                "address that was given on the command line)"
            )
        try:
            choice = parse_json(response.content)["choices"][0]
            content, is_cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RunError(f"the endpoint {self._url} answers without choices[0].message.content") from error
        if not isinstance(content, str | None):
            raise RunError(f"the endpoint {self._url} answers with something else than text")
        return Cut(content or "") if is_cut else content or ""

    def _authorize(self, request: Any) -> Any:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _network_reason(error: BaseException) -> str:
    """Return what the system said about a failed connection; libraries wrap it in their own errors."""
    if "read timed out" in str(error).lower():  # libraries tell it as one of many attempts
        return f"no answer within {_TIMEOUT[1]} seconds"
    return _said_by_system(error) or str(error)


def _said_by_system(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    wrapped = [getattr(argument, "reason", argument) for argument in error.args]
    inner = [each for each in (*wrapped, error.__cause__, error.__context__) if isinstance(each, BaseException)]
    return next(filter(None, map(_said_by_system, inner)), "")
