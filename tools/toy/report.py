"""Write quality.json and README.md of assets/toy: description, recipe and quality of the toy model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import scene
from quality import SampleQuality

from sgm.io import atomic_file

README = """# The toy model

A whole model in the released layout, small enough for a laptop's CPU. `tools/toy/make_assets.py` makes all of it from
nothing (about an hour and a half on two cores); nothing here comes from anywhere else.

| path | what |
|---|---|
| `videos/`, `labels/` | {clips} clips (17 frames, 64x64, 8 fps): "a {{colour}} {{shape}} moves {{direction}}" |
| `t5/` | sentencepiece tokenizer, and a T5 encoder with random weights |
| `vae/3d-vae.pt` | autoencoder, trained on {steps[vae]} batches of rendered clips |
| `transformer/`, `transformer_i2v/` | text-to-video ({steps[t2v]} steps) and image-to-video ({steps[i2v]} steps more) |
| `prompts.txt`, `prompts_i2v.txt`, `images/` | prompts; the images show combinations that training never saw |
| `images/mask.png`, `masked.csv` | white where the shape of the third clip passes; that clip with it |
| `images/cyan_circle_last.png` | where the cyan circle of its picture arrives |
| `quality.json` | the numbers below |

Of {combinations} combinations, {held_out} are held out of training. {t2v[samples]} samples of those, as the YAML files
set it; every other prompt is of a big one:

| | colour right | shape right | direction right | size right | all right | first frame |
|---|---|---|---|---|---|---|
| text to video | {text} | |
| image to video | {image} | {i2v[first_frame_psnr_db]:.1f} dB |

The autoencoder reconstructs held-out clips with {vae[mean]:.1f} dB on average, {vae[min]:.1f} dB at worst.
"""


def write(out: Path, recipe: Any, *, reconstruction: list[float], t2v: SampleQuality, i2v: SampleQuality) -> None:
    """Write both files into `out`."""
    held_out, seen = (len(scene.combinations(held_out=value)) for value in (True, False))
    mean, worst = sum(reconstruction) / len(reconstruction), min(reconstruction)
    quality = {
        "command": "python tools/toy/make_assets.py --stage quality",
        "training_steps": {"vae": recipe.vae.num_steps, "t2v": recipe.t2v.num_steps, "i2v": recipe.i2v.num_steps},
        "vae_psnr_db": {"mean": round(mean, 2), "min": round(worst, 2), "clips": len(reconstruction)},
        "t2v": _rounded(t2v),
        "i2v": _rounded(i2v),
    }
    text = README.format(
        clips=recipe.clips_per_combination * seen,
        steps=quality["training_steps"],
        combinations=seen + held_out,
        held_out=held_out,
        t2v=quality["t2v"],
        i2v=quality["i2v"],
        text=_row(t2v),
        image=_row(i2v),
        vae=quality["vae_psnr_db"],
    )
    for name, content in (("quality.json", json.dumps(quality, indent=2) + "\n"), ("README.md", text)):
        with atomic_file(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


def _row(quality: SampleQuality) -> str:
    shares = (getattr(quality, name) for name in ("colour", "shape", "direction", "size", "everything"))
    return " | ".join("-" if share is None else f"{share:.0%}" for share in shares)


def _rounded(quality: SampleQuality) -> dict[str, Any]:
    digits = {"first_frame_psnr_db": 2}
    return {name: round(value, digits.get(name, 4)) for name, value in asdict(quality).items() if value is not None}
