"""Generate and compile the code of a compiled block for a GPU of compute capability 9.0, without one.

    python -m benchmarks.accelerator_code

The block of the 5B is traced at its released size with both branches of guidance, lowered by torch's compiler as if its
tensors were on a GPU, and every kernel is compiled to machine code by triton; nothing is run. Counted are the kernels
beside matrix products and attention. torch has no interface for this: the process pretends that there is a device, so
it does nothing else afterwards.
"""

import ast
import linecache
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from benchmarks.models import network_section
from sgm.checks.meta_run import DEVICE, build
from sgm.modules.block import transformer_block
from vae_modules.autoencoder import DECODE_CHUNK, PIECE_FRAMES
from vae_modules.compiled_norms import modulated_planes, row_moments
from vae_modules.layers import NORM_GROUPS

CAPABILITY = (9, 0)
_TARGET = torch.device("cuda", 0)
# Of an H100, as far as code depends on them.
_PROPERTIES = SimpleNamespace(
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    name="without a device",
    multi_processor_count=132,
    total_memory=80 * 2**30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
)
_OF_DEVICE: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "is_initialized": lambda: True,
    "get_device_properties": lambda *_: _PROPERTIES,
    "get_device_capability": lambda *_: CAPABILITY,
    "is_bf16_supported": lambda *_, **__: True,
    "set_device": lambda *_: None,
    "synchronize": lambda *_: None,
    "_lazy_init": lambda: None,
    "_exchange_device": lambda *_: 0,
    "_maybe_exchange_device": lambda *_: 0,
}


def _pretend() -> None:
    """Let torch's compiler and triton believe that there is a device; before anything of them is imported."""
    for name, value in _OF_DEVICE.items():
        setattr(torch.cuda, name, value)
    from torch._dynamo import device_interface  # lazy: keeps what torch.cuda has when it is imported
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    device_interface.CudaInterface.get_raw_stream = staticmethod(lambda *_: 0)
    for owner in (device_interface.CudaInterface, device_interface.CudaInterface.Worker):
        for name in _OF_DEVICE.keys() & vars(owner).keys():
            setattr(owner, name, staticmethod(_OF_DEVICE[name]))
    found = {
        "get_current_target": lambda: GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32),
        "get_current_device": lambda: 0,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_active_torch_device": lambda: _TARGET,
    }
    driver.set_active(SimpleNamespace(**found))  # pyright: ignore[reportArgumentType] (what is asked of it here)


def _inputs_of_a_block(model: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return tokens and further arguments of the first block, on the meta device in bfloat16."""
    section = network_section(model)
    section["params"]["num_layers"] = 2
    network = build(section).to(torch.bfloat16)
    found = []

    def block(x: torch.Tensor, **given: Any) -> torch.Tensor:
        found.append((x, given))
        return x if given["keeps_text"] else x[:, given["hook_args"]["num_text"] :]

    network.get_mixin("adaln_layer").block = block
    network.attention = _attention
    length, width = network.get_mixin("pos_embed").text_length, network.get_mixin("patch_embed").text_proj.in_features
    x = torch.empty(2, 13, network.in_channels, 60, 90, dtype=torch.bfloat16, device=DEVICE)
    context = torch.empty(2, length, width, dtype=torch.bfloat16, device=DEVICE)
    with torch.no_grad():
        network(x, torch.tensor([500], device=DEVICE).expand(2), context)
    return found[0]


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    parts = (part.transpose(1, 2) for part in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(*parts)[0].transpose(1, 2)


def block_code(model: str = "cogvideox_5b") -> str:
    """Return the code that torch's compiler generates for a block's forward pass in sampling."""
    x, given = _inputs_of_a_block(model)
    hook_args = given.pop("hook_args")
    holder = torch.nn.ModuleList([given["layer"], given["modulation"], *given["norms"]])
    names = [name for name, _ in holder.named_parameters()]

    def run(x: torch.Tensor, silu_emb: torch.Tensor, rotation: Any, *weights: torch.Tensor) -> torch.Tensor:
        # Traced as torch.compile would: the block takes the forms for compilers.
        changed = hook_args | {"emb": None, "silu_emb": silu_emb, "rotation": rotation, "context": None}
        holder.forward = lambda: transformer_block(x, hook_args=changed, **given)
        compiles = mock.patch("torch.compiler.is_compiling", lambda: True)
        with compiles, mock.patch("sgm.modules.compiled_ops.compiles_for_cpu", lambda _: False):
            return torch.func.functional_call(holder, dict(zip(names, weights, strict=True)), ())

    weights = [parameter.detach() for parameter in holder.parameters()]
    return _generated(run, (x, hook_args["silu_emb"], tuple(hook_args["rotation"]), *weights))


def norm_code() -> tuple[str, str]:
    """Return the code of the VAE's last norm at 480×720: that of its statistics, and that of all that follows them."""
    planes = torch.empty(128 * PIECE_FRAMES, 480, 720, dtype=torch.bfloat16, device=DEVICE)
    factor = torch.empty(len(planes), device=DEVICE)
    of_latents = torch.empty(128 * DECODE_CHUNK, 60, 720, dtype=torch.bfloat16, device=DEVICE)
    statistics = _generated(row_moments, (planes.view(NORM_GROUPS, -1),))
    numbers = factor.to(torch.long)
    return statistics, _generated(modulated_planes, (planes, factor, factor, of_latents, of_latents, numbers))


def _generated(run: Callable[..., torch.Tensor], args: tuple[Any, ...]) -> str:
    """Return the code that torch's compiler generates for a function of tensors of these shapes."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    def moved(value: Any) -> Any:
        """A fake tensor of the CPU → one of the target: torch without CUDA cannot trace on it."""
        if not isinstance(value, FakeTensor):
            return value
        return FakeTensor(
            mode, torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta"), _TARGET
        )

    args = tree_map(fake, args)
    with torch.no_grad(), mode:
        graph = make_fx(run, decomposition_table=select_decomp_table())(*args)
    with V.set_fake_mode(mode), torch.no_grad(), V.set_debug_handler(DebugContext()):
        _recursive_post_grad_passes(graph, is_inference=True)
        for node in graph.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = tree_map(moved, node.meta["val"])
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": _TARGET}
        flat = [moved(value) for value in torch.utils._pytree.tree_leaves(args)]
        lowering = GraphLowering(graph, example_inputs=flat, is_inference=True)
        with V.set_graph_handler(lowering):
            lowering.run(*flat)
            return lowering.codegen()[0].value


_KERNEL = re.compile(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", re.MULTILINE | re.DOTALL)


def compiled_sizes(code: str) -> dict[str, int]:
    """Compile all triton kernels of generated code; return the bytes of machine code of each."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    target = GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)
    sizes = {}
    for name, source in _KERNEL.findall(code):
        function, signature = _kernel(name, source)
        blocks = {"XBLOCK": 1 if "_red_" in name else 8, "R0_BLOCK": 1024}  # of the tiles; tuned on a device
        constants = {key: blocks[key] for key, kind in signature.items() if kind == "constexpr"}
        made = compile_kernel(ASTSource(function, signature, constexprs=constants), target=target)
        sizes[name] = len(made.asm["cubin"])
    return sizes


def _kernel(name: str, source: str) -> tuple[Any, dict[str, str]]:
    """Return a kernel as triton has it, and its signature; without what chooses tiles on a device."""
    tree = ast.parse(source)
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    (found,) = re.findall(r"triton_meta=\{'signature': (\{.*?\})", source)
    function.decorator_list = [node for node in function.decorator_list if ast.unparse(node) == "triton.jit"]
    tree.body = [node for node in tree.body if not isinstance(node, ast.Expr)]  # looks for a device
    text, file, scope = ast.unparse(tree), f"<{name}>", {}
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # triton reads a function's source
    exec(compile(text, file, "exec"), scope)
    return scope[name], ast.literal_eval(found)


def main() -> int:
    """Print the kernels."""
    _pretend()
    capability = ".".join(map(str, CAPABILITY))
    code = block_code()
    products = len(re.findall(r"^\s+extern_kernels\.", code, re.MULTILINE))
    for what, codes, beside in (
        ("a block", (code,), f", beside {products} products and attention"),
        ("a norm of the VAE", norm_code(), ""),
    ):
        sizes = [size for each in codes for size in compiled_sizes(each).items()]
        for name, size in sizes:
            print(f"{name}: {size} bytes of machine code")
        print(f"{what}: {len(sizes)} kernels for capability {capability}{beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
