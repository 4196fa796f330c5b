"""accelerate: a prepared model, mixed precision and a scheduler, at an effective batch of 48.

python examples/accelerate_loop.py
"""

import random

import torch
from accelerate import Accelerator
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
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=num_steps)
    # Whole effective batches. Prepared or not, they are right; left out here, since `prepare`
    # would move all of a batch to the device at once, where the accumulator moves its parts.
    loader = torch.utils.data.DataLoader(
        repetitions(48 * num_steps), batch_size=48, collate_fn=list
    )
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)

    accumulator = gradaccum.Accumulator(
        net,
        gradaccum.from_mean(weight="shifted_tokens"),  # net(**micro).loss, what it is a mean over
        budget=gradaccum.Budget(tokens=512),
        backward=backward_of(accelerator),
    )
    losses = []
    for batch in loader:
        step = accumulator.backward(batch)  # was: with accelerator.accumulate(net): ...
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(step.loss)
        accelerator.print(step)
    return losses


if __name__ == "__main__":
    main()
