"""peers.py and drive_peer.py: the meter on work of a known size, what a peer's program finds in
place of its packages, the table, refusals."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from common import InputError
from harness import parse
from tools import drive_peer, peers

# The parts of a peer's program that touch what stands in for its packages.
PROGRAM = """
from dataclasses import dataclass
import d4rl, gym, numpy as np, pyrallis, time, wandb

@dataclass
class TrainConfig:
    device: str = "cuda"
    eval_freq: int = 5

@pyrallis.wrap()
def train(config: TrainConfig):
    env = gym.make("halfcheetah-medium-v2")
    assert config.device == "cpu" and config.eval_freq > 10**9
    assert env.observation_space.shape == (17,) and env.action_space.high[0] == 1
    data = d4rl.qlearning_dataset(env)
    assert {len(x) for x in data.values()} == {200_000} and data["actions"].shape[1] == 6
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in data.values())
    ends = data["terminals"] > 0
    same = (data["observations"][1:] == data["next_observations"][:-1]).all(1)
    assert ends.sum() == 200 and (same == ~ends[:-1]).all()
    env = gym.wrappers.TransformObservation(env, lambda x: x)
    env.seed(0), env.action_space.seed(0)
    wandb.init(project="x"), wandb.run.save()
    for t in range(10**9):
        end = time.process_time() + 0.005
        while time.process_time() < end:
            pass
        wandb.log({"loss": 0.0}, step=t)

if __name__ == "__main__":
    train()
"""


def checkout(folder, program=PROGRAM) -> str:
    """A folder that looks like a checkout of CORL."""
    path = Path(folder) / "algorithms" / "offline" / "td3_bc.py"
    path.parent.mkdir(parents=True)
    path.write_text(program)
    return str(folder)


def flags(*words):
    return parse(peers.Args, {}, list(words))[0]


def test_a_program_runs_as_it_lies_there_and_is_counted(tmp_path):
    args = flags("--corl", checkout(tmp_path / "CORL"), "--seconds", "0.3")
    result = peers.measure(peers.programs(args)[0], args, str(tmp_path))
    assert result["rate"] == pytest.approx(200, rel=0.2) and "torch" in result["versions"]


def test_ours_runs_with_two_layers_too(tmp_path):
    args = flags("--jax-corl", "c", "--algorithms", "cql", "--seconds", "0.2")
    *_, ours, compiled = peers.programs(args)
    assert (ours.layers, ours.settings, compiled.settings) == (2, {}, {"compile": True})
    assert peers.measure(ours, args, str(tmp_path))["rate"] > 0


def test_the_meter_leaves_the_warm_up_out():
    """Slow calls at first, as compilation makes them; four updates a call."""
    waited = []
    meter = drive_peer.Meter(0.3, waited.append)
    with pytest.raises(drive_peer.Measured):
        for call in range(10_000):
            end = time.process_time() + (0.1 if call < 3 else 0.01)
            while time.process_time() < end:
                pass
            meter(4, call)
    assert meter.rate == pytest.approx(400, rel=0.2)
    assert len(waited) == 2, "at the beginning and at the end, for what is computed meanwhile"


def test_programs_of_a_table():
    """CQL is compared with as many layers; unifloral's is another method."""
    found = peers.programs(flags("--corl", "a", "--unifloral", "b", "--jax-corl", "c"))
    cql = [(x.peer, x.layers) for x in found if x.algorithm == "cql"]
    assert cql == [("corl", 3)] * 2 + [("ours", 3)] * 2 + [("jax_corl", 2)] + [("ours", 2)] * 2
    assert sum(x.peer == "unifloral" for x in found) == 2
    found = peers.programs(flags("--corl", "a", "--algorithms", "iql"))
    assert [(x.peer, x.algorithm) for x in found] == [("corl", "iql")] * 2 + [("ours", "iql")] * 2


def test_table_by_hand():
    found = peers.programs(flags("--corl", "a", "--algorithms", "td3_bc"))
    lines = peers.table(found, [[90, 110, 100], [200, 200, 260], [300, 280, 320], [400, 400, 400]])
    assert lines[2] == "| TD3+BC | CORL | 256 x 2 | 100.0 | 90.0, 110.0 | 3.00 x | 4.00 x |"
    assert lines[3].endswith('"medium" | 256 x 2 | 200.0 | 200.0, 260.0 | 1.50 x | 2.00 x |')
    assert lines[4] == "| TD3+BC | ours | 256 x 2 | 300.0 | 280.0, 320.0 |  |  |"
    assert len(lines) == 6 and {line.count("|") for line in lines} == {8}


def test_the_commit_of_a_checkout(tmp_path):
    assert peers.commit(tmp_path) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    assert len(peers.commit(tmp_path)) == 7


def test_a_program_that_fails_is_named(tmp_path):
    path = checkout(tmp_path / "CORL", "raise RuntimeError('no such thing')")
    args = flags("--corl", path, "--algorithms", "td3_bc")
    with pytest.raises(InputError, match="CORL, td3_bc: RuntimeError: no such thing; run "):
        peers.measure(peers.programs(args)[0], args, str(tmp_path))


BAD = {
    "": "name a checkout: --corl PATH",
    "--corl .": "--corl .: there is no algorithms/offline/td3_bc.py; use the folder of a checkout",
    "--jax-corl nowhere": "--jax-corl nowhere: there is no algos/td3bc.py",
    "--corl CORL --core 99999": "--core 99999: use one of",
    "--corl CORL --rounds 0": "--rounds is 0",
    "--corl CORL --seconds -1": "--seconds is -1",
}


@pytest.mark.parametrize("line", BAD)
def test_refusals(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkout("CORL")
    before = os.sched_getaffinity(0)
    with pytest.raises(InputError, match=BAD[line]):
        peers.main(flags(*line.split()))
    assert os.sched_getaffinity(0) == before
