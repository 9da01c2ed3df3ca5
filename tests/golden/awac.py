"""AWAC's golden numbers; awac.md says how they were computed and how the inputs are drawn."""

import awac
import numpy as np
import torch

from common import Data
from golden.replay import Replay
from golden.tools import draw_network, in_float64, load_network

REFERENCE = "CORL 6afec90, awac.py, on networks of our shape"
TOLERANCE = 1e-9
COMPARED = "ten updates, five settings"

OBS, ACT = 11, 3


def draw_batch(rng, B):
    """s, a, r, s2, terminal of one update, and the noise of its next action and its baseline."""
    s = rng.standard_normal((B, OBS))
    a = np.tanh(rng.standard_normal((B, ACT)))
    r = 1 + 0.5 * rng.standard_normal(B)
    s2 = s + 0.1 * rng.standard_normal((B, OBS))
    terminal = (rng.random(B) < 0.05).astype(float)
    z_next = rng.standard_normal((B, ACT))
    z_pi = rng.standard_normal((B, ACT))
    return s, a, r, s2, terminal, z_next, z_pi


def replay(case):
    """The run of a case, all drawn in the order of awac.md and trained."""
    rng = np.random.default_rng(case["seed"])
    actor = draw_network(rng, (OBS, 256, 256, ACT))
    log_std = rng.uniform(-1, 0, ACT)
    log_std = np.array(case.get("log_std_start", log_std))
    q = draw_network(rng, (OBS + ACT, 256, 256, 1), members=2)
    q_target = draw_network(rng, (OBS + ACT, 256, 256, 1), members=2)
    batches = [draw_batch(rng, case["batch"]) for _ in range(case["updates"])]
    *rows, z_next, z_pi = (torch.tensor(np.concatenate(x)) for x in zip(*batches))
    data = Data(*rows)

    @torch.no_grad()
    def load(nets):
        load_network(nets.actor, actor)
        nets.log_std.copy_(torch.tensor(log_std))
        for net, drawn in ((nets.q, q), (nets.q_target, q_target)):
            load_network(net, drawn)
            net.weights[-1].mul_(case.get("last_layer_factor", 1.0))
            net.biases[-1].mul_(case.get("last_layer_factor", 1.0))

    run = Replay(case, data, load, {"z_next": z_next, "z_pi": z_pi})
    args = awac.Args(batch_size=case["batch"], normalize_obs=False, **case["settings"])
    with in_float64():
        awac.train(run, data, args)
    return run


def values(record):
    for label, case in record["cases"].items():
        run = replay(case)
        yield from run.compare(label)
        yield f"{label}, terminals", run.data.terminal.sum(), case["terminals"]
