"""The service as a whole, in real processes: it starts at once, survives kill -9 and gives everything back."""

import io
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest
from PIL import Image

from tests.e2e.conftest import IMPASTO, KEY, SDXL_LORA, ended, poll, worker_pids

SMALL = {"prompt": "a red fox on a blue background", "size": "512*512", "seed": 7}


def test_the_api_answers_within_two_seconds_while_the_model_loads(serve):
    """``impasto serve`` with the built-in model answers /health and takes jobs before the worker is ready."""
    served = serve()
    health = httpx.get(f"{served.url}/health", timeout=5, trust_env=False)
    seconds = time.monotonic() - served.started

    assert health.status_code == 200
    assert seconds < 2.0 * slowness()
    assert not any("taking jobs" in line for line in served.log), "the model cannot be loaded yet"


def slowness() -> float:
    """How much slower than an idle machine of ours this one is now: starting Python takes 0.05 s there."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-S", "-c", "import json, http.client"], check=True)
    return max(1.0, (time.monotonic() - start) / 0.1)


def test_the_first_start_prints_a_key_that_works_and_the_second_prints_none(serve, tmp_path):
    """The key is shown once; afterwards only its hash is on disk."""
    first = serve("--model", "fake")
    key = first.wait_for(KEY)
    assert first.api(key).get("/api/v3/predictions/" + "0" * 32).status_code == 404
    first.stop()

    second = serve("--model", "fake")
    assert second.api(key).get("/api/v3/predictions/" + "0" * 32).status_code == 404
    assert not KEY.search("".join(second.log))
    on_disk = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert key.encode() not in on_disk


def test_a_picture_from_the_shipped_model_over_http(serve):
    """Submit, poll, fetch: a 512 px PNG that the same seed gives again."""
    served = serve()
    api = served.api(served.wait_for(KEY))
    pictures = []
    for _ in range(2):
        job = api.post(SDXL_LORA, json=SMALL | {"num_inference_steps": 4}).json()["data"]
        done = poll(api, job["id"], ended)
        assert done["status"] == "completed", done["error"]
        [url] = done["outputs"]
        picture = httpx.get(url, trust_env=False)
        assert picture.headers["content-type"] == "image/png"
        pictures.append(picture.content)
    assert Image.open(io.BytesIO(pictures[0])).size == (512, 512)
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("model", ["builtin", "fake"])
def test_a_job_survives_kill_9_of_its_worker(serve, model):
    """Killed in the middle of a job, the worker is replaced and the job finished, with the same picture."""
    served = serve("--model", model, IMPASTO_FAKE_STEP_SECONDS="0.1")
    api = served.api(served.wait_for(KEY))
    body = SMALL | {"num_inference_steps": 12}
    undisturbed = poll(api, api.post(SDXL_LORA, json=body).json()["data"]["id"], ended)

    job_id = api.post(SDXL_LORA, json=body).json()["data"]["id"]
    poll(api, job_id, lambda data: data["status"] == "processing")
    time.sleep(0.3)
    [worker] = worker_pids(served.process.pid)
    os.kill(worker, signal.SIGKILL)
    done = poll(api, job_id, ended)

    assert done["status"] == "completed", done["error"]
    assert worker_pids(served.process.pid) != [worker]
    fetched = [httpx.get(data["outputs"][0], trust_env=False).content for data in (undisturbed, done)]
    assert fetched[0] == fetched[1]
    assert "/2-" in done["outputs"][0], "the picture is the second attempt's"


def test_a_job_survives_kill_9_of_the_whole_service(serve):
    """Accepted means kept: a job taken just before the service is killed is finished by the next one."""
    first = serve("--model", "fake", IMPASTO_FAKE_STEP_SECONDS="0.2", IMPASTO_LEASE_SECONDS="2")
    key = first.wait_for(KEY)
    api = first.api(key)
    ids = [api.post(SDXL_LORA, json=SMALL).json()["data"]["id"] for _ in range(3)]
    poll(api, ids[0], lambda data: data["status"] == "processing")
    first.process.kill()
    first.process.wait()

    second = serve("--model", "fake", IMPASTO_LEASE_SECONDS="2")
    for job_id in ids:
        assert poll(second.api(key), job_id, ended)["status"] == "completed"


def test_an_orphaned_worker_ends(serve):
    """A worker whose service was killed does not go on for ever beside the next one."""
    served = serve("--model", "fake")
    served.wait_for(re.compile("taking jobs"))
    [worker] = worker_pids(served.process.pid)
    served.process.kill()
    served.process.wait()

    deadline = time.monotonic() + 15
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}")


def test_stopping_hands_unfinished_jobs_back(serve):
    """Ctrl-C in the middle of a long job: the next start finishes it, and the attempt does not count."""
    first = serve("--model", "fake", IMPASTO_FAKE_STEP_SECONDS="0.2")
    key = first.wait_for(KEY)
    job_id = first.api(key).post(SDXL_LORA, json=SMALL).json()["data"]["id"]
    poll(first.api(key), job_id, lambda data: data["status"] == "processing")
    first.process.send_signal(signal.SIGINT)
    first.process.wait(20)

    second = serve("--model", "fake")
    assert poll(second.api(key), job_id, ended)["status"] == "completed"


def test_a_taken_port_is_one_clear_line(serve, tmp_path):
    """The second service on a port says so and ends with status 2; no trace, no worker left behind."""
    port = serve("--model", "fake").url.rsplit(":", 1)[1]
    second = subprocess.run(
        [IMPASTO, "serve", "--model", "fake", "--port", port, "--data-dir", tmp_path / "other"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert second.returncode == 2
    assert f"port {port}" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_model_that_is_not_there_stops_start_up(tmp_path):
    """A wrong --model is told before anything listens."""
    run = subprocess.run(
        [IMPASTO, "serve", "--model", "nowhere", "--data-dir", tmp_path / "data", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == 1
    assert (
        run.stderr.strip() == "impasto: model 'nowhere' was not found: give 'builtin' or the path of a diffusers folder"
    )
