"""What belongs to one browser window: its uploads, and copies of what it is shown, in a folder that is not served."""

import base64
import hashlib
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from sgm.data.clips.pictures import PictureError, read_picture
from sgm.util import InputError

THUMBNAIL = 320  # pixels of the longer side


class Sessions:
    """Private folders by session, all removed with the page."""

    def __init__(self) -> None:
        self._kept = tempfile.TemporaryDirectory(prefix="cogvideox-web-")
        self.root = Path(self._kept.name)

    def folder(self, session: str) -> Path:
        """Return the folder of a session; its name does not depend on what characters the browser has sent."""
        folder = self.root / hashlib.sha256(session.encode()).hexdigest()
        folder.mkdir(exist_ok=True)
        return folder

    def take(self, session: str, upload: str | Path) -> Path:
        """Move an uploaded picture into the folder of its session, so that its address serves it to nobody.

        Raises:
            InputError: it is no picture.
        """
        upload = Path(upload)
        for old in self.folder(session).glob("image*"):
            old.unlink()
        kept = self.folder(session) / f"image{upload.suffix.lower()}"
        shutil.move(upload, kept)
        return _readable(kept, upload.name)

    def keep(self, session: str, picture: Path) -> Path:
        """Keep a copy of a picture in the place of an upload.

        Raises:
            InputError: it is no picture.
        """
        for old in self.folder(session).glob("image*"):
            old.unlink()
        return _readable(Path(shutil.copyfile(picture, self.folder(session) / f"image{picture.suffix}")), picture.name)

    def shown(self, session: str, file: Path) -> str:
        """Return a copy of a file of the given folders, which the page may serve: the folders themselves are not."""
        copy = self.folder(session) / "shown" / file.parent.parent.parent.name / file.parent.parent.name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        return str(copy)

    def image(self, session: str) -> Path | None:
        """Return the picture of a session."""
        return next(self.folder(session).glob("image*"), None)

    def forget(self, session: str) -> None:
        """Remove what a session has uploaded."""
        shutil.rmtree(self.folder(session), ignore_errors=True)

    def close(self) -> None:
        """Remove all folders."""
        self._kept.cleanup()


def _readable(kept: Path, name: str) -> Path:
    """Return a picture that is kept, once it was read; otherwise remove it."""
    try:
        read_picture(str(kept))
    except PictureError as error:
        kept.unlink()
        raise InputError(f"'{name}' cannot be read as a picture: {error}") from error
    return kept


def thumbnail(path: Path) -> str:
    """Return a picture in a small size as the address of an HTML image, with its content."""
    small = Image.fromarray(read_picture(str(path)))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
