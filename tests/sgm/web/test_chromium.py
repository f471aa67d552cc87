"""The page as a person in Chromium sees it.

These tests need playwright, which is in the extra dev, and a browser: Debian's package chromium, `playwright install
chromium`, or any other that the environment variable CHROMIUM names. Screenshots go to the folder SCREENSHOTS.
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.sgm.web.conftest import LAND, OTHER


def chromium() -> str:
    """Return the path of a browser; the test is skipped without one."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright of the extra dev is not installed")
    named = os.environ.get("CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None and not named:
        with api.sync_playwright() as playwright:
            own = playwright.chromium.executable_path
        found = own if Path(own).exists() else None
    if found is None:
        pytest.skip("there is no Chromium: apt-get install chromium, playwright install chromium, or set CHROMIUM")
    return found


@pytest.fixture(scope="module")
def tab():
    """A tab of a browser; all tests use it one after the other."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Tests may run as root, for whom Chromium has no sandbox; the page is our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport={"width": 1100, "height": 800}, locale="en-US")
        context.set_default_timeout(30_000)
        tab = context.new_page()
        tab.failures = []
        tab.on("pageerror", lambda error: tab.failures.append(str(error)))
        yield tab
        browser.close()


@pytest.fixture
def window(tab, page, shots, request):
    """The page, loaded anew and ready; its end is kept as a picture, for those that fail too."""
    tab.set_viewport_size({"width": 1100, "height": 800})
    tab.goto(page.address)
    tab.locator("#run").wait_for()
    until(tab, "document.querySelector('#control-num_steps :is(input, textarea)')?.value !== ''")
    yield tab
    tab.screenshot(path=shots / f"end_of_{request.node.name}.png")
    assert tab.failures == []


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """The folder for screenshots."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def until(window, condition):
    window.wait_for_function(condition, polling=200)  # by default at each frame, which then has to be drawn


def fill(window, **values):
    for name, value in values.items():
        window.locator(f"#control-{name} :is(textarea, input)").first.fill(str(value))


def choose(window, place, option):
    window.locator(f"#{place} input").click()
    window.get_by_role("option", name=option, exact=True).click()


def status(window):
    return window.locator("#status")


def test_a_person_compares_two_loras(window, shots, page):
    fill(window, prompt="a red circle moves left above green land", num_steps=3)
    choose(window, "lora-0", str(LAND))
    window.locator("#lora-1").wait_for()  # the row for the next one
    assert not window.locator("#lora-2").is_visible()
    window.locator("#compare").get_by_role("button").first.click()
    choose(window, "compare-lora", str(page._sampling.folders.runs[0] / OTHER))
    window.locator("#compare-strength :is(input, textarea)").fill("0.5")
    window.locator("#more").get_by_role("button").first.click()  # what is empty there stays empty
    window.locator("#control-step_cache_threshold").wait_for()
    window.locator("#both").click()
    window.locator("img.preview").wait_for()
    window.screenshot(path=shots / "preview.png")
    for place in ("video", "second"):
        until(window, f"document.querySelector('#{place} video')?.videoWidth === 64")
    assert "Done" in status(window).inner_text()
    assert f"{OTHER}, Strength 0.5" in window.locator("#second").inner_text()
    window.screenshot(path=shots / "compared.png", full_page=True)
    window.get_by_role("tab", name="History").click()
    until(window, "document.querySelector('#history input')?.value.includes('same_land 0.5')")
    window.locator("#reuse").click()
    window.get_by_text("The settings are in the tab Sample.").wait_for()
    window.screenshot(path=shots / "history.png")
    window.get_by_role("tab", name="Sample").click()
    until(window, f"document.querySelector('#lora-0 input')?.value.includes('{OTHER}')")
    assert window.locator("#strength-0 input").input_value() == "0.5"


def test_a_person_reads_messages_in_either_language_reloads_and_cancels(window, shots, page):
    window.get_by_text("17 frames, 2.1 s").wait_for()
    fill(window, prompt="a red circle moves left", sampling_image_size=60)
    window.locator("#run").click()
    status(window).get_by_role("alert").wait_for()
    assert "nearest legal: args.sampling_image_size=[64,64]" in status(window).inner_text()
    window.screenshot(path=shots / "wrong_size.png")
    window.get_by_text("中文").click()
    window.locator("#run", has_text="生成").wait_for()
    fill(window, sampling_image_size=64, sampling_num_frames=3, num_steps=1000)
    window.get_by_text("9 帧，1.1 秒").wait_for()
    window.locator("#run").click()
    window.locator("#status progress[value]").wait_for()
    (running,) = page.queue._unfinished.values()
    window.reload()
    window.locator("#status progress[value]").wait_for()
    assert page.queue.unfinished(running.owner) == [running] and not running.cancelled
    window.locator("#run", has_text="生成").wait_for()
    assert window.locator("#compare").inner_text().startswith("对比"), "the choice is kept"
    window.screenshot(path=shots / "chinese.png", full_page=True)
    window.locator("#cancel").click()
    status(window).get_by_text("已取消。").wait_for()
    running.ended.exception(timeout=30)
    assert not running.folder.exists()
    window.get_by_text("English").click()
    window.locator("#run", has_text="Sample").wait_for()


def test_a_person_checks_a_training_as_it_is_offered(window, shots):
    window.get_by_role("tab", name="Training").click()
    window.locator("#check").click()
    window.locator("#check_says", has_text="training clips").wait_for()
    until(window, "document.querySelector('#check_status').innerText.trim() === ''")
    assert "toy_lora.yaml configs/toy_sft.yaml" in window.locator("#check_says").inner_text()
    window.screenshot(path=shots / "checked.png", full_page=True)


@pytest.fixture
def run(page):
    """The folder of a training that goes on, and a function that adds lines to its metrics; it is removed at last."""
    folder = page._sampling.folders.runs[0] / "running"
    (folder / "samples").mkdir(parents=True)

    def add(*lines):
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)

    yield SimpleNamespace(folder=folder, add=add)
    shutil.rmtree(folder)


CURVES = """[...document.querySelectorAll('#curves .mark-line path')]
    .filter(path => path.getAttribute('stroke') && path.getBoundingClientRect().width > 100).length"""


def test_a_person_watches_a_training_in_either_language(window, shots, run):
    run.add(*({"iteration": n, "loss": 1 / n} for n in (10, 20, 30)))
    window.get_by_role("tab", name="Training").click()
    until(window, f"{CURVES} === 1")
    run.add(*({"iteration": n, "validation_loss": 2 / n} for n in (10, 20, 30)))
    until(window, f"{CURVES} === 2")
    window.screenshot(path=shots / "curves.png", full_page=True)
    for language, iteration, state, words in (
        ("中文", 40, "第 40 步", ("训练", "验证")),
        ("English", 50, "Iteration 50", ("training", "validation")),
    ):
        window.get_by_text(language, exact=True).click()
        for word in words:
            window.locator("#legend", has_text=word).wait_for()
        run.add({"iteration": iteration, "loss": 0.1})
        window.get_by_text(state).wait_for()  # it is drawn again
        window.wait_for_timeout(500)
        assert window.evaluate(CURVES) == 2, language
        window.screenshot(path=shots / f"curves_{language}.png", full_page=True)


CUT_TITLES = """[...document.querySelectorAll('.role-title-text text')].filter(title => {
    const [inner, outer] = [title, title.closest('svg')].map(part => part.getBoundingClientRect());
    return inner.left < outer.left || inner.right > outer.right || title.textContent.endsWith('…');
}).map(title => title.textContent)"""


def test_a_person_with_a_telephone_reads_the_titles_of_curves(window, shots, run):
    window.set_viewport_size({"width": 375, "height": 740})
    quarters = ("loss_0_249", "loss_250_499", "loss_500_749", "loss_750_999")
    run.add(*({"iteration": n, "loss": 1 / n, **dict.fromkeys(quarters, 1 / n)} for n in (10, 20)))
    window.get_by_role("tab").nth(2).click()
    for language, title in (("中文", "噪声最多"), ("English", "most noise")):
        window.get_by_text(language, exact=True).click()
        window.locator(".role-title-text", has_text=title).wait_for()
        until(window, "document.querySelectorAll('.role-title-text text').length === 5")
        assert window.evaluate(CUT_TITLES) == []
        window.screenshot(path=shots / f"telephone_curves_{language}.png", full_page=True)


def test_a_person_with_a_telephone_has_all_of_it(window, shots):
    window.set_viewport_size({"width": 375, "height": 740})
    for number, name in enumerate(("sample", "history", "training")):
        window.get_by_role("tab").nth(number).click()
        window.locator({"sample": "#run", "history": "#reuse", "training": "#check"}[name]).wait_for()
        wide = "[...document.querySelectorAll('button, input, textarea')].filter(e => e.offsetParent && "
        wide += "(e.getBoundingClientRect().right > 375 || e.getBoundingClientRect().left < 0)).length"
        assert window.evaluate("document.documentElement.scrollWidth") == 375
        assert window.evaluate(wide) == 0, f"{name}: nothing is cut off"
        window.screenshot(path=shots / f"telephone_{name}.png", full_page=True)
    window.get_by_role("tab").first.click()
    button = window.locator("#run").bounding_box()
    assert button["y"] + button["height"] <= 740 and button["height"] >= 36, "it is in reach without scrolling"
    fill(window, prompt="", sampling_image_size=64)
    window.locator("#run").click()
    status(window).get_by_role("alert").wait_for()
    until(window, "document.querySelector('#status').getBoundingClientRect().top < 740")
