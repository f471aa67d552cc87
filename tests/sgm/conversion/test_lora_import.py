"""Import LoRA of other tools to the SAT layout, and export it. Tiny complete networks."""

import json
import logging
import math
import re

import pytest
import torch
import yaml
from diffusers import CogVideoXPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.diffusers_peer import network_peer, run_network_peer
from benchmarks.models import build_network
from sgm.config.load import load_config
from sgm.conversion.diffusers.verify import peer_rope
from sgm.conversion.lora import FILE, HEADER_KEY, export_lora
from sgm.conversion.lora_import import import_lora
from sgm.util import InputError, instantiate_from_config, without_allocating
from sgm.weights.adapters import is_adapter, read_adapter_info, with_adapters
from sgm.weights.checkpoint import load_network, save_network
from sgm.weights.files import find_weights, read_tensors, weights_digest
from sgm.weights.lora.foreign import find_lora, read_diffusers_lora
from tests.marks import thorough

PARTS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def model(tiny_model, tmp_path):
    """Return a function: number of layers → configuration of a tiny 5B model, whose base checkpoint is written."""

    def make(num_layers=2, *overrides):
        content = yaml.safe_load(tiny_model("dit_t2v_5b_lora").read_text())
        params = content["model"]["network_config"]["params"]
        params |= {"num_layers": num_layers, "hidden_size": 32}
        params["modules"]["pos_embed_config"]["params"]["hidden_size_head"] = 16
        del params["modules"]["lora_config"]
        content["args"]["load"] = str(tmp_path / "base")
        (tmp_path / "model.yaml").write_text(yaml.safe_dump(content))
        save_network(tmp_path / "base", 1, build_network(content["model"]["network_config"]), patch_size=2)
        return load_config([tmp_path / "model.yaml"], ["args.input_type=cli", *overrides], mode="inference")

    return make


def sat(config):
    """Return the network that sampling builds for ``args.load`` of `config`."""
    config = with_adapters(config)
    with without_allocating():
        network = instantiate_from_config(config.model["network_config"])
    load_network(network, config.args.load, allow_missing_adapters=False)
    return network.eval()


def peer_of(config):
    return network_peer(sat(config))


def adapt(peer, **options):
    """Give a transformer of diffusers random adapters of rank 4 and alpha 6."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(PARTS)} | options
    peer.add_adapter(LoraConfig(**settings))
    randomize(peer)
    return peer


def randomize(network):
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.2, generator=generator)


def save_as_diffusers(peer, folder, *, metadata=True):
    collated = _collate_lora_metadata({"transformer": peer}) if metadata else {}
    CogVideoXPipeline.save_lora_weights(folder, get_peft_model_state_dict(peer), **collated)


@torch.no_grad()
def output(network):
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 2, 16, 4, 6, generator=generator), torch.randn(1, 6, 24, generator=generator)
    if hasattr(network, "mixins"):
        return network(x, torch.tensor([500]), context)
    return run_network_peer(network, x, torch.tensor([500]), context, rope=peer_rope(network, x))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pairs(rank=4, *, layers=(0, 1), parts=PARTS, size=32):
    """Return LoRA matrices by the names of diffusers, without prefix."""
    generator = torch.Generator().manual_seed(3)
    modules = [f"transformer_blocks.{layer}.attn1.{part}" for layer in layers for part in parts]
    shapes = {"A": (rank, size), "B": (size, rank)}
    return {
        f"{module}.lora_{kind}.weight": torch.randn(shape, generator=generator)
        for module in modules
        for kind, shape in shapes.items()
    }


def written(path, tensors, *, header=None, prefix="transformer."):
    """Write a LoRA file; return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = None if header is None else {key: json.dumps(value) for key, value in header.items()}
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


# --- Names of other tools.


def flat(lead):
    """Names of kohya's scripts: underscores for dots."""

    def rename(name):
        module, side = name.rsplit(".lora_", 1)
        return lead + module.replace(".", "_") + {"A.weight": ".lora_down.weight", "B.weight": ".lora_up.weight"}[side]

    return rename


RENAMED = {
    "kohya": flat("lora_unet_"),
    "VideoX-Fun": flat("lora_unet__"),
    "flat-transformer": flat("lora_transformer_"),
    "flat-twice": flat("lora_unet_transformer_"),
    "ComfyUI": "diffusion_model.{}".format,
    "model": "model.diffusion_model.{}".format,
    "adapter-with-dash": lambda name: "base_model.model." + name.replace(".weight", ".cogvideox-lora.weight"),
    "adapter.with.dots": lambda name: "transformer." + name.replace(".weight", ".v1.0.weight"),
    "no-weight": lambda name: "transformer." + name.removesuffix(".weight"),
    "ddp-and-compiled": "module._orig_mod.{}".format,
    "compiled-blocks": lambda name: "base_model.model.transformer." + name.replace(".attn1", "._orig_mod.attn1"),
    "checkpointed": lambda name: "_fsdp_wrapped_module." + name.replace(".attn1", "._checkpoint_wrapped_module.attn1"),
    "old-diffusers": lambda name: (
        "transformer."
        + name.replace("attn1.", "attn1.processor.")
        .replace(".to_out.0", ".to_out")
        .replace(".lora_A", "_lora.down")
        .replace(".lora_B", "_lora.up")
    ),
    "linear-layer": lambda name: name.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora.up"),
}


@pytest.mark.parametrize("tool", RENAMED)
@pytest.mark.parametrize("alpha", [torch.tensor(16), torch.tensor([2.5]).half()])
def test_names_of_other_tools_are_brought_to_one_form(tmp_path, tool, alpha):
    plain = pairs(parts=PARTS)
    renamed = {RENAMED[tool](name): tensor for name, tensor in plain.items()}
    ends = (".lora_A", ".lora_down", ".lora.down", "_lora.down", ".lora_linear_layer.down")
    stems = {name[: name.index(end)] for name in renamed for end in ends if end in name}
    assert len(stems) == 8
    alphas = {f"{stem}.alpha": alpha.clone() for stem in stems}
    lora = read_diffusers_lora(written(tmp_path / "x.safetensors", renamed | alphas, prefix=""))
    assert lora.alpha == float(alpha) and lora.rank == 4
    for (layer, part), pair in lora.pairs.items():
        for kind, matrix in zip("AB", pair, strict=True):
            assert torch.equal(matrix.compute(), plain[f"transformer_blocks.{layer}.{part}.lora_{kind}.weight"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoder"),
        ("transformer_blocks.0.attn1.to_q.hada_w1_a", "LoHa"),
        ("base_model.model.transformer_blocks.0.attn1.to_q.oft_R.weight", "OFT"),
        ("lycoris_transformer_blocks_0_attn1_to_q.oft_blocks", "OFT"),
        ("base_model.model.transformer_blocks.0.ff.net.2.ia3_l", "IA"),
        ("base_model.model.transformer_blocks.0.ff.net.2.vera_lambda_d", "VeRA"),
        ("lycoris_transformer_blocks_0_norm1_norm.w_norm", "trained norm"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.lokr_t2", "middle of a convolution's LoKr"),
        ("transformer_blocks.0.attn1.to_q.lora_B.bias", "bias"),
        ("transformer_blocks.0.attn1.to_q.weight", "no matrix or alpha"),
        ("diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight", "another model"),
        ("lora_unet__transformer_blocks_0_attn1_norm_q.lora_down.weight", "adapts attn1_norm_q"),
        ("diffusion_model.transformer_blocks.0.attn1.to_q.lora_up.weight", "twice, under other names"),
        ("transformer.transformer_blocks.0.norm1.norm.lora_A.weight", "adapts norm1.norm"),
    ],
)
def test_a_name_that_cannot_be_taken_is_said_with_the_reason(tmp_path, name, reason):
    file = written(tmp_path / "x.safetensors", pairs())
    save_file(load_file(file) | {name: torch.zeros(32, 4)}, file)
    with pytest.raises(InputError, match=rf"(?s)(?=.*{re.escape(name)}).*{reason}"):
        read_diffusers_lora(file)


def test_a_file_named_as_a_shard_is_refused_beside_others(tmp_path):
    for index in (0, 1):
        torch.save({f"transformer.{n}": t for n, t in pairs().items()}, tmp_path / f"mp_rank_0{index}_model_states.pt")
    with pytest.raises(InputError, match="mp_rank_00_model_states.pt is one of 2 shards .*another tool is one file"):
        read_diffusers_lora(tmp_path / "mp_rank_00_model_states.pt")


def test_alpha_must_be_one_number(tmp_path):
    sparse = {"transformer_blocks.0.attn1.to_q.alpha": torch.tensor([4.0]).to_sparse()}
    torch.save(pairs() | sparse, tmp_path / "x.bin")
    with pytest.raises(InputError, match="to_q.alpha is sparse or quantized; expected one number"):
        read_diffusers_lora(tmp_path / "x.bin")
    alpha = {"transformer_blocks.0.attn1.to_q.alpha": torch.ones(2)}
    with pytest.raises(InputError, match=r"to_q.alpha has the shape \(2,\); expected one number"):
        read_diffusers_lora(written(tmp_path / "x.safetensors", pairs() | alpha))
    for value in (torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor(True)):
        alpha = {"transformer_blocks.0.attn1.to_q.alpha": value}
        with pytest.raises(InputError, match=r"to_q.alpha is (nan|inf|True); expected one number"):
            read_diffusers_lora(written(tmp_path / "x.safetensors", pairs() | alpha))
    header = {HEADER_KEY: {"transformer.lora_alpha": "much"}}
    with pytest.raises(InputError, match="lora_alpha is 'much' in its header"):
        read_diffusers_lora(written(tmp_path / "x.safetensors", pairs(), header=header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.fill_(float("nan")), "to_q.lora_A.weight is not finite"),
        (torch.Tensor.int, r"to_q.lora_A.weight holds integers \(int32\)"),
        (torch.Tensor.bool, r"to_q.lora_A.weight is boolean"),
    ],
)
def test_what_is_no_weight_is_refused_by_name(model, tmp_path, change, message):
    tensors = pairs()
    name = "transformer_blocks.0.attn1.to_q.lora_A.weight"
    file = written(tmp_path / "x.safetensors", tensors | {name: change(tensors[name])})
    with pytest.raises(InputError, match=message):
        import_lora(model(), file, tmp_path / "sat")
    assert not (tmp_path / "sat").exists()


def test_the_style_of_comfyui_has_its_names_and_alphas(model, tmp_path):
    import_lora(model(), written(tmp_path / "x.safetensors", pairs()), tmp_path / "sat", alpha=6)
    file = export_lora(tmp_path / "sat", tmp_path / "comfy", style="comfyui")
    tensors = load_file(file)
    block = "diffusion_model.blocks.1.attn_out"
    assert {f"{block}.lora_A.weight", f"{block}.lora_B.weight", f"{block}.alpha"} <= tensors.keys()
    assert len(tensors) == 2 * 4 * 3 and all(n.startswith("diffusion_model.") for n in tensors)
    save_file(tensors, file)  # without the header, as tools that rewrite it do
    assert read_diffusers_lora(file).alpha == 6
    import_lora(model(), file, tmp_path / "back")
    before, after = (read_tensors(find_weights(tmp_path / name)) for name in ("sat", "back"))
    assert equal(before, after)


# --- Round trips.


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["to_q", "to_v"]},
        thorough({}),
        thorough({"layers_to_transform": [1], "layers_pattern": "transformer_blocks"}),
    ],
)
def test_a_diffusers_file_computes_the_same_in_sat_and_comes_back_unchanged(model, tmp_path, options):
    config = model()
    peer = adapt(peer_of(config), **options)
    save_as_diffusers(peer, tmp_path / "lora")
    import_lora(config, tmp_path / "lora", tmp_path / "sat")
    adapted = model(2, f"args.load={tmp_path / 'sat'}")
    ours = output(sat(adapted))
    torch.testing.assert_close(ours, output(peer), rtol=0, atol=1e-5)
    assert (ours - output(sat(config))).abs().max() > 1e-3
    file = export_lora(tmp_path / "sat", tmp_path / "back")
    assert equal(load_file(file), load_file(tmp_path / "lora" / FILE))
    with safe_open(file, framework="pt") as back, safe_open(tmp_path / "lora" / FILE, framework="pt") as there:
        back, there = (json.loads(opened.metadata()[HEADER_KEY]) for opened in (back, there))
    assert [back[f"transformer.{name}"] for name in ("r", "lora_alpha")] == [4, 6]
    assert [there[f"transformer.{name}"] for name in ("r", "lora_alpha")] == [4, 6]


def test_a_peft_folder_computes_the_same_in_sat_and_comes_back_unchanged(model, tmp_path):
    config = model()
    adapted = get_peft_model(peer_of(config), LoraConfig(r=4, lora_alpha=10, target_modules=list(PARTS)))
    randomize(adapted)
    adapted.save_pretrained(tmp_path / "lora")
    import_lora(config, tmp_path / "lora", tmp_path / "sat")
    ours = output(sat(model(2, f"args.load={tmp_path / 'sat'}")))
    torch.testing.assert_close(ours, output(adapted.base_model.model), rtol=0, atol=1e-5)
    file = export_lora(tmp_path / "sat", tmp_path / "back", key_prefix="base_model.model.")
    assert equal(load_file(file), load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert read_diffusers_lora(file).alpha == 10


@pytest.mark.parametrize(
    ("num_layers", "layers"), [pytest.param(30, None, marks=pytest.mark.slow), thorough(42, [0, 41])]
)
def test_any_depth_comes_back_unchanged(model, tmp_path, num_layers, layers):
    config = model(num_layers)
    tensors = pairs(layers=layers or range(num_layers))
    file = written(tmp_path / "lora.safetensors", tensors, header={HEADER_KEY: {"transformer.lora_alpha": 2}})
    import_lora(config, file, tmp_path / "sat")
    assert read_adapter_info(tmp_path / "sat").layers == tuple(layers or range(num_layers))
    assert equal(load_file(export_lora(tmp_path / "sat", tmp_path / "back")), load_file(file))
    sat(model(num_layers, f"args.load={tmp_path / 'sat'}"))


def test_the_folder_holds_adapters_alone_and_names_its_base(model, tmp_path):
    config = model()
    file = written(tmp_path / "lora.safetensors", pairs(), header={HEADER_KEY: {"transformer.lora_alpha": 2}})
    assert import_lora(config, file, tmp_path / "sat") == tmp_path / "sat" / "1" / "mp_rank_00_model_states.pt"
    assert (tmp_path / "sat" / "latest").read_text() == "1\n"
    tensors = read_tensors(find_weights(tmp_path / "sat"))
    assert len(tensors) == 16 and all(is_adapter(name) for name in tensors)
    info = read_adapter_info(tmp_path / "sat")
    assert (info.rank, info.alpha, info.layers, info.base) == (4, 2, (0, 1), str(tmp_path / "base"))
    assert info.base_digest == weights_digest(find_weights(tmp_path / "base"))


def test_another_base_is_recorded(model, tmp_path):
    config = model(2, "args.load=null")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    file = written(tmp_path / "lora.safetensors", pairs())
    with pytest.raises(InputError, match="args.load names no base.*--transformer_ckpt_path"):
        import_lora(config, file, tmp_path / "sat")
    import_lora(config, file, tmp_path / "sat", base=tmp_path / "elsewhere")
    assert read_adapter_info(tmp_path / "sat").base == str(tmp_path / "elsewhere")


# --- Names and files.


def renamed(tensors, side_a, side_b):
    return {name.replace("lora_A", side_a).replace("lora_B", side_b): t for name, t in tensors.items()}


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model.", "base_model.model.transformer."])
@pytest.mark.parametrize(
    "sides",
    [
        ("lora_A", "lora_B"),
        ("lora_A.default", "lora_B.default"),
        ("lora.down", "lora.up"),
        ("lora_down", "lora_up"),
        ("lora_down.default", "lora_up.default"),
    ],
)
def test_names_of_all_tools_mean_the_same(tmp_path, prefix, sides):
    tensors = pairs()
    lora = read_diffusers_lora(written(tmp_path / "x.safetensors", renamed(tensors, *sides), prefix=prefix))
    assert len(lora.pairs) == 8
    for (layer, part), pair in lora.pairs.items():
        for kind, matrix in zip("AB", pair, strict=True):
            assert torch.equal(matrix.compute(), tensors[f"transformer_blocks.{layer}.{part}.lora_{kind}.weight"])


def test_pickled_files_are_read(tmp_path):
    torch.save({f"transformer.{name}": tensor for name, tensor in pairs().items()}, tmp_path / "adapter_model.bin")
    assert read_diffusers_lora(tmp_path).rank == 4


def test_the_file_of_a_folder_is_found_or_asked_for(tmp_path):
    with pytest.raises(InputError, match=f"expected one LoRA file in .*{FILE}, and there are none"):
        find_lora(tmp_path)
    mine = written(tmp_path / "mine.safetensors", pairs())
    assert find_lora(tmp_path) == find_lora(mine) == mine
    written(tmp_path / "other.safetensors", pairs())
    with pytest.raises(InputError, match="several: mine.safetensors, other.safetensors; give the file itself"):
        find_lora(tmp_path)
    assert find_lora(written(tmp_path / FILE, pairs()).parent).name == FILE
    written(tmp_path / "adapter_model.safetensors", pairs())
    with pytest.raises(InputError, match=f"several: {FILE}, adapter_model.safetensors"):
        find_lora(tmp_path)
    with pytest.raises(InputError, match="there is no LoRA at"):
        find_lora(tmp_path / "nowhere")


# --- Alpha.


def with_alphas(tensors, value=lambda module: 8.0):
    modules = {name.partition(".lora_")[0] for name in tensors}
    return tensors | {f"{module}.alpha": torch.tensor(value(module)) for module in modules}


def test_alpha_is_found_wherever_tools_write_it(tmp_path):
    assert read_diffusers_lora(written(tmp_path / "a.safetensors", with_alphas(pairs()))).alpha == 8
    header = {HEADER_KEY: {"transformer.r": 4, "transformer.lora_alpha": 2.5}}
    assert read_diffusers_lora(written(tmp_path / "b.safetensors", pairs(), header=header)).alpha == 2.5
    header = {"lora_config": {"r": 4, "lora_alpha": 16, "target_modules": "attn.*"}}  # finetrainers
    assert read_diffusers_lora(written(tmp_path / "c.safetensors", pairs(), header=header)).alpha == 16
    file = written(tmp_path / "d.safetensors", pairs())
    assert read_diffusers_lora(file, alpha=32).alpha == 32
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 9}))
    assert read_diffusers_lora(file).alpha == read_diffusers_lora(file, alpha=9).alpha == 9


def test_what_a_header_says_of_the_text_encoder_is_left_out(tmp_path):
    header = {"transformer.r": 4, "transformer.lora_alpha": 8, "text_encoder.r": 2, "text_encoder.lora_alpha": 32}
    for order in (header, dict(reversed(header.items()))):
        assert read_diffusers_lora(written(tmp_path / "x.safetensors", pairs(), header={HEADER_KEY: order})).alpha == 8


def test_without_any_word_alpha_is_the_rank_and_the_log_says_so(tmp_path, caplog):
    file = written(tmp_path / "x.safetensors", pairs(rank=8))
    with caplog.at_level(logging.INFO, logger="sgm"):
        assert read_diffusers_lora(file).alpha == 8
    assert "does not record alpha: the rank, 8, is used, as in diffusers" in caplog.text


def test_alphas_that_differ_are_refused(tmp_path):
    header = {HEADER_KEY: {"transformer.lora_alpha": 2}}
    file = written(tmp_path / "x.safetensors", with_alphas(pairs()), header=header)
    with pytest.raises(InputError, match=r"differs between sources: 2.0 in its header .*, 8.0 in its .alpha tensors"):
        read_diffusers_lora(file)
    file = written(tmp_path / "y.safetensors", pairs(), header=header)
    with pytest.raises(InputError, match=r"2.0 in its header .*, 4 in --alpha; leave --alpha out"):
        read_diffusers_lora(file, alpha=4)
    uneven = with_alphas(pairs(), lambda module: 1.0 if module.endswith("to_k") else 2.0)
    with pytest.raises(InputError, match=r"several alphas, .*: 1: transformer_blocks.0.attn1.to_k, .*; 2: "):
        read_diffusers_lora(written(tmp_path / "z.safetensors", uneven))
    some = {name: t for name, t in with_alphas(pairs()).items() if not name.endswith("0.attn1.to_k.alpha")}
    with pytest.raises(InputError, match=r"4: transformer_blocks.0.attn1.to_k; 8: "):
        read_diffusers_lora(written(tmp_path / "some.safetensors", some))
    for alpha in (0.0, -1.0, math.inf):
        with pytest.raises(InputError, match="expected a number above 0"):
            read_diffusers_lora(written(tmp_path / "n.safetensors", pairs()), alpha=alpha)


def test_rslora_is_a_larger_alpha(model, tmp_path):
    config = model()
    peer = adapt(peer_of(config), use_rslora=True)
    save_as_diffusers(peer, tmp_path / "lora")
    assert read_diffusers_lora(tmp_path / "lora").alpha == 6 * 2
    import_lora(config, tmp_path / "lora", tmp_path / "sat")
    ours = output(sat(model(2, f"args.load={tmp_path / 'sat'}")))
    torch.testing.assert_close(ours, output(peer), rtol=0, atol=1e-5)
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "use_rslora": False}))
    with pytest.raises(
        InputError, match="use_rslora differs between sources: True in its header.*False in adapter_config"
    ):
        read_diffusers_lora(tmp_path / "lora")


# --- What cannot be expressed.


@pytest.mark.parametrize(
    ("tensors", "header", "said"),
    [
        (pairs(parts=("to_q", "ff")), None, r"adapts attn1.ff; SAT has adapters on attn1.to_q, .* only"),
        (
            pairs() | {f"transformer_blocks.0.attn1.norm_q.lora_{kind}.weight": torch.ones(4, 4) for kind in "AB"},
            None,
            "adapts attn1.norm_q;",
        ),
        (
            pairs() | {"proj_out.lora_A.weight": torch.ones(4, 32)},
            None,
            "proj_out.lora_A.weight cannot be taken: .*no transformer_blocks",
        ),
        (pairs(4, layers=[0]) | pairs(8, layers=[1]), None, r"several ranks, .*: 4: .*blocks.0.*; 8: .*blocks.1"),
        (
            pairs() | {"transformer_blocks.0.attn1.to_q.lora_magnitude_vector": torch.ones(32)},
            None,
            "magnitudes of DoRA on .*to_q and none on .*to_k",
        ),
        (pairs(), {HEADER_KEY: {"transformer.use_dora": True}}, "is DoRA according to its header.*no magnitudes"),
        (
            pairs(parts=("to_q",), layers=[0]) | {"transformer_blocks.0.attn1.to_q.dora_scale": torch.ones(1, 32)},
            None,
            r"dora_scale has the shape \(1, 32\), expected 32 magnitudes, one for each output.*wd_on_output",
        ),
        (
            pairs(),
            {HEADER_KEY: {"transformer.r": 8}},
            "has the rank 8 according to its header .*, and its matrices have 4",
        ),
        (
            pairs(),
            {HEADER_KEY: {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"to_q": 8}}},
            r"several alphas according to its header .*: 4, and \{\"to_q\": 8\}",
        ),
        (
            pairs(),
            {HEADER_KEY: {"transformer.alpha_pattern": {"to_q": 8}}},
            r"several alphas according to its header .*: none for all, and \{\"to_q\": 8\}",
        ),
        (
            pairs(),
            {HEADER_KEY: {"transformer.lora_alpha": 4, "lora_alpha": 8}},
            "lora_alpha is 4 and 8, under several prefixes, in its header",
        ),
        (pairs(), {HEADER_KEY: {"transformer.lora_alpha": float("nan")}}, "alpha is nan in its header"),
        (pairs(rank=0), None, "has empty matrices of transformer_blocks.0.attn1.to_"),
        (pairs(), {HEADER_KEY: {"transformer.init_lora_weights": "pissa_niter_4"}}, "init_lora_weights: pissa_niter_4"),
        (
            {name: t for name, t in pairs().items() if "1.attn1.to_k.lora_B" not in name},
            None,
            "lacks lora_B of transformer_blocks.1.attn1.to_k",
        ),
        (
            pairs() | {"transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(32, 2)},
            None,
            r"lora_A \(4, 32\) and lora_B \(32, 2\) of transformer_blocks.0.attn1.to_q have no rank in common",
        ),
        (
            pairs() | {"transformer_blocks.0.attn1.to_q.lora_A.second.weight": torch.ones(4, 32)},
            None,
            "twice, under other names",
        ),
    ],
)
def test_what_sat_cannot_express_is_refused(model, tmp_path, tensors, header, said):
    config = model()
    file = written(tmp_path / "x.safetensors", tensors, header=header)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=said):
        import_lora(config, file, tmp_path / "sat")
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_configuration_of_peft_is_refused(tmp_path):
    written(tmp_path / "adapter_model.safetensors", pairs())
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="adapter_config.json cannot be read"):
        read_diffusers_lora(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([1], r"holds \[1\]; expected settings by name"),
        (None, "holds null; expected settings by name"),
        ({"lora_alpha": [8]}, r"lora_alpha is \[8\] in .*; expected a number above 0"),
        ({"lora_alpha": True}, "lora_alpha is true in .*; expected a number above 0"),
        ({"lora_alpha": 10**400}, r"lora_alpha is 10*\ \.\.\. 0* in .*; expected a number above 0"),
        ({"lora_alpha": 8, "use_rslora": "false"}, "use_rslora is 'false' in .*; expected true or false"),
        ({"lora_alpha": 8, "alpha_pattern": [1]}, r"alpha_pattern is \[1\] in .*; expected a mapping"),
        ({"lora_alpha": 8, "r": "4"}, "has the rank '4' according to"),
        ({"lora_alpha": 8, "peft_type": "VERA"}, "is VERA according to .*; train LoRA, DoRA or LoKr"),
        ({"lora_alpha": 8, "layer_replication": [[0, 1], [0, 1]]}, "was trained with layer_replication"),
        ({"lora_alpha": 8, "use_qalora": True}, "was trained with use_qalora"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(tmp_path, config, said):
    file = written(tmp_path / "adapter_model.safetensors", pairs())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        read_diffusers_lora(file)
    (tmp_path / "adapter_config.json").unlink()
    if config is not None:  # in the header, null is no entry
        with pytest.raises(InputError, match=said):
            read_diffusers_lora(written(file, pairs(), header={HEADER_KEY: config}))


def test_a_header_that_is_not_json_names_its_entry(tmp_path):
    save_file(pairs(), file := tmp_path / "x.safetensors", metadata={HEADER_KEY: "{{"})
    with pytest.raises(InputError, match=f"the entry '{HEADER_KEY}' of its header, line 1: is not JSON"):
        read_diffusers_lora(file)


def test_a_file_without_tensors_says_so(tmp_path):
    with pytest.raises(InputError, match="holds no tensors; copy or save it again"):
        read_diffusers_lora(written(tmp_path / "x.safetensors", {}))


def test_the_model_must_be_that_of_the_lora(model, tmp_path):
    config = model()
    deep = written(tmp_path / "deep.safetensors", pairs(layers=[0, 2]))
    with pytest.raises(InputError, match="adapts layer 2, and the model of .*model.yaml has layers 0 to 1"):
        import_lora(config, deep, tmp_path / "sat")
    wide = written(tmp_path / "wide.safetensors", pairs(size=48))
    with pytest.raises(InputError, match=r"0.attn1.to_q has the shape \(4, 48\), and the model needs \(4, 32\)"):
        import_lora(config, wide, tmp_path / "sat")
    assert not (tmp_path / "sat").exists()


def test_the_base_must_be_that_of_the_model_and_without_lora(model, golden, tmp_path):
    config = model()
    file = written(tmp_path / "x.safetensors", pairs())
    with pytest.raises(InputError, match="does not fit the configured network"):
        import_lora(config, file, tmp_path / "sat", base=golden / "dit_t2v_2b" / "transformer")
    with pytest.raises(InputError, match="holds LoRA of its own.*tools/merge_lora_weight.py"):
        import_lora(config, file, tmp_path / "sat", base=golden / "dit_t2v_5b_lora" / "transformer")
    with pytest.raises(InputError, match="there is no checkpoint at"):
        import_lora(config, file, tmp_path / "sat", base=tmp_path / "nowhere")
    recording = written(tmp_path / "y.safetensors", pairs())
    save_file(load_file(recording), recording, metadata={"base_digest": "0" * 64, "ss_sd_model_name": "theirs"})
    with pytest.raises(InputError, match="on another base.*records 000000000000 for 'theirs'.*--any_base"):
        import_lora(config, recording, tmp_path / "sat")
    assert not (tmp_path / "sat").exists()
    import_lora(config, recording, tmp_path / "sat", any_base=True)
    assert read_adapter_info(tmp_path / "sat").base_digest == weights_digest(find_weights(tmp_path / "base"))


def test_modules_without_adapters_are_logged(model, tmp_path, caplog):
    file = written(tmp_path / "x.safetensors", pairs(parts=("to_q", "to_v")))
    with caplog.at_level(logging.INFO, logger="sgm"):
        import_lora(model(), file, tmp_path / "sat")
    assert "no adapters on transformer_blocks.0.attn1.to_k, transformer_blocks.0.attn1.to_out.0" in caplog.text


def test_nothing_is_overwritten_and_nothing_half_written_is_left(model, tmp_path, monkeypatch):
    config = model()
    file = written(tmp_path / "x.safetensors", pairs())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for path in (file, tmp_path / "nowhere"):  # checked before anything is read
        with pytest.raises(InputError, match="full exists already; nothing is overwritten"):
            import_lora(config, path, tmp_path / "full")
    before = sorted(tmp_path.iterdir())

    def fail(*_args, **_options):
        raise OSError("disk on fire")

    monkeypatch.setattr("sgm.weights.checkpoint.write_latest", fail)
    with pytest.raises(InputError, match="disk on fire"):
        import_lora(config, file, tmp_path / "sat")
    assert sorted(tmp_path.iterdir()) == before
