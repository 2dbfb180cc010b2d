"""Prompts of Harmon: the chat template that it was trained with, and what a tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

GENERIC_PROMPT = "Generate an image."  # what guidance leads away from


def instruction(text: str) -> str:
    """`text` as the user's turn of Qwen2's chat template, the model's turn begun."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def image_prompt(text: str) -> str:
    """What a user says to have an image of `text`."""
    return f"Generate an image: {text}"


def check_texts(name: str, texts: object) -> None:
    """ValueError for what is not a sequence of texts, and for one that has no UTF-8."""
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}: expected a text, or several, got {texts!r}")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: expected text, got {text!r}: {error.reason}") from None


def encode_prompts(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask): [B, L] int64, padded on the right with 0, and [B, L] bool, true where there is a text.

    tokenizer: a tokenizers.Tokenizer. ValueError for no texts, and for one that has no tokens.
    """
    ids = [torch.tensor(encoding.ids, dtype=torch.int64) for encoding in tokenizer.encode_batch(list(texts))]
    if not ids or not all(len(row) for row in ids):
        raise ValueError(f"prompt: expected texts that have tokens, got {list(texts)!r}")
    masks = [torch.ones(len(row), dtype=torch.bool) for row in ids]
    return tuple(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (ids, masks))
