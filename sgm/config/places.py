"""Where a key belongs that stands in the wrong section, or that other trainers have under another name."""

import inspect
from collections.abc import Iterator, Mapping

from sgm.config.args import TrainingArgs, names_of
from sgm.util import InputError, get_obj_from_str

_MODULES = "model.network_config.params.modules"

# Names of other trainers and of common mistakes.
_OTHER_NAMES: Mapping[str, str] = {
    "adam_beta1": "deepspeed.optimizer.params.betas",
    "adam_epsilon": "deepspeed.optimizer.params.eps",
    "beta1": "deepspeed.optimizer.params.betas",
    "beta2": "deepspeed.optimizer.params.betas",
    "bucket_config": "data.params.buckets",
    "buckets": "data.params.buckets",
    "cfg_scale": "args.guidance_scale",
    "checkpointing_limit": "args.keep_last",
    "checkpointing_steps": "args.save_interval",
    "checkpoints_total_limit": "args.keep_last",
    "clip_grad": "deepspeed.gradient_clipping",
    "data_dir": "args.train_data",
    "data_root": "args.train_data",
    "epsilon": "deepspeed.optimizer.params.eps",
    "frames": "args.sampling_num_frames (latent frames)",
    "gradient_checkpointing": "args.checkpoint_activations",
    "height": "args.sampling_image_size",
    "instance_data_root": "args.train_data",
    "learning_rate": "deepspeed.optimizer.params.lr",
    "lora_alpha": f"{_MODULES}.lora_config.params.lora_alpha",
    "lora_rank": f"{_MODULES}.lora_config.params.r",
    "lr": "deepspeed.optimizer.params.lr",
    "lr_scheduler": "args.lr_decay_style",
    "lr_warmup_iters": "args.auto_warmup_iters, or args.warmup (a share of the run)",
    "lr_warmup_steps": "args.auto_warmup_iters, or args.warmup (a share of the run)",
    "max_grad_norm": "deepspeed.gradient_clipping",
    "max_train_steps": "args.train_iters",
    "mixed_precision": "model.precision",
    "model_path": "args.load",
    "nccl_timeout": "args.distributed_timeout",
    "num_frames": "args.sampling_num_frames (latent frames) or data.params.max_num_frames",
    "num_inference_steps": "args.num_steps",
    "num_videos_per_prompt": "args.videos_per_prompt",
    "num_train_epochs": "args.epochs",
    "optimizer": "deepspeed.optimizer",
    "pretrained_model_name_or_path": "args.load",
    "r": f"{_MODULES}.lora_config.params.r",
    "rank": f"{_MODULES}.lora_config.params.r",
    "resume_from_checkpoint": "args.resume",
    "train_epochs": "args.epochs",
    "train_steps": "args.train_iters",
    "ucg_rate": "model.conditioner_config.params.emb_models.0.ucg_rate",
    "validation_epochs": "args.eval_interval (as '2 epochs')",
    "validation_prompt": "args.valid_prompts",
    "validation_prompts": "args.valid_prompts",
    "validation_steps": "args.eval_interval",
    "warmup_steps": "args.auto_warmup_iters, or args.warmup (a share of the run)",
    "width": "args.sampling_image_size",
    "zero_stage": "deepspeed.zero_optimization.stage",
    **{f"{name}_config": f"{_MODULES}.{name}_config" for name in ("lora", "pos_embed", "patch_embed", "adaln_layer")},
    "final_layer_config": f"{_MODULES}.final_layer_config",
    "guider_config": "model.sampler_config.params.guider_config",
    "emb_models": "model.conditioner_config.params.emb_models",
}

# Classes whose parameters are looked up, with the place of these in a configuration.
_CLASSES = {
    "sgm.models.video_diffusion.SATVideoDiffusionEngine": "model",
    "data_video.SFTDataset": "data.params",
    "dit_video_concat.DiffusionTransformer": "model.network_config.params",
}
_DEEPSPEED = (
    "bf16 fp16 gradient_accumulation_steps gradient_clipping steps_per_print train_batch_size "
    "train_micro_batch_size_per_gpu zero_optimization"
).split()
_SECTIONS = ("args", "model", "data", "deepspeed")


def place_of(name: str, used_at: str) -> str | None:
    """Return where the key `name`, which means nothing at `used_at`, belongs; None if it is known nowhere."""
    places = [place for place in _places(name) if place.partition(" ")[0].removesuffix(":,") != used_at]
    return places[0] if places else None


def _places(name: str) -> Iterator[str]:
    if name in _SECTIONS:
        yield f"{name}:, a section of its own"
    if name in names_of(TrainingArgs):
        yield f"args.{name}"
    if name in _OTHER_NAMES:
        yield _OTHER_NAMES[name]
    if name in _DEEPSPEED:
        yield f"deepspeed.{name}"
    for target, place in _CLASSES.items():
        try:
            parameters = inspect.signature(get_obj_from_str(target)).parameters
        except (InputError, ImportError):  # an optional part that is not installed
            continue
        if name in parameters:
            yield f"{place}.{name}"
