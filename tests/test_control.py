"""A second video as condition: the network, its weights, data, caches, sampling, and the peer in diffusers."""

import copy
import dataclasses
import re
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml
from diffusers import CogVideoXFunControlPipeline

from benchmarks.models import build_network
from data_video import SFTDataset
from sgm.checks.planner import sampling_rows
from sgm.config.load import ConfigError, load_config
from sgm.conversion.diffusers.from_sat import pipeline_of
from sgm.conversion.diffusers.to_sat import sat_model_of
from sgm.conversion.diffusers.verify import verify
from sgm.data.clips.masks import latent_mask, white
from sgm.inference.prepare import prepare
from sgm.inference.prompts import parse_prompts
from sgm.inference.run import SamplingRun
from sgm.inference.video import write_video
from sgm.models.training_inputs import training_inputs
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.training.inputs.caches import open_latents
from sgm.training.inputs.clips import open_data
from sgm.training.inputs.precompute import _Clip, plan_jobs, run_jobs
from sgm.training.optim.trainable import choose_trainable
from sgm.training.prepare import prepare as prepare_training
from sgm.util import InputError, instantiate_from_config
from sgm.weights.adapters import AdapterInfo, is_added
from sgm.weights.architecture import CONTROL_WEIGHT
from sgm.weights.checkpoint import load_network, save_network
from sgm.weights.files import find_weights, weights_digest
from sgm.weights.lora.files import read_lora
from tests.marks import only, thorough
from tests.sgm.conversion.conftest import FAMILIES, SIZE, family  # noqa: F401
from tests.sgm.conversion.diffusers.test_folders import DiffusersSchedule, load
from tests.test_dit import LORA

CONFIGS = Path(__file__).parents[1] / "configs"
CONTROL = "model.network_config.params.control_channels=16"
TRANSFORMER = ["vae", "text_encoder", "tokenizer", "scheduler"]


def with_control(section, **more):
    section = copy.deepcopy(section)
    section["params"] |= {"control_channels": 16} | more
    return section


def network_inputs(network, frames=2):
    x = torch.randn(1, frames, network.in_channels, 8, 12, generator=torch.Generator().manual_seed(1))
    context = torch.randn(1, SIZE.text_length, SIZE.text_hidden_size, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([500]), context, {} if network.ofs_embed_dim is None else {"ofs": torch.tensor([2.0])}


@pytest.fixture
def trained(family, tmp_path):  # noqa: F811
    """Return a function: name of a family → the YAML of a model of it with a control, whose columns are not zero."""

    def make(name):
        content = yaml.safe_load(family(name).read_text())
        content["model"]["network_config"] = section = with_control(content["model"]["network_config"])
        network = build_network(section, seed=3)
        torch.nn.init.normal_(network.get_parameter(CONTROL_WEIGHT), std=0.1)
        save_network(tmp_path / "transformer", 1, network, patch_size=network.patch_size)
        content["args"]["load"] = str(tmp_path / "transformer")
        (path := tmp_path / "model.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return make


@pytest.mark.parametrize("name", only(["cogvideox1.5_5b_i2v"], FAMILIES))
@torch.no_grad()
def test_an_untrained_control_leaves_the_network_as_it_is_bit_for_bit(family, name):  # noqa: F811
    config = load(family(name))
    section = config.model["network_config"]
    base, network = (instantiate_from_config(each) for each in (section, with_control(section)))
    load_network(base, config.args.load, dtype=torch.float32)
    report = load_network(network, config.args.load, dtype=torch.float32)
    assert "the columns of the control start at zero" in str(report) and "LoRA" not in str(report)
    x, *given, ofs = network_inputs(base)
    control = torch.randn(1, 2, 16, 8, 12)
    assert torch.equal(base(x, *given, **ofs), network(torch.cat((x, control), dim=2), *given, **ofs))
    torch.nn.init.ones_(network.get_parameter(CONTROL_WEIGHT))
    shown = network(torch.cat((x, control), dim=2), *given, **ofs)
    assert not torch.equal(shown, network(torch.cat((x, 2 * control), dim=2), *given, **ofs))
    with pytest.raises(InputError, match="those of a control"):
        network(x, *given, **ofs)


def test_weights_without_a_control_are_refused_for_sampling_and_those_with_one_need_it(trained, family):  # noqa: F811
    config, path = load(family("cogvideox_5b")), find_weights(load(trained("cogvideox_5b")).args.load)
    section = config.model["network_config"]
    network = instantiate_from_config(with_control(section))
    with pytest.raises(InputError, match="holds no weights for a control video"):
        load_network(network, config.args.load, allow_missing_adapters=False)
    with pytest.raises(InputError, match=r"takes a control video, and the configuration none; add \S+video\.yaml$"):
        load_network(instantiate_from_config(section), path)
    with pytest.raises(InputError, match=r"control_channels=3 is neither 0 nor out_channels=16"):
        instantiate_from_config(with_control(section, control_channels=3))


@torch.no_grad()
def test_lora_holds_the_columns_of_the_control_beside_its_matrices(family, tmp_path):  # noqa: F811
    config = load(family("cogvideox_5b"))
    base = find_weights(config.args.load)
    section = with_control(config.model["network_config"])
    section["params"]["modules"] = section["params"]["modules"] | {"lora_config": LORA}
    network, other = instantiate_from_config(section), instantiate_from_config(section)
    load_network(network, base, dtype=torch.float32)
    chosen = choose_trainable(network, {"not_trainable_prefixes": ["all"]})
    assert CONTROL_WEIGHT in chosen.names and all(map(is_added, chosen.names)) and chosen.adapters
    assert "and the columns of the control" in str(chosen)
    tensors = {name: torch.nn.init.normal_(network.get_parameter(name), std=0.1) for name in chosen.names}
    info = AdapterInfo(rank=4, alpha=1.0, layers=(0, 1), base=str(base), base_digest=weights_digest(base))
    file = save_network(tmp_path, 1, tensors, patch_size=network.patch_size, adapters=info)
    load_network(other, tmp_path, dtype=torch.float32, allow_missing_adapters=False)
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in network.named_parameters())
    with pytest.raises(InputError, match=r"holds the columns of a control beside its LoRA.*sample it with args\.load"):
        read_lora(file)
    # On top of weights with a control, new matrices are added, and its columns go on.
    full = save_network(tmp_path / "full", 1, {n: t for n, t in network.state_dict().items() if "matrix" not in n
                        }, patch_size=network.patch_size)  # fmt: skip
    renamed = instantiate_from_config(section)
    report = load_network(renamed, full, dtype=torch.float32)
    assert torch.equal(renamed.get_parameter(CONTROL_WEIGHT), tensors[CONTROL_WEIGHT])
    assert CONTROL_WEIGHT not in report.new_adapters and report.new_adapters


@pytest.mark.parametrize("name", [thorough("cogvideox_2b"), thorough("cogvideox_5b"), "cogvideox1.5_5b"])
def test_diffusers_computes_what_a_network_with_a_control_does(trained, tmp_path, name):
    config = load(trained(name))
    pipeline_of(config, without=TRANSFORMER).write(tmp_path / "pipe")
    assert verify(config, tmp_path / "pipe")["transformer"] <= 2e-5
    peer = yaml.safe_load((tmp_path / "pipe/transformer/config.json").read_text())
    index = yaml.safe_load((tmp_path / "pipe/model_index.json").read_text())
    assert (peer["in_channels"], index["_class_name"]) == (32, "CogVideoXFunControlPipeline")
    with pytest.raises(InputError, match="which is not imported"):
        sat_model_of({"transformer": tmp_path / "pipe" / "transformer"})


def test_what_diffusers_has_no_place_for_is_said(trained):
    with pytest.raises(InputError, match="no pipeline with both"):
        pipeline_of(load(trained("cogvideox_5b_i2v")), without=TRANSFORMER)


@torch.no_grad()
def test_a_sample_with_a_control_is_that_of_diffusers(trained, tmp_path):
    sampler = "model.sampler_config.target=sgm.modules.diffusionmodules.sampling.VideoDDIMSampler"
    steps = [f"model.sampler_config.params.{key}=2" for key in ("num_steps", "guider_config.params.num_steps")]
    config = load(trained("cogvideox_5b"), sampler, *steps)
    pipeline_of(config).write(tmp_path / "pipe")
    pipe = CogVideoXFunControlPipeline.from_pretrained(tmp_path / "pipe", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    engine = SATVideoDiffusionEngine(**config.model)
    engine.load_weights(config.args.load, dtype=torch.float32, device=torch.device("cpu"))
    engine.load_first_stage(dtype=torch.float32, device=torch.device("cpu"))
    engine.eval()
    engine.sampler.discretization = DiffusersSchedule()
    cond = engine.conditioner({"txt": ["a red circle"]})
    uncond = {key: torch.zeros_like(value) for key, value in cond.items()}
    video = torch.rand(1, 5, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    control = engine.encode_first_stage(video * 2 - 1, sample=False)
    given = {"shape": (2, 16, 8, 12), "generators": [torch.Generator().manual_seed(7)]}
    ours = engine.sample(cond, uncond, control=control, **given)
    theirs = pipe(
        control_video=video,
        prompt_embeds=cond["crossattn"],
        negative_prompt_embeds=uncond["crossattn"],
        latents=torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(7))[None],
        height=64,
        width=96,
        num_inference_steps=2,
        guidance_scale=config.model["sampler_config"]["params"]["guider_config"]["params"]["scale"],
        use_dynamic_cfg=True,
        output_type="latent",
    ).frames
    assert not torch.equal(ours, engine.sample(cond, uncond, control=0 * control, **given))
    assert (ours - theirs).abs().max() <= 2e-5


# --- Data.


def clip(path, *, frames=12, fps=8, size=(64, 96), shift=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.arange(size[1], dtype=np.uint8)[None, None, :, None] + 10 * np.arange(frames)[:, None, None, None] + shift
    write_video(path, np.broadcast_to(ramp.astype(np.uint8), (frames, *size, 3)), fps, crf=0)
    return path


def folder_with_clip(folder, name="a"):
    clip(folder / "videos" / f"{name}.mp4")
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels" / f"{name}.txt").write_text("a ramp")
    return folder


def dataset(data_dir, **more):
    return SFTDataset(data_dir=data_dir, video_size=(32, 32), max_num_frames=5, skip_frms_num=1, fps=4, **more)


def test_a_control_has_the_frames_crop_and_mirroring_of_its_clip(tmp_path):
    root = folder_with_clip(tmp_path)
    (root / "control").mkdir()
    (root / "control" / "a.mp4").write_bytes((root / "videos" / "a.mp4").read_bytes())
    (root / "table.csv").write_text("video,caption,control\nvideos/a.mp4,a ramp,control/a.mp4\n")
    for source in (root, root / "table.csv"):
        data = dataset(source, control=True, reshape_mode="random", random_flip=0.5)
        assert len(data) == 1 and not data.check()[0].problems
        for seed in range(3):
            sample = data.sample(0, torch.Generator().manual_seed(seed))
            assert torch.equal(sample["control"], sample["mp4"])
    assert "control" not in dataset(root)[0] and len(dataset(root)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "its control is missing; put it into the folder control/"),
        ({"frames": 9}, "has 9 frames, and the clip 12"),
        ({"fps": 16}, "runs at 16 fps, and the clip at 8"),
        ({"size": (64, 64)}, "is 64x64, and the clip 64x96: another shape"),
        ("damaged", "its control .*a.mp4"),
        ({"size": (32, 48)}, None),
    ],
)
def test_a_control_that_does_not_fit_its_clip_is_a_problem_of_the_clip(tmp_path, settings, message):
    root = folder_with_clip(tmp_path)
    if settings == "damaged":
        (root / "control").mkdir()
        (root / "control" / "a.mp4").write_bytes(b"no video")
    elif settings is not None:
        clip(root / "control" / "a.mp4", **settings)
    data = dataset(root, control=True)
    (report,) = data.check()
    if message is None:
        assert not report.problems and data[0]["control"].shape == data[0]["mp4"].shape
        return
    assert len(report.problems) == 1
    assert re.search(message, report.problems[0])
    with pytest.raises(Exception, match=message):
        data[0]


def test_training_inputs_from_a_cache_are_those_of_the_clips(tmp_path):
    for name in "ab":
        root = folder_with_clip(tmp_path / "data", name)
        clip(root / "control" / f"{name}.mp4", shift=30)
        clip(root / "mask" / f"{name}.mp4", shift=90)  # a ramp that gets brighter: white from a column on
    bases = [CONFIGS / f"{name}.yaml" for name in ("toy", "toy_sft", "control/video")]
    overrides = [f"args.train_data=[{root}]", "args.eval_interval=null", "data.params.max_num_frames=5"]
    overrides += ["data.params.mask=true"]
    config = load_config(bases, [*overrides, "args.split='1,0,0'"], mode="train")
    run_jobs(plan_jobs(config, ("latents",)), tmp_path / "cache")
    cached = dataclasses.replace(config, args=dataclasses.replace(config.args, latent_cache=str(tmp_path / "cache")))
    data, latents, _ = open_latents(cached, open_data(cached), torch.float32)
    engine = instantiate_from_config(config.engine, allocate=False)
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    engine.load_weights(config.args.load, **place)
    engine.load_first_stage(**place)
    made = []
    for source in (open_data(config).train[0], data.train[0]):
        batch = {key: [value] for key, value in source.sample(1, None).items()}
        made.append((batch, training_inputs(engine, batch, [torch.Generator().manual_seed(3)])))
    assert "control" in made[0][0] and "control_moments" in made[1][0] and latents is not None
    plain, from_cache = (inputs for _, inputs in made)
    assert plain.cond["control"].shape == plain.latents.shape
    assert not torch.allclose(plain.cond["control"], plain.latents, atol=1e-2)
    assert torch.allclose(plain.cond["control"], from_cache.cond["control"], atol=1e-5)
    mask = plain.of_loss["mask"]
    assert torch.equal(mask, from_cache.of_loss["mask"]) and 0.1 < mask.mean() < 0.9
    losses = [engine.training_losses(inputs) for inputs in (plain, dataclasses.replace(plain, of_loss={}))]
    assert torch.isfinite(losses[0]).all() and not torch.allclose(losses[0], losses[1], rtol=1e-4)
    clip(root / "control" / "b.mp4", frames=12, shift=60, fps=8)  # other bytes: another file size
    with pytest.raises(InputError, match="cache"):
        open_latents(cached, open_data(cached), torch.float32)


def test_a_network_and_data_of_which_one_has_a_control_are_refused(tmp_path):
    bases = [CONFIGS / f"{name}.yaml" for name in ("toy", "toy_sft", "control/video")]
    config = load_config(bases, [f"args.train_data=[{folder_with_clip(tmp_path)}]", "data.params.control=false"],
                         mode="train")  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.params\.control.*is false, and the network's control_channels is 16"):
        plan_jobs(config, ("latents",))


# --- Masks of the loss.


def test_a_mask_has_the_frames_crop_and_mirroring_of_its_clip(tmp_path):
    """The clip is its own mask; then a picture is, for all frames."""
    root = folder_with_clip(tmp_path)
    clip(root / "videos" / "a.mp4", shift=60)  # partly brighter than grey
    (root / "mask").mkdir()
    (root / "mask" / "a.mp4").write_bytes((root / "videos" / "a.mp4").read_bytes())
    (root / "table.csv").write_text("video,caption,mask\nvideos/a.mp4,a ramp,mask/a.mp4\n")
    for source in (root, root / "table.csv"):
        data = dataset(source, mask=True, reshape_mode="random", random_flip=0.5)
        assert len(data) == 1 and not data.check()[0].problems
        for seed in range(3):
            sample = data.sample(0, torch.Generator().manual_seed(seed))
            assert torch.equal(sample["mask"], latent_mask(white(sample["mp4"]))[0])
            assert sample["mask"].shape == (2, 1, 4, 4) and sample["mask"].any()
    assert "mask" not in dataset(root)[0] and len(dataset(root)) == 1
    clip_without = _Clip(dataset(root, mask=True), 0, str(root / "videos" / "a.mp4"), (5, 32, 32))
    (root / "mask" / "a.mp4").write_bytes(b"no video")
    assert clip_without.pixels("latents").shape == (5, 3, 32, 32), "a cache holds no masks"
    (root / "mask" / "a.mp4").unlink()
    assert dataset(root / "table.csv").rows[0].problem is None, "a mask that is not used is no problem"
    assert "its mask" in (dataset(root / "table.csv", mask=True).rows[0].problem or "")
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:, 24:] = 255
    iio.imwrite(root / "mask" / "a.png", picture)
    data = dataset(root, mask=True)
    assert not data.check(decode=True)[0].problems
    assert data[0]["mask"][:, 0].all(dim=1).tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "its mask is missing; put it into the folder mask/"),
        ({"frames": 9}, "its mask .*a.mp4 has 9 frames, and the clip 12"),
        ({"size": (64, 64)}, "is 64x64, and the clip 64x96: another shape"),
        ("black", "its mask .*a.png is black"),
    ],
)
def test_a_mask_that_does_not_fit_its_clip_is_a_problem_of_the_clip(tmp_path, settings, message):
    root = folder_with_clip(tmp_path)
    if settings == "black":
        (root / "mask").mkdir()
        iio.imwrite(root / "mask" / "a.png", np.zeros((64, 96, 3), np.uint8))
    elif settings is not None:
        clip(root / "mask" / "a.mp4", **settings)
    data = dataset(root, mask=True)
    (report,) = data.check()
    assert re.search(message, report.problems[0])
    with pytest.raises(Exception, match=message):
        data[0]
    with pytest.raises(InputError, match=r"data.params.mask_column has no effect without data.params.mask=true"):
        dataset(root, mask_column="mask")


def test_masks_for_a_loss_without_them_are_refused(tmp_path):
    (tmp_path / "pairs.csv").write_text("video,caption,rejected,mask\na.mp4,a ramp,a.mp4,a.mp4\n")
    clip(tmp_path / "a.mp4")
    bases = [CONFIGS / f"{name}.yaml" for name in ("toy_lora", "toy_sft", "loss/preferences")]
    words = [f"args.train_data=[{tmp_path / 'pairs.csv'}]", "data.params.mask=true", "args.eval_interval=null"]
    config = load_config(bases, [*words, f"args.save={tmp_path}", "model.latent_input=true"], mode="train")
    with pytest.raises(
        ConfigError, match=r"(?s)data\.params\.mask.*is true, and DiffusionDPOLoss takes no mask"
    ) as caught:
        prepare_training(config)
    assert "masks are those of videos" in str(caught.value)


# --- Sampling.


def test_lines_name_a_control_after_prompt_and_image():
    (prompt,) = parse_prompts(["a cat @@ b.mp4"], image2video=False, source="x", control=True)
    assert (prompt.text, prompt.image, prompt.control) == ("a cat", None, Path("b.mp4"))
    (prompt,) = parse_prompts(["a cat@@a.png@@b.mp4"], image2video=True, source="x", control=True)
    assert (prompt.image, prompt.control) == (Path("a.png"), Path("b.mp4"))
    for image2video, line in ((False, "a cat"), (True, "a cat@@a.png"), (False, "a cat@@a.mp4@@b.mp4")):
        form = "prompt@@image@@control" if image2video else "prompt@@control"
        with pytest.raises(InputError, match=f"x:1: .* is not of the form {form}, which this model needs") as caught:
            parse_prompts([line], image2video=image2video, source="x", control=True)
        assert "args.valid_prompts=null" in str(caught.value)  # training refuses args.control


def sampling(tmp_path, *overrides, control=True):
    bases = [CONFIGS / name for name in ("toy.yaml", "toy_inference.yaml", "control/video.yaml")][: 2 + control]
    more = ["args.prompt=a red circle moves up", "args.sampling_num_frames=2", "args.num_steps=1"]
    places = [f"args.output_dir={tmp_path}", "args.only_save_latents=true"]
    return load_config(bases, [*more, *places, *overrides], mode="inference")


@pytest.mark.thorough
def test_a_sample_of_the_base_is_not_changed_by_a_control_that_was_never_trained(tmp_path):
    video = clip(tmp_path / "control.mp4", size=(64, 64))
    with pytest.raises(ConfigError, match="holds no weights for a control video"):
        prepare(sampling(tmp_path, f"args.control={video}"))
    given = sampling(tmp_path / "a", f"args.control={video}", "args.force_inference=true", "args.control_strength=0.5")
    prepared = prepare(given)
    assert "control" in "".join(prepared.notes) and "both branches" in "".join(prepared.notes)
    made = []
    for config in (prepared.config, sampling(tmp_path / "b", control=False)):
        run = SamplingRun(config)
        run.sample_list(prepare(config).prompts)
        made.append(run.summary.written[0])
    first, second = (path.read_bytes() for path in made)
    assert first == second
    record = yaml.safe_load(made[0].with_suffix(".json").read_text())
    assert (record["control"], record["control_strength"]) == (str(video), 0.5)
    assert "  encode" in sampling_rows(prepared.config, torch.float32, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give args.control=<file> beside args.prompt"),
        (["args.control=missing.mp4"], "there is no file 'missing.mp4'"),
        (["args.control={short}"], r"has 3 frames at 8 fps, and the result 5"),
    ],
)
def test_a_control_that_cannot_be_used_is_refused_before_sampling(tmp_path, overrides, message):
    short = clip(tmp_path / "short.mp4", frames=3)
    given = [override.format(short=short) for override in overrides]
    with pytest.raises(ConfigError, match=message):
        prepare(sampling(tmp_path / "out", "args.force_inference=true", *given))


def test_a_control_for_a_network_without_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"args\.control_strength.*the network takes no control"):
        prepare(sampling(tmp_path, "args.control_strength=2", control=False))
