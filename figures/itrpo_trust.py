"""iTRPO's trust region: how far the policy moves, with the shaping of rewards and without it.

itrpo.py trains on the bundled data with --setting trust (tau = 0.9), and with --control, which is
BRAC with the same limit. Left: KL(pi | pi of --log-every steps ago), the metric kl_step. Right:
KL(pi | pi_b), the distance from the clone, which says how far there was to go. A line is a seed.

Differs: AAAI 2024's figures are scores. Clones are short, 1,500 steps, and both settings of a seed
share one; batches have 128 rows with one sample each, targets are four times as fast, and alpha is
1. No score is taken.

    python figures/itrpo_trust.py
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
import itrpo

from run import load


@dataclass
class Args:
    env: str = "hopper-replay-demo"
    """dataset"""
    bc_steps: int = 1_500
    """gradient steps of the clone"""
    steps: int = 800
    """gradient steps after it"""
    log_every: int = 100
    """gradient steps over which the policy's movement is measured"""
    seeds: int = 3
    """number of seeds"""
    out: str = "figures/itrpo_trust.png"
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


def curves(control, seed, clone, args):
    """{metric: values every log_every steps}, and the clone's weights; `clone` are those of the
    other setting, or None to train them."""
    data, _ = load(args.env, "cpu", "none")
    torch.manual_seed(seed)
    how = itrpo.Args(
        setting="trust",
        control=control,
        kl_coef=1.0,
        samples=1,
        batch_size=128,
        polyak=0.02,
        normalize_obs=True,
        bc_steps=args.bc_steps,
        steps=args.steps,
        log_every=args.log_every,
        clone="that of the other setting" if clone else None,
    )
    run = Watched(seed, clone)
    itrpo.train(run, data, how)
    first = args.log_every - 1
    seen = {name: run.seen[name][first :: args.log_every] for name in run.seen}
    return seen, run.nets.behavior.state_dict()


def main(args):
    figure = matplotlib.figure.Figure((8, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    names = {True: "without shaping (--control)", False: "iTRPO (--setting trust)"}
    titles = {
        "kl_step": f"KL from the policy {args.log_every} steps ago",
        "kl_behavior": "KL from the clone",
    }
    t = range(args.log_every, args.steps + 1, args.log_every)
    for seed in range(args.seeds):
        clone = None
        for control, color in ((True, "tab:orange"), (False, "tab:blue")):
            seen, clone = curves(control, seed, clone, args)
            for panel, (metric, title) in zip(panels, titles.items()):
                label = names[control] if seed == 0 else None
                panel.plot(t, seen[metric], ".-", c=color, label=label)
                panel.set(title=title, xlabel="gradient step")
                values = " ".join(f"{x:.2f}" for x in seen[metric])
                print(f"{names[control]}, seed {seed}, {metric}: {values}")
    for panel in panels:
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("nats, mean over the batch")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2)
    figure.suptitle("iTRPO's shaping keeps a policy near the last one", fontweight="bold")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
