"""itrpo.py: the shaped target on tabular problems (Theorem 1, Lemma 1), ratios, a bandit."""

import copy
import math
from types import SimpleNamespace

import itrpo
import pytest
import torch
import torch.distributions as D
from golden.tools import Inject
from itrpo import Args, Nets, gaussian_kl, log_ratio, pre_tanh, target_value, train, value
from oracles import SGD, in_double, rows
from stand_in import PlainRun
from torch import nn
from torch.testing import assert_close

from common import Adam, Data, InputError, ScalarMLP, orthogonal_
from run import parse

INF = math.inf
NAMES = ("kl_coef", "shape_coef", "bonus", "lam", "ratio_min", "ratio_max")


def resolved(**values):
    args = Args(**values)
    args.resolve()
    return args


def plain(alpha, tau, **more):
    """Eq. 5 alone, with these coefficients."""
    return resolved(setting="paper", kl_coef=alpha, shape_coef=tau, **more)


def parsed(*words):
    return parse(Args, itrpo.PRESETS, list(words))[0]


@pytest.fixture
def data(tiny_data):
    """Two action dimensions, everything in float64."""
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def make(data, **values):
    """Networks in float64 with outputs of size one, and copies that differ."""
    args = resolved(batch_size=16, **values)
    torch.manual_seed(0)
    nets = Nets(data, args)
    for net in (nets.behavior, nets.actor, nets.q, nets.q_target, nets.last_actor):
        orthogonal_(net, 1.0, 0.5)
    return nets.double(), args


def squashed(mean, log_std):
    return D.TransformedDistribution(D.Normal(mean, log_std.exp()), D.TanhTransform())


# ---- settings --------------------------------------------------------------------------------


def test_settings():
    paper, code, trust = (resolved(setting=s) for s in ("paper", "code", "trust"))
    values = [[getattr(args, name) for name in NAMES] for args in (paper, code, trust)]
    assert values[0] == [0.9, 0.03, 0.0, 0.0, -INF, INF]
    assert values[1] == [0.9, 0.03, 5.0, 0.1, -1.0, INF]
    assert values[2] == [0.9, 0.9, 5.0, 0.1, -1.0, INF]
    assert resolved() == code


@pytest.mark.parametrize("name", NAMES)
def test_typed_numbers_win_over_the_setting(name):
    """On data without a preset; a preset wins over the setting, too."""
    for setting in itrpo.SETTINGS:
        words = ("--env", "hopper-medium-v2", "--setting", setting)
        args = parsed(*words, f"--{name.replace('_', '-')}", "0.25")
        others = resolved(setting=setting)
        for other in NAMES:
            assert getattr(args, other) == (0.25 if other == name else getattr(others, other))
    assert parsed("--setting", "paper").kl_coef == 3.0


def test_clips_can_be_typed_as_infinite():
    args = parsed("--ratio-min", "-inf", "--ratio-max=inf", "--setting=trust")
    assert (args.ratio_min, args.ratio_max, args.shape_coef) == (-INF, INF, 0.9)


@pytest.mark.parametrize(
    "env", ["antmaze-umaze-v2", "D4RL/antmaze/umaze-v1", "pointmaze-stitch-demo"]
)
def test_mazes_have_no_bonus_unless_typed(env):
    args = parsed("--env", env, "--setting", "trust")
    assert (args.reward_shift, args.bonus, args.shape_coef) == (-1, 0, 0.9)
    assert parsed("--env", env, "--bonus", "2").bonus == 2


def test_control_is_the_unshaped_method_at_the_same_limit():
    args = resolved(setting="trust", kl_coef=2.0, control=True)
    assert_close(args.kl_coef, 2.0 * 0.1)
    assert args.shape_coef == 0 and args.bonus == 5
    again = copy.copy(args)
    again.resolve()
    assert again == args


def test_training_fills_in_what_was_not_given(tiny_data):
    args = Args(setting="trust", lam=0.0, control=True, bc_steps=1, steps=1, batch_size=4)
    run, data = PlainRun(), tiny_data()
    train(run, data, args)
    assert_close(args.kl_coef, 0.9 * 0.1)
    assert [getattr(args, name) for name in NAMES[1:]] == [0.0, 5.0, 0.0, -1.0, INF]
    largest = (data.reward.abs().max().item() + 5) * 100
    assert run.largest == pytest.approx({"q_data": largest, "target": largest})


@pytest.mark.parametrize("low, high", [(1.0, 0.0), (math.nan, INF), (0.0, math.nan)])
def test_clips_in_the_wrong_order_are_one_line(low, high):
    with pytest.raises(InputError, match=f"--ratio-min is {low} and --ratio-max is {high}: use"):
        resolved(ratio_min=low, ratio_max=high)


def test_clips_may_be_equal():
    assert resolved(ratio_min=1.0, ratio_max=1.0).ratio_min == 1.0


def test_tau_is_a_share(capsys):
    with pytest.raises(SystemExit):
        parsed("--shape-coef", "1.1")
    assert "--shape-coef" in capsys.readouterr().err


# ---- log-ratio and KL ------------------------------------------------------------------------


def gaussians(b, a, seed=0, dtype=torch.float64):
    """Two policies, means and log-stds (B, A)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4, b, a, generator=draw, dtype=dtype)
    return (x[0], 0.4 * x[1] - 0.5), (x[2], 0.4 * x[3] - 0.5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_log_ratio_is_a_difference_of_log_densities(dtype, tolerance):
    pi, behavior = gaussians(50, 3, dtype=dtype)
    a = torch.linspace(-0.999, 0.999, 150, dtype=dtype).view(50, 3)
    ratio = log_ratio(pre_tanh(a, Args()), pi, behavior)
    exact = [part.double() for part in (*pi, *behavior)]
    left, right = squashed(*exact[:2]), squashed(*exact[2:])
    expected = (left.log_prob(a.double()) - right.log_prob(a.double())).sum(-1)
    assert ratio.shape == (50,)
    assert_close(ratio.double(), expected, atol=tolerance, rtol=tolerance)
    x = torch.randn(7, 50, 3, dtype=dtype)
    assert_close(log_ratio(x, pi, behavior)[3], log_ratio(x[3], pi, behavior))


def test_log_ratio_is_finite_where_the_action_is_at_its_bound():
    pi, behavior = gaussians(4, 2, dtype=torch.float32)
    a = torch.tensor([[1.0, -1.0]]).expand(4, 2)
    assert_close(pre_tanh(a, Args(clip=1e-3)).tanh(), a * (1 - 1e-3))
    assert log_ratio(pre_tanh(a, Args()), pi, behavior).isfinite().all()
    torch.manual_seed(0)
    inner = torch.full((400, 1), 0.5)
    spread = pre_tanh(torch.cat([inner, inner * 2, -inner * 2], 1), Args(dequantize=0.1)).tanh()
    assert_close(spread[:, 0], inner[:, 0])
    for distance in (1 - spread[:, 1], 1 + spread[:, 2]):
        assert distance.min() > 0 and distance.max() < 0.1 and distance.std() > 0.02


def test_closed_form_kl():
    pi, behavior = gaussians(6, 3)
    normal = [D.Normal(mean, log_std.exp()) for mean, log_std in (pi, behavior)]
    kl = gaussian_kl(pi, behavior)
    assert_close(kl, D.kl_divergence(*normal).sum(-1))
    torch.manual_seed(0)
    x = itrpo.draw(pi, 100_000)
    assert x.shape == (100_000, 6, 3)
    assert_close(log_ratio(x, pi, behavior).mean(0), kl, rtol=0.01, atol=0)
    assert not gaussian_kl(pi, pi).any()


def test_networks_are_gaussians_within_bounds(tiny_data):
    data = tiny_data(obs_dim=3, act_dim=2)
    nets = Nets(data, Args())
    for net, bound in ((nets.behavior, 1e-3), (nets.actor, 1e-3), (nets.q, 3e-3)):
        for last in (net.weights[-1], net.biases[-1]):
            assert 0 < last.abs().max() <= bound
    assert [w.shape[-1] for w in nets.behavior.weights] == [256, 256, 4]
    assert [w.shape[-1] for w in nets.actor.weights] == [256, 256, 256, 4]
    assert [tuple(w.shape[:2]) for w in nets.q.weights] == [(2, 5), *[(2, 256)] * 3]
    for online, copied in ((nets.q, nets.q_target), (nets.actor, nets.last_actor)):
        for p, t in zip(online.parameters(), copied.parameters()):
            assert torch.equal(p, t) and p is not t and not t.requires_grad
    out = torch.tensor([[0.3, -9.0, -7.0, 5.0], [0.1, 0.2, -1.0, 1.5]])
    mean, log_std = itrpo.gaussian(lambda s: out, None)
    assert_close(mean, out[:, :2])
    assert_close(log_std, torch.tensor([[-5.0, 2.0], [-1.0, 1.5]]))


# ---- value and target by hand ----------------------------------------------------------------


def test_target_by_hand():
    """Rows: an ordinary one, a terminal, one whose ratio is clipped, a terminal with such a ratio;
    alpha 2, tau 0.25, gamma 0.9, bonus 5. The clip at -1 comes before the coefficients and spares
    the next state's KL, of mean -3 in row 2; the terminal masks value and KL, not the shaping."""
    q = torch.tensor([[[1.0, 7.0, 3.0, 7.0], [5.0, 9.0, 3.0, 9.0]]])
    next_rho = torch.tensor([[1.0, 9.0, -4.0, 9.0], [0.0, 9.0, -2.0, 9.0]])
    rho, r = torch.tensor([0.4, 0.8, -3.0, -3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    terminal = torch.tensor([0.0, 1.0, 0.0, 1.0])

    def y(**setting):
        args = resolved(kl_coef=2.0, shape_coef=0.25, gamma=0.9, **setting)
        return target_value(r, terminal, rho, value(q, next_rho, args), args)

    expected = [
        1 + 5 + 0.5 * 0.4 + 0.9 * (3 - 2 * 0.5),
        2 + 5 + 0.5 * 0.8,
        3 + 5 - 0.5 + 0.9 * (3 + 2 * 3),
        4 + 5 - 0.5,
    ]
    assert_close(y(), torch.tensor(expected))
    unclipped = torch.tensor(expected) - 5 - torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert_close(y(setting="paper"), unclipped)


def test_upper_clip():
    rho = torch.tensor([-2.0, -0.5, 0.5, 2.0])
    args = resolved(kl_coef=10.0, shape_coef=0.5, ratio_max=1.0)
    assert_close(itrpo.shaping(rho, args), 5 * torch.tensor([-1.0, -0.5, 0.5, 1.0]))
    args = resolved(kl_coef=10.0, shape_coef=0.5)
    assert_close(itrpo.shaping(rho, args), 5 * torch.tensor([-1.0, -0.5, 0.5, 2.0]))


def test_policy_equal_to_the_clone_leaves_the_td_target(data):
    nets, args = make(data, setting="paper", shape_coef=0.9)
    nets.behavior = copy.deepcopy(nets.actor)
    s, a, r, s2, terminal = rows(data)
    pi = itrpo.gaussian(nets.actor, s)
    rho = log_ratio(pre_tanh(a, args), pi, itrpo.gaussian(nets.behavior, s))
    assert not rho.any()
    noise = torch.randn(10, 16, 2).double()
    with Inject(randn_like=[noise]):
        _, _, y = itrpo.critic_loss(nets, *rows(data), rho, args)
    mean, log_std = itrpo.gaussian(nets.actor, s2)
    a2 = (mean + log_std.exp() * noise).tanh()
    q2 = torch.stack([nets.q_target(s2, x) for x in a2]).mean(0).amin(0)
    assert_close(y, (r + 0.99 * (1 - terminal) * q2).mean().detach())


# ---- tabular problems: the file's own value and target, every action enumerated ---------------


class Tabular:
    """A random problem with tables for Q and policies, (S, A) in float64. The samples of Eq. 5 are
    all A actions; each entry is weighed by A pi(a|s), so that a mean over samples is exact."""

    def __init__(self, seed=0, n=7, m=4):
        torch.manual_seed(seed)
        ones = torch.ones(n).double()
        self.p = D.Dirichlet(0.5 * ones).sample((n, m))  # (S, A, S)
        self.r = torch.randn(n, m).double()
        self.log_b = D.Dirichlet(ones[:m]).sample((n,)).log()
        self.m = m

    def value(self, q, log_pi, args):
        """<pi, Q - alpha rho>, (S,), by the file."""
        weight = self.m * log_pi.exp()
        rho = log_pi - self.log_b
        return value((weight * q).T[None], (weight * rho).T, args)

    def target(self, q, log_pi, args):
        """Q_{k+1} (S, A), by the file."""
        next_value = self.next(self.value(q, log_pi, args))
        return target_value(self.r, 0.0, log_pi - self.log_b, next_value, args)

    def greedy(self, q, alpha):
        return (self.log_b + q / alpha).log_softmax(-1)

    def next(self, v):
        return self.p @ v


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean(log_p, q):
    return (log_p.exp() * q).sum(-1)


def test_greedy_policy_maximizes_the_value():
    """pi_b exp(Q / alpha), normalized, is stationary, and every other policy is worse."""
    mdp, args = Tabular(), plain(0.5, 0.9, gamma=0.95)
    q = torch.randn(7, 4).double()
    logits = mdp.greedy(q, 0.5).requires_grad_()
    found = mdp.value(q, logits.log_softmax(-1), args)
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert grad.abs().max() < 1e-12
    best = 0.5 * (mdp.log_b + q / 0.5).logsumexp(-1)
    assert_close(found.detach(), best)
    for scale in (0.1, 1.0):
        other = logits.detach() + scale * torch.randn(7, 4)
        assert (mdp.value(q, other.log_softmax(-1), args) < best).all()


def theorem_1(mdp, args, steps=150):
    """Yields, for every k: log pi and Q of Eq. 5 by the file, then log pi and Q' of the iteration
    with two KL terms, from any start."""
    alpha, tau = args.kl_coef, args.shape_coef
    q = torch.randn(7, 4).double()
    log_pi = other = torch.randn(7, 4).double().log_softmax(-1)
    q_prime = q - tau * alpha * (log_pi - mdp.log_b)
    for _ in range(steps):
        log_pi = mdp.greedy(q, alpha)
        q = mdp.target(q, log_pi, args)
        last = other
        other = (tau * last + (1 - tau) * mdp.log_b + q_prime / alpha).log_softmax(-1)
        v = mean(other, q_prime) - tau * alpha * kl(other, last)
        q_prime = mdp.r + 0.95 * mdp.next(v - (1 - tau) * alpha * kl(other, mdp.log_b))
        yield log_pi, q, other, q_prime


@pytest.mark.parametrize(
    ("alpha", "tau"), [(0.5, 0.0), (0.5, 0.3), (0.5, 0.9), (0.5, 1.0), (3.0, 0.9), (0.05, 0.9)]
)
def test_theorem_1(alpha, tau):
    mdp = Tabular()
    for log_pi, q, other, q_prime in theorem_1(mdp, plain(alpha, tau, gamma=0.95)):
        assert (log_pi.exp() - other.exp()).abs().max() < 1e-10
        assert (q - tau * alpha * (log_pi - mdp.log_b) - q_prime).abs().max() < 1e-10


@pytest.mark.parametrize(("tau", "low", "high"), [(0.03, 0.002, 0.004), (0.9, 0.15, 0.2)])
def test_theorem_1_needs_the_ratio_unclipped(tau, low, high):
    """How far the author's clip moves the limit, in the probability of an action, at most over ten
    problems; without it nothing moves."""
    moved = {}
    for ratio_min in (-INF, -1.0):
        args = plain(0.5, tau, gamma=0.95, ratio_min=ratio_min)
        ends = [list(theorem_1(Tabular(seed), args))[-1] for seed in range(10)]
        moved[ratio_min] = max((end[0].exp() - end[2].exp()).abs().max() for end in ends)
    assert moved[-INF] < 1e-13
    assert low < moved[-1.0] < high


@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 0.3), (0.5, 0.9), (3.0, 0.6)])
def test_lemma_1(alpha, tau):
    """From a uniform policy, pi_{k+1} = softmax(h_k / lambda) exactly, and what keeps h from the
    entropy-regularized iteration shrinks by tau at every step."""
    mdp, args = Tabular(seed=1), plain(alpha, tau, gamma=0.95)
    lam, log_pi = alpha * (1 - tau), torch.full((7, 4), -math.log(4)).double()
    q = torch.randn(7, 4).double()
    r_hat = mdp.r + lam * mdp.log_b
    h, v, gap = 0.0, torch.full((7,), lam * math.log(4)).double(), None
    for _ in range(100):
        q_prime = q - tau * alpha * (log_pi - mdp.log_b)
        h = tau * h + (1 - tau) * (q_prime + lam * mdp.log_b)
        if gap is None:
            h_start = h
        log_pi = mdp.greedy(q, alpha)
        assert (log_pi.exp() - (h / lam).softmax(-1)).abs().max() < 1e-10
        residual = h - (r_hat + 0.95 * mdp.next(v))
        assert gap is None or (residual - tau * gap).abs().max() < 1e-10
        gap, v = residual, lam * (h / lam).logsumexp(-1)
        q = mdp.target(q, log_pi, args)
    assert gap.abs().max() < 1e-4 + (h_start - r_hat).abs().max() * tau**90


def limit(mdp, args, steps=550):
    q = torch.zeros(7, 4).double()
    for _ in range(steps):
        log_pi = mdp.greedy(q, args.kl_coef)
        q = mdp.target(q, log_pi, args)
    return q, log_pi


def test_limit_is_that_of_the_control():
    """Same policy; Q differs by tau alpha log(pi / pi_b). With tau, KL(pi, pi_b) grows and the mean
    shaping on the data's actions falls: the directions of the paper's figure 2."""
    mdp, seen = Tabular(), []
    for tau in (0.0, 0.3, 0.6, 0.9):
        q, log_pi = limit(mdp, plain(0.5, tau, gamma=0.95))
        control = plain(0.5, tau, gamma=0.95, control=True)
        assert control.shape_coef == 0
        q_control, log_control = limit(mdp, control)
        rho = log_pi - mdp.log_b
        assert (log_pi.exp() - log_control.exp()).abs().max() < 1e-10
        assert (q - tau * 0.5 * rho - q_control).abs().max() < 1e-10
        assert (mean(mdp.log_b, rho) <= 0).all() and (mean(log_pi, rho) >= 0).all()
        assert_close(mean(mdp.log_b, rho), -kl(mdp.log_b, log_pi))
        seen.append((kl(log_pi, mdp.log_b).mean(), mean(mdp.log_b, rho).mean()))
    kls, shapings = zip(*seen)
    assert list(kls) == sorted(kls) and list(shapings) == sorted(shapings, reverse=True)
    assert kls[-1] > 1.5 * kls[0] and shapings[-1] < 3 * shapings[0]


@pytest.mark.parametrize("w", [0.5, 2.0])
def test_kl_control_is_a_penalty(w):
    """Any penalty p in the value, with entropy, is KL-regularization towards softmax(-p / w)."""
    mdp, args = Tabular(seed=2), plain(w, 0.0, gamma=0.95)
    p = torch.randn(7, 4).double()
    z = (-p / w).logsumexp(-1)
    mdp.log_b = -p / w - z[:, None]
    q = penalized = torch.randn(7, 4).double()
    for _ in range(200):
        log_pi, other = mdp.greedy(q, w), ((penalized - p) / w).log_softmax(-1)
        q = mdp.target(q, log_pi, args)
        v = mean(other, penalized - p) - w * mean(other, other) - w * z
        penalized = mdp.r + 0.95 * mdp.next(v)
        assert (log_pi.exp() - other.exp()).abs().max() < 1e-10
        assert (q - penalized).abs().max() < 1e-10


# ---- the actor -------------------------------------------------------------------------------


def two_points(*shape):
    """Noise -1 and 1: mean 0 and variance 1, so that quadratic expectations are exact."""
    return Inject(randn_like=[torch.tensor([-1.0, 1.0]).double().view(2, 1, 1).expand(2, *shape)])


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_contextual_bandit(alpha):
    """pi_b = N(0, 1) and Q = -(x - 2)^2 / 2 before the tanh: the optimum is
    N(2 / (1 + alpha), alpha / (1 + alpha))."""
    zero = torch.zeros(3, 1).double()
    mean, log_std = torch.tensor(-0.5).double(), torch.tensor(0.3).double()
    nets = SimpleNamespace(q=lambda s, a: -0.5 * (a.atanh()[None, :, 0] - 2) ** 2)
    params = [mean.requires_grad_(), log_std.requires_grad_()]
    optimizer, args = torch.optim.LBFGS(params, max_iter=100), plain(alpha, 0.5, samples=2)

    def closure():
        pi = mean.expand(3, 1), log_std.expand(3, 1)
        with two_points(3, 1):
            loss = itrpo.actor_loss(nets, zero, pi, (zero, zero), args)
        mean.grad, log_std.grad = torch.autograd.grad(loss, params)
        return loss

    optimizer.step(closure)
    assert abs(mean.item() - 2 / (1 + alpha)) < 1e-4
    assert abs(log_std.exp().item() ** 2 - alpha / (1 + alpha)) < 1e-4


def test_gradient_flows_through_the_clones_density():
    """With Q = 0 the actor's gradient is that of alpha KL(pi || pi_b): a constant pi_b would leave
    the entropy's part alone, which does not reach the mean."""
    pi, behavior = gaussians(5, 2)
    pi = [x.requires_grad_() for x in pi]
    nets = SimpleNamespace(q=lambda s, a: torch.zeros(2, len(s)).double())
    with two_points(5, 2):
        loss = itrpo.actor_loss(nets, torch.zeros(5, 3), pi, behavior, plain(0.7, 0.5, samples=2))
    exact = 0.7 * gaussian_kl(pi, behavior).mean()
    assert_close(loss, exact)
    expected = torch.autograd.grad(exact, pi)
    assert_close(torch.autograd.grad(loss, pi), expected)
    assert expected[0].abs().min() > 1e-3


# ---- the penalty -----------------------------------------------------------------------------


def test_penalty_of_linear_critics():
    """|w_1|^2 + |w_2|^2 for any batch, not |w_1 + w_2|^2; its gradient is 2 w_i."""
    w = torch.tensor([[1.0, 2.0], [3.0, 0.5]]).double()
    net = ScalarMLP(1 + 2, 2, members=2).double()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.weights[0][:, 1:, 0], net.weights[0][:, 1:, 1] = w, -w
        net.weights[1][:, 0], net.weights[1][:, 1] = 1, -1
    for batch in (1, 9):
        s, a = torch.zeros(batch, 1).double(), torch.randn(batch, 2).double()
        penalty = itrpo.gradient_penalty(SimpleNamespace(q=net), s, a)
        assert_close(penalty, w.square().sum())
        (grad,) = torch.autograd.grad(penalty, net.weights[0])
        assert_close(grad[:, 1:, 0] - grad[:, 1:, 1], 2 * w)


# ---- training loop ---------------------------------------------------------------------------


def same(net, other):
    return all(map(torch.equal, net.parameters(), other.parameters()))


@pytest.mark.parametrize(("entropy", "direction"), [(-2.5, 1), (-1.5, -1)])
def test_entropy_weight_rises_below_its_target(entropy, direction):
    """The target is -A = -2; the gradient is weight * (entropy + A)."""
    log_weight = nn.Parameter(torch.tensor(0.7))
    loss = itrpo.bc_weight_loss(log_weight, torch.tensor(entropy), 2)
    (grad,) = torch.autograd.grad(loss, log_weight)
    assert_close(grad, math.exp(0.7) * torch.tensor(entropy + 2))
    Adam([log_weight], 0.01).step([grad])
    assert (log_weight - 0.7).sign() == direction


def test_metrics_of_an_update(data):
    """Those that no loss holds; the learning rates are 0, so the networks stay."""
    nets, args = make(data, setting="trust", ratio_min=-0.1, ratio_max=0.1, samples=1)
    params = {k: getattr(nets, k).parameters() for k in ("q", "actor")}
    opt = SimpleNamespace(**{k: SGD(p, 0.0) for k, p in params.items()})
    with Inject(randint=[torch.arange(16)], randn_like=list(torch.randn(3, 1, 16, 2).double())):
        metrics = itrpo.update(nets, opt, data, args)
    names = ("actor", "behavior", "last_actor")
    heads = [itrpo.gaussian(getattr(nets, name), data.obs) for name in names]
    normals = [D.Normal(mean, log_std.exp()) for mean, log_std in heads]
    log_pi, log_b = (squashed(*head).log_prob(data.action).sum(-1) for head in heads[:2])
    rho, kl = log_pi - log_b, [D.kl_divergence(normals[0], x).sum(-1) for x in normals[1:]]
    assert (rho < -0.1).any() and (rho > 0.1).any()
    expected = {"rho_data": rho, "shaping": 0.9 * 0.9 * rho.clamp(-0.1, 0.1)}
    expected |= {"clipped_ratios": (rho.abs() > 0.1).double(), "std": normals[0].stddev}
    expected |= {"kl_behavior": kl[0], "kl_step": kl[1]}
    for name, values in expected.items():
        assert_close(metrics[name].double(), values.mean().detach(), rtol=1e-6, atol=1e-8)


class Noted(PlainRun):
    """Notes the clone's rates, and the actor beside its copy, after each step."""

    def start(self, nets, opt, **largest):
        super().start(nets, opt, **largest)
        self.rates, self.copies = [], []
        self.actors = [copy.deepcopy(nets.actor)]

    def after(self, t, metrics, act=None):
        super().after(t, metrics, act)
        if act is None:
            self.rates.append([self.opt.behavior.lr.item(), self.opt.bc_weight.lr.item()])
        else:
            self.actors.append(copy.deepcopy(self.nets.actor))
            self.copies.append(copy.deepcopy(self.nets.last_actor))


def test_the_last_actor_is_that_of_the_last_row(tiny_data):
    """In update t the copy is the actor after step k log_every, the last such step before t."""
    run = Noted()
    train(run, tiny_data(), Args(bc_steps=1, steps=10, log_every=4, batch_size=4))
    for t, copied in enumerate(run.copies, 1):
        last = t - 1 - (t - 1) % 4
        assert same(copied, run.actors[last])
        assert not same(copied, run.actors[t])
    kls = [row["kl_step"] for row in run.phases["train"]]
    assert kls[0] == kls[4] == kls[8] == 0 and kls[1] > 0


def test_learning_rate_of_the_clone_falls_twice(tiny_data):
    """1e-3, a tenth after 80% of the steps, a hundredth after 90%; for the entropy weight too."""
    run = Noted()
    train(run, tiny_data(), Args(bc_steps=20, steps=1, batch_size=4))
    expected = [1e-3] * 16 + [1e-4] * 2 + [1e-5] * 2
    assert_close(torch.tensor(run.rates), torch.tensor(expected)[:, None].expand(20, 2))


def play(**method):
    """Mean action and last metrics on a bandit: actions around -0.2, reward 10 a."""
    torch.manual_seed(0)
    a = (-0.2 + 0.2 * torch.randn(400).clamp(-2, 2))[:, None]
    s = torch.ones(400, 1)
    run, data = PlainRun(), Data(s, a, 10 * a[:, 0], s, torch.ones(400))
    rates = dict(bc_steps=150, steps=200, bc_lr=3e-3, lr=1e-3)
    train(run, data, Args(batch_size=32, bonus=0.0, samples=4, **rates, **method))
    for row in run.phases["behavior"] + run.phases["train"]:
        assert all(map(math.isfinite, row.values()))
    return run.act(s[:1]).item(), run.phases["train"][-1]


def test_bandit_moves_as_far_as_alpha_lets_it():
    """Much KL is the clone; little of it climbs; what it costs is what is logged."""
    held, strict = play(kl_coef=100.0)
    moved, loose = play(kl_coef=0.9)
    assert abs(held + 0.2) < 0.1 and moved > held + 0.15
    assert loose["kl_behavior"] > 5 * strict["kl_behavior"]
    assert loose["rho_data"] < strict["rho_data"]
