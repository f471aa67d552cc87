"""The page as a client over HTTP sees it: what must work does, and what must not does not."""

import json
import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
from PIL import Image

from sgm.util import InputError, RunError
from sgm.web import jobs, main
from sgm.web.browsers import COOKIE
from sgm.web.controls import BASIC, CONTROLS
from sgm.web.jobs import CancelledError
from tests.sgm.web.conftest import LAND, OTHER

KINDS = {"training", "validation"}

gradio = pytest.importorskip("gradio", reason="the extra web is not installed")
gradio_client = pytest.importorskip("gradio_client", reason="the extra web is not installed")


@pytest.fixture(scope="module")
def client(page):
    client = gradio_client.Client(page.address, verbose=False, analytics_enabled=False)
    yield client
    client.close()


def given(page, model="toy", load="", language="en", loras=(), memory="", speed="", **values):
    """Return the inputs of a sampling."""
    sampling = page._sampling
    known = {name: control.default for name, control in CONTROLS.items()}
    of_model = sampling.models[model].values if model in sampling.models else {}
    wanted = {**known, **of_model, "prompt": "a red circle moves left", "num_steps": 2, **values}
    return [language, model, load, memory, speed, True, *sampling.lora_values(loras), *sampling.flat_values(wanted)]


def test_the_toy_is_sampled_compared_and_found_again(page, client, tmp_path):
    inputs = given(page, loras=[(str(LAND), 1.0)])
    job = client.submit("en", "", 0.5, "", 1, None, *inputs[1:], api_name="/compare")
    status, *_, log = job.result()
    assert "Done" in status and "wrote " in log and page.queue._unfinished == {}
    states = [update[0] for update in job.outputs() if isinstance(update[0], str)]
    assert any("1 of 2: Step" in state for state in states) and any("2 of 2" in state for state in states)
    assert any('src="data:image/jpeg;base64,' in state for state in states), "a preview"
    updates = [video for _, *videos, _ in job.outputs() for video in videos if video and video.get("value")]
    served = {video["value"] for video in updates}  # each is sent once
    assert len(served) == 2 and all(Path(path).read_bytes()[4:8] == b"ftyp" for path in served)
    videos = sorted(page._sampling.folders.outputs.rglob("*.mp4"), key=lambda path: path.stat().st_mtime)
    assert len(videos) == 2
    assert {path.name for path in videos[0].parents[2].iterdir() if path.is_file()} == {".owner", "log.txt"}
    shown, record, said = client.predict("en", str(videos[0]), api_name="/show")
    assert record["num_steps"] == 2 and record["seed"] == 42 and said == "" and shown
    assert record["loras"] == [f"path {LAND}, strength 1.0"]
    reused = client.predict("zh", str(videos[1]), api_name="/reuse")
    assert "生成" in reused[0] and reused[2] == "toy"  # without the group, which has no value
    assert reused[7:11] == (str(LAND), 0.5, "", 1.0), "the strength of the right side"
    values = page._sampling.values_of(reused[15:])
    assert (values["num_steps"], values["prompt"]) == ("1", "a red circle moves left")
    # Neither the project nor the folders are served, only copies that somebody was shown.
    for path in (videos[0], Path("README.md").resolve(), Path("assets/toy/vae/3d-vae.pt").resolve()):
        assert requests.get(f"{page.address}gradio_api/file={path}", timeout=10).status_code in (403, 404)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": " "}, "The prompt is empty: write what the video shows."),
        ({"prompt": None, "language": "zh"}, "提示词为空"),
        ({"num_steps": 0}, "args.num_steps is 0; give a whole number of at least 1"),
        ({"load": "/etc"}, "is not in the folders of this page"),
        ({"load": "../.."}, "is not in the folders of this page"),
        ({"loras": [("/etc", 1.0)]}, "is not in the folders of this page"),
        ({"loras": [(str(LAND), 200)]}, "args.loras.0.strength is 200; give a number from -100 to 100"),
        ({"model": "toy_i2v"}, "This model needs an image"),
        ({"model": "toy_i2v", "language": "zh"}, "此模型需要一张图片"),
        ({"prompt": "<script>", "guidance_scale": -1}, "args.guidance_scale is -1"),
        ({"sampling_image_size": [60, 64]}, "nearest legal: args.sampling_image_size=[64,64]"),
    ],
)
def test_what_does_not_fit_is_said_in_the_words_of_the_program(page, client, changes, said):
    before = sorted(page._sampling.folders.outputs.iterdir())
    status, *_ = client.predict(*given(page, **changes), api_name="/sample")
    assert said in status.replace("&#x27;", "'") and 'role="alert"' in status and "<script>" not in status
    assert sorted(page._sampling.folders.outputs.iterdir()) == before


@pytest.mark.parametrize("path", ["/etc/passwd", "README.md", "outputs/../../README.md"])
def test_no_other_file_is_history_run_or_data(page, client, path):
    refused = [
        client.predict("en", path, api_name="/show")[2],
        client.predict("en", path, api_name="/reuse")[0],
        client.predict("en", path, api_name="/watch")[0],
        client.predict("en", "toy_lora", "toy_sft", path, "", api_name="/check")[0],
    ]
    assert all("is not in the folders of this page" in said for said in refused)


NEAR = SimpleNamespace(cookies={}, session_hash="near", client=SimpleNamespace(host="127.0.0.1"), headers=None)


@pytest.fixture
def made(page):
    """A function: record → a video that the command line has made; all are removed after the test."""
    folder = page._sampling.folders.outputs / "by hand"

    def make(**record):
        path = folder / "0_a" / "0" / f"{len(list(folder.rglob('*.mp4'))):06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        path.with_suffix(".json").write_text(json.dumps({"prompt": "a", **record}))
        return path

    yield make
    shutil.rmtree(folder, ignore_errors=True)


def test_what_is_used_again_says_what_the_page_does_not_have(page, made):
    history, sampling = page._history, page._sampling
    said, _, _, model, *rest = history.reuse(
        NEAR, "en", str(made(configs=["mine.yaml"], original_prompt="a cat", video="a.mp4", vae_tiling=True))
    )
    for part in ("a language model wrote from: a cat", "args.video a.mp4", "is not among those of this page"):
        assert part in said, said
    assert model == gradio.skip()
    values = sampling.values_of(rest[4 + len(sampling.loras) :])
    assert (values["prompt"], values["vae_tiling"]) == ("a", "true")
    assert history.show(NEAR, "en", None) == (None, None, ""), "none is chosen"


def test_the_image_of_a_video_is_taken_again_while_it_is_there(page, made, tmp_path):
    kept = made().parent / "first.png"
    Image.new("RGB", (64, 64), "red").save(kept)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "elsewhere.png")
    record = {"configs": ["configs/toy_i2v.yaml"], "image": str(kept)}
    said, group, picture, model, *_ = page._history.reuse(NEAR, "en", str(made(**record)))
    assert group["visible"] and model == "toy_i2v" and "data:image/jpeg" in picture
    assert "image" not in said and page.sessions.image(NEAR.session_hash)
    elsewhere = made(**{**record, "image": str(tmp_path / "elsewhere.png")})
    kept.unlink()
    for path in (made(**record), elsewhere):
        said, _, picture, *_ = page._history.reuse(NEAR, "en", str(path))
        assert picture == "" and "choose it again" in said
    page.sessions.forget(NEAR.session_hash)


def test_what_is_on_the_right_of_a_comparison(page):
    compared, left = page._sampling._compared, [(LAND, 1.0), (LAND / "a", 0.5)]
    other = page._sampling.folders.runs[0] / OTHER
    assert compared("en", left, "none", None) == [] and compared("en", left, "", None) == left
    assert compared("en", left, "", 0.2) == [(LAND, 0.2), left[1]]
    assert compared("en", left, str(other), None) == [(other, None)]
    for loras, lora in ((left, "none"), ([], "")):
        with pytest.raises(InputError, match="no LoRA that it could be of"):
            compared("en", loras, lora, 0.2)
    with pytest.raises(InputError, match="is not in the folders"):
        compared("en", left, "/etc", None)


def test_choices_that_were_not_offered_are_refused(page):
    """As gradio does, which lets a missing one pass."""
    for changes, said in (
        ({"model": None}, "'None' is no model of this page; its models are toy, "),
        ({"speed": "../fast"}, "'../fast' is no preset in configs/speed; there are "),
    ):
        with pytest.raises(InputError, match=said):
            page._sampling._request("window", *given(page, **changes))


def test_a_comparison_whose_right_side_does_not_fit_leaves_no_folder(page, client):
    before = sorted(page._sampling.folders.outputs.iterdir())
    status, *_ = client.predict("en", "", None, "", -1, None, *given(page)[1:], api_name="/compare")
    assert "args.num_steps is -1" in status
    assert sorted(page._sampling.folders.outputs.iterdir()) == before


def test_a_model_brings_its_settings_and_the_length_of_its_video(page):
    sampling = page._sampling
    group, *flat = sampling.use_model("cogvideox_5b_i2v", "a pig flies")
    values = sampling.values_of(flat)
    assert values["prompt"] == gradio.skip(), "one's own"
    assert group["visible"] is True and values["guidance_scale"] == 6 and values["seed"] == gradio.skip(), "it stays"
    assert "17 frames, 2.1 s" in sampling.length("en", "toy", "", loop=False)["info"]
    assert "9 frames" in sampling.length("en", "toy", "3", loop=False)["info"]
    for name, latents in (("huge", 3), ("toy", 0), ("toy", "x")):
        assert sampling.length("en", name, latents, loop=False)["info"] == "", "sampling says what is wrong"


def test_a_model_brings_an_example_in_the_place_of_another_and_says_if_its_weights_are_missing(page):
    sampling = page._sampling
    for before in ("", " ", sampling.models["toy"].example):
        _, *flat = sampling.use_model("cogvideox_5b", before)
        assert sampling.values_of(flat)["prompt"].startswith("A golden retriever trots along a wet beach")
    assert sampling.models["toy_i2v"].example == "a red square moves up", "without its image"
    english, chinese = ({name: label for label, name in sampling._offered(language)} for language in ("en", "zh"))
    assert english["toy"] == "toy" and english["cogvideox_2b"] == "cogvideox_2b (weights missing)"
    assert chinese["cogvideox_2b"] == "cogvideox_2b（缺少权重）"


def test_memory_is_chosen_by_what_is_free(page, made):
    asked = {
        memory: page._sampling._request("w", *given(page, memory=memory)).words(Path("out")) for memory in ("auto", "")
    }
    (override,) = [word for word in asked["auto"] if word.startswith("args.memory=")]
    assert "auto" in override and not any("args.memory" in word for word in asked[""])
    _, _, _, _, _, memory, *_ = page._history.reuse(NEAR, "en", str(made(overrides=[override])))
    assert memory == "auto"


def test_what_differs_stands_above_the_second_video():
    from sgm.web.sample_tab import _difference  # which needs gradio

    changes = {"lora": LAND.name, "control.strength": 0.5, "speed": "", "control.num_steps": None}
    assert _difference("en", changes) == f"LoRA adapter {LAND.name}, Strength 0.5"
    assert _difference("zh", {"control.num_steps": 3}) == "采样步数 3" and _difference("zh", {}) == ""


def test_the_language_is_that_of_the_browser_until_another_is_chosen(page):
    def greeted(cookie, accepted):
        request = SimpleNamespace(cookies={COOKIE: cookie}, headers={"accept-language": accepted})
        return page._greet(request)[0], request

    assert greeted("a", "zh-CN,zh")[0] == "zh" and greeted("a", "de, en")[0] == "en"
    page._speak(greeted("a", "zh")[1], "en")
    assert greeted("a", "zh")[0] == "en" and greeted("b", "zh")[0] == "zh"
    assert page._greet(NEAR)[0] == "en", "a client without headers"


def test_a_window_without_anything_running_is_left_as_it_is(page):
    (nothing,) = page._sampling.again(NEAR, "en")
    assert nothing == (gradio.skip(),) * 4


def test_a_taken_port_is_told_with_the_cure(page, monkeypatch):
    def launch(**_):
        raise OSError("Cannot find empty port in range: 80-80")

    monkeypatch.setattr(page.blocks, "queue", lambda: SimpleNamespace(launch=launch))
    with pytest.raises(InputError, match="at 127.0.0.1, port 80: Cannot find empty port.*choose another --port"):
        page.launch("127.0.0.1", 80)


def test_an_upload_is_served_to_nobody(page, client, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "mine.png")
    _, html = client.predict("en", gradio_client.handle_file(tmp_path / "mine.png"), api_name="/image")
    assert 'src="data:image/jpeg' in html
    (kept,) = page.sessions.root.glob("*/image.png")
    assert [path for path in Path(page.cache).rglob("*.png")] == []
    assert requests.get(f"{page.address}gradio_api/file={kept}", timeout=10).status_code in (403, 404)
    (tmp_path / "mine.png").write_text("text")
    _, html = client.predict("en", gradio_client.handle_file(tmp_path / "mine.png"), api_name="/image")
    assert "cannot be read as a picture" in html


def test_the_page_stays_on_this_machine(page):
    config = page.blocks.config
    assert page.address.startswith("http://127.0.0.1:") and page.blocks.share is False
    assert config["analytics_enabled"] is False and page.blocks.allowed_paths == []
    html = requests.get(page.address, timeout=10).text
    fonts = [word for word in ("googleapis", "gstatic", "cdnjs", "jsdelivr") if word in html]
    assert fonts == []


def test_every_word_changes_with_the_language(page):
    english, chinese = (page.view.updates(language) for language in ("en", "zh"))
    assert len(english) == len(page.view.components) > 40
    for one, other in zip(english, chinese, strict=True):
        same = {name for name in one if one[name] == other[name] and name not in ("__type__", "choices") and one[name]}
        assert same == set(), one
    assert {name for name in page._sampling.components} >= {*BASIC}


def test_the_command_line_refuses_what_is_not_there(tmp_path, capsys):
    assert main.main(["--data", str(tmp_path / "none"), "--outputs", str(tmp_path)]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main.main(["--configs", str(tmp_path), "--outputs", str(tmp_path)]) == 2
    assert "no model file" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_the_page_is_served_until_a_signal_and_closed(tmp_path, monkeypatch, capsys, host, warned):
    calls = []

    class Page:
        def __init__(self, folders) -> None:
            calls.append(folders.outputs)

        def launch(self, host, port) -> str:
            calls.append((host, port))
            return "http://127.0.0.1:80/"

        def close(self) -> None:
            calls.append("closed")

    def interrupted(_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sgm.web.page.Page", Page)
    monkeypatch.setattr(main, "free_port", lambda _, port: port)
    monkeypatch.setattr(main.threading.Event, "wait", interrupted)
    assert main.main(["--outputs", str(tmp_path), "--host", host, "--port", "80"]) == 130
    said = capsys.readouterr().err
    assert calls == [tmp_path, (host, 80), "closed"] and "open http://127.0.0.1:80/ in a browser" in said
    assert ("can sample without a password" in said) is warned and "finished videos are kept" in said


def test_without_gradio_the_command_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda _: None)
    assert main.main(["--outputs", str(tmp_path)]) == 2 and "pip install -e '.[web]'" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [None, CancelledError(), RunError("it failed")])
def test_a_training_is_checked_and_its_command_shown(page, monkeypatch, failure):
    submitted = []

    def watch(_):
        yield None
        if failure is not None:
            raise failure

    def submit(job):
        submitted.append(job)
        (job.folder / jobs.LOG).write_text("4 clips")
        return job

    monkeypatch.setattr(page._training, "queue", SimpleNamespace(submit=submit, watch=watch, position=lambda _: 1))
    *states, (status, says, _) = page._training.check(NEAR, "en", "toy_lora", "toy_sft", "assets/toy", "8gb")
    assert states[1][2]["value"].startswith("python train_video.py --base configs/toy_lora.yaml configs/toy_sft.yaml")
    assert "configs/memory/8gb.yaml" in states[1][2]["value"] and "Waiting: 1 before" in states[2][0]
    (job,) = submitted
    assert "--check" in job.commands[0].words and job.folder.is_dir()
    job.tidy(job.folder)
    if failure is None:
        assert status == "" and says["value"] == "4 clips"
    else:
        assert (str(failure) or "Cancelled") in status


def test_what_cannot_be_trained_or_watched_is_said(page, monkeypatch):
    watching, folders = page._training, page._training.folders
    for choice in (("huge", "toy_sft", ""), ("toy_lora", "huge", ""), ("toy_lora", "toy_sft", "huge")):
        *_, (status, _, _) = watching.check(NEAR, "en", *choice[:2], "assets/toy", choice[2])
        assert "is none of" in status
    assert watching.watch("en", None) == [gradio.skip()] * 6 and watching.samples(NEAR, "en", None, "")[1] == ""
    (empty := folders.runs[0] / "began").mkdir()
    state, *plots = watching.watch("en", str(empty))
    assert "no run yet" in state and {plot["visible"] for plot in plots} == {"hidden"}
    listed, state, timer = watching.offer("en", None)
    assert listed["choices"] == [] and "no run yet" in state and timer.active is False
    (empty / "metrics.jsonl").touch()
    listed, state, timer = watching.offer("en", None)
    assert listed["value"] == str(empty) and state == "" and timer.active
    shutil.rmtree(empty)
    monkeypatch.setattr(watching, "folders", replace(folders, data=()))
    *_, (status, _, _) = watching.check(NEAR, "en", "toy_lora", "toy_sft", "assets/toy", "")
    assert "--data" in status


def test_an_address_that_cannot_be_had_is_told_at_once(capsys):
    elsewhere = ".".join(("192", "0", "2", "1"))  # reserved for examples
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        asked = [["--port", str(port)], ["--port", "0"], ["--port", "70000"], ["--host", elsewhere], ["--host", ""]]
        said = [(main.main(words), capsys.readouterr().err) for words in asked]
        assert main.free_port("127.0.0.1", None) in main.PORTS
    assert [code for code, _ in said] == [2] * len(asked)
    assert f"port {port}: Address already in use; choose another --port" in said[0][1]
    assert all("give a number from 1 to 65535" in text for _, text in said[1:3])
    assert all("give an address of this machine" in text for _, text in said[3:])


def test_a_video_that_is_gone_when_it_is_shown_is_told(page, tmp_path):
    job = SimpleNamespace(commands=[SimpleNamespace(folder=tmp_path)], log=lambda: "all of it")
    status, *_, log = page._sampling._made(SimpleNamespace(session_hash="a"), "en", job, 0)
    assert f"the video in {tmp_path} cannot be shown: it is gone" in status and log == "all of it"


def test_a_run_that_goes_on_is_followed(page):
    run = page._sampling.folders.runs[0] / "followed"
    request = SimpleNamespace(session_hash="follower")
    (run / "samples" / "10").mkdir(parents=True)
    lines = [{"iteration": 10, "loss": 1.5, "loss_0_249": 1.0}, {"iteration": 10, "validation_loss": 2.0}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    watching = page._training
    state, curves, *quarters = watching.watch("en", str(run))
    assert [plot["visible"] for plot in quarters] == [True, "hidden", "hidden", "hidden"]
    assert "Iteration 10" in state and curves["visible"] is True and set(curves["value"]["kind"]) == KINDS
    assert quarters[0]["value"]["kind"].tolist() == ["training", "validation"], "it may still come"
    assert quarters[0]["value"]["loss"].isna().tolist() == [False, True]
    chinese, shown, *_ = watching.watch("zh", str(run))
    assert shown["value"].equals(curves["value"]), "names of colours stay the same"
    assert "</span> validation" in state and "</span> 验证" in chinese
    nothing, newest = watching.samples(request, "en", str(run), "of another run")
    assert nothing["value"] == [] and nothing["visible"] == "hidden" and newest == ""
    for number in ("10", "20"):
        video = run / "samples" / number / "000000.mp4"
        video.parent.mkdir(exist_ok=True)
        video.touch()
        video.with_suffix(".json").write_text('{"prompt": "a"}')
        os.utime(video, (int(number), int(number)))
        shown, newest = watching.samples(request, "en", str(run), newest)
        assert len(shown["value"]) == int(number) // 10 and shown["visible"] is True and newest == f"en {video}"
        assert shown["value"][0][1] == f"iteration {number}: a"
    assert watching.samples(request, "en", str(run), newest)[0] == gradio.skip(), "videos do not begin again"
    assert watching.samples(request, "zh", str(run), newest)[0]["value"][0][1] == "第 20 步：a"
    shutil.rmtree(run)


class Browser:
    """A browser that keeps its cookie, as a client of the page's functions; a window each."""

    def __init__(self, page) -> None:
        self.page = page
        self.cookies = dict(requests.get(page.address, timeout=10).cookies)
        self.windows = []

    def window(self):
        header = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        made = gradio_client.Client(
            self.page.address, verbose=False, analytics_enabled=False, headers={"Cookie": header} if header else None
        )
        self.windows.append(made)
        return made

    def close(self) -> None:
        for window in self.windows:
            window.close()


@pytest.fixture
def browsers(page):
    made = [Browser(page), Browser(page)]
    yield made
    for browser in made:
        browser.close()


def test_a_browser_finds_again_what_it_makes_and_no_other_does(page, browsers):
    mine, other = browsers
    first, others = mine.window(), other.window()
    assert [*mine.cookies] == ["cogvideox-browser"] and mine.cookies != other.cookies
    job = first.submit(*given(page, seed=7, num_steps=20), api_name="/sample")
    wait(job, "Step")
    (running,) = page.queue._unfinished.values()
    process = psutil.Process(running._process.pid)
    process.suspend()
    first.close()  # the window is closed while it samples
    second = mine.window()
    again = second.submit("zh", api_name="/again")
    wait(again, "")
    process.resume()
    assert "nothing to cancel" in others.predict("en", api_name="/cancel")
    status, video, *_ = again.result()
    assert "完成" in status and video and not running.cancelled
    path = str(next(running.folder.rglob("*.mp4")))
    assert second.predict("en", path, api_name="/show")[1]["seed"] == 7
    for call in ("/show", "/reuse"):
        assert any(
            "no finished video of this browser" in str(part) for part in others.predict("en", path, api_name=call)
        )
    assert path in offered(page, mine) and path not in offered(page, other)


def test_two_browsers_wait_for_each_other_and_cancel_their_own(page, browsers):
    first, second = (browser.window() for browser in browsers)
    mine = first.submit(*given(page, num_steps=1000), api_name="/sample")
    wait(mine, "Step")
    (running,) = page.queue._unfinished.values()
    process = psutil.Process(running._process.pid)
    waiting = second.submit(*given(page, seed=8), api_name="/sample")
    wait(waiting, "Waiting: 1 before this one")
    assert "Cancelled" in second.predict("en", api_name="/cancel") and process.is_running()
    assert "nothing to cancel" in second.predict("en", api_name="/cancel") and process.is_running()
    assert "Cancelled" in first.predict("en", api_name="/cancel")
    assert "Cancelled" in mine.result()[0] and "Cancelled" in waiting.result()[0]
    assert not psutil.pid_exists(process.pid) and not running.folder.exists()


def wait(job, words):
    end = time.monotonic() + 60
    while not any(words in str(update[0]) for update in job.outputs()):
        assert time.monotonic() < end and not job.done(), job.outputs()[-1:]
        time.sleep(0.01)


def offered(page, browser):
    """Return the finished videos that a browser elsewhere is offered."""
    request = SimpleNamespace(cookies=browser.cookies, session_hash="any", client=SimpleNamespace(host="elsewhere"))
    listed, _ = page._history.offer(request, "en", None)
    return [value for _, value in listed["choices"]]
