"""Fisher-BRC's actor beside the density that it should fit, exp(O + log mu), for several lambdas.

At a state s, the data has two branches of actions, and the upper one pays more. The most is paid
where the data has no action: in the hole between the branches, and beyond them. The picture shows
the state in the middle. The paper's view is that exp(Q) for Q = O + log mu, normalized, is a
policy, and that the penalty is its Fisher divergence from mu. The actor minimizes
KL(pi | exp(Q / T)), where the temperature T is learned, and is one Gaussian before its tanh. A
title gives KL(pi | exp(Q)), then this KL, for the first seed; those of all seeds are printed. Both
are means over all states, integrated on a grid.

Differs: arXiv:2103.08050 draws its critics alone, on a bandit of its own. Networks learn faster
here than in the paper, and all have one width.

    python figures/fisher_brc_actor.py
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "algorithms"))
import fisher_brc

from common import Data, normal_log_prob, tanh_log_det

FLAGS = dict(lr=3e-3, bc_lr=3e-3, polyak=0.05, hidden=128, batch_size=64, normalize_obs=True)
WIDTH = 0.05  # standard deviation of a branch
STATES = torch.linspace(-0.99, 0.99, 67)[:, None]  # (S, 1), against actions (G,)
ACTIONS = (torch.arange(1000) + 0.5) / 500 - 1


@dataclass
class Args:
    steps: int = 1_500
    """gradient steps of the clone, and again of actor and critics, for each lambda"""
    rows: int = 4_000
    """rows of the data"""
    lambdas: tuple[float, ...] = (0.0, 0.1, 1.0, 10.0)
    """weights of the gradient penalty"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of data, networks and batches; the first one is drawn"""
    out: str = "figures/fisher_brc_actor.png"
    """where the picture goes"""


class Plain:
    """A run that keeps the networks and the policy, and writes nothing."""

    device = torch.device("cpu")
    after = lambda self, t, metrics, act=None: setattr(self, "act", act)
    loop = lambda self, steps, phase="train": range(1, steps + 1)
    kept = lambda self, name, compute: compute()
    reference = lambda self, label, act: None

    def start(self, nets, opt, **largest):
        self.nets = nets


def center(s):
    """The middle of the hole at states s."""
    return 0.15 * torch.sin(math.pi * s)


def data_log_density(s, a):
    """log beta(a|s): two branches of equal shares, 0.4 above and below the middle of the hole."""
    u = a - center(s)
    log_std = torch.tensor(WIDTH).log()
    upper = normal_log_prob(u, 0.4, log_std)
    lower = normal_log_prob(u, -0.4, log_std)
    return torch.logaddexp(upper, lower) - math.log(2)


def bandit(rows):
    """Data of `rows` episodes of one step each."""
    s = 2 * torch.rand(rows, 1) - 1
    branch = 0.8 * torch.randint(2, (rows, 1)) - 0.4
    noise = WIDTH * torch.randn(rows, 1)
    u = branch + noise
    r = 10 * u + 3 * torch.cos(2 * math.pi * u / 0.8)
    a = center(s) + u
    return Data(s, a, r.squeeze(1), s.clone(), torch.ones(rows))


def normalized(log_density):
    """log-probabilities (S, G) of the cells, which add up to 1 in every state."""
    return log_density - log_density.logsumexp(1, keepdim=True)


def squashed(mean, log_std):
    """log-probabilities (S, G) of the tanh of a Gaussian (S, 1)."""
    x = torch.atanh(ACTIONS)
    log_prob = normal_log_prob(x, mean, log_std)
    return normalized(log_prob - tanh_log_det(x))


def kl(p, q):
    """KL(p | q) in nats, the mean over states, of log-probabilities (S, G)."""
    in_state = (p.exp() * (p - q)).sum(1)
    return in_state.mean().item()


def learned(lam, seed, args):
    """`densities` after training."""
    torch.manual_seed(seed)
    data = bandit(args.rows)
    run = Plain()
    how = fisher_brc.Args(lam=lam, steps=args.steps, bc_steps=args.steps, seed=seed, **FLAGS)
    torch.manual_seed(seed)
    fisher_brc.train(run, data, how)
    return densities(run.nets)


@torch.no_grad()
def densities(nets):
    """log-probabilities (S, G) of the actor and of exp(Q), and the temperature."""
    s = nets.scaling.obs(STATES)
    actor = squashed(*nets.pi(s))
    each = s.repeat_interleave(len(ACTIONS), 0)
    a = ACTIONS.repeat(len(s))[:, None]
    q = fisher_brc.q(nets, each, a).amin(0)
    q = q.view(len(s), len(ACTIONS))
    return actor, normalized(q), nets.log_temperature.exp()


def main(args):
    figure = matplotlib.figure.Figure((8, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    beta = normalized(data_log_density(STATES, ACTIONS))
    for axes, lam in zip(panels.flat, args.lambdas):
        for seed in args.seeds[::-1]:
            actor, target, temperature = learned(lam, seed, args)
            tempered = normalized(target / temperature)
            title = f"λ = {lam:g}: KL {kl(actor, target):.2f}"
            title += f"\nfrom exp(Q / {temperature:.2f}): {kl(actor, tempered):.2f}"
            print(f"seed {seed}, {title}", flush=True)
        lines = {
            "data": (beta, "0.6"),
            "exp(O + log μ)": (target, "tab:blue"),
            "actor": (actor, "tab:red"),
        }
        for label, (log_prob, color) in lines.items():
            p = log_prob[len(STATES) // 2].exp()
            density = p * len(ACTIONS) / 2
            axes.plot(ACTIONS, density, c=color, lw=2, label=label)
        axes.set_title(title, fontsize=11)
        axes.set(xlim=(-1, 1), ylim=(0, 10), xticks=(-1, -0.5, 0, 0.5, 1))
        axes.set(xlabel="action a", ylabel="density at s = 0")
    panels[0, 1].legend()
    figure.suptitle("Fisher-BRC's actor and exp(O + log μ), normalized", fontweight="bold")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
