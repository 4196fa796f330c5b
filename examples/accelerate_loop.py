"""accelerate: a prepared model, mixed precision and a scheduler, at an effective batch of 48.

python examples/accelerate_loop.py
accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py  # the same batches
"""

import random

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gradaccum
from gradaccum.integrations.accelerate import backward_of


def repetitions(num: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Ragged sequences that repeat a pattern of three tokens; the pattern itself is prompt."""
    rng = random.Random(seed)
    examples = []
    for _ in range(num):
        pattern = [rng.randrange(1, 32) for _ in range(3)]
        ids = pattern * rng.randrange(2, 12)
        examples.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return examples


def model() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_attention_heads=4, **sizes))


def main(num_steps: int = 15) -> list[float]:
    torch.manual_seed(0)
    accelerator = Accelerator(
        mixed_precision="bf16",
        cpu=not torch.cuda.is_available(),
        # A batch is one of all ranks; else each step would step the scheduler once per rank.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=num_steps)
    data = repetitions(48 * num_steps)
    costs = [len(example["input_ids"]) for example in data]
    # This rank's share of each effective batch. Left out of `prepare`, which would move all of it
    # to the device at once, where the accumulator moves its parts.
    sampler = gradaccum.EffectiveBatchSampler(data, 48, costs=costs)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=list)
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)

    accumulator = gradaccum.Accumulator(
        net,
        gradaccum.from_mean(weight="shifted_tokens"),  # net(**micro).loss, what it is a mean over
        budget=gradaccum.Budget(tokens=512),
        backward=backward_of(accelerator),
    )
    losses = []
    for share in loader:
        step = accumulator.backward(share)  # was: with accelerator.accumulate(net): ...
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(step.loss)
        accelerator.print(step)
    return losses


if __name__ == "__main__":
    main()
