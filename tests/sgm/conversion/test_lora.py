"""Export LoRA from the SAT layout to diffusers, and merge it. Tiny complete networks."""

import json
import logging
import warnings

import pytest
import torch
import yaml
from diffusers import CogVideoXPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.diffusers_peer import network_peer, run_network_peer
from benchmarks.models import NetworkSize, build_network, network_section
from sgm.conversion.diffusers.verify import peer_rope
from sgm.conversion.lora import FILE, HEADER_KEY, adapters_to_diffusers, export_lora
from sgm.conversion.lora_merge import merge_loras
from sgm.util import InputError, instantiate_from_config, without_allocating
from sgm.weights.adapters import AdapterInfo, is_adapter
from sgm.weights.checkpoint import load_network, save_network
from sgm.weights.files import PREFIX, find_weights, read_tensors, weights_digest
from sgm.weights.lazy import LazyTensor
from sgm.weights.lora.files import read_lora
from sgm.weights.lora.merging import merge_adapters
from tests.marks import only, thorough

RANK, ALPHA = 4, 3
QKV, DENSE = (f"transformer.layers.0.attention.{name}" for name in ("query_key_value", "dense"))


def section(num_layers=2, *, alpha=ALPHA, layers=None, lora=True, model="cogvideox_5b"):
    size = NetworkSize(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=num_layers,
        time_embed_dim=16,
        latents=(2, 4, 6),
        text_length=3,
        text_hidden_size=8,
    )
    result = network_section(model, size)
    if lora:
        params = {"r": RANK, "lora_alpha": alpha} | ({} if layers is None else {"layer_range": list(layers)})
        result["params"]["modules"]["lora_config"] = {"target": "sat.model.finetune.lora2.LoraMixin", "params": params}
    return result


def plain(network, **options):
    """Return the base network, with the same weights."""
    result = build_network(section(lora=False, **options))
    result.load_state_dict(
        {name.replace(".original.", "."): t for name, t in network.state_dict().items() if not is_adapter(name)}
    )
    return result


@torch.no_grad()
def output(network):
    """Return the output of a network, or of its diffusers twin, for a fixed input."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 16, 4, 6, generator=generator)
    context = torch.randn(1, 3, 8, generator=generator)
    if hasattr(network, "mixins"):
        return network(x, torch.tensor([500]), context)
    return run_network_peer(network, x, torch.tensor([500]), context, rope=peer_rope(network, x))


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a network as training does: its base, and only the adapters in `run`."""

    def save(network, *, alpha=ALPHA, layers=(0, 1), full=False, entry=True, file_format="pt"):
        state = network.state_dict()
        base = {name.replace(".original.", "."): t for name, t in state.items() if not is_adapter(name)}
        save_network(tmp_path / "base", 1000, base, patch_size=network.patch_size, file_format=file_format)
        info = AdapterInfo(
            rank=RANK,
            alpha=alpha,
            layers=tuple(layers),
            base=str(tmp_path / "base"),
            base_digest=weights_digest(find_weights(tmp_path / "base")),
        )
        tensors = {name: tensor for name, tensor in state.items() if full or is_adapter(name)}
        adapters = info if entry else None
        save_network(tmp_path / "run", 10, tensors, patch_size=network.patch_size, adapters=adapters)
        return tmp_path / "run"

    return save


def load_into_diffusers(network, folder):
    """Return the diffusers twin of a base network with the LoRA of a folder, loaded without options or warnings."""
    peer = network_peer(network)
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=peer, scheduler=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        pipe.load_lora_weights(str(folder))
    return pipe.transformer


def merge_lora(path, folder, *, strength=1.0, **options):
    return merge_loras([path], folder, strengths=[strength], **options)


def header(file):
    with safe_open(file, framework="pt") as opened:
        return {name.partition(".")[2]: v for name, v in json.loads(opened.metadata()[HEADER_KEY]).items()}


# --- For diffusers.


@pytest.mark.parametrize(
    ("num_layers", "layers", "alpha", "full"),
    [(2, None, 3, False), (2, None, 0.5, True), (3, [1], 7, False), (3, [0, 2], 4, True), thorough(30, None, 1, False)],
)
def test_diffusers_computes_what_sat_does_and_is_told_no_scale(tmp_path, saved, num_layers, layers, alpha, full):
    network = build_network(section(num_layers, alpha=alpha, layers=layers))
    run = saved(network, alpha=alpha, layers=layers or range(num_layers), full=full)
    base = plain(network, num_layers=num_layers)
    export_lora(run, tmp_path / "out")
    theirs = output(load_into_diffusers(base, tmp_path / "out"))
    ours = output(network)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (output(base) - ours).abs().max() > 1e-3


@pytest.mark.thorough
def test_42_layers_with_a_layer_range(tmp_path, saved):
    layers = range(5, 40)
    network = build_network(section(42, alpha=8, layers=layers))
    export_lora(saved(network, alpha=8, layers=layers), tmp_path / "out")
    theirs = output(load_into_diffusers(plain(network, num_layers=42), tmp_path / "out"))
    torch.testing.assert_close(theirs, output(network), rtol=0, atol=1e-5)


def test_the_file_holds_the_pairs_of_four_modules_a_layer_and_says_what_they_are(tmp_path, saved):
    network = build_network(section(3, layers=[1]))
    file = export_lora(saved(network, layers=[1]), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE] == [file.name]
    tensors, state = load_file(file), network.state_dict()
    modules = [f"transformer_blocks.1.attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert tensors.keys() == {f"transformer.{module}.lora_{kind}.weight" for module in modules for kind in "AB"}
    for index, part in enumerate("qkv"):
        for kind in "AB":
            theirs = tensors[f"transformer.transformer_blocks.1.attn1.to_{part}.lora_{kind}.weight"]
            assert torch.equal(theirs, state[f"transformer.layers.1.attention.query_key_value.matrix_{kind}.{index}"])
    config = header(file)
    assert sorted(config.pop("target_modules")) == sorted(modules)
    assert config == {"r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    assert isinstance(header(file)["lora_alpha"], int)


def test_another_prefix_is_that_of_names_and_header(tmp_path, saved, caplog):
    run = saved(build_network(section()))
    file = export_lora(run, tmp_path / "out", key_prefix="")
    assert all(name.startswith("transformer_blocks.") for name in load_file(file))
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()[HEADER_KEY])["r"] == RANK
    assert "pipelines of diffusers take those with 'transformer.'" in caplog.text
    with pytest.raises(InputError, match="--key_prefix is 'net'; end it with a dot"):
        export_lora(run, tmp_path / "other", key_prefix="net")


def test_reference_checkpoints_need_their_alpha(tmp_path, golden):
    reference = golden / "dit_t2v_5b_lora" / "transformer"
    with pytest.raises(InputError, match="does not say the alpha of its LoRA of rank 4; give it with --alpha"):
        export_lora(reference, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    file = export_lora(reference, tmp_path / "out", alpha=1)
    assert (header(file)["r"], header(file)["lora_alpha"], len(load_file(file))) == (4, 1, 16)


def test_alpha_must_not_contradict_the_file(tmp_path, saved):
    run = saved(build_network(section()))
    with pytest.raises(InputError, match="--alpha is 1, but .*records alpha 3; leave --alpha out"):
        export_lora(run, tmp_path / "out", alpha=1)
    assert header(export_lora(run, tmp_path / "out", alpha=3))["lora_alpha"] == 3
    for alpha in (0, -1, float("nan")):
        with pytest.raises(InputError, match="a number above 0"):
            read_lora(run, alpha=alpha)


def test_pairs_of_zeros_are_left_out(saved, tmp_path):
    network = build_network(section())
    for name, parameter in network.named_parameters():
        if name.startswith(f"{QKV}.matrix") and name.endswith(".1"):
            torch.nn.init.zeros_(parameter)
    file = export_lora(saved(network), tmp_path / "out")
    assert len(load_file(file)) == 14
    assert "transformer_blocks.0.attn1.to_k" not in header(file)["target_modules"]
    theirs = output(load_into_diffusers(plain(network), tmp_path / "out"))
    torch.testing.assert_close(theirs, output(network), rtol=0, atol=1e-5)


def test_adapters_without_effect_are_told(saved, tmp_path, caplog):
    network = build_network(section())
    run = saved(network)
    export_lora(run, tmp_path / "with effect")
    assert "have no effect" not in caplog.text
    for name, parameter in network.named_parameters():
        if ".matrix_B." in name:
            torch.nn.init.zeros_(parameter)
    assert len(load_file(export_lora(saved(network), tmp_path / "out"))) == 16
    assert "have no effect: every matrix B is zero" in caplog.text
    with pytest.raises(InputError, match="every LoRA matrix is zero"):
        adapters_to_diffusers({n: torch.zeros_like(t) for n, t in network.state_dict().items()}, alpha=1)


# --- What cannot be read.


def test_checkpoints_without_lora_are_refused(golden, tmp_path):
    with pytest.raises(InputError, match="holds no LoRA matrices"):
        export_lora(golden / "dit_t2v_2b" / "transformer", tmp_path / "out")
    with pytest.raises(InputError, match="holds no tensor under 'model.diffusion_model.'"):
        export_lora(golden / "vae" / "3d-vae.pt", tmp_path / "out")
    with pytest.raises(InputError, match="there is no checkpoint at"):
        export_lora(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{QKV}.matrix_B.1"), r"query_key_value in .* not the 6 matrices.*matrix_B\.1 missing"),
        (lambda t: t.update({f"{DENSE}.matrix_A.1": torch.ones(4, 32)}), r"matrix_A\.1 missing or too many"),
        (lambda t: t.update({f"{QKV}.matrix_A.0": torch.ones(2, 32)}), r"have the ranks \[2, 4\]"),
        (lambda t: t.update({"transformer.layers.0.mlp.x.matrix_A.0": torch.ones(4, 32)}), "adapters on .*mlp.x; only"),
    ],
)
def test_incomplete_adapters_are_refused(tmp_path, change, said):
    tensors = {name: t for name, t in build_network(section()).state_dict().items() if is_adapter(name)}
    change(tensors)
    torch.save({"module": {PREFIX + name: tensor for name, tensor in tensors.items()}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=said):
        export_lora(tmp_path / "x.pt", tmp_path / "out", alpha=1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_an_entry_that_does_not_fit_its_matrices_is_refused(saved, tmp_path):
    content = torch.load(find_weights(saved(build_network(section()))), weights_only=True)
    torch.save(content | {"lora": content["lora"] | {"rank": 8}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="LoRA is described as rank 8.*its matrices have rank 4"):
        export_lora(tmp_path / "x.pt", tmp_path / "out")


@pytest.mark.parametrize("write", [export_lora, merge_lora])
def test_nothing_is_overwritten_and_nothing_half_written_is_left(write, saved, tmp_path, monkeypatch):
    run = saved(build_network(section()))
    before = sorted(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for path in (run, tmp_path / "nowhere"):  # checked before anything is read
        with pytest.raises(InputError, match="full exists already; nothing is overwritten"):
            write(path, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]

    def fail(*_args, **_options):
        raise OSError("disk on fire")

    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as broken:
        broken.setattr("sgm.conversion.lora.write_safetensors", fail)
        broken.setattr("sgm.conversion.writing.write_latest", fail)
        with pytest.raises(InputError, match="disk on fire"):
            write(run, tmp_path / "empty")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "empty", tmp_path / "full"])
    assert write(run, tmp_path / "empty").is_file()


# --- Merging.


def load_plain(folder, **options):
    with without_allocating():
        network = instantiate_from_config(section(lora=False, **options))
    load_network(network, folder)
    return network.eval()


@pytest.mark.parametrize("file_format", only(["safetensors"], ["pt", "safetensors"]))
@pytest.mark.parametrize(("full", "layers"), [(False, [0, 1]), (True, [0, 1]), (False, [1])])
def test_the_merged_network_computes_the_same_without_lora(saved, tmp_path, full, layers, file_format):
    network = build_network(section(layers=layers))
    run = saved(network, full=full, layers=layers)
    file = merge_lora(run, tmp_path / "out", file_format=file_format)
    assert file == find_weights(tmp_path / "out") and file.suffix == f".{file_format}"
    merged = output(load_plain(tmp_path / "out"))
    torch.testing.assert_close(merged, output(network), rtol=0, atol=1e-5)
    assert (merged - output(plain(network))).abs().max() > 1e-3


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_strength_0_is_the_base_bit_for_bit(saved, tmp_path, file_format):
    network = build_network(section(), dtype=torch.bfloat16)
    with torch.no_grad():
        network.get_parameter(f"{DENSE}.original.weight")[0] = -0.0  # which adding zero would change
    saved(network, file_format=file_format)
    merge_lora(tmp_path / "run", tmp_path / "out", strength=0, file_format=file_format)
    base, merged = (read_tensors(find_weights(tmp_path / name)) for name in ("base", "out"))
    assert base.keys() == merged.keys()
    for name, tensor in base.items():
        assert torch.equal(tensor.view(torch.int16), merged[name].view(torch.int16)), name
    assert weights_digest(find_weights(tmp_path / "base")) == weights_digest(find_weights(tmp_path / "out"))


def test_half_the_strength_is_half_the_difference():
    tensors = build_network(section()).state_dict()
    base, half, whole = (merge_adapters(tensors, alpha=ALPHA, strength=strength) for strength in (0, 0.5, 1))
    for name in (f"{QKV}.weight", f"{DENSE}.weight"):
        difference = whole[name].compute() - base[name].compute()
        assert difference.abs().max() > 1e-3
        torch.testing.assert_close(half[name].compute() - base[name].compute(), difference / 2, rtol=0, atol=1e-7)
    delta = torch.cat([tensors[f"{QKV}.matrix_B.{j}"] @ tensors[f"{QKV}.matrix_A.{j}"] for j in range(3)])
    expected = base[f"{QKV}.weight"].compute() + ALPHA / RANK * delta
    torch.testing.assert_close(whole[f"{QKV}.weight"].compute(), expected, rtol=0, atol=1e-6)


def test_16_bit_weights_are_added_in_float32_and_rounded_once():
    tensors = build_network(section(), dtype=torch.bfloat16).state_dict()
    merged = merge_adapters(tensors, alpha=ALPHA)[f"{DENSE}.weight"].compute()
    a, b, weight = (tensors[f"{DENSE}.{name}"].double() for name in ("matrix_A.0", "matrix_B.0", "original.weight"))
    exact = weight + ALPHA / RANK * b @ a
    assert merged.dtype == torch.bfloat16
    wrong = merged != exact.to(torch.bfloat16)
    assert wrong.sum() <= 1  # except where float32 rounding crosses a midpoint


def test_everything_else_is_untouched(saved, tmp_path):
    network = build_network(section())
    saved(network)
    file = find_weights(tmp_path / "base")
    content = torch.load(file, weights_only=True)
    flat = content["module"][f"{PREFIX}mixins.patch_embed.proj.weight"].flatten(1).half()
    content["module"] |= {
        f"{PREFIX}mixins.patch_embed.proj.weight": flat,
        f"{PREFIX}mixins.pos_embed.freqs_sin": torch.ones(3, dtype=torch.float64),
        "first_stage_model.x": torch.ones(2),
    }
    torch.save(content, file)
    run = torch.load(find_weights(tmp_path / "run"), weights_only=True)
    run["lora"]["base_digest"] = weights_digest(file)
    torch.save(run, tmp_path / "run.pt")
    for file_format in ("pt", "safetensors"):
        merge_lora(tmp_path / "run.pt", tmp_path / file_format, file_format=file_format)
        merged = read_tensors(find_weights(tmp_path / file_format))
        assert merged.keys() == content["module"].keys() - {"first_stage_model.x"}
        for name, tensor in merged.items():
            before = content["module"][name]
            assert (tensor.shape, tensor.dtype) == (before.shape, before.dtype), name
            adapted = name.endswith(("query_key_value.weight", "dense.weight"))
            assert torch.equal(tensor, before) != adapted, name


def test_a_moved_base_is_named(saved, tmp_path):
    run = saved(build_network(section()))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="adapters of '.*base', which is neither .*--base_ckpt <folder or file>"):
        merge_lora(run, tmp_path / "out")
    merge_lora(run, tmp_path / "out", base=tmp_path / "moved")
    save_network(tmp_path / "other", 1, plain(build_network(section(), seed=1)), patch_size=2)
    with pytest.raises(InputError, match="was trained on another base than .*other"):
        merge_lora(run, tmp_path / "again", base=tmp_path / "other")
    full = saved(build_network(section()), full=True)
    with pytest.raises(InputError, match="holds a whole network.*remove --base_ckpt .*moved"):
        merge_lora(full, tmp_path / "again", base=tmp_path / "moved")
    assert not (tmp_path / "again").exists()


def test_merged_reference_checkpoints_give_the_output_of_the_reference(golden, tmp_path):
    family = golden / "dit_t2v_5b_lora"
    with pytest.raises(InputError, match="give it with --alpha"):
        merge_lora(family / "transformer", tmp_path / "out")
    merge_lora(family / "transformer", tmp_path / "out", alpha=1)
    model = yaml.safe_load((family / "model.yaml").read_text())["model"]
    del model["network_config"]["params"]["modules"]["lora_config"]
    network = instantiate_from_config(model["network_config"]).eval()
    load_network(network, tmp_path / "out")
    io = load_file(family / "io.safetensors")
    with torch.no_grad():
        merged = network(io["latents"], io["timesteps"], io["context"])
    torch.testing.assert_close(merged, io["output"], rtol=0, atol=2e-5)


def test_adapters_on_adapters_replace_them(saved, tmp_path):
    first, second = build_network(section()), build_network(section(), seed=5)
    saved(first, full=True)
    (tmp_path / "run").rename(tmp_path / "full")
    adapters = {name: tensor for name, tensor in second.state_dict().items() if is_adapter(name)}
    digest = weights_digest(find_weights(tmp_path / "full"))
    info = AdapterInfo(rank=RANK, alpha=ALPHA, layers=(0, 1), base=str(tmp_path / "full"), base_digest=digest)
    save_network(tmp_path / "run", 1, adapters, patch_size=2, adapters=info)
    merge_lora(tmp_path / "run", tmp_path / "out")
    second.load_state_dict(first.state_dict() | adapters)
    torch.testing.assert_close(output(load_plain(tmp_path / "out")), output(second), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strength_is_a_number(saved, tmp_path, strength):
    with pytest.raises(InputError, match="--strength is"):
        merge_lora(saved(build_network(section())), tmp_path / "out", strength=strength)


def test_adapters_that_do_not_fit_the_weights_are_refused():
    tensors = build_network(section()).state_dict()
    with pytest.raises(InputError, match=r"query_key_value .* do not fit its weight \(96, 16\)"):
        merge_adapters(tensors | {f"{QKV}.original.weight": torch.ones(96, 16)}, alpha=1)
    del tensors[f"{DENSE}.original.weight"]
    with pytest.raises(InputError, match="adapters on transformer.layers.0.attention.dense and no weight there"):
        merge_adapters(tensors, alpha=1)


def test_lazy_tensors_and_plain_names_are_taken_and_nothing_is_computed_early():
    network = build_network(section())
    calls = []

    def noted(tensor):
        calls.append(tensor.device.type)
        return tensor * 2

    tensors = {
        name.replace(".original.", "."): tensor if is_adapter(name) else LazyTensor((tensor,), noted)
        for name, tensor in network.state_dict().items()
    }
    merged = merge_adapters(tensors, alpha=ALPHA)
    assert set(calls) <= {"meta"}
    doubled = {name: tensor if is_adapter(name) else tensor * 2 for name, tensor in network.state_dict().items()}
    for name, tensor in merge_adapters(doubled, alpha=ALPHA).items():
        assert torch.equal(merged[name].compute(), tensor.compute())
    assert merged[f"{QKV}.weight"].meta().shape == (96, 32)


def test_logging_says_what_was_written(saved, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="sgm"):
        export_lora(saved(build_network(section())), tmp_path / "out")
    assert "LoRA of rank 4, alpha 3, 8 modules" in caplog.text


@pytest.mark.parametrize("wrong", ["nan", "int", "bool", "complex", "flip"])
def test_what_is_no_weight_is_refused_by_name_in_merging_and_export(saved, tmp_path, wrong):
    run = saved(build_network(section()))
    path = find_weights(run)
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["module"] if name.endswith("dense.matrix_B.0"))
    value = content["module"][name]
    changes = {"nan": lambda: value / 0, "int": value.long, "bool": value.bool, "complex": lambda: value + 0j}
    if wrong == "flip":
        data = bytearray(path.read_bytes())
        data[data.index(value.numpy().tobytes())] ^= 1
        path.write_bytes(data)
    else:
        content["module"][name] = changes[wrong]()
        torch.save(content, path)
    for convert in (merge_lora, export_lora):
        with pytest.raises(InputError, match=rf"{name} (is|holds) (not finite|integers|boolean|complex|damaged)"):
            convert(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()
