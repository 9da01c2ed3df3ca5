"""Fisher-BRC (Kostrikov, Tompson, Fergus & Nachum, ICML 2021; arXiv:2103.08050).

Idea: write the critic as an offset plus the log-density of the behavior policy, and keep the
offset flat in the action, so that outside the data the density alone decides.

    L_mu     = E[ -log mu(a|s) - bc_weight H(mu(.|s)) ]                      (appendix A)
    Q_i(s,a) = O_i(s,a) + log mu(a|s)                                        (5)
    y        = r + bonus + gamma (1 - terminal) min_j Q'_j(s',a'), a' ~ pi(s')
    J(Q)     = sum_i E[ (y - Q_i(s,a))^2 ]                                   (2)
    L_O      = J(O + log mu) + lambda E_{a~pi} sum_i |grad_a O_i(s,a)|^2     (7)
    L_pi     = E_{a~pi}[ temperature log pi(a|s) - min_i Q_i(s,a) ]          (Algorithm 1, line 3)
    L_T      = temperature (H(pi(.|s)) + A), and likewise for `bc_weight` and mu (SAC)

The clone mu of the behavior policy is trained first, and then it is frozen. Q'_j is Q_j with a
target network in place of O_j. Both entropies H have the target -A, for A action dimensions.
Entropy enters the actor's loss alone: neither y nor the gradient of Q (Eq. 6) has it. Normalized,
exp(Q) is a density of actions. The penalty is the Fisher divergence of this density from mu
(Eq. 11), except that its actions are drawn from pi.

What changes scores (more in DEPARTURES, at the foot of the file):
- As in the authors' code, mu is a separate mixture for each action dimension.
- The bonus is the paper's 5. The paper's derivation loses a factor of 2 on the way; without this
  slip it would end at 2.5. AntMaze has no bonus here.
- The last row of an episode that a time limit ended is kept where the data has its next
  observation; D4RL's loader drops it.

    python algorithms/fisher_brc.py  # 10k steps: 99.0 ± 1.1, hopper-medium-expert-demo, 3 seeds
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
from common import BatchSize, Count, NonNegative, Number, Positive, PositiveShare, Seed
from common import Share, ShareBelow1, RunArgs, Adam, MLP, ScalarMLP, Scaling, orthogonal_
from common import dequantize, normal_log_prob, sample_tanh_normal, share_at_bounds, tanh_log_det
from common import graphed, largest_value, minimize, normalize_obs, polyak, sample


@dataclass
class Args(RunArgs):
    phases = {"behavior": "bc_steps", "train": "steps"}
    clone_flags = ("bc_steps", "bc_lr")
    env: str = "hopper-medium-expert-demo"
    """dataset: bundled, D4RL or OGBench name, Minari id, or path of an .hdf5 or .npz file"""
    seed: Seed = 0
    """seeds networks, batches and evaluation"""
    steps: Count = 1_000_000
    """gradient steps of actor and critics, after those of the clone"""
    batch_size: BatchSize = 256
    """transitions per gradient step"""
    eval_every: Count = 10_000
    """gradient steps between evaluations"""
    lam: NonNegative = 0.1
    """weight lambda of the gradient penalty (Eq. 7): 0 frees the offset, a large one is cloning"""
    bonus: Number = 5.0
    """added to every reward: above 0 it pays for survival where episodes can end early"""
    offset: bool = True
    """write Q as O + log mu (Eq. 5); without it Q is O alone (the paper's figure 5)"""
    penalty_actions: Literal["policy", "data"] = "policy"
    """where the penalty is taken: at actions of the policy (Eq. 7) or of the data"""
    dequantize: Share = 0.0
    """actions exactly at a bound are spread over a band of this width inside it: 0 is no spread"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.005
    """share of the online critics that targets take over per step"""
    lr: Positive = 3e-4
    """Adam's learning rate of the actor, the critics and the temperature"""
    components: Count = 5
    """number of tanh-Gaussians in the clone's mixture for each action dimension"""
    bc_steps: Count = 1_000_000
    """gradient steps of the clone, before those of actor and critics"""
    bc_lr: Positive = 1e-3
    """Adam's learning rate of the clone; divided by 10 after 80% of its steps, again after 90%"""
    clone: str | None = None
    """checkpoint.pt of a run on the same data: its clone is read, not trained"""
    hidden: Count = 256
    """hidden units in each layer of every network"""
    normalize_obs: bool = False
    """shift and scale observations to mean 0 and deviation 1 over the data"""


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        hidden = args.hidden
        self.scaling, self.components = Scaling(data), args.components
        self.adds_log_mu = args.offset
        self.behavior = MLP(obs_dim, hidden, hidden, 3 * act_dim * args.components)  # mu
        self.actor = MLP(obs_dim, hidden, hidden, hidden, 2 * act_dim)
        self.offset = ScalarMLP(obs_dim + act_dim, hidden, hidden, hidden, members=2)
        for net in (self.behavior, self.actor, self.offset):
            orthogonal_(net, hidden_gain=math.sqrt(2), last_gain=0.01)
        self.offset_target = copy.deepcopy(self.offset).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.log_bc_weight = nn.Parameter(torch.zeros(()))

    def mu(self, s):
        """Log-weights, means and log-stds of the clone, each (K, B, A)."""
        out = self.behavior(s).view(len(s), 3, self.components, -1)
        logits, mean, log_std = out.permute(1, 2, 0, 3).contiguous()
        return logits.log_softmax(0), mean, log_std.clamp(-20, 2)

    def pi(self, s):
        """Mean and log-std (B, A) of the actor's tanh-Gaussian."""
        mean, log_std = self.actor(s).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)


def pre_tanh(a, args):
    """x = atanh(a) of the data's actions, which --dequantize moves off their bounds. At a bound x
    is infinite; log_mu clips it."""
    a = dequantize(a, args.dequantize)
    return torch.atanh(a.clamp(-1, 1))  # rounding may have left the bounds


def largest_x(dtype):
    """x = atanh(1 - 1e-6), with 1 - 1e-6 rounded to `dtype`; the authors clip actions there."""
    gap = torch.finfo(dtype).eps / 2  # between neighboring numbers just below 1
    return math.atanh(1 - gap * round(1e-6 / gap))


def log_mu(mixture, x):
    """log mu(tanh(x)|s), (..., B), of x (..., B, A); constant beyond largest_x. Every dimension has
    a mixture of its own, and the dimensions are independent."""
    log_weight, mean, log_std = mixture
    limit = largest_x(x.dtype)
    x = x.clamp(-limit, limit)
    log_prob = normal_log_prob(x.unsqueeze(-3), mean, log_std)  # (..., K, B, A)
    log_mixture = (log_weight + log_prob).logsumexp(-3)
    return (log_mixture - tanh_log_det(x)).sum(-1)


def sample_mu(mixture):
    """x (B, A) with tanh(x) ~ mu; the gradient reaches mean and std of the drawn component only."""
    log_weight, mean, log_std = mixture
    u = torch.rand_like(mean[:1])
    below_u = log_weight.detach().exp().cumsum(0) < u
    k = below_u.sum(0, keepdim=True).clamp(max=len(mean) - 1)
    mean = mean.gather(0, k).squeeze(0)
    log_std = log_std.gather(0, k).squeeze(0)
    return mean + log_std.exp() * torch.randn_like(mean)


def behavior_loss(nets, s, a, args):
    """L_mu; also its negative log-likelihood and its entropy. All are means over the batch."""
    mixture = nets.mu(s)
    x = torch.stack([pre_tanh(a, args), sample_mu(mixture)])  # (2, B, A)
    nll, entropy = -log_mu(mixture, x).mean(1)
    bc_weight = nets.log_bc_weight.exp().detach()
    loss = nll - bc_weight * entropy
    return loss, nll.detach(), entropy.detach()


def target_value(nets, s2, r, terminal, a2, log_mu2, args):
    """y of Eq. 2 (B,), which has no entropy term; with --no-offset, log_mu2 is 0."""
    o2 = nets.offset_target(s2, a2).amin(0)
    q2 = o2 + log_mu2  # min_j Q'_j = min_j O'_j + log mu
    return r + args.bonus + args.gamma * (1 - terminal) * q2  # (B,)


def gradient_penalty(nets, s, a):
    """Eq. 7, second term: sum over critics of E |grad_a O_i(s,a)|^2."""
    grad = nets.offset.input_gradient(s, a)  # (2, B, S + A): one per critic
    grad_a = grad[..., s.shape[1] :]
    return grad_a.square().sum(-1).mean(1).sum()


def actor_loss(nets, s, a_pi, log_prob, log_mu_pi):
    """Algorithm 1, line 3, on Q = O + log mu, whose gradient in the action is that of Eq. 6."""
    q = nets.offset(s, a_pi).amin(0) + log_mu_pi
    temperature = nets.log_temperature.exp().detach()
    return (temperature * log_prob - q).mean()


def temperature_loss(log_temperature, entropy, act_dim):
    """L_T: the temperature grows while the mean entropy is below its target -A. The DEPARTURES of
    cql.py compare this form with that of CQL's authors."""
    return log_temperature.exp() * (entropy + act_dim)


def update_behavior(nets, opt, data, args):
    """One step of the clone and of the weight of its entropy."""
    s, a = sample(data, args.batch_size, ("obs", "action"))
    loss, nll, entropy = behavior_loss(nets, s, a, args)
    minimize(opt.behavior, loss)
    minimize(opt.bc_weight, temperature_loss(nets.log_bc_weight, entropy, a.shape[1]))
    bc_weight = nets.log_bc_weight.detach().exp()
    return {"nll": nll, "entropy": entropy, "bc_weight": bc_weight}


def update(nets, opt, data, args):
    """One step of Algorithm 1: critics, targets, actor, temperature."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    pi = nets.pi(s)  # before its step; shared by the penalty's and the actor's samples
    with torch.no_grad():
        a2, _, x2 = sample_tanh_normal(*nets.pi(s2))
        a_penalty = a
        if args.penalty_actions == "policy":
            a_penalty, _, _ = sample_tanh_normal(*pi)
        if args.offset:
            mixture, mixture2 = nets.mu(s), nets.mu(s2)
            log_mu2 = log_mu(mixture2, x2)
            log_mu_data = log_mu(mixture, pre_tanh(a, args))
        else:
            log_mu2 = log_mu_data = torch.zeros_like(r)
        y = target_value(nets, s2, r, terminal, a2, log_mu2, args)
    o = nets.offset(s, a)  # (2, B)
    q = o + log_mu_data  # Eq. 5
    td_loss = (q - y).square().mean(1).sum()
    penalty = gradient_penalty(nets, s, a_penalty)
    q_loss = td_loss + args.lam * penalty
    minimize(opt.offset, q_loss)
    polyak(nets.offset_target, nets.offset, args.polyak)
    a_pi, log_prob, x_pi = sample_tanh_normal(*pi)
    log_mu_pi = log_mu(mixture, x_pi) if args.offset else torch.zeros_like(r)
    pi_loss = actor_loss(nets, s, a_pi, log_prob, log_mu_pi)
    minimize(opt.actor, pi_loss)
    entropy = -log_prob.detach().mean()
    minimize(opt.temperature, temperature_loss(nets.log_temperature, entropy, a.shape[1]))
    return {
        "q_loss": q_loss.detach(),
        "td_loss": td_loss.detach(),
        "penalty": penalty.detach(),
        "pi_loss": pi_loss.detach(),
        "q_data": q.detach().mean(),
        "o_data": o.detach().mean(),
        "target": y.mean(),
        "log_mu_data": log_mu_data.mean(),
        "log_mu_pi": log_mu_pi.detach().mean(),
        "entropy": entropy,
        "temperature": nets.log_temperature.detach().exp(),
        "abs_action": a_pi.detach().abs().mean(),
    }


def behavior_policy(nets, obs, args):
    """The mean of the clone's most likely component in every dimension, in the task's bounds."""
    log_weight, mean, _ = nets.mu(nets.scaling.obs(obs))
    best = log_weight.argmax(0, keepdim=True)
    mean = mean.gather(0, best).squeeze(0)
    return nets.scaling.action(mean.tanh())


def q(nets, s, a):
    """Q_i(s, a) of every critic (Eq. 5), (2, B); s (B, S) are scaled states, a (B, A) lie in
    [-1, 1]. With --no-offset, Q_i is O_i alone."""
    o = nets.offset(s, a)
    if not nets.adds_log_mu:
        return o
    x = torch.atanh(a.clamp(-1, 1))
    return o + log_mu(nets.mu(s), x)


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    mean, _ = nets.pi(nets.scaling.obs(obs))
    return nets.scaling.action(mean.tanh())


def train_behavior(run, nets, opt, data, args):
    """Phase one: clone the behavior policy, or read the clone of --clone."""
    at_bounds = share_at_bounds(data, args.dequantize)
    if args.clone:
        run.read_clone(nets.behavior)
    step = graphed(update_behavior, nets, opt, data, args, compile=args.compile)
    for t in run.loop(0 if args.clone else args.bc_steps, phase="behavior"):
        decays = (t > 0.8 * args.bc_steps) + (t > 0.9 * args.bc_steps)
        lr = args.bc_lr * 0.1**decays
        opt.behavior.lr.fill_(lr)
        opt.bc_weight.lr.fill_(lr)
        metrics = step()
        run.after(t, metrics | {"data_at_bounds": at_bounds})
    run.reference("its clone (BC)", lambda obs: behavior_policy(nets, obs, args))


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    adam = lambda params, lr: Adam(params, lr, eps=1e-7)  # Keras' epsilon
    opt = SimpleNamespace(
        behavior=adam(nets.behavior.parameters(), args.bc_lr),
        bc_weight=adam([nets.log_bc_weight], args.bc_lr),
        offset=adam(nets.offset.parameters(), args.lr),
        actor=adam(nets.actor.parameters(), args.lr),
        temperature=adam([nets.log_temperature], args.lr),
    )
    largest = largest_value(data, args.gamma, args.bonus)
    run.start(nets, opt, q_data=largest, target=largest)
    if args.offset:
        train_behavior(run, nets, opt, data, args)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        metrics = step()
        run.after(t, metrics, lambda obs: policy(nets, obs, args))


DEPARTURES = """
The authors' code, against the paper:
- mu is a mixture of five tanh-Gaussians for each action dimension on its own. The paper's words
  read as one mixture over all dimensions.
- The clone has two hidden layers; the actor and the critics have three. The paper calls all of them
  three-layer networks.
- The code adds the bonus of 5 that the paper states and takes from CQL. Its derivation in appendix
  A loses a factor of 2; without this slip it would end at 2.5.

This file, against the authors' code:
- Adam's epsilon of 1e-7 is added after the bias correction of the second moment's root. Keras adds
  it before, which here would be an epsilon of 1e-7 / sqrt(1 - 0.999^t) in update t: 32 times as
  much in update 1 and 1.3 times in update 1,000. After 20 updates the actor's weights differ by
  two or three thousandths.
- Rows are drawn with replacement. The authors go through the data in shuffled epochs.
- The last row of an episode that a time limit ended is kept where the data has its next
  observation; D4RL's loader drops it.
- The clone's phase and the actor's have random seeds of their own. So the actor's phase gives the
  same numbers whether the clone was trained in this run or read from an earlier one.
- log mu of the policy's actions is computed from their values before the tanh. The authors invert
  the tanh.
- Every evaluation starts from the same states. The authors' evaluations always start from new
  ones.
- AntMaze is neither in the paper nor in the code. It has no bonus here, because a bonus would
  reward the policy for every step in which it has not reached the goal.
- --normalize-obs and --dequantize are additions, off by default. The second is for data with many
  actions exactly at a bound, where log mu grows without limit.
"""

# The rows of the bundled datasets shorten both phases. Targets follow four times as fast, because
# training is a hundredth of the paper's, and fast targets need the stronger penalty.
SHORT = dict(bc_steps=10_000, steps=10_000, eval_every=500, polyak=0.02, lam=1.0)

CLONING = dict(bc_lr=1e-2)  # on the tests' bandit cloning outweighs Q

PRESETS = {
    "hopper-medium-expert-demo": SHORT | dict(normalize_obs=True),
    "hopper-replay-demo": SHORT | dict(normalize_obs=True, steps=16_000, eval_every=800),
    "pointmaze-stitch-demo": SHORT
    | dict(normalize_obs=True, bonus=-1.0, steps=30_000, eval_every=1_500, eval_episodes=20),
    "antmaze-*": dict(bonus=0.0, eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(bonus=0.0, eval_every=100_000, eval_episodes=100),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)
