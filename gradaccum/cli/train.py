"""`gradaccum train`: fine-tune with TRL's SFTTrainer at a stated effective batch size.

The trainer, its data preparation and its checkpoints are TRL's and transformers'; this checks the
input, attaches the accumulation, says what happens and proves the gradient on one batch.
"""

import json
import platform
import signal
import statistics
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer, get_peft_config, get_quantization_config

from gradaccum.cli import data, embedded
from gradaccum.cli.arguments import Arguments, parse
from gradaccum.cli.progress import Metrics, Progress, StopOnSignal
from gradaccum.errors import BadInput
from gradaccum.integrations.hf import CPU_TOKENS, attach
from gradaccum.objective import causal_lm, length
from gradaccum.split import split
from gradaccum.types import IGNORE_INDEX, Proof

# Above this size the reference of the proof, one pass over the batch, takes its shortest examples.
PROOF_TOKENS = 32_768


def run(words: list[str]) -> int:
    """Train as the flags say and return the exit code."""
    _quiet()
    arguments = parse(words)
    if arguments is None:
        return 0
    resume = _checkpoint(arguments)
    output = _output_directory(arguments, resume)
    arguments.training.output_dir = str(output)
    say("gradaccum train")
    trainer = _trainer(arguments, output)
    stop, metrics = StopOnSignal(), Metrics(trainer.accumulation, output / "metrics.jsonl")
    trainer.add_callback(Progress(trainer.accumulation, _num_samples(trainer)))
    trainer.add_callback(metrics)
    trainer.add_callback(stop)
    _describe(trainer, arguments, output, resume)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        stop.restore()
    if stop.received is not None:
        saved = get_last_checkpoint(str(output))
        say(f"stopped by {signal.Signals(stop.received).name}, saved {saved}")
        say(f"go on with: gradaccum train {_again(words)}--resume_from_checkpoint {saved}")
        return 128 + stop.received
    trainer.save_model(str(output))
    _summarise(trainer, arguments, output, metrics)
    return 0


def say(text: str) -> None:
    """Print a line for a person: on stderr, since stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def _quiet() -> None:
    """Silence what would drown our lines; errors still show."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _checkpoint(arguments: Arguments) -> str | None:
    """Return the checkpoint to resume from."""
    wanted = arguments.training.resume_from_checkpoint
    if not wanted:
        return None
    if str(wanted).lower() in ("last", "true"):
        if "output_dir" not in arguments.given:
            raise BadInput("--resume_from_checkpoint last needs the --output_dir of the run")
        found = Path(str(arguments.training.output_dir))
        last = get_last_checkpoint(str(found)) if found.is_dir() else None
        if last is None:
            raise BadInput(f"there is no checkpoint in {found}")
        return last
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise BadInput(
            f"{wanted} is no checkpoint: it has no trainer_state.json",
            hint="name the directory checkpoint-N inside the output directory of the run",
        )
    return wanted


def _output_directory(arguments: Arguments, resume: str | None) -> Path:
    """Return the directory to write to; it must be new or empty, or that of the resumed run."""
    if "output_dir" in arguments.given:
        output = Path(str(arguments.training.output_dir))
    elif resume is not None:
        output = Path(resume).parent
    else:
        output = Path("gradaccum-runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        if output.is_dir() and any(output.iterdir()) and resume is None:
            last = get_last_checkpoint(str(output))
            raise BadInput(
                f"--output_dir {output} is not empty, and nothing is overwritten",
                hint=f"--resume_from_checkpoint {last}" if last else "choose a new --output_dir",
            )
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"cannot write to --output_dir {output}: {error.strerror}") from error
    return output


def _trainer(arguments: Arguments, output: Path) -> Any:
    """Build the SFTTrainer of the flags, with the accumulation attached."""
    script, training, model_args = arguments.script, arguments.training, arguments.model
    dataset = _dataset(arguments, script.dataset_train_split)
    evaluation = None
    if training.eval_strategy != "no":
        evaluation = _dataset(arguments, script.dataset_test_split)
    model, tokenizer = _model(arguments, output, dataset)
    try:
        trainer = SFTTrainer(
            model=model,
            args=training,
            train_dataset=dataset,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args) if tokenizer is None else None,
            peft_config=get_peft_config(model_args),
        )
    except (OSError, ValueError, ImportError) as error:
        raise BadInput(f"TRL's SFTTrainer refuses this: {_first_line(error)}") from error
    _refuse_untrained(trainer.train_dataset, arguments)
    training.disable_tqdm = True
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return attach(
        trainer, effective_batch_size=arguments.effective_batch_size, budget=arguments.budget
    )


def _dataset(arguments: Arguments, split_name: str) -> Any:
    script = arguments.script
    if script.dataset_name == "embedded":
        say("data      reading the functions of the standard library ...")
        dataset = datasets.Dataset.from_list(embedded.functions())
        return dataset.select(range(64)) if split_name == script.dataset_test_split else dataset
    dataset = data.load(
        str(script.dataset_name),
        split=split_name,
        config=script.dataset_config,
        streaming=script.dataset_streaming,
    )
    data.check_columns(dataset, text_field=arguments.training.dataset_text_field)
    return dataset


def _model(
    arguments: Arguments, output: Path, dataset: Any
) -> tuple[PreTrainedModel | str, PreTrainedTokenizerBase | None]:
    """Return the model (or its name, which TRL loads) and the tokenizer (None: the model's)."""
    training, model_args = arguments.training, arguments.model
    name = str(model_args.model_name_or_path)
    if name == "embedded":
        say("model     training a tokenizer on the data ...")
        tokenizer = embedded.tokenizer(_texts(dataset, training.dataset_text_field))
        model = embedded.model(tokenizer, seed=training.seed)
        if not (model_args.use_peft or model_args.load_in_4bit or model_args.load_in_8bit):
            return model, tokenizer
        # Adapters are saved without their base, so whoever loads them needs it on disk.
        name = str(output / "embedded-base")
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    elif (local := Path(name)).exists() and not (local / "config.json").is_file():
        raise BadInput(f"--model_name_or_path {name} has no config.json")
    extra: Any = training.model_init_kwargs or {}
    training.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **extra,
    }
    return name, None


def _texts(dataset: Iterable[Any], text_field: str) -> list[str]:
    """Return the text of every example, whatever its format, for the tokenizer."""
    texts = []
    for row in dataset:
        parts = [row.get(key) for key in (text_field, "prompt", "completion", "messages")]
        for part in parts:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, list):
                texts.extend(message["content"] for message in part)
    return texts


def _refuse_untrained(dataset: Any, arguments: Arguments) -> None:
    """Refuse data of which no token would be trained."""
    hint = f"raise --max_length (now {arguments.training.max_length}), or check the completions"
    sized = isinstance(dataset, datasets.Dataset)
    if sized and len(dataset) == 0:
        raise BadInput("no example is left to train: every label is masked", hint=hint)
    rows: Iterable[Any] = islice(iter(dataset), len(dataset) if sized else 1000)
    if all(set(row.get("labels", [0])) <= {IGNORE_INDEX} for row in rows):
        raise BadInput("every label of the data is masked, so nothing would be trained", hint=hint)


def _num_samples(trainer: Any) -> int | None:
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps * trainer.accumulation.effective_batch_size
    if isinstance(trainer.train_dataset, datasets.Dataset):
        return round(len(trainer.train_dataset) * trainer.args.num_train_epochs)
    return None


def _describe(trainer: Any, arguments: Arguments, output: Path, resume: str | None) -> None:
    """Say what will run and why, before it does."""
    model, accumulation = trainer.model, trainer.accumulation
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    dtype = str(next(p for p in model.parameters() if p.requires_grad).dtype)[len("torch.") :]
    device = trainer.args.device
    say(
        f"model     {arguments.model.model_name_or_path}: {type(model).__name__}, {trained:,} of "
        f"{total:,} parameters trained, {dtype}, on {device}"
    )
    rows = list(islice(iter(trainer.train_dataset), 20 * accumulation.effective_batch_size))
    lengths = [length(row) for row in rows]
    count = (
        len(trainer.train_dataset) if isinstance(trainer.train_dataset, datasets.Dataset) else None
    )
    source = (
        f"Python {platform.python_version()}" if arguments.script.dataset_name == "embedded" else ""
    )
    say(
        f"data      {arguments.script.dataset_name}{f' ({source})' if source else ''}: "
        f"{f'{count:,} examples' if count is not None else 'a stream'}, "
        f"mean {statistics.fmean(lengths):,.0f} and longest {max(lengths):,} tokens"
    )
    say(f"batch     {_batch_line(trainer, rows)}")
    if resume is not None:
        say(f"resume    {resume}")
    say(f"output    {output}")


def _batch_line(trainer: Any, rows: list[Any]) -> str:
    """Say how an effective batch is cut, from the first batches of the data."""
    accumulation = trainer.accumulation
    size = accumulation.effective_batch_size
    windows = [rows[i : i + size] for i in range(0, len(rows), size)]
    windows = [window for window in windows if len(window) == size] or windows
    budgets = [accumulation.budget_for(window) for window in windows]
    cuts = [split(w, causal_lm(), b) for w, b in zip(windows, budgets, strict=True)]
    largest = max(budgets, key=lambda budget: budget.tokens or 0)
    why = f"what {accumulation.rows} of the longest take"
    if accumulation.budget is not None:
        why = "--budget"
    elif largest.tokens == CPU_TOKENS:
        why = "more at once is not faster on a CPU"
    mean = statistics.fmean(map(len, cuts))
    return f"effective batch {size} = about {mean:.0f} micro-batches of up to {largest} ({why})"


def _summarise(trainer: Any, arguments: Arguments, output: Path, metrics: Metrics) -> None:
    """Print the result on stdout."""
    totals, losses = metrics.totals, metrics.losses
    edge = max(1, min(5, len(losses) // 2))
    proof = _prove(trainer)
    adapter = (output / "adapter_config.json").is_file()
    loader = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    package = "peft" if adapter else "transformers"
    summary = {
        "steps": trainer.state.global_step,
        "effective_batch_size": trainer.accumulation.effective_batch_size,
        **totals,
        "tokens_per_second": totals["tokens"] / max(totals["seconds"], 1e-9),
        "padding": 1 - totals["tokens"] / max(1, totals["padded"]),
        "loss_before": statistics.fmean(losses[:edge]) if losses else None,
        "loss_after": statistics.fmean(losses[-edge:]) if losses else None,
        "proof": None if proof is None else asdict(proof),
        "output_dir": str(output),
    }
    if arguments.json:
        print(json.dumps(summary))
        return
    print(
        f"trained   {summary['steps']:,} steps, {totals['samples']:,} samples, "
        f"{totals['tokens']:,} tokens in {totals['seconds']:.0f} s "
        f"({summary['tokens_per_second']:,.0f} tokens/s), padding {summary['padding']:.0%}"
    )
    if losses:
        print(
            f"loss      {summary['loss_before']:.4f} -> {summary['loss_after']:.4f} "
            f"(means of the first and the last {edge} steps)"
        )
    print(f"proof     {proof or 'skipped: the full batch does not fit into memory at once'}")
    print(f"saved     {output}, metrics in {output / 'metrics.jsonl'}")
    print(f"load it   from {package} import {loader}")
    print(f'          {loader}.from_pretrained("{output}")')


def _prove(trainer: Any) -> Proof | None:
    """Prove the gradient on the first batch; on its shortest examples if all is much at once."""
    batch = next(iter(trainer.get_train_dataloader())).examples
    batch = sorted(batch, key=length)
    while len(batch) > 1 and len(batch) * length(batch[-1]) > PROOF_TOKENS:
        batch.pop()
    try:
        return trainer.proof(batch)
    except torch.OutOfMemoryError:
        return None


def _again(words: list[str]) -> str:
    """Return the flags of this command for another one, without a checkpoint of their own."""
    kept = []
    skip = False
    for word in words:
        if skip or word.startswith("--resume_from_checkpoint="):
            skip = False
            continue
        if word == "--resume_from_checkpoint":
            skip = True
            continue
        kept.append(word)
    return "".join(f"{word} " for word in kept)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
