"""The whole recipe in order: ``python -m training.all``.

Each step keeps what it finished, so an interrupted run goes on where it stopped. Knows the order only.
"""

from __future__ import annotations

from training import evaluate, fetch, reading, unet, vae
from training.export import export
from training.team import together


def main(processes: int = 2) -> None:
    """Fetch, train the networks, export, evaluate."""
    fetch.fetch()
    vae.train(vae.STEPS, seconds=float("inf"))
    if not reading.STATE.exists():
        reading.train()
    together(processes, unet.train, unet.CURRICULUM, unet.STATE, float("inf"))
    size = export(unet.painter(), vae.trained())
    print(f"exported: {size / 1e6:.1f} MB")
    evaluate.main()


if __name__ == "__main__":
    main()
