"""LoRA files of this project and of other tools, one or several."""
