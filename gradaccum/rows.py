"""The rows that a measurement runs: a few of a batch, alone and together.

They are known by keys: (0,) is a group of rows, (0, 1) are two groups together.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.batch import HostBatch, Listed
from gradaccum.counters import CLAMPED, counts
from gradaccum.device import is_out_of_memory
from gradaccum.errors import GradaccumError, NotDecomposable
from gradaccum.objective import length
from gradaccum.reductions import Routing, Seen, Terms, attention_mask, slopes, watching
from gradaccum.trees import named_leaves

Key = tuple[int, ...]
# Maps the model, collated inputs and the count to divide by (None: the loss's own) to the loss.
CountedLoss = Callable[[nn.Module, Any, float | None], Tensor]

SUM = "sum:"  # the counter of a loss that is divided by nothing
SCANNED = 32  # rows whose values are looked at
EXTREME = 8  # of them, to be run
LONG = 4  # times the median: a row of so many tokens pads the others, and longer ones cost more
MANY = 4  # rows as long as the long one, or as many shorter ones, run together, forward only
NEEDS_GRAPH = "does not require grad"  # what autograd says of a derivative inside of the loss
SAMPLE = 4096  # values of the gradient of each parameter


@dataclass
class Rows:
    """Choose rows of a batch, and run a loss on groups of them.

    Args:
        model: In the mode in which it is trained, but without dropout; its gradients cleared.
        loss: Runs several times on the same inputs, so it must not change them.
        host: Where the rows are taken from.
        name: What the loss is called in messages.
        tried: From how many short rows to choose.
        prefer: Rows to choose from besides, since they are unlike those measured before.
        apart: Counters that are to differ; none: all.
        is_tight: The long row, or many short ones at once, do not fit into memory.
    """

    model: nn.Module
    loss: CountedLoss
    host: HostBatch
    name: str
    tried: int
    prefer: Sequence[int] = ()
    apart: Sequence[str] = ()
    is_tight: bool = False
    num_run: int = 0  # forwards, counted by row; those with a backward count three times
    _kept: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.host, self.groups, short = choose(self.host, self.tried, self.prefer, self.apart)
        if self.is_tight:
            del self.groups[2:]
        self.unions = [(0, 1), (0, 2)][: len(self.groups) - 1]
        # Each short row beside the widest of them: padding may change some rows and not others.
        begin = len(self.groups)
        self.groups += [[row] for row in short]
        self.beside: list[Key] = [(begin, i) for i in range(begin + 1, len(self.groups))]
        if not self.is_tight and short:  # and many at once: a capacity, a share of the hardest
            sizes = [_num_elements(self.inputs((i,))) for i in range(len(self.groups))]
            num = max(3, min(len(short), MANY * max(sizes) // (sizes[begin] or 1)))
            self.beside.append(tuple(range(len(self.groups)))[begin:][-num:])

    def shares(self, keys: list[Key]) -> dict[str, list[float]]:
        """Return each group's share of the union by every counter that adds up over them.

        One that counts padding does not, where one group pads another.
        """
        found = [self.counts(key) for key in keys]
        union = tuple(i for key in keys for i in key)
        shares = {SUM: [1.0] * len(found)}
        for name, total in self.counts(union).items():
            values = [row.get(name.removesuffix(CLAMPED), math.nan) for row in found]
            if math.isclose(sum(values), total if sum(values) else 0.0, rel_tol=1e-12) and total:
                is_clamped = name.endswith(CLAMPED)
                shares[name] = [(max(1.0, n) if is_clamped else n) / total for n in values]
        return dict(sorted(shares.items(), key=lambda item: _rank(item[0])))

    def is_empty(self, name: str) -> bool:
        """Tell whether some of the groups have nothing that this counts."""
        return any(self.counts((i,)).get(name) == 0 for i in range(len(self.groups)))

    def positions(self, key: Key) -> list[int]:
        """Return which rows these are."""
        return [row for i in key for row in self.groups[i]]

    def num(self, key: Key) -> int:
        """Return how many rows these are."""
        return len(self.positions(key))

    def counts(self, key: Key) -> dict[str, float]:
        """Return every counter of these rows."""
        return counts(self.inputs(key), self.num(key))

    def inputs(self, key: Key) -> Any:
        """Return these rows collated, on the host."""
        if ("inputs", key) not in self._kept:
            self._kept["inputs", key] = self.host.take(self.positions(key))
        return self._kept["inputs", key]

    def is_labelled(self, key: Key) -> bool:
        """Tell whether they hold labels of every kind."""
        return all(labels(self.counts(key)))

    def run(self, key: Key, count: float | None) -> Tensor:
        """Return the loss of these rows."""
        self.num_run += self.num(key)
        try:
            return self.loss(self.model, self.inputs(key), count)
        except (RuntimeError, ValueError, IndexError) as error:
            is_known = isinstance(error, GradaccumError) or is_out_of_memory(error)
            if is_known or len(key) > 1 or NEEDS_GRAPH in str(error):
                raise
            raise NotDecomposable(
                f"{self.name} fails on {self.num(key)} of {len(self.host)} rows alone "
                f"({type(error).__name__}: {error})",
                hint="a budget that holds the whole batch",
            ) from error

    def value(self, key: Key, count: float | None) -> float:
        """Return the loss of these rows as a number, run once."""
        if ("value", key, count) not in self._kept:
            self._kept["value", key, count] = self.value_again(key, count)
        return self._kept["value", key, count]

    def value_again(self, key: Key, count: float | None) -> float:
        """Return the loss of these rows as a number, run now."""
        try:
            with torch.no_grad():
                return _number(self.run(key, count), key)
        except RuntimeError as error:
            if NEEDS_GRAPH not in str(error):
                raise
        return _number(self.run(key, count), key)  # it differentiates: a penalty on gradients

    def see(self, key: Key) -> Seen:
        """Return what their loss is made of."""
        if ("seen", key) not in self._kept:
            with watching(self.model) as seen:
                loss = self.run(key, None)
            if seen.router_loss is not None and not slopes(loss, [seen.router_loss])[0].any():
                seen.router_loss = None  # it is told, but not a part of the loss
            self._kept["seen", key] = seen
        return self._kept["seen", key]

    def terms(
        self,
        keys: list[Key],
        count: float | None,
        routing: Routing | None,
        *,
        split: bool,
    ) -> Terms | None:
        """Count what the terms of the loss are divided by over these groups; None without any."""
        if routing is None and not split:
            return None
        return Terms.survey(
            self.model,
            [functools.partial(self.run, key, count) for key in keys],
            [attention_mask(self.inputs(key)) for key in keys],
            routing=routing,
            split=split,
        )

    def gradients(
        self, terms: Terms | None, key: Key, count: float | None, minus: float | None = None
    ) -> tuple[Tensor, Tensor | float]:
        """Return value and gradient of the loss without its terms, and of its terms' share."""
        if terms is None:
            if ("gradient", key, count) not in self._kept:
                loss = self.run(key, count)
                self._kept["value", key, count] = _number(loss, key)
                self._kept["gradient", key, count] = self._taken(loss, key)
            rest, share = self._kept["gradient", key, count], 0.0
        else:
            run = functools.partial(self.run, key, count)
            loss, terms_loss = terms.parts(self.model, run, attention_mask(self.inputs(key)))
            rest, share = self._taken(loss, key, keep=True), self._taken(terms_loss, key)
        if minus is not None:
            less, share_less = self.gradients(terms, key, minus)
            rest, share = rest - less, share - share_less
        return rest, share

    def _taken(self, loss: Tensor, key: Key, *, keep: bool = False) -> Tensor:
        """Return the value of a loss and a sample of its gradient, float64 on the CPU."""
        self.num_run += 2 * self.num(key)
        is_nothing = len(key) == 1 and bool(loss.isnan())  # 0 / 0
        if loss.requires_grad and not is_nothing:
            loss.backward(retain_graph=keep)
        found = [torch.tensor([_number(loss, key)], dtype=torch.float64)]
        for p in self.model.parameters():
            if p.requires_grad:
                step = p.numel() // SAMPLE | 1  # odd, so as not to stay in one column
                grad, p.grad = p.grad, None
                taken = torch.zeros(p.numel()) if grad is None else grad.to_dense().flatten()
                found.append(taken[::step].double().cpu())
        return torch.cat(found)


def _rank(name: str) -> int:
    """Return the order in which counters are preferred: counts, nothing, counts of at least 1."""
    return 1 if name == SUM else 2 if name.endswith(CLAMPED) else 0


def _number(loss: Tensor, key: Key) -> float:
    """Return a loss; of rows without a label, 0 / 0, what it adds to that of others: nothing."""
    value = loss.detach().double().item()
    return 0.0 if math.isnan(value) and len(key) == 1 else value


def choose(
    host: HostBatch, tried: int, prefer: Sequence[int] = (), apart: Sequence[str] = ()
) -> tuple[HostBatch, list[list[int]], list[int]]:
    """Choose a row, two rows and a long row, such that counters differ on them.

    Short rows are cheap, and beside a long one they are padded. Without a label in the first row
    its loss would be 0 / 0; one without in the second group tells rows with a label from rows.

    Returns:
        The rows chosen from, the random numbers of their collator drawn for good; the groups; and
        the short rows, the widest first.
    """
    lengths = [length(example) for example in host]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    near = [row for row in order if lengths[row] <= LONG * lengths[order[len(order) // 2]]]
    within = [row for row in near[:-1] if lengths[row] <= lengths[near[:tried][-1]]]
    prefer = [*prefer, *_extreme(host, within[:: -(-len(within) // SCANNED) or 1])]
    for rows in (list(dict.fromkeys([*prefer, *near[:tried], near[-1]])), order):
        settled = host.settled(rows) if isinstance(host, Listed) else host
        short = list(range(len(rows))) if settled is not host else rows
        found = {row: counts(settled.take([row]), 1) for row in short}
        labelled = [row for row in short if all(labels(found[row]))]
        if len(labelled) > 1:
            break
    names = apart or [name for name in found[short[0]] if not name.startswith("total:")]
    widths = {row: _num_elements(settled.take([row])) for row in short}
    longest = max(short, key=widths.__getitem__)
    best: tuple[int, list[list[int]]] = (-1, [])
    for first in sorted(labelled or short, key=widths.__getitem__)[:4]:
        others = [row for row in dict.fromkeys([*labelled, *short]) if row != first][:tried]
        for pair in itertools.combinations(others, min(2, len(others))):
            if len(labelled) > 1 and not any(row in labelled for row in pair):
                continue
            shares = set()
            for name in names:
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


def _extreme(host: HostBatch, rows: Sequence[int]) -> list[int]:
    """Return the rows whose values have the least and the largest sums, in each leaf."""
    found = {row: counts(host.take([row]), 1) for row in rows}
    names = {name for row in rows for name in found[row] if name.startswith("total:")}
    ends = [
        end(rows, key=lambda row: found[row].get(name, 0.0))
        for name in sorted(names)
        for end in (min, max)
    ]
    return list(dict.fromkeys(ends))[:EXTREME]


def _num_elements(inputs: Any) -> int:
    """Return how large collated inputs are; other rows may be padded by as much."""
    return sum(leaf.numel() for _, leaf in named_leaves(inputs) if isinstance(leaf, Tensor))


def labels(found: Mapping[str, float]) -> list[float]:
    """Return the counts of labels among the counters of some rows."""
    return [
        n
        for name, n in found.items()
        if ("label" in name and name.startswith(("trained:", "shifted:")))
        or ("mask" in name and name.startswith("nonzero:") and not name.endswith("attention_mask"))
        or name.startswith("in_range:")
    ]
