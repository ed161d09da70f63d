"""What trainers note in a LoRA's metadata for its users: the words that call it up.

Knows kohya's and modelspec's keys. Trusts nothing: metadata are text from strangers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

MOST_WORDS = 20
MOST_CHARACTERS = 100
_PHRASE = "modelspec.trigger_phrase"
_TAGS = "ss_tag_frequency"


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the author's trigger phrase and then the tags of the training pictures, the most frequent first."""
    counts: Counter[str] = Counter()
    for tag, count in _tags(metadata.get(_TAGS, "")):
        counts[tag] += count
    frequent = sorted(counts, key=lambda tag: (-counts[tag], tag))
    phrase = _clean(metadata.get(_PHRASE, ""))
    words = dict.fromkeys([*([phrase] if phrase else []), *frequent])
    return tuple(words)[:MOST_WORDS]


def _tags(text: str) -> Iterator[tuple[str, int]]:
    """Yield the counts of kohya's ``{"folder": {"tag": count}}``."""
    try:
        folders: Any = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if (word := _clean(tag)) and isinstance(count, int) and count > 0:
                yield word, count


def _clean(text: str) -> str:
    return "".join(letter for letter in text[:MOST_CHARACTERS] if letter.isprintable()).strip()
