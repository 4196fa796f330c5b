"""The scalars that a loss is made of, seen while it is computed: reductions and a router's loss.

A loss that joins two means with two denominators (masked tokens and rows, say) has no weight that
fits both. Here they are caught where they are made: calls of `torch.nn.functional` that reduce to
a mean, and the load-balancing loss of a mixture of experts, which is a product of two means.
Because the loss is linear in them, d loss / d term times term is what each contributes.
"""

import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradaccum.errors import NotDecomposable


def _classes(arguments: Mapping[str, Any]) -> Tensor | float:
    """Return what the mean of a cross entropy is taken over: its targets, or their weights."""
    target, weight = arguments["target"], arguments["weight"]
    if target.is_floating_point():  # probabilities: the classes are the second dimension
        return target.numel() / target.shape[min(1, target.ndim - 1)]
    kept = target != arguments["ignore_index"]
    return kept.sum() if weight is None else weight[target[kept]].sum()


def _elements(arguments: Mapping[str, Any]) -> float:
    shapes = [arguments["input"].shape, arguments["target"].shape]
    return float(math.prod(torch.broadcast_shapes(*shapes)))


def _num_classes(function: Callable[..., Any], arguments: Mapping[str, Any]) -> int:
    shape = arguments["input"].shape if function is F.cross_entropy else ()
    return shape[1] if len(shape) > 1 else 0


DENOMINATORS: dict[Callable[..., Any], Callable[[Mapping[str, Any]], Tensor | float]] = {
    F.cross_entropy: _classes,
    F.nll_loss: _classes,
    F.ctc_loss: lambda arguments: len(arguments["target_lengths"]),
    F.mse_loss: _elements,
    F.l1_loss: _elements,
    F.smooth_l1_loss: _elements,
    F.huber_loss: _elements,
    F.binary_cross_entropy: _elements,
    F.binary_cross_entropy_with_logits: _elements,
    F.kl_div: _elements,
}
SIGNATURES = {function: inspect.signature(function) for function in DENOMINATORS}


@dataclass(frozen=True, slots=True)
class Mean:
    """Hold a mean that a loss is made of.

    Args:
        value: The mean, shape ().
        denominator: What it was divided by, shape ().
        classes: Between how many classes a cross entropy decides; 0 for others.
        weighted: Whether it was divided by weights of classes, which no count of inputs tells.
        call: Where the call is, by the files and lines that led to it.
    """

    value: Tensor
    denominator: Tensor
    classes: int
    weighted: bool
    call: str


class Reductions(TorchFunctionMode):
    """Keep each mean that is taken inside: `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Mean] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in DENOMINATORS:
            bound = SIGNATURES[func].bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            if bound.arguments["reduction"] == "mean":
                found = DENOMINATORS[func](bound.arguments)
                denominator = torch.as_tensor(found, device=result.device)
                # A mean over nothing is nan, and adds nothing.
                result = torch.where(denominator == 0, torch.zeros_like(result), result)
                classes = _num_classes(func, bound.arguments)
                weighted = bound.arguments.get("weight") is not None and classes > 0
                self.found.append(Mean(result, denominator, classes, weighted, _call()))
        return result


def _call() -> str:
    """Return the lines outside of torch that led here, from our own caller on."""
    frame, lines = sys._getframe(1), []
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("gradaccum.") and module != __name__:
            break
        if not module.startswith("torch.") and module != __name__:
            lines.append(f"{module}:{frame.f_lineno}")
        frame = frame.f_back
    return " ".join(lines)


@dataclass(frozen=True, slots=True)
class Routing:
    """Say how a router's load-balancing loss is taken from its logits.

        loss = E * sum over experts e of f_e * P_e

    with f_e the share of tokens that are sent to expert e and P_e its mean probability (equations 4
    to 6 of https://arxiv.org/abs/2101.03961), over the tokens of all layers.

    Args:
        top_k: Experts to which a token is sent.
        masked: Whether tokens that `attention_mask` hides are left out.
    """

    top_k: int
    masked: bool

    def sums(self, logits: tuple[Tensor, ...], mask: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """Return tokens by expert (E,), without gradient, probabilities by expert (E,), tokens."""
        rows_NE = torch.cat([layer.reshape(-1, layer.shape[-1]) for layer in logits])
        probabilities_NE = rows_NE.softmax(-1)
        weight_N = torch.ones_like(rows_NE[:, 0])
        if self.masked:
            assert mask is not None, "found with a mask"
            weight_N = mask.reshape(-1).to(rows_NE).repeat(len(logits))
        chosen_NE = torch.zeros_like(rows_NE).scatter_(
            1, probabilities_NE.topk(self.top_k, -1).indices, 1.0
        )
        assigned_E = (chosen_NE * weight_N[:, None]).sum(0).detach()
        return assigned_E, (probabilities_NE * weight_N[:, None]).sum(0), weight_N.sum().detach()


@dataclass(slots=True)
class Seen:
    """Hold what one forward has shown; filled inside `watching`.

    Args:
        means: In the order of their calls.
        router_loss: The load-balancing loss, shape (), and the logits of each layer; or None.
    """

    means: list[Mean] = field(default_factory=list)
    router_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] = ()

    def named(self) -> list[tuple[tuple[str, int], Mean]]:
        """Return the means, each with its call and how often that was made before."""
        made: Counter[str] = Counter()
        found = []
        for mean in self.means:
            found.append(((mean.call, made[mean.call]), mean))
            made[mean.call] += 1
        return found

    def calls(self) -> Counter[str]:
        """Return how often each call was made."""
        return Counter(mean.call for mean in self.means)


@contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    """Yield what the forwards of the model inside, and the loss that is taken of them, are made of.

    A router's loss is read from the model's outputs (`aux_loss`, `router_logits`).
    """
    seen = Seen()

    def read(module: nn.Module, args: Any, outputs: Any) -> None:
        loss, logits = getattr(outputs, "aux_loss", None), getattr(outputs, "router_logits", None)
        if isinstance(logits, tuple) and logits:
            seen.router_logits = logits
        if isinstance(loss, Tensor):
            seen.router_loss = loss

    # The loss may be taken by a head, of logits that only the model inside of it returns.
    parts = [model, *(m for m in model.modules() if "config" in vars(m) and m is not model)]
    handles, reductions = [part.register_forward_hook(read) for part in parts], Reductions()
    try:
        with reductions:
            yield seen
        seen.means = reductions.found
    finally:
        for handle in handles:
            handle.remove()


def attention_mask(inputs: Any) -> Tensor | None:
    """Return the mask of collated inputs that tells tokens from padding, shape (B, T)."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def routing(seen: Seen, mask: Tensor | None) -> Routing | None:
    """Find how the router's loss is taken from its logits, by trying; None if in no known way."""
    if seen.router_loss is None or not seen.router_logits:
        return None
    num_experts = seen.router_logits[0].shape[-1]
    for masked in (True, False) if mask is not None else (False,):
        for top_k in range(1, num_experts + 1):
            found = Routing(top_k, masked)
            assigned_E, probability_E, rows = found.sums(seen.router_logits, mask)
            loss = num_experts * (assigned_E * probability_E).sum() / rows**2
            if torch.isclose(loss, seen.router_loss.to(loss.dtype), rtol=1e-4, atol=0):
                return found
    return None


def slopes(loss: Tensor, terms: list[Tensor]) -> list[Tensor]:
    """Return d loss / d term of each scalar term, 0 where it does not depend on it."""
    learned = [term for term in terms if term.requires_grad]
    if not (learned and loss.requires_grad):
        return [torch.zeros_like(term) for term in terms]
    found = torch.autograd.grad(loss, learned, retain_graph=True, allow_unused=True)
    by_id = dict(zip(map(id, learned), found, strict=True))
    return [
        torch.zeros_like(term) if (slope := by_id.get(id(term))) is None else slope
        for term in terms
    ]


@dataclass(frozen=True, slots=True)
class Terms:
    """Hold what the terms of a loss are divided by over a whole effective batch.

    Args:
        routing: How its load-balancing loss is taken, if it is to be.
        denominators: Of each mean, by its call and how often that was made before in a forward;
            None: they stay as they are.
        assigned_E: Tokens by expert.
        tokens: Tokens that a router has seen, over all layers.
    """

    routing: Routing | None
    denominators: dict[tuple[str, int], Tensor] | None
    assigned_E: Tensor | None
    tokens: Tensor | None

    @classmethod
    def survey(
        cls,
        model: nn.Module,
        losses: Iterable[Callable[[], Tensor]],
        masks: Iterable[Tensor | None],
        *,
        routing: Routing | None,
        split: bool,
        repeated: Mapping[str, int] = MappingProxyType({}),
    ) -> "Terms":
        """Count by one forward of each micro-batch.

        A term that is left out where it has no labels adds nothing there. Where one line takes
        several means, which of them is left out is not known.

        Args:
            model: Whose loss it is.
            losses: Run one micro-batch each.
            masks: Their attention masks.
            routing: As in the terms returned.
            split: Whether to count what the means are divided by.
            repeated: Calls that were made several times in a forward, and how often.

        Raises:
            NotDecomposable: Such a call is made less or more often now.
        """
        denominators: dict[tuple[str, int], Tensor] = {}
        repeated, sums = dict(repeated), []
        for loss, mask in zip(losses, masks, strict=True):
            with watching(model) as seen:
                loss()
            for key, mean in seen.named():
                part = mean.denominator.double()
                denominators[key] = denominators[key] + part if key in denominators else part
            for call, number in seen.calls().items() if split else ():
                if number != repeated.setdefault(call, number):
                    raise NotDecomposable(
                        f"the loss takes {number} means in one line for some rows and "
                        f"{repeated[call]} for others ({call.split()[0]})",
                        hint="take each in a line of its own",
                    )
            if routing is not None:
                sums.append(routing.sums(seen.router_logits, mask))
        return cls(
            routing,
            denominators if split and denominators else None,
            torch.stack([assigned_E for assigned_E, _, _ in sums]).sum(0) if sums else None,
            torch.stack([tokens for _, _, tokens in sums]).sum() if sums else None,
        )

    def told(self) -> dict[str, Any]:
        """Return what was counted, for the other ranks."""
        named = self.denominators or {}
        values = torch.stack(list(named.values())).tolist() if named else []
        return {
            "denominators": list(zip(named, values, strict=True)),
            "assigned": [] if self.assigned_E is None else self.assigned_E.tolist(),
            "tokens": 0.0 if self.tokens is None else self.tokens.item(),
        }

    def added(self, heard: Sequence[Mapping[str, Any]]) -> "Terms":
        """Return what was counted on all ranks; on one it is this."""
        if len(heard) == 1 or (self.denominators is None and self.assigned_E is None):
            return self  # nothing runs here that would be divided
        given = [said["terms"] for said in heard]
        denominators = self.denominators
        if denominators is not None:
            sums: Counter[tuple[str, int]] = Counter()
            for terms in given:
                sums.update({(call, i): value for (call, i), value in terms["denominators"]})
            denominators = {key: torch.full_like(x, sums[key]) for key, x in denominators.items()}
        assigned_E, tokens = self.assigned_E, self.tokens
        if assigned_E is not None and tokens is not None:
            rows = [terms["assigned"] for terms in given if terms["assigned"]]
            assigned_E = assigned_E.new_tensor(rows).sum(0)
            tokens = torch.full_like(tokens, math.fsum(terms["tokens"] for terms in given))
        return replace(self, denominators=denominators, assigned_E=assigned_E, tokens=tokens)

    def parts(
        self, model: nn.Module, loss: Callable[[], Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss without its terms, and the terms' share in those of the whole batch."""
        with watching(model) as seen:
            total = loss()
        means = seen.named() if self.denominators is not None else []
        values = [mean.value for _, mean in means]
        if self.routing is not None and seen.router_loss is not None:
            values.append(seen.router_loss)
        found = slopes(total, values)
        rest = total - sum(slope * value for slope, value in zip(found, values, strict=True))
        share = torch.zeros_like(total)
        for i, (key, mean) in enumerate(means):
            assert self.denominators is not None, "there are means to divide"
            part = (mean.denominator / self.denominators[key]).nan_to_num(0.0)
            share = share + found[i] * mean.value * part.to(mean.value.dtype)
        if self.routing is not None and self.assigned_E is not None and self.tokens is not None:
            _, probability_E, _ = self.routing.sums(seen.router_logits, mask)
            balance = (self.assigned_E * probability_E).sum() * len(probability_E) / self.tokens**2
            share = share + found[-1] * balance.to(total)
        return rest, share
