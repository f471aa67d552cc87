"""Whole sampling runs of tiny models, through the command's own `main`."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import sgm.inference.run
from sgm.config.args import SamplingArgs
from sgm.inference.main import main
from sgm.inference.prompts import Prompt
from sgm.inference.record import Timings
from sgm.inference.results import Results
from sgm.inference.run import SamplingRun
from sgm.util import instantiate_from_config
from sgm.weights.checkpoint import load_network, save_network
from tests.processes import run

ROOT = Path(__file__).parents[3]
PROMPTS = ["a red circle", "a blue square", "a green triangle"]


def write_prompts(path: Path, prompts=PROMPTS) -> Path:
    path.write_text("\n".join(prompts) + "\n")
    return path


def sample(base: Path, out: Path, prompts: Path, *overrides: str) -> None:
    assert main(["--base", str(base), f"args.input_file={prompts}", f"args.output_dir={out}", *overrides]) == 0


def latents(out: Path) -> dict[str, torch.Tensor]:
    """Prompt and sample number → latents."""
    found = {}
    for path in out.glob("*/*/000000.safetensors"):
        sidecar = json.loads(path.with_suffix(".json").read_text())
        found[f"{sidecar['prompt']}/{path.parent.name}"] = load_file(path)["latents"]
    return found


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "first.png"
    pixels = np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_text_to_video_writes_video_sidecar_and_sheet(tiny_model, tmp_path):
    prompts = write_prompts(tmp_path / "p.txt", PROMPTS[:2])
    out = tmp_path / "out"
    sample(tiny_model("dit_t2v_2b"), out, prompts, "args.sampling_num_frames=2", "args.contact_sheet=true")
    assert iio.imread(out / "0_a_red_circle/0/000000.mp4").shape == (5, 64, 96, 3)
    sidecar = json.loads((out / "1_a_blue_square/0/000000.json").read_text())
    assert sidecar["prompt"] == PROMPTS[1] and sidecar["seed"] == 42 and sidecar["num_frames"] == 5
    assert sidecar["num_steps"] == 2 and sidecar["guidance_scale"] == 6 and sidecar["precision"] == "float32"
    assert sidecar["peak_memory_bytes"] > 1e6 and sidecar["seconds"]["sample"] > 0
    assert iio.imread(out / "contact_sheet.png").ndim == 3
    assert not list(out.rglob(".*")), "temporary files are left"


def test_image_to_video_sees_its_image(tiny_model, tmp_path, image):
    shown, out = tmp_path / "shown.png", tmp_path / "out"
    prompts = write_prompts(tmp_path / "p.txt", [f"a red circle@@{shown}"])
    for picture in (Image.open(image), Image.new("RGB", (90, 50), "red")):
        picture.save(shown)
        sample(tiny_model("dit_i2v_5b"), out, prompts, "args.only_save_latents=true")
    # Another picture under the same name is another sample, which goes beside the first.
    outputs = [load_file(path)["latents"] for path in out.glob("*/0/*.safetensors")]
    assert len(outputs) == 2 and outputs[0].shape == (1, 16, 8, 12)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_temporal_patch_pads_and_drops_the_front(tiny_model, tmp_path):
    prompts = write_prompts(tmp_path / "p.txt", PROMPTS[:1])
    for kept in (4, 3, 1):
        out = tmp_path / str(kept)
        sample(
            tiny_model("dit_t2v_1.5"),
            out,
            prompts,
            f"args.sampling_num_frames={kept}",
            "args.only_save_latents=true",
        )
        assert len(latents(out)["a red circle/0"]) == kept


def test_latents_depend_on_prompt_and_seed_only(tiny_model, tmp_path):
    base, keep = tiny_model("dit_t2v_2b"), "args.only_save_latents=true"
    sample(base, tmp_path / "list", write_prompts(tmp_path / "list.txt"), keep, "args.batch_size=2")
    sample(base, tmp_path / "turned", write_prompts(tmp_path / "turned.txt", PROMPTS[::-1]), keep)
    sample(base, tmp_path / "alone", write_prompts(tmp_path / "alone.txt", PROMPTS[1:2]), keep)
    sample(base, tmp_path / "next", write_prompts(tmp_path / "next.txt", PROMPTS[1:2]), keep, "args.seed=43")
    together, turned = latents(tmp_path / "list"), latents(tmp_path / "turned")
    for prompt in PROMPTS:
        torch.testing.assert_close(together[f"{prompt}/0"], turned[f"{prompt}/0"], atol=1e-5, rtol=0)
    key = f"{PROMPTS[1]}/0"
    assert torch.equal(latents(tmp_path / "alone")[key], turned[key])
    # The second sample of a prompt is the first one of the next seed.
    torch.testing.assert_close(latents(tmp_path / "next")[key], together[f"{PROMPTS[1]}/1"], atol=1e-5, rtol=0)
    assert (together[key] - together[f"{PROMPTS[1]}/1"]).abs().max() > 0.1


def test_finished_results_are_skipped_and_missing_ones_made(tiny_model, tmp_path, caplog):
    base, out = tiny_model("dit_t2v_2b"), tmp_path / "out"
    prompts = write_prompts(tmp_path / "p.txt", PROMPTS[:2])
    sample(base, out, prompts)
    first, second = out / "0_a_red_circle/0/000000.mp4", out / "1_a_blue_square/0/000000.mp4"
    stamps = first.stat().st_mtime_ns, second.read_bytes()
    second.with_suffix(".json").unlink()  # as if killed between video and sidecar
    sample(base, out, prompts)
    assert first.stat().st_mtime_ns == stamps[0] and second.read_bytes() == stamps[1]
    assert second.with_suffix(".json").exists()
    sample(base, out, prompts, "args.skip_existing=false")
    assert first.stat().st_mtime_ns != stamps[0]


def test_results_of_another_prompt_or_setting_stay_unless_overwritten(tiny_model, tmp_path):
    base, out = tiny_model("dit_t2v_2b"), tmp_path / "out"
    long = "a red circle " * 12  # folder names hold 120 characters
    left, right = (write_prompts(tmp_path / f"{name}.txt", [f"{long}moves {name}"]) for name in ("left", "right"))
    keep = "args.only_save_latents=true"
    sample(base, out, left, keep, "args.seed=5")
    (first,) = out.glob("*/0/000000.safetensors")
    before = first.read_bytes()
    sample(base, out, left, keep, "args.seed=7")
    sample(base, out, right, keep, "args.seed=5")
    found = {path: json.loads(path.with_suffix(".json").read_text()) for path in first.parent.glob("*.safetensors")}
    assert first.read_bytes() == before and len(found) == 3 and found[first]["seed"] == 5
    stamps = {path: path.stat().st_mtime_ns for path in found}
    for prompts, seed in ((left, 5), (left, 7), (right, 5)):
        sample(base, out, prompts, keep, f"args.seed={seed}")
    assert {path: path.stat().st_mtime_ns for path in first.parent.glob("*.safetensors")} == stamps, "all are finished"
    sample(base, out, right, keep, "args.seed=9", "args.overwrite=true")
    assert json.loads(first.with_suffix(".json").read_text())["seed"] == 9 and len([*first.parent.iterdir()]) == 6


def test_the_contact_sheet_shows_earlier_results_too_and_outputs_are_listed_once(
    tiny_model, tmp_path, monkeypatch, capsys
):
    captions = []
    draw = sgm.inference.run.contact_sheet

    def noted(rows, path):
        rows = [*rows]
        captions.append([caption for caption, _ in rows])
        draw(rows, path)

    monkeypatch.setattr(sgm.inference.run, "contact_sheet", noted)
    base, out = tiny_model("dit_t2v_2b"), tmp_path / "out"
    prompts = write_prompts(tmp_path / "p.txt", PROMPTS[:2])
    heights = []
    for _ in range(2):
        sample(base, out, prompts, "args.contact_sheet=true", "args.videos_per_prompt=2")
        heights.append(iio.imread(out / "contact_sheet.png").shape[0])
        (out / "0_a_red_circle/0/000000.mp4").unlink()
    assert heights[0] == heights[1]
    assert captions == [[f"{i}. {text}, seed {seed}" for i, text in enumerate(PROMPTS[:2]) for seed in (42, 43)]] * 2
    first, second = (text.partition("written, ") for text in capsys.readouterr().err.split("contact sheet: ")[:2])
    assert first[2].startswith("0 skipped") and second[2].startswith("3 skipped")
    for said in (first[0], second[0]):
        paths = [f"{i}_{text.replace(' ', '_')}/{k}/000000.mp4" for i, text in enumerate(PROMPTS[:2]) for k in (0, 1)]
        assert [said.count(path) for path in paths] == [1, 1, 1, 1]


def test_negative_prompt_steps_and_scale_have_an_effect(tiny_model, tmp_path):
    base, keep = tiny_model("dit_t2v_2b"), "args.only_save_latents=true"
    prompts = write_prompts(tmp_path / "p.txt", PROMPTS[:1])
    results = {}
    for name, override in {
        "plain": "args.seed=42",
        "negative": "args.negative_prompt=square",
        "steps": "args.num_steps=3",
        "scale": "args.guidance_scale=1",
    }.items():
        sample(base, tmp_path / name, prompts, keep, override)
        results[name] = latents(tmp_path / name)["a red circle/0"]
    for name in ("negative", "steps", "scale"):
        assert (results[name] - results["plain"]).abs().max() > 1e-4, name


def test_save_load_sample_is_bit_identical(tiny_model, tmp_path, golden):
    base, keep = tiny_model("dit_t2v_5b_lora"), "args.only_save_latents=true"
    prompts = write_prompts(tmp_path / "p.txt", PROMPTS[:1])
    sample(base, tmp_path / "a", prompts, keep)
    network = instantiate_from_config(yaml.safe_load(base.read_text())["model"]["network_config"])
    load_network(network, golden / "dit_t2v_5b_lora" / "transformer")
    save_network(tmp_path / "saved", 7, network, patch_size=network.patch_size)
    sample(base, tmp_path / "b", prompts, keep, f"args.load={tmp_path / 'saved'}")
    assert torch.equal(latents(tmp_path / "a")["a red circle/0"], latents(tmp_path / "b")["a red circle/0"])


def test_tiling_and_slicing_are_reached_by_their_switches(tiny_model, tmp_path):
    base = tiny_model("dit_t2v_2b")
    prompts = write_prompts(tmp_path / "p.txt", PROMPTS[:1])
    sample(base, tmp_path / "whole", prompts)
    sample(base, tmp_path / "tiled", prompts, "args.vae_tiling=true", "args.vae_slicing=false")
    whole, tiled = (iio.imread(tmp_path / n / "0_a_red_circle/0/000000.mp4") for n in ("whole", "tiled"))
    assert np.array_equal(whole, tiled), "a video smaller than a tile is decoded as one"


FOREIGN_VAE = """
from torch import nn
from sgm.util import instantiate_from_config
from vae_modules.layers import Stream


class ForeignVAE(nn.Module):
    def __init__(self, *, encoder_config, decoder_config, regularizer_config, ckpt_path, ignore_keys=(), **_):
        super().__init__()
        self.ckpt_path, self.ignore_keys = ckpt_path, ignore_keys
        self.encoder, self.decoder, self.regularization = map(
            instantiate_from_config, (encoder_config, decoder_config, regularizer_config)
        )
        self.given = None
        self.given = {*vars(self)}

    def decode(self, latents):
        assert {*vars(self)} == self.given, "nothing is set that this class does not read"
        stream = Stream()
        stream.begin_chunk(is_first=True, is_last=True)
        return self.decoder(latents, stream)
"""


def test_a_foreign_vae_gets_no_attributes_and_refuses_missing_abilities(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "foreign_vae.py").write_text(FOREIGN_VAE)
    monkeypatch.syspath_prepend(tmp_path)
    base, prompts = tiny_model("dit_t2v_2b"), write_prompts(tmp_path / "p.txt", PROMPTS[:1])
    trust, foreign = ["--trust", "foreign_vae"], "model.first_stage_config.target=foreign_vae.ForeignVAE"
    sample(base, tmp_path / "own", prompts, "args.sampling_num_frames=1")
    sample(base, tmp_path / "foreign", prompts, "args.sampling_num_frames=1", foreign, *trust)
    own, other = (iio.imread(tmp_path / n / "0_a_red_circle/0/000000.mp4") for n in ("own", "foreign"))
    assert np.array_equal(own, other)
    for name in ("tiling", "slicing"):
        words = ["--base", str(base), f"args.input_file={prompts}", foreign, f"args.vae_{name}=true", "--check", *trust]
        assert main(words) == 2
        assert (
            f"args.vae_{name} (command line: args.vae_{name}=true): is true, but ForeignVAE has no method enable_"
            in (capsys.readouterr().err)
        )


def test_a_control_that_changes_between_typed_prompts_is_encoded_again(tmp_path, monkeypatch):
    control, read = tmp_path / "clip.mp4", []
    monkeypatch.setattr("sgm.inference.run.load_whole", lambda *given: read.append(given) or torch.zeros(1, 3, 16, 16))
    engine = SimpleNamespace(encode_first_stage=lambda frames, sample: frames)
    args = SamplingArgs()
    results = Results(args, {}, name="000000.mp4")
    run = SimpleNamespace(plan=None, engine=engine, device="cpu", args=args, results=results, _controls={})
    for content, time, expected in (("one", 1, 1), ("one", 1, 1), ("two", 2, 2)):
        control.write_text(content)
        os.utime(control, (time, time))
        SamplingRun._control(run, Prompt(0, "x", control=control), (16, 16), Timings())  # pyright: ignore[reportArgumentType]
        assert len(read) == expected


def test_typed_prompts(tiny_model, tmp_path, monkeypatch):
    answers = iter(["a red circle", "a blue square", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    arguments = ["args.input_type=cli", "args.only_save_latents=true", f"args.output_dir={tmp_path}"]
    assert main(["--base", str(tiny_model("dit_t2v_2b")), *arguments]) == 0
    assert set(latents(tmp_path)) == {"a red circle/0", "a blue square/0"}


def test_two_ranks_share_the_prompts(tiny_model, tmp_path):
    base, keep = tiny_model("dit_t2v_2b"), "args.only_save_latents=true"
    prompts = write_prompts(tmp_path / "p.txt")
    sample(base, tmp_path / "one", prompts, keep)
    words = ["--base", str(base), f"args.input_file={prompts}", f"args.output_dir={tmp_path / 'two'}", keep]
    done = run("sample_video.py", words, world=2)
    assert done.returncode == 0, done.stderr
    one, two = latents(tmp_path / "one"), latents(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 3
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)
