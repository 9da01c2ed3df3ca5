"""sac_bc.py: target, the three parts of the actor's loss, whole steps, limits, a bandit."""

import math
from types import SimpleNamespace

import pytest
import sac_bc
import torch
import torch.distributions as D
from golden.tools import Inject
from oracles import SGD, assert_same, in_double, rows, stack
from sac_bc import Args, Nets, actor_loss, critic_loss, train, update
from stand_in import PlainRun
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


def noise(seed=7):
    """The normal noise of one sample of a policy: 16 rows, two action dimensions."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(16, 2, generator=draw).double()


def policy_of(actor, s):
    """torch's own tanh-Gaussian of an actor written as a stack, and its mean and std."""
    mean, log_std = actor(s).split(2, dim=-1)
    std = log_std.clip(-5, 2).exp()
    pi = D.TransformedDistribution(D.Normal(mean, std), D.TanhTransform())
    return D.Independent(pi, 1), mean, std


def actor_gradient(nets, data, args):
    """Of the actor's loss, whose one sample has the noise of noise()."""
    with Inject(randn_like=[noise()]):
        loss, *_ = actor_loss(nets, data.obs, data.action, args)
    grads = torch.autograd.grad(loss, list(nets.actor.parameters()))
    return torch.cat([g.flatten() for g in grads])


# ---- critics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("backup_entropy", "y"), [(False, [2.8, 5.0]), (True, [2.35, 5.0])])
def test_target_by_hand(backup_entropy, y):
    """y = 1 + 0.9 (min(2, 7) - 0.25 * 2) where the episode goes on, without the last term when it
    is off; y = r = 5 where it ended. The loss is summed over critics, Q = (1, 1) and (2, 5)."""
    s, middle = torch.zeros(2, 1), 0.5 * math.log(2 * math.pi)
    log_prob = torch.tensor([[2.0], [1e6]])  # of a' = 0, by the policy's std
    nets = SimpleNamespace(
        pi=lambda s: (s, -log_prob - middle),
        q_target=lambda s2, a2: torch.tensor([[2.0, 9.0], [7.0, 6.0]]),
        q=lambda s, a: torch.tensor([[1.0, 1.0], [2.0, 5.0]]),
        log_temperature=torch.tensor(0.25).log(),
    )
    r, terminal = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 1.0])
    args = Args(gamma=0.9, backup_entropy=backup_entropy)
    with Inject(randn_like=[torch.zeros(2, 1)]):
        loss, q_mean = critic_loss(nets, s, s, r, s, terminal, args)
    expected = ((1 - y[0]) ** 2 + (1 - y[1]) ** 2 + (2 - y[0]) ** 2 + (5 - y[1]) ** 2) / 2
    assert_close(loss, torch.tensor(expected))
    assert_close(q_mean, torch.tensor(9 / 4))


# ---- actor -----------------------------------------------------------------------------------


def stack_gradient(loss, actor):
    """Of a stack's weights, in the order of MLP's parameters."""
    layers = [m for m in actor if isinstance(m, nn.Linear)]
    loss.backward()
    return torch.cat(
        [m.weight.grad.T.flatten() for m in layers] + [m.bias.grad.flatten() for m in layers]
    )


def test_without_cloning_it_is_sacs_actor_step(data):
    """alpha_bc = 0: the gradient of E[temperature log pi - min Q], divided by mean |min Q|."""
    nets, _, args = make(data, alpha_bc=0.0)
    found = actor_gradient(nets, data, args)
    actor, q = stack(nets.actor), [stack(nets.q, e) for e in range(2)]
    pi, mean, std = policy_of(actor, data.obs)
    a = (mean + std * noise()).tanh()
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
        found = actor_gradient(nets, data, args)
        cosines.append(nn.functional.cosine_similarity(found, bc, 0).item())
    assert cosines[0] < 0.9 and cosines[1] > 1 - 1e-9
    assert_close(found / 1e8, bc, atol=1e-6, rtol=1e-5)


def fitted(steepness, alpha_bc=1e-3, std=0.05, steps=900):
    """Mean and std of a policy without entropy on Q = c + g a, c >> g, whose data are +-std around
    0; g = steepness alpha_bc c / std."""
    mean, log_std = (torch.tensor(v).double().requires_grad_() for v in (0.0, math.log(std)))
    nets = SimpleNamespace(
        pi=lambda s: (mean.expand(64, 1), log_std.expand(64, 1)),
        q=lambda s, a: (1e4 + steepness * alpha_bc * 1e4 / std * a[:, 0])[None],
        log_temperature=torch.tensor(-math.inf),
    )
    data = torch.tensor([[-std], [std]]).repeat(32, 1)
    adam = torch.optim.Adam([mean, log_std])
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
    _, bc_loss, *_ = actor_loss(nets, data.obs, data.action, args)
    pi, _, _ = policy_of(stack(nets.actor), data.obs)
    assert_close(bc_loss, -pi.log_prob(data.action * (1 - 1e-6)).mean().detach())
    assert actor_gradient(nets, data, args).isfinite().all()


def test_dequantization_is_of_the_cloning_term_alone(data):
    """Actions at a bound move to the middle of the band; those inside, and the critics', do not."""
    nets, opt, args = make(data, dequantize=0.2, lr=0.0)
    data.action[::2, 0], data.action[1::2, 1] = 1.0, -1.0
    spread = data.action.clone()
    spread[::2, 0], spread[1::2, 1] = 0.9, -0.9
    pi, _, _ = policy_of(stack(nets.actor), data.obs)
    halves = torch.full((16, 2), 0.5).double()
    with Inject(randint=[range(16)], randn_like=[noise(), noise()], rand_like=[halves]):
        metrics = update(nets, opt, data, args)
    assert_close(metrics["bc_loss"], -pi.log_prob(spread).mean().detach())
    assert_close(metrics["q_mean"], nets.q(data.obs, data.action).mean())


# ---- temperature -----------------------------------------------------------------------------


# ---- update ----------------------------------------------------------------------------------


class ByHand:
    """SAC (Haarnoja et al., 2018) with AC+BC's actor, on stacks and torch.distributions."""

    def __init__(self, nets, optimizer, lr, args):
        self.args, self.actor = args, stack(nets.actor)
        self.q = nn.ModuleList(stack(nets.q, e) for e in range(2))
        self.q_target = nn.ModuleList(stack(nets.q_target, e) for e in range(2))
        self.log_temperature = nets.log_temperature.detach().clone().requires_grad_()
        optimizer = {SGD: torch.optim.SGD, Adam: torch.optim.Adam}[optimizer]
        self.q_opt = optimizer(self.q.parameters(), lr=lr)
        self.actor_opt = optimizer(self.actor.parameters(), lr=lr)
        self.temperature_opt = optimizer([self.log_temperature], lr=lr)

    def sample(self, s, noise):
        """The policy at s, its action of this noise, and that action's log-density; by x, because
        tanh(x) rounds to 1 where x is large."""
        pi, mean, std = policy_of(self.actor, s)
        x = mean + std * noise
        log_prob = D.Normal(mean, std).log_prob(x)
        log_prob = log_prob - D.TanhTransform().log_abs_det_jacobian(x, x.tanh())
        return pi, x.tanh(), log_prob.sum(-1)

    def values(self, critics, s, a):
        return [q(torch.cat([s, a], -1)).squeeze(-1) for q in critics]

    def critic_step(self, s, a, r, s2, terminal, noise):
        with torch.no_grad():
            _, a2, log_prob = self.sample(s2, noise)
            v2 = torch.minimum(*self.values(self.q_target, s2, a2))
            if self.args.backup_entropy:
                v2 = v2 - self.log_temperature.exp() * log_prob
            y = r + 0.99 * (1 - terminal) * v2
        q = self.values(self.q, s, a)
        loss = sum(nn.functional.mse_loss(x, y) for x in q)
        self.descend(self.q_opt, loss)
        return {"q_loss": loss, "q_mean": torch.stack(q).mean()}

    def actor_step(self, s, a, noise):
        pi, drawn, log_prob = self.sample(s, noise)
        q = torch.minimum(*self.values(self.q, s, drawn))
        weight, temperature = 1 / q.abs().mean().detach(), self.log_temperature.exp().detach()
        bc_loss = -pi.log_prob(a).mean()
        sac_loss = (temperature * log_prob - q).mean()
        loss = weight * sac_loss + self.args.alpha_bc * bc_loss
        self.descend(self.actor_opt, loss)
        saturated = (drawn.abs() > 0.99).double().mean()
        metrics = {"pi_loss": loss, "bc_loss": bc_loss, "q_weight": weight}
        return metrics | {"saturated_actions": saturated, "entropy": -log_prob.mean()}

    def temperature_step(self, entropy):
        loss = self.log_temperature.exp() * (entropy.detach() + 2)
        self.descend(self.temperature_opt, loss)
        return {"temperature": self.log_temperature.exp()}

    def target_step(self):
        for t, o in zip(self.q_target.parameters(), self.q.parameters()):
            t.data = (1 - self.args.polyak) * t.data + self.args.polyak * o.data

    def descend(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def step(self, s, a, r, s2, terminal, noises):
        metrics = self.critic_step(s, a, r, s2, terminal, noises[0])
        metrics |= self.actor_step(s, a, noises[1])
        metrics |= self.temperature_step(metrics["entropy"])
        self.target_step()
        return metrics


@pytest.mark.parametrize("backup_entropy", [False, True])
@pytest.mark.parametrize(("optimizer", "lr"), [(SGD, 0.03), (Adam, 2**-10)])
def test_steps_by_hand(data, optimizer, lr, backup_entropy):
    """Networks and metrics of three updates. Adam's rate is one that a float32 holds exactly."""
    data.reward = data.reward - 1
    values = dict(backup_entropy=backup_entropy, alpha_bc=0.4, polyak=0.1)
    nets, opt, args = make(data, optimizer=optimizer, lr=lr, **values)
    oracle, draw = ByHand(nets, optimizer, lr, args), torch.Generator().manual_seed(5)
    for t in range(3):
        i, noises = torch.randint(16, (16,), generator=draw), [noise(2 * t), noise(2 * t + 1)]
        with Inject(randint=[i], randn_like=noises):
            metrics = update(nets, opt, data, args)
        expected = oracle.step(*[x[i] for x in rows(data)], noises)
        assert_same(nets.q, *oracle.q)
        assert_same(nets.q_target, *oracle.q_target)
        assert_same(nets.actor, oracle.actor)
        assert_close(nets.log_temperature.data, oracle.log_temperature.data)
        assert metrics.keys() == expected.keys()
        for name, number in metrics.items():
            assert not number.requires_grad and number.ndim == 0
            assert_close(number.double(), expected[name].detach(), msg=name)


# ---- networks and script ---------------------------------------------------------------------


def test_initial_networks(tiny_data):
    nets = Nets(tiny_data(), Args(critics=3))
    assert [tuple(w.shape) for w in nets.actor.weights] == [(3, 256), (256, 256), (256, 4)]
    assert [tuple(w.shape) for w in nets.q.weights] == [(3, 5, 256), (3, 256, 256), (3, 256, 1)]
    assert nets.log_temperature == 0


@pytest.mark.parametrize(
    ("share", "width", "said"), [(0.5, 0.0, True), (0.5, 0.1, False), (0.0, 0.0, False)]
)
def test_actions_at_the_bounds_are_said(tiny_data, capsys, share, width, said):
    data = tiny_data(n=20)
    data.action[: round(20 * share)] = -1.0
    train(PlainRun(limit=1), data, Args(batch_size=4, dequantize=width))
    out = capsys.readouterr().out
    assert (out.startswith("note: 50% of the action numbers") and out.count("\n") == 1) == said
    assert said or not out


@pytest.mark.parametrize("normalize", [True, False])
def test_training_sees_shifted_rewards_and_scaled_observations(tiny_data, normalize):
    data, run = tiny_data(n=50), PlainRun(limit=3)
    raw, reward = data.obs.clone(), data.reward.clone()
    train(run, data, Args(normalize_obs=normalize, reward_shift=-1.0))
    assert len(run.phases["train"]) == 3 and set(vars(run.opt)) == {"q", "actor", "temperature"}
    scaled = (raw - raw.mean(0)) / (raw.std(0, correction=0) + 1e-3)
    assert_close(data.obs, scaled if normalize else raw)
    assert_close(run.nets.scaling.obs(raw), data.obs)
    assert_close(data.reward, reward - 1)


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
