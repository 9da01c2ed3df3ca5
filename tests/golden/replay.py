"""A run on drawn networks and drawn batches, compared with its record: for the files whose update
draws one batch. `train` itself may run on it, so that its optimizers and schedules are compared
too."""

import torch
from stand_in import PlainRun

from golden.tools import Inject

METRICS = {"actor_loss": "pi_loss"}  # name in a record -> name in our metrics


class Replay(PlainRun):
    """Starts from the networks that `load` copies in, and takes one batch of `data` after another.

    Update t draws rows (t - 1) B to t B - 1 of `data`. Its calls of randn_like return those rows of
    the tables in `noise` (name in the record -> table), in the order of the tables."""

    def __init__(self, case, data, load, noise=None):
        super().__init__(limit=case["updates"])
        self.case, self.data, self.load, self.noise = case, data, load, noise or {}
        self.parameters, self.rates = {}, []

    def batch(self, t):
        """The numbers of the rows of update t."""
        return torch.arange(self.case["batch"]) + (t - 1) * self.case["batch"]

    def copies(self):
        return {name: p.detach().clone() for name, p in self.nets.named_parameters()}

    def start(self, nets, opt, **largest):
        super().start(nets, opt, **largest)
        self.load(nets)
        self.drawn = self.copies()

    def loop(self, steps, phase="train"):
        for t in super().loop(steps, phase):
            noise = [table[self.batch(t)] for table in self.noise.values()]
            with Inject(randint=[self.batch(t)], randn_like=noise):
                yield t

    def after(self, t, metrics, act=None):
        super().after(t, metrics, act)
        self.rates.append(self.opt.actor.lr.item())
        if str(t) in self.case["parameters"]:
            self.parameters[str(t)] = self.copies()
        if t == 1:  # Adam's first moment is now 0.1 times the gradient
            names = {id(p): name for name, p in self.nets.named_parameters()}
            self.gradients = {
                names[id(p)]: moment / (1 - 0.9)
                for adam in vars(self.opt).values()
                for p, moment in zip(adam.params, adam.m)
            }

    def inputs(self):
        """The drawn inputs, by their names in the record."""
        data = vars(self.data)
        names = {"s": "obs", "a": "action", "r": "reward", "s2": "next_obs"}
        names |= {name: name for name in ("terminal", "returns", "advantage")}
        tables = {name: data[field] for name, field in names.items() if field in data}
        found = dict(self.drawn)
        for name, table in (tables | self.noise).items():
            for t in range(1, self.case["updates"] + 1):
                found[f"{name}[{t}]"] = table[self.batch(t)]
        return found

    def compare(self, label):
        """(label, ours, recorded) of everything that the case records."""
        case, inputs = self.case, self.inputs()
        for name, recorded in case["inputs"].items():
            yield f"{label}, input {name}", inputs[name], recorded
        for name, recorded in case["losses"].items():
            ours = [row[METRICS.get(name, name)] for row in self.rows]
            yield f"{label}, {name}", torch.tensor(ours, dtype=torch.float64), recorded
        capped = sum(row["capped_weights"] for row in self.rows) * case["batch"]
        yield f"{label}, number of capped weights", capped, case["capped_weights"]
        for name, recorded in case["gradients"].items():
            yield f"{label}, gradient of {name}", self.gradients[name], recorded
        for t, parameters in case["parameters"].items():
            for name, recorded in parameters.items():
                yield f"{label}, {name} after update {t}", self.parameters[t][name], recorded
