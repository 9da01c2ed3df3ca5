"""BRAC: behavior regularized actor critic (Wu, Tucker & Nachum, 2019; arXiv:1911.11361).

Idea: first clone the behavior policy, which made the data; then penalize the policy where it
diverges from the clone b. The penalty is in the policy's loss alone (BRAC-p), or in the target of Q
too (BRAC-v), so that Q also counts what later divergence costs.

    L_b  = E[ -log b(a|s) + bc_weight log b(a~|s) ],  a~ ~ b(s)              (clone)
    y    = r + gamma (1 - terminal) (min_i Q'_i(s',a') - alpha D(s')),       (BRAC-v's target)
           a' ~ pi(s')
    L_Q  = sum_i E[ (Q_i(s,a) - y)^2 ]                                       (critics)
    L_pi = E[ alpha D(s) - min_i Q_i(s,a_pi) ],  a_pi ~ pi(s)                (policy)
    D    = mean_j [ log pi(a_j|s) - log b(a_j|s) ],  a_j ~ pi(s)             (kl)
    D    = mean k(u,u') + mean k(v,v') - 2 mean k(u,v),                      (mmd)
           u, u' ~ pi(s),  v, v' ~ b(s),  k(u,v) = exp(-|u - v|_1 / sigma)

Q' are the target critics. --no-value-penalty takes alpha D out of y; that is BRAC-p. The
weight of the clone's entropy, `bc_weight`, is learned: it grows while this entropy is below -A, for
A action dimensions, and it is never below 0. In the first `warm_start` steps, at most half of all,
the policy's loss has no Q, and the critics learn as always. With kl, the best policy is
b exp(Q / alpha), normalized, so alpha is in units of reward. mmd is never above 2, so it needs a
larger alpha.

What changes scores (more in DEPARTURES, at the foot of the file):
- Defaults are those of the script behind D4RL's BRAC scores, except for the value penalty, which
  that script leaves out, and --alpha-lr. The alphas behind those scores are not public.
- Terminal rows are kept, and no row joins two episodes. D4RL's script drops terminal rows and has
  rows that join episodes.

    python algorithms/brac.py  # 10k steps: 101.3 ± 0.3, hopper-medium-expert-demo, 3 seeds
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
from common import BatchSize, Count, CountOrZero, NonNegative, Positive, PositiveShare, Seed, Share
from common import MLP, Adam, Episodes, InputError, RunArgs, ScalarMLP, Scaling, ShareBelow1
from common import dequantize
from common import glorot_, graphed, largest_value, minimize, normal_log_prob, normalize_obs
from common import polyak, sample, share_at_bounds, tanh_log_det


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
    eval_every: Count = 5_000
    """gradient steps between evaluations"""
    eval_episodes: Episodes = 20
    """episodes per evaluation"""
    value_penalty: bool = True
    """subtract alpha D in the target (BRAC-v); else D is in the policy's loss alone (BRAC-p)"""
    divergence: Literal["kl", "mmd"] = "kl"
    """D: the KL divergence, or the squared maximum mean discrepancy with a Laplacian kernel"""
    alpha: NonNegative = 1.0
    """weight of D, in units of reward with kl: 0 is SAC without entropy, a large one is cloning"""
    tune_alpha: bool = False
    """learn alpha, starting at --alpha, so that D meets --target-divergence"""
    target_divergence: NonNegative = 0.0
    """value of D that --tune-alpha aims at: at 0, the authors' default, alpha only grows"""
    alpha_lr: Positive = 1e-3
    """Adam's learning rate of alpha in --tune-alpha"""
    samples: Count = 4
    """actions per state in the estimate of D"""
    q_samples: Count = 1
    """how many of the --samples actions Q is averaged over, before the minimum over critics"""
    sigma: Positive = 20.0
    """kernel width of mmd: a small one tells any two actions apart, a large one compares means"""
    warm_start: CountOrZero = 20_000
    """steps at the start, at most half of --steps, in which the policy imitates the clone"""
    entropy_weight: NonNegative = 0.0
    """weight of SAC's entropy in the target and the policy's loss: 0 is none"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.005
    """share of the online critics that targets take over per step"""
    lr: Positive = 1e-3
    """Adam's learning rate of the critics"""
    actor_lr: Positive = 3e-5
    """Adam's learning rate of the actor"""
    bc_steps: Count = 1_000_000
    """gradient steps of the clone, before those of actor and critics"""
    bc_lr: Positive = 5e-4
    """Adam's learning rate of the clone and of the weight of its entropy"""
    clone: str | None = None
    """checkpoint.pt of a run on the same data: its clone is read, not trained"""
    dequantize: Share = 0.0
    """actions exactly at a bound are spread over a band of this width inside it: 0 is no spread"""
    normalize_obs: bool = False
    """shift and scale observations to mean 0 and deviation 1 over the data"""
    eval_samples: Count = 1
    """1: the policy acts by its mode; above 1: by the best of that many samples, judged by Q_1"""

    def resolve(self):
        if self.q_samples > self.samples:
            raise InputError(
                f"--q-samples {self.q_samples} is above --samples {self.samples}: Q is averaged "
                "over the samples of D, so raise --samples or lower --q-samples"
            )


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        self.behavior = glorot_(MLP(obs_dim, 200, 200, 2 * act_dim))  # the clone b
        self.actor = glorot_(MLP(obs_dim, 200, 200, 2 * act_dim))
        self.q = glorot_(ScalarMLP(obs_dim + act_dim, 300, 300, members=2))
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.alpha = nn.Parameter(torch.tensor(args.alpha))
        self.bc_weight = nn.Parameter(torch.ones(()))


MAX_X = math.atanh(1 - 1e-3)  # log b is evaluated at |a| <= 1 - 1e-3 (authors' code)


def gaussian(net, s):
    """Mean and log-std (B, A) of a tanh-Gaussian policy, before its tanh."""
    mean, out = net(s).chunk(2, -1)
    log_std = -5 + 2.5 * (out.tanh() + 1)  # in [-5, 0]
    return mean, log_std


def draw(pi, samples):
    """N = `samples` reparameterized samples x (N, B, A) with tanh(x) ~ pi."""
    mean, log_std = (part.expand(samples, *part.shape) for part in pi)
    return mean + log_std.exp() * torch.randn_like(mean)


def pre_tanh(a, args):
    """x = atanh(a) of the data's actions, which are dequantized if asked, and then clipped."""
    a = dequantize(a, args.dequantize)
    return torch.atanh(a.clamp(-1 + 1e-3, 1 - 1e-3))


def log_prob(x, pi):
    """log pi (..., B) at tanh(x), x (..., B, A)."""
    return (normal_log_prob(x, *pi) - tanh_log_det(x)).sum(-1)


def log_ratio(x, pi, behavior):
    """log pi - log b (..., B) at tanh(x), x (..., B, A); below MAX_X, tanh's terms cancel."""
    x_b = x.clamp(-MAX_X, MAX_X)
    ratio = normal_log_prob(x, *pi) - normal_log_prob(x_b, *behavior)
    jacobian = tanh_log_det(x) - tanh_log_det(x_b)
    return (ratio - jacobian).sum(-1)


def kernel(u, v, args):
    """Mean Laplacian kernel (B,) over all pairs of u and v, both (N, B, A)."""
    distance = (u.unsqueeze(1) - v).abs().sum(-1)  # (N, N, B)
    return torch.exp(-distance / args.sigma).mean((0, 1))


def mmd(a, b, args):
    """Squared MMD (B,) of actions a and b, both (N, B, A), over all pairs, (a_i, a_i) included."""
    return kernel(a, a, args) + kernel(b, b, args) - 2 * kernel(a, b, args)


def sampled_divergence(x, pi, behavior, args):
    """D (B,) of pi from b, estimated by samples x (N, B, A) of pi."""
    if args.divergence == "kl":
        return log_ratio(x, pi, behavior).mean(0)
    x_b = draw(behavior, len(x))
    return mmd(x.tanh(), x_b.tanh(), args)


def policy_value(q, s, x, args):
    """Q of the policy (B,) at samples x (N, B, A): mean over q_samples, then least critic."""
    x = x[: args.q_samples]
    rows = s.expand(len(x), *s.shape).flatten(0, 1)
    values = q(rows, x.tanh().flatten(0, 1))  # (2, N B)
    return values.unflatten(1, x.shape[:2]).mean(1).amin(0)


def behavior_loss(nets, s, a, args):
    """L_b; also its negative log-likelihood and its entropy. All are means over the batch."""
    behavior = gaussian(nets.behavior, s)
    x = torch.cat([pre_tanh(a, args).unsqueeze(0), draw(behavior, 1)])  # (2, B, A)
    nll, entropy = -log_prob(x, behavior).mean(1)
    loss = nll - nets.bc_weight.detach() * entropy
    return loss, nll.detach(), entropy.detach()


def critic_loss(nets, s, a, r, s2, terminal, args):
    """Target and critics, with or without the value penalty; also the means of Q and of y."""
    with torch.no_grad():
        pi, behavior = gaussian(nets.actor, s2), gaussian(nets.behavior, s2)
        x2 = draw(pi, args.samples)
        value = policy_value(nets.q_target, s2, x2, args)
        if args.value_penalty:
            value = value - nets.alpha * sampled_divergence(x2, pi, behavior, args)
        if args.entropy_weight:
            value = value - args.entropy_weight * log_prob(x2, pi).mean(0)
        y = r + args.gamma * (1 - terminal) * value  # (B,)
    q = nets.q(s, a)  # (2, B)
    loss = (q - y).square().mean(1).sum()
    return loss, q.detach().mean(), y.mean()


def actor_loss(nets, s, pi, behavior, args, imitate=False):
    """L_pi; b is fixed, but the gradient runs through its density at the samples. Also returns D
    and the samples."""
    x = draw(pi, args.samples)
    d = sampled_divergence(x, pi, behavior, args)
    loss = nets.alpha.detach() * d
    if args.entropy_weight:
        loss = loss + args.entropy_weight * log_prob(x, pi).mean(0)
    if not imitate:
        loss = loss - policy_value(nets.q, s, x, args)
    return loss.mean(), d.detach().mean(), x.detach()


def multiplier_loss(multiplier, excess):
    """Dual of the constraint `excess <= 0`: the multiplier grows while `excess` is above 0. With
    --tune-alpha, alpha is the multiplier of E[D] <= target_divergence."""
    return -multiplier * excess


def update_behavior(nets, opt, data, args):
    """One step of the clone and of the weight of its entropy."""
    s, a = sample(data, args.batch_size, ("obs", "action"))
    loss, nll, entropy = behavior_loss(nets, s, a, args)
    minimize(opt.behavior, loss)
    minimize(opt.bc_weight, multiplier_loss(nets.bc_weight, -a.shape[1] - entropy))
    with torch.no_grad():
        nets.bc_weight.clamp_(min=0)
    bc_weight = nets.bc_weight.detach().clone()
    return {"nll": nll, "entropy": entropy, "bc_weight": bc_weight}


def update(nets, opt, data, args, imitate):
    """One step of targets, critics, policy and alpha; if `imitate`, the policy's loss has no Q."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    polyak(nets.q_target, nets.q, args.polyak)
    q_loss, q_data, target = critic_loss(nets, s, a, r, s2, terminal, args)
    minimize(opt.q, q_loss)

    pi = gaussian(nets.actor, s)
    with torch.no_grad():
        behavior = gaussian(nets.behavior, s)
    pi_loss, d, x = actor_loss(nets, s, pi, behavior, args, imitate)
    minimize(opt.actor, pi_loss)
    if args.tune_alpha:
        minimize(opt.alpha, multiplier_loss(nets.alpha, d - args.target_divergence))

    with torch.no_grad():
        if args.tune_alpha:
            nets.alpha.clamp_(0, 500)  # the authors' bounds
        kl = d if args.divergence == "kl" else log_ratio(x, pi, behavior).mean()
        x_data = pre_tanh(a, args)
        return {
            "q_loss": q_loss.detach(),
            "q_data": q_data,
            "target": target,
            "pi_loss": pi_loss.detach(),
            "divergence": d,
            "kl": kl,
            "log_ratio_data": log_ratio(x_data, pi, behavior).mean(),
            "entropy": -log_prob(x, pi).mean(),
            "alpha": nets.alpha.clone(),
        }


def behavior_policy(nets, obs, args):
    """The clone's mode, in the task's bounds."""
    mean, _ = gaussian(nets.behavior, nets.scaling.obs(obs))
    return nets.scaling.action(mean.tanh())


def q(nets, s, a):
    """Q_i(s, a) of every critic, (2, B); s (B, S) are scaled states, a (B, A) lie in [-1, 1]."""
    return nets.q(s, a)


def policy(nets, obs, args):
    """Raw observations (B, S) to the policy's mode (B, A), or to its best sample under Q_1, in the
    task's bounds."""
    s = nets.scaling.obs(obs)
    pi = gaussian(nets.actor, s)
    if args.eval_samples == 1:
        return nets.scaling.action(pi[0].tanh())
    a = draw(pi, args.eval_samples).tanh()  # (N, B, A)
    rows = s.expand(len(a), *s.shape)
    q = nets.q(rows, a, member=0)  # (N, B)
    best = a[q.argmax(0), torch.arange(len(s), device=s.device)]
    return nets.scaling.action(best)


def train_behavior(run, nets, opt, data, args):
    """Phase one: clone the behavior policy, or read the clone of --clone."""
    at_bounds = share_at_bounds(data, args.dequantize)
    if args.clone:
        run.read_clone(nets.behavior)
    step = graphed(update_behavior, nets, opt, data, args, compile=args.compile)
    for t in run.loop(0 if args.clone else args.bc_steps, phase="behavior"):
        metrics = step()
        run.after(t, metrics | {"data_at_bounds": at_bounds})
    run.reference("its clone (BC)", lambda obs: behavior_policy(nets, obs, args))


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
    args.resolve()
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    adam = lambda params, lr: Adam(params, lr, eps=1e-7)  # Keras' epsilon
    opt = SimpleNamespace(
        behavior=adam(nets.behavior.parameters(), args.bc_lr),
        bc_weight=adam([nets.bc_weight], args.bc_lr),
        q=adam(nets.q.parameters(), args.lr),
        actor=adam(nets.actor.parameters(), args.actor_lr),
        alpha=adam([nets.alpha], args.alpha_lr),
    )
    largest = largest_value(data, args.gamma)
    run.start(nets, opt, q_data=largest, target=largest)
    train_behavior(run, nets, opt, data, args)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        imitate = t <= min(args.warm_start, args.steps // 2)
        metrics = step(imitate)
        run.after(t, metrics, lambda obs: policy(nets, obs, args))


DEPARTURES = """
The authors' code, against the paper:
- Where log b is evaluated, actions are clipped to 1e-3 inside their bounds.
- The log-deviations of clone and policy lie in [-5, 0].
- The targets move before the critics' step, not after it.

This file, against the authors' code:
- Defaults are those of the script behind D4RL's BRAC scores (rail-berkeley/d4rl_evaluations), with
  two exceptions. The script leaves the value penalty out, and its learning rate of alpha is 1e-5;
  --alpha-lr 1e-3 is that of the example in the authors' code, and it counts with --tune-alpha
  alone. The alphas behind D4RL's scores are not public; the script's default is 1. The authors'
  example has an alpha of 0.1 and a learning rate of 3e-4 for the policy, and it clones for 300,000
  steps.
- Adam's epsilon of 1e-7 is added after the bias correction of the second moment's root. Keras adds
  it before, which here would be an epsilon of 1e-7 / sqrt(1 - 0.999^t) in update t: 32 times as
  much in update 1 and 1.3 times in update 1,000; later, the two forms hardly differ. After 20
  updates the critics' weights differ by about 6e-4 of their size with kl, and by 3e-3 with mmd,
  whose gradients are smaller.
- The action a' at which Q is taken is the first of the samples of D; the authors draw one more
  action for it. The expectation is the same.
- The clone's step and that of `bc_weight` use the same samples, and so do the policy's step and
  that of alpha. The authors draw new samples for `bc_weight` and alpha, after the network's step.
  Here a `bc_weight` or an alpha that has left its bounds is put back at once. The authors' keeps
  its value, is clipped where a loss uses it, and gets no gradient that would move it further out.
- Only a tuned alpha is kept at 500 or less; the authors clip a fixed one, too.
- The policy imitates for `warm_start` steps, at most half of all; the authors' for one step more.
- Targets start as copies of the critics; the authors start them at random.
- Terminal rows are kept, and no row joins the end of an episode to the start of the next. D4RL's
  script drops terminal rows and has rows that join episodes at a time limit.
- Three options of the authors' code, all off by default, are left out: a mixture of the least and
  the largest critic in place of the minimum, a trained weight of the policy's entropy, and weight
  decay. So are the Wasserstein distance, divergences in their dual form, and the square root of
  mmd.
- The policy acts by its mode, the tanh of its mean. --eval-samples 10 is the authors' second way to
  act: the best of ten samples.
- --normalize-obs, --dequantize and --q-samples above 1 are additions, and off by default.
"""

# For a CPU: few updates, faster targets, normalized observations, and the policy's learning rate of
# the authors' example.
SHORT = dict(bc_steps=8_000, steps=10_000, warm_start=2_000, actor_lr=3e-4, polyak=0.02)
SHORT |= dict(normalize_obs=True, eval_every=500, eval_episodes=10)

CLONING = dict(alpha=10.0)  # on the tests' bandit cloning outweighs Q

PRESETS = {
    "hopper-medium-expert-demo": SHORT | dict(alpha=10.0),
    "hopper-replay-demo": SHORT | dict(steps=40_000, eval_every=2_000),
    "pointmaze-stitch-demo": SHORT | dict(alpha=0.1, eval_episodes=20),  # rewards are 0 or 1
    "antmaze-*": dict(eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(eval_every=100_000, eval_episodes=100),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)
