"""Minari's ids, local or remote; $MINARI_DATASETS_PATH is respected."""

import json
import os
from pathlib import Path

import numpy as np

from common import InputError
from harness.readers.fetch import ask, is_no_network, lock
from harness.readers.files import (
    KEYS,
    check_metadata,
    is_damage,
    open_hdf5,
    require_regular,
    tell_of_rounding,
)
from harness.tasks import choose, complete, leaves, near, require, sparse


def root_folder() -> Path:
    folder = os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets"
    return Path(os.path.expanduser(folder))  # a "~" without a home stays as it is


def local_names() -> list[str]:
    root = root_folder()
    try:
        found = [p for depth in range(1, 5) for p in root.glob("*/" * depth + "data/metadata.json")]
    except OSError:  # another user's
        found = []
    return sorted(p.parents[1].relative_to(root).as_posix() for p in found)


def require_safe(name, folder):
    """Raises InputError where a local Minari dataset could run code or wait for ever when Minari
    opens it: without recorded spaces, Minari would make the task that the file names."""
    require_regular(folder / "metadata.json")
    meta = dict(json.loads((folder / "metadata.json").read_text()))
    missing = [key for key in ("observation_space", "action_space") if not meta.get(key)]
    names = " and no ".join(missing)
    require(not missing, f"{name}: its metadata.json has no {names}; record it again")
    if (folder / "main_data.hdf5").exists():
        with open_hdf5(folder / "main_data.hdf5"):
            pass


def require_network(place):
    """Raises InputError at once where nobody answers; the hub's own tries take long."""
    from huggingface_hub.constants import ENDPOINT

    if not os.environ.get("MINARI_REMOTE", "hf:").startswith("hf:"):
        return
    try:
        ask(ENDPOINT).close()
    except Exception as e:
        require(not is_no_network(e), f"no network: put the dataset into {place} ({e!s:.150})")


def read(name, remote, eval_env):
    """(arrays, metadata). Episodes keep their last observation, so no row is ever dropped."""
    place = root_folder() / name
    local = near(name, local_names()) if remote else ""
    try:
        import minari

        if remote:
            print(f"{name} is not in {root_folder()}{local}: asking Minari's server", flush=True)
            require_network(place)
            with lock(root_folder() / f".{name.replace('/', '-')}.lock"):
                minari.download_dataset(name)
        require_safe(name, place / "data")
        return read_episodes(name, minari.load_dataset(name), eval_env)
    except MemoryError:
        raise
    except ImportError as e:
        raise InputError(f"{name} needs more of Minari ({e}): pip install 'minari[hdf5,hf]'") from e
    except Exception as e:  # whatever the server, the network or the file raises
        fix = f"delete {place} and get it again"
        if not is_damage(e):
            fix = "close other programs that use it, or repeat the command later"
        if not place.exists():
            fix = f"correct the id{local}, or put the dataset into {place}"
        raise InputError(f"Minari cannot load {name} ({e!s:.300}); {fix}") from e


def read_episodes(name, dataset, eval_env):
    """What read returns, of an open Minari dataset."""
    space, recorded, stored = dataset.action_space, dataset.env_spec, dataset.storage.metadata
    require(hasattr(space, "low"), f"{name}: actions are {space}; only Box is supported")
    meta = {key: stored.get(key) for key in ("ref_min_score", "ref_max_score")}
    meta, wrappers, goal_ends = check_metadata(name, meta, 0), (), False
    if recorded:
        spec = getattr(dataset, "_eval_env_spec", None) or recorded
        meta |= {"env_id": spec.id, "env_kwargs": dict(spec.kwargs)}
        if spec.max_episode_steps:
            meta["env_kwargs"]["max_episode_steps"] = spec.max_episode_steps
        wrappers = spec.additional_wrappers
        # As in D4RL, reaching the goal ends an ant maze's MDP; Minari's were recorded beyond it.
        goal_ends = recorded.id.startswith("AntMaze") and sparse(recorded)
    elif eval_env is None:
        print(f"note: {name} records no task, training without evaluation; --eval-env names one")
    task, columns = choose(name, eval_env, meta, wrappers), []
    for episode in dataset.iterate_episodes():
        t, parts = len(episode.rewards), leaves(episode.observations)
        lengths = {len(episode.actions), len(episode.terminations), *(len(x) - 1 for x in parts)}
        require(
            lengths == {t},
            f"{name}: episode {episode.id} has {t} rewards but another number of actions, of "
            "terminations or of observations less one; record it again",
        )
        parts = [np.reshape(x, (t + 1, -1)) for x in parts]
        if not columns:
            tell_of_rounding(name, "observations", np.concatenate(parts, 1))
        obs = np.concatenate(parts, 1, dtype=np.float32, casting="same_kind")
        action = np.reshape(episode.actions, (t, -1)).astype(np.float32)
        reward = np.asarray(episode.rewards, np.float32)
        terminal = np.asarray(episode.terminations, bool) | (goal_ends & (reward > 0))
        end = terminal | (np.arange(t) == t - 1)
        columns.append((obs[:-1], action, reward, obs[1:], terminal, end))
    names = (*KEYS, "terminals", "ends")
    arrays = dict(zip(names, map(np.concatenate, zip(*columns, strict=True)), strict=True))
    n, due = len(arrays["rewards"]), stored["total_steps"]
    require(n == due, f"{name}: {n} steps, its metadata says {due}; download or record it again")
    meta["action_low"], meta["action_high"] = space.low.reshape(-1), space.high.reshape(-1)
    sizes = [arrays[key].shape[1] for key in KEYS[:2]]
    return arrays, complete(name, task, meta, *sizes)
