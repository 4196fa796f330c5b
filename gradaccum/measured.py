"""The objective of a foreign loss: weights that follow from its measured contract.

`contract.py` finds the contract on the first batch. Here it is applied to each effective batch, and
measured again where counters that agreed so far would now give different weights.
"""

import base64
import contextlib
import copy
import dataclasses
import functools
import math
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.batch import HostBatch, Listed
from gradaccum.contract import OWN, Contract, Probe
from gradaccum.counters import CLAMPED, counts, describe
from gradaccum.device import is_out_of_memory
from gradaccum.errors import (
    LESS_MEMORY,
    BadInput,
    DoesNotFit,
    NotDecomposable,
    RankDisagreement,
)
from gradaccum.objective import (
    Number,
    Objective,
    Resolved,
    length,
    scalar,
    shifted_tokens,
    tokens,
)
from gradaccum.reductions import Routing, Terms, attention_mask
from gradaccum.rows import SUM, CountedLoss, Rows
from gradaccum.state import batch_norms, undisturbed, without_dropout
from gradaccum.trees import count_rows, to_device
from gradaccum.types import Micro

Loss = Callable[[nn.Module, Any], Tensor]
Exchange = Callable[[dict[str, Any]], list[dict[str, Any]]]
EXAMPLES = "examples"  # of the effective batch, beside what a contract counts
TRIED = 32  # rows among which to look for some that tell counters apart
# Shares that differ by less are the same: sums of soft labels are 1 but for rounding.
SAME = {"float64": 1e-9, "float32": 5e-7, "low": 5e-7}


@contextmanager
def quiet(model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
    """Run what does not belong to the training, leaving no trace; without dropout if not so."""
    modes = contextlib.nullcontext() if dropout else without_dropout(model)
    with modes, undisturbed(model):
        yield


class Measured:
    """Find out the contract of one loss, on the first batch and where a batch tells more.

    Args:
        loss: Maps model, collated inputs on the host and a count to the loss, shape (). Runs
            several times on the same inputs, so it must not change them.
        name: What the loss is called in messages.
        takes_count: Whether it is given a count at all.
        own_count: Counts what the loss is to be divided by, where that is not the loss's choice;
            None where these inputs hold nothing to count.
        aside: Keeps what runs inside out of the training.
        is_low: The loss is computed in less than its parameters' dtype says (TF32), so that rows
            alone and in a batch differ by rounding. Autocast is noticed.
    """

    def __init__(
        self,
        loss: CountedLoss,
        *,
        name: str = "the loss",
        takes_count: bool = True,
        own_count: Callable[[Any], float | None] | None = None,
        aside: Callable[..., AbstractContextManager[None]] = quiet,
        is_low: bool = False,
    ) -> None:
        self.loss = loss
        self.name = name
        self.takes_count = takes_count
        self.own_count = own_count
        self.aside = aside
        self.is_low = is_low
        self.contract: Contract | None = None
        self._refusal: NotDecomposable | None = None
        self.num_rows = 0  # that measuring has cost, in forwards of one row
        self._num_batches = 0

    def resolve(
        self,
        model: nn.Module,
        host: HostBatch,
        micros: list[Micro],
        inputs: tuple[Any, ...],
        exchange: Exchange,
    ) -> Resolved:
        """Return loss and weight of each micro-batch; see `Objective.resolve`.

        Raises:
            NotDecomposable: No weights give the gradient of the whole batch; it says why.
            BadInput: The loss is not finite on the rows measured.
        """
        before = self.contract
        if _is_due(self._num_batches):
            self.look_again(model, host)
        self._num_batches += 1
        found: Contract | None = self.contract
        refusal: NotDecomposable | None = None
        is_joined, num_odd = False, 0
        for _ in range(8):
            if found is None and refusal is None:
                found, refusal = self._tried(model, host, len(micros))
            own = {
                "contract": None if found is None else dataclasses.asdict(found),
                "is_new": found is not None and found is not before,
                "refusal": "" if refusal is None else refusal.message,
                "counts": self._summed(found, micros, inputs),
            }
            heard = exchange(own)
            refused = [said["refusal"] for said in heard if said["refusal"]]
            num_micros, num_rows = (sum(said["share"][i] for said in heard) for i in (0, 1))
            if refused and num_micros > 1:
                raise refusal or NotDecomposable(f"{refused[0]} (on another rank)")
            try:
                agreed = _agreed(heard)
            except RankDisagreement:
                if is_joined or refused:
                    raise
                # Few rows may fit more than they should: what all rows are measured to be decides.
                (host, is_joined), found = (self._rows_of_all(host, exchange), True), None
                continue
            if refused or (agreed is None and num_rows == 1):
                return self._whole(micros, inputs, float(num_rows))
            if agreed is None and any(said["share"][1] == 1 for said in heard) and not is_joined:
                host, is_joined = self._rows_of_all(host, exchange), True
                continue
            if agreed is None:
                nothing = [self._times(1.0)] * len(micros), [0.0] * len(micros)
                return _resolved(*nothing, {"loss": 0.0}, "trained tokens")
            before = found = agreed
            told = [said["contract"] for said in heard]
            if any(contract is None or restored(contract) != agreed for contract in told):
                continue  # there are ranks that have measured other rows, or none
            totals = _totals(heard)
            odd = self._odd(agreed, totals, model, micros, inputs)
            if len(agreed.counters) == 1 or not any(x["odd"] for x in exchange({"odd": bool(odd)})):
                self.contract = agreed
                return self._resolved(agreed, totals, model, micros, inputs, exchange)
            num_odd += 1
            if num_odd > 1 and not is_joined:  # no rank's own rows tell
                host, is_joined, odd = self._rows_of_all(host, exchange), True, (0,)
            if odd and len(host) > 1:
                try:
                    found = self._told_apart(agreed, model, host, odd)
                except NotDecomposable as error:
                    found, refusal = None, error
        if refusal is not None:
            raise refusal
        assert found is not None, "else it was refused"
        plain = [name for name in found.counters if not name.endswith(CLAMPED)]
        listed = ", or over ".join(map(describe, plain[:3]))
        raise NotDecomposable(
            f"this batch does not tell what {self.name} is a mean over: {listed}",
            hint="shuffle the data, so that its rows differ",
        )

    def _tried(
        self, model: nn.Module, host: HostBatch, num_micros: int
    ) -> tuple[Contract | None, NotDecomposable | None]:
        """Measure the contract; return it, None if these examples do not tell, or a refusal."""
        if len(host) < 2:
            return None, None
        try:
            if num_micros == 1 and (_observed(model) or batch_norms(model)):
                raise NotDecomposable("forwards of a few rows would change the model")
            return self._measure(model, host), None
        except NotDecomposable as error:
            return None, error

    def _told_apart(
        self, contract: Contract, model: nn.Module, host: HostBatch, odd: tuple[int, ...]
    ) -> Contract | None:
        """Measure again, on examples that tell the counters apart."""
        names = contract.counters
        found = self._measure(model, host, tried=TRIED, prefer=odd, apart=names)
        if found is None or replace(found, counters=names) != contract:
            return found
        # What did not fit the rows measured before does not fit now.
        kept = tuple(name for name in found.counters if name in names)
        return replace(found, counters=kept or found.counters)

    def _rows_of_all(self, host: HostBatch, exchange: Exchange) -> HostBatch:
        """Return the examples of all ranks, where none can tell how they are reduced.

        Raises:
            NotDecomposable: They are not listed, or too few all the same.
        """
        own = list(host) if isinstance(host, Listed) else None
        heard = exchange({"rows": base64.b64encode(pickle.dumps(own)).decode()})
        parts = [pickle.loads(base64.b64decode(said["rows"])) for said in heard]
        if not isinstance(host, Listed) or None in parts:
            raise NotDecomposable(
                f"the rows of one rank alone do not tell how {self.name} is reduced",
                hint="give batches as lists of examples, so that those of all ranks can be looked "
                "at; or state it: from_mean(loss, weight=...)",
            )
        rows = [row for part in parts for row in part]
        if len(rows) < 2:
            raise NotDecomposable(f"one example does not tell how {self.name} is reduced")
        return Listed(rows, host.collate)

    def objective(self, *, size: Callable[[Any], int] = length, trim: bool = False) -> Objective:
        """Return the objective whose losses and weights are found out from each batch."""
        loss: Loss = self._times(1.0)
        return Objective(loss, None, size, trim=trim, resolve=self.resolve)

    def look_at(self, model: nn.Module, host: HostBatch) -> None:
        """Measure the contract on this batch if it is not known."""
        if self.contract is None and len(host) > 1:
            self.contract = self._measure(model, host)

    def look_again(self, model: nn.Module, host: HostBatch) -> None:
        """Forget the contract if it does not hold any more: it is then measured again.

        A term may be zero at first and grow: an annealed coefficient, a distance from the first
        weights. This takes a few forwards of short rows; `resolve` does it now and then.
        """
        if self.contract is not None and len(host) > 1:
            with self._probing(model, host, tried=3) as probe:
                if not probe.holds(self.contract):
                    self.contract = None

    def mean_weight(self, inputs: Any, num_rows: int) -> float | None:
        """Return the weight of a batch whose loss was taken without a count; None if unknown."""
        known = self.contract
        if known is None or known.split or known.routing or known.extra or known.is_sum:
            return None
        return self._counts(inputs, num_rows, known.counters).get(known.counters[0])

    def _measure(
        self, model: nn.Module, host: HostBatch, *, tried: int = 8, **chosen: Sequence[Any]
    ) -> Contract | None:
        if self._refusal is not None:  # found once: not asked again at every step
            raise self._refusal
        for is_tight in (False, True):
            try:
                with self._probing(model, host, tried=tried, is_tight=is_tight, **chosen) as probe:
                    return probe.contract()
            except NotDecomposable as refusal:
                self._refusal = refusal
                raise
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).splitlines()[0]
        raise DoesNotFit(
            f"memory ran out while it was measured how {self.name} is reduced, on a few examples "
            f"one at a time: {said}",
            hint=LESS_MEMORY,
        )

    @contextmanager
    def _probing(self, model: nn.Module, host: HostBatch, **chosen: Any) -> Iterator[Probe]:
        gradients = [(p, p.grad) for p in model.parameters()]
        versions = {name: p._version for name, p in model.named_parameters()}
        try:
            for p, _ in gradients:
                p.grad = None
            with self.aside(model):
                rows = Rows(model, self.loss, host, self.name, **chosen)
                own = self.own_count is not None and self.own_count(rows.inputs((0,))) is not None
                probe = Probe(rows, self.takes_count, own, self._precision(model))
                try:
                    with _noticing_autocast(model, probe):
                        yield probe
                finally:
                    self.num_rows += rows.num_run
        finally:
            for p, grad in gradients:
                p.grad = grad
            for name, p in model.named_parameters():
                if p._version != versions[name]:
                    raise BadInput(
                        f"a forward of {self.name} writes into the parameter {name}",
                        hint="run one batch through the model before, if that initialises it",
                    )

    def _precision(self, model: nn.Module) -> str:
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        is_low = self.is_low or any(dtype.itemsize < 4 for dtype in dtypes)
        return "low" if is_low else "float32" if torch.float32 in dtypes else "float64"

    def _whole(self, micros: list[Micro], inputs: tuple[Any, ...], num: float) -> Resolved:
        """Return the loss of one micro-batch that holds the whole effective batch, as it is.

        On another rank than its own there is none.
        """
        if not micros:
            return _resolved([], [], {"loss": num}, "rows")
        count = None if self.own_count is None else self.own_count(inputs[0])
        return _resolved([self._times(num, count=count)], [num], {"loss": num}, "rows")

    def _counts(self, inputs: Any, num_rows: int, names: Collection[str]) -> dict[str, float]:
        found = counts(inputs, num_rows, names)
        if OWN in names and self.own_count is not None:
            found[OWN] = self.own_count(inputs) or 0.0
        return found

    def _summed(
        self, contract: Contract | None, micros: Sequence[Micro], inputs: tuple[Any, ...]
    ) -> dict[str, float]:
        """Return this rank's sums of what a contract counts."""
        if contract is None:
            return {}
        names = {name.removesuffix(CLAMPED) for name in contract.counters}
        extra = () if contract.extra is None else (contract.extra,)
        counted = [
            self._counts(part, len(micro.examples), names.union(extra))
            for micro, part in zip(micros, inputs, strict=True)
        ]
        return {n: math.fsum(row.get(n, 0.0) for row in counted) for n in names.union(extra)}

    def _odd(
        self,
        contract: Contract,
        totals: Mapping[str, float],
        model: nn.Module,
        micros: list[Micro],
        inputs: tuple[Any, ...],
    ) -> tuple[int, ...]:
        """Return some examples to which counters that agreed so far give other weights; or none."""
        if len(contract.counters) == 1 or not micros:
            return ()
        found = self._factors(contract, contract.counters, totals, micros, inputs)
        if _apart([factors for factors, _ in found])[0] <= SAME[self._precision(model)]:
            return ()
        _, most = _apart([num if contract.counted else factors for factors, num in found])
        return micros[most].examples[:TRIED]

    def _factors(
        self,
        contract: Contract,
        names: Sequence[str],
        totals: Mapping[str, float],
        micros: Sequence[Micro],
        inputs: tuple[Any, ...],
    ) -> list[tuple[list[float], list[float]]]:
        """Return by how much the loss of each micro-batch counts, and what is counted in it.

        One pair of lists for each counter. With a count only the sum of all that is counted
        matters, so that stands for each.
        """
        plain = {name: name.removesuffix(CLAMPED) for name in names}
        counted = [
            self._counts(part, len(micro.examples), set(plain.values()))
            for micro, part in zip(micros, inputs, strict=True)
        ]
        found = []
        for name in names:
            num = [row.get(plain[name], 0.0) for row in counted]
            least = 1.0 if plain[name] != name else 0.0
            total = max(least, totals.get(plain[name], 0.0))
            factors = [max(least, n) / (total or 1.0) for n in num]
            if name == SUM or contract.counted:
                factors = [1.0 if name == SUM else total] * len(num)
            found.append((factors, num))
        return found

    def _resolved(
        self,
        contract: Contract,
        totals: Mapping[str, float],
        model: nn.Module,
        micros: list[Micro],
        inputs: tuple[Any, ...],
        exchange: Exchange,
    ) -> Resolved:
        name, rows = contract.counters[0], [float(len(micro.examples)) for micro in micros]
        ((factor, num),) = self._factors(contract, (name,), totals, micros, inputs)
        if contract.extra is not None or contract.routing is not None or contract.split:
            return self._of_terms(contract, totals, model, rows, factor, inputs, exchange)
        count, unit = (1.0 if contract.counted else None), _unit(name)
        all_rows = {"loss": totals[EXAMPLES]}
        is_counted = bool(totals.get(name.removesuffix(CLAMPED)))
        is_left = is_counted and self._is_left(contract, model, num, inputs)
        if contract.is_sum or name.endswith(CLAMPED) or is_left:
            # What has nothing to count adds to the loss all the same, and so must not weigh 0.
            share = [1 / n if n else 1.0 for n in factor] if contract.counted else factor
            losses = [self._times(s * totals[EXAMPLES], count=count) for s in share]
            return _resolved(losses, rows, all_rows, "rows")
        total = {"loss": totals[name.removesuffix(CLAMPED)]}
        if contract.counted:
            return _resolved([self._times(1.0, count=count)] * len(num), num, total, unit)
        return _resolved([self._times(weight) for weight in num], num, total, unit)

    def _is_left(
        self, contract: Contract, model: nn.Module, num: list[float], inputs: tuple[Any, ...]
    ) -> bool:
        """Tell whether micro-batches with nothing to count have a part in a loss that has a count.

        Otherwise what such rows do was measured (`_odd`).
        """
        if not contract.counted:
            return False
        device = next(model.parameters()).device
        for n, part in zip(num, inputs, strict=True):
            if not n:
                with self.aside(model), torch.no_grad():
                    value = self.loss(model, to_device(part, device), 1.0).item()
                if math.isfinite(value) and value:
                    return True
        return False

    def _times(self, factor: float, *, count: float | None = None) -> Loss:
        return lambda model, x: self.loss(model, x, count) * factor

    def _of_terms(
        self,
        contract: Contract,
        totals: Mapping[str, float],
        model: nn.Module,
        rows: list[float],
        factor: list[float],
        inputs: tuple[Any, ...],
        exchange: Exchange,
    ) -> Resolved:
        """Return losses that are each micro-batch's share of the whole loss, times all rows.

        With a count N the loss is S / N + E, and E a mean with the shares a: a (S / (W a) + E) is
        what one micro-batch adds to S / W + the mean of E.
        """
        count: list[float | None] = [None] * len(rows)
        if contract.counted and rows:
            total, factor = factor[0] or 1.0, [1.0] * len(rows)
            if contract.extra is not None:
                found = [
                    self._counts(part, round(n), (contract.extra,))[contract.extra]
                    for part, n in zip(inputs, rows, strict=True)
                ]
                factor = [weight / totals[contract.extra] for weight in found]
            count = [total * share for share in factor]
        terms = self.terms(model, inputs, count, contract.routing, split=contract.split)
        if contract.routing is not None or contract.split:
            terms = terms.added(exchange({"terms": terms.told()}))

        def loss(model: nn.Module, x: Any, i: int) -> Tensor:
            run = functools.partial(self.loss, model, x, count[i])
            rest, share = terms.parts(model, run, attention_mask(x))
            return (rest * factor[i] + share) * totals[EXAMPLES]

        losses = [lambda model, x, i=i: loss(model, x, i) for i in range(len(rows))]
        return _resolved(losses, rows, {"loss": totals[EXAMPLES]}, "rows")

    def terms(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        count: Sequence[float | None],
        routing: Routing | None,
        *,
        split: bool,
    ) -> Terms:
        """Count what the terms of the loss are divided by over these inputs."""
        if routing is None and not split:
            return Terms(None, None, None, None)
        device = next(model.parameters()).device
        repeated = dict(self.contract.repeated) if self.contract is not None else {}
        with self.aside(model, dropout=True):
            return Terms.survey(
                model,
                [
                    functools.partial(self.loss, model, to_device(x, device), n)
                    for x, n in zip(inputs, count, strict=True)
                ],
                map(attention_mask, inputs),
                routing=routing,
                split=split,
                repeated=repeated,
            )


def _is_due(num_batches: int) -> bool:
    """Tell whether to look again after so many: after 1, 2, 4, 8, ... and each 128."""
    return num_batches.bit_count() == 1 or (num_batches > 0 and num_batches % 128 == 0)


def from_mean(
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    weight: str | Callable[[Any], Number] | None = None,
    size: Callable[[Any], int] = length,
    trim: bool = False,
) -> Objective:
    """Return the objective of a loss that is reduced already, such as `model(**micro).loss`.

    By default it is measured on the first batch how: a sum, or a mean over rows, trained tokens or
    another count, several of them, or nothing that micro-batches add up to, which is refused.

    Args:
        loss: Maps model and micro-batch to a tensor of shape (); by default `model(**micro).loss`.
        weight: What the loss is a mean over, where that is known: "rows", "tokens" (labels that are
            not -100), "shifted_tokens" (the same without each row's first, for causal models), or a
            function of the micro-batch, called on the host and again on the device: let it return
            a tensor, not `.item()`. It is believed: a wrong one gives a mean of means.
        size: Maps one example to its cost in memory.
        trim: The loss is the same without padding, so that it may be cut from collated batches.

    Raises:
        BadInput: `weight` is none of these; the model returns no loss.
        NotDecomposable: At the first batch, when no weight gives the gradient of the whole batch.

    Example:
        >>> from gradaccum import Accumulator, Budget
        >>> objective = from_mean(lambda model, x: model(x).square().mean())
        >>> accumulator = Accumulator(nn.Linear(3, 1), objective, budget=Budget(examples=2))
        >>> accumulator.backward(torch.arange(15.0).reshape(5, 3)).weight
        5.0
    """
    mean = loss or _own_loss
    if weight is None:

        def counted(model: nn.Module, inputs: Any, count: float | None) -> Tensor:
            return mean(model, to_device(copy.copy(inputs), next(model.parameters()).device))

        return Measured(counted, takes_count=False).objective(size=size, trim=trim)
    known = {"rows": count_rows, "tokens": tokens, "shifted_tokens": shifted_tokens}
    if isinstance(weight, str) and weight not in known:
        raise BadInput(f"weight={weight!r} is none of {', '.join(known)}, nor a function")
    count = known[weight] if isinstance(weight, str) else weight
    unit = weight.replace("_", " ") if isinstance(weight, str) else "items"
    return Objective(
        lambda model, micro: scalar(mean(model, micro)) * count(micro), count, size, unit, trim
    )


def _own_loss(model: nn.Module, micro: Any) -> Any:
    loss = model(**micro).loss
    if loss is None:
        raise BadInput(
            f"{type(model).__name__} returns no loss for a batch of {', '.join(map(str, micro))}",
            hint="add labels to the batch, or pass a loss",
        )
    return loss


def _resolved(
    losses: Sequence[Loss], weights: Sequence[float], totals: dict[str, float], unit: str
) -> Resolved:
    return Resolved(tuple(losses), tuple({"loss": weight} for weight in weights), totals, unit)


def _agreed(heard: Sequence[Mapping[str, Any]]) -> Contract | None:
    """Return the contract of all ranks, of those measured last; None if no rank has one.

    Raises:
        RankDisagreement: They contradict each other.
    """
    given = [said for said in heard if said["contract"] is not None]
    newest = [said for said in given if said["is_new"]] or given
    contracts = [restored(said["contract"]) for said in newest]
    if not contracts:
        return None
    first, *others = contracts
    for other in others:
        kept = tuple(name for name in first.counters if name in other.counters)
        # Lines that take several means are learnt on the way, not contradicted.
        if not kept or replace(other, counters=kept, repeated=()) != replace(
            first, counters=kept, repeated=()
        ):
            raise RankDisagreement(
                f"ranks measured the loss as {first}, and as {other}",
                hint="from_mean(loss, weight=...) states what it is a mean over",
            )
        first = replace(first, counters=kept)
    return first


def restored(kept: Mapping[str, Any]) -> Contract:
    """Return a contract from what JSON has made of `dataclasses.asdict`."""
    routing = kept["routing"]
    return Contract(
        **{
            **kept,
            "counters": tuple(kept["counters"]),
            "repeated": tuple(map(tuple, kept.get("repeated", ()))),
            "routing": Routing(**routing) if routing else None,
        }
    )


def _totals(heard: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the counts of all ranks in sum, and the number of examples."""
    names = {name for said in heard for name in said["counts"]}
    sums = {n: math.fsum(said["counts"].get(n, 0.0) for said in heard) for n in names}
    return sums | {EXAMPLES: float(sum(said["share"][1] for said in heard))}


def _apart(columns: list[list[float]]) -> tuple[float, int]:
    """Return how far some columns are apart, relative to the first, and in which row most."""
    off = [
        max(abs(n - first) for n in row) / (abs(first) or 1.0)
        for first, *row in zip(*columns, strict=True)
    ]
    most = max(range(len(off)), key=off.__getitem__)
    return off[most], most


def _unit(name: str) -> str:
    return "trained tokens" if name.startswith(("shifted", "trained", OWN)) else describe(name)


@contextmanager
def _noticing_autocast(model: nn.Module, probe: Probe) -> Iterator[None]:
    """Lower the precision of a probe as soon as a module runs under autocast."""

    def note(module: nn.Module, args: Any) -> None:
        if torch.is_autocast_enabled(kind):
            probe.precision = "low"

    kind = next(model.parameters()).device.type
    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observed(model: nn.Module) -> bool:
    return any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
