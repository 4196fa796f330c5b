"""Slicing, trimming and collating: what is cut, and above all what is left alone."""

import dataclasses
from collections import defaultdict, namedtuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from gradaccum.batch import Collated, Listed, as_batch
from gradaccum.errors import BadInput
from gradaccum.padding import pad_collate
from gradaccum.trees import map_tensors, to_device
from tests.models import collated, examples


def hold(tree):
    return Collated(tree, trim=True)


def shapes(tree):
    return map_tensors(tree, lambda leaf: tuple(leaf.shape))


def test_right_padding_is_trimmed_to_the_rows_taken():
    batch = hold(collated(examples([3, 8, 5]), extra=4))
    assert set(shapes(batch.take([0, 2])).values()) == {(2, 5)}
    assert batch.take([2])["input_ids"].shape == (1, 5)
    assert [len(example["input_ids"]) for example in batch] == [3, 8, 5]


def test_left_padding_is_trimmed_only_where_positions_are_given():
    left = collated(examples([3, 8, 5]), side="left", extra=4)
    assert hold(left).take([0, 2])["input_ids"].shape == (2, 5)
    left["labels"][2, 7] = 1  # the first token of row 2, predicted from the column before it
    assert hold(left).take([0, 2])["input_ids"].shape == (2, 6)
    del left["position_ids"]  # trimming would move every token to another position
    assert hold(left).take([0, 2])["input_ids"].shape == (2, 12)


def test_labels_alone_do_not_tell_padding_from_context():
    batch = collated(examples([3, 8, 5]), extra=4)
    del batch["attention_mask"]
    assert hold(batch).take([0])["input_ids"].shape == (1, 12)


def test_labels_keep_what_the_attention_mask_would_cut():
    batch = collated(examples([3, 8]), extra=2)
    batch["labels"][0, 6] = 1
    assert hold(batch).take([0])["labels"].shape == (1, 7)


def test_decoder_labels_are_trimmed_by_themselves():
    batch = {
        "input_ids": torch.ones(2, 9, dtype=torch.long),
        "attention_mask": torch.tensor([[1] * 4 + [0] * 5, [1] * 9]),
        "labels": torch.tensor([[1, 2, -100, -100, -100], [1, 2, 3, -100, -100]]),
    }
    assert shapes(hold(batch).take([0])) == {
        "input_ids": (1, 4),
        "attention_mask": (1, 4),
        "labels": (1, 2),
    }


@pytest.mark.parametrize(
    "extra",
    [
        {"history": torch.ones(2, 8)},
        {"mask_4d": torch.ones(2, 1, 8, 8)},
        {"table": torch.ones(5, 8)},
        {"hidden": torch.ones(2, 3, 8)},
    ],
)
def test_a_width_that_stands_elsewhere_too_is_not_trimmed(extra):
    batch = collated(examples([3, 8])) | extra
    taken = hold(batch).take([0])
    assert taken["input_ids"].shape == (1, 8)
    name = next(iter(extra))
    assert taken[name].shape[-1] == 8


def test_embeddings_and_shared_positions_are_trimmed_along():
    batch = collated(examples([3, 8]))
    batch["inputs_embeds"] = torch.randn(2, 8, 5)
    batch["position_ids"] = torch.arange(8)[None]
    taken = hold(batch).take([0])
    assert taken["inputs_embeds"].shape == (1, 3, 5)
    assert taken["position_ids"].tolist() == [[0, 1, 2]]


def test_nested_batches_keep_their_types():
    Pair = namedtuple("Pair", "x y")
    batch = hold({"pair": Pair(torch.arange(4), torch.ones(4, 2)), "ids": [7, 8, 9, 10]})
    taken = batch.take([3, 1])
    assert isinstance(taken["pair"], Pair) and taken["pair"].x.tolist() == [3, 1]
    assert taken["ids"] == [10, 8]
    assert to_device(taken, torch.device("cpu"))["ids"] == [10, 8]


@pytest.mark.parametrize(
    ("batch", "kind", "length"),
    [
        ([{"x": 1}, {"x": 2}, {"x": 3}], Listed, 3),
        ([(1, 2), (3, 4)], Listed, 2),
        ([torch.ones(4, 2), torch.ones(4)], Collated, 4),
        ((torch.ones(4, 2), {"y": torch.ones(4)}), Collated, 4),
        ([torch.tensor(1.0), torch.tensor(2.0)], Listed, 2),
        ([torch.ones(3), torch.ones(5)], Listed, 2),
        ([np.ones((5, 2)), np.ones(5)], Collated, 5),
        ({"images": [torch.ones(3, 5, 5), torch.ones(3, 4, 4)]}, Collated, 2),
        (torch.ones(6, 2), Collated, 6),
    ],
)
def test_the_form_of_a_batch_is_told_by_its_type(batch, kind, length):
    host = as_batch(batch, None)
    assert (type(host), len(host)) == (kind, length)
    assert type(as_batch([torch.ones(4), torch.ones(4)], torch.stack)) is Listed


def test_a_list_is_one_value_for_each_row_or_refused():
    """Three images of three channels may be three rows, or three views of three rows."""
    images = [torch.full((4, 2, 2), float(i)) for i in range(3)]
    taken = hold({"images": images, "y": torch.arange(3)}).take([2])
    assert len(taken["images"]) == 1 and taken["images"][0][0, 0, 0] == 2
    for parts in ([torch.ones(3, 4)] * 3, [torch.ones(3, 4), torch.ones(5, 4)]):
        with pytest.raises(BadInput, match="the number of rows"):
            hold({"x": parts, "y": torch.ones(3)}).take([0])
    two = hold({"x": [torch.ones(3, 4)] * 2, "y": torch.ones(3)}).take([0])
    assert [part.shape for part in two["x"]] == [(1, 4)] * 2


def test_the_number_of_rows_is_not_guessed_from_the_order_of_keys():
    with pytest.raises(BadInput, match="disagree"):
        hold({"prototypes": torch.ones(3, 4), "x": torch.ones(6, 4), "y": torch.ones(6)})


def test_what_is_trimmed_is_contiguous():
    assert hold(collated(examples([3, 8]), extra=2)).take([0])["labels"].is_contiguous()


def test_arrays_of_numpy_are_rows_like_tensors():
    batch = {"x": np.arange(6).reshape(3, 2), "name": np.array(["a", "b", "c"]), "y": torch.ones(3)}
    taken = hold(batch | {"scale": np.float32(2)}).take([2, 0])
    assert taken["x"].tolist() == [[4, 5], [0, 1]]
    assert taken["name"] == ["c", "a"] and taken["scale"] == 2


def test_mappings_keep_their_type():
    encoding = transformers.BatchEncoding({"x": torch.ones(3, 2), "y": torch.ones(3)})
    taken = to_device(hold(encoding).take([0]), torch.device("cpu"))
    assert isinstance(taken, transformers.BatchEncoding) and taken.x.shape == (1, 2)
    assert hold(defaultdict(list, x=torch.ones(3))).take([0])["x"].shape == (1,)


def test_speech_features_are_no_tokens():
    batch = {
        "input_features": torch.ones(4, 8, 30),
        "decoder_attention_mask": torch.tensor([[1] * 5 + [0] * 3] * 4),
        "labels": torch.tensor([[1] * 5 + [-100] * 3] * 4),
    }
    assert hold(batch).take([0])["input_features"].shape == (1, 8, 30)


def test_batches_without_rows_are_refused():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    with pytest.raises(BadInput, match="PackedSequence"):
        as_batch({"x": packed, "labels": torch.ones(2)}, None).take([0])
    with pytest.raises(BadInput, match="no tensor with a batch dimension"):
        as_batch({"a": 1}, None)
    with pytest.raises(BadInput, match="no examples"):
        as_batch([], None)


def test_pad_collate_pads_stacks_and_lists():
    out = pad_collate(
        [
            {
                "input_ids": [1, 2, 3],
                "labels": [-100, 2, 3],
                "image": torch.ones(3, 2, 2),
                "id": "a",
            },
            {"input_ids": [4], "labels": [4], "image": torch.ones(3, 1, 1), "id": "b"},
        ]
    )
    assert out["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert out["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert out["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert [tuple(image.shape) for image in out["image"]] == [(3, 2, 2), (3, 1, 1)]
    assert out["id"] == ["a", "b"]
    x, y = pad_collate([(torch.ones(2), 0), (torch.zeros(2), 1)])
    assert isinstance(x, Tensor) and x.shape == (2, 2) and y.tolist() == [0, 1]
    with pytest.raises(BadInput, match="different keys"):
        pad_collate([{"a": 1}, {"b": 1}])


def ids(lengths, width):
    return {
        "input_ids": torch.ones(len(lengths), width, dtype=torch.long),
        "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long(),
    }


def test_leaves_of_one_name_are_trimmed_together():
    """Both attention masks of a pair count, not the last one found."""
    pair = {"chosen": ids([7, 3], 8), "rejected": ids([2, 8], 8)}
    taken = shapes(hold(pair).take([0]))
    assert {shape for side in taken.values() for shape in side.values()} == {(1, 7)}
    with pytest.raises(BadInput, match=r"disagree \(input_ids 3, attention_mask 3, input_ids 6"):
        hold({"a": ids([1, 2, 3], 4), "b": ids([1] * 6, 4)})


def test_without_trim_nothing_is_cut():
    batch = Collated(collated(examples([3, 8]), extra=4), trim=False)
    assert batch.take([0])["input_ids"].shape == (1, 12)
    assert [len(example["input_ids"]) for example in batch] == [12, 12]


@pytest.mark.parametrize(
    "other",
    [
        {"attention_mask": torch.zeros(2, 6)},  # added to scores: 0 keeps, -inf hides
        {"position_ids": torch.arange(6)},  # rows of something else
        {"input_ids": torch.ones(2, 6, 3)},  # three tokens each
        {"labels": torch.ones(2, 6, 6)},  # a width that is not cut
        {"rotary": torch.ones(6, 4)},
        {"extra": torch.ones(2, 6)},  # may run along the tokens or not
        {"mask": torch.ones(2, 1, 6, 6)},
    ],
)
def test_a_width_that_is_not_surely_that_of_the_tokens_stays(other):
    batch = ids([2, 3], 6) | other
    taken = hold(batch).take([0])
    trimmed = other.keys() == {"input_ids"}  # runs along the tokens, embedded or not
    assert taken["attention_mask"].shape == (1, 2 if trimmed else 6)


def test_targets_already_shifted_keep_the_column_before_them():
    left = collated(examples([3, 8]), side="left")
    left["shift_labels"] = left.pop("labels").roll(-1, 1)
    left["shift_labels"][:, -1] = -100
    left["shift_labels"][0, 4] = 5  # the last pad predicts the first token
    assert hold(left).take([0])["input_ids"].shape == (1, 4)


def test_what_dataloader_makes_of_pairs_is_a_batch():
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    named = as_batch([x, ("a", "b", "c")], None)
    assert type(named) is Collated
    assert len(named) == 3 and named.take([2, 0])[1] == ("c", "a")
    nested = as_batch([x, [y, y + 1]], None).take([1])
    assert nested[1][1].tolist() == [2]
    assert as_batch((x, None), None).take([1])[1] is None


def test_dataclasses_are_refused():
    @dataclasses.dataclass
    class Targets:
        y: Tensor

    with pytest.raises(BadInput, match="t is a Targets, whose rows are not known"):
        hold({"x": torch.ones(3), "t": Targets(torch.ones(3))})


def test_padding_of_empty_rows_and_shifted_labels():
    padded = pad_collate(
        [
            {"input_ids": [1, 2], "shift_labels": [2, -100]},
            {"input_ids": [], "shift_labels": []},
        ]
    )
    assert padded["input_ids"].dtype == torch.long
    assert padded["shift_labels"].tolist() == [[2, -100], [-100, -100]]
    mixed = pad_collate([{"x": [1, 2]}, {"x": [0.5]}])
    assert mixed["x"].tolist() == [[1.0, 2.0], [0.5, 0.0]]


def test_arrays_that_run_backwards_are_taken():
    assert hold({"x": np.arange(3)[::-1]}).take([0])["x"].tolist() == [2]


def test_plain_values_are_rows_in_a_tuple_too():
    batch = {"x": torch.ones(3, 2), "lengths": (1, 2, 3), "notes": ("a", None, "b")}
    taken = hold(batch).take([2, 0])
    assert taken["lengths"] == (3, 1) and taken["notes"] == ("b", "a")
    views = hold({"y": torch.ones(3), "views": [{"x": torch.arange(3)}, {"x": torch.arange(3)}]})
    assert [view["x"].tolist() for view in views.take([1])["views"]] == [[1], [1]]
    targets = [{"boxes": torch.ones(n, 4)} for n in (1, 3, 2)]  # one of them as long as the batch
    assert len(hold({"y": torch.ones(3), "labels": targets}).take([0, 2])["labels"]) == 2


def test_sequences_of_several_kinds_are_examples():
    assert type(as_batch([np.ones(3), [1, 2, 3], [1, 2]], None)) is Listed
