"""Instantiation from YAML, import and memory helpers, small tensor helpers, and the user-facing error classes."""

import importlib
import importlib.util
import inspect
import os
import re
import resource
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sgm.config.refused import refused_by
from sgm.log import quiet_dependencies

_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor, torch.rand, torch.randn}

_FILLS = {torch.Tensor.normal_, torch.Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}

# Where the classes come from that YAML may name; `Target` adds to them.
PROJECT = ("sgm", "vae_modules", "dit_video_concat", "data_video")
LIBRARIES = ("torch.nn", "torch.optim", "sat", "transformers", "diffusers", "torchao", "bitsandbytes")
LIBRARIES += ("came_pytorch", "prodigyopt", "schedulefree")  # optimizers

# Classes of SAT that files of released models name → this project's, which take their parameters and more.
_EXTENDED = {"sat.model.finetune.lora2.LoraMixin": "sgm.modules.lora.AdapterMixin"}

_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # U+0000, and halves of pairs of UTF-16

# Names of dtypes in YAML files.
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class InputError(ValueError):
    """The user's input is wrong: a YAML key, a file, a prompt. Commands end with exit code 2.

    The message says what was found, where, what was expected, and the cure.
    """

    exit_code = 2


class RunError(RuntimeError):
    """The work itself failed (disk full, non-finite values). Commands end with exit code 1."""

    exit_code = 1


def no_character(text: str) -> str:
    """Return what in `text` is no character, and where; empty if all are. Only other data than text holds it."""
    found = _NO_TEXT.search(text)
    return f"U+{ord(found[0]):04X} at position {found.start() + 1}, which is no character" if found else ""


class Target(str):
    """The target of a section, with packages that the user trusts besides: ``--trust`` of the command line.

    Files hold plain text, and so cannot grant trust.
    """

    trust: tuple[str, ...]

    def __new__(cls, text: str, trust: Sequence[str] = ()) -> "Target":
        """Return `text` with packages."""
        target = super().__new__(cls, text)
        target.trust = tuple(trust)
        return target


def require_packages(trust: Sequence[str]) -> None:
    """Raise InputError if there is no package or module of a name in ``--trust``."""
    for package in trust:
        if not _is_importable(package):
            raise InputError(f"--trust {package}: there is no such package or module; give a name as 'import' takes it")


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # no such parent; no name at all
        return False


def is_trusted(module: str, trust: Sequence[str] = ()) -> bool:
    """Whether YAML may name classes of this module; `trust`: packages that the user trusts besides."""
    return any(module == root or module.startswith(f"{root}.") for root in (*PROJECT, *LIBRARIES, *trust))


def get_obj_from_str(target: Any) -> type:
    """Import the class that a YAML ``target:`` names, for example ``torch.nn.Identity``.

    Importing a module runs it, and a function may do anything. So only a class is returned, and nothing is imported,
    unless the module is trusted: by this project (`PROJECT`, `LIBRARIES`), or by the user (`Target`).

    Raises:
        InputError: the target is not trusted or no class, or does not exist, with the nearest name if there is one.
    """
    target = _EXTENDED.get(str(target), target)
    module_name, _, name = str(target).rpartition(".")
    if not (module_name and all(part.isidentifier() for part in str(target).split("."))):
        raise InputError(f"target '{target}' is not a dotted path; write it as module.Class, e.g. torch.nn.Identity")
    absent = (
        f"target '{target}' names the module '{module_name}', which does not exist; correct the dotted path, or "
        "install the package that holds it"
    )
    if not _is_importable(module_name.partition(".")[0]):  # known without importing anything
        raise InputError(absent)
    _require_trusted(target, module_name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise InputError(absent) from error
        raise
    try:
        found = getattr(module, name)
    except AttributeError as error:
        hint = nearest(name, [n for n, value in vars(module).items() if inspect.isclass(value)])
        raise InputError(f"target '{target}': module '{module_name}' has no '{name}'{hint}") from error
    if not inspect.isclass(found):
        raise InputError(f"target '{target}' is not a class; YAML names classes only")
    _require_trusted(target, found.__module__)  # it may be imported there from elsewhere
    return found


def _require_trusted(target: Any, module: str) -> None:
    if is_trusted(module, getattr(target, "trust", ())):
        return
    origin = "" if str(target).startswith(f"{module}.") else f" is defined in '{module}', which"
    root = module.partition(".")[0]
    cure = f"; if you know this code and let the files run it, add --trust {root} to the command"
    raise InputError(
        f"target '{target}'{origin} is not trusted: YAML may name classes of {', '.join((*PROJECT, *LIBRARIES))}"
        f"{'' if root in sys.stdlib_module_names else cure}"
    )


class _LazyPackage(types.ModuleType):
    """A package whose ``__init__`` runs on first access to an attribute that is not a submodule."""

    def __getattr__(self, name: str) -> Any:
        spec: Any = self.__spec__
        if name.startswith("__") or type(self) is not _LazyPackage:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
            return importlib.import_module(f"{self.__name__}.{name}")
        object.__setattr__(self, "__class__", types.ModuleType)
        spec.loader.exec_module(self)
        return getattr(self, name)


def defer_package_init(name: str) -> None:
    """Defer the ``__init__`` of a package until it is needed; submodules can be imported before.

    SAT's imports all its models, and transformers, datasets and wandb: several seconds.

    Args:
        name: package name; no effect if already imported.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:  # the import reports it
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _LazyPackage
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build the object of a ``{target: ..., params: {...}}`` section.

    Args:
        config: a section with ``target`` (dotted path of a class) and, optionally, ``params``.
        **extra: further keyword arguments, from the caller.

    Raises:
        InputError: the section has no target, its class is not trusted, or it does not accept a parameter or its value.
    """
    if not isinstance(config, Mapping) or "target" not in config:
        raise InputError(f"expected a section with 'target:' (and 'params:'), got {config!r}")
    cls = get_obj_from_str(config["target"])
    params = without_ineffective(cls, config.get("params") or {}) | extra
    try:
        inspect.signature(cls).bind(**params)
    except TypeError as error:
        raise InputError(f"{config['target']}: {error}; see the parameters of that class") from error
    try:
        return cls(**params)
    except InputError:
        raise
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:  # not those of the machine
        raise InputError(f"{config['target']} cannot be built with these parameters: {error}") from error


def without_ineffective(cls: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return `params` without those that have no effect: ``IGNORED_PARAMS`` and `sgm.config.refused`.

    Raises:
        InputError: a parameter requests an unsupported feature.
    """
    ignored, refused = getattr(cls, "IGNORED_PARAMS", {}), refused_by(cls)
    for name, value in params.items():
        if name in refused and (problem := refused[name].misfit(value)):
            raise InputError(f"{cls.__name__}: {name} {problem[0]}; {problem[1]}")
    return {name: value for name, value in params.items() if name not in ignored and name not in refused}


def prepare_import() -> None:
    """Call before SAT or DeepSpeed is imported: choose DeepSpeed's device as torch does, and keep both quiet."""
    quiet_dependencies()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if accelerator is None else accelerator.type)
    for package in ("sat", "sat.model"):
        defer_package_init(package)
    if "bitsandbytes" not in sys.modules:
        # SAT's adapters import it, and with it torch's compiler, for layers that are not used here.
        sys.modules["bitsandbytes"] = None  # pyright: ignore[reportArgumentType] (Python's way to hide a module)
        importlib.import_module("sat.model.finetune.lora2")
        del sys.modules["bitsandbytes"]


class _NoCompiler(types.ModuleType):
    """Stands for ``torch._dynamo`` while nothing is compiled: what is excluded from compiling runs as it is.

    Anything else asked of it loads torch's compiler.
    """

    def __init__(self) -> None:
        super().__init__("torch._dynamo")
        self.excluded: list[Any] = []

    def disable(self, function: Any, *_: Any, **__: Any) -> Any:
        self.excluded.append(function)
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Context in which nothing is compiled, and torch's compiler is not loaded, which takes longer than a dry run.

    Torch's optimizers, and its operators on meta tensors, load it only to be excluded from compiling.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    sys.modules["torch._dynamo"] = stand_in = _NoCompiler()
    try:
        yield
    finally:
        if sys.modules.get("torch._dynamo") is stand_in:
            del sys.modules["torch._dynamo"]
        for function in stand_in.excluded:  # where torch keeps what `disable` returned
            vars(function).pop("__dynamo_disable", None)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on an accelerator, or resident in this process on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    try:
        # Not getrusage: there a process inherits the peak of its parent.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):  # not Linux
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class without_allocating(TorchFunctionMode):  # noqa: N801 (used as a context manager)
    """Context in which modules are built on the meta device: shapes and dtypes, no memory, no initialisation.

    ``torch.device("meta")`` as a context is overridden by an explicit device, and SAT's layers name the CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES:
            kwargs["device"] = "meta"
        if func in _FILLS:  # torch would import its compiler (seconds) to fill a meta tensor
            filled = args[0] if args else kwargs["tensor"]
            return filled if filled.is_meta else func(*args, **kwargs)
        return func(*args, **kwargs)


def nearest(name: str, known: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to `name`, or ``""``."""
    import difflib

    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""


def nearest_path(path: str | Path) -> str:
    """Return ``"; did you mean 'x'?"`` for what is on disk and closest to a missing `path`, or ``""``.

    A symbolic link that leads nowhere, or to itself, is named as that, and so is a folder in the
    place of a file, or the other way round.
    """
    import difflib

    missing, here = Path(path), Path(Path(path).anchor)
    if os.path.exists(missing):  # of a name of any length
        return f": it is a {'folder' if missing.is_dir() else 'file'}"
    if missing.is_symlink():
        return f": it is a symbolic link to {os.readlink(missing)}, which leads nowhere"
    for part in missing.parts[bool(missing.anchor) :]:
        try:
            names = [part] if (here / part).exists() else os.listdir(here)
        except OSError:
            return ""
        if not (found := difflib.get_close_matches(part, names, n=1, cutoff=0.6)):
            return ""
        here /= found[0]
    return f"; did you mean '{here}'?"


def append_dims(x: torch.Tensor, ndim: int) -> torch.Tensor:
    """Append axes of length 1 to `x` until it has `ndim` axes."""
    if x.ndim > ndim:
        raise ValueError(f"cannot view a tensor of {x.ndim} axes as one of {ndim}")
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `x` on `device`; the host does not wait for the copy, since it is made from pinned memory."""
    if x.device.type != "cpu" or device.type == "cpu":
        return x.to(device)
    if torch.accelerator.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def default(value: Any, fallback: Any) -> Any:
    """Return `value`, or `fallback` where `value` is None."""
    return fallback if value is None else value
