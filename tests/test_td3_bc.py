"""td3_bc.py: target, losses, the delayed step, and the limits where it must be something known."""

import copy
from types import SimpleNamespace

import bc
import pytest
import td3_bc
import torch
from golden.tools import Inject
from oracles import assert_same, in_double, rows, stack
from stand_in import PlainRun
from td3_bc import Args, Nets, actor_loss, critic_loss, train, update
from torch import nn
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


def test_target_without_noise_is_the_target_policys(data):
    nets, _, args = make(data, policy_noise=0.0)
    s, a, r, s2, terminal = rows(data)
    a2 = stack(nets.actor_target)(s2).tanh()
    q2 = [stack(nets.q_target, e)(torch.cat([s2, a2], -1))[:, 0] for e in range(2)]
    y = r + 0.99 * (1 - terminal) * torch.minimum(*q2)
    q = [stack(nets.q, e)(torch.cat([s, a], -1))[:, 0] for e in range(2)]
    expected = sum(nn.functional.mse_loss(x, y) for x in q)
    assert_close(critic_loss(nets, *rows(data), args)[0], expected)


def test_target_is_the_reward_alone_at_a_terminal(data):
    nets, _, args = make(data)
    s, a, r, s2, _ = rows(data)
    q = [stack(nets.q, e)(torch.cat([s, a], -1))[:, 0] for e in range(2)]
    expected = sum(nn.functional.mse_loss(x, r) for x in q)
    huge = torch.full_like(s2, 1e30)
    loss, _ = critic_loss(nets, s, a, r, huge, torch.ones_like(r), args)
    assert_close(loss, expected)


@pytest.mark.parametrize(
    ("pre_tanh", "noise", "clip", "low", "high"),
    [(0.0, 10.0, 0.5, -0.5, 0.5), (9.0, 10.0, 0.5, 0.5, 1.0), (0.0, 10.0, 3.0, -1.0, 1.0)],
)
def test_noise_is_clipped_and_then_the_action(pre_tanh, noise, clip, low, high):
    seen = []
    nets = SimpleNamespace(
        actor_target=lambda s2: torch.full((4000, 1), pre_tanh).double(),
        q_target=lambda s2, a2: seen.append(a2) or torch.zeros(2, 4000),
        q=lambda s, a: torch.zeros(2, 4000),
    )
    s, r = torch.zeros(4000, 1).double(), torch.zeros(4000)
    torch.manual_seed(0)
    critic_loss(nets, s, s, r, s, r, Args(policy_noise=noise, noise_clip=clip))
    assert_close(seen[0].min().item(), low, atol=1e-6, rtol=0)
    assert_close(seen[0].max().item(), high, atol=1e-6, rtol=0)
    critic_loss(nets, s, s, r, s, r, Args(policy_noise=0.05, noise_clip=0.5))
    assert pre_tanh or abs(seen[1].std() - 0.05) < 0.005


# ---- actor -----------------------------------------------------------------------------------


def actor_gradient(nets, data, args):
    loss, *_ = actor_loss(nets, data.obs, data.action, args)
    grads = torch.autograd.grad(loss, list(nets.actor.parameters()))
    return torch.cat([g.flatten() for g in grads])


def scale_q(nets, factor=1.0, shift=0.0):
    nets = copy.deepcopy(nets)
    with torch.no_grad():
        nets.q.weights[-1].mul_(factor)
        nets.q.biases[-1].mul_(factor).add_(shift)
    return nets


def test_actor_loss_is_that_of_a_stack(data):
    nets, _, args = make(data)
    actor, q1 = stack(nets.actor), stack(nets.q, 0)
    pi = actor(data.obs).tanh()
    q = q1(torch.cat([data.obs, pi], -1))[:, 0]
    lam = 2.5 / q.abs().mean().item()
    expected = -lam * q.mean() + nn.functional.mse_loss(pi, data.action)
    loss, bc_loss, weight, _ = actor_loss(nets, data.obs, data.action, args)
    assert_close(loss, expected)
    assert_close(bc_loss, nn.functional.mse_loss(pi, data.action).detach())
    assert abs(weight.item() - lam) < 1e-9
    expected.backward()
    by_layer = [m for m in actor if isinstance(m, nn.Linear)]
    grads = [m.weight.grad.T.flatten() for m in by_layer] + [m.bias.grad for m in by_layer]
    assert_close(actor_gradient(nets, data, args), torch.cat(grads))


def test_scale_of_q_does_not_matter_but_its_shift_does(data):
    nets, _, args = make(data)
    grad = actor_gradient(nets, data, args)
    assert_close(actor_gradient(scale_q(nets, factor=50.0), data, args), grad)
    shifted = actor_gradient(scale_q(nets, shift=50.0), data, args)
    assert (shifted - grad).norm() > 0.01 * grad.norm()


def test_second_critic_does_not_reach_the_actor(data):
    nets, _, args = make(data)
    grad = actor_gradient(nets, data, args)
    with torch.no_grad():
        for w in nets.q.weights:
            w[1] = -7 * w[1] + 1
    assert torch.equal(actor_gradient(nets, data, args), grad)


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


def test_which_parameters_each_loss_reaches(data):
    nets, _, args = make(data)
    critic, _ = critic_loss(nets, *rows(data), args)
    actor, *metrics = actor_loss(nets, data.obs, data.action, args)
    assert not any(x.requires_grad for x in metrics)
    online = [(k, p) for k, p in nets.named_parameters() if p.requires_grad]
    assert {k.split(".")[0] for k, _ in online} == {"actor", "q"}
    for loss, module in ((critic, "q."), (actor, "")):
        grads = torch.autograd.grad(loss, [p for _, p in online], allow_unused=True)
        for (name, _), g in zip(online, grads):
            assert (g is not None) == name.startswith(module)
            if module == "" and name.startswith("q."):
                assert not g[1].any()  # the actor's loss is of the first critic


def test_targets_and_actor_move_on_policy_steps_only(data):
    nets, opt, args = make(data)
    before = copy.deepcopy(nets)
    metrics = update(nets, opt, data, args, False)
    assert set(metrics) == {"q_loss", "q_mean"}
    for name in ("actor", "actor_target", "q_target"):
        old = getattr(before, name).parameters()
        assert all(torch.equal(p, q) for p, q in zip(getattr(nets, name).parameters(), old))
    for p, q in zip(nets.q.parameters(), before.q.parameters()):
        assert not torch.equal(p, q)
    before = copy.deepcopy(nets)
    update(nets, opt, data, args, True)
    for name in ("actor", "q"):
        target, old = (getattr(x, name + "_target").parameters() for x in (nets, before))
        now, then = (getattr(x, name).parameters() for x in (nets, before))
        for t, o, new, stale in zip(target, old, now, then):
            assert not torch.equal(new, stale)
            assert_close(t, 0.005 * new + 0.995 * o, atol=1e-12, rtol=1e-10)
    assert all(p.grad is None for p in nets.parameters())


def test_actor_loss_moves_no_critic(data):
    """With the critics' learning rate at 0, a policy step leaves them bit for bit."""
    nets, opt, args = make(data)
    opt.q.lr.zero_()
    before = copy.deepcopy(nets.q)
    update(nets, opt, data, args, True)
    assert all(torch.equal(p, q) for p, q in zip(nets.q.parameters(), before.parameters()))


def batches(count):
    """The rows of `count` batches of 16, drawn once."""
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(16, (16,), generator=draw) for _ in range(count)]


def test_two_critics_are_two_optimizations(data):
    """One Adam over both members is one Adam for each."""
    nets, opt, args = make(data, lr=1e-3, policy_noise=0.0)
    oracles = [stack(nets.q, e) for e in range(2)]
    adams = [torch.optim.Adam(q.parameters(), lr=1e-3) for q in oracles]
    for i in batches(3):
        with Inject(randint=[i], randn_like=[torch.zeros(16, 2)]):
            update(nets, opt, data, args, False)
        s, a, r, s2, terminal = (x[i] for x in rows(data))
        with torch.no_grad():
            a2 = nets.actor_target(s2).tanh()
            y = r + 0.99 * (1 - terminal) * nets.q_target(s2, a2).amin(0)
        for q, adam in zip(oracles, adams):
            adam.zero_grad()
            nn.functional.mse_loss(q(torch.cat([s, a], 1)).squeeze(1), y).backward()
            adam.step()
    assert_same(nets.q, *oracles)


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


@pytest.mark.parametrize(("policy_freq", "moved"), [(1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_train_moves_the_actor_on_every_policy_freq_th_step(tiny_data, policy_freq, moved):
    run = PlainRun()
    train(run, tiny_data(), Args(steps=6, policy_freq=policy_freq))
    assert [t for t, row in enumerate(run.phases["train"], 1) if "pi_loss" in row] == moved


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


@pytest.mark.parametrize(("alpha", "best"), [(1000.0, 0.5), (0.0, 0.0)])
def test_bandit(tiny_data, alpha, best):
    """One state, r = 1 - (a - 0.5)^2: much Q finds the best action, none the mean of the data."""
    data = tiny_data(obs_dim=1, act_dim=1, n=65)
    data.obs[:], data.next_obs[:], data.terminal[:] = 0, 0, 1
    data.action = torch.linspace(-1, 1, 65)[:, None]
    data.reward = 1 - (data.action[:, 0] - 0.5).square()
    args = Args(alpha=alpha, batch_size=128, lr=1e-3)
    torch.manual_seed(0)
    nets = Nets(data, args)
    opt = SimpleNamespace(
        **{k: Adam(getattr(nets, k).parameters(), args.lr) for k in ("q", "actor")}
    )
    for t in range(450):  # the actor follows once the critics know the reward
        metrics = update(nets, opt, data, args, t >= 250 and t % 2 == 0)
    q = nets.q(data.obs, data.action)
    assert (q - data.reward).abs().mean() < 0.1
    assert metrics["q_loss"] < 0.05
    assert abs(td3_bc.policy(nets, data.obs[:1], args).item() - best) < 0.15


def test_policy_stands_between_raw_observations_and_the_bounds(tiny_data):
    data, args = tiny_data(obs_dim=2, act_dim=1), Args()
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    data.action_low, data.action_high = torch.tensor([-2.0]), torch.tensor([6.0])
    nets, raw = Nets(data, args), torch.randn(5, 2)
    a = nets.actor((raw - data.obs_mean) / data.obs_std).tanh()
    assert_close(td3_bc.policy(nets, raw, args), 2 + 4 * a)
    assert torch.equal(td3_bc.policy(nets, raw, args), td3_bc.policy(nets, raw, args))


def test_targets_start_as_copies(tiny_data):
    nets = Nets(tiny_data(), Args(critics=3))
    assert len(nets.q.weights[0]) == 3
    for name in ("actor", "q"):
        pairs = zip(getattr(nets, name).parameters(), getattr(nets, name + "_target").parameters())
        for p, t in pairs:
            assert torch.equal(p, t) and p is not t and not t.requires_grad
