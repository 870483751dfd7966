import functools
import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import BertConfig, BertModel, ByT5Tokenizer, CanineTokenizer

from globenc_lightning.tokenizers import (
    Shown,
    as_tokenizer,
    disagree,
    find_tokenizer,
    likeliest,
    naming,
    spelling_of,
    tokenizers_held,
    tokens_of,
)
from tests import models
from tests.vocabulary import bert_tokenizer, byte_level_tokenizer, sentencepiece_tokenizer

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "joy", "to", "watch", "dull", "##er", "film", ".")


@pytest.fixture
def tokenizer() -> Any:
    return bert_tokenizer({word: index for index, word in enumerate(WORDS)})


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


class Holder:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def collate(self, rows: list[Any]) -> list[Any]:
        return rows


def test_a_tokenizer_is_itself(tokenizer: Any) -> None:
    assert as_tokenizer(tokenizer) is tokenizer


@pytest.mark.parametrize("kind", [str, Path, os.fspath])
def test_a_folder_is_the_tokenizer_in_it(folder: Path, kind: Any) -> None:
    assert as_tokenizer(kind(folder)).convert_ids_to_tokens([2, 6, 3]) == ["[CLS]", "joy", "[SEP]"]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer .*save_pretrained\(folder\)"):
        as_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="there is no tokenizer"):
        as_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("wrong", [3, {"a": 1}, ["joy"], str.split, object()])
def test_what_is_no_tokenizer(wrong: Any) -> None:
    with pytest.raises(ValueError, match="must be a Hugging Face tokenizer or the name of one"):
        as_tokenizer(wrong)


def test_in_an_attribute_of_a_module(tokenizer: Any) -> None:
    module = nn.Linear(2, 2)
    module.words = tokenizer
    assert find_tokenizer([module]) is tokenizer


def test_in_an_attribute_of_a_part_of_a_module(tokenizer: Any) -> None:
    inner = nn.Linear(2, 2)
    inner._tokenizer = tokenizer
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(inner))
    assert find_tokenizer([module]) is tokenizer


def test_in_a_data_module(tokenizer: Any) -> None:
    assert find_tokenizer([nn.Linear(2, 2), None, Holder(tokenizer=tokenizer)]) is tokenizer


def test_in_a_collate_function_made_by_partial(tokenizer: Any) -> None:
    def collate(tokenizer: Any, rows: list[Any], max_length: int = 0) -> list[Any]:
        return rows

    assert find_tokenizer([functools.partial(collate, tokenizer)]) is tokenizer
    assert find_tokenizer([functools.partial(collate, tokenizer=tokenizer, max_length=8)]) is tokenizer
    nested = functools.partial(functools.partial(collate, tokenizer), max_length=8)
    assert find_tokenizer([nested]) is tokenizer


def test_in_a_closure(tokenizer: Any) -> None:
    def collate(rows: list[str]) -> Any:
        return tokenizer(rows)

    assert find_tokenizer([collate]) is tokenizer
    assert find_tokenizer([lambda rows: (tokenizer, rows)]) is tokenizer


def test_in_a_closure_that_is_not_filled_yet(tokenizer: Any) -> None:
    def outer() -> Any:
        def collate(rows: list[str]) -> Any:
            return later, rows

        result = find_tokenizer([collate, Holder(tokenizer=tokenizer)])
        later = None
        return result

    assert outer() is tokenizer


def test_behind_a_bound_method(tokenizer: Any) -> None:
    # The method's own object holds it, one level further than the function.
    class Collator:
        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def __call__(self, rows: list[str]) -> Any:
            return self.tokenizer(rows)

        def collate(self, rows: list[str]) -> Any:
            return self.tokenizer(rows)

    assert find_tokenizer([Collator()]) is tokenizer
    assert find_tokenizer([Collator().collate]) is tokenizer


def test_a_method_of_the_tokenizer_itself(tokenizer: Any) -> None:
    assert find_tokenizer([tokenizer.pad]) is tokenizer


def test_the_first_holder_wins(tokenizer: Any) -> None:
    other = bert_tokenizer({word: index for index, word in enumerate(WORDS)})
    assert find_tokenizer([Holder(a=other), Holder(b=tokenizer)]) is other


def test_in_the_folder_of_the_checkpoint(folder: Path) -> None:
    BertModel(BertConfig(**models._SIZES)).save_pretrained(folder)
    encoder = BertModel.from_pretrained(folder)
    found = find_tokenizer([nn.Sequential(encoder)], [encoder])
    assert found is not None
    assert found.convert_ids_to_tokens(6) == "joy"


def test_nowhere() -> None:
    assert find_tokenizer([]) is None
    assert find_tokenizer([None, nn.Linear(2, 2), 3, "text", {"a": 1}, print], [models.build("bert").bert]) is None


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    models.build("bert").bert.save_pretrained(tmp_path)
    # transformers makes up a tokenizer of five special tokens there, which knows no word.
    assert find_tokenizer([], [BertModel.from_pretrained(tmp_path)]) is None
    with pytest.raises(ValueError, match="there is no tokenizer"):
        as_tokenizer(tmp_path)


def test_tokens(tokenizer: Any) -> None:
    assert tokens_of([2, 9, 10, 3], tokenizer) == ["[CLS]", "dull", "##er", "[SEP]"]


def test_tokens_without_a_tokenizer() -> None:
    assert tokens_of([2, 9, 10, 3], None) == ["2", "9", "10", "3"]


def test_ids_that_the_tokenizer_does_not_know(tokenizer: Any) -> None:
    assert tokens_of([6, len(WORDS), 10**12, -1, -100], tokenizer) == ["joy", "13", "1000000000000", "-1", "-100"]
    assert tokens_of([], tokenizer) == []


def test_tokens_are_strings_even_in_a_hole_of_the_vocabulary() -> None:
    holes = bert_tokenizer({word: 2 * index for index, word in enumerate(WORDS)})
    assert all(isinstance(token, str) for token in tokens_of(range(-2, 30), holes))


# Text that people can read

TEXTS = ("Das Café ist schön", "Привет мир", "Καλημέρα", "日本語のテスト", "naïve 🦄 ёлка", "مرحبا بالعالم")


class PythonOnly:
    """A tokenizer without a part of the tokenizers library, as those that come with a model's own code."""

    def __init__(self, inner: Any, decodes: Any = None) -> None:
        self.inner, self.decodes = inner, decodes

    def __len__(self) -> int:
        return len(self.inner)

    def convert_ids_to_tokens(self, token: int) -> Any:
        return self.inner.convert_ids_to_tokens(token)

    def decode(self, ids: list[int]) -> Any:
        return self.inner.decode(ids) if self.decodes is None else self.decodes(ids)


def in_bytes(text: str) -> list[bytes]:
    """A text in tokens of two bytes."""
    data = text.encode()
    return [data[place : place + 2] for place in range(0, len(data), 2)]


class Pieces:
    """A tokenizer of given pieces, whatever they are."""

    def __init__(self, pieces: Any, decode: Any = None) -> None:
        self.pieces = list(pieces)
        if decode is not None:
            self.decode = decode

    def __len__(self) -> int:
        return len(self.pieces)

    def convert_ids_to_tokens(self, token: int) -> Any:
        return self.pieces[token]


KINDS = {
    "byte level": lambda: byte_level_tokenizer(TEXTS),
    "byte level, single bytes": lambda: byte_level_tokenizer(TEXTS, 258),
    "byte level, no decoder": lambda: byte_level_tokenizer(TEXTS, 280, decodes=False),
    "byte level, Python only": lambda: PythonOnly(byte_level_tokenizer(TEXTS, 280)),
    "sentence pieces": lambda: sentencepiece_tokenizer(TEXTS, 360),
    "sentence pieces, bytes": lambda: sentencepiece_tokenizer(["Das ist"]),
    "sentence pieces, bytes, Python only": lambda: PythonOnly(sentencepiece_tokenizer(["Das ist"])),
    "word ends": lambda: byte_level_tokenizer(TEXTS, 700, word_end="</w>"),
    "word ends, pieces": lambda: byte_level_tokenizer(TEXTS, 520, word_end="</w>"),
    "ByT5": ByT5Tokenizer,
    "CANINE": CanineTokenizer,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_the_names_of_a_text_are_the_text(kind: Any, text: str) -> None:
    encode = getattr(kind, "inner", kind)
    ids = encode(text, add_special_tokens=False)["input_ids"]
    names = tokens_of(ids, kind)
    assert len(names) == len(ids)
    assert all(names)
    assert "".join(names).replace("⋯", "").replace("▁", " ").strip() == text
    # A word after a space begins with the mark, and nothing else holds it.
    assert [name for name in names if "▁" in name[1:]] == []
    assert naming(kind)(ids) == names


def test_a_character_is_shown_by_its_first_token() -> None:
    single = byte_level_tokenizer([], 258)
    assert tokens_of(single("e\u0301x")["input_ids"], single) == ["e", "\u0301", "⋯", "x"]
    assert tokens_of(single("é 語!")["input_ids"], single) == ["é", "⋯", "▁", "語", "⋯", "⋯", "!"]
    halves = Pieces(in_bytes("a語éb語"))
    assert tokens_of(range(len(halves)), halves) == ["a語", "⋯", "é", "b語", "⋯"]
    assert tokens_of([0, 1], Pieces([b"\xc3", b"\xa9\xc3"])) == ["é", "⋯<0xC3>"]
    assert tokens_of([0, 1, 2], Pieces([b"\xe8\xaa", b"\x9e\xe8", b"\xaa\x9e"])) == ["語", "⋯語", "⋯"]


def test_bytes_that_make_no_character() -> None:
    single = byte_level_tokenizer([], 258)
    ids = single("語語")["input_ids"]
    cut = [ids[0], ids[1], single.bos_token_id, ids[2], ids[3]]
    assert tokens_of(cut, single) == ["<0xE8>", "<0xAA>", "<s>", "<0x9E>", "<0xE8>"]
    spelled = sentencepiece_tokenizer(["Das ist"])
    assert tokens_of(spelled.convert_tokens_to_ids(["<0xE2>", "▁Das", "<0xFF>"]), spelled) == [
        "<0xE2>",
        "▁Das",
        "<0xFF>",
    ]


def test_line_ends_and_tabs_are_seen() -> None:
    for some in (byte_level_tokenizer([], 258), sentencepiece_tokenizer(["Das ist"]), CanineTokenizer()):
        ids = some("a\n\tb\r\nc", add_special_tokens=False)["input_ids"]
        assert "".join(tokens_of(ids, some)).lstrip("▁") == "a↵⇥b↵↵c"
    assert tokens_of([0, 1], Pieces([b"\r\n", "\n\n"])) == ["↵", "↵↵"]


def test_word_ends_become_word_beginnings() -> None:
    pieces = ["<s>", "Caf", "é</w>", "is", "t</w>", "</w>", "gut</w>"]
    assert tokens_of(range(1, 7), Pieces(pieces)) == ["▁Caf", "é", "▁is", "t", "▁</w>", "▁gut"]
    clip = byte_level_tokenizer(["Das Café"], 400, word_end="</w>")
    ids = [clip.bos_token_id, *clip("Das Café", add_special_tokens=False)["input_ids"], clip.pad_token_id]
    assert tokens_of(ids, clip) == ["<s>", "▁Das", "▁Café", "<pad>"]


def test_word_pieces_stay(tokenizer: Any) -> None:
    german = bert_tokenizer({word: place for place, word in enumerate((*WORDS, "Ã©", "##é", "Ġ", "ñandú"))})
    ids = german.convert_tokens_to_ids(["[CLS]", "Ã©", "##é", "Ġ", "ñandú", "[SEP]"])
    assert tokens_of(ids, german) == ["[CLS]", "Ã©", "##é", "Ġ", "ñandú", "[SEP]"]
    assert tokens_of(ids, PythonOnly(german)) == tokens_of(ids, german)


def test_added_and_special_tokens_are_as_they_were_given() -> None:
    some = byte_level_tokenizer(TEXTS)
    some.add_tokens(["éclair", "Ġ|", "  ", " of two\twords", "\n\n"])
    some.add_special_tokens({"additional_special_tokens": ["<ÃŁ>", "<two words>"]})
    ids = some.convert_tokens_to_ids(["éclair", "Ġ|", "  ", " of two\twords", "\n\n", "<ÃŁ>", "<two words>"])
    assert tokens_of(ids, some) == ["éclair", "Ġ|", "▁▁", "▁of two⇥words", "↵↵", "<ÃŁ>", "<two words>"]


def test_special_tokens_that_cannot_be_seen_are_shown_by_their_role() -> None:
    some = CanineTokenizer()
    assert tokens_of(some("é")["input_ids"], some) == ["[CLS]", "é", "[SEP]"]


@pytest.mark.parametrize(
    "said", [lambda ids: 1 / 0, lambda ids: 3, lambda ids: "something else", lambda ids: None, lambda ids: ["é"]]
)
def test_a_decoder_that_fails_leaves_the_spelling(said: Any) -> None:
    some = PythonOnly(byte_level_tokenizer(["Das Café"]), said)
    ids = some.inner("Das Café")["input_ids"]
    assert tokens_of(ids, some) == spelling_of(ids, some) == ["Das", "ĠCafÃ©"]
    assert tokens_of([0, 1], Pieces(["▁a\ufffd", "\ufffd"], said)) == ["▁a\ufffd", "\ufffd"]


def test_characters_that_the_tokenizer_replaced_are_decoded_together() -> None:
    data = [" é".encode()[:2], "é".encode()[1:], b"!", *in_bytes("語x")]
    some = Pieces(
        [part.decode("utf-8", "replace") for part in data],
        lambda ids: b"".join(data[place] for place in ids).decode("utf-8", "replace"),
    )
    assert spelling_of(range(5), some) == [" \ufffd", "\ufffd", "!", "\ufffd", "\ufffdx"]
    assert tokens_of(range(5), some) == ["▁é", "⋯", "!", "語x", "⋯"]


def test_what_is_no_token_is_shown_as_a_number() -> None:
    some = Pieces(["a", None, "", b"", "b"])
    assert tokens_of([0, 1, 2, 3, 4, 5, -1], some) == ["a", "1", "2", "3", "b", "5", "-1"]


def test_a_tokenizer_that_raises_for_an_id(tokenizer: Any) -> None:
    assert tokens_of([6, 7], Raises(tokenizer)) == ["joy", "7"]


class Raises(PythonOnly):
    def convert_ids_to_tokens(self, token: int) -> Any:
        if token == 7:
            raise IndexError("piece id is out of range")
        return super().convert_ids_to_tokens(token)


# ---- several tokenizers within reach: the one of the encoder that is shown


class Words:
    """The least that counts as a tokenizer."""

    all_special_ids, unk_token_id, mask_token_id = (), None, None

    def __init__(self, language: str, size: int = 99, name: str = "") -> None:
        self.language, self.size, self.name_or_path = language, size, name

    def __len__(self) -> int:
        return self.size

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"{self.language}{token}"


def encoder(name: str = "") -> Any:
    made = models.build("bert").bert
    made.config.name_or_path = name
    return made


IDS = [[5, 6, 7]]


@pytest.mark.parametrize(
    ("held", "shown", "wanted"),
    [
        ({"target_tokenizer": Words("de"), "source_tokenizer": Words("en")}, Shown("bert", encoder(), IDS), "en"),
        ({"tgt_tok": Words("de"), "src_tok": Words("en")}, Shown("model.encoder", encoder(), IDS), "en"),
        ({"decoderTokenizer": Words("de"), "tokenizer": Words("en")}, Shown("net", encoder(), IDS), "en"),
        ({"teacher_tokenizer": Words("de"), "tokenizer": Words("en")}, Shown("student.bert", encoder(), IDS), "en"),
        ({"query_tok": Words("de"), "passage_tok": Words("en")}, Shown("passage.bert", encoder(), IDS), "en"),
        ({"tokenizers": {"tgt": Words("de"), "src": Words("en")}}, Shown("bert", encoder(), IDS), "en"),
        # By the encoder's own name, whatever the attributes are called.
        (
            {"source": Words("de", name="x/de"), "target": Words("en", name="x/en")},
            Shown("a", encoder("x/en"), IDS),
            "en",
        ),
        # By the size of its vocabulary.
        ({"a": Words("de", 500), "b": Words("en", 99)}, Shown("bert", encoder(), IDS), "en"),
        # One that does not know the ids made none of them.
        ({"a": Words("de", 6), "b": Words("en", 200)}, Shown("bert", None, IDS), "en"),
        # Nothing tells them apart.
        ({"a": Words("en"), "b": Words("de")}, Shown("bert", encoder(), IDS), "en"),
    ],
)
def test_of_several_tokenizers_the_encoders_own_is_taken(held: dict[str, Any], shown: Shown, wanted: str) -> None:
    found = tokenizers_held([Holder(**held)])
    assert len(found) == 2
    assert likeliest(found, shown).tokenizer.language == wanted
    assert find_tokenizer([Holder(**held)], shown=shown).language == wanted
    assert disagree(found, shown)


def test_the_tokenizer_that_makes_the_same_ids_again_made_them(tokenizer: Any) -> None:
    right = tokenizer
    other = bert_tokenizer(
        {word: index for index, word in enumerate([*WORDS[:5], *(f"##{word}" for word in WORDS[5:])])}
    )
    ids = [right("a joy to watch")["input_ids"]]
    for held in ({"a": other, "b": right}, {"a": right, "b": other}):
        assert find_tokenizer([Holder(**held)], shown=Shown(None, None, ids)) is right


def test_a_metrics_tokenizer_is_not_taken() -> None:
    class Metric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = Words("metric")

    Metric.__module__ = "torchmetrics.text.bert"

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.similarity = Metric()

    holders = [Module(), Holder(tokenizer=Words("own"))]
    assert find_tokenizer(holders, shown=Shown("bert", encoder(), IDS)).language == "own"
    assert find_tokenizer(holders[:1]).language == "metric"
    assert find_tokenizer([Holder(rouge_tok=Words("rouge")), holders[1]]).language == "own"


def test_tokenizers_that_agree_are_no_matter() -> None:
    found = tokenizers_held([Holder(a=Words("en"), b=Words("en"))])
    assert not disagree(found, Shown("bert", None, IDS))
