"""Files with D4RL's key names, checked before a value is used: a name of this folder's forms, or a
path, becomes arrays in the README's format.

    logs.hdf5, logs.npz        arrays with D4RL's key names, or saved from an OGBench singletask

A transition bootstraps through a time limit, never through a terminal; its next observation never
comes from another episode. Where the next observation is not known (time limit, cut, end of file),
a row holds NaN, and a note says how many do. Stored next_observations are believed: where they
differ from the next row, an episode was cut; where they equal it at a time limit, they are the next
episode's first observation, so unknown, as a row of NaN is. Two observations differ where a number
does by more than a millionth of its column's deviation and the rounding of the file's floats, so
that units change nothing. Nothing is normalized or clipped, and nothing is ever unpickled.

File keys: observations (N, S), actions (N, A), rewards (N,), terminals (N,); optional timeouts,
next_observations, final_observations (E, S: the true last observation of each episode, in order),
metadata (JSON text: env_id, env_kwargs, ref_min_score, ref_max_score, max_episode_steps,
action_low, action_high), and step and episode (N,), whole numbers: where step does not go on as
before, or episode changes, an episode was cut. `valids`, as in OGBench's compact files, is 0 in the
last row of each recording, which is a state and no transition.

A file can come from anybody, so nothing that it names is run: its pickles are not loaded, its task
is made only if its id is a registered one, and an HDF5 file that refers to other files is refused.
"""

import errno
import json
import math
import os
import re
import stat
import subprocess
import sys
import zipfile
import zlib
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from common import InputError, recorded
from harness.tasks import choose, complete, near, require, table

KEYS = ("observations", "actions", "rewards", "next_observations")
UNREADABLE = (OSError, EOFError, LookupError, OverflowError, RuntimeError, TypeError, ValueError)
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
ANY = "1 or more"  # in a shape
SAME = 1e-6  # of a column's deviation: so near is the next row to stored next_observations
ROWS = 1 << 16  # rows compared at a time, which bounds memory
HEADER, TEXT = 10_000, 1 << 20  # bytes of an array's header in an .npz, and of metadata
TEXT_SECONDS, TEXT_PATIENCE = 10, 600  # for metadata: of computing, of waiting


def read_file(path, eval_env, task=None, d4rl=None, derive=None) -> tuple[dict, dict]:
    """(arrays, metadata) of a file. task: the evaluation task where it is known already; d4rl: a
    row of d4rl_tasks.csv; derive(columns): columns that follow from those of the file."""
    kind = path.suffix[1:].lower()
    require_regular(path)
    try:
        with open_columns(path) as (columns, raw):
            columns |= derive(columns) if derive else {}
            return read_columns(path.name, columns, raw, eval_env, task, d4rl)
    except UNREADABLE as e:
        require(
            is_damage(e),
            f"{path} cannot be read now ({e!s:.200}); close other programs that use it, or repeat "
            "the command later",
        )
        magic = b"PK" if kind == "npz" else b"\x89HDF"
        with path.open("rb") as file:
            begun = magic.startswith(file.read(len(magic)))
        own = not (d4rl or derive)  # what was downloaded can only be damaged
        require(begun or not own, f"{path} is not an {kind} file; README shows how to make one")
        raise InputError(
            f"{path} is not a complete {kind} file ({e!s:.200}); delete it and download or write "
            "it again"
        ) from e


def is_damage(error) -> bool:
    """Whether the file itself is at fault; not its disk, or a program that has it open."""
    number = getattr(error, "errno", None)
    of_damage = number in (None, 0, errno.EINVAL, errno.ENOENT)
    return of_damage and "already open" not in str(error)


def require_regular(path):
    """Raises InputError where there is no ordinary file; nothing waits for a pipe's writer."""
    try:
        mode = path.stat().st_mode
        require(
            stat.S_ISREG(mode), f"{path} is a folder, a pipe or a device; use the path of a file"
        )
        path.open("rb").close()
    except PermissionError:
        raise InputError(f"{path} may not be read; chmod it or ask its owner") from None
    except (OSError, ValueError):
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        hint = near(path.name, names)
        raise InputError(f"no file {path!s:.300}; correct the path{hint}") from None


@contextmanager
def open_hdf5(path):
    """An open HDF5 file. Raises InputError where it refers to other files: it could read any of
    them into the data."""
    import h5py
    from h5py import h5d, h5l, h5o

    def is_outside(name, link):
        return None if link.type in (h5l.TYPE_HARD, h5l.TYPE_SOFT) else name

    def is_stored_outside(name):
        item = h5o.open(file.id, name)
        if not isinstance(item, h5d.DatasetID):
            return None
        how = item.get_create_plist()
        return name if how.get_external_count() or how.get_layout() == h5d.VIRTUAL else None

    require_regular(path)
    with h5py.File(path, "r") as file:
        name = file.id.links.visit(is_outside, info=True) or h5o.visit(file.id, is_stored_outside)
        require(
            name is None,
            f"{path}: {(name or b'').decode(errors='replace'):.60} refers to another file, which "
            "is not followed; copy the values into this file",
        )
        yield file


@contextmanager
def open_columns(path):
    """(columns, raw metadata) of the top-level arrays; a column has shape, dtype and read()."""
    import h5py

    if path.suffix.lower() == ".npz":
        with np.lib.npyio.NpzFile(path, allow_pickle=False) as file:
            keys = [x[:-4] for x in file.zip.namelist() if x.endswith(".npy")]
            columns = {key: npz_column(file, key) for key in keys}
            meta = columns.pop("metadata", None)  # a pickled one is no text
            require_short(path, meta)
            yield columns, "" if meta and meta.dtype.hasobject else meta and meta.read()
    else:
        with open_hdf5(path) as file:
            require("episode_0" not in file, f"{path} is a Minari file; use its Minari id")
            columns = {k: hdf5_column(x) for k, x in file.items() if isinstance(x, h5py.Dataset)}
            has_text = columns.pop("metadata", None)  # in D4RL's own files it is a group
            require_short(path, has_text)
            if has_text or "metadata" in file.attrs:
                try_text(path)
            yield columns, file["metadata"][()] if has_text else file.attrs.get("metadata")


def require_short(path, meta):
    """Raises InputError for metadata that are too large, before they are unpacked."""
    size = math.prod(meta.shape) * meta.dtype.itemsize if meta else 0
    require(size <= TEXT, f"{path}: metadata takes {size} bytes; store at most {TEXT}")


def npz_column(file, key):
    """What its header says of an array, and how it is read."""
    name = f"{key}.npy"
    with file.zip.open(name) as f:
        start = f.read(12)  # of version 1, the length of the header takes two bytes, else four
        length = int.from_bytes(start[8 : 10 if start[6:7] == b"\1" else 12], "little")
        if length > HEADER:
            raise ValueError(f"the header of {key} takes {length} bytes")
        f.seek(0)
        major, _ = np.lib.format.read_magic(f)
        shape, _, dtype = vars(np.lib.format)[f"read_array_header_{min(major, 2)}_0"](f)
    read = lambda: file[name]
    return SimpleNamespace(shape=shape, dtype=dtype, read=read, stored=read)


def hdf5_column(x):
    """Floats of another width are converted by HDF5 itself, chunk by chunk."""
    read = lambda: (x.astype(np.float32) if x.dtype.kind == "f" else x)[()]
    return SimpleNamespace(shape=x.shape or (), dtype=x.dtype, read=read, stored=lambda: x)


READ_TEXT = """
import h5py, sys, time
limit = int(time.process_time()) + int(sys.argv[2])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
except ImportError:
    pass
file = h5py.File(sys.argv[1])
file.attrs.get("metadata") or file["metadata"][()]
"""


def try_text(path, computing=TEXT_SECONDS, waiting=TEXT_PATIENCE):
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


def metadata_of(name, raw, act_dim) -> dict:
    """Keys of JSON text that are not null; those in METADATA are checked."""
    try:
        if isinstance(raw, np.ndarray):  # JSON as text, or as its bytes
            raw = raw.tobytes() if raw.dtype == np.uint8 else raw.item()
        meta = dict(json.loads("{}" if raw is None else raw).items())
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{name}: metadata is not a JSON object; write it with json.dumps") from e
    return check_metadata(name, meta, act_dim)


def check_metadata(name, meta, act_dim) -> dict:
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
    low, high = meta.get("ref_min_score", -math.inf), meta.get("ref_max_score", math.inf)
    line = f"{name}: ref_min_score {low} is not below ref_max_score {high}; correct the metadata"
    require(low < high, line)
    return meta


def check_columns(name, columns):
    """Raises InputError for a name, type, shape or size that does not fit; reads no value."""
    if is_ogbench(columns) and not {"rewards", "masks"} <= columns.keys():
        data = re.sub(r"^visual-|(-v0)?(-val)?\.npz$", "", name)
        example = data if data in table("ogbench_sets.csv") else "cube-single-play"
        raise InputError(
            f"{name}: an OGBench file without rewards and masks states no task; "
            f"use --env {example}-singletask-v0 or the name of another task"
        )
    missing = [key for key in (*KEYS[:3], "terminals") if key not in columns]
    found = ", ".join(sorted(map(str, columns)))  # bytes, where HDF5's text is damaged
    require(
        not missing, f"{name}: no {', '.join(missing)} (found: {found:.200}); use D4RL's key names"
    )
    n, s = (*columns["observations"].shape, 0, 0)[:2]
    require(n, f"{name}: the dataset is empty; use one with at least one transition")
    wants = dict.fromkeys(("observations", "next_observations"), (n, s or ANY))
    wants |= dict.fromkeys(("rewards", "terminals", "timeouts", "masks", "valids"), (n,))
    wants |= {"actions": (n, ANY), "final_observations": (ANY, s or ANY)}
    wants = {key: want for key, want in wants.items() if key in columns}
    for key, want in wants.items():
        shape, dtype = columns[key].shape, columns[key].dtype
        line = "; only continuous actions are supported" if key == "actions" else ""
        kinds = "f" if line else "fiub"
        require(dtype.kind in kinds, f"{name}: {key} has dtype {dtype}; store floats{line}")
        fits = len(shape) == len(want) and 0 not in shape
        fits = fits and all(x in (ANY, size) for x, size in zip(want, shape, strict=True))
        require(
            fits,
            f"{name}: {key} has shape {shape}, not {want}; reshape it, or make the columns agree",
        )
    need = 4 * sum(math.prod(columns[key].shape) for key in wants)
    sysconf = getattr(os, "sysconf", lambda _: 1 << 30)  # Windows has none
    memory = sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES")
    if need > memory:
        raise MemoryError(f"{n} rows take {need >> 30} of {memory >> 30} GiB")


def is_ogbench(columns) -> bool:
    """Whether `terminals` are the ends of recordings, as OGBench's are."""
    own = "masks" in columns or "valids" in columns or {"qpos", "qvel"} <= columns.keys()
    return own and "timeouts" not in columns


def read_columns(name, columns, raw, eval_env, task, d4rl):
    """(arrays, metadata). Every check that needs no values comes before the first value is read."""
    check_columns(name, columns)
    size, count = (columns[key].shape[1] for key in KEYS[:2])
    meta = metadata_of(name, raw, count)
    task = task or choose(name, eval_env, meta)
    found = complete(name, task, meta, size, count)

    def numbers(key):
        x, kind = columns[key].read(), columns[key].dtype
        if key in KEYS[:3] and not np.can_cast(kind, np.float32):
            tell_of_rounding(name, key, x if x.dtype == kind else columns[key].stored())
        with np.errstate(over="ignore"):  # an overflow to inf is reported with its row later
            return x.astype(np.float32, copy=False)

    def flags(key):
        x = columns[key].read()
        for row in np.flatnonzero((x != 0) & (x != 1))[:1]:
            raise InputError(f"{name}: {key} row {row} is neither 0 nor 1; store only these")
        return x.astype(bool)

    obs, action, reward = map(numbers, KEYS[:3])
    terminal = flags("terminals")
    end = ~flags("valids") if "valids" in columns else terminal.copy()
    if is_ogbench(columns):  # a recording runs on where its task is solved
        print(f"note: {name}: OGBench's terminals end recordings, its masks end the MDP")
        terminal = ~flags("masks")
        if "next_observations" not in columns:
            terminal[end], reward[end] = False, 0  # the last row is a state, no transition
    elif "timeouts" in columns:
        end |= flags("timeouts")
    counts = whole_numbers(columns, len(end))
    cut, episode = (x.numpy() for x in recorded(counts, *map(torch.as_tensor, (end, terminal))))
    if (cut & ~end)[:-1].any():
        more = (cut & ~end)[:-1].sum()
        print(f"note: {name}: {more} cuts that no flag marks, by {' and '.join(counts)}")
    end |= cut
    if not is_ogbench(columns) and not {"timeouts", "next_observations"} & columns.keys():
        limit = (d4rl or meta).get("max_episode_steps") or (task and task.spaces.limit)
        limit, first = int(limit or len(end)), 0
        for last in [*np.flatnonzero(end), len(end) - 1]:
            end[first + limit - 1 : last : limit] = True
            first = last + 1
        if not counts:
            ends = f"terminals and after {limit} steps"
            print(f"note: {name}: no timeouts, so episodes end at {ends}")
    if d4rl and d4rl["maze"]:  # v0's timeouts are out of step; an ant moves less than 1 m in one
        end[:-1] |= np.linalg.norm(obs[1:, :2] - obs[:-1, :2], axis=1) > 1
    end[-1] = True
    if "next_observations" in columns:
        kinds = [columns[key].dtype for key in ("observations", "next_observations")]
        kinds = [np.dtype(np.float32), *(kind for kind in kinds if kind.kind == "f")]
        precision = max(kinds, key=lambda kind: np.finfo(kind).eps)
        next_obs = link(name, obs, numbers("next_observations"), precision, end)
    else:
        next_obs = np.roll(obs, -1, axis=0)
        next_obs[end] = np.nan
        if "final_observations" in columns:
            final = numbers("final_observations")
            require(
                len(final) == end.sum(),
                f"{name}: {len(final)} final_observations, but the flags mark {end.sum()} "
                "episodes; store one for each",
            )
            next_obs[end] = final
    arrays = dict(zip(KEYS, (obs, action, reward, next_obs), strict=True))
    arrays |= {"terminals": terminal, "ends": end} | ({"episode": episode} if counts else {})
    return arrays, found


def whole_numbers(columns, n) -> dict:
    """The columns `step` and `episode` (n,) that a file has, if they are whole numbers."""
    found = {}
    for key in [key for key in ("step", "episode") if key in columns]:
        shape, dtype = columns[key].shape, columns[key].dtype
        if math.prod(shape) == n and dtype.kind in "iuf":
            found[key] = torch.as_tensor(columns[key].stored()[()].astype(np.float64)).flatten()
    return {key: x for key, x in found.items() if torch.equal(x, x.round())}


def tell_of_rounding(name, key, stored):
    """Print a note for columns that change from row to row by less than a float32 of their size can
    hold, and yet go somewhere: noise at rest does not, and is no loss. Nor is anything lost that
    is below 1e-5 of what the column moves in 100 rows. The first ROWS rows of `stored` show it."""
    x, lost = stored[:ROWS].astype(np.float64), []
    x = x.reshape(len(x), -1)
    for j in range(x.shape[1]):
        column = x[:, j]
        with np.errstate(all="ignore"):
            unit = np.spacing(np.float32(np.abs(column).max()))
            steps = [np.abs(column[k:] - column[:-k]) for k in (1, min(100, len(x) // 2 + 1))]
        near, far = (x[x > 0] for x in steps)
        if len(near) and len(far):
            little, much = np.quantile(far, [0.25, 0.9])
            if np.median(near) < min(4 * unit, little / 3) and much < 1e5 * unit:
                lost.append(str(j))
    if lost:
        print(
            f"note: {name}: training is in float32, which is too coarse for {key} column "
            f"{', '.join(lost[:5])}; subtract a constant from it, or leave it out"
        )


def link(name, obs, stored, precision, end):
    """Stored next observations (N, S) of rows in time order, NaN where nobody knows; `end` (N,)
    gains the cuts found. precision: the float type to which the file rounded either of them."""
    cuts = 0
    with np.errstate(all="ignore"):  # what is not finite is refused later, with its row
        tolerance = SAME * torch.from_numpy(obs).std(0, correction=0).numpy()  # (S,)
        for i in range(0, len(obs) - 1, ROWS):
            part, rows = obs[1:][i : i + ROWS], slice(i, min(i + ROWS, len(obs) - 1))
            # Each was rounded by half a unit, and below a power of 2 a unit is half as large.
            rounding = 2 * np.spacing(np.abs(part).astype(precision))
            same = (np.abs(part - stored[rows]) <= tolerance + rounding).all(1)
            cuts += (~same & ~end[rows]).sum()
            stored[rows][same & end[rows]] = np.nan
            end[rows] |= ~same
    if cuts:
        line = f"note: {name}: next_observations show {cuts} episode cuts that nothing marks"
        print(f"{line}, so the data's return is that of parts of episodes")
    return stored
