"""Check the source against the rules of docs/architecture.md: layers, lengths, constructs illegal in library code."""

import ast
import graphlib
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# Files of tools, users and package managers, and binary data.
NOT_OURS = {".git", ".venv", ".pytest_cache", ".ruff_cache", "__pycache__", "outputs", "checkpoints", "build", "assets"}
TEST_DATA = ROOT / "tests" / "data"
SCRIPTS = ("tools", "benchmarks", "sample_video", "train_video", "setup")

# The longest prefix decides. A module may import from its own layer and from lower ones.
LAYERS = {
    "sgm": 0,
    "sgm.util": 0,
    "sgm.log": 0,
    "sgm.cli": 0,
    "sgm.io": 0,
    "sgm.project": 0,
    "sgm.urls": 0,
    "sgm.config": 0,
    "sgm.distributed": 1,
    "sgm.parallel": 1,
    "sgm.weights": 1,
    "sgm.data": 1,
    # Pure math of the modules, also used by data, weights and parallel.
    "sgm.modules.embeddings": 1,
    "sgm.modules.geometry": 1,
    "sgm.modules.in_place": 1,
    "sgm.modules.block": 1,
    "sgm.modules.block_ops": 1,
    "sgm.modules.compiled_ops": 1,
    "sgm.modules.lora": 1,
    "sgm.modules.host_activations": 1,
    "sgm.modules.kept_attention": 1,
    "sgm.modules.linears": 1,
    "sgm.modules.step_cache": 1,
    "dit_video_concat": 2,
    "data_video": 2,
    "vae_modules": 2,
    "sgm.modules": 2,
    "sgm.models": 3,
    "sgm.checks": 3,
    "sgm.conversion": 4,
    "sgm.inference": 4,
    "sgm.training": 4,
    "sgm.web": 5,
    "sample_video": 5,
    "train_video": 5,
    "setup": 5,
    "tools": 5,
    "benchmarks": 5,
}
MAX_ROOT_MODULES = 8  # of sgm/ itself; everything else is in a package
# The parts of layer 2, combined by YAML; sgm.modules itself only re-exports a name of the encoders.
PEERS = {
    "dit_video_concat": "network",
    "data_video": "data",
    "vae_modules": "autoencoder",
    "sgm.modules.diffusionmodules": "diffusion",
    "sgm.modules.encoders": "encoders",
    "sgm.modules": "encoders",
}
# What is computed or done once in a process, and would be again without them.
MEMOS = {
    "sgm.checks.meta_run._results",
    "sgm.checks.measure._measured",
    "sgm.checks.scaling.step_time._flops",
    "sgm.io._cleaned",
}
SAT_USERS = ("dit_video_concat", "sgm.modules.linears", "sgm.modules.lora", "sgm.distributed")

MAX_LINES, MAX_FUNCTION = 600, 60

DEVICE_NAMES = re.compile(r"(cuda|npu|xpu|mps|hpu|musa|mlu)(:\d+)?")
NETWORK_MODULES = {"requests", "urllib", "http", "socket", "ftplib", "aiohttp", "httpx", "huggingface_hub", "boto3"}


def named(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def project_files() -> Iterator[Path]:
    """Return the files of the project, without git, since a downloaded archive has no repository."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(
            name
            for name in folders
            if name not in NOT_OURS and not name.endswith(".egg-info") and Path(folder, name) != TEST_DATA
        )
        yield from (Path(folder, name) for name in sorted(names) if name not in NOT_OURS)


@cache
def sources() -> dict[str, Path]:
    tops = [*ROOT.glob("*.py")]
    for folder in ("sgm", "vae_modules", "tools", "benchmarks"):
        tops += (ROOT / folder).rglob("*.py")
    return {named(path): path for path in sorted(tops)}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


def library() -> list[str]:
    return [module for module in sources() if module.partition(".")[0] not in SCRIPTS]


def lookup(table: dict, module: str):
    prefix = module
    while prefix and prefix not in table:
        prefix = prefix.rpartition(".")[0]
    return table.get(prefix)


@cache
def imports(module: str) -> frozenset[str]:
    """Return all imports of a module, including those in functions; for this project the exact modules."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the full name"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in sources() else str(node.module))
    # Scripts in one folder of tools/ import each other without its name.
    folder = module.rpartition(".")[0]
    siblings = {f"{folder}.{name}" for name in found if folder.startswith("tools") and f"{folder}.{name}" in sources()}
    return frozenset(found | siblings)


def own_imports(module: str) -> set[str]:
    return set(imports(module)) & sources().keys()


def findings(check) -> list[str]:
    """Run `check(module, node)` over all syntax nodes of the library; return `file:line` of its findings."""
    return [
        f"{sources()[module].relative_to(ROOT)}:{node.lineno}"
        for module in library()
        for node in ast.walk(tree(module))
        if check(node)
    ]


def test_the_scan_sees_the_project():
    assert {"sgm.config.load", "vae_modules.layers", "dit_video_concat", "sgm.inference.run"} <= set(library())
    assert "sgm.config.load" in own_imports("sgm.inference.main"), "lazy imports count"
    assert "sgm.distributed" in own_imports("dit_video_concat")
    assert not {name.partition(".")[0] for name in library()} & {"tools", "tests", "benchmarks"}


def test_every_module_has_a_layer():
    unplaced = [module for module in sources() if lookup(LAYERS, module) is None]
    loose = [m for m in sources() if m.startswith("sgm.") and ".".join(m.split(".")[:2]) not in LAYERS]
    assert unplaced + loose == [], "give each a layer here and in docs/architecture.md"


def test_the_root_holds_few_modules():
    assert (
        len([m for m in sources() if re.fullmatch(r"sgm\.\w+", m) and sources()[m].stem != "__init__"])
        <= MAX_ROOT_MODULES
    )


def test_imports_run_downward():
    upward = [
        f"{module} (layer {lookup(LAYERS, module)}) imports {other} (layer {lookup(LAYERS, other)})"
        for module in sources()
        for other in own_imports(module)
        if lookup(LAYERS, other) > lookup(LAYERS, module)
    ]
    assert upward == []


def test_no_imports_are_circular():
    graphlib.TopologicalSorter({module: own_imports(module) for module in sources()}).prepare()


def test_peers_never_import_each_other():
    across = [
        f"{module} imports {other}"
        for module in sources()
        for other in own_imports(module)
        if lookup(LAYERS, module) == lookup(LAYERS, other) == 2 and lookup(PEERS, module) != lookup(PEERS, other)
    ]
    assert across == []


def test_only_scripts_import_scripts():
    assert [m for m in library() for other in own_imports(m) if other.partition(".")[0] in SCRIPTS] == []


def test_only_its_users_import_sat():
    users = {m for m in sources() for name in imports(m) if name.partition(".")[0] == "sat"}
    assert {"dit_video_concat", "sgm.distributed"} <= users
    assert [m for m in users if not m.startswith(SAT_USERS)] == []


def test_every_module_is_reachable():
    """Reached from a script, from a class name in a shipped YAML file, or as part of a reached package."""
    configs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "configs").rglob("*.yaml")]
    targets = {target.rpartition(".")[0] for config in configs for target in targets_in(config)}
    targets.add("sgm.models.video_diffusion")  # the class of the model section, see sgm.config.targets
    todo = [m for m in sources() if m.partition(".")[0] in SCRIPTS or m in targets]
    reached = set()
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            parents = {module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)}
            todo += own_imports(module) | (parents & sources().keys())
    assert sorted(sources().keys() - reached) == [], "nothing is kept for later"


def targets_in(value) -> Iterator[str]:
    if isinstance(value, dict):
        if "target" in value:
            yield value["target"]
        value = list(value.values())
    for entry in value if isinstance(value, list) else []:
        yield from targets_in(entry)


def test_modules_have_at_most_600_lines():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in sources().items()}
    assert {m: n for m, n in lengths.items() if n > MAX_LINES} == {}


def test_functions_have_at_most_60_lines():
    """Docstrings and parameter lists do not count."""
    long = []
    for module in sources():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                documented = len(node.body) > 1 and ast.get_docstring(node, clean=False) is not None
                length = node.end_lineno - node.body[int(documented)].lineno + 1
                if length > MAX_FUNCTION:
                    long.append(f"{module}.{node.name}: {length}")
    assert long == []


def test_every_module_has_a_docstring():
    silent = [m for m, path in sources().items() if path.stat().st_size and ast.get_docstring(tree(m)) is None]
    assert silent == []


def test_the_library_never_prints():
    def prints(node):
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"

    assert findings(prints) == [], "use sgm.log.get_logger"


def test_only_the_owner_of_process_groups_has_state_of_the_process():
    """No `global`, and no empty container in a module, which something would fill; but for memos."""

    def names(module):
        for node in ast.walk(tree(module)):
            yield from node.names if isinstance(node, ast.Global) else ()
        for node in tree(module).body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            if value is not None and ast.unparse(value) in ("[]", "{}", "list()", "dict()", "set()", "OrderedDict()"):
                yield ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])

    found = {f"{module}.{name}" for module in library() if module != "sgm.distributed" for name in names(module)}
    assert found == MEMOS


def test_the_library_names_no_accelerator():
    def names_one(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return DEVICE_NAMES.fullmatch(node.value) is not None
        is_torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
        return is_torch and DEVICE_NAMES.fullmatch(node.attr) is not None

    # "npu" is also the name of an attention kernel.
    found = [
        place
        for place in findings(names_one)
        if not place.startswith(("sgm/parallel/attention.py", "sgm/config/args.py"))
    ]
    assert found == [], "ask sgm.distributed.device(), or follow the inputs"


def test_the_library_stays_off_the_network():
    users = {(m, name.partition(".")[0]) for m in library() for name in imports(m)}
    # One function of it, which assigns names to files; the endpoint that a user names; the data behind a user's URL.
    allowed = {("sgm.conversion.writing", "huggingface_hub"), ("sgm.inference.language.models", "requests")}
    allowed |= {("sgm.data.remote.objects", "aiohttp")}
    allowed |= {("sgm.web.main", "socket")}  # whether the page's own port is free; it connects to nothing
    assert [user for user in sorted(users - allowed) if user[1] in NETWORK_MODULES] == []


def test_random_states_of_devices_are_left_alone():
    """Without devices, fork_rng saves and restores the state of every accelerator, and waits for each."""

    def forks(node):
        return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("fork_rng")

    def forks_all(node):
        return forks(node) and "devices=[]" not in map(ast.unparse, node.keywords)

    assert [*findings(forks)] and [*findings(forks_all)] == []


def test_pickles_are_never_trusted():
    loose = []
    for path in project_files():
        text = path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
        if not re.search(r"\b(torch|pickle)\.loads?\b", text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
                loose += [] if safe else [f"{path.relative_to(ROOT)}:{node.lineno}"]
    assert loose == [], "torch.load(..., weights_only=True)"


# Lookbehinds come second: a pattern that starts with one is searched for ten times slower.
ABSOLUTE = re.compile(r"/(?<![\w.}*/)\]-]/)(?:work|home|root|tmp|mnt|Users|opt|var)/|[A-Z](?<!\w[A-Z]):\\{1,2}\w")
HOSTS = re.compile(
    r"[a-z+]+://[^\s\"'<>)]*|\b[\w-]+\.(?:com|org|cn)\b|\b(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?\b", re.IGNORECASE
)
ALLOWED_HOSTS = re.compile(
    r"http://www\.apache\.org/licenses/.*|apache\.org"  # the licence
    r"|https://git-lfs.*|git-lfs\.github\.com|github\.com"  # the first line of a Git LFS pointer, for its detection
    r"|yaml\.org"  # in the name of a YAML tag
    r"|0\.0\.0\.0"  # all addresses of the machine itself, as a server in a container listens
    r"|kubeflow\.org|nvidia\.com"  # in names of Kubernetes kinds and resources
    r"|file://.*|(https?://)?127\.0\.0\.1.*"
    r"|(https?|gs|hf)://[`,]?|(gs|https)://my-.*|hf://datasets/me/.*"  # data behind URLs: protocols, and examples
    r"|(memory|nosuch)://.*|https://([^@/]*@)?host/.*|http://(\{host\}|\*+@).*"  # of its tests
    r"|env://"  # torch's URL for a rendezvous by environment variables
)


def text_files() -> Iterator[tuple[Path, str]]:
    for path in project_files():
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".sh", ".cfg", ".txt", ".json", ""}:
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_file_names_an_absolute_path():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path, text in text_files()
        if path != Path(__file__) and ABSOLUTE.search(text)
        for number, line in enumerate(text.splitlines(), start=1)
        if ABSOLUTE.search(line)
    ]
    assert found == [], "write paths relative to the project"


def test_no_file_names_a_host():
    found = [
        f"{path.relative_to(ROOT)}: {host}"
        for path, text in text_files()
        if path not in (Path(__file__), ROOT / "constraints.txt")
        for host in HOSTS.findall(text)
        if not ALLOWED_HOSTS.fullmatch(host)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("pattern", "caught", "free"),
    [
        (
            ABSOLUTE,
            ["open('/home/me/x')", "load: /mnt/weights/a", r"C:\weights"],
            ["a/tmp/b", "sgm/data/", "{x}/opt/"],
        ),
        (HOSTS, ["https://example.net/x", "see example.com", "10.0.0.1:80"], ["self.network", "torch 2.10.0", "a.b.c"]),
    ],
)
def test_the_patterns_catch_what_they_should(pattern, caught, free):
    assert all(pattern.search(text) for text in caught)
    assert not any(pattern.search(text) for text in free)
