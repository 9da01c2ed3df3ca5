"""fisher_brc.py: the clone's density, the critic in offset form, one whole step, a bandit, and the
file on its own."""

import copy
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
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
    gradient_penalty,
    largest_x,
    log_mu,
    pre_tanh,
    sample_mu,
    target_value,
    train,
)
from golden.tools import Inject, KerasAdam
from oracles import SGD, assert_same, in_double, rows, stack
from stand_in import PlainRun
from torch import nn
from torch.testing import assert_close

from common import Adam, Data, ScalarMLP, orthogonal_
from harness import parse

ROOT = Path(__file__).resolve().parents[1]
EPS = 1e-6  # actions are clipped to +-(1 - EPS) where the density is evaluated


def optimizers(nets, optimizer, lr):
    params = {k: getattr(nets, k).parameters() for k in ("behavior", "offset", "actor")}
    params |= {"bc_weight": [nets.log_bc_weight], "temperature": [nets.log_temperature]}
    return SimpleNamespace(**{k: optimizer(p, lr) for k, p in params.items()})


@pytest.fixture
def data(tiny_data):
    """Two action dimensions, everything in float64."""
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def make(data, **values):
    """Networks in float64 with outputs of size one, and a target that differs."""
    args = Args(batch_size=16, **values)
    torch.manual_seed(0)
    nets = Nets(data, args)
    for net in (nets.behavior, nets.actor, nets.offset, nets.offset_target):
        orthogonal_(net, 1.0, 0.5)
    return nets.double(), args


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


def standard_normals(b=1):
    """Five equal components: a single tanh N(0, 1)."""
    zeros = torch.zeros(5, b, 1).double()
    return zeros - math.log(5), zeros, zeros


@pytest.mark.parametrize(("a", "value"), [(0, -0.91894), (0.5, -0.78213), (1 - EPS, -14.1092)])
def test_equal_components_are_one_gaussian(a, value):
    x = pre_tanh(torch.tensor([[a]], dtype=torch.float64), Args())
    assert abs(log_mu(standard_normals(), x).item() - value) < 1e-4


def test_entropy_of_a_squashed_standard_normal():
    def minus_p_log_p(x):
        log_p = scipy.stats.norm.logpdf(x) - math.log(1 - math.tanh(x) ** 2)
        return -scipy.stats.norm.pdf(x) * log_p

    exact, _ = scipy.integrate.quad(minus_p_log_p, -8, 8)
    assert abs(exact - 0.6698) < 1e-4
    torch.manual_seed(0)
    mixture = standard_normals(40_000)
    assert abs(-log_mu(mixture, sample_mu(mixture)).mean().item() - exact) < 0.02


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


@pytest.mark.parametrize(("dtype", "place"), [(torch.float32, 7.2477), (torch.float64, 7.2543)])
def test_data_and_policy_are_clipped_at_one_point(dtype, place):
    """It is the x of 1 - EPS as the dtype rounds it: float32 has 1 - 17 * 2^-24 there."""
    x = torch.tensor([1 - EPS], dtype=dtype).atanh()
    assert abs(x.item() - place) < 1e-4
    assert_close(torch.tensor([largest_x(dtype)], dtype=dtype), x)
    mixture = [part.to(dtype) for part in mixture_of(5, 1, 1)]
    rounded_out = torch.nextafter(torch.ones(1, 1, dtype=dtype), 2 * torch.ones(1, 1, dtype=dtype))
    at_bound = log_mu(mixture, pre_tanh(torch.ones(1, 1, dtype=dtype), Args()))
    for other in (pre_tanh(rounded_out, Args()), x[None] + 1e-3, 9 * torch.ones_like(x)[None]):
        assert torch.equal(log_mu(mixture, other), at_bound)
    assert log_mu(mixture, x[None] - 1e-3) != at_bound


def test_gradient_of_the_density_is_a_difference_quotient():
    a = torch.linspace(-0.99, 0.99, 41).double()[:, None].requires_grad_()
    mixture, h = mixture_of(5, 41, 1), 1e-6

    def value(a):
        return log_mu(mixture, pre_tanh(a, Args()))

    (grad,) = torch.autograd.grad(value(a).sum(), a)
    assert_close(grad[:, 0], (value(a + h) - value(a - h)) / (2 * h), atol=1e-5, rtol=1e-5)


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


def test_samples_have_the_weights_of_their_components():
    torch.manual_seed(0)
    weights = torch.tensor([[2, 6], [5, 1], [3, 3]]).double() / 10  # (K, A)
    mean = torch.tensor([-3.0, 0.0, 3.0]).double()
    n = 6000
    mixture = (
        weights.log()[:, None].expand(3, n, 2),
        mean[:, None, None].expand(3, n, 2),
        torch.full((3, n, 2), -1.5).double(),
    )
    x = sample_mu(mixture)
    k = (x / 3).round().long() + 1  # the nearest mean: they are 13 deviations apart
    joint = torch.bincount(3 * k[:, 0] + k[:, 1], minlength=9)
    expected = n * torch.outer(weights[:, 0], weights[:, 1]).flatten()  # independent dimensions
    assert scipy.stats.chisquare(joint, expected).pvalue > 1e-3
    noise = ((x - mean[k]) / math.exp(-1.5)).flatten()
    assert scipy.stats.kstest(noise, "norm").pvalue > 1e-3


def test_gradient_of_a_sample_reaches_the_chosen_component_only():
    torch.manual_seed(0)
    parts = [x.detach().requires_grad_() for x in mixture_of(4, 30, 2)]
    x = sample_mu(parts)
    grads = torch.autograd.grad(x.sum(), parts, allow_unused=True)
    assert grads[0] is None
    chosen = grads[1] == 1
    assert torch.equal(chosen.sum(0), torch.ones(30, 2).long()) and (grads[1][~chosen] == 0).all()
    assert len(chosen.nonzero()[:, 0].unique()) == 4
    expected = torch.where(chosen, x - parts[1], 0)  # d x / d log_std = std * noise
    assert_close(grads[2], expected.detach())


@pytest.mark.parametrize("u", [0.0, 1.0])
def test_extreme_uniform_draws_choose_a_component(u):
    """Weights that sum to less than one by rounding still leave a last component."""
    log_weight, mean, log_std = mixture_of(3, 5, 2)
    uniform, normal = torch.full((1, 5, 2), u).double(), torch.zeros(5, 2).double()
    with Inject(rand_like=[uniform], randn_like=[normal]):
        x = sample_mu((log_weight - 1e-6, mean, log_std))
    assert torch.equal(x, mean[-1 if u else 0])


# ---- networks --------------------------------------------------------------------------------


def test_clone_network_gives_every_component_its_own_outputs(data):
    nets, _ = make(data, components=4)
    out = stack(nets.behavior)(data.obs).view(16, 3, 4, 2)
    log_weight, mean, log_std = nets.mu(data.obs)
    assert_close(log_weight, out[:, 0].movedim(0, 1).log_softmax(0))
    assert_close(mean, out[:, 1].movedim(0, 1))
    assert_close(log_std, out[:, 2].movedim(0, 1))
    assert_close(log_weight.exp().sum(0), torch.ones(16, 2).double())


@pytest.mark.parametrize(("value", "clamped"), [(50.0, 2.0), (-50.0, -20.0)])
def test_log_stds_are_clamped(data, value, clamped):
    nets, _ = make(data)
    for net in (nets.behavior, nets.actor):
        net.biases[-1].data.fill_(value)
    assert (nets.mu(data.obs)[2] == clamped).all() and (nets.pi(data.obs)[1] == clamped).all()


def test_initial_networks(data):
    torch.manual_seed(0)
    nets = Nets(data, Args())
    shapes = {k: [w.shape[-2] for w in getattr(nets, k).weights] for k in ("behavior", "actor")}
    assert shapes == {"behavior": [3, 256, 256], "actor": [3, 256, 256, 256]}
    assert [tuple(w.shape) for w in nets.offset.weights][0] == (2, 5, 256)
    assert not torch.equal(*nets.offset.weights[0])
    for p, t in zip(nets.offset.parameters(), nets.offset_target.parameters()):
        assert torch.equal(p, t) and p is not t and not t.requires_grad
    x = torch.zeros(16, 2)
    near = torch.full((16,), -0.919 * 2)
    assert_close(log_mu(nets.mu(data.obs.float()), x), near, atol=0.2, rtol=0)
    assert nets.log_temperature == nets.log_bc_weight == 0


def test_deterministic_action_is_the_squashed_mean(tiny_data):
    data, args = tiny_data(obs_dim=2, act_dim=1), Args()
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    data.action_low, data.action_high = torch.tensor([-2.0]), torch.tensor([6.0])
    nets, raw = Nets(data, args), 3 * torch.randn(5, 2)
    orthogonal_(nets.actor, 1.0, 3.0)
    mean = stack(nets.actor)((raw - data.obs_mean) / data.obs_std)[:, :1]
    a = fisher_brc.policy(nets, raw, args)
    assert_close(a, 2 + 4 * mean.tanh())
    assert torch.equal(fisher_brc.policy(nets, raw, args), a)
    assert (a >= -2).all() and (a <= 6).all()


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


def test_bonus_is_a_linear_reward_for_q(data):
    """The gradient of -c Q + (y - Q)^2 is that of (y + c/2 - Q)^2."""
    nets, _ = make(data)
    s, a = data.obs, data.action
    y, with_bonus = (
        target_value(
            nets, data.next_obs, data.reward, data.terminal, a, 0.0, Args(bonus=b)
        ).detach()
        for b in (0.0, 2.5)
    )
    q, params = nets.offset(s, a), list(nets.offset.parameters())
    left = torch.autograd.grad((-5 * q + (y - q) ** 2).sum(), params, retain_graph=True)
    right = torch.autograd.grad((with_bonus - q).square().sum(), params)
    assert_close(left, right)


def linear_offset(w):
    """O_i(s, a) = w_i . a, w (2, A), out of two ReLUs: relu(w.a) - relu(-w.a); one observation."""
    net = ScalarMLP(1 + w.shape[1], 2, members=2).double()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.weights[0][:, 1:, 0], net.weights[0][:, 1:, 1] = w, -w
        net.weights[1][:, 0], net.weights[1][:, 1] = 1, -1
    return SimpleNamespace(offset=net)


@pytest.mark.parametrize("second", [[-1.0, -2.0], [3.0, 0.5]])
def test_penalty_of_linear_critics(second):
    """|w_1|^2 + |w_2|^2 for any batch, not |w_1 + w_2|^2; its gradient is 2 w_i."""
    w = torch.tensor([[1.0, 2.0], second]).double()
    for batch in (1, 9):
        nets, a = linear_offset(w), torch.randn(batch, 2).double()
        penalty = gradient_penalty(nets, torch.zeros(batch, 1).double(), a)
        assert_close(penalty, w.square().sum())
        assert abs(penalty - w.sum(0).square().sum()) > 1
        (grad,) = torch.autograd.grad(penalty, nets.offset.weights[0])
        assert_close(grad[:, 1:, 0] - grad[:, 1:, 1], 2 * w)


def test_penalty_of_quadratic_critics():
    """O = a' M a / 2 has the penalty mean |M a|^2; the observation's part does not count."""
    m, a = torch.tensor([[2.0, 1.0], [1.0, -3.0]]).double(), torch.randn(6, 2).double()
    full = torch.cat([torch.full((6, 1), 99.0).double(), a @ m], -1)
    offset = SimpleNamespace(input_gradient=lambda s, a: torch.stack([full, 0 * full]))
    penalty = gradient_penalty(SimpleNamespace(offset=offset), torch.zeros(6, 1), a)
    assert_close(penalty, (a @ m).square().sum() / 6)


def test_penalty_is_that_of_difference_quotients(data):
    nets, _ = make(data)
    h, quotients = 1e-7, []
    for step in torch.eye(2).double() * h:
        ahead, behind = (nets.offset(data.obs, data.action + k * step) for k in (1, -1))
        quotients.append((ahead - behind) / (2 * h))
    expected = sum(q.square() for q in quotients).mean(1).sum()
    assert_close(gradient_penalty(nets, data.obs, data.action), expected, rtol=1e-5, atol=0)


def test_which_parameters_each_loss_reaches(data):
    nets, args = make(data)
    s, a = data.obs, data.action
    x_pi, log_prob = nets.pi(s)[0], nets.pi(s)[1].sum(-1)
    losses = {
        "behavior": fisher_brc.behavior_loss(nets, s, a, args)[0],
        "offset": gradient_penalty(nets, s, a) + nets.offset(s, a).sum(),
        "log_temperature": fisher_brc.temperature_loss(nets.log_temperature, 0.3, 2),
        "log_bc_weight": fisher_brc.temperature_loss(nets.log_bc_weight, 0.3, 2),
    }
    online = [(k, p) for k, p in nets.named_parameters() if p.requires_grad]
    for reached, loss in losses.items():
        grads = torch.autograd.grad(loss, [p for _, p in online], allow_unused=True)
        found = {k.split(".")[0] for (k, _), g in zip(online, grads) if g is not None}
        assert found == {reached}
    loss = fisher_brc.actor_loss(nets, s, x_pi.tanh(), log_prob, log_mu(nets.mu(s), x_pi))
    assert torch.autograd.grad(loss, nets.log_temperature, allow_unused=True) == (None,)


@pytest.mark.parametrize(("entropy", "direction"), [(-2.5, 1), (-1.5, -1)])
def test_entropy_weights_rise_below_their_target(entropy, direction):
    """The target is -A = -2; the gradient is weight * (entropy + A)."""
    log_weight = nn.Parameter(torch.tensor(0.7))
    loss = fisher_brc.temperature_loss(log_weight, torch.tensor(entropy), 2)
    (grad,) = torch.autograd.grad(loss, log_weight)
    assert_close(grad, math.exp(0.7) * torch.tensor(entropy + 2))
    opt = Adam([log_weight], 0.01)
    opt.step([grad])
    assert (log_weight - 0.7).sign() == direction


# ---- whole steps, written again with torch.nn, torch.optim and torch.distributions ------------


def same(net, other):
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return all(torch.equal(p.nan_to_num(7), q.nan_to_num(7)) for p, q in pairs)


def clone_density(behavior, s):
    """torch's own distribution of the clone, whose network is the stack `behavior`; also its
    component means and stds."""
    logits, mean, log_std = behavior(s).view(16, 3, 5, 2).permute(1, 2, 0, 3)
    return density(logits, mean, log_std), mean, log_std.exp()


def test_clone_step_by_hand(data):
    """A uniform draw of 0 chooses the first component; its normal noise is 0.3."""
    nets, args = make(data)
    nets.log_bc_weight.data.fill_(-0.4)
    opt, before = optimizers(nets, SGD, 0.05), copy.deepcopy(nets)
    u, noise = torch.zeros(1, 16, 2).double(), torch.full((16, 2), 0.3).double()
    with Inject(randint=[torch.arange(16)], rand_like=[u], randn_like=[noise]):
        metrics = fisher_brc.update_behavior(nets, opt, data, args)

    behavior, weight = stack(before.behavior), math.exp(-0.4)
    mu, mean, std = clone_density(behavior, data.obs)
    nll = -mu.log_prob(data.action).sum(-1).mean()
    drawn = (mean[0] + 0.3 * std[0]).tanh()
    entropy = -mu.log_prob(drawn).sum(-1).mean()
    (nll - weight * entropy).backward()
    torch.optim.SGD(behavior.parameters(), lr=0.05).step()
    assert_same(nets.behavior, behavior)
    log_weight = -0.4 - 0.05 * weight * (entropy.item() + 2)
    assert abs(nets.log_bc_weight.item() - log_weight) < 1e-8
    assert_close(metrics["nll"], nll.detach())
    assert_close(metrics["entropy"], entropy.detach())
    for name in ("offset", "offset_target", "actor"):
        assert same(getattr(nets, name), getattr(before, name))


class Oracle:
    """One update of the critics, the actor and the temperature, written again with torch.nn,
    torch.optim and torch.distributions. `form` is Args' offset."""

    def __init__(self, nets, form):
        self.offsets = [stack(nets.offset, e) for e in range(2)]
        self.targets = [stack(nets.offset_target, e) for e in range(2)]
        self.actor, self.behavior = stack(nets.actor), stack(nets.behavior)
        self.log_temperature, self.form = nets.log_temperature.item(), form

    def q(self, offsets, s, a):
        """Both critics, (B,) each."""
        log_density = clone_density(self.behavior, s)[0].log_prob(a).sum(-1) if self.form else 0
        return [net(torch.cat([s, a], -1)).squeeze(-1) + log_density for net in offsets]

    def act(self, s, noise):
        """The actor's action and its log-density."""
        mean, std = self.actor(s)[:, :2], self.actor(s)[:, 2:].exp()
        pi = D.TransformedDistribution(D.Normal(mean, std), D.TanhTransform())
        a = (mean + std * noise).tanh()
        return a, pi.log_prob(a).sum(-1)

    def step(self, data, next_noise, penalty_action, actor_noise, lam, polyak, lr):
        """The scalars of the step, by the names of the metrics."""
        s, a, r, s2, terminal = rows(data)
        with torch.no_grad():
            a2, _ = self.act(s2, next_noise)
            y = r + 5 + 0.99 * (1 - terminal) * torch.minimum(*self.q(self.targets, s2, a2))
        td_loss = sum((y - q).square().mean() for q in self.q(self.offsets, s, a))
        penalty, at = 0, penalty_action.detach().clone().requires_grad_()
        for net in self.offsets:
            value = net(torch.cat([s, at], -1)).sum()
            (slope,) = torch.autograd.grad(value, at, create_graph=True)
            penalty = penalty + slope.square().sum(-1).mean()
        (td_loss + lam * penalty).backward()
        for net, target in zip(self.offsets, self.targets):
            torch.optim.SGD(net.parameters(), lr=lr).step()
            for p, t in zip(net.parameters(), target.parameters()):
                t.data = polyak * p.data + (1 - polyak) * t.data  # after the critics' step

        a_pi, log_prob = self.act(s, actor_noise)
        q, temperature = (
            torch.minimum(*self.q(self.offsets, s, a_pi)),
            math.exp(self.log_temperature),
        )
        (temperature * log_prob - q).mean().backward()
        torch.optim.SGD(self.actor.parameters(), lr=lr).step()
        entropy = -log_prob.detach().mean()
        self.log_temperature -= lr * temperature * (entropy.item() + 2)
        found = dict(td_loss=td_loss, penalty=penalty, target=y.mean(), entropy=entropy)
        return found | {"q_loss": td_loss + lam * penalty}


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("penalty_actions", ["policy", "data"])
def test_step_by_hand(data, offset, penalty_actions):
    nets, args = make(data, offset=offset, penalty_actions=penalty_actions, lam=0.3, polyak=0.1)
    nets.log_temperature.data.fill_(0.2)
    if not offset:  # then nothing may ask the clone
        nets.behavior.weights[0].data.fill_(math.nan)
    oracle, before = Oracle(nets, offset), copy.deepcopy(nets)
    next_noise, penalty_noise, actor_noise = torch.randn(3, 16, 2).double()
    normals = [next_noise, penalty_noise, actor_noise]
    penalty_action, _ = oracle.act(data.obs, penalty_noise)
    if penalty_actions == "data":
        penalty_action = data.action
        del normals[1]
    with Inject(randint=[torch.arange(16)], randn_like=normals):
        metrics = fisher_brc.update(nets, optimizers(nets, SGD, 0.02), data, args)
    expected = oracle.step(data, next_noise, penalty_action, actor_noise, 0.3, 0.1, 0.02)

    assert_same(nets.offset, *oracle.offsets)
    assert_same(nets.offset_target, *oracle.targets)
    assert_same(nets.actor, oracle.actor)
    assert abs(nets.log_temperature.item() - oracle.log_temperature) < 1e-8
    assert same(nets.behavior, before.behavior)
    assert nets.log_bc_weight == before.log_bc_weight
    assert all(p.grad is None for p in nets.parameters())
    for name, value in expected.items():
        assert_close(metrics[name], value.detach())


def test_keras_epsilon_moves_the_actor_by_a_few_thousandths(tiny_data):
    """Of the size of its weights, after the 20 updates in which it matters most."""
    data, args = tiny_data(n=64), Args(batch_size=64)

    def weights(optimizer):
        torch.manual_seed(0)
        nets = Nets(data, args)
        opt = optimizers(nets, optimizer, 3e-4)
        for _ in range(20):
            fisher_brc.update(nets, opt, data, args)
        return torch.cat([p.detach().flatten() for p in nets.actor.parameters()])

    ours, keras = weights(lambda params, lr: Adam(params, lr, eps=1e-7)), weights(KerasAdam)
    assert 5e-4 < (ours - keras).norm() / ours.norm() < 5e-3


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


class Keys(PlainRun):
    """Notes what a shared clone depends on."""

    def cached(self, stage, module, *settings):
        self.settings = settings
        return False


def test_a_shared_clone_depends_on_its_own_settings_alone(tiny_data):
    def settings(**values):
        run = Keys()
        train(run, tiny_data(), Args(**dict(bc_steps=2, steps=1, batch_size=4) | values))
        return run.settings

    for own in ("bc_steps", "bc_lr", "batch_size", "components", "dequantize", "normalize_obs"):
        assert settings(**{own: 1}) != settings()
    assert settings(lam=9.0, bonus=0.0, lr=0.1, steps=2) == settings()


def test_a_clone_that_is_read_is_not_trained(tiny_data):
    run = PlainRun()
    run.cached = lambda stage, module, *settings: True
    train(run, tiny_data(), Args(bc_steps=9, steps=2, batch_size=4))
    assert [len(rows) for rows in run.phases.values()] == [0, 2]
    assert set(run.references) == {"its clone (BC)"}


def test_without_the_offset_form_there_is_no_clone(tiny_data):
    run = PlainRun()
    train(run, tiny_data(), Args(offset=False, bc_steps=9, steps=2, batch_size=4))
    assert list(run.phases) == ["train"] and not run.references


def test_metrics_stay_finite_and_q_rises_with_the_bonus(tiny_data):
    data, run = tiny_data(n=64), PlainRun()
    torch.manual_seed(0)
    train(run, data, Args(bc_steps=50, steps=200, batch_size=8))
    for row in run.phases["behavior"] + run.phases["train"]:
        assert all(map(math.isfinite, row.values()))
    q = [row["q_data"] for row in run.phases["train"]]
    assert sum(q[-20:]) / 20 > sum(q[:20]) / 20 + 1
    largest = (data.reward.abs().max().item() + 5) * 100
    assert run.largest == pytest.approx({"q_data": largest, "target": largest})


def play(**method):
    """Mean and samples of the policy learned on a bandit: actions near -0.5 and near 0.3, reward
    10 a, so that the reward rises out of the data on the right."""
    torch.manual_seed(0)
    a = torch.where(torch.rand(400) < 0.5, -0.5, 0.3) + 0.1 * torch.randn(400).clamp(-2, 2)
    s = torch.ones(400, 1)
    data = Data(s, a[:, None], 10 * a, s, torch.ones(400))
    args = Args(batch_size=32, bonus=0.0, bc_steps=200, steps=250, bc_lr=3e-3, lr=1e-3, **method)
    run = PlainRun()
    train(run, data, args)
    mean, log_std = (x[0, 0].detach() for x in run.nets.pi(s[:1]))
    assert_close(run.act(s[:1]), mean.tanh().view(1, 1))
    return mean.tanh().item(), (mean + log_std.exp() * torch.randn(1000)).tanh()


def test_bandit_takes_the_best_action_of_the_data():
    """The better of two clusters, and no step beyond it; without the density and the penalty the
    same file walks out of the data."""
    action, samples = play()
    assert 0.2 < action < 0.5
    assert ((samples > 0.0) & (samples < 0.6)).float().mean() > 0.95
    action, _ = play(offset=False, lam=0.0)
    assert action > 0.55


@pytest.mark.parametrize("env", ["antmaze-umaze-v2", "D4RL/antmaze/umaze-v1"])
def test_antmaze_has_no_bonus(env):
    """A bonus per step would pay for never reaching the goal, where episodes end."""
    args, _ = parse(Args, fisher_brc.PRESETS, ["--env", env])
    assert (args.bonus, args.eval_every, args.eval_episodes) == (0.0, 100_000, 100)
    args, _ = parse(Args, fisher_brc.PRESETS, ["--env", "pointmaze-medium-demo"])
    assert args.bonus < 0, "a step costs where the goal ends the episode"


# ---- the file on its own ---------------------------------------------------------------------

RUN = """
class Run:
    device = torch.device("cpu")

    def start(self, nets, opt, **largest):
        self.nets = nets

    def loop(self, steps, phase="train"):
        return range(1, steps + 1)

    def after(self, t, metrics, act=None):
        self.metrics, self.act = metrics, act

    cached = share = reference = lambda self, *args: False
"""

ALONE = f"""
import sys
import torch
import fisher_brc
from common import Data
{RUN}
obs, next_obs = torch.randn(2, 100, 3)
data = Data(obs, torch.rand(100, 2) * 2 - 1, torch.randn(100), next_obs, torch.zeros(100))
run, args = Run(), fisher_brc.Args(bc_steps=5, steps=5, batch_size=16)
torch.manual_seed(0)
start = fisher_brc.Nets(data, args).state_dict()
torch.manual_seed(0)
fisher_brc.train(run, data, args)
assert all(value.isfinite() for value in run.metrics.values())
assert run.act(obs).shape == (100, 2) and run.act(obs).abs().max() <= 1
state = run.nets.state_dict()
moved = {{name.split(".")[0] for name in state if not torch.equal(state[name], start[name])}}
still = {{name.split(".")[0] for name in state}} - moved
assert still == {{"scaling"}}, still
assert not {{"harness", "tyro", "gymnasium", "h5py", "scipy"}} & set(sys.modules)
print("trained")
"""


def test_the_file_and_common_alone_train_on_plain_tensors(tmp_path):
    """The stand-in for a run has at most fifteen lines; the two files need torch alone."""
    assert len([line for line in RUN.splitlines() if line]) <= 15
    shutil.copy(ROOT / "common.py", tmp_path)
    shutil.copy(ROOT / "algorithms" / "fisher_brc.py", tmp_path)
    (tmp_path / "alone.py").write_text(ALONE)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "alone.py"]
    result = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert result.stdout.endswith("trained\n"), result.stderr
