"""How much the examples of an effective batch differ in their gradients, by norms of partial sums.

Let `g_k` be what example k adds to the gradient `g` of N examples. The engine runs the batch in
parts that are drawn at random and notes the squared norm of what has been added up after each. Of n
examples drawn out of N it is, in the mean over all draws,

    E |P_n|² = n (N - n) / N (N - 1) * Σ |g_k|²  +  n (n - 1) / N (N - 1) * |g|²

so that each of these norms tells Σ |g_k|², the sum of squares that N backwards of one example each
would have told. Nothing is assumed about the examples, or about how they are packed within a part;
no gradient is stored a second time. What the noise scale makes of it is in `noise/scale.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradaccum.dealing import hashes, upto

PARTS = 2  # what a hash is for, beside those of `sampler.py`
FIRST = 8  # the first part is an eighth: the less, the less the norms vary, the more the examples


def drawn(num: int, *words: int) -> list[list[int]]:
    """Draw parts of a batch: an eighth of its examples, another, a quarter, and half of them.

    Args:
        num: Of examples.
        words: Decide the draw.

    Returns:
        The positions in each part, none of them empty; a single part where there is one example.

    Example:
        >>> [len(part) for part in drawn(32, 1)], [len(part) for part in drawn(3, 1)]
        ([4, 4, 8, 16], [1, 2])
    """
    order = hashes(upto(num), PARTS, *words).argsort(stable=True).tolist()
    ends = sorted({num >> shift for shift in range(FIRST.bit_length())} - {0})
    return [order[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def unpaired(squares: Tensor, nums: Sequence[int]) -> Tensor:
    """Estimate the sum of the squares of all examples from those of partial sums, without bias.

    Args:
        squares: Squared norms of what the examples of the first parts add up to, shape (parts,).
        nums: Examples in them; the last is all.

    Returns:
        Shape (). Each part's estimate counts by how little it varies where examples differ at
        random in many directions: by (N - n) / (N + n).

    Example:
        >>> unpaired(torch.tensor([1.0, 4.0]), [1, 2])  # 1 and 1 are added
        tensor(2.)
    """
    *some, num = nums
    if not some:
        return squares[-1]
    weights = [(num - n) / (num + n) for n in some]
    pairs = num * (num - 1)
    factors, whole = [], 0.0
    for n, weight in zip(some, weights, strict=True):
        share = weight / sum(weights)
        factors.append(share * pairs / (n * (num - n)))
        whole -= share * (n - 1) / (num - n)
    return squares @ squares.new_tensor([*factors, whole])


def sums_of_squares(
    norms: Sequence[Tensor], weights: Tensor, ends: Sequence[tuple[int, int]]
) -> Tensor:
    """Return the sums over examples of squared gradients and of squared weights, shape (2,).

    Args:
        norms: The squared norm of the gradients after each part; none where nothing ran.
        weights: Those of the micro-batches, shape (micros,).
        ends: How many micro-batches and examples there are up to the end of each part.
    """
    if not norms:
        return weights.new_zeros(2)
    squares, (micros, nums) = torch.stack(list(norms)), zip(*ends, strict=True)
    added = weights.to(squares).cumsum(0)[[end - 1 for end in micros]]
    return torch.stack([unpaired(squares, nums), unpaired(added.square(), nums)])


def square_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the squared norm of all gradients together, shape (), float64 where there is such."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for grad in gradients:
        dense = grad.coalesce().values() if grad.is_sparse else grad
        kinds.setdefault(torch.promote_types(grad.dtype, torch.float32), []).append(dense)
    norms = [
        norm for dtype, same in kinds.items() for norm in torch._foreach_norm(same, 2, dtype=dtype)
    ]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    wide = torch.float32 if norms[0].device.type == "mps" else torch.float64
    return torch.stack([norm.to(wide) for norm in norms]).square().sum()
