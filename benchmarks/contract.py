"""What measuring the loss and verifying cost on the embedded default, beside 100 steps.

python benchmarks/contract.py --out benchmarks/results/contract.json

A run of `--steps` steps is timed step by step; the first holds the measurement, later ones what
looks again at steps 1, 2, 4, ... Seconds of 100 steps are 100 medians of those that hold neither.
"""

import argparse
import statistics
import tempfile
import time

import transformers
import trl
from common import publish, timed
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import gradaccum
from gradaccum.cli import embedded
from gradaccum.measured import Measured


class Clock(TrainerCallback):
    """Keep the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **given) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *args, **given) -> None:
        self.seconds.append(time.perf_counter() - self.begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out")
    options = parser.parse_args()
    pairs = embedded.functions(limit=1000)
    tokenizer = embedded.tokenizer(pair["prompt"] + pair["completion"] for pair in pairs)
    measured, looked = timed(Measured, "_measure"), timed(Measured, "look_again")
    clock = Clock()
    trainer = SFTTrainer(
        model=embedded.model(tokenizer),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=16,
            max_steps=options.steps,
            max_length=1024,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer = gradaccum.attach(trainer)
    trainer.train()
    quiet = [s for i, s in enumerate(clock.seconds) if i & (i - 1)]  # neither 0, 1, 2, 4, 8
    hundred = 100 * statistics.median(quiet)
    measuring, looking = sum(measured), statistics.median(looked)
    num_rows = trainer.accumulation.measured.num_rows
    begin = time.perf_counter()
    verdict = gradaccum.verify(trainer)
    figures = {
        "seconds_of_100_steps": hundred,
        "measure_seconds": measuring,
        "measure_percent": 100 * measuring / hundred,
        "look_again_seconds_each": looking,
        "look_again_percent": 8 * 100 * looking / hundred,
        "rows_run": num_rows,
        "rows_of_100_steps": 100 * 32 * 3,
        "verify_seconds": time.perf_counter() - begin,
        "verify_passes": verdict.num_passes,
        "verify_exact": verdict.exact,
    }
    publish(figures, options.out, transformers, trl)


if __name__ == "__main__":
    main()
