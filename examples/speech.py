"""Speech: a recognizer with CTC on ragged recordings, under a budget of frames.

python examples/speech.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import gradaccum

SOUNDS = 6  # symbols 1 to 6; 0 is CTC's blank


class Recognizer(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        first, second = (
            nn.Conv1d(SOUNDS, width, 5, padding=2),
            nn.Conv1d(width, width, 5, padding=2),
        )
        self.convolve = nn.ModuleList([first, second])
        self.head = nn.Linear(width, SOUNDS + 1)

    def forward(self, frames_BTF, lengths):
        x = frames_BTF.transpose(1, 2)
        # Convolutions see beyond a recording's end, so padding has to be silent in every layer.
        heard = torch.arange(x.shape[2], device=x.device) < lengths[:, None]
        for layer in self.convolve:
            x = F.relu(layer(x)) * heard[:, None]
        return self.head(x.transpose(1, 2)).log_softmax(-1)


def recordings(num: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Each symbol sounds for 3 to 8 frames; 1 to 12 symbols."""
    g = torch.Generator().manual_seed(seed)
    examples = []
    for count in torch.randint(1, 13, (num,), generator=g).tolist():
        symbols = torch.randint(1, SOUNDS + 1, (count,), generator=g)
        frames = torch.randint(3, 9, (count,), generator=g)
        sounds = F.one_hot(symbols - 1, SOUNDS).float().repeat_interleave(frames, 0)
        noise = 0.3 * torch.randn(sounds.shape, generator=g)
        examples.append({"frames": sounds + noise, "symbols": symbols})
    return examples


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = {}
    for key in ("frames", "symbols"):
        batch[key] = nn.utils.rnn.pad_sequence([e[key] for e in examples], batch_first=True)
        batch[f"num_{key}"] = torch.tensor([len(e[key]) for e in examples])
    return batch


def loss(net: nn.Module, micro: dict[str, torch.Tensor]) -> torch.Tensor:
    scores_TBS = net(micro["frames"], micro["num_frames"]).transpose(0, 1)
    return F.ctc_loss(scores_TBS, micro["symbols"], micro["num_frames"], micro["num_symbols"])


def main(num_steps: int = 12) -> list[float]:
    torch.manual_seed(0)
    net = Recognizer()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(recordings(48 * num_steps), 48, collate_fn=list)
    # ctc_loss divides each recording's loss by its symbols, and takes the mean over recordings.
    objective = gradaccum.from_mean(loss, weight="rows", size=lambda e: len(e["frames"]))
    budget = gradaccum.Budget(tokens=800)  # in the unit of `size`: frames, with padding
    accumulator = gradaccum.Accumulator(net, objective, budget=budget, collate=collate)
    losses = []
    for examples in loader:
        step = accumulator.backward(examples)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.loss)
        print(step)
    return losses


if __name__ == "__main__":
    main()
