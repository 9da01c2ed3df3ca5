"""brac.py: divergences, the value penalty, both multipliers, known optima."""

import math
from types import SimpleNamespace

import brac
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import torch
from brac import Args, Nets, actor_loss, critic_loss
from golden.tools import Inject
from oracles import in_double
from stand_in import PlainRun
from torch.testing import assert_close

BOUND = 1 - 1e-3  # actions are clipped to it where log b is evaluated


@pytest.fixture
def data(tiny_data):
    """Two action dimensions, everything in float64."""
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def pair(mean, log_std):
    """A policy's mean and log-std, (B, A) in float64, from nested lists."""
    return torch.tensor(mean).double(), torch.tensor(log_std).double()


B = pair([[0.0, -0.2], [0.6, 0.1]], [[-0.5, -0.8], [-0.3, -1.0]])


# ---- networks --------------------------------------------------------------------------------


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


# ---- critics and policy ----------------------------------------------------------------------


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


# ---- multipliers -----------------------------------------------------------------------------


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


# ---- clone -----------------------------------------------------------------------------------


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
    brac.train(run, data, Args(**{"steps": 10, "bc_steps": 2, "batch_size": 8} | values))
    return run


def test_first_steps_imitate(tiny_data):
    """Runs of the same seed differ where one has begun to look at Q: in the policy's loss first. At
    most half of the ten steps imitate."""
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


# ---- acting and behavior ---------------------------------------------------------------------


def scaled(tiny_data, **values):
    data = tiny_data(obs_dim=2, act_dim=1)
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    data.action_low, data.action_high = torch.tensor([-2.0]), torch.tensor([6.0])
    args = Args(**values)
    torch.manual_seed(0)
    return Nets(data, args), 3 * torch.randn(5, 2), args


def test_q_cannot_have_more_samples_than_d():
    with pytest.raises(brac.InputError, match="--q-samples 5 is above --samples 4") as caught:
        Args(q_samples=5).resolve()
    assert "\n" not in str(caught.value)
    Args(q_samples=4).resolve()
