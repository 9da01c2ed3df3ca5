"""The one stand-in for a run: what `train(run, data, args)` needs, and nothing of run.py."""

import torch


class PlainRun:
    """Stands where run.py's run does: no files, no evaluation. Keeps what it was told.

    `limit` ends every phase after so many steps."""

    def __init__(self, limit=None):
        self.device, self.limit = torch.device("cpu"), limit
        self.phases, self.references, self.act = {}, {}, None

    def start(self, nets, opt, **largest):
        self.nets, self.opt, self.largest = nets, opt, largest

    def loop(self, steps, phase="train"):
        self.rows = self.phases.setdefault(phase, [])
        return range(1, min(steps, self.limit or steps) + 1)

    def after(self, t, metrics, act=None):
        held = [name for name, value in metrics.items() if value.requires_grad]
        assert not held, f"{held}: a metric that is not detached keeps the graph of its step"
        self.rows.append({name: value.item() for name, value in metrics.items()})
        self.act = act

    def reference(self, label, act):
        self.references[label] = act

    def kept(self, name, compute):
        return compute()
