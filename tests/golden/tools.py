"""What every golden comparison needs: drawn networks, injected noise, two numbers for a tensor.

A module `tests/golden/ALGORITHM.py` defines `REFERENCE` (repository and commit), `TOLERANCE`,
`COMPARED` (what is compared, in a few words) and `values(record)`, which runs our functions in
float64 and yields (label, ours, recorded). `record` is the content of ALGORITHM.json; `ours` is a
tensor or a number; `recorded` is a number, a list of numbers, or {"norm": ..., "proj": ...}."""

import contextlib
import math

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from common import Adam


def draw_network(rng, sizes, members=None):
    """Layers [(W, b), ...] drawn as the recipe says; with `members`, a list of such lists."""
    if members is not None:
        return [draw_network(rng, sizes) for _ in range(members)]
    return [
        (
            rng.uniform(-1, 1, (n_in, n_out)) / math.sqrt(n_in),
            rng.uniform(-1, 1, n_out) / math.sqrt(n_in),
        )
        for n_in, n_out in zip(sizes[:-1], sizes[1:])
    ]


@torch.no_grad()
def load_network(net, drawn):
    """Copy drawn layers (or a list of them, one for each member) into an MLP."""
    for i, (w, b) in enumerate(zip(net.weights, net.biases, strict=True)):
        if w.ndim == 3:
            w.copy_(torch.tensor(np.stack([member[i][0] for member in drawn])))
            b.copy_(torch.tensor(np.stack([member[i][1] for member in drawn])[:, None]))
        else:
            w.copy_(torch.tensor(drawn[i][0])), b.copy_(torch.tensor(drawn[i][1]))


def draw_critic(rng, sizes, layer_norm):
    """Layers, and then gain and shift of every hidden layer's normalization."""
    layers, norms = draw_network(rng, sizes), []
    for width in sizes[1:-1] if layer_norm else ():
        gain = 1 + rng.uniform(-0.5, 0.5, width)
        norms.append((gain, rng.uniform(-0.5, 0.5, width)))
    return layers, norms


@torch.no_grad()
def load_critics(net, drawn):
    """Copy critics of `draw_critic`, one for each member, into an MLP."""
    load_network(net, [layers for layers, _ in drawn])
    for i, pair in enumerate(zip(net.gains, net.shifts)):
        for p, values in zip(pair, zip(*[norms[i] for _, norms in drawn])):
            p.copy_(torch.tensor(np.stack(values)[:, None]))


def layers(net, letters, tensors=None) -> dict:
    """Parameters of an MLP (or other tensors in their order) by their names in a record: w0, b0, w1
    and so on, with these two letters."""
    names = [name.split(".") for name in net.state_dict()]
    names = [letters[kind == "biases"] + number for kind, number in names]
    return dict(zip(names, net.parameters() if tensors is None else tensors, strict=True))


def compare(label, ours, recorded):
    """(label, ours, recorded) of every entry of `ours`, a nested dictionary."""
    if not isinstance(ours, dict):
        yield label, ours, recorded
        return
    for key, value in ours.items():
        yield from compare(f"{label}, {key}", value, recorded[key])


@contextlib.contextmanager
def in_float64():
    """Networks and optimizers made inside are float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class RecordingAdam(Adam):
    """Adam that keeps the gradients of its first step."""

    first = None

    def step(self, grads):
        if self.first is None:
            self.first = [g.clone() for g in grads]
        super().step(grads)


class KerasAdam(RecordingAdam):
    """Adam with its epsilon in Keras's place: added to the root before the bias correction."""

    def step(self, grads):
        t = self.count.item() + 1
        self.eps = 1e-7 / math.sqrt(1 - 0.999**t)
        super().step(grads)


def first_gradients(nets, opt) -> dict:
    """Gradients by parameter, from Adam's first moments after one step: each is 0.1 times one."""
    names = {id(p): name for name, p in nets.named_parameters()}
    return {
        names[id(p)]: moment / (1 - 0.9)
        for adam in vars(opt).values()
        for p, moment in zip(adam.params, adam.m)
    }


class Inject(TorchFunctionMode):
    """Random functions of torch return the queued tensors instead, in the order of the calls.

    `queues` maps the name of a function (randn_like, rand_like, randint, ...) to a list of arrays.
    A call whose queue is absent, empty or of another shape is an error, and so is a leftover."""

    RANDOM = {"randn_like", "rand_like", "randn", "rand", "randint", "normal_", "multinomial"}

    def __init__(self, **queues):
        super().__init__()
        self.queues = {name: list(queue) for name, queue in queues.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name not in self.RANDOM:
            return func(*args, **(kwargs or {}))
        assert self.queues.get(name), f"{name} was called, but nothing is queued for it"
        value = torch.as_tensor(self.queues[name].pop(0))
        if name.endswith("_like"):
            assert value.shape == args[0].shape, f"{name}: {value.shape}, not {args[0].shape}"
        if name == "normal_":
            assert value.shape == args[0].shape
            return args[0].copy_(value)
        return value

    def __exit__(self, *error):
        super().__exit__(*error)
        if error[0] is None:
            left = {name: len(queue) for name, queue in self.queues.items() if queue}
            assert not left, f"not drawn: {left}"


def summary(x) -> tuple[float, float]:
    """norm = sqrt(sum x^2) and proj = sum_i x_i cos(i), i over x in row-major order."""
    x = torch.as_tensor(x).detach().double().flatten().numpy()
    return float(np.sqrt(np.sum(x**2))), float(np.sum(x * np.cos(np.arange(x.size))))


def relative_difference(ours, recorded) -> float:
    """The larger of the differences of norm and proj, relative to norm; that of two numbers (or of
    the worst of a list) relative to the recorded one."""
    if isinstance(recorded, dict):
        norm, proj = summary(ours)
        size = max(abs(recorded["norm"]), 1e-300)
        return max(abs(norm - recorded["norm"]), abs(proj - recorded["proj"])) / size
    if isinstance(recorded, list):
        ours = torch.as_tensor(ours).detach().tolist()
        assert len(ours) == len(recorded)
        return max(map(relative_difference, ours, recorded), default=0.0)
    ours, recorded = float(ours), float(recorded)
    return abs(ours - recorded) / max(abs(recorded), 1e-300) if ours != recorded else 0.0
