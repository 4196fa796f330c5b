"""What is minimised: a loss that is a sum, the weight that divides it, the size that it costs.

Here are the objective, what counts, and how what they return is checked and divided. That of causal
language models is in `causal.py`; how a foreign loss is reduced is measured in `contract.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradaccum.errors import BadInput, CountMismatch
from gradaccum.types import IGNORE_INDEX

Number = float | Tensor
Weight = Number | Mapping[str, Number]


@dataclass(frozen=True, slots=True)
class Objective:
    """Join a summed loss with its weight and its cost.

    What `Accumulator.backward` leaves in `.grad` is the gradient of

        sum over micro-batches of loss(model, micro)  /  sum over micro-batches of weight(micro)

    taken separately for each term where `loss` and `weight` return dicts with the same names.

    Args:
        loss: Maps the model and one collated micro-batch on the device to the *sum* of the loss,
            a tensor of shape (), or to `{term: sum}`. Reduce in float32. Where `weight` is None it
            returns `(sum, weight)`, both of shape ().
        weight: Maps one collated micro-batch on the host to what divides the loss (trained
            tokens, rows, ...), or to `{term: weight}`. None: the loss reports it after the
            forward, and the gradients are scaled once, at the end.
        size: Maps one example to its cost in memory (tokens, pixels, 1).
        unit: What the weight counts, for messages.
        trim: The loss is the same without padding, so that it may be cut from collated batches.
        resolve: Finds losses and weights out from the batch itself, in place of the two above; see
            `Measured.resolve`. Called with the model, the batch, the micro-batches, their collated
            inputs, and what exchanges a message with all ranks.
        ready: Adds to a collated micro-batch, still on the host, what the loss would otherwise have
            to ask the device for and wait.
        chunk: Positions that the loss takes at a time, if not all at once.
        leaner: The same loss in less memory and more time, if there is one.

    Example:
        >>> rows = Objective(
        ...     loss=lambda model, micro: (model(micro["x"]) - micro["y"]).square().sum(),
        ...     weight=lambda micro: micro["y"].numel(),
        ...     unit="values",
        ... )
    """

    loss: Callable[[nn.Module, Any], Any]
    weight: Callable[[Any], Weight] | None
    size: Callable[[Any], int] = lambda example: length(example)
    unit: str = "items"
    trim: bool = False
    resolve: Callable[..., "Resolved"] | None = None
    ready: Callable[[Any], Any] = lambda micro: micro
    chunk: int | None = None
    leaner: "Objective | None" = None

    def __post_init__(self) -> None:
        if self.weight is not None and not callable(self.weight):
            raise BadInput(
                f"the weight of an Objective is a function, and this is {self.weight!r:.60}",
                hint='from_mean(loss, weight="rows") takes names',
            )


class Resolved(NamedTuple):
    """Name the loss and the weight of each micro-batch of one effective batch.

    Args:
        losses: A loss for each micro-batch, as in `Objective`.
        weights: Their weights by term.
        totals: The weights of the whole effective batch, on all ranks, by term.
        unit: What the weights count.
    """

    losses: tuple[Callable[[nn.Module, Any], Any], ...]
    weights: tuple[dict[str, float], ...]
    totals: dict[str, float]
    unit: str


def length(example: Any) -> int:
    """Return the tokens of an example: its inputs, and its labels where they are others.

    As many labels as inputs are the labels of these inputs, and cost no more. Without tokens: 1.
    """
    if isinstance(example, (dict, Mapping)):  # dict first: a million of these are asked
        inputs, labels = _num_tokens(example.get("input_ids")), _num_tokens(example.get("labels"))
        return (inputs if labels in (0, inputs) else inputs + labels) or 1
    return 1


def _num_tokens(value: Any) -> int:
    is_sequence = isinstance(value, (list, tuple)) or bool(getattr(value, "ndim", 0))
    return len(value) if is_sequence else 0


def tokens(micro: Any) -> Tensor:
    """Return the number of labels that are not -100, shape (), where the labels are."""
    return (labels_of(micro) != IGNORE_INDEX).sum()


def shifted_tokens(micro: Any) -> Tensor:
    """Return the number of labels that a causal model is trained on, shape ().

    The label at position 0 has no prediction; counting it makes the gradient of short rows too
    small. Labels that the collator has already shifted (`shift_labels`) count as they are.
    """
    if "shift_labels" in micro:
        return (micro["shift_labels"] != IGNORE_INDEX).sum()
    return (labels_of(micro)[..., 1:] != IGNORE_INDEX).sum()


def labels_of(micro: Any) -> Tensor:
    if not isinstance(micro, Mapping) or "labels" not in micro:
        found = ", ".join(map(str, micro)) if isinstance(micro, Mapping) else type(micro).__name__
        raise BadInput(
            f"the micro-batch has no 'labels' to count (it has: {found})",
            hint="add labels (-100 where nothing is trained), or pass another weight",
        )
    if not isinstance(micro["labels"], Tensor):
        raise BadInput(
            f"the labels are a {type(micro['labels']).__name__}, not a tensor",
            hint="pass a list of examples, or tensors of equal length",
        )
    return micro["labels"]


def unweighted(objective: Objective) -> Objective:
    """Return an objective that runs the same loss and counts nothing: what it costs, alone."""

    def loss(model: nn.Module, micro: Any) -> Tensor:
        found = objective.loss(model, micro)
        if isinstance(found, Mapping):
            return torch.stack(list(found.values())).sum()
        return found[0] if isinstance(found, tuple) else found

    return replace(objective, loss=loss, weight=lambda _: 1.0, resolve=None)


def by_term(weight: Any) -> dict[str, float]:
    """Return a weight as `{term: number}`, checked; one without terms is that of "loss"."""
    terms = weight if isinstance(weight, Mapping) else {"loss": weight}
    counted = {}
    for name, value in terms.items():
        try:
            counted[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadInput(f"the weight of {name!r} is {value!r:.60}, not a number") from error
        if not (math.isfinite(counted[name]) and counted[name] >= 0):
            raise BadInput(f"the weight of {name!r} is {value}, not a finite number of at least 0")
    return counted


def shares(loss: Any, weight: dict[str, float], totals: dict[str, float]) -> list[Tensor]:
    """Divide each term's sum by the weight of the whole batch; a term without weight is zero."""
    terms = loss if isinstance(loss, Mapping) else {"loss": loss}
    if terms.keys() != totals.keys():
        raise CountMismatch(
            f"the loss has the terms {sorted(terms)}, the weight has {sorted(totals)}",
            hint="let loss and weight of the objective return dicts with the same names",
        )
    sums = {name: scalar(terms[name]) for name in totals}
    return [
        sums[name] / total if weight[name] else torch.zeros_like(sums[name].detach())
        for name, total in totals.items()
    ]


def sum_and_weight(loss: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the sum and the weight that a loss reports; without weight the sum is zero.

    A weight below zero becomes nan, and with it the loss and the gradients: refusing it would
    have to wait for the device. So does a sum that is not finite and has no weight.
    """
    if not (isinstance(loss, tuple) and len(loss) == 2) or isinstance(loss[0], Mapping):
        raise CountMismatch(
            "the objective has no weight, and its loss does not return (sum, weight)",
            hint="several terms need weights that are known before the forward",
        )
    wide = torch.float32 if device.type == "mps" else torch.float64  # bf16 counts to 256
    weight = torch.as_tensor(loss[1]).detach().to(device, wide)
    if weight.numel() != 1:
        raise BadInput(
            f"the loss reports a weight of shape {tuple(weight.shape)}, and not one number",
            hint="sum it",
        )
    weight = torch.where(weight < 0, torch.nan, weight).reshape(())
    total = scalar(loss[0])
    return total * (weight != 0).to(total), weight


def scalar(loss: Any) -> Tensor:
    """Return a loss as it is if it can be accumulated; otherwise raise BadInput."""
    if not isinstance(loss, Tensor) or loss.ndim:
        kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BadInput(f"the loss has {kind}, and has to be a tensor of shape ()", hint="sum it")
    if loss.dtype is torch.float16:  # what backward begins with, 1 / weight, may be zero in it
        raise BadInput("the loss is float16, which ends at 65,504", hint="sum it in float32")
    return loss
