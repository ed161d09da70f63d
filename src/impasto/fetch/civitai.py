"""A LoRA on Civitai: which version and file is meant, and whether it is a LoRA for SDXL at all.

Knows Civitai's API and its words for types and base models. Knows no cache. What it says of a model is believed when
it is "no": a file for another base model is not fetched.

Source: https://developer.civitai.com (``/api/v1/models/{id}``, ``/api/v1/model-versions/{id}``,
``/api/download/models/{version}``).
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import urlencode

from impasto.fetch.client import Client, Token
from impasto.fetch.failure import FetchFailed
from impasto.fetch.guard import Clock
from impasto.fetch.reference import LORA_TYPES, CivitaiFile
from impasto.fetch.transfer import SHA256, Remote

CIVITAI: Final = "https://civitai.com"
# Families of other architecture, as base models and as AIR ecosystems. What is in neither list is fetched, and its
# shapes tell: new names for fine-tunes of SDXL come up all the time.
_OTHERS: Final = re.compile(
    r"sd ?-?[1-3](\b|[. ]|$).*|stable ?cascade|svd.*|flux.*|wan.*|hunyuan.*|hidream.*|qwen.*|chroma.*|kolors|lumina.*"
    r"|pix ?art.*|aura ?flow|pony ?v7|ltx.*|mochi.*|cog ?video.*|zimage.*|z-image.*|sora.*|kling.*|veo.*|ernie.*",
    re.I,
)


class Civitai:
    """Civitai, or a mirror of it.

    Args:
        client: Fetches.
        endpoint: Base URL.
        token: Shown to this site for every model.
    """

    def __init__(self, client: Client, endpoint: str = CIVITAI, token: str | None = None) -> None:
        self._client = client
        self.endpoint = endpoint.rstrip("/")
        self._token = Token.of(endpoint, token)

    def locate(self, wanted: CivitaiFile, clock: Clock) -> Remote:
        """Ask for the version's file.

        Raises:
            FetchFailed: Not there, not allowed, not a LoRA for SDXL, or no answer.
        """
        _check_type(wanted.type)
        _check_base(wanted.ecosystem)
        version = self._version(wanted, clock)
        model = version.get("model")
        _check_type(str(model.get("type", "")) if isinstance(model, dict) else "")
        _check_base(str(version.get("baseModel", "")))
        file, primary = _file(version)
        number, model_number = version["id"], version.get("modelId") or wanted.model or "?"
        url = f"{self.endpoint}/api/download/models/{number}"
        return Remote(
            url if primary else f"{url}?{_query(file)}",
            f"civitai:{model_number}@{number} ({str(file.get('name', ''))[:100]})",
            _sha256(file),
            None,  # it states kilobytes, rounded
            self._token,
        )

    def _version(self, wanted: CivitaiFile, clock: Clock) -> dict[str, Any]:
        if wanted.version is not None:
            version = self._asked(f"model-versions/{wanted.version}", clock)
            if wanted.model and str(version.get("modelId", wanted.model)) != wanted.model:
                raise FetchFailed("choice", f"names version {wanted.version}, which is not of model {wanted.model}")
            return version
        model = self._asked(f"models/{wanted.model}", clock)
        versions = model.get("modelVersions")
        found = (
            [v for v in versions if isinstance(v, dict) and isinstance(v.get("id"), int)]
            if isinstance(versions, list)
            else []
        )
        _check_type(str(model.get("type", "")))
        if not found:
            raise FetchFailed("choice", "has no version to fetch on Civitai: give another model")
        fitting = [v for v in found if not _OTHERS.fullmatch(str(v.get("baseModel", "")))]
        return {"modelId": wanted.model, "model": {"type": model.get("type", "")}} | (fitting or found)[0]

    def _asked(self, path: str, clock: Clock) -> dict[str, Any]:
        document = self._client.json(f"{self.endpoint}/api/v1/{path}", clock, self._token)
        if not isinstance(document, dict) or not isinstance(document.get("id"), int):
            raise FetchFailed("broken", "got an answer from Civitai that describes no model: try again later")
        return document


def explained(failure: FetchFailed) -> FetchFailed:
    """Say what Civitai's "no" means."""
    if failure.status in (401, 403):
        problem = "needs a login on Civitai: the operator sets civitai_token to the key of an account that may load it"
    elif failure.status == 404:
        problem = "was not found on Civitai: check the numbers of model and version"
    else:
        return failure
    return FetchFailed("status", problem, status=failure.status)


def _check_type(kind: str) -> None:
    if kind and kind.lower() not in LORA_TYPES:
        raise FetchFailed("content", f"is a {kind[:40]} on Civitai, not a LoRA: give a LoRA's address")


def _check_base(base: str) -> None:
    if _OTHERS.fullmatch(base):
        raise FetchFailed("content", f"is a LoRA for {base[:40]} and not for SDXL: give one for SDXL")


def _file(version: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Choose the primary safetensors file, else the first one; and say whether it is the primary."""
    files = version.get("files")
    found = [f for f in files if isinstance(f, dict)] if isinstance(files, list) else []
    weights = [f for f in found if _is_safetensors(f) and f.get("type", "Model") in ("Model", "Pruned Model")]
    if not weights:
        raise FetchFailed("choice", "has no .safetensors file on Civitai, and pickles are not loaded: give another")
    primary = next((f for f in weights if f.get("primary") is True), None)
    return primary or weights[0], primary is not None or len(found) == 1


def _is_safetensors(file: dict[str, Any]) -> bool:
    return str(file.get("name", "")).lower().endswith(".safetensors") or _metadata(file).get("format") == "SafeTensor"


def _metadata(file: dict[str, Any]) -> dict[str, Any]:
    metadata = file.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _query(file: dict[str, Any]) -> str:
    metadata = _metadata(file)
    values = {"type": file.get("type", "Model"), "format": "SafeTensor"}
    values |= {name: metadata[name] for name in ("size", "fp") if isinstance(metadata.get(name), str)}
    return urlencode(values)


def _sha256(file: dict[str, Any]) -> str | None:
    hashes = file.get("hashes")
    stated = str(hashes.get("SHA256", "")).lower() if isinstance(hashes, dict) else ""
    return stated if SHA256.fullmatch(stated) else None
