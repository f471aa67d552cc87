"""Prompts and their images, from a file or the terminal.

Legend: H, W pixels.
"""

import builtins
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgm.data.clips.pictures import PictureError, picture_size, read_picture
from sgm.io import reason_of, require_regular
from sgm.log import control_characters, get_logger
from sgm.modules.encoders.modules import WORDS_CURE, texts_without_words
from sgm.project import shipped
from sgm.util import InputError, default, no_character

log = get_logger(__name__)

IMAGE_SEPARATOR = "@@"
# Common file systems allow 255 bytes; the rest is for the index and a temporary suffix.
MAX_NAME_CHARACTERS, MAX_NAME_BYTES = 120, 200
_CURE = "write it in UTF-8"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        index: number of the prompt, from 0; part of the output folder's name.
        text: the text.
        image: the first frame, for image to video.
        control: the clip to follow, for a network with a control.
        original: what the user wrote, if a language model wrote `text`.
        enhancer: the name of that model.
    """

    index: int
    text: str
    image: Path | None = None
    control: Path | None = None
    original: str | None = None
    enhancer: str | None = None

    @property
    def title(self) -> str:
        """What the user wrote, for the names of folders and on contact sheets."""
        return default(self.original, self.text)


def read_prompts(input_file: str | Path, *, image2video: bool, control: bool = False) -> list[Prompt]:
    """Read a prompt file in UTF-8; see `parse_prompts`. Paths may be relative to the file's folder.

    Raises:
        InputError: the file is unreadable or has no prompts, or lines are malformed.
    """
    file = Path(input_file).expanduser()
    try:
        require_regular(file)
        # Not splitlines, which also splits at characters that are legal in a prompt, such as U+2028.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"prompt file '{file}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(
            f"prompt file '{file}' (args.input_file) cannot be read: {reason_of(error)}; name a text file with one "
            "prompt a line"
        ) from error
    prompts = parse_prompts(lines, image2video=image2video, control=control, source=str(file), folder=file.parent)
    if not prompts:
        raise InputError(f"prompt file '{file}' (args.input_file) holds no prompt; write one prompt a line")
    return prompts


def parse_prompts(
    lines: Sequence[str], *, image2video: bool, source: str, folder: Path | None = None, control: bool = False
) -> list[Prompt]:
    """Parse prompts, one a line; skip blank lines. Images are not opened; see `check_images`.

    Args:
        lines: one prompt each.
        image2video: whether lines are ``prompt@@image``.
        source: origin of the lines, for messages.
        folder: searched for relative paths after the working directory.
        control: whether lines end with ``@@control``, a clip.

    Raises:
        InputError: all malformed lines.
    """
    prompts: list[Prompt] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line:
            continue
        try:
            prompts.append(_parse(line, len(prompts), image2video=image2video, control=control, folder=folder))
        except InputError as error:
            problems.append(f"{source}:{number}: {error}")
        else:
            if marks := control_characters(line):
                log.warning("%s:%d: holds control characters, which text encoders drop: %s", source, number, marks)
    if problems:
        raise InputError("\n".join(problems))
    return prompts


def read_prompts_cli(
    image2video: bool,
    input: Callable[[str], str] | None = None,
    *,
    control: bool = False,
    ready: Callable[[Prompt], Prompt] | None = None,
) -> Iterator[Prompt]:
    """Read prompts from the terminal until an empty line, ``exit`` or the end of input; ask again after a bad line.

    Args:
        image2video: whether to ask for ``prompt@@image``.
        input: shows a question and returns a line; the built-in ``input`` by default.
        control: whether to ask for ``@@control`` too.
        ready: returns a prompt as it is sampled; raises an InputError for one that cannot be.
    """
    ask = input or builtins.input
    files = _files_of(image2video, control)
    form = IMAGE_SEPARATOR.join(["English prompt", *(f"{name} file" for name in files)])
    index = 0
    while True:
        try:
            line = ask(f"{form} (empty or 'exit' to end): ").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            log.error("the line holds bytes that are not UTF-8 text; %s", _CURE)
            continue
        if not line or line == "exit":
            return
        try:
            prompt = _parse(line, index, image2video=image2video, control=control, folder=None)
            check_images([prompt])
            if ready is not None:
                prompt = ready(prompt)
        except InputError as error:
            log.error("%s", error)
            continue
        yield prompt
        index += 1


def check_images(prompts: Sequence[Prompt]) -> None:
    """Decode the images of all prompts, each file once, to find bad ones before the models are loaded.

    Raises:
        InputError: all images that are missing or cannot be decoded.
    """
    problems = []
    for image in dict.fromkeys(prompt.image for prompt in prompts if prompt.image is not None):
        try:
            _read(image)
        except InputError as error:
            users = [prompt.index for prompt in prompts if prompt.image == image]
            problems.append(f"{error} (prompt {', '.join(map(str, users))})")
    if problems:
        raise InputError("\n".join(problems))


def check_words(prompts: Sequence[Prompt], conditioner: Any) -> None:
    """Refuse prompts of which the text encoder's tokenizer knows no word.

    Args:
        prompts: to be encoded.
        conditioner: of the model.

    Raises:
        InputError: all such prompts.
    """
    reasons = texts_without_words(conditioner, [prompt.text for prompt in prompts])
    problems = [f"prompt {p.index}: {reasons[p.text]}; {WORDS_CURE}" for p in prompts if p.text in reasons]
    if problems:
        raise InputError("\n".join(problems))


def load_image(path: str | Path, size: tuple[int, int]) -> torch.Tensor:
    """Read an image, scale it to cover `size` and crop the centre.

    Args:
        path: a picture, see `sgm.data.clips.pictures`.
        size: (H, W) in pixels.

    Returns:
        (3, H, W) float32 in [-1, 1].

    Raises:
        InputError: the image is missing or cannot be decoded.
    """
    from sgm.data.clips.transform import cover_crop  # lazy: slow to import, and unused by text to video

    pixels = torch.from_numpy(_read(Path(path)))
    return cover_crop(pixels.permute(2, 0, 1)[None], size)[0]


def image_size(path: str | Path) -> tuple[int, int]:
    """Return the displayed (H, W) of an image in pixels, from its header (Pillow may decode a PNG file for its EXIF).

    Raises:
        InputError: the image is missing or its header cannot be read.
    """
    with _refusing(Path(path)):
        return picture_size(os.path.abspath(path))


def assign_to_rank(prompts: Sequence[Prompt], rank: int, world_size: int) -> list[Prompt]:
    """Return the prompts of a data-parallel rank: every `world_size`-th, starting at `rank`."""
    return list(prompts[rank::world_size])


def output_folder_name(index: int, text: str) -> str:
    """Return ``{index}_{prompt}``, with the prompt truncated and without characters illegal in some file systems."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r'[<>:"/\\|?*]', "", text)
    text = "".join("_" if c.isspace() else c for c in text if c.isspace() or c.isprintable())
    text = text[:MAX_NAME_CHARACTERS].encode("utf-8", "ignore")[:MAX_NAME_BYTES].decode("utf-8", "ignore")
    # Windows strips dots and spaces at the end of a name.
    return f"{index}_{text}".rstrip("._ ")


def _files_of(image2video: bool, control: bool) -> tuple[str, ...]:
    """Return what a line names after its prompt, in order."""
    return ("image",) * image2video + ("control",) * control


def _parse(line: str, index: int, *, image2video: bool, control: bool, folder: Path | None) -> Prompt:
    if problem := no_character(line):  # also Python's stand-in for what is not UTF-8
        raise InputError(f"the line holds {problem}; {_CURE}")
    parts = [part.strip() for part in line.split(IMAGE_SEPARATOR)]
    files = _files_of(image2video, control)
    if control and (len(parts) != len(files) + 1 or not all(parts)):
        form = IMAGE_SEPARATOR.join(["prompt", *files])
        raise InputError(
            f"'{line.strip()}' is not of the form {form}, which this model needs; write the prompt, then after each "
            f"'{IMAGE_SEPARATOR}' the path of a file: {', '.join(files)}. args.control gives one to all prompts; in "
            "training, args.valid_prompts=null takes captions and controls of the data"
        )
    if control:
        found = [_find_file(part, folder, name) for name, part in zip(files, parts[1:], strict=True)]
        return Prompt(index, parts[0], image=found[0] if image2video else None, control=found[-1])
    if not image2video:
        if len(parts) > 1:
            raise InputError(
                f"'{line.strip()}' names an image ({IMAGE_SEPARATOR}), but this is text to video; set "
                f"image2video: true and use an image-to-video model, or remove '{IMAGE_SEPARATOR}' and the path"
            )
        return Prompt(index, parts[0])
    if len(parts) != 2 or not all(parts):
        raise InputError(
            f"'{line.strip()}' is not of the form prompt{IMAGE_SEPARATOR}image, which image to video needs; write "
            f"the prompt, one '{IMAGE_SEPARATOR}' and the path of an image, or set image2video: false"
        )
    return Prompt(index, parts[0], _find_file(parts[1], folder, "image"))


def _find_file(text: str, folder: Path | None, kind: str) -> Path:
    """Return the path named by `text`, in `folder` if it exists only there; does not check that it exists."""
    try:
        image = Path(text).expanduser()
        if not _exists(image) and folder is not None and _exists(folder / image):
            return folder / image
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"'{text[:60]}' cannot be the path of {'an' if kind == 'image' else 'a'} {kind} ({reason}); the order is "
            f"prompt{IMAGE_SEPARATOR}{kind}"
        ) from error
    return Path(shipped(str(image)))


def _read(path: Path) -> np.ndarray:
    with _refusing(path):
        return read_picture(os.path.abspath(path))


def _exists(path: Path) -> bool:
    """Whether `path` exists; raises for an invalid path, unlike Path.exists in some versions of Python."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Context: a picture that cannot be used becomes an InputError."""
    try:
        yield
    except PictureError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            order = f"correct the path (the order is prompt{IMAGE_SEPARATOR}image)"
            raise InputError(f"image '{path}' does not exist; {order}") from error
        cure = "; use an intact PNG or JPEG file" if error.damaged else ""
        raise InputError(f"image '{path}' cannot be decoded: {error}{cure}") from error
