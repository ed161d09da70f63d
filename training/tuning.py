"""Training what is added to the built-in model, which itself stays as it is: factors, or layers between frames.

Knows the frozen pipeline, the optimiser, what is kept on disk, and when a run ends. Does not know what learns, what it
sees in a step, or how wrong it is.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from training import checkpoint
from training.arithmetic import CPU, short
from training.places import BUILTIN
from training.team import asked_to_stop
from training.unet import importance, signal_shares

SIDE = 512  # pixels
KEEP_EVERY = 120  # seconds
Source = TypeVar("Source")
Batch = TypeVar("Batch")


class Course(Protocol):
    """How long, how fast, and where the noise is."""

    @property
    def steps(self) -> int: ...

    @property
    def rate(self) -> float: ...

    @property
    def emphasis(self) -> float: ...


class Frozen:
    """The shipped model; what reads captions and makes latents does not learn."""

    def __init__(self, folder: Path = BUILTIN) -> None:
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
        for part in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            part.requires_grad_(False)

    @torch.no_grad()
    def read(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Text states and pooled vectors, as a prompt's are when drawing."""
        states, _, pooled, _ = self.pipeline.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
        return states, pooled

    def told(self, captions: list[str], kept: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Text states and added conditioning of pictures of 512 px; zeros for the text where ``kept`` is 0."""
        states, pooled = self.read(captions)
        states, pooled = states * kept[:, None, None], pooled * kept[:, None]
        sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32).expand(len(pooled), -1)
        return states, {"text_embeds": pooled, "time_ids": sizes}

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """What the autoencoder makes of pictures (n, 3, side, side) in -1..1."""
        encoded: Tensor = self.pipeline.vae.encode(pictures).latent_dist.mean
        return encoded


class Tuning(ABC, Generic[Source, Batch]):
    """A run: what learns, its average, the optimiser and the step count; it goes on from ``state`` if that is there."""

    def __init__(self, course: Course, state: Path, learning: nn.Module) -> None:
        self.state, self.learning = state, learning
        self._steps, self._rate = course.steps, course.rate
        self.average = checkpoint.Average(learning, 0.98)
        self.optimiser = torch.optim.AdamW(learning.parameters(), course.rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.shares = signal_shares()
        self.weights = importance(self.shares, course.emphasis)
        self.step = 0
        done = checkpoint.load(state)
        if done:
            learning.load_state_dict(done["live"])
            self.average.module.load_state_dict(done["average"])
            self.optimiser.load_state_dict(done["optimiser"])
            self.step = done["step"]

    @abstractmethod
    def batch(self, source: Source) -> Batch:
        """What the network sees in this step."""

    @abstractmethod
    def loss(self, given: Batch) -> Tensor:
        """How wrong it is about it."""

    def keep(self) -> None:
        """Write everything needed to go on."""
        weights: dict[str, Any] = {"live": self.learning.state_dict(), "average": self.average.module.state_dict()}
        checkpoint.save(self.state, weights | {"optimiser": self.optimiser.state_dict(), "step": self.step})

    def advance(self, source: Source) -> float:
        """One step; returns its loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate * min(1.0, (self.step + 1) / 30) * max(0.0, 1 - self.step / self._steps)
        self.optimiser.zero_grad()
        given = self.batch(source)
        with short(CPU):
            loss = self.loss(given)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.learning.parameters(), 1.0)
        self.optimiser.step()
        self.average.update(self.learning, self.step)
        self.step += 1
        return loss.item()

    def go_on(self, source: Source, name: str, seconds: float, told_every: int) -> list[float]:
        """Train to the end of the course or until the time is spent; every two minutes the state is saved."""
        losses: list[float] = []
        began = saved = time.monotonic()
        while self.step < self._steps and not asked_to_stop() and time.monotonic() - began < seconds:
            losses.append(self.advance(source))
            if self.step % told_every == 0:
                recent, spent = np.mean(losses[-told_every:]), time.monotonic() - began
                print(f"{name} {self.step}/{self._steps} loss {recent:.4f} {spent:.0f} s", flush=True)
            if time.monotonic() - saved > KEEP_EVERY:
                self.keep()
                saved = time.monotonic()
        self.keep()
        return losses
