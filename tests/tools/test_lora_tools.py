"""The command lines around LoRA: export, import, merge, and sampling with diffusers."""

import inspect
import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import diffusers
import export_sat_lora_weight
import extract_lora
import import_hf_lora_weight
import load_cogvideox_lora
import merge_lora_weight
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sgm.config.load import load_config
from sgm.conversion.diffusers.from_sat import pipeline_of
from sgm.conversion.lora import FILE
from sgm.inference.video import write_video
from sgm.weights.adapters import AdapterInfo
from sgm.weights.checkpoint import save_network
from sgm.weights.files import find_weights, read_tensors, weights_digest

ROOT = Path(__file__).parents[2]


TOOLS = [export_sat_lora_weight, extract_lora, import_hf_lora_weight, merge_lora_weight, load_cogvideox_lora]


@pytest.fixture
def run_folder(tiny_weights, tmp_path):
    """Adapters of rank 4 and alpha 12 on the tiny 2B model, as training saves them."""
    base = tiny_weights("dit_t2v_2b")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for target, num in (("query_key_value", 3), ("dense", 1)):
            for index in range(num):
                name = f"transformer.layers.{layer}.attention.{target}.matrix"
                tensors[f"{name}_A.{index}"] = torch.randn(4, 64, generator=generator) / 8
                tensors[f"{name}_B.{index}"] = torch.randn(64, 4, generator=generator) / 8
    digest = weights_digest(find_weights(base))
    info = AdapterInfo(rank=4, alpha=12, layers=(0, 1), base=str(base), base_digest=digest)
    save_network(tmp_path / "run", 7, tensors, patch_size=2, adapters=info)
    return tmp_path / "run"


@pytest.fixture(scope="session")
def pipeline(tiny_model, tmp_path_factory):
    """Return a function: name of a golden network → its pipeline folder of diffusers."""
    top = tmp_path_factory.mktemp("pipelines")

    def make(name, *overrides, folder=None):
        folder = folder or top / name
        if not folder.exists():
            words = ["args.input_type=cli", *overrides]
            pipeline_of(load_config([tiny_model(name)], words, mode="inference")).write(folder)
        return folder

    return make


@pytest.fixture
def sample(pipeline, tmp_path, capsys):
    """Return a function: options → exit code, the video's file, and the output."""
    count = iter(range(100))

    def sample(*options, model="dit_t2v_2b", folder=None):
        out = tmp_path / f"video{next(count)}.mp4"
        words = ["--model_path", str(folder or pipeline(model)), "--prompt", "a red circle", "--output_path", str(out)]
        words += ["--num_inference_steps", "2", "--dtype", "fp32"]
        code = load_cogvideox_lora.main([*words, *map(str, options)])
        said = capsys.readouterr()
        return code, out, said.out + said.err

    return sample


def make_image(path):
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_commands(tool, capsys):
    with pytest.raises(SystemExit) as ended:
        tool.main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"python tools/{tool.__name__}.py" in out and "exit codes:" in out


def test_a_lora_goes_out_and_comes_back(run_folder, tiny_model, tmp_path, capsys):
    words = ["--sat_pt_path", str(run_folder), "--lora_save_directory", str(tmp_path / "hf")]
    assert export_sat_lora_weight.main(words) == 0
    assert f"wrote {tmp_path / 'hf' / FILE}" in capsys.readouterr().out
    words = ["--lora", str(tmp_path / "hf"), "--base", str(tiny_model("dit_t2v_2b")), "--output_path"]
    assert import_hf_lora_weight.main([*words, str(tmp_path / "back")]) == 0
    before, after = (torch.load(find_weights(path), weights_only=True) for path in (run_folder, tmp_path / "back"))
    assert before["lora"] == after["lora"]
    assert before["module"].keys() == after["module"].keys()
    assert all(torch.equal(tensor, after["module"][name]) for name, tensor in before["module"].items())


def test_the_base_of_an_import_can_be_named(run_folder, tiny_model, golden, tmp_path):
    export_sat_lora_weight.main(["--sat_pt_path", str(run_folder), "--lora_save_directory", str(tmp_path / "hf")])
    folder = tmp_path / "with: colon"
    folder.symlink_to(golden / "dit_t2v_2b" / "transformer")
    words = ["--lora", str(tmp_path / "hf"), "--base", str(tiny_model("dit_t2v_2b")), "--transformer_ckpt_path"]
    assert import_hf_lora_weight.main([*words, str(folder), "--output_path", str(tmp_path / "back")]) == 0
    assert torch.load(find_weights(tmp_path / "back"), weights_only=True)["lora"]["base"] == str(folder)


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_merging(run_folder, golden, tmp_path, file_format, capsys):
    words = ["--sat_pt_path", str(run_folder), "--output_path", str(tmp_path / "out"), "--file_format", file_format]
    assert merge_lora_weight.main([*words, "--strength", "0.5"]) == 0
    assert "wrote " in capsys.readouterr().out
    base = read_tensors(find_weights(golden / "dit_t2v_2b" / "transformer"))
    merged, matrices = read_tensors(find_weights(tmp_path / "out")), read_tensors(find_weights(run_folder))
    assert merged.keys() == base.keys()
    name = "model.diffusion_model.transformer.layers.1.attention.dense"
    delta = 0.5 * 12 / 4 * matrices[f"{name}.matrix_B.0"] @ matrices[f"{name}.matrix_A.0"]
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + delta, rtol=0, atol=1e-6)


def test_several_are_merged_and_extracted_again(run_folder, golden, tmp_path, capsys):
    words = ["--sat_pt_path", str(run_folder), str(run_folder), "--output_path"]
    assert merge_lora_weight.main([*words, str(tmp_path / "out"), "--strength", "0.5", "0.25"]) == 0
    base = str(golden / "dit_t2v_2b" / "transformer")
    given = ["--base_ckpt", base, "--tuned_ckpt", str(tmp_path / "out"), "--rank", "4", "--output_path"]
    assert extract_lora.main([*given, str(tmp_path / "lora")]) == 0
    assert "it holds 100.00% of the difference" in capsys.readouterr().out
    for result, more in (("sum", ["--rank", "4"]), ("average", ["--ema_decay", "0.5"])):
        assert merge_lora_weight.main([*words, str(tmp_path / result), "--result", result, *more]) == 0


@pytest.mark.parametrize(
    ("tool", "words", "said"),
    [
        (merge_lora_weight, ["--rank", "4"], "--rank has no effect with --result network; give --result sum"),
        (merge_lora_weight, ["--result", "average", "--ema_decay", "2"], "--ema_decay is 2.0; give a number between"),
        (export_sat_lora_weight, ["--alpha", "3"], "--alpha is 3, but"),
        (export_sat_lora_weight, ["--key_prefix", "x"], "end it with a dot"),
        (merge_lora_weight, ["--alpha", "3"], "--alpha is 3, but"),
        (merge_lora_weight, ["--base_ckpt", "nowhere"], "there is no checkpoint at nowhere"),
        (merge_lora_weight, ["--strength", "nan"], "--strength is nan"),
        (import_hf_lora_weight, ["--transformer_ckpt_path", "nowhere"], "there is no LoRA at"),
    ],
)
def test_wrong_input_ends_with_2_and_leaves_nothing(run_folder, tiny_model, tmp_path, tool, words, said, capsys):
    out = str(tmp_path / "out")
    given = {
        export_sat_lora_weight: ["--sat_pt_path", str(run_folder), "--lora_save_directory", out],
        merge_lora_weight: ["--sat_pt_path", str(run_folder), "--output_path", out],
        import_hf_lora_weight: ["--lora", "no", "--base", str(tiny_model("dit_t2v_2b")), "--output_path", out],
    }
    assert tool.main([*given[tool], *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""
    assert list(tmp_path.iterdir()) == [run_folder]


# --- Sampling.


@pytest.mark.thorough
def test_an_exported_lora_is_sampled_as_the_merged_model_is(run_folder, pipeline, sample, tmp_path, monkeypatch):
    frames = []

    def noted(path, pictures, fps):
        frames.append(pictures.int())
        write_video(path, pictures, fps)

    monkeypatch.setattr("sgm.inference.video.write_video", noted)
    export_sat_lora_weight.main(["--sat_pt_path", str(run_folder), "--lora_save_directory", str(tmp_path / "hf")])
    merge_lora_weight.main(["--sat_pt_path", str(run_folder), "--output_path", str(tmp_path / "merged")])
    merged = pipeline("dit_t2v_2b", f"args.load={tmp_path / 'merged'}", folder=tmp_path / "merged_hf")
    for options, folder in (
        ([], None),
        (["--lora_path", tmp_path / "hf"], None),
        ([], merged),
        (["--lora_path", tmp_path / "hf" / FILE, "--lora_scale", "0"], None),
    ):
        assert sample("--num_frames", "9", *options, folder=folder)[0] == 0
    base, lora, together, without = frames
    assert base.shape == (9, 64, 96, 3)
    assert (lora - base).abs().max() > 20
    assert (lora - together).abs().max() <= 1  # rounding to whole numbers
    assert torch.equal(without, base)


@pytest.mark.thorough
def test_a_video_has_its_json_and_its_seed(sample):
    options = ["--num_frames", "5", "--scheduler", "dpm", "--use_dynamic_cfg", "--vae_tiling"]
    code, video, said = sample(*options, "--seed", "7", "--num_videos", "2", "--negative_prompt", "blue")
    assert code == 0, said
    first, second = (video.with_name(f"{video.stem}_{k}.mp4") for k in range(2))
    assert first.read_bytes() != second.read_bytes()
    record = json.loads(second.with_suffix(".json").read_text())
    assert record.pop("seconds") > 0 and record.pop("diffusers")
    assert record.pop("model_path")
    assert record == {
        "seed": 8,
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "image_path": None,
        "dtype": "fp32",
        "lora": None,
        "num_frames": 5,
        "size": [64, 96],
        "fps": 8,
        "num_inference_steps": 2,
        "guidance_scale": 6.0,
        "use_dynamic_cfg": True,
        "scheduler": "CogVideoXDPMScheduler",
    }
    code, again, _ = sample(*options, "--seed", "8", "--negative_prompt", "blue")
    assert code == 0 and again.read_bytes() == second.read_bytes()


def test_every_option_reaches_the_pipeline(sample, monkeypatch):
    seen = {}
    generate = load_cogvideox_lora._generate

    def noted(pipe, *rest):
        seen["pipe"] = pipe
        monkeypatch.setattr(type(pipe), "__call__", lambda _, **given: seen.update(given) or (1 / 0))
        return generate(pipe, *rest)

    monkeypatch.setattr(load_cogvideox_lora, "_generate", noted)
    options = ["--negative_prompt", "blue", "--height", "32", "--width", "48", "--num_frames", "9", "--use_dynamic_cfg"]
    options += ["--guidance_scale", "3", "--scheduler", "ddim", "--vae_tiling", "--dtype", "bf16"]
    assert sample(*options)[0] == 1
    pipe, generator = seen.pop("pipe"), seen.pop("generator")
    assert generator.initial_seed() == 42 and generator.device.type == "cpu"
    assert seen == {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "use_dynamic_cfg": True,
        "max_sequence_length": 6,
        "output_type": "pt",
    }
    assert pipe.vae.use_tiling and pipe.transformer.dtype == torch.bfloat16
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert sample()[0] == 1
    assert (seen["height"], seen["width"], seen["num_frames"]) == (64, 96, 17), "what the network was trained for"


@pytest.mark.thorough
def test_image_to_video(sample, tmp_path):
    image = make_image(tmp_path / "first.png")
    options = ["--image_path", image, "--scheduler", "ddim"]
    code, video, said = sample(*options, model="dit_i2v_5b")
    assert code == 0, said
    record = json.loads(video.with_suffix(".json").read_text())
    assert (record["image_path"], record["scheduler"]) == (str(image), "CogVideoXDDIMScheduler")
    make_image(image)
    Image.open(image).transpose(Image.Transpose.ROTATE_180).save(image)
    assert sample(*options, model="dit_i2v_5b")[1].read_bytes() != video.read_bytes()


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("dit_t2v_2b", ["--image_path", "x.png"], "CogVideoXPipeline takes no image; remove --image_path"),
        ("dit_i2v_5b", [], "makes videos from an image; give it with --image_path"),
        ("dit_i2v_5b", ["--image_path", "nowhere.png"], "image 'nowhere.png' does not exist"),
        ("dit_i2v_5b", ["--image_path", "x.png", "--height", "96", "--width", "64"], "learned positions of this model"),
        ("dit_t2v_2b", ["--height", "60"], "--height 60 --width 96: give multiples of 16"),
        ("dit_t2v_2b", ["--num_frames", "8"], "--num_frames 8: give 1 more than a multiple of 4, e.g. 9"),
        ("dit_t2v_2b", ["--lora_scale", "0.5"], "has no effect without --lora_path"),
        ("dit_t2v_2b", ["--lora_path", "nowhere"], "there is no LoRA at nowhere"),
        ("dit_t2v_2b", ["--dtype", "fp16"], "which a CPU cannot do"),
        ("dit_t2v_2b", ["--enable_model_cpu_offload"], "needs an accelerator"),
        ("dit_t2v_2b", ["--enable_model_cpu_offload", "--enable_sequential_cpu_offload"], "exclude each other"),
        ("dit_t2v_2b", ["--guidance_scale", "1", "--use_dynamic_cfg"], "no effect with --guidance_scale 1"),
        ("dit_t2v_2b", ["--num_videos", "0"], "--num_videos is 0"),
        ("dit_t2v_2b", ["--fps", "inf"], "--fps is inf"),
        ("dit_t2v_2b", ["--seed", str(2**64)], f"--seed is {2**64}"),
        ("dit_t2v_2b", ["--seed", str(2**64 - 1), "--num_videos", "2"], f"--seed is {2**64 - 1}"),
        (
            "dit_t2v_2b",
            ["--num_inference_steps", "1001"],
            "is 1001; give a number from 1 to 1000",
        ),
        ("dit_t2v_2b", ["--guidance_scale", "nan"], "--guidance_scale is nan"),
        ("dit_t2v_2b", ["--output_path", "x.avi"], "give a name that ends with .mp4"),
        ("dit_t2v_2b", ["--model_path", "nowhere"], "give --model_path a pipeline folder"),
    ],
)
def test_wrong_words_end_with_2_before_anything_is_loaded(sample, monkeypatch, model, options, said):
    monkeypatch.setattr("sgm.distributed.device", lambda: torch.device("cpu"))
    monkeypatch.setattr(load_cogvideox_lora, "load_pipeline", None)
    code, video, message = sample(*options, model=model)
    assert (code, said in message) == (2, True), message
    assert not video.exists()


def test_values_that_a_configuration_lacks_are_those_of_diffusers(pipeline, tmp_path):
    shutil.copytree(pipeline("dit_t2v_2b"), tmp_path / "pipe")
    for part in ("transformer", "vae"):
        file = tmp_path / "pipe" / part / "config.json"
        names = load_cogvideox_lora.TRANSFORMER.keys() | load_cogvideox_lora.VAE.keys()
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in names}))
    words = {"model_path": str(tmp_path / "pipe"), "output_path": str(tmp_path / "x.mp4"), "dtype": "fp32", "seed": 1}
    numbers = {"num_inference_steps": 2, "num_videos": 1, "guidance_scale": 6.0, "use_dynamic_cfg": False}
    others = ("fps", "lora_scale", "lora_path", "image_path", "height", "width", "num_frames", "negative_prompt")
    offloads = {"enable_model_cpu_offload": False, "enable_sequential_cpu_offload": False}
    plan = load_cogvideox_lora.plan_of(Namespace(**words, **numbers, **offloads, **dict.fromkeys(others)))
    assert (plan.size, plan.num_frames, plan.text_length) == ((480, 720), 49, 226)
    for cls, own in (
        (diffusers.CogVideoXTransformer3DModel, load_cogvideox_lora.TRANSFORMER),
        (diffusers.AutoencoderKLCogVideoX, load_cogvideox_lora.VAE),
    ):
        known = inspect.signature(cls.__init__).parameters
        assert own == {name: known[name].default for name in own}


def test_other_pipelines_are_refused(sample, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    code, _, said = sample(folder=tmp_path)
    assert code == 2 and "holds a StableDiffusionPipeline; expected one of CogVideoXPipeline" in said


def test_results_are_not_overwritten(sample, tmp_path):
    (tmp_path / "video0.json").write_text("mine")
    code, _, said = sample()
    assert code == 2 and "video0.json exists already" in said


@pytest.mark.thorough
def test_a_lora_that_does_not_fit_is_refused(sample, run_folder, tmp_path):
    for name, prefix in (("none", "other."), ("wrong", "transformer.")):
        export_sat_lora_weight.main(
            ["--sat_pt_path", str(run_folder), "--lora_save_directory", str(tmp_path / name), "--key_prefix", prefix]
        )
    code, video, said = sample("--lora_path", tmp_path / "none")
    assert code == 2 and "0 of its 8 adapters are for modules that there are" in said
    deep = {name.replace("blocks.1.", "blocks.7."): t for name, t in load_file(tmp_path / "wrong" / FILE).items()}
    save_file(deep, tmp_path / "deep.safetensors")
    code, video, said = sample("--lora_path", tmp_path / "deep.safetensors")
    assert code == 2 and "4 of its 8 adapters" in said
    tensors = {name: tensor[:, :48] for name, tensor in load_file(tmp_path / "wrong" / FILE).items()}
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "wrong.bin")
    code, video, said = sample("--lora_path", tmp_path / "wrong.bin")
    assert code == 2 and "does not fit this model" in said
    assert not video.exists()


@pytest.mark.thorough
def test_a_lokr_is_refused_with_the_way_to_merge_it(sample, tmp_path):
    """diffusers only warns that it has loaded nothing, and then knows no adapter of the name."""
    names = [f"lora_unet_transformer_blocks_0_attn1_to_q.{part}" for part in ("lokr_w1", "lokr_w2", "alpha")]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "lokr.safetensors")
    code, video, said = sample("--lora_path", tmp_path / "lokr.safetensors")
    assert code == 2 and "LoKr" in said and "tools/merge_lora_weight.py" in said and not video.exists()


def test_without_diffusers_the_extra_is_named(sample, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, said = sample()
    assert code == 2 and "pip install -e .[diffusers]" in said
