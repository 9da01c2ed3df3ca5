"""Conservative Q-learning, CQL (Kumar, Zhou, Tucker & Levine, NeurIPS 2020; arXiv:2006.04779).

Idea: SAC whose critics, besides fitting their targets, are pushed down where Q is high and up at
the data's actions, so that no action outside the data looks better than it is.

    y    = r + gamma min_i Q'_i(s',a'), a' ~ pi(s')                          (SAC target)
    L_Q  = sum_i ( E[ (Q_i(s,a) - y)^2 ] + weight D_i )
    D_i  = E_s[ E_{a~U} Q_i(s,a) ] - E[ Q_i(s,a) ]                           (2)
    D_i  = E_s[ log sum_a exp Q_i(s,a) ] - E[ Q_i(s,a) ]                     (4)
    L_m  = -m weight mean_i (D_i - gap), and m weight in place of weight     (30)
    L_pi = E[ temperature log pi(a|s) - min_i Q_i(s,a) ], a ~ pi(s)          (SAC)

(4) is CQL(H), the method; (2) with a uniform mu is --regularizer basic; (30), with multiplier m,
is --lagrange. The sum in (4) is the sum of exp(Q_i(s,a) - log density(a)) over 3N actions: N
uniform, N of pi(s'), N of pi(s). For tabular Q and one critic, (2) rests where
Q = y - weight/2 (mu / pi_beta - 1): `weight` is twice the paper's alpha, as the paper halves the
squared error. For (30) the authors' code has m (weight D - threshold): gap = threshold / weight.

Departures, the authors' code has them too: actions of pi(s') in (4); no -log(3N), so that D of a
constant Q under a uniform pi is log(3N) + A log 2; a fixed weight, except for mazes. From CORL and
the code of young-geng before it: --diff-floor; a learned scale and shift of the actor's log-std;
its floor (-20, authors: -5); the temperature is read before its step; m starts at e; --max-backup
is the maximum over actions of the minimum over critics (authors: minimum of maxima); initial
weights; normalized observations and scaled rewards, as PRESETS says (CORL scales those of
hopper-medium-v2 too, to a range of returns of 1,000). CORL's AntMaze critics have five and three
hidden layers: here both have three. Ours: kitchen's row is Adroit's and pointmaze's is AntMaze's,
no source has either; the warm start's likelihood is that of the data's actions (CORL's is of the
actor's own); --dequantize.

    python algorithms/cql.py --env hopper-medium-v2  # no flags: 13 ± 1, 3 seeds, 5 min
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
    dequantize,
    graphed,
    load_dataset,
    minimize,
    normalize_obs,
    orthogonal_,
    parse,
    polyak,
    sample,
    sample_tanh_normal,
    share_at_bounds,
    tanh_normal_log_prob,
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

    regularizer: str = "h"
    """what is pushed down: h, the log-sum-exp of Q (Eq. 4), or basic, its uniform mean (Eq. 2)"""
    weight: float = 10.0
    """weight of D against the squared error, twice the paper's alpha: 0 is SAC"""
    n_actions: int = 10
    """actions N per state and sampler in Eq. 2 and 4, and in --max-backup"""
    lagrange: bool = False
    """learn a multiplier of the weight that holds D at the gap (Eq. 30)"""
    gap: float = 10.0
    """D that --lagrange aims at, tau in Eq. 30: lower is more conservative"""
    diff_floor: float | None = None
    """each state's difference in D counts no less than this; None: no floor"""
    max_backup: bool = False
    """take the best of N next actions in the target, instead of one"""
    backup_entropy: bool = False
    """SAC's entropy term in the target"""
    warm_start: int = 0
    """steps at first in which the actor climbs the data's likelihood instead of Q"""
    dequantize: float = 0.0
    """band inside the bounds over which --warm-start spreads actions exactly at a bound"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.005
    """share of the online critics that targets take over per step"""
    lr: float = 3e-4
    """Adam's learning rate: critics and multiplier"""
    actor_lr: float = 3e-5
    """Adam's learning rate: actor and temperature"""
    normalize_obs: bool = True
    """shift and scale observations to mean 0, deviation 1 over the data"""
    reward_scale: float = 1.0
    """factor of every reward"""
    reward_shift: float = 0.0
    """added to every reward after that"""


PRESETS = {
    "hopper-replay-demo": dict(  # shortened: fewer rows per step, a faster actor
        steps=10_000, batch_size=128, n_actions=3, actor_lr=3e-4, eval_every=1_000
    ),
    # the local hopper/* and halfcheetah/* sets, for a CPU: fewer rows per step, a faster actor
    **dict.fromkeys(("hopper/*", "halfcheetah/*"), dict(weight=5.0, n_actions=4, actor_lr=3e-4)),
    "maze2d-*": dict(lagrange=True, gap=5.0),
    **dict.fromkeys(  # mazes with sparse rewards of 0 and 1
        ("antmaze-*", "D4RL/antmaze/*", "pointmaze/*")
        + tuple(f"D4RL/pointmaze/{size}-v*" for size in ("open", "umaze", "medium", "large")),
        dict(weight=5.0, lagrange=True, gap=0.8, diff_floor=-200.0, max_backup=True, actor_lr=1e-4)
        | dict(normalize_obs=False, reward_scale=10.0, reward_shift=-5.0),
    ),
    "antmaze-*-v*": dict(eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*-v*": dict(eval_every=100_000, eval_episodes=100),
    **dict.fromkeys(
        [
            pattern.format(task)
            for pattern in ("{}-*", "{}/*", "D4RL/{}/*")
            for task in ("pen", "door", "hammer", "relocate", "kitchen")
        ],
        dict(weight=1.0, actor_lr=1e-4),
    ),
}


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        self.actor = MLP(obs_dim, 256, 256, 256, 2 * act_dim)
        nn.init.xavier_uniform_(self.actor.weights[-1], 0.01)
        nn.init.zeros_(self.actor.biases[-1])
        self.log_std_scale = nn.Parameter(torch.ones(()))
        self.log_std_shift = nn.Parameter(-torch.ones(()))
        self.q = ScalarMLP(obs_dim + act_dim, 256, 256, 256, members=2)
        orthogonal_(self.q, hidden_gain=math.sqrt(2), last_gain=0.01)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.log_multiplier = nn.Parameter(torch.ones(()))

    def pi(self, s):
        """Mean and log-std (B, A) of the actor's tanh-Gaussian."""
        mean, log_std = self.actor(s).chunk(2, -1)
        return mean, (self.log_std_scale * log_std + self.log_std_shift).clamp(-20, 2)

    def pi_parameters(self):
        return [*self.actor.parameters(), self.log_std_scale, self.log_std_shift]

    def multiplier(self):
        """m of Eq. 30; an unreachable gap would let it grow without end."""
        return self.log_multiplier.exp().clamp(max=1e6)


def draw(pi, n):
    """n actions (B, n, A) of the policy at every state, and their log-densities (B, n)."""
    mean, log_std = (x.unsqueeze(1).expand(-1, n, -1) for x in pi)
    return sample_tanh_normal(mean, log_std)[:2]


def proposals(pi, pi2, a, args):
    """Actions (B, M, A) that stand for all others at s, and their samplers' log-densities (B, M):
    N uniform ones (Eq. 2), then N of pi(s') and N of pi(s) (Eq. 4)."""
    uniform = 2 * torch.rand_like(a.unsqueeze(1).expand(-1, args.n_actions, -1)) - 1
    log_uniform = torch.full_like(uniform[..., 0], -a.shape[1] * math.log(2))
    if args.regularizer == "basic":
        return uniform, log_uniform
    actions, log_density = zip(
        (uniform, log_uniform), *(draw(p, args.n_actions) for p in (pi2, pi))
    )
    return torch.cat(actions, 1), torch.cat(log_density, 1)


def q_values(q, s, actions):
    """Q_i(s, a) of every state's own actions (B, M, A): (2, B, M)."""
    s = s.unsqueeze(1).expand(-1, actions.shape[1], -1)
    return q(torch.cat([s, actions], -1).flatten(0, 1)).unflatten(1, actions.shape[:2])


def target_value(nets, s2, r, terminal, a2, log_prob2, temperature, args):
    """SAC target, of the best of the next actions a2 (B, M, A); their log-densities (B, M)."""
    q2, best = q_values(nets.q_target, s2, a2).amin(0).max(1)  # (B,)
    if args.backup_entropy:
        q2 = q2 - temperature * log_prob2.gather(1, best.unsqueeze(1)).squeeze(1)
    return r + args.gamma * (1 - terminal) * q2  # (B,)


def conservative_diff(q_data, q_other, log_density, args):
    """D_i (2,) of Eq. 2 or 4: `q_other` (2, B, M) at the proposals, `q_data` (2, B) at the data."""
    if args.regularizer == "basic":
        high = q_other.mean(2)
    else:
        high = (q_other - log_density).logsumexp(2)
    diff = high - q_data
    return (diff if args.diff_floor is None else diff.clamp(min=args.diff_floor)).mean(1)


def multiplier_loss(multiplier, diff, args):
    """Eq. 30: the multiplier grows while D, a mean over critics, is above the gap."""
    return -multiplier * args.weight * (diff.detach() - args.gap).mean()


def actor_loss(log_prob, value, temperature):
    """SAC's actor; `value` is the least Q, or the data's log-likelihood in the warm start."""
    return (temperature * log_prob - value).mean()


def temperature_loss(log_temperature, entropy, act_dim):
    """SAC's temperature: grows while the entropy is below its target -A."""
    return log_temperature * (entropy + act_dim)


def update(nets, opt, data, args, warm):
    """One step of everything, on draws and losses of the actor before its step; while `warm`, the
    actor does not look at Q."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    pi = nets.pi(s)
    a_pi, log_prob, _ = sample_tanh_normal(*pi)
    with torch.no_grad():
        pi2, temperature = nets.pi(s2), nets.log_temperature.exp()
        others, log_density = proposals(pi, pi2, a, args)
        a2, log_prob2 = draw(pi2, args.n_actions if args.max_backup else 1)
        y = target_value(nets, s2, r, terminal, a2, log_prob2, temperature, args)
    if warm:
        value = tanh_normal_log_prob(dequantize(a, args.dequantize), *pi, clip=1e-3)
    else:
        value = nets.q(s, a_pi).amin(0)  # (B,)
    loss = minimize(opt.actor, actor_loss(log_prob, value, temperature))
    entropy = -log_prob.detach().mean()
    minimize(opt.temperature, temperature_loss(nets.log_temperature, entropy, a.shape[1]))

    q = q_values(nets.q, s, torch.cat([a.unsqueeze(1), others], 1))  # (2, B, 1 + M)
    td_loss = (q[..., 0] - y).square().mean(1).sum()
    diff = conservative_diff(q[..., 0], q[..., 1:], log_density, args)  # (2,)
    multiplier = nets.multiplier().detach() if args.lagrange else 1.0
    minimize(opt.q, td_loss + multiplier * args.weight * diff.sum())
    polyak(nets.q_target, nets.q, args.polyak)
    metrics = {"td_loss": td_loss.detach(), "diff": diff.detach().mean(), "actor_loss": loss}
    if args.lagrange:
        minimize(opt.multiplier, multiplier_loss(nets.multiplier(), diff, args))
        metrics["multiplier"] = multiplier
    q_mean = q.detach().mean((0, 1))  # (1 + M,)
    metrics |= {"q_data": q_mean[0], "target": y.mean()}
    for name, part in zip(("q_uniform", "q_next", "q_pi"), q_mean[1:].split(args.n_actions)):
        metrics[name] = part.mean()
    return metrics | {"entropy": entropy, "temperature": temperature}


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    return nets.scaling.action(nets.pi(nets.scaling.obs(obs))[0].tanh())


def train(args):
    """Train, log and save; returns the mean score of the last 10 evaluations."""
    if args.regularizer not in ("h", "basic"):
        raise InputError(f"--regularizer is {args.regularizer!r}: give h or basic")
    run = Run(args)
    data, task = load_dataset(args.env, run.device, args.eval_env)
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
    run.start(data, task, nets, opt)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        run.after(t, step(t <= args.warm_start), lambda obs: policy(nets, obs, args))
    return run.finish()


if __name__ == "__main__":
    train(parse(Args, PRESETS))
