"""Fisher-BRC's lambda (figures 2 and 4 of arXiv:2103.08050), as seen within a minute.

One short clone, then a run of fisher_brc.py's own update per lambda, on the bundled data.

Differs: the paper shows scores over 1,000,000 steps on 15 tasks, for lambda 0, 0.1 and 1. This is
the first 700 steps with batches of 64, after a clone that is far too short, and with targets ten
times as fast; it shows the direction of each effect, not its final size, and no score.

    python figures/fisher_brc_lambda.py
"""

import copy
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
import fisher_brc  # noqa: E402


@dataclass
class Args:
    env: str = "hopper-replay-demo"
    """dataset"""
    lambdas: tuple[float, ...] = (0.0, 0.1, 1.0, 10.0)
    """weights of the gradient penalty"""
    bc_steps: int = 600
    """gradient steps of the clone that all share"""
    steps: int = 700
    """gradient steps per lambda"""
    batch_size: int = 64
    """transitions per gradient step"""
    seed: int = 0
    """seeds networks and batches"""
    out: str = "figures/fisher_brc_lambda.png"
    """where the picture goes"""


def optimizers(nets, how):
    rates = {"behavior": how.bc_lr, "offset": how.lr, "actor": how.lr}
    opt = {k: fisher_brc.Adam(getattr(nets, k).parameters(), lr) for k, lr in rates.items()}
    opt["bc_weight"] = fisher_brc.Adam([nets.log_bc_weight], how.bc_lr)
    opt["temperature"] = fisher_brc.Adam([nets.log_temperature], how.lr)
    return SimpleNamespace(**opt)


def curves(nets, data, how):
    """{metric of the file's update: its value at every step} from copies of the networks."""
    torch.manual_seed(how.seed + 1)
    nets, seen = copy.deepcopy(nets), defaultdict(list)
    opt = optimizers(nets, how)
    for _ in range(how.steps):
        for name, value in fisher_brc.update(nets, opt, data, how).items():
            seen[name].append(value.item())
    return seen


def main(args):
    torch.manual_seed(args.seed)
    same = dict(batch_size=args.batch_size, steps=args.steps, seed=args.seed, polyak=0.05)
    data, _ = fisher_brc.load_dataset(args.env, "cpu", "none")
    how = fisher_brc.Args(**same)
    nets = fisher_brc.Nets(data, how)
    opt = optimizers(nets, how)
    for _ in range(args.bc_steps):
        fisher_brc.update_behavior(nets, opt, data, how)
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
        seen = curves(nets, data, fisher_brc.Args(lam=lam, **same))
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
