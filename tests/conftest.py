"""One thread for each worker: two workers with two threads each on two cores wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
