"""Eager and compiled updates are the same updates (needs a torch that compiles them whole)."""

import importlib
from pathlib import Path

import pytest
import torch
import torch._dynamo

import speed

NAMES = sorted(p.stem for p in (Path(__file__).parents[1] / "algorithms").glob("*.py"))
NAMES = [  # half a minute each
    name if name in ("td3_bc", "fisher_brc") else pytest.param(name, marks=pytest.mark.soak)
    for name in NAMES
]


def run(name, compile, data):
    """Metrics of ten steps of every phase of the file's own `train`."""
    module, found = importlib.import_module(name), {}

    class TenSteps(speed.Stopwatch):
        def loop(self, steps, phase="train"):
            self.phase = phase
            torch.manual_seed(1)
            yield from range(steps // 2 + 1, steps // 2 + 11)  # past any warm start

        def after(self, t, metrics, act=None):
            for key, value in metrics.items():
                found.setdefault(f"{self.phase} {key}", []).append(value.item())

    with pytest.MonkeyPatch.context() as patch:  # compiled noise may be drawn in another order
        patch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))
        patch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.4))
        patch.setattr(module, "Run", lambda args: TenSteps(args, 1.0))
        patch.setattr(module, "load_dataset", lambda *_: (data, None))
        module.train(module.Args(batch_size=64, device="cpu", compile=compile))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch does not trace gradients",
)
def test_compiled_updates_equal_eager_ones(name, tiny_data):
    eager, compiled = (run(name, compile, tiny_data(5, 2, 500)) for compile in (False, True))
    assert eager.keys() == compiled.keys() and eager
    for key, values in eager.items():
        torch.testing.assert_close(
            torch.tensor(compiled[key]), torch.tensor(values), rtol=1e-4, atol=1e-4, msg=key
        )
