"""A context parallel VAE against one rank, for tests/shared_ranks.py."""

import torch
import torch.distributed as dist

import sgm.distributed
from benchmarks.models import build_vae, vae_section
from sgm.util import InputError
from vae_modules.compiled_norms import CompiledNorms

FRAMES = (1, 5, 9, 25)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max())


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(vae, x: torch.Tensor, how: str, size: int):
    """Return output, gradient of the input and of the weights, summed over the group."""
    vae.cp_size = size
    x = x.clone().requires_grad_()
    vae.zero_grad()
    output = vae.decode(x) if how == "decode" else vae.encode_moments(x)
    weights = torch.linspace(-1, 1, output.shape[2] or 1)[:, None, None]  # a different weight per frame
    (output.sin() * weights[: output.shape[2]]).sum().backward()
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in vae.parameters() if p.requires_grad]
    gradient = torch.cat([part.flatten() for part in parts])
    if size > 1:
        dist.all_reduce(gradient, group=sgm.distributed.context_group())
    return output.detach(), x.grad, gradient


def clip(how: str, frames: int) -> torch.Tensor:
    """Return the input of a case: latents to decode, or frames to encode."""
    latents = (frames - 1) // 4 + 1
    return random(1, 16, latents, 2, 2, seed=frames) if how == "decode" else random(1, 3, frames, 32, 32, seed=frames)


def set_chunk(vae, how: str) -> None:
    vae.encode_chunk = 8 if how == "encode in chunks" else None


def run_alone(vae, cases: list[tuple[str, int]]) -> dict[tuple[str, int], tuple[torch.Tensor, ...]]:
    """Return the results of one rank; each rank computes some of the cases."""
    found = {}
    for how, frames in cases[dist.get_rank() :: dist.get_world_size()]:
        set_chunk(vae, how)
        found[how, frames] = run(vae, clip(how, frames), how, 1)
    return {case: result for each in sgm.distributed.all_gather_objects(found) for case, result in each.items()}


def compare(vae, how: str, frames: int, size: int, alone: tuple[torch.Tensor, ...]) -> dict[str, float]:
    x = clip(how, frames)
    set_chunk(vae, how)
    shared = run(vae, x, how, size)
    scale = float(alone[2].abs().max())
    with torch.no_grad():
        vae.cp_size = size
        again = vae.decode(x) if how == "decode" else vae.encode_moments(x)
    return {
        "output": difference(alone[0], shared[0]),
        "without gradient": difference(alone[0], again),
        "input gradient": difference(alone[1], shared[1]) / max(1.0, float(alone[1].abs().max())),
        "weight gradient": difference(alone[2], shared[2]) / max(1.0, scale),
    }


def check_first_rank_only(vae, size: int) -> None:
    latents = random(1, 16, 5, 2, 2, seed=1)
    alone = run(vae, latents, "decode", 1)
    vae.decodes_everywhere = False
    output, gradient, weights = run(vae, latents, "decode", size)
    vae.decodes_everywhere = True
    if sgm.distributed.sample_rank() == 0:
        assert difference(alone[0], output) <= 1e-5
    else:
        assert output.shape == (1, 3, 0, 16, 16), "only the first rank gets the video"
    assert difference(alone[1], gradient) <= 1e-5
    assert difference(alone[2], weights) <= 1e-4 * float(alone[2].abs().max())


def check_low_precision(vae, size: int) -> None:
    vae = vae.to(torch.bfloat16)
    latents = random(1, 16, 5, 2, 2, seed=1).bfloat16()
    with torch.no_grad():
        vae.cp_size = 1
        alone = vae.decode(latents)
        vae.cp_size = size
        assert torch.equal(alone, vae.decode(latents)), "the same arithmetic"
    vae.float()


def check_compiled_norms(vae, size: int) -> None:
    vae._compiled_norms = CompiledNorms(backend="eager")
    for how in ("decode", "encode", "encode in chunks"):
        x = clip(how, 25)
        set_chunk(vae, how)
        run = vae.decode if how == "decode" else vae.encode_moments
        with torch.no_grad():
            vae.cp_size = 1
            alone = run(x)
            vae.cp_size = size
            assert difference(alone, run(x)) <= 1e-5, how
    vae._compiled_norms = None


def check_tiles(vae, size: int) -> None:
    from vae_modules.autoencoder import Tiling

    latents = random(2, 16, 3, 6, 4, seed=1)
    vae.tiling, vae.slicing = Tiling((32, 32), 8), True
    with torch.no_grad():
        vae.cp_size = 1
        alone = vae.decode(latents)
        vae.cp_size = size
        assert difference(alone, vae.decode(latents)) <= 1e-5
    vae.tiling, vae.slicing = None, False


def check(size: int) -> dict[str, dict[str, float]]:
    """Return the differences of every case."""
    section = vae_section("cogvideox_5b", ch=32, num_res_blocks=1)
    for part in ("encoder_config", "decoder_config"):
        section["params"][part]["params"]["ch_mult"] = [1, 1, 1, 1]
    vae = build_vae(section)
    cases = [(how, frames) for how in ("decode", "encode", "encode in chunks") for frames in FRAMES]
    alone = run_alone(vae, cases)
    found = {
        f"VAE {how}, {frames} frames": compare(vae, how, frames, size, alone[how, frames]) for how, frames in cases
    }
    check_first_rank_only(vae, size)
    check_low_precision(vae, size)
    check_compiled_norms(vae, size)
    check_tiles(vae, size)
    vae.cp_size = size + 1
    try:
        vae.decode(torch.zeros(1, 16, 1, 2, 2))
    except InputError as error:
        assert f"cp_size={size + 1}, but this process shares clips with {size} ranks" in str(error)
    else:
        raise AssertionError("another size was accepted")
    return found
