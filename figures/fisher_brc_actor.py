"""Fisher-BRC's actor beside the density that it should fit, exp(O + log mu), for several lambdas.

The bandit is that of figures/family.py, at the state in the middle. The paper's view is that exp(Q)
for Q = O + log mu, normalized, is a policy, and that the penalty is its Fisher divergence from mu.
The actor minimizes KL(pi | exp(Q / T)), where the temperature T is learned, and is one Gaussian
before its tanh. A title gives KL(pi | exp(Q)), then this KL. Both are means over all states,
integrated on a grid.

Differs: arXiv:2103.08050 draws its critics alone (figures/fisher_brc_bandit.py).

    python figures/fisher_brc_actor.py
"""

from dataclasses import dataclass
from pathlib import Path

import family
import matplotlib.figure
import torch
import tyro


@dataclass
class Args:
    steps: int = 1_500
    """gradient steps of the clone, and again of actor and critics, for each lambda"""
    batch_size: int = 64
    """rows per gradient step"""
    rows: int = 4_000
    """rows of the data"""
    lambdas: tuple[float, ...] = (0.0, 0.1, 1.0, 10.0)
    """weights of the gradient penalty"""
    seed: int = 0
    """seeds data, networks and batches"""
    out: str = "figures/fisher_brc_actor.png"
    """where the picture goes"""


@torch.no_grad()
def densities(grid, module, how, run):
    """log-probabilities (S, G) of the actor and of exp(Q), and the temperature."""
    s = run.nets.scaling.obs(grid.s)
    actor = grid.gaussian(*run.nets.pi(s), squashed=True)
    q = grid.smaller_q(module, run.nets)
    temperature = run.nets.log_temperature.exp()
    return actor, grid.normalized(q), temperature


def draw(axes, grid, actor, target):
    """The densities at the state in the middle."""
    beta = family.data_log_density(grid.s, grid.a)
    lines = {
        "data": (grid.normalized(beta), "0.6"),
        "exp(O + log μ)": (target, "tab:blue"),
        "actor": (actor, "tab:red"),
    }
    for label, (log_prob, color) in lines.items():
        p = log_prob[len(grid.s) // 2].exp()
        density = p * len(grid.a) / 2
        axes.plot(grid.a, density, c=color, lw=2, label=label)
    axes.set(xlim=(-1, 1), ylim=(0, 10), xticks=(-1, -0.5, 0, 0.5, 1))


def main(args):
    grid = family.Grid()
    figure = matplotlib.figure.Figure((8, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, lam in zip(panels.flat, args.lambdas):
        torch.manual_seed(args.seed)
        data = family.bandit(args.rows)
        trained = family.learn("fisher_brc", data, args, lam=lam)
        actor, target, temperature = densities(grid, *trained)
        tempered = grid.normalized(target / temperature)
        draw(axes, grid, actor, target)
        title = f"λ = {lam:g}: KL {family.kl(actor, target):.2f}"
        title += f"\nfrom exp(Q / {temperature:.2f}): {family.kl(actor, tempered):.2f}"
        axes.set_title(title, fontsize=11)
        print(title)
        axes.set(xlabel="action a", ylabel="density at s = 0")
    panels[0, 1].legend()
    figure.suptitle("Fisher-BRC's actor and exp(O + log μ), normalized", fontweight="bold")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
