"""Images: a CNN with GroupNorm and class weights, at an effective batch of 256 images.

python examples/vision.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import gradaccum

# Rare classes weigh more. Then torch's mean divides by the summed weights of the labels, not by
# the number of images, and so does the whole batch: `counted` below.
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 4.0])


def model() -> nn.Module:
    return nn.Sequential(  # BatchNorm would be refused: it couples the images of a micro-batch
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def images(num: int, seed: int = 0) -> torch.utils.data.TensorDataset:
    """Noisy stripes: across, down, or both; the last kind is rare."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), num, replacement=True, generator=g)
    stripes = (torch.arange(16) // 2 % 2).float()
    across, down = stripes[:, None].expand(16, 16), stripes.expand(16, 16)
    kinds = torch.stack([across, down, (across + down) / 2])
    noise = torch.randn(num, 1, 16, 16, generator=g)
    return torch.utils.data.TensorDataset(kinds[labels][:, None] + 0.5 * noise, labels)


def loss(net: nn.Module, micro: list[torch.Tensor]) -> torch.Tensor:
    pixels, labels = micro
    return F.cross_entropy(net(pixels), labels, weight=CLASS_WEIGHTS.to(pixels))


def counted(micro: list[torch.Tensor]) -> torch.Tensor:
    labels = micro[1]
    return CLASS_WEIGHTS.to(labels.device)[labels].sum()


def main(num_steps: int = 12) -> list[float]:
    torch.manual_seed(0)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(images(256 * num_steps), batch_size=256)
    objective = gradaccum.from_mean(loss, weight=counted)
    accumulator = gradaccum.Accumulator(net, objective, budget=gradaccum.Budget(examples=64))
    losses = []
    for batch in loader:  # (pixels, labels), collated
        step = accumulator.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.loss)
        print(step)
    return losses


if __name__ == "__main__":
    main()
