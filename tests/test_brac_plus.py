"""brac_plus.py and what brac_plus_acml.py shares with it: the clones and the bound on the KL, MMD,
the gated penalty, the multipliers, training, and what a task sets in brac_plus.py."""

import copy
import math
from types import SimpleNamespace

import brac_plus
import brac_plus_acml
import numpy as np
import pytest
import torch
import torch.distributions as D
from golden.tools import Inject
from oracles import in_double
from stand_in import PlainRun
from torch.nn.functional import softplus
from torch.testing import assert_close

from common import InputError, ScalarMLP
from run import parse

FILES = (brac_plus, brac_plus_acml)


@pytest.fixture(params=FILES, ids=lambda file: file.__name__)
def file(request):
    return request.param


@pytest.fixture
def data(tiny_data):
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def constant(mean, std):
    """A network with one output for all rows: N(mean, std^2)."""
    out = torch.tensor([mean, math.log(math.expm1(std))]).double()
    return lambda *x: out.expand(*x[0].shape[:-1], 2)


# ---- Gaussians -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "floor", "std"),
    [(0, -10, 0.69315), (99, -10, 5.0067), (-99, -10, 4.5399e-5), (-99, -20, 2.0612e-9)],
)
def test_deviations_are_softplus_within_bounds(file, raw, floor, std):
    mean, log_std = file.gaussian(torch.tensor([[7.0, raw]]).double(), floor)
    assert mean == 7 and abs(log_std.exp().item() / std - 1) < 1e-4


@pytest.mark.parametrize("value", [1e-3, 0.1, 1.0, 10.0, 25.0, 1000.0])
def test_first_values_are_what_softplus_gives_back(file, value):
    assert_close(softplus(file.before_softplus(value)), torch.tensor(value))


# ---- the clones and the bound ----------------------------------------------------------------

W, S = 1.0, 0.5  # p(x|z) = N(W z, S^2): the marginal is N(0, W^2 + S^2), the posterior below
K, V = W / (W**2 + S**2), S**2 / (W**2 + S**2)


def linear_gaussian(mean, std):
    """A clone whose marginal is known, and a policy N(mean, std^2)."""

    def raw(std, like):
        return torch.full_like(like, math.log(math.expm1(std)))

    encoder = lambda x, s: torch.cat([K * x, raw(V**0.5, x)], -1).unsqueeze(0)
    decoder = lambda z, s: torch.cat([W * z, raw(S, z)], -1)
    behavior = SimpleNamespace(encoder=encoder, decoder=decoder)
    return SimpleNamespace(behavior=behavior, actor=constant(mean, std))


def test_bound_of_a_linear_gaussian_clone(file):
    """pi = N(0.5, 0.3^2): decoder term 0.72603, latent term 0.51352; the KL itself is 0.95154."""
    torch.manual_seed(0)
    nets, args, s = linear_gaussian(0.5, 0.3), file.Args(samples=4), torch.zeros(2, 1).double()
    _, _, d = file.divergence(nets, s, 40_000, args)
    assert d.shape == (40_000, 2)
    assert_close(d.mean(0), torch.full((2,), 1.23954).double(), atol=0.01, rtol=0)
    pi, marginal = D.Normal(0.5, 0.3), D.Normal(0.0, (W**2 + S**2) ** 0.5)
    assert abs(D.kl_divergence(pi, marginal) - 0.95154) < 1e-4


def test_bound_is_zero_where_the_clone_is_the_policy(file):
    behavior = SimpleNamespace(
        encoder=lambda x, s: constant(0.0, 1.0)(x).unsqueeze(0), decoder=constant(0.4, 0.3)
    )
    nets = SimpleNamespace(behavior=behavior, actor=constant(0.4, 0.3))
    d = file.divergence(nets, torch.zeros(3, 1).double(), 2, file.Args())[2]
    assert_close(d, torch.zeros(2, 3).double(), atol=1e-12, rtol=0)


def test_actions_at_a_bound_are_spread(file, data):
    """--dequantize; without it they are clipped to +-(1 - 1e-6)."""
    data.action.fill_(1.0)
    seen = []

    def encoder(x, s):
        seen.append(x.tanh())
        return torch.zeros(1, 16, 8)

    decoder = lambda z, s: torch.zeros(1, 16, 4)
    nets = SimpleNamespace(behavior=SimpleNamespace(encoder=encoder, decoder=decoder))
    for width in (0.0, 0.1):
        file.behavior_loss(nets, data.obs, data.action, file.Args(dequantize=width))
    assert_close(seen[0], torch.full((16, 2), 1 - 1e-6).double())
    distance = 1 - seen[1]
    assert distance.min() > 0 and distance.max() < 0.1 and distance.std() > 0.01


# ---- MMD -------------------------------------------------------------------------------------


# ---- critics ---------------------------------------------------------------------------------


def with_targets(q):
    """Networks whose target policy is tanh N(0, 0.7^2) and whose target critics are q(s, a)."""
    return SimpleNamespace(actor_target=lambda s: torch.zeros(len(s), 2), q_target=q)


def test_target_is_the_mean_or_the_largest_of_the_actions(file):
    nets, zeros = with_targets(lambda s, a: torch.stack([a[:, 0], a[:, 0] + 1])), torch.zeros(4)
    noise = torch.randn(7, 4, 1, generator=torch.Generator().manual_seed(0))
    with Inject(randn_like=[noise]):
        args = file.Args(gamma=1.0, samples=7)
        y = file.target_value(nets, zeros, torch.zeros(4, 1), zeros, args)
    a = (math.log(2) * noise[..., 0]).tanh()  # std = softplus(0)
    assert_close(y, a.mean(0) if file is brac_plus else a.amax(0))


def linear_critics(w, shift):
    """Q_i(s, a) = w_i . a + shift_i, w (2, A), out of two ReLUs; one observation."""
    net = ScalarMLP(1 + w.shape[1], 2, members=2).double()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.weights[0][:, 1:, 0], net.weights[0][:, 1:, 1] = w, -w
        net.weights[1][:, 0], net.weights[1][:, 1] = 1, -1
        net.biases[1][:, 0, 0] = shift
    return net


def test_penalty_is_finite_where_the_gradient_is_zero(file):
    q = linear_critics(torch.zeros(2, 2).double(), torch.zeros(2))
    s, a = torch.zeros(4, 1).double(), torch.rand(1, 4, 2).double()
    found = file.gradient_norm(SimpleNamespace(q=q), s, a)
    assert_close(found, torch.full((4,), 1e-6).double())
    grads = torch.autograd.grad(found.mean(), list(q.weights))
    assert all(g.isfinite().all() for g in grads)


# ---- multipliers -----------------------------------------------------------------------------


# ---- acting ----------------------------------------------------------------------------------


# ---- training --------------------------------------------------------------------------------


class Watching(PlainRun):
    """Remembers what every step left: thresholds, learning rates, networks of a phase's end."""

    def __init__(self):
        super().__init__()
        self.seen, self.ends = {}, {}

    def loop(self, steps, phase="train"):
        self.phase = phase
        for t in super().loop(steps, phase):
            yield t
            rates = {name: adam.lr.item() for name, adam in vars(self.opt).items()}
            seen = SimpleNamespace(eps_gp=self.nets.eps_gp.item(), **rates)
            self.seen.setdefault(phase, []).append(seen)
        self.ends[phase] = copy.deepcopy(self.nets)


@pytest.fixture
def trained(file, tiny_data):
    """trained(**flags): a run on tiny data, and the data as it was trained on."""

    def start(prepare=lambda data: None, **values):
        torch.manual_seed(0)
        data = tiny_data(obs_dim=3, act_dim=2, n=40)
        prepare(data)
        short = dict(env="log.npz", batch_size=8, bc_steps=10, steps=1, samples=2, members=1)
        run = Watching()
        file.train(run, data, file.Args(**(short | values)))
        return run, data

    return start


def test_first_phases(trained):
    """Learning rates fall in fifths; eps is D of the first policy + margin, or what is given; the
    target policy starts as the first policy; H0 is -ELBO less A ln 4, with mmd -ELBO."""
    run, _ = trained(margin=2.5)
    fifths = torch.tensor([1e-3, 5e-4, 1e-4, 5e-5, 1e-5]).repeat_interleave(2)
    assert_close(torch.tensor([x.behavior for x in run.seen["behavior"]]), fifths)
    assert_close(torch.tensor([x.init for x in run.seen["init"]]), fifths)
    nets = run.ends["init"]
    assert_close(nets.eps, nets.first_d + 2.5)
    assert nets.eps_gp == nets.eps and nets.first_d > 0
    assert_close(nets.h0, nets.behavior.minus_elbo - 2 * math.log(4))
    for p, t in zip(nets.actor.parameters(), nets.actor_target.parameters()):
        assert torch.equal(p, t)
    given = trained(eps=7.0, h0=-1.5)[0].nets
    assert (given.eps, given.h0) == (7.0, -1.5)
    nets = trained(divergence="mmd", mmd_margin=0.3)[0].nets
    assert_close(nets.h0, nets.behavior.minus_elbo)
    assert_close(nets.eps, nets.first_d + 0.3)


def test_threshold_is_set_by_epochs(trained):
    """Mean + population deviation of D over all states of the epoch, from the next one on."""
    run, _ = trained(steps=7, epoch_steps=3, eps=9.0, actor_lr=1e-3)
    table = run.phases["train"]
    mean = np.array([row["d_mean"] for row in table])
    square = np.array([row["d_std"] ** 2 * 7 / 8 for row in table]) + mean**2
    expected = [9.0, 9.0]
    for epoch in (slice(0, 3), slice(3, 6)):
        m = mean[epoch].mean()
        expected += 3 * [m + math.sqrt(square[epoch].mean() - m**2)]
    found = [x.eps_gp for x in run.seen["train"]]
    assert np.allclose(found, expected[:7], rtol=1e-4)
    sums = torch.tensor([mean[6], square[6]])
    assert_close(run.nets.d_sums.double(), sums.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (torch.linspace(-3, 5, 40), torch.linspace(0, 1, 40)),
        (torch.full((40,), -2.5), torch.zeros(40)),
    ],
)
def test_rewards_become_zero_to_one(trained, reward, expected):
    _, data = trained(lambda data: data.reward.copy_(reward))
    assert_close(data.reward, expected)


def test_largest_value_is_that_of_scaled_rewards(trained):
    run, _ = trained(gamma=0.9)
    assert run.largest.keys() == {"q_mean", "q_pi"} <= run.phases["train"][0].keys()
    assert all(abs(value - 10) < 1e-3 for value in run.largest.values())


# ---- tasks -----------------------------------------------------------------------------------


def resolved(*argv):
    return parse(brac_plus.Args, brac_plus.PRESETS, [*argv])[0]


@pytest.mark.parametrize(
    ("env", "eps", "h0", "margin"),
    [
        ("hopper-medium-v0", 2.4, -6, 0.2),
        ("hopper-medium-replay-v0", 3.0, -3, 3.0),
        ("walker2d-random-v0", 0.1, 6, 3.0),
        ("walker2d-medium-v0", 2.2, -9, 1.0),
        ("halfcheetah-medium-expert-v0", 11.5, -24, 0.2),
        ("halfcheetah-medium-v2", None, None, 7.0),
        ("pen-human-v1", 0.06, -200, 0.001),
        ("door-human-v0", 0.1, -60, 0.001),
        ("D4RL/door/human-v2", None, None, 0.001),
        ("hopper-medium-v0.npz", None, None, 3.0),
        ("hopper-replay-demo", None, None, 3.0),
    ],
)
def test_thresholds_of_tasks(env, eps, h0, margin):
    args = resolved("--env", env)
    assert (args.eps, args.h0) == (eps, h0)
    hand = args.divergence == "mmd"
    assert hand == ("human" in env) and margin == (args.mmd_margin if hand else args.margin)
    assert args.mmd_width == (60 if hand else 10)
    assert resolved("--env", env, "--eps", "1", "--h0", "2").eps == 1, "what is typed wins"


def test_mmd_refuses_the_threshold_of_kl():
    """D by mmd is at most sqrt(2)."""
    words = "--env", "hopper-medium-v0", "--divergence", "mmd"
    with pytest.raises(InputError, match="eps 2.4"):
        resolved(*words)
    args = resolved(*words, "--eps", "None", "--h0", "None")
    assert args.eps is args.h0 is None and args.mmd_margin == 0.02
