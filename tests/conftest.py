"""One thread a process: the models are tiny, and the tests run on every core already."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
