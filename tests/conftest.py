"""One thread for each test process: the models are small, and ``make test`` runs one process a core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
