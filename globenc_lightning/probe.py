"""The fixed examples that are looked at during a training, their tokens, and their place in a checkpoint."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from globenc_lightning.errors import EmptyProbeError, GlobEncWarning, ProbeError
from globenc_lightning.task.batches import leaves, needs_template, restored, stored
from globenc_lightning.task.calling import LABELS
from globenc_lightning.task.replaying import Part
from globenc_lightning.tokenizers import naming, spelling_of

Row = dict[str, Any]

# What tokenizers and processors call their entries that have one value per token.
TOKEN_ENTRIES = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "special_tokens_mask",
    "offset_mapping",
    "inputs_embeds",
    "bbox",
)
MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")

TEXTS, OTHERS = "input_ids and attention_mask", "pixel_values, input_values or input_features"


def _advice(names: str) -> str:
    return (
        f"Write the probe as a mapping of tensors under the names that models know ({names}); or give the batch as it "
        "is to GlobEncCallback, with forward=, a callable forward(module, batch) that returns the logits."
    )


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """A fixed set of examples, each kept without its padding on the CPU.

    Build one with :meth:`from_texts` or :meth:`from_batch`.

    Attributes:
        rows: one mapping per example: tensors without the example axis, token axes cut to the example's length.
        by_token: the names of the entries that have one value per token.
        padding: the name of each of those -> what it is padded with.
        tokens: one list of tokens per example (token ids as strings where no tokenizer is known).
        special: (k,) per example: true for special tokens; None where they are not known.
        texts: the texts, where the probe was made of texts.
        parts: the batches that the examples came in, where they are analysed as the user's own step gets them; then
            ``rows`` hold what the encoder was seen to be called with.
        tokenizer: what names further texts of those batches, or None.
        left: the names of those entries that have their padding at the left.
        widths: one mapping per example: how many tokens its batch had, padding included, by the entries' names. Heads
            may read padding, so it is put back; where nothing depends on it, the analysis cuts it off.
    """

    rows: tuple[Row, ...]
    by_token: frozenset[str]
    padding: Mapping[str, float] = field(default_factory=dict)
    tokens: tuple[tuple[str, ...], ...] = ()
    special: tuple[Tensor | None, ...] = ()
    texts: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    tokenizer: Any | None = None
    left: frozenset[str] = frozenset()
    widths: tuple[Mapping[str, int], ...] = ()

    @classmethod
    def from_parts(cls, parts: Sequence[Part]) -> "ProbeSet":
        """Examples in batches of any form, as a data loader gave them; what they say is seen when a step uses them."""
        return cls(tuple({} for part in parts for _ in range(part.wanted)), frozenset(), parts=tuple(parts))

    def seen(self, ids: Sequence[Tensor | None], labels: Sequence[Any]) -> "ProbeSet":
        """The same batches, with what the encoder was called with.

        Args:
            ids: (k,) the token ids of each example's text, or None.
            labels: what each example's label says, as a tensor, or None.

        Returns:
            The probe set.
        """
        rows: list[Row] = []
        # Inference tensors could never take part in a gradient: the clones are made outside that mode.
        with torch.inference_mode(False), torch.no_grad():
            for one, label in zip(ids, labels, strict=True):
                row = {} if one is None else {"input_ids": one.clone(), "attention_mask": torch.ones_like(one)}
                rows.append(row if label is None else {**row, "labels": label.clone()})
        fill = getattr(self.tokenizer, "pad_token_id", None)
        return replace(
            self,
            rows=tuple(rows),
            by_token=frozenset({"input_ids", "attention_mask"}),
            padding={} if fill is None else {"input_ids": fill},
        ).with_tokens(self.tokenizer)

    @property
    def is_seen(self) -> bool:
        """Whether it is known what the examples say."""
        return not self.parts or any(self.rows)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        tokenizer: Any,
        labels: Sequence[int] | None = None,
        max_length: int | None = None,
    ) -> "ProbeSet":
        """Examples from texts.

        Args:
            texts: the texts (b), not empty.
            tokenizer: a Hugging Face tokenizer.
            labels: (b) class indices, needed for ``target="label"``.
            max_length: cut texts to so many tokens; the tokenizer's own limit when None.

        Returns:
            The probe set.

        Raises:
            ProbeError: no texts, something that is no text, or not one label per text.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ProbeError("the probe is empty: give at least one text.")
        if not all(isinstance(text, str) for text in texts):
            raise ProbeError("the probe must be made of texts (str), a batch (a mapping of tensors) or a ProbeSet.")
        if labels is not None and len(labels) != len(texts):
            raise ProbeError(f"there are {len(texts)} texts and {len(labels)} labels; give one label per text.")
        rows: list[Row] = []
        by_token: set[str] = set()
        for index, text in enumerate(texts):
            encoded = tokenizer(text, truncation=True, max_length=max_length)
            by_token |= set(encoded)
            row: Row = {key: torch.tensor(value) for key, value in encoded.items()}
            if labels is not None:
                row["labels"] = torch.tensor(labels[index])
            rows.append(row)
        pad = getattr(tokenizer, "pad_token_id", None)
        probe = cls(
            tuple(rows),
            frozenset(by_token),
            {"input_ids": 0 if pad is None else pad},
            texts=tuple(texts),
            left=frozenset(by_token if getattr(tokenizer, "padding_side", "right") == "left" else ()),
        )
        return probe.with_tokens(tokenizer)

    @classmethod
    def from_batch(cls, batch: Any, limit: int | None = None, tokenizer: Any | None = None) -> "ProbeSet":
        """Examples from a batch, as a data loader gives it.

        Args:
            batch: a mapping with ``input_ids`` (b, s), ``attention_mask`` (b, s) if there is padding, and whatever
                else the model takes; ``(b, c, s)`` for ``c`` choices. Everything is cloned.
            limit: at most so many examples.
            tokenizer: for the tokens; ids are shown without one.

        Returns:
            The probe set. Rows that are all padding are left out.

        Raises:
            ProbeError: the batch is no mapping, has no ``input_ids``, or no example with a real token.
        """
        if not isinstance(batch, Mapping):
            raise ProbeError(
                f"the batch is a {type(batch).__name__}, not a mapping, so nobody can tell which of its entries are "
                f"the model's inputs. {_advice(f'{TEXTS}; {OTHERS}')}"
            )
        main = main_input(batch)
        if main is None:
            raise ProbeError(
                f"the batch holds no tensor of images or audio under a name that models know; it holds "
                f"{described(batch)}. {_advice(OTHERS)}"
                if _is_of_values(batch)
                else "the batch holds no input_ids of shape (examples, tokens); it holds "
                f"{described(batch)}. {_advice(TEXTS)}"
            )
        size = len(batch[main])
        # Inference tensors could never take part in a gradient: the clones are made outside that mode.
        with torch.inference_mode(False), torch.no_grad():
            masks = _masks(batch)
            by_token: dict[str, Tensor] = {}
            for prefix, mask in masks.items():
                if mask.dim() == 3:
                    # Several choices of each example stay as they are.
                    continue
                by_token.update({k: mask for k, v in batch.items() if k.startswith(prefix) and is_by_token(k, v, mask)})
            padding = {
                key: float(batch[key].cpu()[~mask].flatten()[0]) for key, mask in by_token.items() if not mask.all()
            }
            left = {key for key, mask in by_token.items() if _is_padded_at_the_left(mask)}
            rows: list[Row] = []
            for index in range(size):
                if limit is not None and len(rows) >= limit:
                    break
                if all(bool(mask[index].any()) for mask in masks.values()):
                    kept = {key: _real(mask[index], key in left) for key, mask in by_token.items()}
                    rows.append({key: _row(value, index, size, kept.get(key)) for key, value in batch.items()})
        if not rows and limit != 0:
            raise EmptyProbeError("the probe is empty: the batch has no example with a real token.")
        widths = {key: mask.shape[1] for key, mask in by_token.items()}
        probe = cls(tuple(rows), frozenset(by_token), padding, left=frozenset(left), widths=(widths,) * len(rows))
        return probe.with_tokens(tokenizer)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], template: Any = None, templates: Mapping[int, Any] | None = None
    ) -> "ProbeSet":
        """The probe set that :meth:`state_dict` was called on.

        Args:
            state: what it returned.
            template: a batch of the same form, for those that hold dataclasses or named tuples.
            templates: such a batch of each data loader, by the loader's number; loaders may give batches of different
                classes. The template where a loader has none here.

        Raises:
            ProbeError: such a template is needed, and none was given.
        """
        rows = tuple(
            {**one["entries"], **{key: _Constant(value) for key, value in one["constants"].items()}}
            for one in state["rows"]
        )
        return cls(
            rows,
            frozenset(state["by_token"]),
            dict(state["padding"]),
            tuple(tuple(tokens) for tokens in state["tokens"]),
            tuple(state["special"]),
            tuple(state["texts"]),
            tuple(
                Part(
                    restored(one["batch"], (templates or {}).get(one["loader"], template)),
                    one["place"],
                    one["loader"],
                    one["wanted"],
                    tuple(one.get("skipped", ())),
                )
                for one in state.get("parts", ())
            ),
            left=frozenset(state.get("left", ())),
            widths=tuple(dict(one) for one in state.get("widths", ())),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything in tensors and primitives, for a checkpoint that loads with ``weights_only=True``.

        Entries of a batch that are neither (images of a library of their own, say) are left out, with a warning.
        """
        rows: list[dict[str, Any]] = []
        left_out: set[str] = set()
        for row in self.rows:
            parts: dict[str, Any] = {"entries": {}, "constants": {}}
            for key, value in row.items():
                part = "constants" if isinstance(value, _Constant) else "entries"
                try:
                    parts[part][_storable(key)] = _storable(value.value if isinstance(value, _Constant) else value)
                except TypeError:
                    left_out.add(str(key))
            rows.append(parts)
        if left_out:
            warnings.warn(
                f"the probe's entries {', '.join(sorted(left_out))} are neither tensors nor primitives, so they do not "
                "travel in checkpoints.",
                GlobEncWarning,
                stacklevel=2,
            )
        return {
            "rows": rows,
            "by_token": sorted(self.by_token),
            "padding": {key: float(value) for key, value in self.padding.items()},
            "tokens": [[str(token) for token in tokens] for tokens in self.tokens],
            "special": list(self.special),
            "texts": [str(text) for text in self.texts],
            "parts": [
                {**part._asdict(), "batch": stored(part.batch), "skipped": list(part.skipped)} for part in self.parts
            ],
            "left": sorted(self.left),
            "widths": [dict(one) for one in self.widths],
        }

    def fingerprint(self) -> str:
        """A few letters that tell this set from others: of its texts if it was made of texts, else of its rows."""
        if self.parts:
            return fingerprint([leaf for part in self.parts for _, leaf in leaves(part.batch)])
        # Earlier versions kept the padding at the left.
        rows = [self._with_padding_at_the_left(index) for index in range(len(self))]
        return fingerprint(self.texts or [[value for _, value in sorted(row.items())] for row in rows])

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.rows)

    def lengths(self) -> list[int]:
        """How many tokens each example has; an example that has none (an image, say) counts 256."""
        if self.parts and not self.is_seen:
            return [_width(part.batch) for part in self.parts for _ in range(part.wanted)]
        mains = [(row, main_input(row)) for row in self.rows]
        return [len(row[main]) if main is not None and main in self.by_token else 256 for row, main in mains]

    @property
    def is_named(self) -> bool:
        """Whether a tokenizer has named its tokens, so that special tokens are known."""
        return any(marks is not None for marks in self.special)

    def joined(self, other: "ProbeSet") -> "ProbeSet":
        """This set's examples, then the other's; the other's only if they have the same entries, of the same shapes."""
        if len(self) and (self.by_token != other.by_token or self._shapes() != other._shapes()):
            return self
        return replace(
            self,
            rows=self.rows + other.rows,
            by_token=self.by_token | other.by_token,
            padding={**other.padding, **self.padding},
            tokens=self.tokens + other.tokens,
            special=self.special + other.special,
            texts=self.texts + other.texts,
            left=self.left | other.left,
            widths=self.widths + other.widths,
        )

    def _shapes(self) -> dict[str, Any]:
        """The entries of the examples, and the shapes of those that must agree to stand in one batch."""
        return {
            key: tuple(value.shape) if isinstance(value, Tensor) and key not in self.by_token else None
            for key, value in self.rows[0].items()
        }

    def with_tokens(self, tokenizer: Any | None) -> "ProbeSet":
        """The same examples with the tokens of a tokenizer (see ``tokens_of``), or with token ids if it is None."""
        name = naming(tokenizer)
        # An unknown or masked word stands for a word of the text.
        words = {getattr(tokenizer, "unk_token_id", None), getattr(tokenizer, "mask_token_id", None)}
        known = set(getattr(tokenizer, "all_special_ids", ())) - words
        tokens, special = [], []
        for row, ids in zip(self.rows, self._ids(), strict=True):
            tokens.append(tuple(name(ids)))
            marks = row.get("special_tokens_mask")
            if marks is None and tokenizer is not None:
                marks = torch.tensor([token in known for token in ids])
            special.append(None if marks is None else marks.bool())
        return replace(self, tokens=tuple(tokens), special=tuple(special), tokenizer=tokenizer)

    def marks_special(self, ids: Tensor) -> Tensor:
        """Which of token ids are special, in the same shape; none where no tokenizer is known."""
        words = {getattr(self.tokenizer, "unk_token_id", None), getattr(self.tokenizer, "mask_token_id", None)}
        known = sorted(set(getattr(self.tokenizer, "all_special_ids", ())) - words)
        return torch.isin(ids, torch.tensor(known, dtype=ids.dtype, device=ids.device))

    def is_named_by(self, tokenizer: Any) -> bool:
        """Whether its tokens are those of a tokenizer, as they are named now or as earlier versions spelled them."""
        name = naming(tokenizer)
        return all(
            tokens == tuple(name(ids)) or tokens == tuple(spelling_of(ids, tokenizer))
            for tokens, ids in zip(self.tokens, self._ids(), strict=True)
        )

    def some_ids(self, most: int = 4) -> list[list[int]]:
        """The token ids of some examples, as far as they are known: of rows, or of what looks like ids in batches."""
        if self.is_seen:
            return [ids for ids in self._ids() if ids][:most]
        found: list[list[int]] = []
        for part in self.parts:
            texts = [
                leaf
                for path, leaf in leaves(part.batch)
                if isinstance(leaf, Tensor) and leaf.dim() == 2 and str(path[-1:]).find("input_ids") >= 0
            ]
            for row in texts[0].tolist() if texts and not texts[0].is_floating_point() else []:
                found.append(row)
        return found[:most]

    def _ids(self) -> list[list[int]]:
        """Every example's token ids, as many as it has."""
        mains = [main_input(row) for row in self.rows]
        return [
            row[main].tolist() if main is not None and main.endswith("input_ids") and row[main].dim() == 1 else []
            for row, main in zip(self.rows, mains, strict=True)
        ]

    def batches(self, max_tokens: int = 4096, chosen: Sequence[int] | None = None) -> Iterator[tuple[list[int], Row]]:
        """The examples in batches of similar length, so that little work goes into padding.

        Args:
            max_tokens: at most so many tokens a batch, padding included (but at least one example); examples that have
                no tokens count 256 each.
            chosen: the indices of the examples; all of them when None.

        Yields:
            The examples' indices, and the batch.
        """
        lengths = [tuple(len(row[key]) for key in sorted(self.by_token & set(row))) for row in self.rows]
        indices = range(len(self)) if chosen is None else chosen
        order = sorted(indices, key=lambda index: max(lengths[index], default=0), reverse=True)
        entries = self.rows[0] if self.rows else {}
        masked = {key.removesuffix("attention_mask") for key in entries if key.endswith("attention_mask")}
        paddable = all(any(key.startswith(prefix) for prefix in masked) for key in self.by_token)
        while order:
            first = lengths[order[0]]
            size = max(1, max_tokens // (max(1, *first) if first else 256))
            chunk = sorted(i for i in order[:size] if paddable or lengths[i] == first)
            order = [i for i in order if i not in chunk]
            yield chunk, self._collate(chunk)

    def names(self, index: int, length: int, ids: Tensor | None = None) -> tuple[str, ...]:
        """What to write below an example's positions.

        Args:
            index: the example.
            length: the number of its positions.
            ids: (k,) the token ids that the encoder was called with, if it was called with any.

        Returns:
            The tokens; the positions where the example has no tokens, or the encoder saw another text of it.
        """
        main = main_input(self.rows[index])
        own = self.rows[index][main] if main is not None else None
        same = ids is None or (
            isinstance(own, Tensor) and own.dim() == 1 and torch.equal(own[:length], ids[:length].to(own.device))
        )
        several = isinstance(own, Tensor) and own.dim() > 1
        if (self.parts or several) and ids is not None and not same:
            # Another of several texts of the example.
            return tuple(naming(self.tokenizer)(ids[:length].tolist()))
        tokens = self.tokens[index] if index < len(self.tokens) else ()
        return tokens[:length] if same and len(tokens) >= length else tuple(str(place) for place in range(length))

    def _collate(self, chunk: Sequence[int]) -> Row:
        batch: Row = {}
        for key in self.rows[chunk[0]]:
            values = [self.rows[index][key] for index in chunk]
            if key in self.by_token:
                length = self._width(chunk, key, max(len(value) for value in values))
                fill = self._fill(key)
                batch[key] = torch.stack([_padded(value, length, fill, key in self.left) for value in values])
            elif all(isinstance(value, Tensor) for value in values):
                batch[key] = torch.stack(values)
            else:
                batch[key] = values[0].value if isinstance(values[0], _Constant) else values
        return batch

    def _fill(self, key: str) -> float:
        return self.padding.get(key, -100 if key in LABELS else 0)

    def _width(self, chunk: Sequence[int], key: str, longest: int) -> int:
        """How many tokens an entry of a batch has, padding included."""
        given = [self.widths[index].get(key, 0) for index in chunk if index < len(self.widths)]
        return max([longest, *given])

    def _with_padding_at_the_left(self, index: int) -> Row:
        row = dict(self.rows[index])
        for key in self.left & set(row) if index < len(self.widths) else ():
            row[key] = _padded(row[key], max(len(row[key]), self.widths[index][key]), self._fill(key), True)
        return row

    def special_tokens(self, chunk: Sequence[int]) -> Tensor | None:
        """Which tokens of a batch are special, (b, s), true at padding too; None where it is not known of all."""
        known = [mark for mark in (self.special[index] for index in chunk) if mark is not None]
        if len(known) < len(chunk):
            return None
        main = main_input(self.rows[chunk[0]]) or ""
        length = self._width(chunk, main, max(len(mark) for mark in known))
        return torch.stack([_padded(mark.bool(), length, 1, main in self.left) for mark in known])


@dataclass(frozen=True)
class _Constant:
    """An entry of a batch that belongs to no example."""

    value: Any


def fingerprint(value: Any) -> str:
    """A few letters that are the same for the same tensors, texts and numbers, in any process."""
    digest = hashlib.sha256()
    for part in _bytes_of(value):
        digest.update(part)
    return digest.hexdigest()[:12]


def _is_of_values(batch: Mapping[str, Any]) -> bool:
    """Whether a batch's examples are numbers, as images and audio are, and no texts."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1]
    return bool(tensors) and all(value.is_floating_point() for value in tensors)


def described(batch: Mapping[str, Any]) -> str:
    """A batch's entries, with the shapes of those that are tensors."""
    entries = [
        f"{key} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else str(key)
        for key, value in batch.items()
    ]
    return ", ".join(entries) or "nothing"


def main_input(batch: Mapping[str, Any]) -> str | None:
    """The entry that the examples are counted by: token ids, else images or audio, under Hugging Face's names."""
    for name in MAIN_INPUTS:
        for key, value in batch.items():
            if str(key).endswith(name) and isinstance(value, Tensor) and value.dim() > 0:
                return str(key)
    return None


def loaders_waited_for(state: Mapping[str, Any], shown: Mapping[int, Any]) -> set[int]:
    """The data loaders that have to show a batch before a probe of a checkpoint can be put together.

    Args:
        state: what :meth:`ProbeSet.state_dict` returned.
        shown: a batch of each data loader that has shown one, by the loader's number.

    Returns:
        The numbers of those whose batches hold dataclasses or named tuples, which a checkpoint does not name.
    """
    parts = state.get("parts", ())
    return {part["loader"] for part in parts if needs_template(part["batch"])} - set(shown)


def _width(batch: Any) -> int:
    """How many tokens the texts of a batch have, as far as its form tells: the last axis of its first ids."""
    for _, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() >= 2 and not leaf.is_floating_point():
            return leaf.shape[-1]
    return 256


def _masks(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The mask of every text in a batch, (b, s), by what its entries' names begin with (query_input_ids)."""
    masks = {}
    for key in sorted((key for key in batch if str(key).endswith("input_ids")), key=len):
        prefix = key.removesuffix("input_ids")
        ids, given = batch[key], batch.get(prefix + "attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() not in (2, 3):
            raise ProbeError(f"the batch holds no {key} of shape (examples, tokens). {_advice(TEXTS)}")
        if isinstance(given, Tensor) and given.shape != ids.shape:
            raise ProbeError(
                f"{prefix}attention_mask must have the shape {tuple(ids.shape)}; it has {tuple(given.shape)}."
            )
        masks[prefix] = given.cpu().bool() if isinstance(given, Tensor) else torch.ones(ids.shape, dtype=torch.bool)
    return masks


def is_by_token(key: str, value: Any, mask: Tensor) -> bool:
    """Whether an entry of a batch has one value per token.

    Args:
        key: its name.
        value: the entry.
        mask: (b, s) the padding mask of the text.

    Returns:
        True if its first axes are (b, s) and it is one of a tokenizer's outputs, integers, or hidden states. A matrix
        of numbers that happens to be as wide as the text is long (table columns, multi-label targets) is none of
        these, nor is one of integers that differ where the text is padding.
    """
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[:2] != mask.shape:
        return False
    if any(key.endswith(name) for name in TOKEN_ENTRIES) or (key in LABELS and not value.is_floating_point()):
        return True
    if value.is_floating_point():
        return value.dim() > 2
    padding = value[~mask.bool().to(value.device)]
    return bool((padding == padding[:1]).all())


def _is_padded_at_the_left(mask: Tensor) -> bool:
    """Whether the texts of a mask (b, s) that are shorter than others all end with the last column."""
    real = mask[mask.any(1)]
    return len(real) > 0 and bool(real[:, -1].all()) and not bool(real[:, 0].all())


def _real(mask: Tensor, left: bool) -> slice:
    """The tokens of an example that are kept: without the padding at one side."""
    used = mask.nonzero().flatten()
    return slice(int(used[0]) if left else 0, int(used[-1]) + 1)


def _row(value: Any, index: int, size: int, kept: slice | None) -> Any:
    if isinstance(value, Tensor):
        if value.dim() == 0 or len(value) != size:
            return _Constant(value.detach().cpu().clone())
        return value[index].detach().cpu()[kept].clone() if kept is not None else value[index].detach().cpu().clone()
    if isinstance(value, list | tuple) and len(value) == size:
        return value[index]
    return _Constant(value)


def _padded(value: Tensor, length: int, fill: float, left: bool) -> Tensor:
    out = value.new_full((length, *value.shape[1:]), fill)
    out[length - len(value) if left else 0 :][: len(value)] = value
    return out


def _bytes_of(value: Any) -> Iterator[bytes]:
    if isinstance(value, _Constant):
        value = value.value
    if isinstance(value, Tensor):
        yield f"{tuple(value.shape)}{value.dtype}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}]".encode()
        for one in value:
            yield from _bytes_of(one)
    elif isinstance(value, str | int | float | None):
        text = repr(value).encode()
        yield f"{len(text)}:".encode() + text
    else:
        # Its repr may hold an address, which is another one in every process.
        yield type(value).__name__.encode()


def _storable(value: Any) -> Any:
    """The same in plain tensors and primitives; raises TypeError where that cannot be."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    for kind in (str, int, float):
        if isinstance(value, kind):
            # Subclasses, numpy's among them, would not be loaded.
            return kind(value)
    if isinstance(value, list | tuple):
        return [_storable(one) for one in value]
    if isinstance(value, Mapping):
        return {_storable(key): _storable(one) for key, one in value.items()}
    raise TypeError(type(value).__name__)
