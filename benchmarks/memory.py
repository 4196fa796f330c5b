"""Measure peak memory against the effective batch: it has to be flat.

Each effective batch runs in a process of its own: a few steps of an attached SFTTrainer, the same
examples lengths in every batch, resident memory on the CPU (allocated memory on an accelerator).

    python benchmarks/memory.py --out benchmarks/results/memory.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

from common import publish

SIZES = (32, 256, 2048)


def child(size):
    import datasets
    import torch
    from trl import SFTConfig, SFTTrainer

    import gradaccum
    from gradaccum.cli import embedded

    datasets.disable_progress_bars()
    torch.manual_seed(0)
    pairs = embedded.functions(2048)
    tokenizer = embedded.tokenizer(p["prompt"] + p["completion"] for p in pairs)
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2,
        gradient_accumulation_steps=size // 2, max_steps=max(2, 2048 // size), max_length=256,
        bf16=False, report_to=[], gradient_checkpointing=False, save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1000,
    )  # fmt: skip
    trainer = SFTTrainer(
        embedded.model(tokenizer), args, train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
    )  # fmt: skip
    gradaccum.attach(trainer).train()
    print(json.dumps({"peak_bytes": trainer.accumulation.last.peak_bytes}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", type=int)
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.child:
        return child(options.child)
    # Without this glibc keeps freed memory, and the resident size tells its habits, not ours.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    peaks = {}
    for size in SIZES:
        words = [sys.executable, __file__, "--child", str(size)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
        peaks[size] = json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"]
        print(f"effective batch {size}: {peaks[size] / 2**20:.1f} MiB", flush=True)
    ratio = round(max(peaks.values()) / min(peaks.values()), 4)
    publish({"peak_bytes": peaks, "largest_over_smallest": ratio}, options.out)


if __name__ == "__main__":
    main()
