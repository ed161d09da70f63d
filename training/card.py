"""The texts that travel with the weights: model card and notices.

Knows words only.
"""

from __future__ import annotations

from pathlib import Path

from training.subjects import BACKGROUNDS, CAST

MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

NOTICE = f"""Impasto's built-in model

The weights in this folder are part of Impasto and carry its licence (Apache-2.0). Two things in them come from
others, under the MIT licence below.

1. The pictures the weights were trained on: Fluent Emoji.
   Copyright (c) Microsoft Corporation

2. The byte-pair vocabulary in tokenizer/ and tokenizer_2/: CLIP.
   Copyright (c) 2021 OpenAI

MIT License

{MIT}"""

CARD = """# Impasto's built-in model

A small text-to-image model with SDXL's architecture (the same classes, block types, text and size conditioning and
noise schedule; only narrower and shallower), trained from nothing on Fluent Emoji art. It exists so that the service
draws a real picture without any download. It draws one emoji-like object on a plain background; it is no substitute
for SDXL's own weights, and anything outside its list gives some object of the list or a blend.

- Subjects: {subjects}.
- Backgrounds: {backgrounds}; a prompt that names none means white.
- One style: soft 3d gradients.
- Prompts like `a red fox on a blue background`, `3d render of a rocket, yellow background`.
- Size: trained at 512x512 px. Larger pictures work and are coherent in colour, but shapes come out distorted or
  repeated: this edition was not trained on them.
- A guidance scale of 4 to 5 and 20 to 30 steps suit it.

`training/` in the repository holds the whole recipe, `NOTICE` the licences.
"""


def write(folder: Path) -> None:
    """Put both texts into the model folder."""
    subjects = ", ".join(CAST)
    (folder / "README.md").write_text(CARD.format(subjects=subjects, backgrounds=", ".join(BACKGROUNDS)))
    (folder / "NOTICE").write_text(NOTICE)
