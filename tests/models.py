"""Small models and ragged data that the tests share."""

import torch
import torch.nn.functional as F
from torch import nn

VOCAB = 17


class CausalLM(nn.Module):
    """A causal language model with tied, frozen, partly frozen and unused parameters."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float64, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width, dtype=dtype)
        self.position = nn.Embedding(64, width, dtype=dtype)
        self.qkv = nn.Linear(width, 3 * width, dtype=dtype)
        self.frozen = nn.Linear(width, width, dtype=dtype).requires_grad_(False)
        self.partly = nn.Linear(width, width, dtype=dtype)
        self.partly.weight.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.unused = nn.Parameter(torch.ones(3, dtype=dtype))
        self.head = nn.Linear(width, VOCAB, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None, position_ids=None, **_):
        width = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(width, device=input_ids.device)[None]
        x = self.embed(input_ids) + self.position(position_ids)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mask = torch.ones(width, width, dtype=torch.bool, device=x.device).tril()[None]
        if attention_mask is not None:
            own = torch.eye(width, dtype=torch.bool, device=x.device)
            mask = (mask & attention_mask.bool()[:, None, :]) | own
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(len(x), -1, -1))
        x = x + self.partly(torch.tanh(self.frozen(self.dropout(x))))
        return self.head(x)


def model(seed: int = 0, **kwargs) -> CausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CausalLM(**kwargs)


def example(length: int, masked: int, generator: torch.Generator) -> dict[str, list[int]]:
    ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}


def examples(lengths: list[int], seed: int = 0, masked=lambda length: length // 3) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [example(length, masked(length), generator) for length in lengths]


def collated(batch: list[dict], side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
    """Pad to the longest plus `extra`, with positions that do not depend on the padding."""
    width = max(len(e["input_ids"]) for e in batch) + extra
    out = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
    for e in batch:
        n = len(e["input_ids"])
        for key, row, fill in (
            ("input_ids", e["input_ids"], 0),
            ("labels", e["labels"], -100),
            ("attention_mask", [1] * n, 0),
            ("position_ids", list(range(n)), 0),
        ):
            pad = [fill] * (width - n)
            out[key].append(row + pad if side == "right" else pad + row)
    return {key: torch.tensor(rows) for key, rows in out.items()}


def oracle_loss(net: nn.Module, batch: dict[str, torch.Tensor]):
    """Return the summed token cross entropy of a collated batch and its number of tokens."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = net(**inputs)[:, :-1], batch["labels"][:, 1:]
    keep = labels != -100
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return {"loss": -(picked * keep).sum()}, {"loss": int(keep.sum())}
