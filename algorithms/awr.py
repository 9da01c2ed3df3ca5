"""Advantage-weighted regression, AWR (Peng, Kumar, Zhang & Levine, 2019; arXiv:1910.00177).

Idea: clone the data's actions, each weighted by the exponential of its advantage. This fits the
actor to the best policy within a certain KL divergence from pi_beta, the policy that made the data.

    pi*(a|s) = exp(Q(s,a) / temperature) pi_beta(a|s) / Z(s)                (11)
    L_pi = -E[ min(exp(A / temperature), max_weight) log pi(a|s) ]          (16)

The advantage A = G - V(s) stands for Q(s,a) - V(s); it comes from the data's own returns G:

    G_t = r_t + gamma ((1 - td_lambda) V(s_t+1) + td_lambda G_t+1)          (TD(lambda) return)
    L_V = E[ (V(s) - G)^2 ] / 2                                             (baseline)

The numbers (11) and (16) are those of S. Park's notes "Offline RL", Section 2.2, whose lambda is
`temperature` here (https://rail.eecs.berkeley.edu/deeprlcourse/static/sections/section-9.pdf). In
the paper, L_V and L_pi are the two regressions of Algorithm 1, the temperature is called beta, and
A is R - V. Z(s) makes pi* a density.

At a terminal row, V(s_t+1) and G_t+1 count as 0; at the last row of an episode that was cut off,
G_t+1 is V(s_t+1). G and A are tables with one number for each row. Every `returns_every` steps they
are computed again from the current V, and A is then shifted and scaled to mean 0 and deviation 1
over the dataset.

AWR never values an action outside the data, and one temperature fits rewards of any scale, because
A is scaled. It is one step of policy improvement: where good paths must be stitched together from
several episodes, awac.py and iql.py can do more.

What changes scores (more in DEPARTURES, at the foot of the file):
- A is standardized and the temperature is 1, as in the authors' code; the paper has raw advantages
  and 0.05.
- The dataset is fixed, V and the actor step together, and the tables are computed every 2,000
  steps. The authors train online, alternating between new data, V and the actor.
- Networks have two layers of 256 units and are trained by Adam. The authors' have layers of 128 and
  64 units and are trained by SGD with momentum.
- The actor's deviation is learned; the authors fix it.

    python algorithms/awr.py  # 25k steps: 90.7 ± 6.1, hopper-medium-expert-demo, 3 seeds
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import BatchSize, Count, Number, Positive, Seed, Share, ShareBelow1
from common import MLP, Adam, Data, RunArgs, ScalarMLP, Scaling
from common import graphed, minimize, normal_log_prob, normalize_obs, polyak, sample


@dataclass
class Args(RunArgs):
    env: str = "hopper-medium-expert-demo"
    """dataset: bundled, D4RL or OGBench name, Minari id, or path of an .hdf5 or .npz file"""
    seed: Seed = 0
    """seeds networks, batches and evaluation"""
    steps: Count = 1_000_000
    """gradient steps"""
    batch_size: BatchSize = 256
    """transitions per gradient step"""
    eval_every: Count = 5_000
    """gradient steps between evaluations"""
    temperature: Positive = 1.0
    """lambda of Eq. 16: very large is cloning; near 0, only rows above the baseline are cloned"""
    max_weight: Positive = 20.0
    """largest weight of a row (Eq. 16); 1 drops bad actions and favors no good ones"""
    normalize_advantage: bool = True
    """shift and scale advantages to mean 0 and deviation 1 over the data"""
    td_lambda: Share = 0.95
    """lambda of the TD(lambda) returns: 0 is r + gamma V(s'), 1 is the Monte-Carlo return"""
    returns_every: Count = 2_000
    """gradient steps between two computations of the tables of returns and advantages"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    lr: Positive = 3e-4
    """Adam's learning rate of the actor and the value network"""
    hidden: Count = 256
    """hidden units in each layer of every network"""
    normalize_obs: bool = True
    """shift and scale observations to mean 0 and deviation 1 over the data"""
    reward_shift: Number = 0.0
    """added to every reward"""


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        hidden = args.hidden
        self.scaling = Scaling(data)
        self.actor = MLP(obs_dim, hidden, hidden, act_dim)
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.v = ScalarMLP(obs_dim, hidden, hidden)
        self.v_target = copy.deepcopy(self.v).requires_grad_(False)  # V at the last tables

    def pi(self, s):
        """Mean (B, A) and log-std (A,) of the actor's Gaussian, which tanh does not squash."""
        mean = self.actor(s).tanh()
        return mean, self.log_std.clamp(-5, 2)


@dataclass
class Tables(Data):
    """The data, with the return and the advantage of every row."""

    returns: Tensor = None  # (N,) G
    advantage: Tensor = None  # (N,) A


def lambda_returns(r, v2, terminal, last, args):
    """TD(lambda) returns of all rows; all tensors (N,). `last` marks the last row of every episode.

    The definition has the form G_t = b_t + c_t G_t+span with a span of 1, where c_t is 0 in the
    last row of an episode. Each pass puts this equation into itself, which doubles the span:
    G_t = b_t + c_t b_t+span + c_t c_t+span G_t+2span. After log2 N passes, b is G exactly."""
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
    """Compute G and A of every row from nets.v_target into data.returns and data.advantage."""
    last = data.episode.diff(append=data.episode[-1:] + 1) != 0  # (N,)
    v, v_end = (
        torch.cat([nets.v_target(s) for s in obs.split(1 << 14)])
        for obs in (data.obs, data.next_obs[last])
    )
    v2 = v.roll(-1)  # V(s') is V of the next row, except where an episode ends
    v2[last] = v_end
    returns = lambda_returns(data.reward, v2, data.terminal, last, args)
    data.returns.copy_(returns)
    data.advantage.copy_(returns - v)
    if args.normalize_advantage:
        std, mean = torch.std_mean(data.advantage, correction=0)
        data.advantage.sub_(mean).div_(std + 1e-5)  # the authors' 1e-5


def value_loss(nets, s, g):
    """Baseline: half the squared error of V(s) as a prediction of the returns g (B,)."""
    return (nets.v(s) - g).square().mean() / 2


def awr_loss(nets, s, a, advantage, args):
    """Eq. 16, whose optimum is Eq. 11; A (B,) is a constant. Also returns the weights (B,)."""
    weight = (advantage / args.temperature).exp().clamp(max=args.max_weight)
    mean, log_std = nets.pi(s)
    log_prob = normal_log_prob(a, mean, log_std).sum(-1)  # (B,)
    return -(weight * log_prob).mean(), weight


def update(nets, opt, data, args):
    """One step of V, and one of the actor."""
    fields = "obs", "action", "returns", "advantage"
    s, a, g, advantage = sample(data, args.batch_size, fields)
    loss = value_loss(nets, s, g)
    v_loss = minimize(opt.v, loss)
    loss, weight = awr_loss(nets, s, a, advantage, args)
    pi_loss = minimize(opt.actor, loss)
    square = weight.square().mean().clamp(min=1e-30)  # all weights may underflow to 0
    return {
        "v_loss": v_loss,
        "pi_loss": pi_loss,
        "capped_weights": (weight >= args.max_weight).float().mean(),
        "effective_share": weight.mean().square() / square,
        "log_std": nets.log_std.detach().mean(),
    }


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    mean, _ = nets.pi(nets.scaling.obs(obs))
    return nets.scaling.action(mean)


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
    data.reward += args.reward_shift
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(
        v=Adam(nets.v.parameters(), args.lr),
        actor=Adam([*nets.actor.parameters(), nets.log_std], args.lr),
    )
    run.start(nets, opt)
    zeros = torch.zeros_like(data.reward)
    data = Tables(**vars(data), returns=zeros, advantage=zeros.clone())
    tabulate(nets, data, args)  # v_target is in the checkpoint: a resumed run repeats this
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        metrics = step()
        if t % args.returns_every == 0:
            polyak(nets.v_target, nets.v, 1.0)
            tabulate(nets, data, args)
        run.after(t, metrics, lambda obs: policy(nets, obs, args))


DEPARTURES = """
The authors' code, against the paper:
- A is standardized and the temperature is 1; the paper has raw advantages and 0.05. The bound of 20
  on the weights is in both.

This file, against the authors' code:
- The code trains online: it collects 2,048 steps, trains V for 200 steps and then, on new tables,
  the actor for 1,000. Here the dataset is fixed, V and the actor step together, and the tables are
  computed every 2,000 steps. The first tables are those of an untrained V.
- Networks have two layers of 256 units, PyTorch's default weights and Adam. The authors' have
  layers of 128 and 64 units, Xavier's weights and SGD with momentum.
- The actor's mean goes through tanh; the authors add a penalty where it leaves the bounds.
- The deviation is learned and the same in every state; the authors fix it, at 0.4 in most tasks.
- V is learned in units of reward; the authors learn it in units of 1 / (1 - gamma).
- Observations are normalized by the statistics of the dataset; the authors' are running statistics.
- The last row of an episode that a time limit ended is kept only where the data has its next
  observation. In the authors' code it always has one, because they collect the episodes themselves.
- Neither the paper nor its code has AntMaze. The reward shift of -1 there is IQL's.
"""

PRESETS = {
    "hopper-replay-demo": dict(  # shortened, with sharper weights
        temperature=0.3, steps=30_000, eval_every=1_500, returns_every=1_000
    ),
    "hopper-medium-expert-demo": dict(steps=25_000, eval_every=1_250),  # shortened
    "antmaze-*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
    "pointmaze-stitch-demo": dict(  # shortened, with AntMaze's reward shift
        reward_shift=-1.0, steps=12_000, eval_every=600, returns_every=1_000, eval_episodes=20
    ),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)
