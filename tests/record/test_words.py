import pytest

from globenc_lightning.record.words import word_numbers


@pytest.mark.parametrize(
    ("tokens", "numbers"),
    [
        (("[CLS]", "a", "film", "##s", "##ing", "!", "[SEP]"), (None, 0, 1, 1, 1, 2, None)),
        (("[CLS]", "##ing", "##s", "[SEP]"), (None, 0, 0, None)),
        (("[CLS]", "a", "[SEP]", "##b", "[SEP]"), (None, 0, None, 1, None)),
        (("[CLS]", "The", "▁film", "s", "▁was", "[SEP]"), (None, 0, 1, 1, 2, None)),
        (("[CLS]", "▁", "▁a", "b", "⋯", "[SEP]"), (None, 0, 1, 1, 1, None)),
        (("[CLS]", "fil", "m</w>", "s</w>", "end", "[SEP]"), (None, 0, 0, 1, 2, None)),
        (("[CLS]", "##", "a", "[SEP]"), (None, 0, 1, None)),
        ((), ()),
    ],
)
def test_words_are_told_by_how_tokens_are_spelled(tokens: tuple[str, ...], numbers: tuple[int | None, ...]) -> None:
    special = [token in ("[CLS]", "[SEP]") for token in tokens]
    assert word_numbers(tokens, special) == [*numbers]


def test_without_a_tokenizer_there_are_no_words() -> None:
    assert word_numbers(("12", "13"), [None, None]) == [None, None]
