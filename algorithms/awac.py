"""Advantage-weighted actor-critic, AWAC (Nair, Gupta, Dalal & Levine, 2020; arXiv:2006.09359).

Idea: learn the Q of the trained policy off-policy, and clone the data's actions, each weighted by
the exponential of how much better it is than an action of the policy.

    pi*(a|s) = exp(Q(s,a) / temperature) pi_beta(a|s) / Z(s)                (11)
    L_pi = -E[ min(exp(A / temperature), max_weight) log pi(a|s) ]          (16)
    y    = r + gamma (1 - terminal) min_i Q'_i(s', a'), a' ~ pi(s')         (AWAC target)
    L_Q  = E[ sum_i (Q_i(s,a) - y)^2 ]                                      (AWAC critics)
    A    = min_i Q_i(s,a) - min_i Q_i(s, a_pi), a_pi ~ pi(s)                (AWAC advantage)

The numbers (11) and (16) are those of S. Park's notes "Offline RL", Section 2.2
(https://rail.eecs.berkeley.edu/deeprlcourse/static/sections/section-9.pdf). In the paper, L_Q and
L_pi are the two updates of Algorithm 1, without a bound on the weights. The lambda of both is
`temperature` here. pi_beta is the policy that made the data, and Z(s) makes pi* a density.

One iteration steps the critics, the actor and the targets, in this order; A is computed by the
critics after their step. The policy pi is a Gaussian that tanh does not squash, and its sampled
actions are clipped to the bounds. It acts by its mean. The actor's loss is that of awr.py, but the
advantages are not standardized, so the temperature is in units of reward.

What changes scores (more in DEPARTURES, at the foot of the file):
- The weights are bounded, as in CORL, a library of offline RL. The authors' code divides them by
  their mean over the batch instead, and the paper does neither.
- The temperature is 1, the default of the authors' code, and the bound of 20 is AWR's. CORL has
  --max-weight 100, and --temperature 0.333 for locomotion or 0.1 for all other data.
- Training is offline from the first step to the last; the authors then continue online.
- All networks have two layers of 256 units. The authors' actor has four, and CORL's networks have
  three.

    python algorithms/awac.py  # 20k steps: 81.2 ± 2.9, hopper-medium-expert-demo, 3 seeds
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import BatchSize, Count, Number, Positive, PositiveShare, Seed, ShareBelow1
from common import MLP, Adam, RunArgs, ScalarMLP, Scaling
from common import graphed, largest_value, minimize, normal_log_prob, normalize_obs, polyak, sample


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
    """lambda of Eq. 16: very large is cloning; near 0, only actions that beat the policy's count"""
    max_weight: Positive = 20.0
    """largest weight of a row (Eq. 16); 1 drops bad actions and favors no good ones"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.005
    """share of the online critics that targets take over per step"""
    lr: Positive = 3e-4
    """Adam's learning rate of the actor and the critics"""
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
        self.q = ScalarMLP(obs_dim + act_dim, hidden, hidden, members=2)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)

    def pi(self, s):
        """Mean (B, A) and log-std (A,) of the actor's Gaussian, which tanh does not squash."""
        mean = self.actor(s).tanh()
        return mean, self.log_std.clamp(-5, 2)


def sample_action(mean, log_std):
    """Actions (B, A) of the Gaussian, clipped to the bounds."""
    noise = torch.randn_like(mean)
    return (mean + log_std.exp() * noise).clamp(-1, 1)


def critic_loss(nets, s, a, r, s2, terminal, args):
    """AWAC target and critics: sum over critics of the mean over the batch; also the mean of Q."""
    with torch.no_grad():
        a2 = sample_action(*nets.pi(s2))
        q2 = nets.q_target(s2, a2).amin(0)  # (B,)
        y = r + args.gamma * (1 - terminal) * q2
    q = nets.q(s, a)  # (2, B)
    return (q - y).square().mean(1).sum(), q.detach().mean()


@torch.no_grad()
def q_advantage(nets, s, a, pi):
    """AWAC advantage (B,) from the online critics; its baseline is the Q of one action of pi."""
    states = torch.cat([s, s])
    actions = torch.cat([a, sample_action(*pi)])
    q, v = nets.q(states, actions).amin(0).chunk(2)
    return q - v


def awr_loss(pi, a, advantage, args):
    """Eq. 16, whose optimum is Eq. 11; A (B,) is a constant. Also returns the weights (B,)."""
    weight = (advantage / args.temperature).exp().clamp(max=args.max_weight)
    mean, log_std = pi
    log_prob = normal_log_prob(a, mean, log_std).sum(-1)  # (B,)
    return -(weight * log_prob).mean(), weight


def update(nets, opt, data, args):
    """One step of the critics, the actor and the targets."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    loss, q_mean = critic_loss(nets, s, a, r, s2, terminal, args)
    q_loss = minimize(opt.q, loss)
    pi = nets.pi(s)  # shared by the baseline's action and the actor's loss
    advantage = q_advantage(nets, s, a, pi)
    loss, weight = awr_loss(pi, a, advantage, args)
    pi_loss = minimize(opt.actor, loss)
    polyak(nets.q_target, nets.q, args.polyak)
    square = weight.square().mean().clamp(min=1e-30)  # all weights may underflow to 0
    return {
        "q_loss": q_loss,
        "pi_loss": pi_loss,
        "q_mean": q_mean,
        "advantage": advantage.mean(),
        "capped_weights": (weight >= args.max_weight).float().mean(),
        "effective_share": weight.mean().square() / square,
        "log_std": nets.log_std.detach().mean(),
    }


def q(nets, s, a):
    """Q_i(s, a) of every critic, (2, B); s (B, S) are scaled states, a (B, A) lie in [-1, 1]."""
    return nets.q(s, a)


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
        q=Adam(nets.q.parameters(), args.lr),
        actor=Adam([*nets.actor.parameters(), nets.log_std], args.lr),
    )
    run.start(nets, opt, q_mean=largest_value(data, args.gamma))
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        metrics = step()
        run.after(t, metrics, lambda obs: policy(nets, obs, args))


DEPARTURES = """
The authors' code, against the paper:
- The code divides the weights by their mean over the batch: they are a softmax over the batch,
  times the batch size. The paper's are exp(A / lambda) alone.

This file, against the authors' code:
- The update has the form of CORL, a library of offline RL. The weights are bounded and not divided
  by their mean, and A is computed by the critics after their step; the authors compute it before.
- Training is offline from the first step to the last. The authors' code then continues online.
- A temperature of 1 is the default of the authors' code; its MuJoCo example uses 2. The bound of 20
  on the weights is AWR's. CORL sets --max-weight 100, and --temperature 0.333 for locomotion or 0.1
  for all other data.
- The actor and the critics have two layers of 256 units. The authors' actor has four, and in CORL
  all networks have three.
- The actor's mean goes through tanh; in CORL it does not.
- The log-deviation is between -5 and 2. The authors' is between -6 and 0, and CORL's between -20
  and 2. In all three it is the same in every state.
- Batches have 256 rows and Adam has no weight decay, as in CORL. The authors' batches have 1,024
  rows, and their actor has a weight decay of 1e-4.
- Observations are normalized, as in CORL.
- The last row of an episode that a time limit ended is kept where the data has its next
  observation; CORL's loader drops it.
- The paper has no AntMaze. The reward shift of -1 there is CORL's.
"""

PRESETS = {
    # shortened; sharper weights and faster targets on the replay buffer, where rows differ most
    "hopper-replay-demo": dict(temperature=0.3, polyak=0.02, steps=30_000, eval_every=1_500),
    "hopper-medium-expert-demo": dict(temperature=3.0, steps=20_000, eval_every=1_000),
    "antmaze-*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
    "pointmaze-stitch-demo": dict(  # shortened; faster targets; AntMaze's reward shift
        reward_shift=-1.0, polyak=0.02, steps=20_000, eval_every=1_000, eval_episodes=20
    ),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)
