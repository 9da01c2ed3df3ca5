"""BRAC+'s claim that its bound D(s) in closed form is less noisy than sampled log-densities.

In each of 200 states of the data, D(s) is estimated 200 times by brac_plus.py's kl_bound, with one
latent and with five, and 200 times with log pi - log p in place of KL(pi || p). The means of D over
all states are printed. They differ a little, because the latent is drawn for the very action at
which p is taken. The policy is BRAC+'s first one, which minimizes D, or this policy moved by one
deviation in every action dimension, as RL may move it.

Differs: the papers claim this in words alone. The clone and the first policy are those of
figures/brac_plus_multiplier.py, with 1,500 steps each.

    python figures/brac_plus_noise.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import brac_plus_multiplier
import matplotlib.figure
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
import brac_plus

from common import normal_log_prob
from run import load


@dataclass
class Args:
    env: str = "hopper-replay-demo"
    """dataset"""
    bc_steps: int = 1_500
    """gradient steps of the clone, and again of the first policy"""
    states: int = 200
    """of the data, in which D is estimated"""
    estimates: int = 200
    """of D in every state"""
    out: str = "figures/brac_plus_noise.png"
    """where the picture goes"""


def sampled_bound(nets, s, x, mean, log_std):
    """D (n, B) as kl_bound has it with one clone and one latent, but with log pi - log p at the
    action in place of KL(pi || p)."""
    n = len(x)
    flat = x.flatten(0, 1)
    s = s.repeat(n, 1)
    latent = nets.behavior.encoder(flat, s)
    q_mean, q_log_std = brac_plus.gaussian(latent)  # (1, nB, Z)
    z = q_mean + q_log_std.exp() * torch.randn_like(q_mean)
    p_mean, p_log_std = brac_plus.decode(nets, z, s)
    log_p = normal_log_prob(flat, p_mean, p_log_std).sum(-1)
    log_p = log_p.view(n, -1)
    log_pi = normal_log_prob(x, mean, log_std).sum(-1)
    latent_kl = brac_plus.normal_kl(q_mean, q_log_std)
    return log_pi - log_p + latent_kl.view(n, -1)


@torch.no_grad()
def estimates(nets, s, shift, args):
    """{way: D (estimates, states)}, the policy's mean moved by `shift` deviations."""
    how = brac_plus_multiplier.setting()
    mean, log_std = brac_plus.policy_gaussian(nets.actor, s, args.estimates)
    mean = mean + shift * log_std.exp()
    x = mean + log_std.exp() * torch.randn_like(mean)
    found = {"sampled log-densities": sampled_bound(nets, s, x, mean, log_std)}
    for how.samples, name in ((1, "closed form, 1 latent"), (5, "closed form, 5 latents")):
        found[name] = brac_plus.kl_bound(nets, s, x, mean, log_std, how)
    return found


def main(args):
    torch.manual_seed(0)
    data, _ = load(args.env, "cpu", "none")
    data.reward.sub_(data.reward.min()).div_(data.reward.max())
    nets = brac_plus_multiplier.start(data, args)
    drawn = torch.randperm(len(data.obs))[: args.states]
    s = data.obs[drawn]
    figure = matplotlib.figure.Figure((8, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {0.0: "the first policy", 1.0: "moved by one deviation"}
    for panel, (shift, title) in zip(panels, titles.items()):
        for name, d in estimates(nets, s, shift, args).items():
            noise = d.std(0).sort().values
            label = f"{name}: {noise.median():.2f}"
            print(f"{title}: {label}, mean of D {d.mean():.2f}")
            share = torch.linspace(0, 1, len(noise))
            panel.plot(noise, share, lw=2, label=label)
        panel.axhline(0.5, c="0.6", lw=1, ls=":")
        panel.set(title=title, xscale="log")
        panel.set_xlabel("deviation of D(s) in a state [nats]")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), title="medians")
    panels[0].set_ylabel("share of states below")
    title = "BRAC+'s bound in closed form is less noisy than sampled log-densities"
    figure.suptitle(title, fontweight="bold")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
