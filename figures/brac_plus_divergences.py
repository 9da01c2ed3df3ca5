"""Divergence of a narrow policy from the behavior policy (BRAC+, figure 5 of "Going Deeper with
Behavior Regularized Offline RL", 2020; its third panel: figure 1 of arXiv:2110.00894).

The policy N(x, 0.2) slides over the behavior policy b. Where b has two modes, KL(pi || b), which
BRAC+ bounds, is least at a mode; KL(b || pi) is least at b's mean, where b may have no mass.

Differs: all by quadrature; the bandwidth of MMD's kernel exp(-|d| / (2 bandwidth)) is unpublished
(here 1). MMD drifts less far than the paper says: its minimum stays near the heavy mode. Circles
are brac_plus.py's closed form: 1.12944 + x^2 / 2 and -2.10944 + 12.5 (1 + x^2).

    python figures/brac_plus_divergences.py
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
from brac_plus import normal_kl  # noqa: E402


@dataclass
class Args:
    std: float = 0.2
    """deviation of the policy"""
    bandwidth: float = 1.0
    """of MMD's kernel"""
    points: int = 201
    """policies, with means from -5 to 5"""
    out: str = "figures/brac_plus_divergences.png"
    """where the picture goes"""


def log_mixture(x, parts):
    """Log-density at x of the Gaussians (weight, mean, std)."""
    w, mean, std = torch.tensor(parts, dtype=torch.float64).T
    z = (x.unsqueeze(-1) - mean) / std
    return (w.log() - 0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).logsumexp(-1)


def landscapes(parts, means, std, bandwidth, reach=12.0, n=2401):
    """KL(pi || b), KL(b || pi) and MMD of pi = N(mean, std), each (len(means),), float64."""
    a = torch.linspace(-reach, reach, n, dtype=torch.float64)
    step = 2 * reach / (n - 1)
    log_b = log_mixture(a, parts)
    log_pi = torch.stack([log_mixture(a, [(1, m, std)]) for m in means.tolist()])  # (M, n)
    pi = log_pi.exp() * step
    b = log_b.exp() * step
    kernel = torch.exp((a[:, None] - a).abs() / (-2 * bandwidth))
    pk = pi @ kernel
    bk = b @ kernel
    mmd = ((pk * pi).sum(1) + bk @ b - 2 * pi @ bk).clamp(min=0).sqrt()
    return (pi * (log_pi - log_b)).sum(1), (b * (log_b - log_pi)).sum(1), mmd


def closed_form(means, std):
    """Both KLs where b = N(0, 1)."""
    means = means.unsqueeze(1)
    log_std = torch.tensor([math.log(std)])
    zero = torch.zeros(1)
    return normal_kl(means, log_std), normal_kl(zero, zero, means, log_std)


def main(args):
    behaviors = {
        "one mode: N(0, 1)": [(1.0, 0.0, 1.0)],
        "two modes: 0.3 N(-1.5, 0.3) + 0.7 N(1, 0.5)": [
            (0.3, -1.5, 0.3),
            (0.7, 1.0, 0.5),
        ],
        "far apart: 0.3 N(-2, 0.3) + 0.7 N(2, 0.5)": [
            (0.3, -2.0, 0.3),
            (0.7, 2.0, 0.5),
        ],
    }
    x = torch.linspace(-5, 5, args.points, dtype=torch.float64)
    figure = matplotlib.figure.Figure((14, 5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    names = (
        "KL(π ‖ b): seeks a mode",
        "KL(b ‖ π): covers all",
        "MMD, Laplace kernel",
    )
    for panel, (title, parts) in zip(panels, behaviors.items()):
        b = log_mixture(x, parts).exp()
        twin = panel.twinx()
        twin.fill_between(x, b, color="0.85", zorder=0)
        twin.set(ylim=(0, 3 * b.max()), yticks=[])
        panel.set_zorder(1)
        panel.patch.set_visible(False)
        lines = landscapes(parts, x, args.std, args.bandwidth)
        for i, (name, y) in enumerate(zip(names, lines)):
            best = round(x[y.argmin()].item(), 2) + 0.0
            panel.semilogy(x, y, c=f"C{i}", lw=2, label=f"{name}, least at {best:.2f}")
            panel.plot(best, y.min(), "v", c=f"C{i}", ms=9)
        panel.set(title=title, xlim=(-5, 5), ylim=(0.1, 3000))
        panel.set_xlabel(f"mean x of π = N(x, {args.std:g})")
    for i, y in enumerate(closed_form(x[::10], args.std)):
        panels[0].plot(x[::10], y, "o", c=f"C{i}", mfc="none", label="closed form")
    for panel in panels:
        panel.plot([], [], c="0.8", lw=8, label="density of b")
        panel.legend(fontsize=8, loc="upper center")
    panels[0].set_ylabel("divergence (log scale)")
    figure.suptitle(
        "With two modes, KL(π ‖ b) is least at a mode of the behavior policy b, "
        "KL(b ‖ π) between them",
        fontweight="bold",
    )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
