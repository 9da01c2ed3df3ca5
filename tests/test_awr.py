"""awr.py: returns over episodes, their tables, the weights, exact resume."""

import copy
from types import SimpleNamespace

import awr
import bc
import pytest
import torch
from awr import Args, Nets, Tables, awr_loss, lambda_returns, tabulate, update
from oracles import in_double, stack
from torch.testing import assert_close

from common import Adam, orthogonal_
from run import parse


def optimizers(nets, optimizer=Adam, lr=3e-4):
    return SimpleNamespace(
        v=optimizer(nets.v.parameters(), lr),
        actor=optimizer([*nets.actor.parameters(), nets.log_std], lr),
    )


def with_tables(data):
    zeros = torch.zeros_like(data.reward)
    return Tables(**vars(data), returns=zeros, advantage=zeros.clone())


def make(data, optimizer=Adam, lr=3e-4, **values):
    """Networks in float64 with outputs of size one, where V of the tables differs from V; the data
    with tables."""
    args = Args(batch_size=16, **values)
    torch.manual_seed(0)
    nets = Nets(data, args)
    nets.log_std.data.copy_(torch.linspace(-0.5, 0.2, len(nets.log_std)))
    for net in (nets.actor, nets.v, nets.v_target):
        orthogonal_(net, 1.0, 0.7)
    nets, data = nets.double(), with_tables(data)
    tabulate(nets, data, args)
    return nets, optimizers(nets, optimizer, lr), data, args


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
    v2 = torch.full((6,), 5.0).double()
    for lam in (0.0, 0.7, 1.0):
        g = lambda_returns(r, v2, terminal, last, Args(gamma=0.9, td_lambda=lam))
        ended, cut = g.view(2, 3)
        assert_close(cut[2] - ended[2], torch.tensor(0.9 * 5).double())
        assert_close(cut[0] - ended[0], torch.tensor(0.9**3 * lam**2 * 5).double())


# ---- tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_tables_are_the_definition_on_networks(data, normalize):
    nets, _, data, _ = make(data, normalize_advantage=normalize, gamma=0.9, td_lambda=0.7)
    v = stack(nets.v_target)
    last = torch.arange(16) % 8 == 7
    v2 = v(data.next_obs).squeeze(-1).detach()
    g = by_definition(data.reward, v2, data.terminal, last, 0.9, 0.7)
    assert_close(data.returns, g)
    a = g - v(data.obs).squeeze(-1).detach()
    expected = (a - a.mean()) / (a.std(correction=0) + 1e-5) if normalize else a
    assert_close(data.advantage, expected)


def test_advantage_is_standardized_over_the_dataset(data):
    nets, _, data, args = make(data)
    assert abs(data.advantage.mean()) < 1e-12
    assert abs(data.advantage.std(correction=0) - 1) < 1e-4
    assert data.advantage[:8].mean().abs() > 1e-3, "not episode by episode"
    data.reward.zero_()
    nets.v_target.weights[-1].data.zero_(), nets.v_target.biases[-1].data.zero_()
    tabulate(nets, data, args)  # all equal: no division by zero
    assert torch.equal(data.advantage, torch.zeros(16).double())


@pytest.mark.parametrize(("c", "d"), [(7.0, 0.0), (1.0, -1.0), (0.03, 4.0)])
def test_rewards_may_be_scaled_and_without_terminals_shifted(data, c, d):
    """V of the rewards c r + d is c V + d / (1 - gamma), where no episode ends."""
    nets, _, data, args = make(data, gamma=0.9)
    changed_nets, changed = copy.deepcopy(nets), copy.deepcopy(data)
    with torch.no_grad():
        changed_nets.v_target.weights[-1].mul_(c)
        changed_nets.v_target.biases[-1].mul_(c).add_(d / (1 - 0.9))
    changed.reward.mul_(c).add_(d)

    tabulate(changed_nets, changed, args)
    if d == 0:  # 1e-5 stands beside the deviation
        assert_close(changed.advantage, data.advantage, atol=1e-4, rtol=1e-4)
    else:  # one row is terminal
        assert (changed.advantage - data.advantage).abs().max() > 0.1

    data.terminal.zero_(), changed.terminal.zero_()
    tabulate(nets, data, args)
    tabulate(changed_nets, changed, args)
    assert_close(changed.advantage, data.advantage, atol=1e-3, rtol=1e-3)


# ---- actor -----------------------------------------------------------------------------------


def actor_gradient(nets, loss):
    grads = torch.autograd.grad(loss, [*nets.actor.parameters(), nets.log_std])
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize(("temperature", "factor"), [(1e30, 1.0), (1.0, 0.0)])
def test_a_very_large_temperature_is_behavior_cloning(data, temperature, factor):
    nets, *_ = make(data)
    advantage = factor * torch.linspace(-50, 50, 16).double()
    args = Args(temperature=temperature)
    loss, weight = awr_loss(nets, data.obs, data.action, advantage, args)
    assert torch.equal(weight, torch.ones(16).double())
    clone = bc.actor_loss(nets, data.obs, data.action, bc.Args(gaussian=True))
    assert torch.equal(actor_gradient(nets, loss), actor_gradient(nets, clone))


def test_huge_advantages_are_capped_and_finite(data):
    nets, _, _, args = make(data)
    nets = nets.float()
    advantage = torch.full((16,), 1e6)
    advantage[8:] = -1e6
    loss, weight = awr_loss(nets, data.obs.float(), data.action.float(), advantage, args)
    assert weight.tolist() == [20.0] * 8 + [0.0] * 8
    grad = actor_gradient(nets, loss)
    assert loss.isfinite() and grad.isfinite().all() and grad.norm() > 0


# ---- update ----------------------------------------------------------------------------------


def test_weights_that_all_underflow_leave_finite_metrics(data):
    nets, opt, data, args = make(data)
    data.advantage.fill_(-1e9)
    metrics = update(nets, opt, data, args)
    assert metrics["effective_share"] == 0 and metrics["pi_loss"] == 0


# ---- training --------------------------------------------------------------------------------


def equal(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "flag", ["--temperature 0", "--temperature nan", "--max-weight -1", "--td-lambda 1.5"]
)
def test_values_that_mean_nothing_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        parse(Args, awr.PRESETS, flag.split())
    assert flag.split()[0] in capsys.readouterr().err
