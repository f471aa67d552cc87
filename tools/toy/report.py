"""quality.json and README.md of assets/toy: what the toy model is, how it was made, and how good it is."""

import json
from pathlib import Path
from typing import Any

import scene
from quality import SampleQuality

from sgm.io import atomic_file

README = """# The toy model

A whole model in the released layout, small enough for a laptop's CPU. `tools/toy/make_assets.py` makes all of it from
nothing (under an hour on two cores); nothing here comes from anywhere else.

| path | what |
|---|---|
| `videos/`, `labels/` | {clips} clips (17 frames, 64x64, 8 fps): "a {{colour}} {{shape}} moves {{direction}}" |
| `t5/` | sentencepiece tokenizer, and a T5 encoder with random weights |
| `vae/3d-vae.pt` | autoencoder, trained on {vae_steps} batches of rendered clips |
| `transformer/`, `transformer_i2v/` | text-to-video ({t2v_steps} steps) and image-to-video ({i2v_steps} steps more) |
| `prompts.txt`, `prompts_i2v.txt`, `images/` | prompts; the images show combinations that training never saw |
| `quality.json` | the numbers below |

Of {combinations} combinations, {held_out} are held out of training. Samples of those, as the YAML files set it:

| | colour right | shape right | direction right | first frame |
|---|---|---|---|---|
| text to video | {t2v[colour]:.0%} | {t2v[shape]:.0%} | {t2v[direction]:.0%} | |
| image to video | {i2v[colour]:.0%} | {i2v[shape]:.0%} | {i2v[direction]:.0%} | {i2v[first_frame_psnr_db]:.1f} dB |

The autoencoder reconstructs held-out clips with {psnr:.1f} dB on average, {psnr_min:.1f} dB at worst.
"""


def write(out: Path, recipe: Any, *, reconstruction: list[float], t2v: SampleQuality, i2v: SampleQuality) -> None:
    """Write both files into `out`."""
    held_out = len(scene.combinations(held_out=True))
    seen = len(scene.combinations(held_out=False))
    steps = {
        "vae": recipe.vae.crop_steps + recipe.vae.full_steps,
        "t2v": recipe.t2v.num_steps,
        "i2v": recipe.i2v.num_steps,
    }
    mean, worst = sum(reconstruction) / len(reconstruction), min(reconstruction)
    quality = {
        "training_steps": steps,
        "vae_psnr_db": {"mean": round(mean, 2), "min": round(worst, 2), "clips": len(reconstruction)},
        "t2v": t2v.as_dict(),
        "i2v": i2v.as_dict(),
    }
    text = README.format(
        clips=recipe.clips_per_combination * seen,
        vae_steps=steps["vae"],
        t2v_steps=steps["t2v"],
        i2v_steps=steps["i2v"],
        combinations=seen + held_out,
        held_out=held_out,
        t2v=t2v.as_dict(),
        i2v=i2v.as_dict(),
        psnr=mean,
        psnr_min=worst,
    )
    for name, content in (("quality.json", json.dumps(quality, indent=2) + "\n"), ("README.md", text)):
        with atomic_file(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
