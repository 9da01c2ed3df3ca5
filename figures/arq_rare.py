"""Rare good actions, ARQ's case for a clone with many modes: who finds the 5% that pay?

A bandit with noise for a state: 5% of the data's actions are near 0.6 and pay 1, all others are
near -0.6 and pay 0. A method has found the good actions in a state if it acts above 0.4. It has
left the data if it acts between -0.4 and 0.4, where the data has no action.

Differs: arXiv:2206.00695 has no such figure. Every phase has 1,500 steps, or the score network's
2,000; ARQ acts by its policy pi_phi. BRAC and Fisher-BRC have two weights each. What they find
depends on this weight and on the size of the rewards, so a bar speaks for its setting alone.

    python figures/arq_rare.py
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import torch
import tyro
from fisher_brc_actor import Plain
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
from common import Data


@dataclass
class Args:
    share: float = 0.05
    """share of the data's actions that pay"""
    rows: int = 2_000
    """rows of the data"""
    steps: int = 1_500
    """gradient steps of every phase"""
    out: str = "figures/arq_rare.png"
    """where the picture goes"""


BRAC = dict(warm_start=0, actor_lr=3e-4)
ARQ = dict(score_lr=1e-3, width=64, n=30, k=3, sample_steps=15, alpha=10.0, alpha_pi=10.0)
METHODS = {  # title: (file, flags)
    "BC": ("bc", {}),
    "AWR": ("awr", dict(returns_every=500)),
    "BRAC, α = 1": ("brac", BRAC),
    "BRAC, α = 0.1": ("brac", BRAC | dict(alpha=0.1)),
    "Fisher-BRC, λ = 0.1": ("fisher_brc", dict(bonus=0.0)),
    "Fisher-BRC, λ = 1": ("fisher_brc", dict(bonus=0.0, lam=1.0)),
    "TD3+BC": ("td3_bc", {}),
    "IQL, τ = 0.9": ("iql", dict(tau=0.9, beta=10.0)),
    "ARQ": ("arq", ARQ),
}


def bandit(share, rows):
    """Data of `rows` episodes of one step each, of which a `share` is good."""
    good = torch.rand(rows) < share
    mode = torch.where(good, 0.6, -0.6)
    a = mode + 0.05 * torch.randn(rows)
    s = torch.randn(rows, 2)
    r = (a > 0).float()
    return Data(s, a[:, None], r, s.clone(), torch.ones(rows))


def shares(name, flags, args):
    """Shares of new states in which a trained file acts in the good mode, and between the modes."""
    torch.manual_seed(0)
    module, run = importlib.import_module(name), Plain()
    lengths = {key: args.steps for key in module.Args.phases.values() if key}
    if name == "arq":
        lengths["score_steps"] = args.steps * 4 // 3
    how = module.Args(batch_size=256, **lengths, **flags)
    module.train(run, bandit(args.share, args.rows), how)
    with torch.no_grad():
        a = run.act(torch.randn(500, 2))
    good = a >= 0.4
    between = a.abs() < 0.4
    counts = good.sum(), between.sum()
    return tuple(n.item() / len(a) for n in counts)


PARTS = {  # what a policy takes: color
    "the good actions": "tab:green",
    "no action of the data": "tab:orange",
    "the common actions": "0.75",
}


def main(args):
    figure = matplotlib.figure.Figure((8, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (title, (name, flags)) in enumerate(METHODS.items()):
        good, between = shares(name, flags, args)
        print(f"{title}: good {good:.2f}, between {between:.2f}")
        left = 0.0
        widths = good, between, 1 - good - between
        for width, color in zip(widths, PARTS.values()):
            axes.barh(i, width, left=left, color=color)
            left += width
        axes.text(1.02, i, f"{good:.2f}", va="center")
    axes.set_yticks(range(len(METHODS)), METHODS)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of states in which the policy takes ...")
    axes.set_title(f"Who finds the {args.share:.0%} of the actions that pay? (right: share found)")
    box = lambda color: Rectangle((0, 0), 1, 1, color=color)
    boxes = [box(color) for color in PARTS.values()]
    figure.legend(boxes, PARTS, loc="outside lower center", ncols=3)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
