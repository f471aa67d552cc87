"""The causal 3D video autoencoder."""
