"""The layers: a module imports only from layers below its own, and the root needs torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import gradaccum

ROOT = Path(gradaccum.__file__).parent
LAYERS = {
    "errors": 0,
    "types": 1, "trees": 1, "modules": 1,
    "padding": 2, "verdict": 2, "fitting": 2, "dealing": 2, "stored": 2, "compiled": 2,
    "schedule": 2,
    "packing": 3, "state": 3,
    "objective": 3, "batch": 3, "device": 3, "counters": 3, "reductions": 3, "restore": 3,
    "sync": 4, "sampler": 3, "stream": 3, "checkpoint": 5, "split": 4, "optimizers": 0,
    "rows": 4, "causal": 4,
    "engine": 5, "contract": 5, "trace": 5, "measures": 5,
    "measured": 6, "weights": 6, "memory": 7, "diagnosis": 7, "audit": 8, "ranked": 9, "verify": 10,
    "testing": 11, "integrations": 11, "bench": 11,
    "cli": 12, "__main__": 13,
}  # fmt: skip


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(dotted: str) -> str:
    return dotted.split(".")[1]


def test_no_module_imports_from_its_own_layer_or_above():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for name in imports(path):
            if name.startswith("gradaccum."):
                other = room(name)
                if other != own and LAYERS.get(other, -1) >= LAYERS[own]:
                    wrong.append(f"{path.relative_to(ROOT)} -> {name}")
                if other == "__version__":
                    continue
                assert other in LAYERS, f"{path}: {name} is in no layer"
    assert wrong == []


def test_importing_the_root_needs_torch_alone():
    code = (
        "import sys, gradaccum; gradaccum.Accumulator; "
        "print([m for m in ('transformers', 'trl', 'accelerate', 'datasets', 'peft') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_root_has_at_most_ten_names():
    assert len(gradaccum.__all__) <= 10
    assert all(getattr(gradaccum, name) is not None for name in gradaccum.__all__)


def test_no_benchmark_has_the_name_of_what_torch_imports():
    """Scripts find their own directory first: one called "cuda" broke all others."""
    code = "import sys; sys.path.insert(0, 'benchmarks'); import torch; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    ours = {path.stem for path in (ROOT.parent / "benchmarks").glob("*.py")}
    assert not ours & set(done.stdout.split())
