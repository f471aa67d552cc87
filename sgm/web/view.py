"""Components of the page with words in the chosen language, and what a run shows while it works."""

import base64
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from sgm.inference.progress import Progress
from sgm.web.controls import Control
from sgm.web.words import as_html, has, say

Words = str | Callable[[str], Any]  # a key of the words, or language → value

STYLE = """
.status { padding: 0.5rem 0; overflow-wrap: anywhere; } .status progress { width: 100%; }
.status pre, pre.message { white-space: pre-wrap; overflow-wrap: anywhere; }
.thumbnail img { max-width: 100%; max-height: 12rem; }
img.preview { width: 100%; border-radius: 4px; }
#head { align-items: center; } #head h1 { white-space: nowrap; } #head .wrap { justify-content: flex-end; }
.form > .block { display: flex; flex-direction: column; justify-content: flex-end; } /* boxes of a row on one line */
@media (max-width: 640px) {
  #head h1 { font-size: 1.1rem; }
  #actions { position: fixed; bottom: 0; left: 0; z-index: 1000; padding: 0.5rem; }
  #actions { background: var(--body-background-fill); }
  .gradio-container { padding-bottom: 4rem; }
}
"""
WIDTH = 120  # pixels that a component needs at least beside others: two fit on a telephone
HIDDEN: Any = "hidden"  # until there is something to show; gradio does not bring back all that is not visible
MOST_SHOWN = 1_000_000  # limits beyond it say nothing to a person


class View:
    """The components that have words, to change them all with the language."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, dict[str, Callable[[str], Any]]]] = []

    def make(self, kind: Callable[..., Any], words: dict[str, Words], **fixed: Any) -> Any:
        """Return a new component.

        Args:
            kind: its class.
            words: parameters of the class that depend on the language.
            **fixed: the others.
        """
        in_language = {name: _spoken(value) for name, value in words.items()}
        component = kind(**{name: value("en") for name, value in in_language.items()}, **fixed)
        self._made.append((component, in_language))
        return component

    @property
    def components(self) -> list[Any]:
        """The components, in the order of `updates`."""
        return [component for component, _ in self._made]

    def updates(self, language: str) -> list[Any]:
        """Return what changes the words of all components to a language."""
        return [
            gr.update(**{name: value(language) for name, value in in_language.items()}) for _, in_language in self._made
        ]

    def control(self, control: Control, value: Any, *, empty: str = "empty", **fixed: Any) -> list[Any]:
        """Return the components of a control: one, or two for a pair.

        Args:
            control: of a key.
            value: at first.
            empty: key of the words in a number that may be left empty; it is entered as text, since gradio's numbers
                turn into 0.
            **fixed: parameters that replace its own.
        """
        same: dict[str, Any] = {"elem_id": f"control-{control.name}", "min_width": WIDTH, **fixed}
        words: dict[str, Words] = {"label": f"control.{control.name}"}
        if "info" not in fixed:
            words["info"] = lambda language: hint(language, control)
        if control.kind == "switch":
            return [self.make(gr.Checkbox, words, value=bool(value), **same)]
        if control.kind == "choice":
            words["choices"] = offered(control.choices, "empty")
            return [self.make(gr.Dropdown, words, value=value or "", **same)]
        if control.kind == "text":
            return [self.make(gr.Textbox, words, value=value or "", lines=3 if control.name == "prompt" else 1, **same)]
        enter: Any = gr.Number
        if value is None or control.default is None:
            enter, words["placeholder"] = gr.Textbox, empty
        if control.kind != "pair":
            return [self.make(enter, words, value=value, **same)]
        with gr.Row(elem_id=same.pop("elem_id")):
            return [
                self.make(enter, {**words, "label": f"{part}.{control.name}"}, value=each, **same)
                for part, each in zip(("first", "second"), value or (None, None), strict=True)
            ]


def _spoken(words: Words) -> Callable[[str], Any]:
    return words if callable(words) else lambda language: say(language, words)


def offered(values: Sequence[str], none: str, *more: tuple[str, str]) -> Callable[[str], list[tuple[str, str]]]:
    """Return language → label and value of the choices of a list.

    Args:
        values: those that are their own labels.
        none: key of the words for no choice, which comes first.
        *more: key of the words and value of those that follow it.
    """
    return lambda language: [
        *((say(language, key), value) for key, value in ((none, ""), *more)),
        *((value, value) for value in values),
    ]


def hint(language: str, control: Control) -> str:
    """Return what is said below a control: its meaning and its limits."""
    parts = [say(language, f"hint.{control.name}")] if has(f"hint.{control.name}") else []
    if control.least is not None and control.most is not None and control.most < MOST_SHOWN:
        parts.append(say(language, "range", least=f"{control.least:g}", most=f"{control.most:g}"))
    return " ".join(parts)


def plain(*lines: str) -> str:
    """Return lines of status."""
    return f'<div class="status">{"<br>".join(map(as_html, lines))}</div>'


def failed(language: str, error: Exception, *, wrong_input: bool) -> str:
    """Return the message of a failure, in the program's own words."""
    head = say(language, "state.failed" if wrong_input else "state.broken")
    return f'<div class="status" role="alert"><b>{as_html(head)}</b><pre>{as_html(str(error))}</pre></div>'


def working(
    language: str,
    progress: Progress | None,
    *,
    ahead: int = 0,
    part: int = 1,
    parts: int = 1,
    preview: bytes | None = None,
) -> str:
    """Return what a job does, with a bar and the picture of its preview, a JPEG."""
    text, share = _phase(language, progress, ahead)
    counted = f"{say(language, 'state.of', part=part, parts=parts)}: " if parts > 1 else ""
    bar = "<progress></progress>" if share is None else f'<progress max="1" value="{share:.3f}"></progress>'
    return f'<div class="status">{as_html(counted + text)}{bar}{_picture(language, preview)}</div>'


def _picture(language: str, preview: bytes | None) -> str:
    if preview is None:
        return ""
    content = base64.b64encode(preview).decode()
    return f'<img class="preview" alt="{as_html(say(language, "preview.alt"))}" src="data:image/jpeg;base64,{content}">'


def _phase(language: str, progress: Progress | None, ahead: int) -> tuple[str, float | None]:
    if ahead:
        return say(language, "state.waiting", ahead=ahead), None
    if progress is None:
        return say(language, "state.starting"), None
    is_over = progress.done == progress.total
    if progress.what == "text encoder":
        return say(language, "state.loading" if is_over else "state.text"), None
    if progress.what == "steps":
        if is_over:
            return say(language, "state.decoding"), 1.0
        return say(
            language, "state.steps", done=progress.done + 1, total=progress.total
        ), progress.done / progress.total
    return say(language, "state.decoding" if is_over else "state.loading"), None
