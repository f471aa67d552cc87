"""Trainings for the page: the command of one, what ``--check`` says of it, and the curves and samples of its folder."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sgm.config.yaml_files import override
from sgm.project import started_as
from sgm.training.metrics import FILE, quarters_of, read_metrics, smooth
from sgm.web.choices import Model, find_folders
from sgm.web.videos import Video, finished

SCRIPT = "train_video.py"
SAMPLES = "samples"  # folder of a run; in it one for each iteration with an evaluation
SFT = "_sft"  # ends the names of presets of fine-tuning for one kind of model; "sft" is for all
SMOOTH_SHARE = 10  # a curve is averaged over this part of its values


def find_recipes(configs: Path) -> dict[str, Path]:
    """Return the training presets by name: files without a model that say what reads the clips, ``data.target``.

    Files that only add keys to such a preset are none, since a training with them alone cannot begin.
    """
    found = {}
    for path in sorted(configs.glob("*.yaml")):
        try:
            sections = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if not isinstance(sections, dict) or "model" in sections:
            continue
        if isinstance(data := sections.get("data"), dict) and data.get("target"):
            found[path.stem] = path
    return found


def recipe_for(model: str, recipes: Iterable[str]) -> str | None:
    """Return the name of the training preset to begin with: the ``_sft`` of the model's kind, ``sft``, or the first."""
    names = list(recipes)
    own = [name for name in names if name.endswith(SFT) and model.startswith(name.removesuffix(SFT))]
    general = [name for name in names if name == SFT[1:]]
    return next(iter([*own, *general, *names]), None)


def find_data(folders: Sequence[Path]) -> list[Path]:
    """Return the given folders of clips, and the folders in them."""
    return [
        path for folder in folders for path in (folder, *sorted(entry for entry in folder.iterdir() if entry.is_dir()))
    ]


@dataclass(frozen=True)
class Training:
    """A training that is planned.

    Attributes:
        model: to train.
        recipe: file of training settings.
        data: folder of clips.
        presets: files of ``configs/memory``.
    """

    model: Model
    recipe: Path
    data: Path
    presets: Sequence[Path] = ()

    def words(self, *, check: bool = False) -> list[str]:
        """Return its command as words, or that which only checks it."""
        files = map(str, (self.model.file, self.recipe, *self.presets))
        return [
            SCRIPT,
            "--base",
            *files,
            override("args.train_data", [str(self.data)]),
            *(["--check"] if check else []),
        ]

    @property
    def command(self) -> str:
        """Its command, for a terminal."""
        return shlex.join([*started_as(SCRIPT), *self.words()[1:]])


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the folders of trainings, those that wrote last first."""
    return find_folders(folders, FILE)


def curves(run: Path) -> list[list[dict[str, Any]]]:
    """Return the smoothed points of the losses of a run: over all timesteps, then over each quarter of them.

    A point has an iteration, a loss, and the kind ``training`` or ``validation``.
    """
    lines = read_metrics(run / FILE)
    names = quarters_of(lines)
    return [list(_curve(lines, name)) for name in ("loss", *(names.get(quarter, "") for quarter in range(4)))]


def _curve(lines: Sequence[dict[str, Any]], loss: str) -> Iterator[dict[str, Any]]:
    for kind, name in (("training", loss), ("validation", f"validation_{loss}")):
        points = [(line["iteration"], float(line[name])) for line in lines if line.get(name) is not None]
        values = smooth([value for _, value in points], len(points) / SMOOTH_SHARE)
        for (iteration, _), value in zip(points, values, strict=True):
            yield {"iteration": iteration, "loss": value, "kind": kind}


def samples(run: Path) -> list[Video]:
    """Return the sample videos of the evaluations of a run, the newest first, without links to elsewhere."""
    root = run.resolve()
    return finished(run / SAMPLES, lambda path: path.resolve().is_relative_to(root))


def iteration_of(sample: Path, run: Path) -> int | None:
    """Return the iteration of the evaluation that has made a sample of a run; None if its folder names none."""
    folder = sample.relative_to(run / SAMPLES).parts[0]
    return int(folder) if folder.isdecimal() else None
