"""QLoRA: adapters on a base model in 4 bits, at an effective batch of 24. Runs on a CPU too.

python examples/qlora.py
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import gradaccum
from gradaccum.cli import embedded


def main(max_steps: int = 4) -> SFTTrainer:
    pairs = embedded.functions(limit=300)
    tokenizer = embedded.tokenizer(pair["prompt"] + pair["completion"] for pair in pairs)
    base = tempfile.mkdtemp()  # a hub id or your own directory goes here
    embedded.model(tokenizer).save_pretrained(base)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            max_steps=max_steps,
            max_length=128,
            logging_steps=1,
            gradient_checkpointing=False,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    # Any number: 24 is no multiple that per_device_train_batch_size would have to divide.
    trainer = gradaccum.attach(trainer, effective_batch_size=24)
    trainer.train()
    print(trainer.accumulation.last)
    return trainer


if __name__ == "__main__":
    main()
