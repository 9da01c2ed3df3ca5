"""td3_bc.py: target, losses, the delayed step, and the limits where it must be something known."""

from types import SimpleNamespace

import bc
import pytest
import torch
from golden.tools import Inject
from oracles import in_double
from stand_in import PlainRun
from td3_bc import Args, Nets, actor_loss, critic_loss, train, update
from torch.testing import assert_close

from common import Adam


def make(data, seed=0, lr=3e-4, **values):
    """Networks in float64, whose targets differ from them, with their optimizers."""
    args = Args(batch_size=16, **values)
    torch.manual_seed(seed)
    nets, other = Nets(data, args), Nets(data, args)
    nets.q_target.load_state_dict(other.q.state_dict())
    nets.actor_target.load_state_dict(other.actor.state_dict())
    nets = nets.double()
    opt = SimpleNamespace(
        q=Adam(nets.q.parameters(), lr),
        actor=Adam(nets.actor.parameters(), lr),
    )
    return nets, opt, args


@pytest.fixture
def data(tiny_data):
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def with_q(f, **more):
    """Networks whose critics are the function f(s, a) -> (B,) and whose policy is `pi` (B, A)."""
    return SimpleNamespace(q=lambda s, a, member: f(s, a), **more)


# ---- critics ---------------------------------------------------------------------------------


def test_target_by_hand():
    """y = r + 0.9 min(Q'_1, Q'_2) where the episode goes on, r where it ended; loss summed over
    critics: rows y = (1 + 0.9 * 2, 5) against Q = (1, 1) and (2, 5)."""
    s = torch.zeros(2, 1)
    nets = SimpleNamespace(
        actor_target=lambda s2: torch.zeros(2, 1),
        q_target=lambda s2, a2: torch.tensor([[2.0, 7.0], [3.0, 6.0]]),
        q=lambda s, a: torch.tensor([[1.0, 1.0], [2.0, 5.0]]),
    )
    r, terminal = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 1.0])
    loss, q_mean = critic_loss(nets, s, s, r, s, terminal, Args(gamma=0.9))
    assert_close(loss, torch.tensor((1.8**2 + 4**2) / 2 + (0.8**2 + 0**2) / 2))
    assert_close(q_mean, torch.tensor(9 / 4))


# ---- actor -----------------------------------------------------------------------------------


def stationary(f, target, alpha, dims=1, start=0.3):
    """The policy pi = tanh(x), the same in every dimension, where the actor's loss is least."""
    x = torch.full((1, 1), start).double().atanh().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.02)
    nets = with_q(f, actor=lambda s: x.expand(4, dims))
    a = torch.full((4, dims), target).double()
    for t in range(700):
        adam.param_groups[0]["lr"] = 0.02 if t < 400 else 0.002
        loss, *_ = actor_loss(nets, a, a, Args(alpha=alpha))
        (x.grad,) = torch.autograd.grad(loss, [x])
        adam.step()
    return x.tanh().item()


def test_linear_q_has_a_known_optimum():
    """2 p^2 - 2 target p - alpha = 0; the sign of the slope is that of p."""
    for g, target, alpha, p in ((3, 0.0, 0.5, 0.5), (-3, 0.0, 0.5, -0.5), (3, 0.2, 0.4, 0.5583)):
        found = stationary(lambda s, a: g * a[:, 0], target, alpha, start=0.1 * g)
        assert abs(found - p) < 1e-3


def test_steep_offset_leaves_little_of_q():
    """Q = c + g a with c >> g: p -> target + alpha g / (2 c)."""
    p = stationary(lambda s, a: 100 + 4 * a[:, 0], 0.1, 2.0)
    assert abs(p - (0.1 + 2.0 * 4 / 200)) < 1e-3


def test_cloning_is_a_mean_over_dimensions():
    p = stationary(lambda s, a: 3 * a.mean(-1), 0.2, 0.4, dims=5)
    assert abs(p - 0.5583) < 1e-3


# ---- update ----------------------------------------------------------------------------------


def batches(count):
    """The rows of `count` batches of 16, drawn once."""
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(16, (16,), generator=draw) for _ in range(count)]


def test_alpha_zero_is_behavior_cloning(data):
    """The same start and batches as bc.py: the actors stay equal, step for step."""
    nets, opt, args = make(data, alpha=0.0)
    clone_args = bc.Args(batch_size=16)
    clone = bc.Nets(data, clone_args).double()
    clone.actor.load_state_dict(nets.actor.state_dict())
    clone_opt = SimpleNamespace(actor=Adam(clone.actor.parameters(), 3e-4))
    for i in batches(5):
        with Inject(randint=[i], randn_like=[torch.zeros(16, 2)]):
            update(nets, opt, data, args, True)
        with Inject(randint=[i]):
            bc.update(clone, clone_opt, data, clone_args)
        for p, q in zip(nets.actor.parameters(), clone.actor.parameters()):
            assert_close(p, q, atol=1e-12, rtol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_training_sees_shifted_rewards_and_scaled_observations(tiny_data, normalize):
    data, run = tiny_data(n=50), PlainRun(limit=1)
    obs, next_obs, reward = data.obs.clone(), data.next_obs.clone(), data.reward.clone()
    train(run, data, Args(normalize_obs=normalize, reward_shift=-1.0))
    mean, std = obs.mean(0), obs.std(0, correction=0) + 1e-3
    for now, raw in ((data.obs, obs), (data.next_obs, next_obs)):
        assert_close(now, (raw - mean) / std if normalize else raw)
        assert_close(run.nets.scaling.obs(raw), now)
    assert_close(data.reward, reward - 1)
    assert abs(run.largest["q_mean"] - 100 * (reward - 1).abs().max()) < 1e-3


# ---- behavior --------------------------------------------------------------------------------
