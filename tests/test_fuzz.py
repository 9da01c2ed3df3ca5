"""Damaged bytes end in one clear line or a good result: no traceback, hang or poisoned file."""

import dataclasses
import json
import random
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_experiment import META, write_log

import evaluate
import report
from datasets import InputError, load_dataset
from experiment import load_tensors, save_tensors

CASES = 100  # of each kind of file
CPU = torch.device("cpu")


def damage(content: bytes, draw: random.Random) -> bytes:
    """One to three accidents: flipped bytes, a cut, a hole, a repeated or a foreign block."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        n = max(len(content), 1)
        i, length = draw.randrange(n), draw.choice([1, 4, 64, 512])
        kind = draw.choice(["flip", "flip", "cut", "hole", "repeat", "foreign"])
        if kind == "flip":
            for j in range(i, min(i + draw.choice([1, 8]), len(content))):
                content[j] ^= draw.randint(1, 255)
        elif kind == "cut":
            del content[i:]
        elif kind == "hole":
            content[i : i + length] = bytes(len(content[i : i + length]))
        elif kind == "repeat":
            content[i:i] = content[i : i + length]
        else:
            content[i : i + length] = draw.randbytes(length)
    return bytes(content)


def every_case(path: Path, read, check=None):
    """`read` each damaged form of a file: InputError of one line, or a result that `check`s."""
    original, outcomes = path.read_bytes(), []
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a damaged file hangs"))
    try:
        for case in range(CASES):
            path.write_bytes(damage(original, random.Random(case)))
            signal.alarm(20)
            try:
                found = read()
                outcomes.append("good")
                if check:
                    check(found)
            except InputError as error:
                line = str(error)
                assert line and "\n" not in line and len(line) < 700, line
                outcomes.append("refused")
            except Exception as error:
                error.add_note(f"{path.name}, case {case}")
                raise
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, previous)
        path.write_bytes(original)
    assert outcomes.count("refused") > CASES / 10, outcomes
    read()  # nothing was left behind that harms the undamaged file
    return outcomes


def finite(loaded):
    """What was let through is a dataset: equal lengths, finite, actions within their bounds."""
    data, _ = loaded
    for key in ("obs", "action", "reward", "next_obs", "terminal"):
        value = getattr(data, key)
        assert len(value) == len(data.obs) and value.isfinite().all(), key
    assert data.action.abs().max() <= 1 and (data.episode.diff() >= 0).all()


def test_npz(tmp_path):
    path = Path(write_log(tmp_path / "log.npz"))
    every_case(path, lambda: load_dataset(str(path), CPU, "none"), finite)


def test_hdf5(tmp_path):
    arrays = np.load(write_log(tmp_path / "log.npz"))
    path = tmp_path / "log.hdf5"
    with h5py.File(path, "w") as f:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            f[key] = arrays[key] / 2 if key == "actions" else arrays[key]
    every_case(path, lambda: load_dataset(str(path), CPU, "none"), finite)


def test_metadata_of_an_npz(tmp_path):
    """The JSON text inside, damaged before it is packed."""
    path = tmp_path / "log.npz"
    arrays = dict(np.load(write_log(path)))
    text, draw = json.dumps(META).encode(), random.Random(0)
    for _ in range(CASES):
        arrays["metadata"] = np.array(damage(text, draw).decode("latin-1"))
        np.savez(path, **arrays)
        try:
            finite(load_dataset(str(path), CPU, "none"))
        except InputError as error:
            assert "\n" not in str(error)


def test_tensors(tmp_path):
    """A checkpoint is read as it was written, or refused: a wrong number is never let through."""
    path = tmp_path / "checkpoint.pt"
    tensors = {"nets": {"w": torch.randn(50, 50)}, "step": 3, "rows": "[]"}
    save_tensors(path, tensors)

    def same(found):
        assert found["step"] == 3 and torch.equal(found["nets"]["w"], tensors["nets"]["w"])

    every_case(path, lambda: load_tensors(path), same)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder and the log it was trained on."""
    import bc

    root = tmp_path_factory.mktemp("fuzz")
    args = bc.Args(env=write_log(root / "log.npz"), device="cpu", steps=4, batch_size=4)
    args = dataclasses.replace(args, eval_every=2, eval_episodes=1, log_every=1, out=str(root))
    bc.train(args)
    return root / "log__bc__0"


def test_config_of_a_run(finished):
    path = finished / "config.json"
    every_case(path, lambda: evaluate.load_run(finished))
    every_case(path, lambda: report.read_run(finished))


@pytest.mark.parametrize("name", ["eval.csv", "summary.json"])
def test_scores_of_a_run(finished, name):
    every_case(finished / name, lambda: report.read_run(finished))


def test_a_clone_in_the_cache(tmp_path):
    """A damaged shared clone is refused with the file's name; deleted, it is made again."""
    import fisher_brc

    log = write_log(tmp_path / "log.npz")
    args = fisher_brc.Args(env=log, device="cpu", eval_env="none", steps=2, bc_steps=2)
    args = dataclasses.replace(args, batch_size=4, out=str(tmp_path))
    fisher_brc.train(args)
    (clone,) = (tmp_path / "cache").glob("*clone*")

    def again():
        shutil.rmtree(tmp_path / "log__fisher_brc__0")
        return fisher_brc.train(args)

    content = clone.read_bytes()
    clone.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="delete it"):
        again()
    clone.unlink()
    again()
    assert load_tensors(clone).keys()
