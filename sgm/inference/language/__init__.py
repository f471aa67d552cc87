"""Language models, and the prompts that they rewrite."""
