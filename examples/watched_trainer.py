"""TRL: an SFTTrainer whose effective batch grows, with a live view, metrics and a report.

python examples/watched_trainer.py
"""

import tempfile
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import gradaccum
from gradaccum.cli import embedded
from gradaccum.integrations.watching import Watching


def main(max_steps: int = 8) -> Path:
    pairs = embedded.functions(limit=300)  # prompt and completion; your own data set goes here
    tokenizer = embedded.tokenizer(pair["prompt"] + pair["completion"] for pair in pairs)
    folder = Path(tempfile.mkdtemp())
    trainer = SFTTrainer(
        model=embedded.model(tokenizer),
        args=SFTConfig(
            output_dir=str(folder),
            learning_rate=1e-3,
            max_steps=max_steps,
            max_length=128,
            logging_steps=1,
            disable_tqdm=True,  # the live view shows more
            bf16=False,
            report_to=[],  # "tensorboard", "wandb", ...: they get gradaccum/... as well
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer = gradaccum.attach(trainer, effective_batch_size="8:0,16:4")  # 16 from step 4 on
    trainer.add_callback(Watching(trainer))
    trainer.train()
    print(f"gradaccum report {folder}")
    return folder


if __name__ == "__main__":
    main()
