"""Export LoRA to CogKit, whose loader is here written anew with PEFT. Tiny complete networks."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from benchmarks.diffusers_peer import network_peer
from benchmarks.models import build_network
from sgm.conversion.lora_cogkit import ALPHA, FILE, RANK, export_cogkit_lora
from sgm.util import InputError
from sgm.weights.adapters import AdapterInfo
from sgm.weights.checkpoint import save_network
from sgm.weights.lora.files import read_any_lora
from tests.sgm.conversion.test_lora import output, plain, saved, section  # noqa: F401 - saved is a fixture

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def load_as_cogkit(transformer, folder):
    """Return a transformer of diffusers with the adapters of a folder."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=True, target_modules=TARGETS)
    inject_adapter_in_model(config, transformer, adapter_name="default")
    result = set_peft_model_state_dict(transformer, load_file(folder / FILE), adapter_name="default")
    assert result.unexpected_keys == []
    return transformer


@pytest.mark.parametrize(("layers", "alpha"), [(None, 3), ([1], 1)])
def test_cogkit_computes_what_sat_does(tmp_path, saved, layers, alpha):  # noqa: F811
    network = build_network(section(alpha=alpha, layers=layers))
    run = saved(network, alpha=alpha, layers=layers or range(2))
    assert export_cogkit_lora(run, tmp_path / "out") == tmp_path / "out" / FILE
    theirs = output(load_as_cogkit(network_peer(plain(network)), tmp_path / "out"))
    ours = output(network)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (output(plain(network)) - ours).abs().max() > 1e-3
    tensors = load_file(tmp_path / "out" / FILE)
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(128, 32), (32, 128)}


def test_a_file_of_cogkit_comes_back_with_its_alpha(tmp_path, saved):  # noqa: F811
    network = build_network(section())
    file = export_cogkit_lora(saved(network), tmp_path / "ours")
    back = read_any_lora(tmp_path / "ours")
    assert (back.rank, back.alpha, len(back.tensors)) == (RANK, ALPHA, 16)
    (tmp_path / "theirs").mkdir()
    save_file(load_file(file), tmp_path / "theirs" / FILE, metadata={"format": "pt"})
    assert read_any_lora(tmp_path / "theirs").alpha == RANK, "as PEFT's default: their files do not say it"
    assert read_any_lora(tmp_path / "theirs", alpha=ALPHA).alpha == ALPHA


@pytest.mark.parametrize(
    ("projection", "rank", "said"),
    [
        ("transformer.layers.0.mlp.dense_h_to_4h", 4, "ff.net.0.proj.lora_A.weight, and CogKit loads LoRA of to_q"),
        ("transformer.layers.0.attention.dense", 129, "is of rank 129, and CogKit loads 128 at most"),
    ],
)
def test_what_its_loader_would_drop_is_refused(tmp_path, projection, rank, said):
    tensors = {f"{projection}.matrix_A.0": torch.ones(rank, 32), f"{projection}.matrix_B.0": torch.ones(32, rank)}
    target = (projection.rpartition(".")[2],)
    info = AdapterInfo(rank=rank, alpha=1, layers=(0,), base="base", base_digest="0", targets=target)
    save_network(tmp_path / "run", 1, tensors, patch_size=2, adapters=info)
    with pytest.raises(InputError, match=said):
        export_cogkit_lora(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
