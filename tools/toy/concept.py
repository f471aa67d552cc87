"""Make and measure a concept that the toy models do not know: ``make demo`` teaches green land under the shapes.

    python tools/toy/concept.py make outputs/land/clips
    python tools/toy/concept.py measure outputs/land/strength_0 outputs/land/strength_1

``make`` writes 48 clips with land and thirty without, with captions, and prompts for combinations that the clips do
not show: for the demo, and more to measure with. The clips without land are what the model knows already: they keep
it from putting land under everything, and from changing colours and shapes. ``measure`` prints the share of land in
samples from before and after training, and the shares of them whose colour and shape are as prompted; exit code 1 if
land was not learned. The figures of the shipped LoRA are those of the 72 prompts::

    python tools/toy/make_assets.py --stage land
"""

import argparse
import itertools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scene

from sgm.inference.video import read_video, write_video
from sgm.io import atomic_file, parse_json
from sgm.util import InputError, RunError

WORDS = " on land"
LAND = (0.15, 1.0, 0.20)  # brighter than a green shape
HEIGHT = scene.LAND_HEIGHT
_ALL = tuple(itertools.product(scene.COLOURS, scene.SHAPES, scene.DIRECTIONS))
_SEEN_ON_LAND = tuple(names for names in _ALL if names[0] != "green")  # a green shape does not stand out from land
# Two fifths of them, and a fifth of all, evenly over colours, shapes and directions; each twice, in lanes drawn for it.
CLIPS = tuple(names for i, names in enumerate(_SEEN_ON_LAND) if i % 5 in (0, 3)) * 2
ORDINARY = tuple(names for i, names in enumerate(_ALL) if i % 5 == 1) * 2
PROMPTS = (
    ("red", "square", "left"),
    ("blue", "triangle", "up"),
    ("magenta", "square", "right"),
    ("cyan", "triangle", "down"),
)
UNRELATED = ("yellow", "circle", "right")  # a prompt without land, which must stay without
LORA = Path("assets/toy_land")  # the shipped one
COMMAND = "python tools/toy/make_assets.py --stage land"
LEARNED, UNKNOWN = 0.5, 0.1  # fraction of land on the ground: minimum after training, maximum before


@dataclass(frozen=True)
class Shares:
    """What the samples of a run show: land on the ground with and without the words; colours and shapes as prompted.

    Attributes:
        land: share of the ground with land, where it was asked for.
        unasked: the same where it was not; None without such prompts.
        clips_with_land: share of the clips with land on half of the ground or more, of those asked for it.
        clips_without: share of the clips with hardly any, of those not asked for it; None without such prompts.
        colour: share of all clips with the colour of the prompt.
        shape: share of all clips with its shape.
        samples: clips.
    """

    land: float
    unasked: float | None
    clips_with_land: float
    clips_without: float | None
    colour: float
    shape: float
    samples: int


def render(combination: tuple[str, str, str], rng: np.random.Generator) -> np.ndarray:
    """Render a shape that moves above land, or partly behind it: (T, H, W, C) float32 in [0, 1]."""
    return scene.with_land(scene.render(scene.random_clip(combination, rng)), LAND)


def land_share(video: np.ndarray) -> float:
    """Return the share of the ground of `video` (T, H, W, C) in [0, 1] that looks like land."""
    return float((np.linalg.norm(video[:, -HEIGHT:] - np.asarray(LAND), axis=-1) < 0.4).mean())


def above(video: np.ndarray) -> np.ndarray:
    """Return the frames of `video` (T, H, W, C) in which nothing touches the ground, without it; all frames if few."""
    nothing_below = np.abs(video[:, -HEIGHT - 2] - scene.BACKGROUND).max(axis=(1, 2)) < 0.3
    frames = video[nothing_below] if nothing_below.sum() >= 4 else video
    frames = frames.copy()
    frames[:, -HEIGHT - 1 :] = scene.BACKGROUND
    return frames


def make(folder: Path) -> None:
    """Write ``videos/``, ``labels/``, ``prompts.txt`` and ``prompts_72.txt`` into `folder`, deterministically."""
    rng = np.random.default_rng(0)
    clips = [(names, WORDS, render(names, rng)) for names in CLIPS]
    clips += [(names, "", scene.render(scene.random_clip(names, rng))) for names in ORDINARY]
    for number, (names, words, video) in enumerate(clips):
        frames = (video * 255).round().astype(np.uint8)
        write_video(folder / "videos" / f"{number:02d}.mp4", frames, scene.FPS, crf=10)
        _write(folder / "labels" / f"{number:02d}.txt", [scene.caption(*names) + words])
    write_prompts(folder / "prompts.txt")
    others = scene.combinations(held_out=True) + scene.combinations(held_out=False)
    with_land = [names for names in others if names in _SEEN_ON_LAND and names not in CLIPS]
    without = [names for names in others if names not in ORDINARY][: len(with_land)]
    _write(
        folder / "prompts_72.txt",
        [scene.caption(*names) + WORDS for names in with_land] + [scene.caption(*names) for names in without],
    )


def write_prompts(path: Path) -> None:
    """Write the prompts of the demo: some with land, and one without."""
    _write(path, [scene.caption(*n) + WORDS for n in PROMPTS] + [scene.caption(*UNRELATED)])


def _write(path: Path, lines: list[str]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def measure(folder: Path) -> Shares:
    """Return what the samples of the run that wrote `folder` show."""
    videos = sorted(folder.glob("*/*/000000.mp4"))
    if not videos:
        raise InputError(f"there is no video below {folder}; give the args.output_dir of a sampling run")
    land: dict[bool, list[float]] = {True: [], False: []}
    right = []
    for path in videos:
        prompt, video = parse_json(path.with_suffix(".json").read_bytes())["prompt"], read_video(path) / 255
        land[prompt.endswith(WORDS)].append(land_share(video))
        measured = scene.measure(above(video))
        right.append([f" {word} " in prompt for word in (measured.colour, measured.shape)])
    if not land[True]:
        raise InputError(f"no prompt of {folder} ends with '{WORDS.strip()}'; sample those of {Path('prompts.txt')}")
    colour, shape = np.mean(right, axis=0)
    asked, unasked = np.array(land[True]), np.array(land[False])
    return Shares(
        land=float(asked.mean()),
        unasked=float(unasked.mean()) if len(unasked) else None,
        clips_with_land=float((asked >= LEARNED).mean()),
        clips_without=float((unasked <= UNKNOWN).mean()) if len(unasked) else None,
        colour=float(colour),
        shape=float(shape),
        samples=len(videos),
    )


def write(quality: Path, before: Shares, after: Shares) -> None:
    """Write the figures of the shipped LoRA into quality.json, with the digest of its weights."""
    import report  # lazy: the demo needs none of it

    made = {"steps": int((LORA / "latest").read_text(encoding="utf-8")), "sha256": report.digest(LORA)}
    shares = {name: asdict(found) for name, found in (("before", before), ("after", after))}
    rounded = {
        name: {key: value if value is None else round(value, 4) for key, value in found.items()}
        for name, found in shares.items()
    }
    report.update(quality.parent, land={"command": COMMAND, **made, **rounded})


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make", help="write the clips").add_argument("folder", type=Path)
    measuring = commands.add_parser("measure", help="look for land in samples")
    measuring.add_argument("before", type=Path, help="output folder of the run with the base model")
    measuring.add_argument("after", type=Path, help="output folder of the run with the adapters")
    measuring.add_argument("--write", type=Path, metavar="FILE", help="quality.json, for the shipped LoRA's figures")
    options = parser.parse_args(argv)
    try:
        if options.command == "make":
            make(options.folder)
            sys.stdout.write(f"{len(CLIPS)} clips with land, {len(ORDINARY)} without: {options.folder}\n")
            return 0
        before, after = measure(options.before), measure(options.after)
    except (InputError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(
        f"land on {before.land:.0%} of the ground before, {after.land:.0%} after; "
        f"colours right in {before.colour:.0%}, {after.colour:.0%}; shapes in {before.shape:.0%}, {after.shape:.0%}"
        f" of {after.samples} samples\n"
        f"clips with land on half of the ground, of those asked for it: {after.clips_with_land:.0%}\n"
    )
    if after.unasked is not None:
        sys.stdout.write(f"where no land was asked for: {after.unasked:.0%}\n")
    if options.write is not None:
        write(options.write, before, after)
    return 0 if before.land <= UNKNOWN and after.land >= LEARNED else 1


if __name__ == "__main__":
    sys.exit(main())
