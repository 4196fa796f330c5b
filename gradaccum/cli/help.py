"""The help texts: apart from the commands, so that asking for help imports nothing heavy."""

USAGE = """\
gradaccum: the batch size you want, on the memory you have, with the gradient you would have got

usage: gradaccum COMMAND [flags]

commands:
  train     fine-tune a language model at a stated effective batch size; without flags it runs
            a small embedded example in under three minutes
  verify    tell whether a loop or a trainer accumulates exactly, and if not, why
  plan      tell what a run needs, what fits and what is fastest, before it runs: neither weights
            nor a GPU are needed
  bench     time a run against TRL's trainer and a plain loop, and check their gradients
  report    one HTML page of what became of a run, or whether several trained the same

  gradaccum train --help      what train takes
  gradaccum verify --help     what verify takes
  gradaccum plan --help       what plan takes
  gradaccum bench --help      what bench takes
  gradaccum report --help     what report takes
  gradaccum --version         the version
"""

TRAIN = """\
usage: gradaccum train [flags]

Fine-tune a causal language model at a stated effective batch size. gradaccum cuts each effective
batch into micro-batches that fit, and the gradient is that of one pass over the whole batch.

  gradaccum train                                              an embedded example, under 3 minutes
  gradaccum train --dataset_name pairs.jsonl                   the embedded model on your data
  gradaccum train --model_name_or_path ./model --dataset_name pairs.jsonl \\
                  --effective_batch_size 64 --max_length 2048
  gradaccum train --config run.yaml                            the same flags from a file
  gradaccum train --resume_from_checkpoint runs/a/checkpoint-100
  torchrun --nproc-per-node 8 -m gradaccum train ...           on several GPUs or machines

how large a batch:
  --effective_batch_size N     examples in one optimizer step; any number. Default: 32 for the
                               embedded model, else per_device_train_batch_size x
                               gradient_accumulation_steps x ranks, as everywhere
  --effective_batch_schedule "32:0,64:10k,128:50k"
                               instead: 32, from step 10,000 on 64, from 50,000 on 128. Or by what
                               was read: "32:0,64:1M samples", "32:0,64:2G tokens"; or in equal
                               parts: "32..256 by 32 over 1M samples". plan takes the largest
  --lr_rule linear | sqrt      with a schedule: learning rate times size / first size, or its root
  --beta2_rule                 with a schedule: beta2 to the power of size / first size
  --budget N | "N examples"    largest micro-batch, in padded tokens or in examples. Default "auto":
                               the smallest that is as fast as any that fits, measured on three
                               short micro-batches at the first step, and remembered
  --memory 20GiB | 0.8         what there is for it, or which part; default: what is available
  --per_device_train_batch_size, --gradient_accumulation_steps
                               as you know them, instead of --effective_batch_size

what and where:
  --model_name_or_path         a local directory or a hub id; "embedded" (default) is a small
                               Llama-shaped model with random weights
  --dataset_name               a .jsonl, .json, .csv, .parquet or .txt file, a directory or a hub
                               id, with a column "text", or "prompt" and "completion", or
                               "messages"; "embedded" (default) is the functions with docstrings
                               of this Python's standard library
  --eval_strategy steps        evaluate too; local data are then a directory with train.jsonl and
                               test.jsonl
  --output_dir                 must be new or empty; default gradaccum-runs/DATE-TIME
  --resume_from_checkpoint     a checkpoint directory, "last" for the last in --output_dir, or
                               "auto" for that if there is one; on any number of ranks
  --json                       print the summary as JSON on stdout

often used, from TRL and transformers:
  --learning_rate  --lr_scheduler_type  --warmup_steps  --num_train_epochs  --max_steps
  --max_length  --packing  --completion_only_loss  --assistant_only_loss  --dataset_text_field
  --use_peft  --lora_r  --load_in_4bit  --dtype  --gradient_checkpointing
  --save_steps  --logging_steps  --report_to tensorboard|wandb|...  --seed

  gradaccum train --help-all   every flag; there are about 200

Progress goes to stderr, the summary to stdout, one line of figures a step to metrics.jsonl in the
output directory. Ctrl-C or SIGTERM saves a checkpoint and stops; a second one stops at once.

exit codes: 0 done, 1 the loss is not finite or has no exact accumulation, 2 wrong flags or data,
            128 + N stopped by signal N
"""

VERIFY = """\
usage: gradaccum verify [flags of train] [--stock] [--json]
       gradaccum verify MODULE:FUNCTION [--json]

Tell whether gradient accumulation leaves the gradient of the full batch. One effective batch of up
to eight examples runs in several cuts (one at a time, pairs, a short last one) and once in one
pass; the difference is judged by what rounding alone causes, which is measured too. What is wrong
is named, with the figure and the remedy. Nothing is trained, and everything is left as it was.

  gradaccum verify                                    our accumulation, on the embedded example
  gradaccum verify --stock                            TRL's SFTTrainer as it is, on the same
  gradaccum verify --model_name_or_path ./model --dataset_name pairs.jsonl --stock
  gradaccum verify my_project.training:audited        any loop, any Trainer

FUNCTION returns (loop, model, batch), or (loop, model, batch, objective):
  loop    loop(model, micro_batches) runs one effective batch, given as a list of micro-batches, and
          leaves gradients in .grad or steps an optimizer; or a transformers.Trainer
  model   the torch module; None for a Trainer
  batch   a list of examples or a collated batch; for a Trainer None for the first of its data
  objective   a gradaccum.Objective to compare with; without one the reference is the loop's own
          full batch, which cannot show a factor that is the same at every cut

  def audited():
      return my_loop, model, {"x": x, "y": y}

  --stock   the trainer of the flags without gradaccum's accumulation
  --json    the verdict as JSON

The verdict goes to stdout, progress to stderr. A correct loop costs five or six passes over the
batch, a wrong one up to twelve.

In a test suite: gradaccum.testing.assert_exact(loop, model, batch).

exit codes: 0 exact, 1 not exact, 2 not judged: wrong flags, function or data, or the function or
            its loop failed (where is shown)
"""

PLAN = """\
usage: gradaccum plan [flags of train] [--memory 24GiB] [--device cpu|cuda] [--ranks 8]
                      [--shard_ranks 8] [--plot FILE] [--json]

Say what a step of these flags takes and which way of running it is fastest, before it runs. The
step is traced on a model without data: a directory with a config.json suffices, and a model of
8 billion parameters takes up to a minute and 0.7 GiB on two cores.

  gradaccum plan                                              the embedded example, on this machine
  gradaccum plan --model_name_or_path ./model --effective_batch_size 64 --max_length 2048 \\
                 --device cuda --memory 24GiB
  gradaccum plan --model_name_or_path ./model --dataset_name pairs.jsonl --use_peft \\
                 --load_in_4bit --device cuda --memory 24GiB --plot plan.png
  gradaccum plan --model_name_or_path ./model --effective_batch_size 256 --max_length 4096 \
                 --dtype bfloat16 --device cuda --memory 80GiB --ranks 8 --shard_ranks 8

  --memory 24GiB | 0.9   what there is, or which part of the device; default: what is available
  --device cpu | cuda    what is planned for; default: what this machine has. A GPU need not be here
                         if --memory is given
  --ranks 8              how many train it together; --effective_batch_size and the default of
                         --memory are of all of them, the plan is for one
  --shard_ranks 8        how many hold one copy of the model by fully_shard: all (FSDP2), a divisor
                         of --ranks (HSDP), or 1; gradients are then reduced in each micro-batch or
                         once, or parameters gathered once (sync=), by memory and time
  --plot FILE            a picture (.png or .svg): memory and time against the micro-batch
  --json                 all of it as JSON

--gradient_checkpointing is chosen if it is not given; --optim, --dtype, --bf16, --use_peft,
--load_in_4bit and --packing are taken as in train. With --dataset_name the lengths are those of the
data, else every example has --max_length tokens.

What is printed: the answer in a sentence; the options, where more accumulation steps take time but
no memory and larger micro-batches the reverse, up to the knee beyond which they buy nothing; what
to pass to gradaccum, or to stock TrainingArguments; what was assumed.

exit codes: 0 done, 1 nothing fits, 2 wrong flags
"""

BENCH = """\
usage: gradaccum bench [flags of train] [--contenders LIST] [--rounds 5] [--steps 2]
                       [--plot FILE] [--json]

Run these flags by several contenders side by side, and say what each costs and whether its gradient
is right. Each is a process of its own; they take turns, in another order each round, and speeds are
compared within a round. Nothing is saved.

  gradaccum bench                                             the embedded example
  gradaccum bench --model_name_or_path ./model --dataset_name pairs.jsonl \\
                  --effective_batch_size 64 --max_length 2048
  gradaccum bench --contenders "ours,stock 2x16,stock 2x16 packing,loop" --plot bench.png

  --contenders LIST      which, separated by commas:
    ours                 TRL's SFTTrainer with gradaccum attached
    loop, loop RxS       a plain loop: the model's own loss, one sequence at a time (no padding), or
                         R at a time
    stock, stock RxS     TRL's SFTTrainer with R rows in each of S accumulation steps; without RxS
                         as the flags say, or 2 rows at a time
    stock RxS HOW        the same with group_by_length, batch_rebalance, packing or padding_free
                         default: stock, stock 1 row at a time, loop, ours
  --rounds N             how often each has a turn; a turn before warms up and is not counted
  --steps N              optimizer steps in a turn
  --plot FILE            a picture (.png or .svg): speed and memory
  --json                 all of it as JSON

What is printed: seconds a step; trained tokens a second (labels that are not masked), which are
what is compared, since packing changes what is in a batch; the share of padding; peak memory beyond
what was held before the first step (on the CPU that of the process, a coarse measure; ours with the
micro-batches by which --budget auto is found); the error of the first step's gradient against
float64, on the CPU and without dropout.

On an accelerator each turn is a new process, so that one model at a time is in its memory.

exit codes: 0 done, 1 a contender failed, 2 wrong flags or data
"""

REPORT = """\
usage: gradaccum report RUN_DIR [RUN_DIR ...] [--out FILE] [--json | --markdown]

Tell what became of a run, from the metrics.jsonl (and run.json) in its directory: loss, where the
time went, how each effective batch was cut, memory against what was predicted, the gradient noise
scale, what happened and when, whether the gradient was exact, and how to do it again. Of several
runs, tell whether they trained the same, where they part, and what was asked differently.

  gradaccum report gradaccum-runs/20261128-103114             one page; while it runs, too
  gradaccum report runs/a runs/b                              did they train the same?
  gradaccum report runs/a runs/b runs/c --out compared.html   each against the first
  gradaccum report runs/a --markdown                          to paste into an issue
  gradaccum report runs/a --json | jq .loss.after

  --out FILE    where the page goes (.html); default: report.html in RUN_DIR, of several runs
                comparison.html in the first
  --markdown    short tables for an issue instead of a page; needs no extra
  --json        the figures as one JSON object instead of a page; needs no extra

The page is one file of about a megabyte that needs no network: send it, print it, keep it. It
follows the light or dark setting of whoever reads it. Each figure says in words what it shows, and
has its numbers below it. To write it takes pip install "gradaccum[report]".

Two runs are "the same to the last digit", "the same within rounding", have "drifted apart" as
rounding does, or "part" at a step: where the data differ, or the loss jumps by more than rounding
can. docs/guides/report.md says how that is judged.

The answer in a sentence goes to stderr, the path of the page (or the text) to stdout.

exit codes: 0 done, 2 wrong flags, no run there, or one that cannot be read
"""
