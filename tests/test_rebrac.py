"""rebrac.py: rows with next actions, target, losses, networks, the limit of TD3+BC."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import td3_bc
import torch
from golden.tools import Inject
from oracles import in_double, rows
from rebrac import (
    Args,
    Nets,
    actor_loss,
    critic_loss,
    train,
    with_next_actions,
)
from stand_in import PlainRun
from torch.testing import assert_close

from common import Adam, Data, InputError


@pytest.fixture
def data(tiny_data):
    """16 rows in float64: eight that a terminal ends, eight that nothing ends, of which the last
    has no next action and is dropped."""
    return with_next_actions(in_double(tiny_data(obs_dim=3, act_dim=2, n=17)))


def make(data, optimizer=Adam, lr=2**-10, **values):
    """Networks in float64, whose targets differ from them, with their optimizers."""
    args = Args(batch_size=16, **values)
    torch.manual_seed(0)
    nets, other = Nets(data, args), Nets(data, args)
    nets.q_target.load_state_dict(other.q.state_dict())
    nets.actor_target.load_state_dict(other.actor.state_dict())
    nets = nets.double()
    with torch.no_grad():  # nothing is as small or as regular as it starts
        for name, p in nets.named_parameters():
            p.add_(torch.empty_like(p).uniform_(-0.1, 0.1))
    opt = SimpleNamespace(
        q=optimizer(nets.q.parameters(), lr),
        actor=optimizer(nets.actor.parameters(), lr),
    )
    return nets, opt, args


def noise(seed=7):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(16, 2, generator=draw).double()


# ---- rows ------------------------------------------------------------------------------------


def test_a_row_without_a_next_action_is_dropped_unless_it_is_terminal(tiny_data, capsys):
    data = tiny_data(n=12)  # two episodes of six rows; the first ends at a terminal
    found = with_next_actions(data)
    assert "follows 1 of 12 rows" in capsys.readouterr().out
    for name in ("obs", "action", "reward", "next_obs", "terminal", "episode"):
        assert torch.equal(getattr(found, name), getattr(data, name)[:11])
    for row in range(11):
        expected = data.action[row + 1] if row != 5 else torch.zeros(2)
        assert torch.equal(found.next_action[row], expected)
    assert torch.equal(found.episode_return, data.episode_return) and found.name == data.name


def test_nothing_is_said_where_every_row_stays(tiny_data, capsys):
    data = tiny_data(n=12)
    data.terminal[-1] = 1
    assert len(with_next_actions(data).obs) == 12 and not capsys.readouterr().out


def test_data_without_a_next_action_is_refused(tiny_data):
    data = tiny_data(n=4)
    data.episode, data.terminal = torch.arange(4), torch.zeros(4)
    with pytest.raises(InputError, match="no row has a next action"):
        with_next_actions(data)


def flagged_file(path, **more):
    """Three episodes of five rows: one that a terminal ends, two that a time limit cuts."""
    n = 15
    obs, action = np.arange(2.0 * n).reshape(n, 2), np.linspace(-0.7, 0.7, n)[:, None]
    terminal, timeout = np.zeros(n, bool), np.zeros(n, bool)
    terminal[4], timeout[[9, 14]] = True, True
    columns = dict(observations=obs, actions=action, rewards=np.arange(1.0 * n))
    np.savez(path, **columns, terminals=terminal, timeouts=timeout, **more)
    return action[:, 0], terminal, timeout


@pytest.mark.parametrize("last_known", [True, False])
def test_the_rows_of_a_file_are_the_authors(tmp_path, last_known):
    """They drop rows that a time limit cut and pair each other one with the action after it. Where
    a file lacks the observation after the time limit, our loader drops that row, its action is
    unknown, and the row before it is dropped here."""
    from run import load

    file = tmp_path / "log.npz"
    more = {"final_observations": np.zeros((3, 2))} if last_known else {}
    action, terminal, timeout = flagged_file(file, **more)
    authors = [i for i in range(14) if not timeout[i]]
    found = with_next_actions(load(str(file))[0])
    kept = found.reward.long().tolist()
    assert kept == (authors if last_known else [i for i in authors if i not in (8, 13)])
    for i, a, next_a in zip(kept, found.action, found.next_action):
        assert a == np.float32(action[i])
        assert next_a == (0 if terminal[i] else np.float32(action[i + 1]))


# ---- critics ---------------------------------------------------------------------------------


def test_a_terminal_row_is_its_reward_whatever_the_next_action(data):
    nets, _, args = make(data, critic_bc=0.5)
    s, a, r, s2, _ = rows(data)
    losses = []
    for next_a in (data.next_action, data.next_action + 1e6):
        with Inject(randn_like=[noise()]):
            losses.append(critic_loss(nets, s, a, r, s2, torch.ones_like(r), next_a, args)[0])
    assert torch.equal(*losses)
    assert_close(losses[0], (nets.q(s, a) - r).square().mean(1).sum())


# ---- actor -----------------------------------------------------------------------------------


# ---- networks --------------------------------------------------------------------------------


def test_initial_values_and_sizes():
    """Those of HalfCheetah: 17 observation and 6 action numbers."""
    zeros = torch.zeros(2, 17)
    data = Data(zeros, torch.zeros(2, 6), torch.zeros(2), zeros, torch.zeros(2))
    torch.manual_seed(0)
    nets = Nets(data, Args())
    assert sum(p.numel() for p in nets.actor.parameters()) == 137_734
    assert sum(p.numel() for p in nets.q.parameters()) == 2 * 139_521
    for net, last in ((nets.actor, 1e-3), (nets.q, 3e-3)):
        *hidden, end = net.weights
        for w, b in zip(hidden, net.biases):
            assert 0.95 < w.abs().max() * math.sqrt(w.shape[-2]) <= 1 and (b == 0.1).all()
        assert 0.95 * last < end.abs().max() <= last
        assert net.biases[-1].abs().max() <= last and net.biases[-1].all()
    assert all((x == 1).all() for x in nets.q.gains) and not any(x.any() for x in nets.q.shifts)
    assert not len(nets.actor.gains)


def test_depth_is_a_flag_of_each_network(data):
    nets, _, _ = make(data, actor_layers=2, critic_layers=4)
    assert len(nets.actor.weights) == 3
    assert len(nets.q.weights) == 5 and len(nets.q.gains) == 4


# ---- update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [2.5, 0.4])
def test_the_limit_of_td3_bc(data, alpha):
    """Two hidden layers, no normalization, no penalty in the target, a second critic that is never
    the lower one, and actor_bc = 1 / (alpha A): TD3+BC's losses and gradients, the actor's up to
    the factor alpha. With the penalty or the normalization the losses are others."""
    limit = dict(actor_layers=2, critic_layers=2, critic_ln=False, critic_bc=0.0)
    nets, _, args = make(data, actor_bc=1 / (alpha * 2), **limit)
    with torch.no_grad():
        for q in (nets.q, nets.q_target):
            q.biases[-1][1] += 100
    other, other_args = td3_bc.Nets(data, td3_bc.Args()), td3_bc.Args(alpha=alpha)
    other = other.double()
    other.load_state_dict(nets.state_dict())

    def losses(args):
        with Inject(randn_like=[noise()]):
            q_loss, _ = critic_loss(nets, *rows(data), data.next_action, args)
        pi_loss, *_ = actor_loss(nets, data.obs, data.action, args)
        return q_loss, pi_loss

    with Inject(randn_like=[noise()]):
        q_loss, _ = td3_bc.critic_loss(other, *rows(data), other_args)
    pi_loss, *_ = td3_bc.actor_loss(other, data.obs, data.action, other_args)
    found = losses(args)
    assert_close(found[0], q_loss)
    assert_close(alpha * found[1], pi_loss)
    for ours, theirs, name, factor in zip(found, (q_loss, pi_loss), ("q", "actor"), (1, alpha)):
        grads = torch.autograd.grad(ours, list(getattr(nets, name).parameters()))
        expected = torch.autograd.grad(theirs, list(getattr(other, name).parameters()))
        for g, e in zip(grads, expected, strict=True):
            assert_close(factor * g, e)
    args.critic_bc = 0.1
    assert abs(losses(args)[0] - q_loss) > 0.01


# ---- train -----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_training_sees_scaled_rewards_and_observations_of_the_kept_rows(tiny_data, normalize):
    data, run = tiny_data(n=12), PlainRun(limit=1)
    raw, reward = data.obs.clone()[:11], data.reward.clone()
    args = Args(batch_size=8, normalize_obs=normalize, reward_scale=100.0, critic_bc=0.5)
    train(run, data, args)
    mean, std = raw.mean(0), raw.std(0, correction=0) + 1e-3
    assert_close(run.nets.scaling.obs(raw), (raw - mean) / std if normalize else raw)
    assert torch.equal(data.reward, reward), "the data that was handed in stays as it is"
    largest = (100 * reward[:11].abs().max() + 0.5 * 4 * 2) / 0.01
    assert_close(run.largest["q_mean"], largest.item())


def test_rates_are_those_of_the_flags(tiny_data):
    run = PlainRun(limit=1)
    train(run, tiny_data(), Args(actor_lr=0.25, critic_lr=0.5))
    assert (run.opt.actor.lr, run.opt.q.lr) == (0.25, 0.5)
