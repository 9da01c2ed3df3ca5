"""Evaluate trained policies with or without a simulator, record a video, export one.

    python tools/evaluate.py runs/logs__iql__0                      # any algorithm's folder
    python tools/evaluate.py runs/logs__iql__0 runs/logs__bc__0     # which one should act?
    python tools/evaluate.py runs/logs__iql__0 --export policy.pt2  # weights and scaling inside
    python tools/evaluate.py runs/hopper-replay-demo__td3_bc__0 --video hopper.gif

It prints one table of the runs, which share their data and task, and of the data's own policy, best
first. Fitted Q evaluation (FQE, tools/fqe.py) estimates a policy's discounted return from the data
alone, at the first states of its episodes, with a 95% interval. The table has its difference from
the data's own policy, estimated in the same way; the distance of the policy's actions from the
data's (root mean square, action bounds mapped to [-1, 1]); and, with a simulator, the undiscounted
return of --episodes episodes with its standard error. Notes say where FQE is not to be trusted.
docs/selection.md shows how often it chooses the best of several runs, and where it fails.

Everything is written to evaluation.json in each run's folder, beside what an earlier command with
the same --seed, --gamma and task found there for the same checkpoint.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pandas as pd
import torch
import tyro
from torch import nn
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
from common import CountOrZero, Data, InputError, Seed, ShareBelow1, require
from run import evaluate, in_one_line, load, load_tensors, make, prepare_device, score, write_whole
from tools import fqe


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders of runs that have reached their last phase, on the same data and task"""
    env: str = ""
    """the data, where it lies at another place than the run's own --env says"""
    episodes: CountOrZero = 100
    """episodes in the simulator, where there is one; 0: none"""
    eval_env: str | None = None
    """Gymnasium id to evaluate in; None: the run's own"""
    fqe_steps: CountOrZero = 10_000
    """gradient steps of fitted Q evaluation; 0: none"""
    gamma: ShareBelow1 = 0.99
    """discount of fitted Q evaluation and of the discounted return"""
    seed: Seed = 1
    """seeds the simulator's start states and FQE"""
    video: str = ""
    """film one episode into this .gif (or .mp4, with imageio-ffmpeg)"""
    export: str = ""
    """write the policy to this file for torch.export.load; needs no data by itself"""


# ---- a finished run --------------------------------------------------------------------------


@dataclasses.dataclass
class LoadedRun:
    """A trained run on the CPU. `data` and `task` are None where they were not asked for."""

    module: object  # the algorithm's file
    nets: nn.Module  # its networks, frozen
    args: object
    data: Data | None
    task: dict | None  # as run.make and run.score take it
    step: int  # of the checkpoint
    columns: dict = dataclasses.field(default_factory=dict)  # names of the data's columns

    @torch.no_grad()
    def act(self, obs):
        """Raw observations (B, S) to actions (B, A) in the task's bounds."""
        return self.module.policy(self.nets, obs, self.args)

    def inputs(self, obs, action):
        """Raw observations (B, S) and actions (B, A) in the task's bounds, as the networks take
        them: `run.nets.actor(run.inputs(obs, action)[0])`. They do not understand raw numbers."""
        scaling = self.nets.scaling
        return scaling.obs(obs), (action - scaling.action_center) / scaling.action_half_range

    @torch.no_grad()
    def q(self, obs, action):
        """The value (E, B) of every critic at raw observations (B, S) and actions (B, A) in the
        task's bounds. Raises InputError for a file that learns no Q."""
        if not hasattr(self.module, "q"):
            raise InputError(f"{self.module.__name__}.py learns no Q: use a run of another file")
        return self.module.q(self.nets, *self.inputs(obs, action))


def load_run(folder, eval_env: str | None = None, env: str = "", with_data: bool = True):
    """The LoadedRun of a run's folder. `env` names the data where it was moved; without
    `with_data`, neither data nor task is looked for. Raises InputError."""
    folder = Path(folder)
    path, fix = folder / "config.json", "repeat the run with --overwrite"
    require(path.is_file(), f"{folder} is no run: use a folder with a config.json")
    with in_one_line(path, fix):
        config = json.loads(path.read_text())
        name, values, digest = config["algorithm"], config["args"], config["settings"]["data"]
    known = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py"))
    line = f"{folder}: there is no algorithms/{name}.py, only {', '.join(known)}"
    require(name in known, line)
    module = importlib.import_module(name)
    other = f"{folder}, of another version of {name}.py or damaged,"
    with in_one_line(other, fix):
        args = module.Args(**values | {"device": "cpu"})
    path = folder / "checkpoint.pt"
    require(
        path.exists(), f"{folder} has no checkpoint.pt: let the run finish, or interrupt it once"
    )
    saved = load_tensors(path)
    last = saved.get("phase") == "train"
    require(last, f"{folder} has not reached its last phase: continue it with --resume")
    device = prepare_device("cpu", args.precision)
    with in_one_line(other, fix):
        nets = module.Nets(blank_data(saved["nets"]), args)
        nets.load_state_dict(saved["nets"])
    data = task = None
    if with_data and not eval_env and ":" in (args.eval_env or ""):
        raise InputError(
            f"{folder} was evaluated in {args.eval_env:.80}, a module that would be imported: add "
            "--eval-env with this name if you trust it, or --eval-env none"
        )
    if with_data:
        data, task = load(env or args.env, device, eval_env or args.eval_env)
        same = data.digest == digest
        require(same, f"{env or args.env} is not the data that {folder} was trained on")
    step, columns = saved.get("step"), config.get("columns") or {}
    return LoadedRun(module, nets.requires_grad_(False), args, data, task, step, columns)


def blank_data(state) -> Data:
    """Data of the sizes that saved networks were made for; its values are of no account."""
    obs = torch.zeros(2, len(state["scaling.obs_mean"]))
    action = torch.zeros(2, len(state["scaling.action_center"]))
    return Data(obs, action, torch.zeros(2), obs.clone(), torch.zeros(2))


def write(path, content) -> None:
    """Raises InputError where the file cannot be written, on a full disk say."""
    with in_one_line(path, "free some space or use another place"):
        write_whole(Path(path), content)


# ---- with a simulator ------------------------------------------------------------------------


class Discounted(gymnasium.Wrapper):
    """An environment that adds up the discounted return of its one episode."""

    def __init__(self, env, gamma):
        super().__init__(env)
        self.gamma = gamma
        self.weight, self.discounted = 1.0, 0.0

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        self.discounted += self.weight * float(reward)
        self.weight *= self.gamma
        return obs, reward, *rest


class Filmed(gymnasium.Wrapper):
    """An environment that keeps a picture of every `every`-th state, at half its height."""

    def __init__(self, env, every):
        super().__init__(env)
        self.pictures, self.every, self.steps = [], every, 0

    def step(self, action):
        if self.steps % self.every == 0:
            self.pictures.append(self.env.render()[::2, ::2])
        self.steps += 1
        return self.env.step(action)


def film(act, task, path: str, seed: int) -> float:
    """One episode into an endless .gif, or an .mp4; returns its return. Raises InputError."""
    try:
        import imageio.v3

        env, is_gif = with_camera(task), path.lower().endswith(".gif")
        fps = env.metadata.get("render_fps", 30)
        filmed = Filmed(env, max(1, round(fps / 12)) if is_gif else 1)
        (total,) = evaluate(act, [filmed], seed, torch.device("cpu"))
        how = (
            {"duration": 10 * round(100 * filmed.every / fps), "loop": 0}
            if is_gif
            else {"fps": fps}
        )
        imageio.v3.imwrite(path, filmed.pictures, **how)
    except Exception as error:  # no display, no ffmpeg, no such folder: each library has its own
        line = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "free some space" if isinstance(error, OSError) else "on a server set MUJOCO_GL=egl"
        raise InputError(f"--video {path}: {line}; {fix}") from None
    return total


def with_camera(task):
    """The task with pictures, seen by the camera that follows the body where there is one."""
    env = with_options(task, render_mode="rgb_array")
    model = getattr(env.unwrapped, "model", None)
    cameras = [model.camera(i).name for i in range(getattr(model, "ncam", 0))]
    if "track" not in cameras:
        return env
    env.close()
    return with_options(task, render_mode="rgb_array", camera_name="track")


def with_options(task, **options):
    """The task's environment, made with more keywords for gymnasium.make."""
    if "make" in task:
        return task["make"](**options)
    return make(task | {"env_kwargs": task.get("env_kwargs", {}) | options})


# ---- taking the policy away ------------------------------------------------------------------


class Draws(TorchFunctionMode):
    """Collects what a policy draws at random (`given` None), or hands it `given` instead."""

    NAMES = ("randn", "randn_like", "rand", "rand_like")

    def __init__(self, given=None):
        super().__init__()
        self.given, self.taken = given, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") not in self.NAMES:
            return function(*args, **(kwargs or {}))
        i = len(self.taken)
        draw = function(*args, **(kwargs or {})) if self.given is None else self.given[i]
        self.taken.append(draw)
        return draw


class Deployed(nn.Module):
    """Raw observations (B, S), and the noise of a policy that samples, to actions (B, A)."""

    def __init__(self, nets, act):
        super().__init__()
        self.nets, self.act = nets, act

    def forward(self, obs, *noise):
        return self.act(obs, *noise)


def export(module, nets, args, path: str, columns=None) -> list[str]:
    """Write the policy for torch.export.load; returns what it takes, in words. A policy that draws
    takes its noise as an input. The batch size is free, except for one that draws and does not
    offer policy_with_noise: there it is 1. The names of the `columns` lie in columns.json."""
    obs, free = torch.zeros(2, len(nets.scaling.obs_mean)), True
    with Draws() as draws, torch.no_grad():
        module.policy(nets, obs[:1], args)

    def act(obs, *noise):
        with Draws(noise):
            return module.policy(nets, obs, args)

    inputs, names = (obs,), ["observations (B, S)"]
    if draws.taken and hasattr(module, "policy_with_noise"):
        act = lambda obs, noise: module.policy_with_noise(nets, obs, noise, args)
        inputs = obs, torch.zeros(2, draws.taken[0].shape[1])
        names.append(f"standard normal noise (B, {inputs[1].shape[1]})")
    elif draws.taken:
        inputs, free = (obs[:1], *draws.taken), False
        names = ["observations (1, S)", *(f"noise {tuple(x.shape)}" for x in draws.taken)]
    batch = {0: torch.export.Dim("batch")}
    shapes = (batch, (batch,))[: len(inputs)] if free else None
    with torch.no_grad():
        program = torch.export.export(Deployed(nets, act), inputs, dynamic_shapes=shapes)
    buffer = io.BytesIO()
    names_too = {"columns.json": json.dumps(columns or {})}
    torch.export.save(program, buffer, extra_files=names_too)
    write(path, buffer.getbuffer())
    return names


# ---- the command -----------------------------------------------------------------------------


def load_runs(args) -> list[LoadedRun]:
    """The runs of a command line. Raises InputError where their data or tasks differ."""
    if args.export and not (args.env or args.video or args.eval_env):  # the data may be far away
        run = load_run(args.runs[0], with_data=False)
        try:
            run = load_run(args.runs[0])
        except InputError as error:
            print(f"note: the policy is exported and not judged: {error}")
        return [run]
    first = load_run(args.runs[0], args.eval_env, args.env)
    with contextlib.redirect_stdout(io.StringIO()):  # the data's notes are said once
        others = [load_run(run, args.eval_env, args.env) for run in args.runs[1:]]
    for folder, run in zip(args.runs[1:], others):
        if run.data.digest != first.data.digest:
            line = f"{folder} has other data than {args.runs[0]}"
            raise InputError(f"{line}: name runs that were trained on the same data")
        tasks = [one.task["env_id"] if one.task else "none" for one in (run, first)]
        if tasks[0] != tasks[1]:
            line = f"{folder} has the task {tasks[0]}, {args.runs[0]} has {tasks[1]}"
            raise InputError(f"{line}: add --eval-env with one of them")
        run.data = first.data
    return [first, *others]


def simulated(run, args) -> dict:
    """Returns of --episodes episodes in the simulator."""
    envs = [Discounted(make(run.task), args.gamma) for _ in range(args.episodes)]
    returns = evaluate(run.act, envs, 10_000 * args.seed, torch.device("cpu"))
    error = returns.std(ddof=1) / np.sqrt(len(returns)) if len(returns) > 1 else None
    found = {"return": returns.mean(), "return_standard_error": error, "returns": list(returns)}
    found["score"] = score(run.task, returns)
    return found | {"discounted_return": float(np.mean([env.discounted for env in envs]))}


def table(found: list[dict]) -> str:
    """The results of all policies as text, a row for each."""
    rows = []
    for x in found:
        row = {}
        for key, title in {"fqe": "FQE", "minus_data": "minus the data"}.items():
            if key in x:
                row[title] = "{:.4g} ({:.4g} to {:.4g})".format(x[key], *x[f"{key}_interval"])
        if "action_distance" in x:
            row["distance"] = f"{x['action_distance']:.2f}"
        if "return" in x:
            error = x["return_standard_error"]
            row["return"] = f"{x['return']:.1f}" + (f" ± {error:.1f}" if error is not None else "")
            row["score"] = f"{x['score']:.1f}"
        rows.append(row)
    return pd.DataFrame(rows, index=[x["run"] for x in found]).fillna("").to_string()


def save(folder, found: dict) -> None:
    """Write evaluation.json, beside what it has for the same checkpoint, flags and task."""
    path = Path(folder) / "evaluation.json"
    try:
        old = json.loads(path.read_text())
        same = all(old[key] == found[key] for key in ("step", "seed", "gamma", "task"))
        found = old | found if same else found
    except (OSError, ValueError, TypeError, KeyError):  # none, or damaged
        pass
    write(path, json.dumps(found, indent=2).encode())


def main(args):
    example = "runs/hopper-replay-demo__td3_bc__0"
    require(args.runs, f"use the folder of a run, for example {example}")
    for path in filter(None, (args.export, args.video)):
        require(len(args.runs) == 1, "--export and --video take one run: name the best alone")
        folder = Path(path).absolute().parent
        require(folder.is_dir(), f"no folder {Path(path).parent} for {path}: make it first")
        require(not Path(path).is_dir(), f"{path} is a folder: use a file's name")
    run, *_ = runs = load_runs(args)
    if args.export:
        inputs = export(run.module, run.nets, run.args, args.export, run.columns)
        print(f"{args.export}: torch.export.load(...).module()({', '.join(inputs)}) -> actions")
        for key, names in run.columns.items():
            print(f"{key}: {', '.join(map(str, [names] if isinstance(names, str) else names))}")
    if args.video:
        require(run.task, "--video needs a simulator: use --eval-env")
        print(f"{args.video}: return {film(run.act, run.task, args.video, args.seed):.1f}")
    task = run.task["env_id"] if run.task else None
    same = {"seed": args.seed, "gamma": args.gamma, "task": task}
    found = [{"run": folder, "step": one.step} | same for folder, one in zip(args.runs, runs)]
    if task and args.episodes:
        for one, x in zip(runs, found):
            x |= simulated(one, args)
    ranked, notes = sorted(found, key=lambda x: -x.get("return", 0)), []
    if run.data and args.fqe_steps:
        acts = dict(zip(args.runs, (one.act for one in runs)))
        own, *judged = fqe.compare(run.data, acts, args.gamma, args.fqe_steps, args.seed)
        found = [x | y for x, y in zip(found, judged)]
        ranked = sorted([{"run": "the data"} | own, *found], key=lambda x: -x["fqe"])
        notes = fqe.notes(ranked, run.data)
        if task and args.episodes:
            line = "FQE starts where the data's episodes start, the return where the task starts"
            notes.append(f"note: {line}")
    if len(ranked[0]) > 5:
        print("\n".join([table(ranked), *notes]))
    for folder, x in zip(args.runs, found):
        save(folder, x)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names that a terminal cannot show
    main(tyro.cli(Args, description=__doc__))
