import pytest
import torch

from sgm.modules.block_ops import ModulatedNorm, add_gated, modulated_norm
from sgm.modules.compiled_ops import apply_linear
from sgm.modules.in_place import gelu

D = 16


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_token(factors, num_text, length):
    patches, text = factors.split(1, dim=1)
    return torch.cat((text.expand(-1, num_text, -1), patches.expand(-1, length - num_text, -1)), 1)


@pytest.mark.parametrize("trained", ["all", "tokens", "factors"])
@pytest.mark.parametrize(("batch", "num_text"), [(1, 3), (2, 3), (2, 0)])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("compiler", [None, "cpu", "accelerator"])
def test_norm_and_gate_are_those_of_single_steps(batch, num_text, affine, trained, compiler, monkeypatch):
    if compiler is not None:  # the forms for it, run as they are
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
        monkeypatch.setattr("sgm.modules.compiled_ops.compiles_for_cpu", lambda _: compiler == "cpu")
    norm = ModulatedNorm(D, eps=1e-5, elementwise_affine=affine).double()
    for index, parameter in enumerate(norm.parameters()):
        parameter.data.copy_(random(D, seed=index))
        parameter.requires_grad_(trained != "tokens")
    x, branch = (random(batch, 7, D, seed=seed).requires_grad_(trained != "factors") for seed in (3, 4))
    factors = [random(batch, 2, D, seed=seed).requires_grad_(trained != "tokens") for seed in (5, 6, 7)]
    scale, shift, gate = factors
    leaves = [leaf for leaf in (x, branch, *factors, *norm.parameters()) if leaf.requires_grad]

    def single_steps():
        rows = [by_token(each, num_text, 7) for each in factors]
        h = torch.nn.functional.layer_norm(x, (D,), norm.weight, norm.bias, 1e-5)
        return h * (1 + rows[0]) + rows[1], x + rows[2] * branch

    fused = modulated_norm(norm, x, scale, shift, num_text), add_gated(x, branch, gate, num_text)
    weights = random(2, batch, 7, D, seed=8)
    results = [(*out, *torch.autograd.grad(out, leaves, (*weights,))) for out in (fused, single_steps())]
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)  # factors are computed in float32


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_in_the_form_for_compilers_is_torchs(bias, monkeypatch):
    layer, x = torch.nn.Linear(D, 5, bias=bias).double(), random(2, 3, D, seed=1).requires_grad_()
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    results = []
    for run in (layer, lambda x: apply_linear(layer, x)):
        out = run(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    for expected, own in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_a_linear_layer_in_the_form_for_compilers_obeys_autocast(monkeypatch):
    layer, x = torch.nn.Linear(D, 5), random(2, 3, D, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
        own = apply_linear(layer, x)
    assert own.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(own, expected, rtol=2e-2, atol=1e-2)


def test_linear_layers_of_other_classes_and_with_hooks_are_called(monkeypatch):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    x, hooked = random(2, D, seed=1).float(), torch.nn.Linear(D, 5)
    plain = hooked(x)
    hooked.register_forward_hook(lambda *_: plain + 1)
    assert torch.equal(apply_linear(hooked, x), plain + 1)
    doubled = Doubled(D, 5)
    assert torch.equal(apply_linear(doubled, x), doubled(x))


def test_gelu_in_the_form_for_compilers_is_exact_to_float32(monkeypatch):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)

    def results(x):
        out = gelu(x.requires_grad_())
        return torch.stack((out, *torch.autograd.grad(out.sum(), x))).double()

    exact = results(x)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    own = results(x.detach().float())
    assert (own - exact).abs().max() <= 2e-6  # torch's own float32: 1e-6
    assert ((own - exact).square().mean(1).sqrt() <= 3e-7).all()


def test_a_norm_without_factors_is_torchs():
    x = random(2, 7, D, seed=1).float()
    assert torch.equal(ModulatedNorm(D)(x), torch.nn.LayerNorm(D)(x))


def test_in_bfloat16_a_fused_norm_is_closer_to_exact_values_than_single_steps():
    shapes = (1, 64, 64), (1, 2, 64), (1, 2, 64)
    x, scale, shift = (random(*shape, seed=seed).bfloat16() for seed, shape in enumerate(shapes))
    norm = ModulatedNorm(64).bfloat16()
    exact = modulated_norm(norm.double(), x.double(), scale.double(), shift.double(), 0)
    norm.bfloat16()
    fused = modulated_norm(norm, x, scale, shift, 0)
    steps = norm(x) * (1 + scale[:, :1]) + shift[:, :1]
    errors = [(out.double() - exact).norm() / exact.norm() for out in (fused, steps)]
    assert errors[0] < 0.9 * errors[1]
