"""Make the toy model of assets/toy from nothing: clips, text encoder, autoencoder, three diffusion transformers.

Run from the root of the repository; about two hours on two CPU cores that compute in bfloat16::

    python tools/toy/make_assets.py                    everything: assets/toy, the LoRA assets/toy_land, all figures
    python tools/toy/make_assets.py --stage quality    measure what is there
    python tools/toy/make_assets.py --fast --out outputs/toy_fast    a few steps of everything, to see that it runs

configs/toy.yaml, toy_i2v.yaml and toy1.5_i2v.yaml give the architecture. A stage depends on the seed and on the files
that earlier stages have written into the output folder, so it can be repeated alone. Trainings write their state into
``work`` in that folder every minute; the same command again goes on from there, and removes it when all is made. The
stages ``land`` and ``figures`` use the model files as they are, so they need the default folder.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import figures
import numpy as np
import quality
import report
import scene
import text
import torch
import training
from PIL import Image

from sgm.config.load import load_config
from sgm.inference.video import write_video
from sgm.io import atomic_file
from sgm.log import configure_logging, get_logger
from sgm.util import instantiate_from_config
from sgm.weights.checkpoint import save_autoencoder, save_network

logger = get_logger("toy")

T2V, I2V, I2V_1_5 = "configs/toy.yaml", "configs/toy_i2v.yaml", "configs/toy1.5_i2v.yaml"
OUT = Path("assets/toy")
NETWORKS = {"t2v": T2V, "i2v": I2V, "i2v_1_5": I2V_1_5}
STAGES = ("clips", "text", "vae", *NETWORKS, "quality", "land", "figures")
OF_THE_FILES = ("land", "figures")  # stages that take the weights that configs/toy.yaml and its neighbours name
# Prompts of the demo: four held-out combinations, each also with an image, and two that training sees, one with a size.
UNSEEN = (
    ("red", "square", "up"),
    ("green", "triangle", "down"),
    ("yellow", "square", "right"),
    ("cyan", "circle", "left"),
)
SEEN = (("blue", "square", "down"), ("magenta", "circle", "up", "big"))
MEASURED = 2000  # seed of the clips and samples of quality.json; while the recipe was chosen, others were looked at
MASKED = 2  # the clip for which images/mask.png is
WORK = "work"  # folder of the states of trainings
NUM_THREADS = 1  # of torch, in each worker of training; part of the recipe: with another number, sums round differently


@dataclass(frozen=True)
class Recipe:
    """All sizes of one run.

    Attributes:
        clips_per_combination: committed clips of each training combination.
        vae: training of the autoencoder.
        encoded_clips: clips to train the transformers on, evenly from all of `scene.lattice`; None for all.
        t2v: training of the text-to-video transformer.
        i2v: training of the image-to-video transformer, from the weights of the first one.
        i2v_1_5: training of that of the kind of CogVideoX1.5, from the weights of the second one.
        samples: held-out clips to measure the autoencoder and each transformer on.
        num_steps: sampling steps of those samples; None for the number in the YAML.
    """

    clips_per_combination: int = 1
    vae: training.VaeRecipe = field(default_factory=training.VaeRecipe)
    encoded_clips: int | None = None
    t2v: training.NetworkRecipe = field(default_factory=training.NetworkRecipe)
    i2v: training.NetworkRecipe = field(
        default_factory=lambda: training.NetworkRecipe(num_steps=1200, lr=1e-3, matrix_lr=1.5e-3)
    )
    i2v_1_5: training.NetworkRecipe = field(
        default_factory=lambda: training.NetworkRecipe(num_steps=4000, lr=2e-3, matrix_lr=3e-3)
    )
    samples: int = 72
    num_steps: int | None = None

    def shortened(self) -> "Recipe":
        """Return a recipe that runs all code in seconds."""
        return replace(
            self,
            vae=replace(self.vae, cycles=_one_step_each(self.vae.cycles), crop_batch=1),
            encoded_clips=8,
            t2v=replace(self.t2v, num_steps=3, batch_size=4, compiled=False),
            i2v=replace(self.i2v, num_steps=3, batch_size=4, compiled=False),
            i2v_1_5=replace(self.i2v_1_5, num_steps=3, batch_size=4, compiled=False),
            samples=1,
            num_steps=3,
        )


def _one_step_each(cycles: tuple[training.VaeCycle, ...]) -> tuple[training.VaeCycle, ...]:
    return tuple(replace(cycle, crop_steps=1, full_steps=1, full_batch=1) for cycle in cycles)


def overrides(out: Path) -> dict[str, list[str]]:
    """Return, by YAML file, the overrides that load its weights from `out`."""
    shared = [
        f"model.first_stage_config.params.ckpt_path={out}/vae/3d-vae.pt",
        f"model.conditioner_config.params.emb_models.0.params.model_dir={out}/t5",
    ]
    return {NETWORKS[name]: [f"args.load={out / report.WEIGHTS[name]}", *shared] for name in NETWORKS}


def make_clips(out: Path, recipe: Recipe, seed: int) -> None:
    """Write captioned clips of the training combinations, and prompts and images of held-out ones."""
    clips = scene.random_clips(scene.combinations(held_out=False), np.random.default_rng([seed, 0]))
    for i in range(recipe.clips_per_combination * len(scene.combinations(held_out=False))):
        clip = next(clips)
        write_video(out / "videos" / f"{i:06d}.mp4", _to_uint8(scene.render(clip)), scene.FPS)
        _write_text(out / "labels" / f"{i:06d}.txt", clip.caption)
        if i == MASKED:
            where = scene.around(scene.render(clip)).any(axis=0)
            with atomic_file(out / "images" / "mask.png") as temporary:
                Image.fromarray(_to_uint8(where)).save(temporary)
            row = f"videos/{i:06d}.mp4,{clip.caption},images/mask.png"
            _write_text(out / "masked.csv", f"video,caption,mask\n{row}")
    _write_text(out / "prompts.txt", "\n".join(scene.caption(*names) for names in UNSEEN + SEEN))
    rng, lines = np.random.default_rng([seed, 4]), []
    for names in UNSEEN:
        clip = scene.random_clip(names, rng)
        frames, path = _to_uint8(scene.render(clip)), out / "images" / f"{clip.colour}_{clip.shape}.png"
        # That of the last one is the end of a clip between two pictures.
        for place, file in ((0, path), *([(-1, path.with_stem(f"{path.stem}_last"))] if names == UNSEEN[-1] else [])):
            with atomic_file(file) as temporary:
                Image.fromarray(frames[place]).save(temporary)
        lines.append(f"{clip.caption}@@{path.as_posix()}")
    _write_text(out / "prompts_i2v.txt", "\n".join(lines))


def _to_uint8(video: np.ndarray) -> np.ndarray:
    return (video * 255.0).round().astype(np.uint8)


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _progress(out: Path, stage: str, seed: int) -> training.Progress:
    return training.Progress(out / WORK / f"{stage}_{seed}.pt")


def make_vae(out: Path, recipe: Recipe, seed: int) -> None:
    """Train the autoencoder and save it in float16."""
    torch.manual_seed(seed)
    section = load_config([T2V], mode="inference").model["first_stage_config"]
    vae = instantiate_from_config(section)
    training.train_vae(vae, recipe.vae, _progress(out, "vae", seed), seed=seed, log=logger.info)
    save_autoencoder(out / "vae" / "3d-vae.pt", {name: value.half() for name, value in vae.state_dict().items()})
    report.record(out, "vae", recipe.vae.num_steps)


def make_networks(out: Path, recipe: Recipe, seed: int, stages: Sequence[str]) -> None:
    """Train the transformers that `stages` names on the same encoded clips, and save them in float16."""
    engine = quality.load_engine(T2V, overrides(out)[T2V], with_network=False)
    encoded = out / WORK / f"clips_{seed}.pt"
    if encoded.is_file():
        clips = training.EncodedClips(**torch.load(encoded, weights_only=True))
    else:
        world = list(scene.lattice(scene.combinations(held_out=False)))
        step = len(world) // (recipe.encoded_clips or len(world))
        clips = training.encode_clips(engine.first_stage_model, world[::step][: recipe.encoded_clips])
        clips.save(encoded)
    logger.info("standard deviation of the latents %.3f; model.scale_factor %.3f", clips.std, engine.scale_factor)
    started_from = {"i2v": "t2v", "i2v_1_5": "i2v"}
    for name, config in NETWORKS.items():
        if name not in stages:
            continue
        network_recipe = getattr(recipe, name)
        torch.manual_seed(seed)
        loaded = load_config([config], overrides(out)[config], mode="inference")
        engine = instantiate_from_config(loaded.engine)
        if name in started_from:
            training.start_from(engine, str(out / report.WEIGHTS[started_from[name]]))
        progress = _progress(out, name, seed)
        average = training.train_network(engine, clips, network_recipe, progress, seed=seed, log=logger.info)
        weights = {key: value.half() for key, value in average.items()}
        save_network(str(loaded.args.load), network_recipe.num_steps, weights, patch_size=engine.network.patch_size)
        report.record(out, name, network_recipe.num_steps)


def measure_quality(out: Path, recipe: Recipe) -> None:
    """Measure reconstruction and samples of held-out combinations, and write quality.json and README.md."""
    clips = quality.held_out_clips(recipe.samples, seed=MEASURED)
    settings = {"num_steps": recipe.num_steps, "seed": MEASURED}
    engine = quality.load_engine(T2V, overrides(out)[T2V], with_network=False)
    reconstruction, judged = quality.reconstruction_psnr(engine, clips), {}
    for name, config in NETWORKS.items():
        engine = quality.load_engine(config, overrides(out)[config])
        with_image = engine.noised_image_input
        samples = quality.sample(engine, clips, with_image=with_image, **settings)
        judged[name] = quality.judge(samples, clips, with_image=with_image)
    report.write(out, recipe, reconstruction=reconstruction, judged=judged)
    logger.info("%s", (out / "quality.json").read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that the arguments name."""
    parser = argparse.ArgumentParser(description="Make the toy model of assets/toy from nothing.")
    parser.add_argument("--stage", nargs="+", choices=("all", *STAGES), default=["all"], help="what to make")
    parser.add_argument("--out", type=Path, default=OUT, help="output folder (default: assets/toy)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (default: 0)")
    parser.add_argument("--fast", action="store_true", help="a few steps of everything, in seconds; learns nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(NUM_THREADS)
    recipe = Recipe().shortened() if args.fast else Recipe()
    stages = [stage for stage in STAGES if stage in args.stage or "all" in args.stage]
    if args.out != OUT or args.fast:
        if named := [stage for stage in OF_THE_FILES if stage in args.stage]:
            parser.error(f"--stage {' '.join(named)} works on {OUT} alone, and not with --fast")
        stages = [stage for stage in stages if stage not in OF_THE_FILES]
    if "clips" in stages:
        make_clips(args.out, recipe, args.seed)
    if "text" in stages:
        text.make_text_encoder(args.out / "t5", seed=args.seed)
    if "vae" in stages:
        make_vae(args.out, recipe, args.seed)
    if NETWORKS.keys() & set(stages):
        make_networks(args.out, recipe, args.seed, stages)
    if "quality" in stages:
        measure_quality(args.out, recipe)
    if "land" in stages:
        figures.make_land(args.out / WORK / "land", args.out / report.QUALITY)
    if "figures" in stages:
        figures.make_figures(args.out, args.out / WORK)
    if "all" in args.stage:
        shutil.rmtree(args.out / WORK, ignore_errors=True)
    return 0


if __name__ == "__main__":
    configure_logging()
    sys.exit(main())
