"""IQL's golden numbers; iql.md says how they were computed and how the inputs are drawn."""

import iql
import numpy as np
import torch

from common import Data
from golden.replay import Replay
from golden.tools import draw_network, in_float64, load_network

REFERENCE = (
    "the authors' implicit_q_learning 09d7002, to 2.3e-15; computed by CORL 6afec90, iql.py, put "
    "into the authors' order; DDPG+BC by OGBench 1d41409, gciql.py"
)
TOLERANCE = 1e-9
COMPARED = "ten updates with the actor's learning rates, six settings"

OBS, ACT = 11, 3


def draw_batch(rng, case):
    """s, a, r, s2, terminal of one update."""
    B = case["batch"]
    s = rng.standard_normal((B, OBS))
    a = np.tanh(rng.standard_normal((B, ACT)))
    r = 1 + 0.5 * rng.standard_normal(B)
    s2 = s + 0.1 * rng.standard_normal((B, OBS))
    terminal = (rng.random(B) < 0.05).astype(float)
    if case.get("rewards"):
        r = terminal - 1
    return s, a, r, s2, terminal


def replay(case):
    """The run of a case, all drawn in the order of iql.md and trained."""
    rng = np.random.default_rng(case["seed"])
    actor = draw_network(rng, (OBS, 256, 256, ACT))
    log_std = rng.uniform(-1, 0, ACT)
    log_std = np.array(case.get("log_std_start", log_std))
    v = draw_network(rng, (OBS, 256, 256, 1))
    q = draw_network(rng, (OBS + ACT, 256, 256, 1), members=2)
    q_target = draw_network(rng, (OBS + ACT, 256, 256, 1), members=2)
    batches = [draw_batch(rng, case) for _ in range(case["updates"])]
    data = Data(*[torch.tensor(np.concatenate(x)) for x in zip(*batches)])

    @torch.no_grad()
    def load(nets):
        load_network(nets.actor, actor)
        nets.log_std.copy_(torch.tensor(log_std))
        for net, drawn in ((nets.v, v), (nets.q, q), (nets.q_target, q_target)):
            load_network(net, drawn)
            net.weights[-1].mul_(case.get("last_layer_factor", 1.0))
            net.biases[-1].mul_(case.get("last_layer_factor", 1.0))

    run = Replay(case, data, load)
    with in_float64():
        iql.train(run, data, iql.Args(batch_size=case["batch"], **case["settings"]))
    return run


def values(record):
    for name, case in record["cases"].items():
        run = replay(case)
        yield from run.compare(name)
        yield f"{name}, terminals", run.data.terminal.sum(), case["terminals"]
        rates = torch.tensor([rate["actor"] for rate in run.rates], dtype=torch.float64)
        yield f"{name}, actor's learning rates", rates, case["learning_rates_actor"]
