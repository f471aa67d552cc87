"""Sample videos: ``python sample_video.py --base configs/toy.yaml configs/toy_inference.yaml``."""

import sys

from sgm.inference.main import main

if __name__ == "__main__":
    sys.exit(main())
