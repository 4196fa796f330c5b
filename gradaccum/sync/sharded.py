"""Ranks that hold a shard of the model each: FSDP2 (`fully_shard`), and HSDP on a mesh of two axes.

Three ways to accumulate. What is held between micro-batches, for P parameters on W ranks of a shard
group and gradients that are summed in 4 bytes:

    each   micro-batches gather parameters and reduce gradients           4P/W
    once   micro-batches gather parameters, the end reduces gradients     4P
    hold   the beginning gathers parameters, the end reduces gradients    4P, and the parameters

With `hold` nothing is said inside a window: ranks run as many micro-batches as they like, and one
that runs out of memory starts again by itself. With the others all ranks of a shard group run
alike: those with fewer micro-batches add some whose gradients are thrown away, and one that fails
goes on to take part in what the others wait for, until all run the step again. A module that not
all of them run in a forward must then be no group of its own, as with FSDP itself.

No gradient is divided here: losses are, by the weight of the whole batch. Replicas of a shard
(HSDP) are summed once, at the end, in every mode. Gradients are reduced in no less than the dtype
in which they add up. How FSDP2 is made to do all this is `fsdp.py`.
"""

import hashlib
import json
import logging
import os
import pickle
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gradaccum import device as device_memory
from gradaccum.errors import BadInput, NotDecomposable, PeerFailed, RankDisagreement
from gradaccum.sync.alone import AGAIN, Message, OtherQuestions
from gradaccum.sync.fsdp import GATHER, Collective, Groups
from gradaccum.sync.modes import MODES, TEXTS, Mode
from gradaccum.sync.replicated import WAIT, Replicated, collective, fingerprints, gone
from gradaccum.types import amount

END, FAILED = "end", "failed"  # what ranks say in place of their next collective
LESS = "less"  # what a rank says that had no room for "hold"
logger = logging.getLogger(__name__)


class Sharded(Replicated):
    """Add gradients over the ranks that shard a model, replicas of shards, and what is not sharded.

    Args:
        model: Holds modules that went through `fully_shard`.
        mode: As above; None: "hold" where there is memory for it, else "each".

    Raises:
        BadInput: It is sharded in a way that is not known here.
    """

    def __init__(self, model: nn.Module, mode: Mode | None = None) -> None:
        if mode not in (None, *MODES):
            raise BadInput(f"sync={mode!r} is none of {', '.join(map(repr, MODES))}")
        self.groups = Groups(model, self._before, self._after)
        super().__init__()
        self.peers = next(ranks for ranks in self.groups.shards if self.rank in ranks)
        self.mode: Mode | None = mode
        self._stated = mode
        self.restarts_alone = False
        self._note: Message = {}  # goes along with the next message
        self._parameters: list[nn.Parameter] = []
        self._is_open = False  # a window has begun, and has not ended
        self._is_kept = False  # it failed here, and begins again with what it has gathered
        self._is_tight = False  # what only "hold" needs is being allocated
        self._is_running = False  # a micro-batch is
        self._lender: int | None = None  # who lends inputs before the first micro-batch
        self._left = 0  # micro-batches that the shard group still has to run in this window
        self._log: list[Collective] = []  # what this one has run so far
        self._script: list[Collective] | None = None  # what each runs, once one has
        self._script_of: Any = None  # the modes of the model in which it did
        self._name, self._num_windows = "", 0  # of what ranks say in the store

    def exchange(self, message: Message) -> list[Message]:
        self._is_kept = False  # who begins again after this, does so with all others
        if "num_runs" in message:  # a window is about to begin
            if self._script_of != self.groups.modes:
                self._script, self._script_of = None, self.groups.modes
            message = message | {"knows": self._script is not None}
        try:
            heard = super().exchange(message | self._note)
        except PeerFailed:
            self._leave()
            raise
        self._note = {}
        if any(LESS in said for said in heard):
            self.mode, self._script = "each", None
        if not all(said.get("knows", True) for said in heard):
            self._script = None  # who fails follows what others say, or all know it
        return heard

    def fail(self, error: BaseException) -> None:
        try:
            self._leave()
        finally:
            super().fail(error)

    def require_same(self, model: nn.Module) -> None:
        """Raise RankDisagreement if the shards are not those of one model; choose the mode."""
        self._leave()
        named = list(model.named_parameters())
        sharded = [(name, p) for name, p in named if isinstance(p, DTensor)]
        plain = [(name, p) for name, p in named if not isinstance(p, DTensor)]
        form = {name: f"{tuple(p.shape)} {p.dtype} {p.placements}" for name, p in sharded}
        own = [
            {"sync": str(self._stated)} | form | fingerprints(plain),
            fingerprints((name, p.to_local()) for name, p in sharded),  # of replicas of a shard
        ]
        shard = self.peers.index(self.rank)
        digests = [hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in own]
        name = f"gradaccum/{secrets.token_hex(4)}"  # a restarted job may find the store of the last
        heard = self.exchange(
            {"shard": shard, "digests": digests, "fits": self._fits(), "name": name}
        )
        pairs = {(said["shard"], *said["digests"]) for said in heard}
        if len({said["digests"][0] for said in heard}) > 1 or len(pairs) > len(self.peers):
            self._tell_difference(own, shard)
        self._name, fits = heard[0]["name"], all(said["fits"] for said in heard)
        self.mode = self.mode or ("hold" if fits else "each")

    def _tell_difference(self, own: list[dict[str, str]], shard: int) -> None:
        heard = self.exchange({"own": own, "shard": shard})
        for rank, said in enumerate(heard):
            replica = next(i for i, other in enumerate(heard) if other["shard"] == said["shard"])
            for part, other in enumerate((0, replica)):
                mine, its = heard[other]["own"][part], said["own"][part]
                differ = {name for name, _ in mine.items() ^ its.items()}
                if differ:
                    raise RankDisagreement(
                        f"{len(differ)} of {len(mine)} parameters differ between ranks {other} and "
                        f"{rank}, {min(differ)} among them",
                        hint="build the model from one seed or checkpoint on every rank, and shard "
                        "it in the same way",
                    )

    def _fits(self) -> bool:
        """Tell whether "hold" leaves as much memory to micro-batches as it takes."""
        takes = self.groups.held("hold", torch.float32) + self.groups.staged_bytes
        adam = 2 * self.groups.held("each", torch.float32)  # its state may be there, or not
        room = device_memory.available_bytes(self.groups.device)
        if self.groups.device.type == "cpu":  # which the ranks of a machine share
            room //= int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        return 2 * takes + adam <= room

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        if not self._is_kept:
            self._leave()  # a forward without gradients leaves parameters of the root gathered
            self._parameters = super().parameters(model)
        return self._parameters

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def begin(self, parameters: Sequence[nn.Parameter], num_micros: Sequence[int]) -> int:
        assert self.mode is not None, "the ranks have been compared"
        if self._is_kept:
            return 0
        self._leave()
        is_alike = self.mode != "hold"
        self._is_open, self._log, self._num_windows = True, [], self._num_windows + 1
        self._left = max(num_micros[rank] for rank in self.peers)
        self._lender = _lender(num_micros, self.groups.shards) if is_alike else None
        self.groups.begin(self.mode)
        held = amount(self.groups.held(self.mode))
        self.policy = f"sharded, {TEXTS[self.mode]} (held {held})"
        plain = self._plain(parameters)
        if plain:
            super().begin(plain, num_micros)
        else:  # for the numbers that are summed beside gradients
            dtype = torch.promote_types(torch.float32, parameters[0].dtype)
            self._bucket = torch.empty(64, dtype=dtype, device=self.groups.device)
        if is_alike:
            return self._left - num_micros[self.rank]
        self._is_tight = True
        self.groups.gather()
        self._is_tight = False
        return 0

    def _plain(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        return [p for p in parameters if p not in self.groups.owners]

    def borrow(self, inputs: Any) -> Any:
        if self._lender is None:
            return inputs
        given = pickle.dumps(inputs) if self.rank == self._lender else b""
        heard = self.exchange({"lent": len(given)})
        if any(AGAIN in said for said in heard):
            raise OtherQuestions(is_first=False)
        lender, self._lender = self._lender, None
        num = heard[lender]["lent"]
        lent = torch.frombuffer(bytearray(given.ljust(num)), dtype=torch.uint8)
        collective(dist.broadcast, lent, lender, group=self.control)
        return pickle.loads(lent.numpy().tobytes()) if inputs is None else inputs

    @contextmanager
    def micro(self, *, is_filler: bool = False) -> Iterator[None]:
        self._is_running = True
        if self.mode == "hold":
            yield
            self._is_running = False
            return
        self._log = []
        plain = [(p, p.grad) for p in self._plain(self._parameters)] if is_filler else []
        if is_filler:
            self.groups.begin_filler()
        for p, _ in plain:
            p.grad = None
        yield  # where it fails, what is set above tells `abandon` how far it came
        for p, grad in plain:
            p.grad = grad
        self._is_running = self.groups.is_filler = False
        if self._script is None:
            self._say(len(self._log), END)
            self._script = self._log
        elif len(self._log) != len(self._script):
            raise _other_collectives()
        self._log, self._left = [], self._left - 1

    def abandon(self) -> bool:
        self.restarts_alone = is_eased = False
        if not self._is_open:
            return False
        was_running, self._is_running = self._is_running, False
        self.groups.stop(has_failed=True)
        if self.mode == "hold" and was_running:
            self._is_kept = self.restarts_alone = True
            return False
        if self._is_tight and self._stated is None:
            logger.warning("no room for the whole model: gradients are reduced in each micro-batch")
            self._note, is_eased = {LESS: True}, True
        try:
            self._drain()
        finally:
            self._leave()
        return is_eased

    def _drain(self) -> None:
        """Take part in what the shard group still runs in this window, with nothing to add."""
        if len(self.peers) == 1 or self._lender is not None:  # before others have begun to run
            return
        if self.mode == "hold":
            script = [Collective(i, GATHER, 0, "", False) for i in range(len(self.groups.all))]
            self._left = 1
        elif not self._left:
            return
        else:
            self.groups.reshard()
            if self._script is None:
                self._follow()
            script = self._script or []
        rest = script[len(self._log) :]
        for each in rest + script * (self._left - 1):
            self.groups.join(each)

    def _follow(self) -> None:
        """Take part in the first micro-batch of others, by what they say of it in the store.

        Each rank says of every position what it runs there, or that it has come to the end, or
        has failed. Who has failed joins whatever anybody runs. Nothing is left to join where a
        micro-batch has ended, or failed on all ranks.
        """
        others = [rank for rank in self.peers if rank != self.rank]
        log = self._log.copy()
        while True:
            self._say(len(log), FAILED)
            heard = [self._hear(rank, len(log)) for rank in others]
            found = [Collective(*said) for said in heard if isinstance(said, list)]
            if not found:
                break
            self.groups.join(found[0])
            log.append(found[0])
        if END in heard:
            self._script, self._log = log, log.copy()
        else:
            self._left = 0

    def _before(self, what: Collective) -> None:
        """Hear of a collective that is about to run."""
        if not self._is_running or self.mode == "hold":
            return
        at = len(self._log)
        if self._script is None:
            self._say(at, what)
        elif self._script[at : at + 1] != [what]:
            raise _other_collectives()

    def _after(self, what: Collective) -> None:
        self._log.append(what)

    def _say(self, at: int, what: Collective | str) -> None:
        key = f"{self._name}/{self._num_windows}/{self.rank}/{at}"
        _store().set(key, json.dumps(what))

    def _hear(self, rank: int, at: int) -> Any:
        key = f"{self._name}/{self._num_windows}/{rank}/{at}"
        try:
            _store().wait([key], WAIT)
        except RuntimeError as error:
            raise gone(error) from error
        return json.loads(_store().get(key))

    def _leave(self) -> None:
        """Put the model's settings back and its shards in place; drop what is not reduced."""
        self._is_open = self._is_kept = self._is_running = self._is_tight = False
        self._lender = None
        self.groups.end()

    def holds(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        self._is_tight = self.mode == "hold"
        self.groups.reserve()
        self._is_tight = False
        owners = self.groups.owners
        return [
            self.groups.has_gradient(p) if p in owners else p.grad is not None for p in parameters
        ]

    def reduce(
        self, parameters: Sequence[nn.Parameter], used: Sequence[bool], extra: Tensor
    ) -> Tensor:
        wanted = dict(zip(parameters, used, strict=True))
        self.groups.reduce(wanted)
        plain = self._plain(parameters)
        extra = super().reduce(plain, [wanted[p] for p in plain], extra)
        self._leave()
        return extra


def _lender(num_micros: Sequence[int], shards: Sequence[Sequence[int]]) -> int | None:
    """Return who lends inputs, if a rank has to run micro-batches and has none of its own."""
    needed = any(
        0 in (runs := [num_micros[rank] for rank in ranks]) and any(runs) for ranks in shards
    )
    return next(rank for rank, num in enumerate(num_micros) if num) if needed else None


def _other_collectives() -> NotDecomposable:
    return NotDecomposable(
        "micro-batches of this model run different collectives, and ranks have to run alike",
        hint='let every forward run the same modules, or Accumulator(..., sync="hold")',
    )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # torch 2.10, 2.11, 2.13
