"""Updates per second and efficiency of every algorithm: one command, a table and a CSV.

    python tools/speed.py                                 # every algorithm, one CPU thread, eager
    python tools/speed.py --algorithms td3_bc --compile   # one of them, compiled whole
    python tools/speed.py --device cuda                   # CUDA graphs
    python tools/speed.py --algorithms iql --operations   # where the time of an update goes

Every file's own `train` runs on synthetic data (200,000 transitions, 17 observations, 6 actions)
with its default settings, or with the preset of --env, and is measured instead of logged. A method
with a first phase has a row for each.

Efficiency is floor time / measured time. The floor is the time that the matrix products of one
update take at the rate of a 256 x 256 x 256 fp32 product, measured in the same process. Times are
seconds: the process's own CPU time with one thread, wall-clock time with more and on a GPU; the
best of five blocks counts.
"""

import csv
import importlib
import math
import platform
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
from common import Count, Data, InputError, Positive
from harness.device import prepare_device, set_precision
from harness.run import parse, seed_everything

PROFILED = 120  # updates in which --operations looks


@dataclass
class Args:
    phases: ClassVar[dict] = {}

    algorithms: tuple[str, ...] = ()
    """files of algorithms/ to measure; none given: all of them"""
    env: str = ""
    """measure the presets of this dataset name; empty: the default settings of every file"""
    device: str = "cpu"
    """cpu or cuda"""
    threads: Count = 1
    """CPU threads; efficiency compares with the rate of as many"""
    compile: bool = False
    """compile each update whole"""
    precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """how fp32 products are computed; auto takes the fastest way that does not round"""
    seconds: Positive = 5.0
    """seconds to measure each phase for"""
    operations: bool = False
    """print a table of the operations of an update, too"""
    obs_dim: Count = 17
    """observation numbers"""
    act_dim: Count = 6
    """action numbers"""
    csv: str = ""
    """write the table to this file too"""

    def resolve(self):
        pass


def synthetic(args, device):
    """Random transitions; one episode of 1,000 after the other."""
    seed_everything(0)
    n, s, a = 200_000, args.obs_dim, args.act_dim
    return Data(
        obs=torch.randn(n, s).to(device),
        action=(torch.rand(n, a) * 2 - 1).to(device),
        reward=torch.randn(n).to(device),
        next_obs=torch.randn(n, s).to(device),
        terminal=(torch.rand(n) < 0.002).float().to(device),
        episode=(torch.arange(n) // 1000).to(device),
        name="synthetic",
        digest="synthetic",
    )


class Stopwatch:
    """Stands where a run does: the same loop, measured instead of logged. Without `seconds` it
    counts the floating-point operations of the matrix products. With `operations` it also keeps
    the times of an update's operations."""

    def __init__(self, device, seconds: float | None, operations: bool = False):
        self.device, self.seconds, self.phases = device, seconds, {}
        self.operations = {} if operations else None  # of each phase

    def start(self, nets, opt, **largest):
        pass

    def after(self, t, metrics, act=None):
        pass

    def reference(self, label, act):
        pass

    def cached(self, stage, module, *settings):
        return False

    def share(self, stage, module):
        pass

    def chunks(self, stage, shape, count, *settings):
        return torch.zeros(shape), torch.zeros(count)

    def loop(self, steps, phase="train"):
        t = steps // 2  # past any warm start
        if self.seconds is None:  # 12 updates contain every delayed step equally often
            with FlopCounterMode(display=False) as counter:
                yield from range(t + 1, t + 13)
            self.phases[phase] = counter.get_total_flops() / 12
            return
        yield from range(t + 1, t + 21)  # warm up, compile, capture
        t, best, end = t + 20, float("inf"), time.time() + self.seconds
        block = 12
        while time.time() < end or best == float("inf"):
            start = self.clock()
            yield from range(t + 1, t + 1 + block)
            elapsed, t = self.clock() - start, t + block
            if elapsed < self.seconds / 10 and t + 2 * block <= steps:
                block *= 2  # until five of them fill the time
            else:
                best = min(best, elapsed / block)
            if t + block > steps:
                break
        self.phases[phase] = 1 / best
        if self.operations is not None:
            with torch.profiler.profile() as profiler:
                yield from range(t + 1, t + 1 + PROFILED)
            self.operations[phase] = operation_times(profiler.key_averages())

    def clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif torch.get_num_threads() == 1:
            return time.process_time()
        return time.perf_counter()


def operation_times(events) -> list[tuple[str, float, float]]:
    """(name, calls, microseconds) of the operations of one update, the longest first. Kernels of
    Inductor that fuse the same operations are one row."""
    found = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        name = re.sub(r"^graph_\d+_|_\d+$", "", event.key)
        name = "calls of the kernels" if "CompiledFxGraph" in name else name
        spent = event.self_device_time_total or event.self_cpu_time_total
        found[name][0] += event.count / PROFILED
        found[name][1] += spent / PROFILED
    rows = [(name, *values) for name, values in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def print_operations(title, rows):
    """The table of `operation_times`; what takes less than 1% is one row."""
    total = sum(row[2] for row in rows)
    large = [row for row in rows if row[2] >= 0.01 * total]
    rest = [sum(row[i] for row in rows if row not in large) for i in (1, 2)]
    print(f"\n{title}, one update:\n")
    print("| operation | calls | microseconds | share |\n|---|---|---|---|")
    for name, calls, spent in [*large, ("everything else", *rest), ("all", math.nan, total)]:
        count = "" if math.isnan(calls) else f"{calls:.1f}"
        print(f"| {name[:60]} | {count} | {spent:.0f} | {spent / total:.0%} |")


def product_rate(device, clock):
    """FLOP/s of a 256 x 256 x 256 fp32 product, best of 20 blocks."""
    a, b = torch.randn(2, 256, 256, device=device)
    best = float("inf")
    for _ in range(20):
        start = clock()
        for _ in range(100):
            a @ b
        best = min(best, (clock() - start) / 100)
    return 2 * 256**3 / best


def settings_of(module, env: str):
    """The default settings of a file, or those of a dataset by the file's presets."""
    words = ["--env", env] if env else []
    return parse(module.Args, module.PRESETS if env else {}, words)[0]


def measure(name, args, device):
    """Rows of one algorithm, one for each phase, and the operations of each phase."""
    module = importlib.import_module(name)
    results = []
    for seconds in (None, args.seconds):
        counting = seconds is None  # on the CPU: nothing counts the products of a CUDA graph
        settings = settings_of(module, args.env)
        settings.compile = args.compile and not counting
        place = torch.device("cpu") if counting else device
        watch = Stopwatch(place, seconds, args.operations and not counting)
        seed_everything(0)
        module.train(watch, synthetic(args, watch.device), settings)
        results.append(watch.phases)
    flops, rates = results
    floor = product_rate(device, watch.clock)
    rows = [
        {
            "algorithm": name,
            "phase": phase,
            "batch_size": settings.batch_size,
            "updates_per_second": round(rates[phase], 1),
            "minutes_per_million": round(1e6 / rates[phase] / 60, 1),
            "mflop_per_update": round(flops[phase] / 1e6),
            "product_gflops": round(floor / 1e9, 1),
            "efficiency": round(flops[phase] * rates[phase] / floor, 3),
            "device": args.device,
            "processor": processor(),
            "threads": args.threads,
            "compile": args.compile,
            "precision": torch.get_float32_matmul_precision(),
            "torch": torch.__version__,
        }
        for phase in rates
    ]
    return rows, watch.operations or {}


def processor() -> str:
    """The processor's name, as Linux or Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def check(args, names):
    """InputError before anything is measured."""
    for name in args.algorithms:
        if name not in names:
            raise InputError(f"no algorithms/{name}.py: use one of {', '.join(names)}")
    if args.csv and (Path(args.csv).is_dir() or not Path(args.csv).absolute().parent.is_dir()):
        raise InputError(f"--csv {args.csv}: use a file's name in a folder that exists")


def main(args):
    names = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py"))
    check(args, names)
    torch.set_num_threads(args.threads)
    device = prepare_device(args.device)
    precision, reason = set_precision(args.precision, device)
    if args.operations:
        torch._inductor.config.cpp.enable_kernel_profile = True
    print(f"{processor()}; precision {precision} ({reason})\n")
    rows, tables = [], []
    print("| algorithm | phase | batch | updates/s | minutes per million | MFLOP | efficiency |")
    print("|---" * 7 + "|")
    for name in args.algorithms or names:
        measured, operations = measure(name, args, device)
        rows += measured
        tables += [(f"{name}, {phase}", found) for phase, found in operations.items()]
        for row in measured:
            print(
                f"| {name} | {row['phase']} | {row['batch_size']} | {row['updates_per_second']} | "
                f"{row['minutes_per_million']} | {row['mflop_per_update']} | "
                f"{row['efficiency']:.2f} |",
                flush=True,
            )
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    print(
        f"\n{args.device}, {threads}, torch {torch.__version__}, products at "
        f"{rows[-1]['product_gflops']} GFLOP/s, {'compiled' if args.compile else 'eager'}"
    )
    for title, found in tables:
        print_operations(title, found)
    if not args.csv:
        return
    try:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise InputError(f"--csv {args.csv}: {error.strerror}; the numbers are above") from None


if __name__ == "__main__":
    main(parse(Args, {})[0])
