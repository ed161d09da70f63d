"""The service as a whole, in real processes: it starts at once, survives kill -9 and gives everything back."""

import base64
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
from wavespeed import Client

from tests.e2e.conftest import IMPASTO, KEY, SDXL_LORA, alive, ended, poll, worker_pids

SMALL = {"prompt": "a red fox on a blue background", "size": "512*512", "seed": 7}


def test_the_api_answers_within_two_seconds_while_the_model_loads(serve):
    """``impasto serve`` with the built-in model answers /health and takes jobs before the worker is ready.

    The best of up to three starts counts: on a busy machine a single one says more about what else runs.
    """
    late = []
    for _ in range(3):
        before = slowness()
        served = serve()
        health = httpx.get(f"{served.url}/health", timeout=5, trust_env=False)
        seconds = time.monotonic() - served.started
        assert health.status_code == 200
        assert not any("taking jobs" in line for line in served.log), "the model cannot be loaded yet"
        if seconds < 2.0 * max(before, slowness()):
            return
        late.append(seconds)
        served.stop()
    pytest.fail(f"answered after {', '.join(f'{seconds:.1f}' for seconds in late)} s")


def slowness() -> float:
    """How much slower than an idle machine of ours this one is now; importing httpx takes 0.2 s there."""
    times = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", "import httpx"], check=True)
        times.append(time.monotonic() - start)
    return max(1.0, sorted(times)[1] / 0.25)


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


def test_the_documented_lora_works_with_the_shipped_model(serve):
    """``nerijs/pixel-art-xl`` needs no download: a shipped LoRA stands in, and the report says so."""
    served = serve()
    api = served.api(served.wait_for(KEY))
    pictures = {}
    for scale in (0, 1):
        loras = [{"path": "nerijs/pixel-art-xl", "scale": scale}]
        job = api.post(SDXL_LORA, json=SMALL | {"num_inference_steps": 4, "loras": loras}).json()["data"]
        done = poll(api, job["id"], ended)
        assert done["status"] == "completed", done["error"]
        [report] = done["loras"]
        assert (report["path"], report["alias_of"]) == ("nerijs/pixel-art-xl", "pixel-art")
        assert report["applied"]["unet"] > 100 and report["unmatched"]["count"] == 0
        pictures[scale] = httpx.get(done["outputs"][0], trust_env=False).content
    assert pictures[0] != pictures[1]


def test_painting_into_a_picture_with_the_shipped_model_over_http(serve, tmp_path):
    """Start picture and mask go over the wire, through file and row, to the model: it paints, and keeps the rest.

    Kept pixels come back bit for bit; the start picture is gone from the disk when the job has ended.
    """
    start, mask = Image.effect_noise((512, 512), 60).convert("RGB"), Image.new("L", (512, 512))
    mask.paste(255, (256, 0, 512, 512))
    served = serve()
    api = served.api(served.wait_for(KEY))
    body = SMALL | {"image": data_uri(start), "mask_image": data_uri(mask), "strength": 0.5, "num_inference_steps": 4}
    job = api.post(SDXL_LORA, json=body).json()["data"]
    done = poll(api, job["id"], ended)
    assert done["status"] == "completed", done["error"]

    drawn = Image.open(io.BytesIO(httpx.get(done["outputs"][0], trust_env=False).content))
    kept, painted = (0, 0, 256, 512), (256, 0, 512, 512)
    assert drawn.crop(kept).tobytes() == start.crop(kept).tobytes()
    assert drawn.crop(painted).tobytes() != start.crop(painted).tobytes()
    deadline = time.monotonic() + 10
    while (left := list((tmp_path / "data" / "outputs" / "inputs").glob("*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def data_uri(image: Image.Image) -> str:
    """The picture as a client sends it."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


@pytest.mark.parametrize("model", ["builtin", "fake"])
def test_a_job_survives_kill_9_of_its_worker(serve, model):
    """Killed in the middle of a job, the worker is replaced and the job finished, with the same picture.

    The lease is ten minutes: the job comes back because the death was noticed, not because time ran out.
    """
    served = serve("--model", model, IMPASTO_FAKE_STEP_SECONDS="0.5", IMPASTO_LEASE_SECONDS="600")
    api = served.api(served.wait_for(KEY))
    body = SMALL | {"num_inference_steps": 12}
    undisturbed = poll(api, api.post(SDXL_LORA, json=body).json()["data"]["id"], ended)

    job_id = api.post(SDXL_LORA, json=body).json()["data"]["id"]
    poll(api, job_id, lambda data: data.get("progress", {}).get("step", 0) >= 1)
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

    deadline = time.monotonic() + 30
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_hands_unfinished_jobs_back(serve, number):
    """Stopped in the middle of a long job: no worker is left, and the next start goes on with the job at once.

    The lease is ten minutes: the job is there because it was handed back.
    """
    first = serve("--model", "fake", IMPASTO_FAKE_STEP_SECONDS="0.2", IMPASTO_LEASE_SECONDS="600")
    key = first.wait_for(KEY)
    job_id = first.api(key).post(SDXL_LORA, json=SMALL).json()["data"]["id"]
    poll(first.api(key), job_id, lambda data: data["status"] == "processing")
    [worker] = worker_pids(first.process.pid)
    first.process.send_signal(number)
    assert first.process.wait(30) == 0
    assert not alive(worker)
    assert "Traceback" not in "".join(first.log)

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
    assert run.stderr.startswith("impasto: model 'nowhere' was not found: give 'builtin', ")
    assert len(run.stderr.splitlines()) == 1


def test_settings_that_the_worker_cannot_run_with_end_the_service(tmp_path):
    """A device that is not there: the service says so and ends, instead of taking jobs that never run."""
    run = subprocess.run(
        [IMPASTO, "serve", "--device", "cuda:99", "--data-dir", tmp_path / "data", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    assert "'cuda:99' cannot be used here" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_log_has_no_secrets(serve):
    """Neither the key (but for the line that shows it) nor the address of a picture is logged."""
    served = serve("--model", "fake")
    key = served.wait_for(KEY)
    api = served.api(key)
    job = api.post(SDXL_LORA, json=SMALL | {"num_inference_steps": 1}).json()["data"]
    [url] = poll(api, job["id"], ended)["outputs"]
    assert httpx.get(url, trust_env=False).status_code == 200
    log = "".join(served.log)
    assert job["id"] in log
    assert url.rsplit("/", 2)[1] not in log
    assert log.count(key) == 1


def test_the_official_client_against_the_real_service(serve):
    """Unmodified: run to URLs, run to base64, a wrong key, a bad parameter."""
    served = serve("--model", "fake")
    client = Client(api_key=served.wait_for(KEY), base_url=served.url)
    small = SMALL | {"num_inference_steps": 2}

    [url] = client.run("wavespeed-ai/sdxl-lora", small, poll_interval=0.05)["outputs"]
    picture = httpx.get(url, trust_env=False).content
    [encoded] = client.run("wavespeed-ai/sdxl-lora", small | {"enable_base64_output": True}, poll_interval=0.05)[
        "outputs"
    ]

    assert Image.open(io.BytesIO(picture)).size == (512, 512)
    assert base64.b64decode(encoded, validate=True) == picture
    with pytest.raises(RuntimeError, match="HTTP 401"):
        Client(api_key="wrong", base_url=served.url).run("wavespeed-ai/sdxl-lora", small)
    with pytest.raises(RuntimeError, match=r"HTTP 400.*num_inference_steps"):
        client.run("wavespeed-ai/sdxl-lora", small | {"num_inference_steps": 51})


def test_several_workers_share_the_queue(serve):
    """``--workers 2`` runs two processes, and both get jobs."""
    served = serve("--model", "fake", "--workers", "2", IMPASTO_FAKE_STEP_SECONDS="0.2", IMPASTO_MAX_BATCH="1")
    api = served.api(served.wait_for(KEY))
    served.wait_for(re.compile(r"(?s)taking jobs.*taking jobs"))
    assert len(worker_pids(served.process.pid)) == 2
    ids = [api.post(SDXL_LORA, json=SMALL | {"num_inference_steps": 5}).json()["data"]["id"] for _ in range(4)]
    assert {poll(api, id, ended)["status"] for id in ids} == {"completed"}


def test_a_worker_of_its_own_serves_an_api_without_workers(serve, tmp_path):
    """``serve --workers 0`` answers and queues; ``impasto worker``, given the database and the storage, draws."""
    database, storage = f"sqlite:///{tmp_path}/jobs.db", str(tmp_path / "pictures")
    where = ("--database-url", database, "--storage-url", storage, "--model", "fake")
    served = serve("--workers", "0", *where)
    api = served.api(served.wait_for(KEY))
    job = api.post(SDXL_LORA, json=SMALL).json()["data"]
    time.sleep(1)
    assert poll(api, job["id"], lambda data: True)["status"] == "created"
    assert worker_pids(served.process.pid) == []
    worker = subprocess.Popen([IMPASTO, "worker", "--data-dir", str(tmp_path / "elsewhere"), *where])
    try:
        done = poll(api, job["id"], ended)
        assert done["status"] == "completed"
        assert httpx.get(done["outputs"][0], trust_env=False).headers["content-type"] == "image/png"
    finally:
        worker.terminate()
        assert worker.wait(30) == 0
