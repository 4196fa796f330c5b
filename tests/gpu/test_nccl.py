"""Every way to add gradients, on one accelerator with its own collectives (NCCL on CUDA).

One rank tells whether they run there: on which device, in which dtype and stream. What several
ranks add up is tested with gloo (tests/distributed).
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradaccum import Accumulator, Budget
from gradaccum.checkpoint import Checkpoints
from gradaccum.sync.replicated import Replicated
from tests import oracle
from tests.distributed import fsdp_scenes as scenes
from tests.gpu.test_cuda import device

pytestmark = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="there is no accelerator"
)
MODES = ["each", "once", "hold"]


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    kind = device().type
    backends = {"cpu": "gloo", kind: dist.get_default_backend_for_device(kind)}
    backend = ",".join(f"{name}:{own}" for name, own in backends.items())
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def net():
    return scenes.Net(dtype=torch.float32).to(device())


def sharded(net, hybrid=False):
    shape, names = ((1, 1), ("replica", "shard")) if hybrid else ((1,), ("shard",))
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=names)
    for part in (*net.blocks, net):
        fully_shard(part, mesh=mesh)
    return net


def error(accumulator, net):
    """Return by how much the gradient of a batch on the host is off the oracle's in float64."""
    plain = scenes.Net(dtype=torch.float64)
    loss = scenes.loss(plain, scenes.rows())
    expected = oracle.gradients(plain, {"loss": loss}, {"loss": scenes.ROWS})
    step = accumulator.backward(scenes.rows(dtype=torch.float32))
    assert step.num_micros >= 8 and step.loss == pytest.approx(loss.item() / scenes.ROWS, rel=1e-5)
    inner = net.module if isinstance(net, DistributedDataParallel) else net
    found = {name: g if g is None else g.cpu() for name, g in scenes.gradients(inner).items()}
    net.zero_grad()
    return oracle.error(found, expected)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_replicas(net, is_wrapped):
    torch.backends.cuda.matmul.allow_tf32 = False
    net = DistributedDataParallel(net, find_unused_parameters=True) if is_wrapped else net
    accumulator = Accumulator(net, scenes.OBJECTIVE, budget=Budget(examples=4))
    accumulator._ranks = Replicated()  # one rank would have nobody to add to
    accumulator._ranks.require_same(net)
    assert max(error(accumulator, net) for _ in range(2)) <= 1e-6


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_sharded(net, mode, hybrid):
    """Then a window in which memory runs out once."""
    net = sharded(net, hybrid)
    accumulator = Accumulator(net, scenes.OBJECTIVE, budget=Budget(examples=4), sync=mode)
    assert error(accumulator, net) <= 1e-6
    scenes.Faulty(net, "middle", {3}, scenes.out_of_memory())
    assert error(accumulator, net) <= 1e-6
    assert error(accumulator, net) <= 1e-6


def test_a_checkpoint_of_shards_goes_on_in_one_piece(net, tmp_path):
    def trained(model, first):
        """Take the steps from `first` to the second; return the weights after it."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        checkpoints = Checkpoints(tmp_path, model=model, optimizer=optimizer)
        assert checkpoints.restore() == first
        accumulator = Accumulator(model, scenes.OBJECTIVE, budget=Budget(examples=4))
        for done in range(first, 2):
            accumulator.backward(scenes.rows(dtype=torch.float32))
            optimizer.step()
            optimizer.zero_grad()
            if done == 0:
                checkpoints.save(1)
        return {name: scenes.full(p).cpu() for name, p in model.named_parameters()}

    plain = copy.deepcopy(net)
    expected = trained(sharded(net), 0)
    found = trained(plain, 1)
    for name, weights in found.items():
        torch.testing.assert_close(weights, expected[name], atol=1e-6, rtol=1e-5)
