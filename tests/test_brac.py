"""brac.py: divergences, the value penalty, both multipliers, known optima."""

import math
from types import SimpleNamespace

import brac
import itrpo
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import torch
import torch.distributions as D
from brac import MAX_X, Args, Nets, actor_loss, critic_loss, draw, gaussian, log_ratio
from brac import sampled_divergence as divergence
from golden.tools import Inject
from oracles import SGD, in_double, rows, stack
from stand_in import PlainRun
from torch.testing import assert_close

from common import Adam, Data, orthogonal_

BOUND = 1 - 1e-3  # actions are clipped to it where log b is evaluated


def optimizers(nets, optimizer, lr):
    return SimpleNamespace(
        behavior=optimizer(nets.behavior.parameters(), lr),
        bc_weight=optimizer([nets.bc_weight], lr),
        q=optimizer(nets.q.parameters(), lr),
        actor=optimizer(nets.actor.parameters(), lr),
        alpha=optimizer([nets.alpha], lr),
    )


@pytest.fixture
def data(tiny_data):
    """Two action dimensions, everything in float64."""
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def make(data, **values):
    """Networks in float64 with outputs of size one, a target that differs, and a policy whose first
    action is often beyond the clip of log b."""
    args = Args(batch_size=16, **values)
    torch.manual_seed(0)
    nets = Nets(data, args)
    for net in (nets.behavior, nets.actor, nets.q, nets.q_target):
        orthogonal_(net, 1.0, 0.5)
    nets.actor.biases[-1].data[0] = 3.7
    return nets.double(), args


def pair(mean, log_std):
    """A policy's mean and log-std, (B, A) in float64, from nested lists."""
    return torch.tensor(mean).double(), torch.tensor(log_std).double()


PI = pair([[0.3, -0.5], [1.0, 0.0]], [[-1.0, -0.4], [-0.2, -2.0]])
B = pair([[0.0, -0.2], [0.6, 0.1]], [[-0.5, -0.8], [-0.3, -1.0]])


def squashed(mean, log_std):
    """torch's own distribution of the action."""
    return D.TransformedDistribution(D.Normal(mean, log_std.exp()), D.TanhTransform())


# ---- networks --------------------------------------------------------------------------------


def test_log_std_is_squashed_between_minus_5_and_0():
    out = torch.tensor([[1.0, 2.0, 3.0, -50.0, 0.0, 50.0]])
    mean, log_std = gaussian(lambda s: out, None)
    assert torch.equal(mean, out[:, :3])
    assert_close(log_std, torch.tensor([[-5.0, -2.5, 0.0]]))
    between = gaussian(lambda s: out / 50, None)[1][0, 2]
    assert_close(between, torch.tensor(2.5 * math.tanh(1) - 2.5))


def test_initial_networks(data):
    torch.manual_seed(0)
    nets = Nets(data, Args(alpha=0.7))
    widths = {k: [w.shape[-2:] for w in getattr(nets, k).weights] for k in ("behavior", "actor")}
    assert widths["behavior"] == widths["actor"] == [(3, 200), (200, 200), (200, 4)]
    assert [tuple(w.shape) for w in nets.q.weights] == [(2, 5, 300), (2, 300, 300), (2, 300, 1)]
    for net in (nets.behavior, nets.actor, nets.q):
        for w, b in zip(net.weights, net.biases):
            bound = math.sqrt(6 / sum(w.shape[-2:]))  # Glorot's
            assert 0.98 * bound < w.abs().max() <= bound and abs(w.mean()) < 0.2 * bound
            assert not b.any()
    assert not torch.equal(*nets.q.weights[0])
    assert_close(nets.alpha.item(), 0.7) and nets.bc_weight == 1


# ---- divergences -----------------------------------------------------------------------------


def test_log_ratio_is_that_of_torchs_densities():
    x = torch.linspace(-3.7, 3.7, 30).double().view(15, 1, 2).expand(15, 2, 2)
    expected = squashed(*PI).log_prob(x.tanh()) - squashed(*B).log_prob(x.tanh())
    assert_close(log_ratio(x, PI, B), expected.sum(-1))
    assert_close(log_ratio(x[3], PI, B), expected.sum(-1)[3])


@pytest.mark.parametrize("sign", [-1, 1])
def test_behavior_density_is_that_of_the_clipped_action(sign):
    """Beyond |a| = 0.999 log b stays what it is there, log pi goes on."""
    x = (sign * torch.tensor([[3.9, 5.0], [7.0, 0.5]]).double()).requires_grad_()
    a = x.tanh()
    expected = squashed(*PI).log_prob(a) - squashed(*B).log_prob(a.clamp(-BOUND, BOUND))
    assert_close(log_ratio(x, PI, B), expected.sum(-1), rtol=1e-6, atol=1e-6)
    fixed = [tuple(p.detach() for p in pi) for pi in (PI, B)]
    (grad,) = torch.autograd.grad(log_ratio(x, *fixed).sum(), x)
    (of_pi,) = torch.autograd.grad(squashed(*PI).log_prob(x.tanh()).sum(), x)
    inside = x.abs() < MAX_X
    assert_close(grad[~inside], of_pi[~inside], rtol=1e-6, atol=1e-6)
    assert inside.sum() == 1 and not torch.allclose(grad[inside], of_pi[inside])


def test_sampled_kl_is_that_of_the_gaussians():
    """tanh is one to one, so the KL is that before it; unbiased for any number of samples."""
    torch.manual_seed(0)
    exact = D.kl_divergence(*(D.Normal(m, s.exp()) for m, s in (PI, B))).sum(-1)
    n = 40_000
    ratios = log_ratio(draw(PI, n), PI, B)  # (n, 2)
    error = ratios.std(0) / math.sqrt(n)
    assert ((ratios.mean(0) - exact).abs() < 4 * error).all() and (error < 0.01 * exact).all()
    x = draw(PI, 4)
    estimate = divergence(x, PI, B, Args())
    by_hand = squashed(*PI).log_prob(x.tanh()) - squashed(*B).log_prob(x.tanh())
    assert_close(estimate, by_hand.sum(-1).mean(0))
    assert not divergence(draw(B, 4), B, B, Args()).any()


def test_gradient_of_the_kl_is_that_of_its_closed_form():
    """With standard normal quantiles as noise the estimate is the integral."""
    n = 2000
    noise = torch.from_numpy(scipy.stats.norm.ppf((np.arange(n) + 0.5) / n))[:, None, None]
    pi = [p[:, :1].clone().requires_grad_() for p in PI]
    b = [p[:, :1] for p in B]
    x = pi[0] + pi[1].exp() * noise
    found = torch.autograd.grad(divergence(x, pi, b, Args()).sum(), pi)
    exact = D.kl_divergence(D.Normal(pi[0], pi[1].exp()), D.Normal(b[0], b[1].exp())).sum()
    assert_close(found, torch.autograd.grad(exact, pi), rtol=0.01, atol=0.005)


def test_mmd_is_a_double_sum():
    torch.manual_seed(0)
    a, b = torch.rand(2, 4, 3, 2).double() * 2 - 1
    expected = torch.zeros(3).double()
    for sign, u, v in ((1, a, a), (1, b, b), (-2, a, b)):
        for i in range(4):
            for j in range(4):
                for row in range(3):
                    distance = sum(abs(u[i, row, d] - v[j, row, d]).item() for d in range(2))
                    expected[row] += sign * math.exp(-distance / 0.7) / 16
    assert_close(brac.mmd(a, b, Args(sigma=0.7)), expected)
    assert_close(brac.mmd(b, a, Args(sigma=0.7)), expected)
    assert not brac.mmd(a, a, Args()).any() and (expected > 0).all()
    one = brac.mmd(torch.zeros(1, 1, 2), torch.tensor([[[0.25, -0.75]]]), Args())
    assert_close(one, torch.tensor([2 - 2 * math.exp(-1 / 20)]))  # not its root


def test_mmd_compares_actions_of_both_policies():
    """Samples of the clone are drawn for it, as many, and squashed; identical ones are no NaN."""
    args = Args(divergence="mmd")
    torch.manual_seed(0)
    x, noise = draw(PI, 3), torch.randn(3, 2, 2).double()
    expected = brac.mmd(x.tanh(), (B[0] + B[1].exp() * noise).tanh(), args)
    with Inject(randn_like=[noise]):
        assert_close(divergence(x, PI, B, args), expected)
    mean = B[0].clone().requires_grad_()
    with Inject(randn_like=[noise, noise]):
        d = divergence(draw((mean, B[1]), 3), None, B, args)
    assert not d.any()
    assert torch.autograd.grad(d.sum(), mean)[0].isfinite().all()


# ---- critics and policy ----------------------------------------------------------------------


def test_value_is_the_mean_over_samples_then_the_minimum_over_critics():
    x, s = torch.randn(3, 2, 1).double(), torch.tensor([[10.0], [20.0]]).double()
    seen = []

    def q(s, a):
        seen.append((s, a))
        return torch.tensor([[1.0, 2.0, 5.0, 0.0], [2.0, 9.0, 3.0, -5.0]]).double()  # rows j B + b

    value = brac.policy_value(q, s, x, Args(samples=3, q_samples=2))
    assert_close(value, torch.tensor([2.5, 1.0]).double())  # min of means (3, 2.5) and (1, 2)
    assert torch.equal(seen[0][0].flatten(), torch.tensor([10.0, 20.0, 10.0, 20.0]).double())
    assert torch.equal(seen[0][1].flatten(), x[:2].tanh().flatten())


def fixed_nets(alpha=0.5):
    """N(1, e^-2.5) against N(1 - e^-2.5, e^-2.5) everywhere: at x = 1 log pi - log b is 1/2."""
    out = lambda mean: lambda s: torch.tensor([[mean, 0.0]]).double().expand(len(s), 2)
    q2 = torch.tensor([[4.0, 7.0, 2.0], [6.0, 5.0, 3.0]]).double()
    return SimpleNamespace(
        actor=out(1.0),
        behavior=out(1.0 - math.exp(-2.5)),
        q_target=lambda s, a: q2.repeat(1, len(a) // 3),
        q=lambda s, a: torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]).double(),
        alpha=torch.tensor(alpha).double(),
    )


@pytest.mark.parametrize("value_penalty", [True, False])
def test_target_by_hand(value_penalty):
    """Rows: an ordinary one, a terminal, a time limit (which bootstraps like the first)."""
    r, terminal = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([0.0, 1.0, 0.0]).double()
    s, args = torch.zeros(3, 1).double(), Args(gamma=0.9, value_penalty=value_penalty)
    d = 0.5 * 0.5 if value_penalty else 0.0
    y = torch.tensor([1 + 0.9 * (4 - d), 2, 3 + 0.9 * (2 - d)]).double()
    q = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]).double()
    with Inject(randn_like=[torch.zeros(4, 3, 1).double()]):
        loss, q_mean, y_mean = critic_loss(fixed_nets(), s, s, r, s, terminal, args)
    assert_close(loss, (q - y).square().sum() / 3)
    assert_close(q_mean, torch.tensor(1.5).double())
    assert_close(y_mean, y.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_itrpo_without_shaping_is_brac_v(data, dtype):
    """tau = 0, no bonus, no penalty, as many samples for Q: the same losses to the bit, and the
    same gradients. iTRPO bounds log-stds otherwise, so its networks say what BRAC's mean."""
    nets, args = make(data, alpha=0.6, samples=5, q_samples=5)
    nets.actor.biases[-1].data[0] = 0.5  # below the clip, which is BRAC's alone
    nets, batch = nets.to(dtype), [x.to(dtype) for x in rows(data)]
    s, rho = batch[0], torch.zeros(16).to(dtype)
    same = SimpleNamespace(
        actor=lambda s: torch.cat(gaussian(nets.actor, s), -1),
        behavior=lambda s: torch.cat(gaussian(nets.behavior, s), -1),
        q=nets.q,
        q_target=nets.q_target,
    )
    other = itrpo.Args(kl_coef=nets.alpha.item(), shape_coef=0.0, bonus=0.0, samples=5)
    other.ratio_min, other.ratio_max = -math.inf, math.inf

    torch.manual_seed(3)
    ours, *_ = critic_loss(nets, *batch, args)
    torch.manual_seed(3)
    theirs, *_ = itrpo.critic_loss(same, *batch, rho, other)
    assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(x, list(nets.q.parameters())) for x in (ours, theirs)]
    assert all(map(torch.equal, *grads))

    behavior = [x.detach() for x in gaussian(nets.behavior, s)]
    torch.manual_seed(3)
    ours, *_ = actor_loss(nets, s, gaussian(nets.actor, s), behavior, args)
    torch.manual_seed(3)
    theirs = itrpo.actor_loss(same, s, gaussian(nets.actor, s), behavior, other)
    assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(x, list(nets.actor.parameters())) for x in (ours, theirs)]
    for g, h in zip(*grads):  # autograd adds up in another order
        assert_close(g, h, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


# ---- multipliers -----------------------------------------------------------------------------


@pytest.mark.parametrize("excess", [0.5, -0.5])
def test_a_multiplier_grows_while_its_constraint_is_violated(excess):
    multiplier = torch.tensor(0.7, requires_grad=True)
    loss = brac.multiplier_loss(multiplier, torch.tensor(excess))
    assert torch.autograd.grad(loss, multiplier)[0] == -excess  # a descent step adds the excess


@pytest.mark.parametrize(("alpha", "bound", "target"), [(499.9, 500, 0.0), (0.01, 0, 1e6)])
def test_tuned_alpha_moves_between_its_bounds(data, alpha, bound, target):
    nets, args = make(data, alpha=alpha, tune_alpha=True, target_divergence=target)
    metrics = brac.update(nets, optimizers(nets, SGD, 1.0), data, args, False)
    assert_close(metrics["alpha"].item(), float(bound))
    alpha *= 3  # a fixed one has no bounds
    nets, args = make(data, alpha=alpha, target_divergence=target)
    metrics = brac.update(nets, optimizers(nets, SGD, 1.0), data, args, False)
    assert torch.equal(nets.alpha, torch.tensor(alpha).double()) and metrics["alpha"] == nets.alpha


def optimum(f, b, alpha, noise):
    """Mean and deviation where the policy's loss is least, and the loss; Q is f(x) of x = atanh a,
    one state; `noise` (N,) stands for the samples."""
    noise = torch.as_tensor(noise, dtype=torch.float64).view(-1, 1, 1)
    n, s = len(noise), torch.zeros(1, 1).double()
    nets = SimpleNamespace(q=lambda s, a: f(a.atanh()[:, 0]).expand(2, -1))
    nets.alpha, args = torch.tensor(alpha).double(), Args(samples=n, q_samples=n)
    pi = [torch.tensor([[v]]).double().requires_grad_() for v in (0.1, -1.0)]
    exact = dict(tolerance_grad=1e-9, tolerance_change=0)
    solver = torch.optim.LBFGS(pi, max_iter=200, line_search_fn="strong_wolfe", **exact)

    def closure():
        with Inject(randn_like=[noise]):
            loss = actor_loss(nets, s, pi, b, args)[0]
        for p, g in zip(pi, torch.autograd.grad(loss, pi)):
            p.grad = g
        return loss

    solver.step(closure)
    return pi[0].item(), pi[1].exp().item(), closure().item()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_bandit_has_the_closed_form(alpha):
    """pi* is proportional to b exp(Q / alpha): with b = N(0.2, 0.5^2) and Q = -(x - 1)^2 / 2 a
    Gaussian of precision 4 + 1 / alpha; its loss is -alpha log E_b exp(Q / alpha). Noise +-1 makes
    the loss of quadratics exact."""
    b = pair([[0.2]], [[math.log(0.5)]])
    q = lambda x: -0.5 * (x - 1) ** 2
    mean, std, loss = optimum(q, b, alpha, [1.0, -1.0])
    precision = 4 + 1 / alpha
    assert abs(mean - (0.2 * 4 + 1 / alpha) / precision) < 1e-6
    assert abs(std - precision**-0.5) < 1e-6
    density = lambda x: scipy.stats.norm.pdf(x, 0.2, 0.5) * math.exp(q(x) / alpha)
    assert abs(loss + alpha * math.log(scipy.integrate.quad(density, -5, 5)[0])) < 1e-6


def test_bandit_with_q_of_the_squashed_action_is_that_of_quadrature():
    """Q = 2 tanh(x): the Gaussian nearest to b exp(Q / alpha), on a grid."""
    b, alpha = pair([[-0.3]], [[math.log(0.6)]]), 0.8
    n = 4000
    noise = scipy.stats.norm.ppf((np.arange(n) + 0.5) / n)
    mean, std, _ = optimum(lambda x: 2 * x.tanh(), b, alpha, noise)
    grid = np.linspace(-6, 6, 4001)

    def objective(p):
        pi, log_b = scipy.stats.norm(p[0], math.exp(p[1])), scipy.stats.norm.logpdf(grid, -0.3, 0.6)
        inside = alpha * (pi.logpdf(grid) - log_b) - 2 * np.tanh(grid)
        return np.trapezoid(pi.pdf(grid) * inside, grid)

    best = scipy.optimize.minimize(objective, [0.0, -1.0], method="Nelder-Mead", tol=1e-9).x
    assert abs(mean - best[0]) < 2e-3 and abs(std - math.exp(best[1])) < 2e-3
    assert best[0] > 0.1


def test_tuned_alpha_settles_where_the_constraint_binds():
    """Q = 1.5 x against b = N(0, 0.5^2): the mean moves by 1.5 / (4 alpha), so KL = epsilon at
    alpha = 1.5 * 0.5 / sqrt(2 epsilon)."""
    noise = torch.tensor([1.0, -1.0]).view(2, 1, 1)
    epsilon, b = 0.18, [p.float() for p in pair([[0.0]], [[math.log(0.5)]])]
    args = Args(samples=2, q_samples=2, target_divergence=epsilon)
    mean, log_std = (torch.tensor([[v]], requires_grad=True) for v in (0.0, -0.7))
    alpha = torch.tensor(3.0, requires_grad=True)
    nets = SimpleNamespace(q=lambda s, a: 1.5 * a.atanh()[:, 0].expand(2, -1), alpha=alpha)
    actor, dual = Adam([mean, log_std], 0.02), Adam([alpha], 0.02)
    history = []
    for _ in range(1200):
        with Inject(randn_like=[noise]):
            loss, d, _ = actor_loss(nets, torch.zeros(1, 1), (mean, log_std), b, args)
        actor.step(torch.autograd.grad(loss, actor.params))
        dual.step(torch.autograd.grad(brac.multiplier_loss(alpha, d - epsilon), [alpha]))
        history.append(d.item())
    assert abs(alpha.item() - 0.75 / math.sqrt(2 * epsilon)) < 0.02
    assert abs(np.mean(history[-50:]) - epsilon) < 0.01
    assert abs(mean.item() - 1.5 / (4 * alpha.item())) < 0.01
    assert abs(log_std.exp().item() - 0.5) < 0.01


# ---- clone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_entropy_of_the_clone_has_a_floor(tiny_data, spread):
    """One action everywhere: the entropy would fall to -3.6, and is held near -1. Actions all over
    the range: the floor does not bind, its weight goes to 0 and not below."""
    data = tiny_data(obs_dim=2, act_dim=1, n=256)
    data.action = (0.2 + 0 * data.action) + spread * (torch.rand(256, 1) - 0.7)
    args = Args(batch_size=64)
    torch.manual_seed(0)
    nets = Nets(data, args)
    opt = optimizers(nets, Adam, 1e-3)
    opt.bc_weight.lr.fill_(1e-2)
    history = []
    for _ in range(700):
        metrics = brac.update_behavior(nets, opt, data, args)
        history.append([metrics["entropy"].item(), metrics["bc_weight"].item()])
    entropy, weight = np.mean(history[200:], 0)  # they swing around each other
    assert np.min(history, 0)[1] >= 0
    if spread:
        assert weight < 0.05 and -0.5 < entropy < 0.3
    else:
        assert abs(entropy + 1) < 0.3 and 0.7 < weight < 1.3
    mean = gaussian(nets.behavior, data.obs)[0].tanh().mean().item()
    assert abs(mean - data.action.mean().item()) < 0.1


def test_dequantization_moves_actions_at_the_bounds_only():
    torch.manual_seed(0)
    inner = torch.linspace(-0.99, 0.99, 2000)
    a = torch.stack([torch.ones(2000), -torch.ones(2000), inner], 1).double()
    plain = brac.pre_tanh(a, Args()).tanh()
    spread = brac.pre_tanh(a, Args(dequantize=0.05)).tanh()
    assert_close(plain, torch.stack([a[:, 0] * BOUND, a[:, 1] * BOUND, a[:, 2]], 1))
    assert torch.equal(spread[:, 2], plain[:, 2])
    for distance in (1 - spread[:, 0], 1 + spread[:, 1]):
        assert 0 < distance.min() < 2e-3 and 0.049 < distance.max() <= 0.05


# ---- training --------------------------------------------------------------------------------


def train(data, run=None, **values):
    """A short training from one seed; returns the run."""
    run = run or PlainRun()
    torch.manual_seed(0)
    brac.train(run, data, Args(**{"steps": 5, "bc_steps": 2, "batch_size": 8} | values))
    return run


@pytest.mark.parametrize("divergence", ["kl", "mmd"])
def test_metrics_of_an_update(data, divergence):
    """Those that no loss holds; the learning rates are 0, so the networks stay."""
    nets, args = make(data, divergence=divergence)
    noise = [torch.randn(4, 16, 2).double() for _ in range(2 if divergence == "kl" else 4)]
    with Inject(randint=[torch.arange(16)], randn_like=noise):
        metrics = brac.update(nets, optimizers(nets, SGD, 0.0), data, args, False)
    pi, b = gaussian(nets.actor, data.obs), gaussian(nets.behavior, data.obs)
    x = pi[0] + pi[1].exp() * noise[len(noise) // 2]  # the critics' come first
    log_pi, log_b = (lambda a, p=p: squashed(*p).log_prob(a).sum(-1).mean() for p in (pi, b))
    expected = {"kl": log_ratio(x, pi, b).mean(), "entropy": -log_pi(x.tanh())}
    expected["log_ratio_data"] = log_pi(data.action) - log_b(data.action)
    for name, value in expected.items():
        assert_close(metrics[name], value.detach(), rtol=1e-6, atol=1e-8)


def test_first_steps_imitate(tiny_data):
    """Runs of the same seed differ where one has begun to look at Q: in the policy's loss first."""
    none, three, five, nine = (
        train(tiny_data(), warm_start=n).phases["train"] for n in (0, 3, 5, 9)
    )
    assert none[0]["pi_loss"] != three[0]["pi_loss"]
    assert three[:3] == five[:3] and five == nine
    assert {k for k in three[3] if three[3][k] != five[3][k]} == {"pi_loss"}


@pytest.mark.parametrize("normalize", [True, False])
def test_training_sees_scaled_observations(tiny_data, normalize):
    data = tiny_data()
    obs = data.obs.clone()
    run = train(data, normalize_obs=normalize)
    scaled = (obs - obs.mean(0)) / (obs.std(0, correction=0) + 1e-3)
    assert_close(data.obs, scaled if normalize else obs)
    assert_close(run.nets.scaling.obs(obs), data.obs)
    largest = 100 * data.reward.abs().max().item()
    assert run.largest == pytest.approx(dict.fromkeys(("q_data", "target"), largest))


def test_learning_rates_and_keras_epsilon(tiny_data):
    rates = dict(lr=3e-3, actor_lr=2e-3, bc_lr=1e-4, alpha_lr=1e-5)
    opt = vars(train(tiny_data(), **rates).opt)
    expected = {"q": 3e-3, "actor": 2e-3, "behavior": 1e-4, "bc_weight": 1e-4, "alpha": 1e-5}
    assert {name: adam.lr.item() for name, adam in opt.items()} == pytest.approx(expected)
    assert {adam.eps for adam in opt.values()} == {1e-7}


def test_warm_start_ends_near_the_clone_wherever_q_points(tiny_data):
    data, args = tiny_data(n=64), Args(batch_size=32, alpha=0.1)
    torch.manual_seed(0)
    nets = Nets(data, args)
    opt = optimizers(nets, Adam, 1e-3)
    first = brac.update(nets, opt, data, args, True)
    with torch.no_grad():
        nets.q.weights[0].mul_(1e3)
    opt.q.lr.zero_()
    for _ in range(250):
        last = brac.update(nets, opt, data, args, True)
    assert first["kl"] > 1 and last["kl"] < 0.1 * first["kl"]


# ---- acting and behavior ---------------------------------------------------------------------


def scaled(tiny_data, **values):
    data = tiny_data(obs_dim=2, act_dim=1)
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    data.action_low, data.action_high = torch.tensor([-2.0]), torch.tensor([6.0])
    args = Args(**values)
    torch.manual_seed(0)
    return Nets(data, args), 3 * torch.randn(5, 2), args


def test_best_sample_is_that_of_the_first_critic(tiny_data):
    nets, raw, args = scaled(tiny_data, eval_samples=10)
    s = (raw - nets.scaling.obs_mean) / nets.scaling.obs_std
    torch.manual_seed(5)
    a = brac.policy(nets, raw, args)
    torch.manual_seed(5)
    drawn, first = draw(gaussian(nets.actor, s), 10).tanh(), stack(nets.q, 0)
    q = torch.stack([first(torch.cat([s, each], -1))[:, 0] for each in drawn])  # (10, 5)
    best = q.argmax(0)
    assert_close(a, 2 + 4 * torch.stack([drawn[best[i], i] for i in range(5)]))
    assert len(best.unique()) > 1 and a.shape == (5, 1)


def test_q_cannot_have_more_samples_than_d():
    with pytest.raises(brac.InputError, match="--q-samples 5 is above --samples 4") as caught:
        Args(q_samples=5).resolve()
    assert "\n" not in str(caught.value)
    Args(q_samples=4).resolve()


@pytest.mark.parametrize(("alpha", "low", "high"), [(0.3, 0.35, 0.9), (30.0, -0.1, 0.15)])
def test_bandit_from_data(alpha, low, high):
    """Actions around 0, reward 2 a: little alpha leaves the data's mean, much of it stays there;
    both phases and all networks learn from rows alone."""
    torch.manual_seed(0)
    n = 256
    a, s = (0.4 * torch.randn(n, 1)).tanh(), torch.ones(n, 1)
    data = Data(s, a, 2 * a[:, 0], s, torch.ones(n))
    args = Args(batch_size=32, alpha=alpha)
    nets = Nets(data, args)
    opt = optimizers(nets, Adam, 2e-3)
    for _ in range(200):
        brac.update_behavior(nets, opt, data, args)
    for t in range(240):
        metrics = brac.update(nets, opt, data, args, t < 80)
        assert all(value.isfinite() and value.ndim == 0 for value in metrics.values())
    with torch.no_grad():
        action = brac.policy(nets, s[:1], args).item()
    assert low < action < high, action
