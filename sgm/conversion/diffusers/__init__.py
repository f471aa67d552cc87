"""Models between the SAT layout and pipeline folders of diffusers."""
