"""The mesh, ZeRO stage and micro batch with which a training run is fastest on many devices, as modelled."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import sgm.distributed
from sgm.checks.estimate import Encodes, Estimate, clip_of, is_offloaded, memory_text, with_vae
from sgm.checks.mesh import check_mesh, mesh_of
from sgm.checks.planner import TRAINING, config_with, fit, next_of_training, recomputed_blocks, room_for
from sgm.checks.sampling import params_of
from sgm.checks.scaling.cards import Card
from sgm.checks.scaling.step_time import CURES, Prediction, predict
from sgm.checks.training import fitted_buckets, geometry_of, with_largest_bucket
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, ConfigError
from sgm.distributed import Mesh
from sgm.modules.geometry import Geometry
from sgm.util import InputError
from sgm.weights.adapters import is_added

STAGES = (0, 1, 2, 3)
SIZES = (1, 2, 4, 8)  # of tensor and sequence parallelism
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
ALIKE = 0.95  # of the speed of the fastest, nearer than the model is right: what is simpler is chosen


@dataclass(frozen=True)
class Setup:
    """Settings of a run on many devices.

    Attributes:
        mesh: sizes of the groups of ranks.
        stage: of ZeRO.
        micro_batch: samples of a group at a time.
        accumulation: micro batches of an iteration.
    """

    mesh: Mesh
    stage: int
    micro_batch: int
    accumulation: int

    @property
    def order(self) -> tuple[int, ...]:
        """What is simpler comes first: small micro batches, few ranks for a sample, a low stage."""
        return self.micro_batch, self.mesh.ranks, self.mesh.tensor, self.stage

    def settings(self, config: Config) -> list[str]:
        """Return the overrides of a command line that starts a run of `config` with these settings."""
        given = [
            f"args.sequence_parallel_size={self.mesh.sequence}",
            f"args.model_parallel_size={self.mesh.tensor}",
            f"deepspeed.zero_optimization.stage={self.stage}",
            f"deepspeed.train_micro_batch_size_per_gpu={self.micro_batch}",
            f"deepspeed.gradient_accumulation_steps={self.accumulation}",
        ]
        size = f"model.first_stage_config.params.cp_size={self.mesh.context}"
        return [*given, size] if self._sets_context(config) else given

    def _sets_context(self, config: Config) -> bool:
        """Whether the context parallel size must be given: files without one mean 1, and another VAE may have none."""
        section = config.model.get("first_stage_config")
        return section is not None and (self.mesh.context > 1 or "cp_size" in params_of(section))

    def applied(self, config: Config) -> Config:
        """Return `config` with these settings."""
        args = replace(config.args, sequence_parallel_size=self.mesh.sequence, model_parallel_size=self.mesh.tensor)
        zero = {**config.deepspeed["zero_optimization"], "stage": self.stage}
        section = {
            **config.deepspeed,
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
        }
        model = dict(config.model)
        if self._sets_context(config):
            stage = model["first_stage_config"]
            model["first_stage_config"] = {**stage, "params": {**params_of(stage), "cp_size": self.mesh.context}}
        return replace(config, args=args, deepspeed=section, model=model)


@dataclass(frozen=True)
class Choice:
    """A setup, what the model says of it, and whether it fits into the card."""

    setup: Setup
    prediction: Prediction
    fits: bool

    @property
    def speed(self) -> float:
        """Samples of all devices in a second."""
        return self.prediction.samples_per_second


class Planner:
    """Predict setups of a run.

    Args:
        config: of a training run; weights and clips may be missing.
        dtype: of the network.
        trained: names of the trained parameters.
        card: every rank's.
        stages: of ZeRO, which the optimizer allows.
        divides: whether the optimizer allows tensor parallelism.
        vae: what the VAE encodes.
        text_encoder: what the text encoder encodes.
    """

    def __init__(
        self,
        config: Config,
        dtype: torch.dtype,
        trained: Collection[str],
        card: Card,
        *,
        stages: Sequence[int] = STAGES,
        divides: bool = True,
        vae: Encodes = True,
        text_encoder: Encodes = True,
    ) -> None:
        self.config, self.dtype, self.trained, self.card = config, dtype, trained, card
        self._given: dict[str, Any] = {"stages": stages, "divides": divides, "vae": vae, "text_encoder": text_encoder}
        self.vae = with_vae(config, vae)
        self.text_encoder, self.divides = text_encoder, divides
        self.geometry: Geometry = geometry_of(config)
        self.world = sgm.distributed.world_size()
        room = room_for(card.memory)
        assert room is not None, "a card of that size"
        self.room = room
        zero = config.deepspeed["zero_optimization"]
        if config.args.step_cache is not None:  # refused with stage 3, see `sgm.training.prepare`
            stages = [stage for stage in stages if stage < 3]
        lowest = 3 if is_offloaded(zero, "param") else 1 if is_offloaded(zero, "optimizer") else 0
        self.stages = [stage for stage in stages if stage >= lowest]

    @property
    def next_steps(self) -> str:
        """What to do where nothing fits."""
        adapters = all(map(is_added, self.trained))
        return next_of_training(encodes=bool(self.vae or self.text_encoder), adapters=adapters)

    def changed(self, settings: Sequence[str]) -> "Planner":
        """Return the planner of the run with some settings changed.

        Raises:
            ConfigError: they do not go with this model.
        """
        config = config_with(self.config, settings)
        return Planner(config, self.dtype, self.trained, self.card, **self._given)

    def fitting(self) -> list[str]:
        """Return settings that take less memory and make the run fit; none if it fits, or if none are enough."""
        own = self.own()
        if own is None or own.fits:
            return []

        def estimate_of(settings: Sequence[str]) -> Estimate:
            if (found := self.changed(settings).own()) is None:
                raise ConfigError([])
            return found.prediction.estimate

        chosen, found = fit(estimate_of, self.room, TRAINING)
        return [change.setting for change in chosen] if found.peak <= self.room else []

    def meshes(self) -> Iterator[Mesh]:
        """Yield the meshes within a machine that model and number of ranks allow."""
        for tensor in SIZES if self.divides else (1,):
            for sequence in SIZES:
                ranks = tensor * sequence
                if ranks > self.card.per_node or self.world % ranks:
                    continue
                mesh = Mesh(tensor=tensor, sequence=sequence, context=ranks if self.vae else 1)
                config = Setup(mesh, 1, 1, 1).applied(self.config)
                alone, _ = with_largest_bucket(config, self.geometry)
                clip = clip_of(alone)
                assert clip is not None, "checked before"
                latents = (clip[0] - 1) // self.geometry.time_compression + 1
                if not check_mesh(config, num_patches=self.geometry.num_patches(latents, clip[1])):
                    yield mesh

    def micro_batches(self) -> tuple[int, ...]:
        """Return the micro batches to try: that of the run alone if its buckets have batch sizes of their own."""
        buckets = fitted_buckets(self.config, self.geometry)
        if buckets is not None and any(bucket.batch_size is not None for bucket in buckets.buckets):
            return (self.config.deepspeed["train_micro_batch_size_per_gpu"],)
        return MICRO_BATCHES

    def predicted(self, setup: Setup) -> Choice | None:
        """Return the prediction of a setup; None if the run cannot have it."""
        if setup.mesh.tensor > 1 and setup.stage == 0 and self.dtype != torch.float32:
            return None  # refused in training, see `sgm.training.prepare`
        config = setup.applied(self.config)
        loaded: Mapping[str, Any] = {"vae": self.vae, "text_encoder": self.text_encoder}
        try:
            if _args(config).checkpoint_activations == "auto":
                number, keeps = recomputed_blocks(config, self.dtype, self.trained, self.room, **loaded)
                chosen = {"checkpoint_activations": number or False, "keep_attention": bool(number) and keeps}
                config = replace(config, args=replace(_args(config), **chosen))
            alone, _ = with_largest_bucket(config, self.geometry)
            found = predict(alone, self.dtype, self.trained, self.card, **loaded)
        except InputError:  # not with this mesh: a kernel that ring attention does not call, for example
            return None
        return Choice(setup, found, found.estimate.peak <= self.room)

    def choices(self) -> list[Choice]:
        """Return the setups that may be the fastest, and what did not fit on the way to them.

        Ranks that share a sample send more than ranks with samples of their own, so larger groups are tried until they
        are slower. Tensor parallelism, which sends most, is tried if nothing fits without it.
        """
        found: list[Choice] = []
        for mesh in self.meshes():
            fastest = best(found)
            if fastest is not None and mesh.tensor > 1:
                break
            tried = self.of_mesh(mesh)
            found += tried
            own = best(tried)
            if fastest is not None and own is not None and own.speed < fastest.speed:
                break
        return found

    def of_mesh(self, mesh: Mesh) -> list[Choice]:
        """Return the setups of a mesh, with micro batches up to one that does not fit or is hardly faster."""
        found: list[Choice] = []
        for micro in self.micro_batches():
            accumulation = self._accumulation(mesh, micro)
            if accumulation is None:
                continue
            setups = [Setup(mesh, stage, micro, accumulation) for stage in self.stages]
            tried = [choice for setup in setups if (choice := self.predicted(setup)) is not None]
            before, now = best(found), best(tried)
            found += tried
            if now is None or (before is not None and before.speed > ALIKE * now.speed):
                break
        return found

    def _accumulation(self, mesh: Mesh, micro: int) -> int | None:
        """Return the micro batches of an iteration, by ``deepspeed.train_batch_size`` if that is given."""
        total = self.config.deepspeed.get("train_batch_size")
        if total is None:
            return self.config.deepspeed["gradient_accumulation_steps"]
        at_once = micro * (self.world // mesh.ranks)
        return None if total % at_once else total // at_once

    def own(self) -> Choice | None:
        """Return the prediction of the settings of the run."""
        section = self.config.deepspeed
        stage, micro = section["zero_optimization"]["stage"], section["train_micro_batch_size_per_gpu"]
        setup = Setup(mesh_of(self.config), stage, micro, section["gradient_accumulation_steps"])
        return self.predicted(setup)


def _args(config: Config) -> TrainingArgs:
    assert isinstance(config.args, TrainingArgs), "the configuration was loaded for training"
    return config.args


def best(choices: Sequence[Choice]) -> Choice | None:
    """Return the fastest setup that fits, or a simpler one that is about as fast; None if none fits."""
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return None
    fastest = max(choice.speed for choice in fitting)
    alike = [choice for choice in fitting if choice.speed >= ALIKE * fastest]
    return min(alike, key=lambda choice: choice.setup.order)


def check_devices(num: int, card: Card) -> None:
    """Check that devices fill their machines.

    Raises:
        InputError: they do not.
    """
    if num > card.per_node and num % card.per_node:
        near = num // card.per_node * card.per_node
        raise InputError(
            f"--devices {num}: {card.per_node} of {card.name} are in a machine; give {near}, {near + card.per_node} or "
            f"at most {card.per_node}"
        )


def scaling_rows(planner: Planner) -> dict[str, str]:
    """Return the rows of the report about the devices that are planned for, modelled and not measured."""
    card, world = planner.card, planner.world
    rows = {
        "devices": f"{world} x {card.name}, {min(world, card.per_node)} in a machine; modelled, not measured, see "
        "docs/scaling.md"
    }
    alone, _ = with_largest_bucket(planner.config, planner.geometry)
    if clip_of(alone) is None:
        return rows | {"  recommended": "nothing: data.params do not say how large clips are"}
    own, more = planner.own(), planner.fitting()
    choices = planner.changed(more).choices() if more else planner.choices()
    if own is not None:
        rows["  as it is"] = _speed(own, planner.room)
    found = best(choices)
    plain = best(planner.of_mesh(Mesh())) if more else None  # a higher stage of ZeRO may be enough, and faster
    if plain is not None and (found is None or plain.speed > found.speed):
        found, more = plain, []
    if found is None:
        if not choices:
            total = planner.config.deepspeed.get("train_batch_size")
            return rows | {"  recommended": f"nothing: no mesh and micro batch give train_batch_size={total}"}
        least = min(choices, key=lambda choice: choice.prediction.estimate.peak)
        words = " ".join(least.setup.settings(planner.config))
        return rows | {"  the smallest": f"{words}: {_speed(least, planner.room)}; {planner.next_steps}"}
    settings = [*more, *found.setup.settings(planner.config)]
    config_with(planner.config, settings)  # the run will be loaded with them
    groups = world // found.setup.mesh.ranks
    rows["  recommended"] = " ".join(settings)
    rows["  batch"] = (
        f"{found.setup.micro_batch} x {found.setup.accumulation} steps of accumulation x {groups} groups of "
        f"{found.setup.mesh.ranks} = {found.prediction.samples} samples an iteration"
    )
    rows["  speed"] = _speed(found, planner.room)
    shares = found.prediction.limits
    first = next(iter(shares))
    shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
    rows["  limit"] = f"{first} ({shown}): {CURES[first]}"
    if not isinstance(_args(planner.config).save_interval, int):
        rows["  saves"] = "not counted: args.save_interval counts epochs"
    return rows


def _speed(choice: Choice, room: float) -> str:
    found = choice.prediction
    used = "" if found.utilization is None else f", {found.utilization:.0%} of the peak (MFU)"
    fits = "" if choice.fits else f", which does not fit into {memory_text(room)}"
    return (
        f"{choice.speed:.3g} samples/s, {found.step:.3g} s an iteration{used}; "
        f"{memory_text(found.estimate.peak)} a rank{fits}"
    )
