"""What Fashion-MNIST's pictures show, in words, and a small tokenizer for such sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.prompts import GENERIC_PROMPT, image_prompt, instruction

NOUNS = (
    "a t-shirt", "a pair of trousers", "a pullover", "a dress", "a coat",
    "a sandal", "a shirt", "a sneaker", "a bag", "an ankle boot",
)  # fmt: skip
SHADES = ("", "dark", "light")
FRAMES = ("a photo of {}", "a picture of {}", "{}")
VOCABULARY = 384


def caption(label: int, shade: int = 0, frame: int = 0) -> str:
    """Such as "a photo of a dark dress", by the numbers of class, shade and frame."""
    noun = NOUNS[label]
    if shade:
        noun = f"a {SHADES[shade]} {noun.split(' ', 1)[1]}"
    return FRAMES[frame].format(noun)


def label_of(text: str) -> int | None:
    """The class that a prompt speaks of: that of the longest noun in it, None if there is none."""
    nouns = {noun.split(" ", 1)[1]: label for label, noun in enumerate(NOUNS)}
    found = [noun for noun in nouns if re.search(rf"\b{re.escape(noun)}\b", text.lower())]
    return nouns[max(found, key=len)] if found else None


def shades(images: Tensor, labels: Tensor) -> Tensor:
    """[N] int64: 1 for the third of each class whose pictures are darkest, 2 for the lightest third, else 0.

    images: [N, 1, 28, 28] in [-1, 1]; how light one is: the mean of what is not background.
    """
    ink = (images + 1).flatten(1)
    lightness = ink.sum(dim=1) / (ink > 0.1).sum(dim=1).clamp(min=1)
    found = torch.zeros_like(labels)
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        ranked = of_class[lightness[of_class].argsort()]
        third = len(ranked) // 3
        found[ranked[:third]], found[ranked[-third:]] = 1, 2
    return found


def every_prompt() -> list[str]:
    """All that training knows, the generic one last."""
    texts = [caption(label, shade, frame) for label in range(10) for shade in range(3) for frame in range(len(FRAMES))]
    return [instruction(text) for text in (*map(image_prompt, texts), GENERIC_PROMPT)]


def make_tokenizer(texts: Sequence[str]) -> Any:
    """A tokenizers.Tokenizer: byte-level BPE as Qwen2's, of at most VOCABULARY tokens learned from `texts`; any text has tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
