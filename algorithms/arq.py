"""Action-Restricted Q-learning, ARQ (Goo & Niekum, "Know Your Boundaries", 2022; arXiv:2206.00695).

Idea: clone the behavior policy beta(a|s) with a diffusion model, and let Q-learning maximize only
over actions drawn from that clone, so that its targets use no value of an action outside the data's
support.

    L_score = E |raw(m a + sigma z, s, t) + z|^2,  z ~ N(0, I)           (score matching)
    s_psi(a, s, t) = raw(a, s, t) / sigma(t), the score of the clone
    supp(s) = {a_data} + those of N samples of the clone with beta(a|s) > eps                    (4)
    y    = r + gamma (1 - terminal) max(K-th largest q over supp(s'), q(s', a'_data)),
           q(s', a) = min_i Q'_i(s', a)
    L_Q  = sum_i E[ (Q_i(s,a) - y)^2 / 2 ]                                                       (5)
    pi(a|s) proportional to exp(alpha Q'_1(s,a)), over N new samples with beta(a|s) > eps        (6)
    L_pi = -E[ min(exp(alpha_pi A(s,a)), 100) log pi_phi(a|s) ],
           A(s,a) = Q'_1(s,a) - mean of Q'_1 over supp(s)                (weighted regression)

The diffusion turns an action a into m a + sigma z, where m and sigma depend on its time t in [0, 1]
(see `schedule`): at t = 0 this is the action itself, at t = 1 almost only noise. The network `raw`
learns -z. The flags --n, --k and --threshold set N, K and log eps. Q'_i are the target critics, and
a_data and a'_data are the actions that the data takes at s and at s'.

Three parts come from papers on diffusion models. The diffusion is the variance-preserving SDE
(VP-SDE) of Song et al. (ICLR 2021; arXiv:2011.13456). Their probability-flow ODE gives the
likelihoods beta(a|s), and their predictor-corrector is the authors' sampler. The default sampler is
DPM-Solver++(2M) (Lu et al., 2022; arXiv:2211.01095) in its SDE form.

The file has four chapters, in the order in which a run goes through them. It trains the score
network (phase "score"). It draws N samples for every state of the data ("sample"), and with
--filter computes their likelihoods ("grade"). It trains Q ("q"), and then pi_phi ("train"), whose
evaluations are the result of the run. At the end it also evaluates the implicit policy of (6), and
the clone by itself, which the paper's tables call s_psi like its score.

What changes scores (more in DEPARTURES, at the foot of the file):
- The data's next action is always in the support, and y never uses less than its value (--floor;
  the authors' code, not the paper).
- The rewards of locomotion are multiplied by 1,000 / (best - worst return of an episode); the
  paper's wording leaves this open.
- The sampler is the SDE form of DPM-Solver++(2M), with 21 network evaluations instead of the
  authors' 1,000 (--sampler pc --sample-steps 500), and a few samples lie off the support.
- Without --filter, actions outside the support do reach Q. The authors filter in all domains. Here
  the presets of the paper's domains filter, and the default does not, because likelihoods take days
  on a CPU.

    python algorithms/arq.py  # 20k steps: 95.5 ± 4.0, hopper-medium-expert-demo, 3 seeds
"""

import copy
import math
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import BatchSize, Count, NonNegative, Number, Positive, PositiveShare, Seed, ShareBelow1
from common import MLP, Adam, Data, InputError, RunArgs, ScalarMLP, Scaling
from common import glorot_, graphed, largest_value, minimize, normal_log_prob
from common import normalize_obs, polyak, sample


@dataclass
class Args(RunArgs):
    phases = {"score": "score_steps", "sample": None, "grade": None, "q": "q_steps"}
    phases |= {"train": "steps"}
    clone_flags = ("score_steps", "score_lr")
    env: str = "hopper-medium-expert-demo"
    """dataset: bundled, D4RL or OGBench name, Minari id, or path of an .hdf5 or .npz file"""
    seed: Seed = 0
    """seeds networks, batches and evaluation"""
    steps: Count = 1_000_000
    """gradient steps of the policy pi_phi, after all other phases"""
    batch_size: BatchSize = 512
    """transitions per gradient step"""
    eval_every: Count = 5_000
    """gradient steps between evaluations"""
    value: Literal["arq", "sarsa", "none"] = "arq"
    """target of Q: arq (Eq. 5), sarsa (Q^beta; in the paper with --q-lr 1e-4), none (no Q)"""
    n: Count = 30
    """samples N of the clone per state"""
    k: Count = 9
    """K of Eq. 5: 1 is the maximum over the support, N + 1 the minimum"""
    floor: bool = True
    """use in y at least the value of the data's next action, as the authors' code does"""
    alpha: NonNegative = 1.0
    """sharpness alpha of the implicit policy (Eq. 6): 0 is the clone, a large number is greedy"""
    alpha_pi: NonNegative = 1.0
    """sharpness alpha_pi of the weights in pi_phi's regression: 0 is behavior cloning"""
    pi: Literal["gaussian", "deterministic"] = "gaussian"
    """policy pi_phi: a Gaussian with one deviation for all states, or a deterministic network"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.005
    """share of the online critics that targets take over per step"""
    q_lr: Positive = 3e-4
    """Adam's learning rate of the critics"""
    q_steps: Count = 1_000_000
    """gradient steps of the critics"""
    normalize_obs: bool = False
    """shift and scale observations to mean 0 and deviation 1 over the data, for all networks"""
    normalize_reward: bool = False
    """divide rewards by (best - worst episode return) / 1000"""
    reward_shift: Number = 0.0
    """added to every reward, after --normalize-reward"""
    score_steps: Count = 1_000_000
    """gradient steps of the score network, before all other phases"""
    score_lr: Positive = 1e-4
    """Adam's learning rate of the score network"""
    clone: str | None = None
    """checkpoint.pt of a run on the same data: its score network is read, not trained"""
    width: Count = 256
    """hidden units of the score network"""
    ensemble: Count = 1
    """number of score networks; the mean of their outputs is used"""
    sampler: Literal["sde", "pc"] = "sde"
    """sde: the SDE form of DPM-Solver++(2M); pc: predictor-corrector, the authors' sampler"""
    sample_steps: Count = 20
    """steps of the sampler: sde needs 15 or more, the paper's pc has 500"""
    filter: bool = False
    """leave out samples whose log-likelihood is not above --threshold (Eq. 4); days on a CPU"""
    threshold: Number = -5.0
    """log eps (Eq. 4) for --filter, in z-scored actions: a lower number keeps more samples"""

    def resolve(self):
        if self.value == "arq" and self.k > self.n + 1:
            raise InputError(f"--k {self.k} exceeds N + 1 = {self.n + 1}: use a larger --n")


class Nets(nn.Module):
    """Every network and its target; losses and optimizers live outside."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.scaling = Scaling(data)
        self.z_obs = ZScore(data.obs)
        self.z_action = ZScore(data.action)
        self.score = ScoreNet(obs_dim, act_dim, args.width, args.ensemble)
        critics = 1 if args.value == "sarsa" else 2
        self.q = ScalarMLP(obs_dim + act_dim, 256, 256, members=critics)
        self.actor = MLP(obs_dim, 256, 256, act_dim)
        self.log_std = nn.Parameter(torch.zeros(act_dim)) if args.pi == "gaussian" else None
        for net in self.modules():
            if isinstance(net, MLP):
                glorot_(net)
        self.score_ema = copy.deepcopy(self.score).requires_grad_(False)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)


# ---- 1. the clone of the data --------------------------------------------------------------------

T_FIRST = 1e-5  # the smallest time in training, and the one at which likelihoods start
T_LAST = 1e-3  # the time at which sampling ends


class ScoreNet(nn.Module):
    """The network `raw`, or an ensemble of such networks: residual blocks of two layers. The
    embedding e of the time is added to the input of every layer in a block."""

    def __init__(self, obs_dim, act_dim, width, ensemble):
        super().__init__()
        members = ensemble if ensemble > 1 else None
        features = max(width // 2, 1)
        self.first = MLP(act_dim + obs_dim, width, members=members)
        self.hidden = nn.ModuleList(MLP(width, width, members=members) for _ in range(6))
        self.last = MLP(width, act_dim, members=members)
        self.register_buffer("frequencies", 30 * torch.randn(1, features))  # 30: authors' code
        self.time = MLP(2 * features, width, members=members)

    def forward(self, x, s, t):
        """raw (B, A), or (E, B, A) for an ensemble, at z-scored x (..., B, A) and s (..., B, S);
        t is a number or (..., B, 1)."""
        angle = 2 * math.pi * t * self.frequencies
        e = self.time(angle.sin(), angle.cos())
        h = self.first(x, s)
        for one, two in zip(self.hidden[::2], self.hidden[1::2]):
            inner = one(F.silu(h + e))
            h = h + two(F.silu(inner + e))
        return self.last(h)


class ZScore(nn.Module):
    """Mean 0 and deviation 1 over the data, for the score network alone. A deviation below 0.05
    counts as 0.05 (authors' code). For a coordinate that is constant in the data, `inverse` returns
    that constant."""

    def __init__(self, x):
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("std", x.std(0, correction=0).clamp(min=0.05))
        self.register_buffer("constant", x.amin(0) == x.amax(0))

    def forward(self, x):
        return (x - self.mean) / self.std

    def inverse(self, z):
        x = z * self.std + self.mean
        return torch.where(self.constant, self.mean, x)


def schedule(t):
    """The VP-SDE (arXiv:2011.13456) at time t: its rate beta(t), which is not the policy beta(a|s),
    and m, sigma with a(t) ~ N(m a, sigma^2 I)."""
    beta = 0.1 + 19.9 * t  # from 0.1 to 20: authors' code
    integral = 0.1 * t + 0.5 * 19.9 * t**2  # of beta, from 0 to t
    m = torch.exp(-0.5 * integral)
    sigma = torch.sqrt(-torch.expm1(-integral))
    return beta, m, sigma


def score_loss(nets, s, a):
    """L_score at z-scored s and a (..., B, .), summed over the members of an ensemble."""
    t = torch.rand_like(a[..., :1])
    t = T_FIRST + (1 - T_FIRST) * t
    z = torch.randn_like(a)
    _, m, sigma = schedule(t)
    error = nets.score(m * a + sigma * z, s, t) + z
    return error.square().sum(-1).mean(-1).sum()


def update_score(nets, opt, data, args):
    """One gradient step of the score network, and one step of its moving average. Each member of an
    ensemble has rows of its own."""
    s, a = sample(data, args.ensemble * args.batch_size, ("obs", "action"))
    s = nets.z_obs(s)
    a = nets.z_action(a.clamp(-1 + 1e-5, 1 - 1e-5))  # clipped as in the authors' code
    if args.ensemble > 1:
        members = args.ensemble, args.batch_size
        s = s.unflatten(0, members)
        a = a.unflatten(0, members)
    loss = minimize(opt.score, score_loss(nets, s, a))
    polyak(nets.score_ema, nets.score, 1 - 0.999)  # authors' code
    return {"loss_per_dim": loss / (args.ensemble * a.shape[-1])}


def train_score(run, nets, opt, data, args):
    """Train the score network, or read that of --clone; all later phases use its moving average."""
    if args.clone:
        run.read_clone(nets.score_ema)
    step = graphed(update_score, nets, opt, data, args, compile=args.compile)
    for t in run.loop(0 if args.clone else args.score_steps, phase="score"):
        metrics = step()
        run.after(t, metrics)


# ---- 2. its samples and their likelihoods --------------------------------------------------------


def even_times(steps):
    """steps + 1 times from 1 down to T_LAST, evenly spaced in lambda = log(m / sigma): lists of t,
    m and sigma, and the spacing h of lambda."""
    ends = torch.tensor([1.0, T_LAST], dtype=torch.float64)
    _, m, sigma = schedule(ends)
    first, last = (m / sigma).log().tolist()
    lam = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    integral = torch.log1p(torch.exp(-2 * lam))  # that of `schedule`, as a function of lambda
    t = (torch.sqrt(0.01 + 39.8 * integral) - 0.1) / 19.9  # where `schedule` has this integral
    _, m, sigma = schedule(t)
    h = lam[1] - lam[0]
    return t.tolist(), m.tolist(), sigma.tolist(), h.item()


def sample_dpm(raw, x, steps, generator=None):
    """DPM-Solver++(2M) in its SDE form (arXiv:2211.01095), from x (B, A) ~ N(0, I) at t = 1. "2M"
    means second order, by the estimates x0 of this step and of the one before (multistep)."""
    t, m, sigma, h = even_times(steps)
    before = None
    for i in range(steps):
        signal = x + sigma[i] * raw(x, t[i])
        x0 = signal / m[i]  # what x would be without noise
        slope = x0 if before is None else 1.5 * x0 - 0.5 * before
        before = x0
        ratio = sigma[i + 1] / sigma[i]
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        std = sigma[i + 1] * math.sqrt(-math.expm1(-2 * h))
        kept = ratio * math.exp(-h)
        gained = m[i + 1] * math.expm1(-2 * h)
        x = kept * x - gained * slope
        x = x + std * z
    x = x + sigma[-1] * raw(x, t[-1])  # the rest of the noise is removed, and none is added
    return x / m[-1]


def sample_pc(raw, x, steps, generator=None):
    """Predictor-corrector (arXiv:2011.13456) from x (B, A) ~ N(0, I) at t = 1. At every time t, the
    corrector is a Langevin step, whose size follows from the norms of a sample's noise and score;
    then the predictor is a step of the reverse SDE."""
    times = torch.linspace(1, T_LAST, steps, dtype=torch.float64)
    dt = (1 - T_LAST) / max(steps - 1, 1)
    for t in times:
        beta, _, sigma = (value.item() for value in schedule(t))
        t = t.item()
        shape = (2, *x.shape)
        z, z2 = torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
        score = raw(x, t) / sigma
        norm, score_norm = (v.norm(dim=-1, keepdim=True) for v in (z, score))  # (B, 1)
        scale = norm / score_norm
        step = 2 * (0.16 * scale) ** 2  # 0.16 is the paper's signal-to-noise ratio
        x = x + step * score + (2 * step) ** 0.5 * z
        drift = 0.5 * x + raw(x, t) / sigma
        mean = x + beta * dt * drift
        x = mean + math.sqrt(beta * dt) * z2
    return mean


def raw_at(nets, s, n, args):
    """The function raw(x, t) of actions x (Bn, A), n for each of the states s (B, S). The outputs
    of an ensemble are averaged."""
    s = nets.z_obs(s).repeat_interleave(n, 0)

    def raw(x, t):
        out = nets.score_ema(x, s, t)
        return out.mean(0) if args.ensemble > 1 else out

    return raw


def draw_samples(nets, s, args, generator=None):
    """N samples of the clone at each of the states s (B, S): z-scored actions (B, N, A)."""
    raw = raw_at(nets, s, args.n, args)
    shape = len(s) * args.n, len(nets.z_action.mean)
    x = torch.randn(shape, generator=generator, dtype=s.dtype, device=s.device)
    if args.sampler == "pc":
        x = sample_pc(raw, x, args.sample_steps, generator)
    else:
        x = sample_dpm(raw, x, args.sample_steps, generator)
    if not x.isfinite().all():
        raise InputError(
            "training diverged: samples of the score network are not finite; use a smaller "
            "--score-lr"
        )
    return x.view(len(s), args.n, -1)


def trace_vectors(x, generator=None):
    """Vectors v (V, 1 or B, A) for x (B, A), such that v^T J v, summed over them, is the trace of a
    matrix J. Up to 10 dimensions they are the unit vectors, and the trace is exact. Above, they are
    ten random vectors, and the sum is right on average (Hutchinson's estimator)."""
    act_dim = x.shape[1]
    if act_dim <= 10:
        return torch.eye(act_dim).unsqueeze(1).to(x)
    signs = torch.randint(2, (10, *x.shape), generator=generator, device=x.device)
    return (2 * signs - 1).to(x) / math.sqrt(10)


def raw_and_trace(raw, x, t, vectors):
    """raw (B, A) at x (B, A), and the trace (B,) of its Jacobian."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = raw(x, t)
    trace = 0.0
    for v in vectors.expand(-1, *x.shape):
        (grad,) = torch.autograd.grad(out, x, v, retain_graph=True)
        trace = trace + (grad * v).sum(-1)
    return out.detach(), trace


def log_likelihood(raw, x, vectors):
    """log beta(a|s) (B,) of z-scored actions x (B, A). The probability-flow ODE (arXiv:2011.13456)

        dx / dt = -beta(t) / 2 (x + s_psi),    dl / dt = -beta(t) / 2 (A + div s_psi)

    is solved from t = T_FIRST, where l = 0, to t = 1. The result is l plus the log-density of x
    under N(0, I), both at t = 1. RK45 takes the same steps for all rows. A row whose result is not
    finite gets minus infinity."""
    rows, act_dim = x.shape

    def slope(t, y):
        beta, _, sigma = schedule(torch.tensor(t, dtype=torch.float64))
        rate, sigma = -0.5 * beta.item(), sigma.item()
        y = torch.from_numpy(y).to(x)
        x_now = y.view(rows, act_dim + 1)[:, :-1]
        out, trace = raw_and_trace(raw, x_now, t, vectors)
        dx = rate * (x_now + out / sigma)
        dl = rate * (act_dim + trace / sigma)
        dy = torch.cat([dx, dl.unsqueeze(1)], 1)
        return dy.flatten().double().cpu().numpy()

    start = F.pad(x, (0, 1))
    start = start.flatten().double().cpu().numpy()
    ode = solve_ivp(slope, (T_FIRST, 1.0), start, rtol=1e-5, atol=1e-5)
    end = torch.from_numpy(ode.y[:, -1]).to(x)
    end = end.view(rows, act_dim + 1)
    log_std = torch.zeros_like(x)
    log_prior = normal_log_prob(end[:, :-1], 0.0, log_std).sum(1)
    log_prob = log_prior + end[:, -1]
    valid = log_prob.isfinite() & ode.success
    return log_prob.masked_fill(~valid, -math.inf)


def grade(nets, s, x, args, generator=None):
    """log beta (B, N) of z-scored actions x (B, N, A) at the states s (B, S)."""
    raw = raw_at(nets, s, x.shape[1], args)
    flat = x.flatten(0, 1)
    vectors = trace_vectors(flat, generator)
    return log_likelihood(raw, flat, vectors).view(x.shape[:2])


def train_table(run, stage, shape, values, health, seed):
    """A table of `shape`, computed in chunks of rows: values(rows, c, generator) returns chunk c,
    and health(chunk) the metrics to log. Every chunk has random numbers of its own, so that a run
    that was stopped computes the same table."""
    size = 1024 if run.device.type == "cuda" else 64  # rows of a chunk
    count = math.ceil(shape[0] / size)
    table, missing = torch.zeros(shape, device=run.device), set(range(count))

    def fill(c):
        rows = slice(c * size, (c + 1) * size)
        generator = torch.Generator(run.device)
        generator.manual_seed(zlib.crc32(f"{stage} {seed} {c}".encode()))
        table[rows] = values(rows, c, generator)
        missing.discard(c)
        return table[rows]

    t = count
    for t in run.loop(count, phase=stage):
        run.after(t, health(fill(t - 1)))
    if t == count:  # skipped where the loop was cut short, to measure or to test
        for c in sorted(missing):  # those before the step at which the run was resumed
            fill(c)
    return table


def train_samples(run, nets, data, args):
    """Draw the samples of every state of the data, and find which are in the support."""
    shape = len(data.obs), args.n, data.action.shape[1]

    def samples(rows, c, generator):
        return draw_samples(nets, data.obs[rows], args, generator)

    def outside(x):
        a = nets.z_action.inverse(x)
        return {"outside_bounds": (a.abs() > 1).float().mean()}

    def likelihoods(rows, c, generator):
        s, actions = data.obs[rows], x[rows]
        return run.kept(f"grade-{c}", lambda: grade(nets, s, actions, args, generator))

    def inside(log_prob):
        in_support = log_prob > args.threshold
        return {"in_support": in_support.float().mean()}

    x = train_table(run, "sample", shape, samples, outside, args.seed)
    data.candidates = nets.z_action.inverse(x).clamp(-1, 1)
    data.in_support = torch.ones(shape[:2], dtype=torch.bool, device=run.device)
    if args.filter:
        log_prob = train_table(run, "grade", shape[:2], likelihoods, inside, args.seed)
        data.in_support = log_prob > args.threshold


# ---- 3. Q over the samples -----------------------------------------------------------------------


@dataclass
class SupportData(Data):
    """The R rows of the data, and what ARQ adds: for each, its next row, and its N samples."""

    rows: Tensor = None  # (M,) int64, the rows that train Q
    next_row: Tensor = None  # (R,) int64; the row itself where an episode ends
    candidates: Tensor = None  # (R, N, A) samples of the clone, clipped to the bounds
    in_support: Tensor = None  # (R, N) bool, the samples that count (Eq. 4)
    advantage: Tensor = None  # (R,) of the data's actions


def scale_rewards(data, args):
    """Scale and shift data.reward, from which Q learns; data.episode_return stays as it is."""
    scale = 1.0
    if args.normalize_reward:
        gap = data.episode_return.max() - data.episode_return.min()
        if gap == 0:
            raise InputError(
                f"{data.name}: --normalize-reward would divide by zero, because all episodes have "
                "the same return; use --no-normalize-reward"
            )
        scale = 1000 / gap
    data.reward = data.reward * scale + args.reward_shift


def with_next_rows(data):
    """The data as SupportData, still without samples. The rows that train Q are those that are
    terminal or have a next action."""
    i = torch.arange(len(data.obs), device=data.obs.device)
    episode = data.episode
    goes_on = F.pad(episode[1:] == episode[:-1], (0, 1))
    rows = i[goes_on | data.terminal.bool()]
    if not len(rows):
        raise InputError(f"{data.name}: no row has a next action; use episodes of several steps")
    zeros = torch.zeros_like(data.reward)
    return SupportData(**vars(data), rows=rows, next_row=i + goes_on, advantage=zeros)


def select(data, i, *fields):
    """Rows i of the fields."""
    return [getattr(data, field).index_select(0, i) for field in fields]


def support_values(nets, s, a, candidates, in_support, member=None):
    """Target Q (..., B, 1 + N) of the data's action and of N samples, and which of them are in the
    support (Eq. 4). `member` chooses one critic."""
    a = torch.cat([a.unsqueeze(1), candidates], 1)  # (B, 1 + N, A)
    keep = F.pad(in_support, (1, 0), value=True)
    s = s.unsqueeze(1).expand(-1, a.shape[1], -1)
    s, a = s.flatten(0, 1), a.flatten(0, 1)
    q = nets.q_target(s, a, member=member)
    return q.unflatten(-1, keep.shape), keep


def kth_largest(q, keep, k):
    """Eq. 5: K-th largest (B,) of the kept values of q (B, C); the smallest, if fewer are kept.
    C is 1 + N."""
    q = q.masked_fill(~keep, -math.inf)
    largest = q.topk(k, 1).values
    place = keep.sum(1, keepdim=True).clamp(max=k) - 1
    return largest.gather(1, place).squeeze(1)


def target(nets, r, s2, a2, candidates, in_support, terminal, args):
    """y (B,) of Eq. 5; a2 is the data's next action, the candidates are the samples at s2."""
    if args.value == "sarsa":
        q2 = nets.q_target(s2, a2).amin(0)
    else:
        q, keep = support_values(nets, s2, a2, candidates, in_support)
        q = q.amin(0)  # first the minimum over critics, then the K-th largest
        q2 = kth_largest(q, keep, args.k)
        if args.floor:
            q2 = torch.maximum(q2, q[:, 0])
    return r + args.gamma * (1 - terminal) * q2


def critic_loss(nets, s, a, y):
    """Eq. 5: half the squared error, summed over the critics."""
    error = nets.q(s, a) - y  # (E, B)
    return 0.5 * error.square().mean(1).sum()


def advantage(nets, s, a, candidates, in_support):
    """A (B,) of the data's actions in L_pi, by the first target critic."""
    q, keep = support_values(nets, s, a, candidates, in_support, member=0)
    mean = (q * keep).sum(1) / keep.sum(1)
    return q[:, 0] - mean


def update_q(nets, opt, data, args):
    """One step of the critics and their targets: first loop of Algorithm 1."""
    rows = data.rows
    drawn = torch.randint(len(rows), (args.batch_size,), device=rows.device)
    i = rows[drawn]
    i2 = data.next_row[i]
    s, a, r, terminal = select(data, i, "obs", "action", "reward", "terminal")
    s2, a2, candidates, in_support = select(data, i2, "obs", "action", "candidates", "in_support")
    with torch.no_grad():
        y = target(nets, r, s2, a2, candidates, in_support, terminal, args)
    q_loss = minimize(opt.q, critic_loss(nets, s, a, y))
    polyak(nets.q_target, nets.q, args.polyak)
    return {"q_loss": q_loss, "target": y.mean()}


def train_q(run, nets, opt, data, args):
    """Train the critics and their targets, then compute the advantages of the data's actions."""
    step = graphed(update_q, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.q_steps, phase="q"):
        metrics = step()
        run.after(t, metrics)
    columns = data.obs, data.action, data.candidates, data.in_support
    batches = zip(*(column.split(4096) for column in columns))
    data.advantage = torch.cat([advantage(nets, *batch) for batch in batches])


# ---- 4. the policies -----------------------------------------------------------------------------


def implicit_logits(nets, s, a, log_prob, args):
    """Eq. 6: logits (B, N) of samples a (B, N, A), whose log beta(a|s) is `log_prob` (B, N). With
    log_prob None, all samples count. At a state without a sample in the support, the likeliest one
    counts."""
    rows = s.repeat_interleave(a.shape[1], 0)
    q = nets.q_target(rows, a.flatten(0, 1), member=0)
    logits = args.alpha * q.view(a.shape[:2])
    if log_prob is None:
        return logits
    likeliest = log_prob == log_prob.amax(1, keepdim=True)
    keep = (log_prob > args.threshold) | likeliest
    return logits.masked_fill(~keep, -math.inf)


def implicit_policy(nets, obs, args):
    """Eq. 6: raw observations (B, S) to actions in the task's bounds, drawn from N new samples."""
    s = nets.scaling.obs(obs)
    x = draw_samples(nets, s, args)
    a = nets.z_action.inverse(x).clamp(-1, 1)  # (B, N, A)
    log_prob = grade(nets, s, nets.z_action(a), args) if args.filter else None
    logits = implicit_logits(nets, s, a, log_prob, args)
    i = torch.multinomial(logits.softmax(1), 1)  # (B, 1)
    chosen = a.take_along_dim(i.unsqueeze(-1), 1).squeeze(1)
    return nets.scaling.action(chosen)


def policy_loss(nets, s, a, weight, args):
    """L_pi; for a deterministic pi_phi, a weighted squared error."""
    out = nets.actor(s)
    if args.pi == "deterministic":
        error = (out - a).square().mean(-1)
        return 0.5 * (weight * error).mean()
    log_std = nets.log_std.clamp(-5, 2)  # authors' code
    log_prob = normal_log_prob(a, out.tanh(), log_std).sum(-1)
    return -(weight * log_prob).mean()


def update(nets, opt, data, args):
    """One step of pi_phi: second loop of Algorithm 1; Q and the advantages are fixed by now."""
    s, a, adv = sample(data, args.batch_size, ("obs", "action", "advantage"))
    weight = (args.alpha_pi * adv).exp().clamp(max=100)
    pi_loss = minimize(opt.actor, policy_loss(nets, s, a, weight, args))
    return {
        "weight": weight.mean(),
        "capped_weights": (weight >= 100).float().mean(),
        "pi_loss": pi_loss,
    }


def q(nets, s, a):
    """The value (E, B) of every critic at scaled states s (B, S), actions a (B, A) in [-1, 1]."""
    return nets.q(s, a)


def policy(nets, obs, args):
    """pi_phi: raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    out = nets.actor(nets.scaling.obs(obs))
    a = out.tanh() if args.pi == "gaussian" else out.clamp(-1, 1)
    return nets.scaling.action(a)


def train_actor(run, nets, opt, data, args):
    """Train the policy pi_phi."""
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        metrics = step()
        run.after(t, metrics, lambda obs: policy(nets, obs, args))


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
    args.resolve()
    scale_rewards(data, args)
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    data = with_next_rows(data)
    nets = Nets(data, args).to(run.device)
    free_std = [nets.log_std] if args.pi == "gaussian" else []
    opt = SimpleNamespace(
        score=Adam(nets.score.parameters(), args.score_lr),
        q=Adam(nets.q.parameters(), args.q_lr),
        actor=Adam([*nets.actor.parameters(), *free_std], 3e-4),  # the paper's rate
    )
    run.start(nets, opt, target=largest_value(data, args.gamma))
    train_score(run, nets, opt, data, args)
    if args.value != "none":
        train_samples(run, nets, data, args)
        train_q(run, nets, opt, data, args)
    train_actor(run, nets, opt, data, args)
    if args.value != "none":
        run.reference("implicit policy", lambda obs: implicit_policy(nets, obs, args))
    clone = replace(args, n=1, filter=False)
    run.reference("clone s_psi", lambda obs: implicit_policy(nets, obs, clone))


DEPARTURES = """
The authors' code, against the paper:
- beta(a|s) in (4) is the density of the z-scored action, which has mean 0 and deviation 1.
- The data's next action is always in the support, and y never uses less than its value (--floor).
- A rejected sample is left out; no other is drawn in its place.
- Both policies, of (6) and pi_phi, use the first target critic alone.
- The weights in L_pi are at most 100.
- The rewards of locomotion are multiplied by 1,000 / (best - worst return of an episode); the
  paper's wording leaves this open.
- When the implicit policy acts, samples are clipped to the bounds before their likelihood is
  computed. The samples that train Q are never clipped.
- The sampler computes the size of its Langevin step for each sample alone, from the norms of its
  noise and of its score. (Usually the norms are averaged over the batch.) Near a mode the score is
  almost 0, so the step is too long, and samples spread.
- Q^beta, the paper's ablation that evaluates the behavior policy (--value sarsa), is trained on
  batches of 100; the paper says 512, as here.

This file, against the authors' code:
- The default sampler is the SDE form of DPM-Solver++(2M), with 21 network evaluations instead of
  1,000. The authors' sampler is --sampler pc --sample-steps 500.
- A few samples lie off the support, even with an exact score. For the four densities of
  tests/test_arq.py we count actions that are 3 deviations or more from every mode. With
  exact scores they are about 0.3% of the samples with 20 steps, and 0.4% with 15. Of true samples,
  about 0.23% are. The sampler also makes a Gaussian 3% too wide. This command measures both:
  python -m pytest -n 0 -s tests/test_arq.py -k off_the_support
- Without --filter, actions outside the support do reach Q: the few that the sampler puts there, and
  those that a clone with errors believes in. The authors filter in all domains. Here the presets of
  the paper's domains filter, and the default does not, because likelihoods take days on a CPU.
- The divergence in the likelihood is exact up to 10 action dimensions; above, ten random probes
  estimate it. The authors always use ten random probes.
- The samples that train Q are clipped to the bounds, after their likelihood is computed.
- Where fewer than K actions are in the support, the smallest of their values is used; in the
  authors' code the value is then minus infinity, and the floor replaces it. Where the implicit
  policy has no sample in the support, the likeliest one acts; in the authors' code this is an
  error.
- Samples that are not finite end the run; the authors draw them again.
- An action dimension that is constant in the data is constant in the samples.
- The network's time features are the sine and cosine of 2 pi t f for random frequencies f; the
  authors wrote 3.1415 for pi.
- A row without a next action trains Q only if it is terminal. Where a time limit ends an episode,
  the authors drop one row more.
- Robomimic's data has no reader here, so its settings and its residual policy are left out.
"""

# For a CPU: few updates, a narrow score network, no filter, 10 samples with a K near the same
# quantile, faster targets, and normalized observations.
SHORT = dict(score_steps=30_000, score_lr=5e-4, width=128, sample_steps=15, n=10, k=3, filter=False)
SHORT |= dict(batch_size=256, q_steps=30_000, polyak=0.02, steps=20_000, eval_every=1_000)
SHORT |= dict(normalize_obs=True)

PRESETS = {
    **dict.fromkeys(  # the first four groups: tables A.1 to A.3 of the paper
        ("hopper-*", "halfcheetah-*", "walker2d-*", "mujoco/*"),
        dict(filter=True, normalize_reward=True),
    ),
    **dict.fromkeys(
        ("kitchen-*", "D4RL/kitchen/*"),
        dict(filter=True, score_steps=300_000, q_lr=1e-4),
    ),
    **dict.fromkeys(
        ("pen-*", "door-*", "hammer-*", "relocate-*")
        + ("D4RL/pen/*", "D4RL/door/*", "D4RL/hammer/*", "D4RL/relocate/*"),
        dict(filter=True, score_steps=300_000, ensemble=3, q_lr=1e-4, alpha=10.0, alpha_pi=10.0),
    ),
    **dict.fromkeys(
        ("antmaze-*", "D4RL/antmaze/*"),
        dict(filter=True, k=3, alpha=10.0, alpha_pi=10.0, pi="deterministic", reward_shift=-1.0)
        | dict(eval_every=100_000, eval_episodes=100),
    ),
    "hopper-medium-expert-demo": SHORT,
    "hopper-replay-demo": SHORT | dict(alpha_pi=3.0),
    "pointmaze-stitch-demo": SHORT  # with AntMaze's policy, sharpness and reward shift, not its K
    | dict(alpha=10.0, alpha_pi=10.0, pi="deterministic", reward_shift=-1.0, eval_episodes=20),
}

if __name__ == "__main__":
    from run import main

    main(Args, PRESETS, train)
