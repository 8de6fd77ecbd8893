"""What every rank imports (see ranks.py)."""

from importlib import import_module

import torch

from vlm_dist.train import pretrain  # noqa: F401
from vlm_dist.train.engine import import_deepspeed

import_deepspeed(torch.device("cpu"))
# The first engine of a process imports this to see what its optimizer is not, and with it torch's compiler.
import_module("deepspeed.runtime.zero.muon.muon_optimizer")
