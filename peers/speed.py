"""Updates per second of published code and of ours, in one run on one core: a table in Markdown.

    git clone https://github.com/tinkoff-ai/CORL
    git clone https://github.com/nissymori/JAX-CORL
    git clone https://github.com/EmptyJackson/unifloral
    python -m venv jax
    jax/bin/pip install "jax[cpu]" flax optax distrax omegaconf pydantic tqdm tyro
    python peers/speed.py CORL JAX-CORL unifloral --jax-python jax/bin/python

Each program trains TD3+BC, IQL or CQL on the same 200,000 synthetic rows (17 observations, 6
actions) in batches of 256, as it lies in its folder and with its default settings. Each is measured
in a process of its own; what stands in for its packages is in peers/stand_ins.py. An update is one
step of the critics. Seconds are the process's own processor time, set-up and compilation left out.
The programs take turns, round after round, so that a machine that slows down slows all of them; the
table holds medians, and ratios of medians. On Linux, `taskset -c 0 python
peers/speed.py ...` keeps everything on one core.

The networks are not all alike: JAX-CORL normalizes layers of TD3+BC's critics and of IQL's V, which
is more work. Unifloral's step of TD3+BC has two updates of the critics and counts twice. The CQL of
JAX-CORL has two layers, where CORL's and ours have three, and unifloral's is another method: both
are left out. --precision holds for CORL and for ours.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
from peers import stand_ins

ROWS, OBS_DIM, ACT_DIM, EPISODE = 200_000, 17, 6, 1_000
PEERS = {  # name: (a file that shows a checkout, algorithms)
    "CORL": ("algorithms/offline/td3_bc.py", ("td3_bc", "iql", "cql")),
    "JAX-CORL": ("algos/td3bc.py", ("td3_bc", "iql")),
    "unifloral": ("algorithms/unifloral.py", ("td3_bc", "iql")),
}
ALGORITHMS = ("td3_bc", "iql", "cql")
OURS = ("ours", "ours, compiled")


@dataclass
class Args:
    checkouts: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders of the programs to compare with"""
    jax_python: str = sys.executable
    """Python that has JAX, Flax, Optax and Distrax"""
    precision: Literal["highest", "high", "medium"] = "highest"
    """how PyTorch computes fp32 products"""
    rounds: int = 3
    """measurements of each program"""
    seconds: float = 5.0
    """seconds of processor time in a measurement"""


# ---- in a process of its own -----------------------------------------------------------------


class Measured(BaseException):
    """Leaves the program once there is a result."""


class Meter:
    """Counts updates per second of this process's own processor time, after a warm-up of at least
    three calls. `wait(values)` returns when the updates that `values` come from are over."""

    def __init__(self, seconds: float, wait=lambda values: None):
        self.seconds, self.wait, self.first = seconds, wait, time.process_time()
        self.calls, self.updates, self.start = 0, 0, None

    def __call__(self, updates: int, values=None):
        now = time.process_time()
        self.calls += 1
        self.updates += updates
        if self.start is None and self.calls > 3 and now - self.first > self.seconds / 3:
            self.wait(values)
            self.start, self.updates = time.process_time(), 0
        elif self.start is not None and now - self.start > self.seconds:
            self.wait(values)
            self.rate = self.updates / (time.process_time() - self.start)
            raise Measured


def synthetic() -> dict:
    """Random transitions in episodes of 1,000, with D4RL's names."""
    draw = np.random.default_rng(0)
    observations = draw.standard_normal((ROWS, OBS_DIM), np.float32)
    next_observations = np.roll(observations, -1, 0)
    last = np.arange(ROWS) % EPISODE == EPISODE - 1
    next_observations[last] = draw.standard_normal((last.sum(), OBS_DIM), np.float32)
    return {
        "observations": observations,
        "actions": draw.uniform(-0.99, 0.99, (ROWS, ACT_DIM)).astype(np.float32),
        "rewards": draw.standard_normal(ROWS, np.float32),
        "next_observations": next_observations,
        "terminals": last.astype(np.float32),
    }


def start(path, *flags) -> None:
    """Run a program as its user does, in an empty folder."""
    os.chdir(tempfile.mkdtemp())
    sys.argv = [str(path), *flags]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(str(path), run_name="__main__")


def corl(algorithm, folder, how):
    """CORL logs after every update."""
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(how["precision"])
    meter = Meter(how["seconds"])
    stand_ins.put_all(synthetic(), lambda values: meter(1))
    stand_ins.put_flags(lambda train, Config: train(Config(device="cpu", eval_freq=10**12)))
    path = folder / "algorithms" / "offline" / f"{algorithm}.py"
    return meter, lambda: start(path)


def with_jax(how, updates):
    """A Meter for programs that log every `updates` updates. The devices are made here, with one
    thread, because the programs overwrite XLA_FLAGS."""
    import jax

    jax.devices()
    meter = Meter(how["seconds"], jax.block_until_ready)
    stand_ins.put_all(synthetic(), lambda values: meter(updates, values))
    return meter


def jax_corl(algorithm, folder, how):
    """JAX-CORL compiles eight updates into one call."""
    flags = ["eval_interval=1000000000", "log_interval=1"]
    path = folder / "algos" / f"{algorithm.replace('_', '')}.py"
    return with_jax(how, 8), lambda: start(path, *flags)


def unifloral(algorithm, folder, how):
    """Unifloral scans over the updates between two evaluations. A step of its TD3+BC has two
    updates of the critics and one of the actor, as two updates of the other programs have."""
    steps = 200
    flags = ["--log", "--eval-interval", str(steps), "--num-updates", str(10**9)]
    path = folder / "algorithms" / f"{algorithm}.py"
    updates = 2 * steps if algorithm == "td3_bc" else steps
    return with_jax(how, updates), lambda: start(path, *flags)


def ours(algorithm, folder, how):
    """This repository's own `train`, with default settings."""
    import torch

    from common import Data
    from run import prepare_device
    from tools.speed import Stopwatch

    torch.set_num_threads(1)
    device = prepare_device("cpu", how["precision"])
    module, meter = importlib.import_module(algorithm), Meter(how["seconds"])

    class Counted(Stopwatch):
        def loop(self, steps, phase="train"):
            for t in count(steps // 2):
                yield t
                meter(1)

    def run():
        data = Data(*(torch.from_numpy(x) for x in synthetic().values()))
        args = module.Args(compile=how["compile"])
        module.train(Counted(device, 0), data, args)

    return meter, run


STARTERS = {"CORL": corl, "JAX-CORL": jax_corl, "unifloral": unifloral}


def one(algorithm, title, folder, how) -> None:
    """Measure one program in this process, and print its rate."""
    make = STARTERS.get(title, ours)
    meter, run = make(algorithm, Path(folder).resolve(), how)
    out, sys.stdout = sys.stdout, open(os.devnull, "w")
    try:
        run()
    except Measured:
        print(meter.rate, file=out)


# ---- the table -------------------------------------------------------------------------------


def programs(args) -> list[tuple]:
    """[(algorithm, title, folder)] in the order of the table: in each algorithm the peers, then
    ours, eager and compiled."""
    found = []
    for algorithm in ALGORITHMS:
        for folder in args.checkouts:
            for title, (file, algorithms) in PEERS.items():
                if (Path(folder) / file).exists() and algorithm in algorithms:
                    found.append((algorithm, title, folder))
        found += [(algorithm, title, str(ROOT)) for title in OURS]
    return found


def measure(program, args, folder: str) -> float:
    """Updates per second, in a process of its own, whose errors are shown."""
    _, title, _ = program
    how = {"seconds": args.seconds, "precision": args.precision, "compile": title == OURS[1]}
    words = json.dumps([*program, how])
    python = args.jax_python if title in ("JAX-CORL", "unifloral") else sys.executable
    command = [python, __file__, "--one", words]
    environment = {"OMP_NUM_THREADS": "1", "TMPDIR": folder}
    environment |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"}
    output = subprocess.check_output(command, env=os.environ | environment, text=True)
    return float(output)


def table(found: list[tuple], rates: list[list[float]]) -> str:
    """A peer's row compares with ours of the same algorithm; `rates` holds the measurements of each
    program."""
    medians = {row[:2]: np.median(x) for row, x in zip(found, rates)}
    lines = [
        "| algorithm | code | updates/s | from | to | ours | ours, compiled |",
        "|---" * 7 + "|",
    ]
    for (algorithm, title, _), values in zip(found, rates):
        mid = medians[algorithm, title]
        line = f"| {algorithm} | {title} | {mid:.1f} | {min(values):.1f} | {max(values):.1f}"
        for name in OURS:
            ratio = medians[algorithm, name] / mid
            line += f" | {ratio:.2f} x" if title in PEERS else " | "
        lines.append(f"{line} |")
    return "\n".join(lines)


def main(args):
    found = programs(args)
    rates = [[] for _ in found]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for program, values in zip(found, rates):
                values.append(measure(program, args, folder))
                print(*program[:2], values[-1], file=sys.stderr)
    print(table(found, rates))
    print("\nCommits:", *(f"{x} {stand_ins.commit(x)}" for x in args.checkouts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Args, description=__doc__))
