"""DDPG+BC is td3_bc.py with four flags: its steps equal those of DDPG+BC written by hand."""

import copy
from types import SimpleNamespace

import pytest
import torch
from golden.tools import Inject
from oracles import SGD, assert_same, in_double, rows, stack
from stand_in import PlainRun
from td3_bc import Args, Nets, actor_loss, critic_loss, train, update
from torch import nn
from torch.testing import assert_close

from common import Adam

FLAGS = {"policy_noise": 0.0, "noise_clip": 0.0, "critics": 1, "policy_freq": 1}


def ddpg_bc(**values):
    """Args with the four flags, `values` in the place of some."""
    return Args(**({"batch_size": 16} | FLAGS | values))


def make(data, args, optimizer=Adam, lr=2**-10):
    """Networks in float64, whose targets differ from them, with their optimizers."""
    torch.manual_seed(0)
    nets, other = Nets(data, args), Nets(data, args)
    nets.q_target.load_state_dict(other.q.state_dict())
    nets.actor_target.load_state_dict(other.actor.state_dict())
    nets = nets.double()
    opt = SimpleNamespace(
        q=optimizer(nets.q.parameters(), lr),
        actor=optimizer(nets.actor.parameters(), lr),
    )
    return nets, opt


@pytest.fixture
def data(tiny_data):
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


class ByHand:
    """DDPG (Lillicrap et al., 2016) with the AC+BC actor: Q / mean|Q| + alpha_bc log N(a; pi, 1).

    Its actor's loss is TD3+BC's divided by alpha, so a plain gradient step needs alpha times the
    rate, and Adam, which does not see the factor, 1 / alpha of the epsilon."""

    def __init__(self, nets, optimizer, lr, alpha, alpha_bc, rate):
        self.actor, self.actor_target = stack(nets.actor), stack(nets.actor_target)
        self.q, self.q_target = stack(nets.q, 0), stack(nets.q_target, 0)
        self.alpha_bc, self.rate = alpha_bc, rate
        if optimizer is SGD:
            self.q_opt = torch.optim.SGD(self.q.parameters(), lr=lr)
            self.actor_opt = torch.optim.SGD(self.actor.parameters(), lr=lr * alpha)
        else:
            self.q_opt = torch.optim.Adam(self.q.parameters(), lr=lr)
            self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr=lr, eps=1e-8 / alpha)

    def step(self, s, a, r, s2, terminal):
        self.critic_step(s, a, r, s2, terminal)
        self.actor_step(s, a)
        self.target_step(self.q_target, self.q)
        self.target_step(self.actor_target, self.actor)

    def critic_step(self, s, a, r, s2, terminal):
        with torch.no_grad():
            a2 = torch.tanh(self.actor_target(s2))
            q2 = self.q_target(torch.cat([s2, a2], 1))[:, 0]
            y = r + 0.99 * (1 - terminal) * q2
        q = self.q(torch.cat([s, a], 1))[:, 0]
        loss = nn.functional.mse_loss(q, y)
        self.q_opt.zero_grad()
        loss.backward()
        self.q_opt.step()

    def actor_step(self, s, a):
        pi = torch.tanh(self.actor(s))
        q = self.q(torch.cat([s, pi], 1))[:, 0]
        unit_q = q / q.detach().abs().mean()
        log_prob = torch.distributions.Normal(pi, 1.0).log_prob(a).sum(1)
        loss = -unit_q.mean() - self.alpha_bc * log_prob.mean()
        self.actor_opt.zero_grad()
        loss.backward()
        self.actor_opt.step()

    def target_step(self, target, online):
        for t, o in zip(target.parameters(), online.parameters()):
            t.data = (1 - self.rate) * t.data + self.rate * o.data

    def assert_equals(self, nets):
        for name in ("q", "actor", "q_target", "actor_target"):
            assert_same(getattr(nets, name), getattr(self, name))


def both_step(data, args, optimizer, lr, oracle_of, steps):
    """Networks and oracle side by side on the same rows; yields both after every step."""
    nets, opt = make(data, args, optimizer, lr)
    oracle, draw = oracle_of(nets), torch.Generator().manual_seed(5)
    noise = torch.randn(16, 2, generator=draw).double()  # that a policy_noise of 0 silences
    for t in range(1, steps + 1):
        i = torch.randint(16, (16,), generator=draw)
        with Inject(randint=[i], randn_like=[noise]):
            update(nets, opt, data, args, t % args.policy_freq == 0)
        oracle.step(*[x[i] for x in rows(data)])
        yield nets, oracle


@pytest.mark.parametrize("alpha", [2.5, 0.4])
@pytest.mark.parametrize(("optimizer", "lr"), [(SGD, 0.02), (Adam, 2**-10)])
def test_steps_are_those_of_ddpg_bc(data, optimizer, lr, alpha):
    args = ddpg_bc(alpha=alpha, polyak=0.05)

    def oracle_of(nets):
        return ByHand(nets, optimizer, lr, alpha, alpha_bc=2 / (alpha * 2), rate=0.05)

    for nets, oracle in both_step(data, args, optimizer, lr, oracle_of, steps=6):
        oracle.assert_equals(nets)


@pytest.mark.parametrize(
    "more",
    [dict(policy_noise=0.2, noise_clip=0.5), dict(critics=2), dict(policy_freq=2), dict(alpha=2.6)],
)
def test_every_flag_is_needed(data, more):
    """With one of them at TD3+BC's value, or another alpha, it is no longer the same step."""

    def oracle_of(nets):
        return ByHand(nets, Adam, 2**-10, 2.5, alpha_bc=2 / (2.5 * 2), rate=0.005)

    *_, (nets, oracle) = both_step(data, ddpg_bc(**more), Adam, 2**-10, oracle_of, steps=3)
    with pytest.raises(AssertionError):
        oracle.assert_equals(nets)


@pytest.mark.parametrize("act_dim", [1, 3, 6])
@pytest.mark.parametrize("alpha", [0.3, 2.5])
def test_gradient_is_alpha_times_that_of_ac_plus_bc(tiny_data, alpha, act_dim):
    """alpha_bc = 2 / (alpha A): 0.267 for alpha 2.5 and three action dimensions."""
    data = in_double(tiny_data(obs_dim=3, act_dim=act_dim, n=16))
    args = ddpg_bc(alpha=alpha)
    nets, _ = make(data, args)
    loss, *_ = actor_loss(nets, data.obs, data.action, args)
    grads = torch.autograd.grad(loss, list(nets.actor.parameters()))

    actor, q = stack(nets.actor), stack(nets.q, 0)
    pi = actor(data.obs).tanh()
    value = q(torch.cat([data.obs, pi], 1))[:, 0]
    gaussian = torch.distributions.MultivariateNormal(pi, torch.eye(act_dim).double())
    alpha_bc = 2 / (alpha * act_dim)
    lam = 1 / value.abs().mean().detach()
    (-lam * value.mean() - alpha_bc * gaussian.log_prob(data.action).mean()).backward()
    layers = [m for m in actor if isinstance(m, nn.Linear)]
    expected = [m.weight.grad.T for m in layers] + [m.bias.grad for m in layers]
    for found, grad in zip(grads, expected, strict=True):
        assert_close(found, alpha * grad)


def test_target_has_no_noise(data):
    """The same loss from any random state, and that of one critic."""
    args = ddpg_bc()
    nets, _ = make(data, args)
    assert len(nets.q.weights[0]) == len(nets.q_target.weights[0]) == 1
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        losses.append(critic_loss(nets, *rows(data), args)[0])
    assert torch.equal(*losses)
    args.policy_noise, args.noise_clip = 0.2, 0.5
    assert not torch.equal(critic_loss(nets, *rows(data), args)[0], losses[0])


class Watching(PlainRun):
    """Notes after every step which networks have moved since the one before."""

    def start(self, nets, opt, **largest):
        super().start(nets, opt, **largest)
        self.before, self.moved = copy.deepcopy(nets), []

    def after(self, t, metrics, act=None):
        names = ("q", "actor", "q_target", "actor_target")
        pairs = [
            (getattr(self.nets, k).weights[0], getattr(self.before, k).weights[0]) for k in names
        ]
        self.moved.append([not torch.equal(now, then) for now, then in pairs])
        self.before = copy.deepcopy(self.nets)


def test_train_moves_actor_and_targets_in_every_step(tiny_data):
    run = Watching()
    train(run, tiny_data(), ddpg_bc(steps=5))
    assert run.moved == [[True] * 4] * 5
