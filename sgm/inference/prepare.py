"""Check a sampling run before weights are read."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import sgm.distributed
from sgm.checks.mesh import check_mesh, mesh_of
from sgm.checks.planner import config_with, sampling_rows
from sgm.checks.sampling import as_table, dry_run, problems_of
from sgm.checks.sampling_plan import check_sampling
from sgm.config.load import Config, ConfigError, Problem
from sgm.config.precision import resolve_precision
from sgm.distributed import Mesh, resolve_device
from sgm.inference.language.enhance import check_enhancer
from sgm.inference.prompts import IMAGE_SEPARATOR, Prompt, check_images, check_words, parse_prompts, read_prompts
from sgm.inference.results import sample_folder
from sgm.inference.source_video import check_clip, check_whole, held_problems
from sgm.io import require_writable
from sgm.modules.encoders.modules import WORDS_CURE, texts_without_words
from sgm.modules.geometry import Geometry
from sgm.project import shipped
from sgm.util import InputError, default, instantiate_from_config
from sgm.weights.adapters import with_adapters
from sgm.weights.lora.several import with_loras


@dataclass(frozen=True)
class Prepared:
    """A checked run.

    Attributes:
        config: its configuration, with a ``lora_config`` if the weights are adapters.
        findings: summary of the checks.
        dtype: of the network.
        mesh: the groups of ranks.
        prompts: None for input from the terminal.
        notes: about prompts that the tokenizer knows or takes in part.
    """

    config: Config
    findings: str
    dtype: torch.dtype
    mesh: Mesh
    prompts: list[Prompt] | None
    notes: Sequence[str] = ()

    def report(self, card: float | None = None) -> str:
        """Return a summary of the checks with estimates of memory and traffic, which take seconds.

        Args:
            card: GiB of the card to plan for; None takes the accelerator, if there is one.
        """
        report = f"{self.findings}\n{as_table(sampling_rows(self.config, self.dtype, card))}"
        if self.prompts is None:
            return report
        args = self.config.args
        source = args.input_file if args.prompt is None else "args.prompt"
        by = "" if args.prompt_enhancer is None else f", each written anew by {args.enhancer_name} when sampling"
        return "\n".join([report, f"prompts: {len(self.prompts)} from {source}{by}", *self.notes])


def prepare(config: Config, *, for_card: bool = False) -> Prepared:
    """Run all checks that need no weights, without writing files.

    Args:
        config: of the run.
        for_card: allow the precisions of accelerators, also where this machine has none.

    Raises:
        ConfigError: every problem of the configuration, checkpoint files, prompts, images and output folder.
    """
    findings, prompts, problems = "", None, []
    source = "args.input_file" if config.args.prompt is None else "args.prompt"
    try:
        config = with_loras(with_adapters(config))
        findings = dry_run(config, for_card=for_card)
        problems += _mesh_problems(config)
    except ConfigError as error:
        problems += error.problems
    try:
        prompts = _read_prompts(config)
    except InputError as error:
        if not any(problem.path == source for problem in problems):
            problems.append(Problem(source, "", str(error), "correct the prompts"))
    output = config.args.output_dir
    folders = [sample_folder(output, prompt, 0).relative_to(output) for prompt in prompts or ()]
    writable = partial(require_writable, output, *(f"{folder}/000000.mp4" for folder in folders))
    problems += problems_of("args.output_dir", "name another folder", writable)
    if (preview := config.args.preview) is not None:
        writable = partial(require_writable, Path(preview).parent, Path(preview).name)
        problems += problems_of("args.preview", "name another picture", writable)
    notes: list[str] = []
    if config.args.prompt_enhancer is not None:
        problems += problems_of("args.prompt_enhancer", "name another", partial(check_enhancer, config.args))
    if not problems:
        problems += _clip_problems(config, prompts or (), notes)
    if not problems:  # they would be those of the text encoder again
        problems += problems_of(source, "correct the prompts", lambda: notes.extend(_words(config, prompts)))
    if problems:
        raise ConfigError(config.located(list(dict.fromkeys(problems))))
    device_type = "" if for_card else resolve_device(config.args).type
    dtype = resolve_precision(config.args, config.model.get("precision"), device_type)
    return Prepared(config, findings, dtype, mesh_of(config), prompts, notes)


def memory_report(config: Config, card: float | None) -> str:
    """Return the estimates of a run whose weights or prompts are not there yet."""
    dtype = resolve_precision(config.args, config.model.get("precision"), "")  # of any accelerator
    return as_table(sampling_rows(config_with(config), dtype, card))


def _mesh_problems(config: Config) -> list[Problem]:
    geometry = Geometry.from_network(config.model["network_config"]["params"])
    plan = check_sampling(config.args, geometry)
    patches = None if plan.size is None else geometry.num_patches(plan.latents_at_once, plan.size)
    return check_mesh(config, num_patches=patches)


def _read_prompts(config: Config) -> list[Prompt] | None:
    """Read the prompts and decode their images; None for input from the terminal."""
    args = config.args
    if args.asks_for_prompts:
        if sgm.distributed.is_launched():
            raise InputError("args.input_type=cli needs a single process; start one, or use input_type=txt")
        return None
    geometry = Geometry.from_network(config.model["network_config"]["params"])
    image2video = geometry.image_conditioned and args.start is None  # which gives the image
    control = geometry.control_channels > 0 and args.control is None
    if args.prompt is not None:
        line = args.prompt if args.image is None else f"{args.prompt}{IMAGE_SEPARATOR}{args.image}"
        if not args.prompt.strip():
            raise InputError("args.prompt is blank; write what the video shows")
        if control:
            raise InputError("the network takes a control video: give args.control=<file> beside args.prompt")
        if image2video and IMAGE_SEPARATOR not in line:
            raise InputError("this is an image-to-video model, which needs an image: give args.image=<file> too")
        if args.image is not None and not image2video:
            cure = "remove args.image, or use an image-to-video model"
            raise InputError(f"args.image is given, and this is a text-to-video model; {cure}")
        prompts = parse_prompts([line], image2video=image2video, source="args.prompt")
    else:
        assert args.input_file is not None, "the configuration is refused without it"
        prompts = read_prompts(args.input_file, image2video=image2video, control=control)
    check_images(prompts)
    return prompts if args.control is None else [replace(p, control=Path(shipped(args.control))) for p in prompts]


def _clip_problems(config: Config, prompts: Sequence[Prompt], notes: list[str]) -> list[Problem]:
    """Return the problems of the clips that sampling is given, and note what is taken of them."""
    problems: list[Problem] = []
    plan = check_sampling(config.args, Geometry.from_network(config.model["network_config"]["params"]))
    source = "args.input_file" if config.args.control is None else "args.control"
    for path in dict.fromkeys(str(prompt.control) for prompt in prompts if prompt.control is not None):
        cure = "name another clip, or correct args.sampling_num_frames or args.sampling_fps"
        problems += problems_of(
            source, cure, lambda path=path: notes.append(f"control: {check_whole(path, plan)}, shown to both branches")
        )
    for key in ("video", "mask", "start", "end"):
        if getattr(config.args, key) is not None:
            cure = f"correct args.{key}, args.sampling_num_frames or args.sampling_fps"
            check = partial(check_clip, config.args, plan, key)
            problems += problems_of(f"args.{key}", cure, lambda check=check, key=key: notes.append(f"{key}: {check()}"))
    return problems or list(held_problems(config.args, plan))


def _words(config: Config, prompts: list[Prompt] | None) -> Iterator[str]:
    """Refuse prompts of which the tokenizer knows no word; yield a line for each that it knows or takes in part.

    Raises:
        InputError: a prompt, or the negative prompt, is refused.
    """
    conditioner = instantiate_from_config(config.model["conditioner_config"])
    prompts = None if config.args.prompt_enhancer is not None else prompts  # the texts are not known yet
    others = {key: default(getattr(config.args, key), "") for key in ("negative_prompt", "inversion")}
    if not config.args.allow_unknown_text:
        check_words(prompts or (), conditioner)
        for key, text in others.items():
            if reasons := texts_without_words(conditioner, [text]):
                raise ConfigError([Problem(f"args.{key}", "", reasons[text], WORDS_CURE)])
    named = {f"prompt {prompt.index}": prompt.text for prompt in prompts or ()}
    named |= {key.replace("_", " "): text for key, text in others.items()}
    texts = list(dict.fromkeys(named.values()))
    finders = (getattr(conditioner, name, None) for name in ("unknown_texts", "cut_texts"))
    unknown, cut = (find(texts) if find else {} for find in finders)
    for name, text in named.items():
        if text in unknown:
            yield f"{name}: unknown to the tokenizer, and lost: {unknown[text]}"
        if text in cut:
            yield f"{name}: cut, since {cut[text]}"


def make_folder(folder: Path) -> None:
    """Make the output folder and check by a temporary file that it is writable; permissions do not prove it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a unique name, since ranks share the folder
            pass
    except OSError as error:
        raise InputError(f"args.output_dir '{folder}' cannot be written to ({error}); name another folder") from error
