"""arq.py: the diffusion clone against closed forms, Eqs. 4 to 6 by hand, stages and their files."""

import copy
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import arq
import numpy as np
import pytest
import torch
import torch.distributions as D
from arq import Args, Nets, kth_largest, log_likelihood, sample_dpm, sample_pc, schedule
from oracles import SGD, assert_same, in_double, stack
from torch import nn
from torch.testing import assert_close

from common import MLP, Adam, InputError
from experiment import load_tensors

INF = math.inf


def optimizers(nets, optimizer, lr):
    actor = [*nets.actor.parameters(), *([] if nets.log_std is None else [nets.log_std])]
    params = dict(score=nets.score.parameters(), q=nets.q.parameters(), actor=actor)
    return SimpleNamespace(**{k: optimizer(p, lr) for k, p in params.items()})


def make(data, **values):
    """Networks in float64 with biases of size 0.3 and targets of their own."""
    args = Args(**(dict(batch_size=16, width=16, n=4, k=2) | values))
    torch.manual_seed(0)
    nets = Nets(data, args)
    for name, p in nets.named_parameters():
        if "biases" in name:
            nn.init.uniform_(p, -0.3, 0.3)
    nets = nets.double()
    arq.train_data(data, args)
    data.candidates = torch.rand(len(data.obs), args.n, data.action.shape[1] + 1).double() * 2 - 1
    return nets, args


@pytest.fixture
def data(tiny_data):
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def gaussian(mean, std):
    """raw(x, t) of the exact score of N(mean, std^2 I)."""

    def raw(x, t):
        _, m, sigma = schedule(torch.as_tensor(t, dtype=x.dtype))
        return -sigma * (x - m * mean) / (m**2 * std**2 + sigma**2)

    return raw


MEANS = torch.tensor([[1.0] * 6, [-0.7] * 6, [0.8, 0, 0.8, 0, 0.8, 0]]).double()
STDS, WEIGHTS = torch.tensor([0.15, 0.3, 0.2]).double(), torch.tensor([0.5, 0.2, 0.3]).double()


def mixture(t):
    """Three 6-d Gaussians, as they are at time t."""
    _, m, sigma = schedule(torch.tensor(t, dtype=torch.float64))
    std = (m**2 * STDS**2 + sigma**2).sqrt()[:, None].expand(3, 6)
    parts = D.Independent(D.Normal(m * MEANS, std), 1)
    return D.MixtureSameFamily(D.Categorical(probs=WEIGHTS), parts)


def mixture_raw(x, t):
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(mixture(t).log_prob(x).sum(), x, create_graph=True)
    return schedule(torch.tensor(t).double())[2] * grad


# ---- the SDE and its network -----------------------------------------------------------------


def test_schedule_is_that_of_the_paper():
    t, m, sigma, beta = torch.tensor(
        [
            [1e-5, 0.999999, 0.0010005, 0.1002],
            [1e-3, 0.999945, 0.0104854, 0.1199],
            [0.1, 0.946722, 0.322053, 2.09],
            [0.5, 0.281183, 0.959654, 10.05],
            [1, 0.0065716, 0.999978, 20],
        ],
        dtype=torch.float64,
    ).T
    for found, expected in zip(schedule(t), (beta, m, sigma)):
        assert_close(found, expected, atol=1e-6, rtol=5e-5)
    assert_close(m**2 + sigma**2, torch.ones_like(m), atol=1e-5, rtol=0)


def test_grid_is_even_in_lambda():
    points, h = arq.even_grid(1.0, 1e-3, 7)
    t, m, sigma = torch.tensor(points, dtype=torch.float64).T
    assert_close(t[[0, -1]], torch.tensor([1.0, 1e-3]).double(), atol=1e-9, rtol=1e-6)
    assert_close(schedule(t)[1], m)
    assert_close(schedule(t)[2], sigma)
    steps = (m / sigma).log().diff()
    assert_close(steps, torch.full((7,), h).double(), atol=1e-7, rtol=0)
    assert abs(7 * h - (4.558 + 5.025)) < 1e-3


def plain(net, member=None):
    """The score network in nn.Linear layers: f(x, s, t) of t (B, 1)."""
    pick = lambda p: p if member is None else p[member]

    def layer(w, b):
        linear = nn.Linear(*pick(w).shape, dtype=w.dtype)
        linear.weight.data, linear.bias.data = pick(w).detach().T, pick(b).detach().flatten()
        return linear

    first, *hidden, last = [layer(w, b) for w, b in zip(net.layers.weights, net.layers.biases)]
    time = layer(net.time.weights[0], net.time.biases[0])

    def forward(x, s, t):
        angle = 2 * math.pi * t * net.frequencies
        e, h = time(torch.cat([angle.sin(), angle.cos()], 1)), first(torch.cat([x, s], 1))
        for one, two in zip(hidden[::2], hidden[1::2]):
            swish = lambda v: v * torch.sigmoid(v)
            h = h + two(swish(one(swish(h + e)) + e))
        return last(h)

    return forward, [time, first, *hidden, last]


@pytest.mark.parametrize("ensemble", [1, 3])
def test_score_network_is_that_of_plain_layers(data, ensemble):
    nets, _ = make(data, ensemble=ensemble)
    x, s, t = torch.randn(5, 2).double(), torch.randn(5, 3).double(), torch.rand(5, 1).double()
    found = nets.score(x, t, nets.score.context(s))
    one = nets.score(x, 0.3, nets.score.context(s))
    if ensemble == 1:
        found, one = found[None], one[None]
    assert len(nets.score.layers.weights) == 8 and found.shape == (ensemble, 5, 2)
    for e in range(ensemble):
        forward, _ = plain(nets.score, None if ensemble == 1 else e)
        assert_close(found[e], forward(x, s, t))
        assert_close(one[e], forward(x, s, torch.full_like(t, 0.3)))


def test_initial_networks(tiny_data):
    torch.manual_seed(0)
    data = tiny_data(obs_dim=17, act_dim=6)
    nets = Nets(data, Args())
    assert sum(p.numel() for p in nets.score.parameters()) == 468_230
    assert 25 < nets.score.frequencies.std() < 35
    for name in ("score", "q"):
        pairs = zip(getattr(nets, name).parameters(), nets.get_submodule(
            "score_ema" if name == "score" else "q_target").parameters())  # fmt: skip
        for p, t in pairs:
            assert torch.equal(p, t) and p is not t and not t.requires_grad
    assert torch.equal(nets.score.frequencies, nets.score_ema.frequencies)
    for net in (x for x in nets.modules() if isinstance(x, MLP)):
        for w, b in zip(net.weights, net.biases):
            bound = math.sqrt(6 / (w.shape[-1] + w.shape[-2]))
            assert 0.9 * bound < w.abs().max() <= bound and not b.any()


def test_deviations_are_floored(tiny_data):
    data = tiny_data(act_dim=3, n=400)
    data.action[:, 1], data.action[:, 2] = 0.25, 0.02 * data.action[:, 2]
    nets = Nets(data, Args())
    assert_close(nets.a_std, torch.tensor([data.action[:, 0].std(correction=0), 0.05, 0.05]))
    assert_close(nets.s_mean, data.obs.mean(0))


# ---- score matching --------------------------------------------------------------------------


@pytest.mark.parametrize(("std", "floor"), [(1.0, 0.2760), (0.5, 0.1733), (0.1, 0.0416)])
def test_loss_of_the_exact_score_is_its_floor(std, floor):
    torch.manual_seed(0)
    raw = gaussian(0.3, std)

    class Score:
        context = staticmethod(lambda s: s)
        __call__ = staticmethod(lambda x, t, context: raw(x, t))

    a = 0.3 + std * torch.randn(200_000, 2).double()
    loss = arq.score_loss(SimpleNamespace(score=Score()), a, a)
    assert_close(loss / 2, torch.tensor(floor).double(), atol=0.003, rtol=0)


@pytest.mark.parametrize("ensemble", [1, 2])
def test_score_step_by_hand(data, monkeypatch, ensemble):
    nets, args = make(data, ensemble=ensemble)
    opt, before = optimizers(nets, SGD, 0.05), copy.deepcopy(nets)
    data.action[0] = 1.0
    draws, i = [], torch.randperm(16 * ensemble) % 16
    monkeypatch.setattr(arq, "sample", lambda d, n, fields: [getattr(d, f)[i] for f in fields])
    shape = (16, 2) if ensemble == 1 else (2, 16, 2)
    t, z = torch.rand(shape).double()[..., :1], torch.randn(shape).double()
    monkeypatch.setattr(torch, "rand_like", lambda x: draws.append(x.shape) or t)
    monkeypatch.setattr(torch, "randn_like", lambda x: draws.append(x.shape) or z)
    metrics = arq.update_score(nets, opt, data, args)
    assert draws == [t.shape, z.shape]

    losses = []
    for e in range(ensemble):
        rows = i[16 * e : 16 * (e + 1)]
        member = None if ensemble == 1 else e
        forward, layers = plain(before.score, member)
        te, ze = (v if ensemble == 1 else v[e] for v in (t, z))
        te = 1e-5 + (1 - 1e-5) * te
        s = (data.obs - data.obs.mean(0)) / data.obs.std(0, correction=0)
        a = (data.action.clamp(-0.99999, 0.99999) - before.a_mean) / before.a_std
        m = torch.exp(-0.5 * (0.1 * te + 9.95 * te**2))
        x = m * a[rows] + (1 - m**2).sqrt() * ze
        losses.append((forward(x, s[rows], te) + ze).square().sum() / 16)
        losses[-1].backward()
        torch.optim.SGD([p for x in layers for p in x.parameters()], lr=0.05).step()
        score = plain(nets.score, member)[1]
        for found, expected in zip(score, layers):
            assert_close(found.weight, expected.weight, atol=1e-9, rtol=1e-6)
            assert_close(found.bias, expected.bias, atol=1e-9, rtol=1e-6)
    assert_close(metrics["loss_per_dim"], sum(losses).detach() / (2 * ensemble))
    for new, old, ema in zip(
        *(x.parameters() for x in (nets.score, before.score_ema, nets.score_ema))
    ):
        assert_close(ema, 0.999 * old + 0.001 * new, atol=1e-12, rtol=1e-9)
    for name in ("q", "q_target", "actor"):
        pairs = zip(getattr(nets, name).parameters(), getattr(before, name).parameters())
        assert all(torch.equal(p, q) for p, q in pairs)


# ---- samplers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corrector", "std", "low", "high"),
    [
        ("sigma", 1.0, 0.97, 1.03),
        ("sigma", 0.3, 0.97, 1.03),
        ("batch", 0.3, 0.98, 1.04),
        ("sample", 0.3, 1.5, 2.1),
    ],
)
def test_predictor_corrector(corrector, std, low, high):
    """In 3-d the authors' step size spreads samples, the others do not."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 3, generator=draw)
    a = sample_pc(gaussian(0.3, std), x, 500, corrector, draw)
    assert low < a.std() / std < high
    assert abs(a.mean() - 0.3) < 0.03 * max(1, std / 0.3)


def test_predictor_corrector_evaluates_twice_per_step():
    calls = []
    raw = lambda x, t: calls.append(t) or -x
    sample_pc(raw, torch.randn(4, 2), 10, "sigma", torch.Generator().manual_seed(0))
    assert len(calls) == 20 and calls[::2] == calls[1::2]
    assert calls[0] == 1 and abs(calls[-1] - 1e-3) < 1e-9


def test_solver_follows_the_exact_ode():
    """For a Gaussian (x - m mean) / std(t) is constant along the ODE; second order in the step."""
    mean, std, errors = 0.4, 0.3, []
    x = torch.linspace(-3, 3, 41).double()[:, None]
    _, m, sigma = schedule(torch.tensor([1.0, 1e-3]).double())
    width = (m**2 * std**2 + sigma**2).sqrt()
    end = m[1] * mean + width[1] * (x - m[0] * mean) / width[0]
    raw = gaussian(mean, std)
    expected = (end + sigma[1] * raw(end, 1e-3)) / m[1]
    for steps in (20, 40, 80):
        calls = []
        found = sample_dpm(lambda x, t: calls.append(t) or raw(x, t), x, steps)
        assert len(calls) == steps + 1
        errors.append((found - expected).abs().max().item())
    assert errors[0] < 0.05 * std and errors[2] < 0.005 * std
    assert errors[0] / errors[1] > 2.5 and errors[1] / errors[2] > 2.5


def test_solver_finds_three_modes():
    torch.manual_seed(0)
    with torch.no_grad():
        x = sample_dpm(mixture_raw, torch.randn(3000, 6).double(), 20)
    mode = torch.cdist(x, MEANS).argmin(1)
    share = torch.bincount(mode, minlength=3) / 3000
    assert_close(share.double(), WEIGHTS, atol=0.05, rtol=0)
    assert 0.015 < (mixture(0.0).log_prob(x) < -5).double().mean() < 0.055  # exact: 0.0285


# ---- likelihood ------------------------------------------------------------------------------


def test_divergence_is_the_trace_of_the_jacobian(data):
    nets, _ = make(data, ensemble=3)
    s = torch.randn(4, 3).double()
    context = nets.score_ema.context(s)
    raw = lambda x, t: nets.score_ema(x, t, context).mean(0)
    x = torch.randn(4, 2).double()
    eye = torch.eye(2).double().unsqueeze(1)
    found = arq.divergence(raw, x, 0.4, eye)
    jacobian = torch.autograd.functional.jacobian(lambda x: raw(x, 0.4), x)
    exact = torch.stack([jacobian[b, :, b].trace() for b in range(4)])
    assert_close(found, torch.cat([raw(x, 0.4), exact[:, None]], 1))
    assert not found.requires_grad
    torch.manual_seed(0)
    signs = (torch.randint(2, (20_000, 4, 2)) * 2 - 1) / math.sqrt(20_000)
    probed = arq.divergence(raw, x, 0.4, signs[:2000].double() * math.sqrt(10))
    assert_close(probed[:, 2], exact, atol=0.05 * jacobian.abs().max().item() + 0.02, rtol=0)


def test_likelihood_takes_the_steps_that_it_needs():
    """Narrower data, more network evaluations; never more than a fixed grid of RK4 would."""
    torch.manual_seed(0)
    calls = []
    for std in (1.0, 0.3, 0.05):
        exact = gaussian(0.0, std)
        before = len(calls)
        log_likelihood(lambda x, t: calls.append(t) or exact(x, t), std * torch.randn(50, 3))
        calls[before:] = [len(calls) - before]
    assert 25 < calls[0] < calls[1] < calls[2] < 100


@pytest.mark.parametrize("std", [1.0, 0.3, 0.05])
def test_likelihood_of_a_gaussian(std):
    torch.manual_seed(0)
    x = 0.3 + std * torch.randn(200, 3).double()
    expected = D.Normal(0.3, std).log_prob(x).sum(1)
    assert_close(log_likelihood(gaussian(0.3, std), x), expected, atol=0.02, rtol=0)


def test_likelihood_far_from_the_data():
    x = 0.3 + torch.tensor([0.0, 1.0, 2.0, 3.0]).double()[:, None].expand(4, 3)
    found = log_likelihood(gaussian(0.3, 0.3), x)
    expected = torch.tensor([0.855, -15.81, -65.81, -149.14]).double()
    assert_close(found, expected, atol=0.02, rtol=1e-3)


def test_likelihood_of_a_mixture():
    torch.manual_seed(0)
    x = mixture(0.0).sample((150,))
    error = log_likelihood(mixture_raw, x) - mixture(0.0).log_prob(x)
    assert error.abs().mean() < 0.01 and error.abs().max() < 0.1
    wrong = (log_likelihood(mixture_raw, x) > -5) != (mixture(0.0).log_prob(x) > -5)
    assert wrong.sum() <= 1


def test_random_probes_in_many_dimensions(monkeypatch):
    """A Jacobian that is not symmetric: probes agree on average; a diagonal one exactly."""
    x = 0.3 + 0.4 * torch.randn(20, 12).double()
    expected = D.Normal(0.3, 0.4).log_prob(x).sum(1)
    assert_close(log_likelihood(gaussian(0.3, 0.4), x), expected, atol=0.03, rtol=0)
    torch.manual_seed(0)
    x = mixture(0.0).sample((60,))
    exact = log_likelihood(mixture_raw, x)
    monkeypatch.setattr(arq, "EXACT_DIMS", 5)
    error = log_likelihood(mixture_raw, x, torch.Generator().manual_seed(1)) - exact
    assert 1e-3 < error.abs().mean() < 0.3


def test_likelihood_of_what_is_not_finite(monkeypatch):
    x = torch.tensor([[0.0, 0.0], [math.nan, 0.0], [INF, 0.0]]).double()
    found = log_likelihood(gaussian(0.0, 1.0), x)
    assert found[0].isfinite() and (found[1:] == -INF).all()
    endless = lambda x, t: (
        torch.full_like(x, INF) + 0 * x
    )  # no solution, no step that is small enough
    assert (log_likelihood(endless, torch.zeros(2, 2).double()) == -INF).all()
    y = (
        torch.tensor([0.0, 0.0, INF, 0.0, 0.0, 1.0]).double().numpy()[:, None]
    )  # (x, x, log p) twice
    monkeypatch.setattr(arq, "solve_ivp", lambda *_, **__: SimpleNamespace(y=y, success=True))
    found = log_likelihood(gaussian(0.0, 1.0), torch.zeros(2, 2).double())
    assert found[0] == -INF and found[1].isfinite()


def test_trained_network(tiny_data, monkeypatch):
    """a = 0.5 s + 0.2 noise: samples, both samplers' mean and width, and likelihood."""
    monkeypatch.setattr(arq, "TIME_SCALE", 1.0)
    data = tiny_data(obs_dim=1, act_dim=1, n=4096)
    torch.manual_seed(0)
    data.obs = torch.rand(4096, 1) * 2 - 1
    data.action = 0.5 * data.obs + 0.2 * torch.randn(4096, 1)
    args = Args(batch_size=256, width=32, score_lr=3e-3, n=400, filter=True)
    nets = Nets(data, args)
    opt = optimizers(nets, Adam, args.score_lr)
    for t in range(1200):
        opt.score.lr.fill_(args.score_lr * (1 - t / 1200))
        loss = arq.update_score(nets, opt, data, args)["loss_per_dim"]
    for p, q in zip(nets.score_ema.parameters(), nets.score.parameters()):
        p.copy_(q)  # of so few steps the average lags behind
    assert loss < 0.25
    obs = torch.tensor([[-0.8], [0.0], [0.6]])
    drawn = arq.draw(nets, obs, args)
    a, log_prob = drawn[..., 0], drawn[..., 1]
    assert_close(a.mean(1), 0.5 * obs[:, 0], atol=0.05, rtol=0)
    assert_close(a.std(1), torch.full((3,), 0.2), atol=0.04, rtol=0)
    z = D.Normal(0.5 * obs, 0.2).log_prob(a) + nets.a_std.log()
    inside = (a - 0.5 * obs).abs() < 0.35
    assert ((log_prob - z).abs() * inside).sum() / inside.sum() < 0.15
    args.sampler, args.sample_steps, args.filter = "pc", 100, False
    a = arq.draw(nets, obs, args)[..., 0]
    assert_close(a.mean(1), 0.5 * obs[:, 0], atol=0.05, rtol=0)
    assert_close(a.std(1), torch.full((3,), 0.2), atol=0.05, rtol=0)


def test_candidates_are_grouped_by_state_clipped_and_repeatable(data):
    nets, args = make(data, filter=True, ensemble=2)
    nets.a_mean[:] = torch.tensor([2.0, 0.0])
    obs = data.obs[:3]
    one, two = (arq.draw(nets, obs, args, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (3, 4, 3)
    assert one[..., :-1].abs().max() <= 1 and (one[..., 0] == 1).any()
    noise = torch.empty(12, 2).double().normal_(generator=torch.Generator().manual_seed(5))
    members = [plain(nets.score_ema, e)[0] for e in range(2)]
    s = ((obs - nets.s_mean) / nets.s_std)[1:2].expand(4, 3)
    raw = lambda x, t: sum(f(x, s, torch.full_like(x[:, :1], t)) for f in members) / 2
    x = sample_dpm(raw, noise[4:8], args.sample_steps)
    assert_close(one[1, :, :2], (x * nets.a_std + nets.a_mean).clamp(-1, 1))
    assert_close(one[1, :, 2], log_likelihood(raw, x), atol=0.02, rtol=0)  # other steps


# ---- Eq. 5 -----------------------------------------------------------------------------------


def test_kth_largest_by_hand():
    q = torch.tensor([[1.0, 5, 3, 4], [2, 2, 2, 9], [7, 8, 9, 1], [6, 9, 9, 9]])
    keep = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    for k, expected in ((1, [5, 2, 9, 6]), (2, [4, 2, 7, 6]), (3, [3, 2, 7, 6]), (4, [1, 2, 7, 6])):
        assert kth_largest(q, keep, k).tolist() == expected


def values(f, **more):
    """Networks whose target critics are the given function of (s, a), (E, rows)."""
    return SimpleNamespace(
        q_target=lambda s, a, member=None: f(s, a) if member is None else f(s, a)[member],
        **more,
    )


@pytest.mark.parametrize("floor", [True, False])
def test_target_by_hand(floor):
    """Minimum of twins per candidate, then the K-th. Row 0: all count; 1: a terminal; 2: all
    samples are rejected, so the data's action is the K-th; 3: the floor."""
    a2 = torch.tensor([[1.0], [1.0], [3.0], [9.0]])
    samples = torch.tensor([[[5.0], [2.0]], [[5.0], [2.0]], [[50.0], [60.0]], [[1.0], [2.0]]])
    log_prob = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-9.0, -5.0], [-4.9, 0.0]])
    q2 = lambda s, a: torch.stack([a[:, 0], 8 - a[:, 0] + s[:, 0]])
    nets = values(q2, threshold=torch.tensor(-5.0), q=lambda s, a: torch.zeros(2, 4))
    s2, r = torch.tensor([[0.0], [0.0], [0.0], [9.0]]), torch.tensor([0.5, 0.5, 0.0, 0.0])
    terminal = torch.tensor([0.0, 1.0, 0.0, 0.0])
    candidates = torch.cat([samples, log_prob[..., None]], -1)
    args = Args(k=2, gamma=0.9, floor=floor)
    loss, y = arq.critic_loss(nets, s2, s2, r, s2, a2, candidates, terminal, args)
    # row 0: minima 1 (data), 3, 2: second 2. row 3: minima 8 (data), 1, 2: second 2, floor 8
    expected = torch.tensor([0.5 + 0.9 * 2, 0.5, 0.9 * 3, 0.9 * (8 if floor else 2)])
    assert_close(y, expected.mean())
    assert_close(loss, expected.square().mean())


def test_order_of_minimum_and_kth_matters():
    """Twins (4, 1, 3) and (1, 4, 2): the second largest minimum is 1, the minimum of both seconds
    is 2."""
    q2 = lambda s, a: torch.tensor([[4.0, 1, 3], [1.0, 4, 2]])
    nets = values(q2, threshold=torch.tensor(-1e9), q=lambda s, a: torch.zeros(2, 1))
    s, zero = torch.zeros(1, 1), torch.zeros(1)
    call = nets, s, s, zero, s, s, torch.zeros(1, 2, 2), zero
    _, y = arq.critic_loss(*call, Args(k=2, gamma=1.0, floor=False))
    assert y == 1


def test_sarsa_sees_the_datas_action_only(data):
    nets, args = make(data, value="sarsa")
    assert len(nets.q.weights[0]) == 1
    nan = torch.full((16, 4, 3), math.nan).double()
    rows = data.obs, data.action, data.reward, data.next_obs, data.action.flip(0)
    loss, y = arq.critic_loss(nets, *rows, nan, data.terminal, args)
    q2 = stack(nets.q_target, 0)(torch.cat([data.next_obs, data.action.flip(0)], 1))[:, 0]
    expected = data.reward + 0.99 * (1 - data.terminal) * q2
    q = stack(nets.q, 0)(torch.cat([data.obs, data.action], 1))[:, 0]
    assert_close(y, expected.mean())
    assert_close(loss, 0.5 * (q - expected).square().mean())


def test_rows_of_q(tiny_data):
    """Episodes end at rows 5 (terminal) and 11 (time limit): the last has no next action."""
    data = tiny_data(n=12)
    reward = data.reward.clone()
    arq.train_data(data, Args(normalize_reward=True, reward_shift=-1.0))
    assert data.rows.tolist() == list(range(11))
    assert data.columns[4][data.rows].tolist() == [1, 2, 3, 4, 5, 5, 7, 8, 9, 10, 11]
    spread = data.episode_return.max() - data.episode_return.min()
    assert_close(data.columns[2], reward * 1000 / spread - 1)
    assert data.columns[2] is data.reward, "the bound of attainable returns knows its scale"


def test_data_without_next_actions(tiny_data):
    data = tiny_data(n=4)
    data.terminal[:], data.episode = 0, torch.arange(4)
    with pytest.raises(InputError, match=r"tiny: no row has a next action"):
        arq.train_data(data, Args())
    data.terminal[2] = 1
    data.episode_return[:] = 3.0  # no spread: rewards stay
    arq.train_data(data, Args(normalize_reward=True))
    assert data.rows.tolist() == [2] and torch.equal(data.columns[2], data.reward)


def test_critic_step_by_hand(data, monkeypatch):
    nets, args = make(data, filter=True, threshold=-0.2, polyak=0.1)
    with torch.no_grad():
        for p in nets.q_target.parameters():
            p.mul_(1.1)
    opt, before = optimizers(nets, SGD, 0.05), copy.deepcopy(nets)
    i = data.rows[torch.arange(14) % len(data.rows)]
    monkeypatch.setattr(torch, "randint", lambda n, shape, device: torch.arange(14) % n)
    arq.update_q(nets, opt, data, args)
    q = [stack(before.q, e) for e in range(2)]
    target = [stack(before.q_target, e) for e in range(2)]
    y = []
    for row in i.tolist():
        value, nxt = 0.0, row + 1
        if not data.terminal[row]:
            kept = data.candidates[nxt][data.candidates[nxt][:, -1] > -0.2][:, :-1]
            rows = torch.cat([data.action[nxt][None], kept])
            rows = torch.cat([data.obs[nxt].expand(len(rows), 3), rows], 1)
            low = torch.minimum(*(f(rows)[:, 0] for f in target)).detach()
            value = max(low.sort(descending=True).values[min(args.k, len(low)) - 1], low[0])
        y.append(data.reward[row] + 0.99 * value)
    y = torch.stack(y)
    for f in q:
        out = f(torch.cat([data.obs, data.action], 1)[i])[:, 0]
        (0.5 * (out - y).square().mean()).backward()
        torch.optim.SGD(f.parameters(), lr=0.05).step()
    assert_same(nets.q, *q)
    for new, old, t in zip(*(x.parameters() for x in (nets.q, before.q_target, nets.q_target))):
        assert_close(t, 0.9 * old + 0.1 * new, atol=1e-12, rtol=1e-9)


# ---- policies --------------------------------------------------------------------------------


def test_advantage_by_hand():
    """Q = 10 a of the first critic; the second row has one sample left."""
    nets = values(
        lambda s, a: torch.stack([10 * a[:, 0], 0 * a[:, 0]]), threshold=torch.tensor(0.0)
    )
    a = torch.tensor([[0.5], [0.5]])
    candidates = torch.tensor([[[0.1, 1.0], [0.3, 1.0]], [[0.9, -1.0], [0.3, 1.0]]])
    found = arq.advantage(nets, torch.zeros(2, 1), a, candidates)
    assert_close(found, torch.tensor([5 - 3.0, 5 - 4.0]))


def test_softmax_of_q_is_that_of_the_advantage():
    q = torch.randn(5, 30).double() * 20
    advantage = q - q.mean(1, keepdim=True)
    assert_close((3 * q).softmax(1), (3 * advantage).softmax(1), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("pi", ["gaussian", "deterministic", "resnet"])
def test_policy_step_by_hand(data, monkeypatch, pi):
    nets, args = make(data, pi=pi, alpha_pi=2.0)
    data.advantage = torch.linspace(-2, 5, 16).double()
    opt, before = optimizers(nets, SGD, 0.001), copy.deepcopy(nets)
    monkeypatch.setattr(torch, "randint", lambda n, shape, device: torch.arange(n))
    metrics = arq.update(nets, opt, data, args)
    weight = torch.tensor([min(math.exp(2 * x), 100.0) for x in data.advantage]).double()
    if pi == "resnet":
        w, b = before.actor.layers.weights, before.actor.layers.biases
        assert [x.shape[-1] for x in w] == [2048] * 9 + [2]
        h = data.obs @ w[0] + b[0]
        for j in range(1, 9, 2):
            h = h + (((h.relu() @ w[j] + b[j]).relu()) @ w[j + 1] + b[j + 1])
        out, oracle = h @ w[9] + b[9], None
    else:
        oracle = stack(before.actor)
        out = oracle(data.obs)
    if pi == "gaussian":
        log_std = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        log_prob = D.Normal(out.tanh(), log_std.exp()).log_prob(data.action).sum(1)
        expected = -(weight * log_prob).mean()
    else:
        expected = 0.5 * (weight * (out - data.action).square().mean(1)).mean()
    assert_close(metrics["pi_loss"], expected.detach())
    assert_close(metrics["weight"], weight.mean())
    assert_close(metrics["capped"], (weight == 100).float().mean())
    if oracle:
        expected.backward()
        torch.optim.SGD(oracle.parameters(), lr=0.001).step()
        assert_same(nets.actor, oracle)
    if pi == "gaussian":
        assert_close(nets.log_std.detach(), -0.001 * log_std.grad)
    for name in ("q", "q_target", "score", "score_ema"):
        pairs = zip(getattr(nets, name).parameters(), getattr(before, name).parameters())
        assert all(torch.equal(p, q) for p, q in pairs)
    a = arq.policy(nets, 100 * data.obs, args)
    assert a.abs().max() <= 1 and a.shape == (16, 2)


def fixed_draw(monkeypatch, a, log_prob):
    rows = torch.cat([a, log_prob[..., None]], -1)
    monkeypatch.setattr(arq, "draw", lambda nets, s, args, generator=None: rows)


def implicit(monkeypatch, a, log_prob, alpha, low=-2.0, high=6.0, threshold=-5.0):
    """Actions of the implicit policy with Q_1 = s + a and Q_2 = -a."""
    fixed_draw(monkeypatch, a, log_prob)
    scaling = SimpleNamespace(obs=lambda obs: obs, action=lambda a: (low + high) / 2 + 4 * a)
    nets = values(
        lambda s, a: torch.stack([s[:, 0] + a[:, 0], -a[:, 0]]),
        threshold=torch.tensor(threshold),
        scaling=scaling,
    )
    obs = torch.randn(len(a), 1)
    return (arq.implicit_policy(nets, obs, Args(n=a.shape[1], alpha=alpha)) - 2) / 4


def test_implicit_policy_is_greedy_among_the_kept(monkeypatch):
    a = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])[..., None]
    log_prob = torch.tensor([[0.0, 0.0, 0.0], [0.0, -6.0, 0.0], [-7.0, -9.0, -6.0]])
    found = implicit(monkeypatch, a, log_prob, alpha=1e6)
    assert_close(found, torch.tensor([[0.9], [0.5], [0.5]]))  # row 3: none is kept, the likeliest


def test_implicit_policy_is_a_softmax(monkeypatch):
    torch.manual_seed(0)
    a = torch.tensor([-0.5, 0.0, 0.5])[None, :, None].expand(6000, 3, 1)
    for alpha in (0.0, 2.0):
        found = implicit(monkeypatch, a, torch.zeros(6000, 3), alpha)[:, 0]
        share = torch.stack([(found - x).abs().lt(1e-4).float().mean() for x in a[0, :, 0]])
        expected = torch.softmax(alpha * a[0, :, 0], 0)
        assert_close(share, expected, atol=0.03, rtol=0)


def test_clone_alone_needs_no_q_and_no_filter(data):
    nets, args = make(data, n=1)
    with torch.no_grad():
        for p in nets.q_target.parameters():
            p.zero_()
    torch.manual_seed(3)
    found = arq.implicit_policy(nets, data.obs, args)
    torch.manual_seed(3)
    assert_close(found, arq.draw(nets, data.obs, args)[:, 0, :-1])


# ---- what the constraint is for --------------------------------------------------------------


def test_bandit(tiny_data, monkeypatch):
    """Two modes at -0.5 (70 %) and 0.4 (30 %), reward a: the best action inside the support is at
    0.4, while Q is largest at 1, where there is no data."""
    monkeypatch.setattr(arq, "TIME_SCALE", 1.0)
    data = tiny_data(obs_dim=1, act_dim=1, n=1000)
    torch.manual_seed(0)
    left = torch.rand(1000, 1) < 0.7
    data.action = torch.where(left, -0.5, 0.4) + 0.04 * torch.randn(1000, 1)
    data.obs[:], data.next_obs[:], data.terminal[:] = 0, 0, 1
    data.reward = data.action[:, 0].clone()
    args = Args(batch_size=128, width=32, n=10, k=1, alpha=50.0, alpha_pi=20.0)
    args.sample_steps = 15
    nets = Nets(data, args)
    arq.train_data(data, args)
    opt = optimizers(nets, Adam, 2e-3)
    for _ in range(700):
        arq.update_score(nets, opt, data, args)
    nets.score_ema.load_state_dict(nets.score.state_dict())
    data.candidates = arq.draw(nets, data.obs[:1], args).expand(1000, -1, -1)
    for _ in range(250):
        arq.update_q(nets, opt, data, args)
    nets.q_target.load_state_dict(nets.q.state_dict())
    data.advantage = arq.advantage(nets, data.obs, data.action, data.candidates)
    opt.actor.lr.fill_(1e-2)
    for _ in range(150):
        arq.update(nets, opt, data, args)
    grid = torch.linspace(-1, 1, 201)[:, None]
    free = grid[nets.q_target(torch.zeros(201, 1), grid, member=0).argmax()]
    assert free > 0.9, "without the constraint, Q is maximal where no data is"
    a = arq.implicit_policy(nets, torch.zeros(50, 1), args)
    assert ((a - 0.4).abs() < 0.2).float().mean() > 0.9
    assert abs(arq.policy(nets, torch.zeros(1, 1), args).item() - 0.4) < 0.12


def test_masked_value_iteration():
    """Finite support, K = 1, no floor: the fixed point is that of value iteration over the support
    alone; a forbidden action of high value changes nothing."""
    torch.manual_seed(0)
    reward, follow = torch.rand(4, 3), torch.randint(4, (4, 3))
    allowed = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 1, 1]]).bool()
    reward[~allowed] = 50.0
    q = torch.zeros(4, 3)
    for _ in range(200):
        candidates = torch.arange(3.0).expand(12, 3)
        s2 = follow.flatten()[:, None].float()
        table = lambda s, a: q[s[:, 0].long(), a[:, 0].long()].expand(2, -1)
        nets = values(table, threshold=torch.tensor(0.0))
        rows = torch.stack([candidates, allowed[follow.flatten()].float()], -1)
        out, keep = arq.support_values(nets, s2, torch.zeros(12, 1), rows)
        q = (reward.flatten() + 0.9 * kth_largest(out.amin(0), keep, 1)).view(4, 3)
    expected = torch.zeros(4, 3)
    for _ in range(200):
        v = expected.masked_fill(~allowed, -INF).amax(1)
        expected = reward + 0.9 * v[follow]
    assert_close(q, expected)


# ---- stages and their files ------------------------------------------------------------------


def write_log(constant=False, same_state=False):
    rng = np.random.default_rng(0)
    ends = np.arange(120) % 30 == 29
    actions = rng.uniform(-0.9, 0.9, (120, 2)).astype(np.float32)
    if constant:
        actions[:, 1] = 0.25
    ended = ends & (np.arange(120) < 60)
    np.savez(
        "log.npz",
        observations=rng.normal(size=(120, 3)).astype(np.float32) * (not same_state),
        actions=actions,
        rewards=rng.normal(size=120).astype(np.float32),
        terminals=ended,
        timeouts=ends & ~ended,
    )


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["arq.py"])
    monkeypatch.setattr(arq, "CHUNK", 16)  # 8 chunks
    write_log()
    short = dict(env="log.npz", device="cpu", eval_env="none", seed=3, batch_size=8, width=16)
    short |= dict(steps=4, q_steps=5, score_steps=6, n=3, k=2, sample_steps=5)
    return lambda **flags: arq.train(Args(**(short | flags)))


def count(monkeypatch, name):
    calls, real = [], getattr(arq, name)
    monkeypatch.setattr(arq, name, lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def weights(name):
    return load_tensors(Path("runs") / f"log__arq-{name}__3" / "checkpoint.pt")["nets"]


def files(kind):
    return sorted(Path("runs/cache").glob(f"*__{kind}__*"))


def test_stages_are_shared_by_runs_of_equal_settings(start, monkeypatch):
    draws, scores, qs = (count(monkeypatch, x) for x in ("draw", "update_score", "update_q"))
    start(name="first")
    assert (len(draws), len(scores), len(qs)) == (8, 6, 5)
    start(name="second", alpha_pi=3.0)
    assert (len(draws), len(scores), len(qs)) == (8, 6, 5)
    for p, q in ((weights("first"), weights("second")),):
        assert all(torch.equal(p[k], q[k]) for k in p if k.startswith(("q_target", "score_ema")))
        assert not torch.equal(p["actor.weights.0"], q["actor.weights.0"])
    for more, expected in (  # further draws, score steps and q steps
        (dict(k=3), (0, 0, 5)),
        (dict(value="sarsa"), (0, 0, 5)),
        (dict(reward_shift=-1.0), (0, 0, 5)),
        (dict(n=4), (8, 0, 5)),
        (dict(sample_steps=6), (8, 0, 5)),
        (dict(sampler="pc"), (8, 0, 5)),
        (dict(filter=True), (8, 0, 5)),
        (dict(filter=True, threshold=-9.0), (0, 0, 5)),
        (dict(score_lr=3e-3), (8, 6, 5)),
        (dict(seed=4), (8, 6, 5)),
        (dict(value="none"), (0, 0, 0)),
    ):
        before = len(draws), len(scores), len(qs)
        start(name="-".join(map(str, more.values())), **more)
        after = len(draws), len(scores), len(qs)
        assert tuple(b - a for a, b in zip(before, after)) == expected, more
    assert len(files("samples")) == 7 and len(files("score")) == 3


def test_last_stage_to_run(start, monkeypatch):
    qs, policies = count(monkeypatch, "update_q"), count(monkeypatch, "update")
    for until, expected in (
        ("score", (0, 0)),
        ("sample", (0, 0)),
        ("q", (5, 0)),
        ("train", (5, 4)),
    ):
        start(name=until, until=until)
        assert (len(qs), len(policies)) == expected
        assert bool(files("samples")) == (until != "score")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_interrupted_sampling_continues(start, monkeypatch, how):
    start(name="whole", out="other")
    real, calls = arq.draw, []

    def draw(*args):
        calls.append(1)
        if len(calls) == 4 and how == "killed":
            raise Killed
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(arq, "draw", draw)
    with pytest.raises(Killed if how == "killed" else SystemExit):
        start(name="whole")
    monkeypatch.setattr(arq, "draw", real)
    draws = count(monkeypatch, "draw")
    start(name="whole", resume=True)
    assert len(draws) == (5 if how == "killed" else 4)
    one, two = (Path(x, "log__arq-whole__3", "checkpoint.pt") for x in ("runs", "other"))
    one, two = load_tensors(one)["nets"], load_tensors(two)["nets"]
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (
        files("samples")[0].read_bytes()
        == next(Path("other/cache").glob("*__samples__*")).read_bytes()
    )


def test_every_chunk_has_noise_of_its_own(start):
    write_log(same_state=True)
    start(until="sample", n=40)
    size = 118 * 40 * 3
    samples = np.fromfile(files("samples")[0], np.float32)
    assert len(samples) == size + 8 and (samples[size:] == 1).all()
    first = samples[:size].reshape(118, 120)[::16]  # a state of each chunk
    assert len(np.unique(first, axis=0)) == 8


def test_samples_that_are_gone_are_drawn_again(start, monkeypatch):
    start(name="whole", out="other")
    real, calls = arq.update_q, []

    def update_q(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(arq, "update_q", update_q)
        start(name="whole")
    files("samples")[0].unlink()
    draws = count(monkeypatch, "draw")
    start(name="whole", resume=True)
    assert len(draws) == 8
    other = load_tensors(Path("other/log__arq-whole__3/checkpoint.pt"))["nets"]
    assert all(torch.equal(v, other[k]) for k, v in weights("whole").items())


def test_no_room_for_samples(start, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(InputError, match=r"--out runs: No space left on device; give another"):
        start()


def test_threshold_is_a_quantile_of_the_datas_likelihood(start):
    start(name="fixed", filter=True, threshold=-1.5)
    start(name="low", filter=True, ll_quantile=0.1)
    start(name="high", filter=True, ll_quantile=0.9)
    start(name="off")
    fixed, low, high, off = (weights(x)["threshold"] for x in ("fixed", "low", "high", "off"))
    assert fixed == -1.5 and off < -1e8 and low < high and low.isfinite()


def test_every_sample_is_rejected(start, monkeypatch):
    """A threshold that nothing passes leaves the data's actions: SARSA with twins, by the floor or
    without it."""
    seen, real = [], arq.kth_largest
    monkeypatch.setattr(
        arq, "kth_largest", lambda q, keep, k: seen.append((q, keep)) or real(q, keep, k)
    )
    for floor in (True, False):
        start(name=f"none-{floor}", filter=True, threshold=1e9, floor=floor)
    assert seen and all(keep.sum() == len(keep) and keep[:, 0].all() for _, keep in seen)
    one, two = weights("none-True"), weights("none-False")
    assert all(v.isfinite().all() for v in one.values())
    for k in (k for k in one if k.startswith(("q_target", "actor"))):
        assert torch.equal(one[k], two[k])


def test_constant_action_dimension(start):
    write_log(constant=True)
    start(name="constant", filter=True, until="train")
    assert all(v.isfinite().all() for v in weights("constant").values())
    samples = np.fromfile(files("samples")[0], np.float32)[: 118 * 3 * 3].reshape(118, 3, 3)
    assert np.isfinite(samples).all()
    assert abs(weights("constant")["a_std"][1] - 0.05) < 1e-6


def test_more_than_the_candidates(start, tmp_path):
    with pytest.raises(InputError, match=r"--k 9 of N \+ 1 = 4 candidates: lower it or raise --n"):
        start(k=9)
    assert not Path("runs").exists()
    start(k=4)
    start(name="sarsa", k=9, value="sarsa")


def test_presets_are_the_papers():
    from common import parse

    def args(env):
        return parse(Args, arq.PRESETS, ["--env", env])

    for env in ("hopper-medium-v2", "mujoco/walker2d/expert-v0"):
        a = args(env)
        assert (a.batch_size, a.n, a.k, a.q_lr, a.alpha, a.score_steps) == (
            512, 30, 9, 3e-4, 1, 1_000_000)  # fmt: skip
        assert a.filter and a.normalize_reward and a.pi == "gaussian" and a.ensemble == 1
    for env in ("pen-human-v0", "D4RL/relocate/cloned-v2"):
        a = args(env)
        assert (a.k, a.q_lr, a.alpha, a.alpha_pi, a.score_steps, a.ensemble) == (
            9, 1e-4, 10, 10, 300_000, 3)  # fmt: skip
    assert not args("D4RL/pointmaze/large-v2").filter
    for env in ("antmaze-large-play-v0", "D4RL/antmaze/umaze-v1"):
        a = args(env)
        assert (a.k, a.q_lr, a.alpha, a.reward_shift, a.pi) == (3, 3e-4, 10, -1, "deterministic")
    for env in ("kitchen-partial-v0", "D4RL/kitchen/mixed-v2"):
        a = args(env)
        assert (a.k, a.q_lr, a.alpha, a.score_steps, a.ensemble) == (9, 1e-4, 1, 300_000, 1)
    a, b = args("robomimic/can-mg"), args("robomimic/can-ph")
    assert (a.alpha, a.alpha_pi, a.score_steps, a.pi, a.steps) == (
        1,
        10,
        1_000_000,
        "resnet",
        300_000,
    )
    assert (b.alpha, b.alpha_pi, b.score_steps, b.ensemble) == (0.1, 0.1, 150_000, 3)
    for env in ("hopper-replay-demo", "hopper/medium-v0", "pointmaze/medium-v0", "door/human-v0"):
        a = args(env)
        assert (a.n, a.k, a.width, a.filter, a.batch_size) == (10, 3, 128, False, 256)
