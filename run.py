"""A run, from its command to its score, told in the order in which it happens: flags, data, task,
evaluation, training, checkpoints.

An algorithm file, common.py, this file and a dataset, alone in a folder, are the whole program.
This file has every number that no paper decides: which rows of the data are kept, the random
seeds, the start states of the evaluation, and the score. The folder readers/ adds the names of
public data.

{out}/{env}__{algorithm}[-{name}]__{seed}/
    train.csv, eval.csv, ...    rows of numbers; TensorBoard events hold the same
    config.json                 command, arguments, versions, hashes of code and data
    checkpoint.pt               what --resume needs; kept-*.pt are parts of a long table
    summary.json, curve.png     the score, once the run is finished
"""

import contextlib
import csv
import ctypes
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import signal
import sys
import time
import zipfile
import zlib
from fnmatch import fnmatchcase
from pathlib import Path

import filelock
import gymnasium
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import Data, InputError, require

HERE = Path(__file__).resolve().parent
FILES = r"\.(npz|hdf5|h5)$"  # the names of files, to which no preset applies
# The columns of a file: N rows, S numbers in an observation, A in an action, E episodes.
SHAPES = {"observations": "NS", "actions": "NA", "rewards": "N", "terminals": "N"}
SHAPES |= {"timeouts": "N", "ends": "N", "next_observations": "NS", "final_observations": "ES"}
LONGEST = 20_000  # steps in which an episode must end, where its task has no time limit
# Flags that may differ between a run and its continuation. Of them, only device changes numbers.
CONTROL = "device log_every save_every out resume overwrite track clone".split()
PACKAGES = "torch numpy gymnasium mujoco gymnasium-robotics ogbench".split()
STATE = "settings phase step steps last rows references seconds".split()  # of a checkpoint


@contextlib.contextmanager
def in_one_line(what, fix: str):
    """Turn what a damaged file or a wrong value raises into an InputError."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error!s:.300}".split())
        raise InputError(f"{what} cannot be used ({cause}): {fix}") from error


# ---- flags -----------------------------------------------------------------------------------


def preset_of(presets: dict, env: str) -> dict:
    """The fields that the rows of `presets`, {pattern: {field: value}}, set for a name of --env;
    later rows win. Rows with "singletask" are for OGBench's tasks alone. Data that were made in the
    manner of a D4RL name, NAME-made, have its settings; files have none."""
    preset, env = {}, env.removesuffix("-made")
    for pattern, fields in presets.items():
        alike = ("singletask" in env) == ("singletask" in pattern)
        if alike and fnmatchcase(env, pattern) and not re.search(FILES, env, re.I):
            preset |= fields
    return preset


def parse(Args, presets: dict, argv):
    """Words of a command line -> (args, preset in force). A preset changes defaults, so a typed
    flag wins. With --short, the rows whose pattern begins with "short " follow. Where --steps is
    typed, an earlier phase whose own flag is not typed is at most as long. --help shows the title,
    the idea and the command of the file. What tyro refuses ends the process with status 1."""
    pairs = re.findall(r"\0--([\w-]+)(?=[=\0]?([^\0]*))", "\0".join(["", *argv]))
    typed = {name.replace("-", "_"): after for name, after in pairs}
    env = typed.get("env", Args.env)
    preset = preset_of(presets, env)
    if "short" in typed:
        preset |= preset_of(presets, f"short {env}")
    told = (sys.modules[Args.__module__].__doc__ or "").split("\n\n")
    text = "\n\n".join([*told[:2], told[-1]])
    try:
        args = tyro.cli(Args, args=argv, default=Args(**preset), description=text)
    except SystemExit as left:
        raise SystemExit(1 if left.code else 0) from None
    if "steps" in typed:
        for name in {*Args.phases.values()} - {"steps", None, *typed}:
            setattr(args, name, min(getattr(args, name), args.steps))
    useless = [name for name in args.clone_flags if name in typed and args.clone]
    require(not useless, f"--clone reads a clone, and {useless} train one: use one of them")
    args.resolve()
    return args, {name: x for name, x in preset.items() if getattr(args, name) == x}


def prepare_device(name: str, precision: str) -> torch.device:
    """Resolve "auto" to cuda where there is one, else cpu, and set how fp32 products are computed.
    Raises InputError for a device that cannot be used."""
    # Adam's moments of unused units decay into subnormals, with which a CPU is ten times as slow.
    # This comes before the first parallel product, because threads inherit it when they start.
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision(precision)
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where there is no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: reuse freed buffers without page faults
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with in_one_line(f"--device {name}", "use cpu, cuda or auto"):
        return torch.zeros(1, device=name).device


# ---- a name becomes rows and a task ----------------------------------------------------------


def load(name: str, device="cpu", eval_env: str | None = None):
    """A dataset's name -> (Data, metadata of its task, or None without one). The task is made once
    here, before any time is spent. Raises InputError."""
    with in_one_line(name, "replace or correct the file, or use another --eval-env or none"):
        columns, meta = read(name, eval_env)
        meta = chosen({key: x for key, x in meta.items() if x is not None}, eval_env)
        score(meta, [0])  # raises for references that are no numbers
        if meta.get("env_id", "none") == "none":
            return rows(columns, meta, name, device), None
        env = make(meta)
        space, first = env.action_space, flat(env.reset(seed=0)[0])
        require(space.dtype.kind == "f", f"the actions of {meta['env_id']} are {space}, not floats")
        low, high = space.low, space.high
        limit = env.spec and env.spec.max_episode_steps
        defaults = {"action_low": low, "action_high": high, "max_episode_steps": limit}
        data = rows(columns, defaults | meta, name, device)
        own = [first.size, *low.tolist(), *high.tolist()]
        found = [data.obs.shape[1], *data.action_low.tolist(), *data.action_high.tolist()]
        require(
            len(found) == len(own) and np.allclose(found, own),
            f"{name} is not of the task {meta['env_id']}: their (observation size, action bounds) "
            f"are {found} and {own}",
        )
        return data, meta


def read(name, eval_env):
    """A dataset's name -> raw columns and metadata. Files of numpy (.npz) are read here, all else
    by readers/. Nothing that a file names is run: no pickle, and no task with a colon in it
    (module:name)."""
    places = HERE / "data" / f"{name}.npz", HERE / f"{name}.npz", Path(name)
    path = next((x for x in places if x.is_file()), None)
    if not path or path.suffix != ".npz":
        public = (HERE / "readers").is_dir() and name[-4:] != ".npz"
        needs = "a copy without the folder readers/ reads .npz files alone"
        require(public, f"there is no file {name}; {needs}")
        return importlib.import_module("readers").read(name, eval_env)
    with np.load(path, allow_pickle=False) as file:
        np.empty(sum(x.file_size for x in file.zip.infolist()), bool)  # MemoryError, if too large
        columns = {key: file[key] for key in file}
    meta = json.loads(str(columns.pop("metadata", "{}")))
    if {"masks", "valids"} & columns.keys():
        columns = importlib.import_module("readers.ogbench").columns_of(columns)
    return columns, meta


def chosen(meta, eval_env):
    """Metadata of the task in force: the data's own, or `eval_env`, for which the references hold
    if it is another version of the same task."""
    own = meta.get("env_id", eval_env or "")
    if eval_env:
        changed = ["env_kwargs", "make", "success", "most_envs", "data_score", "robot"]
        if eval_env.split("-")[0] != own.split("-")[0]:
            changed += ["ref_min_score", "ref_max_score"]
        meta = {key: x for key, x in meta.items() if key not in changed} | {"env_id": eval_env}
    recorded = json.dumps([own, meta.get("env_kwargs")], separators=",=")
    require(eval_env or ":" not in recorded, "a recorded task has a colon: use --eval-env")
    if "env_id" not in meta or not (HERE / "readers").is_dir():
        return meta
    tasks = importlib.import_module("readers.tasks")
    return tasks.task_of(meta["env_id"], meta.get("env_kwargs", {})) | meta


def rows(columns: dict, meta: dict, name: str, device) -> Data:
    """Raw columns in the README's format -> transitions. This is the only place where rows are
    checked, and where it is decided which of them are kept, whatever their source.

    A row bootstraps through a time limit and never through a terminal. Its next observation is that
    of the next row, unless an episode ended between them: at a flag, where `step` or `episode` do
    not go on as before, where stored next observations are not the next row's, or, in a file that
    has neither them nor timeouts, at the task's time limit. A row whose next observation nobody
    knows is dropped, unless the MDP ended there; no other row is. Raises InputError."""
    check_columns(columns, name)
    obs, action, reward = (np.float32(columns[key]) for key in list(SHAPES)[:3])
    terminal, end, hole = ends(columns, meta.get("max_episode_steps"))
    if "next_observations" in columns:
        next_obs = believed(columns, obs, end)
    else:
        next_obs = np.roll(obs, -1, axis=0)
        final = columns.get("final_observations", np.full_like(obs[end], np.nan))
        require(len(final) == end.sum(), f"{name} has {end.sum()} final_observations to store")
        next_obs[end] = final
    unknown = np.isnan(next_obs).all(1)
    next_obs[unknown] = obs[unknown]  # at a terminal it is weighted 0, but must be finite
    low, high = meta.get("action_low", -1), meta.get("action_high", 1)
    low, high = (np.broadcast_to(np.float32(x), action.shape[1:]) for x in (low, high))
    excess = np.maximum(low - action, action - high) / (high - low)
    good = np.isfinite(obs).all(1) & np.isfinite(reward) & np.isfinite(next_obs).all(1)
    good &= (excess <= 1e-5).all(1) & (low < high).all()  # NaN is no such number
    bad = f"a number that is not finite, or an action beyond the bounds {low} to {high}"
    require(good.all(), f"{name}: row {good.argmin()} has {bad} of its metadata or its task")
    action = np.clip(action, low, high)
    if (low != -1).any() or (high != 1).any():
        action = (action - low) / (high - low) * 2 - 1
    keep = terminal | ~unknown
    require(keep.any(), f"{name}: no row has a next observation; store next_observations")
    note((~keep).sum(), f"of {len(keep):,} rows lack a next observation and are dropped")
    begun = end & ~hole  # a part of an episode has the return of the whole
    recording = np.cumsum(begun) - begun
    returns = np.bincount(recording, reward)[recording[end]]
    left, episode = np.unique((np.cumsum(end) - end)[keep], return_inverse=True)
    arrays = [x[keep] for x in (obs, action, reward, next_obs, np.float32(terminal))]
    arrays += [episode, np.float32(returns[left]), low.copy(), high.copy()]
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(x)
    arrays.append(np.unique(recording[keep], return_inverse=True)[1])
    doubt(columns, meta)
    *tensors, recording = (torch.as_tensor(x, device=device) for x in arrays)
    named = dict(name=name, digest=digest.hexdigest()[:16], columns=meta.get("columns"))
    return Data(*tensors, recording=recording, **named)


def note(count, text):
    """Print what happens to some rows of the data."""
    if count:
        print(f"note: {count:,} {text}")


def doubt(columns, meta):
    """Say what looks like a mistake in the data, where readers/ is there to look."""
    found = ["without the folder readers/, nothing is said of likely mistakes in the data"]
    if (HERE / "readers").is_dir():
        found = importlib.import_module("readers.notes").notes(columns, meta)
    for line in found:
        print(f"note: {line}")


def check_columns(columns, name):
    """Raises InputError for a column that is absent, or whose type or shape is not the format's."""
    sizes = {}
    for key, letters in SHAPES.items():
        x = columns.get(key, np.zeros(0))
        fits = len(letters) == x.ndim and x.size and x.dtype.kind in "fiub"
        fits = fits and all(sizes.setdefault(*pair) == pair[1] for pair in zip(letters, x.shape))
        fits = fits and (key != "actions" or x.dtype.kind == "f")
        fits = fits or (key not in columns and key not in list(SHAPES)[:4])
        found = f"{x.dtype} {x.shape}" if key in columns else "nothing"
        require(fits, f"{name}: {key} is {found}, not floats ({', '.join(letters)}); see data/")
        flags = key not in ("terminals", "timeouts", "ends") or np.isin(x, (0, 1)).all()
        require(flags, f"{name}: {key} has a value that is neither 0 nor 1")


def ends(columns, limit):
    """Three bool columns (N,): where the MDP ended (terminal), the last row of each episode, and
    the holes: those of the last rows after which the recording goes on."""
    terminal = columns["terminals"] != 0
    flagged = columns.get("ends", terminal | (columns.get("timeouts", terminal) != 0)) != 0
    cut, hole = np.zeros((2, len(terminal)), bool)
    for key in ("step", "episode"):  # whole numbers, where the file has them and they count
        x = np.ravel(columns.get(key, 0))
        if len(x) == len(terminal) and not (x % 1).any() and len(np.unique(x)) > 1:
            rise = np.diff(x.astype(np.int64), append=np.int64(x[-1]))
            if key == "step":  # it rises by its smallest rise inside an episode
                cut = rise != rise[rise > 0].min(initial=1 << 40)
                hole = cut & (rise > 0) & ~flagged
            else:
                cut, hole = cut | (rise != 0), ~terminal & (rise == 0)
    note((cut & ~flagged)[:-1].sum(), "episodes end by step or episode where no flag says so")
    end = flagged | cut
    end[-1] = True
    if limit and not {"timeouts", "ends", "next_observations"} & columns.keys():
        row = np.arange(len(end))
        first = np.maximum.accumulate(np.where(np.append(True, end[:-1]), row, 0))
        end |= (row - first) % limit == limit - 1
    return terminal, end, hole


def believed(columns, obs, end):
    """The stored next observations (N, S), NaN where nobody knows; `end` (N,) gains the cuts that
    they show. Where they differ from the next row, an episode was cut; where they equal it at an
    end, they are the next episode's first observation, so unknown. Two numbers differ by more than
    a millionth of their column's deviation and the rounding of float32."""
    stored = np.array(columns["next_observations"], np.float32)
    same = np.ones(len(obs) - 1, bool)
    for x, following in zip(obs.T, stored.T):
        rounding = 1e-6 * x.std(dtype=float) + 2 * np.spacing(abs(x[1:]))
        same &= abs(x[1:] - following[:-1]) <= rounding
    note((~same & ~end[:-1]).sum(), "episodes end by next_observations where no flag says so")
    stored[:-1][same & end[:-1]] = np.nan
    end[:-1] |= ~same
    return stored


def make(task: dict):
    """A fresh environment of a task; a reader may bring a function that makes them."""
    if "make" in task:
        return task["make"]()
    if "-v" in task["env_id"] and task["env_id"] not in gymnasium.registry:
        importlib.import_module("gymnasium_robotics")  # which registers its tasks
    return gymnasium.make(task["env_id"], **task.get("env_kwargs", {}))


def score(task: dict, returns) -> float:
    """The score of raw episode returns. Where the task ends at its goal, it is 100 x the share of
    returns above 0; otherwise 100 x their mean position between the reference returns of a random
    policy (0) and an expert (1), or, without such references, their mean. Raises InputError for
    returns that no score can have."""
    low, high = task.get("ref_min_score"), task.get("ref_max_score")
    reaches_goal = task.get("env_kwargs", {}).get("continuing_task") is False
    returns = np.asarray(returns, np.float64)
    if task.get("success", reaches_goal):
        found = 100 * np.mean(returns > 0)
    elif None in (low, high):
        found = returns.mean()
    else:
        found = 100 * np.mean((returns - low) / (high - low))
    usable = abs(returns).max() < 1e30 and np.isfinite(found)
    require(usable, f"no score: the returns are {returns}, their references {low} and {high}")
    return float(found)


# ---- evaluation ------------------------------------------------------------------------------


def flat(obs):
    """An observation as one row of numbers, a dictionary's in the order of its sorted keys."""
    if not isinstance(obs, dict):
        return np.asarray(obs, np.float32).ravel()
    return np.concatenate([flat(obs[key]) for key in sorted(obs)])


@torch.no_grad()
def evaluate(act, envs: list, seed: int, device, episodes: int | None = None) -> np.ndarray:
    """Undiscounted returns (n,) of n episodes; fewer environments than episodes are used again.

    `act` maps raw observations (n, S) to actions (n, A) in the task's bounds. Episode i is reset
    with seed + i. A policy's noise has its own random stream, and training's stays as it was.
    Raises InputError for an episode that does not end."""
    n = episodes or len(envs)
    returns, limit = np.zeros(n), envs[0].spec and envs[0].spec.max_episode_steps or LONGEST
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for first in range(0, n, len(envs)):
            running, t = dict(zip(range(first, n), envs)), 0
            starts = {i: flat(env.reset(seed=seed + i)[0]) for i, env in running.items()}
            obs = np.stack([starts.get(i, starts[first]) for i in range(n)])
            torch.manual_seed(seed)
            while running:  # all n rows act, ended or not, so noise depends on no length
                actions, t = act(torch.as_tensor(obs, device=device)).cpu().numpy(), t + 1
                usable = t <= limit and np.isfinite(actions).all()
                require(usable, f"step {t} in {envs[0]}: no time limit, or actions are not finite")
                for i, env in list(running.items()):
                    state, reward, terminal, timeout, _ = env.step(actions[i])
                    obs[i], returns[i] = flat(state), returns[i] + reward
                    if terminal or timeout:
                        del running[i]
    return returns


# ---- the run ---------------------------------------------------------------------------------


class Run:
    """One run. `train(run, data, args)` uses device, start, loop, after, reference, kept and
    read_clone of it, and nothing else."""

    def __init__(self, args, preset=None, words=None):
        self.args, self.preset, self.words = args, preset or {}, words or sys.argv
        self.file = Path(sys.modules[type(args).__module__].__file__)
        self.algorithm = self.file.stem
        env = Path(args.env).stem if re.search(FILES, args.env, re.I) else args.env
        variant = self.algorithm + (args.name and f"-{args.name}")
        folder = re.sub(r"[^\w.-]+", "-", f"{env}__{variant}__{args.seed}")
        self.folder = Path(args.out, folder)
        self.checkpoint = self.folder / "checkpoint.pt"
        self.device = prepare_device(args.device, args.precision)
        self.rows, self.references, self.resumed = {"train": [], "eval": []}, {}, None
        self.seconds = {"train": 0.0, "eval": 0.0}
        self.lock, self.stopped = filelock.FileLock(self.folder / ".lock", blocking=False), False
        torch.manual_seed(args.seed)

    def whole(self, train) -> float | None:
        """Load, train, finish."""
        try:
            self.data, self.task = load(self.args.env, self.device, self.args.eval_env)
            train(self, self.data, self.args)
            return self.finish()
        except OSError as error:  # a full disk, above all
            raise InputError(f"{self.folder}: {error}; repair that and use --resume") from None
        except (MemoryError, RuntimeError) as error:
            if not re.search("MemoryError|alloc|out of mem", repr(error)):
                raise
            fix = "use smaller data, a smaller --batch-size or smaller networks"
            raise InputError(f"out of memory ({error!s:.160}): {fix}") from None
        finally:
            self.lock.release()

    def identity(self) -> dict:
        """Everything that a number depends on: a run goes on, and two runs are averaged, only
        where all of it is equal."""
        found = {key: x for key, x in vars(self.args).items() if key not in CONTROL}
        found |= {"algorithm": self.algorithm, "data": self.data.digest}
        files = {"algorithm": self.file, "common": HERE / "common.py", "run": HERE / "run.py"}
        files["clone"] = getattr(self.args, "clone", None)
        for key, path in files.items():
            content = Path(path).read_bytes() if path and Path(path).is_file() else b""
            found[f"code of {key}"] = hashlib.sha256(content).hexdigest()[:12]
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[f"version of {name}"] = importlib.metadata.version(name)
        task = self.task or {}
        found |= {f"task's {key}": x for key, x in task.items() if not callable(x)}
        return json.loads(json.dumps(found, default=str))

    # ---- start -------------------------------------------------------------------------------

    def start(self, nets, opt, **largest: float):
        """Take what is trained, make the environments and the folder; with --resume, go on with
        what was saved. A reader may bring the data's score and the most environments that fit into
        memory. `largest`: {name of a metric: the largest |Q| that the rewards allow}."""
        self.nets, self.largest, self.settings = nets, largest, self.identity()
        self.moments = [x for optimizer in vars(opt).values() for x in optimizer.state()]
        args, task, data = self.args, self.task or {}, self.data
        returns = data.episode_return.cpu().numpy()
        self.references["data"] = task.get("data_score", score(task, returns))
        self.unit = "return" if score(task, [1e9]) == 1e9 else "score"  # no references: a return
        count = min(args.eval_episodes, task.get("most_envs", 10**9)) if task else 0
        self.envs = [make(task) for _ in range(count)]
        self.take_folder()
        config = dict(
            algorithm=self.algorithm,
            args=vars(args),
            preset=self.preset,
            settings=self.settings,
            command=shlex.join(self.words),
            columns=data.columns,
            machine=f"{os.cpu_count()} cores, {self.device}",
        )
        write_whole(self.folder / "config.json", json.dumps(config, indent=2, default=str).encode())
        size = f"{len(data.obs):,} transitions, {len(returns):,} episodes"
        print(f"data:   {data.name}, {size}, {self.unit} {self.references['data']:.1f}")
        print(f"preset: {self.preset or 'none'}")
        print(f"folder: {self.folder}, {self.device}", flush=True)
        if args.track:
            import wandb

            wandb.init(project="stayclose", name=self.folder.name, sync_tensorboard=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        self.board, self.clock = SummaryWriter(self.folder), time.monotonic()

    def take_folder(self):
        """Lock the folder, so that one process at a time trains there; restore the checkpoint with
        --resume, else remove an earlier run with --overwrite."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise InputError(f"{self.folder} is being trained by another process") from None
        except (OSError, NotImplementedError) as error:  # a file system without locks
            print(f"note: {self.folder} cannot be locked ({error}): start no second run in it")
        asked = self.args.resume or self.args.overwrite
        there = self.checkpoint.exists() or any(self.folder.glob("*.csv"))
        fix = "add --resume, --overwrite, or a new --name"
        require(asked or not there, f"{self.folder} exists: {fix}")
        if self.args.resume and self.checkpoint.exists():
            self.restore()
            return
        for old in self.folder.glob("[!.]*"):
            old.unlink()

    # ---- training ----------------------------------------------------------------------------

    def loop(self, steps: int, phase: str = "train"):
        """Yield the step numbers 1 to `steps`. A phase has its own random stream, seeded by its
        name and --seed; a resumed run goes on in the stream that it had. Ctrl-C and SIGTERM wait
        for the end of a step, and save."""
        self.phase, self.steps, self.last, first = phase, steps, {}, 1
        torch.manual_seed(zlib.crc32(f"{phase} {self.args.seed}".encode()))
        if self.resumed and self.resumed["phase"] != phase:
            first = steps + 1  # the checkpoint is of a later phase
        elif self.resumed:
            first, self.last = self.resumed["step"] + 1, self.resumed["last"]
            torch.set_rng_state(self.resumed["rng"][0])
            for state in self.resumed["rng"][1:]:
                torch.cuda.set_rng_state(state, self.device)
            self.resumed = None
        pause = 0.1 if sys.stderr.isatty() else 30  # seconds between two states of the bar
        self.bar = tqdm(None, phase, steps, initial=first - 1, mininterval=pause)
        for self.step in range(first, steps + 1):
            yield self.step
            self.bar.update()
            left, before = steps - self.step, self.step + 1  # an evaluation, and a task can raise
            due = self.stopped or left < 2 or before % self.args.eval_every == 0
            if due or self.step % self.args.save_every == 0:
                self.save_checkpoint()
            if self.stopped:
                print(f"\nstopped at {phase} step {self.step}: --resume continues", flush=True)
                raise SystemExit(130)
        self.bar.close()

    def stop(self, *_):
        if self.stopped:  # a second Ctrl-C does not wait
            raise SystemExit(130)
        self.stopped = True

    def after(self, t: int, metrics: dict, act=None):
        """Log `metrics` (0-d tensors), and evaluate `act` (raw observations to actions): every
        --log-every and --eval-every steps, and at the end of the phase."""
        self.last.update(metrics)
        if t == self.steps or t % self.args.log_every == 0:
            self.require_finite(self.last)
            values = {key: x.item() for key, x in self.last.items()}
            self.write(self.phase, t, values)
            for key in values.keys() & self.largest.keys():
                if abs(values[key]) > 10 * self.largest[key]:
                    most = f"no policy can have more than {self.largest.pop(key):.3g}"
                    print(f"note: {key} is {values[key]:.3g} at step {t}, but {most}")
        if act and self.task and (t == self.steps or t % self.args.eval_every == 0):
            returns = self.evaluate(act)
            row = {"return": float(returns.mean()), "score": score(self.task, returns)}
            self.bar.set_postfix_str(f"{self.unit} {row['score']:.1f}")
            row |= {f"episode_{i}": x for i, x in enumerate(returns.tolist())}
            self.write("eval", t, row)

    def require_finite(self, tensors: dict):
        """Raises InputError, so that what has diverged replaces no checkpoint."""
        odd = [key for key, x in tensors.items() if not x.isfinite().all()]
        fix = "lower the learning rates or strengthen the regularizer"
        require(not odd, f"{self.phase}: {odd[:1]} is not finite, training diverged; {fix}")

    def write(self, name: str, t: int, values: dict):
        """Add a row to a CSV file of the run and to its TensorBoard events, and tell of it."""
        now = time.monotonic()
        self.seconds["train"] += now - self.clock
        self.clock = now
        table = self.rows.setdefault(name, [])
        table.append({"step": t, "seconds": f"{self.seconds['train']:.2f}"} | values)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in table for key in row)))
        writer.writeheader()
        writer.writerows(table)
        write_whole(self.folder / f"{name}.csv", text.getvalue().encode())
        folder = {"eval": "charts", "train": "losses"}.get(name, name)
        for key, x in values.items():
            self.board.add_scalar(f"{folder}/{key}", x, t)

    def evaluate(self, act) -> np.ndarray:
        """Returns (eval_episodes,) of a policy, on start states fixed by the run's seed."""
        start, seed = time.monotonic(), 1000 * self.args.seed + 100
        returns = evaluate(act, self.envs, seed, self.device, self.args.eval_episodes)
        seconds = time.monotonic() - start
        self.clock += seconds  # the column `seconds` is of training alone
        self.seconds["eval"] += seconds
        return returns

    def reference(self, label: str, act):
        """Score a policy that is not the run's result."""
        if self.task:
            self.references[label] = score(self.task, self.evaluate(act))
            print(f"{label}: {self.unit} {self.references[label]:.1f}", flush=True)

    def finish(self) -> float | None:
        """Write summary.json and curve.png; print and return the score: the mean of the last ten
        evaluations, of the last three on OGBench, and the last one in AntMaze, as in papers."""
        env, scores = self.args.env, [row["score"] for row in self.rows["eval"]]
        count = 3 if "-singletask" in env else 1 if "antmaze" in env else 10
        final = np.mean(scores[-count:]) if scores else None
        summary = dict(
            score=final,
            last=scores[-1] if scores else None,
            references=self.references,
            train_seconds=self.seconds["train"],
            eval_seconds=self.seconds["eval"],
        )
        self.board.close()
        if scores:
            self.draw(scores)
        write_whole(self.folder / "summary.json", json.dumps(summary, indent=2).encode())
        for old in self.folder.glob("kept-*.pt"):
            old.unlink()
        told = [f"{label} {value:.1f}" for label, value in self.references.items()]
        first = f"{self.algorithm} {self.unit} {final:.1f}" if scores else self.algorithm
        seconds = f"{sum(self.seconds.values()):.0f} s"
        print(first, *told, seconds, self.folder, sep=" | ")
        return final

    def draw(self, scores):
        """curve.png: the score over gradient steps, beside the references."""
        from matplotlib.figure import Figure

        axes = Figure().subplots()
        axes.plot([row["step"] for row in self.rows["eval"]], scores, label=self.algorithm)
        for i, (name, value) in enumerate(self.references.items(), 1):
            axes.axhline(value, ls="--", c=f"C{i}", label=f"{name} {value:.1f}")
        axes.set(xlabel="gradient steps", ylabel=self.unit)
        axes.legend()
        axes.figure.savefig(self.folder / "curve.png")

    # ---- checkpoints -------------------------------------------------------------------------

    def save_tensors(self, name: str, content):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_whole(self.folder / name, buffer.getvalue())

    def save_checkpoint(self):
        """Everything that the rest of the run depends on."""
        content = {key: getattr(self, key) for key in STATE}
        content |= {"nets": self.nets.state_dict(), "opt": self.moments}
        self.require_finite(content["nets"] | self.last)
        content["rng"] = [torch.get_rng_state()]
        if self.device.type == "cuda":
            content["rng"].append(torch.cuda.get_rng_state(self.device))
        self.save_tensors("checkpoint.pt", content)

    def compare(self, saved, keys, what):
        """Raises InputError where settings of now are not those of a checkpoint."""
        then = saved["settings"]
        for key in keys or then | self.settings:
            old, new = then.get(key), self.settings.get(key)
            require(old == new, f"{what} was made with {key} {old}, not {new}: use equal settings, "
                    "versions and files, --overwrite or a new --name")  # fmt: skip

    def restore(self):
        """Take the checkpoint. Raises InputError where it is damaged or another run's."""
        self.resumed = saved = load_tensors(self.checkpoint)
        with in_one_line(self.checkpoint, "add --overwrite or a new --name"):
            self.compare(saved, None, self.checkpoint)
            summary = self.folder / "summary.json"
            if summary.exists() and summary.stat().st_size:
                print(f"{self.folder} is finished: there is nothing to resume")
                raise SystemExit(0)
            self.nets.load_state_dict(saved["nets"])
            for tensor, value in zip(self.moments, saved["opt"], strict=True):
                tensor.copy_(value)
            for key in ("rows", "references", "seconds"):
                setattr(self, key, saved[key])
            print(f"resumed after {saved['phase']} step {saved['step']:,}")

    def kept(self, name: str, compute):
        """compute(), a tensor, kept in the folder until the run is finished: a run that was killed
        reads it there."""
        path = self.folder / f"kept-{name}.pt"
        if not path.exists():
            self.save_tensors(path.name, compute().cpu())
        return load_tensors(path).to(self.device)

    def read_clone(self, module):
        """Load `module` from the checkpoint that --clone names. Raises InputError for one of other
        data, of another normalization, of other shapes, or whose clone was not finished."""
        path, saved = self.args.clone, load_tensors(self.args.clone)
        start = next(name for name, x in self.nets.named_modules() if x is module) + "."
        with in_one_line(path, "use the checkpoint.pt of a finished clone of equal networks"):
            self.compare(saved, ("data", "normalize_obs"), path)
            first = next(iter(self.args.phases))
            whole = saved["phase"] != first or saved["step"] == saved["steps"]
            require(whole, f"{path}: its clone is not finished: finish that run with --resume")
            weights = {k.removeprefix(start): x for k, x in saved["nets"].items() if start in k}
            module.load_state_dict(weights)
        print(f"clone: read from {path}", flush=True)


def write_whole(path: Path, content: bytes):
    """Write a file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def load_tensors(path):
    """What torch.save wrote, on the CPU; nothing is unpickled. Raises InputError."""
    with in_one_line(path, "correct the path, or delete the file"):
        damaged = zipfile.ZipFile(path).testzip()  # torch itself compares no checksum
        require(not damaged, f"{path} is damaged ({damaged}): delete it")
        return torch.load(path, map_location="cpu", weights_only=True)


def main(Args, presets: dict, train, argv=None) -> float | None:
    """What an algorithm file runs as a script: flags, data, training, score."""
    words = sys.argv if argv is None else [sys.argv[0], *argv]
    return Run(*parse(Args, presets, words[1:]), words).whole(train)
