"""The tab of finished videos: looked at again, and their settings used again."""

from pathlib import Path
from typing import Any

import gradio as gr

from sgm.util import InputError
from sgm.web import videos
from sgm.web.browsers import is_near, owner_of
from sgm.web.choices import inside
from sgm.web.sample_tab import MAX_LORAS, SampleTab, small
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
            [state, tab_of_sampling.image_group, tab_of_sampling.picture, *tab_of_sampling.given],
            api_name="reuse",
        )

    def offer(self, request: gr.Request, language: str, chosen: str | None) -> tuple[Any, str]:
        """Offer the finished videos, the newest if none is chosen."""
        listed = videos.finished(self.folders.outputs, lambda path: self._may_see(request, path))
        found = [(f"{video.caption}  ({video.when})", str(video.path)) for video in listed]
        if not found:
            return gr.update(choices=[], value=None), plain(say(language, "history.none"))
        return gr.update(choices=found, value=chosen or found[0][1]), ""

    def _may_see(self, request: gr.Request, path: Path) -> bool:
        return videos.belongs(path, self.folders.outputs, owner_of(request), near=is_near(request))

    def _video(self, request: gr.Request, path: str | None) -> Video:
        """Return a finished video of the output folder.

        Raises:
            InputError: it is none, or of another browser.
        """
        found = inside(path or "", [self.folders.outputs])
        video = videos.read_video(found) if self._may_see(request, found) else None
        if video is None:
            raise InputError(f"'{path}' is no finished video of this browser in {self.folders.outputs}")
        return video

    def show(self, request: gr.Request, language: str, path: str | None) -> tuple[Any, Any, str]:
        """Show a video and its sidecar."""
        if not path:
            return None, None, ""
        try:
            video = self._video(request, path)
        except InputError as error:
            return None, None, failed(language, error, wrong_input=True)
        record = dict(video.record)
        if "loras" in record:  # as text: programs that use the page take mappings with a path for files to fetch
            record["loras"] = [", ".join(f"{key} {value}" for key, value in lora.items()) for lora in record["loras"]]
        return self.sessions.shown(str(request.session_hash), video.path), record, ""

    def reuse(self, request: gr.Request, language: str, path: str | None) -> list[Any]:
        """Put the settings of a video into the tab that samples."""
        sampling = self.sampling
        try:
            video = self._video(request, path)
        except InputError as error:
            nothing = [gr.skip()] * (2 + len(sampling.given))
            return [failed(language, error, wrong_input=True), *nothing]
        known = videos.settings_of(video, sampling.models, self.folders)
        said = [say(language, "history.used")]
        if original := video.record.get("original_prompt"):
            said.append(say(language, "history.enhanced", original=original))
        if beyond := videos.beyond_the_page(video, sampling.models):
            said.append(say(language, "history.beyond", settings=", ".join(beyond)))
        model, group, picture = gr.skip(), gr.skip(), gr.skip()
        if known["model"] is None:
            said.append(say(language, "history.model"))
        else:
            model, group = known["model"], gr.update(visible=sampling.models[known["model"]].image2video)
        if image := video.record.get("image"):
            picture = self._picture(request, image)
            said += [say(language, "history.image")] if picture == "" else []
        loras = videos.plain_loras(known["loras"], MAX_LORAS)
        said += [say(language, "history.loras")] if loras is None else []
        chosen = [*(known[name] or "" for name in ("load", "memory", "speed")), gr.skip()]
        values = [*sampling.lora_values(loras or []), *sampling.flat_values(known)]
        return [plain(" ".join(said)), group, picture, model, *chosen, *values]

    def _picture(self, request: gr.Request, image: str) -> str:
        """Take the image of a video again; empty if it is gone, damaged, or not this browser's."""
        try:
            found = inside(image, [self.folders.outputs])
            return small(self.sessions.keep(str(request.session_hash), found)) if self._may_see(request, found) else ""
        except InputError:
            return ""
