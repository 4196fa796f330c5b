"""`gradaccum train`: fine-tune with TRL's SFTTrainer at a stated effective batch size.

The trainer, its data preparation and its checkpoints are TRL's and transformers'; this checks the
input, attaches the accumulation, says what happens and proves the gradient on one batch.
"""

import contextlib
import itertools
import json
import shlex
import signal
import warnings
from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import safetensors
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.import_utils import is_liger_kernel_available
from trl import SFTTrainer, get_peft_config, get_quantization_config

from gradaccum.cli import data, embedded, final, record
from gradaccum.cli.arguments import Arguments, parse
from gradaccum.cli.ranks import IS_FIRST, RESTARTS, decided
from gradaccum.cli.signals import Finished, StopOnSignal
from gradaccum.cli.summary import advice, describe, prove, say, summarise, totals
from gradaccum.device import is_out_of_memory
from gradaccum.errors import BadInput, DoesNotFit
from gradaccum.integrations.hf import attach
from gradaccum.integrations.saving import sweep
from gradaccum.integrations.watching import Watching
from gradaccum.types import IGNORE_INDEX
from gradaccum.watch import METRICS

FLAGS = "flags.json"  # in the output directory: with what the run began
AUTO = "auto"  # the last checkpoint if there is one, else from the beginning
METRICS_EVERY = 10  # steps: entropy and accuracy take another pass; as often as TRL logs
LAST = ("last", "true", AUTO)
# What TRL and transformers say when something is missing, and what to do then.
HINTS = {
    "chat_template": "--chat_template_path names a template or a model that has one",
    "purely quantized": "add --use_peft: adapters are trained on the quantised model",
    "processing class": "save the tokenizer into the directory of the model",
    "Can't load tokenizer": "save the tokenizer into the directory of the model",
}


def run(words: list[str]) -> int:
    """Train as the flags say and return the exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        return _run(words)


def _run(words: list[str]) -> int:
    _quiet()
    words, own = _with_flags_of_the_run(words), words
    arguments = parse(words)
    if arguments is None:
        return 0
    resume = decided(lambda: _checkpoint(arguments))
    output = decided(lambda: _output_directory(arguments, resume))
    arguments.training.output_dir = str(output)
    say("gradaccum train")
    if RESTARTS and str(arguments.training.resume_from_checkpoint).lower() not in LAST:
        say(
            "warning: after a restart by torchrun this goes on only with --output_dir and "
            "--resume_from_checkpoint auto"
        )
    if words != own:
        say(f"flags     of the run, from {output / FLAGS}: {shlex.join(words[: -len(own)])}")
    try:
        trainer = _trainer(arguments, output)
    except (BadInput, KeyboardInterrupt):
        with contextlib.suppress(OSError):  # something is in it: leave it
            output.rmdir()
        raise
    stop = StopOnSignal(trainer.accumulation)
    trainer.add_callback(stop)
    trainer.add_callback(Watching(trainer))
    begun: record.Record = {}
    if IS_FIRST:
        describe(trainer, arguments, output, resume)
        kept = _without(words, "--resume_from_checkpoint")
        is_stated = arguments.schedule or "effective_batch_size" in arguments.given
        if not is_stated:  # on other ranks it would be another
            kept += ["--effective_batch_size", str(arguments.effective_batch_size)]
        record.write(kept, output / FLAGS)
        begun = record.begin(trainer, arguments, kept, resume)
        record.write(begun, output / record.NAME)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Finished as done:
        is_written = decided(lambda: final.is_written(output, Path(str(resume))))
        to_do = "nothing to do" if is_written else "writing the model"
        say(f"{to_do}: {resume} is the end of the run, {done}")
        if not is_written:  # the run was killed before it had
            if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                trainer._load_best_model()
            final.write(trainer, output)
        return 0
    finally:
        stop.restore()
    if stop.stopped and stop.received is not None:
        saved = str(output / f"checkpoint-{trainer.state.global_step}")
        if IS_FIRST:
            ended = record.end(begun, trainer, "stopped", None, advice(trainer))
            record.write(ended, output / record.NAME)
        say(f"stopped by {signal.Signals(stop.received).name}, saved {saved}")
        say(f"go on with: gradaccum train {shlex.join(['--resume_from_checkpoint', saved])}")
        return 128 + stop.received
    final.write(trainer, output)
    proof = prove(trainer)
    found = decided(lambda: totals(output / METRICS, trainer.accumulation.watch.first_step))
    if IS_FIRST:
        said = advice(trainer)
        ended = record.end(begun, trainer, "finished", proof, said)
        record.write(ended, output / record.NAME)
        summarise(trainer, arguments, output, found, proof)
    return 0 if found["is_finite"] else 1


def _quiet() -> None:
    """Silence what would drown our lines; errors still show."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    huggingface_hub.logging.set_verbosity_error()


def _checkpoint(arguments: Arguments) -> str | None:
    """Return the checkpoint to resume from."""
    wanted = arguments.training.resume_from_checkpoint
    if not wanted:
        return None
    if str(wanted).lower() in LAST:
        if "output_dir" not in arguments.given:
            raise BadInput(f"--resume_from_checkpoint {wanted} needs the --output_dir of the run")
        found = Path(str(arguments.training.output_dir))
        sweep(found)  # of what a run that was killed was writing
        last = get_last_checkpoint(str(found)) if found.is_dir() else None
        if last is None and wanted != AUTO:
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
        is_own = arguments.training.resume_from_checkpoint == AUTO
        is_begun = is_own and (output / FLAGS).is_file()  # and was stopped before a checkpoint
        if output.is_dir() and any(output.iterdir()) and resume is None and not is_begun:
            last = get_last_checkpoint(str(output))
            raise BadInput(
                f"--output_dir {output} is not empty, and nothing is overwritten",
                hint=f"--resume_from_checkpoint {shlex.quote(last)}"
                if last
                else "choose a new --output_dir",
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
    trainer: Any = _sft(arguments, output)
    attach(
        trainer,
        effective_batch_size=arguments.schedule or arguments.effective_batch_size,
        budget=arguments.budget,
        memory=arguments.memory,
    )
    trainer.accumulation.may_checkpoint = "gradient_checkpointing" not in arguments.given
    if "logging_steps" not in arguments.given:  # it is 1 then: each step has a line
        trainer.accumulation.metrics_every = METRICS_EVERY
    return trainer


def _sft(arguments: Arguments, output: Path) -> SFTTrainer:
    """Build the SFTTrainer of the flags as it is."""
    script, training, model_args = arguments.script, arguments.training, arguments.model
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise BadInput(
            "--use_liger_kernel needs the package liger-kernel", hint="pip install liger-kernel"
        )
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
        trainer.create_optimizer()  # now, so that its arguments are checked before the run begins
    except (OSError, ValueError, ImportError, RuntimeError, safetensors.SafetensorError) as error:
        cause = _first_line(error)
        if is_out_of_memory(error):
            raise DoesNotFit(f"the model does not fit into memory: {cause}") from error
        hint = next((hint for words, hint in HINTS.items() if words in str(error)), "")
        raise BadInput(f"TRL's SFTTrainer refuses this: {cause}", hint=hint) from error
    _refuse_untrained(trainer.train_dataset, arguments)
    _refuse_foreign_ids(trainer.train_dataset, trainer.model)
    training.disable_tqdm = True
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def _dataset(arguments: Arguments, split_name: str) -> Any:
    script = arguments.script
    if script.dataset_name == "embedded":
        say("data      reading the functions of the standard library ...")
        dataset = datasets.Dataset.from_list(embedded.functions())
        return dataset.select(range(64)) if split_name == script.dataset_test_split else dataset
    say(f"data      reading {script.dataset_name} ...")
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
    elif not (local := Path(name).expanduser()).exists() and name.startswith((".", "/", "~")):
        raise BadInput(f"there is no directory {name}", hint=data.near(local))
    elif local.exists() and not (local / "config.json").is_file():
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
    is_trained = False
    for number, row in enumerate(rows, start=1):
        labels = row.get("labels", row["input_ids"])
        if len(labels) != len(row["input_ids"]):
            raise BadInput(
                f"example {number} has {len(row['input_ids'])} input_ids and {len(labels)} labels"
            )
        is_trained = is_trained or not set(labels[1:]) <= {IGNORE_INDEX}  # the first is no target
    if not is_trained:
        raise BadInput("every label of the data is masked, so nothing would be trained", hint=hint)


def _refuse_foreign_ids(dataset: Any, model: Any) -> None:
    """Refuse token ids, as inputs or as labels, that the model has no embedding for."""
    if not isinstance(dataset, datasets.Dataset):
        return
    known = model.get_input_embeddings().num_embeddings
    for column in [name for name in ("input_ids", "labels") if name in dataset.column_names]:
        for chunk in dataset.with_format("arrow")[:][column].chunks:
            ids = chunk.flatten().to_numpy()
            if column == "labels":
                ids = ids[ids != IGNORE_INDEX]
            foreign = ids[(ids < 0) | (ids >= known)]
            if len(foreign):
                raise BadInput(
                    f"{column} of the data hold the token {foreign[0]}, and the model has an "
                    f"embedding for 0 to {known - 1:,}",
                    hint="the data were made with the tokenizer of another model",
                )


def _with_flags_of_the_run(words: list[str]) -> list[str]:
    """Return the flags with which a resumed run began, and after them those of this command."""
    values = dict(itertools.pairwise(part for word in words for part in word.split("=", 1)))
    wanted = values.get("--resume_from_checkpoint", "")
    if not wanted or "--help-all" in words:
        return words
    is_last = wanted.lower() in LAST
    folder = values.get("--output_dir") if is_last else Path(wanted).parent
    try:
        flags = json.loads((Path(folder or "") / FLAGS).read_text())
    except (OSError, ValueError):  # of another tool, or of a run that never began
        return words
    return [*(_without(flags, "--config") if "--config" in values else flags), *words]


def _without(words: list[str], flag: str) -> list[str]:
    """Return the words without a flag and its value."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not (skip or word == flag or word.startswith(f"{flag}=")):
            kept.append(word)
        skip = word == flag
    return kept


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
