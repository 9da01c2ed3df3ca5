"""iTRPO, an implicit trust region for behavior-regularized offline RL (Zhang & Tan, AAAI 2024).

Idea: add the log-ratio of learned and behavior policy to BRAC's reward; every new policy then also
stays close to the last one, without a second KL term anywhere.

    L_b  = E[ -log pi_b(a|s) - weight H(pi_b(.|s)) ]                                   (clone)
    L_w  = weight (H(pi_b(.|s)) + A)
    rho(s,a) = log pi(a|s) - log pi_b(a|s)
    y    = r + bonus + tau alpha clip(rho(s,a))
             + gamma (1 - terminal) min_i E_{a'~pi}[ Q'_i(s',a') - alpha rho(s',a') ]  (5)
    L_Q  = sum_i E[ (Q_i(s,a) - y)^2 ] + penalty E_{a~pi} sum_i |grad_a Q_i(s,a)|^2
    L_pi = -E[ min_i E_{a~pi}[ Q_i(s,a) - alpha rho(s,a) ] ]                           (5)

First pi_b is cloned from the data, with an entropy floor of -A for A action dimensions; then it is
frozen. L_w is linear in the weight, so its gradient in log weight is weight (H + A). The loss of
cql.py's temperature is linear in the logarithm, with the gradient H + A; both rest at H = -A.

Theorem 1: Q - tau alpha rho is then iterated under two penalties, tau alpha KL(pi || last pi) and
(1 - tau) alpha KL(pi || pi_b). The limit is that of BRAC (tau = 0) with alpha (1 - tau), so a sweep
of tau is a sweep of alpha too; --control is the unshaped method at that coefficient. In train.csv,
rho_data, shaping and kl_behavior are the curves of the paper's figure 2, and kl_step is the KL from
the policy of the row before.

The paper's body prints no numbers, and its appendix is not to be found. The reference is therefore
the trainer "IKL" in offorRL, an earlier repository of the first author. It computes Eq. 5 term by
term, but does not name iTRPO. --setting fills in the numbers that are not typed:
- paper: Eq. 5 alone, with alpha = 0.9 and tau = 0.03 of that code. An action at a bound can have
  rho = -1e5, and here nothing clips it, so this setting is for data without such actions.
- code: what that code adds, too. These are the clip rho >= -1, and Fisher-BRC's bonus of 5 and
  penalty of 0.1.
- trust: code with tau = 0.9. At 0.03, the clipped shaping lowers a value by at most 2.7.

The authors' code, against the paper:
- It names the coefficients the other way round: its tau is alpha here, its alpha is tau here.
- The lower clip of rho voids Theorem 1. On ten random tabular problems with alpha = 0.5 it moves
  the limit, in the probability of an action, by up to 0.003 with tau = 0.03 and by up to 0.17 with
  tau = 0.9. Without the clip, both iterations agree to 1e-13.
- The bonus, the gradient penalty and the minimum over two critics are not in the paper's body.
- It adds 1.2e-7 to every component of the critics' action gradient before it is squared.

This file, against the authors' code:
- That 1.2e-7 is left out. It changes the penalty by a few millionths.
- Initial values are those of nn.Linear, except for the last layers, whose weights and biases lie
  within 1e-3 (policies) and 3e-3 (critics). In the author's code, the weights of the first layer
  lie within 1/16 whatever the number of inputs, and biases are 0, except those of the log-std.
- Targets start as copies of the critics. The author's start at random values of their own.
- pi_b's density at samples is taken from x, before the tanh, where both Jacobians cancel. The
  author inverts the tanh at actions clipped to 0.999999.
- The clone's entropy weight moves after the clone. The author moves it before.
- An evaluation is ten whole episodes every 5,000 updates. The author's is 10,000 steps of the task
  every 1,000 updates, without the episode that the last step breaks off.
- Rows that a time limit cut are kept where the data has their next observation; D4RL's loader
  drops them.
- The AntMaze reward r - 1 is the author's; the bonus of 0 and the 100 episodes there are not.
- --normalize-obs and --dequantize are additions, and off by default.

    python algorithms/itrpo.py
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
from common import Share, ShareBelow1, InputError, RunArgs, Adam, MLP, ScalarMLP, Scaling
from common import dequantize, normal_log_prob, sample_tanh_normal, share_at_bounds, tanh_log_det
from common import graphed, largest_value, minimize, normalize_obs, polyak, sample


@dataclass
class Args(RunArgs):
    phases = {"behavior": "bc_steps", "train": "steps"}
    env: str = "hopper-medium-expert-demo"
    """dataset: bundled, D4RL or OGBench name, Minari id, or path of an .hdf5 or .npz file"""
    seed: Seed = 0
    """seeds networks, batches and evaluation"""
    steps: Count = 1_000_000
    """gradient steps of actor and critics, after the clone's"""
    batch_size: BatchSize = 256
    """transitions per gradient step"""
    eval_every: Count = 5_000
    """gradient steps between evaluations"""
    setting: Literal["paper", "code", "trust"] = "code"
    """fills the six numbers below that are not typed (see above)"""
    kl_coef: NonNegative | None = None
    """alpha (Eq. 5), weight of KL(pi || pi_b) in units of reward: a large number is cloning"""
    shape_coef: Share | None = None
    """tau (Eq. 5), share of alpha that holds pi at the last pi: 0 is BRAC, 1 forgets pi_b"""
    bonus: Number | None = None
    """added to every reward: above 0 it pays for survival where episodes can end early"""
    penalty: NonNegative | None = None
    """weight of the critics' squared action gradient: 0 is the paper's body"""
    ratio_min: float | None = None
    """lower clip of rho(s,a) in the shaping, before its coefficients: -inf is no clip"""
    ratio_max: float | None = None
    """upper clip of rho(s,a) in the shaping: inf is no clip"""
    control: bool = False
    """the unshaped method with the same limit: alpha (1 - tau) for alpha, 0 for tau"""
    samples: Count = 10
    """actions per state for E_pi of Q and rho: fewer are faster and noisier"""
    clip: InsideUnit = 1e-6
    """the data's actions are clipped to +-(1 - clip) where densities are evaluated"""
    dequantize: Share = 0.0
    """width of the band inside the bounds over which actions exactly at a bound are spread"""
    reward_shift: Number = 0.0
    """added to every reward; unlike the bonus, no setting changes it"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.005
    """share of the online critics that targets take over per step"""
    lr: Positive = 3e-4
    """Adam's learning rate of the actor and the critics"""
    bc_steps: Count = 1_000_000
    """gradient steps of the clone pi_b, before all others"""
    bc_lr: Positive = 1e-3
    """Adam's learning rate of the clone; a tenth of it after 80% of bc_steps, again after 90%"""
    normalize_obs: bool = False
    """shift and scale observations to mean 0 and deviation 1 over the data"""

    def resolve(self):
        for name, value in SETTINGS[self.setting].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not self.ratio_min <= self.ratio_max:
            clips = f"--ratio-min is {self.ratio_min} and --ratio-max is {self.ratio_max}"
            raise InputError(f"{clips}: use two numbers in this order, or -inf and inf")
        if self.control:
            self.kl_coef *= 1 - self.shape_coef
            self.shape_coef = 0.0


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        self.behavior = MLP(obs_dim, 256, 256, 2 * act_dim)  # pi_b
        self.actor = MLP(obs_dim, 256, 256, 256, 2 * act_dim)
        self.q = ScalarMLP(obs_dim + act_dim, 256, 256, 256, members=2)
        for net, bound in ((self.behavior, 1e-3), (self.actor, 1e-3), (self.q, 3e-3)):
            for last in (net.weights[-1], net.biases[-1]):
                nn.init.uniform_(last, -bound, bound)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.last_actor = copy.deepcopy(self.actor).requires_grad_(False)  # for kl_step alone
        self.log_bc_weight = nn.Parameter(torch.zeros(()))


def gaussian(net, s):
    """Mean and log-std (B, A) of a tanh-Gaussian policy, before its tanh."""
    mean, log_std = net(s).chunk(2, -1)
    return mean, log_std.clamp(-5, 2)


def draw(pi, samples):
    """x (M, B, A) with tanh(x) ~ pi, reparameterized."""
    mean, log_std = (part.expand(samples, *part.shape) for part in pi)
    return mean + log_std.exp() * torch.randn_like(mean)


def pre_tanh(a, args):
    """x of the data's actions; an action at a bound, where no density is defined, moves inward."""
    a = dequantize(a, args.dequantize)
    return torch.atanh(a.clamp(-1 + args.clip, 1 - args.clip))


def log_ratio(x, pi, behavior):
    """rho (..., B) = log pi - log pi_b at tanh(x), x (..., B, A): the tanh's Jacobian cancels."""
    return (normal_log_prob(x, *pi) - normal_log_prob(x, *behavior)).sum(-1)


def gaussian_kl(p, q):
    """KL(p || q) (B,) of two tanh-Gaussians: that of the Gaussians, as tanh is one to one."""
    log_ratio_std = p[1] - q[1]
    distance = (p[0] - q[0]) * torch.exp(-q[1])
    squares = torch.exp(2 * log_ratio_std) + distance**2 - 1
    return (0.5 * squares - log_ratio_std).sum(-1)


def behavior_loss(nets, s, a, args):
    """Clone of pi_b: likelihood, plus weighted entropy. Also returns both, means over the batch."""
    behavior = gaussian(nets.behavior, s)
    x = pre_tanh(a, args)
    log_prob = normal_log_prob(x, *behavior) - tanh_log_det(x)
    nll = -log_prob.sum(-1).mean()
    _, sample_log_prob, _ = sample_tanh_normal(*behavior)
    entropy = -sample_log_prob.mean()
    weight = nets.log_bc_weight.exp().detach()
    loss = nll - weight * entropy
    return loss, nll.detach(), entropy.detach()


def temperature_loss(log_temperature, entropy, act_dim):
    """L_w: the temperature, here the clone's entropy weight, grows while the mean entropy is below
    its target -A."""
    return log_temperature.exp() * (entropy + act_dim)


def evaluate(q, s, pi, behavior, args):
    """Q (E, M, B) and rho (M, B) of M sampled actions of pi. pi_b is fixed, but its density at the
    samples is differentiated."""
    x = draw(pi, args.samples)  # (M, B, A)
    rows = s.expand(len(x), *s.shape).flatten(0, 1)
    a = x.tanh().flatten(0, 1)
    q = q(rows, a).unflatten(1, x.shape[:2])
    rho = log_ratio(x, pi, behavior)
    return q, rho


def value(q, rho, args):
    """<pi, Q - alpha rho> of Eq. 5, (B,), from Q (E, M, B) and rho (M, B) of M samples; their mean
    comes before the minimum over critics."""
    return q.mean(1).amin(0) - args.kl_coef * rho.mean(0)


def shaping(rho, args):
    """tau alpha rho of Eq. 5; rho is clipped before the coefficients."""
    rho = rho.clamp(args.ratio_min, args.ratio_max)
    return args.shape_coef * args.kl_coef * rho


def target_value(r, terminal, rho, next_value, args):
    """y of Eq. 5, second line: a terminal masks the next state's value, the shaping never."""
    next_value = (1 - terminal) * next_value
    return r + args.bonus + shaping(rho, args) + args.gamma * next_value


def critic_loss(nets, s, a, r, s2, terminal, rho, args):
    """Eq. 5, second line; sum over critics. rho (B,) is that of the data's actions."""
    with torch.no_grad():
        pi = gaussian(nets.actor, s2)
        behavior = gaussian(nets.behavior, s2)
        q2, rho2 = evaluate(nets.q_target, s2, pi, behavior, args)
        next_value = value(q2, rho2, args)
        y = target_value(r, terminal, rho, next_value, args)
    q = nets.q(s, a)  # (E, B)
    loss = (q - y).square().mean(1).sum()
    return loss, q.detach().mean(), y.mean()


def gradient_penalty(nets, s, a):
    """Sum over critics of E |grad_a Q_i(s,a)|^2."""
    grad = nets.q.input_gradient(s, a)  # (E, B, S + A): one per critic
    grad_a = grad[..., s.shape[1] :]
    return grad_a.square().sum(-1).mean(1).sum()


def actor_loss(nets, s, pi, behavior, args):
    """Eq. 5, first line."""
    q, rho = evaluate(nets.q, s, pi, behavior, args)
    return -value(q, rho, args).mean()


def update_behavior(nets, opt, data, args):
    """One step of the clone and of its entropy weight."""
    s, a = sample(data, args.batch_size, ("obs", "action"))
    loss, nll, entropy = behavior_loss(nets, s, a, args)
    minimize(opt.behavior, loss)
    minimize(opt.bc_weight, temperature_loss(nets.log_bc_weight, entropy, a.shape[1]))
    weight = nets.log_bc_weight.detach().exp()
    return {"nll": nll, "entropy": entropy, "weight": weight}


def update(nets, opt, data, args):
    """One step of critics, actor and targets."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    pi = gaussian(nets.actor, s)  # before its step; critics and actor share it
    with torch.no_grad():
        behavior = gaussian(nets.behavior, s)
        last = gaussian(nets.last_actor, s)
        if args.penalty:
            a_penalty = draw(pi, 1).squeeze(0).tanh()
        rho = log_ratio(pre_tanh(a, args), pi, behavior)  # (B,)
        clipped = (rho < args.ratio_min) | (rho > args.ratio_max)
    td_loss, q_data, target = critic_loss(nets, s, a, r, s2, terminal, rho, args)
    q_loss, metrics = td_loss, {}
    if args.penalty:
        penalty = gradient_penalty(nets, s, a_penalty)
        q_loss = td_loss + args.penalty * penalty
        metrics["penalty"] = penalty.detach()
    minimize(opt.q, q_loss)
    pi_loss = actor_loss(nets, s, pi, behavior, args)
    minimize(opt.actor, pi_loss)
    polyak(nets.q_target, nets.q, args.polyak)
    return metrics | {
        "q_loss": q_loss.detach(),
        "td_loss": td_loss.detach(),
        "pi_loss": pi_loss.detach(),
        "q_data": q_data,
        "target": target,
        "rho_data": rho.mean(),
        "shaping": shaping(rho, args).mean(),
        "clipped": clipped.float().mean(),
        "kl_behavior": gaussian_kl(pi, behavior).detach().mean(),
        "kl_step": gaussian_kl(pi, last).detach().mean(),  # since the last row of train.csv
        "std": pi[1].detach().exp().mean(),
    }


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    mean, _ = gaussian(nets.actor, nets.scaling.obs(obs))
    return nets.scaling.action(mean.tanh())


def train_behavior(run, nets, opt, data, args):
    """Phase one: clone the behavior policy, or read the clone of an earlier run."""
    saturated = share_at_bounds(data, args.dequantize)
    settings = args.bc_steps, args.bc_lr, args.batch_size, args.clip
    settings += args.dequantize, args.normalize_obs
    cached = run.cached("clone", nets.behavior, *settings)
    step = graphed(update_behavior, nets, opt, data, args, compile=args.compile)
    for t in run.loop(0 if cached else args.bc_steps, phase="behavior"):
        decays = (t > 0.8 * args.bc_steps) + (t > 0.9 * args.bc_steps)
        lr = args.bc_lr * 0.1**decays
        opt.behavior.lr.fill_(lr)
        opt.bc_weight.lr.fill_(lr)
        metrics = step()
        run.after(t, metrics | {"saturated_actions": saturated})
        if t == args.bc_steps:
            run.share("clone", nets.behavior)
    clone = SimpleNamespace(actor=nets.behavior, scaling=nets.scaling)
    run.reference("its clone (BC)", lambda obs: policy(clone, obs, args))


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
    args.resolve()
    data.reward += args.reward_shift
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(
        behavior=Adam(nets.behavior.parameters(), args.bc_lr),
        bc_weight=Adam([nets.log_bc_weight], args.bc_lr),
        q=Adam(nets.q.parameters(), args.lr),
        actor=Adam(nets.actor.parameters(), args.lr),
    )
    largest = largest_value(data, args.gamma, args.bonus)
    run.start(nets, opt, q_data=largest, target=largest)
    train_behavior(run, nets, opt, data, args)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        metrics = step()
        run.after(t, metrics, lambda obs: policy(nets, obs, args))
        if t % args.log_every == 0:
            nets.last_actor.load_state_dict(nets.actor.state_dict())


BODY = dict(
    kl_coef=0.9, shape_coef=0.03, bonus=0.0, penalty=0.0, ratio_min=-math.inf, ratio_max=math.inf
)
CODE = BODY | dict(bonus=5.0, penalty=0.1, ratio_min=-1.0)
SETTINGS = {"paper": BODY, "code": CODE, "trust": CODE | dict(shape_coef=0.9)}

PRESETS = {
    "hopper-medium-expert-demo": dict(  # shortened; faster targets
        bc_steps=6_000, steps=20_000, eval_every=1_000, samples=4, polyak=0.01
    ),
    "hopper-replay-demo": dict(  # shortened; faster targets
        bc_steps=6_000, steps=20_000, eval_every=1_000, samples=4, polyak=0.01
    ),
    "pointmaze-medium-demo": dict(  # shortened; faster targets; AntMaze's reward and bonus
        bc_steps=6_000,
        steps=20_000,
        eval_every=1_000,
        samples=4,
        polyak=0.01,
        reward_shift=-1.0,
        bonus=0.0,
    ),
    "antmaze-*": dict(reward_shift=-1.0, bonus=0.0, eval_every=50_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(reward_shift=-1.0, bonus=0.0, eval_every=50_000, eval_episodes=100),
}

if __name__ == "__main__":
    from harness import main

    main(Args, PRESETS, train)
