"""Trains UP-Person for text-based person retrieval.

python train.py                                                the embedded data set and model, no network
python train.py --preset cuhk-pedes --data-root DIR            a real data set with CLIP ViT-B/16
python train.py --resume runs/embedded-1                       continues a run that was stopped
python train.py --help                                         every option
"""

import sys

from kernels.tiles import TilesError
from upperson.checkpoint import CheckpointError
from upperson.config import parse_arguments
from upperson.data import DataError
from upperson.model import BackboneError
from upperson.run_folder import RunError
from upperson.training import fit


def main() -> int:
    config = parse_arguments()
    try:
        fit(config)
    except (BackboneError, CheckpointError, DataError, RunError, TilesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        print(str(interruption) or "stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
