"""Ray Train: workers that Ray starts are ranks as any others.

python examples/ray_train.py        # needs ray[train] (tried with 2.60); two workers on the CPU
"""

import os
import sys
from pathlib import Path

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

FOLDER = str(Path(__file__).parent.resolve())


def worker(config: dict) -> None:
    sys.path.insert(0, FOLDER)
    import ranks  # torch.distributed is initialised by Ray already

    losses = ranks.main(config["folder"], config["num_steps"])
    ray.train.report({"loss": losses[-1]} if losses else {})


def main(folder: str, num_steps: int = 20, num_workers: int = 2) -> None:
    ray.init(num_cpus=num_workers + 1)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"folder": folder, "num_steps": num_steps},
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=False),
    )
    trainer.fit()
    ray.shutdown()


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "runs/ray"))
