"""Every offline dataset behind one call: load_dataset(name) -> (Data, Task or None).

    hopper-replay-demo         bundled: data/*.npz beside this file
    hopper-medium-v2           a D4RL name, read with h5py from $D4RL_DATASET_DIR or
                               ~/.d4rl/datasets, downloaded when absent (data/d4rl_files.csv)
    mujoco/hopper/medium-v0    a Minari id, local or remote ($MINARI_DATASETS_PATH respected)
    cube-single-play-singletask-v0   a single task of OGBench (harness/ogbench.py)
    logs.hdf5, logs.npz        arrays with D4RL's key names, or saved from an OGBench singletask

A transition bootstraps through a time limit, never through a terminal; its next observation never
comes from another episode. Rows whose next observation is unknown (time limit, cut, end of file)
are dropped, and a note says how many; terminal rows are always kept. Stored next_observations are
believed: where they differ from the next row, an episode was cut; where they equal it at a time
limit, they are the next episode's first observation, so unknown. Two observations differ where a
number does by more than a millionth of its column's deviation and the rounding of the file's
floats, so that units change nothing. Dict and tuple observations are flattened, sorted by key, the
same at evaluation. Nothing is normalized or clipped, except actions over the bounds by less than
1e-5 of their range (rounding; noted). Nothing is ever unpickled.

File keys: observations (N, S), actions (N, A), rewards (N,), terminals (N,); optional timeouts,
next_observations, final_observations (E, S: the true last observation of each episode, in order),
metadata (JSON text: env_id, env_kwargs, ref_min_score, ref_max_score, max_episode_steps,
action_low, action_high).

A file can come from anybody, so nothing that it names is run: its pickles are not loaded, its task
is made only if its id is a registered one, and an HDF5 file that refers to other files is refused.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import stat
import subprocess
import sys
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common import Data, InputError
from harness.tasks import (
    DATA_DIR,
    Task,
    build,
    check_spaces,
    find_row,
    leaves,
    near,
    reference_scores,
    require,
    sparse,
    table,
    task_of_file,
)

KEYS = ("observations", "actions", "rewards", "next_observations")
UNREADABLE = (OSError, EOFError, KeyError, OverflowError, RuntimeError, ValueError)
UNREADABLE += (zipfile.BadZipFile, zlib.error)
METADATA = {
    "env_id": "a Gymnasium id",
    "env_kwargs": "an object of plain values for gymnasium.make",
    "max_episode_steps": "a whole number from 1",
    "ref_min_score": "a number",
    "ref_max_score": "a number",
    "action_low": "a number, or one for each action",
    "action_high": "a number, or one for each action",
}
SAME = 1e-6  # of a column's deviation: so near is the next row to stored next_observations
ROWS = 1 << 16  # rows converted at a time, which bounds memory
TEXT_SECONDS, TEXT_PATIENCE = 10, 600  # for metadata: of computing, of waiting
# {path} is the column of data/d4rl_files.csv, {file} its last part.
D4RL_MIRRORS = (
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}",
    "https://web.archive.org/web/2025id_/http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
)


@dataclass
class Rows:
    """A dataset as it was read: N rows in time order, actions in the task's own bounds."""

    obs: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32
    reward: np.ndarray  # (N,) float32
    next_obs: np.ndarray  # (N, S) float32
    terminal: np.ndarray  # (N,) bool
    end: np.ndarray  # (N,) bool: the last row of an episode
    known: np.ndarray  # (N,) bool: next_obs is what followed
    low: np.ndarray  # (A,) float32, the bounds of the actions
    high: np.ndarray  # (A,)
    task: Task | None


def load_dataset(name: str, device="cpu", eval_env: str | None = None) -> tuple[Data, Task | None]:
    """Read dataset `name` (forms above) onto `device`, with its evaluation task.

    eval_env: None for the dataset's own task, "none" for no task, else a Gymnasium id whose
    spaces must agree with the data. The task is built once here, before any time is spent.
    Raises InputError for every input that cannot be used.
    """
    files, local = table("d4rl_files.csv"), _local_minari()
    bundled = {p.stem: p for p in DATA_DIR.glob("*.npz")}
    try:
        if name in bundled or re.search(r"\.(hdf5|h5|npz)$", name, re.IGNORECASE):
            rows = _read_file(bundled.get(name) or Path(name).expanduser(), eval_env)
        elif name in files:
            rows = _read_d4rl(name, eval_env)
        elif name in local or re.fullmatch(r"[\w.-]+(/[\w.-]+)+-v\d+", name):
            rows = _read_minari(name, name not in local, eval_env)
        elif "-singletask" in name or is_ogbench(name):
            from harness import ogbench

            rows = ogbench.load(name, eval_env)
        else:
            tasks = [f"{data}-singletask-v0" for data in table("ogbench_sets.csv")]
            hint = near(name, [*bundled, *files, *local, *tasks])
            raise InputError(
                f"unknown dataset '{name}'{hint}; use a bundled, D4RL or OGBench name, a Minari "
                "id, or the path of a .hdf5, .h5 or .npz file"
            )
        task = rows.task
        if task and task.ref_min is None:
            print(f"note: {task.id} has no reference score, raw returns are reported")
        return _finish(name, rows, device), task
    except MemoryError as e:
        raise InputError(
            f"{name} does not fit into memory ({e}); use a smaller dataset, or write the file "
            "again if it should be smaller"
        ) from e


def is_ogbench(name: str) -> bool:
    """Whether OGBench has data or images of this name."""
    data = re.sub(r"(-oraclerep)?-v\d+$", "", name)
    return data in table("ogbench_sets.csv") or data.startswith(("visual-", "powderworld-"))


def _link(name, obs, stored, precision, end, final=None):
    """(next_obs (N, S), known (N,)) of flat rows in time order; `end` gains the cuts found.

    stored: next_observations (N, S) or None. precision: the float type to which the file rounded
    either of them. final: last observation of every episode, or None.
    """
    end[-1] = True
    if stored is None:
        next_obs, known = np.empty_like(obs), ~end
        next_obs[:-1] = obs[1:]
        if final is not None:
            require(len(final) == end.sum(), f"{name}: {len(final)} final_observations, but the "
                     f"flags mark {end.sum()} episodes; store one for each")  # fmt: skip
            next_obs[end], known[:] = final, True
        return next_obs, known
    known, cuts = np.ones(len(obs), dtype=bool), 0
    with np.errstate(all="ignore"):  # what is not finite is refused later, with its row
        tolerance = SAME * _deviation(obs)  # (S,)
        for i, part in _blocks(obs[1:]):
            rows = slice(i, i + len(part))
            # Each was rounded by half a unit, and below a power of 2 a unit is half as large.
            rounding = 2 * np.spacing(np.abs(part).astype(precision))
            same = (np.abs(part - stored[rows]) <= tolerance + rounding).all(1)
            cuts += (~same & ~end[rows]).sum()
            known[rows] = ~(same & end[rows])
            end[rows] |= ~same
    if cuts:
        print(f"note: {name}: next_observations show {cuts} episode cuts that nothing marks")
    return stored, known


def _deviation(x):
    """Population deviation (S,) of each column of x (N, S), in float64."""
    mean = x.mean(0, dtype=np.float64)
    squares = sum(np.square(part - mean).sum(0) for _, part in _blocks(x))
    return np.sqrt(squares / len(x))


def _finish(name, rows: Rows, device) -> Data:
    """Check values, map actions, number episodes, drop rows without next observation. Works in
    place."""
    obs, action, reward, next_obs = rows.obs, rows.action, rows.reward, rows.next_obs
    next_obs[~rows.known] = obs[~rows.known]  # at a terminal it is weighted 0, but must be finite
    for key, x in zip(KEYS, (obs, action, reward, next_obs), strict=True):
        for i, part in _blocks(x.reshape(len(x), -1)):
            if not np.isfinite(part).all():
                row = i + np.flatnonzero(~np.isfinite(part).all(1))[0]
                raise InputError(f"{name}: {key} row {row} is NaN or infinite; repair or remove it")
    _map_actions(name, action, rows.low, rows.high)
    episode, keep = np.cumsum(rows.end) - rows.end, rows.known | rows.terminal
    starts = np.flatnonzero(np.r_[True, rows.end[:-1]])
    returns = np.add.reduceat(reward, starts, dtype=np.float64)  # (E,)
    if not keep.all():
        print(f"note: {name}: {(~keep).sum()} of {len(keep)} rows lack a next observation, dropped")
    require(keep.any(), f"{name}: no row has a next observation; store next_observations")
    left, episode = np.unique(episode[keep], return_inverse=True)  # an episode can lose all rows
    kept = np.flatnonzero(keep)
    for x in (obs, action, reward, next_obs) if len(kept) < len(keep) else ():
        # Moved to the front, not copied: row k comes from a row >= k, so none is overwritten
        # before it is read.
        for i, part in _blocks(kept):
            x[i : i + len(part)] = x[part]
    arrays = {
        "obs": obs[: len(kept)],
        "action": action[: len(kept)],
        "reward": reward[: len(kept)],
        "next_obs": next_obs[: len(kept)],
        "terminal": rows.terminal[keep].astype(np.float32),
        "episode": episode.astype(np.int64),
        "episode_return": returns[left].astype(np.float32),
        "action_low": rows.low,
        "action_high": rows.high,
    }
    digest = hashlib.sha256()
    for x in arrays.values():
        digest.update(np.ascontiguousarray(x))
    tensors = {key: torch.from_numpy(x).to(device) for key, x in arrays.items()}
    return Data(**tensors, name=name, digest=digest.hexdigest()[:16])


def _map_actions(name, action, low, high):
    """(N, A) from the bounds, each (A,), to [-1, 1], in place."""
    require(np.isfinite([low, high]).all() and (low < high).all(),
             f"{name}: action bounds {low} to {high} are infinite or crossed")  # fmt: skip
    rounded = 0
    for i, part in _blocks(action):
        excess = np.maximum(low - part, part - high) / (high - low)
        for row, j in np.argwhere(excess > 1e-5)[:1]:
            raise InputError(f"{name}: actions row {i + row} column {j} is {part[row, j]:g}, "
                             f"not in [{low[j]:g}, {high[j]:g}]; rescale or clip the actions, or "
                             "add metadata action_low and action_high, or --eval-env")  # fmt: skip
        rounded += (excess > 0).sum()
        np.clip(part, low, high, out=part)
        if (low != -1).any() or (high != 1).any():
            part[:] = (part - low) / (high - low) * 2 - 1
    if rounded:
        print(f"note: {name}: {rounded} action values beyond the bounds by rounding set to them")


def _blocks(x):
    """(first row, view) of consecutive blocks, so that temporaries stay small."""
    return ((i, x[i : i + ROWS]) for i in range(0, len(x), ROWS))


def _read_file(path, eval_env, task=None, d4rl=None):
    """The Rows of a file. d4rl: a row of d4rl_tasks.csv, or None."""
    kind = path.suffix[1:].lower()
    _require_regular(path)
    try:
        with _open(path) as (columns, raw):
            return _read_columns(path.name, columns, raw, eval_env, task, d4rl)
    except UNREADABLE as e:
        magic = b"PK" if kind == "npz" else b"\x89HDF"
        with path.open("rb") as file:
            begun = magic.startswith(file.read(len(magic)))
        require(begun or d4rl, f"{path} is not an {kind} file; README shows how to make one")
        raise InputError(f"{path} is not a complete {kind} file ({e!s:.200}); delete it and "
                         "download or write it again") from e  # fmt: skip


def _require_regular(path):
    """Raises InputError where there is no ordinary file; nothing waits for a pipe's writer."""
    try:
        mode = path.stat().st_mode
        require(
            stat.S_ISREG(mode), f"{path} is a folder, a pipe or a device; use the path of a file"
        )
        path.open("rb").close()
    except PermissionError:
        raise InputError(f"{path} may not be read; chmod it or ask its owner") from None
    except OSError:
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        raise InputError(f"no file {path}; correct the path{near(path.name, names)}") from None


def _require_own_content(path, file):
    """Raises InputError where an open HDF5 file refers to other files: it could read any of them
    into the data."""
    from h5py import h5d, h5l, h5o

    def is_outside(name, link):
        return None if link.type in (h5l.TYPE_HARD, h5l.TYPE_SOFT) else name

    def is_stored_outside(name):
        item = h5o.open(file.id, name)
        if not isinstance(item, h5d.DatasetID):
            return None
        how = item.get_create_plist()
        return name if how.get_external_count() or how.get_layout() == h5d.VIRTUAL else None

    name = file.id.links.visit(is_outside, info=True) or h5o.visit(file.id, is_stored_outside)
    require(
        name is None,
        f"{path}: {(name or b'').decode(errors='replace'):.60} refers to another file, which is "
        "not followed; copy the values into this file",
    )


@contextmanager
def _open(path):
    """(columns, raw metadata) of the top-level arrays; a column has shape, dtype and blocks."""
    import h5py

    def hdf5_column(x):
        # Whole storage chunks at a time: a compressed one would be unpacked twice.
        chunk = x.chunks[0] if x.chunks else 1
        step = max(chunk, ROWS // chunk * chunk)
        blocks = (x[i : i + step] for i in range(0, len(x) if x.shape else 0, step))
        return SimpleNamespace(shape=x.shape or (), dtype=x.dtype, blocks=blocks)

    def npz_column(file, key):
        with file.zip.open(f"{key}.npy") as f:
            version, _ = np.lib.format.read_magic(f)
            shape, _, dtype = vars(np.lib.format)[f"read_array_header_{version}_0"](f)
        return SimpleNamespace(shape=shape, dtype=dtype, blocks=(file[k] for k in [key]))

    if path.suffix.lower() == ".npz":
        with np.lib.npyio.NpzFile(path, allow_pickle=False) as file:
            keys = [x[:-4] for x in file.zip.namelist() if x.endswith(".npy")]
            columns = {k: npz_column(file, k) for k in keys}
            meta = columns.pop("metadata", None)  # a pickled one is no text
            yield columns, "" if meta and meta.dtype.hasobject else meta and file["metadata"]
    else:
        with h5py.File(path, "r") as file:
            require("episode_0" not in file, f"{path} is a Minari file; use its Minari id")
            _require_own_content(path, file)
            columns = {k: hdf5_column(x) for k, x in file.items() if isinstance(x, h5py.Dataset)}
            has_text = columns.pop("metadata", None)  # in D4RL's own files it is a group
            if has_text or "metadata" in file.attrs:
                _try_text(path)
            yield columns, file["metadata"][()] if has_text else file.attrs.get("metadata")


READ_TEXT = """
import h5py, resource, sys, time
limit = int(time.process_time()) + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
file = h5py.File(sys.argv[1])
file.attrs.get("metadata") or file["metadata"][()]
"""


def _try_text(path, computing=TEXT_SECONDS, waiting=TEXT_PATIENCE):
    """libhdf5 can loop for ever on damaged text, deaf to signals: a process of its own reads it.

    More than `computing` seconds of a processor are such a loop, and raise OSError: intact text
    takes microseconds. Seconds of `waiting`, for a busy machine or a slow disk, are no damage."""
    line = [sys.executable, "-c", READ_TEXT, str(path), str(computing)]
    try:
        child = subprocess.run(line, capture_output=True, timeout=waiting)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{path}: its metadata was not read within {waiting:g} s, so this machine or its disk "
            "is very slow or busy; repeat the command later, or write the file as .npz"
        ) from None
    if child.returncode < 0:  # ended by the limit, or libhdf5 itself broke down
        raise OSError("its metadata cannot be read")


def _metadata(name, raw, act_dim) -> dict:
    """Keys of JSON text that are not null; those in METADATA are checked."""
    try:
        if isinstance(raw, np.ndarray):  # JSON as text, or as its bytes
            raw = raw.tobytes() if raw.dtype == np.uint8 else raw.item()
        meta = dict(json.loads("{}" if raw is None else raw).items())
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{name}: metadata is not a JSON object; write it with json.dumps") from e
    return _checked(name, meta, act_dim)


def _checked(name, meta, act_dim) -> dict:
    """The keys of `meta` that are not null. Raises InputError for a wrong value under METADATA."""
    meta = {k: x for k, x in meta.items() if x is not None}
    for key in [k for k in METADATA if k in meta]:
        x, want = meta[key], METADATA[key]
        many = "action" in key and isinstance(x, list) and len(x) == act_dim
        numbers = x if many else [x]  # below 1e30: finite in float32 too
        good = all(type(i) in (int, float) and abs(i) < 1e30 for i in numbers)
        if key == "env_id":
            good = isinstance(x, str)
        elif key == "env_kwargs":
            good = isinstance(x, dict)
        elif key == "max_episode_steps":
            good = good and x >= 1 and x % 1 == 0
        require(good, f"{name}: metadata {key} is {x!r:.60}, not {want}; correct it")
    return meta


def _read_columns(name, columns, raw, eval_env, task, d4rl):
    """Every check that needs no values comes before the first value is read."""
    ogbench = "masks" in columns or {"qpos", "qvel"} <= columns.keys()
    ogbench = ogbench and "timeouts" not in columns
    if ogbench and not {"rewards", "masks"} <= columns.keys():
        data = name.removesuffix(".npz").removesuffix("-val").removesuffix("-v0")
        data = data.removeprefix("visual-")  # the same tasks, with states instead of images
        known = data in table("ogbench_sets.csv")
        fix = f"use --env {data}-singletask-v0" if known else ""
        raise InputError(
            f"{name}: an OGBench file without rewards and masks states no task; "
            + (fix or "use the name of a task, such as --env cube-single-play-singletask-v0")
        )
    missing = [k for k in (*KEYS[:3], "terminals") if k not in columns]
    found = ", ".join(sorted(map(str, columns)))  # bytes, where HDF5's text is damaged
    require(not missing, f"{name}: no {', '.join(missing)} (found: {found:.200}); use D4RL's key "
             "names")  # fmt: skip
    n, s = (*columns["observations"].shape, 0, 0)[:2]
    wants = dict.fromkeys(("observations", "next_observations"), (n, s))
    wants |= dict.fromkeys(("rewards", "terminals", "timeouts", "masks"), (n,))
    wants |= {"actions": (n, None), "final_observations": (None, s)}
    wants = {k: want for k, want in wants.items() if k in columns}
    for key, want in wants.items():
        shape, dtype = columns[key].shape, columns[key].dtype
        require(dtype.kind in "fiub", f"{name}: {key} has dtype {dtype}; store floats")
        require(key != "actions" or dtype.kind == "f", f"{name}: actions are discrete ({dtype}); "
                 "only continuous actions (floats) are supported")  # fmt: skip
        require(len(shape) == len(want), f"{name}: {key} has shape {shape}, not {len(want)} axes; "
                 "reshape it")  # fmt: skip
        require(0 not in shape[1:], f"{name}: {key} has shape {shape}: no columns; store some")
        require(all(w in (None, x) for w, x in zip(want, shape, strict=True)), f"{name}: {key} has "
                 f"shape {shape}, observations has {(n, s)}; make them agree")  # fmt: skip
    require(n, f"{name}: the dataset is empty; use one with at least one transition")
    need = 4 * sum(math.prod(columns[k].shape) for k in wants)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > memory:
        raise MemoryError(f"{n} rows take {need >> 30} of {memory >> 30} GiB")
    meta = _metadata(name, raw, columns["actions"].shape[1])

    own = meta.get("env_id")
    if d4rl is None and eval_env != "none" and (eval_env or own):
        refs = (meta.get("ref_min_score"), meta.get("ref_max_score"))
        task = Task(eval_env) if eval_env else task_of_file(name, own, meta.get("env_kwargs"))
        task = task and build(task, own or eval_env, refs)
    low, high = (np.full(columns["actions"].shape[1], x, np.float32) for x in (-1, 1))
    if task and len(task.spaces.low) == len(low):
        low, high = task.spaces.low.copy(), task.spaces.high.copy()
    low[:], high[:] = meta.get("action_low", low), meta.get("action_high", high)
    if d4rl and task and task.id == "Ant-v4" and s == task.spaces.size + 84:
        task.pad, task.spaces.size = 84, s  # MuJoCo 2.0 recorded 84 contact forces, all zero
    if task:
        check_spaces(name, task, s, low, high)

    def fill(key, dtype=np.float32):
        out, i = np.empty(columns[key].shape, dtype), 0
        for part in columns[key].blocks:
            if dtype is bool and not np.isin(part, (0, 1)).all():
                row = i + np.flatnonzero(~np.isin(part, (0, 1)))[0]
                raise InputError(f"{name}: {key} row {row} is neither 0 nor 1; store only these")
            with np.errstate(over="ignore"):  # an overflow to inf is reported with its row later
                out[i : i + len(part)] = part
            i += len(part)
        return out

    obs, action, reward = (fill(k) for k in KEYS[:3])
    terminal, end = fill("masks" if ogbench else "terminals", bool), np.zeros(n, bool)
    if ogbench:  # a recording ends at its `terminals`, and runs on where its task is solved
        print(f"note: {name}: OGBench's terminals end recordings, its masks end the MDP")
        terminal, end = ~terminal, fill("terminals", bool)
        if "next_observations" not in columns:
            terminal[end], reward[end] = False, 0  # the last row is a state, no transition
    elif "timeouts" in columns:
        end = fill("timeouts", bool)
    elif "next_observations" not in columns:
        limit = (d4rl or meta).get("max_episode_steps") or (task.spaces.limit if task else None)
        limit, first = int(limit or n), 0
        for last in [*np.flatnonzero(terminal), n - 1]:
            end[first + limit - 1 : last : limit] = True
            first = last + 1
        print(f"note: {name}: no timeouts, so episodes end at terminals and after {limit} steps")
    if d4rl and d4rl["maze"]:  # v0's timeouts are out of step; an ant moves less than 1 m in one
        end[:-1] |= np.linalg.norm(obs[1:, :2] - obs[:-1, :2], axis=1) > 1
    end |= terminal & (not ogbench)
    stored, final = (fill(k) if k in columns else None for k in (KEYS[3], "final_observations"))
    kinds = [columns[k].dtype for k in ("observations", KEYS[3]) if k in columns]
    kinds = [np.dtype(np.float32), *(kind for kind in kinds if kind.kind == "f")]
    precision = max(kinds, key=lambda kind: np.finfo(kind).eps)
    next_obs, known = _link(name, obs, stored, precision, end, final)
    return Rows(obs, action, reward, next_obs, terminal, end, known, low, high, task)


def _read_d4rl(name, eval_env):
    """The task is built before anything is downloaded."""
    row, task, refs = find_row("d4rl_tasks.csv", name), None, reference_scores(name)
    if eval_env not in (None, "none"):
        task = Task(eval_env)
    elif eval_env is None and row["note"]:
        print(f"note: {name}: {row['note']}")
    if eval_env is None and row["env_id"]:
        task = Task(row["env_id"], d4rl_maze=bool(row["maze"]))
        task.kwargs = {"max_episode_steps": int(row["max_episode_steps"])}
        if row["maze"]:  # upside down: D4RL's y grows with the row, gymnasium-robotics' falls
            cells = [[int(c) if c in "01" else c for c in line] for line in row["maze"].split()]
            task.kwargs |= {"maze_map": cells[::-1], "continuing_task": False}
    task = task and build(task, row["env_id"], refs)
    return _read_file(_fetch(name), eval_env, task, row)


def _fetch(name) -> Path:
    """The file in D4RL's own cache."""
    row = table("d4rl_files.csv")[name]
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    target = folder / row["path"].split("/")[-1]
    mirrors = [m.rstrip("/") + end for m in os.environ.get("D4RL_MIRRORS", "").split()
               for end in ("/{path}", "/{file}")]  # fmt: skip
    urls = [m.format(path=row["path"], file=target.name) for m in [*mirrors, *D4RL_MIRRORS]]
    return download(name, target, urls, "D4RL_MIRRORS", row["sha256"])


def download(name, target, urls, variable, sha256="") -> Path:
    """`target`, from the first of `urls` that has it whole, once however many processes ask for it.
    Raises InputError, which names the environment variable that adds to the urls."""
    partial, failures = target.with_name(f"{target.name}.part"), []
    if target.is_file():
        return target
    with _lock(target.with_name(f".{target.name}.lock")):
        for url in urls:
            if target.is_file():  # another process was faster
                return target
            digest = hashlib.sha256()
            print(f"downloading {name} from {url}", flush=True)
            try:
                with urllib.request.urlopen(url, timeout=30) as source, open(partial, "wb") as out:
                    while block := source.read(1 << 20):
                        out.write(block)
                        digest.update(block)
                    size, due = out.tell(), source.headers.get("Content-Length") or out.tell()
                require(size == int(due), f"{size} of {due} bytes arrived")
                found = digest.hexdigest()
                require(sha256 in ("", found), f"its sha256 is {found}, not {sha256}")
                _try_open(partial, target.suffix)  # not an error page, nor a file cut short
                os.replace(partial, target)
                return target
            except (Exception, InputError) as e:  # noqa: BLE001 (whatever a network does)
                failures.append(f"{url} ({e})")
            finally:
                partial.unlink(missing_ok=True)
    raise InputError(f"cannot download {name}: {'; '.join(failures)}. Put the file at {target}, or "
                     f"set {variable} to a server or file:///folder that has it")  # fmt: skip


def _try_open(path, suffix):
    """Raises what the library raises for a file that is not whole."""
    import h5py

    (zipfile.ZipFile(path) if suffix == ".npz" else h5py.File(path, "r")).close()


@contextmanager
def _lock(path):
    """One process at a time; the system frees it even if the holder is killed. The last one
    removes the file: who finds it removed meanwhile starts again with a new one."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")  # noqa: SIM115 (closed below)
        except OSError as e:
            raise InputError(
                f"cannot write to {path.parent} ({e}); set D4RL_DATASET_DIR, "
                "OGBENCH_DATASET_DIR or MINARI_DATASETS_PATH to a writable folder"
            ) from e
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:  # one look: the file can vanish between two
                found = os.stat(path)
            except FileNotFoundError:
                continue
            if os.path.samestat(found, os.fstat(file.fileno())):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def _minari_root() -> Path:
    return Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()


def _local_minari() -> list[str]:
    root = _minari_root()
    try:
        found = [p for depth in range(1, 5) for p in root.glob("*/" * depth + "data/metadata.json")]
    except OSError:  # another user's
        found = []
    return sorted(p.parents[1].relative_to(root).as_posix() for p in found)


def _require_safe_minari(name):
    """Raises InputError where a local Minari dataset could run code or wait for ever when Minari
    opens it: without recorded spaces, Minari would make the task that the file names."""
    folder = _minari_root() / name / "data"
    again = f"delete {folder.parent} and get it again"
    try:
        _require_regular(folder / "metadata.json")
        meta = dict(json.loads((folder / "metadata.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        line = f"{folder}/metadata.json cannot be read ({e!s:.200}); {again}"
        raise InputError(line) from None
    missing = [k for k in ("observation_space", "action_space") if not meta.get(k)]
    names = " and no ".join(missing)
    require(not missing, f"{name}: its metadata.json has no {names}; record it again")
    main = folder / "main_data.hdf5"
    if meta.get("data_format") == "hdf5":
        import h5py

        _require_regular(main)
        try:
            with h5py.File(main, "r") as file:
                _require_own_content(main, file)
        except UNREADABLE as e:
            raise InputError(f"Minari dataset {name} is not complete ({e!s:.200}); {again}") from e


def _read_minari(name, remote, eval_env):
    """As _read_file. Episodes keep their last observation, so no row is ever dropped."""
    place = _minari_root() / name
    local = near(name, _local_minari()) if remote else ""
    again = f"delete {place} and get it again"
    try:
        import minari

        if remote:
            print(f"{name} is not in {_minari_root()}{local}: asking Minari's server", flush=True)
            with _lock(_minari_root() / f".{name.replace('/', '-')}.lock"):
                minari.download_dataset(name)
        _require_safe_minari(name)
        dataset = minari.load_dataset(name)
    except ImportError as e:
        raise InputError(f"{name} needs more of Minari ({e}): pip install 'minari[hdf5,hf]'") from e
    except Exception as e:  # whatever the server, the network or the file raises
        raise InputError(
            f"Minari cannot load {name} ({e!s:.300}); "
            + (f"correct the id{local}, or put the dataset into {place}" if remote else again)
        ) from e
    try:
        return _read_episodes(name, dataset, eval_env)
    except (*UNREADABLE, AttributeError, IndexError, TypeError) as e:
        raise InputError(f"Minari dataset {name} is not complete ({e!s:.200}); {again}") from e


def _read_episodes(name, dataset, eval_env):
    """What _read_minari returns, of an open Minari dataset."""
    space, recorded = dataset.action_space, dataset.env_spec
    require(hasattr(space, "low"), f"{name}: actions are {space}; only Box is supported")
    task = Task(eval_env) if eval_env not in (None, "none") else None
    if eval_env is None and recorded:
        spec = getattr(dataset, "_eval_env_spec", None) or recorded
        limit = spec.max_episode_steps
        task = task_of_file(name, spec.id, spec.kwargs, limit, spec.additional_wrappers)
    elif eval_env is None:
        print(f"note: {name} records no task, training without evaluation; --eval-env names one")
    meta = dataset.storage.metadata
    meta = _checked(name, {k: meta.get(k) for k in ("ref_min_score", "ref_max_score")}, 0)
    refs = [meta.get(k) for k in ("ref_min_score", "ref_max_score")]
    task = task and build(task, recorded.id if recorded else task.id, refs)
    n, i, arrays = dataset.total_steps, 0, None
    low, high = (np.array(x, np.float32).reshape(-1) for x in (space.low, space.high))
    # As in D4RL, reaching the goal ends an ant maze's MDP; Minari's were recorded beyond it.
    goal_ends = recorded is not None and recorded.id.startswith("AntMaze") and sparse(recorded)
    for episode in dataset.iterate_episodes():
        t, parts = len(episode.rewards), leaves(episode.observations)
        if {len(x) - 1 for x in parts} | {len(episode.actions)} != {t} or i + t > n:
            raise InputError(f"{name}: episode {episode.id} has {t} rewards but another number of "
                             "actions or of observations less one; record it again")  # fmt: skip
        parts = [np.asarray(x).reshape(t + 1, -1) for x in parts]
        s, rows = sum(x.shape[1] for x in parts), slice(i, i + t)
        if arrays is None:
            if task:
                check_spaces(name, task, s, low, high)
            arrays = [np.empty((n, *w), np.float32) for w in ((s,), (len(low),), (), (s,))]
            obs, action, reward, next_obs = arrays
            terminal, end = np.zeros(n, bool), np.zeros(n, bool)
        np.concatenate([x[:-1] for x in parts], 1, obs[rows], casting="same_kind")
        np.concatenate([x[1:] for x in parts], 1, next_obs[rows], casting="same_kind")
        action[rows], reward[rows] = np.asarray(episode.actions).reshape(t, -1), episode.rewards
        terminal[rows] = np.asarray(episode.terminations, bool) | (goal_ends & (reward[rows] > 0))
        end[rows] = terminal[rows] | (np.arange(t) == t - 1)
        i += t
    require(n and i == n, f"{name}: {i} steps, its metadata says {n}; download or record it again")
    return Rows(*arrays, terminal, end, np.ones(n, bool), low, high, task)
