"""Make the three bundled datasets: rows of an online agent, and of a controller in a maze.

    python data/make/collect.py --env Hopper-v5 --level full-replay --flat hopper.npz
    python algorithms/td3_bc.py --env hopper.npz

    full-replay    every transition of an agent's first --expert-step
    medium-expert  --steps transitions of the agent after --medium-step, and as many of it after
                   --expert-step, actions sampled
    homing         --steps transitions of a noisy controller in a point maze; no agent

The agent is SAC (Haarnoja et al., arXiv:1812.05905), on a CPU. Its
deterministic return, the mean of 10 episodes, is printed every 5,000 steps.

The controller wanders in the medium maze. Every episode starts in another cell, and the controller
walks to a cell at most four cells away, with noise; in half of the episodes it stops midway. The
task of the dataset is to get from one cell to another one eight cells away, which no episode shows:
good paths must be stitched together from pieces. Half of the walks lead towards the cell in which
the task starts, so a clone comes home again. The way leads right, up, left, up and
right, so a clone of the walks that reach the goal, which begin beyond its turns, meets a wall.
"""

import copy
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent  # leaves the path: its ogbench.py is not the package
sys.path[:] = [str(HERE.parents[1]), *(x for x in sys.path if x != str(HERE))]
from common import (
    MLP,
    Adam,
    Count,
    ScalarMLP,
    Seed,
    minimize,
    polyak,
    require,
    sample_tanh_normal,
)
from readers.tasks import reference_scores, register
from run import evaluate, prepare_device

START, GOAL, LIMIT = (6, 5), (2, 5), 300  # of the maze's task: two cells (row, column), and steps
HOMING, RESTS = 0.5, (1, 6)  # the share of homing walks; steps of a rest, the second excluded
COLUMNS = ("obs", "action", "reward", "next_obs", "terminal", "cut")
GAMMA, POLYAK, LR, BATCH = 0.99, 0.005, 3e-4, 256  # SAC's own settings
RANDOM_STEPS = 5_000  # the first ones, with uniform actions and no updates
EVAL_EVERY, EVAL_EPISODES = 5_000, 10


@dataclass
class Args:
    env: str = "Hopper-v5"
    """Gymnasium id of the task"""
    level: Literal["full-replay", "medium-expert", "homing"] = "full-replay"
    """which policy acts (see above)"""
    steps: Count = 50_000
    """transitions to write (of each half for medium-expert; no effect on full-replay)"""
    medium_step: Count = 115_000
    """online step, a multiple of 5,000, after which the agent is "medium"; see its returns"""
    expert_step: Count = 220_000
    """online step, a multiple of 5,000, after which the agent is "expert"; see its returns"""
    seed: Seed = 0
    """seeds networks, environment and sampling"""
    flat: str = "data.npz"
    """the .npz file to write (algorithms read it with --env FILE)"""


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
    """Transitions in the order they happened. An episode ends at a row that is terminal or cut."""

    def __init__(self, obs_dim, act_dim, capacity):
        self.obs, self.next_obs = torch.zeros(2, capacity, obs_dim)
        self.action = torch.zeros(capacity, act_dim)  # in [-1, 1]
        self.reward, self.terminal, self.cut = torch.zeros(3, capacity)
        self.size = 0

    def add(self, obs, action, reward, next_obs, terminal, timeout):
        values = obs, action, reward, next_obs, terminal, timeout and not terminal
        for name, value in zip(COLUMNS, values):
            getattr(self, name)[self.size] = torch.as_tensor(value)
        self.size += 1

    def sample(self):
        i = torch.randint(self.size, (BATCH,))
        return [getattr(self, name)[i] for name in COLUMNS[:-1]]

    def close(self):
        """Cut the episode in progress."""
        last = self.size - 1
        self.cut[last] = 1 - self.terminal[last]

    def state(self):
        return {name: getattr(self, name)[: self.size].clone() for name in COLUMNS}

    def episodes(self):
        """Slices of the rows."""
        ended = (self.terminal + self.cut)[: self.size]
        ends = (torch.nonzero(ended).flatten() + 1).tolist()
        return [slice(a, b) for a, b in zip([0, *ends], ends)]


class Collector:
    """The environment, the agent and everything that a later start continues from."""

    def __init__(self, args):
        self.args = args
        prepare_device("cpu", "medium")
        seed(args.seed)
        self.kwargs = {}  # of the task, for gymnasium.make
        self.env = make_env(args.env)
        space = self.env.action_space
        self.low, self.high = torch.tensor(space.low), torch.tensor(space.high)
        self.dims = self.env.observation_space.shape[0], space.shape[0]
        self.nets = Nets(*self.dims)
        self.opt = SimpleNamespace(
            q=Adam(self.nets.q.parameters(), LR),
            actor=Adam(self.nets.actor.parameters(), LR),
            alpha=Adam([self.nets.log_alpha], LR),
        )
        self.returns, self.snapshots = [], {}  # of the agent every EVAL_EVERY steps
        self.replay = Recorder(*self.dims, max(args.medium_step, args.expert_step))
        self.eval_envs = [make_env(args.env) for _ in range(EVAL_EPISODES)]

    def act(self, actor, obs, deterministic=False):
        """Observations (n, S) -> actions (n, A) in [-1, 1]."""
        mean, log_std = squashed(actor, obs)
        return mean.tanh() if deterministic else sample_tanh_normal(mean, log_std)[0]

    def to_bounds(self, action):
        return self.low + (action + 1) / 2 * (self.high - self.low)

    @torch.no_grad()
    def step(self, recorder, obs, actor):
        """One environment step into `recorder`; returns the next observation, None at an end.
        Without an actor, actions are uniform; without an observation, an episode begins."""
        obs = self.env.reset()[0] if obs is None else obs
        row = torch.as_tensor(obs, dtype=torch.float32)[None]
        if actor is None:
            action = 2 * torch.rand(len(self.low)) - 1
        else:
            action = self.act(actor, row)[0]
        next_obs, reward, terminal, timeout, _ = self.env.step(self.to_bounds(action).numpy())
        recorder.add(row[0], action, reward, next_obs, terminal, timeout)
        return None if terminal or timeout else next_obs

    def train(self, last_step):
        """Train to `last_step`."""
        size = self.replay.size  # above 0, the environment starts afresh
        obs = None if size else self.env.reset(seed=self.args.seed)[0]
        bar = progress(last_step, size)
        for t in range(size + 1, last_step + 1):
            warm = t <= RANDOM_STEPS
            obs = self.step(self.replay, obs, None if warm else self.nets.actor)
            if not warm:
                update(self.nets, self.opt, *self.replay.sample())
            bar.update()
            if t % EVAL_EVERY == 0:
                self.evaluate(t, bar)

    def evaluate(self, t, bar):
        """Keep the agent's policy and its deterministic return after step t."""

        def act(obs):
            return self.to_bounds(self.act(self.nets.actor, obs, deterministic=True))

        returns = evaluate(act, self.eval_envs, 10_000 + self.args.seed, torch.device("cpu"))
        mean = float(returns.mean())
        self.returns.append((t, mean))
        state = self.nets.actor.state_dict()
        self.snapshots[t] = {name: x.clone() for name, x in state.items()}
        bar.set_postfix_str(f"return {mean:.0f}")
        bar.disable and print(f"agent {t:,}: return {mean:.0f}", flush=True)

    def roll_out(self, recorder, step: int) -> None:
        """Add --steps transitions of the agent as it was after online step `step`."""
        actor = copy.deepcopy(self.nets.actor)
        actor.load_state_dict(self.snapshots[step])
        seed(self.args.seed + step)
        obs = self.env.reset(seed=self.args.seed)[0]
        for _ in progress(self.args.steps):
            obs = self.step(recorder, obs, actor)
        recorder.close()


def seed(number):
    torch.manual_seed(number)
    np.random.seed(number)  # OGBench's mazes draw from it


def squashed(actor, s):
    """Mean and log-std (B, A) of the agent's tanh-Gaussian."""
    mean, log_std = actor(s).chunk(2, -1)
    return mean, log_std.clamp(-20, 2)


def progress(total, initial=0):
    """A bar over the numbers of the steps that are left."""
    return tqdm(range(initial, total), total=total, initial=initial, disable=None, unit="step")


# ---- the maze's controller -------------------------------------------------------------------


def maze_with(maze, start_cells, goal_cell):
    """A copy of the map in which episodes begin at `start_cells` and the goal is `goal_cell`."""
    marks = dict.fromkeys(start_cells, "r") | {goal_cell: "g"}
    return [
        [marks.get((i, j), int(cell == 1)) for j, cell in enumerate(row)]
        for i, row in enumerate(maze)
    ]


def paths_from(maze, start):
    """{cell: its shortest path from `start`, without `start`} of all free cells; `maze` is rows of
    1 (wall) and anything else (free)."""
    paths, queue = {start: []}, [start]
    for cell in queue:  # which grows on the way
        for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            neighbor = row, column = cell[0] + down, cell[1] + right
            if neighbor not in paths and maze[row][column] != 1:
                paths[neighbor] = [*paths[cell], neighbor]
                queue.append(neighbor)
    return paths


def drive_maze(env, steps: int, seed: int, homing: float = HOMING) -> Recorder:
    """`steps` transitions of the noisy controller in a gymnasium-robotics point maze, where the
    share `homing` of the walks ends nearer to the cell START."""
    point, rng = env.unwrapped, np.random.default_rng(seed)
    to_home = {cell: len(path) for cell, path in paths_from(point.maze.maze_map, START).items()}
    recorder = Recorder(*env.observation_space.shape, 2, steps)
    bar = progress(steps)
    while recorder.size < steps:
        obs = env.reset(seed=seed if not recorder.size else None)[0]
        start = tuple(point.maze.cell_xy_to_rowcol(maze_position(point)))
        paths = paths_from(point.maze.maze_map, start)
        near_cells = [cell for cell in paths if 2 <= len(paths[cell]) <= 4]
        nearer = [cell for cell in near_cells if to_home[cell] < to_home[start]]
        if rng.random() < homing:
            near_cells = nearer or near_cells
        path = paths[near_cells[rng.integers(len(near_cells))]]
        if rng.random() < 0.5:  # stops midway
            path = path[: 1 + rng.integers(len(path))]
        targets = [
            point.maze.cell_rowcol_to_xy(np.array(cell)) + rng.uniform(-0.25, 0.25, 2)
            for cell in path
        ]
        reached, rest = 0, rng.integers(*RESTS)  # steps that it spends where it stops
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
            obs = next_obs
            if terminal or cut:
                break
    recorder.close()
    return recorder


def maze_position(point):
    return point.point_env.data.qpos[:2].copy()


def make_env(env_id, **kwargs):
    """The task with flat float32 observations; InputError for what SAC cannot act in."""
    register(env_id)
    env = gymnasium.make(env_id, **kwargs)
    box = isinstance(env.action_space, gymnasium.spaces.Box)
    require(box, f"--env {env_id} has {env.action_space} actions: use a task with a Box of them")
    return gymnasium.wrappers.FlattenObservation(env)


def write_flat(path, recorder, to_bounds, metadata):
    rows, last = recorder.state(), [e.stop - 1 for e in recorder.episodes()]
    arrays = {
        "observations": rows["obs"],
        "actions": to_bounds(rows["action"]),
        "rewards": rows["reward"],
        "terminals": rows["terminal"].bool(),
        "timeouts": rows["cut"].bool(),
        "final_observations": rows["next_obs"][last],
    }
    np.savez_compressed(path, metadata=json.dumps(metadata), **arrays)


def record_maze(job, args):
    """The controller's transitions: it starts in every cell, the task only in one."""
    medium = args.env.startswith("PointMaze_Medium-")
    require(medium, f"--level {args.level} drives PointMaze_Medium-v3, not {args.env}")
    maze = job.env.unwrapped.maze.maze_map
    anywhere = maze_with(maze, paths_from(maze, START).keys() - {GOAL}, GOAL)
    env = make_env(args.env, maze_map=anywhere, continuing_task=False)
    job.kwargs = {"maze_map": maze_with(maze, [START], GOAL), "continuing_task": False}
    job.kwargs["max_episode_steps"] = LIMIT
    return drive_maze(env, args.steps, args.seed)


def record(job, args):
    """The transitions that the level asks for."""
    if args.level == "homing":
        return record_maze(job, args)
    if args.level == "full-replay":
        job.train(args.expert_step)
        job.replay.close()
        return job.replay
    recorder = Recorder(*job.dims, 2 * args.steps)
    for step in (args.medium_step, args.expert_step):
        job.train(step)
        job.roll_out(recorder, step)
    return recorder


def check(args):
    """Raises InputError, before any work, for what could not be written or trained."""
    make_env(args.env).close()
    whole = args.medium_step % EVAL_EVERY == args.expert_step % EVAL_EVERY == 0
    require(whole, f"--medium-step, --expert-step: use multiples of {EVAL_EVERY:,}")
    path = Path(args.flat)
    fits = path.suffix == ".npz" and path.absolute().parent.is_dir()
    require(fits, f"--flat {path}: use a name ending in .npz, in a folder that exists")
    require(not path.exists(), f"{path} exists: move it away or use another name")


def collect(args):
    """Train and roll out as the level asks, then write the dataset."""
    check(args)
    job = Collector(args)
    recorder = record(job, args)
    ref_min, ref_max = reference_scores(args.env)
    metadata = {
        "env_id": args.env,
        "env_kwargs": job.kwargs,
        "action_low": job.low.tolist(),
        "action_high": job.high.tolist(),
        "level": args.level,
        "algorithm": "controller" if args.level == "homing" else "SAC",
        "seed": args.seed,
        "ref_min_score": ref_min,
        "ref_max_score": ref_max,
        "agent_returns": job.returns,
        "command": shlex.join(["python", "data/make/collect.py", *sys.argv[1:]]),
        "versions": {"torch": torch.__version__, "gymnasium": gymnasium.__version__},
    }
    write_flat(args.flat, recorder, job.to_bounds, metadata)
    returns = [float(recorder.reward[e].sum()) for e in recorder.episodes()]
    print(
        f"{args.flat}: {recorder.size:,} transitions, {len(returns):,} "
        f"episodes, return mean {np.mean(returns):.0f}, best {np.max(returns):.0f}"
    )


if __name__ == "__main__":
    collect(tyro.cli(Args, description=__doc__))
