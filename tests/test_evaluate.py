"""evaluate.py: fitted Q evaluation against exact values, export into a bare process, refusals;
speed.py: its flags and clock."""

import dataclasses
import errno
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from test_scripts import SCRIPTS, flags, write_log
from torch.testing import assert_close

import evaluate as judge
import speed
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
    module, nets, args, *_ = judge.load_run(folder)
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
    module, nets, args, _, task, _ = judge.load_run(folder)
    env, total, discounted = task.make(), 0.0, 0.0
    obs, _ = env.reset(seed=10_000)
    for t in range(200):
        with torch.no_grad():
            action = module.policy(nets, torch.as_tensor(obs)[None], args)[0]
        obs, reward, _, _, _ = env.step(action.numpy())
        total, discounted = total + reward, discounted + 0.9**t * reward
    assert found["return"] == pytest.approx(total) == pytest.approx(found["returns"][0])
    assert found["discounted_return"] == pytest.approx(discounted)


def test_later_commands_add_to_the_file(here, capsys):
    """Of the same seed, gamma and checkpoint; one episode has no deviation; the file is JSON."""
    folder = trained("bc")

    def judged(**flags):
        judge.main(judge.Args(str(folder), **{"episodes": 0, "fqe_steps": 0} | flags))
        return json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)

    capsys.readouterr()
    before = judged(fqe_steps=3)
    found = judged(export="policy.pt2", episodes=1)
    assert found["return_standard_error"] is None and len(found["returns"]) == 1
    assert "fqe" in before and before.items() <= found.items()
    out = capsys.readouterr().out
    assert "(as recorded)" in out and "in Pendulum-v1: return -" in out and "nan" not in out
    assert "fqe" not in judged(seed=2) and "fqe" not in judged(gamma=0.9)
    judged(fqe_steps=3)
    saved = torch.load(folder / "checkpoint.pt")
    torch.save(saved | {"step": 19}, folder / "checkpoint.pt")
    assert "fqe" not in judged()


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
    refused(folder, "another version of td3_bc.py or is damaged (it has momentum=3)")
    for key, value in dict(env=4, eval_env=5, alpha="2.5", seed=None).items():
        (folder / "config.json").write_text(original)
        edit(folder, lambda c: c["args"].update({key: value}))
        refused(folder, f"(it has {key}={value!r})")
    (folder / "config.json").write_text(original[:-9])
    refused(folder, "config.json cannot be read (JSONDecodeError")
    (folder / "config.json").write_text(original)
    edit(folder, lambda c: c.update(dataset_sha256="0"))
    refused(folder, "is not the data")
    (folder / "config.json").write_text(original)
    (folder / "checkpoint.pt").write_bytes(b"rubbish")
    refused(folder, "cannot be read")
    (folder / "checkpoint.pt").unlink()
    refused(folder, "no checkpoint.pt")


def test_full_disk(here, monkeypatch):
    folder = trained("bc")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def frame(self):
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(gymnasium.envs.classic_control.PendulumEnv, "render", frame)
    flags = dict(episodes=1, fqe_steps=0)
    judge.main(judge.Args(str(folder), **flags, video="a.gif"))
    assert Path("a.gif").read_bytes().startswith(b"GIF89a")
    monkeypatch.setattr(Path, "write_bytes", full)
    for path, more in {
        "runs/log__bc__3/evaluation.json": {},
        "policy.pt2": {"export": "policy.pt2"},
        "b.gif": {"video": "b.gif"},
    }.items():
        with pytest.raises(judge.InputError, match=f"{path} cannot be written .No space left"):
            judge.main(judge.Args(str(folder), **flags, **more))


def test_types_of_a_config():
    """Every file's defaults and presets, as JSON holds them, are of its fields' types."""
    for path in SCRIPTS:
        module = importlib.import_module(path.stem)
        kinds = {f.name: f.type for f in dataclasses.fields(module.Args)}
        for row in ({}, *module.PRESETS.values()):
            values = json.loads(json.dumps(vars(module.Args(**row))))
            assert not [k for k, v in values.items() if not judge.fits(kinds[k], v)], path.stem


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(episodes=-1), "0 or above"),
        (dict(fqe_steps=-1), "0 or above"),
        (dict(seed=-1), "0 or above"),
        (dict(gamma=1.0), "--gamma is 1.0: give a number from 0 to below 1"),
        (dict(gamma=float("nan")), "--gamma is nan"),
        (dict(export="."), "is a folder"),
        (dict(export="no/policy.pt2"), "no folder no"),
        (dict(video="no/film.gif"), "no folder no"),
    ],
)
def test_bad_flags(here, flags, words):
    with pytest.raises(judge.InputError, match=words):
        judge.main(judge.Args("nowhere", **flags))


# ---- speed.py --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(threads=0), "--threads is 0"),
        (dict(obs_dim=0), "--obs-dim is 0"),
        (dict(precision="foo"), "--precision is 'foo'"),
        (dict(csv="no/x.csv"), "--csv no/x.csv: give a file's name in a folder"),
        (dict(algorithms=("no",)), "no algorithms/no.py"),
    ],
)
def test_bad_flags_of_speed(here, flags, words, monkeypatch):
    monkeypatch.setattr(speed, "measure", lambda *_: pytest.fail("found out after the work"))
    with pytest.raises(judge.InputError, match=words):
        speed.main(speed.Args(**flags))


@pytest.mark.parametrize(("threads", "clock"), [(1, time.process_time), (2, time.perf_counter)])
def test_clock_of_speed(threads, clock, monkeypatch):
    """CPU time for one thread; with more it would add them up."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    watch = speed.Stopwatch(speed.Args(), seconds=1)
    assert abs(watch.clock() - clock()) < 0.5
