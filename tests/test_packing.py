"""Packed micro-batches: what each token sees, the same gradient, and off where it is another."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import gradaccum
from gradaccum.batch import as_batch
from gradaccum.causal import causal_lm
from gradaccum.device import suppressing_out_of_memory
from gradaccum.measured import quiet
from gradaccum.memory import layout, probe
from gradaccum.memory.layout import find_layout, packed_of
from gradaccum.memory.probe import in_turns
from gradaccum.packing import attention, backbone
from gradaccum.packing.backbone import Packed
from gradaccum.packing.plan import SHARED, Segment, by_beginning, plan
from gradaccum.padding import pad_collate
from gradaccum.split import split
from tests import models, oracle
from tests.hf_models import llama

tokens = st.lists(st.integers(1, 2), min_size=1, max_size=9)


def num_alike(one, other):
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def trie(rows, shared):
    """Return how many tokens run: of common beginnings of at least `shared` tokens, each once."""
    rows, total = sorted(rows), 0
    for before, row in zip([[], *rows], rows, strict=False):
        alike = num_alike(before, row)
        total += len(row) - (alike if alike >= shared else 0)
    return total


runs = st.sampled_from([[1], [2] * SHARED, [2] * (SHARED - 1) + [3], [4] * 3 * SHARED])
long_rows = st.lists(runs, max_size=6).map(lambda parts: [x for part in parts for x in part])


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(long_rows, max_size=12))
def test_rows_that_begin_alike_lie_together(rows):
    order, alike = by_beginning(rows)
    found = [rows[i] for i in order]
    assert sorted(order) == list(range(len(rows)))
    assert alike == [num_alike(a, b) for a, b in zip([[], *found], found, strict=False)]
    assert found == sorted(rows)  # of numbers of one byte


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(tokens, min_size=1, max_size=8), st.integers(1, 4), st.booleans())
def test_each_token_sees_its_own_row_up_to_itself(rows, shared, is_left):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    begins = [width - len(row) if is_left else 0 for row in rows]
    for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        ids[i, begin : begin + len(row)] = torch.tensor(row)
        mask[i, begin : begin + len(row)] = 1
    found = plan(ids, mask, shared=shared)
    if found is None:
        assert is_left or trie(rows, shared) == len(rows) * width
        return
    if not is_left:
        assert found.num_tokens == trie(rows, shared)
    packed, where = ids.flatten()[found.source_S], found.target_N.view(len(rows), width)
    for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        for column in range(begin, begin + len(row)):
            at = int(where[i, column])
            assert found.position_S[at] == column
            (own,) = (s for s in found.segments if s.begin <= at < s.end)
            seen = [j for a, b in own.before for j in range(a, b)] + list(range(own.begin, at + 1))
            assert packed[seen].tolist() == row[: column - begin + 1]


def test_padding_between_tokens_is_not_packed():
    ids, mask = torch.tensor([[1, 2, 3], [1, 2, 0]]), torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert plan(ids, mask) is None


SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
PLAIN = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def adapted():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    return model


MAKERS = {
    "llama": llama,
    "LoRA": adapted,
    "qwen3 (grouped)": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "mistral (window)": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5)),
    "gpt2 (positions)": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ),
}
# Two system prompts of 20 tokens, branches of branches, a row twice, and rows that share nothing.
SYSTEM = [list(range(3, 23)), list(range(22, 2, -1))]
TAILS = [[5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 9], [30], [31, 32, 33, 34, 35, 36, 37], [30]]
ROWS = [SYSTEM[i % 2] + tail for i, tail in enumerate(TAILS * 2)] + [[7, 8, 9], [9] * 30]
EXAMPLES = [{"input_ids": row, "labels": [-100] * 2 + row[2:]} for row in ROWS]


def made(name):
    """Return a model that computes in float64 throughout: norms of transformers do not."""
    torch.manual_seed(0)
    model = MAKERS[name]().double().train()
    for parent in list(model.modules()):
        for child, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                other = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                other.weight = norm.weight
                setattr(parent, child, other)
    return model


def truth(model, examples):
    """Return the gradient of all rows, each by itself."""
    total, num = 0.0, 0
    for example in examples:
        row = {key: torch.tensor([value]) for key, value in example.items()}
        logits = model(input_ids=row["input_ids"]).logits[0, :-1]
        labels = row["labels"][0, 1:]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        num += int((labels != -100).sum())
    return oracle.gradients(model, {"loss": total}, {"loss": num})


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_each_row_by_itself(name, checkpointing):
    model = made(name)
    expected = truth(model, EXAMPLES)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    accumulator = gradaccum.Accumulator(model, causal_lm(), budget=gradaccum.Budget(tokens=80))
    step = accumulator.backward(EXAMPLES)
    assert isinstance(accumulator.layout, Packed)
    assert step.num_micros > 1 and step.padded < 0.8 * step.useful  # common beginnings ran once
    assert max(m.size for m in step.micros) <= 80
    assert oracle.error(oracle.left_in(model), expected) < 1e-12


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_float32_within_the_contract(kind):
    model = llama(initializer_range=0.2)
    model.set_attn_implementation(kind)
    expected = truth(model.double(), EXAMPLES)
    accumulator = gradaccum.Accumulator(
        model.float().train(), causal_lm(), budget=gradaccum.Budget(tokens=80)
    )
    accumulator.backward(EXAMPLES)
    assert isinstance(accumulator.layout, Packed)
    assert oracle.error(oracle.left_in(model), expected) < 1e-6


def test_the_model_is_left_as_it_was():
    model = made("llama")
    before = model.config._attn_implementation
    packed, inputs = Packed(model), pad_collate(EXAMPLES)
    with contextlib.suppress(ZeroDivisionError), packed.running(inputs, inputs):
        causal_lm().loss(model, inputs).backward()
        assert packed.num_run == trie(ROWS, 16)
        raise ZeroDivisionError
    assert "forward" not in vars(model.model)
    assert model.config._attn_implementation == before


def test_what_another_row_holds_does_not_matter():
    model, found = made("llama"), []
    for other in (3, 9):
        inputs = pad_collate([EXAMPLES[0], {"input_ids": [other] * 40, "labels": [-100] * 40}])
        with Packed(model).running(inputs, inputs):
            found.append(model.model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}))
    first, second = (outputs.last_hidden_state[0, : len(ROWS[0])] for outputs in found)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


def test_other_inputs_inside_run_as_they_are():
    model, inputs = made("llama"), pad_collate(EXAMPLES)
    other = pad_collate([{"input_ids": row[::-1], "labels": row} for row in ROWS])
    with torch.no_grad():
        expected = model(other["input_ids"], other["attention_mask"]).logits
        with Packed(model).running(inputs, inputs):
            found = model(input_ids=other["input_ids"], attention_mask=other["attention_mask"])
    assert torch.equal(found.logits, expected)


BERT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0,
}  # fmt: skip
ENCODERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT)),
    "bert (tokens)": lambda: BertForTokenClassification(BertConfig(**BERT)),
    "roberta (positions)": lambda: RobertaForSequenceClassification(RobertaConfig(**BERT)),
    "albert (one layer)": lambda: AlbertForSequenceClassification(
        AlbertConfig(**BERT, embedding_size=8, classifier_dropout_prob=0)
    ),
    "electra (narrow embeddings)": lambda: ElectraForSequenceClassification(
        ElectraConfig(**BERT, embedding_size=8)
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2, dropout=0,
            attention_dropout=0, seq_classif_dropout=0,
        )
    ),
    "modernbert (rotary)": lambda: ModernBertForSequenceClassification(modern_bert()),
}  # fmt: skip


def modern_bert(**config):
    return ModernBertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2, cls_token_id=1,
        sep_token_id=2, **config,
    )  # fmt: skip


def classified(model, micro):
    """Return the summed loss of rows, or of tokens, whose class is in `y`."""
    given = {k: micro[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in micro}
    logits, y = model(**given).logits, micro["y"]
    if logits.ndim == 3:
        y = torch.where(micro["attention_mask"] == 1, y[:, None], -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoders_run_packed(name, checkpointing, monkeypatch):
    monkeypatch.setattr(
        layout, "in_turns", lambda *_: ((1.0, 1.0), 4)
    )  # a layer takes microseconds
    torch.manual_seed(0)
    model = ENCODERS[name]().double().train()
    kinds = {} if name in ("distilbert", "modernbert (rotary)") else {"token_type_ids": [0]}
    examples = [
        {"input_ids": row, "y": i % 2} | {kind: value * len(row) for kind, value in kinds.items()}
        for i, row in enumerate(ROWS)
    ]
    singles = [{k: torch.tensor([v]) for k, v in x.items()} for x in examples]
    ones = [x | {"attention_mask": torch.ones_like(x["input_ids"])} for x in singles]
    total = sum(classified(model, x) for x in ones)
    expected = oracle.gradients(model, {"loss": total}, {"loss": len(examples)})
    if checkpointing and model.supports_gradient_checkpointing:  # ALBERT has none
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = gradaccum.Objective(classified, weight=lambda micro: len(micro["y"]))
    accumulator = gradaccum.Accumulator(model, rows, budget=gradaccum.Budget(tokens=80))
    step = accumulator.backward(examples)
    assert isinstance(accumulator.layout, Packed)
    assert step.num_micros > 1 and step.padded == step.useful  # what begins alike is not the same
    assert oracle.error(oracle.left_in(model), expected) < 1e-12
    if name != "modernbert (rotary)":
        assert "forward" not in vars(accumulator.layout.encoder)


def test_an_encoder_asked_for_more_runs_as_it_is():
    torch.manual_seed(0)
    model, inputs = ENCODERS["bert"]().double().train(), pad_collate(EXAMPLES)
    given = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    expected = model(**given, output_hidden_states=True).hidden_states
    packed = Packed(model)
    with packed.running(inputs, inputs):
        found = model(**given, output_hidden_states=True).hidden_states
    assert packed.shared is None and all(map(torch.equal, found, expected))


def test_a_mask_for_pairs_of_tokens_runs_as_it_is():
    torch.manual_seed(0)
    model, inputs = ENCODERS["bert"]().double().train(), pad_collate(EXAMPLES)
    num_rows, width = inputs["input_ids"].shape
    inputs["attention_mask"] = torch.ones(num_rows, width, width, dtype=torch.long)
    packed = Packed(model)
    with packed.running(inputs, inputs):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert packed.shared is not None and not packed.num_run


@pytest.mark.parametrize("asked", [None, True, False])
def test_attention_sees_what_it_is_asked_for(asked):
    """A module may be causal by itself, and be asked for the other."""
    query, key, value = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    segments = [Segment(0, 2), Segment(2, 5)]
    for own in (True, False):
        module = SimpleNamespace(is_causal=own)
        found = attention.Attention(segments)(module, query, key, value, is_causal=asked)
        is_causal = own if asked is None else asked
        for begin, end, _ in segments:
            parts = (x[:, :, begin:end] for x in (query, key, value))
            expected = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=is_causal)
            torch.testing.assert_close(found[:, begin:end], expected.transpose(1, 2))


INEXACT = {
    "state-space": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
    "alibi": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2,
                    hidden_dropout=0.0, attention_dropout=0.0)
    ),
    "window both ways": lambda: ModernBertForMaskedLM(modern_bert(local_attention=4)),
    "capped attention": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, attn_logit_softcapping=2.0, attn_implementation="eager")
    ),
    "no transformer": models.model,
}  # fmt: skip


@pytest.mark.parametrize("name", INEXACT)
def test_it_is_off_where_it_would_not_be_exact(name):
    torch.manual_seed(0)
    model = INEXACT[name]().double().train()
    examples = [{k: [t % 17 for t in v] for k, v in e.items()} for e in EXAMPLES[-6:]]
    for example in examples:
        example["labels"] = example["input_ids"]
    accumulator = gradaccum.Accumulator(model, causal_lm(), budget=gradaccum.Budget(tokens=99))
    step = accumulator.backward(examples)
    assert accumulator.layout is None
    assert step.padded >= step.useful


def test_positions_that_count_tokens_are_packed_or_off_but_exact():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16, **PLAIN,
    )  # fmt: skip
    model = OPTForCausalLM(config).double().train()
    expected = truth(model, EXAMPLES)
    gradaccum.Accumulator(model, causal_lm(), budget=gradaccum.Budget(tokens=99)).backward(EXAMPLES)
    assert oracle.error(oracle.left_in(model), expected) < 1e-12


def test_what_turns_up_later_is_run_as_it_is():
    """A loss may hand the model in training what it did not when packing was tried."""
    model, inputs = made("llama"), pad_collate(EXAMPLES)
    packed = Packed(model)
    expected = truth(model, EXAMPLES)
    count = causal_lm().weight(inputs)
    with packed.running(inputs, inputs):
        (causal_lm().loss(model, inputs | {"cap": 3.0}) / count).backward()
    assert packed.shared is None and not packed.num_run
    assert oracle.error(oracle.left_in(model), expected) < 1e-12
    # From then on micro-batches are cut as they run: padded.
    engine = gradaccum.engine.Accumulator(model, causal_lm(), budget=gradaccum.Budget(tokens=80))
    engine.layout = packed
    micros = engine.prepare(EXAMPLES).micros
    assert list(micros) == split(as_batch(EXAMPLES, None), causal_lm(), engine.budget)
    assert sum(micro.size for micro in micros) > sum(micro.useful for micro in micros)


def test_contamination_is_seen(monkeypatch):
    """If every token saw all before it in the packed row, the start-up check would say so."""

    def leaking(segments):
        return attention.Attention([Segment(0, max(segment.end for segment in segments))])

    monkeypatch.setattr(backbone, "Attention", leaking)
    model = made("llama")
    accumulator = gradaccum.Accumulator(model, causal_lm(), budget=gradaccum.Budget(tokens=80))
    assert find_layout(accumulator, as_batch(EXAMPLES, None), quiet) is None


def test_a_common_beginning_that_is_not_seen_is_noticed(monkeypatch):
    """The start-up check makes one, also of a batch whose rows have none."""
    rows = [[i + 3, *(5 + j % 30 for j in range(20 + 5 * i))] for i in range(10)]
    monkeypatch.setattr(layout, "in_turns", lambda *_: ((1.0, 1.0), 4))  # the time is no matter
    batch = as_batch([{"input_ids": row, "labels": row} for row in rows], None)

    def forgetting(segments):
        return attention.Attention([Segment(begin, end) for begin, end, _ in segments])

    model = made("llama")
    accumulator = gradaccum.Accumulator(model, causal_lm(), budget=gradaccum.Budget(tokens=120))
    assert isinstance(find_layout(accumulator, batch, quiet), Packed)
    monkeypatch.setattr(backbone, "Attention", forgetting)
    assert find_layout(accumulator, batch, quiet) is None


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_run_packed_and_lose_no_more_than_padded(autocast):
    model = llama(initializer_range=0.2)
    expected = truth(copy.deepcopy(model).double(), EXAMPLES)
    errors = {}
    for budget in (gradaccum.Budget(tokens=80), gradaccum.Budget(examples=1)):
        net = copy.deepcopy(model).to(torch.float32 if autocast else torch.bfloat16).train()
        accumulator = gradaccum.Accumulator(net, causal_lm(), budget=budget)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            accumulator.backward(EXAMPLES)
        errors[type(accumulator.layout)] = oracle.error(oracle.left_in(net), expected)
    assert errors.keys() == {Packed, type(None)}
    assert errors[Packed] <= 1.5 * errors[type(None)] < 0.1


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("is_causal", [True, False])
def test_all_segments_at_once_see_the_same(heads, is_causal, monkeypatch):
    """The kernel itself runs on CUDA alone (tests/gpu); what it is given is tried here."""

    def kernel(
        q, k, v, begins_q, begins_k, most_q, most_k, *, scale, window_size, enable_gqa=False
    ):
        assert begins_q.dtype == begins_k.dtype == torch.int32
        assert (most_q, most_k) == (begins_q.diff().max(), begins_k.diff().max())
        assert window_size == ((-1, 0) if is_causal else (-1, -1))
        parts = []
        for i in range(len(begins_q) - 1):
            own, seen = (slice(*n[i : i + 2].tolist()) for n in (begins_q, begins_k))
            x, y, z = (t.transpose(0, 1)[None] for t in (q[own], k[seen], v[seen]))
            num, num_seen = x.shape[2], y.shape[2]
            mask = torch.ones(num, num_seen, dtype=torch.bool)
            mask = mask.tril(num_seen - num) if is_causal else mask
            out = torch.nn.functional.scaled_dot_product_attention(
                x, y, z, mask, scale=scale, enable_gqa=enable_gqa
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    query = torch.randn(1, 4, 14, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, heads, 14, 8, dtype=torch.float64)
    tree = [Segment(0, 5), Segment(5, 8, ((0, 5),)), Segment(8, 12, ((0, 5), (5, 8))),
            Segment(12, 14)]  # fmt: skip
    segments = tree if is_causal else [Segment(0, 5), Segment(5, 14)]
    run = attention.Attention(segments)
    expected = run(SimpleNamespace(), query, key, value, is_causal=is_causal, scaling=0.3)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    found = run(SimpleNamespace(), query, key, value, is_causal=is_causal, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_gradients_of_many_branches_add_up_in_32_bits():
    """In 16 bits small ones vanish beside the sum."""
    num = 400
    segments = [Segment(0, 4), *(Segment(4 + i, 5 + i, ((0, 4),)) for i in range(num))]
    exact = torch.randn(3, 1, 2, 4 + num, 8, dtype=torch.float64).to(torch.bfloat16)
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        parts = [x.to(dtype).requires_grad_() for x in exact]
        attention.Attention(segments)(SimpleNamespace(), *parts).sum().backward()
        grads.append(parts[2].grad[:, :, :4].double())
    assert (grads[1] - grads[0]).norm() < 4e-3 * grads[0].norm()


def test_it_is_off_where_it_saves_nothing_and_where_it_is_slow(monkeypatch):
    model = made("llama")
    accumulator = gradaccum.Accumulator(model, causal_lm(), budget=gradaccum.Budget(tokens=80))
    even = [{"input_ids": [i] * 20, "labels": [i] * 20} for i in range(3, 12)]
    assert find_layout(accumulator, as_batch(even, None), quiet) is None
    batch = as_batch(EXAMPLES, None)
    assert find_layout(accumulator, batch, quiet) is not None
    for as_packed, is_packed in ((1.1, True), (1.3, False)):
        monkeypatch.setattr(layout, "in_turns", lambda *_, found=as_packed: ((1.0, found), 4))
        assert (find_layout(accumulator, batch, quiet) is not None) == is_packed


def test_one_slow_turn_on_a_busy_machine_says_nothing(monkeypatch):
    engine = gradaccum.engine.Accumulator(
        made("llama"), causal_lm(), budget=gradaccum.Budget(tokens=80)
    )
    host, ran = as_batch(EXAMPLES, None), []
    cuts = [
        (which, split(host, engine.objective, engine.budget, shared=which and which.shared))
        for which in (None, packed_of(engine.model))
    ]
    taken = iter((1.0, 9.0, 2.0, 3.0))

    def attempt(self, window):
        ran.append(self.layout)
        return SimpleNamespace(seconds=next(taken))

    monkeypatch.setattr(gradaccum.engine.Accumulator, "attempt", attempt)
    monkeypatch.setattr(probe, "LONG", 10.5)
    found, num = in_turns(engine, host, quiet, cuts)
    useful = [micros[len(micros) // 2].useful for _, micros in cuts]
    assert found == [1 / useful[0], 3 / useful[1]]
    assert ran == [which for which, _ in cuts] * 2 and engine.layout is None and num == 4
    taken = iter((1.0, 9.6))
    assert in_turns(engine, host, quiet, cuts) == ([1 / useful[0], 9.6 / useful[1]], 2)  # long


def test_memory_that_runs_out_is_survived(monkeypatch):
    model = made("llama")
    expected = truth(model, EXAMPLES)
    accumulator = gradaccum.Accumulator(model, causal_lm(), budget=gradaccum.Budget(tokens=80))
    accumulator.backward(EXAMPLES)
    model.zero_grad()
    own, num = model.model.layers[1].mlp.forward, []

    def fails_once(x):
        num.append(x.shape[1])
        if len(num) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return own(x)

    model.model.layers[1].mlp.forward = fails_once
    with suppressing_out_of_memory():
        step = accumulator.backward(EXAMPLES)
    assert len(step.recoveries) == 1 and max(num[2:]) <= max(num[:2]) // 2 + 30
    assert oracle.error(oracle.left_in(model), expected) < 1e-12


batches = st.lists(tokens, min_size=1, max_size=30)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches, st.integers(1, 40), st.none() | st.integers(1, 5))
def test_the_packed_cut(batch, bound, rows):
    begin = list(range(20))
    examples = [{"input_ids": (begin if len(row) % 2 else []) + row} for row in batch]
    budget = gradaccum.Budget(tokens=bound, examples=rows)
    micros = split(examples, causal_lm(), budget, shared=SHARED)
    assert sorted(i for m in micros for i in m.examples) == list(range(len(batch)))
    assert [m.size for m in micros] == sorted((m.size for m in micros), reverse=True)
    for micro in micros:
        own = [examples[i]["input_ids"] for i in micro.examples]
        assert micro.size == trie(own, 16)
        assert micro.useful == sum(map(len, own))
        assert micro.size <= bound or len(own) == 1
        assert rows is None or len(own) <= rows
    assert micros == split(list(examples), causal_lm(), budget, shared=SHARED)


def test_equal_cost_at_no_more_micro_batches():
    sizes = gradaccum.Objective(loss=lambda *_: None, weight=None, size=lambda n: n)
    cut = split([1] * 33, sizes, gradaccum.Budget(examples=32))
    assert [len(m.examples) for m in cut] == [17, 16]
    cut = split([10] * 9, sizes, gradaccum.Budget(tokens=80), shared=SHARED)
    assert [m.size for m in cut] == [50, 40]
