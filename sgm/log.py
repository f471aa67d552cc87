"""Logging: one logger, on rank zero; dependencies log errors only."""

import logging
import os
import sys
from collections.abc import Iterable


def get_logger(name: str = "sgm") -> logging.Logger:
    """Return the package's logger, or a child of it for a module's ``__name__``."""
    return logging.getLogger(name if name.split(".")[0] == "sgm" else f"sgm.{name}")


def is_rank_zero() -> bool:
    """Whether this process is rank zero, from the launcher's environment (true without a launcher)."""
    return os.environ.get("RANK", "0") == "0"


def warn_once(logger: logging.Logger, warnings: Iterable[str]) -> None:
    """Log warnings common to all ranks, from rank zero only."""
    if is_rank_zero():
        for warning in warnings:
            logger.warning("%s", warning)


def configure_logging(*, debug: bool = False) -> None:
    """Send the package's messages to standard error, from rank zero only, warnings from every rank.

    Dependencies that log at import (SwissArmyTransformer, DeepSpeed, missing kernels) log errors only.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s" if debug else "%(message)s"))
    logger = logging.getLogger("sgm")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if debug else logging.INFO if is_rank_zero() else logging.WARNING)
    if not debug:
        quiet_dependencies()


def quiet_dependencies() -> None:
    """Limit logs of SwissArmyTransformer, DeepSpeed and transformers to errors."""
    os.environ.setdefault("SAT_LOGLEVEL", "ERROR")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("sat", "DeepSpeed", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
