"""The shipped model file that weights belong to, recognised from their shapes, where none is given."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sgm.log import get_logger
from sgm.project import project
from sgm.util import InputError
from sgm.weights.adapters import find_base, read_adapter_info
from sgm.weights.architecture import PATCH_WEIGHT, describe_architecture
from sgm.weights.files import PREFIX, find_weights, read_tensors
from sgm.weights.lazy import AnyTensor

logger = get_logger(__name__)

# What diffusers calls the tensors whose shapes tell the family.
_SAT_NAMES = {
    r"patch_embed\.proj\.weight": PATCH_WEIGHT,
    r"proj_out\.weight": "mixins.final_layer.linear.weight",
    r"transformer_blocks\.(\d+)\..*": r"transformer.layers.\1.any",
    r"ofs_embedding\..*": "ofs_embed.any",
}


def base_files(
    given: Sequence[str], load: str | None, *, base: str | None = None, option: str = "--transformer_ckpt_path"
) -> list[str]:
    """Return the YAML files of a model: those given, or the one that the weights at `load` belong to.

    Args:
        given: by ``--base``.
        load: weights in the SAT layout, as for `sgm.weights.files.find_weights`; adapters alone name their base.
        base: ``args.base``, the base of adapters alone in the place of the one that they name.
        option: that gives `load`, for messages.

    Raises:
        InputError: neither is given, or the weights are those of no shipped model.
    """
    if given:
        return list(given)
    if load is None:
        raise InputError(f"which model is it? Give weights with {option}, which tell, or its YAML with --base")
    path = find_weights(load)
    path = find_base(path, base) or path
    tensors = read_tensors(path)
    file, found = shipped_file(tensors, path), describe_architecture(_shapes(tensors))
    if found is not None and found.lora_rank and read_adapter_info(path) is None:
        raise InputError(f"{path} holds adapters and no record of their alpha; {found.config_hint()}, with --base")
    return [str(file)]


def is_shipped(tensors: Mapping[str, AnyTensor]) -> bool:
    """Return whether a shipped model has the shapes of a network; see `shipped_file`."""
    found = describe_architecture(_shapes(tensors))
    return found is not None and found.config is not None


def shipped_file(tensors: Mapping[str, AnyTensor], path: str | Path) -> Path:
    """Return the shipped model file of a network's tensors, in the names of SAT or of diffusers.

    Args:
        tensors: by name, without prefix.
        path: of their file, for messages.

    Raises:
        InputError: there is none of this shape.
    """
    found = describe_architecture(_shapes(tensors))
    if found is None:
        raise InputError(f"{path} holds no network that is recognised; say what it is with --base")
    if found.config is None:
        raise InputError(f"{path} holds {found.kind()}, and no shipped model has this shape; give its YAML with --base")
    file = project() / "configs" / f"{found.config}.yaml"
    logger.info("%s is recognised as %s: --base %s", path, found.config, file)
    return file


def _shapes(tensors: Mapping[str, AnyTensor]) -> dict[str, tuple[int, ...]]:
    """Return shapes by the names of SAT."""
    shapes = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(PREFIX)
        for pattern, sat in _SAT_NAMES.items():
            if found := re.fullmatch(pattern, name):
                name = found.expand(sat)
                break
        shapes[name] = tuple(tensor.shape)
    return shapes
