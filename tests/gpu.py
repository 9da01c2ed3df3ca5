"""The GPU's path on a GPU, in about ten minutes: do eager, replayed and compiled updates agree, how
fast is every file, does a training reach its score? What it prints is made for a bug report.

    python tests/gpu.py                         # everything
    python tests/gpu.py --files td3_bc --all    # some files; compiled, too
    python tests/gpu.py --device cpu --files bc # without a GPU: whether this script works

Every file runs in a process of its own, so that an error of CUDA ends no other. In a phase, ten
updates are taken three times from the same networks: eagerly; as training takes them (three eager
calls, then a CUDA graph that is replayed); and compiled. First, every draw of a shape is the same
tensor, which leaves arithmetic alone to differ; then draws come from the device's own generator,
seeded alike, which shows whether a replay draws what an eager update draws.
"""

import argparse
import importlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms"), str(ROOT / "tests")]

import torch
from stand_in import PlainRun
from torch.overrides import TorchFunctionMode

from common import Data
from run import parse, prepare_device
from tools import speed

COMPILED = ("td3_bc", "iql", "cql", "fisher_brc")  # half a minute each
AGREE = 1e-4  # difference of a metric, relative to its size


class Fixed(TorchFunctionMode):
    """Every draw of a kind and shape is the same tensor, made on the host before any capture."""

    NAMES = ("rand", "randn", "randint", "rand_like", "randn_like", "randint_like")

    def __init__(self, device):
        super().__init__()
        self.device, self.made = device, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name not in self.NAMES:
            return function(*args, **kwargs)
        tensors = name.endswith("_like")
        key = (name, args[0].shape, *args[1:]) if tensors else (name, str(args))
        if key not in self.made:
            inputs = (args[0].cpu(), *args[1:]) if tensors else args
            options = {k: v for k, v in kwargs.items() if k not in ("device", "generator")}
            draw = torch.Generator().manual_seed(len(self.made))
            if tensors:
                function = getattr(torch, name.removesuffix("_like"))
                inputs = (*args[1:], tuple(args[0].shape))
                options["dtype"] = args[0].dtype
            self.made[key] = function(*inputs, **options, generator=draw).to(self.device)
        return self.made[key].clone()


class TenSteps(PlainRun):
    """Ten steps of every phase, past any warm start, each phase from the same seed."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def loop(self, steps, phase="train"):
        super().loop(steps, phase)
        torch.manual_seed(1)
        return range(steps // 2 + 1, steps // 2 + 11)


def rows(device, n=2_000) -> Data:
    """Episodes of 50 random steps, each ended by a terminal."""
    draw = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, n, 17, generator=draw)
    action = torch.rand(n, 6, generator=draw) * 1.8 - 0.9
    reward = torch.randn(n, generator=draw)
    terminal = (torch.arange(n) % 50 == 49).float()
    return Data(*(x.to(device) for x in (obs, action, reward, next_obs, terminal)))


def ten_steps(module, device, graphed, compile=False) -> dict:
    """{"phase metric": ten values} of the file's own `train` with another `graphed`."""
    own, module.graphed = module.graphed, graphed
    torch.manual_seed(0)
    run = TenSteps(device)
    try:
        module.train(run, rows(device), module.Args(batch_size=64, compile=compile))
    finally:
        module.graphed = own
    return {
        f"{phase} {key}": [row[key] for row in table if key in row]
        for phase, table in run.phases.items()
        for key in dict.fromkeys(key for row in table for key in row)
    }


def largest_difference(a: dict, b: dict) -> tuple[float, str]:
    """The largest difference of two tables of metrics, relative to a metric's size, and where."""
    if a.keys() != b.keys():
        return float("inf"), "other metrics"
    worst = (0.0, "")
    for key in a:
        size = max(1.0, *(abs(x) for x in a[key]))
        for t, (x, y) in enumerate(zip(a[key], b[key], strict=True), 1):
            difference = abs(x - y) / size if x == x and y == y else float("inf")
            worst = max(worst, (difference, f"{key}, update {t}"))
    return worst


def plain(update, *inputs, compile=False):
    """`graphed` without a graph."""
    return lambda *constants: update(*inputs, *constants)


def compare(name, device, compiled: bool) -> None:
    """Print how far the ways are apart."""
    module = importlib.import_module(name)
    graphed = module.graphed

    def say(way, draws, eager, other):
        worst, where = largest_difference(eager, other)
        verdict = "agree" if worst <= AGREE else f"DIFFER in {where}"
        print(f"{name}: eager and {way}, {draws} draws: {worst:.1e}, {verdict}", flush=True)

    with Fixed(device):
        eager = ten_steps(module, device, plain)
        say("replayed", "fixed", eager, ten_steps(module, device, graphed))
    eager = ten_steps(module, device, plain)
    say("replayed", "seeded", eager, ten_steps(module, device, graphed))
    if compiled:
        say("compiled", "seeded", eager, ten_steps(module, device, graphed, compile=True))


def measure(name, device, compiled: bool) -> None:
    """Print updates per second of every phase, with default settings."""
    for compile in (False, True) if compiled else (False,):
        args, _ = parse(speed.Args, {}, ["--seconds", "2", "--device", str(device)])
        args.compile = compile
        rows, _ = speed.measure(name, args, device)
        for row in rows:
            kind = "compiled" if compile else "not compiled"
            print(
                f"{name}: {row['phase']}, {kind}: {row['updates_per_second']:.0f} updates/s, "
                f"{row['minutes_per_million']} minutes per million",
                flush=True,
            )


def one_file(name, device, compiled: bool) -> None:
    """What the process of one file does."""
    torch.set_num_threads(1)
    device = prepare_device(device, "highest")
    compare(name, device, compiled)
    measure(name, device, compiled)


def start(command, limit: int) -> None:
    """Run a process and pass on what it prints; of an error, the last lines."""
    began = time.time()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        out, error = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, error = process.communicate()
        error = f"not finished after {limit} s"
    print(out, end="")
    if process.returncode:
        lines = "\n    ".join(error.strip().splitlines()[-12:])
        print(f"FAILED: {' '.join(command[1:])} (status {process.returncode})\n    {lines}")
    print(f"({time.time() - began:.0f} s)", flush=True)


def machine(device) -> str:
    """Everything about the machine that numbers depend on."""
    line = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(line, capture_output=True, text=True).stdout.strip() or "unknown"
    parts = [f"commit {commit}", f"Python {platform.python_version()}"]
    parts += [f"PyTorch {torch.__version__}", speed.processor(), f"{os.cpu_count()} cores"]
    if device.type == "cuda":
        name = torch.cuda.get_device_properties(device)
        parts += [f"{name.name}, {name.total_memory >> 30} GiB, compute {name.major}.{name.minor}"]
        parts += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
            parts += [f"driver {driver[0]}"] if driver else []
        except OSError:
            pass
    return ", ".join(parts)


def main() -> None:
    names = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try this script out")
    parser.add_argument("--files", nargs="+", choices=names, default=names, metavar="FILE")
    parser.add_argument("--all", action="store_true", help="compile every file, not four of them")
    parser.add_argument("--one", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"tests/gpu.py checks the updates on a GPU, and PyTorch {torch.__version__} finds none "
            "here: nothing was checked"
        )
    if args.one:
        one_file(args.one, args.device, args.all)
        return
    print(machine(torch.device(args.device)), flush=True)
    for name in args.files:
        line = [sys.executable, str(Path(__file__)), "--one", name, "--device", args.device]
        start(line + ["--all"] * (args.all or name in COMPILED), limit=300)
    with tempfile.TemporaryDirectory() as folder:
        steps = [] if args.device == "cuda" else ["--steps", "20", "--eval-every", "20"]
        line = [sys.executable, str(ROOT / "algorithms" / "td3_bc.py"), "--device", args.device]
        start([*line, "--out", folder, *steps], limit=600)


if __name__ == "__main__":
    main()
