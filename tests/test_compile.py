"""Eager and compiled updates are the same updates (needs a torch that compiles them whole)."""

import importlib

import pytest
import torch
from short_runs import SCRIPTS
from stand_in import PlainRun

DEFAULT = ("td3_bc", "fisher_brc", "arq")  # of one, two and five phases; all files with --soak
NAMES = [
    x.stem if x.stem in DEFAULT else pytest.param(x.stem, marks=pytest.mark.soak) for x in SCRIPTS
]


class TenSteps(PlainRun):
    """Ten steps of every phase, past any warm start, each phase from the same seed; of a pass over
    the data, which compiles nothing, the first step."""

    def loop(self, steps, phase="train"):
        super().loop(steps, phase)
        torch.manual_seed(1)
        if 0 < steps < 20:
            return range(1, 2)
        return range(steps // 2 + 1, steps // 2 + 11)


def run(name, compile, data):
    """{"phase metric": ten values} of the file's own `train`."""
    module, ten = importlib.import_module(name), TenSteps()
    torch.manual_seed(0)
    module.train(ten, data, module.Args(batch_size=64, compile=compile))
    return {
        f"{phase} {key}": [row[key] for row in rows if key in row]
        for phase, rows in ten.phases.items()
        for key in dict.fromkeys(key for row in rows for key in row)
    }


@pytest.mark.parametrize("name", NAMES)
def test_compiled_updates_equal_eager_ones(name, tiny_data):
    eager, compiled = (run(name, compile, tiny_data(5, 2, 500)) for compile in (False, True))
    assert eager.keys() == compiled.keys() and eager
    for key, values in eager.items():
        torch.testing.assert_close(
            torch.tensor(compiled[key]), torch.tensor(values), rtol=1e-4, atol=1e-4, msg=key
        )
