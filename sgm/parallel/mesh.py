"""Parallel sizes and the rank groups of each axis."""

from dataclasses import dataclass

from sgm.util import InputError


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Parallel sizes; consecutive ranks form the group of one sample.

    With 2 of 4 ranks, ranks 0 and 1 share one sample, ranks 2 and 3 the next. The axis with most traffic is
    innermost: tensor parallel, then sequence parallel, then guidance parallel.

    Attributes:
        context: context parallel size of the VAE (``cp_size``).
        tensor: tensor parallel size of the DiT (``model_parallel_size``).
        sequence: sequence parallel size of the DiT (``sequence_parallel_size``).
        cfg: guidance parallel size in sampling: one branch of CFG per rank (``cfg_parallel_size``).
    """

    context: int = 1
    tensor: int = 1
    sequence: int = 1
    cfg: int = 1

    @property
    def network(self) -> int:
        """Ranks per sample in the DiT."""
        return self.tensor * self.sequence * self.cfg

    @property
    def ranks(self) -> int:
        """Ranks per sample."""
        return max(self.context, self.network)

    def groups(self, axis: str) -> list[list[int]]:
        """Return the ranks of each group along ``tensor``, ``sequence`` or ``cfg``, for the first sample."""
        size = getattr(self, axis)
        stride = {"tensor": 1, "sequence": self.tensor, "cfg": self.tensor * self.sequence}[axis]
        firsts = [rank for rank in range(self.network) if rank // stride % size == 0]
        return [[first + stride * i for i in range(size)] for first in firsts]

    def check(self, num_processes: int) -> None:
        """Check the sizes against the number of processes, before anything is started.

        Raises:
            InputError: they do not divide it, or contradict each other; the message lists the legal sizes.
        """
        network = {
            "args.model_parallel_size": self.tensor,
            "args.sequence_parallel_size": self.sequence,
            "args.cfg_parallel_size": self.cfg,
        }
        context = {"model.first_stage_config.params.cp_size": self.context}
        if self.cfg not in (1, 2):
            raise InputError(f"args.cfg_parallel_size={self.cfg}, but guidance has two branches; give 1 or 2")
        sizes = {f"{name}={size}": size for name, size in (network | context).items()}
        given = [f"{name}={size}" for name, size in network.items() if size > 1]
        sizes[f"{' × '.join(given)} = {self.network}"] = self.network
        for text, size in sizes.items():
            if size < 1 or num_processes % size:
                legal = [str(n) for n in range(1, num_processes + 1) if num_processes % n == 0]
                raise InputError(
                    f"{text} ranks cannot share a sample among {num_processes} processes; legal are "
                    f"{', '.join(legal)}, or start another number of processes, such as {max(size, 1)}, with "
                    "torchrun --nproc_per_node"
                )
        if self.context not in (1, self.network) and self.network > 1:
            raise InputError(
                f"model.first_stage_config.params.cp_size={self.context} and {' and '.join(given)} differ: the same "
                f"ranks share a sample in the VAE and in the network; set cp_size to {self.network} or 1, or the sizes "
                "of the network to 1"
            )
