"""The table of what the built-in model can draw: subjects, styles, background colours.

Knows names and colours. Does not know how a caption is worded (``captions``) or a picture is made (``prepare``).
"""

from __future__ import annotations

from dataclasses import dataclass

# What this edition learns to draw: few enough for two CPU cores to learn well. The rest of the table waits for more.
CAST: tuple[str, ...] = (
    "fox", "cat", "frog", "panda", "fish", "rocket", "car", "house",
    "cactus", "mushroom", "apple", "banana", "pizza", "heart", "star", "ghost",
)  # fmt: skip
CAST_STYLE = "3d"


@dataclass(frozen=True)
class Subject:
    """One thing with a picture: its name, the emoji that shows it, other words for it, its natural colour."""

    name: str
    code: str
    synonyms: tuple[str, ...] = ()
    colour: str = ""


SUBJECTS: tuple[Subject, ...] = (
    Subject("fox", "1f98a", ("fox face",), "red"),
    Subject("cat", "1f431", ("kitten", "cat face"), "yellow"),
    Subject("dog", "1f436", ("puppy", "dog face"), "brown"),
    Subject("frog", "1f438", ("frog face",), "green"),
    Subject("panda", "1f43c", ("panda bear",), "black and white"),
    Subject("lion", "1f981", ("lion face",), "yellow"),
    Subject("pig", "1f437", ("pig face",), "pink"),
    Subject("rabbit", "1f430", ("bunny",), "white"),
    Subject("koala", "1f428", ("koala bear",), "gray"),
    Subject("penguin", "1f427", (), "black and white"),
    Subject("owl", "1f989", (), "brown"),
    Subject("unicorn", "1f984", (), "white"),
    Subject("fish", "1f420", ("tropical fish",), "blue"),
    Subject("octopus", "1f419", (), "orange"),
    Subject("whale", "1f433", (), "blue"),
    Subject("crab", "1f980", (), "red"),
    Subject("turtle", "1f422", ("tortoise",), "green"),
    Subject("butterfly", "1f98b", (), "orange"),
    Subject("ladybug", "1f41e", ("ladybird",), "red"),
    Subject("rocket", "1f680", ("spaceship",), "white"),
    Subject("car", "1f697", ("automobile",), "red"),
    Subject("motorcycle", "1f3cd-fe0f", ("motorbike",), "red"),
    Subject("bus", "1f68c", (), "orange"),
    Subject("sailboat", "26f5", ("boat",), "white"),
    Subject("house", "1f3e0", ("home",), ""),
    Subject("mountain", "1f3d4-fe0f", ("snowy mountain",), "brown"),
    Subject("desert", "1f3dc-fe0f", (), ""),
    Subject("tree", "1f333", (), "green"),
    Subject("palm tree", "1f334", (), "green"),
    Subject("cactus", "1f335", (), "green"),
    Subject("sunflower", "1f33b", (), "yellow"),
    Subject("tulip", "1f337", ("flower",), "pink"),
    Subject("rose", "1f339", (), "red"),
    Subject("mushroom", "1f344", (), "red"),
    Subject("apple", "1f34e", (), "red"),
    Subject("banana", "1f34c", (), "yellow"),
    Subject("strawberry", "1f353", (), "red"),
    Subject("watermelon", "1f349", (), "red"),
    Subject("pizza", "1f355", ("slice of pizza",), ""),
    Subject("burger", "1f354", ("hamburger",), ""),
    Subject("cupcake", "1f9c1", (), "pink"),
    Subject("cake", "1f382", ("birthday cake",), ""),
    Subject("donut", "1f369", ("doughnut",), "brown"),
    Subject("ice cream", "1f366", (), "white"),
    Subject("heart", "2764-fe0f", (), "red"),
    Subject("star", "2b50", (), "yellow"),
    Subject("sun", "1f31e", ("sun with a face",), "yellow"),
    Subject("moon", "1f319", ("crescent moon",), "golden"),
    Subject("snowman", "26c4", (), "white"),
    Subject("umbrella", "2602-fe0f", (), "purple"),
    Subject("balloon", "1f388", (), "red"),
    Subject("crown", "1f451", ("golden crown",), "golden"),
    Subject("ghost", "1f47b", (), "white"),
    Subject("robot", "1f916", ("robot face",), "gray"),
    Subject("gift", "1f381", ("present",), ""),
    Subject("man", "1f468", ("man face",), ""),
)

STYLES: tuple[str, ...] = ("3d", "flat")
"""``3d`` (soft gradients) is what a prompt without a style word means."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (220, 45, 45),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (55, 165, 75),
    "blue": (50, 110, 225),
    "purple": (130, 70, 190),
    "pink": (245, 150, 195),
    "white": (255, 255, 255),
    "black": (20, 20, 22),
    "gray": (128, 128, 130),
}
"""A prompt that names no background means white."""
