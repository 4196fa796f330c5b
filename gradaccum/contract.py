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
from dataclasses import dataclass, replace

from gradaccum.counters import CLAMPED, ROWS, counts, describe
from gradaccum.errors import BadInput, NotDecomposable
from gradaccum.fitting import best_weights, fit, is_nothing
from gradaccum.reductions import Routing, Seen, Terms, attention_mask, routing
from gradaccum.rows import SUM, Key, Rows, labels

OWN = "own:"  # what the caller counts, for a loss that divides by what it is given
HUGE = 1e18  # isolates what is not divided: with a count of 1, token losses drown a router loss

# How far gradients that should add up may be off, and how far from the best weights those of a
# counter. In float64 heads with casts to float32 or an epsilon in a denominator come to 1e-6.
RESIDUAL = {"float64": 5e-6, "float32": 1e-4, "low": 5e-2}
EPS = {"float64": 2.2e-16, "float32": 1.2e-7}
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
        repeated: Lines that take several of these means, and how many.
    """

    counted: bool
    counters: tuple[str, ...]
    extra: str | None = None
    routing: Routing | None = None
    split: bool = False
    repeated: tuple[tuple[str, int], ...] = ()

    @property
    def is_sum(self) -> bool:
        """Return whether it is divided by nothing."""
        return self.counters[:1] == (SUM,)

    @property
    def first(self) -> str:
        """Return the contract with the counter that is used, of those that are not told apart."""
        return str(replace(self, counters=self.counters[:1]))

    def __str__(self) -> str:
        plain = [name for name in self.counters if not name.endswith(CLAMPED)]
        over = " or ".join(map(describe, plain or self.counters))
        if self.counted:
            parts = [f"a sum divided by num_items_in_batch (counting {over})"]
        else:
            parts = ["a sum" if self.is_sum else f"a mean over {over}"]
        if self.split:
            parts.append("means over other counts, each divided by its own")
        if self.extra is not None:
            parts.append(f"a mean over {describe(self.extra)} that the count does not divide")
        if self.routing is not None:
            parts.append("a load-balancing loss over the whole effective batch")
        return " and ".join(parts)


@dataclass
class Probe:
    """Find the contract of one loss on a few rows.

    Args:
        rows: Run the loss.
        takes_count: Whether the loss is given a count at all.
        own_count: Whether the caller says what it is to be divided by.
        precision: "float64", "float32" or "low": what it is computed in.
    """

    rows: Rows
    takes_count: bool
    own_count: bool
    precision: str
    counted: bool = False
    is_odd: bool = False  # some rows were found that do not add up

    def contract(self) -> Contract | None:
        """Return the contract; None if these rows train nothing, so that there is none to see.

        Raises:
            NotDecomposable: There is none; it names the cause.
            BadInput: The loss is not finite.
        """
        rows, union = self.rows, self.rows.unions[0]
        if not rows.is_labelled(union) and not abs(rows.value(union, None)) > 0:  # 0 or 0 / 0
            return None
        self.counted = self._is_counted()
        given = [self.counted]
        if self.counted and SUM in self._fitting_sum(Contract(True, ())):
            given.append(False)  # a sum, but of several means that a count replaces
        seen = rows.see(union)
        is_weighted = any(mean.weighted for mean in seen.means)
        for counted in given:
            # A router's loss is small beside a mean and would be missed; a huge count isolates it.
            # Weights of classes show only where rows of several classes are.
            if counted or (seen.router_loss is None and not is_weighted):
                found = self._holding(self._fit(Contract(counted, ())))
                if found is not None:
                    return self._told_apart(found)
        route = routing(seen, attention_mask(rows.inputs(union)))
        for counted, routed, split in itertools.product(
            given, dict.fromkeys((route, None)), (False, True)
        ):
            if (routed is not None or split) and not (split and not seen.means):
                tried = Contract(counted, (), routing=routed, split=split)
                found = self._holding(self._fit(tried))
                if found is not None:
                    several = [(call, n) for call, n in seen.calls().items() if n > 1]
                    return replace(found, repeated=tuple(several) if split else ())
        raise self._refusal(seen)

    def holds(self, contract: Contract) -> bool:
        """Tell whether the values of the loss still agree with a contract."""
        is_plain = not contract.split and contract.routing is None and contract.extra is None
        if contract.counted and is_plain and self._has_extra(contract):
            return False
        return bool(self._adding_up(contract, self.rows.unions[0]))

    def _holding(self, contract: Contract | None) -> Contract | None:
        """Return the contract with the counters by which more rows add up as well, or None."""
        if contract is None:
            return None
        for groups in self.rows.beside:
            names = self._adding_up(contract, groups)
            if not names:
                self.is_odd = True
                return None
            contract = replace(contract, counters=names)
        # Rows without anything to count were seen to add nothing, whatever they are divided by.
        kept = tuple(
            name
            for name in contract.counters
            if (plain := name.removesuffix(CLAMPED)) == name
            or plain not in contract.counters
            or not self.rows.is_empty(plain)
        )
        return replace(contract, counters=kept)

    def _terms(self, tried: Contract, keys: list[Key], count: float | None) -> Terms | None:
        return self.rows.terms(keys, count, tried.routing, split=tried.split)

    def _adding_up(self, contract: Contract, groups: Key) -> tuple[str, ...]:
        """Return the counters by which the values of some groups give that of all together."""
        count, keys = 1.0 if contract.counted else None, [(i,) for i in groups]
        known = self.rows.shares(keys)
        whole, terms = self.rows.value(groups, count), self._terms(contract, keys, count)
        parts = [self._parts(terms, key, count) for key in keys]
        if contract.extra is not None:  # what the count does not divide, by its own count
            extra = [self.rows.value(key, HUGE) for key in keys]
            own = known.get(contract.extra, [0.0] * len(keys))
            parts = [
                (rest - e, share + e * w)
                for (rest, share), e, w in zip(parts, extra, own, strict=True)
            ]
        if not any(map(any, parts)):
            return contract.counters
        if contract.counted:
            return contract.counters if self._are_sum(groups, whole, parts, known[SUM]) else ()
        return tuple(
            name
            for name in contract.counters
            if name not in known or self._are_sum(groups, whole, parts, known[name])
        )

    def _are_sum(
        self, groups: Key, whole: float, parts: list[tuple[float, float]], weights: list[float]
    ) -> bool:
        """Tell whether the weighted parts add up to the whole."""
        shares = [w * rest + share for w, (rest, share) in zip(weights, parts, strict=True)]
        tolerance = self._value_tolerance(groups[-2:])
        if self.precision == "low":
            return abs(whole - sum(shares)) <= tolerance * abs(whole)
        # A row with a loss of 10,000 must not hide what happens to one with a loss of 1.
        least = min((abs(share) for share in shares if share), default=0.0)
        allowed = tolerance * least + 8 * EPS[self.precision] * abs(whole)
        return abs(whole - sum(shares)) <= allowed

    def _parts(self, terms: Terms | None, key: Key, count: float | None) -> tuple[float, float]:
        """Return the values of the loss without its terms, and of its terms' share."""
        if terms is None:
            return self.rows.value(key, count), 0.0
        run = functools.partial(self.rows.run, key, count)
        rest, share = terms.parts(self.rows.model, run, attention_mask(self.rows.inputs(key)))
        return rest.item(), share.item()

    # -- is the count honoured

    def _is_counted(self) -> bool:
        """Tell whether the loss is S / count, but for what a huge count leaves."""
        union = self.rows.unions[0]
        first, again = self.rows.value(union, None), self.rows.value_again(union, None)
        if not math.isfinite(first):
            raise BadInput(
                f"{self.rows.name} is {first} on {self.rows.num(union)} examples before the first "
                "step",
                hint="look for values that are not finite in the weights and in the data",
            )
        if abs(first - again) > 1e-6 * abs(first):
            raise NotDecomposable(
                f"{self.rows.name} is {first:.6g} and then {again:.6g} on the same inputs without "
                "dropout: it draws random numbers, so what two splits give cannot be compared",
                hint="draw them in the collator, where they are kept",
            )
        if not self.takes_count:
            return False
        one, two, rest = (self.rows.value(union, count) for count in (1.0, 2.0, HUGE))
        if abs(one - two) <= 1e-6 * abs(one):
            return False
        if abs(two - (one + rest) / 2) > 1e-3 * abs(one):
            raise NotDecomposable(
                f"{self.rows.name} is {one:.6g} with num_items_in_batch=1 and {two:.6g} with 2, "
                f"where a sum divided by the count would be {(one + rest) / 2:.6g}"
            )
        return True

    def _divisors(self) -> tuple[str, ...]:
        """Return the counters that a loss divides by which honours a count and is given none.

        Several means over different things, which a count would all replace, have none.
        """
        if self.own_count:
            return (OWN,)
        fitting: list[str] = []
        for key in (self.rows.unions[0], (0,), (1,)):
            rest = self.rows.value(key, HUGE)
            total, mean = self.rows.value(key, 1.0) - rest, self.rows.value(key, None) - rest
            found = self.rows.counts(key)
            near = [
                n for n, count in found.items() if abs(total - count * mean) <= 1e-4 * abs(total)
            ]
            fitting = near if key == self.rows.unions[0] else [n for n in fitting if n in near]
        return tuple(fitting)

    # -- which weights add up

    def _fit(self, tried: Contract) -> Contract | None:
        """Return the contract with the counters that fit, or None."""
        if not tried.counted:
            names = self._fitting(tried, None)
            return replace(tried, counters=names) if names else None
        if SUM not in self._fitting_sum(tried):
            return None
        extra = None
        if self._has_extra(tried):
            extra = next(iter(self._fitting(tried, HUGE)), None)
            if extra is None:
                return None
        names = self._divisors()
        return replace(tried, counters=names, extra=extra) if names else None

    def _fitting_sum(self, tried: Contract) -> tuple[str, ...]:
        """Return the counters that fit what the count divides."""
        return self._fitting(
            tried, 1.0, minus=HUGE if self._has_extra(Contract(True, ())) else None
        )

    def _has_extra(self, tried: Contract) -> bool:
        """Tell whether something is left with a huge count, beside the terms that are known."""
        union = self.rows.unions[0]
        rest, _ = self._parts(self._terms(tried, [union], HUGE), union, HUGE)
        scale = abs(self.rows.value(union, 1.0)) / max(counts(self.rows.inputs(union), 1).values())
        return abs(rest) > 1e-6 * scale

    def _fitting(
        self, tried: Contract, count: float | None, *, minus: float | None = None
    ) -> tuple[str, ...]:
        """Return the counters whose shares of the groups' gradients give those of the unions."""
        fitting: list[str] | None = None
        for union in self.rows.unions:
            keys = [(i,) for i in union]
            terms = self._terms(tried, keys, count)
            parts = [self.rows.gradients(terms, key, count, minus) for key in keys]
            whole, _ = self.rows.gradients(None, union, count, minus)
            shares = self.rows.shares(keys)
            if terms is not None and is_nothing([rest for rest, _ in parts], whole):
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

    def _value_tolerance(self, key: Key) -> float:
        """Return how far values may be off.

        A token too many or too few changes a sum by about sum / count. Rounding in 16 bits changes
        it by 1e-3 at most where there are many tokens; where there are few, by more.
        """
        if self.precision != "low":
            return RESIDUAL[self.precision]
        found = self.rows.counts(key)
        return max(1e-3, min(3e-2, 0.3 / max([*labels(found), self.rows.num(key)])))

    def _told_apart(self, found: Contract) -> Contract:
        """Keep of several counters those that a mean was seen to be taken over, if any was."""
        if found.counted or len(found.counters) == 1:
            return found
        keys = [(i,) for i in self.rows.unions[0]]
        seen = [[mean.denominator.item() for mean in self.rows.see(key).means] for key in keys]
        shares = self.rows.shares(keys)
        taken = [[d / sum(call) for d in call] for call in zip(*seen, strict=False) if sum(call)]
        kept = tuple(
            name
            for name in found.counters
            if any(
                max(abs(a - b) for a, b in zip(shares[name], t, strict=True)) < 1e-6 for t in taken
            )
        )
        return replace(found, counters=kept or found.counters)

    # -- why not

    def _refusal(self, seen: Seen) -> NotDecomposable:
        union = self.rows.unions[0]
        keys = [(i,) for i in union]
        count, minus, what = None, None, self.rows.name
        if self.counted and SUM not in self._fitting_sum(Contract(True, ())):
            count, minus = 1.0, HUGE
        elif self.counted:
            count, what = HUGE, f"a term of {self.rows.name} that the count does not divide"
        parts = [self.rows.gradients(None, key, count, minus)[0] for key in keys]
        whole, _ = self.rows.gradients(None, union, count, minus)
        best, off = best_weights(parts, whole)
        if minus is not None:
            off = max(off, ((whole - sum(parts)).norm() / whole.norm()).item())
        num, apart = self.rows.num(union), " and ".join(str(self.rows.num(key)) for key in keys)
        alone = [mean.classes for mean in self.rows.see(keys[-1]).means]
        told = [mean.classes == num for mean in seen.means]
        if any(t and a == self.rows.num(keys[-1]) for t, a in zip(told, alone, strict=False)):
            cause = f"each row is told from the other {num - 1} (in-batch negatives)"
        elif seen.router_loss is not None:
            cause = "it has a router's load-balancing loss, a product of means over the batch"
        elif self.is_odd:
            cause = (
                "its rows depend on each other (padding changes some of them and not all, or the "
                "loss takes a part of them)"
            )
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
