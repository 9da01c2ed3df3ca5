"""BRAC+'s state-wise multiplier (figure 3 of "Going Deeper with Behavior Regularized Offline RL",
2020): the divergence D(s) of the trained policy, with alpha(s) and with one alpha for all states,
which holds D only on average: some states use up the room that others leave.

Both are compared at nearly equal means of D. For this, the threshold eps of one alpha is the mean
of D that alpha(s) has reached, and its rate is large enough that D comes to this threshold.

Differs: the paper's task is unnamed, its run 1M steps; here 1,500 steps each of clone, first policy
and RL, batches of 64, one action per state; eps of alpha(s) is the first policy's D + 1, H0 acml's
(0 before RL). Rates were picked by looking: alpha(s) at 1e-3 oscillates.

    python figures/brac_plus_multiplier.py
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
import brac_plus  # noqa: E402

from run import load  # noqa: E402


@dataclass
class Args:
    env: str = "hopper-replay-demo"
    """dataset"""
    bc_steps: int = 1_500
    """gradient steps of the clone, and again of the first policy"""
    steps: int = 1_500
    """gradient steps of RL, for each kind of multiplier"""
    states: int = 4_000
    """of the data, in the histogram"""
    out: str = "figures/brac_plus_multiplier.png"
    """where the picture goes"""


class OneNumber(torch.nn.Module):
    """Stands where brac_plus.py has the network alpha(s): one alpha, before softplus."""

    def __init__(self):
        super().__init__()
        self.alpha = torch.nn.Parameter(brac_plus.before_softplus(math.log(2)))

    def forward(self, s):
        return self.alpha.expand(len(s))


def setting():
    sizes = dict(batch_size=64, samples=1, members=1, dequantize=0.05, polyak=0.05)
    return brac_plus.Args(beta_start=math.log(2), **sizes)


def optimizers(nets):
    alpha_lr = 3e-2 if isinstance(nets.alpha, OneNumber) else 3e-5
    rates = {"behavior": 1e-3, "q": 1e-3, "actor": 3e-4, "alpha": alpha_lr}
    opt = {k: brac_plus.Adam(getattr(nets, k).parameters(), lr) for k, lr in rates.items()}
    opt["beta"] = brac_plus.Adam([nets.beta], 3e-3)
    init = brac_plus.Adam(nets.actor.parameters(), 1e-3)
    return SimpleNamespace(**opt, init=init, init_beta=opt["beta"])


def start(data, args):
    """Clone and first policy, with eps and H0 set."""
    how = setting()
    nets = brac_plus.Nets(data, how)
    opt = optimizers(nets)
    phases = (
        (brac_plus.update_behavior, opt.behavior),
        (brac_plus.update_first_policy, opt.init),
    )
    for update, adam in phases:
        for t in range(args.bc_steps):
            adam.lr.fill_(1e-3 * (1 - t / args.bc_steps))
            update(nets, opt, data, how)
    nets.h0.copy_(nets.behavior.minus_elbo - data.action.shape[1] * math.log(4))
    nets.eps.copy_(nets.first_d + 1)
    nets.eps_gp.copy_(nets.eps)
    nets.actor_target.load_state_dict(nets.actor.state_dict())
    return nets


def final(nets, data, multiplier, args, eps=None):
    """D (states,) after RL from copies of the networks; `eps` replaces their threshold."""
    torch.manual_seed(1)
    nets = copy.deepcopy(nets)
    if multiplier == "global":
        nets.alpha = OneNumber()
    if eps is not None:
        nets.eps.fill_(eps)
    how = setting()
    opt = optimizers(nets)
    for _ in range(args.steps):
        brac_plus.update(nets, opt, data, how)
    s = data.obs[:: len(data.obs) // args.states][: args.states]
    return brac_plus.divergence(nets, s, 8, how)[2].mean(0).detach()


def main(args):
    torch.manual_seed(0)
    data, _ = load(args.env, "cpu", "none")
    data.reward.sub_(data.reward.min()).div_(data.reward.max())
    nets = start(data, args)
    figure = matplotlib.figure.Figure((8, 4.8), layout="constrained")
    panel = figure.subplots()
    eps = nets.eps.item()
    mean = None
    for multiplier, name in {"state": "α(s)", "global": "one α for all states"}.items():
        d = final(nets, data, multiplier, args, mean)
        mean = d.mean()
        label = f"{name}: mean {mean:.2f}, deviation {d.std():.2f}"
        print(label)
        panel.hist(d.clamp(0, 4 * eps), 80, density=True, alpha=0.6, label=label)
    panel.axvline(eps, c="k", ls="--", label=f"threshold eps of α(s) = {eps:.2f}")
    panel.set(xlim=(0, 4 * eps), ylabel="density over the data's states")
    panel.set_xlabel("divergence D(s) of the policy from the clone (the last bin holds all above)")
    where = f"{args.env}, {args.steps} steps, one seed, rates chosen for the picture"
    panel.set_title(f"At equal means, a state-wise multiplier keeps D(s) nearer to eps\n({where})")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    panel.legend(loc="center right")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
