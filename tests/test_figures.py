"""figures/*.py: every script draws its picture, and the numbers behind it are right."""

import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from short_runs import tracked
from torch.testing import assert_close

from common import InputError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "figures"))
import arq_densities  # noqa: E402
import arq_rare  # noqa: E402
import brac_plus_divergences  # noqa: E402
import brac_plus_multiplier  # noqa: E402
import brac_plus_noise  # noqa: E402
import brac_plus_penalty  # noqa: E402
import family  # noqa: E402
import fisher_brc_actor  # noqa: E402
import fisher_brc_bandit  # noqa: E402
import fisher_brc_lambda  # noqa: E402
import itrpo_paths  # noqa: E402
import itrpo_trust  # noqa: E402
import mixture  # noqa: E402
import selection  # noqa: E402

import results  # noqa: E402
from peers import td3_lockstep  # noqa: E402

TINY = {  # figure: (module, settings, size in pixels)
    "arq_densities": (arq_densities, dict(steps=3, grid=6), (1430, 462)),
    "arq_rare": (arq_rare, dict(steps=3, rows=40), (880, 462)),
    "brac_plus_divergences": (brac_plus_divergences, dict(points=21), (1540, 550)),
    "brac_plus_multiplier": (
        brac_plus_multiplier,
        dict(bc_steps=4, steps=4, states=50),
        (880, 528),
    ),
    "brac_plus_penalty": (brac_plus_penalty, dict(steps=5), (880, 550)),
    "brac_plus_noise": (
        brac_plus_noise,
        dict(bc_steps=4, states=5, estimates=3),
        (880, 506),
    ),
    "family": (family, dict(steps=2, rows=20), (880, 924)),
    "fisher_brc_actor": (fisher_brc_actor, dict(steps=2, rows=20), (880, 660)),
    "fisher_brc_bandit": (fisher_brc_bandit, dict(steps=3), (1430, 572)),
    "fisher_brc_lambda": (fisher_brc_lambda, dict(bc_steps=2, steps=4), (1100, 715)),
    "itrpo_paths": (itrpo_paths, dict(steps=5), (1155, 968)),
    "itrpo_trust": (
        itrpo_trust,
        dict(bc_steps=2, steps=4, log_every=2, seeds=1),
        (880, 462),
    ),
    "mixture": (mixture, dict(seeds=(0,), looks=(1, 2), episodes=2, ahead=3), (880, 429)),
}


def test_every_figure_is_tested():
    scripts = {p.stem: p for p in (ROOT / "figures").glob("*.py")}
    for name in (
        "fql_best_of",
        "maze_paths",
        "results",
        "selection",
    ):  # need finished runs: see below
        scripts.pop(name)
    assert scripts.keys() == TINY.keys()
    for name, path in scripts.items():
        text = path.read_text()
        assert f"    python figures/{name}.py\n" in text and "Differs" in text
        assert TINY[name][0].Args().out == f"figures/{name}.png"


@pytest.mark.parametrize("name", TINY)
def test_draws_a_picture(name, tmp_path):
    module, settings, size = TINY[name]
    out = tmp_path / "new" / "x.png"
    module.main(module.Args(**settings, out=str(out)))
    png = out.read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == size
    assert 10_000 < len(png) < 250_000


# ---- the family ------------------------------------------------------------------------------


def test_every_algorithm_is_in_the_family():
    assert {path.stem for path in tracked("algorithms")} <= family.METHODS.keys()
    for name, method in family.METHODS.items():
        assert method.title == results.TITLES[name] and len(method.weight) <= 1


def test_kl_on_the_grid_is_that_of_two_gaussians():
    """log(2) + (1 + 1) / 8 - 1 / 2 for N(0, 0.05) from N(0.05, 0.1); tanh changes nothing."""
    grid = family.Grid()
    for squashed in (False, True):
        p, q = (
            grid.gaussian(torch.full((67, 1), mean), torch.tensor(std).log(), squashed)
            for mean, std in ((0.0, 0.05), (0.05, 0.1))
        )
        assert family.kl(p, q) == pytest.approx(math.log(2) + 2 / 8 - 0.5, abs=1e-3)
    assert_close(grid.quantile(p, 0.95), torch.full((67,), 0.0821), rtol=0, atol=2e-3)


def test_optimum_of_weighted_cloning():
    """Its log-ratio to the data is the reward / TAU, up to a constant in each state. At s = 0, V is
    -3 exp(-(2 pi 0.05 / 0.8)^2 / 2) = -2.777, so the branches' advantages are 3.777, which the
    bound of log 20 cuts, and -4.223."""
    grid = family.Grid()
    beta = grid.normalized(family.data_log_density(grid.s, grid.a))
    ratio = family.weighted(grid) - beta - family.reward(grid.s, grid.a) / family.TAU
    assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=0, atol=1e-3)
    bounded = (family.weighted(grid, bound=20.0) - beta)[33]
    down, up = (bounded[(grid.a - branch).abs().argmin()].item() for branch in (-0.4, 0.4))
    assert up - down == pytest.approx(math.log(20) + 4.223, abs=0.02)


@pytest.mark.parametrize(
    "name, steps",
    [
        ("iql", 2_500),
        ("brac", 600),
        pytest.param("awac", 2_500, marks=pytest.mark.soak),
        pytest.param("itrpo", 600, marks=pytest.mark.soak),
    ],
)
def test_a_known_optimum_is_reached(name, steps):
    panel = family.train_and_look(name, family.Args(steps=steps))
    assert 0 <= panel.kl < family.TOLERANCE


# ---- the mixture -----------------------------------------------------------------------------


def test_put_into_a_state_of_the_data_the_hopper_goes_on_as_the_data_does():
    """From a row's state, its action leads to its next observation."""
    data, task = mixture.load("hopper-medium-expert-demo")
    rows, _ = mixture.halves(data)
    for whose, first in ((mixture.EXPERT, 50_000), (mixture.MEDIUM, 0)):
        states = mixture.inside(data, rows[whose], 3)
        for obs in states:
            i = (data.obs == torch.from_numpy(obs).float()).all(1).nonzero().item()
            assert first <= i < first + 50_000
            assert data.episode[i - 60] == data.episode[i] == data.episode[i + 60]
            env = mixture.PutInto(mixture.make(task), obs, ahead=2)
            env.reset(seed=0)
            found, reward, terminal, ended, _ = env.step(data.action[i].numpy())
            assert_close(torch.tensor(found).float(), data.next_obs[i], rtol=0, atol=1e-3)
            assert (reward, terminal, ended) == (1.0, False, False)
            assert env.step(data.action[i].numpy())[3]


# ---- Fisher-BRC ------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [1e-4, 0.01, 0.1, 10.0])
def test_optimum_of_the_printed_bandit(lam):
    """O = Q - log mu solves O'' = (O - O*) / (lambda / 4), is smooth at 0 and flat at the edge."""
    a = torch.linspace(0, 0.25, 200_001, dtype=torch.float64)
    o = fisher_brc_bandit.as_written(a, lam) + 8 * a
    h, best = a[1], 9 * a - 0.125
    slope = (o[1:] - o[:-1]) / h
    assert slope[0].abs() < 0.01 and slope[-1].abs() < 0.01
    second = (o[2:] - 2 * o[1:-1] + o[:-2]) / h**2
    assert_close(second, (o - best)[1:-1] / (lam / 4), rtol=1e-3, atol=0.1)


def test_peaks_of_the_printed_bandit():
    a = torch.linspace(0, 0.25, 2001, dtype=torch.float64)
    q = fisher_brc_bandit.as_written(a, 0.1)
    assert_close(q[[0, -1]], torch.tensor([0.8125, -0.8125]).double(), rtol=0, atol=2e-3)
    place = a[fisher_brc_bandit.as_written(a, 1e-4).argmax()].item()
    assert place == pytest.approx(0.239, abs=2e-3)
    assert fisher_brc_bandit.as_written(a, 0.01).argmax() == 0


def test_bandit_as_drawn_is_exact_inside_and_falls_as_log_mu_outside():
    """BRAC's peak at 0 for alpha = 1 is -0.125 + log 4 = 1.261."""
    torch.manual_seed(0)
    a = torch.rand(1000) * 0.5 - 0.25
    offset = fisher_brc_bandit.fit(a, 9 * a.abs() - 0.125 - math.log(4), 0.1, False, 600)
    q = lambda x: offset(torch.tensor(x)) - 8 * torch.tensor(x).abs() + math.log(4)
    assert_close(q([-0.2, 0.0, 0.2]), torch.tensor([0.075, -0.125, 0.075]), rtol=0, atol=0.04)
    assert_close(q([0.8]) - q([0.4]), torch.tensor([-3.2]), rtol=0, atol=0.2)
    reward = fisher_brc_bandit.fit(a, a.abs() - 0.125, 0, True, 300)
    assert (reward(torch.zeros(1)) + math.log(4)).item() == pytest.approx(1.261, abs=0.05)


def test_a_large_lambda_flattens_the_offset():
    """The second run reads the clone of the first."""
    data, _ = fisher_brc_lambda.load("hopper-replay-demo", "cpu", "none")
    args = fisher_brc_lambda.Args(batch_size=32, steps=40, bc_steps=2)
    free, clone = fisher_brc_lambda.curves(data, 0.0, None, args)
    held, same = fisher_brc_lambda.curves(data, 100.0, clone, args)
    assert all(torch.equal(clone[name], same[name]) for name in clone)
    assert free["q_data"][0] == held["q_data"][0] and free["penalty"][0] == held["penalty"][0]
    assert held["penalty"][-1] < 0.6 * free["penalty"][-1]


# ---- BRAC+ -----------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [None, "squared_slope", "gated_norm"])
def test_regression_is_flat_outside_with_a_penalty_alone(penalty):
    torch.manual_seed(0)
    x = 1.6 * torch.rand(100, 1) - 0.8
    y = brac_plus_penalty.truth(x)[:, 0]
    f = brac_plus_penalty.fit(
        x, y, penalty and getattr(brac_plus_penalty, penalty), brac_plus_penalty.Args(steps=500)
    )
    assert (f(x) - y).square().mean().sqrt() < 0.3
    far, near = f(torch.tensor([[2.0], [1.2], [-1.2], [-2.0]])).view(2, 2).T
    slope = (far - near).abs().max() / 0.8
    assert slope < 0.6 if penalty else slope > 2


def test_penalties_by_hand():
    net = brac_plus_penalty.ScalarMLP(1, 1, members=2)  # 2 (x + 10) and -3 (x + 10)
    for p, value in zip((*net.weights, *net.biases), ([1.0, 1], [2.0, -3], [10.0, 10], [0.0, 0])):
        p.data.copy_(torch.tensor(value).view(2, 1, 1))
    x = torch.tensor([[0.5], [1.0], [-1.0], [1.5]])
    assert_close(brac_plus_penalty.squared_slope(net, x).item(), 13.0)
    assert_close(brac_plus_penalty.gated_norm(net, x).item(), 9 / 4)  # 0 where |x| < 0.8


def test_divergences_from_one_mode():
    x = torch.linspace(-4, 4, 17, dtype=torch.float64)
    forward, backward, mmd = brac_plus_divergences.landscapes([(1, 0, 1)], x, 0.2, 1.0)
    assert_close(forward, 1.12944 + x**2 / 2, rtol=0, atol=1e-4)
    assert_close(backward, -2.10944 + 12.5 * (1 + x**2), rtol=0, atol=1e-4)
    for ours, exact in zip((forward, backward), brac_plus_divergences.closed_form(x, 0.2)):
        assert_close(ours, exact, rtol=1e-6, atol=1e-6)
    assert_close(mmd, mmd.flip(0))
    assert mmd.argmin() == 8


@pytest.mark.parametrize("parts, minima, backward_minimum", [
    ([(0.3, -1.5, 0.3), (0.7, 1.0, 0.5)], [(-1.5, 1.3316), (1.0, 0.8530)], (0.25, 17.06)),
    ([(0.3, -2.0, 0.3), (0.7, 2.0, 0.5)], [(-2.0, 1.3317), (2.0, 0.8530)], (0.80, 42.65)),
])  # fmt: skip
def test_divergences_from_two_modes(parts, minima, backward_minimum):
    x = torch.linspace(-3, 3, 121, dtype=torch.float64)
    forward, backward, _ = brac_plus_divergences.landscapes(parts, x, 0.2, 1.0)
    inner = (forward[1:-1] < forward[:-2]) & (forward[1:-1] < forward[2:])
    places = inner.nonzero()[:, 0] + 1
    found = [*zip(x[places].tolist(), forward[places].tolist())]
    for (place, value), wanted in zip(found, minima, strict=True):
        assert place == pytest.approx(wanted[0], abs=1e-6)
        assert value == pytest.approx(wanted[1], abs=1e-3)
    i = backward.argmin()
    assert (x[i].item(), backward[i].item()) == pytest.approx(backward_minimum, abs=0.01)


@pytest.mark.parametrize("bandwidth, place", [(0.5, 0.95), (1.0, 0.85), (10.0, 0.70)])
def test_mmd_stays_near_the_heavy_mode(bandwidth, place):
    x = torch.linspace(0.5, 1.5, 21, dtype=torch.float64)
    parts = [(0.3, -1.5, 0.3), (0.7, 1.0, 0.5)]
    mmd = brac_plus_divergences.landscapes(parts, x, 0.2, bandwidth)[2]
    assert x[mmd.argmin()].item() == pytest.approx(place, abs=1e-6)


def test_noise_of_the_bound_by_hand():
    """With one clone and one latent, all ways agree on average in the decoder's part where the
    policy is the decoder itself: then KL(pi || p) is 0, and log pi - log p is 0 in every sample."""
    args = brac_plus_noise.Args(bc_steps=3, states=4, estimates=300)
    data, _ = brac_plus_noise.load(args.env, "cpu", "none")
    torch.manual_seed(0)
    nets = brac_plus_multiplier.start(data, args)
    for net in (nets.actor, nets.behavior.decoder):
        for p in net.parameters():
            p.data.zero_()
    found = brac_plus_noise.estimates(nets, data.obs[:4], 0.0, args)
    assert found["sampled log-densities"].shape == (300, 4)
    for d in found.values():
        assert_close(d, found["closed form, 1 latent"], rtol=1e-4, atol=1e-4)
    moved = brac_plus_noise.estimates(nets, data.obs[:4], 1.0, args)
    gap = {name: d.mean() - found[name].mean() for name, d in moved.items()}
    assert gap.keys() == found.keys() and moved["sampled log-densities"].std(0).min() > 0.5
    assert (
        moved["closed form, 5 latents"].std(0).max() < moved["sampled log-densities"].std(0).min()
    )


def test_multipliers_start_from_the_same_networks():
    """Without a step, D does not depend on the multiplier, and eps is 1 above its running mean."""
    args = brac_plus_multiplier.Args(bc_steps=3, steps=0, states=20)
    data, _ = brac_plus_multiplier.load(args.env, "cpu", "none")
    torch.manual_seed(0)
    nets = brac_plus_multiplier.start(data, args)
    assert nets.eps == nets.first_d + 1 == nets.eps_gp
    one, each = (brac_plus_multiplier.final(nets, data, k, args) for k in ("global", "state"))
    assert one.shape == (20,) and torch.equal(one, each)
    args.steps = 3
    one, each = (brac_plus_multiplier.final(nets, data, k, args) for k in ("global", "state"))
    assert one.isfinite().all() and not torch.equal(one, each)


# ---- ARQ -------------------------------------------------------------------------------------


def test_targets_are_densities_with_their_samples():
    torch.manual_seed(0)
    s, a = torch.tensor([-0.6, 0.3]).repeat_interleave(4000), torch.linspace(-2, 2, 2001)
    for title, parts in arq_densities.modes(s).items():
        p = arq_densities.density(arq_densities.modes(s[::4000])[title], a)  # (2, A)
        assert_close(p.sum(1) * 0.002, torch.ones(2), rtol=0, atol=5e-3)
        samples = arq_densities.draw(parts).view(2, 4000)
        assert_close(samples.mean(1), (p * a).sum(1) * 0.002, rtol=0, atol=0.04)
        assert_close(samples.square().mean(1), (p * a**2).sum(1) * 0.002, rtol=0, atol=0.03)


def test_an_easy_density_is_learned():
    torch.manual_seed(0)
    s, a = torch.rand(2000, 1), 0.5 * torch.randn(2000, 1).clamp(-2, 2)
    grid = torch.tensor([0.2, 0.8]), torch.linspace(-1.5, 1.5, 61)
    p = arq_densities.clone(s, a, grid, arq_densities.Args(steps=400))
    true = torch.exp(-2 * grid[1] ** 2) / (0.5 * math.sqrt(2 * math.pi))
    assert 0.5 * (p - true).abs().sum(1).mean() * 0.05 < 0.12


def test_rare_bandit_pays_its_share_alone():
    torch.manual_seed(0)
    data = arq_rare.bandit(0.05, 4000)
    assert data.reward.mean().item() == pytest.approx(0.05, abs=0.01)
    assert torch.equal(data.reward > 0, data.action[:, 0] > 0.3)


def test_a_clone_finds_no_rare_action():
    """Half of the actions are found by no mean, all of them where all are good."""
    args = arq_rare.Args(share=0.5, steps=200, rows=500)
    good, between = arq_rare.shares("bc", {}, args)
    assert good < 0.1 and between > 0.8
    args.share = 1.0
    assert arq_rare.shares("bc", {}, args) == (1.0, 0.0)


# ---- iTRPO -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.3, 0.9])
def test_paths_end_where_their_control_ends(tau):
    """The same policy; Q differs by tau alpha rho; every step of iTRPO is shorter at first."""
    mdp = itrpo_paths.random_mdp()
    (path, q), (control, q_control) = (
        itrpo_paths.iterate(mdp, itrpo_paths.setting(tau, how), 500) for how in (False, True)
    )
    assert torch.equal(path[0], mdp[2]) and torch.equal(control[0], mdp[2])
    assert_close(path[-1], control[-1], rtol=0, atol=1e-9)
    assert_close(q - 4 * tau * (path[-1] - mdp[2]), q_control, rtol=0, atol=1e-8)
    step, leap = (itrpo_paths.kl(p[1], p[0]).mean() for p in (path, control))
    assert step < 0.6 * leap


def test_settings_of_the_trust_region_share_a_clone():
    """And only one of them shapes rewards."""
    args = itrpo_trust.Args(bc_steps=3, steps=4, log_every=2)
    control, clone = itrpo_trust.curves(True, 0, None, args)
    trust, same = itrpo_trust.curves(False, 0, clone, args)
    assert all(torch.equal(clone[name], same[name]) for name in clone)
    assert len(trust["kl_step"]) == 2 and control["shaping"] == [0.0, 0.0] != trust["shaping"]


# TD3+BC in the form of CORL's file: the names and shapes that peers/td3_lockstep.py reads.
TD3_BC = """
import copy, torch
from torch.nn.functional import mse_loss

def net(n_in, n_out):
    sizes = (n_in, 256, 256, n_out)
    layers = [f for a, b in zip(sizes, sizes[1:]) for f in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers[:-1])

class Actor(torch.nn.Module):
    def __init__(self, s, a, largest):
        super().__init__()
        self.net = net(s, a)
    def forward(self, s):
        return self.net(s).tanh()

class Critic(torch.nn.Module):
    def __init__(self, s, a):
        super().__init__()
        self.net = net(s + a, 1)
    def forward(self, s, a):
        return self.net(torch.cat([s, a], 1))

class TD3_BC:
    def __init__(self, largest, pi, pi_opt, q1, opt1, q2, opt2, discount, tau, policy_noise,
                 noise_clip, policy_freq, alpha):
        self.opts, self.nets = (opt1, opt2, pi_opt), (pi, q1, q2)
        self.targets, self.t = copy.deepcopy(self.nets), 0
        self.how = (discount, tau, policy_noise, noise_clip, policy_freq, alpha)
    def train(self, batch):
        s, a, r, s2, done = batch
        discount, tau, noise, clip, freq, alpha = self.how
        pi, q1, q2 = self.nets
        self.t += 1
        with torch.no_grad():
            a2 = self.targets[0](s2) + (torch.randn_like(a) * noise).clamp(-clip, clip)
            low = torch.min(*(q(s2, a2.clamp(-1, 1)) for q in self.targets[1:]))
            y = r + (1 - done) * discount * low
        self.step(mse_loss(q1(s, a), y) + mse_loss(q2(s, a), y), self.opts[:2])
        if self.t % freq == 0:
            q = q1(s, pi(s))
            weight = alpha / q.abs().mean().detach()
            self.step(mse_loss(pi(s), a) - weight * q.mean(), self.opts[2:])
            for net, target in zip(self.nets, self.targets):
                for p, old in zip(net.parameters(), target.parameters()):
                    old.data.lerp_(p.data, tau)
    def step(self, loss, opts):
        for opt in self.opts:
            opt.zero_grad()
        loss.backward()
        for opt in opts:
            opt.step()
"""


def test_td3_bc_in_lockstep_is_one_function(tmp_path, monkeypatch, capsys):
    """A program of 60 lines in plain PyTorch stands for CORL's; with another discount it leaves."""
    for name in ("gym", "d4rl", "wandb", "pyrallis"):  # stand-ins, which go again
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "algorithms" / "offline" / "td3_bc.py"
    path.parent.mkdir(parents=True)
    found = []
    for text in (TD3_BC, TD3_BC.replace("* discount *", "* 0.9 *")):
        path.write_text(text)
        args = td3_lockstep.Args(corl=str(tmp_path), steps=12, out=str(tmp_path / "x.png"))
        td3_lockstep.main(args)
        found.append([float(x) for x in re.findall(r": (\S+) after 12", capsys.readouterr().out)])
    (exact, single, moved), (far, *_) = found
    assert exact < 1e-15 < 1e-9 < single < 1e-6 and 0 < moved < 1e-6 and far > 1e-5
    with pytest.raises(InputError, match="--corl no: name a checkout"):
        td3_lockstep.main(td3_lockstep.Args(corl="no"))


def test_limit_is_a_fixed_point_and_tau_0_is_brac():
    p, r, log_b = mdp = itrpo_paths.random_mdp()
    path, q = itrpo_paths.iterate(mdp, itrpo_paths.setting(0.0), 400)
    v = 4 * ((log_b + q / 4).logsumexp(-1))
    assert_close(q, r + 0.9 * p @ v, rtol=0, atol=1e-9)
    control, _ = itrpo_paths.iterate(mdp, itrpo_paths.setting(0.0, True), 400)
    assert torch.equal(path, control)


def test_errors_move_brac_more():
    mdp, late = itrpo_paths.random_mdp(), slice(100, None)
    wander = []
    for control in (False, True):
        path, _ = itrpo_paths.iterate(mdp, itrpo_paths.setting(0.9, control), 300, 0.5)
        wander.append(itrpo_paths.kl(path[late][1:], path[late][:-1]).mean())
    assert wander[0] < 0.1 * wander[1]


# ---- the maze --------------------------------------------------------------------------------


def test_maze_paths_draws_the_data_and_a_run(tmp_path):
    """A run of a few steps is drawn beside the data, of which no path joins start and goal."""
    import maze_paths

    from run import load

    flags = "--env pointmaze-stitch-demo --steps 2 --eval-env none --seed 0".split()
    call = [sys.executable, str(ROOT / "algorithms" / "bc.py"), *flags, "--out", str(tmp_path)]
    subprocess.run(call, check=True, capture_output=True)
    config = json.loads((tmp_path / "pointmaze-stitch-demo__bc__0" / "config.json").read_text())
    config["args"]["eval_env"] = None
    (tmp_path / "pointmaze-stitch-demo__bc__0" / "config.json").write_text(json.dumps(config))
    out = tmp_path / "maze.png"
    runs = (str(tmp_path / "pointmaze-stitch-demo__bc__0"),)
    maze_paths.main(maze_paths.Args(runs=runs, episodes=2, out=str(out)))
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    data, _ = load("pointmaze-stitch-demo")
    at_start = (data.obs[:, :2] - torch.tensor([-2.5, 2.5])).norm(dim=1) < 0.5
    starts = set(data.episode[at_start].tolist())
    goals = set(data.episode[data.terminal > 0].tolist())
    assert len(starts) > 20 and len(goals) > 20 and not starts & goals


# ---- FQL's ways to act -----------------------------------------------------------------------


def test_fql_best_of_watches_a_run(tmp_path, capsys):
    """Three actors and four handovers are judged; on its own rows the data has a distance of 0, and
    a policy that hands over to itself is that policy."""
    import fql_best_of as figure

    flags = "--steps 2 --hidden 8 --eval-episodes 1 --seed 0 --out".split()
    call = [sys.executable, str(ROOT / "algorithms" / "fql.py"), *flags, str(tmp_path)]
    subprocess.run(call, check=True, capture_output=True)
    folder = str(tmp_path / "hopper-medium-expert-demo__fql__0")
    out = tmp_path / "x.png"
    figure.main(figure.Args(runs=(folder,), episodes=2, steps=3, out=str(out)))
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert printed.count("steps, then") == 4 and printed.count("\n| ") == 8
    run = figure.load_run(folder)
    rows = run.nets.scaling.obs(run.data.obs[:50])
    assert figure.nearest(run.nets, run.data.obs[:50], rows).max() < 0.01
    assert figure.nearest(run.nets, run.data.obs[50:51], rows[:1]) == pytest.approx(
        (run.nets.scaling.obs(run.data.obs[50:51]) - rows[:1]).norm().item()
    )
    plans = (figure.BEST, figure.BEST, 3), (figure.BEST, figure.ONE_STEP, 0)
    returns = [figure.judged(run, figure.by(run, *plan), 2)[0] for plan in plans]
    alone = [figure.judged(run, figure.by(run, x, x, 0), 2)[0] for x in (plans[0][0], plans[1][1])]
    assert [x.tolist() for x in returns] == [x.tolist() for x in alone]
    assert returns[0].tolist() != returns[1].tolist()


# ---- the results -----------------------------------------------------------------------------


SETS = ("hopper-medium-expert-demo", "hopper-replay-demo", "pointmaze-stitch-demo")


def write_runs(root, method, env="hopper-replay-demo", scores=((10.0, 30.0), (20.0, 50.0)), **more):
    """Finished runs of one method, one for each row of `scores`; their folders."""
    from test_report import write_run

    more = {"every": 500, "references": {"data": 21.0}} | more
    return [write_run(root, env, method, seed, row, **more) for seed, row in enumerate(scores)]


def row(text, start):
    """The cells of the row of a table that begins so."""
    (line,) = (x for x in text.splitlines() if x.startswith(f"| {start}"))
    return line.strip("| ").split(" | ")


def test_results_draws_all_methods_and_other_programs_beside_ours(tmp_path):
    """Three pictures, and a fourth where other people's code was run."""
    args, clone = results.Args(str(tmp_path), str(tmp_path / "a")), {"data": 21.0, "its flow": 9.0}
    write_runs(tmp_path, "fql", references=clone)
    write_runs(tmp_path, "bc-top10", "pointmaze-stitch-demo")
    results.main(args)
    names = {"curves.png", "scores.png", "clone_to_policy.png"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    write_runs(tmp_path, "fql_authors")
    results.main(args)
    for name in names | {"peers.png"}:
        png = (tmp_path / "a" / name).read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", png[16:20]) == (1280,)


def test_a_curve_of_results_is_the_mean_with_its_standard_error(tmp_path):
    write_runs(tmp_path, "iql")
    runs = results.report.read_runs([tmp_path])
    x, mean, error = results.curve(runs)
    assert x.tolist() == [0.5, 1.0] and mean.tolist() == [15.0, 27.5]
    assert [*error] == pytest.approx([5.0, 7.5]) and mean.iloc[-1] == runs.score.mean()
    assert results.curve(runs[:1])[2].tolist() == [0.0, 0.0]
    runs.curve[1]["steps"] *= 2
    with pytest.raises(InputError, match="have other steps"):
        results.curve(runs)


def test_the_table_of_results_by_hand(tmp_path):
    write_runs(tmp_path, "td3_bc")  # two runs, of means 20 and 35
    write_runs(tmp_path, "corl_td3_bc", "pointmaze-stitch-demo", [(8.0, 4.0)])
    for env, score in zip(SETS, (10.0, 20.0, 60.0)):
        write_runs(tmp_path, "iql", env, [(score, score)] * 3)
        write_runs(tmp_path, "bc", env, [(score - 9, score - 9), (score, score), (score, score)])
    head, _, *rows = results.table(results.read_cells(str(tmp_path))).splitlines()
    names = " | ".join(f"`{env}`, 3 seeds" for env in SETS)
    assert head == f"| method | {names} | mean over the datasets |"
    assert rows[0] == "| the data, mean of its episodes | 21.0 | 21.0 | 21.0 |  |"
    assert rows[1:] == [
        "| BC | 7.0 ± 3.0 | 17.0 ± 3.0 | 57.0 ± 3.0 | 27.0 ± 1.7 |",
        "| TD3+BC | - | 27.5 ± 7.5 (2) | - | - |",
        "| IQL | 10.0 ± 0.0 | 20.0 ± 0.0 | 60.0 ± 0.0 | 30.0 ± 0.0 |",
        "| TD3+BC, CORL's code | - | - | 6.0 (1) | - |",
    ]


def test_runs_on_ogbench_have_a_table_of_their_own(tmp_path):
    write_runs(tmp_path, "iql")
    before = results.table(results.read_cells(str(tmp_path)))
    assert results.ogbench(str(tmp_path)) == ""
    env = "cube-single-play-singletask-v0"
    for method in ("fql_authors", "fql", "bc"):
        write_runs(tmp_path, method, env, [(60.0,), (70.0,)], references={"data": 38.0})
    rows = results.ogbench(str(tmp_path)).splitlines()[2:]
    titles = ("BC", "FQL", "FQL, its authors' code")
    assert rows == [f"| `{env}` | {x} | 60.0, 70.0 | 65.0 ± 5.0 |" for x in titles]
    assert results.table(results.read_cells(str(tmp_path))) == before


def test_an_ablation_stands_beside_its_counterpart(tmp_path):
    """A control of another run is compared with that one, and other people's code with ours. Hashes
    of code, and a flag that the other version does not know, are not told."""
    flags = lambda setting, alpha: {"args": {"setting": setting, "kl_coef": alpha}}
    write_runs(tmp_path, "itrpo", **flags("code", 1.0))
    new = {"settings": {"lam": "0.1", "code of algorithm": "new", "version of torch": "new"}}
    trust = dict(scores=((40.0,), (50.0,)), **flags("trust", 1.0))
    write_runs(tmp_path, "itrpo-trust", **trust, **new)
    write_runs(tmp_path, "itrpo-trust-control", scores=((30.0,),), **flags("trust", 1 - 0.9))
    write_runs(tmp_path, "iql", scores=((10.0,), (10.0,)))
    write_runs(tmp_path, "corl_iql", scores=((9.0,), (9.0,)))
    write_runs(tmp_path, "iql_authors", scores=((11.0,), (11.0,)))
    write_runs(tmp_path, "fql_authors")  # ours was not run
    tables = results.tables(results.read_cells(str(tmp_path)), tmp_path)
    env, itrpo = "`hopper-replay-demo` | ", tables["Ablations of iTRPO"]
    base, trust, control = (x[2:].rstrip(" |").split(" | ") for x in itrpo.splitlines()[2:])
    assert base[1:] == ["iTRPO", "20.0, 35.0", "27.5 ± 7.5"]
    assert trust[1:3] == ["iTRPO with `setting` trust, not code", "40.0, 50.0"]
    assert trust[3:] == ["45.0 ± 5.0", "+17.5 ± 9.0"]
    assert control[1:3] == ["iTRPO, `trust`, with `kl_coef` 0.1, not 1", "30.0"]
    assert control[3:] == ["30.0", "-15.0"]
    other = tables["Beside other people's code"]
    assert row(other, f"{env}IQL, CORL")[2:] == ["9.0, 9.0", "9.0 ± 0.0", "-1.0 ± 0.0"]
    assert row(other, f"{env}IQL, its")[2:] == ["11.0, 11.0", "11.0 ± 0.0", "+1.0 ± 0.0"]
    assert other.count("| IQL |") == 1 and "FQL" not in other
    assert "iTRPO" not in other and "IQL" not in itrpo


def test_the_way_from_the_clone_by_hand(tmp_path):
    arq = {"data": 21.0, "implicit policy": 60.0, "clone s_psi": 10.0}
    write_runs(tmp_path, "arq", references=arq)
    write_runs(tmp_path, "brac", SETS[0], references={"data": 21.0, "its clone (BC)": 5.0})
    write_runs(tmp_path, "td3_bc")
    cells = results.read_cells(str(tmp_path))
    text = results.clones(cells)
    assert row(text, "ARQ") == ["ARQ", "-", "10.0 → 60.0 → 27.5"]
    assert row(text, "BRAC") == ["BRAC", "5.0 → 27.5", "-"] and "TD3" not in text
    figure = results.arrows(cells)
    assert [x.get_text() for x in figure.axes[0].get_yticklabels()] == ["BRAC", "ARQ"]
    ends = {x.xy[0] for x in figure.axes[1].texts}
    starts = {x.xyann[0] for x in figure.axes[1].texts}
    assert ends == {20.0, 35.0} and starts == {60.0}, "one arrow a seed, from the implicit policy"


def test_the_gap_of_fisher_brc_by_hand(tmp_path):
    """Over the second half: 1.5 - 0.25 in every step of 1 / (1 - 0.9); Q(a') is -9 + 0.5 * 2."""
    for name, offset in (("", True), ("-no-offset", False)):
        flags = {"lam": 0.1, "gamma": 0.9, "offset": offset}
        for folder in write_runs(tmp_path, f"fisher_brc{name}", args=flags):
            lines = ["step,seconds,q_data,log_mu_data,log_mu_pi,pi_loss,temperature,entropy"]
            lines += ["10,1,0,9,9,9,9,9", "20,1,-7,1.5,0.25,9,0.5,-2", ""]
            (folder / "train.csv").write_text("\n".join(lines))
    cells = results.read_cells(str(tmp_path))
    assert results.gaps(cells, tmp_path) == "", "no metrics are stored"
    results.store.main(results.store.Args(str(tmp_path), str(tmp_path / "out")))
    text = results.gaps(cells, tmp_path / "out")
    assert row(text, "`")[1:] == ["0.1", "27.5", "1.50", "0.25", "1.25", "1.00", "-7.0", "5.5"]


def test_results_fit_into_800_pixels(tmp_path):
    """Every method on every dataset: no letter is too small, and nothing is cut at an edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    clone = {"data": 21.0, "its clone (BC)": 9.0}
    for env in SETS:
        for method in results.TITLES:
            write_runs(tmp_path, method, env, references=clone)
        for method in results.PEERS:
            write_runs(tmp_path, method, env)
    cells = results.read_cells(str(tmp_path))
    dots = results.dots(cells, [*results.TITLES, *results.PEERS])
    for figure in (results.curves(cells), dots, results.arrows(cells)):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for part in figure.subfigs or [figure]:
            (legend,) = part.legends
            box = legend.get_window_extent(canvas.get_renderer())
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0
            for panel in part.axes:
                inside = panel.get_tightbbox(canvas.get_renderer())
                assert not inside.overlaps(box)
                assert inside.x0 >= 0 and inside.x1 <= figure.bbox.width
        texts = [x for x in figure.findobj(lambda x: hasattr(x, "get_fontsize")) if x.get_text()]
        assert min(text.get_fontsize() for text in texts) / 72 * 800 / figure.get_figwidth() > 13
    for part, titles in zip(results.curves(cells).subfigs, results.FAMILIES.values(), strict=True):
        assert {text.get_text() for text in part.legends[0].get_texts()} >= set(titles.values())
        for panel in part.axes:
            styles = {(x.get_color(), str(x._dash_pattern)) for x in panel.lines}
            assert len(styles) == len(panel.lines) > len(titles), "two lines look alike"
    seeds = [x for panel in dots.axes for x in panel.lines if x.get_marker() == "o"]
    assert sorted({*seeds[0].get_xdata()}) == [20.0, 35.0]
    assert len(seeds) == len(cells) == 3 * len(dots.axes[0].get_yticklabels())


def test_every_algorithm_is_in_the_picture_of_results():
    scripts = {path.stem for path in tracked("algorithms")}
    assert scripts <= results.TITLES.keys()
    assert (ROOT / "results").is_dir() and results.Args().out == "results"


def test_results_refuses_a_folder_without_runs(tmp_path):
    with pytest.raises(InputError, match="no run below"):
        results.main(results.Args(str(tmp_path)))
    write_runs(tmp_path, "td3_bc", "hopper-medium-v2")
    with pytest.raises(InputError, match="is on a bundled dataset"):
        results.main(results.Args(str(tmp_path)))


def test_how_well_fqe_chooses(tmp_path, capsys):
    """By hand: FQE exchanges the two best of three, and so loses 10 points of score."""
    for name, fqe, score in (("a", 3.0, 80.0), ("b", 2.0, 90.0), ("c", 1.0, 10.0)):
        folder = tmp_path / f"data__{name}__0"
        folder.mkdir()
        found = {"run": str(folder), "fqe": fqe, "fqe_interval": [fqe - 1, fqe + 1]}
        found |= {"score": score, "data_fqe": 1.5}
        (folder / "evaluation.json").write_text(json.dumps(found))
        (folder / "config.json").write_text(json.dumps({"args": {"env": "data"}}))
    selection.main(selection.Args(str(tmp_path), str(tmp_path / "x.png")))
    row = "| data | 3 | 0.50 | 10.0 | data__a__0 | data__b__0 |"
    assert row in capsys.readouterr().out.splitlines()
    assert (tmp_path / "x.png").stat().st_size > 1000
    with pytest.raises(InputError, match="no run with an FQE"):
        selection.read(tmp_path / "nowhere")
