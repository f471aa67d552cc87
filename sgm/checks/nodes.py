"""Check the ranks of several machines before training: what differs, what is broken, what is slow, and where.

Every rank describes itself and takes part in small measurements; rank zero gets the descriptions of all, and `judge`
names the ranks that differ from the others.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import sgm.distributed
from sgm.util import InputError

MAX_SKEW_S = 5  # of clocks: file times, and the names of runs
SLOW = 0.7  # of the median of the others
_PACKAGES = ("torch", "deepspeed", "SwissArmyTransformer", "transformers", "torchao", "bitsandbytes")
_ROOT = Path(__file__).parents[2]
_MESSAGE = 1 << 22  # numbers that a rank sends in a measurement
_REPEATS = 3


@dataclass(frozen=True)
class Report:
    """Versions, clock and measured speeds of a rank.

    Attributes:
        host: its machine.
        alike: what must be the same on all ranks: versions, digests of files.
        clock: seconds since 1970, when all ranks left a barrier.
        unseen: shared folders in which it does not find what rank zero has just written.
        reduced: whether an all-reduce gave the right sum.
        wrong_senders: ranks whose part of an all-to-all came wrong.
        speeds: quantity → speed in its unit; see `UNITS`.
    """

    host: str
    alike: Mapping[str, str]
    clock: float = 0.0
    unseen: Sequence[str] = ()
    reduced: bool = True
    wrong_senders: Sequence[int] = ()
    speeds: Mapping[str, float] = field(default_factory=dict)


# A slow rank shows in its own products and in what it exchanges with others one at a time, not in collectives of all.
UNITS = {"matmul": "TFLOPS", "neighbours": "GB/s", "all-reduce": "GB/s", "all-to-all": "GB/s"}
_OF_A_RANK = ("matmul", "neighbours")


def check_nodes(shared: Mapping[str, Path], digests: Mapping[str, str]) -> str:
    """Measure and compare all ranks; return a table. Collective: all ranks call it.

    Args:
        shared: name → folder that all ranks must share, or that will be made in a parent of it.
        digests: name → digest of something that all ranks must have alike.

    Raises:
        InputError: a rank differs or gives wrong results; the message names it.
    """
    reports = sgm.distributed.gather_objects(vars(_own_report(shared, digests)))
    own = None if reports is None else judge([Report(**each) for each in reports])
    table, broken = sgm.distributed.broadcast_from_rank_zero(own)
    if broken:
        raise InputError("\n".join(["the machines of this run do not fit together:", *broken, table]))
    return table


def judge(reports: Sequence[Report]) -> tuple[str, list[str]]:
    """Return a table of the ranks, with slow ones marked, and what is broken, each with its rank and machine."""
    names = [f"rank {rank} on {report.host}" for rank, report in enumerate(reports)]
    broken = list(_differences(reports, names))
    clocks = [report.clock for report in reports]
    middle = statistics.median(clocks + clocks[: 1 - len(clocks) % 2])  # a rank's; if half are off, on rank zero's side
    for name, report in zip(names, reports, strict=True):
        if abs(skew := report.clock - middle) > MAX_SKEW_S:
            broken.append(f"  {name}: its clock is {skew:+.1f} s off; set it by NTP")
        broken += [f"  {name}: {folder} is not the folder that rank 0 sees; mount it there" for folder in report.unseen]
    broken += _wrong_results(reports, names)
    rows = [["rank", "machine", *(f"{name}, {unit}" for name, unit in UNITS.items()), "clock, s"]]
    slow = _slow(reports)
    for rank, report in enumerate(reports):
        marks = [f"{report.speeds.get(name, 0):.3g}{' (slow)' * ((rank, name) in slow)}" for name in UNITS]
        rows.append([str(rank), report.host, *marks, f"{report.clock - middle:+.2f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for rank, name in sorted(slow):
        others = statistics.median(_others(reports, rank, name))
        lines.append(
            f"slow: {names[rank]}: {name} {reports[rank].speeds[name]:.3g} {UNITS[name]}, and the others' median is "
            f"{others:.3g}; look for other work, heat and the network there"
        )
    return "\n".join(lines), broken


def _differences(reports: Sequence[Report], names: Sequence[str]) -> Iterator[str]:
    """Yield what a rank has otherwise than most of them; in a tie, than rank zero."""
    for what in reports[0].alike:
        values = [report.alike.get(what, "missing") for report in reports]
        most = Counter(values).most_common()[0][1]
        usual = next(value for value in values if values.count(value) == most)
        for name, value in zip(names, values, strict=True):
            if value != usual:
                yield f"  {name}: {what} is {value}, and {usual} on {most} of {len(values)} ranks"


def _wrong_results(reports: Sequence[Report], names: Sequence[str]) -> Iterator[str]:
    """Yield the ranks that get or send wrong values: a sender if others agree on it, else the receiver."""
    accused = Counter(sender for report in reports for sender in report.wrong_senders)
    guilty = {rank for rank, times in accused.items() if times > len(reports) / 2}
    for rank in sorted(guilty):
        yield f"  {names[rank]}: what it sends in an all-to-all arrives wrong at {accused[rank]} ranks; take it out"
    for name, report in zip(names, reports, strict=True):
        if left := sorted(set(report.wrong_senders) - guilty):
            yield f"  {name}: it gets wrong values in an all-to-all, from ranks {left}; take it out"
    if failed := [name for name, report in zip(names, reports, strict=True) if not report.reduced]:
        yield f"  {', '.join(failed)}: an all-reduce gives a wrong sum there; take out what is named above, or these"


def _others(reports: Sequence[Report], rank: int, name: str) -> list[float]:
    return [report.speeds[name] for other, report in enumerate(reports) if other != rank and name in report.speeds]


def _slow(reports: Sequence[Report]) -> set[tuple[int, str]]:
    """Return rank and quantity of those much below the median of the others."""
    found = set()
    for rank, report in enumerate(reports):
        for name in _OF_A_RANK:
            others = _others(reports, rank, name)
            if others and name in report.speeds and report.speeds[name] < SLOW * statistics.median(others):
                found.add((rank, name))
    return found


def _own_report(shared: Mapping[str, Path], digests: Mapping[str, str]) -> Report:
    """Describe this rank, and take part in the measurements. Collective."""
    alike = {**_versions(), "this project's code": _code_digest(), **digests}
    unseen = [f"{name} ({folder})" for name, folder in shared.items() if not _is_shared(folder)]
    device, rank, size = sgm.distributed.device(), sgm.distributed.rank(), sgm.distributed.world_size()
    message = torch.full((_MESSAGE // size * size,), rank + 1.0, device=device)
    received = torch.empty_like(message)
    speeds, nbytes = {"matmul": _matmul_speed(device)}, message.nbytes / 1e9

    dist.all_reduce(total := message.clone())
    reduced = bool((total == size * (size + 1) / 2).all())
    dist.all_to_all_single(received, message)
    parts = received.view(size, -1)
    wrong = [sender for sender in range(size) if not bool((parts[sender] == sender + 1).all())]
    moved = nbytes * (size - 1) / size  # of a rank, to others
    speeds["all-reduce"] = 2 * moved / _seconds(lambda: dist.all_reduce(total), device)
    speeds["all-to-all"] = moved / _seconds(lambda: dist.all_to_all_single(received, message), device)
    speeds["neighbours"] = nbytes / min(_exchange_seconds(message, received, device))
    sgm.distributed.barrier()
    return Report(platform.node(), alike, time.time(), unseen, reduced, wrong, speeds)


def _versions() -> dict[str, str]:
    """Return the versions of what ranks compute and send with."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        found[package] = "missing"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.accelerator.is_available():
        built = {"CUDA": torch.version.cuda, "HIP": torch.version.hip}
        found |= {name: version for name, version in built.items() if version is not None}
        collectives = getattr(torch.get_device_module(), "nccl", None)  # RCCL has the same name
        if collectives is not None:
            found["NCCL"] = ".".join(map(str, collectives.version()))
    return found


def partner(rank: int, size: int, local: int, turn: int) -> int | None:
    """Return the rank with which a rank exchanges messages alone in a turn, of 3; None if it waits.

    Machines form a ring and exchange with one neighbour after the other, rank by rank: so each rank has two partners,
    of which a slow one is the slow rank of its own pair alone, and no pair is nearer than others. On a single machine,
    and on machines of unequal numbers of ranks, the ranks form the ring.

    Args:
        rank: of `size`.
        size: number of ranks.
        local: ranks of a machine.
        turn: from 0.
    """
    stride = local if size % local == 0 and local < size else 1
    own, num = rank // stride, size // stride
    for edge in (own, (own - 1) % num):  # an edge of the ring, to the next one
        if turn == (2 if edge == num - 1 and num % 2 else edge % 2):
            other = (own + 1) % num if edge == own else edge
            return other * stride + rank % stride
    return None


def _exchange_seconds(message: torch.Tensor, received: torch.Tensor, device: torch.device) -> list[float]:
    """Return the times in which this rank exchanges a message with each of its partners. Collective."""
    rank, size, found = sgm.distributed.rank(), sgm.distributed.world_size(), []
    local = sgm.distributed.broadcast_from_rank_zero(int(os.environ.get("LOCAL_WORLD_SIZE") or size))
    for turn in range(3):
        other = partner(rank, size, local, turn)
        seconds = _seconds(lambda other=other: other is None or _exchange(message, received, other), device)
        found += [seconds] * (other is not None)
    return found


def _exchange(message: torch.Tensor, received: torch.Tensor, other: int) -> None:
    operations = [dist.P2POp(dist.isend, message, other), dist.P2POp(dist.irecv, received, other)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of `work`, which all ranks begin together."""
    found = []
    for _ in range(_REPEATS):
        sgm.distributed.barrier()
        _synchronize(device)
        begun = time.perf_counter()
        work()
        _synchronize(device)
        found.append(time.perf_counter() - begun)
    return min(found)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _matmul_speed(device: torch.device) -> float:
    """Return the TFLOPS of a product of square matrices."""
    side, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    torch.mm(matrix, matrix)  # kernels are loaded
    return 2 * side**3 / 1e12 / _seconds(lambda: torch.mm(matrix, matrix), device)


def _is_shared(folder: Path) -> bool:
    """Whether this rank reads in `folder`, or its nearest parent, what rank zero writes there now. Collective."""
    token = path = None
    if sgm.distributed.rank() == 0:
        place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
        token, path = os.urandom(16).hex(), place / f".node-check-{os.getpid()}"
        try:
            path.write_text(token, encoding="utf-8")
        except OSError:  # read-only or full: digests are compared, and a run says what it cannot write
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            path = None
    token, path = sgm.distributed.broadcast_from_rank_zero((token, path))
    try:
        return path is None or path.read_text(encoding="utf-8") == token
    except OSError:
        return False
    finally:
        sgm.distributed.barrier()
        if path is not None and sgm.distributed.rank() == 0:
            path.unlink()


def listing_digest(folder: Path) -> str:
    """Return a digest of names and sizes in a folder, or of a file. What is hidden belongs to those who wrote it."""
    paths = sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else [folder]
    listing = [f"{path.name} {path.stat().st_size if path.is_file() else ''}" for path in paths]
    return hashlib.sha256("\n".join(listing).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _code_digest() -> str:
    """Return a digest of the Python files of this project."""
    found = hashlib.sha256()
    packages = [path for name in ("sgm", "vae_modules") for path in (_ROOT / name).rglob("*.py")]
    for path in sorted([*_ROOT.glob("*.py"), *packages]):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]
