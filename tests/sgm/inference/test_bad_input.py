"""Wrong input gives one clear message, the right exit code and no partial output."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from sgm.inference import video
from sgm.inference.main import main, parse
from sgm.inference.prepare import make_folder
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.util import InputError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tiny_model, tmp_path, capsys):
    """Return a function that runs the command and returns (exit code, message)."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")

    def call(*words: str, model: str = "dit_t2v_2b") -> tuple[int, str]:
        defaults = [f"args.input_file={tmp_path / 'prompts.txt'}", f"args.output_dir={tmp_path / 'out'}"]
        code = main(["--base", str(tiny_model(model)), *defaults, *words])
        message = capsys.readouterr().err
        assert "Traceback" not in message
        left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert not left, f"half-written: {left}"
        return code, message

    return call


def expect(result: tuple[int, str], code: int, *parts: str) -> None:
    assert result[0] == code, result
    for part in parts:
        assert part in result[1], f"{part!r} is not in {result[1]!r}"


def test_missing_yaml(run):
    expect(run("--base", "configs/no_such.yaml"), 2, "configs/no_such.yaml")


def test_malformed_yaml(run, tmp_path):
    (tmp_path / "bad.yaml").write_text("args:\n  seed: [1\n")
    expect(run("--base", str(tmp_path / "bad.yaml")), 2, "bad.yaml", "line")


def test_unknown_key_names_the_nearest(run):
    expect(run("model.network_config.params.hidden_sise=64"), 2, "hidden_sise", "hidden_size")


def test_unknown_target(run):
    expect(
        run("model.denoiser_config.target=sgm.modules.diffusionmodules.denoiser.DiscretDenoiser"), 2, "DiscreteDenoiser"
    )


def test_all_problems_come_together(run):
    expect(run("args.sed=1", "model.scale_facto=1", "args.batch_size=none"), 2, "args.sed", "scale_facto", "batch_size")


def test_placeholder(run):
    expect(run("args.load={your CogVideoX-2b-sat path}/transformer"), 2, "args.load", "{your CogVideoX-2b-sat path}")


def test_missing_latest(run, tmp_path, golden):
    shutil.copytree(golden / "dit_t2v_2b" / "transformer", tmp_path / "weights")
    (tmp_path / "weights" / "latest").unlink()
    expect(run(f"args.load={tmp_path / 'weights'}"), 2, "latest", "1000", "echo")


def test_truncated_checkpoint(run, tmp_path, golden):
    shutil.copytree(golden / "dit_t2v_2b" / "transformer", tmp_path / "weights")
    file = tmp_path / "weights" / "1000" / "mp_rank_00_model_states.pt"
    os.chmod(file, 0o644)
    file.write_bytes(file.read_bytes()[:-1000])
    expect(run(f"args.load={tmp_path / 'weights'}"), 2, str(file))


def test_checkpoint_of_another_architecture(run, golden):
    result = run(f"args.load={golden / 'dit_i2v_5b' / 'transformer'}")
    expect(result, 2, "mixins.patch_embed.proj.weight", "(64, 64)", "(64, 32, 2, 2)")
    assert "loading T5" not in result[1], "found only after the text encoder was read"


def test_checkpoint_with_code_in_it(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    torch.save({"module": Evil()}, tmp_path / "evil.pt")
    expect(run(f"args.load={tmp_path / 'evil.pt'}"), 2, "evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_t5_folder_without_tokenizer(run, tmp_path, t5_folder):
    shutil.copytree(t5_folder, tmp_path / "t5")
    (tmp_path / "t5" / "spiece.model").unlink()
    key = "model.conditioner_config.params.emb_models.0.params.model_dir"
    expect(run(f"{key}={tmp_path / 't5'}"), 2, "spiece.model")


def test_missing_vae(run):
    expect(run("model.first_stage_config.params.ckpt_path=nowhere.pt"), 2, "ckpt_path", "nowhere.pt")


@pytest.mark.parametrize("content", [None, b"not a picture"])
def test_image_missing_or_unreadable(run, tmp_path, content):
    image = tmp_path / "image.png"
    if content is not None:
        image.write_bytes(content)
    (tmp_path / "prompts.txt").write_text(f"a red circle@@{image}\n")
    expect(run(model="dit_i2v_5b"), 2, str(image))


def test_blank_prompt(run):
    expect(run("args.prompt='   '", "--check"), 2, "args.prompt is blank; write what the video shows")


def test_empty_prompt_file(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n")
    expect(run(), 2, "prompts.txt")


def test_prompts_without_a_word_that_the_tokenizer_knows(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a {red} circle\n一个红色的圆向左移动\n", encoding="utf-8")
    expect(
        run("--check"), 2, "prompt 1: the tokenizer knows no word of '一个红", "'一', '个'", "args.allow_unknown_text"
    )
    assert run("--check", "args.allow_unknown_text=true")[0] == 0
    (tmp_path / "prompts.txt").write_text("a {red} circle\n")
    expect(run("--check", "args.negative_prompt=模糊"), 2, "args.negative_prompt", "knows no word of '模糊'")


def test_frame_count_names_the_nearest_legal_ones(run):
    expect(run("args.sampling_num_frames=49"), 2, "args.sampling_num_frames", "17 video frames")


def test_size_names_the_nearest_legal_one(run):
    expect(run("args.sampling_image_size=[100,100]"), 2, "args.sampling_image_size", "[64,96]")


def test_image_model_needs_images(run):
    expect(run("args.image2video=true"), 2, "args.image2video")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator, which can run fp16")
def test_fp16_on_a_cpu(run):
    expect(run("args.fp16=true"), 2, "CPU", "args.fp16=false")
    expect(run("args.fp16=true", "--check", "--card", "24gb"), 0)


def test_output_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    expect(run(f"args.output_dir={tmp_path / 'file' / 'out'}"), 2, "args.output_dir", "cannot be written")
    expect(run("args.output_dir=/proc/out", "--check"), 2, "args.output_dir", "cannot be written")
    expect(run(f"args.output_dir={tmp_path / ('x' * 256)}", "--check"), 2, "args.output_dir", "File name too long")
    with pytest.raises(InputError, match="args.output_dir .*file/x' cannot be written to .*name another folder"):
        make_folder(tmp_path / "file" / "x")  # of a run, whose folder was replaced since the check
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0_a_red_circle").write_text("in the way")
    expect(
        run(f"args.output_dir={tmp_path / 'mine'}", "--check"), 2, "0_a_red_circle/0' cannot be written", "is a file"
    )


def test_more_ranks_for_a_video_than_there_are_processes(run):
    expect(run("model.first_stage_config.params.cp_size=2"), 2, "cp_size=2", "1 processes")
    expect(run("args.sequence_parallel_size=2"), 2, "args.sequence_parallel_size=2", "--nproc_per_node")


def test_disk_full_while_writing_the_video(run, monkeypatch, tmp_path):
    """A subprocess that fails as ffmpeg does on a full disk, having written a part of the file."""
    real = subprocess.run

    def full(command, **options):
        if "libx264" not in command:
            return real(command, **options)
        Path(command[-1]).write_bytes(b"half a video")
        return subprocess.CompletedProcess(command, 1, b"", b"av_interleaved_write_frame(): No space left on device")

    monkeypatch.setattr(video.subprocess, "run", full)
    expect(run(), 1, "000000.mp4", "No space left on device")


def test_latents_that_are_not_finite(run, monkeypatch):
    original = SATVideoDiffusionEngine.sample
    monkeypatch.setattr(SATVideoDiffusionEngine, "sample", lambda *args, **kwargs: original(*args, **kwargs) / 0)
    expect(run(), 1, "not finite")


def test_unexpected_failure_is_one_line_without_debug(run, monkeypatch):
    def fail(*arguments, **options):
        raise KeyError("surprise")

    monkeypatch.setattr("sgm.models.video_diffusion.load_network", fail)
    expect(run(), 1, "KeyError", "--debug")


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys):
    assert main(["--base", "no_such.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_prints_no_traceback(run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sgm.models.video_diffusion.load_network", interrupt)
    expect(run(), 130, "interrupted", "continues from there")


def test_problems_of_prompts_and_folder_come_with_the_others(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "prompts.txt").write_text("a red circle@@image.png\n")
    words = ["args.sampling_num_frames=99", f"args.output_dir={tmp_path / 'file' / 'out'}"]
    expect(run(*words), 2, "args.sampling_num_frames", "args.output_dir", "prompts.txt:1")


def test_the_check_writes_nothing(tiny_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = [f"args.input_file={tmp_path / 'prompts.txt'}", f"args.output_dir={tmp_path / 'out'}", "--check"]
    assert main(["--base", str(tiny_model("dit_t2v_2b")), *words]) == 0
    assert not (tmp_path / "out").exists()


def test_arguments_in_any_order():
    options = parse(["args.a=1", "--base", "x.yaml", "args.b=2", "--seed", "3", "args.c=4", "--base", "y.yaml"])
    assert options.base == ["x.yaml", "y.yaml"]
    assert set(options.overrides) == {"args.a=1", "args.b=2", "args.c=4", "args.seed=3"}


def test_checking_a_released_model_without_its_weights_is_wrong_input(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["--base", "configs/cogvideox_5b.yaml", "--check"]) == 2
    assert "args.load" in capsys.readouterr().err


def test_missing_lora_is_refused_unless_forced(tiny_model, tmp_path, capsys, golden):
    """A base checkpoint under a LoRA configuration: an error, or the base model with force_inference."""
    config = yaml.safe_load(tiny_model("dit_t2v_2b").read_text())
    config["model"]["network_config"]["params"]["modules"]["lora_config"] = {
        "target": "sat.model.finetune.lora2.LoraMixin",
        "params": {"r": 2},
    }
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = ["--base", str(tmp_path / "lora.yaml"), f"args.input_file={tmp_path / 'prompts.txt'}"]
    words += ["args.only_save_latents=true", f"args.output_dir={tmp_path / 'out'}"]
    assert main(words) == 2
    assert "LoRA" in capsys.readouterr().err
    assert main([*words, "args.force_inference=true"]) == 0
    assert json.loads(next((tmp_path / "out").rglob("*.json")).read_text())["prompt"] == "a red circle"
