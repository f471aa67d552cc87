import json
import os
import shutil
from pathlib import Path

import caption_videos
import numpy as np
import pytest
import torch

from sgm.inference.video import write_video
from sgm.log import configure_logging
from tests.processes import run as start

ROOT = Path(__file__).parents[2]


SPECIAL = ["<pad>", "<unk>", "</s>", "<image>"]
WORDS = [
    *SPECIAL,
    "USER:",
    "ASSISTANT:",
    *"what moves a red blue green circle square left right over white ground".split(),
]
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
PROMPT = ("--prompt", "what moves", "--frames", "3", "--max_new_tokens", "6")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny LLaVA with random weights: pictures of 16x16, words of a few letters."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("vlm")
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.LlavaProcessor(
        image_processor=pictures,
        tokenizer=fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(
            **sizes, vocab_size=len(WORDS), pad_token_id=0, eos_token_id=2, bos_token_id=None
        ),
        image_token_index=SPECIAL.index("<image>"),
    )
    torch.manual_seed(0)
    network = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():  # large enough that the output depends on the image
        for parameter in network.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five clips, two in a subfolder; lengths differ, one is shorter than --frames."""
    folder = tmp_path_factory.mktemp("data") / "videos"
    for k, name in enumerate(("a", "b", "c", "more/d", "more/e")):
        pictures = np.random.default_rng(k).integers(0, 255, (2 + 3 * k, 1, 1, 3), dtype=np.uint8)
        write_video(folder / f"{name}.mp4", pictures.repeat(16, 1).repeat(24, 2), 8)
    return folder


@pytest.fixture
def data(videos, tmp_path):
    """A data folder with these clips."""
    shutil.copytree(videos, tmp_path / "videos")
    return tmp_path


def captions(folder):
    labels = folder / "labels"
    return {path.relative_to(labels).as_posix(): path.read_text() for path in sorted(labels.rglob("*.txt"))}


def run(data, model, *words):
    return caption_videos.main([str(data), "--model", str(model), *PROMPT, *map(str, words)])


def test_every_clip_gets_the_caption_that_the_model_gives_it(data, model, capsys):
    assert run(data, model) == 0
    assert "5 clips: 5 described, 0 had captions, 0 failed" in capsys.readouterr().out
    alone = captions(data)
    assert list(alone) == ["a.txt", "b.txt", "c.txt", "more/d.txt", "more/e.txt"]
    words = {word for text in alone.values() for word in text.split()}
    assert words and words <= {*WORDS} - {*SPECIAL} and len({*alone.values()}) > 1
    assert all(text.endswith("\n") and text.count("\n") == 1 for text in alone.values())
    assert run(data, model, "--overwrite", "--batch_size", 3) == 0
    assert captions(data) == alone, "padding to a batch changes nothing"


def test_existing_captions_are_kept_and_an_interrupted_run_continues(data, model, monkeypatch, capsys):
    (data / "labels").mkdir()
    (data / "labels/b.txt").write_text("mine")
    (data / "labels/c.txt").write_text(" \n")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        describe, calls = caption_videos.Captioner.describe, []
        patch.setattr(
            caption_videos.Captioner,
            "describe",
            lambda *given: interrupted() if calls else (calls.append(1), describe(*given))[1],
        )
        assert run(data, model) == 130
    first = captions(data)
    assert first["b.txt"] == "mine" and first["a.txt"].strip() and "more/d.txt" not in first
    capsys.readouterr()
    assert run(data, model) == 0
    assert "5 clips: 3 described, 2 had captions, 0 failed" in capsys.readouterr().out
    assert captions(data)["b.txt"] == "mine" and captions(data)["a.txt"] == first["a.txt"]
    monkeypatch.setattr(caption_videos, "Captioner", None)  # nothing is left to do: no model is loaded
    assert run(data, model) == 0


def test_failed_clips_are_named_and_the_others_described(data, model, monkeypatch, capfd):
    (data / "videos/broken.mp4").write_text("no video")
    (data / "labels").mkdir()
    (data / "labels/a.txt").write_bytes(b"\xff\xfe\xff")
    assert run(data, model, "--batch_size", 2) == 1
    said = capfd.readouterr()
    assert "broken.mp4: is not a video" in said.err and "labels/a.txt is not UTF-8" in said.err
    assert "6 clips: 4 described, 0 had captions, 2 failed" in said.out
    assert (data / "labels/a.txt").read_bytes() == b"\xff\xfe\xff" and not (data / "labels/broken.txt").exists()
    monkeypatch.setattr(caption_videos.Captioner, "describe", lambda _, clips, *__: [("", False)] * len(clips))
    assert run(data, model, "--overwrite") == 1
    assert "the model says nothing" in capfd.readouterr().err


def test_answers_that_were_cut_are_counted(data, model, monkeypatch, capsys):
    captioner = caption_videos.Captioner(model, dtype=None, device=torch.device("cpu"))
    ends = {"</s>": 2, "red": WORDS.index("red"), "<pad>": 0}
    told = torch.tensor([[ends["red"]] * 3, [ends["red"], ends["</s>"], ends["<pad>"]]])

    def generate(**given):
        assert given["attention_mask"].sum(dim=1).diff() > 0, "the first clip has fewer pictures, hence padding"
        assert given["attention_mask"][:, -1].all(), "which stands before the question"
        return torch.cat([given["input_ids"], told], dim=1)

    monkeypatch.setattr(captioner._model, "generate", generate, raising=False)
    clips = [np.zeros((num_frames, 16, 16, 3), dtype=np.uint8) for num_frames in (1, 2)]
    assert captioner.describe(clips, "what moves", 3) == [("red red red", True), ("red", False)]
    monkeypatch.setattr(caption_videos.Captioner, "describe", lambda _, clips, *__: [("red", True)] * len(clips))
    assert run(data, model) == 0
    assert "5 captions end unfinished at --max_new_tokens 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "folder", "read"),
    [("metadata.csv", "videos", "captions of the csv are not read"), ("metadata.jsonl", ".", "format=folder")],
)
def test_captions_beside_a_table_come_with_a_warning(table, folder, read, tmp_path, capfd):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "a.mp4").write_bytes(b"")
    (tmp_path / table).write_text("caption,video\nx,a.mp4\n")
    configure_logging()
    caption_videos.warn_of_table(tmp_path)
    assert read in capfd.readouterr().err
    (tmp_path / table).unlink()
    caption_videos.warn_of_table(tmp_path)
    assert not capfd.readouterr().err


def test_frames_are_spread_over_the_clip():
    assert caption_videos.evenly_spaced(100, 4) == [12, 37, 62, 87]
    assert caption_videos.evenly_spaced(3, 8) == [0, 1, 2]
    assert caption_videos.evenly_spaced(1, 1) == [0]


def test_batches_are_read_in_order_and_ahead(data, monkeypatch):
    clips = sorted((data / "videos").rglob("*.mp4"))
    batches = caption_videos.read_ahead(clips, 2, 3)
    read = [(clip, len(frames)) for batch in batches for clip, frames in batch]
    assert read == list(zip(clips, (2, 3, 3, 3, 3), strict=True))
    assert [len(batch) for batch in caption_videos.read_ahead(clips, 2, 3)] == [2, 2, 1]
    assert list(caption_videos.read_ahead([], 2, 3)) == []


def test_ranks_share_the_clips_of_rank_zero(data, model, monkeypatch, capsys):
    """Two simulated ranks: each describes its own clips, and both report equally often."""
    assert run(data, model) == 0
    expected = captions(data)
    shutil.rmtree(data / "labels")
    lists = [caption_videos.clips_to_describe(data, overwrite=False)]
    reports: dict[int, list[int]] = {0: [], 1: []}
    monkeypatch.setattr(caption_videos, "BATCHES_BETWEEN_REPORTS", 2)
    monkeypatch.setattr(caption_videos.distributed, "broadcast_from_rank_zero", lambda _: lists[0])
    monkeypatch.setattr(caption_videos.distributed, "data_parallel_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(caption_videos.distributed, "data_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            caption_videos.distributed,
            "all_gather_objects",
            lambda report, rank=rank: (reports[rank].append(report.num_written), [report])[1],
        )
        assert run(data, model) == 0
    assert reports == {0: [2, 1], 1: [2, 0]}
    assert captions(data) == expected


@pytest.mark.slow
def test_two_processes_describe_all_clips_and_a_bad_one_stops_nobody(data, model):
    (data / "videos/0.mp4").write_text("no video")
    script = "tools/caption_videos.py"
    done = start(script, [str(data), "--model", str(model), *PROMPT], 2)
    assert done.returncode == 1
    assert "6 clips: 5 described, 0 had captions, 1 failed" in done.stdout
    shared = captions(data)
    shutil.rmtree(data / "labels")
    assert start(script, [str(data), "--model", str(model), *PROMPT]).returncode == 1
    assert captions(data) == shared and len(shared) == 5


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist; nothing is downloaded"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "of type 't5', which does not"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "nothing"}'), "cannot be used"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be used"),
        (lambda folder: os.truncate(folder / "model.safetensors", 999), "cut off or damaged"),
        (lambda folder: add_a_layer(folder), "lack"),
    ],
)
def test_a_folder_that_holds_no_such_model_ends_with_2(break_it, said, data, model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    break_it(tmp_path / "model")
    assert run(data, tmp_path / "model") == 2
    assert said in capsys.readouterr().err
    assert not (data / "labels").exists()


def add_a_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))


def test_code_in_the_folder_is_not_run(data, model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model/code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForImageTextToText": "code.Own"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert run(data, tmp_path / "model") == 2
    assert "cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "said"), [(["--frames", "0"], "--frames is 0"), (["--batch_size", "-1"], "--batch_size is -1")]
)
def test_wrong_numbers_end_with_2(words, said, data, capsys):
    assert run(data, "nowhere", *words) == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_clips_ends_with_2(tmp_path, model, capsys):
    assert run(tmp_path, model) == 2
    assert "holds no clips" in capsys.readouterr().err
