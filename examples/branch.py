"""From a checkpoint of a trainer: would twice the effective batch have been as good?

python examples/branch.py
"""

import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import gradaccum
from gradaccum.cli import embedded
from gradaccum.noise import Branch, branch


def trained(max_steps: int) -> tuple[SFTTrainer, str]:
    """Train for a while, as you do; return the trainer and its last checkpoint."""
    pairs = embedded.functions(limit=500)
    tokenizer = embedded.tokenizer(pair["prompt"] + pair["completion"] for pair in pairs)
    trainer = SFTTrainer(
        model=embedded.model(tokenizer),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_steps=max_steps,
            max_length=128,
            save_steps=max_steps,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(pairs[:400]),
        eval_dataset=Dataset.from_list(pairs[400:]),
        processing_class=tokenizer,
    )
    trainer = gradaccum.attach(trainer)
    trainer.train()
    return trainer, f"{trainer.args.output_dir}/checkpoint-{max_steps}"


def main(max_steps: int = 10, size: int = 8) -> Branch:
    trainer, checkpoint = trained(max_steps)

    trainer.model = AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer.optimizer = None
    optimizer = trainer.create_optimizer()  # with the parameter groups of the run
    optimizer.load_state_dict(torch.load(f"{checkpoint}/optimizer.pt", weights_only=True))
    accumulator = gradaccum.Accumulator(
        trainer.model,
        gradaccum.causal_lm(),
        budget=gradaccum.Budget(tokens=1024),
        collate=trainer.data_collator,
    )
    train, held_out = list(trainer.train_dataset)[:96], list(trainer.eval_dataset)  # tokenised
    found = branch(accumulator, optimizer, train, held_out, sizes=(size, 2 * size), repeats=2)
    print(found)
    return found


if __name__ == "__main__":
    main()
