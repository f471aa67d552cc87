"""Commands of the page, what can be chosen on it, and the history."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sgm.config.load import load_config
from sgm.training import main as training
from sgm.util import InputError, RunError
from sgm.web import trainings, videos
from sgm.web.choices import LATEST, Folders, find_folders, find_loras, find_models, find_trained, inside, presets
from sgm.web.controls import overrides
from sgm.web.sessions import Sessions, thumbnail
from sgm.web.trainings import Training
from sgm.web.videos import Request, belongs

OWNERS = ("me", "you")
CONFIGS = Path("configs")


@pytest.fixture(scope="module")
def models():
    return find_models(CONFIGS)


def video(folder: Path, **record) -> Path:
    """Make a finished video, as far as the history looks."""
    path = folder / "0_a" / "0" / "000000.mp4"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    path.with_suffix(".json").write_text(json.dumps({"prompt": "a", "seed": 1, **record}))
    return path


def test_models_and_presets_are_those_of_the_folder(models, tmp_path):
    names = list(models)
    assert names[:4] == ["toy", "toy1.5_i2v", "toy_i2v", "toy_lora"], "those with weights come first"
    assert models["toy_i2v"].image2video and not models["toy"].image2video and models["toy_lora"].adapters
    assert models["cogvideox_5b"].values["guidance_scale"] == 6 and not models["cogvideox_5b"].ready
    assert list(presets(CONFIGS, "memory"))[:3] == ["8gb", "12gb", "16gb"]
    (tmp_path / "broken.yaml").write_text("model: [")
    (tmp_path / "text.yaml").write_text("just text")
    with pytest.raises(InputError, match="no model file"):
        find_models(tmp_path)


def test_a_request_is_a_command_that_loads(models, tmp_path):
    values = {"prompt": "a red circle; $(x) `y`", "num_steps": 3, "seed": 5}
    speed = presets(CONFIGS, "speed")["fast"]
    loras = [(Path("runs/x y"), 0.5), (Path("z.safetensors"), None)]
    request = Request(models["toy"], values, load=Path("runs/a b"), presets=[speed], loras=loras, preview=True)
    script, base, *words = request.words(tmp_path)
    assert (script, base, words[:2]) == ("sample_video.py", "--base", ["configs/toy.yaml", str(speed)])
    args = load_config(words[:2], words[2:], mode="inference").args
    assert [(lora.path, lora.strength) for lora in args.loras] == [("runs/x y", 0.5), ("z.safetensors", 1.0)]
    assert args.preview == str(tmp_path / "preview.jpg")
    assert (args.prompt, args.load, args.output_dir) == (values["prompt"], "runs/a b", str(tmp_path))
    assert (args.num_steps, args.seed, args.step_cache_threshold, args.asks_for_prompts) == (3, 5, 0.18, False)


def test_a_control_that_was_not_touched_leaves_what_a_preset_says(models, tmp_path):
    """A switch is never empty: at its default it is not sent."""
    values = {"prompt": "a cat", "vae_tiling": None, "compile": False, "loop": False}
    words = Request(models["toy"], values, presets=[presets(CONFIGS, "memory")["8gb"]]).words(tmp_path)
    assert not [word for word in words if word.startswith(("args.vae_tiling", "args.compile", "args.loop"))]
    assert load_config(words[2:4], words[4:], mode="inference").args.vae_tiling == "large"


@pytest.mark.parametrize("value", [5, True, ["x"], {"a": 1}])
def test_what_is_no_text_is_no_path_and_no_prompt(tmp_path, value):
    with pytest.raises(InputError, match="is not in the folders of this page"):
        inside(value, [tmp_path])
    with pytest.raises(InputError, match="args.prompt is .*; give text"):
        overrides({"prompt": value})


@pytest.mark.parametrize("path", ["", "..", "../outside", "link", "none", "a\0b", "/etc"])
def test_no_path_leads_out_of_the_folders(tmp_path, path):
    folder = tmp_path / "given"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "in").mkdir()
    assert inside(folder / "in", [folder]) == folder / "in" and inside(folder, [tmp_path / "x", folder]) == folder
    with pytest.raises(InputError, match="is not in the folders of this page"):
        inside(f"{folder}/{path}" if path and not path.startswith("/") else path, [folder])
    with pytest.raises(InputError, match=r"\(none\)"):
        inside(folder, [])


def test_the_history_gives_settings_back(models, tmp_path):
    folders = Folders(outputs=tmp_path, configs=CONFIGS)
    values = {"prompt": 'say "hi"', "sampling_image_size": [32, 64], "num_steps": 3, "seed": 5, "vae_tiling": True}
    files = [presets(CONFIGS, "memory")["8gb"]]
    loras = [(Path("runs/y"), 0.5)]
    words = Request(models["toy"], values, load=Path("runs/x"), presets=files, loras=loras).words(tmp_path)
    made = {"height": 32, "width": 64, "num_steps": 3, "guidance_scale": 4, "negative_prompt": "", "load": "runs/x"}
    record = {"prompt": values["prompt"], "seed": 5, "configs": words[2:4], "overrides": words[4:], **made}
    path = video(tmp_path / "one", **record)
    (found,) = videos.finished(tmp_path)
    (lora,) = load_config(words[2:4], words[4:], mode="inference").args.loras
    with_lora = videos.Video(path, {**record, "loras": [{"path": lora.path, "strength": lora.strength}]})
    assert with_lora.caption == 'say "hi", y 0.5, seed 5, num_steps 3, guidance_scale 4'
    assert found.path == path and found.caption == 'say "hi", seed 5, num_steps 3, guidance_scale 4' and found.when
    known = videos.settings_of(found, models, folders)
    again = {"model": "toy", "load": "runs/x", "memory": "8gb", "speed": None, "sampling_num_frames": 5}
    assert {**known, **values, **again} == known
    # Of a command line: other files, plain text in overrides, and a prompt rewritten by a language model.
    words = ["args.negative_prompt=blurry, dark", "args.num_steps=4"]
    other = {"configs": ["mine.yaml"], "overrides": words, "original_prompt": "猫", "load": "weights", "num_steps": 4}
    os.utime(path, (0, 0))
    video(tmp_path / "two", **other, negative_prompt="blurry, dark")
    newest = videos.finished(tmp_path)[0]
    known = videos.settings_of(newest, models, folders)
    assert (known["prompt"], known["model"], known["load"], known["num_steps"]) == ("a", None, None, 4), "as rewritten"
    assert known["negative_prompt"] == "blurry, dark"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("args.loop=False", False),
        ("args.vae_tiling=off", False),
        ("args.guidance_interval=[.2, .8]", [0.2, 0.8]),
        ("args.seed=1_000", 1000),
        ("args.negative_prompt='a b'", "a b"),
        ("args.num_steps=${args.seed}", 50),  # the value is in the record
        ("args.guidance_interval=${x}", None),
        ("args.guidance_interval=[0.2", None),
    ],
)
def test_overrides_of_a_command_line_are_read_as_yaml(models, tmp_path, word, value):
    made = videos.Video(tmp_path, {"prompt": "a", "overrides": [word], "num_steps": 50})
    known = videos.settings_of(made, models, Folders(outputs=tmp_path, configs=CONFIGS))
    assert known[word.partition("=")[0].removeprefix("args.")] == value


def test_what_the_page_cannot_show_is_named(models, tmp_path):
    folders = Folders(outputs=tmp_path, configs=CONFIGS)
    made = {"prompt": "a", "configs": ["configs/toy.yaml", "configs/toy_long.yaml"], "num_frames": 33, "fps": 8}
    long = videos.Video(tmp_path, {**made, "time_scaling": "riflex", "overrides": ["args.prompt=a", "args.seed=3"]})
    known = videos.settings_of(long, models, folders)
    assert (known["sampling_num_frames"], known["time_scaling"], known["seed"]) == (9, "riflex", 3)
    assert videos.beyond_the_page(long, models) == []
    words = ["args.vae_tiling=true", "args.bf16=true", "model.precision=bf16", "args.output_dir=x"]
    other = videos.Video(tmp_path, {**made, "fps": 24, "video": "a.mp4", "strength": 0.5, "overrides": words})
    named = ["args.video a.mp4", "args.strength 0.5", "args.bf16 true", "model.precision bf16", "args.sampling_fps 24"]
    assert videos.beyond_the_page(other, models) == named


def test_a_model_says_how_long_its_videos_are(models):
    wide, toy = models["cogvideox1.5_5b"], models["toy"]
    assert (wide.values["sampling_num_frames"], wide.video_frames(22), wide.video_frames(11)) == (22, 81, 41)
    assert wide.latent_frames(81) == 21 and wide.video_frames(21) == 81 and wide.fps == 16
    for model, latents in ((toy, 5), (wide, 22)):
        looped = model.video_frames(latents, loop=True)
        assert model.latent_frames(looped, loop=True) == latents and looped == {5: 16, 22: 80}[latents]
    unknown = dataclasses.replace(toy, geometry=None)
    assert unknown.video_frames(5) is None and unknown.latent_frames(17) is None
    assert toy.video_frames(0) is None and toy.video_frames(1, loop=True) is None


def test_loras_come_back_as_far_as_the_page_can_show_them(models, tmp_path):
    folders = Folders(outputs=tmp_path, configs=CONFIGS)

    def again(loras):
        video_of = videos.Video(tmp_path, {"prompt": "a", "loras": loras})
        return videos.plain_loras(videos.settings_of(video_of, models, folders)["loras"], 2)

    assert again(None) == [] and again([{"path": "a", "strength": 0.5}, {"path": "b"}]) == [("a", 0.5), ("b", 1.0)]
    assert again([{"path": "a"}] * 3) is None, "there are two rows"
    assert again([{"path": "a", "strength": {"0-5": 1.0}}]) is None
    assert again([{"path": "a", "strength": 1.0, "schedule": [[0.0, 1.0]]}]) is None


def test_a_video_belongs_to_its_browser(models, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "mine.png")
    request = Request(models["toy_i2v"], {"prompt": "a"}, image=tmp_path / "mine.png")
    outputs = tmp_path / "outputs"
    command = request.command(outputs, "me")
    copy = command.folder / "mine.png"
    assert copy.is_file() and f'args.image="{copy}"' in command.words
    mine, nobodys = video(command.folder), video(outputs / "by hand")
    for near in (True, False):
        seen = {owner: [belongs(path, outputs, owner, near=near) for path in (mine, copy, nobodys)] for owner in OWNERS}
        assert seen == {"me": [True, True, near], "you": [False, False, near]}
    listed = videos.finished(outputs, lambda path: belongs(path, outputs, "you", near=False))
    assert listed == [] and len(videos.finished(outputs)) == 2
    assert not belongs(tmp_path / "mine.png", outputs, "me", near=True), "it is outside"
    inner = outputs / "link"
    inner.symlink_to(command.folder)
    assert not belongs(inner / mine.relative_to(command.folder), outputs, "you", near=True)
    with pytest.raises(InputError, match=r"args.num_steps is 0"):
        Request(models["toy"], {"prompt": "a", "num_steps": 0}).command(outputs, "me")
    with pytest.raises(RunError, match=r"cannot be prepared in .*gone.png: No such file"):
        Request(models["toy_i2v"], {"prompt": "a"}, image=tmp_path / "gone.png").command(outputs, "me")
    assert len([*outputs.iterdir()]) == 3, "what is refused leaves no folder"
    with pytest.raises(InputError, match=r"mine.png is a file; choose another folder"):
        Request(models["toy"], {"prompt": "a"}).command(tmp_path / "mine.png", "me")


@pytest.mark.parametrize("strength", [101, "much", True])
def test_a_strength_that_does_not_fit_is_told(models, tmp_path, strength):
    request = Request(models["toy"], {"prompt": "a"}, loras=[(Path("x"), 1.0), (Path("y"), strength)])
    with pytest.raises(InputError, match=r"args\.loras\.1\.strength is .*; give a number from -100 to 100$"):
        request.words(tmp_path)


def test_loras_and_whole_weights_are_told_apart(tmp_path):
    save_file({"lora_A.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "latents.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no header")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / LATEST).write_text("7")
    (tmp_path / "gone.safetensors").symlink_to("nowhere")
    folders = [tmp_path, Path("assets")]
    assert find_loras(folders) == [Path("assets/toy_land"), tmp_path / "other.safetensors"]
    toys = {Path("assets/toy") / name for name in ("transformer", "transformer_i2v", "transformer1.5_i2v")}
    assert {*find_trained(folders)} == {tmp_path / "empty", *toys}


def test_unfinished_and_strange_files_are_no_history(tmp_path):
    video(tmp_path / "one").with_suffix(".json").unlink()
    video(tmp_path / "two").with_suffix(".json").write_text("[1]")
    video(tmp_path / "three").with_suffix(".json").write_text('{"other": 1}')
    for number, other in enumerate(({"prompt": {}}, {"loras": ["x"]}, {"overrides": None}, {"configs": [1]})):
        video(tmp_path / str(number), **other)
    assert videos.finished(tmp_path) == []


def test_a_folder_with_nothing_but_messages_is_removed(tmp_path):
    empty, kept = tmp_path / "empty", tmp_path / "kept"
    empty.mkdir()
    for name in ("log.txt", "image.png", ".owner"):
        (empty / name).touch()
    video(kept)
    for folder in (empty, kept):
        videos.discard_if_empty(folder)
    assert [*tmp_path.iterdir()] == [kept]


def test_uploads_belong_to_their_session(tmp_path):
    sessions = Sessions()
    sent = tmp_path / "mine.PNG"
    Image.new("RGB", (640, 320), "red").save(sent)
    kept = sessions.take("../../one", sent)
    assert not sent.exists() and sessions.image("../../one") == kept and sessions.image("two") is None
    assert kept.is_relative_to(sessions.root) and thumbnail(kept).startswith("data:image/jpeg;base64,")
    Image.new("RGB", (8, 8), "blue").save(old := tmp_path / "old.jpg")
    copied = sessions.keep("../../one", old)
    assert sessions.image("../../one") == copied and not kept.exists(), "one picture a window"
    (tmp_path / "text.jpg").write_text("no picture")
    (damaged := tmp_path / "damaged.jpg").write_text("no picture")
    with pytest.raises(InputError, match="'text.jpg' cannot be read as a picture"):
        sessions.take("../../one", tmp_path / "text.jpg")
    assert sessions.image("../../one") is None, "the wrong one takes the place of the last"
    with pytest.raises(InputError, match="'damaged.jpg' cannot be read as a picture"):
        sessions.keep("../../one", damaged)
    assert sessions.image("../../one") is None
    shown = Path(sessions.shown("two", video(tmp_path / "run")))
    assert shown.read_bytes() == b"" and shown.is_relative_to(sessions.root)
    sessions.forget("two")
    assert not shown.exists()
    sessions.close()
    assert not sessions.root.exists()


@pytest.mark.parametrize(
    ("model", "presets", "first"),
    [
        ("toy_lora", ["sft", "toy_sft"], "toy_sft"),
        ("toy1.5_i2v", ["sft", "toy_sft"], "toy_sft"),
        ("cogvideox_2b_lora", ["other", "sft", "toy_sft"], "sft"),
        ("cogvideox_2b_lora", ["mine", "toy_sft"], "mine"),
        ("toy_lora", [], None),
    ],
)
def test_the_first_training_preset_fits_the_first_model(model, presets, first):
    assert trainings.recipe_for(model, presets) == first


def test_a_training_is_planned_and_watched(models, tmp_path):
    recipes = trainings.find_recipes(CONFIGS)
    (tmp_path / "broken.yaml").write_text("data: [")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff")
    (tmp_path / "mine.yaml").write_text("data: {target: data_video.SFTDataset}")
    (tmp_path / "more.yaml").write_text("data: {params: {mask: true}}")
    (tmp_path / "null.yaml").write_text("data:")
    assert [*trainings.find_recipes(tmp_path)] == ["mine"], "the other files are not read by a run either"
    assert {"sft", "toy_sft"} <= recipes.keys() and recipes.keys().isdisjoint({"inference", "toy", "toy_masked"})
    plan = Training(models["toy_lora"], recipes["toy_sft"], Path("assets/my toy"))
    options = training.parse(plan.words(check=True)[1:])
    assert options.check and load_config(options.base, options.overrides, mode="train").args.train_data == (
        "assets/my toy",
    )
    assert plan.command.startswith("python train_video.py --base configs/toy_lora.yaml configs/toy_sft.yaml 'args.")
    run = tmp_path / "sft-1"
    video(run / "samples" / "00000010")
    lines = [{"iteration": n, "loss": 1.0} for n in range(1, 4)] + [{"iteration": 3, "validation_loss": 2.0}]
    lines += [{"iteration": 3, "loss_500_749": 0.5, "validation_loss_500_749": 4.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"itera')
    (run / LATEST).touch()
    assert trainings.find_runs([tmp_path]) == [run] == find_folders([tmp_path, tmp_path / "none"], LATEST)
    points, *quarters = [
        [(point["iteration"], point["loss"], point["kind"]) for point in curve] for curve in trainings.curves(run)
    ]
    assert points == [*((n, 1.0, "training") for n in range(1, 4)), (3, 2.0, "validation")]
    assert quarters == [[], [], [(3, 0.5, "training"), (3, 4.0, "validation")], []]
    (sample,) = trainings.samples(run)
    assert trainings.iteration_of(sample.path, run) == 10
    assert trainings.iteration_of(run / "samples" / "by_hand.mp4", run) is None
    video(tmp_path / "elsewhere")
    (run / "samples" / "link.mp4").symlink_to(tmp_path / "elsewhere/0_a/0/000000.mp4")
    (run / "samples" / "link.json").write_text('{"prompt": "a"}')
    assert len(trainings.samples(run)) == 1, "links lead nowhere"
    (tmp_path / "data" / "b").mkdir(parents=True)
    assert trainings.find_data([tmp_path / "data"]) == [tmp_path / "data", tmp_path / "data" / "b"]
