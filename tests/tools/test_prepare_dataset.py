import re
import shlex
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from sgm.training import main as training

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = spec_from_file_location("prepare_dataset", ROOT / "tools" / "prepare_dataset.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Only three clips of the toy."""
    monkeypatch.chdir(ROOT)
    for name in ("videos/000000.mp4", "videos/000001.mp4", "videos/000002.mp4"):
        for file in (name, name.replace("videos", "labels").replace("mp4", "txt")):
            (tmp_path / "few" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / "assets" / "toy" / file, tmp_path / "few" / file)
    return [f"args.train_data=[{tmp_path / 'few'}]", "args.split=2,1,0"]


@pytest.mark.thorough
def test_the_commands_of_the_documentation(tool, words, tmp_path, capsys):
    text = (ROOT / "docs" / "precomputing.md").read_text(encoding="utf-8").replace("outputs/", f"{tmp_path}/")
    block = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[0]
    prepare, train = (shlex.split(line)[2:] for line in block.splitlines())
    assert tool.main([*prepare, *words, "--check"]) == 0
    assert "latents: 3 in 1 shards" in capsys.readouterr().out and not (tmp_path / "example").exists()
    assert tool.main([*prepare, *words]) == 0
    assert "text: 4 in 1 shards, 16.4 kB; 0 missing" in capsys.readouterr().out
    assert training.main([*train, *words, f"args.save={tmp_path}", "--check"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"latents +3 clips .*; VAE is loaded: evaluation samples videos", shown)
    assert training.main([*train, *words, f"args.save={tmp_path}", "args.eval_interval=null", "--check"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"text +4 captions .*; T5 is not loaded", shown) and "VAE is not loaded" in shown


def test_the_check_says_what_memory_a_batch_takes(tool, words, tmp_path, capsys):
    base = ["--base", "configs/toy_lora.yaml", "configs/toy_sft.yaml", "--out", str(tmp_path / "cache"), "--check"]
    found = []
    for batch in ("1", "3", "100"):  # there are three clips
        assert tool.main([*base, *words, "--vae", "--batch_size", batch]) == 0
        (memory,) = re.findall(r"latents: .*; encoding takes about (\d+) MiB", capsys.readouterr().out)
        found.append(int(memory))
    assert 2 * found[0] < found[1] == found[2]


def test_clips_that_cannot_be_encoded_are_listed_each_time_and_end_with_1(tool, words, tmp_path, capsys):
    (tmp_path / "few" / "videos" / "000001.mp4").write_bytes(b"no video")
    base = ["--base", "configs/toy_lora.yaml", "configs/toy_sft.yaml", "--vae", "--out", str(tmp_path / "cache")]
    for _ in range(2):
        assert tool.main([*base, *words]) == 1
        shown = capsys.readouterr().out
        assert "latents: 3 in 1 shards" in shown and "; 0 missing" in shown
        assert "1 could not be encoded; the same command tries them again:\n  few/videos/000001.mp4, 8 bytes: " in shown


def test_keys_of_the_training_that_do_not_matter_are_not_held_against_it(tool, words, tmp_path, capsys):
    base = ["--base", "configs/toy_lora.yaml", "configs/toy_sft.yaml", "--out", str(tmp_path / "cache"), "--check"]
    other = "args.eval_interval=5 args.split=1,0,0 args.train_iters=null args.load=nowhere args.resume=''"
    assert tool.main([*base, *words, *other.split(), "deepspeed.scheduler={}"]) == 0
    assert "latents: 3 in 1 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard_mb", "0"], "--shard_mb is 0"),
        (["--batch_size", "0"], "--batch_size is 0"),
        (["--images"], "the network takes no image"),
        (["data.params.random_flip=0.5"], "data.params.random_flip is 0.5"),
        (["args.train_data=[nowhere]"], "nowhere"),
    ],
)
def test_wrong_input_ends_with_2_and_leaves_nothing(tool, words, tmp_path, capsys, more, message):
    base = ["--base", "configs/toy_lora.yaml", "configs/toy_sft.yaml", "--out", str(tmp_path / "cache")]
    assert tool.main([*base, *words, *more]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_clips_without_a_caption_are_left_out_as_in_training(tool, words, tmp_path, capsys):
    (tmp_path / "few" / "labels" / "000001.txt").unlink()
    base = ["--base", "configs/toy_lora.yaml", "configs/toy_sft.yaml", "--out", str(tmp_path / "cache"), "--check"]
    assert tool.main([*base, *words]) == 2
    assert "1 of 3 clips have no usable caption, more than args.max_bad_share=0.1" in capsys.readouterr().err
    assert tool.main([*base, *words, "args.max_bad_share=0.5"]) == 0
    shown = capsys.readouterr()
    assert "left out" in shown.err and "000001.mp4: its caption" in shown.err and "latents: 2 in 1" in shown.out
