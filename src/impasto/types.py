"""The words every room uses: requests, LoRA references, events, and the limits, each stated once.

Knows the standard library alone. Knows nothing of tensors, HTTP, SQL or files, so anything may import it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from impasto.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image

OutputFormat = Literal["png", "jpeg", "webp"]
OUTPUT_FORMATS: Final[tuple[OutputFormat, ...]] = ("png", "jpeg", "webp")
VideoFormat = Literal["webm", "webp"]  # VP9 in WebM, and animated WebP
VIDEO_FORMATS: Final[tuple[VideoFormat, ...]] = ("webm", "webp")

SCHEDULERS: Final = (  # samplers by their own names, the default first; what they do is in engine/samplers
    "euler", "euler_karras", "euler_a", "heun", "ddim", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras", "dpmpp_2s", "dpmpp_sde", "unipc", "lms", "lms_karras", "pndm", "lcm", "tcd",
)  # fmt: skip
SCHEDULER_ALIASES: Final = {  # spellings of other services and tools, compared without case
    "k_euler": "euler", "eulerdiscrete": "euler", "eulerdiscretescheduler": "euler",
    "k_euler_ancestral": "euler_a", "euler_ancestral": "euler_a", "eulerancestraldiscretescheduler": "euler_a",
    "heundiscrete": "heun", "heundiscretescheduler": "heun",
    "ddimscheduler": "ddim",
    "dpmsolvermultistep": "dpmpp_2m", "dpmsolvermultistepscheduler": "dpmpp_2m", "dpm++ 2m": "dpmpp_2m",
    "dpm++ 2m karras": "dpmpp_2m_karras", "karrasdpm": "dpmpp_2m_karras",
    "dpm++ 2m sde": "dpmpp_2m_sde", "dpm++ 2m sde karras": "dpmpp_2m_sde_karras",
    "dpmsolversinglestep": "dpmpp_2s", "dpmsolversinglestepscheduler": "dpmpp_2s", "dpm++ sde": "dpmpp_sde",
    "unipcmultistep": "unipc", "unipcmultistepscheduler": "unipc",
    "k_lms": "lms", "lmsdiscretescheduler": "lms",
    "pndmscheduler": "pndm", "plms": "pndm",
    "lcmscheduler": "lcm", "tcdscheduler": "tcd",
}  # fmt: skip


Refine = Literal["no_refiner", "expert_ensemble_refiner", "base_image_refiner"]
REFINE_MODES: Final[tuple[Refine, ...]] = ("no_refiner", "expert_ensemble_refiner", "base_image_refiner")
PromptSyntax = Literal["plain", "weighted"]
PROMPT_SYNTAXES: Final[tuple[PromptSyntax, ...]] = ("plain", "weighted")
Acceleration = Literal["exact", "balanced", "fast"]  # what the approximate ones leave out is in engine/pace.py
ACCELERATIONS: Final[tuple[Acceleration, ...]] = ("exact", "balanced", "fast")
Motion = Literal["auto", "none", "move", "bounce", "spin", "pulse"]
MOTIONS: Final[tuple[Motion, ...]] = get_args(Motion)


@dataclass(frozen=True, slots=True)
class Bounds:
    """An inclusive range with the default used when a field is absent."""

    low: float
    high: float
    default: float

    def check(self, field_path: str, value: float) -> None:
        """Raise ``InvalidInput`` naming ``field_path`` unless ``low <= value <= high`` (NaN fails too)."""
        if not self.low <= value <= self.high:
            low, high = (int(end) if end == int(end) else end for end in (self.low, self.high))
            raise InvalidInput(field_path, f"must be between {low} and {high}, got {str(value)[:40]}")


@dataclass(frozen=True, slots=True)
class Limits:
    """Ranges of a generation request; validation, OpenAPI, the CLI and the docs are all made from these."""

    side: Bounds = Bounds(512, 1536, 1024)  # pixels, as the compatible routes take it
    engine_side: Bounds = Bounds(64, 4096, 1024)  # pixels, as the engine takes it
    video_side: Bounds = Bounds(256, 1024, 512)  # pixels: all frames are drawn at once
    side_multiple: int = 8  # pixels per latent cell
    num_inference_steps: Bounds = Bounds(1, 50, 30)
    guidance_scale: Bounds = Bounds(0, 10, 5)  # as most compatible routes take it
    engine_guidance_scale: Bounds = Bounds(0, 20, 5)  # as the engine takes it
    num_images: Bounds = Bounds(1, 4, 1)
    seed: Bounds = Bounds(-1, 9_999_999_999, -1)  # -1 draws one
    guidance_rescale: Bounds = Bounds(0, 1, 0)
    strength: Bounds = Bounds(0.01, 1, 0.8)
    high_noise_frac: Bounds = Bounds(0, 1, 0.8)
    aesthetic_score: Bounds = Bounds(0, 10, 6)
    negative_aesthetic_score: Bounds = Bounds(0, 10, 2.5)
    guidance_start: Bounds = Bounds(0, 1, 0)
    guidance_end: Bounds = Bounds(0, 1, 1)
    reuse_features: Bounds = Bounds(1, 10, 1)
    frames: Bounds = Bounds(8, 32, 16)
    fps: Bounds = Bounds(1, 30, 8)  # frames a second
    video_strength: Bounds = Bounds(0.01, 1, 0.5)
    max_embeddings: int = 20
    lora_scale: Bounds = Bounds(0, 4, 1)
    max_loras: int = 5
    max_prompt_chars: int = 20_000


LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class LoraRef:
    """A LoRA as the user named it, and how strongly to apply it; ``text_scale`` is for the text encoders, if other."""

    path: str
    scale: float = 1.0
    text_scale: float | None = None

    def __post_init__(self) -> None:
        for scale in (self.scale, self.text_scale):
            if scale is not None and not math.isfinite(scale):
                raise InvalidInput("loras", f"have the scale {scale} for {self.path[:100]!r}; give a finite number")


@dataclass(frozen=True, slots=True)
class EmbeddingRef:
    """A textual-inversion embedding: the word that stands for it in prompts, and its file as the user named it."""

    token: str
    path: str

    def __post_init__(self) -> None:
        if not self.token.strip() or any(c.isspace() for c in self.token) or len(self.token) > 100:
            raise InvalidInput("embeddings", f"have the token {self.token[:40]!r}; give one word without spaces")


@dataclass(frozen=True, slots=True)
class Animation:
    """How long a video is that a picture is made to move for, and how it moves from the outset.

    Attributes:
        motion: One of ``MOTIONS``. ``auto`` is ``bounce`` with the built-in motion adapter, which moves little by
            itself, and ``none`` with others.

    Raises:
        InvalidInput: A value is out of range; ``field`` says which.
    """

    frames: int = int(LIMITS.frames.default)
    fps: int = int(LIMITS.fps.default)  # frames a second
    motion: Motion = "auto"

    def __post_init__(self) -> None:
        for name in ("frames", "fps"):
            if type(getattr(self, name)) is not int:
                raise InvalidInput(name, f"must be a whole number, got {str(getattr(self, name))[:40]}")
            bounds: Bounds = getattr(LIMITS, name)
            bounds.check(name, getattr(self, name))
        if self.motion not in MOTIONS:
            raise InvalidInput("motion", f"must be one of {', '.join(MOTIONS)}, got {str(self.motion)[:40]!r}")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request for one or more pictures; the values are checked on construction.

    The mode is in the data: with ``image`` it is image-to-image, with ``mask_image`` besides it is inpainting, and
    ``refine`` adds the refiner. ``negative_prompt=None`` is not the same as ``""``: absent means zeros where the
    model says so (SDXL does). Image ``i`` uses ``seed_of_image(seed, i)``, so each picture can be made again on its
    own.

    Attributes:
        image: Start picture; scaled and cropped to ``width`` x ``height``. Transparent parts without a mask are
            painted.
        mask_image: White is painted, black is kept bit for bit, grey is between; needs ``image``.
        strength: How far from the start picture; at least one step always runs.
        refine: Whether the refiner takes the steps below ``high_noise_frac`` (ensemble of experts), or goes once
            more over the finished latents, or nothing.
        high_noise_frac: Share of the noise schedule that is the base model's in an ensemble of experts.
        refine_steps: Steps of the second pass's schedule; ``None``: as many as the base's.
        acceleration: How much may be left out for speed; anything but ``exact`` is approximate. What it stands for is
            in ``engine.pace``; of the three that follow, one that is given wins over it, and ``None`` leaves it.
        guidance_start: Share of the steps before guidance sets in; guidance ends after the share ``guidance_end``.
        reuse_features: Steps that share the UNet's deep features; 1 is exact, more is faster and approximate.
        prompt_syntax: ``weighted`` reads ``(word:1.2)`` and ``BREAK``; ``plain`` takes them for text.
        embeddings: Textual-inversion files whose words the prompts may use.
        animation: Make one video that begins with ``image``, not pictures (experimental).

    Raises:
        InvalidInput: A value is out of range; ``field`` says which.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int = int(LIMITS.side.default)  # pixels
    height: int = int(LIMITS.side.default)  # pixels
    num_inference_steps: int = int(LIMITS.num_inference_steps.default)
    guidance_scale: float = LIMITS.guidance_scale.default
    num_images: int = int(LIMITS.num_images.default)
    seed: int = int(LIMITS.seed.default)
    loras: tuple[LoraRef, ...] = ()
    scheduler: str = SCHEDULERS[0]
    guidance_rescale: float = LIMITS.guidance_rescale.default
    image: Image | None = field(default=None, repr=False)
    mask_image: Image | None = field(default=None, repr=False)
    strength: float = LIMITS.strength.default
    refine: Refine = REFINE_MODES[0]
    high_noise_frac: float = LIMITS.high_noise_frac.default
    refine_steps: int | None = None
    aesthetic_score: float = LIMITS.aesthetic_score.default
    negative_aesthetic_score: float = LIMITS.negative_aesthetic_score.default
    acceleration: Acceleration = ACCELERATIONS[0]
    guidance_start: float | None = None
    guidance_end: float | None = None
    reuse_features: int | None = None
    prompt_syntax: PromptSyntax = PROMPT_SYNTAXES[0]
    embeddings: tuple[EmbeddingRef, ...] = ()
    animation: Animation | None = None

    def __post_init__(self) -> None:
        self._check_prompts()
        for name in _WHOLE:
            if type(getattr(self, name)) is not int and not self._left(name):  # True is an int too
                raise InvalidInput(name, f"must be a whole number, got {str(getattr(self, name))[:40]}")
        for side in ("width", "height"):
            check_side(side, getattr(self, side), LIMITS.engine_side)
        LIMITS.engine_guidance_scale.check("guidance_scale", self.guidance_scale)
        for name in _BOUNDED:
            bounds: Bounds = getattr(LIMITS, name)
            if not self._left(name):
                bounds.check(name, getattr(self, name))
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InvalidInput(name, f"must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.refine_steps is not None:
            LIMITS.num_inference_steps.check("refine_steps", self.refine_steps)
        if self.mask_image is not None and self.image is None:
            raise InvalidInput("mask_image", "needs an image to paint into; give image as well")
        self._check_animation()
        for name, most in (("loras", LIMITS.max_loras), ("embeddings", LIMITS.max_embeddings)):
            if len(getattr(self, name)) > most:
                raise InvalidInput(name, f"takes at most {most} items, got {len(getattr(self, name))}")

    def _left(self, name: str) -> bool:
        """Whether a field that may be is left to the acceleration."""
        return name in _PACED and getattr(self, name) is None

    def _check_prompts(self) -> None:
        check_prompt("prompt", self.prompt)
        if not self.prompt.strip():
            raise InvalidInput("prompt", "must not be empty; describe the picture you want")
        if self.negative_prompt is not None:
            check_prompt("negative_prompt", self.negative_prompt)

    def _check_animation(self) -> None:
        """Refuse what a video cannot have."""
        for name in ("mask_image", "num_images", "refine", "acceleration") if self.animation else ():
            if getattr(self, name) != _DEFAULTS[name]:
                raise InvalidInput(name, "is not for videos; leave it out")
        if self.animation and self.reuse_features not in (None, 1):
            raise InvalidInput("reuse_features", "is not for videos; leave it out")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without the pictures, which travel as files; ``from_json`` is the inverse."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _PICTURES}
        values["animation"] = self.animation and asdict(self.animation)
        return values | {name: [asdict(item) for item in values[name]] for name in ("loras", "embeddings")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GenerationRequest:
        """Rebuild a request from ``to_json``'s form; unknown keys are ignored."""
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        known["loras"] = tuple(LoraRef(**lora) for lora in data.get("loras", ()))
        known["embeddings"] = tuple(EmbeddingRef(**embedding) for embedding in data.get("embeddings", ()))
        known["animation"] = Animation(**data["animation"]) if data.get("animation") else None
        return cls(**known)


_PICTURES: Final = ("image", "mask_image")
_DEFAULTS: Final[Mapping[str, Any]] = {f.name: f.default for f in fields(GenerationRequest)}
_PACED: Final = ("guidance_start", "guidance_end", "reuse_features")
_CHOICES: Final = {
    "scheduler": SCHEDULERS,
    "refine": REFINE_MODES,
    "prompt_syntax": PROMPT_SYNTAXES,
    "acceleration": ACCELERATIONS,
}
_WHOLE: Final = ("width", "height", "num_inference_steps", "num_images", "seed", "reuse_features")
_BOUNDED: Final = (
    "num_inference_steps", "num_images", "seed", "guidance_rescale", "strength", "high_noise_frac",
    "aesthetic_score", "negative_aesthetic_score", "guidance_start", "guidance_end", "reuse_features",
)  # fmt: skip


def scheduler_name(text: str, field_path: str = "scheduler") -> str:
    """Return our name of a sampler from any known spelling, upper or lower case.

    Raises:
        InvalidInput: No such sampler; the message lists them.
    """
    name = text.strip().lower()
    name = SCHEDULER_ALIASES.get(name, name)
    if name not in SCHEDULERS:
        raise InvalidInput(field_path, f"must be one of {', '.join(SCHEDULERS)}, got {text[:40]!r}")
    return name


def seed_of_image(seed: int, index: int) -> int:
    """Return ``seed + index``, starting again from 0 past the largest seed, so that it is a seed one can ask for."""
    return (seed + index) % (int(LIMITS.seed.high) + 1)


def check_prompt(field_path: str, text: str) -> None:
    """Refuse a prompt too long to be meant; ordinary long prompts are cut by the text encoders' window."""
    if len(text) > LIMITS.max_prompt_chars:
        raise InvalidInput(field_path, f"has {len(text)} characters; at most {LIMITS.max_prompt_chars} are taken")


def check_side(field_path: str, pixels: int, bounds: Bounds = LIMITS.side) -> None:
    """Refuse a side outside the bounds or not on the latent grid."""
    bounds.check(field_path, pixels)
    if pixels % LIMITS.side_multiple:
        raise InvalidInput(field_path, f"must be a multiple of {LIMITS.side_multiple}, got {pixels}")


_SIZE = re.compile(r"\s*(\d{1,6})\s*[*xX×]\s*(\d{1,6})\s*")


def parse_size(text: str, field_path: str = "size", bounds: Bounds = LIMITS.side) -> tuple[int, int]:
    """Read ``"W*H"`` (or ``"WxH"``) into ``(width, height)`` in pixels, each inside ``bounds``.

    Raises:
        InvalidInput: Not two whole numbers, or a side out of range or off the grid.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidInput(field_path, f'must look like "1024*1024" (width*height in pixels), got {text[:40]!r}')
    width, height = int(match[1]), int(match[2])
    check_side(field_path, width, bounds)
    check_side(field_path, height, bounds)
    return width, height


@dataclass(frozen=True, slots=True)
class Progress:
    """One more denoising step of a request is done."""

    request_id: str
    step: int  # steps done, averaged over the images of the request and rounded down
    total: int  # steps that run: fewer than asked for with a start picture, more with a second pass
    seconds: float  # wall time of this step's network call
    sigma: float | None = None  # noise level that is left, of the image that has the most
    batch: int = 1  # images, of all requests, that moved in this step


@dataclass(frozen=True, slots=True)
class Preview:
    """A small, rough picture of what an image is becoming."""

    request_id: str
    index: int  # position among the request's images, 0-based
    step: int  # steps done by this image
    image: Image = field(repr=False)  # an eighth of the final size


@dataclass(frozen=True, slots=True)
class ImageReady:
    """One picture of a request is finished."""

    request_id: str
    index: int  # position among the request's images, 0-based
    seed: int  # generating this one image with this seed makes it again
    image: Image = field(repr=False)


@dataclass(frozen=True, slots=True)
class VideoReady:
    """The video of a request is finished."""

    request_id: str
    seed: int  # with it the same video is made again
    fps: int  # frames a second
    frames: tuple[Image, ...] = field(repr=False)
    index: int = 0  # as a picture's: a request makes one video


@dataclass(frozen=True, slots=True)
class Finished:
    """Every picture of the request, or its video, was delivered."""

    request_id: str
    seconds: float  # wall time from the first denoising step to the last picture
    reports: tuple[Any, ...] = ()  # a ``lora.report.LoraReport`` for each LoRA, which this file may not import
    stages: Mapping[str, float] = field(default_factory=dict)  # seconds by stage: encode, denoise, decode


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without pictures; other requests of the same batch go on."""

    request_id: str
    error: Exception


Event = Progress | Preview | ImageReady | VideoReady | Finished | Failed
