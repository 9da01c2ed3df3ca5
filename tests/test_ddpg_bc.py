"""DDPG+BC is td3_bc.py with four flags: its steps equal those of DDPG+BC written by hand."""

import copy
from types import SimpleNamespace

import pytest
import td3_bc
import torch
from oracles import SGD, assert_same, in_double, rows, stack
from td3_bc import PRESETS, Args, Nets, actor_loss, critic_loss, update
from torch import nn
from torch.testing import assert_close

from common import Adam, parse

FLAGS = {"policy_noise": 0.0, "noise_clip": 0.0, "critics": 1, "policy_freq": 1}


def ddpg_bc(**values):
    """Args of a command line with the four flags, `values` in the place of some."""
    flags = {"env": "tiny", "batch_size": 16} | FLAGS | values
    argv = [part for k, v in flags.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    return parse(Args, PRESETS, argv)


def make(data, args, optimizer=Adam, lr=2**-10):
    """Networks in float64, whose targets differ from them, with their optimizers."""
    torch.manual_seed(0)
    nets, other = Nets(data, args), Nets(data, args)
    nets.q_target.load_state_dict(other.q.state_dict())
    nets.actor_target.load_state_dict(other.actor.state_dict())
    nets = nets.double()
    opt = SimpleNamespace(
        q=optimizer(nets.q.parameters(), lr), actor=optimizer(nets.actor.parameters(), lr)
    )
    return nets, opt


@pytest.fixture
def data(tiny_data):
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def batches(monkeypatch, data, count):
    """Fixed batches, which `update` draws too."""
    draw = torch.Generator().manual_seed(5)
    index = [torch.randint(16, (16,), generator=draw) for _ in range(count)]
    drawn = [[x[i] for x in rows(data)] for i in index]
    left = iter(drawn)
    monkeypatch.setattr(td3_bc, "sample", lambda data, batch_size: next(left))
    return drawn


class ByHand:
    """DDPG (Lillicrap et al., 2016) with the AC+BC actor: Q / mean|Q| + alpha_bc log N(a; pi, 1).

    Its actor's loss is TD3+BC's divided by alpha, so a plain gradient step needs alpha times the
    rate, and Adam, which does not see the factor, 1 / alpha of the epsilon."""

    def __init__(self, nets, optimizer, lr, alpha, alpha_bc, gamma=0.99, rate=0.005):
        self.actor, self.actor_target = stack(nets.actor), stack(nets.actor_target)
        self.q, self.q_target = stack(nets.q, 0), stack(nets.q_target, 0)
        self.alpha_bc, self.gamma, self.rate = alpha_bc, gamma, rate
        if optimizer is SGD:
            self.q_opt = torch.optim.SGD(self.q.parameters(), lr=lr)
            self.actor_opt = torch.optim.SGD(self.actor.parameters(), lr=lr * alpha)
        else:
            self.q_opt = torch.optim.Adam(self.q.parameters(), lr=lr)
            self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr=lr, eps=1e-8 / alpha)

    def step(self, s, a, r, s2, terminal):
        with torch.no_grad():
            a2 = torch.tanh(self.actor_target(s2))
            y = r + self.gamma * (1 - terminal) * self.q_target(torch.cat([s2, a2], 1))[:, 0]
        self.q_opt.zero_grad()
        nn.functional.mse_loss(self.q(torch.cat([s, a], 1))[:, 0], y).backward()
        self.q_opt.step()

        pi = torch.tanh(self.actor(s))
        q = self.q(torch.cat([s, pi], 1))[:, 0]
        log_prob = torch.distributions.Normal(pi, 1.0).log_prob(a).sum(1)
        self.actor_opt.zero_grad()
        (-(q / q.detach().abs().mean()).mean() - self.alpha_bc * log_prob.mean()).backward()
        self.actor_opt.step()

        for target, online in ((self.q_target, self.q), (self.actor_target, self.actor)):
            for t, o in zip(target.parameters(), online.parameters()):
                t.data = (1 - self.rate) * t.data + self.rate * o.data

    def assert_equals(self, nets):
        for name in ("q", "actor", "q_target", "actor_target"):
            assert_same(getattr(nets, name), getattr(self, name))


@pytest.mark.parametrize("alpha", [2.5, 0.4])
@pytest.mark.parametrize(("optimizer", "lr"), [(SGD, 0.02), (Adam, 2**-10)])
def test_steps_are_those_of_ddpg_bc(data, monkeypatch, optimizer, lr, alpha):
    args = ddpg_bc(alpha=alpha, polyak=0.05)
    nets, opt = make(data, args, optimizer, lr)
    oracle = ByHand(nets, optimizer, lr, alpha, alpha_bc=2 / (alpha * 2), rate=0.05)
    for t, batch in enumerate(batches(monkeypatch, data, 6), 1):
        update(nets, opt, data, args, t % args.policy_freq == 0)
        oracle.step(*batch)
        oracle.assert_equals(nets)


@pytest.mark.parametrize(
    "more",
    [dict(policy_noise=0.2, noise_clip=0.5), dict(critics=2), dict(policy_freq=2), dict(alpha=2.6)],
)
def test_every_flag_is_needed(data, monkeypatch, more):
    """With one of them at TD3+BC's value, or another alpha, it is no longer the same step."""
    args = ddpg_bc(**more)
    nets, opt = make(data, args)
    oracle = ByHand(nets, Adam, 2**-10, 2.5, alpha_bc=2 / (2.5 * 2))
    for t, batch in enumerate(batches(monkeypatch, data, 3), 1):
        update(nets, opt, data, args, t % args.policy_freq == 0)
        oracle.step(*batch)
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


def test_train_moves_actor_and_targets_in_every_step(tiny_data, monkeypatch):
    data, seen = tiny_data(), []

    class FakeRun:
        device = torch.device("cpu")

        def __init__(self, args):
            self.loop = lambda steps: range(1, steps + 1)

        def __getattr__(self, name):
            return lambda *_: None

    def after_update(nets, opt, data, args, policy_step):
        before = copy.deepcopy(nets)
        metrics = update(nets, opt, data, args, policy_step)
        names = ("q", "actor", "q_target", "actor_target")
        pairs = [(getattr(nets, k).weights[0], getattr(before, k).weights[0]) for k in names]
        seen.append(not any(torch.equal(*pair) for pair in pairs))
        return metrics

    monkeypatch.setattr(td3_bc, "Run", FakeRun)
    monkeypatch.setattr(td3_bc, "load_dataset", lambda *_: (data, None))
    monkeypatch.setattr(td3_bc, "update", after_update)
    td3_bc.train(ddpg_bc(steps=5, device="cpu"))
    assert seen == [True] * 5
