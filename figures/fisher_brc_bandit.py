"""Fisher-BRC's toy bandit (figure 1 of arXiv:2103.08050): what each critic tells the actor.

The data's actions are U(-1/4, 1/4) with reward |a| - 1/8, so the best lie at the data's two edges.
BRAC fits R(a) and adds alpha log mu(a); Fisher-BRC fits O(a) + log mu(a) with a penalty on O'(a)^2.
Here log mu(a) is about 1.386 - 8 |a|, the Laplace fit of the data.

Differs: the paper's right panel cannot come from its text. With the penalty over U(-1, 1) the exact
optimum inside the data is r + 9 w sinh((1/8 - |a|) / w) / cosh(1/8 / w), w = sqrt(lambda / 4): from
lambda = 0.01 on it peaks at 0, the worst action ("as written"). With the penalty outside the data
alone the figure appears ("as drawn"): r inside, the slope of log mu outside. Network, optimizer and
lambdas are unpublished. A curve is the best of 8 networks by its loss; at 10 most stall.

    python figures/fisher_brc_bandit.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
from fisher_brc import gradient_penalty  # noqa: E402

from common import Adam, ScalarMLP, minimize  # noqa: E402


@dataclass
class Args:
    steps: int = 1_200
    """gradient steps of each of the 9 fits"""
    alphas: tuple[float, ...] = (0.01, 0.1, 1.0)
    """BRAC's coefficients"""
    lambdas: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    """Fisher-BRC's coefficients"""
    seed: int = 0
    """seeds data and networks"""
    out: str = "figures/fisher_brc_bandit.png"
    """where the picture goes"""


def as_written(a, lam, slope=8.0):
    """Optimum O + log mu of the printed objective at actions a inside the data (see above)."""
    width = (lam / 4) ** 0.5
    tilt = torch.sinh((0.125 - a.abs()) / width) / torch.cosh(torch.tensor(0.125 / width))
    return a.abs() - 0.125 + (1 + slope) * width * tilt


def fit(a, y, lam, everywhere, steps):
    """The best of 8 networks with MSE to y and the penalty (Eq. 7) everywhere or outside."""
    net = ScalarMLP(1, 64, 64, members=8)
    none = torch.zeros(128, 0)
    opt = Adam(net.parameters(), 1e-2)
    for t in range(steps):
        opt.lr.fill_(1e-2 * (1 - t / steps))
        i = torch.randint(len(a), (128,))
        u = torch.rand(128, 1) * 2 - 1
        u = u if everywhere else u * 0.75 + 0.25 * u.sign()
        penalty = gradient_penalty(SimpleNamespace(offset=net), none, u) if lam else 0
        minimize(opt, (net(a[i, None]) - y[i]).square().mean(1).sum() + lam * penalty)
    slope = net.input_gradient(torch.linspace(-1, 1, 1000 if everywhere and lam else 2)[:, None])
    loss = (net(a[:, None]) - y).square().mean(1) + lam * slope.square().mean((1, 2))
    return lambda x: net(x[:, None], member=loss.argmin()).detach()


def main(args):
    torch.manual_seed(args.seed)
    a = torch.rand(1000) * 0.5 - 0.25
    r = a.abs() - 0.125
    scale = (a - a.median()).abs().mean()
    log_mu = lambda x: -(2 * scale).log() - (x - a.median()).abs() / scale
    grid = torch.linspace(-1, 1, 801)
    inside = torch.linspace(-0.25, 0.25, 201)
    figure = matplotlib.figure.Figure((13, 5.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    reward = fit(a, r, 0, True, args.steps)
    for i, alpha in enumerate(args.alphas):
        panels[0].plot(
            grid,
            reward(grid) + alpha * log_mu(grid),
            f"C{i}",
            label=f"α = {alpha:g}",
        )
    for panel, everywhere, width in zip(panels[1:], (True, False), (4, 5)):
        for i, lam in enumerate(args.lambdas):
            offset = fit(a, r - log_mu(a), lam, everywhere, args.steps)
            panel.plot(
                grid,
                offset(grid) + log_mu(grid),
                lw=width - i,
                label=f"λ = {lam:g}",
            )
            if everywhere:
                panel.plot(
                    inside,
                    as_written(inside.double(), lam),
                    f"C{i}",
                    ls=":",
                    lw=2.5,
                )
    panels[1].plot([], [], "k:", lw=2.5, label="exact optimum")
    panels[0].set_title("BRAC, R(a) + α log μ(a):\nα decides where the peak is")
    panels[1].set_title(
        "Fisher-BRC as written, O(a) + log μ(a),\npenalty over U(-1, 1): at 0 from λ = 0.01 on"
    )
    panels[2].set_title("Fisher-BRC as drawn, penalty outside\nthe data alone: right for λ up to 1")
    for panel in panels:
        panel.axvspan(-0.25, 0.25, color="0.93", zorder=0, label="actions in the data")
        panel.plot(inside, inside.abs() - 0.125, "k", lw=6, alpha=0.25, label="true reward")
        panel.set(
            xlim=(-1, 1),
            ylim=(-2, 2),
            xlabel="action a",
            xticks=(-1, -0.5, 0, 0.5, 1),
        )
        panel.legend(fontsize=7.5, loc="upper center", ncols=3)
    panels[0].set_ylabel("value that the actor climbs")
    figure.suptitle(
        "A bandit whose best actions are the edges of its data: a flat offset outside "
        "lets log μ alone decide there",
        fontweight="bold",
    )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
