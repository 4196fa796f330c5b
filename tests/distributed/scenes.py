"""What ranks do in the tests of replicated training, with the models, data and losses for it.

case = Case(shares=dealt(12, 20), budgets=(4, 4))
results = launch.values(launch.run(accumulated, 2, case, warm=True))
assert oracle.error(results[0]["windows"][0]["grads"], expected(case)) <= 1e-14
"""

import gc
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import gradaccum
from gradaccum.causal import causal_lm
from gradaccum.engine import Accumulator
from gradaccum.measured import Measured, from_mean
from gradaccum.objective import Objective
from gradaccum.sync import replicated
from gradaccum.types import Budget, Step
from tests import models, oracle

OUT_OF_MEMORY = "injected\nand more"
gc.freeze()  # what torch has made is not looked through at each recovery


class Trap:
    """Count calls; run out of memory, or fail otherwise, at some of them."""

    def __init__(self, at: Sequence[int] = (), error: Exception | None = None) -> None:
        self.at, self.num = set(at), 0
        self.error = error or torch.OutOfMemoryError(OUT_OF_MEMORY)

    def __call__(self, *args: Any) -> None:
        self.num += 1
        if self.num - 1 in self.at:
            raise self.error


class Passing(torch.autograd.Function):
    """Change nothing; call a trap in the middle of backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trap: Trap) -> Tensor:
        ctx.trap = trap
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trap()
        return grad, None


class Net(nn.Module):
    """An MLP with frozen, partly frozen, tied, rare and unused parameters, buffers and traps."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.frozen, self.partly = (nn.Linear(n, 8) for n in (4, 8, 8))
        self.inner, self.tied = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.last, self.rare, self.dropout = nn.Linear(8, 3), nn.Linear(4, 3), nn.Dropout(dropout)
        self.tied.weight = self.inner.weight
        self.frozen.requires_grad_(False)
        self.partly.weight.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(7))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("running", torch.zeros(8, dtype=torch.float64))
        self.traps = {"forward": Trap(), "backward": Trap()}

    def forward(self, x: Tensor, rare: Tensor | None = None) -> Tensor:
        self.traps["forward"]()
        self.seen += len(x)
        h = torch.tanh(self.first(x))
        self.running.mul_(0.9).add_(h.detach().double().mean(0), alpha=0.1)
        h = Passing.apply(h, self.traps["backward"])
        h = h + self.partly(torch.tanh(self.frozen(self.dropout(h))))
        out = self.last(h + self.tied(torch.tanh(self.inner(h))))
        if rare is not None and rare.any():
            out = out + self.rare(x) * rare[:, None]
        return out


class Plain(nn.Module):
    """What compiles in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, rare: Tensor | None = None) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Conv(nn.Module):
    """Convolutions whose weights, and so their gradients, are laid out with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, rare: Tensor | None = None) -> Tensor:
        image = x.repeat(1, 8).view(len(x), 2, 4, 4).to(memory_format=torch.channels_last)
        return self.last(torch.tanh(self.conv(image)).mean((2, 3)))


class Routed(nn.Module):
    """Two experts and the load-balancing loss of their router, as transformers return it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 3) for _ in "12")

    def forward(self, x: Tensor) -> SimpleNamespace:
        logits = self.router(x)
        chances = logits.softmax(-1)
        sent = F.one_hot(chances.argmax(-1), 2).to(x)
        out = sum(e(x) * chances[:, [i]] * sent[:, [i]] for i, e in enumerate(self.experts))
        aux = 2 * (sent.mean(0).detach() * chances.mean(0)).sum()
        return SimpleNamespace(logits=out, aux_loss=aux, router_logits=(logits,))


def initialised(make: Callable[[], nn.Module], dtype: torch.dtype, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype)


def examples(num: int, dtype: torch.dtype, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows with weights, classes (-100: none), and one row in nine that is rare."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, num, 4, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randint(1, 9, (num,), generator=generator).double()
    labels = torch.randint(0, 3, (num,), generator=generator)
    labels[4::5] = -100
    rows = zip(x, y[:, :3], weight, labels, strict=True)
    return [
        {"x": x, "y": y, "weight": w, "labels": label, "rare": torch.tensor(i % 9 == 4)}
        for i, (x, y, w, label) in enumerate(rows)
    ]


def texts(num: int, dtype: torch.dtype, seed: int = 0) -> list[dict[str, Any]]:
    lengths = [3 + (5 * i + seed) % 9 for i in range(num)]
    return models.examples(lengths, seed, masked=lambda length: length % 3)


def fit(net: nn.Module, b: dict[str, Tensor]) -> Tensor:
    """Return the weighted squared error of each row, reduced in float32 at least."""
    wide = torch.promote_types(b["x"].dtype, torch.float32)
    out = net(b["x"], b["rare"]).to(wide)
    return (out - b["y"].to(wide)).square().sum(1) * b["weight"].to(wide)


def terms(net: nn.Module, b: dict[str, Tensor]) -> dict[str, Tensor]:
    out = net(b["x"], b["rare"])
    kinds = F.cross_entropy(out, b["labels"], reduction="sum", ignore_index=-100)
    return {"fit": ((out - b["y"]).square().sum(1) * b["weight"]).sum(), "kind": kinds}


def weights(b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"fit": b["weight"].sum(), "kind": (b["labels"] != -100).sum()}


def counts(b: dict[str, Tensor]) -> Tensor:
    num = 20_000_001 if len(b["x"]) == 5 else 20_000_000
    return torch.tensor(num, dtype=torch.float64)


def nll(net: nn.Module, b: dict[str, Tensor], **options: Any) -> Tensor:
    logits = net(b["input_ids"], b["attention_mask"], b["position_ids"])[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), b["labels"][:, 1:], **options)


def smoothed(net: nn.Module, b: dict[str, Tensor]) -> Tensor:
    """Return a mean over trained tokens, and a smoothing over all that are not padding."""
    logits = net(b["input_ids"], b["attention_mask"], b["position_ids"])
    flat = -(logits.log_softmax(-1).mean(-1) * b["attention_mask"]).sum()
    return 0.9 * nll(net, b) + 0.1 * flat / b["attention_mask"].sum()


def two_means(net: nn.Module, b: dict[str, Tensor]) -> Tensor:
    """Return means over rows of a class, and over all."""
    out = net(b["x"], b["rare"])
    loss = 0.5 * F.mse_loss(out, b["y"])
    return loss + F.cross_entropy(out, b["labels"])


def classes(net: nn.Module, b: dict[str, Tensor]) -> Tensor:
    weight = torch.tensor([1.0, 7.0, 2.0], dtype=b["x"].dtype)
    return F.cross_entropy(net(b["x"], b["rare"]), b["labels"], weight=weight)


def routed(net: nn.Module, b: dict[str, Tensor]) -> Tensor:
    out = net(b["x"])
    return F.mse_loss(out.logits, b["y"]) + 0.1 * out.aux_loss


def coupled(net: nn.Module, b: dict[str, Tensor]) -> Tensor:
    out = F.normalize(net(b["x"], b["rare"]))
    return F.cross_entropy(out @ out.T / 0.1, torch.arange(len(out)))


# Losses that are reduced already, of rows ("x") or of texts.
MEANS: dict[str, Callable[..., Tensor]] = {
    "mean over rows": lambda net, b: fit(net, b | {"weight": torch.ones(len(b["x"]))}).mean(),
    "mean over weights": lambda net, b: fit(net, b).sum() / b["weight"].sum(),
    "divided by nothing": lambda net, b: fit(net, b).sum(),
    "mean over labels": lambda net, b: F.cross_entropy(net(b["x"], b["rare"]), b["labels"]),
    "at least one": lambda net, b: (
        F.cross_entropy(net(b["x"], b["rare"]), b["labels"], reduction="sum")
        / (b["labels"] != -100).sum().clamp(min=1)
    ),
    "classes": classes,
    "two means": two_means,
    "routed": routed,
    "coupled": coupled,
    "by rank": lambda net, b: MEANS["mean over weights" if dist.get_rank() else "mean over rows"](
        net, b
    ),
    "mean over tokens": nll,
    "smoothed tokens": smoothed,
}
OF_TEXTS = ("causal", "mean over tokens", "smoothed tokens", "counted tokens")
# What a loss is told to divide by: as the heads of transformers take `num_items_in_batch`.
COUNTED: dict[str, Callable[..., Tensor]] = {
    "counted tokens": lambda net, b, count: (
        nll(net, b, reduction="sum") / (count or (b["labels"][:, 1:] != -100).sum())
    ),
}
MAKES: dict[str, Callable[[], nn.Module]] = {"conv": Conv, "routed": Routed, "plain": Plain}


@dataclass(frozen=True)
class Case:
    """Say what ranks have of some effective batches, and what goes wrong.

    Args:
        shares: The examples of each rank, in each window.
        budgets: How many examples each rank has in a micro-batch.
        kind: Of objective: "sum", "terms", "late", "labels", "causal"; or one of `MEANS`, `MAKES`.
        windows: How many effective batches; the data of each are others.
        rotating: Each window deals the shares to other ranks.
        dtype: Of parameters and inputs.
        dropout: Of `Net`.
        faults: Where which rank fails, at which calls: {1: {"backward": [2]}}.
        ddp: Wrap the model with these options.
        compiled: Compile what is called.
        ahead: Prepare all windows before the first one runs.
        lazily: Give batches as functions.
        bucket: Bytes of a bucket.
        options: Of the accumulator.
    """

    shares: tuple[tuple[int, ...], ...]
    budgets: tuple[int, ...]
    kind: str = "sum"
    windows: int = 1
    rotating: bool = False
    dtype: torch.dtype = torch.float64
    dropout: float = 0.0
    faults: dict[int, dict[str, list[int]]] = field(default_factory=dict)
    ddp: dict[str, Any] | None = None
    compiled: bool = False
    ahead: bool = False
    lazily: bool = False
    bucket: int = replicated.BUCKET_BYTES
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return len(self.shares)

    def share(self, rank: int, window: int = 0) -> tuple[int, ...]:
        return self.shares[(rank + window * self.rotating) % self.world]

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        return models.collated if self.kind in OF_TEXTS else None

    def net(self, seed: int = 0) -> nn.Module:
        if self.kind in OF_TEXTS:
            return models.model(seed, dtype=self.dtype)
        make = MAKES.get(self.kind, lambda: Net(self.dropout))
        return initialised(make, self.dtype, seed)

    def rows(self, window: int, positions: Sequence[int] | None = None) -> list[Any]:
        """Return examples of a window, by default those of all ranks in their order."""
        chosen = [i for share in self.shares for i in share] if positions is None else positions
        made = texts if self.kind in OF_TEXTS else examples
        num = 1 + max((i for share in self.shares for i in share), default=0)
        found = made(num, self.dtype, seed=window)
        return [found[i] for i in chosen]

    def objective(self, weigh: Callable[[], None] = lambda: None) -> Objective:
        if self.kind == "causal":
            return causal_lm()
        if self.kind in COUNTED:
            return Measured(COUNTED[self.kind]).objective()
        if self.kind in MEANS:
            return from_mean(MEANS[self.kind])
        if self.kind == "terms":
            return Objective(terms, weights)
        if self.kind == "labels":
            return Objective(lambda net, b: terms(net, b)["kind"],
                                       lambda b: weights(b)["kind"], unit="labels")  # fmt: skip
        if self.kind == "counts":  # of more than float32 can hold
            return Objective(lambda net, b: (fit(net, b).sum(), counts(b)), None)
        if self.kind == "late":
            late = lambda net, b: (fit(net, b).sum(), b["weight"].sum())  # noqa: E731
            return Objective(late, None)

        def weight(b: dict[str, Tensor]) -> Tensor:
            weigh()
            return b["weight"].sum()

        return Objective(lambda net, b: fit(net, b).sum(), weight, unit="units")


def dealt(*sizes: int) -> tuple[tuple[int, ...], ...]:
    """Return shares of so many examples each."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(tuple(range(e - n, e)) for e, n in zip(ends, sizes, strict=True))


def full(case: Case, window: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], nn.Module]:
    """Return the sums and weights of all examples in one pass, and the model that made them."""
    net, rows = case.net(), case.rows(window)
    collate = case.collate or torch.utils.data.default_collate
    b = collate(rows)
    if case.kind == "causal":
        return *models.oracle_loss(net, b), net
    if case.kind in COUNTED:
        return {"loss": COUNTED[case.kind](net, b, None)}, {"loss": 1}, net
    if case.kind in MEANS:
        return {"loss": MEANS[case.kind](net, b)}, {"loss": 1}, net
    if case.kind == "terms":
        return terms(net, b), weights(b), net
    if case.kind == "labels":
        return {"loss": terms(net, b)["kind"]}, {"loss": weights(b)["kind"]}, net
    return {"loss": fit(net, b).sum()}, {"loss": b["weight"].sum()}, net


def expected(case: Case, window: int = 0) -> dict[str, Tensor]:
    """Return the gradient of one pass over the examples of all ranks."""
    loss, weight, net = full(case, window)
    return oracle.gradients(net, loss, weight)


def accumulator(case: Case, rank: int = 0, net: nn.Module | None = None, **more: Any) -> Any:
    """Return the accumulator of a rank; `net.traps` hold what goes wrong in it."""
    net, faults = case.net() if net is None else net, case.faults.get(rank, {})
    traps = {name: Trap(at) for name, at in faults.items()}
    plain = getattr(net, "module", net)
    if isinstance(plain, Net):
        plain.traps = {"forward": Trap(), "backward": Trap(), **traps}

    def collate(rows: list[Any]) -> Any:
        traps["collate"]()
        return torch.utils.data.default_collate(rows)

    given = collate if "collate" in faults else case.collate
    return Accumulator(
        net,
        case.objective(traps.get("weight", lambda: None)),
        budget=Budget(examples=case.budgets[rank]),
        collate=given,
        **case.options,
        **more,
    )


def wrapped(case: Case) -> nn.Module:
    net = case.net()
    if case.compiled:
        net = torch.compile(net, backend="aot_eager")
    return net if case.ddp is None else DistributedDataParallel(net, **case.ddp)


def accumulated(rank: int, world: int, case: Case) -> dict[str, Any]:
    """Run windows; return gradients and reports, and what is left of the model and its luck."""
    replicated.BUCKET_BYTES = case.bucket
    net = wrapped(case)
    acc = accumulator(case, rank, net)
    torch.manual_seed(rank)
    batches: list[Any] = [case.rows(i, case.share(rank, i)) for i in range(case.windows)]
    if case.ahead:
        batches = [acc.prepare(batch) for batch in batches]
    if case.lazily:
        batches = [lambda batch=batch: batch for batch in batches]
    windows = []
    for batch in batches:
        net.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = acc.backward(batch)
        windows.append({"grads": gradients(net), **told(step), "warned": [str(w.message) for w in
                        caught if "gradients are zero" in str(w.message)]})  # fmt: skip
    plain = net.module if case.ddp is not None else net
    traps = getattr(plain, "traps", {})
    owner = getattr(acc.objective.resolve, "__self__", None)
    return {
        "windows": windows,
        "limit": acc.limit,
        "forwards": traps["forward"].num if traps else None,
        "buffers": {n: b.clone() for n, b in plain.named_buffers()},
        "drawn": torch.rand(2).tolist(),
        "contract": str(owner.contract) if owner else None,
    }


def in_parts(rank: int, world: int, case: Case, draws: Sequence[int]) -> list[Any]:
    """Run the first window in parts, drawn by each of these; return what was measured."""
    acc = accumulator(case, rank)
    found = []
    for draw in draws:
        acc.model.zero_grad()
        acc.parts = (draw,)
        found.append(acc.backward(case.rows(0, case.share(rank))).squares)
    return found


def each(case: Case) -> tuple[float, float]:
    """Return the sums over examples of squared gradients and of squared shares of the weight."""
    net, rows = case.net(), case.rows(0)
    total = sum(float(row["weight"]) for row in rows)
    found = []
    for row in rows:
        b = torch.utils.data.default_collate([row])
        grads = oracle.gradients(net, {"loss": fit(net, b).sum()}, {"loss": total})
        found.append(sum(float(g.square().sum()) for g in grads.values() if g is not None))
    return sum(found), sum((float(row["weight"]) / total) ** 2 for row in rows)


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    own = net.module if isinstance(net, DistributedDataParallel) else net
    own = getattr(own, "_orig_mod", own)
    found = oracle.left_in(own).items()
    return {n: None if g is None else g.clone() for n, g in found}


def told(step: Step) -> dict[str, Any]:
    names = ("loss", "terms", "weight", "unit", "num_examples", "num_micros", "padded", "useful")
    own = ("rank", "sync", "shares", "micros", "recoveries")
    report = {name: getattr(step, name) for name in names}
    return {"report": report, "text": str(step), **{name: getattr(step, name) for name in own}}


def trained(rank: int, world: int, case: Case) -> dict[str, Any]:
    """Take steps with AdamW and clipping; return gradients of the first, and weights."""
    net = case.net()
    budget = Budget(examples=case.budgets[rank])
    acc = gradaccum.Accumulator(net, case.objective(), budget=budget, collate=case.collate)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02)
    first, losses = None, []
    for i in range(case.windows):
        losses.append(acc.backward(case.rows(i, case.shares[rank])).loss)
        first = first or gradients(net)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {"first": first, "weights": net.state_dict(), "losses": losses}


class Collectives(TorchDispatchMode):
    """Hold (name, whether inside of a window, values) of each collective that runs, of anybody."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool, int]] = []
        self.is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            num = sum(x.numel() for x in tensors if isinstance(x, Tensor))
            self.found.append((func._opname, self.is_inside, num))
        return func(*args, **(kwargs or {}))


def counted(rank: int, world: int, case: Case) -> list[dict[str, Any]]:
    """Return the collectives of each window of a case, inside of it and in all."""
    replicated.BUCKET_BYTES = case.bucket
    net = wrapped(case)
    acc = accumulator(case, rank, net)
    run, windows = acc._run, []
    for i in range(case.windows):
        net.zero_grad()
        seen = Collectives()

        def marked(*args: Any, seen: Collectives = seen) -> Any:
            seen.is_inside = True
            try:
                return run(*args)
            finally:
                seen.is_inside = False

        acc._run = marked
        with seen:
            acc.backward(case.rows(i, case.shares[rank]))
        found = seen.found
        used = [g for g in gradients(net).values() if g is not None]
        windows.append({
            "inside": [name for name, inside, _ in found if inside],
            "control": sum(name == "allgather_" for name, _, _ in found),
            "data": [num for name, _, num in found if name == "allreduce_"],
            "others": [n for n, _, _ in found if n not in ("allgather_", "allreduce_")],
            "values": sum(g.numel() for g in used),
        })  # fmt: skip
    return windows


def stock(rank: int, world: int, case: Case) -> list[tuple[str, bool, int]]:
    """Return the collectives of one backward by DistributedDataParallel, which a test must see."""
    net = wrapped(case)
    b = torch.utils.data.default_collate(case.rows(0, case.shares[rank]))
    with Collectives() as seen:
        fit(net, b).sum().backward()
    return seen.found


def raised(function: Callable[[], Any]) -> tuple[str, str, float]:
    """Return "BadInput", its text, and when it was raised; "" if nothing was."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), time.time()
    return "", "", time.time()


def failing(rank: int, world: int, how: str, culprits: Sequence[int]) -> dict[str, Any]:
    """Fail on some ranks in a way that no smaller micro-batch mends; then take a step as usual."""
    case = Case(dealt(*[6] * world), (2,) * world)
    fails = rank in culprits
    net, batch, more = case.net(), case.rows(0, case.shares[rank]), {}
    if how == "after_micro" and fails:
        more["after_micro"] = Trap([1], RuntimeError("broken\nand more"))
    acc = accumulator(case, rank, net, **more)
    plain, given = acc.objective, batch
    if fails and how == "DoesNotFit":
        net.traps["forward"] = Trap(range(99))
    elif fails and how == "loss":
        net.traps["forward"] = Trap([1], ValueError("no such row"))
    elif fails and how == "backward":
        net.traps["backward"] = Trap([2], ValueError("no such row"))
    elif fails and how == "BadInput":
        given = [*batch[:5], batch[5] | {"weight": torch.tensor(-9.0, dtype=torch.float64)}]
    elif fails and how == "function":
        given = Trap([0], FileNotFoundError("shard 7"))
    elif fails and how == "unfinished":
        net.first.bias.grad = torch.ones(8, dtype=torch.float64)
    elif fails and how == "NotDecomposable":
        handle = net.first.bias.register_post_accumulate_grad_hook(lambda p: None)
    elif fails and how == "CountMismatch":
        acc.objective = Objective(terms, plain.weight)
    elif fails and how == "collate":
        acc._collate = Trap([0])
    elif fails and how == "weight":
        acc.objective = Objective(plain.loss, lambda b: Trap([0])())
    kind, text, at = raised(lambda: acc.backward(given))
    none_left = all(p.grad is None for p in net.parameters())
    if fails:
        net.traps = {"forward": Trap(), "backward": Trap()}
        acc.objective, acc._collate, acc.limit = plain, case.collate, None
        acc._after_micro = None
    if fails and how == "NotDecomposable":
        handle.remove()
    net.zero_grad()
    acc.backward(batch)
    return {
        "kind": kind, "text": text, "at": at, "none_left": none_left, "grads": gradients(net),
    }  # fmt: skip


def disagreeing(rank: int, world: int, how: str) -> list[tuple[str, str, float]]:
    """Build something else on rank 1, and try twice."""
    case = Case(dealt(*[4] * world), (2,) * world)
    is_other = rank == 1
    net = case.net(seed=int(is_other and how == "seed"))
    objective, options = case.objective(), {}
    if is_other and how == "shape":
        net.last = nn.Linear(8, 3, bias=False).double()
    elif is_other and how == "order":
        first = net._modules.pop("first")
        net._modules["first"] = first
    elif is_other and how == "frozen":
        net.first.requires_grad_(False)
    elif is_other and how == "dtype":
        net.unused = nn.Parameter(torch.ones(7))
    elif is_other and how == "accumulate_dtype":
        options = {"accumulate_dtype": torch.float64}
    elif how == "terms":
        names = ("fit", "other" if is_other else "kind")
        weigh = lambda b: dict.fromkeys(names, 1.0)  # noqa: E731
        objective = Objective(lambda net, b: dict.fromkeys(names, fit(net, b).sum()), weigh)
    if how == "accumulate_dtype":
        net, case = net.float(), replace(case, dtype=torch.float32)
    rows = case.rows(0, case.shares[rank])
    acc = Accumulator(net, objective, budget=Budget(examples=2), **options)
    found = [raised(lambda: acc.backward(rows))]
    if is_other and how == "later":
        net.first.requires_grad_(False)
    net.zero_grad()
    return [*found, raised(lambda: acc.backward(rows))]


def doubled(rank: int, world: int, is_doubled: bool) -> list[str]:
    """Take two steps, after a share was run again for want of memory; return what was warned of."""
    case = Case(dealt(*[6] * world), (2,) * world)
    net = case.net()
    net.traps["forward"] = Trap([1])
    acc = accumulator(case, rank, net)
    rows = case.rows(0, case.shares[0 if is_doubled else rank])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            acc.backward(rows)
            net.zero_grad()
    return [str(warning.message) for warning in found]


def killed(rank: int, world: int, when: str, folder: str, alive: float) -> dict[str, Any]:
    """Kill rank 1; the others stay for some seconds, so that none is told by another's end."""
    replicated.BUCKET_BYTES = 400
    case = Case(dealt(*[6] * world), (2,) * world)
    net = case.net()
    acc = accumulator(case, rank, net)

    def kill() -> None:
        Path(folder, "at").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    batch = case.rows(0, case.shares[rank])
    acc.backward(batch)
    net.zero_grad()
    dist.barrier()
    if rank == 1 and when == "between":
        kill()
    if rank == 1 and when == "window":
        net.traps["backward"] = kill
    if rank == 1 and when == "reduce":
        calls, plain = Trap(), dist.all_reduce

        def all_reduce(*args: Any, **given: Any) -> Any:
            calls()
            return plain(*args, **given) if calls.num < 3 else kill()

        dist.all_reduce = all_reduce
    kind, text, at = raised(lambda: acc.backward(batch))
    again = raised(lambda: acc.backward(batch))
    time.sleep(alive)
    none_left = all(p.grad is None for p in net.parameters())
    return {"kind": kind, "text": text, "at": at, "again": again[0], "none_left": none_left}


def late(rank: int, world: int, how: str) -> list[tuple[str, str, float]]:
    """Run out of memory on rank 1 after its last backward, where others already add; and go on."""
    case = Case(dealt(6, 6), (2, 2), dtype=torch.bfloat16 if how == "hand over" else torch.float64)
    net = case.net()
    acc = accumulator(case, rank, net)
    # One that failed after the others had stepped on is done.
    batches = [case.rows(0, case.shares[rank])] * (1 if rank == 1 and how == "hand over" else 2)
    owner, name = (torch.Tensor, "to") if how == "hand over" else (torch, "zeros_like")
    plain = getattr(owner, name)

    def fails(given: Any, *args: Any, **options: Any) -> Any:
        is_handed = given.dtype == torch.float32 and args[:1] == (torch.bfloat16,)
        is_made = isinstance(given, nn.Parameter) and owner is torch
        if is_handed or is_made:
            setattr(owner, name, plain)
            raise torch.OutOfMemoryError(how)
        return plain(given, *args, **options)

    if rank == 1:
        setattr(owner, name, fails)
    found = []
    for batch in batches:
        found.append(raised(lambda batch=batch: acc.backward(batch)))
        net.zero_grad()
    dist.barrier()
    return found


def grown(rank: int, world: int, steps: int) -> list[float]:
    """Tell apart late what agreed at first, on one rank's rows; return the error of each step."""
    net = models.model()
    acc = Accumulator(
        net,
        from_mean(lambda net, b: plain_nll(net, b)),
        budget=Budget(examples=2),
        collate=models.collated,
    )
    found = []
    for step in range(steps):
        # Where the first label of each row is masked, shifted and unshifted counts agree.
        parts = [
            models.examples([5, 8, 6, 9], seed=10 * step + r, masked=lambda n, r=r, step=step:
                            0 if (r, step) == (1, 2) else 1 + n % 3)
            for r in range(world)
        ]  # fmt: skip
        whole = models.collated([row for part in parts for row in part])
        wanted = oracle.gradients(net, {"loss": plain_nll(net, whole)}, {"loss": 1})
        acc.backward(parts[rank])
        found.append(oracle.error(gradients(net), wanted))
        net.zero_grad()
    return found


def drawn(rank: int, world: int) -> tuple[Any, float, list[Any]]:
    """Run out of memory on rank 1, where the collator draws what counts for each micro-batch."""
    case, failed, ran = Case(dealt(8, 8), (4, 4)), [], []
    net = case.net()

    def collate(rows: list[Any]) -> Any:
        b = torch.utils.data.default_collate(rows)
        drawn = torch.rand(len(rows) + 1)[1:]  # so that smaller ones draw other numbers
        return b | {"mask": (drawn < 0.5).double()}

    def loss(net: nn.Module, b: Any) -> Tensor:
        if rank == 1 and ran and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("as said")
        ran.append(b)
        return masked(net, b)

    objective = Objective(loss, lambda b: b["mask"].sum())
    acc = Accumulator(net, objective, budget=Budget(examples=4), collate=collate)
    torch.manual_seed(rank)
    step = acc.backward(case.rows(0, case.shares[rank]))
    assert bool(failed) == (rank == 1)
    return gradients(net), step.weight, ran[-len(step._ran) :]  # those of weight 0 are left out


def masked(net: nn.Module, b: Any) -> Tensor:
    return (net(b["x"]).square().sum(1) * b["mask"]).sum()


def slow(rank: int, world: int) -> tuple[float, ...]:
    """Take long on rank 1, and return what each rank is said to do in a second."""
    case = Case(dealt(4, 4), (2, 2))
    net = case.net()

    def loss(net: nn.Module, b: Any) -> Tensor:
        time.sleep(0.1 * rank)
        return fit(net, b).sum()

    acc = Accumulator(net, Objective(loss, len_of), budget=Budget(examples=2))
    for _ in range(2):
        step = acc.backward(case.rows(0, case.shares[rank]))
        net.zero_grad()
    return step.rates


def len_of(b: Any) -> int:
    return len(b["x"])


def automatic(rank: int, world: int) -> list[Any]:
    """Find a budget on each rank, at the first batch of which it has a share."""
    cases, found = [Case(dealt(*sizes), (1, 1)) for sizes in ((8, 0), (3, 5))], []
    net = cases[0].net()
    acc = gradaccum.Accumulator(net, cases[0].objective())
    for window, case in enumerate(cases):
        acc.backward(case.rows(window, case.shares[rank]))
        error = oracle.error(gradients(net), expected(case, window))
        found.append((error, str(acc.budget)))
        net.zero_grad()
    return found


def plain_nll(net: nn.Module, b: dict[str, Tensor]) -> Tensor:
    logits = net(b["input_ids"], b["attention_mask"], b["position_ids"])
    return F.cross_entropy(logits.transpose(1, 2), b["labels"])


def measured(rank: int, world: int, parts: Sequence[Sequence[dict[str, Any]]], fails: bool) -> Any:
    """Take a step of a mean over labels; on rank 0 memory may run out first. Return its error."""
    net, trap = models.model(), Trap([0] if fails and rank == 0 else [])
    net.register_forward_pre_hook(lambda *_: trap() if running else None)
    running: list[int] = []
    acc = Accumulator(
        net,
        from_mean(plain_nll),
        budget=Budget(examples=2),
        collate=models.collated,
    )
    run = acc._run

    def noting(*args: Any) -> Any:
        running.append(1)
        try:
            return run(*args)
        finally:
            running.clear()

    acc._run = noting
    step = acc.backward(list(parts[rank]))
    found = gradients(net)
    net.zero_grad()
    whole = models.collated([row for part in parts for row in part])
    wanted = oracle.gradients(net, {"loss": plain_nll(net, whole)}, {"loss": 1})
    return oracle.error(found, wanted), len(step.recoveries), trap.num
