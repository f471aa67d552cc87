import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sgm.data.cache import CachedTensors, ClipKeys, Description, begin, differences, divide, read_shard, write_shard
from sgm.data.cache_folder import LocalFolder
from sgm.data.contents import Contents
from sgm.data.formats.huggingface import Cell
from sgm.data.formats.webdataset import Member
from sgm.util import InputError, RunError
from sgm.weights.checksums import write_safetensors

KEYS = ["a", "b", "c"]
SOURCE = {"vae": {"weights": "0" * 64, "encode_chunk": None}, "precision": "fp32", "data": {"fps": 8.0}}


def description(**changes) -> Description:
    return Description(
        **{"kind": "latents", "dtype": "fp32", "source": SOURCE, "shards": (("a", "b"), ("c",))} | changes
    )


def write(folder: Path, wanted: Description, *, skip: int | None = None, **failed: str) -> Path:
    begin(folder, wanted)
    for number, shard in enumerate(wanted.shards):
        if number != skip:
            write_shard(folder, wanted, number, [failed.get(key, tensor(key)) for key in shard])
    return folder


def tensor(key: str) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(ord(key)))


def test_results_are_divided_into_shards_in_order():
    assert divide("abcde", [4, 4, 4, 20, 1], 8) == (("a", "b"), ("c",), ("d",), ("e",))
    assert divide([], [], 8) == ()


def test_only_the_last_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("sgm.data.cache._OPEN_SHARDS", 1)
    cache = CachedTensors(write(tmp_path, description()), "latents")
    assert all(torch.equal(cache[key], tensor(key)) and len(cache._open) == 1 for key in "acb")


def test_results_survive_a_round_trip(tmp_path):
    cache = CachedTensors(write(tmp_path, description()), "latents")
    assert list(cache) == KEYS and len(cache) == 3 and "d" not in cache
    assert all(torch.equal(cache[key], tensor(key)) for key in KEYS)
    copied = copy.copy(cache)  # as for a spawned worker
    assert cache._open and not copied._open and torch.equal(copied["b"], tensor("b"))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_results_are_stored_in_one_dtype_and_read_in_that_of_the_encoder(tmp_path, dtype):
    cache = CachedTensors(write(tmp_path, description(dtype=dtype)), "latents")
    narrow = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert cache["a"].dtype == torch.float32
    assert torch.equal(cache["a"], tensor("a").to(narrow).float()) and not torch.equal(cache["a"], tensor("a"))


def test_failures_are_recorded(tmp_path):
    cache = CachedTensors(write(tmp_path, description(), b="is damaged"), "latents")
    assert cache.failures == {"b": "is damaged"} and list(cache) == ["a", "c"]
    cache.require(KEYS, SOURCE)
    write_shard(tmp_path, description(), 0, [tensor("a"), tensor("b")])
    assert CachedTensors(tmp_path, "latents").failures == {}, "a shard that is written again has its own failures"


def test_a_shard_with_failures_is_unfinished_and_rewritten_atomically(tmp_path, monkeypatch):
    given = description()
    write(tmp_path, given, b="is damaged")
    assert given.unfinished(tmp_path) == [0] and given.missing(tmp_path) == []
    assert given.failures(LocalFolder(tmp_path)) == {"b": "is damaged"}
    assert read_shard(tmp_path, given, 0).keys() == {"a"} and read_shard(tmp_path, given, 1).keys() == {"c"}

    def die(*_, **__):
        raise RunError("killed")

    with monkeypatch.context() as patched:
        patched.setattr("sgm.data.cache.write_safetensors", die)
        with pytest.raises(RunError, match="killed"):
            write_shard(tmp_path, given, 0, [tensor("a"), tensor("b")])
    assert given.missing(tmp_path) == [0], "a shard without b must not stand there with nothing that says so"
    assert read_shard(tmp_path, given, 0) == {}
    write_shard(tmp_path, given, 0, [tensor("a"), tensor("b")])
    assert given.unfinished(tmp_path) == [] and read_shard(tmp_path, given, 0).keys() == {"a", "b"}


def test_an_unfinished_cache_is_refused_with_a_cure(tmp_path):
    write(tmp_path, description(), skip=1)
    with pytest.raises(InputError, match=r"1 of 2 shards.*latents-00001.*the same command of tools/prepare_dataset.py"):
        CachedTensors(tmp_path, "latents")
    with pytest.raises(InputError, match="it holds latents only"):
        CachedTensors(tmp_path, "text")
    with pytest.raises(InputError, match="no folder that this tool wrote"):
        CachedTensors(tmp_path / "none", "latents")


def test_damaged_files_are_reported(tmp_path):
    write(tmp_path, description())
    os.truncate(tmp_path / "latents-00000.safetensors", 100)
    with pytest.raises(InputError, match=r"latents-00000\.safetensors is damaged.*the same command of .* writes it"):
        CachedTensors(tmp_path, "latents")
    assert description().missing(tmp_path) == [0]
    (tmp_path / "latents.json").write_text('{"format": 0}')
    with pytest.raises(InputError, match="format 0, and this version reads 4"):
        CachedTensors(tmp_path, "latents")
    (tmp_path / "latents.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        CachedTensors(tmp_path, "latents")
    (tmp_path / "latents.json").write_text(
        '{"format": 4, "kind": "latents", "dtype": "fp32", "source": {"precision": "bf16"}, '
        '"shards": [["a"]], "shapes": ["", ""], "left_out": []}'
    )
    with pytest.raises(InputError, match="2 shapes of 1 clips"):
        CachedTensors(tmp_path, "latents")


def rewritten(change):
    """Return a function that rewrites the first shard with other tensors, keeping its metadata."""

    def rewrite(folder):
        path = folder / "latents-00000.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path, metadata=metadata)

    return rewrite


def swap(folder):
    first, second = (folder / f"latents-0000{number}.safetensors" for number in (0, 1))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def as_folder(folder):
    (folder / "latents-00000.safetensors").unlink()
    (folder / "latents-00000.safetensors").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.truncate(f / "latents-00001.safetensors", 300), "latents-00001.*"),
        (lambda f: os.truncate(f / "latents-00000.safetensors", 0), "latents-00000.*"),
        (lambda f: (f / "latents-00000.safetensors").open("ab").write(b"x"), "its header says"),
        (swap, "latents-00000.* another shard"),
        (lambda f: save_file({}, f / "latents-00000.safetensors"), "not written by this tool"),
        (rewritten(lambda t: t.to(torch.int8)), "latents-00000"),
        (as_folder, "directory"),
        (lambda f: (f / "latents-00000.safetensors").write_bytes(b"\x0a" + bytes(7) + b'{"x": {} }'), "data_offsets"),
        (lambda f: flip(f / "latents-00000.safetensors", 60), "latents-00000"),
    ],
)
def test_shards_of_a_wrong_size_or_header_are_found_at_the_start(tmp_path, damage, message):
    write(tmp_path, description(shards=(("a", "b"), ("c", "d"))))
    damage(tmp_path)
    with pytest.raises(InputError, match=rf"{message}.*the same command of tools/prepare_dataset.py writes it again"):
        CachedTensors(tmp_path, "latents")
    assert description(shards=(("a", "b"), ("c", "d"))).unfinished(tmp_path), "the tool mends it"


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_a_shard_that_cannot_be_replaced_is_told(tmp_path):
    write(tmp_path, given := description())
    as_folder(tmp_path)
    with pytest.raises(RunError, match=r"latents-00000.safetensors cannot be replaced: .*; remove it"):
        write_shard(tmp_path, given, 0, map(tensor, given.shards[0]))


def test_flipped_values_are_found_when_they_are_read_and_mended_with_verify(tmp_path):
    given = description()
    write(tmp_path, given)
    path = tmp_path / "latents-00000.safetensors"
    flip(path, path.read_bytes().index(tensor("b").numpy().tobytes()) + 10)
    cache = CachedTensors(tmp_path, "latents")
    assert torch.equal(cache["a"], tensor("a"))
    with pytest.raises(RunError, match=r"latents-00000.*latents of 'b': this is damaged.*prepare_dataset.py --verify"):
        cache["b"]
    assert given.unfinished(tmp_path) == [] and given.unfinished(tmp_path, verify=True) == [0]
    assert read_shard(tmp_path, given, 0).keys() == {"a"}, "what is good is not encoded again"


def test_shards_that_change_places_after_the_start_are_found_when_they_are_opened(tmp_path):
    cache = CachedTensors(write(tmp_path, description(shards=(("a",), ("b",)))), "latents")
    swap(tmp_path)
    with pytest.raises(RunError, match=r"latents-00000.safetensors.*another shard"):
        cache["a"]


def test_encodings_that_are_not_finite_are_failures(tmp_path):
    given = description(dtype="fp16")
    begin(tmp_path, given)
    failed = write_shard(tmp_path, given, 0, [tensor("a") / 0, tensor("b") * 1e6])
    assert failed == dict.fromkeys("ab", "its encoding is not finite in fp16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_of_a_cache_that_are_not_finite_are_said_to_come_from_it(tmp_path, value, monkeypatch):
    monkeypatch.setattr("sgm.weights.checksums.require_finite", lambda *_: None)  # another writer
    given = description(shards=(("a",),))
    begin(tmp_path, given)
    metadata = {"shard": given.identity(0)}
    write_safetensors(
        tmp_path / given.shard(0), {"000000": torch.full((4, 3), value)}, metadata=metadata, any_values=True
    )
    with pytest.raises(RunError, match=r"the cached latents of 'a': this is not finite: 12 of 12"):
        CachedTensors(tmp_path, "latents")["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": {}}, "precision None, expected one of fp16, bf16, fp32"),
        ({"source": {**SOURCE, "precision": "int3"}}, "precision int3, expected"),
        ({"source": []}, "source: Input should be an object"),
        ({"dtype": "fp64"}, "precision fp64, expected"),
        ({"kind": "text"}, "describes text, not latents"),
        ({"shards": [["a", 1]]}, "shards.0.1: Input should be a valid string"),
        ({"shards": None}, "shards: Input should be a valid array"),
        ({"format": [4]}, r"format \[4\], and this version"),
        ("[" * 100_000, "recursion limit"),
        ("[]", "Input should be an object"),
        ("9" * 6000, "number out of range"),
    ],
)
def test_a_description_of_another_form_is_refused(tmp_path, change, message):
    write(tmp_path, description())
    path = tmp_path / "latents.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    with pytest.raises(InputError, match=rf"latents.json cannot be read: .*{message}.*; remove it: the same command"):
        CachedTensors(tmp_path, "latents")


@pytest.mark.parametrize("text", ["[1]", '{"a": 3}', '{"a":'])
def test_failures_of_another_form_are_refused(tmp_path, text):
    write(tmp_path, description())
    (tmp_path / "latents-00000.failed.json").write_text(text)
    with pytest.raises(InputError, match=r"failed.json cannot be read: .*the same command .* writes it again"):
        CachedTensors(tmp_path, "latents")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bf16"}, 'dtype: cache "fp32", now "bf16"'),
        ({"source": {**SOURCE, "data": {"fps": 16.0}}}, "data.fps: cache 8.0, now 16.0"),
        ({"shards": (("a", "b"), ("c", "d"))}, "new: d"),
        ({"shards": (("a", "b"),)}, "gone: c"),
        ({"shards": (("a", "b", "c"),)}, "--shard_mb"),
        ({"shapes": ("5x8x8", "9x8x8", "5x8x8")}, 'b: cache "5x8x8", now "9x8x8"'),
        ({"shapes": ("5x8x8", "5x8x8", "5x8x8")}, 'c: cache null, now "5x8x8"'),
    ],
)
def test_another_cache_is_not_mixed_with_this_one(tmp_path, change, message):
    given = description(shapes=("5x8x8", "5x8x8", None))
    write(tmp_path, given)
    begin(tmp_path, given)
    with pytest.raises(InputError) as refused:
        begin(tmp_path, replace(given, **change))
    assert message in str(refused.value) and "--out" in str(refused.value)


def test_differences_name_key_cache_and_now():
    now = {**SOURCE, "vae": {"weights": "f" * 64, "slicing": 1}}
    assert differences(SOURCE, now) == [
        "vae.weights: cache 000000000000..., now ffffffffffff...",
        "vae.slicing: cache null, now 1",
    ]


def test_missing_keys_are_listed_with_similar_cached_ones(tmp_path):
    keys = ("x/a.mp4, 5 bytes", "x/b.mp4, 6 bytes")
    cache = CachedTensors(
        write(tmp_path / "full", Description("latents", "fp32", SOURCE, (), left_out=keys)), "latents"
    )
    cache.require(keys, SOURCE)
    with pytest.raises(InputError) as refused:
        cache.require(["x/a.mp4, 7 bytes", "x/c.mp4, 1 bytes"], SOURCE)
    assert "x/a.mp4, 7 bytes: not in the cache, which has x/a.mp4, 5 bytes" in str(refused.value)
    assert "x/c.mp4, 1 bytes: not in the cache\n" in f"{refused.value}\n"


def test_keys_of_clips_follow_their_folder_and_notice_another_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "data" / "videos").mkdir(parents=True)
        (tmp_path / name / "data" / "videos" / "a.mp4").write_bytes(b"12345")
    folders = [tmp_path / name / "data" for name in ("one", "two")]
    first, second = (ClipKeys(folder)(folder / "videos" / "a.mp4") for folder in folders)
    assert first == second == "data/videos/a.mp4, 5 bytes"
    (folders[1] / "videos" / "a.mp4").write_bytes(b"123456")
    assert ClipKeys(folders[1])(folders[1] / "videos" / "a.mp4") == "data/videos/a.mp4, 6 bytes"
    image = folders[0] / "videos" / "a.mp4"
    assert ClipKeys(folders[0])(image, image) == "data/videos/a.mp4, 5 bytes with videos/a.mp4, 5 bytes"
    member = Member(folders[0] / "0.tar", "b.mp4", 512, 99)
    assert ClipKeys(folders[0])(member) == "data/0.tar/b.mp4, 99 bytes"
    with pytest.raises(InputError, match="cannot be read"):
        ClipKeys(folders[0])(folders[0] / "none.mp4")


def test_keys_of_clips_in_a_table_notice_another_table(tmp_path):
    """It has no sizes of cells."""
    (tmp_path / "set").mkdir()
    cell = Cell(tmp_path / "set", "video", 3, ".mp4")
    for size in (10, 11):
        (tmp_path / "set" / "data.arrow").write_bytes(bytes(size))
        assert ClipKeys(tmp_path / "set")(cell) == f"set/video/3.mp4, {size} bytes"


def test_clips_in_archives_and_tables_that_were_replaced_are_noticed(tmp_path):
    archive, table = tmp_path / "0.tar", {"c": b"three"}
    archive.write_bytes(bytes(512) + b"one" + b"two")
    cell = SimpleNamespace(container=tmp_path, read=lambda: table["c"])
    afar = SimpleNamespace(container=type("Archive", (), {"stamp": "version 1"})())
    members = {key: (Member(archive, f"{key}.mp4", place, 3),) for key, place in (("a", 512), ("b", 515))}
    contents = Contents({**members, "c": (cell,), "d": (afar,)})
    stamps = contents.stamps("abcd")
    assert [*map(bool, stamps.values())] == [True, True, True, False], "an object afar has a version instead"
    os.utime(archive, (1, 1))
    os.utime(tmp_path, (1, 1))
    assert contents.changed(stamps) == [], "a copy"
    archive.write_bytes(bytes(512) + b"one" + b"TWO")
    table["c"] = b"other"
    assert contents.changed(stamps) == ["b", "c"]
    archive.unlink()
    assert contents.changed(stamps) == ["a", "b", "c"] and contents.stamps("a") == {"a": ""}


def test_names_that_are_not_utf_8_are_kept(tmp_path):
    clip = tmp_path / "data" / os.fsdecode(b"a\xff.mp4")
    clip.parent.mkdir()
    clip.write_bytes(b"12345")
    key = ClipKeys(clip.parent)(clip)
    begin(tmp_path, wanted := description(shards=((key, "b"),)))
    write_shard(tmp_path, wanted, 0, [f"{clip} is damaged", tensor("b")])
    cache = CachedTensors(tmp_path, "latents")
    assert cache.description == wanted and "a\\udcff.mp4 is damaged" in cache.failures[key]


def test_a_clip_replaced_while_its_shard_is_encoded_is_a_failure_and_encoded_again(tmp_path):
    clips = {key: (tmp_path / f"{key}.mp4",) for key in KEYS}
    for (path,) in clips.values():
        path.write_bytes(b"old")
    given, folder, contents = description(), tmp_path / "cache", Contents(clips)
    begin(folder, given)

    def encoded(replaced):
        for key in given.shards[0]:
            yield tensor(key)
            if key == replaced:  # read before, or not yet: its file changes while others are encoded
                clips["a"][0].write_bytes(b"new")
                os.utime(clips["a"][0], ns=(1, 1))

    assert given.unfinished(folder, contents=contents), "the run knows the files before it encodes"
    for replaced in given.shards[0]:
        clips["a"][0].write_bytes(b"old")
        failures = write_shard(folder, given, 0, encoded(replaced), contents)
        assert failures == {"a": "its file was replaced while it was encoded"}
        assert read_shard(folder, given, 0, contents).keys() == {*given.shards[0]} - {"a"}
        assert 0 in given.unfinished(folder, contents=Contents(clips))
    assert write_shard(folder, given, 0, encoded(None), contents) == {}
    assert 0 not in given.unfinished(folder, contents=Contents(clips))


def test_a_clip_replaced_by_one_of_the_same_size_is_noticed_and_encoded_again(tmp_path, caplog):
    clips = {key: (tmp_path / f"{key}.mp4",) for key in KEYS}
    for key, (path,) in clips.items():
        path.write_bytes(key.encode() * 300_000)
    given, folder = description(), tmp_path / "cache"
    begin(folder, given)
    for number, shard in enumerate(given.shards):
        write_shard(folder, given, number, map(tensor, shard), Contents(clips))
    os.utime(clips["a"][0], (1, 1))
    CachedTensors(folder, "latents").require_contents(Contents(clips))
    assert given.unfinished(folder, contents=Contents(clips)) == [] and not caplog.messages, "a copy is the same clip"
    content = bytearray(clips["b"][0].read_bytes())
    content[0] ^= 1
    clips["b"][0].write_bytes(content)
    with pytest.raises(InputError, match=r"clips were replaced since their latents .*encodes them again:\n  b$"):
        CachedTensors(folder, "latents").require_contents(Contents(clips))
    assert given.unfinished(folder, contents=Contents(clips)) == [0] and given.unfinished(folder) == []
    assert read_shard(folder, given, 0, Contents(clips)).keys() == {"a"}
    write_shard(folder, given, 0, map(tensor, given.shards[0]), Contents(clips))
    assert given.unfinished(folder, contents=Contents(clips)) == []
    write(folder, given)  # as older versions did
    CachedTensors(folder, "latents").require_contents(Contents(clips))
    assert "do not record what the files of clips held" in caplog.text
