"""The tab of finished videos: looked at again, and their settings used again."""

from typing import Any

import gradio as gr

from sgm.inference.results import read_record
from sgm.util import InputError
from sgm.web import videos
from sgm.web.choices import inside
from sgm.web.sample_tab import SampleTab
from sgm.web.videos import Video
from sgm.web.view import View, failed, plain
from sgm.web.words import say


class HistoryTab:
    """The tab and its handlers; `sampling` gets the settings that are used again."""

    def __init__(self, view: View, sampling: SampleTab) -> None:
        self.view, self.sampling = view, sampling
        self.folders, self.sessions = sampling.folders, sampling.sessions

    def build(self, language: Any, tab: Any) -> None:
        """Make the components and connect them."""
        with gr.Row():
            # Any path may be sent; `inside` decides.
            chosen = self.view.make(
                gr.Dropdown,
                {"label": "history.choose"},
                choices=[],
                allow_custom_value=True,
                scale=4,
                elem_id="history",
            )
            refresh = self.view.make(gr.Button, {"value": "history.refresh"}, min_width=80)
        state = gr.HTML()
        with gr.Row():
            with gr.Column(min_width=300):
                video = self.view.make(gr.Video, {"label": "video"}, loop=True, autoplay=True)
                reuse = self.view.make(gr.Button, {"value": "history.reuse"}, elem_id="reuse")
            settings = self.view.make(gr.JSON, {"label": "history.settings"}, min_width=300)
        listed = {"inputs": [language, chosen], "outputs": [chosen, state], "api_visibility": "private"}
        tab.select(self.offer, **listed)
        refresh.click(self.offer, **listed)
        chosen.change(self.show, [language, chosen], [video, settings, state], api_name="show")
        tab_of_sampling = self.sampling
        reuse.click(
            self.reuse,
            [language, chosen],
            [state, tab_of_sampling.image_group, *tab_of_sampling.choices, *tab_of_sampling.flat],
            api_name="reuse",
        )

    def offer(self, language: str, chosen: str | None) -> tuple[Any, str]:
        """Offer the finished videos, the newest if none is chosen."""
        found = [
            (f"{video.caption}  ({video.when})", str(video.path)) for video in videos.finished(self.folders.outputs)
        ]
        if not found:
            return gr.update(choices=[], value=None), plain(say(language, "history.none"))
        return gr.update(choices=found, value=chosen or found[0][1]), ""

    def _video(self, path: str | None) -> Video:
        """Return a finished video of the output folder.

        Raises:
            InputError: it is none.
        """
        found = inside(path or "", [self.folders.outputs])
        record = read_record(found)
        if found.suffix != ".mp4" or record is None or "prompt" not in record:
            raise InputError(f"'{path}' is no finished video of {self.folders.outputs}")
        return Video(found, record)

    def show(self, request: gr.Request, language: str, path: str | None) -> tuple[Any, Any, str]:
        """Show a video and its sidecar."""
        if not path:
            return None, None, ""
        try:
            video = self._video(path)
        except InputError as error:
            return None, None, failed(language, error, wrong_input=True)
        return self.sessions.shown(str(request.session_hash), video.path), dict(video.record), ""

    def reuse(self, language: str, path: str | None) -> list[Any]:
        """Put the settings of a video into the tab that samples."""
        sampling = self.sampling
        try:
            video = self._video(path)
        except InputError as error:
            nothing = [gr.skip()] * (1 + len(sampling.choices) + len(sampling.flat))
            return [failed(language, error, wrong_input=True), *nothing]
        known = videos.settings_of(video, sampling.models, self.folders)
        said = [say(language, "history.used")]
        model, group = gr.skip(), gr.skip()
        if known["model"] is None:
            said.append(say(language, "history.model"))
        else:
            model, group = known["model"], gr.update(visible=sampling.models[known["model"]].image2video)
        if video.record.get("image"):
            said.append(say(language, "history.image"))
        chosen = [known[name] or "" for name in ("load", "memory", "speed")]
        return [plain(" ".join(said)), group, model, *chosen, *sampling.flat_values(known)]
