"""Sampling with several ranks on each sample: the same results, written once. Real processes."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgm.config.load import load_config
from sgm.inference.main import main
from sgm.inference.video import to_uint8
from sgm.util import instantiate_from_config
from tests.processes import run
from tests.test_dit_golden import FAMILIES

SHARED = "model.first_stage_config.params.cp_size=2"


@pytest.fixture
def sample(tmp_path):
    """Return a function that samples three prompts below tmp_path, in this process or on some ranks."""
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue square\na green triangle\n")

    def run_it(base, folder, *overrides, world=None):
        words = ["--base", str(base), f"args.input_file={path}", f"args.output_dir={tmp_path / folder}", *overrides]
        if world is None:
            assert main(words) == 0
        else:
            done = run("sample_video.py", words, world)
            assert done.returncode == 0, done.stderr[-3000:]
        return {str(p.relative_to(tmp_path / folder)): p for p in (tmp_path / folder).rglob("000000.[ms]*")}

    return run_it


def test_ranks_that_share_a_video_write_it_once(tiny_model, tmp_path, sample):
    base, more = tiny_model("dit_t2v_1.5"), ["args.sampling_num_frames=4", "args.contact_sheet=true", "args.loop=true"]
    # Both in separate processes, for bitwise equal results: the codec amplifies single-bit differences in noise.
    one, shared = sample(base, "one", *more, world=1), sample(base, "shared", *more, SHARED, world=2)
    assert one.keys() == shared.keys() and len(one) == 3
    for name, path in one.items():
        frames = iio.imread(path).astype(int)
        assert len(frames) == 8, "four of each latent frame but the patch of two in front"
        assert np.abs(frames - iio.imread(shared[name]).astype(int)).max() <= 1, name
    assert [path.name for path in (tmp_path / "shared").glob("contact_sheet*")] == ["contact_sheet.png"]


def latents_differ(one, shared):
    """Return the largest difference of the latents of two runs."""
    assert one.keys() == shared.keys()
    pairs = [(load_file(path), load_file(shared[name])) for name, path in one.items()]
    return max(float((a[key] - b[key]).abs().max()) for a, b in pairs for key in a)


def test_ranks_that_share_branches_and_tokens_sample_the_same(tiny_model, tmp_path, sample):
    """All four ranks on one sample; compares latents, since the codec amplifies 1e-6 to grey levels in noise."""
    base, keep = tiny_model("dit_i2v_5b"), "args.only_save_latents=true"
    iio.imwrite(tmp_path / "image.png", np.full((64, 96, 3), 90, np.uint8))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{line}@@image.png\n" for line in prompts.read_text().splitlines()))
    # Ranks skip the same blocks at the same steps, or they would wait for each other.
    keep = [keep, "args.num_steps=8", "args.step_cache=first_block", "args.step_cache_threshold=0.2"]
    one = sample(base, "one", *keep)
    mesh = ["args.cfg_parallel_size=2", "args.sequence_parallel_size=2", SHARED.replace("=2", "=4")]
    shared = sample(base, "shared", *keep, *mesh, "args.sequence_attention=ring", world=4)
    assert len(one) == 3 and latents_differ(one, shared) <= 1e-5
    ran = [
        [json.loads(path.with_suffix(".json").read_text())["share_of_blocks_run"] for path in made.values()]
        for made in (one, shared)
    ]
    assert ran[0] == ran[1] and all(0.4 < share < 1 for share in ran[0]), ran


@pytest.mark.thorough
def test_ranks_that_share_tokens_sample_windows_as_one_does(tiny_model, tmp_path, sample):
    """Three windows, each with its own division of the tokens."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    long = ["args.sampling_num_frames=5", "args.time_window=3", "args.time_window_overlap=2", "args.num_steps=2"]
    base, long = tiny_model("dit_t2v_2b"), [*long, "args.only_save_latents=true"]
    one = sample(base, "one", *long)
    shared = sample(base, "shared", *long, "args.sequence_parallel_size=2", world=2)
    assert [len(load_file(path)["latents"]) for path in one.values()] == [5] and latents_differ(one, shared) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_branches_of_every_network(tiny_model, tmp_path, sample, family):
    base, keep = tiny_model(family), "args.only_save_latents=true"
    if "i2v" in family:
        iio.imwrite(tmp_path / "image.png", np.full((64, 96, 3), 90, np.uint8))
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("".join(f"{line}@@image.png\n" for line in prompts.read_text().splitlines()))
    one = sample(base, "one", keep)
    assert latents_differ(one, sample(base, "shared", keep, "args.cfg_parallel_size=2", world=2)) <= 1e-5


@pytest.mark.slow
def test_four_ranks_write_the_toy_videos_of_one(tmp_path):
    words = ["--base", "configs/toy.yaml", "configs/toy_inference.yaml"]
    for folder, world, more in (("one", 1, []), ("four", 4, ["configs/parallel/sample_4.yaml"])):
        done = run("sample_video.py", [*words, *more, f"args.output_dir={tmp_path / folder}"], world)
        assert done.returncode == 0, done.stderr[-3000:]
    videos = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.mp4")]
    assert len(videos) == 6
    for name in videos:
        one, four = (iio.imread(tmp_path / folder / name).astype(int) for folder in ("one", "four"))
        # One differently rounded pixel can change codec decisions, so single pixels may differ by more.
        assert one.shape == four.shape and np.abs(one - four).mean() <= 1, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "sizes"),
    [
        (2, {"cfg": 2}),
        (2, {"sequence": 2}),
        (2, {"model": 2}),
        (4, {"cfg": 2, "sequence": 2}),
        (4, {"sequence": 4}),
        (4, {"model": 2, "sequence": 2}),
        (4, {"cfg": 2, "model": 2}),
    ],
)
def test_whole_runs_of_the_toy_give_the_same_video(tmp_path, world, sizes):
    """Frames before encoding; the codec may amplify a difference of one level in one pixel."""
    bases = ["configs/toy.yaml", "configs/toy_inference.yaml"]
    path = tmp_path / "prompts.txt"
    path.write_text("a red square moves up\na green triangle moves down\n")
    words = ["--base", *bases, f"args.input_file={path}", "args.only_save_latents=true"]
    mesh = [f"args.{axis}_parallel_size={size}" for axis, size in sizes.items()]
    for folder, processes, more in (("one", 1, []), ("shared", world, mesh)):
        done = run("sample_video.py", [*words, f"args.output_dir={tmp_path / folder}", *more], processes)
        assert done.returncode == 0, done.stderr[-3000:]
    engine = instantiate_from_config(load_config(bases, mode="inference").engine)
    engine.load_first_stage(dtype=torch.float32, device=torch.device("cpu"))
    one = {p.relative_to(tmp_path / "one"): p for p in (tmp_path / "one").rglob("000000.safetensors")}
    assert len(one) == 2
    for name, latents in one.items():
        frames = []
        for file in (latents, tmp_path / "shared" / name):
            (value,) = load_file(file).values()
            frames.append(to_uint8(engine.decode_first_stage(value[None])[0]).int())
        assert (frames[0] - frames[1]).abs().max() <= 1, name
