"""The courses: which sizes, how long, how wide, for two CPU cores and for one GPU.

Knows plans. Does not know how a step is made. A course is measured in samples, or, where time is short and the speed
not known beforehand, in minutes: then each stage has its share of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.second.subjects import subjects

ALL = len(subjects())


@dataclass(frozen=True)
class Size:
    """Height and width in latents, and how often it comes."""

    height: int
    width: int
    often: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One part of a course.

    ``noisy``, ``coarse`` and ``emphasis`` are those of ``training.batches`` and ``training.unet``; ``renewed`` is how
    many scenes are drawn anew for each sample; ``plain``, ``pairs`` and ``core`` are those of
    ``scene.draw``. ``told`` is the
    share of samples whose text is set down (``cells``) and not read: at 1 no text encoder takes part.
    """

    name: str
    sizes: tuple[Size, ...]
    samples: int
    batch: int
    rates: tuple[float, float]
    capacity: int
    noisy: float = 0.0
    emphasis: float = 1.0
    coarse: float = 0.0
    renewed: float = 0.0625
    plain: float = 0.7
    pairs: float = 0.2
    top: int = 1000  # noise levels from here on up do not come
    told: float = 0.0
    core: float = 0.0
    outer: bool = False  # only the levels around the inner ones learn

    @property
    def steps(self) -> int:
        """How many steps the samples make."""
        return -(-self.samples // self.batch)


@dataclass(frozen=True)
class Course:
    """A whole training: the network's widths, the cast, the stages.

    With ``minutes`` the stages divide that time as their samples say; without, samples are counted. ``decay`` is that
    of the averaged weights.
    """

    name: str
    widths: tuple[int, ...]
    cast: int
    stages: tuple[Stage, ...]
    decay: float = 0.995
    reader_pace: float = 0.2
    minutes: float = 0.0
    seed: int = 7
    muon: float = 0.0  # Muon's pace beside AdamW's; none: AdamW alone
    warm_start: bool = False  # begins as the first edition's UNet, whose widths it has
    within: int = 1  # pictures are those that the inner levels of a UNet of so many times the size see
    grown_from: str = ""  # the course whose UNet is its inner levels
    base: str = ""  # the course whose text encoders it reads with, where it has none of its own

    def where(self, step: int, spent: float) -> tuple[int, float]:
        """The stage (its index) and how far into it (0..1); the index is past the last one when the course is over.

        Args:
            step: Steps made so far.
            spent: Seconds spent on them, all runs together.
        """
        whole = sum(stage.samples for stage in self.stages)
        done = spent / (60 * self.minutes) * whole if self.minutes else float(step)
        for index, stage in enumerate(self.stages):
            length = stage.samples if self.minutes else stage.steps
            if done < length:
                return index, done / length
            done -= length
        return len(self.stages), 0.0

    def lasting(self, minutes: float) -> Course:
        """The same course in that time."""
        return replace(self, minutes=minutes)


def square(side: int, often: float = 1.0) -> Size:
    """A square size."""
    return Size(side, side, often)


ASPECTS = (
    square(64, 3), Size(64, 96), Size(96, 64), Size(48, 80, 0.7), Size(80, 48, 0.7), square(96, 1), square(128, 0.6),
)  # fmt: skip

WITHIN = 4  # times the size of what the inner levels see: two levels are around them
INNER_ASPECTS = (
    square(16, 3), Size(16, 24, 0.6), Size(24, 16, 0.6), square(24, 1.5), Size(24, 32, 0.6), Size(32, 24, 0.6),
    square(32, 3), square(48, 0.3),
)  # fmt: skip

CPU_INNER = Course(
    name="cpu-inner",
    widths=(32, 64, 128),
    cast=ALL,
    stages=(
        Stage("told", (square(16),), 109_000, 64, (1.6e-3, 1e-3), 4_096, 0.3, 2.0, 0.6, pairs=0.12, told=1),
        Stage("16", (square(16),), 40_000, 64, (1e-3, 8e-4), 4_096, 0.3, 2.0, 0.6, pairs=0.12, told=0.3),
        Stage("sizes", INNER_ASPECTS, 100_000, 96, (1e-3, 5e-4), 4_096, 0.3, 2.0, 0.6, pairs=0.15, told=0.5),
    ),
    reader_pace=0.2,
    muon=2.5,
    warm_start=True,
    within=WITHIN,
)
"""Two shared cores, the levels of 16x16 latents and below: here a picture is composed, and a sample costs little."""

CPU = Course(
    name="cpu",
    widths=(32, 32, *CPU_INNER.widths),
    cast=ALL,
    stages=(
        Stage("outer", (square(64),), 2_400, 24, (1e-3, 1e-3), 1_024, 0.3, 1.8, 0.6, told=1, outer=True),
        Stage("64", (square(64),), 27_840, 24, (8e-4, 6.4e-4), 1_024, noisy=0.5, emphasis=1.8, coarse=0.6),
        Stage("core", (square(64),), 59_040, 24, (7e-4, 4e-4), 1_024, noisy=0.5, emphasis=1.8, coarse=0.6, core=0.85),
        Stage("mixed", ASPECTS, 12_000, 20, (4e-4, 1e-5), 768, 0.5, 1.6, 0.6, renewed=0.125, core=0.85),
    ),
    reader_pace=0.2,
    muon=2.5,
    grown_from="cpu-inner",
)
"""Two shared cores, for as many hours as there are; a stage's samples may be cut short by an edit in between."""

GPU_INNER = Course(
    name="gpu-inner",
    widths=CPU_INNER.widths,
    cast=ALL,
    stages=(
        Stage("16", (square(16),), 30, 1536, (2.0e-3, 1.4e-3), 65_536, 0.3, 2.0, 0.6, 0.125, pairs=0.2, told=1),
        Stage("sizes", INNER_ASPECTS, 70, 1024, (1.4e-3, 8e-4), 65_536, 0.3, 2.0, 0.6, 0.125, pairs=0.2, told=0.5),
    ),
    decay=0.998,
    minutes=10.0,
    within=WITHIN,
)
GPU = Course(
    name="gpu",
    widths=(32, 32, *GPU_INNER.widths),
    cast=ALL,
    stages=(
        Stage("outer", (square(64),), 6, 256, (1e-3, 1e-3), 32_768, 0.3, 1.7, 0.6, 0.25, told=1, outer=True),
        Stage("64", (square(64),), 60, 256, (9e-4, 4e-4), 32_768, 0.5, 1.7, 0.6, 0.25, pairs=0.25),
        Stage("mixed", ASPECTS, 34, 192, (4e-4, 1e-5), 4_096, 0.4, 1.5, 0.6, 0.25, pairs=0.25),
    ),
    decay=0.998,
    minutes=10.0,
    grown_from="gpu-inner",
)
"""One H100: the samples are shares of the time (``lasting`` says how much)."""

TINY = Course(
    name="tiny",
    widths=(32, 64, 128),
    cast=8,
    stages=(
        Stage("a", (square(16),), 24, 4, (1e-3, 8e-4), 16, renewed=0.5, told=1),
        Stage("b", (square(16), Size(16, 24)), 16, 4, (8e-4, 1e-5), 8, coarse=0.6, renewed=0.5, told=0.5),
    ),
)
"""For trying that everything runs."""

TINY_INNER = Course(
    name="tiny-inner",
    widths=(32, 64, 128),
    cast=8,
    stages=(Stage("a", (square(8),), 8, 4, (1e-3, 8e-4), 8, coarse=0.6, told=1),),
    within=WITHIN,
)
TINY_GROWN = Course(
    name="tiny-grown",
    widths=(32, 32, 32, 64, 128),
    cast=8,
    stages=(
        Stage("a", (square(32),), 4, 2, (1e-3, 8e-4), 8, told=1, outer=True),
        Stage("b", (square(32),), 2, 2, (1e-3, 8e-4), 8),
    ),
    grown_from="tiny-inner",
)
"""The same for a grown one."""


def refining(base: Course, batch: int, samples: int, capacity: int, minutes: float = 0.0) -> Course:
    """A refiner from a base: the last quarter of the noise levels, at the sizes that are asked for."""
    rates, sizes = (8e-4, 1e-5), (square(64, 3), Size(64, 96), Size(96, 64), square(96), square(128, 0.4))
    stage = Stage("refine", sizes, samples, batch, rates, capacity, emphasis=0.0, top=260)
    name = f"{base.name}-refiner"
    return Course(name, base.widths, base.cast, (stage,), base.decay, 0.0, minutes, seed=17, base=base.name)


def distilling(base: Course, batch: int, samples: int, capacity: int, minutes: float = 0.0) -> Course:
    """The few-step LoRA of a base."""
    stage = Stage("distil", (square(64),), samples, batch, (1e-3, 1e-5), capacity, noisy=0.3, coarse=0.6)
    name = f"{base.name}-few-steps"
    return Course(name, base.widths, base.cast, (stage,), 0.95, 0.0, minutes, seed=19, base=base.name)


def looking(base: Course, look: str, seed: int, batch: int, samples: int, capacity: int) -> Course:
    """The LoRA of a look for a base; most of its samples are noisy, since a look is decided with the layout."""
    sizes, rates = (square(64, 3), Size(64, 96), Size(96, 64), square(96, 0.5)), (2e-3, 1e-5)
    stage = Stage("look", sizes, samples, batch, rates, capacity, noisy=0.3, emphasis=1.4, coarse=0.6, plain=0.5)
    return Course(f"{base.name}-{look}", base.widths, base.cast, (stage,), 0.98, 0.0, seed=seed, base=base.name)


BASES = {course.name: course for course in (CPU_INNER, CPU, GPU_INNER, GPU, TINY, TINY_INNER, TINY_GROWN)}
MORE = (
    refining(CPU, 8, 8_000, 1_280),
    refining(GPU, 256, 10, 8_192, minutes=3.0),
    refining(TINY, 1, 4, 20),
    distilling(CPU, 4, 4_000, 1_024),
    distilling(GPU, 96, 10, 8_192, minutes=2.5),
    distilling(TINY, 1, 3, 6),
    looking(CPU, "pixel-art", 21, 4, 3_000, 640),
    looking(CPU, "line-art", 23, 4, 2_000, 640),
    looking(TINY, "pixel-art", 21, 1, 3, 6),
    looking(TINY, "line-art", 23, 1, 3, 6),
    looking(GPU, "pixel-art", 21, 64, 20_000, 4_096),
    looking(GPU, "line-art", 23, 64, 12_000, 4_096),
)
COURSES = {course.name: course for course in (*BASES.values(), *MORE)}
