"""Checkpoints, Ctrl-C and the identity of a run: a guest of run.py that changes no number.

{out}/{env}__{algorithm}[-{name}]__{seed}/
    config.json      arguments, versions, hashes of code and data, machine
    checkpoint.pt    weights, optimizers, random state, written whole or not at all
    kept-*.pt        parts of a long table, until the run is finished
    .lock            held while a process trains here
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import filelock
import torch

from common import InputError, in_one_line

ROOT = Path(__file__).resolve().parents[1]
# Flags that may differ between a run and its continuation: none of them changes a number. A clone
# counts by its content, wherever it lies.
CONTROL = ("device", "log_every", "save_every", "out", "resume", "overwrite", "track", "clone")
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics", "ogbench")
INSTEAD = "add --overwrite or a new --name"

# ---- files -----------------------------------------------------------------------------------


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary name, then rename: the file is whole or absent; one of tensors (.pt)
    also after a power cut. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # never written through a link
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            if path.suffix == ".pt":
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_bytes(tensors) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def load_tensors(path: Path):
    """What torch.save wrote, on the CPU; nothing is unpickled. Raises InputError."""
    with in_one_line(path, "correct the path, or repeat the command when it can be read"):
        if not path.is_file():
            raise ValueError("it is not a file")
        content = io.BytesIO(path.read_bytes())  # what fails so far is no damage
    try:
        if damaged := zipfile.ZipFile(content).testzip():  # torch itself compares no checksum
            raise ValueError(f"wrong checksum of {damaged}")
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)
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


# ---- identity --------------------------------------------------------------------------------


def code_hash(*paths) -> str:
    """12 hex digits of the syntax trees of source files. Docstrings, comments, layout and the
    tables PRESETS and DEPARTURES do not count: they change no number of a run whose arguments are
    known."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(_syntax(Path(path).read_text()))
    return digest.hexdigest()[:12]


@functools.cache
def _syntax(text: str) -> bytes:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text_or_table(line)]
    return ast.dump(tree).encode()


def _is_text_or_table(node) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    tables = ("PRESETS", "DEPARTURES")
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in tables


def code_hashes(algorithm_file, readers: bool) -> dict:
    """Hashes of the code that a run's numbers depend on; `readers`: whether they and the tasks
    belong to it."""
    own = {"algorithm": algorithm_file, "common": ROOT / "common.py", "run": ROOT / "run.py"}
    hashes = {name: code_hash(path) for name, path in own.items()}
    if readers:
        paths = sorted((ROOT / "harness" / "readers").glob("*.py"))
        hashes["readers and tasks"] = code_hash(*paths, ROOT / "harness" / "tasks.py")
    return hashes


def versions() -> dict:
    """Versions of the packages that can change a number; those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(root=ROOT) -> dict:
    """The commit of the checkout, and whether git sees edits in it; None without git."""

    def git(*words):
        line = ["git", "-C", str(root), *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=20, check=True).stdout

    try:
        commit, edits = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": bool(edits.strip())}


# ---- the guest -------------------------------------------------------------------------------


class Guest:
    """What run.py tells: loaded, start, begin and end (of a phase), step, row, finish. A save
    never raises for a full disk: the run goes on, and what could not be written is tried again."""

    def __init__(self, run):
        args, self.run, self.folder = run.args, run, run.folder
        self.file = sys.modules[type(args).__module__].__file__
        self.checkpoint, self.lock = self.folder / "checkpoint.pt", None
        self.at, self.stopped, self.unsaved, self.handlers = None, False, {}, {}
        run.save, run.read_clone, run.kept = self.save, self.read_clone, self.kept
        if args.resume and args.overwrite:
            raise InputError("--resume continues a run and --overwrite deletes it: use one of them")
        if not re.fullmatch(r"[\w.-]*", args.name):
            raise InputError(f"--name is {args.name!r}: use letters, digits, '.', '_' and '-' only")
        self._check_folder()
        typed = {word.split("=")[0][2:].replace("-", "_") for word in run.words}
        if getattr(args, "clone", None):
            useless = sorted(typed & {*args.clone_flags})
            if useless:
                raise InputError(f"--{useless[0].replace('_', '-')} trains a clone, and --clone "
                                 "reads one: use one of them")  # fmt: skip
            self.clone = load_tensors(Path(args.clone))

    def _check_folder(self):
        """Raises InputError for a folder that cannot be made, or that holds a run which nobody
        asked to continue or to replace."""
        with in_one_line(self.folder, "use another --out or --name"):
            there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
            with contextlib.suppress(FileNotFoundError):
                (there / self.folder.name).lstat()  # raises for too long a name
            if not (there.is_dir() and os.access(there, os.W_OK)):
                raise ValueError(f"nothing can be written in {there}")
        asked = self.run.args.resume or self.run.args.overwrite
        if os.path.exists(self.folder / "config.json") and not asked:
            raise InputError(f"{self.folder} exists: add --resume, --overwrite, or a new --name")

    def loaded(self):
        """The data is known, and so is everything that a number depends on. With --resume, a
        finished run ends here: with status 0, or with InputError where anything differs."""
        args, run, self.hashes = self.run.args, self.run, self.code()
        self.settings = {k: v for k, v in vars(args).items() if k not in CONTROL}
        self.settings |= {"algorithm": run.algorithm, "data": run.data.digest}
        self.settings |= {f"code of {k}": v for k, v in self.hashes.items()}
        self.settings |= {f"version of {k}": v for k, v in versions().items() if k != "python"}
        if run.task and run.task.get("robot"):
            self.settings["robot"] = run.task["robot"]
        if getattr(args, "clone", None):
            self.settings["clone"] = hashlib.sha256(Path(args.clone).read_bytes()).hexdigest()[:16]
        if args.resume and os.path.exists(self.folder / "summary.json"):
            self._compare(self._earlier().get("settings"), f"{self.folder} is finished, with")
            print(f"{self.folder} is finished: there is nothing to resume")
            raise SystemExit(0)

    def code(self) -> dict:
        """Hashes of all code that the run's numbers depend on, by name."""
        args, bundled = self.run.args, {path.stem for path in (ROOT / "data").glob("*.npz")}
        readers = args.env not in bundled or args.eval_env not in (None, "none")
        return code_hashes(self.file, readers)

    def _earlier(self) -> dict:
        """config.json as it lies there. Raises InputError."""
        try:
            config = dict(read_json(self.folder / "config.json"))
            dict(config["args"]), dict(config.get("settings", {}))
            return config
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            raise InputError(f"{self.folder}/config.json is damaged: {INSTEAD}") from None
        except OSError as error:
            raise InputError(f"{self.folder}/config.json cannot be read ({error.strerror}): repeat "
                             "the command when it can") from None  # fmt: skip

    def _compare(self, then, what):
        """Raises InputError where the settings of now are not those of `then`."""
        now = json.loads(json.dumps(self.settings, default=str))
        for key in now | then if then else ():
            if then.get(key) != now.get(key):
                raise InputError(
                    f"{what} {key} {then.get(key)!s:.200}, not {now.get(key)}: resume with the "
                    f"same settings, versions and files, or {INSTEAD}"
                )
        if not then:
            raise InputError(f"{what} code that is not known: {INSTEAD}")

    def start(self):
        """Lock the folder; restore the checkpoint with --resume, else remove an earlier run."""
        self.lock = filelock.FileLock(self.folder / ".lock", blocking=False)
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise InputError(f"{self.folder} is being trained by another process") from None
        except (OSError, NotImplementedError) as error:  # a file system without locks
            print(f"note: {self.folder} cannot be locked ({error}): start no second run in it")
        self._check_folder()  # an equal command may have finished while this one read the data
        self._remove("*.tmp")
        self.restored = self.run.args.resume and self.checkpoint.exists()
        if self.restored:
            self._restore()
            print(f"resumed:    after {self.at[0]} step {self.at[1]:,}")
        else:
            self._remove("*.csv", "*.json", "events.out.*", "*.pt", "curve.png")
        self.save("config.json", json.dumps(self.config(), indent=2, default=str).encode())

    def config(self) -> dict:
        """What config.json tells of the run."""
        run = self.run
        return {
            "algorithm": run.algorithm,
            "args": vars(run.args),
            "preset": run.preset,
            "settings": self.settings,
            "command": shlex.join(run.words),
            "dataset": run.data.name,
            "dataset_sha256": run.data.digest,
            "clone_sha256": self.settings.get("clone"),
            "task": run.task["env_id"] if run.task else None,
            "code": self.hashes,
            **git_state(),
            "precision": run.args.precision,
            "versions": versions(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {run.device}",
            "threads": torch.get_num_threads(),
        }

    def _remove(self, *patterns):
        for pattern in patterns:
            for old in self.folder.glob(pattern):
                try:
                    old.unlink()
                except OSError as error:
                    raise InputError(
                        f"{old} cannot be removed ({error.strerror}): remove it or use a new --name"
                    ) from None

    def save(self, name: str, content: bytes) -> None:
        """Write a file of this run; a full disk is said once."""
        try:
            write_atomic(self.folder / name, content)
            self.unsaved.pop(name, None)
        except OSError as error:
            if name not in self.unsaved:
                print(
                    f"{self.folder / name} not saved ({error.strerror}): free some space, or "
                    "repair that; training goes on and saving is tried again",
                    file=sys.stderr,
                )
            self.unsaved[name] = content

    # ---- what run.py tells -------------------------------------------------------------------

    def begin(self):
        """A phase: skipped where the checkpoint is of a later one, continued where it is of this
        one. Ctrl-C and SIGTERM wait for the end of a step."""
        run = self.run
        if self.at and self.at[0] != run.phase:
            run.first = run.phase_steps + 1
        elif self.at:
            run.first, run.last = self.at[1] + 1, self.last
            torch.set_rng_state(self.rng[0])
            if run.device.type == "cuda" and len(self.rng) > 1:
                torch.cuda.set_rng_state(self.rng[1], run.device)
            self.at = None
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self._stop)

    def end(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _stop(self, *_):
        if self.stopped:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.stopped = True

    def step(self, t):
        """Save a checkpoint where step t asks for one, and leave after a Ctrl-C."""
        run, last = self.run, self.run.phase_steps
        due = self.stopped or t == last or t % run.args.save_every == 0
        if run.task and run.phase == "train":  # the next step may evaluate, and a task can raise
            due = due or t + 1 == last or (t + 1) % run.args.eval_every == 0
        if due:
            self.row(run.phase, t, {key: x.item() for key, x in run.last.items()})
            self._save_checkpoint(t)
        if self.stopped:
            saved = f"saved at {run.phase} step {t}"
            if "checkpoint.pt" in self.unsaved:
                saved = "not saved"
            print(f"\nstopped, {saved}; continue with: {self.continuation()}", flush=True)
            raise SystemExit(130)

    def row(self, name, t, values):
        """Raises InputError for a metric that is not finite: such a state replaces no
        checkpoint."""
        bad = [key for key, x in values.items() if name != "eval" and not abs(x) < float("inf")]
        if bad:
            kept = f"the last good checkpoint is {self.checkpoint}"
            kept = kept if self.checkpoint.exists() else "no checkpoint was due yet"
            raise InputError(
                f"{name} step {t}: {bad[0]} is {values[bad[0]]}; training diverged, {kept}: "
                "lower the learning rates or strengthen the regularizer"
            )

    def finish(self, summary):
        """Try once more to write what a full disk refused. Raises InputError where it still does:
        a summary means that all is saved."""
        for name, content in list(self.unsaved.items()):
            self.save(name, content)
        if self.unsaved:
            names, score = ", ".join(sorted(self.unsaved)), summary["score"]
            raise InputError(
                f"{self.folder}: {names} could not be saved: free some space, or repair "
                "the folder, and repeat the command with --resume"
                + (f" (the score was {score:.1f})" if score else "")
            )
        self._remove("kept-*.pt")

    def continuation(self) -> str:
        """The command that continues this run."""
        dropped = ("--overwrite", "--no-overwrite", "--resume", "--no-resume")
        words = [word for word in self.run.words if word.replace("_", "-") not in dropped]
        python = shutil.which("python")
        same = python and os.path.samefile(python, sys.executable)
        return shlex.join(["python" if same else sys.executable, *words, "--resume"])

    # ---- checkpoints -------------------------------------------------------------------------

    def _save_checkpoint(self, t):
        run, rng = self.run, [torch.get_rng_state()]
        odd = [k for k, x in run.nets.state_dict().items() if not x.isfinite().all()]
        if odd:
            self.row(run.phase, t, {f"the weight {odd[0]}": math.nan})
        rng += [torch.cuda.get_rng_state(run.device)] if run.device.type == "cuda" else []
        content = {
            "settings": json.dumps(self.settings, default=str),
            "phase": run.phase,
            "step": t,
            "ended": t == run.phase_steps,
            "last": run.last,
            "nets": run.nets.state_dict(),
            "opt": [o.state() for o in vars(run.opt).values()],
            "rng": rng,
            "rows": json.dumps(run.rows),
            "references": run.references,
            "seconds": [run.train_seconds, run.eval_seconds],
        }
        self.save("checkpoint.pt", to_bytes(content))

    def _restore(self):
        """Read the checkpoint. InputError where it is damaged or another run's."""
        saved = load_tensors(self.checkpoint)
        try:
            then = dict(json.loads(saved["settings"]))
        except (KeyError, TypeError, ValueError, RecursionError):
            raise InputError(f"{self.checkpoint} is not a checkpoint: {INSTEAD}") from None
        self._compare(then, f"{self.checkpoint} was made with")
        try:
            self._take(saved)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{self.checkpoint} does not fit this run ({line:.100}): {INSTEAD}"
            ) from None

    def _take(self, saved):
        run = self.run
        run.nets.load_state_dict(saved["nets"])
        for optimizer, state in zip(vars(run.opt).values(), saved["opt"], strict=True):
            for tensor, value in zip(optimizer.state(), state, strict=True):
                if tensor.shape != value.shape:
                    raise ValueError(f"an optimizer's tensor has shape {tuple(value.shape)}")
                tensor.copy_(value)
        phase, step = saved["phase"], saved["step"]
        if phase not in type(run.args).phases or type(step) is not int or step < 0:
            raise ValueError(f"phase {phase!r}, step {step!r}")
        self.at, self.rng = (phase, step), saved["rng"]
        torch.Generator().set_state(self.rng[0])  # raises for what is no state
        run.rows, run.references = json.loads(saved["rows"]), dict(saved["references"])
        for row in run.rows["eval"]:
            float(row["score"]), int(row["step"])
        {k: float(v) for k, v in run.references.items()}
        self.last = {k: v.to(run.device) for k, v in saved["last"].items()}
        run.train_seconds, run.eval_seconds = map(float, saved["seconds"])

    def read_clone(self, module):
        """Load `module` from the checkpoint that --clone names. Raises InputError for one of other
        data, of another normalization, of other shapes, or whose clone was not finished."""
        run, path, saved = self.run, self.run.args.clone, self.clone
        name = next(name for name, x in run.nets.named_modules() if x is module)
        try:
            then, weights = dict(json.loads(saved["settings"])), dict(saved["nets"])
            first = next(iter(type(run.args).phases))
            finished = saved["phase"] != first or saved["ended"]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise InputError(f"{path} is not a checkpoint: use a checkpoint.pt of a run") from None
        for key in ("data", "normalize_obs"):
            if then.get(key) != self.settings.get(key):
                raise InputError(f"{path}: its clone was trained with {key} {then.get(key)!s:.60}, "
                                 f"not {self.settings.get(key)}: use a clone of equal "
                                 "data")  # fmt: skip
        if not finished:
            raise InputError(f"{path}: its clone is not finished: finish that run with --resume")
        weights = {k[len(name) + 1 :]: x for k, x in weights.items() if k.startswith(f"{name}.")}
        try:
            module.load_state_dict(weights)
        except (RuntimeError, AttributeError) as error:
            line = (str(error).splitlines() or ["other names"])[-1].strip()
            raise InputError(f"{path}: its clone has other shapes ({line:.100}): use a clone of "
                             "equal networks") from None  # fmt: skip
        print(f"clone: read from {path}", flush=True)

    def kept(self, name, compute):
        """compute(), a tensor, kept in the run's folder: a run that was killed reads it there,
        where its checksum is right."""
        path = self.folder / f"kept-{name}.pt"
        if self.restored and path.exists():
            try:
                return load_tensors(path).to(self.run.device)
            except (InputError, AttributeError):
                print(f"{path} is damaged, and computed again", file=sys.stderr)
        value = compute()
        self.save(path.name, to_bytes(value.cpu()))
        return value

    # ---- interruptions -----------------------------------------------------------------------

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self.end()
        if self.lock:
            self.lock.release()
        if isinstance(error, KeyboardInterrupt):
            saved = self.checkpoint.exists()
            how = f"; continue with: {self.continuation()}"
            print(f"\nstopped{how if saved else ' before anything was saved'}", flush=True)
            raise SystemExit(130) from None
        if isinstance(error, BrokenPipeError):  # the reader of our lines has left: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        if lacks_memory(error):
            line = (str(error).strip().splitlines() or ["memory is full"])[0]
            size = self.run.args.batch_size
            raise InputError(
                f"out of memory ({line:.160}): use a --batch-size below {size}, or smaller networks"
            ) from None


def lacks_memory(error) -> bool:
    """Whether an allocation failed, on a CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    cause = "can't allocate memory|out of memory|size calculation over|bad_alloc"
    return isinstance(error, RuntimeError) and bool(re.search(cause, str(error)))
