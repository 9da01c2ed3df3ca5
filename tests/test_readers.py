"""readers/: names and HDF5 files become columns and a task, on tiny files that the tests write."""

import contextlib
import csv
import errno
import functools
import hashlib
import http.server
import json
import multiprocessing
import re
import shutil
import sys
import threading
from pathlib import Path

import filelock
import gymnasium
import h5py
import numpy as np
import pytest

from common import InputError
from readers import d4rl, tasks
from readers.tasks import reference_scores, table
from run import chosen, load, score

BOX = gymnasium.spaces.Box
LENGTHS, ENDS = (4, 5, 1, 6, 3), ("terminal", "timeout", "terminal", "timeout", "cut")
OUTSIDE = "link", "soft link", "raw", "virtual"


@pytest.fixture(autouse=True)
def network(tmp_path, monkeypatch):
    """Every test has its own caches and only the mirrors that it names; nothing leaves the machine,
    where a port without a listener is the whole network."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("MINARI_REMOTE", "nowhere://x")
    monkeypatch.delenv("D4RL_MIRRORS", raising=False)
    monkeypatch.setattr(d4rl, "D4RL_MIRRORS", ("file:///nowhere/{file}",))


def log(obs_dim=3, act_dim=2) -> dict:
    """Columns of five episodes with the LENGTHS and ENDS."""
    rng, n = np.random.default_rng(0), sum(LENGTHS)
    last = np.cumsum(LENGTHS) - 1
    columns = {
        "observations": rng.normal(size=(n, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, act_dim)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
    }
    for kind in ("terminal", "timeout"):
        rows = [row for row, end in zip(last, ENDS, strict=True) if end == kind]
        columns[f"{kind}s"] = np.isin(np.arange(n), rows)
    return columns


def write(path, columns, metadata=None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, x in columns.items():
            file[key] = x
        if metadata is not None:
            file["metadata"] = json.dumps(metadata)
    return str(path)


def refused(name, match, **options) -> str:
    with pytest.raises(InputError, match=match) as error:
        load(str(name), **options)
    line = str(error.value)
    assert "\n" not in line and len(line) < 1500
    return line


# ---- HDF5 files ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["array", "attribute"])
@pytest.mark.parametrize("suffix", [".hdf5", ".H5"])
def test_an_hdf5_file_reads_as_the_same_arrays_in_an_npz(tmp_path, place, suffix):
    columns, meta = log(3, 1), {"env_id": "Pendulum-v1", "env_kwargs": {"g": 5.0}}
    meta |= {"action_low": -2, "action_high": 2, "ref_min_score": None}
    columns["final_observations"] = np.ones((5, 3))
    np.savez(tmp_path / "x.npz", **columns, metadata=json.dumps(meta))
    path = write(tmp_path / f"x{suffix}", columns, meta if place == "array" else None)
    if place == "attribute":
        with h5py.File(path, "a") as file:
            file.attrs["metadata"] = json.dumps(meta)
            file.create_group("infos")["qpos"] = np.zeros(3)
    (data, task), (same, _) = load(path), load(str(tmp_path / "x.npz"))
    assert data.digest == same.digest and len(data.obs) == 19
    assert task["env_id"] == "Pendulum-v1" and task["env_kwargs"] == {"g": 5.0}


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_file_that_refers_to_another_is_refused(tmp_path, how):
    other, path = write(tmp_path / "secret.hdf5", log()), tmp_path / "x.hdf5"
    write(path, log())
    with h5py.File(path, "a") as file:
        refer_outside(file, other, how)
    refused(path, "x.hdf5: .* refers to another file, which is not followed")


def refer_outside(file, other, how):
    """Replace the rewards of an open file by what is stored in another."""
    n = len(file["rewards"])
    del file["rewards"]
    if how == "link":
        file["rewards"] = h5py.ExternalLink(other, "rewards")
    elif how == "soft link":
        file["group"] = h5py.ExternalLink(other, "/")
        file["rewards"] = h5py.SoftLink("/group/rewards")
    elif how == "raw":
        file.create_dataset("rewards", (n,), "f4", external=[(other, 0, 4 * n)])
    else:
        layout = h5py.VirtualLayout((n,), "f4")
        layout[:] = h5py.VirtualSource(other, "rewards", (n,))
        file.create_virtual_dataset("rewards", layout)


def test_a_damaged_or_foreign_file_is_one_line(tmp_path):
    path = tmp_path / "x.hdf5"
    refused(path, "no file .*x.hdf5; correct the path")
    whole = Path(write(tmp_path / "xx.hdf5", log())).read_bytes()
    refused(path, "did you mean xx.hdf5")
    for content in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        refused(path, "cannot be read .*delete it")
    write(path, {"obs" if key == "observations" else key: x for key, x in log().items()})
    refused(path, "no observations .found: actions, obs, .*use D4RL's key names")
    with h5py.File(path, "a") as file:
        file.create_group("episode_0")
    refused(path, "is a Minari file")


@pytest.mark.parametrize("text", ["{", "[1]", b"\xff", 7, '{"a":' * 9999, "x" * (1 << 20) + "x"])
def test_metadata_is_a_short_json_object(tmp_path, text):
    path = write(tmp_path / "x.hdf5", log())
    with h5py.File(path, "a") as file:
        file["metadata"] = text
    refused(path, "metadata (is not a JSON object|takes more than 1048576 bytes)")


def test_a_recorded_task_with_a_colon_is_refused_and_a_typed_one_is_not(tmp_path, monkeypatch):
    module = "import gymnasium\nimport gymnasium.envs.classic_control as c\n"
    module += "gymnasium.register('Own-v0', c.PendulumEnv, max_episode_steps=7)\n"
    (tmp_path / "own_tasks.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    bounds = {"action_low": -2, "action_high": 2}
    path = write(tmp_path / "x.hdf5", log(3, 1), bounds | {"env_id": "own_tasks:Own-v0"})
    refused(path, "a colon")
    deep = {"env_id": "Pendulum-v1", "env_kwargs": {"x": [[{"y": "own_tasks:Own-v0"}]]}}
    refused(write(tmp_path / "y.hdf5", log(3, 1), bounds | deep), "a colon")
    assert "own_tasks" not in sys.modules
    assert load(path, eval_env="own_tasks:Own-v0")[1]["env_id"] == "own_tasks:Own-v0"


@pytest.mark.parametrize("name, near", [
    ("hopper-medum-v2", "hopper-medium-v2"), ("antmaze-umase-v2", "antmaze-umaze-v2"),
    ("zzz", "use a bundled"),
])  # fmt: skip
def test_misspelt_names_are_answered_with_near_ones(name, near):
    refused(name, f"unknown dataset '{name}'.*{near}")


# ---- D4RL and downloads ----------------------------------------------------------------------


def test_the_tables_agree():
    files = table("d4rl_files.csv")
    assert {"hopper-full-replay-v2", "antmaze-large-play-v2"} < files.keys()
    assert len({row["path"].split("/")[-1] for row in files.values()}) == len(files) == 141
    for file, due in (("d4rl_files.csv", 97), ("ogbench_sets.csv", 3)):
        known = [row for row in table(file).values() if row["sha256"]]
        assert len({row["sha256"] for row in known}) == len(known) == due
        assert all(re.fullmatch("[0-9a-f]{64}", row["sha256"]) for row in known)
        for row in table(file).values():
            assert bool(row["bytes"]) == bool(row["sha256"])
    for name in files:
        row = tasks.find_row("d4rl_tasks.csv", name)
        assert row["prefix"].split("-")[0] == name.split("-")[0]
        assert bool(row["env_id"]) != ("without evaluation" in row["note"])
    assert reference_scores("hopper-medium-v2") == reference_scores("Hopper-v5")
    assert reference_scores("hopper-medium-v2") == (-20.272305, 3234.3)
    assert reference_scores("antmaze-umaze-v2") == (0, 1)
    assert reference_scores("maze2d-large-dense-v1")[0] == 30.569041
    assert reference_scores("Pendulum-v1") == (None, None)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Factory of a mirror's file. The table has its size and sum, unless `known` is False."""

    def make(name, obs_dim=11, act_dim=3, known=True):
        row = table("d4rl_files.csv")[name]
        path = tmp_path / "mirror" / row["path"]
        write(path, log(obs_dim, act_dim))
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        row |= {"bytes": len(content) if known else "", "sha256": digest * known}
        bundled = shutil.ignore_patterns("*.npz", "paper_tables")
        shutil.copytree(tasks.DATA_DIR, tables := tmp_path / "tables", ignore=bundled)
        with open(tables / "d4rl_files.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
        monkeypatch.setattr(tasks, "DATA_DIR", tables)
        monkeypatch.setenv("D4RL_MIRRORS", f"file://{tmp_path}/no file://{tmp_path}/mirror")
        return path

    return make


def test_a_d4rl_name_is_downloaded_once_and_kept(tmp_path, mirror, capsys):
    path = mirror("hopper-medium-v2")
    data, task = load("hopper-medium-v2")
    assert (task["env_id"], task["ref_max_score"], len(data.obs)) == ("Hopper-v4", 3234.3, 16)
    assert task["env_kwargs"] == {"max_episode_steps": 1000} and "hopper of" in task["robot"]
    assert [x.name for x in (tmp_path / "d4rl").iterdir()] == ["hopper_medium-v2.hdf5"]
    assert "not compared" not in capsys.readouterr().out
    path.unlink()
    again, other = load("hopper-medium-v2", eval_env="Hopper-v5")
    assert again.digest == data.digest and other["ref_max_score"] == 3234.3
    assert "robot" not in other and "make" not in other
    hopper = {"env_id": "Hopper-v4", "ref_min_score": 0, "ref_max_score": 1}
    assert "ref_max_score" not in chosen(hopper, "Walker2d-v5")


@pytest.mark.parametrize("broken, said", [
    ("short", "bytes arrived"), ("page", "signature not found"), ("sha256", "its sha256 is"),
])  # fmt: skip
def test_a_bad_download_is_refused_and_leaves_nothing(tmp_path, monkeypatch, mirror, broken, said):
    path = mirror("hopper-medium-v2", known=broken != "page")
    if broken == "page":
        path.write_bytes(b"<html>moved</html>" * 100)
    elif broken == "sha256":  # another file of the same size, which can be read as well
        path.write_bytes(path.read_bytes().replace(b"rewards", b"rewardz"))
    else:
        folder = functools.partial(Half, directory=str(tmp_path / "mirror"))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), folder)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("D4RL_MIRRORS", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
    line = refused("hopper-medium-v2", said, eval_env="none")
    assert str(tmp_path / "d4rl" / "hopper_medium-v2.hdf5") in line and "D4RL_MIRRORS" in line
    assert not list((tmp_path / "d4rl").iterdir())


class Half(http.server.SimpleHTTPRequestHandler):
    """Promises the whole file and sends half of it."""

    def copyfile(self, source, outputfile):
        whole = source.read()
        outputfile.write(whole[: len(whole) // 2])

    def log_message(self, *_):
        pass


def test_a_file_that_lies_where_a_download_would_is_compared(tmp_path, mirror, capsys):
    path = mirror("hopper-medium-v2")
    place = tmp_path / "d4rl" / "hopper_medium-v2.hdf5"
    write(place, log(11, 3) | {"more": np.zeros(9)})
    line = refused("hopper-medium-v2", "remove it, so that it is downloaded", eval_env="none")
    sizes = [str(x.stat().st_size) for x in (place, path)]
    assert str(place) in line and all(size in line for size in sizes)


def test_a_file_of_unknown_size_gets_a_note(tmp_path, capsys):
    path = tmp_path / "d4rl" / table("d4rl_files.csv")["relocate-human-v1"]["path"].split("/")[-1]
    write(path, log(39, 30))
    load("relocate-human-v1", eval_env="none")
    assert f"note: {path} was not compared with the published file" in capsys.readouterr().out


def test_processes_that_start_together_download_once(tmp_path, mirror):
    mirror("hopper-medium-v2")

    def work(number):
        with open(tmp_path / f"said{number}", "w") as out, contextlib.redirect_stdout(out):
            print(load("hopper-medium-v2", eval_env="none")[0].digest)

    jobs = [multiprocessing.get_context("fork").Process(target=work, args=(i,)) for i in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    said = [(tmp_path / f"said{i}").read_text() for i in range(3)]
    assert [job.exitcode for job in jobs] == [0] * 3, said
    assert len({text.split()[-1] for text in said}) == 1
    assert sum("mirror/" in text for text in said) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, ""), OSError(errno.EROFS, "")])
def test_a_download_needs_no_locks_but_a_folder(monkeypatch, mirror, capsys, error):
    def refuse(*_):
        raise error

    mirror("hopper-medium-v2")
    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    if error.errno == errno.EROFS:
        refused("hopper-medium-v2", "cannot write to .*d4rl .*set D4RL_DATASET_DIR")
    else:
        assert len(load("hopper-medium-v2", eval_env="none")[0].obs) == 16
        assert "d4rl has no locks" in capsys.readouterr().out


def test_kitchen_trains_without_evaluation(mirror, capsys):
    mirror("kitchen-mixed-v0", obs_dim=60, act_dim=9)
    assert load("kitchen-mixed-v0")[1] is None
    assert "without evaluation" in capsys.readouterr().out


def test_d4rls_ant_has_111_numbers(mirror):
    mirror("ant-medium-v2", obs_dim=111, act_dim=8)
    _, task = load("ant-medium-v2")
    obs, _ = task["make"]().reset(seed=0)
    assert obs.shape == (111,) and not obs[27:].any() and obs[:27].any()


@pytest.mark.parametrize("jump, lengths", [
    ((1, 0), [18]), ((0, -1.001), [4, 13]), ((0.75, 0.75), [4, 13]),
])  # fmt: skip
def test_an_ant_that_jumps_has_begun_again(tmp_path, jump, lengths):
    """More than 1 m between two rows of a maze's file is a cut, 1 m is not."""
    columns = log(29, 8)
    columns["terminals"][:] = columns["timeouts"][:] = False
    columns["observations"][:, :2] = 0
    columns["observations"][5:, :2] = jump
    path = table("d4rl_files.csv")["antmaze-umaze-v1"]["path"]
    write(tmp_path / "d4rl" / path.split("/")[-1], columns)
    data, _ = load("antmaze-umaze-v1", eval_env="none")
    assert data.episode.bincount().tolist() == lengths


def test_d4rls_ant_maze(mirror):
    """29 numbers, position first, in D4RL's coordinates: start near 0, goal beyond its cell."""
    pytest.importorskip("gymnasium_robotics")
    mirror("antmaze-medium-play-v2", obs_dim=29, act_dim=8)
    _, task = load("antmaze-medium-play-v2")
    assert task["success"] and task["env_id"] == "AntMaze_Medium-v4"
    assert task["env_kwargs"]["continuing_task"] is False, "what a copy scores by"
    env = task["make"]()
    maze = env.unwrapped
    for seed in range(3):
        obs, _ = env.reset(seed=seed)
        assert obs.shape == (29,) and np.abs(obs[:2]).max() <= 0.1 and 0.6 < obs[2] < 0.9
        origin = maze.maze.unique_reset_locations[0]
        goal = maze.goal - origin
        assert (goal >= 20).all() and (goal <= 21.5).all()  # cell (6, 6), start at (1, 1), 4 m each
    obs, reward, terminated, truncated, _ = env.step(np.zeros(8, np.float32))
    assert reward == 0 and not terminated and not truncated
    qpos = maze.data.qpos.copy()
    qpos[:2] = maze.goal + [0.3, 0.3]
    maze.ant_env.set_state(qpos, 0 * maze.data.qvel)
    obs, reward, terminated, *_ = env.step(np.zeros(8, np.float32))
    np.testing.assert_allclose(obs[:2], maze.data.qpos[:2] - origin, atol=1e-5)
    assert reward == 1 and terminated
    # walls, in D4RL's coordinates: row 1 of the map is 1r011001
    walls = [g for g in range(maze.model.ngeom) if maze.model.geom(g).name.startswith("block")]
    centers = {tuple(np.round(maze.model.geom_pos[g, :2] - origin).astype(int)) for g in walls}
    row = {x for x, y in centers if y == 0}
    assert {-4, 8, 12, 24} <= row and not {0, 4, 16, 20} & row


# ---- Minari ----------------------------------------------------------------------------------


def write_minari(name, episodes, space, actions=None, **kwargs):
    import minari
    from minari.data_collector import EpisodeBuffer

    minari.create_dataset_from_buffers(
        name, [EpisodeBuffer(id=i, **x) for i, x in enumerate(episodes)],
        observation_space=space, action_space=actions or BOX(-2, 2, (1,), np.float32),
        **kwargs)  # fmt: skip


def episode(observations, t, terminated, rewards=None, **changes):
    last = np.arange(t) == t - 1
    actions = np.linspace(-2, 2, t, dtype=np.float32)[:, None]
    found = {"observations": observations, "actions": actions,
             "rewards": np.arange(t, dtype=float) if rewards is None else rewards,
             "terminations": last & terminated, "truncations": last & (not terminated)}  # fmt: skip
    return found | changes


@pytest.fixture
def small(tmp_path):
    """A Minari dataset of three rows; the folder of its two files."""
    sample = episode(np.zeros((4, 3), np.float32), 3, True)
    write_minari("test/small-v0", [sample], BOX(-9, 9, (3,), np.float32), env="Pendulum-v1")
    return tmp_path / "minari/test/small-v0/data"


pytestmark = pytest.mark.filterwarnings("ignore")


def test_minari_keeps_every_row_and_recovers_the_task():
    rng = np.random.default_rng(0)
    paths = [rng.normal(size=(t + 1, 3)).astype(np.float32) for t in (5, 4)]
    paths[1][0] = paths[0][-1]  # the last observation of an episode may be the first of the next
    episodes = [episode(paths[0], 5, False), episode(paths[1], 4, True)]
    write_minari("pendulum/test-v0", episodes, BOX(-9, 9, (3,), np.float32), env="Pendulum-v1")
    data, task = load("pendulum/test-v0")
    np.testing.assert_array_equal(data.obs, np.concatenate([path[:-1] for path in paths]))
    np.testing.assert_array_equal(data.next_obs, np.concatenate([path[1:] for path in paths]))
    assert data.terminal.nonzero().flatten().tolist() == [8]
    assert data.episode.tolist() == [0] * 5 + [1] * 4
    assert data.episode_return.tolist() == [10, 6]
    assert data.action[:5, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert task["env_id"] == "Pendulum-v1" and task["env_kwargs"]["max_episode_steps"] == 200
    refused("pendulum-test-v0", "unknown dataset.*pendulum/test-v0")
    refused("pendulum/test-v0", "Hopper-v5", eval_env="Hopper-v5")


def test_nested_observations_are_sorted_by_key():
    space = gymnasium.spaces.Dict({
        "z": BOX(-9, 9, (2,), np.float32), "a": gymnasium.spaces.Tuple((
            BOX(-9, 9, (1,), np.float64), BOX(-9, 9, (1, 2), np.float32)))})  # fmt: skip
    z, a0 = np.arange(8, dtype=np.float32).reshape(4, 2), np.arange(4.0).reshape(4, 1) / 8
    a1 = -np.arange(8, dtype=np.float32).reshape(4, 1, 2)
    write_minari("test/nested-v0", [episode({"z": z, "a": (a0, a1)}, 3, True)], space)
    data, task = load("test/nested-v0")
    want = np.concatenate([a0, a1.reshape(4, 2), z], axis=1)
    np.testing.assert_array_equal(data.obs, want[:3])
    np.testing.assert_array_equal(data.next_obs, want[1:])
    assert task is None


@pytest.mark.parametrize(
    "env_id, ends", [("AntMaze_UMaze-v4", True), ("AntMaze_UMazeDense-v4", False)]
)
def test_the_goal_of_minaris_ant_maze_ends_it_and_so_does_its_time_limit(env_id, ends):
    pytest.importorskip("gymnasium_robotics")
    tasks.register(env_id)
    env = gymnasium.make(env_id)
    obs, _ = env.reset(seed=0)
    observations = {key: np.stack([x + i for i in range(6)]) for key, x in obs.items()}
    reward = np.array([0, 1, 1, 0, 0.0])
    actions = np.zeros((5, 8), np.float32)
    sample = episode(observations, 5, False, reward, actions=actions)
    write_minari("maze/ant-v0", [sample] * 2, env.observation_space, env.action_space, env=env)
    data, task = load("maze/ant-v0")
    rows = np.concatenate([observations[key] for key in sorted(obs)], 1).astype(np.float32)
    assert data.terminal.tolist() == [0, ends, ends, 0, 0] * 2
    assert data.episode.tolist() == ([0, 0, 1, 2, 2, 3, 3, 4, 5, 5] if ends else [0] * 5 + [1] * 5)
    np.testing.assert_array_equal(data.next_obs[4], rows[5])  # kept, and bootstrapped
    assert task["success"] is ends and score(task, [0, 3.0]) == (50 if ends else 1.5)


def test_a_point_maze_is_scored_by_success_in_the_datasets_order():
    pytest.importorskip("gymnasium_robotics")
    tasks.register("PointMaze_UMaze-v3")
    env = gymnasium.make("PointMaze_UMaze-v3", continuing_task=False)
    obs, _ = env.reset(seed=3)
    observations = {key: np.stack([x] * 3) for key, x in obs.items()}
    sample = episode(observations, 2, True, actions=np.zeros((2, 2), np.float32))
    write_minari("maze/test-v0", [sample], env.observation_space, env.action_space, env=env)
    data, task = load("maze/test-v0")
    want = [obs["achieved_goal"], obs["desired_goal"], obs["observation"]]
    np.testing.assert_allclose(data.obs[0], np.concatenate(want), rtol=1e-6)
    assert task["success"] and task["make"]().spec.kwargs["continuing_task"] is False


@pytest.mark.parametrize("space", [gymnasium.spaces.Discrete(2), BOX(0, 9, (1,), np.int64)])
def test_actions_that_are_not_continuous_are_refused(space):
    actions = np.zeros((3, *space.shape), np.int64)
    sample = episode(np.zeros((4, 3), np.float32), 3, True, actions=actions)
    write_minari("test/d-v0", [sample], BOX(-9, 9, (3,), np.float32), space)
    refused("test/d-v0", "only a Box of floats is supported")


@pytest.mark.parametrize(
    "shape, dtype", [((8, 8, 3), np.uint8), ((8, 8), np.uint8), ((2, 4, 4), "f4")]
)
def test_images_are_refused_in_words(shape, dtype):
    sample = episode({"camera": np.zeros((4, *shape), dtype)}, 3, True)
    space = gymnasium.spaces.Dict({"camera": BOX(0, 255, shape, dtype)})
    write_minari("test/images-v0", [sample], space)
    refused("test/images-v0", "images are left out; give features")


def test_a_mistyped_id_is_answered_with_a_near_one(tmp_path, small, capsys):
    line = refused("test/smal-v0", "did you mean test/small-v0")
    assert f"put the dataset into {tmp_path}/minari/test/smal-v0" in line
    assert "asking Minari's server" in capsys.readouterr().out
    assert not list((tmp_path / "minari").glob(".*lock"))


def change(folder, **values):
    """Change metadata of a Minari dataset; None removes a key."""
    meta = json.loads((folder / "metadata.json").read_text()) | values
    text = json.dumps({key: x for key, x in meta.items() if x is not None})
    (folder / "metadata.json").write_text(text)


SPEC = dict(entry_point="evil:Task", max_episode_steps=9, kwargs={}, additional_wrappers=[])
WRAPPER = dict(name="Task", entry_point="evil:Task", kwargs={})
RECORDED = {
    "entry point": (dict(id="Foo-v0"), "Foo"),
    "module in the id": (dict(id="evil:Foo-v0"), "a colon"),
    "argument": (dict(id="Pendulum-v1", kwargs={"x": [[{"y": "evil:b"}]]}), "a colon"),
    "wrapper": (dict(id="Pendulum-v1", additional_wrappers=[WRAPPER]), None),
}


@pytest.mark.parametrize("case", RECORDED)
def test_nothing_that_a_minari_dataset_names_is_run(tmp_path, monkeypatch, small, case, capsys):
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Task: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec, said = RECORDED[case]
    change(small, env_spec=json.dumps(SPEC | spec))
    if said:
        refused("test/small-v0", said)
    else:
        assert load("test/small-v0")[1] is None
        assert "inside wrappers, training without evaluation" in capsys.readouterr().out
    assert load("test/small-v0", eval_env="Pendulum-v1")[1]["env_id"] == "Pendulum-v1"
    for missing in ("observation_space", "action_space"):  # Minari would make the task instead
        change(small, **{missing: None})
        refused("test/small-v0", f"no {missing}", eval_env="none")
    assert not ran.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_minari_file_that_refers_to_another_is_refused(tmp_path, small, how):
    other = write(tmp_path / "secret.hdf5", {"rewards": np.ones(3, np.float32)})
    with h5py.File(small / "main_data.hdf5", "a") as file:
        refer_outside(file["episode_0"], other, how)
    refused("test/small-v0", "main_data.hdf5: .* refers to another file", eval_env="none")


@pytest.mark.parametrize("damage", ["cut short", "text", "steps", "large"])
def test_a_damaged_minari_dataset_is_one_line(small, damage):
    data, said = small / "main_data.hdf5", "delete"
    if damage == "cut short":
        data.write_bytes(data.read_bytes()[:-500])
    elif damage == "text":
        (small / "metadata.json").write_text("{")
    elif damage == "steps":
        change(small, total_steps=7)
        said = "3 steps, its metadata says 7"
    else:
        change(small, more="x" * (1 << 20))
        said = "larger than 1048576 bytes"
    refused("test/small-v0", said, eval_env="none")


# ---- the task, before training ---------------------------------------------------------------


class Odd(gymnasium.Env):
    """The actions are what the test wants."""

    observation_space = BOX(-9, 9, (3,), np.float32)

    def __init__(self, whole=False):
        kind = np.int64 if whole else np.float32
        self.action_space = BOX(-1, 1, (2,), kind)

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}


def test_a_box_of_whole_numbers_is_not_continuous(tmp_path, monkeypatch):
    monkeypatch.setitem(gymnasium.registry, "Odd-v0", gymnasium.envs.registration.EnvSpec(
        "Odd-v0", Odd, kwargs={"whole": True}))  # fmt: skip
    refused(write(tmp_path / "x.hdf5", log()), "the actions of Odd-v0 are .*, not floats",
            eval_env="Odd-v0")  # fmt: skip
    refused(write(tmp_path / "y.hdf5", log()), "CartPole-v1", eval_env="CartPole-v1")
