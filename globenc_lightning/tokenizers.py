"""Tokens for people to read: whatever tokenizer is within reach, else token ids."""

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

SPACE = "▁"
"""Stands for a space that belongs to a token; one that begins with it begins a word."""
CONTINUED = "⋯"
"""Stands for the rest of a character that began in a token before."""
WORD_END = "</w>"
"""What ends the last token of a word, where a BPE marks ends and does not say with what."""

_SIGNS = str.maketrans({" ": SPACE, "\t": "⇥", **dict.fromkeys("\n\r\v\f\x85\u2028\u2029", "↵")})
_ROLES = ("cls", "sep", "pad", "mask", "unk", "bos", "eos")
_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")
_BYTE_LEVEL = b'"ByteLevel"'
_METRICS = ("torchmetrics", "evaluate", "bert_score", "rouge_score", "sacrebleu")
_MEASURES = frozenset({"metric", "metrics", "score", "scorer", "rouge", "bleu"})
# Words in the names of what holds a tokenizer: for what an encoder reads, and for what somebody else does.
_READS = frozenset({"source", "src", "encoder", "enc", "input", "student", "query", "question"})
_OTHERS = frozenset({"target", "tgt", "decoder", "dec", "output", "label", "labels", "teacher", "generator", "old"})
# A character has four bytes at most, and a token may hold the end of one and the beginning of the next.
_LONGEST = 8
# How many texts are encoded again to tell whether a tokenizer made them.
_TRIED = 4


def as_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, or the one in a local folder (or local cache) of that name.

    Args:
        tokenizer: a Hugging Face tokenizer, or the path or name of one.

    Returns:
        The tokenizer; nothing is downloaded.

    Raises:
        ValueError: it is neither, or there is none of that name on this machine.
    """
    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        name, cause = os.fspath(tokenizer), None
        try:
            found = AutoTokenizer.from_pretrained(name, local_files_only=True)
            # A folder without a vocabulary still gives a tokenizer, of nothing but special tokens.
            if len(found) > len(found.all_special_ids):
                return found
        except Exception as error:
            cause = error
        raise ValueError(
            f"there is no tokenizer {name!r} on this machine; give the tokenizer itself, or the folder that "
            "tokenizer.save_pretrained(folder) wrote"
        ) from cause
    if not _is_tokenizer(tokenizer):
        raise ValueError(
            f"tokenizer must be a Hugging Face tokenizer or the name of one, not a {type(tokenizer).__name__}"
        )
    return tokenizer


class Held(NamedTuple):
    """A tokenizer that is within reach.

    Attributes:
        name: what holds it is called: an attribute, an argument, a key.
        tokenizer: the tokenizer.
        measures: whether it belongs to a metric.
    """

    name: str
    tokenizer: Any
    measures: bool


class Shown(NamedTuple):
    """What is known of the text whose tokens are to be named.

    Attributes:
        path: the path of the encoder in the module, or None.
        encoder: the encoder, or None.
        ids: the token ids of some examples.
    """

    path: str | None = None
    encoder: nn.Module | None = None
    ids: Sequence[Sequence[int]] = ()


def find_tokenizer(
    holders: Iterable[Any], encoders: Iterable[nn.Module] = (), shown: Shown | None = None
) -> Any | None:
    """Look for a tokenizer where training scripts keep theirs.

    Args:
        holders: objects that may hold one: module, datamodule, dataset, collate function.
        encoders: models whose checkpoint folder may hold one.
        shown: what is known of the text whose tokens are named.

    Returns:
        The one that belongs to what is shown; of equally likely ones the first; None where there is none.
    """
    found = tokenizers_held(holders)
    if found:
        return likeliest(found, shown or Shown()).tokenizer
    for encoder in encoders:
        name = getattr(getattr(encoder, "config", None), "name_or_path", None)
        if name:
            try:
                return as_tokenizer(name)
            except ValueError:
                continue
    return None


def tokenizers_held(holders: Iterable[Any]) -> list[Held]:
    """The tokenizers that objects hold, in their order, each once.

    Args:
        holders: objects that may hold one: module, datamodule, dataset, collate function.
    """
    found: list[Held] = []
    for holder in holders:
        for name, candidate, owner in _within(holder):
            if _is_tokenizer(candidate) and all(one.tokenizer is not candidate for one in found):
                package = type(owner).__module__.partition(".")[0]
                measures = package in _METRICS or bool(_MEASURES & set(_words(name)))
                found.append(Held(name, candidate, measures))
    return found


def likeliest(found: Sequence[Held], shown: Shown) -> Held:
    """Of several tokenizers the one that made the ids of the text that is shown, as far as that can be told.

    In this order: not a metric's; one that knows all ids; one of the encoder's own name; one that makes the same ids of
    their text again; one with as many tokens as the encoder has embeddings; one whose name goes with the encoder's
    path, or that of what is read rather than written; the first.

    Args:
        found: the tokenizers, at least one.
        shown: what is known of the text.
    """
    return max(found, key=lambda one: _likeliness(one, shown))


def disagree(found: Sequence[Held], shown: Shown) -> bool:
    """Whether tokenizers name the tokens of a text differently, as far as it is known."""
    if not shown.ids:
        looks = {(type(one.tokenizer).__name__, len(one.tokenizer), _own_name(one.tokenizer)) for one in found}
        return len(looks) > 1 or (len(found) > 1 and not _own_name(found[0].tokenizer))
    return len({tuple(tuple(tokens_of(ids, one.tokenizer)) for ids in shown.ids) for one in found}) > 1


def tokens_of(ids: Sequence[int], tokenizer: Any | None) -> list[str]:
    """Token ids as tokens that people can read, or as numbers where no tokenizer knows them.

    Tokens are shown as text, not in the tokenizer's internal spelling, and every token has a name that is not empty:

    - ``▁`` stands for a space that belongs to the token, so it begins a word: ``▁Café`` for SentencePiece's ``▁Café``,
      for byte-level BPE's ``ĠCafÃ©``, and for ``Café</w>`` of a BPE that marks the ends of words. WordPiece marks what
      continues a word instead, and its ``##`` stays, as do the marks of tokenizers of other kinds.
    - ``↵`` and ``⇥`` stand for line ends and tabs.
    - A character whose bytes are spread over several tokens is shown by the first of them; ``⋯`` stands in the others
      for their part of it. Bytes that make no character are shown as ``<0xE2>``.
    - Special tokens are shown as they are: ``[CLS]``, ``<s>``. Those that cannot be seen are shown by their role.

    Where it is not known whether a tokenizer spells bytes, its decoder is asked; where that raises, or says something
    else, tokens are shown as the tokenizer spells them.

    Args:
        ids: (k,) token ids.
        tokenizer: a tokenizer or None.

    Returns:
        One string per token.
    """
    return naming(tokenizer)(ids)


def naming(tokenizer: Any | None) -> Callable[[Sequence[int]], list[str]]:
    """Return :func:`tokens_of` for one tokenizer, which is looked at once: for those who name many sequences."""
    if tokenizer is None:
        return lambda ids: [str(token) for token in ids]
    vocabulary = _Vocabulary(tokenizer)
    return lambda ids: _named([int(token) for token in ids], vocabulary)


def spelling_of(ids: Sequence[int], tokenizer: Any | None) -> list[str]:
    """Token ids as the tokenizer spells its tokens internally, the names that earlier versions stored.

    Args:
        ids: (k,) token ids.
        tokenizer: a tokenizer or None.

    Returns:
        One string per token.
    """
    known = len(tokenizer) if tokenizer is not None else 0
    return [
        str(tokenizer.convert_ids_to_tokens(int(token))) if tokenizer is not None and 0 <= token < known else str(token)
        for token in ids
    ]


class _Piece(NamedTuple):
    """One entry of a vocabulary.

    Attributes:
        spelling: how the tokenizer spells it.
        body: the same without the mark of a word's end.
        name: what is shown, or None where that depends on its neighbours or on the decoder.
        data: the bytes that it may stand for, where it has no name.
        certain: whether it does stand for them, whatever the decoder says.
        ends: whether it ends a word, in a vocabulary that marks the ends of words.
        within: whether it is part of a text, and no special or added token.
    """

    spelling: str
    body: str
    name: str | None = None
    data: bytes = b""
    certain: bool = True
    ends: bool = False
    within: bool = True


class _Vocabulary:
    """A tokenizer's vocabulary: how its tokens are spelled, each looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.special = _ids_of(tokenizer, "all_special_ids")
        self.added = _ids_of(tokenizer, "added_tokens_decoder")
        self.byte_level, self.word_end = _structure(tokenizer)
        self.pieces: dict[int, _Piece] = {}

    def piece(self, token: int) -> _Piece:
        if token not in self.pieces:
            self.pieces[token] = self._piece(token)
        return self.pieces[token]

    def _piece(self, token: int) -> _Piece:
        spelling: Any = None
        if 0 <= token < self.size:
            try:
                spelling = self.tokenizer.convert_ids_to_tokens(token)
            except Exception:
                # An id in a hole of the vocabulary.
                spelling = None
        if isinstance(spelling, list | tuple) and len(spelling) == 1:
            spelling = spelling[0]
        if spelling is None or len(text := _text(spelling)) == 0:
            return _Piece(str(token), str(token), str(token), within=False)
        if token in self.special:
            return _Piece(text, text, text if text.isprintable() else self._role(token, text), within=False)
        if isinstance(spelling, bytes | bytearray):
            return _of_bytes(text, text, bytes(spelling))
        if byte := _FALLBACK.fullmatch(text):
            return _of_bytes(text, text, bytes.fromhex(byte[1]))
        if token in self.added:
            return _Piece(text, text, _as_written(text), within=False)
        body = text.removesuffix(self.word_end) if self.word_end else text
        ends = body != text
        # A vocabulary may hold the mark of a word's end alone.
        body = body or text
        if self.byte_level is not False:
            letters = _byte_letters()
            if all(letter in letters for letter in body):
                data = bytes(letters[letter] for letter in body)
                return _of_bytes(text, body, data, bool(self.byte_level) or body.isascii(), ends)
        return _Piece(text, body, _as_written(body), ends=ends)

    def _role(self, token: int, text: str) -> str:
        """What a special token that cannot be seen is for: CANINE's are private code points."""
        roles = [role for role in _ROLES if getattr(self.tokenizer, f"{role}_token_id", None) == token]
        return f"[{roles[0].upper()}]" if roles else text


def _structure(tokenizer: Any) -> tuple[bool | None, str]:
    """How a vocabulary is spelled.

    Args:
        tokenizer: the tokenizer.

    Returns:
        Whether letters stand for bytes, None where only the decoder knows; and what ends a word's last token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None, WORD_END
    try:
        word_end = str(getattr(backend.model, "end_of_word_suffix", None) or "")
        before = [getattr(backend, part, None) for part in ("normalizer", "pre_tokenizer")]
        if any(_BYTE_LEVEL in bytes(part.__getstate__()) for part in before if part is not None):
            return True, word_end
        decoder = backend.decoder
        return None if decoder is not None and _BYTE_LEVEL in bytes(decoder.__getstate__()) else False, word_end
    except Exception:
        # Parts that are written in Python do not tell what they are.
        return None, WORD_END


def _ids_of(tokenizer: Any, name: str) -> frozenset[int]:
    try:
        return frozenset(int(token) for token in getattr(tokenizer, name, ()))
    except Exception:
        return frozenset()


def _text(spelling: Any) -> str:
    return spelling.decode("utf-8", "replace") if isinstance(spelling, bytes | bytearray) else str(spelling)


@functools.lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letters that byte-level vocabularies spell bytes with: GPT-2's, and the code points 0 to 255 of ByT5."""
    letters = {chr(byte): byte for byte in range(256)}
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + place): byte for place, byte in enumerate(unprintable)}


def _of_bytes(spelling: str, body: str, data: bytes, certain: bool = True, ends: bool = False) -> _Piece:
    name = None
    if certain:
        try:
            name = _shown(data.decode("utf-8"))
        except UnicodeDecodeError:
            # Its characters are completed by its neighbours.
            name = None
    return _Piece(spelling, body, name, data, certain, ends)


def _shown(text: str) -> str:
    return text.replace("\r\n", "\n").translate(_SIGNS)


def _as_written(text: str) -> str:
    """The name of a token that is spelled as its text: spaces inside are the text's own."""
    inner = text.strip(" ")
    before, after = text.split(inner, 1) if inner else (text, "")
    return f"{_shown(before)}{' '.join(map(_shown, inner.split(' ')))}{_shown(after)}"


def _named(ids: list[int], vocabulary: _Vocabulary) -> list[str]:
    pieces = [vocabulary.piece(token) for token in ids]
    names = [piece.body if piece.name is None else piece.name for piece in pieces]
    start = 0
    while start < len(pieces):
        first, end = pieces[start], start + 1
        if first.name is None:
            while end < len(pieces) and _continues(pieces[end - 1], pieces[end]):
                end += 1
            names[start:end] = _run(ids[start:end], pieces[start:end], vocabulary.tokenizer)
        elif _is_replaced(first):
            while end < len(pieces) and _is_replaced(pieces[end]):
                end += 1
            names[start:end] = _replaced(ids[start:end], pieces[start:end], vocabulary.tokenizer)
        start = end
    return _with_word_beginnings(names, pieces) if vocabulary.word_end else names


def _continues(before: _Piece, piece: _Piece) -> bool:
    """Whether the bytes of a piece may go on with a character of the piece before."""
    return piece.name is None and piece.certain == before.certain and not before.ends


def _is_replaced(piece: _Piece) -> bool:
    """Whether the tokenizer spells a piece with the sign for bytes that make no character."""
    return piece.name is not None and piece.within and "\ufffd" in piece.spelling


def _run(ids: list[int], pieces: list[_Piece], tokenizer: Any) -> list[str]:
    """The names of neighbours that may all stand for bytes."""
    data = [piece.data for piece in pieces]
    if not pieces[0].certain:
        text = b"".join(data).decode("utf-8", "ignore")
        if not _decoder_says(text, ids, [piece.spelling for piece in pieces], tokenizer):
            return [_shown(piece.body) for piece in pieces]
    return [_shown(part) for part in _characters(data)]


def _characters(data: list[bytes]) -> list[str]:
    """The characters of a text in UTF-8 whose bytes are spread over tokens, each where its first byte is.

    Args:
        data: (k,) every token's bytes.

    Returns:
        (k,) the characters that begin in each token, after a sign for those that end in it.
    """
    joined = b"".join(data)
    owner = [place for place, part in enumerate(data) for _ in part]
    parts: list[list[str]] = [[] for _ in data]
    place = 0
    while place < len(joined):
        lead = joined[place]
        size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        try:
            character = joined[place : place + size].decode("utf-8")
        except UnicodeDecodeError:
            size, character = 1, f"<0x{lead:02X}>"
        parts[owner[place]].append(character)
        for further in sorted(set(owner[place + 1 : place + size]) - {owner[place]}):
            parts[further].append(CONTINUED)
        place += size
    return ["".join(part) for part in parts]


def _decoder_says(text: str, ids: list[int], spelling: list[str], tokenizer: Any) -> bool:
    """Whether the decoder makes this text of a run of tokens; spaces, which decoders add and strip, do not count."""
    for name, tokens in (("convert_tokens_to_string", spelling), ("decode", ids)):
        said = _decoded(tokenizer, name, tokens)
        if said is not None and "".join(said.replace("\ufffd", "").split()) == "".join(text.split()):
            return True
    return False


def _decoded(tokenizer: Any, name: str, tokens: list[Any]) -> str | None:
    try:
        said = getattr(tokenizer, name)(tokens)
    except Exception:
        # A decoder that fails has nothing to say.
        return None
    return said if isinstance(said, str) else None


def _replaced(ids: list[int], pieces: list[_Piece], tokenizer: Any) -> list[str]:
    """The names of neighbours whose tokenizer lost their bytes but may decode them together."""
    names = [_shown(piece.spelling) for piece in pieces]
    start = 0
    while start < len(pieces):
        for end in range(start + 1, min(start + _LONGEST, len(pieces)) + 1):
            text = _decoded(tokenizer, "decode", ids[start:end])
            spelled = "".join(piece.spelling for piece in pieces[start:end])
            # Every character takes the place of a sign at least; the others stay.
            whole = text is not None and "\ufffd" not in text and 0 < len(text) <= len(spelled)
            if text and whole and all(part.strip() in text for part in spelled.split("\ufffd")):
                space = SPACE if spelled.startswith(" ") and not text.startswith(" ") else ""
                names[start:end] = [space + _shown(text), *[CONTINUED] * (end - start - 1)]
                start = end - 1
                break
        start += 1
    return names


def _with_word_beginnings(names: list[str], pieces: list[_Piece]) -> list[str]:
    """The names with a mark where a word begins, for a vocabulary that marks where words end."""
    if not any(piece.ends for piece in pieces):
        return names
    begins, marked = True, []
    for name, piece in zip(names, pieces, strict=True):
        marked.append(SPACE + name if begins and piece.within and not name.startswith(SPACE) else name)
        begins = piece.ends or not piece.within
    return marked


def _is_tokenizer(candidate: Any) -> bool:
    return callable(getattr(candidate, "convert_ids_to_tokens", None)) and hasattr(candidate, "__len__")


def _likeliness(one: Held, shown: Shown) -> tuple[float, ...]:
    tokenizer, encoder = one.tokenizer, shown.encoder
    largest = max((max(ids, default=0) for ids in shown.ids), default=0)
    name = getattr(getattr(encoder, "config", None), "name_or_path", None)
    return (
        not one.measures,
        largest < len(tokenizer),
        bool(name) and _own_name(tokenizer) == name,
        _made_again(tokenizer, shown.ids),
        _embeddings(encoder) == len(tokenizer),
        _goes_with(one.name, shown.path),
    )


def _own_name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or "")


def _embeddings(encoder: nn.Module | None) -> int | None:
    try:
        table = encoder.get_input_embeddings()  # type: ignore[union-attr, operator]
    except (AttributeError, NotImplementedError):
        return None
    return getattr(table, "num_embeddings", None)


def _made_again(tokenizer: Any, texts: Sequence[Sequence[int]]) -> float:
    """The share of some texts' ids that a tokenizer makes again of the text that it decodes them to."""
    special = _ids_of(tokenizer, "all_special_ids")
    made = 0
    for ids in texts[:_TRIED]:
        own = [token for token in ids if token not in special]
        try:
            again = tokenizer.encode(tokenizer.decode(own), add_special_tokens=False)
        except Exception:
            # One that cannot encode, or does not know the ids.
            return 0.0
        made += list(again) == own
    return made / max(1, len(texts[:_TRIED]))


def _goes_with(name: str, path: str | None) -> float:
    """How well the name of what holds a tokenizer goes with an encoder's path."""
    words = set(_words(name)) - {"tokenizer", "tokenizers", "tok", "self"}
    parts = set(_words(path or ""))
    if words & parts:
        return 2.0
    return 1.0 if words & _READS else -1.0 if words & _OTHERS else 0.0


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()) if word]


def _within(holder: Any) -> Iterator[tuple[str, Any, Any]]:
    """The objects that a holder refers to by itself, one level deep: what each is called, the object, its owner."""
    if holder is None:
        return
    yield type(holder).__name__, holder, holder
    if isinstance(holder, functools.partial):
        yield from (("", one, holder) for one in holder.args)
        yield from ((name, one, holder) for name, one in holder.keywords.items())
        yield from _within(holder.func)
    yield from _named_values(getattr(holder, "__dict__", {}), holder)
    owner = getattr(holder, "__self__", None)
    yield type(owner).__name__, owner, owner
    yield from _named_values(getattr(owner, "__dict__", {}), owner)
    names = getattr(getattr(holder, "__code__", None), "co_freevars", ())
    for place, cell in enumerate(getattr(holder, "__closure__", None) or ()):
        try:
            yield names[place] if place < len(names) else "", cell.cell_contents, holder
        except ValueError:
            # A variable of an enclosing function that was never assigned.
            continue
    if isinstance(holder, nn.Module):
        for path, child in holder.named_modules():
            if child is not holder:
                yield from ((f"{path}.{name}", one, child) for name, one, _ in _named_values(vars(child), child))


def _named_values(values: Mapping[str, Any], owner: Any) -> Iterator[tuple[str, Any, Any]]:
    for name, value in list(values.items()):
        yield name, value, owner
        if isinstance(value, dict) and not name.startswith("_"):
            # {"source": ..., "target": ...}
            yield from ((f"{name}.{key}", one, owner) for key, one in value.items())
