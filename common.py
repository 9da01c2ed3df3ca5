"""The tiny helpers that every algorithm file shares: parsing with presets, rows on the device,
networks, Adam, densities, CUDA graphs, evaluation.

Nothing here belongs to a paper: no losses, no targets, no schedules, no hyperparameter defaults.
Arrows go one way: algorithms/* -> experiment.py -> common.py -> datasets.py.
"""

import ctypes
import dataclasses
import math
import re
import sys
from fnmatch import fnmatch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets import InputError, load_dataset  # noqa: F401 (algorithms import them from here)

# ---- command line ----------------------------------------------------------------------------


RANGES = {
    "gamma": (0, 1 - 1e-9, "a number from 0 to below 1"),
    "polyak": (1e-12, 1, "a number above 0, 1 at most"),
    "lr": (1e-12, 1e12, "a number above 0"),
}


def parse(Args, presets: dict, argv: list[str] | None = None):
    """Command line -> `Args`. Later matching rows of `presets` ({fnmatch pattern of --env: {field:
    value}}) replace the defaults; a flag that is typed always wins. Whole numbers may be typed as
    1e5. Raises InputError for values that cannot work."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    types = {f.name: f.type for f in dataclasses.fields(Args)}
    argv = [
        part for arg in argv for part in (arg.split("=", 1) if re.match(r"--\w", arg) else [arg])
    ]
    env = Args.env
    for i in range(len(argv) - 1):
        flag = argv[i].removeprefix("--").replace("-", "_")
        if flag == "env":
            env = argv[i + 1]
        if types.get(flag) is int and re.fullmatch(r"[\d.]+e\+?\d+", argv[i + 1], re.I):
            if float(argv[i + 1]).is_integer():  # tyro takes no 1e5 for an int
                argv[i + 1] = str(int(float(argv[i + 1])))
    preset = {}
    for pattern, fields in presets.items():
        if fnmatch(env, pattern):
            preset.update(fields)
    doc = sys.modules[Args.__module__].__doc__
    if preset:
        doc += f"\nDefaults below are those of --env {env} (PRESETS in the file)."
    args = tyro.cli(Args, default=Args(**preset), args=argv, description=doc)
    args.preset = preset
    for field in dataclasses.fields(Args):
        value, least = getattr(args, field.name), min(field.default, 1) if field.type is int else 0
        flag = field.name.replace("_", "-")
        if field.type is int and value < least:  # 0 where the default is 0, else 1
            raise InputError(f"--{flag} is {value}: give a whole number, {least} or above")
        name = "lr" if field.name.endswith("lr") else field.name
        low, high, right = RANGES.get(name, (-math.inf, math.inf, "a number"))
        if isinstance(value, float) and not low <= value <= high:  # nan is in no range
            raise InputError(f"--{flag} is {value}: give {right}")
    return args


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and CUDA) and numpy."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def choose_device(device: str, precision: str) -> torch.device:
    """Resolve "auto" to cuda where there is one, else cpu; choose how fp32 products are computed;
    set the CPU's floating-point mode and allocator for speed.

    Precision "auto" is oneDNN's route ("medium"; twice as fast on AMD CPUs) where its error on one
    product is that of fp32, and "highest" where the hardware would round (AMX, TF32)."""
    # Dead units' Adam moments decay into subnormals, with which a CPU is ten times as slow. Set
    # before the first parallel product: threads inherit it when they start.
    torch.set_flush_denormal(True)
    if precision not in ("auto", "highest", "high", "medium"):
        raise InputError(f"--precision is {precision!r}: give auto, highest, high or medium")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"--device {device}: {line}; give cpu, cuda or auto") from None
    if precision == "auto":
        torch.set_float32_matmul_precision("medium")
        a = torch.linspace(-1, 1, 256 * 256, device=device).sin().view(256, 256)
        exact = a.double() @ a.double()
        exact_enough = (a @ a - exact).abs().max() < 2e-6 * exact.abs().max()
        precision = "medium" if exact_enough else "highest"
    torch.set_float32_matmul_precision(precision)
    if sys.platform == "linux":  # glibc: keep freed megabyte buffers instead of faulting them anew
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-1, 1 << 30), libc.mallopt(-3, 1 << 25)  # M_TRIM_, M_MMAP_THRESHOLD
    return device


# ---- data on the device ----------------------------------------------------------------------


def sample(data, batch_size: int, fields=("obs", "action", "reward", "next_obs", "terminal")):
    """Rows drawn uniformly with replacement, on the data's device: s (B, S), a (B, A), r (B,),
    s2 (B, S), terminal (B,), or those `fields` alone."""
    i = torch.randint(len(data.obs), (batch_size,), device=data.obs.device)
    return [getattr(data, field).index_select(0, i) for field in fields]


def normalize_obs(data, eps: float) -> None:
    """Shift and scale data.obs and data.next_obs in place to (s - mean) / (std + eps), population
    statistics of data.obs; `Scaling` applies the same constants when the policy acts."""
    data.obs_mean = data.obs.mean(0)
    data.obs_std = data.obs.std(0, correction=0) + eps
    for x in (data.obs, data.next_obs):
        x.sub_(data.obs_mean).div_(data.obs_std)


class Scaling(nn.Module):
    """What stands between networks and task, saved with the weights: raw observations (B, S) to
    network inputs, and network actions in [-1, 1] (B, A) to the task's bounds."""

    def __init__(self, data):
        super().__init__()
        self.register_buffer("obs_mean", data.obs_mean.clone())
        self.register_buffer("obs_std", data.obs_std.clone())
        self.register_buffer("action_center", (data.action_high + data.action_low) / 2)
        self.register_buffer("action_half_range", (data.action_high - data.action_low) / 2)

    def obs(self, obs):
        return (obs - self.obs_mean) / self.obs_std

    def action(self, a):
        return self.action_center + self.action_half_range * a


# ---- networks and updates --------------------------------------------------------------------


class MLP(nn.Module):
    """Fully connected layers `sizes` with ReLU between them; inputs are concatenated on the last
    axis. (B, in) -> (B, out). With `members` E, that many independent networks run as one batched
    product per layer: (B, in) or (E, B, in) -> (E, B, out); `member` runs one of them alone.
    Initialized as nn.Linear is."""

    def __init__(self, *sizes: int, members: int | None = None):
        super().__init__()
        lead, row = ((), ()) if members is None else ((members,), (1,))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in zip(sizes[:-1], sizes[1:]):
            for params, shape in ((self.weights, (n_in,)), (self.biases, row)):
                w = torch.empty(*lead, *shape, n_out).uniform_(-1, 1) / math.sqrt(n_in)
                params.append(nn.Parameter(w))
        self._apply(lambda x: x)  # sets self.layers

    def _apply(self, fn, recurse=True):
        """What .to() calls. It may make new parameters, and walking a ParameterList is slow."""
        super()._apply(fn, recurse)
        self.layers = list(zip(self.weights, self.biases))
        return self

    def forward(self, *inputs, member: int | None = None):
        x = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
        last = len(self.layers) - 1
        for i, (w, b) in enumerate(self.layers):
            w, b = (w, b) if member is None else (w[member], b[member, 0])
            if w.ndim == 3:
                x = torch.baddbmm(b, x.expand(len(w), *x.shape[-2:]), w)
            else:
                x = torch.addmm(b, x, w) if x.ndim == 2 else x @ w + b
            x = x.relu_() if i < last else x
        return x

    def input_gradient(self, *inputs):
        """With members: gradient (E, B, in) of each one's output with respect to the concatenated
        inputs, differentiable in the weights. ReLU's masks are constants, so this is the chain
        rule written out: the numbers of a double backward at two thirds of its products."""
        x, masks = torch.cat(inputs, -1), []
        with torch.no_grad():
            for w, b in self.layers[:-1]:
                x = torch.baddbmm(b, x.expand(len(w), *x.shape[-2:]), w).relu_()
                masks.append(x)
        grad = self.layers[-1][0].mT.expand(*x.shape)
        for (w, _), mask in zip(reversed(self.layers[:-1]), reversed(masks)):
            grad = torch.ops.aten.threshold_backward(grad, mask, 0) @ w.mT
        return grad


class ScalarMLP(MLP):
    """An MLP with one output and no last axis: (B, in) -> (B,), with members (E, B)."""

    def __init__(self, *sizes: int, members: int | None = None):
        super().__init__(*sizes, 1, members=members)

    def forward(self, *inputs, member: int | None = None):
        return super().forward(*inputs, member=member).squeeze(-1)


@torch.no_grad()
def orthogonal_(net: MLP, hidden_gain: float, last_gain: float) -> MLP:
    """Orthogonal weights, each member on its own, and zero biases; returns the network."""
    for i, w in enumerate(net.weights):
        for member in w.view(-1, *w.shape[-2:]):
            nn.init.orthogonal_(member, last_gain if i == len(net.weights) - 1 else hidden_gain)
    for b in net.biases:
        b.zero_()
    return net


class Adam:
    """Adam (Kingma & Ba) as one fused call. Step count and learning rate are tensors, so that a
    schedule (`lr` changed in place) and the whole update survive compilation and CUDA graphs."""

    def __init__(self, params, lr: float, eps: float = 1e-8):
        self.params = list(params)
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        device = self.params[0].device
        self.count = torch.zeros((), device=device)
        self.lr = torch.tensor(lr, device=device)
        self.eps = eps

    @torch.no_grad()
    def step(self, grads):
        self.count += 1
        grads = [g.contiguous() for g in grads]  # the fused call reads memory, not strides
        if not torch.compiler.is_compiling():
            counts = [self.count] * len(self.params)
            torch._fused_adam_(
                self.params,
                grads,
                self.m,
                self.v,
                [],
                counts,
                lr=self.lr,
                beta1=0.9,
                beta2=0.999,
                weight_decay=0.0,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )
            return
        torch._foreach_lerp_(self.m, grads, 1 - 0.9)  # the fused call does not compile
        torch._foreach_mul_(self.v, 0.999)
        torch._foreach_addcmul_(self.v, grads, grads, 1 - 0.999)
        root = torch._foreach_sqrt(self.v)
        torch._foreach_div_(root, (1 - 0.999**self.count).sqrt())
        torch._foreach_add_(root, self.eps)
        delta = torch._foreach_div(self.m, root)
        torch._foreach_mul_(delta, -self.lr / (1 - 0.9**self.count))
        torch._foreach_add_(self.params, delta)

    def state(self) -> list:
        """Every tensor that a checkpoint must hold."""
        return [*self.m, *self.v, self.count, self.lr]


def minimize(opt: Adam, loss):
    """One step on `loss` with respect to opt.params only; returns the loss, detached."""
    opt.step(torch.autograd.grad(loss, opt.params))
    return loss.detach()


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, rate: float) -> None:
    """target <- rate * online + (1 - rate) * target, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def tanh_log_det(x):
    """log(1 - tanh(x)^2) elementwise, exact in both tails."""
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


def normal_log_prob(x, mean, log_std):
    """Elementwise log-density of N(mean, exp(log_std)^2) at x."""
    return -0.5 * ((x - mean) * torch.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)


def sample_tanh_normal(mean, log_std):
    """Reparameterized sample a = tanh(x), x ~ N(mean, exp(log_std)^2), all (..., A). Returns a, its
    log-density (...,) computed from x (finite where tanh rounds to 1), and x."""
    noise = torch.randn_like(mean)
    x = mean + torch.exp(log_std) * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - tanh_log_det(x)
    return torch.tanh(x), log_prob.sum(-1), x


def tanh_normal_log_prob(a, mean, log_std, clip: float):
    """Log-density (...,) of tanh(x), x ~ N(mean, exp(log_std)^2), at actions a (..., A), which are
    clipped to +-(1 - clip) first: at a bound itself it has no limit."""
    x = torch.atanh(a.clamp(-1 + clip, 1 - clip))
    return (normal_log_prob(x, mean, log_std) - tanh_log_det(x)).sum(-1)


def share_at_bounds(data, dequantize: float):
    """Share (0-d) of the data's action numbers within 1e-6 of a bound, where the log-density of a
    tanh-Gaussian has no limit; above 1% a note says so, unless they are spread."""
    share = (data.action.abs() >= 1 - 1e-6).float().mean()
    if share > 0.01 and not dequantize:
        print(
            f"note: {share:.0%} of the action numbers are at their bounds, where log-densities "
            "have no limit: --dequantize 0.05 spreads them"
        )
    return share


def dequantize(a, width: float):
    """Actions (..., A); those at a bound (within 1e-6) are spread evenly over the band of `width`
    inside it. Width 0 returns all as they are."""
    if width == 0:
        return a
    return torch.where(a.abs() >= 1 - 1e-6, a.sign() * (1 - width * torch.rand_like(a)), a)


def graphed(update, *inputs, compile: bool = False):
    """`update(*inputs, *constants)` as a function of its Python constants alone. On a GPU the whole
    update becomes one CUDA graph per set of constants, after three plain calls (which count as
    updates); on a CPU it is the plain call. `compile` compiles the update whole."""
    if compile:
        import torch._dynamo
        import torch._inductor

        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            raise InputError(f"--compile needs torch 2.13 or newer, this is {torch.__version__}")
        torch._dynamo.config.trace_autograd_ops = True  # takes autograd.grad inside the update
        torch._inductor.config.fallback_random = True  # the same random stream as the plain call
        update = torch.compile(update, fullgraph=True, dynamic=False)
    if next(inputs[0].parameters()).device.type != "cuda":
        return lambda *constants: update(*inputs, *constants)
    graphs, calls, side = {}, {}, torch.cuda.Stream()

    def step(*constants):
        calls[constants] = calls.get(constants, 0) + 1
        if calls[constants] <= 3:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                metrics = update(*inputs, *constants)
            torch.cuda.current_stream().wait_stream(side)
            return metrics
        if constants not in graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                metrics = update(*inputs, *constants)
            graphs[constants] = graph, metrics
        graph, metrics = graphs[constants]
        graph.replay()
        return metrics

    return step


# ---- evaluation ------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(act, envs: list, seed: int, device) -> np.ndarray:
    """Undiscounted returns (n,) of one episode in each of n environments, stepped side by side.

    `act` maps raw observations (n, S) to actions (n, A) in the task's bounds. Environment i is
    reset with seed + i; the training random stream is left as it was."""
    returns, running = np.zeros(len(envs)), np.ones(len(envs), bool)
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while running.any():
            actions = act(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()
            for i in np.flatnonzero(running):
                obs[i], reward, terminal, timeout, _ = envs[i].step(actions[i])
                returns[i] += reward
                running[i] = not (terminal or timeout)
    return returns
