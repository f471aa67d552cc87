"""Import slow modules that start no thread; see `tests.fork_server`."""

import importlib

import sgm.distributed
from tests import convolutions

sgm.distributed.prepare_import()
for _name in (
    "data_video",
    "accelerate",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "diffusers.pipelines.cogvideo.pipeline_cogvideox",
    "diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video",
    "diffusers.schedulers.scheduling_dpm_cogvideox",
    "dit_video_concat",
    "einops._torch_specific",
    "imageio_ffmpeg",
    "kornia.geometry.transform",
    "peft",
    "pytest",
    "sat.model.base_model",
    "sat.model.finetune",
    "sat.model.finetune.lora2",
    "sat.training.deepspeed_training",
    "sentencepiece",
    "setuptools.dist",
    "sgm.data.clips.check",
    "sgm.data.clips.transform",
    "sgm.inference.main",
    "sgm.modules.diffusionmodules.denoiser",
    "sgm.modules.diffusionmodules.denoiser_scaling",
    "sgm.modules.diffusionmodules.denoiser_weighting",
    "sgm.modules.diffusionmodules.loss",
    "sgm.modules.diffusionmodules.sampling",
    "sgm.modules.diffusionmodules.sigma_sampling",
    "sgm.training.main",
    "sgm.training.run",
    "sgm.weights.checkpoint",
    "torch._dynamo",
    "torch.distributed.launcher.api",
    "torch.utils.serialization.config",
    "torch.utils.tensorboard",
    "torchmetrics",
    "transformers.models.t5.modeling_t5",
    "vae_modules.autoencoder",
    "vae_modules.cp_enc_dec",
):
    importlib.import_module(_name)
convolutions.install()
