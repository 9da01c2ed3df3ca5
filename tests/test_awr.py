"""awr.py: returns over episodes, their tables, the weights, both updates, exact resume, bandits."""

import copy
import math
import os
import signal
import sys
from types import SimpleNamespace

import awr
import bc
import numpy as np
import pytest
import torch
from awr import (
    Args,
    Nets,
    awr_loss,
    critic_loss,
    lambda_returns,
    q_advantage,
    sample_action,
    tabulate,
    update,
    value_loss,
)
from oracles import SGD, assert_same, in_double, rows, stack
from torch import nn
from torch.testing import assert_close

from common import Adam, orthogonal_
from datasets import InputError
from experiment import load_tensors


def optimizers(nets, optimizer=Adam, lr=3e-4):
    critic = "v" if hasattr(nets, "v") else "q"
    params = {"actor": [*nets.actor.parameters(), nets.log_std]}
    params[critic] = list(getattr(nets, critic).parameters())
    return SimpleNamespace(**{k: optimizer(p, lr) for k, p in params.items()})


def make(data, optimizer=Adam, lr=3e-4, **values):
    """Networks in float64 with outputs of size one, whose targets differ from them; tables."""
    args = Args(batch_size=16, **values)
    torch.manual_seed(0)
    nets, other = Nets(data, args), Nets(data, args)
    nets.log_std.data.copy_(torch.linspace(-0.5, 0.2, len(nets.log_std)))
    for x in (nets, other):
        for name, net in x.named_children():
            name == "scaling" or orthogonal_(net, 1.0, 0.7)
    if args.advantage == "returns":
        nets.v_target.load_state_dict(other.v.state_dict())
    else:
        nets.q_target.load_state_dict(other.q.state_dict())
    nets = nets.double()
    data.returns, data.advantage = data.reward.new_zeros(2, len(data.reward))
    if args.advantage == "returns":
        tabulate(nets, data, args)
    return nets, optimizers(nets, optimizer, lr), args


def linked(data):
    """Next observations that are the next row's, within each episode."""
    same = data.episode[:-1] == data.episode[1:]
    data.next_obs[:-1][same] = data.obs[1:][same]
    return data


@pytest.fixture
def data(tiny_data):
    """Two episodes of 8 rows, float64: the first ends at a terminal, the second is cut."""
    return linked(in_double(tiny_data(obs_dim=3, act_dim=2, n=16)))


# ---- returns ---------------------------------------------------------------------------------


def episodes(*lengths, ended=(), seed=0):
    """r, v2, terminal, last of episodes one after the other; those in `ended` are terminal."""
    draw = torch.Generator().manual_seed(seed)
    r, v2 = torch.randn(2, sum(lengths), generator=draw, dtype=torch.float64) * 3 + 1
    last = torch.cat([torch.arange(n) == n - 1 for n in lengths])
    number = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    return r, v2, (last & torch.isin(number, torch.tensor(ended))).double(), last


def by_definition(r, v2, terminal, last, gamma, lam):
    """(1 - lam) sum_n lam^(n-1) G^(n), the last n-step return taking the rest of the weight."""
    out = torch.zeros_like(r)
    for t in range(len(r)):
        weight, rewards, n = 1.0, 0.0, 0
        while True:
            i = t + n
            rewards += gamma**n * r[i].item()
            n_step = rewards + gamma ** (n + 1) * (1 - terminal[i].item()) * v2[i].item()
            if last[i]:
                out[t] += weight * n_step
                break
            out[t] += weight * (1 - lam) * n_step
            weight, n = weight * lam, n + 1
    return out


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_returns_are_their_definition(lam):
    parts = episodes(1, 2, 7, 33, 1, 16, 40, ended=(0, 3, 5))
    g = lambda_returns(*parts, Args(td_lambda=lam, gamma=0.9))
    assert_close(g, by_definition(*parts, 0.9, lam))
    one = episodes(1, ended=())
    assert_close(lambda_returns(*one, Args(gamma=0.9)), one[0] + 0.9 * one[1])


def test_lambda_zero_is_one_step_and_one_is_monte_carlo():
    r = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    v2 = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    terminal, last = torch.tensor([0.0, 0, 1, 0, 0]), torch.tensor([0, 0, 1, 0, 1]).bool()
    one_step = lambda_returns(r, v2, terminal, last, Args(td_lambda=0.0, gamma=0.5))
    assert_close(one_step, torch.tensor([6.0, 12.0, 4.0, 28.0, 41.0]))
    monte_carlo = lambda_returns(r, v2, terminal, last, Args(td_lambda=1.0, gamma=0.5))
    assert_close(monte_carlo, torch.tensor([3.0, 4.0, 4.0, 28.5, 41.0]))


def test_terminal_against_cut():
    """Identical episodes, V = 5: the cut one is worth gamma^k 5 more, k rows before its end."""
    r = torch.tensor([1.0, 2.0, 3.0]).repeat(2).double()
    last = torch.tensor([0, 0, 1, 0, 0, 1]).bool()
    terminal = torch.tensor([0.0, 0, 1, 0, 0, 0]).double()
    for lam in (0.0, 0.7, 1.0):
        args = Args(gamma=0.9, td_lambda=lam)
        ended, cut = lambda_returns(r, torch.full((6,), 5.0).double(), terminal, last, args).view(
            2, 3
        )
        assert_close(cut[2] - ended[2], torch.tensor(0.9 * 5).double())
        assert_close(cut[0] - ended[0], torch.tensor(0.9**3 * lam**2 * 5).double())


def test_returns_of_the_true_value_are_that_value():
    """Then A = 0 and every weight is 1, for any lambda."""
    r, _, terminal, last = episodes(9, 13, 4, ended=(0, 2))
    v, v2 = torch.zeros_like(r), torch.randn_like(r)
    for t in reversed(range(len(r))):
        v2[t] = v2[t] if last[t] else v[t + 1]
        v[t] = r[t] + 0.9 * (1 - terminal[t]) * v2[t]
    for lam in (0.0, 0.3, 0.95, 1.0):
        g = lambda_returns(r, v2, terminal, last, Args(gamma=0.9, td_lambda=lam))
        assert_close(g, v)
        _, weight = awr_loss((v[:, None], v[:1]), v[:, None], g - v, Args(temperature=0.01))
        assert_close(weight, torch.ones_like(v))


def test_a_terminal_inside_an_episode_stops_its_returns():
    r, v2, terminal, last = episodes(6)
    terminal[2] = 1
    g = lambda_returns(r, v2, terminal, last, Args())
    assert_close(g[2], r[2])
    r[3:], v2[3:] = 1e6, 1e6
    assert torch.equal(lambda_returns(r, v2, terminal, last, Args())[:3], g[:3])


# ---- tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_tables_are_the_definition_on_networks(data, normalize):
    nets, _, args = make(data, normalize_advantage=normalize, gamma=0.9, td_lambda=0.7)
    v = stack(nets.v_target)
    last = torch.arange(16) % 8 == 7
    v2 = v(data.next_obs).squeeze(-1).detach()
    g = by_definition(data.reward, v2, data.terminal, last, 0.9, 0.7)
    assert_close(data.returns, g)
    a = g - v(data.obs).squeeze(-1).detach()
    expected = (a - a.mean()) / (a.std(correction=0) + 1e-5) if normalize else a
    assert_close(data.advantage, expected)


def test_tables_of_many_rows_equal_one_forward(tiny_data):
    """More than one block of rows, and of episode ends; written in place."""
    data = tiny_data(obs_dim=2, act_dim=1, n=40_000)
    data.episode = torch.arange(40_000) // 2
    linked(data)
    torch.manual_seed(0)
    args = Args(normalize_advantage=False, td_lambda=0.5)
    nets = Nets(data, args)
    data.returns, data.advantage = torch.zeros(2, 40_000)
    before = data.returns.data_ptr(), data.advantage.data_ptr()
    tabulate(nets, data, args)
    assert before == (data.returns.data_ptr(), data.advantage.data_ptr())
    with torch.no_grad():
        v, v2 = nets.v_target(data.obs), nets.v_target(data.next_obs)
    one = data.reward + 0.99 * (1 - data.terminal) * v2
    first, second = one.view(-1, 2).unbind(1)
    alive = 1 - data.terminal.view(-1, 2)[:, 0]
    first = first + 0.99 * 0.5 * alive * (second - v2.view(-1, 2)[:, 0])
    g = torch.stack([first, second], 1).flatten()
    assert_close(data.returns, g)
    assert_close(data.advantage, g - v, atol=1e-5, rtol=1e-5)
    assert not data.returns.requires_grad and not data.advantage.requires_grad


def test_an_episode_knows_nothing_of_its_neighbors(data):
    nets, _, args = make(data, normalize_advantage=False)
    returns = data.returns.clone()
    data.obs[8:], data.next_obs[8:], data.reward[8:] = 7.0, -9.0, 1e4
    tabulate(nets, data, args)
    assert torch.equal(data.returns[:8], returns[:8]) and (data.returns[8:] > 1e3).all()
    data.next_obs[7] = 1e3  # at a terminal it has no value
    tabulate(nets, data, args)
    assert torch.equal(data.returns[:8], returns[:8])


def test_cut_bootstraps_from_its_own_next_observation(data):
    nets, _, args = make(data)
    data.next_obs[15] += 1
    tabulate(nets, data, args)
    v2 = nets.v_target(data.next_obs[15:]).item()
    assert_close(data.returns[15].item(), data.reward[15].item() + 0.99 * v2)


def test_advantage_is_standardized_over_the_dataset(data):
    make(data)
    assert abs(data.advantage.mean()) < 1e-12
    assert abs(data.advantage.std(correction=0) - 1) < 1e-4
    assert data.advantage[:8].mean().abs() > 1e-3, "not episode by episode"
    nets, _, args = make(data)
    data.reward.zero_()
    nets.v_target.weights[-1].data.zero_(), nets.v_target.biases[-1].data.zero_()
    tabulate(nets, data, args)  # all equal: no division by zero
    assert torch.equal(data.advantage, torch.zeros(16).double())


@pytest.mark.parametrize(("c", "d"), [(7.0, 0.0), (1.0, -1.0), (0.03, 4.0)])
def test_rewards_may_be_scaled_and_without_terminals_shifted(data, c, d):
    """V of the rewards c r + d is c V + d / (1 - gamma), where no episode ends."""

    def advantage():
        nets, _, args = make(data, gamma=0.9)
        with torch.no_grad():
            plain = data.advantage.clone()
            nets.v_target.weights[-1].mul_(c)
            nets.v_target.biases[-1].mul_(c).add_(d / (1 - 0.9))
        reward = data.reward.clone()
        data.reward.mul_(c).add_(d)
        tabulate(nets, data, args)
        data.reward = reward
        return plain, data.advantage

    plain, changed = advantage()
    assert d == 0 or (plain - changed).abs().max() > 0.1  # one row is terminal
    if d == 0:
        assert_close(changed, plain, atol=1e-4, rtol=1e-4)  # 1e-5 stands beside the deviation
    data.terminal.zero_()
    plain, changed = advantage()
    assert_close(changed, plain, atol=1e-3, rtol=1e-3)


# ---- actor -----------------------------------------------------------------------------------


def actor_gradient(nets, loss):
    grads = torch.autograd.grad(loss, [*nets.actor.parameters(), nets.log_std])
    return torch.cat([g.flatten() for g in grads])


def test_loss_is_torchs_weighted_likelihood(data):
    nets, _, _ = make(data)
    advantage = torch.randn(16).double()
    args = Args(temperature=0.7, max_weight=3.0)
    weight = (advantage / 0.7).exp().clamp(max=3)
    assert (weight == 3).any() and (weight < 3).any()
    normal = torch.distributions.Normal(stack(nets.actor)(data.obs).tanh(), nets.log_std.exp())
    expected = -(weight * normal.log_prob(data.action).sum(1)).mean()
    loss, found = awr_loss(nets.pi(data.obs), data.action, advantage, args)
    assert loss.shape == () and found.shape == (16,)
    assert_close(loss, expected)
    assert_close(found, weight)


@pytest.mark.parametrize(("temperature", "factor"), [(math.inf, 1.0), (1.0, 0.0)])
def test_infinite_temperature_is_behavior_cloning(data, temperature, factor):
    nets, _, _ = make(data)
    advantage = factor * torch.linspace(-50, 50, 16).double()
    loss, weight = awr_loss(
        nets.pi(data.obs), data.action, advantage, Args(temperature=temperature)
    )
    assert torch.equal(weight, torch.ones(16).double())
    clone = bc.actor_loss(nets, data.obs, data.action, bc.Args(gaussian=True))
    assert torch.equal(actor_gradient(nets, loss), actor_gradient(nets, clone))


def test_huge_advantages_are_capped_and_finite(data):
    nets, _, args = make(data)
    nets = nets.float()
    advantage = torch.full((16,), 1e6)
    advantage[8:] = -1e6
    loss, weight = awr_loss(nets.pi(data.obs.float()), data.action.float(), advantage, args)
    assert weight.tolist() == [20.0] * 8 + [0.0] * 8
    grad = actor_gradient(nets, loss)
    assert loss.isfinite() and grad.isfinite().all() and grad.norm() > 0


def gradient_at(mean, std, a, advantage, args):
    """Of the loss in mean and log-std, one state and one dimension."""
    mean = torch.tensor([[mean]], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([math.log(std)], dtype=torch.float64, requires_grad=True)
    loss, _ = awr_loss((mean.expand(len(a), 1), log_std), a[:, None], advantage, args)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [mean, log_std])])


def moments(p, a):
    mean = (p * a).sum() / p.sum()
    return mean.item(), ((p * (a - mean) ** 2).sum() / p.sum()).sqrt().item()


def test_optimum_is_the_weighted_mean_and_deviation():
    a = torch.tensor([-0.8, -0.1, 0.3, 0.9]).double()
    advantage = torch.tensor([-1.0, 0.5, 2.0, 9.0]).double()
    w = torch.tensor([math.exp(-1), math.exp(0.5), math.exp(2), 20], dtype=torch.float64)
    mean, std = moments(w, a)
    assert gradient_at(mean, std, a, advantage, Args()).norm() < 1e-12
    for other in ((mean + 0.01, std), (mean, std * 1.01)):
        assert gradient_at(*other, a, advantage, Args()).norm() > 1e-2


def test_bandit_optimum_is_behavior_times_exponential():
    """Eq. 11: actions with shares beta_i in the data and values Q_i; a shift of Q is nothing."""
    beta, q = torch.tensor([5, 1, 3, 1]), torch.tensor([0.0, 2.0, 1.0, -1.0]).double()
    action = torch.tensor([-0.6, 0.7, 0.1, -0.9]).double()
    args = Args(temperature=0.5, max_weight=1e9)
    pi = beta * (q / 0.5).exp()
    mean, std = moments(pi, action)
    a, advantage = action.repeat_interleave(beta), q.repeat_interleave(beta)
    for shift in (0.0, -3.0):
        assert gradient_at(mean, std, a, advantage + shift, args).norm() < 1e-10
        assert gradient_at(mean + 0.02, std, a, advantage + shift, args).norm() > 1e-4

    logits = torch.zeros(4).double().requires_grad_()  # the same weights, a policy without shape
    index = torch.arange(4).repeat_interleave(beta)
    _, weight = awr_loss((a[:, None], a[:1]), a[:, None], advantage, args)
    logits.data = (pi / pi.sum()).log()
    loss = -(weight * logits.log_softmax(0)[index]).mean()
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-12


def test_gaussian_behavior_under_a_linear_q():
    """beta = N(m, s^2), Q = k a: pi* = N(m + s^2 k / temperature, s^2)."""
    m, s, k, temperature = -0.1, 0.2, 1.5, 0.5
    normal = torch.distributions.Normal(m, s)
    a = normal.icdf(torch.linspace(0, 1, 100_001)[1:-1].double())
    args = Args(temperature=temperature, max_weight=1e9)
    grad = gradient_at(m + s**2 * k / temperature, s, a, k * a, args)
    assert grad.norm() < 0.01
    assert gradient_at(m, s, a, k * a, args).norm() > 1


@pytest.mark.parametrize(("value", "clamped"), [(50.0, 2.0), (-50.0, -5.0)])
def test_log_std_is_clamped(data, value, clamped):
    nets, _, _ = make(data)
    nets.log_std.data.fill_(value)
    mean, log_std = nets.pi(data.obs)
    assert log_std.tolist() == [clamped] * 2
    assert_close(mean, stack(nets.actor)(data.obs).tanh())


# ---- off-policy critics ----------------------------------------------------------------------


def test_target_by_hand():
    """y = r + 0.9 min(Q'_1, Q'_2) where the episode goes on, r where it ended; loss summed over
    critics: rows y = (1 + 0.9 * 2, 5) against Q = (1, 1) and (2, 5)."""
    s = torch.zeros(2, 1)
    nets = SimpleNamespace(
        pi=lambda s2: (torch.zeros(2, 1), torch.zeros(1)),
        q_target=lambda s2, a2: torch.tensor([[2.0, 7.0], [3.0, 6.0]]),
        q=lambda s, a: torch.tensor([[1.0, 1.0], [2.0, 5.0]]),
    )
    r, terminal = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 1.0])
    loss, q_mean = critic_loss(nets, s, s, r, s, terminal, Args(gamma=0.9))
    assert_close(q_mean, nets.q(s, s).detach().mean())
    assert_close(loss, torch.tensor((1.8**2 + 4**2) / 2 + (0.8**2 + 0**2) / 2))


def test_advantage_by_hand():
    """Rows Q(s,a) = min(5, 4), min(1, 7); V = min(2, 9), min(8, 3)."""
    found = []
    nets = SimpleNamespace(
        q=lambda s, a: found.append((s, a)) or torch.tensor([[5.0, 1, 2, 8], [4.0, 7, 9, 3]])
    )
    s, a = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.3], [0.4]])
    pi = torch.tensor([[-0.5], [3.0]]), torch.tensor([-30.0])
    assert q_advantage(nets, s, a, pi).tolist() == [2.0, -2.0]
    assert_close(found[0][0][:, 0], torch.tensor([1.0, 2.0, 1.0, 2.0]))
    assert_close(found[0][1][:, 0], torch.tensor([0.3, 0.4, -0.5, 1.0]))


def test_sampled_actions_are_a_clipped_gaussian():
    torch.manual_seed(0)
    a = sample_action(torch.full((20_000, 2), 0.4), torch.tensor([0.1, 1.0]).log())
    assert abs(a[:, 0].mean() - 0.4) < 0.01 and abs(a[:, 0].std() - 0.1) < 0.01
    assert a.abs().max() == 1 and abs((a[:, 1] == 1).float().mean() - 0.2743) < 0.015
    assert abs((a[:, 1] == -1).float().mean() - 0.0808) < 0.015


# ---- update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["returns", "q"])
def test_which_parameters_each_loss_reaches(data, advantage):
    nets, _, args = make(data, advantage=advantage)
    s, a, r, s2, terminal = rows(data)
    pi = nets.pi(s)
    if advantage == "returns":
        u, loss = data.advantage, value_loss(nets, s, data.returns)
    else:
        u = q_advantage(nets, s, a, pi)
        loss, _ = critic_loss(nets, s, a, r, s2, terminal, args)
    actor, weight = awr_loss(pi, a, u, args)
    assert not u.requires_grad and not weight.requires_grad
    online = [(k, p) for k, p in nets.named_parameters() if p.requires_grad]
    critic = "v" if advantage == "returns" else "q"
    assert {k.split(".")[0] for k, _ in online} == {"actor", "log_std", critic}
    for x, reached in ((loss, {critic}), (actor, {"actor", "log_std"})):
        grads = torch.autograd.grad(x, [p for _, p in online], allow_unused=True)
        for (name, _), g in zip(online, grads):
            assert (g is not None and g.any().item()) == (name.split(".")[0] in reached), name


def fixed_batches(monkeypatch, data, count):
    draw = torch.Generator().manual_seed(5)
    batches = [torch.randint(len(data.obs), (16,), generator=draw) for _ in range(count)]
    left = iter(batches)

    def sample(data, batch_size, fields=("obs", "action", "reward", "next_obs", "terminal")):
        i = next(left)
        return [getattr(data, field)[i] for field in fields]

    monkeypatch.setattr(awr, "sample", sample)
    return batches


ORACLES = [(SGD, 0.1), (Adam, 1e-3)]


@pytest.mark.parametrize(("optimizer", "lr"), ORACLES)
def test_step_on_returns_by_hand(data, monkeypatch, optimizer, lr):
    nets, opt, args = make(data, optimizer=optimizer, lr=lr, temperature=0.5, max_weight=2.0)
    before = copy.deepcopy(nets)
    actor, v = stack(nets.actor), stack(nets.v)
    log_std = nets.log_std.detach().clone().requires_grad_()
    oracle = {SGD: torch.optim.SGD, Adam: torch.optim.Adam}[optimizer]
    v_opt = oracle(v.parameters(), lr=lr)
    actor_opt = oracle([*actor.parameters(), log_std], lr=lr)
    for i in fixed_batches(monkeypatch, data, 3):
        metrics = update(nets, opt, data, args)
        v_opt.zero_grad(), actor_opt.zero_grad()
        v_loss = 0.5 * nn.functional.mse_loss(v(data.obs[i]).squeeze(1), data.returns[i])
        v_loss.backward()
        w = (2 * data.advantage[i]).exp().clamp(max=2.0)
        normal = torch.distributions.Normal(actor(data.obs[i]).tanh(), log_std.exp())
        loss = -(w * normal.log_prob(data.action[i]).sum(1)).mean()
        loss.backward()
        v_opt.step(), actor_opt.step()
        assert_same(nets.v, v)
        assert_same(nets.actor, actor)
        assert_close(nets.log_std, log_std)
        assert_close(metrics["v_loss"], v_loss.detach())
        assert_close(metrics["actor_loss"], loss.detach())
        assert_close(metrics["capped_weights"].item(), (w == 2).double().mean().item())
        assert_close(metrics["effective_share"], w.sum() ** 2 / (16 * (w**2).sum()))
    assert not any(x.requires_grad for x in metrics.values())
    for p, q in zip(nets.v_target.parameters(), before.v_target.parameters()):
        assert torch.equal(p, q), "V of the tables moves with the tables alone"
    assert all(p.grad is None for p in nets.parameters())


@pytest.mark.parametrize(("optimizer", "lr"), ORACLES)
def test_step_on_q_by_hand(data, monkeypatch, optimizer, lr):
    values = dict(advantage="q", temperature=0.1, max_weight=1.0)
    nets, opt, args = make(data, optimizer=optimizer, lr=lr, **values)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.4))
    actor, log_std = stack(nets.actor), nets.log_std.detach().clone().requires_grad_()
    qs, targets = ([stack(x, e) for e in range(2)] for x in (nets.q, nets.q_target))
    oracle = {SGD: torch.optim.SGD, Adam: torch.optim.Adam}[optimizer]
    q_opts = [oracle(q.parameters(), lr=lr) for q in qs]
    actor_opt = oracle([*actor.parameters(), log_std], lr=lr)

    def low(critics, s, a):
        return torch.minimum(*(q(torch.cat([s, a], 1)).squeeze(1) for q in critics))

    def act(s):
        return (actor(s).tanh() + 0.4 * log_std.exp()).clamp(-1, 1)

    for i in fixed_batches(monkeypatch, data, 3):
        metrics = update(nets, opt, data, args)
        s, a, r, s2, terminal = (x[i] for x in rows(data))
        with torch.no_grad():
            y = r + 0.99 * (1 - terminal) * low(targets, s2, act(s2))
        for q, q_opt in zip(qs, q_opts):
            q_opt.zero_grad()
            nn.functional.mse_loss(q(torch.cat([s, a], 1)).squeeze(1), y).backward()
            q_opt.step()
        with torch.no_grad():  # critics after their step, not their targets
            u = low(qs, s, a) - low(qs, s, act(s))
            w = (10 * u).exp().clamp(max=1.0)
        assert (w == 1).any() and (w < 0.9).any()
        actor_opt.zero_grad()
        normal = torch.distributions.Normal(actor(s).tanh(), log_std.exp())
        (-(w * normal.log_prob(a).sum(1)).mean()).backward()
        actor_opt.step()
        for target, q in zip(targets, qs):
            for t, o in zip(target.parameters(), q.parameters()):
                t.data = 0.995 * t.data + 0.005 * o.data
        assert_same(nets.q, *qs)
        assert_same(nets.q_target, *targets)
        assert_same(nets.actor, actor)
        assert_close(nets.log_std, log_std)
        assert_close(metrics["advantage"], u.mean())
    assert not any(x.requires_grad for x in metrics.values())


def test_weights_that_all_underflow_leave_finite_metrics(data):
    nets, opt, args = make(data)
    data.advantage.fill_(-1e9)
    metrics = update(nets, opt, data, args)
    assert metrics["effective_share"] == 0 and metrics["actor_loss"] == 0


# ---- a whole run -----------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(stop=None, **flags): train on a small log; SIGTERM within update number `stop`.
    Returns what every update saw, (data.returns, data.advantage) or the rewards."""
    rng = np.random.default_rng(0)
    ends = np.arange(40) % 10 == 9
    np.savez(
        tmp_path / "log.npz",
        observations=rng.normal(size=(40, 3)),
        actions=rng.uniform(-1, 1, (40, 1)),
        rewards=rng.normal(size=40),
        terminals=ends & (np.arange(40) < 20),
        timeouts=ends & (np.arange(40) >= 20),
        final_observations=rng.normal(size=(4, 3)),
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["awr.py"])

    def start(stop=None, **flags):
        seen = []

        def wrapped(nets, opt, data, args):
            tables = args.advantage == "returns"
            names = ("returns", "advantage") if tables else ("reward",)
            seen.append([getattr(data, name).clone() for name in names])
            if len(seen) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(nets, opt, data, args)

        own = dict(env="log.npz", eval_env="none", device="cpu", batch_size=8, log_every=3)
        own |= dict(steps=17, returns_every=5)
        with monkeypatch.context() as patch:
            patch.setattr(awr, "update", wrapped)
            try:
                awr.train(Args(**(own | flags)))
            except InputError:
                raise
            except SystemExit as left:
                assert left.code == 130
        return seen

    return start


def final(out):
    return load_tensors(awr.Path(out) / "log__awr__0" / "checkpoint.pt")


@pytest.mark.parametrize("advantage", ["returns", "q"])
def test_a_run_trains_every_network(start, advantage):
    start(advantage=advantage, steps=1, out="one")
    start(advantage=advantage, steps=2, out="two")
    one, two = final("one")["nets"], final("two")["nets"]
    still = {k.split(".")[0] for k in one if torch.equal(one[k], two[k])}
    assert still == {"scaling"} | ({"v_target"} if advantage == "returns" else set())


def test_tables_are_renewed_when_due(start):
    seen = [returns for returns, _ in start()]
    changed = [t for t in range(1, 17) if not torch.equal(seen[t], seen[t - 1])]
    assert changed == [5, 10, 15], "a table lasts 5 updates"


@pytest.mark.parametrize("stops", [(3,), (5,), (8,), (7, 1, 4), (10,), (13,)])
def test_resume_between_two_tables(start, stops):
    """The same tables before every update, and the same weights, as without interruption."""
    whole, parts = start(out="whole"), []
    for stop in (*stops, None):
        parts += start(stop=stop, out="parts", resume=bool(parts))
    assert len(parts) == len(whole) == 17
    for one, two in zip(whole, parts):
        assert all(map(torch.equal, one, two))
    one, two = final("whole"), final("parts")
    assert one["nets"].keys() == two["nets"].keys() >= {"v_target.weights.0"}
    for key, value in one["nets"].items():
        assert torch.equal(value, two["nets"][key]), key


def test_resume_on_q(start):
    """And the shift of the rewards is done once."""
    flags = dict(advantage="q", reward_shift=-1.0)
    whole = start(out="whole", **flags)
    start(stop=6, out="parts", **flags)
    parts = start(out="parts", resume=True, **flags)
    assert len(parts) == 11 and torch.equal(parts[-1][0], whole[0][0])
    plain = start(out="plain", advantage="q")
    assert_close(whole[0][0], plain[0][0] - 1)
    one, two = final("whole")["nets"], final("parts")["nets"]
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert {k.split(".")[0] for k in one} == {"scaling", "actor", "log_std", "q", "q_target"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (dict(advantage="v"), r"--advantage is 'v': give returns or q"),
        (dict(temperature=0.0), r"--temperature is 0\.0, .*: give numbers above 0"),
        (dict(temperature=math.nan), r"--temperature is nan"),
        (dict(max_weight=-1.0), r"--max-weight is -1\.0: give numbers above 0"),
        (dict(td_lambda=1.5), r"--td-lambda is 1\.5: give a number from 0 to 1"),
    ],
)
def test_bad_input(start, flags, says):
    with pytest.raises(InputError, match=says) as error:
        start(**flags)
    assert "\n" not in str(error.value) and not os.path.exists("runs")


# ---- behavior --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, math.inf])
def test_bandit_on_returns(tiny_data, temperature):
    """One state, r = 1 - (a - 0.5)^2: V is the mean reward, the policy the weighted mean action,
    or the plain one."""
    data = tiny_data(obs_dim=1, act_dim=1, n=65)
    data.obs[:], data.next_obs[:], data.terminal[:] = 0, 0, 1
    data.action = torch.linspace(-1, 1, 65)[:, None]
    data.reward, data.episode = 1 - (data.action[:, 0] - 0.5).square(), torch.arange(65)
    args = Args(batch_size=128, lr=1e-3, temperature=temperature)
    torch.manual_seed(0)
    nets = Nets(data, args)
    nets.log_std.data.fill_(-0.8)  # it moves by lr a step
    opt = optimizers(nets, lr=args.lr)
    data.returns, data.advantage = torch.zeros(2, 65)
    tabulate(nets, data, args)
    for t in range(400):
        opt.actor.lr.fill_(1e-3 if t < 250 else 2e-4), opt.v.lr.copy_(opt.actor.lr)
        update(nets, opt, data, args)
    assert torch.equal(data.returns, data.reward)
    assert abs(nets.v(data.obs[:1]).item() - data.reward.mean().item()) < 0.05
    std, mean = torch.std_mean(data.reward, correction=0)
    best, std = moments(((data.reward - mean) / std / temperature).exp(), data.action[:, 0])
    assert abs(awr.policy(nets, data.obs[:1], args).item() - best) < 0.05
    assert abs(nets.log_std.exp().item() - std) < 0.05


def test_bandit_on_q(tiny_data):
    """The same with a learned Q: the weighted mean at a temperature in units of reward."""
    data = tiny_data(obs_dim=1, act_dim=1, n=65)
    data.obs[:], data.next_obs[:], data.terminal[:] = 0, 0, 1
    data.action = torch.linspace(-1, 1, 65)[:, None]
    data.reward = 1 - (data.action[:, 0] - 0.5).square()
    args = Args(advantage="q", batch_size=128, lr=1e-3, temperature=0.3, max_weight=100.0)
    torch.manual_seed(0)
    nets = Nets(data, args)
    nets.log_std.data.fill_(-0.8)  # it moves by lr a step
    opt = optimizers(nets, lr=args.lr)
    for t in range(500):
        opt.actor.lr.fill_(1e-3 if t < 400 else 2e-4)
        update(nets, opt, data, args)
    best, std = moments((data.reward / 0.3).exp(), data.action[:, 0])
    assert best > 0.25
    assert abs(awr.policy(nets, data.obs[:1], args).item() - best) < 0.08
    assert abs(nets.log_std.exp().item() - std) < 0.08


def test_policy_stands_between_raw_observations_and_the_bounds(tiny_data):
    data, args = tiny_data(obs_dim=2, act_dim=1), Args()
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    data.action_low, data.action_high = torch.tensor([-2.0]), torch.tensor([6.0])
    nets, raw = Nets(data, args), torch.randn(5, 2)
    a = nets.actor((raw - data.obs_mean) / data.obs_std).tanh()
    assert_close(awr.policy(nets, raw, args), 2 + 4 * a)


def test_targets_start_as_copies(tiny_data):
    for advantage, name in (("returns", "v"), ("q", "q")):
        nets = Nets(tiny_data(), Args(advantage=advantage))
        online, target = getattr(nets, name), getattr(nets, name + "_target")
        for p, t in zip(online.parameters(), target.parameters()):
            assert torch.equal(p, t) and p is not t and not t.requires_grad
