"""One run: its flags and presets, its loop, its evaluations and its last line.

`main(Args, PRESETS, train)` is the guard of every algorithm file. What `train(run, data, args)`
may use of a run is this, and nothing else:

    run.device
    run.start(nets, opt, **largest)       bind what is trained, and restore it with --resume;
                                          largest: metric name -> largest value that rewards allow
    run.loop(steps, phase="train")        the step numbers 1 to `steps`
    run.after(t, metrics, act=None)       log, evaluate and remember step t
    run.reference(label, act)             score a policy that is not the run's result
    run.cached(stage, module, *settings)  whether an earlier run's module was read
    run.share(stage, module)              keep a trained module for other runs
    run.chunks(stage, shape, count, *settings)   a table on disk, filled chunk by chunk
"""

import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import typing
import zlib
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch

from common import InputError, Range
from harness.datasets import load_dataset
from harness.device import prepare_device, set_precision
from harness.folder import (
    DATA_FILES,
    Folder,
    code_hashes,
    git_state,
    load_tensors,
    machine,
    save_tensors,
)
from harness.tasks import is_singletask

# Flags that may differ between a run and its continuation: none of them changes a number.
CONTROL = ("device", "compile", "log_every", "save_every", "out", "resume", "overwrite", "track")
LAST, LAST_OGBENCH = 10, 3  # evaluations that a score averages

# ---- flags -----------------------------------------------------------------------------------


def number_type(annotation):
    """(int, float or None, Range or None) of a field's annotation; None as a choice is ignored."""
    if typing.get_origin(annotation) is typing.Annotated:
        kind, *notes = typing.get_args(annotation)
        return kind, next((note for note in notes if isinstance(note, Range)), None)
    if typing.get_origin(annotation) is tuple:  # of its values, number_types tells
        return None, None
    for option in typing.get_args(annotation):
        if typing.get_origin(option) is typing.Annotated or option in (int, float):
            return number_type(option)
    return (annotation if annotation in (int, float) else None), None


def number_types(annotation, count: int) -> list:
    """number_type of each of the `count` values of a field: of a tuple's in order, the last one's
    again for those that follow."""
    kinds = [annotation]
    if typing.get_origin(annotation) is tuple:
        kinds = [kind for kind in typing.get_args(annotation) if kind is not Ellipsis]
    return [number_type(kinds[min(i, len(kinds) - 1)]) for i in range(count)]


def typed_flags(Args, argv: list[str]) -> dict[str, int]:
    """Field name -> place in argv of the value (or of the flag itself, for a switch)."""
    kinds = {field.name: field.type for field in dataclasses.fields(Args)}
    found, i = {}, 0
    while i < len(argv):
        name = argv[i].removeprefix("--").replace("-", "_") if argv[i].startswith("--") else ""
        if name in kinds and kinds[name] is not bool:
            found[name] = i = i + 1
        elif name in kinds or name.removeprefix("no_") in kinds:
            found[name if name in kinds else name.removeprefix("no_")] = i
        i += 1
    return found


def preset_of(presets: dict, env: str) -> dict:
    """The fields that the rows matching `env` set; later rows win. A file's path matches no row.
    The name of an OGBench task matches only rows that are made for such names: D4RL's antmaze-* is
    another task than OGBench's."""
    if env.lower().endswith(DATA_FILES):
        return {}
    preset = {}
    for pattern, fields in presets.items():
        meant = ("singletask" in env) == ("singletask" in pattern)
        if meant and fnmatchcase(env, pattern):
            preset.update(fields)
    return preset


def parse(Args, presets: dict, argv: list[str] | None = None):
    """Command line -> (args, preset in force).

    Rows of `presets` ({fnmatch pattern of --env: {field: value}}) that match replace defaults; a
    flag that is typed wins. Whole numbers may be typed as 1e5. An earlier phase whose length was
    neither typed nor set by a preset is at most as long as a typed --steps. Raises InputError."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [
        part for arg in argv for part in (arg.split("=", 1) if re.match(r"--\w", arg) else [arg])
    ]
    typed = typed_flags(Args, argv)
    fields = {field.name: field for field in dataclasses.fields(Args)}
    for name, i in typed.items():
        read_numbers(fields[name], argv, i)
    i = typed.get("env", len(argv))
    env = argv[i] if i < len(argv) else getattr(fields.get("env"), "default", "")
    preset = preset_of(presets, env)
    text = sys.modules[Args.__module__].__doc__ or ""
    if preset:
        text += f"\nThe defaults below are those of --env {env} (PRESETS in the file)."
    earlier = {field for field in Args.phases.values() if field not in ("steps", None)}
    if earlier:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(earlier))
        text += f"\nWhere --steps is typed and {names} is not, that phase is at most as long."
    default = {"default": Args(**preset)} if preset else {}
    args = tyro.cli(Args, args=argv, description=text, **default)
    if "steps" in typed:
        for name in earlier - typed.keys():
            setattr(args, name, min(getattr(args, name), args.steps))
    check_ranges(args)
    args.resolve()
    in_force = {name: value for name, value in preset.items() if getattr(args, name) == value}
    return args, in_force


def read_numbers(field, argv: list[str], i: int) -> None:
    """Rewrite the words typed for a field, from place i on, as the parser takes them: 1e5 becomes
    100000 where the field is a whole number. Raises InputError for a word that is no such
    number."""
    last = min(i + 1, len(argv))
    if typing.get_origin(field.type) is tuple:
        while last < len(argv) and not argv[last].startswith("--"):
            last += 1
    for place, kind in zip(range(i, last), number_types(field.type, last - i), strict=True):
        argv[place] = read_number(field, argv[place], *kind)


def read_number(field, word: str, kind, allowed) -> str:
    """One word, of the kind and range that number_type gives, as read_numbers rewrites it."""
    if kind is None or (word == "None" and type(None) in typing.get_args(field.type)):
        return word
    try:
        value = float(word)
        inside = allowed is None or allowed.low <= value <= allowed.high  # NaN is in no range
        if kind is float and inside:
            return word
        if kind is int and inside and value.is_integer():  # which infinity is not
            return word if re.fullmatch(r"[+-]?\d+", word) else str(int(value))
    except ValueError:
        pass
    raise out_of_range(field, f"{word:.40}", kind, allowed)


def check_ranges(args) -> None:
    """Raises InputError for a number out of its field's range."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        values = value if isinstance(value, tuple) else (value,)
        kinds = number_types(field.type, len(values))
        for x, (kind, allowed) in zip(values, kinds, strict=True):
            if allowed and x is not None and not allowed.low <= x <= allowed.high:
                raise out_of_range(field, x, kind, allowed)  # NaN is in no range


def out_of_range(field, value, kind, allowed) -> InputError:
    """The line that says which number a flag takes."""
    flag, text = field.name.replace("_", "-"), "a whole number" if kind is int else "a number"
    text = allowed.text if allowed else text
    if typing.get_origin(field.type) is tuple:
        text = f"{text} for each of its values"
    return InputError(f"--{flag} is {value}: use {text}")


# ---- randomness and evaluation ---------------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and CUDA) and numpy."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def averaged(env: str) -> int:
    """How many of a run's last evaluations its score averages, by the name of its dataset. The
    papers that use OGBench average fewer than the others."""
    return LAST_OGBENCH if is_singletask(env) else LAST


@torch.no_grad()
def evaluate(act, envs: list, seed: int, device, episodes: int | None = None) -> np.ndarray:
    """Undiscounted returns (n,) of n episodes, one in each environment unless `episodes` says n.

    The environments are stepped side by side. Where there are fewer of them than episodes, they
    are used again for the next episodes when all of the first have ended.

    `act` maps raw observations (n, S) to actions (n, A) in the task's bounds. Episode i is reset
    with seed + i. A policy that draws noise draws it from a stream of its own, seeded with `seed`;
    the training random stream is left as it was. So that the number of environments changes no
    bit of a return, `act` always gets n rows, and its noise starts again with the environments."""
    n = episodes or len(envs)
    returns = np.zeros(n)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for first in range(0, n, len(envs)):
            running = set(range(first, min(first + len(envs), n)))
            starts = {i: envs[i - first].reset(seed=seed + i)[0] for i in sorted(running)}
            obs = np.stack([starts.get(i, starts[first]) for i in range(n)])  # (n, S)
            torch.manual_seed(seed)
            while running:
                actions = act(torch.as_tensor(obs, dtype=torch.float32, device=device))
                actions = actions.cpu().numpy()
                for i in sorted(running):
                    obs[i], reward, terminal, timeout, _ = envs[i - first].step(actions[i])
                    returns[i] += reward
                    if terminal or timeout:
                        running.remove(i)
    return returns


# ---- the run ---------------------------------------------------------------------------------


class Run:
    """One run. Construction checks the folder, chooses the device and seeds; `load` reads the data;
    `train` of an algorithm file uses what the top of this file lists; `finish` writes the summary
    and the learning curve."""

    first_line_after, line_every = 5, 30  # seconds between progress lines without a terminal

    def __init__(self, args, preset: dict | None = None, words: list[str] | None = None):
        """`words` is the command line, for the line that says how to continue."""
        self.args, self.preset, self.words = args, preset or {}, words or sys.argv
        self.file = sys.modules[type(args).__module__].__file__
        self.algorithm = Path(self.file).stem
        if args.resume and args.overwrite:
            raise InputError("--resume continues a run and --overwrite deletes it: use one of them")
        self.folder = Folder(args, self.algorithm)
        if args.track and importlib.util.find_spec("wandb") is None:
            raise InputError("--track needs Weights & Biases: pip install wandb")
        if self.folder.exists() and not (args.resume or args.overwrite):
            raise InputError(
                f"{self.folder.path} exists: add --resume, --overwrite, or a new --name"
            )
        self.settings = {k: v for k, v in vars(args).items() if k not in CONTROL}
        self.settings |= {"algorithm": self.algorithm, "torch": torch.__version__}
        self.settings |= {f"code of {k}": v for k, v in code_hashes(self.file).items()}
        self.device = prepare_device(args.device)
        precision = self._precision()
        self.precision, self.precision_reason = set_precision(precision, self.device)
        if precision != args.precision:
            self.precision_reason = "as the run began"
        seed_everything(args.seed)

    def _precision(self) -> str:
        """The way to compute products: with --resume, the one that the run began with."""
        began = None
        if self.args.resume and self.folder.exists():
            began = self.folder.config().get("precision")
        return began if began in ("highest", "high", "medium") else self.args.precision

    def load(self):
        """Read the dataset and its evaluation task; returns the data. With --resume, a finished
        run ends here: with status 0, or with InputError where anything differs."""
        data, task = load_dataset(self.args.env, self.device, self.args.eval_env)
        return self.bind(data, task)

    def bind(self, data, task):
        """Take `data` and `task` (or None) as this run's; returns the data."""
        self.data, self.task = data, task
        self.settings["data"] = data.digest
        self.unit = "score" if task and task.ref_min is not None else "return"
        if self.args.resume and self.folder.finished():
            self._leave_finished()
        return data

    def start(self, nets, opt, **largest: float) -> None:
        """Bind what the run trains; write config.json; restore the checkpoint with --resume.

        `largest` names metrics that estimate Q, with the largest |Q| that the rewards allow
        (`common.largest_value`): one that grows far beyond is said once."""
        self.nets, self.opt, self.largest, self.first_values = nets, opt, largest, {}
        self.folder.open()
        self.references, self.last, self.stopped = {}, {}, False
        self.rows = {"train": [], "eval": []}
        self.train_seconds = self.eval_seconds = 0.0
        self.resume_at, self.paths, self.begun = None, {}, False
        task, episodes = self.task, self.args.eval_episodes
        count = task.envs_for(episodes) if task else 0
        self.envs = [task.make() for _ in range(count)]
        restored = self.args.resume and self.folder.checkpoint.exists()
        if restored:
            self._restore()
        else:
            self.folder.clear()
        self.folder.save_json("config.json", self._config())
        if self.args.track:
            import wandb

            wandb.init(
                project="stayclose",
                name=self.folder.path.name,
                config=vars(self.args),
                sync_tensorboard=True,
            )
        self.folder.open_board(self.resume_at[1] if restored else 0)
        returns = self.data.episode_return.cpu().numpy()
        self.references["data"] = task.score_data(returns) if task else float(returns.mean())
        print(self._first_line(restored), flush=True)

    def _first_line(self, restored) -> str:
        data, phases = self.data, type(self.args).phases
        lengths = ", ".join(
            f"{phase} {getattr(self.args, field):,}" if field else f"{phase} one pass"
            for phase, field in phases.items()
        )
        defaults = {field.name: field.default for field in dataclasses.fields(self.args)}
        for field in set(phases.values()) - {"steps", None}:
            if getattr(self.args, field) == self.args.steps < defaults[field]:
                lengths += f" (without --{field.replace('_', '-')}, at most --steps)"
        preset = ", ".join(f"{name}={value}" for name, value in self.preset.items())
        return (
            f"{self.algorithm} on {data.name}: {len(data.obs):,} transitions, "
            f"{len(data.episode_return):,} episodes, {self.unit} {self.references['data']:.1f}; "
            f"steps: {lengths}; seed {self.args.seed}, {self.device}, "
            f"precision {self.precision} ({self.precision_reason})"
            + (f"; preset {preset}" if preset else "")
            + (f"; resumed after {self.resume_at[0]} step {self.resume_at[1]}" if restored else "")
        )

    def loop(self, steps: int, phase: str = "train"):
        """Yield 1..steps, or what is left of them after a restored checkpoint. A finished phase
        yields nothing. Seeds the phase on its own, so that a cached phase changes no later one."""
        from tqdm import tqdm

        if self.resume_at and self.resume_at[0] != phase:
            return
        self.phase, self.phase_steps, first = phase, steps, 1
        if self.resume_at:
            first = self.resume_at[1] + 1
            torch.set_rng_state(self.rng[0])
            if self.device.type == "cuda" and len(self.rng) > 1:
                torch.cuda.set_rng_state(self.rng[1], self.device)
            self.resume_at = None
        else:
            seed_everything(zlib.crc32(f"{phase} {self.args.seed}".encode()))
            self.last = {}
        handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=steps, initial=first - 1, desc=phase, disable=None, unit="up")
        if self.begun and steps and self.bar.disable:  # the first phase follows the first line
            print(f"{phase} {first - 1}/{steps:,}", flush=True)
        self.begun = True
        self.clock, self.logged = time.time(), (time.time(), first - 1)
        self.next_line = time.time() + self.first_line_after
        try:
            for t in range(first, steps + 1):
                yield t
                self.bar.update()
                if self.bar.disable and time.time() > self.next_line:
                    self._say(t, "")
                if self.stopped or t % self.args.save_every == 0 or t == steps:
                    self._values(t)  # a diverged state replaces no checkpoint
                    self._save_checkpoint(t)
                if self.stopped:
                    self._leave(t)
        finally:
            self.bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def after(self, t: int, metrics: dict, act=None) -> None:
        """Log `metrics` (0-d tensors; the only copies from device to host) and evaluate `act` (raw
        observations to actions) when step t asks for it."""
        self.last.update(metrics)
        if t % self.args.log_every == 0 or t == self.phase_steps:
            self._log(t)
        if act and self.task and (t % self.args.eval_every == 0 or t == self.phase_steps):
            self._tick()
            returns = self.evaluate(act)
            result = {"return": returns.mean(), "score": self.task.score(returns)}
            row = {"step": t, "seconds": f"{self.train_seconds:.2f}", **result}
            self.rows["eval"].append(row | {f"episode_{i}": x for i, x in enumerate(returns)})
            self.folder.save_rows("eval", self.rows["eval"])
            self.folder.board_add({f"charts/{name}": x for name, x in result.items()}, t)
            self._say(t, f"{self.unit} {result['score']:.1f}")

    def evaluate(self, act) -> np.ndarray:
        """Returns (eval_episodes,) of a policy, on start states fixed by the run's seed."""
        start = time.time()
        seed, episodes = 1000 * self.args.seed + 100, self.args.eval_episodes
        returns = evaluate(act, self.envs, seed, self.device, episodes)
        self.clock = time.time()
        self.eval_seconds += self.clock - start
        return returns

    def reference(self, label: str, act) -> None:
        """Score a policy that is not this run's result; the final line and the curve name it."""
        if self.task:
            self.references[label] = self.task.score(self.evaluate(act))
            print(f"{label}: {self.unit} {self.references[label]:.1f}", flush=True)

    def _key(self, stage, shapes, settings):
        """Everything that a shared stage depends on: data, code, seed, settings, shapes."""
        code = sorted(code_hashes(self.file).items())
        return (self.algorithm, code, self.data.digest, self.args.seed, stage, settings, shapes)

    def cached(self, stage: str, module, *settings) -> bool:
        """Load `module` as an earlier run on the same data, code, seed and settings trained it;
        False where there is none."""
        shapes = [tuple(x.shape) for x in module.state_dict().values()]
        key = self._key(stage, shapes, settings)
        self.paths[stage] = path = self.folder.cache_path(stage, ".pt", *key)
        if self.resume_at or not path.exists():
            return False
        module.load_state_dict(load_tensors(path))
        print(f"{stage}: read from {path}", flush=True)
        return True

    def share(self, stage: str, module) -> None:
        """Keep a trained module where `cached` of the same stage looks for it."""
        path = self.paths[stage]
        try:
            save_tensors(path, module.state_dict())
        except OSError as error:
            print(f"{path} not saved ({error.strerror}): training goes on", file=sys.stderr)

    def chunks(self, stage: str, shape: tuple, count: int, *settings):
        """(table, finished): float32 tensors of `shape` and (count,), on disk, shared by runs of
        equal data, code, seed and settings. The caller writes the rows of chunk c, then sets
        finished[c] = 1."""
        return self.folder.chunks(stage, shape, count, *self._key(stage, shape, settings))

    def finish(self) -> float | None:
        """Write summary.json and curve.png, print the final line, return the mean score of the last
        evaluations, as many as `averaged` says (None without an evaluation task)."""
        rows, last = self.rows["eval"], averaged(self.folder.env_name)
        scores = [float(row["score"]) for row in rows]
        final = float(np.mean(scores[-last:])) if scores else None
        summary = {
            "score": final,
            "averaged": last,
            "evaluations": len(scores),
            "last": scores[-1] if scores else None,
            "best": max(scores, default=None),
            "references": self.references,
            "train_seconds": self.train_seconds,
            "eval_seconds": self.eval_seconds,
        }
        folder = self.folder
        if scores:
            unit = "normalized score" if self.unit == "score" else "return"
            title = f"{self.data.name}, {self.task.id}"
            folder.save_curve(self.algorithm, rows, self.references, title, unit)
        folder.board_add({}, 0)
        folder.save_again()
        if not folder.unsaved:  # a summary means that all is saved
            folder.save("summary.json", json.dumps(summary, indent=2).encode())
        folder.close()
        if folder.unsaved:
            names = ", ".join(sorted(folder.unsaved))
            raise InputError(
                f"{folder.path}: {names} could not be saved: free some space and repeat the "
                "command with --resume" + (f" (the score was {final:.1f})" if scores else "")
            )
        parts = [f"{self.algorithm} {self.unit} {final:.1f}"] if scores else [self.algorithm]
        parts += [f"{label} {value:.1f}" for label, value in self.references.items()]
        seconds = self.train_seconds + self.eval_seconds
        print(" | ".join([*parts, f"{seconds:.0f} s", str(folder.path)]), flush=True)
        return final

    def _leave_finished(self):
        """Leave: the same run is finished. InputError where its settings, code or data differ."""
        then, now = self.folder.config().get("settings", {}), self._now()
        instead = "add --overwrite or a new --name"
        if not then:
            raise InputError(
                f"{self.folder.path} is finished, by code that is not known: {instead}"
            )
        for key in now:
            if then.get(key) != now[key]:
                raise InputError(
                    f"{self.folder.path} is finished, with {key} {then.get(key)}, not {now[key]}: "
                    f"{instead}"
                )
        print(f"{self.folder.path} is finished: there is nothing to resume")
        raise SystemExit(0)

    def _now(self) -> dict:
        """This run's settings, as they read in a file."""
        return json.loads(json.dumps(self.settings, default=str))

    def _stop(self, *_):
        if self.stopped:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.stopped = True

    def _leave(self, t):
        saved = f"saved at {self.phase} step {t}"
        if "checkpoint.pt" in self.folder.unsaved:
            saved = "not saved"
        self.folder.close()
        print(f"\nstopped, {saved}; continue with: {self.continuation()}", flush=True)
        raise SystemExit(130)

    def continuation(self) -> str:
        """The command that continues this run."""
        dropped = ("--overwrite", "--no-overwrite", "--resume", "--no-resume")
        words = [word for word in self.words if word.replace("_", "-") not in dropped]
        python = shutil.which("python")
        same = python and os.path.samefile(python, sys.executable)
        return shlex.join(["python" if same else sys.executable, *words, "--resume"])

    def _say(self, t, text):
        """Progress: on the bar of a terminal, else as a line."""
        if not self.bar.disable:
            if text:
                self.bar.set_postfix_str(text)
            return
        rate = (t - self.logged[1]) / max(time.time() - self.logged[0], 1e-9)
        left = (self.phase_steps - t) / max(rate, 1e-9)
        text = f"{text} " if text else ""
        line = f"{self.phase} {t:,}/{self.phase_steps:,} {text}{rate:.0f}/s, {left:.0f} s left"
        print(line, flush=True)
        self.next_line = time.time() + self.line_every

    def _tick(self):
        now = time.time()
        self.train_seconds, self.clock = self.train_seconds + now - self.clock, now

    def _values(self, t):
        """The metrics as numbers; InputError where one is not finite."""
        values = {k: v.item() for k, v in self.last.items()}
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if bad:
            checkpoint = self.folder.checkpoint
            kept = f"the last good checkpoint is {checkpoint}"
            kept = kept if checkpoint.exists() else "no checkpoint was due yet"
            raise InputError(
                f"{self.phase} step {t}: {bad[0]} is {values[bad[0]]}; training diverged, {kept}: "
                "lower the learning rates or strengthen the regularizer"
            )
        return values

    def _log(self, t):
        self._tick()
        values = {k: v.item() for k, v in self.last.items()}
        rate = (t - self.logged[1]) / max(time.time() - self.logged[0], 1e-9)
        table = self.rows.setdefault(self.phase, [])
        table.append({"step": t, "seconds": f"{self.train_seconds:.2f}", **values})
        self.folder.save_rows(self.phase, table)
        prefix = "losses" if self.phase == "train" else self.phase
        scalars = {f"{prefix}/{k}": v for k, v in values.items()}
        self.folder.board_add(scalars | {"charts/updates_per_second": rate}, t)
        self._values(t)
        self._compare_with_largest(values, t)
        if not self.task or self.phase != "train":
            if t % (10 * self.args.log_every) == 0 or t == self.phase_steps:
                self._say(t, ", ".join(f"{k} {v:.3g}" for k, v in list(values.items())[:3]))

    def _compare_with_largest(self, values, t):
        for name in self.largest.keys() & values.keys():
            first = self.first_values.setdefault(name, abs(values[name]))
            if abs(values[name]) > 2 * self.largest[name] + 10 * first:
                print(
                    f"note: {name} is {values[name]:.3g} at step {t}, but no policy can reach more "
                    f"than {self.largest[name]:.3g} with the data's rewards: Q runs away where "
                    "there is no data; strengthen the regularizer"
                )
                self.largest = {}  # said once
                return

    def _save_checkpoint(self, t):
        rng = [torch.get_rng_state()]
        rng += [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        self.folder.save_checkpoint(
            {
                "settings": json.dumps(self.settings, default=str),
                "phase": self.phase,
                "step": t,
                "last": self.last,
                "nets": self.nets.state_dict(),
                "opt": [o.state() for o in vars(self.opt).values()],
                "rng": rng,
                "rows": json.dumps(self.rows),
                "references": self.references,
                "seconds": [self.train_seconds, self.eval_seconds],
            }
        )

    def _restore(self):
        """Read the checkpoint. InputError where it is damaged or another run's."""
        path, now = self.folder.checkpoint, self._now()
        saved = load_tensors(path)
        try:
            then = dict(json.loads(saved["settings"]))
        except (KeyError, TypeError, ValueError, RecursionError):
            raise InputError(
                f"{path} is not a checkpoint: add --overwrite or a new --name"
            ) from None
        for key in now | then:
            if then.get(key) != now.get(key):
                raise InputError(
                    f"{path} was made with {key} {then.get(key)!s:.200}, not {now.get(key)}: "
                    "resume with the same settings, versions and files, or add --overwrite or a "
                    "new --name"
                )
        try:
            self._take(saved)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{path} does not fit this run ({line:.100}): add --overwrite or a new --name"
            ) from None

    def _take(self, saved):
        self.nets.load_state_dict(saved["nets"])
        for optimizer, state in zip(vars(self.opt).values(), saved["opt"], strict=True):
            for tensor, value in zip(optimizer.state(), state, strict=True):
                if tensor.shape != value.shape:
                    raise ValueError(f"an optimizer's tensor has shape {tuple(value.shape)}")
                tensor.copy_(value)
        phase, step = saved["phase"], saved["step"]
        if phase not in type(self.args).phases or type(step) is not int or step < 0:
            raise ValueError(f"phase {phase!r}, step {step!r}")
        self.resume_at, self.rng = (phase, step), saved["rng"]
        torch.Generator().set_state(self.rng[0])  # raises for what is no state
        self.rows, self.references = json.loads(saved["rows"]), dict(saved["references"])
        for row in self.rows["eval"]:
            float(row["score"]), int(row["step"])
        {k: float(v) for k, v in self.references.items()}
        self.last = {k: v.to(self.device) for k, v in saved["last"].items()}
        self.train_seconds, self.eval_seconds = map(float, saved["seconds"])

    def _config(self):
        return {
            "algorithm": self.algorithm,
            "args": vars(self.args),
            "preset": self.preset,
            "settings": self.settings,
            "command": shlex.join(self.words),
            "dataset": self.data.name,
            "dataset_sha256": self.data.digest,
            "task": self.task.id if self.task else None,
            "code": code_hashes(self.file),
            **git_state(),
            "precision": self.precision,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "machine": machine(self.device),
            "threads": torch.get_num_threads(),
        }


def main(Args, presets: dict, train, argv: list[str] | None = None) -> float | None:
    """Parse the command line, read the data, train; returns the mean score of the last evaluations
    (`averaged` says how many), or None without an evaluation task. Ctrl-C exits with status 130,
    and a lack of memory is an InputError."""
    words = sys.argv if argv is None else [sys.argv[0], *argv]
    args = run = None
    try:
        args, preset = parse(Args, presets, words[1:])
        run = Run(args, preset, words)
        train(run, run.load(), args)
        return run.finish()
    except KeyboardInterrupt:
        saved = run is not None and run.folder.checkpoint.exists()
        text = f"; continue with: {run.continuation()}" if saved else " before anything was saved"
        print(f"\nstopped{text}", flush=True)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our lines has left: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if args is None or not lacks_memory(error):
            raise
        line = (str(error).strip().splitlines() or ["memory is full"])[0]
        raise InputError(
            f"out of memory ({line:.160}): use a --batch-size below {args.batch_size}, or smaller "
            "networks"
        ) from None


def lacks_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return bool(
        re.search("can't allocate memory|out of memory|size calculation over|bad_alloc", str(error))
    )
