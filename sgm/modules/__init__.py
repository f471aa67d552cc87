"""Building blocks that YAML names; ``sgm.modules.GeneralConditioner`` is one of the pinned targets."""

from sgm.modules.encoders.modules import GeneralConditioner

__all__ = ["GeneralConditioner"]
