"""The store of Hugging Face: read through its library from a local server, with failures."""

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import fsspec
import pytest
import torch

from sgm.data.cache import CachedTensors
from sgm.data.remote import objects
from sgm.data.remote.store import RemoteError, Store
from sgm.util import InputError
from tests.sgm.data.test_remote import assert_same, dataset, finished_cache, numbers_and_clips, shards  # noqa: F401

SECRETS = ("the-token", "the-signature")


class Hub(ThreadingHTTPServer):
    """The few answers of Hugging Face's hub that reading a data set takes, for the files of a folder.

    Attributes:
        root: folder of the repository ``me/set``.
        faults: used up one a request for content: a status, or 'cut'.
        seen: values of ``Authorization``.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.root, self.faults, self.seen = root, [], set()


class HubHandler(BaseHTTPRequestHandler):
    """Answers as the hub, which sends the content of large files from another address, signed."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        paths = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.send(json.dumps([self.entry(self.hub.root / path) for path in paths]).encode())

    @property
    def hub(self) -> Hub:
        return cast(Hub, self.server)

    def entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.hub.root).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "d" * 40, "size": 0, "path": name}
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        large = {"oid": digest, "size": path.stat().st_size, "pointerSize": 134}
        return {"type": "file", "oid": digest[:40], "size": path.stat().st_size, "path": name, "lfs": large}

    def do_GET(self) -> None:
        route = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        api, content, signed = "/api/datasets/me/set", "/datasets/me/set/resolve/main/", "/signed/"
        if not route.startswith(signed):
            self.hub.seen.add(self.headers.get("Authorization"))
        if self.headers.get("Authorization") != f"Bearer {SECRETS[0]}" and not route.startswith(signed):
            self.send(b"", 401, X_Error_Message="Invalid credentials in Authorization header")
        elif route in (api, f"{api}/revision/main"):
            self.send(json.dumps({"id": "me/set", "sha": "c" * 40, "siblings": [], "tags": []}).encode())
        elif route.startswith(f"{api}/tree/main"):
            folder = self.hub.root / route.removeprefix(f"{api}/tree/main").lstrip("/")
            found = [self.entry(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []
            self.send(json.dumps(found).encode(), 200 if folder.is_dir() else 404, X_Error_Code="EntryNotFound")
        elif route.startswith(content):
            name = urllib.parse.quote(route.removeprefix(content))
            place = f"http://127.0.0.1:{self.hub.server_port}{signed}{name}?X-Amz-Signature={SECRETS[1]}"
            self.send(b"", 302, Location=place)
        else:
            self.send_part(self.hub.root / route.removeprefix(signed))

    def send_part(self, path: Path) -> None:
        fault = self.hub.faults.pop(0) if self.hub.faults else None
        if isinstance(fault, int):
            self.send(b"", fault)
            return
        whole = path.read_bytes()
        first, last = self.headers.get("Range", f"bytes=0-{len(whole) - 1}").removeprefix("bytes=").split("-")
        part = whole[int(first) : int(last or len(whole) - 1) + 1]
        place = f"bytes {first}-{int(first) + len(part) - 1}/{len(whole)}"
        kept = part[: len(part) // 2] if fault == "cut" else part
        self.send(kept, 206, Content_Range=place, Content_Length=str(len(part)))
        self.close_connection = fault == "cut"


class Afar:
    """The hub with a server here.

    Attributes:
        root: URL below which objects are.
        server: that answers.
    """

    def __init__(self, root: str, server: Hub) -> None:
        self.root, self.server = root, server
        self.faults, self.seen = server.faults, server.seen

    def put(self, folder: Path, name: str) -> None:
        """Put the files of a folder below a name."""
        (self.server.root / name).mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            (self.server.root / name / path.name).write_bytes(path.read_bytes())


@pytest.fixture
def afar(tmp_path, monkeypatch) -> Iterator[Afar]:
    """A local server of the hub; its library takes the token from the environment."""
    from huggingface_hub import HfFileSystem, constants

    root = tmp_path / "hub"
    root.mkdir()
    server = Hub(root)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)  # HF_ENDPOINT at import
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "".join(template[1:]))
    monkeypatch.setenv("HF_TOKEN", SECRETS[0])
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # its own attempts
    monkeypatch.setattr(objects, "_FIRST_PAUSE_S", 0.01)
    HfFileSystem.clear_instance_cache()
    yield Afar("hf://datasets/me/set@main", server)
    server.shutdown()
    server.server_close()
    HfFileSystem.clear_instance_cache()


def written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_shards_are_read_and_resumed_exactly_whatever_the_server_does(afar, shards, tmp_path, caplog):  # noqa: F811
    afar.put(shards, "clips")
    url, local = f"{afar.root}/clips/{{000..001}}.tar", dataset(shards)
    caplog.set_level("DEBUG", "sgm")
    assert_same(dataset(f"{afar.root}/clips", Store(tmp_path / "store")), local)
    expected = numbers_and_clips(local, 0)
    remote = dataset(url, Store(tmp_path / "of another machine", retries=3))
    afar.faults += [503, "cut", "cut"]
    for (number, name, pixels), (same, its, seen) in zip(expected[6:], numbers_and_clips(remote, 6), strict=True):
        assert (number, name) == (same, its) and torch.equal(pixels, seen)
    assert afar.faults == []
    assert f"Bearer {SECRETS[0]}" in afar.seen, "the credentials of the environment were used"
    said = "".join(record.getMessage() for record in caplog.records).encode()
    for secret in SECRETS:
        for kept in (written(tmp_path / "store"), written(tmp_path / "of another machine"), said):
            assert secret.encode() not in kept and base64.b64encode(secret.encode()) not in kept


def test_a_changed_object_is_noticed(afar, shards, tmp_path):  # noqa: F811
    afar.put(shards, "clips")
    before = dataset(f"{afar.root}/clips/000.tar", Store(tmp_path / "store", retries=0))
    (other := tmp_path / "other").mkdir()
    (other / "000.tar").write_bytes((shards / "001.tar").read_bytes())
    afar.put(other, "clips")
    with pytest.raises(RemoteError, match="changed since this run looked it up"):
        before[0]
    fsspec.get_filesystem_class(afar.root.partition(":")[0]).clear_instance_cache()  # a new process has none
    assert dataset(f"{afar.root}/clips/000.tar", Store(tmp_path / "store")).captions[0] == "clip 0 of 1"


def test_a_cache_is_read_by_result(afar, tmp_path):
    finished_cache(tmp_path / "cache")
    afar.put(tmp_path / "cache", "cache")
    url, local = f"{afar.root}/cache", CachedTensors(tmp_path / "cache", "latents")
    remote = CachedTensors(url, "latents", store=Store(tmp_path / "store", retries=2))
    afar.faults += [503, "cut"]
    assert [*remote] == [*local] and remote.failures == local.failures
    assert all(torch.equal(remote[key], local[key]) for key in local)
    assert afar.faults == []


def test_a_missing_object_is_named(afar, shards, tmp_path):  # noqa: F811
    afar.put(shards, "clips")
    with pytest.raises(InputError, match=f"{afar.root}/clips/none.tar: .*no such object"):
        dataset(f"{afar.root}/clips/none.tar", Store(tmp_path, retries=0))


def test_the_hub_without_a_token_wants_credentials(afar, shards, tmp_path, monkeypatch):  # noqa: F811
    afar.put(shards, "clips")
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(InputError, match="clips/000.tar: .*credentials") as caught:
        dataset(f"{afar.root}/clips/000.tar", Store(tmp_path, retries=0))
    assert "another" not in str(caught.value)
