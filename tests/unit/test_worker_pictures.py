"""The worker and the pictures a job starts from: they reach the backend, and are deleted when nobody needs them."""

import json
import time

import pytest
from PIL import Image

from impasto.jobs.records import NewJob
from impasto.jobs.states import Status
from impasto.types import GenerationRequest
from tests.unit.test_worker import Failing, Rig, Watching, drain

PICTURES = {"image": Image.effect_noise((600, 512), 90).convert("RGBA"), "mask_image": Image.new("L", (600, 512), 77)}


@pytest.fixture
def rig(tmp_path):
    return Rig(tmp_path)


def test_start_pictures_reach_the_backend_and_go_with_the_end(rig):
    """Pixel for pixel, mode for mode; after the result is stored nobody needs them."""
    job_id = rig.submit(pictures=PICTURES, num_inference_steps=2, strength=0.3, seed=1)
    backend = Watching()
    loop = rig.loop(backend)
    loop.turn()
    assert len(rig.inputs()) == 2, "they stay while the job runs: another worker may have to start it again"
    drain(loop)

    [request] = backend.seen
    for name, picture in PICTURES.items():
        read = getattr(request, name)
        assert (read.mode, read.size, read.tobytes()) == (picture.mode, picture.size, picture.tobytes())
    assert request.strength == 0.3
    assert rig.store.get(job_id).status is Status.COMPLETED
    assert rig.inputs() == []


def test_start_pictures_of_a_failed_job_go_too(rig):
    """Failed is an end."""
    job_id = rig.submit(prompt="boom", pictures=PICTURES, seed=1)
    drain(rig.loop(Failing(0)))
    assert rig.store.get(job_id).status is Status.FAILED
    assert rig.files() == []


def test_start_pictures_stay_for_the_worker_that_has_the_job_now(rig):
    """One that has lost its lease deletes its own pictures and not those the job starts from."""
    job_id = rig.submit(pictures=PICTURES, num_inference_steps=2, seed=5)
    zombie = rig.loop(lease_seconds=0.01)
    zombie.turn()
    time.sleep(0.05)
    rig.store.reap(max_attempts=3)
    successor = rig.loop(name="w2")
    successor.turn()
    drain(zombie)
    assert len(rig.files()) == len(rig.inputs()) == 2

    drain(successor)
    assert rig.store.get(job_id).status is Status.COMPLETED
    assert rig.inputs() == []


def test_start_pictures_of_a_job_handed_back_stay(rig):
    """It will be started again."""
    job_id = rig.submit(pictures=PICTURES, num_inference_steps=50, seed=5)
    loop = rig.loop()
    loop.turn()
    loop._hand_back()
    assert rig.store.get(job_id).status is Status.CREATED
    assert len(rig.inputs()) == 2


def test_a_missing_start_picture_fails_its_job_alone(rig):
    """By the name of the field; the next job is done."""
    broken = rig.submit(pictures=PICTURES, num_inference_steps=1, seed=1)
    for path in rig.inputs():
        path.unlink()
    good = rig.submit(pictures=PICTURES, num_inference_steps=1, seed=1)
    drain(rig.loop())
    assert rig.store.get(broken).error == 'Error at "/image": is not stored any more; submit the request again'
    assert rig.store.get(good).status is Status.COMPLETED


def test_a_row_from_before_there_were_pictures_runs(rig):
    """An upgrade does not lose what waits in the queue."""
    request = GenerationRequest("a fox", width=512, height=512, num_inference_steps=1, seed=1).to_json()
    for name in ("strength", "refine", "high_noise_frac", "refine_steps"):
        del request[name]
    content = {"request": request, "output": {"format": "png", "base64": False, "safety_checker": True}}
    job_id = rig.store.create(NewJob("m", json.loads(json.dumps(content)), rig.key_id, seed=1), max_queued=9).id
    drain(rig.loop())
    assert rig.store.get(job_id).status is Status.COMPLETED
