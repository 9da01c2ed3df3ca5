"""sac_bc.py: target, the three parts of the actor's loss, one whole step, limits, a bandit."""

import copy
import math
from types import SimpleNamespace

import pytest
import sac_bc
import torch
import torch.distributions as D
from oracles import SGD, assert_same, in_double, rows, stack
from sac_bc import Args, Nets, actor_loss, critic_loss, temperature_loss, update
from torch import nn
from torch.testing import assert_close

from common import Adam


def optimizers(nets, optimizer, lr):
    params = {k: getattr(nets, k).parameters() for k in ("q", "actor")}
    params |= {"temperature": [nets.log_temperature]}
    return SimpleNamespace(**{k: optimizer(p, lr) for k, p in params.items()})


def make(data, seed=0, optimizer=Adam, lr=3e-4, temperature=0.2, **values):
    """Networks in float64, whose target differs from them, with their optimizers."""
    args = Args(batch_size=16, **values)
    torch.manual_seed(seed)
    nets, other = Nets(data, args), Nets(data, args)
    nets.q_target.load_state_dict(other.q.state_dict())
    nets = nets.double()
    nets.log_temperature.data.fill_(math.log(temperature) if temperature else -math.inf)
    return nets, optimizers(nets, optimizer, lr), args


@pytest.fixture
def data(tiny_data):
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


@pytest.fixture
def noises(monkeypatch):
    """The normal noise of every sample drawn, in order; the numbers are random but repeatable."""
    drawn, draw = [], torch.Generator().manual_seed(7)

    def randn_like(x):
        drawn.append(torch.randn(x.shape, generator=draw, dtype=x.dtype))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn_like", randn_like)
    return drawn


def policy_of(actor, s):
    """torch's own tanh-Gaussian of an actor written as a stack, and its mean and std."""
    mean, log_std = actor(s).split(2, dim=-1)
    std = log_std.clip(-5, 2).exp()
    pi = D.TransformedDistribution(D.Normal(mean, std), D.TanhTransform())
    return D.Independent(pi, 1), mean, std


def gradient(loss, params):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(params))])


def fixed(monkeypatch, a, log_prob):
    """Every sample is the action `a` (B, A) with `log_prob` (B,)."""
    monkeypatch.setattr(sac_bc, "sample_tanh_normal", lambda *_: (a, log_prob, None))


# ---- critics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("backup_entropy", "y"), [(False, [2.8, 5.0]), (True, [2.35, 5.0])])
def test_target_by_hand(monkeypatch, backup_entropy, y):
    """y = 1 + 0.9 (min(2, 7) - 0.25 * 2) where the episode goes on, without the last term when it
    is off; y = r = 5 where it ended. The loss is summed over critics, Q = (1, 1) and (2, 5)."""
    s = torch.zeros(2, 1)
    nets = SimpleNamespace(
        pi=lambda s: (s, s),
        q_target=lambda s2, a2: torch.tensor([[2.0, 9.0], [7.0, 6.0]]),
        q=lambda s, a: torch.tensor([[1.0, 1.0], [2.0, 5.0]]),
        log_temperature=torch.tensor(0.25).log(),
    )
    fixed(monkeypatch, s, torch.tensor([2.0, 1e6]))
    r, terminal = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 1.0])
    args = Args(gamma=0.9, backup_entropy=backup_entropy)
    loss, q_mean = critic_loss(nets, s, s, r, s, terminal, args)
    expected = ((1 - y[0]) ** 2 + (1 - y[1]) ** 2 + (2 - y[0]) ** 2 + (5 - y[1]) ** 2) / 2
    assert_close(loss, torch.tensor(expected))
    assert_close(q_mean, torch.tensor(9 / 4))


@pytest.mark.parametrize("backup_entropy", [False, True])
def test_target_is_the_reward_alone_at_a_terminal(data, backup_entropy):
    nets, _, args = make(data, backup_entropy=backup_entropy)
    s, a, r, s2, _ = rows(data)
    q = [stack(nets.q, e)(torch.cat([s, a], -1))[:, 0] for e in range(2)]
    expected = sum(nn.functional.mse_loss(x, r) for x in q)
    huge = torch.full_like(s2, 1e30)
    loss, _ = critic_loss(nets, s, a, r, huge, torch.ones_like(r), args)
    assert_close(loss, expected)


def test_only_terminals_cut_the_target(data):
    """A row that a time limit ended bootstraps: y moves with s' in all rows but the terminal."""
    nets, _, args = make(data)
    s, a, r, s2, terminal = rows(data)
    torch.manual_seed(1)
    for i in range(16):
        args.gamma, one = 0.99, slice(i, i + 1)
        batch = s[one], a[one], r[one], s2[one], terminal[one]
        full = critic_loss(nets, *batch, args)[0]
        args.gamma = 0.0
        assert torch.equal(full, critic_loss(nets, *batch, args)[0]) == (i == 7)
    assert terminal[7] == 1 and terminal.sum() == 1


# ---- actor -----------------------------------------------------------------------------------


def test_actor_loss_by_hand(noises):
    """Two rows, A = 1, policies N(0, 1) and N(0.3, 0.5^2) before tanh, critics (3, -2), (5, -4):
    weight 1 / mean(3, 4); the data's actions are tanh(1) and tanh(-0.2)."""
    mean, std = torch.tensor([[0.0], [0.3]]).double(), torch.tensor([[1.0], [0.5]]).double()
    nets = SimpleNamespace(
        pi=lambda s: (mean, std.log()),
        q=lambda s, a: torch.tensor([[3.0, -2.0], [5.0, -4.0]]).double(),
        log_temperature=torch.tensor(0.2).log(),
    )
    data_x = torch.tensor([[1.0], [-0.2]]).double()
    loss, bc_loss, weight, pi, entropy = actor_loss(nets, None, data_x.tanh(), Args(alpha_bc=0.7))
    x = [0.0 + 1.0 * noises[0][0].item(), 0.3 + 0.5 * noises[0][1].item()]

    def log_pi(x, m, s):
        z = (x - m) / s
        density = math.exp(-z * z / 2) / (s * math.sqrt(2 * math.pi))
        return math.log(density) - math.log(1 - math.tanh(x) ** 2)

    sampled = (log_pi(x[0], 0, 1) + log_pi(x[1], 0.3, 0.5)) / 2
    cloned = (log_pi(1, 0, 1) + log_pi(-0.2, 0.3, 0.5)) / 2
    expected = (0.2 * sampled - (3 - 4) / 2) / 3.5 - 0.7 * cloned
    for found, value in ((loss, expected), (bc_loss, -cloned), (entropy, -sampled)):
        assert abs(found.item() - value) < 1e-6
    assert abs(weight.item() - 1 / 3.5) < 1e-6
    assert_close(pi, torch.tensor([[x[0]], [x[1]]]).double().tanh())


def oracle_actor_loss(nets, s, a, noise, temperature, alpha_bc):
    """AC+BC's actor loss from stacks and torch.distributions; the actor's stack comes with it."""
    actor, q = stack(nets.actor), [stack(nets.q, e) for e in range(len(nets.q.weights[0]))]
    pi, mean, std = policy_of(actor, s)
    drawn = (mean + std * noise).tanh()
    value = torch.stack([f(torch.cat([s, drawn], -1))[:, 0] for f in q]).min(0).values
    scale = value.abs().mean().item()
    sac = temperature * pi.log_prob(drawn) - value
    return (sac / scale - alpha_bc * pi.log_prob(a)).mean(), actor, scale


def stack_gradient(loss, actor):
    """Of a stack's weights, in the order of MLP's parameters."""
    layers = [m for m in actor if isinstance(m, nn.Linear)]
    loss.backward()
    return torch.cat(
        [m.weight.grad.T.flatten() for m in layers] + [m.bias.grad.flatten() for m in layers]
    )


@pytest.mark.parametrize("critics", [1, 2, 3])
def test_actor_loss_is_that_of_a_stack(data, noises, critics):
    nets, _, args = make(data, alpha_bc=0.3, critics=critics)
    loss, *_ = actor_loss(nets, data.obs, data.action, args)
    found = gradient(loss, nets.actor.parameters())
    expected, actor, _ = oracle_actor_loss(nets, data.obs, data.action, noises[0], 0.2, 0.3)
    assert_close(loss, expected)
    assert_close(found, stack_gradient(expected, actor))


def test_gradient_is_a_difference_quotient(data, noises, monkeypatch):
    """In both means and both log-stds; the detached weight is held."""
    nets, _, args = make(data)
    loss, _, weight, *_ = actor_loss(nets, data.obs, data.action, args)
    (found,) = torch.autograd.grad(loss, nets.actor.biases[-1])
    monkeypatch.setattr(torch, "randn_like", lambda x: noises[0])

    def value(i, h):
        moved = copy.deepcopy(nets)
        moved.actor.biases[-1].data.view(-1)[i] += h
        loss, bc_loss, its_weight, *_ = actor_loss(moved, data.obs, data.action, args)
        bc_loss = args.alpha_bc * bc_loss
        return ((loss - bc_loss) * weight / its_weight + bc_loss).item()

    for i, expected in enumerate(found.view(-1)):
        assert abs((value(i, 1e-6) - value(i, -1e-6)) / 2e-6 - expected) < 1e-7


def test_without_cloning_it_is_sacs_actor_step(data, noises):
    """alpha_bc = 0: the gradient of E[temperature log pi - min Q], divided by mean |min Q|."""
    nets, _, args = make(data, alpha_bc=0.0)
    found = gradient(actor_loss(nets, data.obs, data.action, args)[0], nets.actor.parameters())
    actor, q = stack(nets.actor), [stack(nets.q, e) for e in range(2)]
    pi, mean, std = policy_of(actor, data.obs)
    a = (mean + std * noises[0]).tanh()
    value = torch.minimum(*[f(torch.cat([data.obs, a], -1)).squeeze(-1) for f in q])
    sac = stack_gradient((0.2 * pi.log_prob(a) - value).mean(), actor)
    assert_close(found * value.abs().mean().detach(), sac)


def test_endless_cloning_is_maximum_likelihood(data):
    """alpha_bc -> infinity: the gradient's direction is that of -log pi(a|s)."""
    nets, _, args = make(data)
    actor = stack(nets.actor)
    bc = stack_gradient(-policy_of(actor, data.obs)[0].log_prob(data.action).mean(), actor)
    cosines = []
    for args.alpha_bc in (1e-3, 1e8):
        loss, *_ = actor_loss(nets, data.obs, data.action, args)
        found = gradient(loss, nets.actor.parameters())
        cosines.append(nn.functional.cosine_similarity(found, bc, 0).item())
    assert cosines[0] < 0.9 and cosines[1] > 1 - 1e-9
    assert_close(found / 1e8, bc, atol=1e-6, rtol=1e-5)


def test_the_unit_of_reward_does_not_matter(data, noises, monkeypatch):
    """Q and the temperature times 50: the same gradient. The temperature alone: another one."""
    nets, _, args = make(data)

    def found(nets):
        loss, *_ = actor_loss(nets, data.obs, data.action, args)
        return gradient(loss, nets.actor.parameters())

    grad = found(nets)
    monkeypatch.setattr(torch, "randn_like", lambda x: noises[0])
    nets.log_temperature.data += math.log(50)
    assert (found(nets) - grad).norm() > 0.01 * grad.norm()
    nets.q.weights[-1].data *= 50
    nets.q.biases[-1].data *= 50
    assert_close(found(nets), grad)


def test_the_actor_climbs_the_lower_critic_of_each_row(monkeypatch):
    """Critics a and 1 - 3 a cross at a = 1/4: slope 1 below, -3 above."""
    mean = torch.tensor([[0.1], [0.4]]).double().requires_grad_()
    nets = SimpleNamespace(
        pi=lambda s: (mean, torch.zeros_like(mean)),
        q=lambda s, a: torch.stack([a[:, 0], 1 - 3 * a[:, 0]]),
        log_temperature=torch.tensor(0.2).log(),
    )
    fixed(monkeypatch, mean, torch.zeros(2))
    loss, _, weight, *_ = actor_loss(nets, None, mean.detach(), Args(alpha_bc=0.0))
    assert abs(weight.item() - 1 / 0.15) < 1e-6  # Q = 0.1 and 1 - 1.2
    (grad,) = torch.autograd.grad(loss, mean)
    assert_close(grad[:, 0], torch.tensor([-1 / 2, 3 / 2]).double() / 0.15)


def fitted(steepness, alpha_bc=1e-3, std=0.05, steps=900):
    """Mean and std of a policy without entropy on Q = c + g a, c >> g, whose data are +-std around
    0; g = steepness alpha_bc c / std."""
    mean, log_std = (torch.tensor(v).double().requires_grad_() for v in (0.0, math.log(std)))
    nets = SimpleNamespace(
        pi=lambda s: (mean.expand(64, 1), log_std.expand(64, 1)),
        q=lambda s, a: (1e4 + steepness * alpha_bc * 1e4 / std * a[:, 0])[None],
        log_temperature=torch.tensor(-math.inf),
    )
    data, adam = torch.tensor([[-std], [std]]).repeat(32, 1), torch.optim.Adam([mean, log_std])
    for t in range(steps):
        adam.param_groups[0]["lr"] = 1e-3 if t < 2 * steps / 3 else 1e-4
        loss, *_ = actor_loss(nets, None, data.double(), Args(alpha_bc=alpha_bc))
        mean.grad, log_std.grad = torch.autograd.grad(loss, [mean, log_std])
        adam.step()
    return mean.item(), log_std.exp().item()


def test_distance_from_the_data_under_a_linear_q():
    """k d^2 - d + k std^2 = 0 with k = g / (alpha_bc mean|Q|); the fitted variance grows by d^2.
    At k std = 0.3 that is d = std / 3."""
    torch.manual_seed(0)
    d, std = fitted(0.3)
    assert abs(d - 0.05 / 3) < 5e-4
    assert abs(std - 0.05 * math.sqrt(1 + 1 / 9)) < 1e-3


def test_a_fitted_std_lets_go_of_a_steep_q():
    """Beyond k std = 1/2 the pull of the likelihood, at most alpha_bc / (2 std), is too weak."""
    torch.manual_seed(0)
    near, far = fitted(0.8, steps=300), fitted(0.8, steps=600)
    assert near[0] > 0.05 and far[0] > near[0] + 0.03


def test_actions_at_the_bounds_are_cloned_inside_them(data):
    """Clipped at 1 - 1e-6: finite, and equal to the density there."""
    nets, _, args = make(data)
    data.action[:] = torch.tensor([1.0, -1.0])
    loss, bc_loss, *_ = actor_loss(nets, data.obs, data.action, args)
    pi, _, _ = policy_of(stack(nets.actor), data.obs)
    assert_close(bc_loss, -pi.log_prob(data.action * (1 - 1e-6)).mean().detach())
    assert gradient(loss, nets.actor.parameters()).isfinite().all()


def test_dequantization_is_of_the_cloning_term_alone(data, monkeypatch):
    """Actions at a bound move to the middle of the band; those inside, and the critics', do not."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))
    nets, opt, args = make(data, dequantize=0.2, lr=0.0)
    data.action[::2, 0], data.action[1::2, 1] = 1.0, -1.0
    spread = data.action.clone()
    spread[::2, 0], spread[1::2, 1] = 0.9, -0.9
    pi, _, _ = policy_of(stack(nets.actor), data.obs)
    _, bc_loss, *_ = actor_loss(nets, data.obs, data.action, args)
    assert_close(bc_loss, -pi.log_prob(spread).mean().detach())
    monkeypatch.setattr(sac_bc, "sample", lambda data, _: rows(data))
    assert_close(update(nets, opt, data, args)["q_mean"], nets.q(data.obs, data.action).mean())


# ---- temperature -----------------------------------------------------------------------------


@pytest.mark.parametrize(("entropy", "direction"), [(-3.5, 1), (-2.5, -1)])
def test_temperature_rises_below_its_target(data, entropy, direction):
    """The target is -A = -3; the gradient in the logarithm is temperature (entropy + A)."""
    nets, opt, _ = make(data, temperature=0.7)
    loss = temperature_loss(nets, torch.tensor(entropy), 3)
    (grad,) = torch.autograd.grad(loss, nets.log_temperature)
    assert abs(grad - 0.7 * (entropy + 3)) < 1e-6
    opt.temperature.step([grad])
    assert (nets.log_temperature - math.log(0.7)).sign() == direction


# ---- update ----------------------------------------------------------------------------------


def test_which_parameters_each_loss_reaches(data):
    nets, _, args = make(data, backup_entropy=True)
    critic, q_mean = critic_loss(nets, *rows(data), args)
    actor, *metrics = actor_loss(nets, data.obs, data.action, args)
    assert not any(x.requires_grad for x in (q_mean, *metrics))
    online = [(k, p) for k, p in nets.named_parameters() if p.requires_grad]
    assert {k.split(".")[0] for k, _ in online} == {"actor", "q", "log_temperature"}
    temperature = temperature_loss(nets, metrics[-1], 2)
    expected = {"q": critic, "actor q": actor, "log_temperature": temperature}
    for reached, loss in expected.items():
        grads = torch.autograd.grad(loss, [p for _, p in online], allow_unused=True)
        found = {k.split(".")[0] for (k, _), g in zip(online, grads) if g is not None}
        assert found == set(reached.split())


@pytest.mark.parametrize("moving", ["q", "actor", "temperature"])
def test_each_optimizer_moves_its_own_network_alone(data, moving):
    """With the other learning rates at 0 the other networks stay, bit for bit."""
    nets, opt, args = make(data, backup_entropy=True)
    for name in {"q", "actor", "temperature"} - {moving}:
        getattr(opt, name).lr.zero_()
    before = copy.deepcopy(nets)
    update(nets, opt, data, args)
    for (name, now), then in zip(nets.named_parameters(), before.parameters()):
        name = name.split(".")[0].removeprefix("log_")
        if name != "q_target":
            assert torch.equal(now, then) == (name != moving)
    assert all(p.grad is None for p in nets.parameters())


@pytest.mark.parametrize("backup_entropy", [False, True])
@pytest.mark.parametrize(("optimizer", "lr"), [(SGD, 0.03), (Adam, 2**-10)])
def test_steps_by_hand(data, noises, monkeypatch, optimizer, lr, backup_entropy):
    """Adam's rate is a float32: one that it holds exactly."""
    data.reward = data.reward - 1
    values = dict(backup_entropy=backup_entropy, alpha_bc=0.4, polyak=0.1)
    nets, opt, args = make(data, optimizer=optimizer, lr=lr, **values)
    actor, log_temperature = stack(nets.actor), torch.tensor(0.2, dtype=torch.float64).log()
    q, q_target = ([stack(net, e) for e in range(2)] for net in (nets.q, nets.q_target))
    log_temperature.requires_grad_()
    oracle = {SGD: torch.optim.SGD, Adam: torch.optim.Adam}[optimizer]
    q_opt = oracle([p for net in q for p in net.parameters()], lr=lr)
    actor_opt, t_opt = oracle(actor.parameters(), lr=lr), oracle([log_temperature], lr=lr)
    draw = torch.Generator().manual_seed(5)
    batches = [torch.randint(16, (16,), generator=draw) for _ in range(3)]
    left = iter(batches)
    monkeypatch.setattr(sac_bc, "sample", lambda data, _, i=left: take(data, next(i)))
    for i in batches:
        noises.clear()
        metrics = update(nets, opt, data, args)
        s, a, r, s2, terminal = take(data, i)

        def act(s, noise):
            pi, mean, std = policy_of(actor, s)
            drawn = (mean + std * noise).tanh()
            return pi, drawn, pi.log_prob(drawn)

        def value(nets, s, a):
            return [net(torch.cat([s, a], -1)).squeeze(-1) for net in nets]

        with torch.no_grad():
            _, a2, log_prob = act(s2, noises[0])
            v2 = torch.minimum(*value(q_target, s2, a2))
            if backup_entropy:
                v2 = v2 - log_temperature.exp() * log_prob
            y = r + 0.99 * (1 - terminal) * v2
        q_opt.zero_grad()
        q_data = value(q, s, a)
        q_loss = sum(nn.functional.mse_loss(x, y) for x in q_data)
        q_loss.backward()
        q_opt.step()
        actor_opt.zero_grad()
        pi, drawn, log_prob = act(s, noises[1])
        low = torch.minimum(*value(q, s, drawn))
        lam = 1 / low.abs().mean().detach()
        nll, temperature = -pi.log_prob(a).mean(), log_temperature.exp().detach()
        loss = (lam * temperature * log_prob - lam * low).mean() + 0.4 * nll
        loss.backward()
        actor_opt.step()
        t_opt.zero_grad()
        entropy = -log_prob.mean().detach()
        (log_temperature.exp() * (entropy + 2)).backward()
        t_opt.step()
        for target, online in zip(q_target, q):
            for t, o in zip(target.parameters(), online.parameters()):
                t.data = 0.9 * t.data + 0.1 * o.data
        assert_same(nets.q, *q)
        assert_same(nets.q_target, *q_target)
        assert_same(nets.actor, actor)
        assert_close(nets.log_temperature.data, log_temperature.data)
        expected = {
            "q_loss": q_loss.detach(),
            "q_mean": torch.stack(q_data).mean().detach(),
            "actor_loss": loss.detach(),
            "bc_loss": nll.detach(),
            "weight": lam,
            "saturated_actions": (drawn.abs() > 0.99).double().mean(),
            "entropy": entropy,
            "temperature": log_temperature.exp().detach(),
        }
        assert metrics.keys() == expected.keys()
        for name, number in metrics.items():
            assert not number.requires_grad and number.ndim == 0
            assert_close(number.double(), expected[name], msg=name)
    assert len(noises) == 2  # one sample for the target, one for the actor


def take(data, i):
    return [x[i] for x in rows(data)]


# ---- networks and script ---------------------------------------------------------------------


def test_initial_networks(tiny_data):
    nets = Nets(tiny_data(), Args(critics=3))
    assert [tuple(w.shape) for w in nets.actor.weights] == [(3, 256), (256, 256), (256, 4)]
    assert [tuple(w.shape) for w in nets.q.weights] == [(3, 5, 256), (3, 256, 256), (3, 256, 1)]
    for p, t in zip(nets.q.parameters(), nets.q_target.parameters()):
        assert torch.equal(p, t) and p is not t and not t.requires_grad
    assert nets.log_temperature == 0


@pytest.mark.parametrize(("value", "clamped"), [(50.0, 2.0), (-50.0, -5.0)])
def test_log_stds_are_clamped(data, value, clamped):
    nets, _, _ = make(data)
    nets.actor.biases[-1].data.fill_(value)
    assert (nets.pi(data.obs)[1] == clamped).all() and (nets.pi(data.obs)[0].abs() > 40).all()


def test_policy_stands_between_raw_observations_and_the_bounds(tiny_data):
    data, args = tiny_data(obs_dim=2, act_dim=1), Args()
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    data.action_low, data.action_high = torch.tensor([-2.0]), torch.tensor([6.0])
    nets, raw = Nets(data, args), torch.randn(5, 2)
    mean = stack(nets.actor)((raw - data.obs_mean) / data.obs_std)[:, :1]
    assert_close(sac_bc.policy(nets, raw, args), 2 + 4 * mean.tanh())
    assert torch.equal(sac_bc.policy(nets, raw, args), sac_bc.policy(nets, raw, args))


class FakeRun:
    device = torch.device("cpu")

    def __init__(self, args):
        self.loop = lambda steps: range(1, steps + 1)

    def __getattr__(self, name):
        return lambda *_, **__: None


@pytest.mark.parametrize(
    ("share", "width", "said"), [(0.5, 0.0, True), (0.5, 0.1, False), (0.0, 0.0, False)]
)
def test_actions_at_the_bounds_are_said(tiny_data, monkeypatch, capsys, share, width, said):
    data = tiny_data(n=20)
    data.action[: round(20 * share)] = -1.0
    monkeypatch.setattr(sac_bc, "Run", FakeRun)
    monkeypatch.setattr(sac_bc, "load_dataset", lambda *_: (data, None))
    sac_bc.train(Args(steps=1, batch_size=4, dequantize=width, device="cpu"))
    out = capsys.readouterr().out
    assert (out.startswith("note: 50% of the action numbers") and out.count("\n") == 1) == said
    assert said or not out


@pytest.mark.parametrize("normalize", [True, False])
def test_training_sees_scaled_observations_when_asked(tiny_data, monkeypatch, normalize):
    data, seen = tiny_data(n=50), []
    raw = data.obs.clone()
    monkeypatch.setattr(sac_bc, "Run", FakeRun)
    monkeypatch.setattr(sac_bc, "load_dataset", lambda *_: (data, None))
    monkeypatch.setattr(sac_bc, "update", lambda *inputs: seen.append(inputs) or {})
    sac_bc.train(Args(steps=3, normalize_obs=normalize, device="cpu"))
    nets, opt, _, args = seen[-1]
    assert len(seen) == 3 and set(vars(opt)) == {"q", "actor", "temperature"}
    scaled = (raw - raw.mean(0)) / (raw.std(0, correction=0) + 1e-3)
    assert_close(data.obs, scaled if normalize else raw)
    assert_close(nets.scaling.obs(raw), data.obs)


# ---- behavior --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha_bc", "low", "high"), [(0.0, 0.43, 0.57), (1.0, 0.1, 0.4), (30.0, -0.08, 0.08)]
)
def test_bandit(tiny_data, alpha_bc, low, high):
    """One state, r = 1 - (a - 0.5)^2, the data's actions even over [-0.9, 0.9]: Q alone finds the
    best action and sharpens around it, much cloning keeps the data's mean and spread."""
    data = tiny_data(obs_dim=1, act_dim=1, n=65)
    data.obs[:], data.next_obs[:], data.terminal[:] = 0, 0, 1
    data.action = torch.linspace(-0.9, 0.9, 65)[:, None]
    data.reward = 1 - (data.action[:, 0] - 0.5).square()
    args = Args(alpha_bc=alpha_bc, batch_size=64, lr=1e-3)
    torch.manual_seed(0)
    nets = Nets(data, args)
    opt = optimizers(nets, Adam, args.lr)
    opt.temperature.lr.fill_(2e-2)
    for _ in range(400):
        metrics = update(nets, opt, data, args)
    assert all(value.isfinite() for value in metrics.values())
    assert (nets.q(data.obs, data.action) - data.reward).abs().mean() < 0.05
    assert low < sac_bc.policy(nets, data.obs[:1], args).item() < high
    spread = (nets.pi(data.obs[:1])[1].exp() / data.action.atanh().std(correction=0)).item()
    assert abs(spread - 1) < 0.15 if alpha_bc == 30 else spread < (0.6 if alpha_bc == 0 else 1)
