"""Fisher-BRC's lambda (figures 2 and 4 of arXiv:2103.08050), as seen within a minute.

fisher_brc.py trains on the bundled data once for each lambda; the runs share one short clone.

Differs: the paper shows scores over 1,000,000 steps on 15 tasks, for lambda 0, 0.1 and 1. This is
the first 700 steps with batches of 64, after a clone that is far too short, and with targets ten
times as fast; it shows the direction of each effect, not its final size, and no score.

    python figures/fisher_brc_lambda.py
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
import fisher_brc  # noqa: E402

from run import load  # noqa: E402


@dataclass
class Args:
    env: str = "hopper-replay-demo"
    """dataset"""
    lambdas: tuple[float, ...] = (0.0, 0.1, 1.0, 10.0)
    """weights of the gradient penalty"""
    bc_steps: int = 600
    """gradient steps of the clone"""
    steps: int = 700
    """gradient steps per lambda"""
    batch_size: int = 64
    """transitions per gradient step"""
    seed: int = 0
    """seeds networks and batches"""
    out: str = "figures/fisher_brc_lambda.png"
    """where the picture goes"""


class Watched:
    """A run that keeps every metric, and that reads its clone from `clone` where it is asked to."""

    device = torch.device("cpu")
    reference = lambda self, *args: None

    def __init__(self, seed, clone):
        self.seed, self.clone = seed, clone

    def start(self, nets, opt, **largest):
        self.nets = nets

    def read_clone(self, module):
        module.load_state_dict(self.clone)

    def loop(self, steps, phase="train"):
        torch.manual_seed(self.seed + 1)
        self.seen = defaultdict(list)
        return range(1, steps + 1)

    def after(self, t, metrics, act=None):
        for name, value in metrics.items():
            self.seen[name].append(value.item())


def curves(data, lam, clone, args):
    """{metric: its value at every step} of one lambda, and the clone's weights; `clone` are those
    of an earlier lambda, or None to train them."""
    lengths = dict(bc_steps=args.bc_steps, steps=args.steps, batch_size=args.batch_size)
    read = "that of the first lambda" if clone else None
    run = Watched(args.seed, clone)
    torch.manual_seed(args.seed)
    fisher_brc.train(run, data, fisher_brc.Args(lam=lam, polyak=0.05, clone=read, **lengths))
    return run.seen, run.nets.behavior.state_dict()


def main(args):
    data, _ = load(args.env, "cpu", "none")
    clone = None
    figure = matplotlib.figure.Figure((10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2)
    shown = {
        "q_data": "Q of the data's actions",
        "penalty": "penalty: squared slope of the offset",
        "log_mu_pi": "log μ of the actor's actions",
        "abs_action": "size |a| of the actor's actions",
    }
    width = max(1, args.steps // 25)  # of the running mean
    for i, lam in enumerate(args.lambdas):
        seen, clone = curves(data, lam, clone, args)
        for panel, name in zip(panels.flat, shown):
            y = np.convolve(seen[name], np.full(width, 1 / width), "valid")
            panel.plot(np.arange(len(y)) + width, y, f"C{i}", label=f"λ = {lam:g}")
    for panel, (name, title) in zip(panels.flat, shown.items()):
        panel.set(title=title, xlabel="gradient step", ylabel="mean over the batch")
        panel.set_yscale("log" if name == "penalty" else "linear")
    panels[0, 0].legend()
    title = "Without its penalty Fisher-BRC climbs the slopes of its own critic, and leaves\n"
    title += f"the data: the first {args.steps} steps on {args.env}"
    figure.suptitle(title, fontweight="bold")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
