"""Damaged bytes of a dataset and of a checkpoint end in one message or in a good result: no
traceback, nothing executed. A few cases by default, 300 of each with --soak."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from short_runs import Bomb, checkpoint, folder, same, start

from common import InputError
from run import load, load_tensors


@pytest.fixture
def cases(request):
    return range(300 if request.config.getoption("--soak") else 30)


def damage(content: bytes, draw: random.Random) -> bytes:
    """One to three accidents: flipped bytes, a cut, a hole, a repeated or a foreign block."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        i, length = draw.randrange(len(content) + 1), draw.choice([1, 4, 64, 512])
        block = content[i : i + length]
        kind = draw.choice(["flip", "flip", "cut", "hole", "repeat", "foreign"])
        if kind == "cut":
            del content[i:]
        elif kind == "repeat":
            content[i:i] = block
        else:
            flip = bytes(x ^ draw.randint(1, 255) for x in block)
            new = {"flip": flip, "hole": bytes(len(block)), "foreign": draw.randbytes(len(block))}
            content[i : i + length] = new[kind]
    return bytes(content)


def judged(path, cases, read, check, share=0.5):
    """`read` each damaged form of a file; what is let through must pass `check`."""
    original, refused = path.read_bytes(), 0
    for case in cases:
        path.write_bytes(damage(original, random.Random(case)))
        try:
            check(read())
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 700, case
            refused += 1
    assert refused > share * len(cases)
    path.write_bytes(original)
    check(read())


def finite(loaded):
    data, _ = loaded
    for key in ("obs", "action", "reward", "next_obs", "terminal"):
        value = getattr(data, key)
        assert len(value) == len(data.obs) and value.isfinite().all(), key
    assert data.action.abs().max() <= 1 and (data.episode.diff() >= 0).all()


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_dataset(here, cases):
    judged(Path("log.npz"), cases, lambda: load("log.npz", "cpu", "none"), finite)


def test_a_damaged_checkpoint_changes_no_weight(here, cases):
    start("bc")
    whole = checkpoint("bc")
    path = folder("bc") / "checkpoint.pt"
    judged(path, cases, lambda: load_tensors(path), lambda found: same(found, whole) or 1 / 0)


def test_what_would_run_code_is_not_loaded(here):
    torch.save({"nets": Bomb()}, "bomb.pt")
    np.array([Bomb()], object).dump("bomb.npz")
    for read in (lambda: load_tensors("bomb.pt"), lambda: load("bomb.npz")):
        with pytest.raises(InputError):
            read()
    assert not Path("bomb").exists()
    np.load("bomb.npz", allow_pickle=True)
    assert Path("bomb").exists(), "it was none"
