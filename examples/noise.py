"""Is this batch size worth it? Watch a loop, ask for advice, and try what it says.

python examples/noise.py
"""

import tempfile

import torch
import torch.nn.functional as F
from torch import nn

import gradaccum
from gradaccum.noise import Branch, advise, branch
from gradaccum.watch import Watch


def noisy_waves(num: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Points of a wave with noise: the smaller the loss, the more the noise drowns the gradient."""
    draw = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(num, 1, generator=draw) - 2
    y = torch.sin(3 * x) + 0.3 * torch.randn(num, 1, generator=draw)
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def loss(model: nn.Module, micro: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(micro["x"]), micro["y"])


def main(num_steps: int = 80, size: int = 32) -> Branch:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    loader = torch.utils.data.DataLoader(noisy_waves(size * num_steps), size, collate_fn=list)

    objective = gradaccum.from_mean(loss, weight="rows")
    accumulator = gradaccum.Accumulator(model, objective, budget=gradaccum.Budget(examples=8))
    folder = tempfile.mkdtemp()  # metrics.jsonl goes here: gradaccum report FOLDER
    with Watch(accumulator, folder, num_steps=num_steps, noise_every=2) as watch:
        for examples in watch.reading(loader):
            step = accumulator.backward(examples)
            optimizer.step()
            optimizer.zero_grad()
            watch.step(step, learning_rate=optimizer.param_groups[0]["lr"])
        print(advise(watch.noise.estimate, size, learning_rate=3e-3, beta2=0.99))

    # The advice is by a theory. The experiment: from here, the same 1,024 examples at both sizes.
    train, held_out = noisy_waves(1024, seed=1), noisy_waves(256, seed=2)
    found = branch(accumulator, optimizer, train, held_out, sizes=(size, 2 * size), repeats=3)
    print(found)
    return found


if __name__ == "__main__":
    main()
