"""The one owner of process groups.

A single process needs no launcher and opens no port; under ``torchrun`` the groups follow its environment. Nothing
else in this project creates or stores a group.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage] (documented)

from sgm.config.args import SamplingArgs
from sgm.config.yaml_files import ConfigError, Problem
from sgm.log import quiet_dependencies
from sgm.parallel.heartbeat import Peers
from sgm.parallel.packing import pack, unpack
from sgm.util import InputError, RunError, default


def prepare_import() -> None:
    """Call before SAT or DeepSpeed is imported: choose DeepSpeed's device as torch does, and keep both quiet."""
    quiet_dependencies()
    os.environ.setdefault("DS_ACCELERATOR", device().type)


def prepare_deepspeed() -> None:
    """Call before DeepSpeed makes an engine: on a CPU it would first compile a C++ extension, which gloo replaces."""
    prepare_import()
    import deepspeed.ops

    # DeepSpeed's ZeRO calls collectives by names that torch has renamed: a line for each call, hundreds a minute.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return world_size() > 1 and "RANK" in os.environ


def world_size() -> int:
    """Return the number of processes that the launcher started, also before `initialize`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many neighbouring ranks work on one sample together; every other neighbour has samples of its own.

    With 2 of 4 ranks, ranks 0 and 1 share one sample, ranks 2 and 3 the next. Ranks of one sample are laid out with the
    axis that sends most as the innermost: neighbours share layers, then tokens, then the two branches of guidance.

    Attributes:
        context: ranks that share a video in the VAE (``cp_size``).
        tensor: ranks that share the layers of the DiT (``model_parallel_size``).
        sequence: ranks that share the tokens of a sample in the DiT (``sequence_parallel_size``).
        cfg: ranks that share the conditional and the unconditional branch in sampling (``cfg_parallel_size``).
    """

    context: int = 1
    tensor: int = 1
    sequence: int = 1
    cfg: int = 1

    @property
    def network(self) -> int:
        """Ranks that share one sample in the DiT."""
        return self.tensor * self.sequence * self.cfg

    @property
    def ranks(self) -> int:
        """Ranks that work on one sample."""
        return max(self.context, self.network)

    def lines(self, axis: str) -> list[list[int]]:
        """Return the groups along ``tensor``, ``sequence`` or ``cfg`` among the first ranks, those of one sample."""
        length = getattr(self, axis)
        distance = {"tensor": 1, "sequence": self.tensor, "cfg": self.tensor * self.sequence}[axis]
        firsts = [rank for rank in range(self.network) if rank // distance % length == 0]
        return [[first + distance * i for i in range(length)] for first in firsts]

    def check(self) -> None:
        """Hold the sizes against the number of processes, before anything is started.

        Raises:
            InputError: they do not fit; says which would.
        """
        network = {
            "args.model_parallel_size": self.tensor,
            "args.sequence_parallel_size": self.sequence,
            "args.cfg_parallel_size": self.cfg,
        }
        context = {"model.first_stage_config.params.cp_size": self.context}
        if self.cfg not in (1, 2):
            raise InputError(f"args.cfg_parallel_size={self.cfg}, but guidance has two branches; give 1 or 2")
        for name, size in (network | context).items():
            if size < 1 or world_size() % size:
                raise InputError(f"{name}={size} {_no_fit(size)}")
        if world_size() % self.network:
            given = " × ".join(f"{name}={size}" for name, size in network.items() if size > 1)
            raise InputError(f"{given} = {self.network} {_no_fit(self.network)}")
        if self.context not in (1, self.network) and self.network > 1:
            given = " and ".join(f"{name}={size}" for name, size in (context | network).items() if size > 1)
            raise InputError(
                f"{given} differ: the same ranks share a sample in the VAE and in the network; set cp_size to "
                f"{self.network} or 1, or the sizes of the network to 1"
            )


def _no_fit(size: int) -> str:
    legal = [str(n) for n in range(1, world_size() + 1) if world_size() % n == 0]
    return (
        f"ranks cannot share a sample among {world_size()} processes; legal are {', '.join(legal)}, or start another "
        f"number of processes, such as {max(size, 1)}, with torchrun --nproc_per_node"
    )


_mesh: Mesh | None = None
# Of this rank: number of ranks → the group of that many first ones of those that share a sample with it; None where it
# is not one of them. Short videos have less pieces than there are ranks.
_sample_groups: dict[int, Any] = {}
# Of this rank: axis of the mesh → the ranks that share a sample along it, where it is longer than 1.
_axes: dict[str, Any] = {}
_timeout = timedelta(minutes=30)
_peers: Peers | None = None


def set_timeout(seconds: float) -> None:
    """Say, before `initialize`, how long ranks wait for each other; see ``args.distributed_timeout``."""
    global _timeout
    _timeout = timedelta(seconds=seconds)


@contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """Context of a command's work: what fails because another rank is lost names it, in a RunError."""
    try:
        yield
    except BaseException as error:
        if _peers is None:
            raise
        _peers.explain(error)


def _start_launched() -> None:
    """Join the other processes of the launcher, and watch that they stay."""
    global _peers
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # of the groups that SAT and DeepSpeed make
        setattr(dist.distributed_c10d, name, _timeout)
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        # torchrun keeps its store when it starts all processes again, and in it the addresses of those before.
        store, rank, size = next(rendezvous("env://", timeout=_timeout))
        store = PrefixStore(f"start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = dist.get_default_backend_for_device(device())
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_timeout)
    except dist.DistError as error:
        found = f"some of {world_size()} ranks are missing after args.distributed_timeout ({_timeout}): {error}"
        raise RunError(f"{found}; start all of them, with the same MASTER_ADDR and MASTER_PORT") from error
    _peers = Peers(rank=dist.get_rank(), size=dist.get_world_size(), timeout=_timeout)


def initialize(*, mesh: Mesh | None = None) -> None:
    """Create the process groups once; later calls check that they ask for the same.

    Args:
        mesh: what ranks share; None leaves it as it is, at first nothing.

    Raises:
        InputError: sizes do not fit the number of processes, or differ from those of before.
        RunError: other processes do not show within the timeout.
    """
    global _mesh
    if mesh is not None:
        mesh.check()
        if _mesh not in (None, mesh):
            raise InputError(f"ranks share {_mesh} in this process already, and {mesh} is asked for; start another one")
    prepare_import()
    from sat import mpu

    # DeepSpeed asks for it even where there is one process.
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        if is_launched():
            _start_launched()
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] (documented, not exported)
            backend = dist.get_default_backend_for_device(device())
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    tensor = mesh.tensor if mesh is not None else _current().tensor
    if mpu.model_parallel_is_initialized() and mpu.get_model_parallel_world_size() != tensor:
        mpu.destroy_model_parallel()  # a network was built to be looked at, before the sizes were known
    if not mpu.model_parallel_is_initialized():
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(dist.get_world_size()))  # SAT guesses, loudly, without it
        mpu.initialize_model_parallel(tensor)
    if mesh is not None and _mesh is None:
        _mesh = mesh
        _make_groups(mesh)


def has_mesh() -> bool:
    """Whether it has been declared what ranks share: the configuration was found good, and the work begins."""
    return _mesh is not None


def _current() -> Mesh:
    return default(_mesh, Mesh())


def _make_groups(mesh: Mesh) -> None:
    """Make the groups of all ranks: every process has to take part in making each."""
    for start in range(0, dist.get_world_size() if mesh.ranks > 1 else 0, mesh.ranks):
        for num in range(1 if mesh.context > 1 else mesh.ranks, mesh.ranks + 1):
            ranks = list(range(start, start + num))
            group: Any = dist.new_group(ranks)
            if start <= dist.get_rank() < start + mesh.ranks:
                _sample_groups[num] = group if dist.get_rank() in ranks else None
        for axis in ("sequence", "cfg"):
            for line in mesh.lines(axis) if getattr(mesh, axis) > 1 else ():
                ranks = [start + rank for rank in line]
                group = dist.new_group(ranks)
                if dist.get_rank() in ranks:
                    _axes[axis] = group


@contextmanager
def simulate(mesh: Mesh, make_group: Callable[[str, int], dist.ProcessGroup]) -> Iterator[None]:
    """Context in which this process acts as the first rank of a sample; the other ranks do not exist.

    For estimates: what is built and run inside has the shapes of a rank of `mesh`.

    Args:
        mesh: how many ranks share the sample.
        make_group: (axis of the mesh, number of ranks) → a process group of which this process is rank zero.
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
    """Number of ranks that share one video in the VAE with this one, itself included."""
    return _current().context


def context_group(num: int | None = None) -> Any:
    """Return the group of the first `num` ranks that share a video with this one, all of them if None.

    None where this rank is not one of them, and where nothing is shared.
    """
    context = context_parallel_size()
    return _sample_groups.get(default(num, context)) if context > 1 else None


def tensor_parallel_size() -> int:
    """Number of ranks that share the layers of the DiT with this one, itself included."""
    return _current().tensor


def tensor_parallel_rank() -> int:
    """Index of this process among those that share layers, as checkpoints count them (``mp_rank_XX``)."""
    return dist.get_rank() % _current().tensor if dist.is_initialized() else 0


def tensor_group() -> Any:
    """Return the group of the ranks that share layers with this one; None where nothing is shared."""
    from sat import mpu

    return mpu.get_model_parallel_group() if tensor_parallel_size() > 1 else None


def layer_groups() -> Any:
    """Return SAT's module of the groups that share layers, which DeepSpeed asks for them; None where there are none."""
    from sat import mpu

    return mpu if tensor_parallel_size() > 1 else None


def sequence_group() -> Any:
    """Return the group of the ranks that share the tokens of a sample with this one; None where nothing is shared."""
    return _axes.get("sequence")


def sequence_parallel_size() -> int:
    """Number of ranks that share the tokens of a sample with this one, itself included."""
    return _current().sequence


def cfg_group() -> Any:
    """Return the group of the ranks that share the branches of guidance with this one; None where nothing is shared."""
    return _axes.get("cfg")


def sample_rank() -> int:
    """Index of this process among those that work on one sample; the first one writes it."""
    return dist.get_rank() % _current().ranks if dist.is_initialized() else 0


def broadcast_in_sample_group(value: Any) -> Any:
    """Return what the first of the ranks that share a sample passed: tensors, and small objects around them.

    What the others pass does not matter. They get the tensors on the device of their process.
    """
    group = _sample_groups.get(_current().ranks)
    if group is None:
        return value
    source = dist.get_process_group_ranks(group)[0]
    if dist.get_rank() == source:
        packed, tensors = pack(value)
        shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        dist.broadcast_object_list([packed, shapes], src=source, group=group)
        for tensor in tensors:
            dist.broadcast(tensor.detach().to(device()).contiguous(), source, group=group)
        return value
    box: list[Any] = [None, None]
    dist.broadcast_object_list(box, src=source, group=group)
    packed, shapes = box
    tensors = [torch.empty(shape, dtype=dtype, device=device()) for shape, dtype in shapes]
    for tensor in tensors:
        dist.broadcast(tensor, source, group=group)
    return unpack(packed, tensors)


def shutdown() -> None:
    """Destroy the process groups, so that a rank that ends does not leave its peers waiting."""
    global _mesh, _peers
    _mesh = None
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
            deepspeed_comm.destroy_process_group()  # ends torch's groups, and forgets its own handles on them
        else:
            dist.destroy_process_group()


def rank() -> int:
    """Index of this process among all; the first one writes what there is once."""
    return dist.get_rank() if dist.is_initialized() else 0


def data_parallel_rank() -> int:
    """Index of this process among those that work on different samples."""
    return dist.get_rank() // _current().ranks if dist.is_initialized() else 0


def data_parallel_size() -> int:
    """Number of processes that work on different samples; those that share one count once."""
    return dist.get_world_size() // _current().ranks if dist.is_initialized() else 1


def _is_shared() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for all ranks."""
    if _is_shared():
        dist.barrier()


def all_reduce_(tensor: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
    """Replace `tensor`, in place, by its sum over all ranks, or by the largest value of each element."""
    if _is_shared():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor


def broadcast_from_rank_zero(value: Any) -> Any:
    """Return what rank zero passed, a small object, on every rank."""
    box = [value]
    if _is_shared():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_objects(value: Any) -> list[Any]:
    """Return what each rank passed, small objects, on every rank."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if _is_shared():
        dist.all_gather_object(values, value)
    return values


def device() -> torch.device:
    """Return the device of this process: its accelerator where there is one, otherwise the CPU."""
    # A build with accelerator support names its device type even where no device is present.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def resolve_device(args: SamplingArgs) -> torch.device:
    """Return the device of this process.

    Raises:
        ConfigError: ``args.device`` names one that is not there.
    """
    if args.device is None:
        return device()
    try:
        found = torch.device(args.device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"'{args.device}' cannot be used: {(str(error).splitlines() or ['no reason given'])[0]}"
        cure = "remove args.device to take what this machine has, or set args.device=cpu"
        raise ConfigError([Problem("args.device", "", reason, cure)]) from error
    return found
