"""The video that sampling starts from."""

import numpy as np
import pytest
import torch

from sgm.checks.sampling import SamplingPlan
from sgm.config.args import SamplingArgs
from sgm.inference.source_video import check_source, load_source
from sgm.inference.video import write_video
from sgm.util import InputError


def plan(latents, fps=8):
    return SamplingPlan(latents, latents, 4 * latents - 3, (16, 24), fps, False)


@pytest.fixture
def clip(tmp_path):
    """Nine frames at 8 fps, each of its own grey, the outer quarters of their width white."""
    frames = np.full((9, 32, 96, 3), 255, np.uint8)
    frames[:, :, 24:72] = np.arange(20, 200, 20, dtype=np.uint8)[:, None, None, None]
    write_video(tmp_path / "clip.mp4", frames, 8, crf=0)
    return SamplingArgs(video=str(tmp_path / "clip.mp4"), prompt="x", strength=0.5)


@pytest.mark.parametrize(("latents", "fps", "greys"), [(3, 8, range(20, 200, 20)), (2, 4, range(20, 200, 40))])
def test_frames_are_those_of_the_result_in_rate_and_size(clip, latents, fps, greys):
    frames = load_source(clip, plan(latents, fps), (16, 24))
    assert frames.shape == (4 * latents - 3, 3, 16, 24)
    found = (frames.mean(dim=(1, 2, 3)) + 1) * 127.5
    torch.testing.assert_close(found, torch.tensor([float(grey) for grey in greys]), rtol=0, atol=3)
    said = check_source(clip, plan(latents, fps))
    assert f"clip.mp4 (32x96): {4 * latents - 3} frames at {fps} fps, from 0 to 8 of 9; strength 0.5" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("clip.mp4", "has 9 frames at 8 fps, and the result 17; set args.sampling_num_frames=3 .9 frames"),
        ("clap.mp4", "there is no file '.*clap.mp4'; did you mean"),
        ("text.mp4", "text.mp4"),
    ],
)
def test_what_cannot_be_taken_is_said_with_the_cure(clip, tmp_path, name, said):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match=said):
        check_source(SamplingArgs(video=str(tmp_path / name), prompt="x"), plan(5))
