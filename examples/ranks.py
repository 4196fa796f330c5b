"""A plain loop on any number of ranks: the same batches, the same gradient, resumed on any other.

python examples/ranks.py --folder runs/one                              # one process
torchrun --nproc-per-node 2 examples/ranks.py --folder runs/two         # the same losses
torchrun --nproc-per-node 3 --max-restarts 3 examples/ranks.py          # goes on if one is killed
"""

import argparse
import itertools
import os

import torch
import torch.distributed as dist
from plain_loop import Model, counting_sequences
from torch import nn

import gradaccum
from gradaccum.checkpoint import Checkpoints, export


def main(folder: str = "runs/ranks", num_steps: int = 20, sharded: bool = False) -> list[float]:
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_torchelastic_launched():
        dist.init_process_group()  # NCCL for GPUs, gloo for CPUs
    torch.manual_seed(0)  # on every rank: they begin with the same weights
    model = Model().to(device)
    if sharded:  # FSDP2; all else is the same
        torch.distributed.fsdp.fully_shard(model.rnn)
        torch.distributed.fsdp.fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    data = counting_sequences(64 * num_steps)
    lengths = [len(example["input_ids"]) for example in data]
    sampler = gradaccum.EffectiveBatchSampler(data, 64, costs=lengths, seed=1)
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=list,
        generator=torch.Generator(),  # else it draws from what dropout draws from, anew on resume
    )
    # In a folder that all ranks see.
    checkpoints = Checkpoints(folder, model=model, optimizer=optimizer, sampler=sampler)
    done = checkpoints.restore()

    budget = gradaccum.Budget(tokens=512)
    accumulator = gradaccum.Accumulator(model, gradaccum.causal_lm(), budget=budget)
    losses = []
    # What this rank has of each effective batch:
    for share in itertools.islice(loader, max(0, num_steps - done)):
        step = accumulator.backward(share)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sampler.commit()  # these examples are done with
        done += 1
        losses.append(step.loss)
        if step.rank == 0:
            print(step)
        if done % 5 == 0:
            checkpoints.save(done)
    export(folder, model)  # model.safetensors
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="runs/ranks")
    parser.add_argument("--sharded", action="store_true")
    main(**vars(parser.parse_args()))
    if dist.is_initialized():
        dist.destroy_process_group()
