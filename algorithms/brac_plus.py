"""BRAC+ (Zhang, Kuppannagari & Prasanna; iclr: submission of 2020; acml: 2021, arXiv:2110.00894).

Idea: a latent-variable clone bounds the policy's KL from it without sampled log-densities; hold
the bound below eps in every state, and flatten Q in the action where it is exceeded.

    -ELBO = E_{z~q}[-log p(x|s,z)] + KL(q(z|x,s) || N(0,I)),  x = atanh a          (12)
    D(s)  = E_{x~pi, z~q}[KL(pi || p(.|s,z)) + KL(q || N(0,I))] >= KL(pi || clone)     (7)
    D(s)  = sqrt(E k(a,a') + E k(b,b') - 2 E k(a,b)), b ~ clone; --divergence mmd      (5)
    L_pi  = E[-min_i Q_i(s,a) + alpha(s) (D(s) - eps) - beta (log pi(a|s) + H0)]       (8)
    L_Q   = E[sum_i (Q_i(s,a) - y)^2 / 2 + lambda 1(D > eps_GP) |grad_a min_i Q_i(s,a~)|] (10)
    y     = r + gamma mean_a' min_i Q'_i(s',a'),  a' ~ pi'                         (2)

First pi takes the least D. alpha and beta maximize what pi minimizes: beta caps the entropy at H0
(mmd: +beta, a floor). eps_GP is mean + deviation of D over the last epoch; r is put in [0, 1].
acml: one alpha for all states; a softplus gate, lambda grows with the penalty; the largest over a';
eps = the first pi's D + margin, H0 = the clone's -ELBO - A ln 4 (mmd: -ELBO). iclr takes these two
where its own are unknown: its tables 1-4 are lost, the rows of D4RL v0 are its authors' code's.

Departures, as the authors' code: no square of the norm in (10), a root in (5), TD errors halved, a
slow copy of pi in y, D a mean over members (paper: a random one), nets 256 wide, p one Gaussian, pi
acts by the best of 20 samples by Q_1 (acml: within one deviation, by mean Q), critics untrained
when pi first moves. Ours: the 20 noises are drawn once; PyTorch's initial weights, Adam's epsilon;
the clone rests in RL (code: 1e-5); penalty and policy share samples; -ELBO and D are running means;
the first phases have equal steps and rates; eps_GP starts at eps; mmd's width is 60 (Gym: 10).

    python algorithms/brac_plus.py --env hopper-medium-replay-v0  # no flags: 12 ± 2, 3 seeds, 4 min
"""

import copy
import math
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import (
    MLP,
    Adam,
    ScalarMLP,
    Scaling,
    dequantize,
    graphed,
    load_dataset,
    minimize,
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

    version: Literal["iclr", "acml"] = "iclr"
    """sets those fields below that are None"""
    multiplier: Literal["state", "global"] | None = None
    """a network alpha(s) (Eq. 8, iclr) or one alpha for all states (acml)"""
    penalty: Literal["hard", "soft", "tuned"] | None = None
    """Eq. 10, lam fixed (hard, iclr) or growing (tuned, acml's Adroit); or soft gate too (acml)"""
    backup: Literal["mean", "max"] | None = None
    """over target actions: mean (Eq. 2, iclr) or max (acml)"""
    eval_policy: Literal["argmax", "clipped", "mode"] | None = None
    """best of 20 samples by Q_1 (iclr); best within one deviation by mean Q (acml); mode"""
    eps: float | None = None
    """threshold of D (Eq. 8); None where unknown and with acml: D of the first policy + margin"""
    h0: float | None = None
    """entropy bound H0, nats; None where unknown and with acml: from the clone's -ELBO"""
    divergence: Literal["kl", "mmd"] = "kl"
    """D by Eq. 7 or by Eq. 5"""
    margin: float | None = None
    """room above the first policy's D where eps is None: 0 leaves none; None: the task's"""
    lam: float = 0.1
    """weight lambda of the gradient penalty (Eq. 10), where it grows its lowest: 0 is none"""
    gp_target: float = 0.01
    """soft and tuned penalty: lambda grows while the gated gradient norm is above this"""
    samples: int = 5
    """actions per state, and z per action: less variance of D, not less bias"""
    members: int = 3
    """clones, over which D is a mean"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.001
    """share of critics and policy that their targets take over per step"""
    lr: float = 3e-4
    """Adam's learning rate, critics"""
    actor_lr: float = 5e-6
    """the same, policy: small, so that the critics lead"""
    alpha_lr: float = 1e-5
    """the same, network alpha(s): where it is quick, D swings about eps"""
    dual_lr: float = 1e-3
    """the same, numbers: beta, one alpha, soft lambda"""
    dual_start: float = 10.0
    """their first value, but lambda's; less where the phases are short: it throws the policy far"""
    bc_steps: int = 400_000
    """gradient steps of the clone, and again of the first policy, towards the least D"""
    epoch_steps: int = 2_000
    """gradient steps after which eps_GP is set anew (Eq. 10)"""
    dequantize: float = 0.0
    """width of the band inside the bounds over which actions exactly at a bound are spread"""


PRESETS = {
    "*": dict(batch_size=100),
    # "version divergence env" rows, for fields at None
    "iclr *": dict(multiplier="state", penalty="hard", backup="mean", eval_policy="argmax"),
    "acml *": dict(multiplier="global", penalty="soft", backup="max", eval_policy="clipped"),
    # eps and H0 of the code weeks after iclr: for v0 data
    "iclr kl hopper-random-v0": dict(eps=3.0, h0=-3.0),
    "iclr kl hopper-medium-v0": dict(eps=2.4, h0=-6.0),
    "iclr kl hopper-medium-replay-v0": dict(eps=3.0, h0=-3.0),
    "iclr kl hopper-medium-expert-v0": dict(eps=2.6, h0=-6.0),
    "iclr kl hopper-expert-v0": dict(eps=2.6, h0=-6.0),
    "iclr kl walker2d-random-v0": dict(eps=0.1, h0=6.0),
    "iclr kl walker2d-medium-v0": dict(eps=2.2, h0=-9.0),
    "iclr kl walker2d-medium-replay-v0": dict(eps=4.0, h0=-6.0),
    "iclr kl walker2d-medium-expert-v0": dict(eps=5.0, h0=-12.0),
    "iclr kl walker2d-expert-v0": dict(eps=4.8, h0=-12.0),
    "iclr kl halfcheetah-random-v0": dict(eps=9.0, h0=-3.0),
    "iclr kl halfcheetah-medium-v0": dict(eps=4.0, h0=-12.0),
    "iclr kl halfcheetah-medium-replay-v0": dict(eps=6.0, h0=-12.0),
    "iclr kl halfcheetah-medium-expert-v0": dict(eps=11.5, h0=-24.0),
    "iclr mmd pen-human-v*": dict(eps=0.06, h0=-200.0),
    "iclr mmd hammer-human-v*": dict(eps=0.1, h0=-60.0),
    "iclr mmd door-human-v*": dict(eps=0.1, h0=-60.0),
    "iclr mmd relocate-human-v*": dict(eps=0.1, h0=-60.0),
    # margins of acml's text and code; those of its ablation with mmd times the root of 20 / 60
    "* kl *": dict(margin=3.0),
    **{
        f"* kl {task}": dict(margin=margin)
        for task, margin in {
            "hopper-medium-v*": 0.2,
            "walker2d-medium-v*": 1.0,
            "halfcheetah-medium-v*": 7.0,
            "*medium-expert-v*": 0.2,
            "*/medium-v*": 0.2,  # ours: at a CPU's rates 7 lets halfcheetah's policy leave the data
        }.items()
    },
    "* mmd *": dict(margin=0.03),
    **dict.fromkeys(("* mmd hopper-medium-v*", "* mmd *medium-expert-v*"), dict(margin=0.01)),
    **dict.fromkeys(("* mmd halfcheetah-medium-v*", "* mmd hopper-random-v*"), dict(margin=0.06)),
    # for env alone again: acml's gp_target
    **dict.fromkeys(("halfcheetah[-/]*", "mujoco/halfcheetah/*"), dict(gp_target=0.1)),
    **{
        name.format(task): dict(
            divergence="mmd", margin=0.001, actor_lr=5e-8, alpha_lr=1e-7, gp_target=0.005, steps=n
        )
        for task, n in dict(pen=250_000, hammer=500_000, door=10**6, relocate=500_000).items()
        for name in ("{}-*", "D4RL/{}/*", "{}/*")
    },
    **{
        f"acml mmd {name.format(task)}": dict(penalty="tuned")
        for task in ("pen", "hammer", "door", "relocate")
        for name in ("{}-*", "D4RL/{}/*", "{}/*")
    },
    "antmaze-*": dict(eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(eval_every=100_000, eval_episodes=100),
    # For a CPU: clone and first policy in 100k steps each (paper: 400k), RL in 100k (1M), one clone
    # (3), 2 samples (5). The policy ten times as fast, targets five, beta three; beta starts near
    # where it ends.
    **{
        name: dict(
            bc_steps=100_000,
            steps=100_000,
            members=1,
            samples=2,
            polyak=0.005,
            actor_lr=5e-5,
            dual_lr=3e-3,
            dual_start=0.5,
            dequantize=0.05,
        )
        for name in ("hopper/*", "halfcheetah/*")
    },
    "hopper-replay-demo": dict(  # shorter still, with one clone and fewer samples
        bc_steps=8_000,
        steps=12_000,
        eval_every=1_000,
        polyak=0.01,
        actor_lr=1e-4,
        dual_lr=3e-3,
        dual_start=0.5,
        dequantize=0.05,
        samples=2,
        members=1,
    ),
}


class Nets(nn.Module):
    """Every network and its target, multipliers before softplus, and what is measured."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim, members = data.obs.shape[1], data.action.shape[1], args.members
        self.scaling, self.behavior = Scaling(data), nn.Module()  # its latent z has 2 A numbers
        self.behavior.encoder = MLP(act_dim + obs_dim, 256, 256, 4 * act_dim, members=members)
        self.behavior.decoder = MLP(2 * act_dim + obs_dim, 256, 256, 2 * act_dim, members=members)
        self.behavior.register_buffer("minus_elbo", torch.zeros(()))
        self.actor = MLP(obs_dim, 256, 256, 2 * act_dim)
        self.q = ScalarMLP(obs_dim + act_dim, 256, 256, members=2)
        self.alpha = ScalarMLP(obs_dim, 256, 256)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.dual = nn.Parameter(torch.tensor([args.dual_start] * 2 + [args.lam]).expm1().log())
        for name in ("eps", "h0", "eps_gp", "first_d"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("moments", torch.zeros(2, dtype=torch.float64))  # sums of D and D^2
        self.register_buffer("noise", torch.randn(20, act_dim))


def gaussian(out, low=-10):
    """Mean and log-std from the halves of an output; the std is softplus, of at least `low`."""
    mean, raw = out.chunk(2, -1)
    return mean, F.softplus(raw.clamp(low, 5)).log()


def normal_kl(mean, log_std, mean2=0.0, log_std2=0.0):
    """KL(N(mean, std^2) || N(mean2, std2^2)), summed over the last axis; by default N(0, I)."""
    square = (2 * log_std).exp() + (mean - mean2) ** 2
    return (log_std2 - log_std + 0.5 * (square * math.e ** (-2 * log_std2) - 1)).sum(-1)


def behavior_loss(nets, s, a, args):
    """Eq. 12 of actions, so with the tanh's log-determinant: one value per member (M,)."""
    a = dequantize(a, args.dequantize).clamp(-1 + 1e-6, 1 - 1e-6)
    mean, log_std = gaussian(nets.behavior.encoder(torch.atanh(a), s))
    z = mean + log_std.exp() * torch.randn_like(mean)  # (M, B, Z)
    p = gaussian(nets.behavior.decoder(z, s.expand(len(z), *s.shape)))
    return (normal_kl(mean, log_std) - tanh_normal_log_prob(a, *p, clip=1e-6)).mean(1)


def divergence(nets, s, n, args):
    """n actions (n, B, A), log-densities (n, B), D: Eq. 7 (n, B), or the root of Eq. 5 (1, B)."""
    mean, log_std = gaussian(nets.actor(s).repeat(n, 1, 1), -20)
    a, log_prob, x = sample_tanh_normal(mean, log_std)
    rows, s = x.flatten(0, 1), s.repeat(n, 1)  # (nB, A), (nB, S)
    if args.divergence == "mmd":  # the width 60 is above most distances: it mostly scales D
        z = torch.randn_like(rows.repeat(args.members, 1, 2))  # (M, nB, Z)
        b, _ = gaussian(nets.behavior.decoder(z, s.expand(len(z), -1, -1)))
        b = b.detach().tanh().view(-1, *x.shape[1:])  # (Mn, B, A)
        k = lambda u, v: ((u.unsqueeze(1) - v).abs().sum(-1) / (-2 * 60)).exp().mean((0, 1))
        return a, log_prob, (k(a, a) + k(b, b) - 2 * k(a, b) + 1e-6).sqrt().unsqueeze(0)
    q_mean, q_log_std = gaussian(nets.behavior.encoder(rows, s))
    latent_kl = normal_kl(q_mean, q_log_std).mean(0).view(n, -1)
    q_mean, q_log_std = (q.repeat(1, args.samples, 1) for q in (q_mean, q_log_std))
    z = q_mean + q_log_std.exp() * torch.randn_like(q_mean)  # (M, LnB, Z)
    p = gaussian(nets.behavior.decoder(z, s.repeat(args.samples, 1).expand(len(z), -1, -1)))
    p = (part.view(-1, *x.shape) for part in p)  # (ML, n, B, A)
    return a, log_prob, normal_kl(mean, log_std, *p).mean(0) + latent_kl


@torch.no_grad()
def target_value(nets, r, s2, terminal, args):
    """y of Eq. 2, (B,)."""
    a2 = sample_tanh_normal(*gaussian(nets.actor_target(s2).repeat(args.samples, 1, 1), -20))[0]
    q2 = nets.q_target(s2.repeat(args.samples, 1), a2.flatten(0, 1)).amin(0).view(len(a2), -1)
    return r + args.gamma * (1 - terminal) * (q2.amax(0) if args.backup == "max" else q2.mean(0))


def gradient_penalty(nets, s, a, d, args):
    """Gradient norm of Eq. 10, (B,), gated and not: the smaller critic's, smooth at 0."""
    soft = F.softplus(d - nets.eps_gp)
    gate = soft / soft.max() if args.penalty == "soft" else (d > nets.eps_gp).to(d.dtype)
    first = nets.q(s, a).detach().argmin(0)[:, None] == 0
    grads = nets.q.input_gradient(s, a)[..., s.shape[1] :]  # (2, B, A)
    norm = (torch.where(first, *grads).square().sum(-1) + 1e-12).sqrt()
    return gate * norm, norm


def lagrangian(nets, alpha, beta, q, d, log_prob, args):
    """Eq. 8, which the policy minimizes, alpha and beta maximize (Algorithm 1, lines 7 to 9)."""
    sign = 1 if args.divergence == "mmd" else -1
    return (alpha * (d - nets.eps) - q).mean() + sign * beta * (log_prob.mean() + nets.h0)


def update_behavior(nets, opt, data, args):
    """One step of the clones."""
    loss = behavior_loss(nets, *sample(data, args.batch_size, ("obs", "action")), args)
    minimize(opt.behavior, loss.sum())
    nets.behavior.minus_elbo.lerp_(loss.detach().mean(), 0.01)
    return {"minus_elbo": loss.detach().mean()}


def update_init(nets, opt, data, args):
    """One step of the policy towards the least D, and of beta."""
    (s,) = sample(data, args.batch_size, ("obs",))
    _, log_prob, d = divergence(nets, s, args.samples if args.divergence == "mmd" else 1, args)
    beta = F.softplus(nets.dual)[1]
    minimize(opt.init, lagrangian(nets, 1, beta.detach(), 0, d, log_prob, args))
    minimize(opt.dual, -lagrangian(nets, 1, beta, 0, d.detach(), log_prob.detach(), args))
    nets.first_d.lerp_(d.detach().mean(), 0.01)
    return {"d": d.detach().mean(), "entropy": -log_prob.detach().mean(), "beta": beta.detach()}


def update(nets, opt, data, args):
    """One iteration of Algorithm 1, lines 6 to 10."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    a_pi, log_prob, d = divergence(nets, s, args.samples, args)
    alpha, beta, lam = F.softplus(nets.dual)
    alpha = F.softplus(nets.alpha(s)) if args.multiplier == "state" else alpha  # (B,) or ()
    q, y = nets.q(s, a), target_value(nets, r, s2, terminal, args)
    td_loss = 0.5 * (q - y).square().sum(0).mean()
    penalty, norm = gradient_penalty(nets, s, a_pi[0].detach(), d[0].detach(), args)
    minimize(opt.q, td_loss + lam.detach().clamp(min=args.lam) * penalty.mean())
    q_pi = nets.q(s.repeat(args.samples, 1), a_pi.flatten(0, 1)).amin(0).view_as(log_prob)
    minimize(opt.actor, lagrangian(nets, alpha.detach(), beta.detach(), q_pi, d, log_prob, args))
    q_pi, d, log_prob, penalty = (x.detach() for x in (q_pi, d.mean(0), log_prob, penalty))
    if args.multiplier == "state":
        minimize(opt.alpha, -lagrangian(nets, alpha, beta.detach(), q_pi, d, log_prob, args))
        alpha = alpha.detach()
    gain = lagrangian(nets, alpha, beta, q_pi, d, log_prob, args)
    gain = gain + (args.penalty != "hard") * lam * (penalty.mean() - args.gp_target)
    minimize(opt.dual, -gain)
    polyak(nets.q_target, nets.q, args.polyak)
    polyak(nets.actor_target, nets.actor, args.polyak)
    nets.moments += torch.stack([d.mean(), d.square().mean()])
    metrics = {"td_loss": td_loss, "q1_mean": q[0].mean(), "q1_max": q[0].max()}
    metrics |= {"gated": (penalty > 0).float().mean(), "penalty": penalty.mean(), "beta": beta}
    metrics |= {"alpha": alpha.mean(), "alpha_min": alpha.min(), "alpha_max": alpha.max()}
    metrics |= {"d_mean": d.mean(), "d_std": d.std(), "d_max": d.max(), "eps_gp": 1 * nets.eps_gp}
    metrics |= {"violations": (d > nets.eps).float().mean(), "entropy": -log_prob.mean()}
    metrics |= {"q_pi": q_pi.mean(), "q_gradient": norm.mean(), "lambda": lam.clamp(args.lam)}
    return {k: v.detach() for k, v in metrics.items()}


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    s = nets.scaling.obs(obs)
    mean, log_std = gaussian(nets.actor(s), -20)
    width = {"clipped": 1.0, "mode": 0.0}.get(args.eval_policy, math.inf)  # in deviations
    a = (mean + log_std.exp() * nets.noise.clamp(-width, width).unsqueeze(1)).tanh()  # (20, B, A)
    q = nets.q(s.repeat(len(a), 1), a.flatten(0, 1)).view(2, *a.shape[:2])
    best = (q.mean(0) if args.eval_policy == "clipped" else q[0]).argmax(0)  # (B,)
    return nets.scaling.action(a[best, torch.arange(s.shape[0], device=s.device)])


def train_start(run, nets, opt, data, args):
    """The clones, or those of an earlier run; then the policy nearest to them, and eps."""
    share_at_bounds(data, args.dequantize)
    rates = (1e-3, 5e-4, 1e-4, 5e-5, 1e-5)  # of either phase, over five parts
    path, known = run.cached("vae", nets.behavior, args.bc_steps, args.batch_size, args.dequantize)
    step = graphed(update_behavior, nets, opt, data, args, compile=args.compile)
    for t in run.loop(0 if known else args.bc_steps, phase="behavior"):
        opt.behavior.lr.fill_(rates[5 * (t - 1) // args.bc_steps])
        run.after(t, step())
        if t == args.bc_steps:
            run.share(path, nets.behavior)
    h0 = nets.behavior.minus_elbo - (args.divergence == "kl") * data.action.shape[1] * math.log(4)
    nets.h0.copy_(h0 if args.h0 is None else torch.tensor(args.h0))
    step = graphed(update_init, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.bc_steps, phase="init"):
        opt.init.lr.fill_(rates[5 * (t - 1) // args.bc_steps])
        run.after(t, step())
        if t == args.bc_steps:
            eps = nets.first_d + args.margin if args.eps is None else torch.tensor(args.eps)
            nets.eps.copy_(eps), nets.eps_gp.copy_(eps)
            nets.actor_target.load_state_dict(nets.actor.state_dict())
            print(f"first policy: D {nets.first_d:.3g} (least), eps {eps:.3g}, H0 {nets.h0:.3g}")
            act = lambda obs: policy(nets, obs, replace(args, eval_policy="mode"))
            run.reference("its first policy", act)


def train(args):
    """Train, log and save; returns the mean score of the last 10 evaluations."""
    method = f"{args.version} {args.divergence} {args.env}"
    rows = [row for pattern, row in PRESETS.items() if fnmatch(method, pattern)]
    chosen = {k: v for row in rows for k, v in row.items() if getattr(args, k) is None}
    vars(args).update(chosen, preset=getattr(args, "preset", {}) | chosen)
    run = Run(args)
    data, task = load_dataset(args.env, run.device, args.eval_env)
    data.reward.sub_(data.reward.min()).div_(data.reward.max().clamp(min=1e-12))  # in [0, 1]
    nets = Nets(data, args).to(run.device)
    rates = {"behavior": 1e-3, "q": args.lr, "actor": args.actor_lr, "alpha": args.alpha_lr}
    opt = SimpleNamespace(**{k: Adam(getattr(nets, k).parameters(), v) for k, v in rates.items()})
    opt.init, opt.dual = Adam(nets.actor.parameters(), 1e-3), Adam([nets.dual], args.dual_lr)
    run.start(data, task, nets, opt)
    train_start(run, nets, opt, data, args)
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        metrics = step()
        if t % args.epoch_steps == 0:  # eps_GP of Eq. 10
            mean, square = nets.moments / args.epoch_steps
            nets.eps_gp.copy_(mean + (square - mean**2).clamp(min=0).sqrt())
            nets.moments.zero_()
        run.after(t, metrics, lambda obs: policy(nets, obs, args))
    return run.finish()


if __name__ == "__main__":
    train(parse(Args, PRESETS))
