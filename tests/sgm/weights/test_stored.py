"""Values of weights files are checked when they are used: kinds, checksums, finiteness."""

import contextlib
import json
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sgm.util import InputError
from sgm.weights.checkpoint import load_network, write_tensors
from sgm.weights.checksums import Checksums, save_torch
from sgm.weights.files import check_values, read_file, read_metadata, read_state_file, read_weights, verify_file
from sgm.weights.lazy import LazyTensor, compute
from sgm.weights.stored import checked_ahead
from tests.sgm.weights.test_checkpoint import Tiny

TENSORS = {
    "a": torch.randn(64, 3, generator=torch.Generator().manual_seed(0)),
    "b": torch.ones(40).half(),
    "c": torch.arange(6.0),
}


def write(path: Path, tensors=TENSORS, **options) -> Path:
    write_tensors(path, "module", tensors, {"lora": {"alpha": 4.0}}, **options)
    return path


def flip(path: Path, place: int, bit: int = 0x40) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, name):
    """In tensors by the name of the tensor; names, shapes and plain values by the file."""
    path = write(tmp_path / name)
    good = path.read_bytes()
    for tensor, value in TENSORS.items():
        start = good.index(value.numpy().tobytes())
        flip(path, start + value.nbytes - 1, 0x01)
        read = read_weights(path)
        with pytest.raises(InputError, match=f"{name}: {tensor} is damaged"):
            read[tensor].compute()
        assert all(torch.equal(compute(read[other]), TENSORS[other]) for other in TENSORS if other != tensor)
        path.write_bytes(good)
    places = [good.index(b"alpha"), *range(good.index(b"lora"), good.index(b"lora") + 30, 7)]
    for place in places:
        flip(path, place, 0x02)
        with pytest.raises(InputError, match=name):
            read_weights(path)
        path.write_bytes(good)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "other.pt", "other.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beside", [None, ThreadPoolExecutor], ids=["in one thread", "in two"])
def test_copies_are_equal_and_checked_meanwhile(tmp_path, monkeypatch, name, dtype, beside):
    """In one pass: the functions that pass over a whole tensor are not called."""
    beside = beside and beside(1)
    for module in ("checksums", "stored"):
        monkeypatch.setattr(f"sgm.weights.{module}.PIECE", 100)
    monkeypatch.setattr("sgm.weights.stored.finite_problem", None)
    path = tmp_path / name
    if name.startswith("x"):
        write(path)
        monkeypatch.setattr("sgm.weights.checksums.Watched", None)  # it is known that values are finite
    elif path.suffix == ".pt":
        torch.save({"module": TENSORS}, path)
    else:
        save_file(TENSORS, path)
    for key, stored in read_weights(path).items():
        target = torch.empty(TENSORS[key].shape, dtype=dtype)
        with monkeypatch.context() as patched:
            patched.setattr("sgm.weights.checksums.Checksums.fit", None)
            stored.copy_to(target, beside)
            stored.copy_to(target, beside)
        assert torch.equal(target, TENSORS[key].to(dtype))
    if name != "other.safetensors":
        flip(path, path.read_bytes().index(TENSORS["a"].numpy().tobytes()) + 500)
        for stored in (read_weights(path)["a"], read_weights(path)["a"].cast(torch.float64)):
            with pytest.raises(InputError, match="a is damaged"):
                stored.copy_to(torch.empty(64, 3), beside)


def test_a_copy_that_fails_leaves_no_thread_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr("sgm.weights.stored.PIECE", 100)
    threads, check = [], Checksums.fit_pieces
    monkeypatch.setattr(
        Checksums, "fit_pieces", lambda *given: (threads.append(threading.current_thread()), check(*given))[1]
    )
    stored = read_weights(write(tmp_path / "x.pt"))["a"]
    with ThreadPoolExecutor(1) as beside, pytest.raises(ValueError, match="broadcast"):
        stored.copy_to(torch.empty(2), beside)
    assert len(threads) == 1 and not threads[0].is_alive() and threads[0] is not threading.current_thread()


@pytest.mark.parametrize("own", [True, False])
def test_a_state_is_compared_with_its_checksums_while_it_is_read(tmp_path, monkeypatch, own):
    state = {"a": [TENSORS["a"], {"b": TENSORS["b"]}], "empty": torch.zeros(0), "n": 3}
    (save_torch if own else torch.save)(state, tmp_path / "x.pt")
    monkeypatch.setattr("sgm.weights.checksums.PIECE", 100)
    with monkeypatch.context() as patched:
        patched.setattr("sgm.weights.checksums.damaged_entry", None)  # which reads the file again
        read, finite = read_state_file(tmp_path / "x.pt", "cpu", cure="")
    assert torch.equal(read["a"][0], TENSORS["a"]) and torch.equal(read["a"][1]["b"], TENSORS["b"]) and finite == own
    flip(tmp_path / "x.pt", (tmp_path / "x.pt").read_bytes().index(TENSORS["a"].numpy().tobytes()) + 700)
    with pytest.raises(InputError, match=r"x.pt .* the bytes of .*/data/\d changed"):
        read_state_file(tmp_path / "x.pt", "cpu", cure="")


def test_values_that_were_not_finite_when_they_were_written_are_found(tmp_path):
    for name in ("x.pt", "x.safetensors"):
        path = write(tmp_path / name, TENSORS | {"c": torch.tensor([1, float("inf")])}, any_values=True)
        tensors = read_weights(path)
        tensors["a"].copy_to(torch.empty(64, 3))
        with pytest.raises(InputError, match="c is not finite"):
            tensors["c"].copy_to(torch.empty(2))


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_what_a_narrower_dtype_cannot_hold_is_refused_by_name(tmp_path, name):
    """Where it is written, and where it is loaded; numbers within the range pass, and smaller ones round to zero."""
    kept = torch.tensor([65504, -6e4, 1e-30]).bfloat16().clamp(max=65280)
    large = torch.tensor([1, -1e5]).bfloat16()
    read = read_weights(write(tmp_path / name, {"kept": kept, "large": large}))
    said = r"large has values up to 99840, and float16 holds numbers up to 65504; "
    for tensor in (read["large"], read["large"].cast(torch.float32)):
        with pytest.raises(InputError, match=rf"{name}: {said}load it in bf16 or fp32"):
            tensor.copy_to(torch.empty(2).half())
    narrow = {each: tensor.cast(torch.float16) for each, tensor in read.items()}
    with pytest.raises(InputError, match=rf"y.* is not written: {said}write it in bf16 or fp32 \(--dtype\)"):
        write(tmp_path / f"y{name}", narrow)
    computed = LazyTensor((read["large"],), lambda tensor: (tensor.float() * 1e3).half())
    with pytest.raises(InputError, match=r"made has values out of range: float16 holds .* alpha or strength"):
        write(tmp_path / f"y{name}", {"made": computed})
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing half-written is left"
    assert torch.equal(
        read_weights(write(tmp_path / f"y{name}", {"kept": narrow["kept"]}))["kept"].compute(), kept.half()
    )
    read["large"].copy_to(target := torch.empty(2))
    assert torch.equal(target, large.float())


def test_a_network_does_not_take_what_its_dtype_cannot_hold(tmp_path):
    names = [f"model.diffusion_model.{name}" for name in Tiny().state_dict()]
    tensors = dict(zip(names, Tiny().state_dict().values(), strict=True))
    name = next(name for name in names if tensors[name].is_floating_point())
    write(tmp_path / "x.pt", tensors | {name: tensors[name] * 0 + 1e5})
    with pytest.raises(InputError, match=rf"x.pt: {name} has values up to 100000, and float16"):
        load_network(Tiny(), tmp_path / "x.pt", dtype=torch.float16)
    load_network(Tiny(), tmp_path / "x.pt", dtype=torch.bfloat16)


def test_large_values_are_finite(tmp_path):
    large = torch.full((40,), 6e4).half()  # their sum is not
    torch.save({"module": {"a": large}}, tmp_path / "x.pt")
    target = torch.empty(40)
    read_weights(tmp_path / "x.pt")["a"].copy_to(target)
    assert torch.equal(target, large.float())


def test_views_of_one_storage_are_checked_with_it(tmp_path):
    whole = torch.arange(100.0)
    torch.save({"module": {"a": whole[:10], "b": whole[50:].view(5, 10).t()}}, tmp_path / "x.pt")
    stored, target = read_weights(tmp_path / "x.pt")["b"], torch.empty(10, 5)
    stored.copy_to(target)
    assert torch.equal(stored.compute(), whole[50:].view(5, 10).t()) and torch.equal(stored.compute(), target)
    flip(tmp_path / "x.pt", (tmp_path / "x.pt").read_bytes().index(whole.numpy().tobytes()) + 4 * 30)
    with pytest.raises(InputError, match="a is damaged"):
        read_weights(tmp_path / "x.pt")["a"].compute()


def test_files_without_checksums_load(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"module": TENSORS}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save({"module": TENSORS}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(TENSORS, tmp_path / "x.safetensors")
    check_values(*tmp_path.iterdir())


def test_large_archives_of_others_are_compared_unless_they_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("sgm.weights.files._QUICK", 0)
    own, other = write(tmp_path / "own.pt"), tmp_path / "other.pt"
    torch.save({"module": TENSORS}, other)
    for path in (own, other):
        flip(path, path.read_bytes().index(TENSORS["a"].numpy().tobytes()))
        for quick in (False, True):
            damaged = pytest.raises(InputError, match="a is damaged")
            with contextlib.nullcontext() if quick and path == other else damaged:
                read_weights(path, quick=quick)["a"].compute()


def test_bytes_are_compared_once(tmp_path, monkeypatch):
    for path in (write(tmp_path / "own.pt"), tmp_path / "other.pt"):
        torch.save({"module": TENSORS}, tmp_path / "other.pt")
        with monkeypatch.context() as patched:
            patched.setattr("sgm.weights.checksums.Checksums.fit", None)
            assert verify_file(path)


def test_a_file_of_an_earlier_version_is_compared_with_its_crc32(tmp_path):
    data = TENSORS["c"].numpy().tobytes()
    header = {"__metadata__": {"crc32": "0" * 16}, "c": {"dtype": "F32", "shape": [6], "data_offsets": [0, len(data)]}}
    head = json.dumps(header).encode()
    head = head.replace(b"0" * 16, f"{zlib.crc32(head):08x}{zlib.crc32(data):08x}".encode())
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    assert torch.equal(read_weights(path)["c"].compute(), TENSORS["c"]) and not read_metadata(path)
    flip(path, 8 + len(head))
    with pytest.raises(InputError, match="c is damaged"):
        read_weights(path)["c"].compute()


def test_a_file_that_another_tool_rewrote_is_not_compared_with_its_old_checksums(tmp_path):
    content = torch.load(write(tmp_path / "x.pt"), weights_only=True)
    torch.save(content | {"module": content["module"] | {"b": torch.zeros(40)}}, tmp_path / "x.pt")
    assert not read_weights(tmp_path / "x.pt")["b"].compute().any()
    path = write(tmp_path / "x.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path, metadata=metadata)
    assert torch.equal(read_weights(path)["a"].compute(), TENSORS["a"].double())


WRONG = {
    "integers": (torch.arange(6), r"holds integers \(int64\)"),
    "booleans": (torch.ones(6).bool(), r"is boolean \(bool\)"),
    "complex": (torch.ones(6).to(torch.complex64), r"is complex \(complex64\)"),
    "sparse": (torch.eye(6).to_sparse(), "is sparse"),
    "nan": (torch.tensor([1, float("nan")]), r"is not finite: 1 of 2 values .*\(nan\) at \[1\]"),
    "inf": (
        torch.tensor([[1, 2], [float("-inf"), float("inf")]]).bfloat16(),
        r"is not finite: 2 of 4 .*\(-inf\) at \[1, 0\]",
    ),
    "float8": (torch.tensor([1, float("nan")]).to(torch.float8_e4m3fn), "is not finite: 1 of 2"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_weights_is_refused_by_name(tmp_path, kind):
    tensor, message = WRONG[kind]
    torch.save({"module": {**TENSORS, "d": tensor}}, tmp_path / "x.pt")
    read = read_weights(tmp_path / "x.pt")
    with pytest.raises(InputError, match=rf"x\.pt: d {message}"), checked_ahead(read.values()):
        read["d"].compute()
    assert torch.equal(read["a"].compute(), TENSORS["a"])
    assert read_file(tmp_path / "x.pt").keys() == read.keys(), "names can be listed"


@pytest.mark.parametrize("kind", ["integers", "sparse", "nan"])
def test_a_network_does_not_take_them(tmp_path, kind):
    names = [f"model.diffusion_model.{name}" for name in Tiny().state_dict()]
    tensors = dict(zip(names, Tiny().state_dict().values(), strict=True))
    name = next(name for name in names if tensors[name].is_floating_point())
    tensor, message = WRONG[kind]
    torch.save({"module": tensors | {name: tensor}}, tmp_path / "x.pt")
    if kind == "nan":
        torch.save({"module": tensors | {name: tensors[name] / 0}}, tmp_path / "x.pt")
        message = "not finite"
    with pytest.raises(InputError, match=f"{name} .*{message}"):
        load_network(Tiny(), tmp_path / "x.pt")


def test_an_archive_has_the_checksums_that_torch_wrote(tmp_path):
    with zipfile.ZipFile(write(tmp_path / "x.pt")) as archive:
        assert all(info.CRC for info in archive.infolist()) and archive.testzip() is None


def test_a_truncated_file_is_no_match_when_it_is_verified(tmp_path):
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    write(own)
    save_file(TENSORS, other)
    for path in (own, other):
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(InputError, match="truncated or damaged"):
            verify_file(path)


def test_a_header_in_the_order_of_ours_is_not_taken_for_ours(tmp_path):
    data = TENSORS["c"].numpy().tobytes()
    header = {"__metadata__": {"by": "another"}, "c": {"dtype": "F32", "shape": [6], "data_offsets": [0, len(data)]}}
    head = json.dumps(header).encode()
    (path := tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    assert torch.equal(read_weights(path)["c"].compute(), TENSORS["c"])


def test_checksums_in_a_header_that_are_none_are_a_changed_header(tmp_path):
    data = TENSORS["c"].numpy().tobytes()
    for digits in ("z" * 32, "", 5):
        metadata = {"__metadata__": {"xxh3": digits}}
        head = json.dumps({**metadata, "c": {"dtype": "F32", "shape": [6], "data_offsets": [0, len(data)]}}).encode()
        (path := tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
        with pytest.raises(InputError, match="its header changed after it was written|invalid type: integer"):
            read_weights(path)
        with pytest.raises(InputError, match="its header changed after it was written"):
            verify_file(path)


@pytest.mark.parametrize("kind", ["F4", "F8_E8M0"])
def test_numbers_that_are_parts_of_others_are_refused_by_name(tmp_path, kind):
    shape = [16] if kind == "F4" else [8]
    head = json.dumps({"c": {"dtype": kind, "shape": shape, "data_offsets": [0, 8]}}).encode()
    head += b" " * (-len(head) % 8)
    (path := tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(8))
    with pytest.raises(InputError, match=r"c is in four bits, or holds scales \(float"):
        read_weights(path)["c"].compute()
