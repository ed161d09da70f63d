"""What a picture was made from, written into its file the way other tools read it.

Knows the text form of AUTOMATIC1111's web UI, which most tools read, and where PNG, JPEG and WebP keep such a text.
Knows no jobs and no settings. Nothing of a request's addresses, keys or folders comes in here: callers hand in names.

Sources: PNG (third edition, W3C) 11.3.3 for ``tEXt`` and ``iTXt``; EXIF 2.32 (CIPA DC-008) for ``UserComment``.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image

from impasto.types import ACCELERATIONS, Animation, GenerationRequest

KEYWORD: Final = "parameters"
MAX_PROMPT_CHARS: Final = 10_000  # of each prompt; longer ones are cut, and the cut is shown
MAX_EXIF_BYTES: Final = 60_000  # of the text; a JPEG has room for 64 kB of EXIF
_HEAD: Final = 33  # bytes of a PNG before which nothing may stand: signature and IHDR
_EXIF_IFD: Final = 0x8769
_USER_COMMENT: Final = 0x9286
_SAMPLERS: Final[Mapping[str, str]] = {
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "ddim": "DDIM",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lms": "LMS",
    "pndm": "PLMS",
    "lcm": "LCM",
    "tcd": "TCD",
}
_KARRAS: Final = "_karras"


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A model or LoRA by a name that may be shown, and the SHA-256 of its file, where it is one file."""

    name: str
    sha256: str | None = None
    scale: float = 1.0


def parameters_text(
    request: GenerationRequest, seed: int, model: Ingredient, loras: Sequence[Ingredient], version: str
) -> str:
    """Return prompt, negative prompt and settings as text: a line or more each, the settings last.

    Args:
        request: What was asked for.
        seed: The picture's own.
        model: The base model.
        loras: In the request's order; they stand behind the prompt as ``<lora:name:scale>``.
        version: Of Impasto.
    """
    tags = "".join(f" <lora:{lora.name}:{lora.scale:g}>" for lora in loras)
    lines = [_cut(request.prompt) + tags]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {_cut(request.negative_prompt)}")
    settings = _settings(request, seed, model, loras) | {"Version": f"Impasto {version}"}
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items()))
    return "\n".join(lines)


def _settings(
    request: GenerationRequest, seed: int, model: Ingredient, loras: Sequence[Ingredient]
) -> dict[str, object]:
    sampler, karras, _ = request.scheduler.partition(_KARRAS)
    hashes = {f"lora:{lora.name}": lora.sha256[:10] for lora in loras if lora.sha256}
    if model.sha256:
        hashes["model"] = model.sha256[:10]
    return {
        "Steps": request.num_inference_steps,
        "Sampler": _SAMPLERS.get(sampler, sampler),
        **({"Schedule type": "Karras"} if karras else {}),
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        **({"Model hash": model.sha256[:10]} if model.sha256 else {}),
        "Model": model.name,
        **({"Denoising strength": f"{request.strength:g}"} if request.image is not None else {}),
        **({"Acceleration": request.acceleration} if request.acceleration != ACCELERATIONS[0] else {}),
        **(_of_video(request.animation) if request.animation else {}),
        **({"Hashes": json.dumps(hashes)} if hashes else {}),
    }


def _of_video(animation: Animation) -> dict[str, object]:
    return {"Frames": animation.frames, "FPS": animation.fps, "Motion": animation.motion}


def _quoted(value: object) -> str:
    """Return a value, in JSON's quotes where it has what separates values."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _cut(prompt: str) -> str:
    return prompt if len(prompt) <= MAX_PROMPT_CHARS else f"{prompt[:MAX_PROMPT_CHARS]}…"


def into_png(data: bytes, text: str) -> bytes:
    """Return a PNG file with ``text`` in it, right behind its header: ``tEXt`` where Latin-1 will do, else ``iTXt``."""
    try:
        kind, body = b"tEXt", KEYWORD.encode() + b"\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        kind, body = b"iTXt", KEYWORD.encode() + b"\0\0\0\0\0" + text.encode()
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[:_HEAD] + chunk + data[_HEAD:]


def as_exif(text: str) -> bytes:
    """Return EXIF data with ``text`` as its user comment, for JPEG and WebP."""
    coded = text.encode("utf-16-be")[:MAX_EXIF_BYTES].decode("utf-16-be", "ignore").encode("utf-16-be")
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + coded
    return exif.tobytes()
