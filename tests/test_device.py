"""harness/device.py: where a run computes, and which way of computing products it may take."""

import os
import subprocess
import sys

import pytest
import torch
from short_runs import ROOT, start
from torch.testing import assert_close

from common import InputError
from harness.device import by_torch, choose_route, error_of, prepare_device, set_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_precision_afterwards():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def plain(a, b):
    torch.set_float32_matmul_precision("highest")
    return a @ b


def rounded(a, b):
    """A unit that rounds its inputs to bf16, as AMX does."""
    return (a.bfloat16().float()) @ (b.bfloat16().float())


def reordered(a, b):
    """The same fp32 sums, split in four: another library's order."""
    parts = zip(a.chunk(4, 1), b.chunk(4, 0))
    return sum(x @ y for x, y in parts)


def timing(**seconds):
    """A clock that knows how long a product takes."""
    return lambda product, device: seconds[product.__name__]


def test_a_way_that_rounds_is_refused_however_fast():
    chosen, reason = choose_route(plain, rounded, CPU, seconds=timing(plain=1.0, rounded=0.1))
    assert not chosen and "rounds: its error is" in reason
    assert error_of(rounded, CPU) > 100 * error_of(plain, CPU)


@pytest.mark.parametrize(
    ("seconds", "taken"), [(0.5, True), (0.85, True), (0.9, False), (2, False)]
)
def test_a_way_that_only_adds_in_another_order_is_taken_if_15_percent_faster(seconds, taken):
    clock = timing(plain=1.0, reordered=seconds)
    chosen, reason = choose_route(plain, reordered, CPU, seconds=clock)
    assert chosen == taken and f"{1 / seconds:.2f} times as fast" in reason
    assert error_of(reordered, CPU) <= 4 * error_of(plain, CPU)


def test_one_slow_moment_decides_nothing():
    """The median of the ratios counts."""
    moments = iter([1.0, 0.5, *[1.0, 1.0] * 3, 50.0, 1.0, *[1.0, 1.0] * 20])
    chosen, _ = choose_route(plain, reordered, CPU, seconds=lambda *_: next(moments))
    assert not chosen


def test_auto_sets_what_it_names():
    precision, reason = set_precision("auto", CPU)
    assert precision in ("highest", "medium") and "times" in reason
    assert torch.get_float32_matmul_precision() == precision
    torch.manual_seed(0)
    a, b = torch.randn(2, 256, 256)
    assert_close((a @ b).double(), a.double() @ b.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_typed_precision_is_taken(precision):
    assert set_precision(precision, CPU) == (precision, "as typed")
    assert torch.get_float32_matmul_precision() == precision
    assert by_torch("highest")(torch.eye(2), torch.eye(2)).equal(torch.eye(2))


def test_a_continued_run_takes_the_way_it_began_with(here):
    """auto may find another way on a busy day; the stored one keeps the run equal to the bit."""

    def stop(run, t, metrics):
        run.stopped = t == 5

    for began in ("medium", "highest"):
        with pytest.raises(SystemExit):
            start("bc", stop, prepare=lambda run: set_to(run, began), precision="auto", name=began)
        _, run = start("bc", precision="auto", name=began, resume=True)
        assert run.precision == began and run.precision_reason == "as the run began"


def set_to(run, precision):
    """What auto may have found on the first day."""
    run.precision = precision


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "gpu7", ""])
def test_bad_device_is_one_line(device):
    with pytest.raises(InputError, match="--device.*use cpu, cuda or auto") as caught:
        prepare_device(device)
    assert "\n" not in str(caught.value)


def test_auto_is_cuda_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert prepare_device("auto").type == expected and prepare_device("cpu") == CPU


def test_every_cpu_thread_flushes_subnormals():
    code = (
        "import torch; from harness.device import prepare_device; prepare_device('cpu');"
        "print(int((torch.full((4_000_000,), 1e-38) * 0.1).count_nonzero()))"
    )
    env = dict(os.environ, OMP_NUM_THREADS="2", PYTHONPATH=str(ROOT))
    assert subprocess.check_output([sys.executable, "-c", code], env=env) == b"0\n"
