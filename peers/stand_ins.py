"""What other people's programs find in place of d4rl, gym, wandb and pyrallis: modules that hold
just what these programs touch, so that neither their simulators nor a download is needed."""

import subprocess
import sys
import types
from types import SimpleNamespace

import numpy as np


def nothing(*_, **__):
    pass


class Space:
    seed = nothing

    def __init__(self, size):
        self.shape, self.high = (size,), np.ones(size, np.float32)
        self.low = -self.high

    def sample(self):
        return np.zeros(self.shape, np.float32)


class Task:
    """An environment of which sizes and bounds are read; its episodes have no step. Actions are in
    [-1, 1], as our loader gives them."""

    seed = close = nothing
    spec = SimpleNamespace(max_episode_steps=0)
    change = None  # a program's normalization of observations

    def __init__(self, rows):
        self.env_fns = [lambda: self]
        self.observation_space = Space(rows["observations"].shape[1])
        self.action_space = Space(rows["actions"].shape[1])
        self.single_observation_space = self.observation_space
        self.single_action_space = self.action_space

    def reset(self):
        return self.observation_space.sample()

    def step(self, action):
        return self.reset(), 0.0, True, {}

    def get_normalized_score(self, value):
        return value


def put(name: str, **content):
    """A module of this name and content, for whoever imports it."""
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def put_all(rows, log=nothing) -> None:
    """The modules that programs import: they train on `rows`, and log(values) is called where they
    log. What they wrap around an environment is left out, and the environment remembers it."""

    def make(*_, **__):
        return Task(rows)

    def unwrapped(env, change=None):
        env.change = change or env.change
        return env

    wrappers = SimpleNamespace(TransformObservation=unwrapped, TransformReward=unwrapped)
    vector = SimpleNamespace(make=make)
    spaces = SimpleNamespace(Box=Space)
    put("gym", make=make, Env=Task, vector=vector, wrappers=wrappers, spaces=spaces)
    put("d4rl", qlearning_dataset=lambda env: rows, get_normalized_score=lambda name, x: x)
    run = SimpleNamespace(save=nothing)
    put("wandb", init=nothing, finish=nothing, run=run, log=lambda values, **_: log(values))


def put_flags(call) -> None:
    """pyrallis: a decorated main function becomes call(function, the class of its flags)."""

    def wrap():
        def decorate(train):
            (Config,) = train.__annotations__.values()
            return lambda: call(train, Config)

        return decorate

    put("pyrallis", wrap=wrap)


def commit(folder) -> str:
    """The commit of a checkout, in short, with "-dirty" where files are changed."""
    line = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run([*line, "--exclude=*"], capture_output=True, text=True).stdout.strip()
