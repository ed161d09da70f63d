"""Worker processes and devices: one process a GPU, unless the operator says otherwise."""

from pathlib import Path

import pytest

from impasto.worker.devices import count_gpus, worker_devices


@pytest.mark.parametrize(
    ("device", "workers", "gpus", "expected"),
    [
        ("auto", None, 0, ["auto"]),
        ("auto", None, 1, ["auto"]),
        ("auto", None, 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda,text=cpu", None, 2, ["cuda:0,text=cpu", "cuda:1,text=cpu"]),
        ("auto", 3, 2, ["cuda:0", "cuda:1", "cuda:0"]),
        ("auto", 1, 4, ["cuda:0"]),
        ("cuda:3", None, 8, ["cuda:3"]),
        ("cpu", 2, 8, ["cpu", "cpu"]),
        ("auto", 2, 0, ["auto", "auto"]),
        ("auto", 0, 8, []),
    ],
)
def test_each_worker_gets_a_device(device: str, workers: int | None, gpus: int, expected: list[str]):
    """Unset, there is one for each GPU; a named device is kept; 0 is none, for machines that only answer."""
    assert worker_devices(device, workers, gpus) == expected


def test_gpus_are_counted_as_cuda_would(tmp_path: Path):
    """The machine's, less those that the environment hides; a machine without the driver has none."""
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert count_gpus({}, tmp_path) == 2
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, tmp_path) == 2
    assert count_gpus({}, tmp_path / "none") == 0
