"""Data sets opened, and digests by which a resumed run notices other captions and files."""

import logging
import os
from types import SimpleNamespace

from sgm.data.rows import Row
from sgm.training.inputs import clips
from sgm.training.inputs.clips import Data, open_folder


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
