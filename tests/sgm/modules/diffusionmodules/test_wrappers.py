import torch
from torch import nn

from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper


class Network(nn.Module):
    """Records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, **optional: object
    ) -> torch.Tensor:
        self.given = (x, timesteps, context, optional)
        return x


def test_image_latents_go_behind_the_channels() -> None:
    wrapper = OpenAIWrapper(Network())
    x, concat, text = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 5, 4, 4), torch.randn(1, 6, 7)
    result = wrapper(x, torch.tensor([3]), {"crossattn": text, "concat": concat})
    assert torch.equal(result, torch.cat([x, concat], dim=2))
    assert torch.equal(wrapper.diffusion_model.given[2], text)


def test_ofs_is_passed_only_when_given() -> None:
    wrapper, ofs = OpenAIWrapper(Network()), torch.tensor([2.0])
    args = torch.randn(1, 2, 3, 4, 4), torch.tensor([3]), {"crossattn": torch.randn(1, 6, 7)}
    wrapper(*args)
    assert wrapper.diffusion_model.given[3] == {}
    wrapper(*args, ofs=ofs)
    assert wrapper.diffusion_model.given[3] == {"ofs": ofs}


def test_each_rank_of_guidance_gets_its_branch_and_one_timestep_stays_one(monkeypatch) -> None:
    module = "sgm.modules.diffusionmodules.wrappers"
    monkeypatch.setattr(f"{module}.split_sequence", lambda value, group, dim: value.chunk(2)[1].clone())
    monkeypatch.setattr(f"{module}.gather_sequence", lambda value, group, dim, size: value)
    wrapper = OpenAIWrapper(Network())
    x, texts, ofs = torch.randn(4, 2, 3, 4, 4), torch.randn(4, 6, 7), torch.full((1,), 2.0).expand(4)
    for timesteps in (torch.tensor([3]).expand(4), torch.tensor([3, 4, 5, 6])):
        wrapper(x, timesteps, {"crossattn": texts}, ofs=ofs)
        given = wrapper.diffusion_model.given
        assert torch.equal(given[0], x[2:]) and torch.equal(given[2], texts[2:])
        assert torch.equal(given[1], timesteps[2:]) and given[1].stride() == timesteps.stride()
        assert torch.equal(given[3]["ofs"], ofs[2:]) and given[3]["ofs"].stride() == (0,)


def test_inputs_take_the_precision_of_the_network_but_timesteps_do_not() -> None:
    wrapper = OpenAIWrapper(Network().bfloat16())
    wrapper(torch.randn(1, 2, 3, 4, 4), torch.tensor([999]), {"crossattn": torch.randn(1, 6, 7)})
    x, timesteps, context, _ = wrapper.diffusion_model.given
    assert (x.dtype, timesteps.dtype, context.dtype) == (torch.bfloat16, torch.int64, torch.bfloat16)


def test_parameter_names_are_those_of_the_checkpoint() -> None:
    assert list(OpenAIWrapper(Network()).state_dict()) == ["diffusion_model.weight"]
