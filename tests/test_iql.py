"""iql.py: expectiles, both extractions, the fixed point on a table."""

import copy
import math
from types import SimpleNamespace

import bc
import iql
import numpy as np
import pytest
import td3_bc
import torch
from golden.tools import Inject
from iql import Args, Nets, awr_loss, ddpg_bc_loss, scale_rewards, update, value_loss
from oracles import SGD, in_double, stack
from stand_in import PlainRun
from torch import nn
from torch.testing import assert_close

from common import Adam, Data, InputError
from run import parse

EXTRACTIONS = pytest.mark.parametrize("extraction", ["awr", "ddpg_bc"])


def optimizers(nets, args, optimizer=Adam, lr=3e-4):
    free_std = [nets.log_std] if args.extraction == "awr" else []
    return SimpleNamespace(
        v=optimizer(nets.v.parameters(), lr),
        actor=optimizer([*nets.actor.parameters(), *free_std], lr),
        q=optimizer(nets.q.parameters(), lr),
    )


def make(data, optimizer=Adam, lr=3e-4, **values):
    """Networks in float64, whose target differs from the critics and whose advantages have both
    signs, with their optimizers."""
    args = Args(**{"batch_size": 16, **values})
    torch.manual_seed(0)
    nets = Nets(data, args)
    nets.q_target.load_state_dict(Nets(data, args).q.state_dict())
    nets.v.biases[-1].data.sub_(0.35)
    nets = nets.double()
    return nets, optimizers(nets, args, optimizer, lr), args


@pytest.fixture
def data(tiny_data):
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def every_row(n=16, **noise):
    """Inside, a batch of n is rows 0 to n - 1 in their order, and no other noise is drawn."""
    return Inject(randint=[torch.arange(n)], **noise)


# ---- expectiles ------------------------------------------------------------------------------


def fit_value(q, tau, steps=400):
    """The scalar V that gradient descent on the file's loss finds for the values q (N,)."""
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)
    nets = SimpleNamespace(v=lambda s: v.expand(len(q)))
    for _ in range(steps):
        (grad,) = torch.autograd.grad(value_loss(nets, q, q, Args(tau=tau)), v)
        v.data -= 0.9 * grad
    return v.item()


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.7, 0.9, 0.99])
def test_expectiles_in_closed_form(tau):
    uniform = (torch.arange(2000).double() + 0.5) / 2000
    root = math.sqrt(tau) / (math.sqrt(tau) + math.sqrt(1 - tau))  # .6044 at 0.7, .75 at 0.9
    assert abs(fit_value(uniform, tau) - root) < 1e-3
    for p in (0.25, 0.8):
        coin = (torch.arange(20) < 20 * p).double()
        assert abs(fit_value(coin, tau) - tau * p / (tau * p + (1 - tau) * (1 - p))) < 1e-3


# ---- advantage-weighted regression -----------------------------------------------------------


def test_beta_zero_is_behavior_cloning(data):
    """The same start and batches as bc.py with a Gaussian: actors stay equal, step for step."""
    nets, opt, args = make(data, beta=0.0)
    clone_args = bc.Args(batch_size=16, gaussian=True)
    clone = bc.Nets(data, clone_args).double()
    clone.actor.load_state_dict(nets.actor.state_dict())
    params = [*clone.actor.parameters(), clone.log_std]
    clone_opt = SimpleNamespace(actor=Adam(params, 3e-4))
    loss, _ = awr_loss(nets, data.obs, data.action, torch.randn(16).double(), args)
    ours = torch.autograd.grad(loss, opt.actor.params)
    theirs = bc.actor_loss(clone, data.obs, data.action, clone_args)
    assert_close(ours, torch.autograd.grad(theirs, params))
    for seed in range(5):
        torch.manual_seed(seed)
        update(nets, opt, data, args)
        torch.manual_seed(seed)
        bc.update(clone, clone_opt, data, clone_args)
        for p, q in zip(opt.actor.params, params):
            assert_close(p, q, atol=1e-12, rtol=0)


# ---- DDPG+BC ---------------------------------------------------------------------------------


def test_ddpg_bc_is_td3_bc_with_equal_twins(data):
    """alpha_bc = 2 / (alpha A), one critic twice: the two files' actor gradients are parallel."""
    nets, opt, args = make(data, extraction="ddpg_bc", alpha_bc=2 / (2.5 * 2))
    for p in nets.q.parameters():
        p.data[1] = p.data[0]
    other = td3_bc.Nets(data, td3_bc.Args()).double()
    other.actor.load_state_dict(nets.actor.state_dict())
    other.q.load_state_dict(nets.q.state_dict())
    loss, _ = ddpg_bc_loss(nets, data.obs, data.action, args)
    ours = torch.autograd.grad(loss, opt.actor.params)
    loss, *_ = td3_bc.actor_loss(other, data.obs, data.action, td3_bc.Args(alpha=2.5))
    for x, y in zip(ours, torch.autograd.grad(loss, list(other.actor.parameters()))):
        assert_close(2.5 * x, y, rtol=1e-4, atol=1e-5)  # 1e-6 beside mean |Q|
    assert max(x.abs().max() for x in ours) > 0.1


# ---- networks --------------------------------------------------------------------------------


def test_initial_networks(data):
    """Orthogonal weights times the root of 2, in the last layers too, and biases of 0."""
    torch.manual_seed(0)
    nets = Nets(data, Args())
    shapes = {k: [w.shape for w in getattr(nets, k).weights] for k in ("actor", "v", "q")}
    assert shapes["actor"] == [(3, 256), (256, 256), (256, 2)]
    assert shapes["v"] == [(3, 256), (256, 256), (256, 1)]
    assert shapes["q"] == [(2, 5, 256), (2, 256, 256), (2, 256, 1)]
    for net in (nets.actor, nets.v, nets.q):
        for w in net.weights:
            for m in w.detach().view(-1, *w.shape[-2:]):
                m = m if m.shape[0] > m.shape[1] else m.T
                assert_close(m.T @ m, 2 * torch.eye(m.shape[1]), atol=1e-5, rtol=0)
        assert not any(b.any() for b in net.biases)
    assert not nets.log_std.any() and not torch.equal(*nets.q.weights[0])


def test_dropout_zeroes_hidden_units_and_keeps_their_mean(data):
    nets, *_ = make(data)
    u1, u2 = torch.rand(2, 16, 256, dtype=torch.float64)
    with Inject(rand_like=[u1, u2]):
        found = nets.pi(data.obs, 0.25)
    first, _, second, _, last = stack(nets.actor)
    x = first(data.obs).relu() * (u1 > 0.25) / 0.75
    x = second(x).relu() * (u2 > 0.25) / 0.75
    assert_close(found, last(x).tanh())


@EXTRACTIONS
def test_dropout_is_in_the_actors_loss_only(data, extraction):
    """One draw for each hidden layer; V, critics and targets move as they do without dropout."""
    nets, opt, args = make(data, extraction=extraction, dropout=0.1)
    other, other_opt, other_args = make(data, extraction=extraction)
    with every_row(rand_like=list(torch.rand(2, 16, 256))):
        update(nets, opt, data, args)
    with every_row():
        update(other, other_opt, data, other_args)
    for name in ("v", "q", "q_target"):
        pairs = zip(getattr(nets, name).parameters(), getattr(other, name).parameters())
        assert all(torch.equal(p, q) for p, q in pairs), name
    pairs = zip(nets.actor.parameters(), other.actor.parameters())
    assert not all(torch.equal(p, q) for p, q in pairs)


# ---- update ----------------------------------------------------------------------------------


def test_weights_that_underflow_leave_finite_metrics(data):
    nets, opt, args = make(data, beta=1e6)
    nets.v.biases[-1].data.fill_(1e3)
    metrics = update(nets, opt, data, args)
    assert all(x.isfinite() for x in metrics.values())
    assert metrics["effective_share"] == metrics["pi_loss"] == 0


# ---- the fixed point on a table --------------------------------------------------------------

STATES, ACTIONS, GAMMA = 4, 3, 0.8


class Table(nn.Module):
    """One parameter for each entry; a state is one-hot, an action its number."""

    def __init__(self, *shape):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, s, a=None):
        if a is None:
            return s @ self.values
        return self.values[:, s.argmax(1), a[:, 0].long()]  # (2, B)


def tabular_data(seed=1):
    """Eight rows for each state, stochastic; action 2 of the last two states is never taken."""
    rng = np.random.default_rng(seed)
    state = np.repeat(np.arange(STATES), 8)
    action = np.concatenate([rng.permutation([0, 0, 0, 1, 1, 2, 2, 2]) for _ in range(2)]
                            + [rng.permutation([0] * 5 + [1] * 3) for _ in range(2)])  # fmt: skip
    reward = np.round(rng.normal(0, 2, (STATES, ACTIONS)), 1)[state, action]
    following = rng.integers(0, STATES, len(state))
    terminal = (rng.random(len(state)) < 0.1).astype(float)
    return state, action, reward, following, terminal


def expectile(x, tau):
    """Root of tau E(x - m)+ = (1 - tau) E(m - x)+, by bisection."""
    low, high = x.min(), x.max()
    for _ in range(60):
        m = (low + high) / 2
        above = tau * np.maximum(x - m, 0).sum() > (1 - tau) * np.maximum(m - x, 0).sum()
        low, high = (m, high) if above else (low, m)
    return (low + high) / 2


def value_iteration(table, backup):
    """Q (NaN where unseen) and V of Q(s,a) = mean of r + gamma V(s'), V(s) = backup of its rows."""
    state, action, reward, following, terminal = table
    v, q = np.zeros(STATES), np.full((STATES, ACTIONS), np.nan)
    for _ in range(150):
        y = reward + GAMMA * (1 - terminal) * v[following]
        for s, a in set(zip(state, action)):
            q[s, a] = y[(state == s) & (action == a)].mean()
        v = np.array([backup(q[s, action[state == s]]) for s in range(STATES)])
    return q, v


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_fixed_point_is_that_of_expectile_value_iteration(tau):
    """Whole updates on tables. Unseen actions start at one million, and nobody ever asks."""
    table = tabular_data()
    q_exact, v_exact = value_iteration(table, lambda x: expectile(x, tau))
    state, action, reward, following, terminal = (torch.as_tensor(x) for x in table)
    one_hot = torch.eye(STATES).double()
    data = Data(one_hot[state], action[:, None].double(), reward, one_hot[following], terminal)

    nets = SimpleNamespace(v=Table(STATES), q=Table(2, STATES, ACTIONS), actor=Table(STATES, 1))
    nets.log_std = torch.zeros(1).double().requires_grad_()
    nets.pi = lambda s, dropout: nets.actor(s).tanh()
    unseen = torch.as_tensor(np.isnan(q_exact))
    assert unseen.sum() == 2
    nets.q.values.data[:, unseen] = 1e6
    nets.q_target = copy.deepcopy(nets.q)
    args = Args(tau=tau, gamma=GAMMA, polyak=0.5, beta=0.1, batch_size=32)
    opt = optimizers(nets, args, SGD, 4.0)  # a state has an eighth of the loss's mean, or less
    opt.actor.lr = 0.05
    with Inject(randint=[torch.arange(32)] * 1200):
        for _ in range(1200):
            update(nets, opt, data, args)
    assert_close(nets.v.values.data, torch.as_tensor(v_exact), atol=1e-3, rtol=0)
    for q in (*nets.q.values.data, *nets.q_target.values.data):
        assert_close(q[~unseen], torch.as_tensor(q_exact)[~unseen], atol=1e-3, rtol=0)
        assert (q[unseen] == 1e6).all()
    if tau == 0.5:  # V of the policy that made the data: one linear system
        p, r = np.zeros((STATES, STATES)), np.zeros(STATES)
        for s, _, x, s2, end in zip(*table):
            p[s, s2] += (1 - end) / 8
            r[s] += x / 8
        assert np.allclose(np.linalg.solve(np.eye(STATES) - GAMMA * p, r), v_exact, atol=1e-6)


# ---- training --------------------------------------------------------------------------------


# ---- rewards, observations, flags ------------------------------------------------------------


@pytest.mark.parametrize("unit", [1.0, 37.0])
def test_normalized_returns_span_a_thousand(tiny_data, unit):
    data = tiny_data(n=12)
    data.reward, data.episode_return = data.reward * unit, data.episode_return * unit
    reward, before = data.reward.clone(), data.episode_return.clone()
    scale_rewards(data, Args(normalize_reward=True, reward_shift=-1.0))
    returns = torch.zeros(2).index_add(0, data.episode, data.reward + 1)
    assert_close(returns.max() - returns.min(), torch.tensor(1000.0))
    factor = 1000 / (before[0] - before[1]).abs()
    assert_close(data.reward, reward * factor - 1)
    assert torch.equal(data.episode_return, before)


def test_rewards_are_raw_unless_asked(tiny_data):
    data = tiny_data()
    reward = data.reward.clone()
    scale_rewards(data, Args())
    assert torch.equal(data.reward, reward)


def test_equal_returns_cannot_be_normalized(tiny_data):
    data = tiny_data()
    data.episode_return[:] = 5
    with pytest.raises(InputError, match="use --no-normalize-reward") as caught:
        scale_rewards(data, Args(normalize_reward=True))
    assert "\n" not in str(caught.value)


def test_training_scales_the_rewards_and_says_the_largest_q(tiny_data):
    data, run = tiny_data(), PlainRun()
    scaled = data.reward * 1000 / (data.episode_return.max() - data.episode_return.min()) - 1
    iql.train(run, data, Args(steps=3, batch_size=4, normalize_reward=True, reward_shift=-1.0))
    assert_close(data.reward, scaled)
    assert_close(run.largest, {"q_mean": scaled.abs().max().item() * 100})


@pytest.mark.parametrize(
    "flag", ["--tau 1", "--tau 0", "--dropout 1", "--dropout -0.1", "--extraction td3"]
)
def test_values_that_mean_nothing_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        parse(Args, iql.PRESETS, flag.split())
