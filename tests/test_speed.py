"""speed.py: its counts and its clock on work of a known size, its flags, its table."""

import csv
import time
from pathlib import Path
from types import SimpleNamespace

import cql
import pytest
import torch
from short_runs import ROOT, outcome

from common import InputError
from harness import parse
from tools import speed

CPU = torch.device("cpu")


def watched(train, seconds=None, steps=1_000):
    """What a Stopwatch finds for `train(t)`, called in every step of one phase."""
    watch = speed.Stopwatch(CPU, seconds)
    for t in watch.loop(steps):
        train(t)
        watch.after(t, {})
    return watch.phases["train"]


def test_products_are_counted_with_every_delayed_step_equally_often():
    a = torch.randn(10, 20, requires_grad=True)
    b = torch.randn(20, 30)

    def update(t):
        loss = (a @ b).sum()
        if t % 2 == 0:  # one more product for the gradient of a
            torch.autograd.grad(loss, a)

    assert watched(update) == 2 * 10 * 20 * 30 * 1.5


@pytest.mark.parametrize("steps", [40, 1_000, 10**9])
def test_seconds_of_an_update(steps):
    """Measured to a fifth, also where a phase is too short for the time to be filled."""

    def update(t):
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass

    assert watched(update, seconds=0.5, steps=steps) == pytest.approx(500, rel=0.2)


def test_operations_of_an_update(capsys):
    """Two products a step and a third in every second one; a kernel's number does not split it."""
    a = torch.randn(50, 50)

    def update(t):
        for _ in range(2 + t % 2):
            a @ a

    watch = speed.Stopwatch(CPU, 0.05, operations=True)
    for t in watch.loop(10_000):
        update(t)
    rows = {name: (calls, spent) for name, calls, spent in watch.operations["train"]}
    assert rows["aten::mm"][0] == 2.5 and rows["aten::mm"][1] > 0
    event = SimpleNamespace(count=240, self_cpu_time_total=1200.0, self_device_time_total=0.0)
    events = [SimpleNamespace(key=f"graph_{i}_cpp_fused_relu_{i}", **vars(event)) for i in (0, 12)]
    assert speed.operation_times(events) == [("cpp_fused_relu", 4.0, 20.0)]
    speed.print_operations("a file", [("x", 1.0, 995.0), ("y", 2.0, 5.0)])
    out = capsys.readouterr().out
    assert "| x | 1.0 | 995 | 100% |\n| everything else | 2.0 | 5 | 0% |\n| all |  | 1000 |" in out


@pytest.mark.parametrize(("threads", "clock"), [(1, time.process_time), (2, time.perf_counter)])
def test_clock(threads, clock):
    """CPU time for one thread; with more, it would add them up."""
    watch, before = speed.Stopwatch(CPU, seconds=1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert abs(watch.clock() - clock()) < 0.5
    finally:
        torch.set_num_threads(before)


def test_settings_are_the_defaults_or_the_presets_of_a_dataset():
    """CQL's preset of the bundled data has smaller batches."""
    assert speed.settings_of(cql, "").batch_size == 256
    assert speed.settings_of(cql, "hopper-replay-demo").batch_size == 128


def test_table_and_csv(tmp_path, capsys):
    """A row for each phase."""
    line = f"--algorithms bc fisher_brc --seconds 0.05 --obs-dim 5 --act-dim 2 --csv {tmp_path}/x"
    speed.main(parse(speed.Args, {}, line.split())[0])
    out = capsys.readouterr().out
    assert "| algorithm | phase | batch | updates/s | minutes per million | MFLOP |" in out
    assert "cpu, 1 thread, torch " in out and "eager" in out
    with open(tmp_path / "x", newline="") as file:
        rows = list(csv.DictReader(file))
    phases = [(row["algorithm"], row["phase"]) for row in rows]
    assert phases == [("bc", "train"), ("fisher_brc", "behavior"), ("fisher_brc", "train")]
    forward = 2 * 256 * (5 * 256 + 256 * 256 + 256 * 2)  # BC: a batch of 256 through three layers
    backward = forward + 2 * 256 * (256 * 256 + 256 * 2)  # weights, and inputs of the upper layers
    assert rows[0]["mflop_per_update"] == str(round((forward + backward) / 1e6))
    for row in rows:
        assert 0 < float(row["efficiency"]) < 2 and float(row["updates_per_second"]) > 0
        minutes = 1e6 / float(row["updates_per_second"]) / 60
        assert float(row["minutes_per_million"]) == pytest.approx(minutes, rel=0.05)
        assert row["threads"] == "1" and row["processor"] and row["torch"] == torch.__version__


BAD = {
    "--seconds -1": "--seconds is -1: use a finite number above 0",
    "--seconds nan": "--seconds is nan",
    "--threads 0": "--threads is 0: use a whole number",
    "--obs-dim 0": "--obs-dim is 0",
    "--csv no/x.csv": "--csv no/x.csv: use a file's name in a folder that exists",
    "--csv .": "--csv .: use a file's name",
    "--algorithms no": "no algorithms/no.py: use one of arq, ",
    "--device tpu9": "--device tpu9: ",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_flags_are_found_before_the_work(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=BAD[line]):
        speed.main(parse(speed.Args, {}, line.split())[0])
    assert capsys.readouterr().out == ""
    assert not list(Path().iterdir())


def test_a_refusal_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines, status = outcome(ROOT / "tools" / "speed.py", ["--seconds", "-1"])
    assert (status, len(lines)) == (1, 1)
