"""Process groups and device choice; the only owner of both.

A single process needs no launcher and opens no port; under ``torchrun`` the groups follow its environment. No other
module creates or stores a group.
"""

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage] (documented)
from torch.utils import _pytree as pytree

from sgm.config.args import SamplingArgs
from sgm.config.yaml_files import ConfigError, Problem
from sgm.log import every_rank_warns
from sgm.parallel.heartbeat import Peers, Progress
from sgm.parallel.mesh import Mesh
from sgm.util import InputError, RunError, default, prepare_import

_GATHERING = ("nccl", "gloo")  # backends that gather to one rank; those of other accelerators may not


def prepare_deepspeed() -> None:
    """Call before DeepSpeed creates an engine: on a CPU, use gloo instead of compiling its C++ extension."""
    prepare_import()
    import deepspeed.ops

    # DeepSpeed's ZeRO calls collectives by deprecated names: torch warns on each call, hundreds a minute.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return world_size() > 1 and "RANK" in os.environ


def world_size() -> int:
    """Return the number of processes that the launcher started, also before `initialize`.

    Raises:
        InputError: the environment holds something else.
    """
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or int(given) == 0:
        raise InputError(f"the environment has WORLD_SIZE={given}; it is a number of processes, from 1: unset it")
    return int(given)


@contextmanager
def planned(num: int) -> Iterator[None]:
    """Context in which `world_size` is that of a run that is planned, for checks in a single process.

    Raises:
        InputError: a launcher has started several processes.
    """
    if is_launched():
        raise InputError("--devices plans in one process; give the command without torchrun")
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(num)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before


_mesh: Mesh | None = None
# n → group of the first n ranks of this sample group, None if this rank is not in it: a short video has fewer chunks
# than ranks.
_sample_groups: dict[int, Any] = {}
# "sequence" and "cfg" → this rank's group along that axis of the mesh, if its size is above 1.
_axes: dict[str, Any] = {}
_timeout = timedelta(minutes=30)
_device: torch.device | None = None  # of this process, if it was configured
_peers: Peers | None = None
_progress: tuple[int, str, float] | None = None  # of this process: iteration, phase, and since when
_store: Any = None  # of all ranks
_num_waits = 0  # for rank zero, in `_store`
_num_settled = 0  # exchanges of `settle`


def configure(args: SamplingArgs) -> None:
    """Apply the settings of this process; call before `initialize`.

    These are ``args.device``, ``args.distributed_timeout``, and ``args.allow_tf32`` for products and convolutions.

    Raises:
        ConfigError: ``args.device`` names one that is not available.
        InputError: variables of the launcher are missing.
    """
    global _timeout, _device
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if is_launched() and not os.environ.get(name)]
    if missing:
        found = f"the environment has RANK and WORLD_SIZE={world_size()}, and no {' or '.join(missing)}"
        raise InputError(f"{found}; start the processes with torchrun, or unset those for a single one")
    _device = None if args.device is None else resolve_device(args)
    if _device is not None and _device.type != "cpu" and _device.index is not None:
        torch.accelerator.set_device_index(_device)
    _timeout = timedelta(seconds=args.distributed_timeout)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32


def report_progress(iteration: int, phase: str) -> None:
    """Let the other ranks know what this one is doing; costs nothing."""
    global _progress
    _progress = iteration, phase, time.monotonic()
    if _peers is not None:
        _peers.report_progress(iteration, phase)


def progress_of_ranks() -> list[Progress]:
    """Return what each rank is doing, as far as it is known."""
    if _peers is not None:
        return _peers.progress()
    if _progress is None:
        return []
    iteration, phase, since = _progress
    return [Progress("this process", iteration, phase, time.monotonic() - since)]


@contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """Context: turn errors caused by a lost rank into a RunError naming that rank."""
    try:
        yield
    except BaseException as error:
        if _peers is None:
            raise
        _peers.explain(error)


def _start_launched() -> None:
    """Connect to the other processes of the launcher and start heartbeats."""
    global _peers, _store
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # for groups created by SAT and DeepSpeed
        setattr(dist.distributed_c10d, name, _timeout)
    own = device()
    if own.type != "cpu" and torch.accelerator.device_count() > 1:  # of one, a launcher has shown each rank its own
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        # torchrun keeps its store across restarts, with the addresses of the old processes.
        store, rank, size = next(rendezvous("env://", timeout=_timeout))
        store = PrefixStore(f"start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        _start_groups(store=store, rank=rank, world_size=size, timeout=_timeout)
        _store = store
        _peers = Peers(rank=rank, size=size, timeout=_timeout)
    except dist.DistError as error:
        found = f"some of {world_size()} ranks are missing after args.distributed_timeout ({_timeout}): {error}"
        raise RunError(f"{found}; start all of them, with the same MASTER_ADDR and MASTER_PORT") from error


def _start_groups(**options: Any) -> None:
    """Create the group of all processes, bound to this process's accelerator if it has one.

    Unbound, NCCL connects at the first collective, and guesses the device of `barrier`.
    """
    own = device()
    bound = None if own.type == "cpu" else own
    dist.init_process_group(dist.get_default_backend_for_device(own), device_id=bound, **options)


def initialize(*, mesh: Mesh | None = None) -> None:
    """Create the process groups once; later calls must pass the same mesh.

    Args:
        mesh: parallel sizes; None keeps the current mesh, initially one rank per sample.

    Raises:
        InputError: sizes do not divide the number of processes, or differ from an earlier call.
        RunError: other processes do not join within the timeout.
    """
    global _mesh
    if mesh is not None:
        mesh.check(world_size())
        if _mesh not in (None, mesh):
            raise InputError(f"ranks share {_mesh} in this process already, and {mesh} is asked for; start another one")
    prepare_import()
    from sat import mpu

    # DeepSpeed needs it even for one process.
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        if is_launched():
            _start_launched()
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] (documented, not exported)
            _start_groups(store=store, rank=0, world_size=1)
    tensor = mesh.tensor if mesh is not None else _current().tensor
    if mpu.model_parallel_is_initialized() and mpu.get_model_parallel_world_size() != tensor:
        mpu.destroy_model_parallel()  # a network was built for inspection before the sizes were known
    if not mpu.model_parallel_is_initialized():
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(dist.get_world_size()))  # without it SAT guesses and warns
        _make_layer_groups(tensor)
    if mesh is not None and _mesh is None:
        _mesh = mesh
        _make_groups(mesh)
        if sample_rank() == 0:  # the others of the group have its clips and prompts
            every_rank_warns()


def has_mesh() -> bool:
    """Whether `initialize` got a mesh, i.e. the configuration has been checked."""
    return _mesh is not None


def _current() -> Mesh:
    return default(_mesh, Mesh())


def _own_group(start: int, stop: int, step: int = 1) -> Any:
    """Create a group of which this rank is one.

    A rank creates its own group alone, so that its work does not grow with the number of ranks. Every round of calls
    divides all ranks among groups: torch names a group by its ranks and the number of groups before it, and NCCL splits
    the communicator of all ranks in one collective.
    """
    ranks = list(range(start, stop, step))
    assert dist.get_rank() in ranks, "each rank creates its own group"
    return dist.new_group(ranks, use_local_synchronization=True)


def _make_layer_groups(tensor: int) -> None:
    """Create the groups of SAT's layers and DeepSpeed; SAT's own function has each rank create every group."""
    import sat.mpu.initialize as layers

    own, world = dist.get_rank(), dist.get_world_size()
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    layers._DATA_PARALLEL_GROUP = _own_group(own % tensor, world, tensor)
    layers._MODEL_PARALLEL_GROUP = _own_group(first := own - own % tensor, first + tensor)
    layers._NODE_GROUP = _own_group(first := own - own % local, min(first + local, world))


def _make_groups(mesh: Mesh) -> None:
    """Create the groups of this rank's sample; see `_own_group`."""
    if mesh.ranks == 1:
        return
    place = dist.get_rank() % mesh.ranks
    start = dist.get_rank() - place
    for num in range(1 if mesh.context > 1 else mesh.ranks, mesh.ranks + 1):
        if place < num:
            _sample_groups[num] = _own_group(start, start + num)
        else:
            _own_group(start + num, start + mesh.ranks)  # nothing uses it
            _sample_groups[num] = None
    for axis in ("sequence", "cfg"):
        for members in mesh.groups(axis) if getattr(mesh, axis) > 1 else ():
            if place in members:
                stride = members[1] - members[0]
                _axes[axis] = _own_group(start + members[0], start + members[-1] + 1, stride)


@contextmanager
def simulate(mesh: Mesh, make_group: Callable[[str, int], dist.ProcessGroup]) -> Iterator[None]:
    """Context: act as the first rank of a sample group whose other ranks do not exist.

    For estimates: modules built and run inside have the shapes of one rank of `mesh`.

    Args:
        mesh: parallel sizes to simulate.
        make_group: (axis of the mesh, number of ranks) → a process group with this process as rank zero.
    """
    global _mesh, _axes, _sample_groups
    initialize()
    import sat.mpu.initialize as layers

    before = _mesh, _axes, _sample_groups, layers._MODEL_PARALLEL_GROUP
    world, made = dist.distributed_c10d._world, []

    def group(axis: str, size: int) -> dist.ProcessGroup:
        group = make_group(axis, size)
        made.append(group)
        world.pg_map[group], world.pg_names[group] = ("fake", dist.HashStore()), f"simulated {len(made)}"  # pyright: ignore
        world.pg_group_ranks[group] = {dist.get_rank() + i: i for i in range(size)}
        return group

    try:
        _mesh = mesh
        _axes = {axis: group(axis, size) for axis in ("sequence", "cfg") if (size := getattr(mesh, axis)) > 1}
        _sample_groups = {num: group("context", num) for num in range(1, mesh.ranks + 1) if mesh.ranks > 1}
        if mesh.tensor > 1:
            layers._MODEL_PARALLEL_GROUP = group("tensor", mesh.tensor)
        yield
    finally:
        _mesh, _axes, _sample_groups, layers._MODEL_PARALLEL_GROUP = before
        for group_ in made:
            for known in (world.pg_map, world.pg_names, world.pg_group_ranks):
                del known[group_]


def context_parallel_size() -> int:
    """Context parallel size of the VAE."""
    return _current().context


def context_group(num: int | None = None) -> Any:
    """Return the group of the first `num` ranks of this context parallel group; all if None.

    None if this rank is not in it, or without context parallelism.
    """
    context = context_parallel_size()
    return _sample_groups.get(default(num, context)) if context > 1 else None


def tensor_parallel_size() -> int:
    """Tensor parallel size of the DiT."""
    return _current().tensor


def tensor_parallel_rank() -> int:
    """Index of this process among the tensor parallel ranks, as in names of checkpoints (``mp_rank_XX``)."""
    return dist.get_rank() % _current().tensor if dist.is_initialized() else 0


def tensor_group() -> Any:
    """Return this rank's tensor parallel group; None if the size is 1."""
    from sat import mpu

    return mpu.get_model_parallel_group() if tensor_parallel_size() > 1 else None


def layer_groups() -> Any:
    """Return SAT's module with the tensor parallel groups and their collectives; None if the size is 1."""
    from sat import mpu

    return mpu if tensor_parallel_size() > 1 else None


def sequence_group() -> Any:
    """Return this rank's sequence parallel group; None if the size is 1."""
    return _axes.get("sequence")


def sequence_parallel_size() -> int:
    """Sequence parallel size."""
    return _current().sequence


def cfg_group() -> Any:
    """Return this rank's guidance parallel group; None if the size is 1."""
    return _axes.get("cfg")


def sample_rank() -> int:
    """Index of this process in its sample group; rank 0 of the group writes the sample."""
    return dist.get_rank() % _current().ranks if dist.is_initialized() else 0


def broadcast_in_sample_group(value: Any) -> Any:
    """Broadcast `value` from the first rank of this sample's group.

    Args:
        value: lists, dictionaries, registered dataclasses (see `torch.utils._pytree`) of tensors, and small objects,
            which are pickled. Ignored on the other ranks.

    Returns:
        `value` on the first rank; on the others a copy, with its tensors on the device of the process.
    """
    group = _sample_groups.get(_current().ranks)
    if group is None:
        return value
    source = dist.get_process_group_ranks(group)[0]
    is_source = dist.get_rank() == source
    # Tensors on the meta device carry shape and dtype without values.
    box = [pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("meta"), value) if is_source else None]
    dist.broadcast_object_list(box, src=source, group=group)

    def transfer(tensor: torch.Tensor) -> torch.Tensor:
        if is_source:
            dist.broadcast(tensor.detach().to(device()).contiguous(), source, group=group)
            return tensor
        received = torch.empty(tensor.shape, dtype=tensor.dtype, device=device())
        dist.broadcast(received, source, group=group)
        return received

    return pytree.tree_map_only(torch.Tensor, transfer, value if is_source else box[0])


def shutdown() -> None:
    """Destroy the process groups, so that peers do not wait for this rank."""
    global _mesh, _peers, _store, _num_waits, _num_settled
    _mesh, _store, _num_waits, _num_settled = None, None, 0, 0
    _sample_groups.clear()
    _axes.clear()
    if _peers is not None:
        _peers.close()
        _peers = None
    if dist.is_initialized():
        from sat import mpu

        if mpu.model_parallel_is_initialized():
            mpu.destroy_model_parallel()
        deepspeed_comm = sys.modules.get("deepspeed.comm")
        if deepspeed_comm is not None and deepspeed_comm.is_initialized():
            deepspeed_comm.destroy_process_group()  # destroys torch's groups and drops its own handles
        else:
            dist.destroy_process_group()


def rank() -> int:
    """Global rank; rank zero writes files shared by all."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_of_machine() -> bool:
    """Whether this is the first of the processes that were started on a machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def data_parallel_rank() -> int:
    """Index of this rank's sample group among all sample groups."""
    return dist.get_rank() // _current().ranks if dist.is_initialized() else 0


def data_parallel_size() -> int:
    """Number of sample groups; each works on different samples."""
    return dist.get_world_size() // _current().ranks if dist.is_initialized() else 1


def _is_shared() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for all ranks."""
    if _is_shared():
        dist.barrier()


def all_reduce_(tensor: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
    """Sum `tensor` over all ranks in place, or take the maximum of each element if `largest`."""
    if _is_shared():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor


def broadcast_from_rank_zero(value: Any) -> Any:
    """Broadcast a small object from rank zero."""
    box = [value]
    if _is_shared():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def run_on_rank_zero(work: Callable[[], Any]) -> Any:
    """Run `work` on rank zero and broadcast its result (a small object); an InputError is raised on all ranks.

    It may take longer than the timeout of collectives, as reading every clip of a large data set does.
    """
    value: Any = None
    if rank() == 0:
        try:
            value = work()
        except InputError as error:
            value = error
    _wait_for_rank_zero()
    value = broadcast_from_rank_zero(value)
    if isinstance(value, InputError):
        raise value
    return value


def _wait_for_rank_zero() -> None:
    """Wait in the store, without a timeout, until rank zero comes here; heartbeats end the wait if it is lost."""
    global _num_waits
    if _store is None:
        return
    _num_waits += 1
    key = f"rank zero/{_num_waits}"
    if rank() == 0:
        _store.set(key, "")
    _poll(_store, [key])


def _poll(store: Any, keys: Sequence[str], cancelled: threading.Event | None = None) -> None:
    """Wait until the store has all keys, without blocking its connection.

    Raises:
        DistError: `cancelled` was set, or without it a rank was lost.
    """
    pause, given_up = 0.001, default(cancelled, threading.Event() if _peers is None else _peers.found)
    while not store.check(list(keys)):
        if given_up.wait(pause):
            raise dist.DistError("a wait for other ranks was given up")
        pause = min(2 * pause, 0.5)


def settle(value: Any, decide: Callable[[list[Any]], Any], cancelled: threading.Event | None = None) -> Any:
    """Send `value` to rank zero, and return on all ranks what `decide` makes there of the values of all ranks.

    For a thread beside the main one: this goes through the store, and not through collectives, whose order must be the
    same on all ranks. All ranks call it equally often, one call at a time.

    Args:
        value: of this rank, as JSON can hold it; the result too.
        decide: is called on rank zero alone.
        cancelled: ends the wait for others; None: the loss of a rank does.

    Raises:
        DistError: the wait was ended.
    """
    global _num_settled
    if _store is None:
        return decide([value])
    _num_settled += 1
    name = f"settled/{_num_settled}"
    store, own = _store.clone(), rank()  # the connection of the groups is locked while it waits for a key
    store.set(f"{name}/{own}", json.dumps(value))
    answer = f"{name}/answer"
    if own == 0:
        keys = [f"{name}/{each}" for each in range(world_size())]
        _poll(store, keys, cancelled)
        store.set(answer, json.dumps(decide([json.loads(text) for text in store.multi_get(keys)])))
    _poll(store, [answer], cancelled)
    store.delete_key(f"{name}/{own}")
    return json.loads(store.get(answer))


def wait_for_all() -> None:
    """Wait for all ranks in the store, without the timeout of collectives; heartbeats end the wait if one is lost."""
    settle(None, lambda values: None)


def gather_objects(value: Any) -> list[Any] | None:
    """Gather small objects on rank zero, in rank order; None on the others."""
    if not _is_shared():
        return [value]
    if dist.get_backend() not in _GATHERING:
        values = all_gather_objects(value)
        return values if rank() == 0 else None
    values = [None] * dist.get_world_size() if rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


def any_rank(flag: bool) -> bool:
    """Whether any rank passes true. Collective."""
    return bool(all_reduce_(torch.tensor(float(flag), device=device()), largest=True).item())


def all_gather_any(value: Any) -> list[Any]:
    """All-gather small objects, in rank order, if any of them is not empty; an empty list otherwise.

    For what is rare: each rank of a thousand would read a thousand empty ones.
    """
    return all_gather_objects(value) if any_rank(bool(value)) else []


def all_gather_objects(value: Any) -> list[Any]:
    """All-gather small objects, in rank order."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if _is_shared():
        dist.all_gather_object(values, value)
    return values


def device() -> torch.device:
    """Return the device of this process: that of `configure`, its accelerator if there is one, otherwise the CPU."""
    if _device is not None and (_device.type == "cpu" or _device.index is not None):
        return _device
    # A build with accelerator support reports its device type even without a device.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def resolve_device(args: SamplingArgs) -> torch.device:
    """Return the device of this process.

    Raises:
        ConfigError: ``args.device`` names one that is not available.
    """
    if args.device is None:
        return device()
    try:
        found = torch.device(args.device)
        if torch.empty(0, device=found).is_meta:
            raise RuntimeError("it holds no values")
        if found.index is not None and found.type != "cpu" and world_size() > 1:
            raise RuntimeError("it is one device, and each of several ranks takes its own: leave out the number")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"'{args.device}' cannot be used: {(str(error).splitlines() or ['no reason given'])[0]}"
        cure = "remove args.device to use this machine's default, or set args.device=cpu"
        raise ConfigError([Problem("args.device", "", reason, cure)]) from error
    return found
