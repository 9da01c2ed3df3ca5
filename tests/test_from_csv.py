"""tools/from_csv.py: the README's file from the README's table; what is cut, shown and refused."""

import json
import os
import re

import numpy as np
import pandas as pd
import pytest
import torch
import tyro

from common import InputError
from run import load
from tools import from_csv

FLAGS = "--obs x v --actions u --reward reward --episode episode"
LIMITS = f"{FLAGS} --low -2 --high 2"
ALL = f"{LIMITS} --step t --terminal failed"


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The README's table in log.csv: six episodes of ten rows, three of which failed. x counts up
    by 1 inside an episode."""
    monkeypatch.chdir(tmp_path)
    rng, n = np.random.default_rng(0), 60
    episode, t = np.divmod(np.arange(n), 10)
    table = pd.DataFrame({"episode": episode, "x": 100 * episode + t, "v": rng.normal(size=n)})
    table["u"], table["reward"] = rng.uniform(-1.9, 1.9, n), rng.normal(size=n)
    table["failed"], table["t"] = (episode % 2) * (t == 9), 0.5 * t
    table.loc[[3, 4, 5], "u"] = 2.0
    save(table)
    return table


def save(table, **options):
    table.to_csv("log.csv", index=False, **options)


def convert(flags=ALL, out="logs.npz"):
    """The arrays that the command writes, and its metadata."""
    words = ["log.csv", *flags.split(), "--out", out]
    from_csv.main(tyro.cli(from_csv.Args, args=words))
    with np.load(out) as file:
        arrays = dict(file)
    return arrays, json.loads(arrays.pop("metadata").item())


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    bounds = [{k: x for k, x in meta.items() if k != "columns"} for _, meta in (one, other)]
    assert bounds[0] == bounds[1]
    for key, x in one[0].items():
        y = other[0][key]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), key
        np.testing.assert_allclose(x, y, rtol=1e-15, atol=0, err_msg=key)  # pandas 2 rounds so


def write_by_hand():
    """What a user writes who makes the file without the command."""
    table = np.genfromtxt("log.csv", delimiter=",", names=True)
    last = np.append(np.diff(table["episode"]) != 0, True)
    np.savez(
        "logs.npz",
        observations=np.stack([table[k] for k in ("x", "v")], 1),
        actions=table["u"][:, None],
        rewards=table["reward"],
        terminals=table["failed"] > 0,
        timeouts=last & (table["failed"] == 0),
        episode=table["episode"],
        metadata='{"action_low": -2, "action_high": 2}',
    )


def test_the_file_is_the_one_made_by_hand(log):
    write_by_hand()
    with np.load("logs.npz") as file:
        arrays = dict(file)
    by_hand = arrays, json.loads(arrays.pop("metadata").item())
    assert_same(convert(f"{LIMITS} --terminal failed", "mine.npz"), by_hand)
    assert_same(convert(ALL, "mine.npz"), by_hand)
    assert by_hand[0]["terminals"].sum() == 3


def test_rows_around_a_gap_are_no_transition(log, capsys):
    """A row cut for want of a number, one that is infinite, one that is absent: x rises by 1."""
    log = log.astype({"x": float})
    log.loc[3, "v"], log.loc[25, "x"], log.loc[44, "reward"] = np.nan, np.inf, np.nan
    save(log.drop(index=[17, 35]))
    arrays, _ = convert()
    said = capsys.readouterr().out
    for line in (
        "log.csv: 58 rows\n",
        "cut for want of x: 1 of 58 rows: line 26\n",
        "cut for want of v: 1 of 58 rows: line 5\n",
        "cut for want of reward: 1 of 58 rows: line 44\n",
        "t rises by 0.5; a rise above 0.75 is a hole\n",
        "holes: 5, before each a row without a known successor: lines 4, 18, 25, 35, 43\n",
        "stopped: 3 episodes, whose last row has no known successor: lines 11, 30, 49\n",
        "kept: 55 rows in 6 episodes\n",
    ):
        assert line in said, line
    assert len(arrays["rewards"]) == 55 and arrays["timeouts"].sum() == 8
    data, _ = load("logs.npz")
    alive = data.terminal == 0
    assert (data.next_obs - data.obs)[alive, 0].eq(1).all() and len(data.obs) == 55 - 8
    kept = log.dropna().replace(np.inf, np.nan).dropna().drop(index=[17, 35])
    whole = torch.tensor(kept.groupby("episode").reward.sum().to_numpy())
    assert torch.allclose(data.episode_return.unique_consecutive().double(), whole)


def test_without_step_a_row_that_is_cut_is_a_gap_too(log):
    log.loc[3, "v"] = np.nan
    save(log)
    arrays, _ = convert(f"{LIMITS} --terminal failed")
    assert list(np.flatnonzero(arrays["timeouts"])) == [2, 8, 28, 48]


def test_episodes_may_have_names(log):
    numbered, _ = convert(out="plain.npz")
    save(log.assign(episode="run " + log.episode.astype(str)))
    named, _ = convert()
    assert np.array_equal(named["episode"], numbered["episode"])


def test_a_person_sees_ranges_bounds_and_columns_that_say_nothing(log, capsys):
    log["v"], log["big"] = 7, 1.7e9 + 0.01 * log.index
    save(log)
    convert(ALL.replace("--obs x v", "--obs x v big"))
    said = capsys.readouterr().out
    returns = log.groupby("episode").reward.sum()
    expected = f"returns: {returns.min():.6g} to {returns.max():.6g}, mean {returns.mean():.6g}\n"
    assert "lengths: 10 to 10, mean 10\n" in said and expected in said
    assert re.search(r"\nx +observation +0 +254.5 +509 *\n", said), said
    assert re.search(r"\nu +action .* 2 +0.0% +5.0%\n", said), said
    assert "too coarse in float32, which training uses: big;" in said
    assert "note: 6 episodes are too few" in said
    assert "the bounds of actions" not in said


def test_bounds_are_typed_or_those_of_the_data(log, capsys):
    log["w"] = 5 * log.u
    save(log)
    two = FLAGS.replace("--actions u", "--actions u w")
    _, meta = convert(f"{two} --low -2 -10")
    assert meta.pop("columns") == {
        "observations": ["x", "v"],
        "actions": ["u", "w"],
        "reward": "reward",
    }
    assert meta == {"action_low": [-2, -10], "action_high": [2, 10]}
    assert "note: without --low and --high, the bounds" in capsys.readouterr().out
    _, meta = convert(two)
    assert meta["action_low"] == [log.u.min(), log.w.min()]


def swap(table, *lines):
    """The table with two lines of the file exchanged."""
    a, b = (line - 2 for line in lines)
    order = list(table.index)
    order[a], order[b] = b, a
    return table.loc[order]


REFUSED = {
    "log.csv has no column vv (did you mean v?)": (ALL.replace("x v", "x vv"), None),
    "--reward is missing": (FLAGS.replace("--reward reward", ""), None),
    "u is named twice": (ALL.replace("x v", "x u"), None),
    "--low has 2 numbers": (f"{FLAGS} --low -2 -2", None),
    "line 5: u is 2, not in -1.95 to 1.95": (f"{FLAGS} --low -1.95 --high 1.95", None),
    "line 4: v is 'err': write numbers": (ALL, lambda x: x.astype({"v": str}).replace(
        {"v": {str(x.v[2]): "err"}})),
    "line 5: episode 0 goes on after": (ALL, lambda x: swap(x, 4, 15)),
    "line 4: t does not rise after 1.5": (ALL, lambda x: swap(x, 4, 5)),
    "line 12: failed is 1, but episode 1 goes on": (ALL, lambda x: x.assign(failed=x.episode % 2)),
    "line 2: failed is 3: write 1": (ALL, lambda x: x.assign(failed=3)),
    "u has the bounds 1 and 1": (FLAGS, lambda x: x.assign(u=1)),
    "log.csv has a header and no rows": (ALL, lambda x: x[:0]),
    "no row has a value in every column": (ALL, lambda x: x.assign(reward=None)),
    "line 2: failed is nan: write 1": (ALL, lambda x: x.assign(failed=x.failed.replace(0, None))),
    "no row has a next observation": (FLAGS, lambda x: x[:60:10]),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_right_is_one_line(log, said):
    flags, change = REFUSED[said]
    save(change(log) if change else log)
    with pytest.raises(InputError, match=re.escape(said)) as error:
        convert(flags)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "log.csv is empty"),
        (b"\nx,v\n1,2\n", "log.csv is empty, or its first line is"),
        (b'x,"v,u\n1,2,3\n', "line 1: a name goes on in the next line"),
        (b"x;v;u\n1;2;3\n", "log.csv has one column, 'x;v;u': write it with commas"),
        (
            b"x,v,u,reward,episode\n1,5,2,0,1,0,1,0,1,0\n",
            "its rows have more values than its header",
        ),
        (b"x,v,u,reward,episode\n1,2,3,4,5\n1,2,3,4,5,6\n", "line 3"),
        (b"x,v,u,x,reward,episode\n1,2,3,4,5,6\n", "log.csv has two columns x"),
        (b'x,v,u,reward,episode\n1,2,3,4,"5\n1,2,3,4,5\n', "and close every quote"),
        (b'x,v,u,reward,episode\n1,2,3,4,"5\n1,2,3,4,"\n', "line 2: a value goes on in the next"),
        (b"x,v,u,reward,episode\n" + b"9" * 400 + b",2,3,4,5\n", "no row has a value"),
        (bytes(range(256)), "'CSV UTF-8'"),
        ("x,v\n1,2\n".encode("utf-16"), "'CSV UTF-8'"),
        (None, "log.csv is no file or is absent"),
    ],
    ids=[
        "empty",
        "blank",
        "header",
        "semicolons",
        "commas",
        "long",
        "twice",
        "quote",
        "quotes",
        "huge",
        "bytes",
        "utf-16",
        "absent",
    ],
)
def test_a_file_that_is_no_table_is_one_line(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(said)) as error:
        convert(FLAGS)
    assert "\n" not in str(error.value) and not (tmp_path / "logs.npz").exists()


# ---- logs of plants --------------------------------------------------------------------------


def test_a_clock_counts_seconds_since_its_first_time(log, capsys):
    """Across a change of the clock, where the offset is written; a missing minute is a hole."""
    start = pd.Timestamp("2026-10-25T02:59:50+02:00")
    clock = [(start + pd.Timedelta(seconds=k)).tz_convert("Europe/Berlin") for k in range(60)]
    log["t"] = [x.isoformat() for x in clock]
    save(log.drop(index=[3, 4]))
    arrays, _ = convert()
    said = capsys.readouterr().out
    assert "t rises by 1; a rise above 1.5 is a hole\nholes: 1, " in said
    assert list(np.flatnonzero(arrays["timeouts"])) == [2, 7, 27, 47]
    log.loc[7, "t"] = "25.10.2026 3:00"
    save(log)
    with pytest.raises(InputError, match="line 9: t is '25.10.2026 3:00': write times as 2026-"):
        convert()


def test_a_last_row_without_action_is_the_state_after_the_last_action(log, capsys):
    """With the failure in it or in the row before. After a hole it is known whose it is not."""
    log = log.astype({"x": float})
    log.loc[[9, 19, 29, 39], ["u", "reward"]] = np.nan
    log.loc[39, "failed"], log.loc[38, "failed"] = 0, 1
    save(log.drop(index=28))
    arrays, _ = convert()
    assert "final states, without an action: 4: lines 11, 21, 30, 40\n" in capsys.readouterr().out
    ends = arrays["terminals"] | arrays["timeouts"]
    assert list(np.flatnonzero(arrays["terminals"])) == [17, 34, 54]
    assert list(arrays["final_observations"][:, 0]) == pytest.approx(
        [9, 109, np.nan, 309, np.nan, np.nan], nan_ok=True
    )
    assert ends.sum() == 6 and len(ends) == 55
    data, _ = load("logs.npz")
    assert data.next_obs[:9, 0].tolist() == list(range(1, 10))  # it bootstraps at the time limit
    assert len(data.obs) == 55 - 2  # of episodes 2 and 4


def test_episodes_of_19_digits_stay_apart(log):
    for first in (10**18, 9 * 10**19):  # beyond a float's digits, and an integer's
        save(log.assign(episode=[str(first + x) for x in log.episode]))
        arrays, _ = convert()
        assert list(np.unique(arrays["episode"])) == [0, 1, 2, 3, 4, 5]


def test_an_older_file_is_replaced_by_a_good_one_alone(log):
    convert()
    old = open("logs.npz", "rb").read()
    save(log[:60:10])  # no row has a successor
    with pytest.raises(InputError, match="no row has a next observation"):
        convert(FLAGS)
    assert open("logs.npz", "rb").read() == old


def test_no_name_is_compared_where_none_is_absent(log, monkeypatch):
    """It takes minutes for 10,000 columns."""
    monkeypatch.delattr(from_csv, "near")
    convert()


def test_a_pipe_is_not_waited_for(log, tmp_path):
    os.unlink("log.csv")
    os.mkfifo("log.csv")
    with pytest.raises(InputError, match="log.csv is no file or is absent"):
        convert()


def test_a_terminal_column_that_never_changes_is_noted(log, capsys):
    save(log.assign(failed=0))
    convert()
    assert "note: failed is 0 in every row, so failures do not count" in capsys.readouterr().out
