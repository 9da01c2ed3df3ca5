"""What every file of algorithms/ must satisfy, whatever it computes."""

import copy
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
from short_runs import (
    ROOT,
    SCRIPTS,
    SHORT,
    assert_same_run,
    at,
    checkpoint,
    flags,
    folder,
    killed_at_random,
    number_type,
    rows,
    run_main,
    same,
    short,
    start,
    stop_by,
    tracked,
)
from stand_in import PlainRun
from torch import nn
from torch.distributions import Normal

from common import MLP, Data, InputError, RunArgs
from run import parse, preset_of
from tools.evaluate import LoadedRun

NAMES = [path.stem for path in SCRIPTS]
FILES = {path.stem: path for path in SCRIPTS}

algorithm = pytest.mark.parametrize("name", NAMES)


def some(*names):
    """These by default, all files with --soak."""
    return [x if x in names else pytest.param(x, marks=pytest.mark.soak) for x in NAMES]


def module(name):
    return importlib.import_module(name)


# ---- a whole run -----------------------------------------------------------------------------


@algorithm
def test_a_run_writes_its_folder_and_follows_its_seed(name, here):
    """The same seed gives the same numbers, however often they are evaluated; another one, other
    weights."""
    score = run_main(name, *flags(FILES[name], out="one"))
    one = folder(name, "one")
    assert {"config.json", "eval.csv", "train.csv", "checkpoint.pt", "summary.json"} <= {
        path.name for path in one.iterdir()
    }
    assert not list(one.glob("*.tmp"))
    assert (one / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert any(path.stat().st_size > 100 for path in one.glob("events.out.tfevents.*"))
    config = json.loads((one / "config.json").read_text())
    assert config["algorithm"] == name and config["args"]["seed"] == 3
    assert config["args"]["env"] == "log.npz" and config["args"]["batch_size"] == 8
    table = rows(one / "eval.csv")
    assert [row["step"] for row in table] == ["10", "20"]
    for row in table:
        mean = (float(row["episode_0"]) + float(row["episode_1"])) / 2
        assert np.isclose(float(row["return"]), mean) and -2000 < mean < 0
    assert [row["step"] for row in rows(one / "train.csv")] == ["5", "10", "15", "20"]
    values = [float(v) for row in rows(one / "train.csv") for v in row.values()]
    assert len(values) > 4 and np.isfinite(values).all()
    summary = json.loads((one / "summary.json").read_text())
    scores = [float(row["score"]) for row in table]
    assert score == summary["score"] == np.mean(scores) and summary["last"] == scores[-1]
    last = checkpoint(name, "one")
    assert (last["phase"], last["step"]) == ("train", 20)

    run_main(name, *flags(FILES[name], out="rare", eval_every=7))
    rare = folder(name, "rare")
    assert [row["step"] for row in rows(rare / "eval.csv")] == ["7", "14", "20"]
    assert rows(rare / "eval.csv")[-1] == table[-1] and last["step"] == 20
    for file in {path.name for path in one.glob("*.csv")} - {"eval.csv"}:
        assert rows(rare / file) == rows(one / file), f"the same seed gave another {file}"
    for key in ("nets", "opt", "rng"):
        assert same(last[key], checkpoint(name, "rare")[key]), f"eval_every changed {key}"
    assert run_main(name, *flags(FILES[name], out="other", seed=4, eval_env="none")) is None
    other = folder(name, "other", seed=4)
    nets = torch.load(other / "checkpoint.pt", weights_only=True)["nets"]
    assert not same(last["nets"], nets), "the seed changes nothing"
    assert not (other / "eval.csv").exists() and not (other / "curve.png").exists()


@algorithm
def test_phases_are_those_of_the_loop_in_order(name, here, whole):
    _, run = whole(name)
    ran = list(dict.fromkeys(phase for phase, _ in run.calls))
    declared = type(run.args).phases
    assert [phase for phase in declared if phase in ran] == ran, "Args.phases lists every phase"
    for phase, field in declared.items():
        if field and phase in ran:
            assert run.count(phase) == getattr(run.args, field), phase


# ---- stop and continue -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(name): the folder of an uninterrupted run with evaluations, and the run; done once."""
    root, done = tmp_path_factory.mktemp("whole"), {}

    def make(name):
        if name not in done:
            _, done[name] = start(name, out=str(root), eval_env=None)
        return str(root), done[name]

    return make


@algorithm
def test_resume_continues_to_the_bit_in_every_phase(name, here, whole, capsys):
    """Stopped by a signal in the middle of each phase, and at the last step of the first one."""
    uncut, _ = whole(name)
    run_phases = [
        row for row in module(name).Args.phases if (folder(name, uncut) / f"{row}.csv").exists()
    ]
    draw = random.Random(name)
    for phase in run_phases:
        steps = (
            20 if phase == "train" else int(rows(folder(name, uncut) / f"{phase}.csv")[-1]["step"])
        )
        stops = [draw.randint(1, steps - 1) if steps > 1 else 1]
        stops += [steps] if phase == run_phases[0] != "train" else []
        for step in dict.fromkeys(stops):
            shutil.rmtree("parts", ignore_errors=True)
            number = draw.choice([signal.SIGINT, signal.SIGTERM])
            with pytest.raises(SystemExit) as stopped:
                start(name, at(phase, step, stop_by(number)), out="parts", eval_env=None)
            assert stopped.value.code == 130
            saved = checkpoint(name, "parts")
            assert (saved["phase"], saved["step"]) == (phase, step)
            assert not (folder(name, "parts") / "summary.json").exists()
            said = f"stopped at {phase} step {step}: --resume continues"
            assert said in capsys.readouterr().out
            _, run = start(name, out="parts", eval_env=None, resume=True)
            assert run.count(phase) == steps - step, "steps were repeated or lost"
            assert_same_run(name, uncut, "parts")


@pytest.mark.parametrize("name", some("td3_bc"))
def test_kill_at_random_moments_changes_nothing(name, here, request):
    killed_at_random(name, kills=10 if request.config.getoption("--soak") else 2)


# ---- flags -----------------------------------------------------------------------------------


@algorithm
def test_every_row_of_presets_is_in_force_and_a_typed_flag_wins(name):
    """A typed flag wins also at its default. Rows of equal values are parsed once."""
    Args, presets = module(name).Args, module(name).PRESETS
    default, parsed = Args(), set()
    rows = {pattern.replace("*", "x").replace("?", "-"): row for pattern, row in presets.items()}
    for env, row in rows.items():
        found = preset_of(presets, env)
        assert row.items() <= found.items(), f"{env}: a later row hides this one"
        if repr(found) in parsed:
            continue
        parsed.add(repr(found))
        args, preset = parse(Args, presets, ["--env", env])
        assert row.items() <= preset.items() and preset.items() <= vars(args).items(), env
        words = []
        for key in found:
            value, flag = getattr(default, key), key.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                words.append(f"--{flag}={value}")
        typed, _ = parse(Args, presets, ["--env", env, *words])
        for key in found:
            if getattr(default, key) is not None:
                assert getattr(typed, key) == getattr(default, key), key


@algorithm
def test_presets_name_fields_and_match_the_path_of_no_file(name):
    Args, presets = module(name).Args, module(name).PRESETS
    assert parse(Args, presets, ["--env", "hopper-medium-v2.hdf5"])[1] == {}
    known = {field.name for field in dataclasses.fields(Args)}
    for pattern, values in presets.items():
        assert values and values.keys() <= known, pattern
        assert not {"env", "seed"} & values.keys(), pattern
        assert not values.keys() & {f.name for f in dataclasses.fields(RunArgs)} - {"eval_episodes"}
        assert pattern != "*", "what holds for all data is the default of a field"
        for suffix in (".npz", ".hdf5", ".h5", ".NPZ"):
            path = pattern.replace("*", "x") + suffix
            assert preset_of(presets, path) == {}, path
        if "/" in pattern:
            assert pattern.startswith(("D4RL/", "mujoco/")), f"{pattern}: nobody can get that data"


# ---- the wiring between a right loss and a right score ---------------------------------------

# Flags that change no number of training. The run uses them: which data, which seed, which machine,
# what it writes and when, and how long and where it evaluates.
OF_THE_RUN = {field.name for field in dataclasses.fields(RunArgs)} | {"env", "seed", "eval_every"}
FEW = dict(hidden=32, width=32, members=1, samples=2, n_actions=2, n=3, k=2, sample_steps=6)
LOW, HIGH = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 12.0])  # the bandit's bounds
BEST = torch.tensor([[0.8, -0.8], [-0.8, 0.8]])  # its best action in either state, in [-1, 1]


class Wired(PlainRun):
    """A run that keeps, for each phase, how far every parameter moved and which of them belong to
    an optimizer that took a step. A clone that it reads has other numbers than any it trains."""

    def start(self, nets, opt, **largest):
        super().start(nets, opt, **largest)
        self.rates = {key: adam.lr.item() for key, adam in vars(opt).items()}
        self.moved, self.trained = {}, {}
        grads = lambda net: {p.requires_grad for p in net.parameters()}
        self.copy_of = {  # {name of a target's tensor: name of the tensor that it follows}
            f"{a}.{key}": f"{b}.{key}"
            for a, target in nets.named_children()
            for b, online in nets.named_children()
            if (grads(target), grads(online)) == ({False}, {True})
            if same(target.state_dict(), online.state_dict())
            for key, _ in target.named_parameters()
        }

    def loop(self, steps, phase="train"):
        before = {key: p.detach().clone() for key, p in self.nets.named_parameters()}
        counts = {key: adam.count.item() for key, adam in vars(self.opt).items()}
        yield from super().loop(steps, phase)
        distances = {
            key: (p.detach() - before[key]).norm() for key, p in self.nets.named_parameters()
        }
        stepped = [adam for key, adam in vars(self.opt).items() if adam.count != counts[key]]
        had = {id(p) for adam in stepped for p in adam.params}
        self.moved[phase] = distances
        self.trained[phase] = {key for key, p in self.nets.named_parameters() if id(p) in had}

    def read_clone(self, module):
        for p in module.parameters():
            p.data.mul_(0.9)


def trained(name, data, /, **values):
    """The run of a file's own `train` on `data`, without run.py, and its arguments."""
    args, run = module(name).Args(**values), Wired()
    torch.manual_seed(0)
    module(name).train(run, data, args)
    return run, args


def few(Args) -> dict:
    """Small values of those flags on which the time of a step depends."""
    names = {field.name for field in dataclasses.fields(Args)}
    return {key: value for key, value in FEW.items() if key in names}


def acted(act, obs, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        return act(obs)


def other_values(field, value) -> list:
    """Values of a flag to put in place of `value`."""
    if field.name == "clone":
        return ["checkpoint.pt"]
    kinds = [field.type, *typing.get_args(field.type)]
    words = [x for kind in kinds for x in typing.get_args(kind) if isinstance(x, str)]
    if field.type is bool:
        return [not value]
    if words:
        return [word for word in words if word != value]
    kind, allowed = number_type(field.type)
    numbers = (1, 2, 3, 6) if kind is int else (-1000.0, 0.01 * (value or 1), 0.5, 1000.0)
    inside = [x for x in numbers if not allowed or allowed(x)]
    return [x for x in inside if x != value]


# ---- the policy that acts is the policy that was trained


def bandit():
    """Two states whose numbers have mean 5 and deviation 10, and actions around the best one."""
    draw = torch.Generator().manual_seed(0)
    state = torch.arange(256) % 2
    obs = 5 + 10 * (1 - 2.0 * state).unsqueeze(1).expand(-1, 3)
    action = BEST[state] + 0.1 * (2 * torch.rand(256, 2, generator=draw) - 1)
    reward = 1 - 3 * (action - BEST[state]).square().sum(1)
    ends = torch.ones(256)
    return Data(obs, action, reward, obs.clone(), ends, action_low=LOW, action_high=HIGH)


def clone_of_the_bandit(name, **more):
    Args = module(name).Args
    values = dict(batch_size=32, normalize_obs=True)
    for field in dataclasses.fields(Args):
        if field.name.endswith("lr"):
            values[field.name] = 3e-3
        if field.name.endswith("steps") and (field.default or 0) >= 1000:
            values[field.name] = 150
    return trained(
        name, bandit(), **values | few(Args) | getattr(module(name), "CLONING", {}) | more
    )


class Reads:
    """Arguments that remember which of them were read."""

    def __init__(self, args):
        self.args, self.names = args, {}

    def __getattr__(self, name):
        return self.names.setdefault(name, getattr(self.args, name))


def assert_scaled(nets, act, obs):
    """Raw observations in, actions in the task's bounds out: the same as between the networks'
    inputs and actions in [-1, 1], where scaling does nothing."""
    a, scaling = acted(act, obs), nets.scaling
    inputs = scaling.obs(obs)
    saved = copy.deepcopy(scaling.state_dict())
    for key, buffer in scaling.named_buffers():
        buffer.fill_(1.0 if key in ("obs_std", "action_half_range") else 0.0)
    inner = acted(act, inputs)
    scaling.load_state_dict(saved)
    assert torch.equal(a, (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * inner), "scaling is not applied"


def assert_acts_as_trained(name, run, args):
    states = torch.tensor([[15.0] * 3, [-5.0] * 3])
    far = 5 + 100 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    act = run.act
    for one in (act, *run.references.values()):
        assert_scaled(run.nets, one, states.repeat(8, 1))
        a_far = acted(one, far)
        assert (a_far >= LOW - 1e-4).all() and (a_far <= HIGH + 1e-4).all(), "beyond the bounds"
    a = acted(act, states.repeat(100, 1)).view(100, 2, 2).mean(0)
    error = ((a - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2) - BEST).abs().mean()
    assert error < 0.1, f"{a}: the policy squashes its actions in another way than the loss"
    a = acted(act, far)
    assert torch.equal(a, acted(lambda obs: module(name).policy(run.nets, obs, args), far))
    if torch.equal(a, acted(act, far, seed=2)):  # it draws nothing
        torch.testing.assert_close(a[7:8], acted(act, far[7:8]), atol=1e-4, rtol=1e-4)
    actor = {id(p) for p in getattr(run.nets, "actor", nn.Module()).parameters()}
    saved = copy.deepcopy(run.nets.state_dict())
    for key, p in run.nets.named_parameters():
        p.data.mul_(1.0 if key in run.trained["train"] else -3.0)
    assert torch.equal(a, acted(act, far)), "the policy uses what the last phase does not train"
    if actor and not getattr(args, "best_of", 0):  # there the clone acts
        for p in run.nets.parameters():
            p.data.mul_(-3.0 if id(p) in actor else 1.0)
        assert not torch.allclose(a, acted(act, far)), "the actor does not act"
    run.nets.load_state_dict(saved)


@algorithm
def test_the_policy_that_acts_is_the_one_that_was_trained(name):
    """Where every method clones, policy(raw observations) gives the data's actions, 0.8 of the
    bounds, where tanh, clipping, a wrong scale and other networks give others; with every value
    of every flag that `policy` reads."""
    run, args = clone_of_the_bandit(name)
    assert_acts_as_trained(name, run, args)
    reads, fields = Reads(args), {field.name: field for field in dataclasses.fields(args)}
    module(name).policy(run.nets, torch.zeros(2, 3), reads)
    for flag, value in reads.names.items():
        others = other_values(fields[flag], value)
        for other in others if isinstance(value, str | bool) else others[-1:]:
            variant, args = clone_of_the_bandit(name, **{flag: other})
            assert_acts_as_trained(name, variant, args)


# ---- rewards, ends and the discount reach what they must


SMALL = dict(polyak=0.1, gamma=0.5, warm_start=0)


def quick(name, data):
    """The run of a small problem with large rates."""
    values = dict(batch_size=32, normalize_obs=False)
    for field in dataclasses.fields(module(name).Args):
        if field.name.endswith("lr"):
            values[field.name] = 3e-3
        elif field.name in SMALL:
            values[field.name] = SMALL[field.name]
        elif number_type(field.type)[0] is int and (field.default or 0) >= 1000:
            values[field.name] = 200 if field.name.endswith("steps") else 20
    return trained(name, data, **values | few(module(name).Args))[0]


def pairs(size, reward, after=1.0):
    """128 episodes of two steps, from state -1 to state 1, which ends, and whose next state is
    `after`; actions are drawn between -size and size."""
    draw, step = torch.Generator().manual_seed(0), torch.arange(256) % 2
    obs = (2.0 * step - 1)[:, None].repeat(1, 3)
    next_obs = torch.where(step == 1, after, 1.0)[:, None].repeat(1, 3)
    action = size * (2 * torch.rand(256, 2, generator=draw) - 1)
    r = reward(step, action).float()
    return Data(obs, action, r, next_obs, step.float(), torch.arange(256) // 2)


@algorithm
def test_the_policy_goes_where_the_rewards_are(name):
    """They rise with the first action number, or fall. A file that reads no rewards is let go."""
    found, told = [], []
    for sign in (5, -5):
        run = quick(name, pairs(0.8, lambda step, action: sign * action[:, 0]))
        found.append(acted(run.act, -torch.ones(50, 3))[:, 0].mean())
        told.append(run.phases["train"])
    if told[0] != told[1]:
        assert found[0] != found[1], "rewards do not reach the policy: is its Q term detached?"
        assert found[0] > found[1], "the policy goes where rewards are small: a sign is wrong"


@algorithm
def test_q_of_the_step_before_is_discounted_once_and_an_end_ends(name):
    """State 1 pays 0 or 10: what this adds to Q is gamma times as much in state -1."""

    def values(pay, after=1.0):
        data = pairs(0.25, lambda step, action: pay * step, after)
        run = quick(name, data)
        q = module(name).q(run.nets, data.obs, data.action).detach()
        told = [run.rows[-1][key] for key in ("q_mean", "q_data") if key in run.rows[-1]]
        assert all(abs(x - q.mean()) < 1 + 0.2 * abs(q.mean()) for x in told), (
            "the log has another Q"
        )
        return q.reshape(-1, 128, 2).mean((0, 1))

    if hasattr(module(name), "q"):
        paid = values(10)
        before, last = paid - values(0)
        share = f"{before / last:.2f}"
        assert abs(before / last - 0.5) < 0.05, f"Q is discounted by {share} a step, not by gamma"
        assert abs(values(10, -1.0)[1] - paid[1]) < 0.1 * last, "Q goes on after a terminal row"


@algorithm
def test_a_target_actor_is_asked_about_next_states(name, monkeypatch):
    data, asked, forward = small_log(), [], MLP.forward
    data.next_obs[:, 0], data.obs[:, 0] = 1.0, 0.0

    def noted(net, *inputs, **options):
        asked.append((net, inputs[0][..., 0].detach().clone()))
        return forward(net, *inputs, **options)

    monkeypatch.setattr(MLP, "forward", noted)
    Args = module(name).Args
    run, _ = trained(name, data, **short(Args) | few(Args) | dict(steps=2, normalize_obs=False))
    target = getattr(run.nets, "actor_target", None)
    wrong = [x for net, x in asked if net is target and (x != 1).any()]
    assert not wrong, "the target actor is asked about s; a target needs its action at s'"


# ---- the critics that a user reads are the critics that were trained


def q_by_hand(nets, s, a):
    """The trained critics; those of Fisher-BRC are an offset plus the log-density of the clone, a
    mixture of Gaussians for each dimension, behind tanh."""
    if hasattr(nets, "q"):
        return nets.q(s, a)
    log_weight, mean, log_std = nets.mu(s)
    each = log_weight + Normal(mean, log_std.exp()).log_prob(torch.atanh(a))  # (K, B, A)
    return nets.offset(s, a) + (each.logsumexp(0) - (1 - a.square()).log()).sum(-1)


@algorithm
def test_q_is_the_trained_critics_at_scaled_inputs(name):
    """q(nets, s, a) scales nothing by itself and reads no target; a loaded run scales for it."""
    Args = module(name).Args
    values = short(Args) | few(Args) | dict(steps=8, normalize_obs=True)
    run, args = trained(name, bandit(), **values)
    draw = torch.Generator().manual_seed(0)
    s, a = torch.randn(7, 3, generator=draw), 1.8 * torch.rand(7, 2, generator=draw) - 0.9
    scaling, loaded = run.nets.scaling, LoadedRun(module(name), run.nets, args, None, None, 8)
    raw = s * scaling.obs_std + scaling.obs_mean, (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * a
    if not hasattr(module(name), "q"):
        assert not hasattr(run.nets, "q"), "the file has critics, and no function q that reads them"
        with pytest.raises(InputError, match=f"{name}.py learns no Q: use "):
            loaded.q(*raw)
        return
    q = module(name).q(run.nets, s, a)
    assert q.shape == (7,) or (q.ndim == 2 and q.shape[1] == 7)
    torch.testing.assert_close(q, q_by_hand(run.nets, s, a), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.q(*raw), q.detach(), rtol=1e-4, atol=1e-4)
    weights = {key: p for key, p in run.nets.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(q.sum(), list(weights.values()), allow_unused=True)
    read = {key for key, grad in zip(weights, grads) if grad is not None}
    assert read and read <= {key for keys in run.trained.values() for key in keys}


# ---- flags and parameters


def small_log():
    """Three episodes; the last action of each is exactly at a bound."""
    draw = torch.Generator().manual_seed(0)
    obs = torch.randn(61, 3, generator=draw)
    action = torch.rand(60, 2, generator=draw) * 1.8 - 0.9
    action[::4] = 1.0
    row = torch.arange(60)
    reward, terminal = torch.randn(60, generator=draw), (row % 40 == 19).float()
    return Data(obs[:-1].clone(), action, reward, obs[1:], terminal, episode=row // 20)


@functools.cache
def tried(name, *changes):
    """(digest of all numbers, the run) of a few steps with some flags changed; (None, None) where
    the flags cannot work together."""
    Args = module(name).Args
    values = {k: 4 if v == 10 and k not in SHORT else v for k, v in short(Args).items()}
    values |= few(Args) | dict(steps=8)
    try:
        run, args = trained(name, small_log(), **values | dict(changes))
    except InputError:
        return None, None
    numbers = [v for rows in run.phases.values() for row in rows for v in row.values()]
    for act in (run.act, *run.references.values()):
        if act:
            numbers += acted(act, torch.arange(12.0).view(4, 3)).flatten().tolist()
    numbers += [p.double().sum().item() for p in run.nets.parameters()]
    return hashlib.sha256(repr(numbers).encode()).hexdigest(), run


@algorithm
def test_every_flag_changes_a_number(name):
    """By itself, or together with one other flag; those of the run change nothing that is trained.
    And every trainable tensor is trained under one of these settings."""
    Args = module(name).Args
    fields = [field for field in dataclasses.fields(Args) if field.name not in OF_THE_RUN]
    base = short(Args) | few(Args)
    changes = [
        (field.name, other)
        for field in fields
        for other in other_values(field, base.get(field.name, field.default))
    ]
    names = [field.name for field in fields]

    def matters(flag):
        """Switches, and flags that are declared near this one, are the first to change with it."""
        own = [change for change in changes if change[0] == flag]

        def near(change):
            distance = abs(names.index(change[0]) - names.index(flag))
            return not isinstance(change[1], str | bool), distance

        others = [(change,) for change in sorted(changes, key=near) if change[0] != flag]
        for around in ((), *others):
            before = tried(name, *around)[0]
            if before and any(tried(name, *around, x)[0] not in (None, before) for x in own):
                return True
        return False

    dead = [field.name for field in fields if not matters(field.name)]
    assert not dead, f"{dead}: no number of a short run depends on these"
    _, run = tried(name)
    of_the_run = dict(eval_every=3, eval_episodes=7, log_every=3, save_every=2, name="x", out="y")
    _, other = tried(name, *of_the_run.items())
    for p, q in zip(run.nets.parameters(), other.nets.parameters()):
        assert torch.equal(p, q) or not p.requires_grad, "a flag of the run changes training"
    words = [change for change in changes if isinstance(change[1], str | bool)]
    runs = [run, *(tried(name, change)[1] for change in words)]
    ever = {key for run in runs if run for keys in run.trained.values() for key in keys}
    idle = {key for key, p in run.nets.named_parameters() if p.requires_grad} - ever
    assert not idle, f"{idle}: no optimizer has these"


@algorithm
def test_each_phase_moves_what_it_trains_and_nothing_else(name):
    """What an optimizer has that took a step, and the targets of that, which move less far."""
    _, run = tried(name)
    for phase, moved in run.moved.items():
        for key, p in run.nets.named_parameters():
            distance, what = moved[key], f"{key} in phase {phase}"
            if p.requires_grad:
                assert (distance > 0) == (key in run.trained[phase]), what
                continue
            source = run.copy_of[key]  # a tensor without gradients is a copy of one that has them
            follows = (distance > 0) == (source in run.trained[phase])
            assert follows, f"{what} does not follow {source}: is the update of a target missing?"
            assert distance <= moved[source] * (1 + 1e-6), what


@algorithm
def test_fresh_weights_are_spread_around_zero(name):
    """Every tensor of fresh networks is one number, or a sample whose mean is near 0, and another
    seed draws another one."""
    pair = []
    for seed in (1, 0):
        torch.manual_seed(seed)
        pair.append(module(name).Nets(small_log(), module(name).Args()))
    assert not same(*(nets.state_dict() for nets in pair)), "the seed reaches no first weight"
    for key, p in pair[1].named_parameters():
        if (p != p.flatten()[0]).any():
            assert p.mean().abs() < 6 * p.std() / p.numel() ** 0.5, key
        else:
            assert "weights" not in key, f"{key}: all weights are equal"


@algorithm
def test_observations_are_normalized_where_asked(name):
    """By deviations that a small positive number keeps away from 0."""
    values = short(module(name).Args) | few(module(name).Args) | dict(steps=1)
    data = small_log()
    data.terminal[data.episode.diff(append=torch.tensor([3])) > 0] = 1  # rebrac.py drops no row
    data.obs[:, 1] = 7.0
    mean, std = data.obs.mean(0), data.obs.std(0, correction=0)
    run, _ = trained(name, data, **values, normalize_obs=True)
    torch.testing.assert_close(run.nets.scaling.obs_mean, mean)
    torch.testing.assert_close(run.nets.scaling.obs_std, std + 1e-3)


@algorithm
def test_every_update_is_compiled_where_asked(name, monkeypatch):
    """And none where it is not asked."""
    asked, plain = [], module(name).graphed

    def noted(update, *inputs, compile=False):
        asked.append(compile)
        return plain(update, *inputs)

    monkeypatch.setattr(module(name), "graphed", noted)
    for wanted in (True, False):
        asked.clear()
        values = short(module(name).Args) | few(module(name).Args) | dict(steps=1)
        trained(name, small_log(), **values, compile=wanted)
        assert asked and set(asked) == {wanted}


# ---- a file on its own -----------------------------------------------------------------------

IMPORT = """
import importlib, os, random, signal, sys, threading
import numpy, torch
sys.argv = ["x", "--garbage", "--steps", "nonsense", "--help"]
sys.path[:0] = [ROOT, ROOT + "/algorithms"]
def state():
    handlers = [signal.getsignal(s) for s in (2, 15)]
    random_state = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
    flags = torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.get_num_threads()
    process = dict(os.environ), os.listdir(), threading.active_count(), torch.cuda.is_initialized()
    return handlers, random_state, flags, process
before = state()
for name in NAMES:
    importlib.import_module(name)
slow = {"gymnasium", "mujoco", "minari", "matplotlib", "tensorboard", "wandb", "h5py"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
for name in TOOLS:
    importlib.import_module(name)
assert state() == before, "an import changed the state of the process"
"""


def test_importing_does_no_work(tmp_path):
    """The commands in tools/ and peers/ may import what they need; no other file imports a
    simulator."""
    tools = [f"{folder}.{x.stem}" for folder in ("tools", "peers") for x in tracked(folder)]
    code = IMPORT.replace("ROOT", repr(str(ROOT))).replace("TOOLS", repr(tools))
    code = code.replace("NAMES", repr(NAMES))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", some("td3_bc"))
def test_a_file_runs_as_its_user_starts_it(name, here):
    """A process of its own, in another folder: the same numbers as here."""
    command = [sys.executable, str(FILES[name]), *flags(FILES[name], out="one")]
    place = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=place)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("note: ")]
    assert lines[0].startswith("data:   log.npz, 120 transitions, 4 episodes, return ")
    assert lines[1].startswith("preset: ")
    assert lines[-1].startswith(f"{name} return -") and "| data " in lines[-1]
    run_main(name, *flags(FILES[name], out="two"))
    assert_same_run(name, "one", "two")


PLANTED = {  # in td3_bc.py: (what stands there, the error, the test that fails, its message)
    "no-target-update": (
        "    polyak(nets.q_target, nets.q, args.polyak)\n",
        "",
        "test_each_phase_moves_what_it_trains_and_nothing_else",
        "is the update of a target missing",
    ),
    "gamma-fixed": (
        "r + args.gamma *",
        "r + 0.99 *",
        "test_q_of_the_step_before_is_discounted_once_and_an_end_ends",
        "discounted by 0.9.* not by gamma",
    ),
    "no-scaling": (
        "nets.scaling.action(a)",
        "a",
        "test_the_policy_that_acts_is_the_one_that_was_trained",
        "scaling is not applied",
    ),
    "q-detached": (
        "-q_weight * q.mean()",
        "-q_weight * q.mean().detach()",
        "test_the_policy_goes_where_the_rewards_are",
        "is its Q term detached",
    ),
    "terminal-ignored": (
        " * (1 - terminal) * q2",
        " * q2",
        "test_q_of_the_step_before_is_discounted_once_and_an_end_ends",
        "goes on after a terminal row",
    ),
    "gamma-squared": (
        "r + args.gamma *",
        "r + args.gamma**2 *",
        "test_q_of_the_step_before_is_discounted_once_and_an_end_ends",
        "discounted by 0.2.* not by gamma",
    ),
    "state-for-next-state": (
        "nets.actor_target(s2)",
        "nets.actor_target(s)",
        "test_a_target_actor_is_asked_about_next_states",
        "needs its action at s'",
    ),
    "sign-of-q": (
        "-q_weight * q.mean()",
        "q_weight * q.mean()",
        "test_the_policy_goes_where_the_rewards_are",
        "a sign is wrong",
    ),
    "no-optimizer": (
        "Adam(nets.q.parameters(), args.lr)",
        "Adam([*nets.q.parameters()][:2], args.lr)",
        "test_every_flag_changes_a_number",
        "no optimizer has these",
    ),
    "no-seed": (
        "        super().__init__()\n",
        "        super().__init__()\n        torch.manual_seed(0)\n",
        "test_fresh_weights_are_spread_around_zero",
        "the seed reaches no first weight",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_error_is_named(case, tmp_path, monkeypatch):
    was, planted, test, message = PLANTED[case]
    text = FILES["td3_bc"].read_text()
    assert was in text
    name = "planted_" + case.replace("-", "_")
    (tmp_path / f"{name}.py").write_text(text.replace(was, planted))
    monkeypatch.syspath_prepend(tmp_path)
    more = [monkeypatch] if "target_actor" in test else []
    with pytest.raises(AssertionError, match=message):
        globals()[test](name, *more)
