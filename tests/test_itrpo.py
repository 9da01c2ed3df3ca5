"""itrpo.py: the shaped target on tabular problems (Theorem 1, Lemma 1), ratios, a bandit."""

import copy
import math

import itrpo
import pytest
import torch
import torch.distributions as D
from golden.tools import Inject
from itrpo import Args, Nets, log_ratio, pre_tanh, target_value, train, value
from oracles import in_double, rows
from stand_in import PlainRun
from torch.testing import assert_close

from common import InputError, orthogonal_
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


# ---- settings --------------------------------------------------------------------------------


def test_settings():
    paper, code, trust = (resolved(setting=s) for s in ("paper", "code", "trust"))
    values = [[getattr(args, name) for name in NAMES] for args in (paper, code, trust)]
    assert values[0] == [0.9, 0.03, 0.0, 0.0, -INF, INF]
    assert values[1] == [0.9, 0.03, 5.0, 0.1, -1.0, INF]
    assert values[2] == [0.9, 0.9, 5.0, 0.1, -1.0, INF]
    assert resolved() == code


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


# ---- the actor -------------------------------------------------------------------------------


# ---- the penalty -----------------------------------------------------------------------------


# ---- training loop ---------------------------------------------------------------------------


class Rates(PlainRun):
    """Notes the clone's two rates after each of its steps."""

    def after(self, t, metrics, act=None):
        super().after(t, metrics, act)
        if act is None:
            rates = self.opt.behavior.lr.item(), self.opt.bc_weight.lr.item()
            self.rates = getattr(self, "rates", []) + [rates]


def test_learning_rate_of_the_clone_falls_twice(tiny_data):
    """1e-3, a tenth after 80% of the steps, a hundredth after 90%; for the entropy weight too."""
    run = Rates()
    train(run, tiny_data(), Args(bc_steps=20, steps=1, batch_size=4))
    expected = [1e-3] * 16 + [1e-4] * 2 + [1e-5] * 2
    assert_close(torch.tensor(run.rates), torch.tensor(expected)[:, None].expand(20, 2))
