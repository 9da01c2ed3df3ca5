"""peers/: the meter on work of a known size, what a program finds in place of its packages, the
table; programs on our rows, in our evaluation and in our format; lockstep."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from short_runs import ROOT

from peers import speed, td3_lockstep, train
from run import evaluate, load, make, parse, score
from tools import report

STAND_INS = ("d4rl", "gym", "pyrallis", "wandb", "tensorboardX", "wrappers", "evaluation")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder; the modules that are replaced come back at the end."""
    monkeypatch.chdir(tmp_path)
    for name in STAND_INS:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["peers/train.py"])
    yield tmp_path
    for name in ("jax", "flax", "learner"):  # of the test below
        sys.modules.pop(name, None)


def checkout(folder, file, program) -> str:
    """A folder that looks like a checkout."""
    path = Path(folder, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(program)
    return str(folder)


# ---- speed -----------------------------------------------------------------------------------

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


def test_a_program_runs_as_it_lies_there_and_is_counted(tmp_path):
    """And beside it ours; one that fails is named."""
    place = checkout(tmp_path / "CORL", "algorithms/offline/td3_bc.py", PROGRAM)
    args = speed.Args((place,), seconds=0.3)
    theirs, ours, _, iql, *_ = speed.programs(args)
    assert speed.measure(theirs, args, str(tmp_path)) == pytest.approx(200, rel=0.2)
    assert speed.measure(ours, args, str(tmp_path)) > 0
    with pytest.raises(subprocess.CalledProcessError):
        speed.measure(iql, args, str(tmp_path))


# ---- training --------------------------------------------------------------------------------

# The parts of CORL's program that touch what is replaced. Its policy is linear and never learns.
CORL = """
from dataclasses import asdict, dataclass
import d4rl, gym, json, numpy as np, pyrallis, torch, wandb

@dataclass
class TrainConfig:
    device: str = "cuda"
    env: str = ""
    seed: int = 0
    eval_freq: int = 5
    n_episodes: int = 1
    max_timesteps: int = 7
    buffer_size: int = 1
    batch_size: int = 1
    discount: float = 0.0
    tau: float = 0.0
    normalize: bool = False
    normalize_reward: bool = True
    alpha: float = 0.0
    policy_noise: float = 0.0
    noise_clip: float = 0.0
    policy_freq: int = 0

class Actor:
    mode = "train"
    def act(self, state, device):
        assert self.mode == "eval" and state.ndim == 1 and state.dtype == np.float32
        return np.tanh(state[:3])
    def eval(self):
        self.mode = "eval"
    def train(self):
        self.mode = "train"

def eval_actor(env, actor, device, n_episodes, seed):
    raise RuntimeError("CORL's own evaluation runs")

@pyrallis.wrap()
def train(config: TrainConfig):
    env = gym.make(config.env)
    data = d4rl.qlearning_dataset(env)
    np.savez("seen.npz", **data)
    json.dump(asdict(config), open("flags.json", "w"))
    assert env.observation_space.shape == (data["observations"].shape[1],)
    assert len(data["rewards"]) == config.buffer_size and config.device == "cpu"
    env = gym.wrappers.TransformObservation(env, lambda state: (state - 1) / 2)
    actor = Actor()
    wandb.init(project="x"), wandb.run.save()
    for t in range(config.max_timesteps):
        wandb.log({"loss": torch.rand(1).item()}, step=t + 1)
        if (t + 1) % config.eval_freq == 0:
            scores = eval_actor(env, actor, config.device, config.n_episodes, config.seed)
            print("this is not shown", env.get_normalized_score(scores.mean()) * 100.0)
            assert actor.mode == "train"

if __name__ == "__main__":
    train()
"""
SHORT = "--steps 20 --eval-every 10 --eval-episodes 2 --precision highest --seed 3".split()
NAMES = dict(observations="obs", actions="action", next_observations="next_obs")
NAMES |= dict(rewards="reward", terminals="terminal")


def run(program, place, *words):
    words = [str(word) for word in words]
    return train.main(train.Args(program, str(place)), [*SHORT, *words])


def corl(folder, program=CORL):
    return checkout(folder, train.PROGRAMS["corl_td3_bc"].file, program)


def assert_same_rows(data, path):
    with np.load(path) as seen:
        for name, field in NAMES.items():
            own = getattr(data, field).numpy()
            assert seen[name].dtype == own.dtype and seen[name].tobytes() == own.tobytes(), name


def returns_of(policy, task):
    """Returns of a policy by our own evaluation."""
    act = lambda obs: torch.tanh(policy(obs)[:, :3])
    return evaluate(act, [make(task) for _ in range(2)], 3100, torch.device("cpu"))


def test_corl_is_on_our_rows_in_our_evaluation_and_in_our_format(here, capsys):
    run(
        "corl_td3_bc",
        corl(here / "CORL"),
        "--env",
        "hopper-replay-demo",
        "--out",
        here / "r",
    )
    assert "this is not shown" not in capsys.readouterr().out
    data, task = load("hopper-replay-demo")
    assert_same_rows(data, "seen.npz")
    module = importlib.import_module("td3_bc")
    ours, _ = parse(module.Args, module.PRESETS, ["--env", "hopper-replay-demo"])
    given = json.loads(Path("flags.json").read_text())
    assert (given["max_timesteps"], given["eval_freq"], given["n_episodes"]) == (20, 10, 2)
    assert given["seed"] == 3 and given["normalize"] == ours.normalize_obs
    assert given["discount"] == ours.gamma and given["tau"] == ours.polyak != 0.005
    assert not given["normalize_reward"], "our rows hold it already"
    (folder,) = (here / "r").iterdir()
    assert folder.name == "hopper-replay-demo__corl_td3_bc__3"
    found = report.read_run(folder)
    assert found["finished"] and found["method"] == "corl_td3_bc"
    assert found["curve"].step.tolist() == [10, 20]
    returns = returns_of(lambda obs: (obs - 1) / 2, task)
    assert np.allclose(found["curve"].score, score(task, returns), rtol=1e-6)
    before = (folder / "eval.csv").stat().st_mtime_ns
    for words, again in ((), False), (("--overwrite",), True):
        run(
            "corl_td3_bc", here / "CORL", "--env", "hopper-replay-demo", "--out", here / "r", *words
        )
        assert ((folder / "eval.csv").stat().st_mtime_ns > before) == again
    first = train.Args("corl_td3_bc", str(here / "CORL"), until=10)
    train.main(first, [*SHORT, "--env", "hopper-replay-demo", "--out", "u"])
    assert len(Path("u", folder.name, "eval.csv").read_text().splitlines()) == 2
    assert json.loads(Path("flags.json").read_text())["max_timesteps"] == 20


# The parts of the program of IQL's authors that touch what is replaced.
IQL = """
import os, sys
import d4rl, gym, numpy as np, wrappers
from evaluation import evaluate
from learner import Learner
from tensorboardX import SummaryWriter

flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
env = wrappers.SinglePrecision(wrappers.EpisodeMonitor(gym.make(flags["env_name"])))
data = d4rl.qlearning_dataset(env)
np.savez("seen.npz", **data)
text = open(flags["config"]).read()
assert flags["env_name"] == "rows" and os.path.isdir(flags["save_dir"])
agent = Learner(np.random.randint(2**31), eval(text.split("ConfigDict(")[1].strip()[:-1]))
writer = SummaryWriter("x", write_to_disk=True)
for i in range(1, int(flags["max_steps"]) + 1):
    if i % int(flags["log_interval"]) == 0:
        writer.add_scalar("training/loss", 0.0, i)
    if i % int(flags["eval_interval"]) == 0:
        evaluate(agent, env, 10)["return"]
sys.exit(0)
"""
LEARNER = """
import common, json
import jax
assert common.__file__ is None or "learner" not in common.__file__
class Learner:
    def __init__(self, drawn, config):
        json.dump([drawn, config], open("flags.json", "w"))
    def sample_actions(self, states, temperature):
        import numpy as np
        assert temperature == 0.0 and states.dtype == np.float32
        return np.tanh(states[:, :3])
"""


def test_iqls_authors_program_is_on_our_rows_and_in_our_evaluation(here, monkeypatch):
    """What JAX and Flax have changed is supplied; their own `common` is not ours."""
    fakes = here / "fakes"
    checkout(fakes, "jax.py", "class tree:\n    map = 1\ndef jit(*a, **k):\n    pass\n")
    checkout(fakes, "flax.py", "class config:\n    def update(*x):\n        pass\n")
    place = checkout(here / "IQL", "train_offline.py", IQL)
    checkout(place, "learner.py", LEARNER)
    checkout(place, "common.py", "theirs = True")
    sys.path.insert(0, str(fakes))
    monkeypatch.setattr(train.importlib.metadata, "version", lambda name: "1")
    run("iql_authors", place, "--env", "hopper-replay-demo")
    module = importlib.import_module("iql")
    ours, _ = parse(module.Args, module.PRESETS, ["--env", "hopper-replay-demo"])
    data, task = load("hopper-replay-demo")
    module.scale_rewards(data, ours)
    assert ours.normalize_obs and ours.normalize_reward
    train.normalize_obs(data, eps=1e-3)
    assert_same_rows(data, "seen.npz")
    drawn, config = json.loads(Path("flags.json").read_text())
    np.random.seed(3)
    assert drawn == np.random.randint(2**31), "the batches have the seed of the run"
    assert config["expectile"] == ours.tau and config["temperature"] == ours.beta
    assert config["hidden_dims"] == [256, 256] and config["value_lr"] == ours.lr
    found = report.read_run(Path("runs/hopper-replay-demo__iql_authors__3"))
    returns = returns_of(train.Scaling(data).obs, task)
    assert np.allclose(found["curve"].score, score(task, returns), rtol=1e-6)
    assert sys.modules["common"].__file__ == str(ROOT / "common.py")


# ---- lockstep --------------------------------------------------------------------------------

# TD3+BC in the form of CORL's file: the names and shapes that peers/td3_lockstep.py reads.
TD3_BC = """
import copy, torch
from torch.nn.functional import mse_loss

def net(n_in, n_out):
    sizes = (n_in, 256, 256, n_out)
    layers = [f for a, b in zip(sizes, sizes[1:]) for f in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers[:-1])

class Actor(torch.nn.Module):
    def __init__(self, s, a, largest):
        super().__init__()
        self.net = net(s, a)
    def forward(self, s):
        return self.net(s).tanh()

class Critic(torch.nn.Module):
    def __init__(self, s, a):
        super().__init__()
        self.net = net(s + a, 1)
    def forward(self, s, a):
        return self.net(torch.cat([s, a], 1))

class TD3_BC:
    def __init__(self, largest, pi, pi_opt, q1, opt1, q2, opt2, discount, tau):
        self.opts, self.nets = (opt1, opt2, pi_opt), (pi, q1, q2)
        self.targets, self.t, self.discount, self.tau = copy.deepcopy(self.nets), 0, discount, tau
    def train(self, batch):
        s, a, r, s2, done = batch
        pi, q1, q2 = self.nets
        self.t += 1
        with torch.no_grad():
            a2 = self.targets[0](s2) + (torch.randn_like(a) * 0.2).clamp(-0.5, 0.5)
            low = torch.min(*(q(s2, a2.clamp(-1, 1)) for q in self.targets[1:]))
            y = r + (1 - done) * self.discount * low
        self.step(mse_loss(q1(s, a), y) + mse_loss(q2(s, a), y), self.opts[:2])
        if self.t % 2 == 0:
            q = q1(s, pi(s))
            weight = 2.5 / q.abs().mean().detach()
            self.step(mse_loss(pi(s), a) - weight * q.mean(), self.opts[2:])
            for net, target in zip(self.nets, self.targets):
                for p, old in zip(net.parameters(), target.parameters()):
                    old.data.lerp_(p.data, self.tau)
    def step(self, loss, opts):
        for opt in self.opts:
            opt.zero_grad()
        loss.backward()
        for opt in opts:
            opt.step()
"""


def test_td3_bc_in_lockstep_is_one_function(here, capsys):
    """A program of 60 lines in plain PyTorch stands for CORL's; with another discount it leaves."""
    found = []
    for text in (TD3_BC, TD3_BC.replace("* self.discount *", "* 0.9 *")):
        args = td3_lockstep.Args(corl=corl(here, text), steps=12, out="x.png")
        td3_lockstep.main(args)
        found.append([float(x) for x in re.findall(r": (\S+) after 12", capsys.readouterr().out)])
    (exact, single, moved), (far, *_) = found
    assert exact < 1e-15 < 1e-9 < single < 1e-6 and 0 < moved < 1e-6 and far > 1e-5
