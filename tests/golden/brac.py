"""BRAC's golden numbers; brac.md says how they were computed and how the inputs are drawn."""

from contextlib import redirect_stdout
from unittest import mock

import brac
import numpy as np
import torch
from stand_in import PlainRun

from common import Data
from golden.tools import Inject, KerasAdam, draw_network, first_gradients, in_float64, load_network

REFERENCE = "the authors' brac, in D4RL-Evaluations b873efd"
TOLERANCE = 1e-10
COMPARED = "ten updates and ten steps of the clone, six settings"

OBS, ACT = 11, 3
COLUMNS = ("s", "a", "r", "s2", "terminal", "zb", "z2", "zb2", "z", "z_clone")
METRICS = {"q_loss": "q_loss", "target": "target", "p_loss": "pi_loss", "divergence": "divergence"}
METRICS |= {"alpha": "alpha"}


def draw_batch(rng, B, N):
    """One update's rows; the noise of the clone's sample, of the actions at s2 (the policy's and
    the clone's), and of those at s."""
    s = rng.standard_normal((B, OBS))
    a = np.clip(1.2 * np.tanh(rng.standard_normal((B, ACT))), -1, 1)
    r = 1 + 0.5 * rng.standard_normal(B)
    s2 = s + 0.1 * rng.standard_normal((B, OBS))
    terminal = (rng.random(B) < 0.05).astype(float)
    zb = rng.standard_normal((1, B, ACT))
    noise = [rng.standard_normal((N, B, ACT)) for _ in range(4)]
    return [torch.tensor(x) for x in (s, a, r, s2, terminal, zb, *noise)]


class Replay(PlainRun):
    """Starts both phases from the drawn networks, and keeps what it sees by phase."""

    def __init__(self, case):
        """Draws everything in the order of brac.md."""
        super().__init__(limit=case["updates"])
        rng, self.B = np.random.default_rng(case["seed"]), case["batch"]
        warm_start = case["updates"] if case["imitate"] else 0
        self.args = brac.Args(batch_size=self.B, warm_start=warm_start, **case["settings"])
        behavior, actor = (draw_network(rng, (OBS, 200, 200, 2 * ACT)) for _ in range(2))
        actor[-1] = [case["actor_factor"] * x for x in actor[-1]]
        sizes = OBS + ACT, 300, 300, 1
        q, q_target = (draw_network(rng, sizes, members=2) for _ in range(2))
        self.networks = {"behavior": behavior, "actor": actor, "q": q, "q_target": q_target}
        batches = [draw_batch(rng, self.B, self.args.samples) for _ in range(case["updates"])]
        self.batches = [dict(zip(COLUMNS, batch)) for batch in batches]
        rows = list(zip(*batches))[:5]
        self.data = Data(*map(torch.cat, rows))
        self.parameters, self.gradients, self.samples_beyond = {}, {}, 0

    def copies(self):
        return {name: p.detach().clone() for name, p in self.nets.named_parameters()}

    def loop(self, steps, phase="train"):
        for name, drawn in self.networks.items():
            load_network(getattr(self.nets, name), drawn)
        self.drawn, self.phase = self.copies(), phase
        for t in super().loop(steps, phase):
            batch = self.batches[t - 1]
            noise = [batch["zb"]] if phase == "behavior" else self.noise(batch)
            indices = torch.arange(self.B) + (t - 1) * self.B
            with Inject(randint=[indices], randn_like=noise):
                yield t

    def noise(self, batch):
        """What one update of the policy draws; counts its samples that log b clips."""
        mean, log_std = brac.gaussian(self.nets.actor, batch["s"])
        beyond = (mean + log_std.exp() * batch["z"]).tanh().abs() > 1 - 1e-3
        self.samples_beyond += beyond.sum().item()
        if self.args.divergence == "kl":
            return [batch["z2"], batch["z"]]
        return [batch[name] for name in ("z2", "zb2", "z", "z_clone")]

    def after(self, t, metrics, act=None):
        super().after(t, metrics, act)
        self.parameters[self.phase, str(t)] = self.copies()
        if t == 1:
            self.gradients[self.phase] = first_gradients(self.nets, self.opt)

    def compare(self, label, phase, record):
        """(label, ours, recorded) of the phase's gradients and parameters."""
        for name, recorded in record["gradients"].items():
            yield f"{label}, gradient of {name}", self.gradients[phase][name], recorded
        for t, parameters in record["parameters"].items():
            for name, recorded in parameters.items():
                ours = self.parameters[phase, t][name]
                yield f"{label}, {name} after {t} in phase {phase}", ours, recorded


def clone_losses(label, rows, record):
    """The clone's loss, that of its entropy's weight (before its step), and the weight after it."""
    weight = 1.0
    for t, row in enumerate(rows):
        found = {"loss": row["nll"] - weight * row["entropy"]}
        found["weight_loss"] = weight * (row["entropy"] + ACT)
        found["weight"] = weight = row["bc_weight"]
        for name, ours in found.items():
            yield f"{label}, clone's {name} {t + 1}", ours, record[name][t]


def losses(label, rows, record, args):
    """Losses and means of the updates; with a learned alpha, its loss before its step."""
    alpha = args.alpha
    for t, row in enumerate(rows):
        found = {name: row[metric] for name, metric in METRICS.items()}
        found["a_loss"] = brac.multiplier_loss(alpha, row["divergence"] - args.target_divergence)
        alpha = row["alpha"]
        for name in record:
            yield f"{label}, {name} of update {t + 1}", found[name], record[name][t]


def values(record):
    for label, case in record["cases"].items():
        run = Replay(case)
        with in_float64(), mock.patch.object(brac, "Adam", KerasAdam), redirect_stdout(None):
            brac.train(run, run.data, run.args)  # prints a note on actions at bounds
        inputs = dict(run.drawn)
        for t, batch in enumerate(run.batches, 1):
            inputs |= {f"{name}[{t}]": x for name, x in batch.items()}
        for name, recorded in case["inputs"].items():
            yield f"{label}, input {name}", inputs[name], recorded
        yield from clone_losses(label, run.phases["behavior"], case["clone"])
        yield from run.compare(label, "behavior", case["clone"])
        yield from losses(label, run.phases["train"], case["losses"], run.args)
        yield from run.compare(label, "train", case)
        recorded = case["samples_beyond_the_clip"]
        yield f"{label}, samples beyond the clip", run.samples_beyond, recorded
        yield f"{label}, terminals", run.data.terminal.sum(), case["terminals"]
        at_bounds = (run.data.action.abs() >= 1 - 1e-3).sum()
        yield f"{label}, actions at bounds", at_bounds, case["actions_at_bounds"]
