"""Lightning: a LightningModule as it is, its effective batch of 128 run in parts of 500 tokens.

python examples/lightning_module.py
"""

import itertools
import random

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

import gradaccum
from gradaccum.integrations.lightning import attach


class Tagger(LightningModule):
    """Tag each number of a sequence: is it larger than the one before?"""

    def __init__(self, vocab_size: int = 20, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width, padding_idx=0)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def training_step(self, batch, batch_idx):
        logits = self.head(self.rnn(self.embed(batch["input_ids"]))[0])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Print(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        print(module.accumulation.last)


def sequences(num: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    examples = []
    for _ in range(num):
        ids = [rng.randrange(1, 20) for _ in range(rng.randrange(2, 30))]
        rises = [int(b > a) for a, b in itertools.pairwise(ids)]
        examples.append({"input_ids": ids, "labels": [-100, *rises]})
    return examples


def main(max_epochs: int = 4) -> Trainer:
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(sequences(600), batch_size=128, collate_fn=list)
    module = attach(Tagger(), budget=gradaccum.Budget(tokens=500), weight="tokens")
    trainer = Trainer(
        max_epochs=max_epochs,
        gradient_clip_val=1.0,
        callbacks=[Print()],
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return trainer


if __name__ == "__main__":
    main()
