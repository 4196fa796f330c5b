"""Measure how a foreign loss is reduced.

Signatures do not tell: most heads of transformers accept `num_items_in_batch` and ignore it. So
some rows are run alone and together, and their gradients compared. With g(x) the gradient of the
loss of x as it is, a contract is what makes

    g(x and y) = a_x g(x) + a_y g(y)

true: a = 1 for a sum, a_x = c_x / (c_x + c_y) for a mean over the counter c. Gradients of two rows
point in two directions even where their losses are equal, as on fresh weights, so this decides
between counters that losses cannot tell apart. Where no such a exists, the loss may be made of
several terms (`reductions.py`), each with its own; if it is not, it is refused with the cause.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.batch import HostBatch, Listed
from gradaccum.counters import ROWS, counts, describe
from gradaccum.errors import BadInput, GradaccumError, NotDecomposable
from gradaccum.objective import Number, length
from gradaccum.reductions import Routing, Seen, Terms, attention_mask, routing, watching
from gradaccum.trees import named_leaves

# Maps the model, collated inputs and the count to divide by (None: the loss's own) to the loss.
CountedLoss = Callable[[nn.Module, Any, float | None], Tensor]

SUM = "sum:"
OWN = "own:"  # what the caller counts, for a loss that divides by what it is given
HUGE = 1e18  # isolates what is not divided: with a count of 1, token losses drown a router loss
SAMPLE = 4096  # values of the gradient of each parameter

# How far gradients that should add up may be off, and how far from the best weights those of a
# counter. In float64 heads with casts to float32 or an epsilon in a denominator come to 1e-6.
RESIDUAL = {"float64": 5e-6, "float32": 1e-4, "low": 5e-2}
EXCESS = {"float64": 1e-6, "float32": 2e-5, "low": 5e-3}


@dataclass(frozen=True, slots=True)
class Contract:
    """Say how a loss is reduced.

    Args:
        counted: It is a sum divided by the count that it is given.
        counters: What it is divided by, given no count; those that the rows measured do not tell
            apart. `SUM` alone: by nothing.
        extra: What a term that the count does not divide is averaged over; None: there is none.
        routing: How a router's load-balancing loss in it is taken from the router's logits.
        split: It joins means over different things, and each is divided by its own.
    """

    counted: bool
    counters: tuple[str, ...]
    extra: str | None = None
    routing: Routing | None = None
    split: bool = False

    @property
    def first(self) -> str:
        """Return the contract with the counter that is used, of those that are not told apart."""
        return str(replace(self, counters=self.counters[:1]))

    def __str__(self) -> str:
        over = " or ".join(map(describe, self.counters))
        if self.counted:
            parts = [f"a sum divided by num_items_in_batch (counting {over})"]
        else:
            parts = ["a sum" if self.counters == (SUM,) else f"a mean over {over}"]
        if self.split:
            parts.append("means over other counts, each divided by its own")
        if self.extra is not None:
            parts.append(f"a mean over {describe(self.extra)} that the count does not divide")
        if self.routing is not None:
            parts.append("a load-balancing loss over the whole effective batch")
        return " and ".join(parts)


@dataclass
class Probe:
    """Measure one loss on a few rows of one batch.

    Args:
        model: In the mode in which it is trained, but without dropout; its gradients cleared.
        loss: Runs several times on the same inputs, so it must not change them.
        host: Where the rows are taken from.
        name: What the loss is called in messages.
        takes_count: Whether the loss is given a count at all.
        own_count: Counts what the loss is to be divided by, where that is not its own choice.
        precision: "float64", "float32" or "low": what it is computed in.
        tried: From how many short rows to choose.
    """

    model: nn.Module
    loss: CountedLoss
    host: HostBatch
    name: str
    takes_count: bool
    own_count: Callable[[Any], Number] | None
    precision: str
    tried: int = 8
    num_rows: int = 0  # forwards, counted by row; those with a backward count three times
    counted: bool = False
    odd: tuple[int, int] | None = None  # groups whose values do not add up
    _kept: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.host, self.groups, short = choose(self.host, self.tried)
        self.unions = [(0, 1), (0, 2)][: len(self.groups) - 1]
        # Each short row beside the widest of them: padding may change some rows and not others.
        begin = len(self.groups)
        self.groups += [[row] for row in short]
        self.pairs = [(begin, i) for i in range(begin + 1, len(self.groups))]

    def contract(self) -> Contract | None:
        """Return the contract; None if these rows train nothing, so that there is none to see.

        Raises:
            NotDecomposable: There is none; it names the cause.
            BadInput: The loss is not finite.
        """
        union = self.unions[0]
        if not self._is_labelled(union) and not abs(self._value(union, None)) > 0:  # 0 or 0 / 0
            return None
        self.counted = self._is_counted()
        given = [self.counted]
        if self.counted and SUM in self._fitting(Contract(True, ()), 1.0, minus=HUGE):
            given.append(False)  # a sum, but of several means that a count replaces
        for counted in given:
            found = self._fit(Contract(counted, ()))
            if found is not None and self._hold(found):
                return self._told_apart(found)
        seen = self._see(union)
        route = routing(seen, attention_mask(self._inputs(union)))
        for counted, routed, split in itertools.product(
            given, dict.fromkeys((route, None)), (False, True)
        ):
            if (routed is not None or split) and not (split and not seen.means):
                found = self._fit(Contract(counted, (), routing=routed, split=split))
                if found is not None and self._hold(found):
                    return found
        raise self._refusal(seen)

    def holds(self, contract: Contract) -> bool:
        """Tell whether the values of the loss still agree with a contract."""
        if contract.split or contract.routing is not None or contract.extra is not None:
            return True
        if contract.counted and self._has_extra(contract):
            return False
        return self._adds_up(contract, self.unions[0])

    def _hold(self, contract: Contract) -> bool:
        odd = next((pair for pair in self.pairs if not self._adds_up(contract, pair)), None)
        self.odd = odd or self.odd
        return odd is None

    def _adds_up(self, contract: Contract, pair: tuple[int, int]) -> bool:
        """Tell whether the values of two groups give that of both together."""
        if contract.extra is not None:  # added once and not twice
            return True
        count, keys = 1.0 if contract.counted else None, [(i,) for i in pair]
        weights = self._shares(keys).get(SUM if contract.counted else contract.counters[0])
        whole, terms = self._value(pair, count), self._terms(contract, keys, count)
        parts = [self._parts(terms, key, count) for key in keys]
        if weights is None or not any(map(any, parts)):
            return True
        total = sum(w * rest + share for w, (rest, share) in zip(weights, parts, strict=True))
        return abs(whole - total) <= self._value_tolerance(pair) * abs(whole)

    def _parts(
        self, terms: Terms | None, key: tuple[int, ...], count: float | None
    ) -> tuple[float, float]:
        """Return the values of the loss without its terms, and of its terms' share."""
        if terms is None:
            return self._value(key, count), 0.0
        run = functools.partial(self._run, key, count)
        rest, share = terms.parts(self.model, run, attention_mask(self._inputs(key)))
        return rest.item(), share.item()

    # -- is the count honoured

    def _is_counted(self) -> bool:
        """Tell whether the loss is S / count, but for what a huge count leaves."""
        union = self.unions[0]
        first, again = self._value(union, None), self._value(union, None)
        if not math.isfinite(first):
            raise BadInput(
                f"{self.name} is {first} on {self._num(union)} examples before the first step",
                hint="look for values that are not finite in the weights and in the data",
            )
        if abs(first - again) > 1e-6 * abs(first):
            raise NotDecomposable(
                f"{self.name} is {first:.6g} and then {again:.6g} on the same inputs without "
                "dropout: it draws random numbers, so what two splits give cannot be compared",
                hint="draw them in the collator, where they are kept",
            )
        if not self.takes_count:
            return False
        one, two, rest = (self._value(union, count) for count in (1.0, 2.0, HUGE))
        if abs(one - two) <= 1e-6 * abs(one):
            return False
        if abs(two - (one + rest) / 2) > 1e-3 * abs(one):
            raise NotDecomposable(
                f"{self.name} is {one:.6g} with num_items_in_batch=1 and {two:.6g} with 2, where "
                f"a sum divided by the count would be {(one + rest) / 2:.6g}"
            )
        return True

    def _divisors(self) -> tuple[str, ...]:
        """Return the counters that a loss divides by which honours a count and is given none.

        Several means over different things, which a count would all replace, have none.
        """
        if self.own_count is not None:
            return (OWN,)
        fitting: list[str] = []
        for key in (self.unions[0], (0,), (1,)):
            rest = self._value(key, HUGE)
            total, mean = self._value(key, 1.0) - rest, self._value(key, None) - rest
            found = counts(self._inputs(key), self._num(key))
            near = [
                n for n, count in found.items() if abs(total - count * mean) <= 1e-4 * abs(total)
            ]
            fitting = near if key == self.unions[0] else [n for n in fitting if n in near]
        return tuple(fitting)

    # -- which weights add up

    def _fit(self, tried: Contract) -> Contract | None:
        """Return the contract with the counters that fit, or None."""
        if not tried.counted:
            names = self._fitting(tried, None)
            return replace(tried, counters=names) if names else None
        if SUM not in self._fitting(tried, 1.0, minus=HUGE):
            return None
        extra = None
        if self._has_extra(tried):
            extra = next(iter(self._fitting(tried, HUGE)), None)
            if extra is None:
                return None
        names = self._divisors()
        return replace(tried, counters=names, extra=extra) if names else None

    def _has_extra(self, tried: Contract) -> bool:
        """Tell whether something is left with a huge count, beside the terms that are known."""
        union = self.unions[0]
        rest, _ = self._gradients(tried, self._terms(tried, (union,), HUGE), union, HUGE)
        scale = abs(self._value(union, 1.0)) / max(counts(self._inputs(union), 1).values())
        return abs(rest[0].item()) > 1e-6 * scale

    def _fitting(
        self, tried: Contract, count: float | None, *, minus: float | None = None
    ) -> tuple[str, ...]:
        """Return the counters whose shares of the groups' gradients give those of the unions."""
        fitting: list[str] | None = None
        for union in self.unions:
            keys = [(i,) for i in union]
            terms = self._terms(tried, keys, count)
            parts = [self._gradients(tried, terms, key, count, minus) for key in keys]
            whole, _ = self._gradients(None, None, union, count, minus)
            shares = self._shares(keys)
            if terms is not None and _is_nothing([rest for rest, _ in parts], whole):
                shares = {ROWS: shares[ROWS]}  # no matter how it is weighed
            fits = fit(
                [rest for rest, _ in parts],
                whole - sum(share for _, share in parts),
                shares,
                whole=whole,
                residual=RESIDUAL[self.precision],
                excess=EXCESS[self.precision],
                value=self._value_tolerance(union),
            )
            fitting = [name for name in (shares if fitting is None else fitting) if name in fits]
        return tuple(fitting or ())

    def _value_tolerance(self, key: tuple[int, ...]) -> float:
        """Return how far values may be off.

        A token too many or too few changes a sum by about sum / count. Rounding in 16 bits changes
        it by 1e-3 at most where there are many tokens; where there are few, by more.
        """
        if self.precision != "low":
            return RESIDUAL[self.precision]
        found = counts(self._inputs(key), self._num(key))
        return max(1e-3, min(3e-2, 0.3 / max([*_labels(found), self._num(key)])))

    def _shares(self, keys: list[tuple[int, ...]]) -> dict[str, list[float]]:
        """Return each group's share of the union by every counter that adds up over them.

        One that counts padding does not, where one group pads another.
        """
        found = [counts(self._inputs(key), self._num(key)) for key in keys]
        union = tuple(i for key in keys for i in key)
        totals = counts(self._inputs(union), self._num(union))
        shares = {
            name: [row[name] / total for row in found]
            for name, total in totals.items()
            if total and all(name in row for row in found) and sum(r[name] for r in found) == total
        }
        return shares | {SUM: [1.0] * len(found)}

    def _told_apart(self, found: Contract) -> Contract:
        """Keep of several counters those that a mean was seen to be taken over, if any was."""
        if found.counted or len(found.counters) == 1:
            return found
        keys = [(i,) for i in self.unions[0]]
        seen = [[mean.denominator.item() for mean in self._see(key).means] for key in keys]
        shares = self._shares(keys)
        taken = [[d / sum(call) for d in call] for call in zip(*seen, strict=False) if sum(call)]
        kept = tuple(
            name
            for name in found.counters
            if any(
                max(abs(a - b) for a, b in zip(shares[name], t, strict=True)) < 1e-6 for t in taken
            )
        )
        return replace(found, counters=kept or found.counters)

    # -- running

    def _rows(self, key: tuple[int, ...]) -> list[int]:
        return [row for i in key for row in self.groups[i]]

    def _num(self, key: tuple[int, ...]) -> int:
        return len(self._rows(key))

    def _inputs(self, key: tuple[int, ...]) -> Any:
        if ("inputs", key) not in self._kept:
            self._kept["inputs", key] = self.host.take(self._rows(key))
        return self._kept["inputs", key]

    def _is_labelled(self, key: tuple[int, ...]) -> bool:
        return all(_labels(counts(self._inputs(key), self._num(key))))

    def _run(self, key: tuple[int, ...], count: float | None) -> Tensor:
        self.num_rows += self._num(key)
        try:
            return self.loss(self.model, self._inputs(key), count)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, (torch.OutOfMemoryError, GradaccumError)) or len(key) > 1:
                raise
            raise NotDecomposable(
                f"{self.name} fails on {self._num(key)} of {len(self.host)} rows alone "
                f"({type(error).__name__}: {error})",
                hint="a budget that holds the whole batch",
            ) from error

    def _value(self, key: tuple[int, ...], count: float | None) -> float:
        with torch.no_grad():
            value = self._run(key, count).item()
        return 0.0 if math.isnan(value) and len(key) == 1 else value  # 0 / 0 adds nothing

    def _see(self, key: tuple[int, ...]) -> Seen:
        with watching(self.model) as seen:
            self._run(key, None)
        return seen

    def _terms(
        self, tried: Contract, keys: Iterable[tuple[int, ...]], count: float | None
    ) -> Terms | None:
        if tried.routing is None and not tried.split:
            return None
        keys = list(keys)
        return Terms.survey(
            self.model,
            [functools.partial(self._run, key, count) for key in keys],
            [attention_mask(self._inputs(key)) for key in keys],
            routing=tried.routing,
            split=tried.split,
        )

    def _gradients(
        self,
        tried: Contract | None,
        terms: Terms | None,
        key: tuple[int, ...],
        count: float | None,
        minus: float | None = None,
    ) -> tuple[Tensor, Tensor | float]:
        """Return value and gradient of the loss without its terms, and of its terms' share."""
        if terms is None:
            if ("gradient", key, count) not in self._kept:
                self._kept["gradient", key, count] = self._taken(self._run(key, count), key)
            rest, share = self._kept["gradient", key, count], 0.0
        else:
            run = functools.partial(self._run, key, count)
            loss, terms_loss = terms.parts(self.model, run, attention_mask(self._inputs(key)))
            rest, share = self._taken(loss, key, keep=True), self._taken(terms_loss, key)
        if minus is not None:
            less, share_less = self._gradients(tried, terms, key, minus)
            rest, share = rest - less, share - share_less
        return rest, share

    def _taken(self, loss: Tensor, key: tuple[int, ...], *, keep: bool = False) -> Tensor:
        """Return the value of a loss and a sample of its gradient, float64 on the CPU."""
        self.num_rows += 2 * self._num(key)
        if loss.requires_grad:
            loss.backward(retain_graph=keep)
        value = loss.detach().double().cpu().reshape(1)
        found = [value.nan_to_num() if len(key) == 1 else value]  # 0 / 0 adds nothing
        for p in self.model.parameters():
            if p.requires_grad:
                step = p.numel() // SAMPLE | 1  # odd, so as not to stay in one column
                grad, p.grad = p.grad, None
                taken = torch.zeros(p.numel()) if grad is None else grad.to_dense().flatten()
                found.append(taken[::step].double().cpu())
        return torch.cat(found)

    # -- why not

    def _refusal(self, seen: Seen) -> NotDecomposable:
        union = self.unions[0]
        keys = [(i,) for i in union]
        count, minus, what = None, None, self.name
        if self.counted and SUM not in self._fitting(Contract(True, ()), 1.0, minus=HUGE):
            count, minus = 1.0, HUGE
        elif self.counted:
            count, what = HUGE, f"a term of {self.name} that the count does not divide"
        parts = [self._gradients(None, None, key, count, minus)[0] for key in keys]
        whole, _ = self._gradients(None, None, union, count, minus)
        best, off = best_weights(parts, whole)
        if minus is not None:
            off = max(off, ((whole - sum(parts)).norm() / whole.norm()).item())
        num, apart = self._num(union), " and ".join(str(self._num(key)) for key in keys)
        alone = [mean.classes for mean in self._see(keys[-1]).means]
        told = [mean.classes == num for mean in seen.means]
        if any(t and a == self._num(keys[-1]) for t, a in zip(told, alone, strict=False)):
            cause = f"each row is told from the other {num - 1} (in-batch negatives)"
        elif seen.router_loss is not None:
            cause = "it has a router's load-balancing loss, a product of means over the batch"
        elif self.odd is not None:
            cause = "its rows depend on each other (padding changes some of them, and not all)"
        elif minus is None and off <= RESIDUAL[self.precision]:
            cause = f"it weighs them {' : '.join(f'{w:.4g}' for w in best)}, by no known count"
        else:
            cause = (
                "its rows depend on each other (in-batch negatives, batch statistics, a router "
                "loss, padding that changes the other rows), or it adds means over different counts"
            )
        return NotDecomposable(
            f"the gradient of {what} for {num} rows together is no known weighting of those of "
            f"{apart} rows apart ({off:.1e} off): {cause}",
            hint="pass compute_loss_func= to the trainer, a sum divided by num_items_in_batch; or "
            "use gradaccum.Accumulator with an Objective; or a budget that holds the whole batch",
        )


def _is_nothing(parts: list[Tensor], whole: Tensor) -> bool:
    """Tell whether values and gradients are rounding beside those of the whole."""
    eps = torch.finfo(torch.float32).eps
    return all(
        part[0].abs() <= eps * whole[0].abs() and part[1:].norm() <= eps * whole[1:].norm()
        for part in parts
    )


def best_weights(parts: list[Tensor], target: Tensor) -> tuple[list[float], float]:
    """Return the weights with which the parts come nearest to the target, and how near."""
    stacked = torch.stack(parts, 1)
    norm = target.norm().item() or 1.0
    if not (stacked.isfinite().all() and target.isfinite().all()):
        return [math.nan] * len(parts), math.inf
    weights = torch.linalg.lstsq(stacked / norm, target[:, None] / norm, driver="gelsd").solution
    return weights[:, 0].tolist(), ((target - stacked @ weights[:, 0]).norm() / norm).item()


def fit(
    parts: list[Tensor],
    target: Tensor,
    shares: Mapping[str, list[float]],
    *,
    whole: Tensor,
    residual: float,
    excess: float,
    value: float,
) -> set[str]:
    """Return the shares by which the parts, value and gradient, add up to the target.

    Args:
        parts: Value and gradient of each group, shape (1 + gradients,).
        target: What they should add up to.
        shares: The weights to try, by name.
        whole: Value and gradient of the union, which say what is large.
        residual: How far the best weights may be off, relative to the whole.
        excess: How far others may be from the best.
        value: How far the value may be off, relative to that of the whole.
    """
    norm = (whole[1:].norm() or whole.norm()).item() or 1.0
    stacked, target = torch.stack(parts, 1) / norm, target / norm
    gradients = slice(1, None) if whole[1:].any() else slice(0, 1)
    best, off = best_weights(list(stacked[gradients].unbind(1)), target[gradients])
    if not off * target[gradients].norm() <= residual:
        return set()

    def fits(weights: list[float]) -> bool:
        given = torch.tensor(weights, dtype=stacked.dtype)
        beside = stacked[gradients] @ (given - torch.tensor(best, dtype=stacked.dtype))
        value_off = (target[0] - stacked[0] @ given).abs() * norm
        return bool(beside.norm() <= excess and value_off <= value * whole[0].abs())

    return {name for name, weights in shares.items() if fits(weights)}


def choose(host: HostBatch, tried: int) -> tuple[HostBatch, list[list[int]], list[int]]:
    """Choose a row, two rows and the longest row, such that counters differ on them.

    Short rows are cheap, and beside the longest they are padded. Without a label in the first row
    its loss would be 0 / 0; one without in the second group tells rows with a label from rows.

    Returns:
        The rows chosen from, the random numbers of their collator drawn for good; the groups; and
        the short rows, the widest first.
    """
    lengths = [length(example) for example in host]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for rows in (list(dict.fromkeys([*order[:tried], order[-1]])), order):
        settled = host.settled(rows) if isinstance(host, Listed) else host
        short = list(range(len(rows))) if settled is not host else rows
        found = {row: counts(settled.take([row]), 1) for row in short}
        labelled = [row for row in short if all(_labels(found[row]))]
        if len(labelled) > 1:
            break
    widths = {row: _num_elements(settled.take([row])) for row in short}
    longest = max(short, key=widths.__getitem__)
    best: tuple[int, list[list[int]]] = (-1, [])
    for first in sorted(labelled or short, key=widths.__getitem__)[:4]:
        others = [row for row in dict.fromkeys([*labelled, *short]) if row != first][:tried]
        for pair in itertools.combinations(others, min(2, len(others))):
            if len(labelled) > 1 and not any(row in labelled for row in pair):
                continue
            shares = set()
            for name in found[first]:
                rows = [found[row].get(name, 0.0) for row in (first, *pair)]
                shares.add(round(rows[0] / sum(rows), 9) if sum(rows) else 0.0)
            if len(shares) > best[0]:
                best = (len(shares), [[first], list(pair)])
    groups = best[1] or [[row] for row in short[:2]]
    used = {row for group in groups for row in group}
    if longest not in used:
        groups.append([longest])
    others = [row for row in short if row != longest]
    return settled, groups, sorted(others, key=widths.__getitem__, reverse=True)


def _num_elements(inputs: Any) -> int:
    """Return how large collated inputs are; other rows may be padded by as much."""
    return sum(leaf.numel() for _, leaf in named_leaves(inputs) if isinstance(leaf, Tensor))


def _labels(found: Mapping[str, float]) -> list[float]:
    return [
        n
        for name, n in found.items()
        if ("label" in name and name.startswith(("trained:", "shifted:")))
        or name.startswith("in_range:")
    ]
