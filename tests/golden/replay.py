"""A run on drawn networks and drawn batches, compared with its record: for the files whose update
draws one batch. `train` itself may run on it, so that its optimizers and schedules are compared
too."""

import torch
from stand_in import PlainRun

from golden.tools import Inject, first_gradients

METRICS = {"actor_loss": "pi_loss"}  # name in a record -> name in our metrics


class Replay(PlainRun):
    """Starts from the networks that `load` copies in, and takes one batch of `data` after another.

    Update t draws rows (t - 1) B to t B - 1 of `data`. Its calls of randn_like return those rows of
    the tables in `noise` (name in the record -> table), in the order of the tables, and its calls
    of rand_like those of `uniform`."""

    def __init__(self, case, data, load, noise=None, uniform=None):
        super().__init__(limit=case["updates"])
        self.case, self.data, self.load = case, data, load
        self.noise, self.uniform = noise or {}, uniform or {}
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
            rows = self.batch(t)
            noise = [table[rows] for table in self.noise.values()]
            uniform = [table[rows] for table in self.uniform.values()]
            with Inject(randint=[rows], randn_like=noise, rand_like=uniform):
                yield t

    def after(self, t, metrics, act=None):
        super().after(t, metrics, act)
        self.rates.append({name: adam.lr.item() for name, adam in vars(self.opt).items()})
        if str(t) in self.case["parameters"]:
            self.parameters[str(t)] = self.copies()
        if t == 1:
            self.gradients = first_gradients(self.nets, self.opt)

    def inputs(self):
        """The drawn inputs, by their names in the record."""
        data = vars(self.data)
        names = {"s": "obs", "a": "action", "r": "reward", "s2": "next_obs"}
        names |= {name: name for name in ("terminal", "returns", "advantage")}
        tables = {name: data[field] for name, field in names.items() if field in data}
        found = dict(self.drawn)
        for name, table in (tables | self.noise | self.uniform).items():
            for t in range(1, self.case["updates"] + 1):
                found[f"{name}[{t}]"] = table[self.batch(t)]
        return found

    def compare(self, label):
        """(label, ours, recorded) of everything that the case records."""
        case = self.case
        for name, recorded in case["losses"].items():
            ours = [row[METRICS.get(name, name)] for row in self.rows]
            yield f"{label}, {name}", torch.tensor(ours, dtype=torch.float64), recorded
        if "capped_weights" in case:
            capped = sum(row["capped_weights"] for row in self.rows) * case["batch"]
            yield f"{label}, number of capped weights", capped, case["capped_weights"]
        yield from self.compare_tensors(label)

    def compare_tensors(self, label):
        """The same of its inputs, first gradients and parameters."""
        case, inputs = self.case, self.inputs()
        for name, recorded in case["inputs"].items():
            yield f"{label}, input {name}", inputs[name], recorded
        for name, recorded in case["gradients"].items():
            yield f"{label}, gradient of {name}", self.gradients[name], recorded
        for t, parameters in case["parameters"].items():
            for name, recorded in parameters.items():
                yield f"{label}, {name} after update {t}", self.parameters[t][name], recorded
