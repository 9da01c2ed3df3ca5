"""Behavior cloning, BC, and best-X% BC: the column that every table needs.

Idea: regress the data's actions on its observations; keep, if asked, only the episodes of highest
return.

    L_pi = E[ (pi(s) - a)^2 ], pi(s) a tanh network                          (deterministic)
    L_pi = E[ -log N(a; pi(s), sigma) ], sigma free of s, in [exp(-5), exp(2)] (--gaussian)

The mean is over batch and action dimensions in the first form; the log-density of the second is a
sum over dimensions. Both act by pi(s). With --top 0.1, 10% BC: whole episodes, ranked by their
undiscounted return, max(1, 10%) of them kept.

Departures: none from CORL's BC, except that episodes are cut where the data ends them. CORL cuts
after rows have been dropped, which shifts time-limited episodes by one row each, and drops the last
episode where the data breaks off within it.

    python algorithms/bc.py --env hopper-medium-v2 --top 0.1  # no flags: 8 ± 4, 3 seeds, 1 min
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import (
    MLP,
    Adam,
    InputError,
    Scaling,
    graphed,
    load_dataset,
    minimize,
    normal_log_prob,
    normalize_obs,
    parse,
    sample,
)
from experiment import Run


@dataclass
class Args:
    env: str = "hopper-replay-demo"
    """dataset: bundled name, D4RL name, Minari id, or path of an .hdf5 or .npz file"""
    seed: int = 0
    """seeds networks, batches and evaluation"""
    steps: int = 1_000_000
    """gradient steps"""
    batch_size: int = 256
    """transitions per gradient step"""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one"""
    precision: str = "auto"
    """fp32 products: highest, high, medium, or auto: the fastest that does not round"""
    compile: bool = False
    """compile the whole update: faster after half a minute"""
    eval_every: int = 5_000
    """gradient steps between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation"""
    eval_env: str | None = None
    """Gymnasium id to evaluate in; None: the dataset's own task; "none": no evaluation"""
    log_every: int = 1_000
    """gradient steps between rows of train.csv"""
    save_every: int = 50_000
    """gradient steps between checkpoints"""
    out: str = "runs"
    """folder of all runs"""
    name: str = ""
    """suffix of the run's folder, tells variants apart"""
    resume: bool = False
    """continue this run from its checkpoint"""
    overwrite: bool = False
    """replace this run's folder"""
    track: bool = False
    """mirror the logs to Weights & Biases"""

    top: float = 1.0
    """share of the episodes that is cloned, best returns first; 1 is plain BC"""
    gaussian: bool = False
    """maximize a Gaussian's likelihood instead of minimizing the squared error"""
    lr: float = 3e-4
    """Adam's learning rate"""
    normalize_obs: bool = True
    """shift and scale observations to mean 0, deviation 1 over the cloned data"""


PRESETS = {
    "hopper-replay-demo": dict(steps=20_000, eval_every=2_000),  # shortened
    "antmaze-*": dict(eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(eval_every=100_000, eval_episodes=100),
}


class Nets(nn.Module):
    """Every network; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        self.actor = MLP(obs_dim, 256, 256, act_dim)
        self.log_std = nn.Parameter(torch.zeros(act_dim))


def keep_best(data, top):
    """Keep the best max(1, top x E) episodes, in their order and renumbered; changes `data`."""
    keep = max(1, int(top * len(data.episode_return)))
    best = data.episode_return.argsort(descending=True)[:keep].sort().values
    rows = torch.isin(data.episode, best)
    for name in ("obs", "action", "reward", "next_obs", "terminal", "episode"):
        setattr(data, name, getattr(data, name)[rows])
    data.episode = torch.searchsorted(best, data.episode)
    data.episode_return = data.episode_return[best]


def actor_loss(nets, s, a, args):
    """The squared error, or the Gaussian's negative log-likelihood."""
    mean = nets.actor(s).tanh()
    if args.gaussian:
        log_std = nets.log_std.clamp(-5, 2)
        return -normal_log_prob(a, mean, log_std).sum(-1).mean()
    return (mean - a).square().mean()


def update(nets, opt, data, args):
    """One step of the actor."""
    s, a = sample(data, args.batch_size, ("obs", "action"))
    return {"actor_loss": minimize(opt.actor, actor_loss(nets, s, a, args))}


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    return nets.scaling.action(nets.actor(nets.scaling.obs(obs)).tanh())


def train(args):
    """Train, log and save; returns the mean score of the last 10 evaluations."""
    if not 0 < args.top <= 1:
        raise InputError(f"--top is {args.top}: give a share of the episodes, above 0 and up to 1")
    run = Run(args)
    data, task = load_dataset(args.env, run.device, args.eval_env)
    keep_best(data, args.top)
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    params = [*nets.actor.parameters(), *([nets.log_std] if args.gaussian else [])]
    opt = SimpleNamespace(actor=Adam(params, args.lr))
    run.start(data, task, nets, opt)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        run.after(t, step(), lambda obs: policy(nets, obs, args))
    return run.finish()


if __name__ == "__main__":
    train(parse(Args, PRESETS))
