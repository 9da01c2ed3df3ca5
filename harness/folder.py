"""One run's folder: what is written there, whole or not at all, and what is read back.

{out}/{env}__{algorithm}[-{name}]__{seed}/
    config.json      arguments, versions, hashes of code and data, machine
    train.csv        losses and health scalars (an earlier phase has a file of its own)
    eval.csv         step, seconds, mean return, score, one column per episode
    events.out.*     the same for TensorBoard
    checkpoint.pt    weights, optimizers, random state; written to a temporary name, renamed
    summary.json     mean score of the last evaluations, how many they are, last, best, seconds
    curve.png        the learning curve
{out}/cache/         stages that runs share: clones, samples, critics
"""

import ast
import csv
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from common import InputError

ROOT = Path(__file__).resolve().parents[1]
HARNESS = ("run", "device", "datasets", "ogbench", "tasks")  # files that can change numbers
DATA_FILES = (".hdf5", ".h5", ".npz")


def node() -> str:
    """The name of this machine, without dots."""
    return re.sub(r"[^\w-]", "-", platform.node())


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary name, then rename: the file is whole or absent. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{node()}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors) -> None:
    """torch.save, atomically. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomic(path, buffer.getbuffer())


def load_tensors(path: Path):
    """What save_tensors wrote, on the CPU; nothing is unpickled. Raises InputError."""
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        if damaged := zipfile.ZipFile(path).testzip():  # torch itself compares no checksum
            raise ValueError(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise nearly anything
        line = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise InputError(f"{path} cannot be read ({line}): delete it and start again") from None


def read_json(path: Path):
    """Parsed JSON of a file. Raises OSError, or ValueError for whatever is damaged."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("it is not a file")
    try:
        return json.loads(path.read_text())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def code_hash(*paths) -> str:
    """12 hex digits of the syntax trees of source files. Docstrings, comments, layout and the table
    PRESETS do not count: they change no number of a run whose arguments are known."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(_syntax(Path(path).read_text()))
    return digest.hexdigest()[:12]


@functools.cache
def _syntax(text: str) -> bytes:
    """What code_hash counts of a source file."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text_or_presets(line)]
    return ast.dump(tree).encode()


def _is_text_or_presets(node) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PRESETS"


def code_hashes(algorithm_file) -> dict:
    """Hashes of the code that a run's numbers depend on."""
    harness = [Path(__file__).with_name(f"{name}.py") for name in HARNESS]
    return {
        "algorithm": code_hash(algorithm_file),
        "common": code_hash(sys.modules["common"].__file__),
        "harness": code_hash(*(path for path in harness if path.exists())),
    }


def git_state(root=ROOT) -> dict:
    """The commit of the checkout, and whether git sees edits in it; None without git."""

    def git(*words):
        try:
            line = ["git", "-C", str(root), *words]
            return subprocess.run(line, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None

    commit, edits = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    if not commit or commit.returncode or not edits or edits.returncode:
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": bool(edits.stdout.strip())}


class Folder:
    """The folder of one run. `open` makes and locks it; `save` never raises for a full disk: the
    run goes on, and what could not be written is tried again."""

    def __init__(self, args, algorithm: str):
        env = Path(args.env).stem if args.env.lower().endswith(DATA_FILES) else args.env
        self.env_name = re.sub(r"[^\w.-]+", "-", env)
        if not re.fullmatch(r"[\w.-]*", args.name):
            raise InputError(f"--name is {args.name!r}: use letters, digits, '.', '_' and '-' only")
        variant = f"-{args.name}" if args.name else ""
        self.out = Path(args.out)
        self.path = self.out / f"{self.env_name}__{algorithm}{variant}__{args.seed}"
        self.checkpoint = self.path / "checkpoint.pt"
        self.write, self.unsaved, self.board = write_atomic, {}, None

    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    def exists(self) -> bool:
        return (self.path / "config.json").exists()

    def config(self) -> dict:
        """config.json as it lies there. Raises InputError."""
        try:
            config = dict(read_json(self.path / "config.json"))
            dict(config["args"]), dict(config.get("settings", {}))
            return config
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.path}/config.json is damaged: add --overwrite or a new --name"
            ) from None

    def open(self) -> None:
        """Make the folder, lock it for this process, remove what a killed save left behind."""
        try:
            (self.out / "cache").mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=True)
            self.lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise InputError(f"--out {self.out}: {error.strerror}; use another folder") from None
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except BlockingIOError:
            raise InputError(f"{self.path} is being trained by another process") from None
        for left in self.path.glob("*.tmp"):
            left.unlink(missing_ok=True)
        for left in (self.out / "cache").glob("*.tmp"):
            if _is_abandoned(left):
                left.unlink(missing_ok=True)

    def close(self) -> None:
        """Let other processes have the folder."""
        self.lock.close()

    def clear(self) -> None:
        """Remove what an earlier run wrote. Raises InputError."""
        for pattern in ("*.csv", "*.json", "events.out.*", "checkpoint.pt", "curve.png"):
            for old in self.path.glob(pattern):
                try:
                    old.unlink()
                except OSError as error:
                    raise InputError(
                        f"{old} cannot be removed ({error.strerror}): remove it or use a new --name"
                    ) from None

    def save(self, name: str, content: bytes) -> None:
        """Write a file of this run; a full disk is said once."""
        try:
            self.write(self.path / name, content)
            self.unsaved.pop(name, None)
        except OSError as error:
            if name not in self.unsaved:
                print(
                    f"{self.path / name} not saved ({error.strerror}): free some space; "
                    "training goes on and saving is tried again",
                    file=sys.stderr,
                )
            self.unsaved[name] = content

    def save_json(self, name: str, content: dict) -> None:
        self.save(name, json.dumps(content, indent=2, default=str).encode())

    def save_rows(self, name: str, rows: list[dict]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)))
        writer.writeheader()
        writer.writerows(rows)
        self.save(f"{name}.csv", text.getvalue().encode())

    def save_checkpoint(self, content: dict) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        self.save("checkpoint.pt", buffer.getvalue())

    def save_again(self) -> None:
        """Try once more to write what a full disk refused."""
        for name, content in list(self.unsaved.items()):
            self.save(name, content)

    # ---- stages that runs share --------------------------------------------------------------

    def cache_path(self, stage: str, suffix: str, *key) -> Path:
        """The file of a shared stage; `key` is everything that it depends on."""
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
        return self.out / "cache" / f"{self.env_name}__{stage}__{digest}{suffix}"

    def chunks(self, stage: str, shape: tuple, count: int, *key):
        """A table of float32 `shape` on disk and a mark (0 or 1) for each of its `count` chunks,
        both as tensors: what is written to them survives a kill. Raises InputError where the disk
        is too small: every byte is reserved here."""
        path, total = self.cache_path(stage, ".f32", *key), math.prod(shape)
        try:
            with open(path, "a+b") as file:
                reserve = getattr(os, "posix_fallocate", lambda *_: None)
                reserve(file.fileno(), 0, 4 * (total + count))
                flat = np.memmap(file, np.float32, "r+", shape=(total + count,))
        except OSError as error:
            raise InputError(f"--out {self.out}: {error.strerror}; use another folder") from None
        return torch.from_numpy(flat[:total].reshape(shape)), torch.from_numpy(flat[total:])

    # ---- TensorBoard -------------------------------------------------------------------------

    def open_board(self, step: int) -> None:
        """Start the TensorBoard events, or continue them after `step`."""
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = lambda failure: (  # a full disk: said by board_add, not by a thread
            isinstance(failure.exc_value, OSError) or threading.__excepthook__(failure)
        )
        try:
            self.board = SummaryWriter(self.path, purge_step=step + 1 if step else None)
        except OSError as error:
            print(f"no TensorBoard events ({error.strerror})", file=sys.stderr)

    def board_add(self, scalars: dict, t: int) -> None:
        """Add scalars to the TensorBoard events; none given: write them out and close."""
        if not self.board:
            return
        try:
            for tag, value in scalars.items():
                self.board.add_scalar(tag, value, t)
            if not scalars:
                self.board.close()
        except OSError as error:
            print(f"TensorBoard events stop here ({error.strerror})", file=sys.stderr)
            self.board = None

    def save_curve(self, label: str, rows: list[dict], references: dict, title: str, unit: str):
        """curve.png: the score over gradient steps, beside the references."""
        import matplotlib.figure

        # Between two dollars matplotlib reads a formula, and a name that is none would raise.
        label, title = (text.replace("$", r"\$") for text in (label, title))
        figure = matplotlib.figure.Figure((6, 4), layout="constrained")
        axes = figure.subplots()
        steps = [int(row["step"]) for row in rows]
        axes.plot(steps, [float(row["score"]) for row in rows], "o-", ms=3, lw=2, label=label)
        for i, (name, value) in enumerate(references.items()):
            axes.axhline(value, ls="--", c=f"C{i + 1}", label=f"{name} {value:.1f}")
        axes.set(xlabel="gradient steps", ylabel=unit, title=title)
        axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150)
        self.save("curve.png", buffer.getvalue())


def _is_abandoned(temporary: Path) -> bool:
    """Whether the process that wrote a temporary file is gone: the file's name holds the machine
    and the number of the process. On another machine, a day must have passed."""
    *_, writer, number, _ = f"..{temporary.name}".rsplit(".", 3)
    try:
        if writer != node():
            return time.time() - temporary.stat().st_mtime > 86_400
        os.kill(int(number), 0)
    except (ValueError, ProcessLookupError):
        return True
    except OSError:  # another user's process, or a file that is gone
        return False
    return False


def machine(device) -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {device}"
