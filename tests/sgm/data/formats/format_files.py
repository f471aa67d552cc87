"""The same clips in every format that is read."""

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

TOY = Path(__file__).parents[4] / "assets" / "toy"
NAMES = [f"{number:06d}" for number in range(12)]
CLIPS = [TOY / "videos" / f"{name}.mp4" for name in NAMES]
CAPTIONS = [(TOY / "labels" / f"{name}.txt").read_text().strip() for name in NAMES]


def records() -> list[dict[str, str]]:
    return [{"caption": text, "video": f"clips/{clip.name}"} for clip, text in zip(CLIPS, CAPTIONS, strict=True)]


def copy_clips(root: Path, folder: str = "clips") -> Path:
    (root / folder).mkdir(parents=True)
    for clip in CLIPS:
        shutil.copy(clip, root / folder)
    return root


def folder(root: Path) -> Path:
    copy_clips(root, "videos")
    (root / "labels").mkdir()
    for name, text in zip(NAMES, CAPTIONS, strict=True):
        (root / "labels" / f"{name}.txt").write_text(text)
    return root


def pairs(root: Path) -> Path:
    copy_clips(root, "all")
    for name, text in zip(NAMES, CAPTIONS, strict=True):
        (root / "all" / f"{name}.txt").write_text(text)
    return root


def lines(root: Path) -> Path:
    copy_clips(root)
    (root / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    (root / "videos.txt").write_text("\n".join(record["video"] for record in records()))
    return root


def csv_file(root: Path) -> Path:
    copy_clips(root)
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["caption", "video"])
        writer.writeheader()
        writer.writerows(records())
    return root


def json_list(root: Path) -> Path:
    copy_clips(root)
    (root / "metadata.json").write_text(json.dumps(records(), indent=1))
    return root


def json_data(root: Path) -> Path:
    copy_clips(root)
    (root / "mine.json").write_text(json.dumps({"name": "toy", "data": records()}))
    return root / "mine.json"


def jsonl(root: Path) -> Path:
    copy_clips(root)
    (root / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    return root


def parquet(root: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    copy_clips(root)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records()), root / "metadata.parquet")
    return root


def archives(root: Path, *, as_json: bool = False) -> Path:
    """Two tar files, six samples each."""
    root.mkdir(exist_ok=True)
    for shard in range(2):
        with tarfile.open(root / f"{shard:03d}.tar", "w") as archive:
            for number in range(6 * shard, 6 * shard + 6):
                archive.add(CLIPS[number], f"{NAMES[number]}.mp4")
                content = json.dumps({"caption": CAPTIONS[number], "fps": 8}) if as_json else CAPTIONS[number]
                entry = tarfile.TarInfo(f"{NAMES[number]}.{'json' if as_json else 'txt'}")
                entry.size = len(content.encode())
                archive.addfile(entry, io.BytesIO(content.encode()))
    return root


def archives_json(root: Path) -> Path:
    return archives(root, as_json=True)


def huggingface_paths(root: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records()).save_to_disk(str(root))
    return copy_clips(root)


def huggingface_bytes(root: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    rows = [
        {"caption": text, "video": {"bytes": clip.read_bytes(), "path": clip.name}}
        for clip, text in zip(CLIPS, CAPTIONS, strict=True)
    ]
    features = datasets.Features({"caption": datasets.Value("string"), "video": datasets.Video(decode=False)})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(root))
    return root


FORMATS: dict[str, Callable[[Path], Path]] = {
    "folder": folder,
    "pairs": pairs,
    "lines": lines,
    "csv": csv_file,
    "json": json_list,
    "json under data": json_data,
    "jsonl": jsonl,
    "parquet": parquet,
    "webdataset": archives,
    "webdataset, json": archives_json,
    "huggingface, paths": huggingface_paths,
    "huggingface, bytes": huggingface_bytes,
}
