"""TD3+BC's golden numbers; td3_bc.md says how they were computed and how the inputs are drawn."""

import numpy as np
import td3_bc
import torch
from stand_in import PlainRun

from common import Data
from golden.tools import Inject, draw_network, in_float64, load_network

REFERENCE = "CORL 6afec90, td3_bc.py; the authors' TD3_BC 8791ad7 gives the same bits"
TOLERANCE = 1e-9
COMPARED = "ten updates, four settings"

OBS, ACT = 11, 3
COLUMNS = ("s", "a", "r", "s2", "terminal", "z")


def draw_batch(rng, B):
    """s, a, r, s2, terminal of one update, and the unit noise z of its target actions."""
    s = rng.standard_normal((B, OBS))
    a = np.tanh(rng.standard_normal((B, ACT)))
    r = 1 + 0.5 * rng.standard_normal(B)
    s2 = s + 0.1 * rng.standard_normal((B, OBS))
    terminal = (rng.random(B) < 0.05).astype(float)
    z = rng.standard_normal((B, ACT))
    return [torch.tensor(x) for x in (s, a, r, s2, terminal, z)]


class Replay(PlainRun):
    """Starts from drawn networks, takes one drawn batch after another, and keeps what it sees."""

    def __init__(self, case):
        """Draws everything in the order of td3_bc.md."""
        super().__init__(limit=case["updates"])
        rng, self.B = np.random.default_rng(case["seed"]), case["batch"]
        self.networks = {
            "actor": draw_network(rng, (OBS, 256, 256, ACT)),
            "actor_target": draw_network(rng, (OBS, 256, 256, ACT)),
            "q": draw_network(rng, (OBS + ACT, 256, 256, 1), members=2),
            "q_target": draw_network(rng, (OBS + ACT, 256, 256, 1), members=2),
        }
        self.batches = [draw_batch(rng, self.B) for _ in range(case["updates"])]
        self.args = td3_bc.Args(batch_size=self.B, normalize_obs=False, **case["settings"])
        self.parameters, self.gradients, self.actions_clipped = {}, {}, 0

    def data(self):
        """The rows of all batches, one after another."""
        *columns, _ = [torch.cat(column) for column in zip(*self.batches)]
        return Data(*columns)

    def start(self, nets, opt, **largest):
        super().start(nets, opt, **largest)
        for name, drawn in self.networks.items():
            load_network(getattr(nets, name), drawn)
        self.drawn = self.copies()

    def copies(self):
        return {name: p.detach().clone() for name, p in self.nets.named_parameters()}

    def loop(self, steps, phase="train"):
        for t in super().loop(steps, phase):
            *_, s2, _, z = self.batches[t - 1]
            self.actions_clipped += self.count_clipped(s2, z)
            indices = torch.arange(self.B) + (t - 1) * self.B
            with Inject(randint=[indices], randn_like=[z]):
                yield t

    @torch.no_grad()
    def count_clipped(self, s2, z):
        """Target actions that leave [-1, 1] with their noise."""
        noise = self.args.policy_noise * z
        noise = noise.clamp(-self.args.noise_clip, self.args.noise_clip)
        a2 = self.nets.actor_target(s2).tanh() + noise
        return (a2.abs() > 1).sum().item()

    def after(self, t, metrics, act=None):
        super().after(t, metrics, act)
        self.parameters[str(t)] = self.copies()
        names = {id(p): name for name, p in self.nets.named_parameters()}
        for adam in (self.opt.q, self.opt.actor):
            if adam.count == 1:  # its first moment is 0.1 times the first gradient
                for p, moment in zip(adam.params, adam.m):
                    self.gradients.setdefault(names[id(p)], moment / (1 - 0.9))


def values(record):
    for label, case in record["cases"].items():
        run = Replay(case)
        with in_float64():
            td3_bc.train(run, run.data(), run.args)

        inputs = dict(run.drawn)
        for t, batch in enumerate(run.batches, 1):
            inputs |= {f"{name}[{t}]": column for name, column in zip(COLUMNS, batch)}
        for name, recorded in case["inputs"].items():
            yield f"{label}, input {name}", inputs[name], recorded

        noise = run.args.policy_noise * torch.cat([batch[-1] for batch in run.batches])
        noise_clipped = (noise.abs() > run.args.noise_clip).sum()
        yield f"{label}, terminals", sum(batch[4].sum() for batch in run.batches), case["terminals"]
        yield f"{label}, noise at its bound", noise_clipped, case["noise_clipped"]
        yield f"{label}, actions at their bound", run.actions_clipped, case["actions_clipped"]

        for t, row in enumerate(run.phases["train"]):
            yield f"{label}, q_loss of update {t + 1}", row["q_loss"], case["losses"]["q_loss"][t]
            recorded = case["losses"]["actor_loss"][t]
            assert ("pi_loss" in row) == (recorded is not None), "the actor's step is at another t"
            if recorded is not None:
                yield f"{label}, pi_loss of update {t + 1}", row["pi_loss"], recorded
        assert run.gradients.keys() == case["gradients"].keys()
        for name, recorded in case["gradients"].items():
            yield f"{label}, gradient of {name}", run.gradients[name], recorded
        for t, parameters in case["parameters"].items():
            assert parameters.keys() == run.parameters[t].keys()
            for name, recorded in parameters.items():
                yield f"{label}, {name} after update {t}", run.parameters[t][name], recorded
