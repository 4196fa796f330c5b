"""How many processes and threads `pytest -n auto` takes: one thread each, the models are tiny."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    return min(8, os.cpu_count() or 1)  # each takes a gigabyte or two
