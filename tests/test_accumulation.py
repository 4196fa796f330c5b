"""How an attached trainer cuts, carries and measures: what it must not change or miss."""

import functools
import resource
import signal

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import Trainer

import gradaccum
from gradaccum.batch import Listed
from gradaccum.errors import BadInput, NotDecomposable
from gradaccum.integrations.accumulation import Cut
from tests.hf_models import llama, token_rows, tokenizer
from tests.trainers import build, same

SMALL = {"effective_batch_size": 8, "budget": gradaccum.Budget(examples=3)}
STEPS = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0}

DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "max_position_embeddings": 16,
}


def test_until_it_is_found_the_budget_is_what_the_arguments_take():
    cut = Cut(None, rows=2, on_cpu=False)
    text = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 200)]
    assert cut.budget_for(text) == gradaccum.Budget(tokens=400)
    assert Cut(None, rows=8, on_cpu=True).budget_for(text) == gradaccum.Budget(tokens=512)
    pairs = [{"input_ids": [1] * 200, "labels": [1] * 2}, {"input_ids": [1], "labels": [1] * 100}]
    assert cut.budget_for(pairs) == gradaccum.Budget(tokens=404)
    pixels = [{"pixel_values": torch.ones(3, 8, 8), "labels": 1}] * 5
    assert cut.budget_for(pixels) == gradaccum.Budget(tokens=2, examples=2)
    assert Cut(gradaccum.Budget(examples=3), 2, False).budget_for(text).examples == 3


def test_workers_of_the_loader_collate(tmp_path):
    """As with the stock trainer, what a collator costs is paid beside the training."""
    settings = {"dataloader_num_workers": 2, "data": token_rows(200), **STEPS}
    settings["num_train_epochs"] = 4
    attach = {"effective_batch_size": 100, "budget": gradaccum.Budget(tokens=512)}
    ours, found = build(tmp_path, attach=attach, **settings)
    collate, in_main = ours.data_collator, []

    def counted(examples):
        if torch.utils.data.get_worker_info() is None:
            in_main.append(len(examples))
        return collate(examples)

    ours.data_collator = counted
    ours.train()
    big, expected = build(tmp_path, per_device_train_batch_size=100, **settings)
    big.train()
    same(ours, big, found, expected)
    # The measurements, and what workers had collated before these; the other 600 come from them.
    assert sum(in_main) < 500


def test_workers_send_large_batches_through_few_files(tmp_path):
    """A file for each tensor would be 300 here, and the trainer would wait for ever."""

    def late(*_):
        raise TimeoutError("the workers have sent nothing")

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(40)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        ours, found = build(
            tmp_path,
            attach={"effective_batch_size": 100, "budget": gradaccum.Budget(examples=1)},
            data=token_rows(200),
            dataloader_num_workers=2,
        )
        ours.train()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(found.gradients) == 2


@pytest.mark.parametrize("spoil", ["appends", "pops"])
def test_collators_may_change_examples_in_place(tmp_path, spoil):
    """They get copies, so that measuring leaves the examples of the step as they are."""

    def spoiled(trainer):
        collate = trainer.data_collator

        def changing(examples):
            for example in examples:
                if spoil == "appends":
                    example["input_ids"].append(1)
                    example["labels"].append(1)
            labels = [example.pop("labels") for example in examples]
            merged = [e | {"labels": own} for e, own in zip(examples, labels, strict=True)]
            return collate(merged)

        trainer.data_collator = changing
        return trainer

    big, expected = build(tmp_path, per_device_train_batch_size=8, **STEPS)
    ours, found = build(tmp_path, attach={"effective_batch_size": 8}, **STEPS)
    spoiled(big).train(), spoiled(ours).train()
    same(ours, big, found, expected)
    again = Listed([{"labels": [1, 2]}], lambda examples: examples[0].pop("labels"))
    assert again.take([0]) == again.take([0]) == [1, 2]


def test_position_tables_that_grow_do_not_grow_while_measuring(tmp_path):
    """The table and the length for which it was computed have to go back together."""
    rows = [{"input_ids": (ids := [3 + (7 * i + j) % 60 for j in range(32)]), "labels": ids}
            for i in range(8)]  # fmt: skip
    settings = {"data": Dataset.from_list(rows), **STEPS}
    big, expected = build(
        tmp_path, model=llama(**DYNAMIC), per_device_train_batch_size=8, **settings
    )
    ours, found = build(
        tmp_path, model=llama(**DYNAMIC), attach={"effective_batch_size": 8}, **settings
    )
    big.train(), ours.train()
    same(ours, big, found, expected)


def test_rows_that_depend_on_the_longest_are_refused(tmp_path):
    """Dynamic RoPE chooses its frequencies by the longest row of the batch."""
    net = llama(initializer_range=0.5, **DYNAMIC)  # fresh weights hardly look at positions
    ours, _ = build(tmp_path, model=net, attach=SMALL, **STEPS)
    with pytest.raises(NotDecomposable, match="rows depend on each other"):
        ours.train()


def test_a_loss_that_couples_three_rows_is_refused(tmp_path):
    class Third(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            return loss * (2 if len(inputs["labels"]) > 2 else 1)

    ours, _ = build(tmp_path, trainer=Third, attach=SMALL)
    with pytest.raises(NotDecomposable, match="for 3 rows together"):
        ours.train()


def test_left_padding_that_a_loss_sees_is_refused_in_bf16_too(tmp_path):
    left = tokenizer()
    left.padding_side = "left"
    ours, _ = build(tmp_path, attach=SMALL, bf16=True)
    ours.data_collator = transformers.DataCollatorForLanguageModeling(left, mlm=False)
    lengths = [60, 64, 72, 80, 96, 110, 120, 128]
    ids = [[3 + (5 * i + j) % 60 for j in range(n)] for i, n in enumerate(lengths)]
    ours.train_dataset = Dataset.from_list([{"input_ids": row} for row in ids])
    with pytest.raises(NotDecomposable, match="rows depend on each other"):
        ours.train()


def test_each_run_measures_anew(tmp_path):
    """Between two runs the loss or the model may have become another one."""
    ours, _ = build(tmp_path, attach=SMALL, max_steps=2)
    ours.train()
    assert ours.accumulation.measured.contract.counted

    def mean(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, labels)

    ours.compute_loss_func = mean
    ours.train()
    contract = ours.accumulation.measured.contract
    assert not contract.counted and contract.counters[0] == "shifted:labels"


def test_arguments_that_change_after_attach_are_refused(tmp_path):
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
        ours, record = build(tmp_path, attach={"effective_batch_size": 8})
        setattr(ours.args, name, 4)
        with pytest.raises(BadInput, match="since attach the arguments were changed to"):
            ours.train()
        assert not record.gradients


@pytest.mark.parametrize(("own", "is_stream"), [(9, False), (12, False), (16, True), (8, True)])
def test_stock_checkpoints_of_another_effective_batch_are_refused(tmp_path, own, is_stream):
    """Of a stream it cannot be told, and is refused as well."""
    data = token_rows(40).to_iterable_dataset() if is_stream else token_rows(40)
    settings = {"save_strategy": "steps", "save_steps": 2, "data": data, "max_steps": 4}
    stock, _ = build(tmp_path, per_device_train_batch_size=8, **settings)
    stock.train()
    ours, _ = build(tmp_path, attach={"effective_batch_size": own}, **settings)
    with pytest.raises(BadInput, match=f"another number of examples, and this run has {own}"):
        ours.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_steps_that_somebody_patched_are_refused(tmp_path, monkeypatch):
    ours, _ = build(tmp_path)
    step = ours.training_step
    ours.training_step = lambda *args: step(*args)
    with pytest.raises(BadInput, match="would not be called"):
        gradaccum.attach(ours)
    original = Trainer.training_step

    def patched(self, *args):
        return original(self, *args)

    for step in (patched, functools.wraps(original)(patched), functools.partial(patched)):
        monkeypatch.setattr(Trainer, "training_step", step)
        with pytest.raises(BadInput, match="would not be called"):
            gradaccum.attach(build(tmp_path)[0])


def test_a_window_does_not_outlive_its_step(tmp_path):
    ours, _ = build(tmp_path, attach={"effective_batch_size": 8})
    seen = []
    collate = ours.data_collator

    def watched(examples):
        seen.append(ours.accumulation.window)
        return collate(examples)

    ours.data_collator = watched
    ours.train()
    assert seen and all(window is None for window in seen)
    assert ours.accumulation.window is None and ours.accumulation.last.num_micros > 0


def test_the_operations_of_any_inputs_can_be_asked_for(tmp_path):
    ours, _ = build(tmp_path, attach={"effective_batch_size": 8})
    stock, _ = build(tmp_path)
    inputs = stock.data_collator([dict(stock.train_dataset[0])])
    assert ours.floating_point_ops(inputs) == stock.floating_point_ops(inputs) > 0
