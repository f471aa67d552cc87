from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sgm.modules.diffusionmodules.guiders import DynamicCFG, IdentityGuider, VanillaCFG
from sgm.util import InputError

GOLDEN = load_file(Path(__file__).parents[3] / "data/golden/schedule/io.safetensors")


@pytest.mark.parametrize("n", [8, 50])
def test_dynamic_scale_equals_the_reference(n: int) -> None:
    guider = DynamicCFG(scale=6, exp=5, num_steps=50)
    scales = [guider.scale_at(t, num_steps=n) for t in GOLDEN[f"timesteps.n{n}"].tolist()]
    torch.testing.assert_close(
        torch.tensor(scales, dtype=torch.float64), GOLDEN[f"dynamic_cfg_scale.n{n}"], atol=1e-6, rtol=0
    )


def test_dynamic_scale_can_be_replaced_and_falls_back_to_the_configuration() -> None:
    guider = DynamicCFG(scale=6, exp=5, num_steps=50)
    assert guider.scale_at(979) == guider.scale_at(979, num_steps=50)
    assert guider.scale_at(979, scale=12.0) - 1 == pytest.approx(2 * (guider.scale_at(979) - 1))


def test_a_fixed_scale_does_not_depend_on_the_steps() -> None:
    guider = VanillaCFG(scale=3.0)
    assert guider.scale_at(979) == guider.scale_at(124, num_steps=8) == 3.0


def test_a_guider_says_which_scale_is_no_guidance() -> None:
    vanilla, dynamic = VanillaCFG(scale=1.0), DynamicCFG(scale=6, exp=5, num_steps=50)
    assert [vanilla.guides(), vanilla.guides(0.0), vanilla.guides(3.0)] == [False, True, True]
    assert [dynamic.guides(), dynamic.guides(0.0), dynamic.guides(1.0)] == [True, False, True]
    assert dynamic.scale_at(979, scale=0.0) == 1


def test_a_guider_with_a_scale_of_its_own_always_guides() -> None:
    class Rising(VanillaCFG):
        def scale_at(self, timestep: int, *, num_steps: int | None = None, scale: float | None = None) -> float:
            return self.scale + timestep / 1000

    assert Rising(scale=1.0).guides() and type("Named", (DynamicCFG,), {})(scale=1, exp=5, num_steps=50).guides()


def test_unconditional_half_comes_first() -> None:
    x, cond, uc = torch.randn(2, 3), {"crossattn": torch.ones(2, 4)}, {"crossattn": torch.zeros(2, 4)}
    latents, both = VanillaCFG(scale=3.0).prepare_inputs(x, cond, uc)
    assert torch.equal(latents, torch.cat([x, x]))
    assert both["crossattn"].sum(dim=1).tolist() == [0, 0, 4, 4]


def test_guidance_extrapolates_from_the_unconditional_result() -> None:
    denoised = torch.tensor([[1.0], [2.0]])
    guider = VanillaCFG(scale=3.0)
    assert guider.combine(denoised, timestep=0).item() == 4.0
    assert guider.combine(denoised, timestep=0, scale=1.0).item() == 2.0


def test_identity_passes_the_condition_through() -> None:
    x, cond = torch.randn(2, 3), {"crossattn": torch.ones(2, 4)}
    assert IdentityGuider().prepare_inputs(x, cond, None) == (x, cond)
    assert IdentityGuider().combine(x, timestep=0) is x
    with pytest.raises(InputError, match="IdentityGuider"):
        IdentityGuider().combine(x, timestep=0, scale=6.0)


def test_conditions_without_counterpart_are_refused() -> None:
    x, cond = torch.randn(1, 3), {"crossattn": torch.ones(1, 4)}
    with pytest.raises(ValueError, match="unconditional"):
        VanillaCFG(scale=3.0).prepare_inputs(x, cond, None)
    with pytest.raises(ValueError, match=r"\(1, 4\).*\(1, 5\)"):
        VanillaCFG(scale=3.0).prepare_inputs(x, cond, {"crossattn": torch.ones(1, 5)})


@pytest.mark.parametrize("params", [{"exp": 2.5, "num_steps": 50}, {"exp": 5, "num_steps": 0}])
def test_impossible_dynamic_parameters_are_refused(params: dict) -> None:
    with pytest.raises(InputError, match="DynamicCFG got"):
        DynamicCFG(scale=6, **params)
