"""``tests/comfyui/run.sh``: our nodes in a real headless ComfyUI against a real Impasto server with the built-in model.

Each check is a function whose docstring says what it promises; all are run, and each failure says what was not so.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from impasto.client import Client
from impasto.comfyui.install import NAME
from tests.comfyui.driver import ComfyUi, Prompt, Refused, Run
from tests.comfyui.programs import Service, Trouble, comfyui, impasto_server

EXAMPLES = Path(__file__).parents[2] / "src" / "impasto" / "comfyui" / "example_workflows"
REMOTE = "ImpastoServerSdxlLora"
LEAST_SPREAD = 8.0  # standard deviation of a drawn picture's pixels; a flat or black one has less
LEAST_VIDEO = 1000  # bytes
CANCEL_SECONDS = 60.0


@dataclass
class Bench:
    """What the checks work with."""

    comfy: ComfyUi
    service: Service
    log: Path
    seen: list[str]  # everything that ComfyUI told or kept, to look for the key in

    def run(self, prompt: Prompt, **options: Any) -> Run:
        """Run a prompt and remember what is kept of it."""
        done = self.comfy.run(prompt, **options)
        self.seen.append(json.dumps(done.history))
        return done


def expect(so: bool, otherwise: str) -> None:
    """Say what is not so."""
    if not so:
        raise Trouble(otherwise)


def example(name: str) -> dict[str, Any]:
    """Read an example workflow in API format."""
    return dict(json.loads((EXAMPLES / "api" / f"{name}.json").read_text()))


def check_nodes(bench: Bench) -> None:
    """ComfyUI lists every node that the example workflows use."""
    known = bench.comfy.get("/object_info").json()
    bench.seen.append(json.dumps({name: info for name, info in known.items() if name.startswith("Impasto")}))
    for file in sorted((EXAMPLES / "api").glob("*.json")):
        for node in json.loads(file.read_text()).values():
            expect(node["class_type"] in known, f"{file.name} uses {node['class_type']}, which ComfyUI does not have")


def check_templates(bench: Bench) -> None:
    """Every example is in the list of templates, with a thumbnail that ComfyUI serves."""
    listed = bench.comfy.get("/workflow_templates").json().get(NAME, [])
    for file in sorted((EXAMPLES / "api").glob("*.json")):
        expect(file.stem in listed, f"{file.stem} is not among the templates {listed}")
        for ending in ("json", "jpg"):
            bench.comfy.get(f"/api/workflow_templates/{NAME}/{file.stem}.{ending}")


def check_example(bench: Bench, name: str) -> None:
    """An example workflow runs to its end, draws pictures that are not flat, and shows steps and previews."""
    prompt = example(name)
    run = bench.run(prompt)
    expect(run.end == "execution_success", f"it ended with {run.end}: {run.error}")
    saving = [node for node, what in prompt.items() if what["class_type"] in ("SaveImage", "PreviewImage")]
    for node in saving:
        pictures = bench.comfy.pictures(run, node)
        bench.seen += [str(picture.info) for picture in pictures]
        expect(bool(pictures), f"node {node} saved no picture")
        for picture in pictures:
            spread = float(np.asarray(picture.convert("RGB"), dtype=np.float32).std())
            expect(spread > LEAST_SPREAD, f"node {node} saved a flat picture (deviation {spread:.1f})")
        print(f"      node {node}: {len(pictures)} x {pictures[0].size}")
    for node in (node for node, what in prompt.items() if what["class_type"] == "SaveVideo"):
        sizes = [len(data) for data in bench.comfy.files(run, node)]
        expect(bool(sizes) and min(sizes) > LEAST_VIDEO, f"node {node} saved no video (bytes: {sizes})")
        print(f"      node {node}: a video of {sizes[0]} bytes")
    for node, what in prompt.items():
        if what["class_type"] == REMOTE:
            steps = run.steps.get(node, [])
            expect(max(steps, default=0) > 1, f"node {node} showed no progress (its bar: {steps[:20]})")
            expect(steps == sorted(steps), f"the bar of node {node} went backwards: {steps[:60]}")
    if any(what["class_type"] == REMOTE for what in prompt.values()):
        expect(bool(run.previews), "no preview was shown")
        print(f"      {len(run.previews)} previews, the last of {run.previews[-1].size}")


def check_report(bench: Bench) -> None:
    """The LoRA's report comes out as text, from the server and from inspection."""
    run = bench.run(example("server-lora-stack-and-inspect"))
    shown = json.dumps(run.executed)
    for words in ("pixel-art", "unet", "applies to builtin"):
        expect(words in shown, f"{words!r} is not in what the nodes show: {shown[:1500]}")


def check_mask(bench: Bench) -> None:
    """What a mask does not cover comes back as it was, and what it covers does not."""
    prompt = example("server-image-to-image-with-mask")
    prompt["90"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    run = bench.run(prompt)
    before, after = (
        np.asarray(bench.comfy.pictures(run, node)[0].convert("RGB"), dtype=np.int16) for node in ("90", "6")
    )
    kept, painted = (np.abs(after[part] - before[part]) for part in (slice(256, None), slice(0, 256)))
    expect(int(kept.max()) == 0, f"kept pixels changed by up to {kept.max()}")
    expect(float(painted.mean()) > 5, f"painted pixels hardly changed (mean {painted.mean():.2f})")


def check_same_again(bench: Bench) -> None:
    """The same workflow is not drawn twice, and another seed is drawn anew."""
    prompt = example("server-text-to-image")
    first = bench.run(prompt)
    again = bench.run(prompt)
    expect("1" not in again.steps, "an unchanged node ran again")
    other = copy.deepcopy(prompt)
    other["1"]["inputs"]["seed"] += 1000
    changed = bench.run(other)
    expect(bench.comfy.files(changed, "2") != bench.comfy.files(first, "2"), "another seed gave the same picture")


def check_interrupt(bench: Bench) -> None:
    """The stop button ends the prompt within seconds and cancels the job on the server."""
    prompt = example("server-text-to-image")
    prompt["1"]["inputs"] |= {"num_inference_steps": 50, "num_images": 4, "width": 1024, "height": 1024, "seed": 5}
    pressed: list[float] = []

    def press(run: Run) -> None:
        if not pressed and max(run.steps.get("1", [0])) >= 1:
            pressed.append(time.monotonic())
            bench.comfy.interrupt()

    run = bench.run(prompt, watch=press)
    took = time.monotonic() - pressed[0]
    expect(run.end == "execution_interrupted", f"it ended with {run.end}: {run.error}")
    print(f"      ended {took:.1f} s after the button")
    expect(took < 15, f"it took {took:.0f} s to end")
    newest = _newest_job(bench.service)
    with Client(bench.service.url, bench.service.key) as client:
        deadline = time.monotonic() + CANCEL_SECONDS
        while not (job := client.result(newest)).ended and time.monotonic() < deadline:
            time.sleep(0.3)
    expect(job.error.startswith("cancelled"), f"the server's job is {job.status} ({job.error!r}), not cancelled")


def check_validation(bench: Bench) -> None:
    """A wrong value is refused before anything runs, and the refusal names the field."""
    wrong = (
        ("num_inference_steps", 0),
        ("guidance_scale", 11),
        ("width", 1600),
        ("height", 516),
        ("scheduler", "magic"),
    )
    for name, value in wrong:
        prompt = example("server-text-to-image")
        prompt["1"]["inputs"][name] = value
        try:
            bench.run(prompt)
        except Refused as refused:
            expect(name in json.dumps(refused.errors), f"{name}={value}: the refusal does not name it: {refused}")
        else:
            raise Trouble(f"{name}={value} was not refused")


def check_errors(bench: Bench) -> None:
    """What the server refuses, or cannot do, is told in its words and names the thing."""
    unknown = example("server-lora-stack-and-inspect")
    unknown.pop("2")
    unknown["1"]["inputs"]["lora_1"] = "nobody-has-this"
    run = bench.run(unknown)
    expect(run.end == "execution_error", f"an unknown LoRA ended with {run.end}")
    expect("nobody-has-this" in run.error and "was not found" in run.error, f"the error says: {run.error}")
    refiner = example("server-text-to-image")
    refiner["1"]["inputs"]["refine"] = "base_image_refiner"
    run = bench.run(refiner)
    expect("refine" in run.error, f"without a refiner there, the error says: {run.error}")


def check_secret(bench: Bench) -> None:
    """The key is in no history, no node's description, no saved picture and no log."""
    bench.seen.append(bench.log.read_text())
    bench.seen.append(json.dumps(bench.comfy.get("/history").json()))
    expect(any('"prompt"' in text for text in bench.seen), "nothing was looked at")
    for text in bench.seen:
        at = text.find(bench.service.key)
        expect(at < 0, f"the key is in: …{text[max(0, at - 200) : at]}")


def _newest_job(service: Service) -> str:
    answer = httpx.post(
        f"{service.url}/api/v3/predictions",
        json={"page_size": 1},
        headers={"Authorization": f"Bearer {service.key}"},
        trust_env=False,
    )
    return str(answer.json()["data"]["items"][0]["id"])


FIRST = (check_nodes, check_templates)
REST = (check_report, check_mask, check_same_again, check_interrupt, check_validation, check_errors)
LAST = (check_secret,)  # it looks at what all the others left


def checks(names: list[str]) -> list[tuple[str, Callable[[Bench], None]]]:
    """Return what to check: everything, or the examples and checks that are named."""
    examples: list[tuple[str, Callable[[Bench], None]]] = [
        (file.stem, lambda bench, name=file.stem: check_example(bench, name))
        for file in sorted((EXAMPLES / "api").glob("*.json"))
    ]
    from tests.comfyui.checks_inside import CHECKS  # which works with this file's bench

    first, rest = ([(check.__name__, check) for check in some] for some in (FIRST, (*REST, *CHECKS, *LAST)))
    found = [*first, *examples, *rest]
    if unknown := set(names) - {name for name, _ in found}:
        raise SystemExit(f"no example or check is called {', '.join(unknown)}; there are {[name for name, _ in found]}")
    return [(name, check) for name, check in found if not names or name in names]


def main() -> int:
    """Start both programs, run every check, and say which failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("names", nargs="*", help="examples and checks, such as check_mask; none: all")
    given = parser.parse_args()
    wanted = checks(given.names)
    with tempfile.TemporaryDirectory(prefix="impasto-comfyui-") as folder, impasto_server(Path(folder)) as service:
        base = Path(folder) / "base"
        environment = {"IMPASTO_SERVER_URL": service.url, "IMPASTO_API_KEY": service.key}
        with comfyui(given.comfyui, given.python, base, environment) as program:
            bench = Bench(ComfyUi(program.url), service, program.log, [])
            failed = [name for name, check in wanted if not _passes(name, check, bench)]
            if failed:
                print(f"--- the end of ComfyUI's log\n{program.log.read_text()[-4000:]}")
    print(f"{'FAILED: ' + ', '.join(failed) if failed else 'all passed'}")
    return 1 if failed else 0


def _passes(name: str, check: Callable[[Bench], None], bench: Bench) -> bool:
    started = time.monotonic()
    try:
        check(bench)
    except Exception as error:  # noqa: BLE001  the run goes on, and says at its end what failed
        print(f"FAIL  {name}: {error}", flush=True)
        if not isinstance(error, Trouble):
            traceback.print_exc()
        return False
    print(f"ok    {name} ({time.monotonic() - started:.1f} s)", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
