"""A plain PyTorch loop: an effective batch of 64 ragged sequences under a budget of tokens.

python examples/plain_loop.py
"""

import random

import torch
from torch import nn

import gradaccum


class Model(nn.Module):
    """A small causal language model: any module that maps token ids to logits will do."""

    def __init__(self, vocab_size: int = 128, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids, attention_mask=None):  # right padding is no context to a GRU
        return self.head(self.rnn(self.embed(input_ids))[0])


def counting_sequences(num: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Ragged sequences that count upwards; the first half of each is prompt, not trained."""
    rng = random.Random(seed)
    examples = []
    for _ in range(num):
        start, length = rng.randrange(100), rng.randrange(4, 60)
        ids = [(start + i) % 128 for i in range(length)]
        examples.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return examples


def main(num_steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = counting_sequences(64 * num_steps)
    loader = torch.utils.data.DataLoader(data, batch_size=64, collate_fn=list)

    budget = gradaccum.Budget(tokens=512)  # the most that one forward may hold, with padding
    accumulator = gradaccum.Accumulator(model, gradaccum.causal_lm(), budget=budget)
    losses = []
    for examples in loader:
        step = accumulator.backward(examples)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.loss)
        print(step)
    return losses


if __name__ == "__main__":
    main()
