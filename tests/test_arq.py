"""arq.py: the clone against closed forms, Eqs. 4 to 6 by hand, phases and their tables."""

import math
from types import SimpleNamespace

import arq
import pytest
import torch
import torch.distributions as D
from arq import Args, Nets, kth_largest, log_likelihood, sample_dpm, sample_pc, schedule
from golden.tools import Inject
from oracles import in_double, stack
from stand_in import PlainRun
from torch import nn
from torch.testing import assert_close

from common import MLP, InputError

INF = math.inf


def make(data, **values):
    """Networks in float64 with biases of size 0.3; the data with samples, of which some count."""
    args = Args(**(dict(batch_size=16, width=16, n=4, k=2) | values))
    torch.manual_seed(0)
    data = arq.with_next_rows(data)
    nets = Nets(data, args)
    for name, p in nets.named_parameters():
        if "biases" in name:
            nn.init.uniform_(p, -0.3, 0.3)
    nets = nets.double()
    data.candidates = torch.rand(len(data.obs), args.n, data.action.shape[1]).double() * 2 - 1
    data.in_support = torch.rand(len(data.obs), args.n) < 0.6
    return nets, data, args


@pytest.fixture
def data(tiny_data):
    return in_double(tiny_data(obs_dim=3, act_dim=2, n=16))


def gaussian(mean, std):
    """raw(x, t) of the exact score of N(mean, std^2 I)."""

    def raw(x, t):
        _, m, sigma = schedule(torch.as_tensor(t, dtype=x.dtype))
        return -sigma * (x - m * mean) / (m**2 * std**2 + sigma**2)

    return raw


def exact_raw(log_density):
    """raw(x, t) of a density whose logarithm at time t is log_density(x, m, sigma)."""

    def raw(x, t):
        _, m, sigma = schedule(torch.tensor(t, dtype=torch.float64))
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            log_prob = log_density(x, m, sigma).sum()
            (score,) = torch.autograd.grad(log_prob, x, create_graph=True)
        return sigma * score

    return raw


MEANS = torch.tensor([[1.0] * 6, [-0.7] * 6, [0.8, 0, 0.8, 0, 0.8, 0]]).double()
STDS, WEIGHTS = torch.tensor([0.15, 0.3, 0.2]).double(), torch.tensor([0.5, 0.2, 0.3]).double()


def mixture(m=1.0, sigma=0.0):
    """Three 6-d Gaussians, as noise leaves them."""
    std = (m**2 * STDS**2 + sigma**2).sqrt()[:, None].expand(3, 6)
    parts = D.Independent(D.Normal(m * MEANS, std), 1)
    return D.MixtureSameFamily(D.Categorical(probs=WEIGHTS), parts)


mixture_raw = exact_raw(lambda x, m, sigma: mixture(m, sigma).log_prob(x))

# ---- the SDE and its network -----------------------------------------------------------------


def test_initial_networks(tiny_data):
    torch.manual_seed(0)
    nets = Nets(tiny_data(obs_dim=17, act_dim=6), Args())
    assert sum(p.numel() for p in nets.score.parameters()) == 468_230
    assert 25 < nets.score.frequencies.std() < 35
    assert torch.equal(nets.score.frequencies, nets.score_ema.frequencies)
    for net in (x for x in nets.modules() if isinstance(x, MLP)):
        for w, b in zip(net.weights, net.biases):
            bound = math.sqrt(6 / (w.shape[-1] + w.shape[-2]))
            assert 0.9 * bound < w.abs().max() <= bound and not b.any()


def test_deviations_are_floored_and_a_constant_column_comes_back(tiny_data):
    data = tiny_data(act_dim=3, n=400)
    data.action[:, 1], data.action[:, 2] = 0.25, 0.02 * data.action[:, 2]
    nets = Nets(data, Args())
    std = torch.tensor([data.action[:, 0].std(correction=0), 0.05, 0.05])
    assert_close(nets.z_action.std, std)
    assert_close(nets.z_obs.mean, data.obs.mean(0))
    assert_close(nets.z_action.inverse(nets.z_action(data.action)), data.action)
    a = nets.z_action.inverse(torch.full((1, 3), 2.0))
    expected = data.action.mean(0) + 2 * std * torch.tensor([1.0, 0.0, 1.0])
    assert_close(a[0], expected)


# ---- score matching --------------------------------------------------------------------------


# ---- samplers --------------------------------------------------------------------------------


def test_solver_approaches_the_gaussian():
    """One evaluation and one noise term per step, and one evaluation more; for a known clean value
    the step is exact, so that of N(x0, 0) nothing but x0 comes out."""
    errors = []
    for steps in (20, 40, 80):
        calls, draw = [], torch.Generator().manual_seed(0)
        raw = gaussian(0.4, 0.3)
        counted = lambda x, t: calls.append(t) or raw(x, t)
        x = torch.randn(200_000, 1, generator=draw).double()
        with Inject(randn=list(torch.randn(steps, 200_000, 1, generator=draw).double())):
            found = sample_dpm(counted, x, steps)
        assert len(calls) == steps + 1
        assert abs(found.mean() - 0.4) < 0.003
        errors.append(abs(found.std().item() / 0.3 - 1))
    assert errors[0] < 0.04 and errors[1] < 0.02 and errors[2] < 0.01
    point = sample_dpm(gaussian(0.4, 1e-9), torch.randn(50, 1).double(), 5)
    assert_close(point, torch.full_like(point, 0.4))


def test_solver_finds_three_modes():
    torch.manual_seed(0)
    with torch.no_grad():
        x = sample_dpm(mixture_raw, torch.randn(3000, 6).double(), 20)
    mode = torch.cdist(x, MEANS).argmin(1)
    share = torch.bincount(mode, minlength=3) / 3000
    assert_close(share.double(), WEIGHTS, atol=0.05, rtol=0)
    assert 0.015 < (mixture().log_prob(x) < -5).double().mean() < 0.055  # exact: 0.0285


# ---- likelihood ------------------------------------------------------------------------------


def likelihood(raw, x, generator=None):
    return log_likelihood(raw, x, arq.trace_vectors(x, generator))


@pytest.mark.parametrize("std", [1.0, 0.3, 0.05])
def test_likelihood_of_a_gaussian(std):
    torch.manual_seed(0)
    x = 0.3 + std * torch.randn(200, 3).double()
    expected = D.Normal(0.3, std).log_prob(x).sum(1)
    assert_close(likelihood(gaussian(0.3, std), x), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(("sampler", "by_hand"), [("sde", sample_dpm), ("pc", sample_pc)])
def test_samples_are_grouped_by_state_and_repeatable(data, sampler, by_hand):
    nets, data, args = make(data, ensemble=2, sampler=sampler)
    obs = data.obs[:3]
    seeded = lambda: torch.Generator().manual_seed(5)
    one, two = (arq.draw_samples(nets, obs, args, seeded()) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (3, 4, 2)
    s = nets.z_obs(obs)[[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]
    raw = lambda x, t: nets.score_ema(x, s, t).mean(0)
    draw = seeded()
    x = torch.randn(12, 2, dtype=torch.float64, generator=draw)
    with torch.no_grad():
        x = by_hand(raw, x, args.sample_steps, draw)
    assert_close(one.flatten(0, 1), x)
    log_prob = arq.grade(nets, obs, one, args)
    assert_close(log_prob.flatten(), likelihood(raw, x))


def test_a_diverged_score_network_is_refused(data):
    nets, data, args = make(data)
    with torch.no_grad():
        nets.score_ema.last.weights[0].fill_(math.nan)
    with pytest.raises(InputError, match="^training diverged: samples of the score network"):
        arq.train_samples(PlainRun(), nets, data, args)
    for sampler in ("sde", "pc"):
        args.sampler = sampler
        with pytest.raises(InputError, match="training diverged"):
            arq.implicit_policy(nets, data.obs, args)


# ---- Eq. 5 -----------------------------------------------------------------------------------


def test_kth_largest_by_hand():
    q = torch.tensor([[1.0, 5, 3, 4], [2, 2, 2, 9], [7, 8, 9, 1], [6, 9, 9, 9]])
    keep = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    for k, expected in ((1, [5, 2, 9, 6]), (2, [4, 2, 7, 6]), (3, [3, 2, 7, 6]), (4, [1, 2, 7, 6])):
        assert kth_largest(q, keep, k).tolist() == expected


def values(f):
    """Networks whose target critics are the given function of (s, a), (E, rows)."""
    return SimpleNamespace(
        q_target=lambda s, a, member=None: f(s, a) if member is None else f(s, a)[member]
    )


def test_sarsa_sees_the_datas_action_only(data):
    nets, data, args = make(data, value="sarsa")
    assert len(nets.q.weights[0]) == 1
    nan, a2 = torch.full((16, 4, 2), math.nan).double(), data.action.flip(0)
    rest = data.next_obs, a2, nan, data.in_support, data.terminal
    y = arq.target(nets, data.reward, *rest, args)
    q2 = stack(nets.q_target, 0)(torch.cat([data.next_obs, a2], 1))[:, 0]
    assert_close(y, data.reward + 0.99 * (1 - data.terminal) * q2)


def test_rewards_are_scaled_and_then_shifted(tiny_data):
    data = tiny_data()
    reward = data.reward.clone()
    arq.scale_rewards(data, Args(normalize_reward=True, reward_shift=-1.0))
    gap = data.episode_return.max() - data.episode_return.min()
    assert_close(data.reward, reward * 1000 / gap - 1)
    data.episode_return[:] = 3.0
    with pytest.raises(InputError, match="divide by zero"):
        arq.scale_rewards(data, Args(normalize_reward=True))


# ---- policies --------------------------------------------------------------------------------


def chosen(log_prob, alpha):
    """Share of each of the samples -0.5, 0 and 0.5 where Q_1 = s + a and Q_2 = -a."""
    nets = values(lambda s, a: torch.stack([s[:, 0] + a[:, 0], -a[:, 0]]))
    a = torch.tensor([-0.5, 0.0, 0.5])[None, :, None]
    args = Args(alpha=alpha, threshold=-5.0)
    return arq.implicit_logits(nets, torch.ones(1, 1), a, log_prob, args).softmax(1)[0]


def test_implicit_policy_is_a_softmax_over_the_support():
    q = torch.tensor([0.5, 1.0, 1.5])
    for alpha in (0.0, 2.0):
        assert_close(chosen(None, alpha), torch.softmax(alpha * q, 0))
        assert_close(chosen(torch.zeros(1, 3), alpha), torch.softmax(alpha * q, 0))
        two = torch.softmax(alpha * q[:2], 0)
        assert_close(chosen(torch.tensor([[0.0, 0.0, -6.0]]), alpha)[:2], two)
    assert_close(chosen(None, 1e6), torch.tensor([0.0, 0.0, 1.0]))
    assert_close(chosen(torch.tensor([[0.0, -4.9, -5.0]]), 1e6), torch.tensor([0.0, 1.0, 0.0]))
    nothing_counts = torch.tensor([[-7.0, -6.0, -9.0]])  # the likeliest acts
    assert_close(chosen(nothing_counts, 1e6), torch.tensor([0.0, 1.0, 0.0]))


def test_clone_alone_needs_no_q_and_no_filter(data):
    nets, data, args = make(data, n=1)
    with torch.no_grad():
        for p in nets.q_target.parameters():
            p.zero_()
    torch.manual_seed(3)
    found = arq.implicit_policy(nets, data.obs, args)
    torch.manual_seed(3)
    x = arq.draw_samples(nets, data.obs, args)
    assert_close(found, nets.z_action.inverse(x).clamp(-1, 1)[:, 0])


# ---- what the constraint is for --------------------------------------------------------------


def test_masked_value_iteration():
    """Finite support, K = 1, no floor: the fixed point is that of value iteration over the support
    alone; a forbidden action of high value changes nothing."""
    torch.manual_seed(0)
    reward, follow = torch.rand(4, 3), torch.randint(4, (4, 3))
    allowed = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 1, 1]]).bool()
    reward[~allowed] = 50.0
    args = Args(k=1, gamma=0.9, floor=False)
    s2, zeros = follow.flatten(), torch.zeros(12)
    candidates = torch.arange(3.0).expand(12, 3)[..., None]
    q = torch.zeros(4, 3)
    for _ in range(200):
        table = lambda s, a: q[s[:, 0].long(), a[:, 0].long()].expand(2, -1)
        support = candidates, allowed[s2]
        rest = s2[:, None].float(), zeros[:, None], *support, zeros
        q = arq.target(values(table), reward.flatten(), *rest, args).view(4, 3)
    expected = torch.zeros(4, 3)
    for _ in range(200):
        v = expected.masked_fill(~allowed, -INF).amax(1)
        expected = reward + 0.9 * v[follow]
    assert_close(q, expected)


# ---- phases and their tables -----------------------------------------------------------------


class Resumed(PlainRun):
    """A run that is resumed in the phase `done`, after `first` of its steps: the loops before it
    yield nothing. `store` holds what was kept, for the next run to find."""

    def __init__(self, done="score", first=0, store=None):
        super().__init__()
        self.done, self.first, self.store = done, first, {} if store is None else store

    def loop(self, steps, phase="train"):
        found = list(super().loop(steps, phase))
        if phase == self.done:
            self.done = None
            return found[self.first :]
        return [] if self.done else found

    def kept(self, name, compute):
        if name not in self.store:
            self.store[name] = compute()
        return self.store[name]

    def steps(self):
        """Steps of every phase."""
        return tuple(len(self.phases.get(name, [])) for name in Args.phases)


def table(first=0, stage="sample", seed=3):
    """A table of 500 rows, of which 64 are a chunk, and the run that made it."""

    def values(rows, c, generator):
        assert rows == slice(64 * c, 64 * c + 64)
        return torch.randn(min(64, 500 - rows.start), 2, generator=generator)

    run = Resumed(stage, first)
    health = lambda chunk: {"mean": chunk.mean()}
    return arq.train_table(run, stage, (500, 2), values, health, seed), run


SHORT = dict(batch_size=8, width=16, steps=4, q_steps=5, score_steps=6, n=3, k=2, sample_steps=5)


@pytest.fixture
def start(tiny_data, monkeypatch):
    """start(run, **flags) trains on a few rows, of which 64 are a chunk, and returns the run, with
    the data that it trained on."""
    made, plain = [], arq.with_next_rows
    monkeypatch.setattr(arq, "with_next_rows", lambda data: made.append(plain(data)) or made[-1])

    def call(run, seed=3, rows=70, prepare=None, **values):
        data = tiny_data(n=rows)
        if prepare:
            prepare(data)
        args = Args(**(SHORT | dict(seed=seed) | values))
        torch.manual_seed(seed)
        arq.train(run, data, args)
        run.data, run.args = made[-1], args
        return run

    return call


def test_phases_and_references(start):
    """Without Q there is no table, no implicit policy, and the clone is still evaluated."""
    for values, steps in (({}, (6, 2, 0, 5, 4)), ({"filter": True}, (6, 2, 2, 5, 4))):
        run = start(Resumed(), **values)
        assert run.steps() == steps
        assert run.references.keys() == {"implicit policy", "clone s_psi"}
    run = start(Resumed(), value="none")
    assert run.steps() == (6, 0, 0, 0, 4) and run.references.keys() == {"clone s_psi"}


def test_likelihoods_are_kept_chunk_by_chunk(start):
    """What was kept is not computed again."""
    store = {}
    first = start(Resumed(store=store), filter=True, threshold=-16.0)
    assert store.keys() == {"grade-0", "grade-1"} and store["grade-1"].shape == (6, 3)
    assert torch.equal(torch.cat([*store.values()]) > -16, first.data.in_support)
    store["grade-1"] = torch.full((6, 3), 1.0)
    second = start(Resumed("q", store=store), filter=True, threshold=-16.0)
    assert second.data.in_support[64:].all()


def test_likelihoods_are_those_of_samples_that_are_not_clipped(start, monkeypatch):
    run, seen, grade = Resumed(), [], arq.grade

    def graded(nets, s, x, args, generator):
        seen.append((x, grade(nets, s, x, args, generator)))
        return seen[-1][1]

    monkeypatch.setattr(arq, "grade", graded)
    run = start(run, filter=True, threshold=-9.0, n=2)
    x, log_prob = (torch.cat(part) for part in zip(*seen))
    a = run.nets.z_action.inverse(x)
    assert (a.abs() > 1).any() and torch.equal(a.clamp(-1, 1), run.data.candidates)
    assert torch.equal(log_prob > -9, run.data.in_support)


def test_constant_column_of_actions(start):
    """Samples have the constant itself; likelihoods are finite."""

    def constant(data):
        data.action[:, 1] = 0.3

    run = start(Resumed(), prepare=constant, filter=True)
    assert all(x.isfinite().all() for x in run.nets.state_dict().values())
    assert all(x.isfinite().all() for x in run.store.values())
    for act in run.references.values():
        a = act(torch.randn(20, 3))
        assert_close(a[:, 1], torch.full((20,), 0.3))
        assert a[:, 0].std() > 0.01


def test_every_sample_is_rejected(start):
    """A threshold that nothing passes leaves the data's actions: SARSA with twins, by the floor or
    without it."""
    runs = [start(PlainRun(), filter=True, threshold=1e9, floor=floor) for floor in (True, False)]
    one, two = (run.nets.state_dict() for run in runs)
    assert runs[0].phases["grade"][-1] == {"in_support": 0.0}
    for name in one:
        assert one[name].isfinite().all() and torch.equal(one[name], two[name]), name


def test_k_is_at_most_the_number_of_candidates():
    with pytest.raises(InputError, match=r"--k 9 exceeds N \+ 1 = 4: use a larger --n"):
        Args(k=9, n=3).resolve()
    Args(k=4, n=3).resolve()
    Args(k=9, n=3, value="sarsa").resolve()
