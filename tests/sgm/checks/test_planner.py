"""Fitting runs into cards: the choice of settings, --card, and args.memory=auto."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import yaml

from sgm.checks import planner
from sgm.checks.estimate import Estimate, sampling_estimate, training_estimate
from sgm.checks.meta_run import build
from sgm.checks.planner import PRESETS, ROOM, SAMPLING, TRAINING, Change, card_rows, config_with, fit, with_preset
from sgm.checks.recomputation import cheapest, kept_attention_problem
from sgm.config.load import ConfigError, Problem, load_config
from sgm.inference.main import main as sample
from sgm.inference.run import _with_preset
from sgm.training import prepare
from sgm.training.main import main as train
from sgm.training.optim.trainable import choose_trainable
from sgm.util import InputError
from tests.processes import ROOT

GIB = 2**30
TOY = ["configs/toy.yaml", "configs/toy_inference.yaml"]
TOY_TRAINING = ["configs/toy.yaml", "configs/toy_sft.yaml"]
A, B, C = (Change(name, frozenset(phases), f"costs {name}") for name, phases in (("a", "xy"), ("b", "x"), ("c", "y")))


def sizes(x: float, y: float, **savings: tuple[float, float]):
    """Return a function of estimates with two phases, from which each setting takes its savings."""

    def estimate_of(settings):
        if "refused" in settings:
            raise ConfigError([Problem("refused", "", "is not for this model", "remove it")])
        saved = [savings.get(setting, (0.0, 0.0)) for setting in settings]
        return Estimate(
            {"x": {"all": x - sum(one for one, _ in saved)}, "y": {"all": y - sum(two for _, two in saved)}}
        )

    return estimate_of


def needing(setting, other, estimate_of):
    """Return a function of estimates that refuses `setting` without another one."""

    def checked(settings):
        if setting in settings and other not in settings:
            raise ConfigError([Problem(setting, "", f"needs {other}", "add it")])
        return estimate_of(settings)

    return checked


@pytest.mark.parametrize(
    ("estimate_of", "chosen", "peak"),
    [
        (sizes(9, 9), [], 9),
        (sizes(12, 9, a=(3, 0)), ["a"], 9),
        (sizes(12, 9, b=(4, 0)), ["b"], 9),  # a does not help
        (sizes(12, 9, a=(1, 0), b=(4, 0)), ["b"], 9),  # b does a's work
        (sizes(12, 12, a=(1, 3), b=(1, 0)), ["a", "b"], 10),
        (sizes(20, 12, a=(1, 3), b=(1, 0), c=(0, 9)), ["a", "b"], 18),  # not enough, and c is not needed
        (needing("b", "a", sizes(12, 9, a=(1, 0), b=(4, 0))), ["a", "b"], 9),  # b is refused without a
        (needing("a", "b", sizes(12, 9, a=(1, 0), b=(1, 0))), ["b", "a"], 10),  # a helps after b alone
    ],
)
def test_the_fewest_settings_in_order_are_chosen(estimate_of, chosen, peak):
    refused = Change("refused", frozenset("xy"), "")
    changes, found = fit(estimate_of, 10, (refused, A, B, C))
    assert ([change.setting for change in changes], found.peak) == (chosen, peak)


def test_the_rows_say_what_fits_what_makes_it_fit_or_what_comes_next():
    def rows(estimate_of):
        return card_rows(lambda given: _times_gib(estimate_of(given)), 10 / ROOM, (A, B), "buy a larger one")

    assert rows(sizes(9, 9)) == {"card": "11.1111 GiB, of which a run may take 10.0 GiB: it fits"}
    assert rows(sizes(12, 9, a=(3, 0))) == {
        "card": "11.1111 GiB, of which a run may take 10.0 GiB: it does not fit (x 12.0 GiB)",
        "it fits with": "a (9.0 GiB)",
        "  a": "exact; costs a",
    }
    smaller = rows(sizes(12, 12, a=(3, 0)))
    assert smaller["the smallest"] == "a takes 12.0 GiB, which does not fit; buy a larger one"
    assert rows(sizes(12, 12))["next"] == "buy a larger one"


def _times_gib(estimate: Estimate) -> Estimate:
    return Estimate({phase: {"all": GIB * size} for phase, size in estimate.device.items()})


def released(model: str, *settings: str, mode="inference"):
    files = ("configs/inference.yaml",) if mode == "inference" else ("configs/sft.yaml",)
    return load_config([f"configs/{model}.yaml", *files], settings, mode=mode)


def test_a_released_model_fits_with_the_settings_that_are_named():
    config = released("cogvideox_5b")

    def estimate_of(settings):
        return sampling_estimate(config_with(config, settings), torch.bfloat16)

    for card in (8, 12, 16, 24):
        chosen, found = fit(estimate_of, ROOM * card * GIB, SAMPLING)
        assert found.peak <= ROOM * card * GIB and all(change.exact for change in chosen), card
        assert estimate_of([change.setting for change in chosen]).peak == found.peak


def test_a_change_names_all_phases_that_it_makes_smaller():
    config = load_config(["configs/toy_i2v.yaml", "configs/toy_inference.yaml"], mode="inference")
    own = sampling_estimate(config, torch.float32).device
    for change in SAMPLING:
        found = sampling_estimate(config_with(config, [change.setting]), torch.float32).device
        assert {phase for phase, size in found.items() if size < own[phase]} <= change.phases, change.setting
    config = load_config(["configs/toy_lora.yaml", "configs/toy_sft.yaml"], mode="train")
    network = build(config.model["network_config"])
    names = choose_trainable(network, config.model).names
    own = training_estimate(config, torch.float32, names).device
    for change in TRAINING:
        with contextlib.suppress(ConfigError):  # not all of them are for the toy
            found = training_estimate(config_with(config, [change.setting]), torch.float32, names).device
            assert {phase for phase, size in found.items() if size < own[phase]} <= change.phases, change.setting


@pytest.mark.parametrize("change", SAMPLING, ids=lambda change: change.setting)
def test_every_setting_of_sampling_is_accepted(change):
    released("cogvideox_2b", change.setting)


@pytest.mark.parametrize("change", TRAINING, ids=lambda change: change.setting)
def test_every_setting_of_training_is_accepted(change):
    released("cogvideox_5b_lora", change.setting, mode="train")


def test_the_presets_are_those_of_the_files():
    for card, name in {"8": "8", "12": "8", "16": "8", "24": "24", "48": "80", "80": "80"}.items():
        given = yaml.safe_load((ROOT / "configs" / "memory" / f"{card}gb.yaml").read_text(encoding="utf-8"))["args"]
        settings = PRESETS[f"{name}gb"]
        assert {key: given.get(key) for key in PRESETS["8gb"]} == {key: settings.get(key) for key in PRESETS["8gb"]}


# args.memory=auto


@pytest.fixture
def peaks(monkeypatch):
    """Let runs take 15 GiB, 10 if the network leaves, 6 in blocks, and 4 if the VAE decodes in tiles, too."""

    def estimate(config, _):
        args = config.args
        size = {"none": 15, "cpu": 10, "blocks": 6}[args.network_offload]
        return Estimate({"decode": {"all": (size - 2 * bool(args.vae_tiling)) * GIB}})

    monkeypatch.setattr(planner, "sampling_estimate", estimate)


@pytest.mark.parametrize(("room", "preset"), [(None, "80gb"), (20, "80gb"), (14.4, "24gb"), (7, "8gb")])
def test_the_first_preset_that_fits_is_chosen(room, preset, peaks):
    config = released("cogvideox_5b", "args.memory=auto")
    found, said = with_preset(config, torch.bfloat16, None if room is None else room * GIB)
    assert said == f"configs/memory/{preset}.yaml, exact" and found.args.memory is None
    assert found.args == dataclasses.replace(config.args, memory=None, **PRESETS[preset])


def test_the_choice_says_whether_it_is_approximate_and_leaves_what_is_given(peaks):
    config = released("cogvideox1.5_5b", "args.memory=auto")
    assert with_preset(config, torch.bfloat16, 5 * GIB)[1].endswith("8gb.yaml, approximate: the VAE decodes in tiles")
    for given in ("args.network_offload=none", "args.text_encoder_offload=none", "args.vae_tiling=true"):
        kept, said = with_preset(released("cogvideox_5b", "args.memory=auto", given), torch.bfloat16, None)
        name, _, value = given.removeprefix("args.").partition("=")
        assert str(getattr(kept.args, name)).lower() == value and (given in said or name not in PRESETS["80gb"])
        assert ("approximate" in said) == (name == "vae_tiling")
    with pytest.raises(InputError, match="no preset fits"):
        with_preset(released("cogvideox_5b", "args.memory=auto", "args.network_offload=none"), torch.bfloat16, 12 * GIB)


def test_a_card_without_room_for_any_preset_is_refused_and_still_planned_for(peaks):
    config = released("cogvideox_5b", "args.memory=auto")
    with pytest.raises(InputError, match=r"no preset fits into 2\.0 GiB: configs/memory/8gb\.yaml takes 4\.0 GiB"):
        with_preset(config, torch.bfloat16, 2 * GIB)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(InputError, match="no preset fits"):
        patched.setattr(planner, "room_for", lambda card: 2 * GIB)
        planner.sampling_rows(config, torch.bfloat16)  # the run on this device would be refused
    rows = planner.sampling_rows(config, torch.bfloat16, card=2)
    assert "no preset fits" in rows["preset"] and "does not fit" in rows["card"] and "the smallest" in rows


def test_all_ranks_take_the_preset_of_the_one_with_the_least_room(monkeypatch, caplog):
    config = load_config(TOY, ["args.memory=auto"], mode="inference")
    monkeypatch.setattr("sgm.distributed.all_gather_objects", lambda room: [None, 2e6, 1e12])
    with pytest.raises(InputError, match="no preset fits"):
        _with_preset(config, torch.float32)
    monkeypatch.setattr("sgm.distributed.all_gather_objects", lambda room: [None])
    with caplog.at_level("INFO", logger="sgm"):
        assert _with_preset(config, torch.float32).args.text_encoder_offload == "cpu"
    assert "args.memory=auto, for a device that shares" in caplog.text and "memory/80gb.yaml, exact" in caplog.text


def test_training_refuses_the_choice_for_sampling():
    with pytest.raises(ConfigError, match="chooses settings of sampling"):
        released("cogvideox_5b_lora", "args.memory=auto", mode="train")


# The command line


def test_memory_is_planned_before_anything_is_downloaded(capsys, tmp_path):
    words = ["--base", "configs/cogvideox_2b.yaml", "configs/inference.yaml", "--check", "--card", "12gb"]
    assert sample([*words, f"args.output_dir={tmp_path}"]) == 2
    found = capsys.readouterr()
    assert (
        "text encoder 8.9 GiB" in found.out and "card           12 GiB, of which a run may take 10.8 GiB" in found.out
    )
    assert "there is no checkpoint" in found.err and not list(tmp_path.iterdir())


def test_training_is_planned_before_anything_is_downloaded(capsys, tmp_path):
    words = ["--base", "configs/cogvideox_2b_lora.yaml", "configs/sft.yaml", "--check", "--card", "16"]
    assert train([*words, f"args.save={tmp_path}"]) == 2
    found = capsys.readouterr()
    assert all(f"\n  {name} " in found.out for name in ("text", "encode", "network", "optimizer", "validation"))
    assert "it fits with" in found.out and "data folder 'datasets/train' does not exist" in found.err
    assert found.err.count("there is no checkpoint at") == 1


def test_the_next_step_is_one_that_the_run_has_not_taken():
    ways = [planner.next_of_training(encodes=a, adapters=b) for a in (True, False) for b in (True, False)]
    assert ["prepare_dataset" in way for way in ways] == [True, True, False, False]
    assert ["train adapters" in way for way in ways] == [False, True, False, True]
    assert all("train_2.yaml" in way for way in ways)


def test_a_run_from_caches_is_planned_before_they_are_there(capsys, tmp_path):
    caches = [f"args.{name}={tmp_path / 'none'}" for name in ("latent_cache", "text_cache")]
    assert train(["--base", *TOY_TRAINING, "--check", "--card", "8", f"args.save={tmp_path}", *caches]) == 2
    found = capsys.readouterr()
    assert "\n  network " in found.out and "\n  encode " not in found.out and "args.latent_cache" in found.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--check", "--card", "large"], "--card 'large' is no size; give the memory of the card, such as --card 24gb"),
        (["--check", "--card", "0gb"], "is no size"),
        (["--check", "--card", "4090"], "--card '4090': no card has so much memory; give that of yours"),
        (["--card", "24gb"], "--card only plans: give --check as well"),
    ],
)
def test_a_card_is_a_size_and_goes_with_check(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        sample(["--base", *TOY, *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_card_of_this_machine_is_planned_for_if_it_has_one(monkeypatch):
    monkeypatch.setattr(planner, "room_on", lambda device: 7 * GIB)
    rows = planner.sampling_rows(released("cogvideox_2b", "args.memory=auto"), torch.float16)
    assert rows["preset"] == "configs/memory/24gb.yaml, exact" and rows["card"].endswith("may take 7.0 GiB: it fits")


@pytest.mark.parametrize(
    ("keeps", "room", "number"),
    [
        *((False, room, number) for room, number in ((None, 0), (31, 0), (30, 0), (29, 1), (28, 1), (25, 3))),
        *((False, room, number) for room, number in ((22, 4), (21.9, 5), (5, 5))),
        *((True, room, number) for room, number in ((None, 0), (30, 0), (29, 1), (28, 2), (26, 4), (25, 5), (5, 5))),
    ],
)
def test_the_fewest_blocks_are_recomputed(keeps, room, number, monkeypatch):
    """Five blocks: each takes 2 where it is recomputed, 3 where its attention is kept, and 4 where it is not."""
    config = load_config(
        TOY_TRAINING,
        [
            "model.network_config.params.num_layers=5",
            f"args.keep_attention={keeps}",
            "args.checkpoint_activations=auto",
        ],
        mode="train",
    )

    def estimate(config, *_, **__):
        recomputed = {False: 0}.get(config.args.checkpoint_activations, config.args.checkpoint_activations)
        size = 2 + config.args.keep_attention
        return Estimate({"network": {"all": 10 + 4 * (5 - recomputed) + size * recomputed}, "text": {"all": 99}})

    monkeypatch.setattr(planner, "training_estimate", estimate)
    assert planner.recomputed_blocks(config, torch.float32, (), room) == (number, keeps)


@pytest.mark.parametrize(
    ("room", "share", "choice"),
    [
        (54, 0.5, (0, False)),
        (45, 0.5, (3, True)),
        (45, 0.1, (3, True)),
        (36, 0.1, (5, False)),  # six without their attention cost 5.4
        (36, 0.5, (6, True)),
        (24, 0.5, (10, True)),
        (23, 0.5, (8, False)),  # with all ten, attention does not fit
        (1, 0.5, (10, False)),
    ],
)
def test_attention_is_kept_where_that_is_cheaper(room, share, choice):
    """Ten blocks: each takes 1 where it is recomputed, 2 where its attention is kept, and 5 where it is not."""

    def peak(number, keeps):
        return 4 + 5 * (10 - number) + (1 + keeps) * number

    assert cheapest(10, room, peak, keeps=(True, False), share=share) == choice


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["args.checkpoint_activations=false"], "no block is recomputed"),
        (["args.checkpoint_activations=1", "args.attention=math"], "the output of the attention 'math' cannot be kept"),
        (["args.sequence_parallel_size=2", "args.sequence_attention=ring"], "ring attention calls a kernel for each"),
        (["args.sequence_parallel_size=2"], None),
        (["args.attention=flash"], None),
        (["model.network_config.target=torch.nn.Identity"], "Identity has no keep_attention"),
    ],
)
def test_attention_that_cannot_be_kept_is_refused(settings, said):
    given = ["args.checkpoint_activations=true", "args.keep_attention=true", *settings]
    config = load_config(TOY_TRAINING, [setting for setting in given if "target" not in setting], mode="train")
    if "target" in settings[0]:
        config.model["network_config"]["target"] = "torch.nn.Identity"
    problem = kept_attention_problem(config)
    assert problem is None if said is None else said in str(problem)


@pytest.mark.parametrize("keeps", [False, True])
def test_all_ranks_recompute_as_many_blocks_as_the_smallest_device_needs(keeps, monkeypatch):
    plan = SimpleNamespace(
        config=load_config(TOY_TRAINING, mode="train"),
        args=load_config(TOY_TRAINING, ["args.checkpoint_activations=auto"], mode="train").args,
        dtype=torch.float32,
        trainable=SimpleNamespace(names=()),
        caches=SimpleNamespace(encodes={"vae": True, "text_encoder": True}),
    )
    monkeypatch.setattr(prepare, "recomputed_blocks", lambda *_, **__: (1, True))
    others = torch.tensor([2.0, float(not keeps)])
    monkeypatch.setattr(prepare.sgm.distributed, "all_reduce_", lambda own, *, largest: torch.maximum(own, others))
    monkeypatch.setattr(prepare, "replace", lambda plan, **changes: changes["args"] if "args" in changes else changes)
    assert prepare.with_recomputation(plan) == {"checkpoint_activations": 2, "keep_attention": keeps}


def test_auto_says_how_many_blocks_are_recomputed_on_a_card(monkeypatch):
    monkeypatch.setattr(planner, "_memory_rows", lambda *_: {})
    config = load_config(TOY_TRAINING, ["args.checkpoint_activations=auto", "args.eval_interval=null"], mode="train")
    trained = frozenset(dict(build(config.model["network_config"]).named_parameters()))
    sized = {row: planner.training_rows(config, torch.float32, trained, card=row) for row in (8.0, 0.001)}
    depth = config.model["network_config"]["params"]["num_layers"]
    numbers = [rows["recomputed"] for rows in sized.values()]
    assert numbers == [f"{number} of {depth} blocks (args.checkpoint_activations=auto)" for number in (0, depth)]
