"""Content Credentials, read back by C2PA's own library: who has them, what breaks them, and what they do not tell."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path
from typing import Any

import c2pa
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image, ImageChops

from impasto.config import Settings
from impasto.errors import ConfigError
from impasto.images import encode_image
from impasto.worker.backend import FakeBackend
from impasto.worker.credentials import MADE_BY_A_MODEL, ContentCredentials
from impasto.worker.provenance import Provenance
from tests.contract.conftest import MODEL, Stack

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def certificate(
    name: str, key: Any, issuer: x509.Certificate | None = None, issuer_key: Any = None
) -> x509.Certificate:
    """One of an authority, or one that it issued for signing; C2PA wants a purpose in it (its section on profiles)."""
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "T")]
    )
    now, day, signing = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1), issuer_key or key
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    authority = issuer is None
    built = (
        x509.CertificateBuilder(issuer.subject if issuer else subject, subject, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=authority, crl_sign=authority, **usage), critical=True
        )
    )
    if not authority:
        built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return built.sign(signing, hashes.SHA256())


def pems(key: Any) -> tuple[bytes, bytes]:
    """A certificate's chain for a key, and the key."""
    root_key = ec.generate_private_key(ec.SECP256R1())
    root = certificate("root", root_key)
    chain = [certificate("leaf", key, root, root_key), root]
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain), private


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The two settings of an operator who signs."""
    folder = tmp_path_factory.mktemp("pems")
    named = {"c2pa_certificate": folder / "chain.pem", "c2pa_key": folder / "key.pem"}
    for file, content in zip(named.values(), pems(ec.generate_private_key(ec.SECP256R1())), strict=True):
        file.write_bytes(content)
    return named


def settings(tmp_path: Path, **fields: Any) -> Settings:
    """Those of a worker."""
    return Settings(model="fake", data_dir=tmp_path, **fields)


def told(data: bytes, content_type: str) -> dict[str, Any]:
    """What a reader says of a file; no certificate of ours is trusted here, which is a finding of its own."""
    found = json.loads(c2pa.Reader(content_type, io.BytesIO(data)).json())
    found["codes"] = {one["code"] for one in found.get("validation_status", [])} - {"signingCredential.untrusted"}
    return found


KEYS = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_every_kind_sign(kind):
    """What is signed is valid, says "made by a model", and one changed pixel makes it invalid."""
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    credentials = ContentCredentials(*pems(KEYS[kind]()))
    for name, content_type in FORMATS.items():
        plain = encode_image(image, name, "a red fox\nSteps: 3")
        signed = credentials.signed(plain, content_type)
        found = told(signed, content_type)
        assert (found["validation_state"], found["codes"]) == ("Valid", set())
        [assertion] = found["manifests"][found["active_manifest"]]["assertions"]
        assert assertion["data"]["actions"][0]["digitalSourceType"] == MADE_BY_A_MODEL
        opened, before = Image.open(io.BytesIO(signed)), Image.open(io.BytesIO(plain))
        assert ImageChops.difference(opened.convert("RGB"), before.convert("RGB")).getbbox() is None
        assert opened.info.get("parameters") == before.info.get("parameters")
        assert len(signed) < len(plain) + 20_000

        changed = bytearray(signed)
        changed[signed.rindex(plain[-200:-180])] ^= 1
        assert told(bytes(changed), content_type)["validation_state"] == "Invalid"


@pytest.mark.parametrize("declined", [True, False])
def test_every_picture_of_a_worker_that_signs_is_signed(serve, tmp_path, files, declined):
    """Whatever the request says of metadata; no prompt is in the statement. The control: one that does not sign."""
    with serve() as stack:
        for signs in (True, False):
            made = settings(tmp_path, **files if signs else {}, embed_metadata=False, reproduction_record=False)
            with stack.worker(FakeBackend(0.0), provenance=Provenance.of(made, "cpu")):
                data = finished(stack, prompt="the secret word", enable_metadata=not declined)
            if not signs:
                with pytest.raises(c2pa.C2paError.ManifestNotFound):
                    told(data, "image/jpeg")
                continue
            assert told(data, "image/jpeg")["validation_state"] == "Valid"
            assert b"secret" not in data


def finished(stack: Stack, **body: Any) -> bytes:
    """The file of a job's one picture."""
    asked = body | {"enable_sync_mode": True, "output_format": "jpeg"}
    [url] = stack.client().post(f"/api/v3/{MODEL}", json=asked).json()["data"]["outputs"]
    return httpx.get(url).content


@pytest.mark.parametrize("missing", ["c2pa_certificate", "c2pa_key"])
def test_one_without_the_other_is_told(tmp_path, files, missing):
    """By its name, before a job is taken."""
    half = {name: file for name, file in files.items() if name != missing}
    with pytest.raises(ConfigError, match=f"^{missing}: is missing"):
        Provenance.of(settings(tmp_path, **half), "cpu")
    with pytest.raises(ConfigError, match=f"^{missing}: .* cannot be read"):
        Provenance.of(settings(tmp_path, **half, **{missing: tmp_path / "none.pem"}), "cpu")


def test_a_pair_of_no_use_is_told():
    """Two that do not go together, a kind C2PA does not permit, and text that is no key."""
    chain, key = pems(KEYS["P-256"]())
    other = pems(KEYS["P-256"]())[1]
    forbidden = dsa.generate_private_key(2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    ContentCredentials(chain, key)
    for wrong in ((chain, other), (chain, forbidden), (chain, b"no key"), (b"no certificate", key)):
        with pytest.raises(ConfigError, match=r"^c2pa_certificate, c2pa_key: "):
            ContentCredentials(*wrong)
