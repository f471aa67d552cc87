"""Data sets behind URLs: the samples of local ones, whatever the server does; bounded, exact, without secrets."""

import copy
import io
import os
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
import torch

from data_video import SFTDataset
from sgm.config.load import load_config
from sgm.data.cache import CachedTensors, Description, begin, upload_cache, write_shard
from sgm.data.clips.decode import ClipError
from sgm.data.loader import SampleStream, make_loader
from sgm.data.order import TrainingOrder
from sgm.data.remote import objects
from sgm.data.remote.folder import RemoteFolder
from sgm.data.remote.objects import RemoteFile, look_up
from sgm.data.remote.store import RefusedError, RemoteError, Store
from sgm.training.main import main
from sgm.training.metrics import read_metrics
from sgm.training.prepare import prepare
from sgm.training.run import train
from sgm.urls import is_url, redacted, url_problem
from sgm.util import InputError, RunError

SETTINGS = {"video_size": (48, 64), "fps": 8, "max_num_frames": 5, "skip_frms_num": 0}


def clip(value: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in range(5):
            pixels = np.full((48, 64, 3), value + frame, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def archive(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Two shards of three clips in a folder here."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    folder.mkdir()
    for shard in range(2):
        clips = {f"{n}.mp4": clip(100 * shard + 30 * n) for n in range(3)}
        captions = {f"{n}.txt": b"clip %d of %d" % (n, shard) for n in range(3)}
        (folder / f"{shard:03d}.tar").write_bytes(archive(dict(sorted((clips | captions).items()))))
    return folder


class Server(ThreadingHTTPServer):
    """Serves a folder; `faults` are used up one a request for content: a status, or 'cut', or 'slow'.

    `marks` are the headers that tell a version, and `requests` those that were answered.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.ranges, self.requests, self.marks = folder, [], True, [], ("ETag",)
        self.url, self.store = f"http://127.0.0.1:{self.server_port}", Store()


class Handler(BaseHTTPRequestHandler):
    """Answers with ranges, and an ETag of the content."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, *, send: bool) -> None:
        server = cast(Server, self.server)
        fault = server.faults.pop(0) if send and server.faults else None
        path = server.folder / self.path.lstrip("/")
        if isinstance(fault, int) or not path.is_file():
            self.send_response(fault or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, status = path.read_bytes(), 200
        marks = {"ETag": f'"{hash(content)}"', "Last-Modified": formatdate(path.stat().st_mtime, usegmt=True)}
        whole = len(content)
        if server.ranges and (wanted := self.headers.get("Range")):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            content, status = content[int(first) : int(last or len(content)) + 1], 206
        server.requests.append((self.command, self.path, len(content)))
        if fault == "slow":
            time.sleep(0.4)
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{whole}")
        for name in server.marks:
            self.send_header(name, marks[name])
        self.send_header("Content-Length", str(len(content)))
        if server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if send:
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        if fault == "cut":
            self.close_connection = True


@pytest.fixture(scope="module")
def the_server(shards):
    pytest.importorskip("aiohttp", reason="http:// needs the extra remote")
    server = Server(shards.parent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(the_server, tmp_path, monkeypatch):
    """The server in good order, with an empty store here."""
    the_server.faults, the_server.ranges, the_server.requests, the_server.marks = [], True, [], ("ETag",)
    monkeypatch.setattr(objects, "_FIRST_PAUSE_S", 0.01)
    the_server.store = Store(tmp_path / "store", retries=3)
    return the_server


def dataset(data_dir: str | Path, store: Store | None = None) -> SFTDataset:
    return SFTDataset(data_dir=data_dir, store=store, **SETTINGS)


def assert_same(remote: SFTDataset, local: SFTDataset) -> None:
    assert remote.captions == local.captions
    assert [*remote.cache_keys().values()] == [*local.cache_keys().values()]
    for index in range(len(local)):
        assert torch.equal(remote[index]["mp4"], local[index]["mp4"])


@pytest.mark.parametrize("name", ["", "/", "/{000..001}.tar", "/*.tar"])
def test_a_url_gives_the_samples_of_the_folder(name, shards, tmp_path):
    import fsspec

    store = Store(tmp_path, retries=0)
    system = fsspec.filesystem("memory")
    system.put(str(shards), "/bucket/clips", recursive=True)
    try:
        assert_same(dataset(f"memory://bucket/clips{name}", store), dataset(f"file://{shards}"))
    finally:
        system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("ranges", [True, False])
def test_http_is_read_by_clip_or_whole_and_once(ranges, server, shards):
    server.ranges = ranges
    url = f"{server.url}/clips/{{000..001}}.tar"
    assert_same(dataset(url, server.store), dataset(shards))
    server.requests.clear()
    assert_same(dataset(url, server.store), dataset(shards))  # from the index and the store
    gets = [name for command, name, _ in server.requests if command == "GET"]
    assert sorted(gets) == ["/clips/000.tar", "/clips/001.tar"], "each server is asked once whether it sends parts"
    entries = [*Path(dataset(url, server.store).rows[0].path.container.store.folder).glob("entries/*/*")]  # type: ignore[union-attr]
    assert len(entries) == (6 if ranges else 2)


@pytest.mark.parametrize("faults", [[500, 503], ["cut", "cut"], [429, "cut"], ["slow"]], ids=str)
def test_failures_that_pass_change_nothing(faults, server, shards, monkeypatch, caplog):
    monkeypatch.setattr(objects, "_SILENCE_S", 0.2)
    local, remote = dataset(shards), dataset(f"{server.url}/clips/{{000..001}}.tar", server.store)
    server.faults = list(faults)
    with caplog.at_level("WARNING", "sgm"):
        assert torch.equal(remote[4]["mp4"], local[4]["mp4"])
    assert server.faults == []
    warned = [record.getMessage() for record in caplog.records if "attempt" in record.getMessage()]
    assert len(warned) == len(faults) and f"{server.url}/clips/001.tar: attempt 1 of 4 failed" in warned[0]


@pytest.mark.parametrize(
    "fault, said", [(500, "4 attempts failed"), (403, "wants credentials"), (404, "no such object")]
)
def test_failures_that_stay_name_url_cause_and_cure(fault, said, server):
    remote = dataset(f"{server.url}/clips/001.tar", server.store)
    server.faults = [fault] * 4
    with pytest.raises(RemoteError, match=said) as caught:
        remote[0]
    assert caught.value.exit_code == (1 if fault == 500 else 2) and f"{server.url}/clips/001.tar: " in str(caught.value)
    assert len(server.faults) == (0 if fault == 500 else 3), "only what may pass is asked for again"


@pytest.mark.parametrize("marks, asked", [(("ETag",), 0), (("Last-Modified",), 0), ((), 1)], ids=str)
def test_a_sample_takes_one_request_where_the_answer_tells_its_version(marks, asked, server):
    server.marks = marks
    remote = dataset(f"{server.url}/clips/000.tar", server.store)
    server.requests.clear()
    remote[1]
    commands = [command for command, _, _ in server.requests]
    assert commands == (["GET", "HEAD", "GET"] if asked else ["GET"])


@pytest.mark.parametrize("marks", [("ETag",), ("Last-Modified",), ()], ids=str)
def test_a_changed_object_is_noticed(marks, server, shards):
    server.marks = marks
    target = shards.parent / "changing.tar"
    target.write_bytes((shards / "000.tar").read_bytes())
    url = f"{server.url}/changing.tar"
    before = dataset(url, server.store)
    assert before.captions[0] == "clip 0 of 0"
    target.write_bytes((shards / "001.tar").read_bytes() + b"\0" * (0 if marks else 512))  # else by its size
    os.utime(target, (10**9, 10**9))
    with pytest.raises(RemoteError, match="changed since this run looked it up"):
        before[0]
    assert dataset(url, server.store).captions[0] == "clip 0 of 1"


def test_a_part_from_another_place_is_no_answer(server, monkeypatch):
    url = f"{server.url}/clips/000.tar"
    there = look_up(url, server.store)
    answer = Handler.answer

    def displaced(handler: Handler, *, send: bool) -> None:
        del handler.headers["Range"]
        handler.headers["Range"] = "bytes=512-521"
        answer(handler, send=send)

    monkeypatch.setattr(Handler, "answer", displaced)
    with pytest.raises(RemoteError, match=r"another part, from byte 512 instead of 500"):
        there.read(500, 10)


@pytest.mark.parametrize("ranges", [True, False])
def test_empty_files_are_empty_and_no_failure_of_the_server(ranges, server, shards):
    server.ranges = ranges
    members = {"0.mp4": clip(0), "0.txt": b"a", "1.mp4": b"", "1.txt": b"b"}
    (shards.parent / "empty.tar").write_bytes(archive(members))
    (shards.parent / "none.tar").write_bytes(b"")
    with pytest.raises(ClipError, match="1.mp4"):
        dataset(f"{server.url}/empty.tar", server.store)[1]
    with pytest.raises(InputError, match="none.tar.*is not a tar file"):
        dataset(f"{server.url}/none.tar", server.store)


def test_a_server_that_names_no_version_is_mentioned_once(server, caplog):
    server.marks = ()
    with caplog.at_level("WARNING", "sgm"):
        dataset(f"{server.url}/clips/{{000..001}}.tar", server.store)
    (message,) = caplog.messages
    assert f"{server.url}/clips names no version of its files" in message and "delete that folder" in message


def numbers_and_clips(data: SFTDataset, first: int, num_workers: int = 0) -> list[tuple[int, str, torch.Tensor]]:
    stream = SampleStream([data], TrainingOrder([len(data)], seed=3))
    batches = make_loader(stream, first=first, stop=12, rank=0, world=1, micro_batch=2, num_workers=num_workers)
    return [
        (number, Path(path).name, pixels)
        for batch in batches
        for number, path, pixels in zip(batch["number"], batch["path"], batch["mp4"], strict=True)
    ]


def test_a_resumed_run_sees_the_clips_of_a_local_one_in_their_order(server, shards, tmp_path):
    local = numbers_and_clips(dataset(shards), 0)
    remote = numbers_and_clips(dataset(f"{server.url}/clips/{{000..001}}.tar", server.store), 0, num_workers=1)
    server.store = Store(tmp_path / "of another machine", retries=3)
    server.faults = [None, None, None, 500, "cut"]  # the first two say that the server sends parts
    resumed = numbers_and_clips(dataset(f"{server.url}/clips/{{000..001}}.tar", server.store), 6)
    for (number, name, pixels), (same, its, seen) in zip(local, remote[:6] + resumed, strict=True):
        assert (number, name) == (same, its) and torch.equal(pixels, seen)


def test_what_comes_next_is_read_ahead(server, shards):
    remote = dataset(f"{server.url}/clips/{{000..001}}.tar", server.store)
    stream = SampleStream([remote], TrainingOrder([6], seed=3))
    batches = iter(make_loader(stream, first=0, stop=6, rank=0, world=1, micro_batch=1, num_workers=0))
    next(batches)
    deadline = time.monotonic() + 10
    while len([*(remote.rows[0].path.container.store.folder / "entries").glob("*/[!.]*")]) < 6:  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "the later samples were not read ahead"
        time.sleep(0.01)


def test_the_store_stays_within_its_bound_and_keeps_the_latest(tmp_path):
    store, calls = Store(tmp_path, max_bytes=1000), []

    def read(key: str) -> bytes:
        def fetch(path: Path) -> None:
            calls.append(key)
            assert sum(file.stat().st_size for file in tmp_path.glob("entries/*/*")) <= 1000
            path.write_bytes(key.encode() * 100)

        with store.open(key, 300, fetch) as file:
            return file.read()

    for key in ("aaa", "bbb", "ccc", "aaa", "ddd", "aaa"):
        assert read(key) == key.encode() * 100
        time.sleep(0.002)
    assert calls == ["aaa", "bbb", "ccc", "ddd"], "the one that was used longest ago makes room"
    assert not store.has("bbb")
    with pytest.raises(RefusedError, match="remote_cache_gb is 1e-06 GB, and one object needs 2.0 kB"):
        store.open("large", 2000, lambda path: None)


def test_the_bound_holds_while_several_entries_are_read_and_after_killed_processes(tmp_path):
    for number in range(3):  # of processes that are gone
        left = tmp_path / "entries" / f"{number:02x}" / ".entry.99999-0abc"
        left.parent.mkdir(parents=True)
        left.write_bytes(bytes(400))

    def fetch(path: Path) -> None:
        time.sleep(0.01)
        assert sum(file.stat().st_size for file in tmp_path.glob("entries/*/*")) <= 1000
        path.write_bytes(bytes(600))

    def read(number: int) -> int:
        with Store(tmp_path, max_bytes=1000).open(f"key {number}", 600, fetch) as file:
            return len(file.read())

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(read, range(4))] == [600] * 4
    assert sum(file.stat().st_size for file in tmp_path.glob("entries/*/*")) <= 1000


def test_where_nothing_that_is_being_read_arrives_the_store_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sgm.data.remote.store._PATIENCE_S", 0)
    store = Store(tmp_path, max_bytes=1000)
    with pytest.raises(RunError, match=r"takes 600 bytes.*remote_cache_gb"):
        store.open("one", 600, lambda _: store.open("two", 600, lambda _: None).close())


def test_an_entry_that_was_cut_is_read_again(tmp_path):
    store = Store(tmp_path)
    store.open("key", 4, lambda path: path.write_bytes(b"done")).close()
    (entry,) = tmp_path.glob("entries/*/*")
    entry.write_bytes(b"do")
    with store.open("key", 4, lambda path: path.write_bytes(b"done")) as file:
        assert file.read() == b"done"


def test_one_of_many_readers_fetches_and_a_failed_one_leaves_nothing(tmp_path):
    store, calls = Store(tmp_path), []

    def fetch(path: Path) -> None:
        calls.append(path)
        time.sleep(0.02)
        path.write_bytes(b"done")

    def read(_: int) -> bytes:
        with store.open("key", 4, fetch) as file:
            return file.read()

    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(read, range(8))} == {b"done"}
    assert len(calls) == 1

    def fail(path: Path) -> None:
        raise RemoteError("gone")

    with pytest.raises(RemoteError, match="gone"):
        store.open("other", 4, fail)
    assert not store.has("other") and len([*tmp_path.glob("entries/*/*")]) == 1


@pytest.mark.parametrize(
    "url, secret, shown",
    [
        ("s3://KEY:se/cr@t@bucket/clips", "cr@t", "s3://***@bucket/clips"),
        ("https://token@host/x.tar", "token", "https://***@host/x.tar"),
        ("https://host/x.tar?X-Amz-Signature=abc&download=1", "abc", "https://host/x.tar?***"),
        ("https://host/x.tar?sig", "sig", "https://host/x.tar?***"),
    ],
)
def test_urls_with_secrets_are_refused_without_showing_them(url, secret, shown, tmp_path):
    with pytest.raises(InputError) as caught:
        dataset(url, Store(tmp_path))
    assert secret not in str(caught.value) and "environment" in str(caught.value)
    assert redacted(f"see '{url}', and more") == f"see '{shown}', and more"
    assert redacted(redacted(f"is {url}, and")) == f"is {shown}, and"


def test_harmless_urls_are_not_changed():
    for url in (
        "s3://bucket/clips/{000..999}.tar",
        "hf://datasets/me/set@main/a.tar",
        "https://host/x.tar?download=true",
    ):
        assert is_url(url) and redacted(url) == url and url_problem(url) is None
    assert not is_url("my_clips") and not is_url("file:///data") and not is_url("C:clips")
    assert "chain" in (url_problem("simplecache::s3://bucket/x.tar") or "")[1 - 1]


@pytest.mark.parametrize(
    "url, said",
    [
        ("nosuch://bucket/x.tar", "Protocol not known"),
        ("memory://none/x.tar", "no such object"),
        ("memory://none/{0..9.tar", "unbalanced braces; write them as {000..099}"),
    ],
)
def test_wrong_urls_are_input_errors(url, said, tmp_path):
    with pytest.raises(InputError, match=said):
        dataset(url, Store(tmp_path))


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    import fsspec

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(InputError, match=r"Install s3fs.*cogvideox-sat\[remote\]"):
        look_up("s3://bucket/x.tar", Store(tmp_path))


def test_a_remote_file_has_a_stamp_that_changes_with_its_content(tmp_path):
    before, after = (RemoteFile("s3://b/x", 10, tag, True, Store(tmp_path)) for tag in ("one", "two"))
    assert before.stamp[0] == 10 and before.stamp != after.stamp


def test_the_check_of_a_run_looks_up_the_shards(server, tmp_path, capsys):
    root = Path(__file__).parents[3]
    bases = [str(root / "configs" / name) for name in ("toy_lora.yaml", "toy_sft.yaml", "remote.yaml")]
    given = [f"args.train_data=['{server.url}/clips/{{000..001}}.tar']", "args.eval_interval=null", "args.split=1,0,0"]
    given += [f"args.remote_cache={tmp_path}/kept", "args.train_iters=2", f"args.save={tmp_path}/runs"]
    rows = prepare(load_config(bases, given, mode="train")).rows
    assert rows["afar"] == "2 shards, 41.0 kB: all of them answer"
    assert rows["kept here"].startswith(f"up to 200.0 GB in {tmp_path}/kept, where ")
    assert not [*(tmp_path / "kept").glob("entries/*/*")], "no clip was read"
    secret = [f"args.train_data=[{server.url.replace('//', '//me:hidden@')}/clips/000.tar]", *given[1:]]
    assert main(["--base", *bases, *secret, "--check"]) == 2
    seen = capsys.readouterr()
    assert "hidden" not in seen.out + seen.err and "http://***@127.0.0.1" in seen.err and "leave a secret" in seen.err


@pytest.fixture
def bucket():
    """An empty bucket in memory."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.makedirs("/bucket", exist_ok=True)
    yield system
    system.rm("/bucket", recursive=True)


def finished_cache(folder: Path) -> Description:
    source = {"precision": "fp32"}
    description = Description("latents", "fp32", source, (("a", "b"), ("c",)), ("1x8x8",) * 3)
    begin(folder, description)
    write_shard(folder, description, 0, [torch.arange(6.0).view(2, 3), "is damaged"])
    write_shard(folder, description, 1, [torch.full((4,), 7.0)])
    return description


def test_a_cache_is_uploaded_once_and_read_by_result(bucket, tmp_path):
    store, url = Store(tmp_path / "store", retries=0), "memory://bucket/cache"
    description, there = finished_cache(tmp_path / "cache"), RemoteFolder(url, store)
    assert upload_cache(tmp_path / "cache", there, [description]) == 4
    assert upload_cache(tmp_path / "cache", RemoteFolder(url, store), [description]) == 0
    local, remote = CachedTensors(tmp_path / "cache", "latents"), CachedTensors(url, "latents", store=store)
    assert remote.is_remote and remote.failures == local.failures == {"b": "is damaged"} and [*remote] == [*local]
    remote.prefetch("c")
    bucket.rm("/bucket/cache/latents-00001.safetensors")
    assert all(torch.equal(copy.copy(remote)[key], local[key]) for key in local), "c is here"
    (tmp_path / "store").rename(tmp_path / "lost")
    late = copy.deepcopy(remote)
    late.prefetch("c")
    with pytest.raises(RemoteError, match="latents-00001.safetensors: .*no such object"):
        late["c"]
    with pytest.raises(InputError, match="1 of 2 shards of latents are missing"):
        CachedTensors(url, "latents", store=store)
    bucket.pipe("/bucket/cache/latents-00001.safetensors", b"something else")
    with pytest.raises(InputError, match="latents-00001.safetensors is damaged"):
        CachedTensors(url, "latents", store=store)
    with pytest.raises(InputError, match="'memory://bucket/none' has no text.json"):
        CachedTensors("memory://bucket/none", "text", store=store)


def test_a_copied_cache_forgets_the_failures_of_clips_that_were_repaired(bucket, tmp_path):
    store, url = Store(tmp_path / "store", retries=0), "memory://bucket/cache"
    description = finished_cache(tmp_path / "cache")
    upload_cache(tmp_path / "cache", RemoteFolder(url, store), [description])
    write_shard(tmp_path / "cache", description, 0, [torch.zeros(2), torch.ones(3)])
    assert upload_cache(tmp_path / "cache", RemoteFolder(url, store), [description]) == 1
    remote = CachedTensors(url, "latents", store=store)
    assert not remote.failures and torch.equal(remote["b"], torch.ones(3))


def test_a_store_that_cannot_be_written_says_so(server, tmp_path):
    description = finished_cache(tmp_path / "cache")
    with pytest.raises(RemoteError, match=f"{server.url}/cache/latents-0000"):
        upload_cache(tmp_path / "cache", RemoteFolder(f"{server.url}/cache", server.store), [description])


@pytest.fixture
def s3(monkeypatch):
    """A bucket of a local server of S3, and credentials for it in the environment."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(objects, "_FIRST_PAUSE_S", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    yield system
    system.rm("bucket", recursive=True)
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_is_asked_once_for_a_sample_and_a_changed_object_is_noticed(s3, shards, tmp_path, monkeypatch):
    asked, call = [], type(s3)._call_s3

    async def counted(self, method, *args, **kwargs):
        asked.append(method)
        return await call(self, method, *args, **kwargs)

    s3.put(str(shards), "bucket/", recursive=True)
    remote = dataset("s3://bucket/clips/001.tar", Store(tmp_path / "store", retries=1))
    monkeypatch.setattr(type(s3), "_call_s3", counted)
    assert torch.equal(remote[1]["mp4"], dataset(shards)[4]["mp4"])
    assert asked == ["get_object"]
    s3.put(str(shards / "000.tar"), "bucket/clips/001.tar")
    with pytest.raises(RemoteError, match="changed since this run looked it up"):
        remote[2]


def test_s3_is_read_with_the_credentials_of_the_environment(s3, shards, tmp_path, monkeypatch):
    store = Store(tmp_path / "store", retries=1)
    s3.put(str(shards), "bucket/", recursive=True)
    assert_same(dataset("s3://bucket/clips", store), dataset(shards))
    description, there = finished_cache(tmp_path / "cache"), RemoteFolder("s3://bucket/cache", store)
    assert upload_cache(tmp_path / "cache", there, [description]) == 4
    assert torch.equal(CachedTensors("s3://bucket/cache", "latents", store=store)["c"], torch.full((4,), 7.0))
    with pytest.raises(InputError, match=r"s3://bucket/none.tar: .*no such object"):
        dataset("s3://bucket/none.tar", store)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert b"the-secret" not in kept and b"the-key" not in kept
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", str(tmp_path))
    type(s3).clear_instance_cache()
    with pytest.raises(InputError, match=r"s3://bucket/clips/001.tar: .*credentials"):
        dataset("s3://bucket/clips/001.tar", store)


@pytest.fixture
def faults(monkeypatch) -> list[int | str]:
    """Faults of the server of S3, used up one an answer with a tar file or a part of one: a status, or 'cut'."""
    from moto.server import DomainDispatcherApplication

    waiting, answer = [], DomainDispatcherApplication.__call__

    def faulty(application, environ, start_response):
        is_content = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".tar")
        fault = waiting.pop(0) if is_content and waiting else None
        if isinstance(fault, int):
            start_response(f"{fault} Fault", [("Content-Length", "0")])
            return [b""]
        body = b"".join(answer(application, environ, start_response))
        return [body[: len(body) // 2] if fault == "cut" else body]

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", faulty)
    return waiting


def test_a_training_from_s3_is_resumed_exactly_and_writes_no_credentials(
    s3, faults, shards, tmp_path, monkeypatch, capfd, caplog
):
    """On another machine, whose store is empty, and with failures of the server."""
    s3.put(str(shards), "bucket/", recursive=True)
    monkeypatch.chdir(Path(__file__).parents[3])  # the toy files have relative paths
    caplog.set_level("INFO")
    bases = ["configs/toy_lora.yaml", "configs/toy_sft.yaml", "configs/remote.yaml"]
    given = ["args.eval_interval=null", "args.valid_prompts=null", "args.split='1,0,0'", "args.train_iters=3"]
    given += ["args.log_interval=1", "args.num_workers=0", "data.params.max_num_frames=5", "args.resume=auto"]
    given += ["deepspeed.train_micro_batch_size_per_gpu=1"]

    def run(name: str, data: str | Path, *more: str) -> tuple[Path, list[float]]:
        settings = [*given, f"args.train_data=['{data}']", f"args.save={tmp_path / name}", *more]
        folder = train(load_config(bases, settings, mode="train")).folder
        return folder, [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]

    url = "s3://bucket/clips/{000..001}.tar"
    run("far", url, f"args.remote_cache={tmp_path / 'first'}", "args.exit_interval=2")
    faults += ["cut", 503, "cut"]
    folder, losses = run("far", url, f"args.remote_cache={tmp_path / 'second'}")
    assert faults == [] and losses == run("here", shards)[1] and len(losses) == 3
    said = "".join([*capfd.readouterr(), *(record.getMessage() for record in caplog.records)])
    assert "training: iterations 3 to 3" in said, "the messages are there"
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tmp_path / "here")]
    assert {"config.yaml", "resume.json", "metrics.jsonl"} <= {path.name for path in written if folder in path.parents}
    for content in [path.read_bytes() for path in written] + [said.encode()]:
        assert b"the-secret" not in content and b"the-key" not in content
