"""The embedded default: real, ragged data and a small model that are on every machine.

The data are the functions with docstrings of the running Python's standard library; the tokenizer
is a byte-level BPE trained on them; the model is a small Llama with random weights. All three are
the same each time for one Python version. Files of the user are read in `data`, not here.
"""

import ast
import functools
import io
import os
import random
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_CHAT_TEMPLATE = """\
{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}\
{% else %}{{ message['content'] }}{% endif %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
# Merges are found from this much text; more changes few of them and takes as much longer.
_TOKENIZER_CHARS = 4_000_000


def functions(limit: int | None = None, *, seed: int = 0) -> list[dict[str, str]]:
    """Return the standard library's functions with docstrings as prompt and completion.

    The prompt is the source from `def` to the end of the docstring, the completion the rest of the
    body, both without the indent of the `def`. About 6,000 pairs with Python 3.11.

    Args:
        limit: Return only this many, the first after shuffling.
        seed: Of the order.

    Example:
        >>> sorted(functions(limit=1)[0])
        ['completion', 'prompt']
    """
    pairs = list(_all())
    random.Random(seed).shuffle(pairs)
    return [dict(pair) for pair in pairs[:limit]]  # copies: the parsed ones are cached


@functools.cache
def _all() -> tuple[dict[str, str], ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return tuple(pair for path in sorted(_files(root)) for pair in _pairs(path))


def _files(root: Path) -> Iterator[Path]:
    # The names of the skipped directories count below the root only: Python may itself lie in one.
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _pairs(path: Path) -> Iterator[dict[str, str]]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # the library ships some files that are wrong on purpose
    lines = list(io.StringIO(source))  # str.splitlines also cuts at form feeds, ast does not
    for node in _statements(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is None or len(node.body) < 2:
            continue
        first, second = node.body[0], node.body[1]
        if first.end_lineno is None or node.end_lineno is None or second.lineno <= first.end_lineno:
            continue
        own = _dedent(lines[node.lineno - 1 : node.end_lineno], node.col_offset)
        cut = first.end_lineno - node.lineno + 1
        completion = "".join(own[cut:])
        if completion.strip() not in ("", "pass", "..."):
            # The line break goes to the completion: a BPE joins it with the indent that follows,
            # and a prompt has to end where a token ends.
            prompt = "".join(own[:cut]).rstrip("\n")
            yield {"prompt": prompt, "completion": "\n" + completion}


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what `ast.walk` yields, in its order, but no expressions: they are most of a tree."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
                waiting.append(child)


def _dedent(lines: list[str], width: int) -> list[str]:
    """Take the indent of the first line off; lines inside a string may have less and stay."""
    indent = lines[0][:width]
    return [line.removeprefix(indent) if line.strip() else "\n" for line in lines]


def tokenizer(texts: Iterable[str], *, vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; it decodes to the very text that it encoded.

    Args:
        texts: Training text, of which the first four million characters are used.
        vocab_size: Tokens, the special ones among them; fewer where the text has fewer merges.
    """
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(
        _first(texts, _TOKENIZER_CHARS),
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        show_progress=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer,
        chat_template=_CHAT_TEMPLATE,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def _first(texts: Iterable[str], chars: int) -> Iterator[str]:
    for text in texts:
        yield text
        chars -= len(text)
        if chars <= 0:
            return


def model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> LlamaForCausalLM:
    """Return a Llama of 4 layers and width 256 with random weights, in float32.

    Args:
        tokenizer: Gives the vocabulary and the special tokens.
        seed: Of the weights; the global random state is left alone.
    """
    pad, eos = map(tokenizer.convert_tokens_to_ids, ("<pad>", "<eos>"))
    special: dict[str, Any] = {"pad_token_id": pad, "bos_token_id": eos, "eos_token_id": eos}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **special,
    )
    # Not torch.manual_seed: it also seeds every GPU, and saving their states would start them all.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)
