"""The configuration of a run: YAML files merged, typed and checked."""
