"""Building blocks named in YAML; ``sgm.modules.GeneralConditioner`` is a pinned target."""

from sgm.modules.encoders.modules import GeneralConditioner

__all__ = ["GeneralConditioner"]
