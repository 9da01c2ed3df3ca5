"""OGBench by name: names, files in its raw format, rewards, tasks and scores.

Most tests make the file themselves; those that need the package are skipped without it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import bc
import fql
import iql
import numpy as np
import pytest
import rebrac
import torch

from common import InputError
from readers import ogbench
from readers.tasks import make, register, table, task_of
from run import load, parse, score

ROOT = Path(__file__).resolve().parents[1]
installed = pytest.mark.skipif(not importlib.util.find_spec("ogbench"), reason="no ogbench")
NAME = "pointmaze-medium-navigate-singletask"
GOAL = np.array([20.0, 20.0])  # of task 1 in the medium maze: cell (6, 6), 4 units a cell
LENGTHS = 5, 4, 6  # rows of three recordings, the last state of each included


def raw(solved=(2, 3, 8, 14), obs_dim=2):
    """A file as OGBench publishes it; `solved` rows are at the goal of task 1."""
    n, draw = sum(LENGTHS), np.random.default_rng(0)
    qpos = draw.uniform(0, 4, (n, 2)).astype(np.float32)
    qpos[list(solved)] = GOAL + 0.5
    ends = np.zeros(n, bool)
    ends[np.cumsum(LENGTHS) - 1] = True
    actions = draw.uniform(-1, 1, (n, 2)).astype(np.float32)
    obs = np.concatenate([qpos] * (obs_dim // 2), 1)
    return {
        "observations": obs,
        "actions": actions,
        "terminals": ends,
        "qpos": qpos,
        "qvel": np.zeros_like(qpos),
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """OGBench's folder, with the raw file of one maze."""
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    np.savez_compressed(tmp_path / "pointmaze-medium-navigate-v0.npz", **raw())
    return tmp_path


# ---- names -----------------------------------------------------------------------------------


def error_of(name, eval_env=None) -> str:
    with pytest.raises(InputError) as error:
        load(name, eval_env=eval_env)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{NAME}-task7-v0", f"{NAME}-v0"),
        (f"{NAME}-task0-v0", f"{NAME}-v0"),
        (f"{NAME}-v1", f"{NAME}-v0"),
        ("cube-singel-play-singletask-v0", "cube-single-play-singletask-v0"),
        ("visual-cube-single-play-singletask-task1-v0", "cube-single-play-singletask-v0"),
        ("visual-antmaze-medium-navigate-v0", "antmaze-medium-navigate-singletask-v0"),
        ("powderworld-easy-play-v0", "its images"),
        ("cube-singel-play-v0", "cube-single-play-singletask-v0"),
        ("cube-double-play-v0", "cube-double-play-singletask-v0"),
        ("puzzle-3x3-play-oraclerep-v0", "puzzle-3x3-play-singletask-v0"),
        ("antmaze-giant-explore-v0", "unknown dataset"),
    ],
)
def test_a_wrong_name_is_one_line_that_names_the_right_one(name, said):
    assert said in error_of(name)


def test_a_d4rl_name_is_not_taken_for_ogbench(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    (tmp_path / "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5").touch()
    assert "OGBench" not in error_of("antmaze-umaze-v2", eval_env="none")


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    assert "pip install ogbench" in error_of(f"{NAME}-v0")


@installed
def test_every_name_has_its_environment_and_default_task():
    """The table against the package's own registry."""
    import gymnasium

    importlib.import_module("ogbench")
    for name in ogbench.names():
        assert ogbench.split(name)[1] in gymnasium.registry, name
    assert len(ogbench.names()) == 6 * 47
    for name in ("pointmaze-medium-navigate", "antsoccer-arena-navigate"):
        env = gymnasium.make(ogbench.split(f"{name}-singletask-v0")[1])
        env.reset()
        number = int(table("ogbench_sets.csv")[name]["default_task"])
        assert env.unwrapped.cur_task_id == number


# ---- files -----------------------------------------------------------------------------------


@installed
def test_rows_are_those_of_ogbenchs_own_loader(folder, monkeypatch):
    import ogbench

    np.savez_compressed(folder / "pointmaze-medium-navigate-v0-val.npz", **raw())
    path = str(folder / "pointmaze-medium-navigate-v0.npz")
    _, theirs, _ = ogbench.make_env_and_datasets(f"{NAME}-task1-v0", dataset_path=path)
    ours, task = load(f"{NAME}-task1-v0")
    pairs = {"obs": "observations", "action": "actions", "reward": "rewards"}
    pairs |= {"next_obs": "next_observations"}
    for name, key in pairs.items():
        np.testing.assert_array_equal(getattr(ours, name).numpy(), theirs[key])
    np.testing.assert_array_equal(ours.terminal.numpy(), 1 - theirs["masks"])
    ends = np.flatnonzero(theirs["terminals"])
    np.testing.assert_array_equal(ours.episode.diff().nonzero()[:, 0].numpy(), ends[:-1])
    assert ours.terminal.sum() == 2 and len(ours.obs) == sum(LENGTHS) - 3


@installed
def test_a_recording_is_one_episode_and_runs_on_where_its_task_is_solved(folder):
    data, task = load(f"{NAME}-task1-v0")
    assert data.terminal.tolist() == [0, 0, 1, 1] + [0] * 8
    assert data.reward.tolist() == [-1, -1, 0, 0] + [-1] * 8
    assert data.episode.tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert data.episode_return.tolist() == [-2, -3, -5]
    assert task["data_score"] == pytest.approx(100.0)  # last states count
    assert (data.action_low, data.action_high) == (pytest.approx(-1), pytest.approx(1))


@installed
def test_tasks_share_a_file_and_differ_in_rewards(folder):
    first, first_task = load(f"{NAME}-task1-v0")
    default, _ = load(f"{NAME}-v0")
    other, task = load(f"{NAME}-task2-v0")
    assert torch.equal(first.reward, default.reward) and first.digest == default.digest
    assert torch.equal(first.obs, other.obs) and not torch.equal(first.reward, other.reward)
    assert task["data_score"] == 0.0
    assert score(task, [0.0, 1.0]) == 50.0 and score(first_task, [0.0, 0.0]) == 0.0


@installed
@pytest.mark.parametrize("compact", [False, True])
def test_a_file_of_ogbenchs_loader_is_recognized(folder, tmp_path, compact):
    """Saved from make_env_and_datasets: no qpos, masks, next_observations or valids."""
    import ogbench

    np.savez_compressed(folder / "pointmaze-medium-navigate-v0-val.npz", **raw())
    path = str(folder / "pointmaze-medium-navigate-v0.npz")
    options = dict(dataset_path=path, compact_dataset=compact)
    _, theirs, _ = ogbench.make_env_and_datasets(f"{NAME}-task1-v0", **options)
    np.savez(tmp_path / "saved.npz", **theirs)
    by_name, _ = load(f"{NAME}-task1-v0")
    saved, task = load(str(tmp_path / "saved.npz"), eval_env="pointmaze-medium-singletask-v0")
    for name in ("obs", "action", "reward", "next_obs", "terminal", "episode", "episode_return"):
        assert torch.equal(getattr(saved, name), getattr(by_name, name)), name
    assert task["success"]


@installed
@pytest.mark.parametrize(
    "data",
    [
        "pointmaze-medium-navigate",
        "puzzle-3x3-play",
        *(pytest.param(x, marks=pytest.mark.soak) for x in ("cube-double-play", "scene-play")),
    ],
)
def test_rewards_of_a_file_are_those_of_the_environment(data, folder):
    """A recording made in the task itself, which runs on where it is solved."""
    import gymnasium

    maze, draw = "maze" in data, np.random.default_rng(0)
    name, options = data.rpartition("-")[0], {"max_episode_steps": 300 if maze else 30}
    register(task_id := f"{name}-singletask-task3-v0")
    env = gymnasium.make(task_id, terminate_at_goal=False, **options)
    obs, _ = env.reset(seed=0)
    kept, over = {}, False
    while not over:
        action = draw.uniform(-1, 1, env.action_space.shape)
        if maze:
            action = towards_goal(env)
        row = {"observations": obs, "actions": action}
        obs, reward, terminal, timeout, info = env.step(action)
        over = terminal or timeout
        row |= {"qpos": info["prev_qpos"], "qvel": info["prev_qvel"], "reward": reward}
        row |= {"button_states": info.get("prev_button_states", 0), "terminals": over}
        for key, value in row.items():
            kept.setdefault(key, []).append(value)
    arrays = {k: np.array(x, np.float32) for k, x in kept.items()}
    reward = arrays.pop("reward")
    np.savez(folder / f"{data}-v0.npz", **arrays)
    loaded, _ = load(f"{data}-singletask-task3-v0")
    np.testing.assert_array_equal(loaded.reward.numpy(), reward[:-1])
    np.testing.assert_array_equal(loaded.terminal.numpy(), reward[:-1] == 0)
    assert not maze or 0 < loaded.terminal.sum() < 299


@installed
def test_a_broken_file_is_one_line(folder):
    path, arrays = folder / "pointmaze-medium-navigate-v0.npz", raw()
    np.savez(path, **{key: x for key, x in arrays.items() if key != "qpos"})
    assert "v0.npz cannot be used (KeyError: 'qpos'): delete it" in error_of(f"{NAME}-v0")
    np.savez(path, **arrays | {"qpos": np.array([{}])})
    assert "v0.npz cannot be used" in error_of(f"{NAME}-v0")  # pickled
    np.savez(path, **arrays)
    path.write_bytes(path.read_bytes()[:-100])
    assert "v0.npz cannot be used" in error_of(f"{NAME}-v0")


@installed
def test_a_file_that_the_repository_made_is_no_wrong_download(folder, capsys):
    arrays = raw() | {"made_by": np.array("{}")}
    np.savez(folder / "cube-single-play-v0.npz", **arrays)  # of another size than the table's
    path = ogbench.fetch("cube-single-play")
    assert path.exists() and "made in its manner" in capsys.readouterr().out
    np.savez(folder / "cube-single-play-v0.npz", **raw())
    assert "published file of cube-single-play-v0 has 256728298" in error_of(
        "cube-single-play-singletask-v0"
    )


@installed
def test_a_missing_file_is_downloaded_from_a_mirror(folder, monkeypatch, capsys):
    cache = folder / "cache"
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(cache))
    monkeypatch.setenv("OGBENCH_MIRRORS", folder.as_uri())
    data, _ = load(f"{NAME}-v0", eval_env="none")
    assert len(data.obs) == sum(LENGTHS) - 3
    assert [path.name for path in cache.iterdir()] == ["pointmaze-medium-navigate-v0.npz"]
    monkeypatch.setenv("OGBENCH_MIRRORS", "file:///nowhere")
    load(f"{NAME}-task3-v0", eval_env="none")  # needs no mirror any more
    assert capsys.readouterr().out.count("downloading") == 1


@installed
def test_a_failed_download_offers_to_make_the_data(folder, monkeypatch):
    monkeypatch.setattr("ogbench.utils.DATASET_URL", "file:///nowhere")
    monkeypatch.setattr(ogbench, "HUB", "file:///nowhere/{file}")
    command = "python data/make/ogbench.py cube-single-play"
    assert error_of("cube-single-play-singletask-v0", eval_env="none").endswith(command)
    text = error_of("antmaze-large-navigate-singletask-v0", eval_env="none")
    assert "cannot download" in text and "data/make" not in text


# ---- published settings ----------------------------------------------------------------------

PUBLISHED = {  # FQL's alpha, IQL's beta and hidden units, ReBRAC's two weights of cloning
    "antmaze-large-navigate": (10, 10, 512, 0.003, 0.01),
    "antmaze-giant-navigate": (10, 10, 512, 0.003, 0.01),
    "humanoidmaze-medium-navigate": (30, 10, 512, 0.01, 0.01),
    "humanoidmaze-large-navigate": (30, 10, 512, 0.01, 0.01),
    "antsoccer-arena-navigate": (10, 1, 512, 0.01, 0.01),
    "cube-single-play": (300, 1, 256, 1, 0),
    "cube-double-play": (300, 0.3, 256, 0.1, 0),
    "scene-play": (300, 10, 256, 0.1, 0.01),
    "puzzle-3x3-play": (1000, 10, 256, 0.3, 0.01),
    "puzzle-4x4-play": (1000, 3, 256, 0.3, 0.01),
}


@pytest.mark.parametrize("data", PUBLISHED)
def test_settings_are_those_of_fqls_table(data):
    for name in (f"{data}-singletask-v0", f"{data}-singletask-task5-v0"):
        found = {x: parse(x.Args, x.PRESETS, ["--env", name])[0] for x in (bc, iql, rebrac, fql)}
        a, b, c = found[fql], found[iql], found[rebrac]
        assert (a.alpha, b.beta, b.hidden, c.actor_bc, c.critic_bc) == PUBLISHED[data]
        assert a.q_agg == ("min" if data.startswith("antmaze") else "mean")
        assert (b.tau, b.layers, b.critic_ln) == (0.9, 4, True)
        assert (c.actor_layers, c.critic_layers, c.hidden, c.critic_ln) == (4, 4, 512, True)
        assert (c.actor_lr, c.critic_lr, found[bc].layers, found[bc].hidden) == (3e-4, 3e-4, 4, 512)
        for module, args in found.items():
            assert getattr(args, "gelu", True) and not args.normalize_obs, module
            short = parse(module.Args, module.PRESETS, ["--env", name, "--short"])[0]
            assert (short.steps, short.eval_episodes, short.hidden) == (100_000, 50, 128)
            assert short.steps // short.eval_every >= 3, "the last three count"


# ---- evaluation ------------------------------------------------------------------------------


def towards_goal(env):
    """The action of OGBench's own path finder."""
    maze = env.unwrapped
    subgoal, _ = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)
    return (subgoal - maze.get_xy()) / (np.linalg.norm(subgoal - maze.get_xy()) + 1e-6)


def walk(env, seed, towards=None):
    """Rewards and observations of one episode, by OGBench's own path finder or at random."""
    draw, (obs, _) = np.random.default_rng(0), env.reset(seed=seed)
    seen, rewards, over = [obs], [], False
    while not over:
        action = draw.uniform(-1, 1, 2)
        if towards is not None:
            action = towards_goal(env)
        obs, reward, terminal, timeout, info = env.step(action)
        seen.append(obs)
        rewards.append(reward)
        over = terminal or timeout
    return np.array(rewards), np.array(seen)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("cube-single-singletask-v0", 16),
        ("puzzle-4x6-singletask-task3-v0", 16),
        ("scene-singletask-v0", 16),
        ("antmaze-large-singletask-v0", None),
        ("Hopper-v5", None),
    ],
)
def test_heavy_environments_are_few(name, most):
    assert task_of(name, {}).get("most_envs") == most


@installed
def test_the_return_of_an_episode_is_its_success():
    env_id = "pointmaze-medium-singletask-task1-v0"
    env = make(env_id)
    rewards, seen = walk(env, 0, towards="goal")
    assert rewards.sum() == 1 and rewards[-1] == 1 and len(rewards) < 300
    assert np.linalg.norm(seen[-2] - GOAL) <= 1.0
    rewards, _ = walk(make(env_id, max_episode_steps=20), 0)
    assert rewards.tolist() == [0] * 20
    assert score(task_of(env_id, {}), [0.0, 1.0, 1.0, 0.0]) == 50.0


@installed
@pytest.mark.parametrize("maze", ["pointmaze-medium", "antmaze-medium", "pointmaze-teleport"])
def test_a_seed_repeats_an_episode_and_leaves_numpy_alone(maze):
    env, other = (make(f"{maze}-singletask-v0") for _ in range(2))

    def episode(env, seed, numpy_seed):
        np.random.seed(numpy_seed)
        before = np.random.get_state()[1].copy()
        draw, (obs, _) = np.random.default_rng(0), env.reset(seed=seed)
        seen = [obs]
        for _ in range(30):
            if maze == "pointmaze-teleport":  # onto an entrance; the exit is drawn
                env.unwrapped.set_xy(np.array(env.unwrapped._teleport_info["teleport_in_xys"][0]))
            seen.append(env.step(draw.uniform(-1, 1, env.action_space.shape))[0])
        assert np.array_equal(np.random.get_state()[1], before)
        return np.array(seen)

    first = episode(env, 5, numpy_seed=3)
    assert np.array_equal(first, episode(other, 5, numpy_seed=4))
    assert np.array_equal(first, episode(env, 5, numpy_seed=5))
    assert not np.array_equal(first, episode(env, 6, numpy_seed=3))


@installed
def test_a_run_is_trained_and_scored_in_percent(folder, tmp_path, monkeypatch, capsys):
    import bc

    from run import main

    argv = ["--env", f"{NAME}-task1-v0", "--steps", "4", "--eval-every", "2"]
    argv += ["--eval-episodes", "2", "--out", str(tmp_path / "runs"), "--batch-size", "4"]
    percent = main(bc.Args, bc.PRESETS, bc.train, argv)
    assert percent in (0.0, 50.0, 100.0)
    out = capsys.readouterr().out
    assert "score 100.0" in out  # the data's: all three recordings pass the goal
    assert (tmp_path / "runs" / f"{NAME}-task1-v0__bc__0" / "eval.csv").exists()


def test_importing_the_readers_does_not_import_ogbench():
    code = "import sys, run, readers; print({'ogbench'} & set(sys.modules))"
    line = [sys.executable, "-c", code]
    job = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert job.stdout.strip() == "set()"
