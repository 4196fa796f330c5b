"""Ranks that hold the whole model each: messages, then one sum over preallocated buckets.

No wrapper reduces: DistributedDataParallel reduces in the last backward, where a failure of one
rank hangs or kills the others, and needs as many backwards on each (`TRAPS.md`). Here ranks run
windows of their own, of any number of micro-batches, even none.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradaccum.device import is_out_of_memory
from gradaccum.errors import PeerFailed, RankDisagreement
from gradaccum.sync.alone import Alone, Message
from gradaccum.trees import named_leaves

# A rank may be busy for long while the others wait: it recovers, evaluates, compiles. One that is
# killed is noticed at once, since its connections close.
WAIT = timedelta(minutes=30)
BUCKET_BYTES = 25 * 2**20
SHORT = 2048  # bytes of a message that takes one collective; longer ones take another
SCALARS = 8  # numbers beside the gradients for which there is room without another bucket
FAILED = "failed"


class Replicated(Alone):
    """Add the gradients of replicas in float32 or wider.

    Messages go over a gloo group of their own: the device is not waited for, and each wait ends
    after `WAIT`.
    """

    policy = "replicated"

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        control_group()
        self._bucket: Tensor | None = None
        self._flat: dict[nn.Parameter, Tensor] = {}  # gradients that do not lie in one piece

    @property
    def control(self) -> Any:
        """Return the group that messages go over; nothing else holds it."""
        return control_group()

    def exchange(self, message: Message) -> list[Message]:
        heard = self._gather(message)
        failed = {rank: said[FAILED] for rank, said in enumerate(heard) if FAILED in said}
        if failed:
            rank, cause = next(iter(failed.items()))
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise PeerFailed(f"rank {rank} of {self.world}{more} failed in this step: {cause}")
        return heard

    def fail(self, error: BaseException) -> None:
        said = (str(error) or type(error).__name__).splitlines()[0]
        try:
            self._gather({FAILED: f"{type(error).__name__}: {said}"})
        except PeerFailed as gone:  # this rank has an error of its own to raise
            error.add_note(f"and {gone.message}") if hasattr(error, "add_note") else None

    def require_same(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        if device.type != "cpu":  # connections are made now, and not where memory is tight
            dist.all_reduce(torch.zeros(1, device=device))
        own = fingerprints(model.named_parameters())
        digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()
        if len({said["digest"] for said in self.exchange({"digest": digest})}) == 1:
            return
        first, *others = (said["own"] for said in self.exchange({"own": own}))
        for rank, other in enumerate(others, start=1):
            differ = {name for name, _ in first.items() ^ other.items()}
            in_order = zip(first, other, strict=False)
            differ |= {one for one, two in in_order if one != two}
            if differ:
                raise RankDisagreement(
                    f"{len(differ)} of {len(first)} parameters differ between ranks 0 and "
                    f"{rank}, {min(differ)} among them",
                    hint="build the model from one seed or checkpoint on every rank, or wrap it in "
                    "DistributedDataParallel, which sends rank 0's",
                )

    def begin(self, parameters: Sequence[nn.Parameter], num_micros: Sequence[int]) -> int:
        dtype = torch.float32
        self._flat.clear()
        for p in parameters:
            dtype = torch.promote_types(dtype, p.grad_dtype or p.dtype)
        num, device = sum(p.numel() for p in parameters), parameters[0].device
        self.layout = f"{len(parameters)} parameters, {num:,} values of {dtype}"
        num = min(num + 2 * SCALARS * self.world, BUCKET_BYTES // dtype.itemsize)
        bucket = self._bucket
        if bucket is None or (bucket.dtype, bucket.device, len(bucket)) != (dtype, device, num):
            self._bucket = torch.empty(num, dtype=dtype, device=device)
        return 0

    def holds(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        """Tell, and allocate zeros where there is none: in `reduce` nothing may fail."""
        held = super().holds(parameters)
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
            elif not p.grad.is_contiguous():  # channels last
                self._flat[p] = p.grad.detach().reshape(-1)
        return held

    def reduce(
        self, parameters: Sequence[nn.Parameter], used: Sequence[bool], extra: Tensor
    ) -> Tensor:
        assert self._bucket is not None, "the window has begun"
        flats, copies = [], []
        for p, is_used in zip(parameters, used, strict=True):
            if not is_used:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
            flat = self._flat.pop(p, None)
            flat = p.grad.detach().reshape(-1) if flat is None else flat
            flats.append(flat)
            if flat.data_ptr() != p.grad.data_ptr():
                copies.append((p.grad, flat))
        narrow = extra.to(self._bucket.dtype)
        # In two parts and a place for each rank, so that nothing is rounded.
        parts = torch.stack([narrow, (extra - narrow.to(extra)).to(narrow)])
        tail = narrow.new_zeros(self.world, 2, len(extra))
        tail[self.rank] = torch.where(parts.isnan() & ~narrow.isnan(), 0, parts)  # inf - inf
        self._sum([*flats, tail.view(-1)])
        for grad, flat in copies:
            grad.copy_(flat.view(grad.shape))
        return tail.to(extra).sum((0, 1))

    def _sum(self, flats: Sequence[Tensor]) -> None:
        """Add these over ranks, in place, as one stream that is cut into buckets."""
        assert self._bucket is not None, "the window has begun"
        filled, parts = 0, list[tuple[Tensor, Tensor]]()
        for flat in flats:
            begin = 0
            while begin < len(flat):
                num = min(len(flat) - begin, len(self._bucket) - filled)
                parts.append((flat[begin : begin + num], self._bucket[filled : filled + num]))
                begin, filled = begin + num, filled + num
                if filled == len(self._bucket):
                    self._flush(parts, filled)
                    filled, parts = 0, []
        self._flush(parts, filled)

    def _flush(self, parts: list[tuple[Tensor, Tensor]], filled: int) -> None:
        if not filled:
            return
        assert self._bucket is not None, "something is in it"
        own, packed = [list(column) for column in zip(*parts, strict=True)]
        torch._foreach_copy_(packed, own)
        is_cpu = self._bucket.device.type == "cpu"
        collective(dist.all_reduce, self._bucket[:filled], group=self.control if is_cpu else None)
        torch._foreach_copy_(own, packed)

    def _gather(self, message: Message) -> list[Message]:
        """Return the messages of all ranks."""
        given = json.dumps(message).encode()
        heard = self._gathered(given, SHORT)
        longest = max(size for size, _ in heard)
        if longest > SHORT - 8:
            heard = self._gathered(given, longest + 8)
        return [json.loads(text[:size]) for size, text in heard]

    def _gathered(self, given: bytes, room: int) -> list[tuple[int, bytes]]:
        said = len(given).to_bytes(8, "big") + given
        own = torch.frombuffer(bytearray(said[:room].ljust(room)), dtype=torch.uint8)
        heard = torch.empty(self.world, room, dtype=torch.uint8)
        collective(dist.all_gather, list(heard.unbind()), own, group=self.control)
        rows = [bytes(row.tolist()) for row in heard]
        return [(int.from_bytes(row[:8], "big"), row[8:]) for row in rows]


def fingerprints(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return of each tensor what tells it from another: its shape and the sum of its bits.

    Their order is that in which gradients are added, and whether they are trained is a part of it.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    named, sums = list(named), {}
    for name, p in named:
        bits = p.detach().reshape(-1)
        bits = torch.view_as_real(bits).reshape(-1) if bits.is_complex() else bits
        sums[name] = bits.view(kinds[bits.element_size()]).sum(dtype=torch.int64)
    values = torch.stack([s.cpu() for s in sums.values()]).tolist() if sums else []
    pairs = zip(named, values, strict=True)
    return {
        name: f"{tuple(p.shape)} {p.dtype} {p.requires_grad} {value}" for (name, p), value in pairs
    }


def digest(inputs: Any) -> str:
    """Return what tells collated inputs from others; nothing where they hold no dense tensor."""
    leaves = [leaf for _, leaf in named_leaves(inputs) if isinstance(leaf, Tensor)]
    leaves = [leaf for leaf in leaves if leaf.layout == torch.strided]
    found = hashlib.sha256()
    for leaf in leaves:
        bits = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8)
        found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode() + bits.numpy().tobytes())
    return found.hexdigest() if leaves else ""


def warn_of_same(digests: Sequence[str]) -> None:
    """Warn the caller of `backward` if ranks have the same examples: their loader shares none out.

    Args:
        digests: Of each rank's inputs; "" where they are not known.
    """
    ((common, num),) = Counter(filter(None, digests)).most_common(1) or [("", 0)]
    if num > 1:
        first, second = [rank for rank, own in enumerate(digests) if own == common][:2]
        warnings.warn(
            f"{num} ranks, {first} and {second} among them, have the same examples, so that each "
            f"counts {num} times: let each rank have its share of the effective batch, by "
            "gradaccum.EffectiveBatchSampler",
            stacklevel=4,
        )


def collective(function: Any, *args: Any, group: Any) -> None:
    """Run it; raise PeerFailed where another rank is gone, and what fails here as it is.

    The connections of this rank are then closed, so that whoever waits for it is told as well, and
    not only the neighbours of the one that is gone.
    """
    try:
        function(*args, group=group)
        return
    except RuntimeError as error:
        if is_own(error):
            raise
        failure = gone(error)
    if group is not None and group in _controls:
        _controls[1] = None
        dist.destroy_process_group(group)
    del group  # the frames of what is raised keep it open
    raise failure


def is_own(error: BaseException) -> bool:
    """Tell whether a collective has failed by what happened here: memory, or a kernel before it."""
    return is_out_of_memory(error) or isinstance(error, torch.AcceleratorError)


def gone(error: BaseException) -> PeerFailed:
    """Return what to raise where a collective has failed."""
    cause = str(error).strip().splitlines()[0]
    return PeerFailed(
        f"a rank is gone, or said nothing for {WAIT}: {cause}",
        hint="the log of the rank that stopped first has the cause; resume from the last "
        "checkpoint, on any number of ranks",
    )


_controls: list[Any] = []  # the group of all ranks, and the one that was made beside it


def control_group() -> Any:
    """Return the group that messages go over; made once for the job, by all ranks together."""
    if _controls[:1] != [dist.group.WORLD]:
        _controls[:] = [dist.group.WORLD, dist.new_group(backend="gloo", timeout=WAIT)]
    if _controls[1] is None:
        raise PeerFailed("a rank was lost before", hint="start all ranks again")
    return _controls[1]
