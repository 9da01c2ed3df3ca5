"""Where a run computes, and how its fp32 products are computed."""

import ctypes
import statistics
import sys
import time

import torch

from common import InputError

SHAPES = ((256, 32, 256), (256, 256, 256), (1024, 256, 256))  # rows, inputs, outputs of a layer


def prepare_device(name: str) -> torch.device:
    """Resolve "auto" to cuda where there is one, else cpu. For speed, this also changes the state
    of the process: subnormal numbers count as 0, and the allocator keeps freed memory. Raises
    InputError for a device that cannot be used."""
    # Adam's moments of unused units decay into subnormals, with which a CPU is ten times as slow.
    # This comes before the first parallel product, because threads inherit it when they start.
    torch.set_flush_denormal(True)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        line = (str(error).splitlines() or ["not usable"])[0]
        raise InputError(f"--device {name}: {line}; use cpu, cuda or auto") from None
    if sys.platform == "linux":  # glibc: keep freed megabyte buffers instead of faulting them anew
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
            libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
    return device


def by_torch(route: str):
    """Products as torch computes them at precision `route`, which stays set."""

    def product(a, b):
        torch.set_float32_matmul_precision(route)
        return a @ b

    return product


def error_of(product, device) -> float:
    """Largest error of `product` relative to sum |a||b|, against float64, over SHAPES."""
    draw, worst = torch.Generator().manual_seed(0), 0.0
    for rows, n_in, n_out in SHAPES:
        a = torch.randn(rows, n_in, generator=draw).to(device)
        b = torch.randn(n_in, n_out, generator=draw).to(device)
        exact = a.double() @ b.double()
        size = a.double().abs() @ b.double().abs()
        worst = max(worst, ((product(a, b) - exact).abs() / size).max().item())
    return worst


def seconds_of(product, device) -> float:
    """Seconds of one pass of `product` over SHAPES."""
    inputs = [
        (torch.ones(rows, n_in, device=device), torch.ones(n_in, n_out, device=device))
        for rows, n_in, n_out in SHAPES
    ]
    start = time.perf_counter()
    for _ in range(3):
        for a, b in inputs:
            product(a, b)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / 3


def choose_route(plain, other, device, rounds: int = 9, seconds=seconds_of) -> tuple[bool, str]:
    """Whether products by `other` replace those by `plain`, and why: their error may be four times
    as large, and in the median of `rounds` timings they must be 15% faster. `seconds(product,
    device)` measures one timing."""
    error_ratio = error_of(other, device) / error_of(plain, device)
    if error_ratio > 4:
        return False, f"the other way rounds: its error is {error_ratio:.0f} times as large"
    seconds(plain, device), seconds(other, device)  # the first call prepares
    pairs = [(seconds(plain, device), seconds(other, device)) for _ in range(rounds)]
    speed_up = statistics.median(a / b for a, b in pairs)
    reason = f"the other way is {speed_up:.2f} times as fast at {error_ratio:.1f} times the error"
    if speed_up >= 1.15:
        reason = f"{speed_up:.2f} times as fast as highest at {error_ratio:.1f} times its error"
    return speed_up >= 1.15, reason


def set_precision(precision: str, device) -> tuple[str, str]:
    """Set how fp32 products are computed; returns the setting and the reason for it.

    "auto" compares "medium" with plain fp32 ("highest"). On some CPUs medium means another library
    that is twice as fast and just as exact; where the hardware would round (AMX, TF32), it is
    refused."""
    reason = "as typed"
    if precision == "auto":
        faster, reason = choose_route(by_torch("highest"), by_torch("medium"), device)
        precision = "medium" if faster else "highest"
    torch.set_float32_matmul_precision(precision)
    return precision, reason
