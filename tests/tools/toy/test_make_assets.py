from pathlib import Path

import imageio.v3 as iio
import make_assets
import numpy as np
import pytest
import scene
import torch
import training

from sgm.config.load import load_config
from sgm.util import instantiate_from_config

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two fast runs with the same seed; the second makes everything and measures nothing."""
    num_threads = torch.get_num_threads()
    folders = [tmp_path_factory.mktemp("one") / "toy", tmp_path_factory.mktemp("two") / "toy"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for folder, stages in zip(folders, (["all"], make_assets.STAGES[:-1]), strict=True):
            assert make_assets.main(["--fast", "--out", str(folder), "--stage", *stages]) == 0
    torch.set_num_threads(num_threads)
    return folders


def content(file: Path):
    """Content of a file; torch.save adds a random archive name."""
    if file.suffix == ".pt":
        (tensors,) = torch.load(file, weights_only=True).values()
        return {name: value.numpy().tobytes() for name, value in tensors.items()}
    return file.read_bytes()


@pytest.mark.slow
def test_the_released_layout_is_complete(outputs):
    files = {str(file.relative_to(outputs[0])) for file in outputs[0].rglob("*") if file.is_file()}
    expected = {
        "README.md",
        "quality.json",
        "prompts.txt",
        "prompts_i2v.txt",
        "t5/config.json",
        "t5/spiece.model",
        "t5/model.safetensors.index.json",
        "vae/3d-vae.pt",
        "transformer/latest",
        "transformer/3/mp_rank_00_model_states.pt",
        "transformer_i2v/latest",
        "videos/000000.mp4",
        "labels/000000.txt",
    }
    assert expected <= files


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files(outputs):
    one, two = ({str(f.relative_to(o)): f for f in sorted(o.rglob("*")) if f.is_file()} for o in outputs)
    assert one.keys() - two.keys() == {"README.md", "quality.json"}
    one = {name: file for name, file in one.items() if name in two}
    differing = [name for name in one if name != "prompts_i2v.txt" and content(one[name]) != content(two[name])]
    assert not differing


@pytest.mark.slow
def test_written_clips_show_what_their_captions_say(outputs):
    for label in sorted((outputs[0] / "labels").glob("*.txt"))[:6]:
        frames = iio.imread(outputs[0] / "videos" / f"{label.stem}.mp4")
        measured = scene.measure(frames.astype(np.float32) / 255.0)
        caption = scene.caption(measured.colour, measured.shape, measured.direction)
        assert caption == label.read_text(encoding="utf-8").strip()


@pytest.mark.slow
def test_another_seed_gives_other_clips(tmp_path, outputs, monkeypatch):
    monkeypatch.chdir(ROOT)
    make_assets.main(["--fast", "--stage", "clips", "--seed", "1", "--out", str(tmp_path)])
    name = "videos/000000.mp4"
    assert (tmp_path / name).read_bytes() != (outputs[0] / name).read_bytes()


def test_the_learning_rate_warms_up_and_decays():
    rates = [training.rate_share(step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(1 / 50)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.02
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_timesteps_are_spread_over_their_distribution():
    recipe = training.NetworkRecipe(batch_size=1000, timesteps=(0.5, 1.2))
    idx = training._spread_timesteps(recipe, 1000, torch.Generator().manual_seed(0))
    middle = 1000 / (1 + np.exp(-0.5))
    assert 0 <= idx.min() < 50 and 950 < idx.max() < 1000
    assert (idx < middle).float().mean() == pytest.approx(0.5, abs=2e-3)
    assert not torch.equal(idx, idx.sort().values)


@pytest.mark.slow  # seconds, for a tool that nobody runs every day
def test_a_stopped_training_goes_on_where_it_was(tmp_path, monkeypatch):
    """The same weights as without the stop, and none are trained again when all steps are done."""
    monkeypatch.chdir(ROOT)
    section = load_config([make_assets.T2V], mode="inference").model["first_stage_config"]
    recipe = training.VaeRecipe(
        cycles=(training.VaeCycle(1, 0), training.VaeCycle(2, 0, crop_frames=5, decoder_only=True)), crop_batch=1
    )

    def train(name: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        vae = instantiate_from_config(section)
        training.train_vae(vae, recipe, training.Progress(tmp_path / name, interval=0), seed=0, log=lambda _: None)
        return vae.state_dict()

    def stop(*_args) -> None:
        raise KeyboardInterrupt

    expected, apply = train("whole"), training._apply
    monkeypatch.setattr(training, "_apply", lambda *args: stop() if (tmp_path / "stopped").is_file() else apply(*args))
    with pytest.raises(KeyboardInterrupt):
        train("stopped")
    monkeypatch.setattr(training, "_apply", apply)
    assert all(torch.equal(expected[name], value) for name, value in train("stopped").items())
    monkeypatch.setattr(training, "_apply", stop)
    assert all(torch.equal(expected[name], value) for name, value in train("stopped").items())


@pytest.mark.slow
def test_an_image_network_starts_out_as_the_text_network(outputs):
    """Three steps with zero-initialised image weights: the text part still dominates, and the image part has moved."""
    load = [
        torch.load(next((outputs[0] / f).glob("*/*.pt")), weights_only=True) for f in ("transformer", "transformer_i2v")
    ]
    text, image = (state["module"]["model.diffusion_model.mixins.patch_embed.proj.weight"] for state in load)
    num_channels = text.shape[1]
    assert image.shape[1] == 2 * num_channels
    assert torch.allclose(image[:, :num_channels].float(), text.float(), atol=5e-3)
    assert 0 < image[:, num_channels:].abs().max() < 5e-3
