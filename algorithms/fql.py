"""Flow Q-learning, FQL (Park, Li & Levine, ICML 2025; arXiv:2502.02538).

Idea: clone the data with a flow. Its velocity v is trained on straight lines from Gaussian noise to
the data's actions, and small steps along v carry noise to actions, so that the clone may have many
modes. A second network w learns to jump from noise to the flow's action in one step. Q improves w
alone, so no gradient runs through the steps of the flow.

    x_t  = (1 - t) x_0 + t a,  x_0 ~ N(0, I), t ~ U[0, 1]
    L_v  = E[ |v(s, x_t, t) - (a - x_0)|^2 ]                                (flow matching)
    mu(s, z) = clip(x_M),  x_0 = z,  x_{k+1} = x_k + v(s, x_k, k / M) / M    (Euler steps)
    L_w  = E[ alpha |w(s, z) - mu(s, z)|^2 - mean_i Q_i(s, clip(w(s, z))) ]  (distillation and Q)
    y    = r + gamma (1 - terminal) mean_i Q'_i(s', clip(w(s', z')))         (target)
    L_Q  = E[ mean_i (Q_i(s, a) - y)^2 ]                                     (critics)

z and z' are standard normal, Q'_i are the target critics, and clip is to [-1, 1]. M, the number of
Euler steps, is --flow-steps. All losses of a step are computed with the weights from before the
step, and Q' follows the critics from before the step, too. The policy acts by clip(w(s, z)) with
fresh noise z at every step, also in evaluations.

With alpha = 0, w follows Q alone; with a large alpha, it imitates the flow. In L_w, the first term
has the scale of actions and the second the scale of Q. A published alpha is therefore right only
with the rewards, the discount and the reward shift for which it was chosen. With
--normalize-q-loss, Q in L_w is divided by the mean of |Q|, so that this scale does not matter.

With --best-of N, w trains as before, but what acts is the flow: of N samples mu(s, z), the one with
the largest Q, as in the authors' IFQL. Every run reports this for 1 and 16 samples at its end.

Without w (--no-distill), the flow itself acts, and Q's gradient runs through its M steps. This is
the paper's FBRAC.

What changes scores (more in DEPARTURES, at the foot of the file):
- The squared norms are means over action dimensions, as in the authors' code; the paper's are sums.
  So alpha is that of the paper's equation times the number of action dimensions. All published
  values are meant for the code.
- For door, hammer and relocate, the presets have the alpha of the commands that the authors
  publish, which is ten times as large as that of the paper's table.
- No alpha is published for locomotion. The presets there and on the bundled hopper data follow the
  authors' advice for new data, which is --normalize-q-loss with an alpha between 0.03 and 10.

    python algorithms/fql.py  # 20k steps: 54.2 ± 3.1, hopper-medium-expert-demo, 3 seeds
"""

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import BatchSize, Count, CountOrZero, NonNegative, Number, Positive, PositiveShare
from common import Seed, ShareBelow1
from common import MLP, Adam, Episodes, RunArgs, ScalarMLP, Scaling
from common import glorot_, graphed, largest_value, minimize, normalize_obs, polyak, sample


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
    eval_every: Count = 100_000
    """gradient steps between evaluations"""
    eval_episodes: Episodes = 50
    """episodes per evaluation"""
    alpha: NonNegative = 10.0
    """weight of distillation against Q in the policy's loss: 0 is Q alone, a large one the clone"""
    normalize_q_loss: bool = False
    """divide Q by the mean of |Q| in the policy's loss, so that alpha fits rewards of any scale"""
    flow_steps: Count = 10
    """Euler steps M of the flow: 1 gives the mean of the data's actions, many keep its modes"""
    distill: bool = True
    """learn a one-step policy; without it the flow acts, and Q is maximized through its M steps"""
    q_agg: Literal["mean", "min"] = "mean"
    """how y, and the choice of --best-of, combine the two critics: mean, or the smaller one"""
    best_of: CountOrZero = 0
    """act by the best, by Q, of so many samples of the flow: 1 is the flow; 0 is off"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.005
    """share of the online critics that their targets take over per step"""
    lr: Positive = 3e-4
    """Adam's learning rate of all networks"""
    hidden: Count = 512
    """hidden units in each of the four layers of every network"""
    normalize_obs: bool = False
    """shift and scale observations to mean 0 and deviation 1 over the data"""
    reward_shift: Number = 0.0
    """added to every reward"""


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        hidden = [args.hidden] * 4
        self.scaling = Scaling(data)
        self.velocity = MLP(obs_dim + act_dim + 1, *hidden, act_dim, activation="gelu")
        self.q = ScalarMLP(
            obs_dim + act_dim,
            *hidden,
            members=2,
            activation="gelu",
            layer_norm=True,
            norm_eps=1e-6,
        )
        glorot_(self.velocity)
        glorot_(self.q)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        if args.distill:
            self.actor = glorot_(MLP(obs_dim + act_dim, *hidden, act_dim, activation="gelu"))


def flow(nets, s, z, args):
    """M Euler steps along the velocity, from noise z (B, A) to actions (B, A), not clipped."""
    x = z
    for k in range(args.flow_steps):
        t = torch.full_like(z[:, :1], k / args.flow_steps)  # (B, 1)
        x = x + nets.velocity(s, x, t) / args.flow_steps
    return x


def act(nets, s, z, args):
    """The policy's action (B, A) from noise z (B, A), not clipped."""
    return nets.actor(s, z) if args.distill else flow(nets, s, z, args)


def critic_loss(nets, s, a, r, s2, terminal, args):
    """L_Q and its target y: the mean over critics and batch. Also returns the mean of Q."""
    with torch.no_grad():
        z = torch.randn_like(a)
        a2 = act(nets, s2, z, args).clamp(-1, 1)
        q2 = nets.q_target(s2, a2)  # (2, B)
        q2 = q2.amin(0) if args.q_agg == "min" else q2.mean(0)
        y = r + args.gamma * (1 - terminal) * q2  # (B,)
    q = nets.q(s, a)  # (2, B)
    return (q - y).square().mean(), q.detach().mean()


def flow_loss(nets, s, a):
    """L_v: at a point between noise and action, the velocity should be action minus noise."""
    noise = torch.randn_like(a)
    t = torch.rand_like(a[:, :1])  # (B, 1)
    x = (1 - t) * noise + t * a
    v = nets.velocity(s, x, t)
    return (v - (a - noise)).square().mean()


def distill_loss(nets, s, z, pi, args):
    """First term of L_w, without alpha: pi = w(s, z) (B, A), not clipped, against the flow's action
    from the same noise z."""
    with torch.no_grad():
        target = flow(nets, s, z, args).clamp(-1, 1)
    return (pi - target).square().mean()


def improvement_loss(nets, s, pi, args):
    """Second term of L_w: minus the mean of both critics. Also returns the mean of Q."""
    q = nets.q(s, pi.clamp(-1, 1)).mean(0)  # (B,)
    size = q.detach().abs().mean() if args.normalize_q_loss else 1.0
    return -q.mean() / size, q.detach().mean()


def update(nets, opt, data, args):
    """One step of flow, policy, critics and targets; all losses see the weights before the step."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    q_loss, q_mean = critic_loss(nets, s, a, r, s2, terminal, args)
    bc_loss = flow_loss(nets, s, a)
    z = torch.randn_like(a)
    pi = act(nets, s, z, args)
    improvement, q_pi = improvement_loss(nets, s, pi, args)
    imitation = distill_loss(nets, s, z, pi, args) if args.distill else bc_loss
    pi_loss = args.alpha * imitation + improvement
    polyak(nets.q_target, nets.q, args.polyak)
    if args.distill:
        minimize(opt.actor, pi_loss)
        minimize(opt.velocity, bc_loss)
    else:
        minimize(opt.velocity, pi_loss)
    minimize(opt.q, q_loss)  # last, because the gradient of pi_loss runs through the critics
    losses = {"q_loss": q_loss, "pi_loss": pi_loss, "bc_loss": bc_loss, "imitation": imitation}
    metrics = {name: loss.detach() for name, loss in losses.items()}
    metrics |= {"q_mean": q_mean, "q_pi": q_pi}
    metrics["clipped_actions"] = (pi.detach().abs() > 1).float().mean()
    return metrics


def q(nets, s, a):
    """The value (2, B) of every critic at scaled states s (B, S), actions a (B, A) in [-1, 1]."""
    return nets.q(s, a)


def best_of_flow(nets, s, z, args):
    """Of the flow's clipped actions from noise z (B, N, A), the ones of largest Q (B, A)."""
    n = z.shape[1]
    rows = s.repeat_interleave(n, 0)  # (B N, S)
    a = flow(nets, rows, z.flatten(0, 1), args).clamp(-1, 1)
    q = nets.q(rows, a)  # (2, B N)
    q = q.amin(0) if args.q_agg == "min" else q.mean(0)
    best = q.view(-1, n, 1).argmax(1, keepdim=True)  # (B, 1, 1)
    return a.view_as(z).gather(1, best.expand(-1, 1, z.shape[2])).squeeze(1)


def policy_with_noise(nets, obs, noise, args):
    """Raw observations (B, S) and standard normal noise (B, A), or (B, N A) with --best-of N, to
    actions (B, A) in the task's bounds."""
    s = nets.scaling.obs(obs)
    if args.best_of:
        z = noise.unflatten(1, (args.best_of, -1))
        return nets.scaling.action(best_of_flow(nets, s, z, args))
    return nets.scaling.action(act(nets, s, noise, args).clamp(-1, 1))


def policy(nets, obs, args):
    """Raw observations (B, S) to actions (B, A) in the task's bounds, with fresh noise."""
    row = nets.scaling.action_center.repeat(max(args.best_of, 1))
    noise = torch.randn_like(row.expand(len(obs), -1))
    return policy_with_noise(nets, obs, noise, args)


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
    data.reward += args.reward_shift
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(
        velocity=Adam(nets.velocity.parameters(), args.lr),
        q=Adam(nets.q.parameters(), args.lr),
    )
    if args.distill:
        opt.actor = Adam(nets.actor.parameters(), args.lr)
    largest = largest_value(data, args.gamma)
    run.start(nets, opt, q_mean=largest, q_pi=largest)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        run.after(t, step(), lambda obs: policy(nets, obs, args))
    one, best = replace(args, best_of=1), replace(args, best_of=16)
    run.reference("its flow", lambda obs: policy(nets, obs, one))
    run.reference("best of 16 of its flow", lambda obs: policy(nets, obs, best))


DEPARTURES = """
The authors' code, against the paper:
- The squared norms of the losses are means over action dimensions; the paper's are sums. So the
  code's alpha is that of the paper's equation times the number of action dimensions. All published
  values, and those below, are meant for the code.
- Dividing Q by the mean of |Q| is not in the paper. The authors advise it for new data, with an
  alpha between 0.03 and 10.
- For door, hammer and relocate, the commands that the authors publish have an alpha ten times as
  large as the paper's table. PRESETS below has the values of the commands.
- Their repository has no FBRAC. --no-distill equals that of later work by others, agents/fbrac.py
  of chongyi-zheng/value-flows, whose losses of critics and flow are FQL's.

This file, against the authors' code:
- The last row of an episode that a time limit ended is kept where the data has its next
  observation; the authors' D4RL loader drops it.
- The data's actions are used as they are; the authors clip them to 1 - 1e-5 in size.
- Each of the three networks has its own Adam, all with one learning rate; the authors have one Adam
  for all. The arithmetic is the same.
- There is no evaluation before the first step, and no training online.
- --best-of is how their IFQL acts (agents/ifql.py: 32 samples, clipped, the smaller of the two
  online critics). IFQL's critics are those of IQL with an expectile of 0.9; here they are FQL's,
  and --q-agg combines them.
- The presets of locomotion follow the authors' advice for new data, because no alpha is published.
"""

# For a CPU: few updates of narrow networks, faster targets, normalized observations, and an alpha
# within the authors' advice for new data.
SHORT = dict(steps=20_000, eval_every=1_000, eval_episodes=10, hidden=128, polyak=0.02)
SHORT |= dict(normalize_obs=True, normalize_q_loss=True, alpha=0.3)

PRESETS = {
    # The authors publish no alpha for locomotion: this is their advice for new data.
    "halfcheetah-*": dict(normalize_q_loss=True, alpha=1.0),
    "hopper-*": dict(normalize_q_loss=True, alpha=1.0),
    "walker2d-*": dict(normalize_q_loss=True, alpha=1.0),
    "mujoco/*": dict(normalize_q_loss=True, alpha=1.0),
    "hopper-medium-expert-demo": SHORT,
    "hopper-replay-demo": SHORT | dict(alpha=0.1, q_agg="min"),
    "pointmaze-stitch-demo": dict(  # AntMaze's settings, shortened, narrower; faster targets
        reward_shift=-1.0, alpha=10.0, normalize_obs=True, polyak=0.02, hidden=256
    )
    | dict(steps=20_000, eval_every=1_000, eval_episodes=20),
    # D4RL's names, and Minari's, which have a slash before the kind of data.
    "*antmaze?umaze*": dict(steps=500_000, reward_shift=-1.0, alpha=10.0),
    "*antmaze?medium-play*": dict(steps=500_000, reward_shift=-1.0, alpha=10.0),
    "*antmaze?medium-diverse*": dict(steps=500_000, reward_shift=-1.0, alpha=10.0),
    "*antmaze?large-play*": dict(steps=500_000, reward_shift=-1.0, alpha=3.0),
    "*antmaze?large-diverse*": dict(steps=500_000, reward_shift=-1.0, alpha=3.0),
    "*pen?human-*": dict(steps=500_000, q_agg="min", alpha=10_000.0),
    "*pen?cloned-*": dict(steps=500_000, q_agg="min", alpha=10_000.0),
    "*pen?expert-*": dict(steps=500_000, q_agg="min", alpha=3_000.0),
    "*door?human-*": dict(steps=500_000, q_agg="min", alpha=30_000.0),
    "*door?cloned-*": dict(steps=500_000, q_agg="min", alpha=30_000.0),
    "*door?expert-*": dict(steps=500_000, q_agg="min", alpha=30_000.0),
    "*hammer?human-*": dict(steps=500_000, q_agg="min", alpha=30_000.0),
    "*hammer?cloned-*": dict(steps=500_000, q_agg="min", alpha=10_000.0),
    "*hammer?expert-*": dict(steps=500_000, q_agg="min", alpha=30_000.0),
    "*relocate?human-*": dict(steps=500_000, q_agg="min", alpha=10_000.0),
    "*relocate?cloned-*": dict(steps=500_000, q_agg="min", alpha=30_000.0),
    "*relocate?expert-*": dict(steps=500_000, q_agg="min", alpha=30_000.0),
    # OGBench's names, all five tasks of each, and what --short adds.
    "antmaze-large-navigate-singletask*": dict(q_agg="min", alpha=10.0),
    "antmaze-giant-navigate-singletask*": dict(q_agg="min", alpha=10.0, gamma=0.995),
    "humanoidmaze-medium-navigate-singletask*": dict(alpha=30.0, gamma=0.995),
    "humanoidmaze-large-navigate-singletask*": dict(alpha=30.0, gamma=0.995),
    "antsoccer-arena-navigate-singletask*": dict(alpha=10.0, gamma=0.995),
    "cube-single-play-singletask*": dict(alpha=300.0),
    "cube-double-play-singletask*": dict(alpha=300.0),
    "scene-play-singletask*": dict(alpha=300.0),
    "puzzle-3x3-play-singletask*": dict(alpha=1000.0),
    "puzzle-4x4-play-singletask*": dict(alpha=1000.0),
    "short *-singletask*": dict(steps=100_000, eval_every=20_000, eval_episodes=50, hidden=128),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)
