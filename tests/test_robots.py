"""D4RL's names are evaluated on the robots of the recordings, and its random data are made by its
recipe."""

import json
import math
import subprocess
import sys

import gymnasium
import h5py
import mujoco
import numpy as np
import pytest
from conftest import ROOT

from common import InputError
from readers import d4rl
from readers.tasks import find_row

sys.path.append(str(ROOT / "data" / "make"))
from d4rl import Args, main, record, returns_of  # noqa: E402

ROBOTS = json.loads((ROOT / "tests" / "robots.json").read_text())
NAMES = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
NAMES["ant"] = "Ant-v4"


def restored(name):
    return d4rl.task(find_row("d4rl_tasks.csv", name))["make"]().unwrapped


def velocity(env, state, action):
    mujoco.mj_resetData(env.model, env.data)
    env.set_state(*np.split(np.array(state), [env.model.nq]))
    env.step(np.array(action))
    return env.data.qvel.copy()


@pytest.mark.parametrize("robot", ROBOTS)
def test_a_step_gives_the_velocities_of_the_robot_that_replayed_the_recordings(robot):
    row, env = ROBOTS[robot], restored(f"{robot}-medium-v2")
    found = velocity(env, row["state"], row["action"])
    np.testing.assert_allclose(found, row["velocity"], atol=1e-5)
    today = gymnasium.make(NAMES[robot]).unwrapped
    today.reset(seed=0)
    assert abs(velocity(today, row["state"], row["action"]) - found).max() > 1e-4


@pytest.mark.parametrize("robot", ["hopper", "walker2d", "ant"])
def test_a_capsule_weighs_what_a_cylinder_longer_by_its_radius_does(robot):
    """MuJoCo before 2.1.2: the middle section, longer at each end by half the radius."""
    model = restored(f"{robot}-medium-v2").model
    capsules = np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE)
    density = {"ant": 5}.get(robot, 1000)
    assert len(capsules) > 3
    for geom in capsules:
        (radius, half), body = model.geom_size[geom][:2], model.geom_bodyid[geom]
        length = 2 * half + radius
        mass = density * math.pi * radius**2 * length
        across = mass * (3 * radius**2 + length**2) / 12
        if model.body_geomnum[body] == 1:
            assert model.body_mass[body] == pytest.approx(mass, rel=1e-9)
            inertia = sorted([mass * radius**2 / 2, across, across])
            assert sorted(model.body_inertia[body]) == pytest.approx(inertia, rel=1e-6)


def test_the_cheetah_weighs_14_kg():
    assert restored("halfcheetah-random-v2").model.body_mass.sum() == pytest.approx(14)


@pytest.mark.parametrize("name, margin", [("hopper-medium-v0", 0.001), ("antmaze-umaze-v2", 0.01)])
def test_two_touching_geoms_have_the_margin_of_one(name, margin):
    margins = restored(name).model.geom_margin
    assert np.ptp(margins) == 0 and 2 * margins[0] == pytest.approx(margin)


def test_an_ant_maze_has_the_ant_of_the_recordings():
    mass = restored("antmaze-umaze-v2").model.body_mass[1:14]
    np.testing.assert_array_equal(mass, restored("ant-medium-v2").model.body_mass[1:])


@pytest.mark.parametrize("data", ["hopper-medium-expert-demo", "hopper-replay-demo"])
def test_the_bundled_hoppers_are_todays(data):
    columns = np.load(ROOT / "data" / f"{data}.npz")
    obs, action = (columns[key][:500].astype(float) for key in ("observations", "actions"))
    whole = (columns["terminals"] + columns["timeouts"])[:500] == 0
    whole &= abs(obs[:, 5:]).max(1) < 9.999  # velocities are clipped at 10
    today, old = gymnasium.make("Hopper-v5").unwrapped, restored("hopper-medium-v2")
    for env in (today, old):
        env.reset(seed=0)
        errors = []
        for t in np.flatnonzero(whole[:-1]):
            found = velocity(env, [0, *obs[t]], action[t])
            errors.append(abs(found.clip(-10, 10) - obs[t + 1, 5:]).max())
        assert len(errors) > 300 and (max(errors) < 1e-5) == (env is today)


@pytest.mark.soak
def test_random_walkers_fall_as_often_as_in_the_published_file():
    """48,908 of 1,000,000 rows: 9,781.6 episodes of 200,000; a count deviates by 91 (1M rows)."""
    deviation = 91 * math.sqrt(0.2)
    counts = []
    for env in (restored("walker2d-random-v2"), gymnasium.make("Walker2d-v4").unwrapped):
        columns = record(env, 200_000, seed=5)
        counts.append(len(returns_of(columns)))
    assert abs(counts[0] - 9781.6) < 3 * deviation < 5 * deviation < abs(counts[1] - 9781.6)


class Clock(gymnasium.Env):
    """Ends by itself at step `dies`; its observation counts the steps."""

    observation_space = gymnasium.spaces.Box(-1e4, 1e4, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))
    dies = 1_000

    def reset(self, **_):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), 1.0, self.t == self.dies, False, {}


@pytest.mark.parametrize("dies, terminals", [(1_000, []), (400, [399, 799, 1199])])
def test_the_thousandth_step_is_a_time_limit_even_where_the_task_ended(
    monkeypatch, dies, terminals
):
    monkeypatch.setattr(Clock, "dies", dies)
    columns = record(Clock(), 1_500, seed=0)
    assert np.flatnonzero(columns["terminals"]).tolist() == terminals
    assert np.flatnonzero(columns["timeouts"]).tolist() == ([] if terminals else [999])
    assert (
        not columns["timeouts"][-1] and not columns["terminals"][-1]
    )  # cut by the end of the file
    assert (columns["next_observations"][:, 0] - columns["observations"][:, 0] == 1).all()
    assert columns["observations"][:, 0].max() == min(dies, 1_000) - 1
    assert returns_of(columns).tolist() == ([400.0] * 3 if terminals else [1000.0])
    assert abs(columns["actions"].mean()) < 0.05 and 0.55 < columns["actions"].std() < 0.6


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(sys.modules["d4rl"], "ROWS", 300)
    monkeypatch.setattr(d4rl, "D4RL_MIRRORS", ("file:///nowhere/{file}",))
    return tmp_path


def test_a_made_file_is_read_by_its_own_name_and_never_as_the_published_one(folder, capsys):
    main(Args("hopper-random-v2"))
    assert "45,240 episodes" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists: add --overwrite"):
        main(Args("hopper-random-v2"))
    columns, meta = d4rl.read("hopper-random-v2-made", "none")
    assert len(columns["rewards"]) == 300
    assert "made in its manner" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["hopper-random-v2-made.hdf5"]
    with pytest.raises(InputError, match="python data/make/d4rl.py hopper-random-v2"):
        d4rl.read("hopper-random-v2", "none")


def test_the_made_ant_has_the_contact_forces_of_the_recordings_all_zero(folder):
    main(Args("ant-random-v2"))
    columns, meta = d4rl.read("ant-random-v2-made", None)
    assert columns["observations"].shape == (300, 111) == (300, *meta["make"]().reset()[0].shape)
    assert np.ptp(columns["observations"][:, 26]) > 0 and not columns["observations"][:, 27:].any()


def test_another_file_under_the_name_is_refused(folder):
    path = folder / "hopper-random-v2-made.hdf5"
    main(Args("hopper-random-v2"))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no HDF5"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="hopper-random-v2-made.hdf5 cannot be read"):
            d4rl.read("hopper-random-v2-made", "none")
    path.write_bytes(whole)
    changes = {"name": "walker2d-random-v2"}, {"law": d4rl.LAW + 1}, {"rows": 299}, {"law": None}
    for change in changes:
        with h5py.File(path, "a") as file:
            made = json.loads(file.attrs["made_by"])
            file.attrs["made_by"] = json.dumps(made | change)
        (key, value), *_ = change.items()
        with pytest.raises(InputError, match=rf"not whole \({key} {value}, not .*--overwrite"):
            d4rl.read("hopper-random-v2-made", "none")
        path.write_bytes(whole)
    d4rl.read("hopper-random-v2-made", "none")
    with h5py.File(path, "a") as file:
        file.attrs["made_by"] = "[1]"
    with pytest.raises(InputError, match="hopper-random-v2-made.hdf5 cannot be read"):
        d4rl.read("hopper-random-v2-made", "none")


def test_the_command_names_what_it_can_make():
    command = [sys.executable, "data/make/d4rl.py", "hopper-medium-v2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "hopper-random-v2" in done.stderr
    assert "Traceback" not in done.stderr
