"""One run's folder: configuration, logs, evaluation, checkpoints, exact resume, the final line.

{out}/{env}__{algorithm}[-{name}]__{seed}/
    config.json      arguments, versions, commit, dataset and its hash
    train.csv        losses and health scalars (an earlier phase has a file of its own)
    eval.csv         step, seconds, mean return, score, one column per episode
    events.out.*     the same for TensorBoard
    checkpoint.pt    weights, optimizers, random state; written to a temporary name, renamed
    summary.json     mean score of the last 10 evaluations, last, best, seconds
    curve.png        the learning curve
"""

import csv
import fcntl
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import choose_device, evaluate, seed_everything
from datasets import InputError


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary name, then rename: the file is whole or absent. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors) -> None:
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomic(path, buffer.getbuffer())


def load_tensors(path: Path):
    """What save_tensors wrote, on the CPU; nothing is unpickled. Raises InputError."""
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch itself compares no checksum
            raise ValueError(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise nearly anything
        line = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise InputError(f"{path} cannot be read ({line}): delete it and start again") from None


CONTROL = ("device", "compile", "log_every", "save_every", "out", "resume", "overwrite", "track")


class Run:
    """One run: its folder, device, evaluation, logs, checkpoints and the final line.

    Construction checks the folder and seeds; `start` binds data and networks and restores; `loop`
    yields steps and stops cleanly on Ctrl-C or SIGTERM; `after` logs, evaluates and saves when due;
    `finish` writes the summary and the learning curve."""

    def __init__(self, args):
        self.args = args
        self.algorithm = Path(sys.modules[type(args).__module__].__file__).stem
        if args.resume and args.overwrite:
            raise InputError("--resume continues a run, --overwrite deletes it: give one of them")
        if not re.fullmatch(r"[\w.-]*", args.name):
            raise InputError(f"--name is {args.name!r}: letters, digits, '.', '_' and '-' only")
        env = Path(args.env).stem if args.env.endswith((".hdf5", ".h5", ".npz")) else args.env
        self.env_name = re.sub(r"[^\w.-]+", "-", env)
        variant = f"-{args.name}" if args.name else ""
        self.folder = Path(args.out) / f"{self.env_name}__{self.algorithm}{variant}__{args.seed}"
        if args.track and importlib.util.find_spec("wandb") is None:
            raise InputError("--track needs Weights & Biases: pip install wandb")
        if (self.folder / "summary.json").exists() and args.resume:
            self._finished()
        if (self.folder / "config.json").exists() and not (args.resume or args.overwrite):
            raise InputError(f"{self.folder} exists: add --resume, --overwrite, or a new --name")
        self.device = choose_device(args.device, args.precision)
        seed_everything(args.seed)

    def start(self, data, task, nets: nn.Module, opt) -> None:
        """Bind what the run trains; write config.json; restore the checkpoint with --resume."""
        self.data, self.task, self.nets, self.opt = data, task, nets, opt
        try:
            (Path(self.args.out) / "cache").mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out {self.args.out}: {error.strerror}; give another folder"
            ) from None
        self.lock = open(self.folder / ".lock", "w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except BlockingIOError:
            raise InputError(f"{self.folder} is being trained by another process") from None
        self.references, self.last, self.stopped, self.unsaved = {}, {}, False, {}
        horizon = 1 / (1 - getattr(self.args, "gamma", 1 - 1e-9))
        reward = data.reward.abs().max() + (getattr(self.args, "bonus", 0) or 0)
        self.largest_return, self.first_values = float(reward) * horizon, {}
        self.rows = {"train": [], "eval": []}
        self.train_seconds = self.eval_seconds = 0.0
        self.resume_at = None
        self.envs = [task.make() for _ in range(self.args.eval_episodes)] if task else []
        self.settings = {k: v for k, v in vars(self.args).items() if k not in (*CONTROL, "preset")}
        files = sys.modules[type(self.args).__module__].__file__, sys.modules["common"].__file__
        code = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]
        self.settings |= {"algorithm": self.algorithm, "data": data.digest}
        self.settings |= {"code": code, "torch": torch.__version__}
        self.checkpoint = self.folder / "checkpoint.pt"
        restored = self.args.resume and self.checkpoint.exists()
        if restored:
            self._restore(load_tensors(self.checkpoint))
        else:
            for pattern in ("*.csv", "*.json", "events.out.*", "checkpoint.pt", "curve.png"):
                for old in self.folder.glob(pattern):
                    old.unlink()
        self._save("config.json", json.dumps(self._config(), indent=2, default=str).encode())
        self.board = self._tensorboard(self.resume_at[1] if restored else 0)
        score = self.score(data.episode_return.cpu().numpy())
        self.references["data"] = score
        self.unit = "score" if task and task.ref_min is not None else "return"
        preset = ", ".join(f"{k}={v}" for k, v in getattr(self.args, "preset", {}).items())
        print(
            f"{self.algorithm} on {data.name}: {len(data.obs):,} transitions, "
            f"{len(data.episode_return):,} episodes, {self.unit} {score:.1f}; "
            f"seed {self.args.seed}, {self.device}, "
            f"precision {torch.get_float32_matmul_precision()}"
            + (f"; preset {preset}" if preset else "")
            + (f"; resumed after {self.resume_at[0]} step {self.resume_at[1]}" if restored else ""),
            flush=True,
        )
        size = data.reward.abs().mean().item()
        if hasattr(self.args, "gamma") and not 1e-3 < size * horizon < 1e5:
            print(
                f"note: rewards are {size:.2g} in size, on average, so values near "
                f"{size * horizon:.2g}; networks and learning rates here are made for values of "
                "1 to 10,000: multiply the file's rewards by a constant"
            )

    def score(self, returns) -> float:
        """Normalized score x 100 of episode returns; the mean raw return where there is no task."""
        return float(self.task.score(returns) if self.task else np.mean(returns))

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
        self.clock, self.logged = time.time(), (time.time(), first - 1)
        try:
            for t in range(first, steps + 1):
                yield t
                self.bar.update()
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
            result = {"return": returns.mean(), "score": self.score(returns)}
            row = {"step": t, "seconds": f"{self.train_seconds:.2f}", **result}
            self.rows["eval"].append(row | {f"episode_{i}": x for i, x in enumerate(returns)})
            self._save_rows("eval")
            self._board({f"charts/{name}": value for name, value in result.items()}, t)
            self._say(t, f"{self.unit} {result['score']:.1f}")

    def evaluate(self, act) -> np.ndarray:
        """Returns (eval_episodes,) of a policy, on start states fixed by the run's seed."""
        start = time.time()
        returns = evaluate(act, self.envs, 1000 * self.args.seed + 100, self.device)
        self.clock = time.time()
        self.eval_seconds += self.clock - start
        return returns

    def reference(self, label: str, act) -> None:
        """Score a policy that is not this run's result; the final line and the curve name it."""
        if self.task:
            self.references[label] = self.score(self.evaluate(act))
            print(f"{label}: {self.unit} {self.references[label]:.1f}", flush=True)

    def cached(self, stage: str, module: nn.Module, *settings):
        """The file that holds `module` as trained by an earlier run on the same data, seed and
        settings, for runs to share; loads it where it exists. Returns (path, loaded)."""
        shapes = [tuple(p.shape) for p in module.state_dict().values()]
        key = repr((self.algorithm, stage, self.data.digest, self.args.seed, settings, shapes))
        name = f"{self.env_name}__{stage}__{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
        path = Path(self.args.out) / "cache" / name
        if self.resume_at or not path.exists():
            return path, False
        module.load_state_dict(load_tensors(path))
        print(f"{stage}: read from {path}", flush=True)
        return path, True

    def share(self, path: Path, module: nn.Module) -> None:
        """Keep a trained stage where `cached` looks for it."""
        try:
            save_tensors(path, module.state_dict())
        except OSError as error:
            print(f"{path} not saved ({error.strerror}): training goes on", file=sys.stderr)

    def finish(self) -> float | None:
        """Write summary.json and curve.png, print the final line, return the mean score of the last
        10 evaluations (None without an evaluation task)."""
        scores = [float(row["score"]) for row in self.rows["eval"]]
        final = float(np.mean(scores[-10:])) if scores else None
        summary = {
            "score": final,
            "evaluations": len(scores),
            "last": scores[-1] if scores else None,
        }
        summary |= {"best": max(scores, default=None), "references": self.references}
        summary |= {"train_seconds": self.train_seconds, "eval_seconds": self.eval_seconds}
        if scores:
            self._curve()
        self._board({}, 0)
        for name, content in list(self.unsaved.items()):  # what a full disk refused: once more
            self._save(name, content)
        if not self.unsaved:  # a summary means that all is saved
            self._save("summary.json", json.dumps(summary, indent=2).encode())
        if self.unsaved:
            names = ", ".join(sorted(self.unsaved))
            raise InputError(
                f"{self.folder}: {names} could not be saved: free some space and repeat the "
                "command with --resume" + (f" (the score was {final:.1f})" if scores else "")
            )
        parts = [f"{self.algorithm} {self.unit} {final:.1f}"] if scores else [self.algorithm]
        parts += [f"{label} {value:.1f}" for label, value in self.references.items()]
        seconds = self.train_seconds + self.eval_seconds
        print(" | ".join([*parts, f"{seconds:.0f} s", str(self.folder)]), flush=True)
        return final

    def _finished(self):
        """Leave: the same run is finished. InputError where it had other settings."""
        try:
            then = dict(json.loads((self.folder / "config.json").read_text())["args"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{self.folder}/config.json is damaged: add --overwrite") from None
        for key, value in json.loads(json.dumps(vars(self.args), default=str)).items():
            if key not in (*CONTROL, "preset") and then.get(key) != value:
                raise InputError(
                    f"{self.folder} is finished, with {key}={then.get(key)}, not {value}: "
                    "add --overwrite or a new --name"
                )
        print(f"{self.folder} is finished: nothing to resume")
        raise SystemExit(0)

    def _stop(self, *_):
        if self.stopped:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.stopped = True

    def _leave(self, t):
        command = shlex.join(["python", *sys.argv, *([] if self.args.resume else ["--resume"])])
        saved = f"saved at {self.phase} step {t}" if self.checkpoint.exists() else "not saved"
        print(f"\nstopped, {saved}; continue with: {command}", flush=True)
        raise SystemExit(130)

    def _say(self, t, text):
        if self.bar.disable:
            rate = (t - self.logged[1]) / max(time.time() - self.logged[0], 1e-9)
            left = (self.phase_steps - t) / max(rate, 1e-9)
            print(
                f"{self.phase} {t:,}/{self.phase_steps:,} {text} {rate:.0f}/s, {left:.0f} s left",
                flush=True,
            )
        else:
            self.bar.set_postfix_str(text)

    def _tick(self):
        now = time.time()
        self.train_seconds, self.clock = self.train_seconds + now - self.clock, now

    def _values(self, t):
        """The metrics as numbers; InputError where one is not finite."""
        values = {k: v.item() for k, v in self.last.items()}
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if bad:
            kept = f"the last good checkpoint is {self.checkpoint}"
            kept = kept if self.checkpoint.exists() else "no checkpoint was due yet"
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
        self._save_rows(self.phase)
        prefix = "losses" if self.phase == "train" else self.phase
        scalars = {f"{prefix}/{k}": v for k, v in values.items()}
        self._board(scalars | {"charts/updates_per_second": rate}, t)
        self._values(t)
        for name in {"q_mean", "q_data", "q_pi", "target"} & values.keys():
            first = self.first_values.setdefault(name, abs(values[name]))
            if abs(values[name]) > 2 * self.largest_return + 10 * first:
                print(
                    f"note: {name} is {values[name]:.3g} at step {t}, but no policy can reach more "
                    f"than {self.largest_return:.3g} with the data's rewards: Q runs away where "
                    "there is no data; strengthen the regularizer (its flags come first in --help)"
                )
                self.largest_return = math.inf  # said once
        if not self.task or self.phase != "train":
            if t % (10 * self.args.log_every) == 0 or t == self.phase_steps:
                self._say(t, ", ".join(f"{k} {v:.3g}" for k, v in list(values.items())[:3]))

    def _save(self, name, content: bytes):
        """Write a file of this run; a full disk is said once and training goes on."""
        try:
            write_atomic(self.folder / name, content)
            self.unsaved.pop(name, None)
        except OSError as error:
            if name not in self.unsaved:
                print(
                    f"{self.folder / name} not saved ({error.strerror}): free some space; "
                    "training goes on and saving is tried again",
                    file=sys.stderr,
                )
            self.unsaved[name] = content

    def _save_rows(self, name):
        rows, text = self.rows[name], io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)))
        writer.writeheader()
        writer.writerows(rows)
        self._save(f"{name}.csv", text.getvalue().encode())

    def _save_checkpoint(self, t):
        rng = [torch.get_rng_state()]
        rng += [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        buffer = io.BytesIO()
        torch.save(
            {
                "settings": json.dumps(self.settings),
                "phase": self.phase,
                "step": t,
                "last": self.last,
                "nets": self.nets.state_dict(),
                "opt": [o.state() for o in vars(self.opt).values()],
                "rng": rng,
                "rows": json.dumps(self.rows),
                "references": self.references,
                "seconds": [self.train_seconds, self.eval_seconds],
            },
            buffer,
        )
        self._save("checkpoint.pt", buffer.getvalue())

    def _restore(self, saved):
        if not isinstance(saved, dict) or "settings" not in saved:
            raise InputError(f"{self.checkpoint} is not a checkpoint: add --overwrite or a --name")
        then = json.loads(saved["settings"])
        for key in self.settings | then:
            if then.get(key) != self.settings.get(key):
                raise InputError(
                    f"{self.checkpoint} was made with {key}={then.get(key)}, not "
                    f"{self.settings.get(key)}: resume with the same settings, versions and files, "
                    "or add --overwrite or a new --name"
                )
        self.nets.load_state_dict(saved["nets"])
        for optimizer, state in zip(vars(self.opt).values(), saved["opt"]):
            for tensor, value in zip(optimizer.state(), state):
                tensor.copy_(value)
        self.resume_at, self.rng = (saved["phase"], saved["step"]), saved["rng"]
        self.rows, self.references = json.loads(saved["rows"]), saved["references"]
        self.last = saved["last"]
        self.train_seconds, self.eval_seconds = saved["seconds"]

    def _config(self):
        git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        return {
            "algorithm": self.algorithm,
            "args": vars(self.args),
            "command": shlex.join(sys.argv),
            "dataset": self.data.name,
            "dataset_sha256": self.data.digest,
            "task": self.task.id if self.task else None,
            "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {self.device}",
        }

    def _tensorboard(self, step):
        from torch.utils.tensorboard import SummaryWriter

        if self.args.track:
            import wandb

            settings = {"name": self.folder.name, "config": vars(self.args)}
            wandb.init(project="stayclose", sync_tensorboard=True, **settings)
        threading.excepthook = lambda failure: (  # a full disk: said by _board, not by its thread
            isinstance(failure.exc_value, OSError) or threading.__excepthook__(failure)
        )
        try:
            return SummaryWriter(self.folder, purge_step=step + 1 if step else None)
        except OSError as error:
            print(f"no TensorBoard events ({error.strerror})", file=sys.stderr)

    def _board(self, scalars, t):
        """Add scalars to the TensorBoard events; none given: write them out and close."""
        try:
            for tag, value in scalars.items():
                self.board and self.board.add_scalar(tag, value, t)
            self.board and (scalars or self.board.close())
        except OSError as error:
            print(f"TensorBoard events stop here ({error.strerror})", file=sys.stderr)
            self.board = None

    def _curve(self):
        import matplotlib.figure

        figure = matplotlib.figure.Figure((6, 4), layout="constrained")
        axes = figure.subplots()
        steps = [int(row["step"]) for row in self.rows["eval"]]
        axes.plot(steps, [float(r["score"]) for r in self.rows["eval"]], label=self.algorithm, lw=2)
        for i, (label, value) in enumerate(self.references.items()):
            axes.axhline(value, ls="--", c=f"C{i + 1}", label=f"{label} {value:.1f}")
        unit = "normalized score" if self.unit == "score" else "return"
        axes.set(xlabel="gradient steps", ylabel=unit, title=f"{self.data.name}, {self.task.id}")
        axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150)
        self._save("curve.png", buffer.getvalue())
