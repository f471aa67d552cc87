"""Where the project's own files are: the checkout, or what a wheel has installed.

A wheel puts ``configs``, ``assets`` and ``tools`` into the folder ``cogvideox_sat`` beside the package ``sgm``. YAML
files and commands name them relative to the checkout, so that a name means the same in both.
"""

import os
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1]  # of the modules: the checkout, or site-packages
PACKAGED = SOURCES / "cogvideox_sat"  # of a wheel; see setup.py
FOLDERS = ("configs/", "assets/")


def packaged() -> bool:
    """Return whether a wheel has installed the project; otherwise it is a checkout."""
    return PACKAGED.is_dir()


def project() -> Path:
    """Return the folder that holds ``configs``, ``assets`` and ``tools``."""
    return PACKAGED if packaged() else SOURCES


def started_as(script: str) -> list[str]:
    """Return the words with which a user starts a script of the checkout, such as ``train_video.py``."""
    if not packaged():
        return ["python", script]
    return [f"cogvideox-{Path(script).stem.removesuffix('_video').replace('_', '-')}"]


def shipped(path: str) -> str:
    """Return where the file or folder that `path` names is.

    A path that begins with ``configs/`` or ``assets/`` and does not exist in the working directory means the file of
    that name that the wheel has installed, if there is one. A checkout installs nothing: it is used from its folder.
    """
    if not path.startswith(FOLDERS) or not packaged() or os.path.exists(path):
        return path
    there = PACKAGED / path
    return str(there) if there.exists() and ".." not in there.parts else path
