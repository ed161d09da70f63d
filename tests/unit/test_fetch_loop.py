"""The worker while files are on their way: nobody else waits for them, and the job can still be cancelled."""

import threading
import time

import pytest

from impasto.config import Settings
from impasto.jobs.database import open_database, upgrade
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import NewJob
from impasto.jobs.states import Status
from impasto.jobs.store import JobStore
from impasto.types import GenerationRequest, LoraRef
from impasto.worker.backend import FakeBackend
from impasto.worker.loop import WorkerLoop
from impasto.worker.loras import LoraLibrary
from tests.sites import Page, Web, running
from tests.unit.test_lora_sources import lora


class Watching(FakeBackend):
    """Remembers what it was asked for, and who was in it together."""

    def __init__(self):
        super().__init__(0)
        self.seen = []
        self.together = []

    def submit(self, request, request_id=None):
        self.seen.append(request)
        return super().submit(request, request_id)

    def step(self):
        self.together.append(set(self._requests))
        return super().step()


class Rig:
    """A store, a loop whose LoRAs come from a web server, and that server."""

    def __init__(self, folder, web):
        database = open_database(f"sqlite:///{folder / 'jobs.db'}")
        upgrade(database)
        self.store, self.outputs, self.web = JobStore(database), OutputStore(str(folder / "outputs")), web
        keys = KeyStore(database)
        self.key_id = keys.authenticate(keys.create("test")).id
        reach = {"fetch_allow": ["127.0.0.1"], "fetch_http": True, "fetch_ports": [web.server_port]}
        self.settings = Settings(data_dir=folder, model="fake", **reach)
        self.backend = Watching()
        self.loops = []

    def loop(self, name="w1", lease_seconds=30.0, slots=2):
        loop = WorkerLoop(
            self.store, self.outputs, self.backend, name=name, lora_dir=self.settings.lora_dir, slots=slots,
            lease_seconds=lease_seconds, loras=LoraLibrary.of(self.settings),
        )  # fmt: skip
        self.loops.append(loop)
        return loop

    def submit(self, *loras, steps=1):
        refs = tuple(LoraRef(f"{self.web.url}{path}", 0.5) for path in loras)
        request = GenerationRequest("a fox", width=512, height=512, num_inference_steps=steps, seed=1, loras=refs)
        output = {"format": "png", "base64": False, "safety_checker": True}
        content = {"request": request.to_json(), "pictures": {}, "output": output}
        return self.store.create(NewJob("m", content, self.key_id, seed=1), max_queued=100).id

    def status(self, job_id):
        return self.store.get(job_id).status


@pytest.fixture
def rig(tmp_path):
    with running(Web()) as web:
        rig = Rig(tmp_path, web)
        yield rig
        for loop in rig.loops:
            for running_job in list(loop._running.values()):
                running_job.ended.set()
            loop._fetchers.shutdown()


def turn_until(loop, condition, seconds=15):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        if not loop.turn():
            time.sleep(0.01)


def slow(rig, path="/slow"):
    """A LoRA whose server sends one byte and then nothing, until the gate opens."""
    gate = threading.Event()
    rig.web.pages[path] = Page(lora(len(rig.web.pages)), gate=gate)
    return gate


def test_a_fetched_lora_reaches_the_backend_as_a_file(rig):
    """Whole, with its strength; and the loop knows where it came from while the job runs."""
    rig.web.pages["/a"] = Page(lora(3))
    job_id, loop = rig.submit("/a", steps=3), rig.loop()
    turn_until(loop, lambda: rig.backend.seen)
    [found] = loop._running[job_id].loras
    assert found.source == f"{rig.web.url}/a"
    turn_until(loop, lambda: rig.status(job_id) is Status.COMPLETED)
    assert rig.backend.seen[0].loras == (LoraRef(str(found.file), 0.5),)
    assert found.file.read_bytes() == lora(3)


def test_a_slow_server_holds_nobody_up(rig):
    """With more slow jobs than slots the others still run at once; the slow ones follow when their files are here."""
    gates = [slow(rig, f"/slow{i}") for i in range(4)]
    late = [rig.submit(f"/slow{i}") for i in range(4)]
    quick = [rig.submit() for _ in range(3)]
    loop = rig.loop()
    turn_until(loop, lambda: all(rig.status(job_id) is Status.COMPLETED for job_id in quick), 10)
    assert all(rig.status(job_id) is Status.PROCESSING for job_id in late)
    for gate in gates:
        gate.set()
    turn_until(loop, lambda: all(rig.status(job_id) is Status.COMPLETED for job_id in late))
    assert max(len(company) for company in rig.backend.together) <= 2, "never more than the slots"


def test_a_running_job_moves_on_while_another_waits_for_its_file(rig):
    """No step waits for a network."""
    gate = slow(rig)
    rig.submit("/slow")
    long = rig.submit(steps=50)
    loop, began = rig.loop(), time.monotonic()
    turn_until(loop, lambda: rig.status(long) is Status.COMPLETED)
    assert time.monotonic() - began < 5
    gate.set()


def test_the_lease_is_kept_while_files_come(rig):
    """A download may take many leases."""
    gate = slow(rig)
    job_id, loop = rig.submit("/slow"), rig.loop(lease_seconds=1.0)
    thread = threading.Thread(target=loop.run)
    thread.start()
    time.sleep(2.5)
    job = rig.store.get(job_id)
    assert (job.status, job.attempt) == (Status.PROCESSING, 1)
    gate.set()
    until = time.monotonic() + 10
    while rig.status(job_id) is not Status.COMPLETED and time.monotonic() < until:
        time.sleep(0.05)
    assert rig.store.get(job_id).attempt == 1
    assert rig.status(job_id) is Status.COMPLETED
    loop.stop()
    thread.join(10)


def test_a_job_is_cancelled_while_its_file_comes(rig):
    """At the next beat; the download ends too, and nothing of the job is left."""
    slow(rig)
    job_id, loop = rig.submit("/slow"), rig.loop()
    turn_until(loop, lambda: rig.web.asked)
    waiting = loop._fetching[job_id][1]
    rig.store.cancel(job_id, rig.key_id)
    loop._beat()
    loop.turn()
    assert rig.status(job_id) is Status.CANCELLED
    assert loop._running == loop._fetching == {}
    assert "is not waited for" in str(waiting.exception(5))
    assert not loop.turn()
    assert rig.backend.seen == []


def test_a_lora_that_cannot_be_had_fails_its_job_alone(rig):
    """With the field, the name and the remedy; the others finish."""
    bad, good = rig.submit("/nothing"), rig.submit()
    loop = rig.loop()
    turn_until(loop, lambda: rig.status(bad) is Status.FAILED)
    assert rig.store.get(bad).error.startswith(
        f"Error at \"/loras/0/path\": '{rig.web.url}/nothing' was not found there"
    )
    turn_until(loop, lambda: rig.status(good) is Status.COMPLETED)


def test_stopping_hands_back_what_waits_for_files(rig):
    """Soon, however long the download would take; another worker does it."""
    gate = slow(rig)
    job_id, loop = rig.submit("/slow"), rig.loop()
    thread = threading.Thread(target=loop.run)
    thread.start()
    while not rig.web.asked:
        time.sleep(0.02)
    began = time.monotonic()
    loop.stop()
    thread.join(10)
    loop._fetchers.shutdown(wait=True)
    assert time.monotonic() - began < 3
    assert rig.status(job_id) is Status.CREATED
    gate.set()
    rig.web.pages["/slow"] = Page(lora(1))
    second = rig.loop("w2")
    turn_until(second, lambda: rig.status(job_id) is Status.COMPLETED)


def test_a_suspect_with_a_slow_file_does_not_stop_the_others(rig):
    """A job that was started before runs alone, but only once its files are here."""
    gate = slow(rig)
    suspect = rig.submit("/slow", steps=3)
    rig.store.claim("dead", 1, 0.01)
    time.sleep(0.05)
    rig.store.reap(max_attempts=3)
    others = [rig.submit(steps=3) for _ in range(3)]
    loop = rig.loop()
    turn_until(loop, lambda: all(rig.status(job_id) is Status.COMPLETED for job_id in others))
    assert rig.status(suspect) is Status.PROCESSING
    more = [rig.submit(steps=30) for _ in range(2)]
    loop.turn()
    gate.set()
    turn_until(loop, lambda: all(rig.status(job_id) is Status.COMPLETED for job_id in [suspect, *more]))
    assert [company for company in rig.backend.together if suspect in company] == [{suspect}] * 3
