"""The DeepSpeed presets, and the claims of docs/parallelism.md: memory, traffic, several machines, Slurm."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from omegaconf import OmegaConf

import sgm.distributed
from sgm.config.deepspeed_section import engine_config
from sgm.config.load import load_config
from sgm.config.precision import resolve_training_precision
from sgm.modules.geometry import Geometry
from sgm.training import main as training
from sgm.util import instantiate_from_config, without_allocating
from sgm.weights.files import find_weights, read_tensors
from tests.processes import ENV, ROOT, asked, only_run, run, train_all

CONFIGS = ROOT / "configs"
RELEASED = sorted(path.stem for path in CONFIGS.glob("cogvideox*.yaml"))
PRESETS = sorted(path.stem for path in (CONFIGS / "deepspeed").glob("*.yaml"))
SLURM = ROOT / "scripts" / "finetune_slurm.sh"
DOCUMENT = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
MODELS = {"full": "dit_t2v_1.5", "lora": "dit_t2v_5b_lora"}
ZERO = "deepspeed.zero_optimization"
# Small enough for the networks of the tests: all parameters are sharded, and buffers are filled several times.
SMALL = [f"{ZERO}.stage3_param_persistence_threshold=0", f"{ZERO}.reduce_bucket_size=20000"]
ITERS = 4
# By default one preset trains the full network, one with offloading trains adapters, and another one starts a run
# resumed without; the other cases take minutes.
QUICK = [("full", "zero1"), ("lora", "zero3_offload")]
BOTH = [
    pytest.param(model, name, marks=[] if (model, name) in QUICK else pytest.mark.slow)
    for model in MODELS
    for name in PRESETS
]
OTHERS = [name for name in PRESETS if name != "zero2_offload"]


def read(path: Path) -> Any:
    """Load with the project's loader, which parses 2e8 as a number."""
    return OmegaConf.to_container(OmegaConf.load(path))


def preset(name: str) -> dict:
    return read(CONFIGS / "deepspeed" / f"{name}.yaml")


def load(model: str, *presets: str, overrides=()):
    """Override the clip size for the model without a fixed size."""
    size = ["data.params.video_size=[768,1360]"] if model.startswith("cogvideox1.5_5b_i2v") else []
    names = (model, "sft", *(f"deepspeed/{name}" for name in presets))
    return load_config([CONFIGS / f"{name}.yaml" for name in names], [*size, *overrides], mode="train")


def other(name: str) -> str:
    """The preset of the same stage with or without offloading."""
    return name.removesuffix("_offload") if "offload" in name else f"{name}_offload"


def stage_of(name: str) -> int:
    return int(name.removeprefix("zero")[0])


# Files


def test_all_presets_are_there():
    assert PRESETS == ["zero1", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    assert all(f"`configs/deepspeed/{name}.yaml`" in DOCUMENT for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_its_name_says(name):
    zero = preset(name)["deepspeed"]["zero_optimization"]
    assert zero["stage"] == stage_of(name)
    assert ("offload_optimizer" in zero) is ("offload" in name)
    assert ("offload_param" in zero) is (name == "zero3_offload")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_repeats_nothing_of_the_training_file(name):
    content = preset(name)
    assert [*content] == ["deepspeed"] and [*content["deepspeed"]] == ["zero_optimization"]
    zero, sft = content["deepspeed"]["zero_optimization"], read(CONFIGS / "sft.yaml")["deepspeed"]["zero_optimization"]
    assert [key for key in zero if key != "stage" and zero[key] == sft.get(key)] == []


@pytest.mark.parametrize("model", RELEASED)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_every_model(name, model):
    config = load(model, name)
    assert config.warnings == ()
    section = engine_config(config.deepspeed, world_size=8, dtype=resolve_training_precision(config, "accelerator"))
    zero = preset(name)["deepspeed"]["zero_optimization"]
    assert zero.items() <= section["zero_optimization"].items()


@pytest.mark.parametrize("name", PRESETS)
def test_deepspeed_accepts_every_key(name):
    sgm.distributed.prepare_import()
    from deepspeed.runtime.config import DeepSpeedConfig

    section = engine_config(load("cogvideox_5b", name).deepspeed, world_size=1, dtype=torch.bfloat16)
    taken = DeepSpeedConfig(section).zero_config.model_dump(by_alias=True)
    for key, value in preset(name)["deepspeed"]["zero_optimization"].items():
        found = taken[key]
        assert {inner: found[inner] for inner in value} == value if isinstance(value, dict) else found == value


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_in_a_preset_is_right(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (CONFIGS / "deepspeed" / f"{name}.yaml").read_text()
    (command,) = re.findall(r"^#   bash (.*)$", text, flags=re.MULTILINE)
    script, *bases = command.split()
    assert (ROOT / script).is_file() and bases[-1] == f"configs/deepspeed/{name}.yaml"
    assert load_config(bases, mode="train").warnings == ()


# Training


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def difference(a: Path, b: Path) -> float:
    """Return the largest difference between the weights of two checkpoints."""
    first, second = read_tensors(find_weights(a)), read_tensors(find_weights(b))
    assert first.keys() == second.keys() and first
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="session")
def runs(request, training_yaml, tmp_path_factory):
    """Two ranks. Return a function: (model, name) → run folder.

    Names: ``stage0`` is the reference; an unchanged preset runs for two iterations; ``zero1>zero1_offload`` starts with
    one preset and resumes with the other, with small buffers and two batches an iteration.
    """
    top = tmp_path_factory.mktemp("presets")
    sft = top / "sft.yaml"
    shipped = read(CONFIGS / "sft.yaml")["deepspeed"]["zero_optimization"]
    sft.write_text(yaml.safe_dump({"deepspeed": {"zero_optimization": {**shipped, "stage": 0}}}))
    jobs = []

    def add(model: str, name: str, presets: list[str], *overrides: str) -> None:
        files = [str(CONFIGS / "deepspeed" / f"{one}.yaml") for one in presets]
        common = [f"args.save={top / model / name}", "args.lr_decay_style=constant", "args.ema_decay=0.9"]
        jobs.append({"bases": [*training_yaml(MODELS[model]), str(sft), *files], "overrides": [*common, *overrides]})

    for model in {model for (model, _) in asked(request, "model", "name")} | {"full"}:
        add(model, "stage0", [], f"args.train_iters={ITERS}", "args.save_interval=2")
    for model, name in asked(request, "model", "name"):
        add(model, name, [name], "args.train_iters=2")
    accumulate = ["deepspeed.train_micro_batch_size_per_gpu=1", "deepspeed.gradient_accumulation_steps=2"]
    for (first,) in asked(request, "begun_with"):
        second = other(first)
        more = [*SMALL, *accumulate, f"args.train_iters={ITERS}"]
        add("full", f"{first}>{second}", [first], *more, f"args.exit_interval={ITERS // 2}")
        add("full", f"{first}>{second}", [second], *more, "args.resume=auto")
    train_all(jobs, top, world=2)
    return lambda model, name: only_run(top / model / name)


@pytest.mark.thorough
@pytest.mark.parametrize(("model", "name"), BOTH)
def test_a_preset_trains_as_without_zero(runs, model, name):
    reference, found = runs(model, "stage0"), runs(model, name)
    assert losses(found) == pytest.approx(losses(reference)[:2], abs=1e-5)
    assert difference(found / "2", reference / "2") <= 1e-5
    assert difference(found / "2-ema", reference / "2-ema") <= 1e-5
    assert difference(reference / "2", reference / str(ITERS)) > 1e-4, "it trains"


@pytest.mark.thorough
@pytest.mark.parametrize("begun_with", ["zero2_offload", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_a_run_resumes_with_the_other_preset_of_its_stage(runs, begun_with):
    reference, found = runs("full", "stage0"), runs("full", f"{begun_with}>{other(begun_with)}")
    assert (found / f"config_from_{ITERS // 2}.yaml").is_file()
    assert losses(found) == pytest.approx(losses(reference), abs=1e-5)
    assert difference(found / str(ITERS), reference / str(ITERS)) <= 1e-5
    assert difference(found / f"{ITERS}-ema", reference / f"{ITERS}-ema") <= 1e-5


# Memory and traffic

RANKS, BATCHES = 2, 2
TO_THE_OWNER = f"{ZERO}.use_multi_rank_bucket_allreduce=false"
CASES = {"stage 0": [f"{ZERO}.stage=0"], **{name: [] for name in PRESETS}, "to the owner": [TO_THE_OWNER]}
# In multiples of the network's parameters; half of them are trained, see zero_costs.py.
TRAINED = 0.5
EMA = 0.9


def bytes_per_rank(*args, **kwargs) -> tuple[float, float]:
    """Return the function in the document."""
    (block,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    scope: dict = {}
    exec(compile(block, "docs/parallelism.md", "exec"), scope)
    return scope["bytes_per_rank"](*args, **kwargs)


@pytest.fixture(scope="session")
def costs(tmp_path_factory):
    """Return name of a case → measurements on two ranks in bfloat16."""
    live = [f"{ZERO}.{key}=140000" for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance")]
    cases = []
    for name, overrides in CASES.items():
        presets = [name] if name in PRESETS else ["zero2"] * (name == "to the owner")
        overrides = [*overrides, *SMALL, *live, f"deepspeed.gradient_accumulation_steps={BATCHES}"]
        config = load("cogvideox_5b", *presets, overrides=overrides)
        section = engine_config(config.deepspeed, world_size=RANKS, dtype=torch.bfloat16)
        cases.append({"section": section, "ema_decay": EMA})
    path = tmp_path_factory.mktemp("costs") / "cases.json"
    path.write_text(json.dumps(cases))
    done = run("tests/sgm/training/zero_costs.py", [str(path)], RANKS)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(CASES, lines, strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["stage 0", *PRESETS])
def test_the_formula_for_memory_holds(costs, name):
    """On a CPU, device and host memory are the same. Buffers take up to 0.2 bytes per parameter, 16-bit weights 2.

    With offloading a parameter, here one of 32, is copied at a time.
    """
    stage = stage_of(name) if name in PRESETS else 0
    offloads = "offload" in name
    expected = sum(bytes_per_rank(1, TRAINED, RANKS, stage, ema=True, offload=offloads))
    assert expected - 0.05 <= costs[name]["memory"] <= expected + (0.75 if offloads else 0.2)


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_the_table_of_traffic_holds(costs, name):
    """An all-reduce counts twice: a ring all-reduce is a reduce-scatter and an all-gather."""
    sent = costs[name]["traffic"]
    total = 2 * sent["all_reduce"] + sent["reduce"] + sent["all_gather_into_tensor"] + sent["reduce_scatter_tensor"]
    stage = 2 if name == "to the owner" else stage_of(name) if name in PRESETS else 0
    formulas = {0: "2T", 1: "3T", 2: "(2k + 1)T", 3: "k(2P + T)"}
    values = {0: 2 * TRAINED, 1: 3 * TRAINED, 2: (2 * BATCHES + 1) * TRAINED, 3: BATCHES * (2 + TRAINED)}
    expected = (BATCHES + 1) * TRAINED if name == "to the owner" else values[stage]
    assert f"| {stage} | {formulas[stage]} |" in DOCUMENT
    # Stage 3 reuses the last weights of the forward pass in the backward pass: up to 7 % less here.
    assert expected * (0.93 if stage == 3 else 0.995) <= total <= expected * 1.005


def parameters(model: str) -> tuple[int, int]:
    """Return the numbers of all and of trained parameters, without fixed tables."""
    with without_allocating():
        network = instantiate_from_config(load(model).model["network_config"])
    sizes = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
    adapters = sum(size for name, size in sizes.items() if ".matrix_" in name)
    return sum(sizes.values()), adapters or sum(sizes.values())


TABLE = {"2B": "cogvideox_2b", "5B": "cogvideox_5b", "5B, LoRA": "cogvideox_5b_lora"}


def gib(number: float) -> str:
    return f"{number / 2**30:.1f}"


@pytest.mark.parametrize("label", TABLE)
def test_the_tables_of_memory_are_the_formula(label):
    counts = parameters(TABLE[label])
    rows = [
        f"| {label} | {stage} | {' | '.join(gib(bytes_per_rank(*counts, 2**n, stage)[0]) for n in range(6))} |"
        for stage in range(4)
    ]
    for stage in (1, 2, 3):
        costs = (gib(sum_of) for sum_of in bytes_per_rank(*counts, 1, stage, offload=True))
        rows.append(f"| {label} | `zero{stage}_offload.yaml` | {' | '.join(costs)} |")
    assert [row for row in rows if row not in DOCUMENT] == [], "\n".join(rows)


@pytest.mark.parametrize(
    ("model", "label"), [("cogvideox_2b", "the 2B"), ("cogvideox_5b", "the 5B"), ("cogvideox1.5_5b", "the 1.5-5B")]
)
def test_the_activations_of_the_document(model, label):
    config = load(model)
    params = config.model["network_config"]["params"]
    latents = (params["num_frames"] - 1) // params["time_compressed_rate"] + 1
    frames = -(-latents // Geometry.from_network(params).patch_size[0])
    assert config.args.sampling_image_size is not None
    height, width = config.args.sampling_image_size
    text = params["modules"]["pos_embed_config"]["params"]["text_length"]
    tokens = text + frames * (height // 16) * (width // 16)
    size = tokens * params["hidden_size"] * 2 * params["num_layers"]
    assert f"{gib(size)} GiB in {label}" in " ".join(DOCUMENT.split())


def test_the_sums_of_the_document():
    text = " ".join(DOCUMENT.split())
    total, _ = parameters("cogvideox_5b")
    with_adapters, trained = parameters("cogvideox_5b_lora")
    assert f"{gib(2 * total)} GiB each for a 5B" in text
    assert f"up to {16 * total / 1e9:.0f} GB for a 5B" in text
    assert f"sends {3 * trained / 1e9:.1f} billion numbers" in text
    assert f"and {(2 * with_adapters + trained) / 1e9:.1f} billion at stage 3" in text


# Several machines


def test_settings_of_deepspeed_in_the_document_are_accepted():
    commands = re.findall(r"^.*finetune_\w+\.sh .*$", DOCUMENT, flags=re.MULTILINE)
    assert len(commands) >= 7
    for name in re.findall(r"`deepspeed\.([\w.]+)(?:=\S+)?`", DOCUMENT):
        section = load("cogvideox_5b", "zero2", overrides=[f"deepspeed.{name}=1"]).deepspeed
        for part in name.split("."):
            section = section[part]
        assert section == 1


STUBS = {
    "scontrol": 'case "$1" in show) printf "localhost\\nlocalhost\\n" ;; requeue) touch "$STATE/requeued-$2" ;; esac',
    "scancel": '[[ "$*" == "--signal=TERM $SLURM_JOB_ID" ]] && kill -TERM $(cat "$STATE/tasks")',
    "srun": """
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
echo "${tasks[@]}" >"$STATE/tasks"
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
""",
}
JOB = 10000 * 7 + os.getpid() % 10000  # so that concurrent test runs use different ports


@pytest.fixture
def slurm(tmp_path):
    """The script, for two machines with one process each, and an environment with a mock Slurm."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "a,b", "SLURM_NNODES": 2}
    given |= {"SLURM_GPUS_ON_NODE": 1, "SLURM_CPUS_PER_TASK": 1}
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    given = {name: str(value) for name, value in given.items()} | {"STATE": str(tmp_path), "PATH": path}
    return SLURM, ENV | given | {"PYTHON": sys.executable}


@pytest.fixture
def submit(slurm):
    """Return a function that starts the script with arguments; processes left running are killed after the test."""
    script, environment = slurm
    jobs: list[psutil.Popen] = []

    def start(*words: str) -> psutil.Popen:
        jobs.append(psutil.Popen(["bash", str(script), *words], cwd=ROOT, env=environment))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.is_running():
            for process in [*job.children(recursive=True), job]:
                process.kill()
            job.wait()


@pytest.mark.slow  # 30 s: two machines, a kill, a restart
def test_the_script_for_slurm_goes_on_after_its_time(submit, training_yaml, tmp_path):
    """The time limit ends the job after some iterations, Slurm requeues it, and the losses equal those of one run."""
    bases = [*training_yaml(MODELS["lora"]), str(CONFIGS / "deepspeed" / "zero2.yaml")]
    overrides = ["args.train_iters=1000", "args.resume=auto", *SMALL]
    save, reference = tmp_path / "runs", tmp_path / "reference"
    job, end = submit(*bases, *overrides, f"args.save={save}"), time.monotonic() + 180
    while not any(path.read_text().count("\n") >= 2 for path in save.glob("*/metrics.jsonl")):
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0
    assert [path.name for path in tmp_path.glob("requeued-*")] == [f"requeued-{JOB}"]
    done = int((only_run(save) / "latest").read_text())
    assert submit(*bases, *overrides, f"args.save={save}", "args.exit_interval=2").wait(180) == 0
    overrides += [f"args.save={reference}", f"args.exit_interval={done + 2}"]
    train_all([{"bases": bases, "overrides": overrides}], tmp_path, world=2)
    assert losses(only_run(save)) == losses(only_run(reference)) and done >= 2


def test_the_script_for_slurm_asks_for_what_the_launcher_reads():
    text = SLURM.read_text()
    launcher = (ROOT / "finetune_multi_gpus.sh").read_text()
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE"):
        assert name in text and name in launcher
    commands = re.findall(r"^sbatch (?:--array=0-3 )?scripts/finetune_slurm.sh (.*)$", DOCUMENT, flags=re.MULTILINE)
    one, array = (training.parse(shlex.split(command)).overrides for command in commands)
    assert one == array[:1] == ["args.train_data=my_clips"]


@pytest.mark.parametrize(("gpus", "said"), [("4", "4 16\n"), ("", "8 8\n"), ("80", "80 1\n")])
def test_the_script_for_slurm_starts_a_process_for_each_gpu_that_was_asked_for(slurm, tmp_path, gpus, said):
    script, environment = slurm
    (tmp_path / "srun").write_text("#!/bin/sh\necho $NPROC_PER_NODE $OMP_NUM_THREADS\n")
    given = environment | {"SLURM_GPUS_ON_NODE": gpus, "SLURM_CPUS_PER_TASK": "64"}
    done = subprocess.run(["bash", str(script)], cwd=ROOT, env=given, capture_output=True, text=True, check=True)
    assert done.stdout == said


@pytest.mark.parametrize(
    ("array", "job"), [({}, "41"), ({"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "3"}, "41_3")]
)
def test_the_end_of_one_task_of_an_array_is_not_that_of_the_others(slurm, tmp_path, array, job):
    """The number of a task may be that of the whole array, which scancel and scontrol take for all of its tasks."""
    script, environment = slurm
    (tmp_path / "srun").write_text('#!/bin/sh\nmkdir "$STATE/$$"; exec sleep 60\n')
    (tmp_path / "scancel").write_text('#!/bin/sh\necho "$2" >"$STATE/signalled"; cd "$STATE"; kill -TERM [0-9]*\n')
    given, end = environment | {"SLURM_JOB_ID": "41"} | array, time.monotonic() + 60
    with subprocess.Popen(["bash", str(script), "a.yaml"], cwd=ROOT, env=given) as process:
        while not [*tmp_path.glob("[0-9]*")] and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 0
    assert (tmp_path / "signalled").read_text() == f"{job}\n" and (tmp_path / f"requeued-{job}").exists()


def test_tasks_of_an_array_have_runs_and_ports_of_their_own(slurm, tmp_path):
    script, environment = slurm
    (tmp_path / "srun").write_text(
        """#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\necho $MASTER_PORT "$@"\n"""
    )

    def started(**given: str) -> list[str]:
        words = ["bash", str(script), "a.yaml", "args.experiment_name=seed%a", "args.x='b c'"]
        done = subprocess.run(words, cwd=ROOT, env=environment | given, capture_output=True, text=True, check=True)
        return done.stdout.split(" ")

    port, *words = started(SLURM_JOB_ID="41", SLURM_ARRAY_TASK_ID="3")
    assert " ".join(words).endswith(" launcher a.yaml args.experiment_name=seed3 args.x='b c'\n")
    assert port == "20041" and started(SLURM_JOB_ID="42", SLURM_ARRAY_TASK_ID="4")[0] == "20042"
