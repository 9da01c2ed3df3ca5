"""D4RL's controller of its mazes, and data of it: a part of data/make/d4rl.py.

The controller follows a shortest path of cells with a proportional force and a brake. Data are made
by it on the way to one random target after the other (D4RL: scripts/generation and
d4rl/pointmaze/waypoint_controller.py), with Gaussian noise on its actions."""

from collections import deque

import numpy as np
from tqdm import tqdm

NEAR = 0.1  # a place is reached within this distance, and at rest below this step
NOISE = 0.5  # standard deviation on each action
MOVES = np.array([(0, -1), (0, 1), (-1, 0), (1, 0)])


class Controller:
    """Acts towards a target. It plans when the target's cell changes, and never again."""

    def __init__(self, free, rng):
        self.free, self.rng = free, rng
        self.cell = None

    def distances(self, target):
        """Steps from every cell to the target's, infinite for walls."""
        steps = np.full(self.free.shape, np.inf)
        steps[tuple(target)] = 0
        queue = deque([target])
        while queue:
            cell = queue.popleft()
            for move in MOVES:
                after = tuple(cell + move)
                if self.free[after] and steps[after] == np.inf:
                    steps[after] = steps[tuple(cell)] + 1
                    queue.append(np.array(after))
        return steps

    def plan(self, start, target):
        """Waypoints along a shortest path, each but the last moved a little towards the origin."""
        steps, cell = self.distances(target), start
        path = []
        while (cell != target).any():
            around = cell + MOVES
            cell = around[np.argmin([steps[tuple(x)] for x in around])]
            path.append(cell - 0.2 * self.rng.uniform(size=2))
        self.path = [*path[:-1], target.astype(float)]
        self.at, self.before = 0, start.astype(float)
        self.cell = target

    def act(self, place, speed, target):
        """A force (2,) in [-1, 1], and whether the target was reached and the ball rests."""
        cell = np.rint(target).astype(int)
        if self.cell is None or (cell != self.cell).any():
            self.plan(np.rint(place).astype(int), cell)
        rests = np.linalg.norm(place - self.before) < NEAR
        arrived = rests and np.linalg.norm(place - self.cell) < NEAR
        goal = self.cell if arrived else self.path[self.at]
        if not arrived and rests and np.linalg.norm(place - goal) < NEAR:
            self.at = min(self.at + 1, len(self.path) - 1)
        self.before = place.copy()
        return np.clip(10 * (goal - place) - speed, -1, 1), arrived


def record(env, rows: int, limit: int, seed: int) -> dict:
    """Columns of `rows` steps. As in D4RL's files, a reward is that of the row's own position,
    `timeouts` are the steps in which the target was reached or given up, and the ball is never put
    anywhere else."""
    rng = np.random.default_rng(seed)
    controller = Controller(env.free, rng)
    cells = np.argwhere(env.free)
    columns = {"observations": np.empty((rows, 4), np.float32)}
    columns["actions"] = np.empty((rows, 2), np.float32)
    columns["timeouts"] = np.zeros(rows, bool)
    obs, target, steps = env.reset(seed=seed)[0], None, 0
    for t in tqdm(range(rows), unit=" steps", disable=None):
        if target is None:
            target = rng.choice(cells) + rng.uniform(-0.1, 0.1, 2)
            steps = 0
        force, arrived = controller.act(obs[:2], obs[2:], target)
        action = np.clip(force + NOISE * rng.standard_normal(2), -1, 1)
        arrived = arrived or steps >= limit
        for column, value in zip(columns.values(), (obs, action, arrived), strict=True):
            column[t] = value
        after, *_ = env.step(action)
        steps += 1
        if arrived:  # as in D4RL's script, the next row repeats the observation before this step
            target = None
        else:
            obs = after
    distance = np.linalg.norm(columns["observations"][:, :2] - env.goal, axis=1)
    columns["rewards"] = (distance <= 0.5).astype(np.float32)
    columns["terminals"] = np.zeros(rows, bool)
    return columns


def visits(columns) -> np.ndarray:
    """Steps from one departure from the goal to the next."""
    there = columns["rewards"] > 0
    left = np.flatnonzero(there[:-1] & ~there[1:])
    return np.diff(left)
