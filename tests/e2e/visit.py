"""Someone at the page, in a real browser: what they do there, and everything their browser asked for."""

import base64
import io
import json
import shutil
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from playwright.sync_api import FilePayload, Locator, Page, Request, expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--disable-dev-shm-usage",
]  # fmt: skip
PATIENCE = 20_000  # milliseconds; two busy cores are slow
WIDE = {"width": 1280, "height": 900}
expect.set_options(timeout=PATIENCE)


@dataclass
class Visit:
    """Someone at the page, and everything their browser asked for and complained of."""

    page: Page
    url: str
    key: str
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def bodies(self) -> list[dict[str, Any]]:
        """The requests for pictures that were sent, as JSON."""
        sent = [r for r in self.requests if r.method == "POST" and "/api/v3/wavespeed-ai/" in r.url]
        return [json.loads(r.post_data or "") for r in sent]

    def open_group(self, name: str) -> None:
        """Open a closed part of the form."""
        self.page.locator("summary", has_text=name).click()

    def paint(self, prompt: str, size: int = 512, steps: int = 4) -> None:
        """Fill the form and click; the work begins."""
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        for side in ("Width", "Height"):
            self.page.get_by_label(f"{side} in pixels").fill(str(size))
        self.set("num_inference_steps", str(steps))
        self.page.locator("#run").click()

    def set(self, name: str, value: str) -> None:
        """Type into a number box, opening its group first if need be."""
        box = self.page.locator(f"#field-{name}")
        box.evaluate("box => box.closest('details')?.setAttribute('open', '')")
        box.fill(value)

    def works(self) -> Locator:
        """The finished pictures on the stage."""
        return self.page.locator("img.work")


def png(width: int = 512, height: int = 512, colour: tuple[int, int, int] = (40, 90, 160)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(data, "PNG")
    return data.getvalue()


def png_file(width: int = 512, height: int = 512) -> FilePayload:
    return {"name": "sea.png", "mimeType": "image/png", "buffer": png(width, height)}


def from_uri(uri: str) -> Image.Image:
    head, encoded = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))


def accessible_name(control: Locator) -> str:
    """The name a screen reader says, nearly: label, aria-label or text."""
    return str(
        control.evaluate(
            "each => each.getAttribute('aria-label') || [...(each.labels ?? [])].map((l) => l.textContent).join(' ')"
            " || each.textContent || (each.getAttribute('aria-hidden') && 'hidden')"
        )
    ).strip()
