"""evaluate.py: fitted Q evaluation against exact values, export into a bare process, refusals."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_scripts import SCRIPTS, flags, write_log
from torch.testing import assert_close

import evaluate as judge
from common import parse
from datasets import Data

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log("log.npz")
    return tmp_path


def trained(name, **more):
    """The folder of a run of 20 steps."""
    module = importlib.import_module(name)
    line = flags(ROOT / "algorithms" / f"{name}.py", **more)
    module.train(parse(module.Args, module.PRESETS, line))
    (folder,) = Path("runs").glob("*__*__3")
    return folder


# ---- fitted Q evaluation ---------------------------------------------------------------------


def chain(episodes=400, length=12, seed=0):
    """Five states in a row, one-hot; an action in [-1, 1] goes right with probability (1 + a) / 2,
    else left; reward 1 in the last state, which ends the episode with probability 0.3."""
    rng = np.random.default_rng(seed)
    rows = []
    for e in range(episodes):
        s = rng.integers(3)
        for t in range(length):
            a = rng.uniform(-1, 1)
            s2 = min(s + 1, 4) if rng.random() < (1 + a) / 2 else max(s - 1, 0)
            terminal = s2 == 4 and rng.random() < 0.3
            rows.append((e, s, a, float(s2 == 4), s2, terminal))
            s = s2
            if terminal:
                break
    e, s, a, r, s2, terminal = (torch.tensor(x) for x in zip(*rows))
    eye = torch.eye(5)
    return Data(
        obs=eye[s], action=a.float()[:, None], reward=r.float(), next_obs=eye[s2],
        terminal=terminal.float(), episode=e, episode_return=torch.zeros(episodes),
        action_low=-torch.ones(1), action_high=torch.ones(1), obs_mean=torch.zeros(5),
        obs_std=torch.ones(5), name="chain", digest="0",
    )  # fmt: skip


def exact(gamma, action):
    """V of the chain's policy that always takes `action`, by linear equations."""
    right, p, r = (1 + action) / 2, np.zeros((5, 5)), np.zeros(5)
    for s in range(5):
        for s2, chance in ((min(s + 1, 4), right), (max(s - 1, 0), 1 - right)):
            p[s, s2] += chance * (0.7 if s2 == 4 else 1)
            r[s] += chance * (s2 == 4)
    return np.linalg.solve(np.eye(5) - gamma * p, r)


@pytest.mark.parametrize("action", [0.6, -0.2])
def test_fqe_finds_the_exact_value_of_a_tabular_policy(action):
    data = chain()
    found = judge.fqe(data, lambda obs: torch.full((len(obs), 1), action), 0.9, 4_000, seed=1)
    value = exact(0.9, action)[:3].mean()  # the data's start states
    assert abs(found["fqe"] - value) < 0.08 * value + 0.03, (found, value)
    low, high = found["fqe_interval"]
    assert low < found["fqe"] < high and found["held_out_episodes"] == 80
    own = (torch.full((len(data.obs), 1), action) - data.action).square().mean().sqrt()
    assert abs(found["action_distance"] - own) < 0.05


def test_fqe_uses_the_bounds_of_the_actions():
    """The same chain with actions in [0, 10] has the same values and the same distance."""
    data = chain()
    plain = judge.fqe(data, lambda obs: torch.full((len(obs), 1), 0.5), 0.9, 200, seed=1)
    data.action_low, data.action_high = torch.zeros(1), torch.full((1,), 10.0)
    scaled = judge.fqe(data, lambda obs: torch.full((len(obs), 1), 7.5), 0.9, 200, seed=1)
    assert plain.keys() == scaled.keys()
    for key, value in plain.items():
        assert scaled[key] == pytest.approx(value, rel=1e-4), key


def test_discounted_return_by_hand(tiny_data):
    data = tiny_data(n=4)
    data.reward, data.episode = torch.tensor([1.0, 2, 4, 8]), torch.tensor([0, 0, 1, 1])
    both = torch.tensor([True, True])
    assert judge.discounted_return(data, both, 0.5) == pytest.approx((1 + 1 + 4 + 4) / 2)
    assert judge.discounted_return(data, torch.tensor([False, True]), 0.5) == pytest.approx(8)


def test_fqe_needs_episodes(tiny_data):
    data = tiny_data()
    data.episode.zero_()
    with pytest.raises(judge.InputError, match="one episode"):
        judge.fqe(data, lambda obs: torch.zeros(len(obs), 2), 0.9, 1, 0)


# ---- a run of each algorithm -----------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_judge_and_export(path, here):
    """With a simulator: returns, FQE and a policy that a bare torch process runs to 1e-6."""
    folder = trained(path.stem)
    judge.main(judge.Args(str(folder), episodes=2, fqe_steps=5, export="policy.pt2"))
    found = json.loads((folder / "evaluation.json").read_text())
    assert len(found["returns"]) == 2 and np.isfinite([found["fqe"], found["td_error"]]).all()
    module, nets, args, _, _ = judge.load_run(folder)
    torch.manual_seed(0)
    obs = torch.randn(3, 3)
    with judge.Draws() as draws, torch.no_grad():
        expected = torch.cat([module.policy(nets, x[None], args) for x in obs])
    per_call = len(draws.taken) // 3
    noise = [draws.taken[i * per_call : (i + 1) * per_call] for i in range(3)]
    torch.save([obs, noise], "inputs.pt")
    code = """
import torch
policy = torch.export.load("policy.pt2").module()
obs, noise = torch.load("inputs.pt")
actions = [policy(x[None], *n) for x, n in zip(obs, noise)]
torch.save(torch.cat(actions), "actions.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=here)
    assert_close(torch.load("actions.pt"), expected, atol=1e-6, rtol=0)
    if not per_call:  # any batch size
        batch = torch.export.load("policy.pt2").module()(obs)
        assert_close(batch, expected, atol=1e-6, rtol=0)


def test_noise_is_an_input():
    """A policy that samples: the exported function adds exactly the noise that it is given."""

    class Sampler:
        @staticmethod
        def policy(nets, obs, args):
            return nets.scaling(obs) + torch.randn_like(obs) + torch.rand(3)

    nets = torch.nn.Module()
    nets.scaling = torch.nn.Identity()
    nets.scaling.obs_mean = torch.zeros(3)
    exported = judge.Deployed(Sampler, nets, None)
    out = exported(torch.ones(1, 3), torch.full((1, 3), 2.0), torch.full((3,), 5.0))
    assert_close(out, torch.full((1, 3), 8.0))


def test_without_a_simulator(here):
    folder = trained("td3_bc", eval_env="none")
    judge.main(judge.Args(str(folder), fqe_steps=5))
    assert "returns" not in json.loads((folder / "evaluation.json").read_text())
    with pytest.raises(judge.InputError, match="--eval-env"):
        judge.main(judge.Args(str(folder), fqe_steps=0, video="x.gif"))


def test_simulated_return_and_its_discounted_form(here):
    """Pendulum's 200 steps, added up by hand."""
    folder = trained("bc")
    judge.main(judge.Args(str(folder), episodes=1, fqe_steps=0, gamma=0.9))
    found = json.loads((folder / "evaluation.json").read_text())
    module, nets, args, _, task = judge.load_run(folder)
    env, total, discounted = task.make(), 0.0, 0.0
    obs, _ = env.reset(seed=10_000)
    for t in range(200):
        with torch.no_grad():
            action = module.policy(nets, torch.as_tensor(obs)[None], args)[0]
        obs, reward, _, _, _ = env.step(action.numpy())
        total, discounted = total + reward, discounted + 0.9**t * reward
    assert found["return"] == pytest.approx(total) == pytest.approx(found["returns"][0])
    assert found["discounted_return"] == pytest.approx(discounted)


# ---- refusals --------------------------------------------------------------------------------


def refused(folder, words):
    with pytest.raises(judge.InputError) as error:
        judge.main(judge.Args(str(folder), episodes=1, fqe_steps=0))
    line = str(error.value)
    assert "\n" not in line and words in line, line


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_refusals(here):
    refused("nowhere", "is no run")
    folder = trained("td3_bc")
    original = (folder / "config.json").read_text()
    edit(folder, lambda c: c.update(algorithm="../../evil"))
    refused(folder, "no algorithms/../../evil.py")
    (folder / "config.json").write_text(original)
    edit(folder, lambda c: c["args"].update(momentum=3))
    refused(folder, "another version of td3_bc.py (it has momentum)")
    (folder / "config.json").write_text(original)
    edit(folder, lambda c: c.update(dataset_sha256="0"))
    refused(folder, "is not the data")
    (folder / "config.json").write_text(original)
    (folder / "checkpoint.pt").write_bytes(b"rubbish")
    refused(folder, "cannot be read")
    (folder / "checkpoint.pt").unlink()
    refused(folder, "no checkpoint.pt")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(episodes=-1), "0 or above"),
        (dict(fqe_steps=-1), "0 or above"),
        (dict(export="no/policy.pt2"), "no folder no"),
        (dict(video="no/film.gif"), "no folder no"),
    ],
)
def test_bad_flags(here, flags, words):
    with pytest.raises(judge.InputError, match=words):
        judge.main(judge.Args("nowhere", **flags))
