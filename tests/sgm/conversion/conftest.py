"""Tiny models of all five families, with every weight away from zero, as files with a model YAML."""

from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.models import NetworkSize, build_network, build_vae, network_section, vae_section
from sgm.weights.checkpoint import save_autoencoder, save_network

FAMILIES = ("cogvideox_2b", "cogvideox_5b", "cogvideox_5b_i2v", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v")
CONFIGS = Path(__file__).parents[3] / "configs"
SIZE = NetworkSize(
    hidden_size=64,
    num_attention_heads=4,
    num_layers=2,
    time_embed_dim=32,
    latents=(4, 8, 12),
    text_length=6,
    text_hidden_size=24,
)


@pytest.fixture(scope="session")
def family(tmp_path_factory, t5_folder):
    """Return a function: name of a family → the YAML of a tiny model of it; its weights are beside it."""
    top = tmp_path_factory.mktemp("families")

    def make(name: str) -> Path:
        folder = top / name
        path = folder / "model.yaml"
        if path.exists():
            return path
        content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        model = content["model"]
        model["network_config"] = network_section(name, SIZE)
        model["first_stage_config"] = vae_section(name, ch=32, num_res_blocks=1)
        model["first_stage_config"]["params"]["ckpt_path"] = str(folder / "vae" / "3d-vae.pt")
        embedder = model["conditioner_config"]["params"]["emb_models"][0]["params"]
        embedder |= {"model_dir": str(t5_folder), "max_length": SIZE.text_length}
        content["args"] |= {"load": str(folder / "transformer"), "sampling_num_frames": 4}
        content["args"]["sampling_image_size"] = [64, 96]
        dtype = torch.float16 if name == "cogvideox_2b" else torch.bfloat16
        model["precision"] = "fp32"  # precision of the tests
        network = build_network(model["network_config"], seed=3)
        save_network(folder / "transformer", 1, network.to(dtype), patch_size=network.patch_size)
        save_autoencoder(folder / "vae" / "3d-vae.pt", build_vae(model["first_stage_config"], seed=4).half())
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return make
