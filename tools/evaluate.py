"""Judge a run's policy with or without a simulator, film it, take it away.

    python tools/evaluate.py runs/logs__iql__0                      # any algorithm's folder
    python tools/evaluate.py runs/logs__iql__0 --export policy.pt2  # weights and scaling inside
    python tools/evaluate.py runs/hopper-replay-demo__td3_bc__0 --video hopper.gif

With a simulator: returns of --episodes episodes. With or without: fitted Q evaluation (FQE; Le,
Voloshin & Yue, ICML 2019; arXiv:1903.08738), the policy's Q, trained on four fifths of the data's
episodes with

    L_Q = E[ (r + gamma Q'(s', pi(s')) - Q(s,a))^2 ]

and read at the start states of the held-out fifth, beside the discounted return that the data had
from them. Its 95% interval is a bootstrap over held-out episodes: it says how much start states
vary, not how wrong Q may be. Read it together with the TD error on held-out transitions (root mean
square, in units of reward) and with the distance of the policy's actions from the data's (root mean
square, action bounds mapped to [-1, 1]): where the policy leaves the data, FQE extrapolates, mostly
upwards: for bc.py's policy on the bundled data, 0.38 away from it, FQE says 186, the simulator 108
(--episodes 50 --fqe-steps 50000). The policy itself was trained on all episodes. FQE goes on beyond
time limits, the data's return ends where the recording does: in logs cut by time limits the two
differ even for the policy that made them.

Everything is written to evaluation.json in the run's folder, beside what an earlier command with
the same --seed and --gamma found there for the same checkpoint.
"""

import copy
import dataclasses
import importlib
import io
import json
import sys
import typing
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
from common import (
    Adam,
    CountOrZero,
    Data,
    Flags,
    InputError,
    ScalarMLP,
    Seed,
    ShareBelow1,
    minimize,
    polyak,
    prepare_device,
)
from harness.resume import load_tensors, read_json, write_atomic
from run import evaluate, load, make, parse, score


@dataclasses.dataclass
class Args(Flags):
    run: tyro.conf.Positional[str] = ""
    """folder of a run that has reached its last phase"""
    env: str = ""
    """the data, where it lies at another place than the run's own --env says"""
    episodes: CountOrZero = 100
    """episodes in the simulator, where there is one; 0: none"""
    eval_env: str | None = None
    """Gymnasium id to evaluate in; None: the run's own"""
    fqe_steps: CountOrZero = 25_000
    """gradient steps of fitted Q evaluation; 0: none"""
    gamma: ShareBelow1 = 0.99
    """discount of fitted Q evaluation and of the discounted return"""
    seed: Seed = 1
    """seeds the start states, the split and the bootstrap"""
    video: str = ""
    """film one episode into this .gif of at most 1 MB (or .mp4, with imageio-ffmpeg)"""
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


def fits(kind, value) -> bool:
    """Whether a value read from JSON is of a field's type: a class, a Literal or a union."""
    if options := typing.get_args(kind):
        return any(fits(option, value) for option in options)
    if not isinstance(kind, type):  # a Literal's value
        return value == kind
    return isinstance(value, int | float if kind is float else kind)


def load_run(folder, eval_env: str | None = None, env: str = "", with_data: bool = True):
    """The LoadedRun of a run's folder. `env` names the data where it was moved; without
    `with_data`, neither data nor task is looked for. Raises InputError."""
    folder = Path(folder)
    try:
        config = read_json(folder / "config.json")
        name, values, digest = config["algorithm"], dict(config["args"]), config["dataset_sha256"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is no run: use a folder with a config.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = f"{folder}/config.json cannot be read ({type(error).__name__}: {error})"
        raise InputError(f"{line}: repeat the run with --overwrite") from None
    known = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py"))
    if name not in known:
        raise InputError(f"{folder}: there is no algorithms/{name}.py, only {', '.join(known)}")
    module = importlib.import_module(name)
    kinds = {f.name: f.type for f in dataclasses.fields(module.Args)}
    odd = [k for k, value in values.items() if k not in kinds or not fits(kinds[k], value)]
    other = f"{folder} was made by another version of {name}.py or is damaged"
    if odd:
        had = ", ".join(f"{k}={values[k]!r:.80}" for k in odd)
        raise InputError(f"{other} (it has {had}): repeat the run with --overwrite")
    args = module.Args(**values | {"device": "cpu"})
    if not (folder / "checkpoint.pt").exists():
        raise InputError(f"{folder} has no checkpoint.pt: let the run finish, or interrupt it once")
    saved = load_tensors(folder / "checkpoint.pt")
    if not isinstance(saved, dict) or saved.get("phase") != "train":
        raise InputError(f"{folder} has not reached its last phase: continue it with --resume")
    device = prepare_device("cpu", args.precision)
    try:
        nets = module.Nets(blank_data(saved["nets"]), args)
        nets.load_state_dict(saved["nets"])
    except (RuntimeError, KeyError, TypeError, AttributeError, IndexError):
        raise InputError(f"{other} (its networks): repeat the run with --overwrite") from None
    data = task = None
    if with_data and not eval_env and ":" in (args.eval_env or ""):
        raise InputError(
            f"{folder} was evaluated in {args.eval_env:.80}, a module that would be imported: add "
            "--eval-env with this name if you trust it, or --eval-env none"
        )
    if with_data:
        data, task = load(env or args.env, device, eval_env or args.eval_env)
        if data.digest != digest:
            raise InputError(f"{env or args.env} is not the data that {folder} was trained on")
    return LoadedRun(module, nets.requires_grad_(False), args, data, task, saved.get("step"))


def blank_data(state) -> Data:
    """Data of the sizes that saved networks were made for; its values are of no account."""
    obs = torch.zeros(2, len(state["scaling.obs_mean"]))
    action = torch.zeros(2, len(state["scaling.action_center"]))
    return Data(obs, action, torch.zeros(2), obs.clone(), torch.zeros(2))


def write(path, content) -> None:
    """Raises InputError where the file cannot be written, on a full disk say."""
    try:
        write_atomic(Path(path), content)
    except OSError as error:
        line = f"{path} cannot be written ({error.strerror})"
        raise InputError(f"{line}: free some space or use another place") from None


# ---- without a simulator ---------------------------------------------------------------------


@torch.no_grad()
def in_chunks(act, obs, rows: int = 10_000):
    """Actions (N, A) of observations (N, S), computed `rows` at a time."""
    return torch.cat([act(part) for part in obs.split(rows)])


def fqe(data, act, gamma: float, steps: int, seed: int, batch_size: int = 256) -> dict:
    """Fitted Q evaluation of `act` (raw observations to actions within the bounds); see above.

    Returns the estimate, its interval, the held-out data's own discounted return, and the
    root-mean-square TD error and action distance on held-out transitions. Raises InputError."""
    torch.manual_seed(seed)
    episodes = int(data.episode[-1]) + 1
    if episodes < 2:
        raise InputError(f"{data.name} is one episode, none can be held out: --fqe-steps 0")
    held_out = torch.zeros(episodes, dtype=torch.bool)
    held_out[torch.randperm(episodes)[: max(1, episodes // 5)]] = True
    test = held_out[data.episode]
    center, half = (
        (data.action_high + data.action_low) / 2,
        (data.action_high - data.action_low) / 2,
    )
    next_action = (in_chunks(act, data.next_obs) - center) / half
    mean, std = data.obs[~test].mean(0), data.obs[~test].std(0) + 1e-3
    unit = float(data.reward[~test].std().clamp(min=1e-8))  # so that one learning rate fits all
    r = data.reward / unit
    s, s2 = (data.obs - mean) / std, (data.next_obs - mean) / std
    rows = torch.nonzero(~test).squeeze(1)
    q = ScalarMLP(s.shape[1] + next_action.shape[1], 256, 256)
    q_target, opt = copy.deepcopy(q).requires_grad_(False), Adam(q.parameters(), 3e-4)

    def y(i):
        return r[i] + gamma * (1 - data.terminal[i]) * q_target(s2[i], next_action[i])

    for _ in range(steps):
        i = rows[torch.randint(len(rows), (batch_size,))]
        minimize(opt, (q(s[i], data.action[i]) - y(i)).square().mean())
        polyak(q_target, q, 0.02)
    first = torch.ones_like(test)
    first[1:] = data.episode[1:] != data.episode[:-1]
    with torch.no_grad():
        start = first & test
        values = unit * q(s[start], (in_chunks(act, data.obs[start]) - center) / half)
        i = torch.nonzero(test).squeeze(1)
        td = torch.cat([q(s[j], data.action[j]) - y(j) for j in i.split(100_000)])
        own = (in_chunks(act, data.obs[test]) - center) / half
    draws = np.random.default_rng(seed).integers(len(values), size=(2_000, len(values)))
    low, high = np.quantile(values.numpy()[draws].mean(1), [0.025, 0.975])
    return {
        "fqe": float(values.mean()),
        "fqe_interval": [float(low), float(high)],
        "data_discounted_return": discounted_return(data, held_out, gamma),
        "held_out_episodes": int(held_out.sum()),
        "td_error": unit * float(td.square().mean().sqrt()),
        "action_distance": float((own - data.action[test]).square().mean().sqrt()),
    }


def discounted_return(data, chosen, gamma: float) -> float:
    """Mean discounted return of the chosen episodes (E,) as far as they were recorded."""
    first = torch.searchsorted(data.episode, torch.arange(len(chosen)))
    age = torch.arange(len(data.episode)) - first[data.episode]
    returns = torch.zeros(len(chosen), dtype=torch.double)
    returns.index_add_(0, data.episode, data.reward.double() * gamma ** age.double())
    return float(returns[chosen].mean())


# ---- with a simulator ------------------------------------------------------------------------


class Discounted:
    """An environment that adds up the discounted return of its one episode."""

    def __init__(self, env, gamma):
        self.env, self.gamma, self.reset = env, gamma, env.reset
        self.weight, self.discounted = 1.0, 0.0

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        self.discounted += self.weight * float(reward)
        self.weight *= self.gamma
        return obs, reward, *rest


def film(act, task, path: str, seed: int) -> float:
    """One episode into a .gif or .mp4; returns its return. Raises InputError."""
    try:
        import imageio

        env = with_camera(task)
        fps = env.metadata.get("render_fps", 30)
        (total,) = evaluate(act, [env], seed, torch.device("cpu"))
        frames = env.render()  # of the whole episode: Gymnasium's own recorder
        if path.lower().endswith(".gif"):
            every = max(1, round(fps / 12))
            write(path, gif(frames[::every], every / fps))
        else:
            imageio.mimwrite(path, frames, fps=fps)
    except Exception as error:  # no display, no ffmpeg, no such folder: each library has its own
        line = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "free some space" if isinstance(error, OSError) else "on a server set MUJOCO_GL=egl"
        raise InputError(f"--video {path}: {line}; {fix}") from None
    return total


def with_camera(task):
    """The task, keeping the pictures of an episode, seen by the camera that follows the body where
    there is one."""
    env = with_options(task, render_mode="rgb_array_list")
    model = getattr(env.unwrapped, "model", None)
    cameras = [model.camera(i).name for i in range(getattr(model, "ncam", 0))]
    if "track" not in cameras:
        return env
    env.close()
    return with_options(task, render_mode="rgb_array_list", camera_name="track")


def with_options(task, **options):
    """The task's environment, made with more keywords for gymnasium.make."""
    if "make" in task:
        return task["make"](**options)
    return make(task | {"env_kwargs": task.get("env_kwargs", {}) | options})


def gif(frames: list, seconds: float, most: int = 1_000_000) -> bytes:
    """Frames, `seconds` apart, as an endless animation of at most `most` bytes: 240 pixels high in
    64 colors, or as much smaller as that takes."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    width, height = images[0].size
    palette = images[len(images) // 2].quantize(64)  # one for all, so that still parts stay still
    scale, content = min(1.0, 240 / height), bytes(most + 1)
    while len(content) > most and scale * height > 20:
        size = round(scale * width), round(scale * height)
        first, *rest = (x.resize(size).quantize(palette=palette, dither=0) for x in images)
        buffer = io.BytesIO()
        first.save(
            buffer, "GIF", save_all=True, append_images=rest, duration=1000 * seconds, loop=0
        )
        content, scale = buffer.getvalue(), 0.8 * scale
    return content


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


def export(module, nets, args, path: str) -> list[str]:
    """Write the policy for torch.export.load; returns what it takes, in words. A policy that draws
    takes its noise as an input. The batch size is free, except for one that draws and does not
    offer policy_with_noise: there it is 1."""
    obs, free = torch.zeros(2, len(nets.scaling.obs_mean)), True
    with Draws() as draws, torch.no_grad():
        module.policy(nets, obs[:1], args)

    def act(obs, *noise):
        with Draws(noise):
            return module.policy(nets, obs, args)

    inputs, names = (obs,), ["observations (B, S)"]
    if draws.taken and hasattr(module, "policy_with_noise"):
        act = lambda obs, noise: module.policy_with_noise(nets, obs, noise, args)
        inputs = obs, torch.zeros(2, len(nets.scaling.action_center))
        names.append("standard normal noise (B, A)")
    elif draws.taken:
        inputs, free = (obs[:1], *draws.taken), False
        names = ["observations (1, S)", *(f"noise {tuple(x.shape)}" for x in draws.taken)]
    batch = {0: torch.export.Dim("batch")}
    shapes = (batch, (batch,))[: len(inputs)] if free else None
    with torch.no_grad():
        program = torch.export.export(Deployed(nets, act), inputs, dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write(path, buffer.getbuffer())
    return names


def main(args):
    if not args.run:
        raise InputError("use the folder of a run, for example runs/hopper-replay-demo__td3_bc__0")
    for path in filter(None, (args.export, args.video)):
        if not Path(path).absolute().parent.is_dir():
            raise InputError(f"no folder {Path(path).parent} for {path}: make it first")
        if Path(path).is_dir():
            raise InputError(f"{path} is a folder: use a file's name")
    if args.export and not (args.env or args.video or args.eval_env):  # the data may be far away
        run = load_run(args.run, with_data=False)
        try:
            run = load_run(args.run)
        except InputError as error:
            print(f"note: the policy is exported and not judged: {error}")
    else:
        run = load_run(args.run, args.eval_env, args.env)
    data, task, act = run.data, run.task, run.act
    same = {"step": run.step, "seed": args.seed, "gamma": args.gamma}
    found = {"run": str(args.run), **same}
    if args.export:
        inputs = export(run.module, run.nets, run.args, args.export)
        print(f"{args.export}: torch.export.load(...).module()({', '.join(inputs)}) -> actions")
    if task and args.episodes:
        envs = [Discounted(make(task), args.gamma) for _ in range(args.episodes)]
        returns = evaluate(act, envs, 10_000 * args.seed, torch.device("cpu"))
        error = returns.std(ddof=1) / np.sqrt(len(returns)) if len(returns) > 1 else None
        found |= {"return": returns.mean(), "return_standard_error": error}
        found |= {"score": score(task, returns), "returns": list(returns)}
        found["discounted_return"] = float(np.mean([env.discounted for env in envs]))
        raw = score(task, [1e9]) == 1e9  # there are no references
        first = "" if raw else f"score {found['score']:.1f}, "
        spread = "" if error is None else f" ± {error:.1f} (standard error)"
        print(
            f"{args.episodes} episode{'s' * (args.episodes > 1)} in {task['env_id']}: "
            f"{first}return {returns.mean():.1f}{spread}, "
            f"discounted return {found['discounted_return']:.1f}"
        )
    if args.video:
        if not task:
            raise InputError("--video needs a simulator: use --eval-env")
        print(f"{args.video}: return {film(act, task, args.video, args.seed):.1f}")
    if data and args.fqe_steps:
        found |= fqe(data, act, args.gamma, args.fqe_steps, args.seed)
        low, high = found["fqe_interval"]
        print(
            f"fitted Q evaluation: discounted return {found['fqe']:.1f} ({low:.1f} to {high:.1f}), "
            f"the data itself {found['data_discounted_return']:.1f} (as recorded)\n"
            f"held-out transitions: TD error {found['td_error']:.2f}, "
            f"action distance {found['action_distance']:.2f}"
        )
    path = Path(args.run) / "evaluation.json"
    try:
        old = read_json(path)
        found = old | found if same.items() <= old.items() else found
    except (OSError, ValueError, AttributeError):  # none, or damaged
        pass
    write(path, json.dumps(found, indent=2).encode())


if __name__ == "__main__":
    main(parse(Args, {}, sys.argv[1:])[0])
