"""The step time of a training run on many devices, modelled before anything is there."""
