"""Implicit Q-Learning, IQL (Kostrikov, Nair & Levine, ICLR 2022; arXiv:2110.06169).

Idea: fit V to an upper expectile of Q over the data's actions, and let V make Q's target, so that
no action outside the data is ever evaluated. Then clone the data's actions, the better ones with
more weight.

    L_V  = E[ |tau - 1(u < 0)| u^2 ],  u = min_i Q'_i(s,a) - V(s)            (5)
    L_Q  = E[ sum_i (r + gamma (1 - terminal) V(s') - Q_i(s,a))^2 ]          (6)
    L_pi = -E[ min(exp(beta u), max_weight) log pi(a|s) ]                    (7)

Q' are the target critics, and 1(u < 0) is 1 where u is negative and 0 elsewhere. One iteration
steps V, the actor, Q and the targets, in this order; V after its step gives the u of (7) and the
V(s') of (6). The policy pi is a Gaussian that tanh does not squash: its mean is a network that ends
in tanh, and its deviation is learned but the same in every state. It acts by its mean.

(7) is advantage-weighted regression, AWR. V and Q do not depend on the actor, so any other way to
extract a policy leaves them as they are. --extraction ddpg_bc trains a deterministic actor to
maximize Q and to stay close to the data:

    L_pi = -E[Q] / mean |Q| - alpha_bc E[ log N(a; pi(s), 1) ],
           Q = min_i Q_i(s, pi(s)), the divisor detached                     (DDPG+BC actor)

What changes scores (more in DEPARTURES, at the foot of the file):
- The weight exp(beta u) in (7) is at most 100, as in the authors' code.
- In locomotion, rewards are divided by the gap between the best and the worst return, and
  multiplied by 1,000, as in the authors' code. Here returns are those of whole episodes.
- On Adroit's v1 data, the settings are those of CORL, a library of offline RL; in point mazes, they
  are those of AntMaze.
- DDPG+BC is not in the paper. Its loss and its alpha_bc are those of OGBench, a benchmark.

    python algorithms/iql.py  # 25k steps: 72.0 ± 3.6, hopper-medium-expert-demo, 3 seeds
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import BatchSize, Count, InsideUnit, NonNegative, Number, Positive, PositiveShare, Seed
from common import ShareBelow1, Adam, InputError, MLP, RunArgs, ScalarMLP, Scaling, affine, glorot_
from common import graphed, largest_value, minimize, normal_log_prob, normalize_obs, orthogonal_
from common import polyak, sample


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
    tau: InsideUnit = 0.7
    """expectile tau (Eq. 5): 0.5 is the mean, near 1 the maximum over the data's actions"""
    extraction: Literal["awr", "ddpg_bc"] = "awr"
    """how the actor is trained: weighted cloning (Eq. 7), or the gradient of Q plus cloning"""
    beta: NonNegative = 3.0
    """inverse temperature beta of the weights in --extraction awr (Eq. 7): 0 is behavior cloning"""
    max_weight: Positive = 100.0
    """largest weight of a row in --extraction awr (Eq. 7)"""
    alpha_bc: NonNegative = 0.3
    """weight of cloning in --extraction ddpg_bc: 0 is DDPG, a large number is behavior cloning"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.005
    """share of the online critics that targets take over per step"""
    lr: Positive = 3e-4
    """Adam's learning rate of all networks; the actor's falls to 0 along a cosine over all steps"""
    hidden: Count = 256
    """hidden units in each layer of every network"""
    layers: Count = 2
    """hidden layers of every network"""
    gelu: bool = False
    """GELU instead of ReLU, and OGBench's initial values instead of orthogonal ones"""
    critic_ln: bool = False
    """layer normalization in V and Q, after the activation of every hidden layer"""
    dropout: ShareBelow1 = 0.0
    """share of the actor's hidden units that are dropped in its loss; none are when it acts"""
    normalize_obs: bool = False
    """shift and scale observations to mean 0 and deviation 1 over the data"""
    normalize_reward: bool = False
    """divide rewards by (best - worst episode return) / 1000"""
    reward_shift: Number = 0.0
    """added to every reward, after --normalize-reward"""


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        hidden, activation = [args.hidden] * args.layers, "gelu" if args.gelu else "relu"
        self.actor = MLP(obs_dim, *hidden, act_dim, activation=activation)
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        critic = dict(activation=activation, layer_norm=args.critic_ln, norm_eps=1e-6)
        self.v = ScalarMLP(obs_dim, *hidden, **critic)
        self.q = ScalarMLP(obs_dim + act_dim, *hidden, members=2, **critic)
        for net in (self.actor, self.v, self.q):
            if args.gelu:
                glorot_(net)
            else:
                orthogonal_(net, hidden_gain=math.sqrt(2), last_gain=math.sqrt(2))
        if args.gelu:
            self.actor.weights[-1].data.mul_(0.1)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)

    def pi(self, s, dropout=0.0):
        """The actor's mean (B, A); `dropout` is the share of hidden units that is zeroed."""
        *hidden, (w_last, b_last) = self.actor.layers
        x = s
        for w, b in hidden:
            x = self.actor.activation(affine(x, w, b))
            if dropout:
                x = x * (torch.rand_like(x) >= dropout) / (1 - dropout)
        return affine(x, w_last, b_last).tanh()


def scale_rewards(data, args):
    """Scale and shift data.reward in place of the raw rewards; data.episode_return stays raw."""
    scale = 1.0
    if args.normalize_reward:
        gap = data.episode_return.max() - data.episode_return.min()
        if gap == 0:
            raise InputError(
                f"{data.name}: --normalize-reward would divide by zero, because all episodes have "
                "the same return; use --no-normalize-reward"
            )
        scale = 1000 / gap
    data.reward = data.reward * scale + args.reward_shift


def value_loss(nets, s, q, args):
    """Eq. 5, for q = min_i Q'_i(s,a) (B,)."""
    u = q - nets.v(s)  # (B,)
    weight = (args.tau - (u < 0).to(u.dtype)).abs()
    return (weight * u.square()).mean()


def awr_loss(nets, s, a, u, args):
    """Eq. 7; also returns the weights (B,)."""
    weight = (args.beta * u).exp().clamp(max=args.max_weight)
    pi = nets.pi(s, args.dropout)
    log_std = nets.log_std.clamp(-5, 2)  # the authors' bounds
    log_prob = normal_log_prob(a, pi, log_std).sum(-1)  # (B,)
    return -(weight * log_prob).mean(), weight


def ddpg_bc_loss(nets, s, a, args):
    """DDPG+BC actor, with the log-density without its constant. Also returns the cloning term."""
    pi = nets.pi(s, args.dropout)
    q = nets.q(s, pi).amin(0)  # (B,)
    bc_loss = 0.5 * (a - pi).square().sum(-1).mean()
    size = q.detach().abs().mean() + 1e-6
    return -q.mean() / size + args.alpha_bc * bc_loss, bc_loss.detach()


def critic_loss(nets, s, a, r, v2, terminal, args):
    """Eq. 6, for v2 = V(s') (B,); sum over critics of the mean over the batch."""
    y = r + args.gamma * (1 - terminal) * v2  # (B,)
    q = nets.q(s, a)  # (2, B)
    return (q - y).square().mean(1).sum()


def update(nets, opt, data, args):
    """One iteration of Algorithm 1, in the authors' order: V, actor, Q, targets."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    with torch.no_grad():
        q = nets.q_target(s, a).amin(0)  # (B,)
    loss = value_loss(nets, s, q, args)
    v_loss = minimize(opt.v, loss)
    with torch.no_grad():
        v, v2 = nets.v(torch.cat([s, s2])).chunk(2)  # after its step, for Eqs. 7 and 6
    u = q - v
    if args.extraction == "awr":
        loss, weight = awr_loss(nets, s, a, u, args)
        square = weight.square().mean().clamp(min=1e-30)  # all weights may underflow to 0
        actor_metrics = {
            "capped_weights": (weight >= args.max_weight).float().mean(),
            "effective_share": weight.mean().square() / square,
            "log_std": nets.log_std.detach().mean(),
        }
    else:
        loss, bc_loss = ddpg_bc_loss(nets, s, a, args)
        actor_metrics = {"bc_loss": bc_loss}
    pi_loss = minimize(opt.actor, loss)
    loss = critic_loss(nets, s, a, r, v2, terminal, args)
    q_loss = minimize(opt.q, loss)
    polyak(nets.q_target, nets.q, args.polyak)
    metrics = {
        "v_loss": v_loss,
        "pi_loss": pi_loss,
        "q_loss": q_loss,
        "q_mean": q.mean(),
        "v_mean": v.mean(),
        "v_min": v.amin(),
        "v_max": v.amax(),
        "advantage": u.mean(),
    }
    return metrics | actor_metrics


def q(nets, s, a):
    """The value (2, B) of every critic at scaled states s (B, S), actions a (B, A) in [-1, 1]."""
    return nets.q(s, a)


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    return nets.scaling.action(nets.pi(nets.scaling.obs(obs)))


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
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
    run.start(nets, opt, q_mean=largest_value(data, args.gamma))
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        cosine = math.cos(math.pi * (t - 1) / args.steps)
        opt.actor.lr.fill_(args.lr * (1 + cosine) / 2)
        metrics = step()
        run.after(t, metrics, lambda obs: policy(nets, obs, args))


DEPARTURES = """
The authors' code, against the paper:
- The weight exp(beta u) is at most 100.
- The paper divides locomotion's rewards by the gap between the best and the worst episode's return.
  The code also multiplies them by 1,000.

This file, against the authors' code:
- The last row of an episode that a time limit ended is kept where the data has its next
  observation; the authors' loader drops it.
- The gap between the best and the worst return is taken over whole episodes, with every row of the
  data. The authors add up only the rows that their loader leaves, so their returns lack the row at
  a time limit and the last row of the file.
- Actions at a bound stay there. The authors move them inward by 1e-5, which is not needed here: the
  density of a Gaussian that tanh does not squash is finite at the bounds.
- The authors have no settings for Adroit's v1 data, so there they are those of CORL, a library of
  offline RL: a larger tau and beta, normalized observations, and no dropout (CORL's configuration
  names a dropout, but its Gaussian actor ignores it). The update is the authors' on all data. CORL
  steps V, Q, the targets and then the actor, takes u and V(s') from V before its step, averages
  over the critics, lets the log-deviation fall to -20, and starts from PyTorch's default weights.
- The paper has no point mazes. Their rewards are sparse like AntMaze's, so they use the settings of
  AntMaze.
- The paper has no DDPG+BC. The loss and alpha_bc are those of OGBench, a benchmark of offline RL.
  OGBench's actor has no tanh at its end, and its learning rate does not fall.
- On OGBench's tasks, beta and the networks are those of FQL's table 3: 4 layers, of 256 units in
  cubes, scenes and puzzles and of 512 elsewhere, GELU, layer normalization in V and Q. The update
  is that of IQL's authors. The IQL in FQL's repository takes the u of (7) from the online critics
  instead of the targets, and V from before its step. Its Gaussian has a deviation of 1 and no tanh
  at its mean, and its learning rate does not fall. The beta of antsoccer is that of the paper's
  table of fine-tuning.
"""

OGBENCH = dict(tau=0.9, hidden=512, layers=4, gelu=True, critic_ln=True)
OGBENCH |= dict(eval_every=100_000, eval_episodes=50)
ARM = OGBENCH | dict(hidden=256)

PRESETS = {
    "halfcheetah-*": dict(normalize_reward=True),
    "hopper-*": dict(normalize_reward=True),
    "walker2d-*": dict(normalize_reward=True),
    "mujoco/halfcheetah/*": dict(normalize_reward=True),
    "mujoco/hopper/*": dict(normalize_reward=True),
    "mujoco/walker2d/*": dict(normalize_reward=True),
    "hopper-replay-demo": dict(  # shortened; faster targets
        normalize_obs=True, beta=10.0, polyak=0.02, steps=30_000, eval_every=1_500
    ),
    "hopper-medium-expert-demo": dict(  # shortened; faster targets
        normalize_obs=True, beta=10.0, polyak=0.01, steps=25_000, eval_every=1_250
    ),
    **dict.fromkeys(
        ("antmaze-*", "D4RL/antmaze/*"),
        dict(tau=0.9, beta=10.0, reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
    ),
    **dict.fromkeys(  # mazes with sparse rewards of 0 and 1
        [f"D4RL/pointmaze/{size}-v*" for size in ("open", "umaze", "medium", "large")],
        dict(tau=0.9, beta=10.0, alpha_bc=0.003, reward_shift=-1.0),
    ),
    "pointmaze-stitch-demo": dict(  # AntMaze's settings, shortened; faster targets
        tau=0.9, beta=10.0, alpha_bc=0.003, reward_shift=-1.0, polyak=0.02
    )
    | dict(steps=10_000, eval_every=500, eval_episodes=20),
    **dict.fromkeys(
        [
            pattern.format(task)
            for pattern in ("{}-*", "D4RL/{}/*")
            for task in ("pen", "door", "hammer", "relocate", "kitchen")
        ],
        dict(beta=0.5, dropout=0.1),
    ),
    **dict.fromkeys(  # CORL's settings, which are made for the v1 data
        [f"{task}-*-v1" for task in ("pen", "door", "hammer", "relocate")],
        dict(tau=0.8, beta=3.0, dropout=0.0, normalize_obs=True),
    ),
    # The names of FQL's table 3, all five tasks of each, and what --short adds.
    "antmaze-large-navigate-singletask*": OGBENCH | dict(beta=10.0),
    "antmaze-giant-navigate-singletask*": OGBENCH | dict(beta=10.0, gamma=0.995),
    "humanoidmaze-medium-navigate-singletask*": OGBENCH | dict(beta=10.0, gamma=0.995),
    "humanoidmaze-large-navigate-singletask*": OGBENCH | dict(beta=10.0, gamma=0.995),
    "antsoccer-arena-navigate-singletask*": OGBENCH | dict(beta=1.0, gamma=0.995),
    "cube-single-play-singletask*": ARM | dict(beta=1.0),
    "cube-double-play-singletask*": ARM | dict(beta=0.3),
    "scene-play-singletask*": ARM | dict(beta=10.0),
    "puzzle-3x3-play-singletask*": ARM | dict(beta=10.0),
    "puzzle-4x4-play-singletask*": ARM | dict(beta=3.0),
    "short *-singletask*": dict(steps=100_000, eval_every=20_000, eval_episodes=50, hidden=128),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)
