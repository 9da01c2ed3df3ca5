"""brac_plus.py: the bound on the KL, MMD, multipliers, the gated penalty, versions, resume."""

import copy
import math
import os
import signal
from types import SimpleNamespace

import brac_plus
import numpy as np
import pytest
import torch
import torch.distributions as D
from brac_plus import PRESETS, Args, Nets, behavior_loss, divergence, gaussian, lagrangian
from oracles import SGD, assert_same, in_double, stack
from torch import nn
from torch.testing import assert_close

from common import ScalarMLP, parse
from experiment import Run, load_tensors

ICLR = dict(multiplier="state", penalty="hard", backup="mean", eval_policy="argmax")
ACML = dict(multiplier="global", penalty="soft", backup="max", eval_policy="clipped")


def optimizers(nets, optimizer, lr):
    params = {k: getattr(nets, k).parameters() for k in ("behavior", "q", "actor", "alpha")}
    params |= {"init": nets.actor.parameters(), "dual": [nets.dual]}
    return SimpleNamespace(**{k: optimizer(p, lr) for k, p in params.items()})


@pytest.fixture
def data(tiny_data):
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def make(data, seed=0, spread=2.0, **values):
    """Networks in float64 with outputs of size one, and targets that differ."""
    args = Args(batch_size=16, **(ICLR | dict(samples=3, members=2) | values))
    torch.manual_seed(seed)
    nets, other = Nets(data, args), Nets(data, args)
    nets.q_target, nets.actor_target = other.q_target, other.actor_target
    for net in (*nets.behavior.children(), nets.actor, nets.actor_target, nets.q, nets.q_target):
        for w in net.weights:
            w.data.mul_(spread)
    return nets.double(), args


@pytest.fixture
def draws(monkeypatch):
    """What randn_like returned, in order."""
    seen, draw = [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: seen.append(draw(x)) or seen[-1])
    return seen


def normal(out, low=-10):
    """The distribution that an output stands for."""
    mean, raw = out.chunk(2, -1)
    return D.Normal(mean, nn.functional.softplus(raw.clamp(low, 5)))


def constant(mean, std):
    """A network with one output for all rows: N(mean, std^2)."""
    out = torch.tensor([mean, math.log(math.expm1(std))]).double()
    return lambda *x: out.expand(*x[0].shape[:-1], 2)


# ---- Gaussians -------------------------------------------------------------------------------


def test_kl_is_that_of_torch():
    torch.manual_seed(0)
    mean, log_std, mean2, log_std2 = torch.randn(4, 5, 3).double()
    p, q = D.Normal(mean, log_std.exp()), D.Normal(mean2, log_std2.exp())
    kl = brac_plus.normal_kl(mean, log_std, mean2, log_std2)
    assert_close(kl, D.kl_divergence(p, q).sum(-1))
    assert_close(brac_plus.normal_kl(mean, log_std, mean, log_std), torch.zeros(5).double())
    prior = D.Normal(torch.zeros(5, 3).double(), 1.0)
    assert_close(brac_plus.normal_kl(mean, log_std), D.kl_divergence(p, prior).sum(-1))


@pytest.mark.parametrize(
    ("raw", "low", "std"),
    [(0, -10, 0.69315), (99, -10, 5.0067), (-99, -10, 4.5399e-5), (-99, -20, 2.0612e-9)],
)
def test_scales_are_softplus_within_bounds(raw, low, std):
    mean, log_std = gaussian(torch.tensor([[7.0, raw]]).double(), low)
    assert mean == 7 and abs(log_std.exp().item() / std - 1) < 1e-4


# ---- the clone and the bound -----------------------------------------------------------------

W, S = 1.0, 0.5  # p(x|z) = N(W z, S^2): the marginal is N(0, W^2 + S^2), the posterior below
K, V = W / (W**2 + S**2), S**2 / (W**2 + S**2)


def linear_gaussian(mean, std):
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


def test_divergence_by_hand(data, draws):
    """Over 2 members, 3 actions of each state and 3 latents of each action, one by one."""
    nets, args = make(data)
    s = data.obs[:5]
    a, log_prob, d = divergence(nets, s, 3, args)
    pi = normal(stack(nets.actor)(s), -20)
    x = pi.mean + pi.stddev * draws[0]
    squashed = D.TransformedDistribution(pi, D.TanhTransform())
    assert_close(a, x.tanh())
    assert_close(log_prob, squashed.log_prob(a).sum(-1))
    expected = torch.zeros(3, 5).double()
    noise = draws[1].view(2, 3, 3, 5, 4)  # member, latent, action, state
    for m in range(2):
        for j in range(3):
            q = normal(stack(nets.behavior.encoder, m)(torch.cat([x[j], s], -1)))
            prior = D.kl_divergence(q, D.Normal(torch.zeros_like(q.mean), 1.0)).sum(-1)
            for k in range(3):
                z = q.mean + q.stddev * noise[m, k, j]
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


def test_gradient_of_the_bound_reaches_the_policy_by_every_path(data, draws, monkeypatch):
    """A difference quotient along each of the actor's last biases, with the noise held fixed."""
    nets, args = make(data)
    bias, h, found = nets.actor.biases[-1], 1e-6, []
    (grad,) = torch.autograd.grad(divergence(nets, data.obs, 3, args)[2].mean(), bias)
    noise = list(draws)
    for i in range(4):
        for sign in (1, -1):
            left = iter(noise)
            monkeypatch.setattr(torch, "randn_like", lambda x, left=left: next(left))
            with torch.no_grad():
                bias[i] += sign * h
                found.append(divergence(nets, data.obs, 3, args)[2].mean().item())
                bias[i] -= sign * h
    ahead, behind = torch.tensor(found, dtype=torch.float64).view(4, 2).T
    assert_close(grad, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)


def test_clone_step_by_hand(data, draws, monkeypatch):
    nets, args = make(data, dequantize=0.0)
    data.action[0] = 1.0  # at a bound: clipped
    opt, before = optimizers(nets, SGD, 0.01), copy.deepcopy(nets)
    encoders, decoders = ([stack(n, m) for m in range(2)] for n in nets.behavior.children())
    monkeypatch.setattr(brac_plus, "sample", lambda data, n, f: [getattr(data, k) for k in f])
    metrics = brac_plus.update_behavior(nets, opt, data, args)
    a, s, losses = data.action.clamp(-1 + 1e-6, 1 - 1e-6), data.obs, []
    for m in range(2):
        q = normal(encoders[m](torch.cat([a.atanh(), s], -1)))
        p = normal(decoders[m](torch.cat([q.mean + q.stddev * draws[0][m], s], -1)))
        kl = D.kl_divergence(q, D.Normal(torch.zeros_like(q.mean), 1.0)).sum(-1)
        nll = -D.TransformedDistribution(p, D.TanhTransform()).log_prob(a).sum(-1)
        losses.append((nll + kl).mean())
        losses[m].backward()
        for net in (encoders[m], decoders[m]):
            torch.optim.SGD(net.parameters(), lr=0.01).step()
    assert_same(nets.behavior.encoder, *encoders)
    assert_same(nets.behavior.decoder, *decoders)
    mean = torch.stack(losses).mean().detach()
    assert_close(metrics["minus_elbo"], mean)
    assert_close(nets.behavior.minus_elbo, 0.01 * mean)  # a running mean from 0
    moved = {
        k.split(".")[0] for k, v in nets.state_dict().items() if (v != before.state_dict()[k]).any()
    }
    assert moved == {"behavior"}


def test_actions_at_a_bound_are_spread(data):
    data.action.fill_(1.0)
    seen = []
    encoder = lambda x, s: seen.append(x) or 1 / 0
    nets = SimpleNamespace(behavior=SimpleNamespace(encoder=encoder))
    for width in (0.0, 0.1):
        with pytest.raises(ZeroDivisionError):
            behavior_loss(nets, data.obs, data.action, Args(dequantize=width))
    assert_close(seen[0], torch.full((16, 2), math.atanh(1 - 1e-6)).double())
    distance = 1 - seen[1].tanh()
    assert distance.min() > 0 and distance.max() < 0.1 and distance.std() > 0.01


# ---- MMD -------------------------------------------------------------------------------------


def test_mmd_is_a_double_sum(data, draws):
    nets, args = make(data, divergence="mmd")
    s = data.obs[:4]
    a, _, d = divergence(nets, s, 3, args)
    z = draws[1].view(2, 3, 4, 4)  # member, action, state
    b = torch.stack(
        [
            normal(stack(nets.behavior.decoder, m)(torch.cat([z[m, j], s], -1))).mean.tanh()
            for m in range(2)
            for j in range(3)
        ]
    )
    for i in range(4):
        k = lambda u, v: sum(
            math.exp(-(x - y).abs().sum().item() / 120) / (len(u) * len(v)) for x in u for y in v
        )
        u, v = a[:, i], b[:, i]
        expected = math.sqrt(k(u, u) + k(v, v) - 2 * k(u, v) + 1e-6)
        assert abs(d[0, i].item() - expected) < 1e-9
    assert d.shape == (1, 4)
    grads = torch.autograd.grad(d.sum(), list(nets.actor.parameters()))
    assert all(g.isfinite().all() for g in grads) and any(g.any() for g in grads)


def test_mmd_of_equal_samples():
    actor = constant(0.3, 1e-8)
    nets = SimpleNamespace(actor=actor, behavior=SimpleNamespace(decoder=lambda z, s: actor(z)))
    s = torch.zeros(3, 1).double().requires_grad_()
    d = divergence(nets, s, 2, Args(divergence="mmd", members=1))[2]
    assert_close(d, torch.full((1, 3), 1e-3).double(), atol=1e-6, rtol=0)


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


def test_target_is_the_mean_or_the_largest_of_the_actions(draws):
    nets, zeros = with_targets(lambda s, a: a.T.expand(2, -1)), torch.zeros(4)
    nets.q_target = lambda s, a: torch.stack([a[:, 0], a[:, 0] + 1])
    values = {}
    for backup in ("mean", "max"):
        args = Args(gamma=1.0, backup=backup, samples=7)
        values[backup] = brac_plus.target_value(nets, zeros, torch.zeros(4, 1), zeros, args)
    a = [(math.log(2) * x[..., 0]).tanh() for x in draws]  # std = softplus(0)
    assert_close(values["mean"], a[0].mean(0))
    assert_close(values["max"], a[1].amax(0))


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


def penalty_of(q, s, a, d, eps_gp=0.0, **values):
    nets = SimpleNamespace(q=q, eps_gp=torch.tensor(eps_gp).double())
    return brac_plus.gradient_penalty(nets, s, a, d, Args(**(ICLR | values)))


@pytest.mark.parametrize(("shift", "norm"), [((0.0, 50.0), 5.0), ((50.0, 0.0), 13.0)])
def test_penalty_is_the_norm_of_the_smaller_critics_gradient(shift, norm):
    """(3, 4) and (5, 12): 5 or 13, not squared, and only that critic is held down."""
    q = linear_critics(torch.tensor([[3.0, 4.0], [5.0, 12.0]]).double(), torch.tensor(shift))
    s, a = torch.zeros(6, 1).double(), torch.rand(6, 2).double()
    gated, raw = penalty_of(q, s, a, torch.ones(6).double())
    assert_close(gated, torch.full((6,), norm).double())
    assert_close(raw, gated)
    (grad,) = torch.autograd.grad(gated.mean(), q.weights[0])
    smaller = int(shift[0] > shift[1])
    assert grad[smaller].any() and not grad[1 - smaller].any()


def test_penalty_is_that_of_difference_quotients(data):
    nets, _ = make(data)
    q = lambda a: nets.q(data.obs, a).amin(0)
    h = 1e-7 * torch.eye(2).double()
    g = torch.stack([(q(data.action + x) - q(data.action - x)) / 2e-7 for x in h], -1)
    raw = penalty_of(nets.q, data.obs, data.action, torch.ones(16).double())[1]
    assert_close(raw, g.norm(dim=-1), rtol=1e-5, atol=1e-6)


def test_hard_gate(data):
    nets, _ = make(data)
    d = torch.linspace(0, 3, 16).double()
    gated, raw = penalty_of(nets.q, data.obs, data.action, d, eps_gp=1.5)
    assert_close(gated, torch.where(d > 1.5, raw, 0.0)) and gated.any()
    for eps_gp, expected in ((9.0, 0 * raw), (-1.0, raw)):
        gated, _ = penalty_of(nets.q, data.obs, data.action, d, eps_gp=eps_gp)
        assert_close(gated, expected)
        grads = torch.autograd.grad(gated.mean(), list(nets.q.parameters()), allow_unused=True)
        assert any(g is not None and g.any() for g in grads) == (eps_gp < 0)


def test_soft_gate(data):
    nets, _ = make(data)
    d = torch.linspace(0, 3, 16).double().requires_grad_()
    gated, raw = penalty_of(nets.q, data.obs, data.action, d.detach(), 1.5, penalty="soft")
    weight = torch.log1p(torch.exp(d.detach() - 1.5))
    assert_close(gated / raw, weight / weight[-1])


def test_penalty_is_finite_where_the_gradient_is_zero():
    q = linear_critics(torch.zeros(2, 2).double(), torch.zeros(2))
    s, a = torch.zeros(4, 1).double(), torch.rand(4, 2).double()
    gated, _ = penalty_of(q, s, a, torch.ones(4).double())
    assert_close(gated, torch.full((4,), 1e-6).double())
    grads = torch.autograd.grad(gated.mean(), list(q.weights))
    assert all(g.isfinite().all() for g in grads)


# ---- multipliers -----------------------------------------------------------------------------


def test_lagrangian_by_hand():
    """States with D = 1 and 4 against eps 3, alpha 2 and 5; entropy 0.5 against H0 = -1."""
    nets = SimpleNamespace(eps=torch.tensor(3.0), h0=torch.tensor(-1.0))
    q, d = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[0.0, 5.0], [2.0, 3.0]])
    alpha, log_prob = torch.tensor([2.0, 5.0]), torch.tensor([[-1.0, 0.0], [-2.0, 1.0]])
    for kind, sign in (("kl", -1), ("mmd", 1)):
        args = Args(divergence=kind)
        value = lagrangian(nets, alpha, 0.1, q, d, log_prob, args)
        assert_close(value, torch.tensor((2 * -2 + 5 * 1) / 2 - 3 + sign * 0.1 * (-0.5 - 1)))
        state = lagrangian(nets, alpha, 0.1, q, d.mean(0), log_prob, args)
        assert_close(state, value)  # D may be a mean over actions already


@pytest.mark.parametrize(("kind", "direction"), [("kl", 1), ("mmd", -1)])
def test_multipliers_rise_where_their_constraint_is_broken(kind, direction):
    """alpha where D > eps; beta where the entropy is above H0, with mmd where it is below."""
    nets = SimpleNamespace(eps=torch.tensor(2.0), h0=torch.tensor(-1.0))
    for d, entropy in ((3.0, 0.5), (1.0, -4.0)):
        alpha, beta = torch.tensor([1.0, 1.0]).requires_grad_(), torch.tensor(1.0).requires_grad_()
        d, log_prob = torch.full((3, 2), d), torch.full((3, 2), -entropy)
        gain = lagrangian(nets, alpha, beta, 0, d, log_prob, Args(divergence=kind))
        up = torch.autograd.grad(gain, [alpha, beta])
        assert (up[0].sign() == (d - 2)[0].sign()).all()
        assert up[1].sign() == direction * np.sign(entropy + 1)


def test_multipliers_settle_where_the_constraints_bind():
    """max x - (h - 3)^2 with x^2 <= 4 and entropy h <= 1: x = 2, alpha = 1/4, beta = 4."""
    nets = SimpleNamespace(eps=torch.tensor(4.0), h0=torch.tensor(1.0))
    x, h, raw = (torch.tensor(v, requires_grad=True) for v in ([0.1], [0.0], [0.0, 0.0]))
    for t in range(6000):
        alpha, beta = nn.functional.softplus(raw)
        value = lagrangian(nets, alpha, beta, x - (h - 3) ** 2, x**2, -h, Args())
        for p, g, rate in zip((x, h, raw), torch.autograd.grad(value, [x, h, raw]), (-1, -1, 1)):
            p.data += rate * 0.02 * g
    assert_close(torch.cat([x, h]), torch.tensor([2.0, 1.0]), atol=1e-2, rtol=0)
    assert_close(torch.stack([alpha, beta]), torch.tensor([0.25, 4.0]), atol=2e-2, rtol=0)


# ---- whole updates ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ICLR, ACML])
@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_update_by_hand(data, draws, monkeypatch, version, kind):
    lr, values = 0.01, dict(divergence=kind, lam=0.3, gp_target=0.2, polyak=0.1, dual_start=0.7)
    nets, args = make(data, **(version | values))
    d_now = divergence(nets, data.obs, 3, args)[2].mean().detach()
    for name, value in (("eps", d_now), ("eps_gp", d_now), ("h0", torch.tensor(-0.5))):
        getattr(nets, name).copy_(value)
    opt, before, dual = optimizers(nets, SGD, lr), copy.deepcopy(nets), nets.dual.detach().clone()
    actor, actor_target, alpha_net = stack(nets.actor), stack(nets.actor_target), stack(nets.alpha)
    q, q_target = ([stack(n, e) for e in range(2)] for n in (nets.q, nets.q_target))
    rows = data.obs, data.action, data.reward, data.next_obs, data.terminal
    monkeypatch.setattr(brac_plus, "sample", lambda data, n: rows)
    draws.clear()
    metrics = brac_plus.update(nets, opt, data, args)
    noise = list(draws)
    s, a, r, s2, terminal = rows
    both = lambda nets, s, a: torch.stack([n(torch.cat([s, a], -1)).squeeze(-1) for n in nets])

    # D with the same noise, then critics
    left = iter(noise[:2])
    monkeypatch.setattr(torch, "randn_like", lambda x: next(left))
    shadow = copy.deepcopy(before)
    shadow.actor = actor
    a_pi, log_prob, d = divergence(shadow, s, 3, args)
    with torch.no_grad():
        pi2 = normal(actor_target(s2), -20)
        a2 = (pi2.mean + pi2.stddev * noise[2]).tanh()
        q2 = torch.stack([both(q_target, s2, x).amin(0) for x in a2])
        y = r + 0.99 * (1 - terminal) * (q2.amax(0) if version == ACML else q2.mean(0))
    at = a_pi[0].detach().requires_grad_()
    (g,) = torch.autograd.grad(both(q, s, at).amin(0).sum(), at, create_graph=True)
    if version == ACML:
        gate = nn.functional.softplus(d[0] - d_now).detach()
        gate = gate / gate.max()
    else:
        gate = (d[0] > d_now).double()
        assert 0 < gate.mean() < 1
    penalty = (gate * g.norm(dim=-1)).mean()
    td_loss = ((both(q, s, a) - y) ** 2 / 2).sum(0).mean()
    (td_loss + 0.3 * penalty).backward()
    for net, target in zip(q, q_target):
        torch.optim.SGD(net.parameters(), lr=lr).step()
        for p, t in zip(net.parameters(), target.parameters()):
            t.data = 0.1 * p.data + 0.9 * t.data

    # policy, against the critics after their step; then multipliers
    raw = dual.requires_grad_()
    alpha, beta, lam = nn.functional.softplus(raw)
    if version == ICLR:
        alpha = nn.functional.softplus(alpha_net(s).squeeze(-1))
    sign = 1 if kind == "mmd" else -1
    q_pi = torch.stack([both(q, s, x).amin(0) for x in a_pi])
    loss = (-q_pi + alpha.detach() * d).mean() + sign * beta.detach() * log_prob.mean()
    loss.backward()
    d, log_prob = d.detach(), log_prob.detach()
    ascent = (alpha * (d - d_now)).mean() + sign * beta * (log_prob.mean() - 0.5)
    if version == ACML:
        ascent = ascent + lam * (penalty.detach() - 0.2)
    (-ascent).backward()
    for net in (actor, alpha_net) if version == ICLR else (actor,):
        torch.optim.SGD(net.parameters(), lr=lr).step()
    for p, t in zip(actor.parameters(), actor_target.parameters()):
        t.data = 0.1 * p.data + 0.9 * t.data

    assert_same(nets.q, *q)
    assert_same(nets.q_target, *q_target)
    assert_same(nets.actor, actor)
    assert_same(nets.actor_target, actor_target)
    assert_same(nets.alpha, alpha_net)
    assert_close(nets.dual, (raw - lr * raw.grad).detach())
    state = d.mean(0)
    assert_close(nets.moments, torch.stack([state.mean(), state.square().mean()]))
    names = {k for k, v in nets.state_dict().items() if (v != before.state_dict()[k]).any()}
    moved = {"q", "q_target", "actor", "actor_target", "dual", "moments"}
    assert {k.split(".")[0] for k in names} == moved | ({"alpha"} if version == ICLR else set())
    assert all(p.grad is None for p in nets.parameters())
    for name, value in (("td_loss", td_loss), ("penalty", penalty), ("d_mean", d.mean())):
        assert_close(metrics[name], value.detach())
    assert_close(metrics["violations"].double(), (state > d_now).double().mean())
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())


@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_first_policy_step_by_hand(data, draws, monkeypatch, kind):
    """One action per state, three with mmd; only the policy and beta move."""
    nets, args = make(data, divergence=kind, dual_start=0.7)
    nets.h0.copy_(torch.tensor(-0.5))
    opt, before = optimizers(nets, SGD, 0.01), copy.deepcopy(nets)
    monkeypatch.setattr(brac_plus, "sample", lambda data, n, fields: [data.obs])
    brac_plus.update_init(nets, opt, data, args)
    assert draws[0].shape == ((3 if kind == "mmd" else 1), 16, 2)
    left, shadow, actor = iter(draws[:2]), copy.deepcopy(before), stack(before.actor)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(left))
    shadow.actor = actor
    _, log_prob, d = divergence(shadow, data.obs, len(draws[0]), args)
    sign = 1 if kind == "mmd" else -1
    (d.mean() + sign * 0.7 * log_prob.mean()).backward()
    torch.optim.SGD(actor.parameters(), lr=0.01).step()
    assert_same(nets.actor, actor)
    slope = 1 - math.exp(-0.7)  # of softplus where it is 0.7
    step = 0.01 * sign * slope * (log_prob.mean().item() - 0.5)
    assert_close(
        nets.dual - before.dual, torch.tensor([0.0, step, 0.0]).double(), atol=1e-7, rtol=0
    )
    assert_close(nets.first_d, 0.01 * d.mean().detach())
    names = {k for k, v in nets.state_dict().items() if (v != before.state_dict()[k]).any()}
    assert {k.split(".")[0] for k in names} == {"actor", "dual", "first_d"}


def test_lambda_is_never_below_its_first_value(data, monkeypatch):
    """Soft penalty: below lam its raw value may fall, the weight in the critics' loss may not."""
    nets, args = make(data, **ACML, lam=0.4)
    nets.dual.data[2] = -3.0
    seen = []
    monkeypatch.setattr(brac_plus, "minimize", lambda opt, loss: seen.append(loss.detach()))
    metrics = brac_plus.update(nets, optimizers(nets, SGD, 0.0), data, args)
    assert_close(seen[0], metrics["td_loss"] + 0.4 * metrics["penalty"])
    assert_close(metrics["lambda"], torch.tensor(0.4).double())


# ---- acting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["argmax", "clipped", "mode"])
def test_policy_takes_the_best_of_its_candidates(tiny_data, rule):
    data = tiny_data(obs_dim=3, act_dim=2)
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.5, 4.0, 1.0])
    data.action_low, data.action_high = torch.tensor([-2.0, 0.0]), torch.tensor([6.0, 1.0])
    nets, args = make(in_double(data), eval_policy=rule)
    obs = 3 * torch.randn(6, 3).double()
    found = brac_plus.policy(nets, obs, args)
    s = (obs - data.obs_mean) / data.obs_std
    pi, expected = normal(stack(nets.actor)(s), -20), []
    for i in range(6):
        width = {"argmax": 99, "clipped": 1, "mode": 0}[rule]
        x = pi.mean[i] + pi.stddev[i] * nets.noise.clamp(-width, width)
        rows = torch.cat([s[i].expand(20, -1), x.tanh()], -1)
        q = [stack(nets.q, e)(rows)[:, 0] for e in range(2)]
        value = (q[0] + q[1]) / 2 if rule == "clipped" else q[0]
        expected.append(x[value.argmax()].tanh())
    center, half = torch.tensor([2.0, 0.5]).double(), torch.tensor([4.0, 0.5]).double()
    assert_close(found, center + half * torch.stack(expected))
    assert torch.equal(brac_plus.policy(nets, obs, args), found)
    assert nets.noise.shape == (20, 2) and nets.noise.std() > 0.5


# ---- training --------------------------------------------------------------------------------


class FakeRun:
    """A run without a folder; remembers the thresholds after every step."""

    device = torch.device("cpu")

    def __init__(self, args):
        self.args, self.seen, self.references = args, [], {}
        FakeRun.last = self

    def start(self, data, task, nets, opt):
        self.data, self.nets, self.opt = data, nets, opt

    def loop(self, steps, phase="train"):
        self.phase = phase
        yield from range(1, steps + 1)

    def after(self, t, metrics, act=None):
        lr = {"behavior": "behavior", "init": "init"}.get(self.phase, "actor")
        rate = vars(self.opt)[lr].lr.item()
        self.seen.append((self.phase, t, rate, self.nets.eps_gp.item(), self.nets.eps.item()))

    def cached(self, *_):
        return None, False

    def reference(self, label, act):
        self.references[label] = act(torch.zeros(1, 3))

    def share(self, *_):
        pass

    finish = share


@pytest.fixture
def fake(tiny_data, monkeypatch):
    """train(args) on tiny data with a FakeRun, which is returned."""

    def start(reward=None, **values):
        data = tiny_data(obs_dim=3, act_dim=2, n=40)
        if reward is not None:
            data.reward = reward
        monkeypatch.setattr(brac_plus, "Run", FakeRun)
        monkeypatch.setattr(brac_plus, "load_dataset", lambda *_: (data, None))
        brac_plus.train(Args(**(dict(batch_size=8, bc_steps=10, steps=1, samples=2) | values)))
        return FakeRun.last

    return start


def test_first_phases(fake):
    """Learning rates fall in fifths; eps is D of the first policy + margin, or what is given; the
    target policy starts as the first policy; H0 is -ELBO less A ln 4, with mmd -ELBO."""
    run = fake(steps=1, polyak=1e-9, margin=2.5)
    for phase in ("behavior", "init"):
        rates = [x[2] for x in run.seen if x[0] == phase]
        fifths = torch.tensor([1e-3, 5e-4, 1e-4, 5e-5, 1e-5]).repeat_interleave(2)
        assert_close(torch.tensor(rates), fifths)
    nets = run.nets
    assert_close(nets.eps, nets.first_d + 2.5)
    assert run.seen[-1][3] == run.seen[-1][4] == nets.eps and nets.first_d > 0
    assert_close(nets.h0, nets.behavior.minus_elbo - 2 * math.log(4))
    for p, t in zip(nets.actor.parameters(), nets.actor_target.parameters()):
        assert_close(p, t, atol=2e-5, rtol=0)
    mean, _ = nets.actor_target(torch.zeros(1, 3)).chunk(2, -1)
    assert_close(run.references["its first policy"], mean.tanh(), atol=1e-4, rtol=0)
    given = fake(eps=7.0, h0=-1.5).nets
    assert (given.eps, given.h0) == (7.0, -1.5)
    nets = fake(divergence="mmd").nets
    assert_close(nets.h0, nets.behavior.minus_elbo)


def test_threshold_is_set_by_epochs(fake, monkeypatch):
    """Mean + population deviation of D over all states of the epoch, from the next one on."""
    values = iter(torch.arange(1.0, 8.0).double())

    def update(nets, opt, data, args):
        d = next(values) * torch.tensor([1.0, 3.0]).double()  # D of a batch of two states
        nets.moments += torch.stack([d.mean(), d.square().mean()])
        return {}

    monkeypatch.setattr(brac_plus, "update", update)
    run = fake(steps=7, epoch_steps=3, eps=9.0)
    found = [x[3] for x in run.seen if x[0] == "train"]
    first, second = (np.array([k * x for k in ks for x in (1, 3)]) for ks in ((1, 2, 3), (4, 5, 6)))
    expected = [9.0] * 2 + [first.mean() + first.std()] * 3 + [second.mean() + second.std()] * 2
    assert np.allclose(found, expected)
    assert_close(run.nets.moments, torch.tensor([14.0, 5 * 49.0]).double())


def test_rewards_become_zero_to_one(fake):
    reward = torch.linspace(-3, 5, 40)
    run = fake(reward=reward.clone())
    assert_close(run.data.reward, (reward + 3) / 8)
    assert_close(fake(reward=torch.full((40,), -2.5)).data.reward, torch.zeros(40))


def test_eps_within_reach_binds(tiny_data):
    """A bandit whose reward rises out of the data: the policy goes until D is about eps."""
    torch.manual_seed(0)
    data = tiny_data(obs_dim=1, act_dim=1, n=400)
    data.obs.fill_(1.0), data.next_obs.fill_(1.0), data.terminal.fill_(1.0)
    data.action = 0.2 * torch.randn(400, 1).clamp(-2, 2)
    data.reward = 10 * data.action[:, 0]
    args = Args(batch_size=32, samples=2, members=1, dual_start=0.5, lam=0.0, **ACML)
    torch.manual_seed(0)
    nets = Nets(data, args)
    opt = optimizers(nets, brac_plus.Adam, 1e-3)
    opt.dual.lr.fill_(1e-2)
    for _ in range(300):
        brac_plus.update_behavior(nets, opt, data, args)
    nets.h0.fill_(nets.behavior.minus_elbo - 0.5)
    for _ in range(300):
        first = brac_plus.update_init(nets, opt, data, args)
    assert first["d"] < 1.0 and abs(nets.actor(data.obs[:1])[0, 0]) < 0.2
    mean, d = {}, {}
    for eps in (1.5, 4.0):
        one = copy.deepcopy(nets)
        one.eps.fill_(eps), one.eps_gp.fill_(eps)
        opt = optimizers(one, brac_plus.Adam, 1e-3)
        opt.dual.lr.fill_(1e-2)
        found = [brac_plus.update(one, opt, data, args) for _ in range(400)]
        assert all(x.isfinite() for m in found for x in m.values())
        d[eps] = sum(m["d_mean"] for m in found[-80:]) / 80
        mean[eps] = one.actor(data.obs[:1])[0, 0].tanh()
    assert 0.15 < mean[1.5] < mean[4.0] < 0.8
    assert abs(d[1.5] - 1.5) < 0.5 and abs(d[4.0] - 4.0) < 1.2


# ---- versions --------------------------------------------------------------------------------


def resolved(fake, *argv):
    """Args of a run with this command line, as the phases see them."""
    args = parse(Args, PRESETS, [*argv, "--bc-steps", "1", "--steps", "1", "--batch-size", "2"])
    values = {k: v for k, v in vars(args).items() if k != "preset"}
    return fake(**values).args


def test_versions(fake, monkeypatch):
    for version, expected in (("iclr", ICLR), ("acml", ACML)):
        args = resolved(fake, "--version", version)
        assert {k: getattr(args, k) for k in expected} == expected
        assert args.eps is args.h0 is None  # the bundled data is no task of the paper
    args = resolved(fake, "--version", "acml", "--backup", "mean", "--eval-policy", "mode")
    assert (args.backup, args.eval_policy, args.penalty) == ("mean", "mode", "soft")
    assert resolved(fake, "--multiplier", "global").multiplier == "global"
    monkeypatch.setitem(PRESETS, "acml kl hopper-replay-*", dict(backup="mean"))
    assert resolved(fake, "--version", "acml").backup == "mean", "later rows win"
    assert resolved(fake, "--version", "acml", "--env", "log.npz").backup == "max"


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
        ("hopper/mixed-v0", None, None, 3.0),
        ("hopper/medium-v0", None, None, 0.2),
        ("halfcheetah/medium-v0", None, None, 0.2),
    ],
)
def test_thresholds_of_tasks(fake, env, eps, h0, margin):
    args = resolved(fake, "--env", env)
    assert (args.eps, args.h0, args.margin) == (eps, h0, margin)
    assert args.divergence == ("mmd" if margin == 0.001 else "kl")
    args = resolved(fake, "--env", env, "--version", "acml")
    assert args.eps is args.h0 is None, "acml measures them"
    assert args.penalty == ("tuned" if args.divergence == "mmd" else "soft")
    args = resolved(fake, "--env", env, "--version", "acml", "--eps", str(eps or 1), "--h0", "2")
    assert (args.eps, args.h0) == (eps or 1, 2), "what is typed wins, the other version's value too"


@pytest.mark.parametrize(
    ("env", "margin"),
    [("hopper-medium-v0", 0.01), ("halfcheetah-medium-v0", 0.06), ("walker2d-random-v0", 0.03)],
)
def test_mmd_has_thresholds_of_its_own(fake, env, margin):
    """KL's would never bind: this D is at most sqrt(2 - 2 exp(-2 A / 120))."""
    args = resolved(fake, "--env", env, "--divergence", "mmd")
    assert args.eps is args.h0 is None and args.margin == margin
    assert args.preset["margin"] == margin, "shown at the start and kept in config.json"


def test_adroit_by_acml_has_a_hard_gate_and_a_growing_lambda(fake):
    args = resolved(fake, "--env", "pen-human-v0", "--version", "acml")
    assert (args.penalty, args.gp_target, args.margin) == ("tuned", 0.005, 0.001)
    assert parse(Args, PRESETS, ["--env", "pen-human-v0"]).steps == 250_000


def test_unknown_version_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(Args, PRESETS, ["--version", "icml"])
    assert "icml" in capsys.readouterr().err


# ---- resume ----------------------------------------------------------------------------------


def test_resume_restores_thresholds_within_an_epoch(tmp_path, monkeypatch):
    """Stopped within the third epoch of 8 steps; buffers and weights equal to the bit."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    ends = np.arange(60) % 20 == 19
    np.savez(
        "log.npz",
        observations=draw.normal(size=(60, 3)).astype(np.float32),
        actions=draw.uniform(-1, 1, (60, 1)).astype(np.float32),
        rewards=draw.normal(size=60).astype(np.float32),
        terminals=ends,
    )

    def start(out, **more):
        short = dict(steps=20, bc_steps=5, epoch_steps=8, batch_size=4, eval_env="none")
        brac_plus.train(Args(env="log.npz", device="cpu", out=out, samples=2, **(short | more)))
        return load_tensors(tmp_path / out / "log__brac_plus__0" / "checkpoint.pt")

    whole, update, calls = start("whole"), brac_plus.update, []

    def stop(*args):
        calls.append(args[0].moments.clone())
        if len(calls) == 18:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(brac_plus, "update", stop)
        with pytest.raises(SystemExit):
            start("parts")
    assert len(calls) == 18 and not calls[8].any() and calls[-1].any()
    parts = start("parts", resume=True)
    assert whole["nets"].keys() == parts["nets"].keys() >= {"eps", "eps_gp", "h0", "moments"}
    assert all(torch.equal(v, parts["nets"][k]) for k, v in whole["nets"].items())
    assert whole["nets"]["eps_gp"] != whole["nets"]["eps"] and whole["nets"]["moments"].any()
    assert Run is brac_plus.Run
