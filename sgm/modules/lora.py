"""SAT's LoRA on more projections, as DoRA and as LoKr, and its layer with fewer products and passes.

y = W·x + b + scaling·B·A·x (Hu et al. 2021). SAT computes A·x part by part, three for queries, keys and values, then
scales, joins and adds the results. Here the matrices A of a layer are one product, and each B·(A·x) is accumulated into
its part of the output, by the product itself. Of frozen weights nothing is kept for the backward pass; names, shapes
and initial values are SAT's. DoRA scales the outputs of that, see `sgm.weights.lora.dora`;
LoKr has other matrices, see `sgm.weights.lora.lokr`.

Legend: ``r`` rank, ``P`` parts of the output; tokens are (B, S, D).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.autograd.function import once_differentiable

import sgm.distributed
from sgm.config.values import Share
from sgm.modules.compiled_ops import apply_linear
from sgm.util import prepare_import
from sgm.weights.adapters import Kind, initial_matrix, scale_numerator
from sgm.weights.lora.dora import gains, parts_of, plain_weight, row_norms
from sgm.weights.lora.lokr import KINDS, product, shapes_of
from sgm.weights.lora.merging import in_order
from sgm.weights.lora.names import GROUPS, IN_LAYERS, MODULATION, projection_of
from sgm.weights.partition import UNSHARDED

prepare_import()

from sat.model.finetune.lora2 import LoraLinear, LoraMixin, replace_linear_with_lora  # noqa: E402
from sat.mpu.layers import RowParallelLinear  # noqa: E402

_TOKENS = 1024  # hashed at a time: eight bytes for each of their inputs, several times


@dataclass
class Dropout:
    """What the dropout of all adapters of a network depends on: elements of samples, not batches or ranks.

    Attributes:
        seeds: (B,) int64, of the samples; None draws from the generator of the process.
        positions: (S,) int64, of this rank's tokens in their sample.
        adapters: layers of the network.
    """

    seeds: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    adapters: list["Adapter"] = field(default_factory=list)

    def use_positions(self, positions: torch.Tensor) -> None:
        """Set the positions, before each forward pass."""
        if self.positions is None:  # not when the layers are built, on the meta device
            for number, adapter in enumerate(self.adapters):
                adapter.number = torch.tensor(number)
        self.positions = positions

    def keeps(self, layer: torch.Tensor, p: float, channels: torch.Tensor, num_channels: int) -> torch.Tensor:
        """Return which inputs (B, S, D) of a layer are kept.

        Args:
            layer: number of the layer.
            p: probability of zero.
            channels: (D,) int64, of this rank.
            num_channels: of all ranks.
        """
        assert self.seeds is not None and self.positions is not None, "the network has set both"
        starts = _mixed(_mixed(self.seeds) + layer)[:, None, None]
        kept = [
            _mixed(_mixed(tokens[:, None] * num_channels + channels) + starts) >= round(p * 2**32)
            for tokens in self.positions.split(_TOKENS)
        ]
        return torch.cat(kept, 1)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Hash int64 to 32 bits: with products below 2⁶³, the same on every device."""
    for _ in range(2):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * 0x45D9F3B
    x = x & 0xFFFFFFFF
    return x ^ (x >> 16)


class AdapterMixin(LoraMixin):
    """SAT's mixin, also for other projections than those of attention.

    Args:
        layer_num: layers of the network.
        r: rank.
        lora_alpha: numerator of the scale.
        lora_dropout: probability of zero, of inputs of the adapters of attention.
        layer_range: layers with adapters; None for all.
        qlora: store frozen weights in four bits, see `sgm.weights.quantize`.
        cross_attention: adapt that of decoders, which these networks have not.
        targets: what has adapters: the keys of `sgm.weights.lora.names.GROUPS`.
        rank_stabilized: scale by alpha / √r, not alpha / r (rsLoRA, Kalajdzievski 2023).
        kind: ``dora`` trains a magnitude for each output too (DoRA, Liu et al. 2024); ``lokr`` a Kronecker product in
            the place of B·A (LoKr, Yeh et al. 2024).
        factor: of LoKr, see `sgm.weights.lora.lokr.factors_of`.
    """

    def __init__(
        self,
        layer_num: int,
        r: Annotated[float, Field(ge=0, le=1_000_000)] = 0,
        lora_alpha: Annotated[float, Field(ge=1e-6, le=1e6)] = 1,
        lora_dropout: Share = 0.0,
        layer_range: Sequence[Annotated[int, Field(le=1000)]] | None = None,
        qlora: bool = False,
        cross_attention: bool = True,
        targets: Sequence[Literal["attention", "ff", "adaln", "patch", "text"]] = ("attention",),
        rank_stabilized: bool = False,
        kind: Kind = "lora",
        factor: Annotated[int, Field(ge=-1, le=1_000_000)] = -1,
    ) -> None:
        alpha: Any = scale_numerator({"r": r, "lora_alpha": lora_alpha, "rank_stabilized": rank_stabilized})
        super().__init__(layer_num, int(r), alpha, lora_dropout, layer_range, qlora, cross_attention)
        self.targets, self.kind, self.factor = tuple(targets), kind, factor

    def reinit(self, parent_model: Any = None) -> None:
        """Put adapters into the network."""
        if "attention" in self.targets:
            super().reinit(parent_model)
        for group in (group for group in GROUPS if group in self.targets and group != "attention"):
            for layer in self.layer_range if group in IN_LAYERS else (None,):
                for projection, parts in GROUPS[group].items():
                    self._adapt(parent_model, projection.format(layer), len(parts), projection == MODULATION)
        for module in [each for each in parent_model.modules() if isinstance(each, LoraLinear)]:
            if self.kind == "dora":
                _add_magnitudes(module)
            elif self.kind == "lokr":
                _use_kronecker(module, self.factor)

    def _adapt(self, network: nn.Module, name: str, parts: int, modulates: bool) -> None:
        owner, _, leaf = name.rpartition(".")
        parent = network.get_submodule(owner)
        linear: Any = parent.get_submodule(leaf)
        adapter: Any = replace_linear_with_lora(linear, parts, self.r, self.lora_alpha, self.lora_dropout)
        adapter.modulates = modulates
        setattr(parent, leaf, adapter)


def _add_magnitudes(adapter: Any) -> None:
    """Add the magnitudes of DoRA to a layer; those of loaded weights are set when they are loaded."""
    rows = parts_of(adapter.original.weight, len(adapter.matrix_B), modulates=getattr(adapter, "modulates", False))
    dtype = adapter.matrix_B[0].dtype
    adapter.magnitude = nn.ParameterList([nn.Parameter(row_norms(own).to(dtype)) for own in rows])
    adapter.is_dora = True


def _use_kronecker(adapter: Any, factor: int) -> None:
    """Put the matrices of LoKr in the place of those of LoRA."""
    num, original = adapter.partition, adapter.original
    outputs, inputs = original.weight.shape[0] // num, original.weight[0].numel()
    for kind, shape in shapes_of(outputs, inputs, adapter.r, factor).items():
        name = f"projection.{kind}.0"
        matrices = [initial_matrix(name, shape, UNSHARDED).to(original.weight) for _ in range(num)]
        setattr(adapter, kind, nn.ParameterList(map(nn.Parameter, matrices)))
    del adapter.matrix_A, adapter.matrix_B
    adapter.is_lokr = True


class Adapter(LoraLinear):
    """SAT's layer with another forward pass, and a factor for each row of A.

    Attributes:
        is_dora: whether it has magnitudes.
        magnitude: one vector for each part.
        is_lokr: whether it has the matrices of LoKr, and none of LoRA.
        modulates: whether it is the modulation of a block, of which each pair adapts every other part.
        dropout: of all layers.
        number: of this layer; a tensor, so that all blocks are compiled as one.
        factors: (P·r,), of LoKr (1,); None: all are 1.
        shares: h (D_out,), of which h·W·x is added too: of DoRA that was put into LoRA, see `sgm.weights.lora.several`.
        is_off: all factors are 0.
    """

    dropout: Dropout
    number: torch.Tensor
    factors: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    magnitude: nn.ParameterList
    is_dora = is_lokr = False
    is_off = False
    modulates = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        out = apply_linear(self.original, x)
        if self.is_off:
            return out
        if self.is_lokr:
            return self._with_kronecker(out, self._dropped(x))
        if self.shares is not None:
            out = out + self.shares.to(out.dtype) * self._without_bias(out)
        low = F.linear(self._dropped(x), torch.cat(tuple(self.matrix_A)))
        if (group := sgm.distributed.layer_groups()) is not None:  # shards: inputs are shared, or outputs are summed
            is_row = isinstance(self.original, RowParallelLinear)
            low = (group.reduce_from_model_parallel_region if is_row else group.copy_to_model_parallel_region)(low)
        if self.factors is not None:
            low = (low * self.factors).to(low.dtype)  # the product in float32
        if torch.compiler.is_compiling() or self.modulates:
            parts = zip(low.chunk(len(self.matrix_B), -1), self.matrix_B, strict=True)
            products = [F.linear(part, matrix) for part, matrix in parts]
            out = out + self.scaling * (in_order(products, -1) if self.modulates else torch.cat(products, -1))
        else:
            out = _AddProducts.apply(out, low, self.scaling, *self.matrix_B)
        if not self.is_dora:
            return out
        return out + (self._gains() - 1).to(out.dtype) * self._without_bias(out)

    def _with_kronecker(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        lists: list[nn.ParameterList] = [getattr(self, kind) for kind in KINDS if kind in self._modules]
        products = [product(x, *matrices) for matrices in zip(*lists, strict=True)]
        change = in_order(products, -1) if self.modulates else torch.cat(products, -1)
        if self.factors is not None:
            change = (change * self.factors).to(change.dtype)  # the product in float32
        return out + self.scaling * change

    def _without_bias(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.original.bias is None else out - self.original.bias

    def _gains(self) -> torch.Tensor:
        """Return g (D_out,) of DoRA, float32."""
        rows = parts_of(plain_weight(self.original), len(self.magnitude), modulates=self.modulates)
        own = zip(self.magnitude, rows, self.matrix_A, self.matrix_B, strict=True)
        found = [gains(m, row_norms(weight, a, b, self.scaling)) for m, weight, a, b in own]
        return in_order(found) if self.modulates else torch.cat(found)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not isinstance(self.lora_dropout, nn.Dropout) or self.dropout.seeds is None:
            return self.lora_dropout(x)
        first, num_channels = 0, x.shape[-1]
        if sgm.distributed.layer_groups() is not None and isinstance(self.original, RowParallelLinear):
            first = num_channels * sgm.distributed.tensor_parallel_rank()
            num_channels *= sgm.distributed.tensor_parallel_size()
        channels = torch.arange(first, first + x.shape[-1], device=x.device)
        p = self.lora_dropout.p
        keeps = self.dropout.keeps(self.number, p, channels, num_channels)
        return torch.where(keeps, x * (1 / (1 - p) if p < 1 else 0), 0)


def use_adapters(network: nn.Module) -> Dropout:
    """Let the LoRA layers of SAT in a network be `Adapter`; return what their dropout depends on."""
    dropout = Dropout()
    for module in network.modules():
        if type(module) is LoraLinear:
            module.__class__ = Adapter
            adapter: Any = module
            adapter.dropout = dropout
            dropout.adapters.append(adapter)
    return dropout


def adapters_of(network: nn.Module) -> list[tuple[str, Adapter]]:
    """Return the adapted layers of a network and their names."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, Adapter)]


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """Context in which a network is that without its adapters."""
    adapters = [adapter for _, adapter in adapters_of(network)]
    before = [adapter.is_off for adapter in adapters]
    for adapter in adapters:
        adapter.is_off = True
    try:
        yield
    finally:
        for adapter, is_off in zip(adapters, before, strict=True):
            adapter.is_off = is_off


def scale_adapters(
    network: Any,
    layers: Sequence[int | None],
    factors: torch.Tensor,
    device: torch.device,
    shares: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Multiply what each row of A adds, in inference: Σ fₖ·bₖ·aₖᵀ for the columns b of B and the rows a of A.

    Args:
        network: with adapters.
        layers: that have them; None for those outside of the layers.
        factors: (number of layers, r) on the CPU.
        device: on which the network runs.
        shares: h of projections, see `Adapter`.
    """
    off = (factors == 0).all(dim=1).tolist()
    given = None if bool((factors == 1).all()) else factors.to(device)
    rows = {layer: row for row, layer in enumerate(layers)}
    for name, adapter in adapters_of(network):
        row = rows[projection_of(name)[0]]
        adapter.is_off = off[row]
        if given is None or adapter.is_lokr:
            adapter.factors = None if given is None else given[row][:1]
        else:
            adapter.factors = given[row].repeat(len(adapter.matrix_B))
        own = (shares or {}).get(name)
        adapter.shares = None if own is None else own.to(device)


class _AddProducts(torch.autograd.Function):
    """out + scaling·low·Bᵀ, part by part; `out` is overwritten, and so must be the result of a linear layer."""

    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, low: torch.Tensor, scaling: float, *matrices: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(low, *matrices)
        ctx.scaling = scaling
        # Not marked as overwritten: layers return views, whose gradients torch would copy. An alias shares the
        # version of `out`, so that torch notices if somebody has saved it.
        out = out.detach()
        for rows, (part, matrix) in zip(_parts(out, matrices), _with_rank(low, matrices), strict=True):
            rows.addmm_(part, matrix.T, alpha=scaling)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        low, *matrices = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_low, grad_matrices = [], []
        for rows, (part, matrix) in zip(_parts(grad, matrices), _with_rank(low, matrices), strict=True):
            grad_low.append(rows @ (matrix * ctx.scaling))
            grad_matrices.append((rows.T @ part).mul_(ctx.scaling))
        return grad, torch.cat(grad_low, -1).view_as(low), None, *grad_matrices


def _parts(out: torch.Tensor, matrices: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return views (B·S, of a part) of outputs."""
    return out.view(-1, out.shape[-1]).split([len(matrix) for matrix in matrices], -1)


def _with_rank(low: torch.Tensor, matrices: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield views (B·S, r) of A·x, each with its matrix B."""
    return zip(low.reshape(-1, low.shape[-1]).chunk(len(matrices), -1), matrices, strict=True)
