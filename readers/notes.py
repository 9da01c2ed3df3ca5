"""What is probably wrong in data that no rule forbids, one line each: what is seen, why it matters,
what to do. A copy without this file trains as well, and gives no notes.

The notes know no task, so their limits are wide: robots that fall and points that hit walls are
no mistake. Fewer than ten ends are too few to judge.
"""

import difflib

import numpy as np

ROWS = 300_000  # that are looked at: more only take longer
FEW = 10
KNOWN = (
    "env_id env_kwargs max_episode_steps ref_min_score ref_max_score action_low action_high "
    "data_score columns"
).split()


def notes(columns: dict, meta: dict) -> list[str]:
    """Lines on columns of N rows, with D4RL's keys, as they lie in the file, after the checks that
    refuse one, and on their metadata, with the task's bounds where the file has none."""
    columns = {key: x[:ROWS] for key, x in columns.items() if x.ndim}
    obs = columns["observations"].astype("float32")
    marks = {key: columns.get(key, 0 * obs[:, 0]) != 0 for key in ("terminals", "timeouts")}
    end = ends(columns, obs, **marks)
    found = [*of_order(obs, end, jumps(obs), marks)]
    if end.sum() >= FEW:
        found += of_numbers(columns, meta)
    return found


def ends(columns, obs, terminals, timeouts):
    """Whether an episode ends after each row (N,), by whatever shows it."""
    end = columns.get("ends", terminals | timeouts) != 0
    end[-1] = True
    for key in ("step", "episode"):
        x = columns.get(key, 0 * end)
        if x.shape == end.shape and not (x % 1).any():
            rise = np.diff(x)
            end[:-1] |= rise != np.median(rise)
    follows = np.roll(obs, -1, 0)
    end |= ~np.isclose(columns.get("next_observations", follows), follows, 1e-3).all(1)
    return end


def jumps(obs):
    """How far the next row is (N,), in usual steps: the geometric mean of all columns, as a
    logarithm, in deviations above its median."""
    step = np.abs(np.roll(obs, -1, 0) - obs)
    usual = np.median(step, 0) + 0.1 * obs.std(0) + 1e-30
    size = np.log(step / usual + 0.1).mean(1)
    return (size - np.median(size)) / (size.std() + 1e-9)


def of_order(obs, end, jump, marks):
    """Lines on marks and rows that stand in the wrong place; one mistake explains what follows."""
    for key, mark in marks.items():
        before, here, after = (mark @ np.roll(jump, k) / (mark.sum() + 1) for k in (1, 0, -1))
        if mark.mean() > 0.5:
            yield (
                f"{mark.mean():.0%} of the rows are {key}, so hardly any row learns from the next: "
                "invert the column if its 1 means that the episode goes on"
            )
            return
        if mark.sum() >= FEW and max(before, after) > 2 > here:
            yield (
                f"{key} stand a row too {'late' if before > after else 'early'}: observations jump "
                "beside them, so two episodes share a transition; move the column by a row"
            )
            return
    rest = jump * ~end / max(3, 0.6 * np.median(jump[end]))
    far = np.flatnonzero(rest > 1)
    later = [np.abs(np.roll(obs, k, 0) - obs).mean(0) for k in range(1, 9)]
    if (later[0] >= 0.9 * np.max(later, 0)).all():
        yield "rows do not follow each other, so next observations are wrong: sort them by time"
    elif len(far) >= max(FEW, sum(rest > 0.75) / 1.5):
        yield (
            f"observations jump after {len(far)} rows that nothing marks, first after row "
            f"{far[0]}, so two episodes share a transition there; set timeouts in these rows"
        )
    else:
        yield from of_limits(end, **marks)


def of_limits(end, terminals, timeouts):
    """Lines on terminals where a time limit ended the episode."""
    last = np.flatnonzero(end)
    length = np.diff(last, prepend=-1)
    limit = timeouts[last] | (length == length.max())
    count = sum(limit & terminals[last])
    others = np.bincount(length[~limit])[length.max() // 2 :]
    if count >= max([FEW, *3 * others]):
        yield (
            f"{count} terminals come with timeouts or after {length.max()} rows, the longest "
            "episode, but after a time limit the future counts: make them timeouts alone"
        )


def of_numbers(columns, meta):
    """Lines on actions that hardly move, on types that lose numbers, and on the metadata."""
    width = np.subtract(meta.get("action_high", 1), meta.get("action_low", -1))
    used = np.ptp(columns["actions"], 0) / width
    for j in np.flatnonzero(used < 0.05):
        yield (
            f"action {j} uses {used[j]:.1%} of its bounds, so nearly nothing is learned of it: "
            "correct its unit or the bounds, or leave it out if it never changes"
        )
    if "action_low" not in meta and columns["actions"].min() >= 0:
        yield "no action is negative; a policy may go down to -1: add action_low to the metadata"
    for key in ("observations", "rewards"):
        kind = columns[key].dtype
        if kind.str[1:] in "i1 u1 u2 u4 u8 f2" and len(np.unique(columns[key])) > 4:
            yield f"{key} are {kind}, which has lost digits or signs: write float32"
    for key in meta.keys() - KNOWN:
        for near in difflib.get_close_matches(key, KNOWN, 1):
            yield f"metadata {key} has no effect: do you mean {near}?"
    low, high = meta.get("ref_min_score") or 0, meta.get("ref_max_score") or 0
    if high - low < 1e-4 * abs(high):
        yield "scores mean nothing, since ref_max_score is hardly above ref_min_score: correct it"
