"""Judge a run's policy with or without a simulator, film it, take it away.

    python evaluate.py runs/logs__iql__0                             # any algorithm's folder
    python evaluate.py runs/logs__iql__0 --export policy.pt2         # weights and scaling inside
    python evaluate.py runs/hopper-replay-demo__td3_bc__0 --video hopper.gif

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
(--episodes 50 --fqe-steps 50000). The policy itself was trained on all episodes.

Everything is written to evaluation.json in the run's folder.
"""

import copy
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro
from torch import nn
from torch.overrides import TorchFunctionMode

from common import Adam, ScalarMLP, choose_device, evaluate, minimize, polyak, seed_everything
from datasets import InputError, load_dataset
from experiment import load_tensors, write_atomic

ROOT = Path(__file__).parent


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[str]
    """folder of a run that has reached its last phase"""
    episodes: int = 100
    """episodes in the simulator, where there is one; 0: none"""
    eval_env: str | None = None
    """Gymnasium id; None: the run's own"""
    fqe_steps: int = 25_000
    """gradient steps of fitted Q evaluation; 0: none"""
    gamma: float = 0.99
    """discount of fitted Q evaluation"""
    seed: int = 1
    """seeds the start states, the split and the bootstrap"""
    video: str = ""
    """film one episode into this .gif (or .mp4, with imageio-ffmpeg)"""
    export: str = ""
    """write the policy to this file for torch.export.load"""


# ---- a finished run --------------------------------------------------------------------------


def load_run(folder, eval_env: str | None = None):
    """(module, nets, run's args, data, task) of a run's folder, on the CPU. Raises InputError."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        name, values, digest = config["algorithm"], dict(config["args"]), config["dataset_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is no run: give a folder with a config.json") from None
    known = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py"))
    if name not in known:
        raise InputError(f"{folder}: no algorithms/{name}.py, there are {', '.join(known)}")
    sys.path.insert(0, str(ROOT / "algorithms"))
    module = importlib.import_module(name)
    values.pop("preset", None)
    fields = {f.name for f in dataclasses.fields(module.Args)}
    if set(values) - fields:
        odd = ", ".join(sorted(set(values) - fields))
        raise InputError(f"{folder} was made by another version of {name}.py (it has {odd})")
    args = module.Args(**values | {"device": "cpu"})
    if not (folder / "checkpoint.pt").exists():
        raise InputError(f"{folder} has no checkpoint.pt: let the run finish, or interrupt it once")
    saved = load_tensors(folder / "checkpoint.pt")
    if not isinstance(saved, dict) or saved.get("phase") != "train":
        raise InputError(f"{folder} has not reached its last phase: continue it with --resume")
    eval_env = eval_env or args.eval_env
    data, task = load_dataset(args.env, choose_device("cpu", args.precision), eval_env)
    if data.digest != digest:
        raise InputError(f"{args.env} is not the data that {folder} was trained on")
    nets = module.Nets(data, args)
    try:
        nets.load_state_dict(saved["nets"])
    except RuntimeError:
        raise InputError(f"{folder} was made by another version of {name}.py") from None
    return module, nets.requires_grad_(False), args, data, task


# ---- without a simulator ---------------------------------------------------------------------


@torch.no_grad()
def in_chunks(act, obs, rows: int = 10_000):
    """Actions (N, A) of observations (N, S), computed `rows` at a time."""
    return torch.cat([act(part) for part in obs.split(rows)])


def fqe(data, act, gamma: float, steps: int, seed: int, batch_size: int = 256) -> dict:
    """Fitted Q evaluation of `act` (raw observations to actions within the bounds); see above.

    Returns the estimate, its interval, the held-out data's own discounted return, and the
    root-mean-square TD error and action distance on held-out transitions. Raises InputError."""
    seed_everything(seed)
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


class Discounted(gymnasium.Wrapper):
    """Adds up the discounted return of its one episode."""

    def __init__(self, env, gamma):
        super().__init__(env)
        self.gamma, self.weight, self.discounted = gamma, 1.0, 0.0

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.discounted += self.weight * float(reward)
        self.weight *= self.gamma
        return obs, reward, *rest


def film(act, task, path: str, seed: int) -> float:
    """One episode into a .gif or .mp4; returns its return. Raises InputError."""
    try:
        import imageio

        env = task.make(render_mode="rgb_array")
        obs, frames, total, ended = env.reset(seed=seed)[0], [], 0.0, False
        while not ended:
            frames.append(env.render())
            action = act(torch.as_tensor(obs, dtype=torch.float32)[None])[0].numpy()
            obs, reward, terminal, timeout, _ = env.step(action)
            total, ended = total + float(reward), terminal or timeout
        options = {"fps": env.metadata.get("render_fps", 30)}
        if path.endswith(".gif"):  # a third of the frames, 60 ms each
            frames, options = frames[::3], {"duration": 60, "loop": 0}
        imageio.mimwrite(path, frames, **options)
    except Exception as error:  # no display, no ffmpeg, no such folder: each library has its own
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--video {path}: {line}; on a server set MUJOCO_GL=egl") from None
    return total


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

    def __init__(self, module, nets, args):
        super().__init__()
        self.nets, self.act = nets, lambda obs: module.policy(nets, obs, args)

    def forward(self, obs, *noise):
        with Draws(noise):
            return self.act(obs)


def export(module, nets, args, path: str) -> list:
    """Write the policy for torch.export.load; returns the shapes of its noise, for one
    observation. Without noise the batch size is free, with noise it is 1."""
    obs = torch.zeros(2, len(nets.scaling.obs_mean))
    with Draws() as draws, torch.no_grad():
        module.policy(nets, obs[:1], args)
    noise = tuple(draws.taken)
    inputs = (obs[:1], *noise) if noise else (obs,)
    free = None if noise else {"obs": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(Deployed(module, nets, args), inputs, dynamic_shapes=free)
    torch.export.save(program, path)
    return [tuple(x.shape) for x in noise]


def main(args):
    if min(args.episodes, args.fqe_steps) < 0:
        raise InputError("--episodes and --fqe-steps: give whole numbers, 0 or above")
    for path in filter(None, (args.export, args.video)):
        if not Path(path).parent.is_dir():
            raise InputError(f"no folder {Path(path).parent} for {path}: make it first")
    module, nets, run_args, data, task = load_run(args.run, args.eval_env)
    found = {"run": str(args.run), "seed": args.seed}

    @torch.no_grad()
    def act(obs):
        return module.policy(nets, obs, run_args)

    if args.export:
        noise = export(module, nets, run_args, args.export)
        inputs = ["observations (1, S)" if noise else "observations (B, S)", *map(str, noise)]
        print(f"{args.export}: torch.export.load(...).module()({', '.join(inputs)}) -> actions")
    if task and args.episodes:
        envs = [Discounted(task.make(), args.gamma) for _ in range(args.episodes)]
        returns = evaluate(act, envs, 10_000 * args.seed, torch.device("cpu"))
        error = returns.std(ddof=1) / np.sqrt(len(returns)) if len(returns) > 1 else np.nan
        found |= {"return": returns.mean(), "return_standard_error": error}
        discounted = float(np.mean([env.discounted for env in envs]))
        found |= {"score": task.score(returns), "returns": list(returns)}
        found |= {"discounted_return": discounted}
        print(
            f"{args.episodes} episodes in {task.id}: score {found['score']:.1f}, "
            f"return {returns.mean():.1f} ± {error:.1f} (standard error), "
            f"discounted return {discounted:.1f}"
        )
    if args.video:
        if not task:
            raise InputError("--video needs a simulator: give --eval-env")
        print(f"{args.video}: return {film(act, task, args.video, args.seed):.1f}")
    if args.fqe_steps:
        found |= fqe(data, act, args.gamma, args.fqe_steps, args.seed)
        low, high = found["fqe_interval"]
        print(
            f"fitted Q evaluation: discounted return {found['fqe']:.1f} ({low:.1f} to {high:.1f}), "
            f"the data itself {found['data_discounted_return']:.1f}\n"
            f"held-out transitions: TD error {found['td_error']:.2f}, "
            f"action distance {found['action_distance']:.2f}"
        )
    write_atomic(Path(args.run) / "evaluation.json", json.dumps(found, indent=2).encode())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
