"""All that touches what torch keeps to itself of FSDP2, for torch 2.10 to 2.13.

That is FSDPState, FSDPParamGroup and FSDPParam (torch/distributed/fsdp/_fully_shard). Much of it
has public setters; none has a getter, and what a window finds has to be put back. Here is how
parameters are gathered and gradients reduced, and how many bytes that holds; when, and what ranks
say to each other, is `sharded.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Shard

from gradaccum.errors import BadInput
from gradaccum.sync.modes import held_bytes
from gradaccum.sync.replicated import collective, gone, is_own

GATHER, SCATTER = "gather", "scatter"
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
            if is_own(error):
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
    def is_hybrid(self) -> bool:
        """Tell whether there is an axis of replicas (HSDP), if only of one: torch reduces so."""
        return hasattr(self.all[0].mesh_info, "replicate_process_group")

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
            if not trained or (self.mode == "each" and not self.is_hybrid):
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
            if self.mode == "each" and not self.is_hybrid:
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
            if self.is_hybrid:
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
        lost = [p for p in self.owners if wanted.get(p) and p.grad is None]
        if lost:  # never a step without them
            raise BadInput(
                f"FSDP2 of torch {torch.__version__} has left no gradient in {len(lost)} "
                "parameters that have one",
                hint='Accumulator(..., sync="once"), and please report the mesh and the versions',
            )

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
