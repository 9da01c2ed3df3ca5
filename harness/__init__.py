"""What every run needs and no paper describes: flags, data, the loop, evaluation, a folder."""

from harness.datasets import load_dataset
from harness.run import Run, main, parse

__all__ = ["Run", "load_dataset", "main", "parse"]
