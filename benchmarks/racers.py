"""Contenders of `speed.py` beside those of `gradaccum bench`: the loops of other libraries.

    python benchmarks/racers.py "accelerate 2x16" [flags of gradaccum train]

accelerate, lightning: the loop of their documentation, on the batches of the other contenders: the
model's own mean loss of each micro-batch, and a mean over the micro-batches. unsloth: its trainer
for its own copy of the model, in an environment that has it (`speed.py --unsloth PYTHON`).
"""

import contextlib
import sys
import tempfile
from pathlib import Path

if sys.argv[1].startswith("unsloth"):
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the race
        from unsloth import FastLanguageModel  # before all that it changes

import torch
from transformers import set_seed

from gradaccum.bench import Stage
from gradaccum.cli import contenders, train
from gradaccum.cli.arguments import parse
from gradaccum.cli.contenders import Spec, Watch


def micro_batches(trainer, rows):
    """Yield the collated micro-batches of one step after the other."""
    for examples in contenders._batches(trainer):
        given = examples.examples
        for i in range(0, len(given), rows):
            yield dict(trainer.data_collator(given[i : i + rows]))


def of_accelerate(trainer, watch, rows, steps):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model, optimizer = accelerator.prepare(trainer.model.train(), trainer.optimizer)
    for micro in micro_batches(trainer, rows):
        watch.deliver(micro)
        with accelerator.accumulate(model):
            accelerator.backward(model(**micro, use_cache=False).loss)
            if accelerator.sync_gradients:
                watch.keep_gradient()
                accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            watch.done()


def of_lightning(trainer, watch, rows, steps):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = trainer.model.train()

        def training_step(self, batch, batch_idx):
            watch.deliver(batch)  # not before: it reads ahead
            return self.net(**batch, use_cache=False).loss

        def on_before_optimizer_step(self, optimizer):
            watch.keep_gradient()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if (batch_idx + 1) % steps == 0:
                watch.done()

        def configure_optimizers(self):
            return trainer.optimizer

    class Micros(torch.utils.data.IterableDataset):
        def __iter__(self):
            return micro_batches(trainer, rows)

    pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=steps,
        gradient_clip_val=trainer.args.max_grad_norm,
    ).fit(Module(), torch.utils.data.DataLoader(Micros(), batch_size=None))  # fmt: skip


def of_unsloth(arguments, stage, folder, rows, steps):
    own = train._model

    def model(*given):
        plain, tokenizer = own(*given)
        plain.save_pretrained(folder / "model"), tokenizer.save_pretrained(folder / "model")
        return FastLanguageModel.from_pretrained(
            str(folder / "model"), max_seq_length=arguments.training.max_length,
            load_in_4bit=False, full_finetuning=True, dtype=torch.float32,
        )  # fmt: skip

    train._model = model
    contenders._run(Spec("stock", rows, steps), arguments, stage, folder)


def main(words):
    stage = Stage()
    train._quiet()
    name, shape, *_ = words[0].split()
    rows, steps = map(int, shape.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = parse(words[1:])
        if name == "unsloth":
            of_unsloth(arguments, stage, Path(folder), rows, steps)
        trainer = contenders._built(Spec("loop"), arguments, Path(folder))
        watch = Watch(trainer, stage)
        set_seed(arguments.training.seed)
        stage.wait("cpu", {"gradient error": watch.error})
        watch.is_on = True
        {"accelerate": of_accelerate, "lightning": of_lightning}[name](trainer, watch, rows, steps)


if __name__ == "__main__":
    main(sys.argv[1:])
