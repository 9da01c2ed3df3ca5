"""common.py, helper by helper, against oracles that share no code with it."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributions as D
from oracles import stack
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from common import (
    MLP,
    Adam,
    Data,
    InputError,
    ScalarMLP,
    Scaling,
    dequantize,
    glorot_,
    graphed,
    largest_value,
    normalize_obs,
    orthogonal_,
    polyak,
    sample,
    sample_tanh_normal,
    share_at_bounds,
    tanh_log_det,
    tanh_normal_log_prob,
)

# ---- networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [None, 3])
@pytest.mark.parametrize("sizes", [(5, 8, 8, 1), (5, 8, 2)])
def test_what_compilers_see_is_the_same_function(members, sizes, monkeypatch):
    """Values and gradients, in float64."""
    torch.manual_seed(0)
    net, x = MLP(*sizes, members=members, activation="gelu").double(), torch.randn(7, 5).double()
    plain = net(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    seen = net(x)
    assert_close(seen, plain, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y.sin().sum(), list(net.parameters())) for y in (seen, plain)]
    assert_close(*gradients, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("move", [copy.deepcopy, nn.Module.double, nn.Module.cpu])
def test_layers_are_the_parameters_wherever_they_move(move):
    net = move(nn.Sequential(ScalarMLP(3, 4, members=2, layer_norm=True)))[0]
    lists = (net.weights, net.biases, net.gains, net.shifts)
    layers = [*zip(*net.layers), *zip(*net.norms)]
    for own, params in zip(layers, lists, strict=True):
        assert all(x is p for x, p in zip(own, params, strict=True))


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


@pytest.mark.parametrize("members", [None, 2])
def test_glorot_initialization(members):
    torch.manual_seed(0)
    net = MLP(6, 40, 30, members=members)
    assert glorot_(net) is net
    for w, b in zip(net.weights, net.biases, strict=True):
        bound = math.sqrt(6 / sum(w.shape[-2:]))
        assert not b.any() and 0.95 * bound < w.abs().max() <= bound
        assert_close(w.std(), torch.tensor(bound / math.sqrt(3)), atol=0, rtol=0.1)
    assert members is None or not torch.equal(net.weights[0][0], net.weights[0][1])


def in_torch(net, activation, eps, member=None):
    """The same network out of torch.nn's own layers: linear, activation, layer normalization."""
    layers = []
    for i, (w, b) in enumerate(zip(net.weights, net.biases, strict=True)):
        w, b = (w, b) if member is None else (w[member], b[member, 0])
        linear = nn.Linear(*w.shape, dtype=w.dtype)
        linear.weight.data, linear.bias.data = w.detach().T.clone(), b.detach().clone()
        layers.append(linear)
        if i < len(net.weights) - 1:
            layers.append(activation)
            if net.gains:
                gain, shift = net.gains[i], net.shifts[i]
                pair = (gain, shift) if member is None else (gain[member, 0], shift[member, 0])
                norm = nn.LayerNorm(w.shape[1], eps=eps, dtype=w.dtype)
                norm.weight.data, norm.bias.data = (x.detach().clone() for x in pair)
                layers.append(norm)
    return nn.Sequential(*layers)


ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(approximate="tanh"), "silu": nn.SiLU()}


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("members", [None, 3])
def test_activations_and_layer_norms_are_torchs(members, activation, layer_norm, eps):
    torch.manual_seed(0)
    options = dict(activation=activation, layer_norm=layer_norm, norm_eps=eps)
    net = MLP(5, 8, 6, 2, members=members, **options).double()
    for p in (*net.gains, *net.shifts):
        assert torch.equal(p, torch.full_like(p, p.flatten()[0].item()))  # ones, or zeros
        p.data += 0.3 * torch.randn_like(p)
    x = torch.randn(7, 5).double()
    out = net(x)
    coefficients = torch.randn(7, 2).double()
    for e in range(members or 1):
        member = e if members else None
        oracle = in_torch(net, ACTIVATIONS[activation], eps, member)
        own = out[e] if members else out
        assert_close(own, oracle(x))
        if members:
            assert_close(net(x, member=e), oracle(x))
        params = [*net.gains, *net.weights]
        grads = torch.autograd.grad((own * coefficients).sum(), params, retain_graph=True)
        (oracle(x) * coefficients).sum().backward()
        norms = [m.weight.grad for m in oracle if isinstance(m, nn.LayerNorm)]
        linears = [m.weight.grad.T for m in oracle if isinstance(m, nn.Linear)]
        for found, expected in zip(grads, norms + linears, strict=True):
            assert_close((found[e] if members else found).view_as(expected), expected)
    assert len(net.gains) == len(net.norms) == 2 * layer_norm


# ---- updates ---------------------------------------------------------------------------------


class Called(TorchFunctionMode):
    """The names of torch's functions that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adam_is_torch_adam(compiling, eps):
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

    params = [nn.Parameter(p.clone()) for p in start]
    opt, code = Adam(params, lr=1e-2, eps=eps), []

    def backend(graph, inputs):
        code.append(graph.code)
        return graph.forward

    step = torch.compile(opt.step, backend=backend, fullgraph=True) if compiling else opt.step
    with torch.no_grad():  # the first call compiles
        for g, lr in zip(grads, lrs):
            opt.lr.fill_(lr)
            step([x.clone() for x in g])
    if compiling:
        assert code and all("_foreach_addcmul_" in x and "_fused" not in x for x in code)
    else:
        with Called() as called:
            Adam([nn.Parameter(torch.ones(2))], lr=0.1).step([torch.ones(2)])
        assert "_fused_adam_" in called.names and "_foreach_addcmul_" not in called.names
    assert opt.count == 20
    for p, q in zip(params, expected):
        assert_close(p, q, atol=3e-6, rtol=0)


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
    data.action[:2, 0] = 1 - 1e-6 * torch.tensor([0.7, 1.3])
    assert share_at_bounds(data, 0.05) == 0.125
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


def test_normalization_computes_in_float64(tiny_data):
    """In float32, the mean of a large constant column is not the constant."""
    data = tiny_data(n=20_000)
    data.obs[:, 0], data.obs[:, 1] = 12345.678, 1e4 + torch.rand(20_000)
    expected = data.obs.double()
    normalize_obs(data, eps=1e-3)
    assert torch.equal(data.obs[:, 0], torch.zeros(20_000))
    assert_close(data.obs_mean, expected.mean(0).float(), rtol=0, atol=0)
    deviation = expected.std(0, correction=0) + 1e-3
    assert_close(data.obs_std, deviation.float(), rtol=0, atol=0)


def test_actions_reach_the_bounds_of_the_task(tiny_data):
    data = tiny_data(act_dim=2)
    data.action_low, data.action_high = torch.tensor([-2.0, 1.0]), torch.tensor([4.0, 1.5])
    scaling = Scaling(data)
    a = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.5]])
    assert_close(scaling.action(a), torch.tensor([[-2.0, 1.0], [4.0, 1.5], [1.0, 1.375]]))


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


def test_five_tensors_make_data():
    """An episode starts after a terminal and where a row does not continue the one before."""
    obs = torch.arange(12.0).view(6, 2)
    next_obs = torch.cat([obs[1:], obs[:1]])
    next_obs[3] += 1  # a cut that nothing marks
    terminal, reward = torch.tensor([0.0, 1, 0, 0, 0, 0]), torch.arange(6.0)
    data = Data(obs, torch.zeros(6, 3), reward, next_obs, terminal)
    assert data.episode.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.episode_return.tolist() == [1, 5, 9]
    assert data.action_low.tolist() == [-1] * 3 and data.action_high.tolist() == [1] * 3
    assert data.obs_mean.tolist() == [0, 0] and data.obs_std.tolist() == [1, 1]
    assert (data.name, data.digest) == ("data", "")
    assert Scaling(data).action(torch.ones(1, 3)).tolist() == [[1, 1, 1]]
    kept = Data(**{**vars(data), "episode": torch.zeros(6).long(), "episode_return": reward[:1]})
    assert not kept.episode.any() and kept.episode_return.tolist() == [0]


@pytest.mark.parametrize(
    ("gamma", "bonus", "largest"),
    [(0.9, 0.0, 40.0), (0.9, 1.0, 50.0), (0.9, -1.0, 50.0), (0, 0, 4)],
)
def test_largest_value_is_the_largest_reward_for_ever(gamma, bonus, largest, capsys):
    data = SimpleNamespace(reward=torch.tensor([1.0, -4.0, 2.0]))
    assert abs(largest_value(data, gamma, bonus) - largest) < 1e-4
    assert capsys.readouterr().out == ""


# ---- what the files make of it ---------------------------------------------------------------

# ---- running ---------------------------------------------------------------------------------


def test_compile_on_an_older_torch_is_one_line(monkeypatch):
    import torch._dynamo

    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace())
    with pytest.raises(InputError, match="--compile needs torch") as caught:
        graphed(lambda net: {}, nn.Linear(1, 1), compile=True)
    assert "\n" not in str(caught.value)


def test_adam_takes_gradients_of_any_layout():
    """A gradient that autograd returns transposed moves the weights as its contiguous copy does."""
    weights = [torch.ones(3, 3, requires_grad=True) for _ in range(2)]
    grad = torch.arange(9.0).view(3, 3) - 4
    for w, g in zip(weights, (grad, grad.T.contiguous().T)):
        Adam([w], 0.1).step([g])
    assert not grad.T.contiguous().T.is_contiguous()
    assert_close(weights[0], weights[1])
