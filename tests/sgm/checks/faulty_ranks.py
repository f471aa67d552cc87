"""Compare two ranks, of which the second has a wrong clock and slow products; for test_nodes.py.

Run on two ranks: python tests/sgm/checks/faulty_ranks.py FOLDER
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import sgm.distributed
from sgm.checks import nodes
from sgm.util import InputError


def main() -> None:
    """Print on rank zero what the check says."""
    sgm.distributed.initialize()
    if sgm.distributed.rank() == 1:
        product = torch.mm
        torch.mm = lambda *matrices: time.sleep(1) or product(*matrices)
        nodes.time = SimpleNamespace(time=lambda: time.time() + 60, perf_counter=time.perf_counter)
    try:
        nodes.check_nodes({"args.save": Path(sys.argv[1])}, {"the clips": "ab" if sgm.distributed.rank() else "cd"})
    except InputError as error:
        if sgm.distributed.rank() == 0:
            sys.stdout.write(str(error))
    sgm.distributed.shutdown()


if __name__ == "__main__":
    main()
