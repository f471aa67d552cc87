"""Metadata of exported files by the ModelSpec convention, and the keys of kohya's scripts for LoRA.

Other tools show a model's title, architecture and resolution from ``modelspec.*`` in the header of its file, and rank
and alpha of a LoRA from ``ss_network_*``. There is no date: the same input gives the same file.
"""

import re
from collections.abc import Mapping
from operator import index
from pathlib import Path
from typing import Any

from sgm.config.load import digest_of
from sgm.log import get_logger, warn_once
from sgm.modules.geometry import Geometry
from sgm.util import InputError
from sgm.weights.adapters import AdapterInfo
from sgm.weights.architecture import CONFIGS
from sgm.weights.files import find_weights, run_config, scaling_of
from sgm.weights.lora.names import BASE, BASE_DIGEST

logger = get_logger(__name__)

PREFIX = "modelspec."
CONFIG_DIGEST, TIME_SCALING = "training_config_digest", "training_time_scaling"
# Names that weights of any model have: of files, of iterations, and of the part of a download.
_COMMON_NAME = re.compile(r"\d+|transformer|(mp_rank|diffusion_pytorch_model|pytorch_lora_weights|adapter_model)\W?.*")
RANK, ALPHA = "ss_network_dim", "ss_network_alpha"
KEYS = (BASE, BASE_DIGEST, RANK, ALPHA, CONFIG_DIGEST, TIME_SCALING)


def default_title(path: str | Path) -> str:
    """Return the title of weights by their own name: of the run folder, the model's folder, or a file named by hand.

    It does not depend on where an export is written, so that the same weights give the same bytes.
    """
    path = Path(path).absolute()
    own = path.stem if path.suffix in (".pt", ".safetensors", ".bin") else path.name
    names = (own, *(parent.name for parent in path.parents))
    return next((name for name in names if name and not _COMMON_NAME.fullmatch(name)), "CogVideoX")


def model_metadata(model: Mapping[str, Any], *, title: str, implementation: str = "diffusers") -> dict[str, str]:
    """Return the metadata of a transformer.

    Args:
        model: the ``model`` section of its configuration.
        title: of the model.
        implementation: whose names the tensors have.
    """
    params = model["network_config"]["params"]
    return {
        f"{PREFIX}sai_model_spec": "1.0.0",
        f"{PREFIX}architecture": _architecture(params),
        f"{PREFIX}implementation": implementation,
        f"{PREFIX}title": title,
        f"{PREFIX}resolution": f"{8 * params['latent_width']}x{8 * params['latent_height']}",
        f"{PREFIX}prediction_type": "v",
    }


def lora_metadata(
    path: Path | None, *, rank: int, alpha: float, info: AdapterInfo | None, title: str, implementation: str
) -> dict[str, str]:
    """Return the metadata of a LoRA.

    Args:
        path: its weights file, None if it was not trained. In a run folder, the configuration beside it tells
            architecture, resolution and digest.
        rank: r.
        alpha: numerator of the scale.
        info: its metadata.
        title: of the LoRA.
        implementation: whose names the tensors have.
    """
    own = {f"{PREFIX}sai_model_spec": "1.0.0", f"{PREFIX}architecture": "cogvideox"}
    if path is not None:
        config, described = _of_run(find_weights(path))
        own |= described | scaling_metadata(find_weights(path), config)
    own |= {f"{PREFIX}implementation": implementation, f"{PREFIX}title": title}
    own[f"{PREFIX}architecture"] += "/lora"
    recorded = {} if info is None else {BASE: Path(info.base).name, BASE_DIGEST: info.base_digest}
    return own | recorded | {RANK: str(rank), ALPHA: f"{alpha:g}"}


def _of_run(file: Path) -> tuple[Mapping[str, Any] | None, dict[str, str]]:
    """Return the configuration of the run that saved a weights file, and what the header says of it; warn if it is odd.

    Users edit these files after the training.
    """
    try:
        config = run_config(file)
        if config is None:
            return None, {}
        own = model_metadata(config["model"], title="")
        if size := ((config.get("data") or {}).get("params") or {}).get("video_size"):
            height, width = map(index, size)
            own[f"{PREFIX}resolution"] = f"{width}x{height}"
        return config, own | {CONFIG_DIGEST: digest_of(config)}
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        path = file.absolute().parent.parent / "config.yaml"
        reason = f": {error}" if isinstance(error, InputError) else ""
        warn_once(logger, [f"{path} is no configuration of a run, and is not read{reason}"])
        return None, {}


def _architecture(params: Mapping[str, Any]) -> str:
    """Return the identifier of an architecture: the name of the model with these shapes."""
    geometry = Geometry.from_network(params)
    key = (params["hidden_size"], params["num_layers"], params["in_channels"], geometry.patch_size[0])
    name = CONFIGS.get(key, "")
    return name.replace("_", "-") if name.startswith("cogvideox") else "-".join(filter(None, ("cogvideox", name)))


def scaling_metadata(path: Path, config: Mapping[str, Any] | None) -> dict[str, str]:
    """Return what the header says of the scaled positions that a weights file was trained with, and warn of them.

    Other tools compute positions as they are.
    """
    scaling = scaling_of(config)
    if scaling is None:
        return {}
    found = f"{path} was trained with args.time_scaling={scaling}, which other tools do not compute"
    warn_once(
        logger, [f"{found}: there, clips longer than the model's num_frames have other positions than in training"]
    )
    return {TIME_SCALING: str(scaling)}
