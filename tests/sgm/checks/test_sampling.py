import errno
import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import sgm.distributed
from sgm.checks.sampling import (
    _check_text_encoder,
    _missing_compiler,
    check_abilities,
    check_files,
    check_shapes,
    dry_run,
    enable_memory_savers,
    problems_of,
    schedule_problems,
    speed_problems,
)
from sgm.checks.sampling_plan import check_sampling, scaling_warnings
from sgm.config.load import ConfigError, SamplingArgs, load_config
from sgm.config.precision import resolve_precision
from sgm.distributed import resolve_device
from sgm.modules.geometry import Geometry
from sgm.util import instantiate_from_config, without_allocating
from tests.geometries import PATCHED, ROTARY, SINCOS

CONFIGS = Path(__file__).parents[3] / "configs"

IMAGE = replace(ROTARY, in_channels=32)


def refusal(geometry=ROTARY, **args) -> str:
    with pytest.raises(ConfigError) as caught:
        check_sampling(SamplingArgs(**args), geometry)
    return str(caught.value)


# Frames and sizes


def test_null_means_what_the_model_makes():
    plan = check_sampling(SamplingArgs(), ROTARY)
    assert (plan.latents, plan.padded_latents, plan.video_frames) == (13, 13, 49)
    assert plan.size == (480, 720) and not plan.image2video
    assert plan.seconds == 49 / 8


@pytest.mark.parametrize("wanted", [21, 22])
def test_temporal_patches_pad_one_latent(wanted):
    plan = check_sampling(SamplingArgs(sampling_num_frames=wanted, sampling_fps=16), PATCHED)
    assert (plan.latents, plan.padded_latents, plan.video_frames) == (21, 22, 81)
    assert plan.size == (768, 1360)


def test_even_counts_of_the_1_5_need_no_padding():
    plan = check_sampling(SamplingArgs(sampling_num_frames=20, sampling_fps=16), PATCHED)
    assert (plan.latents, plan.padded_latents, plan.video_frames) == (20, 20, 77)
    assert "num_frames=161 allows it" in refusal(PATCHED, sampling_num_frames=42)


def test_the_image_decides_the_size_of_the_1_5():
    assert check_sampling(SamplingArgs(), replace(PATCHED, in_channels=32)).size is None
    sized = SamplingArgs(sampling_image_size=(768, 768))
    assert check_sampling(sized, replace(PATCHED, in_channels=32)).size == (768, 768)


def test_too_many_frames_name_the_nearest():
    text = refusal(sampling_num_frames=16)
    assert "args.sampling_num_frames: 16 latent frames (61 video frames)" in text
    assert "nearest legal: 13 latent frames = 49 video frames" in text and "1, 2, 3, ..., 13" in text
    assert "num_frames=61 allows it" in text


def test_video_frames_given_for_latent_frames():
    assert "if you mean 49 video frames, write 13" in refusal(sampling_num_frames=49)
    assert "if you mean 81 video frames, write 21" in refusal(PATCHED, sampling_num_frames=81)


def test_tables_cannot_be_made_longer():
    assert "allows it" not in refusal(SINCOS, sampling_num_frames=14)


def test_sizes_name_the_nearest():
    text = refusal(sampling_image_size=(500, 700))
    assert "args.sampling_image_size: 500x700" in text and "args.sampling_image_size=[480,704]" in text
    assert "multiples of 16 up to 480" in text and "multiples of 16 up to 720" in text
    text = refusal(SINCOS, sampling_image_size=(256, 256))
    assert "[480,720]" in text and "sincos positions" in text


def test_text_and_image_models_are_not_mixed_up():
    assert "set args.image2video=false" in refusal(image2video=True)
    assert "set args.image2video=true" in refusal(IMAGE, image2video=False)
    assert "args.video: is given, and the network makes videos from an image" in refusal(IMAGE, video="x.mp4")
    assert check_sampling(SamplingArgs(), IMAGE).image2video
    assert "set args.latent_channels=16" in refusal(latent_channels=4)


def test_all_of_it_at_once():
    text = refusal(sampling_num_frames=99, sampling_image_size=(1, 1), image2video=True, latent_channels=3)
    assert "4 problems" in text


# Precision and device


@pytest.mark.parametrize(
    ("flags", "model", "device", "expected"),
    [
        ({}, "fp16", "cuda", torch.float16),
        ({}, "bf16", "cpu", torch.bfloat16),
        ({}, None, "cpu", torch.float32),
        ({"fp16": True}, "fp16", "cuda", torch.float16),
        ({"fp16": True, "bf16": False}, "fp16", "cuda", torch.float16),
        ({"fp16": False}, "fp16", "cpu", torch.float32),
        ({"fp16": False}, "bf16", "cpu", torch.bfloat16),
        ({"bf16": False}, "bf16", "cuda", torch.float32),
        ({"bf16": True}, "fp32", "cpu", torch.bfloat16),
        ({"fp16": True}, None, "cuda", torch.float16),
    ],
)
def test_precision(flags, model, device, expected):
    assert resolve_precision(SamplingArgs(**flags), model, device) is expected


@pytest.mark.parametrize(
    ("flags", "model", "device", "path", "parts"),
    [
        ({"fp16": True, "bf16": True}, "bf16", "cuda", "args.fp16", ["both", "keep args.bf16"]),
        ({"fp16": True}, "bf16", "cuda", "args.fp16", ["released in bf16", "black video", "remove args.fp16"]),
        ({"bf16": True}, "fp16", "cuda", "args.bf16", ["released in fp16", "remove args.bf16"]),
        ({"fp16": True}, "fp32", "cuda", "args.fp16", ["released in fp32", "remove args.fp16"]),
        ({}, "fp16", "cpu", "args.fp16", ["CPU", "set args.fp16=false"]),
        ({"fp16": True}, None, "cpu", "args.fp16", ["CPU", "set args.fp16=false"]),
        ({}, "fp8", "cuda", "model.precision", ["fp8", "fp16, bf16, fp32"]),
    ],
)
def test_refused_precisions(flags, model, device, path, parts):
    with pytest.raises(ConfigError) as caught:
        resolve_precision(SamplingArgs(**flags), model, device)
    assert caught.value.problems[0].path == path
    assert all(part in str(caught.value) for part in parts)


def test_devices():
    assert resolve_device(SamplingArgs(device="cpu")) == torch.device("cpu")
    assert resolve_device(SamplingArgs()).type in ("cpu", "cuda", "npu", "xpu", "mps")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"args.device: '{name}' cannot be used.*\n.*args.device=cpu"):
            resolve_device(SamplingArgs(device=name))


def test_the_configured_device_is_that_of_the_process(monkeypatch):
    accelerator = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: accelerator)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr("sgm.distributed._device", None)
    try:
        assert sgm.distributed.device() == torch.device("cuda:3")
        sgm.distributed.configure(SamplingArgs(device="cpu"))
        assert sgm.distributed.device() == torch.device("cpu"), "groups, clocks and arguments of kernels go by it"
    finally:
        sgm.distributed.configure(SamplingArgs())
    assert sgm.distributed.device() == torch.device("cuda:3")


def test_ranks_do_not_share_one_device(monkeypatch):
    monkeypatch.setattr("sgm.distributed.world_size", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(is_meta=False))
    with pytest.raises(ConfigError, match="each of several ranks takes its own"):
        resolve_device(SamplingArgs(device="cuda:1"))


# Files, shapes and the dry run


@pytest.fixture
def load(tiny_model, tmp_path):
    """Return a function: overrides → configuration of a complete tiny model."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")

    def load(*overrides: str, name: str = "dit_t2v_2b"):
        given = [f"args.input_file={tmp_path / 'prompts.txt'}", f"args.output_dir={tmp_path}", "args.device=cpu"]
        return load_config([tiny_model(name)], [*given, *overrides], mode="inference")

    return load


def dry_run_refusal(config) -> str:
    with pytest.raises(ConfigError) as caught:
        dry_run(config)
    return str(caught.value)


@pytest.mark.parametrize("name", ["dit_t2v_2b", "dit_i2v_5b", "dit_t2v_1.5", "dit_t2v_5b_lora"])
def test_the_dry_run_describes_the_run(load, name):
    report = dry_run(load(name=name))
    rows = dict(line.split("  ", 1) for line in report.splitlines())
    assert rows["network"].split()[0].replace(",", "").isdigit()
    assert "VAE" in report and "2 steps" in report and "fp32 on cpu" in report
    assert "64x96" in report and ("image to video" if "i2v" in name else "text to video") in report
    assert f"1, 5, 9, ..., {29 if '1.5' in name else 17}" in report


def test_missing_files_are_named_together_with_their_place(load, tmp_path):
    config = load(
        f"args.load={tmp_path / 'no-net'}",
        f"args.input_file={tmp_path / 'no.txt'}",
        f"model.first_stage_config.params.ckpt_path={tmp_path / 'no-vae.pt'}",
        f"model.conditioner_config.params.emb_models.0.params.model_dir={tmp_path / 'no-t5'}",
    )
    text = dry_run_refusal(config)
    assert "4 problems" in text
    for name in ("no-net", "no.txt", "no-vae.pt", "no-t5"):
        assert name in text
    assert "args.load (command line: args.load=" in text


def test_missing_latest(load, tmp_path):
    (tmp_path / "transformer").mkdir()
    text = dry_run_refusal(load(f"args.load={tmp_path / 'transformer'}"))
    assert "args.load" in text and "latest" in text


def test_unset_files(load):
    config = load("args.load=null", "model.first_stage_config.params.ckpt_path=null")
    text = "\n".join(map(str, check_files(config)))
    assert "args.load: no checkpoint folder is given" in text and "add args.load=" in text
    assert "model.first_stage_config.params.ckpt_path: the VAE has no weights" in text


def test_training_from_nothing_needs_no_checkpoint(load):
    config = load("args.load=null")
    assert "args.load" in str(check_files(config))
    assert check_files(replace(config, mode="train")) == []


def test_latents_of_text_models_need_no_vae_file(load):
    words = ["args.only_save_latents=true", "model.first_stage_config.params.ckpt_path=null"]
    assert check_files(load(*words)) == []
    (problem,) = check_files(load(*words, "args.video=x.mp4"))
    assert problem.found == "the VAE has no weights"


@pytest.mark.parametrize(
    "place", ["sampler_config.params", "loss_fn_config.params.sigma_sampler_config.params", "denoiser_config.params"]
)
def test_all_parts_follow_the_schedule_of_the_network(load, place):
    found = [problem.path for problem in schedule_problems(load())]
    assert found == []
    changed = load(f"model.{place}.discretization_config.params.shift_scale=2.5")
    found = [problem.path for problem in schedule_problems(changed)]
    others = ["sampler_config.params", "loss_fn_config.params.sigma_sampler_config.params"]
    expected = others if place.startswith("denoiser") else [place]
    assert found == [f"model.{each}.discretization_config" for each in expected]


def test_all_parts_count_the_same_timesteps(load):
    drawn = "loss_fn_config.params.sigma_sampler_config.params"
    for place, more in [("denoiser_config.params", [f"model.{drawn}.num_idx"]), (drawn, [])]:
        found = [problem.path for problem in schedule_problems(load(f"model.{place}.num_idx=7"))]
        assert found == [f"model.{place}.num_idx", *more]


def test_a_device_without_values(load):
    assert "'meta' cannot be used" in dry_run_refusal(load("args.device=meta"))


def test_a_length_that_no_video_has_warns(load, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sgm"), "propagate", True)
    dry_run(load("model.network_config.params.num_frames=18"))
    assert "num_frames is 18, which no video has; the longest has 17" in caplog.text


def test_parts_that_do_not_fit_each_other(load):
    config = load(
        "model.conditioner_config.params.emb_models.0.params.max_length=7",
        "model.noised_image_input=true",
        "model.first_stage_config.params.decoder_config.params.z_channels=8",
    )
    geometry = Geometry.from_network(config.model["network_config"]["params"])
    text = "\n".join(map(str, check_shapes(config, geometry)))
    assert "emb_models.0.params.max_length: is 7" in text and "text_length is 6" in text
    assert "decoder_config.params.z_channels: is 8" in text and "out_channels is 16" in text
    assert "model.noised_image_input: is true" in text and "set it to false" in text


def test_a_text_encoder_of_another_size(load):
    text = dry_run_refusal(load("model.network_config.params.modules.patch_embed_config.params.text_hidden_size=32"))
    assert "embeddings of size 24, but the network takes 32" in text and "text_hidden_size" in text


def test_what_only_building_finds(load):
    text = dry_run_refusal(load("model.first_stage_config.params.decoder_config.params.temporal_compress_times=3"))
    assert "model.first_stage_config" in text and "temporal_compress_times=3 is not a power of 2" in text


def test_the_dry_run_takes_names_and_shapes_from_files_and_no_weights(load, golden, monkeypatch):
    monkeypatch.setattr("sgm.weights.checkpoint._replace", lambda *args, **kwargs: pytest.fail("weights were read"))
    dry_run(load())
    message = dry_run_refusal(load(f"args.load={golden / 'dit_i2v_5b' / 'transformer'}"))
    assert "model.network_config" in message and "mixins.patch_embed.proj.weight" in message


def test_the_dry_run_finds_a_truncated_vae(load, golden, tmp_path):
    (tmp_path / "vae.pt").write_bytes((golden / "vae" / "3d-vae.pt").read_bytes()[:100_000])
    assert "vae.pt" in dry_run_refusal(load(f"model.first_stage_config.params.ckpt_path={tmp_path / 'vae.pt'}"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["args.num_steps=2000"], ["args.num_steps (", "2000", "choose 1 to 1000"]),
        (["args.video=x.mp4", "args.strength=0.1"], ["args.strength", "0.1 leaves none of 2 steps; give 0.5 or more"]),
        (["args.video=x.mp4", "args.inversion=x"], ["args.inversion", "has no method invert", "VideoDDIMSampler"]),
        (["model.sampler_config=null"], ["model.sampler_config", "is missing"]),
        (["model.conditioner_config=null"], ["model.conditioner_config", "is missing"]),
        (["model.conditioner_config.params.emb_models=[]"], ["emb_models", "is empty"]),
        (["model.first_stage_config=null"], ["model.first_stage_config", "is missing"]),
        *(
            (["model.sampler_config.params.guider_config=null", given], [given.partition("=")[0], "no guidance"])
            for given in ("args.guidance_scale=3", "args.guidance_interval=[0,0.5]", "args.negative_prompt=blue")
        ),
    ],
)
def test_the_dry_run_finds_what_sampling_would_lack(load, overrides, parts):
    message = dry_run_refusal(load(*overrides))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["args.guidance_scale=0", "args.negative_prompt=blue"], "args.negative_prompt has no effect: a guidance sc"),
        (["args.guidance_scale=0", "args.guidance_interval=[0,0.5]"], "args.guidance_interval has no effect"),
        (["args.guidance_interval=[0.1,0.3]"], "none of the steps that run, which are at the shares 0 to 0.5"),
        (["args.guidance_scale=0"], ""),
        (["args.guidance_interval=[0.5,1]", "args.negative_prompt=blue"], ""),
    ],
)
def test_settings_of_guidance_without_effect_are_warned_of(load, caplog, overrides, said):
    dry_run(load(*overrides))
    assert said in caplog.text and bool(said) == ("guidance" in caplog.text)


def test_latents_alone_need_no_vae(load):
    assert "VAE" in dry_run(load("model.first_stage_config=null", "args.only_save_latents=true"))


def save_shapes(path: Path, key: str, section: dict, prefix: str = "") -> None:
    """Write a file with the names and shapes of a module, almost without data."""
    with without_allocating():
        module = instantiate_from_config(section)
    tensors = {prefix + name: torch.zeros(()).expand(value.shape) for name, value in module.state_dict().items()}
    torch.save({key: tensors}, path)


def test_the_dry_run_of_a_released_model_is_quick_and_counts(load, tmp_path):
    config = load()
    released = load_config([CONFIGS / "cogvideox_5b.yaml"], mode="inference")
    model = yaml.safe_load(released.to_yaml())["model"]
    embedder, tiny_embedder = (m["conditioner_config"]["params"]["emb_models"][0] for m in (model, config.model))
    embedder["params"]["model_dir"] = tiny_embedder["params"]["model_dir"]
    model["first_stage_config"]["params"]["ckpt_path"] = str(tmp_path / "vae.pt")
    text_size = model["network_config"]["params"]["modules"]["patch_embed_config"]["params"]
    text_size["text_hidden_size"] = 24  # that of the tiny T5; everything else is as released
    path = tmp_path / "released.yaml"
    path.write_text(yaml.safe_dump({"args": {"load": str(tmp_path / "net.pt"), "device": "cpu"}, "model": model}))
    save_shapes(tmp_path / "net.pt", "module", model["network_config"], "model.diffusion_model.")
    save_shapes(tmp_path / "vae.pt", "state_dict", model["first_stage_config"])
    start = time.process_time()
    report = dry_run(load_config([path], mode="inference"))
    assert time.process_time() - start < 5
    missing = 3072 * (4096 - 24)
    unused_table = 64 * 3072
    assert f"{5_570_283_072 - missing + unused_table:,} parameters, 42 layers" in report
    assert "215,583,907 parameters" in report and "bf16 on cpu" in report


# Longer clips


@pytest.mark.parametrize(
    ("args", "longest", "text"),
    [
        ({"time_scaling": "extrapolate"}, 25, "args.time_scaling=riflex avoids it"),
        ({"time_scaling": "riflex"}, 13, "has no effect"),
        ({"time_scaling": "riflex"}, 25, None),
        ({}, 13, None),
    ],
)
def test_scalings_that_are_hardly_meant_are_named(args, longest, text):
    found = "".join(scaling_warnings(SamplingArgs(**args), ROTARY, longest))
    assert text in found if text else not found


def test_scaled_positions_and_windows_allow_longer_clips():
    scaled = check_sampling(SamplingArgs(sampling_num_frames=25, time_scaling="riflex"), ROTARY)
    assert (scaled.latents, scaled.video_frames, scaled.latents_at_once, scaled.windows) == (25, 97, 25, None)
    assert "args.time_scaling=riflex" in refusal(sampling_num_frames=25)
    for geometry, window in ((ROTARY, 13), (SINCOS, 13), (PATCHED, 22)):
        plan = check_sampling(SamplingArgs(sampling_num_frames=41, time_window=window), geometry)
        assert (plan.latents, plan.latents_at_once, plan.windows.overlap) == (41, window, {13: 6, 22: 10}[window])
    assert check_sampling(SamplingArgs(time_window=13), ROTARY).latents_at_once == 13
    with pytest.raises(ConfigError) as caught:
        check_sampling(SamplingArgs(time_window=1), ROTARY)
    assert [problem.path for problem in caught.value.problems] == ["args.time_window"], "no overlap was given"


def test_a_loop_has_four_frames_for_every_latent_frame_behind_the_first_patch():
    for geometry, latents in ((ROTARY, 12), (PATCHED, 20)):
        plan = check_sampling(SamplingArgs(loop=True), geometry)
        assert (plan.latents, plan.video_frames, plan.decoded_latents) == (latents, 4 * latents, latents + 4)
        assert plan.latents_at_once == plan.padded_latents == latents + geometry.patch_size[0]
    long = check_sampling(SamplingArgs(loop=True, sampling_num_frames=25, time_window=13), ROTARY)
    assert (long.latents, long.latents_at_once) == (24, 13)
    assert "is 1, of which a loop has none" in refusal(loop=True, sampling_num_frames=1)
    assert "give 3 or more" in refusal(PATCHED, loop=True, sampling_num_frames=2)
    assert "args.loop: is true, and the network takes an image" in refusal(IMAGE, loop=True)
    with_control = replace(ROTARY, control_channels=16)
    assert "args.loop: is true, and the network takes a control" in refusal(with_control, loop=True)


def test_a_path_that_is_too_long_is_a_problem_of_its_key():
    (found,) = problems_of("args.resume", "correct it", Path("long/" * 1000).is_dir)
    assert found.path == "args.resume" and found.found.startswith("File name too long: long/long/")
    assert len(found.found) < 200 and found.cure == "give another path"


def test_a_path_that_may_not_be_read_is_a_problem_of_its_key(tmp_path):
    def fail(error):
        raise error

    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "none"))
    (found,) = problems_of("args.resume", "correct it", partial(fail, denied))
    assert found.path == "args.resume" and str(tmp_path) in found.found and found.cure == "correct it"
    with pytest.raises(OSError, match="Input/output"):
        problems_of("args.resume", "correct it", partial(fail, OSError(errno.EIO, "Input/output error")))


def test_compiling_needs_a_compiler(load, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for key in ("args.compile", "model.first_stage_config.params.compile"):
        text = dry_run_refusal(load(f"{key}=true", "args.device=cpu"))
        assert f"{key} (command line: {key}=true): is true, and the C++ compiler 'no-such-compiler' is" in text
    monkeypatch.setenv("CC", "nor-this-one")
    (problem,) = speed_problems(load("args.compile=true"), ROTARY, torch.device("cuda"), torch.bfloat16)
    assert "triton" in problem.found and problem.cure.startswith("install")


@pytest.mark.parametrize(
    ("device", "platform", "present", "said"),
    [
        ("mps", "darwin", (), None),
        ("cpu", "darwin", (), "the C++ compiler 'clang++' is not found"),
        ("cpu", "linux", ("g++",), None),
        ("cuda", "linux", ("gcc",), "code for cuda is generated by the package triton, which is missing"),
        ("cuda", "linux", ("triton", "clang"), None),
        ("cuda", "linux", ("triton",), "the C compiler that triton needs is not found (gcc or clang)"),
    ],
)
def test_what_compiling_lacks_on_a_system(monkeypatch, device, platform, present, said):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", platform)
    for function in ("importlib.util.find_spec", "shutil.which"):
        monkeypatch.setattr(function, lambda name: name if name in present else None)
    found = _missing_compiler(torch.device(device))
    assert found is None if said is None else said in found[0] and found[1].startswith("install")


def test_a_network_without_sizes_is_reported_where_it_is_built(load):
    config = load()
    del config.model["network_config"]["params"]["num_layers"]
    assert speed_problems(config, ROTARY, torch.device("cpu"), torch.float32) == []
    assert "num_layers" in dry_run_refusal(config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("args.step_cache=first_block", "args.step_cache.*is first_block, but Linear has no method use_step_cache"),
        ("args.time_scaling=riflex", "args.time_scaling.*is riflex, but Linear has no method use_time_scaling"),
        ("args.weights=int8", "Linear"),
    ],
)
def test_a_network_without_a_method_that_a_setting_needs_is_named(load, override, said):
    with pytest.raises(ConfigError, match=said):
        check_abilities(load(override), torch.nn.Linear(1, 1))


def test_a_text_encoder_that_cannot_be_stored_in_fewer_bits_is_named(load, monkeypatch):
    class Other:
        """Of somebody else."""

    conditioner = SimpleNamespace(embedders=[Other()], check=lambda: None)
    monkeypatch.setattr("sgm.checks.sampling.instantiate_from_config", lambda _: conditioner)
    with pytest.raises(ConfigError, match="args.text_encoder_weights.*is int8, but Other has no attribute storage"):
        _check_text_encoder(load("args.text_encoder_weights=int8"))


def test_a_vae_that_tiles_large_frames_passes_the_dry_run(load):
    dry_run(load("args.vae_tiling=large"))


def test_a_schedule_that_cannot_be_built_is_reported_once(load):
    config = load()
    config.model["denoiser_config"]["params"]["discretization_config"]["params"]["shift_scale"] = "3"
    assert list(schedule_problems(config)) == []
    assert dry_run_refusal(config).count("model.denoiser_config") == 1


def test_large_frames_alone_are_tiled_by_a_vae_that_takes_a_number_of_pixels():
    class Tiled:
        above = None

        def enable_tiling(self, above=0):
            self.above = above

    class Other:
        def enable_tiling(self):
            self.tiles = True

    for setting, above in ((True, 0), ("large", 480 * 720), (False, None)):
        enable_memory_savers(vae := Tiled(), SamplingArgs(vae_tiling=setting))
        assert vae.above == above
    with pytest.raises(ConfigError, match="enable_tiling of Other takes no number of pixels"):
        enable_memory_savers(Other(), SamplingArgs(vae_tiling="large"))
    enable_memory_savers(other := Other(), SamplingArgs(vae_tiling=True))
    assert other.tiles
