"""Print the tables of docs/scaling.md: what the model of step times says of 8 to 1,024 cards, by model and mesh.

Run from the project's folder:
    python tools/scaling_table.py
    python tools/scaling_table.py --write docs/scaling.md

Modelled by `sgm.checks.scaling` for the shipped model files and configs/sft.yaml, without evaluations; not measured.
Takes some minutes.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sgm.checks.meta_run import build
from sgm.checks.scaling.cards import CARDS, DEFAULT, Card
from sgm.checks.scaling.recommend import Choice, Planner, best
from sgm.config.load import load_config
from sgm.distributed import Mesh
from sgm.training.optim.trainable import choose_trainable
from sgm.util import PRECISIONS, InputError, prepare_import

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS: dict[str, tuple[str, ...]] = {
    "2B": ("cogvideox_2b",),
    "5B": ("cogvideox_5b",),
    "5B-I2V": ("cogvideox_5b_i2v",),
    "1.5-5B": ("cogvideox1.5_5b",),
    "1.5-5B-I2V": ("cogvideox1.5_5b_i2v", "data.params.video_size=[768,1360]"),
}
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
MARKS = "<!-- {}: written by tools/scaling_table.py -->\n", "\n<!-- end of {} -->"
AXES = {"tensor": "layers", "sequence": "tokens"}


@dataclass(frozen=True)
class Column:
    """A model on a number of devices.

    Attributes:
        devices: their number.
        meshes: mesh → its best setup; None if none fits.
        cached: the best one of all, with clips and captions from caches.
    """

    devices: int
    meshes: dict[Mesh, Choice | None]
    cached: Choice | None

    @property
    def best(self) -> Choice | None:
        """The best setup of all meshes."""
        return best([choice for choice in self.meshes.values() if choice is not None])


def column(model: str, devices: int, *, alone: bool = False) -> Column:
    """Return the predictions for a model; `alone`, of the mesh of one rank."""
    os.environ["WORLD_SIZE"] = str(devices)  # as a launcher sets it
    name, *settings = MODELS[model]
    settings += ["args.eval_interval=null", "args.eval_batch_size=null"]
    config = load_config([CONFIGS / f"{name}.yaml", CONFIGS / "sft.yaml"], settings, mode="train")
    trained = choose_trainable(build(config.model["network_config"]), config.model).names
    given = config, PRECISIONS[config.model["precision"]], trained, CARDS[DEFAULT]
    planner = Planner(*given)
    meshes = [mesh for mesh in planner.meshes() if mesh.ranks == 1 or not (alone or 1 < mesh.tensor < mesh.ranks)]
    found = {mesh: best(planner.of_mesh(mesh)) for mesh in meshes}
    return Column(devices, found, best(Planner(*given, vae=False, text_encoder=False).of_mesh(Mesh())))


def mesh_text(mesh: Mesh) -> str:
    """Return what is shared among how many ranks."""
    parts = [f"{words} by {size}" for axis, words in AXES.items() if (size := getattr(mesh, axis)) > 1]
    return ", ".join(parts) or "none"


def best_row(model: str, found: Column, first: Column) -> str:
    """Return a line of the table of the best setups; `first` has the fewest devices."""
    choice, few = found.best, first.best
    if choice is None or few is None:
        return f"| {model} | {found.devices} | nothing fits | | | | | | | |"
    setup, predicted = choice.setup, choice.prediction
    linear = choice.speed / few.speed * first.devices / found.devices
    limit, share = next(iter(predicted.limits.items()))
    cached = "" if found.cached is None else f"{found.cached.speed:.3g}"
    cells = [
        model,
        str(found.devices),
        f"{mesh_text(setup.mesh)}; {setup.stage}; {setup.micro_batch}",
        f"{predicted.estimate.peak / 2**30:.0f}",
        f"{predicted.step:.3g}",
        f"{choice.speed:.3g}",
        f"{predicted.utilization or 0:.0%}",
        f"{linear:.0%}",
        f"{limit} {share:.0%}",
        cached,
    ]
    return f"| {' | '.join(cells)} |"


Columns = Mapping[str, Sequence[Column]]


def best_table(columns: Columns) -> Iterator[str]:
    """Yield the lines of the table of the best setups."""
    yield (
        "| model | cards | shared; ZeRO; micro batch | GiB | s an iteration | samples/s | MFU | of linear | limit | "
        "samples/s from caches |"
    )
    yield "|" + "---|" * 10
    for model, found in columns.items():
        yield from (best_row(model, each, found[0]) for each in found)


def mesh_table(columns: Columns) -> Iterator[str]:
    """Yield the lines of the table of all meshes."""
    yield f"| model | shared | {' | '.join(map(str, DEVICES))} |"
    yield "|" + "---|" * (2 + len(DEVICES))
    for model, found in columns.items():
        for mesh in found[0].meshes:
            choices = [each.meshes.get(mesh) for each in found]
            speeds = ["–" if choice is None else f"{choice.speed:.3g}" for choice in choices]
            yield f"| {model} | {mesh_text(mesh)} | {' | '.join(speeds)} |"


def assumptions() -> Iterator[str]:
    """Yield the lines of the table of the known cards."""
    cards = CARDS.values()
    yield f"| figure | {' | '.join(card.name for card in cards)} |"
    yield "|" + "---|" * (1 + len(cards))
    for each in fields(Card):
        if each.name != "name":
            yield f"| `{each.name}` | {' | '.join(_text(getattr(card, each.name)) for card in cards)} |"


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.3g}".replace("e+", "e")


def put_into(page: str, name: str, lines: Iterable[str]) -> str:
    """Return a page with the table between the marks of a name replaced.

    Raises:
        InputError: a mark is missing or repeated.
    """
    start, end = (mark.format(name) for mark in MARKS)
    if page.count(start) != 1 or page.count(end) != 1:
        raise InputError(f"the page must hold the lines '{start.strip()}' and '{end.strip()}', each once")
    before, _, rest = page.partition(start)
    return "".join([before, start, "\n", "\n".join(lines), "\n", end, rest.partition(end)[2]])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or write them into a page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables in this file")
    options = parser.parse_args(argv)
    prepare_import()
    makers = {"cards": lambda _: assumptions(), "best": best_table, "meshes": mesh_table}
    try:
        page = None if options.write is None else options.write.read_text(encoding="utf-8")
        for name in makers if page is not None else ():
            put_into(page or "", name, ())  # before the work
        columns = {model: [column(model, devices) for devices in DEVICES] for model in MODELS}
        for name, make in makers.items():
            lines = list(make(columns))
            if page is None:
                sys.stdout.writelines(f"{line}\n" for line in [*lines, ""])
            else:
                page = put_into(page, name, lines)
        if page is not None:
            options.write.write_text(page, encoding="utf-8")
    except (InputError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
