"""The page: three tabs, one language at a time, and what keeps it to this machine and to the given folders."""

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from gradio.themes import Default
from starlette.middleware import Middleware

from sgm.util import InputError
from sgm.web.browsers import Browsers, owner_of
from sgm.web.choices import Folders, find_models
from sgm.web.history_tab import HistoryTab
from sgm.web.jobs import Jobs
from sgm.web.sample_tab import SampleTab
from sgm.web.sessions import Sessions
from sgm.web.training_tab import TrainingTab
from sgm.web.view import STYLE, WIDTH, View
from sgm.web.words import LANGUAGES

TITLE = "CogVideoX SAT"
MAX_UPLOAD = "50mb"


class Page:
    """The page over some folders; `close` ends all that it has started.

    Args:
        folders: that it may use.

    Raises:
        InputError: there is nothing to sample with.
    """

    def __init__(self, folders: Folders) -> None:
        self.models = find_models(folders.configs)
        sampling = {name: model for name, model in self.models.items() if not model.adapters}
        self.queue, self.sessions, self.view = Jobs(), Sessions(), View()
        self._languages: dict[str, str] = {}  # chosen by browsers
        self._cached = tempfile.TemporaryDirectory(prefix="cogvideox-web-")
        self.cache = self._cached.name  # of gradio: what browsers have sent and been shown
        os.environ["GRADIO_TEMP_DIR"] = self.cache
        self._sampling = SampleTab(self.view, folders, sampling, self.queue, self.sessions)
        self._history = HistoryTab(self.view, self._sampling)
        self._training = TrainingTab(self.view, folders, self.models, self.queue, self.sessions)
        self.blocks = self._build()

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
            with gr.Row(elem_id="head"):
                gr.Markdown(f"# {TITLE}")
                choices = [(name, language) for language, name in LANGUAGES.items()]
                language = self.view.make(
                    gr.Radio,
                    {"label": "language"},
                    choices=choices,
                    value="en",
                    container=False,
                    min_width=WIDTH,
                    elem_id="language",
                )
            with gr.Tabs():
                with self.view.make(gr.Tab, {"label": "tab.sample"}, id="sample"):
                    self._sampling.build(language)
                with self.view.make(gr.Tab, {"label": "tab.history"}, id="history") as history:
                    self._history.build(language, history)
                with self.view.make(gr.Tab, {"label": "tab.training"}, id="training") as training:
                    self._training.build(language, training)
            quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
            language.input(self._speak, [language], self.view.components, **quiet)
            greeted = blocks.load(self._greet, None, [language, *self.view.components], **quiet)
            again = {"outputs": self._sampling.outputs, "concurrency_limit": None, "show_progress": "hidden"}
            greeted.then(self._sampling.again, [language], api_name="again", **again)
            blocks.unload(self._leave)
        return blocks

    def _speak(self, request: gr.Request, language: str) -> list[Any]:
        """Show the page in a language, also when this browser comes again."""
        self._languages[owner_of(request)] = language
        return self.view.updates(language)

    def _greet(self, request: gr.Request) -> list[Any]:
        """Show the page in the language that was chosen, or that of the browser."""
        wanted = (request.headers or {}).get("accept-language", "")
        own = "zh" if wanted.lower().startswith("zh") else "en"
        language = self._languages.get(owner_of(request), own)
        return [language, *self.view.updates(language)]

    def _leave(self, request: gr.Request) -> None:
        """Forget the uploads of a window that was closed; its queued jobs still run."""
        self.sessions.forget(str(request.session_hash))

    def launch(self, host: str, port: int | None) -> str:
        """Serve in the background; return the address.

        Raises:
            InputError: the port is taken.
        """
        plain = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        try:
            _, address, _ = self.blocks.queue().launch(
                server_name=host,
                server_port=port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                ssr_mode=False,
                run_history=False,
                enable_monitoring=False,
                allowed_paths=[],  # files are served as copies that a session was shown
                max_file_size=MAX_UPLOAD,
                footer_links=[],
                app_kwargs={"middleware": [Middleware(Browsers)]},
                theme=plain,  # fonts of the browser's machine
                css=STYLE,
            )
        except OSError as error:
            cure = "choose another --port, or leave it out to take a free one"
            raise InputError(f"the page cannot be served at {host}, port {port}: {error}; {cure}") from error
        return address

    def close(self) -> None:
        """End jobs and serving, and remove what was kept for browsers."""
        self.queue.close()
        self.blocks.close(verbose=False)
        self.sessions.close()
        self._cached.cleanup()


def existing(folders: list[str]) -> tuple[Path, ...]:
    """Return folders that were given.

    Raises:
        InputError: one does not exist.
    """
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise InputError(f"there is no folder {', '.join(missing)}; make it, or name another")
    return tuple(map(Path, folders))
