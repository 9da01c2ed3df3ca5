"""BRAC+'s regression toy (figure 4, "Going Deeper with Behavior Regularized Offline RL", 2020).

y = 5 sin(pi x / 2) + noise is seen for |x| < 0.8 only; a penalty on the network's slope outside
stops it from extrapolating. Its target values fall again beyond |x| = 1, which no data says.

Differs: the number of rows (100), of steps (1,000) and whether 0.5 is the noise's deviation (taken
so) are not published. Next to the paper's squared slope stands what brac_plus.py does (Eq. 10 as
its authors coded it): the slope's norm, not squared, of the smaller of two networks, gated by a
divergence above a threshold (here: |x| above 0.8); the curve is then that smaller network.

    python figures/brac_plus_penalty.py
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
from brac_plus import Adam, ScalarMLP, gradient_norm, minimize, penalty_gate  # noqa: E402


@dataclass
class Args:
    steps: int = 1_000
    """gradient steps per network"""
    lam: float = 0.1
    """weight of the penalty"""
    lr: float = 0.01
    """Adam's learning rate"""
    seed: int = 0
    """seeds data and networks"""
    out: str = "figures/brac_plus_penalty.png"
    """where the picture goes"""


def truth(x):
    return 5 * torch.sin(math.pi / 2 * x)


def squared_slope(net, x):
    """The paper's penalty, for each of the two networks on its own."""
    return net.input_gradient(x).square().mean((1, 2)).sum()


def gated_norm(net, x):
    """Eq. 10 of brac_plus.py: x is the action, |x| its divergence, 0.8 the threshold."""
    nets = SimpleNamespace(q=net, eps_gp=0.8)
    norm = gradient_norm(nets, x[:, :0], x.unsqueeze(0))  # no state, one action
    return (penalty_gate(nets, x.abs().squeeze(1)) * norm).mean()


def fit(x, y, penalty, args):
    """Two networks of 64 hidden units; returns the smaller, x -> f(x)."""
    torch.manual_seed(args.seed + 1)
    net = ScalarMLP(1, 64, members=2)
    outside = (0.8 + 1.2 * torch.rand(100, 1)) * (torch.rand(100, 1) - 0.5).sign()
    opt = Adam(net.parameters(), args.lr)
    for _ in range(args.steps):
        loss = (net(x) - y).square().mean(1).sum()
        minimize(opt, loss + args.lam * penalty(net, outside) if penalty else loss)
    return lambda x: net(x).detach().amin(0)


def main(args):
    torch.manual_seed(args.seed)
    x = 1.6 * torch.rand(100, 1) - 0.8
    y = truth(x)[:, 0] + 0.5 * torch.randn(100)
    grid = torch.linspace(-2, 2, 401)[:, None]
    figure = matplotlib.figure.Figure((8, 5), layout="constrained")
    panel = figure.subplots()
    panel.plot(x, y, ".", c="0.6", label="data")
    panel.plot(grid, truth(grid), "k:", label="truth, 5 sin(πx/2)")
    for label, penalty in {
        "no penalty: rises and falls on and on": None,
        "squared slope (paper): flat outside": squared_slope,
        "gated norm (brac_plus.py): flat outside": gated_norm,
    }.items():
        style = "--" if penalty is gated_norm else "-"
        panel.plot(grid, fit(x, y, penalty, args)(grid), style, lw=2.5, label=label)
    for edge in (-0.8, 0.8):
        panel.axvline(
            edge,
            c="r",
            lw=0.8,
            label="edge of the data" if edge > 0 else None,
        )
        panel.axvline(1.25 * edge, c="b", lw=0.8, label="|x| = 1" if edge > 0 else None)
    panel.axvspan(-0.8, 0.8, color="0.95", zorder=0)
    panel.set(xlim=(-2, 2), ylim=(-12, 12), xlabel="x (in BRAC+: the action)")
    panel.set(ylabel="prediction (in BRAC+: Q)")
    panel.legend(fontsize=9, framealpha=1)
    panel.set_title(
        "A gradient penalty outside the data keeps a regression from extrapolating\n"
        f"(λ = {args.lam:g}, penalty at 100 points with 0.8 < |x| < 2)"
    )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
