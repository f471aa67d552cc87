"""Adapters on every projection and of every kind, beside diffusers and PEFT. Tiny complete networks."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from benchmarks.diffusers_peer import network_peer, run_network_peer
from benchmarks.models import NetworkSize, build_network, network_section
from sgm.config.load import ConfigError, load_config
from sgm.conversion.diffusers.from_sat import pipeline_of, write_comfyui
from sgm.conversion.diffusers.verify import peer_rope
from sgm.conversion.inspection import inspect_checkpoint
from sgm.conversion.lora import export_lora
from sgm.conversion.lora_import import import_lora
from sgm.conversion.lora_merge import merge_loras, sum_loras
from sgm.conversion.trainers.sources import read_source
from sgm.modules.lora import scale_adapters
from sgm.training.optim.trainable import choose_trainable
from sgm.util import InputError, instantiate_from_config, without_allocating
from sgm.weights.adapters import check_lora_params, describe_adapters, is_adapter, read_adapter_info, with_adapters
from sgm.weights.checkpoint import load_network, save_network
from sgm.weights.files import find_weights, read_tensors
from sgm.weights.lora.several import stack_of, with_loras
from sgm.weights.match import UNUSED_TABLES
from sgm.weights.offload import Offload

RANK, ALPHA, ALL = 4, 3, ("attention", "ff", "adaln", "patch", "text")
MODEL = yaml.safe_load((Path(__file__).parents[3] / "data/golden/dit_t2v_5b_lora/model.yaml").read_text())["model"]
SIZE = NetworkSize(
    hidden_size=32,
    num_attention_heads=2,
    num_layers=2,
    time_embed_dim=16,
    latents=(2, 4, 6),
    text_length=3,
    text_hidden_size=8,
)


class Case:
    """A tiny model with random adapters in `folder`: the run folder `run`, its `base`, and their configuration."""

    def __init__(self, folder, model="cogvideox_5b", **params):
        self.folder = folder
        self.section = network_section(model, SIZE)
        self.plain = build_network(self.section)
        save_network(folder / "base", 1, self.plain, patch_size=self.plain.patch_size)
        self.params = {"r": RANK, "lora_alpha": ALPHA, **params}
        config = self.config(**self.params)
        self.info = describe_adapters(config)
        self.network = instantiate_from_config(config.model["network_config"]).eval()
        load_network(self.network, folder / "base")
        generator = torch.Generator().manual_seed(2)
        for name, parameter in self.network.named_parameters():
            if ".matrix_" in name or ".lokr_" in name:
                nn.init.normal_(parameter, 0, 0.2, generator=generator)
            elif ".magnitude." in name:
                parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
        adapters = {name: t for name, t in self.network.state_dict().items() if is_adapter(name)}
        save_network(folder / "run", 5, adapters, patch_size=self.plain.patch_size, adapters=self.info)

    def config(self, words=(), **params):
        section = copy.deepcopy(self.section)
        if params:
            target = "sat.model.finetune.lora2.LoraMixin"
            section["params"]["modules"]["lora_config"] = {"target": target, "params": params}
        args = {"load": str(self.folder / "base"), "input_type": "cli"}
        content = {"args": args, "model": {**MODEL, "network_config": section}}
        (self.folder / "model.yaml").write_text(json.dumps(content))
        return load_config([self.folder / "model.yaml"], list(words), mode="inference")

    def sampled(self, *loras, load=None):
        """Return the network that sampling builds with ``args.loras``, or of another ``args.load``."""
        config = self.config([f"args.loras={json.dumps(list(loras))}", f"args.load={load or self.folder / 'base'}"])
        config = with_loras(with_adapters(config))
        stack = stack_of(config)
        with without_allocating():
            network = instantiate_from_config(config.model["network_config"])
        load_network(network, config.args.load, adapters=stack and stack.tensors())
        if stack is not None:
            scale_adapters(network, stack.layers, stack.factors(0.0), torch.device("cpu"), stack.shares(0.0))
        return network.eval()

    def pipe(self):
        return CogVideoXPipeline(None, None, None, network_peer(self.plain), None)

    @torch.no_grad()
    def output(self, network):
        draws = torch.Generator().manual_seed(1)
        dtype = next(network.parameters()).dtype
        x = torch.randn(1, 2, self.plain.in_channels, 4, 6, generator=draws).to(dtype)
        context = torch.randn(1, 3, 8, generator=draws).to(dtype)
        if hasattr(network, "mixins"):
            return network(x, torch.tensor([500]), context)
        return run_network_peer(network, x, torch.tensor([500]), context, rope=peer_rope(network, x))


def require_adapters_alone_learn(network):
    """Train a few steps: the loss falls, all tensors of adapters change, and no others."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    draws = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 2, 16, 4, 6, generator=draws), torch.randn(1, 3, 8, generator=draws)
    losses = []
    for _ in range(4):
        loss = network(x, torch.tensor([500]), context).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]) != is_adapter(name), name


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """Adapters on every projection."""
    return Case(tmp_path_factory.mktemp("every"), targets=ALL, rank_stabilized=True)


def test_every_projection_is_adapted_and_recorded(every):
    names = {name.rpartition(".matrix_")[0] for name in every.network.state_dict() if is_adapter(name)}
    assert len(names) == 2 * 5 + 2
    assert read_adapter_info(every.folder / "run") == every.info
    assert every.info.groups == ALL and every.info.alpha == ALPHA * RANK**0.5
    assert (every.output(every.network) - every.output(every.plain)).abs().max() > 1e-2


def test_diffusers_computes_the_same_from_the_export(every, tmp_path):
    export_lora(every.folder / "run", tmp_path / "out")
    pipe = every.pipe()
    pipe.load_lora_weights(str(tmp_path / "out"), adapter_name="a")
    close(every.output(pipe.transformer), every.output(every.network))
    pipe.transformer.set_adapters(["a"], [0.5])
    half = every.sampled({"path": str(every.folder / "run"), "strength": 0.5})
    close(every.output(half), every.output(pipe.transformer))
    import_lora(every.config(), tmp_path / "out", tmp_path / "back")
    ours, theirs = (read_tensors(find_weights(folder)) for folder in (every.folder / "run", tmp_path / "back"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_headers_say_what_files_are_and_are_the_same_each_time(every, tmp_path):
    (every.folder / "run" / "config.yaml").write_text(yaml.safe_dump(every.config(**every.params).merged))
    files = [export_lora(every.folder / "run", tmp_path / name, title="Green land") for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    found = inspect_checkpoint(files[0])
    assert found.metadata == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "cogvideox/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "Green land",
        "modelspec.resolution": "48x32",
        "modelspec.prediction_type": "v",
        "ss_sd_model_name": "base",
        "base_digest": every.info.base_digest,
        "ss_network_dim": "4",
        "ss_network_alpha": "6",
        "training_config_digest": every.config(**every.params).digest,
    }
    assert "Green land (cogvideox/lora, 48x32)" in found.table() and found.to_json()["metadata"] == found.metadata
    (every.folder / "run" / "config.yaml").unlink()
    files = [export_lora(every.folder / "run", tmp_path / name, style="comfyui") for name in ("c", "d")]
    assert files[0].read_bytes() == files[1].read_bytes(), "wherever it is written"
    bare = inspect_checkpoint(files[0]).metadata
    assert bare["modelspec.title"] == "run" and bare["modelspec.implementation"] == "comfyui"
    assert "modelspec.resolution" not in bare and "training_config_digest" not in bare


def test_a_transformer_for_comfyui_has_its_names(every, tmp_path):
    names = {"without": ["vae", "text_encoder", "tokenizer", "scheduler"]}
    (part,) = pipeline_of(every.config(), **names, title="Tiny", style="comfyui").parts
    (same,) = pipeline_of(every.config(), **names).parts
    file = write_comfyui(part, tmp_path / "tiny")
    assert file.name == "tiny.safetensors"
    tensors = load_file(file)
    block = {n.split(".", 2)[2].rpartition(".")[0] for n in tensors if n.startswith("blocks.1.")}
    linear = {"q", "k", "v", "attn_out", "ff_proj", "ff_out", "norm1.linear", "norm2.linear"}
    assert block == linear | {"norm_q", "norm_k", "norm1.norm", "norm2.norm"}
    rest = {name.rpartition(".")[0] for name in tensors if not name.startswith("blocks.")}
    assert rest == {
        *("patch_embed.proj", "patch_embed.text_proj", "time_embedding_linear_1", "time_embedding_linear_2"),
        *("norm_final", "norm_out.linear", "norm_out.norm", "proj_out"),
    }
    q = same.tensors["transformer_blocks.1.attn1.to_q.weight"].compute()
    assert torch.equal(tensors["blocks.1.q.weight"], q)
    found = inspect_checkpoint(file)
    assert found.kind == "ComfyUI transformer" and found.metadata["modelspec.title"] == "Tiny"
    assert found.architecture.num_layers == 2
    back, expected = read_source(file).tensors, every.plain.state_dict()
    assert back.keys() == expected.keys() - {*UNUSED_TABLES}
    for name, tensor in back.items():
        assert torch.equal(tensor.compute().view_as(expected[name]), expected[name]), name


@pytest.mark.parametrize("how", ["merge", "keep"])
def test_the_transformer_of_a_pipeline_has_them(every, tmp_path, how):
    config = every.config([f"args.load={every.folder / 'run'}"], **every.params)
    pipeline = pipeline_of(config, without=["vae", "text_encoder", "tokenizer", "scheduler"], adapters=how)
    pipeline.write(tmp_path / "out")
    pipe = every.pipe()
    pipe.transformer = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    if how == "keep":
        pipe.load_lora_weights(str(tmp_path / "out"))
    close(every.output(pipe.transformer), every.output(every.network))


def test_sampling_reads_the_targets_from_the_file(every):
    assert torch.equal(every.output(every.sampled(load=every.folder / "run")), every.output(every.network))
    lora = {"path": str(every.folder / "run")}
    assert torch.equal(every.output(every.sampled(lora)), every.output(every.network))
    assert torch.equal(every.output(every.sampled(lora | {"strength": 0})), every.output(every.plain))


def test_offloaded_blocks_bring_the_adapters_of_all_projections(every):
    network, expected = every.sampled(load=every.folder / "run"), every.output(every.network)
    offload = Offload(network.requires_grad_(False), torch.device("cpu"), network.blocks)
    network.use_blocks_within(offload.block)
    with offload:
        assert torch.equal(every.output(network), expected)


def test_merged_and_summed_they_compute_the_same(every, tmp_path):
    merge_loras([every.folder / "run"], tmp_path / "merged", strengths=[0.5])
    half = every.sampled({"path": str(every.folder / "run"), "strength": 0.5})
    close(every.output(every.sampled(load=tmp_path / "merged")), every.output(half))
    sum_loras([every.folder / "run"] * 2, tmp_path / "sum", strengths=[0.25, 0.25], rank=RANK)
    close(every.output(every.sampled(load=tmp_path / "sum")), every.output(half))


def test_training_changes_the_adapters_alone(every):
    network = copy.deepcopy(every.network).train()
    trained = choose_trainable(network, {"not_trainable_prefixes": ["all"]})
    assert all(map(is_adapter, trained.names)) and len(trained.names) == 2 * (2 * (4 + 2 + 2) + 2)
    assert f"alpha {every.info.alpha:g} in 2 layers" in trained.description
    require_adapters_alone_learn(network)


def test_rslora_is_that_of_peft(every):
    """alpha / √r: adapters of the attention with the same matrices, in PEFT's own layers."""
    own = {"targets": ["attention"], "rank_stabilized": True}
    network = instantiate_from_config(every.config(**every.params | own).model["network_config"]).eval()
    load_network(network, every.folder / "base")
    peer = network_peer(every.plain)
    peer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=["to_q", "to_out.0"]))
    theirs = dict(peer.named_parameters())
    for name, parameter in network.named_parameters():
        if ".matrix_B." in name:
            parameter.data.zero_()
    for layer in range(2):
        attention = network.transformer.layers[layer].attention
        for module, adapter in (("to_q", attention.query_key_value), ("to_out.0", attention.dense)):
            for kind, matrix in (("A", adapter.matrix_A[0]), ("B", adapter.matrix_B[0])):
                nn.init.normal_(matrix, 0, 0.2)
                theirs[f"transformer_blocks.{layer}.attn1.{module}.lora_{kind}.default.weight"].data.copy_(matrix.data)
    close(every.output(network), every.output(peer))
    assert (every.output(network) - every.output(every.plain)).abs().max() > 1e-3


def test_strengths_by_layer_name_the_embeddings_too(every):
    lora = {"path": str(every.folder / "run"), "strength": {"0": 0, "1": 0}}
    with pytest.raises(
        ConfigError, match="(?s)adapts the projections of patches or text.*give the strength of 'embeddi"
    ):
        every.sampled(lora)
    network = every.sampled({**lora, "strength": {"0": 0, "1": 0, "embeddings": 1}})
    assert not any(".layers." in name for name in network.state_dict() if is_adapter(name))
    assert (every.output(network) - every.output(every.plain)).abs().max() > 1e-3
    network = every.sampled({**lora, "strength": {"0": 1, "1": 1, "embeddings": 0}})
    assert all(".layers." in name or ".adaLN_" in name for name in network.state_dict() if is_adapter(name))
    assert (every.output(network) - every.output(every.network)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"targets": ["mlp"]}, r"targets.*mlp.*give.*attention"),
        ({"targets": ["patch"]}, "targets is .*patch.*at least one of attention, ff, adaln"),
        ({"targets": ["ff", "ff"]}, "targets is .*each once"),
        ({"targets": ["ff"], "lora_dropout": 0.1}, "lora_dropout is 0.1; give 0 with targets beside attention"),
    ],
)
def test_what_does_not_work_is_refused(every, params, said):
    with pytest.raises(InputError, match=f"(?s){said}"), without_allocating():
        instantiate_from_config(every.config(**every.params | params).model["network_config"])


def test_adapters_in_sats_layout_are_described(every):
    found = inspect_checkpoint(every.folder / "run")
    assert found.kind == "SAT adapters (LoRA)" and found.lora.layers == (0, 1) and found.lora.alpha == 6


def test_shards_have_adapters_of_attention_alone():
    check_lora_params({"r": 4}, 2, 32, shards=2)
    with pytest.raises(
        InputError, match=r"targets is \[\"ff\"\], and args.model_parallel_size above 1.*attention only"
    ):
        check_lora_params({"r": 4, "targets": ["ff"]}, 2, 32, shards=2)


@pytest.mark.parametrize(
    ("model", "own"),
    [
        ("cogvideox_5b_i2v", {"patch_embed.pos_embedding"}),
        ("cogvideox1.5_5b_i2v", {f"ofs_embedding_linear_{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")}),
    ],
)
def test_image_models_for_comfyui_have_its_names_of_tables_and_ofs(tmp_path, model, own):
    """The learned table of positions, and the embedding of ``ofs``; both come back."""
    case = Case(tmp_path, model=model)
    names = {"without": ["vae", "text_encoder", "tokenizer", "scheduler"]}
    (part,) = pipeline_of(case.config(), **names, title="Tiny", style="comfyui").parts
    file = write_comfyui(part, tmp_path / "tiny")
    shared = {"patch_embed.proj", "patch_embed.text_proj", "time_embedding_linear_1", "time_embedding_linear_2"}
    shared |= {"norm_final", "norm_out.linear", "norm_out.norm", "proj_out"}
    rest = {n for n in load_file(file) if not n.startswith("blocks.") and n.rpartition(".")[0] not in shared}
    assert rest == own
    back, expected = read_source(file).tensors, case.plain.state_dict()
    assert back.keys() == expected.keys() - {*UNUSED_TABLES}
    for name, tensor in back.items():
        assert torch.equal(tensor.compute().view_as(expected[name]), expected[name]), name
