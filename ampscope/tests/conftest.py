"""One thread for each test, as in the tests of the training program."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
