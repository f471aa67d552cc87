"""Run several trainings sequentially, on one rank or several: a JSON file lists their configurations.

Not a test: tests start it, since starting Python and importing torch takes longer than a tiny training.
"""

import json
import sys
from pathlib import Path

import sgm.training.run
from sgm.config.load import load_config
from sgm.log import configure_logging
from sgm.training.run import train
from tests.processes import restore_linear


def leave_out_plots() -> None:
    """Replace the plot of the losses, which takes as long as several steps of a tiny training."""
    sgm.training.run.draw_curve = lambda _metrics, picture: Path(picture).touch()


def main() -> None:
    """Run the jobs of the file given on the command line."""
    configure_logging()
    leave_out_plots()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(load_config(job["bases"], job["overrides"], mode="train"))
        restore_linear()


if __name__ == "__main__":
    main()
