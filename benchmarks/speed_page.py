"""Write docs/speed.md and its picture from results: of races, of `overhead.py` and `scale.py`.

python benchmarks/speed_page.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from gradaccum.cli.bench import _padding

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKLOADS = {
    "ragged": "Ragged: functions of the standard library, up to 1,024 tokens, a Llama of 8 million "
    "parameters",
    "loops": "The same, by the loops of other libraries",
    "long": "Long-tailed: lognormal lengths, up to 8,192 tokens",
    "chat": "Chat: one system prompt of about 300 tokens",
    "uniform": "Uniform: 256 tokens each",
    "qlora": "Adapters on the same model in 4 bits, 16 examples a step, up to 256 tokens",
    "100m": "A Llama of 98 million parameters, 16 examples a step, up to 512 tokens",
    "unsloth": "Beside Unsloth",
    "encoder": "Classification: BERT of 6 layers, beginnings of functions (tokens/s: all of them)",
    "vision": "Images: ViT of 6 layers (images a second)",
}
HEAD = """# Speed, measured

Written by `python benchmarks/speed_page.py` from the results in
[benchmarks/results](../benchmarks/results). Contenders run in processes of their own, in turns;
medians over the rounds, with the least and the greatest, and the ratio to the first within each
round. The error is that of the first step's gradient against float64, one example at a time
(weights of 4 bits have none). Two cores of a shared machine: compare within a table.

![Trained tokens a second, times the stock trainer](speed.png)

"stock 2x16" is TRL's SFTTrainer (or, for the classifiers, transformers' Trainer) with 2 rows and
16 accumulation steps; "loop" is a hand-written loop, one example at a time, without padding or
metrics; "loop 2x16" with as many rows; "ours 512" has a budget of 512 tokens, "ours" finds one. How
packing and sharing work, and where they are off: [the guide](guides/speed.md).

`group_by_length` and packing make other batches: of rows of similar length, or of more examples.

Where ours does not win: on rows of one length there is nothing to gain, and a loop with the best
number of rows is as fast or a few percent faster; on long sequences the time goes into attention,
which costs the same by itself, so that ours is as fast as the loop. Its peak memory is that of
the start, when it measures how the loss is reduced and which micro-batches are fast; from then on
its budget bounds it. Unsloth takes least: it computes activations again, and logits in chunks.
"""


def main():
    found = {
        name: json.loads(path.read_text())
        for name in WORKLOADS
        if (path := RESULTS / f"speed_{name}.json").exists()
    }
    parts = [HEAD]
    for name, figures in found.items():
        versions = ", ".join(f"{k} {v}" for k, v in figures["versions"].items())
        parts.append(
            f"\n## {WORKLOADS[name]}\n\n`{figures['command']}`, {figures['rounds']} rounds, "
            f"{versions}, {figures['device']}\n"
        )
        parts.append(
            "\n| contender | s a step | tokens/s | padding | memory, MiB | speed | gradient error |"
            "\n|---|---|---|---|---|---|---|"
        )
        # There it was counted what Lightning had read ahead for the next step.
        wrong = ("lightning 2x16",) if name == "ragged" else ()
        parts += [_row(row) for row in figures["contenders"] if row["name"] not in wrong]
    parts += _overhead(json.loads((RESULTS / "overhead.json").read_text()))
    parts += _scale(json.loads((RESULTS / "scale.json").read_text()))
    (ROOT / "docs" / "speed.md").write_text("\n".join(parts).replace("\n\n\n", "\n\n") + "\n")
    _draw(found, ROOT / "docs" / "speed.png")


def _row(row):
    if row["failure"] or not row["speed"]:
        return f"| {row['name']} | failed: {(row['failure'] or '').splitlines()[-1][:80]} |"
    seconds, speed, error = row["seconds"], row["speed"], (row["answer"] or {}).get("error")
    memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
    padding = _padding(row["padding"])
    return (
        f"| {row['name']} | {seconds['median']:.2f} ({seconds['least']:.2f} to "
        f"{seconds['most']:.2f}) | {row['rate']['median']:,.0f} | {padding} | {memory} | "
        f"{speed['median']:.2f} | {'-' if error is None else f'{error:.1e}'} |"
    )


def _overhead(figures):
    """Return the section on what the engine adds to a loop written by hand."""
    yield (
        "\n## What the engine adds to a loop written by hand, over the same micro-batches\n\n"
        f"`{figures['command']}`: seconds of ours, times those of the loop, which runs each "
        "micro-batch after ours. In brackets the 95% interval of the median. On rows of one length "
        "there is no padding to save.\n\n"
        "| workload | micro-batches | loop, ms each | ours, times it |\n|---|---|---|---|"
    )
    for name, row in figures["workloads"].items():
        num, each = row["micro_batches"], row["hand_written_milliseconds_each"]
        low, high = row["ratio_interval"]
        ratio = f"{row['ratio_median']:.3f} ({low:.3f} to {high:.3f})"
        yield f"| {name} | {num} | {each:.1f} | {ratio} |"


def _scale(figures):
    """Return the section on how cost grows."""
    yield (
        f"\n## How it grows\n\n`{figures['command']}`: the time of a trained token, times that in "
        "steps of 32 which run in between.\n\n![Time and memory by the effective batch, and time "
        "by the length of a sequence](scale.png)\n\n"
        "| effective batch | a trained token, times | beyond the model, MiB | inputs, MiB |\n"
        "|---|---|---|---|"
    )
    for size, row in figures["effective batch"].items():
        middle, least, most = row["times_that_of_32"]
        yield (
            f"| {int(size):,} | {middle:.3f} ({least} to {most}) | {row['peak_tensor_mib']} | "
            f"{row['inputs_mib']} |"
        )
    epoch = figures["an epoch of 1,000,000 examples, 1,024 a step"]
    cuts = ", ".join(
        f"{row['seconds']} s ({kind})"
        for kind, row in figures["split of 100,000 examples, 16,384 tokens"].items()
    )
    yield (
        f"\nAn epoch of a million examples in {epoch['steps']} steps is drawn and shared out over "
        f"8 ranks in {epoch['seconds_to_draw_and_share_out_over_8_ranks']} s, and a rank cuts its "
        f"share of it in {epoch['seconds_to_cut_the_shares_of_a_rank']} s. 100,000 examples are "
        f"cut at once in {cuts}."
    )


def _draw(found, path):
    """Draw, for each workload, the stock trainer at its best, the loop at its best, and ours."""
    shown = {name: f for name, f in found.items() if name not in ("loops", "unsloth")}
    kinds = {"best stock setting": "stock", "best loop": "loop", "ours": "ours"}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for at, (label, kind) in enumerate(kinds.items()):
        best = [
            max(
                (row["speed"] for row in figures["contenders"]
                 if row["name"].split()[0] == kind and row["speed"]),
                key=lambda speed: speed["median"],
            )
            for figures in shown.values()
        ]  # fmt: skip
        medians = [speed["median"] for speed in best]
        axes.bar(
            [i + 0.27 * (at - 1) for i in range(len(shown))],
            medians,
            width=0.25,
            label=label,
            yerr=[
                [m - speed["least"] for m, speed in zip(medians, best, strict=True)],
                [speed["most"] - m for m, speed in zip(medians, best, strict=True)],
            ],
            ecolor="0.4",
        )
    axes.axhline(1, color="0.3", linestyle="--")
    axes.set_xticks(range(len(shown)), shown)
    axes.set(ylabel="tokens a second, times stock 2 rows a step")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
