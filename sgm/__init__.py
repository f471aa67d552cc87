"""A framework for CogVideoX video diffusion models on SwissArmyTransformer."""
