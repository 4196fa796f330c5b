"""How many processes and threads the tests take, and where what they remember goes."""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Budgets that are measured are remembered there: not those of another run, nor among the user's.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="gradaccum-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    return min(8, os.cpu_count() or 1)  # each takes a gigabyte or two
