"""Unsloth: its LoRA model and SFTTrainer, at an effective batch of 24. Runs on a CPU too.

python examples/unsloth_sft.py
"""

import tempfile

from unsloth import FastLanguageModel  # before transformers and trl, which it changes

# isort: split
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import gradaccum
from gradaccum.cli import embedded


def main(max_steps: int = 5) -> SFTTrainer:
    pairs = embedded.functions(limit=300)  # your own data set goes here
    tokenizer = embedded.tokenizer(pair["prompt"] + pair["completion"] for pair in pairs)
    base = tempfile.mkdtemp()  # a hub id or your own directory goes here
    embedded.model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model, tokenizer = FastLanguageModel.from_pretrained(
        base, max_seq_length=256, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model, r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], lora_dropout=0.0
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=2,
            learning_rate=5e-3,
            max_steps=max_steps,
            max_length=256,
            logging_steps=1,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer = gradaccum.attach(trainer, effective_batch_size=24)
    trainer.train()
    print(trainer.accumulation.last)
    return trainer


if __name__ == "__main__":
    main()
