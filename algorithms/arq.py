"""Action-Restricted Q-learning, ARQ (Goo & Niekum, "Know Your Boundaries", 2022; arXiv:2206.00695).

Idea: clone the behavior policy with a diffusion model, and let Q-learning maximize over actions
drawn from that clone only, so that no action outside the data's support is ever believed.

    L_score = E |raw(m x + sigma z, s, t) + z|^2,   s_psi = raw / sigma     (score matching)
    supp(s) = {a_data} + those of N samples of s_psi with beta(a|s) > eps   (4)
    y    = r + gamma K-th largest of min_i Q'_i(s', supp(s')),  L_Q = sum_i E[(Q_i - y)^2 / 2]  (5)
    pi(a|s) ~ exp(alpha Q(s,a)) over fresh samples (implicit)               (6)
    L_pi = E[ -min(exp(alpha A(s,a)), 100) log pi_phi(a|s) ],  A = Q - mean Q over supp(s)

Stages: score, sample (every state of the data, once), q, train (pi_phi, the run's score); last,
the implicit policy and the clone (the paper's "s_psi") are scored. Runs share finished stages.

Not in the paper but in the authors' code, and here: beta is the density of z-scored actions; the
data's action is a candidate, never filtered, and its value a floor of y; filtered samples are
masked, not redrawn; policies use the first target critic; rows without next action train no Q.

Departures, all ours: samples take 20 steps of DPM-Solver++(2M), 21 network evaluations. The paper's
predictor-corrector (1,000) is --sampler pc --sample-steps 500: on a Hopper score 0.09 of a z-score
away (Wasserstein-1; two runs of pc 0.06, the authors' --corrector sample 0.21). Divergence is exact
up to 10 dimensions (ten probes). No filter but in the paper's domains: days on a CPU. Samples are
clipped when drawn. Fewer than K left: the smallest counts; none: the likeliest acts.

    python algorithms/arq.py --env hopper-medium-v2  # no flags: 18 ± 1, 3 seeds, 11 min
"""

import copy
import hashlib
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import (
    MLP,
    Adam,
    InputError,
    ScalarMLP,
    Scaling,
    graphed,
    load_dataset,
    minimize,
    normal_log_prob,
    parse,
    polyak,
    sample,
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

    value: Literal["arq", "sarsa", "none"] = "arq"
    """what y bootstraps from: arq (Eq. 5), sarsa (Q^beta; paper: --q-lr 1e-4), none (no Q)"""
    n: int = 30
    """samples N of the clone per state"""
    k: int = 9
    """K of Eq. 5: 1 is the maximum over candidates, N + 1 the minimum"""
    floor: bool = True
    """y is at least the target of the data's next action (authors' code)"""
    alpha: float = 1.0
    """implicit policy's sharpness (Eq. 6): 0 is the clone, infinity is greedy"""
    alpha_pi: float = 1.0
    """sharpness of pi_phi's weights: 0 is behavior cloning"""
    pi: Literal["gaussian", "deterministic", "resnet"] = "gaussian"
    """pi_phi: gaussian (state-independent deviation), deterministic, resnet (deterministic)"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.005
    """share of the online critics that targets take over per step"""
    q_lr: float = 3e-4
    """Adam's learning rate of the critics"""
    q_steps: int = 1_000_000
    """gradient steps of the critics"""
    normalize_reward: bool = False
    """divide rewards by (largest - smallest episode return) / 1000"""
    reward_shift: float = 0.0
    """added to every reward"""
    score_steps: int = 1_000_000
    """gradient steps of the score network, before all others"""
    score_lr: float = 1e-4
    """Adam's learning rate of the score network"""
    width: int = 256
    """its width"""
    ensemble: int = 1
    """score networks whose mean is taken"""
    sampler: Literal["dpm", "pc"] = "dpm"
    """dpm (DPM-Solver++(2M)) or pc (predictor-corrector, the paper's)"""
    sample_steps: int = 20
    """steps of the sampler: dpm needs 15 or more, the paper's pc has 500"""
    corrector: Literal["sigma", "sample", "batch"] = "sigma"
    """pc's step size: sigma (of the noise level), sample (each row's norms), batch (their means)"""
    filter: bool = False
    """drop samples whose log-likelihood (of z-scored actions) is not above the threshold (Eq. 4)"""
    threshold: float = -5.0
    """with --filter: log eps of Eq. 4"""
    ll_quantile: float = 0.0
    """with --filter, above 0: the threshold is this quantile of the data's own log-likelihood"""
    until: Literal["score", "sample", "q", "train", "implicit"] = "implicit"
    """last stage to run; train is pi_phi, implicit also scores the policies that sample"""


PRESETS = {
    "*": dict(batch_size=512),  # tables A.1 to A.3 by domain; the defaults are locomotion's
    "hopper-*": dict(filter=True, normalize_reward=True),
    "halfcheetah-*": dict(filter=True, normalize_reward=True),
    "walker2d-*": dict(filter=True, normalize_reward=True),
    "mujoco/*": dict(filter=True, normalize_reward=True),
    "kitchen-*": dict(filter=True, score_steps=300_000, q_lr=1e-4),
    "D4RL/kitchen/*": dict(filter=True, score_steps=300_000, q_lr=1e-4),
    "pen-*": dict(
        filter=True, score_steps=300_000, ensemble=3, q_lr=1e-4, alpha=10.0, alpha_pi=10.0
    ),
    "door-*": dict(
        filter=True, score_steps=300_000, ensemble=3, q_lr=1e-4, alpha=10.0, alpha_pi=10.0
    ),
    "hammer-*": dict(
        filter=True, score_steps=300_000, ensemble=3, q_lr=1e-4, alpha=10.0, alpha_pi=10.0
    ),
    "relocate-*": dict(
        filter=True, score_steps=300_000, ensemble=3, q_lr=1e-4, alpha=10.0, alpha_pi=10.0
    ),
    "D4RL/pen/*": dict(
        filter=True, score_steps=300_000, ensemble=3, q_lr=1e-4, alpha=10.0, alpha_pi=10.0
    ),
    "D4RL/door/*": dict(
        filter=True, score_steps=300_000, ensemble=3, q_lr=1e-4, alpha=10.0, alpha_pi=10.0
    ),
    "D4RL/hammer/*": dict(
        filter=True, score_steps=300_000, ensemble=3, q_lr=1e-4, alpha=10.0, alpha_pi=10.0
    ),
    "D4RL/relocate/*": dict(
        filter=True, score_steps=300_000, ensemble=3, q_lr=1e-4, alpha=10.0, alpha_pi=10.0
    ),
    "antmaze-*": dict(
        filter=True, k=3, alpha=10.0, alpha_pi=10.0, pi="deterministic", reward_shift=-1.0
    )
    | dict(eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(
        filter=True, k=3, alpha=10.0, alpha_pi=10.0, pi="deterministic", reward_shift=-1.0
    )
    | dict(eval_every=100_000, eval_episodes=100),
    # Robomimic's data has no reader here yet
    "robomimic/*": dict(
        filter=True, score_steps=150_000, ensemble=3, q_lr=1e-4, alpha=0.1, alpha_pi=0.1
    )
    | dict(pi="resnet", steps=300_000, reward_shift=-1.0),
    "robomimic/*-mg": dict(score_steps=1_000_000, alpha=1.0, alpha_pi=10.0),
    # two CPU cores, 100k to 200k transitions, half an hour: narrow score, N 30 -> 10 with the K
    # of about the same quantile, no filter
    "hopper/*": dict(
        batch_size=256, score_steps=150_000, width=128, sample_steps=15, n=10, k=3, filter=False
    )
    | dict(q_steps=100_000, steps=100_000, normalize_reward=True),
    "halfcheetah/*": dict(
        batch_size=256, score_steps=150_000, width=128, sample_steps=15, n=10, k=3, filter=False
    )
    | dict(q_steps=100_000, steps=100_000, normalize_reward=True),
    "pointmaze/*": dict(
        batch_size=256, score_steps=150_000, width=128, sample_steps=15, n=10, k=3, filter=False
    )
    | dict(q_steps=100_000, steps=100_000, reward_shift=-1.0, alpha=10.0, alpha_pi=10.0)
    | dict(pi="deterministic"),
    "door/*": dict(
        batch_size=256, score_steps=100_000, width=128, sample_steps=20, n=10, k=3, filter=False
    )
    | dict(q_steps=100_000, steps=100_000, q_lr=1e-4, alpha=10.0, alpha_pi=10.0),
    "hopper-replay-demo": dict(
        batch_size=256, score_steps=30_000, width=128, sample_steps=15, n=10, k=3, filter=False
    )
    | dict(score_lr=5e-4, q_steps=30_000, steps=20_000, eval_every=2_000),
}

EPS, T_MIN = 1e-5, 1e-3  # times where training and likelihood begin, and where sampling ends
EMA, TIME_SCALE, SNR, PI_LR, MAX_WEIGHT = 0.999, 30.0, 0.16, 3e-4, 100.0  # paper and its code
EXACT_DIMS, PROBES, ODE_TOL, CHUNK = 10, 10, 1e-5, 64  # CHUNK: states, 16-fold on a GPU


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        for name, x in (("s", data.obs), ("a", data.action)):  # z-scoring, for the score alone
            self.register_buffer(f"{name}_mean", x.mean(0))
            self.register_buffer(f"{name}_std", x.std(0, correction=0).clamp(min=0.05))
        self.register_buffer("threshold", torch.tensor(args.threshold if args.filter else -1e9))
        score = act_dim + obs_dim, args.width, act_dim, 3, nn.functional.silu
        self.score = ResNet(*score, args.ensemble if args.ensemble > 1 else None, timed=True)
        self.q = ScalarMLP(obs_dim + act_dim, 256, 256, members=1 if args.value == "sarsa" else 2)
        resnet = args.pi == "resnet" and ResNet(obs_dim, 2048, act_dim, 4, torch.relu)
        self.actor = resnet or MLP(obs_dim, 256, 256, act_dim)
        self.log_std = nn.Parameter(torch.zeros(act_dim)) if args.pi == "gaussian" else None
        for net in (x for x in self.modules() if isinstance(x, MLP)):  # as Keras starts
            for w, b in zip(net.weights, net.biases):
                nn.init.zeros_(b), w.data.uniform_(-1, 1).mul_(math.sqrt(6 / sum(w.shape[-2:])))
        self.score_ema = copy.deepcopy(self.score).requires_grad_(False)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)


class ResNet(nn.Module):
    """Linear, `blocks` times x + L2(act(L1(act(x + e)) + e)), linear; e embeds the time, if any."""

    def __init__(self, n_in, width, n_out, blocks, act, members=None, timed=False):
        super().__init__()
        self.act, self.layers = act, MLP(n_in, *[width] * (2 * blocks + 1), n_out, members=members)
        if timed:
            self.register_buffer("frequencies", TIME_SCALE * torch.randn(1, width // 2))
            self.time = MLP(width // 2 * 2, width, members=members)

    def context(self, s):
        """The state's share of the first layer: the same for all times and samples."""
        return s @ self.layers.weights[0][..., -s.shape[-1] :, :] + self.layers.biases[0]

    def forward(self, x, t=None, context=None):
        """x (..., B, in), t a number or (..., B, 1), context (..., B, width) -> (..., B, out)."""
        (w, b), *blocks, last = zip(self.layers.weights, self.layers.biases)
        e = 0.0
        if t is not None:
            angle = 2 * math.pi * t * self.frequencies
            e = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        x = x @ w[..., : x.shape[-1], :] + ((b if context is None else context) + e)
        for (w1, b1), (w2, b2) in zip(blocks[::2], blocks[1::2]):
            y = (self.act(x) @ w1).add_(b1 + e)
            x = (self.act(y) @ w2).add_(b2).add_(x)
        return (x - e) @ last[0] + last[1]


def schedule(t):
    """beta(t), and m, sigma with x(t) ~ N(m x, sigma^2): the variance-preserving SDE."""
    integral = 0.1 * t + 0.5 * 19.9 * t**2
    return 0.1 + 19.9 * t, torch.exp(-0.5 * integral), torch.sqrt(-torch.expm1(-integral))


def even_grid(first, last, steps):
    """(t, m, sigma) at steps + 1 times even in lambda = log(m / sigma), and lambda's step."""
    _, m, sigma = schedule(torch.tensor([first, last], dtype=torch.float64))
    grid = torch.linspace(*(m / sigma).log().tolist(), steps + 1, dtype=torch.float64)
    t = (torch.sqrt(0.01 + 39.8 * torch.log1p(torch.exp(-2 * grid))) - 0.1) / 19.9
    return torch.stack([t, *schedule(t)[1:]], 1).tolist(), (grid[1] - grid[0]).item()


def score_loss(nets, s, a):
    """Score matching at z-scored s, a (..., B, .): summed over dimensions and ensemble."""
    t, z = EPS + (1 - EPS) * torch.rand_like(a[..., :1]), torch.randn_like(a)
    _, m, sigma = schedule(t)
    error = nets.score(m * a + sigma * z, t, nets.score.context(s)) + z
    return error.square().sum(-1).mean(-1).sum()


def sample_dpm(raw, x, steps):
    """DPM-Solver++(2M) from noise x (B, A) at t = 1."""
    (points, h), before = even_grid(1.0, T_MIN, steps), None
    for (t, m, sigma), (_, m2, sigma2) in zip(points, [*points[1:], (0.0, 1.0, 0.0)]):
        x0 = (x + sigma * raw(x, t)) / m
        slope = x0 if before is None else 1.5 * x0 - 0.5 * before
        x, before = sigma2 / sigma * x - m2 * math.expm1(-h) * slope, x0
    return x0


def sample_pc(raw, x, steps, corrector, generator=None):
    """Predictor-corrector from noise x (B, A): at every t a Langevin, then a reverse-SDE step."""
    grid, dt = torch.linspace(1, T_MIN, steps, dtype=torch.float64), (1 - T_MIN) / max(steps - 1, 1)
    for t, beta, sigma in zip(*(v.tolist() for v in (grid, *schedule(grid)[::2]))):
        z, z2 = torch.randn(2, *x.shape, generator=generator, device=x.device, dtype=x.dtype)
        score, scale = raw(x, t) / sigma, sigma
        if corrector != "sigma":
            norms = torch.stack([z, score]).norm(dim=-1, keepdim=True)  # (2, B, 1)
            norms = norms.mean(1) if corrector == "batch" else norms
            scale = norms[0] / norms[1]
        step = 2 * (SNR * scale) ** 2
        x = x + step * score + (2 * step) ** 0.5 * z
        mean = x + beta * dt * (0.5 * x + raw(x, t) / sigma)
        x = mean + math.sqrt(beta * dt) * z2
    return mean


def divergence(raw, x, t, vectors):
    """raw at x (B, A), and the trace of its Jacobian, the sum over v of v^T J v: (B, A + 1)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out, trace = raw(x, t), 0.0
    for v in vectors.expand(-1, *x.shape):
        (grad,) = torch.autograd.grad(out, x, v, retain_graph=True)
        trace = trace + (grad * v).sum(-1, keepdim=True)
    return torch.cat([out.detach(), trace], 1)


def log_likelihood(raw, x, generator=None):
    """log p (B,) of z-scored x (B, A): the probability-flow ODE by adaptive RK45; else -inf."""
    vectors = torch.eye(x.shape[1]).unsqueeze(1).to(x)
    if x.shape[1] > EXACT_DIMS:
        signs = torch.randint(2, (PROBES, *x.shape), generator=generator, device=x.device)
        vectors = (2 * signs - 1).to(x) / math.sqrt(PROBES)
    x = x.detach().masked_fill(~(finite := x.isfinite().all(1)).unsqueeze(1), 0.0)

    def slope(t, y):  # d(x, log p) / dt = -beta / 2 (x + s_psi, A + div s_psi)
        beta, _, sigma = (v.item() for v in schedule(torch.tensor(t, dtype=torch.float64)))
        y = torch.from_numpy(y).to(x).view(len(x), -1)
        dy = torch.cat([y[:, :-1], torch.full_like(y[:, :1], x.shape[1])], 1)
        dy = -0.5 * beta * (dy + divergence(raw, y[:, :-1], t, vectors) / sigma)
        return dy.flatten().double().cpu().numpy()

    start = nn.functional.pad(x, (0, 1)).flatten().double().cpu().numpy()
    ode = solve_ivp(slope, (EPS, 1.0), start, rtol=ODE_TOL, atol=ODE_TOL)
    y = torch.from_numpy(ode.y[:, -1]).to(x).view(len(x), -1)
    log_prob = normal_log_prob(y[:, :-1], 0.0, torch.zeros_like(y[:, :-1])).sum(1) + y[:, -1]
    return log_prob.masked_fill(~(finite & log_prob.isfinite() & ode.success), -math.inf)


def draw(nets, obs, args, generator=None, x=None):
    """N samples, or actions x (B, A) in z, at states (B, S): (B, N, A + 1), last log p or 0."""
    n, score = args.n if x is None else 1, nets.score_ema
    context = score.context((obs - nets.s_mean) / nets.s_std).repeat_interleave(n, -2)
    raw = lambda x, t: score(x, t, context).view(args.ensemble, *x.shape).mean(0)
    noise = torch.empty(len(obs) * n, len(nets.a_mean)).to(obs).normal_(generator=generator)
    if x is None and args.sampler == "dpm":
        x = sample_dpm(raw, noise, args.sample_steps)
    elif x is None:
        x = sample_pc(raw, noise, args.sample_steps, args.corrector, generator)
    log_prob = log_likelihood(raw, x, generator) if args.filter else torch.zeros_like(x[:, 0])
    a = (x.nan_to_num(0.0) * nets.a_std + nets.a_mean).clamp(-1, 1)
    return torch.cat([a, log_prob.unsqueeze(1)], 1).view(len(obs), n, -1)


def support_values(nets, s, a, candidates, member=None):
    """Eq. 4: target Q (..., B, N + 1) of the data's action and N samples, and which count."""
    actions = torch.cat([a.unsqueeze(1), candidates[..., :-1]], 1)
    keep = nn.functional.pad(candidates[..., -1] > nets.threshold, (1, 0), value=True)
    rows = s.unsqueeze(1).expand(-1, actions.shape[1], -1).flatten(0, 1)
    q = nets.q_target(rows, actions.flatten(0, 1), member=member)
    return q.unflatten(-1, keep.shape), keep


def kth_largest(q, keep, k):
    """K-th of Eq. 5 among the kept of q (B, C): (B,); the smallest where fewer than K are kept."""
    top = q.masked_fill(~keep, -math.inf).topk(k, 1).values
    return top.gather(1, keep.sum(1, keepdim=True).clamp(max=k) - 1).squeeze(1)


def critic_loss(nets, s, a, r, s2, a2, candidates, terminal, args):
    """Eq. 5; a2 is the data's next action, candidates (B, N, A + 1) the samples at s2."""
    with torch.no_grad():
        if args.value == "sarsa":
            q2 = nets.q_target(s2, a2).amin(0)
        else:
            q, keep = support_values(nets, s2, a2, candidates)
            q = q.amin(0)  # twins first, K-th after
            q2 = kth_largest(q, keep, args.k)
            q2 = torch.maximum(q2, q[:, 0]) if args.floor else q2
        y = r + args.gamma * (1 - terminal) * q2  # (B,)
    return 0.5 * (nets.q(s, a) - y).square().mean(1).sum(), y.mean()


def advantage(nets, s, a, candidates):
    """A (B,) of Eq. 6 at the data's action, by the first target critic."""
    q, keep = support_values(nets, s, a, candidates, member=0)
    return q[:, 0] - (q * keep).sum(1) / keep.sum(1)


def policy_loss(nets, s, a, weight, args):
    """L_pi; deterministic policies by squared error."""
    out = nets.actor(s)
    if args.pi != "gaussian":
        return 0.5 * (weight * (out - a).square().mean(-1)).mean()
    return -(weight * normal_log_prob(a, out.tanh(), nets.log_std.clamp(-5, 2)).sum(-1)).mean()


def update_score(nets, opt, data, args):
    """One step of the score, every member on rows of its own, and of its average."""
    s, a = sample(data, args.ensemble * args.batch_size, ("obs", "action"))
    s = (s - nets.s_mean) / nets.s_std
    a = (a.clamp(-1 + 1e-5, 1 - 1e-5) - nets.a_mean) / nets.a_std
    if args.ensemble > 1:
        s, a = (x.unflatten(0, (args.ensemble, args.batch_size)) for x in (s, a))
    loss = minimize(opt.score, score_loss(nets, s, a))
    polyak(nets.score_ema, nets.score, 1 - EMA)
    return {"loss_per_dim": loss / (args.ensemble * a.shape[-1])}


def update_q(nets, opt, data, args):
    """One step of the critics and their targets: first loop of Algorithm 1."""
    i = data.rows[torch.randint(len(data.rows), (args.batch_size,), device=data.rows.device)]
    s, a, r, terminal, i2 = (x.index_select(0, i) for x in data.columns)
    s2, a2, candidates = (x.index_select(0, i2) for x in (data.obs, data.action, data.candidates))
    loss, target = critic_loss(nets, s, a, r, s2, a2, candidates, terminal, args)
    loss = minimize(opt.q, loss)
    polyak(nets.q_target, nets.q, args.polyak)
    return {"q_loss": loss, "target": target}


def update(nets, opt, data, args):
    """One step of pi_phi: second loop of Algorithm 1; Q, and so the advantages, stand still."""
    s, a, adv = sample(data, args.batch_size, ("obs", "action", "advantage"))
    weight = (args.alpha_pi * adv).exp().clamp(max=MAX_WEIGHT)
    metrics = {"weight": weight.mean(), "capped": (weight >= MAX_WEIGHT).float().mean()}
    return metrics | {"pi_loss": minimize(opt.actor, policy_loss(nets, s, a, weight, args))}


def implicit_policy(nets, obs, args):
    """Eq. 6: raw observations (B, S) to actions in the task's bounds, out of N fresh samples."""
    s = nets.scaling.obs(obs)
    a, log_prob = draw(nets, s, args).tensor_split([-1], -1)
    q = nets.q_target(s.repeat_interleave(args.n, 0), a.flatten(0, 1), member=0)
    keep = (log_prob > nets.threshold) | (log_prob == log_prob.amax(1, keepdim=True))
    logits = (args.alpha * q.view(keep.shape)).masked_fill(~keep, -math.inf).squeeze(-1)
    i = torch.multinomial(logits.softmax(1), 1)
    return nets.scaling.action(a.take_along_dim(i.unsqueeze(-1), 1).squeeze(1))


def policy(nets, obs, args):
    """pi_phi: raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    out = nets.actor(nets.scaling.obs(obs))
    return nets.scaling.action(out.tanh() if args.pi == "gaussian" else out.clamp(-1, 1))


def train_data(data, args):
    """Shape rewards; find each row's successor. Q trains on rows that end or have one."""
    spread = data.episode_return.max() - data.episode_return.min()
    scale = 1000 / spread if args.normalize_reward and spread > 0 else 1.0
    data.reward = data.reward * scale + args.reward_shift
    i = torch.arange(len(data.obs), device=data.obs.device)
    goes_on = torch.cat([data.episode[1:] == data.episode[:-1], i[:1] > 0])
    data.rows, data.advantage = i[goes_on | data.terminal.bool()], 0 * data.reward
    data.columns = data.obs, data.action, data.reward, data.terminal, i + goes_on.long()
    if not len(data.rows):
        raise InputError(f"{data.name}: no row has a next action; give episodes of several steps")


def train_stage(run, name, net, update, inputs, steps, *settings):
    """Train one stage, or read `net` as an earlier run trained it."""
    path, cached = run.cached(name, net, steps, *settings)
    step = graphed(update, *inputs, compile=inputs[-1].compile)
    for t in run.loop(0 if cached else steps, phase=name):
        run.after(t, step())
        if t == steps and path:
            run.share(path, net)


def train_samples(run, nets, data, args):
    """data.candidates (rows, N, A + 1), in a file that a stopped run continues and others share:
    samples, then a mark for every finished chunk. Returns the settings they depend on."""
    size, shape = CHUNK, (len(data.obs), args.n, data.action.shape[1] + 1)
    size *= 16 if run.device.type == "cuda" else 1
    chunks, total = -(-len(data.obs) // size), math.prod(shape)
    weights = b"".join(x.cpu().numpy().tobytes() for x in nets.score_ema.state_dict().values())
    settings = [hashlib.sha256(weights).hexdigest(), size, args.n, args.filter]
    settings += [args.sampler, args.sample_steps, args.corrector]
    path, _ = run.cached("samples", nets.score_ema, *settings)
    try:  # every byte is reserved here: a disk that is too small says so at once
        with open(path.with_suffix(".f32"), "a+b") if path else tempfile.TemporaryFile() as file:
            getattr(os, "posix_fallocate", lambda *_: None)(file.fileno(), 0, 4 * (total + chunks))
            flat = np.memmap(file, np.float32, "r+", shape=total + chunks)
    except OSError as error:
        raise InputError(f"--out {args.out}: {error.strerror}; give another folder") from None
    samples, finished = flat[:total].reshape(shape), flat[total:]
    if args.filter and args.ll_quantile > 0:
        i = torch.arange(0, len(data.obs), -(-len(data.obs) // 1024), device=run.device)
        x = (data.action[i].clamp(-1 + 1e-5, 1 - 1e-5) - nets.a_mean) / nets.a_std
        log_prob = draw(nets, data.obs[i], args, torch.Generator(run.device).manual_seed(0), x)
        nets.threshold.copy_(log_prob[..., -1].quantile(args.ll_quantile))

    def fill(c):  # each chunk has random numbers of its own
        rows = slice(c * size, (c + 1) * size)
        if not finished[c]:
            seeded = torch.Generator(run.device).manual_seed(hash((args.seed, c)))
            samples[rows] = draw(nets, data.obs[rows], args, seeded).cpu().numpy()
            finished[c] = 1
        return torch.from_numpy(samples[rows])

    start, before = time.time(), finished.sum()
    for t in run.loop(0 if finished.all() else chunks, phase="sample"):
        kept = (fill((t - 1) % chunks)[..., -1] > nets.threshold.cpu()).float().mean()
        run.after(t, {"kept": kept})
    for c in np.flatnonzero(finished == 0) if path else ():  # lost since this run's checkpoint
        fill(c)
    rate = (finished.sum() - before) * size * args.n * args.sample_steps / (time.time() - start)
    rate and print(f"sample: {rate:,.0f} network evaluations/s (pc: twice), without likelihoods")
    data.candidates = torch.from_numpy(samples).to(run.device)
    return settings


def train(args):
    """Train, log and save; returns the mean score of pi_phi's last 10 evaluations."""
    if args.value == "arq" and args.k > args.n + 1:
        raise InputError(f"--k {args.k} of N + 1 = {args.n + 1} candidates: lower it or raise --n")
    run = Run(args)
    data, task = load_dataset(args.env, run.device, args.eval_env)
    train_data(data, args)
    nets = Nets(data, args).to(run.device)
    actor = [*nets.actor.parameters(), *([nets.log_std] if args.pi == "gaussian" else [])]
    opt = SimpleNamespace(q=Adam(nets.q.parameters(), args.q_lr), actor=Adam(actor, PI_LR))
    opt.score = Adam(nets.score.parameters(), args.score_lr)
    run.start(data, task, nets, opt)
    inputs, batch = (nets, opt, data, args), args.batch_size
    score = nets.score_ema, update_score, inputs, args.score_steps
    train_stage(run, "score", *score, args.score_lr, batch)
    if args.value != "none" and args.until != "score":
        key = train_samples(run, nets, data, args)
        key += [args.value, args.floor, args.threshold, args.ll_quantile, args.gamma, batch]
        key += [args.k, args.polyak, args.q_lr, args.normalize_reward, args.reward_shift]
        if args.until != "sample":
            train_stage(run, "q", nets.q_target, update_q, inputs, args.q_steps, *key)
            columns = zip(*(x.split(4096) for x in (data.obs, data.action, data.candidates)))
            data.advantage = torch.cat([advantage(nets, *rows) for rows in columns])
    if args.until in ("train", "implicit"):
        step = graphed(update, *inputs, compile=args.compile)
        for t in run.loop(args.steps):
            run.after(t, step(), lambda obs: policy(nets, obs, args))
    clone = replace(args, n=1, filter=False)
    for label, how in {"implicit policy": args, "clone s_psi": clone}.items():
        if args.until == "implicit" and (args.value != "none" or how is clone):
            calls, start = [], time.time()
            run.reference(label, lambda s: calls.append(s) or implicit_policy(nets, s, how))
            cost = 1000 * (time.time() - start) / max(len(calls), 1)
            calls and print(f"{label}: {cost:.1f} ms per environment step, its own included")
    return run.finish()


if __name__ == "__main__":
    train(parse(Args, PRESETS))
