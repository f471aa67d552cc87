import math
import re
from functools import partial

import pytest
import torch

from sgm.config.args import TrainingArgs
from sgm.training.optim.schedule import LearningRate, endless_warmup, lr_factor, unfinished_decay

RUN = {"base_lr": 2.0, "train_iters": 100, "warmup": 0.1}
STYLES = ["linear", "cosine", "constant", "exponential"]


def lr_at(iteration: int, *, base_lr: float, **settings) -> float:
    return base_lr * lr_factor(iteration, **settings)


@pytest.mark.parametrize("style", STYLES)
def test_the_warmup_is_linear(style):
    rates = [lr_at(n, decay_style=style, **RUN) for n in (1, 5, 10)]
    assert rates == pytest.approx([0.2, 1.0, 2.0])


def test_linear():
    rates = [lr_at(n, decay_style="linear", **RUN) for n in (11, 60, 100, 110, 500)]
    assert rates == pytest.approx([2 * 0.99, 2 * 0.5, 2 * 0.1, 0, 0])


def test_cosine_follows_the_formula_of_the_reference():
    def reference(n: int, ratio: float) -> float:
        share = min(1.0, (n - 10) / 100)
        return 2.0 / ratio * ((math.cos(math.pi * share) + 1) * (ratio - 1) / 2 + 1)

    for n in (11, 35, 60, 100, 110, 500):
        assert lr_at(n, decay_style="cosine", decay_ratio=0.1, **RUN) == pytest.approx(reference(n, 10.0))
    assert lr_at(500, decay_style="cosine", decay_ratio=0.1, **RUN) == pytest.approx(0.2)


def test_exponential_falls_by_a_constant_factor_to_the_ratio():
    rates = [lr_at(n, decay_style="exponential", decay_ratio=0.01, **RUN) for n in range(10, 111)]
    assert rates[0] == pytest.approx(2.0) and rates[50] == pytest.approx(0.2) and rates[-1] == pytest.approx(0.02)
    shares = [after / before for before, after in zip(rates, rates[1:], strict=False)]
    assert shares == pytest.approx([shares[0]] * 100) and shares[0] < 1
    assert lr_at(1000, decay_style="exponential", decay_ratio=0.01, **RUN) == pytest.approx(0.02)


def test_constant():
    assert {lr_at(n, decay_style="constant", **RUN) for n in (10, 11, 100, 500)} == {2.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"decay_style": "cosine_with_restarts", "cycles": 2}, {10: 2, 35: 1.1, 59: 0.2018, 60: 2, 85: 1.1, 110: 0.2}),
        ({"decay_style": "cosine_with_restarts"}, {10: 2, 60: 1.1, 110: 0.2, 500: 0.2}),
        ({"decay_style": "polynomial", "power": 2}, {10: 2, 60: 0.65, 85: 0.3125, 110: 0.2, 500: 0.2}),
        ({"decay_style": "polynomial"}, {10: 2, 60: 1.1, 110: 0.2}),
        ({"decay_style": "constant", "warmup": 20}, {5: 0.5, 20: 2, 21: 2, 500: 2}),
        ({"decay_style": "linear", "warmup": 20}, {10: 1, 20: 2, 70: 1, 120: 0}),
        ({"decay_style": "linear", "warmup": 1}, {25: 0.5, 100: 2}),  # a share: the whole run
    ],
)
def test_rates_of_restarts_powers_and_a_warmup_in_steps(settings, expected):
    """2 at most; after 10 of 100 steps of warmup the progress is 1/100 a step, and the ratio is 0.1."""
    found = {n: lr_at(n, **{**RUN, **settings}) for n in expected}
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_decay_may_be_shorter_than_the_run():
    assert lr_at(60, base_lr=1.0, train_iters=1000, decay_iters=100, warmup=0.1) == pytest.approx(0.5)


def test_auto_warmup_holds_the_first_iterations_at_five_percent():
    rates = {n: lr_at(n, base_lr=1.0, train_iters=10_000, warmup=0.01, auto_warmup_iters=50) for n in (1, 5, 50, 51)}
    assert rates == pytest.approx({1: 0.01, 5: 0.05, 50: 0.05, 51: 0.51})
    assert lr_at(50, base_lr=1.0, train_iters=60, warmup=0, auto_warmup_iters=100) == pytest.approx(0.05)
    assert lr_at(60, base_lr=1.0, train_iters=60, warmup=0, auto_warmup_iters=100) == 0


def test_without_warmup_the_first_update_has_a_rate():
    assert lr_at(1, base_lr=1.0, train_iters=4, warmup=0) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "args.auto_warmup_iters is 100 if null, and the run has 80 iterations: none has more than 5%"),
        ({"auto_warmup_iters": 80}, "args.auto_warmup_iters is 80, and the run has 80 iterations"),
        ({"mode": "pretrain"}, None),
        ({"auto_warmup_iters": 79, "warmup": 80.0}, None),
        (
            {"auto_warmup_iters": 0, "warmup": 100.0},
            "args.warmup is 100: 100 iterations, and the run has 80: none .* 80%",
        ),
        ({"auto_warmup_iters": 0, "warmup": 0.5, "lr_decay_iters": 320}, "args.warmup is 0.5: 160 iterations.* 50%"),
        ({"auto_warmup_iters": 0, "warmup": 1.0}, None),  # said where the configuration is read
    ],
)
def test_a_run_that_ends_within_its_warmup_is_told(given, said):
    found = endless_warmup(TrainingArgs(**given), 80)
    assert found is None if said is None else re.search(said, found)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, None),
        ({"lr_decay_style": "cosine"}, None),
        ({"warmup": 0.5, "lr_decay_style": "constant"}, None),
        ({"warmup": 0.5, "lr_decay_iters": 90}, None),
        ({"warmup": 0.5}, "has 50% of the learning rate, .* end at 0%; args.lr_decay_iters=60 ends"),
        ({"warmup": 30.0, "lr_decay_style": "cosine"}, "after 30 of warm-up.* end at 10%; args.lr_decay_iters=60 ends"),
        ({"warmup": 30.0, "lr_decay_style": "cosine_with_restarts", "lr_cycles": 3}, "has 100% of the learning rate"),
    ],
)
def test_a_run_that_ends_before_its_decay_is_told(given, said):
    args = TrainingArgs(**given)
    found = unfinished_decay(args, 90)
    assert found is None if said is None else re.search(said, found)
    if found is not None and args.lr_cycles == 1:
        iters = int(re.search(r"lr_decay_iters=(\d+)", found)[1])
        last = lr_factor(90, train_iters=90, decay_style=args.lr_decay_style, decay_iters=iters, warmup=args.warmup)
        assert last == pytest.approx(0.0 if args.lr_decay_style == "linear" else 0.1)


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def test_every_group_has_its_own_base_rate():
    groups = optimizer(1.0, 0.1)
    schedule = LearningRate(groups, partial(lr_factor, train_iters=10, warmup=0.2))
    seen = []
    for _ in range(10):
        seen.append(schedule.get_last_lr())
        groups.step()
        schedule.step()
    assert [rates[0] for rates in seen] == [lr_at(n, base_lr=1.0, train_iters=10, warmup=0.2) for n in range(1, 11)]
    assert [rates[1] for rates in seen] == pytest.approx([rates[0] / 10 for rates in seen])


def test_a_resumed_schedule_continues_exactly():
    straight, first, second = optimizer(1.0), optimizer(1.0), optimizer(1.0)
    settings = {"train_iters": 20, "decay_style": "cosine", "auto_warmup_iters": 3}
    whole, half, rest = (LearningRate(one, partial(lr_factor, **settings)) for one in (straight, first, second))
    for _ in range(7):
        straight.step()
        first.step()
        whole.step()
        half.step()
    second.param_groups[0]["lr"] = 123.0  # as loading the optimizer's state may leave it
    rest.load_state_dict(half.state_dict())
    for _ in range(13):
        assert rest.get_last_lr() == whole.get_last_lr() == [straight.param_groups[0]["lr"]]
        straight.step()
        second.step()
        whole.step()
        rest.step()


def test_a_resumed_schedule_follows_the_new_base_rate():
    former, now = (LearningRate(optimizer(rate), partial(lr_factor, train_iters=10, warmup=0)) for rate in (1.0, 0.5))
    former.optimizer.step()
    former.step()
    now.load_state_dict(former.state_dict())
    assert former.state_dict() == {"iteration": 1}
    assert now.get_last_lr() == [0.5 * 0.8] == [group["lr"] for group in now.optimizer.param_groups]


def test_rates_that_are_tensors_stay_tensors_and_are_reported_as_numbers():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = LearningRate(optimizer, lambda update: 1 / update)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.25] and type(schedule.get_last_lr()[0]) is float
    schedule.load_state_dict({"iteration": 3})
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.125
    assert schedule.get_last_lr() == [0.125]
