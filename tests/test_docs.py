"""Test the documentation: commands, links, paths, keys, tables and trees."""

import ast
import importlib
import inspect
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import yaml

from sgm.checks.sampling import check_shapes
from sgm.checks.sampling_plan import check_sampling
from sgm.checks.training import check_training_data
from sgm.config.deepspeed_section import engine_config, follow_batch
from sgm.config.load import TRAINING_ARGS, SamplingArgs, load_config
from sgm.config.precision import resolve_precision, resolve_training_precision
from sgm.config.yaml_files import ALIASES
from sgm.inference.main import main, parse
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.modules.geometry import Geometry
from sgm.training import main as training
from sgm.training.inputs.precompute import before_encoding
from sgm.training.prepare import prepare
from sgm.weights.files import find_weights
from tests.processes import forked_env

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RELEASED = sorted(path.stem for path in (ROOT / "configs").glob("cogvideox*.yaml"))

# Commands not run here, with the reason; tests below check their arguments.
NOT_RUN = {
    r".*\bconfigs/toy_land\.yaml": "trains for minutes, on clips of the demo; checked below on such clips",
    r"make( |$)": "runs everything, this file too; test_packaging.py has make list the steps",
    r"pip install ": "changes the environment",
    r"(\.venv/bin/)?python -m pytest ": "runs tests, which would run twice",
    r"python -m benchmarks( |$|\.(bench|control|data|gpu|growth|kills|loading|saves|scaling|steps))": "takes minutes",
    r"python -m benchmarks\.accelerator_code": "compiles; a slow test of test_bench.py runs it",
    r".*torchrun .*-m benchmarks\.shared_decode": "takes minutes",
    r"python tools/sweep\.py": "trains several runs; test_sweep.py plans them, and trains shorter ones",
    r"python tools/toy/make_assets\.py": "takes hours",
    r"python tools/toy/soak\.py": "takes hours; test_soak.py runs it on made-up readings",
    r"python tools/toy/from_video\.py": "takes minutes; test_from_video.py compares its figures with the page",
    r"python tools/toy/adapters\.py": "takes minutes; test_adapters.py compares its figures with the page",
    r"python tools/toy/timesteps\.py": "takes minutes; test_timesteps.py compares its figures with the page",
    r"python tools/toy/masked\.py": "takes minutes; test_masked.py compares its figures with the page",
    r"python tools/toy/preferences\.py": "takes minutes; test_preferences.py compares its figures with the page",
    r"python tools/toy/inversion\.py": "takes minutes; test_held_frames.py compares its figures with the page",
    r"python tools/toy/control\.py": "takes minutes; test_toy_control.py compares its figures with the page",
    r"python tools/toy/held_frames\.py": "takes minutes; test_held_frames.py compares its figures with this page",
    r"python tools/toy/loops\.py": "takes minutes; test_loops.py compares its figures with the page",
    r"python tools/toy/low_memory\.py": "takes minutes; test_low_memory.py compares its figures with the page",
    r"python tools/toy/inpainting\.py": "takes minutes; test_inpainting.py compares its figures with the page",
    r"python tools/toy/long_clips\.py": "takes minutes; test_long_clips.py compares its figures with the page",
    r"python tools/model_table\.py --write README\.md": "writes into the project; the table is compared instead",
    r".*\bcheckpoints/5b/model\.yaml": "needs what the command before it writes",
    r".*\bconfigs/cogvideox": "needs released weights",
    r".*\bargs\.load=\S+-\d\d-\d\d-\d\d-\d\d": "needs a run that was trained",
    r"bash finetune_\w+\.sh$": "trains for minutes; test_launchers.py runs it for two steps",
    r".*\b(ckpts|CogVideoX-5b|my-|weights\.safe)": "needs released weights or a user's own",
    r"python tools/contact_sheet\.py outputs/toy outputs/toy_i2v ": "works on what the demo leaves",
    r"python tools/evaluate\.py outputs/toy ": "works on what the demo leaves",
    r"python tools/contact_sheet\.py outputs/land": "works on what the demo trains; test_video.py draws such pictures",
    r"hf download": "downloads",
    r"python \w+\.py --help": "shows what test_key_help.py compares",
    r"bash inference\.sh$": "the fixture `demo` has run it",
    # test_the_example_of_conversion_runs and test_prepare_dataset.py run them in order.
    r".*\boutputs/example\b": "one command builds on another",
    r"tensorboard |python tools/web\.py": "serves until it is interrupted",
}

LONG = re.compile(r"^python -m benchmarks|--devices")  # measure on meta tensors: seconds
RANKS = "NPROC_PER_NODE="  # of commands with several ranks: test_launchers.py runs a shorter one


@dataclass(frozen=True)
class Command:
    document: str
    text: str

    @property
    def reason_not_to_run(self) -> str | None:
        return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, self.text)), None)

    @property
    def words(self) -> list[str]:
        """The words without leading variables."""
        words = shlex.split(self.text)
        while re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        return words


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands() -> Iterator[Command]:
    for path in DOCUMENTS:
        for block in blocks(path, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield Command(str(path.relative_to(ROOT)), " ".join(line.split()))


ALL = list(dict.fromkeys(commands()))
RUN = list(dict.fromkeys(command.text for command in ALL if command.reason_not_to_run is None))
ON_THE_DEMO = [command.text for command in ALL if command.reason_not_to_run == "works on what the demo leaves"]
NEED_WEIGHTS = [command for command in ALL if command.reason_not_to_run == "needs released weights"]
TRAIN = [command for command in NEED_WEIGHTS if re.search(r"train_video\.py|finetune_", command.text)]
SAMPLE = [command for command in NEED_WEIGHTS if re.search(r"sample_video\.py|inference\.sh", command.text)]
CONVERT = [
    c for c in ALL if re.match(r"python tools/(convert|export|import|merge)_", c.text) and "example" not in c.text
]


def labelled(value) -> str:
    return value.text if isinstance(value, Command) else str(value)


def test_the_commands_are_found():
    assert {"README.md", "docs/configuration.md"} <= {command.document for command in ALL}
    assert "bash inference.sh" in [command.text for command in ALL] and ON_THE_DEMO
    assert len(RUN) >= 6 and len(SAMPLE) >= 10 and len(TRAIN) >= 5
    assert any(re.match(pattern, command.text) for command in ALL for pattern in NOT_RUN)


def test_code_blocks_name_their_language():
    for path in DOCUMENTS:
        fences = re.findall(r"^```(\w*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert len(fences) % 2 == 0, f"{path.name}: a fence is left open"
        assert set(fences[0::2]) <= {"bash", "text", "python", "yaml", "", "json"}
        for block in blocks(path, "") + blocks(path, "text"):
            commanded = re.search(r"(sample|train)_video\.py --base|finetune_\w+\.sh (configs|args)", block)
            assert not commanded, f"{path.name}: mark commands as bash, so that they are tested"


# Commands that are run


@pytest.fixture
def as_a_command(monkeypatch):
    """Return the main functions of the scripts; the working directory is restored after the test."""
    monkeypatch.chdir(ROOT)
    return {"sample_video.py": main, "train_video.py": training.main}


def shell(text: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a command line; `python` is a fork, see `tests.processes`."""
    words = ["bash", "-c", text]
    return subprocess.run(words, cwd=folder, env=forked_env(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(c, marks=[pytest.mark.slow] * c.startswith(RANKS) + [pytest.mark.thorough] * bool(LONG.search(c)))
        for c in RUN
    ],
    ids=labelled,
)
def test_a_command_runs(text, tmp_path, as_a_command):
    """Write to a temporary folder, and sample in two steps.

    Python commands that sample or train are only checked, since they differ only in arguments.
    """
    given = text.replace("outputs/", f"{tmp_path}/")
    script = text.split()[1]
    if script in as_a_command:
        given += f" args.output_dir={tmp_path} args.save={tmp_path}" if "outputs/" not in text else ""
        assert as_a_command[script](shlex.split(given)[2:] + ["--check"]) == 0
        assert "--check" in text or script != "train_video.py", "give commands that train --check, or list them above"
        assert not [*tmp_path.rglob("*.mp4")]
        return
    samples = re.search(r"sample_video\.py|inference\.sh", text) and "--check" not in text
    done = shell(given + (" args.num_steps=2" if samples else ""))
    assert done.returncode == 0, done.stderr
    assert bool([path for path in tmp_path.rglob("000000.mp4") if path.with_suffix(".json").is_file()]) is bool(samples)
    for option in ("--out", "--json", "--contact_sheet"):
        assert option not in text or Path(shlex.split(given)[shlex.split(given).index(option) + 1]).is_file()


@pytest.mark.parametrize("text", ON_THE_DEMO, ids=labelled)
def test_a_command_runs_on_what_the_demo_leaves(text, demo):
    done = shell(text, demo)
    assert done.returncode == 0, done.stderr
    assert (demo / text.split("--out ")[1]).is_file()


@pytest.mark.thorough
def test_commands_that_train_on_clips_of_the_demo_are_right(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = shell(f"python tools/toy/concept.py make {tmp_path}/clips")
    assert made.returncode == 0, made.stderr
    trained = [command for command in ALL if "checked below on such clips" in (command.reason_not_to_run or "")]
    assert len(trained) >= 2
    for command in trained:
        options = training.parse([*command.words[2:], f"args.train_data=[{tmp_path}/clips]", f"args.save={tmp_path}"])
        plan = prepare(before_encoding(load_config(options.base, options.overrides, mode="train")), check_clips=True)
        assert plan.trainable.adapters and plan.total_iters == 300


SHORT = ["args.train_iters=2", "args.eval_interval=null", "args.valid_prompts=null", "args.num_workers=0"]
SHORT += ["deepspeed.train_micro_batch_size_per_gpu=1"]


@pytest.mark.thorough
def test_the_example_of_conversion_runs(tmp_path):
    """Run the example of docs/conversion.md, with two training and three sampling steps."""
    block = next(b for b in blocks(ROOT / "docs" / "conversion.md", "bash") if "outputs/example" in b)
    assert len(block.splitlines()) >= 9
    text = block.replace("outputs/", f"{tmp_path}/").replace("train_iters=20", " ".join(SHORT).removeprefix("args."))
    printed = ""
    text = text.replace("save_interval=10", "save_interval=1").replace("/*/10", "/*/1").replace("/*/20", "/*/2")
    for line in text.replace("--num_inference_steps 30", "--num_inference_steps 3").replace("\\\n", " ").splitlines():
        done = shell(line)
        assert done.returncode == 0, done.stderr[-3000:]
        printed += done.stdout
    assert "transformer: largest difference" in printed
    made = {path.name for path in (tmp_path / "example").iterdir()}
    assert made == {
        *("runs", "lora", "toy", "circle.mp4", "circle.json", "merged", "extracted", "back", "sat"),
        *("soup", "comfyui", "comfyui_lora"),
    }
    shown = (
        "LoRA for ComfyUI",
        "Toy LoRA (cogvideox-toy/lora, 64x64)",
        "ComfyUI transformer",
        "Toy (cogvideox-toy, 64x64)",
    )
    assert [text for text in shown if text not in printed] == []


# Commands that are checked without running them


def arguments(command: Command) -> list[str]:
    """Return the arguments of the script, in the order of the launchers; of an array of jobs those of number 0."""
    words = [word.replace("%a", "0") for word in command.words]
    script = next(word for word in words if re.search(r"_video\.py$|\.sh$", word))
    rest = words[words.index(script) + 1 :]
    if script.endswith(".py"):
        return rest
    return ["--base", *(w for w in rest if w.endswith(".yaml")), *(w for w in rest if not w.endswith(".yaml"))]


@pytest.mark.parametrize("command", TRAIN, ids=labelled)
def test_a_command_that_trains_released_weights_is_right(command, monkeypatch):
    """Checks everything but the files of weights and clips."""
    monkeypatch.chdir(ROOT)
    options = training.parse(arguments(command))
    config = load_config(options.base, options.overrides, mode="train")
    assert config.warnings == ()
    geometry = Geometry.from_network(config.model["network_config"]["params"])
    assert [*check_shapes(config, geometry), *check_training_data(config, geometry)] == []
    dtype = resolve_training_precision(config, "cuda")
    ranks = re.search(r"NPROC_PER_NODE=(\d+)", command.text)
    num = int(ranks[1]) if ranks else 1
    engine_config(follow_batch(config.deepspeed, world_size=num), world_size=num, dtype=dtype)
    assert config.args.train_data in (("my_clips",), ("s3://my-bucket/clips",))
    launcher = (ROOT / "finetune_multi_gpus.sh").read_text()
    ours = {*re.findall(r"(?:^| )([A-Z_]+)=", command.text)} - {"CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF"}
    assert all(name in launcher for name in ours)


@pytest.mark.parametrize("command", SAMPLE, ids=labelled)
def test_a_command_for_released_weights_is_right(command, monkeypatch):
    """Checks everything but the files; a test below compares their paths with the README."""
    monkeypatch.chdir(ROOT)
    options = parse(arguments(command))
    config = load_config(options.base, options.overrides, mode="inference")
    assert config.warnings == ()
    geometry = Geometry.from_network(config.model["network_config"]["params"])
    plan = check_sampling(config.args, geometry)
    assert check_shapes(config, geometry) == []
    resolve_precision(config.args, config.model["precision"], "cuda")
    assert config.args.input_type == "txt"
    own_prompts = any(override.startswith("args.input_file=") for override in options.overrides)
    assert own_prompts if plan.image2video else Path(config.args.input_file).is_file()
    lora = "lora_config" in config.model["network_config"]["params"]["modules"]
    assert not lora or any(override.startswith("args.load=") for override in options.overrides)


@pytest.mark.parametrize("command", CONVERT, ids=labelled)
def test_a_command_that_converts_is_right(command, monkeypatch, capsys):
    """The arguments are accepted, and the first file is missing."""
    monkeypatch.chdir(ROOT)
    assert tool(Path(command.words[1]).stem).main(command.words[2:]) == 2
    assert re.search("there is no|there is nothing|cannot be read|cannot read|does not exist", capsys.readouterr().err)


@pytest.mark.parametrize("command", [c for c in ALL if "pip install" in c.text], ids=labelled)
def test_arguments_of_pip_exist(command):
    for extra in re.findall(r"[\w]+", "".join(re.findall(r"\[(.*?)\]", command.text))):
        assert re.search(rf'"{extra}": \[', (ROOT / "setup.py").read_text())
    if "-c" in command.words:
        assert (ROOT / command.words[command.words.index("-c") + 1]).is_file()
    assert any(word.startswith(".") for word in command.words)


@pytest.mark.parametrize("command", [c for c in ALL if re.match(r"\S*python|make", c.text)], ids=labelled)
def test_paths_in_a_command_exist(command):
    words = command.words
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    elif words[1] == "-m":
        file = words[2].replace(".", "/") + ".py"
        if (ROOT / words[2]).is_dir():
            file = f"{words[2]}/__main__.py"
        assert words[2] == "pytest" or (ROOT / file).is_file()
        if words[2] != "pytest":
            assert all(f'"{word}"' in (ROOT / file).read_text() for word in words if word.startswith("--"))
    else:
        assert (ROOT / words[1]).is_file()
    paths = [word for word in words if re.match(r"(configs|tests|tools|docs|assets)/", word)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


# Trees


def paths_in(tree: str) -> Iterator[str]:
    """Yield the files of an indented listing: four spaces per level, folders end with a slash, comments after names."""
    folders: list[str] = []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 4, line.split()[0]
        folders[depth:] = [name] if name.endswith("/") else []
        if not name.endswith("/"):
            yield "".join(folders) + name


def test_the_readme_has_weights_where_the_configurations_look(tmp_path, monkeypatch):
    tree = next(block for block in blocks(ROOT / "README.md", "text") if block.startswith("checkpoints/"))
    for path in paths_in(tree):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1000\n" if path.endswith("latest") else "")
    assert "its content is: 1000" in tree
    named = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    used = set()
    monkeypatch.chdir(tmp_path)
    for name in RELEASED:
        config = load_config([ROOT / "configs" / f"{name}.yaml", ROOT / "configs" / "inference.yaml"], mode="inference")
        weights = find_weights(config.args.load)
        vae = config.model["first_stage_config"]["params"]["ckpt_path"]
        t5 = config.model["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"]
        used |= {str(weights), str(weights.parents[1] / "latest"), vae}
        used |= {path for path in named if path.startswith(t5 + "/")}
        assert Path(vae).is_file() and (Path(t5) / "spiece.model").is_file() and (Path(t5) / "config.json").is_file()
    assert used == named, "the README shows files that no configuration reads"


def test_the_tree_of_files_is_complete():
    tree = next(block for block in blocks(ROOT / "docs" / "architecture.md", "text") if "sample_video.py" in block)
    shown = {path for path in paths_in(tree) if path.endswith(".py")}
    there = {path for path in ROOT.glob("*.py") if path.name != "setup.py"}
    for folder in ("sgm", "vae_modules", "tools", "benchmarks"):
        there |= {path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"}
    assert shown == {path.relative_to(ROOT).as_posix() for path in there}


def test_results_have_the_names_in_the_readme():
    tree = next(block for block in blocks(ROOT / "README.md", "text") if block.startswith("outputs/"))
    names = {Path(path).name for path in paths_in(tree)}
    source = (ROOT / "sgm" / "inference" / "run.py").read_text()
    assert names == {"000000.mp4", "000000.json", "contact_sheet.png"}
    assert all(part in source for part in ('"contact_sheet.png"', "000000{suffix}", '".mp4"', '".safetensors"'))


# The table of models


def tool(name: str):
    spec = spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.thorough
def test_the_table_of_models_is_up_to_date(tmp_path):
    table_of = tool("model_table")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table_of.START in text and table_of.END in text
    inside = text.partition(table_of.START)[2].partition(table_of.END)[0].strip()
    assert inside == table_of.model_table(), "run: python tools/model_table.py --write README.md"
    assert table_of.put_into(text, inside) == text
    (tmp_path / "none.md").write_text("no markers")
    assert table_of.main(["--write", str(tmp_path / "none.md")]) == 2


def test_every_model_is_in_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in [*RELEASED, "toy", "toy_i2v"] if f"[{name}](configs/{name}.yaml)" not in text] == []


# Keys, paths, links, code


def code_in(path: Path) -> list[str]:
    """Inline code and code blocks."""
    text = path.read_text(encoding="utf-8")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_keys_exist(path):
    code = "\n".join(code_in(path))
    known = {*SamplingArgs.__dataclass_fields__, *TRAINING_ARGS, *(alias for _, alias in ALIASES)}
    assert set(re.findall(r"\bargs\.(?!py\b)([a-z]\w*)", code)) - known == set()
    parts = inspect.signature(SATVideoDiffusionEngine).parameters
    files = {"diffusion_model", "safetensors", "yaml"}  # prefixes of names in checkpoints, names of files
    assert set(re.findall(r"(?<![\w.])model\.([a-z]\w*)", code)) - {*parts, *files} == set()


SETTINGS = sorted(
    {
        setting
        for path in DOCUMENTS
        for code in code_in(path)
        if "\n" not in code
        for setting in re.findall(r"^(?:args|model)\.[\w.]+=\S+$", code)
    }
)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_is_accepted(setting, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = "cogvideox_5b_lora" if "lora_config" in setting else "cogvideox_5b"
    bases = [f"configs/{model}.yaml", "configs/inference.yaml"]
    config = load_config(bases, shlex.split(setting), mode="inference")
    check_sampling(config.args, Geometry.from_network(config.model["network_config"]["params"]))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_are_not_broken(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        headings = re.findall(r"^#+ (.*)$", goal.read_text(encoding="utf-8"), flags=re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        if not goal.exists() or (anchor and anchor not in slugs):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(path):
    tops = "|".join(sorted(p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in ("outputs", "checkpoints")))
    named = {
        name
        for code in code_in(path)
        for name in re.findall(rf"(?<![\w/.])(?:{tops})/[\w./-]*\w\.(?:py|md|yaml|txt|sh)\b", code)
    }
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_dotted_names_exist(path):
    """Import and look up every `sgm.module.name` in the text."""
    missing = []
    for code in code_in(path):
        for name in re.findall(r"(?<![\w.])(?:sgm|vae_modules|dit_video_concat)(?:\.(?!py\b)\w+)+", code):
            module, rest = name, []
            while module and not (ROOT / module.replace(".", "/")).is_dir() and not is_module(module):
                module, _, last = module.rpartition(".")
                rest.insert(0, last)
            value = importlib.import_module(module)
            for part in rest:
                value = getattr(value, part, None)
            missing += [name] if value is None else []
    assert missing == []


def is_module(name: str) -> bool:
    return (ROOT / (name.replace(".", "/") + ".py")).is_file()


def test_every_page_is_one_hop_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [path for path in DOCUMENTS if path.name != "README.md"]
    assert [path.name for path in pages if f"({path.relative_to(ROOT).as_posix()})" not in text] == []


def test_examples_are_valid():
    for path in DOCUMENTS:
        for block in blocks(path, "yaml"):
            assert isinstance(yaml.safe_load(block), dict)
        for block in blocks(path, "python"):
            for node in ast.parse(block).body:
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_sampler_of_the_example_samples():
    scope: dict = {}
    code = next(block for block in blocks(ROOT / "docs" / "architecture.md", "python") if "VideoSampler" in block)
    exec(compile(code, "example", "exec"), scope)
    discretization = {"target": "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization"}
    sampler = scope["RenoisingSampler"](discretization_config=discretization, num_steps=3)
    goal, seen = torch.full((1, 2, 3, 4, 4), 0.25), []

    def denoise(x, levels, cond, *, idx):
        seen.append(x)
        return goal

    generators = [torch.Generator().manual_seed(0)]
    result = sampler(denoise, torch.zeros_like(goal), {}, generators=generators)
    assert torch.equal(result, goal) and len(seen) == 3
    assert 0 < (seen[1] - goal).std() < (seen[0] - seen[1]).abs().max(), "there is fresh noise after the first step"
