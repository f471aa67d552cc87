from pathlib import Path

import concept
import figures
import imageio.v3 as iio
import make_assets
import numpy as np
import pytest
import report
import scene
import torch
import training

from sgm.config.load import load_config
from sgm.modules.embeddings import patchify, unpatchify
from sgm.util import InputError, instantiate_from_config

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two fast runs with the same seed; the second makes everything and measures nothing."""
    num_threads = torch.get_num_threads()
    folders = [tmp_path_factory.mktemp("one") / "toy", tmp_path_factory.mktemp("two") / "toy"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for folder, stages in zip(folders, (["all"], ["clips", "text", "vae", *make_assets.NETWORKS]), strict=True):
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
        "transformer1.5_i2v/latest",
        "videos/000000.mp4",
        "labels/000000.txt",
    }
    assert expected <= files


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files(outputs):
    one, two = ({str(f.relative_to(o)): f for f in sorted(o.rglob("*")) if f.is_file()} for o in outputs)
    assert one.keys() - two.keys() == {"README.md"}
    one = {name: file for name, file in one.items() if name in two}
    differing = [name for name in one if name != "prompts_i2v.txt" and content(one[name]) != content(two[name])]
    assert differing == ["quality.json"], "torch.save adds a random name, so digests differ too"
    assert report.training_steps(outputs[1]) == {
        "vae": make_assets.Recipe().shortened().vae.num_steps,
        **dict.fromkeys(make_assets.NETWORKS, 3),
    }


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


def test_the_autoencoder_sees_land_and_the_known_world_in_their_shares(monkeypatch):
    known, rendered = {*scene.lattice(scene.combinations(held_out=False))}, []
    render = scene.render
    monkeypatch.setattr(scene, "render", lambda clip: rendered.append(clip) or render(clip))
    cycle = training.VaeCycle(0, 1, full_batch=32, lattice=0.7, land=0.3)
    videos = training._vae_batch(training.VaeRecipe(), cycle, np.random.default_rng(0), crop=False)
    assert np.mean([clip in known for clip in rendered]) == pytest.approx(0.7, abs=0.2)
    ground = videos[:, :, :, -scene.LAND_HEIGHT :].flatten(2)
    has_land = ground[:, 1].amin(dim=1) > 0.4
    assert has_land.float().mean() == pytest.approx(0.3, abs=0.2)
    greens = (ground[has_land, 1, 0] + 1) / 2
    assert 0.75 <= greens.min() < greens.max() <= 1.0


@torch.no_grad()
def test_a_network_with_temporal_patches_starts_as_the_one_without(monkeypatch):
    """Of two equal frames it sees the same tokens as the other network of one, and answers the same for both."""
    monkeypatch.chdir(ROOT)
    one, two = (
        instantiate_from_config(load_config([config], mode="inference").engine)
        for config in (make_assets.I2V, make_assets.I2V_1_5)
    )
    one.load_weights("assets/toy/transformer_i2v", dtype=torch.float32, device=torch.device("cpu"))
    training.start_from(two, "assets/toy/transformer_i2v")
    latents, image = torch.randn(2, 1, 1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = one.network.mixins["patch_embed"].proj(patchify(torch.cat((latents, image * 2.0), dim=2), (1, 2, 2)))
    pairs = torch.cat((latents, image), dim=2).repeat(1, 2, 1, 1, 1)  # the other network gets unscaled image latents
    embedded = two.network.mixins["patch_embed"].proj(patchify(pairs, (2, 2, 2)))
    torch.testing.assert_close(embedded, tokens, atol=1e-5, rtol=0)
    answers = [
        unpatchify(engine.network.mixins["final_layer"].linear(tokens), (1, 4, 4), engine.network.patch_size)
        for engine in (one, two)
    ]
    torch.testing.assert_close(answers[1], answers[0].repeat(1, 2, 1, 1, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_muon_in_float32_is_that_of_torch(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ends = []
    for cls, more in ((training.Float32Muon, {}), (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"})):
        matrix = torch.nn.Parameter(start.clone())
        optimizer = cls([matrix], lr=0.1, weight_decay=0.1, **more)
        for step in range(3):
            matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
            optimizer.step()
        ends.append(matrix.detach() - start)
    assert (ends[0] - ends[1]).norm() <= 0.02 * ends[1].norm(), "torch rounds to bfloat16"


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


def test_the_figures_are_of_the_shipped_weights():
    assets = ROOT / "assets" / "toy"
    found = report.read(assets)
    assert report.training_steps(assets) == {"vae": 2350, "t2v": 5000, "i2v": 1200, "i2v_1_5": 4000}
    assert found["land"]["sha256"] == report.digest(ROOT / "assets" / "toy_land") and found["land"]["steps"] == 300
    before, after = found["land"]["before"], found["land"]["after"]
    assert before["clips_with_land"] == 0 and before["samples"] == after["samples"] == 72
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    for when, shares in (("without", before), ("with", after)):
        names = ("clips_with_land", "clips_without", "colour", "shape")
        row = " | ".join(f"{shares[name]:.0%}" for name in names)
        assert f"| {when} | {row} |" in page


def test_a_figure_stays_with_its_weights(tmp_path):
    for path in report.WEIGHTS.values():
        file = tmp_path / path if path.endswith(".pt") else tmp_path / path / "7" / "mp_rank_00_model_states.pt"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"weights")
        if file.parent.name == "7":
            (tmp_path / path / "latest").write_text("7")
    with pytest.raises(InputError, match="vae/3d-vae.pt holds other weights than .* --stage vae"):
        report.training_steps(tmp_path)
    for name in report.WEIGHTS:
        report.record(tmp_path, name, 7)
    assert report.training_steps(tmp_path) == dict.fromkeys(report.WEIGHTS, 7)
    report.update(tmp_path, land={"steps": 1})
    (tmp_path / "vae" / "3d-vae.pt").write_bytes(b"others")
    with pytest.raises(InputError, match="vae/3d-vae.pt holds other weights"):
        report.training_steps(tmp_path)
    assert report.read(tmp_path)["land"] == {"steps": 1}, "other sections stay"


def test_one_command_makes_all_files(tmp_path, monkeypatch):
    """Each file of figures has a command, whose script and YAML files exist, and the LoRA goes to its place."""
    ran = []

    def run(words):
        ran.append(words)
        if words[0] == "train_video.py":
            trained = tmp_path / "work" / "runs" / "land-1"
            (trained / "5").mkdir(parents=True)
            (trained / "latest").write_text("5")
            (trained / "5" / "mp_rank_00_model_states.safetensors").write_bytes(b"adapters")

    monkeypatch.setattr(figures, "run", run)
    monkeypatch.setattr(figures, "LORA", tmp_path / "lora")
    figures.make_land(tmp_path / "work", tmp_path / "quality.json")
    made = sorted(path.relative_to(tmp_path / "lora").as_posix() for path in (tmp_path / "lora").rglob("*.*"))
    assert made == ["5/mp_rank_00_model_states.safetensors", "prompts.txt"]
    assert (tmp_path / "lora" / "latest").read_text() == "5"
    assert (tmp_path / "lora" / "prompts.txt").read_text() == (ROOT / "assets/toy_land/prompts.txt").read_text()
    ran += figures.figures(Path("assets/toy"), tmp_path)
    written = {words[words.index("--write") + 1] for words in ran if "--write" in words}
    shipped = {f"assets/toy/{path.name}" for path in (ROOT / "assets" / "toy").glob("*.json")}
    assert written - {str(tmp_path / "quality.json")} == shipped - {"assets/toy/quality.json"}
    named = [word for words in ran for word in words if word.endswith((".py", ".yaml"))]
    assert [word for word in named if not (ROOT / word).is_file()] == []
    with pytest.raises(SystemExit):
        make_assets.main(["--stage", "land", "--out", str(tmp_path)])
    assert concept.UNRELATED not in concept.PROMPTS
