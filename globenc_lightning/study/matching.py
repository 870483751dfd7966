"""Finds the tokens of a probe that a set of texts stands for: words, several words, punctuation, special tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from globenc_lightning.errors import RecordError
from globenc_lightning.record.words import CONTINUES
from globenc_lightning.tokenizers import SPACE, WORD_END

SPECIAL, PUNCTUATION = "[special]", "[punctuation]"
"""Kinds of tokens: special ones, and those without a letter or digit."""

SETS = {
    "negations": (
        "no", "not", "n't", "never", "none", "nobody", "nothing", "nowhere", "nor", "neither", "without", "cannot",
        "hardly", "barely", "scarcely", "ain't", "aren't", "can't", "couldn't", "didn't", "doesn't", "don't", "hadn't",
        "hasn't", "haven't", "isn't", "mustn't", "needn't", "shouldn't", "wasn't", "weren't", "won't", "wouldn't",
    ),
    "punctuation": (PUNCTUATION,),
    "special": (SPECIAL,),
}  # fmt: skip
"""Sets of tokens by name."""


@dataclass(frozen=True)
class _Token:
    """A token of an example.

    Attributes:
        row: its row in the probe's table.
        name: as the pictures show it, in lower case.
        text: its name without a tokenizer's signs.
        special: whether it is a special token.
        word: the number of its word; None where unknown.
    """

    row: int
    name: str
    text: str
    special: bool
    word: int | None


def wanted_tokens(tokens: str | Sequence[str]) -> list[str]:
    """Returns the texts that a set stands for: a name in ``SETS``, a text, or several of both.

    Raises:
        RecordError: there is none, or something that is no text.
    """
    given = [tokens] if isinstance(tokens, str) else [*tokens]
    if not given or not all(isinstance(one, str) and one.strip() for one in given):
        raise RecordError(
            f"tokens must be texts, such as ['not', 'never'], or one of {', '.join(map(repr, SETS))}; got {tokens!r}."
        )
    return [text for one in given for text in SETS.get(one, (one,))]


def marked_tokens(told: Any, wanted: Sequence[str]) -> NDArray[np.bool_]:
    """Returns which tokens of a probe a set of texts stands for.

    - A text is found where tokens spell it, in any case, from the beginning of a word to the end of one: ``no`` is not
      found in ``no ##body``, which ``nobody`` is. Punctuation ends a word, however the tokenizer cut it: ``not`` and
      ``don't`` are found in ``▁not ,`` and ``don ' t``. A text of several words is found where they follow one another.
    - A special token is found by its name alone (``[SEP]``), and a piece of a word by its own spelling (``##body``).
    - ``"[special]"`` stands for all special tokens, ``"[punctuation]"`` for all others without a letter or digit.
    - Where the probe does not tell words, each token counts as one.

    Args:
        told: a row per example and token, as the record's probe.
        wanted: texts.

    Returns:
        (n) A truth value per row.
    """
    names = {_plain(one) for one in wanted}
    texts = {tuple(one.split()) for one in names}
    found = np.zeros(len(told), dtype=bool)
    for tokens in _examples(told):
        for start, token in enumerate(tokens):
            if token.special:
                found[token.row] = SPECIAL in names or token.name in names
                continue
            is_sign = bool(token.text) and not any(one.isalnum() for one in token.text)
            # A name with a tokenizer's signs stands for that very piece.
            found[token.row] |= (PUNCTUATION in names and is_sign) or (token.name != token.text and token.name in names)
            if _begins(tokens, start):
                for text in texts:
                    end = _end(tokens, start, text)
                    found[[one.row for one in tokens[start:end]]] = True
    return found


def _examples(told: Any) -> Iterator[list[_Token]]:
    """The tokens of each example."""
    columns = [told[name].tolist() for name in ("example", "token", "special", "word")]
    by_example: dict[int, list[_Token]] = {}
    for row, (example, token, special, word) in enumerate(zip(*columns, strict=True)):
        name = _plain(str(token))
        text = name.removeprefix(CONTINUES) if len(name) > len(CONTINUES) else name
        text = text.strip(SPACE).removesuffix(WORD_END)
        known = word is not None and word == word
        by_example.setdefault(example, []).append(
            _Token(row, name, text, special is not None and bool(special), int(word) if known else None)
        )
    yield from by_example.values()


def _plain(text: str) -> str:
    """A text in lower case, with the apostrophe of a keyboard."""
    return text.lower().replace("\u2019", "'")


def _is_whole(before: _Token, after: _Token) -> bool:
    """Whether a text may end with one token and another begin with the next: a word ends there, or has punctuation."""
    if before.word is None or after.word is None or before.word != after.word:
        return True
    return not (before.text[-1:].isalnum() and after.text[:1].isalnum())


def _begins(tokens: Sequence[_Token], start: int) -> bool:
    return start == 0 or _is_whole(tokens[start - 1], tokens[start])


def _end(tokens: Sequence[_Token], start: int, text: Sequence[str]) -> int:
    """The place after the tokens that spell a text of so many words, or the start where they do not."""
    at = start
    for number, word in enumerate(text):
        first, left = at, word
        while left:
            if at == len(tokens) or tokens[at].special or not tokens[at].text or not left.startswith(tokens[at].text):
                return start
            if at > first and not _goes_on(tokens[at - 1], tokens[at]):
                return start
            left = left.removeprefix(tokens[at].text)
            at += 1
        # Words that follow one another are not pieces of one.
        if number + 1 < len(text) and (at == len(tokens) or not _is_whole(tokens[at - 1], tokens[at])):
            return start
    return at if at == len(tokens) or _is_whole(tokens[at - 1], tokens[at]) else start


def _goes_on(before: _Token, after: _Token) -> bool:
    """Whether two tokens may spell one word: pieces of it, or what a tokenizer cuts at punctuation."""
    if before.word is None or after.word is None:
        return False
    if before.word == after.word:
        return True
    # A space sign is a space, whatever is beside it.
    return not after.name.startswith(SPACE) and not (before.text[-1:].isalnum() and after.text[:1].isalnum())
