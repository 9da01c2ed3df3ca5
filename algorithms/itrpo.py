"""iTRPO, an implicit trust region for behavior-regularized offline RL (Zhang & Tan, AAAI 2024).

Idea: add the log-ratio of learned and behavior policy to BRAC's reward; every new policy then also
stays close to the last one, without a second KL term anywhere.

    rho(s,a) = log pi(a|s) - log pi_b(a|s), pi_b: tanh-Gaussian clone with an entropy floor -A
    y    = r + bonus + tau alpha clip(rho(s,a))
             + gamma (min_i E_{a'~pi} Q'_i(s',a') - alpha E_{a'~pi} rho(s',a'))        (5)
    L_Q  = sum_i E[ (Q_i(s,a) - y)^2 ] + penalty E_{a~pi} sum_i |grad_a Q_i(s,a)|^2
    L_pi = E[ alpha E_{a~pi} rho(s,a) - min_i E_{a~pi} Q_i(s,a) ]                      (5)

Theorem 1: Q - tau alpha rho is then iterated under tau alpha KL(pi || last pi) and (1 - tau) alpha
KL(pi || pi_b). The limit is BRAC's (tau = 0) with alpha (1 - tau), so a sweep of tau is one of
alpha too: --control is the unshaped method at that coefficient. In train.csv, rho_data, shaping and
kl_behavior are the curves of the paper's figure 2, kl_step is KL(pi || pi of the last row).

The paper's body gives no numbers (its appendix is not to be found); the first author's related
code ("IKL" in offorRL) has alpha = 0.9 and tau = 0.03. --setting fills in what is not given:
  paper  Eq. 5 alone, with these two numbers
  code   plus what that code adds: rho >= -1, and Fisher-BRC's bonus 5 and penalty 0.1
  trust  code with tau = 0.9: at 0.03 the clipped shaping takes at most 2.7 from a value
An action at a bound can have rho = -1e5, so `paper`, which does not clip, is for data without any.

Departures: from the paper what `code` adds, and twin critics; from the code: targets start as
copies, pi_b's density is taken before the tanh, the clone's entropy weight moves after the clone.
Rows cut by a time limit are kept where the data has their next observation (D4RL's loader drops
them). AntMaze's r - 1 is the code's; its bonus of 0 and its 100 episodes are ours, as are
--dequantize (off), 4 samples, not 10, on the sets hopper/*, halfcheetah/* and the bundled one, and
alpha = 3 on halfcheetah/*.

    python algorithms/itrpo.py --env hopper-medium-v2  # no flags: 23 ± 2, 3 seeds, 9 min
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
    normal_log_prob,
    parse,
    polyak,
    sample,
    sample_tanh_normal,
    share_at_bounds,
    tanh_log_det,
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

    setting: str = "code"
    """paper, code or trust: fills the six numbers below that are not given (see above)"""
    kl_coef: float | None = None
    """alpha (Eq. 5), weight of KL(pi || pi_b) in units of reward: infinity is cloning"""
    shape_coef: float | None = None
    """tau (Eq. 5), share of alpha that holds pi at the last pi: 0 is BRAC, 1 forgets pi_b"""
    bonus: float | None = None
    """added to every reward: above 0 it pays for survival where episodes can end early"""
    penalty: float | None = None
    """weight of the critics' squared action gradient: 0 is the paper's body"""
    ratio_min: float | None = None
    """lower clip of rho(s,a) in the shaping, before its coefficients: -inf is no clip"""
    ratio_max: float | None = None
    """upper clip of rho(s,a) in the shaping: inf is no clip"""
    control: bool = False
    """the unshaped method with the same limit: alpha (1 - tau) for alpha, 0 for tau"""
    samples: int = 10
    """actions per state for E_pi of Q and rho: fewer are faster and noisier"""
    clip: float = 1e-6
    """the data's actions are clipped to +-(1 - clip) where densities are evaluated"""
    dequantize: float = 0.0
    """width of the band inside the bounds over which actions exactly at a bound are spread"""
    reward_shift: float = 0.0
    """added to every reward; unlike the bonus, no setting changes it"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.005
    """share of the online critics that targets take over per step"""
    lr: float = 3e-4
    """Adam's learning rate: actor and critics"""
    bc_steps: int = 1_000_000
    """gradient steps of the clone pi_b, before all others"""
    bc_lr: float = 1e-3
    """its learning rate, and its entropy weight's; divided by 10 after 80% and 90% of bc_steps"""


PRESETS = {
    "hopper-replay-demo": dict(  # shortened; faster targets
        bc_steps=6_000, steps=20_000, eval_every=1_000, samples=4, polyak=0.01
    ),
    "antmaze-*": dict(reward_shift=-1.0, bonus=0.0, eval_every=50_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(reward_shift=-1.0, bonus=0.0, eval_every=50_000, eval_episodes=100),
    "hopper/*": dict(samples=4),
    "halfcheetah/*": dict(samples=4, kl_coef=3.0),  # one policy's data: 0.9 is too weak
}

BODY = dict(
    kl_coef=0.9, shape_coef=0.03, bonus=0.0, penalty=0.0, ratio_min=-math.inf, ratio_max=math.inf
)
CODE = BODY | dict(bonus=5.0, penalty=0.1, ratio_min=-1.0)
SETTINGS = {"paper": BODY, "code": CODE, "trust": CODE | dict(shape_coef=0.9)}


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
    return torch.atanh(dequantize(a, args.dequantize).clamp(-1 + args.clip, 1 - args.clip))


def log_ratio(x, pi, behavior):
    """rho (..., B) = log pi - log pi_b at tanh(x), x (..., B, A): the tanh's Jacobian cancels."""
    return (normal_log_prob(x, *pi) - normal_log_prob(x, *behavior)).sum(-1)


def gaussian_kl(p, q):
    """KL(p || q) (B,) of two tanh-Gaussians: that of the Gaussians, as tanh is one to one."""
    log_ratio_std = p[1] - q[1]
    distance = (p[0] - q[0]) * torch.exp(-q[1])
    return (0.5 * (torch.exp(2 * log_ratio_std) + distance**2 - 1) - log_ratio_std).sum(-1)


def behavior_loss(nets, s, a, args):
    """Clone of pi_b: likelihood, plus weighted entropy. Also returns both, means over the batch."""
    behavior, x = gaussian(nets.behavior, s), pre_tanh(a, args)
    nll = -(normal_log_prob(x, *behavior) - tanh_log_det(x)).sum(-1).mean()
    entropy = -sample_tanh_normal(*behavior)[1].mean()
    loss = nll - nets.log_bc_weight.exp().detach() * entropy
    return loss, nll.detach(), entropy.detach()


def entropy_weight_loss(log_weight, entropy, act_dim):
    """SAC's temperature: grows while the mean entropy is below its target -A."""
    return log_weight.exp() * (entropy + act_dim)


def value(q, s, pi, behavior, args):
    """<pi, Q - alpha rho> of Eq. 5, (B,), by M samples, whose mean comes before the minimum over
    critics. pi_b is fixed, but its density at the samples is differentiated."""
    x = draw(pi, args.samples)  # (M, B, A)
    rows = s.expand(len(x), *s.shape).flatten(0, 1)
    q = q(rows, x.tanh().flatten(0, 1)).unflatten(1, x.shape[:2])  # (E, M, B)
    return q.mean(1).amin(0) - args.kl_coef * log_ratio(x, pi, behavior).mean(0)


def shaping(rho, args):
    """tau alpha rho of Eq. 5; rho is clipped before the coefficients."""
    return args.shape_coef * args.kl_coef * rho.clamp(args.ratio_min, args.ratio_max)


def critic_loss(nets, s, a, r, s2, terminal, rho, args):
    """Eq. 5, second line; sum over critics. rho (B,) is that of the data's actions: a terminal
    masks the next state's value, the shaping never."""
    with torch.no_grad():
        pi, behavior = gaussian(nets.actor, s2), gaussian(nets.behavior, s2)
        next_value = (1 - terminal) * value(nets.q_target, s2, pi, behavior, args)
        y = r + args.bonus + shaping(rho, args) + args.gamma * next_value
    q = nets.q(s, a)  # (E, B)
    return (q - y).square().mean(1).sum(), q.detach().mean(), y.mean()


def gradient_penalty(nets, s, a):
    """Sum over critics of E |grad_a Q_i(s,a)|^2."""
    grad = nets.q.input_gradient(s, a)[..., s.shape[1] :]  # (E, B, A): one per critic
    return grad.square().sum(-1).mean(1).sum()


def actor_loss(nets, s, pi, behavior, args):
    """Eq. 5, first line."""
    return -value(nets.q, s, pi, behavior, args).mean()


def update_behavior(nets, opt, data, args):
    """One step of the clone and of its entropy weight."""
    s, a = sample(data, args.batch_size, ("obs", "action"))
    loss, nll, entropy = behavior_loss(nets, s, a, args)
    minimize(opt.behavior, loss)
    minimize(opt.bc_weight, entropy_weight_loss(nets.log_bc_weight, entropy, a.shape[1]))
    return {"nll": nll, "entropy": entropy, "weight": nets.log_bc_weight.detach().exp()}


def update(nets, opt, data, args):
    """One step of critics, actor and targets."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    pi = gaussian(nets.actor, s)  # before its step; critics and actor share it
    with torch.no_grad():
        behavior, last = gaussian(nets.behavior, s), gaussian(nets.last_actor, s)
        a_pi = draw(pi, 1).squeeze(0).tanh() if args.penalty else None
        rho = log_ratio(pre_tanh(a, args), pi, behavior)  # (B,)
        clipped = (rho < args.ratio_min) | (rho > args.ratio_max)
    loss, q_data, target = critic_loss(nets, s, a, r, s2, terminal, rho, args)
    metrics = {"td_loss": loss.detach(), "q_data": q_data, "target": target}
    if args.penalty:
        penalty = gradient_penalty(nets, s, a_pi)
        metrics["penalty"] = penalty.detach()
        loss = loss + args.penalty * penalty
    minimize(opt.q, loss)
    metrics |= {
        "actor_loss": minimize(opt.actor, actor_loss(nets, s, pi, behavior, args)),
        "rho_data": rho.mean(),
        "shaping": shaping(rho, args).mean(),
        "clipped": clipped.float().mean(),
        "kl_behavior": gaussian_kl(pi, behavior).detach().mean(),
        "kl_step": gaussian_kl(pi, last).detach().mean(),  # since the last row of train.csv
        "std": pi[1].detach().exp().mean(),
    }
    polyak(nets.q_target, nets.q, args.polyak)
    return metrics


def resolve(args):
    """Fill in what was not given from the setting and check it; the control replaces it last."""
    if args.setting not in SETTINGS:
        raise InputError(f"--setting is {args.setting!r}: give {', '.join(SETTINGS)}")
    for name, value in SETTINGS[args.setting].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 0 <= args.shape_coef <= 1:
        raise InputError(f"--shape-coef is {args.shape_coef}: give a number from 0 to 1")
    if not 0 < args.clip < 1:
        raise InputError(f"--clip is {args.clip}: give a number between 0 and 1")
    if args.control:
        args.kl_coef, args.shape_coef = args.kl_coef * (1 - args.shape_coef), 0.0
    shown = ("setting", "control", *SETTINGS[args.setting])
    args.preset = getattr(args, "preset", {}) | {name: getattr(args, name) for name in shown}
    return args


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    return nets.scaling.action(gaussian(nets.actor, nets.scaling.obs(obs))[0].tanh())


def train_behavior(run, nets, opt, data, args):
    """Phase one: clone the behavior policy, or read the clone of an earlier run."""
    saturated = share_at_bounds(data, args.dequantize)
    settings = args.bc_steps, args.bc_lr, args.batch_size, args.clip, args.dequantize
    path, cached = run.cached("clone", nets.behavior, *settings)
    step = graphed(update_behavior, nets, opt, data, args, compile=args.compile)
    for t in run.loop(0 if cached else args.bc_steps, phase="behavior"):
        decay = 0.1 ** ((t > 0.8 * args.bc_steps) + (t > 0.9 * args.bc_steps))
        opt.behavior.lr.fill_(args.bc_lr * decay)
        opt.bc_weight.lr.fill_(args.bc_lr * decay)
        run.after(t, step() | {"saturated_actions": saturated})
        if t == args.bc_steps:
            run.share(path, nets.behavior)
    clone = SimpleNamespace(actor=nets.behavior, scaling=nets.scaling)
    run.reference("its clone (BC)", lambda obs: policy(clone, obs, args))


def train(args):
    """Train, log and save; returns the mean score of the last 10 evaluations."""
    args = resolve(args)
    run = Run(args)
    data, task = load_dataset(args.env, run.device, args.eval_env)
    data.reward += args.reward_shift
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(
        behavior=Adam(nets.behavior.parameters(), args.bc_lr),
        bc_weight=Adam([nets.log_bc_weight], args.bc_lr),
        q=Adam(nets.q.parameters(), args.lr),
        actor=Adam(nets.actor.parameters(), args.lr),
    )
    run.start(data, task, nets, opt)
    train_behavior(run, nets, opt, data, args)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        run.after(t, step(), lambda obs: policy(nets, obs, args))
        if t % args.log_every == 0:
            nets.last_actor.load_state_dict(nets.actor.state_dict())
    return run.finish()


if __name__ == "__main__":
    train(parse(Args, PRESETS))
