"""cql.py: the regularizers against integrals and tables, the targets, SAC."""

import copy
import math
from fnmatch import fnmatchcase
from types import SimpleNamespace

import cql
import pytest
import torch
import torch.distributions as D
from cql import Args, Nets, conservative_diff, multiplier_loss, proposals, target_value
from golden.tools import Inject
from oracles import SGD, assert_same, in_double, rows, stack
from stand_in import PlainRun
from torch import nn
from torch.testing import assert_close

from common import Adam, Data, orthogonal_

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


def squashed(mean, log_std):
    """torch's own distribution of an action."""
    normal = D.TransformedDistribution(D.Normal(mean, log_std.exp()), D.TanhTransform())
    return D.Independent(normal, 1)


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


def test_gradient_of_the_log_sum_exp_is_a_softmax():
    torch.manual_seed(0)
    q_data, q = torch.randn(2, 4).requires_grad_(), torch.randn(2, 4, 9).requires_grad_()
    log_density = torch.randn(4, 9)
    diff = conservative_diff(q_data, q, log_density, Args())
    by_data, by_other = torch.autograd.grad(diff.sum(), (q_data, q))
    weights = q.detach().exp() / log_density.exp()
    assert_close(by_other, weights / weights.sum(2, keepdim=True) / 4)
    assert_close(by_data, torch.full((2, 4), -1 / 4))
    assert_close(by_other.sum(2), -by_data)  # a constant added to Q changes nothing


def test_basic_form_by_hand():
    """Rows (1, 2, 6) - 4 = -1 and (0, 0, -3) - 2 = -3; the second critic is three times as much."""
    q, args = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, -3.0]]), Args(regularizer="basic")
    q_data, nothing = torch.tensor([4.0, 2.0]), torch.tensor(math.nan)
    both = torch.stack([q_data, 3 * q_data]), torch.stack([q, 3 * q])
    assert_close(conservative_diff(*both, nothing, args), torch.tensor([-2.0, -6.0]))
    floor = Args(regularizer="basic", diff_floor=-2.0)  # rows -1 and -2; -2 and -2
    assert_close(conservative_diff(*both, nothing, floor), torch.tensor([-1.5, -2.0]))


def test_floor_is_one_of_rows_and_stops_their_gradient():
    q_data, q = torch.tensor([[300.0, 1.0]]).requires_grad_(), torch.zeros(1, 2, 1).requires_grad_()
    diff = conservative_diff(q_data, q, torch.zeros(2, 1), Args(diff_floor=-200.0))
    assert_close(diff, torch.tensor([-100.5]))
    by_data, by_other = torch.autograd.grad(diff.sum(), (q_data, q))
    assert by_data.tolist() == [[0, -0.5]] and by_other.flatten().tolist() == [0, 0.5]


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


def test_proposals_are_uniform_then_next_then_current():
    torch.manual_seed(0)
    n, args = 500, Args(n_actions=500)
    pi, pi2 = policies(1.0, -1.5, 4, ACT), policies(-1.0, -2.0, 4, ACT)
    pi[0].requires_grad_()
    with torch.no_grad():
        a, log_density = proposals(pi, pi2, torch.zeros(4, ACT).double(), args)
    assert a.shape == (4, 3 * n, ACT) and log_density.shape == (4, 3 * n)
    uniform, following, current = a.split(n, 1)
    assert -1 <= uniform.min() < -0.99 and 0.99 < uniform.max() <= 1
    assert abs(uniform.mean()) < 0.05 and abs(uniform.std() - 1 / math.sqrt(3)) < 0.02
    for part, (mean, log_std) in ((following, pi2), (current, pi)):
        x = part.atanh()
        assert_close(x.mean((0, 1)), mean[0].detach(), atol=0.03, rtol=0)
        assert_close(x.std((0, 1)), log_std[0].exp(), atol=0.02, rtol=0)
    assert (log_density[:, :n] == -2 * LOG2).all()
    for i, part, p in ((1, following, pi2), (2, current, pi)):
        mean, log_std = (x.detach()[:, None] for x in p)
        expected = squashed(mean, log_std).log_prob(part)
        assert_close(log_density[:, i * n : (i + 1) * n], expected)
    basic, _ = proposals(None, None, torch.zeros(4, ACT), Args(regularizer="basic"))
    assert basic.shape == (4, 10, ACT) and basic.min() < -0.5


def test_values_belong_to_their_state_and_action(data):
    nets, _ = make(data)
    actions = torch.rand(B, 4, ACT).double()
    q = cql.q_values(nets.q, data.obs, actions)
    for i in range(2):
        for j in range(4):
            expected = stack(nets.q, i)(torch.cat([data.obs, actions[:, j]], -1))[:, 0]
            assert_close(q[i, :, j], expected)


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


@pytest.mark.parametrize(
    ("diff", "direction"), [([0.9, 0.9], 1), ([0.7, 0.7], -1), ([0.0, 2.0], 1)]
)
def test_multiplier_grows_above_the_gap(diff, direction):
    """The gap is subtracted from D, not from weight D, and D is the critics' mean."""
    log_m, args = nn.Parameter(torch.tensor(0.3)), Args(weight=5.0, gap=0.8)
    diff = torch.tensor(diff)
    loss = multiplier_loss(log_m.exp(), diff, args)
    (grad,) = torch.autograd.grad(loss, log_m)
    assert_close(grad, -math.exp(0.3) * 5 * (diff.mean() - 0.8))
    Adam([log_m], 0.01).step([grad])
    assert (log_m - 0.3).sign() == direction
    authors = log_m.detach().exp() * (5 * diff - 4.0).mean()  # their threshold is weight gap
    assert_close(-multiplier_loss(log_m.exp(), diff, args).detach(), authors)


def test_multiplier_starts_at_e_and_ends_at_a_million(tiny_data):
    nets = Nets(tiny_data(), Args())
    assert_close(nets.multiplier().item(), math.e)
    nets.log_multiplier.data.fill_(50.0)
    assert nets.multiplier() == 1e6


@pytest.mark.parametrize(("entropy", "direction"), [(-2.5, 1), (-1.5, -1)])
def test_temperature_rises_below_its_target(entropy, direction):
    """The target is -A = -2, and the gradient in the logarithm is entropy + A. The form of SAC's
    paper, which multiplies the temperature, has that gradient times the temperature."""
    log_t = nn.Parameter(torch.tensor(0.7))
    (grad,) = torch.autograd.grad(cql.temperature_loss(log_t, torch.tensor(entropy), 2), log_t)
    assert_close(grad, torch.tensor(entropy + 2))
    assert -grad.sign() == direction
    (other,) = torch.autograd.grad(log_t.exp() * (entropy + 2), log_t)
    assert_close(other, math.exp(0.7) * grad)


# ---- SAC and the warm start, written again with torch.nn and torch.distributions --------------


class Oracle:
    """The same weights as plain stacks, with plain gradient steps."""

    def __init__(self, nets):
        self.q = [stack(nets.q, i) for i in range(2)]
        self.q_target = [stack(nets.q_target, i) for i in range(2)]
        self.actor = stack(nets.actor)
        self.scale = nets.log_std_scale.detach().clone().requires_grad_()
        self.shift = nets.log_std_shift.detach().clone().requires_grad_()
        self.log_t = nets.log_temperature.item()
        self.log_m = nets.log_multiplier.item()

    def pi(self, s):
        mean, out = self.actor(s).chunk(2, -1)
        return squashed(mean, (self.scale * out + self.shift).clamp(-20, 2))

    def act(self, s, noise):
        """Action and its log-density, for noise (B, A)."""
        normal = self.pi(s).base_dist.base_dist
        a = (normal.loc + normal.scale * noise).tanh()
        return a, self.pi(s).log_prob(a)

    def values(self, nets, s, a):
        return [net(torch.cat([s, a], -1)).squeeze(-1) for net in nets]

    def least(self, nets, s, a):
        return torch.minimum(*self.values(nets, s, a))

    def descend(self, loss, params, lr):
        params = list(params)
        for p, g in zip(params, torch.autograd.grad(loss, params)):
            p.data -= lr * g

    def descend_actor(self, loss, lr):
        self.descend(loss, [*self.actor.parameters(), self.scale, self.shift], lr)

    def finish(self, q_loss, pi_loss, log_prob, lr, rate):
        """All steps but the multiplier's, after all losses."""
        self.descend_actor(pi_loss, lr)
        self.descend(q_loss, [p for q in self.q for p in q.parameters()], lr)
        self.log_t -= lr * (ACT - log_prob.mean().item())
        for online, target in zip(self.q, self.q_target):
            for p, t in zip(online.parameters(), target.parameters()):
                t.data = rate * p.data + (1 - rate) * t.data

    def check(self, nets):
        assert_same(nets.q, *self.q)
        assert_same(nets.q_target, *self.q_target)
        assert_same(nets.actor, self.actor)
        assert_close(nets.log_std_scale, self.scale)
        assert_close(nets.log_std_shift, self.shift)
        assert abs(nets.log_temperature.item() - self.log_t) < 1e-9
        assert abs(nets.log_multiplier.item() - self.log_m) < 1e-9
        assert all(p.grad is None for p in nets.parameters())


def test_metrics_of_an_update(data):
    """Mean values of the data's actions and of each kind of proposal; the networks stay."""
    nets, args = make(data)
    oracle, noise = Oracle(nets), draw_noise(args)
    metrics = step(nets, optimizers(nets, SGD, 0.0), data, args, noise)
    at = {"q_next": ("next", data.next_obs), "q_pi": ("now", data.obs)}
    actions = {"q_uniform": 2 * noise["uniform"] - 1, "q_data": data.action.unsqueeze(1)}
    for name, (key, s) in at.items():
        actions[name] = torch.stack([oracle.act(s, z)[0] for z in noise[key].unbind(1)], 1)
    for name, a in actions.items():
        assert_close(metrics[name], cql.q_values(nets.q, data.obs, a).mean().detach())


def test_weight_zero_is_sac(data):
    """Three plain SAC steps on the same noise."""
    nets, args = make(data, weight=0.0, polyak=0.1)
    opt, oracle = optimizers(nets, SGD, 0.02), Oracle(nets)
    s, a, r, s2, terminal = rows(data)
    for seed in range(3):
        noise = draw_noise(args, seed)
        step(nets, opt, data, args, noise)
        a_pi, log_prob = oracle.act(s, noise["pi"])
        with torch.no_grad():
            a2, _ = oracle.act(s2, noise["target"][:, 0])
            y = r + 0.99 * (1 - terminal) * oracle.least(oracle.q_target, s2, a2)
        q_loss = sum(nn.functional.mse_loss(q, y) for q in oracle.values(oracle.q, s, a))
        pi_loss = math.exp(oracle.log_t) * log_prob - oracle.least(oracle.q, s, a_pi)
        oracle.finish(q_loss, pi_loss.mean(), log_prob, lr=0.02, rate=0.1)
        oracle.check(nets)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_warm_start_climbs_the_likelihood(data, temperature):
    """The actor's gradient is that of torch's own log-density at the data's actions, which are held
    .001 from the bounds, and of the entropy; critics learn as ever."""
    nets, args = make(data)
    nets.log_temperature.data.fill_(math.log(temperature) if temperature else -math.inf)
    data.action[3] = torch.tensor([1.0, -1.0])
    oracle, before, noise = Oracle(nets), copy.deepcopy(nets.q), draw_noise(args)
    metrics = step(nets, optimizers(nets, SGD, 0.02), data, args, noise, warm=True)
    _, log_prob = oracle.act(data.obs, noise["pi"])
    likelihood = oracle.pi(data.obs).log_prob(data.action.clamp(-0.999, 0.999))
    loss = (temperature * log_prob - likelihood).mean()
    assert_close(metrics["pi_loss"], loss.detach())
    oracle.descend_actor(loss, 0.02)
    assert_same(nets.actor, oracle.actor)
    assert_close(nets.log_std_scale, oracle.scale)
    assert all(not torch.equal(p, q) for p, q in zip(nets.q.parameters(), before.parameters()))


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


@pytest.mark.parametrize(("value", "clamped"), [(50.0, 2.0), (-50.0, -20.0)])
def test_log_std_is_scaled_shifted_and_clamped(data, value, clamped):
    nets, _ = make(data)
    mean, log_std = nets.pi(data.obs)
    out = stack(nets.actor)(data.obs)
    assert_close(mean, out[:, :2])
    assert_close(log_std, 0.7 * out[:, 2:] - 1)
    nets.actor.biases[-1].data.fill_(value)
    assert (nets.pi(data.obs)[1] == clamped).all()


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


def test_note_on_actions_at_their_bounds(tiny_data, capsys):
    """Only where their likelihood is taken as it is: in a warm start without dequantization."""
    for values in (dict(), dict(warm_start=1, dequantize=0.05), dict(warm_start=1)):
        data = tiny_data()
        data.action[:3] = 1.0
        assert capsys.readouterr().out == ""
        train(data, **values)
    assert "25% of the action numbers" in capsys.readouterr().out


def test_learning_rates(tiny_data):
    _, run = train(tiny_data(), lr=3e-3, actor_lr=2e-3)
    rates = {name: adam.lr.item() for name, adam in vars(run.opt).items()}
    expected = {"q": 3e-3, "multiplier": 3e-3, "actor": 2e-3, "temperature": 2e-3}
    assert rates == pytest.approx(expected)


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


def preset(env):
    """Args with the rows of PRESETS that match `env`; later rows win."""
    values = {}
    for pattern, row in cql.PRESETS.items():
        if fnmatchcase(env, pattern):
            values |= row
    return Args(**values)


def test_presets_of_the_domains():
    for env in ("antmaze-umaze-v2", "D4RL/antmaze/umaze-v1", "D4RL/pointmaze/medium-v2"):
        args = preset(env)
        assert (args.lagrange, args.gap, args.weight, args.max_backup) == (True, 0.8, 5.0, True)
        assert (args.actor_lr, args.lr, args.diff_floor) == (1e-4, 3e-4, -200.0)
        assert (args.reward_scale, args.reward_shift, args.normalize_obs) == (10.0, -5.0, False)
        assert (args.eval_every == 100_000) == ("antmaze" in env)
    for env in ("D4RL/pointmaze/umaze-dense-v2", "hopper-medium-v2", "mujoco/hopper/medium-v0"):
        assert preset(env) == Args()
    for env in ("pen-human-v1", "D4RL/door/human-v2", "kitchen-mixed-v0"):
        assert preset(env) == Args(weight=1.0, actor_lr=1e-4)
    assert preset("maze2d-umaze-v1") == Args(lagrange=True, gap=5.0)


# ---- behavior --------------------------------------------------------------------------------


def play(weight):
    """Action and Q of a bandit: data near -0.5 and 0.3, reward 10 a, rising beyond it."""
    torch.manual_seed(0)
    n = 400
    a = torch.where(torch.rand(n) < 0.5, -0.5, 0.3) + 0.05 * torch.randn(n).clamp(-2, 2)
    s = torch.ones(n, 1)
    data = Data(s, a[:, None], 10 * a, s, torch.ones(n))
    args = Args(weight=weight, batch_size=32, n_actions=2)
    nets = Nets(data, args)
    opt = optimizers(nets, Adam, 2e-3)
    for _ in range(200):
        metrics = cql.update(nets, opt, data, args, False)
        assert all(x.isfinite() for x in metrics.values())
    grid = torch.tensor([[-0.5], [0.3], [0.95]])
    return cql.policy(nets, s[:1], args).item(), nets.q(torch.ones(3, 1), grid).amin(0).tolist()


def test_bandit_takes_the_best_action_of_the_data():
    """Conservative critics rate what lies beyond the data below the data's best; SAC's do not."""
    action, (low, best, beyond) = play(weight=5.0)
    assert 0.1 < action < 0.5 and best > low and best > beyond + 1
    action, (low, best, beyond) = play(weight=0.0)
    assert action > 0.6 and beyond > best
