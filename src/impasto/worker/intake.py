"""From a claimed job's row to the request that an engine can run.

Knows rows, stored start pictures, and where LoRAs come from. Knows nothing of leases or engines.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from impasto.errors import MediaError, NotFound
from impasto.images import decode_png
from impasto.jobs.outputs import OutputStore
from impasto.jobs.records import Job
from impasto.safety.gate import SafetyGate
from impasto.types import GenerationRequest
from impasto.worker.loras import LoraLibrary
from impasto.worker.provenance import Provenance
from impasto.worker.running import Running
from impasto.worker.warming import Preload, Warming

if TYPE_CHECKING:
    from PIL.Image import Image


class Intake:
    """Rebuilds requests.

    Args:
        outputs: Where start pictures are.
        loras: Finds the LoRAs that requests name.
        safety: What prompts and start pictures must pass.
        provenance: What is noted of how pictures are made.
        preload: Makes the LoRA files of a request ready, as ``Warming`` asks for it.
    """

    def __init__(
        self,
        outputs: OutputStore,
        loras: LoraLibrary,
        safety: SafetyGate,
        provenance: Provenance,
        preload: Preload = lambda request, stop: None,
    ) -> None:
        self._outputs = outputs
        self._loras = loras
        self._safety = safety
        self._provenance = provenance
        self._warming = Warming(preload)

    def request(self, running: Running) -> GenerationRequest:
        """Rebuild the request, with its pictures, the resolved seed and each LoRA's name turned into a file.

        The files are made ready as well, as far as that goes; where there are any, that takes a while.

        Raises:
            ImpastoError: Something that the request names cannot be had or may not be used.
            Unavailable: Files cannot be read now.
        """
        job = running.job
        request = GenerationRequest.from_json(job.input["request"])
        image, mask = (self._picture(job, name) for name in ("image", "mask_image"))
        self._safety.admit(request.prompt, image, running.wants_check)
        running.loras = tuple(
            self._loras.find(lora.path, f"loras.{i}.path", job.key_id, running.ended.is_set)
            for i, lora in enumerate(request.loras)
        )
        whole = replace(request, seed=job.seed, image=image, mask_image=mask)
        running.recipe = self._provenance.recipe(whole, running.loras, running.wants_metadata)
        loras = tuple(
            replace(lora, path=str(found.file)) for found, lora in zip(running.loras, request.loras, strict=True)
        )
        whole = replace(whole, loras=loras)
        self._warming.warm(running, whole)
        return whole

    def _picture(self, job: Job, name: str) -> Image | None:
        """Read back a picture that the job starts from; the API has checked and re-encoded it."""
        key = job.input.get("pictures", {}).get(name)
        try:
            return None if key is None else decode_png(self._outputs.get_input(key))
        except NotFound:
            raise MediaError(name, "is not stored any more; submit the request again") from None
