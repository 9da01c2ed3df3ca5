"""Conservative Q-learning, CQL (Kumar, Zhou, Tucker & Levine, NeurIPS 2020; arXiv:2006.04779).

Idea: SAC whose critics do more than fit their targets: Q is pushed down where it is high, and up at
the data's actions, so that no action outside the data looks better than it is.

    y    = r + gamma (1 - terminal) min_i Q'_i(s',a'),  a' ~ pi(s')          (SAC target)
    L_Q  = sum_i ( E[ (Q_i(s,a) - y)^2 ] + weight D_i )                      (critics)
    D_i  = E_s[ E_{a~U} Q_i(s,a) ] - E[ Q_i(s,a) ]                           (2)
    D_i  = E_s[ log sum_a exp Q_i(s,a) ] - E[ Q_i(s,a) ]                     (4)
    L_m  = -m weight mean_i (D_i - gap)                                      (30)
    L_pi = E[ temperature log pi(a|s) - min_i Q_i(s,a) ],  a ~ pi(s)         (SAC actor)
    L_T  = log(temperature) (E[ -log pi(a|s) ] + A),  a ~ pi(s)              (SAC temperature)

Q' are the target critics, and A is the number of action dimensions. (4) is CQL(H), the form that
the paper's results use. (2), with a uniform distribution U of actions, is --regularizer basic. The
sum in (4) is estimated from 3 N actions in every state: N uniform ones, N of pi(s') and N of pi(s).
Over these, exp(Q_i(s,a) - log density(a)) is added up, where the density is that of the
distribution that the action was drawn from. With --lagrange, L_Q has m weight in place of weight,
and the multiplier m is learned by (30): it grows while D is above the gap.

If Q is a table, L_Q with (2) is least at Q = y - weight/2 (U / pi_beta - 1), where pi_beta is the
policy that made the data. The paper halves the squared error and this file does not, so `weight` is
twice the paper's alpha.

What changes scores (more in DEPARTURES, at the foot of the file):
- Settings and details are those of CORL, a library of offline RL, except where the list reports a
  difference from CORL.
- The N actions of pi(s') in (4) are an addition of the authors' code.
- On locomotion the weight is fixed, as in the authors' code; the paper learns the multiplier there.
- Observations are normalized, except in mazes with sparse rewards. The authors use them as they
  are.
- The actor's log-deviation lies in [-20, 2], and all networks have last layers that start near 0;
  the authors' log-deviation lies in [-5, 2].
- AntMaze has CORL's settings; the authors' own are in the list.

    python algorithms/cql.py  # 10k steps: 83.9 ± 4.3, hopper-medium-expert-demo, 3 seeds
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
from common import BatchSize, Count, CountOrZero, NonNegative, Number, Positive, PositiveShare, Seed
from common import Share, ShareBelow1
from common import MLP, Adam, RunArgs, ScalarMLP, Scaling, dequantize, graphed, largest_value
from common import minimize, normalize_obs, orthogonal_, polyak, sample, sample_tanh_normal
from common import share_at_bounds, tanh_normal_log_prob


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
    regularizer: Literal["h", "basic"] = "h"
    """what is pushed down: the log-sum-exp of Q (h, Eq. 4) or its uniform mean (basic, Eq. 2)"""
    weight: NonNegative = 10.0
    """weight of D against the squared error, twice the paper's alpha: 0 is SAC"""
    n_actions: Count = 10
    """actions N per state and distribution in Eqs. 2 and 4, and per state in --max-backup"""
    lagrange: bool = False
    """learn a multiplier of the weight, which keeps D near the gap (Eq. 30)"""
    gap: Number = 10.0
    """value of D that --lagrange aims at, tau in Eq. 30: lower is more conservative"""
    diff_floor: Number | None = None
    """lower bound of the difference in every state, whose mean is D; None: there is no bound"""
    max_backup: bool = False
    """use the best of N next actions in the target, instead of a single one"""
    backup_entropy: bool = False
    """keep SAC's entropy term, -temperature log pi(a'|s'), in the target"""
    warm_start: CountOrZero = 0
    """steps at the start in which the actor maximizes the data's likelihood instead of Q"""
    dequantize: Share = 0.0
    """in --warm-start, actions exactly at a bound are spread over a band of this width inside it"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.005
    """share of the online critics that targets take over per step"""
    lr: Positive = 3e-4
    """Adam's learning rate of the critics and the multiplier"""
    actor_lr: Positive = 3e-5
    """Adam's learning rate of the actor and the temperature"""
    hidden: Count = 256
    """hidden units in each layer of every network"""
    normalize_obs: bool = True
    """shift and scale observations to mean 0 and deviation 1 over the data"""
    reward_scale: Number = 1.0
    """multiplies every reward"""
    reward_shift: Number = 0.0
    """added to every reward, after --reward-scale"""


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        hidden = args.hidden
        self.scaling = Scaling(data)
        self.actor = MLP(obs_dim, hidden, hidden, hidden, 2 * act_dim)
        nn.init.xavier_uniform_(self.actor.weights[-1], 0.01)
        nn.init.zeros_(self.actor.biases[-1])
        self.log_std_scale = nn.Parameter(torch.ones(()))
        self.log_std_shift = nn.Parameter(-torch.ones(()))
        self.q = ScalarMLP(obs_dim + act_dim, hidden, hidden, hidden, members=2)
        orthogonal_(self.q, hidden_gain=math.sqrt(2), last_gain=0.01)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.log_multiplier = nn.Parameter(torch.ones(()))

    def pi(self, s):
        """Mean and log-std (B, A) of the actor's tanh-Gaussian."""
        mean, out = self.actor(s).chunk(2, -1)
        log_std = self.log_std_scale * out + self.log_std_shift
        return mean, log_std.clamp(-20, 2)

    def pi_parameters(self):
        return [*self.actor.parameters(), self.log_std_scale, self.log_std_shift]

    def multiplier(self):
        """m of Eq. 30; unclamped, it would grow without end where D cannot reach the gap."""
        return self.log_multiplier.exp().clamp(max=1e6)


def draw(pi, n):
    """Draw n actions of the policy in every state (B, n, A); also their log-densities (B, n)."""
    mean, log_std = pi
    mean = mean.unsqueeze(1).expand(-1, n, -1)
    log_std = log_std.unsqueeze(1).expand(-1, n, -1)
    a, log_prob, _ = sample_tanh_normal(mean, log_std)
    return a, log_prob


def proposals(pi, pi2, a, args):
    """Actions (B, M, A) at which Q is pushed down, and their log-densities (B, M) under what they
    were drawn from: N uniform ones (Eq. 2), then N of pi(s') and N of pi(s) (Eq. 4)."""
    like = a.unsqueeze(1).expand(-1, args.n_actions, -1)
    uniform = 2 * torch.rand_like(like) - 1
    log_uniform = torch.full_like(uniform[..., 0], -a.shape[1] * math.log(2))
    if args.regularizer == "basic":
        return uniform, log_uniform
    a_next, log_next = draw(pi2, args.n_actions)
    a_pi, log_pi = draw(pi, args.n_actions)
    actions = torch.cat([uniform, a_next, a_pi], 1)
    return actions, torch.cat([log_uniform, log_next, log_pi], 1)


def q_values(q, s, actions):
    """Q_i(s, a) of every state's own actions (B, M, A): (2, B, M)."""
    s = s.unsqueeze(1).expand(-1, actions.shape[1], -1)
    rows = torch.cat([s, actions], -1).flatten(0, 1)
    return q(rows).unflatten(1, actions.shape[:2])


def target_value(nets, r, s2, terminal, a2, log_prob2, temperature, args):
    """SAC target (B,): the best of the next actions a2 (B, M, A) counts; log_prob2 (B, M)."""
    least = q_values(nets.q_target, s2, a2).amin(0)  # (B, M)
    q2, best = least.max(1)  # (B,)
    if args.backup_entropy:
        log_prob2 = log_prob2.gather(1, best.unsqueeze(1)).squeeze(1)
        q2 = q2 - temperature * log_prob2
    return r + args.gamma * (1 - terminal) * q2  # (B,)


def conservative_diff(q_data, q_other, log_density, args):
    """D_i (2,) of Eq. 2 or 4: `q_other` (2, B, M) at the proposals, `q_data` (2, B) at the data."""
    if args.regularizer == "basic":
        high = q_other.mean(2)
    else:
        high = (q_other - log_density).logsumexp(2)
    diff = high - q_data  # (2, B)
    if args.diff_floor is not None:
        diff = diff.clamp(min=args.diff_floor)
    return diff.mean(1)


def critic_loss(nets, s, a, y, others, log_density, m, args):
    """Squared errors plus weighted D of both critics; the data's actions and the proposals are
    evaluated as one batch. Also returns the errors, D_i (2,), and the mean of Q at the data's
    actions and at each proposal (1 + M,).

    All of these are means over states, so they can be computed on one part of a batch at a time
    and then averaged."""
    actions = torch.cat([a.unsqueeze(1), others], 1)  # (B, 1 + M, A)
    q = q_values(nets.q, s, actions)  # (2, B, 1 + M)
    q_data, q_other = q[..., 0], q[..., 1:]
    td_loss = (q_data - y).square().mean(1).sum()
    diff = conservative_diff(q_data, q_other, log_density, args)
    loss = td_loss + m * args.weight * diff.sum()
    return loss, td_loss.detach(), diff.detach(), q.detach().mean((0, 1))


def multiplier_loss(m, diff, args):
    """Eq. 30: the multiplier grows while D, a mean over critics, is above the gap."""
    return -m * args.weight * (diff - args.gap).mean()


def actor_loss(log_prob, value, temperature):
    """SAC actor; `value` is the least Q, or in the warm start the data's log-likelihood."""
    return (temperature * log_prob - value).mean()


def temperature_loss(log_temperature, entropy, act_dim):
    """SAC's temperature, through its logarithm: it grows while the entropy is below -A."""
    return log_temperature * (entropy + act_dim)


def update(nets, opt, data, args, warm):
    """One step of actor, temperature, critics, targets and multiplier; all actions are drawn from
    the actor before its step. Where `warm` is true, the actor's loss has no Q."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    pi = nets.pi(s)
    a_pi, log_prob, _ = sample_tanh_normal(*pi)
    with torch.no_grad():
        pi2 = nets.pi(s2)
        temperature = nets.log_temperature.exp()
        others, log_density = proposals(pi, pi2, a, args)
        a2, log_prob2 = draw(pi2, args.n_actions if args.max_backup else 1)
        y = target_value(nets, r, s2, terminal, a2, log_prob2, temperature, args)

    if warm:
        a_data = dequantize(a, args.dequantize)
        value = tanh_normal_log_prob(a_data, *pi, clip=1e-3)
    else:
        value = nets.q(s, a_pi).amin(0)  # (B,)
    pi_loss = actor_loss(log_prob, value, temperature)
    minimize(opt.actor, pi_loss)
    entropy = -log_prob.detach().mean()
    minimize(opt.temperature, temperature_loss(nets.log_temperature, entropy, a.shape[1]))

    m = nets.multiplier().detach() if args.lagrange else 1.0
    q_loss, td_loss, diff, q_mean = critic_loss(nets, s, a, y, others, log_density, m, args)
    minimize(opt.q, q_loss)
    polyak(nets.q_target, nets.q, args.polyak)
    metrics = {
        "q_loss": q_loss.detach(),
        "td_loss": td_loss,
        "diff": diff.mean(),
        "pi_loss": pi_loss.detach(),
        "q_data": q_mean[0],
        "target": y.mean(),
        "entropy": entropy,
        "temperature": temperature,
    }
    for name, part in zip(("q_uniform", "q_next", "q_pi"), q_mean[1:].split(args.n_actions)):
        metrics[name] = part.mean()
    if args.lagrange:
        minimize(opt.multiplier, multiplier_loss(nets.multiplier(), diff, args))
        metrics["multiplier"] = m
    return metrics


def q(nets, s, a):
    """Q_i(s, a) of every critic, (2, B); s (B, S) are scaled states, a (B, A) lie in [-1, 1]."""
    return nets.q(s, a)


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    mean, _ = nets.pi(nets.scaling.obs(obs))
    return nets.scaling.action(mean.tanh())


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
    data.reward.mul_(args.reward_scale).add_(args.reward_shift)
    if args.warm_start:
        share_at_bounds(data, args.dequantize)
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(
        actor=Adam(nets.pi_parameters(), args.actor_lr),
        temperature=Adam([nets.log_temperature], args.actor_lr),
        q=Adam(nets.q.parameters(), args.lr),
        multiplier=Adam([nets.log_multiplier], args.lr),
    )
    largest = largest_value(data, args.gamma)
    run.start(nets, opt, q_data=largest, q_pi=largest, target=largest)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        warm = t <= args.warm_start
        metrics = step(warm)
        run.after(t, metrics, lambda obs: policy(nets, obs, args))


DEPARTURES = """
The authors' code, against the paper:
- The N actions of pi(s') in (4), whose Q is taken at s, are an addition of the code. The paper
  draws from the uniform distribution and from pi(s) alone.
- The terms of (4) are added and not averaged: nothing subtracts log(3 N). This changes no gradient
  of L_Q, but the gap in (30) must be larger by this much: if Q is constant and pi is uniform, D is
  log(3 N) + A log 2.
- On locomotion the weight is fixed. The paper learns the multiplier there, with a gap of 10.
- Adam moves the logarithm of the temperature. L_T is linear in this logarithm, so its gradient is
  H + A, where H is the entropy of pi. In SAC's paper L_T is linear in the temperature itself, so
  that the gradient is temperature (H + A). Both forms raise the temperature while the entropy is
  below -A and lower it while it is above. Adam divides a constant factor out, so the two forms
  differ only while the temperature changes. sac_bc.py and fisher_brc.py have the form of SAC's
  paper, and so do the entropy weights of the clones in fisher_brc.py and itrpo.py.

This file, against the authors' code:
- Settings and details are those of CORL, a later library that builds on young-geng's code of CQL.
  The bullets below describe what CORL does, except where they mention a difference from CORL.
- Observations are normalized, except in AntMaze and in point mazes with sparse rewards; the authors
  take all observations as they are.
- The log-deviation of the actor is scaled and shifted by two learned numbers and lies in [-20, 2];
  the authors' lies in [-5, 2].
- Hidden layers of the critics start orthogonal, with a gain of sqrt(2); the last layers of all
  networks start near 0.
- The actor's loss uses the temperature before its step; the authors use it after its step.
- The multiplier m starts at e; the authors start it at 1. The authors subtract a threshold from
  weight D, so --gap is their threshold divided by the weight.
- --max-backup takes max_a min_i Q'_i(s',a) over N actions. The authors take min_i max_a Q'_i(s',a).
- --diff-floor is not in the authors' code. D is a mean over states; the floor applies to the
  difference in every state, before the mean.
- The rows of PRESETS for AntMaze are CORL's. The authors' own are --gap 1 --diff-floor None
  --reward-scale 4 --reward-shift -2 --warm-start 40000. CORL gives its first critic five hidden
  layers there and its second one three; here both have three.
- CORL also scales the rewards of hopper-medium-v2 until returns span 1,000; this file does not.
- The likelihood in --warm-start is that of the data's actions, as in the authors' code; CORL takes
  that of the actor's own actions. The authors' scripts begin with 40,000 such steps, CORL's and
  ours with none.
- No source has settings for kitchen or for point mazes with sparse rewards. Kitchen's are Adroit's
  here, and the point mazes' are AntMaze's.
- --dequantize is an addition, and off by default.
"""

# For a CPU: few updates, fewer rows in each, a faster actor and faster targets.
SHORT = dict(steps=10_000, batch_size=128, n_actions=3, actor_lr=3e-4, polyak=0.02, eval_every=500)

CLONING = dict(warm_start=1000, actor_lr=1e-2)  # on the tests' bandit cloning outweighs Q

PRESETS = {
    "hopper-medium-expert-demo": SHORT,
    "hopper-replay-demo": SHORT | dict(steps=15_000, eval_every=750),
    "pointmaze-stitch-demo": (  # AntMaze's settings, shortened
        dict(weight=5.0, lagrange=True, gap=0.8, diff_floor=-200.0, max_backup=True)
        | dict(normalize_obs=False, reward_scale=10.0, reward_shift=-5.0)
        | SHORT
        | dict(steps=8_000, eval_every=400, eval_episodes=20)
    ),
    "maze2d-*": dict(lagrange=True, gap=5.0),
    **dict.fromkeys(  # mazes with sparse rewards of 0 and 1
        ("antmaze-*", "D4RL/antmaze/*")
        + tuple(f"D4RL/pointmaze/{size}-v*" for size in ("open", "umaze", "medium", "large")),
        dict(weight=5.0, lagrange=True, gap=0.8, diff_floor=-200.0, max_backup=True, actor_lr=1e-4)
        | dict(normalize_obs=False, reward_scale=10.0, reward_shift=-5.0),
    ),
    "antmaze-*-v*": dict(eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*-v*": dict(eval_every=100_000, eval_episodes=100),
    **dict.fromkeys(
        [
            pattern.format(task)
            for pattern in ("{}-*", "D4RL/{}/*")
            for task in ("pen", "door", "hammer", "relocate", "kitchen")
        ],
        dict(weight=1.0, actor_lr=1e-4),
    ),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)
