"""The stores of Hugging Face and Google: read through their libraries from local servers, with failures.

gcsfs is no requirement of the tests, for its many dependencies; where it is missing, its cases are skipped.
"""

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


class Server(ThreadingHTTPServer):
    """The few answers of a service that reading a data set takes, for the files of a folder.

    Attributes:
        root: folder of the repository ``me/set``, or of the bucket ``my-bucket``.
        faults: used up one a request for content: a status, or 'cut'.
        seen: values of ``Authorization``.
        token: that it takes.
    """

    daemon_threads = True

    def __init__(self, root: Path, handler: type["Handler"]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.root, self.faults, self.seen, self.token = root, [], set(), SECRETS[0]


class Handler(BaseHTTPRequestHandler):
    """What the services have in common."""

    protocol_version = "HTTP/1.1"

    @property
    def service(self) -> Server:
        return cast(Server, self.server)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_part(self, path: Path) -> None:
        fault = self.service.faults.pop(0) if self.service.faults else None
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


class HubHandler(Handler):
    """Answers as the hub, which sends the content of large files from another address, signed."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        paths = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.send(json.dumps([self.entry(self.service.root / path) for path in paths]).encode())

    def entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.service.root).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "d" * 40, "size": 0, "path": name}
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        large = {"oid": digest, "size": path.stat().st_size, "pointerSize": 134}
        return {"type": "file", "oid": digest[:40], "size": path.stat().st_size, "path": name, "lfs": large}

    def do_GET(self) -> None:
        route = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        api, content, signed = "/api/datasets/me/set", "/datasets/me/set/resolve/main/", "/signed/"
        if not route.startswith(signed):
            self.service.seen.add(self.headers.get("Authorization"))
        if self.headers.get("Authorization") != f"Bearer {self.service.token}" and not route.startswith(signed):
            self.send(b"", 401, X_Error_Message="Invalid credentials in Authorization header")
        elif route in (api, f"{api}/revision/main"):
            self.send(json.dumps({"id": "me/set", "sha": "c" * 40, "siblings": [], "tags": []}).encode())
        elif route.startswith(f"{api}/tree/main"):
            folder = self.service.root / route.removeprefix(f"{api}/tree/main").lstrip("/")
            found = [self.entry(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []
            self.send(json.dumps(found).encode(), 200 if folder.is_dir() else 404, X_Error_Code="EntryNotFound")
        elif route.startswith(content):
            name = urllib.parse.quote(route.removeprefix(content))
            place = f"http://127.0.0.1:{self.service.server_port}{signed}{name}?X-Amz-Signature={SECRETS[1]}"
            self.send(b"", 302, Location=place)
        else:
            self.send_part(self.service.root / route.removeprefix(signed))


class BucketHandler(Handler):
    """Answers as Google's storage, whose tokens come from an address that the credentials name."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send(json.dumps({"access_token": SECRETS[0], "expires_in": 3600, "token_type": "Bearer"}).encode())

    def entry(self, path: Path) -> dict[str, Any]:
        digest = base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()
        name, status = path.relative_to(self.service.root).as_posix(), path.stat()
        when = "2026-01-01T00:00:00.000Z"
        known = {"kind": "storage#object", "bucket": "my-bucket", "name": name, "size": str(status.st_size)}
        return known | {"md5Hash": digest, "generation": str(status.st_mtime_ns), "updated": when, "timeCreated": when}

    def do_GET(self) -> None:
        url = urllib.parse.urlparse(self.path)
        route, query = urllib.parse.unquote(url.path), dict(urllib.parse.parse_qsl(url.query))
        objects = "/storage/v1/b/my-bucket/o"
        self.service.seen.add(self.headers.get("Authorization"))
        path = self.service.root / route.partition(objects)[2].lstrip("/")
        if self.headers.get("Authorization") != f"Bearer {self.service.token}":
            self.send(json.dumps({"error": {"code": 403, "message": "Forbidden"}}).encode(), 403)
        elif route == objects:
            prefix = query.get("prefix", "")
            found = [path for path in sorted(self.service.root.rglob("*")) if path.is_file()]
            items = [item for item in map(self.entry, found) if item["name"].startswith(prefix)]
            self.send(json.dumps({"kind": "storage#objects", "items": items}).encode())
        elif not route.startswith(("/download" + objects, objects)) or not path.is_file():
            self.send(json.dumps({"error": {"code": 404, "message": "Not Found"}}).encode(), 404)
        elif query.get("alt") == "media" or route.startswith("/download"):
            self.send_part(path)
        else:
            self.send(json.dumps(self.entry(path)).encode())


class Afar:
    """A service with a server here.

    Attributes:
        root: URL below which objects are.
        server: that answers.
    """

    def __init__(self, root: str, server: Server) -> None:
        self.root, self.server = root, server
        self.faults, self.seen = server.faults, server.seen

    def put(self, folder: Path, name: str) -> None:
        """Put the files of a folder below a name."""
        (self.server.root / name).mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            (self.server.root / name / path.name).write_bytes(path.read_bytes())


def use_hub(endpoint: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let Hugging Face's library ask a local server; it takes the token from the environment."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)  # HF_ENDPOINT at import
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "".join(template[1:]))
    monkeypatch.setenv("HF_TOKEN", SECRETS[0])
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # its own attempts


def use_bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let Google's library ask a local server; the environment names a file of credentials."""
    # Buckets of new kinds, which are asked for by another protocol at Google's own address.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    keys = {"type": "authorized_user", "client_id": "me", "client_secret": SECRETS[1], "refresh_token": "renewed"}
    (credentials := folder / "credentials.json").write_text(json.dumps(keys))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(credentials))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    monkeypatch.setattr("google.oauth2.credentials._GOOGLE_OAUTH2_TOKEN_ENDPOINT", f"{endpoint}/token")
    monkeypatch.setattr("gcsfs.retry.random.random", lambda: -1e9)  # added to the pauses between its own attempts


SERVICES = {
    "hf": ("hf://datasets/me/set@main", HubHandler, use_hub),
    "gs": ("gs://my-bucket", BucketHandler, use_bucket),
}


@pytest.fixture(params=SERVICES)
def afar(request, tmp_path, monkeypatch) -> Iterator[Afar]:
    """A local server of a service."""
    root, handler, use = SERVICES[request.param]
    (folder := tmp_path / "service").mkdir()
    server = Server(folder, handler)
    use(f"http://127.0.0.1:{server.server_port}", monkeypatch, tmp_path)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setattr(objects, "_FIRST_PAUSE_S", 0.01)
    library = fsspec.get_filesystem_class(request.param)
    library.clear_instance_cache()
    yield Afar(root, server)
    server.shutdown()
    server.server_close()
    library.clear_instance_cache()


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


def test_refused_credentials_are_said_without_them(afar, shards, tmp_path):  # noqa: F811
    afar.put(shards, "clips")
    afar.server.token = "another"
    with pytest.raises(InputError, match="clips/000.tar: .*credentials") as caught:
        dataset(f"{afar.root}/clips/000.tar", Store(tmp_path, retries=0))
    assert not any(secret in str(caught.value) for secret in SECRETS)
