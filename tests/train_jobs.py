"""Run several trainings one after the other, on one rank or several: a JSON file lists their configurations.

Not a test: tests start it, since starting Python and importing torch takes longer than a tiny training.
"""

import json
import sys
from pathlib import Path

from sgm.config.load import load_config
from sgm.log import configure_logging
from sgm.training.run import train


def main() -> None:
    """Run the jobs of the file that the command line names."""
    configure_logging()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(load_config(job["bases"], job["overrides"], mode="train"))


if __name__ == "__main__":
    main()
