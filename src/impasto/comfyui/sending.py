"""What goes to a server, and its report back: a request as the API takes it, and LoRAs of this machine, sent once.

Knows the API's fields, the client and the report's form. Knows no nodes, and imports nothing of ComfyUI.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from impasto.client import Client
from impasto.images import encode_png
from impasto.types import GenerationRequest

_SAME: Final = (
    "prompt", "num_inference_steps", "guidance_scale", "num_images", "seed", "scheduler", "refine", "strength",
    "acceleration",
)  # fmt: skip
_SENT: Final[dict[tuple[str, str, int, int], str]] = {}  # owner, file, time and size -> where it is there


def body_of(request: GenerationRequest, check: bool) -> dict[str, Any]:
    """Return a request as the API takes it; pictures travel inside it, so none is left on the server."""
    body: dict[str, Any] = {name: getattr(request, name) for name in _SAME}
    body |= {
        "size": f"{request.width}*{request.height}",
        "loras": [{"path": lora.path, "scale": lora.scale} for lora in request.loras],
        "enable_safety_checker": check,
        "output_format": "png",
    }
    if request.negative_prompt is not None:
        body["negative_prompt"] = request.negative_prompt
    for name in ("image", "mask_image"):
        if (picture := getattr(request, name)) is not None:
            body[name] = "data:image/png;base64," + base64.b64encode(encode_png(picture)).decode()
    return body


class Sender:
    """Finds out how the server can be told of a LoRA.

    Args:
        client: The server.
        owner: Names server and key: uploads are the key's own. What was sent is remembered while this process lives.
        find: Returns the file of this machine that a name means, if there is one.
    """

    def __init__(self, client: Client, owner: str, find: Callable[[str], Path | None]) -> None:
        self._client, self._owner, self._find = client, owner, find

    def path_of(self, name: str) -> str:
        """Return what to put into a request: an address if the file had to be sent, else the name itself."""
        file = self._find(name)
        return name if file is None else self._sent(file)

    def _sent(self, file: Path) -> str:
        state = file.stat()
        known = (self._owner, str(file), state.st_mtime_ns, state.st_size)
        url = _SENT.get(known)
        if url is None or not self._client.has_upload(url):
            _SENT[known] = url = self._client.upload(file)
        return url


def remote_report(reports: Sequence[Mapping[str, Any]], stack: Sequence[tuple[str, float, float]]) -> str:
    """Return the server's reports as text, a paragraph for each LoRA, under the names that the stack has.

    Args:
        reports: ``loras`` of the prediction, in the order of the request.
        stack: ``(name, model strength, CLIP strength)`` of each.
    """
    paragraphs = [_paragraph(report, *item) for report, item in zip(reports, stack, strict=False)]
    return "\n\n".join(paragraphs) or "No LoRA."


def _paragraph(report: Mapping[str, Any], name: str, model: float, clip: float) -> str:
    rows = [
        ("base model", report.get("base_model", "")),
        ("kinds", _counts(report.get("kinds") or {})),
        ("rank", " to ".join(str(rank) for rank in dict.fromkeys(report.get("ranks") or ()))),
        ("applied", _counts(report.get("applied") or {})),
        *((left, _left(report.get(left) or {})) for left in ("unmatched", "mismatched", "ignored")),
        ("trigger words", ", ".join(report.get("trigger_words") or ())),
        ("sha256", report.get("sha256", "")),
        *(("warning", warning) for warning in report.get("warnings") or ()),
    ]
    if clip != model:
        rows.append(("warning", f"A server takes one scale: the text encoders had {model:g}, too, not {clip:g}."))
    return "\n".join([f"{name} at {model:g}", *(f"  {label}: {text}" for label, text in rows if text)])


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _left(left: Mapping[str, Any]) -> str:
    if not left.get("count"):
        return ""
    first = [item if isinstance(item, str) else item.get("module", "") for item in left.get("first") or ()]
    return f"{left['count']} ({', '.join(first)}{', …' if left['count'] > len(first) else ''})"
