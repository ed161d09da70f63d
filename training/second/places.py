"""Where the second edition keeps its files. Knows folders only.

``IMPASTO_TRAINING`` moves the folder, as on a machine that is rented by the hour.
"""

from __future__ import annotations

import os
from pathlib import Path

from training.places import CACHE

SECOND = Path(os.environ.get("IMPASTO_TRAINING", CACHE / "second"))
