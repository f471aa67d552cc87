"""Networks and VAEs of any width, to count the bytes of their tensors."""

from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from sgm.util import instantiate_from_config, without_allocating
from tests.processes import ROOT

BATCH, LATENTS, TEXT = 2, (5, 8, 16, 16), 30  # T, C, H, W: 320 patches


def network_section(*, hidden: int = 384, layers: int = 2, model: str = "cogvideox_5b") -> Any:
    """The network's section of a shipped model, of another size; LoRA has rank 16."""
    section: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / f"{model}.yaml").model.network_config)
    params = section["params"]
    modules = params["modules"]
    frames, channels, height, width = LATENTS
    params |= {"hidden_size": hidden, "num_layers": layers, "num_attention_heads": hidden // 64, "patch_size": 2}
    params |= {"num_frames": 4 * frames - 3, "latent_height": height, "latent_width": width, "time_embed_dim": 64}
    params |= {"in_channels": channels, "out_channels": channels}
    modules["pos_embed_config"]["params"]["text_length"] = TEXT
    modules["patch_embed_config"]["params"]["text_hidden_size"] = 256
    if "lora_config" in modules:
        modules["lora_config"]["params"]["r"] = 16
    return section


class ProductsOfZeros(TorchDispatchMode):
    """Allocate the results of matrix products without computing them: in bfloat16 they take seconds on some CPUs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            *_, a, b = args
            return a.new_zeros(a.shape[0], b.shape[1])
        return func(*args, **kwargs or {})


def make_network(*, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """A network of zeros. With LoRA, only the adapters are trained. Weight gradients are freed immediately."""
    with without_allocating():
        network = instantiate_from_config(network_section(**kwargs))
    network = network.to(dtype).to_empty(device="cpu")
    adapters = any(".matrix_" in name for name, _ in network.named_parameters())
    for name, parameter in network.named_parameters():
        parameter.data.zero_()
        parameter.requires_grad_(parameter.requires_grad and (".matrix_" in name or not adapters))
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return network


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and text of `BATCH` samples."""
    return torch.zeros(BATCH, *LATENTS, dtype=dtype), torch.zeros(BATCH), torch.zeros(BATCH, TEXT, 256, dtype=dtype)


def trained_names(network: torch.nn.Module) -> frozenset[str]:
    """Names of the parameters that are trained."""
    return frozenset(name for name, parameter in network.named_parameters() if parameter.requires_grad)


def vae_section(*, channels: int = 32, **params: Any) -> Any:
    """The section of the released VAE with `channels` at full resolution, instead of 128."""
    section: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "cogvideox_5b.yaml").model)
    section = section["first_stage_config"]
    for part in ("encoder_config", "decoder_config"):
        section["params"][part]["params"] = section["params"][part]["params"] | {"ch": channels}
    section["params"] |= params
    return section
