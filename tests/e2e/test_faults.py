"""The failure matrix: real processes die, freeze and hang at chosen points, on both databases, and no job is lost."""

import io
import json
import shutil
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageChops
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from impasto.jobs.history import History
from impasto.jobs.outputs import OutputStore
from impasto.jobs.states import Status
from impasto.types import GenerationRequest
from impasto.worker.backend import draw_pattern
from impasto.worker.naming import EXIT_STALLED
from tests.chaos.programs import Postgres, Program, own_postgres
from tests.faults.site import LEASE_SECONDS, SDXL_LORA, SMALL, Site
from tests.postgres import drop_database, new_database
from tests.s3 import s3_server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/impasto.db"
        return
    url = new_database()
    yield url
    drop_database(url)


@pytest.fixture
def site(url, tmp_path):
    site = Site(url, tmp_path)
    yield site
    site.close()


def check_picture(site: Site, job_id: str) -> None:
    """The job has the one picture that its seed makes."""
    [output] = site.store.get(job_id).outputs
    picture = Image.open(io.BytesIO(OutputStore(site.storage).get(output.blob))).convert("RGB")
    expected = draw_pattern(GenerationRequest(prompt=SMALL["prompt"], width=512, height=512), output.seed)
    assert ImageChops.difference(picture, expected).getbbox() is None


@pytest.mark.parametrize(("point", "rows"), [("before_commit", 0), ("after_commit", 1)])
def test_an_api_that_dies_in_a_submit(site, point, rows):
    """Its client got no answer, so it sends the request again: that makes one job, the first one if it was stored."""
    headers = {"Idempotency-Key": "k"}
    with pytest.raises(httpx.TransportError):
        site.api(point).post(SDXL_LORA, json=SMALL, headers=headers)
    made = [row.id for row in site.rows("select id from predictions")]
    assert len(made) == rows

    answers = [site.api().post(SDXL_LORA, json=SMALL, headers=headers).json()["data"]["id"] for _ in range(2)]
    assert len(set(answers)) == 1
    assert [row.id for row in site.rows("select id from predictions")] == (made or answers[:1])
    site.worker()
    assert site.ended(answers[0]).status is Status.COMPLETED


@pytest.mark.parametrize("point", ["after_claim", "mid_step", "after_put", "before_complete", "after_complete"])
def test_a_worker_that_dies(site, point):
    """Another one finishes the job, with the same picture; nothing is seen twice; what was left lying is swept."""
    api = site.api()
    dying = site.worker(point)
    job_id = site.submit(api)
    assert dying.wait(60) == -signal.SIGKILL
    site.worker()
    assert site.ended(job_id).status is Status.COMPLETED
    assert site.attempts(job_id) == (["ok"] if point == "after_complete" else ["lease_lost", "ok"])
    assert site.ends(job_id) == ["completed"]
    check_picture(site, job_id)

    time.sleep(0.01)
    outputs = OutputStore(site.storage)
    left = len(list(outputs.older(f"{job_id}/", 0)))
    assert left == (2 if point in ("after_put", "before_complete") else 1)
    History(site.engine, outputs).sweep_attempts(grace=0)
    check_picture(site, job_id)
    assert len(list(outputs.older(f"{job_id}/", 0))) == 1


def test_a_worker_that_was_frozen_past_its_lease_does_no_harm(site):
    """SIGSTOP, another worker does the job, SIGCONT: the zombie's result is nobody's, and it goes on to other jobs."""
    api = site.api()
    zombie = site.worker()
    slow = site.submit(api, num_inference_steps=50)
    site.wait(lambda: site.store.get(slow).progress.get("step", 0) > 0)
    freeze(site, zombie)
    other = site.worker()
    done = site.ended(slow)
    zombie.send(signal.SIGCONT)
    site.wait(lambda: b"given to another worker" in zombie.log.read_bytes())

    assert site.attempts(slow) == ["lease_lost", "ok"]
    assert site.store.get(slow) == done
    other.send(signal.SIGTERM)
    assert other.wait() == 0
    assert site.ended(site.submit(api)).status is Status.COMPLETED
    assert len(list(OutputStore(site.storage).older(f"{slow}/", 0))) == 1


def freeze(site: Site, program: Program) -> None:
    """Stop a process, but not in the middle of a write: SQLite's lock would be frozen with it, and everybody."""
    while True:
        program.send(signal.SIGSTOP)
        try:
            with site.engine.connect() as db:
                if site.engine.dialect.name == "sqlite":
                    db.exec_driver_sql("pragma busy_timeout = 100")
                db.execute(text("select 1"))
            return
        except OperationalError:
            program.send(signal.SIGCONT)
        finally:
            site.engine.dispose()


def test_a_poison_job_takes_nobody_with_it(site):
    """It kills its worker and its batch; alone it kills the next, and the third; then it has failed, and says why."""
    api = site.api()
    mates = [site.submit(api, num_inference_steps=20) for _ in range(2)]
    poison = site.submit(api, prompt="poison", num_inference_steps=20)
    later = site.submit(api, num_inference_steps=20)
    deaths = []
    for _ in range(3):
        worker = site.worker("marked")
        site.wait(lambda worker=worker: not worker.runs)
        deaths.append(worker.wait())
    survivor = site.worker("marked")
    failed = site.ended(poison)

    assert deaths == [-signal.SIGKILL] * 3
    assert (failed.status, failed.error_class) == (Status.FAILED, "worker_lost")
    assert failed.error.startswith("the worker died 3 times while running this job")
    assert site.attempts(poison) == ["lease_lost"] * 3
    for mate in [*mates, later]:
        assert site.ended(mate).status is Status.COMPLETED
        assert site.attempts(mate).count("lease_lost") <= 1, "it is run beside the poison once at most"
    assert survivor.runs


def test_a_worker_that_hangs_ends_itself_and_its_job_is_done_by_another(url, tmp_path):
    """The backend does not come back from a step: after twenty leases the process ends, and says so by its status."""
    site = Site(url, tmp_path, IMPASTO_LEASE_SECONDS="0.3")
    try:
        api = site.api()
        job_id = site.submit(api, prompt="wedge")
        hung = site.worker("marked")
        assert hung.wait(60) == EXIT_STALLED
        site.worker("marked")
        assert site.ended(job_id).status is Status.COMPLETED
        assert site.attempts(job_id) == ["lease_lost", "ok"]
    finally:
        site.close()


def test_a_postgresql_that_is_killed(tmp_path):
    """Submits meet 503 with Retry-After and store nothing; the worker waits; after the restart all goes on."""
    with own_postgres() as postgres:
        site = Site(postgres.url, tmp_path, IMPASTO_LEASE_SECONDS="30")
        try:
            _kill_and_go_on(site, postgres)
        finally:
            site.close()


def _kill_and_go_on(site: Site, postgres: Postgres) -> None:
    api, worker = site.api(), site.worker()
    before = [site.submit(api, num_inference_steps=50) for _ in range(2)]
    site.wait(lambda: site.store.get(before[0]).progress.get("step", 0) > 0)
    postgres.kill()
    refused = api.post(SDXL_LORA, json=SMALL, headers={"Idempotency-Key": "k"})
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) > 0
    time.sleep(1.5)  # the jobs' last steps are done meanwhile
    postgres.start()

    site.engine.dispose()
    assert [site.ended(job_id).status for job_id in before] == [Status.COMPLETED] * 2
    assert [site.attempts(job_id) for job_id in before] == [["ok"]] * 2, "the lease outlived the outage"
    after = site.submit(api)
    assert site.ended(after).status is Status.COMPLETED
    assert len(site.rows("select id from predictions")) == 3
    assert worker.runs


def test_processes_that_start_before_their_database(tmp_path):
    """They wait for it, as containers that start together must."""
    with own_postgres() as postgres:
        site = Site(postgres.url, tmp_path)
        try:
            site.engine.dispose()
            postgres.kill()
            later = threading.Timer(4, postgres.start)
            later.start()
            api = site.api()
            site.worker()
            later.join()
            assert site.ended(site.submit(api)).status is Status.COMPLETED
        finally:
            site.close()


def test_a_full_disk(tmp_path, small_disk):
    """New jobs are refused; those that were accepted wait for room instead of failing; then all goes on by itself."""
    storage = str(small_disk / "outputs")
    site = Site(f"sqlite:///{tmp_path}/impasto.db", tmp_path, storage, IMPASTO_MIN_FREE_BYTES="100000")
    try:
        api, worker = site.api(), site.worker()
        accepted = [site.submit(api, num_inference_steps=40) for _ in range(6)]
        filler = small_disk / "filler"
        fill(filler)
        site.wait(lambda: api.post(SDXL_LORA, json=SMALL).status_code == 503)
        time.sleep(3 * LEASE_SECONDS)
        assert not any(site.ends(job_id) for job_id in accepted)
        filler.unlink()
        assert {site.ended(job_id).status for job_id in accepted} == {Status.COMPLETED}
        site.wait(lambda: api.post(SDXL_LORA, json=SMALL).status_code == 200)
        assert worker.runs
    finally:
        site.close()


def test_pictures_in_a_bucket_that_goes_away(tmp_path):
    """Served from there; while it is away jobs wait, nobody is told a picture is gone, and then all goes on."""
    with s3_server() as s3:
        site = Site(f"sqlite:///{tmp_path}/impasto.db", tmp_path, s3.url, **s3.environment)
        try:
            api, worker = site.api(), site.worker()
            first = site.ended(site.submit(api)).outputs[0].blob
            picture = api.get(f"/outputs/{first}")
            assert Image.open(io.BytesIO(picture.content)).size == (512, 512)

            s3.stop()
            waiting = [site.submit(api) for _ in range(5)]
            assert api.get(f"/outputs/{first}").status_code == 503
            time.sleep(3 * LEASE_SECONDS)
            assert not any(site.ends(job_id) for job_id in waiting)
            s3.start()
            assert {site.ended(job_id).status for job_id in waiting} == {Status.COMPLETED}
            assert worker.runs
            assert {site.store.get(job_id).outputs[0].blob for job_id in waiting} <= {
                name.removeprefix("prefix/") for name in s3.names()
            }
        finally:
            site.close()


def test_an_api_that_dies_while_it_tells_of_a_job(site):
    """Its client goes on at another API where it was: nothing is missed, nothing told twice."""
    first, second = site.api(), site.api()
    site.worker()
    job_id = site.submit(second, num_inference_steps=50)
    [program] = [program for program in site.programs if str(first.base_url.port) in program.command]
    heard = []

    def listen():
        for event in events(first, job_id):
            heard.append(event)
            if event["event"] == "progress":
                program.send(signal.SIGKILL)

    with pytest.raises(httpx.TransportError):
        listen()
    states = [event for event in heard if "id" in event]
    rest = list(events(second, job_id, {"Last-Event-ID": states[-1]["id"]}))
    seqs = [int(event["id"]) for event in [*states, *(event for event in rest if "id" in event)]]
    assert seqs == sorted(set(seqs))
    assert json.loads(rest[-1]["data"])["status"] == "completed"


def events(api, job_id, headers=None):
    """The events of a job as a client reads them: names and values of each one's lines."""
    event = {}
    with api.stream("GET", f"/api/v3/predictions/{job_id}/events", headers=headers or {}) as answer:
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(":")
                event[name] = value.strip()
            elif event.get("event"):
                yield event
                event = {}


def fill(path: Path) -> None:
    """Write until there is no room left."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    assert shutil.disk_usage(path.parent).free < 4096
