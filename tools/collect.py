"""Make a D4RL-style offline dataset for any Gymnasium task with continuous actions.

An online agent, SAC (Haarnoja et al., arXiv:1812.05905), is trained as far as the level needs:

    random         actions drawn uniformly from the bounds; no agent
    medium-replay  every transition the agent saw until its mean return first reached "medium"
    medium         --steps transitions of the medium agent, actions sampled
    expert         --steps transitions of the agent after --train-steps, actions sampled
    medium-expert  --steps transitions of each of the two

"Medium" is the first policy whose deterministic return (mean of 10 episodes, every 5,000 steps)
reaches a third of the way between D4RL's reference scores, or --medium-return.

    python collect.py --env Hopper-v5 --level medium-replay --flat hopper-medium-replay.npz
    python algorithms/td3_bc.py --env hopper-medium-replay.npz

Ctrl-C saves everything; the same command continues. An interrupted episode is stored as a cut one.
"""

import copy
import io
import json
import re
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from common import (
    MLP,
    Adam,
    InputError,
    ScalarMLP,
    choose_device,
    evaluate,
    minimize,
    parse,
    polyak,
    sample_tanh_normal,
    seed_everything,
)
from datasets import reference_scores
from experiment import load_tensors, save_tensors, write_atomic

LEVELS = ("random", "medium-replay", "medium", "expert", "medium-expert")
GAMMA, POLYAK, LR, BATCH = 0.99, 0.005, 3e-4, 256  # SAC's own settings
EVAL_EVERY, EVAL_EPISODES, SAVE_EVERY = 5_000, 10, 10_000


@dataclass
class Args:
    env: str = "Hopper-v5"
    """Gymnasium id of the task"""
    level: str = "medium-replay"
    """random, medium-replay, medium, expert or medium-expert"""
    steps: int = 1_000_000
    """transitions to write (of each half for medium-expert; no effect on medium-replay)"""
    train_steps: int = 1_000_000
    """online steps the agent may take: "expert" is the agent after them"""
    random_steps: int = 5_000
    """first online steps with uniform actions and no updates"""
    medium_return: float | None = None
    """mean return that makes a policy "medium"; None: a third of the D4RL reference"""
    seed: int = 0
    """seeds networks, environment and sampling"""
    flat: str = ""
    """write one compressed .npz file (algorithms read it with --env FILE)"""
    dataset_id: str = ""
    """write a local Minari dataset of this id, for example hopper/medium-replay-v0"""
    overwrite: bool = False
    """replace an existing dataset"""
    device: str = "auto"
    """cpu, cuda or auto"""
    resume: bool = True
    """continue what an interrupted run of the same command left"""
    precision: str = "auto"
    """how fp32 products are computed: auto, highest, high or medium"""


class Nets(nn.Module):
    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.actor = MLP(obs_dim, 256, 256, 2 * act_dim)
        self.q = ScalarMLP(obs_dim + act_dim, 256, 256, members=2)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def pi(self, s):
        mean, log_std = self.actor(s).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)


def update(nets, opt, s, a, r, s2, terminal):
    """One SAC step: critics, actor, temperature (target entropy -A), targets."""
    alpha = nets.log_alpha.exp().detach()
    with torch.no_grad():
        a2, log_prob2, _ = sample_tanh_normal(*nets.pi(s2))
        v2 = nets.q_target(s2, a2).amin(0) - alpha * log_prob2
        y = r + GAMMA * (1 - terminal) * v2
    minimize(opt.q, (nets.q(s, a) - y).square().mean(1).sum())
    a_pi, log_prob, _ = sample_tanh_normal(*nets.pi(s))
    minimize(opt.actor, (alpha * log_prob - nets.q(s, a_pi).amin(0)).mean())
    surplus = -log_prob.detach().mean() + a.shape[1]
    minimize(opt.alpha, nets.log_alpha.exp() * surplus)
    polyak(nets.q_target, nets.q, POLYAK)


class Recorder:
    """Transitions in the order they happened; `final` holds each episode's last observation."""

    def __init__(self, obs_dim, act_dim, capacity):
        self.obs = torch.zeros(capacity, obs_dim)
        self.next_obs = torch.zeros(capacity, obs_dim)
        self.action = torch.zeros(capacity, act_dim)  # in [-1, 1]
        self.reward, self.terminal = torch.zeros(capacity), torch.zeros(capacity)
        self.cut = torch.zeros(capacity, dtype=torch.bool)
        self.size = 0

    def add(self, obs, action, reward, next_obs, terminal, timeout):
        i = self.size
        self.obs[i], self.action[i] = torch.as_tensor(obs), action
        self.next_obs[i] = torch.as_tensor(next_obs)
        self.reward[i], self.terminal[i], self.cut[i] = reward, terminal, timeout and not terminal
        self.size += 1

    def sample(self, batch_size, device):
        i = torch.randint(self.size, (batch_size,))
        rows = (self.obs, self.action, self.reward, self.next_obs, self.terminal)
        return [x[i].to(device) for x in rows]

    def close(self):
        """Cut the episode in progress."""
        self.cut[self.size - 1] |= self.terminal[self.size - 1] == 0

    def state(self):
        names = ("obs", "next_obs", "action", "reward", "terminal", "cut")
        return {name: getattr(self, name)[: self.size].clone() for name in names}

    def restore(self, state):
        self.size = len(state["obs"])
        if self.size > len(self.obs):
            raise InputError(
                f"{self.size:,} steps are collected already: raise --train-steps or "
                f"--steps, now {len(self.obs):,}"
            )
        for name, value in state.items():
            getattr(self, name)[: self.size] = value
        if self.size:
            self.close()  # the environment starts afresh


class Collector:
    """The environment, the agent and everything that a later start continues from."""

    def __init__(self, args):
        self.args, self.stopped = args, False
        self.device = choose_device(args.device, args.precision)
        seed_everything(args.seed)
        self.env = make_env(args.env)
        space, act_space = self.env.observation_space, self.env.action_space
        self.low, self.high = torch.tensor(act_space.low), torch.tensor(act_space.high)
        dims = space.shape[0], act_space.shape[0]
        self.nets = Nets(*dims).to(self.device)
        self.opt = SimpleNamespace(
            q=Adam(self.nets.q.parameters(), LR),
            actor=Adam(self.nets.actor.parameters(), LR),
            alpha=Adam([self.nets.log_alpha], LR),
        )
        self.replay = Recorder(*dims, args.train_steps if args.level != "random" else 0)
        halves = {"medium-replay": 0, "medium-expert": 2}.get(args.level, 1)
        self.rollouts = Recorder(*dims, halves * args.steps)
        self.returns, self.medium = [], None
        self.partial = Path((args.flat or args.dataset_id.replace("/", "-")) + ".partial.pt")
        names = ("env", "level", "seed", "random_steps")  # the others may change on the way
        self.settings = json.dumps({name: getattr(args, name) for name in names})
        if args.resume and self.partial.exists():
            self.restore(load_tensors(self.partial))
        self.eval_envs = [make_env(args.env) for _ in range(EVAL_EPISODES)]

    def act(self, obs, deterministic=False):
        """Observations (n, S) -> actions (n, A) in [-1, 1]."""
        mean, log_std = self.nets.pi(obs)
        return mean.tanh() if deterministic else sample_tanh_normal(mean, log_std)[0]

    def to_bounds(self, action):
        return self.low + (action.cpu() + 1) / 2 * (self.high - self.low)

    @torch.no_grad()
    def step(self, recorder, obs, uniform):
        """One environment step into `recorder`; returns the next observation."""
        if obs is None:
            obs = self.env.reset(seed=self.args.seed if not recorder.size else None)[0]
        row = torch.as_tensor(obs, dtype=torch.float32)[None]
        if uniform:
            action = 2 * torch.rand(len(self.low)) - 1
        else:
            action = self.act(row.to(self.device))[0].cpu()
        next_obs, reward, terminal, timeout, _ = self.env.step(self.to_bounds(action).numpy())
        recorder.add(row[0], action, reward, next_obs, terminal, timeout)
        return None if terminal or timeout else next_obs

    def train(self, bar, goal_return):
        """Train until the deterministic return reaches `goal_return` (None: to --train-steps)."""
        if goal_return is not None and any(r >= goal_return for _, r in self.returns):
            return True
        obs = None
        for t in range(self.replay.size + 1, self.args.train_steps + 1):
            obs = self.step(self.replay, obs, uniform=t <= self.args.random_steps)
            if t > self.args.random_steps:
                update(self.nets, self.opt, *self.replay.sample(BATCH, self.device))
            bar.update()
            if t % EVAL_EVERY == 0:
                returns = evaluate(
                    lambda s: self.to_bounds(self.act(s, deterministic=True)),
                    self.eval_envs,
                    10_000 + self.args.seed,
                    self.device,
                )
                self.returns.append((t, float(returns.mean())))
                bar.set_postfix_str(f"return {returns.mean():.0f}")
                bar.disable and print(f"agent {t:,}: return {returns.mean():.0f}", flush=True)
                if goal_return is not None and returns.mean() >= goal_return:
                    self.save()
                    return True
            if t % SAVE_EVERY == 0 or t == self.args.train_steps or self.stopped:
                self.save()
        return goal_return is None

    def roll_out(self, bar, until, uniform=False):
        obs = None
        while self.rollouts.size < until:
            obs = self.step(self.rollouts, obs, uniform)
            bar.update()
            size = self.rollouts.size
            if size % (10 * SAVE_EVERY) == 0 or size == until or self.stopped:
                self.save()
        self.rollouts.close()

    def save(self):
        state = {
            "settings": self.settings,
            "nets": self.nets.state_dict(),
            "opt": [o.state() for o in vars(self.opt).values()],
            "medium": self.medium,
            "replay": self.replay.state(),
            "rollouts": self.rollouts.state(),
            "returns": self.returns,
            "rng": torch.get_rng_state(),
        }
        saved = f"saved to {self.partial}; the same command continues"
        try:
            save_tensors(self.partial, state)
        except OSError as error:
            saved = f"{self.partial} not saved ({error.strerror}): free some space"
            print(saved, file=sys.stderr)
        if self.stopped:
            print(f"\nstopped, {saved}", flush=True)
            raise SystemExit(130)

    def restore(self, state):
        if state["settings"] != self.settings:
            raise InputError(
                f"{self.partial} holds another command's progress "
                f"({state['settings']}): repeat that command, or delete the file"
            )
        self.nets.load_state_dict(state["nets"])
        for optimizer, saved in zip(vars(self.opt).values(), state["opt"]):
            for tensor, value in zip(optimizer.state(), saved):
                tensor.copy_(value)
        self.replay.restore(state["replay"])
        self.rollouts.restore(state["rollouts"])
        self.returns, self.medium = state["returns"], state["medium"]
        torch.set_rng_state(state["rng"])
        print(f"continuing after {self.replay.size + self.rollouts.size:,} steps", flush=True)


def make_env(env_id):
    """The task with flat float32 observations; InputError for what SAC cannot act in."""
    import gymnasium as gym

    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError) as error:
        raise InputError(f"--env {env_id}: {str(error).splitlines()[0]}") from None
    if not isinstance(env.action_space, gym.spaces.Box):
        raise InputError(
            f"--env {env_id} has {env.action_space} actions: give a task whose actions "
            "are continuous (a Box)"
        )
    if not np.isfinite([env.action_space.low, env.action_space.high]).all():
        raise InputError(f"--env {env_id} has unbounded actions: wrap it with bounds first")
    flat = isinstance(env.observation_space, gym.spaces.Box)
    if not flat or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return env


def episodes(recorder):
    """Slices of the recorder's episodes."""
    n = recorder.size
    ends = torch.nonzero((recorder.terminal[:n] > 0) | recorder.cut[:n]).flatten() + 1
    return [slice(a, b) for a, b in zip([0, *ends[:-1].tolist()], ends.tolist())]


def write_flat(path, recorder, to_bounds, metadata):
    n, last = recorder.size, [e.stop - 1 for e in episodes(recorder)]
    arrays = {
        "observations": recorder.obs[:n],
        "actions": to_bounds(recorder.action[:n]),
        "rewards": recorder.reward[:n],
        "terminals": recorder.terminal[:n].bool(),
        "timeouts": recorder.cut[:n],
        "final_observations": recorder.next_obs[last],
    }
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, metadata=np.array(json.dumps(metadata)), **{k: v.numpy() for k, v in arrays.items()}
    )
    write_atomic(Path(path), buffer.getbuffer())


def write_minari(dataset_id, recorder, to_bounds, metadata, env):
    import minari

    buffer = []
    for e in episodes(recorder):
        obs = torch.cat([recorder.obs[e], recorder.next_obs[e.stop - 1 : e.stop]])
        buffer.append(
            minari.data_collector.EpisodeBuffer(
                observations=list(obs.numpy()),
                actions=list(to_bounds(recorder.action[e]).numpy()),
                rewards=recorder.reward[e].tolist(),
                terminations=recorder.terminal[e].bool().tolist(),
                truncations=recorder.cut[e].tolist(),
            )
        )
    if dataset_id in minari.list_local_datasets():  # --overwrite: the old one goes last
        minari.delete_dataset(dataset_id)
    minari.create_dataset_from_buffers(
        dataset_id,
        buffer=buffer,
        env=env,
        algorithm_name="SAC",
        author="StayClose collect.py",
        description=json.dumps(metadata),
        ref_min_score=metadata["ref_min_score"],
        ref_max_score=metadata["ref_max_score"],
    )


def check_target(args):
    """InputError where the dataset could not be written in the end."""
    if args.flat:
        if Path(args.flat).exists() and not args.overwrite:
            raise InputError(f"{args.flat} exists: add --overwrite or give another name")
        if Path(args.flat).suffix != ".npz" or not Path(args.flat).absolute().parent.is_dir():
            raise InputError(
                f"--flat {args.flat}: give a name ending in .npz in a folder that exists"
            )
        return
    import minari

    if not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", args.dataset_id):
        raise InputError(f"--dataset-id {args.dataset_id}: give one like hopper/medium-replay-v0")
    if args.dataset_id in minari.list_local_datasets() and not args.overwrite:
        raise InputError(f"{args.dataset_id} exists: add --overwrite or give another id")


def collect(args):
    """Train and roll out as the level asks, then write the dataset."""
    from tqdm import tqdm

    if args.level not in LEVELS:
        raise InputError(f"--level is {args.level!r}: give one of {', '.join(LEVELS)}")
    if bool(args.flat) == bool(args.dataset_id):
        raise InputError("give --flat FILE.npz or --dataset-id NAMESPACE/NAME-v0, one of the two")
    check_target(args)
    ref_min, ref_max = reference_scores(args.env)
    goal = args.medium_return
    if goal is None and args.level.startswith("medium"):
        if ref_min is None:
            raise InputError(f"{args.env} has no reference score: give --medium-return")
        goal = ref_min + (ref_max - ref_min) / 3
    job = Collector(args)
    signal.signal(signal.SIGINT, lambda *_: setattr(job, "stopped", True))
    signal.signal(signal.SIGTERM, lambda *_: setattr(job, "stopped", True))
    total = job.replay.action.shape[0] + job.rollouts.action.shape[0]
    bar = tqdm(total=total, initial=job.replay.size + job.rollouts.size, disable=None, unit="step")
    recorder = job.rollouts
    if args.level == "random":
        job.roll_out(bar, args.steps, uniform=True)
    if args.level.startswith("medium") and job.medium is None:
        if not job.train(bar, goal):
            raise InputError(
                f"no policy reached a return of {goal:.0f} in {args.train_steps:,} "
                f"steps (saved in {job.partial}): raise --train-steps or lower "
                "--medium-return"
            )
        job.medium = job.replay.size
    if args.level == "medium-replay":
        recorder = job.replay
        recorder.size = next(t for t, mean_return in job.returns if mean_return >= goal)
        recorder.close()
    elif args.level.startswith("medium"):
        job.roll_out(bar, args.steps)
    if args.level.endswith("expert"):
        job.train(bar, None)
        job.roll_out(bar, len(job.rollouts.obs))
    bar.close()
    import gymnasium

    versions = {"torch": torch.__version__, "gymnasium": gymnasium.__version__}
    metadata = {
        "env_id": args.env,
        "action_low": job.low.tolist(),
        "action_high": job.high.tolist(),
        "level": args.level,
        "algorithm": "SAC",
        "seed": args.seed,
        "ref_min_score": ref_min,
        "ref_max_score": ref_max,
        "medium_return": goal,
        "agent_returns": job.returns,
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions,
    }
    try:
        if args.flat:
            write_flat(args.flat, recorder, job.to_bounds, metadata)
        else:
            write_minari(args.dataset_id, recorder, job.to_bounds, metadata, job.env)
    except OSError as error:
        start = job.partial if job.partial.exists() else "the start"
        raise InputError(
            f"{args.flat or args.dataset_id} not written ({error.strerror or error}): free some "
            f"space; the same command continues from {start}"
        ) from None
    job.partial.unlink(missing_ok=True)
    returns = [float(recorder.reward[e].sum()) for e in episodes(recorder)]
    print(
        f"{args.flat or args.dataset_id}: {recorder.size:,} transitions, {len(returns):,} "
        f"episodes, return mean {np.mean(returns):.0f}, best {np.max(returns):.0f}"
    )


if __name__ == "__main__":
    collect(parse(Args, {}))
