"""Tiny models, a tokenizer and ragged token data for the tests of the Hugging Face adapters."""

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from tests import oracle

VOCAB = 64


def llama(seed: int = 0, **kwargs) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **{"vocab_size": VOCAB, "tie_word_embeddings": True, "max_position_embeddings": 128}
        | kwargs,
    )
    torch.manual_seed(seed)
    net = LlamaForCausalLM(config)
    net.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    return net


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def words(n: int, generator: torch.Generator) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (n,), generator=generator).tolist())


def prompts(num: int = 40, seed: int = 0) -> datasets.Dataset:
    """Ragged prompt and completion pairs."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 24, (num, 2), generator=g).tolist()
    return datasets.Dataset.from_list(
        [{"prompt": words(a, g) + " ", "completion": words(b, g)} for a, b in lengths]
    )


def token_rows(num: int = 40, seed: int = 0, masked: int = 2) -> datasets.Dataset:
    """Ragged rows of tokens; the first up to `masked` labels of each are -100."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i, n in enumerate(torch.randint(4, 40, (num,), generator=g).tolist()):
        ids = torch.randint(3, VOCAB, (n,), generator=g).tolist()
        skip = i % (masked + 1)
        rows.append({"input_ids": ids, "labels": [-100] * skip + ids[skip:]})
    return datasets.Dataset.from_list(rows)


class Record(TrainerCallback):
    """Keep the gradients before each optimizer step, and which callbacks fired."""

    def __init__(self) -> None:
        self.gradients, self.events = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        left = oracle.left_in(model)
        self.gradients.append({n: None if g is None else g.clone() for n, g in left.items()})

    def on_step_begin(self, *args, **kwargs):
        self.events.append("begin")

    def on_substep_end(self, *args, **kwargs):
        self.events.append("substep")

    def on_step_end(self, *args, **kwargs):
        self.events.append("end")
