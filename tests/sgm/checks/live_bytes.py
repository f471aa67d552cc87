"""Count the bytes of tensors that exist at a time, and networks of any width to count them in."""

import weakref
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sgm.util import instantiate_from_config, without_allocating
from tests.processes import ROOT

BATCH, LATENTS, TEXT = 2, (5, 8, 16, 16), 30  # T, C, H, W: 320 patches


class LiveBytes(TorchDispatchMode):
    """Follow the memory of the tensors that operations make.

    Attributes:
        live: bytes now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in tree_iter(made):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in before and key not in self._known:
                    self._known.add(key)
                    self.live += size
                    weakref.finalize(storage, self._forget, key, size)
        self.peak = max(self.peak, self.live)
        return made

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def saved_bytes(module: torch.nn.Module, *arguments: Any) -> int:
    """Bytes that the backward pass keeps alive, without the weights."""
    storages = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor.detach()  # an output itself would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(*arguments)
    assert out.grad_fn is not None
    return sum(storage.nbytes() for storage in storages.values())


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


def make_network(*, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """A network of zeros: what is in its tensors does not matter. With LoRA, only the adapters are trained."""
    with without_allocating():
        network = instantiate_from_config(network_section(**kwargs))
    network = network.to(dtype).to_empty(device="cpu")
    adapters = any(".matrix_" in name for name, _ in network.named_parameters())
    for name, parameter in network.named_parameters():
        parameter.data.zero_()
        parameter.requires_grad_(parameter.requires_grad and (".matrix_" in name or not adapters))
    return network


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and text of `BATCH` samples."""
    return torch.zeros(BATCH, *LATENTS, dtype=dtype), torch.zeros(BATCH), torch.zeros(BATCH, TEXT, 256, dtype=dtype)


def make_vae(*, channels: int = 32, **params: Any) -> Any:
    """The released VAE with `channels` at full resolution, where that one has 128, in float32."""
    section: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "cogvideox_5b.yaml").model)
    section = section["first_stage_config"]
    for part in ("encoder_config", "decoder_config"):
        section["params"][part]["params"] = section["params"][part]["params"] | {"ch": channels}
    section["params"] |= params
    return instantiate_from_config(section)
