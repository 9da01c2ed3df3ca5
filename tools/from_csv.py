"""A table with one row per time step becomes a checked .npz file, which --env takes.

    python tools/from_csv.py log.csv --obs x v --actions u --reward r --episode id
    python tools/from_csv.py log.csv ... --step t --terminal failed --low -2 --high 2

A row holds what was observed, the action that was then taken, and the reward that followed. Rows of
an episode stand together, in the order of time. The last row of an episode may hold what was
observed at the end, without an action. Any other row that lacks a number is cut, and what stood
before and after it never becomes a transition; the same holds where --step skips. Everything else
that cannot be right is refused with its line in the file. What is printed says which lines are not
used and why, then what the columns hold, so that a wrong column or unit is seen before training.
"""

import csv
import io
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
import run
from common import InputError, Number, require
from readers.tasks import near
from run import in_one_line, write_whole

SKIPS = 1.5  # times the usual rise of --step: more is a hole
FEW = 20  # episodes: fewer get a note
LARGEST = 1e38
ROUNDING = 1e-5  # of the range of an action, as in run.py
PLAIN = "write it with commas between columns and points in numbers"


@dataclass
class Args:
    log: tyro.conf.Positional[str] = ""
    """the table: a .csv file in UTF-8, whose first line names the columns"""
    obs: tuple[str, ...] = ()
    """columns of the observation"""
    actions: tuple[str, ...] = ()
    """columns of the action"""
    reward: str = ""
    """column of the reward that followed the action"""
    episode: str = ""
    """column with a number or name for each episode"""
    step: str = ""
    """column that rises evenly inside an episode, in any unit, or a clock (ISO 8601): a larger rise
    is a hole"""
    terminal: str = ""
    """column that is 1 in an episode's last row where the task itself ended, as by a failure, and
    else 0"""
    low: tuple[Number, ...] = ()
    """lowest possible action, one number for all or one for each; left out: the data's lowest"""
    high: tuple[Number, ...] = ()
    """highest possible action, one number for all or one for each; left out: the data's highest"""
    out: str = "logs.npz"
    """file to write; an older one is replaced"""

    def resolve(self):
        for name in ("obs", "actions", "reward", "episode") if self.log else ():
            require(getattr(self, name), f"--{name} is missing: add it with a column of {self.log}")
        names = [*self.obs, *self.actions, self.reward]
        for name in names:
            once = names.count(name) == 1
            require(once, f"{name} is named twice in --obs, --actions and --reward: name it once")
        for name in ("low", "high"):
            count = len(getattr(self, name))
            fits = count in (0, 1, len(self.actions))
            require(fits, f"--{name} has {count} numbers: use one, or one for each of --actions")
        named = self.out.endswith(".npz") and not Path(self.out).is_dir()
        require(named, f"--out is {self.out}: use a file's name that ends in .npz")


# ---- reading ---------------------------------------------------------------------------------


def read_table(args) -> pd.DataFrame:
    """The columns that the flags name. The index is the line in the file. Raises InputError."""
    path = args.log
    require(Path(path).is_file(), f"{path} is no file or is absent: use the path of a file")
    used = [*args.obs, *args.actions, args.reward, args.episode, args.step, args.terminal]
    used = list(dict.fromkeys(filter(None, used)))
    fix = f"if it is a table, {PLAIN}, as 'CSV UTF-8'"
    form = {"encoding": "utf-8-sig"}  # drops Excel's mark
    with in_one_line(path, f"{fix}, and close every quote"), warnings.catch_warnings():
        with open(path, newline="", **form) as file:
            head = [name.strip() for name in next(csv.reader(file), [])]
        check_head(path, head, used)
        warnings.simplefilter("error", pd.errors.ParserWarning)
        form |= {"names": range(len(head)), "index_col": False, "skiprows": 1}
        form |= {"skipinitialspace": True, "skip_blank_lines": False, "low_memory": False}
        form["dtype"] = {head.index(args.episode): str}  # a float would join numbers of 19 digits
        try:
            rows = pd.read_csv(path, **form)
        except pd.errors.ParserWarning:
            raise ValueError("its rows have more values than its header has names") from None
    require(len(rows), f"{path} has a header and no rows: write the rows below it")
    rows.index += 2
    text = rows.select_dtypes(exclude=["number", "bool"]).astype(str)
    long = text.apply(lambda column: column.str.contains("[\r\n]")).any(axis=1)
    for line in rows.index[long.astype(bool)][:1]:
        raise InputError(f"{path} line {line}: a value goes on in the next line: close its quote")
    table = rows[[head.index(name) for name in used]].set_axis(used, axis=1)
    for name in used:
        if name == args.episode:
            table[name] = labels(table[name].str.strip())
        else:
            table[name] = numbers(path, table[name], name == args.step)
    return table


def check_head(path, head, used):
    """Raises InputError where the header is not one, or lacks a column."""
    found = ", ".join(head)
    require(found, f"{path} is empty, or its first line is: write a header and rows")
    require("\n" not in found, f"{path} line 1: a name goes on in the next line: close its quote")
    for name in used:
        if name not in head:
            require(len(head) > 1, f"{path} has one column, {found!r:.60}: {PLAIN}")
            hint = near(name, head)
            raise InputError(f"{path} has no column {name}{hint}: use one of {found:.200}")
        require(head.count(name) == 1, f"{path} has two columns {name}: rename one of them")


def labels(column) -> pd.Series:
    """Episodes as whole numbers, where a float holds them all; else as text."""
    found = pd.to_numeric(column, errors="coerce")
    whole = found.isna().eq(column.isna()) & (
        found.isna() | (found % 1 == 0) & (abs(found) < 2**53)
    )
    return found if whole.all() else column


def numbers(path, column, clock=False) -> pd.Series:
    """A column as float64, NaN where there is no number that float32 holds; a clock as seconds
    since its first time. Raises InputError for other text."""
    plain = column.astype(str) if column.dtype == object else column  # of more digits than a float
    found, form = pd.to_numeric(plain, errors="coerce"), "numbers with a decimal point"
    if clock and (found.isna() & column.notna()).any():
        times = pd.to_datetime(column, format="ISO8601", utc=True, errors="coerce")
        found, form = (times - times.min()).dt.total_seconds(), "times as 2026-11-24T09:30:00"
    for line in column.index[found.isna() & column.notna()][:1]:
        raise InputError(
            f"{path} line {line}: {column.name} is {column[line]!r:.40}: write {form}, and nothing "
            "where one is missing"
        )
    return found.astype(float).where(found.abs() < LARGEST)


# ---- episodes --------------------------------------------------------------------------------


def some(lines) -> str:
    """The first of many lines of the file, in words."""
    more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
    return f"line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:5]))}{more}"


def complete_rows(args, table) -> pd.DataFrame:
    """The rows that have a value in every column but --terminal, and the final states, which have
    no action; prints which are cut."""
    actions, label = list(args.actions), table[args.episode]
    state = ~label.duplicated(keep="last") & table[actions].isna().all(axis=1)
    needed = table.drop(columns=args.terminal or [])
    needed.loc[state, [*actions, args.reward]] = 0
    for name in needed:
        lines = table.index[needed[name].isna()]
        if len(lines):
            print(f"cut for want of {name}: {len(lines)} of {len(table)} rows: {some(lines)}")
    table = table[needed.notna().all(axis=1)]
    rows = table[actions].notna().all(axis=1).any()
    require(rows, "no row has a value in every column: leave out the column that lacks them")
    return table


def holes(args, table):
    """Whether a row is missing after each row (N,) of an episode. Raises InputError."""
    path, lines, label = args.log, table.index, table[args.episode]
    begins = label.ne(label.shift()).to_numpy()
    last = np.append(begins[1:], True)
    for line in lines[begins & label.duplicated()][:1]:
        raise InputError(
            f"{path} line {line}: episode {label[line]} goes on after another one began: sort the "
            "rows by episode and time, or give each part a name of its own"
        )
    hole = np.append(np.diff(lines) > 1, False)
    if args.step:
        rise = np.append(np.diff(table[args.step]), np.nan)
        usual = np.median(rise[~last]) if (~last).any() else 1.0
        for line in lines[~last & (rise <= 0)][:1]:
            raise InputError(
                f"{path} line {line}: {args.step} does not rise after {table[args.step][line]:g}: "
                "sort the rows of the episode by time, and remove repeated ones"
            )
        hole |= rise > SKIPS * usual
        print(f"{args.step} rises by {usual:g}; a rise above {SKIPS * usual:g} is a hole")
    hole &= ~last
    if hole.any():
        print(f"holes: {hole.sum()}, before each a row without a known successor: "
              f"{some(lines[hole])}")  # fmt: skip
    return hole


def final_states(args, table, hole):
    """(table, holes, observations after each row (N, S)): rows without an action join the rows
    before them, with the end that they tell of. Other observations are NaN."""
    state, label = table[args.actions[0]].isna().to_numpy(), table[args.episode].to_numpy()
    i = np.flatnonzero(state[1:] & (label[1:] == label[:-1]) & ~hole[:-1])
    obs = table[list(args.obs)].to_numpy()
    after = np.full_like(obs, np.nan)
    after[i] = obs[i + 1]
    if state.any():
        print(f"final states, without an action: {state.sum()}: {some(table.index[state])}")
    if args.terminal:
        ends = table[args.terminal].to_numpy(copy=True)
        ends[i] = np.fmax(ends[i], ends[i + 1])
        table = table.assign(**{args.terminal: ends})
    return table[~state], hole[~state], after[~state]


def marks(args, table, hole, after):
    """(episode, terminal, timeout) of each row (N,): a number for its episode, whether the task
    ended, and whether the recording stopped or a row is missing after it. Raises InputError."""
    path, lines, label = args.log, table.index, table[args.episode]
    last = np.append(label.ne(label.shift())[1:], True)
    terminal = np.zeros(len(table), bool)
    if args.terminal:
        x = table[args.terminal]
        for line in lines[~x.isin((0, 1))][:1]:
            fix = "write 1 in the row after which the task itself ended, and 0 in all others"
            raise InputError(f"{path} line {line}: {args.terminal} is {x[line]:g}: {fix}")
        terminal = x.to_numpy() > 0
        for line in lines[terminal & ~last][:1]:
            raise InputError(
                f"{path} line {line}: {args.terminal} is 1, but episode {label[line]} goes on: "
                "write 1 in its last row alone"
            )
        print(f"terminal: {terminal.sum()} of {last.sum()} episodes")
        if not terminal.any():
            print(f"note: {args.terminal} is 0 in every row, so failures do not count: correct "
                  "it, or leave out --terminal if none failed")  # fmt: skip
    stopped = last & ~terminal & np.isnan(after).all(1)
    if stopped.any():
        print(f"stopped: {stopped.sum()} episodes, whose last row has no known successor: "
              f"{some(lines[stopped])}")  # fmt: skip
    if last.sum() < FEW:
        print(f"note: {last.sum()} episodes are too few to tell good policies from lucky ones: "
              f"record {FEW} or more")  # fmt: skip
    numeric = pd.api.types.is_numeric_dtype(label)
    episode = label if numeric else pd.factorize(label)[0]
    return np.array(episode, float), terminal, (last & ~terminal) | hole


def bounds(args, actions):
    """(lowest, highest) action as metadata: what the flags or the data have. Raises InputError."""
    found = []
    for typed, seen in ((args.low, actions.min()), (args.high, actions.max())):
        x = typed or tuple(seen)
        found.append(x[0] if len(typed) == 1 else list(x))
    low, high = (np.broadcast_to(x, len(args.actions)) for x in found)
    for name, a, b in zip(args.actions, low, high):
        require(a < b, f"{name} has the bounds {a:g} and {b:g}: correct --low and --high, or leave "
                f"{name} out of --actions if it never changes")  # fmt: skip
        beyond = np.maximum(a - actions[name], actions[name] - b) > ROUNDING * (b - a)
        for line in actions.index[beyond][:1]:
            raise InputError(
                f"{args.log} line {line}: {name} is {actions[name][line]:g}, not in {a:g} to "
                f"{b:g}: correct the row, or --low and --high"
            )
    return found


# ---- what a person wants to see --------------------------------------------------------------


def show(args, table, episode, low, high):
    """Print episodes, returns and columns of the rows that are kept."""
    reward = table[args.reward].groupby(episode)
    for title, x in (("lengths", reward.size()), ("returns", reward.sum())):
        print(f"{title}: {x.min():.6g} to {x.max():.6g}, mean {x.mean():.6g}")
    names = [*args.obs, *args.actions, args.reward]
    x = table[names]
    kinds = ["observation"] * len(args.obs) + ["action"] * len(args.actions) + ["reward"]
    shown = pd.DataFrame({"": kinds, "min": x.min(), "mean": x.mean(), "max": x.max()})
    actions = x[list(args.actions)]
    for title, bound in (("at low", low), ("at high", high)):
        near = np.isclose(actions, bound, rtol=0, atol=ROUNDING * np.subtract(high, low))
        share = pd.Series(near.mean(0), args.actions).map("{:.1%}".format)
        shown[title] = share.reindex(names).fillna("")
    print(shown.to_string(float_format="{:.6g}".format))
    if not (args.low and args.high):
        print("note: without --low and --high, the bounds of actions are the data's")
    coarse = [
        name for name in args.obs if x[name].astype(np.float32).nunique() < x[name].nunique() / 2
    ]
    if coarse:
        print(f"note: too coarse in float32, which training uses: {', '.join(coarse)}; subtract a "
              "constant")  # fmt: skip


def main(args):
    args.resolve()
    require(args.log, "no table: python tools/from_csv.py log.csv --obs x v --actions u ...")
    whole = read_table(args)
    print(f"{args.log}: {len(whole)} rows")
    table = complete_rows(args, whole)
    table, hole, after = final_states(args, table, holes(args, table))
    episode, terminal, timeout = marks(args, table, hole, after)
    print(f"kept: {len(table)} rows in {len(set(episode))} episodes")
    actions = table[list(args.actions)]
    low, high = bounds(args, actions)
    show(args, table, episode, low, high)
    arrays = dict(
        observations=np.array(table[list(args.obs)]),
        actions=np.array(actions),
        rewards=np.array(table[args.reward]),
        terminals=terminal,
        timeouts=timeout,
        episode=episode,
    )
    if np.isfinite(after).any():
        arrays["final_observations"] = after[terminal | timeout]
    names = {"observations": args.obs, "actions": args.actions, "reward": args.reward}
    meta = {"action_low": low, "action_high": high, "columns": names}
    run.rows(arrays, meta, args.log, "cpu")  # raises before an older file is replaced
    file = io.BytesIO()
    np.savez(file, **arrays, metadata=json.dumps(meta))
    with in_one_line(args.out, "use another folder"):
        write_whole(Path(args.out), file.getvalue())
    print(f"{args.out} is written; next: python algorithms/iql.py --env {args.out} --steps 20000")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names that a terminal cannot show
    main(tyro.cli(Args, description=__doc__))
