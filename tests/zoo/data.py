"""Ragged synthetic rows for every kind of head, and how they are collated."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tests.zoo.configs import LABELS
from tests.zoo.inputs import LONGEST, SAMPLES, Row, Spec, image, main_input, sound, text, video

CHOICES = 3
RAGGED = "ragged padding"
# Which axis of what runs along the tokens.
TOKENS = {
    "input_ids": -1,
    "attention_mask": -1,
    "global_attention_mask": -1,
    "bbox": -2,
    "labels": -1,
}
# Models in which padding changes what a row gets: their rows are padded to one length, as their
# users do, but for the variant "ragged padding". Heads for answers look for them in the padding.
LEAKY = (
    r"ForQuestionAnswering|^T5Gemma2?ForSequenceClassification|^EncoderDecoderModel"
    r"|^(ConvBert|CpmAnt|FNet|Funnel|MobileBert|Nystromformer|ProphetNet|XLNet|Yoso)"
)


def examples(model: PreTrainedModel, kind: str, variant: str, num: int, seed: int) -> list[Row]:
    """Return ragged rows for this model, the same for the same seed.

    Raises:
        LookupError: There is no synthetic data for this kind.
    """
    if kind not in KINDS:
        raise LookupError("no synthetic rows for this kind of head")
    spec = Spec(model, kind, variant, torch.Generator().manual_seed(seed))
    rows = [accepted(KINDS[kind](spec, i), spec) for i in range(num)]
    is_leaky = re.search(LEAKY, type(model).__name__) and variant != RAGGED
    return [widened(row) for row in rows] if is_leaky and "input_ids" in rows[0] else rows


def accepted(row: Row, spec: Spec) -> Row:
    """Return the row without masks that the model does not take."""
    optional = {"attention_mask", "decoder_attention_mask", "token_type_ids"}
    return {k: v for k, v in row.items() if k in spec.accepts or k not in optional}


def widened(row: Row) -> Row:
    """Return the row with its tokens padded to the longest that there may be."""
    width = max(LONGEST, length := row["input_ids"].shape[-1])
    padded_row = dict(row)
    for key, axis in TOKENS.items():
        if key in row and row[key].shape[axis:][:1] == (length,):
            shape = list(row[key].shape)
            shape[axis] = width
            padded_row[key] = padded(row[key], shape, fill(key))
    return padded_row


def collate(rows: list[Row]) -> dict[str, Any]:
    """Pad every tensor on the right to the largest of the batch; labels with -100."""
    return {key: batched(key, [row[key] for row in rows]) for key in rows[0]}


def batched(key: str, values: list[Any]) -> Any:
    if not isinstance(values[0], Tensor) or key in ("mask_labels", "class_labels"):
        return values if key != "return_loss" else values[0]
    shape = [max(sizes) for sizes in zip(*(v.shape for v in values), strict=True)]
    return torch.stack([padded(v, shape, fill(key)) for v in values])


def fill(key: str) -> int:
    return -100 if key.endswith("labels") else 0


def padded(value: Tensor, shape: list[int], filling: int) -> Tensor:
    pads = [p for have, want in zip(value.shape, shape, strict=True) for p in (want - have, 0)]
    return F.pad(value, pads[::-1], value=filling)


def trained(spec: Spec, ids: Tensor, row: int, share: float = 0.7) -> Tensor:
    """Return labels of which some are not trained; the first one is in every third row."""
    labels = torch.where(spec.share(len(ids)) < share, ids, -100)
    labels[0] = ids[0] if row % 3 == 0 else -100
    labels[1 + row % (len(ids) - 1)] = ids[1 + row % (len(ids) - 1)]
    if spec.variant == "unlabelled rows" and row in (2, 3):
        labels[:] = -100
    return labels


def causal_lm(spec: Spec, row: int) -> Row:
    inputs = text(spec)
    return inputs | {"labels": trained(spec, inputs["input_ids"], row)}


def masked_lm(spec: Spec, row: int) -> Row:
    inputs = text(spec)
    return inputs | {"labels": trained(spec, inputs["input_ids"], row, share=0.3)}


def classified(spec: Spec, row: int) -> Row:
    inputs = main_input(spec)
    if spec.variant == "regression":
        return inputs | {"labels": spec.normal(1)[0]}
    if spec.variant == "multi-label":
        return inputs | {"labels": spec.integers(0, 2, LABELS).to(spec.model.dtype)}
    ignored = spec.variant == "ignored labels" and row in (1, 4, 5)
    return inputs | {"labels": torch.tensor(-100 if ignored else spec.number(0, LABELS))}


def token_classified(spec: Spec, row: int) -> Row:
    inputs = text(spec)
    classes = spec.integers(0, LABELS, len(inputs["input_ids"]))
    return inputs | {"labels": trained(spec, classes, row)}


def answered(spec: Spec, row: int) -> Row:
    inputs = text(spec)
    length = len(inputs["input_ids"])
    start = spec.number(0, length - 1)
    end = spec.number(start, length)
    if spec.variant == "out-of-range answers" and row in (1, 4):
        start = end = 1000
    return inputs | {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}


def choices(spec: Spec, row: int) -> Row:
    length = spec.number(4, LONGEST + 1)
    rows = [text(spec, length=length) for _ in range(CHOICES)]
    stacked = {key: torch.stack([r[key] for r in rows]) for key in rows[0]}
    if "mc_labels" in spec.accepts:  # the double heads of GPT also model the language
        last = torch.full((CHOICES,), length - 1)
        label = torch.tensor(spec.number(0, CHOICES))
        ids = stacked["input_ids"]
        return {"input_ids": ids, "labels": ids, "mc_token_ids": last, "mc_labels": label}
    return stacked | {"labels": torch.tensor(spec.number(0, CHOICES))}


def cells(spec: Spec, row: int) -> Row:
    """Return a question and a table of two rows and two columns, with the cells that answer it."""
    inputs = text(spec, length=spec.number(8, LONGEST + 1))
    length = len(inputs["input_ids"])
    position = torch.arange(length)
    in_table = (position >= 3).long()
    types = torch.zeros(length, 7, dtype=torch.long)
    types[:, 0] = in_table
    types[:, 1] = in_table * (1 + position % 2)
    types[:, 2] = in_table * (1 + position // 2 % 2)
    labels = in_table * (spec.share(length) < 0.4)
    return inputs | {"token_type_ids": types, "labels": labels.long()}


def next_sentence(spec: Spec, row: int) -> Row:
    return text(spec) | {"labels": torch.tensor(spec.number(0, 2))}


def translated(spec: Spec, row: int) -> Row:
    if (
        not spec.config.is_encoder_decoder
        and "labels" in spec.accepts
        and "input_ids" in spec.accepts
    ):
        return causal_lm(spec, row)
    target = text(spec)["input_ids"]
    return main_input(spec) | {"labels": trained(spec, target, row)}


def depth(spec: Spec, row: int) -> Row:
    inputs = image(spec)
    return inputs | {"labels": spec.normal(*inputs["pixel_values"].shape[1:]).abs() + 0.1}


def segmented(spec: Spec, row: int) -> Row:
    inputs = image(spec)
    labels = spec.integers(0, LABELS, *inputs["pixel_values"].shape[1:])
    labels[: row + 1] = 255
    return inputs | {"labels": labels}


def masked_image(spec: Spec, row: int) -> Row:
    patches = (spec.found("image_size", 32) // spec.found("patch_size", 8)) ** 2
    mask = spec.share(patches) < 0.2 + 0.05 * row
    mask[row] = True
    return image(spec) | {"bool_masked_pos": mask}


def boxed(spec: Spec, row: int) -> Row:
    num = 1 + row % 3
    inputs = image(spec)
    labels = {
        "class_labels": spec.integers(0, LABELS, num),
        "boxes": 0.2 + 0.3 * spec.share(num, 4),
    }
    if "Segmentation" in type(spec.model).__name__:
        shape = inputs["pixel_values"].shape[-2:]
        labels["masks"] = (spec.share(num, *shape) < 0.5).to(spec.model.dtype)
    return inputs | {"labels": labels}


def masked_objects(spec: Spec, row: int) -> Row:
    inputs, num = image(spec), 1 + row % 3
    masks = spec.share(num, *inputs["pixel_values"].shape[-2:]) < 0.5
    found = {"mask_labels": masks.to(spec.model.dtype)}
    return inputs | found | {"class_labels": spec.integers(0, LABELS, num)}


def two_modal(spec: Spec, row: int) -> Row:
    if "pixel_values_videos" in spec.accepts:
        frames = {"pixel_values_videos": video(spec)[spec.model.main_input_name]}
        return text(spec) | frames | {"return_loss": True}
    return text(spec) | image(spec) | {"return_loss": True}


def matched(spec: Spec, row: int) -> Row:
    return text(spec) | image(spec) | {"labels": torch.tensor(spec.number(0, 2))}


def entities(spec: Spec, row: int) -> Row:
    inputs = text(spec)
    num = {"LukeForEntityClassification": 1, "LukeForEntityPairClassification": 2}.get(
        type(spec.model).__name__, 1 + row % 3
    )
    length = len(inputs["input_ids"])
    inputs |= {
        "entity_ids": spec.integers(1, 10, num),
        "entity_attention_mask": torch.ones(num, dtype=torch.long),
        "entity_position_ids": spec.integers(0, length, num, 2),
    }
    if num == 1 + row % 3 and "Span" in type(spec.model).__name__:
        starts = spec.integers(0, length - 1, num)
        inputs |= {"entity_start_positions": starts, "entity_end_positions": starts + 1}
        return inputs | {"labels": spec.integers(0, LABELS, num)}
    return inputs | {"labels": torch.tensor(spec.number(0, LABELS))}


def forecast(spec: Spec, row: int) -> Row:
    config = spec.config
    past = config.context_length + max(getattr(config, "lags_sequence", [0]))
    channels = getattr(config, "num_input_channels", 0)
    shape = (channels,) if channels else ()
    rows = {
        "past_values": spec.normal(past, *shape),
        "past_observed_mask": torch.ones(past, *shape),
        "past_time_features": spec.normal(past, 1),
        "future_values": spec.normal(config.prediction_length, *shape),
        "future_time_features": spec.normal(config.prediction_length, 1),
    }
    if "target_values" in spec.accepts:
        classes = torch.tensor(spec.number(0, LABELS))
        rows["target_values"] = (
            classes if "Classif" in type(spec.model).__name__ else spec.normal(LABELS)
        )
    return {k: v for k, v in rows.items() if k in spec.accepts}


def framed(spec: Spec, row: int) -> Row:
    inputs = sound(spec)
    main = inputs[spec.model.main_input_name]
    num = spec.num_frames(SAMPLES) if main.ndim == 1 else len(main)
    return inputs | {"labels": F.one_hot(spec.integers(0, LABELS, num), LABELS)}


def pretrained(spec: Spec, row: int) -> Row:
    """Return two targets at once: masked tokens, and one for the row."""
    if "sampled_negative_indices" in spec.accepts:
        return contrasted_sound(spec)
    if spec.config.model_type == "videomae":
        mask = torch.zeros(32, dtype=torch.bool)
        mask[torch.randperm(32, generator=spec.draw)[:8]] = True
        return video(spec) | {"bool_masked_pos": mask}
    if spec.model.main_input_name.startswith("pixel_values"):
        return masked_image(spec, row)
    inputs = masked_lm(spec, row)
    if spec.config.model_type in ("electra", "funnel"):
        inputs["labels"] = spec.integers(0, 2, len(inputs["input_ids"]))
    names = ("next_sentence_label", "sentence_order_label", "sentence_image_labels")
    label = torch.tensor(spec.number(0, 2))
    return inputs | {name: label for name in names if name in spec.accepts}


def contrasted_sound(spec: Spec) -> Row:
    """Return masked frames and, for each, frames of the same row to tell it from."""
    inputs, config = sound(spec), spec.config
    num = spec.num_frames(SAMPLES)
    mask = spec.share(num) < 0.4
    mask[:2] = True
    other = spec.integers(0, num, num, config.num_negatives)
    return inputs | {"mask_time_indices": mask, "sampled_negative_indices": other}


def visual_question(spec: Spec, row: int) -> Row:
    if spec.config.model_type == "blip":
        return text(spec) | image(spec) | {"labels": text(spec)["input_ids"]}
    if type(spec.model).__name__ == "VisualBertForVisualReasoning":
        return text(spec) | {"labels": torch.tensor(spec.number(0, LABELS))}
    share = spec.share(LABELS)
    return text(spec) | {"labels": share / share.sum()}


KINDS: dict[str, Callable[[Spec, int], Row]] = {
    "causal LM": causal_lm,
    "vision-language": causal_lm,
    "multimodal LM": causal_lm,
    "masked LM": masked_lm,
    "sequence classification": classified,
    "token classification": token_classified,
    "question answering": answered,
    "multiple choice": choices,
    "next sentence": next_sentence,
    "sequence to sequence": translated,
    "speech to text": translated,
    "CTC": translated,
    "transducer": translated,
    "image classification": classified,
    "video classification": classified,
    "audio classification": classified,
    "audio frame classification": framed,
    "x-vector": classified,
    "depth estimation": depth,
    "semantic segmentation": segmented,
    "masked image modeling": masked_image,
    "object detection": boxed,
    "contrastive": two_modal,
    "time series": forecast,
    "pretraining": pretrained,
    "visual question answering": visual_question,
    "table question answering": cells,
    "universal segmentation": masked_objects,
    "image-text matching": matched,
    "entity classification": entities,
}
