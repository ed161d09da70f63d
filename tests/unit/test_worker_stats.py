"""What is counted, and by whom: steps and batches once, stages, LoRA switches and how often a set was ready."""

import json

import torch
from safetensors.torch import save_file

from impasto.engine.engine import Engine
from impasto.types import Finished, GenerationRequest, LoraRef, Progress
from impasto.worker.stats import OUTCOMES, STAGES, WorkerStats
from tests.random_sdxl import save_random_sdxl


def samples(stats: WorkerStats) -> dict[tuple, float]:
    """A snapshot's values by name and labels, read back from JSON as the API reads it."""
    families = json.loads(json.dumps(stats.snapshot()))
    return {
        (name, *labels.values()): value for family in families for name, labels, value in family["samples"]
    }  # fmt: skip


def test_every_series_is_there_from_the_start():
    """Prometheus sees a first failure as growth from 0, not as a series that was always at 1."""
    found = samples(WorkerStats(slots=3))
    assert all(found["impasto_jobs_total", outcome] == 0 for outcome in OUTCOMES)
    assert all(found["impasto_stage_seconds_count", stage] == 0 for stage in STAGES)
    assert found["impasto_worker_slots",] == 3
    assert found["impasto_memory_bytes", "process"] > 0
    assert not any(name.endswith("_created") for name, *_ in found)


def test_counts_add_up():
    """Each method counts one thing."""
    stats = WorkerStats(slots=1)
    stats.stepped(Progress("r", 1, 2, 0.3, 1.0, batch=4))
    stats.stored(0.2)
    stats.ended("completed")
    stats.reaped(2)
    stats.finished(Finished("r", 1.0, stages={"encode": 0.1, "decode": 0.4, "unheard_of": 9.0}))
    stats.note(2, 1, {"lora_switches": 5, "lora_switch_seconds": 0.5, "lora_cache_hits": 4, "device_bytes": 7})
    found = samples(stats)
    assert (found["impasto_step_seconds_sum",], found["impasto_batch_images_sum",]) == (0.3, 4)
    assert (found["impasto_images_total",], found["impasto_stage_seconds_sum", "store"]) == (1, 0.2)
    assert (found["impasto_jobs_total", "completed"], found["impasto_reaped_total",]) == (1, 2)
    assert found["impasto_stage_seconds_sum", "decode"] == 0.4
    assert ("impasto_stage_seconds_sum", "unheard_of") not in found
    assert (found["impasto_worker_jobs", "running"], found["impasto_worker_jobs", "fetching"]) == (2, 1)
    assert (found["impasto_lora_switches_total",], found["impasto_lora_cache_total", "hits"]) == (5, 4)
    assert found["impasto_memory_bytes", "device"] == 7


def test_the_engine_tells_of_noise_batches_stages_and_switches(tmp_path):
    """Noise falls to 0 while two images move together; a set put on again was ready in memory."""
    engine = Engine.load(str(save_random_sdxl(tmp_path / "model")), device="cpu", dtype="float32")
    base = engine._model.base.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {
        f"{name}.lora_A.weight": torch.ones(2, base.in_features),
        f"{name}.lora_B.weight": torch.ones(base.out_features, 2),
    }
    save_file(weights, tmp_path / "l.safetensors")
    lora = (LoraRef(str(tmp_path / "l.safetensors"), 0.5),)

    def run(loras):
        asked = GenerationRequest(
            "a fox", width=64, height=64, num_images=2, num_inference_steps=3, seed=1, loras=loras
        )
        return list(engine.generate(asked))

    assert engine.usage()["lora_switches"] == 0
    events = run(lora)
    run(())
    run(lora)

    steps = [event for event in events if isinstance(event, Progress)]
    assert [step.sigma for step in steps] == sorted((step.sigma for step in steps), reverse=True)
    assert steps[-1].sigma == 0
    assert steps[-1].batch == 2
    [finished] = [event for event in events if isinstance(event, Finished)]
    assert set(finished.stages) == {"encode", "denoise", "decode"}
    assert all(seconds > 0 for seconds in finished.stages.values())
    usage = engine.usage()
    assert usage["lora_switches"] == 3, "on, off, on"
    assert usage["lora_switch_seconds"] > 0
    assert (usage["lora_cache_hits"], usage["lora_cache_misses"]) == (1, 1)
    assert usage["lora_bytes"] > 0
