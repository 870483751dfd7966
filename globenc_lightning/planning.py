"""Which batches a probe is analysed in: whole as the user's loader gave them, or less where that decides the same.

Rows are cut out of a batch, and columns of padding off it, only where the user's own step, run on the smaller batch,
gives the very logits that it gives on the whole one. That is what makes in-batch negatives, heads that see the padding
and padding at the left right.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from globenc_lightning.analysis import Reader, evaluate, find_decision
from globenc_lightning.errors import (
    CollectiveError,
    GlobEncError,
    ModelCallError,
    OutOfMemoryError,
    is_out_of_memory,
)
from globenc_lightning.probe import ProbeSet
from globenc_lightning.task.batches import columns_of, padding_masks, rows_of, size_of
from globenc_lightning.task.kinds import BY_TOKEN, Decision
from globenc_lightning.task.replaying import Chunk, Part, Replay, Step, count_labels, same


def find(
    reader: Reader, probe: ProbeSet, steps: Sequence[Step], decision: int | str = 0, encoder_call: int = 0
) -> ProbeSet:
    """Find which of a module's steps tells what it decides on a probe.

    Args:
        reader: the model; takes the step and the decision that is found.
        probe: the examples, in the batches that they came in.
        steps: the steps, the best first.
        decision: which decision is explained, see :class:`~globenc_lightning.task.replaying.Replay`.
        encoder_call: which call of an encoder is shown.

    Returns:
        The probe, with as many examples as the step decides on.

    Raises:
        GlobEncError: none of the steps can be run, or their encoder cannot be read: the reason of the first.
    """
    failure: GlobEncError | None = None
    for step in steps:
        reader.replay, reader.structures = Replay(step, decision, encoder_call), ()
        try:
            return examined(reader, probe)
        except CollectiveError as error:
            reader.replay, reader.structures = None, ()
            raise CollectiveError(str(error).replace("the step", step.name, 1)) from error
        except GlobEncError as error:
            failure = failure or error
        except Exception as error:
            reader.replay, reader.structures = None, ()
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                "the memory does not suffice to analyse even one example at a time: take shorter examples, or fewer "
                "methods."
            ) from error
    reader.replay, reader.structures = None, ()
    raise failure or ModelCallError(f"{type(reader.model).__name__} has no validation_step of its own.")


def examined(reader: Reader, probe: ProbeSet, *, fewer: bool = True) -> ProbeSet:
    """Find what the user's step decides on a probe.

    Args:
        reader: the model, with the user's step; takes the decision that is found.
        probe: the examples, in the batches that they came in.
        fewer: whether examples that are not wanted are left out of the batches, where that changes nothing.

    Returns:
        The probe, with as many examples as the step decides on.

    Raises:
        GlobEncError: the step cannot be run, or its encoder cannot be read.
    """
    if reader.replay is None:
        raise AssertionError("a probe is examined with the step that its batches are of")
    reader.chunks.clear()
    reader.proven.clear()
    reader.decisions.clear()
    parts = []
    for part in probe.parts:
        if reader.structure is None:
            _find(reader, part)
        decision, _, mask = evaluate(reader, Chunk(part.batch, part, (), ()))
        part = part._replace(wanted=sum(one < _examples(decision, mask, part) for one in part.chosen))
        if fewer:
            part, decision, mask = _smaller(reader, part, decision, mask)
        reader.decisions.append((decision, mask))
        parts.append(part)
    kinds = {decision.kind for decision, _ in reader.decisions}
    task = reader.replay.task
    if len(kinds) > 1 and kinds & set(BY_TOKEN) and task is not None and not task.seen.by_token:
        # By chance one batch has as many tokens that count as it has texts.
        reader.replay.task = replace(task, seen=replace(task.seen, by_token=True))
        return examined(reader, probe, fewer=fewer)
    reader.replay.counts = count_labels([decision for decision, _ in reader.decisions])
    if all(
        one.batch is other.batch and one.wanted == other.wanted for one, other in zip(parts, probe.parts, strict=True)
    ):
        return probe
    adjusted = replace(ProbeSet.from_parts(parts), tokenizer=probe.tokenizer)
    # What was already seen of as many examples stays known.
    return replace(probe, parts=tuple(parts)) if len(adjusted) == len(probe) else adjusted


def _smaller(
    reader: Reader, part: Part, decision: Decision, mask: Tensor | None
) -> tuple[Part, Decision, Tensor | None]:
    """A batch with no more examples than are wanted, where the step decides the same on these alone.

    What is left out needs no place in memory, nor in checkpoints.
    """
    size = size_of(part.batch)
    wanted = part.chosen
    expected = None if size is None or part.wanted >= size else units_of(decision, wanted, size)
    if expected is None or not _tells(decision):
        return part, decision, mask
    fewer = part._replace(batch=rows_of(part.batch, wanted), skipped=())
    try:
        found, _, mask_of_fewer = evaluate(reader, Chunk(fewer.batch, fewer, (), ()))
    except GlobEncError:
        return part, decision, mask
    # What the whole batch gave is what the analysis has to give, too.
    return (fewer, expected, mask_of_fewer) if same(found, expected) else (part, decision, mask)


def plan(reader: Reader, probe: ProbeSet, chosen: Sequence[int]) -> list[Chunk]:
    """Divide a probe into batches on which the user's step decides the same.

    Args:
        reader: the model, with the user's step.
        probe: the examples, in the batches that they came in.
        chosen: the numbers of the examples that are analysed.

    Returns:
        The batches; the same ones the next time.

    Raises:
        GlobEncError: the step cannot be run, or its encoder cannot be read.
    """
    key = (reader.max_tokens, tuple(chosen))
    if key in reader.chunks and key not in reader.proven:
        if not _still_holds(reader, probe, reader.chunks[key]):
            examined(reader, probe, fewer=False)
        reader.proven.add(key)
    if key not in reader.chunks:
        if len(reader.decisions) != len(probe.parts):
            examined(reader, probe, fewer=False)
        first, chunks = 0, []
        for part, (decision, mask) in zip(probe.parts, reader.decisions, strict=True):
            numbers = {place: first + number for number, place in enumerate(part.chosen)}
            whole = Chunk(part.batch, part, tuple(numbers.values()), tuple(numbers))
            wanted = [place for place, number in numbers.items() if number in chosen]
            first += part.wanted
            if wanted:
                chunks += _divided(reader, whole, decision, mask, wanted)
        reader.chunks[key] = chunks
    return reader.chunks[key]


def _still_holds(reader: Reader, probe: ProbeSet, chunks: Sequence[Chunk]) -> bool:
    """Whether the step still decides the same on the batches of a plan as on the whole, once the weights have moved.

    A head that begins at zero, or one that begins to see the padding, gives the same on any batch at first.
    """
    known: dict[int, Decision] = {}
    for chunk in chunks:
        place = next((number for number, part in enumerate(probe.parts) if part is chunk.part), None)
        if place is None:
            return False
        if place not in known:
            known[place] = evaluate(reader, Chunk(chunk.part.batch, chunk.part, (), ()))[0]
        expected: Decision | None = known[place]
        if chunk.batch is not chunk.part.batch:
            size = size_of(chunk.part.batch)
            if size_of(chunk.batch) != size:
                first = sum(part.wanted for part in probe.parts[:place])
                rows = [chunk.part.chosen[example - first] for example in chunk.examples]
                expected = None if size is None else units_of(known[place], rows, size)
            if expected is None or not same(evaluate(reader, chunk)[0], expected):
                return False
        chunk.expected = expected
    return True


def _examples(decision: Decision, mask: Tensor | None, part: Part) -> int:
    """How many examples a decision is on."""
    if decision.kind == "loss" and len(decision.logits) == 1:
        # One loss of all of them.
        return part.wanted if mask is None else len(mask)
    if decision.width:
        return len(decision.logits) // decision.width
    return len(decision.logits) if mask is None else len(mask)


def _find(reader: Reader, part: Part) -> None:
    """Find the decision with two examples, which take little time and memory; else with the whole batch."""
    for batch in _few(part):
        try:
            return find_decision(reader, Chunk(batch, part, (), ()))
        except GlobEncError:
            # Some steps want the whole batch, or texts of their whole width.
            pass
    return find_decision(reader, Chunk(part.batch, part, (), ()))


def _few(part: Part) -> Iterator[Any]:
    """Batches of two examples, those with the longest texts: without columns of padding, then with them.

    What is shown of a structure is shown for texts up to their length.
    """
    size = size_of(part.batch)
    if size is None or size <= 2:
        return
    masks = padding_masks(part.batch, size)
    chosen = part.chosen
    if masks:
        lengths = torch.stack([mask.sum(1) for mask in masks]).amax(0).tolist()
        chosen = sorted(sorted(chosen, key=lambda row: -lengths[row])[:2])
    rows = (chosen * 2)[:2]
    batch = rows_of(part.batch, rows)
    shorter = batch
    for mask in masks:
        used = mask[rows].any(0).nonzero().flatten()
        if len(used) and int(used[-1]) + 1 - int(used[0]) < mask.shape[1]:
            shorter = columns_of(shorter, mask[rows], slice(int(used[0]), int(used[-1]) + 1))
    if shorter is not batch:
        yield shorter
    yield batch


def _divided(
    reader: Reader, whole: Chunk, decision: Decision, mask: Tensor | None, wanted: Sequence[int]
) -> list[Chunk]:
    """The examples of one batch that are wanted, in batches that are small enough."""
    size = size_of(whole.batch)
    numbers = dict(zip(whole.kept, whole.examples, strict=True))
    everything = replace(
        whole, examples=tuple(numbers[place] for place in wanted), kept=tuple(wanted), expected=decision
    )
    if size is None or mask is None or not _tells(decision):
        return [everything]
    limit = max(1, reader.max_tokens // max(1, mask.shape[1] * max(1, len(mask) // size)))
    pieces = [list(wanted[start : start + limit]) for start in range(0, len(wanted), limit)]
    if pieces == [list(range(size))]:
        return [_trimmed(reader, everything, mask)]
    chunks = []
    for rows in pieces:
        expected = units_of(decision, rows, size)
        if expected is None:
            return [everything]
        piece = replace(
            whole,
            batch=rows_of(whole.batch, rows),
            examples=tuple(numbers[row] for row in rows),
            kept=tuple(range(len(rows))),
            expected=expected,
        )
        try:
            found, _, mask_of_piece = evaluate(reader, piece)
        except GlobEncError:
            return [everything]
        if not same(found, expected):
            return [everything]
        chunks.append(piece if mask_of_piece is None else _trimmed(reader, piece, mask_of_piece))
    return chunks


def _trimmed(reader: Reader, chunk: Chunk, mask: Tensor) -> Chunk:
    """The batch without its columns of padding, where the step decides the same without them."""
    used = mask.any(0).nonzero().flatten()
    if not len(used) or chunk.expected is None or chunk.expected.kind in (*BY_TOKEN, "span"):
        return chunk
    keep = slice(int(used[0]), int(used[-1]) + 1)
    if keep.stop - keep.start == mask.shape[1]:
        return chunk
    shorter = replace(chunk, batch=columns_of(chunk.batch, mask, keep))
    try:
        found, _, _ = evaluate(reader, shorter)
    except GlobEncError:
        return chunk
    return shorter if same(found, chunk.expected) else chunk


def _tells(decision: Decision) -> bool:
    """Whether logits tell one example from another: those of a head that begins at zero prove nothing."""
    logits = decision.logits.float()
    spread = (logits - logits.mean(0)).abs().max() if len(logits) > 1 else (logits - logits.mean()).abs().max()
    return bool(spread > 1e-6 * logits.abs().max().clamp(min=1e-6)) or (len(logits) == 1 and logits.numel() == 1)


def units_of(decision: Decision, rows: Sequence[int], size: int) -> Decision | None:
    """The part of a decision that some examples of a batch have in it.

    Args:
        decision: the decision of the whole batch.
        rows: the numbers of the examples.
        size: how many examples the batch has.

    Returns:
        The part; None where it cannot be told from the whole.
    """
    count = len(decision.logits)
    if decision.width is None or decision.kind == "loss" or count % size:
        return None
    each = count // size
    units = torch.tensor([row * each + unit for row in rows for unit in range(each)], dtype=torch.long)

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None or len(tensor) != count else tensor[units]

    return replace(
        decision,
        logits=decision.logits[units],
        labels=part(decision.labels),
        ends=part(decision.ends),
        end_labels=part(decision.end_labels),
    )
