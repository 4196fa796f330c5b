"""attach against the stock trainer with one big batch: gradients, logs, schedule, resume."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from transformers import Trainer
from trl.trainer import utils

import gradaccum
from gradaccum.errors import BadInput, NotDecomposable
from gradaccum.measured import Measured
from tests import oracle
from tests.hf_models import Record, llama, prompts, token_rows, tokenizer
from tests.trainers import COMMON, build, logged, same


@pytest.mark.parametrize("kind", ["hf", "sft"])
@pytest.mark.parametrize(
    ("total", "per_device", "steps"),
    [(32, 2, 16), (32, 4, 8), (32, 8, 4), (64, 4, 16), (64, 8, 8)],
)
def test_seed_table(tmp_path, kind, total, per_device, steps):
    """Stock arguments in, the gradient of one batch of 32 or 64 out; the last batch is partial."""
    data = prompts(75) if kind == "sft" else token_rows(75)
    big, expected = build(tmp_path, kind, data=data, per_device_train_batch_size=total)
    big.train()
    ours, found = build(
        tmp_path,
        kind,
        attach={},
        data=data,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=steps,
    )
    ours.train()
    assert ours.accumulation.effective_batch_size == total
    assert ours.state.global_step == math.ceil(75 / total)
    same(ours, big, found, expected)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("hf", {"label_smoothing_factor": 0.2}),
        ("hf", {"train_sampling_strategy": "group_by_length"}),
        ("hf", {"train_sampling_strategy": "sequential", "max_steps": 7, "num_train_epochs": 9}),
        ("hf", {"dataloader_drop_last": True, "lr_scheduler_type": "cosine", "warmup_steps": 2}),
        ("hf", {"torch_compile": False, "gradient_checkpointing": True, "num_train_epochs": 1.5}),
        ("hf", {"weight_decay": 0.1, "adam_beta1": 0.8, "lr_scheduler_type": "constant"}),
        ("sft", {"completion_only_loss": False}),
        ("sft", {"loss_type": "dft"}),
        ("sft", {"packing": True, "packing_strategy": "wrapped"}),
        ("sft", {"max_length": 12}),
        ("sft", {"gradient_checkpointing": True, "train_sampling_strategy": "group_by_length"}),
    ],
)
def test_settings(tmp_path, kind, settings):
    big, expected = build(tmp_path, kind, per_device_train_batch_size=16, **settings)
    big.train()
    ours, found = build(
        tmp_path,
        kind,
        attach={"budget": gradaccum.Budget(tokens=70)},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        **settings,
    )
    ours.train()
    assert ours.accumulation.last.num_micros > 1
    same(ours, big, found, expected)


def test_an_effective_batch_that_no_product_gives(tmp_path):
    big, expected = build(tmp_path, per_device_train_batch_size=13)
    ours, found = build(
        tmp_path, attach={"effective_batch_size": 13}, per_device_train_batch_size=4
    )
    big.train(), ours.train()
    same(ours, big, found, expected)
    assert ours.get_total_train_batch_size(ours.args) == 13


def test_batch_rebalance_draws_and_weighs_the_same_batches(tmp_path):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "train_sampling_strategy": "batch_rebalance",
        "max_grad_norm": 0.0,
        "data": token_rows(24),
    }
    stock, expected = build(tmp_path, **settings)
    ours, found = build(tmp_path, attach={}, **settings)
    stock.train(), ours.train()
    assert ours.state.global_step == 3
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert oracle.error(one, other) <= 1e-6


def test_a_count_that_the_first_batch_does_not_tell_is_measured_again(tmp_path):
    """The first batches mask every first label, so shifted and unshifted counts coincide there."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (9,), generator=g).tolist() for _ in range(12)]
    data = [
        {"input_ids": ids, "labels": ids if i >= 8 else [-100, *ids[1:]]}
        for i, ids in enumerate(rows)
    ]
    settings = {"train_sampling_strategy": "sequential", "data": Dataset.from_list(data)}
    big, expected = build(tmp_path, per_device_train_batch_size=4, **settings)
    ours, found = build(tmp_path, attach={"effective_batch_size": 4}, **settings)
    big.train(), ours.train()
    same(ours, big, found, expected)
    counters = ours.accumulation.measured.contract.counters
    assert "shifted:labels" in counters and "trained:labels" not in counters


def test_loss_function_of_the_user(tmp_path):
    def half(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return 0.5 * loss / num_items_in_batch

    settings = {"compute_loss_func": half, "max_grad_norm": 0.0}
    big, expected = build(tmp_path, per_device_train_batch_size=16, **settings)
    ours, found = build(tmp_path, attach={"effective_batch_size": 16}, **settings)
    big.train(), ours.train()
    same(ours, big, found, expected)


def test_subclasses_keep_their_compute_loss(tmp_path):
    class Doubled(Trainer):
        calls = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.calls += self.is_in_train
            return 2 * super().compute_loss(model, inputs, False, num_items_in_batch)

    settings = {"trainer": Doubled, "max_grad_norm": 0.0}
    big, expected = build(tmp_path, per_device_train_batch_size=16, **settings)
    ours, found = build(tmp_path, attach={"effective_batch_size": 16}, **settings)
    assert isinstance(ours, Doubled) and type(ours).__name__ == "Doubled"
    big.train(), ours.train()
    same(ours, big, found, expected)
    assert ours.calls == sum(event == "substep" for event in found.events) + 3


def test_a_loss_that_needs_the_count_is_given_it(tmp_path):
    class Needs(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            logits = model(**inputs).logits[:, :-1].flatten(0, 1)
            labels = labels[:, 1:].flatten()
            total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            return total / float(num_items_in_batch)

    big, expected = build(tmp_path, trainer=Needs, per_device_train_batch_size=16)
    ours, found = build(tmp_path, trainer=Needs, attach={"effective_batch_size": 16})
    big.train(), ours.train()
    same(ours, big, found, expected)


def test_rows_of_one_token_train_nothing_at_first(tmp_path):
    rows = token_rows(16)
    short = Dataset.from_list([{"input_ids": [5], "labels": [5]}] * 8)
    data = concatenate_datasets([short, rows])
    settings = {"data": data, "train_sampling_strategy": "sequential"}
    ours, record = build(tmp_path, attach={"effective_batch_size": 8}, **settings)
    with pytest.warns(UserWarning, match="no trained tokens"):
        ours.train()
    big, expected = build(tmp_path, per_device_train_batch_size=8, **settings | {"data": rows})
    big.train()
    assert all((g == 0).all() for g in record.gradients[0].values())
    assert oracle.error(record.gradients[1], expected.gradients[0]) <= 1e-6


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def adapted():
        return peft.get_peft_model(llama(), config)

    big, expected = build(tmp_path, "sft", model=adapted(), per_device_train_batch_size=16)
    ours, found = build(tmp_path, "sft", model=adapted(), attach={"effective_batch_size": 16})
    big.train(), ours.train()
    assert all("lora" in name for name in found.gradients[0])
    same(ours, big, found, expected)


def test_qlora(tmp_path):
    """Measuring the loss must not run quantised layers in eval mode: that ends their backward."""
    peft, _ = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    llama(tie_word_embeddings=False).save_pretrained(base)
    # alpha 1: with the default of 8 random adapters turn a rounding difference of 1e-7 in the
    # weights into one of 2e-5 in the gradient, of the unquantised model as well.
    config = peft.LoraConfig(
        r=2, lora_alpha=1, target_modules="all-linear", init_lora_weights=False
    )
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def adapted():
        net = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=quantised)
        torch.manual_seed(0)
        return peft.get_peft_model(peft.prepare_model_for_kbit_training(net), config)

    big, expected = build(tmp_path, model=adapted(), per_device_train_batch_size=16)
    ours, found = build(tmp_path, model=adapted(), attach={"effective_batch_size": 16})
    big.train(), ours.train()
    assert all("lora" in name and g.any() for name, g in found.gradients[-1].items())
    same(ours, big, found, expected)
    proof = ours.proof([ours.train_dataset[i] for i in range(16)])
    assert proof.relative_error < 1e-6


def test_callbacks_fire_per_micro_batch_and_per_step(tmp_path):
    budget = gradaccum.Budget(examples=3)
    ours, record = build(tmp_path, attach={"effective_batch_size": 8, "budget": budget})
    ours.train()
    assert record.events == ["begin", "substep", "substep", "end"] * 5
    assert ours.accumulation.last.num_micros == 3


def test_eval_and_metrics_are_those_of_one_big_batch(tmp_path):
    settings = {"per_device_eval_batch_size": 4}
    big, _ = build(tmp_path, "sft", per_device_train_batch_size=16, **settings)
    ours, _ = build(
        tmp_path,
        "sft",
        attach={"effective_batch_size": 16, "budget": gradaccum.Budget(tokens=60)},
        **settings,
    )
    big.train(), ours.train()
    for key in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(ours, key) == pytest.approx(logged(big, key), rel=1e-4)
    mine = ours.evaluate(prompts(9, seed=1))
    assert "eval_entropy" in mine


@pytest.mark.parametrize("kind", ["hf", "sft"])
@pytest.mark.parametrize("trained", [True, False])
def test_the_eval_loss_does_not_depend_on_the_eval_batch_size(tmp_path, kind, trained):
    """TRAPS 35: the stock trainer takes a mean of batch means."""
    data = prompts(9, seed=1) if kind == "sft" else token_rows(9, seed=1)
    losses = {}
    for attach in (None, SMALL):
        for size in (1, 2, 9):
            trainer, _ = build(tmp_path, kind, attach=attach, per_device_eval_batch_size=size)
            if trained:
                trainer.train()
            losses[attach is None, size] = trainer.evaluate(data)["eval_loss"]
    assert losses[False, 1] == pytest.approx(losses[False, 9], rel=1e-6)
    assert losses[False, 2] == pytest.approx(losses[False, 9], rel=1e-6)
    assert losses[True, 2] != pytest.approx(losses[True, 9], rel=1e-6)
    if not trained:
        assert losses[False, 9] == pytest.approx(losses[True, 9], rel=1e-6)


def test_the_head_of_sft_scores_trained_positions_only(tmp_path, monkeypatch):
    scored = []
    apply = utils._ChunkedLogProbFunction.apply

    def spy(hidden, *args):
        scored.append(len(hidden))
        return apply(hidden, *args)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=spy))
    ours, _ = build(tmp_path, "sft", attach={"effective_batch_size": 40})
    ours.train()
    last = ours.accumulation.last
    assert sum(scored[-last.num_micros :]) == last.weight < last.useful


@pytest.mark.parametrize("kind", ["hf", "sft"])
def test_resume_in_the_middle_of_an_epoch_is_bitwise(tmp_path, kind):
    settings = {
        "model": None,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "attach": {"effective_batch_size": 12},
        "include_num_input_tokens_seen": "all",
    }
    dropout = {"attention_dropout": 0.2}
    whole, _ = build(tmp_path, kind, **settings | {"model": llama(**dropout)})
    whole.train()
    assert whole.state.global_step == 8
    resumed, _ = build(tmp_path, kind, **settings | {"model": llama(seed=9, **dropout)})
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    for (name, found), (_, expected) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected), name
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen > 0
    assert resumed.state.total_flos == whole.state.total_flos > 0


def test_collators_that_draw_random_numbers(tmp_path):
    """They are no reason to refuse, draw once for each example, and resume bitwise."""
    settings = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}

    def masking():
        ours, _ = build(tmp_path, attach={"effective_batch_size": 16}, **settings)
        collate = ours.data_collator

        def masked(examples):
            batch = collate(examples)
            batch["labels"][torch.rand(batch["labels"].shape) < 0.3] = -100
            return batch

        ours.data_collator = masked
        return ours

    whole, resumed = masking(), masking()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    for found, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_resume_may_change_the_micro_batches(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole, _ = build(
        tmp_path,
        attach={},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **settings,
    )
    whole.train()
    resumed, _ = build(
        tmp_path,
        attach={},
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        **settings,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    pairs = [dict(t.model.named_parameters()) for t in (resumed, whole)]
    assert oracle.error(*pairs) <= 1e-6


def test_resume_with_another_effective_batch_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    first, _ = build(tmp_path, attach={"effective_batch_size": 8}, **settings)
    first.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    other, _ = build(tmp_path, attach={"effective_batch_size": 10}, **settings)
    with pytest.raises(BadInput, match="effective batch of 8 examples, and this run has 10"):
        other.train(resume_from_checkpoint=checkpoint)
    restoring, _ = build(
        tmp_path,
        attach={"effective_batch_size": 10},
        restore_callback_states_from_checkpoint=True,
        **settings,
    )
    with pytest.raises(BadInput, match="effective batch of 8 examples, and this run has 10"):
        restoring.train(resume_from_checkpoint=checkpoint)
    anew, _ = build(
        tmp_path, attach={"effective_batch_size": 10}, ignore_data_skip=True, **settings
    )
    anew.train(resume_from_checkpoint=checkpoint)
    assert anew.state.global_step == 4


def test_checkpoints_go_from_stock_to_attached_and_back(tmp_path):
    stock = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings = stock | {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1}
    first, _ = build(tmp_path, **settings)
    first.train()
    for number, attach in ((2, {}), (3, None)):
        other, _ = build(tmp_path, attach=attach, **settings)
        other.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{number}"))
        assert other.state.global_step == 5
    first, _ = build(tmp_path, **settings)
    first.train()
    other, _ = build(tmp_path, attach={"effective_batch_size": 16}, **settings)
    with pytest.raises(BadInput, match="another number of examples, and this run has 16"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_a_trainer_can_be_attached_after_it_has_trained(tmp_path):
    big, expected = build(tmp_path, per_device_train_batch_size=16)
    ours, found = build(tmp_path, per_device_train_batch_size=16)
    for trainer in (big, ours):
        trainer.train()
    gradaccum.attach(ours, budget=gradaccum.Budget(examples=3))
    for trainer in (big, ours):
        trainer.train()
    same(ours, big, found, expected)


def test_stream_without_length_steps_on_its_tail(tmp_path):
    """TRAPS 12: 22 examples in windows of 8 are steps of 8, 8 and 6, in every epoch."""
    rows = token_rows(22)
    settings = {"max_steps": 6, "max_grad_norm": 0.0, "learning_rate": 0.0}
    ours, found = build(
        tmp_path, attach={"effective_batch_size": 8}, data=rows.to_iterable_dataset(), **settings
    )
    weights = []
    step = ours.training_step

    def recorded(*args):
        loss = step(*args)
        weights.append(ours.accumulation.last.num_examples)
        return loss

    ours.training_step = recorded
    ours.train()
    assert weights == [8, 8, 6, 8, 8, 6]
    for a, b in zip(found.gradients[:3], found.gradients[3:], strict=True):
        assert oracle.error(a, b) <= 1e-6


def test_a_window_whose_labels_are_all_masked_trains_nothing(tmp_path):
    """TRAPS 14: 0/0 in the stock trainer."""
    rows = token_rows(8).map(lambda row: {"labels": [-100] * len(row["labels"])})
    ours, record = build(tmp_path, attach={"effective_batch_size": 4}, data=rows)
    with pytest.warns(UserWarning, match="no trained tokens"):
        ours.train()
    assert logged(ours, "loss") == [0.0, 0.0]
    assert all((g == 0).all() for gradients in record.gradients for g in gradients.values())


def test_a_loss_that_is_not_finite_is_logged(tmp_path):
    class Broken(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            return loss * math.nan if self.is_in_train and self.state.global_step == 1 else loss

    ours, _ = build(tmp_path, attach={"effective_batch_size": 16}, trainer=Broken)
    with pytest.warns(UserWarning, match="not finite: examples"):
        ours.train()
    losses = logged(ours, "loss")
    assert math.isfinite(losses[0]) and math.isnan(losses[1])


def test_the_proof_leaves_the_run_as_it_was(tmp_path):
    ours, _ = build(tmp_path, "sft", attach={"effective_batch_size": 16})
    ours.train()
    before = copy.deepcopy(ours.model.state_dict())
    rng, metrics = torch.get_rng_state(), copy.deepcopy(ours._metrics)
    proof = ours.proof([ours.train_dataset[i] for i in range(16)])
    assert 0 < proof.relative_error < 1e-6 and 0 < proof.floor < 1e-6
    assert proof.num_examples == 16 and proof.num_micros > 1
    assert torch.equal(rng, torch.get_rng_state()) and metrics == ours._metrics
    assert all(torch.equal(v, before[k]) for k, v in ours.model.state_dict().items())
    assert all(p.grad is None for p in ours.model.parameters()) and ours.model.training


def test_the_proof_of_a_random_collator_compares_like_with_like(tmp_path):
    ours, _ = build(tmp_path, attach={"effective_batch_size": 16})
    collate = ours.data_collator

    def masked(examples):
        batch = collate(examples)
        batch["labels"][torch.rand(batch["labels"].shape) < 0.3] = -100
        return batch

    ours.data_collator = masked
    rng = torch.get_rng_state()
    proof = ours.proof([ours.train_dataset[i] for i in range(16)])
    assert 0 < proof.relative_error < 1e-6 and proof.num_micros > 1
    assert torch.equal(rng, torch.get_rng_state())


def test_the_proof_never_compares_a_batch_with_itself(tmp_path):
    settings = {"effective_batch_size": 6, "budget": gradaccum.Budget(examples=6)}
    ours, _ = build(tmp_path, attach=settings)
    proof = ours.proof([ours.train_dataset[i] for i in range(6)])
    assert proof.num_micros == 2 and 0 < proof.relative_error < 1e-6
    for wrong in ([], ours.train_dataset[:4]):
        with pytest.raises(BadInput, match="proof takes a list of examples"):
            ours.proof(wrong)


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"effective_batch_size": 8, "budget": gradaccum.Budget(examples=3)}


def bert(cls, **kwargs):
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        **kwargs,
    )
    return getattr(transformers, cls)(config)


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        pad_token_id=0,
    )
    return transformers.MixtralForCausalLM(config)


def full_gradient(trainer, net, rows):
    """The gradient of the model's own loss on all rows at once, dropout off."""
    inputs = trainer.data_collator([dict(row) for row in rows])
    return oracle.gradients(net, {"loss": net(**inputs).loss}, {"loss": 1})


@pytest.mark.parametrize(
    ("model", "contract"),
    [
        (lambda: bert("BertForMaskedLM", **NO_DROPOUT), "mean over labels in labels"),
        (lambda: bert("BertForTokenClassification", **NO_DROPOUT), "mean over labels in labels"),
        (mixtral, "a load-balancing loss over the whole effective batch"),
    ],
)
def test_heads_that_ignore_the_count_are_weighed_by_what_they_are_a_mean_over(
    tmp_path, model, contract
):
    torch.manual_seed(0)
    net = model()
    with torch.no_grad():
        [p.mul_(4) for p in net.parameters()]
    data = token_rows(8).map(
        lambda row: {"labels": [-100 if i % 3 == 1 else i % 2 for i in row["labels"]]}
    )
    settings = {"max_grad_norm": 0.0, "learning_rate": 0.0, "data": data}
    budget = gradaccum.Budget(examples=3)
    ours, found = build(
        tmp_path, attach={"effective_batch_size": 8, "budget": budget}, model=net, **settings
    )
    expected = full_gradient(ours, net, data)
    ours.train()
    assert ours.accumulation.last.num_micros == 3
    assert contract in str(ours.accumulation.measured.contract)
    assert oracle.error(found.gradients[0], expected) <= 1e-6


def test_terms_that_the_count_does_not_divide_are_weighed_by_rows_also_if_they_begin_at_zero(
    tmp_path,
):
    class Annealed(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            return loss + self.state.global_step * sum(p.square().sum() for p in model.parameters())

    class OnlyInTraining(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            return loss + sum(p.square().sum() for p in model.parameters()) * model.training

    for trainer in (Annealed, OnlyInTraining):
        attach = {"effective_batch_size": 8, "budget": gradaccum.Budget(examples=3)}
        ours, found = build(tmp_path, attach=attach, trainer=trainer)
        big, expected = build(tmp_path, trainer=trainer, per_device_train_batch_size=8)
        ours.train(), big.train()
        assert ours.accumulation.measured.contract.extra == "rows:"
        same(ours, big, found, expected)


def test_left_padding_that_a_loss_sees_is_refused_whatever_the_lengths(tmp_path):
    """The first label of a row is trained only where padding stands before it."""
    left = tokenizer()
    left.padding_side = "left"
    ours, _ = build(tmp_path, attach=SMALL)
    ours.data_collator = transformers.DataCollatorForLanguageModeling(left, mlm=False)
    lengths = [5, 5, 9, 12, 17, 22, 30, 31]
    ours.train_dataset = Dataset.from_list([{"input_ids": [*range(3, 3 + n)]} for n in lengths])
    with pytest.raises(NotDecomposable, match="rows depend on each other"):
        ours.train()


def test_caches_that_grow_in_a_forward_are_left_alone(tmp_path):
    class Cached(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            if self.table.shape[0] < input_ids.shape[1]:
                self.register_buffer("table", torch.ones(input_ids.shape[1]), persistent=False)
            scale = self.table[: input_ids.shape[1]].mean()
            outputs = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            outputs.loss = outputs.loss * scale
            return outputs

    net = Cached(llama().config)
    net.load_state_dict(llama().state_dict())
    net.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    net.register_buffer("table", torch.zeros(1), persistent=False)
    big, expected = build(tmp_path, per_device_train_batch_size=8)
    ours, found = build(tmp_path, model=net, attach={"effective_batch_size": 8})
    big.train(), ours.train()
    assert oracle.error(found.gradients[0], expected.gradients[0]) <= 1e-6


def test_steps_of_the_users_own_are_refused(tmp_path):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch)

    with pytest.raises(BadInput, match=r"Own.training_step would not be called"):
        build(tmp_path, attach={}, trainer=Own)


def test_inputs_keep_their_type(tmp_path):
    class Attributes(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            assert inputs.labels is inputs["labels"]
            return super().compute_loss(model, inputs, False, num_items_in_batch)

    ours, _ = build(tmp_path, attach={"effective_batch_size": 20}, trainer=Attributes)
    assert isinstance(ours.data_collator([ours.train_dataset[0]]), transformers.BatchEncoding)
    ours.train()


def test_rows_that_depend_on_each_other_are_refused(tmp_path):
    class Contrastive(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            return loss * len(inputs["labels"])

    attach = {"effective_batch_size": 4, "budget": gradaccum.Budget(examples=2)}
    ours, _ = build(tmp_path, attach=attach, trainer=Contrastive)
    with pytest.raises(NotDecomposable, match="rows depend on each other"):
        ours.train()


def test_gpt2_is_divided_by_the_tokens_it_trains(tmp_path):
    """The stock trainer counts one label too many per row for heads without a loss type."""
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.GPT2LMHeadModel(config)
    rows = token_rows(8, masked=0)
    settings = {"max_grad_norm": 0.0, "learning_rate": 0.0, "data": rows}
    ours, found = build(tmp_path, attach={"effective_batch_size": 8}, model=net, **settings)
    inputs = ours.data_collator([dict(row) for row in rows])
    expected = oracle.gradients(net, {"loss": net(**inputs).loss}, {"loss": 1})
    ours.train()
    assert oracle.error(found.gradients[0], expected) <= 1e-6


def test_wrong_arguments_are_refused_at_once(tmp_path):
    trainer, _ = build(tmp_path)
    for size in (0, -3, 2.5, "32", True):
        with pytest.raises(BadInput, match="effective_batch_size"):
            gradaccum.attach(trainer, effective_batch_size=size)
    with pytest.raises(BadInput, match=r"neither a gradaccum.Budget nor"):
        gradaccum.attach(trainer, budget=512)
    with pytest.raises(BadInput, match="takes a transformers"):
        gradaccum.attach(llama())
    assert not isinstance(trainer, gradaccum.integrations.hf.Attached)
    given = trainer.args
    gradaccum.attach(trainer)
    assert given.gradient_accumulation_steps == 1 and given is not trainer.args
    with pytest.raises(BadInput, match="attached already"):
        gradaccum.attach(trainer)
    shrinking, _ = build(tmp_path, auto_find_batch_size=True)
    with pytest.raises(BadInput, match="shrinks the effective batch"):
        gradaccum.attach(shrinking)


def test_data_that_drop_last_would_drop_whole_are_refused(tmp_path):
    ours, _ = build(tmp_path, attach={"effective_batch_size": 41}, dataloader_drop_last=True)
    with pytest.raises(BadInput, match="fewer examples than the effective batch of 41"):
        ours.train()


def test_foreign_dataloaders_are_refused(tmp_path):
    class Own(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_size=2, collate_fn=self.data_collator
            )

    class Prepared(Own):
        def get_train_dataloader(self):
            return self.accelerator.prepare(super().get_train_dataloader())

    for trainer in (Own, Prepared):
        ours, _ = build(tmp_path, attach={"effective_batch_size": 4}, trainer=trainer)
        with pytest.raises(BadInput, match="makes batches of 2 where a step takes 4"):
            ours.train()


def test_a_resumed_run_takes_the_contract_of_its_checkpoint(tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole, _ = build(tmp_path, attach=SMALL, **settings)
    whole.train()
    resumed, record = build(tmp_path, attach=SMALL, **settings)
    measure = []
    monkeypatch.setattr(Measured, "_measure", lambda *args, **given: measure.append(args))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert len(record.gradients) == 8 and not measure
    assert resumed.accumulation.measured.contract == whole.accumulation.measured.contract
    pairs = [dict(t.model.named_parameters()) for t in (resumed, whole)]
    assert oracle.error(*pairs) == 0


def test_a_contract_of_another_loss_is_not_taken(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    first, _ = build(tmp_path, attach=SMALL, **settings)
    first.train()
    kept = first.state.stateful_callbacks["SameBatch"]["attributes"]["contract"]
    assert kept["name"] == "the loss of LlamaForCausalLM" and kept["counted"]
    other = Measured(lambda model, x, count: model(**x).loss, name="another loss")
    same_batch = next(
        c for c in first.callback_handler.callbacks if type(c).__name__ == "SameBatch"
    )
    same_batch.restore(other)
    assert other.contract is None


def test_seq2seq_with_generation(tmp_path):
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.T5ForConditionalGeneration(config)
    rows = token_rows(16).map(lambda row: {"labels": row["labels"][: 1 + len(row["labels"]) // 2]})
    texts = []
    args = transformers.Seq2SeqTrainingArguments(
        **COMMON | {"max_grad_norm": 0.0, "learning_rate": 0.0},
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        per_device_eval_batch_size=3,
        predict_with_generate=True,
        generation_max_length=5,
        train_sampling_strategy="sequential",
    )
    record = Record()
    ours = transformers.Seq2SeqTrainer(
        net,
        args,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer(), label_pad_token_id=-100),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda found: texts.append(found.predictions) or {},
        callbacks=[record],
        processing_class=tokenizer(),
    )
    gradaccum.attach(ours, budget=gradaccum.Budget(examples=3))
    expected = full_gradient(ours, net, rows.select(range(8)))
    whole = ours.data_collator([dict(row) for row in rows])
    ours.train()
    assert oracle.error(record.gradients[0], expected) <= 1e-6
    with torch.no_grad():
        loss = net.eval()(**whole).loss.item()
    assert ours.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert texts and texts[0].shape[0] == 16
