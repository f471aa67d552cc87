"""Several LoRAs at once, beside diffusers' ``set_adapters``. Tiny complete networks."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import CogVideoXPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from benchmarks.diffusers_peer import network_peer, run_network_peer
from benchmarks.models import build_network
from sgm.config.load import ConfigError, load_config
from sgm.conversion.diffusers.verify import peer_rope
from sgm.conversion.lora import export_lora
from sgm.modules.lora import scale_adapters
from sgm.util import instantiate_from_config, without_allocating
from sgm.weights.adapters import AdapterInfo, is_adapter
from sgm.weights.checkpoint import load_network, save_network
from sgm.weights.files import find_weights, weights_digest
from sgm.weights.lora.names import HEADER_KEY
from sgm.weights.lora.several import Scaled, stack_of, with_loras
from sgm.weights.offload import Offload
from sgm.weights.quantize import StoredLinear

LAYERS, SIZE = 3, 32
PARTS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory):
    """A model YAML with its base, LoRA files `a` (diffusers) and `b` (kohya's names), and a run folder `sat`."""
    folder = tmp_path_factory.mktemp("loras")
    content = yaml.safe_load(tiny_model("dit_t2v_5b_lora").read_text())
    params = content["model"]["network_config"]["params"]
    params |= {"num_layers": LAYERS, "hidden_size": SIZE}
    params["modules"]["pos_embed_config"]["params"]["hidden_size_head"] = 16
    del params["modules"]["lora_config"]
    content["args"] |= {"load": str(folder / "base"), "input_type": "cli"}
    (folder / "model.yaml").write_text(yaml.safe_dump(content))
    base = build_network(content["model"]["network_config"])
    save_network(folder / "base", 1, base, patch_size=2)
    peer = network_peer(base)
    peer.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=list(PARTS)))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in peer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.2, generator=generator)
    metadata = _collate_lora_metadata({"transformer": peer})
    CogVideoXPipeline.save_lora_weights(folder / "a", get_peft_model_state_dict(peer), **metadata)
    # Another rank and alpha, on some modules of some layers: in kohya's names, and as diffusers takes them.
    kohya, plain = {}, {}
    for module in [f"transformer_blocks.{i}.attn1.{part}" for i in (0, 2) for part in ("to_v", "to_out.0")]:
        a, b = torch.randn(2, SIZE, generator=generator) / 4, torch.randn(SIZE, 2, generator=generator) / 4
        flat = f"lora_unet_{module.replace('.', '_')}"
        kohya |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": torch.tensor(3.0)}
        plain |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
    save_file(kohya, folder / "b.safetensors")
    targets = sorted({name[len("transformer.") : name.index(".lora_")] for name in plain})
    header = {"transformer.r": 2, "transformer.lora_alpha": 3, "transformer.target_modules": targets}
    save_file(plain, folder / "b_plain.safetensors", metadata={HEADER_KEY: json.dumps(header)})
    params["modules"]["lora_config"] = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 3}}
    own = {name: t for name, t in build_network(content["model"]["network_config"], seed=5).state_dict().items()}
    digest = weights_digest(find_weights(folder / "base"))
    info = AdapterInfo(rank=3, alpha=2, layers=(0, 1, 2), base=str(folder / "base"), base_digest=digest)
    save_network(folder / "sat", 7, {n: t for n, t in own.items() if is_adapter(n)}, patch_size=2, adapters=info)
    return folder


@pytest.fixture
def config(files):
    """Return a function: entries of args.loras, overrides → the configuration."""

    def make(*loras, words=()):
        given = [{**entry, "path": str(files / entry["path"])} for entry in loras]
        return load_config([files / "model.yaml"], [f"args.loras={json.dumps(given)}", *words], mode="inference")

    return make


def built(config, **options):
    """Return the network of a run with args.loras and its stack, as sampling builds it."""
    config, stack = with_loras(config), stack_of(config)
    with without_allocating():
        network = instantiate_from_config(config.model["network_config"])
    load_network(network, config.args.load, adapters=stack and stack.tensors(), **options)
    return network.eval(), stack


@torch.no_grad()
def output(network, stack=None, share=0.0):
    if stack is not None:
        scale_adapters(network, stack.layers, stack.factors(share), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 2, 16, 4, 6, generator=generator), torch.randn(1, 6, 24, generator=generator)
    if hasattr(network, "mixins"):
        return network(x, torch.tensor([500]), context)
    return run_network_peer(network, x, torch.tensor([500]), context, rope=peer_rope(network, x))


@pytest.mark.parametrize(
    ("first", "second"),
    [(0.7, -0.4), ({"0": 0, "1-2": 1.2}, {"0": 1, "2": 0.25})],
)
def test_several_loras_compute_what_those_of_diffusers_do(config, files, first, second):
    loras = [{"path": "a", "strength": first}, {"path": "b.safetensors", "strength": second}]
    ours = output(*built(config(*loras)))
    pipe = CogVideoXPipeline(None, None, None, network_peer(built(config())[0]), None)
    pipe.load_lora_weights(str(files / "a"), adapter_name="a")
    pipe.load_lora_weights(str(files / "b_plain.safetensors"), adapter_name="b")
    scales = [of_diffusers(first), of_diffusers(second)]
    pipe.transformer.set_adapters(["a", "b"], scales)
    theirs = output(pipe.transformer)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert (ours - output(built(config())[0])).abs().max() > 1e-3


def of_diffusers(strength):
    """Return strengths by layer as ``set_adapters`` takes them."""
    if not isinstance(strength, dict):
        return strength
    layers = {group: range(int(group[0]), int(group[-1]) + 1) for group in strength}
    return {f"transformer_blocks.{i}.": value for group, value in strength.items() for i in layers[group]}


def test_one_lora_at_1_is_args_load_bit_for_bit(config, files):
    network = instantiate_from_config(with_loras(config({"path": "sat"})).model["network_config"])
    load_network(network, files / "sat")
    assert torch.equal(output(network.eval()), output(*built(config({"path": "sat"}))))
    both = output(*built(config({"path": "sat", "strength": 0.25}, {"path": "sat", "strength": 0.75})))
    torch.testing.assert_close(both, output(network), rtol=0, atol=1e-5)


def test_strength_0_is_the_base_bit_for_bit(config):
    base = output(built(config())[0])
    network, stack = built(config({"path": "sat", "strength": 0}, {"path": "a", "schedule": [[0, 0]]}))
    assert stack is None and torch.equal(output(network), base)
    network, stack = built(config({"path": "sat", "schedule": [[0.5, 0], [0.5, 1]]}))
    assert torch.equal(output(network, stack, 0.25), base) and not torch.equal(output(network, stack, 0.5), base)
    _, stack = built(config({"path": "sat", "strength": {"0-1": 0, "2": 1}}))
    assert stack.layers == [2], "no adapters where none has an effect"


def test_a_schedule_is_linear_between_its_points_and_may_jump(config):
    schedule = [(0.2, 0.0), (0.4, 1.0), (0.8, 1.0), (0.8, -1.0)]
    scaled = Scaled(lora=None, strengths=(), schedule=schedule)
    shares = {0: 0, 0.2: 0, 0.3: 0.5, 0.4: 1, 0.79: 1, 0.8: -1, 1: -1}
    assert [scaled.at(share) for share in shares] == pytest.approx(list(shares.values()))
    loras = [{"path": "a", "strength": 2, "schedule": [[0, 0], [1, 1]]}, {"path": "b.safetensors"}]
    network, stack = built(config(*loras))
    assert stack.changes
    halfway = output(*built(config({"path": "a", "strength": 1}, {"path": "b.safetensors"})))
    torch.testing.assert_close(output(network, stack, 0.5), halfway, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["stored", pytest.param("compiled", marks=pytest.mark.slow), "offloaded"])
def test_other_settings_go_with_them(config, how):
    loras = [{"path": "a", "strength": 0.5, "schedule": [[0, 1], [1, 0.5]]}, {"path": "sat"}]
    expected = [output(*built(config(*loras)), share) for share in (0.0, 0.5)]
    network, stack = built(config(*loras), storage="int8" if how == "stored" else None)
    if how == "stored":
        assert isinstance(network.transformer.layers[0].attention.dense.original, StoredLinear)
    if how == "compiled":
        network.compile(backend="eager")
    if how == "offloaded":
        offload = Offload(network.requires_grad_(False), torch.device("cpu"), network.blocks)
        network.use_blocks_within(offload.block)
        offload.__enter__()
    found = [output(network, stack, share) for share in (0.0, 0.5)]
    atol = {"stored": 0.05, "compiled": 1e-6, "offloaded": 0}[how]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"path": "nowhere"}, "args.loras.0.path.*there is no LoRA at"),
        ({"path": "base"}, "args.loras.0.path.*holds no LoRA matrices"),
        ({"path": "wide.safetensors"}, r"is for another model: its .*matrix_A.0 has the shape \(2, 48\).*\(2, 32\)"),
        ({"path": "deep.safetensors"}, "adapts layer 3, and the model has 3"),
        ({"path": "sat", "alpha": 5}, "args.loras.0.alpha is 5, but .* records alpha 2; leave args.loras.0.alpha out"),
        ({"path": "sat", "strength": {"0-1": 1}}, r"args.loras.0.strength.*leaves out layers with adapters: 2"),
        ({"path": "sat", "strength": {"0-7": 1}}, "strength.0-7.*no group of layers.*from 0 to 2"),
        ({"path": "sat", "strength": {"all": 1}}, "strength.all.*no group of layers"),
        ({"path": "sat", "strength": {"0-2": 1, "1": 2}}, "names layer 1 again"),
        ({"path": "sat", "schedule": [[0.5, 1], [0, 1]]}, "args.loras.0.schedule.*shares ascending"),
        ({"path": "sat", "words": ["args.load=other"]}, "was trained on another base than .*other.*args.load"),
        (
            {"path": "a", "words": ["args.load=both"]},
            "args.load.*holds a network with adapters.*merge them first: tools",
        ),
        ({"path": "a", "words": ["args.load=sat"]}, "args.load.*holds adapters itself.*set args.load=.*base, and add"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(config, files, entry, said):
    for name, layer, size in (("wide", 0, 48), ("deep", 3, SIZE)):
        stem = f"transformer.transformer_blocks.{layer}.attn1.to_q"
        tensors = {f"{stem}.lora_A.weight": torch.ones(2, size), f"{stem}.lora_B.weight": torch.ones(size, 2)}
        save_file(tensors, files / f"{name}.safetensors")
    other = torch.load(find_weights(files / "base"), weights_only=True)
    other["module"]["model.diffusion_model.time_embed.0.bias"] += 1
    torch.save(other, files / "other")
    adapters = torch.load(find_weights(files / "sat"), weights_only=True)
    torch.save({"module": {**other["module"], **adapters["module"]}}, files / "both")
    words = [word.replace("=", f"={files}/") for word in entry.pop("words", ())]
    with pytest.raises(ConfigError, match=rf"(?s){said}"):
        with_loras(config(entry, words=words))


def test_what_does_not_fit_together_is_refused(config):
    own = "model.network_config.params.modules.lora_config={target: sat.model.finetune.lora2.LoraMixin, params: {r: 3}}"
    with pytest.raises(ConfigError, match=r"(?s)lora_config.*is given beside args.loras.*without _lora"):
        with_loras(config({"path": "a"}, words=[own]))
    with pytest.raises(ConfigError, match=r"have 36 ranks together, more than the hidden size 32(?s:.)*merge some"):
        with_loras(config(*[{"path": "a"}] * 9))
    missing = with_loras(config({"path": "a"}, words=["args.load=nowhere"]))
    assert "lora_config" in missing.model["network_config"]["params"]["modules"], "its loading says what is wrong"


def test_an_exported_lora_is_refused_on_another_base_unless_asked_for(config, files, tmp_path):
    export_lora(files / "sat", tmp_path / "exported")
    entry = {"path": str(tmp_path / "exported")}
    other = torch.load(find_weights(files / "base"), weights_only=True)
    other["module"]["model.diffusion_model.time_embed.0.bias"] += 2
    torch.save(other, tmp_path / "another")
    words = [f"args.load={tmp_path / 'another'}"]
    assert stack_of(config(entry)).rank == 3, "on the base of the training"
    for path in (entry["path"], "sat"):
        with pytest.raises(ConfigError, match=r"(?s)on another base than .*another.*args.loras.0.any_base=true"):
            with_loras(config({"path": path}, words=words))
        assert stack_of(config({"path": path, "any_base": True}, words=words)).rank == 3


def test_a_lora_of_another_kind_of_model_is_told_in_these_words_first():
    root, entry = Path(__file__).parents[4], ["args.loras=[{path: assets/toy_land}]"]
    for name, kind in (("toy_i2v", r"an image-to-video model \(toy_i2v\)"), ("toy1.5_i2v", "an image-to-video model")):
        loaded = load_config(
            [root / f"configs/{name}.yaml", root / "configs/toy_inference.yaml"], entry, mode="inference"
        )
        with pytest.raises(
            ConfigError, match=rf"is a LoRA of a text-to-video model \(toy\), and .* is {kind}.*; use it"
        ):
            with_loras(loaded)
