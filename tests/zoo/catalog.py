"""Enumerate the head classes of transformers: what is trained with a loss of its own."""

import inspect
import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.zoo import configs, data, models
from tests.zoo.data import Row

# A class belongs to the first kind whose pattern its name matches.
BY_NAME = (
    ("table question answering", r"^TapasForQuestionAnswering$"),
    ("visual question answering", r"^(Blip|Vilt|VisualBert)ForQuestionAnswering$"),
    ("visual question answering", r"ForVisualReasoning$|ForImagesAndTextClassification$"),
    ("image-text matching", r"Retrieval$|RegionToPhrase"),
    ("sequence classification", r"ForSequenceClassification$"),
    ("token classification", r"ForTokenClassification$"),
    ("entity classification", r"ForEntity\w*Classification$"),
    ("question answering", r"ForQuestionAnswering(Simple)?$"),
    ("multiple choice", r"ForMultipleChoice$|DoubleHeadsModel$"),
    ("causal LM", r"^(ClvpForCausalLM|BlipTextLMHeadModel|ImageGPTForCausalImageModeling)$"),
    ("vision-language", r"^Ernie4_5_VL_Moe"),
    ("contrastive", r"ForContrastiveLearning$"),
    ("masked LM", r"ForMaskedLM$"),
    ("next sentence", r"ForNextSentencePrediction$"),
    ("image classification", r"ForImageClassification"),
    ("video classification", r"ForVideoClassification$"),
    ("audio classification", r"ForAudioClassification$"),
    ("audio frame classification", r"ForAudioFrameClassification$"),
    ("x-vector", r"ForXVector$"),
    ("CTC", r"ForCTC$"),
    ("transducer", r"For(RNNT|TDT)$"),
    ("masked image modeling", r"ForMaskedImageModeling$"),
    ("semantic segmentation", r"For(Semantic|Image)Segmentation$"),
    ("universal segmentation", r"For(Universal|Instance)Segmentation$"),
    ("object detection", r"For(ObjectDetection|Segmentation)$"),
    ("depth estimation", r"ForDepthEstimation$"),
    ("time series", r"ForPrediction$|^PatchTS\w+For|ForRegression$"),
)
BY_MAPPING = (
    ("speech to text", "SPEECH_SEQ_2_SEQ"),
    ("sequence to sequence", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("vision-language", "IMAGE_TEXT_TO_TEXT"),
    ("multimodal LM", "MULTIMODAL_LM"),
    ("causal LM", "CAUSAL_LM"),
    ("contrastive", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    ("pretraining", "PRETRAINING"),
)
VARIANTS = {
    "sequence classification": ("regression", "multi-label", "ignored labels"),
    "question answering": ("out-of-range answers", data.RAGGED),
    "causal LM": ("unlabelled rows",),
    "CTC": ("mean of rows",),
}
SHARED = {"sequence classification", "question answering", "causal LM"}


@dataclass(frozen=True)
class Head:
    """Name a model with its loss, and build it.

    Args:
        name: Class in `transformers`.
        kind: What it is for, in words.
        variant: What is unusual about its rows or its configuration, or "".
    """

    name: str
    kind: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def build(
        self, *, seed: int = 0, dtype: torch.dtype = torch.float64, num: int = 8
    ) -> tuple[PreTrainedModel, list[Row]]:
        """Return the tiny model in training mode and ragged rows that its loss takes."""
        model_class = getattr(transformers, self.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = configs.tiny(model_class.config_class, **self._settings())
            model = models.build(model_class, config, seed=seed, dtype=dtype)
        return model, data.examples(model, self.kind, self.variant, num, seed)

    def _settings(self) -> dict[str, Any]:
        """Return what the configuration needs besides being tiny."""
        by_variant = {
            "regression": {"num_labels": 1, "problem_type": "regression"},
            "multi-label": {"problem_type": "multi_label_classification"},
            "router loss": {"output_router_logits": True},
            "mean of rows": {"ctc_loss_reduction": "mean"},
        }
        if self.variant in by_variant:
            return by_variant[self.variant]
        if self.name.startswith("Wav2Vec2") and self.kind == "pretraining":
            return {"mask_time_prob": 0.5}  # makes the embedding of masks, which come with the rows
        if self.kind in ("question answering", "pretraining", "next sentence"):
            return {"num_labels": 2}
        return {"is_decoder": True} if self.name == "ReformerModelWithLMHead" else {}


def head(name: str, variant: str = "") -> Head:
    return Head(name, kind_of(name), variant)


def heads() -> list[Head]:
    """Return every head class that transformers exports, and variants of some."""
    plain = [head(name) for name in class_names()]
    return [h for one in plain for h in (one, *variants(one))]


def variants(plain: Head) -> list[Head]:
    """Return the variants of a head: of losses that many classes share, for one class in four."""
    names = list(VARIANTS.get(plain.kind, ()))
    if plain.kind in SHARED:
        turn = sum(plain.name.encode()) % 4
        names = names[turn : turn + 1]
    if plain.kind in ("causal LM", "vision-language") and routes(plain.name):
        names.append("router loss")
    if re.search(data.LEAKY, plain.name) and plain.kind != "question answering":
        names.append(data.RAGGED)
    return [replace(plain, variant=name) for name in names]


def routes(name: str) -> bool:
    """Tell whether the configuration can add a loss of the router to that of the model."""
    try:
        config_class = getattr(transformers, name).config_class
    except ImportError:  # said when it is built
        return False
    fields = inspect.signature(config_class).parameters
    return "output_router_logits" in fields and "router_aux_loss_coef" in fields


def kind_of(name: str) -> str:
    for kind, pattern in BY_NAME:
        if re.search(pattern, name):
            return kind
    return next((kind for kind, m in BY_MAPPING if name in classes_in(m)), "other")


def classes_in(mapping: str) -> set[str]:
    names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
    return {n for value in names for n in ((value,) if isinstance(value, str) else value)}


def class_names() -> list[str]:
    """Return every class with a head that transformers exports."""
    found = {n for n in dir(transformers) if re.search(r"For[A-Z]|LMHead|DoubleHeads", n)}
    mapped = {n for _, mapping in BY_MAPPING for n in classes_in(mapping)}
    not_heads = ("Auto", "DataCollator", "PermuteForRope", "VisionFuse", "VisionUnfuse")
    return sorted(n for n in found | mapped if not n.startswith(not_heads))
