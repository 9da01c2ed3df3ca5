"""D4RL's maze2d: its task, its controller and its references."""

import importlib.util

import numpy as np
import pytest
from conftest import ROOT

from readers import d4rl
from readers.tasks import find_row, reference_scores

spec = importlib.util.spec_from_file_location("make_maze2d", ROOT / "data" / "make" / "maze2d.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def task(name):
    return d4rl.task(find_row("d4rl_tasks.csv", name))["make"]()


def placed(name, place, speed=(0, 0)):
    env = task(name)
    env.reset(seed=0)
    env.unwrapped.data.qpos = place
    env.unwrapped.data.qvel = speed
    return env


@pytest.mark.parametrize("name, limit", [("umaze", 300), ("medium", 600), ("large", 800)])
def test_a_step_pays_at_the_goal_and_an_episode_ends_by_its_limit_alone(name, limit):
    env = placed(f"maze2d-{name}-v1", task(f"maze2d-{name}-v1").unwrapped.goal)
    for t in range(1, limit + 1):
        obs, reward, terminal, timeout, _ = env.step(np.zeros(2))
        assert reward == 1 and not terminal and timeout == (t == limit)
    assert obs.shape == (4,)


@pytest.mark.parametrize("distance, sparse", [(0.4, 1), (0.6, 0)])
def test_the_dense_reward_falls_with_the_distance(distance, sparse):
    place = np.array([1, 1 + distance])  # the goal of the first maze is the cell (1, 1)
    assert placed("maze2d-umaze-v1", place).step(np.zeros(2))[1] == sparse
    dense = placed("maze2d-umaze-dense-v1", place).step(np.zeros(2))[1]
    assert dense == pytest.approx(np.exp(-distance), abs=1e-6)


def test_a_step_by_hand():
    """Speed is clipped to 5 first; then a force of 100 a on a ball of 4/3 pi 0.1^3 x 1000 kg with
    damping 1, which Euler's method takes implicitly, for 0.01 s."""
    mass = 4 / 3 * np.pi * 0.1**3 * 1000
    obs, *_ = placed("maze2d-umaze-v1", (3, 2), (9, -2)).step(np.array([0.5, 7.0]))
    speed = (np.array([5, -2]) * mass + 0.01 * np.array([50, 100])) / (mass + 0.01)
    np.testing.assert_allclose(obs[2:], speed, rtol=1e-9)
    np.testing.assert_allclose(obs[:2], np.array([3, 2]) + 0.01 * speed, rtol=1e-9)


def test_a_wall_stops_the_ball():
    env = placed("maze2d-umaze-v1", (1, 1))
    for _ in range(200):
        obs, *_ = env.step(np.array([0, -1]))
    assert 0.35 < obs[1] < 0.45 and abs(obs[3]) < 0.1  # D4RL's walls end at 0.3, the ball has 0.1


def test_starts_are_all_free_cells_and_the_goal():
    env = task("maze2d-umaze-v1")
    starts = np.array([env.reset(seed=i)[0] for i in range(300)])
    cells = np.rint(starts[:, :2]).astype(int)
    assert {(1, 1), (1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)} == {*map(tuple, cells)}
    assert abs(starts[:, :2] - cells).max() <= 0.1 and 0.05 < starts[:, 2:].std() < 0.15
    np.testing.assert_array_equal(env.reset(seed=7)[0], env.reset(seed=7)[0])


def test_data_of_the_controller():
    env = task("maze2d-medium-v1").unwrapped
    columns = make.record(env, 3_000, limit=600, seed=1)
    obs, reached = columns["observations"], columns["timeouts"]
    assert 3 < reached.sum() < 100 and not columns["terminals"].any()
    assert abs(columns["actions"]).max() == 1
    near = np.linalg.norm(obs[:, :2] - env.goal, axis=1) <= 0.5
    np.testing.assert_array_equal(columns["rewards"] > 0, near)  # of the row's own place
    same = (obs[1:] == obs[:-1]).all(1)
    np.testing.assert_array_equal(same, reached[:-1])  # D4RL's script repeats an observation there


def test_visits_are_counted_from_one_departure_to_the_next():
    assert make.visits({"rewards": np.array([1, 1, 0, 0, 1, 0, 1, 0])}).tolist() == [3, 2]


def test_other_mazes_of_d4rl_have_no_task():
    for name in ("maze2d-umaze-v0", "maze2d-open-v0", "maze2d-eval-umaze-v1"):
        row = find_row("d4rl_tasks.csv", name)
        assert not row["env_id"] and "training without evaluation" in row["note"]


@pytest.mark.soak
@pytest.mark.parametrize("name", ["umaze", "medium", "large"])
def test_references_are_d4rls(name):
    """Random actions and D4RL's controller, 400 episodes; a reference is of 100 episodes."""
    name = f"maze2d-{name}-v1"
    env, rng = task(name), np.random.default_rng(0)
    maze = env.unwrapped
    for random, due in zip((True, False), reference_scores(name)):
        returns = []
        for i in range(400):
            if i % 100 == 0:  # D4RL makes one controller for all of its episodes
                controller = make.Controller(maze.free, rng)
            obs, timeout, total = env.reset(seed=i)[0], False, 0
            while not timeout:
                action = rng.uniform(-1, 1, 2)
                if not random:
                    action, _ = controller.act(obs[:2], obs[2:], maze.goal)
                obs, reward, _, timeout, _ = env.step(action)
                total += reward
            returns.append(total)
        error = np.std(returns) * (1 / 400 + 1 / 100) ** 0.5
        assert abs(np.mean(returns) - due) < 3 * error
