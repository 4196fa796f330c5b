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
in which they add up.
"""

import hashlib
import json
import logging
import os
import pickle
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Shard

from gradaccum import device as device_memory
from gradaccum.errors import BadInput, NotDecomposable, PeerFailed, RankDisagreement
from gradaccum.sync.alone import AGAIN, Message, OtherQuestions
from gradaccum.sync.replicated import WAIT, Replicated, collective, fingerprints, gone
from gradaccum.types import amount

Mode = Literal["each", "once", "hold"]
TEXTS = {"each": "reduced in each micro-batch", "once": "reduced once", "hold": "gathered once"}
GATHER, SCATTER = "gather", "scatter"
END, FAILED = "end", "failed"  # what ranks say in place of their next collective
LESS = "less"  # what a rank says that had no room for "hold"
logger = logging.getLogger(__name__)


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


class Collective(NamedTuple):
    """Name one collective of a shard group, in words that hold on all of its ranks.

    Args:
        group: Which of the model's groups of parameters it moves.
        kind: GATHER or SCATTER.
        numel: Elements that each rank puts in.
        dtype: Theirs.
        is_partial: Whether it goes over a part of the shard group, as with a number for
            `reshard_after_forward`.
    """

    group: int
    kind: str
    numel: int
    dtype: str
    is_partial: bool


class Sharded(Replicated):
    """Add gradients over the ranks that shard a model, replicas of shards, and what is not sharded.

    Args:
        model: Holds modules that went through `fully_shard`.
        mode: As above; None: "hold" where there is memory for it, else "each".

    Raises:
        BadInput: It is sharded in a way that is not known here.
    """

    def __init__(self, model: nn.Module, mode: Mode | None = None) -> None:
        if mode not in (None, *get_args(Mode)):
            raise BadInput(f"sync={mode!r} is none of {', '.join(map(repr, get_args(Mode)))}")
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
        try:
            heard = super().exchange(message | self._note)
        except PeerFailed:
            self._leave()
            raise
        self._note = {}
        if any(LESS in said for said in heard):
            self.mode, self._script = "each", None
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
        if self._script_of != self.groups.modes:
            self._script, self._script_of = None, self.groups.modes
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


# Below is all that touches what torch keeps to itself: FSDPState, FSDPParamGroup and FSDPParam, as
# in torch 2.10, 2.11 and 2.13 (torch/distributed/fsdp/_fully_shard). Much of it has public setters;
# none has a getter, and what a window finds has to be put back.
SETTINGS = (
    "reduce_grads",
    "all_reduce_grads",
    "reshard_after_backward",
    "post_forward_mesh_info",
    "gradient_divide_factor",
    "force_sum_reduction_for_comms",
    "_all_gather_comm",
    "_reduce_scatter_comm",
)
FIELDS = (
    "fsdp_params",
    "mesh_info",
    "mp_policy",
    "offload_policy",
    "_all_gather_result",
    "_all_reduce_hook",
    "_init_mp_dtypes",
    "_partial_reduce_output",
    "_post_forward_indices",
    "_reduce_scatter_process_group",
    "_training_state",
    "post_backward",
    *SETTINGS,
)


class Comm:
    """Run FSDP's own all-gather or reduce-scatter of one group, and tell of it.

    It takes the place of the objects that `FSDPModule.set_custom_all_gather` and
    `set_custom_reduce_scatter` set.
    """

    def __init__(self, groups: "Groups", index: int, kind: str, comm: Any) -> None:
        self.groups, self.index, self.kind, self.comm = groups, index, kind, comm

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.comm.allocate(*args, **kwargs)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, **options: Any
    ) -> Any:
        dtype = str(input_tensor.dtype).removeprefix("torch.")
        is_partial = group.size() != len(self.groups.shards[0])
        what = Collective(self.index, self.kind, input_tensor.numel(), dtype, is_partial)
        self.groups.before(what)
        try:
            work = self.comm(
                output_tensor=output_tensor, input_tensor=input_tensor, group=group, **options
            )
        except RuntimeError as error:
            if device_memory.is_out_of_memory(error):
                raise
            raise gone(error) from error
        self.groups.after(what)
        return work


class Groups:
    """Hold the groups of parameters that FSDP2 moves together, and set and read what it keeps.

    Args:
        model: Holds modules that went through `fully_shard`.
        before: Is called with each `Collective` that is about to run.
        after: Is called once it has.

    Attributes:
        shards: Ranks that hold one copy of the model, for each copy.
        owners: What FSDP keeps of each of its parameters.
        modes: What a forward's collectives depend on.
        is_filler: Gradients of this micro-batch are thrown away.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Collective], None],
        after: Callable[[Collective], None],
    ) -> None:
        self.model, self.before, self.after = model, before, after
        sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self.states: list[Any] = list(dict.fromkeys(m._get_fsdp_state() for m in sharded))
        self.all: list[Any] = [group for state in self.states for group in _groups_of(state)]
        self._refuse()
        mesh = self.all[0].mesh_info.mesh.mesh
        self.shards: list[list[int]] = mesh.reshape(-1, mesh.shape[-1]).tolist()
        self.device: torch.device = self.all[0].device
        self.owners: dict[nn.Parameter, Any] = {}
        self.mode = ""
        self.is_filler = False
        self._is_open = False
        self._found: list[tuple[Any, dict[str, Any]]] = []  # settings to be put back
        self._seen: set[Any] = set()  # who got a gradient here, in mode "each"
        self._staged = self._zeros = torch.empty(0)
        self._outputs: dict[Any, Tensor] = {}
        for state in self.states:
            state._lazy_init()  # as the first forward does, at the first that is in no other

    def _refuse(self) -> None:
        """Refuse what is not known to be exact, by name."""
        if not self.all:
            raise BadInput("fully_shard has found no parameters in the model")
        for name in FIELDS:
            if not all(hasattr(group, name) for group in self.all):
                raise BadInput(
                    f"FSDP2 of torch {torch.__version__} has no {name}", hint="torch 2.10 to 2.13"
                )
        self.reshard()  # a forward without gradients leaves some parameters gathered
        names = {p: name for name, p in self.model.named_parameters()}
        world, first = dist.get_world_size(), self.all[0].mesh_info
        for group in self.all:
            mesh = group.mesh_info.mesh
            if not hasattr(group.mesh_info, "shard_process_group"):
                raise BadInput("replicate() reduces on its own", hint="DistributedDataParallel")
            if mesh != first.mesh:
                raise BadInput(f"parts of the model are sharded over {mesh} and {first.mesh}")
            if mesh.size() != world:
                raise BadInput(
                    f"the model is sharded over {mesh.size()} of {world} ranks",
                    hint="fully_shard(..., mesh=init_device_mesh(device, (world,)))",
                )
            if isinstance(group.offload_policy, CPUOffloadPolicy):
                raise BadInput(
                    "CPUOffloadPolicy keeps gradients on the CPU, where they are not summed here",
                    hint="fully_shard without offload_policy, and gradient checkpointing",
                )
            if group._all_reduce_hook is not None:
                raise BadInput("set_all_reduce_hook reduces gradients in a way that is not known")
            for p in group.fsdp_params:
                local = p.sharded_param.to_local()
                kind = (
                    "is sharded by another parallelism as well (a DTensor before fully_shard)"
                    if p.is_dtensor
                    else f"is sharded as {p.fsdp_placement}, not in its first dimension"
                    if p.fsdp_placement != Shard(0)
                    else f"is a {type(local).__name__}, which gathers in its own way"
                    if hasattr(local, "fsdp_pre_all_gather")
                    else ""
                )
                if kind:
                    raise BadInput(f"{names.get(p.sharded_param, 'a parameter')} {kind}")
        known = {p.sharded_param for group in self.all for p in group.fsdp_params}
        for p, name in names.items():
            if isinstance(p, DTensor) and p not in known:
                raise BadInput(f"{name} is a DTensor, and fully_shard has not made it")

    @property
    def replicas(self) -> int:
        """Return how many copies of the model there are."""
        return len(self.shards)

    @property
    def staged_bytes(self) -> int:
        """Return the bytes of the largest group's gradients, from which they are reduced."""
        return max(4 * sum(p.sharded_param.numel() for p in _trained(group)) for group in self.all)

    def held(self, mode: str, least: torch.dtype | None = None) -> int:
        """Return what a rank holds between micro-batches; sums are at least of dtype `least`."""
        total = 0
        for group in self.all:
            for p in group.fsdp_params:
                num, compute = p.sharded_param.numel(), _compute_dtype(group, p)
                wide = _sum_dtype(group, p)
                wide = torch.promote_types(wide, least or wide)
                is_trained = p.sharded_param.requires_grad
                total += held_bytes(
                    mode,
                    num * is_trained,
                    shard_ranks=len(self.shards[0]),
                    reduce_itemsize=wide.itemsize,
                    param_itemsize=compute.itemsize,
                    num_frozen=num * (not is_trained),
                )
        return total

    @property
    def modes(self) -> Any:
        """Return what the collectives of a micro-batch may depend on: all that is on or off."""
        switches = [
            [value for value in vars(module).values() if value is True or value is False]
            for module in self.model.modules()
        ]
        gathers = [(group.post_forward_mesh_info, group.unshard_in_backward) for group in self.all]
        return switches, gathers, [p.requires_grad for p in self.owners]

    def begin(self, mode: str) -> None:
        """Set all up for a window: gradients are summed, and nothing is left of an earlier one."""
        self.stop()
        self.mode, self._is_open, self.is_filler = mode, True, False
        self.owners = {p.sharded_param: p for group in self.all for p in group.fsdp_params}
        self._found = [
            (group, {name: getattr(group, name) for name in SETTINGS}) for group in self.all
        ]
        self._found += [
            (state._state_ctx, {"is_last_backward": state._state_ctx.is_last_backward})
            for state in self.states
        ]
        for state in self.states:
            state._state_ctx.is_last_backward = True
        for i, group in enumerate(self.all):
            group.reduce_grads, group.all_reduce_grads = mode == "each", False
            group.reshard_after_backward = mode != "hold"
            if mode == "hold":
                group.post_forward_mesh_info = None
            group.gradient_divide_factor = 1.0
            group.force_sum_reduction_for_comms = True  # gloo has no other
            group._all_gather_comm = Comm(self, i, GATHER, group._all_gather_comm)
            group._reduce_scatter_comm = Comm(self, i, SCATTER, group._reduce_scatter_comm)
            group.post_backward = self._post_backward(group, group.post_backward)
            # In backward FSDP hands gradients over in the dtype of the parameter, and reduces and
            # keeps them in that of the policy. Sums are to be as wide as in `p.grad_dtype`.
            for p in _trained(group):
                group._orig_dtype = _kept_dtype(p)
                group._reduce_dtype = p.reduce_dtype = _sum_dtype(group, p)

    def end(self) -> None:
        """Put back what `begin` found, with all shards in place."""
        if self._is_open:
            self.stop()
            for holder, settings in self._found:
                vars(holder).update(settings)
            for group in self.all:
                vars(group).pop("post_backward", None)
                group._init_mp_dtypes()
        self._is_open, self.is_filler, self._found = False, False, []
        self._staged, self._zeros, self._outputs = torch.empty(0), torch.empty(0), {}
        self.reshard()

    def stop(self, *, has_failed: bool = False) -> None:
        """Let go of an iteration that failed at any place, and of all gradients that are whole.

        `FSDPModule.reset_iter_state`, in torch 2.13, leaves `unsharded_accumulated_grad` and the
        gradients of gathered parameters: the next window would have them in its sum. It puts shards
        in place as well, which `hold` has to do without.
        """
        if has_failed and self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()  # what is in flight needs its memory
        for state in self.states:
            state._training_state = type(state._training_state).IDLE
            state._modules_to_run_forward.clear()
            context, comm = state._state_ctx, state._comm_ctx
            context.iter_forward_root = None
            context.post_backward_final_callback_queued = False
            for name in ("post_forward_order", "reduce_scatter_states", "_last_post_reduce_events"):
                getattr(comm, name, []).clear()  # the latter two since 2.13
            for name in ("all_gather_state", "reduce_scatter_state"):  # the latter until 2.12
                if hasattr(comm, name):
                    setattr(comm, name, None)
        for group in self.all:
            group._training_state = type(group._training_state).IDLE
            group._post_forward_indices.clear()
            work = group._all_gather_result and group._all_gather_result.all_gather_work
            if work:
                work.wait()
            group._all_gather_result = group._partial_reduce_output = None
            group._post_reduce_event = group._all_reduce_state = None
            group._reshard_after_forward_event = None
            for p in group.fsdp_params:
                _drop_gradient(p)
        self._seen.clear()

    def reshard(self) -> None:
        for group in self.all:
            group.reshard()

    def gather(self) -> None:
        """Gather all parameters, to stay until the window ends."""
        for group in self.all:
            group.unshard()
            group.wait_for_unshard()

    def begin_filler(self) -> None:
        """Throw away the gradients of the next micro-batch, even if they are not finite."""
        self.is_filler = True
        for group in self.all:
            for p in _trained(group):
                p.unsharded_accumulated_grad = _take_gradient(p)

    def _post_backward(self, group: Any, original: Callable[..., None]) -> Callable[..., None]:
        """Return what a group runs once its gradients of a backward are there.

        A parameter that has none here may have one on other ranks, which reduce it: with zeros all
        reduce alike. Torch has `set_reduce_scatter_unused_params` for this, since 2.13; who was
        used, and is to have a gradient at the end, it does not tell.
        """

        def post_backward(*unused: Any) -> None:
            for p in _trained(group):
                whole = getattr(p, "_unsharded_param", None)  # None before it was first gathered
                if whole is None:
                    continue
                if self.is_filler:
                    whole.grad = None
                elif whole.grad is not None:
                    self._seen.add(p)
                if self.mode == "each" and whole.grad is None:
                    whole.grad = torch.zeros_like(whole)
            original(*unused)

        return post_backward

    def join(self, what: Collective) -> None:
        """Run one collective with nothing to add: true parameters for others, zero gradients."""
        group, options = self.all[what.group], {}
        if what.kind == GATHER and not what.is_partial:
            given, comm = _shard_of(group), group._all_gather_comm
            over = group.mesh_info.shard_process_group
        else:
            dtype = getattr(torch, what.dtype)
            given = torch.zeros(what.numel, dtype=dtype, device=self.device)
            if what.kind == GATHER:
                comm = group._all_gather_comm
                over = group.post_forward_mesh_info.shard_process_group
            else:
                comm, over = group._reduce_scatter_comm, group._reduce_scatter_process_group
                options = {"op": dist.ReduceOp.SUM}
        num = len(given) // over.size() if options else len(given) * over.size()
        output = comm.allocate((num,), dtype=given.dtype, device=self.device)
        comm(output_tensor=output, input_tensor=given, group=over, **options)

    def has_gradient(self, p: nn.Parameter) -> bool:
        """Tell whether a micro-batch of this rank has given a gradient to one of the parameters."""
        owner = self.owners[p]
        return owner in self._seen if self.mode == "each" else bool(_gradients(owner))

    def reserve(self) -> None:
        """Allocate all that `reduce` needs."""
        most, missing = 0, 0
        for group in self.all:
            trained = _trained(group)
            if not trained or (self.mode == "each" and self.replicas == 1):
                continue
            wide = _sum_dtype(group, trained[0])
            num = sum(p.padded_sharded_param_size.numel() for p in trained)
            if self.mode == "each":
                if group._partial_reduce_output is None:  # no rank of this shard group has run
                    group._partial_reduce_output = torch.zeros(num, dtype=wide, device=self.device)
                continue
            self._outputs[group] = torch.empty(num, dtype=wide, device=self.device)
            most = max(most, num * len(self.shards[0]) * wide.itemsize)
            lacking = [p.sharded_param.numel() for p in trained if not _gradients(p)]
            missing = max([missing, *(num * wide.itemsize for num in lacking)])
        self._staged = torch.empty(most, dtype=torch.uint8, device=self.device)
        self._zeros = torch.zeros(missing, dtype=torch.uint8, device=self.device)

    def reduce(self, wanted: dict[nn.Parameter, bool]) -> None:
        """Leave the sums over all ranks in `.grad` of the parameters that are wanted."""
        for group in self.all:
            trained = _trained(group)
            chosen = [p for p in trained if wanted.get(p.sharded_param)]
            if self.mode == "each" and self.replicas == 1:
                for p in trained:
                    if p not in chosen:
                        p.sharded_param.grad = None  # the zeros that were added for it
                continue
            if not chosen:
                continue
            if self.mode == "each":
                flat, parts = group._partial_reduce_output, trained
            else:
                flat, parts = self._scattered(group, chosen), chosen
            if self.replicas > 1:
                collective(dist.all_reduce, flat, group=group.mesh_info.replicate_process_group)
            begin = 0
            for p in parts:
                own = p.sharded_param
                if p in chosen:
                    size, stride = p.sharded_size, p.contiguous_sharded_stride
                    local = flat.as_strided(size, stride, begin).to(_kept_dtype(p))
                    own.grad = DTensor.from_local(
                        local,
                        own.device_mesh,
                        own.placements,
                        run_check=False,
                        shape=own.shape,
                        stride=own.stride(),
                    )
                begin += p.padded_sharded_param_size.numel()

    def _scattered(self, group: Any, chosen: list[Any]) -> Tensor:
        """Return the sum over a shard group of what this rank keeps of some gradients, flat."""
        wide, num_ranks = _sum_dtype(group, chosen[0]), len(self.shards[0])
        num = sum(p.padded_sharded_param_size.numel() for p in chosen)
        whole = []
        for p in chosen:
            grad, own = _take_gradient(p), p.sharded_param
            whole.append(
                self._zeros.view(wide)[: own.numel()].view(own.shape)
                if grad is None
                else grad.to(wide)
            )
        given = self._staged.view(wide)[: num * num_ranks]
        # Row r has what rank r keeps, padded with zeros: the order in which FSDP itself reduces.
        torch._chunk_cat(whole, 0, num_ranks, out=given.view(num_ranks, num))
        flat = self._outputs.pop(group)[:num]
        over = group._reduce_scatter_process_group
        group._reduce_scatter_comm(
            output_tensor=flat, input_tensor=given, group=over, op=dist.ReduceOp.SUM
        )
        return flat


def _groups_of(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)  # since 2.13
    return [state._fsdp_param_group] * bool(state._fsdp_param_group) if groups is None else groups


def _trained(group: Any) -> list[Any]:
    return [p for p in group.fsdp_params if p.sharded_param.requires_grad]


def _compute_dtype(group: Any, p: Any) -> torch.dtype:
    """Return the dtype of a parameter in a forward, and of its gradients there."""
    own = p.sharded_param.dtype
    return (group.mp_policy.param_dtype or own) if own.is_floating_point else own


def _kept_dtype(p: Any) -> torch.dtype:
    return p.sharded_param.grad_dtype or p.sharded_param.dtype


def _sum_dtype(group: Any, p: Any) -> torch.dtype:
    """Return the dtype in which gradients of a parameter are summed, over time and over ranks."""
    reduce = group.mp_policy.reduce_dtype or _compute_dtype(group, p)
    return torch.promote_types(reduce, _kept_dtype(p))


def _gradients(p: Any) -> list[Tensor]:
    """Return the gradients of a whole parameter: of earlier backwards, and of the last."""
    last = getattr(p, "_unsharded_param", None)  # None before it was first gathered
    found = (p.unsharded_accumulated_grad, None if last is None else last.grad)
    return [grad for grad in found if grad is not None]


def _drop_gradient(p: Any) -> None:
    p.unsharded_accumulated_grad = None
    if hasattr(p, "_unsharded_param"):
        p._unsharded_param.grad = None


def _take_gradient(p: Any) -> Tensor | None:
    """Return the gradient of a whole parameter, which no longer has one."""
    grads = _gradients(p)
    _drop_gradient(p)
    return sum(grads[1:], grads[0]) if grads else None


def _shard_of(group: Any) -> Tensor:
    """Return what this rank puts into the gathering of a group, flat."""
    parts = [part for p in group.fsdp_params for part in p.all_gather_inputs]
    if len({part.dtype for part in parts}) > 1:
        parts = [part.view(torch.uint8) for part in parts]
    return torch.cat(parts)
