"""Save and load the resume state; a resumed run has the same results as an uninterrupted one.

Beside the weights, a run folder holds the state of the newest checkpoint::

    RUN/latest, RUN/1000/mp_rank_00_model_states.pt      weights in the SAT layout
    RUN/resume/latest                                    iteration of the state; updated last
    RUN/resume/1000/resume.json                          a `ResumePoint`
    RUN/resume/1000/*_states.pt                          trained parameters, optimizer, schedule, loss scaler
    RUN/resume/1000/rng_00.pt                            random generators, one file per rank
"""

import dataclasses
import json
import os
import random
import re
import shutil
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

import sgm.distributed
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, ConfigError, Problem, digest_of
from sgm.io import atomic_file
from sgm.log import get_logger
from sgm.util import InputError
from sgm.weights.checkpoint import write_latest
from sgm.weights.files import WEIGHTS, read_state_file
from sgm.weights.stored import require_weights

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

logger = get_logger(__name__)

FOLDER, LATEST = "resume", "latest"
# Arguments without effect on the results, which may change when a run is resumed.
HARMLESS = frozenset(
    "resume exit_interval save experiment_name save_interval keep_last log_interval num_workers "
    "prefetch_factor max_bad_share max_skipped_steps eval_interval eval_iters eval_batch_size strict_eval "
    "valid_prompts only_log_video_latents wandb wandb_project_name no_load_rng no_save_rng distributed_timeout".split()
)
# Settings that determine the order in which a ZeRO stage stores its state. DeepSpeed does not check the order on load.
ORDER = {1: "round_robin_gradients", 2: "round_robin_gradients", 3: "sub_group_size"}
DEFAULT_ORDER = {"round_robin_gradients": False, "sub_group_size": 1e9}
_CURE = "restore it, or start a new run with args.resume=none (args.load may name the run folder)"


@dataclass(frozen=True)
class ResumePoint:
    """The start or resume position of a run, and the settings that its state depends on.

    Attributes:
        run: the run folder.
        iteration: optimizer steps done.
        samples: training samples seen; without buckets, the number of the next sample.
        world_size: number of ranks.
        zero_stage: ZeRO stage.
        precision: of the network, ``fp16``, ``bf16`` or ``fp32``.
        optimizer: type in the YAML.
        trained: number of trained parameters.
        ema: whether the state holds a moving average.
        base_digest: digest of the initial weights; None for random ones.
        config_digest: see `numbers_digest`.
        clips: digest of the training clips' paths.
        order: see `state_order`; None if unknown.
        files: names of the files in its folder, without ``resume.json``.
        micro_batches: with buckets, micro-batches done, counted once for all ranks; the number of the next one.
        buckets: digest of the division of clips among buckets and ranks; None without buckets.
        plan: digest of the clips' sizes and order; None without buckets.
        tensor: ranks of a tensor-parallel group.
    """

    run: Path
    iteration: int
    samples: int
    world_size: int
    zero_stage: int
    precision: str
    optimizer: str
    trained: int
    ema: bool
    base_digest: str | None
    config_digest: str
    clips: str
    order: float | None = None
    files: tuple[str, ...] = ()
    micro_batches: int = 0
    buckets: str | None = None
    plan: str | None = None
    tensor: int = 1

    @property
    def folder(self) -> Path:
        """Folder of the state."""
        return self.run / FOLDER / str(self.iteration)

    def check(self, now: "ResumePoint") -> None:
        """Check that the state matches the settings of a run, `now`; warn if the results will differ.

        Raises:
            ConfigError: settings differ; says which, and how to fix it.
        """
        cure = "restore the former, or start a new run with args.resume=none (args.load may name the run folder)"
        fixed = {
            "zero_stage": "deepspeed.zero_optimization.stage",
            "precision": "model.precision",
            "optimizer": "deepspeed.optimizer.type",
            "trained": "model.not_trainable_prefixes",
            "ema": "args.ema_decay",
            "base_digest": "args.load",
            "tensor": "args.model_parallel_size",
        }
        if self.zero_stage > 0:  # otherwise every rank holds the whole state
            fixed["world_size"] = "torchrun --nproc_per_node"
        if self.zero_stage == now.zero_stage > 0 and self.order is not None:
            fixed["order"] = f"deepspeed.zero_optimization.{ORDER[self.zero_stage]}"
        problems = []
        for name, path in fixed.items():
            then, given = getattr(self, name), getattr(now, name)
            if then != given:
                words = name.replace("_", " ")
                found = f"the state in {self.folder} was written with {words} {then}, and now it is {given}"
                problems.append(Problem(path, "", found, cure))
        if self.buckets != now.buckets:
            found = (
                f"the state in {self.folder} was written with other buckets, batch sizes or data-parallel ranks, or "
                "without buckets: it counts other micro-batches"
            )
            problems.append(Problem("data.params.buckets", "", found, cure))
        if problems:
            raise ConfigError(problems)
        if self.clips != now.clips:
            logger.warning("the training clips differ from those at the start of %s: its samples change", self.run)
        if self.config_digest != now.config_digest:
            logger.warning("the configuration differs from the one that %s began with; see its config.yaml", self.run)


def state_order(zero: Mapping[str, Any]) -> float | None:
    """Return the value of the setting in `ORDER` from the ``zero_optimization`` section; None at stage 0."""
    name = ORDER.get(zero["stage"])
    return None if name is None else float(zero.get(name, DEFAULT_ORDER[name]))


def numbers_digest(config: Config) -> str:
    """Return the SHA-256 of the configuration without the `HARMLESS` arguments."""
    args = {name: value for name, value in config.merged.get("args", {}).items() if name not in HARMLESS}
    return digest_of({**config.merged, "args": args})


def find_resume_point(args: TrainingArgs) -> ResumePoint | None:
    """Return the newest state of the run selected by ``args.resume``; None for a new run.

    ``auto`` selects the run of this experiment that saved last; a path names a run folder.

    Raises:
        InputError: the folder holds no state, or its files are damaged.
    """
    if args.resume == "none":
        return None
    if args.resume != "auto":
        run = Path(args.resume)
        if not (run / FOLDER / LATEST).is_file():
            raise InputError(
                f"args.resume: {run} holds no {FOLDER}/{LATEST}; name a run folder ({args.save}/"
                f"{args.experiment_name}-...), or use args.load={run} to start a new run from its weights"
            )
        return _read_point(run)
    own = re.compile(re.escape(args.experiment_name) + r"(-\d\d){4}(-\d+)?").fullmatch
    saved = [path for path in Path(args.save).glob(f"*/{FOLDER}/{LATEST}") if own(path.parents[1].name)]
    return _read_point(max(saved, key=lambda path: (path.stat().st_mtime_ns, str(path))).parents[1]) if saved else None


def repair_latest(point: ResumePoint) -> None:
    """Set ``latest`` to the weights of the state, in case a process was killed between the two writes."""
    if has_weights(point):
        write_latest(point.run, point.iteration)


def has_weights(point: ResumePoint) -> bool:
    """Whether the run folder holds the weights of the state; somebody may have removed them."""
    return any((point.run / str(point.iteration)).glob(f"{WEIGHTS}.*"))


def require_weights_of(point: ResumePoint) -> None:
    """Raise InputError if the weights of a finished run were removed."""
    if not has_weights(point):
        raise InputError(
            f"{point.run} has the state of iteration {point.iteration}, its last, but its weights were removed: "
            f"{point.run / str(point.iteration)} is missing or empty. Write them from the state: python "
            f"tools/convert_weight_deepspeed2hf.py --checkpoint_path {point.folder} --to sat --output_path <folder>. "
            "Or restore them, or start a new run with args.resume=none"
        )


def lock_folder(run: Path) -> IO[str] | None:
    """Lock `run` against other processes until the returned file is closed or this process ends.

    A killed launcher may leave its workers running. If the file system has no locks, only warn.

    Raises:
        InputError: another process holds the lock.
    """
    if fcntl is None:
        return None
    file = (run / ".lock").open("a+", encoding="utf-8")
    # Close the file in forked workers, which would keep the lock. Weakly referenced, so that dropping it closes it.
    held = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: (here := held()) is not None and here.close())
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise InputError(
            f"{run} is in use by process {owner} (a launcher that was killed may have left it); end that process, or "
            "use another folder: args.resume=none starts a new run"
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s); see that no other process works there", run, error)
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _read_point(run: Path) -> ResumePoint:
    path = run / FOLDER / LATEST
    try:
        iteration = int(path.read_text(encoding="utf-8"))
        path = run / FOLDER / str(iteration) / "resume.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        if (digest := content.pop("digest", None)) is not None and digest != digest_of(content):
            raise ValueError("it was changed after it was written (its digest differs)")
        return ResumePoint(run=run, **{**content, "files": tuple(content["files"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"the resume state cannot be read: {path}: {error}; restore the file, or use args.resume=none"
        ) from error


def save_state(engine: Any, point: ResumePoint, *, with_rng: bool = True) -> None:
    """Write the state of all ranks, update ``latest``, remove older states. Collective: all ranks call it.

    Raises:
        RunError: the files cannot be written; the previous state is kept.
    """
    folder, rank = point.folder, sgm.distributed.rank()
    engine.checkpoint_engine = checkpoint_engine()
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True)
    if with_rng:
        with atomic_file(folder / f"rng_{rank:02d}.pt") as temporary:
            torch.save(_rng_state(), temporary)
    sgm.distributed.barrier()
    if rank == 0:
        point = dataclasses.replace(point, files=tuple(sorted(path.name for path in folder.iterdir())))
        content = {name: value for name, value in dataclasses.asdict(point).items() if name != "run"}
        content["digest"] = digest_of(content)
        with atomic_file(folder / "resume.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with atomic_file(folder.parent / LATEST) as temporary:
            temporary.write_text(f"{point.iteration}\n", encoding="utf-8")
        remove_other_states(point.run, point.iteration)
    sgm.distributed.barrier()


def remove_other_states(run: Path, iteration: int) -> None:
    """Remove all states of `run` except that of `iteration`, incomplete ones included."""
    for other in (run / FOLDER).iterdir():
        if other.is_dir() and other.name != str(iteration):
            shutil.rmtree(other)


def load_state(engine: Any, point: ResumePoint, *, with_rng: bool = True) -> None:
    """Load the state into a new DeepSpeed engine. Collective: all ranks call it.

    Raises:
        InputError: a file is missing or damaged.
    """
    missing = [name for name in point.files if not (point.folder / name).is_file()]
    if missing:
        raise InputError(f"{point.folder} lacks {', '.join(missing)}; {_CURE}")
    engine.checkpoint_engine = checkpoint_engine()
    engine.load_checkpoint(str(point.folder.parent), tag=point.folder.name, load_module_strict=False)
    # Loading the optimizer restored the learning rates of the earlier configuration; set the current ones.
    engine.lr_scheduler.load_state_dict(engine.lr_scheduler.state_dict())
    rank = sgm.distributed.rank()
    if with_rng and rank < point.world_size:  # additional ranks keep their fresh generators
        _restore_rng(_load(point.folder / f"rng_{rank:02d}.pt", torch.device("cpu")))


def _load(path: Path, map_location: Any) -> Any:
    """Load a file of the state with ``weights_only``; all its bytes are checked."""
    try:
        content = read_state_file(path, map_location, cure=_CURE)
        require_weights(path, _weights_of(content), cure=_CURE)
    except InputError as error:
        raise InputError(f"the resume state cannot be used: {error}") from error
    return content


def _weights_of(content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights in a file of DeepSpeed: those of the module, and the float32 masters."""
    state = content.get("optimizer_state_dict") or content.get("optimizer") or {}
    yield from (content.get("module") or {}).items()
    for key in ("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups_flat"):
        for index, part in enumerate(state.get(key) or ()):
            parts = part if isinstance(part, list | tuple) else [part]
            yield from ((f"{key}[{index}]", tensor) for tensor in parts if isinstance(tensor, torch.Tensor))


def _rng_state() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def _restore_rng(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "accelerator" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["accelerator"])


def checkpoint_engine() -> Any:
    """Return a DeepSpeed checkpoint engine that writes files atomically and reads them with ``weights_only``."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class SafeCheckpointEngine(TorchCheckpointEngine):
        def save(self, state_dict: Any, path: str) -> None:
            with atomic_file(path) as temporary:
                torch.save(state_dict, temporary)

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
                return _load(Path(path), map_location)

    return SafeCheckpointEngine()
