"""itrpo.py: the shaped target on tabular problems (Theorem 1, Lemma 1), ratios, whole steps."""

import copy
import json
import math
from types import SimpleNamespace

import brac
import itrpo
import pytest
import torch
import torch.distributions as D
from itrpo import Args, Nets, gaussian_kl, log_ratio, pre_tanh, resolve
from oracles import SGD, assert_same, in_double, rows, stack
from test_scripts import write_log
from torch import nn
from torch.testing import assert_close

from common import Adam, InputError, ScalarMLP, orthogonal_, parse

INF = math.inf
NAMES = ("kl_coef", "shape_coef", "bonus", "penalty", "ratio_min", "ratio_max")


def plain(alpha, tau, **more):
    """Eq. 5 alone, with these coefficients."""
    return resolve(Args(setting="paper", kl_coef=alpha, shape_coef=tau, **more))


def optimizers(nets, optimizer, lr):
    params = {k: getattr(nets, k).parameters() for k in ("behavior", "q", "actor")}
    params |= {"bc_weight": [nets.log_bc_weight]}
    return SimpleNamespace(**{k: optimizer(p, lr) for k, p in params.items()})


@pytest.fixture
def data(tiny_data):
    """Two action dimensions, everything in float64."""
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def make(data, **values):
    """Networks in float64 with outputs of size one, and copies that differ."""
    args = resolve(Args(batch_size=16, **values))
    torch.manual_seed(0)
    nets = Nets(data, args)
    for net in (nets.behavior, nets.actor, nets.q, nets.q_target, nets.last_actor):
        orthogonal_(net, 1.0, 0.5)
    return nets.double(), args


def squashed(mean, log_std):
    return D.TransformedDistribution(D.Normal(mean, log_std.exp()), D.TanhTransform())


# ---- settings --------------------------------------------------------------------------------


def test_settings():
    paper, code, trust = (resolve(Args(setting=s)) for s in ("paper", "code", "trust"))
    values = [[getattr(args, name) for name in NAMES] for args in (paper, code, trust)]
    assert values[0] == [0.9, 0.03, 0.0, 0.0, -INF, INF]
    assert values[1] == [0.9, 0.03, 5.0, 0.1, -1.0, INF]
    assert values[2] == [0.9, 0.9, 5.0, 0.1, -1.0, INF]
    assert resolve(Args()) == code


@pytest.mark.parametrize("name", NAMES)
def test_typed_numbers_win_over_the_setting(name):
    for setting in itrpo.SETTINGS:
        argv = ["--setting", setting, f"--{name.replace('_', '-')}", "0.25"]
        args = resolve(parse(Args, itrpo.PRESETS, argv))
        others = resolve(Args(setting=setting))
        for other in NAMES:
            assert getattr(args, other) == (0.25 if other == name else getattr(others, other))
        assert args.preset[name] == 0.25 and args.preset["setting"] == setting


def test_clips_can_be_typed_as_infinite():
    argv = ["--ratio-min", "-inf", "--ratio-max=inf", "--setting=trust"]
    args = resolve(parse(Args, itrpo.PRESETS, argv))
    assert (args.ratio_min, args.ratio_max, args.shape_coef) == (-INF, INF, 0.9)


@pytest.mark.parametrize("env", ["antmaze-umaze-v2", "D4RL/antmaze/umaze-v1"])
def test_antmaze_has_no_bonus_unless_typed(env):
    args = resolve(parse(Args, itrpo.PRESETS, ["--env", env, "--setting", "trust"]))
    assert (args.reward_shift, args.bonus, args.shape_coef, args.samples) == (-1, 0, 0.9, 10)
    assert (args.preset["reward_shift"], args.preset["bonus"]) == (-1, 0)
    args = resolve(parse(Args, itrpo.PRESETS, ["--env", env, "--bonus", "2"]))
    assert (args.bonus, args.preset["bonus"]) == (2, 2)


def test_fewer_samples_on_development_sets_alone():
    samples = {
        env: parse(Args, itrpo.PRESETS, ["--env", env]).samples
        for env in ("hopper/medium-v0", "halfcheetah/medium-v0", "hopper-medium-v2")
    }
    assert list(samples.values()) == [4, 4, 10]
    typed = parse(Args, itrpo.PRESETS, ["--env", "hopper/medium-v0", "--samples", "10"])
    assert typed.samples == 10


def test_control_is_the_unshaped_method_at_the_same_limit():
    args = resolve(Args(setting="trust", kl_coef=2.0, control=True))
    assert_close(args.kl_coef, 2.0 * 0.1)
    assert args.shape_coef == 0 and args.bonus == 5
    again = resolve(copy.copy(args))
    assert (again.kl_coef, again.shape_coef) == (args.kl_coef, 0)
    assert args.preset["kl_coef"] == args.kl_coef and args.preset["control"]


def test_config_and_start_line_show_what_is_used(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log("log.npz")
    argv = "--env log.npz --eval-env none --setting trust --penalty 0 --control --device cpu"
    argv += " --steps 4 --bc-steps 4 --batch-size 4"
    itrpo.train(parse(Args, itrpo.PRESETS, argv.split()))
    (folder,) = (tmp_path / "runs").glob("log__*")
    config = json.loads((folder / "config.json").read_text())["args"]
    assert_close(config["kl_coef"], 0.09)
    assert [config[name] for name in NAMES[1:]] == [0.0, 5.0, 0.0, -1.0, INF]
    assert config["setting"] == "trust" and config["control"]
    start = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("itrpo on"))
    shown = {"setting": "trust", "control": True} | {name: config[name] for name in NAMES}
    assert ", ".join(f"{k}={v}" for k, v in shown.items()) in start


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"setting": "x"}, "--setting is 'x': give paper, code, trust"),
        ({"shape_coef": 1.1}, "--shape-coef is 1.1: give a number from 0 to 1"),
        ({"shape_coef": -0.1}, "--shape-coef is -0.1"),
        ({"clip": 0.0}, "--clip is 0.0: give a number between 0 and 1"),
    ],
)
def test_bad_input_is_one_line(values, says, tmp_path):
    with pytest.raises(InputError, match=says) as caught:
        itrpo.train(Args(out=str(tmp_path / "runs"), **values))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


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


def by_hand(monkeypatch, q, rho, q_data=None):
    """Networks whose critics are q (E, M, B) and log-ratios rho (M, B) at the policy's samples."""
    monkeypatch.setattr(itrpo, "gaussian", lambda net, s: net)
    monkeypatch.setattr(itrpo, "draw", lambda pi, m: torch.zeros(m, rho.shape[1], 1))
    monkeypatch.setattr(itrpo, "log_ratio", lambda x, pi, behavior: rho)
    sampled = lambda s, a: q.flatten(1)
    zero = torch.zeros(q.shape[0], q.shape[2]) if q_data is None else q_data
    return SimpleNamespace(actor=None, behavior=None, q_target=sampled, q=lambda s, a: zero)


def test_mean_over_samples_then_minimum_over_critics(monkeypatch):
    """Critics (1, 5) and (4, 4) at two samples: min of means is 3, mean of minima would be 2.5."""
    q = torch.tensor([[[1.0], [5.0]], [[4.0], [4.0]]])
    nets = by_hand(monkeypatch, q, torch.tensor([[0.5], [1.5]]))
    v = itrpo.value(nets.q_target, torch.zeros(1, 1), None, None, plain(0.5, 0.0, samples=2))
    assert_close(v, torch.tensor([3 - 0.5 * 1.0]))


def target(nets, r, terminal, rho, args):
    """y (B,), read off the loss's gradient in Q(s, a), which is 2 (Q - y) / B for each critic."""
    b = len(r)
    q = torch.zeros(1, b, dtype=r.dtype, requires_grad=True)
    nets = SimpleNamespace(**vars(nets) | {"q": lambda s, a: q})
    s = torch.arange(b, dtype=r.dtype)[:, None]
    s2 = getattr(nets, "s2", s)
    loss, q_data, mean = itrpo.critic_loss(nets, s, s, r, s2, terminal, rho, args)
    y = -torch.autograd.grad(loss, q)[0][0] * b / 2
    assert_close(mean, y.mean())
    assert_close(loss.detach(), y.square().mean())
    assert q_data == 0
    return y


def test_target_by_hand(monkeypatch):
    """Rows: an ordinary one, a terminal, one whose ratio is clipped, a terminal with such a ratio;
    alpha 2, tau 0.25, gamma 0.9, bonus 5. The clip at -1 comes before the coefficients and spares
    the next state's KL, of mean -3 in row 2; the terminal masks value and KL, not the shaping."""
    q = torch.tensor([[[1.0, 7.0, 3.0, 7.0], [5.0, 9.0, 3.0, 9.0]]])
    next_rho = torch.tensor([[1.0, 9.0, -4.0, 9.0], [0.0, 9.0, -2.0, 9.0]])
    nets = by_hand(monkeypatch, q, next_rho)
    args = resolve(Args(kl_coef=2.0, shape_coef=0.25, gamma=0.9, samples=2))
    rho, r = torch.tensor([0.4, 0.8, -3.0, -3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    y = target(nets, r, torch.tensor([0.0, 1.0, 0.0, 1.0]), rho, args)
    expected = [
        1 + 5 + 0.5 * 0.4 + 0.9 * (3 - 2 * 0.5),
        2 + 5 + 0.5 * 0.8,
        3 + 5 - 0.5 + 0.9 * (3 + 2 * 3),
        4 + 5 - 0.5,
    ]
    assert_close(y, torch.tensor(expected))
    args = resolve(Args(setting="paper", kl_coef=2.0, shape_coef=0.25, gamma=0.9, samples=2))
    y = target(nets, r, torch.tensor([0.0, 1.0, 0.0, 1.0]), rho, args)
    assert_close(y, torch.tensor(expected) - 5 - torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_upper_clip():
    rho = torch.tensor([-2.0, -0.5, 0.5, 2.0])
    args = resolve(Args(kl_coef=10.0, shape_coef=0.5, ratio_max=1.0))
    assert_close(itrpo.shaping(rho, args), 5 * torch.tensor([-1.0, -0.5, 0.5, 1.0]))
    args = resolve(Args(kl_coef=10.0, shape_coef=0.5))
    assert_close(itrpo.shaping(rho, args), 5 * torch.tensor([-1.0, -0.5, 0.5, 2.0]))


def test_loss_is_summed_over_critics(monkeypatch):
    q_data = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    zero = torch.zeros(1, 1, 2)
    nets = by_hand(monkeypatch, zero, zero[0], q_data)
    s, r = torch.zeros(2, 1), torch.tensor([1.0, 4.0])
    loss, q_mean, y = itrpo.critic_loss(nets, s, s, r, s, r, 0 * r, plain(1.0, 0.0, samples=1))
    assert_close(loss, torch.tensor((0 + 4) / 2 + (4 + 4) / 2))
    assert (q_mean, y) == (3, 2.5)


def test_policy_equal_to_the_clone_leaves_the_td_target(data):
    nets, args = make(data, setting="paper", shape_coef=0.9)
    nets.behavior = copy.deepcopy(nets.actor)
    s, a, r, s2, terminal = rows(data)
    pi = itrpo.gaussian(nets.actor, s)
    rho = log_ratio(pre_tanh(a, args), pi, itrpo.gaussian(nets.behavior, s))
    assert not rho.any()
    torch.manual_seed(1)
    loss, _, y = itrpo.critic_loss(nets, *rows(data), rho, args)
    torch.manual_seed(1)
    a2 = squashed(*itrpo.gaussian(nets.actor, s2)).sample((10,))
    q2 = torch.stack([nets.q_target(s2, x) for x in a2]).mean(0).amin(0)
    assert_close(y, (r + 0.99 * (1 - terminal) * q2).mean().detach(), rtol=1e-6, atol=1e-6)


# ---- tabular problems: the file's own target and actor loss, every action enumerated ----------


class Tabular:
    """A random MDP; critic and policies are tables of float64. The file's samples become all
    actions, and its mean over samples the exact expectation: each entry is weighed by A pi(a|s)."""

    def __init__(self, monkeypatch, seed=0, n=7, m=4):
        torch.manual_seed(seed)
        self.gamma, self.n, self.m = 0.95, n, m
        ones = torch.ones(n).double()
        self.p = D.Dirichlet(0.5 * ones).sample((n, m))  # (S, A, S)
        self.r = torch.randn(n, m).double()
        self.log_b = D.Dirichlet(ones[:m]).sample((n,)).log()
        s, a, s2 = torch.meshgrid(*(torch.arange(k) for k in (n, m, n)), indexing="ij")
        self.s, self.a, self.s2 = s.flatten(), a.flatten(), s2.flatten()[:, None].double()

        def weighed_ratio(x, log_pi, log_b):
            return m * (log_pi.exp() * (log_pi - log_b)).T  # (A, B)

        def every_action(log_pi, samples):
            return torch.arange(m).double().view(m, 1, 1).expand(m, len(log_pi), 1)

        monkeypatch.setattr(itrpo, "gaussian", lambda table, s: table[s[:, 0].long()])
        monkeypatch.setattr(itrpo, "draw", every_action)
        monkeypatch.setattr(itrpo, "log_ratio", weighed_ratio)

    def critic(self, q, log_pi):
        def weighed(s, a):
            i = s[:, 0].long(), a.atanh().round()[:, 0].long()
            return self.m * (log_pi.exp()[i] * q[i])[None]

        return weighed

    def target(self, q, log_pi, args):
        """Q_{k+1} (S, A): the file's y for every (s, a, s'), averaged over s'."""
        nets = SimpleNamespace(actor=log_pi, behavior=self.log_b, q_target=self.critic(q, log_pi))
        nets.s2 = self.s2
        rho = (log_pi - self.log_b)[self.s, self.a]
        y = target(nets, self.r[self.s, self.a], 0 * rho, rho, args)
        return (self.p * y.view(self.p.shape)).sum(-1)

    def actor_loss(self, q, logits, args):
        log_pi, states = logits.log_softmax(-1), torch.arange(self.n).double()[:, None]
        nets = SimpleNamespace(q=self.critic(q, log_pi))
        return itrpo.actor_loss(nets, states, log_pi, self.log_b, args)

    def greedy(self, q, alpha):
        return (self.log_b + q / alpha).log_softmax(-1)

    def next(self, v):
        return self.p @ v


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean(log_p, q):
    return (log_p.exp() * q).sum(-1)


def test_greedy_policy_minimizes_the_actors_loss(monkeypatch):
    """pi_b exp(Q / alpha), normalized, is stationary, and every other policy is worse."""
    mdp, args = Tabular(monkeypatch), plain(0.5, 0.9, gamma=0.95)
    q = torch.randn(7, 4).double()
    logits = mdp.greedy(q, 0.5).requires_grad_()
    loss = mdp.actor_loss(q, logits, args)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.abs().max() < 1e-12
    best = -0.5 * (mdp.log_b + q / 0.5).logsumexp(-1).mean()
    assert_close(loss.detach(), best)
    for scale in (0.1, 1.0):
        other = mdp.actor_loss(q, logits.detach() + scale * torch.randn(7, 4), args)
        assert other > best + 1e-5


@pytest.mark.parametrize(
    ("alpha", "tau"), [(0.5, 0.0), (0.5, 0.3), (0.5, 0.9), (0.5, 1.0), (3.0, 0.9), (0.05, 0.9)]
)
def test_theorem_1(monkeypatch, alpha, tau):
    """Eq. 5, by the file's own target, against the iteration with two KL terms, for any start."""
    mdp, args = Tabular(monkeypatch), plain(alpha, tau, gamma=0.95)
    q = torch.randn(7, 4).double()
    log_pi = other = torch.randn(7, 4).double().log_softmax(-1)
    q_prime = q - tau * alpha * (log_pi - mdp.log_b)
    for _ in range(150):
        log_pi = mdp.greedy(q, alpha)
        q = mdp.target(q, log_pi, args)
        last = other
        other = (tau * last + (1 - tau) * mdp.log_b + q_prime / alpha).log_softmax(-1)
        v = mean(other, q_prime) - tau * alpha * kl(other, last)
        q_prime = mdp.r + 0.95 * mdp.next(v - (1 - tau) * alpha * kl(other, mdp.log_b))
        assert (log_pi.exp() - other.exp()).abs().max() < 1e-10
        assert (q - tau * alpha * (log_pi - mdp.log_b) - q_prime).abs().max() < 1e-10


def test_theorem_1_needs_the_ratio_unclipped(monkeypatch):
    """The clip of the related code moves the limit; so the test above can fail."""
    mdp, q = Tabular(monkeypatch), torch.zeros(7, 4).double()
    limits = []
    for ratio_min in (-INF, -1.0):
        args = plain(0.5, 0.9, gamma=0.95, ratio_min=ratio_min)
        for _ in range(300):
            q = mdp.target(q, mdp.greedy(q, 0.5), args)
        limits.append(mdp.greedy(q, 0.5).exp())
    assert (limits[0] - limits[1]).abs().max() > 0.02


@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 0.3), (0.5, 0.9), (3.0, 0.6)])
def test_lemma_1(monkeypatch, alpha, tau):
    """From a uniform policy, pi_{k+1} = softmax(h_k / lambda) exactly, and what keeps h from the
    entropy-regularized iteration shrinks by tau at every step."""
    mdp, args = Tabular(monkeypatch, seed=1), plain(alpha, tau, gamma=0.95)
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


def test_limit_is_that_of_the_control(monkeypatch):
    """Same policy; Q differs by tau alpha log(pi / pi_b). With tau, KL(pi, pi_b) grows and the mean
    shaping on the data's actions falls: the directions of the paper's figure 2."""
    mdp, seen = Tabular(monkeypatch), []
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
def test_kl_control_is_a_penalty(monkeypatch, w):
    """Any penalty p in the value, with entropy, is KL-regularization towards softmax(-p / w)."""
    mdp, args = Tabular(monkeypatch, seed=2), plain(w, 0.0, gamma=0.95)
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


def two_points(monkeypatch):
    """Noise -1 and 1: mean 0 and variance 1, so that quadratic expectations are exact."""
    monkeypatch.setattr(
        torch, "randn_like", lambda x: torch.tensor([-1.0, 1.0]).to(x).view(2, 1, 1).expand_as(x)
    )


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_contextual_bandit(monkeypatch, alpha):
    """pi_b = N(0, 1) and Q = -(x - 2)^2 / 2 before the tanh: the optimum is
    N(2 / (1 + alpha), alpha / (1 + alpha))."""
    two_points(monkeypatch)
    zero = torch.zeros(3, 1).double()
    mean, log_std = torch.tensor(-0.5).double(), torch.tensor(0.3).double()
    nets = SimpleNamespace(q=lambda s, a: -0.5 * (a.atanh()[None, :, 0] - 2) ** 2)
    params = [mean.requires_grad_(), log_std.requires_grad_()]
    optimizer, args = torch.optim.LBFGS(params, max_iter=100), plain(alpha, 0.5, samples=2)

    def closure():
        pi = mean.expand(3, 1), log_std.expand(3, 1)
        loss = itrpo.actor_loss(nets, zero, pi, (zero, zero), args)
        mean.grad, log_std.grad = torch.autograd.grad(loss, params)
        return loss

    optimizer.step(closure)
    assert abs(mean.item() - 2 / (1 + alpha)) < 1e-4
    assert abs(log_std.exp().item() ** 2 - alpha / (1 + alpha)) < 1e-4


def test_gradient_flows_through_the_clones_density(monkeypatch):
    """With Q = 0 the actor's gradient is that of alpha KL(pi || pi_b): a constant pi_b would leave
    the entropy's part alone, which does not reach the mean."""
    two_points(monkeypatch)
    pi, behavior = gaussians(5, 2)
    pi = [x.requires_grad_() for x in pi]
    nets = SimpleNamespace(q=lambda s, a: torch.zeros(2, len(s)).double())
    loss = itrpo.actor_loss(nets, torch.zeros(5, 3), pi, behavior, plain(0.7, 0.5, samples=2))
    exact = 0.7 * gaussian_kl(pi, behavior).mean()
    assert_close(loss, exact)
    expected = torch.autograd.grad(exact, pi)
    assert_close(torch.autograd.grad(loss, pi), expected)
    assert expected[0].abs().min() > 1e-3


# ---- the penalty -----------------------------------------------------------------------------


def test_penalty_is_that_of_difference_quotients(data):
    nets, _ = make(data)
    h, quotients = 1e-7, []
    for step in torch.eye(2).double() * h:
        ahead, behind = (nets.q(data.obs, data.action + k * step) for k in (1, -1))
        quotients.append((ahead - behind) / (2 * h))
    expected = sum(q.square() for q in quotients).mean(1).sum()
    penalty = itrpo.gradient_penalty(nets, data.obs, data.action)
    assert_close(penalty, expected, rtol=1e-5, atol=0)


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


# ---- whole steps, written again with torch.nn, torch.optim and torch.distributions ------------


def test_which_parameters_each_loss_reaches(data):
    nets, args = make(data)
    s, a = data.obs, data.action
    pi = itrpo.gaussian(nets.actor, s)
    behavior = itrpo.gaussian(nets.behavior, s)
    rho = log_ratio(pre_tanh(a, args), pi, behavior)
    online = [(k, p) for k, p in nets.named_parameters() if p.requires_grad]
    parts = {k.split(".")[0] for k, _ in online}
    assert parts == {"behavior", "actor", "q", "log_bc_weight"}
    losses = {
        "behavior": itrpo.behavior_loss(nets, s, a, args)[0],
        "q": itrpo.critic_loss(nets, *rows(data), rho, args)[0]
        + itrpo.gradient_penalty(nets, s, a),
        "log_bc_weight": itrpo.entropy_weight_loss(nets.log_bc_weight, 0.3, 2),
    }
    for reached, loss in losses.items():
        grads = torch.autograd.grad(loss, [p for _, p in online], allow_unused=True)
        found = {k.split(".")[0] for (k, _), g in zip(online, grads) if g is not None}
        assert found == {reached}


@pytest.mark.parametrize(
    "method",
    [
        dict(setting="code"),
        dict(setting="trust", samples=3, ratio_min=-0.1, ratio_max=0.1),
        dict(setting="paper", samples=3, shape_coef=0.6, clip=0.2),
        dict(setting="trust", samples=2, control=True),
    ],
)
def test_step_by_hand(data, monkeypatch, method):
    nets, args = make(data, polyak=0.1, **method)
    opt, before, draws = optimizers(nets, SGD, 0.02), copy.deepcopy(nets), []
    qs = [stack(nets.q, e) for e in range(2)]
    q_targets, actor = [stack(nets.q_target, e) for e in range(2)], stack(nets.actor)
    behavior, last = stack(nets.behavior), stack(nets.last_actor)
    monkeypatch.setattr(itrpo, "sample", lambda data, n: rows(data))
    noise_of = torch.randn_like

    def noted(x):
        draws.append(noise_of(x))
        return draws[-1]

    monkeypatch.setattr(torch, "randn_like", noted)
    metrics = itrpo.update(nets, opt, data, args)
    monkeypatch.undo()

    alpha, tau, bonus, weight, low, high = {
        "code": (0.9, 0.03, 5, 0.1, -1.0, INF),
        "trust": (0.9, 0.9, 5, 0.1, -0.1, 0.1),
        "paper": (0.9, 0.6, 0, 0, -INF, INF),
    }[method["setting"]]
    if args.control:
        alpha, tau, low, high = 0.9 * (1 - 0.9), 0, -1.0, INF
    m = method.get("samples", 10)
    bound = 1 - method.get("clip", 1e-6)
    noise = dict(zip(("next", "pi") if not weight else ("penalty", "next", "pi"), draws))
    assert len(noise) == len(draws) and noise["pi"].shape == (m, 16, 2) == noise["next"].shape

    def dist(net, s):
        out = net(s)
        return D.Normal(out[:, :2], out[:, 2:].clamp(-5, 2).exp())

    def ratio(x, p, q):
        squash = [D.TransformedDistribution(d, D.TanhTransform()) for d in (p, q)]
        a = x.tanh()
        return (squash[0].log_prob(a) - squash[1].log_prob(a)).sum(-1)

    def evaluated(nets, s, p, b, noise):
        """E Q of each critic and E rho, one sample at a time."""
        xs = [p.mean + p.stddev * e for e in noise]
        q = [sum(f(torch.cat([s, x.tanh()], 1))[:, 0] for x in xs) / m for f in nets]
        return torch.minimum(*q), sum(ratio(x, p, b) for x in xs) / m

    s, a, r, s2, terminal = rows(data)
    with torch.no_grad():
        p, b = dist(actor, s), dist(behavior, s)
        rho = ratio(a.clamp(-bound, bound).atanh(), p, b)
        q2, kl2 = evaluated(q_targets, s2, dist(actor, s2), dist(behavior, s2), noise["next"])
        shape = tau * alpha * rho.clamp(low, high)
        y = r + bonus + shape + 0.99 * (1 - terminal) * (q2 - alpha * kl2)
        assert high == INF or (rho < low).any() and (rho > high).any()
        kl_behavior, kl_step = (
            D.kl_divergence(p, other).sum(-1).mean() for other in (b, dist(last, s))
        )
    td = sum((f(torch.cat([s, a], 1))[:, 0] - y).square().mean() for f in qs)
    penalty = torch.zeros(()).double()
    if weight:
        a_pi = (p.mean + p.stddev * noise["penalty"][0]).tanh().requires_grad_()
        for f in qs:
            value = f(torch.cat([s, a_pi], 1)).sum()
            (g,) = torch.autograd.grad(value, a_pi, create_graph=True)
            penalty = penalty + g.square().sum(-1).mean()
    (td + weight * penalty).backward()
    for net, target_net in zip(qs, q_targets):
        torch.optim.SGD(net.parameters(), lr=0.02).step()
        for online, t in zip(net.parameters(), target_net.parameters()):
            t.data = 0.1 * online.data + 0.9 * t.data
    q, kl1 = evaluated(qs, s, dist(actor, s), b, noise["pi"])
    loss = (alpha * kl1 - q).mean()
    loss.backward()
    torch.optim.SGD(actor.parameters(), lr=0.02).step()

    assert_same(nets.q, *qs)
    assert_same(nets.q_target, *q_targets)
    assert_same(nets.actor, actor)
    for name in ("behavior", "last_actor"):
        pairs = zip(getattr(nets, name).parameters(), getattr(before, name).parameters())
        assert all(torch.equal(p, q) for p, q in pairs)
    assert nets.log_bc_weight == before.log_bc_weight
    assert all(p.grad is None for p in nets.parameters())
    expected = {
        "td_loss": td,
        "target": y.mean(),
        "actor_loss": loss,
        "rho_data": rho.mean(),
        "shaping": shape.mean(),
        "clipped": ((rho < low) | (rho > high)).float().mean(),
        "kl_behavior": kl_behavior,
        "kl_step": kl_step,
        "std": p.stddev.mean(),
        "q_data": sum(f(torch.cat([s, a], 1)).mean() for f in map(stack, [before.q] * 2, (0, 1)))
        / 2,
    }
    expected |= {"penalty": penalty} if weight else {}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(metrics[name], value.detach(), atol=1e-8, rtol=1e-6)


def test_clone_step_by_hand(data, monkeypatch):
    nets, args = make(data, clip=0.1)
    nets.log_bc_weight.data.fill_(-0.4)
    opt, before = optimizers(nets, SGD, 0.05), copy.deepcopy(nets)
    behavior, weight = stack(nets.behavior), math.exp(-0.4)
    monkeypatch.setattr(itrpo, "sample", lambda data, n, fields: (data.obs, data.action))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))
    metrics = itrpo.update_behavior(nets, opt, data, args)
    monkeypatch.undo()

    out = behavior(data.obs)
    mean, log_std = out[:, :2], out[:, 2:].clamp(-5, 2)
    dist, drawn = squashed(mean, log_std), (mean + 0.3 * log_std.exp()).tanh()
    clipped = data.action.clamp(-0.9, 0.9)
    nll, entropy = (-dist.log_prob(a).sum(-1).mean() for a in (clipped, drawn))
    (nll - weight * entropy).backward()
    torch.optim.SGD(behavior.parameters(), lr=0.05).step()
    assert_same(nets.behavior, behavior)
    expected = -0.4 - 0.05 * weight * (entropy.item() + 2)
    assert abs(nets.log_bc_weight.item() - expected) < 1e-8
    assert_close(metrics["nll"], nll.detach())
    assert_close(metrics["entropy"], entropy.detach())
    for name in ("actor", "q", "q_target", "last_actor"):
        pairs = zip(getattr(nets, name).parameters(), getattr(before, name).parameters())
        assert all(torch.equal(p, q) for p, q in pairs)


def test_without_shaping_it_is_brac(tiny_data, monkeypatch):
    """tau = 0, no bonus, no penalty: BRAC-v's two losses and gradients to the bit, in float32, with
    the same networks, samples and noise."""
    data = tiny_data(obs_dim=3, act_dim=2, n=16)
    torch.manual_seed(0)
    nets, args = Nets(data, Args()), plain(0.9, 0.0, samples=5)
    for net in (nets.behavior, nets.actor, nets.q, nets.q_target):
        orthogonal_(net, 1.0, 0.3)
    for net in (nets.behavior, nets.actor):
        net.biases[-1].data[2:] = -1.0  # no sample near a bound, where BRAC clips pi_b's actions
    nets.alpha = nn.Parameter(torch.tensor(0.9))  # BRAC keeps its alpha there
    monkeypatch.setattr(brac, "gaussian", itrpo.gaussian)  # its log-stds have other bounds
    brac_args = brac.Args(alpha=0.9, samples=5, q_samples=5)
    s, a, r, s2, terminal = rows(data)
    pi, behavior = itrpo.gaussian(nets.actor, s), itrpo.gaussian(nets.behavior, s)
    rho = log_ratio(pre_tanh(a, args), pi, behavior).detach()
    params = {"critic": list(nets.q.parameters()), "actor": list(nets.actor.parameters())}

    def losses(module, *critic_inputs, args):
        torch.manual_seed(7)
        critic, *_ = module.critic_loss(nets, s, a, r, s2, terminal, *critic_inputs, args)
        actor = module.actor_loss(nets, s, pi, behavior, args)
        actor = actor[0] if isinstance(actor, tuple) else actor
        loss = {"critic": critic, "actor": actor}
        return {
            k: [v.detach(), *torch.autograd.grad(v, params[k], retain_graph=True)]
            for k, v in loss.items()
        }

    ours, theirs = losses(itrpo, rho, args=args), losses(brac, args=brac_args)
    for k in params:
        assert torch.equal(ours[k][0], theirs[k][0]), k
        assert_close(ours[k], theirs[k])
    shaped = losses(itrpo, rho, args=plain(0.9, 0.5, samples=5))
    assert not torch.equal(shaped["critic"][0], theirs["critic"][0])
    assert torch.equal(shaped["actor"][0], theirs["actor"][0])


# ---- training loop ---------------------------------------------------------------------------


class FakeRun:
    """Counts steps instead of logging them."""

    device = torch.device("cpu")

    def __init__(self, args):
        self.loop = lambda steps, phase="train": range(1, steps + 1)
        self.cached = lambda *_: (None, False)

    def __getattr__(self, name):
        return lambda *_, **__: None


def test_the_last_actor_is_that_of_the_last_row(tiny_data, monkeypatch):
    """After step t the copy is the actor after step t - t % log_every; the update only reads it."""
    seen = []

    def update(nets, opt, data, args):
        bias = nets.actor.biases[-1]
        seen.append((bias[0].item() - start[0], nets.last_actor.biases[-1][0].item() - start[0]))
        bias.data.add_(1.0)
        return {}

    class Nets(itrpo.Nets):
        def __init__(self, data, args):
            super().__init__(data, args)
            start.append(self.actor.biases[-1][0].item())

    start = []
    monkeypatch.setattr(itrpo, "Run", FakeRun)
    monkeypatch.setattr(itrpo, "Nets", Nets)
    monkeypatch.setattr(itrpo, "load_dataset", lambda *_: (tiny_data(), None))
    monkeypatch.setattr(itrpo, "update_behavior", lambda *_: {})
    monkeypatch.setattr(itrpo, "update", update)
    itrpo.train(Args(bc_steps=1, steps=10, log_every=4))
    now, last = zip(*seen)
    assert_close(torch.tensor(now), torch.arange(10.0), atol=1e-5, rtol=0)
    expected = torch.tensor([0.0] * 4 + [4.0] * 4 + [8.0] * 2)
    assert_close(torch.tensor(last), expected, atol=1e-5, rtol=0)


def test_learning_rate_of_the_clone_falls_twice(tiny_data, monkeypatch):
    """1e-3, a tenth after 80% of the steps, a hundredth after 90%; for the entropy weight too."""
    seen = []

    def update_behavior(nets, opt, data, args):
        seen.append([opt.behavior.lr.item(), opt.bc_weight.lr.item()])
        return {}

    monkeypatch.setattr(itrpo, "Run", FakeRun)
    monkeypatch.setattr(itrpo, "load_dataset", lambda *_: (tiny_data(), None))
    monkeypatch.setattr(itrpo, "update_behavior", update_behavior)
    monkeypatch.setattr(itrpo, "update", lambda *_: {})
    itrpo.train(Args(bc_steps=20, steps=1))
    expected = [1e-3] * 16 + [1e-4] * 2 + [1e-5] * 2
    assert_close(torch.tensor(seen), torch.tensor(expected)[:, None].expand(20, 2))


@pytest.mark.parametrize(("entropy", "direction"), [(-2.5, 1), (-1.5, -1)])
def test_entropy_weight_rises_below_its_target(entropy, direction):
    """The target is -A = -2; the gradient is weight * (entropy + A)."""
    log_weight = nn.Parameter(torch.tensor(0.7))
    loss = itrpo.entropy_weight_loss(log_weight, torch.tensor(entropy), 2)
    (grad,) = torch.autograd.grad(loss, log_weight)
    assert_close(grad, math.exp(0.7) * torch.tensor(entropy + 2))
    Adam([log_weight], 0.01).step([grad])
    assert (log_weight - 0.7).sign() == direction


def test_policy_stands_between_raw_observations_and_the_bounds(data):
    data.obs_mean, data.obs_std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 4.0, 2.0])
    data.action_low, data.action_high = torch.tensor([-2.0, 0.0]), torch.tensor([6.0, 1.0])
    nets, args = make(data)
    raw = torch.randn(5, 3).double()
    mean = stack(nets.actor)((raw - data.obs_mean) / data.obs_std)[:, :2].tanh()
    expected = torch.stack([2 + 4 * mean[:, 0], 0.5 + 0.5 * mean[:, 1]], 1)
    assert_close(itrpo.policy(nets, raw, args), expected)


def play(**method):
    """Mean action and last metrics on a bandit: actions around -0.2, reward 10 a."""
    torch.manual_seed(0)
    a = (-0.2 + 0.2 * torch.randn(400).clamp(-2, 2))[:, None]
    s, one = torch.ones(400, 1), torch.ones(1)
    data = SimpleNamespace(obs=s, action=a, reward=10 * a[:, 0], next_obs=s, terminal=s[:, 0])
    data.action_low, data.action_high, data.obs_mean, data.obs_std = -one, one, 0 * one, one
    args = resolve(Args(batch_size=32, bonus=0.0, samples=4, **method))
    nets = Nets(data, args)
    opt = optimizers(nets, Adam, 1e-3)
    opt.behavior.lr.fill_(3e-3)
    for _ in range(150):
        clone = itrpo.update_behavior(nets, opt, data, args)
    for _ in range(200):
        metrics = itrpo.update(nets, opt, data, args)
        assert all(x.ndim == 0 and x.isfinite() for x in (clone | metrics).values())
    return itrpo.policy(nets, s[:1], args).item(), metrics


def test_bandit_moves_as_far_as_alpha_lets_it():
    """Much KL is the clone; little of it climbs; what it costs is what is logged."""
    held, strict = play(kl_coef=100.0)
    moved, loose = play(kl_coef=0.9)
    assert abs(held + 0.2) < 0.1 and moved > held + 0.15
    assert loose["kl_behavior"] > 5 * strict["kl_behavior"]
    assert loose["rho_data"] < strict["rho_data"]
