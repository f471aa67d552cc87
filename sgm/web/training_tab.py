"""The tab of trainings: what is checked before one, its command, and the curves and samples of its folder."""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from sgm.util import InputError, RunError
from sgm.web import trainings
from sgm.web.browsers import owner_of
from sgm.web.choices import Folders, Model, inside, presets
from sgm.web.jobs import CancelledError, Command, Job, Jobs
from sgm.web.sessions import Sessions
from sgm.web.trainings import Training
from sgm.web.videos import Video
from sgm.web.view import HIDDEN, View, failed, offered, plain, working
from sgm.web.words import as_html, say

SECONDS = 5  # between looks at a run
MAX_SAMPLES = 12
COLORS = {"training": "#4c78a8", "validation": "#f58518"}  # of the curves
QUARTERS = ("train.quarter.0", "train.quarter.1", "train.quarter.2", "train.quarter.3")


class TrainingTab:
    """The tab and its handlers; the parameters are those of `SampleTab`, `models` all of them."""

    def __init__(self, view: View, folders: Folders, models: dict[str, Model], queue: Jobs, sessions: Sessions) -> None:
        self.view, self.folders, self.models, self.queue, self.sessions = view, folders, models, queue, sessions
        self.recipes = trainings.find_recipes(folders.configs)
        self.memory = presets(folders.configs, "memory")

    def build(self, language: Any, tab: Any) -> None:
        """Make the components and connect them."""
        make = self.view.make
        with gr.Row():
            model = make(gr.Dropdown, {"label": "train.model"}, choices=list(self.models), value=self._first_model())
            first = trainings.recipe_for(self._first_model(), self.recipes)
            recipe = make(gr.Dropdown, {"label": "train.recipe"}, choices=list(self.recipes), value=first)
        with gr.Row():
            found = [str(path) for path in trainings.find_data(self.folders.data)]
            # Any path may be sent; `inside` decides.
            data = make(
                gr.Dropdown,
                {"label": "train.data"},
                choices=found,
                value=found[0] if found else None,
                allow_custom_value=True,
                elem_id="data",
            )
            words = {"label": "memory", "choices": offered(list(self.memory), "preset.none")}
            memory = make(gr.Dropdown, words, value="")
        check = make(gr.Button, {"value": "train.check"}, variant="primary", elem_id="check")
        status = gr.HTML(elem_id="check_status")
        # What has no content yet takes no place.
        says = make(
            gr.Code,
            {"label": "train.says"},
            language=None,
            lines=1,
            max_lines=30,
            visible=HIDDEN,
            elem_id="check_says",
        )
        command = make(
            gr.Code,
            {"label": "train.command"},
            language="shell",
            lines=1,
            wrap_lines=True,
            visible=HIDDEN,
            elem_id="command",
        )
        given = [language, model, recipe, data, memory]
        outputs = [status, says, command]
        check.click(self.check, given, outputs, api_name="check", concurrency_limit=None, show_progress="hidden")
        self._build_run(language, tab)

    def _build_run(self, language: Any, tab: Any) -> None:
        make = self.view.make
        with gr.Row():
            run = make(
                gr.Dropdown, {"label": "train.run"}, choices=[], allow_custom_value=True, scale=4, elem_id="runs"
            )
            again = make(gr.Button, {"value": "train.refresh"}, min_width=80)
        state = gr.HTML()
        curves = [self._plot("train.curve", height=300, elem_id="curves")]
        for pair in (QUARTERS[:2], QUARTERS[2:]):
            with gr.Row():
                curves += [self._plot(title, height=200, min_width=300) for title in pair]
        gallery = make(
            gr.Gallery, {"label": "train.samples"}, columns=4, height="auto", visible=HIDDEN, elem_id="samples"
        )
        newest = gr.State("")
        timer = gr.Timer(SECONDS, active=False)
        listed = {"inputs": [language, run], "outputs": [run, state, timer], "api_visibility": "private"}
        tab.select(self.offer, **listed)
        again.click(self.offer, **listed)
        curve = {"inputs": [language, run], "outputs": [state, *curves], "show_progress": "hidden"}
        shown = [language, run, newest]
        samples = {"outputs": [gallery, newest], "show_progress": "hidden", "api_visibility": "private"}
        run.change(self.watch, **curve, api_name="watch").then(self.samples, shown, **samples)
        for looks in (timer.tick, language.change):
            looks(self.watch, **curve, api_visibility="private").then(self.samples, shown, **samples)

    def _plot(self, title: str, **fixed: Any) -> Any:
        # The legend is `_legend`, in the language: gradio's would keep the words of the first one.
        lines: dict[str, Any] = {"x": "iteration", "y": "loss", "color": "kind", "color_map": COLORS}
        return self.view.make(gr.LinePlot, {"title": title}, **lines, colors_in_legend=[], visible=HIDDEN, **fixed)

    def _first_model(self) -> str:
        ready = [model.name for model in self.models.values() if model.ready and model.adapters]
        return (ready or list(self.models))[0]

    def _training(self, language: str, model: str, recipe: str, data: str | None, memory: str) -> Training:
        """Return what is asked for.

        Raises:
            InputError: a choice is none of those offered.
        """
        for name, known in ((model, self.models), (recipe, self.recipes), (memory, {**self.memory, "": None})):
            if name not in known:
                raise InputError(f"'{name}' is none of {', '.join(filter(None, known))}")
        if not self.folders.data:
            raise InputError(say(language, "train.no_data"))
        folder = inside(data or "", self.folders.data)
        return Training(self.models[model], self.recipes[recipe], folder, [self.memory[memory]] if memory else [])

    def check(
        self, request: gr.Request, language: str, model: str, recipe: str, data: str | None, memory: str
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Show the command, and what ``--check`` says of it."""
        yield working(language, None), gr.update(visible=HIDDEN), gr.update(visible=HIDDEN)
        try:
            training = self._training(language, model, recipe, data, memory)
            yield gr.skip(), gr.skip(), gr.update(value=training.command, visible=True)
            command = Command(training.words(check=True), Path(tempfile.mkdtemp(prefix="cogvideox-web-")))
            tidy = functools.partial(shutil.rmtree, ignore_errors=True)
            job = self.queue.submit(Job(owner_of(request), [command], tidy))
            for _ in self.queue.watch(job):
                yield working(language, None, ahead=self.queue.position(job)), gr.skip(), gr.skip()
            yield "", gr.update(value=job.log(), visible=True), gr.skip()
        except CancelledError:
            yield plain(say(language, "state.cancelled")), gr.skip(), gr.skip()
        except (InputError, RunError) as error:
            yield failed(language, error, wrong_input=isinstance(error, InputError)), gr.skip(), gr.skip()

    def offer(self, language: str, chosen: str | None) -> tuple[Any, str, Any]:
        """Offer the folders of trainings, the newest if none is chosen, and look at it from now on."""
        found = [str(path) for path in trainings.find_runs(self.folders.runs)]
        if not found:
            return gr.update(choices=[], value=None), plain(say(language, "train.none")), gr.Timer(active=False)
        return gr.update(choices=found, value=chosen or found[0]), "", gr.Timer(active=True)

    def watch(self, language: str, run: str | None) -> list[Any]:
        """Show the losses of a run so far: over all timesteps, and over each quarter of them."""
        plots = 1 + len(QUARTERS)
        if not run:
            return [gr.skip()] * (1 + plots)
        try:
            curves = trainings.curves(inside(run, self.folders.runs))
        except InputError as error:
            return [failed(language, error, wrong_input=True), *[gr.update(visible=HIDDEN)] * plots]
        if not curves[0]:
            return [plain(say(language, "train.none")), *[gr.update(visible=HIDDEN)] * plots]
        last = max(curves[0], key=lambda point: point["iteration"])
        state = say(language, "train.state", iteration=last["iteration"], loss=f"{last['loss']:.4f}")
        return [plain(state) + _legend(language, curves[0]), *map(_drawn, curves)]

    def samples(self, request: gr.Request, language: str, run: str | None, newest: str) -> tuple[Any, str]:
        """Show the sample videos of a run's evaluations, if there are others than those that `newest` stands for."""
        try:
            found = trainings.samples(inside(run or "", self.folders.runs))[:MAX_SAMPLES]
        except InputError:
            found = []  # `watch` says it
        now = f"{language} {found[0].path}" if found else ""
        if now == newest:
            return gr.skip(), newest
        made = [
            (self.sessions.shown(str(request.session_hash), video.path), _caption(language, video, Path(run or "")))
            for video in found
        ]
        return gr.update(value=made, visible=True if made else HIDDEN), now


def _caption(language: str, sample: Video, run: Path) -> str:
    """Return the caption of a sample: the iteration first, since the end is cut."""
    iteration = trainings.iteration_of(sample.path, run)
    if iteration is None:
        return sample.caption
    return say(language, "train.sample", iteration=iteration, caption=sample.caption)


def _legend(language: str, points: list[dict[str, Any]]) -> str:
    """Return what the colours of the curves mean, of those that have points."""
    kinds = {point["kind"] for point in points}
    marks = [
        f'<span style="color: {color}">━</span> {as_html(say(language, kind))}'
        for kind, color in COLORS.items()
        if kind in kinds
    ]
    return f'<div class="status" id="legend">{" &ensp; ".join(marks)}</div>'


def _drawn(points: list[dict[str, Any]]) -> Any:
    """Return what shows a curve, if it has points.

    The plot in the page keeps the kinds of its first points, and draws no others: each has all of them from the start,
    those without points as one without a loss, under names that do not change with the language.
    """
    if not points:
        return gr.update(visible=HIDDEN)
    import pandas  # a dependency of gradio

    kinds = {point["kind"] for point in points}
    first = min(point["iteration"] for point in points)
    none = [{"iteration": first, "loss": None, "kind": kind} for kind in COLORS if kind not in kinds]
    shown = sorted([*points, *none], key=lambda point: list(COLORS).index(point["kind"]))
    return gr.update(value=pandas.DataFrame(shown), visible=True)
