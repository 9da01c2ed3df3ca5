"""cql.py: the regularizers against integrals and tables, the targets, SAC."""

import math
from types import SimpleNamespace

import cql
import pytest
import torch
from cql import Args, Nets, conservative_diff, proposals, target_value
from golden.tools import Inject
from oracles import SGD, in_double
from stand_in import PlainRun
from torch.testing import assert_close

from common import orthogonal_

LOG2 = math.log(2)
B, ACT = 16, 2  # rows and action dimensions of `data`


def optimizers(nets, optimizer, lr):
    return SimpleNamespace(
        actor=optimizer(nets.pi_parameters(), lr),
        temperature=optimizer([nets.log_temperature], lr),
        q=optimizer(nets.q.parameters(), lr),
        multiplier=optimizer([nets.log_multiplier], lr),
    )


@pytest.fixture
def data(tiny_data):
    """Two action dimensions, everything in float64."""
    return in_double(tiny_data(obs_dim=3, act_dim=ACT, n=B))


def make(data, **values):
    """Networks in float64 with outputs of size one, and targets that differ."""
    args = Args(**{"batch_size": B, "n_actions": 3} | values)
    torch.manual_seed(0)
    nets = Nets(data, args)
    for net in (nets.actor, nets.q, nets.q_target):
        orthogonal_(net, 1.0, 0.5)
    nets = nets.double()
    with torch.no_grad():
        nets.log_std_scale.fill_(0.7)
        nets.log_temperature.fill_(-0.3)
        nets.log_multiplier.fill_(0.4)
    return nets, args


def draw_noise(args, seed=1):
    """All noise of one update, by its use; what a form does not draw is absent."""
    g, N = torch.Generator().manual_seed(seed), args.n_actions
    normal = lambda *shape: torch.randn(*shape, generator=g).double()
    noise = {"pi": normal(B, ACT), "uniform": torch.rand(B, N, ACT, generator=g).double()}
    if args.regularizer == "h":
        noise |= {"next": normal(B, N, ACT), "now": normal(B, N, ACT)}
    return noise | {"target": normal(B, N if args.max_backup else 1, ACT)}


def step(nets, opt, data, args, noise, warm=False, dequantize=()):
    """One update on the whole of `data`, in order, with the given noise."""
    normal = [noise[name] for name in ("pi", "next", "now", "target") if name in noise]
    uniform = [noise["uniform"], *dequantize]
    with Inject(randint=[torch.arange(B)], randn_like=normal, rand_like=uniform):
        return cql.update(nets, opt, data, args, warm)


# ---- the regularizers ------------------------------------------------------------------------


def policies(mean, log_std, b, act_dim=1):
    return tuple(torch.full((b, act_dim), x).double() for x in (mean, log_std))


def test_log_sum_exp_is_the_integral():
    """Q = 3 log(1 - a^2): the integral of exp Q over (-1, 1) is 32/35; less log(3N), the sum is its
    logarithm, whatever the policies are."""
    torch.manual_seed(0)
    n, args = 3000, Args(n_actions=3000)
    pi, pi2 = policies(0.3, 0.7, 8), policies(-0.5, 0.5, 8)
    a, log_density = proposals(pi, pi2, torch.zeros(8, 1).double(), args)
    q = 3 * torch.log1p(-a.squeeze(-1).square()).expand(2, -1, -1)
    q_data = torch.tensor([1.0, -2.0]).double()[:, None].expand(2, 8)
    diff = conservative_diff(q_data, q, log_density, args)
    exact = math.log(32 / 35) - torch.tensor([1.0, -2.0]).double()
    assert_close(diff - math.log(3 * n), exact, atol=0.01, rtol=0)
    parts = (q - log_density)[0].exp().unflatten(1, (3, n)).mean((0, 2))  # each sampler alone
    assert_close(parts, torch.full((3,), 32 / 35).double(), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("n", "act_dim", "value"), [(10, 3, 5.4806), (10, 6, 7.5601), (1, 1, 1.7918)]
)
def test_constant_q_under_a_uniform_policy(n, act_dim, value):
    """log(3N) + A log 2, for any constant."""
    args = Args(n_actions=n)
    _, log_uniform = proposals(None, None, torch.zeros(4, act_dim), Args(regularizer="basic"))
    assert_close(log_uniform, torch.full_like(log_uniform, -act_dim * LOG2))
    q = torch.full((2, 4, 3 * n), 7.0)
    diff = conservative_diff(q[..., 0], q, log_uniform[:, :1].expand(4, 3 * n), args)
    assert_close(diff, torch.full((2,), math.log(3 * n) + act_dim * LOG2))
    assert abs(diff[0].item() - value) < 1e-3


@pytest.mark.parametrize("regularizer", ["basic", "h"])
def test_fixed_point_of_a_bandit(regularizer):
    """Three arms, pi_beta = (.7, .2, .1). With mu uniform, Q = r - weight/2 (mu / pi_beta - 1); of
    CQL(H), mu is softmax(Q)."""
    r, share = torch.tensor([1.0, 2.0, 0.5]).double(), [7, 2, 1]
    arm = torch.repeat_interleave(torch.arange(3), torch.tensor(share))
    args, q = Args(regularizer=regularizer), torch.zeros(3).double().requires_grad_()
    adam = torch.optim.Adam([q], lr=0.05)
    for _ in range(800):
        other = q.expand(1, 10, 3)  # every arm once: uniform
        diff = conservative_diff(q[arm][None], other, torch.zeros(10, 3), args)
        adam.zero_grad()
        ((q[arm] - r[arm]).square().mean() + 0.2 * diff.sum()).backward()
        adam.step()
    mu = torch.ones(3).double() / 3 if regularizer == "basic" else q.detach().softmax(0)
    expected = r - 0.1 * (mu / (torch.tensor(share) / 10) - 1)
    assert_close(q.detach(), expected, atol=1e-6, rtol=0)


# ---- where the regularizer looks -------------------------------------------------------------


# ---- target, multiplier, temperature ---------------------------------------------------------


def test_target_by_hand():
    """Two critics at two next actions: (1, 8), (5, 3) in the first row, so the maximum of minima is
    3, the minimum of maxima 5; the second row is a terminal."""
    q2 = torch.tensor([[[1.0, 5.0], [9.0, 9.0]], [[8.0, 3.0], [9.0, 9.0]]])  # (2, B, M)
    nets = SimpleNamespace(q_target=lambda rows: q2.flatten(1))
    r, terminal, temperature = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), torch.tensor(0.5)
    log_prob2 = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    given = nets, r, torch.zeros(2, 1), terminal, torch.zeros(2, 2, 1), log_prob2, temperature
    assert_close(target_value(*given, Args(gamma=0.9)), torch.tensor([1 + 0.9 * 3, 2.0]))
    y = target_value(*given, Args(gamma=0.9, backup_entropy=True))
    assert_close(y, torch.tensor([1 + 0.9 * (3 - 0.5 * 20), 2.0]))


def test_multiplier_starts_at_e_and_ends_at_a_million(tiny_data):
    nets = Nets(tiny_data(), Args())
    assert_close(nets.multiplier().item(), math.e)
    nets.log_multiplier.data.fill_(50.0)
    assert nets.multiplier() == 1e6


# ---- SAC and the warm start, written again with torch.nn and torch.distributions --------------


def test_dequantization_is_of_the_warm_start(data):
    """An action at its bound is spread over the band before its likelihood is taken; without a warm
    start nothing is drawn for it (Inject fails on a draw that is not queued)."""
    nets, args = make(data, dequantize=0.05)
    data.action[3] = torch.tensor([1.0, -1.0])
    opt, noise = optimizers(nets, SGD, 0.0), draw_noise(args)
    step(nets, opt, data, args, noise)
    spread = torch.full((B, ACT), 0.4).double()
    found = step(nets, opt, data, args, noise, warm=True, dequantize=[spread])
    data.action[3] = torch.tensor([0.98, -0.98], dtype=torch.float64)  # 1 - 0.05 * 0.4
    plain = step(nets, opt, data, make(data)[1], noise, warm=True)
    assert_close(found["pi_loss"], plain["pi_loss"])


# ---- networks, training ----------------------------------------------------------------------


def test_initial_networks(tiny_data):
    torch.manual_seed(0)
    nets = Nets(tiny_data(obs_dim=3, act_dim=2), Args())
    hidden = [(256, 256)] * 2
    assert [tuple(w.shape) for w in nets.actor.weights] == [(3, 256), *hidden, (256, 4)]
    assert [tuple(w.shape[1:]) for w in nets.q.weights] == [(5, 256), *hidden, (256, 1)]
    assert len(nets.q.weights[0]) == 2 and not torch.equal(*nets.q.weights[1])
    for w in nets.q.weights[1]:
        assert_close(w @ w.T, 2 * torch.eye(256), atol=1e-4, rtol=0)
    assert_close(nets.q.weights[-1].norm(dim=1).flatten(), torch.full((2,), 0.01))
    assert 0 < nets.actor.weights[-1].abs().max() < 0.01 * math.sqrt(6 / 260) + 1e-9
    assert not nets.actor.biases[-1].any() and nets.actor.biases[0].any()
    mean, log_std = nets.pi(torch.randn(9, 3))
    assert mean.abs().max() < 0.05 and (log_std + 1).abs().max() < 0.05
    assert nets.log_temperature == 0


def train(data, **values):
    """The rows of train.csv after a short training, and the run."""
    torch.manual_seed(0)
    run = PlainRun()
    cql.train(run, data, Args(**{"steps": 4, "batch_size": 8, "n_actions": 2} | values))
    return run.phases["train"], run


def test_warm_steps_come_first(tiny_data):
    """Runs of the same seed differ where one has left the warm start: in the actor's loss first."""
    none, two, four = (train(tiny_data(), warm_start=n)[0] for n in (0, 2, 4))
    assert none[0]["pi_loss"] != two[0]["pi_loss"]
    assert two[:2] == four[:2]
    assert two[2]["pi_loss"] != four[2]["pi_loss"]
    assert {k for k in two[2] if two[2][k] != four[2][k]} == {"pi_loss"}


@pytest.mark.parametrize("normalize", [True, False])
def test_training_sees_scaled_rewards_and_observations(tiny_data, normalize):
    data = tiny_data()
    obs, reward = data.obs.clone(), data.reward.clone()
    _, run = train(data, normalize_obs=normalize, reward_scale=10.0, reward_shift=-5.0)
    scaled = (obs - obs.mean(0)) / (obs.std(0, correction=0) + 1e-3)
    assert_close(data.obs, scaled if normalize else obs)
    assert_close(data.reward, 10 * reward - 5)
    largest = 100 * (10 * reward - 5).abs().max().item()
    assert run.largest == pytest.approx(dict.fromkeys(("q_data", "q_pi", "target"), largest))


# ---- behavior --------------------------------------------------------------------------------
