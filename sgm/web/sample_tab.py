"""The tab that samples: settings, progress, cancelling, and two settings side by side."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from sgm.util import InputError, RunError
from sgm.web import videos
from sgm.web.choices import LATEST, Folders, Model, find_folders, inside, presets
from sgm.web.controls import BASIC, CONTROLS, MORE
from sgm.web.jobs import CancelledError, Job, Jobs
from sgm.web.sessions import Sessions, thumbnail
from sgm.web.videos import Request
from sgm.web.view import View, failed, plain, working
from sgm.web.words import say

# What may differ on the right of a comparison; the other settings are those on the left.
COMPARED = ("num_steps", "guidance_scale")


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
                with gr.Row():
                    run = self.view.make(gr.Button, {"value": "run"}, variant="primary", elem_id="run")
                    cancel = self.view.make(gr.Button, {"value": "cancel"}, variant="stop", elem_id="cancel")
                status = gr.HTML(elem_id="status")
                with gr.Row():
                    first_video = self.view.make(
                        gr.Video, {"label": "video"}, loop=True, autoplay=True, elem_id="video"
                    )
                    second_video = self.view.make(
                        gr.Video, {"label": "video.second"}, loop=True, autoplay=True, visible=False, elem_id="second"
                    )
                both, compared = self._build_comparison()
                with self.view.make(gr.Accordion, {"label": "log"}, open=False):
                    log = gr.Code(language=None, lines=1, max_lines=20, show_label=False)
        outputs = [status, first_video, second_video, log]
        given = [language, *self.choices, *self.flat]
        run.click(self.sample, given, outputs, api_name="sample", concurrency_limit=None, show_progress="hidden")
        both.click(
            self.compare,
            [language, *compared, *self.choices, *self.flat],
            outputs,
            api_name="compare",
            concurrency_limit=None,
            show_progress="hidden",
        )
        cancel.click(self.cancel, [language], [status], api_name="cancel", concurrency_limit=None)
        self.model.input(self.use_model, [self.model], [self.image_group, *self.flat], api_visibility="private")
        self.upload.upload(self.take_image, [language, self.upload], [self.upload, self.picture], api_name="image")

    def _build_settings(self, first: Model) -> None:
        self.model = self.view.make(
            gr.Dropdown, {"label": "model"}, choices=list(self.models), value=first.name, elem_id="model"
        )
        self.components = {name: self._control(name, first) for name in BASIC[:1]}
        with gr.Group(visible=first.image2video) as self.image_group:
            self.upload = self.view.make(
                gr.UploadButton, {"label": "image"}, file_types=["image"], type="filepath", elem_id="upload"
            )
            self.picture = gr.HTML(elem_id="picture")
        self.load = self._trained("load", "load.none")
        numbers = [name for name in BASIC if CONTROLS[name].kind in ("whole", "number")]
        self.components |= {name: self._control(name, first) for name in BASIC[1:] if name not in numbers}
        for pair in (numbers[:2], numbers[2:]):
            with gr.Row():
                self.components |= {name: self._control(name, first) for name in pair}
        with gr.Row():
            self.memory, self.speed = (self._preset(kind, "preset.none") for kind in ("memory", "speed"))
        with self.view.make(gr.Accordion, {"label": "more"}, open=False):
            self.components |= {name: self._control(name, first) for name in MORE}
        self.flat = [component for parts in self.components.values() for component in parts]
        self.choices = [self.model, self.load, self.memory, self.speed]

    def _build_comparison(self) -> tuple[Any, list[Any]]:
        with self.view.make(gr.Accordion, {"label": "compare"}, open=False, elem_id="compare"):
            self.view.make(gr.Markdown, {"value": "compare.says"})
            load = self._trained("load", "compare.same", more=[("load.none", "none")])
            speed = self._preset("speed", "compare.same")
            with gr.Row():
                numbers = [self.view.make(gr.Number, {"label": f"control.{name}"}, value=None) for name in COMPARED]
            both = self.view.make(gr.Button, {"value": "run.both"}, elem_id="both")
        return both, [load, speed, *numbers]

    def _control(self, name: str, model: Model) -> list[Any]:
        return self.view.control(CONTROLS[name], model.values.get(name, CONTROLS[name].default))

    def _trained(self, label: str, none: str, more: Sequence[tuple[str, str]] = ()) -> Any:
        def choices(language: str) -> list[tuple[str, str]]:
            said = [(say(language, key), value) for key, value in ((none, ""), *more)]
            return [*said, *((str(path), str(path)) for path in find_folders(self.folders.runs, LATEST))]

        # A path may be typed as well; `inside` decides.
        words = {"label": label, "choices": choices}
        return self.view.make(gr.Dropdown, words, value="", allow_custom_value=True)

    def _preset(self, kind: str, none: str) -> Any:
        names = list(self.files[kind])
        words = {"label": kind, "choices": lambda language: [(say(language, none), ""), *((n, n) for n in names)]}
        return self.view.make(gr.Dropdown, words, value="", min_width=120)

    # --- Handlers: what the browser sends is checked here, since anybody can send anything.

    def sample(self, request: gr.Request, language: str, *given: Any) -> Iterator[tuple[Any, ...]]:
        """Sample one video."""
        yield from self._run(request, language, lambda owner: [self._request(owner, language, *given)])

    def compare(
        self, request: gr.Request, language: str, load: str, speed: str, steps: Any, scale: Any, *given: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Sample with the settings, and with some changed, at the same seed."""

        def both(owner: str) -> list[Request]:
            left = self._request(owner, language, *given)
            model, first_load, memory, first_speed, *flat = given
            load_now = {"": first_load, "none": ""}.get(load, load)
            right = self._request(owner, language, model, load_now, memory, speed or first_speed, *flat)
            numbers = dict(zip(COMPARED, (steps, scale), strict=True))
            changed = {name: value for name, value in numbers.items() if value is not None}
            return [left, dataclasses.replace(right, values={**right.values, **changed})]

        yield from self._run(request, language, both)

    def _run(self, request: gr.Request, language: str, asked: Any) -> Iterator[tuple[Any, ...]]:
        """Yield status, the two videos and the log, while what is asked for is sampled one after the other."""
        owner, job, folder = str(request.session_hash), None, None
        yield plain(say(language, "state.starting")), None, gr.update(value=None, visible=False), ""
        try:
            wanted = asked(owner)
            for part, one in enumerate(wanted, start=1):
                folder = videos.new_folder(self.folders.outputs)
                job = Job(owner, one.words(folder), folder)
                for now in self.queue.submit(job):
                    ahead = self.queue.position(job)
                    shown = working(language, now, ahead=ahead, part=part, parts=len(wanted))
                    yield shown, gr.skip(), gr.skip(), gr.skip()
                path = videos.finished(folder)[0].path
                video = gr.update(value=self.sessions.shown(owner, path), visible=True)
                places = (video, gr.skip()) if part == 1 else (gr.skip(), video)
                yield plain(say(language, "state.done", path=path)), *places, job.log()
        except CancelledError:
            yield plain(say(language, "state.cancelled")), gr.skip(), gr.skip(), job.log() if job else ""
        except (InputError, RunError) as error:
            said = failed(language, error, wrong_input=isinstance(error, InputError))
            yield said, gr.skip(), gr.skip(), job.log() if job else ""
        finally:
            if folder is not None:
                videos.discard_if_empty(folder)

    def _request(
        self, owner: str, language: str, model: str, load: str, memory: str, speed: str, *flat: Any
    ) -> Request:
        """Return what is asked for.

        Raises:
            InputError: a choice is none of those offered, or a needed image is missing.
        """
        if model not in self.models:
            raise InputError(f"'{model}' is no model of this page; its models are {', '.join(self.models)}")
        chosen = self.models[model]
        image = self.sessions.image(owner) if chosen.image2video else None
        if chosen.image2video and image is None:
            raise InputError(say(language, "image.none"))
        files = []
        for kind, name in (("memory", memory), ("speed", speed)):
            if name and name not in self.files[kind]:
                raise InputError(f"'{name}' is no preset in configs/{kind}; there are {', '.join(self.files[kind])}")
            files += [self.files[kind][name]] if name else []
        path = inside(load, self.folders.runs) if load else None
        return Request(chosen, self.values_of(flat), image, path, files)

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
                empty = "" if CONTROLS[name].kind in ("text", "choice") else None
                result.append(empty if values[name] is None else values[name])
        return result

    def cancel(self, request: gr.Request, language: str) -> str:
        """End the jobs of a session."""
        ended = self.queue.cancel(str(request.session_hash))
        return plain(say(language, "state.cancelled" if ended else "state.nothing"))

    def use_model(self, name: str) -> list[Any]:
        """Show the settings of a model's file."""
        model = self.models[name]
        return [gr.update(visible=model.image2video), *self.flat_values(model.values)]

    def take_image(self, request: gr.Request, language: str, upload: str) -> tuple[Any, str]:
        """Keep an upload for its session; show it small."""
        try:
            path = self.sessions.take(str(request.session_hash), upload)
        except InputError as error:
            return gr.update(value=None), failed(language, error, wrong_input=True)
        return gr.update(value=None), f'<div class="thumbnail"><img alt="" src="{thumbnail(path)}"></div>'
