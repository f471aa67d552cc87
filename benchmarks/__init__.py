"""Side-by-side timing against diffusers; see docs/benchmarks.md."""
