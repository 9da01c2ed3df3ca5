"""speed.py: its clock on work of a known size, its flags, its table."""

import time

import cql
import pytest
import torch
import tyro
from short_runs import ROOT, outcome

from common import InputError
from tools import speed

CPU = torch.device("cpu")


def watched(train, seconds, steps):
    """What a Stopwatch finds for `train(t)`, called in every step of one phase."""
    watch = speed.Stopwatch(CPU, seconds)
    for t in watch.loop(steps):
        train(t)
        watch.after(t, {})
    return watch.phases["train"]


@pytest.mark.parametrize("steps", [40, 1_000, 10**9])
def test_seconds_of_an_update(steps):
    """Measured to a fifth, also where a phase is too short for the time to be filled."""

    def update(t):
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass

    assert watched(update, seconds=0.5, steps=steps) == pytest.approx(500, rel=0.2)


def rounded(a, b):
    return (a.bfloat16() @ b.bfloat16()).float()


def test_speed_and_error_of_the_words_of_precision(capsys):
    """bf16 has 8 bits, fp32 has 24: rounding shows."""
    before = torch.get_float32_matmul_precision()
    assert speed.error_of(torch.matmul, CPU) < 1e-5 < 1e-4 < speed.error_of(rounded, CPU) < 1e-2
    try:
        speed.print_precisions(CPU, time.perf_counter)
    finally:
        torch.set_float32_matmul_precision(before)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert [row[0].strip() for row in rows[2:]] == ["highest", "high", "medium"]
    assert all(float(row[1]) > 0 for row in rows[2:]) and 0 < float(rows[2][2]) < 1e-5


def test_settings_are_the_defaults_or_the_presets_of_a_dataset():
    """CQL's preset of the bundled data has smaller batches."""
    assert speed.settings_of(cql, "").batch_size == 256
    assert speed.settings_of(cql, "hopper-replay-demo").batch_size == 128


def test_table(capsys):
    """A row for each phase."""
    line = "--algorithms bc fisher_brc --seconds 0.05 --obs-dim 5 --act-dim 2"
    speed.main(tyro.cli(speed.Args, args=line.split()))
    out = capsys.readouterr().out
    assert f"cpu, 1 thread, torch {torch.__version__}" in out and "eager" in out
    (head, _, *rows) = out[out.index("| algorithm") :].splitlines()
    columns = [x.strip() for x in head.split("|")]
    rows = [dict(zip(columns, (x.strip() for x in row.split("|")))) for row in rows]
    phases = [(row["algorithm"], row["phase"]) for row in rows]
    assert phases == [("bc", "train"), ("fisher_brc", "behavior"), ("fisher_brc", "train")]
    for row in rows:
        assert float(row["updates_per_second"]) > 0
        minutes = 1e6 / float(row["updates_per_second"]) / 60
        assert float(row["minutes_per_million"]) == pytest.approx(minutes, rel=0.05)


@pytest.mark.parametrize("line, told", [
    ("--algorithms no", "no algorithms/no.py: use one of arq, "),
    ("--device tpu9", "--device tpu9 cannot be used"),
])  # fmt: skip
def test_bad_flags_are_found_before_the_work(line, told, capsys):
    with pytest.raises(InputError, match=told):
        speed.main(tyro.cli(speed.Args, args=line.split()))
    assert capsys.readouterr().out == ""


def test_a_number_out_of_range_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines, status = outcome(ROOT / "tools" / "speed.py", ["--seconds", "-1"])
    assert status and "use a finite number above 0" in " ".join(lines)
