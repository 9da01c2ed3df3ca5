"""harness/readers against independent oracles, on tiny files that the tests write."""

import contextlib
import csv
import errno
import functools
import hashlib
import http.server
import itertools
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
import zipfile
from pathlib import Path

import filelock
import gymnasium
import h5py
import numpy as np
import pytest
import torch
from harness import tasks
from harness.readers import d4rl, fetch, files
from harness.tasks import reference_scores

from common import InputError
from run import load, score

ROOT = Path(__file__).resolve().parents[1]


class Nowhere:
    """All of the network: it counts who calls, and hangs up."""

    def __init__(self):
        self.calls, self.socket = 0, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.calls += 1
            connection.close()


@pytest.fixture(autouse=True)
def network(tmp_path, monkeypatch):
    """Every test has its own caches and only the mirrors it names: nothing leaves the machine."""
    nowhere = Nowhere()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("MINARI_REMOTE", "nowhere://x")
    monkeypatch.delenv("D4RL_MIRRORS", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, nowhere.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    yield nowhere
    nowhere.socket.close()


def flat(ends, obs_dim=3, act_dim=2, seed=0):
    """A log of episodes. ends: (length, "terminal" | "timeout" | "cut") each.

    Returns the D4RL arrays and the true next observations, which a simulator would have seen.
    """
    rng = np.random.default_rng(seed)
    out = {k: [] for k in ("observations", "actions", "rewards", "terminals", "timeouts")}
    true_next = []
    for length, kind in ends:
        path = rng.normal(size=(length + 1, obs_dim)).astype(np.float32)
        out["observations"].append(path[:-1])
        true_next.append(path[1:])
        out["actions"].append(rng.uniform(-1, 1, (length, act_dim)).astype(np.float32))
        out["rewards"].append(rng.normal(size=length).astype(np.float32))
        for key in ("terminal", "timeout"):
            out[key + "s"].append(np.arange(length) == (length - 1 if kind == key else -1))
    return {k: np.concatenate(v) for k, v in out.items()}, np.concatenate(true_next)


def write(path, arrays, metadata=None):
    if path.suffix == ".npz":
        extra = {} if metadata is None else {"metadata": np.array(json.dumps(metadata))}
        np.savez_compressed(path, **arrays, **extra)
    else:
        with h5py.File(path, "w") as f:
            for key, x in arrays.items():
                f.create_dataset(key, data=x)
            if metadata is not None:
                f["metadata"] = json.dumps(metadata)
    return str(path)


def plain_loop(arrays, limit=None):
    """The published recipe, row by row: next is row i + 1; limits and the last row are lost."""
    rows, step = [], 0
    for i in range(len(arrays["rewards"]) - 1):
        last = bool(arrays["timeouts"][i]) if "timeouts" in arrays else step == limit - 1
        terminal = bool(arrays["terminals"][i])
        if not last or terminal:
            rows.append((i, i + 1, terminal))
        step = 0 if last or terminal else step + 1
    return rows


ENDS = [(4, "terminal"), (5, "timeout"), (1, "terminal"), (6, "timeout"), (3, "cut")]


@pytest.mark.parametrize("suffix", [".npz", ".hdf5", ".h5"])
@pytest.mark.parametrize("timeouts", [True, False])
def test_flat_files_match_the_plain_loop(tmp_path, suffix, timeouts):
    arrays, _ = flat([(4, "terminal"), (5, "timeout"), (5, "timeout"), (2, "terminal"), (3, "cut")])
    if not timeouts:
        del arrays["timeouts"]
    path = write(tmp_path / f"x{suffix}", arrays, {"max_episode_steps": 5})
    data, task = load(path)
    want = plain_loop(arrays, limit=5)
    assert task is None
    assert len(want) == len(data.obs) == 19 - 3  # two time limits and the last row are lost
    for row, (i, j, terminal) in enumerate(want):
        np.testing.assert_array_equal(data.obs[row], arrays["observations"][i])
        np.testing.assert_array_equal(data.action[row], arrays["actions"][i])
        assert data.reward[row] == arrays["rewards"][i]
        assert data.terminal[row] == terminal
        np.testing.assert_array_equal(
            data.next_obs[row], arrays["observations"][i if terminal else j]
        )
    assert data.episode.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2 + [4] * 2
    starts = [0, 4, 9, 14, 16, 19]
    want = [arrays["rewards"][a:b].astype(float).sum() for a, b in itertools.pairwise(starts)]
    np.testing.assert_allclose(data.episode_return, want, rtol=1e-6)


@pytest.mark.parametrize("flagged", [True, False])
def test_cuts_that_nothing_marks_are_found_in_every_block(tmp_path, flagged, capsys):
    """And on the border of two blocks."""
    lengths = [files.ROWS, 1, 20, files.ROWS - 21, 4, 5]
    arrays, true_next = flat([(n, "cut") for n in lengths])
    arrays = without(arrays, *(() if flagged else ("timeouts",)))
    data, _ = load(write(tmp_path / "x.npz", arrays | {"next_observations": true_next}))
    assert data.episode.bincount().tolist() == lengths
    assert "5 episode cuts" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize("form", ["next_observations", "final_observations", "float64 next"])
def test_known_next_observations_bootstrap_through_time_limits(tmp_path, suffix, form):
    arrays, true_next = flat(ENDS)
    if form == "final_observations":
        arrays[form] = true_next[[3, 8, 9, 15, 18]]
    else:
        arrays["next_observations"] = true_next.astype(np.float64 if "64" in form else np.float32)
    data, _ = load(write(tmp_path / f"x{suffix}", arrays))
    assert len(data.obs) == 19
    np.testing.assert_array_equal(data.next_obs, true_next)
    assert data.terminal.nonzero().flatten().tolist() == [3, 9]
    assert data.episode.tolist() == [0] * 4 + [1] * 5 + [2] + [3] * 6 + [4] * 3
    assert (data.obs_mean == 0).all() and (data.obs_std == 1).all()
    assert data.obs.dtype == data.terminal.dtype == data.action_low.dtype == torch.float32
    assert data.episode.dtype == torch.int64


@pytest.mark.parametrize("unit, kind", [(1e-9, "f4"), (1, "f8"), (1e9, "f4")])
@pytest.mark.parametrize("column, size, cut", [
    (0, 0.9, False), (0, 1.1, True), (1, 2, False), (1, 3, True), (2, 2, False), (2, 3, True),
])  # fmt: skip
def test_how_far_the_next_row_may_be(tmp_path, unit, kind, column, size, cut):
    """Column 0 has mean 0 and takes sizes in millionths of its deviation. In column 1 the mean is
    large and column 2 is constant: there a size counts the smallest steps of a float32."""
    obs = np.random.default_rng(0).normal(size=(20, 3)) * [1, 1, 0] + [0, 1e5, 0.1]
    obs[8, :2] = 0, 1e5
    obs = np.float32(obs * unit)
    step = [1e-6 * obs[:, 0].std(dtype=float), *np.spacing(obs[8, 1:])][column]
    stored = np.roll(obs, -1, axis=0)
    stored[7, column] += np.float32(size * step)
    arrays, _ = flat([(20, "cut")])
    arrays |= {"observations": obs.astype(kind), "next_observations": stored.astype(kind)}
    data, _ = load(write(tmp_path / "x.npz", without(arrays, "timeouts")))
    assert data.episode.bincount().tolist() == ([8, 12] if cut else [20])


@pytest.mark.parametrize("unit, mean, kinds", [
    (1e-9, 0, "f4 f4"), (1e9, 0, "f8 f4"), (1, 1e5, "f4 f8"), (1, 0, "f2 f4"), (1, 9, "f4 f2"),
    (1e-4, 0, "f8 f2"), (1e-4, 0, "f2 f8"),
])  # fmt: skip
def test_units_and_precisions_make_and_hide_no_cut(tmp_path, unit, mean, kinds):
    """Numbers of 1e-4 are below the normal ones of a float16, where its steps are relatively
    large. The last column is constant."""
    arrays, true_next = flat(ENDS)
    pair = {"observations": arrays["observations"], "next_observations": true_next}
    for (key, x), kind in zip(pair.items(), kinds.split(), strict=True):
        wide = np.c_[x, np.ones(19)].astype(float) * unit + mean
        arrays[key] = wide.astype(kind)
    data, _ = load(write(tmp_path / "x.npz", without(arrays, "timeouts")))
    assert data.episode.bincount().tolist() == [4, 5, 1, 6, 3]


def test_a_value_that_is_not_finite_is_named_beside_stored_next_ones(tmp_path, recwarn):
    arrays, true_next = flat(ENDS)
    arrays |= {"next_observations": true_next}
    arrays["observations"][7, 1] = np.inf
    with pytest.raises(InputError, match="observations row 7 is NaN or infinite"):
        load(write(tmp_path / "x.npz", arrays))
    assert not recwarn.list
    arrays["observations"][7, 1], true_next[8, 1] = 0, np.nan  # not a whole row: no unknown one
    with pytest.raises(InputError, match="next_observations row 8 is NaN or infinite"):
        load(write(tmp_path / "x.npz", arrays))


@pytest.mark.parametrize("steps, lengths", [(4, [4]), (5, [5]), (6, [4, 1])])
def test_a_time_limit_ends_an_episode_after_exactly_its_steps(tmp_path, steps, lengths):
    """A terminal one step before the limit of 5, on it and one step after it; then 12 steps without
    an end. The row at a limit and the last row are dropped, a terminal row never is."""
    arrays, _ = flat([(steps, "terminal"), (12, "cut")])
    path = write(tmp_path / "x.npz", without(arrays, "timeouts"), {"max_episode_steps": 5})
    data, _ = load(path)
    assert data.episode.bincount().tolist() == [*lengths, 4, 4, 1]
    assert data.terminal.nonzero().flatten().tolist() == [sum(lengths) - 1]
    lost = [4] * (steps == 6) + [steps + i for i in (4, 9, 11)]
    kept = [i for i in range(steps + 12) if i not in lost]
    np.testing.assert_array_equal(data.obs, arrays["observations"][kept])


def test_the_limit_is_the_files_and_then_the_tasks(tmp_path):
    arrays, _ = flat([(450, "cut")], obs_dim=3, act_dim=1)
    arrays = without(arrays, "timeouts")
    found = {}
    for limit in (None, 300):
        path = write(tmp_path / "x.npz", arrays, {"max_episode_steps": limit})
        data, _ = load(path, eval_env="Pendulum-v1")
        found[limit] = data.episode.bincount().tolist()
    assert found == {None: [199, 199, 49], 300: [299, 149]}


def test_stored_next_copied_from_the_next_episode_is_not_used(tmp_path):
    arrays, _ = flat(ENDS)
    stored = np.roll(arrays["observations"], -1, axis=0)  # what a careless writer stores
    data, _ = load(write(tmp_path / "x.hdf5", arrays | {"next_observations": stored}))
    ends = [8, 15]  # the last row wraps to row 0, which is not the row after it: believed
    rows = [i for i in range(19) if i not in ends]
    np.testing.assert_array_equal(data.obs, arrays["observations"][rows])
    assert data.episode.bincount().tolist() == [4, 4, 1, 5, 3]


def test_an_episode_that_loses_all_rows_leaves_no_gap(tmp_path):
    arrays, _ = flat([(1, "timeout"), (3, "terminal"), (1, "timeout"), (2, "terminal")])
    data, _ = load(write(tmp_path / "x.npz", arrays))
    assert data.episode.tolist() == [0, 0, 0, 1, 1]
    want = [arrays["rewards"][1:4].sum(), arrays["rewards"][5:7].sum()]
    np.testing.assert_allclose(data.episode_return, want, rtol=1e-5)


def still(action=1.0, low=-1.0, high=1.0, **more):
    """A file of two episodes of three steps, in which one array can change alone: nothing moves,
    actions lie at a bound, and a reward of 1e9 hides small ones in the float32 of a sum. An array
    that is None is left out."""
    arrays = {
        "observations": np.ones((6, 2), np.float32),
        "actions": np.full((6, 2), action, np.float32),
        "rewards": np.float32([1e9, 1, 0, 0, 1, 1e9]),
        "terminals": np.zeros(6, bool),
        "timeouts": np.arange(6) % 3 == 2,
        "final_observations": np.ones((2, 2), np.float32),
    }
    arrays = {key: x for key, x in (arrays | more).items() if x is not None}
    return arrays, {"action_low": [-1, low], "action_high": [1, high]}


def changed(key, place, value, **more):
    """Two files of `still`, one number apart."""
    one, two = still(**more), still(**more)
    two[0][key][place] = value
    return one, two


CHANGED = {
    "obs": changed("observations", (0, 1), 2),
    "action": changed("actions", (5, 1), 0.5),
    "reward": changed("rewards", 4, 2),
    "next_obs": changed("final_observations", (1, 0), 2),
    "terminal": changed("terminals", 5, True),
    "episode": (still(), still(timeouts=np.array([0, 0, 0, 1, 0, 1], bool))),
    # Without it the last row of an episode is dropped, but it counts in the return.
    "episode_return": changed("rewards", 5, 2, final_observations=None),
    "action_low": (still(action=1), still(action=1, low=-2)),
    "action_high": (still(action=-1), still(action=-1, high=2)),
}


@pytest.mark.parametrize("field", CHANGED)
def test_digest_depends_on_every_array(tmp_path, field):
    """Except Data.recording, which no run reads."""
    one, two = (load(write(tmp_path / "x.npz", *file))[0] for file in CHANGED[field])
    same = load(write(tmp_path / "y.hdf5", *CHANGED[field][0]))[0]
    assert one.digest == same.digest and len(one.digest) == 16
    arrays = {key: x for key, x in vars(one).items() if isinstance(x, torch.Tensor)}
    arrays = {key: x for key, x in arrays.items() if not key.startswith(("obs_", "recording"))}
    assert CHANGED.keys() == arrays.keys()
    assert [key for key, x in arrays.items() if not torch.equal(x, getattr(two, key))] == [field]
    assert one.digest != two.digest


def test_float64_compressed_chunks(tmp_path):
    arrays, true_next = flat([(700, "terminal"), (900, "timeout"), (400, "cut")], seed=3)
    with h5py.File(tmp_path / "x.hdf5", "w") as f:
        for key, x in (arrays | {"next_observations": true_next}).items():
            wide = x.astype(np.float64) if x.dtype == np.float32 else x
            f.create_dataset(key, data=wide, compression="gzip", chunks=(37, *x.shape[1:]))
        f.create_group("metadata/algorithm")  # D4RL's own files have a group of that name
    data, _ = load(str(tmp_path / "x.hdf5"))
    np.testing.assert_array_equal(data.next_obs, true_next)
    np.testing.assert_array_equal(data.action, arrays["actions"])


# ------------------------------------------------------------------ holes


def hole_log():
    """A log of three episodes, some of whose rows are lost; their numbers, and their steps."""
    lengths = [12, 9, 15]
    arrays, _ = flat([(n, "timeout") for n in lengths])
    arrays["rewards"] = np.arange(36.0)
    step = np.concatenate([np.arange(n) for n in lengths])
    marks = {"episode": np.repeat([7, 3, 5], lengths), "step": 10 * step + 3}
    kept = np.setdiff1d(np.arange(36), [4, 5, 11, 12, 20, 30])
    return {k: x[kept] for k, x in arrays.items()}, {k: x[kept] for k, x in marks.items()}, kept


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize("kind", ["i8", "u1", ">i4", "f8"])
@pytest.mark.parametrize("keys, flags", [
    (["step"], True), (["step"], False), (["step", "episode"], False),
])  # fmt: skip
def test_step_and_episode_mark_the_holes_of_a_log(tmp_path, capsys, suffix, kind, keys, flags):
    arrays, marks, kept = hole_log()
    marks = {key: marks[key].astype(kind).reshape(-1, 1) for key in keys}
    if not flags:
        del arrays["timeouts"]
    path = write(tmp_path / f"x{suffix}", arrays | marks)
    data, _ = load(path)
    follows = np.diff(kept) == 1
    follows[np.isin(kept[:-1], [20])] = False
    rows = np.flatnonzero(follows)
    np.testing.assert_array_equal(data.obs, arrays["observations"][rows])
    np.testing.assert_array_equal(data.next_obs, arrays["observations"][rows + 1])
    assert data.episode.bincount().tolist() == [3, 4, 6, 8, 4]
    whole = [sum(i for i in kept if a <= i < b) for a, b in [(0, 12), (12, 21), (21, 36)]]
    assert data.episode_return.tolist() == [whole[i] for i in (0, 0, 1, 2, 2)]
    assert "cuts that no flag marks" in capsys.readouterr().out


def test_an_episode_column_ends_episodes_where_nothing_else_does(tmp_path):
    arrays, _ = flat([(4, "timeout"), (1, "timeout"), (3, "terminal"), (5, "timeout")])
    episode = {"episode": np.repeat([9, 2, 4, 1], [4, 1, 3, 5])}
    data, _ = load(write(tmp_path / "x.npz", without(arrays, "timeouts") | episode))
    assert data.episode.bincount().tolist() == [3, 3, 4]
    assert data.digest == load(write(tmp_path / "y.npz", arrays))[0].digest


@pytest.mark.parametrize("key", ["step", "episode"])
@pytest.mark.parametrize("x", [
    np.arange(19) * 0.05, np.full(19, np.nan), np.arange(3), np.zeros(19), ["a"],
])  # fmt: skip
def test_a_column_that_counts_nothing_is_ignored(tmp_path, key, x):
    arrays, _ = flat(ENDS)
    plain = load(write(tmp_path / "x.npz", arrays))[0]
    assert load(write(tmp_path / "x.npz", arrays | {key: x}))[0].digest == plain.digest


def test_a_written_dataset_reads_as_the_first(tmp_path):
    from harness.readers.__main__ import main

    arrays, marks, _ = hole_log()
    path = write(tmp_path / "x.npz", arrays | marks)
    main([path, str(tmp_path / "y.npz")])
    assert load(str(tmp_path / "y.npz"))[0].digest == load(path)[0].digest


# ------------------------------------------------------------------ what float32 holds


DRAW = np.random.default_rng(0)
TOO_FINE = {
    "seconds since 1970": 1.7e9 + np.arange(2000) / 20,
    "northing": 5.4e6 + DRAW.normal(0, 0.3, 2000).cumsum(),
    "degrees": 52 + DRAW.normal(0, 3e-6, 2000).cumsum(),
    "days apart": np.repeat([1.7e9, 1.8e9], 1000) + np.arange(2000) / 20,
}
FINE_ENOUGH = {
    "seconds": np.arange(2000) / 20,
    "metres from a start": 300 + DRAW.normal(0, 0.3, 2000).cumsum(),
    "constant": np.full(2000, 12345.678),
    "trembling, moved a few times": (np.arange(2000) % 500 > 400) * 0.15
    + DRAW.normal(0, 4e-9, 2000).cumsum()
    + 0.1,
    "at rest, then moved": 0.5 + DRAW.normal(0, 1e-10, 2000) + np.linspace(-1, 1, 2000).clip(0),
}


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize("case", [*TOO_FINE, *FINE_ENOUGH])
def test_columns_that_float32_is_too_coarse_for_are_named(tmp_path, capsys, suffix, case):
    arrays, _ = flat([(2000, "timeout")])
    wide = arrays["observations"].astype(float)
    wide[:, 1] = (TOO_FINE | FINE_ENOUGH)[case]
    load(write(tmp_path / f"x{suffix}", arrays | {"observations": wide}))
    said = "float32, which is too coarse for observations column 1; subtract a constant"
    assert (said in capsys.readouterr().out) == (case in TOO_FINE)


@pytest.mark.filterwarnings("ignore")
def test_columns_of_a_minari_dataset_that_float32_is_too_coarse_for(capsys):
    obs = np.zeros((2001, 3)) + np.append(TOO_FINE["seconds since 1970"], 1.8e9)[:, None]
    write_minari("test/t-v0", [episode(obs, 2000, True)], BOX(-np.inf, np.inf, (3,), np.float64))
    load("test/t-v0", eval_env="none")
    assert "too coarse for observations column 0, 1, 2; subtract" in capsys.readouterr().out


# ------------------------------------------------------------------ actions and tasks


def test_actions_are_mapped_from_the_bounds(tmp_path):
    arrays, _ = flat(ENDS)
    low, high = np.float32([-0.4, 1.0]), np.float32([0.4, 3.0])
    arrays["actions"][:4] = [[-0.4, 1], [0.4, 3], [0, 2], [0.2, 1.5]]
    arrays["actions"][4:] = [0, 2]
    meta = {"action_low": low.tolist(), "action_high": high.tolist()}
    data, _ = load(write(tmp_path / "x.npz", arrays, meta))
    np.testing.assert_allclose(data.action[:3], [[-1, -1], [1, 1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(data.action[3:4], [[0.5, -0.5]], atol=1e-6)
    assert data.action.abs().max() <= 1
    np.testing.assert_array_equal(data.action_low, low)
    np.testing.assert_array_equal(data.action_high, high)


@pytest.mark.parametrize(("low", "high", "center"), [(-1, 3, -0.5), (-3, 1, 0.5)])
def test_actions_are_mapped_where_one_bound_is_that_of_the_networks(tmp_path, low, high, center):
    arrays, _ = flat(ENDS)
    arrays["actions"][:] = 0
    data, _ = load(write(tmp_path / "x.npz", arrays, {"action_low": low, "action_high": high}))
    assert (data.action == center).all()


def test_rounding_beyond_the_bounds_is_set_to_them_and_said(tmp_path, capsys):
    arrays, _ = flat(ENDS)
    arrays["actions"][2, 0] = 1 + 5e-6
    data, _ = load(write(tmp_path / "x.npz", arrays))
    assert data.action[2, 0] == 1
    assert "1 action values" in capsys.readouterr().out


def references(task):
    return task["ref_min_score"], task["ref_max_score"]


def hopper_file(tmp_path, **meta):
    arrays, _ = flat(ENDS, obs_dim=11, act_dim=3)
    return write(tmp_path / "hop.npz", arrays, {"env_id": "Hopper-v5"} | meta)


def test_the_file_names_its_task_and_references(tmp_path, capsys):
    with pytest.raises(InputError, match="ref_min_score 5 is not below ref_max_score 5"):
        load(hopper_file(tmp_path, ref_min_score=5, ref_max_score=5))
    data, task = load(hopper_file(tmp_path, ref_min_score=1, ref_max_score=5))
    assert (task["env_id"], references(task), task["success"]) == ("Hopper-v5", (1, 5), False)
    assert score(task, [1, 5]) == 50 and score(task, 3) == 50
    env = task["make"]()
    obs, _ = env.reset(seed=0)
    raw, _ = gymnasium.make("Hopper-v5").reset(seed=0)
    assert obs.dtype == np.float32 and env.observation_space.contains(obs)
    np.testing.assert_array_equal(obs, raw.astype(np.float32))
    assert env is not task["make"]() and data.obs.shape[1] == obs.shape[0]
    assert load(hopper_file(tmp_path), eval_env="none")[1] is None
    capsys.readouterr()
    task = load(hopper_file(tmp_path))[1]  # no references in the file
    assert references(task) == (-20.272305, 3234.3)
    assert "D4RL's references" in capsys.readouterr().out


def test_the_tasks_bounds_are_used_and_without_references_the_raw_return(tmp_path, capsys):
    arrays, _ = flat(ENDS, obs_dim=3, act_dim=1)
    want = arrays["actions"].copy()
    arrays["actions"] *= 2  # Pendulum's bounds are -2 and 2
    data, task = load(write(tmp_path / "p.hdf5", arrays), eval_env="Pendulum-v1")
    keep = [i for i in range(19) if i not in (8, 15, 18)]
    np.testing.assert_allclose(data.action, want[keep], atol=1e-6)
    assert data.action_high.tolist() == [2]
    assert task["ref_min_score"] is None and score(task, [-3, -5]) == -4
    assert "no reference score" in capsys.readouterr().out


def test_success_is_the_share_of_episodes_with_reward():
    assert score({"env_id": "AntMaze_UMaze-v4", "success": True}, [0, 7, 1, 0]) == 50


@pytest.mark.parametrize(
    ("kwargs", "due"), [({"continuing_task": False}, 50), ({"continuing_task": True}, 2), ({}, 2)]
)
def test_a_task_that_ends_at_its_goal_is_scored_by_success(kwargs, due):
    """As its metadata tells; another is scored by its returns."""
    assert score({"env_id": "PointMaze_Medium-v3", "env_kwargs": kwargs}, [0, 7, 1, 0]) == due


@pytest.mark.parametrize("name, want", [
    ("hopper-medium-v2", (-20.272305, 3234.3)), ("ant-random-v0", (-325.6, 3879.7)),
    ("antmaze-umaze-v2", (0, 1)), ("maze2d-umaze-v0", (0.94, 62.6)),
    ("maze2d-umaze-v1", (23.85, 161.86)), ("kitchen-mixed-v0", (0, 4)),
    ("pen-human-v1", (96.262799, 3076.8331017826877)), ("HalfCheetah-v5", (-280.178953, 12135.0)),
    ("Ant-v5", (-325.6, 3879.7)), ("Pendulum-v1", (None, None)),
    ("carla-town-full-v0", (None, None)),
])  # fmt: skip
def test_reference_scores(name, want):
    assert reference_scores(name) == want


def test_tables_are_consistent():
    files = tasks.table("d4rl_files.csv")
    assert {"hopper-full-replay-v2", "walker2d-medium-replay-v0", "antmaze-large-play-v2"} <= set(
        files
    )
    assert files["walker2d-medium-replay-v0"]["path"] == "gym_mujoco/walker_mixed.hdf5"
    basenames = [row["path"].split("/")[-1] for row in files.values()]
    assert len(set(basenames)) == len(basenames) > 100  # one cache folder holds them all
    for name in files:
        row = tasks.find_row("d4rl_tasks.csv", name)
        assert row["prefix"].split("-")[0] == name.split("-")[0]
        assert bool(row["env_id"]) != ("without evaluation" in row["note"])


def test_sums_of_d4rls_files_are_well_formed():
    files = tasks.table("d4rl_files.csv").values()
    known = [row for row in files if row["sha256"]]
    assert all(re.fullmatch("[0-9a-f]{64}", row["sha256"]) for row in known)
    assert len({row["sha256"] for row in known}) == len(known) > len(files) / 2
    assert all((int(row["bytes"] or 0) > 0) == bool(row["sha256"]) for row in files)


# ------------------------------------------------------------------ D4RL


@pytest.fixture
def d4rl_file(tmp_path, monkeypatch):
    """Factory of a mirror's file under its official path. The table knows its size and sum, unless
    `known` is False."""

    def make(name, obs_dim=11, act_dim=3, known=True, **extra):
        row = tasks.table("d4rl_files.csv")[name]
        path = tmp_path / "mirror" / row["path"]
        path.parent.mkdir(parents=True)
        arrays, true_next = flat(ENDS, obs_dim, act_dim)
        write(path, arrays | {k: f(arrays, true_next) for k, f in extra.items()})
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        row |= {"bytes": len(content) if known else "", "sha256": digest * known}
        shutil.copytree(tasks.DATA_DIR, tables := tmp_path / "tables", ignore=bundled)
        with open(tables / "d4rl_files.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
        monkeypatch.setattr(tasks, "DATA_DIR", tables)
        monkeypatch.setenv("D4RL_MIRRORS", f"file://{tmp_path}/mirror")
        return path

    bundled = shutil.ignore_patterns("*.npz", "paper_tables")
    return make


def test_d4rl_name_is_downloaded_once_and_cached(tmp_path, monkeypatch, d4rl_file):
    path = d4rl_file("hopper-medium-v2", next_observations=lambda a, n: n)
    monkeypatch.setenv("D4RL_MIRRORS", f"file://{tmp_path}/missing file://{tmp_path}/mirror")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "new" / "folder"))
    data, task = load("hopper-medium-v2")
    assert (task["env_id"], task["ref_max_score"], len(data.obs)) == ("Hopper-v4", 3234.3, 19)
    assert [p.name for p in (tmp_path / "new" / "folder").glob("h*")] == ["hopper_medium-v2.hdf5"]
    path.unlink()
    again, _ = load("hopper-medium-v2", eval_env="Hopper-v5")
    assert again.digest == data.digest


def test_d4rl_v0_without_timeouts_uses_the_time_limit(tmp_path, monkeypatch):
    arrays, _ = flat([(1000, "timeout"), (7, "terminal"), (1500, "cut")], 11, 3)
    del arrays["timeouts"]
    (tmp_path / "d4rl").mkdir()
    write(tmp_path / "d4rl" / "hopper_medium.hdf5", arrays)
    data, _ = load("hopper-medium-v0", eval_env="none")
    want = plain_loop(arrays, 1000)
    np.testing.assert_array_equal(data.obs, arrays["observations"][[i for i, _, _ in want]])
    assert data.episode.bincount().tolist() == [999, 7, 999, 499]


class Cut(http.server.SimpleHTTPRequestHandler):
    """Promises the whole file and sends half of it."""

    def copyfile(self, source, outputfile):
        outputfile.write(source.read()[: self.server.limit])

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("broken", ["short", "page", "sha256"])
def test_a_bad_download_is_refused_and_leaves_nothing(tmp_path, monkeypatch, d4rl_file, broken):
    path = d4rl_file("hopper-medium-v2", known=broken != "page")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Cut, directory=str(tmp_path / "mirror")))  # fmt: skip
    server.limit = 2000 if broken == "short" else None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if broken == "page":
        path.write_bytes(b"<html>moved</html>" * 100)
    elif broken == "sha256":  # another file of the same size, which can be read as well
        path.write_bytes(path.read_bytes().replace(b"rewards", b"rewardz"))
    monkeypatch.setenv("D4RL_MIRRORS", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(InputError) as error:
        load("hopper-medium-v2", eval_env="none")
    server.shutdown()
    message = str(error.value)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert {"short": "bytes", "page": "signature", "sha256": digest}[broken] in message
    assert str(tmp_path / "d4rl" / "hopper_medium-v2.hdf5") in message and "D4RL_MIRRORS" in message
    assert "\n" not in message
    assert not list((tmp_path / "d4rl").iterdir())


def answer(body, length=None, status="200 OK", **more):
    """The bytes of an HTTP answer."""
    length = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {length}", "Connection: close"]
    return "\r\n".join([*lines, *(f"{k}: {x}" for k, x in more.items()), "", ""]).encode() + body


@pytest.fixture
def server(monkeypatch):
    """server(*parts): the url of a server that answers everybody with these bytes, and rests for
    the seconds that stand between them. Its clients have little patience."""
    monkeypatch.setattr(fetch, "ANSWER", 0.5)
    monkeypatch.setattr(fetch, "PATIENCE", 0.9)
    sockets = []

    def serve(one, parts):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = one.accept()
                threading.Thread(target=talk, args=(connection, parts), daemon=True).start()

    def talk(connection, parts):
        with contextlib.suppress(OSError), connection:
            connection.recv(9999)
            for part in parts:
                if isinstance(part, bytes):
                    connection.sendall(part)
                else:
                    time.sleep(part)
            connection.shutdown(socket.SHUT_WR)

    def begin(*parts):
        sockets.append(one := socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=serve, args=(one, parts), daemon=True).start()
        return f"http://127.0.0.1:{one.getsockname()[1]}"

    yield begin
    for one in sockets:
        one.close()


PAGE = b"<html>moved</html>"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
# Answers to a request for the file b: whether its size and sum are known, and what is said.
ANSWERS = {
    "whole": (lambda b: [answer(b)], True, None),
    "whole, of unknown size": (lambda b: [answer(b)], False, None),
    "no length": (lambda b: [b"HTTP/1.0 200 OK\r\n\r\n" + b], True, None),
    "chunks": (lambda b: [CHUNKS + b"%x\r\n" % len(b) + b + b"\r\n0\r\n\r\n"], True, None),
    "in two parts": (lambda b: [answer(b[:9], len(b)), 0.2, b[9:]], True, None),
    "of another type": (lambda b: [answer(b, **{"Content-Type": "text/html"})], False, None),
    "404": (lambda b: [answer(b"", status="404 Not Found")], True, "404"),
    "500": (lambda b: [answer(b"", status="500 Error")], True, "500"),
    "page": (lambda b: [answer(PAGE)], True, "it has 18 bytes, not"),
    "page, of unknown size": (lambda b: [answer(PAGE)], False, "signature not found"),
    "another file": (lambda b: [answer(b[::-1])], True, "its sha256 is"),
    "too short": (lambda b: [answer(b[:-9], len(b))], True, "bytes arrived"),
    "cut chunks": (lambda b: [CHUNKS + b"%x\r\n" % len(b) + b[:99]], True, "IncompleteRead"),
    "too large": (lambda b: [answer(b, 1 << 40)], True, "it has 1099511627776 bytes, not"),
    "far too large": (lambda b: [answer(b, 1 << 40)], False, "1099511627776 bytes, more than"),
    "more and more": (
        lambda b: [b"HTTP/1.0 200 OK\r\n\r\n", *[b * 9] * 99], True, "bytes arrived"),
    "silent": (lambda b: [20], True, "no network: put the file at"),
    "stalls": (lambda b: [answer(b[:99], len(b)), 20], True, "timed out"),
    "drips": (lambda b: [answer(b"", len(b)), *[b"x", 0.1] * 200], True, "bytes arrived in 1 s"),
    "drips its header": (lambda b: [b"H", 0.3, b"T", 0.3] * 50, True, "no network: put the file"),
    "a loop": (lambda b: [answer(b"", status="302 x", Location="/x")], True, "infinite loop"),
    "a file of ours": (
        lambda b: [answer(b"", status="302 x", Location="file:///x")], True, "not allowed"),
    "no HTTP": (lambda b: [b"SSH-2.0-x\r\n"], True, "SSH-2.0"),
    "hangs up": (lambda b: [], True, "closed connection"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_of_a_server(tmp_path, monkeypatch, d4rl_file, server, case):
    parts, known, said = ANSWERS[case]
    path = d4rl_file("hopper-medium-v2", known=known)
    monkeypatch.setattr("harness.readers.d4rl.D4RL_MIRRORS", ())
    monkeypatch.setenv("D4RL_MIRRORS", server(*parts(path.read_bytes())))
    if said is None:
        assert len(load("hopper-medium-v2", eval_env="none")[0].obs) == 16
        return
    with pytest.raises(InputError, match=said) as error:
        load("hopper-medium-v2", eval_env="none")
    line = str(error.value)
    assert str(tmp_path / "d4rl" / "hopper_medium-v2.hdf5") in line and "\n" not in line
    assert not list((tmp_path / "d4rl").iterdir())


def test_a_download_never_leaves_https(monkeypatch, tmp_path):
    answer = types.SimpleNamespace(url="http://elsewhere/x", headers={})
    monkeypatch.setattr(fetch, "ask", lambda url: contextlib.nullcontext(answer))
    with pytest.raises(InputError, match="it leads to http://elsewhere/x, without encryption"):
        fetch.transfer("https://x/y", tmp_path / "y", "", "")
    assert d4rl.D4RL_MIRRORS[0].startswith("https:")
    assert not any(url.startswith("https:") for url in d4rl.D4RL_MIRRORS[2:])


def test_without_a_network_one_line_says_where_the_file_belongs(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("MINARI_REMOTE")
    monkeypatch.setattr("urllib.request._opener", None)  # it remembers the proxies of earlier tests
    place = tmp_path / "d4rl" / "hopper_medium-v2.hdf5"
    with pytest.raises(InputError, match=f"no network: put the file at {place} .it is at https:"):
        load("hopper-medium-v2", eval_env="none")
    place = tmp_path / "minari/mujoco/hopper/medium-v0"
    with pytest.raises(InputError, match=f"no network: put the dataset into {place}"):
        load("mujoco/hopper/medium-v0")


def test_processes_that_start_together_download_once(tmp_path, d4rl_file):
    d4rl_file("hopper-medium-v2")

    def work(number):
        with open(tmp_path / f"said{number}", "w") as out, contextlib.redirect_stdout(out):
            print(load("hopper-medium-v2", eval_env="none")[0].digest)

    jobs = [multiprocessing.get_context("fork").Process(target=work, args=(i,)) for i in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    said = [(tmp_path / f"said{i}").read_text() for i in range(3)]
    assert [job.exitcode for job in jobs] == [0] * 3, said
    assert len({s.split()[-1] for s in said}) == 1
    assert sum("downloading" in s for s in said) == 1


def test_kitchen_trains_without_evaluation(d4rl_file, capsys):
    d4rl_file("kitchen-mixed-v0", obs_dim=60, act_dim=9)
    assert load("kitchen-mixed-v0")[1] is None
    assert "without evaluation" in capsys.readouterr().out


def test_d4rl_ant_has_111_numbers(d4rl_file):
    d4rl_file("ant-medium-v2", obs_dim=111, act_dim=8)
    _, task = load("ant-medium-v2")
    obs, _ = task["make"]().reset(seed=0)
    assert obs.shape == (111,) and not obs[27:].any() and obs[:27].any()


@pytest.mark.parametrize("jump, lengths", [
    ((1, 0), [9]), ((0, -1.001), [4, 4]), ((0.75, 0.75), [4, 4]),
])  # fmt: skip
def test_an_ant_that_jumps_has_begun_anew(tmp_path, jump, lengths):
    """More than 1 m between two rows of a maze's file is a cut, 1 m is not."""
    arrays, _ = flat([(10, "cut")], obs_dim=29, act_dim=8)
    arrays["observations"][:5, :2] = 0
    arrays["observations"][5:, :2] = jump
    (tmp_path / "d4rl").mkdir()
    row = tasks.table("d4rl_files.csv")["antmaze-umaze-v0"]
    write(tmp_path / "d4rl" / row["path"].split("/")[-1], arrays)
    data, _ = load("antmaze-umaze-v0", eval_env="none")
    assert data.episode.bincount().tolist() == lengths


def test_d4rl_antmaze_task(d4rl_file):
    """29 numbers, position first, in D4RL's coordinates: start near 0, goal beyond its cell."""
    pytest.importorskip("gymnasium_robotics")
    d4rl_file("antmaze-medium-play-v2", obs_dim=29, act_dim=8)
    _, task = load("antmaze-medium-play-v2")
    assert task["success"] and task["env_id"] == "AntMaze_Medium-v4"
    assert task["env_kwargs"]["continuing_task"] is False, "what run.py alone scores by"
    env = task["make"]()
    maze = env.unwrapped
    for seed in range(3):
        obs, _ = env.reset(seed=seed)
        assert obs.shape == (29,) and np.abs(obs[:2]).max() <= 0.1 and 0.6 < obs[2] < 0.9
        origin = maze.maze.unique_reset_locations[0]
        goal = maze.goal - origin
        assert (goal >= 20).all() and (goal <= 21.5).all()  # cell (6, 6), start at (1, 1), 4 m each
    obs, reward, terminated, truncated, _ = env.step(np.zeros(8, np.float32))
    assert reward == 0 and not terminated and not truncated
    qpos = maze.data.qpos.copy()
    qpos[:2] = maze.goal + [0.3, 0.3]
    maze.ant_env.set_state(qpos, 0 * maze.data.qvel)
    obs, reward, terminated, *_ = env.step(np.zeros(8, np.float32))
    np.testing.assert_allclose(obs[:2], maze.data.qpos[:2] - origin, atol=1e-5)
    assert reward == 1 and terminated
    here, inside, outside = np.zeros(2), np.nextafter(0.5, 0), np.nextafter(0.5, 1)
    for gap, reached in {0.4: 1, inside: 1, 0.5: 1, outside: 0, 0.6: 0}.items():
        assert maze.compute_terminated(here, np.array([0, gap]), {}) == bool(reached), gap
        assert maze.compute_reward(here, np.array([gap, 0]), {}) == reached, gap
    goals = np.array([maze.generate_target_goal() for _ in range(500)]) - origin
    assert 20 <= goals.min() < 20.1 and 21.4 < goals.max() <= 21.5  # the sum of two offsets
    assert np.abs(goals.mean(0) - 20.75).max() < 0.05
    assert np.abs(goals.var(0) - (1**2 + 0.5**2) / 12).max() < 0.02
    # walls, in D4RL's coordinates: row 1 of the map is 1r011001
    walls = [g for g in range(maze.model.ngeom) if maze.model.geom(g).name.startswith("block")]
    centers = {tuple(np.round(maze.model.geom_pos[g, :2] - origin).astype(int)) for g in walls}
    row = {x for x, y in centers if y == 0}
    assert {-4, 8, 12, 24} <= row and not {0, 4, 16, 20} & row


# ------------------------------------------------------------------ Minari


BOX = gymnasium.spaces.Box


def write_minari(dataset_id, episodes, observation_space, action_space=None, **kwargs):
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = [EpisodeBuffer(id=i, **e) for i, e in enumerate(episodes)]
    minari.create_dataset_from_buffers(
        dataset_id, buffers, observation_space=observation_space,
        action_space=action_space or BOX(-2, 2, (1,), np.float32), **kwargs)  # fmt: skip


def episode(observations, t, terminated, rewards=None):
    last = np.arange(t) == t - 1
    actions = np.linspace(-2, 2, t, dtype=np.float32)[:, None]
    return {"observations": observations, "actions": actions,
            "rewards": np.arange(t, dtype=float) if rewards is None else rewards,
            "terminations": last & terminated, "truncations": last & (not terminated)}  # fmt: skip


@pytest.fixture
def small_minari(tmp_path):
    """A Minari dataset of three rows; the folder of its two files."""
    sample = episode(np.zeros((4, 3), np.float32), 3, True)
    with warnings.catch_warnings(action="ignore"):
        write_minari("test/small-v0", [sample], BOX(-9, 9, (3,), np.float32), env="Pendulum-v1")
    return tmp_path / "minari/test/small-v0/data"


@pytest.mark.filterwarnings("ignore")
def test_minari_keeps_every_row_and_recovers_the_task(tmp_path, capsys):
    rng = np.random.default_rng(0)
    paths = [rng.normal(size=(t + 1, 3)).astype(np.float32) for t in (5, 4)]
    episodes = [episode(paths[0], 5, False), episode(paths[1], 4, True)]
    write_minari("pendulum/test-v0", episodes, BOX(-9, 9, (3,), np.float32), env="Pendulum-v1")
    data, task = load("pendulum/test-v0")
    np.testing.assert_array_equal(data.obs, np.concatenate([p[:-1] for p in paths]))
    np.testing.assert_array_equal(data.next_obs, np.concatenate([p[1:] for p in paths]))
    assert data.terminal.nonzero().flatten().tolist() == [8]
    assert data.episode.tolist() == [0] * 5 + [1] * 4
    assert data.episode_return.tolist() == [10, 6]
    assert data.action[:5, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert task["env_id"] == "Pendulum-v1" and task["ref_min_score"] is None
    assert task["make"]().reset(seed=1)[0].shape == (3,)
    with pytest.raises(InputError, match="unknown dataset.*pendulum/test-v0"):
        load("pendulum-test-v0")
    with pytest.raises(InputError, match="Hopper-v5.*11"):
        load("pendulum/test-v0", eval_env="Hopper-v5")


@pytest.mark.filterwarnings("ignore")
def test_minari_nested_observations_are_sorted_by_key(tmp_path):
    space = gymnasium.spaces.Dict({
        "z": BOX(-9, 9, (2,), np.float32), "a": gymnasium.spaces.Tuple((
            BOX(-9, 9, (1,), np.float64), BOX(-9, 9, (1, 2), np.float32)))})  # fmt: skip
    z, a0 = np.arange(8, dtype=np.float32).reshape(4, 2), np.arange(4.0).reshape(4, 1) / 8
    a1 = -np.arange(8, dtype=np.float32).reshape(4, 1, 2)
    write_minari("test/nested-v0", [episode({"z": z, "a": (a0, a1)}, 3, True)], space)
    data, task = load("test/nested-v0")
    want = np.concatenate([a0, a1.reshape(4, 2), z], axis=1)
    np.testing.assert_array_equal(data.obs, want[:3])
    np.testing.assert_array_equal(data.next_obs, want[1:])
    assert task is None


@pytest.mark.filterwarnings("ignore")
def test_a_point_maze_is_scored_by_success_in_the_datasets_order(tmp_path):
    pytest.importorskip("gymnasium_robotics")
    gymnasium.register_envs(sys.modules["gymnasium_robotics"])
    env = gymnasium.make("PointMaze_UMaze-v3", continuing_task=False)
    obs, _ = env.reset(seed=3)
    observations = {k: np.stack([v] * 3) for k, v in obs.items()}
    sample = episode(observations, 2, True) | {"actions": np.zeros((2, 2), np.float32)}
    write_minari("maze/test-v0", [sample], env.observation_space, env.action_space, env=env)
    data, task = load("maze/test-v0")
    assert task["success"] and references(task) == (0, 1)
    np.testing.assert_array_equal(data.obs[0], task["make"]().reset(seed=3)[0])
    want = [obs["achieved_goal"], obs["desired_goal"], obs["observation"]]
    np.testing.assert_allclose(data.obs[0], np.concatenate(want), rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_discrete_actions_are_refused(tmp_path):
    sample = episode(np.zeros((4, 3), np.float32), 3, True) | {"actions": np.array([0, 1, 0])}
    write_minari("test/d-v0", [sample], BOX(-9, 9, (3,), np.float32), gymnasium.spaces.Discrete(2))
    with pytest.raises(InputError, match="Discrete.*only Box"):
        load("test/d-v0")


def test_a_mistyped_minari_id_offers_local_ones_before_the_network(tmp_path, capsys, small_minari):
    kept = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        load("test/smal-v0")
    said, line = capsys.readouterr().out, str(error.value)
    assert "test/smal-v0 is not in" in said and "\n" not in line
    assert "did you mean test/small-v0?" in said and "did you mean test/small-v0?" in line
    assert f"put the dataset into {tmp_path}/minari/test/smal-v0" in line
    assert sorted(tmp_path.rglob("*")) == kept, "a lock file was left behind"


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path):
    """Three processes, one counter: nobody works beside another, and no file is left."""
    count, path = tmp_path / "n", tmp_path / "x.lock"
    count.write_text("0")

    def work():
        for _ in range(20):
            with fetch.lock(path):
                n = int(count.read_text())
                time.sleep(0.002)
                count.write_text(str(n + 1))

    jobs = [multiprocessing.get_context("fork").Process(target=work) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 3
    assert count.read_text() == "60"
    assert list(tmp_path.iterdir()) == [count]


NO_LOCKS = [OSError(code, "none") for code in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)]


@pytest.mark.parametrize("error", [*NO_LOCKS, NotImplementedError(), OSError(errno.EROFS, "")])
def test_a_download_needs_no_locks_but_a_folder(tmp_path, monkeypatch, d4rl_file, capsys, error):
    """The file system has no locks, or may not be written to."""

    def refuse(*_):
        raise error

    d4rl_file("hopper-medium-v2")
    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    if getattr(error, "errno", 0) == errno.EROFS:
        with pytest.raises(InputError, match="cannot write to .*d4rl .*set D4RL_DATASET_DIR"):
            load("hopper-medium-v2", eval_env="none")
    else:
        assert len(load("hopper-medium-v2", eval_env="none")[0].obs) == 16
        assert f"d4rl has no locks ({error})" in capsys.readouterr().out
        assert [path.suffix for path in (tmp_path / "d4rl").iterdir()] == [".hdf5"]


def test_reading_needs_no_module_of_unix_alone(tmp_path, d4rl_file):
    """What Windows lacks is removed: a download with its lock, and text, which a process of its
    own reads."""
    d4rl_file("hopper-medium-v2")
    path = write(tmp_path / "x.hdf5", flat(ENDS)[0], {"env_id": "Foo-v0"})
    code = f"""
import os, sys
sys.modules |= dict.fromkeys(("fcntl", "resource"))
del os.sysconf
from harness import tasks
from harness.readers import read
from pathlib import Path
tasks.DATA_DIR = Path({str(tasks.DATA_DIR)!r})
print([len(read(name)[0]["rewards"]) for name in ({path!r}, "hopper-medium-v2")])
"""
    line = [sys.executable, "-c", code]
    job = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert job.stdout.endswith("\n[19, 19]\n"), job.stdout + job.stderr


# ------------------------------------------------------------------ nothing that a file names runs


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that a file may name: importing it, or calling its Task, leaves a file behind."""
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Task: pass\n"
    (tmp_path / "evil.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield ran
    assert not ran.exists() and "evil" not in sys.modules


SPEC = dict(entry_point="evil:Task", max_episode_steps=9, kwargs={}, additional_wrappers=[])
WRAPPER = dict(name="Task", entry_point="evil:Task", kwargs={})
RECORDED = {
    "entry point": ("env_spec", SPEC | {"id": "Foo-v0"}),
    "command": (
        "env_spec",
        SPEC | {"id": "Foo-v0", "entry_point": "os:system", "kwargs": {"command": "touch ran"}},
    ),
    "module in the id": ("env_spec", SPEC | {"id": "evil:Foo-v0"}),
    "evaluation": ("eval_env_spec", SPEC | {"id": "Foo-v0"}),
    "wrapper": ("env_spec", SPEC | {"id": "Pendulum-v1", "additional_wrappers": [WRAPPER]}),
    "argument": ("env_spec", SPEC | {"id": "GymV26Environment-v0", "kwargs": {"x": "evil:Foo-v0"}}),
    "deep argument": ("env_spec", SPEC | {"id": "Pendulum-v1", "kwargs": {"x": [[{"y": "a:b"}]]}}),
}


def change_metadata(folder, **values):
    path = folder / "metadata.json"
    meta = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", RECORDED)
def test_nothing_that_a_minari_dataset_names_is_run(
    tmp_path, monkeypatch, capsys, evil, small_minari, case
):
    monkeypatch.chdir(tmp_path)
    key, spec = RECORDED[case]
    change_metadata(small_minari, **{key: json.dumps(spec)})
    data, task = load("test/small-v0")
    assert task is None and len(data.obs) == 3
    said = capsys.readouterr().out
    assert f"test/small-v0 names the task '{spec['id']}'" in said
    assert "training goes on without evaluation; --eval-env chooses a task" in said
    assert load("test/small-v0", eval_env="Pendulum-v1")[1]["env_id"] == "Pendulum-v1"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("eval_env", [None, "none"])
@pytest.mark.parametrize("missing", ["observation_space", "action_space"])
def test_spaces_that_a_minari_dataset_lacks_make_no_task(evil, small_minari, missing, eval_env):
    """Minari's own loader would make the recorded task, to ask it for its spaces."""
    change_metadata(small_minari, env_spec=json.dumps(SPEC | {"id": "Foo-v0"}), **{missing: None})
    with pytest.raises(InputError, match=f"its metadata.json has no {missing}; record it again"):
        load("test/small-v0", eval_env=eval_env)


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize("env_id", ["evil:Foo-v0", "Foo-v0", "AntMaze:evil-v0"])
def test_nothing_that_a_file_names_is_run(tmp_path, capsys, evil, suffix, env_id):
    path = write(tmp_path / f"x{suffix}", flat(ENDS)[0], {"env_id": env_id})
    data, task = load(path)
    assert task is None and len(data.obs) == 16
    said = capsys.readouterr().out
    assert f"x{suffix} names the task '{env_id}', which is not a registered Gymnasium task" in said
    assert "training goes on without evaluation; --eval-env chooses a task" in said


def test_arguments_of_a_file_are_plain_values(tmp_path, capsys):
    arrays, _ = flat(ENDS, obs_dim=3, act_dim=1)

    def of_kwargs(**kwargs):
        meta = {"env_id": "Pendulum-v1", "env_kwargs": kwargs}
        return load(write(tmp_path / "x.npz", arrays, meta))[1]

    task = of_kwargs(g=5.0, render_mode="human")
    assert task["env_kwargs"] == {"g": 5.0} and task["make"]().unwrapped.g == 5.0
    for value in ("os:system", [["a:b"]], {"c:d": 1}):
        assert of_kwargs(g=value) is None
        assert "arguments that are not plain values" in capsys.readouterr().out


def test_a_typed_task_may_name_a_module(tmp_path, monkeypatch):
    code = """
import gymnasium
from gymnasium.envs.classic_control.pendulum import PendulumEnv
gymnasium.register("Own-v0", PendulumEnv, max_episode_steps=7)
"""
    (tmp_path / "own_tasks.py").write_text(code)
    arrays, _ = flat(ENDS, obs_dim=3, act_dim=1)
    path = write(tmp_path / "x.npz", arrays)
    with pytest.raises(InputError, match="No module named.*put the module's folder on PYTHONPATH"):
        load(path, eval_env="own_tasks:Own-v0")
    monkeypatch.syspath_prepend(tmp_path)
    _, task = load(path, eval_env="own_tasks:Own-v0")
    env = task["make"]()
    assert env.spec.max_episode_steps == 7 and env.reset(seed=0)[0].shape == (3,)


def refer_outside(path, other, how):
    """Replace rewards in an HDF5 file by something that is stored elsewhere."""
    with h5py.File(path, "a") as f:
        n = len(f["rewards"])
        del f["rewards"]
        if how == "link":
            f["rewards"] = h5py.ExternalLink(other, "rewards")
        elif how == "soft link over a link":
            f["group"] = h5py.ExternalLink(other, "/")
            f["rewards"] = h5py.SoftLink("/group/rewards")
        elif how == "raw":
            f.create_dataset("rewards", (n,), "f4", external=[(str(other), 0, 4 * n)])
        else:
            layout = h5py.VirtualLayout((n,), "f4")
            layout[:] = h5py.VirtualSource(other, "rewards", (n,))
            f.create_virtual_dataset("rewards", layout)


OUTSIDE = ["link", "soft link over a link", "raw", "virtual"]


@pytest.mark.parametrize("how", OUTSIDE)
def test_an_hdf5_file_that_refers_to_others_is_refused(tmp_path, how):
    arrays, _ = flat(ENDS)
    other = write(tmp_path / "secret.hdf5", arrays)
    path = write(tmp_path / "x.hdf5", arrays)
    refer_outside(path, other, how)
    with pytest.raises(InputError, match="x.hdf5: .* refers to another file, which is not follow"):
        load(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", OUTSIDE)
def test_a_minari_file_that_refers_to_others_is_refused(tmp_path, small_minari, how):
    path = small_minari / "main_data.hdf5"
    other = write(tmp_path / "secret.hdf5", {"rewards": np.ones(3, np.float32)})
    with h5py.File(path, "a") as f:
        f.move("episode_0/rewards", "rewards")
    refer_outside(path, other, how)
    with h5py.File(path, "a") as f:
        f.move("rewards", "episode_0/rewards")
    with pytest.raises(InputError, match="main_data.hdf5: .* refers to another file"):
        load("test/small-v0", eval_env="none")


@pytest.mark.parametrize("suffix", [".npz", ".hdf5", ".h5"])
def test_nothing_waits_for_a_pipe(tmp_path, suffix):
    os.mkfifo(tmp_path / f"x{suffix}")
    with pytest.raises(InputError, match="is a folder, a pipe or a device; use the path of a file"):
        load(str(tmp_path / f"x{suffix}"))
    (tmp_path / f"y{suffix}").mkdir()
    with pytest.raises(InputError, match="is a folder, a pipe or a device"):
        load(str(tmp_path / f"y{suffix}"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["main_data.hdf5", "metadata.json"])
def test_nothing_waits_for_a_pipe_in_a_minari_dataset(small_minari, name):
    (small_minari / name).unlink()
    os.mkfifo(small_minari / name)
    with pytest.raises(InputError, match=f"{name} is a folder, a pipe or a device"):
        load("test/small-v0", eval_env="none")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("values, match", [
    (dict(ref_min_score="low"), "metadata ref_min_score is 'low', not a number"),
    (dict(total_steps=10**30), "3 steps, its metadata says 1000"),
    (dict(total_steps="many"), "3 steps, its metadata says many"),
    (dict(total_steps=7), "3 steps, its metadata says 7"),
    (dict(env_spec="[]"), "Minari cannot load test/small-v0"),
    (dict(observation_space="{}"), "Minari cannot load test/small-v0"),
    (dict(data_format="pickle"), "Minari cannot load test/small-v0"),
])  # fmt: skip
def test_odd_metadata_of_a_minari_dataset_is_one_line(small_minari, values, match):
    change_metadata(small_minari, **values)
    with pytest.raises(InputError, match=match) as error:
        load("test/small-v0")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", ["", "{", "[1]", "\0", '{"a":' * 9999, None])
def test_a_damaged_minari_dataset_is_one_line(small_minari, text):
    path = small_minari / "main_data.hdf5"
    if text is None:  # cut short
        path.write_bytes(path.read_bytes()[:-500])
    else:
        (small_minari / "metadata.json").write_text(text)
    with pytest.raises(
        InputError, match="Minari cannot load .*; delete .*small-v0 and get it again"
    ):
        load("test/small-v0", eval_env="none")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", ["actions", "observations", "terminations"])
def test_a_minari_episode_whose_arrays_disagree_is_named(small_minari, key):
    with h5py.File(small_minari / "main_data.hdf5", "a") as f:
        x = f[f"episode_0/{key}"][:1]
        del f[f"episode_0/{key}"]
        f[f"episode_0/{key}"] = x
    with pytest.raises(InputError, match="episode 0 has 3 rewards but another number of actions"):
        load("test/small-v0", eval_env="none")


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("name, near", [
    ("hopper-medum-v2", "hopper-medium-v2"), ("antmaze-umase-v2", "antmaze-umaze-v2"),
    ("zzz", "use a bundled"),
])  # fmt: skip
def test_misspelt_names_suggest_and_never_reach_the_network(name, near, network):
    with pytest.raises(InputError, match=f"unknown dataset '{name}'.*{near}"):
        load(name)
    assert not network.calls


def change(key, value):
    return lambda a: a | {key: value(a[key])}


def add(key, shape):
    return lambda a: a | {key: np.zeros(shape)}


def without(arrays, *keys):
    return {k: v for k, v in arrays.items() if k not in keys}


def put(row, value):
    def replaced(x):
        x = x.copy()
        x[row] = value
        return x

    return replaced


BROKEN = {
    "no rewards": (lambda a: without(a, "rewards"), "no rewards.*D4RL's key"),
    "lengths": (
        change("rewards", lambda x: x[:-1]),
        r"rewards has shape \(18,\), not \(19,\); .*make the columns agree",
    ),
    "nan": (
        change("observations", put((7, 1), np.nan)),
        "observations row 7 is NaN .*, or remove it and set `timeouts` on the row before it",
    ),
    "inf": (change("rewards", put(11, np.inf)), "rewards row 11 is NaN or infinite"),
    "overflow": (change("rewards", lambda x: x.astype(float) * 1e300), "rewards row 0 is NaN"),
    "text": (change("rewards", lambda x: x.astype("S8")), "rewards has dtype .S8"),
    "rewards (N, 1)": (change("rewards", lambda x: x[:, None]), "rewards has shape.*reshape"),
    "no columns": (
        change("actions", lambda x: x[:, :0]),
        r"actions has shape \(19, 0\), not \(19, .",
    ),
    "images": (change("observations", lambda x: x[..., None]), "observations has shape.*reshape"),
    "discrete": (change("actions", lambda x: x.astype(int)), "actions has dtype .*continuous"),
    "actions (N,)": (change("actions", lambda x: x[:, 0]), "actions has shape.*reshape"),
    "bounds": (change("actions", put((5, 1), 1.25)), "actions row 5 column 1 is 1.25.*rescale"),
    "flags": (change("terminals", lambda x: x * 2), "terminals row 3 is neither 0 nor 1"),
    "empty": (lambda a: {k: v[:0] for k, v in a.items()}, "the dataset is empty"),
    "final": (add("final_observations", (2, 3)), "2 final_observations.* 5 episodes"),
    "next width": (add("next_observations", (19, 4)), "next_observations has shape"),
    "lost": (lambda a: {k: v[8:9] for k, v in a.items()}, "no row has a next observation"),
    "ogbench": (
        lambda a: without(a, "rewards", "timeouts") | dict.fromkeys(("qpos", "qvel"), np.ones(19)),
        "OGBench.*singletask",
    ),
}


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_arrays_are_named_in_one_line(tmp_path, suffix, case):
    breaks, match = BROKEN[case]
    path = write(tmp_path / f"x{suffix}", breaks(flat(ENDS)[0]))
    with pytest.raises(InputError, match=match) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_unreadable_files(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(InputError, match="no file"):
        load(str(path))
    arrays, _ = flat([(4000, "cut")])
    write(path, arrays)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", whole[:1], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a complete.*delete it") as error:
            load(str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize("content", ["text", "npy", "other"])
def test_files_of_another_format_are_not_to_be_deleted(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    if content == "text":
        path.write_text("x,v\n1,2\n")
    elif content == "npy":
        with path.open("wb") as f:
            np.save(f, np.ones(3))
    else:
        other = tmp_path / {".npz": "y.hdf5", ".hdf5": "y.npz"}[suffix]
        write(other, flat(ENDS)[0])
        other.rename(path)
    with pytest.raises(InputError, match=f"{path} is not an {suffix[1:]} file; README shows"):
        load(str(path))


def test_another_format_in_the_cache_is_to_be_deleted(tmp_path):
    (tmp_path / "d4rl").mkdir()
    (tmp_path / "d4rl" / "hopper_medium-v2.hdf5").write_text("<html>moved</html>")
    with pytest.raises(InputError, match="not a complete hdf5 file.*delete it"):
        load("hopper-medium-v2", eval_env="none")


def test_a_file_that_may_not_be_read_is_not_to_be_deleted():
    """As another user, where the tests run as one who may read all."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(write(Path(folder) / "x.npz", flat(ENDS)[0]))
        path.chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(InputError, match="x.npz may not be read; chmod"):
                load(str(path))
        finally:
            if os.getuid() == 0:
                os.seteuid(0)


def test_a_good_file_that_another_program_has_open_is_not_to_be_deleted(tmp_path):
    path = write(tmp_path / "x.hdf5", flat(ENDS)[0])
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print(1, flush=True); input()"
    line = [sys.executable, "-c", code, path]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(line, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="cannot be read now .*close other programs") as error:
            load(path)
        other.communicate(b"\n")
    assert "delete" not in str(error.value)
    assert len(load(path)[0].obs) == 16


@pytest.mark.parametrize("error, advice", [
    (OSError(errno.EIO, "disk"), "repeat the command"), (OSError(errno.EMFILE, "files"), "repeat"),
    (OSError("the file is already open for write"), "close other programs"),
    (OSError("truncated file"), "delete it"), (OSError(errno.EINVAL, "seek"), "delete it"),
])  # fmt: skip
def test_deleting_is_advised_for_damage_alone(tmp_path, monkeypatch, error, advice):
    def fail(*_):
        raise error

    path = write(tmp_path / "x.npz", flat(ENDS)[0])
    monkeypatch.setattr(files, "npz_column", fail)
    with pytest.raises(InputError, match=advice):
        load(path)


def test_the_header_of_an_array_is_short(tmp_path):
    path = write(tmp_path / "x.npz", without(flat(ENDS)[0], "rewards"))
    with zipfile.ZipFile(path, "a") as f:
        f.writestr("rewards.npy", b"\x93NUMPY\2\0" + (1 << 30).to_bytes(4, "little"))
    with pytest.raises(InputError, match="the header of rewards takes 1073741824 bytes"):
        load(path)


def test_members_of_two_names_are_told_apart(tmp_path):
    """numpy calls both `rewards` and `rewards.npy` rewards."""
    path = write(tmp_path / "x.npz", flat(ENDS)[0])
    want = load(path)[0].digest
    with zipfile.ZipFile(path, "a") as f:
        f.writestr("rewards", b"no array")
    assert load(path)[0].digest == want


def test_metadata_of_an_hdf5_file_are_short(tmp_path):
    path = write(tmp_path / "x.hdf5", flat(ENDS)[0])
    with h5py.File(path, "a") as f:
        f.create_dataset("metadata", (1 << 30,), "u1", chunks=(1 << 20,), fillvalue=32)
    with pytest.raises(InputError, match="metadata takes 1073741824 bytes; store at most 1048576"):
        load(path)


@pytest.mark.parametrize("name", ["a\0b.npz", "a" * 5000 + ".hdf5"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(InputError, match="no file .*; correct the path") as error:
        load(name)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("low, high", [(5, 1), (0, 0), (1e3, -1e3)])
@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_exchanged_reference_scores_are_refused(tmp_path, suffix, low, high):
    meta = {"ref_min_score": low, "ref_max_score": high}
    with pytest.raises(InputError, match="is not below ref_max_score .*; correct the metadata"):
        load(write(tmp_path / f"x{suffix}", flat(ENDS)[0], meta))


ROWS = 10**12
FLAT = {"observations": (ROWS, 3), "actions": (ROWS, 2)}
FLAT |= dict.fromkeys(("rewards", "terminals", "timeouts"), (ROWS,))


@pytest.mark.parametrize("shapes, descr, version, match", [
    (FLAT, "<f4", 1, "x.npz does not fit into memory .1000000000000 rows take"),
    ({"metadata": (ROWS,)}, "<U9", 1, "metadata takes 36000000000000 bytes; store at most"),
    ({"metadata": (10**30,)}, "<U9", 1, "metadata takes 36000.* bytes; store at most"),
    ({"metadata": ()}, "|O", 1, "metadata is not a JSON object; write it with json.dumps"),
    ({"final_observations": (-5, 3)}, "<f4", 1, "not a complete npz file"),
    ({"rewards": (19,)}, "<f4", 9, "not a complete npz file"),
])  # fmt: skip
def test_npz_headers_that_claim_anything(tmp_path, shapes, descr, version, match):
    """Arrays of the file are replaced by bare headers of any shape, type and version."""
    path = write(tmp_path / "x.npz", without(flat(ENDS)[0], *shapes))
    with zipfile.ZipFile(path, "a") as f:
        for key, shape in shapes.items():
            header = str({"descr": descr, "fortran_order": False, "shape": shape}).encode()
            magic = b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2, "little")
            f.writestr(f"{key}.npy", magic + header)
    with pytest.raises(InputError, match=match) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spare", [0, -1])
def test_a_file_that_needs_more_than_all_memory_is_refused(tmp_path, monkeypatch, spare):
    """Four bytes for each number of the columns that are read."""
    arrays, _ = flat(ENDS)
    path = write(tmp_path / "x.npz", arrays | {"other": np.zeros(1000)})
    memory = 4 * sum(x.size for x in arrays.values()) + spare
    monkeypatch.setattr(os, "sysconf", lambda key: memory if key == "SC_PHYS_PAGES" else 1)
    with contextlib.nullcontext() if spare == 0 else pytest.raises(InputError, match="not fit"):
        load(path)


def test_hdf5_headers_that_claim_anything(tmp_path):
    with h5py.File(tmp_path / "x.hdf5", "w") as f:
        for key, shape in FLAT.items():
            f.create_dataset(key, shape, "f4", chunks=(100, *shape[1:]))
    with pytest.raises(InputError, match="x.hdf5 does not fit into memory .1000000000000 rows"):
        load(str(tmp_path / "x.hdf5"))
    path = write(tmp_path / "y.hdf5", flat(ENDS)[0] | {"observations": h5py.Empty("f4")})
    with pytest.raises(InputError, match="the dataset is empty"):
        load(path)
    with h5py.File(path, "a") as f:
        f.move("rewards", b"rewards\xff")
    with pytest.raises(InputError, match="no rewards .found: .*rewards"):
        load(path)


def endless_text(tmp_path):
    """libhdf5 reads on for ever where the size of an object in its heap of texts is damaged."""
    path = write(tmp_path / "x.hdf5", flat(ENDS)[0], {"env_id": "Pendulum-v1"})
    content = bytearray(Path(path).read_bytes())
    content[content.index(b"GCOL") + 24] = 255
    Path(path).write_bytes(content)
    return path


def test_hdf5_text_that_never_ends(tmp_path):
    with pytest.raises(OSError, match="its metadata cannot be read"):
        files.try_text(endless_text(tmp_path), computing=1)


@pytest.mark.soak
def test_a_file_whose_text_never_ends_is_one_line(tmp_path):
    with pytest.raises(InputError, match="metadata cannot be read.*delete it"):
        load(endless_text(tmp_path))


def test_an_intact_file_on_a_slow_machine_is_not_called_damaged(tmp_path):
    """Waiting is no reading: neither a slow disk nor a busy processor damages a file."""
    path = write(tmp_path / "x.hdf5", flat(ENDS)[0], {"env_id": "Pendulum-v1"})
    with pytest.raises(InputError) as error:
        files.try_text(path, waiting=0.01)
    line = str(error.value)
    assert "its metadata was not read within 0.01 s" in line and "repeat the command later" in line
    assert "delete" not in line and "complete" not in line
    files.try_text(path)


def test_what_a_library_says_is_cut_short(tmp_path):
    """zipfile quotes a file name of any length when the two places that state it disagree."""
    path = Path(write(tmp_path / "x.npz", {"a" * 9999: np.ones(3)}))
    path.write_bytes(path.read_bytes().replace(b"aa.npy", b"ab.npy", 1))
    with pytest.raises(InputError, match="not a complete.*delete it") as error:
        load(str(path))
    assert len(str(error.value)) < 500


def test_members_that_are_no_arrays_are_ignored(tmp_path):
    path = write(tmp_path / "x.npz", flat(ENDS)[0])
    with zipfile.ZipFile(path, "a") as f:
        f.writestr("README.txt", "how it was recorded")
    assert len(load(path)[0].obs) == 16


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    arrays, _ = flat(ENDS)
    for key in ("rewards", "metadata"):
        np.savez(tmp_path / "x.npz", **arrays | {key: np.array([Bomb()] * 19, dtype=object)})
        with pytest.raises(InputError):
            load(str(tmp_path / "x.npz"))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("metadata", ['{"env_id": ', "[1]", '{"a":' * 9999])
def test_bad_metadata(tmp_path, metadata):
    text = np.frombuffer(metadata.encode(), np.uint8)
    with pytest.raises(InputError, match="metadata is not a JSON object"):
        load(write(tmp_path / "x.npz", flat(ENDS)[0] | {"metadata": text}))


@pytest.mark.parametrize("key, value, must", [
    ("env_id", "3", "a Gymnasium id"), ("env_id", '["Hopper-v5"]', "a Gymnasium id"),
    ("max_episode_steps", "1e400", "a whole number from 1"),
    ("max_episode_steps", "-5", "a whole number from 1"),
    ("max_episode_steps", "0", "a whole number from 1"),
    ("max_episode_steps", "2.5", "a whole number from 1"),
    ("max_episode_steps", "true", "a whole number from 1"),
    ("max_episode_steps", '"abc"', "a whole number from 1"),
    ("ref_min_score", '"a"', "a number"), ("ref_max_score", "NaN", "a number"),
    ("ref_max_score", "[1]", "a number"), ("ref_max_score", "1" * 4000, "a number"),
    ("action_low", '"x"', "a number, or one for each action"),
    ("action_low", "[-1, -1, -1]", "a number, or one for each action"),
    ("action_high", "[1, {}]", "a number, or one for each action"),
    ("action_high", "1e39", "a number, or one for each action"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_wrong_metadata_is_named(tmp_path, suffix, key, value, must):
    arrays = without(flat(ENDS)[0], "timeouts")
    text = f'{{"{key}": {value}}}'
    write(tmp_path / f"x{suffix}", arrays | {"metadata": text})
    with pytest.raises(InputError, match=rf"metadata {key} is .*, not {must}; correct") as error:
        load(str(tmp_path / f"x{suffix}"), eval_env="Pendulum-v1")
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_null_in_metadata_is_as_absent(tmp_path):
    meta = dict.fromkeys(files.METADATA)
    path = write(tmp_path / "x.npz", flat(ENDS)[0], meta)
    assert load(path)[0].action_low.tolist() == [-1, -1]


@pytest.mark.parametrize("eval_env, match", [
    ("Hoper-v5", "did you mean Hopper-v5"), ("Walker2d-v5", "Walker2d-v5 .17, 6."),
    ("CartPole-v1", "only Box"),
])  # fmt: skip
def test_evaluation_tasks_that_do_not_fit(tmp_path, eval_env, match):
    with pytest.raises(InputError, match=match):
        load(hopper_file(tmp_path), eval_env=eval_env)


def test_missing_gymnasium_robotics_is_said_before_training(tmp_path, monkeypatch):
    for key in [k for k in gymnasium.registry if k.startswith(("AntMaze", "Adroit"))]:
        monkeypatch.delitem(gymnasium.registry, key)
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(InputError, match="AntMaze_UMaze-v4.*pip install 'gymnasium-robotics"):
        load("antmaze-umaze-v2")
    path = write(tmp_path / "x.npz", flat(ENDS)[0], {"env_id": "AdroitHandDoor-v1"})
    with pytest.raises(InputError, match="x.npz names the task .*pip install 'gymnasium-robotics"):
        load(path)


def test_ogbench_files_end_trajectories_not_the_mdp(tmp_path):
    arrays, _ = flat([(4, "terminal"), (5, "terminal")])  # its terminals are trajectory ends
    del arrays["timeouts"]
    masks = np.ones(9, np.float32)
    masks[6] = 0  # the goal
    arrays |= {"qpos": np.zeros((9, 2)), "qvel": np.zeros((9, 2)), "masks": masks}
    data, _ = load(write(tmp_path / "x.npz", arrays))
    np.testing.assert_array_equal(data.obs, arrays["observations"][[0, 1, 2, 4, 5, 6, 7]])
    assert data.terminal.tolist() == [0, 0, 0, 0, 0, 1, 0]
    np.testing.assert_array_equal(data.next_obs[[0, 4]], arrays["observations"][[1, 6]])


def test_compact_files_of_ogbench_lose_no_transition(tmp_path):
    """Their terminals mark the last two rows of a recording, and valids the very last."""
    arrays, _ = flat([(4, "terminal"), (5, "terminal")])
    ends, masks = arrays["terminals"].astype(np.float32), np.ones(9, np.float32)
    masks[6] = 0
    whole = without(arrays, "timeouts") | {"masks": masks, "terminals": ends}
    compact = {"valids": 1 - ends, "terminals": np.minimum(ends + np.append(ends[1:], 1), 1)}
    want, _ = load(write(tmp_path / "x.npz", whole))
    data, _ = load(write(tmp_path / "y.npz", whole | compact))
    assert len(data.obs) == 7 and data.digest == want.digest


# ------------------------------------------------------------------ a copy without harness/


def small(arrays):
    return arrays | {"rewards": arrays["rewards"].astype(">f8"), "step": np.arange(19, dtype="u2")}


IN_A_COPY = {
    "whole": (lambda a: a, None),
    "odd types and other arrays": (lambda a: small(a) | {"who": np.array(["x"])}, None),
    "no rewards": (lambda a: without(a, "rewards"), "rewards has no values, not .19,."),
    "no observations": (lambda a: without(a, "observations"), "observations has no values"),
    "short actions": (change("actions", lambda x: x[1:]), r"actions has the shape .18, 2."),
    "actions (N,)": (change("actions", lambda x: x[:, 0]), r"actions has the shape .19,."),
    "rewards (N, 1)": (change("rewards", lambda x: x[:, None]), "rewards has the shape .19, 1."),
    "terminals ()": (change("terminals", lambda x: x[0]), "terminals has the shape"),
    "next width": (add("next_observations", (19, 4)), "next_observations has the shape .19, 4."),
    "final": (add("final_observations", (1, 3)), "store final_observations of each of 5"),
    "empty": (lambda a: {k: v[:0] for k, v in a.items()}, "observations has the shape .0, 3."),
    "text": (change("rewards", lambda x: np.array(["a"] * 19)), "could not convert string"),
    "lost": (lambda a: {k: v[8:9] for k, v in a.items()}, "no row has a next observation"),
    "masks": (add("masks", 19), "this form needs the folder harness/"),
    "an action of 2": (change("actions", lambda x: x * 0 + 2), "NaN, infinite or beyond"),
    "NaN action": (change("actions", lambda x: x * np.nan), "NaN, infinite or beyond"),
    "NaN observation": (change("observations", lambda x: x * np.nan), "NaN, infinite or beyond"),
    "infinite reward": (change("rewards", lambda x: x + np.inf), "NaN, infinite or beyond"),
    "crossed bounds": (
        lambda a: a | {"metadata": np.array('{"action_low": 1, "action_high": -1}')},
        "NaN, infinite or beyond",
    ),
    "bounds": (
        lambda a: a | {"metadata": np.array('{"action_low": [[1]]}')},
        "the action bounds of .*; store one number, or one for each action",
    ),
}


@pytest.mark.parametrize("case", IN_A_COPY)
def test_a_copy_reads_a_file_as_the_repository_does_or_says_one_line(tmp_path, monkeypatch, case):
    changed, said = IN_A_COPY[case]
    path = write(tmp_path / "x.npz", changed(flat(ENDS)[0]))
    want = said or load(path)[0].digest
    monkeypatch.setattr("run.guest", lambda name: None)
    if said is None:
        assert load(path)[0].digest == want
    else:
        with pytest.raises(InputError, match=f"x.npz: .*{said}|{said}") as error:
            load(path)
        assert "\n" not in str(error.value)
