"""Make what needs the finished toy: the LoRA of ``make demo``, and the figures of the pages, by the pages' commands.

``tools/toy/make_assets.py --stage land figures`` calls this. Each command is a process of its own; trainings go on
where they were stopped.
"""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import concept

from sgm.log import get_logger
from sgm.util import RunError

logger = get_logger("toy")

LORA = Path("assets/toy_land")
LORA_YAML = ("configs/toy_lora.yaml", "configs/toy_sft.yaml")
SAMPLE = ("sample_video.py", "--base", "configs/toy.yaml", "configs/toy_inference.yaml", "configs/toy_loras.yaml")
# By tools/toy/<name>.py: with the toy as it is, and with what is made or trained first, in a folder.
MEASURED = ("from_video", "held_frames", "inpainting", "inversion", "long_clips", "loops", "low_memory", "timesteps")
IN_A_FOLDER = ("adapters", "control", "masked", "preferences")


def land_training(work: Path) -> list[list[str]]:
    """Return the commands that train the LoRA in the folder `work`."""
    folders = [f"args.train_data=[{work}/clips]", f"args.save={work}/runs", "args.resume=auto"]
    train = ["train_video.py", "--base", *LORA_YAML, "configs/toy_land.yaml", *folders]
    return [["tools/toy/concept.py", "make", f"{work}/clips"], train]


def land_measuring(work: Path, quality: Path) -> Iterator[list[str]]:
    """Yield the commands that measure the shipped LoRA, with what `land_training` has left, into quality.json."""
    for strength in (0, 1):
        words = [f"args.input_file={work}/clips/prompts_72.txt", f"args.loras.0.strength={strength}"]
        yield [*SAMPLE, *words, f"args.output_dir={work}/strength_{strength}", "args.contact_sheet=false"]
    yield ["tools/toy/concept.py", "measure", f"{work}/strength_0", f"{work}/strength_1", "--write", str(quality)]


def figures(out: Path, work: Path) -> Iterator[list[str]]:
    """Yield the commands that write the other figures into the folder `out`."""
    for name in MEASURED:
        yield [f"tools/toy/{name}.py", "--write", f"{out}/{name}.json"]
    for name in IN_A_FOLDER:
        yield [f"tools/toy/{name}.py", f"{work}/{name}", "--write", f"{out}/{name}.json"]


def make_land(work: Path, quality: Path) -> None:
    """Train the LoRA, put it into `LORA` with its prompts, and measure it."""
    for words in land_training(work):
        run(words)
    trained = max((work / "runs").glob("land-*/latest"), key=lambda path: path.stat().st_mtime).parent
    iteration = (trained / "latest").read_text(encoding="utf-8").strip()
    shutil.rmtree(LORA, ignore_errors=True)
    (LORA / iteration).mkdir(parents=True)
    for file in (trained / iteration).glob("mp_rank_00_model_states.*"):
        shutil.copyfile(file, LORA / iteration / file.name)
    shutil.copyfile(trained / "latest", LORA / "latest")
    concept.write_prompts(LORA / "prompts.txt")
    for words in land_measuring(work, quality):
        run(words)


def make_figures(out: Path, work: Path) -> None:
    """Measure everything else."""
    for words in figures(out, work):
        run(words)


def run(words: Sequence[str]) -> None:
    """Run a script of this project.

    Raises:
        RunError: it failed.
    """
    logger.info("python %s", shlex.join(words))
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code:
        raise RunError(f"python {shlex.join(words)} ended with the exit code {code}")
