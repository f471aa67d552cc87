"""Import slow modules that start no thread; see `tests.fork_server`."""

import importlib

import sgm.distributed

sgm.distributed.prepare_import()
for _name in (
    "data_video",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "dit_video_concat",
    "sat.model.base_model",
    "sat.training.deepspeed_training",
    "sgm.weights.checkpoint",
    "sgm.data.clips.check",
    "sgm.data.clips.transform",
    "sgm.inference.main",
    "sgm.training.main",
    "sgm.training.run",
    "torch._dynamo",
    "torch.distributed.launcher.api",
    "transformers.models.t5.modeling_t5",
    "vae_modules.autoencoder",
):
    importlib.import_module(_name)
