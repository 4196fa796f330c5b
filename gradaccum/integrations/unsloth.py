"""What Unsloth does in its `training_step` besides the step itself, once for each step.

Tested with unsloth 2026.10. On a GPU it compiles parts of the model; one that runs out of its
recompile limit stays compiled to the end of the step, since checkpointed regions have to be
recomputed as they were computed, and is switched to eager before the next. Dies when Unsloth
switches in a callback of its own.
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from unsloth_zoo.temporary_patches import utils  # pyright: ignore[reportMissingImports]


class SettleFallbacks(TrainerCallback):
    """Let Unsloth switch to eager, between steps, what it has to stop compiling."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        utils.apply_pending_eager_fallbacks()
