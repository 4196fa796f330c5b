"""attach with a batch-size schedule: every step exact, and a resumed run the same bit by bit."""

import itertools
import json

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

import gradaccum
from gradaccum.errors import BadInput
from gradaccum.schedule import BatchSchedule
from tests import models, oracle
from tests.hf_models import llama, prompts, token_rows
from tests.trainers import build, logged

STAGES = "4:0,7:3,5:6"
SIZES = [4, 4, 4, 7, 7, 7, 5, 5, 5, 5, 5, 5]  # of steps; epochs of 22 end within them
NUMS = [4, 4, 4, 7, 3, 7, 5, 5, 5, 5, 5, 5, 5, 2]
ENDS = [4 / 22, 8 / 22, 12 / 22, 19 / 22, 1, 29 / 22]  # the epoch after each of these steps
BUDGET = gradaccum.Budget(tokens=70)
SAVED = {"save_strategy": "steps", "save_steps": 1}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "adam_beta2": 0.99}


class Steps(TrainerCallback):
    """Note what each step had and said."""

    def __init__(self, trainer):
        self.trainer, self.nums, self.sizes, self.epochs, self.ended = trainer, [], [], [], []
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **_):
        self.nums.append(self.trainer.accumulation.last.num_examples)
        self.sizes.append(self.trainer.accumulation.effective_batch_size)
        self.epochs.append(state.epoch)

    def on_epoch_end(self, args, state, control, **_):
        self.ended.append(state.global_step)


def rows(kind, num=22):
    return prompts(num) if kind == "sft" else token_rows(num)


def made(tmp_path, kind="hf", schedule=STAGES, *, num=22, **kwargs):
    attach = {"effective_batch_size": schedule, "budget": BUDGET}
    settings = {"num_train_epochs": 3, "data": rows(kind, num)} | kwargs
    trainer, record = build(tmp_path, kind, attach=attach, **settings)
    return trainer, record, Steps(trainer)


def weights(trainer):
    return dict(trainer.model.named_parameters())


def equal(one, other):
    return all(torch.equal(a, weights(other)[name]) for name, a in weights(one).items())


def losses(net, inputs):
    """Return the summed loss of collated inputs and what it is divided by."""
    kept = {k: inputs[k] for k in ("input_ids", "attention_mask") if k in inputs}
    logits, labels = net(**kept).logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return {"loss": loss}, {"loss": int((labels != -100).sum())}


def same_as_one_pass(ours, record, net, loss_of, tolerance):
    """Each step has the gradient of one pass over the batch that the sampler says it has."""
    assert len(record.gradients) == 14
    again, taken = gradaccum.EffectiveBatchSampler(22, STAGES, seed=3, rank=0, world=1), []
    for place, found in zip(again.places(), record.gradients, strict=False):
        batch = again.batch(place.at)
        taken += batch
        inputs = ours.data_collator([dict(ours.train_dataset[i]) for i in batch])
        assert oracle.error(found, oracle.gradients(net, *loss_of(net, inputs))) <= tolerance
    assert sorted(taken) == sorted(3 * list(range(22)))


@pytest.mark.parametrize("kind", ["hf", "sft"])
def test_each_step_has_the_gradient_of_its_own_size(tmp_path, kind):
    """Also where the size has changed, and where an epoch ends inside of a stage."""
    net = llama()
    ours, record, steps = made(tmp_path, kind, model=net, max_grad_norm=0.0, learning_rate=0.0)
    ours.train()
    assert steps.nums == NUMS
    same_as_one_pass(ours, record, net, losses, 1e-6)


def test_in_float64_the_gradients_are_exact(tmp_path):
    """The models of transformers compute norms and losses in float32; this one does not."""

    class Plain(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return models.oracle_loss(model, inputs)[0]["loss"] / num_items_in_batch

    # A trainer counts first labels, which nothing predicts: here they are masked.
    data = models.examples([2 + i % 17 for i in range(22)], masked=lambda _: 1)
    net = models.model()
    settings = {"trainer": Plain, "model": net, "data": data, "remove_unused_columns": False}
    ours, record, steps = made(tmp_path, max_grad_norm=0.0, learning_rate=0.0, **settings)
    ours.data_collator = models.collated
    ours.train()
    assert steps.nums == NUMS
    same_as_one_pass(ours, record, net, models.oracle_loss, 1e-12)


def test_steps_epochs_and_the_schedule_of_the_learning_rate_end_with_the_data(tmp_path):
    ours, _, steps = made(tmp_path, lr_scheduler_type="linear")
    ours.train()
    state = ours.state
    assert (state.global_step, state.max_steps, state.num_train_epochs) == (14, 14, 3)
    assert steps.epochs[:6] == pytest.approx(ENDS) and steps.epochs[-1] == 3.0
    assert steps.ended == [5, 9, 14]
    assert steps.sizes[:12] == SIZES
    assert logged(ours, "learning_rate") == pytest.approx([0.1 * (1 - i / 14) for i in range(14)])
    speed = ours.state.log_history[-1]
    assert speed["train_samples_per_second"] * speed["train_runtime"] == pytest.approx(66, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "num_steps", "epochs"),
    [
        ({"num_train_epochs": 1.5}, 7, 34 / 22),
        ({"max_steps": 8}, 8, 39 / 22),
        ({"max_steps": 5}, 5, 1.0),
        ({"dataloader_drop_last": True, "num_train_epochs": 2}, 7, 2.0),
    ],
)
def test_a_run_ends_where_it_is_told_to(tmp_path, settings, num_steps, epochs):
    ours, _, steps = made(tmp_path, **settings)
    ours.train()
    assert ours.state.global_step == ours.state.max_steps == num_steps
    assert ours.state.epoch == pytest.approx(epochs)
    if "dataloader_drop_last" in settings:
        assert steps.nums == [4, 4, 4, 7, 7, 7, 5]


def test_evaluating_and_saving_by_epoch_follow_the_data(tmp_path):
    ours, _, _ = made(
        tmp_path, eval_strategy="epoch", save_strategy="epoch", eval_dataset=token_rows(5)
    )
    ours.train()
    evaluated = [(e["step"], e["epoch"]) for e in ours.state.log_history if "eval_loss" in e]
    assert evaluated == [(5, 1.0), (9, 2.0), (14, 3.0)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "checkpoint-14", "checkpoint-5", "checkpoint-9"
    ]  # fmt: skip


UNITS = {"steps": STAGES, "samples": "4:0,7:12,5:29 samples", "tokens": "4:0,7:200,5:500 tokens"}


@pytest.mark.parametrize("kind", ["hf", "sft"])
@pytest.mark.parametrize("unit", list(UNITS))
def test_resume_is_bitwise_before_at_and_after_a_change(tmp_path, kind, unit):
    """With dropout, Adam, its rules, and in the middle and at the end of an epoch."""
    schedule = BatchSchedule.parse(UNITS[unit], lr="sqrt", beta2=True)
    dropout = {"attention_dropout": 0.2}
    settings = {**SAVED, **ADAM, "lr_scheduler_type": "cosine"}
    whole, _, steps = made(tmp_path, kind, schedule, model=llama(**dropout), **settings)
    whole.train()
    assert len(set(steps.sizes)) == 3
    for at in {1, 3, *steps.ended[:2], 8}:
        anew = tmp_path / f"from-{at}"
        resumed, _, again = made(
            anew, kind, schedule, model=llama(seed=9, **dropout), **settings | {"save_steps": 100}
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
        assert equal(resumed, whole)
        assert again.nums == steps.nums[at:] and again.epochs == steps.epochs[at:]
        for key in ("loss", "learning_rate", "epoch", "grad_norm"):
            assert logged(resumed, key) == logged(whole, key)
        assert resumed.state.max_steps == whole.state.max_steps


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_of_the_loader_read_ahead_the_sizes_that_come(tmp_path, workers):
    settings = {**SAVED, "dataloader_num_workers": workers, "optim": "adamw_torch"}
    whole, _, steps = made(tmp_path, **settings)
    whole.train()
    plain, _, _ = made(tmp_path / "plain", optim="adamw_torch")
    plain.train()
    assert steps.nums == NUMS and equal(whole, plain)
    resumed, _, again = made(tmp_path / "again", **settings | {"save_steps": 100})
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert equal(resumed, whole) and again.nums == steps.nums[2:]


def test_a_second_run_begins_as_the_first(tmp_path):
    ours, _, steps = made(tmp_path, max_steps=4)
    ours.train()
    ours.train()
    assert steps.nums == 2 * NUMS[:4] and steps.epochs == 2 * steps.epochs[:4]


@pytest.mark.parametrize(("rule", "power"), [("none", 0), ("linear", 1), ("sqrt", 0.5)])
def test_the_learning_rate_follows_the_rule_and_the_scheduler_does_not_see_it(
    tmp_path, rule, power
):
    used = []

    class Used(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
            group = optimizer.param_groups[0]
            used.append((group["lr"], group["betas"][1]))

    schedule = BatchSchedule.parse(STAGES, lr=rule, beta2=True)
    ours, _, _ = made(tmp_path, schedule=schedule, lr_scheduler_type="linear", **ADAM)
    ours.add_callback(Used())
    ours.train()
    plain = [1e-2 * (1 - i / 14) for i in range(14)]
    sizes = [*SIZES, 5, 5]
    expected = [lr * (size / 4) ** power for lr, size in zip(plain, sizes, strict=True)]
    assert [lr for lr, _ in used] == pytest.approx(expected)
    assert [beta2 for _, beta2 in used] == pytest.approx([0.99 ** (size / 4) for size in sizes])
    assert logged(ours, "learning_rate") == pytest.approx(expected)
    group = ours.accumulation.optimizer.param_groups[0]
    assert group["betas"][1] == 0.99 and group["lr"] == 0.0


def test_what_was_scaled_is_put_back_where_the_optimizer_fails(tmp_path):
    schedule = BatchSchedule.parse("4:0,8:1", lr="linear")
    ours, _, _ = made(tmp_path, schedule=schedule, lr_scheduler_type="constant")
    ours.create_optimizer()
    step, calls = ours.optimizer.step, itertools.count()

    def fails(*args, **kwargs):
        if next(calls) == 2:
            raise RuntimeError("broken")
        return step(*args, **kwargs)

    ours.optimizer.step = fails
    with pytest.raises(RuntimeError, match="broken"):
        ours.train()
    assert ours.accumulation.optimizer.param_groups[0]["lr"] == 0.1


def test_a_sampler_of_the_user_may_have_the_schedule(tmp_path):
    data = token_rows(22)

    class Own(Trainer):
        def get_train_dataloader(self):
            return DataLoader(data, batch_sampler=own, collate_fn=self.data_collator)

    own = gradaccum.EffectiveBatchSampler(22, STAGES, seed=3, rank=0, world=1)
    settings = {"trainer": Own, "data": data, "num_train_epochs": 3, **SAVED}
    found, _ = build(tmp_path, attach={"budget": BUDGET}, **settings)
    steps = Steps(found)
    found.train()
    assert steps.nums == NUMS
    plain, _, _ = made(tmp_path / "plain")
    plain.train()
    assert equal(found, plain)
    for stated in (4, "4:0,7:3"):
        attach = {"effective_batch_size": stated, "budget": BUDGET}
        other, _ = build(tmp_path / "other", attach=attach, **settings)
        with pytest.raises(BadInput, match="makes batches of 4:0,7:3,5:6 where attach was given"):
            other.train()


def test_fractional_weights_are_no_obstacle_to_a_schedule(tmp_path):
    data = token_rows(22)

    class Own(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return own

    own = gradaccum.EffectiveBatchSampler(
        22, STAGES, weights=[0.5, 1.5] * 11, seed=3, rank=0, world=1
    )
    found, _ = build(
        tmp_path, trainer=Own, data=data, attach={"budget": BUDGET}, num_train_epochs=3
    )
    expected = own.num_batches(3)
    found.train()
    assert found.state.global_step == expected and found.state.epoch == 3.0


def test_another_schedule_is_refused_on_resume_and_another_rule_named(tmp_path):
    settings = {**SAVED, **ADAM, "max_steps": 5}
    first, _, _ = made(tmp_path, **settings)
    first.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-4")
    kept = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    kept = kept["stateful_callbacks"]["SameBatch"]["attributes"]
    assert kept["schedule"] == STAGES and kept["position"]["steps"] == 4
    for other, said in (("4:0,7:3", "this run has 4:0,7:3"), (4, "this run has one size")):
        trainer, _, _ = made(tmp_path / "other", schedule=other, **settings)
        with pytest.raises(BadInput, match=f"made with {STAGES} as effective batch size, .*{said}"):
            trainer.train(resume_from_checkpoint=checkpoint)
    anew, _, _ = made(tmp_path / "anew", ignore_data_skip=True, **settings)
    with pytest.raises(BadInput, match="ignore_data_skip begins the data anew"):
        anew.train(resume_from_checkpoint=checkpoint)
    plain, _, _ = made(tmp_path / "plain", schedule=4, **settings)
    plain.train()
    trainer, _, _ = made(tmp_path / "third", **settings)
    with pytest.raises(BadInput, match="made with one size as effective batch size, and this run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "out" / "checkpoint-4"))
    ruled = BatchSchedule.parse(STAGES, lr="linear")
    trainer, _, _ = made(tmp_path / "ruled", schedule=ruled, **settings)
    with pytest.warns(UserWarning, match="not as in the checkpoint: lr_rule was none, is linear"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_what_a_schedule_cannot_be_read_with_is_refused(tmp_path):
    class Own(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(train_dataset)

    class Loader(Trainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)

    stream = token_rows(22).to_iterable_dataset()
    for settings, said in (
        ({"trainer": Own}, "Own._get_train_sampler returns SequentialSampler, whose order"),
        ({"trainer": Loader}, "the train loader of Loader has no sampler that the schedule"),
        ({"data": stream, "max_steps": 4}, "the train loader of Trainer has no sampler"),
        ({"train_sampling_strategy": "group_by_length"}, "='group_by_length' makes batches of one"),
    ):
        ours, _, _ = made(tmp_path, **settings)
        with pytest.raises(BadInput, match=said):
            ours.train()
    ruled = BatchSchedule.parse(STAGES, beta2=True)
    ours, _, _ = made(tmp_path, schedule=ruled)
    with pytest.raises(BadInput, match="SGD has no betas, and the schedule has a rule for it"):
        ours.train()
    big, _, _ = made(tmp_path, schedule="4:0,23:3", dataloader_drop_last=True)
    with pytest.raises(BadInput, match=r"drop_last leaves out what does not fill .* of 23"):
        big.train()


def test_data_in_their_order_stay_so(tmp_path):
    ours, _, _ = made(tmp_path, train_sampling_strategy="sequential", max_steps=4)
    ours.train()
    assert ours.accumulation.sampler.batch(0) == [0, 1, 2, 3]


def test_the_proof_after_a_run_with_a_schedule(tmp_path):
    ours, _, steps = made(tmp_path, "sft")
    ours.train()
    batch = next(iter(ours.get_train_dataloader())).examples
    assert len(batch) == 5 and ours.accumulation.effective_batch_size == steps.sizes[-1]
    assert ours.proof(batch).relative_error < 1e-6


def test_the_budget_is_found_for_the_largest_size(tmp_path, monkeypatch):
    from gradaccum.integrations import hf

    asked, found = [], hf.find

    def spy(accumulator, host, sizes, effective_batch, **given):
        asked.append(effective_batch)
        return found(accumulator, host, sizes, effective_batch, **given)

    monkeypatch.setattr(hf, "find", spy)
    ours, _ = build(
        tmp_path, "sft", attach={"effective_batch_size": "4:0,16:2"}, num_train_epochs=1
    )
    ours.train()
    assert asked == [16]
