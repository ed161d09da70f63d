"""Previews and heartbeats: what a running job shows, how small it is, how often it is written, and when it goes."""

from __future__ import annotations

import base64
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from impasto.engine.engine import Engine
from impasto.jobs.database import open_database, upgrade
from impasto.jobs.events import JobGlances, Thumbnail, decode_previews, encode_previews
from impasto.jobs.keys import KeyStore
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import Beat, NewJob
from impasto.jobs.states import Status
from impasto.jobs.store import JobStore
from impasto.types import GenerationRequest, Preview, Progress
from impasto.worker.backend import FakeBackend
from impasto.worker.heartbeat import Heartbeat
from impasto.worker.loop import WorkerLoop
from impasto.worker.previews import MAX_BYTES, MAX_SIDE, preview_every, thumbnail
from impasto.worker.running import PREVIEW_SECONDS, Running
from impasto.worker.stats import WorkerStats
from tests.random_sdxl import save_random_sdxl


def submit(store: JobStore, key_id: str, **fields) -> str:
    request = GenerationRequest(**({"prompt": "a red fox", "width": 512, "height": 512, "seed": 1} | fields))
    content = {"request": request.to_json(), "output": {"format": "png", "base64": False, "safety_checker": False}}
    return store.create(NewJob("m", content, key_id, seed=request.seed), max_queued=100).id


def opened(shown: Thumbnail) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(shown.image, validate=True)))


def worker(store, folder, backend, **options) -> WorkerLoop:
    return WorkerLoop(store, OutputStore(str(folder)), backend, name="w", lora_dir=folder / "loras", **options)


def test_a_real_model_shows_what_its_pictures_are_becoming(tmp_path):
    """Small JPEGs of each image with the heartbeat, from the model's latents; gone with the job's end."""
    database = open_database(f"sqlite:///{tmp_path}/jobs.db")
    upgrade(database)
    store, keys = JobStore(database), KeyStore(database)
    owner = keys.authenticate(keys.create("owner")).id
    job_id = submit(store, owner, num_images=2, num_inference_steps=3, width=128, height=64)
    engine = Engine.load(str(save_random_sdxl(tmp_path / "model")), device="cpu", dtype="float32")
    loop = worker(store, tmp_path, engine, previews=True)
    glances = JobGlances(store.engine)
    for _ in range(2):
        loop.turn()
    loop._beat()

    glance = glances.look([job_id])[job_id]
    assert glance.status is Status.PROCESSING
    assert glance.progress["step"] == 2
    assert glance.previews == (1, 1)
    shown = glances.previews([job_id])[job_id]
    assert [(one.index, one.step) for one in shown] == [(0, 2), (1, 2)]
    for one in shown:
        picture = opened(one)
        assert (picture.format, picture.size) == ("JPEG", (16, 8))
        assert np.asarray(picture).std() > 1, "a flat picture shows nothing"

    while loop.turn():
        pass
    assert store.get(job_id).status is Status.COMPLETED
    assert glances.previews([job_id]) == {}
    store.close()
    database.dispose()


def test_without_the_setting_nothing_is_shown(store, alice, tmp_path):
    """The backend is not even asked."""
    job_id = submit(store, alice, num_inference_steps=5)
    loop = worker(store, tmp_path, FakeBackend(0))
    loop.turn()
    loop._beat()
    assert JobGlances(store.engine).previews([job_id]) == {}
    assert JobGlances(store.engine).look([job_id])[job_id].previews[1] == 0


@pytest.mark.parametrize("ending", ["fail", "release", "cancel"])
def test_previews_go_whatever_ends_the_attempt(store, alice, ending):
    """A picture that will never be is not kept about."""
    job_id = submit(store, alice)
    [job] = store.claim("w", 1, 30)
    shown = encode_previews([Thumbnail(0, 1, "abc")])
    store.heartbeat("w", {job.lease: {"previews": 1}}, 30, {job.lease: shown})
    glances = JobGlances(store.engine)
    assert glances.previews([job_id]) == {job_id: (Thumbnail(0, 1, "abc"),)}
    if ending == "fail":
        store.fail(job.lease, "no", "Error")
    elif ending == "release":
        store.release(job.lease)
    else:
        store.cancel(job_id, alice)
        store.heartbeat("w", {job.lease: {}}, 30, {job.lease: shown})
    assert glances.previews([job_id]) == {}


def test_a_worker_that_lost_its_lease_shows_nothing(store, alice):
    """Its late preview would be of another attempt."""
    job_id = submit(store, alice)
    [job] = store.claim("w", 1, 30)
    store.release(job.lease)
    store.claim("x", 1, 30)
    assert store.heartbeat("w", {job.lease: {}}, 30, {job.lease: "[]"}) == Beat(lost=frozenset({job.lease}))
    assert JobGlances(store.engine).previews([job_id]) == {}


def test_a_glance_sees_state_steps_and_the_number_of_the_change(store, alice):
    """Many jobs in one statement; unknown ones are not there."""
    first, second = submit(store, alice), submit(store, alice)
    glances = JobGlances(store.engine)
    before = glances.look([first, second, "0" * 32])
    assert {one.status for one in before.values()} == {Status.CREATED} and set(before) == {first, second}
    store.cancel(second, alice)
    after = glances.look([first, second])
    assert after[first] == before[first]
    assert after[second].ended and after[second].seq > before[second].seq
    assert glances.look([]) == {}


@pytest.mark.parametrize("size", [(64, 64), (128, 96), (192, 64), (400, 300)])
def test_a_thumbnail_is_small_whatever_it_shows(size):
    """Noise is the worst that can be; the shape stays."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    shown = thumbnail(Preview("r", 3, 7, Image.fromarray(noise)))
    assert (shown.index, shown.step) == (3, 7)
    assert len(base64.b64decode(shown.image)) <= MAX_BYTES
    picture = opened(shown)
    assert max(picture.size) <= MAX_SIDE
    assert picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_short_jobs_show_every_step_and_long_ones_every_few():
    """About fifteen previews, however many steps."""
    assert [preview_every(steps) for steps in (1, 4, 15, 30, 50)] == [1, 1, 1, 2, 3]


def test_previews_are_written_at_most_twice_a_second(store, alice):
    """Each costs a write of some kilobytes; the last one is not lost, only late."""
    submit(store, alice)
    [job] = store.claim("w", 1, 30)
    running = Running(job, job.lease, time.monotonic())
    running.moved(Progress("r", 1, 30, 0.1, 3.14159))
    assert running.news() == ({"step": 1, "total": 30, "sigma": 3.1416}, None)
    for step in (1, 2):
        running.looked(Preview("r", 0, step, Image.new("RGB", (64, 64))))
        progress, written = running.news()
        assert progress["previews"] == 1
        assert (written is not None) == (step == 1)
    running._shown_at -= PREVIEW_SECONDS
    progress, written = running.news()
    assert progress["previews"] == 2
    assert [shown.step for shown in decode_previews(written or "")] == [2]
    assert running.news()[1] is None


class Beats:
    """A store that counts heartbeats and takes its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.times: list[float] = []
        self._seconds = seconds

    def heartbeat(self, *_args) -> Beat:
        self.times.append(time.monotonic())
        time.sleep(self._seconds)
        return Beat()

    def reap(self, _max_attempts) -> list[str]:
        return []


@pytest.mark.parametrize(
    ("answers_in", "news", "at_least", "at_most"),
    [(0.0, True, 5, 10), (0.0, False, 1, 3), (0.15, True, 1, 3)],
    ids=["news", "no news", "slow store"],
)
def test_news_travel_soon_and_do_not_drown_the_store(answers_in, news, at_least, at_most):
    """In two seconds: four beats a second with news, one without, and fewer on a store that is slow to answer."""
    store = Beats(answers_in)
    heart = Heartbeat(
        store, "w", list, WorkerStats(1), lease_seconds=30, max_attempts=3, on_stall=lambda: None
    )  # fmt: skip
    heart.start()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        if news:
            heart.tell()
        time.sleep(0.02)
    heart.stop()
    assert at_least <= len(store.times) <= at_most


def test_the_first_step_is_told_at_once():
    """Nobody waits a second to see that it began."""
    store, told = Beats(), threading.Event()
    heart = Heartbeat(store, "w", list, WorkerStats(1), lease_seconds=30, max_attempts=3, on_stall=told.set)
    heart.start()
    start = time.monotonic()
    heart.tell()
    while not store.times and time.monotonic() < start + 5:
        time.sleep(0.005)
    heart.stop()
    assert store.times[0] - start < 0.5
