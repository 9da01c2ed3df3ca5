"""The helpers that every algorithm file uses: the data on the device, batches, networks, Adam,
densities and CUDA graphs; at the foot, the types of flags and the flags of every run.

Nothing here belongs to a paper: there are no losses, no targets, no schedules and no
hyperparameters. This file imports nothing of the project.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tyro.constructors import PrimitiveConstructorSpec


class InputError(SystemExit):
    """Bad input: a message that names the cause and the fix. Uncaught, it is printed, and the
    process ends with status 1."""


def require(condition, message: str):
    """Raises InputError."""
    if not condition:
        raise InputError(message)


# ---- data on the device ----------------------------------------------------------------------


@dataclass
class Data:
    """N transitions of E episodes, all tensors on one device; an observation has S numbers, an
    action has A.

    The first five fields are enough: `Data(obs, action, reward, next_obs, terminal)` takes actions
    as they are, in [-1, 1], and starts a new episode at every row that does not continue the row
    before it."""

    obs: Tensor  # (N, S) float32
    action: Tensor  # (N, A) float32, the task's bounds mapped to [-1, 1]
    reward: Tensor  # (N,) float32, raw
    next_obs: Tensor  # (N, S) float32
    terminal: Tensor  # (N,) float32, 1 where the MDP ended (never at a time limit)
    episode: Tensor = None  # (N,) int64, 0..E-1, non-decreasing; rows of an episode in time order
    episode_return: Tensor = None  # (E,) float32, raw and undiscounted, of all rows on file
    action_low: Tensor = None  # (A,) the task's bounds, raw
    action_high: Tensor = None  # (A,)
    obs_mean: Tensor = None  # (S,) zeros; normalize_obs changes it
    obs_std: Tensor = None  # (S,) ones
    name: str = "data"
    digest: str = ""  # sha256 of the arrays up to action_high, 16 hex digits
    recording: Tensor = None  # (N,) int64 as episode, but a hole starts no new one; None: no holes
    columns: dict = None  # names of the numbers in observations and actions, where known

    def __post_init__(self):
        if self.episode is None:
            follows = (self.obs[1:] == self.next_obs[:-1]).all(1) & (self.terminal[:-1] == 0)
            self.episode = F.pad((~follows).long().cumsum(0), (1, 0))
        if self.episode_return is None:
            zeros = self.reward.new_zeros(int(self.episode[-1]) + 1)
            self.episode_return = zeros.index_add(0, self.episode, self.reward)
        if self.action_low is None:
            self.action_low = -torch.ones_like(self.action[0])
            self.action_high = torch.ones_like(self.action[0])
        if self.obs_mean is None:
            self.obs_mean = torch.zeros_like(self.obs[0])
            self.obs_std = torch.ones_like(self.obs[0])


def sample(data, batch_size: int, fields=("obs", "action", "reward", "next_obs", "terminal")):
    """A batch of B rows, drawn uniformly with replacement on the data's device: s (B, S), a (B, A),
    r (B,), s2 (B, S), terminal (B,), or only the `fields` that are named."""
    i = torch.randint(len(data.obs), (batch_size,), device=data.obs.device)
    return [getattr(data, field).index_select(0, i) for field in fields]


def normalize_obs(data, eps: float) -> None:
    """Shift and scale data.obs and data.next_obs in place to (s - mean) / (std + eps), by the mean
    and the population deviation of data.obs, computed in float64. `Scaling` applies the same
    constants when the policy acts."""
    data.obs_mean, data.obs_std = torch.zeros(2, *data.obs[0].shape, device=data.obs.device)
    for i, column in enumerate(data.obs.T):
        column = column.double()
        data.obs_mean[i], data.obs_std[i] = column.mean(), column.std(correction=0) + eps
    for x in (data.obs, data.next_obs):
        x.sub_(data.obs_mean).div_(data.obs_std)


def largest_value(data, gamma: float, bonus: float = 0.0) -> float:
    """The largest |Q| without penalties under the data's rewards (plus `bonus` per step):
    max |reward| / (1 - gamma)."""
    horizon = 1 / max(1 - gamma, 1e-9)
    return (data.reward.abs().max().item() + abs(bonus)) * horizon


class Scaling(nn.Module):
    """The maps between the task and the networks, saved with the weights: `obs` turns raw
    observations (B, S) into network inputs, and `action` turns the networks' actions (B, A), which
    lie in [-1, 1], into actions in the task's bounds."""

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


def gelu(x):
    """GELU with the approximation by tanh, the default of JAX's libraries. Compiled, it is written
    with a sigmoid, sigmoid(2 u) = (1 + tanh(u)) / 2, which takes a third of the time."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(x * (math.sqrt(8 / math.pi) * (1 + 0.044715 * x * x)))


def affine(x, w, b):
    """x @ w + b: x (B, in), w (in, out) and b (out,) give (B, out). For E networks, with w
    (E, in, out) and b (E, 1, out), x (B, in) or (E, B, in) gives (E, B, out)."""
    if torch.compiler.is_compiling():  # sums become a part of what follows, a product cannot
        return (x * w.mT).sum(-1, keepdim=True) + b if w.shape[-1] == 1 else x @ w + b
    if w.ndim == 3:
        return torch.baddbmm(b, x.expand(len(w), *x.shape[-2:]), w)
    return torch.addmm(b, x, w) if x.ndim == 2 else x @ w + b


ACTIVATIONS = {"relu": torch.relu_, "gelu": gelu, "silu": F.silu}


class MLP(nn.Module):
    """Fully connected layers of the widths `sizes`; inputs are concatenated on the last axis.
    (B, in) -> (B, out). Between two layers stands `activation` ("relu", "gelu" or "silu") and then,
    with `layer_norm`, a layer normalization of epsilon `norm_eps` (1e-6 in JAX's libraries). With
    `members` E, that many independent networks run as one batched product per layer: (B, in) or
    (E, B, in) -> (E, B, out); `member` runs one of them alone. Every layer is initialized as
    nn.Linear is."""

    def __init__(
        self,
        *sizes: int,
        members: int | None = None,
        activation: str = "relu",
        layer_norm: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.norm_eps = norm_eps
        lead, row = ((), ()) if members is None else ((members,), (1,))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.gains, self.shifts = nn.ParameterList(), nn.ParameterList()  # of the normalizations
        for n_in, n_out in zip(sizes[:-1], sizes[1:]):
            for params, shape in ((self.weights, (n_in,)), (self.biases, row)):
                w = torch.empty(*lead, *shape, n_out).uniform_(-1, 1) / math.sqrt(n_in)
                params.append(nn.Parameter(w))
        for width in sizes[1:-1] if layer_norm else ():
            self.gains.append(nn.Parameter(torch.ones(*lead, *row, width)))
            self.shifts.append(nn.Parameter(torch.zeros(*lead, *row, width)))
        self.activation = ACTIVATIONS[activation]
        self._apply(lambda x: x)  # sets self.layers and self.norms

    def _apply(self, fn, recurse=True):
        """.to() calls this, and may replace parameters, so the lists of layers are made again. They
        are plain lists because walking a ParameterList in every forward pass is slow."""
        super()._apply(fn, recurse)
        self.layers = list(zip(self.weights, self.biases))
        self.norms = list(zip(self.gains, self.shifts))
        return self

    def forward(self, *inputs, member: int | None = None):
        x = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
        last = len(self.layers) - 1
        for i, (w, b) in enumerate(self.layers):
            w, b = (w, b) if member is None else (w[member], b[member, 0])
            x = affine(x, w, b)
            if i < last:
                x = self.activation(x)
                if self.norms:
                    x = self.normalize(x, i, member)
        return x

    def normalize(self, x, i, member):
        """Layer normalization number i."""
        gain, shift = self.norms[i]
        gain, shift = (gain, shift) if member is None else (gain[member, 0], shift[member, 0])
        return F.layer_norm(x, x.shape[-1:], eps=self.norm_eps) * gain + shift

    def input_gradient(self, *inputs):
        """With members, ReLU and no layer norm: the gradient (E, B, in) of every member's output
        with respect to the concatenated inputs, differentiable in the weights. ReLU's masks are
        constants, so the chain rule can be written out. This gives the same numbers as a double
        backward, with two thirds of its matrix products."""
        x, masks = torch.cat(inputs, -1), []
        with torch.no_grad():
            for w, b in self.layers[:-1]:
                x = affine(x, w, b).relu_()
                masks.append(x)
        grad = self.layers[-1][0].mT.expand(*x.shape)
        for (w, _), mask in zip(reversed(self.layers[:-1]), reversed(masks)):
            grad = torch.ops.aten.threshold_backward(grad, mask, 0) @ w.mT
        return grad


class ScalarMLP(MLP):
    """An MLP with one output and no last axis: (B, in) -> (B,), with members (E, B)."""

    def __init__(self, *sizes: int, **options):
        super().__init__(*sizes, 1, **options)

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


@torch.no_grad()
def glorot_(net: MLP) -> MLP:
    """Glorot-uniform weights, each member on its own, and zero biases; returns the network."""
    for w in net.weights:
        for member in w.view(-1, *w.shape[-2:]):
            nn.init.xavier_uniform_(member)
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
        grads = [g.contiguous() for g in grads]  # the fused call ignores strides
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
    """One step on `loss` with respect to opt.params only; returns the loss, detached.

    `opt` is anything with `params`, `step(grads)` and `state()`. AdamW, for example, is

        class AdamW(Adam):
            def step(self, grads):
                torch._foreach_mul_([p.data for p in self.params], 1 - 0.01 * self.lr)
                super().step(grads)
    """
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
    clipped to +-(1 - clip) first, because x is infinite at a bound itself."""
    x = torch.atanh(a.clamp(-1 + clip, 1 - clip))
    return (normal_log_prob(x, mean, log_std) - tanh_log_det(x)).sum(-1)


def share_at_bounds(data, dequantize: float):
    """Share (0-d) of the data's action numbers that are within 1e-6 of a bound. A tanh-Gaussian can
    raise their log-density without limit, so a note is printed where the share is above 1% and
    `dequantize` is 0."""
    share = (data.action.abs() >= 1 - 1e-6).float().mean()
    if share > 0.01 and not dequantize:
        print(
            f"note: {share:.0%} of the action numbers are at their bounds, where log-densities "
            "have no limit: --dequantize 0.05 spreads them"
        )
    return share


def dequantize(a, width: float):
    """Actions (..., A) in which every number within 1e-6 of a bound is replaced by a uniform draw
    from the band of `width` inside that bound. A width of 0 changes nothing."""
    if width == 0:
        return a
    return torch.where(a.abs() >= 1 - 1e-6, a.sign() * (1 - width * torch.rand_like(a)), a)


def compiled(update, *inputs):
    """Return `step(*constants)`, which runs `update(*inputs, *constants)` compiled whole. The
    compiler takes everything in Python for a constant, and its checks that nothing has changed
    (guards) are left out: each value of `constants` has its own version, and all else must stay."""
    import torch._dynamo
    import torch._inductor

    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise InputError(f"--compile needs torch 2.13 or newer, this is {torch.__version__}")
    torch._dynamo.config.trace_autograd_ops = True  # allows autograd.grad in the update
    torch._inductor.config.fallback_random = True  # the same random stream as the plain call
    on_cpu = next(inputs[0].parameters()).device.type == "cpu"
    options = {"cpp_wrapper": on_cpu}  # kernels are called from C++: 5 to 10% faster
    options["pattern_matcher"] = not on_cpu  # it would put the sums of `affine` into products
    options["guard_filter_fn"] = lambda guards: [False] * len(guards)
    how = dict(fullgraph=True, dynamic=False, isolate_recompiles=True, options=options)
    versions = {}

    def step(*constants):
        if constants not in versions:
            versions[constants] = torch.compile(update, **how)
        return versions[constants](*inputs, *constants)

    return step


def graphed(update, *inputs, compile: bool = False):
    """Return `step(*constants)`, which runs `update(*inputs, *constants)`; the constants are Python
    values such as True. On a CPU this is the plain call. On a GPU the first three calls with the
    same constants are plain calls; then the whole update is captured as a CUDA graph, which every
    later call replays. `compile` compiles the update whole."""
    call = compiled(update, *inputs) if compile else partial(update, *inputs)
    if next(inputs[0].parameters()).device.type != "cuda":
        return call
    graphs, calls, side = {}, {}, torch.cuda.Stream()

    def step(*constants):
        calls[constants] = calls.get(constants, 0) + 1
        if calls[constants] <= 3:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                metrics = call(*constants)
            torch.cuda.current_stream().wait_stream(side)
            return metrics
        if constants not in graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                metrics = call(*constants)
            graphs[constants] = graph, metrics
        graph, metrics = graphs[constants]
        graph.replay()
        return metrics

    return step


# ---- flags -----------------------------------------------------------------------------------


def number(kind, low: float, high: float, text: str):
    """The type of a flag: a number from `low` to `high`, both included, which `text` describes.
    1e5 is a whole number, too."""

    def read(words):
        value = float(words[0])
        if not low <= value <= high or kind(value) != value:  # NaN is in no range
            raise ValueError(f"use {text}")
        return kind(value)

    fits = lambda x: type(x) in (int, kind)
    return Annotated[kind, PrimitiveConstructorSpec(1, text, read, fits, lambda x: [str(x)])]


# TINY is the smallest normal number of float64: smaller ones count as 0 (see run.py).
TINY, BELOW_1, HUGE = 2.3e-308, 1 - 2**-53, 1.7e308
Number = number(float, -HUGE, HUGE, "a finite number")
NonNegative = number(float, 0, HUGE, "a finite number of 0 or more")
Positive = number(float, TINY, HUGE, "a finite number above 0")
Share = number(float, 0, 1, "a number from 0 to 1")
PositiveShare = number(float, TINY, 1, "a number above 0 and at most 1")
ShareBelow1 = number(float, 0, BELOW_1, "a number of 0 or more and below 1")
InsideUnit = number(float, TINY, BELOW_1, "a number above 0 and below 1")
Count = number(int, 1, 10**12, "a whole number from 1 to 1e12")
CountOrZero = number(int, 0, 10**12, "a whole number from 0 to 1e12")
BatchSize = number(int, 1, 10**6, "a whole number from 1 to 1e6")
Episodes = number(int, 1, 10**4, "a whole number from 1 to 10,000")
Seed = number(int, 0, 2**31 - 1, "a whole number from 0 to 2147483647")


@dataclass
class RunArgs:
    """The flags that no paper sets; the `Args` of every algorithm file inherits them."""

    phases: ClassVar[dict[str, str | None]] = {"train": "steps"}
    """the phases of training, in order, each with the name of the field that holds its number of
    steps; None stands for one pass over the data"""
    clone_flags: ClassVar[tuple[str, ...]] = ()
    """the flags that train a clone, and so are refused beside --clone"""

    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one"""
    precision: Literal["highest", "high", "medium"] = "highest"
    """fp32 matrix products: highest is full fp32; high may round to TF32, medium to bf16"""
    compile: bool = False
    """compile the whole update, which takes half a minute and makes training faster"""
    short: bool = False
    """shortened settings for a CPU, where the file's PRESETS has some for the data"""
    eval_episodes: Episodes = 10
    """episodes per evaluation"""
    eval_env: str | None = None
    """task to evaluate in: Gymnasium id or module:Id-v0; none: no task; left out: the data's own"""
    log_every: Count = 1_000
    """gradient steps between rows of train.csv"""
    save_every: Count = 50_000
    """gradient steps between checkpoints; one comes before every evaluation, too"""
    out: str = "runs"
    """folder that holds the folders of all runs"""
    name: str = ""
    """part of the folder's name that tells variants of one algorithm apart"""
    resume: bool = False
    """continue the run from the last checkpoint in its folder"""
    overwrite: bool = False
    """replace the run's folder where it exists"""
    track: bool = False
    """mirror the logs to Weights & Biases"""

    def resolve(self):
        """Fill in the fields that are None and depend on others. Calling it twice changes nothing.
        Raises InputError for values that cannot work together."""
