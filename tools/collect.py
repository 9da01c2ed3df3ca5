"""Make a D4RL-style offline dataset for any Gymnasium task with continuous actions.

    python tools/collect.py --env Hopper-v5 --level medium-replay --flat hopper-medium-replay.npz
    python algorithms/td3_bc.py --env hopper-medium-replay.npz

Most levels need an online agent, SAC (Haarnoja et al., arXiv:1812.05905), which is trained as far
as the level asks:

    random         actions drawn uniformly from the bounds; no agent
    medium-replay  every transition that the agent saw until it first was "medium"
    full-replay    every transition of the agent's first --train-steps
    medium         --steps transitions of the medium agent, actions sampled
    expert         --steps transitions of the expert agent, actions sampled
    medium-expert  --steps transitions of each of the two
    controller     --steps transitions of a noisy controller in a point maze; no agent

"Medium" is the first policy whose deterministic return (mean of 10 episodes, every 5,000 steps)
reaches a third of the way between D4RL's reference scores, or --medium-return; or the policy of
--medium-step. "Expert" is the agent after --train-steps, or the policy of --expert-step.

The controller wanders in the medium maze. Every episode starts in another cell, and the controller
walks to a cell at most four cells away, with noise; in half of the episodes it stops midway. The
task of the dataset is to get from one corner of the maze to a cell eight cells away, which no
episode shows: good paths must be stitched together from pieces.

Ctrl-C saves the agent; the same command continues. With --agent FILE the agent is kept, and other
levels can be cut from it without training again.
"""

import copy
import io
import json
import re
import shlex
import signal
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (
    MLP,
    Adam,
    Count,
    CountOrZero,
    InputError,
    Number,
    ScalarMLP,
    Seed,
    graphed,
    minimize,
    polyak,
    sample_tanh_normal,
)
from harness.device import prepare_device, set_precision
from harness.folder import load_tensors, save_tensors, write_atomic
from harness.run import evaluate, parse, seed_everything
from harness.tasks import near, reference_scores, register

AGENT_LEVELS = ("medium-replay", "full-replay", "medium", "expert", "medium-expert")
GAMMA, POLYAK, LR, BATCH = 0.99, 0.005, 3e-4, 256  # SAC's own settings
EVAL_EVERY, EVAL_EPISODES, SAVE_EVERY = 5_000, 10, 20_000


@dataclass
class Args:
    phases: ClassVar[dict] = {}

    env: str = "Hopper-v5"
    """Gymnasium id of the task"""
    level: Literal[
        "random",
        "medium-replay",
        "full-replay",
        "medium",
        "expert",
        "medium-expert",
        "controller",
    ] = "medium-replay"
    """which policy acts (see above)"""
    steps: Count = 1_000_000
    """transitions to write (of each half for medium-expert; no effect on the replay levels)"""
    train_steps: Count = 1_000_000
    """online steps that the agent may take"""
    random_steps: CountOrZero = 5_000
    """first online steps with uniform actions and no updates"""
    medium_return: Number | None = None
    """mean return that makes a policy "medium"; None: a third of the D4RL reference"""
    medium_step: Count | None = None
    """online step, a multiple of 5,000, after which the agent is "medium"; None: by its return"""
    expert_step: Count | None = None
    """online step, a multiple of 5,000, after which the agent is "expert"; None: --train-steps"""
    seed: Seed = 0
    """seeds networks, environment and sampling"""
    flat: str = ""
    """write one compressed .npz file (algorithms read it with --env FILE)"""
    dataset_id: str = ""
    """write a local Minari dataset of this id, for example hopper/medium-replay-v0"""
    agent: str = ""
    """file that keeps the agent for other levels; empty: beside the dataset, removed at the end"""
    overwrite: bool = False
    """replace an existing dataset"""
    device: str = "auto"
    """cpu, cuda or auto"""
    precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """how fp32 products are computed; auto takes the fastest way that does not round"""
    compile: bool = False
    """compile the agent's update: it runs faster on a CPU, after half a minute of compilation"""

    def resolve(self):
        pass


class Nets(nn.Module):
    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.actor = MLP(obs_dim, 256, 256, 2 * act_dim)
        self.q = ScalarMLP(obs_dim + act_dim, 256, 256, members=2)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))


def update(nets, opt, s, a, r, s2, terminal):
    """One SAC step: critics, actor, temperature (target entropy -A), targets."""
    alpha = nets.log_alpha.exp().detach()
    with torch.no_grad():
        a2, log_prob2, _ = sample_tanh_normal(*squashed(nets.actor, s2))
        v2 = nets.q_target(s2, a2).amin(0) - alpha * log_prob2
        y = r + GAMMA * (1 - terminal) * v2
    minimize(opt.q, (nets.q(s, a) - y).square().mean(1).sum())
    a_pi, log_prob, _ = sample_tanh_normal(*squashed(nets.actor, s))
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
        for name, value in state.items():
            getattr(self, name)[: self.size] = value


class Collector:
    """The environment, the agent and everything that a later start continues from."""

    def __init__(self, args):
        self.args, self.stopped = args, False
        self.device = prepare_device(args.device)
        set_precision(args.precision, self.device)
        seed_everything(args.seed)
        self.kwargs = {}  # of the task, for gymnasium.make
        self.env = make_env(args.env)
        space, act_space = self.env.observation_space, self.env.action_space
        self.low, self.high = torch.tensor(act_space.low), torch.tensor(act_space.high)
        self.dims = space.shape[0], act_space.shape[0]
        self.nets = Nets(*self.dims).to(self.device)
        self.opt = SimpleNamespace(
            q=Adam(self.nets.q.parameters(), LR),
            actor=Adam(self.nets.actor.parameters(), LR),
            alpha=Adam([self.nets.log_alpha], LR),
        )
        on_cpu = self.device.type == "cpu"
        compile = args.compile and on_cpu
        self.update = graphed(update, self.nets, self.opt, compile=compile) if on_cpu else (
            lambda *rows: update(self.nets, self.opt, *rows)
        )  # fmt: skip
        self.replay = Recorder(*self.dims, args.train_steps if args.level in AGENT_LEVELS else 0)
        self.returns, self.snapshots = [], {}  # of the agent every EVAL_EVERY steps
        beside = (args.flat or args.dataset_id.replace("/", "-")) + ".agent.pt"
        self.path = Path(args.agent or beside)
        names = ("env", "seed", "random_steps")  # the others may change on the way
        self.settings = json.dumps({name: getattr(args, name) for name in names})
        if args.level in AGENT_LEVELS:
            if self.path.exists():
                self.restore(load_tensors(self.path))
            self.eval_envs = [make_env(args.env) for _ in range(EVAL_EPISODES)]

    def act(self, actor, obs, deterministic=False):
        """Observations (n, S) -> actions (n, A) in [-1, 1]."""
        mean, log_std = squashed(actor, obs)
        return mean.tanh() if deterministic else sample_tanh_normal(mean, log_std)[0]

    def to_bounds(self, action):
        return self.low + (action.cpu() + 1) / 2 * (self.high - self.low)

    @torch.no_grad()
    def step(self, recorder, obs, actor):
        """One environment step into `recorder`; returns the next observation, None at an end.
        Without an actor, actions are uniform."""
        if obs is None:
            obs = self.env.reset(seed=self.args.seed if not recorder.size else None)[0]
        row = torch.as_tensor(obs, dtype=torch.float32)[None]
        if actor is None:
            action = 2 * torch.rand(len(self.low)) - 1
        else:
            action = self.act(actor, row.to(self.device))[0].cpu()
        next_obs, reward, terminal, timeout, _ = self.env.step(self.to_bounds(action).numpy())
        recorder.add(row[0], action, reward, next_obs, terminal, timeout)
        return None if terminal or timeout else next_obs

    def train(self, goal_return=None, last_step=None):
        """Train until the deterministic return reaches `goal_return`, or to `last_step`; returns
        the step that is reached, None where the goal is not."""
        reached = [t for t, mean in self.returns if goal_return is not None and mean >= goal_return]
        if reached:
            return reached[0]
        if goal_return is not None:
            last_step = self.args.train_steps
        obs, bar = None, self.bar(last_step, self.replay.size)
        if self.replay.size:
            self.replay.close()  # the environment starts afresh
        for t in range(self.replay.size + 1, last_step + 1):
            warm = t <= self.args.random_steps
            obs = self.step(self.replay, obs, None if warm else self.nets.actor)
            if not warm:
                self.update(*self.replay.sample(BATCH, self.device))
            bar.update()
            if t % EVAL_EVERY == 0:
                returns = evaluate(
                    lambda s: self.to_bounds(self.act(self.nets.actor, s, deterministic=True)),
                    self.eval_envs,
                    10_000 + self.args.seed,
                    self.device,
                )
                self.returns.append((t, float(returns.mean())))
                state = self.nets.actor.state_dict()
                self.snapshots[t] = {name: x.clone() for name, x in state.items()}
                bar.set_postfix_str(f"return {returns.mean():.0f}")
                bar.disable and print(f"agent {t:,}: return {returns.mean():.0f}", flush=True)
                if goal_return is not None and returns.mean() >= goal_return:
                    self.save()
                    return t
            if t % SAVE_EVERY == 0 or t == last_step or self.stopped:
                self.save()
        return last_step if goal_return is None else None

    def roll_out(self, step: int | None, steps: int):
        """`steps` transitions of the agent as it was after online step `step` (None: of uniform
        actions), in a Recorder."""
        actor = None
        if step is not None:
            actor = copy.deepcopy(self.nets.actor)
            actor.load_state_dict(self.snapshots[step])
        seed_everything(self.args.seed + (step or 0))
        recorder, obs, bar = Recorder(*self.dims, steps), None, self.bar(steps, 0)
        while recorder.size < steps:
            obs = self.step(recorder, obs, actor)
            bar.update()
            self.leave_if_stopped()
        recorder.close()
        return recorder

    def bar(self, total, initial):
        from tqdm import tqdm

        return tqdm(total=total, initial=initial, disable=None, unit="step")

    def leave_if_stopped(self, state="the recording is lost; the same command starts it again"):
        if self.stopped:
            print(f"\nstopped; {state}", flush=True)
            raise SystemExit(130)

    def save(self):
        state = {
            "settings": self.settings,
            "nets": self.nets.state_dict(),
            "opt": [o.state() for o in vars(self.opt).values()],
            "replay": self.replay.state(),
            "returns": self.returns,
            "snapshots": self.snapshots,
            "rng": torch.get_rng_state(),
        }
        saved = f"saved to {self.path}"
        try:
            save_tensors(self.path, state)
        except OSError as error:
            saved = f"{self.path} not saved ({error.strerror}): free some space"
            print(saved, file=sys.stderr)
        self.leave_if_stopped(f"{saved}; the same command continues")

    def restore(self, state):
        if state["settings"] != self.settings:
            raise InputError(
                f"{self.path} holds another agent ({state['settings']}): repeat its command, use "
                "another --agent, or delete the file"
            )
        self.nets.load_state_dict(state["nets"])
        for optimizer, saved in zip(vars(self.opt).values(), state["opt"]):
            for tensor, value in zip(optimizer.state(), saved):
                tensor.copy_(value)
        if len(state["replay"]["obs"]) > len(self.replay.obs):  # trained further than asked for
            self.replay = Recorder(*self.dims, len(state["replay"]["obs"]))
        self.replay.restore(state["replay"])
        self.returns, self.snapshots = state["returns"], state["snapshots"]
        torch.set_rng_state(state["rng"])
        print(f"continuing after {self.replay.size:,} online steps", flush=True)


def squashed(actor, s):
    """Mean and log-std (B, A) of the agent's tanh-Gaussian."""
    mean, log_std = actor(s).chunk(2, -1)
    return mean, log_std.clamp(-20, 2)


# ---- the maze's controller -------------------------------------------------------------------


MAZE_START, MAZE_GOAL = (1, 1), (4, 6)  # of the task, eight cells apart


def maze_with(maze, start_cells, goal_cell):
    """A copy of the map in which episodes begin at `start_cells` and the goal is `goal_cell`."""
    marked = [[1 if cell == 1 else 0 for cell in row] for row in maze]
    for row, column in start_cells:
        marked[row][column] = "r"
    marked[goal_cell[0]][goal_cell[1]] = "g"
    return marked


def paths_from(maze, start):
    """{cell: its shortest path from `start`, without `start`} of all free cells; `maze` is rows of
    1 (wall) and anything else (free)."""
    paths, queue = {start: []}, deque([start])
    while queue:
        cell = queue.popleft()
        for row, column in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            neighbor = cell[0] + row, cell[1] + column
            if neighbor not in paths and maze[neighbor[0]][neighbor[1]] != 1:
                paths[neighbor] = [*paths[cell], neighbor]
                queue.append(neighbor)
    return paths


def drive_maze(env, steps: int, seed: int, after_step) -> Recorder:
    """`steps` transitions of the noisy controller in a gymnasium-robotics point maze;
    `after_step()` is called after each."""
    from tqdm import tqdm

    point, rng = env.unwrapped, np.random.default_rng(seed)
    recorder = Recorder(env.observation_space.shape[0], 2, steps)
    bar = tqdm(total=steps, disable=None, unit="step")
    while recorder.size < steps:
        obs = env.reset(seed=seed if not recorder.size else None)[0]
        start = tuple(point.maze.cell_xy_to_rowcol(maze_position(point)))
        paths = paths_from(point.maze.maze_map, start)
        near_cells = [cell for cell in paths if 2 <= len(paths[cell]) <= 4]
        path = paths[near_cells[rng.integers(len(near_cells))]]
        if rng.random() < 0.5:  # stops midway
            path = path[: 1 + rng.integers(len(path))]
        targets = [
            point.maze.cell_rowcol_to_xy(np.array(cell)) + rng.uniform(-0.25, 0.25, 2)
            for cell in path
        ]
        reached, rest = 0, rng.integers(5, 20)  # steps that it spends where it stops
        while recorder.size < steps:
            error = targets[reached] - maze_position(point)
            if np.linalg.norm(error) < 0.4:
                rest -= reached + 1 == len(targets)
                reached = min(reached + 1, len(targets) - 1)
            wanted = 6.0 * error - 0.5 * point.point_env.data.qvel[:2] + rng.normal(0, 0.5, 2)
            action = torch.tensor(0.98 * np.tanh(wanted), dtype=torch.float32)
            next_obs, reward, terminal, timeout, _ = env.step(action.numpy())
            cut = bool(timeout or (rest <= 0 and not terminal))
            recorder.add(obs, action, reward, next_obs, terminal, cut)
            bar.update()
            after_step()
            obs = next_obs
            if terminal or cut:
                break
    recorder.close()
    return recorder


def maze_position(point):
    return point.point_env.data.qpos[:2].copy()


def make_env(env_id, **kwargs):
    """The task with flat float32 observations; InputError for what SAC cannot act in."""
    import gymnasium as gym

    register(env_id)
    if ":" not in env_id and env_id not in gym.registry:
        raise InputError(f"--env {env_id}: there is no such task{near(env_id, gym.registry)}")
    try:
        env = gym.make(env_id, **kwargs)
    except (gym.error.Error, ImportError) as error:
        raise InputError(f"--env {env_id}: {str(error).splitlines()[0]}") from None
    if not isinstance(env.action_space, gym.spaces.Box):
        raise InputError(
            f"--env {env_id} has {env.action_space} actions: use a task whose actions "
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


def join(recorders):
    """The transitions of several recorders, one after the other."""
    if len(recorders) == 1:
        return recorders[0]
    first = recorders[0]
    dims = first.obs.shape[1], first.action.shape[1]
    joined = Recorder(*dims, sum(part.size for part in recorders))
    states = [part.state() for part in recorders]
    joined.restore({name: torch.cat([state[name] for state in states]) for name in states[0]})
    return joined


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
            raise InputError(f"{args.flat} exists: add --overwrite or use another name")
        if Path(args.flat).suffix != ".npz" or not Path(args.flat).absolute().parent.is_dir():
            raise InputError(
                f"--flat {args.flat}: use a name ending in .npz in a folder that exists"
            )
        return
    import minari

    if not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", args.dataset_id):
        raise InputError(f"--dataset-id {args.dataset_id}: use one like hopper/medium-replay-v0")
    if args.dataset_id in minari.list_local_datasets() and not args.overwrite:
        raise InputError(f"{args.dataset_id} exists: add --overwrite or use another id")


def step_of_medium(job, args, goal):
    """Online step after which the agent is medium, trained as far as that needs."""
    if args.medium_step:
        job.train(last_step=args.medium_step)
        return args.medium_step
    step = job.train(goal_return=goal)
    if step is None:
        raise InputError(
            f"no policy reached a return of {goal:.0f} in {args.train_steps:,} steps (the agent is "
            f"in {job.path}): raise --train-steps or lower --medium-return"
        )
    return step


def record_maze(job, args):
    """The controller's transitions: it starts in every cell, the task only in one corner."""
    maze = job.env.unwrapped.maze.maze_map
    paths = paths_from(maze, MAZE_START)
    if len(paths.get(MAZE_GOAL, ())) != 8:
        raise InputError(f"--level controller drives PointMaze_Medium-v3, not {args.env}")
    anywhere = maze_with(maze, paths.keys() - {MAZE_GOAL}, MAZE_GOAL)
    env = make_env(args.env, maze_map=anywhere, continuing_task=False)
    one_start = maze_with(maze, [MAZE_START], MAZE_GOAL)
    job.kwargs = {"maze_map": one_start, "continuing_task": False}
    return drive_maze(env, args.steps, args.seed, job.leave_if_stopped)


def record(job, args, goal):
    """The transitions that the level asks for."""
    if args.level == "controller":
        if not args.env.startswith("PointMaze"):
            raise InputError(f"--level controller drives PointMaze tasks, not {args.env}")
        return record_maze(job, args)
    if args.level == "random":
        return job.roll_out(None, args.steps)
    if args.level in ("medium-replay", "full-replay"):
        medium = args.level == "medium-replay"
        size = step_of_medium(job, args, goal) if medium else job.train(last_step=args.train_steps)
        job.replay.size = size
        job.replay.close()
        return job.replay
    parts = []
    if args.level.startswith("medium"):
        parts.append(job.roll_out(step_of_medium(job, args, goal), args.steps))
    if args.level.endswith("expert"):
        step = args.expert_step or args.train_steps
        job.train(last_step=step)
        parts.append(job.roll_out(step, args.steps))
    return join(parts)


def check(args):
    """InputError for flags that do not work together; returns the return that is "medium"."""
    make_env(args.env).close()
    if bool(args.flat) == bool(args.dataset_id):
        raise InputError("use --flat FILE.npz or --dataset-id NAMESPACE/NAME-v0, one of the two")
    for flag in ("train_steps", "medium_step", "expert_step"):
        value = getattr(args, flag)
        if args.level in AGENT_LEVELS and value and value % EVAL_EVERY:
            flag = flag.replace("_", "-")
            raise InputError(f"--{flag} is {value}: use a multiple of {EVAL_EVERY:,}")
    if args.agent and not Path(args.agent).absolute().parent.is_dir():
        raise InputError(f"--agent {args.agent}: use a file's name in a folder that exists")
    check_target(args)
    ref_min, ref_max = reference_scores(args.env)
    goal = args.medium_return
    if goal is None and args.level.startswith("medium") and not args.medium_step:
        if ref_min is None:
            raise InputError(f"{args.env} has no reference score: use --medium-return")
        goal = ref_min + (ref_max - ref_min) / 3
    return goal


def collect(args):
    """Train and roll out as the level asks, then write the dataset."""
    import gymnasium

    goal = check(args)
    job = Collector(args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(job, "stopped", True))
    recorder = record(job, args, goal)
    ref_min, ref_max = reference_scores(args.env)
    metadata = {
        "env_id": args.env,
        "env_kwargs": job.kwargs,
        "action_low": job.low.tolist(),
        "action_high": job.high.tolist(),
        "level": args.level,
        "algorithm": "controller" if args.level == "controller" else "SAC",
        "seed": args.seed,
        "ref_min_score": ref_min,
        "ref_max_score": ref_max,
        "agent_returns": job.returns,
        "command": shlex.join(["python", "tools/collect.py", *sys.argv[1:]]),
        "versions": {"torch": torch.__version__, "gymnasium": gymnasium.__version__},
    }
    try:
        if args.flat:
            write_flat(args.flat, recorder, job.to_bounds, metadata)
        else:
            write_minari(args.dataset_id, recorder, job.to_bounds, metadata, job.env)
    except OSError as error:
        raise InputError(
            f"{args.flat or args.dataset_id} not written ({error.strerror or error}): free some "
            "space and repeat the command, which continues from the saved agent"
        ) from None
    if not args.agent:
        job.path.unlink(missing_ok=True)
    returns = [float(recorder.reward[e].sum()) for e in episodes(recorder)]
    print(
        f"{args.flat or args.dataset_id}: {recorder.size:,} transitions, {len(returns):,} "
        f"episodes, return mean {np.mean(returns):.0f}, best {np.max(returns):.0f}"
    )


if __name__ == "__main__":
    collect(parse(Args, {})[0])
