"""Sampling with a VAE on several ranks: the same videos. Real processes under torchrun."""

import imageio.v3 as iio
import numpy as np
import pytest

from tests.processes import run

SHARED = "model.first_stage_config.params.cp_size=2"


def sample(base, folder, prompts, *overrides, world=1):
    words = ["--base", str(base), f"args.input_file={prompts}", f"args.output_dir={folder}", *overrides]
    return run("sample_video.py", words, world)


def videos(folder):
    return {str(path.relative_to(folder)): iio.imread(path) for path in sorted(folder.rglob("*.mp4"))}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue square\na green triangle\n")
    return path


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_share_a_video_write_it_once(tiny_model, tmp_path, prompts, world):
    base, more = tiny_model("dit_t2v_1.5"), ["args.sampling_num_frames=4", "args.contact_sheet=true"]
    for folder, words, ranks in (("one", [], 1), ("shared", [SHARED], world)):
        done = sample(base, tmp_path / folder, prompts, *more, *words, world=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    one, shared = videos(tmp_path / "one"), videos(tmp_path / "shared")
    assert one.keys() == shared.keys() and len(one) == 3
    for name, video in one.items():
        assert np.abs(video.astype(int) - shared[name].astype(int)).max() <= 1, name
    sheets = sorted(path.name for path in (tmp_path / "shared").glob("contact_sheet*"))
    assert sheets == (["contact_sheet.png"] if world == 2 else ["contact_sheet_rank0.png", "contact_sheet_rank1.png"])


def test_a_number_of_ranks_that_does_not_fit_is_refused_before_weights_are_read(tiny_model, tmp_path, prompts):
    done = sample(tiny_model("dit_t2v_2b"), tmp_path / "out", prompts, SHARED)
    assert done.returncode == 2 and "cp_size=2 ranks cannot share a video among 1 processes" in done.stderr, done.stderr
    assert "loaded" not in done.stderr
