"""DoRA beside PEFT and diffusers. Tiny complete networks."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from sgm.config.load import ConfigError
from sgm.conversion.inspection import inspect_checkpoint
from sgm.conversion.lora import export_lora
from sgm.conversion.lora_import import import_lora
from sgm.conversion.lora_merge import average_loras, merge_loras, sum_loras
from sgm.modules.lora import Adapter, LoraLinear, _add_magnitudes, use_adapters
from sgm.training.optim.trainable import choose_trainable
from sgm.util import InputError, instantiate_from_config
from sgm.weights.adapters import AdapterInfo, check_lora_params, kind_of, read_adapter_info, with_adapters
from sgm.weights.checkpoint import load_network
from sgm.weights.files import find_weights, read_tensors
from sgm.weights.lora.dora import gains, parts_of, row_norms
from sgm.weights.lora.merging import in_order, merge_adapters
from sgm.weights.lora.several import stack_of
from sgm.weights.quantize import linear_layers, store
from tests.sgm.weights.lora.test_kinds import ALL, Case, close, require_adapters_alone_learn


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """DoRA on every projection."""
    return Case(tmp_path_factory.mktemp("dora"), targets=ALL, kind="dora")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, every):
    """LoRA on the attention of the same base."""
    case = Case(tmp_path_factory.mktemp("lora"))
    assert case.info.base_digest == every.info.base_digest
    return case


def adapted(parts=1, bias=True):
    """An adapter of a layer 8 → 12, with random numbers."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 12, bias=bias).requires_grad_(False)
    network = nn.Sequential(LoraLinear(nn.Linear, parts, 8, 12, 2, 3, original_obj=linear))
    _add_magnitudes(network[0])
    use_adapters(network)
    for parameter in (parameter for name, parameter in network.named_parameters() if ".original." not in name):
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return network


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_peft(bias):
    own = adapted(bias=bias)
    config = LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0"])
    linear = nn.Linear(8, 12, bias=bias)
    linear.load_state_dict({name: t for name, t in own[0].original.state_dict().items()})
    peer = get_peft_model(nn.Sequential(linear), config)
    ours = [own[0].matrix_A[0], own[0].matrix_B[0], own[0].magnitude[0]]
    layer = peer.base_model.model[0]
    theirs = [layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight]
    for to, parameter in zip(theirs, ours, strict=True):
        to.data.copy_(parameter.data)
    x, results = torch.randn(2, 5, 8, requires_grad=True), []
    for module, parameters in ((own, ours), (peer, theirs)):
        out = module(x)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, *parameters))))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_have_the_gain_one_and_learn():
    magnitude = torch.zeros(3, requires_grad=True)
    found = gains(magnitude, torch.tensor([0.0, 2.0, 4.0]))
    assert found.tolist() == [1, 0, 0]
    found.sum().backward()
    assert magnitude.grad.tolist() == [0, 0.5, 0.25]


def test_norms_are_those_of_the_whole_in_pieces():
    torch.manual_seed(0)
    weight, a, b = torch.randn(2500, 4), torch.randn(2, 4), torch.randn(2500, 2)
    torch.testing.assert_close(row_norms(weight, a, b, 0.5), (weight + 0.5 * b @ a).norm(dim=1))
    assert row_norms(weight.to("meta"), a.to("meta"), b.to("meta"), 0.5).shape == (2500,)


def test_parts_of_a_modulation_are_the_inverse_of_its_order():
    rows = torch.arange(24)
    assert torch.equal(in_order(parts_of(rows, 2, modulates=True)), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", [None, "int8", "fp8", "nf4"])
def test_before_training_every_bit_is_that_of_the_base(every, dtype, storage):
    outputs = []
    for section in (every.section, every.config(**every.params).model["network_config"]):
        network = instantiate_from_config(section)
        given = torch.Generator().manual_seed(3)
        load_network(network, every.folder / "base", dtype=dtype, storage=storage, generator=given)
        outputs.append(every.output(network.to(dtype).eval()))
    assert torch.equal(*outputs)


def test_the_file_says_what_it_is(every):
    assert read_adapter_info(every.folder / "run") == every.info and every.info.kind == "dora"
    assert "kind" not in AdapterInfo(rank=1, alpha=1, layers=(), base="x", base_digest="y").to_entry()
    found = inspect_checkpoint(every.folder / "run")
    assert found.kind == "SAT adapters (DoRA)" and "DoRA" in found.table() and found.lora.kind == "dora"


def test_diffusers_computes_the_same_from_the_export(every, tmp_path):
    file = export_lora(every.folder / "run", tmp_path / "out")
    assert inspect_checkpoint(file).kind == "DoRA for diffusers"
    pipe = every.pipe()
    pipe.load_lora_weights(str(tmp_path / "out"), adapter_name="a")
    taken = [name for name, _ in pipe.transformer.named_parameters() if "lora_magnitude_vector" in name]
    assert len(taken) == 2 * (4 + 2 + 2) + 2
    close(every.output(pipe.transformer), every.output(every.network))
    assert (every.output(every.network) - every.output(every.plain)).abs().max() > 1e-2


@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
def test_an_export_is_imported_as_it_was(every, tmp_path, style):
    file = export_lora(every.folder / "run", tmp_path / "out", style=style)
    if style == "comfyui":
        shapes = {n: tuple(t.shape) for n, t in load_file(file).items() if n.endswith(".dora_scale")}
        assert shapes["diffusion_model.blocks.1.q.dora_scale"] == (32, 1)
        assert shapes["diffusion_model.patch_embed.proj.dora_scale"] == (32, 1, 1, 1) and len(shapes) == 18
    import_lora(every.config(), file, tmp_path / "back")
    ours, theirs = (read_tensors(find_weights(folder)) for folder in (every.folder / "run", tmp_path / "back"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_adapter_info(tmp_path / "back").kind == "dora"


def test_an_import_has_the_magnitudes_of_the_base_where_there_are_no_adapters(every, tmp_path):
    peer = get_peft_model(every.pipe().transformer, LoraConfig(r=4, use_dora=True, target_modules=["to_q"]))
    for name, parameter in peer.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    peer.save_pretrained(str(tmp_path / "peft"))
    import_lora(every.config(), tmp_path / "peft", tmp_path / "sat")
    close(every.output(every.sampled(load=tmp_path / "sat")), every.output(peer))
    lora = {"path": str(tmp_path / "peft"), "strength": 1}
    close(every.output(every.sampled(lora)), every.output(peer))


def test_strength_scales_the_change_of_the_weights(every, plain, tmp_path):
    lora = {"path": str(every.folder / "run")}
    assert torch.equal(every.output(every.sampled(load=every.folder / "run")), every.output(every.network))
    close(every.output(every.sampled(lora)), every.output(every.network))
    assert torch.equal(every.output(every.sampled(lora | {"strength": 0})), every.output(every.plain))
    merge_loras([every.folder / "run"], tmp_path / "merged", strengths=[0.5])
    half = every.sampled(lora | {"strength": 0.5})
    assert next(module for module in half.modules() if isinstance(module, Adapter)).shares is not None
    close(every.output(half), every.output(every.sampled(load=tmp_path / "merged")))
    both = [lora | {"strength": 0.5}, {"path": str(plain.folder / "run"), "strength": -0.4}, lora | {"strength": 0.3}]
    merge_loras([each["path"] for each in both], tmp_path / "both", strengths=[0.5, -0.4, 0.3])
    close(every.output(every.sampled(*both)), every.output(every.sampled(load=tmp_path / "both")))
    base, whole = every.plain.state_dict(), merge_adapters(every.network.state_dict(), alpha=every.info.alpha)
    found = read_tensors(find_weights(tmp_path / "merged"))
    for name in ("transformer.layers.1.mlp.dense_h_to_4h.weight", "mixins.adaln_layer.adaLN_modulations.0.1.weight"):
        expected = (base[name] + whole[name].compute()) / 2
        torch.testing.assert_close(found[f"model.diffusion_model.{name}"], expected, rtol=0, atol=1e-6)
        assert (expected - base[name]).abs().max() > 1e-2


def test_steps_without_it_are_those_of_the_base(every):
    lora = {"path": str(every.folder / "run"), "schedule": [[0.0, 0.0], [0.5, 1.0]]}
    assert torch.equal(every.output(every.sampled(lora)), every.output(every.plain))


def test_averages_are_of_one_kind_and_there_is_no_sum(every, plain, tmp_path):
    average_loras([every.folder / "run"] * 2, tmp_path / "soup")
    close(every.output(every.sampled(load=tmp_path / "soup")), every.output(every.network))
    with pytest.raises(InputError, match="is DoRA, whose change of a weight has no small rank.*--result network"):
        sum_loras([every.folder / "run"], tmp_path / "sum")
    with pytest.raises(InputError, match="not of one training"):
        average_loras([every.folder / "run", plain.folder / "run"], tmp_path / "no")


def test_training_changes_matrices_and_magnitudes_alone(every):
    network = copy.deepcopy(every.network).train()
    trained = choose_trainable(network, {"not_trainable_prefixes": ["all"]})
    assert "DoRA of rank 4" in trained.description and "36 matrices and 18 magnitudes" in trained.description
    require_adapters_alone_learn(network)


def test_a_layer_on_a_weight_in_fewer_bits_is_that_of_the_numbers_it_stands_for():
    own = adapted(parts=3)
    same = copy.deepcopy(own)
    (layer,) = linear_layers([own])
    store(layer, "int8")
    same[0].original.weight.data = layer.weight.dequantize()
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(own(x), same(x), rtol=0, atol=1e-5)


def test_what_does_not_work_is_refused(every, plain, tmp_path):
    with pytest.raises(InputError, match="kind is 'doora'; give one of lora, dora, lokr"):
        check_lora_params({"r": 4, "kind": "doora"}, 2, 32)
    with pytest.raises(InputError, match="kind is dora, which is for whole weights.*model_parallel_size above 1"):
        check_lora_params({"r": 4, "kind": "dora"}, 2, 32, shards=2)
    words = [f"args.load={every.folder / 'run'}"]
    with pytest.raises(ConfigError, match=r"kind \(.*: is lora, but the adapters in .* were trained with dora"):
        with_adapters(every.config(words, **every.params | {"kind": "lora"}))
    with pytest.raises(ConfigError, match=r"kind \(.*: is dora, but the adapters in .* were trained with lora"):
        with_adapters(plain.config([f"args.load={plain.folder / 'run'}"], **plain.params, kind="dora"))
    tensors = {name: t for name, t in every.network.state_dict().items() if "magnitude" not in name}
    assert kind_of(tensors) == "lora"
    assert "described as DoRA, and their tensors are of LoRA" in every.info.mismatch(tensors)
    config = [f"args.loras=[{{path: {every.folder / 'run'}}}]", "args.model_parallel_size=2"]
    with pytest.raises(ConfigError, match="is DoRA, which is for whole weights"):
        stack_of(every.config(config))
