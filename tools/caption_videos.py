"""Write captions with a local vision-language model, for clips without one.

    python tools/caption_videos.py my_clips --model my-vlm --frames 8 --batch_size 4
    torchrun --nproc_per_node=8 tools/caption_videos.py my_clips --model my-vlm

The model is a folder of Hugging Face transformers: image-text-to-text, with a chat template. Nothing is downloaded, and
no code in the folder is run. Captions are written to labels/ beside videos/, or beside the clip if there is no videos/.
Decoding is greedy. After an interruption, the same command continues: clips with a caption are skipped, unless
--overwrite is given. Under torchrun, the clips are divided among the processes.

Exit codes: 0 all clips have captions, 1 some have none, 2 wrong input.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from sgm import distributed
from sgm.cli import run_command, tool_parser
from sgm.data.clips.decode import ClipError, read_frames, scan
from sgm.data.formats.folder import LABELS, VIDEOS, caption_path, list_folder
from sgm.data.formats.registry import detect
from sgm.inference.language.models import Kind, read_folder
from sgm.io import atomic_file, require_writable
from sgm.log import bar, get_logger, is_rank_zero
from sgm.util import PRECISIONS, InputError

logger = get_logger("caption_videos")

PROMPT = (
    "These pictures are frames of one video, in order. Describe the video in one paragraph: what is in it, what "
    "happens, the place, the light, the style, and how the camera moves. Write of the video, not of frames."
)
PICTURES = Kind(
    does="turn pictures into text",
    fetch="fetch a vision-language model tuned to instructions first, with: hf download NAME --local-dir FOLDER",
    models="AutoModelForImageTextToText",
    mapping="MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    reader="AutoProcessor",
    lacks=lambda processor: (
        "processor of pictures"
        if getattr(processor, "image_processor", None) is None
        else None
        if processor.chat_template
        else "chat template"
    ),
)
MAX_READERS = 8  # threads that decode
# Batches between all-gathers of the reports: few enough to stay below the timeout of the process group, enough that
# ranks rarely wait for each other's long captions.
BATCHES_BETWEEN_REPORTS = 8


@dataclass
class Report:
    """Results for some clips."""

    num_written: int = 0  # captions written
    num_cut: int = 0  # captions of these that reached --max_new_tokens
    problems: list[str] = field(default_factory=list)  # why other clips have no caption


class Captioner:
    """A vision-language model from a folder.

    Args:
        folder: of transformers: ``config.json``, safetensors, tokenizer, image processor and chat template.
        dtype: compute dtype; None uses that of the files.
        device: to compute on.

    Raises:
        InputError: the folder is not such a model; the message gives the reason.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> None:
        self._processor, model = read_folder(folder, PICTURES, dtype=dtype)
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # generated tokens follow the last one
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._model = model.to(device)
        ends = self._model.generation_config.eos_token_id
        self._ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends], device=device)

    @torch.inference_mode()
    def describe(self, clips: Sequence[np.ndarray], prompt: str, max_new_tokens: int) -> list[tuple[str, bool]]:
        """Describe clips.

        Args:
            clips: frames (T, H, W, 3) uint8 of each.
            prompt: question that follows the frames.
            max_new_tokens: maximum length of an answer.

        Returns:
            For each clip the answer on one line, and whether it reached the maximum length.
        """
        texts = []
        for clip in clips:
            content = [*({"type": "image"} for _ in clip), {"type": "text", "text": prompt}]
            message = {"role": "user", "content": content}
            texts.append(self._processor.apply_chat_template([message], add_generation_prompt=True))
        pictures = [list(clip) for clip in clips]
        inputs = self._processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(
            self._model.device, self._model.dtype
        )
        generated = self._model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        if not self._model.config.is_encoder_decoder:  # then the output starts with the prompt
            generated = generated[:, inputs["input_ids"].shape[1] :]
        is_cut = (~torch.isin(generated, self._ends).any(dim=1)).tolist()
        answers = self._processor.batch_decode(generated, skip_special_tokens=True)
        return [(" ".join(answer.split()), cut) for answer, cut in zip(answers, is_cut, strict=True)]


def clips_to_describe(root: Path, *, overwrite: bool) -> tuple[list[Path], list[str], int]:
    """Return the clips without a caption, problems of unreadable captions, and the number of clips.

    Raises:
        InputError: the folder does not exist, or has no clips.
    """
    rows = list_folder(root, allow_missing_captions=True)
    problems = [] if overwrite else [f"clip {row.path}: {row.problem}" for row in rows if row.problem]
    chosen = [Path(str(row.path)) for row in rows if overwrite or not (row.caption or row.problem)]
    return chosen, problems, len(rows)


def warn_of_table(root: Path) -> None:
    """Warn if the folder holds a table or archive, whose captions training reads instead of text files."""
    with contextlib.suppress(InputError):  # several tables, which training refuses
        if (kind := detect(root)) == "folder":
            return
        if (root / VIDEOS).is_dir():
            said = f"with {LABELS}/ beside {VIDEOS}/ it is a folder of clips, and captions of the {kind} are not read"
        else:
            said = "captions are written into text files, which training reads with data.params.format=folder alone"
        logger.warning("%s holds a data set of the format %s: %s", root, kind, said)


def evenly_spaced(num_frames: int, count: int) -> list[int]:
    """Return up to `count` distinct frames of a clip: the middles of equal parts."""
    return np.unique((np.arange(count) + 0.5) * num_frames // count).astype(int).tolist()


def read_ahead(clips: Sequence[Path], batch_size: int, count: int) -> Iterator[list[tuple[Path, np.ndarray | str]]]:
    """Yield batches of clips with `count` frames (T, H, W, 3), or the problem, of each; prefetch one batch."""

    def read(clip: Path) -> tuple[Path, np.ndarray | str]:
        try:
            scanned = scan(clip)
            return clip, read_frames(clip, evenly_spaced(scanned.info.num_frames, count), scanned)
        except ClipError as error:
            return clip, str(error)

    batches = [clips[start : start + batch_size] for start in range(0, len(clips), batch_size)]
    with ThreadPoolExecutor(min(batch_size, MAX_READERS)) as pool:
        ahead = [pool.submit(read, clip) for batch in batches[:1] for clip in batch]
        for k in range(len(batches)):
            now, ahead = ahead, [pool.submit(read, clip) for batch in batches[k + 1 : k + 2] for clip in batch]
            yield [future.result() for future in now]


def caption_batch(
    batch: Sequence[tuple[Path, np.ndarray | str]], captioner: Captioner, options: argparse.Namespace, report: Report
) -> None:
    """Write the captions of a batch of clips, and update the report."""
    readable = [(clip, frames) for clip, frames in batch if isinstance(frames, np.ndarray)]
    report.problems += [problem for _, problem in batch if isinstance(problem, str)]
    if not readable:
        return
    answers = captioner.describe([frames for _, frames in readable], options.prompt, options.max_new_tokens)
    for (clip, _), (text, is_cut) in zip(readable, answers, strict=True):
        if not text:
            report.problems.append(f"clip {clip}: the model says nothing; try another --prompt or a larger model")
            continue
        with atomic_file(caption_path(clip, options.folder)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        report.num_written += 1
        report.num_cut += is_cut


def work(options: argparse.Namespace) -> None:
    """Describe all clips; the number of clips without a caption is written to ``options.num_failed``."""
    for name in ("frames", "max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}; give a number of at least 1")
    options.folder = options.folder.expanduser()
    if distributed.is_launched():
        distributed.initialize()
    # Broadcast one list: a rank that lists later would see captions of the others.
    found = distributed.broadcast_from_rank_zero(_list_clips(options) if is_rank_zero() else None)
    if isinstance(found, InputError):
        raise found
    clips, problems, num_clips = found
    rank, size = distributed.data_parallel_rank(), distributed.data_parallel_size()
    done = Report(problems=list(problems))
    for problem in problems if rank == 0 else ():
        logger.error("%s", problem)
    if clips:
        dtype = PRECISIONS.get(options.dtype)
        captioner = Captioner(options.model.expanduser(), dtype=dtype, device=distributed.device())
        batches = read_ahead(clips[rank::size], options.batch_size, options.frames)
        num_batches = BATCHES_BETWEEN_REPORTS if size > 1 else 1
        num_reports = math.ceil(math.ceil(len(clips) / size) / (num_batches * options.batch_size))
        progress = bar(what="captions", total=len(clips), leave=True)
        with progress, logging_redirect_tqdm(loggers=[get_logger()]):
            for _ in range(num_reports):
                report = Report()
                for batch in islice(batches, num_batches):
                    caption_batch(batch, captioner, options, report)
                _add(distributed.all_gather_objects(report), done, progress)
    options.num_failed = len(done.problems)
    if rank == 0:
        kept = num_clips - len(clips) - len(problems)
        sys.stdout.write(f"{num_clips} clips: {done.num_written} described, {kept} had captions, ")
        sys.stdout.write(f"{options.num_failed} failed\n")
        if done.num_cut:
            sys.stdout.write(f"{done.num_cut} captions end unfinished at --max_new_tokens {options.max_new_tokens}\n")


def _list_clips(options: argparse.Namespace) -> tuple[list[Path], list[str], int] | InputError:
    """Return `clips_to_describe`, or the error, to broadcast it to the other ranks."""
    try:
        require_writable(options.folder)
        warn_of_table(options.folder)
        return clips_to_describe(options.folder, overwrite=options.overwrite)
    except InputError as error:
        return error


def _add(reports: Sequence[Report], done: Report, progress: Any) -> None:
    """Add the reports of all ranks to `done`, and log their problems."""
    for report in reports:
        done.num_written += report.num_written
        done.num_cut += report.num_cut
        done.problems += report.problems
        progress.update(report.num_written + len(report.problems))
        for problem in report.problems if is_rank_zero() else ():
            logger.error("%s", problem)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DATA_FOLDER", help="folder of clips, as in args.train_data")
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="vision-language model on disk")
    parser.add_argument("--prompt", default=PROMPT, help=f"question after the frames ({PROMPT})")
    parser.add_argument("--frames", type=int, default=8, help="evenly spaced frames that it sees of a clip (8)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="longest answer (200)")
    parser.add_argument("--batch_size", type=int, default=1, help="clips described at a time (1)")
    parser.add_argument("--dtype", choices=[*PRECISIONS], help="precision; without it, that of the model's files")
    parser.add_argument("--overwrite", action="store_true", help="describe clips with captions again")
    options = parser.parse_args(argv)
    options.num_failed = 0
    code = run_command(
        work,
        options,
        interrupted="interrupted; the same command goes on where this one stopped",
        memory_hint="lower --batch_size or --frames, or give --dtype bf16",
    )
    return code or int(options.num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
