"""cql.py: the regularizers against integrals and tables, the targets, one whole step, SAC."""

import copy
import math
from types import SimpleNamespace

import cql
import pytest
import torch
import torch.distributions as D
from cql import Args, Nets, conservative_diff, multiplier_loss, proposals, target_value
from oracles import SGD, assert_same, in_double, rows, stack
from torch import nn
from torch.testing import assert_close

from common import Adam, orthogonal_

LOG2 = math.log(2)


def optimizers(nets, optimizer, lr):
    params = {"actor": nets.pi_parameters(), "temperature": [nets.log_temperature]}
    params |= {"q": nets.q.parameters(), "multiplier": [nets.log_multiplier]}
    return SimpleNamespace(**{k: optimizer(p, lr) for k, p in params.items()})


@pytest.fixture
def data(tiny_data):
    """Two action dimensions, everything in float64."""
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def make(data, **values):
    """Networks in float64 with outputs of size one, and targets that differ."""
    args = Args(**{"batch_size": 16, "n_actions": 3} | values)
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


@pytest.fixture
def whole_batch(monkeypatch):
    """Every batch is the whole dataset, in order."""
    monkeypatch.setattr(cql, "sample", lambda data, n: list(rows(data)))


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
    n, act_dim, args = 500, 2, Args(n_actions=500)
    pi, pi2 = policies(1.0, -1.5, 4, act_dim), policies(-1.0, -2.0, 4, act_dim)
    pi[0].requires_grad_()
    with torch.no_grad():
        a, log_density = proposals(pi, pi2, torch.zeros(4, act_dim).double(), args)
    assert a.shape == (4, 3 * n, act_dim) and log_density.shape == (4, 3 * n)
    uniform, following, current = a.split(n, 1)
    assert -1 <= uniform.min() < -0.99 and 0.99 < uniform.max() <= 1
    assert abs(uniform.mean()) < 0.05 and abs(uniform.std() - 1 / math.sqrt(3)) < 0.02
    for part, (mean, log_std) in ((following, pi2), (current, pi)):
        x = part.atanh()
        assert_close(x.mean((0, 1)), mean[0].detach(), atol=0.03, rtol=0)
        assert_close(x.std((0, 1)), log_std[0].exp(), atol=0.02, rtol=0)
    expected = [squashed(*(x[:, None] for x in p)).log_prob(part) for p, part in
                ((pi2, following), (pi, current))]  # fmt: skip
    assert_close(log_density[:, n:], torch.cat(expected, 1).detach())
    assert (log_density[:, :n] == -2 * LOG2).all()
    basic, _ = proposals(None, None, torch.zeros(4, 2), Args(regularizer="basic"))
    assert basic.shape == (4, 10, 2) and basic.min() < -0.5


def test_values_belong_to_their_state_and_action(data):
    nets, _ = make(data)
    actions = torch.rand(16, 4, 2).double()
    q = cql.q_values(nets.q, data.obs, actions)
    for i in range(2):
        for j in range(4):
            expected = stack(nets.q, i)(torch.cat([data.obs, actions[:, j]], -1))[:, 0]
            assert_close(q[i, :, j], expected)


def test_next_actions_are_of_s2_but_scored_at_s(data, monkeypatch, whole_batch):
    nets, args = make(data)
    nets.log_std_shift.data.fill_(-18)  # draws are means
    means = {
        k: nets.pi(x)[0].detach().tanh()[:, None]
        for k, x in (("s", data.obs), ("s2", data.next_obs))
    }
    calls, original = [], cql.q_values

    def record(q, s, actions):
        calls.append((q, s, actions))
        return original(q, s, actions)

    monkeypatch.setattr(cql, "q_values", record)
    cql.update(nets, optimizers(nets, SGD, 0.0), data, args, False)
    (target, s2, a2), (online, s, actions) = calls
    assert target is nets.q_target and s2 is data.next_obs and online is nets.q and s is data.obs
    near = dict(atol=1e-5, rtol=0)
    assert_close(a2, means["s2"], **near)
    assert torch.equal(actions[:, 0], data.action)
    assert_close(actions[:, 4:7], means["s2"].expand(-1, 3, -1), **near)
    assert_close(actions[:, 7:], means["s"].expand(-1, 3, -1), **near)


# ---- target, multiplier, temperature ---------------------------------------------------------


def test_target_by_hand(monkeypatch):
    """Two critics at two next actions: (1, 8), (5, 3) in the first row, so the maximum of minima is
    3, the minimum of maxima 5; the second row is a terminal."""
    q2 = torch.tensor([[[1.0, 5.0], [9.0, 9.0]], [[8.0, 3.0], [9.0, 9.0]]])
    monkeypatch.setattr(cql, "q_values", lambda q, s, a: q2)
    nets, log_prob2 = SimpleNamespace(q_target=None), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    r, terminal, temperature = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), torch.tensor(0.5)
    given = nets, None, r, terminal, None, log_prob2, temperature
    assert_close(target_value(*given, Args(gamma=0.9)), torch.tensor([1 + 0.9 * 3, 2.0]))
    y = target_value(*given, Args(gamma=0.9, backup_entropy=True))
    assert_close(y, torch.tensor([1 + 0.9 * (3 - 0.5 * 20), 2.0]))


@pytest.mark.parametrize("max_backup", [False, True])
def test_number_of_next_actions_in_the_target(data, monkeypatch, whole_batch, max_backup):
    nets, args = make(data, max_backup=max_backup)
    seen = []

    def target(nets, s2, r, terminal, a2, *_):
        seen.append(a2.shape)
        return r

    monkeypatch.setattr(cql, "target_value", target)
    cql.update(nets, optimizers(nets, SGD, 0.0), data, args, False)
    assert seen == [(16, 3 if max_backup else 1, 2)]


@pytest.mark.parametrize(
    ("diff", "direction"), [([0.9, 0.9], 1), ([0.7, 0.7], -1), ([0.0, 2.0], 1)]
)
def test_multiplier_grows_above_the_gap(diff, direction):
    """The gap is subtracted from D, not from weight D, and D is the critics' mean."""
    log_m, args = nn.Parameter(torch.tensor(0.3)), Args(weight=5.0, gap=0.8)
    diff = torch.tensor(diff).requires_grad_()
    loss = multiplier_loss(log_m.exp(), diff, args)
    by_m, by_diff = torch.autograd.grad(loss, (log_m, diff), allow_unused=True)
    assert by_diff is None
    assert_close(by_m, -math.exp(0.3) * 5 * (diff.detach().mean() - 0.8))
    Adam([log_m], 0.01).step([by_m])
    assert (log_m - 0.3).sign() == direction
    authors = log_m.detach().exp() * (5 * diff.detach() - 4.0).mean()  # threshold = weight gap
    assert_close(-multiplier_loss(log_m.exp(), diff, args).detach(), authors)


def test_multiplier_starts_at_e_and_ends_at_a_million(tiny_data):
    nets = Nets(tiny_data(), Args())
    assert_close(nets.multiplier().item(), math.e)
    nets.log_multiplier.data.fill_(50.0)
    assert nets.multiplier() == 1e6


@pytest.mark.parametrize(("entropy", "direction"), [(-2.5, 1), (-1.5, -1)])
def test_temperature_rises_below_its_target(entropy, direction):
    """The target is -A = -2; the gradient in the logarithm is -(entropy + A) downwards."""
    log_t = nn.Parameter(torch.tensor(0.7))
    loss = cql.temperature_loss(log_t, torch.tensor(entropy), 2)
    (grad,) = torch.autograd.grad(loss, log_t)
    assert_close(grad, torch.tensor(entropy + 2))
    assert -grad.sign() == direction


# ---- whole steps, written again with torch.nn, torch.optim and torch.distributions ------------


class Draws:
    """Stands where torch.randn_like and rand_like do, and keeps what they gave."""

    def __init__(self, monkeypatch):
        self.kept = []
        for name in ("randn_like", "rand_like"):
            draw = getattr(torch, name)
            monkeypatch.setattr(torch, name, lambda x, draw=draw: self.keep(draw(x)))

    def keep(self, noise):
        self.kept.append(noise)
        return noise


class Oracle:
    """The same weights as plain stacks, and SAC's losses on them."""

    def __init__(self, nets):
        self.q = [stack(nets.q, i) for i in range(2)]
        self.q_target = [stack(nets.q_target, i) for i in range(2)]
        self.actor = stack(nets.actor)
        own = (nets.log_std_scale, nets.log_std_shift, nets.log_temperature, nets.log_multiplier)
        self.scale, self.shift, self.log_t, self.log_m = (x.detach().clone() for x in own)
        self.scale.requires_grad_(), self.shift.requires_grad_()

    def pi(self, s):
        out = self.actor(s)
        return squashed(out[:, :2], (self.scale * out[:, 2:] + self.shift).clamp(-20, 2))

    def act(self, s, noise):
        """Action and its log-density, for noise (B, A)."""
        normal = self.pi(s).base_dist.base_dist
        a = (normal.loc + normal.scale * noise).tanh()
        return a, self.pi(s).log_prob(a)

    def values(self, nets, s, a):
        return [net(torch.cat([s, a], -1)).squeeze(-1) for net in nets]

    def minimize(self, loss, params, lr):
        params = list(params)
        for p, g in zip(params, torch.autograd.grad(loss, params)):
            p.data -= lr * g

    def finish(self, q_loss, actor_loss, log_prob, lr, rate):
        """All steps, after all losses."""
        self.minimize(actor_loss, [*self.actor.parameters(), self.scale, self.shift], lr)
        self.minimize(q_loss, [p for q in self.q for p in q.parameters()], lr)
        self.log_t -= lr * (2 - log_prob.mean().item())
        for online, target in zip(self.q, self.q_target):
            for p, t in zip(online.parameters(), target.parameters()):
                t.data = rate * p.data + (1 - rate) * t.data

    def check(self, nets):
        assert_same(nets.q, *self.q)
        assert_same(nets.q_target, *self.q_target)
        assert_same(nets.actor, self.actor)
        assert_close(nets.log_std_scale, self.scale)
        assert_close(nets.log_std_shift, self.shift)
        assert_close(nets.log_temperature.detach(), self.log_t)
        assert_close(nets.log_multiplier.detach(), self.log_m)
        assert all(p.grad is None for p in nets.parameters())


CASES = {
    "default": {},
    "basic": dict(regularizer="basic"),
    "maze": dict(lagrange=True, gap=0.8, max_backup=True, diff_floor=3.3),
    "entropy": dict(backup_entropy=True),
    "max-entropy": dict(backup_entropy=True, max_backup=True),
    "basic-lagrange": dict(regularizer="basic", lagrange=True, gap=-0.1),
}


@pytest.mark.parametrize("case", CASES)
def test_step_by_hand(data, monkeypatch, whole_batch, case):
    nets, args = make(data, weight=2.0, polyak=0.1, gamma=0.9, **CASES[case])
    opt, oracle, draws = optimizers(nets, SGD, 0.02), Oracle(nets), Draws(monkeypatch)
    metrics = cql.update(nets, opt, data, args, False)

    s, a, r, s2, terminal = rows(data)
    left, temperature = iter(draws.kept), math.exp(-0.3)
    a_pi, log_prob = oracle.act(s, next(left))
    actor_loss = (temperature * log_prob - torch.minimum(*oracle.values(oracle.q, s, a_pi))).mean()
    others = [(2 * u - 1, torch.full((16,), 0.25).double().log()) for u in next(left).unbind(1)]
    with torch.no_grad():
        for state in [] if args.regularizer == "basic" else [s2, s]:
            others += [oracle.act(state, noise) for noise in next(left).unbind(1)]
        following = [oracle.act(s2, noise) for noise in next(left).unbind(1)]
        assert next(left, None) is None
        q2 = [torch.minimum(*oracle.values(oracle.q_target, s2, x)) for x, _ in following]
        y = torch.empty_like(r)
        for i in range(16):
            value, best = max((q2[j][i].item(), j) for j in range(len(q2)))
            if args.backup_entropy:
                value -= temperature * following[best][1][i].item()
            y[i] = r[i] + 0.9 * value if terminal[i] == 0 else r[i]
    td_loss, diffs = 0, []
    for q in oracle.q:
        q_data = oracle.values([q], s, a)[0]
        at = [oracle.values([q], s, x)[0] for x, _ in others]
        if args.regularizer == "basic":
            high = sum(at) / len(at)
        else:
            high = sum((v - lp).exp() for v, (_, lp) in zip(at, others)).log()
        td_loss = td_loss + nn.functional.mse_loss(q_data, y)
        diff = high - q_data
        diffs.append((diff if args.diff_floor is None else diff.clamp(min=3.3)).mean())
    if case == "maze":  # the floor holds some rows and not others
        assert 0 < (diff <= 3.3).sum() < 16
    m = math.exp(0.4) if args.lagrange else 1.0
    q_loss = td_loss + m * 2.0 * sum(diffs)
    diff = sum(diffs).item() / 2
    oracle.finish(q_loss, actor_loss, log_prob, 0.02, 0.1)
    if args.lagrange:
        oracle.log_m += 0.02 * m * 2.0 * (diff - args.gap)
    oracle.check(nets)

    expected = {"td_loss": td_loss, "actor_loss": actor_loss, "diff": sum(diffs) / 2}
    expected |= {"target": y.mean(), "entropy": -log_prob.mean(), "multiplier": m}
    expected |= {"temperature": temperature, "q_data": None, "q_uniform": None}
    if args.regularizer == "h":
        expected |= {"q_next": None, "q_pi": None}
    if not args.lagrange:
        del expected["multiplier"]
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].ndim == 0 and not metrics[name].requires_grad
        if value is not None:
            assert_close(metrics[name], torch.as_tensor(value).detach().double())


def test_metrics_of_q_are_of_their_samplers(data, monkeypatch, whole_batch):
    nets, args = make(data)
    parts = torch.tensor([1.0, *[2.0] * 3, *[3.0] * 3, *[4.0] * 3]).double()

    def q_values(q, s, actions):
        weight = nets.q.weights[0].sum() * 0 + 1
        return (
            (parts * weight).expand(2, 16, 10) if actions.shape[1] == 10 else torch.zeros(2, 16, 1)
        )

    monkeypatch.setattr(cql, "q_values", q_values)
    monkeypatch.setattr(cql, "minimize", lambda opt, loss: loss.detach())
    metrics = cql.update(nets, optimizers(nets, SGD, 0.0), data, args, False)
    found = [metrics[k].item() for k in ("q_data", "q_uniform", "q_next", "q_pi")]
    assert found == [1, 2, 3, 4]


def test_weight_zero_is_sac(data, monkeypatch, whole_batch):
    """Three plain SAC steps on the same noise."""
    nets, args = make(data, weight=0.0, polyak=0.1)
    opt, oracle, draws = optimizers(nets, SGD, 0.02), Oracle(nets), Draws(monkeypatch)
    s, a, r, s2, terminal = rows(data)
    for _ in range(3):
        draws.kept.clear()
        cql.update(nets, opt, data, args, False)
        temperature = oracle.log_t.exp().item()
        a_pi, log_prob = oracle.act(s, draws.kept[0])
        with torch.no_grad():
            a2, _ = oracle.act(s2, draws.kept[-1][:, 0])
            y = r + 0.99 * (1 - terminal) * torch.minimum(*oracle.values(oracle.q_target, s2, a2))
        q_loss = sum(nn.functional.mse_loss(q, y) for q in oracle.values(oracle.q, s, a))
        q_pi = torch.minimum(*oracle.values(oracle.q, s, a_pi))
        oracle.finish(q_loss, (temperature * log_prob - q_pi).mean(), log_prob, 0.02, 0.1)
        oracle.check(nets)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_warm_start_climbs_the_likelihood(data, monkeypatch, whole_batch, temperature):
    """The actor's gradient is that of torch's own log-density at the data's actions, which are held
    .001 from the bounds, and of the entropy; critics learn as ever."""
    nets, args = make(data)
    nets.log_temperature.data.fill_(math.log(temperature) if temperature else -math.inf)
    opt, oracle, draws = optimizers(nets, SGD, 0.02), Oracle(nets), Draws(monkeypatch)
    data.action[3] = torch.tensor([1.0, -1.0])
    before = copy.deepcopy(nets.q)
    metrics = cql.update(nets, opt, data, args, True)
    log_prob = oracle.act(data.obs, draws.kept[0])[1]
    likelihood = oracle.pi(data.obs).log_prob(data.action.clamp(-0.999, 0.999))
    loss = (temperature * log_prob - likelihood).mean()
    assert_close(metrics["actor_loss"], loss.detach())
    oracle.minimize(loss, [*oracle.actor.parameters(), oracle.scale, oracle.shift], 0.02)
    assert_same(nets.actor, oracle.actor)
    assert_close(nets.log_std_scale, oracle.scale)
    assert all(not torch.equal(p, q) for p, q in zip(nets.q.parameters(), before.parameters()))


def test_dequantization_is_of_the_warm_start(data, monkeypatch, whole_batch):
    seen = []
    monkeypatch.setattr(cql, "dequantize", lambda a, width: seen.append(width) or a)
    nets, args = make(data, dequantize=0.05)
    for warm in (False, True):
        cql.update(nets, optimizers(nets, SGD, 0.0), data, args, warm)
    assert seen == [0.05]


# ---- which parameters a loss reaches ----------------------------------------------------------


def test_no_step_moves_the_others(data, whole_batch):
    """With one learning rate above zero, an update moves that optimizer's parameters (and with the
    critics, their targets) and leaves all others to the bit."""
    owned = {
        "actor": {"actor", "log_std_scale", "log_std_shift"},
        "temperature": {"log_temperature"},
        "q": {"q", "q_target"},
        "multiplier": {"log_multiplier"},
    }
    for name, parts in owned.items():
        nets, args = make(data, lagrange=True)
        nets.q_target.load_state_dict(nets.q.state_dict())
        opt, before = optimizers(nets, SGD, 0.0), copy.deepcopy(nets)
        getattr(opt, name).lr = 0.1
        cql.update(nets, opt, data, args, False)
        pairs = zip(nets.named_parameters(), before.parameters())
        moved = {k.split(".")[0] for (k, p), q in pairs if not torch.equal(p, q)}
        assert moved == parts


def test_what_each_loss_may_see(data, monkeypatch, whole_batch):
    """Gradients of the losses with respect to everything: the actor's reaches the critics (and is
    not asked for there), the critics' never reaches the actor, nothing reaches a target."""
    nets, args = make(data, lagrange=True, backup_entropy=True)
    opt, found = optimizers(nets, SGD, 0.0), {}
    online = [(k, p) for k, p in nets.named_parameters() if p.requires_grad]

    def reach(opt_, loss):
        params = [p for _, p in online]
        grads = torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)
        name = next(k for k, o in vars(opt).items() if o is opt_)
        found[name] = {k.split(".")[0] for (k, _), g in zip(online, grads) if g is not None}
        return loss.detach()

    monkeypatch.setattr(cql, "minimize", reach)
    cql.update(nets, opt, data, args, False)
    actor = {"actor", "log_std_scale", "log_std_shift"}
    assert found == {
        "actor": actor | {"q"},
        "temperature": {"log_temperature"},
        "q": {"q"},
        "multiplier": {"log_multiplier"},
    }
    cql.update(nets, opt, data, args, True)
    assert found["actor"] == actor
    assert not any(p.requires_grad for p in nets.q_target.parameters())


# ---- networks, training ----------------------------------------------------------------------


def test_initial_networks(tiny_data):
    torch.manual_seed(0)
    nets = Nets(tiny_data(obs_dim=3, act_dim=2), Args())
    assert [tuple(w.shape) for w in nets.actor.weights] == [(3, 256), *[(256, 256)] * 2, (256, 4)]
    assert [w.shape[1] for w in nets.q.weights] == [5, 256, 256, 256] and len(
        nets.q.weights[0]
    ) == 2
    assert not torch.equal(*nets.q.weights[1])
    for w in nets.q.weights[1]:
        assert_close(w @ w.T, 2 * torch.eye(256), atol=1e-4, rtol=0)
    assert_close(nets.q.weights[-1].norm(dim=1).flatten(), torch.full((2,), 0.01))
    assert 0 < nets.actor.weights[-1].abs().max() < 0.01 * math.sqrt(6 / 260) + 1e-9
    assert not nets.actor.biases[-1].any() and nets.actor.biases[0].any()
    mean, log_std = nets.pi(torch.randn(9, 3))
    assert mean.abs().max() < 0.05 and (log_std + 1).abs().max() < 0.05
    for p, t in zip(nets.q.parameters(), nets.q_target.parameters()):
        assert torch.equal(p, t) and p is not t
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


def test_deterministic_action_is_the_squashed_mean(tiny_data):
    data, args = tiny_data(obs_dim=2, act_dim=1), Args()
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    data.action_low, data.action_high = torch.tensor([-2.0]), torch.tensor([6.0])
    nets, raw = Nets(data, args), 3 * torch.randn(5, 2)
    orthogonal_(nets.actor, 1.0, 3.0)
    mean = stack(nets.actor)((raw - data.obs_mean) / data.obs_std)[:, :1]
    a = cql.policy(nets, raw, args)
    assert_close(a, 2 + 4 * mean.tanh())
    assert torch.equal(cql.policy(nets, raw, args), a)


class FakeRun:
    """Counts steps and keeps what `start` was given."""

    def __init__(self, args):
        self.device, self.loop = torch.device("cpu"), lambda steps: range(1, steps + 1)

    def start(self, data, task, nets, opt):
        FakeRun.given = data, nets, opt

    def __getattr__(self, name):
        return lambda *_: None


@pytest.mark.parametrize("normalize", [True, False])
def test_train(tiny_data, monkeypatch, capsys, normalize):
    """Warm steps come first; learning rates; observations; the note on actions at their bounds."""
    data, warm = tiny_data(), []
    raw = data.obs.clone()
    data.action[:3] = 1.0
    monkeypatch.setattr(cql, "Run", FakeRun)
    monkeypatch.setattr(cql, "load_dataset", lambda *_: (data, None))
    monkeypatch.setattr(cql, "update", lambda *given: warm.append(given[-1]) or {})
    cql.train(Args(steps=5, warm_start=2, normalize_obs=normalize, lr=3e-3, actor_lr=2e-3))
    assert warm == [True, True, False, False, False]
    assert "25% of the action numbers" in capsys.readouterr().out
    rates = {k: o.lr.item() for k, o in vars(FakeRun.given[2]).items()}
    expected = {"q": 3e-3, "multiplier": 3e-3, "actor": 2e-3, "temperature": 2e-3}
    assert rates == pytest.approx(expected)
    if normalize:
        expected = (raw - raw.mean(0)) / (raw.std(0, correction=0) + 1e-3)
        assert_close(data.obs, expected)
    assert normalize or torch.equal(data.obs, raw)
    for quiet in (Args(steps=2), Args(steps=2, warm_start=1, dequantize=0.05)):
        warm.clear()
        cql.train(quiet)
        assert warm == [bool(quiet.warm_start), False] and capsys.readouterr().out == ""


def test_unknown_regularizer_is_one_line():
    with pytest.raises(cql.InputError, match="--regularizer is 'x': give h or basic") as caught:
        cql.train(Args(regularizer="x"))
    assert "\n" not in str(caught.value)


def test_presets_of_the_domains():
    from common import parse

    def of(env, *argv):
        return parse(Args, cql.PRESETS, ["--env", env, *argv])

    for env in ("antmaze-umaze-v2", "D4RL/antmaze/umaze-v1", "pointmaze/medium-v0"):
        args = of(env)
        assert (args.lagrange, args.gap, args.weight, args.max_backup) == (True, 0.8, 5.0, True)
        assert (args.actor_lr, args.lr, args.diff_floor) == (1e-4, 3e-4, -200.0)
        assert (args.reward_scale, args.reward_shift, args.normalize_obs) == (10.0, -5.0, False)
        assert (args.eval_every == 100_000) == ("antmaze" in env)
    dense = of("D4RL/pointmaze/umaze-dense-v2")
    assert (dense.lagrange, dense.reward_scale, dense.reward_shift) == (False, 1, 0)
    for env in ("pen-human-v1", "D4RL/door/human-v2", "kitchen-mixed-v0"):
        args = of(env)
        assert (args.weight, args.actor_lr, args.lagrange) == (1.0, 1e-4, False)
    assert (of("maze2d-umaze-v1").lagrange, of("maze2d-umaze-v1").gap) == (True, 5.0)
    args = of("hopper-medium-v2")
    assert (args.weight, args.actor_lr, args.lagrange, args.normalize_obs) == (
        10,
        3e-5,
        False,
        True,
    )
    assert of("antmaze-umaze-v2", "--diff-floor", "None").diff_floor is None
    assert of("hopper-medium-v2", "--warm-start", "4e4").warm_start == 40_000


# ---- behavior --------------------------------------------------------------------------------


def play(weight):
    """Action and Q of a bandit: data near -0.5 and 0.3, reward 10 a, rising beyond it."""
    torch.manual_seed(0)
    n, one = 400, torch.ones(1)
    a = torch.where(torch.rand(n) < 0.5, -0.5, 0.3) + 0.05 * torch.randn(n).clamp(-2, 2)
    s = torch.ones(n, 1)
    data = SimpleNamespace(obs=s, action=a[:, None], reward=10 * a, next_obs=s)
    data.terminal, data.obs_mean, data.obs_std = torch.ones(n), 0 * one, one
    data.action_low, data.action_high = -one, one
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
