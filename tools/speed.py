"""Updates per second and efficiency of every algorithm: one command, a table and a CSV.

    python speed.py                                 # every algorithm, one CPU thread, eager
    python speed.py --algorithms td3_bc --compile   # one of them, compiled whole
    python speed.py --device cuda                   # CUDA graphs

Efficiency is floor time / measured time. The floor is the time that the matrix products of one
update take at the rate of a 256 x 256 x 256 fp32 product, measured in the same process. Products
are counted while each file's own `train` runs on synthetic data (200,000 transitions, 17
observations, 6 actions, batch 256). Times are seconds: the process's own CPU time with one thread,
wall-clock time with more and on a GPU; the best of five blocks counts. A method with a first phase
has a row for each.
"""

import csv
import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from common import choose_device, seed_everything
from datasets import Data, InputError

ROOT = Path(__file__).parent


@dataclass
class Args:
    algorithms: tuple[str, ...] = ()
    """files of algorithms/ to measure; none given: all of them"""
    device: str = "cpu"
    """cpu or cuda"""
    threads: int = 1
    """CPU threads; efficiency compares with the rate of as many"""
    compile: bool = False
    """compile each update whole"""
    precision: str = "auto"
    """fp32 products: highest, high, medium, or auto: the fastest that does not round"""
    seconds: float = 5.0
    """seconds to measure each phase for"""
    obs_dim: int = 17
    """observation numbers"""
    act_dim: int = 6
    """action numbers"""
    csv: str = ""
    """write the table to this file too"""


def synthetic(args, device):
    """Random transitions in the layout of load_dataset; one episode of 1,000 after the other."""
    seed_everything(0)
    n, s, a = 200_000, args.obs_dim, args.act_dim
    data = Data(
        obs=torch.randn(n, s),
        action=torch.rand(n, a) * 2 - 1,
        reward=torch.randn(n),
        next_obs=torch.randn(n, s),
        terminal=(torch.rand(n) < 0.002).float(),
        episode=torch.arange(n) // 1000,
        episode_return=torch.randn(n // 1000),
        action_low=-torch.ones(a),
        action_high=torch.ones(a),
        obs_mean=torch.zeros(s),
        obs_std=torch.ones(s),
        name="synthetic",
        digest="synthetic",
    )
    for name, value in vars(data).items():
        if isinstance(value, torch.Tensor):
            setattr(data, name, value.to(device))
    return data


class Stopwatch:
    """Stands where an algorithm's Run does: the same loop, measured instead of logged."""

    def __init__(self, args, seconds):
        self.device = choose_device(args.device, args.precision)
        self.seconds, self.phases = seconds, {}
        seed_everything(0)

    def start(self, *_):
        pass

    after = reference = start

    def cached(self, *_):
        return None, False

    def finish(self):
        return self.phases

    def loop(self, steps, phase="train"):
        t = steps // 2  # past any warm start
        if self.seconds is None:  # count the products of 12 updates, whatever their period
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
            if elapsed < self.seconds / 10:  # grow the block until five fit
                block *= 2
            else:
                best = min(best, elapsed / block)
            if t > steps - 2 * block:
                break
        self.phases[phase] = 1 / best

    def clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif torch.get_num_threads() == 1:
            return time.process_time()
        return time.perf_counter()


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


def measure(name, args):
    """Rows of one algorithm: phase, updates/s, MFLOP per update, efficiency."""
    module = importlib.import_module(name)
    results = []
    for seconds, compile in ((None, False), (args.seconds, args.compile)):
        watch = None

        def run(algorithm_args):
            nonlocal watch
            watch = Stopwatch(algorithm_args, seconds)
            return watch

        module.Run = run
        module.load_dataset = lambda *_: (synthetic(args, watch.device), None)
        module.train(module.Args(device=args.device, precision=args.precision, compile=compile))
        results.append(watch.phases)
    flops, rates = results
    floor = product_rate(watch.device, watch.clock)
    return [
        {
            "algorithm": name,
            "phase": phase,
            "updates_per_second": round(rates[phase], 1),
            "mflop_per_update": round(flops[phase] / 1e6),
            "product_gflops": round(floor / 1e9, 1),
            "efficiency": round(flops[phase] * rates[phase] / floor, 3),
            "device": args.device,
            "threads": args.threads,
            "compile": args.compile,
            "torch": torch.__version__,
        }
        for phase in rates
    ]


def check(args, names):
    """InputError before anything is measured."""
    for name in args.algorithms:
        if name not in names:
            raise InputError(f"no algorithms/{name}.py: give one of {', '.join(names)}")
    for flag in ("threads", "obs_dim", "act_dim"):
        if (value := getattr(args, flag)) < 1:
            flag = flag.replace("_", "-")
            raise InputError(f"--{flag} is {value}: give a whole number, 1 or above")
    choose_device(args.device, args.precision)
    if args.csv and (Path(args.csv).is_dir() or not Path(args.csv).parent.is_dir()):
        raise InputError(f"--csv {args.csv}: give a file's name in a folder that exists")


def main(args):
    sys.path.insert(0, str(ROOT / "algorithms"))
    names = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py"))
    check(args, names)
    torch.set_num_threads(args.threads)
    rows = []
    print("| algorithm | phase | updates/s | MFLOP | efficiency |\n|---|---|---|---|---|")
    for name in args.algorithms or names:
        for row in measure(name, args):
            rows.append(row)
            print(
                f"| {name} | {row['phase']} | {row['updates_per_second']} | "
                f"{row['mflop_per_update']} | {row['efficiency']:.2f} |",
                flush=True,
            )
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    print(
        f"\n{args.device}, {threads}, torch {torch.__version__}, products at "
        f"{rows[-1]['product_gflops']} GFLOP/s, {'compiled' if args.compile else 'eager'}"
    )
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
    main(tyro.cli(Args, description=__doc__))
