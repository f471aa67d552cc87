"""Blocks that are recomputed without their attention, whose output is kept.

Attention takes much of the time of a block where clips are long: 4·S²·D of its 4·S²·D + 24·S·D² products, with ``S``
tokens of size ``D``. Its output is as large as the input of the block, the only other tensor that a recomputed block
keeps. What the kernel returns, the log-sum-exp as well, is kept and returned again when the block is recomputed, so
that gradients are those of full recomputation, bit by bit.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sgm.util import InputError

KERNELS = "_scaled_dot_product_"  # how the names of torch's fused kernels begin


def recomputed(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, kept: "KeptAttention | None"
) -> torch.Tensor:
    """Return run(x), which is recomputed in the backward pass, but for the attention that is `kept`.

    Raises:
        InputError: attention is no fused kernel of torch, or several.
    """
    # SAT's own checkpointing is reentrant: it needs an input with a gradient, and hides the block from hooks and
    # compilers. No determinism check, as ZeRO-3 frees parameters between the two passes.
    if kept is None:
        return checkpoint(run, x, use_reentrant=False, determinism_check="none")
    return kept.hold(checkpoint(run, x, use_reentrant=False, determinism_check="none", context_fn=kept.contexts))


class KeptAttention:
    """What the attention of one block has returned in one forward pass.

    The kernel is met below autograd, which therefore has the same graph whether it runs or not.
    """

    def __init__(self) -> None:
        self._results: list[Any] = []
        self._tensors: list[torch.Tensor] = []
        self._replays = False

    def hold(self, out: torch.Tensor) -> torch.Tensor:
        """Return the output of a block, whose gradient brings what was kept, before the block is recomputed."""
        if len(self._results) != 1:
            raise InputError(
                f"args.keep_attention keeps the output of one fused kernel of torch in each block, and attention ran "
                f"{len(self._results)} of them; set args.keep_attention=false, or another args.attention"
            )
        tensors, self._tensors = self._tensors, []
        # Saved outside of the checkpoint: where other tensors that are saved wait, these do as well.
        return _Hold.apply(out, self, *tensors)

    def context(self) -> AbstractContextManager:
        """Return the context of an attention: its kernel runs, or returns what it has returned before."""
        return _Kernels(self._replay if self._replays else self._record)

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return the contexts of the block: of its forward pass, and of its recomputation."""
        return nullcontext(), _Replay(self)

    def _record(self, run: Callable[[], Any]) -> Any:
        made = run()
        place = len(self._tensors)
        results = list(made) if isinstance(made, tuple) else [made]
        for index, value in enumerate(results):
            if isinstance(value, torch.Tensor):
                self._tensors.append(value.detach())  # autograd will write its graph into `value`
                results[index] = _Place(place)
                place += 1
        self._results.append(tuple(results) if isinstance(made, tuple) else results[0])
        return made

    def _replay(self, _: Callable[[], Any]) -> Any:
        (results,) = self._results

        def found(value: Any) -> Any:
            return self._tensors[value.index].detach() if isinstance(value, _Place) else value

        return tuple(map(found, results)) if isinstance(results, tuple) else found(results)

    def come(self, tensors: list[torch.Tensor]) -> None:
        """Take what was kept, before the block is recomputed."""
        self._tensors = tensors


class _Place:
    """Stands for a tensor in a result."""

    def __init__(self, index: int) -> None:
        self.index = index


class _Replay(AbstractContextManager):
    """Context of the recomputation."""

    def __init__(self, kept: KeptAttention) -> None:
        self._kept = kept

    def __enter__(self) -> None:
        self._kept._replays = True

    def __exit__(self, *_: Any) -> None:
        self._kept._replays, self._kept._tensors = False, []


class _Kernels(TorchDispatchMode):
    """Context in which `instead` is called with each fused kernel."""

    def __init__(self, instead: Callable[[Callable[[], Any]], Any]) -> None:
        super().__init__()
        self._instead = instead

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each operator asks torch's compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(KERNELS) and not name.endswith("backward"):
            return self._instead(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


class _Hold(torch.autograd.Function):
    """The identity; keeps tensors, and hands them over when the backward pass arrives."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, kept: KeptAttention, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.kept = kept
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors = list(ctx.saved_tensors)
        ctx.kept.come(tensors)
        return *grads, None, *[None] * len(tensors)
