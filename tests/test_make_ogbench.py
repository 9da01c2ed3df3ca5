"""data/make/ogbench.py: recipes, recordings that their seed alone decides, files that OGBench's
own loader reads. Recordings are short here; all but the names need the package ogbench."""

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest

from common import InputError
from data.make import ogbench as make_ogbench
from data.make.ogbench import Recipe, recipe_of
from readers.ogbench import MADE, SETS
from readers.tasks import table

installed = pytest.mark.skipif(not importlib.util.find_spec("ogbench"), reason="no ogbench")
MAZE = "pointmaze-medium-stitch"
SHORT = Recipe("pointmaze-medium-v0", "stitch", recordings=10, rows=9, noise=0.5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    return tmp_path


def make(name=MAZE, recipe=SHORT, seed=0, workers=1, overwrite=False):
    args = SimpleNamespace(seed=seed, workers=workers, overwrite=overwrite, recordings=None)
    return make_ogbench.make(name, dataclasses.replace(recipe), args)


def error_of(call) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("antmaze-large-navigate", "trained expert"),
        ("humanoidmaze-giant-stitch", "trained expert"),
        ("antsoccer-arena-navigate", "trained expert"),
        (
            "visual-scene-noisy",
            "images as observations; only states can be made, such as scene-noisy",
        ),
        ("powderworld-easy-play", "such as cube-single-play"),
        ("cube-singel-play", "did you mean cube-single-play"),
        ("pointmaze-medium-explore", "no OGBench data"),
    ],
)
def test_other_names_say_why_not(name, said):
    assert said in error_of(lambda: recipe_of(name))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cube-single-play", ("cube-single-v0", 1000, 1001, 0.0, (0, 0), 0.1)),
        ("cube-double-noisy", ("cube-double-v0", 1000, 1001, 0.1, (0, 0.25), 0.1)),
        ("cube-quadruple-play", ("cube-quadruple-v0", 5000, 1001, 0.0, (0.1, 0.5), 0.1)),
        ("scene-noisy", ("scene-v0", 1000, 1001, 0.1, (0.5, 0.5), 0.1)),
        ("puzzle-4x5-noisy", ("puzzle-4x5-v0", 3000, 1001, 0.2, (0.5, 0.5), 0.1)),
        ("pointmaze-giant-navigate", ("pointmaze-giant-v0", 500, 2001, 0.0, (0.5, 0.5), 0.5)),
        ("pointmaze-giant-stitch", ("pointmaze-giant-v0", 5000, 201, 0.0, (0.5, 0.5), 0.5)),
    ],
)
def test_recipes_are_the_published_ones(name, expected):
    recipe = recipe_of(name)
    found = recipe.env, recipe.recordings, recipe.rows, recipe.random, recipe.stack, recipe.noise
    assert found == expected and recipe.kind == name.rpartition("-")[2]


@installed
def test_every_name_that_can_be_made_has_its_environment():
    import gymnasium

    importlib.import_module("ogbench")
    names = [name for name in table(SETS) if name.startswith(MADE)]
    assert len(names) == 26
    for name in names:
        assert recipe_of(name).env in gymnasium.registry, name


# ---- recordings ------------------------------------------------------------------------------


# ---- files -----------------------------------------------------------------------------------


@installed
def test_the_file_does_not_depend_on_workers_and_a_second_command_continues(folder, monkeypatch):
    one = [path.read_bytes() for path in make()]
    assert sorted(x.name for x in folder.iterdir()) == [f"{MAZE}-v0-val.npz", f"{MAZE}-v0.npz"]
    assert "add --overwrite" in error_of(make)
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(folder / "two"))
    assert [path.read_bytes() for path in make(workers=2)] == one
    with np.load(folder / f"{MAZE}-v0.npz") as file:
        arrays = dict(file)
    # What a killed command has left: two recordings, one of them marked here.
    parts = folder / f"{MAZE}-v0.parts"
    parts.mkdir()
    note = arrays.pop("made_by").item()
    (parts / "made_by.json").write_text(note)
    left = {k: x[: SHORT.rows].copy() for k, x in arrays.items()}
    left["actions"][:] = 7
    np.savez(parts / "00000.npz", **left)
    (parts / "00001.npz.host.1.tmp").write_bytes(b"half")
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(folder))
    assert "another seed" in error_of(lambda: make(seed=1, overwrite=True))
    make()
    with np.load(folder / f"{MAZE}-v0.npz") as file:
        assert (file["actions"][: SHORT.rows] == 7).all()
        assert np.array_equal(file["actions"][SHORT.rows :], arrays["actions"][SHORT.rows :])
    assert not parts.exists()


@installed
def test_keys_and_types_are_ogbenchs_and_the_note_says_how_it_was_made(folder):
    recipe = dataclasses.replace(recipe_of("puzzle-3x3-play"), recordings=10, rows=4)
    paths = make("puzzle-3x3-play", recipe, seed=5)
    types = {"observations": "f4", "actions": "f4", "terminals": "?", "qpos": "f4", "qvel": "f4"}
    types |= {"button_states": "i8"}
    for path, recordings in zip(paths, (10, 1)):
        with np.load(path, allow_pickle=False) as file:
            note = json.loads(file["made_by"].item())
            assert list(file) == [*types, "made_by"]
            for key, kind in types.items():
                assert file[key].dtype == kind and len(file[key]) == 4 * recordings
            assert np.flatnonzero(file["terminals"]).tolist() == [*range(3, 4 * recordings, 4)]
    assert note["seed"] == 5 and note["recipe"]["oracle"]["gripper_always_closed"]
    assert note["recipe"]["env"] == "puzzle-3x3-v0" and "mujoco" in note["versions"]


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    args = SimpleNamespace(name=MAZE)
    assert "pip install ogbench" in error_of(lambda: make_ogbench.main(args))
