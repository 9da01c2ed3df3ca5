"""Tests import the files of the repository as they lie, on one torch thread; pytest.ini starts a
process for each core.

`python -m pytest --soak` runs the long variants too."""

import os
import re
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of this process and of those that tests start

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="run the long variants too")


named = set()  # the words after -k


def pytest_configure(config):
    named.update(re.findall(r"\w+", config.option.keyword))
    config.addinivalue_line("markers", "soak: a long variant, run with --soak")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--soak"):
        long = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder with a tiny log."""
    from short_runs import no_stray_signal, write_log

    monkeypatch.chdir(tmp_path)
    write_log("log.npz")
    with no_stray_signal():
        yield tmp_path


@pytest.fixture
def tiny_data():
    """Factory of a Data made by hand: a terminal episode, then one that a time limit cut."""
    from common import Data

    def make(obs_dim=3, act_dim=2, n=12, seed=0):
        draw = torch.Generator().manual_seed(seed)
        episode = (torch.arange(n) >= n // 2).long()
        reward = torch.randn(n, generator=draw)
        return Data(
            obs=torch.randn(n, obs_dim, generator=draw) * 2 + 1,
            action=torch.rand(n, act_dim, generator=draw) * 1.8 - 0.9,
            reward=reward,
            next_obs=torch.randn(n, obs_dim, generator=draw) * 2 + 1,
            terminal=(torch.arange(n) == n // 2 - 1).float(),
            episode=episode,
            episode_return=torch.zeros(2).index_add(0, episode, reward),
            action_low=-torch.ones(act_dim),
            action_high=torch.ones(act_dim),
            obs_mean=torch.zeros(obs_dim),
            obs_std=torch.ones(obs_dim),
            name="tiny",
            digest="0" * 16,
        )

    return make
