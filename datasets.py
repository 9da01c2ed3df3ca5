"""Every offline dataset behind one call: load_dataset(name) -> (Data, Task or None).

    hopper-replay-demo            bundled: data/*.npz beside this file
    hopper-medium-v2              a D4RL name, read with h5py from $D4RL_DATASET_DIR or
                                  ~/.d4rl/datasets, downloaded when absent (data/d4rl_files.csv)
    mujoco/hopper/medium-v0       a Minari id, local or remote ($MINARI_DATASETS_PATH respected)
    logs.hdf5, logs.npz           flat arrays with D4RL key names, or an OGBench file

Rules. A transition bootstraps through a time limit and never through a terminal; its next
observation never comes from another episode. Rows whose next observation is unknown (time limit,
cut, end of file) are dropped, and counted in a note; terminal rows are always kept. Stored
`next_observations` are believed, a jump between rows they reveal is an unmarked episode cut, and at
a cut a stored value equal to the next row's observation is a copy of it, so unknown. Dict and tuple
observations are flattened with sorted keys, at evaluation too. Nothing is clipped or normalized,
except actions outside the task's bounds by less than 1e-5 of their range (rounding; noted).
File keys: observations (N, S), actions (N, A), rewards (N,), terminals (N,); optional timeouts,
next_observations, final_observations (E, S: the last observation of every episode, in order), and
metadata (JSON: env_id, ref_min_score, ref_max_score, max_episode_steps, action_low, action_high).
Files are never unpickled.
"""

import csv
import difflib
import fcntl
import hashlib
import json
import os
import re
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

DATA_DIR = Path(__file__).resolve().parent / "data"
ROWS = 1 << 16  # rows converted at a time, which bounds the memory used beyond the result
# {path} is the column of data/d4rl_files.csv, {file} its last part.
D4RL_MIRRORS = (
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}",
    "https://web.archive.org/web/2025id_/http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
)
LOCOMOTION = {
    "halfcheetah": "HalfCheetah",
    "hopper": "Hopper",
    "walker2d": "Walker2d",
    "ant": "Ant",
}
ADROIT = {"pen": 100, "door": 200, "hammer": 200, "relocate": 200}  # D4RL's time limits
# D4RL's evaluation mazes: r is the start, g the goal, rows grow with y.
ANTMAZES = {
    "umaze": ("UMaze", 700, "11111 1r001 11101 1g001 11111"),
    "medium": (
        "Medium",
        1000,
        "11111111 1r011001 10010001 11000111 10010001 10100101 100010g1 11111111",
    ),
    "large": (
        "Large",
        1000,
        "111111111111 1r0001000001 101101010101 100000010001 101111011101 100101000001 "
        "110101010111 100100010g01 111111111111",
    ),
}


FILE_KEYS = ("observations", "actions", "rewards", "next_observations")


class InputError(SystemExit):
    """Bad input: one line with the cause and the fix. Uncaught, it is printed and exits 1."""


@dataclass
class Data:
    """N transitions of E episodes, all tensors on one device."""

    obs: Tensor  # (N, S) float32
    action: Tensor  # (N, A) float32, the task's bounds mapped to [-1, 1]
    reward: Tensor  # (N,) float32, raw
    next_obs: Tensor  # (N, S) float32
    terminal: Tensor  # (N,) float32, 1 where the MDP ended (never a time limit)
    episode: Tensor  # (N,) int64, 0..E-1, non-decreasing; rows of an episode are in time order
    episode_return: Tensor  # (E,) float32, undiscounted raw return, dropped rows included
    action_low: Tensor  # (A,) the task's bounds, raw
    action_high: Tensor  # (A,)
    obs_mean: Tensor  # (S,) zeros; common.normalize_obs changes it
    obs_std: Tensor  # (S,) ones
    name: str
    digest: str  # sha256 of the arrays above, first 16 hex digits


@dataclass
class Task:
    """The task a policy is evaluated on."""

    id: str
    ref_min: float | None = None  # None: no reference score
    ref_max: float | None = None
    success: bool = False  # score is 100 x share of episodes with any reward > 0 (sparse mazes)
    spec: object = None  # a recorded gymnasium EnvSpec, else `id` is made
    kwargs: dict = field(default_factory=dict)  # for gymnasium.make
    d4rl_maze: str = ""  # a key of ANTMAZES: rebuild D4RL's maze, its physics and its 29 numbers
    pad: int = 0  # zeros appended to the observation (D4RL's ant: 84 contact forces)

    def make(self):
        """A fresh environment whose observations are (S,) float32, ordered as the dataset's."""
        import gymnasium
        from gymnasium.wrappers import TransformObservation

        _register_robotics()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # -v4 is out of date on purpose: closest to D4RL
            env = gymnasium.make(self.spec or self.id, **self.kwargs)
        origin = _d4rl_antmaze(env, self.d4rl_maze) if self.d4rl_maze else None

        def flat(obs) -> np.ndarray:
            if origin is not None:
                parts = [obs["achieved_goal"] - origin, obs["observation"]]
            else:
                parts = [np.asarray(x).reshape(-1) for x in _leaves(obs)]
            return np.concatenate([*parts, np.zeros(self.pad)]).astype(np.float32)

        size = flat(env.observation_space.sample()).size
        space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        return TransformObservation(env, flat, space)

    def score(self, returns) -> float:
        """Mean normalized score x100 of raw episode returns; the mean return without references."""
        returns = np.asarray(returns, dtype=np.float64)
        if self.success:
            return float(100 * np.mean(returns > 0))  # rewards are never negative in these tasks
        if self.ref_min is None:
            return float(np.mean(returns))
        return float(100 * np.mean((returns - self.ref_min) / (self.ref_max - self.ref_min)))


def load_dataset(name: str, device="cpu", eval_env: str | None = None) -> tuple[Data, Task | None]:
    """Read dataset `name` (the forms above) onto `device`, with its evaluation task.

    eval_env: None for the dataset's own task, "none" for no task, else a Gymnasium id whose
    spaces must agree with the data. The task is built once here, so that what it lacks shows
    before any time is spent. Raises InputError for every input that cannot be used.
    """
    files = _csv("d4rl_files.csv")
    if re.search(r"\.(hdf5|h5|npz)$", name, re.IGNORECASE):
        parts = _read_file(Path(name).expanduser(), eval_env)
    elif name in _bundled():
        parts = _read_file(DATA_DIR / f"{name}.npz", eval_env)
    elif name in files:
        parts = _read_d4rl(name, files[name], eval_env)
    elif name in (local := _local_minari()) or re.fullmatch(r"[\w.-]+(/[\w.-]+)+-v\d+", name):
        parts = _read_minari(name, name not in local, eval_env)
    else:
        near = difflib.get_close_matches(name, [*_bundled(), *files, *local], n=4, cutoff=0.5)
        raise InputError(
            f"unknown dataset '{name}': "
            + (f"did you mean {', '.join(near)}? " if near else "")
            + "Give a bundled name, a D4RL name, a Minari id or a .hdf5, .h5 or .npz file."
        )
    arrays, low, high, task = parts
    if task and task.ref_min is None:
        print(f"note: {name}: no reference score for {task.id}, raw returns are reported")
    return _finish(name, arrays, low, high, device), task


# ---------------------------------------------------------------- the rules, on plain arrays


def _finish(name, arrays, low, high, device) -> Data:
    """Check the values, map the actions, drop rows without next observation, number episodes.

    arrays: obs, next_obs (N, S), action (N, A), reward (N,) float32; terminal, end, known (N,)
    bool, where `end` marks the last row of an episode and `known` a valid next_obs. In place.
    """
    obs, action, reward, next_obs = (arrays[k] for k in ("obs", "action", "reward", "next_obs"))
    terminal, end, known = (arrays[k] for k in ("terminal", "end", "known"))
    if not len(obs):
        raise InputError(f"{name}: the dataset is empty; give one with at least one transition")
    end |= terminal
    end[-1] = True
    episode = np.cumsum(end) - end  # (N,)
    starts = np.flatnonzero(np.r_[True, end[:-1]])
    episode_return = np.add.reduceat(reward, starts, dtype=np.float64)  # (E,)
    next_obs[~known] = obs[~known]  # at a terminal: weighted 0, but must be finite; else dropped
    for key, x in zip(FILE_KEYS, (obs, action, reward, next_obs), strict=True):
        for i, part in _blocks(x):
            if not np.isfinite(part).all():
                row = i + np.flatnonzero(~np.isfinite(part).reshape(len(part), -1).all(1))[0]
                raise InputError(
                    f"{name}: {key} has a NaN or infinite value in row {row}; remove it"
                )
    _map_actions(name, action, low, high)
    keep = known | terminal
    if not keep.all():
        print(f"note: {name}: {(~keep).sum()} of {len(keep)} rows dropped, no next observation")
        if not keep.any():
            raise InputError(f"{name}: no row has a next observation; store next_observations")
    obs, action, reward, next_obs = (_compact(x, keep) for x in (obs, action, reward, next_obs))
    left, episode = np.unique(
        episode[keep], return_inverse=True
    )  # an episode may lose its only row
    rows = {
        "obs": obs,
        "action": action,
        "reward": reward,
        "next_obs": next_obs,
        "terminal": terminal[keep].astype(np.float32),
        "episode": episode.astype(np.int64),
        "episode_return": episode_return[left].astype(np.float32),
        "action_low": low,
        "action_high": high,
    }
    digest = hashlib.sha256()
    for x in rows.values():
        digest.update(np.ascontiguousarray(x))
    rows |= {"obs_mean": np.zeros_like(obs[0]), "obs_std": np.ones_like(obs[0])}
    tensors = {k: torch.from_numpy(x).to(device) for k, x in rows.items()}
    return Data(**tensors, name=name, digest=digest.hexdigest()[:16])


def _map_actions(name, action, low, high):
    """(A,) bounds to [-1, 1], in place."""
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise InputError(f"{name}: the action bounds {low} .. {high} must be finite and ordered")
    rounded = 0
    for i, part in _blocks(action):
        excess = np.maximum(low - part, part - high) / (high - low)
        if (excess > 1e-5).any():
            row, column = np.argwhere(excess > 1e-5)[0]
            raise InputError(
                f"{name}: actions row {i + row} is {part[row, column]:g} in column {column}, outside "
                f"the bounds [{low[column]:g}, {high[column]:g}]; rescale or clip the file's actions, "
                "or give its true bounds (metadata action_low, action_high, or --eval-env)"
            )
        rounded += (excess > 0).sum()
        np.clip(part, low, high, out=part)
        if (low != -1).any() or (high != 1).any():
            part[:] = (part - low) / (high - low) * 2 - 1
    if rounded:
        print(
            f"note: {name}: {rounded} action values over the bounds by rounding set to the bounds"
        )


def _link(name, obs, stored, terminal, end, final=None):
    """next_obs (N, S) and known (N,) of flat rows in time order; `end` gains the cuts found.

    stored: next_observations (N, S) or None. final: last observation of every episode, or None.
    """
    next_obs = np.empty_like(obs) if stored is None else stored
    known = np.ones(len(obs), dtype=bool)
    end |= terminal
    end[-1] = True
    if stored is None:
        next_obs[:-1] = obs[1:]
        known[end] = False
        if final is not None:
            last = np.flatnonzero(end)
            if len(final) != len(last):
                raise InputError(
                    f"{name}: final_observations has {len(final)} rows but terminals and timeouts "
                    f"mark {len(last)} episodes; store one per episode, in order"
                )
            next_obs[last], known[last] = final, True
        return next_obs, known
    cuts = copies = 0
    for i, part in _blocks(obs[1:]):
        rows = slice(i, i + len(part))
        # rtol: the two arrays may have been stored in different precisions
        same = np.isclose(part, stored[rows], rtol=1e-6, atol=1e-6).all(1)
        cuts += (~same & ~end[rows]).sum()
        copies += (same & end[rows] & ~terminal[rows]).sum()
        known[rows] = ~(same & end[rows])
        end[rows] |= ~same
    if cuts:
        print(f"note: {name}: {cuts} unmarked episode cuts found by next_observations")
    if copies:
        print(f"note: {name}: {copies} next_observations at cuts are the next episode's, ignored")
    return next_obs, known


def _blocks(x) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, view) of consecutive blocks, so that temporaries stay small."""
    for i in range(0, len(x), ROWS):
        yield i, x[i : i + ROWS]


def _compact(x, keep):
    """The kept rows of x, moved to its front instead of copied."""
    rows = np.flatnonzero(keep)
    if len(rows) < len(x):
        for i, part in _blocks(rows):
            x[i : i + len(part)] = x[part]  # row k comes from a row >= k, so none is lost
    return x[: len(rows)]


def _leaves(x) -> Iterator:
    """Arrays (or spaces) of a nested observation: dicts in sorted key order, tuples in order."""
    if hasattr(x, "items"):
        for key in sorted(x):
            yield from _leaves(x[key])
    elif isinstance(x, tuple):
        for part in x:
            yield from _leaves(part)
    else:
        yield x


# ---------------------------------------------------------------- files


def _read_file(path, eval_env, d4rl=None, task=None, probe=None):
    """arrays, low, high, task of a flat file (d4rl: what is known of one of D4RL's)."""
    name = path.name
    if not path.is_file():
        near = (
            difflib.get_close_matches(name, os.listdir(path.parent)) if path.parent.is_dir() else []
        )
        raise InputError(
            f"no file {path}; " + (f"near it: {', '.join(near)}" if near else "check it")
        )
    try:
        with _open_npz(path) if path.suffix.lower() == ".npz" else _open_hdf5(path) as (cols, meta):
            return _read_columns(name, cols, d4rl or meta, eval_env, task, probe)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as e:
        kind = "npz" if path.suffix.lower() == ".npz" else "HDF5"
        raise InputError(
            f"{path} is not a complete {kind} file ({e}); delete it and download or write it again"
        ) from e


@contextmanager
def _open_hdf5(path):
    """(columns, metadata) of the top-level arrays; a column has shape, dtype and blocks()."""
    import h5py

    with h5py.File(path, "r") as file:

        def column(x):
            # Whole storage chunks at a time: a compressed one would be unpacked twice.
            chunk = (x.chunks or (1,))[0] if x.shape else 1
            step = max(chunk, ROWS // chunk * chunk)
            blocks = lambda: (x[i : i + step] for i in range(0, len(x), step))  # noqa: E731
            return SimpleNamespace(shape=x.shape, dtype=x.dtype, blocks=blocks)

        arrays = {k: x for k, x in file.items() if isinstance(x, h5py.Dataset)}
        meta = arrays.pop("metadata", None)  # a group in D4RL's own files
        if not arrays and "episode_0" in file:
            raise InputError(f"{path} is a Minari file; give its Minari id instead")
        meta = file.attrs.get("metadata") if meta is None else meta[()]
        yield {k: column(x) for k, x in arrays.items()}, _metadata(path, meta)


@contextmanager
def _open_npz(path):
    """As _open_hdf5, streaming from the archive, so that no float64 copy is ever whole in memory."""
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as whole:

        def column(key):
            with archive.open(f"{key}.npy") as f:
                shape, fortran, dtype = read_header[np.lib.format.read_magic(f)](f)

            def blocks():
                if fortran or dtype.hasobject:  # an object array raises: nothing is unpickled
                    yield whole[key]
                    return
                width = dtype.itemsize * int(np.prod(shape[1:]))
                with archive.open(f"{key}.npy") as f:
                    read_header[np.lib.format.read_magic(f)](f)
                    for i in range(0, shape[0], ROWS):
                        count = min(ROWS, shape[0] - i)
                        part = np.frombuffer(f.read(count * width), dtype)
                        yield part.reshape(count, *shape[1:])

            return SimpleNamespace(shape=shape, dtype=dtype, blocks=blocks)

        keys = set(whole.files)
        meta = whole["metadata"] if "metadata" in keys else None
        yield {k: column(k) for k in keys - {"metadata"}}, _metadata(path, meta)


def _metadata(path, raw) -> dict:
    """The JSON object stored as text or as uint8 bytes."""
    if raw is None:
        return {}
    if isinstance(raw, np.ndarray):
        raw = raw.tobytes() if raw.dtype == np.uint8 else raw.item()
    with suppress(ValueError, TypeError):
        meta = json.loads(raw)
        if isinstance(meta, dict):
            return meta
    raise InputError(
        f"{path}: metadata is not a JSON object; write it with json.dumps, or leave it out"
    )


def _read_columns(name, cols, meta, eval_env, task, probe):
    """arrays, low, high, task; every check that needs no values comes first."""
    trajectory_ends = {"qpos", "qvel"} <= cols.keys() and "timeouts" not in cols  # OGBench
    if trajectory_ends and not {"rewards", "masks"} <= cols.keys():
        raise InputError(
            f"{name}: an OGBench file without rewards and masks has no task to learn; "
            "save the arrays of a *-singletask-* dataset, rewards and masks included"
        )
    missing = [k for k in (*FILE_KEYS[:3], "terminals") if k not in cols]
    if missing:
        raise InputError(
            f"{name}: no array named {', '.join(missing)} (found: {', '.join(sorted(cols)) or 'none'}); "
            "use D4RL's key names"
        )
    n = (cols["observations"].shape or (0,))[0]
    wide = {"observations", "actions", "next_observations", "final_observations"} & cols.keys()
    for key in sorted(wide | {"rewards", "terminals", "timeouts", "masks"} & cols.keys()):
        col, want = cols[key], f"({'E' if key[0] == 'f' else n}{', columns' * (key in wide)})"
        if col.dtype.kind not in "fiub":
            raise InputError(f"{name}: {key} has dtype {col.dtype}; store numbers (float32)")
        if len(col.shape) != 1 + (key in wide) or 0 in col.shape[1:]:
            raise InputError(f"{name}: {key} has shape {col.shape}; store it as {want}")
        if key != "final_observations" and col.shape[0] != n:
            raise InputError(
                f"{name}: {key} has {col.shape[0]} rows, observations has {n}; make them equal"
            )
        if key.endswith("_observations") and col.shape[1] != cols["observations"].shape[1]:
            raise InputError(
                f"{name}: {key} has {col.shape[1]} columns, observations another number"
            )
    if cols["actions"].dtype.kind != "f":
        raise InputError(
            f"{name}: actions of dtype {cols['actions'].dtype} are discrete; only "
            "continuous (float) actions are supported"
        )
    if not n:
        raise InputError(f"{name}: the dataset is empty; give one with at least one transition")

    if task is None and eval_env != "none" and (env_id := eval_env or meta.get("env_id")):
        refs = meta.get("ref_min_score"), meta.get("ref_max_score")
        task = _named_task(env_id, _family(meta.get("env_id") or env_id), refs)
        probe = _probe(task)
    s, a = cols["observations"].shape[1], cols["actions"].shape[1]
    low, high = (np.full(a, x, np.float32) for x in (-1, 1))
    if probe and probe.low.shape == (a,):
        low, high = probe.low, probe.high
    for key, bound in {"action_low": low, "action_high": high}.items():
        if key in meta:
            bound[:] = meta[key]
    if task and task.id == "Ant-v4" and meta.get("d4rl") and s == probe.size + 84:
        task.pad, probe.size = 84, s  # MuJoCo 2.0 recorded all 84 contact forces as zero
    _check_spaces(name, task, probe, s, low, high)

    def fill(key):
        out, i = np.empty(cols[key].shape, np.float32), 0
        for part in cols[key].blocks():
            with np.errstate(over="ignore"):  # an overflow to inf is reported with its row later
                out[i : i + len(part)] = part
            i += len(part)
        return out

    def flags(key):
        x = fill(key)
        if not np.isin(x, (0, 1)).all():
            row = np.flatnonzero(~np.isin(x, (0, 1)))[0]
            raise InputError(f"{name}: {key} is {x[row]:g} in row {row}; store only 0 and 1")
        return x.astype(bool)

    obs, action, reward = (fill(k) for k in FILE_KEYS[:3])
    terminal = flags("terminals")
    end = terminal.copy()
    if trajectory_ends:
        terminal = ~flags("masks")
    end |= flags("timeouts") if "timeouts" in cols else False
    if meta.get("d4rl") == "antmaze":  # v0's timeouts are out of step; an ant moves < 1 m a step
        end[:-1] |= np.linalg.norm(obs[1:, :2] - obs[:-1, :2], axis=1) > 1
    stored = fill("next_observations") if "next_observations" in cols else None
    if stored is None and not trajectory_ends and "timeouts" not in cols:
        limit = meta.get("max_episode_steps") or (probe.limit if probe else None)
        first = 0
        for last in [*np.flatnonzero(terminal), n - 1] if limit else []:
            end[first + limit - 1 : last : limit] = True
            first = last + 1
        print(
            f"note: {name}: no timeouts, episodes end at terminals and after {limit or 'no'} steps"
        )
    final = fill("final_observations") if "final_observations" in cols else None
    next_obs, known = _link(name, obs, stored, terminal, end, final)
    arrays = dict(obs=obs, action=action, reward=reward, next_obs=next_obs)
    return arrays | dict(terminal=terminal, end=end, known=known), low, high, task


# ---------------------------------------------------------------- D4RL


def _read_d4rl(name, file, eval_env):
    """The task is built before anything is downloaded."""
    family = _family(name)
    refs = _d4rl_refs(name)
    steps = {"kitchen": 280, "maze2d": None, "carla": None, "flow": None} | ADROIT
    meta = {"d4rl": family, "max_episode_steps": steps.get(family, 1000)}
    if family == "antmaze" and "umaze" in name:
        meta["max_episode_steps"] = 700
    if eval_env is None:
        task = None
        if family in LOCOMOTION:
            task = Task(f"{LOCOMOTION[family]}-v4", *refs)
        elif family == "antmaze":
            size = name.split("-")[1]
            task = Task(f"AntMaze_{ANTMAZES[size][0]}-v4", *refs, success=True, d4rl_maze=size)
            rows = [[int(c) if c in "01" else c for c in row] for row in ANTMAZES[size][2].split()]
            task.kwargs = {"maze_map": rows[::-1], "max_episode_steps": ANTMAZES[size][1]}
            task.kwargs |= {"continuing_task": False, "reset_target": False}
        elif family in ADROIT:
            task = Task(f"AdroitHand{family.title()}-v1", *refs)
            task.kwargs = {"max_episode_steps": ADROIT[family]}
            if family != "pen":
                print(
                    f"note: {name}: gymnasium-robotics 1.2.1 and later pay other rewards than D4RL "
                    "in this task; only 1.2.0 gives comparable scores"
                )
        else:
            print(
                f"note: {name}: no maintained task has these observations, training without "
                "evaluation"
            )
    else:
        task = None if eval_env == "none" else _named_task(eval_env, family, refs)
    probe = _probe(task)
    path = _fetch(name, file["path"], file["sha256"])
    return _read_file(path, "none", meta, task, probe)


def _d4rl_antmaze(env, size) -> np.ndarray:
    """Turn gymnasium-robotics' ant maze into D4RL's, in place; returns D4RL's origin, (2,).

    D4RL's ant is another one (torque 30 instead of 150, 0.1 s a step instead of 0.05, softer
    contacts), its y axis runs down the map (the map arrives upside down), its origin is the start
    cell, the ant starts there without offset, the goal lies 0 to 1.5 m beyond its cell, radius 0.5.
    """
    maze, model = env.unwrapped, env.unwrapped.ant_env.model
    model.opt.timestep = 0.02
    model.actuator_gear[:, 0] = 30
    moving = np.flatnonzero(model.geom_bodyid > 0)
    floor = [model.geom("floor").id]
    for geom in [*moving, *floor]:
        model.geom_solimp[geom, :3] = 0.8, 0.8, 0.01
    maze.ant_env._reset_noise_scale = 0.1
    maze.position_noise_range = 0
    goal = maze.maze.unique_goal_locations[0].copy()
    draw = lambda: goal + maze.np_random.uniform(0, [[1], [0.5]], (2, 2)).sum(0)  # noqa: E731
    near = lambda a, g, info=None: np.linalg.norm(a - g, axis=-1) <= 0.5  # noqa: E731
    maze.generate_target_goal = draw
    maze.compute_terminated = lambda a, g, info: bool(near(a, g))
    maze.compute_reward = lambda a, g, info: near(a, g).astype(np.float64)
    return maze.maze.unique_reset_locations[0].copy()


def _fetch(name, path, sha256) -> Path:
    """The file in D4RL's own cache, downloaded once however many processes ask for it."""
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    target = folder / path.split("/")[-1]
    if target.is_file():
        return target
    own = [
        m.rstrip("/") + part
        for m in os.environ.get("D4RL_MIRRORS", "").split()
        for part in ("/{path}", "/{file}")
    ]
    failures = []
    with _lock(folder / f".{target.name}.lock"):
        if target.is_file():  # another process was faster
            return target
        partial = folder / f"{target.name}.part"
        for url in (m.format(path=path, file=target.name) for m in [*own, *D4RL_MIRRORS]):
            try:
                print(f"downloading {name} from {url}", flush=True)
                _download(url, partial, sha256)
                os.replace(partial, target)
                return target
            except (OSError, ValueError, HTTPException) as e:
                failures.append(f"{url} ({e})")
            finally:
                partial.unlink(missing_ok=True)
    raise InputError(
        f"{name} could not be downloaded: {'; '.join(failures)}. Put the file at {target}, or set "
        "D4RL_MIRRORS to a folder or server that has it (file:///..., https://...), and run again."
    )


def _download(url, partial, sha256):
    """Raises OSError or ValueError unless the whole file arrived and is HDF5."""
    import h5py

    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=30) as source, open(partial, "wb") as out:
        expected = source.headers.get("Content-Length")
        while block := source.read(1 << 20):
            out.write(block)
            digest.update(block)
            size += len(block)
    if expected and size != int(expected):
        raise OSError(f"{size} of {expected} bytes arrived")
    if sha256 and digest.hexdigest() != sha256:
        raise ValueError(f"sha256 {digest.hexdigest()} is not the recorded {sha256}")
    h5py.File(partial, "r").close()  # an error page, or a file cut short, fails here


@contextmanager
def _lock(path):
    """One process at a time; released by the system even if the holder is killed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as e:
        raise InputError(
            f"cannot write to {path.parent} ({e}); make it writable, or set "
            "D4RL_DATASET_DIR or MINARI_DATASETS_PATH to a folder that is"
        ) from e
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------- Minari


def _minari_root() -> Path:
    return Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()


def _local_minari() -> list[str]:
    root = _minari_root()
    found = [p for depth in range(1, 5) for p in root.glob("*/" * depth + "data/metadata.json")]
    return sorted(p.parents[1].relative_to(root).as_posix() for p in found)


def _read_minari(name, remote, eval_env):
    """Episodes keep their last observation, so no row is dropped."""
    try:
        import minari
    except ImportError as e:
        raise InputError(f"{name} needs Minari ({e}): pip install 'minari[hdf5,hf]'") from e
    try:
        if remote:
            with _lock(_minari_root() / f".{name.replace('/', '-')}.lock"):
                minari.load_dataset(name, download=True)
        dataset = minari.load_dataset(name)
    except Exception as e:  # whatever the server, the file or a missing extra raises
        near = difflib.get_close_matches(name, _local_minari(), n=3)
        raise InputError(
            f"Minari cannot load {name} ({str(e) or type(e).__name__}); check the id"
            + (f" (local: {', '.join(near)})" if near else "")
            + f" or put the dataset into {_minari_root() / name}"
        ) from e
    space, meta = dataset.action_space, dataset.storage.metadata
    if not hasattr(space, "low"):
        raise InputError(
            f"{name}: actions are {space}; only continuous (Box) actions are supported"
        )
    task = None
    recorded = dataset.env_spec.id if dataset.env_spec else None
    refs = meta.get("ref_min_score"), meta.get("ref_max_score")
    if eval_env not in (None, "none"):
        task = _named_task(eval_env, _family(recorded or eval_env), refs)
    elif eval_env is None and recorded:
        _register_robotics()
        try:
            env = dataset.recover_environment(eval_env=True)
        except Exception as e:
            raise _cannot_build(recorded, e) from e
        task = _named_task(env.spec.id, _family(recorded), refs, env.spec)
        env.close()
    elif eval_env is None:
        print(f"note: {name}: no task recorded, training without evaluation (see --eval-env)")
    probe = _probe(task)
    n, low, high = dataset.total_steps, space.low.reshape(-1), space.high.reshape(-1)
    low, high = low.astype(np.float32), high.astype(np.float32)

    reward_ends = bool(recorded and recorded.startswith("AntMaze") and _sparse(dataset.env_spec))
    i, arrays = 0, None
    for episode in dataset.iterate_episodes():
        t, leaves = len(episode.rewards), list(_leaves(episode.observations))
        if any(len(x) != t + 1 for x in leaves) or len(episode.actions) != t or i + t > n:
            raise InputError(
                f"{name}: episode {episode.id} has {t} rewards but other lengths of "
                "observations (one more is due) or actions; record it again"
            )
        width = sum(int(np.prod(x.shape[1:])) for x in leaves)
        if arrays is None:
            _check_spaces(name, task, probe, width, low, high)
            arrays = {k: np.empty((n, width), np.float32) for k in ("obs", "next_obs")}
            arrays["action"] = np.empty((n, len(low)), np.float32)
            arrays["reward"] = np.empty(n, np.float32)
            arrays |= {k: np.zeros(n, bool) for k in ("terminal", "end", "known")}
        rows, column = slice(i, i + t), 0
        for x in leaves:
            x = np.asarray(x).reshape(t + 1, -1)
            arrays["obs"][rows, column : column + x.shape[1]] = x[:-1]
            arrays["next_obs"][rows, column : column + x.shape[1]] = x[1:]
            column += x.shape[1]
        arrays["action"][rows] = np.asarray(episode.actions).reshape(t, -1)
        arrays["reward"][rows] = episode.rewards
        arrays["terminal"][rows] = episode.terminations
        if reward_ends:  # as in D4RL: these tasks were recorded running on past the goal
            arrays["terminal"][rows] |= np.asarray(episode.rewards) > 0
        arrays["end"][i + t - 1] = t > 0
        i += t
    if i != n or not n:
        raise InputError(f"{name}: {i} steps found, metadata says {n}; record or download it again")
    arrays["known"][:] = True
    return arrays, low, high, task


# ---------------------------------------------------------------- tasks


def _family(name) -> str:
    """hopper-medium-v2, Hopper-v5 -> hopper; AntMaze_UMaze-v4 -> antmaze; AdroitHandPen-v1 -> pen."""
    return re.split(r"[-_/]", name)[0].lower().removeprefix("adroithand")


def _d4rl_refs(name) -> tuple:
    """D4RL's (ref_min, ref_max) by the longest prefix of the name, else (None, None)."""
    scores = _csv("d4rl_ref_scores.csv")
    prefix = max((p for p in scores if name.startswith(p)), key=len, default=None)
    row = scores.get(prefix)
    return (float(row["ref_min"]), float(row["ref_max"])) if row else (None, None)


def _named_task(env_id, family, refs, spec=None) -> Task:
    """refs hold for the dataset's own `family`; else D4RL's are used, for locomotion only."""
    import gymnasium

    _register_robotics()
    if spec is None:
        try:
            registered = gymnasium.spec(env_id)
        except Exception as e:
            raise _cannot_build(env_id, e) from e
    task = Task(env_id, spec=spec)
    if _sparse(spec or registered):
        task.success, task.ref_min, task.ref_max = True, 0.0, 1.0
    elif _family(env_id) == family and None not in refs:
        task.ref_min, task.ref_max = map(float, refs)
    elif _family(env_id) in LOCOMOTION:
        task.ref_min, task.ref_max = _d4rl_refs(_family(env_id) + "-")
        print(f"note: {env_id}: scored with D4RL's references, which stem from its -v2 task")
    return task


def _sparse(spec) -> bool:
    """A maze whose reward only says that the goal was reached, once (ant mazes: at all)."""
    kwargs = spec.kwargs
    sparse = kwargs.get("reward_type", "sparse") == "sparse" and "Dense" not in spec.id
    once = spec.id.startswith("AntMaze") or not kwargs.get("continuing_task", True)
    return spec.id.startswith(("AntMaze", "PointMaze")) and sparse and once


def _register_robotics():
    """gymnasium-robotics (mazes, hands, kitchen) is optional."""
    with suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import gymnasium
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)


def _cannot_build(env_id, error) -> InputError:
    import gymnasium

    cause = " ".join(str(error).split()) or type(error).__name__
    robotics = any("gymnasium_robotics" in str(s.entry_point) for s in gymnasium.registry.values())
    near = difflib.get_close_matches(env_id, gymnasium.registry, n=3)
    if not robotics and env_id.startswith(("AntMaze", "PointMaze", "Adroit", "Franka")):
        fix = "pip install 'gymnasium-robotics>=1.4' 'mujoco<3.11'"
    else:
        fix = f"near it: {', '.join(near)}" if near else "install what it needs"
    return InputError(f"cannot build the task {env_id} ({cause}); {fix}, or pass --eval-env none")


def _probe(task):
    """Build the task once: its observation size, action bounds and time limit."""
    if task is None:
        return None
    try:
        env = task.make()
        space = env.action_space
        env.close()
    except Exception as e:
        raise _cannot_build(task.id, e) from e
    if not hasattr(space, "low"):
        raise InputError(
            f"{task.id}: actions are {space}; only continuous (Box) actions are supported"
        )
    low, high = (np.array(x, np.float32).reshape(-1) for x in (space.low, space.high))
    size, limit = env.observation_space.shape[0], getattr(env.spec, "max_episode_steps", None)
    return SimpleNamespace(size=size, low=low, high=high, limit=limit)


def _check_spaces(name, task, probe, obs_dim, low, high):
    if probe is None:
        return
    if (probe.size, len(probe.low)) != (obs_dim, len(low)):
        raise InputError(
            f"{name} has {obs_dim} observation and {len(low)} action numbers, {task.id} has "
            f"{probe.size} and {len(probe.low)}; pass --eval-env with the task of the data, or none"
        )
    if not (np.allclose(probe.low, low) and np.allclose(probe.high, high)):
        raise InputError(
            f"{name} has action bounds {low} .. {high}, {task.id} has {probe.low} .. {probe.high}; "
            "pass --eval-env with the task of the data, or none"
        )


def _bundled() -> list[str]:
    return sorted(p.stem for p in DATA_DIR.glob("*.npz"))


def _csv(file) -> dict[str, dict]:
    """Rows of a table in data/ by their first column."""
    with open(DATA_DIR / file, newline="") as f:
        reader = csv.DictReader(f)
        return {row[reader.fieldnames[0]]: row for row in reader}
