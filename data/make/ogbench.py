"""Make data for OGBench's tasks where the published files cannot be downloaded.

    python data/make/ogbench.py cube-single-play
    python algorithms/fql.py --env cube-single-play-singletask-v0

OGBench's own files of cubes, scenes, puzzles and point mazes were recorded by scripted oracles,
which the package ogbench contains. This command runs them by the published recipe (Park et al.,
arXiv:2410.20092; data_gen_scripts in its repository). What it writes has OGBench's names, keys,
types and sizes, and lies in OGBench's folder, but it is another draw, because the published
scripts seed no generator. The key `made_by` of the file (JSON text) says that it was made, and how.

Every recording has generators of its own, seeded by --seed, the name and its number, and a fresh
environment, because what one recording leaves there can change the next. So --workers changes no
number: ten recordings of scene-noisy by one process and by two are equal to the bit. Recordings
wait beside the target until all are there; the same command continues after Ctrl-C or a kill.
cube-single-play takes 1.4 hours of one core; with --recordings 20 for a first look, 2 minutes.
"""

import dataclasses
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import gymnasium
import numpy as np
import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent  # leaves the path: its ogbench.py is not the package
sys.path[:] = [str(HERE.parents[1]), *(x for x in sys.path if x != str(HERE))]

from common import Count, InputError, Seed, number, require
from readers import ogbench
from readers.tasks import INSTALL, near, table
from run import write_whole

MORE_RECORDINGS = {"triple": 3000, "4x5": 3000, "quadruple": 5000, "4x6": 5000}
STACKS = {"single": (0, 0), "double": (0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5)}
THINGS = {"cube": ["cube"], "puzzle": ["button"], "scene": ["cube", "button", "drawer", "window"]}
SPREAD = 1, 1, 1, 3, 10  # of the noise on the five numbers of an arm's action
Recordings = number(int, 10, 10**5, "a whole number from 10 to 100,000")
PACKAGES = "ogbench", "mujoco", "gymnasium", "numpy", "scipy"  # versions that decide the numbers


@dataclass
class Args:
    name: tyro.conf.Positional[str] = "cube-single-play"
    """the data to make, for example cube-single-play"""
    seed: Seed = 0
    """seeds every draw; another seed is another draw of the data"""
    recordings: Recordings | None = None
    """recordings for training, and a tenth of it for validation; None: as many as were published"""
    workers: Count = os.cpu_count() or 1
    """processes that record"""
    overwrite: bool = False
    """replace existing files"""


@dataclass
class Recipe:
    env: str  # Gymnasium id
    kind: str  # play, noisy, navigate or stitch
    recordings: int = 1000  # for training; a tenth of it follows for validation
    rows: int = 1001  # of each recording
    random: float = 0.0  # share of actions that are drawn uniformly
    stack: tuple = (0.5, 0.5)  # bounds of a recording's probability to stack cubes
    noise: float = 0.1  # of actions or plans; of noisy arms the upper bound
    oracle: dict = field(default_factory=dict)  # an arm's other settings


def recipe_of(name: str) -> Recipe:
    """How OGBench's data `name` was recorded. Raises InputError where that cannot be repeated."""
    made = [data for data in table(ogbench.SETS) if data.startswith(ogbench.MADE)]
    states = name.removeprefix("visual-")
    states = states if states in made else "cube-single-play"
    require(
        not name.startswith(("visual-", "powderworld-")),
        f"{name} has images as observations; only states can be made, such as {states}",
    )
    require(name in table(ogbench.SETS), f"there is no OGBench data '{name}'{near(name, made)}")
    require(
        name in made,
        f"{name} was recorded by a trained expert, which the package ogbench does not contain; "
        f"download it, or make another name of {', '.join(ogbench.MADE)}, such as {states}",
    )
    world, size, kind = name.split("-")[0], name.split("-")[1], name.split("-")[-1]
    recipe = Recipe(f"{name.rpartition('-')[0]}-v0", kind)
    if world == "pointmaze":
        recipe.noise = 0.5
        if kind == "stitch":
            recipe.recordings, recipe.rows = 5000, 201
        elif size == "giant":
            recipe.recordings, recipe.rows = 500, 2001
        return recipe
    recipe.recordings = MORE_RECORDINGS.get(size, 1000)
    recipe.stack = STACKS.get(size, recipe.stack)
    recipe.oracle = {"noise": recipe.noise, "noise_smoothing": 0.5}
    if kind == "noisy":
        recipe.oracle = {"min_norm": 0.4}
        recipe.random = 0.2 if world == "puzzle" else 0.1
    if world == "puzzle":
        recipe.oracle["gripper_always_closed"] = True
    return recipe


def make_env(recipe: Recipe):
    """The environment that records. Raises InputError."""
    options = {} if "maze" in recipe.env else {"mode": "data_collection"}
    options |= {"terminate_at_goal": False, "max_episode_steps": recipe.rows}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing screen
            importlib.import_module("ogbench")
            env = gymnasium.make(recipe.env, disable_env_checker=True, **options)
    except Exception as error:  # whatever a wrong version of MuJoCo does
        raise InputError(f"no {recipe.env} ({error!s:.200}): {INSTALL['ogbench']}") from None
    warnings.filterwarnings("ignore", ".*precision lowered by casting")  # of an arm's bounds
    return env


def seed_recording(env, space, name: str, seed: int, index: int) -> None:
    """The three generators that a recording draws from: numpy's, the environment's, the space's."""
    root = np.random.SeedSequence([seed, index, *name.encode()])
    for_numpy, for_env, for_space = root.spawn(3)
    np.random.seed(for_numpy.generate_state(8))
    env.unwrapped.np_random = np.random.default_rng(for_env)
    space.seed(int(for_space.generate_state(1)[0]))


def record(env, space, recipe: Recipe) -> dict:
    """One recording: {key: array of recipe.rows rows} in OGBench's keys and types. Random actions
    come from `space`."""
    record_one = record_maze if "maze" in recipe.env else record_arm
    rows = record_one(env, space, recipe)
    while "scene" in recipe.env and not cube_is_visible(rows):
        rows = record_one(env, space, recipe)
    types = {"terminals": bool, "button_states": np.int64}
    return {k: np.array([row[k] for row in rows], types.get(k, np.float32)) for k in rows[0]}


def row_of(obs, action, over, info) -> dict:
    row = {"observations": obs, "actions": action, "terminals": over}
    row |= {"qpos": info["prev_qpos"], "qvel": info["prev_qvel"]}
    if "prev_button_states" in info:
        row["button_states"] = info["prev_button_states"]
    return row


# ---- arms ------------------------------------------------------------------------------------


def oracles(env, recipe: Recipe) -> dict:
    """{what it handles: oracle}. A play oracle follows a plan with noise in it; a noisy one reacts
    to the state, and its actions get noise."""
    style, found = "plan" if recipe.kind == "play" else "markov", {}
    for thing in THINGS[recipe.env.split("-")[0]]:
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{thing}_{style}")
        oracle = getattr(module, f"{thing.title()}{style.title()}Oracle")
        found[thing] = oracle(env=env, **recipe.oracle)
    return found


def record_arm(env, space, recipe: Recipe) -> list[dict]:
    """Rows in which oracles handle one target after the other. The draws and their order are those
    of the published script."""
    every = oracles(env, recipe)
    obs, info = env.reset()
    low, high = recipe.stack
    stack = np.random.uniform(low, high) if low < high else low
    noisy = recipe.kind == "noisy"
    std = np.random.uniform(0, recipe.noise) * np.array(SPREAD) if noisy else None
    oracle = every[info["privileged/target_task"]]
    oracle.reset(obs, info)
    rows, over = [], False
    while not over:
        if np.random.rand() < recipe.random:
            action = space.sample()
        else:
            action = np.array(oracle.select_action(obs, info))
            if noisy:
                action = action + np.random.normal(0, std, action.shape)
        action = np.clip(action, -1, 1)
        next_obs, _, terminal, timeout, info = env.step(action)
        over = terminal or timeout
        if getattr(oracle, "done"):
            target_obs, target = env.unwrapped.set_new_target(p_stack=stack)
            oracle = every[target["privileged/target_task"]]
            oracle.reset(target_obs, target)
        rows.append(row_of(obs, action, over, info))
        obs = next_obs
    return rows


def cube_is_visible(rows) -> bool:
    """Whether the scene's cube stays where goals can show it: on the table or in the drawer."""
    _, y, z = np.array([row["qpos"][14:17] for row in rows]).T
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return not ((y >= 0.29) | ((y <= -0.3) & ~in_drawer)).any()


# ---- point mazes -----------------------------------------------------------------------------


def beside(cell):
    i, j = cell
    return [(i - 1, j), (i, j - 1), (i + 1, j), (i, j + 1)]


def is_corridor(maze_map, cell) -> bool:
    """Whether a free cell's only free neighbors are two on opposite sides."""
    up, left, down, right = (maze_map[x] == 0 for x in beside(cell))
    return up == down and left == right and up != left


def cells_at(maze_map, start, distance: int) -> list:
    """Free cells whose shortest path from `start` has `distance` steps."""
    seen, cells = {start}, [start]
    for _ in range(distance):
        cells = [x for cell in cells for x in beside(cell) if maze_map[x] == 0]
        cells = [x for x in dict.fromkeys(cells) if x not in seen]
        seen.update(cells)
    return cells


def pick(cells):
    return cells[np.random.randint(len(cells))]


def record_maze(env, space, recipe: Recipe) -> list[dict]:
    """Rows of a point that walks to its goal, with noise. `navigate` draws the next goal where one
    is reached; `stitch` has one goal, four cells from the start."""
    maze = env.unwrapped
    free = [tuple(map(int, cell)) for cell in np.argwhere(maze.maze_map == 0)]
    goals = [cell for cell in free if not is_corridor(maze.maze_map, cell)]
    start = pick(free)
    if recipe.kind == "stitch":
        goals = cells_at(maze.maze_map, start, 4) or [start]
    ends = {"init_ij": start, "goal_ij": pick(goals)}
    obs, _ = env.reset(options={"task_info": ends})
    rows, over = [], False
    while not over:
        subgoal, _ = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)
        way = subgoal - maze.get_xy()
        way = way / (np.linalg.norm(way) + 1e-6)
        noise = np.random.normal(0, recipe.noise, way.shape)
        action = np.clip(way + noise, -1, 1)
        next_obs, _, terminal, timeout, info = env.step(action)
        over = terminal or timeout
        if info["success"] and recipe.kind == "navigate":
            maze.set_goal(pick(goals))
        rows.append(row_of(obs, action, over, info))
        obs = next_obs
    return rows


# ---- the files -------------------------------------------------------------------------------


def finished(parts) -> set[int]:
    """Numbers of the recordings in the folder."""
    return {int(path.stem) for path in parts.glob("*.npz")}


def ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a worker ends its recording first


def work(name, recipe, seed, parts, index) -> None:
    """One recording into a file of the folder `parts`."""
    env = make_env(recipe)
    space = env.action_space  # kept: an arm returns a new one, without a seed, at every access
    seed_recording(env, space, name, seed, index)
    buffer = io.BytesIO()
    np.savez(buffer, **record(env, space, recipe))
    write_whole(parts / f"{index:05}.npz", buffer.getbuffer())


def record_all(name, recipe, args, parts, total: int) -> None:
    """Fill the folder `parts` with recordings 0 to `total` - 1."""
    missing = sorted(set(range(total)) - finished(parts))
    call = partial(work, name, recipe, args.seed, parts)
    how = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, how, ignore_interrupt) as pool:
        results = pool.map(call, missing)
        before = total - len(missing)
        for _ in tqdm(results, total=total, initial=before, disable=None, unit="rec"):
            pass


def join(target, parts, indices, note: str) -> None:
    """Write recordings into one npz file."""
    recordings = [dict(np.load(parts / f"{index:05}.npz")) for index in indices]
    arrays = {key: np.concatenate([x[key] for x in recordings]) for key in recordings[0]}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays, made_by=note)
    write_whole(target, buffer.getbuffer())


def make(name: str, recipe: Recipe, args) -> list[Path]:
    """Record the set `name` and write its two files. Raises InputError."""
    folder = ogbench.data_folder()
    train, validation = folder / f"{name}-v0.npz", folder / f"{name}-v0-val.npz"
    parts = folder / f"{name}-v0.parts"
    exists = [str(path) for path in (train, validation) if path.exists()]
    free = args.overwrite or finished(parts) or not exists
    fix = "add --overwrite, or set OGBENCH_DATASET_DIR"
    require(free, f"{' and '.join(exists)} would be replaced: {fix}")
    note = {"made_by": "StayClose, data/make/ogbench.py", "name": name, "seed": args.seed}
    note["published_recordings"] = recipe.recordings
    recipe = dataclasses.replace(recipe, recordings=args.recordings or recipe.recordings)
    note |= {"recipe": vars(recipe), "versions": {x: version(x) for x in PACKAGES}}
    note = json.dumps(note)
    total = recipe.recordings + recipe.recordings // 10
    try:
        parts.mkdir(parents=True, exist_ok=True)
        told = parts / "made_by.json"
        same = not told.exists() or told.read_text() == note
        differs = f"{parts} has recordings of another seed, number or version"
        require(same, f"{differs}; delete it to start again")
        write_whole(told, note.encode())
        record_all(name, recipe, args, parts, total)
        join(validation, parts, range(recipe.recordings, total), note)
        join(train, parts, range(recipe.recordings), note)
        shutil.rmtree(parts)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; set OGBENCH_DATASET_DIR") from None
    except BrokenProcessPool:
        raise InputError("a process was killed; the same command continues") from None
    return [train, validation]


def main(args) -> None:
    name = args.name.removesuffix("-v0")
    recipe = recipe_of(name)
    require(importlib.util.find_spec("ogbench"), f"OGBench is not installed: {INSTALL['ogbench']}")
    try:
        for path in make(name, recipe, args):
            print(path)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", flush=True)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
