"""BC's golden numbers; bc.md says how they were computed and how the inputs are drawn."""

import bc
import numpy as np
import torch

from common import Data
from golden.replay import Replay
from golden.tools import draw_network, in_float64, load_network

REFERENCE = "CORL 6afec90, any_percent_bc.py; --gaussian by OGBench 1d41409, gcbc.py"
TOLERANCE = 1e-10
COMPARED = "ten updates, five settings"

OBS, ACT = 11, 3


def draw_data(rng, case):
    """All rows of a case; an episode ends at each terminal row and at the last row."""
    rows = case["rows"]
    s = case["obs_mean"] + case["obs_std"] * rng.standard_normal((rows, OBS))
    a = np.clip(case["action_factor"] * np.tanh(rng.standard_normal((rows, ACT))), -1, 1)
    r = rng.standard_normal(rows)
    terminal = (rng.random(rows) < 0.02).astype(float)
    terminal[-1] = 1
    episode = torch.tensor(np.cumsum(terminal) - terminal).long()
    return Data(*map(torch.tensor, (s, a, r, s, terminal)), episode=episode)


def replay(case):
    """The run of a case, all drawn in the order of bc.md and trained."""
    rng = np.random.default_rng(case["seed"])
    actor = draw_network(rng, (OBS, 256, 256, ACT))
    actor[-1] = [case["last_layer_factor"] * x for x in actor[-1]]
    data = draw_data(rng, case)

    @torch.no_grad()
    def load(nets):
        load_network(nets.actor, actor)
        nets.log_std.copy_(torch.tensor(case.get("log_std_start", [0.0] * ACT)))

    run = Replay(case, data, load)
    with in_float64():
        bc.train(run, data, bc.Args(batch_size=case["batch"], **case["settings"]))
    return run


def values(record):
    for label, case in record["cases"].items():
        run = replay(case)
        yield from run.compare(label)
        yield f"{label}, rows that are cloned", len(run.data.obs), case["rows_cloned"]
