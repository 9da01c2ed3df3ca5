"""BRAC+: Improved Behavior Regularized Actor Critic for Offline Reinforcement Learning (Zhang,
Kuppannagari & Prasanna, ACML 2021; arXiv:2110.00894). The earlier submission is brac_plus.py.

Idea: clone the data with a model that has latent variables. The lower bound on its log-likelihood
(ELBO) gives an upper bound D(s) on KL(pi || clone) in every state. Because all parts of the model
are Gaussian, the KL terms in D(s) have a closed form, so D(s) is less noisy than sampled
log-densities. A multiplier alpha holds the mean of D(s) below a threshold eps. The larger D(s) is,
the more a penalty flattens Q, so that its errors do not pull the policy away from the data.

    -ELBO = E_{z~q}[-log p(a|s,z)] + KL(q(z|a,s) || N(0,I))
    D(s)  = E_{a~pi, z~q}[KL(pi(.|s) || p(.|s,z)) + KL(q(z|a,s) || N(0,I))]         (9)
    y     = r + gamma (1 - terminal) max_a' min_i Q'_i(s',a'),  a' ~ pi'(.|s')      (2)
    L_Q   = E[sum_i (Q_i(s,a) - y)^2 / 2] + lam penalty,
            penalty = E_{a~pi}[gate(s) |grad_a min_i Q_i(s,a)|],
            gate(s) = softplus(D(s) - eps_GP) / its largest value in the batch     (12)
    L_pi  = E_{a~pi}[-min_i Q_i(s,a) + alpha (D(s) - eps) + beta (-log pi(a|s) - H0)] (11)

The clone has a prior N(0, I) of its latent z, a decoder p(.|s,z) and an encoder q(z|a,s). Encoder,
decoder and policy pi are diagonal Gaussians. Those of decoder and policy are over x, and the action
is a = tanh(x). Q'_i and pi' are the targets of critics and policy. alpha and beta maximize L_pi
while pi minimizes it: alpha grows while D is above eps, and beta grows while the entropy, -log pi,
is above H0. lam grows while the penalty is above --gp-target. eps_GP is the mean of D plus its
standard deviation over the states of the last epoch, which has --epoch-steps steps. Rewards are
scaled to [0, 1].

Before RL, Algorithm 1 trains the clones (line 1), then a first policy that minimizes D (line 2).
Then the thresholds are measured: eps is the first policy's D plus a margin, and H0 is the clone's
-ELBO minus A log 4 for A action dimensions. With --divergence mmd, D is that of Eq. 7, the last
bracket of L_pi has the other sign, and beta holds the entropy above H0.

What changes scores (more in DEPARTURES, at the foot of the file):
- As in the code, y takes the largest value over a'; the paper takes the expectation.
- As in the code, the policy acts by the best of 20 of its samples, which are held within one
  deviation and compared by the mean of the critics. The paper does not mention it.
- As in the code, H0 follows the rule above and bounds the entropy from above. The paper fixes the
  entropy at H0, which is a quarter of the clone's entropy.
- As in the code, hidden layers have 256 units; the paper has 512 in the policy and in the clones.
- As in the code, D is the mean over three clones; the paper picks one of them at random.
- The clones are frozen during RL; the code keeps training its clones at a rate of 1e-5.

    python algorithms/brac_plus_acml.py  # 8k steps: 88.4 ± 5.1, hopper-medium-expert-demo, 3 seeds
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
from common import BatchSize, Count, CountOrZero, NonNegative, Number, Positive, PositiveShare
from common import MLP, Adam, RunArgs, ScalarMLP, Scaling, Seed, Share, ShareBelow1
from common import dequantize, sample_tanh_normal, share_at_bounds, tanh_normal_log_prob
from common import graphed, largest_value, minimize, normalize_obs, polyak, sample


@dataclass
class Args(RunArgs):
    phases = {"behavior": "bc_steps", "init": "bc_steps", "critics": "q_steps", "train": "steps"}
    clone_flags = ("dequantize",)
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
    divergence: Literal["kl", "mmd"] = "kl"
    """D: the bound on the KL divergence (Eq. 9), or the maximum mean discrepancy (Eq. 7)"""
    eps: NonNegative | None = None
    """threshold of D (Eq. 11); None: the first policy's D + margin (mmd_margin)"""
    margin: NonNegative = 3.0
    """how far eps lies above the first policy's D where --eps is None, with --divergence kl"""
    mmd_margin: NonNegative = 0.05
    """how far eps lies above the first policy's D where --eps is None, with --divergence mmd"""
    h0: Number | None = None
    """entropy bound H0 (Eq. 11) in nats; None: from the clone's -ELBO"""
    mmd_width: Positive = 20.0
    """width of mmd's kernel (Eq. 7); if far above the distances of actions, it only scales D"""
    gate: Literal["soft", "hard"] = "soft"
    """gate of the penalty (Eq. 12): softplus of D - eps_GP, or a step where D is above eps_GP"""
    lam: NonNegative = 0.1
    """first and smallest weight lam of the gradient penalty (Eq. 12): 0 switches it off"""
    gp_target: NonNegative = 0.01
    """lam grows while the gradient penalty (Eq. 12) is above this number"""
    samples: Count = 5
    """actions per state, and latents per action: more reduce the variance of D, not its bias"""
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
    dual_lr: Positive = 1e-3
    """Adam's learning rate of alpha, beta and lam"""
    dual_start: Positive = 10.0
    """first value of alpha and of beta; short runs need a smaller one"""
    bc_steps: Count = 400_000
    """gradient steps of the clones, and the same number again for the first policy"""
    clone: str | None = None
    """checkpoint.pt of a run on the same data: its clone is read, not trained"""
    q_steps: CountOrZero = 0
    """gradient steps of the critics alone, on the first policy (Appendix B); 0 skips it"""
    epoch_steps: Count = 2_000
    """gradient steps after which eps_GP is measured again (Eq. 12)"""
    hidden: Count = 256
    """hidden units in each layer of every network"""
    normalize_obs: bool = False
    """shift and scale observations to mean 0 and deviation 1 over the data"""
    dequantize: Share = 0.0
    """actions exactly at a bound are spread over a band of this width inside it: 0 is no spread"""


class Nets(nn.Module):
    """Every network and its target, the multipliers, and what is measured on the way."""

    def __init__(self, data, args):
        super().__init__()
        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        hidden = args.hidden
        latent_dim = 2 * act_dim
        members = args.members
        self.scaling = Scaling(data)
        self.behavior = nn.Module()  # the clones; outputs are the mean and deviation of a Gaussian
        self.behavior.encoder = MLP(
            act_dim + obs_dim, hidden, hidden, 2 * latent_dim, members=members
        )
        self.behavior.decoder = MLP(
            latent_dim + obs_dim, hidden, hidden, 2 * act_dim, members=members
        )
        self.behavior.register_buffer("minus_elbo", torch.zeros(()))  # running mean
        self.actor = MLP(obs_dim, hidden, hidden, 2 * act_dim)
        self.q = ScalarMLP(obs_dim + act_dim, hidden, hidden, members=2)
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


def first_rate(t, steps):
    """Adam's learning rate at step t of the clones and of the first policy: it falls four times."""
    rates = (1e-3, 5e-4, 1e-4, 5e-5, 1e-5)
    fifth = 5 * (t - 1) // steps
    return rates[fifth]


def behavior_loss(nets, s, a, args):
    """-ELBO of a, not of x, so with the log-determinant of tanh; one per clone, (M,)."""
    a = dequantize(a, args.dequantize)
    a = a.clamp(-1 + 1e-6, 1 - 1e-6)  # at a bound, atanh is infinite
    q_mean, q_log_std = gaussian(nets.behavior.encoder(torch.atanh(a), s))
    z = q_mean + q_log_std.exp() * torch.randn_like(q_mean)  # (M, B, Z)
    p_mean, p_log_std = decode(nets, z, s)  # (M, B, A)
    log_prob = tanh_normal_log_prob(a, p_mean, p_log_std, clip=1e-6)
    latent_kl = normal_kl(q_mean, q_log_std)
    return (latent_kl - log_prob).mean(1)


def update_behavior(nets, opt, data, args):
    """One step of the clones (line 1 of Algorithm 1)."""
    s, a = sample(data, args.batch_size, ("obs", "action"))
    losses = behavior_loss(nets, s, a, args)  # (M,)
    minimize(opt.behavior, losses.sum())
    minus_elbo = losses.detach().mean()
    nets.behavior.minus_elbo.lerp_(minus_elbo, 0.01)
    return {"minus_elbo": minus_elbo}


def train_behavior(run, nets, opt, data, args):
    """Train the clones, or read those of --clone; then set the entropy bound H0."""
    if args.clone:
        run.read_clone(nets.behavior)
    step = graphed(update_behavior, nets, opt, data, args, compile=args.compile)
    for t in run.loop(0 if args.clone else args.bc_steps, phase="behavior"):
        opt.behavior.lr.fill_(first_rate(t, args.bc_steps))
        run.after(t, step())
    if args.h0 is not None:
        nets.h0.fill_(args.h0)
    elif args.divergence == "mmd":
        nets.h0.copy_(nets.behavior.minus_elbo)
    else:  # the entropy of a clone with a quarter of the deviation in each action dimension
        act_dim = data.action.shape[1]
        nets.h0.copy_(nets.behavior.minus_elbo - act_dim * math.log(4))


def kl_bound(nets, s, x, mean, log_std, args):
    """D of Eq. 9, (n, B), the mean over M clones and L latents, at n samples x (n, B, A) of the
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
    """Mean of the kernel k(u,v) = exp(-sum_i |u_i - v_i| / (2 width)) over all pairs of u (m, B, A)
    and v (n, B, A): (B,)."""
    difference = u.unsqueeze(1) - v  # (m, n, B, A)
    distance = difference.abs().sum(-1)
    kernel = (distance / (-2 * width)).exp()
    return kernel.mean((0, 1))


def mmd(nets, s, x, args):
    """D of Eq. 7, (B,): sqrt(E k(x,x') + E k(b,b') - 2 E k(x,b)) for n samples x (n, B, A) of the
    policy and n samples b of every clone, all before tanh."""
    n, batch, act_dim = x.shape
    z = torch.randn(args.members, n * batch, 2 * act_dim, device=x.device, dtype=x.dtype)
    mean, _ = decode(nets, z.clamp(-0.5, 0.5), s.repeat(n, 1))
    b = mean.detach().view(-1, batch, act_dim)  # (Mn, B, A)
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


def entropy_excess(nets, log_prob, args):
    """The last bracket of Eq. 11, 0-d: by how much the entropy breaks its bound H0, which is the
    highest entropy with kl, and the lowest with mmd."""
    excess = -log_prob.mean() - nets.h0
    return -excess if args.divergence == "mmd" else excess


def beta_loss(nets, beta, log_prob, args):
    """Eq. 11: beta grows while the entropy breaks its bound."""
    return -beta * entropy_excess(nets, log_prob, args)


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


def first_policy(nets, obs):
    """Raw observations (B, S) to the mode of the policy (B, A), which scores it before RL."""
    mean, _ = gaussian(nets.actor(nets.scaling.obs(obs)))
    return nets.scaling.action(mean.tanh())


def train_first_policy(run, nets, opt, data, args):
    """Train the policy with the least D; then set the thresholds eps and eps_GP."""
    margin = args.mmd_margin if args.divergence == "mmd" else args.margin
    step = graphed(update_first_policy, nets, opt, data, args, compile=args.compile)
    for t in run.loop(args.bc_steps, phase="init"):
        opt.init.lr.fill_(first_rate(t, args.bc_steps))
        run.after(t, step())
        if t == args.bc_steps:  # within the loop, so that this step's checkpoint has all of it
            if args.eps is None:
                nets.eps.copy_(nets.first_d + margin)
            else:
                nets.eps.fill_(args.eps)
            nets.eps_gp.copy_(nets.eps)
            nets.actor_target.load_state_dict(nets.actor.state_dict())
            print(f"first policy: D {nets.first_d:.3g}, eps {nets.eps:.3g}, H0 {nets.h0:.3g}")
            run.reference("its first policy", lambda obs: first_policy(nets, obs))


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
    return r + args.gamma * (1 - terminal) * q2.amax(0)


def critic_loss(nets, s, a, y):
    """Squared error of Eq. 2, halved, summed over critics, mean over the batch; and Q, (2, B)."""
    q = nets.q(s, a)
    squares = (q - y).square().sum(0)  # (B,)
    return 0.5 * squares.mean(), q.detach()


def update_critics(nets, opt, data, args):
    """One step of the critics towards the values of the first policy (Appendix B)."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    y = target_value(nets, r, s2, terminal, args)
    q_loss, q = critic_loss(nets, s, a, y)
    minimize(opt.q, q_loss)
    polyak(nets.q_target, nets.q, args.polyak)
    return {"q_loss": q_loss.detach(), "q_mean": q.mean()}


def penalty_gate(nets, d, args):
    """The gate of Eq. 12 (B,), from 0 to 1: how much each state is penalized, by its D (B,)."""
    if args.gate == "hard":
        return (d > nets.eps_gp).to(d.dtype)
    excess = nn.functional.softplus(d - nets.eps_gp)
    return excess / excess.max()


def gradient_norm(nets, s, a):
    """|grad_a min_i Q_i| of Eq. 12 at k actions of each state, a (k, B, A): mean over k, (B,)."""
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


def actor_loss(nets, alpha, beta, q, d, log_prob, args):
    """Eq. 11 (line 6 of Algorithm 1) at n actions of each state; alpha and beta are constants."""
    value = alpha * (d - nets.eps) - q  # (n, B)
    return value.mean() + beta * entropy_excess(nets, log_prob, args)


def alpha_loss(nets, alpha, d):
    """Eq. 11: alpha, 0-d, grows while the mean of D (B,), a constant, is above eps."""
    gain = alpha * (d - nets.eps)
    return -gain.mean()


def lam_loss(lam, penalty, args):
    """lam grows while the penalty of Eq. 12, a constant, is above its target."""
    return -lam * (penalty - args.gp_target)


def measure_eps_gp(nets, args):
    """eps_GP of Eq. 12: mean of D plus its deviation over the epoch that ends here."""
    mean, square = nets.d_sums / args.epoch_steps
    std = (square - mean**2).clamp(min=0).sqrt()
    nets.eps_gp.copy_(mean + std)
    nets.d_sums.zero_()


def update(nets, opt, data, args):
    """One iteration of Algorithm 1, lines 5 to 7: critics, policy, multipliers, targets."""
    s, a, r, s2, terminal = sample(data, args.batch_size)
    a_pi, log_prob, d = divergence(nets, s, args.samples, args)
    alpha = nn.functional.softplus(nets.alpha)
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
        "alpha": alpha,
        "entropy": -log_prob.mean(),
        "beta": beta,
    }
    return {name: value.detach() for name, value in metrics.items()}


def q(nets, s, a):
    """The value (2, B) of every critic at scaled states s (B, S), actions a (B, A) in [-1, 1]."""
    return nets.q(s, a)


def policy(nets, obs, args):
    """Raw observations (B, S) to deterministic actions (B, A) in the task's bounds."""
    s = nets.scaling.obs(obs)
    mean, log_std = gaussian(nets.actor(s), floor=-20)
    noise = nets.noise.unsqueeze(1).clamp(-1, 1)  # (20, 1, A), within one deviation
    a = (mean + log_std.exp() * noise).tanh()  # (20, B, A)
    n, batch = a.shape[:2]
    q = nets.q(s.repeat(n, 1), a.flatten(0, 1))  # (2, 20B)
    best = q.mean(0).view(n, batch).argmax(0)
    states = torch.arange(batch, device=s.device)
    return nets.scaling.action(a[best, states])


def train(run, data, args):
    """Train on `data`; `run` logs, evaluates and saves."""
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
        alpha=Adam([nets.alpha], args.dual_lr),
        beta=Adam([nets.beta], args.dual_lr),
        lam=Adam([nets.lam], args.dual_lr),
    )
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


DEPARTURES = """
The authors' code, against the paper:
- The norm in Eq. 12 is not squared, the squared errors of Q are halved, the gate is divided by its
  largest value, and D of Eq. 7 is a square root.
- The target's actions come from pi', a copy of the policy that follows as slowly as the targets of
  Q do.
- The critics are not trained before the policy moves. In Appendix B they start as critics of the
  first policy; Algorithm 1 has no such line.
- The clones and the first policy are trained for 500,000 steps each. The paper's clones have
  400,000, which is the default for both here.
- An epoch has 2,500 steps; the paper has 2,000, which is the default here.
- The decoder is one Gaussian, not a mixture of several.
- mmd compares x = atanh(a) instead of actions, and clips the latents that its clones draw to
  [-0.5, 0.5].
- On Adroit, which the paper does not have, D is mmd's, the gate is a step, and H0 is -ELBO itself.

This file, against the authors' code:
- --dequantize is ours, and off by default. It spreads actions that are exactly at a bound, where
  log-densities have no limit.
- --q-steps is ours, and off by default, because the code has no such phase. The presets of the
  bundled datasets use it.
- The policy's standard deviation is at least softplus(-20); the code has softplus(-10).
- -ELBO and the first policy's D are running means over batches; the code averages over all data.
- The penalty and the policy's loss share their samples of actions and latents.
- eps_GP starts at eps; the code adds its margin a second time.
- With mmd, H0 is -ELBO itself on all data. The code has this for Adroit alone, whatever D is; here
  --divergence kl on Adroit, which the authors did not run, has -ELBO minus A log 4.
- Multipliers have no upper bound; in the code it is 10,000. lam can fall below its floor --lam, and
  then the floor is the weight of the penalty. The gradient by which lam comes back is that of
  softplus at lam here, and that of softplus at the floor in the code.
- The noise of the 20 samples among which the policy chooses is drawn once per run, so that the
  policy is deterministic.
- Initial weights are those of PyTorch's linear layers, and Adam's epsilon is 1e-8 instead of 1e-7.
- The last row of an episode that a time limit ended is kept where the data has its next
  observation; the authors' loader drops it.
"""

# For a CPU: the clone and the first policy have 6,000 steps each (paper: 400,000), RL has 8,000
# (paper: 1,000,000). There is one clone (default: 3), with 2 samples (default: 5). The rates of the
# policy and of the targets are 20 times the paper's, and those of alpha, beta and lam are 3 times.
# Observations are normalized.
SHORT = dict(
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
ADROIT = dict(
    divergence="mmd",
    mmd_margin=0.001,
    mmd_width=120.0,
    gate="hard",
    gp_target=0.005,
    actor_lr=5e-8,
)
CLONING = dict(hidden=256)  # on the tests' bandit cloning outweighs Q

PRESETS = {
    "hopper-medium-expert-demo": SHORT | dict(margin=0.2),
    "hopper-replay-demo": SHORT | dict(steps=16_000, eval_every=800),
    "pointmaze-stitch-demo": SHORT  # rewards are rare: critics at 1e-3; the paper has 3e-4
    | dict(margin=0.2, lr=1e-3, steps=24_000, eval_every=1_200, eval_episodes=20),
    "halfcheetah-*": dict(gp_target=0.1),
    "mujoco/halfcheetah/*": dict(gp_target=0.1),
    # Margins of the paper and, for mmd, of the code. The rows of mujoco/ are Minari's names.
    "hopper-random-v?": dict(mmd_margin=0.1),
    "hopper-medium-v?": dict(margin=0.2, mmd_margin=0.02),
    "walker2d-medium-v?": dict(margin=1.0),
    "halfcheetah-medium-v?": dict(margin=7.0, mmd_margin=0.1),
    "mujoco/hopper/medium-v?": dict(margin=0.2, mmd_margin=0.02),
    "mujoco/walker2d/medium-v?": dict(margin=1.0),
    "mujoco/halfcheetah/medium-v?": dict(margin=7.0, mmd_margin=0.1),
    "hopper-medium-expert-v?": dict(margin=0.2, mmd_margin=0.02),
    "walker2d-medium-expert-v?": dict(margin=0.2, mmd_margin=0.02),
    "halfcheetah-medium-expert-v?": dict(margin=0.2, mmd_margin=0.02),
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
    from run import main

    main(Args, PRESETS, train)
