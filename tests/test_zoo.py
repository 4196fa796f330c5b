"""A sample of the zoo, a few heads of each kind; `benchmarks/zoo.py` sweeps over all of them."""

import gc
from typing import Any

import pytest
import torch
import transformers

from tests.zoo import Head, collate, head, measure
from tests.zoo.catalog import class_names

EXACT = 1e-10  # of models that compute in float64 throughout

# Head, variant, and the cases in which the stock Trainer's gradient is not that of the full batch.
DECOMPOSABLE = (
    ("LlamaForCausalLM", "", ""),
    ("LlamaForCausalLM", "unlabelled rows", ""),
    ("BartForCausalLM", "", "AB"),
    ("BertLMHeadModel", "", "8x1 AB"),
    ("BertForMaskedLM", "", "AB"),
    ("BertForSequenceClassification", "", "AB"),
    ("BertForSequenceClassification", "regression", "AB"),
    ("BertForSequenceClassification", "multi-label", "AB"),
    ("LlamaForSequenceClassification", "ignored labels", "AB"),
    ("RobertaForTokenClassification", "", "AB"),
    ("BertForQuestionAnswering", "", "B"),
    ("BertForQuestionAnswering", "out-of-range answers", "AB"),
    ("BertForNextSentencePrediction", "", "AB"),
    ("BertForMultipleChoice", "", "AB"),
    ("BertForPreTraining", "", "AB"),
    ("T5ForConditionalGeneration", "", "AB"),
    ("WhisperForConditionalGeneration", "", "AB"),
    ("Wav2Vec2ForCTC", "", ""),
    ("Wav2Vec2ForCTC", "mean of rows", "AB"),
    ("Wav2Vec2ForSequenceClassification", "", "AB"),
    ("ViTForImageClassification", "", ""),
    ("BeitForImageClassification", "", "AB"),
    ("ASTForAudioClassification", "", ""),  # by chance a sum of labels fits the first rows
    ("LlavaForConditionalGeneration", "", ""),
)
NOT_DECOMPOSABLE = (
    ("ResNetForImageClassification", "", "BatchNorm"),
    ("CLIPModel", "", "in-batch negatives"),
    ("FNetForMaskedLM", "ragged padding", "depend on each other"),
    ("FunnelForSequenceClassification", "ragged padding", ""),
)
# An epsilon in the denominator of the head's own loss, or a loss of the whole batch's routing.
NEARLY = (("ViTForMaskedImageModeling", ""), ("MixtralForCausalLM", "router loss"))


@pytest.fixture(autouse=True, scope="module")
def _light_heap():
    """Take the modules imported so far out of the collections that every Trainer makes."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("name", "variant", "stock_is_wrong"), DECOMPOSABLE)
def test_attached_is_exact(name, variant, stock_is_wrong):
    found = measure(head(name, variant))
    assert "random" not in found and found["floor"] < EXACT
    for case, (ratio, error) in found["ours"].items():
        assert error < EXACT and abs(ratio - 1) < EXACT, case
    for case, (_, error) in found["stock"].items():
        assert (error > 1e-3) if case in stock_is_wrong else (error < EXACT), case


@pytest.mark.parametrize(("name", "variant"), NEARLY)
def test_attached_is_nearly_exact(name, variant):
    found = measure(head(name, variant))
    assert max(error for _, error in found["ours"].values()) < 1e-7
    assert min(found["stock"][case][1] for case in ("A", "B")) > 1e-4


@pytest.mark.parametrize(("name", "variant", "cause"), NOT_DECOMPOSABLE)
def test_what_does_not_decompose_is_refused(name, variant, cause):
    found = measure(head(name, variant))
    for case in ("A", "B"):
        assert found["ours"][case].startswith("NotDecomposable") and cause in found["ours"][case]
    _, error = found["stock"]["A"]
    assert error > 1e-5


def test_a_small_router_loss_beside_a_mean_is_not_missed_in_float32():
    found = measure(head("PhimoeForCausalLM", "router loss"), torch.float32)
    assert max(error for _, error in found["ours"].values()) < 1e-6


def test_a_row_with_a_huge_loss_does_not_hide_that_others_depend_on_their_padding():
    found = measure(head("TapasForQuestionAnswering", "ragged padding"), torch.float32)
    assert "depend on each other" in found["ours"]["A"] and found["stock"]["A"][1] > 0.01


def test_heads_are_of_many_kinds():
    names = class_names()
    assert len(names) == len(set(names)) > 900
    assert len({head(name).kind for name in names}) > 20


def test_rows_are_ragged_and_have_losses_of_their_own():
    model, rows = head("LlamaForCausalLM").build()
    outputs: list[Any] = [model(**collate([row])) for row in rows]
    losses = [output.loss.item() for output in outputs]
    assert len({len(row["input_ids"]) for row in rows}) > 3
    assert len({int((row["labels"] != -100).sum()) for row in rows}) > 3
    assert {int(row["labels"][0] != -100) for row in rows} == {0, 1}
    assert max(losses) > 1.2 * min(losses)


def test_building_twice_gives_the_same():
    one, other = (head("BertForMaskedLM").build() for _ in range(2))
    assert all(map(torch.equal, one[0].parameters(), other[0].parameters()))
    pairs = zip(collate(one[1]).items(), collate(other[1]).items(), strict=True)
    assert all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


def test_what_cannot_be_built_says_why():
    assert measure(Head("BertForMaskedLM", "no such kind"))["unbuilt"].startswith("LookupError")


def test_random_losses_are_marked(monkeypatch):
    forward = transformers.BertForMaskedLM.forward

    def noisy(*args, **given):
        output: Any = forward(*args, **given)
        output.loss = output.loss * torch.rand(())
        return output

    monkeypatch.setattr(transformers.BertForMaskedLM, "forward", noisy)
    assert measure(head("BertForMaskedLM"))["random"] > 0.01
