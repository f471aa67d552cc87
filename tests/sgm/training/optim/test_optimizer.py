import copy
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sgm.distributed
from sgm.training.optim.average import evaluation_weights, full_ema, keep_average
from sgm.training.optim.muon import Muon
from sgm.training.optim.optimizer import (
    _has_fused_kernel,
    discard_initial_update,
    group_values,
    kind_of,
    make_optimizer,
    resolve_optimizer,
    settings_kept,
    settings_of,
)
from sgm.training.optim.whole import WholeMatrices
from sgm.util import InputError
from tests.processes import run

PARAMS = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
SECTION = {"type": "sat.ops.FusedEmaAdam", "params": PARAMS}


class Network(nn.Module):
    """Weights, biases, a norm, a frozen weight and one that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)
        self.frozen, self.unused = nn.Linear(5, 5), nn.Linear(2, 2, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.norm(self.inner(self.frozen(x))))


def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network()


# The rule


def averaging_adamw(params, *, ema_decay: float | None, **settings) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(params, **settings)
    if ema_decay is not None:
        keep_average(optimizer, ema_decay)
    return optimizer


def gradients(step: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(step)) * (1 + step % 3)


def adamw_in_float64(p: torch.Tensor, steps: int, *, lr, betas, eps, decay, ema_decay):
    """The published formulas, one by one."""
    p, m, v = p.double().clone(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
    ema = p.clone()
    for n in range(1, steps + 1):
        g = gradients(n, p).double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        p = p - lr * decay * p
        p = p - lr * (m / (1 - betas[0] ** n)) / ((v / (1 - betas[1] ** n)).sqrt() + eps)
        d = min(ema_decay, (1 + n) / (10 + n))
        ema = d * ema + (1 - d) * p
    return p, ema


@pytest.mark.parametrize("ema_decay", [0.3, 0.9999])
def test_twenty_updates_match_the_formulas(ema_decay):
    start = torch.linspace(-2, 2, 12).view(3, 4)
    p = nn.Parameter(start.clone())
    optimizer = averaging_adamw([p], lr=0.02, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.2, ema_decay=ema_decay)
    for n in range(1, 21):
        p.grad = gradients(n, p)
        optimizer.step()
    wanted = adamw_in_float64(start, 20, lr=0.02, betas=(0.9, 0.95), eps=1e-3, decay=0.2, ema_decay=ema_decay)
    torch.testing.assert_close(p.detach().double(), wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(optimizer.state[p]["ema"].double(), wanted[1], rtol=1e-6, atol=1e-6)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


def test_the_average_begins_with_the_weights_before_the_first_update():
    p = nn.Parameter(torch.tensor([1.0]))
    p.grad = torch.ones(1)
    optimizer = averaging_adamw([p], lr=0.5, weight_decay=0.0, ema_decay=0.9999)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["ema"], torch.tensor([2 / 11 * 1.0 + 9 / 11 * 0.5]))


def test_without_ema_decay_there_is_no_average():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = averaging_adamw([p], ema_decay=None)
    optimizer.step()
    assert "ema" not in optimizer.state[p]


def test_only_parameters_with_gradients_move():
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = averaging_adamw([one, other], lr=0.1, ema_decay=0.9)
    for p in (one, other, one):
        one.grad = other.grad = None
        p.grad = torch.ones(2)
        before = {q: optimizer.state[q]["ema"].clone() for q in (one, other) if q in optimizer.state}
        optimizer.step()
        assert all(torch.equal(before[q], optimizer.state[q]["ema"]) == (q is not p) for q in before)
    assert (optimizer.state[one]["step"], optimizer.state[other]["step"]) == (2, 1)


def test_the_average_is_restored_from_a_saved_state():
    def train(p: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for n in steps:
            p.grad = gradients(n, p)
            optimizer.step()

    p = nn.Parameter(torch.ones(4))
    optimizer = averaging_adamw([p], lr=0.1, ema_decay=0.9999)
    train(p, optimizer, range(5))
    q = nn.Parameter(p.detach().clone())
    resumed = averaging_adamw([q], lr=0.1, ema_decay=0.9999)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(p, optimizer, range(5, 9))
    train(q, resumed, range(5, 9))
    assert torch.equal(p, q) and torch.equal(optimizer.state[p]["ema"], resumed.state[q]["ema"])


def test_only_float32_weights_are_averaged():
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    with pytest.raises(InputError, match="args.ema_decay averages float32"):
        averaging_adamw([p], ema_decay=0.9).step()


@pytest.mark.parametrize("cls", [torch.optim.AdamW, Muon])
def test_a_closure_is_evaluated_once(cls):
    p = nn.Parameter(torch.ones(2, 1))
    optimizer = cls([{"params": [p]}], lr=0.1)
    keep_average(optimizer, 0.9)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0 and len(calls) == 1
    assert (p < 1).all() and (optimizer.state[p]["ema"] < 1).all()


# Names and parameters


@pytest.mark.parametrize("name", ["sat.ops.FusedEmaAdam", "FusedEmaAdam", "AdamW", "FusedAdam"])
def test_names_of_yaml(name):
    assert resolve_optimizer(name) is torch.optim.AdamW


def test_dotted_paths():
    assert resolve_optimizer("torch.optim.SGD") is torch.optim.SGD
    assert resolve_optimizer("Adam") is torch.optim.Adam


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AdanW", "unknown optimizer 'AdanW'; did you mean 'AdamW'"),
        ("torch.optim.SDG", "has no 'SDG'; did you mean 'SGD'"),
        ("no_such_package.AdamW8bit", "install the package"),
        ("torch.nn.Linear", "not a subclass of torch.optim.Optimizer"),
        ("torch.optim.lr_scheduler", "is not a class"),
        ("os.system", "is not trusted"),
    ],
)
def test_unknown_optimizers_are_refused(name, message):
    with pytest.raises(InputError, match=message) as caught:
        resolve_optimizer(name)
    assert str(caught.value).startswith("deepspeed.optimizer.type: ")


def test_biases_and_norms_do_not_decay():
    model = network()
    section = {**SECTION, "params": {**SECTION["params"], "betas": [0, 0]}}
    assert make_optimizer(section, model.named_parameters()).param_groups[0]["betas"] == (0, 0), "whole numbers"
    optimizer = make_optimizer(SECTION, model.named_parameters())
    decay, rest = optimizer.param_groups
    assert decay["params"] == [model.inner.weight, model.outer.weight, model.unused.weight]
    assert rest["params"] == [model.inner.bias, model.norm.weight, model.norm.bias, model.outer.bias]
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert decay["lr"] == rest["lr"] == 1e-2 and tuple(decay["betas"]) == (0.9, 0.95)


def test_a_device_without_the_fused_kernel_gets_the_plain_one(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr("sgm.training.optim.optimizer.adamw", refuse)
    _has_fused_kernel.cache_clear()
    assert {group["fused"] for group in make_optimizer(SECTION, network().named_parameters()).param_groups} == {None}
    _has_fused_kernel.cache_clear()


class Momentum(torch.optim.SGD):
    """An optimizer that passes its settings on."""

    def __init__(self, params, **settings) -> None:
        super().__init__(params, momentum=0.9, **settings)


def test_an_optimizer_that_passes_settings_on_checks_them_itself():
    section = {"type": f"{__name__}.Momentum", "params": {"lr": 0.1, "nesterov": True}}
    assert make_optimizer(section, network().named_parameters()).param_groups[0]["nesterov"] is True
    with pytest.raises(InputError, match="refuses its parameters .*neserov"):
        make_optimizer({**section, "params": {"neserov": True}}, network().named_parameters())


def test_muon_takes_no_group_of_matrices_and_others():
    with pytest.raises(ValueError, match="matrices only, or none"):
        Muon([{"params": [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]}])


def test_no_group_is_empty():
    model = nn.Linear(2, 2, bias=False)  # as with LoRA: matrices only
    (group,) = make_optimizer(SECTION, model.named_parameters()).param_groups
    assert group["weight_decay"] == 0.1


def test_any_optimizer_takes_its_parameters():
    section = {"type": "torch.optim.SGD", "params": {"lr": 0.5}}
    optimizer = make_optimizer(section, network().named_parameters())
    assert isinstance(optimizer, torch.optim.SGD) and {group["lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize(
    ("section", "ema_decay", "message"),
    [
        ({"type": "AdamW", "params": {"weigth_decay": 0.1}}, None, "weigth_decay.*did you mean 'weight_decay'.*takes"),
        ({"type": "AdamW", "params": {"lr": -1.0}}, None, "refuses its parameters.*lr"),
        ({"type": "AdamW", "params": {"ema_decay": 0.9}}, None, "set args.ema_decay"),
        ({"type": "AdamW"}, 1.5, "args.ema_decay: 1.5"),
        ({"type": "torchao.optim.CPUOffloadOptimizer"}, None, "configs/optimizer/cpu_offload.yaml"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(section, ema_decay, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(section, network().named_parameters(), ema_decay=ema_decay)


# Inside DeepSpeed

ENGINES = [("fp32", stage) for stage in range(4)] + [("bf16", stage) for stage in range(4)]


def start(precision: str, stage: int, optimizer_section=SECTION, **section):
    sgm.distributed.initialize()
    import deepspeed

    model = network()
    zero = {"stage": stage}
    optimizer = make_optimizer(optimizer_section, model.named_parameters(), ema_decay=0.5, zero=zero)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
    }
    initial = group_values(optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config | section)
    discard_initial_update(engine, initial)
    return engine


def train(engine, steps: range) -> None:
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x.to(engine.device, dtype)).square().mean())
        engine.step()


def average(engine) -> dict[str, torch.Tensor]:
    return full_ema(engine, engine.module.named_parameters())


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, torch.Tensor]]:
    """The average after 0, 4 and 8 steps, without DeepSpeed."""
    model = network()
    optimizer = make_optimizer(SECTION, model.named_parameters(), ema_decay=0.5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {"0": {name: p.detach().clone() for name, p in trained.items()}}
    for step in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        expected[str(step + 1)] = {
            name: optimizer.state[p]["ema"].clone() if p in optimizer.state else p.detach().clone()
            for name, p in trained.items()
        }
    return expected


@pytest.mark.parametrize(("precision", "stage"), ENGINES)
def test_every_stage_keeps_the_same_average(precision, stage, expected):
    engine = start(precision, stage)
    tolerance = 1e-6 if precision == "fp32" else 1e-2
    for steps in ("0", "4", "8"):
        train(engine, range(engine.global_steps, int(steps)))
        found = average(engine)
        used = [name for name in found if name != "unused.weight"]  # ZeRO gives it gradients of zero: it decays
        assert found.keys() == expected[steps].keys() and found["unused.weight"].shape == (2, 2)
        assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in found.values())
        for name in used:
            torch.testing.assert_close(found[name], expected[steps][name], rtol=0, atol=tolerance)


def test_16_bits_without_zero_start_as_with_zero():
    """DeepSpeed's initial step would decay the weights and count as an update."""
    averages = []
    for stage in (0, 1):
        engine = start("bf16", stage)
        train(engine, range(2))
        averages.append(average(engine))
    for name in averages[0]:
        if name != "unused.weight":
            torch.testing.assert_close(averages[0][name], averages[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("precision", "stage"), ENGINES)
def test_a_loaded_average_continues_bit_by_bit(precision, stage, tmp_path):
    engine = start(precision, stage)
    train(engine, range(4))
    engine.save_checkpoint(str(tmp_path), tag="4")
    saved = average(engine)
    train(engine, range(4, 8))
    resumed = start(precision, stage)
    resumed.load_checkpoint(str(tmp_path), tag="4")
    loaded = average(resumed)
    train(resumed, range(4, 8))
    straight, after = average(engine), average(resumed)
    for name, value in saved.items():
        assert torch.equal(loaded[name], value)
        assert torch.equal(after[name], straight[name])
    assert not torch.equal(straight["inner.weight"], saved["inner.weight"])


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.thorough) for stage in (1, 3))])
def test_gradients_are_clipped_as_the_configuration_of_a_resumed_run_says(stage, tmp_path):
    """DeepSpeed's optimizers load the former bound."""
    engine = start("fp32", stage, gradient_clipping=1.0)
    train(engine, range(1))
    engine.save_checkpoint(str(tmp_path), tag="1")
    resumed = start("fp32", stage, gradient_clipping=0.25)
    with settings_kept(resumed):
        resumed.load_checkpoint(str(tmp_path), tag="1")
    assert resumed.optimizer.clip_grad == 0.25


def test_a_resumed_run_scales_losses_as_its_configuration_says():
    """And keeps what the former run found: the scale, within bounds, and its counters."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler

    def dynamic(**given):
        usual = {"init_scale": 2.0**16, "scale_window": 1000, "min_scale": 1.0, "delayed_shift": 2}
        return DynamicLossScaler(**usual | given, consecutive_hysteresis=False)

    def without_zero(window):
        args = {"init_scale": 2.0**16, "scale_window": window, "min_scale": 1.0}
        return LossScaleConfig(
            low_precision_dtype=torch.float16, dynamic_loss_scale=True, static_loss_scale=0.0, dynamic_loss_args=args
        )

    def resumed(name, current, loaded):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        setattr(optimizer, name, current)
        with settings_kept(SimpleNamespace(optimizer=optimizer)):
            setattr(optimizer, name, loaded)
        return getattr(optimizer, name)

    loaded = dynamic()
    loaded.cur_scale, loaded.cur_iter, loaded.last_overflow_iter = 256.0, 70, 60
    found = resumed("loss_scaler", dynamic(scale_window=50, delayed_shift=1), loaded)
    assert (found.cur_scale, found.cur_iter, found.last_overflow_iter) == (256.0, 70, 60)
    assert (found.scale_window, found.delayed_shift, found.cur_hysteresis) == (50, 1, 1)
    assert resumed("loss_scaler", dynamic(min_scale=1024.0), loaded).cur_scale == 1024.0
    assert resumed("loss_scaler", LossScaler(128.0), loaded).cur_scale == 128.0
    found = resumed("loss_scale_config", without_zero(50), without_zero(1000))
    assert found.scale_window == 50 and found.cur_scale == 2.0**16


def test_other_betas_leave_the_average_of_a_schedule_free_optimizer():
    """They say where between its average and its iterates it trains."""
    p = nn.Parameter(torch.randn(3, 4))
    again = nn.Parameter(p.detach().clone())
    optimizer = make_optimizer(LIBRARY["schedule_free"], [("weight", p)])
    for _ in range(4):
        p.grad = torch.randn(3, 4)
        optimizer.step()
    section = {**LIBRARY["schedule_free"], "params": {"lr": 3e-3, "betas": [0.5, 0.9]}}
    resumed = make_optimizer(section, [("weight", again)])
    with settings_kept(SimpleNamespace(optimizer=resumed)):
        resumed.load_state_dict(optimizer.state_dict())
        again.data.copy_(p)
    assert tuple(resumed.param_groups[0]["betas"]) == (0.5, 0.9) and not torch.allclose(again, p, rtol=1e-3)
    optimizer.eval()
    resumed.eval()
    assert torch.allclose(again, p, atol=1e-6)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 0), ("bf16", 1)])
def test_a_schedule_free_optimizer_is_evaluated_at_its_average(precision, stage):
    """And trained where it was before, bit by bit."""
    engine = start(precision, stage, LIBRARY["schedule_free"])
    train(engine, range(3))
    model = network()
    reference = make_optimizer(LIBRARY["schedule_free"], model.named_parameters())
    for step in range(3):
        model.zero_grad()
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        reference.step()
    reference.eval()
    weight, trained = engine.module.inner.weight, engine.module.inner.weight.detach().clone()
    with evaluation_weights(engine):
        assert not torch.equal(weight, trained)
        tolerance = 1e-6 if precision == "fp32" else 1e-2
        torch.testing.assert_close(weight.float(), model.inner.weight, rtol=0, atol=tolerance)
    assert torch.equal(weight, trained)


def test_prodigy_finds_the_same_rate_with_and_without_zero():
    """Its sums over all parameters are reduced on the device of the run, which is not CUDA's here."""
    weights = []
    for stage in (0, 1):
        engine = start("fp32", stage, LIBRARY["prodigy"])
        train(engine, range(3))
        weights.append(engine.module.inner.weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    assert not torch.allclose(weights[0], network().inner.weight, atol=1e-3)


@pytest.mark.thorough
def test_gradients_accumulated_in_float32_have_an_average_too():
    engine = start("bf16", 1, data_types={"grad_accum_dtype": "fp32"})
    train(engine, range(3))
    reference = start("bf16", 1)
    train(reference, range(3))
    for name, value in average(engine).items():
        torch.testing.assert_close(value, average(reference)[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_state_on_the_cpu_has_an_average_too(stage, expected):
    offload = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    engine = start("fp32", stage, zero_optimization=offload, zero_force_ds_cpu_optimizer=False)
    train(engine, range(4))
    torch.testing.assert_close(average(engine)["inner.weight"], expected["4"]["inner.weight"], rtol=0, atol=1e-6)


def test_a_matrix_across_the_border_of_two_slices_is_updated_whole(monkeypatch):
    """And goes on from a saved state; two threads are the ranks."""
    settings, size, met, given = {"lr": 0.1, "weight_decay": 0.1}, 20, Barrier(2, timeout=60), [[], []]
    whole = [nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (4, 5), (3, 2))]
    whole_gradients = [[torch.randn_like(p) for p in whole] for _ in range(4)]

    def flat(tensors, rank):
        return torch.cat([*(each.detach().flatten() for each in tensors), torch.zeros(2)])[rank * size :][:size].clone()

    def reduce(tensor, *, largest=False):
        given[met.wait()] = tensor.clone()
        met.wait()
        tensor.copy_(torch.maximum(*given) if largest else given[0] + given[1])
        met.wait()
        return tensor

    def made(rank, values):
        """Return the optimizer of a rank as ZeRO shows it: with a slice of the vector of all parameters."""
        own, at = [nn.Parameter(p.detach().clone()) for p in whole], -rank * size
        optimizer = WholeMatrices([{"params": own}], torch.optim.Muon, settings)
        for p in own:
            first, end = max(at, 0), min(at + p.numel(), size)
            if first < end:
                places = [SimpleNamespace(start=start, numel=end - first) for start in (first, first - at)]
                p._hp_mapping = SimpleNamespace(hp_fragment_address=places[0], lp_fragment_address=places[1])
            at += p.numel()
        optimizer.param_groups[0]["params"] = [nn.Parameter(values)]
        return optimizer

    def steps(rank):
        optimizer = made(rank, flat(whole, rank))
        for number, each in enumerate(whole_gradients):
            if number == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = made(rank, optimizer.param_groups[0]["params"][0].detach())
                optimizer.load_state_dict(saved)
            (p,) = optimizer.param_groups[0]["params"]
            p.grad = flat(each, rank)
            optimizer.step()
        return p.detach()

    monkeypatch.setattr("torch.distributed.all_reduce", reduce)
    monkeypatch.setattr(sgm.distributed, "all_reduce_", reduce)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(steps, range(2)))
    reference = torch.optim.Muon(whole, **settings)
    for each in whole_gradients:
        for p, gradient in zip(whole, each, strict=True):
            p.grad = gradient
        reference.step()
    for rank in range(2):
        torch.testing.assert_close(found[rank], flat(whole, rank))


# Optimizers of libraries

PRESETS = Path("configs/optimizer")
LIBRARY = {
    "adamw_8bit": {"type": "torchao.optim.AdamW8bit", "params": {"lr": 3e-3}},
    "came": {"type": "came_pytorch.CAME", "params": {"lr": 3e-4}},
    "muon": {"type": "Muon", "params": {"lr": 3e-3}},
    "prodigy": {"type": "prodigyopt.Prodigy", "params": {"lr": 1.0, "d0": 1e-3}},
    "schedule_free": {"type": "schedulefree.AdamWScheduleFree", "params": {"lr": 3e-3}},
}
BITSANDBYTES = {"type": "bitsandbytes.optim.AdamW8bit", "params": {"lr": 3e-3}}


def test_every_optimizer_trains_and_resumes_on_two_ranks(tmp_path):
    """At ZeRO 0 to 2: the loss falls, a resumed run is equal bit by bit, and the stages agree, average included."""
    offload = {"optimizer": LIBRARY["muon"], "stages": [1], "zero": {"offload_optimizer": {"device": "cpu"}}}
    cases = [{"name": name, "optimizer": section} for name, section in LIBRARY.items()]
    cases += [{"name": "offload", **offload}]
    cases += [
        {"name": f"{name}_bf16", "optimizer": LIBRARY[name], "bf16": True, "stages": [0, 2]}
        for name in ("muon", "schedule_free")
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = run("tests/sgm/training/optim/optimizers.py", [str(tmp_path / "cases.json")], 2)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 3 * len(LIBRARY) + 1 + 4
    for line in lines:
        assert line["after"] < 0.97 * line["before"], line
        assert line["resumed"] == 0, line
        assert line["from_stage_0"] < 1e-6, line


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("adamw_8bit", 2.1),
        ("bitsandbytes", 2.1),
        ("torchao.optim.AdamW4bit", 1.08),
        ("came", 4.1),
        ("muon", 4.01),
        ("prodigy", 16),
        ("schedule_free", 8),
    ],
)
def test_bytes_of_state_per_parameter(name, most):
    p = nn.Parameter(torch.randn(256, 512))
    section = BITSANDBYTES if name == "bitsandbytes" else LIBRARY.get(name, {"type": name, "params": {"lr": 1e-3}})
    optimizer = make_optimizer(section, [("weight", p)])
    p.grad = torch.randn_like(p)
    optimizer.step()
    total = 0
    for value in optimizer.state[p].values():
        parts = [getattr(value, part) for part in getattr(value, "tensor_attrs", ())] or [value]
        total += sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    assert total / p.numel() <= most


@pytest.mark.parametrize("section", [BITSANDBYTES, LIBRARY["adamw_8bit"]], ids=["bitsandbytes", "torchao"])
def test_eight_bits_follow_adamw_and_resume_from_a_file_bit_by_bit(section):
    """bitsandbytes has kernels for a CPU too; two ranks are left to CUDA."""
    start, gradients = torch.randn(128, 64), torch.randn(6, 128, 64)

    def made(section, weight):
        p = nn.Parameter(weight.clone())
        return p, make_optimizer(section, [("weight", p)])

    def steps(p, optimizer, numbers):
        for number in numbers:
            p.grad = gradients[number]
            optimizer.step()

    p, optimizer = made(section, start)
    steps(p, optimizer, range(3))
    again, resumed = made(section, p.detach())
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    plain, reference = made({**section, "type": "AdamW"}, start)
    steps(plain, reference, range(6))
    for each in ((p, optimizer), (again, resumed)):
        steps(*each, range(3, 6))
    assert torch.equal(again, p) and not torch.equal(p, plain)
    assert torch.cosine_similarity((p - start).flatten(), (plain - start).flatten(), 0) > 0.98


@pytest.mark.parametrize("name", LIBRARY)
def test_a_preset_resumes_with_its_state_and_the_new_settings(name):
    """Counters and estimates in the groups are state; what the YAML sets is not."""
    p = nn.Parameter(torch.randn(8, 8))
    optimizer = make_optimizer(LIBRARY[name], [("weight", p)])
    names = settings_of(optimizer)
    assert {"lr", "weight_decay"} <= set(names)
    assert not {"d", "d_max", "d_numerator", "k", "weight_sum", "lr_max", "train_mode", "scheduled_lr"} & set(names)


@pytest.mark.parametrize(
    ("name", "zero", "message"),
    [
        ("came", {"stage": 3}, "zero_optimization.stage to 0, 1 or 2"),
        ("prodigy", {"stage": 3}, "zero_optimization.stage to 0, 1 or 2"),
        ("muon", {"stage": 1, "round_robin_gradients": True}, "round_robin_gradients=false"),
        ("prodigy", {"stage": 1}, "weight_decay=0, or deepspeed.zero_optimization.stage=0"),
    ],
)
def test_combinations_that_would_be_wrong_are_refused(name, zero, message):
    section = copy.deepcopy(LIBRARY[name])
    section["params"]["weight_decay"] = 0.1
    with pytest.raises(InputError, match=message):
        make_optimizer(section, network().named_parameters(), zero=zero)


@pytest.mark.parametrize(("name", "more"), [("torch.optim", {}), ("transformers", {"relative_step": False})])
def test_adafactor_gets_matrices_too(name, more):
    section = {"type": f"{name}.Adafactor", "params": {"lr": 0.1, **more}}
    assert isinstance(make_optimizer(section, network().named_parameters(), zero={"stage": 2}), WholeMatrices)
    with pytest.raises(InputError, match="stage to 0, 1 or 2"):
        make_optimizer(section, network().named_parameters(), zero={"stage": 3})


def test_elementwise_optimizers_work_at_every_stage():
    assert kind_of("torch.optim.SGD").elementwise and not kind_of("schedulefree.AdamWScheduleFree").elementwise
    make_optimizer({"type": "torch.optim.SGD", "params": {"lr": 0.1}}, network().named_parameters(), zero={"stage": 3})


def test_muon_updates_matrices_by_torch_and_the_rest_as_adamw():
    ours, theirs = network(), network()
    section = {"type": "Muon", "params": {"lr": 0.01, "weight_decay": 0.1}}
    optimizer = make_optimizer(section, ours.named_parameters())
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    matrices = [p for p in trained.values() if p.ndim == 2]
    others = [p for p in trained.values() if p.ndim != 2]
    parts = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.0),
    ]
    for step in range(3):
        for model, steps in ((ours, [optimizer]), (theirs, parts)):
            model.zero_grad()
            model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            for each in steps:
                each.step()
    for name, p in ours.named_parameters():
        assert torch.equal(p, theirs.get_parameter(name)), name
