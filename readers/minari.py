"""Minari's ids, local or remote; $MINARI_DATASETS_PATH is respected."""

import json
import os
from pathlib import Path

import numpy as np

from common import InputError, require
from readers.fetch import lock
from readers.files import TEXT, open_hdf5
from readers.tasks import near, reference_scores, sparse


def root_folder() -> Path:
    """Minari's own folder."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()


def local_names() -> list[str]:
    """Ids of the datasets on this disk."""
    root = root_folder()
    found = [path for k in range(1, 5) for path in root.glob("*/" * k + "data/metadata.json")]
    return sorted(path.parents[1].relative_to(root).as_posix() for path in found)


def read(name: str, remote: bool) -> tuple[dict, dict]:
    """(columns, metadata). Raises InputError."""
    place = root_folder() / name
    local = near(name, local_names()) if remote else ""
    try:
        import minari

        if remote:
            print(f"{name} is not in {root_folder()}{local}: asking Minari's server", flush=True)
            with lock(root_folder() / f".{name.replace('/', '-')}.lock"):
                minari.download_dataset(name)
        require_safe(name, place / "data")
        return read_episodes(name, minari.load_dataset(name))
    except MemoryError:
        raise
    except ImportError as error:
        line = f"{name} needs more of Minari ({error}): pip install 'minari[hdf5,hf]'"
        raise InputError(line) from None
    except Exception as error:  # whatever the server, the network or the file raises
        fix = f"correct the id{local}, or put the dataset into {place}"
        if place.exists():
            fix = f"if it is damaged, delete {place} and get it again"
        raise InputError(f"Minari cannot load {name} ({error!s:.300}); {fix}") from None


def require_safe(name: str, folder: Path) -> None:
    """Raises InputError where a local dataset could run code when Minari opens it: without recorded
    spaces, Minari would make the task that the file names."""
    text = folder / "metadata.json"
    require(text.stat().st_size <= TEXT, f"{text} is larger than {TEXT} bytes")
    meta = json.loads(text.read_text())
    missing = [key for key in ("observation_space", "action_space") if not meta.get(key)]
    names = " and no ".join(missing)
    require(not missing, f"{name}: its metadata.json has no {names}; record it again")
    if (folder / "main_data.hdf5").exists():
        with open_hdf5(folder / "main_data.hdf5"):
            pass


def read_episodes(name: str, dataset) -> tuple[dict, dict]:
    """What read returns, of an open Minari dataset. Episodes keep their last observation, so no row
    will be dropped."""
    space, meta = dataset.action_space, task_of(name, dataset)
    continuous = np.issubdtype(space.dtype, np.floating) and hasattr(space, "low")
    require(continuous, f"{name}: actions are {space}; only a Box of floats is supported")
    meta |= {"action_low": space.low.ravel(), "action_high": space.high.ravel()}
    # As in D4RL, reaching the goal ends an ant maze's MDP; Minari's were recorded beyond it.
    env_id = meta.get("env_id", "")
    goal_ends = env_id.startswith("AntMaze") and sparse(env_id, meta["env_kwargs"])
    columns = {}
    for episode in dataset.iterate_episodes():
        obs, reward = flat(name, episode.observations), np.asarray(episode.rewards)
        terminal = np.asarray(episode.terminations) | (goal_ends & (reward > 0))
        timeout = ~terminal & (np.arange(len(reward)) == len(reward) - 1)
        row = {"observations": obs[:-1], "rewards": reward}
        row["actions"] = np.reshape(episode.actions, (len(episode.actions), -1))
        row |= {"terminals": terminal, "timeouts": timeout}
        row["final_observations"] = obs[1:][terminal | timeout]
        for key, x in row.items():
            columns.setdefault(key, []).append(x)
    columns = {key: np.concatenate(parts) for key, parts in columns.items()}
    n, due = len(columns["rewards"]), dataset.storage.metadata["total_steps"]
    require(n == due, f"{name}: {n} steps, its metadata says {due}; download or record it again")
    return columns, meta


def task_of(name: str, dataset) -> dict:
    """Metadata of the recorded task and its reference scores. Wrappers are code, and not made."""
    stored, recorded = dataset.storage.metadata, dataset.env_spec
    meta = {key: stored.get(key) for key in ("ref_min_score", "ref_max_score")}
    spec = getattr(dataset, "_eval_env_spec", None) or recorded
    if not spec or spec.additional_wrappers:
        why = "names a task inside wrappers" if spec else "records no task"
        print(f"note: {name} {why}, training without evaluation; --eval-env names one")
        return meta
    kwargs = {key: x for key, x in spec.kwargs.items() if key != "render_mode"}
    if spec.max_episode_steps:
        kwargs["max_episode_steps"] = spec.max_episode_steps
    if meta["ref_min_score"] is None:  # D4RL's hold for its robots in every version
        meta["ref_min_score"], meta["ref_max_score"] = reference_scores(spec.id)
    return meta | {"env_id": spec.id, "env_kwargs": kwargs}


def flat(name: str, obs) -> np.ndarray:
    """Observations (T + 1, S) of an episode: the arrays of dictionaries in the order of their
    sorted keys, of tuples in theirs."""
    if isinstance(obs, dict):
        obs = tuple(obs[key] for key in sorted(obs))
    if isinstance(obs, tuple):
        return np.concatenate([flat(name, part) for part in obs], 1)
    image = obs.ndim > 3 or (obs.ndim == 3 and obs.dtype == np.uint8)
    require(not image, f"{name}: images are left out; give features, as one row of numbers a step")
    return obs.reshape(len(obs), -1)
