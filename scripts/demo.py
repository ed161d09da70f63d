"""``make demo``: a picture through the real service, from the model in the repository, with the official client.

Starts ``impasto serve`` on a free loopback port with a fresh data folder, submits the documented request through the
``wavespeed`` package, shows progress, saves the picture under ``out/`` and stops the server.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from wavespeed import Client

ROOT = Path(__file__).resolve().parent.parent
IMPASTO = str(Path(sys.executable).with_name("impasto"))
MODEL = "wavespeed-ai/sdxl-lora"
REQUEST: dict[str, Any] = {
    "prompt": "a red apple on a blue background",
    "image": "",
    "strength": 0.8,
    "loras": [],
    "size": "512*512",
    "num_inference_steps": 30,
    "guidance_scale": 5,
    "num_images": 1,
    "seed": 7,
    "enable_base64_output": False,
    "enable_safety_checker": True,
}
LISTENING = re.compile(r"listening on (http://\S+)")
JOB = re.compile(r"job ([0-9a-f]{32})")
START_SECONDS = 60.0
JOB_SECONDS = 150.0
POLL_SECONDS = 0.3

console = Console()


class Server:
    """``impasto serve`` as a user would start it, its log read line by line."""

    def __init__(self, data_dir: str) -> None:
        command = [IMPASTO, "serve", "--port", "0", "--data-dir", data_dir]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._log.append(line)

    def find(self, pattern: re.Pattern[str], seconds: float, unless: Callable[[], bool] = lambda: False) -> str:
        """Wait for a log line that matches and return its first group; stop waiting when ``unless`` is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None and not unless():
            for line in list(self._log):
                if match := pattern.search(line):
                    return match[1]
            time.sleep(0.05)
        sys.exit("the server did not come as far as expected; its log:\n" + "".join(self._log))

    def stop(self) -> None:
        """Stop it as Ctrl-C does."""
        self._process.terminate()
        self._process.wait(30)


def main() -> None:
    """Run the whole way once; exit non-zero where any part fails."""
    os.environ["NO_PROXY"] = "127.0.0.1"  # the server is on this machine, whatever proxy is set
    with tempfile.TemporaryDirectory(prefix="impasto-demo-") as data_dir:
        create_key = [IMPASTO, "keys", "create", "demo", "--data-dir", data_dir]
        key = subprocess.run(create_key, check=True, capture_output=True, text=True).stdout.strip()
        started = time.monotonic()
        server = Server(data_dir)
        try:
            base_url = server.find(LISTENING, START_SECONDS)
            console.print(f"server   {base_url}, listening after {time.monotonic() - started:.1f} s")
            path, prediction = draw(Client(api_key=key, base_url=base_url), server)
        finally:
            server.stop()
    console.print(f"picture  {path.relative_to(ROOT)}")
    console.print(f"seed     {prediction['seed']}")
    console.print(f"time     {prediction['timings']['inference'] / 1000:.1f} s in the worker")
    console.print("Next: `make serve` starts the service for you to use.")


def draw(client: Client, server: Server) -> tuple[Path, dict[str, Any]]:
    """Run the request with the official client on one thread; watch its progress from this one."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.run, MODEL, REQUEST, timeout=JOB_SECONDS, poll_interval=POLL_SECONDS)
        job_id = server.find(JOB, JOB_SECONDS, unless=lambda: running.done() and bool(running.exception()))
        with Progress(console=console) as bar:
            task = bar.add_task("denoising", total=REQUEST["num_inference_steps"])
            while not running.done():
                progress = client.get_result(job_id)["data"].get("progress") or {}
                bar.update(task, completed=progress.get("step", 0))
                time.sleep(POLL_SECONDS)
            bar.update(task, completed=REQUEST["num_inference_steps"])
        [url] = running.result()["outputs"]
    path = ROOT / "out" / "demo.png"
    path.parent.mkdir(exist_ok=True)
    with urllib.request.urlopen(url, timeout=30) as response:
        path.write_bytes(response.read())
    return path, client.get_result(job_id)["data"]


if __name__ == "__main__":
    main()
