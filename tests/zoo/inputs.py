"""What the models of the zoo take, by what their forward accepts: text, pictures, films, sound."""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.zoo.configs import FRAMES, MELS, PATCH, POSITIONS, SPECIAL

Row = dict[str, Any]
EOS = 2
SAMPLES = 320  # of sound in a row
LONGEST = 14  # tokens in a row
# Types that take only one length of text.
EQUAL = {"reformer": 16, "perceiver": POSITIONS, "canine": LONGEST}


@dataclass(frozen=True)
class Spec:
    """Say what the rows of a model are made from.

    Args:
        model: Its forward and its configuration say what it takes.
        kind: Kind of head.
        variant: What is unusual about the rows or the configuration, or "".
        draw: Random numbers.
    """

    model: PreTrainedModel
    kind: str
    variant: str
    draw: torch.Generator

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @functools.cached_property
    def accepts(self) -> frozenset[str]:
        """Return the names of the arguments of the model's forward."""
        return frozenset(inspect.signature(type(self.model).forward).parameters)

    def requires(self, name: str) -> bool:
        given = inspect.signature(type(self.model).forward).parameters.get(name)
        return given is not None and given.default is given.empty

    def num_frames(self, samples: int) -> int:
        """Return how many frames the model makes of sound."""
        count: Any = self.model._get_feat_extract_output_lengths
        return int(count(torch.tensor(samples)))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.draw)

    def number(self, low: int, high: int) -> int:
        return int(self.integers(low, high, 1))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw, dtype=torch.float32).to(self.model.dtype)

    def share(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.draw, dtype=torch.float32).to(self.model.dtype)

    def found(self, name: str, default: Any) -> Any:
        """Return the field of the configuration, or of one of its parts."""
        found = find(self.config, name)
        return default if found is None else found


def find(config: PreTrainedConfig, name: str) -> Any:
    if getattr(config, name, None) is not None:
        return getattr(config, name)
    parts = (v for v in vars(config).values() if isinstance(v, PreTrainedConfig))
    return next((v for v in (find(p, name) for p in parts) if v is not None), None)


def text(spec: Spec, *, length: int | None = None) -> Row:
    """Return a sequence that ends with its only end token."""
    length = EQUAL.get(spec.config.model_type) or length or spec.number(4, LONGEST + 1)
    ids = torch.cat([spec.integers(3, SPECIAL, length - 1), torch.tensor([EOS])])
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "bbox" in spec.accepts:
        corner = spec.integers(0, 50, length, 2)
        row["bbox"] = torch.cat([corner, corner + spec.integers(1, 50, length, 2)], dim=-1)
    if "global_attention_mask" in spec.accepts:
        row["global_attention_mask"] = torch.arange(length) == 0
    return row | beside_text(spec)


def beside_text(spec: Spec) -> Row:
    """Return what models of text and pictures cannot do without."""
    model_type = spec.config.model_type
    if model_type == "vilt":
        return image(spec)
    if model_type == "visual_bert":
        return {"visual_embeds": spec.normal(3, spec.config.visual_embedding_dim)}
    if model_type == "lxmert":
        boxes = {"visual_pos": spec.share(3, 4)}
        return boxes | {"visual_feats": spec.normal(3, spec.config.visual_feat_dim)}
    return image(spec) if spec.requires("pixel_values") else {}


def image(spec: Spec) -> Row:
    if spec.config.model_type.startswith("siglip2"):
        patches = {"pixel_values": spec.normal(16, 3 * PATCH * PATCH)}
        shape = torch.tensor([4, 4])
        return patches | {"pixel_attention_mask": torch.ones(16), "spatial_shapes": shape}
    size = spec.found("image_size", 64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": spec.normal(spec.found("num_channels", 3), height, width)}


def video(spec: Spec) -> Row:
    size, frames = spec.found("image_size", 32), spec.found("num_frames", 2)
    name = spec.model.main_input_name
    return {name: spec.normal(frames, spec.found("num_channels", 3), size, size)}


def sound(spec: Spec) -> Row:
    """Return sound of one length: most of these models let padding leak into the rows."""
    if spec.config.model_type == "audio-spectrogram-transformer":
        return {"input_values": spec.normal(spec.config.max_length, spec.config.num_mel_bins)}
    if spec.model.main_input_name == "input_values" or "input_values" in spec.accepts:
        samples = 2000 if spec.config.model_type == "moonshine" else SAMPLES
        return {"input_values": spec.normal(samples)}
    dim = spec.found("feature_projection_input_dim", MELS)
    if spec.config.model_type == "whisper":
        return {"input_features": spec.normal(dim, FRAMES)}
    frames = 8 * FRAMES if spec.kind in ("CTC", "transducer") else FRAMES  # 1 in 8 is kept
    mask = torch.ones(frames, dtype=torch.long)
    return {"input_features": spec.normal(frames, dim), "attention_mask": mask}


def main_input(spec: Spec) -> Row:
    """Return the model's main input: text, pictures or sound."""
    main = spec.model.main_input_name
    has_pixels = spec.kind == "image classification" and "pixel_values" in spec.accepts
    if main.startswith("pixel_values") or has_pixels:
        return video(spec) if spec.kind == "video classification" else image(spec)
    is_sound = main in ("input_values", "input_features") or spec.kind == "speech to text"
    return sound(spec) if is_sound else text(spec)
