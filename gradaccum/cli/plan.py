"""`gradaccum plan`: what the run of these flags needs, how fast each way is, and which to take.

The plan goes to stdout, progress to stderr. Neither weights nor a GPU are needed.
"""

import argparse
import itertools
import json
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from trl import get_peft_config
from trl.trainer.utils import add_fused_lm_head

from gradaccum.causal import causal_lm
from gradaccum.cli import data, embedded
from gradaccum.cli.arguments import Arguments, parse
from gradaccum.cli.picture import check, draw
from gradaccum.cli.summary import say
from gradaccum.cli.train import _dataset, _quiet, _texts
from gradaccum.errors import BadInput, DoesNotFit
from gradaccum.integrations.accumulation import lengths_of
from gradaccum.memory.cap import cap_of
from gradaccum.memory.options import Option, Search
from gradaccum.memory.plan import LENGTH, Plan, plan
from gradaccum.memory.recipes import FOUR_BIT, quantise
from gradaccum.objective import Objective
from gradaccum.types import GIB, counted

SHOWN = 8  # rows of the table for one setting
MOST_ROWS = 4_000  # of the data, whose lengths are looked at
KNOWN_HEADS = ("ForCausalLM", "ForConditionalGeneration", "ForPreTraining")
TILE = 4096  # rows that TRL's head scores at a time
SMALLER = (
    "--dtype bfloat16, --use_peft, --use_peft --load_in_4bit, --optim adamw_8bit, a smaller "
    "--max_length, or more --memory"
)
FOLDED = {"activations": ("activations", "temporaries", "inputs", "buffers")}
COLUMNS = ("parameters", "gradients", "optimizer state", "activations")


def run(words: list[str]) -> int:
    """Plan what the words say, print it and return the exit code."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--device", choices=("cpu", "cuda"))
    own.add_argument("--plot")
    own.add_argument("--ranks", type=int, default=1)
    own.add_argument("--shard_ranks", type=int, default=1)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        _quiet()
        try:
            mine, rest = own.parse_known_args(words)
        except (SystemExit, argparse.ArgumentError) as error:
            raise BadInput(
                "--device is cpu or cuda, --plot takes a file, --ranks and --shard_ranks a number"
            ) from error
        if mine.plot is not None and Path(mine.plot).suffix not in (".png", ".svg"):
            raise BadInput(f"--plot {mine.plot} is neither .png nor .svg")
        if mine.plot is not None and not Path(mine.plot).absolute().parent.is_dir():
            raise BadInput(f"there is no directory {Path(mine.plot).parent} for --plot")
        if mine.plot is not None:
            check()
        arguments = parse(rest, others=("--device", "--plot", "--ranks", "--shard_ranks"))
        if arguments is None:
            return 0
        if mine.device is not None:
            cap_of(arguments.memory, torch.device(mine.device))
        try:
            found = _planned(arguments, mine)
        except DoesNotFit as error:
            raise DoesNotFit(error.message, hint=SMALLER) from error
    if mine.plot is not None:
        draw(found, Path(mine.plot))
        say(f"plot      {mine.plot}")
    print(json.dumps(_as_json(found)) if arguments.json else _text(found))
    return 0


@contextmanager
def _saying() -> Iterator[None]:
    """Say what the plan is at: a large model takes a while."""
    told, handler = logging.getLogger(Search.__module__), logging.Handler()
    handler.emit = lambda record: say(f"          {record.getMessage()} ...")
    told.addHandler(handler)
    told.setLevel(logging.INFO)
    try:
        yield
    finally:
        told.removeHandler(handler)


def _planned(arguments: Arguments, mine: argparse.Namespace) -> Plan:
    device: str | None = mine.device
    training, model_args = arguments.training, arguments.model
    on_gpu = device == "cuda" or (device is None and torch.accelerator.is_available())
    say("gradaccum plan")
    assumed: list[str] = []
    config, lengths = _config_and_lengths(arguments, assumed)
    is_fused = mine.shard_ranks == 1  # no trainer shards: it is then the loss of an Accumulator
    model = _model(arguments, config, assumed, is_fused=is_fused)
    autocast = torch.bfloat16 if training.bf16 and (on_gpu or "bf16" in arguments.given) else None
    if on_gpu and not {"bf16", "fp16"} & arguments.given:
        autocast = torch.bfloat16  # TRL's default
        assumed.append("forwards run under bf16 autocast, as is TRL's default")
    objective, head = causal_lm(), "the loss is causal_lm()"
    if is_fused:
        objective = Objective(_fused, None, objective.size, trim=True, chunk=TILE)
        head = "the loss is that of TRL's SFTTrainer, with the head over every position"
    say(f"model     {model_args.model_name_or_path}: {_described(model)}")
    say("plan      tracing a step without data ...")
    with _saying():
        return plan(
            model,
            objective,
            effective_batch=arguments.effective_batch_size,
            ranks=mine.ranks,
            shard_ranks=mine.shard_ranks,
            memory=arguments.memory,
            optimizer=str(getattr(training.optim, "value", training.optim)),
            lengths=lengths,
            checkpointing=training.gradient_checkpointing
            if "gradient_checkpointing" in arguments.given
            else None,
            autocast=autocast,
            device=device,
            assumptions=[head, *assumed],
        )


def _fused(model: Any, micro: dict[str, Any]) -> torch.Tensor:
    return model(**micro, fused_lm_head=True, num_items_in_batch=1.0).loss


def _config_and_lengths(
    arguments: Arguments, assumed: list[str]
) -> tuple[PreTrainedConfig, list[int]]:
    """Return the model's configuration, and the tokens of the examples."""
    name, longest = str(arguments.model.model_name_or_path), arguments.training.max_length
    if name == "embedded":
        dataset = _dataset(arguments, "train")
        tokenizer = embedded.tokenizer(_texts(dataset, arguments.training.dataset_text_field))
        return embedded.model(tokenizer).config, _lengths(dataset, tokenizer, arguments, assumed)
    local = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not local.exists():
        raise BadInput(f"there is no {name}", hint=data.near(local))
    if local.is_dir() and not (local / "config.json").is_file():
        raise BadInput(f"--model_name_or_path {name} has no config.json")
    try:
        config = AutoConfig.from_pretrained(
            str(local) if local.exists() else name, revision=arguments.model.model_revision
        )
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"--model_name_or_path {name} names no model that is known: "
            f"{str(error).strip().splitlines()[0]}",
            hint="a directory, a config.json, or a hub id",
        ) from error
    _refuse_other_heads(config, name)
    if "dataset_name" not in arguments.given:
        longest = longest or LENGTH
        assumed.append(f"every example has {longest:,} tokens (--max_length), as none are given")
        return config, [longest]
    folder = local if local.is_dir() else local.parent if local.exists() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder else name)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"the lengths of {arguments.script.dataset_name} need a tokenizer, and {name} has none",
            hint="leave out --dataset_name: every example then counts as --max_length",
        ) from error
    return config, _lengths(_dataset(arguments, "train"), tokenizer, arguments, assumed)


def _refuse_other_heads(config: Any, name: str) -> None:
    """Refuse a model that says it is something else than a causal language model."""
    for said in getattr(config, "architectures", None) or ():
        if "For" in said and not said.endswith(KNOWN_HEADS):
            raise BadInput(
                f"{name} is a {said}, and gradaccum train fine-tunes causal language models",
                hint="gradaccum.plan(model, objective, examples=...) plans any module",
            )


def _lengths(dataset: Any, tokenizer: Any, arguments: Arguments, assumed: list[str]) -> list[int]:
    """Return the tokens of the examples, or of a sample of them, cut at the longest."""
    longest = arguments.training.max_length
    if arguments.training.packing and longest is not None:
        return [longest]
    found = lengths_of(dataset)
    if not found:
        is_sized = isinstance(dataset, Dataset)
        if is_sized and len(dataset) > MOST_ROWS:
            chosen = random.Random(0).sample(range(len(dataset)), MOST_ROWS)
            assumed.append(f"lengths are those of {MOST_ROWS:,} of the {len(dataset):,} examples")
            dataset = dataset.select(chosen)
        elif not is_sized:
            assumed.append(f"lengths are those of the first {MOST_ROWS:,} examples of the stream")
        rows: list[Any] = list(itertools.islice(dataset, MOST_ROWS))
        if "input_ids" in rows[0]:
            found = [len(row["input_ids"]) for row in rows]
        else:
            field = arguments.training.dataset_text_field
            texts = [_joined(row, tokenizer, field) for row in rows]
            found = [len(ids) + 1 for ids in tokenizer(texts)["input_ids"]]  # and the end
    return [max(2, min(n, longest or n)) for n in found]


def _joined(row: dict[str, Any], tokenizer: Any, field: str) -> str:
    turns = row.get("messages")
    if turns is None and isinstance(row.get("prompt"), list):
        turns = row["prompt"] + row["completion"]
    if turns is not None and tokenizer.chat_template:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    if turns is not None:
        return "\n".join(str(turn["content"]) for turn in turns)
    return row[field] if field in row else f"{row['prompt']}{row['completion']}"


def _model(
    arguments: Arguments, config: PreTrainedConfig, assumed: list[str], *, is_fused: bool
) -> Any:
    """Return the model of the flags on the meta device, with its adapters."""
    model_args = arguments.model
    name = model_args.dtype or "float32"
    dtype = (config.dtype or torch.float32) if name == "auto" else getattr(torch, name)
    if model_args.load_in_4bit and name == "float32":
        dtype = torch.bfloat16
        assumed.append("what is not quantised is in bfloat16")
    if model_args.load_in_8bit:
        raise BadInput("plan does not know --load_in_8bit", hint="--load_in_4bit --use_peft")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=model_args.attn_implementation
            )
    except (ValueError, ImportError) as error:
        raise BadInput(
            f"{type(config).__name__} is of no causal language model that can be built: "
            f"{str(error).strip().splitlines()[0][:160]}"
        ) from error
    if is_fused:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    adapters = get_peft_config(model_args)
    if adapters is not None:
        from peft import get_peft_model

        model: Any = get_peft_model(model, adapters)
    if model_args.load_in_4bit:
        if adapters is None:
            raise BadInput("4-bit weights are not trained themselves", hint="add --use_peft")
        quantise(model, nested=model_args.use_bnb_nested_quant)
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(torch.bfloat16)
        assumed.append(FOUR_BIT)
    return model.train()


def _described(model: Any) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return f"{trained:,} of {total:,} parameters trained, {', '.join(sorted(kinds))}"


def _text(found: Plan) -> str:
    return "\n".join(
        [
            str(found),
            "",
            *_table(found),
            "time is that of a step against the fastest that fits",
            "",
            *_to_paste(found),
            "",
            "assumed",
            *(f"  - {text}" for text in found.assumptions),
        ]
    )


def _table(found: Plan) -> list[str]:
    """Return the options as lines: the chosen setting by size, the best of the others."""
    heads = [
        "effective batch", "micro-batch", "accumulation steps", "ckpt", "peak GiB",
        *COLUMNS, "time", "fits",
    ]  # fmt: skip
    if found.chosen.sync is not None:
        heads.insert(4, "sync")
    fitting = [option.seconds for option in found.options if option.fits]
    least = min(fitting)
    rows = [
        [
            f"{found.effective_batch:,}",
            str(option.budget),
            f"{option.num_micros:,}",
            "on" if option.checkpointing else "off",
            *([] if option.sync is None else [option.sync]),
            f"{option.peak_bytes / GIB:.2f}",
            *(f"{_folded(option, name) / GIB:.2f}" for name in COLUMNS),
            f"{option.seconds / least:.2f}x",
            ("<- this" if option is found.chosen else "yes") if option.fits else "no",
        ]
        for option in shown(found)
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (heads, *rows)
    ]


def shown(found: Plan) -> list[Option]:
    """Return the options to show: some sizes of each setting, the chosen among them."""
    settings: dict[Any, list[Option]] = {}
    for option in found.options:
        settings.setdefault((option.checkpointing, option.chunk, option.sync), []).append(option)
    kept = []
    fastest = min((o for o in found.options if o.fits), key=lambda o: o.seconds)
    for options in settings.values():
        step = max(1, -(-len(options) // SHOWN))
        kept += [
            option
            for i, option in enumerate(options)
            if i % step == 0 or option in (found.chosen, fastest)
        ]
    return kept


def _folded(option: Option, name: str) -> int:
    return sum(option.categories.get(part, 0) for part in FOLDED.get(name, (name,)))


def _to_paste(found: Plan) -> list[str]:
    """Return the flags of our engine and the arguments of the stock trainer."""
    one, size = found.chosen, found.effective_batch
    rows = max(1, one.budget.examples or (one.budget.tokens or 1) // found.longest)
    ranks = found.spread.ranks
    rows = min(rows, max(1, size // ranks))
    exact = max((n for n in range(1, rows + 1) if size % (n * ranks) == 0), default=0)
    budget = str(one.budget).replace(",", "")
    launch = "gradaccum" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m gradaccum"
    ours = (
        f'  {launch} train ... --effective_batch_size {size} --budget "{budget}" '
        f"--gradient_checkpointing {one.checkpointing}"
    )
    if one.sync is not None:  # the trainer shards nothing
        kind = "tokens" if one.budget.examples is None else "examples"
        size_of = f"Budget({kind}={one.budget.examples or one.budget.tokens})"
        chunk = f"chunk={one.chunk}" if one.chunk else ""
        how = f'causal_lm({chunk}), budget={size_of}, sync="{one.sync}"'
        switch = "  model.gradient_checkpointing_enable()\n" if one.checkpointing else ""
        return [
            "with gradaccum: any effective batch, exactly",
            f"{switch}  Accumulator(model, {how})",
        ]
    lines = [
        "with gradaccum: any effective batch, exactly",
        ours,
        "",
        "with stock arguments",
    ]
    if exact:
        lines.append(
            f"  TrainingArguments(per_device_train_batch_size={exact}, "
            f"gradient_accumulation_steps={size // (exact * ranks)}, "
            f"gradient_checkpointing={one.checkpointing}, ...)"
        )
    if exact != rows:
        near = max(1, round(size / (rows * ranks)))
        on_ranks = f" x {ranks} ranks" if ranks > 1 else ""
        lines.append(
            f"  {counted(rows, 'row')} would fit, and {size} is no multiple of {rows}{on_ranks}: "
            f"the nearest is {rows} x {near}{on_ranks} = {rows * near * ranks}; gradaccum runs "
            f"{size} in {counted(one.num_micros, 'micro-batch')}{' on each' if on_ranks else ''}"
        )
    return lines


def _as_json(found: Plan) -> dict[str, Any]:
    least = min(option.seconds for option in found.options if option.fits)

    def told(option: Option) -> dict[str, Any]:
        """Of a machine that is not here only the ratios of times mean something."""
        seconds = option.seconds if found.machine.is_here else None
        return asdict(option) | {"seconds": seconds, "time": option.seconds / least}

    spread = found.spread
    return {
        "effective_batch": found.effective_batch,
        "ranks": spread.ranks,
        "shard_ranks": spread.shard_ranks,
        "sent_bytes": {"micro_batch": spread.micro_bytes, "step": spread.step_bytes},
        "memory_bytes": found.cap.stated_bytes,
        "tensor_bytes": found.cap.num_bytes,
        "chosen": told(found.chosen),
        "options": [told(option) for option in found.options],
        "seconds_are_of": found.machine.name if found.machine.is_here else None,
        "assumptions": list(found.assumptions),
    }
