"""Implicit Q-Learning, IQL (Kostrikov, Nair & Levine, ICLR 2022; arXiv:2110.06169).

Idea: back up through an upper expectile of Q over the data's actions, so that no action outside
the data is ever evaluated; then clone the actions that beat it.

    L_V  = E[ |tau - 1(u < 0)| u^2 ],  u = min_i Q'_i(s,a) - V(s)            (5)
    L_Q  = E[ sum_i (r + gamma V(s') - Q_i(s,a))^2 ]                         (6)
    L_pi = -E[ exp(beta u) log pi(a|s) ]                                     (7)

Each iteration steps V, actor, Q, targets; u of (7) and V(s') of (6) are those of V after its step.
pi is a Gaussian, not squashed: its mean is a tanh network, its deviation free of s. It acts by its
mean. (7) is advantage-weighted regression, AWR; any other extraction leaves V and Q as they are.
--extraction ddpg_bc takes the AC+BC form instead, for a deterministic actor:

    L_pi = -E[Q] / mean |Q| - alpha_bc E[ log N(a; pi(s), 1) ],
           Q = min_i Q_i(s, pi(s)), the divisor detached                     (DDPG+BC actor)

Departures: exp(beta u) is capped at 100, and locomotion's rewards, divided by the gap between the
best and the worst episode's return, are multiplied by 1,000 (authors' code for both). Rows cut by
a time limit are kept where the data has their next observation (the authors' loader drops them),
and actions at a bound stay there (it moves them inward by 1e-5; this density needs no such thing).
CORL's default recipe, here that of hopper/* and halfcheetah/*, is --normalize-obs
--no-normalize-reward: the raw rewards of locomotion make beta larger.
Adroit's v1 rows are CORL's too. DDPG+BC is not in the paper: loss and alpha_bc are OGBench's, but
the mean is a tanh and the actor's learning rate falls (OGBench: neither). The paper has no point
mazes; ours, sparse rewards of 0 and 1 like AntMaze's, take AntMaze's settings.

    python algorithms/iql.py --env hopper-medium-v2  # no flags: 19 ± 1, 3 seeds, 4 min
"""

import copy
import math
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
    ScalarMLP,
    Scaling,
    graphed,
    load_dataset,
    minimize,
    normal_log_prob,
    normalize_obs,
    orthogonal_,
    parse,
    polyak,
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

    tau: float = 0.7
    """expectile (Eq. 5): 0.5 is the mean, 1 the maximum over the data's actions"""
    extraction: str = "awr"
    """how the actor follows Q: awr (Eq. 7) or ddpg_bc"""
    beta: float = 3.0
    """inverse temperature of awr (Eq. 7): 0 is behavior cloning"""
    max_weight: float = 100.0
    """cap of awr's exp(beta u)"""
    alpha_bc: float = 0.3
    """weight of cloning in ddpg_bc: 0 is DDPG, infinity is behavior cloning"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.005
    """share of the online critics that targets take over per step"""
    lr: float = 3e-4
    """Adam's learning rate; the actor's falls to 0 along a cosine over all steps"""
    dropout: float = 0.0
    """share of the actor's hidden units dropped in its loss, never when it acts"""
    normalize_obs: bool = False
    """shift and scale observations to mean 0, deviation 1 over the data"""
    normalize_reward: bool = False
    """divide rewards by (best - worst episode return) / 1000"""
    reward_shift: float = 0.0
    """added to every reward"""


PRESETS = {
    "halfcheetah-*": dict(normalize_reward=True),
    "hopper-*": dict(normalize_reward=True),
    "walker2d-*": dict(normalize_reward=True),
    "hopper/*": dict(normalize_obs=True),
    "halfcheetah/*": dict(normalize_obs=True),
    "mujoco/halfcheetah/*": dict(normalize_reward=True),
    "mujoco/hopper/*": dict(normalize_reward=True),
    "mujoco/walker2d/*": dict(normalize_reward=True),
    "hopper-replay-demo": dict(steps=30_000, eval_every=3_000),  # shortened
    "antmaze-*": dict(tau=0.9, beta=10.0, reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(
        tau=0.9, beta=10.0, reward_shift=-1.0, eval_every=100_000, eval_episodes=100
    ),
    **dict.fromkeys(  # mazes with sparse rewards of 0 and 1
        ("pointmaze/*",)
        + tuple(f"D4RL/pointmaze/{size}-v*" for size in ("open", "umaze", "medium", "large")),
        dict(tau=0.9, beta=10.0, alpha_bc=0.003, reward_shift=-1.0),
    ),
    **dict.fromkeys(
        [
            pattern.format(task)
            for pattern in ("{}-*", "{}/*", "D4RL/{}/*")
            for task in ("pen", "door", "hammer", "relocate", "kitchen")
        ],
        dict(beta=0.5, dropout=0.1),
    ),
    **dict.fromkeys(  # CORL's for its version of the data
        [f"{task}-*-v1" for task in ("pen", "door", "hammer", "relocate")],
        dict(tau=0.8, beta=3.0),
    ),
}


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        self.actor = MLP(obs_dim, 256, 256, act_dim)
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.v = ScalarMLP(obs_dim, 256, 256)
        self.q = ScalarMLP(obs_dim + act_dim, 256, 256, members=2)
        for net in (self.actor, self.v, self.q):
            orthogonal_(net, hidden_gain=math.sqrt(2), last_gain=math.sqrt(2))
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)

    def pi(self, s, dropout=0.0):
        """The actor's mean (B, A); `dropout` is the share of hidden units that is zeroed."""
        *hidden, (w_last, b_last) = zip(self.actor.weights, self.actor.biases)
        x = s
        for w, b in hidden:
            x = torch.addmm(b, x, w).relu_()
            if dropout:
                x = x * (torch.rand_like(x) >= dropout) / (1 - dropout)
        return torch.addmm(b_last, x, w_last).tanh()


def scale_rewards(data, args):
    """The rewards that are learned from; changes data.reward, not data.episode_return."""
    scale = 1.0
    if args.normalize_reward:
        gap = data.episode_return.max() - data.episode_return.min()
        if gap == 0:
            raise InputError(
                f"{data.name}: all episodes have the same return, which --normalize-reward "
                "divides by the gaps of: add --no-normalize-reward"
            )
        scale = 1000 / gap
    data.reward = data.reward * scale + args.reward_shift


def value_loss(nets, s, q, args):
    """Eq. 5, for q = min_i Q'_i(s,a)."""
    u = q - nets.v(s)  # (B,)
    return ((args.tau - (u < 0).to(u.dtype)).abs() * u.square()).mean()


def awr_loss(nets, s, a, u, args):
    """Eq. 7; also returns the weights (B,)."""
    weight = (args.beta * u).exp().clamp(max=args.max_weight)
    log_std = nets.log_std.clamp(-5, 2)  # the authors' bounds
    log_prob = normal_log_prob(a, nets.pi(s, args.dropout), log_std).sum(-1)  # (B,)
    return -(weight * log_prob).mean(), weight


def ddpg_bc_loss(nets, s, a, args):
    """DDPG+BC actor; the log-density without its constant. Also returns the cloning term."""
    pi = nets.pi(s, args.dropout)
    q = nets.q(s, pi).amin(0)  # (B,)
    bc_loss = 0.5 * (a - pi).square().sum(-1).mean()
    return -q.mean() / (q.detach().abs().mean() + 1e-6) + args.alpha_bc * bc_loss, bc_loss.detach()


def critic_loss(nets, s, a, r, v2, terminal, args):
    """Eq. 6, for v2 = V(s'); sum over critics of the mean over the batch."""
    y = r + args.gamma * (1 - terminal) * v2
    return (nets.q(s, a) - y).square().mean(1).sum()


def update(nets, opt, data, args):
    """One iteration of Algorithm 1, in the authors' order."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    with torch.no_grad():
        q = nets.q_target(s, a).amin(0)  # (B,)
    metrics = {"v_loss": minimize(opt.v, value_loss(nets, s, q, args))}
    with torch.no_grad():
        v, v2 = nets.v(torch.cat([s, s2])).chunk(2)  # after its step, for Eqs. 7 and 6
    u = q - v
    if args.extraction == "awr":
        loss, weight = awr_loss(nets, s, a, u, args)
        metrics["capped_weights"] = (weight >= args.max_weight).float().mean()
        square = weight.square().mean().clamp(min=1e-30)  # all weights may underflow
        metrics["effective_share"] = weight.mean().square() / square
        metrics["log_std"] = nets.log_std.detach().mean()
    else:
        loss, metrics["bc_loss"] = ddpg_bc_loss(nets, s, a, args)
    metrics["actor_loss"] = minimize(opt.actor, loss)
    metrics["q_loss"] = minimize(opt.q, critic_loss(nets, s, a, r, v2, terminal, args))
    polyak(nets.q_target, nets.q, args.polyak)
    metrics |= {"v_mean": v.mean(), "v_min": v.amin(), "v_max": v.amax()}
    return metrics | {"q_mean": q.mean(), "advantage": u.mean()}


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    return nets.scaling.action(nets.pi(nets.scaling.obs(obs)))


def train(args):
    """Train, log and save; returns the mean score of the last 10 evaluations."""
    if args.extraction not in ("awr", "ddpg_bc"):
        raise InputError(f"--extraction is {args.extraction!r}: give awr or ddpg_bc")
    if not 0 < args.tau < 1:
        raise InputError(f"--tau is {args.tau}: give a number between 0 and 1, 0.5 for the mean")
    if not 0 <= args.dropout < 1:
        raise InputError(f"--dropout is {args.dropout}: give a share, 0 or above and below 1")
    run = Run(args)
    data, task = load_dataset(args.env, run.device, args.eval_env)
    scale_rewards(data, args)
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    free_std = [nets.log_std] if args.extraction == "awr" else []
    opt = SimpleNamespace(
        v=Adam(nets.v.parameters(), args.lr),
        actor=Adam([*nets.actor.parameters(), *free_std], args.lr),
        q=Adam(nets.q.parameters(), args.lr),
    )
    run.start(data, task, nets, opt)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        opt.actor.lr.fill_(args.lr * (1 + math.cos(math.pi * (t - 1) / args.steps)) / 2)
        run.after(t, step(), lambda obs: policy(nets, obs, args))
    return run.finish()


if __name__ == "__main__":
    train(parse(Args, PRESETS))
