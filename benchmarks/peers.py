r"""Compare the gradients of other loops with one pass over the effective batch: stock and ours.

Every loop trains its first step on the same 16 ragged examples, as 8 x 2, 4 x 4 and 2 x 8 rows, in
float32 without dropout; the truth is the same loop with 16 rows at once. What refuses says so.

    python benchmarks/peers.py --out benchmarks/results/peers.json
    UNSLOTH_SKIP_TORCHVISION_CHECK=1 python benchmarks/peers.py --only unsloth-sft \
        --out benchmarks/results/peers_unsloth.json

The second in an environment of its own: Unsloth changes transformers and TRL for the process, and
needs other versions of them.
"""

import argparse
import contextlib
import importlib
import io
import tempfile
import warnings

import torch
from common import publish
from torch import nn

ROWS = 16
SPLITS = ((8, 2), (4, 4), (2, 8))
LONGEST = 96  # tokens; longer examples are left out, so that nothing is cut off
EXAMPLES = 48


def embedded_data():
    from gradaccum.cli import embedded

    pairs = embedded.functions(limit=600)
    tokenizer = embedded.tokenizer(pair["prompt"] + pair["completion"] for pair in pairs)
    short = [p for p in pairs if len(tokenizer(p["prompt"] + p["completion"]).input_ids) < LONGEST]
    return tokenizer, short[:EXAMPLES]


def small(tokenizer):
    """A model that is the same each time it is asked for; weights as large as trained ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        **sizes,
    )
    return LlamaForCausalLM(config)


def token_rows(tokenizer, pairs):
    """Return pairs as tokens; prompts are not trained."""
    rows = []
    for pair in pairs:
        prompt, completion = (tokenizer(pair[key])["input_ids"] for key in ("prompt", "completion"))
        labels = [-100] * len(prompt) + completion
        rows.append({"input_ids": prompt + completion, "labels": labels})
    return rows


class Setup:
    """What the loops share: data, and the model anew for each run."""

    def __init__(self):
        self.tokenizer, self.pairs = embedded_data()
        self.rows = token_rows(self.tokenizer, self.pairs[:ROWS])

    def model(self):
        return small(self.tokenizer)

    def saved(self):
        """Return a directory with the model and its tokenizer; some trainers load it again."""
        base = tempfile.mkdtemp()
        self.model().save_pretrained(base), self.tokenizer.save_pretrained(base)
        return base

    def batches(self, size, collate=None):
        from gradaccum.padding import pad_collate

        return torch.utils.data.DataLoader(self.rows, size, collate_fn=collate or pad_collate)

    def accumulator(self, model, rows, backward):
        import gradaccum

        return gradaccum.Accumulator(
            model,
            gradaccum.from_mean(weight="shifted_tokens"),
            budget=gradaccum.Budget(examples=rows),
            backward=backward,
        )


def left(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


# -- loops over a model that returns its mean loss


def of_accelerate(setup, rows, steps, ours):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1 if ours else steps)
    size = len(setup.rows) if ours else rows
    model, loader = accelerator.prepare(setup.model(), setup.batches(size))
    if ours:
        backward_of = importlib.import_module("gradaccum.integrations.accelerate").backward_of
        setup.accumulator(model, rows, backward_of(accelerator)).backward(next(iter(loader)))
        return left(model)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
    return left(model)


def of_fabric(setup, rows, steps, ours):
    from lightning.fabric import Fabric

    fabric, net = Fabric(accelerator="cpu", devices=1), setup.model()
    model, _ = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1))
    if ours:
        setup.accumulator(model, rows, fabric.backward).backward(setup.rows)
        return left(model)
    parts = list(setup.batches(rows))
    for i, part in enumerate(parts):
        with fabric.no_backward_sync(model, enabled=i < len(parts) - 1):
            fabric.backward(model(**part).loss / len(parts))
    return left(model)


def of_lightning(setup, rows, steps, ours):
    import lightning.pytorch as pl

    import gradaccum

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.found = setup.model(), None

        def training_step(self, batch, batch_idx):
            return self.net(**batch).loss

        def on_before_optimizer_step(self, optimizer):
            self.found = left(self.net)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    if ours:
        attach = importlib.import_module("gradaccum.integrations.lightning").attach
        attach(module, budget=gradaccum.Budget(examples=rows), weight="shifted_tokens")
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=1 if ours else steps,
    )  # fmt: skip
    trainer.fit(module, setup.batches(len(setup.rows) if ours else rows))
    return module.found


# -- trainers of TRL, and Unsloth's


def pairwise(pairs):
    """Prompts with the completion that belongs to them and with one that does not."""
    wrong = [pair["completion"] for pair in pairs[1:] + pairs[:1]]
    return [
        {"prompt": pair["prompt"], "chosen": pair["completion"], "rejected": other}
        for pair, other in zip(pairs, wrong, strict=True)
    ]


def judged(pairs):
    return [pair | {"label": i % 3 > 0} for i, pair in enumerate(pairs)]


TRL = {  # module, trainer, config, data, settings
    "sft": ("trl", "SFT", lambda pairs: pairs, {}),
    "dpo": ("trl", "DPO", pairwise, {}),
    "reward": ("trl", "Reward", pairwise, {}),
    "kto": ("trl", "KTO", judged, {}),
    "orpo": ("trl.experimental.orpo", "ORPO", pairwise, {}),
    "cpo": ("trl.experimental.cpo", "CPO", pairwise, {}),
}


def of_trl(name):
    module, prefix, data, settings = TRL[name]

    def run(setup, rows, steps, ours):
        from datasets import Dataset

        trl = importlib.import_module(module)
        return first_gradient(
            getattr(trl, f"{prefix}Trainer"),
            getattr(trl, f"{prefix}Config"),
            loaded(setup, "SequenceClassification" if name == "reward" else "CausalLM"),
            Dataset.from_list(data(setup.pairs)),
            setup.tokenizer,
            (rows, steps),
            ours,
            settings,
        )

    return run


def loaded(setup, head):
    import transformers

    kind = getattr(transformers, f"LlamaFor{head}")
    torch.manual_seed(0)
    return kind.from_pretrained(setup.saved(), **({} if head == "CausalLM" else {"num_labels": 1}))


def of_unsloth(setup, rows, steps, ours):
    from datasets import Dataset
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        setup.saved(), max_seq_length=LONGEST, load_in_4bit=False, dtype=torch.float32
    )
    model = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=["q_proj", "v_proj"], use_gradient_checkpointing=False
    )
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then so is the gradient of lora_A
            nn.init.normal_(p, std=0.1)
    trl = importlib.import_module("trl")
    data = Dataset.from_list(setup.pairs)
    common = (trl.SFTTrainer, trl.SFTConfig, model, data, setup.tokenizer)
    return first_gradient(*common, (rows, steps), ours, {})


def first_gradient(trainer_class, config_class, model, data, tokenizer, split, ours, settings):
    """Train one step and return the gradient that the optimizer is given."""
    from transformers import TrainerCallback

    import gradaccum

    class Keep(TrainerCallback):
        found = None

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            Keep.found = left(model)

    args = config_class(
        output_dir=tempfile.mkdtemp(), max_steps=1, use_cpu=True, bf16=False, report_to=[],
        per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1],
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        learning_rate=0.0, optim="sgd", max_length=2 * LONGEST, **settings,
    )  # fmt: skip
    trainer = trainer_class(
        model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Keep()]
    )
    if ours:
        gradaccum.attach(trainer)
    trainer.train()
    assert not ours or trainer.accumulation.last.num_micros > 1
    return Keep.found


LOOPS = {
    "accelerate accumulate()": of_accelerate,
    "lightning accumulate_grad_batches": of_lightning,
    "fabric no_backward_sync": of_fabric,
    **{f"trl-{name}": of_trl(name) for name in TRL},
    "unsloth-sft": of_unsloth,
}


def figures(setup, loop):
    """Return the error of each split, stock and ours; or why there is none."""

    def gradient(rows, steps, ours):
        with contextlib.redirect_stdout(io.StringIO()):
            return loop(setup, rows, steps, ours)

    truth = gradient(ROWS, 1, False)
    found = {}
    for name, ours in (("stock", False), ("ours", True)):
        found[name] = {}
        for rows, steps in SPLITS:
            try:
                error = (gradient(rows, steps, ours) - truth).norm() / truth.norm()
                found[name][f"{rows} x {steps}"] = float(f"{error:.1e}")
            except gradaccum_errors() as error:
                found[name][f"{rows} x {steps}"] = f"refused: {error.message}"
    return found


def gradaccum_errors():
    import gradaccum

    return gradaccum.errors.GradaccumError


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=LOOPS, help="names of loops")
    parser.add_argument("--out")
    options = parser.parse_args()
    names = options.only or [name for name in LOOPS if name != "unsloth-sft"]
    libraries = ["transformers", "trl", "accelerate"]
    if "unsloth-sft" in names:
        libraries.insert(0, "unsloth")
    if any(name.startswith(("lightning", "fabric")) for name in names):
        libraries.append("lightning")
    modules = [importlib.import_module(name) for name in libraries]
    modules[libraries.index("transformers")].logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    setup, rows = Setup(), {}
    for name in names:
        rows[name] = figures(setup, LOOPS[name])
        print(name, rows[name], flush=True)
    publish({"examples": ROWS, "relative gradient error": rows}, options.out, *modules)


if __name__ == "__main__":
    main()
