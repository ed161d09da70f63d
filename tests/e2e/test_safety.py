"""The service as an operator starts it: the checker is on, offline, and a service without its checker does not run."""

import subprocess

import httpx

from tests.e2e.conftest import IMPASTO, KEY, SDXL_LORA, ended, poll


def drawn(serve, **environment):
    """Start the service, have it draw one picture, and return the prediction and the picture's bytes."""
    service = serve("--model", "fake", **environment)
    api = service.api(service.wait_for(KEY))
    made = api.post(SDXL_LORA, json={"prompt": "a fox", "size": "512*512", "num_inference_steps": 1, "seed": 1})
    done = poll(api, made.json()["data"]["id"], ended)
    assert done["status"] == "completed", done
    return done, httpx.get(done["outputs"][0], trust_env=False).content


def test_pictures_are_checked_by_default(serve, tmp_path):
    """The threshold alone is changed: at 0 all are flagged, so somebody looks at them."""
    done, _ = drawn(serve, IMPASTO_SAFETY_THRESHOLD="0")
    assert done["has_nsfw_contents"] == [True]
    done, _ = drawn(lambda *options, **env: serve(*options, data_dir=tmp_path / "other", **env))
    assert done["has_nsfw_contents"] == [False]


def test_a_service_without_its_checker_ends_and_says_why(tmp_path):
    """It does not go on and serve pictures that nobody checks."""
    command = [IMPASTO, "serve", "--port", "0", "--model", "fake", "--data-dir", str(tmp_path)]
    environment = {"IMPASTO_SAFETY_CHECKER": "hf:/nowhere/at/all", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode != 0
    assert "safety_checker: '/nowhere/at/all'" in done.stderr
