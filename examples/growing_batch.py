"""An effective batch that grows while you train, from 16 to 64 examples, exact at every step.

python examples/growing_batch.py
"""

import random

import torch
from torch import nn
from torch.utils.data import DataLoader

import gradaccum
from gradaccum.schedule import BatchSchedule


class Model(nn.Module):
    """Predict the next number of a sequence: any module that maps token ids to logits will do."""

    def __init__(self, vocab_size: int = 128, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids, attention_mask=None):  # right padding is no context to a GRU
        return self.head(self.rnn(self.embed(input_ids))[0])


def counting_sequences(num: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    examples = []
    for _ in range(num):
        start, length = rng.randrange(100), rng.randrange(4, 60)
        ids = [(start + i) % 128 for i in range(length)]
        examples.append({"input_ids": ids, "labels": list(ids)})
    return examples


def main() -> list[tuple[int, float]]:
    torch.manual_seed(0)
    model, data = Model(), counting_sequences(800)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    # 16 examples a step, 32 once 160 were trained on, then 64; the learning rate by the root.
    schedule = BatchSchedule(((16, 0), (32, 160), (64, 320)), unit="samples", lr="sqrt")
    lengths = [len(example["input_ids"]) for example in data]
    sampler = gradaccum.EffectiveBatchSampler(data, schedule, costs=lengths)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=list)

    budget = gradaccum.Budget(tokens=512)
    accumulator = gradaccum.Accumulator(model, gradaccum.causal_lm(), budget=budget)
    steps = []
    for examples in loader:
        step = accumulator.backward(examples)
        with schedule.scaled(optimizer, sampler.effective_batch_size):
            optimizer.step()
        optimizer.zero_grad()
        sampler.commit()  # this far, for a checkpoint: sampler.state_dict()
        steps.append((step.num_examples, step.loss))
        print(step)
    return steps


if __name__ == "__main__":
    main()
