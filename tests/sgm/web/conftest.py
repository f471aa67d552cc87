"""The page, served."""

import shutil
from pathlib import Path

import pytest

from sgm.web import jobs
from sgm.web.choices import Folders
from tests.processes import forked_python

LAND, OTHER = Path("assets/toy_land"), "same_land"  # two LoRAs


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("gradio", reason="the extra web is not installed")
    from sgm.web.page import Page

    patch = pytest.MonkeyPatch()
    patch.setattr(jobs, "PYTHON", forked_python())
    patch.setattr(jobs, "POLL_SECONDS", 0.01)
    patch.setattr("sgm.web.training_tab.SECONDS", 1)
    folder = tmp_path_factory.mktemp("page")
    for name in ("outputs", "runs"):
        (folder / name).mkdir()
    shutil.copytree(LAND, folder / "runs" / OTHER)
    page = Page(Folders(outputs=folder / "outputs", runs=(folder / "runs", LAND), data=(Path("assets/toy"),)))
    page.address = page.launch("127.0.0.1", None)
    yield page
    page.close()
    patch.undo()
