"""What trainers note in a LoRA's metadata for its users: the words that call it up.

Knows kohya's and modelspec's keys. Trusts nothing: metadata are text from strangers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

MOST_WORDS = 20
MOST_CHARACTERS = 100
_PHRASE = "modelspec.trigger_phrase"
_TAGS = "ss_tag_frequency"
MOST_TEXT = 2**20  # characters that are read at once
# A tag and its count. Tags longer than a trigger word may be are whole captions, and of no use to anybody.
_COUNT = re.compile(rf'("(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]){{1,{MOST_CHARACTERS}}}")\s*:\s*(\d{{1,9}})(?!\d)')


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
    """Yield the counts of kohya's ``{"folder": {"tag": count}}``; of a text that is cut short, as far as it goes."""
    try:
        folders: Any = json.loads(text) if len(text) <= MOST_TEXT else _counts(text[:MOST_TEXT])
    except (ValueError, RecursionError):
        folders = _counts(text[:MOST_TEXT])
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if (word := _clean(tag)) and isinstance(count, int) and count > 0:
                yield word, count


def _counts(text: str) -> dict[str, dict[str, int]]:
    counts: Counter[str] = Counter()
    for match in _COUNT.finditer(text):
        counts[str(json.loads(match[1]))] += int(match[2])
    return {"": counts}


def _clean(text: str) -> str:
    return "".join(letter for letter in text[:MOST_CHARACTERS] if letter.isprintable()).strip()
