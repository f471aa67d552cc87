"""Fine-tune: ``python train_video.py --base configs/toy_lora.yaml configs/toy_sft.yaml``."""

import sys

from sgm.training.main import main

if __name__ == "__main__":
    sys.exit(main())
