"""What ARQ's score model can clone (figure A.1 of arXiv:2206.00695): densities beta(a|s) in 1-D.

The score network and the loss of arq.py learn four densities, and its likelihood, along the
probability-flow ODE, draws them. The number of a panel is the total variation from the true
density, averaged over states: 0 is exact, 1 means that the two have nothing in common.

Differs: the paper gives neither its four functions nor its numbers of rows and steps. Few steps are
enough here, because the network is narrower (64, not 256), its time features are slower (4, not
30), the learning rate falls from 5e-3 to 0, and the weights are not averaged. Batches have 256
rows.

    python figures/arq_densities.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import torch
import tyro
from torch.distributions import Normal, Uniform

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
import arq  # noqa: E402

from common import Adam, Data  # noqa: E402


@dataclass
class Args:
    steps: int = 3_000
    """gradient steps per density"""
    grid: int = 64
    """states, and actions, at which the density is computed"""
    out: str = "figures/arq_densities.png"
    """where the picture goes"""


def modes(s):
    """The four targets at states s (S,): lists of (weight (S,), distribution)."""
    left = (s < 0).to(s)
    right = (s >= 0).to(s)
    near = lambda center: Normal(center, 0.08)
    arc = 0.9 * (1 - s**2).clamp(min=0).sqrt()
    band = Uniform(0 * s - 0.4, 0.4, validate_args=False)
    step = [
        (left, near(0 * s - 0.5)),
        (right, near(0 * s + 0.5)),
    ]
    branches = []
    for k in (-1, 1):
        center = k * (0.2 + 0.6 * s.abs())
        branches.append(((left + right) / 2, near(center)))
    three = []
    for k in (-0.6, 0, 0.6):
        weight = left * (k == 0) + right / 3
        center = 0 * s + k
        three.append((weight, near(center)))
    arcs = [(right / 2, near(k * arc)) for k in (-1, 1)]
    return {
        "a step": step,
        "two branches": branches,
        "one to three": three,
        "a band, then an arc": [(left, band), *arcs],
    }


def density(parts, a):
    """True density (S, A) at actions a (A,)."""
    a = a[:, None]
    found = sum(weight * mode.log_prob(a).exp() for weight, mode in parts)
    return found.T


def draw(parts):
    """One action (S, 1) per state."""
    weights = torch.stack([weight for weight, _ in parts], 1)
    k = torch.multinomial(weights, 1)
    samples = torch.stack([mode.sample() for _, mode in parts], 1)
    return samples.gather(1, k).clamp(-1, 1)


def clone(s, a, grid, args):
    """Density (S, A) learned from s, a (N, 1), at all pairs of grid = (states, actions)."""
    zeros = torch.zeros(len(s))
    data = Data(s, a, zeros, s, zeros)
    how = arq.Args(width=64, batch_size=256)
    nets = arq.Nets(data, how)
    nets.score.frequencies.mul_(4 / 30)
    nets.score_ema = nets.score
    opt = SimpleNamespace(score=Adam(nets.score.parameters(), 0.0))
    for t in range(args.steps):
        opt.score.lr.fill_(5e-3 * (1 - t / args.steps))
        arq.update_score(nets, opt, data, how)
    states, actions = grid
    actions = actions[None, :, None].expand(len(states), -1, 1)  # (S, A, 1)
    log_prob = arq.grade(nets, states[:, None], nets.z_action(actions), how)
    return log_prob.exp() / nets.z_action.std


def main(args):
    torch.manual_seed(0)
    s = 2 * torch.rand(5_000) - 1
    edge = 1 - 1 / args.grid
    states = torch.linspace(-edge, edge, args.grid)
    actions = torch.linspace(-1.2, 1.2, args.grid)
    figure = matplotlib.figure.Figure((13, 4.2), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for panel, title in zip(panels, modes(s)):
        a = draw(modes(s)[title])
        true = density(modes(states)[title], actions)
        p = clone(s[:, None], a, (states, actions), args)
        distance = (p - true).abs().sum(1).mean()
        error = 0.5 * distance * 2.4 / (args.grid - 1)
        columns = (x.numpy() for x in (states, actions, p.T))
        image = panel.pcolormesh(*columns, vmax=3, shading="nearest")
        panel.plot(s[:150], a[:150], "rx", ms=4, mew=0.8, label="samples")
        panel.set_title(f"{title}\ntotal variation {error:.2f}")
        panel.set(xlabel="state s", xlim=(-1, 1))
    panels[0].set_ylabel("action a")
    panels[0].legend(loc="upper left", fontsize=8)
    figure.colorbar(image, ax=panels, label="learned density β(a|s)", extend="max")
    figure.suptitle("A score model clones jumps and several modes", fontweight="bold")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
