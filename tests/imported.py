"""Import slow modules that start no thread; see `tests.fork_server`."""

import importlib

import sgm.distributed

sgm.distributed.prepare_import()
for _name in (
    "data_video",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "dit_video_concat",
    "imageio_ffmpeg",
    "sat.model.base_model",
    "sat.model.finetune",
    "sat.training.deepspeed_training",
    "sentencepiece",
    "sgm.data.clips.check",
    "sgm.data.clips.transform",
    "sgm.inference.main",
    "sgm.modules.diffusionmodules.denoiser",
    "sgm.modules.diffusionmodules.loss",
    "sgm.modules.diffusionmodules.sampling",
    "sgm.modules.diffusionmodules.sigma_sampling",
    "sgm.training.main",
    "sgm.training.run",
    "sgm.weights.checkpoint",
    "torch._dynamo",
    "torch.distributed.launcher.api",
    "transformers.models.t5.modeling_t5",
    "vae_modules.autoencoder",
    "vae_modules.cp_enc_dec",
):
    importlib.import_module(_name)
