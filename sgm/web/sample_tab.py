"""The tab that samples: settings, progress, cancelling, and two settings side by side."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from sgm.io import reason_of
from sgm.util import InputError, RunError, default
from sgm.web import videos
from sgm.web.browsers import owner_of
from sgm.web.choices import Folders, Model, find_loras, find_trained, inside, presets
from sgm.web.controls import BASIC, CONTROLS, MORE, STRENGTH, number
from sgm.web.jobs import CancelledError, Job, Jobs, notices_in
from sgm.web.sessions import Sessions, thumbnail
from sgm.web.videos import AUTO, Request
from sgm.web.view import HIDDEN, WIDTH, View, Words, failed, offered, plain, working
from sgm.web.words import say

# What may differ on the right of a comparison; the other settings are those on the left.
COMPARED = ("num_steps", "guidance_scale")
PROMPT = BASIC[0]
MAX_LABEL = 200  # characters
MAX_LORAS = 4  # on the page; a file of the command line takes any number
Lora = tuple[Path, float | None]  # with its strength; None: the default
SHOW_STATUS = """() => document.getElementById("status").scrollIntoView(
    {block: innerWidth > 640 ? "nearest" : "center"})"""
PLAY_TOGETHER = """() => setTimeout(() => document.querySelectorAll("#video video, #second video").forEach(
    video => { video.currentTime = 0; video.play(); }), 300)"""
NONE = "none"  # on the right of a comparison: without LoRAs, or the model's own weights


class SampleTab:
    """The tab and its handlers.

    Args:
        view: the words of its components.
        folders: that it may use.
        models: by name, without those that only train.
        queue: of all sessions.
        sessions: with their uploads.
    """

    def __init__(self, view: View, folders: Folders, models: dict[str, Model], queue: Jobs, sessions: Sessions) -> None:
        self.view, self.folders, self.models, self.queue, self.sessions = view, folders, models, queue, sessions
        self.files = {kind: presets(folders.configs, kind) for kind in ("memory", "speed")}

    # --- Layout.

    def build(self, language: Any) -> None:
        """Make the components and connect them."""
        first = next(iter(self.models.values()))
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                self._build_settings(first)
            with gr.Column(scale=1, min_width=300):
                with gr.Row(elem_id="actions"):
                    run = self.view.make(gr.Button, {"value": "run"}, variant="primary", elem_id="run", min_width=WIDTH)
                    cancel = self.view.make(
                        gr.Button, {"value": "cancel"}, variant="stop", elem_id="cancel", min_width=WIDTH
                    )
                status = gr.HTML(elem_id="status")
                with gr.Row():
                    first_video = self.view.make(
                        gr.Video, {"label": "video"}, loop=True, autoplay=True, elem_id="video", min_width=WIDTH
                    )
                    second_video = self.view.make(
                        gr.Video,
                        {"label": "video.second"},
                        loop=True,
                        autoplay=True,
                        visible=HIDDEN,
                        elem_id="second",
                        min_width=WIDTH,
                    )
                both, compared = self._build_comparison()
                with self.view.make(gr.Accordion, {"label": "log"}, open=False):
                    log = gr.Code(language=None, lines=1, max_lines=20, show_label=False)
        self.outputs = [status, first_video, second_video, log]
        quiet: Any = {"outputs": self.outputs, "concurrency_limit": None, "show_progress": "hidden"}
        run.click(self.sample, [language, *self.given], api_name="sample", **quiet)
        pair = both.click(self.compare, [language, *compared, *self.given], api_name="compare", **quiet)
        pair.then(None, js=PLAY_TOGETHER, api_visibility="private")
        for button in (run, both):  # the status may be out of sight, on a telephone far below
            button.click(None, js=SHOW_STATUS, api_visibility="private")
        cancel.click(self.cancel, [language], [status], api_name="cancel", concurrency_limit=None)
        gr.on(
            [language.change, self.model.change, self.latents.change, self.loop.change],
            self.length,
            [language, self.model, self.latents, self.loop],
            [self.latents],
            show_progress="hidden",
            api_visibility="private",
        )
        prompt = self.components[PROMPT]
        self.model.input(
            self.use_model, [self.model, *prompt], [self.image_group, *self.flat], api_visibility="private"
        )
        self.upload.upload(self.take_image, [language, self.upload], [self.upload, self.picture], api_name="image")

    @property
    def given(self) -> list[Any]:
        """The components whose values decide a sampling, after the language: what `_request` takes."""
        return [*self.choices, *self.loras, *self.flat]

    def _build_settings(self, first: Model) -> None:
        self.model = self.view.make(
            gr.Dropdown, {"label": "model", "choices": self._offered}, value=first.name, elem_id="model"
        )
        self.components = {PROMPT: self._control(PROMPT, first)}
        with gr.Group(visible=first.image2video) as self.image_group:
            self.upload = self.view.make(
                gr.UploadButton, {"label": "image"}, file_types=["image"], type="filepath", elem_id="upload"
            )
            self.picture = gr.HTML(elem_id="picture")
        self._build_loras()
        numbers = [name for name in BASIC if CONTROLS[name].kind in ("whole", "number")]
        self.components |= {name: self._control(name, first) for name in BASIC[1:] if name not in numbers}
        for pair in (numbers[:2], numbers[2:]):
            with gr.Row():
                self.components |= {name: self._control(name, first) for name in pair}
        with gr.Row():
            self.memory, self.speed = (self._preset(kind, "preset.none") for kind in ("memory", "speed"))
        preview = self.view.make(gr.Checkbox, {"label": "preview", "info": "preview.says"}, value=True)
        with self.view.make(gr.Accordion, {"label": "more"}, open=False, elem_id="more"):
            load = self._weights("load", find_trained, "load.none")
            self.components |= {name: self._control(name, first) for name in MORE}
        (self.latents,), (self.loop,) = (self.components[name] for name in ("sampling_num_frames", "loop"))
        self.flat = [component for parts in self.components.values() for component in parts]
        self.choices = [self.model, load, self.memory, self.speed, preview]

    def _offered(self, language: str) -> list[tuple[str, str]]:
        """Return label and name of each model."""
        missing = say(language, "model.missing")
        return [(name if model.ready else f"{name}{missing}", name) for name, model in self.models.items()]

    def _build_loras(self) -> None:
        """Make the rows of LoRAs with strengths; each appears once the one before it is chosen."""
        self.loras, rows = [], []
        for index in range(MAX_LORAS):
            with gr.Row(visible=index == 0) as row:
                path = self._weights("lora", find_loras, "lora.none", elem_id=f"lora-{index}", scale=2)
                (strength,) = self.view.control(STRENGTH, STRENGTH.default, elem_id=f"strength-{index}")
            rows.append(row)
            self.loras += [path, strength]
        paths = self.loras[::2]
        gr.on(
            [path.change for path in paths],
            lambda *chosen: [gr.update(visible=any(chosen[index:])) for index in range(len(chosen) - 1)],
            paths,
            rows[1:],
            show_progress="hidden",
            api_visibility="private",
        )

    def _build_comparison(self) -> tuple[Any, list[Any]]:
        with self.view.make(gr.Accordion, {"label": "compare"}, open=False, elem_id="compare"):
            self.view.make(gr.Markdown, {"value": "compare.says"})
            with gr.Row():
                more = [("lora.none", NONE)]
                lora = self._weights("lora", find_loras, "compare.same", more, elem_id="compare-lora", scale=2)
                (strength,) = self.view.control(STRENGTH, None, empty="compare.same", elem_id="compare-strength")
            speed = self._preset("speed", "compare.same")
            with gr.Row():
                numbers = [
                    self.view.control(CONTROLS[name], None, empty="compare.same", elem_id=f"compare-{name}", info=None)[
                        0
                    ]
                    for name in COMPARED
                ]
            both = self.view.make(gr.Button, {"value": "run.both"}, elem_id="both")
        return both, [lora, strength, speed, *numbers]

    def _control(self, name: str, model: Model) -> list[Any]:
        value = model.example if name == PROMPT else model.values.get(name, CONTROLS[name].default)
        fixed = {"info": self._length("en", model, value)} if name == "sampling_num_frames" else {}
        return self.view.control(CONTROLS[name], value, **fixed)

    def _weights(
        self,
        label: str,
        find: Callable[[Sequence[Path]], list[Path]],
        none: str,
        more: Sequence[tuple[str, str]] = (),
        **fixed: Any,
    ) -> Any:
        def choices(language: str) -> list[tuple[str, str]]:
            return offered(list(map(str, find(self.folders.runs))), none, *more)(language)

        # A path may be typed as well; `inside` decides.
        words: dict[str, Words] = {"label": label, "choices": choices}
        words |= {"info": "lora.says"} if find is find_loras and not more else {}
        return self.view.make(gr.Dropdown, words, value="", allow_custom_value=True, min_width=WIDTH, **fixed)

    def _preset(self, kind: str, none: str) -> Any:
        automatic = [("memory.auto", AUTO)] if kind == "memory" else []
        words: dict[str, Words] = {"label": kind, "choices": offered(list(self.files[kind]), none, *automatic)}
        return self.view.make(gr.Dropdown, words, value="", min_width=WIDTH)

    # --- Handlers: what the browser sends is checked here, since anybody can send anything.

    def sample(self, request: gr.Request, language: str, *given: Any) -> Iterator[tuple[Any, ...]]:
        """Sample one video."""
        yield from self._run(request, language, lambda window: [self._request(window, language, *given)])

    def compare(
        self,
        request: gr.Request,
        language: str,
        lora: str,
        strength: Any,
        speed: str,
        steps: Any,
        scale: Any,
        *given: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Sample with the settings, and with some changed, at the same seed."""

        def both(window: str) -> list[Request]:
            left = self._request(window, language, *given)
            right = self._request(window, language, *given[:3], speed or given[3], *given[4:])
            loras = self._compared(language, left.loras, lora, number(strength))
            numbers = dict(zip(COMPARED, (steps, scale), strict=True))
            changed = {name: value for name, value in numbers.items() if number(value) is not None}
            return [left, dataclasses.replace(right, loras=loras, values={**right.values, **changed})]

        changes = {"lora": Path(str(lora or "")).name, "control.strength": strength, "speed": speed}
        changes |= {f"control.{name}": value for name, value in zip(COMPARED, (steps, scale), strict=True)}
        yield from self._run(request, language, both, _difference(language, changes))

    def _compared(self, language: str, left: Sequence[Lora], lora: str, strength: Any) -> Sequence[Lora]:
        """Return the LoRAs on the right of a comparison.

        Raises:
            InputError: a strength is given, and no LoRA that it could be of.
        """
        if strength is not None and (lora == NONE or not (lora or left)):
            raise InputError(say(language, "compare.strength"))
        if lora:
            return [] if lora == NONE else [(inside(lora, self.folders.runs), strength)]
        return left if strength is None else [(left[0][0], strength), *left[1:]]

    def _run(
        self, request: gr.Request, language: str, asked: Callable[[str], list[Request]], difference: str = ""
    ) -> Iterator[tuple[Any, ...]]:
        """Queue what is asked for, and show it; `difference` is the label of a second video."""
        second = gr.update(value=None, visible=HIDDEN, **({"label": difference} if difference else {}))
        yield plain(say(language, "state.starting")), None, second, ""
        commands, owner = [], owner_of(request)
        try:
            for one in asked(str(request.session_hash)):
                commands.append(one.command(self.folders.outputs, owner))
        except (InputError, RunError) as error:
            for command in commands:
                videos.discard_if_empty(command.folder)
            yield failed(language, error, wrong_input=isinstance(error, InputError)), gr.skip(), gr.skip(), ""
            return
        job = self.queue.submit(Job(owner, commands, videos.discard_if_empty))
        yield from self._watch(request, language, job)

    def again(self, request: gr.Request, language: str) -> Iterator[tuple[Any, ...]]:
        """Show what this browser is sampling, after its window was loaded again."""
        for job in self.queue.unfinished(owner_of(request)):
            if job.commands[0].words[0] == videos.SCRIPT:
                yield from self._watch(request, language, job)
                return
        yield (gr.skip(),) * len(self.outputs)

    def _watch(self, request: gr.Request, language: str, job: Job) -> Iterator[tuple[Any, ...]]:
        """Yield status, the two videos and the log, while the commands of a job run one after the other."""
        parts, shown, failure = len(job.commands), 0, None
        try:
            for now in self.queue.watch(job):
                current = job.part  # which another thread counts
                for part in range(shown, current):
                    yield self._made(request, language, job, part)
                shown, ahead = current, self.queue.position(job)
                status = working(language, now, ahead=ahead, part=current + 1, parts=parts, preview=job.preview)
                yield status, gr.skip(), gr.skip(), gr.skip()
        except (InputError, RunError) as error:
            failure = error
        for part in range(shown, parts if failure is None else job.part):
            yield self._made(request, language, job, part)
        if isinstance(failure, CancelledError):
            yield plain(say(language, "state.cancelled")), gr.skip(), gr.skip(), job.log()
        elif failure is not None:
            said = failed(language, failure, wrong_input=isinstance(failure, InputError))
            yield said, gr.skip(), gr.skip(), job.log()

    def _made(self, request: gr.Request, language: str, job: Job, part: int) -> tuple[Any, ...]:
        """Show the video of a command that has ended."""
        try:
            path = videos.finished(job.commands[part].folder)[0].path
            shown = self.sessions.shown(str(request.session_hash), path)
        except (OSError, LookupError) as error:  # somebody has removed the folder; no place for a copy
            reason = reason_of(error) if isinstance(error, OSError) else "it is gone"
            said = RunError(f"the video in {job.commands[part].folder} cannot be shown: {reason}")
            return failed(language, said, wrong_input=False), gr.skip(), gr.skip(), job.log()
        video = gr.update(value=shown, visible=True)
        places = (video, gr.skip()) if part == 0 else (gr.skip(), video)
        log = job.log()
        return plain(say(language, "state.done", path=path), *notices_in(log)), *places, log

    def _request(
        self,
        window: str,
        language: str,
        model: str,
        load: str,
        memory: str,
        speed: str,
        preview: bool,
        *more: Any,
    ) -> Request:
        """Return what is asked for; `more` are the LoRAs with their strengths and the values of all controls.

        Raises:
            InputError: a choice is none of those offered, or a needed image is missing.
        """
        if model not in self.models:
            raise InputError(f"'{model}' is no model of this page; its models are {', '.join(self.models)}")
        chosen = self.models[model]
        image = self.sessions.image(window) if chosen.image2video else None
        if chosen.image2video and image is None:
            raise InputError(say(language, "image.none"))
        files = []
        for kind, name in (("memory", "" if memory == AUTO else memory), ("speed", speed)):
            if name and name not in self.files[kind]:
                raise InputError(f"'{name}' is no preset in configs/{kind}; there are {', '.join(self.files[kind])}")
            files += [self.files[kind][name]] if name else []
        path = inside(load, self.folders.runs) if load else None
        pairs, flat = more[: 2 * MAX_LORAS], more[2 * MAX_LORAS :]
        loras = [
            (inside(lora, self.folders.runs), strength)
            for lora, strength in zip(pairs[::2], pairs[1::2], strict=True)
            if lora
        ]
        values = self.values_of(flat)
        if not str(values[PROMPT] or "").strip():
            raise InputError(say(language, "prompt.none"))
        return Request(chosen, values, image, path, files, memory == AUTO, loras, preview=bool(preview))

    def values_of(self, flat: Sequence[Any]) -> dict[str, Any]:
        """Return control → value, of the values of all components."""
        left = list(flat)
        values = {}
        for name, parts in self.components.items():
            own = [left.pop(0) for _ in parts]
            values[name] = own if len(parts) > 1 else own[0]
        return values

    def flat_values(self, values: dict[str, Any]) -> list[Any]:
        """Return the values of all components; those of controls that are not named stay."""
        result = []
        for name, parts in self.components.items():
            if name not in values:
                result += [gr.skip()] * len(parts)
            elif len(parts) > 1:
                result += list(values[name] or [None] * len(parts))
            else:
                kind, value = CONTROLS[name].kind, values[name]
                if kind == "choice" and isinstance(value, bool):
                    value = str(value).lower()
                empty = "" if kind in ("text", "choice") else None
                result.append(empty if value is None else value)
        return result

    def cancel(self, request: gr.Request, language: str) -> str:
        """End the jobs of a browser."""
        ended = self.queue.cancel(owner_of(request))
        return plain(say(language, "state.cancelled" if ended else "state.nothing"))

    def lora_values(self, loras: Sequence[tuple[str, float]]) -> list[Any]:
        """Return the values of the rows of LoRAs."""
        empty = [("", STRENGTH.default)] * (MAX_LORAS - len(loras))
        return [value for pair in [*loras, *empty] for value in pair]

    def use_model(self, name: str, prompt: str | None) -> list[Any]:
        """Show the settings of a model's file, and its example unless a prompt of one's own stands there."""
        model = self.models[name]
        examples = {other.example for other in self.models.values()}
        example = {PROMPT: model.example} if not prompt or not prompt.strip() or prompt in examples else {}
        return [gr.update(visible=model.image2video), *self.flat_values(model.values | example)]

    def length(self, language: str, name: str, latents: Any, loop: bool) -> Any:
        """Say below the latent frames how long the video is."""
        return gr.update(info=self._length(language, self.models.get(name), number(latents), loop=bool(loop)))

    def _length(self, language: str, model: Model | None, latents: Any, *, loop: bool = False) -> str:
        """Return how long a video is; nothing for what is no number of frames: sampling says what is wrong."""
        if model is None:
            return ""
        wanted = default(latents, model.values["sampling_num_frames"])
        wanted = model.geometry.max_latents if wanted is None and model.geometry else wanted
        frames = model.video_frames(wanted, loop=loop) if isinstance(wanted, int) else None
        if frames is None:
            return ""
        return say(language, "length", frames=frames, seconds=f"{frames / model.fps:.1f}")

    def take_image(self, request: gr.Request, language: str, upload: str | None) -> tuple[Any, str]:
        """Keep an upload for its window; show it small."""
        if not upload:
            return gr.update(value=None), ""
        try:
            path = self.sessions.take(str(request.session_hash), upload)
        except InputError as error:
            return gr.update(value=None), failed(language, error, wrong_input=True)
        return gr.update(value=None), small(path)


def _difference(language: str, changes: Mapping[str, Any]) -> str:
    """Return what is changed in the second video of a comparison: key of the words → value, empty for the same."""
    given = [f"{say(language, key)} {value}" for key, value in changes.items() if value not in (None, "")]
    return ", ".join(given)[:MAX_LABEL]


def small(picture: Path) -> str:
    """Return a picture for the page."""
    return f'<div class="thumbnail"><img alt="" src="{thumbnail(picture)}"></div>'
