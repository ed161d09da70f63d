"""The operator's list of words and phrases that prompts may not have.

Knows text: normal forms, words, phrases. Knows nothing of pictures. It is easily got around and finds harmless
sentences, too: a help beside the checker of pictures, never in its place.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from impasto.errors import ConfigError, InvalidInput

_WORD: Final = re.compile(r"[^\W_]+")
_SHOWN_CHARS: Final = 60


class DenyList:
    """Finds listed words and phrases in a prompt, as whole words.

    Both sides are compared in Unicode's compatibility form (NFKC), casefolded, without invisible characters, and with
    anything but letters and digits between words: ``Foo-Bar`` is ``foo bar``, and ``foobar`` is neither.

    Args:
        entries: A word or phrase each.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self._phrases = {words for entry in entries if (words := _words(entry))}
        self._lengths = sorted({len(phrase) for phrase in self._phrases})

    @classmethod
    def load(cls, path: Path) -> DenyList:
        """Read a UTF-8 file with an entry in each line; empty lines, and lines that begin with ``#``, do not count.

        Raises:
            ConfigError: The file cannot be read, or a line has no letter and no digit.
        """
        try:
            lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompt_denylist: {path} cannot be read ({error})") from None
        entries = [line for line in lines if line and not line.startswith("#")]
        for entry in entries:
            if not _words(entry):
                raise ConfigError(f"prompt_denylist: {entry[:_SHOWN_CHARS]!r} in {path} has no letter and no digit")
        return cls(entries)

    def check(self, field: str, prompt: str) -> None:
        """Refuse a prompt that has an entry.

        Raises:
            InvalidInput: It has; the message names ``field`` and the entry.
        """
        words = _words(prompt)
        for at, length in itertools.product(range(len(words)), self._lengths):
            if (phrase := words[at : at + length]) in self._phrases:
                shown = " ".join(phrase)[:_SHOWN_CHARS]
                raise InvalidInput(field, f"has {shown!r}, which this server does not draw: say it without")


def _words(text: str) -> tuple[str, ...]:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return tuple(_WORD.findall("".join(c for c in folded if unicodedata.category(c) != "Cf")))
