"""Steps of sampling and of training as configurations describe them, with random weights, and the memory they take."""

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch

import sgm.distributed
from benchmarks.models import CONFIGS, build_network, build_vae
from sgm.checks.estimate import sampling_estimate, training_estimate
from sgm.checks.measure import decode_usage, encode_usage
from sgm.checks.meta_run import LiveBytes, build
from sgm.config.deepspeed_section import engine_config
from sgm.config.load import Config, load_config
from sgm.io import parse_json, write_json
from sgm.models.video_diffusion import SATVideoDiffusionEngine, TrainingInputs
from sgm.modules.geometry import SPATIAL_COMPRESSION
from sgm.training.optim.optimizer import make_optimizer
from sgm.training.optim.schedule import LearningRate
from sgm.training.optim.trainable import choose_trainable
from sgm.training.step import TrainingModule, start_deepspeed
from sgm.util import RunError, instantiate_from_config
from sgm.weights.offload import Offload
from sgm.weights.quantize import linear_layers, num_bytes, store

_NETWORK, _VAE = "model.network_config.params", "model.first_stage_config.params"
_PARTS = f"{_VAE}.encoder_config.params", f"{_VAE}.decoder_config.params"
# Size → overrides of a released configuration.
SIZES: Mapping[str, Sequence[str]] = {
    "released": (),
    "tiny": (
        *(f"{_NETWORK}.{key}" for key in ("hidden_size=128", "num_attention_heads=2", "num_layers=2")),
        *(f"{_NETWORK}.{key}" for key in ("time_embed_dim=64", "latent_height=2", "latent_width=4", "num_frames=9")),
        f"{_NETWORK}.modules.pos_embed_config.params.text_length=16",
        f"{_NETWORK}.modules.patch_embed_config.params.text_hidden_size=32",
        *(f"{part}.{key}" for part in _PARTS for key in ("ch=32", "num_res_blocks=1")),
        "args.sampling_image_size=[16,32]",
        "args.sampling_num_frames=3",
    ),
}
_TINY_LORA = f"{_NETWORK}.modules.lora_config.params.r=8"

_NO_EVALUATION = "args.eval_interval=null", "args.eval_batch_size=null"


def sampling_config(model: str, size: str, *settings: str) -> Config:
    """Return the configuration of sampling with a released model, in one of `SIZES`."""
    bases = [CONFIGS / f"{model}.yaml", CONFIGS / "inference.yaml"]
    overrides = [*SIZES[size], "args.only_save_latents=true", *settings]  # no VAE is there while the network runs
    return load_config(bases, overrides, mode="inference")


def training_config(model: str, size: str, *settings: str, lora: bool) -> Config:
    """Return the configuration of training a released model, its adapters or all weights, in one of `SIZES`."""
    more = [_TINY_LORA] if lora and size == "tiny" else []
    bases = [CONFIGS / f"{model}{'_lora' if lora else ''}.yaml", CONFIGS / "sft.yaml"]
    return load_config(bases, [*SIZES[size], *more, *_NO_EVALUATION, *settings], mode="train")


def launch(ranks: int, words: Sequence[str], **env: str) -> str:
    """Run a script or ``-m`` module on `ranks` processes under torchrun; return their standard error.

    Raises:
        RunError: one has failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *words]
    root = str(CONFIGS.parent)
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": root, **env}, capture_output=True, text=True
    )
    if done.returncode:
        raise RunError(f"{ranks} ranks ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stderr


def seconds_of_ranks(ranks: int, words: Sequence[str], **env: str) -> float:
    """Return the seconds that `write_shared_seconds` writes to the file after ``--json``, on ranks as of `launch`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seconds.json"
        launch(ranks, [*words, "--json", str(path)], **env)
        return parse_json(path.read_text(encoding="utf-8"))


def write_shared_seconds(path: Path, measure: Callable[[], float]) -> None:
    """Measure on this rank and the others, which share the tokens of a sample; rank zero writes its seconds."""
    sgm.distributed.initialize(mesh=sgm.distributed.Mesh(sequence=sgm.distributed.world_size()))
    seconds = measure()
    if sgm.distributed.rank() == 0:
        write_json(path, seconds)
    sgm.distributed.shutdown()


class Peak:
    """Context that counts the most bytes on a device beyond those in use at its beginning.

    On an accelerator torch's allocator knows them; on a CPU the tensors that operators make are counted, which is slow.
    """

    def __init__(self, device: torch.device) -> None:
        # Meta tensors, which DeepSpeed keeps of the parameters, have no memory, and are counted apart.
        self._live = LiveBytes(torch.device("meta")) if device.type == "cpu" else None
        self._before = 0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.__enter__()
        else:
            gc.collect()
            torch.accelerator.synchronize()
            self._before = torch.accelerator.memory_allocated()
        self.restart()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)

    def restart(self) -> None:
        """Forget the peak until now, and what is not in use any more."""
        gc.collect()
        if self._live is not None:
            self._live.peak = self._live.live
        else:
            torch.accelerator.reset_peak_memory_stats()

    @property
    def bytes(self) -> int:
        """The most bytes since the beginning, or since `restart`."""
        return self._live.peak if self._live is not None else torch.accelerator.max_memory_allocated() - self._before


def extra_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that `work` takes beyond those in use before it."""
    with Peak(device) as peak:
        work()
    return peak.bytes


def free_memory() -> None:
    """Return what is not used any more to the device."""
    gc.collect()
    torch._dynamo.reset()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def build_engine(
    config: Config, device: torch.device, dtype: torch.dtype, *, vae: bool = False, seed: int = 0
) -> SATVideoDiffusionEngine:
    """Build the model of a configuration with random weights, without its text encoder."""
    section = config.engine
    network = section["params"]["network_config"]
    if (recomputes := getattr(config.args, "checkpoint_activations", None)) is not None:
        network["params"].setdefault("transformer_args", {})["checkpoint_activations"] = recomputes
    for absent in ("conditioner_config", *(() if vae else ("first_stage_config",))):
        section["params"].pop(absent, None)
    engine: SATVideoDiffusionEngine = instantiate_from_config(section, allocate=False)
    engine.model.diffusion_model = build_network(network, device=device, dtype=dtype, seed=seed)
    if vae:
        engine.first_stage_model = build_vae(section["params"]["first_stage_config"], device=device, dtype=dtype)
    return engine.eval()


def video_of(config: Config) -> tuple[int, int, int]:
    """Return the latent frames that are sampled, and height and width in pixels."""
    frames, size = config.args.sampling_num_frames, config.args.sampling_image_size
    assert frames is not None and size is not None, "released configurations have both"
    return frames, size[0], size[1]


def shape_of(config: Config, engine: SATVideoDiffusionEngine) -> tuple[int, int, int, int]:
    """Return (T, C, H, W) of the latents that are sampled."""
    frames, height, width = video_of(config)
    return frames, engine.network.out_channels, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return normal numbers, drawn on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def text_of(engine: SATVideoDiffusionEngine, batch: int, *, seed: int = 1) -> torch.Tensor:
    """Return random text embeddings (B, L, D) for a network, in its dtype and on the device where it runs."""
    network = engine.network
    weight = network.get_mixin("patch_embed").text_proj.weight
    length = network.get_mixin("pos_embed").text_length
    return random(batch, length, weight.shape[1], device=engine.device, dtype=weight.dtype, seed=seed)


class GuidedStep:
    """The network's part of a sampler's step with guidance, as ``args`` sets its weights and where they wait.

    Args:
        config: of a sampling run.
        device: where the step runs.
        dtype: of the network.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.engine = engine = build_engine(config, device, dtype)
        self.network = engine.network.requires_grad_(False)
        if config.args.weights is not None:
            for layer in linear_layers(part for block in self.network.blocks for part in block):
                store(layer, config.args.weights, device=device)
        self._offload: Offload | None = None
        if config.args.network_offload == "blocks":
            self._offload = Offload(self.network.to("cpu"), device, self.network.blocks)
            self.network.use_blocks_within(self._offload.block)
            engine.run_device = device
        frames, channels, height, width = shape_of(config, engine)
        self.inputs = (
            random(2, frames, channels, height, width, device=device, dtype=dtype),
            torch.tensor([500], device=device).expand(2),
            text_of(engine, 2),
        )

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Run both branches of guidance; return the network's output (2, T, C, H, W)."""
        x, timesteps, text = self.inputs
        with self._offload or nullcontext():
            return self.engine.model(x, timesteps, {"crossattn": text})

    def peak(self) -> int:
        """Return the most bytes on the device, weights and inputs included."""
        resident = 0 if self._offload is not None else num_bytes([self.network])
        return resident + sum(x.nbytes for x in self.inputs) + extra_bytes(self, self.device)

    def estimate(self) -> float:
        """Return what the planner says of `peak`."""
        return sampling_estimate(self.config, self.dtype).device["network"]


class TrainingRun:
    """Optimizer steps on one batch from a cache, with DeepSpeed.

    Args:
        config: of a training run.
        device: where it runs.
        dtype: of the network.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.engine = build_engine(config, device, dtype)
        choose_trainable(self.engine.network, config.model)
        self.engine.network.train()
        self.inputs = training_inputs(config, self.engine)
        self._deepspeed: Any = None

    def start(self) -> None:
        """Build optimizer and DeepSpeed's engine."""
        module, section = TrainingModule(self.engine), self.config.deepspeed
        zero = section["zero_optimization"]
        optimizer = make_optimizer(section["optimizer"], module.named_parameters(), zero=zero)
        found = engine_config(section, world_size=1, dtype=self.dtype)
        self._deepspeed = start_deepspeed(module, optimizer, LearningRate(optimizer, lambda _: 1.0), found)

    def step(self) -> torch.Tensor:
        """Make one step of the optimizer; return the loss."""
        loss = self._deepspeed(self.inputs).mean()
        self._deepspeed.backward(loss)
        self._deepspeed.step()
        return loss.detach()

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        if self._deepspeed is not None:
            self._deepspeed.destroy()
            self._deepspeed = None


def step_estimate(config: Config, dtype: torch.dtype) -> float:
    """Return what the planner says of the most bytes on the device in steps of a `TrainingRun`."""
    trained = choose_trainable(build(config.model["network_config"]), config.model).names
    device = training_estimate(config, dtype, trained, vae=False, text_encoder=False).device
    return max(device["network"], device["optimizer"])


def training_inputs(config: Config, engine: SATVideoDiffusionEngine) -> TrainingInputs:
    """Return a batch as `SATVideoDiffusionEngine.training_losses` takes it, on the device."""
    batch, device = config.deepspeed["train_micro_batch_size_per_gpu"], engine.device
    latents, noise = (random(batch, *shape_of(config, engine), device=device, seed=seed) for seed in (2, 3))
    idx = torch.full((batch,), 500, device=device)
    return TrainingInputs(latents, {"crossattn": text_of(engine, batch)}, idx, noise)


def vae_estimate(config: Config, phase: str, dtype: torch.dtype) -> float:
    """Return what the planner says of the VAE's bytes on the device while it encodes or decodes one clip."""
    frames, height, width = video_of(config)
    if phase == "encode":
        found = encode_usage(config, (4 * (frames - 1) + 1, height, width), dtype)
    else:
        found = decode_usage(config, (1, frames, height, width), dtype)
    return found.weights * dtype.itemsize + found.peak
