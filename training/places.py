"""Where the recipe keeps its files. Knows folders only; what the files mean is each step's business."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "training"
PACKAGES = CACHE / "packages"
BUILTIN = ROOT / "src" / "impasto" / "models" / "builtin"
GALLERY = ROOT / "docs" / "gallery"
