"""A picture of the shipped model moves, over HTTP, in real processes."""

import io

import av
import httpx
import numpy as np
from PIL import Image

from tests.e2e.conftest import KEY, SDXL_LORA, ended, poll


def test_a_video_from_the_shipped_model_over_http(serve):
    """Draw a picture, hand its address in, get a WebM of it, and a picture that was asked for meanwhile."""
    served = serve()
    api = served.api(served.wait_for(KEY))
    still = {"prompt": "a frog on a blue background", "size": "512*512", "seed": 7, "num_inference_steps": 2}
    first = poll(api, api.post(SDXL_LORA, json=still).json()["data"]["id"], ended)
    video = {"prompt": still["prompt"], "image": first["outputs"][0], "size": "256*256", "num_inference_steps": 3}
    asked = api.post(f"{SDXL_LORA}/image-to-video", json=video | {"frames": 8, "fps": 5, "seed": 3}).json()["data"]
    beside = api.post(SDXL_LORA, json=still).json()["data"]

    made = poll(api, asked["id"], ended)
    assert made["status"] == "completed", made["error"]
    assert poll(api, beside["id"], ended)["status"] == "completed"
    [url] = made["outputs"]
    file = httpx.get(url, trust_env=False)
    assert file.headers["content-type"] == "video/webm"
    with av.open(io.BytesIO(file.content)) as container:
        assert container.streams.video[0].average_rate == 5
        told = {name.lower(): value for name, value in container.metadata.items()}["comment"]
        frames = [np.asarray(frame.to_image(), float) for frame in container.decode(video=0)]
    assert "Frames: 8, FPS: 5" in told and told.startswith("a frog on a blue background")
    assert len(frames) == 8 and frames[0].shape == (256, 256, 3)
    start = Image.open(io.BytesIO(httpx.get(first["outputs"][0], trust_env=False).content)).resize((256, 256))
    apart = [float(np.abs(frame - np.asarray(start.convert("RGB"), float)).mean()) for frame in frames]
    assert apart[0] == min(apart)
    assert max(apart) > 1.5 * apart[0]
