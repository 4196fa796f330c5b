"""Fabric: a model and optimizer set up by Lightning Fabric, at an effective batch of 64 sequences.

python examples/fabric_loop.py
"""

import random

import torch
from lightning.fabric import Fabric
from torch import nn

import gradaccum


class Model(nn.Module):
    def __init__(self, vocab_size: int = 64, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids, attention_mask=None):  # right padding is no context to a GRU
        return self.head(self.rnn(self.embed(input_ids))[0])


def countdowns(num: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Ragged sequences that count down; the first number is prompt."""
    rng = random.Random(seed)
    examples = []
    for _ in range(num):
        start = rng.randrange(4, 60)
        ids = list(range(start, max(0, start - rng.randrange(3, 50)), -1))
        examples.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return examples


def main(num_steps: int = 12) -> list[float]:
    torch.manual_seed(0)
    fabric = Fabric(devices=1, precision="bf16-mixed")
    net = Model()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    # Not set up by Fabric, which would move all of a batch to the device at once.
    loader = torch.utils.data.DataLoader(countdowns(64 * num_steps), 64, collate_fn=list)

    accumulator = gradaccum.Accumulator(
        model,
        gradaccum.causal_lm(),
        budget=gradaccum.Budget(tokens=512),
        backward=fabric.backward,
    )
    losses = []
    for batch in loader:
        step = accumulator.backward(batch)  # was: with fabric.no_backward_sync(model, ...): ...
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.loss)
        fabric.print(step)
    return losses


if __name__ == "__main__":
    main()
