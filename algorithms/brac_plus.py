"""BRAC+ (Zhang, Kuppannagari & Prasanna), in two versions. iclr is the submission to ICLR 2021,
"BRAC+: Going Deeper with Behavior Regularized Offline Reinforcement Learning"; equations are
numbered as there. acml is the paper of ACML 2021 (arXiv:2110.00894).

Idea: clone the data with a model that has latent variables. The lower bound on its log-likelihood
(ELBO) gives an upper bound D(s) on KL(pi || clone) in every state. Because all parts of the model
are Gaussian, the KL terms in D(s) have a closed form, so D(s) is less noisy than sampled
log-densities. A multiplier alpha(s) for each state holds D(s) below a threshold eps. Where D(s) is
large, a penalty flattens Q, so that its errors do not pull the policy away from the data.

The clone has a prior N(0, I) of its latent z, a decoder p(.|s,z) and an encoder q(z|a,s). Encoder,
decoder and policy pi are diagonal Gaussians. Those of decoder and policy are over x, and the action
is a = tanh(x).

    -ELBO = E_{z~q}[-log p(a|s,z)] + KL(q(z|a,s) || N(0,I))                        (12)
    D(s)  = E_{a~pi, z~q}[KL(pi(.|s) || p(.|s,z)) + KL(q(z|a,s) || N(0,I))]         (7)
    D(s)  = sqrt(E k(a,a') + E k(b,b') - 2 E k(a,b)),  a, a' ~ pi,  b, b' ~ clone,
            k(u,v) = exp(-sum_i |u_i - v_i| / (2 mmd_width)); with --divergence mmd (5)
    y     = r + gamma (1 - terminal) mean_a' min_i Q'_i(s',a'),  a' ~ pi'(.|s')     (2)
    L_Q   = E[sum_i (Q_i(s,a) - y)^2 / 2] + lam penalty,
            penalty = E_{a~pi}[1(D(s) > eps_GP) |grad_a min_i Q_i(s,a)|]           (10)
    L_pi  = E_{a~pi}[-min_i Q_i(s,a) + alpha(s) (D(s) - eps) + beta (-log pi(a|s) - H0)] (8)

Q'_i and pi' are the targets of critics and policy, and 1(.) is the gate of the penalty. alpha and
beta maximize L_pi while pi minimizes it: alpha grows in the states where D is above eps, and beta
grows while the entropy, -log pi, is above H0. (With mmd the last bracket has the other sign, and
beta holds the entropy above H0.) eps_GP is the mean of D plus its standard deviation over the
states of the last epoch. Rewards are scaled to [0, 1].

Before RL, Algorithm 1 trains the clones (line 1), then a first policy to have the least D (line 2),
and, with --q-steps, the critics of that policy (line 3).

acml differs from iclr as follows. alpha is one number for all states; y has the largest value over
a' instead of the mean; the gate is softplus(D - eps_GP), divided by its largest value in the
batch; lam grows while the penalty is above gp_target. Its thresholds are measured before RL: eps is
the first policy's D plus a margin, and H0 is the clone's -ELBO minus A log 4 for A action
dimensions. iclr has an eps and an H0 of its own for each dataset that it was run on, and takes
acml's rule for all others.

The authors' code, against the paper:
- Eq. 8 is printed without the entropy term. Appendix F and line 9 of Algorithm 1 describe it.
- The norm in Eq. 10 is not squared, the squared errors of Q are halved, and D of Eq. 5 is a
  square root.
- The target's actions come from pi', a copy of the policy that follows as slowly as the targets of
  Q do.
- The critics are not trained before the policy moves: line 3 of Algorithm 1 is missing.
- The clones are trained for 500,000 steps, the paper's for 400,000, which is the default here.
- Hidden layers have 256 units in every network; the paper has 512 in the policy and in the clones.
  The decoder is one Gaussian, not a mixture of several.
- D is the mean over three clones (in iclr's code there is one); the paper picks one at random.
- The policy acts by the best of 20 of its samples. iclr compares them by Q_1; acml holds them
  within one deviation and compares them by the mean of the critics. Neither paper mentions it.
- The largest value over a', which acml's code has, is not in acml's paper.
- acml's paper takes a quarter of the clone's entropy for H0; its code has the rule above.
- With mmd, acml compares x = atanh(a) instead of actions, and clips the latents that its clones
  draw to [-0.5, 0.5].

This file, against the authors' code:
- The submission's tables of eps and H0 could not be found. The values of iclr in TASKS below are
  from code that its authors published a few weeks later.
- Eq. 12 has the log-determinant of tanh in both versions, because H0 is measured by -ELBO. iclr's
  code leaves this constant out, which changes no gradient.
- --dequantize is ours, and off by default. It spreads actions that are exactly at a bound, where
  log-densities have no limit.
- --q-steps is ours, and off by default, because the authors' code has no such phase.
- The policy's standard deviation is at least softplus(-20), as in iclr; acml has softplus(-10).
- An epoch has 2,000 steps, as in iclr; acml has 2,500.
- The clones are frozen during RL; the authors keep training them at a rate of 1e-5.
- First the clones and then the first policy are trained, each for --bc-steps steps and with falling
  learning rates, as in acml. iclr trains the first policy during the second half of the clone's
  steps, at a rate of 3e-4.
- -ELBO and the first policy's D are running means over batches; acml averages over all the data.
- The penalty and the policy's loss share their samples of actions and latents.
- eps_GP starts at eps, as in iclr; acml adds its margin a second time.
- With mmd, H0 is -ELBO itself on all data; acml has this for Adroit alone.
- With mmd, iclr's first policy is trained as that of acml, because in iclr's own code beta's term
  has the wrong sign in this phase.
- Multipliers have no upper bound; in acml it is 10,000. lam can fall below its floor --lam, and
  then the floor is the weight of the penalty. The gradient by which lam comes back is that of
  softplus at lam here, and at the floor in acml.
- The noise of the 20 samples among which the policy chooses is drawn once per run, so that the
  policy is deterministic.
- Initial weights are those of PyTorch's linear layers, and Adam's epsilon is 1e-8 instead of 1e-7.
- The last row of an episode that a time limit ended is kept where the data has its next
  observation; the authors' loader drops it.

    python algorithms/brac_plus.py  # scores 84.4 ± 9.1 on hopper-medium-expert-demo (3 seeds)
"""

import copy
import math
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import BatchSize, Count, CountOrZero, NonNegative, Number, Positive, PositiveShare
from common import MLP, Adam, RunArgs, ScalarMLP, Scaling, Seed, Share, ShareBelow1
from common import dequantize, sample_tanh_normal, share_at_bounds, tanh_normal_log_prob
from common import graphed, largest_value, minimize, normalize_obs, polyak, sample


@dataclass
class Args(RunArgs):
    phases = {"behavior": "bc_steps", "init": "bc_steps", "critics": "q_steps", "train": "steps"}
    env: str = "hopper-medium-expert-demo"
    """dataset: bundled, D4RL or OGBench name, Minari id, or path of an .hdf5 or .npz file"""
    seed: Seed = 0
    """seeds networks, batches and evaluation"""
    steps: Count = 1_000_000
    """gradient steps of RL, after all other phases"""
    batch_size: BatchSize = 100
    """transitions per gradient step"""
    eval_every: Count = 5_000
    """gradient steps between evaluations"""
    version: Literal["iclr", "acml"] = "iclr"
    """version of the method; it also fills the flags below that are None"""
    divergence: Literal["kl", "mmd"] = "kl"
    """D: the bound on the KL divergence (Eq. 7), or the maximum mean discrepancy (Eq. 5)"""
    multiplier: Literal["state", "global"] | None = None
    """alpha of Eq. 8: a network of the state (iclr), or one number for all states (acml)"""
    gate: Literal["hard", "tuned", "soft"] | None = None
    """gate of Eq. 10: a step (hard: iclr; tuned) or softplus (soft: acml); lam grows unless hard"""
    backup: Literal["mean", "max"] | None = None
    """target value over the sampled actions (Eq. 2): their mean (iclr) or the largest (acml)"""
    eval_policy: Literal["argmax", "clipped", "mode"] | None = None
    """best of 20 samples (argmax: iclr), of 20 within one deviation (clipped: acml), or the mode"""
    eps: NonNegative | None = None
    """threshold of D (Eq. 8); None: iclr's where known, else the first policy's D + --margin"""
    margin: NonNegative | None = None
    """how far eps lies above the first policy's D where --eps is None; None: acml's for the data"""
    h0: Number | None = None
    """entropy bound H0 (Eq. 8) in nats; None: iclr's where known, else from the clone's -ELBO"""
    mmd_width: Positive | None = None
    """width of mmd's kernel (Eq. 5); far above the actions' distances it only scales D"""
    lam: NonNegative = 0.1
    """weight lam of the gradient penalty (Eq. 10), or its floor where lam grows: 0 is no penalty"""
    gp_target: NonNegative = 0.01
    """lam grows while the penalty (Eq. 10) is above this number, where --gate is tuned or soft"""
    samples: Count = 5
    """actions per state, and latents per action: many make D less noisy, but not less biased"""
    members: Count = 3
    """number of clones; D is the mean over them"""
    gamma: ShareBelow1 = 0.99
    """discount"""
    polyak: PositiveShare = 0.001
    """share of the critics and of the policy that their targets take over per step"""
    lr: Positive = 3e-4
    """Adam's learning rate of the critics"""
    actor_lr: Positive = 5e-6
    """Adam's learning rate of the policy in RL: small, so that the critics lead"""
    alpha_lr: Positive = 1e-5
    """Adam's learning rate of the network alpha(s): a large one makes D swing around eps"""
    dual_lr: Positive = 1e-3
    """Adam's learning rate of beta, of lam, and of alpha where it is one number"""
    dual_start: Positive = 10.0
    """first value of beta, and of alpha where it is one number; short runs need a smaller one"""
    bc_steps: Count = 400_000
    """gradient steps of the clones, and the same number again for the first policy"""
    q_steps: CountOrZero = 0
    """gradient steps of the critics alone, on the first policy (Algorithm 1, line 3); 0 is none"""
    epoch_steps: Count = 2_000
    """gradient steps after which eps_GP is measured anew (Eq. 10)"""
    normalize_obs: bool = False
    """shift and scale observations to mean 0 and deviation 1 over the data"""
    dequantize: Share = 0.0
    """actions exactly at a bound are spread over a band of this width inside it: 0 is no spread"""

    def resolve(self):
        fill_in(self)


class Nets(nn.Module):
    """Every network and its target, the multipliers, and what is measured on the way."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        latent_dim = 2 * act_dim
        members = args.members
        self.scaling = Scaling(data)
        self.behavior = nn.Module()  # the clones; outputs are the mean and deviation of a Gaussian
        self.behavior.encoder = MLP(act_dim + obs_dim, 256, 256, 2 * latent_dim, members=members)
        self.behavior.decoder = MLP(latent_dim + obs_dim, 256, 256, 2 * act_dim, members=members)
        self.behavior.register_buffer("minus_elbo", torch.zeros(()))  # running mean
        self.actor = MLP(obs_dim, 256, 256, 2 * act_dim)
        self.q = ScalarMLP(obs_dim + act_dim, 256, 256, members=2)
        self.alpha_net = ScalarMLP(obs_dim, 256, 256)  # alpha(s), before softplus
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.alpha = nn.Parameter(before_softplus(args.dual_start))  # one for all states
        self.beta = nn.Parameter(before_softplus(args.dual_start))
        self.lam = nn.Parameter(before_softplus(args.lam))
        self.register_buffer("eps", torch.zeros(()))
        self.register_buffer("eps_gp", torch.zeros(()))
        self.register_buffer("h0", torch.zeros(()))
        self.register_buffer("first_d", torch.zeros(()))  # running mean of the first policy's D
        self.register_buffer("d_sums", torch.zeros(2, dtype=torch.float64))  # of D and D^2
        self.register_buffer("noise", torch.randn(20, act_dim))  # of the policy's 20 samples


def fill_in(args):
    """Args.resolve: flags that are None take their values from TASKS, at the foot of this file."""
    values = {}
    for pattern, row in TASKS.items():
        if fnmatchcase(f"{args.version} {args.divergence} {args.env}", pattern):
            values |= row
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def before_softplus(value):
    """The number (0-d) whose softplus is `value`; PyTorch's softplus is the identity above 20."""
    value = torch.tensor(float(value))
    return value if value > 20 else value.expm1().log()


def gaussian(out, floor=-10):
    """Mean and log-deviation from the halves of an output; the deviation is >= softplus(floor)."""
    mean, raw = out.chunk(2, -1)
    return mean, nn.functional.softplus(raw.clamp(floor, 5)).log()


def policy_gaussian(actor, s, n):
    """Mean and log-deviation of the policy before tanh, n times: (n, B, A) each."""
    return gaussian(actor(s).repeat(n, 1, 1), floor=-20)


def normal_kl(mean, log_std, mean2=0.0, log_std2=0.0):
    """KL(N(mean, std^2) || N(mean2, std2^2)), summed over the last axis; by default N(0, I)."""
    variance = (2 * log_std).exp()
    square = variance + (mean - mean2) ** 2
    scaled = square * math.e ** (-2 * log_std2)  # log_std2 may be a number
    kl = log_std2 - log_std + 0.5 * (scaled - 1)
    return kl.sum(-1)


def decode(nets, z, s):
    """The decoders p(.|s,z), z (M, N, Z) and s (N, S): mean and log-deviation, (M, N, A) each."""
    s = s.expand(len(z), *s.shape)
    return gaussian(nets.behavior.decoder(z, s))


def behavior_loss(nets, s, a, args):
    """Eq. 12: -ELBO of a, not of x, so with the log-determinant of tanh; one per clone, (M,)."""
    a = dequantize(a, args.dequantize)
    a = a.clamp(-1 + 1e-6, 1 - 1e-6)  # at a bound, atanh is infinite
    q_mean, q_log_std = gaussian(nets.behavior.encoder(torch.atanh(a), s))
    z = q_mean + q_log_std.exp() * torch.randn_like(q_mean)  # (M, B, Z)
    p_mean, p_log_std = decode(nets, z, s)  # (M, B, A)
    log_prob = tanh_normal_log_prob(a, p_mean, p_log_std, clip=1e-6)
    latent_kl = normal_kl(q_mean, q_log_std)
    return (latent_kl - log_prob).mean(1)


def kl_bound(nets, s, x, mean, log_std, args):
    """D of Eq. 7, (n, B), the mean over M clones and L latents, at n samples x (n, B, A) of the
    policy's Gaussians. KL is the same before and after tanh."""
    n, latents = len(x), args.samples
    s = s.repeat(n, 1)  # (nB, S)
    q_mean, q_log_std = gaussian(nets.behavior.encoder(x.flatten(0, 1), s))  # (M, nB, Z)
    latent_kl = normal_kl(q_mean, q_log_std).mean(0)  # (nB,)

    s = s.repeat(latents, 1)  # (LnB, S)
    q_mean = q_mean.repeat(1, latents, 1)  # (M, LnB, Z)
    q_log_std = q_log_std.repeat(1, latents, 1)
    z = q_mean + q_log_std.exp() * torch.randn_like(q_mean)
    p_mean, p_log_std = decode(nets, z, s)  # (M, LnB, A)
    p_mean = p_mean.view(-1, *x.shape)  # (ML, n, B, A)
    p_log_std = p_log_std.view(-1, *x.shape)
    action_kl = normal_kl(mean, log_std, p_mean, p_log_std).mean(0)  # (n, B)
    return action_kl + latent_kl.view(n, -1)


def kernel_mean(u, v, width):
    """Mean of Eq. 5's kernel over all pairs of u (m, B, A) and v (n, B, A): (B,)."""
    difference = u.unsqueeze(1) - v  # (m, n, B, A)
    distance = difference.abs().sum(-1)
    kernel = (distance / (-2 * width)).exp()
    return kernel.mean((0, 1))


def mmd(nets, s, x, args):
    """D of Eq. 5, (B,), between n samples x (n, B, A) of the policy and n of every clone."""
    n, batch, act_dim = x.shape
    z = torch.randn(args.members, n * batch, 2 * act_dim, device=x.device, dtype=x.dtype)
    if args.version == "acml":
        z = z.clamp(-0.5, 0.5)
    mean, _ = decode(nets, z, s.repeat(n, 1))
    b = mean.detach().view(-1, batch, act_dim)  # (Mn, B, A)
    if args.version == "iclr":
        x, b = x.tanh(), b.tanh()
    among_policy = kernel_mean(x, x, args.mmd_width)
    among_clones = kernel_mean(b, b, args.mmd_width)
    between = kernel_mean(x, b, args.mmd_width)
    square = among_policy + among_clones - 2 * between
    return (square + 1e-6).sqrt()  # at 0 the root's slope is infinite


def divergence(nets, s, n, args):
    """n samples of the policy in each state: actions (n, B, A), log-densities (n, B), and D. With
    kl, D is (n, B); with mmd it is (1, B), because a state's n samples together have one D."""
    mean, log_std = policy_gaussian(nets.actor, s, n)
    a, log_prob, x = sample_tanh_normal(mean, log_std)
    if args.divergence == "mmd":
        d = mmd(nets, s, x, args).unsqueeze(0)
    else:
        d = kl_bound(nets, s, x, mean, log_std, args)
    return a, log_prob, d


def smaller_q(critics, s, a):
    """min_i Q_i at n actions of each state, a (n, B, A): (n, B)."""
    n = len(a)
    q = critics(s.repeat(n, 1), a.flatten(0, 1))  # (2, nB)
    return q.amin(0).view(n, -1)


@torch.no_grad()
def target_value(nets, r, s2, terminal, args):
    """y of Eq. 2, (B,)."""
    mean, log_std = policy_gaussian(nets.actor_target, s2, args.samples)
    a2, _, _ = sample_tanh_normal(mean, log_std)
    q2 = smaller_q(nets.q_target, s2, a2)  # (n, B)
    if args.backup == "max":
        v2 = q2.amax(0)
    else:
        v2 = q2.mean(0)
    return r + args.gamma * (1 - terminal) * v2


def critic_loss(nets, s, a, y):
    """Squared error of Eq. 2, halved, summed over critics, mean over the batch; and Q, (2, B)."""
    q = nets.q(s, a)
    squares = (q - y).square().sum(0)  # (B,)
    return 0.5 * squares.mean(), q.detach()


def penalty_gate(nets, d, args):
    """The gate of Eq. 10 (B,), from 0 to 1: how much each state is penalized, from its D (B,)."""
    if args.gate == "soft":
        excess = nn.functional.softplus(d - nets.eps_gp)
        return excess / excess.max()
    return (d > nets.eps_gp).to(d.dtype)


def gradient_norm(nets, s, a):
    """|grad_a min_i Q_i| of Eq. 10 at k actions of each state, a (k, B, A): mean over k, (B,)."""
    k, batch = a.shape[:2]
    s = s.expand(k, *s.shape).flatten(0, 1)  # (kB, S)
    a = a.flatten(0, 1)
    smaller = nets.q(s, a).detach().argmin(0)  # (kB,)
    gradients = nets.q.input_gradient(s, a)[..., s.shape[1] :]  # (2, kB, A)
    first = (smaller == 0).unsqueeze(1)
    gradient = torch.where(first, gradients[0], gradients[1])
    square = gradient.square().sum(-1)
    norm = (square + 1e-12).sqrt()  # at 0 the root's slope is infinite
    return norm.view(k, batch).mean(0)


def entropy_excess(nets, log_prob, args):
    """The last bracket of Eq. 8, 0-d: by how much the entropy breaks its bound H0, which is the
    highest entropy with kl (Appendix F), and the lowest with mmd."""
    excess = -log_prob.mean() - nets.h0
    return -excess if args.divergence == "mmd" else excess


def actor_loss(nets, alpha, beta, q, d, log_prob, args):
    """Eq. 8 (line 7 of Algorithm 1) at n actions of each state; alpha and beta are constants."""
    value = alpha * (d - nets.eps) - q  # (n, B)
    return value.mean() + beta * entropy_excess(nets, log_prob, args)


def alpha_loss(nets, alpha, d):
    """Eq. 8 (line 8): alpha, (B,) or (), grows where D (B,), a constant, is above eps."""
    gain = alpha * (d - nets.eps)
    return -gain.mean()


def beta_loss(nets, beta, log_prob, args):
    """Eq. 8 (line 9): beta grows while the entropy breaks its bound."""
    return -beta * entropy_excess(nets, log_prob, args)


def lam_loss(lam, penalty, args):
    """acml: lam grows while the penalty of Eq. 10, a constant, is above its target."""
    return -lam * (penalty - args.gp_target)


def measure_eps_gp(nets, args):
    """eps_GP of Eq. 10: mean of D plus its deviation over the epoch that ends here."""
    mean, square = nets.d_sums / args.epoch_steps
    std = (square - mean**2).clamp(min=0).sqrt()
    nets.eps_gp.copy_(mean + std)
    nets.d_sums.zero_()


def first_rate(t, steps):
    """Adam's learning rate at step t of the clones and of the first policy: it falls four times."""
    rates = (1e-3, 5e-4, 1e-4, 5e-5, 1e-5)
    fifth = 5 * (t - 1) // steps
    return rates[fifth]


def update_behavior(nets, opt, data, args):
    """One step of the clones (line 1 of Algorithm 1)."""
    s, a = sample(data, args.batch_size, ("obs", "action"))
    losses = behavior_loss(nets, s, a, args)  # (M,)
    minimize(opt.behavior, losses.sum())
    minus_elbo = losses.detach().mean()
    nets.behavior.minus_elbo.lerp_(minus_elbo, 0.01)
    return {"minus_elbo": minus_elbo}


def update_first_policy(nets, opt, data, args):
    """One step of the first policy towards the least D (line 2 of Algorithm 1), and one of beta."""
    (s,) = sample(data, args.batch_size, ("obs",))
    n = args.samples if args.divergence == "mmd" else 1
    _, log_prob, d = divergence(nets, s, n, args)
    beta = nn.functional.softplus(nets.beta)
    pi_loss = d.mean() + beta.detach() * entropy_excess(nets, log_prob, args)
    minimize(opt.init, pi_loss)
    d_mean, log_prob = d.detach().mean(), log_prob.detach()
    minimize(opt.init_beta, beta_loss(nets, beta, log_prob, args))
    nets.first_d.lerp_(d_mean, 0.01)
    return {
        "d_mean": d_mean,
        "entropy": -log_prob.mean(),
        "beta": beta.detach(),
        "pi_loss": pi_loss.detach(),
    }


def update_critics(nets, opt, data, args):
    """One step of the critics towards the values of the first policy (line 3 of Algorithm 1)."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    y = target_value(nets, r, s2, terminal, args)
    q_loss, q = critic_loss(nets, s, a, y)
    minimize(opt.q, q_loss)
    polyak(nets.q_target, nets.q, args.polyak)
    return {"q_loss": q_loss.detach(), "q_mean": q.mean()}


def update(nets, opt, data, args):
    """One iteration of Algorithm 1, lines 6 to 10: critics, policy, multipliers, targets."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    a_pi, log_prob, d = divergence(nets, s, args.samples, args)
    alpha = nets.alpha_net(s) if args.multiplier == "state" else nets.alpha  # (B,) or ()
    alpha = nn.functional.softplus(alpha)
    beta = nn.functional.softplus(nets.beta)
    lam = nn.functional.softplus(nets.lam)

    y = target_value(nets, r, s2, terminal, args)
    td_loss, q = critic_loss(nets, s, a, y)
    a_gp = a_pi if args.divergence == "mmd" else a_pi[:1]  # the actions to which d[0] belongs
    norm = gradient_norm(nets, s, a_gp.detach())
    gate = penalty_gate(nets, d[0].detach(), args)
    penalty = (gate * norm).mean()
    weight = lam.detach().clamp(min=args.lam)
    q_loss = td_loss + weight * penalty
    minimize(opt.q, q_loss)

    q_pi = smaller_q(nets.q, s, a_pi)  # (n, B), after the critics' step
    pi_loss = actor_loss(nets, alpha.detach(), beta.detach(), q_pi, d, log_prob, args)
    minimize(opt.actor, pi_loss)

    d = d.detach().mean(0)  # (B,), before the policy's step
    log_prob = log_prob.detach()
    minimize(opt.alpha, alpha_loss(nets, alpha, d))
    minimize(opt.beta, beta_loss(nets, beta, log_prob, args))
    if args.gate != "hard":
        minimize(opt.lam, lam_loss(lam, penalty.detach(), args))
    polyak(nets.q_target, nets.q, args.polyak)
    polyak(nets.actor_target, nets.actor, args.polyak)
    d_mean = d.mean()
    nets.d_sums += torch.stack([d_mean, d.square().mean()])
    metrics = {
        "q_loss": q_loss,
        "td_loss": td_loss,
        "penalty": penalty,
        "lam": weight,
        "gated": gate.mean(),
        "eps_gp": nets.eps_gp.clone(),
        "q_gradient": norm.mean(),
        "q_mean": q.mean(),
        "q_max": q.max(),
        "q_pi": q_pi.mean(),
        "pi_loss": pi_loss,
        "d_mean": d_mean,
        "d_std": d.std(),
        "d_max": d.max(),
        "violations": (d > nets.eps).float().mean(),
        "alpha": alpha.mean(),
        "alpha_min": alpha.min(),
        "alpha_max": alpha.max(),
        "entropy": -log_prob.mean(),
        "beta": beta,
    }
    return {name: value.detach() for name, value in metrics.items()}


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    s = nets.scaling.obs(obs)
    mean, log_std = gaussian(nets.actor(s), floor=-20)
    if args.eval_policy == "mode":
        return nets.scaling.action(mean.tanh())
    noise = nets.noise.unsqueeze(1)  # (20, 1, A)
    if args.eval_policy == "clipped":
        noise = noise.clamp(-1, 1)
    a = (mean + log_std.exp() * noise).tanh()  # (20, B, A)
    n, batch = a.shape[:2]
    q = nets.q(s.repeat(n, 1), a.flatten(0, 1))  # (2, 20B)
    value = q.mean(0) if args.eval_policy == "clipped" else q[0]
    best = value.view(n, batch).argmax(0)
    states = torch.arange(batch, device=s.device)
    return nets.scaling.action(a[best, states])


def train_behavior(run, nets, opt, data, args):
    """Train the clones, or read those of an earlier run; then set the entropy bound H0."""
    settings = args.bc_steps, args.batch_size, args.dequantize, args.normalize_obs
    if not run.cached("clones", nets.behavior, *settings):
        step = graphed(update_behavior, nets, opt, data, args, compile=args.compile)
        for t in run.loop(args.bc_steps, phase="behavior"):
            opt.behavior.lr.fill_(first_rate(t, args.bc_steps))
            run.after(t, step())
            if t == args.bc_steps:
                run.share("clones", nets.behavior)
    if args.h0 is not None:
        nets.h0.fill_(args.h0)
    elif args.divergence == "mmd":
        nets.h0.copy_(nets.behavior.minus_elbo)
    else:  # the entropy of a clone with a quarter of the deviation in each action dimension
        act_dim = data.action.shape[1]
        nets.h0.copy_(nets.behavior.minus_elbo - act_dim * math.log(4))


def train_first_policy(run, nets, opt, data, args):
    """Train the policy with the least D; then set the thresholds eps and eps_GP."""
    step = graphed(update_first_policy, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.bc_steps, phase="init"):
        opt.init.lr.fill_(first_rate(t, args.bc_steps))
        run.after(t, step())
        if t == args.bc_steps:  # within the loop, so that this step's checkpoint has all of it
            if args.eps is None:
                nets.eps.copy_(nets.first_d + args.margin)
            else:
                nets.eps.fill_(args.eps)
            nets.eps_gp.copy_(nets.eps)
            nets.actor_target.load_state_dict(nets.actor.state_dict())
            print(f"first policy: D {nets.first_d:.3g}, eps {nets.eps:.3g}, H0 {nets.h0:.3g}")
            mode = replace(args, eval_policy="mode")
            run.reference("its first policy", lambda obs: policy(nets, obs, mode))


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
    args.resolve()
    data.reward -= data.reward.min()
    data.reward /= data.reward.max().clamp(min=1e-12)  # in [0, 1]
    if args.normalize_obs:
        normalize_obs(data, eps=1e-3)
    nets = Nets(data, args).to(run.device)
    opt = SimpleNamespace(
        behavior=Adam(nets.behavior.parameters(), 1e-3),
        init=Adam(nets.actor.parameters(), 1e-3),  # first policy
        init_beta=Adam([nets.beta], args.dual_lr),
        q=Adam(nets.q.parameters(), args.lr),
        actor=Adam(nets.actor.parameters(), args.actor_lr),
        lam=Adam([nets.lam], args.dual_lr),
    )
    if args.multiplier == "state":
        opt.alpha = Adam(nets.alpha_net.parameters(), args.alpha_lr)
    else:
        opt.alpha = Adam([nets.alpha], args.dual_lr)
    if args.version == "iclr":
        opt.beta = opt.init_beta  # RL keeps Adam's moments of the first policy's phase
    else:
        opt.beta = Adam([nets.beta], args.dual_lr)
    largest = largest_value(data, args.gamma)
    run.start(nets, opt, q_mean=largest, q_pi=largest)
    share_at_bounds(data, args.dequantize)
    train_behavior(run, nets, opt, data, args)
    train_first_policy(run, nets, opt, data, args)
    step = graphed(update_critics, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.q_steps, phase="critics"):
        run.after(t, step())
    step = graphed(update, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.steps):
        metrics = step()
        if t % args.epoch_steps == 0:
            measure_eps_gp(nets, args)
        run.after(t, metrics, lambda obs: policy(nets, obs, args))


HANDS = (  # Adroit, by D4RL's names and by Minari's
    *("pen-*-v?", "hammer-*-v?", "door-*-v?", "relocate-*-v?"),
    *("D4RL/pen/*", "D4RL/hammer/*", "D4RL/door/*", "D4RL/relocate/*"),
)
# Pattern of "version divergence env": values of the flags that are None. Later rows win.
TASKS = {
    "iclr *": dict(multiplier="state", gate="hard", backup="mean", eval_policy="argmax"),
    "acml *": dict(multiplier="global", gate="soft", backup="max", eval_policy="clipped"),
    # eps and H0 of iclr. They suit the clone of the data they were chosen on, and no other.
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
    "iclr mmd pen-human-v?": dict(eps=0.06, h0=-200.0),
    "iclr mmd hammer-human-v?": dict(eps=0.1, h0=-60.0),
    "iclr mmd door-human-v?": dict(eps=0.1, h0=-60.0),
    "iclr mmd relocate-human-v?": dict(eps=0.1, h0=-60.0),
    # Margins of acml with KL, which iclr takes where it has no eps. "medium" is Minari's, too.
    "* kl *": dict(margin=3.0),
    "* kl hopper-medium-v?": dict(margin=0.2),
    "* kl walker2d-medium-v?": dict(margin=1.0),
    "* kl halfcheetah-medium-v?": dict(margin=7.0),
    "* kl mujoco/hopper/medium-v?": dict(margin=0.2),
    "* kl mujoco/walker2d/medium-v?": dict(margin=1.0),
    "* kl mujoco/halfcheetah/medium-v?": dict(margin=7.0),
    "* kl hopper-medium-expert-v?": dict(margin=0.2),
    "* kl walker2d-medium-expert-v?": dict(margin=0.2),
    "* kl halfcheetah-medium-expert-v?": dict(margin=0.2),
    # Margins of acml with mmd, and the kernel's width in either version.
    "* mmd *": dict(margin=0.05),
    "* mmd hopper-random-v?": dict(margin=0.1),
    "* mmd hopper-medium-v?": dict(margin=0.02),
    "* mmd halfcheetah-medium-v?": dict(margin=0.1),
    "* mmd mujoco/hopper/medium-v?": dict(margin=0.02),
    "* mmd mujoco/halfcheetah/medium-v?": dict(margin=0.1),
    "* mmd hopper-medium-expert-v?": dict(margin=0.02),
    "* mmd walker2d-medium-expert-v?": dict(margin=0.02),
    "* mmd halfcheetah-medium-expert-v?": dict(margin=0.02),
    "iclr mmd *": dict(mmd_width=10.0),
    "acml mmd *": dict(mmd_width=20.0),
    **{f"iclr mmd {hand}": dict(margin=0.001, mmd_width=60.0) for hand in HANDS},
    **{f"acml mmd {hand}": dict(margin=0.001, mmd_width=120.0, gate="tuned") for hand in HANDS},
}

ADROIT = dict(divergence="mmd", actor_lr=5e-8, alpha_lr=1e-7, gp_target=0.005)
# For a CPU: clone and first policy have 6,000 steps each (paper: 400,000), RL has 8,000 (paper:
# 1,000,000). There is one clone (default: 3), with 2 samples (default: 5). The policy learns at 20
# times the paper's rate, the targets follow at 20 times, and beta learns at 3 times. Observations
# are normalized.
SHORT = dict(
    version="acml",
    bc_steps=6_000,
    q_steps=1_000,
    steps=8_000,
    eval_every=400,
    members=1,
    samples=2,
    polyak=0.02,
    actor_lr=1e-4,
    dual_lr=3e-3,
    dual_start=0.5,
    dequantize=0.05,
    normalize_obs=True,
)
PRESETS = {
    "hopper-medium-expert-demo": SHORT | dict(margin=0.2),
    "hopper-replay-demo": SHORT | dict(margin=3.0, steps=16_000, eval_every=800),
    "pointmaze-medium-demo": SHORT  # rewards are rare: critics at 1e-3; the paper has 3e-4
    | dict(margin=0.2, lr=1e-3, steps=24_000, eval_every=1_200, eval_episodes=20),
    "halfcheetah-*": dict(gp_target=0.1),
    "mujoco/halfcheetah/*": dict(gp_target=0.1),
    "pen-*": ADROIT | dict(steps=250_000),
    "hammer-*": ADROIT | dict(steps=500_000),
    "door-*": ADROIT | dict(steps=1_000_000),
    "relocate-*": ADROIT | dict(steps=500_000),
    "D4RL/pen/*": ADROIT | dict(steps=250_000),
    "D4RL/hammer/*": ADROIT | dict(steps=500_000),
    "D4RL/door/*": ADROIT | dict(steps=1_000_000),
    "D4RL/relocate/*": ADROIT | dict(steps=500_000),
    "antmaze-*": dict(eval_every=100_000, eval_episodes=100),
    "D4RL/antmaze/*": dict(eval_every=100_000, eval_episodes=100),
}

if __name__ == "__main__":
    from harness import main

    main(Args, PRESETS, train)
