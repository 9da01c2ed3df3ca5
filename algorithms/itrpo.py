"""iTRPO, an implicit trust region for behavior-regularized offline RL (Zhang & Tan, AAAI 2024).

Idea: BRAC keeps the learned policy pi close to a clone pi_b of the behavior policy. iTRPO adds the
log-ratio of the two to BRAC's reward. This has the effect that every new policy also stays close to
the last one, although no loss has a second KL term.

    L_b  = E[ -log pi_b(a|s) - bc_weight H(pi_b(.|s)) ]                                (clone)
    L_w  = bc_weight (H(pi_b(.|s)) + A)
    rho(s,a) = log pi(a|s) - log pi_b(a|s)
    y    = r + bonus + tau alpha clip(rho(s,a))
             + gamma (1 - terminal) min_i E_{a'~pi}[ Q'_i(s',a') - alpha rho(s',a') ]  (5)
    L_Q  = sum_i E[ (Q_i(s,a) - y)^2 ] + lam E_{a~pi} sum_i |grad_a Q_i(s,a)|^2
    L_pi = -E[ min_i E_{a~pi}[ Q_i(s,a) - alpha rho(s,a) ] ]                           (5)

H is the entropy, A the number of action dimensions, and Q'_i are the target critics. The flags of
alpha and tau are --kl-coef and --shape-coef. The term tau alpha clip(rho) of y is called the
shaping; the clip is to [ratio_min, ratio_max]. First the clone pi_b is trained by L_b, and
bc_weight by L_w, so that the entropy does not fall below -A. Then pi_b is frozen.

Theorem 1 compares this with an iteration of Q - tau alpha rho that has two penalties,
tau alpha KL(pi || last pi) and (1 - tau) alpha KL(pi || pi_b): its policies are the same. In the
limit they are those of BRAC (tau = 0) with the coefficient alpha (1 - tau). So a sweep of tau
changes two things, the trust region and BRAC's coefficient. --control runs BRAC at the same
coefficient, to tell the two effects apart.

What changes scores (more in DEPARTURES, at the foot of the file):
- The paper's body gives no coefficients. The default, --setting code, is that of the trainer "IKL"
  in offorRL, the first author's earlier repository: it adds to (5) the clip rho >= -1, a bonus of 5
  and a gradient penalty of 0.1. --setting paper is (5) alone.
- With the code's tau = 0.03 and its clip, the shaping lowers a value by at most 2.7. --setting
  trust has tau = 0.9, so that the shaping matters.

    python algorithms/itrpo.py  # 5k steps: 99.2 ± 1.4, hopper-medium-expert-demo, 3 seeds
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
    setting: Literal["paper", "code", "trust"] = "code"
    """fills --kl-coef to --ratio-max if None: Eq. 5 alone, the author's code, or it with tau 0.9"""
    kl_coef: NonNegative | None = None
    """alpha (Eq. 5), weight of KL(pi || pi_b) in units of reward: a large number is cloning"""
    shape_coef: Share | None = None
    """tau (Eq. 5), share of alpha that keeps pi near the last pi: 0 is BRAC, 1 ignores pi_b"""
    bonus: Number | None = None
    """added to every reward: above 0 it pays for survival where episodes can end early"""
    lam: NonNegative | None = None
    """weight of the critics' squared action gradient in their loss: 0 is none, as in the paper"""
    ratio_min: float | None = None
    """lower clip of rho(s,a) in tau alpha clip(rho), the shaping of rewards: -inf is no clip"""
    ratio_max: float | None = None
    """upper clip of rho(s,a) in tau alpha clip(rho), the shaping of rewards: inf is no clip"""
    control: bool = False
    """run BRAC with the same limit instead: alpha becomes alpha (1 - tau), then tau becomes 0"""
    samples: Count = 10
    """actions per state over which Q and rho are averaged (Eq. 5): fewer are faster, but noisier"""
    clip: InsideUnit = 1e-6
    """the data's actions are clipped to +-(1 - clip) where densities are evaluated"""
    dequantize: Share = 0.0
    """actions exactly at a bound are spread over a band of this width inside it: 0 is no spread"""
    reward_shift: Number = 0.0
    """added to every reward; unlike --bonus, --setting does not change it"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.005
    """share of the online critics that targets take over per step"""
    lr: Positive = 3e-4
    """Adam's learning rate of the actor and the critics"""
    bc_steps: Count = 1_000_000
    """gradient steps of the clone pi_b, before those of actor and critics"""
    bc_lr: Positive = 1e-3
    """Adam's learning rate of the clone; divided by 10 after 80% of its steps, again after 90%"""
    clone: str | None = None
    """checkpoint.pt of a run on the same data: its clone is read, not trained"""
    hidden: Count = 256
    """hidden units in each layer of every network"""
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
        hidden = args.hidden
        self.scaling = Scaling(data)
        self.behavior = MLP(obs_dim, hidden, hidden, 2 * act_dim)  # pi_b
        self.actor = MLP(obs_dim, hidden, hidden, hidden, 2 * act_dim)
        self.q = ScalarMLP(obs_dim + act_dim, hidden, hidden, hidden, members=2)
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
    """M samples x (M, B, A) with tanh(x) ~ pi, reparameterized; pi is the pair from `gaussian`."""
    mean, log_std = (part.expand(samples, *part.shape) for part in pi)
    return mean + log_std.exp() * torch.randn_like(mean)


def pre_tanh(a, args):
    """x = atanh(a) of the data's actions; one at a bound, which has no density, is moved inward."""
    a = dequantize(a, args.dequantize)
    return torch.atanh(a.clamp(-1 + args.clip, 1 - args.clip))


def log_ratio(x, pi, behavior):
    """rho (..., B) = log pi - log pi_b at tanh(x), x (..., B, A); the tanh's Jacobians cancel."""
    return (normal_log_prob(x, *pi) - normal_log_prob(x, *behavior)).sum(-1)


def gaussian_kl(pi, other):
    """KL(pi || other) (B,) of two tanh-Gaussians, which is that of the Gaussians, because tanh is
    one to one."""
    log_ratio_std = pi[1] - other[1]
    distance = (pi[0] - other[0]) * torch.exp(-other[1])
    squares = torch.exp(2 * log_ratio_std) + distance**2 - 1
    return (0.5 * squares - log_ratio_std).sum(-1)


def behavior_loss(nets, s, a, args):
    """L_b: negative log-likelihood minus the weighted entropy. Also returns both, unweighted."""
    behavior = gaussian(nets.behavior, s)
    x = pre_tanh(a, args)
    log_prob = normal_log_prob(x, *behavior) - tanh_log_det(x)
    nll = -log_prob.sum(-1).mean()
    _, sample_log_prob, _ = sample_tanh_normal(*behavior)
    entropy = -sample_log_prob.mean()
    bc_weight = nets.log_bc_weight.exp().detach()
    loss = nll - bc_weight * entropy
    return loss, nll.detach(), entropy.detach()


def bc_weight_loss(log_bc_weight, entropy, act_dim):
    """L_w: the weight of the clone's entropy grows while the mean entropy is below its target -A.
    The DEPARTURES of cql.py compare this form with another."""
    return log_bc_weight.exp() * (entropy + act_dim)


def q_and_ratio(q, s, pi, behavior, args):
    """Q (E, M, B) and rho (M, B) of M actions sampled from pi. The weights of pi_b are fixed, but
    gradients flow to pi through its density at the samples."""
    x = draw(pi, args.samples)  # (M, B, A)
    rows = s.expand(len(x), *s.shape).flatten(0, 1)
    a = x.tanh().flatten(0, 1)
    q = q(rows, a).unflatten(1, x.shape[:2])
    rho = log_ratio(x, pi, behavior)
    return q, rho


def value(q, rho, args):
    """<pi, Q - alpha rho> of Eq. 5, (B,), from Q (E, M, B) and rho (M, B) of M samples: first the
    mean over samples, then the minimum over critics."""
    return q.mean(1).amin(0) - args.kl_coef * rho.mean(0)


def shaping(rho, args):
    """tau alpha rho of Eq. 5; rho is clipped before tau alpha multiplies it."""
    rho = rho.clamp(args.ratio_min, args.ratio_max)
    return args.shape_coef * args.kl_coef * rho


def target_value(r, terminal, rho, next_value, args):
    """y (Eq. 5, second line). A terminal masks the next state's value, but never the shaping."""
    next_value = (1 - terminal) * next_value
    return r + args.bonus + shaping(rho, args) + args.gamma * next_value


def critic_loss(nets, s, a, r, s2, terminal, rho, args):
    """L_Q without its penalty (Eq. 5, second line); rho (B,) is that of the data's actions. Also
    returns the means of Q and y."""
    with torch.no_grad():
        pi = gaussian(nets.actor, s2)
        behavior = gaussian(nets.behavior, s2)
        q2, rho2 = q_and_ratio(nets.q_target, s2, pi, behavior, args)
        next_value = value(q2, rho2, args)
        y = target_value(r, terminal, rho, next_value, args)
    q = nets.q(s, a)  # (E, B)
    loss = (q - y).square().mean(1).sum()
    return loss, q.detach().mean(), y.mean()


def gradient_penalty(nets, s, a):
    """Sum over critics of E |grad_a Q_i(s,a)|^2, at actions a (B, A) of pi."""
    grad = nets.q.input_gradient(s, a)  # (E, B, S + A): one per critic
    grad_a = grad[..., s.shape[1] :]
    return grad_a.square().sum(-1).mean(1).sum()


def actor_loss(nets, s, pi, behavior, args):
    """L_pi (Eq. 5, first line), at new samples of pi."""
    q, rho = q_and_ratio(nets.q, s, pi, behavior, args)
    return -value(q, rho, args).mean()


def update_behavior(nets, opt, data, args):
    """One step of the clone and of its entropy weight."""
    s, a = sample(data, args.batch_size, ("obs", "action"))
    loss, nll, entropy = behavior_loss(nets, s, a, args)
    minimize(opt.behavior, loss)
    minimize(opt.bc_weight, bc_weight_loss(nets.log_bc_weight, entropy, a.shape[1]))
    bc_weight = nets.log_bc_weight.detach().exp()
    return {"nll": nll, "entropy": entropy, "bc_weight": bc_weight}


def update(nets, opt, data, args):
    """One step of critics, actor and targets. Of the metrics, rho_data, shaping and kl_behavior are
    the curves of the paper's figure 2; kl_step is KL(pi || the policy at the row before)."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    pi = gaussian(nets.actor, s)  # the actor before its step, for rho, the penalty and L_pi
    with torch.no_grad():
        behavior = gaussian(nets.behavior, s)
        last = gaussian(nets.last_actor, s)
        if args.lam:
            a_penalty = draw(pi, 1).squeeze(0).tanh()
        rho = log_ratio(pre_tanh(a, args), pi, behavior)  # (B,)
        clipped_ratios = (rho < args.ratio_min) | (rho > args.ratio_max)
    td_loss, q_data, target = critic_loss(nets, s, a, r, s2, terminal, rho, args)
    q_loss, metrics = td_loss, {}
    if args.lam:
        penalty = gradient_penalty(nets, s, a_penalty)
        q_loss = td_loss + args.lam * penalty
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
        "clipped_ratios": clipped_ratios.float().mean(),
        "kl_behavior": gaussian_kl(pi, behavior).detach().mean(),
        "kl_step": gaussian_kl(pi, last).detach().mean(),  # since the last row of train.csv
        "std": pi[1].detach().exp().mean(),
    }


def q(nets, s, a):
    """Q_i(s, a) of every critic, (2, B); s (B, S) are scaled states, a (B, A) lie in [-1, 1]."""
    return nets.q(s, a)


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    mean, _ = gaussian(nets.actor, nets.scaling.obs(obs))
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


DEPARTURES = """
The authors' code, against the paper:
- The paper's body gives no values for the coefficients, and its appendix could not be found. The
  reference is therefore the trainer "IKL" in offorRL, an earlier repository of the first author. It
  computes Eq. 5 term by term, but does not name iTRPO.
- It exchanges the names of the coefficients: its tau is alpha here, its alpha is tau here.
- With the lower clip of rho, Theorem 1 no longer holds. On ten random tabular problems with
  alpha = 0.5, the clip changes an action's probability in the limit by up to 0.003 with tau = 0.03,
  and by up to 0.17 with tau = 0.9. Without it, the two iterations of the theorem agree to 1e-13.
- The bonus, the gradient penalty and the minimum over two critics are not in the paper's body. The
  bonus of 5 and the penalty of 0.1 are Fisher-BRC's.
- It adds 1.2e-7 to every component of the critics' action gradient before squaring it.

This file, against the authors' code:
- That 1.2e-7 is left out. It changes the penalty by a few millionths.
- Initial values are those of nn.Linear, except for the last layers, whose weights and biases lie
  within 1e-3 (policies) and 3e-3 (critics). In the author's code, the weights of the first layer
  lie within 1/16 whatever the number of inputs, and biases are 0, except those of the log-std.
- Targets start as copies of the critics. The author's start at random values of their own.
- rho at sampled actions tanh(x) is computed from x, because the tanh's Jacobians of pi and pi_b
  cancel. For pi_b's density, the author clips the action to +-0.999999 and inverts the tanh.
- In each step, the clone is updated before its entropy weight. The author updates the weight first.
- An evaluation is ten whole episodes every 5,000 updates. The author's is 10,000 steps of the task
  every 1,000 updates, without the episode that the last step breaks off.
- The last row of an episode that a time limit ended is kept where the data has its next
  observation; D4RL's loader drops it.
- The AntMaze reward r - 1 is the author's; the bonus of 0 and the 100 episodes there are not.
- --normalize-obs and --dequantize are additions, and off by default.
"""

# What --setting fills in, where a flag from --kl-coef to --ratio-max is not given and the preset of
# the dataset has none:
# - paper: Eq. 5 alone, with alpha = 0.9 and tau = 0.03 of the author's code. An action at a bound
#   can have rho = -1e5, which this setting does not clip: use it for data without such actions.
# - code: Eq. 5 with all that this code adds to it.
# - trust: as code, but with tau = 0.9, so that the shaping matters.
BODY = dict(
    kl_coef=0.9, shape_coef=0.03, bonus=0.0, lam=0.0, ratio_min=-math.inf, ratio_max=math.inf
)
CODE = BODY | dict(bonus=5.0, lam=0.1, ratio_min=-1.0)
SETTINGS = {"paper": BODY, "code": CODE, "trust": CODE | dict(shape_coef=0.9)}

# For a CPU: few updates, fewer samples in each, faster targets, and normalized observations.
SHORT = dict(bc_steps=6_000, steps=8_000, eval_every=400, samples=4, polyak=0.02)
SHORT |= dict(normalize_obs=True)

CLONING = dict(kl_coef=10.0, bc_lr=1e-2)  # on the tests' bandit cloning outweighs Q

PRESETS = {
    "hopper-medium-expert-demo": SHORT | dict(kl_coef=3.0, steps=5_000, eval_every=250),
    "hopper-replay-demo": SHORT | dict(samples=1, kl_coef=1.0, steps=30_000, eval_every=1_500),
    "pointmaze-stitch-demo": SHORT  # with AntMaze's reward and bonus
    | dict(reward_shift=-1.0, bonus=0.0, eval_episodes=20),
    "antmaze-*": dict(reward_shift=-1.0, bonus=0.0, eval_every=50_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(reward_shift=-1.0, bonus=0.0, eval_every=50_000, eval_episodes=100),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)
