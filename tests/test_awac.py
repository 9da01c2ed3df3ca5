"""awac.py: target, advantage, weights, a bandit."""

from types import SimpleNamespace

import awac
import awr
import bc
import pytest
import torch
from awac import Args, Nets, awr_loss, critic_loss, q_advantage, update
from golden.tools import Inject
from oracles import in_double
from stand_in import PlainRun
from torch.testing import assert_close

from common import Adam, orthogonal_
from run import parse


def optimizers(nets, optimizer=Adam, lr=3e-4):
    return SimpleNamespace(
        q=optimizer(nets.q.parameters(), lr),
        actor=optimizer([*nets.actor.parameters(), nets.log_std], lr),
    )


def make(data, optimizer=Adam, lr=3e-4, **values):
    """Networks in float64 with outputs of size one, whose targets differ from the critics."""
    args = Args(batch_size=16, **values)
    torch.manual_seed(0)
    nets = Nets(data, args)
    nets.log_std.data.copy_(torch.linspace(-0.5, 0.2, len(nets.log_std)))
    for net in (nets.actor, nets.q, nets.q_target):
        orthogonal_(net, 1.0, 0.7)
    nets = nets.double()
    return nets, optimizers(nets, optimizer, lr), args


@pytest.fixture
def data(tiny_data):
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


# ---- critics ---------------------------------------------------------------------------------


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
    assert_close(loss, torch.tensor((1.8**2 + 4**2) / 2 + (0.8**2 + 0**2) / 2))
    assert_close(q_mean, torch.tensor(9 / 4))


# ---- actor -----------------------------------------------------------------------------------


def actor_gradient(nets, loss):
    grads = torch.autograd.grad(loss, [*nets.actor.parameters(), nets.log_std])
    return torch.cat([g.flatten() for g in grads])


def test_loss_is_that_of_awr(data):
    """For the same advantages; some weights are capped, some are not."""
    nets, *_ = make(data)
    s, a, advantage = data.obs, data.action, torch.randn(16).double()
    values = dict(temperature=0.7, max_weight=3.0)
    loss, weight = awr_loss(nets.pi(s), a, advantage, Args(**values))
    other, other_weight = awr.awr_loss(nets, s, a, advantage, awr.Args(**values))
    assert (weight == 3).any() and (weight < 3).any()
    assert torch.equal(weight, other_weight)
    assert torch.equal(actor_gradient(nets, loss), actor_gradient(nets, other))


def test_a_very_large_temperature_is_behavior_cloning(data):
    nets, *_ = make(data)
    s, a, advantage = data.obs, data.action, torch.linspace(-50, 50, 16).double()
    loss, weight = awr_loss(nets.pi(s), a, advantage, Args(temperature=1e30))
    assert torch.equal(weight, torch.ones(16).double())
    clone = bc.actor_loss(nets, s, a, bc.Args(gaussian=True))
    assert torch.equal(actor_gradient(nets, loss), actor_gradient(nets, clone))


# ---- update ----------------------------------------------------------------------------------


def test_weights_that_all_underflow_leave_finite_metrics(data):
    """A batch that is the worst row 16 times."""
    nets, opt, args = make(data, temperature=1e-30)
    opt.q.lr.zero_()
    zeros = torch.zeros(16, 2).double()
    with Inject(randn_like=[zeros]):
        advantage = q_advantage(nets, data.obs, data.action, nets.pi(data.obs))
    worst = advantage.argmin()
    assert advantage[worst] < 0
    with Inject(randint=[worst.expand(16)], randn_like=[zeros, zeros]):
        metrics = update(nets, opt, data, args)
    assert all(x.isfinite() for x in metrics.values())
    assert metrics["effective_share"] == metrics["pi_loss"] == 0


# ---- training --------------------------------------------------------------------------------


def test_the_run_hears_the_largest_q_of_the_shifted_rewards(tiny_data):
    data, run = tiny_data(), PlainRun()
    largest = (data.reward - 1).abs().max().item() * 100
    awac.train(run, data, Args(steps=2, batch_size=8, reward_shift=-1.0))
    assert_close(run.largest, {"q_mean": largest})


@pytest.mark.parametrize("flag", ["--temperature 0", "--temperature nan", "--max-weight -1"])
def test_values_that_mean_nothing_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        parse(Args, awac.PRESETS, flag.split())
    assert flag.split()[0] in capsys.readouterr().err
