"""What a training run needs to go on as if it had never stopped.

Beside the weights, which are for use, a run folder holds the state of the newest save::

    RUN/latest, RUN/1000/mp_rank_00_model_states.pt      weights in the SAT layout
    RUN/resume/latest                                    the iteration to go on from; moves last
    RUN/resume/1000/resume.json                          what the state fits to, see `ResumePoint`
    RUN/resume/1000/*_states.pt                          trained parameters, optimizer, schedule, loss scaler
    RUN/resume/1000/rng_00.pt                            random generators, one file a process
"""

import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import weakref
from collections.abc import Mapping
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

try:
    import fcntl
except ImportError:  # another system than POSIX
    fcntl = None

logger = get_logger(__name__)

FOLDER, LATEST = "resume", "latest"
# Arguments that may change from one start of a run to the next.
HARMLESS = frozenset(
    "resume exit_interval save experiment_name save_interval keep_last log_interval num_workers "
    "prefetch_factor max_bad_share max_skipped_steps eval_interval eval_iters eval_batch_size strict_eval "
    "valid_prompts only_log_video_latents wandb wandb_project_name no_load_rng no_save_rng distributed_timeout".split()
)
# DeepSpeed loads a state that was stored in another order without a word, or fails; with its defaults.
ORDER = {1: "round_robin_gradients", 2: "round_robin_gradients", 3: "sub_group_size"}
DEFAULT_ORDER = {"round_robin_gradients": False, "sub_group_size": 1e9}
_CURE = "restore it, or start anew with args.resume=none (args.load may name the run folder)"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on.

    Attributes:
        run: the run folder.
        iteration: optimizer steps done.
        samples: training samples seen; without buckets, the number of the next one.
        micro_batches: with buckets, those of all ranks together that were taken, the number of the next one.
        buckets: digest of how clips are divided among buckets and ranks, None without buckets.
        plan: digest of the clips' sizes and of their order, None without buckets.
        world_size: processes that wrote the state; how many of them share the tokens of a sample does not matter.
        tensor: how many of them share layers.
        zero_stage: ZeRO stage that wrote it.
        precision: of the network, ``fp16``, ``bf16`` or ``fp32``.
        optimizer: the optimizer's class.
        trained: how many numbers are trained.
        ema: whether the state holds a moving average.
        base_digest: digest of the weights that the run started from, None from random ones.
        config_digest: digest of what the numbers depend on in the configuration, see `numbers_digest`.
        clips: digest of the training clips' paths.
        order: the setting that decides in which order ZeRO stores the state, see `state_order`; None if unknown.
        files: names of the files in its folder, this description excepted.
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
        """The folder of this state."""
        return self.run / FOLDER / str(self.iteration)

    def check(self, now: "ResumePoint") -> None:
        """Hold the state against what the configuration would train now.

        Raises:
            ConfigError: it does not fit; says what differs and what to do.
        """
        fixed = {
            "zero_stage": "deepspeed.zero_optimization.stage",
            "precision": "model.precision",
            "optimizer": "deepspeed.optimizer.type",
            "trained": "model.not_trainable_prefixes",
            "ema": "args.ema_decay",
            "base_digest": "args.load",
            "tensor": "args.model_parallel_size",
        }
        if self.zero_stage > 0:  # every rank holds the whole state otherwise
            fixed["world_size"] = "torchrun --nproc_per_node"
        if self.zero_stage == now.zero_stage > 0 and self.order is not None:
            fixed["order"] = f"deepspeed.zero_optimization.{ORDER[self.zero_stage]}"
        problems = []
        for name, path in fixed.items():
            then, given = getattr(self, name), getattr(now, name)
            if then != given:
                words = name.replace("_", " ")
                found = f"the state in {self.folder} was written with {words} {then}, and now it is {given}"
                cure = "go on with the former, or start anew with args.resume=none (args.load may name the run folder)"
                problems.append(Problem(path, "", found, cure))
        if self.buckets != now.buckets:
            found = (
                f"the state in {self.folder} was written with other buckets, batch sizes or ranks with clips of their"
            )
            found += " own, or without buckets: the micro-batches that it counts are not those of now"
            cure = "go on with the former, or start anew with args.resume=none (args.load may name the run folder)"
            problems.append(Problem("data.params.buckets", "", found, cure))
        if problems:
            raise ConfigError(problems)
        if self.clips != now.clips:
            logger.warning("the training clips are not those that %s began with: other samples follow", self.run)
        if self.config_digest != now.config_digest:
            logger.warning("the configuration differs from the one that %s began with; see its config.yaml", self.run)


def state_order(zero: Mapping[str, Any]) -> float | None:
    """Return the value of the setting that decides in which order the state is stored, None without ZeRO.

    Args:
        zero: the ``zero_optimization`` section.
    """
    name = ORDER.get(zero["stage"])
    return None if name is None else float(zero.get(name, DEFAULT_ORDER[name]))


def numbers_digest(config: Config) -> str:
    """SHA-256 of the configuration without what may change from one start to the next and leaves the numbers alone."""
    args = {name: value for name, value in config.merged.get("args", {}).items() if name not in HARMLESS}
    return digest_of({**config.merged, "args": args})


def find_resume_point(args: TrainingArgs) -> ResumePoint | None:
    """Return where ``args.resume`` says to go on, None for a new run.

    ``auto`` takes the run of this experiment that saved last; a path names a run folder.

    Raises:
        InputError: the path holds no state, or its files are damaged.
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
    """Let the run's ``latest`` name the weights of the state: a process may have ended between the two."""
    if (point.run / str(point.iteration)).is_dir():
        write_latest(point.run, point.iteration)


def lock_folder(run: Path) -> IO[str] | None:
    """Keep other processes from working in `run` until the returned file is closed, or this process ends.

    A launcher that is killed may leave its workers running. File systems without locks go unguarded.

    Raises:
        InputError: another process works there.
    """
    if fcntl is None:
        return None
    file = (run / ".lock").open("a+", encoding="utf-8")
    # Else the lock lasts as long as a worker that outlives this process. Weakly: a file that nobody holds is closed.
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
        return ResumePoint(run=run, **{**content, "files": tuple(content["files"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"the resume state cannot be read: {path}: {error}; restore the file, or start anew with args.resume=none"
        ) from error


def save_state(engine: Any, point: ResumePoint, *, with_rng: bool = True) -> None:
    """Write the state of all ranks, then let ``latest`` name it, then remove older states.

    Args:
        engine: the DeepSpeed engine; all ranks call together.
        point: where the run is.
        with_rng: write the generators too.

    Raises:
        RunError: the disk is full or the folder cannot be written to; the former state stays.
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
        with atomic_file(folder / "resume.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with atomic_file(folder.parent / LATEST) as temporary:
            temporary.write_text(f"{point.iteration}\n", encoding="utf-8")
        remove_other_states(point.run, point.iteration)
    sgm.distributed.barrier()


def remove_other_states(run: Path, iteration: int) -> None:
    """Remove the states of `run` that ``latest`` does not name: older ones, and one that was being written."""
    for other in (run / FOLDER).iterdir():
        if other.is_dir() and other.name != str(iteration):
            shutil.rmtree(other)


def load_state(engine: Any, point: ResumePoint, *, with_rng: bool = True) -> None:
    """Put the state into a fresh DeepSpeed engine; all ranks call together.

    Raises:
        InputError: a file is missing or damaged.
    """
    missing = [name for name in point.files if not (point.folder / name).is_file()]
    if missing:
        raise InputError(f"{point.folder} lacks {', '.join(missing)}; {_CURE}")
    engine.checkpoint_engine = checkpoint_engine()
    engine.load_checkpoint(str(point.folder.parent), tag=point.folder.name, load_module_strict=False)
    # The learning rates of the present configuration, not those that the optimizer's state brought along.
    engine.lr_scheduler.load_state_dict(engine.lr_scheduler.state_dict())
    rank = sgm.distributed.rank()
    if with_rng and rank < point.world_size:  # ranks that there were not before draw anew
        _restore_rng(_load(point.folder / f"rng_{rank:02d}.pt", torch.device("cpu")))


def _load(path: Path, map_location: Any) -> Any:
    """Read a file of the state, without running what is in it."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise InputError(f"the resume state {path} is missing or damaged: {reason}; {_CURE}") from error


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
    """Return what DeepSpeed writes and reads its files with: atomically, and without running what is in them."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class SafeCheckpointEngine(CheckpointEngine):
        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            with atomic_file(path) as temporary:
                torch.save(state_dict, temporary)

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
                return _load(Path(path), map_location)

        def commit(self, info: Any) -> bool:
            return True

    return SafeCheckpointEngine()
