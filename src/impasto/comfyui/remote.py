"""The node *SDXL LoRA (Impasto server)*: a request to a server of ours, followed to its pictures.

Knows ComfyUI's progress bar, previews and interrupt, and our API's fields. Draws nothing itself and needs no GPU.
"""

from __future__ import annotations

import io as streams
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import comfy.model_management  # type: ignore[import-not-found]
import comfy.utils  # type: ignore[import-not-found]
import folder_paths  # type: ignore[import-not-found]
from comfy_api.latest import io  # type: ignore[import-not-found]
from PIL import Image
from server import PromptServer  # type: ignore[import-not-found]

from impasto.client import Client
from impasto.comfyui.checks import fields_problem
from impasto.comfyui.request import read_request
from impasto.comfyui.schema import CATEGORY, acceleration_input, shared_inputs, shared_outputs
from impasto.comfyui.sending import Sender, body_of, remote_report
from impasto.comfyui.settings import find_connection, read_user_settings
from impasto.comfyui.stack import read_stack
from impasto.comfyui.tensors import image_batch
from impasto.errors import Unauthorized
from impasto.images import decode_png
from impasto.prediction import Glimpse, Prediction, Step
from impasto.types import LoraRef

MODEL: Final = "wavespeed-ai/sdxl-lora"
TICK: Final = 0.5  # seconds between looks at ComfyUI's stop button
PREVIEW_SIDE: Final = 512  # pixels

check_interrupt = comfy.model_management.throw_exception_if_processing_interrupted


class ServerSdxlLora(io.ComfyNode):  # type: ignore[misc]  # ComfyUI has no types
    """Pictures by a server, which ComfyUI's settings or the environment name."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's fields."""
        send = io.Boolean.Input(
            "send_local_loras",
            default=True,
            optional=True,
            tooltip="Send LoRAs of ComfyUI's own folder to the server; off: it uses its own of that name.",
        )
        return io.Schema(
            node_id="ImpastoServerSdxlLora",
            display_name="SDXL LoRA (Impasto server)",
            category=CATEGORY,
            description="SDXL with LoRAs on an Impasto server: from text, from a picture, or within a mask.",
            hidden=[io.Hidden.unique_id],
            inputs=[*shared_inputs(), send, acceleration_input()],
            outputs=shared_outputs(),
        )

    @classmethod
    def validate_inputs(cls, width: Any = None, height: Any = None, scheduler: Any = None, refine: Any = None) -> Any:
        """Refuse what ComfyUI's validation lets through, before anything runs."""
        return fields_problem(width, height, scheduler, refine) or True

    @classmethod
    def execute(cls, lora_stack: Any = None, send_local_loras: bool = True, **values: Any) -> Any:
        """Submit, follow, fetch.

        Raises:
            ImpastoError: Whatever is wrong, in the server's words or ours. An interrupt cancels the job there.
        """
        stack = read_stack(lora_stack)
        connection = find_connection(read_user_settings(Path(folder_paths.get_user_directory())))
        with Client(connection.url, connection.key, pause=_wait) as client:
            try:
                owner = f"{connection.url} {hash(connection.key)}"
                sender = Sender(client, owner, _local_lora if send_local_loras else _nowhere)
                paths = [sender.path_of(item.name) for item in stack]
                loras = [LoraRef(path, item.strength_model) for path, item in zip(paths, stack, strict=True)]
                request = read_request(values, loras)
                done = _run(client, body_of(request, values["enable_safety_checker"]), str(cls.hidden.unique_id))
            except Unauthorized as error:
                raise Unauthorized(f"{error} (the key is from {connection.key_source})") from None
            pictures = [decode_png(client.download(output)) for output in done.outputs]
        return io.NodeOutput(
            image_batch(pictures), [bool(flag) for flag in done.flagged], done.seed, remote_report(done.loras, stack)
        )


def _run(client: Client, body: Mapping[str, Any], node_id: str) -> Prediction:
    """Submit and follow to the end; whatever interrupts it cancels the job."""
    bar = comfy.utils.ProgressBar(body["num_inference_steps"])
    done = client.submit(MODEL, body)
    with client.cancelling(done.id):
        for update in client.follow(done.id, TICK):
            check_interrupt()
            match update:
                case Step():
                    bar.update_absolute(update.step, update.total)
                case Glimpse(index=0):
                    bar.update_absolute(bar.current, bar.total, ("JPEG", _picture(update.image), PREVIEW_SIDE))
                case Prediction():
                    done = update
                    _tell(node_id, done)
    return done.check()


def _tell(node_id: str, prediction: Prediction) -> None:
    """Show in the node how a job stands."""
    place = f", place {prediction.queue_position} in the queue" if prediction.queue_position else ""
    page = PromptServer.instance
    page.send_progress_text(f"{prediction.status}{place}", node_id, page.client_id)


def _picture(data: bytes) -> Image.Image:
    return Image.open(streams.BytesIO(data)).convert("RGB")


def _wait(seconds: float) -> None:
    """Wait, and give up when the stop button is pressed."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check_interrupt()
        time.sleep(min(TICK, left))


def _local_lora(name: str) -> Path | None:
    file = folder_paths.get_full_path("loras", name)
    return Path(file) if file else None


def _nowhere(_: str) -> Path | None:
    return None
