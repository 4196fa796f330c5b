"""Pack what goes through the body of a transformers model, and unpack what comes out of it.

Tested with transformers 5.17 and 5.23. While a micro-batch runs, forward and backward, the body's
`forward` is ours and its attention is a function of ours in transformers' own registry; both are
put back afterwards. Of bodies whose tokens see those behind them as well (BERT), the encoder runs
packed, between embeddings and pooler. A body that wants anything but tokens and their mask runs as
it is.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradaccum.compiled import is_compiled
from gradaccum.modules import having
from gradaccum.packing.attention import Attention, Unpackable
from gradaccum.packing.plan import NOTHING_SHARED, SHARED, Plan, plan
from gradaccum.trees import to_device

logger = logging.getLogger(__name__)
NAME = "gradaccum_packed"  # of our attention, in the registry of transformers


class Packed:
    """Run the micro-batches of one model packed.

    Args:
        model: Any module with a transformers model inside.
        shared: Tokens that rows have to begin with alike before they are run once, where tokens
            see those before them alone.

    Raises:
        Unpackable: There is none, or it is compiled.
    """

    def __init__(self, model: nn.Module, *, shared: int = SHARED) -> None:
        self.body = _body(model)
        sees_all = _sees_all(self.body)
        self.encoder = _encoder(self.body) if sees_all else None
        self.shared: int | None = NOTHING_SHARED if sees_all else shared  # None: given up
        self.num_run = 0  # tokens that ran packed so far
        self.dtype: torch.dtype | None = None  # of the values that attention was given last

    @contextmanager
    def running(self, inputs: Any, moved: Any) -> Iterator[None]:
        """Pack the forward of a micro-batch inside, which has to run its backward inside as well.

        Args:
            inputs: The collated micro-batch, on the host.
            moved: The same on the device, as the loss is given it.
        """
        found = _planned(inputs, self.shared) if self.shared is not None else None
        if found is None:
            yield
            return
        attention = self.body.config._attn_implementation
        run = _Run(self, *found, moved["input_ids"], self.body.forward)
        ALL_ATTENTION_FUNCTIONS.register(NAME, run.attend)
        try:
            with having(self.body, run.forward):
                yield
        finally:
            self.body.config._attn_implementation = attention

    def by_another_kernel(self) -> AbstractContextManager[None]:
        """Run attention of padded micro-batches inside as the model would not by itself."""
        own = self.body.config._attn_implementation
        return _attending(self.body, "sdpa" if own == "eager" else "eager")


class _Run:
    """Hold what one micro-batch runs by.

    Args:
        packed: Of whose body.
        plan: How it is packed.
        ids_BT: Its tokens on the host.
        moved_BT: Its tokens on the device.
        inner: The body's own forward.
    """

    def __init__(
        self, packed: Packed, plan: Plan, ids_BT: Tensor, moved_BT: Tensor, inner: Any
    ) -> None:
        self._packed, self._plan, self._inner = packed, plan, inner
        self._ids_BT, self._moved_BT = ids_BT, moved_BT
        self._attention = Attention(plan.segments)

    def forward(self, *args: Any, **given: Any) -> Any:
        """Run the body packed if it is given what was planned, else as it is."""
        named = dict(zip(inspect.signature(self._inner).parameters, args, strict=False)) | given
        ids = named.get("input_ids")
        if ids is None or not self._is_planned(ids) or not _is_plain(named):
            return self._inner(*args, **given)
        try:
            found = self._embedded(named) if self._packed.encoder else self._whole(named)
        except Unpackable as error:  # what it was not given when it was tried
            logger.warning("micro-batches run padded from now on: %s", error)
            self._packed.shared = None
            return self._inner(**named)
        self._packed.num_run += self._plan.num_tokens
        return found

    def _whole(self, given: dict[str, Any]) -> Any:
        """Run all of the body packed."""
        if given.get("token_type_ids") is not None:
            raise Unpackable("the body is given token_type_ids")
        indices = self._plan.source_S, self._plan.position_S
        source, position = to_device(indices, given["input_ids"].device)
        packed = {
            "input_ids": given["input_ids"].flatten().index_select(0, source)[None],
            "attention_mask": None,
            "position_ids": position[None],
            "use_cache": False,
        }
        with _attending(self._packed.body, NAME):
            found = self._inner(**(given | packed))
        return self._unpacked(found)

    def _embedded(self, given: dict[str, Any]) -> Any:
        """Run the encoder packed, and what is before and behind it as it is: it is cheap."""
        encoder = self._packed.encoder
        assert encoder is not None, "it was looked for"
        inner = encoder.forward

        def forward(hidden_states: Tensor, attention_mask: Any = None, **others: Any) -> Any:
            if hidden_states.shape[:2] != self._plan.shape or not _is_plain(others):
                raise Unpackable("the encoder is given more than the tokens of the body")
            source = to_device(self._plan.source_S, hidden_states.device)
            packed = hidden_states.flatten(0, 1).index_select(0, source)[None]
            with _attending(self._packed.body, NAME):
                found = inner(packed, attention_mask=None, **others)
            return self._unpacked(found)

        with having(encoder, forward):
            found = self._inner(**given)
        _require_only(found, "last_hidden_state", "pooler_output")
        return found

    def _unpacked(self, found: Any) -> Any:
        """Put the tokens that ran back to where they came from."""
        _require_only(found, "last_hidden_state")
        hidden_1SD: Tensor = found["last_hidden_state"]
        if hidden_1SD.requires_grad:  # gradient checkpointing runs its layers again, in backward
            hidden_1SD.register_hook(self._before_backward)
        target = to_device(self._plan.target_N, hidden_1SD.device)
        hidden_BTD = hidden_1SD[0].index_select(0, target).view(*self._plan.shape, -1)
        found["last_hidden_state"] = hidden_BTD
        return found

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        """Be the attention of the body, as transformers calls it."""
        if mask is not None or query.shape[2] != self._plan.num_tokens:
            raise Unpackable("the body makes an attention mask of its own")
        self._packed.dtype = value.dtype
        return self._attention(module, query, key, value, **given), None

    def _before_backward(self, grad: Tensor) -> None:
        self._packed.body.config._attn_implementation = NAME

    def _is_planned(self, ids: Tensor) -> bool:
        """Tell whether these are the tokens of the plan, without asking the device."""
        if ids.shape != self._ids_BT.shape:
            return False
        is_same = ids.data_ptr() == self._moved_BT.data_ptr()  # alive, so that no other has it
        return is_same or (ids.device.type == "cpu" and torch.equal(ids, self._ids_BT))


@contextmanager
def _attending(body: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the body's attention be that of this name inside."""
    attention = body.config._attn_implementation
    body.config._attn_implementation = name
    try:
        yield
    finally:
        body.config._attn_implementation = attention


def _planned(inputs: Any, shared: int) -> tuple[Plan, Tensor] | None:
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.device.type != "cpu":
        return None
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        return None  # one for each pair of tokens
    found = plan(ids, mask, shared=shared)
    return None if found is None else (found, ids)


def _is_plain(given: dict[str, Any]) -> bool:
    """Tell whether a body is given tokens, kinds and mask alone, and switches or numbers."""
    return given.get("return_dict") is not False and all(
        name in ("input_ids", "attention_mask", "token_type_ids")
        or value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, Tensor) and not value.ndim)
        for name, value in given.items()
    )


def _require_only(found: Any, *names: str) -> None:
    """Refuse what a body or an encoder returns beside these: nobody would unpack it."""
    if not isinstance(found, dict):
        raise Unpackable(f"it returns a {type(found).__name__}")
    more = [name for name, value in found.items() if value is not None and name not in names]
    if more or "last_hidden_state" not in found:
        raise Unpackable(f"it returns {', '.join(more) or 'no hidden state'}")


def _sees_all(body: PreTrainedModel) -> bool:
    """Tell whether tokens see those behind them as well."""
    found = [m.is_causal for m in body.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return bool(found) and not any(found)


def _encoder(body: PreTrainedModel) -> nn.Module | None:
    """Return what runs between embeddings and pooler, if that is a module of its own."""
    for name in ("encoder", "transformer"):
        found = getattr(body, name, None)
        if isinstance(found, nn.Module):
            names = list(inspect.signature(found.forward).parameters)
            if names[:2] == ["hidden_states", "attention_mask"]:
                return found
    return None


def _body(model: nn.Module) -> PreTrainedModel:
    """Return the body of the first transformers model in there: what comes before its head."""
    if is_compiled(model):
        raise Unpackable("a compiled model")
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    body = getattr(found, "base_model", None)
    if not isinstance(body, PreTrainedModel):
        raise Unpackable("no transformers model")
    return body
