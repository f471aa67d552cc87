"""Model YAMLs made from configurations of diffusers."""

import diffusers
import pytest
import torch

from sgm.conversion.diffusers.config import model_yaml, vae_params
from sgm.util import InputError, instantiate_from_config

DDIM = {
    "_class_name": "CogVideoXDDIMScheduler",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "trained_betas": None,
    "timestep_spacing": "trailing",
}


@pytest.mark.parametrize(
    ("config", "shift", "num"),
    [
        (DDIM, 3.0, 1000),
        (DDIM | {"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 1.0}, 1.0, 1000),
        (DDIM | {"num_train_timesteps": 500, "timestep_spacing": "linspace"}, 3.0, 500),
    ],
)
def test_the_noise_levels_are_those_of_the_scheduler(config, shift, num):
    model = model_yaml({"scheduler": config})["model"]
    denoiser = instantiate_from_config(model["denoiser_config"])
    for section in (denoiser, instantiate_from_config(model["loss_fn_config"]).sigma_sampler):
        assert len(section.table.on(torch.device("cpu"))) == num
    cls = getattr(diffusers, config["_class_name"])
    roots = cls.from_config(config).alphas_cumprod.double().sqrt()
    assert denoiser.table.on(torch.device("cpu")).tolist() == pytest.approx(roots.tolist(), abs=1e-5)
    params = model["sampler_config"]["params"]["discretization_config"]["params"]
    assert (params["shift_scale"], params.get("num_timesteps", 1000)) == (shift, num)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "describes a FlowMatchEulerDiscreteSched"),
        ({"_class_name": None}, "describes a model without _class_name, not a CogVideoXDDIMScheduler or CogVideoXDPM"),
        ({"trained_betas": [0.1, 0.2]}, r"has trained_betas=\[0.1, 0.2\], and this project's has null"),
        ({"prediction_type": None}, "prediction_type=null, and this project's has 'v_prediction'"),
        ({"rescale_betas_zero_snr": False}, "rescale_betas_zero_snr=false"),
        ({"beta_schedule": "linear"}, "beta_schedule='linear'"),
        ({"beta_start": 2.0}, "scheduler_config.json: beta_start is 2.0; give a number above 0 and below 1"),
        ({"beta_start": 0.5}, "beta_start is above beta_end"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ],
)
def test_a_scheduler_of_other_noise_levels_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        model_yaml({"scheduler": DDIM | change})


@pytest.mark.parametrize(
    ("part", "config", "message"),
    [
        ("scheduler", {}, "model without _class_name"),
        ("scheduler", {"_class_name": "CogVideoXDDIMScheduler"}, "prediction_type='epsilon'"),
        ("transformer", {}, "model without _class_name"),
        ("vae", {}, "model without _class_name"),
    ],
)
def test_a_configuration_without_values_is_refused(part, config, message):
    with pytest.raises(InputError, match=message):
        model_yaml({part: config})


@pytest.mark.parametrize(
    ("ratio", "times"), [(4.0, None), (8, 8), (8.0, 8), (1.5, "temporal_compression_ratio is 1.5")]
)
def test_the_compression_over_time_is_whole(ratio, times):
    config = {"_class_name": "AutoencoderKLCogVideoX", "block_out_channels": [32, 64], "latent_channels": 16}
    config |= {"layers_per_block": 1, "temporal_compression_ratio": ratio}
    if isinstance(times, str):
        with pytest.raises(InputError, match=times):
            vae_params(config, "config.json")
    else:
        assert vae_params(config, "config.json").get("temporal_compress_times") == times
