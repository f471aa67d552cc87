"""Save and load the resume state; a resumed run has the same results as an uninterrupted one.

Beside the weights, a run folder holds the state of the newest checkpoint::

    RUN/latest, RUN/1000/mp_rank_00_model_states.pt      weights in the SAT layout
    RUN/resume/latest                                    iteration of the state; updated last
    RUN/resume/1000/resume.json                          a `ResumePoint`; written last, so its folder is complete
    RUN/resume/1000/*_states.pt                          trained parameters, optimizer, schedule, loss scaler
    RUN/resume/1000/rng_00.pt                            random generators, one file per rank
"""

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, get_type_hints

import torch
import yaml
from pydantic import FiniteFloat

import sgm.distributed
from sgm.config.args import AtLeast0, AtLeast1, TrainingArgs
from sgm.config.load import Config, ConfigError, Problem, digest_of
from sgm.config.values import misfit, spelled
from sgm.io import LOCK, atomic_file, parse_json, reason_of, refusing_denied, try_lock_folder, write_json
from sgm.log import get_logger, warn_once
from sgm.training.optim.optimizer import kind_of, settings_kept
from sgm.training.repartition import CURE, SavedState, load_repartitioned
from sgm.training.state_files import (
    checkpoint_engine,
    read_checked,
    read_mapped,
    restore_rng,
    rng_state,
    write_state_file,
)
from sgm.util import InputError
from sgm.weights.adapters import read_adapter_info
from sgm.weights.checkpoint import write_latest
from sgm.weights.files import WEIGHTS
from sgm.weights.partition import Shard

logger = get_logger(__name__)

FOLDER, LATEST = "resume", "latest"
# Arguments without effect on the results, which may change when a run is resumed.
HARMLESS = frozenset(
    "resume exit_interval save experiment_name save_interval keep_last keep_best log_interval num_workers "
    "prefetch_factor remote_cache remote_cache_gb remote_retries max_bad_share max_skipped_steps "
    "eval_interval eval_iters eval_batch_size strict_eval "
    "eval_measures eval_lpips eval_clip "
    "valid_prompts only_log_video_latents precompute async_save wandb wandb_project_name no_load_rng no_save_rng "
    "distributed_timeout peak_tflops stop_exit_code".split()
)
# Settings that determine the order in which a ZeRO stage stores its state, which DeepSpeed does not check on load.
ORDER = {1: "round_robin_gradients", 2: "round_robin_gradients", 3: "sub_group_size"}
DEFAULT_ORDER = {"round_robin_gradients": False, "sub_group_size": 1e9}
# Where a configuration says what is trained: without adapters, and with them.
_TRAINED, _LORA = "model.not_trainable_prefixes", "model.network_config.params.modules.lora_config.params"
_RNG = re.compile(r"rng_\d+\.pt")
_SHOWN = 12  # changed settings that a message lists
# Settings of optimizers that decide which tensors their state holds; all others take effect when a run is resumed.
STRUCTURE = ("amsgrad", "centered", "momentum")


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
        trained_names: digest of their names; None if unknown.
        ema: whether the state holds a moving average.
        base_digest: digest of the initial weights; None for random ones.
        config_digest: see `numbers_digest`.
        clips: digest of the training clips' paths.
        captions: digest of their captions; None if unknown.
        clip_files: digest of the sizes and times of their files; None if unknown.
        order: see `state_order`; None if unknown.
        files: names of the files in its folder, without ``resume.json``.
        micro_batches: with buckets, micro-batches done, counted once for all ranks; the number of the next one.
        buckets: digest of the division of clips among buckets and ranks; None without buckets.
        plan: digest of the clips' sizes and order; None without buckets.
        tensor: ranks of a tensor-parallel group.
        optimizer_settings: all settings of the optimizer, defaults included; None if unknown.
        lora_rank: rank of the adapters; None without or if unknown.
        lora_alpha: their alpha; None without or if unknown.
        lora_kind: their method; None without or if unknown.
        global_batch: samples of an iteration; None with buckets or if unknown.
        timesteps: state of a sampler of timesteps that has one, `LossMoments`; None without or if unknown.
        start_number: of the start that saved it: above those of all earlier starts of its experiment, so that the run
            that was started or resumed last is known without file times, which copies and clocks change.
    """

    run: Path
    iteration: AtLeast0
    samples: AtLeast0
    world_size: AtLeast1
    zero_stage: AtLeast0
    precision: str
    optimizer: str
    trained: AtLeast0
    ema: bool
    base_digest: str | None
    config_digest: str
    clips: str
    order: FiniteFloat | None = None
    files: tuple[str, ...] = ()
    micro_batches: AtLeast0 = 0
    buckets: str | None = None
    plan: str | None = None
    tensor: AtLeast1 = 1
    captions: str | None = None
    clip_files: str | None = None
    optimizer_settings: dict[str, Any] | None = None
    lora_rank: AtLeast0 | None = None
    lora_alpha: FiniteFloat | None = None
    lora_kind: str | None = None
    start_number: AtLeast0 = 0
    global_batch: AtLeast1 | None = None
    timesteps: dict[str, Any] | None = None
    trained_names: str | None = None

    @property
    def folder(self) -> Path:
        """Folder of the state."""
        return self.run / FOLDER / str(self.iteration)

    def check(self, now: "ResumePoint", config: Config | None = None) -> None:
        """Check that the state matches the settings of a run, `now`; warn if the results will differ.

        Args:
            now: the start of the run as it would be new.
            config: of the run, to name what changed.

        Raises:
            ConfigError: settings differ; says which, and how to fix it.
        """
        cure = "restore the former, or start a new run with args.resume=none (args.load may name the run folder)"
        says_trained = _TRAINED if self.lora_rank is None else _LORA
        fixed = {
            "zero_stage": "deepspeed.zero_optimization.stage",
            "precision": "model.precision",
            "optimizer": "deepspeed.optimizer.type",
            "trained": says_trained,
            "ema": "args.ema_decay",
            "base_digest": "args.load",
        }
        if self.tensor != now.tensor:
            del fixed["trained"]  # those of a shard; names and shapes are compared when the state is loaded
        if None not in (self.lora_rank, now.lora_rank) and self.lora_rank != now.lora_rank:
            fixed["lora_rank"] = f"{_LORA}.r"
            fixed.pop("trained", None)  # differs with the rank
        if None not in (self.lora_kind, now.lora_kind) and self.lora_kind != now.lora_kind:
            fixed["lora_kind"] = f"{_LORA}.kind"
            fixed.pop("trained", None)
        changes = [
            (path, name.replace("_", " "), getattr(self, name), getattr(now, name)) for name, path in fixed.items()
        ]
        if None not in (self.alpha, now.lora_alpha):
            changes.append((f"{_LORA}.lora_alpha", "lora alpha", self.alpha, now.lora_alpha))
        if self.optimizer == now.optimizer:
            then, given = self.optimizer_settings or {}, now.optimizer_settings or {}
            shared = [name for name in STRUCTURE if name in then and name in given]
            # Prodigy has one group of parameters without it, and two with it, where vectors are trained too.
            if kind_of(now.optimizer).sums and now.lora_kind not in ("lora", "lokr") and then and given:
                shared += ["weight_decay"] * (bool(then["weight_decay"]) != bool(given["weight_decay"]))
            changes += [(f"deepspeed.optimizer.params.{name}", name, then[name], given[name]) for name in shared]
        problems = [
            Problem(
                path, "", f"the state in {self.folder} was written with {words} {then}, and now it is {given}", cure
            )
            for path, words, then, given in changes
            if then != given
        ]
        names = self.trained_names, now.trained_names
        if not problems and None not in names and names[0] != names[1]:
            found = f"the state in {self.folder} is that of other parameters than those that would be trained now"
            problems.append(Problem(says_trained, "", found, cure))
        if self.buckets != now.buckets:
            found = (
                f"the state in {self.folder} was written with other buckets, batch sizes or data-parallel ranks, or "
                f"without buckets: it counts other micro-batches; {self.ranks_as_text} wrote it"
            )
            problems.append(Problem("data.params.buckets", "", found, cure))
        if problems:
            raise ConfigError(problems if config is None else self._with_changes(problems, says_trained, config))
        self._warn(now, config)

    def _with_changes(self, problems: Sequence[Problem], says_trained: str, config: Config) -> list[Problem]:
        """Name the settings that changed in problems of what is trained, which several of them decide."""
        changed = [line for line in changed_settings(self.run, config) if line.startswith(says_trained)]
        listing = f" ({'; '.join(changed[:_SHOWN])})" if changed else ""
        return config.located(
            [
                replace(problem, found=problem.found + listing) if problem.path.startswith(says_trained) else problem
                for problem in problems
            ]
        )

    def is_divided_like(self, now: "ResumePoint") -> bool:
        """Whether every rank of a run, `now`, finds its state in files of its own."""
        if self.tensor != now.tensor:
            return False
        same = self.world_size == now.world_size and self.order in (None, now.order)
        return same or self.zero_stage == 0  # where every rank holds everything

    @property
    def ranks_as_text(self) -> str:
        """Number of ranks, and of tensor parallel ones among them."""
        return f"{self.world_size} rank{'s' * (self.world_size > 1)}" + (
            f" ({self.tensor} tensor parallel)" if self.tensor > 1 else ""
        )

    def open(self) -> SavedState:
        """Return the state as one that any number of ranks can load."""
        files = self.files or [path.name for path in self.folder.iterdir()]  # early versions did not list them
        return SavedState(self.folder, files, stage=self.zero_stage, size=self.tensor, read=read_mapped)

    @property
    def alpha(self) -> float | None:
        """Alpha of the adapters; states of earlier versions do not hold it, their weights do. None if unknown."""
        if self.lora_alpha is not None:
            return self.lora_alpha
        try:
            info = read_adapter_info(self.run / str(self.iteration))
        except InputError:  # removed or damaged weights; the state alone is enough to resume
            return None
        return None if info is None else info.alpha

    def _warn(self, now: "ResumePoint", config: Config | None) -> None:
        """Warn if clips or settings differ, so that the results will."""
        found = []
        if self.clips != now.clips:
            found.append(f"the training clips differ from those at the start of {self.run}: other samples follow")
        elif self.captions not in (None, now.captions):
            found.append(f"the captions are not those at the start of {self.run}: other samples follow")
        if (
            self.clips == now.clips
            and None not in (self.clip_files, now.clip_files)
            and self.clip_files != now.clip_files
        ):
            found.append(
                f"the files of the training clips are not those at the start of {self.run} (size or time): replaced "
                "clips give other samples"
            )
        if self.config_digest != now.config_digest:
            changed = [] if config is None else changed_settings(self.run, config)
            more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            listing = f": {'; '.join(changed[:_SHOWN])}{more}" if changed else ""
            found.append(f"the configuration differs from config.yaml, with which {self.run} began{listing}")
        if not self.has_weights():
            found.append(
                f"the weights of iteration {self.iteration} were removed from {self.run}; the run goes on from the "
                "resume state, and its next save writes weights again"
            )
        warn_once(logger, found)

    def has_weights(self) -> bool:
        """Return whether the weights of the state's iteration are there; somebody may have removed them."""
        return any((self.run / str(self.iteration)).glob(f"{WEIGHTS}.*"))

    def require_weights(self) -> None:
        """Check that a run with all its iterations has its weights.

        Raises:
            InputError: it has none.
        """
        if not self.has_weights():
            raise InputError(
                f"{self.run} has all {self.iteration} iterations, but its weights were removed: "
                f"{self.run / str(self.iteration)} is missing or empty. Write them from the state: python "
                f"tools/convert_weight_deepspeed2hf.py --checkpoint_path {self.folder} --to sat --output_path "
                "<folder>. Or restore them, raise args.train_iters to go on from the state, or start a new run with "
                "args.resume=none"
            )


def state_order(zero: Mapping[str, Any]) -> float | None:
    """Return the value of the setting in `ORDER` from the ``zero_optimization`` section; None at stage 0."""
    name = ORDER.get(zero["stage"])
    return None if name is None else float(zero.get(name, DEFAULT_ORDER[name]))


def numbers_digest(config: Config) -> str:
    """Return the SHA-256 of the configuration without the `HARMLESS` arguments."""
    args = {name: value for name, value in config.merged.get("args", {}).items() if name not in HARMLESS}
    return digest_of({**config.merged, "args": args})


def changed_settings(run: Path, config: Config) -> list[str]:
    """Return what differs from the ``config.yaml`` of a run, without the `HARMLESS` arguments; empty if it is gone."""
    try:
        then, now = (
            _leaves(yaml.safe_load(text))
            for text in ((run / "config.yaml").read_text(encoding="utf-8"), config.to_yaml())
        )
    except (OSError, ValueError, yaml.YAMLError):
        return []
    harmless = {f"args.{name}" for name in HARMLESS}

    def said(values: Mapping[str, Any], name: str) -> str:
        return spelled(values[name], 40) if name in values else "not given"

    return [
        f"{name} was {said(then, name)} and is {said(now, name)}"
        for name in {**then, **now}
        if (name in then, then.get(name)) != (name in now, now.get(name)) and name not in harmless
    ]


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values of a tree by their dotted paths."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    return {key: leaf for name in value for key, leaf in _leaves(value[name], f"{path}.{name}".lstrip(".")).items()}


def find_resume_point(args: TrainingArgs) -> ResumePoint | None:
    """Return the newest state of the run selected by ``args.resume``; None for a new run.

    ``auto`` selects the run of this experiment that was started or resumed last, by what the runs say; a path names a
    run folder.

    Raises:
        InputError: the folder holds no state, or its files are damaged.
    """
    if args.resume == "none":
        return None
    if args.resume != "auto":
        run = Path(args.resume)
        if not _has_state(run):
            raise InputError(
                f"args.resume: {run} holds no {FOLDER}/{LATEST}; name a run folder ({args.save}/"
                f"{args.experiment_name}-...), or use args.load={run} to start a new run from its weights"
            )
        return _read_point(run)
    runs = own_runs(args)
    points = [_read_point(run) for run in runs if _has_state(run)]
    if not points and (left := [run for run in runs if (run / LATEST).exists()]):
        logger.info(
            "%s has weights and no resume state: a new run starts; args.load=%s starts from them", left[-1], left[-1]
        )
    return max(points, key=lambda point: (point.start_number, point.iteration, str(point.run)), default=None)


def own_runs(args: TrainingArgs) -> list[Path]:
    """Return the run folders of the experiment in ``args.save``, by name."""
    own = re.compile(re.escape(args.experiment_name) + r"(-\d\d){4}(-\d+)?").fullmatch
    save = Path(args.save)
    return sorted(path for path in save.iterdir() if own(path.name) and path.is_dir()) if save.is_dir() else []


def next_start_number(args: TrainingArgs) -> int:
    """Return the number of a start now; see `ResumePoint.start_number`. A run that cannot be read does not count."""
    numbers = [0]
    for run in own_runs(args):
        if _has_state(run):
            with contextlib.suppress(InputError):
                numbers.append(_read_point(run).start_number)
    return 1 + max(numbers)


def abandoned_run(args: TrainingArgs) -> tuple[Path, IO[str]] | None:
    """Return the newest run folder of the experiment whose process died before it saved, locked; None without one.

    Every run has a lock file. Where the file system has no locks, no run is abandoned.
    """
    for run in reversed(own_runs(args)):
        if (run / LOCK).is_file() and not _has_state(run) and not (run / LATEST).exists():
            with contextlib.suppress(OSError):
                return run, try_lock_folder(run)
    return None


def _has_state(run: Path) -> bool:
    return newest_state(run) is not None


def newest_state(run: Path) -> str | None:
    """Return the name in ``latest`` of the resume states, or before its first write that of the newest complete state.

    None if there is no state.
    """
    latest = run / FOLDER / LATEST
    if latest.is_file():
        return latest.read_text(encoding="utf-8", errors="replace").strip()
    complete = (path.parent.name for path in (run / FOLDER).glob("*/resume.json"))
    return max(complete, key=lambda name: int(name) if name.isdecimal() else -1, default=None)


def repair_latest(point: ResumePoint) -> None:
    """Set ``latest`` to the weights of the state, in case a process was killed between the two writes."""
    if point.has_weights():
        write_latest(point.run, point.iteration)


def _read_point(run: Path) -> ResumePoint:
    """Read and check the newest state of a run: that of ``latest``, or the newest complete one before its first write.

    Raises:
        InputError: a file is missing or damaged, or its values contradict each other.
    """
    path = run / FOLDER / LATEST
    try:
        with refusing_denied():
            name = newest_state(run) or ""
            if not re.fullmatch(r"[0-9]+", name):
                raise ValueError(f"it holds '{name[:40]}', and an iteration, a whole number, is expected")
            path = run / FOLDER / name / "resume.json"
            content = parse_json(path.read_bytes())
        digest = content.pop("digest", None) if isinstance(content, dict) else None
        point = _checked_point(run, int(name), content)
        if digest not in (None, digest_of(content)):
            raise ValueError("it was changed after it was written (its digest differs)")
        return point
    except (OSError, ValueError) as error:
        raise InputError(
            f"the resume state cannot be read: {path}: {reason_of(error)}; restore the file, or use "
            "args.resume=none, or args.resume=RUN_FOLDER for another run"
        ) from error


def _checked_point(run: Path, iteration: int, content: Any) -> ResumePoint:
    """Return the point of a ``resume.json`` in the folder of `iteration`.

    Raises:
        ValueError: a value is missing, unknown, of a wrong type, or contradicts the folder.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds {spelled(content)} instead of named values")
    hints = get_type_hints(ResumePoint, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(ResumePoint) if field.name != "run"}
    if unknown := content.keys() - fields.keys():
        raise ValueError(f"'{min(unknown)}' is unknown; it was written by another version, or changed")
    for name, field in fields.items():
        if name not in content:
            if field.default is dataclasses.MISSING:
                raise ValueError(f"'{name}' is missing")
        elif (found := misfit(content[name], hints[name])) is not None:
            raise ValueError(f"'{name}' {found[0]}; {found[1]}")
    if content["iteration"] != iteration:
        raise ValueError(f"'iteration' is {content['iteration']}, and the state is that of iteration {iteration}")
    if (content["samples"] == 0) != (iteration == 0):
        raise ValueError(f"'samples' is {content['samples']} after {iteration} iterations")
    if wrong := [name for name in content.get("files", ()) if Path(name).name != name]:
        raise ValueError(f"'files' names '{wrong[0]}', which is not in its folder")
    return ResumePoint(run=run, **{**content, "files": tuple(content.get("files", ()))})


def save_state(engine: Any, point: ResumePoint, *, with_rng: bool = True) -> None:
    """Write the state of all ranks, update ``latest``, remove older states. Collective: all ranks call it.

    Raises:
        RunError: the files cannot be written; the previous state is kept.
    """
    contents: dict[Path, Any] = {}
    visit_state(engine, point, contents.__setitem__, with_rng=with_rng)
    for path, content in contents.items():  # not inside of DeepSpeed's collectives, which have a timeout
        write_state_file(path, content)
    sgm.distributed.wait_for_all()
    # From the ranks, not from the folder: on a shared file system another machine may not see a new file yet, and files
    # of an interrupted save may still be there.
    files = sgm.distributed.gather_objects([path.name for path in contents])
    if files is not None:
        publish_state(point, {name for names in files for name in names})
    sgm.distributed.barrier()


def visit_state(engine: Any, point: ResumePoint, visit: Callable[[Path, Any], None], *, with_rng: bool = True) -> None:
    """Call `visit` with path and content of each of this rank's files of the state. Collective: all ranks call it."""
    folder = point.folder
    engine.checkpoint_engine = checkpoint_engine(visit)
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True)
    if with_rng:
        visit(folder / f"rng_{sgm.distributed.rank():02d}.pt", rng_state())


def publish_state(point: ResumePoint, files: Collection[str]) -> None:
    """Make the state, whose `files` all ranks have written, the newest one, and remove older ones. For rank zero."""
    point = dataclasses.replace(point, files=tuple(sorted(files)))
    content = {name: value for name, value in dataclasses.asdict(point).items() if name != "run"}
    content["digest"] = digest_of(content)
    write_json(point.folder / "resume.json", content)
    with atomic_file(point.folder.parent / LATEST) as temporary:
        temporary.write_text(f"{point.iteration}\n", encoding="utf-8")
    remove_other_states(point.run, point.iteration)


def remove_other_states(run: Path, iteration: int) -> None:
    """Remove all states of `run` except that of `iteration`, incomplete ones included.

    What cannot be removed, as a folder of NFS with a file that is open elsewhere, is left for the next save.
    """
    for other in (run / FOLDER).iterdir():
        if other.is_dir() and other.name != str(iteration):
            shutil.rmtree(other, ignore_errors=True)


def require_files(point: ResumePoint, now: ResumePoint, *, with_rng: bool = True) -> None:
    """Check that the files of a state are there. Collective: all ranks call it.

    Args:
        point: of the state.
        now: the start of the run as it would be new.
        with_rng: whether the random generators are restored.

    Raises:
        InputError: one is missing.
    """
    names = [name for name in _files_to_look_up(point, now) if with_rng or not _RNG.fullmatch(name)]
    missing = [name for name in names if not (point.folder / name).is_file()]
    for number, lacks in enumerate(sgm.distributed.all_gather_any(missing)):
        if lacks:
            is_rng = all(map(_RNG.fullmatch, lacks))
            fresh = "set args.no_load_rng=true to go on with fresh random generators, or " if is_rng else ""
            raise InputError(f"{point.folder}, as rank {number} sees it, lacks {', '.join(lacks)}; {fresh}{CURE}")


def load_state(engine: Any, point: ResumePoint, now: ResumePoint, *, with_rng: bool = True) -> None:
    """Load the state into a new DeepSpeed engine of the run `now`. Collective: all ranks call it.

    Raises:
        InputError: a file is damaged, or the state does not fit.
    """
    with settings_kept(engine):
        if point.is_divided_like(now):
            engine.checkpoint_engine = checkpoint_engine()
            engine.load_checkpoint(str(point.folder.parent), tag=point.folder.name, load_module_strict=False)
        else:
            _load_of_other_ranks(engine, point, now)
    engine.lr_scheduler.load_state_dict(engine.lr_scheduler.state_dict())
    # Additional ranks, and those of another tensor parallel size, whose ranks draw alike, keep their fresh generators.
    rng = point.folder / f"rng_{sgm.distributed.rank():02d}.pt"
    if with_rng and rng.is_file() and point.tensor == now.tensor:
        restore_rng(rng)


def _files_to_look_up(point: ResumePoint, now: ResumePoint) -> list[str]:
    """Return the files of the state that this rank looks for: its own, and a share of all.

    Together the ranks look for all of them, and those of each machine for some.
    """
    rank = sgm.distributed.rank()
    names = (
        rf"rng_{rank:02d}\.pt",
        rf".*zero_pp_rank_{rank // now.tensor}_.*",
        rf"mp_rank_{rank % now.tensor:02d}_model_states\.pt",
    )
    own = re.compile("|".join(names)).fullmatch
    share = point.files[rank % max(len(point.files), 1) :: now.world_size]
    return sorted({*share, *filter(own, point.files)})


def _load_of_other_ranks(engine: Any, point: ResumePoint, now: ResumePoint) -> None:
    rank, world = sgm.distributed.rank(), now.world_size
    logger.info(
        "the state in %s is that of %s; dividing it over %s", point.folder, point.ranks_as_text, now.ranks_as_text
    )
    saved = point.open()
    states = sorted(name for name in saved.files if name.endswith("_states.pt"))
    for name in states[rank::world]:  # each file once, whoever needs it
        read_checked(point.folder / name, torch.device("cpu"))
    sgm.distributed.barrier()
    shard = Shard(sgm.distributed.tensor_parallel_rank(), now.tensor)
    load_repartitioned(engine, saved, rank=rank // now.tensor, world=world // now.tensor, shard=shard)
