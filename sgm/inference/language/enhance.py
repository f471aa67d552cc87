"""Prompts rewritten by a language model: any language in, English in the manner of the models' captions out.

What the text encoder would cut, or cannot read, is asked for again, and refused if that does not help. Original and
result are kept in ``enhanced_prompts.json``, so that repeating a command neither asks again nor changes a prompt; a
result that is edited there is used as it stands.
"""

import gc
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sgm.config.args import SamplingArgs
from sgm.config.load import Config
from sgm.inference.language.models import CHAT, ChatModel, Cut, Endpoint, Message, Writer, read_folder
from sgm.inference.prompts import IMAGE_SEPARATOR, Prompt
from sgm.io import parse_json, reason_of, write_json
from sgm.log import control_characters, get_logger
from sgm.util import InputError, default, instantiate_from_config

log = get_logger(__name__)

RECORD = "enhanced_prompts.json"
MAX_NEW_TOKENS = 1024  # of an answer and its thoughts
# Of these, English sentences have every fifth or sixth word; other languages, none that matter.
ENGLISH = frozenset("the of and with its is are from at by as to their his her while".split())
FEWEST_WORDS, FEWEST_ENGLISH = 15, 0.03  # a shorter text says too little of its language; share of its words
LONGER = "allow more tokens (args.prompt_enhancer_tokens or --max_new_tokens; of an endpoint, its own limit)"
WORDS = (120, 90, 60)  # asked for, one attempt after the other

INSTRUCTION = """\
You write prompts for a model that makes a video of a few seconds from one paragraph of English. Rewrite the \
description at the end into such a paragraph, of at most {words} words.

Keep everything that the description says: subjects, number, colours, actions and their order, place, style. Translate \
it into English if it is in another language. Add what a camera would see and the description leaves open: how the \
subjects look, how they move, what is around them, the light and its colours, the style, and how the camera moves. \
Write in the present tense, in plain declarative sentences. Name only what is there, never what is missing. Write of \
the scene, not of a video, a prompt or yourself. Answer with the paragraph alone: no title, list, quotation marks or \
comment.{picture}

Description: 一只猫在窗边睡觉，下雨
Paragraph: A grey tabby cat sleeps curled up on a wooden window sill, its flank rising and falling slowly. Raindrops \
run down the pane behind it and blur the green garden outside. Soft, cool daylight falls on its fur from the side, and \
a folded woollen blanket lies beneath its paws. Once its ear twitches at a sound, then it is still again. The camera \
moves slowly closer from the side, with a shallow depth of field, in a calm and realistic style.

Description: {text}
Paragraph:"""
PICTURE = """\
 The video begins with a picture that you cannot see: say no more about looks than the description does, and write \
above all how subjects, surroundings and camera move."""
AGAIN = "That cannot be used: {fault}. Write the paragraph again, in English, in at most {words} words."


def enhanced(config: Config, prompts: Sequence[Prompt], device: torch.device) -> list[Prompt]:
    """Return the prompts of a sampling run with texts of ``args.prompt_enhancer``; see `enhance`."""
    args = config.args
    return enhance(
        prompts,
        lambda: make_writer(args, config.overrides, device),
        instantiate_from_config(config.model["conditioner_config"]),
        Path(args.output_dir) / RECORD,
        name=args.enhancer_name,
    )


def check_enhancer(args: SamplingArgs) -> None:
    """Check folder or address of ``args.prompt_enhancer``, without reading weights or asking anything.

    Raises:
        InputError: it cannot be used; the message says why.
    """
    enhancer = args.prompt_enhancer
    assert enhancer is not None
    if args.enhances_by_endpoint:
        Endpoint(enhancer, args.enhancer_name, with_key=False)
    else:
        read_folder(Path(enhancer).expanduser(), CHAT, weights=False)


def make_writer(args: SamplingArgs, overrides: Iterable[str], device: torch.device) -> Writer:
    """Return the language model of ``args.prompt_enhancer``.

    A key is sent only to an address of the command line: that of a file may be a stranger's.
    """
    enhancer = args.prompt_enhancer
    assert enhancer is not None
    if args.enhances_by_endpoint:
        typed = any(override.startswith("args.prompt_enhancer=") for override in overrides)
        return Endpoint(enhancer, default(args.prompt_enhancer_model, ""), with_key=typed)
    length = default(args.prompt_enhancer_tokens, MAX_NEW_TOKENS)
    return ChatModel(Path(enhancer).expanduser(), device=device, max_new_tokens=length)


def enhance(
    prompts: Sequence[Prompt],
    write: Callable[[], Writer],
    conditioner: Any,
    record: Path,
    *,
    name: str,
) -> list[Prompt]:
    """Return the prompts with enhanced texts; images are kept.

    Args:
        prompts: in any language.
        write: returns the language model; called if a prompt is not recorded yet.
        conditioner: of the video model, whose tokenizer limits and reads the texts.
        record: the file that keeps originals and results.
        name: of the language model, for the record.

    Raises:
        InputError: a prompt whose enhanced text does not fit, after several attempts.
    """
    fault_of("a", conditioner)  # reads the tokenizer: what is wrong there is said before a model is read
    known = _recorded(record)
    writer = None
    results = []
    for prompt in prompts:
        entry = {"original": prompt.text, "from_image": prompt.image is not None, "prompt_enhancer": name}
        text = next((made["enhanced"] for made in known if entry.items() <= made.items()), None)
        if text is not None and (fault := fault_of(text, conditioner)):
            log.warning("%s: '%s' does not fit and is written again: %s", record, text[:60], fault)
            text = None
        if text is None:
            writer = writer or write()
            text = _enhance_one(prompt, writer, conditioner)
            log.info("prompt %d enhanced: %s", prompt.index, text)
            known = [made for made in known if not entry.items() <= made.items()] + [{**entry, "enhanced": text}]
            write_json(record, known)  # after each: an interrupted run continues here
        results.append(replace(prompt, text=text, original=prompt.text, enhancer=name))
    del writer
    gc.collect()  # the text encoder comes next, into the same memory
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
    return results


def fault_of(text: str, conditioner: Any) -> str | None:
    """Return why the text encoder cannot take a text as it is, or None."""
    if not text:
        return "the answer is empty"
    for find, says in (
        ("cut_texts", "it is too long, {}"),
        ("unknown_texts", "it is not English, the text encoder does not know {}"),
    ):
        found = getattr(conditioner, find)([text]) if hasattr(conditioner, find) else {}
        unknown = found.get(text)
        if unknown is not None and (find == "cut_texts" or unknown.wholly or any(map(str.isalpha, unknown.characters))):
            return says.format(unknown)
    return None


def language_fault(text: str) -> str | None:
    """Return why a text is no English, or None: T5 reads the letters of German and French too, and knows no word.

    Texts that a user has edited are not asked: lists of tags have none of these words either.
    """
    words = re.findall(r"[^\W\d_]+", text.lower())
    if len(words) < FEWEST_WORDS or sum(word in ENGLISH for word in words) >= FEWEST_ENGLISH * len(words):
        return None
    return "it is not English: hardly any of its words is 'the', 'of', 'and' or the like"


def answer_text(answer: str) -> str:
    """Return the paragraph of an answer: without thoughts, line breaks, quotation marks and labels around it."""
    # Templates may open the thoughts themselves.
    answer = re.split(r"</think(?:ing)?>", answer, flags=re.IGNORECASE)[-1]
    answer = re.split(r"<think(?:ing)?>", answer, flags=re.IGNORECASE)[0]  # thoughts that never ended
    answer = answer.replace(IMAGE_SEPARATOR, " ")  # it would separate an image
    text = " ".join("".join(" " if control_characters(c) else c for c in answer).split())
    text = re.sub(r"^(?:\W*(?:paragraph|prompt)\W*:\W*\s)", "", text, flags=re.IGNORECASE)
    return text.strip("\"'`“”‘’* ")


def _enhance_one(prompt: Prompt, writer: Writer, conditioner: Any) -> str:
    """Ask until a text fits; one that breaks off is taken at the last attempt, with a warning.

    Raises:
        InputError: none of the attempts does.
    """
    picture = PICTURE if prompt.image is not None else ""
    # One message of the user's: several chat templates know no system.
    asked = INSTRUCTION.format(words=WORDS[0], picture=picture, text=prompt.text)
    messages: list[Message] = [{"role": "user", "content": asked}]
    text, fault, is_cut = "", None, False
    for words in (*WORDS[1:], None):
        answer = writer.answer(messages)
        text = answer_text(answer)
        fault = fault_of(text, conditioner) or language_fault(text)
        is_cut = isinstance(answer, Cut)
        if fault is None and (words is None or not is_cut):
            if is_cut:
                log.warning(
                    "prompt %d: what %s wrote breaks off at the longest answer; %s", prompt.index, writer.name, LONGER
                )
            return text
        if is_cut:
            fault = f"it breaks off at the longest answer{'' if fault is None else f', and {fault}'}"
        again = AGAIN.format(fault=fault, words=words)
        messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": again}]
    raise InputError(
        f"prompt {prompt.index} ('{prompt.text[:60]}'): {writer.name} wrote no usable prompt in {len(WORDS)} attempts; "
        f"the last: {fault} ('{text[:120]}'); {f'{LONGER}, ' if is_cut else ''}try a larger language model, or write "
        "the prompt in English yourself"
    )


def _recorded(record: Path) -> list[dict[str, Any]]:
    """Return the entries of a record; none if there is no file.

    Raises:
        InputError: the file is malformed.
    """
    try:
        entries = parse_json(record.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"{record} cannot be read ({reason_of(error)}); correct it, or remove it") from error
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("enhanced"), str) for entry in entries
    ):
        raise InputError(f"{record} is no list of enhanced prompts; correct it, or remove it")
    return entries
