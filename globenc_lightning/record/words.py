"""Numbers the words of a text by how its tokens are spelled."""

from collections.abc import Sequence

from globenc_lightning.tokenizers import SPACE, WORD_END

CONTINUES = "##"
"""How WordPiece spells a token that goes on with the word before it."""


def word_numbers(tokens: Sequence[str], special: Sequence[bool | None]) -> list[int | None]:
    """Returns the number of the word that each token belongs to, from 0.

    A word begins at every token (WordPiece) but for those that begin with ``##``; where tokens begin with a space sign
    (SentencePiece, byte-level BPE), at those that do; where tokens end with ``</w>`` (BPE), after those.

    Args:
        tokens: the tokens as the pictures show them, (k,).
        special: (k,) whether each is a special token; None where no tokenizer is known.

    Returns:
        (k,) numbers; None for special tokens, and for all where no tokenizer is known.
    """
    plain = [token for token, mark in zip(tokens, special, strict=True) if mark is False]
    by_space = any(token.startswith(SPACE) for token in plain)
    by_end = not by_space and any(token.endswith(WORD_END) for token in plain)
    numbers: list[int | None] = []
    word, goes_on = -1, False
    for token, mark in zip(tokens, special, strict=True):
        if mark is not False:
            numbers.append(None)
            goes_on = False
            continue
        if by_space:
            continues = goes_on and not token.startswith(SPACE)
        elif by_end:
            continues = goes_on
        else:
            continues = goes_on and token.startswith(CONTINUES) and len(token) > len(CONTINUES)
        word += not continues
        numbers.append(word)
        goes_on = not (by_end and token.endswith(WORD_END))
    return numbers
