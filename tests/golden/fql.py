"""FQL's golden numbers; fql.md says how they were computed and how the inputs are drawn."""

import fql
import numpy as np
import torch

from common import Data
from golden.replay import Replay
from golden.tools import draw_critic, draw_network, in_float64, load_critics, load_network

REFERENCE = "the authors' fql 719d044; for --no-distill, fbrac.py of value-flows 0183335"
TOLERANCE = 1e-10
COMPARED = "ten updates, four settings"

OBS, ACT = 11, 3
METRICS = {"critic_loss": "q_loss", "q_mean": "q_mean", "bc_flow_loss": "bc_loss"}
METRICS |= {"distill_loss": "imitation", "q": "q_pi"}


class FlowReplay(Replay):
    """Also counts the numbers of actions that are beyond their bounds before they are clipped."""

    def start(self, nets, opt, **largest):
        super().start(nets, opt, **largest)
        self.clipped = {"target": 0, "actor": 0, "flow": 0}

    def loop(self, steps, phase="train"):
        for t in super().loop(steps, phase):
            self.count_clipped(self.batch(t))
            yield t

    @torch.no_grad()
    def count_clipped(self, rows):
        nets, args = self.nets, self.args
        s, s2 = self.data.obs[rows], self.data.next_obs[rows]
        z, z2 = self.noise["z"][rows], self.noise["z2"][rows]
        found = {"target": fql.act(nets, s2, z2, args), "actor": fql.act(nets, s, z, args)}
        found["flow"] = fql.flow(nets, s, z, args)
        for name, action in found.items():
            self.clipped[name] += (action.abs() >= 1).sum().item()


def draw_batch(rng, case):
    """One update's rows, and the noise of its target action, its point of the flow (and the time
    of that point) and its policy's action, in the order of fql.md."""
    B = case["batch"]
    s = rng.standard_normal((B, OBS))
    a = np.tanh(rng.standard_normal((B, ACT)))
    r = 1 + 0.5 * rng.standard_normal(B)
    s2 = s + 0.1 * rng.standard_normal((B, OBS))
    terminal = (rng.random(B) < 0.05).astype(float)
    z2, x0 = rng.standard_normal((B, ACT)), rng.standard_normal((B, ACT))
    t, z = rng.random((B, 1)), rng.standard_normal((B, ACT))
    if case.get("rewards"):
        r = terminal - 1
    return s, a, r, s2, terminal, z2, x0, t, z


def replay(case):
    """The run of a case, all drawn in the order of fql.md and trained."""
    rng = np.random.default_rng(case["seed"])
    args = fql.Args(batch_size=case["batch"], **case["settings"])
    hidden = [args.hidden] * 4
    drawn = {"velocity": draw_network(rng, (OBS + ACT + 1, *hidden, ACT))}
    if args.distill:
        drawn["actor"] = draw_network(rng, (OBS + ACT, *hidden, ACT))
    for name, layers in drawn.items():
        factor = case.get(f"{name}_factor", 1.0)
        layers[-1] = [factor * x for x in layers[-1]]
    sizes = OBS + ACT, *hidden, 1
    q = [draw_critic(rng, sizes, layer_norm=True) for _ in range(2)]
    q_target = [draw_critic(rng, sizes, layer_norm=True) for _ in range(2)]
    batches = [draw_batch(rng, case) for _ in range(case["updates"])]
    *rows, z2, x0, t, z = (torch.tensor(np.concatenate(x)) for x in zip(*batches))
    data = Data(*rows)

    def load(nets):
        for name, layers in drawn.items():
            load_network(getattr(nets, name), layers)
        load_critics(nets.q, q)
        load_critics(nets.q_target, q_target)

    run = FlowReplay(case, data, load, {"z2": z2, "x0": x0, "z": z}, {"t": t})
    run.args = args
    with in_float64():
        fql.train(run, data, args)
    return run


def values(record):
    for label, case in record["cases"].items():
        run, losses = replay(case), dict(case["losses"])
        yield from run.compare_tensors(label)
        imitation = losses["distill_loss" if run.args.distill else "bc_flow_loss"]
        improvement = losses.pop("q_loss")  # the second term of the policy's loss
        for t, row in enumerate(run.rows):
            for name, recorded in losses.items():
                yield f"{label}, {name} of update {t + 1}", row[METRICS[name]], recorded[t]
            pi_loss = run.args.alpha * imitation[t] + improvement[t]
            yield f"{label}, pi_loss of update {t + 1}", row["pi_loss"], pi_loss
        yield f"{label}, terminals", run.data.terminal.sum(), case["terminals"]
        for name, recorded in case["actions_clipped"].items():
            yield f"{label}, clipped numbers of {name}", run.clipped[name], recorded
