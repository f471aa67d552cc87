"""diffusers' 3D convolutions computed like ours: several times faster at the sizes of tests, see `layers.Conv3d`."""


def install() -> None:
    """Derive the convolution of diffusers' autoencoder in this process from the project's `Conv3d`."""
    from diffusers.models.autoencoders import autoencoder_kl_cogvideox as diffusers_autoencoder

    from vae_modules.convolutions import Conv3d

    diffusers_autoencoder.CogVideoXSafeConv3d.__bases__ = (Conv3d,)
