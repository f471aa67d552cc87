"""The model YAML for a model that comes from diffusers, made from a shipped one."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sgm.conversion.diffusers_config import discretization_params, network_params, vae_params
from sgm.modules.geometry import Geometry
from sgm.util import default

_TEMPLATE = Path(__file__).parents[2] / "configs" / "cogvideox_5b.yaml"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What diffusers says of a model: the JSON of its parts, None where there is none.

    Attributes:
        transformer: ``transformer/config.json``.
        vae: ``vae/config.json``.
        scheduler: ``scheduler/scheduler_config.json``.
    """

    transformer: Mapping[str, Any] | None = None
    vae: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None


def model_yaml(described: Description) -> dict[str, Any]:
    """Return the content of a model YAML: that of 5B, with everything that the parts say otherwise.

    Raises:
        InputError: a part is no CogVideoX, or has something that this project does not have.
    """
    content: dict[str, Any] = yaml.safe_load(_TEMPLATE.read_text(encoding="utf-8"))
    content = copy.deepcopy(content)  # the anchors of the file are one object
    args, model = content["args"], content["model"]
    if described.vae is not None:
        shared = vae_params(described.vae)
        for part in ("encoder_config", "decoder_config"):
            model["first_stage_config"]["params"][part]["params"] = dict(shared)
        model["scale_factor"] = described.vae.get("scaling_factor", 1.15258426)
    if described.scheduler is not None:
        params = discretization_params(described.scheduler)
        for section in (
            model["denoiser_config"]["params"],
            model["loss_fn_config"]["params"]["sigma_sampler_config"]["params"],
            model["sampler_config"]["params"],
        ):
            section["discretization_config"]["params"] = dict(params)
    if described.transformer is not None:
        _set_network(args, model, described)
    return content


def _set_network(args: dict[str, Any], model: dict[str, Any], described: Description) -> None:
    params = network_params(default(described.transformer, {}))
    geometry = Geometry.from_network(params)
    model["network_config"]["params"] = params
    length = params["modules"]["pos_embed_config"]["params"]["text_length"]
    model["conditioner_config"]["params"]["emb_models"][0]["params"]["max_length"] = length
    padded = geometry.padded_latents(geometry.max_latents)
    args["sampling_num_frames"] = padded
    args["latent_channels"] = params["out_channels"]
    args["sampling_image_size"] = list(geometry.default_size())
    args["sampling_fps"] = 16 if geometry.patch_size[0] > 1 else 8
    args["image2video"] = geometry.image_conditioned
    if geometry.image_conditioned:
        scales = not (described.vae or {}).get("invert_scale_latents", geometry.patch_size[0] > 1)
        model |= {"noised_image_input": True, "noised_image_dropout": 0.05, "scale_image_latents": scales}
        if geometry.patch_size[0] > 1:
            args["sampling_image_size"] = None  # the shape of the image
    if params.get("ofs_embed_dim"):
        model["ofs"] = 2.0
