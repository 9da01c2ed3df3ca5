"""Advantage-weighted regression, AWR (Peng, Kumar, Zhang & Levine, 2019; arXiv:1910.00177).

Idea: clone the data's actions, each weighted by the exponential of its advantage: the projection
of the best policy within a KL ball around the data's policy beta. The numbers are those of
Section 2.2 of S. Park's lecture notes "Offline RL", whose lambda is `temperature` here.

    pi*(a|s) = exp(Q(s,a) / temperature) beta(a|s) / Z(s)                   (11)
    L_pi = -E[ min(exp(A(s,a) / temperature), max_weight) log pi(a|s) ]     (16)

--advantage returns, the paper's: A = G - V(s), standardized over the whole dataset,

    G_t = r_t + gamma ((1 - td_lambda) V(s_t+1) + td_lambda G_t+1)          (TD(lambda) return)
    L_V = E[ (V(s) - G)^2 ] / 2                                             (baseline)

with V = 0 after a terminal, and G_t+1 = V(s') where an episode was cut at row t. G and A are
tables, made anew from V every `returns_every` steps. --advantage q, learned off-policy:

    y   = r + gamma min_i Q'_i(s', a'), a' ~ pi(s')                         (AWAC target)
    L_Q = E[ sum_i (Q_i(s,a) - y)^2 ]                                       (AWAC critics)
    A   = min_i Q_i(s,a) - min_i Q_i(s, a_pi), a_pi ~ pi(s)                 (AWAC advantage)

The default is `returns`: it never values an action outside the data, and its temperature fits
rewards of any scale. It is one step of policy improvement; where good paths must be stitched, q
can do more, at a temperature in units of reward. AWAC (Nair et al., 2020; arXiv:2006.09359) is
--advantage q; with --max-weight 100 and --temperature 0.333 (locomotion) or 0.1 in CORL.

Departures, theirs in parentheses. From the paper: A is standardized, its temperature is 1 and its
weight at most 20, as in the authors' code (raw A, 0.05, no bound). From that code, which trains
online: a fixed dataset; V and actor step together, on tables made every 2,000 steps, first of an
untrained V (200 steps of V, then 1,000 of the actor, on new tables each); 256-256 networks by Adam
(128-64, SGD with momentum) with nn.Linear's initialization (Xavier); the mean through tanh (penalty
beyond the bounds); learned std (fixed 0.4); V in units of reward (of 1 / (1 - gamma)). From CORL's
AWAC: two hidden layers (three), the mean through tanh (linear), log-std at least -5 (-20). Rows cut
by a time limit are kept where the data has their next observation.

    python algorithms/awr.py --env hopper-medium-replay-v2  # no flags: 30 ± 4, 3 seeds, 4 min
"""

import copy
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

    advantage: str = "returns"
    """where A comes from: returns (of the data, the paper's) or q (learned off-policy, AWAC's)"""
    temperature: float = 1.0
    """lambda of Eq. 16: infinity is cloning; near 0, rows above the baseline are cloned alone"""
    max_weight: float = 20.0
    """largest weight of a row (Eq. 16); 1 drops bad actions and favors no good ones"""
    normalize_advantage: bool = True
    """returns only: shift and scale A to mean 0, deviation 1 over the dataset"""
    td_lambda: float = 0.95
    """lambda of the returns: 0 is r + gamma V(s'), 1 is Monte-Carlo"""
    returns_every: int = 2_000
    """gradient steps between two tables of returns and advantages"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.005
    """q only: share of the online critics that targets take over per step"""
    lr: float = 3e-4
    """Adam's learning rate, actor and critic"""
    normalize_obs: bool = True
    """shift and scale observations to mean 0, deviation 1 over the data"""
    reward_shift: float = 0.0
    """added to every reward"""


PRESETS = {
    "hopper-replay-demo": dict(steps=60_000, eval_every=3_000, returns_every=1_000),  # shortened
    "antmaze-*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
}


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        self.actor = MLP(obs_dim, 256, 256, act_dim)
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        if args.advantage == "returns":
            self.v = ScalarMLP(obs_dim, 256, 256)
            self.v_target = copy.deepcopy(self.v).requires_grad_(False)  # V as of the last table
        else:
            self.q = ScalarMLP(obs_dim + act_dim, 256, 256, members=2)
            self.q_target = copy.deepcopy(self.q).requires_grad_(False)

    def pi(self, s):
        """Mean (B, A) and log-std (A,) of the actor's Gaussian, which tanh does not squash."""
        return self.actor(s).tanh(), self.log_std.clamp(-5, 2)


def lambda_returns(r, v2, terminal, last, args):
    """TD(lambda) returns of all rows, all (N,); `last` marks the last row of every episode.

    G_t = b_t + c_t G_t+1 with c = 0 there. After pass k, b and c span 2^k rows, so log2 N passes
    are exact for episodes of any length."""
    c = args.gamma * args.td_lambda * (1 - terminal) * ~last
    b = r + (args.gamma * (1 - terminal) - c) * v2
    span = 1
    while span < len(r):
        b[:-span] += c[:-span] * b[span:]
        c[:-span] = c[:-span] * c[span:]
        span *= 2
    return b


@torch.no_grad()
def tabulate(nets, data, args):
    """G and A of every row by nets.v_target, into data.returns and data.advantage in place."""
    last = data.episode.diff(append=data.episode[-1:] + 1) != 0  # (N,)
    v, v_end = (
        torch.cat([nets.v_target(s) for s in obs.split(1 << 14)])
        for obs in (data.obs, data.next_obs[last])
    )
    v2 = v.roll(-1)  # V(s') is that of the next row, but where an episode ends
    v2[last] = v_end
    data.returns.copy_(lambda_returns(data.reward, v2, data.terminal, last, args))
    data.advantage.copy_(data.returns - v)
    if args.normalize_advantage:
        std, mean = torch.std_mean(data.advantage, correction=0)
        data.advantage.sub_(mean).div_(std + 1e-5)  # authors' code


def value_loss(nets, s, g):
    """Baseline: V(s) regressed on the returns g (B,)."""
    return (nets.v(s) - g).square().mean() / 2


def sample_action(mean, log_std):
    """Actions (B, A) of the Gaussian, clipped to the bounds."""
    return (mean + log_std.exp() * torch.randn_like(mean)).clamp(-1, 1)


def critic_loss(nets, s, a, r, s2, terminal, args):
    """AWAC target and critics, sum over critics of the mean over the batch; also the mean of Q."""
    with torch.no_grad():
        a2 = sample_action(*nets.pi(s2))
        y = r + args.gamma * (1 - terminal) * nets.q_target(s2, a2).amin(0)  # (B,)
    q = nets.q(s, a)  # (2, B)
    return (q - y).square().mean(1).sum(), q.detach().mean()


@torch.no_grad()
def q_advantage(nets, s, a, pi):
    """AWAC advantage (B,), by the online critics; the baseline is that of one action of pi."""
    actions = torch.cat([a, sample_action(*pi)])
    q, v = nets.q(torch.cat([s, s]), actions).amin(0).chunk(2)
    return q - v


def awr_loss(pi, a, advantage, args):
    """Eq. 16, whose optimum is Eq. 11, for A (B,) a constant; also returns the weights (B,)."""
    weight = (advantage / args.temperature).exp().clamp(max=args.max_weight)
    log_prob = normal_log_prob(a, *pi).sum(-1)  # (B,)
    return -(weight * log_prob).mean(), weight


def update(nets, opt, data, args):
    """One step of V or Q, and one of the actor."""
    if args.advantage == "returns":
        fields = "obs", "action", "returns", "advantage"
        s, a, g, advantage = sample(data, args.batch_size, fields)
        pi = nets.pi(s)
        metrics = {"v_loss": minimize(opt.v, value_loss(nets, s, g))}
    else:
        s, a, r, s2, terminal = sample(data, args.batch_size)
        pi = nets.pi(s)  # shared by the baseline's action and the actor's loss
        loss, q_mean = critic_loss(nets, s, a, r, s2, terminal, args)
        metrics = {"q_loss": minimize(opt.q, loss), "q_mean": q_mean}
        advantage = q_advantage(nets, s, a, pi)
        metrics["advantage"] = advantage.mean()
        polyak(nets.q_target, nets.q, args.polyak)
    loss, weight = awr_loss(pi, a, advantage, args)
    metrics["actor_loss"] = minimize(opt.actor, loss)
    metrics["capped_weights"] = (weight >= args.max_weight).float().mean()
    square = weight.square().mean().clamp(min=1e-30)  # all weights may underflow
    metrics["effective_share"] = weight.mean().square() / square
    return metrics | {"log_std": nets.log_std.detach().mean()}


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    return nets.scaling.action(nets.pi(nets.scaling.obs(obs))[0])


def train(args):
    """Train, log and save; returns the mean score of the last 10 evaluations."""
    if args.advantage not in ("returns", "q"):
        raise InputError(f"--advantage is {args.advantage!r}: give returns or q")
    if not (args.temperature > 0 and args.max_weight > 0):
        raise InputError(
            f"--temperature is {args.temperature}, --max-weight is {args.max_weight}: "
            "give numbers above 0"
        )
    if not 0 <= args.td_lambda <= 1:
        raise InputError(f"--td-lambda is {args.td_lambda}: give a number from 0 to 1")
    run = Run(args)
    data, task = load_dataset(args.env, run.device, args.eval_env)
    data.reward += args.reward_shift
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(actor=Adam([*nets.actor.parameters(), nets.log_std], args.lr))
    critic = "v" if args.advantage == "returns" else "q"
    setattr(opt, critic, Adam(getattr(nets, critic).parameters(), args.lr))
    run.start(data, task, nets, opt)
    if args.advantage == "returns":
        data.returns, data.advantage = data.reward.new_zeros(2, len(data.reward))
        tabulate(nets, data, args)  # of v_target: after --resume, the same tables again
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        metrics = step()
        if args.advantage == "returns" and t % args.returns_every == 0:
            polyak(nets.v_target, nets.v, 1.0)
            tabulate(nets, data, args)
        run.after(t, metrics, lambda obs: policy(nets, obs, args))
    return run.finish()


if __name__ == "__main__":
    train(parse(Args, PRESETS))
