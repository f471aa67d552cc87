"""Validation: the loss at fixed timesteps and noise, and sample videos."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import sgm.distributed
from sgm.checks.sampling import enable_memory_savers
from sgm.checks.sampling_plan import check_sampling
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, digest_of
from sgm.data.clips.decode import ClipError
from sgm.data.loader import MAX_ATTEMPTS
from sgm.inference.prompts import Prompt, check_images, check_words, parse_prompts, read_prompts
from sgm.inference.results import sample_folder
from sgm.inference.run import SamplingRun
from sgm.inference.source_video import check_whole
from sgm.inference.video import to_uint8, write_video
from sgm.log import bar, get_logger
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.modules.geometry import Geometry
from sgm.training.inputs.shared import shared_batch, shared_inputs
from sgm.training.metrics import LossByQuarter, PairValues
from sgm.training.sample_measures import SampleMeasures, means
from sgm.util import RunError, default, instantiate_from_config

logger = get_logger(__name__)

# Independent of args.seed, so that validation losses of runs with different seeds are comparable.
VALIDATION_SEED = 20240806
# Multiples of the golden ratio modulo 1 cover the timesteps evenly for any number of samples.
_GOLDEN = 0.6180339887498949


def validation_timestep(number: int, num_idx: int) -> int:
    """Return the timestep of validation sample `number`."""
    return int((number + 0.5) * _GOLDEN % 1 * num_idx)


def validation_prompts(config: Config) -> list[Prompt] | None:
    """Return the prompts of ``args.valid_prompts``; None to use captions of the data.

    Raises:
        InputError: prompts or their images cannot be read.
    """
    assert isinstance(config.args, TrainingArgs)
    given = config.args.valid_prompts
    if given is None:
        return None
    geometry = Geometry.from_network(config.model["network_config"]["params"])
    image2video, control = geometry.image_conditioned, geometry.control_channels > 0
    if isinstance(given, str):
        prompts = read_prompts(given, image2video=image2video, control=control)
    else:
        prompts = parse_prompts(given, image2video=image2video, source="args.valid_prompts", control=control)
    check_images(prompts)
    for prompt in prompts:
        if prompt.control is not None:
            check_whole(str(prompt.control), check_sampling(config.args, geometry))
    if not config.args.allow_unknown_text:
        check_words(prompts, instantiate_from_config(config.model["conditioner_config"]))
    return prompts


@contextmanager
def evaluation_mode(network: torch.nn.Module):
    """Context with dropout disabled."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


@contextmanager
def _sampling_vae(engine: SATVideoDiffusionEngine, args: TrainingArgs, *, waits: bool = False) -> Iterator[None]:
    """Context in which the VAE is tiled and sliced as samples are; in training, tiles would change encoded clips.

    If it `waits` in host memory, it comes to the device, and leaves.
    """
    vae = engine.first_stage_model
    home = next(vae.parameters()).device if vae is not None and waits else None
    if vae is not None:
        if waits:
            vae.to(engine.device)
        engine.first_stage_model = copy.copy(vae)  # shares its weights
        enable_memory_savers(engine.first_stage_model, args)
    try:
        yield
    finally:
        engine.first_stage_model = vae
        if vae is not None and home is not None:
            vae.to(home)


class EvaluationStoppedError(Exception):
    """A rank was asked to stop during an evaluation; raised on all ranks at the same place."""


class Evaluation:
    """Validation of one run.

    Args:
        config: checked training configuration.
        engine: the model.
        dataset: validation clips: ``dataset[i]`` gives a sample, see `data_video.SFTDataset`.
        inputs: the same clips for the loss, with frames or from a cache; None takes `dataset`.
        vae_waits: the VAE is in host memory, except while videos are sampled.
        folder: of the run; samples go to ``samples/<iteration>``.
        micro_batch: batch size unless ``args.eval_batch_size`` is set.
        in_step: whether all ranks must run the same number of forward passes, as with ZeRO-3.
        network_in_use: context in which all weights of the network are there.
        asked_to_stop: whether this rank was; read between validation batches, prompts, and steps of sampling.
    """

    def __init__(
        self,
        config: Config,
        engine: SATVideoDiffusionEngine,
        dataset: Any,
        *,
        inputs: Any = None,
        vae_waits: bool = False,
        folder: Path,
        micro_batch: int,
        in_step: bool,
        network_in_use: AbstractContextManager | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        assert isinstance(config.args, TrainingArgs)
        self._asked_to_stop = asked_to_stop
        self.config, self.args, self.engine, self.dataset = config, config.args, engine, dataset
        self.inputs, self.vae_waits = default(inputs, dataset), vae_waits
        self.folder, self.in_step = folder, in_step
        self.network_in_use = default(network_in_use, nullcontext())
        self.batch_size = config.args.eval_batch_size or micro_batch
        self.text_keys = engine.text_keys
        measures = self.args.eval_measures and sgm.distributed.sample_rank() == 0
        self._measures = SampleMeasures(self.args) if measures else None
        self._clip_of: dict[Path, int] = {}  # folder of the samples of a caption → number of its validation clip

    @property
    def num_samples(self) -> int:
        """Validation samples of all ranks together."""
        if self.args.strict_eval:
            return len(self.dataset)
        return self.args.eval_iters * self.batch_size * sgm.distributed.data_parallel_size()

    @cached_property
    def validation_set(self) -> str:
        """Digest of the samples and the loss of `losses`, whose values can be compared where it is the same."""
        datasets, model = getattr(self.dataset, "datasets", [self.dataset]), self.config.model
        clips = [(getattr(each, "paths", len(each)), getattr(each, "captions", None)) for each in datasets]
        loss = dict(model["loss_fn_config"])
        loss["params"] = {**(loss.get("params") or {}), "sigma_sampler_config": None}  # timesteps are fixed
        parts = [model.get(name) for name in ("denoiser_config", "scale_factor")]
        return digest_of([self.num_samples, clips, self.config.data, loss, *parts])[:12]

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Return the mean validation loss, in total and per quarter of the timesteps, all-reduced.

        Clip, timestep and noise of sample j depend only on j, in every run.

        Raises:
            EvaluationStoppedError: a rank was asked to stop.
        """
        rank, size = sgm.distributed.data_parallel_rank(), sgm.distributed.data_parallel_size()
        num_idx = self.engine.require_loss().sigma_sampler.num_idx
        quarters = LossByQuarter(sgm.distributed.device(), num_idx=num_idx)
        mine = range(rank, self.num_samples, size)
        # With in_step, ranks with fewer samples compute a dummy sample that is not counted.
        rounds = -(-self.num_samples // size)
        pairs = PairValues(self.engine.require_loss(), sgm.distributed.device())
        with evaluation_mode(self.engine.network):
            for start in bar(range(0, rounds, self.batch_size), "validation batches"):
                self._stop_if_asked()
                numbers = list(mine[start : start + self.batch_size])
                if not numbers and not self.in_step:
                    continue
                inputs = self._inputs(numbers or [0])
                with self.network_in_use:
                    losses = self.engine.training_losses(inputs)
                if numbers:
                    quarters.add(inputs.idx, losses)
                    pairs.add(losses)
        values = {}
        for kept in (quarters, pairs):
            kept.reduce(sgm.distributed.all_reduce_)
            values |= kept.values()
        return {f"validation_{name}": value for name, value in values.items()}

    def _stop_if_asked(self) -> None:
        """Stop on all ranks if any was asked to, so that none waits for another. Collective."""
        if sgm.distributed.any_rank(self._asked_to_stop()):
            raise EvaluationStoppedError

    def _inputs(self, numbers: list[int]) -> Any:
        num_idx = self.engine.require_loss().sigma_sampler.num_idx
        return shared_inputs(
            self.engine,
            shared_batch(self.engine, lambda: self._batch(numbers)),
            [torch.Generator().manual_seed(VALIDATION_SEED + number) for number in numbers],
            idx=[validation_timestep(number, num_idx) for number in numbers],
        )

    def _batch(self, numbers: list[int]) -> dict[str, Any]:
        clips = [self._clip(self.inputs, number) for number in numbers]
        batch: dict[str, Any] = {key: [clip[key] for clip in clips] for key in self.text_keys}
        batch["image"] = [clip.get("image") for clip in clips]
        for key in ("control", "mask", "moments", "image_moments", "control_moments"):
            if key in clips[0]:
                batch[key] = [clip[key] for clip in clips]
        for key in ("mp4", "rejected"):
            if key in clips[0]:
                batch[key] = torch.stack([clip[key] for clip in clips])
        return batch

    @staticmethod
    def _clip(dataset: Any, number: int) -> Mapping[str, Any]:
        """Return validation clip `number`, or the next readable one."""
        failures = []
        for offset in range(min(MAX_ATTEMPTS, len(dataset))):
            try:
                return dataset[(number + offset) % len(dataset)]
            except ClipError as error:
                logger.warning("validation leaves out %s", error)
                failures.append(str(error))
        raise RunError("validation clips cannot be read: " + "; ".join(failures))

    def sample(self, iteration: int) -> list[Path]:
        """Sample the validation prompts into ``samples/<iteration>``; return the files of this rank.

        Raises:
            EvaluationStoppedError: a rank was asked to stop; what is written stays.
        """
        folder = self.folder / "samples" / f"{iteration:08d}"
        args = dataclasses.replace(
            self.args,
            output_dir=str(folder),
            only_save_latents=self.args.only_log_video_latents,
            skip_existing=False,
            overwrite=True,
            contact_sheet=False,
        )
        run = SamplingRun(
            dataclasses.replace(self.config, args=args),
            engine=self.engine,
            digest=f"{self.config.digest}-{iteration}",
            network_in_use=self.network_in_use,
            between_steps=self._stop_if_asked,
        )
        with evaluation_mode(self.engine.network), _sampling_vae(self.engine, self.args, waits=self.vae_waits):
            prompts = validation_prompts(self.config)
            if prompts is None:
                reads = sgm.distributed.sample_rank() == 0
                prompts = sgm.distributed.broadcast_in_sample_group(self._prompts_of_data(folder) if reads else None)
                self._clip_of = {sample_folder(folder, prompt, 0).parent: prompt.index for prompt in prompts}
            run.sample_list(prompts, in_step=self.in_step)
        return run.summary.written

    def measured(self, samples: Sequence[Path]) -> dict[str, float]:
        """Return figures of the samples of an evaluation, means over all ranks; each calls it with its own samples.

        A rank that is asked to stop leaves out the rest of its own.
        """
        if self._measures is None:  # another rank of the group writes its samples
            return means([])
        found, measures = [], self._measures
        for path in bar(samples, "measured samples"):
            if self._asked_to_stop():
                break
            found.append(measures.of(path, self._reference(path)))
        return means(found)

    def _reference(self, sample: Path) -> np.ndarray | None:
        """Return the frames of the clip with whose caption a sample was made; None for prompts, and latents alone."""
        number = self._clip_of.get(sample.parents[1])
        frames = None if number is None else self._clip(self.dataset, number).get("mp4")
        return None if frames is None else to_uint8(frames).numpy()

    def _prompts_of_data(self, folder: Path) -> list[Prompt]:
        """Return the captions of the first batch of clips, with their images or first frames."""
        image2video = Geometry.from_network(self.config.model["network_config"]["params"]).image_conditioned
        prompts = []
        for i in range(min(self.batch_size, len(self.dataset))):
            clip = self._clip(self.dataset, i)
            image = None
            if image2video:
                image = folder / f"first_frame_{i}_rank{sgm.distributed.data_parallel_rank()}.png"
                image.parent.mkdir(parents=True, exist_ok=True)
                first = clip["mp4"][:1] if clip.get("image") is None else clip["image"][None]
                Image.fromarray(to_uint8(first)[0].numpy()).save(image)
            control = None
            if "control" in clip:
                control = folder / f"control_{i}_rank{sgm.distributed.data_parallel_rank()}.mp4"
                write_video(control, to_uint8(clip["control"]), self.args.sampling_fps)
            prompts.append(Prompt(i, clip["txt"], image, control))
        return prompts
