"""The ways to accumulate a model that is sharded, and what each holds. Imports no torch."""

from typing import Literal, get_args

Mode = Literal["each", "once", "hold"]
MODES: tuple[Mode, ...] = get_args(Mode)
TEXTS = {"each": "reduced in each micro-batch", "once": "reduced once", "hold": "gathered once"}


def held_bytes(
    mode: str,
    num_parameters: int,
    *,
    shard_ranks: int,
    reduce_itemsize: int,
    param_itemsize: int,
    num_frozen: int = 0,
) -> int:
    """Return the bytes that a rank holds between micro-batches, besides its shard of the model.

    Exact where the first dimension of each parameter is a multiple of `shard_ranks`; other shards
    are padded.

    Args:
        mode: "each", "once" or "hold".
        num_parameters: That are trained.
        shard_ranks: Over which a parameter is sharded, its replicas not counted.
        reduce_itemsize: Bytes of one element of a gradient where gradients are summed.
        param_itemsize: Bytes of one element of a parameter in a forward.
        num_frozen: Parameters that are not trained.

    Example:
        >>> held_bytes("each", 1000, shard_ranks=4, reduce_itemsize=4, param_itemsize=2)
        1000
        >>> held_bytes("hold", 1000, shard_ranks=4, reduce_itemsize=4, param_itemsize=2)
        6000
    """
    gradients = reduce_itemsize * num_parameters
    if mode == "each":
        return gradients // shard_ranks
    whole = param_itemsize * (num_parameters + num_frozen) if mode == "hold" else 0
    return gradients + whole
