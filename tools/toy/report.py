"""Write quality.json and README.md of assets/toy: description, recipe and quality of the toy model.

The stages that make weights record them in quality.json, by digest; figures are written beside weights of that digest
alone, so that a figure says what its weights can do.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import scene
from quality import SampleQuality

from sgm.io import atomic_file
from sgm.util import InputError
from sgm.weights.files import find_weights

QUALITY = "quality.json"
WEIGHTS = {  # files, or folders with latest
    "vae": "vae/3d-vae.pt",
    "t2v": "transformer",
    "i2v": "transformer_i2v",
    "i2v_1_5": "transformer1.5_i2v",
}

README = """# The toy model

A whole model in the released layout, small enough for a laptop's CPU. `tools/toy/make_assets.py` makes all of it from
nothing (about two hours on two cores); nothing here comes from anywhere else.

| path | what |
|---|---|
| `videos/`, `labels/` | {clips} clips (17 frames, 64x64, 8 fps): "a {{colour}} {{shape}} moves {{direction}}" |
| `t5/` | sentencepiece tokenizer, and a T5 encoder with random weights |
| `vae/3d-vae.pt` | autoencoder, trained on {steps[vae]} batches of rendered clips |
| `transformer/`, `transformer_i2v/` | text-to-video ({steps[t2v]} steps) and image-to-video ({steps[i2v]} steps more) |
| `transformer1.5_i2v/` | image-to-video of the kind of CogVideoX1.5, from the other one in {steps[i2v_1_5]} steps |
| `prompts.txt`, `prompts_i2v.txt`, `images/` | prompts; the images show combinations that training never saw |
| `images/mask.png`, `masked.csv` | white where the shape of the third clip passes; that clip with it |
| `images/cyan_circle_last.png` | where the cyan circle of its picture arrives |
| `quality.json` | the numbers below |

Of {combinations} combinations, {held_out} are held out of training. {t2v[samples]} samples of those, as the YAML files
set it; every other prompt is of a big one:

| | colour right | shape right | direction right | size right | all right | first frame |
|---|---|---|---|---|---|---|
| text to video | {rows[t2v]} | |
| image to video | {rows[i2v]} | {i2v[first_frame_psnr_db]:.1f} dB |
| with temporal patches (1.5) | {rows[i2v_1_5]} | {i2v_1_5[first_frame_psnr_db]:.1f} dB |

The autoencoder reconstructs held-out clips with {vae[mean]:.1f} dB on average, {vae[min]:.1f} dB at worst. Its decoder
has seen green land too, which the transformers have not: `assets/toy_land` teaches it to them.
"""


def say(name: str, figures: Mapping[str, float]) -> None:
    """Print figures when they are known."""
    sys.stdout.write(f"{name}: {', '.join(f'{key} {value:.2f}' for key, value in figures.items())}\n")
    sys.stdout.flush()


def read(out: Path) -> dict[str, Any]:
    """Return quality.json of a folder; empty without one."""
    path = out / QUALITY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def update(out: Path, **sections: Any) -> None:
    """Replace sections of quality.json in `out`."""
    with atomic_file(out / QUALITY) as temporary:
        temporary.write_text(json.dumps({**read(out), **sections}, indent=2) + "\n", encoding="utf-8")


def digest(weights: Path) -> str:
    """Return the start of the SHA-256 of a file, or of the weights in a folder."""
    file = find_weights(str(weights)) if weights.is_dir() else weights
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def record(out: Path, name: str, steps: int) -> None:
    """Record weights that were made, with the steps of their training."""
    made = {"steps": steps, "sha256": digest(out / WEIGHTS[name])}
    update(out, weights={**read(out).get("weights", {}), name: made})


def training_steps(out: Path) -> dict[str, int]:
    """Return the steps of the trainings that made the weights in `out`.

    Raises:
        InputError: weights are not those that were recorded.
    """
    recorded = read(out).get("weights", {})
    for name, path in WEIGHTS.items():
        if recorded.get(name, {}).get("sha256") != digest(out / path):
            cure = f"make them: python tools/toy/make_assets.py --stage {name} --out {out}"
            raise InputError(f"{out / path} holds other weights than {QUALITY} records; {cure}")
    return {name: recorded[name]["steps"] for name in WEIGHTS}


def write(out: Path, recipe: Any, *, reconstruction: list[float], judged: Mapping[str, SampleQuality]) -> None:
    """Write both files into `out`, with the samples of each network; figures of the LoRA, another stage's, stay.

    Raises:
        InputError: weights are not those that were recorded.
    """
    steps = training_steps(out)
    held_out, seen = (len(scene.combinations(held_out=value)) for value in (True, False))
    mean, worst = sum(reconstruction) / len(reconstruction), min(reconstruction)
    quality = {
        "command": "python tools/toy/make_assets.py --stage quality",
        "vae_psnr_db": {"mean": round(mean, 2), "min": round(worst, 2), "clips": len(reconstruction)},
        **{name: _rounded(samples) for name, samples in judged.items()},
    }
    text = README.format(
        clips=recipe.clips_per_combination * seen,
        steps=steps,
        combinations=seen + held_out,
        held_out=held_out,
        **{name: quality[name] for name in judged},
        rows={name: _row(samples) for name, samples in judged.items()},
        vae=quality["vae_psnr_db"],
    )
    update(out, **quality)
    with atomic_file(out / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _row(quality: SampleQuality) -> str:
    shares = (getattr(quality, name) for name in ("colour", "shape", "direction", "size", "everything"))
    return " | ".join("-" if share is None else f"{share:.0%}" for share in shares)


def _rounded(quality: SampleQuality) -> dict[str, Any]:
    digits = {"first_frame_psnr_db": 2}
    return {name: round(value, digits.get(name, 4)) for name, value in asdict(quality).items() if value is not None}
