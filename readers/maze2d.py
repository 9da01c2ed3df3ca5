"""D4RL's maze2d-*-v1: a ball on two slides, in D4RL's coordinates. Gymnasium-robotics' point mazes
have other coordinates, another time step and other rewards.

As in D4RL (d4rl/pointmaze/maze_model.py), the reward is that of the new position, no step is
terminal, and a start is any free cell, the goal's too. The contact margin is half of D4RL's,
because MuJoCo adds two margins today, where the larger one counted."""

import gymnasium
import mujoco
import numpy as np
from gymnasium.spaces import Box

MODEL = """
<mujoco>
  <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
  <default>
    <joint type="slide" damping="1"/>
    <geom friction=".5 .1 .1" density="1000" margin="0.001" condim="1" contype="2" conaffinity="1"/>
    <motor ctrlrange="-1 1" ctrllimited="true" gear="100"/>
  </default>
  <worldbody>
    <body pos="1.2 1.2 0">
      <geom type="sphere" size="0.1" contype="1"/>
      <joint name="x" axis="1 0 0"/> <joint name="y" axis="0 1 0"/>
    </body>
    {walls}
  </worldbody>
  <actuator> <motor joint="x"/> <motor joint="y"/> </actuator>
</mujoco>
"""
WALL = '<geom type="box" pos="{} {} 0" size="0.5 0.5 0.2"/>'


class Maze2d(gymnasium.Env):
    """`maze` is a text of rows with walls (#), free cells (O) and the goal (G). An observation has
    the position and the velocity; an action is a force in [-1, 1] on either axis."""

    def __init__(self, maze: str, dense: bool = False):
        tiles = np.array([list(row) for row in maze.split()])
        self.free = tiles != "#"
        self.dense = dense
        (self.goal,) = np.argwhere(tiles == "G")
        walls = ""
        for x, y in np.argwhere(~self.free):
            walls += WALL.format(x + 1, y + 1)
        text = MODEL.format(walls=walls)
        self.model = mujoco.MjModel.from_xml_string(text)
        self.data = mujoco.MjData(self.model)
        self.observation_space = Box(-np.inf, np.inf, (4,))
        self.action_space = Box(-1, 1, (2,))

    def observe(self):
        return np.concatenate([self.data.qpos, self.data.qvel])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        cell = self.np_random.choice(np.argwhere(self.free))
        shift = self.np_random.uniform(-0.1, 0.1, 2)
        self.data.qpos = cell + shift
        self.data.qvel = 0.1 * self.np_random.standard_normal(2)
        mujoco.mj_forward(self.model, self.data)
        return self.observe(), {}

    def step(self, action):
        self.data.qvel = np.clip(self.data.qvel, -5, 5)
        mujoco.mj_forward(self.model, self.data)
        self.data.ctrl = np.clip(action, -1, 1)
        mujoco.mj_step(self.model, self.data)
        distance = np.linalg.norm(self.data.qpos - self.goal)
        reward = float(distance <= 0.5)
        if self.dense:
            reward = np.exp(-distance)
        obs = self.observe()
        return obs, reward, False, False, {}


def make(maze: str, dense: bool, limit: int):
    """The task with its time limit in steps."""
    return gymnasium.wrappers.TimeLimit(Maze2d(maze, dense), limit)
