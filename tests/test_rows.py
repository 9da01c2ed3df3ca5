"""run.rows, the one door of all data: a plain loop over the rows of random files, and a table of
files that are refused."""

import numpy as np
import pytest

from common import InputError
from run import rows

FORMS = "bare final next limit step episode ends holes".split()


def draw(rng):
    """A random file in one of its forms, with all that is true of it: the paths of its episodes,
    which are observed and end by a terminal, a time limit or a cut, or go on after a hole."""
    form = rng.choice(FORMS)
    kinds = {"limit": ["terminal", "limit"], "holes": ["terminal", "hole", "cut"]}
    kinds |= dict.fromkeys(("step", "episode", "next"), ["terminal", "timeout", "cut"])
    low, high = rng.choice([-1.0, -3.0]), rng.choice([1.0, 5.0])
    s, a = rng.integers(1, 4), rng.integers(1, 3)
    n = rng.integers(1, 7)
    kind = rng.choice(kinds.get(form, ["terminal", "timeout"]), n)
    length = np.where(kind == "limit", 4, rng.integers(1, 5, n))
    paths = [rng.normal(size=(k + 1, s)).astype(np.float32) for k in length]
    number = np.repeat(np.arange(n), length)
    last = np.append(number[1:] != number[:-1], True)
    mark = {x: last & (kind == x)[number] for x in ("terminal", "timeout")}
    file = dict(
        observations=np.concatenate([p[:-1] for p in paths]),
        actions=rng.uniform(low, high, (len(number), a)).astype(np.float32),
        rewards=rng.normal(size=len(number)).astype(np.float32),
        terminals=mark["terminal"],
        timeouts=mark["timeout"],
    )
    following = np.concatenate([p[1:] for p in paths])
    within = np.concatenate([np.arange(k) for k in length])
    if form == "final":
        file["final_observations"] = np.stack([p[-1] for p in paths])
    if form == "next":
        file["next_observations"] = following.copy()
    if form in ("next", "limit", "ends"):
        del file["timeouts"]
    if form == "ends":  # of recordings, inside which the MDP may end
        file["terminals"] = rng.integers(0, 2, len(number)).astype(np.uint8)
        file["ends"] = last
    if form == "episode":
        file["episode"] = number * 3.0
    if form == "step":
        file["step"] = 2 * within
    if form == "holes":  # step counts on through a hole, and begins again in a new episode
        first = np.zeros(n, int)
        for i in range(1, n):
            goes_on = kind[i - 1] == "hole"
            first[i] = first[i - 1] + length[i - 1] + 2 if goes_on else 0
        file["step"] = first[number] + within
    limit = {"max_episode_steps": 4} if form == "limit" else {}
    return form, file, dict(action_low=low, action_high=high) | limit, following, number, kind


def loop(form, file, meta, following, number, kind):
    """What the README promises, row by row: (rows, number of the episode of each, returns)."""
    found, kept = [], []
    whole = list(range(len(kind)))
    for e in range(1, len(kind)):
        if kind[e - 1] == "hole":
            whole[e] = whole[e - 1]
    for i, e in enumerate(number):
        last = i + 1 == len(number) or number[i + 1] != e
        terminal = bool(file["terminals"][i])
        unknown = last and form not in ("final", "next")
        if unknown and not terminal:
            continue
        low, high = meta["action_low"], meta["action_high"]
        action = (file["actions"][i] - low) / (high - low) * 2 - 1
        next_obs = file["observations"][i] if unknown else following[i]
        found.append((file["observations"][i], action, file["rewards"][i], next_obs, terminal))
        kept.append(e)
    names = sorted(set(kept))
    parts = [[whole[x] == whole[e] for x in number] for e in names]
    returns = [file["rewards"][part].astype(float).sum() for part in parts]
    recordings = sorted({whole[e] for e in kept})
    recording = [recordings.index(whole[e]) for e in kept]
    return found, [names.index(e) for e in kept], returns, recording


def begins_again(form, file, number):
    """Whether numbers alone can tell: a column that never changes or never rises counts nothing,
    and where the first step of an episode is the next one of the last, nothing is missing."""
    if form not in ("step", "holes"):
        return form != "episode" or number[-1] > 0
    rise = np.diff(file["step"])
    inside = rise[number[1:] == number[:-1]]
    cut = rise[number[1:] != number[:-1]]
    return len(inside) > 0 and len({*inside}) == 1 and not (cut == inside[0]).any()


@pytest.mark.parametrize("part", range(8))
def test_rows_are_those_of_a_plain_loop(part):
    seen = set()
    for seed in range(part * 100, part * 100 + 100):
        case = draw(np.random.default_rng(seed))
        found, episode, returns, recording = loop(*case)
        form, file, meta, _, number, _ = case
        if not found or not begins_again(form, file, number):
            continue
        seen.add(form)
        data = rows({key: x.copy() for key, x in file.items()}, meta, "x", "cpu")
        told = f"seed {seed}, {form}"
        assert data.episode.tolist() == episode, told
        assert data.recording.tolist() == recording, told
        np.testing.assert_allclose(data.episode_return, returns, atol=1e-5, err_msg=told)
        for i, (s, a, r, s2, terminal) in enumerate(found):
            np.testing.assert_allclose(data.action[i], a, atol=1e-5, err_msg=told)
            np.testing.assert_array_equal(data.obs[i], s, told)
            np.testing.assert_array_equal(data.next_obs[i], s2, told)
            assert data.reward[i] == r and data.terminal[i] == terminal, told
    assert seen == set(FORMS)


def log(**changes):
    """Six rows of two episodes, the second of which a time limit ends."""
    rng = np.random.default_rng(0)
    file = dict(
        observations=rng.normal(size=(6, 2)),
        actions=rng.uniform(-1, 1, (6, 1)),
        rewards=np.arange(6.0),
        terminals=np.array([0, 0, 1, 0, 0, 0]),
        timeouts=np.array([0, 0, 0, 0, 0, 1]),
    )
    return {key: x for key, x in (file | changes).items() if x is not None}


def test_stored_next_observations_are_believed():
    obs = log()["observations"].astype(np.float32)
    stored = np.roll(obs, -1, 0)
    stored[0] += 1  # an episode was cut here
    stored[5] += 2  # the true last observation
    data = rows(log(next_observations=stored), {}, "x", "cpu")
    assert data.episode.tolist() == [0, 1, 1, 2, 2, 2]
    np.testing.assert_array_equal(data.next_obs[[0, 5]], stored[[0, 5]])
    timeouts = np.array([0, 0, 0, 1, 0, 1])  # row 3 stores the first one of the next episode
    data = rows(log(next_observations=stored, timeouts=timeouts), {}, "x", "cpu")
    np.testing.assert_array_equal(data.reward, [0, 1, 2, 4, 5])
    rounded = stored + np.float32(1e-8)  # of the file, which is no cut
    assert rows(log(next_observations=rounded), {}, "x", "cpu").episode[-1] == 2
    stored[4] = np.nan  # nobody knows
    assert 4 not in rows(log(next_observations=stored), {}, "x", "cpu").reward


def test_whole_numbers_that_count_nothing_are_ignored():
    plain = rows(log(), {}, "x", "cpu").digest
    for x in (np.ones(6), np.linspace(0, 1, 6), np.zeros(3), np.full(6, np.nan)):
        assert rows(log(step=x, episode=x), {}, "x", "cpu").digest == plain


def test_images_are_refused():
    with pytest.raises(
        InputError, match=r"observations is float64 \(6, 8, 8, 3\), not floats \(N, S"
    ):
        rows(log(observations=np.zeros((6, 8, 8, 3))), {}, "x", "cpu")


def test_what_rounding_put_beyond_the_bounds_is_set_to_them():
    action = np.array([[1 + 1e-6], [-1 - 1e-6], [0], [0], [0], [0]])
    data = rows(log(actions=action), {}, "x", "cpu")
    assert data.action[:2].flatten().tolist() == [1, -1]


def changed(key, row, value):
    x = np.asarray(log()[key], float)
    x[row] = value
    return {key: x}


REFUSED = {
    "no rewards": (dict(rewards=None), {}, "rewards is nothing"),
    "no rows": ({key: x[:0] for key, x in log().items()}, {}, "observations is "),
    "short": (dict(actions=log()["actions"][:5]), {}, "actions is "),
    "flat": (dict(observations=np.zeros(6)), {}, "observations is "),
    "discrete": (dict(actions=np.zeros((6, 1), int)), {}, "actions is int64"),
    "text": (dict(rewards=np.array(list("abcdef"))), {}, "rewards is <U1"),
    "wide next": (dict(next_observations=np.zeros((6, 3))), {}, "next_observations is "),
    "half a flag": (changed("terminals", 1, 0.5), {}, "neither 0 nor 1"),
    "timeout 2": (changed("timeouts", 1, 2), {}, "neither 0 nor 1"),
    "nan": (changed("observations", 3, np.nan), {}, "row 3 has a number that is not finite"),
    "infinite": (changed("rewards", 4, np.inf), {}, "row 4"),
    "beyond": (changed("actions", 2, 1.1), {}, "row 2"),
    "crossed": ({}, dict(action_low=1, action_high=-1), "row 0"),
    "one final": (dict(final_observations=np.zeros((1, 2))), {}, "2 final_observations"),
    "half unknown": (dict(next_observations=np.array([[0, np.nan]] * 6)), {}, "row 0"),
    "nobody knows": (
        dict(terminals=np.zeros(6), next_observations=np.full((6, 2), np.nan)),
        {},
        "no row has a next observation",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_right_is_refused(case):
    changes, meta, says = REFUSED[case]
    with pytest.raises(InputError) as caught:
        rows(log(**changes), meta, "x", "cpu")
    assert says in str(caught.value) and str(caught.value).startswith("x")
