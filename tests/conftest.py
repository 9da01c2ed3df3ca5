"""Tests import the files of the repository as they lie, on one torch thread."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
torch.set_num_threads(1)
