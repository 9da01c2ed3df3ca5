"""evaluate.py: fitted Q evaluation against exact values, export into a bare process, a small film,
refusals in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import tyro
from gymnasium.envs.classic_control import PendulumEnv
from PIL import Image
from short_runs import ROOT, SCRIPTS, start, write_log
from torch.testing import assert_close

from common import Data, InputError
from run import make
from run import rows as transitions
from tools import evaluate as judge
from tools import fqe


def trained(name, **more):
    """The folder of a run of 20 steps on log.npz, whose task is Pendulum-v1."""
    _, run = start(name, **{"eval_env": None} | more)
    return run.folder


def judged(folder, **flags):
    """What evaluate.py finds, with no more than the flags ask for."""
    judge.main(judge.Args((str(folder),), **{"episodes": 0, "fqe_steps": 0} | flags))
    text = (folder / "evaluation.json").read_text()
    return json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON


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
    return Data(eye[s], a.float()[:, None], r.float(), eye[s2], terminal.float(), e, name="chain")


def exact(gamma, action):
    """V of the chain's policy that always takes `action`, by linear equations."""
    right, p, r = (1 + action) / 2, np.zeros((5, 5)), np.zeros(5)
    for s in range(5):
        for s2, chance in ((min(s + 1, 4), right), (max(s - 1, 0), 1 - right)):
            p[s, s2] += chance * (0.7 if s2 == 4 else 1)
            r[s] += chance * (s2 == 4)
    return np.linalg.solve(np.eye(5) - gamma * p, r)


def always(action, act_dim=1):
    return lambda obs: torch.full((len(obs), act_dim), action)


@pytest.mark.parametrize("action", [0.6, -0.2])
def test_fqe_finds_the_exact_value_of_a_tabular_policy(action):
    data = chain()
    (_, found) = fqe.compare(data, {"x": always(action)}, 0.9, 1_000, seed=1)
    value = exact(0.9, action)[data.obs[fqe.first_rows(data)].argmax(1)].mean()
    assert abs(found["fqe"] - value) < 0.08 * value + 0.03, (found, value)
    low, high = found["fqe_interval"]
    assert low < value < high and high - low < 0.5 * value + 0.2
    distance = (action - data.action).square().mean().sqrt()
    assert found["action_distance"] == pytest.approx(distance)


def test_recorded_return_by_hand(tiny_data):
    data = tiny_data(n=4)
    data.reward = torch.tensor([1.0, 2, 4, 8])
    data.episode, data.terminal = torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 1, 0, 1])
    assert fqe.recorded_return(data, 0.5) == pytest.approx((1 + 1 + 4 + 4) / 2)
    data.terminal[1] = 0
    assert fqe.recorded_return(data, 0.5) is None


def test_the_data_have_the_actions_of_their_next_rows(tiny_data):
    """None is known after a cut, and none matters after a terminal."""
    data = tiny_data(n=4, act_dim=1)
    data.episode, data.terminal = torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 0, 0, 1])
    after, action = fqe.recorded_actions(data)
    assert torch.equal(action, data.action)
    assert after[0] == action[1] and after[2] == action[3] and after[3] == 0
    assert after[1].isnan()


def test_fqe_starts_where_episodes_start_and_not_after_holes():
    """Two episodes, the first with a hole after its second row. Alone, it is its two parts."""
    arrays = {"observations": np.arange(7.0)[:, None], "actions": np.zeros((7, 1))}
    following = np.arange(1.0, 8) + [0, 0.5, 0, 0.5, 0, 0, 0]
    arrays |= {"next_observations": following[:, None], "rewards": np.ones(7)}
    arrays |= {"terminals": np.zeros(7), "timeouts": np.array([0, 1, 0, 1, 0, 0, 1])}
    arrays["episode"] = np.array([3, 3, 3, 3, 4, 4, 4])
    data = transitions(arrays, {}, "log", "cpu")
    assert fqe.first_rows(data).tolist() == [0, 4]
    assert data.episode.tolist() == [0, 0, 1, 1, 2, 2, 2]  # parts
    del arrays["timeouts"], arrays["episode"]
    one = {key: x[:4] for key, x in arrays.items()} | {"step": np.array([0, 1, 5, 6])}
    one = transitions(one, {}, "log", "cpu")
    assert fqe.first_rows(one).tolist() == [0, 2]


def test_fqe_uses_the_bounds_of_the_actions():
    """The same chain with actions in [0, 10] has the same values and the same distance."""
    data = chain(50)
    _, plain = fqe.compare(data, {"x": always(0.5)}, 0.9, 50, seed=1)
    data.action_low, data.action_high = torch.zeros(1), torch.full((1,), 10.0)
    _, scaled = fqe.compare(data, {"x": always(7.5)}, 0.9, 50, seed=1)
    for key in ("fqe", "minus_data", "action_distance"):
        assert scaled[key] == pytest.approx(plain[key], rel=1e-4), key


def test_what_fqe_does_not_know_is_said():
    """Few steps cover little of the horizon, and equal policies cannot be told apart."""
    data = chain(50)
    own, *found = fqe.compare(data, {"x": always(0.5), "y": always(0.5)}, 0.99, 30, seed=1)
    ranked = [{"run": "the data"} | own, *({"run": n} | x for n, x in zip("xy", found))]
    lines = "\n".join(fqe.notes(ranked, data))
    assert "leave 97% of the horizon uncovered" in lines
    assert "cannot tell x from y: the interval of their difference, 0 to 0, is" in lines
    assert lines.count("cannot tell") == 3, "each policy from the data, and from its neighbor"
    for x, error in zip(ranked, (0.1, 2.0, 0.1)):
        x["td_error"] = error
    words = [line for line in fqe.notes(ranked, data) if "as large as a reward" in line]
    assert len(words) == 1 and words[0].startswith("note: x: the TD error")


def test_interval_by_hand():
    """Student's t for four degrees of freedom, 2.776, times the deviation of five values, the
    square root of 2.5."""
    assert fqe.interval([5.0, 1.0, 4.0, 2.0, 3.0]) == pytest.approx([-1.39, 7.39], abs=0.01)


def test_fqe_shows_progress_in_a_pipe():
    line = "from test_evaluate import chain, fqe; fqe.compare(chain(20), {}, 0.9, 5, seed=1)"
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "algorithms", ROOT / "tests")))
    env = os.environ | {"PYTHONPATH": folders}
    done = subprocess.run([sys.executable, "-c", line], env=env, capture_output=True, text=True)
    assert "FQE of the data: 100%" in done.stderr, done.stderr


def test_fqe_needs_episodes(tiny_data):
    data = tiny_data()
    data.episode.zero_()
    with pytest.raises(InputError, match="one episode"):
        fqe.compare(data, {}, 0.9, 1, 0)


# ---- several runs ----------------------------------------------------------------------------


def test_runs_are_compared_in_one_table(here, capsys):
    """Best first, the data's own policy between them; each run keeps its results."""
    runs = tuple(str(trained(name)) for name in ("bc", "td3_bc"))
    capsys.readouterr()
    judge.main(judge.Args(runs, episodes=2, fqe_steps=5))
    lines = capsys.readouterr().out.splitlines()
    head, *rows = lines = [
        x for x in lines if "rows do not follow" not in x and "Pendulum" not in x
    ]
    rows = rows[:3]
    assert head.split() == ["FQE", "minus", "the", "data", "distance", "return", "score"]
    values = [float(row.split(" (")[0].split()[-1]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert {row.strip().partition("  ")[0] for row in rows} == {*runs, "the data"}
    assert any("cannot tell" in line for line in lines[4:])
    for run in runs:
        found = json.loads((Path(run) / "evaluation.json").read_text())
        assert found["fqe_steps"] == 5 and found["task"] == "Pendulum-v1" and found["run"] == run
        gap = found["fqe"] - found["data_fqe"]
        assert found["minus_data"] == pytest.approx(gap, abs=1e-6) and len(found["returns"]) == 2


def test_runs_that_cannot_be_compared(here):
    """Other data, another task, and flags for one run: one line each."""
    one = trained("bc")
    two = trained("bc", eval_env="none", out="alone")
    write_log("other.npz", seed=1)
    three = trained("bc", env="other.npz", out="others")
    for other, words in {two: "has the task none, ", three: "has other data than"}.items():
        with pytest.raises(InputError, match=words):
            judge.main(judge.Args((str(one), str(other)), episodes=0, fqe_steps=1))
    with pytest.raises(InputError, match="take one run"):
        judge.main(judge.Args((str(one), str(one)), export="x.pt2"))


# ---- a run of each algorithm -----------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_run_is_judged_and_exported(path, here):
    """With a simulator: returns, FQE, and a policy that gives the same actions to 1e-6, one row at
    a time and, unless it draws and cannot be handed its noise, many at once."""
    folder = trained(path.stem)
    found = judged(folder, episodes=2, fqe_steps=5, export="policy.pt2")
    assert len(found["returns"]) == 2 and np.isfinite([found["fqe"], found["td_error"]]).all()
    run = judge.load_run(folder)
    torch.manual_seed(0)
    obs = torch.randn(3, 3)
    draws = judge.Draws()
    with draws, torch.no_grad():
        expected = torch.cat([run.act(row) for row in obs.split(1)])
    count = len(draws.taken) // 3  # a row's
    noise = [draws.taken[i * count : (i + 1) * count] for i in range(3)]
    policy = torch.export.load("policy.pt2").module()
    actions = [policy(row, *drawn) for row, drawn in zip(obs.split(1), noise)]
    assert_close(torch.cat(actions), expected, atol=1e-6, rtol=0)
    if count == 0:
        assert_close(policy(obs), expected, atol=1e-6, rtol=0)
    elif hasattr(run.module, "policy_with_noise"):
        actions = policy(obs, torch.cat([drawn[0] for drawn in noise]))
        assert_close(actions, expected, atol=1e-6, rtol=0)


BARE = """
import sys, torch
policy, sampler = (torch.export.load(f"{name}.pt2").module() for name in ("td3_bc", "fql"))
obs, noise = torch.load("inputs.pt")
torch.save((policy(obs), sampler(obs, noise)), "actions.pt")
assert not {"common", "run", "gymnasium", "td3_bc", "fql"} & sys.modules.keys()
"""


def test_an_exported_policy_needs_torch_alone(here):
    obs, noise = torch.randn(5, 3), torch.randn(5, 1)
    torch.save((obs, noise), "inputs.pt")
    runs = {name: judge.load_run(trained(name)) for name in ("td3_bc", "fql")}
    for name, run in runs.items():
        judge.export(run.module, run.nets, run.args, f"{name}.pt2")
    subprocess.run([sys.executable, "-c", BARE], check=True)
    actions, sampled = torch.load("actions.pt")
    assert_close(actions, runs["td3_bc"].act(obs), atol=1e-6, rtol=0)
    fql = runs["fql"]
    expected = fql.module.policy_with_noise(fql.nets, obs, noise, fql.args)
    assert_close(sampled, expected, atol=1e-6, rtol=0)


def test_an_exported_policy_keeps_the_names_of_its_columns(here, capsys):
    folder = trained("td3_bc")
    names = {"observations": ["\u03b8", "y", "speed"], "actions": ["torque"], "reward": "cost"}
    edit(folder, lambda c: c.update(columns=names))
    judged(folder, export="policy.pt2")
    said = capsys.readouterr().out
    assert "observations: \u03b8, y, speed\nactions: torque\nreward: cost\n" in said
    kept = {"columns.json": ""}
    torch.export.load("policy.pt2", extra_files=kept)
    assert json.loads(kept["columns.json"]) == names


def test_a_run_without_a_simulator(here):
    folder = trained("td3_bc", eval_env="none")
    assert "returns" not in judged(folder, episodes=100, fqe_steps=5)
    with pytest.raises(InputError, match="--video needs a simulator: use --eval-env"):
        judged(folder, video="x.gif")


def test_far_from_its_data(here, monkeypatch, capsys):
    """Another current folder: the policy is exported all the same, and judged where --env names the
    data; without either, the refusal names the file."""
    folder = trained("td3_bc").absolute()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    found = judged(folder, export="policy.pt2", episodes=1, fqe_steps=1)
    assert (
        "note: the policy is exported and not judged: there is no file log.npz"
        in capsys.readouterr().out
    )
    assert "fqe" not in found and "returns" not in found
    assert torch.export.load("policy.pt2").module()(torch.zeros(7, 3)).shape == (7, 1)
    with pytest.raises(InputError, match="no file log.npz"):
        judged(folder, fqe_steps=1)
    with pytest.raises(InputError, match="no file log.npz"):
        judged(folder, export="again.pt2", eval_env="Pendulum-v1", episodes=1)
    found = judged(folder, env="../log.npz", episodes=1, fqe_steps=1)
    assert "fqe" in found and len(found["returns"]) == 1


def test_simulated_return_and_its_discounted_form(here):
    """Pendulum's 200 steps, added up by hand."""
    folder = trained("bc")
    found = judged(folder, episodes=1, gamma=0.9)
    run = judge.load_run(folder)
    env, total, discounted = make(run.task), 0.0, 0.0
    obs, _ = env.reset(seed=10_000)
    for t in range(200):
        action = run.act(torch.as_tensor(obs)[None])[0]
        obs, reward, _, _, _ = env.step(action.numpy())
        total, discounted = total + reward, discounted + 0.9**t * reward
    assert found["return"] == pytest.approx(total) == pytest.approx(found["returns"][0])
    assert found["discounted_return"] == pytest.approx(discounted)


# ---- the film --------------------------------------------------------------------------------


class Painted(PendulumEnv):
    """A pendulum of 60 steps whose pictures are noise."""

    def render(self):
        return self.np_random.integers(256, size=(480, 640, 3), dtype=np.uint8)


gymnasium.register("Painted-v0", f"{__name__}:Painted", max_episode_steps=60)


def test_film(here, capsys):
    """Two seconds of 30 frames each: a dozen frames a second, in real time."""
    folder = trained("bc", eval_env="Painted-v0")
    judged(folder, video="film.gif", seed=4)
    assert "film.gif: return -" in capsys.readouterr().out
    film = Image.open("film.gif")
    assert film.info["loop"] == 0 and film.width / film.height == pytest.approx(4 / 3, abs=0.02)
    durations = []
    for i in range(film.n_frames):
        film.seek(i)
        durations.append(film.info["duration"])
    assert sum(durations) == pytest.approx(2000, abs=150)


def test_the_camera_follows_the_body():
    """Gymnasium's own camera of a walking robot stays where it begins."""
    env = judge.with_camera({"env_id": "Hopper-v5"})
    renderer = env.unwrapped.mujoco_renderer
    assert renderer.model.camera(renderer.camera_id).name == "track"
    judge.with_camera({"env_id": "Pendulum-v1"}).close()  # has no camera


# ---- refusals --------------------------------------------------------------------------------


def refused(folder, words, **flags):
    with pytest.raises(InputError) as error:
        judged(folder, **{"episodes": 1} | flags)
    line = str(error.value)
    assert "\n" not in line and words in line, line


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_damaged_and_foreign_runs(here):
    refused(Path("nowhere"), "is no run")
    refused(Path("log.npz"), "is no run")
    folder = trained("td3_bc")
    original = (folder / "config.json").read_text()
    edit(folder, lambda c: c.update(algorithm="../../evil"))
    refused(folder, "no algorithms/../../evil.py")
    (folder / "config.json").write_text(original)
    edit(folder, lambda c: c["args"].update(momentum=3))
    refused(folder, "another version of td3_bc.py or damaged")
    (folder / "config.json").write_text(original)
    (folder / "config.json").write_text(original[:-9])
    refused(folder, "config.json cannot be used (JSONDecodeError")
    (folder / "config.json").write_text(original)
    edit(folder, lambda c: c["settings"].update(data="0"))
    refused(folder, "is not the data")
    (folder / "config.json").write_text(original)
    saved = torch.load(folder / "checkpoint.pt")
    torch.save(saved | {"nets": {"scaling.obs_mean": torch.zeros(3)}}, folder / "checkpoint.pt")
    refused(folder, "scaling.action_center")
    (folder / "checkpoint.pt").write_bytes(b"rubbish")
    refused(folder, "checkpoint.pt cannot be used")
    (folder / "checkpoint.pt").unlink()
    refused(folder, "no checkpoint.pt")


BAD = {
    "--export .": "is a folder: use a file's name",
    "--export no/policy.pt2": "no folder no for no/policy.pt2: make it first",
    "--video no/film.gif": "no folder no",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_flags(here, line):
    with pytest.raises(InputError, match=BAD[line]):
        judge.main(tyro.cli(judge.Args, args=["nowhere", *line.split()]))
