"""brac_plus.py: the clones and the bound on the KL, MMD, the gated penalty, the multipliers, one
whole step of every phase, training, and what a task or a version sets."""

import copy
import math
from types import SimpleNamespace

import brac_plus
import numpy as np
import pytest
import torch
import torch.distributions as D
from brac_plus import PRESETS, Args, Nets, behavior_loss, divergence, gaussian
from golden.tools import Inject
from oracles import SGD, assert_same, in_double, rows, stack
from stand_in import PlainRun
from torch import nn
from torch.nn.functional import softplus
from torch.testing import assert_close

from common import Adam, ScalarMLP
from harness import parse

VERSIONS, KINDS = ("iclr", "acml"), ("kl", "mmd")
version = pytest.mark.parametrize("version", VERSIONS)
kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def data(tiny_data):
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def make(data, seed=0, spread=2.0, **values):
    """Networks in float64 with outputs of size one, and targets that differ."""
    args = Args(env="log.npz", batch_size=16, **(dict(samples=3, members=2) | values))
    args.resolve()
    torch.manual_seed(seed)
    nets, other = Nets(data, args), Nets(data, args)
    nets.q_target, nets.actor_target = other.q_target, other.actor_target
    for net in (*nets.behavior.children(), nets.actor, nets.actor_target, nets.q, nets.q_target):
        for w in net.weights:
            w.data.mul_(spread)
    return nets.double(), args


def optimizers(nets, args, optimizer, lr):
    one_alpha = args.multiplier == "global"
    return SimpleNamespace(
        behavior=optimizer(nets.behavior.parameters(), lr),
        init=optimizer(nets.actor.parameters(), lr),
        init_beta=optimizer([nets.beta], lr),
        q=optimizer(nets.q.parameters(), lr),
        actor=optimizer(nets.actor.parameters(), lr),
        alpha=optimizer([nets.alpha] if one_alpha else nets.alpha_net.parameters(), lr),
        beta=optimizer([nets.beta], lr),
        lam=optimizer([nets.lam], lr),
    )


def normals(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def drawing(x, z, kl=True, target=None, batch=None):
    """Every draw of a function: actions x (n, B, A), latents z (M, N, Z), actions of the target."""
    first = [x, z] if kl else [x]
    queues = {"randn_like": first + ([] if target is None else [target])}
    queues |= {} if kl else {"randn": [z]}
    queues |= {} if batch is None else {"randint": [torch.arange(batch)]}
    return Inject(**queues)


def normal(out, low=-10):
    """The distribution that an output stands for."""
    mean, raw = out.chunk(2, -1)
    return D.Normal(mean, softplus(raw.clamp(low, 5)))


def constant(mean, std):
    """A network with one output for all rows: N(mean, std^2)."""
    out = torch.tensor([mean, math.log(math.expm1(std))]).double()
    return lambda *x: out.expand(*x[0].shape[:-1], 2)


def moved(before, after):
    """Names of the parts of Nets that differ."""
    old, new = before.state_dict(), after.state_dict()
    return {name.split(".")[0] for name in new if (new[name] != old[name]).any()}


# ---- Gaussians -------------------------------------------------------------------------------


def test_kl_is_that_of_torch():
    mean, log_std, mean2, log_std2 = normals(4, 5, 3)
    p, q = D.Normal(mean, log_std.exp()), D.Normal(mean2, log_std2.exp())
    kl = brac_plus.normal_kl(mean, log_std, mean2, log_std2)
    assert_close(kl, D.kl_divergence(p, q).sum(-1))
    assert_close(brac_plus.normal_kl(mean, log_std, mean, log_std), torch.zeros(5).double())
    prior = D.Normal(torch.zeros(5, 3).double(), 1.0)
    assert_close(brac_plus.normal_kl(mean, log_std), D.kl_divergence(p, prior).sum(-1))


@pytest.mark.parametrize(
    ("raw", "floor", "std"),
    [(0, -10, 0.69315), (99, -10, 5.0067), (-99, -10, 4.5399e-5), (-99, -20, 2.0612e-9)],
)
def test_deviations_are_softplus_within_bounds(raw, floor, std):
    mean, log_std = gaussian(torch.tensor([[7.0, raw]]).double(), floor)
    assert mean == 7 and abs(log_std.exp().item() / std - 1) < 1e-4


@pytest.mark.parametrize("value", [1e-3, 0.1, 1.0, 10.0, 25.0, 1000.0])
def test_first_values_are_what_softplus_gives_back(value):
    assert_close(softplus(brac_plus.before_softplus(value)), torch.tensor(value))


# ---- the clones and the bound ----------------------------------------------------------------

W, S = 1.0, 0.5  # p(x|z) = N(W z, S^2): the marginal is N(0, W^2 + S^2), the posterior below
K, V = W / (W**2 + S**2), S**2 / (W**2 + S**2)


def linear_gaussian(mean, std):
    """A clone whose marginal is known, and a policy N(mean, std^2)."""

    def raw(std, like):
        return torch.full_like(like, math.log(math.expm1(std)))

    encoder = lambda x, s: torch.cat([K * x, raw(V**0.5, x)], -1).unsqueeze(0)
    decoder = lambda z, s: torch.cat([W * z, raw(S, z)], -1)
    behavior = SimpleNamespace(encoder=encoder, decoder=decoder)
    return SimpleNamespace(behavior=behavior, actor=constant(mean, std))


def test_bound_of_a_linear_gaussian_clone():
    """pi = N(0.5, 0.3^2): decoder term 0.72603, latent term 0.51352; the KL itself is 0.95154."""
    torch.manual_seed(0)
    nets, args, s = linear_gaussian(0.5, 0.3), Args(samples=4), torch.zeros(2, 1).double()
    _, _, d = divergence(nets, s, 40_000, args)
    assert d.shape == (40_000, 2)
    assert_close(d.mean(0), torch.full((2,), 1.23954).double(), atol=0.01, rtol=0)
    pi, marginal = D.Normal(0.5, 0.3), D.Normal(0.0, (W**2 + S**2) ** 0.5)
    assert abs(D.kl_divergence(pi, marginal) - 0.95154) < 1e-4


def marginal_log_prob(nets, s, x):
    """log of the integral of N(z; 0, I) p(x|s,z) over z in the plane, by Gauss-Hermite; x (N,)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = torch.tensor([[u, v] for u in nodes for v in nodes])
    log_weight = torch.tensor([a * b for a in weights for b in weights]).log()
    p = normal(stack(nets.behavior.decoder, 0)(torch.cat([z, s.expand(len(z), -1)], -1)))
    log_prob = log_weight[:, None] - math.log(2 * math.pi) + p.log_prob(x)
    return log_prob.logsumexp(0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bound_and_elbo_of_random_networks_by_quadrature(tiny_data, seed):
    """D is above the KL of the policy from the clone's marginal, and -ELBO above its -log p(a)."""
    data = in_double(tiny_data(obs_dim=1, act_dim=1, n=4, seed=seed))
    nets, args = make(data, seed, spread=1.5, members=1, samples=5)
    with torch.no_grad():
        _, _, d = divergence(nets, data.obs, 2000, args)
        losses = [behavior_loss(nets, data.obs[:1], data.action[:1], args) for _ in range(400)]
        pi = normal(nets.actor(data.obs), -20)
    for i in range(4):
        one = D.Normal(pi.mean[i], pi.stddev[i])
        x = one.mean + one.stddev * torch.linspace(-8, 8, 2001).double()
        gap = one.log_prob(x) - marginal_log_prob(nets, data.obs[i : i + 1], x)
        kl = torch.trapezoid(one.log_prob(x).exp() * gap, x)
        assert -1e-9 < kl and d[:, i].mean() + 4 * d[:, i].std() / 2000**0.5 > kl
    a = data.action[0]
    log_prob = marginal_log_prob(nets, data.obs[:1], a.atanh()) - (1 - a**2).log()
    losses = torch.cat(losses)
    assert losses.mean() + 4 * losses.std() / 20 > -log_prob.item()


def test_bound_is_a_mean_over_clones_and_latents(data):
    """Over 2 clones, 3 actions of each state and 3 latents of each action, one by one."""
    nets, args = make(data)
    s, x_noise, z_noise = data.obs[:5], normals(3, 5, 2), normals(2, 3, 3, 5, 4, seed=1)
    with drawing(x_noise, z_noise.view(2, 45, 4)):  # clone, latent, action, state
        a, log_prob, d = divergence(nets, s, 3, args)
    pi = normal(stack(nets.actor)(s), -20)
    x = pi.mean + pi.stddev * x_noise
    squashed = D.TransformedDistribution(pi, D.TanhTransform())
    assert_close(a, x.tanh())
    assert_close(log_prob, squashed.log_prob(a).sum(-1))
    expected = torch.zeros(3, 5).double()
    for m in range(2):
        for j in range(3):
            q = normal(stack(nets.behavior.encoder, m)(torch.cat([x[j], s], -1)))
            prior = D.kl_divergence(q, D.Normal(torch.zeros_like(q.mean), 1.0)).sum(-1)
            for k in range(3):
                z = q.mean + q.stddev * z_noise[m, k, j]
                p = normal(stack(nets.behavior.decoder, m)(torch.cat([z, s], -1)))
                expected[j] += (D.kl_divergence(pi, p).sum(-1) + prior) / 6
    assert_close(d, expected)


def test_bound_is_zero_where_the_clone_is_the_policy():
    behavior = SimpleNamespace(
        encoder=lambda x, s: constant(0.0, 1.0)(x).unsqueeze(0), decoder=constant(0.4, 0.3)
    )
    nets = SimpleNamespace(behavior=behavior, actor=constant(0.4, 0.3))
    d = divergence(nets, torch.zeros(3, 1).double(), 2, Args())[2]
    assert_close(d, torch.zeros(2, 3).double(), atol=1e-12, rtol=0)


def test_gradient_of_the_bound_reaches_the_policy_by_every_path(data):
    """A difference quotient along each of the actor's last biases, with the noise held fixed."""
    nets, args = make(data)
    bias, h, found = nets.actor.biases[-1], 1e-6, []

    def mean_d():
        with drawing(normals(3, 16, 2), normals(2, 144, 4, seed=1)):
            return divergence(nets, data.obs, 3, args)[2].mean()

    (grad,) = torch.autograd.grad(mean_d(), bias)
    for i in range(4):
        for step in (h, -h):
            with torch.no_grad():
                bias[i] += step
                found.append(mean_d().item())
                bias[i] -= step
    ahead, behind = torch.tensor(found, dtype=torch.float64).view(4, 2).T
    assert_close(grad, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)


def test_one_step_of_the_clones(data):
    """Each clone descends its own mean -ELBO of actions; -ELBO is measured, nothing else moves."""
    nets, args = make(data)
    data.action[0] = 1.0  # at a bound: clipped
    before, noise = copy.deepcopy(nets), normals(2, 16, 4)
    encoders, decoders = ([stack(n, m) for m in range(2)] for n in nets.behavior.children())
    with Inject(randint=[torch.arange(16)], randn_like=[noise]):
        metrics = brac_plus.update_behavior(nets, optimizers(nets, args, SGD, 0.01), data, args)
    a, s, losses = data.action.clamp(-1 + 1e-6, 1 - 1e-6), data.obs, []
    for encoder, decoder, draws in zip(encoders, decoders, noise):
        q = normal(encoder(torch.cat([a.atanh(), s], -1)))
        p = normal(decoder(torch.cat([q.mean + q.stddev * draws, s], -1)))
        kl = D.kl_divergence(q, D.Normal(torch.zeros_like(q.mean), 1.0)).sum(-1)
        nll = -D.TransformedDistribution(p, D.TanhTransform()).log_prob(a).sum(-1)
        losses.append((nll + kl).mean())
        losses[-1].backward()
        for net in (encoder, decoder):
            torch.optim.SGD(net.parameters(), lr=0.01).step()
    assert_same(nets.behavior.encoder, *encoders)
    assert_same(nets.behavior.decoder, *decoders)
    mean = torch.stack(losses).mean().detach()
    assert_close(metrics["minus_elbo"], mean)
    assert_close(nets.behavior.minus_elbo, 0.01 * mean)  # a running mean from 0
    assert moved(before, nets) == {"behavior"}


def test_actions_at_a_bound_are_spread(data):
    """--dequantize; without it they are clipped to +-(1 - 1e-6)."""
    data.action.fill_(1.0)
    seen = []

    def encoder(x, s):
        seen.append(x.tanh())
        return torch.zeros(1, 16, 8)

    decoder = lambda z, s: torch.zeros(1, 16, 4)
    nets = SimpleNamespace(behavior=SimpleNamespace(encoder=encoder, decoder=decoder))
    for width in (0.0, 0.1):
        behavior_loss(nets, data.obs, data.action, Args(dequantize=width))
    assert_close(seen[0], torch.full((16, 2), 1 - 1e-6).double())
    distance = 1 - seen[1]
    assert distance.min() > 0 and distance.max() < 0.1 and distance.std() > 0.01


# ---- MMD -------------------------------------------------------------------------------------


@version
def test_mmd_is_a_double_sum(data, version):
    """iclr compares actions; acml actions before tanh, its latents held within half a deviation."""
    nets, args = make(data, divergence="mmd", version=version, mmd_width=3.0)
    s, x_noise, z_noise = data.obs[:4], normals(3, 4, 2), normals(2, 3, 4, 4, seed=1)
    with drawing(x_noise, z_noise.view(2, 12, 4), kl=False):  # clone, action, state
        a, _, d = divergence(nets, s, 3, args)
    z = z_noise.clamp(-0.5, 0.5) if version == "acml" else z_noise
    clones = [stack(nets.behavior.decoder, m) for m in range(2)]
    b = [normal(clones[m](torch.cat([z[m, j], s], -1))).mean for m in range(2) for j in range(3)]
    b, x = torch.stack(b), a.atanh()
    if version == "iclr":
        b, x = b.tanh(), a

    def k(u, v):
        values = [math.exp(-(p - q).abs().sum().item() / 6) for p in u for q in v]
        return sum(values) / len(values)

    assert d.shape == (1, 4)
    for i in range(4):
        u, v = x[:, i], b[:, i]
        assert abs(d[0, i].item() - math.sqrt(k(u, u) + k(v, v) - 2 * k(u, v) + 1e-6)) < 1e-9
    grads = torch.autograd.grad(d.sum(), list(nets.actor.parameters()))
    assert all(g.isfinite().all() for g in grads) and any(g.any() for g in grads)


def test_mmd_of_equal_samples():
    actor = constant(0.3, 1e-8)
    nets = SimpleNamespace(actor=actor, behavior=SimpleNamespace(decoder=lambda z, s: actor(z)))
    args = Args(divergence="mmd", members=1, mmd_width=60.0)
    d = divergence(nets, torch.zeros(3, 1).double(), 2, args)[2]
    assert_close(d, torch.full((1, 3), 1e-3).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "expected"), [(10.0, 0.31232), (20.0, 0.22222)])
def test_mmd_of_two_points(width, expected):
    """One action each, at a distance of 1: sqrt(2 - 2 exp(-1 / (2 width)) + 1e-6)."""
    u, v = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    between = brac_plus.kernel_mean(u, v, width).item()
    assert brac_plus.kernel_mean(u, u, width) == 1
    assert abs(math.sqrt(2 - 2 * between + 1e-6) - expected) < 1e-5


# ---- critics ---------------------------------------------------------------------------------


def with_targets(q):
    """Networks whose target policy is tanh N(0, 0.7^2) and whose target critics are q(s, a)."""
    return SimpleNamespace(actor_target=lambda s: torch.zeros(len(s), 2), q_target=q)


@pytest.mark.parametrize("backup", ["mean", "max"])
def test_target_of_constant_critics(backup):
    """The smaller critic is 2: y = 1 + 0.9 * 2 where the episode goes on, 5 where it ended."""
    nets = with_targets(lambda s, a: torch.tensor([[2.0], [7.0]]).expand(2, len(s)))
    r, terminal = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 1.0])
    args = Args(gamma=0.9, backup=backup)
    y = brac_plus.target_value(nets, r, torch.zeros(2, 1), terminal, args)
    assert_close(y, torch.tensor([2.8, 5.0]))


@pytest.mark.parametrize("backup", ["mean", "max"])
def test_target_of_critics_that_know_the_state_alone(backup):
    """Copies of a state belong together: averages across states would not return them."""
    nets, s2 = with_targets(lambda s, a: s.T.expand(2, -1)), torch.arange(6.0)[:, None]
    zeros = torch.zeros(6)
    y = brac_plus.target_value(nets, zeros, s2, zeros, Args(gamma=0.5, backup=backup))
    assert_close(y, 0.5 * s2[:, 0])


@pytest.mark.parametrize("backup", ["mean", "max"])
def test_target_is_the_mean_or_the_largest_of_the_actions(backup):
    nets, zeros = with_targets(lambda s, a: torch.stack([a[:, 0], a[:, 0] + 1])), torch.zeros(4)
    noise = torch.randn(7, 4, 1, generator=torch.Generator().manual_seed(0))
    with Inject(randn_like=[noise]):
        args = Args(gamma=1.0, backup=backup, samples=7)
        y = brac_plus.target_value(nets, zeros, torch.zeros(4, 1), zeros, args)
    a = (math.log(2) * noise[..., 0]).tanh()  # std = softplus(0)
    assert_close(y, a.mean(0) if backup == "mean" else a.amax(0))


def linear_critics(w, shift):
    """Q_i(s, a) = w_i . a + shift_i, w (2, A), out of two ReLUs; one observation."""
    net = ScalarMLP(1 + w.shape[1], 2, members=2).double()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.weights[0][:, 1:, 0], net.weights[0][:, 1:, 1] = w, -w
        net.weights[1][:, 0], net.weights[1][:, 1] = 1, -1
        net.biases[1][:, 0, 0] = shift
    return net


def gradient_norm(q, s, a):
    return brac_plus.gradient_norm(SimpleNamespace(q=q), s, a)


def gate(d, eps_gp, kind):
    nets = SimpleNamespace(eps_gp=torch.tensor(eps_gp).double())
    return brac_plus.penalty_gate(nets, d, Args(gate=kind))


@pytest.mark.parametrize(("shift", "norm"), [((0.0, 50.0), 5.0), ((50.0, 0.0), 13.0)])
def test_penalty_is_the_norm_of_the_smaller_critics_gradient(shift, norm):
    """(3, 4) and (5, 12): 5 or 13, not squared, and only that critic is held down."""
    q = linear_critics(torch.tensor([[3.0, 4.0], [5.0, 12.0]]).double(), torch.tensor(shift))
    s, a = torch.zeros(6, 1).double(), torch.rand(1, 6, 2).double()
    found = gradient_norm(q, s, a)
    assert_close(found, torch.full((6,), norm).double())
    (grad,) = torch.autograd.grad(found.mean(), q.weights[0])
    smaller = int(shift[0] > shift[1])
    assert grad[smaller].any() and not grad[1 - smaller].any()


def test_penalty_is_that_of_difference_quotients(data):
    nets, _ = make(data)
    q = lambda a: nets.q(data.obs, a).amin(0)
    h = 1e-7 * torch.eye(2).double()
    g = torch.stack([(q(data.action + x) - q(data.action - x)) / 2e-7 for x in h], -1)
    found = gradient_norm(nets.q, data.obs, data.action.unsqueeze(0))
    assert_close(found, g.norm(dim=-1), rtol=1e-5, atol=1e-6)


def test_penalty_of_several_actions_is_their_mean(data):
    """As mmd has it; every state keeps its own."""
    nets, _ = make(data)
    a = normals(3, 16, 2).tanh()
    one_by_one = [gradient_norm(nets.q, data.obs, each.unsqueeze(0)) for each in a]
    assert_close(gradient_norm(nets.q, data.obs, a), torch.stack(one_by_one).mean(0))


def test_penalty_is_finite_where_the_gradient_is_zero():
    q = linear_critics(torch.zeros(2, 2).double(), torch.zeros(2))
    found = gradient_norm(q, torch.zeros(4, 1).double(), torch.rand(1, 4, 2).double())
    assert_close(found, torch.full((4,), 1e-6).double())
    grads = torch.autograd.grad(found.mean(), list(q.weights))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kind", ["hard", "tuned"])
def test_hard_gate_is_a_step(kind):
    d = torch.tensor([0.0, 1.4, 1.5, 1.6, 9.0]).double()
    assert_close(gate(d, 1.5, kind), torch.tensor([0.0, 0, 0, 1, 1]).double())


def test_soft_gate_is_softplus_with_a_largest_value_of_one():
    d = torch.linspace(0, 3, 16).double()
    weight = torch.log1p(torch.exp(d - 1.5))
    assert_close(gate(d, 1.5, "soft"), weight / weight[-1])


# ---- multipliers -----------------------------------------------------------------------------


@kind
def test_actor_loss_by_hand(kind):
    """States with D = 1 and 4 against eps 3, alpha 2 and 5; entropy 0.5 against H0 = -1."""
    nets = SimpleNamespace(eps=torch.tensor(3.0), h0=torch.tensor(-1.0))
    q, d = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[0.0, 5.0], [2.0, 3.0]])
    alpha, log_prob = torch.tensor([2.0, 5.0]), torch.tensor([[-1.0, 0.0], [-2.0, 1.0]])
    loss = brac_plus.actor_loss(nets, alpha, 0.1, q, d, log_prob, Args(divergence=kind))
    excess = 1.5 if kind == "kl" else -1.5
    assert_close(loss, torch.tensor((2 * -2 + 5 * 1) / 2 - 3 + 0.1 * excess))
    alpha_loss = brac_plus.alpha_loss(nets, alpha, d.mean(0))
    assert_close(alpha_loss, torch.tensor(-(2 * -2 + 5 * 1) / 2))
    beta_loss = brac_plus.beta_loss(nets, 0.1, log_prob, Args(divergence=kind))
    assert_close(beta_loss, torch.tensor(-0.1 * excess))


@pytest.mark.parametrize(("kind", "direction"), [("kl", 1), ("mmd", -1)])
def test_multipliers_rise_where_their_constraint_is_broken(kind, direction):
    """alpha where D > eps; beta where the entropy is above H0, with mmd where it is below; lam
    where the penalty is above its target."""
    nets = SimpleNamespace(eps=torch.tensor(2.0), h0=torch.tensor(-1.0))
    args = Args(divergence=kind, gp_target=0.1)
    for d, entropy, penalty in ((3.0, 0.5, 0.2), (1.0, -4.0, 0.05)):
        alpha, beta, lam = (torch.ones(n).requires_grad_() for n in (2, 1, 1))
        log_prob = torch.full((3, 2), -entropy)
        loss = brac_plus.alpha_loss(nets, alpha, torch.full((2,), d))
        assert (-torch.autograd.grad(loss, alpha)[0].sign() == np.sign(d - 2)).all()
        loss = brac_plus.beta_loss(nets, beta, log_prob, args)
        assert -torch.autograd.grad(loss.sum(), beta)[0].sign() == direction * np.sign(entropy + 1)
        loss = brac_plus.lam_loss(lam, torch.tensor(penalty), args)
        assert -torch.autograd.grad(loss.sum(), lam)[0].sign() == np.sign(penalty - 0.1)


def test_multipliers_settle_where_the_constraints_bind():
    """max x - (h - 3)^2 with x^2 <= 4 and entropy h <= 1: x = 2, alpha = 1/4, beta = 4."""
    nets, args = SimpleNamespace(eps=torch.tensor(4.0), h0=torch.tensor(1.0)), Args()
    x, h, raw = (torch.tensor(v, requires_grad=True) for v in ([0.1], [0.0], [0.0, 0.0]))
    for _ in range(6000):
        alpha, beta = softplus(raw)
        q = x - (h - 3) ** 2
        loss = brac_plus.actor_loss(nets, alpha.detach(), beta.detach(), q, x**2, -h, args)
        loss = loss + brac_plus.alpha_loss(nets, alpha, x.detach() ** 2)
        loss = loss + brac_plus.beta_loss(nets, beta, -h.detach(), args)
        for p, g in zip((x, h, raw), torch.autograd.grad(loss, [x, h, raw])):
            p.data -= 0.02 * g
    assert_close(torch.cat([x, h]), torch.tensor([2.0, 1.0]), atol=1e-2, rtol=0)
    assert_close(torch.stack([alpha, beta]), torch.tensor([0.25, 4.0]), atol=2e-2, rtol=0)


# ---- whole updates ---------------------------------------------------------------------------

LR = 0.01


@pytest.fixture(params=[(v, k) for v in VERSIONS for k in KINDS], ids="-".join)
def step(request, data):
    """One update with plain gradient steps: networks before and after it, and what went in."""
    version, kind = request.param
    values = dict(lam=0.3, gp_target=0.2, polyak=0.1, dual_start=0.7, mmd_width=3.0)
    nets, args = make(data, version=version, divergence=kind, **values)
    z = normals(2, 144 if kind == "kl" else 48, 4, seed=1)
    draws = dict(x=normals(3, 16, 2), z=z, kl=kind == "kl")
    with drawing(**draws):
        threshold = divergence(nets, data.obs, 3, args)[2].mean().item()
    nets.eps.fill_(0.9 * threshold)  # the mean state is beyond eps, some states beyond eps_GP
    nets.eps_gp.fill_(threshold)
    nets.h0.fill_(-0.5)
    before, target = copy.deepcopy(nets), normals(3, 16, 2, seed=2)
    with drawing(**draws, target=target, batch=16):
        metrics = brac_plus.update(nets, optimizers(nets, args, SGD, LR), data, args)
    with drawing(**draws):
        a, log_prob, d = divergence(before, data.obs, 3, args)
    names = dict(before=before, after=nets, metrics=metrics, args=args, data=data)
    return SimpleNamespace(**names, target=target, a=a, log_prob=log_prob, d=d)


def both(nets, s, a):
    """Q (2, B) by plain layers."""
    return torch.stack([net(torch.cat([s, a], -1)).squeeze(-1) for net in nets])


def plain_penalty(step, q):
    """Mean of gate times norm, by a gradient of the gradient."""
    actions = step.a if step.args.divergence == "mmd" else step.a[:1]
    norms = []
    for a in actions.detach():
        a = a.requires_grad_()
        value = both(q, step.data.obs, a).amin(0).sum()
        norms.append(torch.autograd.grad(value, a, create_graph=True)[0].norm(dim=-1))
    excess = step.d[0].detach() - step.before.eps_gp
    if step.args.gate == "soft":
        weight = softplus(excess) / softplus(excess).max()
    else:
        weight = (excess > 0).double()
        assert 0 < weight.mean() < 1
    return (weight * torch.stack(norms).mean(0)).mean()


def test_critics_descend_their_errors_and_the_penalty(step):
    s, a, r, s2, terminal = rows(step.data)
    q, q_target = ([stack(n, e) for e in (0, 1)] for n in (step.before.q, step.before.q_target))
    with torch.no_grad():
        pi2 = normal(stack(step.before.actor_target)(s2), -20)
        a2 = (pi2.mean + pi2.stddev * step.target).tanh()
        q2 = torch.stack([both(q_target, s2, x).amin(0) for x in a2])
        v2 = q2.amax(0) if step.args.version == "acml" else q2.mean(0)
        y = r + 0.99 * (1 - terminal) * v2
    td_loss = ((both(q, s, a) - y) ** 2 / 2).sum(0).mean()
    penalty = plain_penalty(step, q)
    (td_loss + 0.3 * penalty).backward()
    for net in q:
        torch.optim.SGD(net.parameters(), lr=LR).step()
    assert_same(step.after.q, *q)
    assert_close(step.metrics["td_loss"], td_loss.detach())
    assert_close(step.metrics["penalty"], penalty.detach())
    assert_close(step.metrics["q_loss"], (td_loss + 0.3 * penalty).detach())


def plain_alpha(step):
    """alpha of every state, (16,) or (), and its parameters."""
    if step.args.multiplier == "state":
        net = step.before.alpha_net
        return softplus(net(step.data.obs)), net
    return softplus(step.before.alpha), step.before.alpha


def test_policy_follows_the_critics_after_their_step(step):
    q = [stack(step.after.q, e) for e in (0, 1)]
    q_pi = torch.stack([both(q, step.data.obs, a).amin(0) for a in step.a])
    alpha, _ = plain_alpha(step)
    sign = 1 if step.args.divergence == "mmd" else -1
    loss = (-q_pi + alpha.detach() * step.d).mean() + sign * 0.7 * step.log_prob.mean()
    params = list(step.before.actor.parameters())
    for p, g, new in zip(params, torch.autograd.grad(loss, params), step.after.actor.parameters()):
        assert_close(new, p - LR * g)


def test_multipliers_climb_by_the_divergence_before_the_policys_step(step):
    d, log_prob = step.d.detach().mean(0), step.log_prob.detach()
    alpha, owner = plain_alpha(step)
    params = [owner] if isinstance(owner, nn.Parameter) else list(owner.parameters())
    new = step.after.alpha if len(params) == 1 else step.after.alpha_net
    new = [new] if len(params) == 1 else list(new.parameters())
    gain = (alpha * (d - step.before.eps)).mean()
    for p, g, x in zip(params, torch.autograd.grad(gain, params), new, strict=True):
        assert_close(x, p + LR * g)
    slope = 1 - math.exp(-0.7)  # of softplus where it is 0.7
    sign = 1 if step.args.divergence == "mmd" else -1
    beta = step.before.beta + LR * slope * sign * (log_prob.mean() - 0.5)
    assert_close(step.after.beta.detach(), beta.detach())
    lam = step.before.lam.detach().clone()
    if step.args.gate != "hard":
        lam += LR * (1 - math.exp(-0.3)) * (step.metrics["penalty"] - 0.2)
    assert_close(step.after.lam.detach(), lam)


def test_targets_follow_by_polyak(step):
    for name in ("q", "actor"):
        target, old, online = (
            getattr(nets, each).parameters()
            for nets, each in (
                (step.after, f"{name}_target"),
                (step.before, f"{name}_target"),
                (step.after, name),
            )
        )
        for t, o, p in zip(target, old, online):
            assert_close(t.data, 0.1 * p.data + 0.9 * o.data)


def test_nothing_else_moves_and_what_is_measured(step):
    acml, d = step.args.version == "acml", step.d.detach().mean(0)
    parts = {"q", "q_target", "actor", "actor_target", "beta", "d_sums"}
    parts |= {"alpha", "lam"} if acml else {"alpha_net"}
    assert moved(step.before, step.after) == parts
    assert_close(step.after.d_sums, torch.stack([d.mean(), d.square().mean()]))
    assert_close(step.metrics["d_mean"], d.mean())
    assert_close(step.metrics["violations"].double(), (d > step.before.eps).double().mean())
    assert all(m.ndim == 0 and not m.requires_grad for m in step.metrics.values())
    assert all(p.grad is None for p in step.after.parameters())


@kind
def test_one_step_of_the_first_policy(data, kind):
    """One action per state, three with mmd; the policy and beta alone move."""
    n = 3 if kind == "mmd" else 1
    nets, args = make(data, divergence=kind, dual_start=0.7)
    nets.h0.copy_(torch.tensor(-0.5))
    before = copy.deepcopy(nets)
    draws = dict(x=normals(n, 16, 2), z=normals(2, 48, 4, seed=1), kl=kind == "kl")
    with drawing(**draws, batch=16):
        brac_plus.update_first_policy(nets, optimizers(nets, args, SGD, LR), data, args)
    with drawing(**draws):
        _, log_prob, d = divergence(before, data.obs, n, args)
    sign = 1 if kind == "mmd" else -1
    loss = d.mean() + sign * 0.7 * log_prob.mean()
    params = list(before.actor.parameters())
    for p, g, new in zip(params, torch.autograd.grad(loss, params), nets.actor.parameters()):
        assert_close(new, p - LR * g)
    slope = 1 - math.exp(-0.7)  # of softplus where it is 0.7
    beta = before.beta + LR * slope * sign * (log_prob.mean() - 0.5)
    assert_close(nets.beta.detach(), beta.detach())
    assert_close(nets.first_d, 0.01 * d.mean().detach())  # a running mean from 0
    assert moved(before, nets) == {"actor", "beta", "first_d"}


def test_one_step_of_the_critics_alone(data):
    """Line 3 of Algorithm 1: the critics' errors without a penalty; policy and multipliers stay."""
    nets, args = make(data, polyak=0.1)
    before, target = copy.deepcopy(nets), normals(3, 16, 2)
    with Inject(randint=[torch.arange(16)], randn_like=[target]):
        found = brac_plus.update_critics(nets, optimizers(nets, args, SGD, LR), data, args)
    s, a, r, s2, terminal = rows(data)
    with Inject(randn_like=[target]):
        y = brac_plus.target_value(before, r, s2, terminal, args)
    loss = ((before.q(s, a) - y) ** 2 / 2).sum(0).mean()
    params = list(before.q.parameters())
    for p, g, new in zip(params, torch.autograd.grad(loss, params), nets.q.parameters()):
        assert_close(new, p - LR * g)
    assert_close(found["q_loss"], loss.detach())
    assert moved(before, nets) == {"q", "q_target"}


def test_lam_is_never_below_its_first_value(data):
    """Its parameter may fall, the weight in the critics' loss may not."""
    nets, args = make(data, version="acml", lam=0.4)
    nets.lam.data.fill_(-3.0)
    metrics = brac_plus.update(nets, optimizers(nets, args, SGD, 0.0), data, args)
    assert_close(metrics["q_loss"], metrics["td_loss"] + 0.4 * metrics["penalty"])
    assert_close(metrics["lam"], torch.tensor(0.4).double())


# ---- acting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["argmax", "clipped", "mode"])
def test_policy_takes_the_best_of_its_candidates(tiny_data, rule):
    data = tiny_data(obs_dim=3, act_dim=2)
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.5, 4.0, 1.0])
    data.action_low, data.action_high = torch.tensor([-2.0, 0.0]), torch.tensor([6.0, 1.0])
    nets, args = make(in_double(data), eval_policy=rule)
    obs = 3 * normals(6, 3)
    found = brac_plus.policy(nets, obs, args)
    s = (obs - data.obs_mean) / data.obs_std
    pi, expected = normal(stack(nets.actor)(s), -20), []
    for i in range(6):
        width = {"argmax": 99, "clipped": 1, "mode": 0}[rule]
        x = pi.mean[i] + pi.stddev[i] * nets.noise.clamp(-width, width)
        candidates = torch.cat([s[i].expand(20, -1), x.tanh()], -1)
        q = [stack(nets.q, e)(candidates)[:, 0] for e in range(2)]
        value = (q[0] + q[1]) / 2 if rule == "clipped" else q[0]
        expected.append(x[value.argmax()].tanh())
    center, half = torch.tensor([2.0, 0.5]).double(), torch.tensor([4.0, 0.5]).double()
    assert_close(found, center + half * torch.stack(expected))
    assert torch.equal(brac_plus.policy(nets, obs, args), found)
    assert nets.noise.shape == (20, 2) and nets.noise.std() > 0.5


# ---- training --------------------------------------------------------------------------------


class Watching(PlainRun):
    """Remembers what every step left: thresholds, learning rates, networks of a phase's end."""

    def __init__(self):
        super().__init__()
        self.seen, self.ends = {}, {}

    def loop(self, steps, phase="train"):
        self.phase = phase
        for t in super().loop(steps, phase):
            yield t
            rates = {name: adam.lr.item() for name, adam in vars(self.opt).items()}
            seen = SimpleNamespace(eps_gp=self.nets.eps_gp.item(), **rates)
            self.seen.setdefault(phase, []).append(seen)
        self.ends[phase] = copy.deepcopy(self.nets)


@pytest.fixture
def trained(tiny_data):
    """trained(**flags): a run on tiny data, and the data as it was trained on."""

    def start(prepare=lambda data: None, **values):
        torch.manual_seed(0)
        data = tiny_data(obs_dim=3, act_dim=2, n=40)
        prepare(data)
        short = dict(env="log.npz", batch_size=8, bc_steps=10, steps=1, samples=2, members=1)
        run = Watching()
        brac_plus.train(run, data, Args(**(short | values)))
        return run, data

    return start


def test_first_phases(trained):
    """Learning rates fall in fifths; eps is D of the first policy + margin, or what is given; the
    target policy starts as the first policy; H0 is -ELBO less A ln 4, with mmd -ELBO."""
    run, _ = trained(margin=2.5)
    fifths = torch.tensor([1e-3, 5e-4, 1e-4, 5e-5, 1e-5]).repeat_interleave(2)
    assert_close(torch.tensor([x.behavior for x in run.seen["behavior"]]), fifths)
    assert_close(torch.tensor([x.init for x in run.seen["init"]]), fifths)
    nets = run.ends["init"]
    assert_close(nets.eps, nets.first_d + 2.5)
    assert nets.eps_gp == nets.eps and nets.first_d > 0
    assert_close(nets.h0, nets.behavior.minus_elbo - 2 * math.log(4))
    for p, t in zip(nets.actor.parameters(), nets.actor_target.parameters()):
        assert torch.equal(p, t)
    given = trained(eps=7.0, h0=-1.5)[0].nets
    assert (given.eps, given.h0) == (7.0, -1.5)
    nets = trained(divergence="mmd")[0].nets
    assert_close(nets.h0, nets.behavior.minus_elbo)


def test_the_first_policy_is_scored_by_its_mode(trained):
    run, _ = trained(polyak=1e-9, actor_lr=1e-12)
    mean, _ = run.nets.actor_target(torch.zeros(1, 3)).chunk(2, -1)
    found = run.references["its first policy"](torch.zeros(1, 3))
    assert_close(found, mean.tanh(), atol=1e-4, rtol=0)


def test_every_multiplier_has_its_own_optimizer(trained):
    """Step counts after 10 + 10 + 3 steps. beta's optimizer goes on in iclr and is new in acml;
    those of alpha and lam begin in RL."""
    for version, beta in (("iclr", 13), ("acml", 3)):
        opt = trained(version=version, steps=3)[0].opt
        assert opt.beta.count == beta and opt.alpha.count == 3
        assert opt.lam.count == (3 if version == "acml" else 0)
        assert opt.init.count == 10 and opt.actor.count == 3


def test_critics_can_come_first(trained):
    run, _ = trained(q_steps=4, steps=3)
    assert [len(run.phases[name]) for name in ("behavior", "init", "critics", "train")] == [
        *(10, 10, 4, 3)
    ]
    assert moved(run.ends["init"], run.ends["critics"]) == {"q", "q_target"}
    assert run.opt.q.count == 7
    assert not trained()[0].phases["critics"]


def test_critics_that_come_first_learn_the_first_policys_value(trained):
    """States that follow themselves, with a reward of 1 per step: Q is 2 for a gamma of 0.5, and 1
    where the episode ends. One reward of 0 keeps the scaling to [0, 1] from changing the others."""

    def prepare(data):
        data.next_obs = data.obs.clone()
        data.reward = (torch.arange(40) > 0).float()

    flags = dict(gamma=0.5, q_steps=600, lr=3e-3, polyak=0.1, batch_size=32)
    run, data = trained(prepare, **flags)
    q = run.ends["critics"].q(data.obs, data.action).mean(0)
    error = (q - torch.where(data.terminal == 1, 1.0, 2.0))[1:].abs()
    assert error.mean() < 0.15


def test_threshold_is_set_by_epochs(trained):
    """Mean + population deviation of D over all states of the epoch, from the next one on."""
    run, _ = trained(steps=7, epoch_steps=3, eps=9.0, actor_lr=1e-3)
    table = run.phases["train"]
    mean = np.array([row["d_mean"] for row in table])
    square = np.array([row["d_std"] ** 2 * 7 / 8 for row in table]) + mean**2
    expected = [9.0, 9.0]
    for epoch in (slice(0, 3), slice(3, 6)):
        m = mean[epoch].mean()
        expected += 3 * [m + math.sqrt(square[epoch].mean() - m**2)]
    found = [x.eps_gp for x in run.seen["train"]]
    assert np.allclose(found, expected[:7], rtol=1e-4)
    sums = torch.tensor([mean[6], square[6]])
    assert_close(run.nets.d_sums.double(), sums.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (torch.linspace(-3, 5, 40), torch.linspace(0, 1, 40)),
        (torch.full((40,), -2.5), torch.zeros(40)),
    ],
)
def test_rewards_become_zero_to_one(trained, reward, expected):
    _, data = trained(lambda data: data.reward.copy_(reward))
    assert_close(data.reward, expected)


def test_largest_value_is_that_of_scaled_rewards(trained):
    run, _ = trained(gamma=0.9)
    assert run.largest.keys() == {"q_mean", "q_pi"} <= run.phases["train"][0].keys()
    assert all(abs(value - 10) < 1e-3 for value in run.largest.values())


def test_observations_can_be_normalized(trained):
    raw, scaled = (trained(normalize_obs=how) for how in (False, True))
    assert not raw[0].nets.scaling.obs_mean.any()
    assert_close(scaled[1].obs.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(scaled[0].nets.scaling.obs_mean, raw[1].obs.mean(0))


def test_eps_within_reach_binds(tiny_data):
    """A bandit whose reward rises out of the data: the policy goes until D is about eps."""
    torch.manual_seed(0)
    data = tiny_data(obs_dim=1, act_dim=1, n=400)
    data.obs.fill_(1.0), data.next_obs.fill_(1.0), data.terminal.fill_(1.0)
    data.action = 0.2 * torch.randn(400, 1).clamp(-2, 2)
    data.reward = 10 * data.action[:, 0]
    how = dict(batch_size=32, samples=2, members=1, dual_start=0.5, lam=0.0, version="acml")
    args = Args(**how)
    args.resolve()
    torch.manual_seed(0)
    nets = Nets(data, args)

    def quick(nets):
        opt = optimizers(nets, args, Adam, 1e-3)
        for name in ("init_beta", "alpha", "beta", "lam"):
            vars(opt)[name].lr.fill_(1e-2)
        return opt

    opt = quick(nets)
    for _ in range(300):
        brac_plus.update_behavior(nets, opt, data, args)
    nets.h0.fill_(nets.behavior.minus_elbo - 0.5)
    for _ in range(300):
        first = brac_plus.update_first_policy(nets, opt, data, args)
    assert first["d_mean"] < 1.0 and abs(nets.actor(data.obs[:1])[0, 0]) < 0.2
    mean, d = {}, {}
    for eps in (1.5, 4.0):
        one = copy.deepcopy(nets)
        one.eps.fill_(eps), one.eps_gp.fill_(eps)
        opt = quick(one)
        found = [brac_plus.update(one, opt, data, args) for _ in range(400)]
        assert all(x.isfinite() for m in found for x in m.values())
        d[eps] = sum(m["d_mean"] for m in found[-80:]) / 80
        mean[eps] = one.actor(data.obs[:1])[0, 0].tanh()
    assert 0.15 < mean[1.5] < mean[4.0] < 0.8
    assert abs(d[1.5] - 1.5) < 0.5 and abs(d[4.0] - 4.0) < 1.2


# ---- versions and tasks ----------------------------------------------------------------------


def resolved(*argv):
    return parse(Args, PRESETS, [*argv])[0]


def choices(args):
    return args.multiplier, args.gate, args.backup, args.eval_policy


def test_a_version_sets_what_is_not_typed():
    data = "--env", "log.npz"
    assert choices(resolved(*data)) == ("state", "hard", "mean", "argmax")
    acml = *data, "--version", "acml"
    assert choices(resolved(*acml)) == ("global", "soft", "max", "clipped")
    args = resolved(*acml, "--backup", "mean", "--eval-policy", "mode")
    assert choices(args) == ("global", "soft", "mean", "mode")
    assert resolved(*data, "--multiplier", "global").multiplier == "global"
    args = resolved(*acml)
    assert args.eps is args.h0 is args.mmd_width is None and args.margin == 3.0


@pytest.mark.parametrize(
    ("env", "eps", "h0", "margin"),
    [
        ("hopper-medium-v0", 2.4, -6, 0.2),
        ("hopper-medium-replay-v0", 3.0, -3, 3.0),
        ("walker2d-random-v0", 0.1, 6, 3.0),
        ("walker2d-medium-v0", 2.2, -9, 1.0),
        ("halfcheetah-medium-expert-v0", 11.5, -24, 0.2),
        ("halfcheetah-medium-v2", None, None, 7.0),
        ("pen-human-v1", 0.06, -200, 0.001),
        ("D4RL/door/human-v2", None, None, 0.001),
        ("mujoco/hopper/medium-v0", None, None, 0.2),
        ("mujoco/walker2d/medium-v0", None, None, 1.0),
        ("mujoco/halfcheetah/medium-v0", None, None, 7.0),
        ("mujoco/hopper/expert-v0", None, None, 3.0),
        ("hopper/medium-v0", None, None, 3.0),  # a dataset of the user's own
        ("ant-medium-expert-v0", None, None, 3.0),
        ("hopper-medium-v0.npz", None, None, 3.0),
    ],
)
def test_thresholds_of_tasks(env, eps, h0, margin):
    args = resolved("--env", env)
    assert (args.eps, args.h0, args.margin) == (eps, h0, margin)
    assert args.divergence == ("mmd" if margin == 0.001 else "kl")
    args = resolved("--env", env, "--version", "acml")
    assert args.eps is args.h0 is None, "acml measures them"
    assert args.margin == margin
    assert args.gate == ("tuned" if args.divergence == "mmd" else "soft")
    args = resolved("--env", env, "--version", "acml", "--eps", str(eps or 1), "--h0", "2")
    assert (args.eps, args.h0) == (eps or 1, 2), "what is typed wins, the other version's value too"


@pytest.mark.parametrize(
    ("env", "margin"),
    [
        ("hopper-medium-v0", 0.02),
        ("mujoco/hopper/medium-v0", 0.02),
        ("halfcheetah-medium-v0", 0.1),
        ("walker2d-random-v0", 0.05),
    ],
)
def test_mmd_has_thresholds_and_widths_of_its_own(env, margin):
    """KL's would never bind: D by mmd is at most sqrt(2)."""
    for version, width in (("iclr", 10), ("acml", 20)):
        args = resolved("--env", env, "--divergence", "mmd", "--version", version)
        assert args.eps is args.h0 is None
        assert (args.margin, args.mmd_width) == (margin, width)


@pytest.mark.parametrize("env", ["pen-human-v0", "pen-cloned-v1", "D4RL/pen/human-v2"])
def test_adroit_has_settings_of_its_own(env):
    args = resolved("--env", env, "--version", "acml")
    assert (args.gate, args.gp_target, args.margin) == ("tuned", 0.005, 0.001)
    assert (args.mmd_width, args.steps, args.actor_lr) == (120, 250_000, 5e-8)
    assert resolved("--env", env).mmd_width == 60
    assert resolved("--env", env, "--divergence", "kl").margin == 3.0


@pytest.mark.parametrize("env", [name for name in PRESETS if name.endswith("-demo")])
def test_demo_rows_are_a_pair_that_the_authors_used(env):
    """acml's thresholds with acml's one multiplier, and nothing of iclr."""
    args = resolved("--env", env)
    assert choices(args) == ("global", "soft", "max", "clipped")
    assert args.eps is args.h0 is None
    assert args.margin == (3.0 if "replay" in env else 0.2)


def test_unknown_version_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(Args, PRESETS, ["--version", "icml"])
    assert "icml" in capsys.readouterr().err
