"""Whole pipeline folders: SAT → diffusers → SAT → diffusers, and outputs of diffusers with them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
    DiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from sgm.checks.sampling_plan import check_sampling
from sgm.config.load import load_config
from sgm.conversion.diffusers.from_sat import pipeline_of
from sgm.conversion.diffusers.to_sat import read_stored, sat_model_of, weight_files
from sgm.conversion.diffusers.verify import verify
from sgm.conversion.inspection import inspect_checkpoint
from sgm.conversion.lora import export_lora
from sgm.conversion.lora_import import import_lora
from sgm.conversion.trainers.sources import find_files, read_source
from sgm.inference.prompts import load_image
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.discretizer import ZeroSNRDDPMDiscretization
from sgm.modules.geometry import Geometry
from sgm.util import InputError, RunError, instantiate_from_config
from sgm.weights.adapters import AdapterInfo, read_adapter_info
from sgm.weights.checkpoint import save_network
from sgm.weights.files import find_weights, read_metadata, read_tensors, weights_digest
from tests.marks import only, thorough
from tests.processes import ROOT
from tests.sgm.conversion.conftest import FAMILIES

SOME = only(["cogvideox_2b", "cogvideox1.5_5b_i2v"], FAMILIES)
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
# Unused tensors, or tensors computed on both sides.
UNUSED = {"model.diffusion_model.transformer.position_embeddings.weight"}


def load(path, *overrides):
    return load_config([str(path)], ["args.input_type=cli", *overrides], mode="inference")


def parts(folder):
    return {name: folder / name for name in PARTS if (folder / name).is_dir()}


def equal(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="session")
def converted(family, tmp_path_factory):
    """Return a function: name of a family → its YAML, its pipeline folder, and the SAT folder made from that."""
    top = tmp_path_factory.mktemp("converted")

    def make(name):
        there, back = top / name / "diffusers", top / name / "sat"
        if not there.exists():
            pipeline_of(load(family(name)), title="Tiny").write(there, max_shard_size="200KB")
            sat_model_of(parts(there)).write(back)
        return family(name), there, back

    return make


@pytest.mark.parametrize("name", SOME)
def test_sat_comes_back_byte_by_byte(converted, name):
    path, _, back = converted(name)
    first, second = (read_tensors(find_weights(folder / "transformer")) for folder in (path.parent, back))
    assert first.keys() - second.keys() <= UNUSED
    assert equal({n: first[n] for n in second}, second)
    assert equal(*(read_tensors(folder / "vae" / "3d-vae.pt") for folder in (path.parent, back)))


@pytest.mark.parametrize("name", SOME)
def test_diffusers_comes_back_byte_by_byte(converted, name, tmp_path):
    _, there, back = converted(name)
    pipeline_of(load(back / "model.yaml"), title="Tiny").write(tmp_path / "again", max_shard_size="200KB")
    files = sorted(path.relative_to(there) for path in there.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    assert sum(path.suffix == ".safetensors" for path in files) > 4
    for path in files:
        assert (there / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


@pytest.mark.parametrize("name", SOME)
def test_the_yaml_made_from_diffusers_describes_the_same_model(converted, name):
    path, _, back = converted(name)
    own, made = (yaml.safe_load(file.read_text())["model"] for file in (path, back / "model.yaml"))
    for part in ("network_config", "denoiser_config", "first_stage_config"):
        built = [instantiate_from_config(content[part]) for content in (own, made)]
        if part == "denoiser_config":
            assert torch.equal(*(denoiser.table.on(torch.device("cpu")) for denoiser in built))
        else:
            shapes = [{n: t.shape for n, t in module.state_dict().items()} for module in built]
            assert shapes[0] == shapes[1]
    for key in ("scale_factor", "scale_image_latents", "noised_image_input", "ofs"):
        assert own.get(key) == made.get(key), key
    assert made["precision"] == ("fp16" if name == "cogvideox_2b" else "bf16")


@pytest.mark.parametrize("name", SOME)
def test_diffusers_computes_what_the_model_does(converted, name):
    path, there, _ = converted(name)
    found = verify(load(path), there)
    assert found.keys() == set(PARTS) - {"text_encoder"}
    assert found["transformer"] <= 2e-5 and found["vae"] <= 2e-5 and found["tokenizer"] == 0


@pytest.mark.parametrize("num_latents", only([3], [1, 3, 5]))
@torch.no_grad()
def test_the_converted_autoencoder_decodes_odd_counts_alike(converted, num_latents):
    path, there, _ = converted("cogvideox_5b")
    vae = instantiate_from_config(load(path).model["first_stage_config"])
    vae.load_state_dict({n: t.float() for n, t in read_tensors(path.parent / "vae" / "3d-vae.pt").items()})
    peer = AutoencoderKLCogVideoX.from_pretrained(there / "vae", torch_dtype=torch.float32).eval()
    latents = torch.randn(1, 16, num_latents, 2, 3, generator=torch.Generator().manual_seed(num_latents))
    torch.testing.assert_close(vae.eval().decode(latents), peer.decode(latents).sample, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["cogvideox_2b", "cogvideox1.5_5b_i2v"])
def test_the_folder_loads_as_a_pipeline(converted, name, tmp_path):
    _, there, _ = converted(name)
    cls = CogVideoXImageToVideoPipeline if "i2v" in name else CogVideoXPipeline
    pipe = DiffusionPipeline.from_pretrained(there, local_files_only=True)
    assert type(pipe) is cls
    assert json.loads((there / "model_index.json").read_text())["_class_name"] == cls.__name__
    assert isinstance(pipe.text_encoder, T5EncoderModel) and pipe.tokenizer("a red circle")["input_ids"]
    assert pipe.scheduler.config.snr_shift_scale == (3.0 if name == "cogvideox_2b" else 1.0)
    again = shutil.copytree(there / "transformer", tmp_path / "transformer")
    pipe.transformer.save_config(again)  # as CogKit does with a folder of a transformer alone
    loaded = type(pipe.transformer).from_pretrained(again).state_dict()
    assert equal(loaded, pipe.transformer.state_dict())
    assert pipe.vae.dtype == torch.float32 and pipe.vae_scaling_factor_image == (1.15258426 if "2b" in name else 0.7)


class DiffusersSchedule(ZeroSNRDDPMDiscretization):
    """The steps that diffusers takes: equal strides from the end, at the levels of the whole schedule."""

    def timesteps(self, n):
        if n == 1000:
            return super().timesteps(n)
        return torch.arange(1000, 0, -1000 // n).flip(0) - 1

    def levels(self, n):
        return ZeroSNRDDPMDiscretization().levels(1000)[::-1][self.timesteps(n).numpy()][::-1]


STEPS = 4


@pytest.mark.parametrize("name", [thorough("toy"), thorough("toy_i2v"), "toy1.5_i2v"])
@torch.no_grad()
def test_the_pipeline_makes_the_same_video(name, tmp_path):
    sampler = "model.sampler_config.target=sgm.modules.diffusionmodules.sampling.VideoDDIMSampler"
    patches = "1.5" in name
    num = 4 if patches else 5  # diffusers pads odd counts in another way, and decodes even ones to more frames
    steps = [f"model.sampler_config.params.{key}={STEPS}" for key in ("num_steps", "guider_config.params.num_steps")]
    config = load(ROOT / "configs" / f"{name}.yaml", sampler, *steps)
    pipeline_of(config, fold_image_scale=patches).write(tmp_path / "pipe")
    cls = CogVideoXPipeline if name == "toy" else CogVideoXImageToVideoPipeline
    pipe = cls.from_pretrained(tmp_path / "pipe", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    engine = SATVideoDiffusionEngine(**config.model)
    engine.load_weights(config.args.load, dtype=torch.float32, device=torch.device("cpu"))
    engine.load_first_stage(dtype=torch.float32, device=torch.device("cpu"))
    engine.eval()
    engine.sampler.discretization = DiffusersSchedule()
    prompt, image, concat = "a red circle moves right", None, None
    cond = engine.conditioner({"txt": [prompt]})
    uncond = {key: torch.zeros_like(value) for key, value in cond.items()}
    if name != "toy":
        file = ROOT / "assets" / "toy" / "images" / "red_square.png"
        image = Image.open(file).convert("RGB")
        concat = engine.image_latents(load_image(file, (64, 64))[None], num)
    latents = engine.sample(
        cond, uncond, shape=(num, 16, 8, 8), generators=[torch.Generator().manual_seed(7)], concat=concat
    )
    ours = latents if patches else (engine.decode_first_stage(latents).clamp(-1, 1) + 1) / 2

    noise = torch.randn(num, 16, 8, 8, generator=torch.Generator().manual_seed(7))[None]
    guider = config.model["sampler_config"]["params"]["guider_config"]["params"]
    # The mean of the image posterior, not a sample, as in this project.
    pipe.vae.encode = lambda video, encode=pipe.vae.encode: _Mean(encode(video).latent_dist.mean)
    theirs = pipe(
        **({} if image is None else {"image": image}),
        prompt_embeds=cond["crossattn"],
        negative_prompt_embeds=uncond["crossattn"],
        latents=noise,
        num_frames=4 * (num - 1) + 1,
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=guider["scale"],
        use_dynamic_cfg=True,
        output_type="latent" if patches else "pt",
    ).frames
    assert ours.std() > 0.05, "there is a picture"
    assert math.isfinite(float(ours.sum())) and tuple(ours.shape) == tuple(theirs.shape)
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param("VideoDDIMSampler", CogVideoXDDIMScheduler, marks=pytest.mark.slow),
        ("VPSDEDPMPP2MSampler", CogVideoXDPMScheduler),
    ],
)
@torch.no_grad()
def test_video_to_video_is_that_of_diffusers(converted, ours, theirs):
    path, there, _ = converted("cogvideox_5b")
    sampler = f"model.sampler_config.target=sgm.modules.diffusionmodules.sampling.{ours}"
    steps = [f"model.sampler_config.params.{key}=10" for key in ("num_steps", "guider_config.params.num_steps")]
    config = load(path, sampler, *steps)
    engine = SATVideoDiffusionEngine(**config.model, allocate=False)
    engine.load_weights(config.args.load, dtype=torch.float32, device=torch.device("cpu"))
    engine.load_first_stage(dtype=torch.float32, device=torch.device("cpu"))
    engine.sampler.discretization = DiffusersSchedule()
    cond = {"crossattn": torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(1))}
    uncond = {"crossattn": torch.zeros(1, 6, 24)}
    video = torch.rand(13, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    source = engine.encode_first_stage(2 * video[None] - 1, sample=False)
    latents = engine.sample(
        cond,
        uncond,
        shape=(4, 16, 8, 12),
        generators=[torch.Generator().manual_seed(7)],
        source=source,
        strength=0.35,
        scale=2.0,
    )

    pipe = CogVideoXVideoToVideoPipeline.from_pretrained(there, local_files_only=True, torch_dtype=torch.float32)
    pipe.scheduler = theirs.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.encode = lambda clip, encode=pipe.vae.encode: _Mean(encode(clip).latent_dist.mean)
    found = pipe(
        video=list(video),
        strength=0.35,
        height=64,
        width=96,
        prompt_embeds=cond["crossattn"],
        negative_prompt_embeds=uncond["crossattn"],
        num_inference_steps=10,
        guidance_scale=2.0,
        use_dynamic_cfg=True,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).frames
    assert (latents - found).abs().max() <= 1e-5 * found.abs().max().clamp(min=1)
    assert (latents - source).abs().max() > 0.1


@pytest.mark.parametrize(("frames", "latents"), [(13, 4), thorough(9, 3)])
@torch.no_grad()
def test_even_counts_of_1_5_are_sampled_without_padding_as_in_diffusers(converted, frames, latents):
    path, there, _ = converted("cogvideox1.5_5b")
    sampler = "model.sampler_config.target=sgm.modules.diffusionmodules.sampling.VideoDDIMSampler"
    steps = [f"model.sampler_config.params.{key}=2" for key in ("num_steps", "guider_config.params.num_steps")]
    config = load(path, sampler, *steps, f"args.sampling_num_frames={latents}")
    plan = check_sampling(config.args, Geometry.from_network(config.model["network_config"]["params"]))
    assert (plan.latents, plan.padded_latents, plan.video_frames) == (latents, 4, frames)

    engine = SATVideoDiffusionEngine(**config.model, allocate=False)
    engine.load_weights(config.args.load, dtype=torch.float32, device=torch.device("cpu"))
    engine.sampler.discretization = DiffusersSchedule()
    cond = {"crossattn": torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(1))}
    uncond = {"crossattn": torch.zeros(1, 6, 24)}
    shape = (plan.latents, 16, 8, 12)
    ours = engine.sample(cond, uncond, shape=shape, generators=[torch.Generator().manual_seed(7)], scale=3.0)

    pipe = CogVideoXPipeline.from_pretrained(there, local_files_only=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt_embeds=cond["crossattn"],
        negative_prompt_embeds=uncond["crossattn"],
        latents=torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(7))[None],
        num_frames=frames,
        height=64,
        width=96,
        num_inference_steps=2,
        guidance_scale=3.0,
        use_dynamic_cfg=True,
        output_type="latent",
    ).frames
    assert ours.shape[1] == latents and theirs.shape[1] == 4
    torch.testing.assert_close(ours, theirs[:, 4 - latents :], rtol=0, atol=2e-5)


class _Mean:
    def __init__(self, mean):
        self.latents = mean


def test_folding_the_image_scale_lets_diffusers_compute_what_sat_does(family, tmp_path):
    config = load(family("cogvideox1.5_5b_i2v"))
    pipeline_of(config, dtype=torch.float32, fold_image_scale=True).write(tmp_path / "folded")
    pipeline_of(config, dtype=torch.float32).write(tmp_path / "plain")
    weights = [load_file(tmp_path / each / TRANSFORMER) for each in ("folded", "plain")]
    name = "patch_embed.proj.weight"
    folded, plain = (w.pop(name).unflatten(1, (32, -1)) for w in weights)
    assert equal(*weights)
    assert torch.equal(folded[:, :16], plain[:, :16])
    torch.testing.assert_close(folded[:, 16:], plain[:, 16:] * 0.7, rtol=1e-6, atol=0)
    for each in ("folded", "plain"):
        assert json.loads((tmp_path / each / "vae" / "config.json").read_text())["invert_scale_latents"] is True
    assert verify(config, tmp_path / "folded")["transformer"] <= 2e-5  # image latents are divided by 0.7 there
    back = sat_model_of({"transformer": tmp_path / "folded" / "transformer"})
    assert back.network is not None
    unfolded = back.network["mixins.patch_embed.proj.weight"].compute().unflatten(1, (32, -1))
    torch.testing.assert_close(unfolded, plain, rtol=1e-6, atol=0)
    with pytest.raises(InputError, match="is for image-to-video models that take image latents unscaled"):
        pipeline_of(load(family("cogvideox_5b_i2v")), fold_image_scale=True)


def test_dtypes(converted, family, tmp_path):
    pipeline_of(load(family("cogvideox_5b")), dtype=torch.float16).write(tmp_path / "half")
    for name, dtype in {"transformer": torch.float16, "text_encoder": torch.float16, "vae": torch.float32}.items():
        (file,) = (tmp_path / "half" / name).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}, name
    assert json.loads((tmp_path / "half" / "text_encoder" / "config.json").read_text())["dtype"] == "float16"


def test_parts_are_left_out_on_request(family, tmp_path):
    config = load(family("cogvideox_5b"), "model.conditioner_config.params.emb_models.0.params.model_dir=nowhere")
    with pytest.raises(InputError, match="T5 folder 'nowhere' does not exist"):
        pipeline_of(config)
    pipeline_of(config, without=["text_encoder", "tokenizer"]).write(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert {name for name in index if name[0] != "_"} == {"transformer", "vae", "scheduler"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model_index.json",
        "scheduler",
        "transformer",
        "vae",
    ]
    pipe = CogVideoXPipeline.from_pretrained(tmp_path / "out", text_encoder=None, tokenizer=None)
    assert isinstance(pipe.transformer, CogVideoXTransformer3DModel)


def test_single_files_need_a_yaml_or_a_config(converted, family, tmp_path):
    path, there, _ = converted("cogvideox_5b")
    tensors = {}
    for file in sorted((there / "transformer").glob("*.safetensors")):
        tensors |= load_file(file)
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"has no config\.json; say what it is with --base"):
        sat_model_of({"transformer": tmp_path / "weights.safetensors"})
    base = load(path).merged
    sat_model_of({"transformer": tmp_path / "weights.safetensors"}, base=base).write(
        tmp_path / "sat", file_format="safetensors"
    )
    first, second = (read_tensors(find_weights(top / "transformer")) for top in (path.parent, tmp_path / "sat"))
    assert equal({n: first[n] for n in second}, second)
    shutil.copy(there / "transformer" / "config.json", tmp_path)
    assert sat_model_of({"transformer": tmp_path / "weights.safetensors"}).network is not None
    tensors = {
        name: tensor for file in (there / "vae").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    (tmp_path / "vae").mkdir()
    save_file(tensors, file := tmp_path / "vae" / "vae.safetensors")
    with pytest.raises(InputError, match=r"(?s)vae.safetensors: .*no config\.json.*; say what it is with --base"):
        sat_model_of({"vae": file})
    assert sat_model_of({"vae": file}, base=base).autoencoder is not None
    for part, said in {"transformer": "have no counterpart in SAT", "vae": "there is no decoder"}.items():
        save_file({"model.a.weight": torch.ones(1)}, file)
        with pytest.raises(InputError, match=f"^{file}: .*{said}"):
            sat_model_of({part: file}, base=base)


def test_another_position_table_is_refused(family, tmp_path):
    path = family("cogvideox_2b")
    content = read_tensors(find_weights(path.parent / "transformer"))
    name = "model.diffusion_model.mixins.pos_embed.pos_embedding"
    torch.save({"module": {**content, name: content[name] + 0.05}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"differs by 0\.05\d* from the sine-cosine table"):
        pipeline_of(load(path, f"args.load={tmp_path / 'other.pt'}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.network_config.params.use_RMSNorm=true", "RMS norms"),
        ("model.network_config.params.use_SwiGLU=true", "a gated MLP"),
        ("model.network_config.params.modules.adaln_layer_config.params.qk_ln=false", "no norms of queries and keys"),
        ("model.network_config.params.modules.pos_embed_config.params.theta=500.0", "theta 500"),
        ("model.network_config.params.patch_size=[1,2,4]", "patches of 2x4"),
        ("model.denoiser_config.params.discretization_config.params.post_shift=true", "post_shift"),
    ],
)
def test_what_diffusers_does_not_have_is_refused(family, override, message):
    with pytest.raises(InputError, match=message):
        pipeline_of(load(family("cogvideox_5b"), override), without=["vae", "text_encoder", "tokenizer"])


def test_weights_of_another_family_are_refused(family):
    other = family("cogvideox1.5_5b").parent / "transformer"
    with pytest.raises(InputError, match="does not fit the configured network"):
        pipeline_of(load(family("cogvideox_5b"), f"args.load={other}"))


def test_a_config_that_is_not_that_of_the_weights_is_refused(converted, tmp_path):
    _, there, _ = converted("cogvideox_5b")
    shutil.copytree(there / "transformer", tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(InputError, match=r"do not fit the configuration:(.|\n)*adaLN_modulations\.2\..* is missing"):
        sat_model_of({"transformer": tmp_path / "transformer"})
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(InputError, match="transformer/config.json describes a SD3Transformer2DModel"):
        sat_model_of({"transformer": tmp_path / "transformer"})
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"activation_fn": "geglu"}))
    with pytest.raises(InputError, match="activation_fn='geglu'"):
        sat_model_of({"transformer": tmp_path / "transformer"})


def with_header(part: Path, folder: Path, **metadata: str) -> Path:
    """Return a copy of a part of a pipeline, in `folder`, with other entries in the header of its first file."""
    copy = shutil.copytree(part, folder / part.name)
    file = min(copy.glob("*.safetensors"))
    save_file(load_file(file), file, {"format": "pt", **metadata})
    return copy


@pytest.mark.parametrize("dtype", ["int8", "complex64", "abc", "load", ""])
def test_a_dtype_in_the_header_of_the_vae_is_checked(converted, tmp_path, dtype):
    _, there, _ = converted("cogvideox_5b")
    folder = with_header(there / "vae", tmp_path, sat_dtype=dtype)
    with pytest.raises(InputError, match=f"vae: sat_dtype in the header is '{dtype}', expected a precision"):
        sat_model_of({"vae": folder})


@pytest.mark.parametrize("factor", ["0", "nan", "-1", "1e400", "abc", ""])
def test_a_folded_factor_in_the_header_is_checked(converted, tmp_path, factor):
    _, there, _ = converted("cogvideox1.5_5b_i2v")
    folder = with_header(there / "transformer", tmp_path, image_scale_folded=factor)
    with pytest.raises(InputError, match=f"transformer: image_scale_folded in the header is '{factor}', expected"):
        sat_model_of({"transformer": folder})


def test_a_missing_shard_is_named(converted, tmp_path):
    _, there, _ = converted("cogvideox_5b")
    shutil.copytree(there / "transformer", tmp_path / "transformer")
    gone = max((tmp_path / "transformer").glob("*.safetensors"))
    gone.unlink()
    with pytest.raises(InputError, match=f"lacks {gone.name}"):
        sat_model_of({"transformer": tmp_path / "transformer"})


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"a": "1.safetensors", "b": "2.safetensors"}, "2.safetensors holds a, which its index does not place there"),
        ({"a": "2.safetensors", "b": "2.safetensors"}, ""),
        ({"b": "2.safetensors"}, "2.safetensors holds a, which its index does not place there"),
        ({"a": "2.safetensors", "b": "2.safetensors", "c": "2.safetensors"}, "2.safetensors lacks c, which its index"),
        ({"a": "../1.safetensors", "b": "2.safetensors"}, "names '../1.safetensors', and weights are files in its own"),
        ({"a": "/etc/passwd", "b": "2.safetensors"}, "names '/etc/passwd'"),
        ({"a": "x" * 300}, "lacks x"),
    ],
)
def test_an_index_names_what_its_files_hold(tmp_path, listed, message):
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "2.safetensors")
    (tmp_path / "w.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    if not message:
        assert weight_files(tmp_path) == [tmp_path / "2.safetensors"]
        return
    for read in (weight_files, read_stored, inspect_checkpoint, read_source):
        with pytest.raises(InputError, match=message):
            read(tmp_path)


def test_an_index_of_a_variant_is_found_and_can_be_named(tmp_path):
    """As ``save_pretrained(variant="fp16")`` writes it, alone and beside other files."""
    listed = {}
    for n, name in enumerate("ab", start=1):
        listed[name] = f"w.fp16-0000{n}-of-00002.safetensors"
        save_file({name: torch.ones(1)}, tmp_path / listed[name])
    index = tmp_path / "w.safetensors.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    files = [tmp_path / file for file in listed.values()]
    for path in (tmp_path, index):
        assert weight_files(path) == find_files(path) == files
    with pytest.raises(InputError, match=f"is one of 2 files of a model; give their index, {index}"):
        weight_files(files[0])
    whole = tmp_path / "w.safetensors"
    save_file({"c": torch.ones(1)}, whole)
    with pytest.raises(InputError, match=r"found: w.safetensors.index.fp16.json, .*Name the index"):
        weight_files(tmp_path)
    assert (weight_files(whole), weight_files(index)) == ([whole], files)
    other = tmp_path / "w.bin.index.json"
    other.write_text("{")
    assert (weight_files(whole), find_files(index)) == ([whole], files)


def test_the_text_encoder_is_checked_before_anything_is_written(converted, tmp_path):
    path, there, _ = converted("cogvideox_2b")
    folder = shutil.copytree(there / "text_encoder", tmp_path / "text_encoder")
    shutil.copy(there / "tokenizer" / "spiece.model", folder)
    name, file = "encoder.final_layer_norm.weight", folder / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != name}, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"do not fit its config.json: {name} is missing"):
        sat_model_of({"text_encoder": folder})
    config = load(path, f"model.conditioner_config.params.emb_models.0.params.model_dir={folder}")
    with pytest.raises(InputError, match=f"do not fit its config.json: {name} is missing"):
        pipeline_of(config)


def test_the_parts_of_a_new_model_are_found_where_they_are(converted, tmp_path):
    _, there, _ = converted("cogvideox_5b")
    sat_model_of({"vae": there / "vae"}).write(tmp_path / "new" / ".." / "out")
    model = yaml.safe_load((tmp_path / "out" / "model.yaml").read_text())["model"]
    assert read_tensors(model["first_stage_config"]["params"]["ckpt_path"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_verification_notices_a_changed_weight(converted, tmp_path):
    path, there, _ = converted("cogvideox_5b")
    shutil.copytree(there, tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / f"{TRANSFORMER}.index.json").read_text())
    file = tmp_path / "pipe" / "transformer" / index["weight_map"]["proj_out.bias"]
    tensors = load_file(file)
    tensors["proj_out.bias"] = tensors["proj_out.bias"] + 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"transformer: 1\.\d+e-02"):
        verify(load(path), tmp_path / "pipe")


def test_adapters_are_merged_or_kept(tiny_model, tmp_path):
    config = load(tiny_model("dit_t2v_5b_lora"))
    skip = ["vae", "text_encoder", "tokenizer", "scheduler"]
    for adapters in ("merge", "keep"):
        out = tmp_path / adapters
        pipeline_of(config, adapters=adapters, without=skip).write(out)
        assert (out / "pytorch_lora_weights.safetensors").exists() == (adapters == "keep")
        assert verify(config, out)["transformer"] <= 2e-5
    merged, kept = (load_file(tmp_path / name / TRANSFORMER) for name in ("merge", "keep"))
    name = "transformer_blocks.1.attn1.to_v.weight"
    assert merged.keys() == kept.keys()
    changed = {n for n in merged if not torch.equal(merged[n], kept[n])}
    assert name in changed and all(".attn1.to_" in n for n in changed)
    assert np.isfinite(float((merged[name] - kept[name]).abs().max()))


@pytest.mark.parametrize("name", SOME)
def test_adapters_of_every_family_come_back_byte_by_byte(family, tmp_path, name):
    config = load(family(name))
    generator = torch.Generator().manual_seed(5)
    matrices = {}
    for layer in range(2):
        for target, pairs in (("query_key_value", 3), ("dense", 1)):
            for pair in range(pairs):
                stem = f"transformer.layers.{layer}.attention.{target}"
                matrices[f"{stem}.matrix_A.{pair}"] = torch.randn(4, 64, generator=generator)
                matrices[f"{stem}.matrix_B.{pair}"] = torch.randn(64, 4, generator=generator)
    digest = weights_digest(find_weights(config.args.load))
    info = AdapterInfo(rank=4, alpha=3.0, layers=(0, 1), base=config.args.load, base_digest=digest)
    patch_size = config.model["network_config"]["params"]["patch_size"]
    save_network(tmp_path / "sat", 1, matrices, patch_size=patch_size, adapters=info)
    export_lora(tmp_path / "sat", tmp_path / "lora")
    import_lora(config, tmp_path / "lora", tmp_path / "back")
    assert equal(*(read_tensors(find_weights(tmp_path / each)) for each in ("sat", "back")))
    assert read_adapter_info(tmp_path / "back") == info
    adapted = load(family(name), f"args.load={tmp_path / 'sat'}")
    skip = ["vae", "text_encoder", "tokenizer", "scheduler"]
    for out, adapters, dtype in (
        ("merge", "merge", torch.float32),
        ("keep", "keep", torch.float32),
        ("own", "keep", None),
    ):
        pipeline_of(adapted, adapters=adapters, dtype=dtype, without=skip).write(tmp_path / out)
        assert verify(adapted, tmp_path / out)["transformer"] <= 2e-5
    header = read_metadata(tmp_path / "keep" / "pytorch_lora_weights.safetensors")
    expected = {"base_digest": digest, "ss_network_dim": "4", "modelspec.architecture": "cogvideox/lora"}
    assert expected.items() <= header.items()
