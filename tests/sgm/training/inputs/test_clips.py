"""Data sets opened, and digests by which a resumed run notices other captions and files."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.data import Subset

from sgm.data.order import split_indices
from sgm.data.rows import Row
from sgm.training.inputs import clips
from sgm.training.inputs.clips import Data, Split, open_folder
from sgm.util import InputError


class Clips:
    def __init__(self, rows):
        self.rows = rows

    @property
    def captions(self):
        return [row.caption for row in self.rows]


def test_a_rewritten_caption_and_a_replaced_clip_are_noticed(tmp_path):
    paths = [tmp_path / name for name in ("a.mp4", "b.mp4", "b.png")]
    for path in paths:
        path.write_bytes(b"1234")
        os.utime(path, (1, 1))
    data = Data((Clips([Row(paths[0], "one"), Row(paths[1], "two", image=paths[2])]),), ())
    captions, files = data.captions_digest, data.files_digest
    assert (data.captions_digest, data.files_digest) == (captions, files)
    data.train[0].rows[0] = Row(paths[0], "other")
    assert data.captions_digest != captions and data.files_digest == files
    for index, (content, when) in enumerate([(b"12345", 1), (b"1234", 2), (b"12", 1)]):
        paths[index].write_bytes(content)
        os.utime(paths[index], (when, when))
        assert data.files_digest != files
        files = data.files_digest
    paths[1].unlink()
    assert data.files_digest != files


def test_control_characters_in_captions_are_mentioned(monkeypatch, caplog):
    rows = Clips([Row(None, caption) for caption in ("one", "a \x1b[31mred ball", "\x07")])
    monkeypatch.setattr(clips, "instantiate_from_config", lambda *_, **__: rows)
    with caplog.at_level(logging.WARNING, logger="sgm"):
        args, model = SimpleNamespace(allow_unknown_text=True), {"network_config": {}}
        open_folder(SimpleNamespace(data={"target": "x"}, args=args, model=model), "videos")
    (message,) = caplog.messages
    assert message.startswith("videos: 2 captions hold control characters") and message.endswith("a \x1b[31mred ball")


class Named(Clips):
    """A data set of paths."""

    def __init__(self, paths):
        self.paths = [str(path) for path in paths]

    def __len__(self):
        return len(self.paths)

    def select(self, indices):
        return Named([self.paths[index] for index in indices])


def halves(*pools) -> Split:
    return Split(pools, pools, lambda index, num: split_indices(num, "1,1", seed=index))


def test_a_clip_of_two_data_sets_is_not_trained_on_where_one_of_them_validates_it(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "clips")
    names = [f"{number}.mp4" for number in range(20)]
    pools = [Named(folder / name for name in names) for folder in (tmp_path / "clips", tmp_path / "link")]
    data = halves(*pools).data()
    trained, validated = (
        {Path(path).name for each in sets for path in each.paths} for sets in (data.train, data.valid)
    )
    assert trained and validated and not trained & validated and trained | validated == {*names}
    assert halves(pools[0]).data().train[0].paths == [pools[0].paths[i] for i in split_indices(20, "1,1", seed=0)[0]]
    only = split_indices(20, "1,1", seed=0)[1][0]
    with pytest.raises(InputError, match="entry 2 of args.train_data has no clip to train on"):
        halves(pools[0], pools[1].select([only])).data()


def test_data_sets_without_paths_are_divided_alone():
    data = halves([*range(4)], [*range(4)]).data()
    assert all(isinstance(each, Subset) and len(each) == 2 for each in (*data.train, *data.valid))


def test_training_clips_among_those_of_valid_data_are_mentioned(monkeypatch, caplog):
    opened = {"a": Named(["a/0.mp4", "a/1.mp4"]), "b": Named(["./a/1.mp4", "b/0.mp4"])}
    monkeypatch.setattr(clips, "open_folder", lambda _, folder: opened[folder])
    args = clips.TrainingArgs(train_data=("a",), valid_data=("b",), load="weights", train_iters=1)
    with caplog.at_level(logging.WARNING, logger="sgm"):
        clips.open_data(SimpleNamespace(args=args))
    assert caplog.messages == ["1 clips of args.valid_data are trained on too: their loss says nothing of others"]
