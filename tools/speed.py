"""Updates per second of every algorithm: one command, two tables.

    python tools/speed.py                                 # every algorithm, one CPU thread, eager
    python tools/speed.py --algorithms td3_bc --compile   # one of them, compiled whole
    python tools/speed.py --device cuda                   # CUDA graphs

First comes a table of the words of --precision: how fast this machine multiplies fp32 matrices
with each of them, and the largest error, relative to the sum of the absolute terms. A word that is
faster at a like error costs nothing; a larger error says that the processor rounds.

Then every file's own `train` runs on synthetic data (200,000 transitions, 17 observations, 6
actions) with its default settings, or with the preset of --env, and is measured instead of logged.
A method with a first phase has a row for each.

Times are those of the process's own CPU time with one thread, wall-clock time with more and on a
GPU; the best of five blocks counts.
"""

import importlib
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
from common import Count, Data, Positive, require
from run import parse, prepare_device

SHOWN = ("algorithm", "phase", "batch_size", "updates_per_second", "minutes_per_million")
SHAPES = ((256, 32, 256), (256, 256, 256), (1024, 256, 256))  # rows, inputs, outputs of a layer


@dataclass
class Args:
    algorithms: tuple[str, ...] = ()
    """files of algorithms/ to measure; none given: all of them"""
    env: str = ""
    """measure the presets of this dataset name; empty: the default settings of every file"""
    device: str = "cpu"
    """cpu or cuda"""
    threads: Count = 1
    """CPU threads"""
    compile: bool = False
    """compile each update whole"""
    precision: Literal["highest", "high", "medium"] = "highest"
    """how fp32 products are computed"""
    seconds: Positive = 5.0
    """seconds to measure each phase for"""
    obs_dim: Count = 17
    """observation numbers"""
    act_dim: Count = 6
    """action numbers"""


def synthetic(args, device):
    """Random transitions; one episode of 1,000 after the other."""
    torch.manual_seed(0)
    n, s, a = 200_000, args.obs_dim, args.act_dim
    obs, next_obs = torch.randn(2, n, s)
    action, reward = torch.rand(n, a) * 2 - 1, torch.randn(n)
    terminal, episode = (torch.rand(n) < 0.002).float(), torch.arange(n) // 1000
    rows = obs, action, reward, next_obs, terminal, episode
    return Data(*(x.to(device) for x in rows))


class Stopwatch:
    """Stands where a run does: the same loop, measured instead of logged."""

    def __init__(self, device, seconds: float):
        self.device, self.seconds, self.phases = device, seconds, {}

    def start(self, nets, opt, **largest):
        pass

    def after(self, t, metrics, act=None):
        pass

    def reference(self, label, act):
        pass

    def kept(self, name, compute):
        return compute()

    def loop(self, steps, phase="train"):
        t = steps // 2  # past any warm start
        yield from range(t + 1, t + 21)  # warm up, compile, capture
        t, best, end = t + 20, float("inf"), time.monotonic() + self.seconds
        block = 12
        while time.monotonic() < end or best == float("inf"):
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

    def clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif torch.get_num_threads() == 1:
            return time.process_time()
        return time.perf_counter()


def product_rate(device, clock):
    """FLOP/s of a 256 x 256 x 256 fp32 product, best of 20 blocks."""
    (a, b), times = torch.randn(2, 256, 256, device=device), []
    for _ in range(20):
        start = clock()
        for _ in range(100):
            a @ b
        times.append(clock() - start)
    return 100 * 2 * 256**3 / min(times)


def error_of(product, device) -> float:
    """Largest error of `product` relative to sum |a||b|, against float64, over SHAPES."""
    draw, errors = torch.Generator().manual_seed(0), []
    for rows, n_in, n_out in SHAPES:
        a, b = (torch.randn(n, n_in, generator=draw).to(device) for n in (rows, n_out))
        exact = a.double() @ b.double().T
        size = a.double().abs() @ b.double().abs().T
        errors.append(((product(a, b.T) - exact).abs() / size).max().item())
    return max(errors)


def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(*names):
    print_row(*names)
    print("|---" * len(names) + "|")


def print_precisions(device, clock):
    """Rate and error of fp32 products with each word of --precision."""
    print_head("--precision", "products, GFLOP/s", "largest error")
    for word in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(word)
        rate, error = product_rate(device, clock), error_of(torch.matmul, device)
        print_row(word, f"{rate / 1e9:.1f}", f"{error:.1e}")


def settings_of(module, env: str):
    """The default settings of a file, or those of a dataset by the file's presets."""
    words = ["--env", env] if env else []
    return parse(module.Args, module.PRESETS if env else {}, words)[0]


def measure(name, args, device):
    """Cells of the table for each phase of one algorithm, under SHOWN."""
    module = importlib.import_module(name)
    settings = settings_of(module, args.env)
    settings.compile = args.compile
    watch, data = Stopwatch(device, args.seconds), synthetic(args, device)
    torch.manual_seed(0)
    module.train(watch, data, settings)
    for phase, rate in watch.phases.items():
        yield name, phase, settings.batch_size, f"{rate:.1f}", f"{1e6 / rate / 60:.1f}"


def processor() -> str:
    """The processor's name, as Linux or Python knows it."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return name[1].strip() if name else platform.processor() or platform.machine()


def main(args):
    names = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py"))
    for name in args.algorithms:
        require(name in names, f"no algorithms/{name}.py: use one of {', '.join(names)}")
    torch.set_num_threads(args.threads)
    device = prepare_device(args.device, args.precision)
    print(f"{processor()}\n")
    print_precisions(device, Stopwatch(device, 0).clock)
    torch.set_float32_matmul_precision(args.precision)
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    how = f"precision {args.precision}, {'compiled' if args.compile else 'eager'}"
    print(f"\n{args.device}, {threads}, torch {torch.__version__}, {how}:\n")
    print_head(*SHOWN)
    for name in args.algorithms or names:
        for cells in measure(name, args, device):
            print_row(*cells)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
