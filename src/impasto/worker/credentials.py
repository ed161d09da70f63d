"""Content Credentials: a signed statement in each picture's file that it was made by a machine, and by which one.

Knows the operator's certificate and key, and C2PA's library, an extra. Knows no jobs. What is signed has no prompt,
seed, name or address in it; whether anybody trusts the certificate is for its authority and the readers to say.

Source: C2PA Technical Specification 2.2, sections 13 and 18 (claims, ``c2pa.actions``); the IPTC's NewsCodes for the
digital source type.
"""

from __future__ import annotations

import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

from PIL import Image

from impasto.config import Settings
from impasto.errors import ConfigError

MADE_BY_A_MODEL: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
SIGNED_TYPES: Final = frozenset({"image/png", "image/jpeg", "image/webp"})  # the library signs no WebM
SDK_SETTINGS: Final = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},  # signing dials nobody
}


class ContentCredentials:
    """Signs pictures' files; one of each worker.

    Args:
        certificate: The signing certificate in PEM, and those of its authorities up to the root, which may be left out.
        key: Its private key in PEM, without a password.

    Raises:
        ConfigError: They do not go together, are not of a kind that C2PA permits, or the extra is not installed.
    """

    def __init__(self, certificate: bytes, key: bytes) -> None:
        try:
            import c2pa
        except ImportError:
            raise ConfigError("c2pa_certificate: needs an extra; run: pip install 'impasto[c2pa]'") from None
        self._library: Any = c2pa
        self._manifest = json.dumps(_manifest())
        try:
            self._context = c2pa.Context(c2pa.Settings.from_dict(SDK_SETTINGS))
            self._signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(_algorithm(key), certificate, key, None))
            self.signed(_a_picture(), "image/png")
        except (c2pa.C2paError, ValueError, TypeError) as error:
            problem = f"c2pa_certificate, c2pa_key: pictures cannot be signed with them: {error}"
            raise ConfigError(f"{problem}; give the certificate with its chain, and its key, in PEM") from None

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """Return what the settings name; ``None``: nothing is signed.

        Raises:
            ConfigError: One of the two is missing, or of no use.
        """
        if settings.c2pa_certificate is None and settings.c2pa_key is None:
            return None
        return cls(
            _read("c2pa_certificate", settings.c2pa_certificate, "c2pa_key"),
            _read("c2pa_key", settings.c2pa_key, "c2pa_certificate"),
        )

    def signed(self, data: bytes, content_type: str) -> bytes:
        """Return a file with its credentials, pixels and metadata as they are; of other types, the file as it is."""
        if content_type not in SIGNED_TYPES:
            return data
        signed = io.BytesIO()
        with self._library.Builder(self._manifest, self._context) as builder:
            builder.sign(self._signer, content_type, io.BytesIO(data), signed)
        return signed.getvalue()


def _manifest() -> dict[str, Any]:
    program = {"name": "Impasto", "version": version("impasto")}
    action = {"action": "c2pa.created", "digitalSourceType": MADE_BY_A_MODEL, "softwareAgent": program}
    return {
        "claim_generator_info": [program],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }


def _algorithm(key: bytes) -> bytes:
    """Return C2PA's name of the algorithm that a private key is for."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    match load_pem_private_key(key, None):
        case ec.EllipticCurvePrivateKey() as curve if curve.key_size in (256, 384, 521):
            return {256: b"es256", 384: b"es384", 521: b"es512"}[curve.key_size]
        case ed25519.Ed25519PrivateKey():
            return b"ed25519"
        case rsa.RSAPrivateKey():
            return b"ps256"
    raise ValueError("C2PA permits keys on the curves P-256, P-384 and P-521, Ed25519 and RSA")


def _read(setting: str, file: Path | None, other: str) -> bytes:
    if file is None:
        raise ConfigError(f"{setting}: is missing; {other} is of no use without it")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {file} cannot be read ({error.strerror})") from None


def _a_picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()
