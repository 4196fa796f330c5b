"""Graphs: every node of every graph is classified, under a budget of edges.

python examples/graphs.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import gradaccum


class GraphNet(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.layers = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(3)])
        self.head = nn.Linear(width, 2)

    def forward(self, features: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        x, (source, target) = self.embed(features), edges
        for layer in self.layers:
            heard = torch.zeros_like(x).index_add(0, target, x[source])
            x = x + F.relu(layer(torch.cat([x, heard], 1)))
        return self.head(x)


def trees(num: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random trees of 2 to 40 nodes. A node's class: are most of its neighbours marked?"""
    g = torch.Generator().manual_seed(seed)
    examples = []
    for count in torch.randint(2, 41, (num,), generator=g).tolist():
        child = torch.arange(1, count)
        parent = (torch.rand(count - 1, generator=g) * child).long()
        edges = torch.stack([torch.cat([child, parent]), torch.cat([parent, child])])
        marked = torch.randint(0, 2, (count,), generator=g).float()
        votes = torch.zeros(count).index_add(0, edges[1], 2 * marked[edges[0]] - 1)
        features = torch.stack([marked, torch.ones(count)], 1)
        examples.append({"features": features, "edges": edges, "labels": (votes > 0).long()})
    return examples


def collate(examples: list[dict[str, torch.Tensor]]) -> dict:
    """Put some graphs side by side as one: nodes in a row, edges renumbered."""
    counts = torch.tensor([len(e["labels"]) for e in examples])
    begins = counts.cumsum(0) - counts
    features = torch.cat([e["features"] for e in examples])
    edges = torch.cat([e["edges"] + b for e, b in zip(examples, begins, strict=True)], 1)
    graph = {"features": features, "edges": edges}
    return {"graph": graph, "labels": torch.cat([e["labels"] for e in examples])}


def loss(net: nn.Module, micro: dict) -> torch.Tensor:
    return F.cross_entropy(net(**micro["graph"]), micro["labels"])  # a mean over labelled nodes


def main(num_steps: int = 12) -> list[float]:
    torch.manual_seed(0)
    net = GraphNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(trees(64 * num_steps), 64, collate_fn=list)
    objective = gradaccum.from_mean(loss, weight="tokens", size=lambda e: e["edges"].shape[1])
    budget = gradaccum.Budget(tokens=500)  # in the unit of `size`: edges
    accumulator = gradaccum.Accumulator(net, objective, budget=budget, collate=collate)
    losses = []
    for examples in loader:  # no tensor has graphs as its rows: a list, and a collate function
        step = accumulator.backward(examples)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.loss)
        print(step)
    return losses


if __name__ == "__main__":
    main()
