"""The demo's text: read, cut into tokens by a tokenizer trained on it, and drawn as batches."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .errors import CommandError

LONGEST = 16_000_000  # characters: more would only make the tokenizer's training longer
END = "<|end|>"


def read_text(file: Path | None) -> str:
    """The text of a UTF-8 file, at most its first LONGEST characters; None: Python's own help topics.

    Raises: CommandError where the file cannot be read, is empty, or is not text.
    """
    if file is None:
        return _help_topics()
    try:
        with file.open(encoding="utf-8-sig") as stream:
            text = stream.read(LONGEST)
    except UnicodeDecodeError as error:
        raise CommandError(f"{file} is not a UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from error
    if "\0" in text:
        raise CommandError(f"{file} is not a text: it holds a zero byte")
    if not text.strip():
        raise CommandError(f"{file} is empty")
    return text


def _help_topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CommandError("this Python lacks pydoc_data.topics; name a text with --text FILE") from error
    return "\n\n".join(topics.values())


def train_tokenizer(text: str, vocab: int):
    """A byte-level byte-pair tokenizers.Tokenizer of `vocab` tokens, or as many as the text gives."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def encode(tokenizer, text: str, shortest: int) -> Tensor:
    """The text's tokens, int64 [n]. Raises: CommandError if there are fewer than `shortest`."""
    tokens = torch.tensor(tokenizer.encode(text).ids)
    if len(tokens) < shortest:
        raise CommandError(f"the text is too short: {len(tokens)} tokens, and the demo needs {shortest}")
    return tokens


def batches(
    tokens: Tensor, count: int, batch: int, context: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` pairs (tokens, the tokens after them), each int64 [batch, context], cut at random places."""
    generator = torch.Generator().manual_seed(seed)
    windows = tokens.unfold(0, context + 1, 1)
    for _ in range(count):
        drawn = windows[torch.randint(len(windows), (batch,), generator=generator)]
        yield drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
