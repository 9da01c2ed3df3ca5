"""SAC+BC: SAC (Haarnoja et al., 2018; arXiv:1812.05905) with the AC+BC actor of S. Park's lecture
notes "Offline RL" (https://rail.eecs.berkeley.edu/deeprlcourse/static/sections/section-9.pdf).

Idea: SAC, with behavior cloning added to the actor's loss and Q scaled to unit size, so that one
number trades return against staying close to the data. The cloning term is the negative
log-likelihood of the data's actions under SAC's stochastic actor. Up to a constant, this is the
forward divergence KL(data, pi) of (8). AC+BC means actor-critic with behavior cloning. (8) and (9)
are numbers of the notes; (SAC 5), (SAC 7) and (SAC 18) are numbers of SAC's paper.

    y    = r + gamma (1 - terminal) (min_i Q'_i(s',a') - temperature log pi(a'|s'))
    L_Q  = E[ sum_i (Q_i(s,a) - y)^2 ]                                      (SAC 5)
    L_pi = E[ q_weight (temperature log pi(a~|s) - min_i Q_i(s,a~)) - alpha_bc log pi(a|s) ], (9)
           q_weight = 1 / mean |min_i Q_i(s,a~)|, detached
    L_T  = temperature (E[-log pi(a~|s)] + A)                               (SAC 18)

a' and a~ are samples of the tanh-Gaussian pi at s' and at s; the gradient of L_pi runs through a~.
Q' are the target critics, and A is the number of action dimensions. The first bracket of L_pi is
the loss of SAC's actor (SAC 7). The entropy term of y is left out unless --backup-entropy is set.
An alpha_bc of 0 is SAC, and a large one clones the data. TD3+BC's alpha works the other way round:
for an actor with a fixed deviation of 1, alpha corresponds to alpha_bc = 2 / (alpha A).

The notes come without code. The reference is agents/gcsacbc.py of seohongpark/horizon-reduction,
SAC+BC for reaching goals by the author of the notes.

What changes scores (more in DEPARTURES, at the foot of the file):
- Cloning is the notes' log-likelihood; the code penalizes the squared distance between the sampled
  action a~ and the data's action.
- The actor maximizes the minimum over the critics, and the target of the entropy is -A; the code
  has the mean over the critics and -A/2.
- The notes have neither entropy nor `q_weight`; the code has both.
- The entropy term of y is off by default, as in the code. SAC itself has it.
- The critics step first, and the actor is trained on the updated critics; the code computes all
  losses with the weights from before the step.
- The default of alpha_bc is ours.

    python algorithms/sac_bc.py  # 25k steps: 45.1 ± 2.3, hopper-medium-expert-demo, 3 seeds
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
        self.actor = MLP(obs_dim, hidden, hidden, 2 * act_dim)
        self.q = ScalarMLP(obs_dim + act_dim, hidden, hidden, members=args.critics)
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
    the cloning term, the weight of SAC's loss, the actions and the entropy."""
    mean, log_std = nets.pi(s)
    pi, log_prob, _ = sample_tanh_normal(mean, log_std)
    q = nets.q(s, pi).amin(0)  # (B,)
    q_weight = 1 / q.detach().abs().mean()
    temperature = nets.log_temperature.exp().detach()
    sac_loss = (temperature * log_prob - q).mean()
    a = dequantize(a, args.dequantize)
    bc_loss = -tanh_normal_log_prob(a, mean, log_std, clip=1e-6).mean()
    loss = q_weight * sac_loss + args.alpha_bc * bc_loss
    entropy = -log_prob.detach().mean()
    return loss, bc_loss.detach(), q_weight, pi.detach(), entropy


def temperature_loss(nets, entropy, act_dim):
    """SAC's temperature: grows while the mean entropy is below its target -A."""
    return nets.log_temperature.exp() * (entropy + act_dim)


def update(nets, opt, data, args):
    """One step of the critics, the actor, the temperature and the targets."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    q_loss, q_mean = critic_loss(nets, s, a, r, s2, terminal, args)
    minimize(opt.q, q_loss)
    pi_loss, bc_loss, q_weight, pi, entropy = actor_loss(nets, s, a, args)
    minimize(opt.actor, pi_loss)
    minimize(opt.temperature, temperature_loss(nets, entropy, a.shape[1]))
    polyak(nets.q_target, nets.q, args.polyak)
    return {
        "q_loss": q_loss.detach(),
        "q_mean": q_mean,
        "pi_loss": pi_loss.detach(),
        "bc_loss": bc_loss,
        "q_weight": q_weight,
        "saturated_actions": (pi.abs() > 0.99).float().mean(),
        "entropy": entropy,
        "temperature": nets.log_temperature.detach().exp(),
    }


def q(nets, s, a):
    """The value (E, B) of every critic at scaled states s (B, S), actions a (B, A) in [-1, 1]."""
    return nets.q(s, a)


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


DEPARTURES = """
The authors' code, against the paper:
- The notes come without code, so "the authors' code" is here agents/gcsacbc.py of
  seohongpark/horizon-reduction at commit c298aed, which came with arXiv:2506.04168. It learns to
  reach goals. "The paper" is the notes.
- The policy is penalized by alpha times the squared distance of the sampled action a~ to the data's
  action, a sum over action dimensions, in place of -alpha log pi(a|s). In expectation this is the
  distance of the policy's mean action plus the policy's variance, so this term always narrows the
  policy, whereas the likelihood fits the policy's spread to that of the data.
- The actor's loss has SAC's entropy term, with a temperature that is learned by (SAC 18) towards an
  entropy of -A/2. The notes have no entropy.
- The actor maximizes the mean over the two critics. Equation (9) has a single Q.
- Cloning is multiplied by the mean of |Q|. The notes do not scale any term.
- y has the minimum or the mean over the critics (q_agg), without an entropy term. It is clipped to
  the range that the value of reaching a goal can have. By default the critics' outputs are logits,
  trained with a cross-entropy loss, and the actor maximizes the logits.
- All losses of a step are computed with the weights from before the step, and the targets follow
  the critics from before the step.

This file, against the authors' code:
- Cloning is the data's log-likelihood, as in the notes.
- There are no goals, y is not clipped, and the critics minimize a squared error.
- The actor maximizes the minimum over the critics, as in SAC.
- The target of the entropy is -A, as in SAC's paper.
- The critics step first. The actor's loss is computed by the critics after their step, and the
  targets follow them after their step.
- `q_weight` divides all of SAC's loss by the mean of |Q|, where the code multiplies cloning by it.
  The two losses differ by this factor, and Adam divides most of it out. In both, the temperature
  stays in units of Q.
- The target's entropy term is off by default; --backup-entropy adds it, as SAC itself has it.
- SAC's paper halves the squared error of the critics; this file does not.
- L_T is linear in the temperature, as in SAC's paper and in the code. cql.py explains the other
  form, which is linear in the logarithm.
- Networks have two layers of 256 units, ReLU and PyTorch's default weights, and batches have 256
  rows. The code has four layers of 1,024 units with GELU and layer normalization, small initial
  weights in the actor's last layer, batches of 1,024 rows and a gamma of 0.999. The log-std lies in
  [-5, 2] in both.
- The default of alpha_bc is ours. The code's values, from 0.1 to 10, are weights of a squared
  distance. To compare ours with TD3+BC's alpha, let the data's actions have the deviation std, and
  move the policy's mean away from theirs by d. In each dimension, TD3+BC pulls it back with
  2 d / (alpha A). Here the policy's deviation grows with d, so the pull is
  alpha_bc d / (std^2 + d^2). For small d both are equal at alpha_bc = 2 std^2 / (alpha A); but this
  pull is never above alpha_bc / (2 std), and it fades when d is large. With std = 0.3 and A = 3,
  alpha_bc = 0.1 resists any pull of Q that would move TD3+BC (alpha = 2.5) by less than 0.6.
- The reward shift of -1 in AntMaze is CORL's.
- --dequantize is an addition, and off by default. It is for data with many actions exactly at a
  bound, where log pi grows without limit.
"""

CLONING = dict(alpha_bc=10.0)  # on the tests' bandit cloning outweighs Q

PRESETS = {
    "hopper-medium-expert-demo": dict(  # shortened; faster targets
        steps=25_000, eval_every=1_250, polyak=0.01
    ),
    "hopper-replay-demo": dict(  # shortened; faster targets, less cloning
        alpha_bc=0.01, steps=30_000, eval_every=1_500, polyak=0.01
    ),
    "pointmaze-stitch-demo": dict(  # with AntMaze's reward shift
        reward_shift=-1.0, polyak=0.02, steps=12_000, eval_every=600, eval_episodes=20
    ),
    "antmaze-*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(reward_shift=-1.0, eval_every=100_000, eval_episodes=100),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)
