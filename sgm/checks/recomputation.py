"""What is recomputed in the backward pass: whether attention can be left out, and the cheapest choice that fits."""

from collections.abc import Callable

from sgm.checks.mesh import mesh_of
from sgm.checks.sampling import params_of
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, Problem
from sgm.util import default, get_obj_from_str

# Kernels of torch that return the output and the log-sum-exp, see `sgm.modules.kept_attention`.
KEPT_KERNELS = ("auto", "cudnn", "flash", "efficient")


def kept_attention_problem(config: Config) -> Problem | None:
    """Return why the output of attention cannot be kept in blocks that are recomputed, if so."""
    args, params = config.args, params_of(config.model["network_config"])
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    path, ranks = "args.keep_attention", mesh_of(config)
    kernel, cure = default(args.attention, "auto"), "set args.keep_attention=false"
    transformer, modules = params.get("transformer_args") or {}, params.get("modules") or {}
    parts = {"keep_attention": config.model["network_config"], "keeps_attention": modules.get("adaln_layer_config")}
    for name, section in parts.items():
        if section is not None and not hasattr(cls := get_obj_from_str(section["target"]), name):
            return Problem(path, "", f"is true, and {cls.__name__} has no {name}", f"{cure}, or add that")
    if not default(args.checkpoint_activations, transformer.get("checkpoint_activations", False)):
        return Problem(path, "", "is true, and no block is recomputed", "set args.checkpoint_activations as well")
    if kernel not in KEPT_KERNELS:
        found = f"is true, and the output of the attention '{kernel}' cannot be kept"
        return Problem(path, "", found, f"{cure}, or args.attention to one of {', '.join(KEPT_KERNELS)}")
    too_few = params.get("num_attention_heads", 1) // ranks.tensor < ranks.sequence
    if ranks.sequence > 1 and (args.sequence_attention == "ring" or too_few):
        found = "is true, and ring attention calls a kernel for each rank"
        return Problem(path, "", found, f"{cure}, or args.sequence_attention=ulysses")
    return None


def attention_share(tokens: int, hidden_size: int) -> float:
    """Return the share of attention in the products of a block: 4·S²·D of 4·S²·D + 24·S·D²."""
    return tokens / (tokens + 6 * hidden_size)


def cheapest(
    depth: int, room: float, peak: Callable[[int, bool], float], *, keeps: tuple[bool, ...], share: float
) -> tuple[int, bool]:
    """Return how many blocks to recompute, and whether without their attention, so that a run fits.

    With the first k of n blocks recomputed, memory falls linearly with k from 0 to n − 1.

    Args:
        depth: n.
        room: bytes on the device.
        peak: k and whether attention is kept → bytes on the device.
        keeps: choices of whether attention is kept.
        share: of attention in the time of a block.

    Returns:
        The choice that recomputes least; all blocks, and attention if that may be, if none fits.
    """
    if (most := peak(0, False)) <= room:
        return 0, keeps == (True,)
    fitting = {}
    for keep in keeps:
        if depth > 1 and (one := peak(depth - 1, keep)) <= room:
            number = depth - 1 - int((room - one) / ((most - one) / (depth - 1)))
        elif peak(depth, keep) <= room:
            number = depth
        else:
            continue
        fitting[number, keep] = number * (1 - share * keep)
    return min(fitting, key=lambda choice: fitting[choice]) if fitting else (depth, keeps == (True,))
