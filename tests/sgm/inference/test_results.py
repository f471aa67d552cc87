"""Where results go: nothing finished is replaced or lost."""

import json
import os
import tempfile
import threading
from pathlib import Path

import pytest

from sgm.config.args import SamplingArgs
from sgm.inference.prompts import Prompt
from sgm.inference.results import Results, _locked, remove_unfinished
from sgm.util import InputError, RunError

PROMPT = Prompt(3, "a red ball")
SETTINGS = {"negative_prompt": "", "num_steps": 50, "config_digest": "1234"}


def make(folder: Path, *, settings=None, **args) -> Results:
    name = "000000.safetensors" if args.get("only_save_latents") else "000000.mp4"
    return Results(SamplingArgs(output_dir=str(folder), **args), SETTINGS | (settings or {}), name=name)


def write(results: Results, content: str = "video", prompt: Prompt = PROMPT, k: int = 0) -> Path:
    results.announce(prompt, k)
    return results.write(prompt, k, lambda path: path.write_text(content) and None, {"more": 1})


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("other", "prompt", "said"),
    [
        ({"seed": 7}, PROMPT, "(seed 42, now 7)"),
        ({"settings": {"negative_prompt": "blue"}}, PROMPT, "(negative_prompt '', now 'blue')"),
        ({"settings": {"num_steps": 20, "config_digest": "5"}}, PROMPT, "(num_steps 50, now 20)"),
        ({"settings": {"config_digest": "5"}}, PROMPT, "(another model, other weights, or an argument of the model)"),
        ({}, Prompt(3, "a red ball "), "(prompt 'a red ball', now 'a red ball ')"),
        ({}, Prompt(3, "a red ball", Path(__file__)), "(image None, now "),
        (
            {"seed": 7, "only_save_latents": True},
            PROMPT,
            "000000.safetensors was made with other settings (seed 42, now 7)",
        ),
    ],
)
def test_what_differs_goes_beside_and_is_found_again(tmp_path, caplog, other, prompt, said):
    first = write(make(tmp_path), "one")
    assert names(tmp_path) == ["3_a_red_ball/0/000000.json", "3_a_red_ball/0/000000.mp4"]
    assert json.loads(first.with_suffix(".json").read_text())["seed"] == 42 and not caplog.messages
    changed = make(tmp_path, **other)
    assert changed.finished(prompt, 0) is None
    second = write(changed, "two", prompt)
    assert said in caplog.messages[0] and second.name in caplog.messages[0] and "overwrite" in caplog.messages[0]
    assert (first.read_text(), second.read_text()) == ("one", "two") and second.parent == first.parent
    assert make(tmp_path).finished(PROMPT, 0) == first and make(tmp_path, **other).finished(prompt, 0) == second
    assert write(make(tmp_path, **other), "two again", prompt) == second, "the same settings replace their own"
    seen = []
    changed = make(tmp_path, overwrite=True, **other)
    changed.announce(prompt, 0)
    third = changed.write(prompt, 0, lambda path: seen.append(path.with_suffix(".json").exists()), {})
    assert seen == [False], "a kill leaves no record of seed 42 beside another video"
    assert third.stem == "000000" and "will be replaced" in caplog.messages[-1]


def test_an_unfinished_result_is_replaced_by_any(tmp_path):
    first = write(make(tmp_path))
    first.with_suffix(".json").unlink()
    assert make(tmp_path).finished(PROMPT, 0) is None
    assert write(make(tmp_path, seed=7), "seven") == first
    first.with_suffix(".json").write_text("[" * 100_000)
    assert write(make(tmp_path)) != first, "whose a result is cannot be read: it stays"


def test_two_runs_at_once_do_not_replace_each_other(tmp_path):
    """Both saw an empty folder when they began."""
    written, one = [], make(tmp_path)
    thread = threading.Thread(target=lambda: written.append(write(make(tmp_path, seed=7), "seven")))

    def save(path: Path) -> None:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive(), "the other one waits"
        path.write_text("one")

    written.append(one.write(PROMPT, 0, save, {}))
    thread.join(60)
    assert sorted(path.read_text() for path in written) == ["one", "seven"] and written[0] != written[1]
    with _locked(tmp_path / "new"):
        assert names(tmp_path / "new") == [], "a lock leaves nothing"


def in_the_way(folder: Path, monkeypatch) -> None:
    folder.mkdir()
    (folder / "3_a_red_ball").write_text("a file")


def refused(folder: Path, monkeypatch) -> None:
    folder.mkdir()
    mkdir = os.mkdir

    def denied(path, *rest):
        if "red" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *rest)

    monkeypatch.setattr(os, "mkdir", denied)


@pytest.mark.parametrize("obstacle", [in_the_way, refused])
def test_a_sample_that_cannot_be_written_goes_beside_under_a_safe_name(tmp_path, monkeypatch, caplog, obstacle):
    obstacle(tmp_path / "out", monkeypatch)
    path = write(make(tmp_path / "out"))
    assert path.parent == tmp_path / "out" and path.name.startswith("sample-3-0-") and path.read_text() == "video"
    assert f"the sample goes beside, to {path}" in caplog.text
    assert make(tmp_path / "out").finished(PROMPT, 0) == path, "and is not sampled again"


def test_a_sample_is_kept_though_its_folder_takes_nothing(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))

    def full(path: Path) -> None:
        if "elsewhere" not in str(path):
            raise RunError(f"could not write {path}: No space left on device")
        path.write_text("video")

    with pytest.raises(RunError, match=r"a_red_ball/0/000000.mp4: No space.*kept as .*elsewhere/sample-3-0-\w{8}.mp4"):
        make(tmp_path / "out").write(PROMPT, 0, full, {})
    assert [Path(name).suffix for name in names(tmp_path)] == [".json", ".mp4"]

    def broken(path: Path) -> None:
        raise RunError(f"ffmpeg cannot write {path}")

    with pytest.raises(RunError, match="ffmpeg cannot write .*000000.mp4$"):
        make(tmp_path / "more").write(PROMPT, 0, broken, {})


def test_every_sample_number_has_its_own_folder(tmp_path):
    results = make(tmp_path, batch_size=2)
    paths = [write(results, str(k), k=k) for k in range(2)]
    assert [path.parent.name for path in paths] == ["0", "1"]
    assert [json.loads(path.with_suffix(".json").read_text())["seed"] for path in paths] == [42, 43]


def test_an_image_that_is_gone_is_told(tmp_path):
    with pytest.raises(InputError, match="gone.png cannot be read .No such file"):
        make(tmp_path).content_now(tmp_path / "gone.png")


def test_other_content_under_the_same_name_is_another_sample(tmp_path, caplog):
    image, out = tmp_path / "a.png", tmp_path / "out"
    prompt = Prompt(3, "a red ball", image)

    def run(**contents: str) -> Results:
        return Results(
            SamplingArgs(output_dir=str(out)), SETTINGS, name="000000.mp4", contents={"load": "1", **contents}
        )

    image.write_text("one")
    first = write(run(), "one", prompt)
    os.utime(image, (1, 1))
    assert run().finished(prompt, 0) == first, "a copy of a picture is the same picture"
    image.write_text("two")
    assert run().finished(prompt, 0) is None
    second = write(run(), "two", prompt)
    assert "another content of image" in caplog.text and second != first
    third = write(run(load="2"), "three", prompt)
    assert "another content of load; another content of image" in caplog.text
    image.write_text("one")
    assert [run().finished(prompt, 0), first.read_text(), third.exists()] == [first, "one", True]


@pytest.mark.parametrize("beside", [False, True])
def test_results_of_older_versions_count_as_finished(tmp_path, beside):
    """Their records hold no contents, nor do their names."""
    args = SamplingArgs(output_dir=str(tmp_path / "out"), seed=7 if beside else 42)
    if beside:
        write(make(tmp_path / "out"), "of another seed")
    old = write(Results(args, SETTINGS, name="000000.mp4"), "old")
    record = json.loads(old.with_suffix(".json").read_text())
    del record["contents"]
    old.with_suffix(".json").write_text(json.dumps(record))
    assert Results(args, SETTINGS, name="000000.mp4", contents={"load": "1"}).finished(PROMPT, 0) == old
    assert (old.stem != "000000") == beside


def test_what_a_killed_run_left_is_removed_whatever_it_sampled(tmp_path):
    done, name = write(make(tmp_path)), f".000000.{os.getpid()}-0123abcd.mp4"
    for folder in (tmp_path, done.parent, tmp_path / "0_other_prompt" / "1", tmp_path / "other"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    remove_unfinished(tmp_path)
    assert sorted(path.parent.name for path in tmp_path.rglob(name)) == ["other"], "it is no folder of samples"
    assert done.read_text() == "video"
