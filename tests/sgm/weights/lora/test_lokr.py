"""LoKr beside PEFT. Tiny complete networks."""

import copy
import json

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoKrConfig, get_peft_model
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file, save_file
from torch import nn

from sgm.config.load import ConfigError
from sgm.conversion.diffusers.from_sat import pipeline_of
from sgm.conversion.inspection import inspect_checkpoint
from sgm.conversion.lora import export_lora
from sgm.conversion.lora_cogkit import export_cogkit_lora
from sgm.conversion.lora_import import import_lora
from sgm.conversion.lora_merge import average_loras, merge_loras, sum_loras
from sgm.modules.lora import LoraLinear, _use_kronecker, use_adapters
from sgm.training.optim.trainable import choose_trainable
from sgm.util import InputError, instantiate_from_config
from sgm.weights.adapters import check_lora_params, is_adapter, read_adapter_info, with_adapters
from sgm.weights.checkpoint import load_network
from sgm.weights.files import find_weights, read_tensors
from sgm.weights.lora.foreign import read_diffusers_lora
from sgm.weights.lora.lokr import KINDS, factors_of, in_parts, kronecker, product, shapes_of
from tests.sgm.weights.lora.test_kinds import Case, close, require_adapters_alone_learn

TARGETS = ("attention", "ff", "adaln", "text")


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """LoKr on every projection that can have it: w2 is whole in attention, and of two matrices in the MLP."""
    return Case(tmp_path_factory.mktemp("lokr"), targets=TARGETS, kind="lokr")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A LoRA and a DoRA on the same base."""
    return [Case(tmp_path_factory.mktemp(kind), kind=kind).folder / "run" for kind in ("lora", "dora")]


def test_factors_are_those_of_peft():
    for size in (1, 7, 12, 64, 127, 128, 1920, 3072, 12288):
        for factor in (-1, 1, 2, 4, 5, 8, 16, 64, 5000):
            assert factors_of(size, factor) == factorization(size, factor), (size, factor)


def test_the_product_is_that_of_the_whole_matrix():
    torch.manual_seed(0)
    x, w1, a, b = torch.randn(2, 3, 12), torch.randn(5, 3), torch.randn(6, 2), torch.randn(2, 4)
    for w2 in ((a, b), (a @ b,)):
        torch.testing.assert_close(product(x, w1, *w2), x @ kronecker(1.0, w1, *w2).T, rtol=1e-5, atol=1e-5)
    assert kronecker(0.5, w1, a, b).shape == (30, 12)


@pytest.mark.parametrize(("rank", "factor"), [(2, -1), (8, -1), (2, 2)])
def test_outputs_and_gradients_are_those_of_peft(rank, factor):
    torch.manual_seed(0)
    linear = nn.Linear(32, 24)
    config = LoKrConfig(r=rank, alpha=3, decompose_factor=factor, target_modules=["0"])
    peer = get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)
    linear.requires_grad_(False)
    own = nn.Sequential(LoraLinear(nn.Linear, 1, 32, 24, rank, 3, original_obj=linear))
    _use_kronecker(own[0], factor)
    use_adapters(own)
    layer, ours, theirs = peer.base_model.model[0], [], []
    for kind in (kind for kind in KINDS if hasattr(own[0], kind)):
        ours.append(getattr(own[0], kind)[0])
        theirs.append(getattr(layer, kind)["default"])
        nn.init.normal_(ours[-1], 0, 0.5)
        theirs[-1].data.copy_(ours[-1].data)
    x, results = torch.randn(2, 5, 32, requires_grad=True), []
    for module, parameters in ((own, ours), (peer, theirs)):
        out = module(x)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, *parameters))))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "storage"), [(torch.float32, None), (torch.bfloat16, "int8"), (torch.float32, "nf4")]
)
def test_before_training_every_bit_is_that_of_the_base(every, dtype, storage):
    outputs = []
    for section in (every.section, every.config(**every.params).model["network_config"]):
        network = instantiate_from_config(section)
        given = torch.Generator().manual_seed(3)
        load_network(network, every.folder / "base", dtype=dtype, storage=storage, generator=given)
        outputs.append(every.output(network.to(dtype).eval()))
    assert torch.equal(*outputs)
    first = network.transformer.layers[0].mlp.dense_h_to_4h
    assert first.lokr_w1[0].any() and first.lokr_w2_a[0].any() and not first.lokr_w2_b[0].any()


def test_the_file_says_what_it_is(every):
    assert read_adapter_info(every.folder / "run") == every.info
    assert (every.info.kind, every.info.factor) == ("lokr", -1)
    found = inspect_checkpoint(every.folder / "run")
    assert found.kind == "SAT adapters (LoKr)" and found.lora.rank == 4 and found.lora.layers == (0, 1)
    assert torch.equal(every.output(every.sampled(load=every.folder / "run")), every.output(every.network))
    assert (every.output(every.network) - every.output(every.plain)).abs().max() > 1e-2


@pytest.mark.parametrize(("rank", "factor"), [(4, -1), (2, 2)])
def test_a_lokr_of_peft_is_taken(every, tmp_path, rank, factor):
    modules = ["to_q", "ff.net.0.proj", "norm2.linear"]
    config = LoKrConfig(r=rank, alpha=3, decompose_factor=factor, target_modules=modules)
    peer = get_peft_model(every.pipe().transformer, config)
    given = torch.Generator().manual_seed(4)
    for name, parameter in peer.named_parameters():
        if "lokr_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=given)
    peer.save_pretrained(str(tmp_path / "peft"))
    expected = every.output(peer)
    assert (expected - every.output(every.plain)).abs().max() > 1e-2
    close(every.output(every.sampled({"path": str(tmp_path / "peft")})), expected)
    found = inspect_checkpoint(tmp_path / "peft")
    assert found.kind == "LoKr of PEFT" and found.lora.kind == "lokr" and found.lora.layers == (0, 1)
    import_lora(every.config(), tmp_path / "peft", tmp_path / "sat")
    close(every.output(every.sampled(load=tmp_path / "sat")), expected)
    merge_loras([tmp_path / "peft"], tmp_path / "merged", base=every.folder / "base")
    close(every.output(every.sampled(load=tmp_path / "merged")), expected)


@pytest.mark.parametrize(
    ("style", "name"),
    [
        ("kohya", "lora_unet_transformer_blocks_1_ff_net_0_proj.lokr_w2_a"),
        ("comfyui", "diffusion_model.blocks.1.ff_proj.lokr_w2_a"),
    ],
)
def test_an_export_is_read_as_it_was(every, tmp_path, style, name):
    file = export_lora(every.folder / "run", tmp_path / "out", style=style)
    tensors = load_file(file)
    assert tensors[name].shape == (16, 4) and float(tensors[name.replace("lokr_w2_a", "alpha")]) == every.info.alpha
    import_lora(every.config(), file, tmp_path / "back")
    close(every.output(every.sampled(load=tmp_path / "back")), every.output(every.network))
    assert inspect_checkpoint(file).kind.startswith("LoKr ")


@pytest.mark.parametrize("style", ["kohya", "comfyui"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_names_of_kohya_hold_the_other_kinds_too(others, every, tmp_path, style, kind):
    run = others[("lora", "dora").index(kind)]
    import_lora(every.config(), export_lora(run, tmp_path / "out", style=style), tmp_path / "back")
    ours, theirs = (read_tensors(find_weights(folder)) for folder in (run, tmp_path / "back"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_diffusers_cannot_load_is_said_at_export(every, tmp_path):
    with pytest.raises(InputError, match="(?s)LoKr, which diffusers cannot load.*merge_lora_weight.*--style comfyui"):
        export_lora(every.folder / "run", tmp_path / "out")
    with pytest.raises(InputError, match="is LoKr, and CogKit loads LoRA alone; merge it .*--style comfyui"):
        export_cogkit_lora(every.folder / "run", tmp_path / "out")
    config = every.config([f"args.load={every.folder / 'run'}"], **every.params)
    names = ["vae", "text_encoder", "tokenizer", "scheduler"]
    with pytest.raises(InputError, match="LoKr, which diffusers cannot load"):
        pipeline_of(config, without=names, adapters="keep")
    pipeline_of(config, without=names).write(tmp_path / "merged")
    peer = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "merged", subfolder="transformer")
    close(every.output(peer), every.output(every.network))


def test_strength_scales_what_it_adds(every, others, tmp_path):
    lora = {"path": str(every.folder / "run")}
    assert torch.equal(every.output(every.sampled(lora)), every.output(every.network))
    assert torch.equal(every.output(every.sampled(lora | {"strength": 0})), every.output(every.plain))
    merge_loras([every.folder / "run"], tmp_path / "merged", strengths=[0.5])
    half = every.sampled(lora | {"strength": 0.5})
    close(every.output(half), every.output(every.sampled(load=tmp_path / "merged")))
    by_layer = every.sampled(lora | {"strength": {"0": 1, "1": 0, "embeddings": 1}})
    assert not any(".layers.1." in name for name in by_layer.state_dict() if is_adapter(name))
    assert (every.output(by_layer) - every.output(every.network)).abs().max() > 1e-3
    late = every.sampled(lora | {"schedule": [[0.0, 0.0], [0.5, 1.0]]})
    assert torch.equal(every.output(late), every.output(every.plain))
    merge_loras([every.folder / "run"], tmp_path / "none", strengths=[0])
    found = read_tensors(find_weights(tmp_path / "none"))
    base = every.plain.state_dict()
    assert all(torch.equal(found[f"model.diffusion_model.{n}"].view_as(t), t) for n, t in base.items())


def test_all_kinds_are_merged_together(every, others, tmp_path):
    runs, strengths = [every.folder / "run", *others, every.folder / "run"], [0.5, 0.7, -0.4, 0.2]
    merge_loras(runs, tmp_path / "all", strengths=strengths)
    alone = []
    for number, (run, strength) in enumerate(zip(runs, strengths, strict=True)):
        merge_loras([run], tmp_path / str(number), strengths=[strength])
        alone.append(read_tensors(find_weights(tmp_path / str(number))))
    whole = read_tensors(find_weights(tmp_path / "all"))
    for name, base in every.plain.state_dict().items():
        full = f"model.diffusion_model.{name}"
        expected = base + sum(each[full].view_as(base) - base for each in alone)
        torch.testing.assert_close(whole[full].view_as(base), expected, rtol=0, atol=2e-6)


def test_what_cannot_be_combined_is_refused(every, others, tmp_path):
    both = [{"path": str(every.folder / "run")}, {"path": str(others[0])}]
    with pytest.raises(
        ConfigError, match="LoKr beside others.*sampled alone only(?s:.*)merge_lora_weight.py takes all"
    ):
        every.sampled(*both)
    with pytest.raises(InputError, match="is LoKr, whose change of a weight has no small rank"):
        sum_loras([every.folder / "run"], tmp_path / "sum")
    average_loras([every.folder / "run"] * 2, tmp_path / "soup")
    close(every.output(every.sampled(load=tmp_path / "soup")), every.output(every.network))


def test_training_changes_the_matrices_alone(every):
    network = copy.deepcopy(every.network).train()
    trained = choose_trainable(network, {"not_trainable_prefixes": ["all"]})
    assert "LoKr of rank 4" in trained.description and all(map(is_adapter, trained.names))
    require_adapters_alone_learn(network)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"factor": 0, "kind": "lokr"}, "factor is 0; give a number above 0, or -1"),
        ({"factor": 4}, "factor is 4; give none: it is of kind: lokr"),
        ({"kind": "lokr", "targets": ["attention", "patch"]}, "targets is .*patch.*give others than patch"),
    ],
)
def test_parameters_without_meaning_are_refused(params, said):
    with pytest.raises(InputError, match=said):
        check_lora_params({"r": 4, **params}, 2, 32)


def test_what_does_not_fit_is_refused(every, tmp_path):
    with pytest.raises(InputError, match="kind is lokr, which is for whole weights, and args.model_parallel_size"):
        check_lora_params({"r": 4, "kind": "lokr"}, 2, 32, shards=2)
    with pytest.raises(ConfigError, match=r"factor \(.*: is 2, but the adapters in .* were trained with -1"):
        with_adapters(every.config([f"args.load={every.folder / 'run'}"], **every.params, factor=2))
    file = export_lora(every.folder / "run", tmp_path / "out", style="kohya")
    tensors, name = load_file(file), "lora_unet_transformer_blocks_0_attn1_to_q"

    def refused(said, changed):
        save_file(changed, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match=said):
            import_lora(every.config(), tmp_path / "x.safetensors", tmp_path / "y")

    refused("to_q only lokr_w1; copy", {n: t for n, t in tensors.items() if n != f"{name}.lokr_w2"})
    other = name.replace("_0_", "_7_")
    for module in (name, other):
        refused("beside LoKr; save one adapter", tensors | {f"{module}.lora_up.weight": torch.ones(2, 2)})
    refused("has of transformer_blocks.7.attn1.to_q only alpha", tensors | {f"{other}.alpha": torch.ones(())})
    for kind in ("lokr_w1", "lokr_w2"):
        pair = {f"{name}.{kind}_a": torch.ones(8, 1), f"{name}.{kind}_b": torch.ones(2, 8)}
        own = {n: t for n, t in tensors.items() if n != f"{name}.{kind}"} | pair
        refused(rf"{kind}_a \(8, 1\) and {kind}_b \(2, 8\) of .*to_q have no rank in common", own)
    refused("lokr_t2 cannot be taken", tensors | {f"{name}.lokr_t2": torch.ones(2, 2)})
    refused("expected two axes", tensors | {f"{name}.lokr_w2": torch.ones(8, 8, 1, 1)})
    refused(
        "no one factor gives", tensors | {f"{name}.lokr_w1": torch.ones(16, 2), f"{name}.lokr_w2": torch.ones(2, 16)}
    )
    refused(
        "and the model needs",
        {n: torch.ones(8, 8) if n.endswith("to_q.lokr_w2") else t for n, t in tensors.items()}
        | {f"{name}.lokr_w1": torch.ones(8, 4), f"{name}.lokr_w2": torch.ones(8, 8)},
    )
    refused("expected two axes, .* of 1 or more", tensors | {f"{name}.lokr_w1": torch.ones(0, 8)})
    patch = {f"lora_unet_patch_embed_proj.{kind}": torch.ones(8, 8) for kind in ("lokr_w1", "lokr_w2")}
    refused("LoKr on patch_embed.proj, which is not supported", tensors | patch)
    with pytest.raises(InputError, match="is not lokr_w1 with lokr_w2 or both"):
        in_parts({"transformer.layers.0.attention.dense.lokr_w1.0": torch.ones(1, 1)})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 8, "alpha": 4}, "has the rank 8 according to adapter_config.json, and its matrices have 2; save it"),
        ({"r": 2, "alpha": True}, "its alpha is true; expected a number above 0"),
        ({"r": True, "alpha": 2}, "its r is true; expected"),
        ({"r": 2}, "its alpha is null; expected"),
        ({"r": 2, "alpha": "4"}, "its alpha is '4'; expected"),
        ({"r": 2, "alpha": 10**400}, r"its alpha is 10*\ \.\.\. 0*; expected"),
        ({"r": 2, "alpha": 0}, "its alpha is 0; expected"),
    ],
)
def test_a_configuration_of_peft_that_contradicts_its_matrices_is_refused(tmp_path, config, said):
    stem = "base_model.model.transformer_blocks.0.attn1.to_q"
    shapes = {"lokr_w1": (2, 2), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 16)}
    save_file({f"{stem}.{kind}": torch.ones(s) for kind, s in shapes.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", **config}))
    with pytest.raises(InputError, match=said):
        read_diffusers_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 2, "alpha": 4}))
    assert read_diffusers_lora(tmp_path).rank == 2


def test_shapes_say_which_w2_is_whole():
    assert shapes_of(3072, 3072, 16, -1) == {"lokr_w1": (48, 48), "lokr_w2_a": (64, 16), "lokr_w2_b": (16, 64)}
    assert shapes_of(3072, 3072, 32, -1) == {"lokr_w1": (48, 48), "lokr_w2": (64, 64)}
