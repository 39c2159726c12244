"""One thread for each worker: two workers with two threads each on two cores wait for each other."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is imported for the tests stays until the end: it is not searched for garbage, neither now nor later.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries that count what is left at the end find nothing
