"""CORL's own TD3+BC and IQL, trained on our rows and judged by our evaluation.

    git clone https://github.com/tinkoff-ai/CORL ../CORL
    git -C ../CORL checkout 6afec90
    python tools/corl.py --corl ../CORL --algorithm td3_bc --env hopper-medium-expert-demo --seed 0
    python algorithms/td3_bc.py --env hopper-medium-expert-demo --seed 0
    python tools/report.py runs

The result is a run's folder like those of our files, under the names corl_td3_bc and corl_iql, so
that the report shows CORL in the same tables and figures as ours. Two things are ours:

- The rows, which replace d4rl's loader. They are those of our own loader, to the bit, with rewards
  scaled and shifted as our file does it for the dataset. CORL knows such changes of rewards by the
  names of D4RL's datasets alone.
- The evaluation: the same task, start states and number of episodes as for our file, at the same
  steps. The actions are CORL's own, from `actor.act`.

Everything else is CORL's program as it lies in its folder: networks, initialization, losses,
optimizers, order of updates, batches, normalization of observations. d4rl, gym, wandb and pyrallis
are not needed; what stands in for them is in tools/drive_peer.py. Fp32 products are computed as for
our files (--precision).

Settings are those of our file and its preset for the dataset, handed to CORL under CORL's names. A
setting that CORL's code fixes to another value is refused. Some differences are in CORL's code and
stay. Its IQL updates V, Q, the targets and then the actor, takes the advantage and V(s') from V
before its step, averages over the critics, lets the log-deviation fall to -20, and starts from
PyTorch's default weights. Ours follows the authors of IQL in these points. No difference is known
for TD3+BC.

A finished run is not repeated. CORL's program cannot continue in the middle, so a run that was
stopped starts from the beginning when the command is repeated.
"""

import dataclasses
import hashlib
import importlib
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
from common import Count, Episodes, InputError, Scaling, Seed
from harness.device import prepare_device, set_precision
from harness.folder import DATA_FILES, Folder, code_hash, code_hashes
from harness.run import Run, parse, seed_everything
from tools import drive_peer, peers

COMMIT = "6afec90"
BLOBS = {  # what `git hash-object` says of CORL's files at that commit
    "td3_bc": "a78bda300fa5a7ecd041467e83dda57490cfbd2e",
    "iql": "257184f589b7edf6e2fedd3974e029b1430026dc",
}
# A field of our Args -> CORL's fields of the same meaning.
NAMES = {
    "td3_bc": {
        "batch_size": ("batch_size",),
        "alpha": ("alpha",),
        "gamma": ("discount",),
        "polyak": ("tau",),
        "policy_noise": ("policy_noise",),
        "noise_clip": ("noise_clip",),
        "policy_freq": ("policy_freq",),
        "normalize_obs": ("normalize",),
    },
    "iql": {
        "batch_size": ("batch_size",),
        "tau": ("iql_tau",),
        "beta": ("beta",),
        "gamma": ("discount",),
        "polyak": ("tau",),
        "lr": ("vf_lr", "qf_lr", "actor_lr"),
        "normalize_obs": ("normalize",),
    },
}
# What CORL's code fixes, in the names of our Args. Its IQL has a flag for dropout, but the Gaussian
# actor ignores it.
FIXED = {
    "td3_bc": {"lr": 3e-4, "critics": 2},
    "iql": {"extraction": "awr", "max_weight": 100.0, "dropout": 0.0},
}
# What our rows already hold when CORL reads them, so that CORL need not know it.
IN_ROWS = {"td3_bc": ("reward_shift",), "iql": ("normalize_reward", "reward_shift")}


@dataclass
class Args:
    phases: ClassVar[dict] = {}

    corl: str = ""
    """checkout of tinkoff-ai/CORL"""
    algorithm: Literal["td3_bc", "iql"] = "td3_bc"
    """which program of CORL is trained, beside our file of the same name"""
    env: str = "hopper-medium-expert-demo"
    """dataset: bundled or D4RL name, or Minari id"""
    seed: Seed = 0
    """seeds CORL's networks and batches, and the evaluation"""
    steps: Count | None = None
    """gradient steps; None: those of our file's preset"""
    eval_every: Count | None = None
    """gradient steps between evaluations; None: those of our file's preset"""
    eval_episodes: Episodes | None = None
    """episodes per evaluation; None: those of our file's preset"""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one"""
    precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """how fp32 products are computed; auto takes a faster way only where it is about as exact"""
    out: str = "runs"
    """folder that holds the folders of all runs"""
    name: str = ""
    """suffix of the run's folder; it tells variants apart"""
    overwrite: bool = False
    """replace the run's folder although that run is finished"""

    def resolve(self):
        pass


# ---- settings --------------------------------------------------------------------------------


def our_args(args):
    """(Args of our file for this dataset, its preset in force). A finished run is left alone by
    what --resume does in our files. Raises InputError."""
    module = importlib.import_module(args.algorithm)
    words = ["--env", args.env]
    for field in ("seed", "steps", "eval_every", "eval_episodes", "device", "precision", "name"):
        value = getattr(args, field)
        if value not in (None, ""):
            words += [f"--{field.replace('_', '-')}", str(value)]
    ours, preset = parse(module.Args, module.PRESETS, words)
    ours.out, ours.overwrite, ours.resume = args.out, args.overwrite, not args.overwrite
    return ours, preset


def check(args, ours) -> Path:
    """The path of CORL's file. InputError where it is missing, or cannot do what our file does."""
    file = f"algorithms/offline/{args.algorithm}.py"
    if not args.corl:
        raise InputError("name a checkout of tinkoff-ai/CORL: --corl PATH")
    if not (Path(args.corl) / file).is_file():
        raise InputError(f"--corl {args.corl}: there is no {file}; use the folder of a checkout")
    if args.env.lower().endswith(DATA_FILES):
        raise InputError(
            f"--env {args.env}: use the name of a dataset; our presets, whose settings CORL "
            "takes over, are not made for files"
        )
    for field, value in FIXED[args.algorithm].items():
        if getattr(ours, field) != value:
            raise InputError(
                f"our {args.algorithm}.py has {field} {getattr(ours, field)} for {args.env}, but "
                f"CORL's code fixes it to {value}: the two cannot be compared there"
            )
    if ours.steps % ours.eval_every:
        raise InputError(
            f"--steps {ours.steps} is no multiple of --eval-every {ours.eval_every}: CORL's "
            "program would not evaluate the last step; use a multiple"
        )
    return (Path(args.corl) / file).resolve()


def corl_settings(algorithm: str, ours, count: int, device) -> dict:
    """CORL's flags, for `count` rows."""
    settings = {
        "device": str(device),
        "env": ours.env,
        "seed": ours.seed,
        "max_timesteps": ours.steps,
        "eval_freq": ours.eval_every,
        "n_episodes": ours.eval_episodes,
        "buffer_size": count,
        "normalize_reward": False,  # the rows hold it
    }
    for field, names in NAMES[algorithm].items():
        settings |= dict.fromkeys(names, getattr(ours, field))
    return settings


def scale_rewards(algorithm: str, data, ours) -> None:
    """Change data.reward as our file does before it trains."""
    if algorithm == "iql":
        importlib.import_module("iql").scale_rewards(data, ours)
    else:
        data.reward += ours.reward_shift


def version(path: Path) -> str:
    """The commit of the checkout that holds CORL's file; the file itself shows the one that this
    tool was made for."""
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if blob == BLOBS[path.stem]:
        return COMMIT
    root = path.parents[2]
    found = peers.commit(root) if (root / ".git").exists() else "unknown"
    print(f"note: CORL's {path.name} is not that of commit {COMMIT}, for which this tool was made")
    return f"{found}, with another {path.name} than {COMMIT}"


def portable(word: str) -> str:
    """A word of a command line, where a path of this machine is cut to its last part."""
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (Path(value).name if Path(value).is_absolute() else value)


# ---- CORL's program --------------------------------------------------------------------------


class Environment(drive_peer.Task):
    """What CORL reads of an environment: sizes and bounds. Actions are in [-1, 1], as our loader
    gives them. It takes no step, because our evaluation does."""

    def __init__(self, data):
        self.observation_space = drive_peer.Space(data.obs.shape[1])
        self.action_space = drive_peer.Space(data.action.shape[1])
        self.change = None  # CORL's normalization of observations

    def get_normalized_score(self, value):
        return value / 100  # CORL prints it, which is left out


class CorlRun(Run):
    """A run whose loop is in CORL's program. That program logs after every update, then evaluates
    where it is due: both end here."""

    def __init__(self, args, ours, preset, path, words):
        self.args, self.preset, self.words = ours, preset, [portable(word) for word in words]
        self.file, self.program = path, args.algorithm
        self.algorithm = f"corl_{args.algorithm}"
        self.folder = Folder(ours, self.algorithm)
        self.commit = version(path)
        hidden = ("device", "out", "resume", "overwrite", "log_every", "save_every", "track")
        self.settings = {k: v for k, v in vars(ours).items() if k not in hidden}
        self.settings |= {"algorithm": self.algorithm, "torch": torch.__version__}
        self.settings |= {f"code of {part}": value for part, value in self.hashes().items()}
        self.device = prepare_device(ours.device)
        self.precision, self.precision_reason = set_precision(ours.precision, self.device)
        seed_everything(ours.seed)

    def hashes(self) -> dict:
        """Hashes of all code that this run's numbers depend on: "algorithm" is CORL's file."""
        return code_hashes(self.file) | {"tool": code_hash(__file__, drive_peer.__file__)}

    def train(self, data) -> None:
        """Run CORL's program until it has made all its steps."""
        self.environment, self.scaling = Environment(data), Scaling(data)
        rows = {
            "observations": data.obs.cpu().numpy(),
            "actions": data.action.cpu().numpy(),
            "rewards": data.reward.cpu().numpy(),
            "next_observations": data.next_obs.cpu().numpy(),
            "terminals": data.terminal.cpu().numpy(),
        }
        self.corl_args = corl_settings(self.program, self.args, len(data.obs), self.device)
        drive_peer.put_all(self.log, make=lambda name: self.environment, load=lambda env: rows)
        drive_peer.put_flags(self.call)
        self.rows, self.t = {"eval": []}, None
        try:
            runpy.run_path(str(self.file), run_name="__main__")
        except ModuleNotFoundError as error:
            raise InputError(f"{self.file.name} of CORL needs {error.name}: {OTHER}") from None
        if self.t is not None or not self.rows["eval"]:
            raise InputError(f"{self.file.name} of CORL left before its last step: {OTHER}")

    def call(self, train, Config) -> None:
        """What CORL's decorated main function becomes: `train` with our flags and evaluation."""
        flags = {field.name for field in dataclasses.fields(Config)}
        absent = [name for name in self.corl_args if name not in flags]
        absent += [] if "eval_actor" in train.__globals__ else ["eval_actor"]
        if absent:
            raise InputError(f"{self.file.name} of CORL has no {', '.join(absent)}: {OTHER}")
        train.__globals__.update(eval_actor=self.judge, print=lambda *_: None)
        self.start(None, SimpleNamespace())
        self.counter = self.loop(self.args.steps)
        self.t = next(self.counter)
        train(Config(**self.corl_args))

    def log(self, values: dict) -> None:
        """Take the losses of step t; those of a step with an evaluation wait for `judge`."""
        if "d4rl_normalized_score" in values:
            return
        self.metrics = {name: np.float64(value) for name, value in values.items()}
        if self.t % self.args.eval_every:
            self.advance()

    def judge(self, env, actor, device, n_episodes, seed) -> np.ndarray:
        """In place of CORL's eval_actor: our evaluation of the actions of CORL's actor."""

        def act(obs):
            """Raw observations (B, S) to CORL's actions (B, A) in the task's bounds."""
            states = obs.cpu().numpy()
            states = env.change(states) if env.change else states
            actions = np.stack([actor.act(state, device) for state in states])
            return self.scaling.action(torch.as_tensor(actions, device=obs.device))

        actor.eval()
        self.advance(act)
        actor.train()
        return np.array([self.rows["eval"][-1]["return"]])

    def advance(self, act=None) -> None:
        """Step t is over."""
        self.after(self.t, self.metrics, act)
        self.t = next(self.counter, None)

    def _save_checkpoint(self, t):
        """CORL's networks are not ours to continue or to export."""

    def _leave(self, t):
        self.folder.close()
        print(f"\nstopped at step {t}; repeat the command to start again", flush=True)
        raise SystemExit(130)

    def _config(self):
        config = super()._config()
        corl_file = f"algorithms/offline/{self.file.name}"
        return config | {
            "args": config["args"] | {"out": portable(self.args.out), "resume": False},
            "code": self.hashes(),
            "versions": config["versions"] | {"CORL": self.commit},
            "corl": {"commit": self.commit, "file": corl_file, "args": self.corl_args},
        }


OTHER = f"use a checkout of commit {COMMIT}"


def main(args):
    ours, preset = our_args(args)
    path = check(args, ours)
    run = CorlRun(args, ours, preset, path, sys.argv)
    data = run.load()
    if run.task is None:
        raise InputError(f"{args.env} has no task to evaluate a policy in: use another dataset")
    scale_rewards(args.algorithm, data, ours)
    run.train(data)
    run.finish()


if __name__ == "__main__":
    main(parse(Args, {})[0])
