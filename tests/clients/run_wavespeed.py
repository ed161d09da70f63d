"""One release of the ``wavespeed`` package, unmodified, through its public calls; results go to stdout as JSON.

Reads ``{url, key, model, input, file}`` from stdin. The release is the one on ``PYTHONPATH``.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import wavespeed

asked = json.load(sys.stdin)
model, request = asked["model"], asked["input"]


def error(run: Callable[[], Any]) -> dict[str, Any]:
    """What a refused or failed run says."""
    try:
        return {"outputs": run()}
    except Exception as problem:  # noqa: BLE001  (each release has classes of its own)
        return {"name": type(problem).__name__, "message": str(problem)}


said: dict[str, Any] = {}
if hasattr(wavespeed, "WaveSpeed"):  # up to 0.0.5
    client = wavespeed.WaveSpeed(api_key=asked["key"], base_url=f"{asked['url']}/api/v2/")
    said["outputs"] = client.run(model, request).outputs
    said["refused"] = error(lambda: client.run(model, request | {"num_images": 9}))
else:
    client = wavespeed.Client(api_key=asked["key"], base_url=asked["url"])
    quick = {"poll_interval": 0.05}
    said["outputs"] = client.run(model, request, **quick)["outputs"]
    said["sync"] = client.run(model, request, enable_sync_mode=True)["outputs"]
    said["image"] = client.upload(asked["file"])
    said["refused"] = error(lambda: client.run(model, request | {"num_images": 9}, **quick))
    said["failed"] = error(lambda: client.run(model, request | {"loras": [{"path": "nobody"}]}, **quick))
    edited = request | {"image": said["image"], "strength": 0.01}
    said["edited"] = client.run(model, edited, **quick)["outputs"]
print(json.dumps(said))
