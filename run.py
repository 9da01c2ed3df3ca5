"""A run, from its data to its score, in the order in which it happens.

An algorithm file, common.py, this file and one dataset, alone in a folder, train, evaluate, score
and write CSVs. This file has the random seeds, the start states of the evaluation and the score;
common.py has the flags, the rows of the data that are kept, the batches and Adam.

In the whole repository, modules of harness/ join, which are called guests here. `resume`
(checkpoints, Ctrl-C, config.json) and `board` (progress, TensorBoard, curve) join every run and
change no number. `readers` and `tasks` join where a flag names data that are not bundled, or
another task.
"""

import csv
import importlib
import io
import json
import re
import sys
import time
import zlib
from contextlib import ExitStack, redirect_stderr
from pathlib import Path

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from common import COLUMNS, FILES, InputError, in_one_line, parse, prepare_device, transitions

HERE = Path(__file__).resolve().parent
LONGEST = 20_000  # steps in which an episode must end, where its task has no time limit


def guest(name):
    """A module of harness/, or None in a copy without that folder."""
    return importlib.import_module(f"harness.{name}") if (HERE / "harness").is_dir() else None


# ---- a name becomes data and a task ----------------------------------------------------------


def load(name: str, device="cpu", eval_env: str | None = None):
    """A dataset's name -> (Data, metadata of its task or None). This file itself (`own`) reads the
    bundled ones and, in a copy without harness/, every file; other names and other files go through
    harness/readers and its checks. Raises InputError."""
    readers, path = guest("readers"), HERE / "data" / f"{name}.npz"
    if not readers:
        path = next((x for x in (path, HERE / path.name) if x.is_file()), Path(name))
    own = not readers or (path in HERE.glob("data/*.npz") and eval_env in (None, "none"))
    arrays, task = read_npz(path) if own else readers.read(name, eval_env)
    task["env_id"] = eval_env or task.get("env_id") or "none"
    data = transitions(arrays, task, name, device)
    return data, task if task["env_id"] != "none" else None


def read_npz(path):
    """Arrays and metadata of a file in the README's format. Pickles are refused, and so is a
    recorded task with a colon (module:name), which could be any code."""
    with in_one_line(path, "use another file"), np.load(path, allow_pickle=False) as file:
        task = dict(json.loads(file["metadata"].item() if "metadata" in file else "{}"))
        arrays = {key: file[key].astype(float) for key in COLUMNS if key in file}
        limited = "timeouts" not in file and "max_episode_steps" in task
        if limited or {"masks", "valids"} & {*file}:
            raise InputError(f"{path}: reading this form needs the folder harness/ beside run.py")
    # json's own colons are written as "=": what is left is in a name or value
    if ":" in json.dumps([task.get("env_id"), task.get("env_kwargs")], separators=",="):
        raise InputError(f"{path} records a task with a colon: remove it from the metadata")
    return arrays, task


def make(task):
    """A fresh environment of a task; those of harness/tasks bring a function that makes them."""
    if "make" in task:
        return task["make"]()
    if "Maze" in task["env_id"]:
        with redirect_stderr(io.StringIO()):  # a notice about tasks that are not used here
            gymnasium.register_envs(importlib.import_module("gymnasium_robotics"))
    return gymnasium.make(task["env_id"], **task.get("env_kwargs", {}))


def score(task, returns) -> float:
    """The score of raw episode returns. Where the task ends at its goal, it is 100 x the share of
    returns above 0; otherwise 100 x their mean position between the reference returns of a random
    policy (0) and an expert (1), or, without such references, their mean. Raises InputError for
    returns that no score can have."""
    low = task.get("ref_min_score")
    high = task.get("ref_max_score")
    ends = task.get("env_kwargs", {}).get("continuing_task") is False
    returns = np.asarray(returns, np.float64)
    if task.get("success", ends):
        found = 100 * np.mean(returns > 0)
    elif None in (low, high):
        found = returns.mean()
    else:
        found = 100 * np.mean((returns - low) / (high - low))
    worst = np.abs(np.append(returns, found)).max()
    if not worst < 1e30:
        raise InputError(f"{task.get('env_id', 'the data')}: a return, or the score, is {worst:g}: "
                         "repair the task, its references or the rewards")  # fmt: skip
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
    returns = np.zeros(n)
    limit = envs[0].spec and envs[0].spec.max_episode_steps or LONGEST
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for first in range(0, n, len(envs)):
            running = dict(zip(range(first, n), envs))
            starts = {i: flat(env.reset(seed=seed + i)[0]) for i, env in running.items()}
            obs = np.stack([starts.get(i, starts[first]) for i in range(n)])
            torch.manual_seed(seed)
            for _ in range(limit):  # all n rows act, ended or not, so noise depends on no length
                actions = act(torch.as_tensor(obs, device=device)).cpu().numpy()
                if not np.isfinite(actions).all():
                    raise InputError(f"{envs[0]}: the policy's actions are not finite: the task's "
                                     "observations are not, or training diverged")  # fmt: skip
                for i, env in list(running.items()):
                    state, reward, terminal, timeout, _ = env.step(actions[i])
                    obs[i], returns[i] = flat(state), returns[i] + reward
                    if terminal or timeout:
                        del running[i]
                if not running:
                    break
            else:
                raise InputError(f"{envs[0]}: an episode has not ended after {limit:,} steps: "
                                 "give the task a time limit (max_episode_steps)")  # fmt: skip
    return returns


# ---- the run ---------------------------------------------------------------------------------


class Run:
    """One run. `train(run, data, args)` uses device, start, loop, after, reference, kept(name,
    compute) and read_clone(module) of it, and nothing else."""

    def __init__(self, args, preset: dict | None = None, words=None, algorithm: str = ""):
        self.args, self.preset = args, preset or {}
        self.words = words or sys.argv
        self.algorithm = algorithm or Path(sys.modules[type(args).__module__].__file__).stem
        is_file = re.search(FILES, args.env, re.I)
        env = Path(args.env).stem if is_file else args.env
        env = re.sub(r"[^\w.-]+", "-", env)
        variant = f"{self.algorithm}-{args.name}" if args.name else self.algorithm
        self.folder = Path(args.out, f"{env}__{variant}__{args.seed}")
        self.kept = lambda name, compute: compute()  # `resume` saves the tensor in case of a kill
        self.guests = [module.Guest(self) for module in map(guest, ("resume", "board")) if module]
        self.device = prepare_device(args.device, args.precision)
        self.rows, self.references = {"train": [], "eval": []}, {}
        self.train_seconds = self.eval_seconds = 0.0
        torch.manual_seed(args.seed)
        if not self.guests and (args.resume or getattr(args, "clone", None)):
            raise InputError("--resume and --clone need the folder harness/ beside run.py")
        if not self.guests:
            print("no harness/ beside run.py: no checkpoints, no --resume, no curve")

    def tell(self, event, *details):
        """Call this method of every guest that has it."""
        for one in self.guests:
            getattr(one, event, lambda *_: None)(*details)

    def load(self):
        """Read the data and its task; returns the data."""
        self.data, self.task = load(self.args.env, self.device, self.args.eval_env)
        self.tell("loaded")
        return self.data

    def start(self, nets, opt, **largest: float):
        """Take what is trained, make the environments and the folder. `largest`: {name of a metric:
        the largest |Q| that the rewards allow}. Tasks of harness/tasks may bring the data's score
        and the most environments that fit into memory."""
        self.nets, self.opt, self.largest = nets, opt, largest
        self.clock = time.monotonic()
        returns = self.data.episode_return.cpu().numpy()
        task = self.task or {}
        self.references["data"] = task.get("data_score", score(task, returns))
        self.unit = "return" if score(task, [1e9]) == 1e9 else "score"  # no references: a return
        most = task.get("most_envs", 10**9) if task else 0
        self.envs = [make(task) for _ in range(min(self.args.eval_episodes, most))]
        with in_one_line(self.folder, "use another --out or --name"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.tell("start")

    def loop(self, steps: int, phase: str = "train"):
        """Yield the step numbers 1 to `steps`. A phase has its own random stream, seeded by its
        name and --seed; a resumed run goes on in the stream that it had."""
        self.phase, self.phase_steps = phase, steps
        self.first, self.last = 1, {}
        torch.manual_seed(zlib.crc32(f"{phase} {self.args.seed}".encode()))
        self.tell("begin")  # with --resume, only the steps that are left
        before = self.first - 1
        self.bar = tqdm(total=steps, desc=phase, initial=before, disable=None)
        try:
            for t in range(self.first, steps + 1):
                yield t
                self.bar.update()
                self.tell("step", t)
        finally:
            self.tell("end")
            self.bar.close()

    def after(self, t: int, metrics: dict, act=None):
        """Log `metrics` (0-d tensors), and evaluate `act` (raw observations to actions): every
        --log-every and --eval-every steps, and at the end of the phase."""
        self.last.update(metrics)
        at_end = t == self.phase_steps
        if at_end or t % self.args.log_every == 0:
            values = {key: x.item() for key, x in self.last.items()}
            self.write(self.phase, t, values)
        if act and self.task and (at_end or t % self.args.eval_every == 0):
            returns = self.evaluate(act)
            row = {"return": returns.mean(), "score": score(self.task, returns)}
            row |= {f"episode_{i}": x for i, x in enumerate(returns)}
            self.write("eval", t, row)

    def write(self, name, t, values):
        """Add a row to a CSV file of the run."""
        now = time.monotonic()
        self.train_seconds += now - self.clock
        self.clock = now
        rows = self.rows.setdefault(name, [])
        rows.append({"step": t, "seconds": f"{self.train_seconds:.2f}"} | values)
        columns = dict.fromkeys(key for row in rows for key in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns))
        writer.writeheader()
        writer.writerows(rows)
        self.save(f"{name}.csv", text.getvalue().encode())
        self.tell("row", name, t, values)

    def save(self, name, content):
        """Write a file of the run, whole or not at all."""
        temporary = self.folder / f"{name}.tmp"
        temporary.unlink(missing_ok=True)  # never written through a link
        temporary.write_bytes(content)
        temporary.replace(self.folder / name)

    def evaluate(self, act) -> np.ndarray:
        """Returns (eval_episodes,) of a policy, on start states fixed by the run's seed."""
        start, seed = time.monotonic(), 1000 * self.args.seed + 100
        self.train_seconds += start - self.clock
        returns = evaluate(act, self.envs, seed, self.device, self.args.eval_episodes)
        self.clock = time.monotonic()
        self.eval_seconds += self.clock - start
        return returns

    def reference(self, label, act):
        """Score a policy that is not the run's result."""
        if self.task:
            self.references[label] = score(self.task, self.evaluate(act))
            print(f"{label}: {self.unit} {self.references[label]:.1f}", flush=True)

    def whole(self, train) -> float | None:
        """Load, train, finish."""
        with ExitStack() as stack:
            for one in self.guests:
                stack.enter_context(one)  # prints what an interruption has saved
            train(self, self.load(), self.args)
            return self.finish()

    def finish(self) -> float | None:
        """Write summary.json; print and return the mean score of the last ten evaluations (of the
        last three on OGBench)."""
        scores = [float(row["score"]) for row in self.rows["eval"]]
        count = 3 if "-singletask" in self.args.env else 10  # as OGBench's and D4RL's papers
        final = float(np.mean(scores[-count:])) if scores else None
        summary = {"score": final, "averaged": count, "evaluations": len(scores)}
        summary |= {"last": scores[-1] if scores else None, "best": max(scores, default=None)}
        for name in ("references", "train_seconds", "eval_seconds"):
            summary[name] = getattr(self, name)
        self.tell("finish", summary)
        self.save("summary.json", json.dumps(summary, indent=2).encode())
        parts = [f"{self.algorithm} {self.unit} {final:.1f}"] if scores else [self.algorithm]
        parts += [f"{label} {value:.1f}" for label, value in self.references.items()]
        seconds = self.train_seconds + self.eval_seconds
        print(" | ".join([*parts, f"{seconds:.0f} s", str(self.folder)]), flush=True)
        return final


def main(Args, presets: dict, train, argv: list[str] | None = None) -> float | None:
    """What an algorithm file runs as a script: flags, data, training, score."""
    words = sys.argv if argv is None else [sys.argv[0], *argv]
    return Run(*parse(Args, presets, words[1:]), words).whole(train)
