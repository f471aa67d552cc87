"""Measures of videos against formulas, pairs and seeds of folders, and what is refused."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from sgm.inference import measures
from sgm.inference.video import write_video

ROOT = Path(__file__).parents[2]


def moving(num=5, *, step=3, height=48, width=64, noise=0, seed=0) -> np.ndarray:
    """A soft bright square that moves right over a shaded ground."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    frames = []
    for t in range(num):
        square = 200 / (1 + np.exp((np.maximum(abs(rows - 24), abs(columns - 16 - step * t)) - 8) / 1.5))
        frame = np.stack([square + 20, square / 2 + rows, square / 3 + columns], axis=-1)
        frames.append(frame + noise * random.standard_normal(frame.shape))
    return np.clip(frames, 0, 255).astype(np.uint8)


def record(path: Path, video: np.ndarray, **content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, video, 8, crf=0)
    if content:
        path.with_suffix(".json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sampling runs of two prompts, the first with two samples of each, and references."""
    root = tmp_path_factory.mktemp("videos")
    for n, prompt in enumerate(("red car", "blue car")):
        for k in range(2):
            record(root / f"a/{n}_{prompt}/{k}/000000.mp4", moving(noise=4 + 4 * k, seed=n), prompt=prompt, seed=42 + k)
        record(root / f"b/{n}_{prompt}/0/000000.mp4", moving(noise=20, seed=n), prompt=prompt, seed=42)
        record(root / f"references/{n}_{prompt}.mkv", moving())
    return root


@pytest.fixture
def evaluated(folders, tmp_path, capsys):
    """Run the command; return exit code, the JSON or None, and what was written to the terminal."""

    def run(*words: str):
        out = tmp_path / "out.json"
        code = evaluate.main([word.replace("@", f"{folders}/") for word in words] + ["--out", str(out)])
        said = capsys.readouterr()
        return code, json.loads(out.read_text()) if out.is_file() else None, said.out + said.err

    return run


def test_fidelity_is_the_formula():
    a, b = moving(noise=5), moving()
    error = ((a.astype(float) - b) ** 2).mean(axis=(1, 2, 3))
    found = measures.fidelity(a, b)
    assert found["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), abs=1e-3)
    assert 0 < measures.fidelity(moving(noise=20), b)["ssim"] < found["ssim"] < 1
    assert measures.fidelity(b, b) == {"psnr": 100.0, "ssim": pytest.approx(1, abs=1e-5)}


def test_flicker_and_smoothness():
    video = moving(9)
    unsteady = np.where(np.arange(9)[:, None, None, None] % 2, video, np.clip(video.astype(int) + 10, 0, 255))
    jumpy = video[[0, 2, 1, 4, 3, 6, 5, 8, 7]]
    flicker = np.abs(np.diff(video.astype(float), axis=0)).mean()
    assert measures.flicker(video) == pytest.approx(flicker)
    assert measures.flicker(unsteady.astype(np.uint8)) > flicker + 5
    assert measures.smoothness(np.repeat(video[:1], 4, axis=0)) == 1
    assert measures.smoothness(video) > 0.995, "even motion is interpolated, however far"
    assert measures.smoothness(video) > measures.smoothness(jumpy) + 0.005
    assert measures.smoothness(unsteady.astype(np.uint8)) == pytest.approx(1 - 10 / 255, abs=0.005)
    assert measures.smoothness(video[:2]) is None and measures.flicker(video[:1]) is None


def test_methods_seeds_and_references(evaluated):
    code, found, said = evaluated("base=@a", "@b", "--reference", "@references")
    assert code == 0, said
    first, second = found["methods"].values()
    assert [*found["methods"]][0] == "base" and (first["videos"], second["videos"]) == (4, 2)
    psnr = first["figures"]["psnr"]
    low, high = sorted(psnr["seeds"].values())
    assert high > low + 3, "the second sample has more noise"
    assert psnr["mean"] == pytest.approx((low + high) / 2) and psnr["spread"] == pytest.approx((high - low) / 2**0.5)
    assert second["figures"]["psnr"]["spread"] is None and second["figures"]["psnr"]["mean"] < low
    assert [video["psnr"] for video in found["videos"] if video["seed"] == "0.42"]
    assert set(found["measures"]) == {"psnr", "ssim", "smoothness", "flicker"}
    assert f"| base | 4 | 2 | {psnr['mean']:.2f} ± {psnr['spread']:.2f} |" in said
    assert "PSNR (dB) ↑" in said and "flicker ↓" in said


def test_folders_of_one_name_are_seeds(evaluated):
    code, found, said = evaluated("all=@a", "all=@b")
    assert code == 0, said
    assert [*found["methods"]] == ["all"] and len(found["methods"]["all"]["figures"]["flicker"]["seeds"]) == 3


def test_lpips(evaluated, folders, tmp_path):
    torch.manual_seed(0)
    sizes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    weights = {f"features.{n}.weight": torch.randn(o, i, k, k) / (i * k * k) ** 0.5 for n, (o, i, k) in sizes.items()}
    weights |= {f"features.{n}.bias": torch.zeros(sizes[n][0]) for n in sizes}
    torch.save(weights, tmp_path / "alexnet.pth")
    lpips = measures.Lpips(tmp_path / "alexnet.pth")
    a, b, c = (torch.from_numpy(moving(2, height=64, noise=n)).permute(0, 3, 1, 2) / 255 for n in (0, 5, 60))
    assert lpips(a, a).tolist() == [0, 0] and torch.equal(lpips(a, b), lpips(b, a))
    assert (lpips(a, b) < lpips(a, c)).all()
    found = measures.fidelity(moving(2, height=64, noise=5), moving(2, height=64), lpips)
    assert found["lpips"] == pytest.approx(lpips(b, a).mean().item(), abs=1e-6)
    torch.save(weights | {"features.3.weight": torch.zeros(1)}, tmp_path / "other.pth")
    words = ("@a", "--reference", "@references", "--lpips")
    assert "the measures need 64x64" in evaluated(*words, str(tmp_path / "other.pth"))[2]
    with pytest.raises(evaluate.InputError, match=r"has no features.3.weight of shape \[192, 64, 5, 5\]"):
        measures.Lpips(tmp_path / "other.pth")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with random weights."""
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": len(words) - 1}
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    network = transformers.CLIPModel(config)
    network.visual_projection.weight.data.mul_(-1)  # a cosine above 0
    network.save_pretrained(folder)
    return folder


def test_clip_score(evaluated, clip):
    model = measures.Clip(clip, torch.device("cpu"))
    video = moving()
    scores = {prompt: model(video, prompt) for prompt in ("red car", "blue car", "zebra")}
    assert all(0 <= score <= 100 for score in scores.values()) and len({*scores.values()}) > 1
    one_by_one = [model(video[t : t + 1], "zebra") for t in range(len(video))]
    assert scores["zebra"] == pytest.approx(np.mean(one_by_one), abs=1e-4)
    assert model.cuts("a very long prompt") and not model.cuts("red car")
    code, found, said = evaluated("@a", "--clip", str(clip))
    assert code == 0, said
    assert "clip" in found["measures"] and "| CLIP ↑ |" in said


def test_names_for_vbench(evaluated, folders, tmp_path):
    code, _, said = evaluated("m=@a", "--vbench", str(tmp_path / "vbench"))
    assert code == 0 and "VBench wants 5 videos" in said, said
    names = {path.relative_to(tmp_path / "vbench").as_posix() for path in tmp_path.rglob("vbench/**/*.mp4")}
    assert names == {f"m/{prompt}-{k}.mp4" for prompt in ("red car", "blue car") for k in range(2)}
    for words in (("x/y=@a", "x_y=@b"), ("m=@a", "m/=@b"), ("..=@a",)):
        code, found, said = evaluated(*words, "--vbench", str(tmp_path / "other/folder"))
        assert code == 2 and "gives its folder no name of its own" in said and not (tmp_path / "other").exists()
    assert "custom_input takes any names" in evaluated("@references", "--vbench", str(tmp_path / "v"))[2]


def test_a_prompt_begins_after_the_mark_of_its_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\n".encode())
    assert evaluate.prompt_of(tmp_path / "a.mp4") == ("a cat", "a cat", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["@none"], "none: does not exist; give a folder of videos"),
        (["@a/0_red car/0/000000.mp4"], "is no folder"),
        (["@a", "@a"], "given twice"),
        (["@a", "before="], "before= names no folder"),
        (["@empty"], "holds no video"),
        (["@twice"], "have one name"),
        (["@a", "--reference", "@other"], "4 of 4 videos have no reference"),
        (["@a", "--reference", "@short"], "has 5 frames of 48x64, its reference"),
        (["@damaged"], "damaged"),
        (["@words"], "words/a.txt is not UTF-8 text (byte 3)"),
        (["@a", "--lpips", "weights.pth"], "give --reference FOLDER as well"),
        (["@references", "--clip", "none"], "have no prompt beside them"),
        (["@a", "--clip", "none"], "model folder 'none' does not exist; nothing is downloaded"),
    ],
)
def test_what_is_refused(words, message, evaluated, folders):
    if not (folders / "empty").exists():
        (folders / "empty").mkdir()
        for name in ("a.mp4", "a.mkv"):
            record(folders / "twice" / name, moving(2))
        record(folders / "other/x.mp4", moving(2))
        for n, prompt in enumerate(("red car", "blue car")):
            record(folders / f"short/{n}_{prompt}.mp4", moving(4))
        (folders / "damaged").mkdir()
        (folders / "damaged/damaged.mp4").write_bytes((folders / "other/x.mp4").read_bytes()[:400])
        record(folders / "words/a.mp4", moving(2))
        (folders / "words/a.txt").write_bytes(b"caf\xe9")
    code, _, said = evaluated(*words)
    assert code == 2 and message in said, said


def test_a_damaged_video_costs_no_figure_of_another(evaluated, folders, tmp_path, monkeypatch):
    read = evaluate.read_frames
    unreadable = set()

    def damaged(path, *given):
        if path.parent.parent.name in unreadable:
            raise evaluate.ClipError(path, "frame 3 cannot be decoded")
        return read(path, *given)

    monkeypatch.setattr(evaluate, "read_frames", damaged)
    whole = evaluated("@b")[1]["videos"]
    assert "left_out" not in evaluated("@b")[1]
    unreadable |= {"0_red car"}
    code, found, said = evaluated("@b")
    assert code == 2 and "1 of 2 videos cannot be decoded and are left out of" in said, said
    assert found["videos"] == [whole[1]] == [video for video in whole if "blue" in video["file"]]
    ((left),) = found["left_out"]
    assert left["file"] == whole[0]["file"] and "frame 3 cannot be decoded" in left["reason"]
    unreadable |= {"1_blue car"}
    assert "no video can be decoded" in evaluated("@b")[2]
    assert json.loads((tmp_path / "out.json").read_text()) == found, "what was measured stays"


def test_files_of_others_are_not_replaced(folders, tmp_path, capsys):
    mine = {"notes.md": "mine", "metadata.json": '[{"caption": "x"}]'}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    for name in ("notes.json", "metadata.json"):
        assert evaluate.main([str(folders / "a"), "--out", str(tmp_path / name)]) == 2
        assert "was not written by this command" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == mine
    for _ in range(2):  # its own results are
        assert evaluate.main([str(folders / "b"), "--out", str(tmp_path / "own.json")]) == 0


def test_a_folder_counts_once_however_it_is_written(evaluated, folders):
    assert "given twice" in evaluated("m=@a", "m=@b/../a/")[2]
    assert evaluated("m=@b", "n=@b")[0] == 0, "as another method it may"


def test_figures_of_other_prompts_or_rates_come_with_a_warning(evaluated, folders, tmp_path):
    assert "do not hold the same videos" not in evaluated("@b", "n=@b")[2]
    record(tmp_path / "less/0_red car/0/000000.mp4", moving(), prompt="red car", seed=42)
    code, _, said = evaluated("@a", f"less={tmp_path / 'less'}")
    assert code == 0 and f"seeds of {folders}/a and less do not hold the same videos" in said, said
    write_video(tmp_path / "fast/0_red car.mp4", moving(), 16)
    code, _, said = evaluated(str(tmp_path / "less"), "--reference", str(tmp_path / "fast"))
    assert code == 0 and "1 of 1 videos run at another rate than their references" in said, said
    assert "another rate" not in evaluated("@b", "--reference", "@references")[2]


def test_links_to_folders_are_followed(tmp_path):
    record(tmp_path / "a/x.mp4", moving(2))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/link").symlink_to(tmp_path / "a")
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    assert [*evaluate.files_in(tmp_path / "b")] == ["link/x"]


def test_the_table_does_not_replace_the_figures(folders, capsys):
    assert evaluate.main([str(folders / "a"), "--out", "figures.md"]) == 2
    assert "name a .json file" in capsys.readouterr().err
