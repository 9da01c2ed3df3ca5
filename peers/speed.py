"""Updates per second of published code and of ours, in one run on one core: a table in Markdown.

    git clone https://github.com/tinkoff-ai/CORL
    git clone https://github.com/nissymori/JAX-CORL
    git clone https://github.com/EmptyJackson/unifloral
    git clone https://github.com/seohongpark/fql
    python -m venv jax
    jax/bin/pip install "jax[cpu]" flax optax distrax ml_collections omegaconf pydantic tqdm tyro
    python peers/speed.py CORL JAX-CORL unifloral fql --jax-python jax/bin/python

Each program trains TD3+BC, IQL, CQL or FQL on the same 200,000 synthetic rows (17 observations, 6
actions) in batches of 256, as it lies in its folder and with its default settings
(peers/drive.py). An update is one step of the critics. Seconds are the process's own processor
time, set-up and compilation left out. The programs take turns, round after round, so that a machine
that slows down slows all of them; the table holds medians, and ratios of medians. Everything runs
on the last core that there is; `taskset -c 0 python peers/speed.py ...` chooses another.

The networks are not all alike: JAX-CORL normalizes layers of TD3+BC's critics and of IQL's V, which
is more work, and its CQL has two layers where CORL's and ours have three, so ours is measured with
two as well. Unifloral's step of TD3+BC has two updates of the critics and counts twice; its CQL is
another method and is left out. FQL's program is that of its authors, in the paper's size and in a
narrow one for a CPU. --precision holds for CORL and for ours.

To add a program, add a row to PEERS here and a function to the table PEERS of peers/drive.py.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
from common import Count, Flags, InputError, Positive
from peers.drive import commit
from run import parse
from tools.speed import processor


@dataclass
class Args(Flags):
    checkouts: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders of the programs to compare with"""
    jax_python: str = sys.executable
    """Python that has JAX, Flax, Optax and Distrax"""
    algorithms: tuple[Literal["td3_bc", "iql", "cql", "fql"], ...] = ("td3_bc", "iql", "cql", "fql")
    """what to measure"""
    precision: Literal["highest", "high", "medium"] = "highest"
    """how PyTorch computes fp32 products"""
    rounds: Count = 3
    """measurements of each program"""
    seconds: Positive = 5.0
    """seconds of processor time in a measurement"""


@dataclass
class Peer:
    """A published program that peers/drive.py can start."""

    title: str
    file: str  # shows that a folder is its checkout
    networks: dict  # algorithm -> hidden units x layers, and what else is to be known, of each size
    jax: bool = True


NORMALIZED = "256 x 2, layer normalization"
PEERS = {
    "corl": Peer(
        "CORL",
        "algorithms/offline/td3_bc.py",
        {"td3_bc": ["256 x 2"], "iql": ["256 x 2"], "cql": ["256 x 3"]},
        jax=False,
    ),
    "jax_corl": Peer(
        "JAX-CORL",
        "algos/td3bc.py",
        {"td3_bc": [NORMALIZED], "iql": [NORMALIZED], "cql": ["256 x 2"]},
    ),
    "unifloral": Peer(
        "unifloral",
        "algorithms/unifloral.py",
        {"td3_bc": ["256 x 2"], "iql": ["256 x 2"]},
    ),
    "fql": Peer("its authors", "agents/ifql.py", {"fql": ["512 x 4", "128 x 4"]}),
}
TITLES = {"td3_bc": "TD3+BC", "iql": "IQL", "cql": "CQL(H)", "fql": "FQL"}


@dataclass
class Program:
    """One row of the table: one algorithm of a peer, or of "ours"."""

    peer: str
    title: str
    algorithm: str
    networks: str
    folder: str
    settings: dict = field(default_factory=dict)  # for peers/drive.py


def recognized(folder: str) -> str:
    """The name of the peer whose checkout a folder is. Raises InputError."""
    for name, peer in PEERS.items():
        if (Path(folder) / peer.file).exists():
            return name
    files = ", ".join(peer.file for peer in PEERS.values())
    raise InputError(f"{folder}: use the folder of a checkout; there is none of {files}")


def programs(args) -> list[Program]:
    """Everything that is measured, in the order of the table: in each algorithm the peers, then
    ours in each size of theirs, eager and compiled. Raises InputError."""
    folders = {recognized(folder): folder for folder in args.checkouts}
    if not folders:
        raise InputError("name a checkout, for example: python peers/speed.py ../CORL")
    found = []
    for algorithm in args.algorithms:
        rows = [
            Program(name, PEERS[name].title, algorithm, size, folder, {"hidden": int(size[:3])})
            for name, folder in folders.items()
            for size in PEERS[name].networks.get(algorithm, ())
        ]
        for size in dict.fromkeys(row.networks[:7] for row in rows):
            hidden, layers = int(size[:3]), int(size[-1])
            for title, compile in (("ours", False), ("ours, compiled", True)):
                settings = {"hidden": hidden, "layers": layers, "compile": compile}
                rows.append(Program("ours", title, algorithm, size, str(ROOT), settings))
        found += rows
    return found


def measure(program: Program, args, folder: str) -> dict:
    """One measurement in a process of its own: {"rate": updates per second, "versions": ...}.
    Raises InputError with the program's last line."""
    jax = program.peer in PEERS and PEERS[program.peer].jax
    settings = program.settings | {"seconds": args.seconds, "precision": args.precision}
    command = [args.jax_python if jax else sys.executable, str(ROOT / "peers" / "drive.py")]
    command += [program.peer, program.algorithm, program.folder, json.dumps(settings)]
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
        raise InputError(f"{program.title}, {program.algorithm}: {line}; run {command[1]} by hand")
    return json.loads(finished.stdout)


def table(found: list[Program], rates: list[list[float]]) -> list[str]:
    """Lines of Markdown. A peer's row compares with ours of the same algorithm and as many layers;
    `rates` holds the measurements of each program."""
    medians = [statistics.median(x) for x in rates]
    ours = {
        (row.algorithm, row.networks, row.title): median
        for row, median in zip(found, medians)
        if row.peer == "ours"
    }
    lines = ["| algorithm | code | networks | updates/s | from, to | ours | ours, compiled |"]
    lines.append("|---" * 7 + "|")
    for row, median, values in zip(found, medians, rates):
        cells = [TITLES[row.algorithm], row.title, row.networks, f"{median:.1f}"]
        cells.append(f"{min(values):.1f}, {max(values):.1f}")
        for title in ("ours", "ours, compiled"):
            rate = ours[row.algorithm, row.networks[:7], title]
            cells.append("" if row.peer == "ours" else f"{rate / median:.2f} x")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(args):
    found = programs(args)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rates, versions = [[] for _ in found], {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for program, values in zip(found, rates):
                result = measure(program, args, folder)
                values.append(result["rate"])
                versions |= result["versions"]
                line = (
                    f"round {number + 1}: {program.algorithm}, {program.title}, {program.networks}"
                )
                print(f"{line}: {values[-1]:.1f} updates/s", file=sys.stderr, flush=True)
    print("\n".join(table(found, rates)))
    packages = [f"{name} {version}" for name, version in versions.items()]
    places = {row.peer: row.folder for row in found}
    commits = [f"{name} {commit(place)}" for name, place in places.items()]
    print(
        f"\nUpdates per second of processor time; medians of {args.rounds} rounds of "
        f"{args.seconds:g} s on one core: {processor()}, precision {args.precision}. "
        f"{', '.join([*packages, *commits])}."
    )


if __name__ == "__main__":
    main(parse(Args, {}, sys.argv[1:])[0])
