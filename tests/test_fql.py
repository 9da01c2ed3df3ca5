"""fql.py: the flow against fields that are known in closed form, targets and the policy's loss on
rows worked by hand, published settings."""

import math
from types import SimpleNamespace

import fql
import pytest
import torch
from fql import Args, Nets, critic_loss, distill_loss, flow, improvement_loss
from stand_in import PlainRun
from torch.testing import assert_close

from common import Data
from run import parse


def by_field(field, **more):
    """Networks whose velocity is the function field(x, t)."""
    return SimpleNamespace(velocity=lambda s, x, t: field(x, t), **more)


def run_flow(field, z, steps):
    return flow(by_field(field), z, z, Args(flow_steps=steps))


def gaussian(m, c):
    """The velocity of flow matching where the data are N(m, c^2)."""

    def field(x, t):
        slope = (t * c**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * c**2)
        return m + slope * (x - t * m)

    return field


# ---- the flow --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "c", "multiplier"),
    [
        (1, 0.5, 0.0),
        (2, 0.5, 0.25 / 1.25),
        (2, 1.0, 0.5),
        (10, 1.0, 0.878984),
        (10, 0.5, 0.430783),
        (100, 1.0, 0.987228),
        (100, 0.5, 0.492645),
    ],
)
def test_flow_to_a_gaussian_has_a_known_spread(steps, c, multiplier):
    """The exact map is m + c z; Euler's steps keep m and shrink c."""
    z = torch.randn(50, 1).double()
    x = run_flow(gaussian(0.4, c), z, steps)
    assert_close(x, 0.4 + multiplier * z, atol=2e-6, rtol=0)


# ---- critics ---------------------------------------------------------------------------------


def critic_row(q_target, q, r, terminal, s2=0.0, w=0.0, **values):
    """critic_loss of one row, and the action that the target was asked for."""
    seen = []
    nets = SimpleNamespace(
        actor=lambda s, z: torch.full((1, 1), w),
        q_target=lambda s, a: seen.append(a) or torch.tensor(q_target)[:, None],
        q=lambda s, a: torch.tensor(q)[:, None],
    )
    row = [torch.zeros(1, 1)] * 2 + [torch.tensor([r]), torch.full((1, 1), s2)]
    loss, _ = critic_loss(nets, *row, torch.tensor([terminal]), Args(**values))
    return loss.item(), seen[0].item()


@pytest.mark.parametrize(("agg", "y"), [("mean", -1 + 0.99 * 2), ("min", -1 + 0.99 * 1)])
def test_target_by_hand(agg, y):
    loss, _ = critic_row([1.0, 3.0], [0.0, 0.0], -1.0, 0.0, q_agg=agg)
    assert_close(loss, y**2)


def test_a_terminal_row_has_no_next_value():
    for q_target in ([1.0, 3.0], [1e30, 1e30]):
        loss, _ = critic_row(q_target, [0.0, 0.0], -1.0, 1.0)
        assert_close(loss, 1.0)


# ---- the one-step policy ---------------------------------------------------------------------


def optimum(mu, g, alpha, normalize=False, scale=1.0):
    """The action of a free one-step policy that minimizes its loss where Q = scale (g a + 3)."""
    mu, g = torch.tensor(mu).double(), torch.tensor(g).double()
    pi = torch.zeros_like(mu).expand(4, -1).clone().requires_grad_()
    nets = by_field(lambda x, t: mu - z, q=lambda s, a: scale * (torch.stack([a @ g, a @ g]) + 3.0))
    args, z = Args(alpha=alpha, normalize_q_loss=normalize), torch.randn(4, len(mu)).double()
    adam = torch.optim.Adam([pi], lr=0.02)
    for t in range(600):
        adam.param_groups[0]["lr"] = 0.02 if t < 400 else 0.001
        loss = alpha * distill_loss(nets, z, z, pi, args) + improvement_loss(nets, z, pi, args)[0]
        (pi.grad,) = torch.autograd.grad(loss, [pi])
        adam.step()
    return pi.detach().mean(0).tolist()


def test_linear_q_moves_the_policy_by_a_known_shift():
    """w = mu + A g / (2 alpha)."""
    found = optimum([0.2, -0.3], [1.0, 0.0], 10.0)
    assert_close(found, [0.3, -0.3], atol=2e-3, rtol=0)


def test_at_large_alpha_the_one_step_policy_is_the_flow():
    found = optimum([0.2, -0.3], [1.0, -1.0], 1e5)
    assert_close(found, [0.2, -0.3], atol=2e-3, rtol=0)


# ---- networks --------------------------------------------------------------------------------


@pytest.fixture
def data():
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(16, width, generator=draw).double() for width in (3, 2, 3)]
    reward = torch.randn(16, generator=draw).double()
    terminal = (torch.arange(16) % 5 == 0).double()
    return Data(rows[0], rows[1].tanh(), reward, rows[2], terminal)


def test_sizes_and_initial_weights():
    """The authors' networks on cube-single: 28 observation and 5 action numbers."""
    obs, nothing = torch.zeros(2, 28), torch.zeros(2)
    data = Data(obs, torch.zeros(2, 5), nothing, obs, nothing)
    nets = Nets(data, Args())
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.named_children()}
    assert count["velocity"] == 808_453 and count["actor"] == 807_941
    assert count["q"] == count["q_target"] == 2 * 809_985
    for net, n_in in ((nets.velocity, 34), (nets.actor, 33), (nets.q, 33)):
        bound = math.sqrt(6 / (n_in + 512))
        assert 0.98 * bound < net.weights[0].abs().max() <= bound
        assert not any(b.any() for b in net.biases)
    assert nets.q.weights[0].shape == (2, 33, 512)
    assert not torch.equal(nets.q.weights[0][0], nets.q.weights[0][1])


# ---- policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("distill", [True, False])
def test_policy_is_reproducible_and_takes_its_noise_from_outside(data, distill):
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.5, 4.0, 1.0])
    data.action_low, data.action_high = torch.tensor([-2.0, 0.0]), torch.tensor([6.0, 1.0])
    args = Args(hidden=8, distill=distill)
    nets, obs = Nets(data, args), torch.randn(500, 3)
    (nets.actor if distill else nets.velocity).weights[-1].data.mul_(5.0)
    actions = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        actions.append(fql.policy(nets, obs, args))
    assert torch.equal(actions[0], actions[1]) and not torch.equal(actions[0], actions[2])
    torch.manual_seed(0)
    noise = torch.randn(500, 2)
    assert torch.equal(fql.policy_with_noise(nets, obs, noise, args), actions[0])
    s = (obs - data.obs_mean) / data.obs_std
    a = fql.act(nets, s, noise, args)
    assert (a.abs() > 1).any()
    expected = torch.tensor([2.0, 0.5]) + torch.tensor([4.0, 0.5]) * a.clamp(-1, 1)
    assert_close(actions[0], expected)


def test_best_of_is_a_choice_among_the_flows_own_actions(data):
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0, 0.0]), torch.ones(3)
    data.action_low, data.action_high = torch.tensor([-2.0, 0.0]), torch.tensor([6.0, 1.0])
    args = Args(hidden=8, best_of=3)
    torch.manual_seed(0)
    nets, obs, noise = Nets(data, args), torch.randn(500, 3), torch.randn(500, 6)
    s = obs - data.obs_mean
    each = torch.stack([fql.flow(nets, s, z, args).clamp(-1, 1) for z in noise.split(2, 1)])
    q = torch.stack([nets.q(s, a).mean(0) for a in each])  # (3, 500)
    expected = nets.scaling.action(each[q.argmax(0), torch.arange(500)])
    assert_close(fql.policy_with_noise(nets, obs, noise, args), expected)
    torch.manual_seed(1)
    drawn = fql.policy(nets, obs, args)
    torch.manual_seed(1)
    noise = torch.randn(500, 6)
    assert_close(drawn, fql.policy_with_noise(nets, obs, noise, args))


# ---- behavior --------------------------------------------------------------------------------


@pytest.mark.parametrize("distill", [True, False])
def test_bandit_with_two_modes(distill):
    """Most actions are -0.7 or 0.7, equally often, reward a: the clone keeps both modes, and Q
    prefers the upper."""
    a = torch.cat([torch.tensor([-0.7, 0.7]).repeat(40), torch.linspace(-1, 1, 9)])[:, None]
    results = {}
    for alpha in (100.0, 0.1):
        zeros = torch.zeros(len(a), 1)
        bandit = Data(zeros, a.clone(), a[:, 0].clone(), zeros.clone(), torch.ones(len(a)))
        args = Args(steps=250, hidden=32, lr=4e-3, alpha=alpha, distill=distill, flow_steps=5)
        run = PlainRun()
        torch.manual_seed(0)
        fql.train(run, bandit, args)
        torch.manual_seed(1)
        results[alpha] = run.act(torch.zeros(2000, 1))[:, 0]
    clone, greedy = results[100.0], results[0.1]
    assert abs(clone.mean()) < 0.2 and (clone.abs() > 0.45).float().mean() > 0.75
    assert greedy.mean() > 0.6 and (greedy > 0.3).float().mean() > 0.95
    assert run.largest["q_mean"] == pytest.approx(1 / (1 - 0.99), rel=1e-5)


def test_reward_shift_and_normalization_reach_the_data(data):
    reward, obs = data.reward.float().clone(), data.obs.float().clone()
    data = Data(obs.clone(), data.action.float(), reward.clone(), obs.clone(), torch.zeros(16))
    args = Args(steps=1, hidden=4, reward_shift=-1.0, normalize_obs=True)
    run = PlainRun()
    fql.train(run, data, args)
    assert_close(data.reward, reward - 1)
    assert_close(data.obs.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(run.nets.scaling.obs(obs), data.obs)


# ---- published settings ----------------------------------------------------------------------

PUBLISHED = {  # alpha, aggregation, gamma, steps, reward shift
    "antmaze-umaze-v2": (10, "mean", 0.99, 500_000, -1),
    "antmaze-umaze-diverse-v2": (10, "mean", 0.99, 500_000, -1),
    "antmaze-medium-play-v2": (10, "mean", 0.99, 500_000, -1),
    "antmaze-medium-diverse-v2": (10, "mean", 0.99, 500_000, -1),
    "antmaze-large-play-v2": (3, "mean", 0.99, 500_000, -1),
    "D4RL/antmaze/large-diverse-v1": (3, "mean", 0.99, 500_000, -1),
    "pen-human-v1": (10_000, "min", 0.99, 500_000, 0),
    "D4RL/pen/cloned-v2": (10_000, "min", 0.99, 500_000, 0),
    "pen-expert-v1": (3_000, "min", 0.99, 500_000, 0),
    "door-human-v1": (30_000, "min", 0.99, 500_000, 0),
    "door-cloned-v1": (30_000, "min", 0.99, 500_000, 0),
    "door-expert-v1": (30_000, "min", 0.99, 500_000, 0),
    "hammer-human-v1": (30_000, "min", 0.99, 500_000, 0),
    "hammer-cloned-v1": (10_000, "min", 0.99, 500_000, 0),
    "hammer-expert-v1": (30_000, "min", 0.99, 500_000, 0),
    "relocate-human-v1": (10_000, "min", 0.99, 500_000, 0),
    "relocate-cloned-v1": (30_000, "min", 0.99, 500_000, 0),
    "D4RL/relocate/expert-v2": (30_000, "min", 0.99, 500_000, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    args, _ = parse(Args, fql.PRESETS, ["--env", name])
    found = args.alpha, args.q_agg, args.gamma, args.steps, args.reward_shift
    assert found == PUBLISHED[name]
    assert not args.normalize_q_loss and args.flow_steps == 10 and args.hidden == 512
    assert (args.eval_every, args.eval_episodes, args.batch_size) == (100_000, 50, 256)
