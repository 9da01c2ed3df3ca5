"""CORL's own TD3+BC and IQL, trained on our rows and judged by our evaluation.

    git clone https://github.com/tinkoff-ai/CORL ../CORL
    git -C ../CORL checkout 6afec90
    python peers/corl.py --corl ../CORL --algorithm td3_bc --env hopper-medium-expert-demo --seed 0
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
are not needed; what stands in for them is in peers/drive.py. Fp32 products are computed as for
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
import importlib
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
from common import Count, Episodes, Flags, InputError, Scaling, Seed
from peers import drive
from peers.program import PeerGuest, PeerRun, checked_commit, rows_of
from run import FILES, parse
from tools.store import portable

COMMIT = "6afec90"
# A field of our Args -> CORL's fields of the same meaning.
SHARED = dict(batch_size=["batch_size"], gamma=["discount"], polyak=["tau"])
SHARED |= dict(normalize_obs=["normalize"])
NAMES = {
    "td3_bc": SHARED
    | {name: [name] for name in ("alpha", "policy_noise", "noise_clip", "policy_freq")},
    "iql": SHARED | dict(tau=["iql_tau"], beta=["beta"], lr=["vf_lr", "qf_lr", "actor_lr"]),
}
# What CORL's code fixes, in the names of our Args. Its IQL has a flag for dropout, but the Gaussian
# actor ignores it.
FIXED = {
    "td3_bc": {"lr": 3e-4, "critics": 2},
    "iql": {"extraction": "awr", "max_weight": 100.0, "dropout": 0.0, "hidden": 256, "layers": 2}
    | {"gelu": False, "critic_ln": False},
}


@dataclass
class Args(Flags):
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
    precision: Literal["highest", "high", "medium"] = "highest"
    """how fp32 products are computed"""
    out: str = "runs"
    """folder that holds the folders of all runs"""
    name: str = ""
    """suffix of the run's folder; it tells variants apart"""
    overwrite: bool = False
    """replace the run's folder although that run is finished"""


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
    if re.search(FILES, args.env, re.I):
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


# ---- CORL's program --------------------------------------------------------------------------


class Environment(drive.Task):
    """What CORL reads of an environment: sizes and bounds. Actions are in [-1, 1], as our loader
    gives them. It takes no step, because our evaluation does."""

    def __init__(self, data):
        self.observation_space = drive.Space(data.obs.shape[1])
        self.action_space = drive.Space(data.action.shape[1])
        self.change = None  # CORL's normalization of observations

    def get_normalized_score(self, value):
        return value / 100  # CORL prints it, which is left out


class CorlRun(PeerRun):
    """A run of CORL's program."""

    def __init__(self, args, ours, preset, path):
        words, self.peer = [portable(word) for word in sys.argv], args.algorithm
        super().__init__(ours, preset, words, f"corl_{args.algorithm}")
        self.guests[0], self.file = PeerGuest(self, path), path
        commit = checked_commit(args.corl, COMMIT)
        self.program = {"name": "CORL", "commit": commit}
        self.program["file"] = f"algorithms/offline/{path.name}"

    def train(self, data, args) -> None:
        """Run CORL's program until it has made all its steps."""
        scale_rewards(self.peer, data, args)
        self.environment, self.scaling = Environment(data), Scaling(data)
        rows = rows_of(data)
        self.settings = corl_settings(self.peer, args, len(data.obs), self.device)
        self.program["args"] = self.settings
        drive.put_all(self.log, make=lambda name: self.environment, load=lambda env: rows)
        drive.put_flags(self.call)
        self.t = 0
        try:
            runpy.run_path(str(self.file), run_name="__main__")
        except ModuleNotFoundError as error:
            raise InputError(f"{self.file.name} of CORL needs {error.name}: {OTHER}") from None
        self.end(f"{self.file.name} of CORL", OTHER)

    def call(self, train, Config) -> None:
        """What CORL's decorated main function becomes: `train` with our flags and evaluation."""
        flags = {field.name for field in dataclasses.fields(Config)}
        absent = [name for name in self.settings if name not in flags]
        absent += [] if "eval_actor" in train.__globals__ else ["eval_actor"]
        if absent:
            raise InputError(f"{self.file.name} of CORL has no {', '.join(absent)}: {OTHER}")
        train.__globals__.update(eval_actor=self.judge, print=lambda *_: None)
        self.begin()
        train(Config(**self.settings))

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


OTHER = f"use a checkout of commit {COMMIT}"


def main(args):
    ours, preset = our_args(args)
    CorlRun(args, ours, preset, check(args, ours)).whole(CorlRun.train)


if __name__ == "__main__":
    main(parse(Args, {}, sys.argv[1:])[0])
