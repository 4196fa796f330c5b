"""The gradient that a first step has to have: float64, one sequence at a time, without padding.

    loss = -sum(log p(label)) / number of labels, over all sequences of the step

It is computed from the weights before the step and from what the loader delivered, apart from
whatever a contender does with it.
"""

import copy
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.dropout import _DropoutNd

from gradaccum.types import IGNORE_INDEX

KEPT = 2**22  # elements of a gradient, every k-th
MOST_PARAMETERS = 200_000_000  # a copy in float32 is kept, and one in float64 is made
MOST_WORK = 2e12  # parameters x tokens: some minutes in float64 on two cores


class Sequence(NamedTuple):
    """Tokens of one sequence and their labels, shape (T,), on the host."""

    ids: Tensor
    labels: Tensor

    @property
    def trained(self) -> int:
        """Return the number of labels that are predicted; the first is no target."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


def sequences(inputs: Any) -> list[Sequence]:
    """Return the sequences of a collated batch, without their padding.

    Where positions begin again within a row, that row holds several.
    """
    ids, labels = inputs["input_ids"].cpu(), inputs["labels"].cpu()
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    found = []
    for number in range(len(ids)):
        kept = torch.ones_like(ids[number], dtype=torch.bool)
        if mask is not None:
            kept = mask[number].cpu().bool()
        row, own = ids[number][kept], labels[number][kept]
        lengths = [len(row)]
        if positions is not None:
            starts = (positions[number].cpu()[kept] == 0).nonzero().flatten().tolist()
            lengths = torch.tensor([*starts, len(row)]).diff().tolist()
        found += map(Sequence, row.split(lengths), own.split(lengths))
    return found


def why_not(trainer: Any) -> str:
    """Return why the first gradient of a trainer is not measured; empty where it is."""
    model, args = trainer.model, trainer.args
    if args.device.type != "cpu":
        return "it is measured on the CPU only"
    if not all(p.is_floating_point() for p in model.parameters()):
        return "the model is quantised"
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
        return "the model is too large for a copy in float64"
    if any(_is_dropping(module) for module in model.modules()):
        return "the model has dropout, whose gradients are random"
    is_plain = args.loss_type == "nll" and not args.label_smoothing_factor
    if not is_plain or args.neftune_noise_alpha or trainer.aux_loss_enabled:
        return "the loss of these flags is not the mean over the tokens alone"
    return ""


def _is_dropping(module: nn.Module) -> bool:
    """Tell whether a module drops anything, as a layer or by a setting that it passes on."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return any("drop" in k and isinstance(v, float) and v > 0 for k, v in vars(module).items())


def kept_gradient(model: nn.Module) -> Tensor:
    """Return every k-th element of the gradient, so that at most about `KEPT` are left."""
    trained = [p for p in model.parameters() if p.requires_grad]
    step = -(-sum(p.numel() for p in trained) // KEPT)
    parts = [p if p.grad is None else p.grad for p in trained]
    scales = [0 if p.grad is None else 1 for p in trained]
    return torch.cat(
        [part.detach().flatten()[::step] * s for part, s in zip(parts, scales, strict=True)]
    )


def error(found: Tensor, model: nn.Module, rows: list[Sequence], shared: Path) -> float:
    """Return the relative error of a gradient from `kept_gradient`.

    Args:
        model: With the weights before the step; it is changed.
        rows: What the step was to be taken on.
        shared: A directory for references: contenders that took the same sequences share one.
    """
    path = shared / f"{_key(model, rows)}.pt"
    if path.exists():
        expected = torch.load(path)
    else:
        expected = _reference(model, rows)
        torch.save(expected, path)
    return float((found.double() - expected).norm() / expected.norm())


def pristine(model: nn.Module) -> nn.Module:
    """Return a copy whose forward is that of its class.

    TRL puts another one on the instance, which would go on running the model it was made for.
    """
    own = copy.deepcopy(model)
    for module in own.modules():
        vars(module).pop("forward", None)
    return own


def _reference(model: nn.Module, rows: list[Sequence]) -> Tensor:
    model.double().train()
    count = sum(row.trained for row in rows)
    for row in rows:
        if row.trained:
            logits_TV = model(input_ids=row.ids[None], use_cache=False).logits[0]
            loss = cross_entropy(
                logits_TV[:-1], row.labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
            )
            (loss / count).backward()
    return kept_gradient(model)


def _key(model: nn.Module, rows: list[Sequence]) -> str:
    """Return a digest of weights and sequences, whatever the order of these."""
    told = sorted(_bytes(row) for row in rows)
    weights = (_bytes([p.detach()]) for p in model.parameters())
    digest = hashlib.blake2b(digest_size=16)
    for part in (*told, *weights):
        digest.update(part)
    return digest.hexdigest()


def _bytes(tensors: Iterable[Tensor]) -> bytes:
    return b"|".join(t.flatten().view(torch.uint8).numpy().tobytes() for t in tensors)
