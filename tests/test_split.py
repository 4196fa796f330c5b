"""The cut: every example once, within the budget, as few and as large first as can be."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradaccum
from gradaccum.errors import BadInput
from gradaccum.split import split

plain = gradaccum.Objective(loss=lambda *_: None, weight=None, size=lambda example: example)
sizes = st.lists(st.integers(0, 30), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes, st.integers(1, 64), st.none() | st.integers(1, 8))
def test_every_example_once_within_the_budget_largest_first(batch, tokens, examples):
    budget = gradaccum.Budget(tokens=tokens, examples=examples)
    micros = split(batch, plain, budget)
    assert sorted(itertools.chain(*(m.examples for m in micros))) == list(range(len(batch)))
    assert [m.size for m in micros] == sorted((m.size for m in micros), reverse=True)
    for micro in micros:
        own = [batch[i] for i in micro.examples]
        assert micro.size == len(own) * max(own)
        assert micro.useful == sum(own)
        assert micro.size <= tokens or len(own) == 1
        assert examples is None or len(own) <= examples
    assert micros == split(list(batch), plain, budget)


def fewest(batch, tokens):
    """Return the least number of groups by trying every partition."""
    if not batch:
        return 0
    first, rest = batch[0], batch[1:]
    return min(
        1 + fewest([s for i, s in enumerate(rest) if i not in mates], tokens)
        for n in range(len(rest) + 1)
        for mates in itertools.combinations(range(len(rest)), n)
        if not mates or (n + 1) * max(first, *(rest[i] for i in mates)) <= tokens
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 30))
def test_no_cut_has_fewer_micro_batches(batch, tokens):
    assert len(split(batch, plain, gradaccum.Budget(tokens=tokens))) == fewest(batch, tokens)


def test_budgets_and_sizes_are_checked():
    with pytest.raises(BadInput, match="needs a bound"):
        gradaccum.Budget()
    for wrong in (0, -1, 2.5, True, "8"):
        with pytest.raises(BadInput):
            gradaccum.Budget(tokens=wrong)
    for wrong in (-1, 1.5, "x"):
        with pytest.raises(BadInput, match="size of example 1"):
            split([3, wrong], plain, gradaccum.Budget(tokens=4))
    assert str(gradaccum.Budget(tokens=2048, examples=3)) == "2,048 tokens and 3 examples"
