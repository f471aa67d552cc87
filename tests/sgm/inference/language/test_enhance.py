"""Prompts rewritten by language models: a tiny random one, a stub of an endpoint, and scripted ones."""

import json
import shutil
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests
import torch

import sgm.inference.language.enhance
import sgm.inference.prepare
from sgm.config.args import SamplingArgs, TrainingArgs
from sgm.config.load import ConfigError, load_config
from sgm.inference.language import models
from sgm.inference.language.enhance import RECORD, answer_text, enhance, enhanced, language_fault, make_writer
from sgm.inference.language.models import ENDPOINT_KEY, ChatModel, Cut, Endpoint
from sgm.inference.main import main
from sgm.inference.prompts import Prompt
from sgm.modules.encoders.t5_folder import UnknownText
from sgm.util import InputError, RunError

ROOT = Path(__file__).parents[4]
sys.path.insert(0, str(ROOT / "tools"))

import enhance_prompts  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ message.role }}> {{ message.content }} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
SHORT = "model.conditioner_config.params.emb_models.0.params.max_length=6"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A tiny Llama with random weights, whose words are "a", "e" and marks."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llm")
    words = ["<unk>", "</s>", "a", "e", "<user>", "<assistant>"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=len(words), eos_token_id=1, bos_token_id=None)
    network = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        network.lm_head.weight[[0, 1, 4, 5]] = 0  # else it may choose what is no word
        network.lm_head.weight[3] = -network.lm_head.weight[2]
    network.save_pretrained(folder)
    return folder


class Scripted:
    """Gives its answers one after the other, and keeps what it was asked."""

    name = "scripted"

    def __init__(self, *answers):
        self.answers, self.chats = list(answers), []

    def answer(self, messages):
        self.chats.append(list(messages))
        return self.answers.pop(0)


class Tokenizer:
    """A text encoder that reads at most six words, of ASCII."""

    def cut_texts(self, texts):
        return {t: f"it has {n} tokens and max_length is 6" for t in texts if (n := len(t.split())) > 6}

    def unknown_texts(self, texts):
        lost = {text: "".join(c for c in text if not c.isascii()) for text in texts}
        return {text: UnknownText(found, len(found) == len(text)) for text, found in lost.items() if found}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("<think>a cat? yes.</think>\n A cat\nsleeps. ", "A cat sleeps."),
        ("the template opened this</think>A cat.", "A cat."),
        ("<think>never ends", ""),
        ("<Thinking>a cat?</Thinking> A cat.<THINKING>or", "A cat."),
        ('**Paragraph:** "A cat."', "A cat."),
        ("A cat@@dog.png", "A cat dog.png"),
        ("A\u202e cat\x00", "A cat"),
    ],
)
def test_only_the_paragraph_of_an_answer_is_kept(answer, text):
    assert answer_text(answer) == text


def test_what_does_not_fit_is_asked_for_again_and_kept(tmp_path):
    writer = Scripted("one two three four five six seven", "雨", "rain falls", "it rains more")
    prompts = [Prompt(0, "下雨"), Prompt(1, "再下雨", Path("x.png"))]
    given = enhance(prompts, lambda: writer, Tokenizer(), tmp_path / RECORD, name="m")
    assert [(p.text, p.original, p.title, p.image) for p in given] == [
        ("rain falls", "下雨", "下雨", None),
        ("it rains more", "再下雨", "再下雨", Path("x.png")),
    ]
    first, second, third, other = writer.chats
    assert [m["role"] for m in third] == ["user", "assistant", "user", "assistant", "user"]
    assert "下雨" in first[0]["content"] and "7 tokens and max_length is 6" in second[-1]["content"]
    assert "is not English" in third[-1]["content"] and "picture that you cannot see" in other[0]["content"]
    assert "picture that you cannot see" not in first[0]["content"]
    kept = json.loads((tmp_path / RECORD).read_text())
    assert [entry["enhanced"] for entry in kept] == ["rain falls", "it rains more"]
    kept[0]["enhanced"] = "mine"
    (tmp_path / RECORD).write_text(json.dumps(kept))
    again = enhance(prompts, lambda: pytest.fail("asked again"), Tokenizer(), tmp_path / RECORD, name="m")
    assert [p.text for p in again] == ["mine", "it rains more"]
    enhance(prompts[:1], lambda: Scripted("rain"), Tokenizer(), tmp_path / RECORD, name="another model")
    kept[1]["enhanced"] = "one two three four five six seven"
    (tmp_path / RECORD).write_text(json.dumps(kept))
    again = enhance(prompts, lambda: Scripted("it pours"), Tokenizer(), tmp_path / RECORD, name="m")
    assert [p.text for p in again] == ["mine", "it pours"], "what does not fit any more is written again"
    for text, said in (("[", "cannot be read .line 1"), ("{}", "is no list of enhanced prompts")):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(InputError, match=f"{RECORD} {said}"):
            enhance(prompts, lambda: pytest.fail("asked"), Tokenizer(), tmp_path / RECORD, name="m")


def test_what_never_fits_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"prompt 0 \('x'\): scripted wrote no usable prompt in 3 attempts.*empty"):
        enhance([Prompt(0, "x")], lambda: Scripted("雨", " ", "<think>"), Tokenizer(), tmp_path / RECORD, name="m")
    (tmp_path / RECORD).write_text('{"not": "a list"}')
    with pytest.raises(InputError, match="no list of enhanced prompts"):
        enhance([Prompt(0, "x")], Scripted, Tokenizer(), tmp_path / RECORD, name="m")


def test_a_run_samples_the_enhanced_prompt_and_records_both(tiny_model, chat_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sgm.inference.language.enhance, "MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(sgm.inference.prepare, "sampling_rows", lambda *_: {})  # estimates take a second
    (tmp_path / "p.txt").write_text("一只猫\n", encoding="utf-8")
    words = ["--base", str(tiny_model("dit_t2v_2b")), f"args.input_file={tmp_path / 'p.txt'}", SHORT]
    words += [f"args.output_dir={tmp_path / 'out'}", "args.only_save_latents=true"]
    assert main(words) == 2, "its tokenizer knows no word"
    words.append(f"args.prompt_enhancer={chat_model}")
    assert main([*words, "--check"]) == 0
    assert f"1 from {tmp_path / 'p.txt'}, each written anew by {chat_model}" in capfd.readouterr().out
    assert main(words) == 0
    (sidecar,) = (tmp_path / "out/0_一只猫").rglob("000000.json")
    made = json.loads(sidecar.read_text())
    assert made["prompt"] and set(made["prompt"]) <= set("ae ") and made["original_prompt"] == "一只猫"
    assert made["prompt_enhancer"] == str(chat_model)
    first = (tmp_path / "out" / RECORD).read_bytes()
    (tmp_path / "out" / RECORD).unlink()
    assert main(words) == 0
    assert (tmp_path / "out" / RECORD).read_bytes() == first, "the same again"
    assert "0 written, 1 skipped" in capfd.readouterr().err


def test_a_folder_that_cannot_chat_ends_with_2(tiny_model, chat_model, tmp_path, capfd):
    (tmp_path / "p.txt").write_text("a\n")
    shutil.copytree(chat_model, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    words = ["--base", str(tiny_model("dit_t2v_2b")), f"args.input_file={tmp_path / 'p.txt'}"]
    assert main([*words, f"args.prompt_enhancer={tmp_path / 'model'}", f"args.output_dir={tmp_path}"]) == 2
    assert "args.prompt_enhancer" in (said := capfd.readouterr().err) and "has no chat template" in said
    with pytest.raises(InputError, match="chat template of .* cannot be used: no system"):
        model = ChatModel(chat_model, device=torch.device("cpu"), max_new_tokens=1)
        model.answer([{"role": "system", "content": "a"}])


def test_an_answer_that_breaks_off_is_asked_for_again(tmp_path, capfd):
    writer = Scripted(Cut("a cat sleeps on the"), "a cat sleeps")
    (given,) = enhance([Prompt(0, "x")], lambda: writer, Tokenizer(), tmp_path / "a.json", name="m")
    assert given.text == "a cat sleeps" and "it breaks off at the longest answer" in writer.chats[1][-1]["content"]
    (given,) = enhance(
        [Prompt(0, "x")], lambda: Scripted(*[Cut("a cat")] * 3), Tokenizer(), tmp_path / "b.json", name="m"
    )
    assert given.text == "a cat" and "breaks off at the longest answer; allow more tokens" in capfd.readouterr().err
    thinks = Scripted(*[Cut("<think>so")] * 3)
    with pytest.raises(
        InputError, match="breaks off at the longest answer, and the answer is empty.*allow more tokens"
    ):
        enhance([Prompt(0, "x")], lambda: thinks, Tokenizer(), tmp_path / "c.json", name="m")


def test_a_model_says_whether_its_answer_breaks_off(chat_model):
    writer = ChatModel(chat_model, device=torch.device("cpu"), max_new_tokens=2)
    messages = [{"role": "user", "content": "a"}]
    assert isinstance(writer.answer(messages), Cut)
    second = writer._model.generate
    writer._model.generate = lambda **given: torch.nn.functional.pad(
        second(**given)[:, :-1], (0, 1), value=writer._model.generation_config.eos_token_id
    )
    assert not isinstance(writer.answer(messages), Cut), "it has ended at its last token"


def test_training_refuses_it():
    args = TrainingArgs(prompt_enhancer="http://127.0.0.1:1/v1", prompt_enhancer_model="m", load="x")
    assert [name for name, *_ in args.problems()][:2] == ["prompt_enhancer", "prompt_enhancer_model"]


class Stub(BaseHTTPRequestHandler):
    """Answers "a e" to the model m, and keeps the headers and bodies of requests."""

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        status, content = {
            "m": (200, {"choices": [{"message": {"content": "<think>hm</think>a e"}}]}),
            "odd": (200, {"choices": []}),
            "cut": (200, {"choices": [{"message": {"content": "a e"}, "finish_reason": "length"}]}),
            "listed": (200, {"choices": [["a e"]]}),
            "parts": (200, {"choices": [{"message": {"content": [{"type": "text", "text": "a e"}]}}]}),
            "deep": (200, b"[" * 100_000),
            "once": (429 if len(self.server.asked) == 1 else 200, {"choices": [{"message": {"content": "a e"}}]}),
            "busy": (503, {}),
            "moved": (307, {}),
        }.get(body["model"], (404, {"error": "no such model"}))
        self.send_response(status)
        if status in (429, 503):
            self.send_header("Retry-After", "86400")
        if status == 307:
            self.send_header("Location", "/other")
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with HTTPServer(("127.0.0.1", 0), Stub) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def test_an_endpoint_gets_the_key_only_from_those_who_typed_its_address(endpoint, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv(ENDPOINT_KEY, "secret")
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    (tmp_path / "own.yaml").write_text(f"args: {{prompt_enhancer: '{url}', prompt_enhancer_model: m}}")
    bases, typed = [tiny_model("dit_i2v_5b"), tmp_path / "own.yaml"], f"args.prompt_enhancer={url}"
    for words in ([], [typed]):
        out = f"args.output_dir={tmp_path / str(len(words))}"
        config = load_config(bases, ["args.prompt=猫", out, *words], mode="inference")
        (prompt,) = enhanced(config, [Prompt(0, "猫", Path("x.png"))], torch.device("cpu"))
        assert (prompt.text, prompt.image, prompt.enhancer) == ("a e", Path("x.png"), f"m at {url}")
    (path, without, body), (_, with_key, _) = endpoint.asked
    assert path == "/v1/chat/completions" and body["temperature"] == 0 and "猫" in body["messages"][0]["content"]
    assert without is None and with_key == "Bearer secret"
    assert "secret" not in (tmp_path / "1" / RECORD).read_text()
    for words in (["args.prompt_enhancer_model=null"], ["args.prompt_enhancer=here"]):
        with pytest.raises(ConfigError, match="prompt_enhancer_model"):
            load_config(bases, ["args.prompt=a", *words], mode="inference")


def _unreachable() -> str:
    inner = OSError(111, "Connection refused")
    outer = requests.ConnectionError(RuntimeError("a pool with an address and retries"))
    outer.__context__ = inner
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError) as caught:
        patch.setattr(requests.Session, "post", lambda *_, **__: (_ for _ in ()).throw(outer))
        Endpoint("http://127.0.0.1:1/v1", "m", with_key=False).answer([])
    return str(caught.value)


def test_what_an_endpoint_says_wrong_is_reported(endpoint):
    url = f"http://127.0.0.1:{endpoint.server_port}/v1/"
    for model, error, said in (
        ("other", InputError, "answers 404.*no such model"),
        ("moved", InputError, "answers 307"),
        ("odd", RunError, "without choices"),
        ("deep", RunError, "without choices"),
        ("parts", RunError, "something else than text"),
    ):
        with pytest.raises(error, match=said):
            Endpoint(url, model, with_key=False).answer([])
    for wrong in ("file://x", "http://127.0.0.1:99999/v1", "http://127.0.0.1:0/v1", "http://127.0.0.1:b/v1"):
        with pytest.raises(InputError, match="no address"):
            Endpoint(wrong, "m", with_key=False)
    assert "/v1/chat/completions cannot be reached: Connection refused; start it" in _unreachable()
    assert [path for path, *_ in endpoint.asked] == ["/v1/chat/completions"] * 5


def test_an_endpoint_that_breaks_off_or_never_answers_is_told(endpoint, monkeypatch):
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    assert isinstance(Endpoint(url, "cut", with_key=False).answer([]), Cut)
    assert not isinstance(Endpoint(url, "m", with_key=False).answer([]), Cut)
    with pytest.raises(RunError, match="without choices"):
        Endpoint(url, "listed", with_key=False).answer([])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(models, "_TIMEOUT", (1, 0.05))
        with pytest.raises(RunError, match=r"cannot be reached: no answer within 0.05 seconds; start it"):
            Endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "m", with_key=False).answer([])


def test_a_busy_endpoint_is_asked_again(endpoint, monkeypatch):
    monkeypatch.setattr(models, "_BACKOFF", 0)
    monkeypatch.setattr(models, "_LONGEST_WAIT", 0.01)  # not the day that it asks for
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    assert Endpoint(url, "once", with_key=False).answer([]) == "a e" and len(endpoint.asked) == 2
    with pytest.raises(RunError, match=r"is busy \(503: .*; try again later"):
        Endpoint(url, "busy", with_key=False).answer([])
    assert len(endpoint.asked) == 2 + 4


def test_the_tool_writes_a_file_of_prompts_with_their_images(chat_model, tiny_model, tmp_path, capfd):
    (tmp_path / "p.txt").write_text("\ufeff\n猫@@x.png\n\n狗@@../y.png\n", encoding="utf-8")
    words = [str(tmp_path / "p.txt"), "--model", str(chat_model), "--base", str(tiny_model("dit_i2v_5b"))]
    words += ["--max_new_tokens", "2", "--out"]
    assert enhance_prompts.main([*words, str(tmp_path / "out.txt")]) == 0
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert [line.partition("@@")[2] for line in lines] == ["x.png", "../y.png"]
    kept = json.loads((tmp_path / "out.txt.json").read_text())
    assert [(e["original"], e["enhanced"]) for e in kept] == [
        ("猫", lines[0].partition("@@")[0]),
        ("狗", lines[1].partition("@@")[0]),
    ]
    assert enhance_prompts.main([*words, str(tmp_path / "p.txt")]) == 2
    (tmp_path / "notes.txt").write_text("mine")
    assert enhance_prompts.main([*words, str(tmp_path / "notes.txt")]) == 2
    assert "name another" in capfd.readouterr().err and (tmp_path / "notes.txt").read_text() == "mine"


def test_a_missing_file_of_prompts_ends_with_2(tmp_path, capfd):
    for name in ("out.txt", "out.txt.json"):
        (tmp_path / name).write_text("[]")
    words = ["--model", "m", "--base", "configs/toy.yaml", "--out", str(tmp_path / "out.txt")]
    assert enhance_prompts.main(["none.txt", *words]) == 2
    assert "prompt file 'none.txt'" in capfd.readouterr().err


@pytest.mark.parametrize("option", ["--dtype=bf16", "--max_new_tokens=9"])
def test_options_of_a_folder_are_refused_with_an_endpoint(option, tmp_path, capfd):
    words = [
        "p.txt",
        "--model",
        "m",
        "--base",
        "a.yaml",
        "--out",
        str(tmp_path / "out"),
        "--endpoint",
        "http://127.0.0.1/v1",
    ]
    assert enhance_prompts.main([*words, option]) == 2
    assert f"{option.partition('=')[0]} is for a model on disk" in capfd.readouterr().err


GERMAN = "Eine graue Katze schläft eingerollt auf einer Fensterbank aus Holz, während Regen über die Scheibe rinnt"
FRENCH = "Un chat gris dort sur le rebord en bois de la fenêtre tandis que des gouttes de pluie coulent sur la vitre"
ENGLISH = "A grey cat sleeps curled up on a wooden sill while raindrops run down the pane and blur the green garden"


@pytest.mark.parametrize(
    ("text", "fits"), [(GERMAN, False), (FRENCH, False), (ENGLISH, True), ("cat, window, rain, 4k", True)]
)
def test_other_languages_with_latin_letters_are_recognised(text, fits):
    assert (language_fault(text) is None) == fits


def test_a_long_thinker_may_write_more(monkeypatch):
    made = []
    monkeypatch.setattr("sgm.inference.language.enhance.ChatModel", lambda *_, **given: made.append(given))
    for tokens in (None, 4096):
        make_writer(SamplingArgs(prompt_enhancer="llm", prompt_enhancer_tokens=tokens), (), torch.device("cpu"))
    assert [given["max_new_tokens"] for given in made] == [1024, 4096]
    endpoint = SamplingArgs(
        prompt_enhancer="http://127.0.0.1:1/v1", prompt_enhancer_model="m", prompt_enhancer_tokens=9
    )
    for args, why in ((SamplingArgs(prompt_enhancer_tokens=9), "there is no"), (endpoint, "an endpoint limits")):
        found = {key: text for key, text, _ in args.problems()}
        assert why in found["prompt_enhancer_tokens"]
