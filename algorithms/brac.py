"""BRAC: behavior regularized actor critic (Wu, Tucker & Nachum, 2019; arXiv:1911.11361).

Idea: clone the behavior policy first, then pay for every divergence from the clone b: in the
policy's loss alone (BRAC-p), or in the value too (BRAC-v), so that Q counts what leaving b costs.

    L_b  = E[ -log b(a|s) + weight log b(a~|s) ],  a~ ~ b                    (clone, entropy >= -A)
    y    = r + gamma (min_i Q'_i(s',a') - alpha D(pi, b; s')),  a' ~ pi      (value penalty)
    L_Q  = sum_i E[ (Q_i(s,a) - y)^2 ]                                       (critics)
    L_pi = E[ alpha D(pi, b; s) - min_i Q_i(s,a_pi) ]                        (policy)
    KL   = mean_j log pi(a_j|s) - log b(a_j|s),  a_j ~ pi                    (D)
    MMD  = mean k(a,a) + mean k(b,b) - 2 mean k(a,b),  k(u,v) = exp(-|u - v|_1 / sigma)

--no-value-penalty leaves alpha D out of y. For `warm_start` steps the policy imitates, without Q.
With KL the policy aimed at is b exp(Q / alpha), normalized: alpha is in units of reward. MMD is at
most 2: it needs a larger one. --tune-alpha: the dual variable of E[D] <= --target-divergence.

Defaults are those of D4RL's BRAC script, but for BRAC-v (there off); the alphas behind its tables
are not public. The BRAC code's own example has alpha 0.1, policy lr 3e-4, 300k steps of the clone.

Departures: a' of Q is the first of the divergence's samples (authors' code: a sample of its own,
so the same expectation). Both multipliers use the samples of the step before them, not new ones,
and are put back to their bounds (authors: no gradient across them). Targets start as copies of the
critics (authors: at random). D4RL's loader drops terminal rows and joins episodes at time limits;
here both are as recorded. Wasserstein and dual-form divergences are left out. As in the authors'
code, not the paper: actions are clipped by 1e-3 for log b; log-stds lie in [-5, 0]; targets move
before the critics. Ours, off by default: --dequantize, and --q-samples above 1.

    python algorithms/brac.py --env hopper-medium-v2  # no flags: 14 ± 2, 3 seeds, 5 min
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

    value_penalty: bool = True
    """BRAC-v: the target pays for the divergence too; without it BRAC-p, the policy alone"""
    divergence: str = "kl"
    """D: kl (sampled) or mmd (squared, Laplacian kernel)"""
    alpha: float = 1.0
    """weight of D, in units of reward with kl: 0 is SAC without entropy, infinity cloning"""
    tune_alpha: bool = False
    """move alpha so that D meets the target, starting from the value above"""
    target_divergence: float = 0.0
    """bound of the tuned constraint: 0, the authors' default, can not be met: alpha only grows"""
    alpha_lr: float = 1e-3
    """Adam's learning rate of alpha, where it is tuned"""
    samples: int = 4
    """actions per state in the estimate of D"""
    q_samples: int = 1
    """how many of them Q is averaged over, before the minimum over critics"""
    sigma: float = 20.0
    """width of MMD's kernel: small tells every two actions apart, large sees means only"""
    warm_start: int = 20_000
    """steps at the start in which the policy imitates, without Q"""
    entropy_weight: float = 0.0
    """weight of SAC's entropy in target and policy loss: 0 is none"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.005
    """share of the online critics that targets take over per step"""
    lr: float = 1e-3
    """Adam's learning rate of the critics"""
    actor_lr: float = 3e-5
    """the policy's learning rate"""
    bc_steps: int = 1_000_000
    """gradient steps of the clone b, before all others"""
    bc_lr: float = 5e-4
    """its learning rate, and its entropy weight's"""
    dequantize: float = 0.0
    """width of the band inside the bounds over which actions exactly at a bound are spread"""
    eval_samples: int = 1
    """1 acts by the policy's mode; more: by the best of so many samples under Q_1 (authors' 10)"""


PRESETS = {
    "*": dict(eval_episodes=20),
    "hopper-replay-demo": dict(  # shortened; the policy rate of the code's example
        bc_steps=8_000, steps=25_000, warm_start=2_000, actor_lr=3e-4, eval_every=2_500
    ),
    "antmaze-*": dict(eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(eval_every=100_000, eval_episodes=100),
}

MAX_X = math.atanh(1 - 1e-3)  # log b is evaluated at |a| <= 1 - 1e-3 (authors' code)


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


@torch.no_grad()
def glorot_(net):
    """Keras' initial values: Glorot-uniform weights, each member on its own, and zero biases."""
    for w, b in zip(net.weights, net.biases):
        for member in w.view(-1, *w.shape[-2:]):
            nn.init.xavier_uniform_(member)
        b.zero_()
    return net


def gaussian(net, s):
    """Mean and log-std (B, A) of a tanh-Gaussian policy, before its tanh."""
    mean, u = net(s).chunk(2, -1)
    return mean, -5 + 2.5 * (u.tanh() + 1)  # in [-5, 0]


def draw(pi, samples):
    """x (N, B, A) with tanh(x) ~ pi, reparameterized."""
    mean, log_std = (part.expand(samples, *part.shape) for part in pi)
    return mean + log_std.exp() * torch.randn_like(mean)


def pre_tanh(a, args):
    """x of the data's actions, clipped; an action at a bound can be spread inward first."""
    return torch.atanh(dequantize(a, args.dequantize).clamp(-1 + 1e-3, 1 - 1e-3))


def log_prob(x, pi):
    """log pi (..., B) at tanh(x), x (..., B, A)."""
    return (normal_log_prob(x, *pi) - tanh_log_det(x)).sum(-1)


def log_ratio(x, pi, behavior):
    """log pi - log b (..., B) at tanh(x), x (..., B, A); the Jacobian cancels below MAX_X."""
    x_b = x.clamp(-MAX_X, MAX_X)
    ratio = normal_log_prob(x, *pi) - normal_log_prob(x_b, *behavior)
    return (ratio - (tanh_log_det(x) - tanh_log_det(x_b))).sum(-1)


def mmd(a, b, args):
    """Squared MMD (B,) of actions a and b, both (N, B, A), over all pairs, (a_i, a_i) included."""
    distance = lambda u, v: (u.unsqueeze(1) - v).abs().sum(-1)  # (N, N, B)
    k = lambda u, v: torch.exp(-distance(u, v) / args.sigma).mean((0, 1))
    return k(a, a) + k(b, b) - 2 * k(a, b)


def divergence(x, pi, behavior, args):
    """D(pi, b) (B,) from samples x (N, B, A) of pi."""
    if args.divergence == "kl":
        return log_ratio(x, pi, behavior).mean(0)
    return mmd(x.tanh(), draw(behavior, len(x)).tanh(), args)


def policy_value(q, s, x, args):
    """Q of the policy (B,) from samples x (N, B, A): mean over `q_samples`, then minimum over q."""
    x = x[: args.q_samples]
    rows = s.expand(len(x), *s.shape).flatten(0, 1)
    return q(rows, x.tanh().flatten(0, 1)).unflatten(1, x.shape[:2]).mean(1).amin(0)


def behavior_loss(nets, s, a, args):
    """Clone of b: likelihood, plus weighted entropy. Also returns both, means over the batch."""
    behavior = gaussian(nets.behavior, s)
    x = torch.cat([pre_tanh(a, args).unsqueeze(0), draw(behavior, 1)])  # (2, B, A)
    nll, entropy = -log_prob(x, behavior).mean(1)
    return nll - nets.bc_weight.detach() * entropy, nll.detach(), entropy.detach()


def critic_loss(nets, s, a, r, s2, terminal, args):
    """Target and critics, with or without value penalty; also the means of Q and target."""
    with torch.no_grad():
        pi, behavior = gaussian(nets.actor, s2), gaussian(nets.behavior, s2)
        x2 = draw(pi, args.samples)
        value = policy_value(nets.q_target, s2, x2, args)
        if args.value_penalty:
            value = value - nets.alpha * divergence(x2, pi, behavior, args)
        if args.entropy_weight:
            value = value - args.entropy_weight * log_prob(x2, pi).mean(0)
        y = r + args.gamma * (1 - terminal) * value  # (B,)
    q = nets.q(s, a)  # (2, B)
    return (q - y).square().mean(1).sum(), q.detach().mean(), y.mean()


def actor_loss(nets, s, pi, behavior, args, imitate=False):
    """Policy regularization; b is fixed, its density at the samples is not. Also D and samples."""
    x = draw(pi, args.samples)
    d = divergence(x, pi, behavior, args)
    loss = nets.alpha.detach() * d
    if args.entropy_weight:
        loss = loss + args.entropy_weight * log_prob(x, pi).mean(0)
    if not imitate:
        loss = loss - policy_value(nets.q, s, x, args)
    return loss.mean(), d.detach().mean(), x.detach()


def multiplier_loss(multiplier, excess):
    """Dual of a constraint `excess <= 0`: the multiplier grows while it is violated."""
    return -multiplier * excess


def update_behavior(nets, opt, data, args):
    """One step of the clone and of its entropy weight."""
    s, a = sample(data, args.batch_size, ("obs", "action"))
    loss, nll, entropy = behavior_loss(nets, s, a, args)
    minimize(opt.behavior, loss)
    minimize(opt.bc_weight, multiplier_loss(nets.bc_weight, -a.shape[1] - entropy))
    with torch.no_grad():
        nets.bc_weight.clamp_(min=0)
    return {"nll": nll, "entropy": entropy, "weight": nets.bc_weight.detach().clone()}


def update(nets, opt, data, args, imitate):
    """One step of targets, critics, policy and alpha; the policy of `imitate` steps ignores Q."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    polyak(nets.q_target, nets.q, args.polyak)
    loss, q_data, target = critic_loss(nets, s, a, r, s2, terminal, args)
    metrics = {"q_loss": minimize(opt.q, loss), "q_data": q_data, "target": target}

    pi = gaussian(nets.actor, s)
    with torch.no_grad():
        behavior = gaussian(nets.behavior, s)
    loss, d, x = actor_loss(nets, s, pi, behavior, args, imitate)
    metrics |= {"actor_loss": minimize(opt.actor, loss), "divergence": d}
    if args.tune_alpha:
        minimize(opt.alpha, multiplier_loss(nets.alpha, d - args.target_divergence))
    with torch.no_grad():
        if args.tune_alpha:
            nets.alpha.clamp_(0, 500)  # the authors' bounds
        return metrics | {
            "kl": d if args.divergence == "kl" else log_ratio(x, pi, behavior).mean(),
            "log_ratio_data": log_ratio(pre_tanh(a, args), pi, behavior).mean(),
            "entropy": -log_prob(x, pi).mean(),
            "alpha": nets.alpha.clone(),
        }


def policy(nets, obs, args):
    """Raw observations (B, S) to the mode, or the best sample under Q_1, in the task's bounds."""
    s = nets.scaling.obs(obs)
    pi = gaussian(nets.actor, s)
    a = pi[0].tanh()
    if args.eval_samples > 1:
        a = draw(pi, args.eval_samples).tanh()
        q = nets.q(s.expand(len(a), *s.shape), a, member=0)  # (N, B)
        a = a[q.argmax(0), torch.arange(s.shape[0], device=s.device)]
    return nets.scaling.action(a)


def train_behavior(run, nets, opt, data, args):
    """Phase one: clone the behavior policy, or read the clone of an earlier run."""
    saturated = share_at_bounds(data, args.dequantize)
    settings = args.bc_steps, args.bc_lr, args.batch_size, args.dequantize
    clone, cached = run.cached("clone", nets.behavior, *settings)
    step = graphed(update_behavior, nets, opt, data, args, compile=args.compile)
    for t in run.loop(0 if cached else args.bc_steps, phase="behavior"):
        run.after(t, step() | {"saturated_actions": saturated})
        if t == args.bc_steps:
            run.share(clone, nets.behavior)
    mode = lambda obs: gaussian(nets.behavior, nets.scaling.obs(obs))[0].tanh()
    run.reference("its clone (BC)", lambda obs: nets.scaling.action(mode(obs)))


def train(args):
    """Train, log and save; returns the mean score of the last 10 evaluations."""
    if args.divergence not in ("kl", "mmd"):
        raise InputError(f"--divergence is {args.divergence!r}: give kl or mmd")
    if args.q_samples > args.samples:
        raise InputError(f"--q-samples {args.q_samples} is above --samples {args.samples}")
    run = Run(args)
    data, task = load_dataset(args.env, run.device, args.eval_env)
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(
        behavior=Adam(nets.behavior.parameters(), args.bc_lr, eps=1e-7),
        bc_weight=Adam([nets.bc_weight], args.bc_lr, eps=1e-7),
        q=Adam(nets.q.parameters(), args.lr, eps=1e-7),
        actor=Adam(nets.actor.parameters(), args.actor_lr, eps=1e-7),
        alpha=Adam([nets.alpha], args.alpha_lr, eps=1e-7),
    )
    run.start(data, task, nets, opt)
    train_behavior(run, nets, opt, data, args)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        metrics = step(t <= args.warm_start)
        run.after(t, metrics, lambda obs: policy(nets, obs, args))
    return run.finish()


if __name__ == "__main__":
    train(parse(Args, PRESETS))
