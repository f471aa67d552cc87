"""Previews: the same samples with and without, a bounded share of the time, and no failure of the run."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sgm.config.load import ConfigError, load_config
from sgm.inference.main import main
from sgm.inference.preview import MAX_SIDE, Preview
from sgm.util import instantiate_from_config
from tests.conftest import GOLDEN
from vae_modules.autoencoder import Tiling

VAE = GOLDEN / "vae"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_run_shows_what_it_makes_and_makes_the_same(tiny_model, tmp_path):
    words = ["--base", str(tiny_model("dit_t2v_2b")), "args.prompt=a red circle", "args.sampling_num_frames=3"]
    picture = tmp_path / "new" / "shown.png"
    assert main([*words, f"args.output_dir={tmp_path / 'without'}"]) == 0
    assert main([*words, f"args.output_dir={tmp_path / 'with'}", f"args.preview={picture}"]) == 0
    assert main([*words, f"args.output_dir={tmp_path / 'with'}", f"args.preview={tmp_path / 'other.png'}"]) == 0
    without, shown = (path.read_bytes() for path in sorted(tmp_path.glob("with*/*/0/000000.mp4")))
    assert without == shown
    assert len([*tmp_path.rglob("*.mp4")]) == 2 and not (tmp_path / "other.png").exists(), "it is the same result"
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape == (64, 3 * 96 + 4, 3), "the first frame, that in the middle and the last"
    frames = pixels[:, :96], pixels[:, 98:194], pixels[:, 196:]
    assert all(frame.std() > 1 for frame in frames) and (frames[0] != frames[2]).any()
    assert [path.name for path in picture.parent.iterdir()] == ["shown.png"]


def test_previews_take_a_tenth_of_the_time_after_the_first(tmp_path):
    clock, decoded, size = Clock(), [], (3, 480, 720)

    def decode(latents):
        clock.now += 0.5
        decoded.append(clock.now)
        return torch.zeros(len(latents), *size)

    preview = Preview(tmp_path / "shown.jpg", decode, clock)
    for _ in range(2):  # samples
        preview.begin()
        decoded.clear()
        began = clock.now
        for _ in range(20):
            clock.now += 1
            preview(torch.zeros(1, 5, 16, 60, 90))
        # Two cost 1 s, a tenth of 10 s of steps, three 1.5 s, and so on.
        assert [round(time - began, 1) for time in decoded] == [1.5, 11.0, 16.5, 22.0]
    assert Image.open(preview.path).size == (3 * MAX_SIDE + 4, round(MAX_SIDE * 480 / 720))


def test_a_preview_that_does_not_fit_ends_previews_and_not_the_run(tmp_path, caplog):
    asked = []

    def decode(latents):
        asked.append(1)
        raise torch.OutOfMemoryError("no room")

    preview = Preview(tmp_path / "shown.jpg", decode)
    for _ in range(2):
        preview.begin()
        preview(torch.zeros(1, 1, 16, 8, 8))
    assert asked == [1] and "there are no further previews" in caplog.text and not preview.path.exists()


def test_noise_without_numbers_and_a_lost_folder_stop_nothing(tmp_path):
    preview = Preview(tmp_path / "shown.jpg", lambda latents: torch.full((len(latents), 3, 16, 16), torch.nan))
    preview(torch.zeros(1, 2, 16, 2, 2))
    assert np.asarray(Image.open(preview.path)).shape == (16, 34, 3)
    Preview(tmp_path / "none" / "shown.jpg", preview.decode)(torch.zeros(1, 2, 16, 2, 2))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["args.preview=shown.mp4"], "names no kind of picture"),
        (["args.preview=shown.jpg", "args.only_save_latents=true"], "there is no VAE to decode it"),
    ],
)
def test_what_cannot_be_shown_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_config(["configs/toy.yaml"], ["args.prompt=a cat", *overrides], mode="inference")


def test_a_frame_is_decoded_without_other_ranks(monkeypatch):
    """Ranks that share a clip along time are at the next step, and would never come."""
    section = yaml.safe_load((VAE / "first_stage.yaml").read_text())["first_stage_config"]
    section["params"]["cp_size"] = 2
    torch.manual_seed(0)
    vae = instantiate_from_config(section)
    latents = torch.randn(1, 16, 2, 4, 6)
    with torch.no_grad():
        monkeypatch.setattr(vae, "_num_ranks", lambda: 1)
        expected = vae.decode(latents)
        vae.enable_tiling(Tiling(size=(32, 32), overlap=16))
        tiled = vae.decode(latents)
        monkeypatch.setattr(vae, "_num_ranks", lambda: pytest.fail("asks for the ranks"))
        assert torch.equal(vae.decode_on_this_rank(latents), tiled)
        assert not torch.equal(tiled, expected)
        vae.tiling = None
        assert torch.equal(vae.decode_on_this_rank(latents), expected)
