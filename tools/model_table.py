"""Print the README's table of models from the model files; ``--write`` puts it into a document.

    python tools/model_table.py --write README.md

A test compares the table with the one in the README.
"""

import argparse
import re
import sys
from pathlib import Path

from sgm.checks.sampling_plan import check_sampling
from sgm.config.load import Config, load_config
from sgm.modules.geometry import Geometry
from sgm.util import InputError, instantiate_from_config, without_allocating

CONFIGS = Path(__file__).parents[1] / "configs"
START, END = "<!-- models: written by tools/model_table.py -->", "<!-- /models -->"

_COLUMNS = ("configuration", "input", "precision", "parameters", "weights", "frames", "fps", "size", "other sizes")
_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


def model_files() -> list[Path]:
    """Return the shipped model configurations: those with all of a model."""
    found = [path for path in CONFIGS.glob("*.yaml") if "denoiser_config:" in path.read_text(encoding="utf-8")]
    return sorted(found, key=lambda path: (path.stem.startswith("toy"), "1.5" in path.stem, path.stem))


def model_table() -> str:
    """Return the table in Markdown, a row for every shipped model configuration."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for path in model_files():
        config = load_config([path], ["args.input_type=cli"], mode="inference")
        lines.append(f"| {' | '.join(_row(path, config))} |")
    return "\n".join(lines)


def _row(path: Path, config: Config) -> list[str]:
    geometry = Geometry.from_network(config.model["network_config"]["params"])
    plan = check_sampling(config.args, geometry)
    trained, adapters = count_parameters(config)
    precision = config.model["precision"]
    size = "the image's shape" if plan.size is None else f"{plan.size[0]}×{plan.size[1]}"
    steps, most = geometry.size_steps, geometry.max_size
    return [
        f"[{path.stem}](configs/{path.name})",
        "image and text" if plan.image2video else "text",
        precision,
        _count(trained) + (f" + {_count(adapters)} LoRA" if adapters else ""),
        _size((trained + adapters) * _BYTES[precision]),
        f"{plan.video_frames} ({plan.latents} latent)",
        str(plan.fps),
        size,
        "none" if geometry.fixed_size else f"multiples of {steps[0]} up to {most[0]}×{most[1]}",
    ]


def count_parameters(config: Config) -> tuple[int, int]:
    """Count the trainable parameters of a network and of its adapters."""
    with without_allocating():
        network = instantiate_from_config(config.model["network_config"])
    adapters = sum(p.numel() for name, p in network.named_parameters() if ".matrix_" in name)
    return sum(p.numel() for p in network.parameters() if p.requires_grad) - adapters, adapters


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def put_into(document: str, table: str) -> str:
    """Return `document` with `table` between the two markers.

    Raises:
        InputError: a marker is missing or repeated.
    """
    if document.count(START) != 1 or document.count(END) != 1:
        raise InputError(f"the document must hold the lines '{START}' and '{END}', each once")
    return re.sub(
        f"{re.escape(START)}.*{re.escape(END)}", lambda _: f"{START}\n{table}\n{END}", document, flags=re.DOTALL
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="replace the table between the markers in it")
    options = parser.parse_args(argv)
    table = model_table()
    if options.write is None:
        sys.stdout.write(table + "\n")
        return 0
    try:
        options.write.write_text(put_into(options.write.read_text(encoding="utf-8"), table), encoding="utf-8")
    except (InputError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
