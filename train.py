"""Trains a method for text-based person retrieval; the same as the command `upperson train`.

python train.py                                                the embedded data set and model, no network
python train.py --preset cuhk-pedes --data-root DIR            a real data set with CLIP ViT-B/16
python train.py --check-data --dataset NAME --data-root DIR    checks a data set and does not train
python train.py --config FILE                                  values from a JSON or TOML file; flags override them
python train.py --resume runs/embedded-1                       resumes an interrupted run
python train.py --help                                         every option
torchrun --nproc-per-node 8 train.py --preset cuhk-pedes …     the same on 8 GPUs, each with a share of the batch

From Python: upperson.fit(upperson.preset("cuhk-pedes").replace(data_root=…)).
"""

import sys

from upperson.train.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
