"""What every rank imports (see ranks.py)."""

import torch

from vlm_dist.train import pretrain  # noqa: F401
from vlm_dist.train.engine import import_deepspeed

import_deepspeed(torch.device("cpu"))
