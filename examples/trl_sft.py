"""TRL: an SFTTrainer whose effective batch of 32 is accumulated exactly, in one more line.

python examples/trl_sft.py
"""

import tempfile

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import gradaccum
from gradaccum.cli import embedded


def main(max_steps: int = 5) -> SFTTrainer:
    pairs = embedded.functions(limit=500)  # prompt and completion; your own data set goes here
    tokenizer = embedded.tokenizer(pair["prompt"] + pair["completion"] for pair in pairs)
    trainer = SFTTrainer(
        model=embedded.model(tokenizer),  # or "Qwen/Qwen3-0.6B"
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=16,
            learning_rate=1e-3,
            max_steps=max_steps,
            max_length=256,
            logging_steps=1,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer = gradaccum.attach(trainer)  # effective_batch_size=32 from the arguments: 2 x 16
    trainer.train()
    print(trainer.accumulation.last)
    return trainer


if __name__ == "__main__":
    main()
