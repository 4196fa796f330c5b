"""The embedded default: the pairs, the tokenizer and the model, the same on every run."""

import ast
import sysconfig

import pytest
import torch

from gradaccum.cli import embedded

SOURCE = '''\
import abc
\x0c
def first(a):
    """One line."""
    return a


class Outer:
    @property
    def second(self):
        """Two
        lines."""

        text = """
at the margin
"""

        def inner():
            """Nested."""
            return 1
        return text

    async def third(self): """No room.""" ; return 3

    def fourth(self):
        """Says nothing more."""
        pass

    def fifth(self):
        """Also nothing."""
        ...

    def sixth(self):
        """A docstring and no body."""

    def seventh(self):
        return "no docstring"


try:
    async def eighth():
        \'\'\'In a block.\'\'\'
        # a comment stays
        await None
except NameError:
    pass
'''

EXPECTED = {
    'def first(a):\n    """One line."""': "\n    return a\n",
    'def second(self):\n    """Two\n    lines."""': (
        '\n\n    text = """\nat the margin\n"""\n\n    def inner():\n        """Nested."""\n'
        "        return 1\n    return text\n"
    ),
    'def inner():\n    """Nested."""': "\n    return 1\n",
    "async def eighth():\n    '''In a block.'''": "\n    # a comment stays\n    await None\n",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of a few files, below directories whose names are skipped inside it."""
    root = tmp_path / "tests" / "site-packages" / "lib"
    for folder in ("test", "pkg/tests", "site-packages", "idlelib"):
        (root / folder).mkdir(parents=True)
        (root / folder / "skipped.py").write_text('def no():\n    """No."""\n    return 0\n')
    (root / "pkg" / "some.py").write_text(SOURCE)
    (root / "wrong.py").write_text('def broken(:\n    """No."""\n    return 0\n')
    (root / "latin.py").write_bytes(b'def no():\n    """\xe9"""\n    return 0\n')
    (root / "data.txt").write_text('def no():\n    """No."""\n    return 0\n')
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    embedded._all.cache_clear()
    yield root
    embedded._all.cache_clear()


@pytest.fixture(scope="module")
def pairs():
    return embedded.functions()


@pytest.fixture(scope="module")
def texts(pairs):
    return [pair["prompt"] + pair["completion"] for pair in pairs]


@pytest.fixture(scope="module")
def tok(texts):
    return embedded.tokenizer(texts[:300], vocab_size=1000)


def test_the_pairs_are_the_source_cut_after_the_docstring(library):
    pairs = embedded.functions()
    assert {pair["prompt"]: pair["completion"] for pair in pairs} == EXPECTED
    assert len(pairs) == len(EXPECTED)


def test_the_order_of_files_on_the_disk_does_not_matter(library, monkeypatch):
    (library / "a.py").write_text('def other():\n    """Other."""\n    return 0\n')
    there = embedded.functions()
    embedded._all.cache_clear()
    files = embedded._files
    monkeypatch.setattr(embedded, "_files", lambda root: reversed(list(files(root))))
    assert embedded.functions() == there


def test_every_function_of_the_library_is_code_of_its_own(pairs):
    assert len(pairs) > 4000
    for pair in pairs:
        assert pair["prompt"].startswith(("def ", "async def "))
        (function,) = ast.parse(pair["prompt"] + pair["completion"]).body
        assert ast.get_docstring(function, clean=False) is not None and len(function.body) > 1
        (head,) = ast.parse(pair["prompt"]).body
        assert len(head.body) == 1 and pair["completion"].strip() not in ("", "pass", "...")


def test_limit_takes_the_first_and_the_seed_shuffles(pairs):
    assert embedded.functions() == pairs and embedded.functions(7) == pairs[:7]
    other = embedded.functions(seed=1)
    assert other != pairs
    assert sorted(p["prompt"] for p in other) == sorted(p["prompt"] for p in pairs)


def test_a_caller_may_change_what_it_gets(pairs):
    embedded.functions(1)[0]["prompt"] = "changed"
    assert embedded.functions(1) == pairs[:1]


def test_the_lengths_are_ragged(texts):
    lengths = sorted(map(len, texts))
    assert lengths[-1] > 20 * lengths[len(lengths) // 2] > 100


def test_tokens_decode_to_the_text(tok, texts):
    for text in [*texts[300:400], "Gruesse: \u00fc\u00df \u4f60\n\t tab  ", ""]:
        assert tok.decode(tok(text)["input_ids"]) == text


def test_a_prompt_ends_where_a_token_ends(tok, pairs):
    for pair in pairs[:300]:
        prompt = tok(pair["prompt"])["input_ids"]
        assert tok(pair["prompt"] + pair["completion"])["input_ids"][: len(prompt)] == prompt


def test_special_tokens_are_distinct_and_single(tok):
    special = [tok.pad_token, tok.eos_token, tok.unk_token]
    ids = [tok(token)["input_ids"] for token in special]
    assert ids == [[tok.pad_token_id], [tok.eos_token_id], [tok.unk_token_id]]
    assert len({*map(tuple, ids)}) == 3
    assert len(tok) == 1000 and tok.model_max_length == 2048


def test_training_takes_an_iterator_is_repeatable_and_silent(texts, tok, capfd):
    again = embedded.tokenizer(iter(texts[:300]), vocab_size=1000)
    assert again.get_vocab() == tok.get_vocab()
    assert capfd.readouterr() == ("", "")


def test_training_reads_no_more_text_than_it_needs(monkeypatch):
    monkeypatch.setattr(embedded, "_TOKENIZER_CHARS", 10)
    taken = []
    embedded.tokenizer(taken.append(n) or "abcdef" for n in range(100))
    assert taken == [0, 1]


def test_the_model_is_given_by_its_seed_alone(tok):
    state = torch.get_rng_state()
    one = embedded.model(tok, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other = embedded.model(tok, seed=1), embedded.model(tok, seed=2)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        assert weight.dtype == torch.float32
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_the_model_fits_its_tokenizer_and_computes(tok):
    net = embedded.model(tok)
    config = net.config
    assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (len(tok), 4, 256)
    assert (config.pad_token_id, config.eos_token_id) == (tok.pad_token_id, tok.eos_token_id)
    assert config.max_position_embeddings >= tok.model_max_length
    assert net.lm_head.weight is not net.model.embed_tokens.weight
    batch = tok(["def f():", "x"], padding=True, return_tensors="pt")
    loss = net(**batch, labels=batch["input_ids"]).loss
    assert abs(loss.item() - torch.log(torch.tensor(float(len(tok)))).item()) < 1
