"""The worker's loop over a real store and real files, with the test-pattern backend."""

import io
import threading
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from impasto.errors import NotFound, Unavailable
from impasto.images import encode_png
from impasto.jobs.database import open_database, upgrade
from impasto.jobs.history import History
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import NewJob
from impasto.jobs.states import Status
from impasto.jobs.store import JobStore
from impasto.types import Failed, GenerationRequest, ImageReady, LoraRef, Preview
from impasto.worker.backend import FakeBackend, draw_pattern
from impasto.worker.loop import WorkerLoop

LEASE = 30.0


class Rig:
    """Store, files, and a way to make jobs and loops."""

    def __init__(self, folder):
        database = open_database(f"sqlite:///{folder / 'jobs.db'}")
        upgrade(database)
        self.store = JobStore(database)
        self.outputs = OutputStore(str(folder / "outputs"))
        self.folder = folder
        keys = KeyStore(database)
        self.key_id = keys.authenticate(keys.create("test")).id

    def submit(self, file_format="png", pictures=None, **fields):
        request = GenerationRequest(**({"prompt": "a fox", "width": 512, "height": 512} | fields))
        output = {"format": file_format, "base64": False, "safety_checker": True}
        keys = {name: self.outputs.put_input(encode_png(picture)) for name, picture in (pictures or {}).items()}
        content = {"request": request.to_json(), "pictures": keys, "output": output}
        return self.store.create(NewJob("m", content, self.key_id, seed=request.seed), max_queued=100).id

    def loop(self, backend=None, **options):
        options = {"name": "w1", "lora_dir": self.folder / "loras", "lease_seconds": LEASE} | options
        return WorkerLoop(self.store, self.outputs, backend or FakeBackend(0), **options)

    def files(self):
        return [path for path in (self.folder / "outputs").rglob("*") if path.is_file()]

    def inputs(self):
        return [path for path in self.files() if path.parent.name == "inputs"]


@pytest.fixture
def rig(tmp_path):
    return Rig(tmp_path)


def drain(loop, turns=500):
    """Turn the loop until it has nothing to do."""
    for _ in range(turns):
        if not loop.turn():
            return
    raise AssertionError("the loop never came to rest")


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_a_job_becomes_pictures(rig, file_format):
    """Claim, steps, files, finish: each image is stored in the asked format with its own seed."""
    job_id = rig.submit(file_format, num_images=3, num_inference_steps=4, seed=10)

    drain(rig.loop())

    job = rig.store.get(job_id)
    assert job.status is Status.COMPLETED
    assert [output.seed for output in job.outputs] == [10, 11, 12]
    assert job.timings["inference"] >= 0
    for output in job.outputs:
        picture = Image.open(io.BytesIO(rig.outputs.get(output.blob)))
        assert picture.format.lower() == file_format
        assert picture.size == (output.width, output.height) == (512, 512)


def test_several_jobs_share_the_backend_within_the_slots(rig):
    """A loop with two slots holds two jobs at once, no more, and finishes all five."""
    ids = [rig.submit(num_inference_steps=3, seed=i) for i in range(5)]
    loop = rig.loop(slots=2)
    loop.turn()
    assert sum(rig.store.get(job_id).status is Status.PROCESSING for job_id in ids) == 2
    drain(loop)
    assert all(rig.store.get(job_id).status is Status.COMPLETED for job_id in ids)


class Failing(FakeBackend):
    """Fails every request whose prompt says so."""

    def step(self):
        for request_id, (request, _) in list(self._requests.items()):
            if "boom" in request.prompt:
                self.cancel(request_id)
                return [Failed(request_id, RuntimeError("secret /path of the server"))]
        return super().step()


def test_one_failing_job_fails_alone_and_tells_no_secrets(rig):
    """The other job completes; the failed one says so without the internal message."""
    good, bad = rig.submit(num_inference_steps=3, seed=1), rig.submit(prompt="boom", seed=2)

    drain(rig.loop(Failing(0)))

    assert rig.store.get(good).status is Status.COMPLETED
    failed = rig.store.get(bad)
    assert failed.status is Status.FAILED
    assert "RuntimeError" in failed.error
    assert "secret" not in failed.error


def test_a_lora_is_found_by_name_inside_its_folder_only(rig):
    """``owner/name`` is a file below the LoRA folder; nothing outside it can be named."""
    folder = rig.folder / "loras" / "me"
    folder.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, folder / "pixel.safetensors")
    save_file({"x": torch.zeros(1)}, rig.folder / "outside.safetensors")
    backend = Watching()

    for name in ("me/pixel", "me/pixel.safetensors"):
        job_id = rig.submit(loras=(LoraRef(name, 0.5),), num_inference_steps=1, seed=1)
        drain(rig.loop(backend))
        assert rig.store.get(job_id).status is Status.COMPLETED
        assert backend.seen.pop().loras == (LoraRef(str(folder / "pixel.safetensors"), 0.5),)

    for name in ("../outside", str(rig.folder / "outside.safetensors"), "nerijs/pixel-art-xl", "", "*"):
        job_id = rig.submit(loras=(LoraRef(name),), seed=1)
        drain(rig.loop(backend))
        failed = rig.store.get(job_id)
        assert failed.status is Status.FAILED
        assert failed.error.startswith('Error at "/loras/0/path": '), failed.error
    assert backend.seen == []


class Watching(FakeBackend):
    """Remembers what it was asked for."""

    def __init__(self, step_seconds=0.0):
        super().__init__(step_seconds)
        self.seen = []

    def submit(self, request, request_id=None):
        self.seen.append(request)
        return super().submit(request, request_id)


def test_previews_do_no_harm(rig):
    """The engine may send them; for now nobody is shown them."""

    class Previewing(FakeBackend):
        def step(self):
            previews = [Preview(request_id, 0, 1, Image.new("RGB", (64, 64))) for request_id in self._requests]
            return [*previews, *super().step()]

    job_id = rig.submit(num_inference_steps=2, seed=1)
    drain(rig.loop(Previewing(0)))
    assert rig.store.get(job_id).status is Status.COMPLETED
    assert len(rig.files()) == 1


class Early(FakeBackend):
    """Delivers the first picture of each request with its first step."""

    def step(self):
        events = super().step()
        for request_id, (request, done) in self._requests.items():
            if done == 1:
                events.append(ImageReady(request_id, 0, request.seed, draw_pattern(request, request.seed)))
        return events


def test_a_cancelled_job_is_dropped_at_the_next_step_and_its_files_deleted(rig):
    """Cancel reaches the running job with the next heartbeat; nothing of it stays on disk."""
    job_id = rig.submit(num_inference_steps=50, num_images=2, seed=1)
    loop = rig.loop(Early(0))
    loop.turn()
    while not rig.files():
        time.sleep(0.01)
    rig.store.cancel(job_id, rig.key_id)

    loop._beat()
    drain(loop)

    assert rig.store.get(job_id).status is Status.CANCELLED
    assert rig.files() == []


def test_progress_travels_with_the_heartbeat(rig):
    """After a beat the job says how many steps are done."""
    job_id = rig.submit(num_inference_steps=50, seed=1)
    loop = rig.loop()
    for _ in range(3):
        loop.turn()
    loop._beat()
    progress = rig.store.get(job_id).progress
    assert (progress["step"], progress["total"]) == (3, 50)
    assert 0 < progress["sigma"] < 14.6


def test_a_worker_that_lost_its_lease_publishes_nothing(rig):
    """Its late pictures are deleted and the successor's are the ones to see."""
    job_id = rig.submit(num_inference_steps=2, seed=5)
    zombie = rig.loop(lease_seconds=0.01)
    zombie.turn()
    time.sleep(0.05)
    rig.store.reap(max_attempts=3)

    drain(rig.loop(name="w2"))
    before = rig.store.get(job_id)
    drain(zombie)

    assert rig.store.get(job_id) == before
    assert before.status is Status.COMPLETED
    assert "/2-" in before.outputs[0].blob
    assert len(rig.files()) == 1


def test_stop_hands_unfinished_jobs_back(rig):
    """A stopped worker's job is in the queue again, as if it had never been taken."""
    job_id = rig.submit(num_inference_steps=50, seed=1)
    loop = rig.loop(FakeBackend(0.2))
    thread = threading.Thread(target=loop.run)
    thread.start()
    deadline = time.monotonic() + 10
    while rig.store.get(job_id).status is not Status.PROCESSING and time.monotonic() < deadline:
        time.sleep(0.01)
    loop.stop()
    thread.join(10)

    assert rig.store.get(job_id).status is Status.CREATED
    drain(rig.loop(name="w2"))
    assert rig.store.get(job_id).status is Status.COMPLETED


def test_an_idle_worker_wakes_for_a_new_job(rig, monkeypatch):
    """No fixed pause stands between submit and start: the idle sleep is a minute here, the wake-up is not."""
    monkeypatch.setattr("impasto.worker.loop.IDLE_SECONDS", 60.0)
    loop = rig.loop()
    thread = threading.Thread(target=loop.run)
    thread.start()
    time.sleep(0.3)
    submitted = time.monotonic()
    job_id = rig.submit(num_inference_steps=1, seed=1)
    while rig.store.get(job_id).status is not Status.COMPLETED and time.monotonic() < submitted + 20:
        time.sleep(0.01)
    assert rig.store.get(job_id).status is Status.COMPLETED
    loop.stop()
    rig.submit(seed=1)  # any change wakes it to see that it is told to stop
    thread.join(20)
    assert not thread.is_alive()
    with pytest.raises(NotFound):
        rig.outputs.get("0" * 32 + "/1-" + "0" * 32 + "/0.png")


def away(method, times):
    """Wrap a store method so that its first calls find the database away."""
    calls = []

    def wrapped(*arguments):
        calls.append(arguments)
        if len(calls) <= times:
            raise Unavailable("the database is away")
        return method(*arguments)

    return wrapped


def test_results_are_kept_while_the_store_is_away(rig, monkeypatch):
    """Two jobs end in one step and the store is away for a moment: both results arrive, and both slots are free."""
    monkeypatch.setattr("impasto.worker.publishing.RETRY_SECONDS", 0.01)
    ids = [rig.submit(num_inference_steps=2, seed=i) for i in range(2)]
    monkeypatch.setattr(rig.store, "complete", away(rig.store.complete, 3))
    loop = rig.loop(slots=2)

    drain(loop)

    assert all(rig.store.get(job_id).status is Status.COMPLETED for job_id in ids)
    assert loop._running == {}


def test_a_result_that_cannot_be_stored_within_the_lease_is_made_again(rig, monkeypatch):
    """The slot is free, and the job runs once more. The lost attempt's pictures are swept later.

    Not at once: a commit whose answer was lost looks the same, and then the pictures are those of a completed job.
    """
    monkeypatch.setattr("impasto.worker.publishing.RETRY_SECONDS", 0.02)
    job_id = rig.submit(num_inference_steps=1, seed=1)
    with monkeypatch.context() as broken:
        broken.setattr(rig.store, "complete", away(rig.store.complete, 10**6))
        loop = rig.loop(lease_seconds=0.1)
        drain(loop)
    assert len(rig.files()) == 1
    assert loop._running == {}

    time.sleep(0.2)
    rig.store.reap(max_attempts=3)
    drain(rig.loop(name="w2"))
    done = rig.store.get(job_id)
    assert done.status is Status.COMPLETED
    time.sleep(0.01)
    History(rig.store.engine, rig.outputs).sweep_attempts(grace=0)
    assert len(rig.files()) == 1
    assert rig.outputs.get(done.outputs[0].blob)


def test_a_job_that_was_started_before_runs_alone(rig):
    """It may be what kills workers: nothing is in the backend beside it, before, while or after it runs."""
    suspect = rig.submit(num_inference_steps=3, seed=1)
    rig.store.claim("dead", 1, 0.01)
    time.sleep(0.05)
    rig.store.reap(max_attempts=3)
    others = [rig.submit(num_inference_steps=3, seed=i) for i in range(4)]
    together = []

    class Watching(FakeBackend):
        def step(self):
            together.append(set(self._requests))
            return super().step()

    drain(rig.loop(Watching(0)))

    assert all(rig.store.get(job_id).status is Status.COMPLETED for job_id in [suspect, *others])
    assert [company for company in together if suspect in company] == [{suspect}] * 3
    assert any(len(company) > 1 for company in together), "the others do run together"


def test_a_job_that_was_handed_back_runs_with_others(rig):
    """A restart of its worker says nothing against a job."""
    ids = [rig.submit(num_inference_steps=3, seed=i) for i in range(3)]
    for job in rig.store.claim("leaving", 3, 30):
        rig.store.release(job.lease)
    loop = rig.loop()
    loop.turn()
    assert len(loop._backend._requests) == 3
    drain(loop)
    assert all(rig.store.get(job_id).status is Status.COMPLETED for job_id in ids)


def test_a_row_that_cannot_be_read_fails_and_the_worker_goes_on(rig):
    """A row of another version is its own end only."""
    broken = NewJob("m", {"request": {"nonsense": 1}, "output": {}}, rig.key_id, seed=1)
    bad, good = rig.store.create(broken, max_queued=9).id, rig.submit(num_inference_steps=1, seed=1)
    drain(rig.loop())
    assert rig.store.get(bad).status is Status.FAILED
    assert rig.store.get(good).status is Status.COMPLETED


def test_a_backend_that_breaks_ends_the_worker_and_counts_against_the_job(rig):
    """No hand-back: after three such ends the job is given up instead of breaking workers for ever."""

    class Broken(FakeBackend):
        def step(self):
            raise RuntimeError("the device is gone")

    job_id = rig.submit(seed=1)
    for attempt in range(3):
        with pytest.raises(RuntimeError, match="device is gone"):
            rig.loop(Broken(0), name=f"w{attempt}", lease_seconds=0.05).run()
        time.sleep(0.1)
        rig.store.reap(max_attempts=3)
    failed = rig.store.get(job_id)
    assert failed.status is Status.FAILED
    assert "died 3 times" in failed.error


def test_a_backend_that_hangs_is_told_of(rig, monkeypatch):
    """The heartbeat notices, so that the process can end and be replaced."""
    monkeypatch.setattr("impasto.worker.heartbeat.STALL_LEASES", 2)
    stalled, release = threading.Event(), threading.Event()

    class Hanging(FakeBackend):
        def step(self):
            release.wait(20)
            return super().step()

    rig.submit(num_inference_steps=1, seed=1)
    loop = rig.loop(Hanging(0), lease_seconds=0.2, on_stall=stalled.set)
    thread = threading.Thread(target=loop.run)
    thread.start()
    assert stalled.wait(20)
    release.set()
    loop.stop()
    thread.join(20)


def test_handing_back_goes_on_when_one_job_cannot_be(rig, monkeypatch):
    """The store is away for the first release; the second job is back in the queue all the same."""
    ids = [rig.submit(num_inference_steps=50, seed=i) for i in range(2)]
    loop = rig.loop(slots=2)
    loop.turn()
    monkeypatch.setattr(rig.store, "release", away(rig.store.release, 1))
    loop._hand_back()
    assert sorted(rig.store.get(job_id).status for job_id in ids) == [Status.CREATED, Status.PROCESSING]
