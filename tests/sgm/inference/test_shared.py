"""Sampling with several ranks on each sample: the same results, written once. Real processes under torchrun."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgm.inference.main import main
from tests.processes import run

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
    base, more = tiny_model("dit_t2v_1.5"), ["args.sampling_num_frames=4", "args.contact_sheet=true"]
    # Both in processes of their own, which compute alike to the last bit: of one, the codec makes much in such noise.
    one, shared = sample(base, "one", *more, world=1), sample(base, "shared", *more, SHARED, world=2)
    assert one.keys() == shared.keys() and len(one) == 3
    for name, path in one.items():
        difference = iio.imread(path).astype(int) - iio.imread(shared[name]).astype(int)
        assert np.abs(difference).max() <= 1, name
    assert [path.name for path in (tmp_path / "shared").glob("contact_sheet*")] == ["contact_sheet.png"]


def test_ranks_that_share_the_tokens_sample_the_same(tiny_model, tmp_path, sample):
    """Two pairs of four ranks; latents, since the codec makes grey levels of a millionth in videos of noise."""
    base, keep = tiny_model("dit_i2v_5b"), "args.only_save_latents=true"
    iio.imwrite(tmp_path / "image.png", np.full((64, 96, 3), 90, np.uint8))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{line}@@image.png\n" for line in prompts.read_text().splitlines()))
    one = sample(base, "one", keep)
    tokens = ["args.sequence_parallel_size=2", "args.sequence_attention=ring"]
    shared = sample(base, "shared", keep, SHARED, *tokens, world=4)
    assert one.keys() == shared.keys() and len(one) == 3
    for name, path in one.items():
        ((key, latents),) = load_file(path).items()
        torch.testing.assert_close(load_file(shared[name])[key], latents, rtol=0, atol=1e-5)
