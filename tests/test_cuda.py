"""The GPU's path, checked without a GPU. There, an update runs a few times as it stands, is
captured in a CUDA graph, and is replayed: the same kernels, at the same addresses, with the same
numbers.

So an update reads nothing back, makes no shape that depends on values, computes on one device,
draws from that device's own generator, and keeps its state in tensors that stay where they are.
PyTorch's meta device stands for the GPU: its tensors have a shape and a device, and no values. Fake
tensors on a CUDA device would say the same, but a PyTorch
that was built without CUDA aborts at the first gradient of one."""

import importlib
import inspect
from types import SimpleNamespace

import gpu
import pytest
import torch
from short_runs import ROOT, SCRIPTS, outcome
from stand_in import PlainRun
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import Adam, Data, graphed, minimize, sample
from run import parse

GPU = torch.device("meta")
DRAWS = {
    "rand",
    "randn",
    "randint",
    "rand_like",
    "randn_like",
    "randint_like",
    "uniform_",
    "normal_",
}
ENVS = ("hopper-medium-v2", "antmaze-umaze-v2", "pen-human-v1", "cube-single-play-singletask-v0")
NAMES = [path.stem for path in SCRIPTS]
PHASES = [  # a phase without a length computes a table, not updates
    (name, phase)
    for name in NAMES
    for phase, length in importlib.import_module(name).Args.phases.items()
    if length
]


class Left(BaseException):
    """Ends `train` after the steps that were watched."""


class Capture(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold; `calls` lists each operation with its numbers. Filling
    `rates` is left out: a schedule does that between two replays."""

    def __init__(self, rates=()):
        super().__init__()
        self.calls, self.rates = [], rates

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, inputs = op.overloadpacket.__name__, tree_leaves((args, kwargs))
        assert torch.Tag.data_dependent_output not in op.tags, f"{name} reads a value back"
        by_rows = name == "index" and not any(x.dtype == torch.bool for x in inputs[1:])
        sized = torch.Tag.dynamic_output_shape not in op.tags or by_rows
        assert sized, f"{name}: a shape depends on values"
        if torch.Tag.nondeterministic_seeded in op.tags:
            assert name in DRAWS, f"{name}: draw with rand, randn or randint"
            own = not any(isinstance(x, torch.Generator) for x in inputs)
            assert own, f"{name}: draw without a generator"
        # There is no fused Adam for meta tensors; it changes its inputs and returns nothing.
        out = None if name == "_fused_adam_" else op(*args, **(kwargs or {}))
        for x in [*inputs, *tree_leaves(out)]:
            if isinstance(x, torch.Tensor):
                assert x.device == GPU, f"{name}: a tensor {tuple(x.shape)} is on the {x.device}"
        if not (name == "fill_" and any(args[0] is rate for rate in self.rates)):
            numbers = [x for x in inputs if isinstance(x, int | float)]
            self.calls.append((str(op), *numbers))
        return out


class Constants(TorchFunctionMode):
    """Refuses numbers that travel from the host to the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function in (torch.tensor, torch.as_tensor, torch.from_numpy)
        assert not made, f"torch.{function.__name__} copies a constant: make it before the loop"
        return function(*args, **(kwargs or {}))


class Watched(PlainRun):
    """A run that moves everything to the GPU before the first step of the phase `wanted`, watches
    steps at its beginning and past any warm start, and leaves. Earlier phases take one step."""

    def __init__(self, wanted):
        super().__init__(limit=1)
        self.wanted, self.calls, self.metrics = wanted, {}, []

    def loop(self, steps, phase="train"):
        if phase != self.wanted:
            yield from super().loop(steps, phase)
            return
        data = inspect.currentframe().f_back.f_locals["data"]  # a file may have made its own
        to_gpu(self.nets, self.opt, data)
        rates = [optimizer.lr for optimizer in vars(self.opt).values()]
        half = steps // 2
        for t in (*range(1, 5), *range(half + 1, half + 5)):
            with Constants(), Capture(rates) as capture:
                yield t
            self.calls[t] = capture.calls
        raise Left

    def after(self, t, metrics, act=None):
        if next(self.nets.parameters()).device == GPU:
            self.metrics.append(metrics)
        else:
            super().after(t, metrics, act)


def to_gpu(nets, opt, data):
    """Move networks, optimizers and data in place: the update holds on to these objects."""
    before = list(nets.parameters())
    nets.to(GPU)
    moved = {id(x): y for x, y in zip(before, nets.parameters(), strict=True)}

    def move(x):
        if isinstance(x, list):
            return [move(y) for y in x]
        return moved.get(id(x), x.to(GPU)) if isinstance(x, torch.Tensor) else x

    for thing in (data, *vars(opt).values()):
        for key, value in vars(thing).items():
            setattr(thing, key, move(value))


def rows(n=64):
    """Four episodes of random rows, each ended by a terminal."""
    draw = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, n, 5, generator=draw)
    action = torch.rand(n, 2, generator=draw) * 1.8 - 0.9
    reward = torch.randn(n, generator=draw)
    return Data(obs, action, reward, next_obs, (torch.arange(n) % 16 == 15).float())


def check_capture(train, args, phase="train"):
    """Raises AssertionError, or an error of torch's own, where an update cannot be captured."""
    torch.manual_seed(0)
    run = Watched(phase)
    with pytest.raises(Left):
        train(run, rows(), args)
    assert all(run.calls.values()) and len(run.metrics) == 8
    for metrics in run.metrics:
        for key, value in metrics.items():
            assert isinstance(value, torch.Tensor) and value.ndim == 0, f"{key} is no 0-d tensor"
    texts = {repr(calls) for calls in run.calls.values()}
    assert len(texts) <= 4, "a number changes from step to step: a replay would repeat the first"


@pytest.mark.parametrize("env", ["", *(pytest.param(env, marks=pytest.mark.soak) for env in ENVS)])
@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_an_update_can_be_captured(name, phase, env):
    """In every phase, with every constant of a delayed or warm step."""
    if env and name == "arq":
        pytest.skip("with a paper's settings, its phase of samples takes minutes")
    module = importlib.import_module(name)
    args, _ = parse(module.Args, module.PRESETS if env else {}, ["--env", env] if env else [])
    args.batch_size = 16
    check_capture(module.train, args, phase)


class Addresses(PlainRun):
    """A run of four steps a phase that compares where its tensors lie after each of them."""

    def __init__(self):
        super().__init__(limit=4)

    def tensors(self, data):
        found = {f"nets.{k}": x for k, x in self.nets.state_dict().items()}
        for name, optimizer in vars(self.opt).items():
            found |= {f"opt.{name} {i}": x for i, x in enumerate(optimizer.state())}
        fields = vars(data).items()
        return found | {f"data.{k}": x for k, x in fields if isinstance(x, torch.Tensor)}

    def loop(self, steps, phase="train"):
        data = inspect.currentframe().f_back.f_locals.get("data", SimpleNamespace())
        for t in super().loop(steps, phase):
            if t == 1:
                self.first = self.tensors(data)  # kept, so that no address is used again
            yield t
            now = self.tensors(data)
            assert now.keys() == self.first.keys(), phase
            for key, x in now.items():
                assert x.data_ptr() == self.first[key].data_ptr(), f"{phase}: {key} has moved"


def check_addresses(train, args):
    """Raises AssertionError where a phase moves what an update keeps."""
    torch.manual_seed(0)
    run = Addresses()
    train(run, rows(), args)
    assert len(run.phases["train"]) == 4


@pytest.mark.parametrize("name", NAMES)
def test_an_update_leaves_its_tensors_where_they_are(name):
    """A replay reads and writes the addresses of the capture."""
    module = importlib.import_module(name)
    check_addresses(module.train, module.Args(batch_size=16))


# ---- what the checks themselves find ---------------------------------------------------------


class Line(nn.Module):
    """One weight."""

    def __init__(self):
        super().__init__()
        self.w, self.calls = nn.Parameter(torch.ones(5)), 0


def train_line(extra):
    """A `train` with a schedule whose update logs what `extra(nets, data)` returns, too."""

    def update(nets, opt, data, args):
        s, r = sample(data, 16, ("obs", "reward"))
        s = s + 0.1 * torch.randn_like(s)
        loss = (s @ nets.w - r).square().mean()
        minimize(opt.w, loss)
        return {"loss": loss.detach(), "extra": extra(nets, data)}

    def train(run, data, args):
        nets = Line()
        opt = SimpleNamespace(w=Adam(nets.parameters(), 1e-3))
        run.start(nets, opt)
        step = graphed(update, nets, opt, data, args)
        for t in run.loop(100):
            opt.w.lr.fill_(1e-3 / t)
            metrics = step()
            run.after(t, metrics)

    return train


def total(nets, data):
    return nets.w.detach().sum()


def count(nets, data):
    nets.calls += 1
    return total(nets, data) * nets.calls


BAD = {  # what the update does: (the line that does it, what the check says)
    "reads-a-value": (lambda nets, data: nets.w.sum().item(), "_local_scalar_dense reads"),
    "selects-by-a-mask": (lambda nets, data: nets.w.detach()[nets.w > 0].sum(), "index: a shape"),
    "copies-a-constant": (lambda nets, data: torch.tensor(1.0, device=GPU), "copies a constant"),
    "counts-in-python": (count, "changes from step to step"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_update_is_found(case):
    extra, words = BAD[case]
    with pytest.raises(AssertionError, match=words):
        check_capture(train_line(extra), None)


def test_a_tensor_that_moves_is_found():
    def move(nets, data):
        nets.w.data = nets.w.data.clone()
        return total(nets, data)

    with pytest.raises(AssertionError, match="nets.w has moved"):
        check_addresses(train_line(move), None)


# ---- the script for those who have a GPU -----------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_explains_itself_in_one_line():
    lines, status = outcome(ROOT / "tests" / "gpu.py", [])
    assert status == 1 and len(lines) == 1 and "finds none here" in lines[0]


def test_the_script_compares_every_phase(capsys):
    gpu.compare("brac", torch.device("cpu"), compiled=False)
    lines = capsys.readouterr().out.splitlines()
    assert "brac: eager and replayed, fixed draws: 0.0e+00, agree" in lines
    assert "brac: eager and replayed, seeded draws: 0.0e+00, agree" in lines
    assert importlib.import_module("brac").graphed is graphed, "what it replaced is put back"
    a = {"train q": [1.0, 2.0], "train v": [1e6, 1e6]}
    assert gpu.largest_difference(a, a)[0] == 0
    b = a | {"train q": [1.0, 2.002]}
    worst, where = gpu.largest_difference(a, b)
    assert worst == pytest.approx(0.001, rel=0.01) and where == "train q, update 2"
    for b in ({"train q": a["train q"]}, a | {"train v": [1e6, float("nan")]}):
        assert gpu.largest_difference(a, b)[0] == float("inf")
