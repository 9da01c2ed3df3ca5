"""bc.py: its losses, the choice of episodes, and what a trained policy does."""

import bc
import numpy as np
import pytest
import torch
from stand_in import PlainRun
from torch.testing import assert_close

# ---- losses ----------------------------------------------------------------------------------


# ---- which episodes --------------------------------------------------------------------------


def ten_episodes(data):
    """Ten episodes of one to ten rows. What is left of episode 3 pays little: its return, dropped
    rows included, is the best."""
    data.episode = torch.repeat_interleave(torch.arange(10), torch.arange(1, 11))
    n = len(data.episode)
    data.reward = torch.ones(n)
    data.episode_return = torch.tensor([1.0, 2, 3, 99, 5, 6, 7, 98, 9, 10])
    data.obs = data.obs[:1] + torch.arange(float(n))[:, None]
    data.next_obs, data.terminal = data.obs + 1, torch.zeros(n)
    data.action = torch.arange(float(n))[:, None] / n
    return data


@pytest.mark.parametrize(
    ("top", "kept"),
    [(0.1, [3]), (0.05, [3]), (0.2, [3, 7]), (0.39, [3, 7, 9]), (1.0, list(range(10)))],
)
def test_best_episodes_are_kept_whole(tiny_data, top, kept):
    data = ten_episodes(tiny_data(obs_dim=2, act_dim=1))
    before = {k: v.clone() for k, v in vars(data).items() if isinstance(v, torch.Tensor)}
    rows = [i for i in range(55) if int(before["episode"][i]) in kept]
    bc.keep_best(data, top)
    for name in ("obs", "action", "reward", "next_obs", "terminal"):
        assert torch.equal(getattr(data, name), before[name][rows])
    assert len(data.obs) == sum(e + 1 for e in kept)
    assert data.episode.tolist() == [i for i, e in enumerate(kept) for _ in range(e + 1)]
    assert torch.equal(data.episode_return, before["episode_return"][kept])


def test_rows_at_the_goal_of_an_ant_maze_are_episodes_of_their_own(tmp_path):
    """What the docstring says of --top: a recording of ten rows that stays at the goal for four,
    and one that never arrives. The first best episode leads to the goal, the others are there."""
    from run import load

    n, goal = 20, [5, 6, 7, 8]
    reward, timeout = np.zeros(n, np.float32), np.zeros(n, bool)
    reward[goal], timeout[[9, 19]] = 1, True
    obs, action = np.arange(2.0 * n).reshape(n, 2), np.zeros((n, 1), np.float32)
    file = tmp_path / "maze.npz"
    columns = dict(observations=obs, actions=action, rewards=reward, timeouts=timeout)
    np.savez(file, **columns, terminals=reward > 0)
    data, _ = load(str(file))
    assert data.episode_return.tolist() == [1, 1, 1, 1, 0]
    bc.keep_best(data, 0.8)
    assert data.episode.tolist() == [0] * 6 + [1, 2, 3]


@pytest.mark.parametrize("normalize", [True, False])
def test_observations_are_scaled_over_the_cloned_episodes(tiny_data, normalize):
    data = tiny_data(n=40)
    data.episode_return = torch.tensor([1.0, 2.0])  # the last 20 rows are the better episode
    raw, run = data.obs.clone(), PlainRun()
    bc.train(run, data, bc.Args(steps=1, batch_size=4, top=0.5, normalize_obs=normalize))
    kept = raw[20:]
    scaled = (kept - kept.mean(0)) / (kept.std(0, correction=0) + 1e-3)
    assert_close(data.obs, scaled if normalize else kept)
    assert_close(run.nets.scaling.obs(kept), data.obs)


# ---- behavior --------------------------------------------------------------------------------


def test_train_clones_actions_of_their_own_observations(tiny_data):
    """The action is a function of the observation; the clone finds it and leaves log_std alone."""
    data = tiny_data(obs_dim=1, act_dim=1, n=32)
    data.obs = torch.linspace(-1, 1, 32)[:, None]
    data.action = 0.8 * torch.sin(3 * data.obs)
    raw, run = data.obs.clone(), PlainRun()
    torch.manual_seed(0)
    bc.train(run, data, bc.Args(steps=300, batch_size=64, lr=1e-3))
    with torch.no_grad():
        assert_close(run.act(raw), data.action, atol=0.1, rtol=0)
    assert not run.nets.log_std.any()


def test_train_fits_the_std_where_asked(tiny_data):
    run = PlainRun()
    bc.train(run, tiny_data(), bc.Args(steps=3, gaussian=True))
    assert run.nets.log_std.all()
