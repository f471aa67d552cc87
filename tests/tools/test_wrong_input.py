"""Wrong input of the tools: what is wrong, where, and what to do, with exit code 2 and nothing written."""

import importlib
import json
import os
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import torch

from sgm.cli import file_size
from tests.conftest import ROOT

TOY, TRAINING = str(ROOT / "configs/toy.yaml"), [str(ROOT / f"configs/toy_{name}.yaml") for name in ("lora", "sft")]
CLIP, LORA_BASE = ROOT / "assets/toy/videos/000000.mp4", ROOT / "assets/toy/transformer"


@pytest.fixture
def folder(tmp_path):
    """A folder of wrong input; what commands write goes into its subfolder ``out``."""
    transformer = {"_class_name": "CogVideoXTransformer3DModel", "in_channels": 16, "out_channels": 16}
    transformer |= {"num_attention_heads": 2, "attention_head_dim": 64, "time_embed_dim": 512, "num_layers": 6}
    content = {
        "empty": b"",
        "twice.yaml": b"- {args.seed: 1, args.seed: 2}\n",
        "latin.yaml": b"- {args.experiment_name: \xe9}\n",
        "nameless/config.json": json.dumps(transformer).encode(),
        "many/config.json": json.dumps(transformer | {"patch_size": 2, "num_layers": -1}).encode(),
        "index/m.safetensors.index.json": b'{"weight_map": {"a": 5}}',
        "index/config.json": b"{}",
        "code/config.json": b'{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}',
        "manifest/clips.jsonl": b'{"path": NaN, "text": null}\n',
        "mine/clips.jsonl": b'{"path": "a.mp4", "text": "my own caption"}\n',
    }
    content |= {
        "blank/clips.jsonl": '{"path": "a.mp4", "text": "\u200b \u00a0"}\n'.encode(),
        "blank/a.mp4": b"",
        "splits/dataset_dict.json": b'{"splits": 5}',
        "lost/state.json": b'{"_data_files": [{"filename": "../none"}]}',
        "lost/dataset_info.json": b"{}",
        "list/a.mp4": b"ffconcat version 1.0\nfile '/a.mp4'\n",
        "list/a.txt": b"red",
        "models--a--b/refs/main": b"0f",
        "models--a--b/snapshots/0f/model_index.json": b"{}",
        "huge/a.mp4": b"YUV4MPEG2 W65535 H65535 F8:1\nFRAME\n",
        "huge/a.txt": b"red",
        "sheet/0_a/0/000000.mp4": b"",
        "sheet/0_a/0/000000.json": b"{}",
    }
    for name, data in content.items():
        (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name, value in {"size": "99999999999999", "GNU.sparse.map": "0,x"}.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            (entry := tarfile.TarInfo("a.mp4")).pax_headers = {name: value}
            archive.addfile(entry)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["path", "caption", "caption"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    for name in ("nameless", "many"):
        torch.save({"proj_out.weight": torch.zeros(2)}, tmp_path / name / "diffusion_pytorch_model.bin")
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.pt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


SWEEP = f"sweep --base {' '.join(TRAINING)} --out out"
SPLIT = f"split_video {CLIP} --out"
CHECK = f"check_dataset {ROOT / 'assets/toy'} --video_size 64 64 --rows_only"
HF2SAT = "convert_weight_hf2sat --output_path out"
SNAPSHOT = "give a snapshot in it: models--a--b/snapshots/0f"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{SWEEP} --runs none.yaml", "none.yaml): the file does not exist"),
        (f"{SWEEP} --runs nameless", "is a folder, not a YAML file"),
        (f"{SWEEP} --runs twice.yaml", "twice.yaml:1): written twice"),
        (f"{SWEEP} --runs latin.yaml", "give a readable YAML file in UTF-8"),
        (f"{SWEEP} --grid args.seed={','.join(map(str, range(1001)))}", "ask for 1,001 runs; give values for 1,000"),
        (f"{SWEEP} --grid args.seed=1,2 --stop_above nan", "--stop_above is a percentage from 0 on"),
        (f"{SWEEP} --grid args.seed=1,2 --devices 0 1 0", "--devices names 0 twice"),
        (f"{SWEEP} --grid args.seed=1,2 --prompts empty", "--prompts empty holds no prompt"),
        (f"{SPLIT} out --fps inf", "--fps is inf; give a number above 0 and at most 990"),
        (f"{SPLIT} out --size 100000 100000", "give 67,108,864 pixels at most"),
        (f"{SPLIT} mine", "mine/clips.jsonl exists and was not written by this command"),
        (f"prepare_dataset --base {' '.join(TRAINING)} --out out --shard_mb nan", "--shard_mb is nan; give megabytes"),
        (f"prepare_dataset --base {' '.join(TRAINING)} --out out --shard_mb inf", "--shard_mb is inf; give megabytes"),
        (f"{CHECK} --contact_sheet sheet.xyz", "name a file that ends in .png"),
        ("contact_sheet sheet --out sheet.xyz", "--out sheet.xyz: name a file that ends in .png"),
        ("contact_sheet sheet --out sheet", "--out sheet: name a file that ends in .png"),
        ("contact_sheet sheet --out sheet.png", "000000.json is no record of sampling"),
        ("contact_sheet sheet --out sheet.gif --fps 0.0001", "--fps 0.0001; give at least 1, and 0.1 to 100"),
        (f"{CHECK} --json nameless", "nameless is a folder; name a file in it"),
        ("check_dataset manifest/clips.jsonl --video_size 64 64", "path is NaN; give the path of a file"),
        ("check_dataset loop --video_size 64 64", "it is a symbolic link to loop, which leads nowhere"),
        ("check_dataset splits --video_size 64 64", "has a dataset_dict.json and no folder of a split"),
        ("check_dataset lost --video_size 64 64", "datasets.load_from_disk: No such file or directory"),
        ("check_dataset size.tar --video_size 64 64", "size.tar: is cut or damaged near byte 100,000,000,001,536"),
        ("check_dataset GNU.sparse.map.tar --video_size 64 64", "GNU.sparse.map.tar: is not a tar file, or a damaged"),
        ("check_dataset twice.parquet --video_size 64 64", "'twice.parquet' names the column 'caption' twice"),
        (f"{HF2SAT} --text_encoder_path huge/a.txt", "no folder huge/a.txt: it is a file; give that of the text enc"),
        (f"{HF2SAT} --model_path models--a--b", f"is a cache of downloads, not a model; {SNAPSHOT}"),
        (f"{HF2SAT} --text_encoder_path models--a--b", SNAPSHOT),
        ("load_cogvideox_lora --model_path models--a--b --prompt a --output_path out/a.mp4", SNAPSHOT),
        (f"caption_videos {ROOT / 'assets/toy'} --overwrite --model models--a--b", SNAPSHOT),
        (f"{HF2SAT} --model_path nothing", "there is no nothing/model_index.json; correct the path"),
        (f"{HF2SAT} --transformer_path index", "weight_map does not give the file of each tensor"),
        (f"{HF2SAT} --transformer_path nameless", "nameless/config.json lacks 'patch_size'"),
        (
            f"{HF2SAT} --transformer_path many",
            "many/config.json: num_layers is -1; give a whole number from 1 to 1,000",
        ),
        ("inspect_checkpoint pipe", "pipe is no file, but a folder, pipe, socket or device"),
        ("inspect_checkpoint numbers.pt", "holds tensors by other keys than names, e.g. 1"),
        (f"merge_lora_weight --sat_pt_path {LORA_BASE} --output_path out --strength 1e38", "a number from -100 to 100"),
        (f"caption_videos {ROOT / 'assets/toy'} --overwrite --model code", "needs Python code of its own"),
    ],
)
def test_it_is_named_with_the_cure(command, said, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}
    tool, *words = command.split()
    assert importlib.import_module(f"tools.{tool}").main(words) == 2
    text = capsys.readouterr().err
    assert said in text and "Errno" not in text and "trust_remote_code" not in text
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()} == before


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("blank/clips.jsonl", "its caption, blank/clips.jsonl:1, is empty"),
        ("list", "is not a video, or a damaged one"),
        ("huge", "is not a video, or a damaged one"),
    ],
)
def test_a_clip_that_is_none_is_named_in_the_report(data, said, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert importlib.import_module("tools.check_dataset").main([data, "--video_size", "64", "64"]) == 1
    assert said in capsys.readouterr().out


def test_a_data_set_without_a_name_is_refused(capsys):
    assert importlib.import_module("tools.check_dataset").main(["", "--video_size", "64", "64"]) == 2
    assert "the data set has no name" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "abc", "-5GB", "0GB", "5", "5PB", "nanGB"])
def test_a_wrong_size_of_files_is_refused_with_the_command_line(size, capsys):
    module = importlib.import_module("tools.convert_weight_sat2hf")
    with pytest.raises(SystemExit) as ended:
        module.main(["--base", TOY, "--output_path", "out", f"--max_shard_size={size}"])
    assert ended.value.code == 2 and f"'{size}' is no size; give one such as 500MB" in capsys.readouterr().err
    assert file_size("1.5gb") == "1.5GB"
