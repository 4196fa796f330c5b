"""Watch an attached LightningModule: metrics in a file, a live view, the noise scale, its loggers.

    module = attach(module)
    trainer = Trainer(callbacks=[Watching("runs/a")], enable_progress_bar=False)

Tested with lightning 2.6. Lightning's loggers get the figures too, under `gradaccum/...`, in the
steps that they log.
"""

import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gradaccum.errors import BadInput
from gradaccum.integrations.lightning import Attached
from gradaccum.noise.scale import EVERY
from gradaccum.watch import Watch


class Watching(Callback):
    """Write down and show each step of an attached module; Lightning's checkpoints keep the rest.

    Args:
        folder: Where `metrics.jsonl` goes; by default the trainer's root directory.
        live: Whether to show anything. `Trainer(enable_progress_bar=False)` goes with it.
        noise_every: Measure one step in so many for the gradient noise scale; None: leave it out.

    Raises:
        BadInput: When training starts: the module is not attached, or the folder not writable.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        live: bool = True,
        noise_every: int | None = EVERY,
    ) -> None:
        self._folder, self._live, self._noise_every = folder, live, noise_every
        self._kept: dict[str, Any] = {}
        self.watch: Watch | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, Attached):
            raise BadInput("this module is not attached", hint="module = attach(module)")
        num_steps = trainer.estimated_stepping_batches
        watch = self.watch = Watch(
            folder=trainer.default_root_dir if self._folder is None else self._folder,
            num_steps=None if math.isinf(num_steps) else int(num_steps),
            first_step=trainer.global_step,
            live=self._live,
            noise_every=self._noise_every,
            rank=trainer.global_rank,
        )
        watch.follow(pl_module.accumulation.accumulator, self._kept.get("noise"))
        watch.samples = watch.samples or self._kept.get("samples", 0)

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._begin = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self._rate = optimizer.param_groups[0].get("lr")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        assert isinstance(pl_module, Attached) and self.watch is not None, "on_train_start"
        step = pl_module.accumulation.last
        assert step is not None, "a step has just run"
        self.watch.note(
            step,
            seconds=round(time.perf_counter() - self._begin, 4),
            data_seconds=None,  # Lightning does not tell; validation comes between as well
            learning_rate=self._rate,
        )
        every = getattr(trainer, "log_every_n_steps", 0)  # Lightning sets it where no type tells
        if trainer.loggers and every and trainer.global_step % every == 0:
            found = {f"gradaccum/{name}": value for name, value in self.watch.figures().items()}
            pl_module.log_dict(found, on_step=True, on_epoch=False, batch_size=1)
        self.watch.flush(waits=False)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.watch is not None:
            self.watch.close()

    def on_exception(self, *_: Any, **__: Any) -> None:
        self.on_train_end()

    def state_dict(self) -> dict[str, Any]:
        watch = self.watch
        if watch is None:
            return self._kept
        watch.flush()  # a checkpoint's steps are in the file
        noise = None if watch.noise is None else watch.noise.state_dict()
        return {"samples": watch.samples, "noise": noise}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = state_dict
