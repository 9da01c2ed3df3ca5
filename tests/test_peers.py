"""peers/: the meter on work of a known size, what a program finds in place of its packages, the
table; programs of CORL and of FQL's and IQL's authors on our rows, in our evaluation and in our
format; refusals."""

import dataclasses
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import InputError
from peers import corl, drive, speed
from peers import fql as peers_fql
from peers import iql as peers_iql
from run import evaluate, load, make, parse, score
from tools import report

ROOT = Path(__file__).resolve().parents[1]

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
    return parse(speed.Args, {}, list(words))[0]


def test_a_program_runs_as_it_lies_there_and_is_counted(tmp_path):
    args = flags(checkout(tmp_path / "CORL"), "--seconds", "0.3")
    result = speed.measure(speed.programs(args)[0], args, str(tmp_path))
    assert result["rate"] == pytest.approx(200, rel=0.2) and "torch" in result["versions"]


def test_ours_runs_with_two_layers_too(tmp_path):
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "td3bc.py").touch()
    args = flags(str(tmp_path), "--algorithms", "cql", "--seconds", "0.2")
    _, ours, compiled = speed.programs(args)
    assert (ours.settings["layers"], compiled.settings["compile"]) == (2, True)
    assert speed.measure(ours, args, str(tmp_path))["rate"] > 0


# The parts of FQL's program that touch what stands in for its modules.
FQL_MAIN = """
import sys, time, tqdm, wandb
from envs.env_utils import make_env_and_datasets
from utils.evaluation import evaluate, flatten
from utils.log_utils import CsvLogger, get_exp_name, get_flag_dict, get_wandb_video, setup_wandb

flags = dict(word[2:].split("=") for word in sys.argv[1:])
setup_wandb(project="fql", group="x", name=get_exp_name(0))
_, _, train, val = make_env_and_datasets("cube", frame_stack=None)
assert val is None and flags["agent"].endswith("agents/fql.py"), wandb.run.project
assert {len(x) for x in train.values()} == {200_000} and train["masks"].sum() == 199_800
train_logger, eval_logger = CsvLogger("x/train.csv"), CsvLogger("x/eval.csv")
width = int(flags["agent.actor_hidden_dims"].split(",")[0].strip("("))
for i in tqdm.tqdm(range(1, 1 + int(flags["offline_steps"])), smoothing=0.1):
    end = time.process_time() + width / 12_800
    while time.process_time() < end:
        pass
    train_logger.log({"training/loss": 0.0}, step=i)
    if i == 1:
        eval_logger.log(evaluate(agent=None, env=None, config={})[0], step=i)
"""


def fql_checkout(folder, program=FQL_MAIN) -> str:
    """A folder that looks like a checkout of FQL's program."""
    for name in ("agents", "envs", "utils"):
        (Path(folder) / name).mkdir(parents=True)
    for name in ("fql", "ifql"):
        (Path(folder) / "agents" / f"{name}.py").write_text("")
    (Path(folder) / "main.py").write_text(program)
    return str(folder)


def test_fqls_program_is_counted_in_both_sizes(tmp_path):
    pytest.importorskip("jax")
    args = flags(fql_checkout(tmp_path / "fql"), "--algorithms", "fql", "--seconds", "0.3")
    large, narrow, *own = speed.programs(args)
    assert [row.networks for row in own] == ["512 x 4"] * 2 + ["128 x 4"] * 2
    assert speed.measure(large, args, str(tmp_path))["rate"] == pytest.approx(25, rel=0.2)
    assert speed.measure(narrow, args, str(tmp_path))["rate"] == pytest.approx(100, rel=0.2)


def test_the_meter_leaves_the_warm_up_out():
    """Slow calls at first, as compilation makes them; four updates a call."""
    waited = []
    meter = drive.Meter(0.3, waited.append)
    with pytest.raises(drive.Measured):
        for call in range(10_000):
            end = time.process_time() + (0.1 if call < 3 else 0.01)
            while time.process_time() < end:
                pass
            meter(4, call)
    assert meter.rate == pytest.approx(400, rel=0.2)
    assert len(waited) == 2, "at the beginning and at the end, for what is computed meanwhile"


def test_programs_and_their_table(tmp_path):
    """CQL is compared with as many layers; unifloral's is another method."""
    places = [tmp_path / name for name in speed.PEERS]
    for place, peer in zip(places, speed.PEERS.values()):
        (place / peer.file).parent.mkdir(parents=True)
        (place / peer.file).touch()
    found = speed.programs(flags(*map(str, places), "--algorithms", "cql"))
    assert [(x.peer, x.networks[-1]) for x in found] == [
        ("corl", "3"), ("jax_corl", "2"), ("ours", "3"), ("ours", "3"), ("ours", "2"), ("ours", "2")
    ]  # fmt: skip
    rates = [[90, 110, 100], [200], [300], [400], [500], [600]]
    lines = speed.table(found, rates)
    assert lines[2] == "| CQL(H) | CORL | 256 x 3 | 100.0 | 90.0, 110.0 | 3.00 x | 4.00 x |"
    assert lines[3].endswith("| JAX-CORL | 256 x 2 | 200.0 | 200.0, 200.0 | 2.50 x | 3.00 x |")
    assert lines[4] == "| CQL(H) | ours | 256 x 3 | 300.0 | 300.0, 300.0 |  |  |"
    assert len(lines) == 8 and {line.count("|") for line in lines} == {8}
    assert {x.peer for x in speed.programs(flags(*map(str, places)))} == {*speed.PEERS, "ours"}


def test_every_program_can_be_started():
    assert {*speed.PEERS, "ours"} == drive.PEERS.keys()


def test_the_commit_of_a_checkout(tmp_path):
    assert drive.commit(tmp_path) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    assert len(drive.commit(tmp_path)) == 7
    (tmp_path / "file").touch()
    subprocess.run([*git, "add", "file"], check=True)
    assert drive.commit(tmp_path).endswith("-dirty")


def test_a_program_that_fails_is_named(tmp_path):
    path = checkout(tmp_path / "CORL", "raise RuntimeError('no such thing')")
    args = flags(path, "--algorithms", "td3_bc")
    with pytest.raises(InputError, match="CORL, td3_bc: RuntimeError: no such thing; run "):
        speed.measure(speed.programs(args)[0], args, str(tmp_path))


# ---- CORL on our rows ------------------------------------------------------------------------

# The parts of CORL's programs that touch what is replaced. Its policy is linear and never learns.
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
    OWN

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
    assert env.action_space.shape == (3,) and float(env.action_space.high[0]) == 1
    assert len(data["rewards"]) == config.buffer_size and config.device == "cpu"
    env = gym.wrappers.TransformObservation(env, lambda state: (state - 1) / 2)
    env.seed(config.seed), env.action_space.seed(config.seed)
    torch.manual_seed(config.seed)
    actor = Actor()
    wandb.init(project="x"), wandb.run.save()
    for t in range(config.max_timesteps):
        wandb.log({"loss": torch.rand(1).item()}, step=t + 1)
        if (t + 1) % config.eval_freq == 0:
            scores = eval_actor(env, actor, config.device, config.n_episodes, config.seed)
            print("this is not shown", env.get_normalized_score(scores.mean()) * 100.0)
            assert actor.mode == "train"
            wandb.log({"d4rl_normalized_score": 0.0}, step=t + 1)

if __name__ == "__main__":
    train()
"""
OWN = {
    "td3_bc": "alpha: float = 0.0; policy_noise: float = 0.0; noise_clip: float = 0.0; "
    "policy_freq: int = 0",
    "iql": "beta: float = 0.0; iql_tau: float = 0.0; vf_lr: float = 0.0; qf_lr: float = 0.0; "
    "actor_lr: float = 0.0",
}
SHORT = "--steps 20 --eval-every 10 --eval-episodes 2 --device cpu --precision highest".split()


def corl_checkout(folder, change=lambda text: text) -> str:
    """A folder that looks like a checkout of CORL."""
    for algorithm, own in OWN.items():
        path = Path(folder) / "algorithms" / "offline" / f"{algorithm}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(change(CORL.replace("OWN", own)))
    return str(folder)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Factory of a run in an empty folder: command line -> (what it printed, the line of an error
    that it left by). The modules that the tool replaces come back at the end."""
    monkeypatch.chdir(tmp_path)
    for name in ("d4rl", "gym", "pyrallis", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)

    def call(*words):
        words = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", [str(ROOT / "peers" / "corl.py"), *words])
        error = None
        try:
            corl.main(corl_flags(*words))
        except SystemExit as left:
            error = left.code
        return capsys.readouterr().out, error

    return call


def corl_flags(*words):
    return parse(corl.Args, {}, list(words))[0]


def expected(task, seed) -> np.ndarray:
    """Returns of the stand-in's policy by our own evaluation."""

    def act(obs):
        return torch.tanh((obs[:, :3] - 1) / 2)

    envs = [make(task) for _ in range(2)]
    return evaluate(act, envs, 1000 * seed + 100, torch.device("cpu"))


@pytest.mark.parametrize(
    "algorithm, env", [("td3_bc", "hopper-medium-expert-demo"), ("iql", "hopper-replay-demo")]
)
def test_a_run_is_on_our_rows_in_our_evaluation_and_in_our_format(algorithm, env, tmp_path, run):
    place = corl_checkout(tmp_path / "CORL")
    line = ["--corl", place, "--algorithm", algorithm, "--env", env, "--seed", 3, *SHORT]
    line += ["--out", tmp_path / "runs"]
    out, error = run(*line)
    assert error is None
    assert "this is not shown" not in out and f"corl_{algorithm} score" in out
    assert "note: the checkout is unknown, and this tool was made for 6afec90" in out

    data, task = load(env)
    module = importlib.import_module(algorithm)
    ours, _ = parse(module.Args, module.PRESETS, ["--env", env])
    if algorithm == "iql":
        assert ours.normalize_reward
        module.scale_rewards(data, ours)
    names = dict(observations="obs", actions="action", next_observations="next_obs")
    names |= dict(rewards="reward", terminals="terminal")
    with np.load(tmp_path / "seen.npz") as seen:
        for name, field in names.items():
            own = getattr(data, field).numpy()
            assert seen[name].dtype == own.dtype and seen[name].tobytes() == own.tobytes(), name

    given = json.loads((tmp_path / "flags.json").read_text())
    assert (given["max_timesteps"], given["eval_freq"], given["n_episodes"]) == (20, 10, 2)
    assert given["seed"] == 3 and given["normalize"] == ours.normalize_obs
    assert given["discount"] == ours.gamma and given["tau"] == ours.polyak
    assert not given["normalize_reward"], "our rows hold it already"

    (folder,) = (tmp_path / "runs").glob("hopper*")
    assert folder.name == f"{env}__corl_{algorithm}__3"
    result = report.read_run(folder)
    assert result["finished"] and result["method"] == f"corl_{algorithm}"
    assert result["dataset"] == env and result["references"]["data"] > 0
    assert result["curve"].steps.tolist() == [10, 20]
    returns = expected(task, 3)
    assert np.allclose(result["curve"].score, score(task, returns), rtol=1e-6)
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), f"a path in {path.name}"
        assert str(ROOT).encode() not in path.read_bytes(), f"a path in {path.name}"
    config = json.loads((folder / "config.json").read_text())
    assert config["corl"]["commit"] == "unknown" and config["corl"]["args"]["max_timesteps"] == 20
    assert {"algorithm", "common", "run", "tool"} == config["code"].keys()


def test_a_finished_run_is_repeated_by_overwrite_alone(tmp_path, run):
    line = ["--corl", corl_checkout(tmp_path / "CORL"), *SHORT, "--name", "again"]
    folder = tmp_path / "runs" / "hopper-medium-expert-demo__corl_td3_bc-again__0"
    out, error = run(*line)
    assert error is None and "corl_td3_bc score" in out
    before = (folder / "eval.csv").stat().st_mtime_ns
    out, error = run(*line)
    assert error == 0 and out.endswith("is finished: there is nothing to resume\n")
    out, error = run(*line, "--eval-every", 20)
    assert "is finished, with eval_every 10, not 20" in error
    assert (folder / "eval.csv").stat().st_mtime_ns == before
    out, error = run(*line, "--overwrite")
    assert error is None and (folder / "eval.csv").stat().st_mtime_ns > before
    (folder / "summary.json").unlink()
    out, error = run(*line)
    assert error is None and (folder / "summary.json").exists(), "a stopped run starts again"


def test_ctrl_c_leaves_with_a_line(tmp_path, run):
    line = '        wandb.log({"loss"'
    stop = "        if t == 4:\n            import os; os.kill(os.getpid(), 2)\n"
    place = corl_checkout(tmp_path / "CORL", lambda text: text.replace(line, stop + line))
    out, error = run("--corl", place, *SHORT)
    assert error == 130 and "stopped at step 5; repeat the command to start again" in out
    (folder,) = (tmp_path / "runs").glob("hopper*")
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("algorithm", OWN)
def test_every_setting_of_our_file_reaches_corl_or_is_refused(algorithm):
    known = {*corl.NAMES[algorithm], *corl.FIXED[algorithm], "reward_shift"}  # in the rows already
    known |= {"env", "seed", "steps", "eval_every"}  # what every program has
    if algorithm == "iql":  # in the rows, too; the other is of an extraction that is refused
        known |= {"normalize_reward", "alpha_bc"}
    module = importlib.import_module(algorithm)
    shared = {field.name for field in dataclasses.fields(module.RunArgs)}
    own = {field.name for field in dataclasses.fields(module.Args)} - shared
    assert own == known
    ours, _ = corl.our_args(corl_flags("--algorithm", algorithm, "--env", "pointmaze-stitch-demo"))
    settings = corl.corl_settings(algorithm, ours, 100, "cpu")
    assert settings["tau"] == ours.polyak == 0.02 and settings["n_episodes"] == 20
    assert settings["max_timesteps"] == ours.steps and settings["buffer_size"] == 100


@pytest.mark.parametrize("algorithm", OWN)
def test_rewards_are_those_that_our_file_trains_on(algorithm, tiny_data):
    """Our own `train` is stopped where it starts, and its rewards are compared."""
    module = importlib.import_module(algorithm)
    values = dict(reward_shift=-1.0)
    values |= dict(normalize_reward=True) if algorithm == "iql" else {}
    ours, own, given = module.Args(**values), tiny_data(), tiny_data()

    class Started(Exception):
        pass

    def start(*_, **__):
        raise Started

    with pytest.raises(Started):
        module.train(SimpleNamespace(device="cpu", start=start), own, ours)
    corl.scale_rewards(algorithm, given, ours)
    assert torch.equal(own.reward, given.reward)
    assert not torch.equal(own.reward, tiny_data().reward)


def test_actions_are_mapped_to_the_bounds_of_the_task(tiny_data):
    data = tiny_data()
    data.action_low, data.action_high = torch.tensor([-1.0, 0.0]), torch.tensor([3.0, 1.0])
    found = []
    stand_in = SimpleNamespace(
        scaling=corl.Scaling(data),
        rows={"eval": [{"return": 7.0}]},
        advance=lambda act: found.append(act(torch.zeros(2, 3))),
    )
    actor = SimpleNamespace(eval=lambda: None, train=lambda: None)
    actor.act = lambda state, device: np.array([1.0, -1.0], np.float32)
    returns = corl.CorlRun.judge(stand_in, corl.Environment(data), actor, "cpu", 2, 0)
    assert found[0].tolist() == [[3.0, 0.0]] * 2 and returns.mean() == 7


def test_paths_of_this_machine_are_cut():
    words = ["--out", os.path.abspath("runs"), f"--corl={os.path.abspath('CORL')}", "../x", "--a=b"]
    cut = [corl.portable(word) for word in words]
    assert cut == ["--out", "runs", "--corl=CORL", "../x", "--a=b"]


# ---- the authors' programs on our rows -------------------------------------------------------

# The parts of FQL's main program that touch what is replaced. Its policy never learns.
FQL = """
import json, sys, numpy as np, tqdm, wandb
from envs.env_utils import make_env_and_datasets
from utils.evaluation import evaluate, flatten
from utils.log_utils import CsvLogger, get_exp_name, get_flag_dict, get_wandb_video, setup_wandb

class Agent:
    def sample_actions(self, observations, seed, temperature):
        assert seed.dtype == np.uint32 and seed.shape == (2,) and observations.dtype == np.float32
        return np.tanh(observations[:, :3])

flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
json.dump(flags, open("flags.json", "w"))
_, _, train, _ = make_env_and_datasets(flags["env_name"], frame_stack=None)
np.savez("seen.npz", **train)
loggers = [CsvLogger(f"x/{name}.csv") for name in ("train", "eval")]
for i in tqdm.tqdm(range(1, 1 + int(flags["offline_steps"])), smoothing=0.1):
    loggers[0].log({"training/loss": np.float32(i), "time/epoch_time": 0.0}, step=i)
    if i == 1 or i % int(flags["eval_interval"]) == 0:
        loggers[1].log(evaluate(agent=Agent(), env=None, config={})[0], step=i)
sys.exit()
"""


# The parts of the program of IQL's authors that touch what is replaced, with modules named as ours.
IQL = {
    "common": "Batch = dict",
    "learner": """
import functools, jax, numpy as np
from common import Batch

assert jax.tree_multimap is jax.tree.map

@functools.partial(jax.jit, static_argnames=("actor_def", "distribution"))
def mean(actor_def, observations):
    return np.tanh(observations[:, :3])

class Learner:
    def sample_actions(self, observations, temperature):
        assert temperature == 0 and observations.dtype == np.float32
        return mean(None, observations)
""",
    "train_offline": """
import d4rl, gym, json, numpy as np, runpy, sys, types, wrappers
from unittest.mock import patch
from evaluation import evaluate
from learner import Learner
from tensorboardX import SummaryWriter

flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
with patch.dict(sys.modules, ml_collections=types.SimpleNamespace(ConfigDict=dict)):
    flags |= runpy.run_path(flags["config"])["get_config"]()
json.dump(flags, open("flags.json", "w"))
env: gym.Env = wrappers.SinglePrecision(wrappers.EpisodeMonitor(gym.make(flags["env_name"])))
env.seed(0), env.action_space.seed(0), env.observation_space.seed(0)
data = d4rl.qlearning_dataset(env)
assert env.observation_space.sample().shape == data["observations"][0].shape
assert env.action_space.sample().shape == data["actions"][0].shape
np.savez("seen.npz", batch=np.random.randint(1000, size=9), **data)
writer = SummaryWriter("tb", write_to_disk=True)
for i in range(1, 1 + int(flags["max_steps"])):
    writer.add_scalar("training/loss", np.float32(i), i)
    writer.add_histogram("training/adv", np.zeros(9), i)
    writer.add_scalar("training/v", np.float32(-i), i)
    writer.flush()
    if i % int(flags["eval_interval"]) == 0:
        stats = evaluate(Learner(), env, 10)
        writer.add_scalar("evaluation/average_returns", stats["return"], i)
sys.exit()
""",
}
DRIVERS = {"fql": peers_fql, "iql": peers_iql}
REPLACED = {
    "fql": ["tqdm", "wandb", "envs.env_utils", "utils.evaluation", "utils.log_utils"],
    "iql": ["d4rl", "gym", "tensorboardX", "wrappers", "evaluation", "learner"],
}


def iql_checkout(folder) -> str:
    """A folder that looks like a checkout of the program of IQL's authors."""
    Path(folder).mkdir()
    for name, text in IQL.items():
        (Path(folder) / f"{name}.py").write_text(text)
    return str(folder)


def authors(name, *words):
    """Start a driver of the authors' program."""
    driver = DRIVERS[name]
    driver.main(*parse(driver.Args, driver.PRESETS, list(words)))


@pytest.fixture
def judged(tmp_path, monkeypatch, capsys):
    """Factory of a short run of the authors' program: (name, checkout, more flags) -> its flags,
    and its rows. Its losses, and its scores by our own evaluation, are compared. The modules that
    are replaced or imported come back at the end."""

    def judge(name, place, *words):
        monkeypatch.chdir(tmp_path)
        for module in REPLACED[name]:
            monkeypatch.setitem(sys.modules, module, None)
            del sys.modules[module]
        monkeypatch.setattr(sys, "path", [*sys.path])
        env, driver = "hopper-medium-expert-demo", DRIVERS[name]
        words = ["--checkout", place, "--env", env, "--seed", "3", "--log-every", "5", *words]
        monkeypatch.setattr(sys, "argv", [f"peers/{name}.py", *words, *SHORT])
        authors(name, *words, *SHORT)
        assert f"{name}_authors score" in capsys.readouterr().out

        (folder,) = (tmp_path / "runs").glob(f"hopper*__{name}_authors__3")
        result = report.read_run(folder)
        assert result["finished"] and result["curve"].steps.tolist() == [10, 20]
        data, task = load(env)
        driver.normalize_obs(data, eps=1e-3)
        scaling, envs = driver.Scaling(data), [make(task) for _ in range(2)]
        act = lambda obs: scaling.action(torch.tanh(scaling.obs(obs)[:, :3]))
        returns = evaluate(act, envs, 3100, torch.device("cpu"))
        assert np.allclose(result["curve"].score, score(task, returns), rtol=1e-6)
        log = np.genfromtxt(folder / "train.csv", delimiter=",", names=True)
        assert log["step"].tolist() == log["loss"].tolist() == [5, 10, 15, 20]
        assert str(tmp_path) not in (folder / "config.json").read_text()
        seen = dict(np.load(tmp_path / "seen.npz"))
        assert np.array_equal(seen["observations"], data.obs.numpy())
        return json.loads((tmp_path / "flags.json").read_text()), seen, data

    return judge


def test_fqls_program_runs_on_our_rows_in_our_evaluation(tmp_path, judged):
    given, seen, data = judged("fql", fql_checkout(tmp_path / "fql", FQL), "--hidden", "64")
    assert given["agent.value_hidden_dims"] == "(64, 64, 64, 64)" and given["agent.tau"] == "0.02"
    assert (given["agent.discount"], given["agent.normalize_q_loss"]) == ("0.99", "True")
    assert np.array_equal(seen["masks"], 1 - data.terminal.numpy())
    assert abs(seen["actions"]).max() == np.float32(1 - 1e-5) < data.action.abs().max()


def test_the_program_of_iqls_authors_runs_on_our_rows(tmp_path, monkeypatch, judged):
    """JAX and Flax are stand-ins that lack what has changed since the program was written."""

    def jit(function, static_argnames=()):
        assert {*static_argnames} <= inspect.signature(function).parameters.keys()
        return function

    changed = {}
    config = SimpleNamespace(update=lambda *pair: changed.update([pair]))
    monkeypatch.setitem(sys.modules, "flax", SimpleNamespace(config=config))
    jax = SimpleNamespace(jit=jit, tree=SimpleNamespace(map=lambda *_: None))
    monkeypatch.setitem(sys.modules, "jax", jax)
    ours = sys.modules["common"]
    words = ["--layers", "3", "--hidden", "64", "--dropout", "0.1"]
    given, seen, data = judged("iql", iql_checkout(tmp_path / "iql"), *words)
    assert sys.modules["common"] is ours and jax.jit is jit
    assert changed == {"flax_return_frozendict": True}
    assert given["hidden_dims"] == [64, 64, 64] and given["dropout_rate"] == 0.1
    assert [given[x] for x in ("expectile", "temperature", "discount")] == [0.7, 10, 0.99]
    assert given["tau"] == 0.01 and given["actor_lr"] == given["critic_lr"] == 3e-4
    assert (given["max_steps"], given["seed"], given["batch_size"]) == ("20", "3", "256")
    assert np.array_equal(seen["batch"], np.random.RandomState(3).randint(1000, size=9))
    args, _ = parse(peers_iql.Args, peers_iql.PRESETS, ["--env", data.name])
    peers_iql.iql.scale_rewards(data, args)
    for name, field in dict(rewards="reward", actions="action", terminals="terminal").items():
        assert np.array_equal(seen[name], getattr(data, field).numpy()), name


@pytest.mark.parametrize("name", DRIVERS)
def test_every_setting_of_our_file_reaches_the_authors_or_is_refused(name):
    """`flow_steps` and the like go under the authors' names; rows hold what changes them."""
    driver = DRIVERS[name]
    known = {*driver.NAMES, *driver.FIXED, "normalize_obs", "reward_shift"}
    known |= {"env", "seed", "steps", "batch_size", "eval_every", "eval_episodes", "hidden"}
    if name == "iql":  # alpha_bc is of an extraction that is refused
        known |= {"normalize_reward", "layers", "dropout", "alpha_bc"}
    module = importlib.import_module(name)
    shared = {field.name for field in dataclasses.fields(module.RunArgs)}
    own = {field.name for field in dataclasses.fields(module.Args)} - shared
    assert own | {"eval_episodes"} == known


# ---- refusals --------------------------------------------------------------------------------

MAIN = {
    "speed": lambda *words: speed.main(flags(*words)),
    "corl": lambda *words: corl.main(corl_flags(*words)),
    "fql": functools.partial(authors, "fql"),
    "iql": functools.partial(authors, "iql"),
}
# A command line, in a folder with checkouts, and its error.
BAD = {
    "speed": "name a checkout, for example: python peers/speed.py ../CORL",
    "speed nowhere": "nowhere: use the folder of a checkout; there is none of algorithms/offline",
    "speed CORL --rounds 0": "--rounds is 0",
    "speed CORL --seconds -1": "--seconds is -1",
    "corl": "name a checkout of tinkoff-ai/CORL: --corl PATH",
    "corl --corl nowhere": "--corl nowhere: there is no algorithms/offline/td3_bc.py; use the fo",
    "corl --corl . --algorithm iql": "there is no algorithms/offline/iql.py",
    "corl --corl CORL --env hoper-replay-demo": "unknown dataset 'hoper-replay-demo' (did you mean",
    "corl --corl CORL --env log.npz": "--env log.npz: use the name of a dataset",
    "corl --corl CORL --steps 25 --eval-every 10": "--steps 25 is no multiple of --eval-every 10",
    "corl --corl CORL --algorithm iql --env pen-human-v0": "iql.py has dropout 0.1 for pen",
    "corl --corl CORL --steps 0": "--steps is 0",
    "corl --corl CORL --name a/b": "--name is 'a/b'",
    "fql": "name a checkout of seohongpark/fql: --checkout PATH",
    "fql --checkout .": "there is no agents/fql.py; use the folder of a checkout",
    "fql --checkout fql --no-distill": "distill is False for hopper-medium-expert-demo, but the",
    "fql --checkout fql --best-of 16": "best_of is 16 for hopper-medium-expert-demo, but the auth",
    "fql --checkout fql --steps 25 --eval-every 10": "--steps 25 is no multiple of --eval-every",
    "iql": "name a checkout of ikostrikov/implicit_q_learning: --checkout PATH",
    "iql --checkout .": "there is no learner.py; use the folder of a checkout",
    "iql --checkout iql --extraction ddpg_bc": "the authors' code fixes it to awr",
    "iql --checkout iql --env cube-single-play-singletask-v0": "gelu is True for cube-single-play",
}


@pytest.mark.parametrize("line", BAD)
def test_refusals(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corl_checkout("CORL"), fql_checkout("fql"), iql_checkout("iql")
    program, *words = line.split()
    with pytest.raises(InputError) as error:
        MAIN[program](*words)
    assert BAD[line] in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists()


CHANGES = {
    "td3_bc.py of CORL has no tau, eval_actor": lambda text: text.replace(
        "    tau:", "    rho:"
    ).replace("eval_actor", "evaluation"),
    "td3_bc.py of CORL needs no_such_package": lambda text: "import no_such_package\n" + text,
    "td3_bc.py of CORL left before its last step": lambda text: text.replace(
        "range(config.max", "range(-3 + config.max"
    ),
}


@pytest.mark.parametrize("words", CHANGES)
def test_another_version_of_corl_is_refused(words, tmp_path, run):
    _, error = run("--corl", corl_checkout(tmp_path / "CORL", CHANGES[words]), *SHORT)
    assert words in error and "\n" not in error
    assert error.endswith("use a checkout of commit 6afec90")
    assert not [*tmp_path.glob("runs/*/summary.json")]
