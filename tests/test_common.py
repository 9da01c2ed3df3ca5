"""common.py, helper by helper, against oracles that share no code with it."""

import copy
import inspect
import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributions as D
from oracles import stack
from torch import nn
from torch.testing import assert_close

import common
from common import (
    MLP,
    Adam,
    InputError,
    ScalarMLP,
    Scaling,
    dequantize,
    evaluate,
    graphed,
    minimize,
    normal_log_prob,
    normalize_obs,
    orthogonal_,
    parse,
    polyak,
    sample,
    sample_tanh_normal,
    seed_everything,
    share_at_bounds,
    tanh_log_det,
    tanh_normal_log_prob,
)

# ---- networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(7,), (3, 7), (1, 7)])
def test_members_are_separate_linear_stacks(lead):
    torch.manual_seed(0)
    net = MLP(5, 8, 6, 2, members=3).double()
    s, a = torch.randn(*lead, 3).double(), torch.randn(*lead, 2).double()
    x, out = torch.cat([s, a], -1), net(s, a)
    assert out.shape == (3, 7, 2)
    coefficients = torch.randn(3, 7, 2).double()
    grads = torch.autograd.grad((out * coefficients).sum(), list(net.parameters()))
    for e in range(3):
        oracle = stack(net, e)
        own = x if len(lead) == 1 else x.expand(3, 7, 5)[e]
        expected = oracle(own)
        assert_close(out[e], expected)
        assert_close(net(own, member=e), expected)
        (expected * coefficients[e]).sum().backward()
        for i, linear in enumerate(m for m in oracle if isinstance(m, nn.Linear)):
            assert_close(grads[i][e], linear.weight.grad.T)
            assert_close(grads[i + 3][e, 0], linear.bias.grad)


@pytest.mark.parametrize("shape", [(7, 5), (4, 7, 5)])
def test_one_network_is_a_linear_stack(shape):
    torch.manual_seed(0)
    net, x = MLP(5, 8, 6, 2).double(), torch.randn(shape).double()
    kept = x.clone()
    assert_close(net(x), stack(net)(x))
    assert_close(net(x[..., :3], x[..., 3:]), stack(net)(x))
    assert torch.equal(x, kept)


def test_scalar_network_has_no_last_axis():
    torch.manual_seed(0)
    x = torch.randn(7, 5)
    single, twin = ScalarMLP(5, 8), ScalarMLP(5, 8, members=2)
    assert_close(single(x), stack(single)(x)[:, 0])
    assert twin(x).shape == (2, 7)
    assert_close(twin(x)[1], stack(twin, 1)(x)[:, 0])
    assert_close(twin(x[:, :2], x[:, 2:], member=1), stack(twin, 1)(x)[:, 0])


@pytest.mark.parametrize("members", [None, 3])
def test_initial_values_are_those_of_linear(members):
    """Uniform in +-1/sqrt(inputs), for weights and biases, each member drawn on its own."""
    torch.manual_seed(0)
    net = MLP(16, 400, 9, members=members)
    for n_in, w, b in zip((16, 400), net.weights, net.biases, strict=True):
        bound = n_in**-0.5
        for values in (w, b) if members is None else (*w, *b, w, b):
            assert values.abs().max() <= bound
            test = scipy.stats.kstest(values.detach().flatten(), "uniform", (-bound, 2 * bound))
            assert test.pvalue > 1e-3
    if members:
        assert not torch.equal(net.weights[0][0], net.weights[0][1])


@pytest.mark.parametrize(
    "move", [copy.deepcopy, lambda net: net.double(), lambda net: net.to("meta")]
)
def test_layers_are_the_parameters_wherever_they_move(move):
    """A move to the meta device makes new parameters, as one to another backend may."""
    net = move(nn.Sequential(ScalarMLP(3, 4, members=2)))[0]
    pairs = list(zip(net.weights, net.biases, strict=True))
    assert len(net.layers) == 2
    assert all(w is v and b is c for (w, b), (v, c) in zip(net.layers, pairs, strict=True))


@pytest.mark.parametrize("lead", [(50,), (2, 50)])
def test_input_gradient_is_a_double_backward(lead):
    torch.manual_seed(0)
    net = orthogonal_(ScalarMLP(5, 16, 16, 16, members=2).double(), 1.4, 1.0)
    x = torch.randn(*lead, 5).double()
    grad = net.input_gradient(x[..., :3], x[..., 3:])
    assert grad.shape == (2, 50, 5)
    weights = list(net.weights)
    found = torch.autograd.grad(grad.square().sum(-1).mean(1).sum(), weights)
    for e in range(2):
        oracle, own = stack(net, e), x.expand(2, 50, 5)[e].clone().requires_grad_()
        (g,) = torch.autograd.grad(oracle(own).sum(), own, create_graph=True)
        assert_close(grad[e], g)
        g.square().sum(-1).mean().backward()
        for i, linear in enumerate(m for m in oracle if isinstance(m, nn.Linear)):
            assert_close(found[i][e], linear.weight.grad.T)


def test_input_gradient_is_a_difference_quotient():
    torch.manual_seed(0)
    net, x, h = ScalarMLP(4, 16, 16, members=2).double(), torch.randn(20, 4).double(), 1e-7
    steps = torch.eye(4).double() * h
    quotient = [(net(x + step) - net(x - step)) / (2 * h) for step in steps]
    assert_close(net.input_gradient(x), torch.stack(quotient, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("members", [None, 2])
def test_orthogonal_initialization(members):
    torch.manual_seed(0)
    net = MLP(6, 10, 8, 3, members=members)
    assert orthogonal_(net, hidden_gain=1.5, last_gain=0.01) is net
    for gain, w, b in zip((1.5, 1.5, 0.01), net.weights, net.biases, strict=True):
        assert not b.any()
        for m in w.detach().view(-1, *w.shape[-2:]):
            m = m if m.shape[0] >= m.shape[1] else m.T
            assert_close(m.T @ m / gain**2, torch.eye(m.shape[1]), atol=1e-5, rtol=0)
    assert members is None or not torch.equal(net.weights[0][0], net.weights[0][1])


# ---- updates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adam_is_torch_adam(compiling, eps, monkeypatch):
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(3), torch.randn(())]
    scales = (1.0, 1e-3, 100.0)  # with eps = 1e-3 the second is damped
    grads = [[torch.randn_like(p) * k for p, k in zip(start, scales)] for _ in range(20)]
    lrs = [1e-2] * 10 + [1e-3] * 10
    expected = [nn.Parameter(p.clone()) for p in start]
    oracle = torch.optim.Adam(expected, lr=1e-2, eps=eps)
    for g, lr in zip(grads, lrs):
        oracle.param_groups[0]["lr"] = lr
        for p, x in zip(expected, g):
            p.grad = x.clone()
        oracle.step()

    def other_branch(*_, **__):
        raise AssertionError("the other branch ran")

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(torch, "_fused_adam_" if compiling else "_foreach_lerp_", other_branch)
    params = [nn.Parameter(p.clone()) for p in start]
    opt = Adam(params, lr=1e-2, eps=eps)
    for g, lr in zip(grads, lrs):
        opt.lr.fill_(lr)
        opt.step([x.clone() for x in g])
    assert opt.count == 20
    for p, q in zip(params, expected):
        assert_close(p, q, atol=3e-6, rtol=0)


def test_adam_goes_on_from_its_state():
    torch.manual_seed(0)
    grads = [torch.randn(5) for _ in range(6)]
    whole, first = (Adam([nn.Parameter(torch.ones(5))], lr=1e-2) for _ in range(2))
    for opt, steps in ((whole, grads), (first, grads[:3])):
        opt.lr.fill_(3e-3)
        for g in steps:
            opt.step([g])
    second = Adam([nn.Parameter(first.params[0].detach().clone())], lr=1e-2)
    for new, old in zip(second.state(), first.state(), strict=True):
        new.copy_(old)
    for g in grads[3:]:
        second.step([g])
    assert torch.equal(whole.params[0], second.params[0])


def test_minimize_touches_its_own_parameters_only():
    torch.manual_seed(0)
    nets = nn.ModuleDict({"own": nn.Linear(3, 2), "other": nn.Linear(2, 1)})
    kept, x = copy.deepcopy(nets), torch.randn(8, 3, requires_grad=True)
    opt = Adam(nets["own"].parameters(), lr=1e-2)
    loss = nets["other"](nets["own"](x)).square().mean()
    returned = minimize(opt, loss)
    assert not returned.requires_grad and returned == loss
    assert x.grad is None and all(p.grad is None for p in nets.parameters())
    for p, q in zip(nets["other"].parameters(), kept["other"].parameters()):
        assert torch.equal(p, q)
    oracle = torch.optim.Adam(kept["own"].parameters(), lr=1e-2)
    kept["other"](kept["own"](x)).square().mean().backward()
    oracle.step()
    for p, q in zip(nets["own"].parameters(), kept["own"].parameters()):
        assert_close(p, q, atol=1e-7, rtol=0)


def test_polyak_average():
    target, online = MLP(2, 3, 1, members=2), MLP(2, 3, 1, members=2)
    before = copy.deepcopy(target), copy.deepcopy(online)
    polyak(target, online, 0.25)
    now = zip(target.parameters(), online.parameters(), *(m.parameters() for m in before))
    for t, o, old_t, old_o in now:
        assert_close(t, 0.25 * old_o + 0.75 * old_t, atol=1e-7, rtol=0)
        assert torch.equal(o, old_o)


# ---- densities -------------------------------------------------------------------------------


def test_tanh_log_det():
    x = torch.linspace(-5, 5, 201).double().requires_grad_()
    naive = torch.log(1 - torch.tanh(x) ** 2)
    assert_close(tanh_log_det(x), naive, atol=1e-10, rtol=0)
    (grad,) = torch.autograd.grad(tanh_log_det(x).sum(), x)
    assert_close(grad, -2 * torch.tanh(x), atol=1e-10, rtol=0)
    for dtype in (torch.float32, torch.float64):  # the tail is log 4 - 2 |x|
        ends = torch.tensor([-50.0, 50.0], dtype=dtype)
        assert torch.log(1 - torch.tanh(ends) ** 2).isinf().all()
        assert_close(tanh_log_det(ends), 2 * np.log(2) - 2 * ends.abs())


def test_normal_log_prob():
    torch.manual_seed(0)
    x, mean, log_std = torch.randn(3, 4, 5).double()
    expected = D.Normal(mean, log_std.exp()).log_prob(x)
    assert_close(normal_log_prob(x, mean, log_std), expected)


def test_tanh_normal_sample_and_density():
    """Value and gradient of log pi, and the reparameterized gradient of the action."""
    torch.manual_seed(0)
    mean = torch.randn(6, 3).double().requires_grad_()
    log_std = (0.3 * torch.randn(6, 3).double() - 1).requires_grad_()
    a, log_prob, x = sample_tanh_normal(mean, log_std)
    assert log_prob.shape == (6,)
    noise = ((x - mean) / log_std.exp()).detach()
    a_oracle = torch.tanh(mean + log_std.exp() * noise)
    policy = D.TransformedDistribution(D.Normal(mean, log_std.exp()), D.TanhTransform())
    log_prob_oracle = policy.log_prob(a_oracle).sum(-1)
    assert_close(a, a_oracle)
    assert_close(log_prob, log_prob_oracle)
    weight = torch.randn(6).double()
    for found, expected in ((a.sum(-1), a_oracle.sum(-1)), (log_prob, log_prob_oracle)):
        found = torch.autograd.grad((found * weight).sum(), (mean, log_std), retain_graph=True)
        expected = torch.autograd.grad(
            (expected * weight).sum(), (mean, log_std), retain_graph=True
        )
        assert_close(found, expected)


def test_tanh_normal_is_drawn_from_its_own_normal():
    torch.manual_seed(0)
    mean, log_std = torch.full((20_000, 1), 0.7), torch.full((20_000, 1), -1.2)
    _, _, x = sample_tanh_normal(mean, log_std)
    assert scipy.stats.kstest(x.flatten(), "norm", (0.7, np.exp(-1.2))).pvalue > 1e-3


def test_tanh_normal_is_finite_where_tanh_is_one():
    torch.manual_seed(0)
    mean = torch.tensor([[-40.0], [40.0]], requires_grad=True)
    a, log_prob, x = sample_tanh_normal(mean, torch.zeros(2, 1))
    assert a.detach().flatten().tolist() == [-1, 1]
    expected = D.Normal(mean, 1.0).log_prob(x) - (2 * np.log(2) - 2 * x.abs())
    assert_close(log_prob, expected[:, 0])
    (grad,) = torch.autograd.grad(log_prob.sum(), mean)
    assert_close(grad, torch.tensor([[-2.0], [2.0]]))


def test_tanh_normal_log_prob_against_torch_distributions():
    torch.manual_seed(0)
    mean, log_std = torch.randn(50, 3).double(), torch.randn(50, 3).double() * 0.5
    oracle = D.TransformedDistribution(D.Normal(mean, log_std.exp()), D.TanhTransform())
    a = oracle.sample()
    expected = oracle.log_prob(a).sum(-1)
    assert_close(tanh_normal_log_prob(a, mean, log_std, 1e-9), expected, rtol=1e-5, atol=1e-5)
    edge = torch.ones(50, 3).double()
    inside = tanh_normal_log_prob(edge * 0.99, mean, log_std, 1e-6)
    assert_close(tanh_normal_log_prob(edge, mean, log_std, 0.01), inside)
    assert_close(tanh_normal_log_prob(-edge, -mean, log_std, 0.01), inside)


def test_share_at_bounds(capsys):
    data = SimpleNamespace(action=torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.9999, 0.1], [0, 0]]))
    assert share_at_bounds(data, 0.0) == 0.25 and "25% of the action" in capsys.readouterr().out
    assert share_at_bounds(data, 0.05) == 0.25 and capsys.readouterr().out == ""
    data.action[:2, 0] = 0.99
    assert share_at_bounds(data, 0.0) == 0 and capsys.readouterr().out == ""


def test_dequantize_spreads_only_what_lies_at_a_bound():
    a = torch.tensor([[-1.0, 1.0, 0.999, 0.0]]).repeat(5000, 1)
    torch.manual_seed(0)
    spread = dequantize(a, 0.05)
    assert torch.equal(spread[:, 2:], a[:, 2:])
    for column, bound in ((spread[:, 0], -1), (spread[:, 1], 1)):
        inward = 1 - bound * column
        assert 0 <= inward.min() < 1e-3 and 0.049 < inward.max() <= 0.05
        assert abs(inward.mean() - 0.025) < 1e-3
    assert torch.equal(dequantize(a, 0.0), a)


# ---- data ------------------------------------------------------------------------------------


def test_normalized_observations_and_the_policy_see_the_same(tiny_data):
    data = tiny_data(obs_dim=3, n=40)
    data.obs[:, 2] = 7  # a constant column stays finite
    obs, next_obs = data.obs.numpy().copy(), data.next_obs.numpy().copy()
    normalize_obs(data, eps=1e-3)
    mean, std = obs.mean(0), obs.std(0) + 1e-3  # numpy's std is the population's
    assert_close(data.obs, torch.tensor((obs - mean) / std), atol=1e-4, rtol=1e-4)
    assert_close(data.next_obs, torch.tensor((next_obs - mean) / std), atol=1e-4, rtol=1e-4)
    scaling = Scaling(data)
    assert torch.equal(scaling.obs(torch.tensor(obs)), data.obs)
    fresh = Scaling(tiny_data(obs_dim=3, n=40))
    fresh.load_state_dict(scaling.state_dict())
    assert torch.equal(fresh.obs(torch.tensor(obs)), data.obs)


def test_actions_reach_the_bounds_of_the_task(tiny_data):
    data = tiny_data(act_dim=2)
    data.action_low, data.action_high = torch.tensor([-2.0, 1.0]), torch.tensor([4.0, 1.5])
    scaling = Scaling(data)
    a = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.5]])
    assert_close(scaling.action(a), torch.tensor([[-2.0, 1.0], [4.0, 1.5], [1.0, 1.375]]))


def test_without_normalization_observations_pass(tiny_data):
    data = tiny_data()
    assert torch.equal(Scaling(data).obs(data.obs), data.obs)


def test_sampled_rows_belong_together(tiny_data):
    data = tiny_data(obs_dim=1, act_dim=1, n=10)
    i = torch.arange(10.0)
    data.obs, data.action, data.reward = i[:, None], i[:, None] + 100, i + 200
    data.next_obs, data.terminal = i[:, None] + 300, i + 400
    torch.manual_seed(0)
    s, a, r, s2, terminal = sample(data, 5000)
    assert r.shape == terminal.shape == (5000,) and s.shape == a.shape == s2.shape == (5000, 1)
    for x, shift in ((a[:, 0], 100), (r, 200), (s2[:, 0], 300), (terminal, 400)):
        assert torch.equal(x - shift, s[:, 0])
    assert scipy.stats.chisquare(torch.bincount(s[:, 0].long(), minlength=10)).pvalue > 1e-3
    s2, s = sample(data, 50, ("next_obs", "obs"))
    assert torch.equal(s2 - 300, s)


# ---- running ---------------------------------------------------------------------------------


def test_graphed_on_a_cpu_is_the_plain_call():
    calls = []

    def update(net, extra, flag, number=0):
        calls.append((net, extra, flag, number))
        return {"loss": len(calls)}

    net, extra = nn.Linear(1, 1), object()
    step = graphed(update, net, extra)
    assert calls == []
    assert step(True) == {"loss": 1} and step(False, 7) == {"loss": 2}
    assert calls == [(net, extra, True, 0), (net, extra, False, 7)]


def test_compile_on_an_older_torch_is_one_line(monkeypatch):
    import torch._dynamo

    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace())
    with pytest.raises(InputError, match="--compile needs torch") as caught:
        graphed(lambda net: {}, nn.Linear(1, 1), compile=True)
    assert "\n" not in str(caught.value)


def test_seed_everything():
    def draws(seed):
        seed_everything(seed)
        return torch.rand(3).tolist() + np.random.rand(3).tolist()

    assert draws(5) == draws(5)
    assert not set(draws(5)) & set(draws(6))
    draws(2**40)  # numpy alone takes 32 bits


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_bad_precision_is_one_line(precision):
    with pytest.raises(InputError, match="--precision is 'low': give auto, highest"):
        common.choose_device("cpu", "low")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", ""])
def test_bad_device_is_one_line(device, precision):
    with pytest.raises(InputError, match="--device.*give cpu, cuda or auto") as caught:
        common.choose_device(device, "highest")
    assert "\n" not in str(caught.value)


def test_every_cpu_thread_flushes_subnormals():
    code = (
        "import torch; from common import choose_device; choose_device('cpu', 'auto');"
        "print(int((torch.full((4_000_000,), 1e-38) * 0.1).count_nonzero()))"
    )
    env = dict(os.environ, OMP_NUM_THREADS="2", PYTHONPATH=os.path.dirname(common.__file__))
    assert subprocess.check_output([sys.executable, "-c", code], env=env) == b"0\n"


@pytest.mark.parametrize(
    ("flag", "right"),
    [("--gamma 1", "from 0 to below 1"), ("--gamma 1.5", "from 0"), ("--polyak 2", "1 at most"),
     ("--lr -1", "above 0"), ("--lr nan", "above 0"), ("--alpha nan", "a number")],
)  # fmt: skip
def test_numbers_that_cannot_work_are_one_line(flag, right):
    import td3_bc

    with pytest.raises(InputError, match=rf"{flag.split()[0]} is .*: give .*{right}"):
        parse(td3_bc.Args, td3_bc.PRESETS, flag.split())


def test_device_and_precision(precision):
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    for asked in ("medium", "highest"):
        assert common.choose_device("auto", asked).type == expected
        assert torch.get_float32_matmul_precision() == asked
    device = common.choose_device("cpu", "auto")
    assert device == torch.device("cpu")
    assert torch.get_float32_matmul_precision() in ("medium", "highest")
    torch.manual_seed(0)
    a, b = torch.randn(2, 256, 256)
    assert_close((a @ b).double(), a.double() @ b.double(), atol=1e-4, rtol=0)


class FakeEnv:
    """Pays (seed, then twice that ...) for `length` steps; checks what it is given."""

    def __init__(self, length, terminal):
        self.length, self.terminal, self.seeds, self.actions = length, terminal, [], []

    def reset(self, seed):
        self.seeds.append(seed)
        self.t = 0
        return np.array([seed, 0], np.float32), {}

    def step(self, action):
        assert self.t < self.length, "stepped after its episode ended"
        self.t += 1
        self.actions.append(action)
        over = self.t == self.length
        obs = np.array([self.seeds[-1], self.t], np.float32)
        return obs, self.seeds[-1] * self.t, over and self.terminal, over and not self.terminal, {}


def test_evaluate_runs_one_episode_in_each_environment():
    envs = [FakeEnv(3, True), FakeEnv(1, False), FakeEnv(5, False)]
    torch.manual_seed(0)
    state = torch.get_rng_state()

    def act(obs):
        assert obs.shape == (3, 2) and obs.dtype == torch.float32
        return obs * 10 + torch.rand(3, 2)

    returns = evaluate(act, envs, 50, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert [env.seeds for env in envs] == [[50], [51], [52]]
    assert returns.tolist() == [50 * 6, 51, 52 * 15]  # undiscounted, 1 + 2 + ... + length
    assert [len(env.actions) for env in envs] == [3, 1, 5]
    for i, env in enumerate(envs):
        due = [[10 * (50 + i), 10 * t] for t in range(env.length)]
        noise = np.array(env.actions) - due
        assert (noise > -1e-4).all() and (noise < 1 + 1e-4).all()

    again = [FakeEnv(3, True), FakeEnv(1, False), FakeEnv(5, False)]
    torch.manual_seed(123)
    evaluate(act, again, 50, torch.device("cpu"))
    assert np.array_equal(again[2].actions, envs[2].actions)  # its own random stream


def test_evaluate_needs_no_gradient():
    net = nn.Linear(2, 2)
    assert evaluate(net, [FakeEnv(1, True)], 1, torch.device("cpu")).tolist() == [1]


# ---- command line ----------------------------------------------------------------------------


@dataclass
class Args:
    env: str = "hopper-medium"
    """dataset"""
    seed: int = 0
    """random seed"""
    steps: int = 1000
    """gradient steps"""
    batch_size: int = 256
    """rows"""
    precision: str = "auto"
    """fp32 products"""
    resume: bool = False
    """go on"""
    overwrite: bool = False
    """replace"""
    alpha: float = 2.5
    """weight of Q"""


PRESETS = {
    "*": dict(steps=10, alpha=1.0),
    "hopper-*": dict(steps=20, batch_size=32),
    "hopper-medium*": dict(steps=30),
    "ant[12]": dict(alpha=9.0),
}


def parsed(line=""):
    return parse(Args, PRESETS, line.split())


def test_presets_match_by_pattern_and_later_rows_win():
    def values(line):
        args = parsed(line)
        return args.steps, args.batch_size, args.alpha

    assert values("") == (30, 32, 1.0)  # the default --env has presets too
    assert values("--env hopper-expert") == (20, 32, 1.0)
    assert values("--env=ant2") == (10, 256, 9.0)
    assert values("--env ant3") == (10, 256, 1.0)
    assert parsed("--env ant2").preset == dict(steps=10, alpha=9.0)
    assert parsed("--env ant2").env == "ant2"
    assert parse(Args, {}, []).preset == {}
    assert vars(parse(Args, {}, [])) == vars(Args()) | {"preset": {}}


def test_typed_flag_wins_even_at_its_default():
    args = parsed("--steps 1000 --alpha 2.5 --batch-size 256")
    assert (args.steps, args.alpha, args.batch_size) == (1000, 2.5, 256)
    assert parsed("--batch_size 256").batch_size == 256  # the other spelling
    assert parsed("--resume").resume and not parsed("").resume


@pytest.mark.parametrize(
    ("line", "steps", "batch_size"),
    [
        ("--steps 1e5", 100_000, 32),
        ("--steps 2.5e3 --batch-size=1e3", 2500, 1000),
        ("--steps=1E+2 --batch_size 64", 100, 64),
    ],
)
def test_whole_numbers_as_powers_of_ten(line, steps, batch_size):
    args = parsed(line)
    assert (args.steps, args.batch_size) == (steps, batch_size)
    assert type(args.steps) is type(args.batch_size) is int


def test_only_whole_numbers_are_rewritten():
    assert parsed("--alpha 1e5").alpha == 1e5
    assert parsed("--env 1e5").env == "1e5"
    assert parsed("--alpha=-1e-1").alpha == -0.1
    assert parsed("--env a=b").env == parsed("--env=a=b").env == "a=b"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--batch-size 0", "--batch-size is 0"),
        ("--steps -5", "--steps is -5"),
        ("--seed -1", "--seed is -1"),
    ],
)
def test_bad_values_are_one_line(line, words):
    with pytest.raises(InputError) as caught:
        parsed(line)
    assert isinstance(caught.value, SystemExit)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_help_shows_the_defaults_of_the_env(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--env ant1 --help")
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "helper by helper" in out and "weight of Q" in out and "9.0" in out


@pytest.mark.parametrize("line", ["--nonsense 3", "--steps 1.5", "--steps 1.5e0", "--alpha x"])
def test_flags_that_cannot_be_read_exit_nonzero(line, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(line)
    assert caught.value.code not in (0, None)
    assert line.split()[0].strip("-") in "".join(capsys.readouterr())


def test_command_line_is_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--seed", "4"])
    assert parse(Args, {}).seed == 4
    assert inspect.signature(parse).parameters["argv"].default is None


def test_adam_takes_gradients_of_any_layout():
    """A gradient that autograd returns transposed moves the weights as its contiguous copy does."""
    weights = [torch.ones(3, 3, requires_grad=True) for _ in range(2)]
    grad = torch.arange(9.0).view(3, 3) - 4
    for w, g in zip(weights, (grad, grad.T.contiguous().T)):
        Adam([w], 0.1).step([g])
    assert not grad.T.contiguous().T.is_contiguous()
    assert_close(weights[0], weights[1])
