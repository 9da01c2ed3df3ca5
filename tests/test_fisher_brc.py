"""fisher_brc.py: the clone's density, the critic in offset form, a bandit."""

import math
from types import SimpleNamespace

import fisher_brc
import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.distributions as D
from fisher_brc import (
    Args,
    Nets,
    log_mu,
    pre_tanh,
    target_value,
    train,
)
from oracles import in_double
from stand_in import PlainRun
from torch.testing import assert_close

from run import parse

EPS = 1e-6  # actions are clipped to +-(1 - EPS) where the density is evaluated


@pytest.fixture
def data(tiny_data):
    """Two action dimensions, everything in float64."""
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def mixture_of(k, b, a, seed=0):
    """Random log-weights, means and log-stds (K, B, A) in float64."""
    draw = torch.Generator().manual_seed(seed)
    logits, mean, log_std = torch.randn(3, k, b, a, generator=draw, dtype=torch.float64)
    return logits.log_softmax(0), mean, 0.4 * log_std - 0.5


def density(log_weight, mean, log_std):
    """torch's own distribution of a (B, A), given tensors (K, B, A)."""
    last = [x.movedim(0, -1) for x in (log_weight, mean, log_std.exp())]
    mixture = D.MixtureSameFamily(D.Categorical(logits=last[0]), D.Normal(*last[1:]))
    return D.TransformedDistribution(mixture, D.TanhTransform())


# ---- the clone's density ---------------------------------------------------------------------


def test_density_is_that_of_torch():
    mixture, a = mixture_of(5, 7, 3), torch.rand(7, 3).double() * 1.98 - 0.99
    expected = density(*mixture).log_prob(a)
    assert_close(log_mu(mixture, torch.atanh(a)), expected.sum(-1))
    both = torch.stack([a, -a])  # any leading axes
    assert_close(log_mu(mixture, torch.atanh(both))[1], density(*mixture).log_prob(-a).sum(-1))


def test_density_integrates_to_one_and_dimensions_are_independent():
    mixture, x = mixture_of(5, 1, 3, seed=1), torch.randn(1, 3).double()
    singles = [tuple(part[..., d : d + 1] for part in mixture) for d in range(3)]
    a = torch.linspace(-7, 7, 20_001).double().tanh()  # dense where the density is steep
    for one in singles:
        p = log_mu(one, a.atanh()[:, None, None]).exp()[:, 0]
        assert abs(scipy.integrate.simpson(p, x=a) - 1) < 1e-3
    parts = [log_mu(one, x[:, d : d + 1]) for d, one in enumerate(singles)]
    assert_close(log_mu(mixture, x), sum(parts))


def test_density_is_finite_and_flat_at_the_bounds():
    """Where the data's action is a bound, and where the policy's x is beyond 1 - EPS."""
    mixture = mixture_of(5, 4, 1)
    for bound in (-1.0, 1.0):
        inside = log_mu(mixture, (bound * (1 - EPS) * torch.ones(4, 1).double()).atanh())
        assert inside.isfinite().all()
        at_bound = pre_tanh(torch.full((4, 1), bound).double(), Args())
        assert_close(log_mu(mixture, at_bound), inside)
        x = torch.full((4, 1), 9.0 * bound).double().requires_grad_()
        beyond = log_mu(mixture, x)
        assert_close(beyond, inside)
        assert not torch.autograd.grad(beyond.sum(), x)[0].any()


def test_dequantization_moves_actions_at_the_bounds_only():
    torch.manual_seed(0)
    inner = torch.linspace(-0.9999, 0.9999, 4000)
    a = torch.stack([torch.ones(4000), -torch.ones(4000), inner], 1).double()
    plain, spread = pre_tanh(a, Args()).tanh(), pre_tanh(a, Args(dequantize=0.05)).tanh()
    assert_close(plain, a)
    assert torch.equal(spread[:, 2], plain[:, 2])
    for distance in (1 - spread[:, 0], 1 + spread[:, 1]):
        assert distance.min() > 0
        assert scipy.stats.kstest(distance, "uniform", (0, 0.05)).pvalue > 1e-3


# ---- networks --------------------------------------------------------------------------------


def test_initial_networks(data):
    torch.manual_seed(0)
    nets = Nets(data, Args())
    shapes = {k: [w.shape[-2] for w in getattr(nets, k).weights] for k in ("behavior", "actor")}
    assert shapes == {"behavior": [3, 256, 256], "actor": [3, 256, 256, 256]}
    assert [tuple(w.shape) for w in nets.offset.weights][0] == (2, 5, 256)
    assert not torch.equal(*nets.offset.weights[0])
    x = torch.zeros(16, 2)
    near = torch.full((16,), -0.919 * 2)
    assert_close(log_mu(nets.mu(data.obs.float()), x), near, atol=0.2, rtol=0)
    assert nets.log_temperature == nets.log_bc_weight == 0


def test_clone_acts_by_its_likeliest_component(tiny_data):
    data, args = tiny_data(obs_dim=1, act_dim=2), Args(components=3)
    data.action_low, data.action_high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 10.0])
    nets, obs = Nets(data, args), torch.zeros(4, 1)
    weights = torch.tensor([[0.1, 0.7], [0.3, 0.2], [0.6, 0.1]])
    mean = torch.tensor([[-1.0, 0.2], [0.0, 0.4], [1.0, 0.6]])
    nets.mu = lambda s: [x[:, None].expand(3, 4, 2) for x in (weights.log(), mean, mean)]
    expected = torch.tensor([math.tanh(1.0), 5 + 5 * math.tanh(0.2)]).expand(4, 2)
    assert_close(fisher_brc.behavior_policy(nets, obs, args), expected)


# ---- equations -------------------------------------------------------------------------------


def test_target_by_hand():
    """Rows: an ordinary one, a terminal, a time limit (which bootstraps like the first)."""
    o2 = torch.tensor([[1.0, 50.0, 7.0], [2.0, 60.0, 4.0]])
    nets = SimpleNamespace(offset_target=lambda s2, a2: o2)
    r, terminal = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0])
    log_mu2, args = torch.tensor([-0.5, 1e30, 2.0]), Args(gamma=0.9)
    y = target_value(nets, None, r, terminal, None, log_mu2, args)
    assert_close(y, torch.tensor([1 + 5 + 0.9 * 0.5, 2 + 5, 3 + 5 + 0.9 * 6]))
    y = target_value(nets, None, r, terminal, None, 0.0, Args(gamma=0.9, bonus=0.0))
    assert_close(y, torch.tensor([1 + 0.9 * 1, 2, 3 + 0.9 * 4]))


# ---- training --------------------------------------------------------------------------------


class Rates(PlainRun):
    """Notes the clone's two rates after each of its steps."""

    def after(self, t, metrics, act=None):
        super().after(t, metrics, act)
        if act is None:
            rates = self.opt.behavior.lr.item(), self.opt.bc_weight.lr.item()
            self.rates = getattr(self, "rates", []) + [rates]


def test_learning_rate_of_the_clone_falls_twice(tiny_data):
    """1e-3, a tenth after 80% of the steps, a hundredth after 90%; for the entropy weight too."""
    run = Rates()
    train(run, tiny_data(), Args(bc_steps=20, steps=1, batch_size=4))
    expected = [1e-3] * 16 + [1e-4] * 2 + [1e-5] * 2
    assert_close(torch.tensor(run.rates), torch.tensor(expected)[:, None].expand(20, 2))


def test_without_the_offset_form_there_is_no_clone(tiny_data):
    run = PlainRun()
    train(run, tiny_data(), Args(offset=False, bc_steps=9, steps=2, batch_size=4))
    assert list(run.phases) == ["train"] and not run.references


@pytest.mark.parametrize("env", ["antmaze-umaze-v2", "D4RL/antmaze/umaze-v1"])
def test_antmaze_has_no_bonus(env):
    """A bonus per step would pay for never reaching the goal, where episodes end."""
    args, _ = parse(Args, fisher_brc.PRESETS, ["--env", env])
    assert (args.bonus, args.eval_every, args.eval_episodes) == (0.0, 100_000, 100)
    args, _ = parse(Args, fisher_brc.PRESETS, ["--env", "pointmaze-stitch-demo"])
    assert args.bonus < 0, "a step costs where the goal ends the episode"
