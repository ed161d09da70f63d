"""Makes the example workflows that people open, and their thumbnails, from those in API format.

    python -m tests.comfyui.draw --comfyui PATH --python ITS_PYTHON [--pictures FOLDER] [EXAMPLE ...]

ComfyUI's own page reads ``example_workflows/api/NAME.json``, arranges it and saves it as ``NAME.json``; the workflow is
run, and its pictures become ``NAME.jpg``. With ``--pictures`` the page itself is drawn, too, for the documentation.
The two forms cannot differ: what is saved is turned back into API format and compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from impasto.comfyui.settings import KEY_SETTING
from tests.comfyui.driver import ComfyUi
from tests.comfyui.programs import Trouble, comfyui, impasto_server, write_user_settings
from tests.comfyui.run import EXAMPLES

CHROMIUM = "/usr/bin/chromium"
WINDOW = {"width": 1600, "height": 900}  # pixels
THUMBNAIL = 480  # pixels a side
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Release.Status": "what's new seen",
    "Comfy.Release.Version": "99.0.0",
    "Comfy.UseNewMenu": "Top",
    "Comfy.MaskEditor.UseNewEditor": True,
    "Comfy.Sidebar.Size": "small",
    "Comfy.Minimap.Visible": False,
}
LOAD = """async ([prompt, name]) => {
  const app = window.app ?? window.comfyAPI.app.app;
  await app.loadApiJson(prompt, name);
  const graph = app.graph;
  for (const node of graph._nodes) {
    const least = node.computeSize();
    const room = { SaveImage: 330, PreviewImage: 330, SaveVideo: 330, PreviewAny: 240 };
    const texts = (node.widgets ?? []).filter((widget) => widget.type === 'customtext').length;
    node.setSize([Math.max(least[0], 310), Math.max(least[1] + 45 * texts, room[node.type] ?? 0)]);
    for (const widget of node.widgets ?? []) if (widget.name === 'control_after_generate') widget.value = 'fixed';
  }
  // Columns by distance from the first nodes, each laid out from the top.
  const depth = (node, seen = new Set()) => {
    if (seen.has(node)) return 0;
    seen.add(node);
    const before = (node.inputs ?? []).map((_, slot) => node.getInputNode(slot)).filter(Boolean);
    return before.length ? 1 + Math.max(...before.map((other) => depth(other, new Set(seen)))) : 0;
  };
  const columns = [];
  for (const node of graph._nodes) (columns[depth(node)] ??= []).push(node);
  let x = 60;
  for (const column of columns) {
    let y = 80;
    for (const node of column) {
      node.pos = [x, y];
      y += node.size[1] + 70;
    }
    x += Math.max(...column.map((node) => node.size[0])) + 90;
  }
  app.canvas.ds.reset();
  const width = x, height = Math.max(...graph._nodes.map((node) => node.pos[1] + node.size[1])) + 40;
  const scale = Math.min(1, window.innerWidth / (width + 60), (window.innerHeight - 200) / height);
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [40, 60 / scale];
  graph.setDirtyCanvas(true, true);
  const { output } = await app.graphToPrompt();
  return { workflow: graph.serialize(), output };
}"""


def main() -> int:
    """Make what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("examples", nargs="*")
    given = parser.parse_args()
    names = given.examples or sorted(file.stem for file in (EXAMPLES / "api").glob("*.json"))
    with tempfile.TemporaryDirectory(prefix="impasto-draw-") as folder, impasto_server(Path(folder)) as service:
        base = Path(folder) / "base"
        write_user_settings(base, SETTINGS)  # type: ignore[arg-type]
        environment = {"IMPASTO_SERVER_URL": service.url, "IMPASTO_API_KEY": service.key}
        with (
            comfyui(given.comfyui, given.python, base, environment) as program,
            sync_playwright() as playwright,
            playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
        ):
            for name in names:
                draw(lambda: _opened(browser, program.url), ComfyUi(program.url), name, given.pictures)
            if given.pictures is not None:
                draw_settings(_opened(browser, program.url), given.pictures)
    return 0


def _opened(browser: Browser, url: str) -> Page:
    """Open ComfyUI's page anew, so that nothing of another workflow is on it."""
    page = browser.new_page(viewport=WINDOW)
    page.goto(url)
    page.wait_for_function("window.app?.graph ?? window.comfyAPI?.app?.app?.graph", timeout=120_000)
    page.wait_for_timeout(4000)
    return page


def draw(opened: Callable[[], Page], comfy: ComfyUi, name: str, pictures: Path | None) -> None:
    """Make one workflow's files."""
    prompt = json.loads((EXAMPLES / "api" / f"{name}.json").read_text())
    run = comfy.run(prompt)
    if run.end != "execution_success":
        raise Trouble(f"{name}: {run.error}")
    saved = [picture for node in prompt for picture in comfy.pictures(run, node)]
    if saved:
        thumbnail(saved).save(EXAMPLES / f"{name}.jpg", quality=88)
    page = opened()
    made = page.evaluate(LOAD, [prompt, name])
    if told := differences(prompt, made["output"]):
        raise Trouble(f"{name}: ComfyUI's page reads it differently:\n" + "\n".join(told))
    (EXAMPLES / f"{name}.json").write_text(json.dumps(made["workflow"], indent=1) + "\n")
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        page.evaluate("() => (window.app ?? window.comfyAPI.app.app).queuePrompt(0)")  # nothing is drawn again
        page.wait_for_timeout(8000)
        page.screenshot(path=pictures / f"comfyui-{name}.png")
    page.close()
    print(f"{name}: {len(saved)} pictures", flush=True)


def draw_settings(page: Page, pictures: Path) -> None:
    """Draw our part of ComfyUI's Settings, and see that what is typed there is kept."""
    page.evaluate(
        "() => (window.app ?? window.comfyAPI.app.app).extensionManager.command.execute('Comfy.ShowSettingsDialog')"
    )
    page.get_by_role("option", name="Impasto").click()
    page.wait_for_timeout(1500)
    page.screenshot(path=pictures / "comfyui-settings.png")
    page.locator("input[type=password]").fill("not-a-key")
    page.keyboard.press("Tab")
    page.wait_for_timeout(1500)
    kept = page.evaluate(f"() => fetch('/api/settings/{KEY_SETTING}').then((answer) => answer.json())")
    if kept != "not-a-key":
        raise Trouble(f"a key that was typed into the settings is kept as {kept!r}")


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Say in which inputs two workflows in API format differ."""
    return [
        f"node {node} {what.get('class_type')}: {field} is {value!r}, and {found!r} there"
        for node, what in ours.items()
        for field, value in what["inputs"].items()
        if (found := theirs.get(node, {}).get("inputs", {}).get(field)) != value
    ]


def thumbnail(pictures: Sequence[Image.Image]) -> Image.Image:
    """Put up to four pictures into a square."""
    shown = [picture.convert("RGB") for picture in pictures[:4]]
    side = THUMBNAIL if len(shown) == 1 else THUMBNAIL // 2
    sheet = Image.new("RGB", (THUMBNAIL, THUMBNAIL if len(shown) != 2 else side))
    for index, picture in enumerate(shown):
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (index % 2 * side, index // 2 * side))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
