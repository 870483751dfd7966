import copy
import pickle
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from globenc_lightning import ProbeSet, attribute
from globenc_lightning.errors import ProbeError
from globenc_lightning.probe import is_by_token, loaders_waited_for
from globenc_lightning.task.replaying import Part
from globenc_lightning.tokenizers import spelling_of
from tests import models
from tests.vocabulary import bert_tokenizer, byte_level_tokenizer

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "joy", "to", "watch", "dull", "##er", "film", ".")


@pytest.fixture
def tokenizer() -> Any:
    return bert_tokenizer({word: index for index, word in enumerate(WORDS)})


def lengths(probe: ProbeSet) -> list[int]:
    return [len(row["input_ids"]) for row in probe.rows]


def special(probe: ProbeSet) -> list[Any]:
    return [None if marks is None else marks.tolist() for marks in probe.special]


def ids(probe: ProbeSet) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in probe.rows]


# ---- from texts


def test_texts(tokenizer: Any) -> None:
    probe = ProbeSet.from_texts(["a joy to watch", "duller film ."], tokenizer, labels=[1, 0])
    assert len(probe) == 2
    assert probe.texts == ("a joy to watch", "duller film .")
    assert probe.tokens == (
        ("[CLS]", "a", "joy", "to", "watch", "[SEP]"),
        ("[CLS]", "dull", "##er", "film", ".", "[SEP]"),
    )
    assert ids(probe) == [[2, 5, 6, 7, 8, 3], [2, 9, 10, 11, 12, 3]]
    assert [row["labels"].item() for row in probe.rows] == [1, 0]
    assert special(probe)[0] == [True, False, False, False, False, True]


def test_one_text_is_one_example(tokenizer: Any) -> None:
    assert ProbeSet.from_texts("a joy", tokenizer).texts == ("a joy",)


def test_texts_are_cut_on_request(tokenizer: Any) -> None:
    probe = ProbeSet.from_texts(["a joy to watch a film", "a"], tokenizer, max_length=4)
    assert probe.tokens == (("[CLS]", "a", "joy", "[SEP]"), ("[CLS]", "a", "[SEP]"))


def test_an_empty_text_is_an_example(tokenizer: Any) -> None:
    probe = ProbeSet.from_texts(["", "a joy"], tokenizer)
    assert probe.tokens[0] == ("[CLS]", "[SEP]")


def test_unknown_and_masked_words_are_no_special_tokens(tokenizer: Any) -> None:
    probe = ProbeSet.from_texts(["a nonsense [MASK]"], tokenizer)
    assert probe.tokens == (("[CLS]", "a", "[UNK]", "[MASK]", "[SEP]"),)
    assert special(probe)[0] == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ([], None, "the probe is empty"),
        (["a", 3], None, "must be made of texts"),
        ([["a", "joy"]], None, "must be made of texts"),
        (["a", "joy"], [1], "2 texts and 1 labels"),
        (["a"], [1, 0], "1 texts and 2 labels"),
    ],
)
def test_texts_that_cannot_be_used(tokenizer: Any, texts: Any, labels: Any, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        ProbeSet.from_texts(texts, tokenizer, labels=labels)


# ---- from a batch


def batch(*extra: tuple[str, Any], width: int | None = None, pad: int = 0) -> dict[str, Any]:
    return {**models.batch((5, 3, 4), width, pad), **dict(extra)}


def test_padding_is_cut_off() -> None:
    given = batch(width=20)
    probe = ProbeSet.from_batch(given)
    assert lengths(probe) == [5, 3, 4]
    for index, row in enumerate(probe.rows):
        assert torch.equal(row["input_ids"], given["input_ids"][index, : len(row["input_ids"])])
        assert bool((row["attention_mask"] == 1).all())
    assert probe.tokens[1] == tuple(str(token) for token in given["input_ids"][1, :3].tolist())
    assert probe.special == (None, None, None)


@pytest.mark.parametrize("width", [5, 9])
@pytest.mark.parametrize("prefix", ["", "query_"])
def test_padding_stays_at_the_side_where_it_was(width: int, prefix: str) -> None:
    right = {f"{prefix}{key}": value for key, value in batch(width=width).items()}
    left = {key: value.flip(1) for key, value in right.items()}
    for given in (right, left):
        probe = ProbeSet.from_batch(given)
        assert probe.lengths() == [5, 3, 4]
        assert all(bool(row[f"{prefix}attention_mask"].all()) for row in probe.rows)
        # A checkpoint keeps it.
        for one in (probe, ProbeSet.from_state_dict(probe.state_dict())):
            ((_, again),) = one.batches()
            assert all(torch.equal(again[key], given[key]) for key in given)
            assert one.fingerprint() == probe.fingerprint()
    # Some of the examples alone, each as it was among the others.
    ((_, some),) = ProbeSet.from_batch(left).batches(chosen=[1, 2])
    assert torch.equal(some[f"{prefix}input_ids"], left[f"{prefix}input_ids"][1:])


def test_a_left_padded_probe_of_earlier_versions_has_the_same_fingerprint() -> None:
    given = {key: value.flip(1) for key, value in batch().items()}
    whole = ProbeSet(tuple({key: value[index] for key, value in given.items()} for index in range(3)), frozenset(given))
    assert ProbeSet.from_batch(given).fingerprint() == whole.fingerprint()


def test_texts_are_padded_at_the_tokenizers_side(tokenizer: Any) -> None:
    texts = ["a joy to watch", "dull"]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        ((_, made),) = ProbeSet.from_texts(texts, tokenizer).batches()
        expected = tokenizer(texts, padding=True, return_tensors="pt")
        assert torch.equal(made["attention_mask"], expected["attention_mask"])
        assert torch.equal(made["input_ids"], expected["input_ids"])


def test_special_tokens_of_a_left_padded_probe_stand_where_its_tokens_do(tokenizer: Any) -> None:
    tokenizer.padding_side = "left"
    given = tokenizer(["a joy to watch", "dull"], padding="max_length", max_length=9, return_tensors="pt")
    probe = ProbeSet.from_batch(given, tokenizer=tokenizer)
    assert probe.tokens[1] == ("[CLS]", "dull", "[SEP]")
    special = probe.special_tokens([0, 1])
    assert special is not None
    assert special[1].tolist() == [True] * 7 + [False, True]


def test_choices_stay_together() -> None:
    given = {key: value.view(1, 3, 5) for key, value in batch().items()}
    probe = ProbeSet.from_batch(given)
    ((_, again),) = probe.batches()
    assert len(probe) == 1
    assert all(torch.equal(again[key], given[key]) for key in given)


@pytest.mark.parametrize(("limit", "size"), [(None, 3), (0, 0), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_limit(limit: int | None, size: int) -> None:
    probe = ProbeSet.from_batch(batch(), limit)
    assert len(probe) == len(probe.tokens) == len(probe.special) == size


def test_rows_of_padding_do_not_count() -> None:
    given = batch()
    given["attention_mask"][0] = 0
    probe = ProbeSet.from_batch(given, limit=1)
    assert ids(probe) == [given["input_ids"][1, :3].tolist()]


def test_a_batch_of_padding_alone() -> None:
    given = batch()
    given["attention_mask"].zero_()
    with pytest.raises(ProbeError, match="no example with a real token"):
        ProbeSet.from_batch(given)


def test_a_batch_encoding(tokenizer: Any) -> None:
    encoded = tokenizer(["a joy to watch", "dull"], padding="max_length", max_length=12, return_tensors="pt")
    assert isinstance(encoded, BatchEncoding)
    probe = ProbeSet.from_batch(encoded, tokenizer=tokenizer)
    assert probe.tokens == (("[CLS]", "a", "joy", "to", "watch", "[SEP]"), ("[CLS]", "dull", "[SEP]"))
    assert set(probe.rows[0]) == {"input_ids", "attention_mask", "token_type_ids"}
    assert probe.by_token == {"input_ids", "attention_mask", "token_type_ids"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3)), "the batch is a tuple, not a mapping"),
        ([torch.ones(2, 3)], "the batch is a list, not a mapping"),
        (torch.ones(2, 3), "the batch is a Tensor, not a mapping"),
        ({"x": torch.ones(2, 3).long()}, r"no input_ids of shape \(examples, tokens\); it holds x of shape \(2, 3\)"),
        ({"input_ids": torch.ones(3)}, "no input_ids of shape"),
        ({"input_ids": torch.ones(2, 3, 4, 5)}, "no input_ids of shape"),
        ({"input_ids": [[1, 2]]}, "no input_ids of shape"),
    ],
)
def test_batches_that_cannot_be_used_name_what_to_give(wrong: Any, message: str) -> None:
    with pytest.raises(ProbeError, match=message) as raised:
        ProbeSet.from_batch(wrong)
    assert "input_ids and attention_mask" in str(raised.value)
    assert "a callable forward(module, batch) that returns the logits" in str(raised.value)
    # Nothing is known of the module here, so no line is offered that might not run.
    assert "lambda" not in str(raised.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": torch.ones(2, 3, 8, 8)},
        {"wave": torch.ones(2, 90)},
        {"frames": torch.ones(2, 4, 3, 8, 8), "label": torch.ones(2).long()},
    ],
)
def test_images_and_audio_are_not_told_about_texts(wrong: dict[str, Tensor]) -> None:
    with pytest.raises(ProbeError, match="pixel_values, input_values or input_features") as raised:
        ProbeSet.from_batch(wrong)
    assert "input_ids" not in str(raised.value)


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(ProbeError, match=r"attention_mask must have the shape \(3, 5\)"):
        ProbeSet.from_batch({**batch(), "attention_mask": torch.ones(3, 4)})


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_an_empty_batch(shape: tuple[int, int]) -> None:
    with pytest.raises(ProbeError, match="empty"):
        ProbeSet.from_batch({"input_ids": torch.zeros(shape, dtype=torch.long)})


def test_every_kind_of_entry_goes_with_its_row() -> None:
    vectors = torch.arange(30.0).view(3, 5, 2) * models.batch((5, 3, 4))["attention_mask"].unsqueeze(-1)
    given = batch(
        ("labels", torch.tensor([2, 0, 1])),
        ("text", ["first", "second", "third"]),
        ("weight", torch.tensor(0.5)),
        ("name", "validation"),
        ("features", torch.arange(6.0).view(3, 2)),
        ("word_vectors", vectors),
        ("nothing", None),
        ("pairs", [1, 2]),
    )
    probe = ProbeSet.from_batch(given)
    assert [row["text"] for row in probe.rows] == ["first", "second", "third"]
    assert [row["labels"].item() for row in probe.rows] == [2, 0, 1]
    assert probe.rows[1]["features"].tolist() == [2.0, 3.0]
    assert probe.rows[1]["word_vectors"].shape == (3, 2)
    assert probe.by_token == {"input_ids", "attention_mask", "word_vectors"}
    ((indices, again),) = probe.batches()
    assert indices == [0, 1, 2]
    assert again["text"] == ["first", "second", "third"]
    assert again["labels"].tolist() == [2, 0, 1]
    assert again["name"] == "validation"
    assert again["nothing"] is None
    assert again["pairs"] == [1, 2]
    assert torch.equal(again["features"], given["features"])
    assert torch.equal(again["word_vectors"], vectors)


def test_a_scalar_of_the_batch_stays_a_scalar() -> None:
    ((_, again),) = ProbeSet.from_batch(batch(("weight", torch.tensor(0.5)))).batches()
    assert torch.as_tensor(again["weight"]).shape == ()


def test_multi_label_targets_as_wide_as_the_text() -> None:
    targets = torch.tensor([[1.0, 0, 1, 0, 1], [0, 1, 0, 1, 1], [1, 1, 1, 0, 1]])
    probe = ProbeSet.from_batch(batch(("labels", targets)))
    assert "labels" not in probe.by_token
    ((_, again),) = probe.batches()
    assert torch.equal(again["labels"], targets)


def test_labels_of_tokens_are_padded_with_what_losses_ignore() -> None:
    given = batch(("labels", torch.arange(15).view(3, 5)))
    probe = ProbeSet.from_batch(given, limit=None)
    assert "labels" in probe.by_token
    ((_, again),) = probe.batches()
    assert again["labels"][0].tolist() == [0, 1, 2, 3, 4]
    assert again["labels"][1, :3].tolist() == [5, 6, 7]


def test_labels_of_tokens_are_padded_with_what_losses_ignore_where_no_padding_was_seen() -> None:
    left, right = (
        ProbeSet.from_batch({**models.batch((size,)), "labels": torch.ones(1, size).long()}) for size in (5, 3)
    )
    ((_, again),) = left.joined(right).batches()
    assert again["labels"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, -100, -100]]


def test_is_by_token() -> None:
    mask = torch.ones(3, 5).long()
    mask[1, 3:] = 0
    numbers = torch.arange(15).view(3, 5)
    assert is_by_token("input_ids", torch.ones(3, 5).long(), mask)
    assert is_by_token("query_position_ids", numbers, mask)
    assert is_by_token("embeddings", torch.ones(3, 5, 7), mask)
    assert is_by_token("labels", numbers, mask)
    assert is_by_token("tags", numbers * mask, mask)
    assert not is_by_token("columns", numbers, mask)
    assert not is_by_token("columns", torch.rand(3, 5), mask)
    assert not is_by_token("labels", torch.ones(3, 5), mask)
    assert not is_by_token("input_ids", torch.ones(3, 4), mask)
    assert not is_by_token("labels", torch.ones(3), mask)
    assert not is_by_token("text", ["a", "b", "c"], mask)


def test_a_matrix_that_is_as_wide_as_the_text_is_long_is_left_alone() -> None:
    columns = torch.rand(3, 5)
    probe = ProbeSet.from_batch(batch(("columns", columns)))
    ((_, again),) = probe.batches()
    assert torch.equal(again["columns"], columns)


def test_padding_is_what_the_batch_was_padded_with() -> None:
    given = batch(width=9, pad=1)
    ((_, again),) = ProbeSet.from_batch(given).batches()
    # A head may read padding, so all of it is put back; the analysis cuts it off where nothing depends on it.
    assert torch.equal(again["input_ids"], given["input_ids"])
    assert torch.equal(again["attention_mask"], given["attention_mask"])
    assert again["input_ids"].dtype == given["input_ids"].dtype


def test_a_probe_gives_what_its_batch_gives() -> None:
    model = models.build("roberta", dtype=torch.float64)
    given = batch(width=12, pad=1)
    ((_, again),) = ProbeSet.from_batch(given).batches()
    expected, found = attribute(model, given), attribute(model, again)
    assert torch.equal(found.local["N-Enc"], expected.local["N-Enc"])
    assert torch.equal(found.saliency, expected.saliency)


# ---- nothing is shared with the loop


def test_later_changes_of_the_batch_do_not_reach_the_probe() -> None:
    given = batch(("features", torch.ones(3, 2)), ("weight", torch.tensor(0.5)))
    probe = ProbeSet.from_batch(given)
    before = copy.deepcopy([{key: row[key].tolist() for key in ("input_ids", "features")} for row in probe.rows])
    for value in given.values():
        value.zero_()
    assert [{key: row[key].tolist() for key in ("input_ids", "features")} for row in probe.rows] == before
    ((_, again),) = probe.batches()
    assert torch.as_tensor(again["weight"]).item() == 0.5


def test_later_changes_of_what_it_gives_do_not_reach_the_probe() -> None:
    probe = ProbeSet.from_batch(batch(("labels", torch.tensor([2, 0, 1]))))
    before = ids(probe)
    for _, given in probe.batches():
        for value in given.values():
            value.zero_()
    assert ids(probe) == before
    ((_, again),) = probe.batches()
    assert again["labels"].tolist() == [2, 0, 1]


def test_rows_own_their_memory() -> None:
    row = ProbeSet.from_batch(batch(width=60)).rows[0]
    assert row["input_ids"].untyped_storage().nbytes() == 5 * 8


def test_a_batch_from_inference_mode_can_be_used_in_training() -> None:
    with torch.inference_mode():
        probe = ProbeSet.from_batch(batch(("features", torch.ones(3, 2)), ("weight", torch.tensor(0.5))))
    for row in probe.rows:
        assert not any(value.is_inference() for value in row.values() if isinstance(value, Tensor))
    ((_, again),) = probe.batches()
    tensors = [value for value in again.values() if isinstance(value, Tensor)]
    assert not any(value.is_inference() for value in tensors)
    (again["features"] * torch.ones(3, 2, requires_grad=True)).sum().backward()


def test_gradients_do_not_stay() -> None:
    features = torch.ones(3, 2, requires_grad=True)
    probe = ProbeSet.from_batch(batch(("features", features * 2)))
    assert not probe.rows[0]["features"].requires_grad


def test_a_probe_can_be_pickled_and_copied(tokenizer: Any) -> None:
    probe = ProbeSet.from_texts(["a joy", "dull"], tokenizer, labels=[1, 0])
    for other in (pickle.loads(pickle.dumps(probe)), copy.deepcopy(probe)):
        assert ids(other) == ids(probe)
        assert other.tokens == probe.tokens


# ---- batches


def many(sizes: tuple[int, ...], masked: bool = True) -> ProbeSet:
    rows = []
    for index, size in enumerate(sizes):
        given = models.batch((size,), seed=index)
        if not masked:
            given.pop("attention_mask")
        rows.append(ProbeSet.from_batch({**given, "labels": torch.tensor([index])}))
    probe = rows[0]
    for row in rows[1:]:
        probe = probe.joined(row)
    return probe


SIZES = (7, 30, 2, 7, 19, 30, 1, 8)


@pytest.mark.parametrize("max_tokens", [1, 16, 60, 100, 4096])
@pytest.mark.parametrize("masked", [True, False])
def test_batches_hold_every_example_once(max_tokens: int, masked: bool) -> None:
    probe = many(SIZES, masked)
    seen = []
    for indices, given in probe.batches(max_tokens):
        width = given["input_ids"].shape[1]
        assert width == max(SIZES[index] for index in indices)
        assert len(indices) == 1 or len(indices) * width <= max_tokens
        assert given["labels"].tolist() == indices
        assert set(given) == ({"input_ids", "attention_mask", "labels"} if masked else {"input_ids", "labels"})
        for place, index in enumerate(indices):
            size = SIZES[index]
            assert given["input_ids"][place, :size].tolist() == ids(probe)[index]
            if masked:
                assert given["attention_mask"][place].tolist() == [1] * size + [0] * (width - size)
            else:
                assert size == width
        seen += indices
    assert sorted(seen) == list(range(len(SIZES)))


def test_similar_lengths_stand_together() -> None:
    found = [indices for indices, _ in many(SIZES).batches(60)]
    assert found[0] == [1, 5]
    work = sum(given["input_ids"].numel() for _, given in many(SIZES).batches(60))
    assert work - sum(SIZES) < (len(SIZES) * max(SIZES) - sum(SIZES)) / 3


def test_special_tokens_are_given_where_they_are_known(tokenizer: Any) -> None:
    probe = ProbeSet.from_texts(["a joy to watch", "dull"], tokenizer)
    ((indices, given),) = probe.batches()
    marks = probe.special_tokens(indices)
    assert marks is not None
    assert marks.int().tolist() == [[1, 0, 0, 0, 0, 1], [1, 0, 1, 1, 1, 1]]
    assert given["input_ids"][1].tolist() == [2, 9, 3, 0, 0, 0]
    assert "special_tokens_mask" not in given
    assert ProbeSet.from_batch(batch()).special_tokens([0, 1]) is None


def test_special_tokens_of_a_batch_come_before_the_tokenizers(tokenizer: Any) -> None:
    marks = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 1]])
    probe = ProbeSet.from_batch(batch(("special_tokens_mask", marks)), tokenizer=tokenizer)
    assert special(probe) == [
        [bool(value) for value in row[:size]] for row, size in zip(marks.tolist(), (5, 3, 4), strict=True)
    ]


# ---- joining and naming


def test_joined_sets_stand_one_after_the_other(tokenizer: Any) -> None:
    left = ProbeSet.from_texts(["a joy"], tokenizer)
    right = ProbeSet.from_texts(["dull film", "."], tokenizer)
    both = left.joined(right)
    assert both.texts == ("a joy", "dull film", ".")
    assert both.tokens == left.tokens + right.tokens
    assert ids(both) == ids(left) + ids(right)
    assert len(both.special) == 3
    assert len(left) == 1


def test_sets_with_other_entries_are_not_joined() -> None:
    left = ProbeSet.from_batch(batch())
    assert left.joined(ProbeSet.from_batch(batch(("labels", torch.zeros(3))))) is left
    other = ProbeSet.from_batch(batch(("features", torch.ones(3, 2))))
    wide = ProbeSet.from_batch(batch(("features", torch.ones(3, 5))))
    assert other.joined(wide) is other


def test_an_empty_set_takes_anything() -> None:
    empty = ProbeSet.from_batch(batch(("labels", torch.zeros(3))), limit=0)
    assert len(empty) == 0
    assert list(empty.batches()) == []
    assert ids(empty.joined(ProbeSet.from_batch(batch()))) == ids(ProbeSet.from_batch(batch()))


def test_padding_is_learned_from_any_batch() -> None:
    unpadded = ProbeSet.from_batch(models.batch((4,), pad=1))
    padded = ProbeSet.from_batch(models.batch((6, 2), pad=1))
    for probe in (unpadded.joined(padded), padded.joined(unpadded)):
        ((_, given),) = probe.batches()
        assert bool((given["input_ids"][given["attention_mask"] == 0] == 1).all())


def test_tokens_can_be_named_later(tokenizer: Any) -> None:
    given = tokenizer(["a joy to watch", "dull"], padding=True, return_tensors="pt")
    probe = ProbeSet.from_batch(given)
    assert probe.tokens[1] == ("2", "9", "3")
    named = probe.with_tokens(tokenizer)
    assert named.tokens[1] == ("[CLS]", "dull", "[SEP]")
    assert special(named)[1] == [True, False, True]
    assert probe.tokens[1] == ("2", "9", "3")
    assert named.with_tokens(None).tokens == probe.tokens


def test_ids_that_no_tokenizer_knows(tokenizer: Any) -> None:
    probe = ProbeSet.from_batch({"input_ids": torch.tensor([[2, 6, 500, 10**12, -1, 3]])}, tokenizer=tokenizer)
    assert probe.tokens == (("[CLS]", "joy", "500", "1000000000000", "-1", "[SEP]"),)


def test_tokens_are_text_however_the_examples_were_given() -> None:
    bytewise = byte_level_tokenizer(["Das Café"], 300)
    probe = ProbeSet.from_texts(["Das Café", "語"], bytewise)
    assert probe.tokens == (("Das", "▁Café"), ("語", "⋯", "⋯"))
    batch = bytewise(["Das Café", "語"], padding=True, return_tensors="pt")
    assert ProbeSet.from_batch(batch, tokenizer=bytewise).tokens == probe.tokens
    assert ProbeSet.from_batch(batch).with_tokens(bytewise).tokens == probe.tokens


def test_a_tokenizer_is_known_by_its_names_and_by_its_spelling(tokenizer: Any) -> None:
    bytewise = byte_level_tokenizer(["Das Café"], 300)
    probe = ProbeSet.from_texts(["Das Café", "語"], bytewise)
    spelled = replace(probe, tokens=tuple(tuple(spelling_of(row["input_ids"], bytewise)) for row in probe.rows))
    assert spelled.tokens[0] == ("Das", "ĠCafÃ©")
    for known in (probe, spelled):
        assert known.is_named_by(bytewise)
        assert not known.is_named_by(tokenizer)


class Titled(NamedTuple):
    ids: Tensor
    label: Tensor


class Quoted(NamedTuple):
    ids: Tensor
    label: Tensor


@dataclass
class Spoken:
    ids: Tensor
    sure: Tensor


def of_class(kind: Any) -> Any:
    return kind(torch.arange(6).view(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("kinds", [(Titled, Quoted), (Titled, Spoken), (Spoken, Titled), (dict, Titled)])
def test_each_loader_has_a_template_of_its_own(kinds: tuple[Any, Any]) -> None:
    batches = {
        place: {"ids": torch.ones(2, 3), "label": torch.zeros(2)} if kind is dict else of_class(kind)
        for place, kind in enumerate(kinds)
    }
    probe = ProbeSet.from_parts([Part(batch, 0, place, 2) for place, batch in batches.items()])
    state = probe.state_dict()
    waits = {place for place, kind in enumerate(kinds) if kind is not dict}
    assert loaders_waited_for(state, {}) == waits
    assert loaders_waited_for(state, {0: batches[0]}) == waits - {0}
    assert loaders_waited_for(state, batches) == set()
    again = ProbeSet.from_state_dict(state, templates=batches)
    for part, kind in zip(again.parts, kinds, strict=True):
        assert type(part.batch) is kind
    if kinds[0] is not dict:
        with pytest.raises(ProbeError, match="a class that no batch has shown"):
            ProbeSet.from_state_dict(state, templates={0: batches[0]})
