import copy
import math

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dit_video_concat
from benchmarks.bench import kernels_of_a_block
from benchmarks.diffusers_peer import network_peer
from benchmarks.models import NetworkSize, build_network, network_section
from sgm.checks.meta_run import simulated_ranks
from sgm.modules import block, host_activations, in_place
from sgm.parallel import token_shards
from sgm.parallel.attention import attention_named
from sgm.parallel.mesh import Mesh
from sgm.parallel.token_shards import TokenShards
from sgm.util import InputError, instantiate_from_config, without_allocating
from sgm.weights.offload import Offload
from sgm.weights.quantize import linear_layers, store

SIZE = NetworkSize(32, 2, 2, 16, latents=(4, 4, 6), text_length=3, text_hidden_size=8)
RELEASED = ["cogvideox_2b", "cogvideox_5b", "cogvideox_5b_i2v", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v"]
LORA = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4}}


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def section(model="cogvideox_5b", **changes):
    result = network_section(model, SIZE)
    result["params"] |= changes
    return result


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(network, latents=SIZE.latents, batch=2):
    frames, height, width = latents
    return (
        random(batch, frames, network.in_channels, height, width),
        torch.tensor([500, 20, 300][:batch]),
        random(batch, SIZE.text_length, SIZE.text_hidden_size, seed=1),
    )


@pytest.mark.parametrize("model", RELEASED)
def test_released_networks_have_the_parameters_of_diffusers_and_one_table(model):
    with without_allocating():
        network = instantiate_from_config(network_section(model))
    count = sum(parameter.numel() for parameter in network.parameters())
    # Beside the parameters: the 2B's sine-cosine table, and SAT's unused position table in the others. The learned
    # table of 5B-I2V is a buffer in diffusers.
    if model == "cogvideox_2b":
        extra = {"mixins.pos_embed.pos_embedding": (226 + 13 * 30 * 45) * 1920}
    else:
        extra = {"transformer.position_embeddings.weight": 64 * 3072}
    if model == "cogvideox_5b_i2v":
        extra["mixins.pos_embed.pos_embedding"] = (226 + 13 * 30 * 45) * 3072
    tables = {name: p.numel() for name, p in network.named_parameters() if "position" in name or "pos_embed" in name}
    assert tables == extra
    peer = network_peer(network)
    assert count - sum(extra.values()) == sum(parameter.numel() for parameter in peer.parameters())


@pytest.mark.parametrize(("model", "lora"), [("cogvideox_5b", False), ("cogvideox1.5_5b_i2v", True)])
def test_libraries_recognise_every_matrix_as_a_linear_layer(model, lora):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install .[lowmem]")
    config = section(model, use_SwiGLU=lora)
    if lora:
        config["params"]["modules"]["lora_config"] = copy.deepcopy(LORA)
    network = build_network(config)
    matrices = {
        name.removesuffix(".weight")
        for name, parameter in network.named_parameters()
        if parameter.ndim == 2 and "matrix_" not in name and "position_embeddings" not in name
    }
    linears = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    # In a block: adaLN, q to v, output, MLP (gated: three). Outside: time (and ofs), two inputs, two at the end.
    assert matrices == linears and len(linears) == (2 * 6 + 8 if lora else 2 * 5 + 6)
    torchao.quantize_(network, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    touched = {name for name in linears if type(network.get_submodule(name).weight).__name__ == "Int8Tensor"}
    assert touched == linears


def test_temporal_patches_make_half_the_tokens():
    network = build_network(section("cogvideox1.5_5b"))
    seen = []
    network.transformer.layers[0].mlp.dense_h_to_4h.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
    x, timesteps, context = inputs(network)
    with torch.no_grad():
        assert network(x, timesteps, context).shape == (2, 4, 16, 4, 6)
    assert seen == [(2, 3 + 4 // 2 * 2 * 3, 32)]


def test_an_odd_number_of_frames_counts_its_padding():
    network = instantiate_from_config(section("cogvideox1.5_5b", num_frames=4 * (5 - 1) + 1))
    assert network.grid == (3, 2, 3)


def test_ofs_has_an_effect_and_two_is_not_zero():
    network = build_network(section("cogvideox1.5_5b_i2v"))
    arguments = inputs(network)
    with torch.no_grad():
        two, zero = (network(*arguments, ofs=torch.full((2,), value)) for value in (2.0, 0.0))
    assert (two - zero).abs().max() > 1e-3


def test_every_input_has_an_effect():
    network = build_network(section("cogvideox_5b_i2v"))
    x, timesteps, context = inputs(network)
    with torch.no_grad():
        output = network(x, timesteps, context)
        image = x.clone()
        image[:, :, 16:] += 0.1
        changed = [
            network(image, timesteps, context),
            network(x, timesteps + 1, context),
            network(x, timesteps, -context),
        ]
    assert all((other - output).abs().max() > 1e-4 for other in changed)


def test_samples_of_a_batch_do_not_mix():
    network = build_network(section())
    x, timesteps, context = inputs(network)
    with torch.no_grad():
        together = network(x, timesteps, context)
        alone = torch.cat([network(x[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_fresh_network_predicts_zero():
    network = instantiate_from_config(section())
    assert torch.count_nonzero(network(*inputs(network))) == 0


@pytest.mark.parametrize("model", ["cogvideox_2b", "cogvideox_5b_i2v", "cogvideox1.5_5b"])
def test_recording_gradients_changes_nothing(model):
    network = build_network(section(model))
    arguments = inputs(network)
    kept = [tensor.clone() for tensor in arguments]
    with torch.no_grad():
        plain = network(*arguments)
    torch.testing.assert_close(plain, network(*arguments).detach(), rtol=0, atol=1e-6)
    assert all(torch.equal(*both) for both in zip(kept, arguments, strict=True)), "inputs are left alone"


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointed_activations_give_the_same_gradients(lora, recwarn):
    gradients = []
    for checkpoint in (False, True, 1):
        config = section()
        config["params"]["transformer_args"]["checkpoint_activations"] = checkpoint
        if lora:
            config["params"]["modules"]["lora_config"] = LORA
        network = build_network(config).train()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and (not lora or "matrix_" in name))
        network(*inputs(network)).square().sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) > (10 if lora else 40)
    for plain, *recomputed in zip(*gradients, strict=True):
        assert all(torch.equal(plain, other) for other in recomputed)
    assert [str(warning.message) for warning in recwarn] == []


def saved_bytes(network, arguments) -> int:
    """Return the bytes saved for the backward pass, beside weights."""
    weights, saved = {p.untyped_storage()._cdata for p in network.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(*arguments)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("model", ["cogvideox_5b_lora", "cogvideox_2b_lora"])
def test_a_block_saves_thirteen_tensors(model):
    """x, h, q and k before and after norm and rotation, v, attention's output, x again, and four for the MLP."""
    sizes = []
    for depth in (2, 3):
        size = NetworkSize(512, 8, depth, 16, SIZE.latents, SIZE.text_length, SIZE.text_hidden_size)
        config = network_section(model, size)
        config["params"]["modules"]["lora_config"] = copy.deepcopy(LORA)
        network = build_network(config).bfloat16().train()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("matrix_" in name)
        arguments = [x.bfloat16() if x.is_floating_point() else x for x in inputs(network)]
        sizes.append(saved_bytes(network, arguments))
    tokens = SIZE.text_length + math.prod(SIZE.latents) // 4
    # One of them are factors and adapters, which are smaller beside more tokens.
    assert 12 < (sizes[1] - sizes[0]) / (2 * tokens * 512 * 2) < 14.2


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_activations_in_host_memory_give_the_same_gradients(recomputed, lora, monkeypatch):
    config = section()
    config["params"]["transformer_args"]["checkpoint_activations"] = recomputed
    if lora:
        config["params"]["modules"]["lora_config"] = copy.deepcopy(LORA)
    network = build_network(config).train()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and (not lora or "matrix_" in name))
    monkeypatch.setattr(host_activations, "SMALLEST", 1)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def gradients():
        return torch.autograd.grad(network(*inputs(network)).square().sum(), trained, allow_unused=True)

    plain, sent = gradients(), []
    network.offload_activations(torch.device("cpu"), torch.device("cpu"))
    monkeypatch.setattr(network.saving, "_send", lambda *args, send=network.saving._send: sent.append(1) or send(*args))
    for own, offloaded in zip(plain, gradients(), strict=True):
        assert own is offloaded is None or torch.equal(own, offloaded)
    assert len(sent) == len(network.saving._order) > 1 + 20 * (not recomputed)
    assert not network.saving._gone, "no storage is held"


class Kernels(TorchDispatchMode):
    """Count the calls of attention kernels."""

    forward = backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.startswith("_scaled_dot_product_"):
            direction = "backward" if func.overloadpacket.__name__.endswith("backward") else "forward"
            setattr(self, direction, getattr(self, direction) + 1)
        return func(*args, **(kwargs or {}))


def kept_and_recomputed(network, monkeypatch):
    """Yield gradients with blocks recomputed, without their attention, and this in host memory, and kernels called."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.get_mixin("adaln_layer").recomputed_layers = 2
    monkeypatch.setattr(host_activations, "SMALLEST", 1)
    cpu = torch.device("cpu")
    for change in (lambda: None, network.keep_attention, lambda: network.offload_activations(cpu, cpu)):
        change()
        with Kernels() as kernels:
            loss = network(*inputs(network)).square().sum()
            found = torch.autograd.grad(loss, trained, allow_unused=True)
        yield found, kernels.forward, kernels.backward


@pytest.mark.parametrize("lora", [False, True])
def test_kept_attention_gives_the_same_gradients_and_is_not_recomputed(lora, monkeypatch):
    config = section()
    if lora:
        config["params"]["modules"]["lora_config"] = copy.deepcopy(LORA)
    network = build_network(config).train()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and (not lora or "matrix_" in name))
    (plain, *calls), *others = kept_and_recomputed(network, monkeypatch)
    assert calls == [4, 2]
    for found, *calls in others:
        assert calls == [2, 2]
        for own, other in zip(plain, found, strict=True):
            assert own is other is None or torch.equal(own, other)
    # Of two blocks, inputs, and what attention returned: outputs and log-sum-exps.
    assert len(network.saving._order) >= 2 + 4 and not network.saving._gone


def test_only_the_output_of_one_fused_kernel_can_be_kept():
    network = build_network(section()).train()
    network.get_mixin("adaln_layer").recomputed_layers = 2
    network.keep_attention()
    network.attention = attention_named("math")
    with pytest.raises(InputError, match="attention ran 0 of them; set args.keep_attention=false"):
        network(*inputs(network))


@pytest.mark.parametrize("recomputed", [0, 2])
def test_the_activation_of_the_mlp_is_not_kept_but_computed_again(recomputed, monkeypatch):
    network, results, saved = build_network(section()).train(), [], []
    network.get_mixin("adaln_layer").recomputed_layers = recomputed
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for keeps in (True, False):
        if keeps:
            monkeypatch.setattr(block, "linear_after_gelu", lambda linear, x: linear(in_place.gelu(x)))
        loss = network(*inputs(network)).square().sum()
        results.append(torch.autograd.grad(loss, trained, allow_unused=True))
        saved.append(saved_bytes(network, inputs(network)))
        monkeypatch.undo()
    for own, other in zip(*results, strict=True):
        assert own is other is None or torch.equal(own, other)
    patches = math.prod(SIZE.latents) // 4
    tokens = SIZE.text_length + patches + patches  # of the last block, without text
    assert saved[0] - saved[1] == (0 if recomputed else 2 * tokens * 4 * 32 * 4)


def test_the_activation_of_an_mlp_under_autocast_is_that_of_single_steps():
    """The toy is trained so; weights are cast there, which a function of its own would have to do too."""
    layer, x = nn.Linear(4, 4), random(2, 8, 4).requires_grad_()
    found = []
    for function in (in_place.linear_after_gelu, lambda linear, x: linear(in_place.gelu(x))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(layer, x).square().sum()
        found.append(torch.autograd.grad(loss, (x, layer.weight, layer.bias)))
    assert all(map(torch.equal, *found))


def test_memory_saved_as_several_views_goes_once_and_weights_stay():
    layer, x, sent = nn.Linear(4, 4), random(8, 4).requires_grad_(), []
    saving = host_activations.HostActivations(torch.device("cpu"), torch.device("cpu"), smallest=100)
    saving._send = lambda tensor, *args, send=saving._send: sent.append(tensor.shape) or send(tensor, *args)
    with saving:
        y = layer(x) * 1.0
        out = (y * y[:, :1]).sum() + (y.T.exp() * y[0, 0]).sum() + (y[0] * y[1]).sum()
    assert len(sent) == 3, "the layer's input, y and the exponential"
    grads = [torch.autograd.grad(out, (x, layer.weight), retain_graph=True) for _ in range(2)]
    y = layer(x) * 1.0
    expected = torch.autograd.grad((y * y[:, :1]).sum() + (y.T.exp() * y[0, 0]).sum() + (y[0] * y[1]).sum(), x)
    assert torch.equal(grads[0][0], expected[0]) and all(map(torch.equal, *grads))


@pytest.mark.parametrize("gated", [False, True])
def test_a_frozen_mlp_takes_its_tokens_in_pieces(gated, monkeypatch):
    mlp = build_network(section(use_SwiGLU=gated)).transformer.layers[0].mlp.requires_grad_(False)
    x, results, calls = random(2, 11, 32).requires_grad_(), [], []
    mlp.dense_4h_to_h.register_forward_hook(lambda *_: calls.append(1))
    for tokens in (22, 6):
        monkeypatch.setattr(in_place, "TOKENS_OF_A_PIECE", tokens)
        out = block.feed_forward(mlp, x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert len(calls) == 1 + 4
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    block.feed_forward(mlp.requires_grad_(True), x)
    with torch.no_grad():
        block.feed_forward(mlp.requires_grad_(False), x)
    assert len(calls) == 1 + 4 + 2, "trained ones and those without gradients take all at once"


@pytest.mark.parametrize(
    ("given", "skip", "recomputed"), [(True, 0, 2), (True, 1, 1), (0, 0, 0), (1, 0, 1), (2, 1, 2), (False, 0, 0)]
)
def test_blocks_are_recomputed_in_training_only(monkeypatch, given, skip, recomputed):
    config = section()
    config["params"]["transformer_args"] |= {"checkpoint_activations": given, "checkpoint_skip_layers": skip}
    network = build_network(config).train()
    calls = []
    original = block.feed_forward
    monkeypatch.setattr(block, "feed_forward", lambda *args: calls.append(1) or original(*args))
    num_layers = len(network.transformer.layers)
    assert num_layers == 2
    with torch.no_grad():
        network(*inputs(network))
    assert len(calls) == num_layers
    network(*inputs(network)).sum().backward()
    assert len(calls) == 2 * num_layers + recomputed


def test_attention_is_called_without_a_mask(monkeypatch):
    calls = []

    def spy(*args, **kwargs):
        calls.append((len(args), kwargs))
        return original(*args, **kwargs)

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(dit_video_concat.F, "scaled_dot_product_attention", spy)
    network = build_network(section())
    network(*inputs(network))
    assert calls == [(3, {})] * 2


def test_the_rotary_tables_are_made_once_a_size(monkeypatch):
    made = []

    def spy(*args, **kwargs):
        made.append(args[0])
        return original(*args, **kwargs)

    original = dit_video_concat.rope_table_3d
    monkeypatch.setattr(dit_video_concat, "rope_table_3d", spy)
    network = build_network(section())
    with torch.no_grad():
        for latents in ((4, 4, 6), (4, 4, 6), (2, 8, 4)):
            network(*inputs(network, latents))
    assert made == [(4, 2, 3), (2, 4, 2)]
    assert not [name for name in network.state_dict() if "freqs" in name]


def test_fresh_adapters_leave_the_output_alone_and_are_all_that_is_new():
    plain = build_network(section())
    config = section()
    config["params"]["modules"]["lora_config"] = copy.deepcopy(LORA)
    adapted = instantiate_from_config(config)
    renamed = {
        name: value
        for name, value in adapted.state_dict().items()
        if not name.endswith(tuple(f".matrix_{side}.{part}" for side in "AB" for part in range(3)))
    }
    assert {name.replace(".original.", ".") for name in renamed} == plain.state_dict().keys()
    with torch.no_grad():
        for name, tensor in renamed.items():
            tensor.copy_(plain.state_dict()[name.replace(".original.", ".")])
        arguments = inputs(plain)
        assert torch.equal(adapted(*arguments), plain(*arguments))
        adapted.transformer.layers[0].attention.dense.matrix_B[0].fill_(1.0)
        assert (adapted(*arguments) - plain(*arguments)).abs().max() > 1e-3


def test_swiglu_and_rms_norm():
    network = build_network(section(use_SwiGLU=True, use_RMSNorm=True))
    layer = network.transformer.layers[0]
    x = random(2, 5, 32)
    gated = F.silu(layer.mlp.dense_h_to_4h_gate(x)) * layer.mlp.dense_h_to_4h(x)
    torch.testing.assert_close(layer.mlp(x, layer_id=0), layer.mlp.dense_4h_to_h(gated), rtol=0, atol=1e-6)
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * layer.input_layernorm.weight
    torch.testing.assert_close(layer.input_layernorm(x), expected, rtol=0, atol=1e-5)
    assert network(*inputs(network)).isfinite().all()


def test_the_mixin_s_interpolation_wins_over_the_network_s():
    config = section("cogvideox_2b", height_interpolation=3.0, width_interpolation=3.0, time_interpolation=2.0)
    table = instantiate_from_config(config).get_mixin("pos_embed").pos_embedding[0, 3:].reshape(4, 2, 3, 32)
    angle = table[0, 1, 0, 20].asin().item()  # channel 20 is the first sine of the row
    assert angle == pytest.approx(1 / 1.875, abs=1e-4)
    assert table[1, 0, 0, 0].asin().item() == pytest.approx(1 / 2, abs=1e-4)


def test_shorter_samples_take_the_first_rows_of_a_table():
    network = build_network(section("cogvideox_2b"))
    position = network.get_mixin("pos_embed")
    assert torch.equal(position.rows((2, 2, 3), TokenShards(3, 2 * 2 * 3)), position.pos_embedding[:, : 3 + 2 * 2 * 3])


def _with_head(size: int) -> dict:
    modules = section()["params"]["modules"]
    rotary = {
        "target": "dit_video_concat.Rotary3DPositionEmbeddingMixin",
        "params": {"hidden_size_head": size, "text_length": 3},
    }
    return modules | {"pos_embed_config": rotary}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 33}, "hidden_size=33 is not a multiple of num_attention_heads=2"),
        ({"ofs_embed_dim": 8}, "ofs_embed_dim=8 must equal time_embed_dim=16"),
        ({"patch_size": [2, 2]}, "patch_size"),
        ({"transformer_args": {"checkpoint_activations": 3}}, "checkpoint_activations=3: the network has 2 blocks"),
        ({"transformer_args": {"checkpoint_activation": True}}, "did you mean 'checkpoint_activations'"),
        (
            {"transformer_args": {"layernorm_order": "post"}},
            "layernorm_order is 'post'",
        ),
        ({"transformer_args": {"hidden_dropout": 0.1}}, "hidden_dropout is 0.1"),
        ({"transformer_args": {"is_decoder": True}}, "is_decoder is true"),
        ({"transformer_args": {"model_parallel_size": 2}}, "model_parallel_size"),
        ({"num_attention_heads": 4, "modules": _with_head(8)}, "a multiple of 16, got 8; set num_attention_heads"),
        ({"modules": _with_head(7)}, "pos_embed_config.params.hidden_size_head is 7, and that of the network 16"),
        ({"modules": {}}, "lacks adaln_layer_config, final_layer_config, patch_embed_config, pos_embed_config"),
        (
            {"modules": section()["params"]["modules"] | {"final_layer_config": {"target": "torch.nn.Identity"}}},
            "no mixin",
        ),
        ({"modules": {"lora_conf": LORA}}, "lora_conf is unknown; did you mean 'lora_config'"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(InputError) as error:
        instantiate_from_config(section(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("params", "key", "message"),
    [
        ({"r": 0}, "r", "is 0; give a whole number from 1 to the hidden size 32"),
        ({"r": -4}, "r", "is -4"),
        ({"r": 33}, "r", "is 33"),
        ({}, "r", "is null"),
        ({"r": 2.5}, "r", "is 2.5"),
        ({"r": 4, "lora_alpha": -1}, "lora_alpha", "is -1; give a number above 0"),
        ({"r": 4, "lora_dropout": 1.5}, "lora_dropout", "is 1.5"),
        ({"r": 4, "layer_range": [0, 2]}, "layer_range", "is [0, 2]; give a list of layers from 0 to 1"),
        ({"r": 4, "layer_range": [-1]}, "layer_range", "is [-1]"),
        ({"r": 4, "layer_range": [1, 1]}, "layer_range", "each once"),
        ({"r": 4, "layer_range": 1}, "layer_range", "is 1"),
    ],
)
def test_wrong_adapters_are_refused(params, key, message):
    config = section()
    config["params"]["modules"]["lora_config"] = LORA | {"params": params}
    with pytest.raises(InputError) as error:
        instantiate_from_config(config)
    assert f"model.network_config.params.modules.lora_config.params.{key} is " in str(error.value)
    assert message in str(error.value)


def test_adapters_of_some_layers_and_of_any_strength():
    config = section()
    config["params"]["modules"]["lora_config"] = LORA | {"params": {"r": 4, "lora_alpha": 0.5, "layer_range": [1]}}
    network = instantiate_from_config(config)
    adapters = {name.split(".")[2] for name in network.state_dict() if "matrix_A" in name}
    assert adapters == {"1"}
    assert network.transformer.layers[1].attention.dense.scaling == 0.125


@pytest.mark.parametrize(
    ("model", "latents", "ofs", "message"),
    [
        ("cogvideox_5b", (4, 5, 6), None, "cannot be cut into patches of (1, 2, 2)"),
        ("cogvideox1.5_5b", (3, 4, 6), None, "cannot be cut into patches of (2, 2, 2)"),
        ("cogvideox1.5_5b_i2v", (4, 4, 6), None, "this model needs ofs (2.0)"),
        ("cogvideox_5b", (4, 4, 6), 2.0, "this model has no ofs_embed_dim"),
        ("cogvideox_2b", (4, 6, 6), None, "position table is made for 3 text tokens and 2×3 patches in up to 4 frames"),
        ("cogvideox_5b_i2v", (6, 4, 6), None, "got 3 tokens and 2×3 patches in 6 frames"),
    ],
)
def test_wrong_inputs_are_refused(model, latents, ofs, message):
    network = build_network(section(model))
    with pytest.raises(InputError) as error:
        network(*inputs(network, latents), ofs=None if ofs is None else torch.full((2,), ofs))
    assert message in str(error.value)


def test_missing_image_latents_are_named():
    network = build_network(section("cogvideox_5b_i2v"))
    x, timesteps, context = inputs(network)
    with pytest.raises(InputError, match=r"takes \(B, T, 32, H, W\), got \(2, 4, 16, 4, 6\)"):
        network(x[:, :, :16], timesteps, context)


GRIDS = ((4, 4, 6), (2, 4, 6), (6, 4, 4), (4, 8, 6), (2, 6, 8))


def graphs(network, batch, grids=GRIDS):
    """Compile for training and sampling at these sizes of latents; yield the number of graphs after each."""
    for training in (True, False):
        network.train(training)
        for latents in grids:
            with torch.set_grad_enabled(training):
                network(*inputs(network, latents, batch))
            yield torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def compiled():
    """Return the network of a section, compiled without a code generator; recompiling too often is an error."""

    def make(config):
        network = build_network(config)
        network.compile(backend="eager")
        return network

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield make
    torch._dynamo.reset()


def test_compiling_serves_all_layers_and_sizes(compiled):
    config = network_section("cogvideox_5b", NetworkSize(32, 2, 3, 16, SIZE.latents, 3, 8))
    network = compiled(config)
    # One graph for all blocks, one more at the second size for all sizes, and one without gradients.
    assert list(graphs(network, 2)) == [1, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    assert not torch._dynamo.utils.counters["graph_break"]
    plain = build_network(config)
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        sample = inputs(network, GRIDS[3])
        torch.testing.assert_close(network(*sample), plain(*sample), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compiling_serves_one_sample_and_several(compiled):
    config = section("cogvideox1.5_5b")
    lora = LORA | {"params": {"r": 4, "lora_dropout": 0.5}}
    config["params"]["modules"] = {**config["params"]["modules"], "lora_config": lora}
    config["params"]["transformer_args"] = {"checkpoint_activations": True}
    network = compiled(config)
    counts = [list(graphs(network, batch))[-1] for batch in (1, 2, 3, 1)]
    assert counts == [3, 5, 5, 5]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow  # generates code, and compiles it
def test_a_compiled_block_has_six_kernels_beside_products_and_attention():
    assert 1 <= kernels_of_a_block() <= 6


@pytest.mark.parametrize("storage", [slow(None), "int8", slow("nf4")])
def test_compiling_serves_adapters_beside_stored_weights_and_weights_that_wait(compiled, storage):
    if storage == "int8":
        pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install .[lowmem]")
    config = network_section("cogvideox_5b", NetworkSize(128, 2, 3, 16, SIZE.latents, 3, 8))
    config["params"]["modules"]["lora_config"] = copy.deepcopy(LORA)
    networks = build_network(config), compiled(config)
    results = []
    for network in networks:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("matrix_" in name)
        for layer in linear_layers(part for members in network.blocks for part in members) if storage else ():
            store(layer, storage)
        out = network(*inputs(network))
        out.square().sum().backward()
        results.append((out.detach(), *(p.grad for p in network.parameters() if p.grad is not None)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, (
        "of the first block as well, whose input is frozen"
    )
    for plain, own in zip(*results, strict=True):
        assert (plain - own).norm() <= 1e-5 * plain.norm()
    network = networks[1].requires_grad_(False)
    offload = Offload(network, torch.device("cpu"), network.blocks)
    network.use_blocks_within(offload.block)
    with torch.no_grad(), offload:
        for seed in (1, 2):  # other latents, steps and prompts
            x, timesteps, context = inputs(network)
            network(random(*x.shape, seed=seed), timesteps // (seed + 1), seed * context)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("ring", [False, True])
def test_compiling_serves_all_sizes_of_samples_that_ranks_share(compiled, ring):
    with simulated_ranks(Mesh(sequence=2)):
        network = compiled(section())
        network.ring_attention = ring
        # A block is two graphs: before and after attention, which communicates.
        assert list(graphs(network, 2)) == [2, 4, 4, 4, 4, 6, 6, 6, 6, 6]
        assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_compiling_serves_a_cache_and_a_branch_for_each_rank(compiled):
    network, sample = compiled(section()), None
    for mesh, batch in ((Mesh(), 2), (Mesh(cfg=2), 2)):  # rows of both branches; of one, for two samples
        with simulated_ranks(mesh):
            sample = inputs(network, batch=batch)
            expected = network(*sample)
            with network.use_step_cache("first_block", 1e9).sampling(num_steps=3, num_samples=batch // (3 - mesh.cfg)):
                for _ in range(3):
                    torch.testing.assert_close(network(*sample), expected, rtol=0, atol=1e-5)
            assert network.get_mixin("adaln_layer").step_cache.share_run == pytest.approx(5 / 6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_compiling_leaves_the_attention_of_a_package_outside(compiled):
    def of_a_package(q, k, v):
        assert not torch.compiler.is_compiling()
        return attention_named("auto")(q, k, v)

    network = compiled(section())
    for attention, number in ((attention_named("math"), 1), (of_a_package, 3)):
        network.attention = attention
        found = network(*inputs(network))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == number
        assert not torch._dynamo.utils.counters["graph_break"]
    plain = build_network(section())
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(found, plain(*inputs(network)), rtol=0, atol=1e-6)


def test_rotary_tables_and_shards_are_computed_once_for_all_layers(monkeypatch):
    made = []
    for place, name in ((dit_video_concat, "rope_table_3d"), (token_shards, "shard_sizes")):
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, original=original, **kw: made.append(1) or original(*args, **kw))
    counts = []
    with simulated_ranks(Mesh(sequence=2)):
        for depth in (1, 3):
            made.clear()
            network = build_network(network_section("cogvideox_5b", NetworkSize(32, 2, depth, 16, SIZE.latents, 3, 8)))
            network(*inputs(network))
            counts.append(len(made))
    assert counts[0] == counts[1] > 0
