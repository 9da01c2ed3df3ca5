"""sac_bc.py: target, the three parts of the actor's loss, whole steps, limits, a bandit."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributions as D
from golden.tools import Inject
from oracles import SGD, assert_same, in_double, rows, stack
from sac_bc import Args, Nets, actor_loss, train, update
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
