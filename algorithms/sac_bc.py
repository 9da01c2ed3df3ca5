"""SAC+BC: SAC (arXiv:1812.05905) with the AC+BC actor of S. Park's lecture notes "Offline RL".

Idea: SAC, with behavior cloning added to the actor's loss and Q scaled to unit size, so that one
number trades return against staying close to the data. The cloning term is the forward divergence
KL(data, pi) of (8), which is the data's negative log-likelihood under SAC's stochastic actor, up to
a constant. AC+BC means actor-critic with behavior cloning. The numbers (8) and (9) are the notes'.

    y    = r + gamma (1 - terminal) (min_i Q'_i(s',a') - temperature log pi(a'|s'))  (SAC target)
    L_Q  = E[ sum_i (Q_i(s,a) - y)^2 ]                                      (SAC critics)
    L_pi = E[ weight (temperature log pi(a~|s) - min_i Q_i(s,a~)) - alpha_bc log pi(a|s) ],  (9)
           weight = 1 / mean |min_i Q_i(s,a~)|, detached
    L_T  = temperature (E[-log pi(a~|s)] + A)                               (SAC temperature)

a' and a~ are samples of the tanh-Gaussian pi at s' and at s; the gradient of L_pi runs through a~.
Q' are the target critics, and A is the number of action dimensions. The entropy term of y is left
out unless --backup-entropy is set. An alpha_bc of 0 is SAC, a large one is maximum likelihood. So
it is inverse to TD3+BC's alpha: with a fixed deviation of 1, TD3+BC has alpha_bc = 2 / (alpha A).

The default of alpha_bc is ours. To compare it with TD3+BC's alpha, let the data's actions have the
deviation std, and move the policy's mean away from theirs by d. In each dimension, TD3+BC pulls it
back with 2 d / (alpha A). Here the policy's deviation grows with d, so the pull is
alpha_bc d / (std^2 + d^2). For small d both are equal at alpha_bc = 2 std^2 / (alpha A); but this
pull is never above alpha_bc / (2 std), and it fades when d is large. With std = 0.3 and A = 3,
alpha_bc = 0.1 resists any pull of Q that would move TD3+BC (alpha = 2.5) by less than 0.6.

The authors' code, against the paper:
- The notes come without code.

This file, against the authors' code:
- The notes have neither entropy nor `weight`. The weight is TD3+BC's; it scales all of SAC's loss,
  so that the temperature stays in units of Q.
- The target's entropy term is off by default; SAC itself has it.
- L_T is linear in the temperature, as in SAC's paper. Adam moves the logarithm of the temperature,
  for which the gradient is temperature (H + A), where H is the policy's entropy. The loss in cql.py
  is that of CQL's authors, log(temperature) (H + A), with the gradient H + A. Both gradients have
  the same sign and are 0 at the same entropy; this one shrinks and grows with the temperature.
- The bounds of the log-std are ours.
- The reward shift of -1 in AntMaze is CORL's.
- --dequantize is an addition, and off by default. It is for data with many actions exactly at a
  bound, where log pi grows without limit.

    python algorithms/sac_bc.py  # scores 42.8 ± 1.6 on hopper-medium-expert-demo (3 seeds)
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import BatchSize, Count, NonNegative, Number, Positive, PositiveShare, Seed
from common import Share, ShareBelow1
from common import MLP, Adam, RunArgs, ScalarMLP, Scaling
from common import dequantize, sample_tanh_normal, share_at_bounds, tanh_normal_log_prob
from common import graphed, largest_value, minimize, normalize_obs, polyak, sample


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
    alpha_bc: NonNegative = 0.1
    """weight of cloning against Q (Eq. 9): 0 is SAC, a large number is behavior cloning"""
    backup_entropy: bool = False
    """keep SAC's entropy term, -temperature log pi(a'|s'), in the target"""
    dequantize: Share = 0.0
    """actions exactly at a bound are spread over a band of this width inside it: 0 is no spread"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.005
    """share of the online critics that targets take over per step"""
    lr: Positive = 3e-4
    """Adam's learning rate of the actor, the critics and the temperature"""
    critics: Count = 2
    """number of critics; their minimum is the Q of the target and of the actor"""
    normalize_obs: bool = True
    """shift and scale observations to mean 0 and deviation 1 over the data"""
    reward_shift: Number = 0.0
    """added to every reward"""


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        self.actor = MLP(obs_dim, 256, 256, 2 * act_dim)
        self.q = ScalarMLP(obs_dim + act_dim, 256, 256, members=args.critics)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def pi(self, s):
        """Mean and log-std (B, A) of the actor's tanh-Gaussian."""
        mean, log_std = self.actor(s).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)  # else repeated actions have no largest likelihood


def critic_loss(nets, s, a, r, s2, terminal, args):
    """SAC target and critics: sum over critics of the mean over the batch; also the mean of Q."""
    with torch.no_grad():
        a2, log_prob, _ = sample_tanh_normal(*nets.pi(s2))
        v2 = nets.q_target(s2, a2).amin(0)  # (B,)
        if args.backup_entropy:
            v2 = v2 - nets.log_temperature.exp() * log_prob
        y = r + args.gamma * (1 - terminal) * v2  # (B,)
    q = nets.q(s, a)  # (E, B)
    loss = (q - y).square().mean(1).sum()
    return loss, q.detach().mean()


def actor_loss(nets, s, a, args):
    """Eq. 9: SAC's loss scaled to unit Q, plus the data's negative log-likelihood (8). Also returns
    the cloning term, the weight, the actions and the entropy."""
    mean, log_std = nets.pi(s)
    pi, log_prob, _ = sample_tanh_normal(mean, log_std)
    q = nets.q(s, pi).amin(0)  # (B,)
    weight = 1 / q.detach().abs().mean()
    temperature = nets.log_temperature.exp().detach()
    sac_loss = (temperature * log_prob - q).mean()
    a = dequantize(a, args.dequantize)
    bc_loss = -tanh_normal_log_prob(a, mean, log_std, clip=1e-6).mean()
    loss = weight * sac_loss + args.alpha_bc * bc_loss
    entropy = -log_prob.detach().mean()
    return loss, bc_loss.detach(), weight, pi.detach(), entropy


def temperature_loss(nets, entropy, act_dim):
    """SAC's temperature: grows while the mean entropy is below its target -A."""
    return nets.log_temperature.exp() * (entropy + act_dim)


def update(nets, opt, data, args):
    """One step of the critics, the actor, the temperature and the targets."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    q_loss, q_mean = critic_loss(nets, s, a, r, s2, terminal, args)
    minimize(opt.q, q_loss)
    pi_loss, bc_loss, weight, pi, entropy = actor_loss(nets, s, a, args)
    minimize(opt.actor, pi_loss)
    minimize(opt.temperature, temperature_loss(nets, entropy, a.shape[1]))
    polyak(nets.q_target, nets.q, args.polyak)
    return {
        "q_loss": q_loss.detach(),
        "q_mean": q_mean,
        "pi_loss": pi_loss.detach(),
        "bc_loss": bc_loss,
        "weight": weight,
        "saturated_actions": (pi.abs() > 0.99).float().mean(),
        "entropy": entropy,
        "temperature": nets.log_temperature.detach().exp(),
    }


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    mean, _ = nets.pi(nets.scaling.obs(obs))
    return nets.scaling.action(mean.tanh())


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
    data.reward += args.reward_shift
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(
        q=Adam(nets.q.parameters(), args.lr),
        actor=Adam(nets.actor.parameters(), args.lr),
        temperature=Adam([nets.log_temperature], args.lr),
    )
    run.start(nets, opt, q_mean=largest_value(data, args.gamma))
    share_at_bounds(data, args.dequantize)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        metrics = step()
        run.after(t, metrics, lambda obs: policy(nets, obs, args))


PRESETS = {
    "hopper-medium-expert-demo": dict(  # shortened; faster targets
        steps=25_000, eval_every=1_250, polyak=0.01
    ),
    "hopper-replay-demo": dict(  # shortened; faster targets, less cloning
        alpha_bc=0.01, steps=30_000, eval_every=1_500, polyak=0.01
    ),
    "pointmaze-medium-demo": dict(  # with AntMaze's reward shift
        reward_shift=-1.0, polyak=0.02, steps=12_000, eval_every=600, eval_episodes=20
    ),
    "antmaze-*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
}

if __name__ == "__main__":
    from harness import main

    main(Args, PRESETS, train)
