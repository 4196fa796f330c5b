"""A loss that holds the logits of a few positions at a time: the same gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

import gradaccum
from gradaccum.errors import BadInput
from tests import models, oracle
from tests.hf_models import llama

EXAMPLES = models.examples([9, 5, 12, 4])
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip


def gradient(model, objective):
    model.zero_grad()
    accumulator = gradaccum.Accumulator(
        model.train(), objective, budget=gradaccum.Budget(tokens=24)
    )
    loss = accumulator.backward(EXAMPLES).loss
    return loss, oracle.left_in(model)


def adapted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
    return peft.get_peft_model(llama(), config)


MAKERS = {
    "llama": llama,
    "tied": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ),
    "LoRA": adapted,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_the_gradient_is_the_same(name, chunk):
    torch.manual_seed(0)
    model = MAKERS[name]().double()
    loss, expected = gradient(model, gradaccum.causal_lm())
    found, chunked = gradient(model, gradaccum.causal_lm(chunk=chunk))
    assert found == pytest.approx(loss, rel=1e-12)
    assert oracle.error(chunked, expected) < 1e-12


class Logits(TorchDispatchMode):
    """Note the rows of all that is made, forward and backward, and as wide as the vocabulary."""

    def __init__(self, model):
        super().__init__()
        self.rows, self._head = set(), model.get_output_embeddings().weight.shape

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, (list, tuple)) else [found]:
            is_head = isinstance(x, torch.Tensor) and x.shape == self._head[::-1]
            if isinstance(x, torch.Tensor) and x.shape[-1:] == self._head[:1] and not is_head:
                self.rows.add(x.numel() // self._head[0])
        return found


@pytest.mark.parametrize(("chunk", "most"), [(None, 9 - 5), (3, 3)])
def test_the_whole_logits_are_never_there(chunk, most):
    model = llama(vocab_size=97)
    prompts = [{**e, "labels": [-100] * 5 + e["labels"][5:]} for e in EXAMPLES]
    accumulator = gradaccum.Accumulator(
        model, gradaccum.causal_lm(chunk=chunk), budget=gradaccum.Budget(examples=1)
    )
    accumulator.backward(prompts)  # how the head is found is looked at once
    model.zero_grad()
    with Logits(model) as logits:
        accumulator.backward(prompts[:1])
    assert logits.rows and max(logits.rows) == most


def test_logits_that_are_more_than_the_heads_are_refused():
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=30.0))
    with pytest.raises(BadInput, match="Gemma2ForCausalLM changes what its head returns"):
        gradient(model, gradaccum.causal_lm(chunk=4))
    assert "forward" not in vars(model.lm_head)


def test_a_model_without_a_known_head_is_refused():
    with pytest.raises(BadInput, match="CausalLM has no output embeddings"):
        gradient(models.model(), gradaccum.causal_lm(chunk=4))


@pytest.mark.parametrize("chunk", [0, -1, 2.5])
def test_a_bad_chunk(chunk):
    with pytest.raises(BadInput, match="chunk="):
        gradaccum.causal_lm(chunk=chunk)


def test_who_wrapped_the_head_keeps_it():
    model, seen = llama().double(), []
    own = model.lm_head.forward

    def wrapped(hidden):
        seen.append(hidden.shape)
        return own(hidden)

    _, expected = gradient(model, gradaccum.causal_lm())
    model.lm_head.forward = wrapped
    _, found = gradient(model, gradaccum.causal_lm(chunk=5))
    assert model.lm_head.forward is wrapped and seen
    assert oracle.error(found, expected) < 1e-12
