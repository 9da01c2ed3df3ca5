"""Updates per second of published code and of ours, in one run on one core: a table in Markdown.

    git clone https://github.com/tinkoff-ai/CORL
    git clone https://github.com/nissymori/JAX-CORL
    git clone https://github.com/EmptyJackson/unifloral
    python -m venv jax
    jax/bin/pip install "jax[cpu]" flax optax distrax omegaconf pydantic tqdm tyro
    python tools/peers.py --corl CORL --jax-corl JAX-CORL --unifloral unifloral \\
        --jax-python jax/bin/python

Each program trains TD3+BC, IQL or CQL on the same 200,000 synthetic rows (17 observations, 6
actions) in batches of 256, as it lies in its folder and with its default settings
(tools/drive_peer.py). An update is one step of the critics. Seconds are the process's own
processor time, set-up and compilation left out. The programs take turns, round after round, so that
a machine that slows down slows all of them; the table holds medians, and ratios of medians.

The networks are not all alike: JAX-CORL normalizes layers of TD3+BC's critics and of IQL's V, which
is more work, and its CQL has two layers where CORL's and ours have three, so ours is measured with
two as well. Unifloral's step of TD3+BC has two updates of the critics and counts twice; its CQL is
another method and is left out. CORL is measured as it is, and with the one line of PyTorch that
lets fp32 products take another route on a CPU, which our files choose where it does not round.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
from common import Count, CountOrZero, InputError, Positive
from harness.run import parse
from tools.speed import processor


@dataclass
class Args:
    phases: ClassVar[dict] = {}

    corl: str = ""
    """checkout of tinkoff-ai/CORL; empty: not measured"""
    jax_corl: str = ""
    """checkout of nissymori/JAX-CORL; empty: not measured"""
    unifloral: str = ""
    """checkout of EmptyJackson/unifloral; empty: not measured"""
    jax_python: str = ""
    """Python that has JAX, Flax, Optax and Distrax; empty: the one that runs this"""
    algorithms: tuple[Literal["td3_bc", "iql", "cql"], ...] = ("td3_bc", "iql", "cql")
    """what to measure"""
    rounds: Count = 3
    """measurements of each program"""
    seconds: Positive = 5.0
    """seconds of processor time in a measurement"""
    core: CountOrZero | None = None
    """number of the core that everything runs on; None: the last one that there is"""

    def resolve(self):
        pass


@dataclass
class Program:
    """One row of the table."""

    peer: str  # corl, jax_corl, unifloral or ours
    label: str
    algorithm: str
    layers: int  # of 256 hidden units
    note: str  # what else is to be known of the networks
    settings: dict  # for tools/drive_peer.py

    def is_ours(self):
        return self.peer == "ours"


TITLES = {"td3_bc": "TD3+BC", "iql": "IQL", "cql": "CQL(H)"}
FILES = {  # what shows that a folder is the checkout in question
    "corl": "algorithms/offline/td3_bc.py",
    "jax_corl": "algos/td3bc.py",
    "unifloral": "algorithms/unifloral.py",
}


def programs(args) -> list[Program]:
    """Everything that is measured, in the order of the table."""
    found = []

    def add(peer, label, algorithm, layers, note="", **settings):
        if peer == "ours" or getattr(args, peer):
            found.append(Program(peer, label, algorithm, layers, note, settings))

    def add_ours(algorithm, layers, **settings):
        add("ours", "ours", algorithm, layers, **settings)
        add("ours", "ours, compiled", algorithm, layers, compile=True, **settings)

    for algorithm in args.algorithms:
        layers = 3 if algorithm == "cql" else 2
        add("corl", "CORL", algorithm, layers)
        add("corl", 'CORL, "medium"', algorithm, layers, precision="medium")
        if algorithm == "cql":
            add_ours(algorithm, 3)
            add("jax_corl", "JAX-CORL", algorithm, 2)
            if args.jax_corl:
                add_ours(algorithm, 2)
        else:
            add("jax_corl", "JAX-CORL", algorithm, 2, ", layer normalization")
            add("unifloral", "unifloral", algorithm, 2)
            add_ours(algorithm, 2)
    return found


def measure(program: Program, args, folder: str) -> dict:
    """One measurement in a process of its own: {"rate": updates per second, "versions": ...}.
    Raises InputError with the program's last line."""
    jax = program.peer in ("jax_corl", "unifloral")
    python = args.jax_python if jax and args.jax_python else sys.executable
    place = str(ROOT) if program.is_ours() else getattr(args, program.peer)
    settings = {"seconds": args.seconds, "layers": program.layers} | program.settings
    command = [python, str(ROOT / "tools" / "drive_peer.py")]
    command += [program.peer, program.algorithm, place, json.dumps(settings)]
    environment = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",  # later rounds compile nothing
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch",
        "TQDM_DISABLE": "1",
        "TMPDIR": folder,
    }
    finished = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if finished.returncode or not finished.stdout.strip():
        line = (finished.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"{program.label}, {program.algorithm}: {line}; run {command[1]} by hand")
    return json.loads(finished.stdout)


def commit(folder) -> str:
    """The commit of a checkout, in short."""
    line = ["git", "-C", str(folder), "rev-parse", "--short=7", "HEAD"]
    try:
        finished = subprocess.run(line, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return finished.stdout.strip() or "unknown"


def table(found: list[Program], rates: list[list[float]]) -> list[str]:
    """Lines of Markdown. A peer's row compares with ours of the same algorithm and as many layers;
    `rates` holds the measurements of each program."""
    medians = [statistics.median(x) for x in rates]
    lines = ["| algorithm | code | networks | updates/s | from, to | ours | ours, compiled |"]
    lines.append("|---" * 7 + "|")
    for i, program in enumerate(found):
        ratios = ["", ""]
        for j, other in enumerate(found):
            same = other.is_ours() and other.algorithm == program.algorithm
            if same and other.layers == program.layers and not program.is_ours():
                compiled = "compile" in other.settings
                ratios[compiled] = f"{medians[j] / medians[i]:.2f} x"
        spread = f"{min(rates[i]):.1f}, {max(rates[i]):.1f}"
        networks = f"256 x {program.layers}{program.note}"
        cells = [TITLES[program.algorithm], program.label, networks]
        lines.append(f"| {' | '.join([*cells, f'{medians[i]:.1f}', spread, *ratios])} |")
    return lines


def check(args) -> None:
    """InputError before anything is measured."""
    if not any(getattr(args, peer) for peer in FILES):
        raise InputError("name a checkout: --corl PATH, --jax-corl PATH or --unifloral PATH")
    for peer, file in FILES.items():
        path = getattr(args, peer)
        if path and not (Path(path) / file).exists():
            flag = peer.replace("_", "-")
            raise InputError(f"--{flag} {path}: there is no {file}; use the folder of a checkout")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    if args.core is not None and args.core not in (cores or []):
        raise InputError(f"--core {args.core}: use one of {cores}")
    if cores:
        os.sched_setaffinity(0, {cores[-1] if args.core is None else args.core})


def main(args):
    check(args)
    found = programs(args)
    rates, versions = [[] for _ in found], {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for program, values in zip(found, rates):
                result = measure(program, args, folder)
                values.append(result["rate"])
                versions |= result["versions"]
                line = f"round {number + 1}: {program.algorithm}, {program.label}"
                print(f"{line}: {values[-1]:.1f} updates/s", file=sys.stderr, flush=True)
    print("\n".join(table(found, rates)))
    commits = [f"{peer} {commit(getattr(args, peer))}" for peer in FILES if getattr(args, peer)]
    packages = [f"{name} {version}" for name, version in versions.items()]
    print(
        f"\nUpdates per second of processor time; medians of {args.rounds} rounds of "
        f"{args.seconds:g} s on one core: {processor()}. {', '.join(packages)}; "
        f"{', '.join(commits)}, ours {commit(ROOT)}."
    )


if __name__ == "__main__":
    main(parse(Args, {})[0])
