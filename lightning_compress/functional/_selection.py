"""Find the smallest of many scores, exact to one entry, without sorting them.

Scores are read in pieces that stay in the cache of a core, as integers that order their magnitudes. A radix select
finds the integer of a given rank digit by digit, each digit from a histogram of the scores that share those before it,
and a last pass writes the masks. Where masks grow by a few entries, as they do from step to step, one pass gathers all
that come into question, and those are sorted. Time is linear in the number of scores, and the memory beyond the masks
is that of a few pieces, whatever the number of scores and their values.

Processes that each hold a part of every tensor select together: they sum their histograms, and share out what is equal
to the bound in the order (tensor, process, index). No score leaves its process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_compress.functional._dtypes import at_least_float32

_PIECE = 1 << 17  # elements of a piece on the CPU
_DEVICE_PIECE = 1 << 22  # and on an accelerator, which is busy only with many at once
_DIGIT = 11  # bits that one pass decides; its counts stay in the innermost cache
_SINKS = 1 << 10  # bins of what is not to be counted
_FEW = 1 / 16  # of the entries: as many may come into question for the short way
_SAMPLE = 1 << 15
_MANY = 1 << 16  # from here on counting by eight is faster


class Parts(NamedTuple):
    """How tensors lie over processes that select together: each holds the rows of its rank, which follow one another.

    Attributes:
        rank: Of this process.
        ranks: How many processes there are.
        total: Sums a tensor over them, and gives the sum to each; all must call it alike.
    """

    rank: int
    ranks: int
    total: Callable[[Tensor], Tensor]

    def totals(self, counts: Sequence[int]) -> list[int]:
        """Sums numbers over the processes."""
        return self.total(torch.tensor(counts, dtype=torch.int64)).tolist()


def smallest(
    scores: Sequence[Tensor], kept: Sequence[Tensor] | None, pruned: int, parts: Parts | None = None
) -> list[Tensor]:
    """Masks of the shapes of ``scores``, with the ``pruned`` smallest False; see ``masks.smallest_masks``."""
    if parts is None:
        if len(scores) > 1 and sum(score.numel() for score in scores) <= _PIECE and _are_alike(scores):
            return _smallest_at_once(scores, kept, pruned)
        grown = None if kept is None else _grown(scores, kept, pruned)
        if grown is not None:
            return grown
    masks = [torch.empty_like(score, dtype=torch.bool) for score in scores]
    bound, ties = _bound(scores, kept, pruned, parts)
    pools = [ties] if parts is None or not ties else _own_ties(scores, kept, bound, ties, parts)
    for index, keys, mask in _keys(scores, kept, masks):
        pool = min(index, len(pools) - 1)
        if pools[pool]:
            places = (keys == bound).nonzero()[: pools[pool], 0]
            keys[places] = -1
            pools[pool] -= len(places)
        torch.ge(keys.view(mask.shape), bound, out=mask)
    return masks


def smallest_within(
    scores: Sequence[Tensor],
    kept: Sequence[Tensor] | None,
    pruned: int,
    limits: Sequence[int],
    parts: Parts | None = None,
) -> list[Tensor]:
    """The same where no tensor loses more than its limit, which nothing that ``kept`` has pruned is beyond."""

    def select(indices: list[int], count: int) -> None:
        own = None if kept is None else [kept[index] for index in indices]
        chosen = smallest([scores[index] for index in indices], own, count, parts)
        for index, mask in zip(indices, chosen, strict=True):
            masks[index] = mask

    masks = list(scores)
    free = list(range(len(scores)))
    while free:
        select(free, pruned)
        # more will be taken from the others, so what is beyond its limit now would be so in the end
        lost = dropped((masks[index] for index in free), parts)
        beyond = [index for index, own in zip(free, lost, strict=True) if own > limits[index]]
        if not beyond:
            break
        for index in beyond:
            select([index], limits[index])
            pruned -= limits[index]
        free = [index for index in free if index not in beyond]
    return masks


def n_of_m(scores: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The n:m mask of one tensor, and what each group loses by it, ``(C_out, C_in / m, ...)``."""
    mask = torch.empty_like(scores, dtype=torch.bool)
    losses = []
    rows = max(_room(scores.device) * len(scores) // max(scores.numel(), 1), 1)
    for part, own in zip(torch.split(scores, rows), torch.split(mask, rows), strict=True):
        members = grouped(at_least_float32(part).abs(), m).unbind(2)
        # Where each would stand in a sort of its group. For so few, comparing all pairs is faster than sorting.
        ranks = [torch.zeros_like(member, dtype=torch.int16) for member in members]
        for high in range(m):
            for low in range(high):
                # of equal ones the lower comes first, and NaN after anything
                first = (members[low] <= members[high]) | members[high].isnan()
                ranks[high] += first
                ranks[low] += ~first
        keep = [rank >= m - n for rank in ranks]
        grouped(own, m).copy_(torch.stack(keep, dim=2))
        pruned = (member.masked_fill(held, 0.0) for member, held in zip(members, keep, strict=True))
        losses.append(sum(pruned, start=torch.zeros_like(members[0])))
    return mask, torch.cat(losses)


def grouped(values: Tensor, m: int) -> Tensor:
    """Groups of m consecutive entries along dimension 1, ``(C_out, C_in / m, m, ...)``, as a view."""
    return values.view(len(values), values.shape[1] // m, m, *values.shape[2:])


def dropped(masks: Iterable[Tensor], parts: Parts | None = None) -> list[int]:
    """How many entries of each mask are False."""
    masks = list(masks)
    counts = [mask.numel() - count for mask, count in zip(masks, held(masks), strict=True)]
    return counts if parts is None else parts.totals(counts)


def held(masks: Iterable[Tensor]) -> list[int]:
    """How many entries of each mask are True; an accelerator is waited for once."""
    counts = [_held(mask) for mask in masks]
    return torch.stack([count.to(counts[0].device) for count in counts]).tolist() if counts else []


def _held(mask: Tensor) -> Tensor:
    """How many entries are True; of many, several times as fast as ``count_nonzero``, as each update asks for it.

    Eight booleans are summed as the eight bytes of one integer. 255 of them fill a byte at most.
    """
    if mask.numel() < _MANY or not mask.is_contiguous() or mask.storage_offset() % 8:
        return mask.count_nonzero()
    ones = mask.view(torch.uint8).view(-1)
    rows = len(ones) // (8 * 255)
    words = ones[: rows * 8 * 255].view(torch.int64).view(rows, 255)
    rest = ones[rows * 8 * 255 :]
    return words.sum(dim=1).view(torch.uint8).sum(dtype=torch.int64) + rest.sum(dtype=torch.int64)


def _smallest_at_once(scores: Sequence[Tensor], kept: Sequence[Tensor] | None, pruned: int) -> list[Tensor]:
    """The masks of ``smallest`` for tensors of few entries, in which the number of operations is what takes time."""
    flat = torch.cat([score.flatten() for score in scores])
    old = None if kept is None else [torch.cat([mask.flatten() for mask in kept])]
    parts = torch.split(smallest([flat], old, pruned)[0], [score.numel() for score in scores])
    masks = [torch.empty_like(score, dtype=torch.bool) for score in scores]
    for mask, part in zip(masks, parts, strict=True):
        mask.copy_(part.view(mask.shape))
    return masks


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    return len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1


def _grown(scores: Sequence[Tensor], kept: Sequence[Tensor], pruned: int) -> list[Tensor] | None:
    """The masks of ``smallest`` if they have few False entries beyond those of ``kept``; else None."""
    few = _FEW * sum(score.numel() for score in scores)
    more = pruned - sum(dropped(kept))
    if not _are_alike(scores) or more > few / 2 or not all(tensor.is_contiguous() for tensor in (*scores, *kept)):
        return None
    bound = _estimated_bound(scores, kept, more)
    places, found = [], 0
    for score, mask in zip(scores, kept, strict=True):
        places.append(_small_places(score.view(-1), mask.view(-1), bound))
        found += len(places[-1])
        if found > few:  # many are equal
            return None
    if found < more:
        return None
    values = torch.cat([score.view(-1)[own].abs() for score, own in zip(scores, places, strict=True)])
    taken = torch.zeros_like(values, dtype=torch.bool)
    taken[values.sort(stable=True).indices[:more]] = True
    masks = [mask.clone() for mask in kept]
    for mask, own, chosen in zip(masks, places, torch.split(taken, list(map(len, places))), strict=True):
        mask.view(-1)[own[chosen]] = False
    return masks


def _estimated_bound(scores: Sequence[Tensor], kept: Sequence[Tensor], more: int) -> float:
    """A magnitude with, most likely, at least ``more`` kept entries up to it, and not many others."""
    total = sum(score.numel() for score in scores)
    step = max(total // _SAMPLE, 1)
    while math.gcd(step, 2 * 3 * 5 * 7) > 1:  # not in step with the shapes
        step += 1
    sample = [score.view(-1)[::step][mask.view(-1)[::step]] for score, mask in zip(scores, kept, strict=True)]
    values = torch.cat(sample).abs().sort().values
    expected = more / step
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 8)  # four standard deviations, and a few for tails
    return float(values[rank]) if rank < len(values) else math.inf


def _small_places(score: Tensor, kept: Tensor, bound: float) -> Tensor:
    """Where a flat tensor is kept and its magnitude is at most ``bound``."""
    room = _room(score.device)
    magnitudes = torch.empty(min(room, len(score)), dtype=score.dtype, device=score.device)
    places = [torch.empty(0, dtype=torch.int64, device=score.device)]
    for start in range(0, len(score), room):
        part = score[start : start + room]
        small = torch.le(torch.abs(part, out=magnitudes[: len(part)]), bound)
        small.logical_and_(kept[start : start + room])
        if len(small) % 8 == 0:  # most words of eight are empty, and are passed over at once
            words = small.view(torch.int64).nonzero()
            inside = (8 * words + torch.arange(8, device=score.device)).view(-1)
            places.append(inside[small[inside]] + start)
        else:
            places.append(small.nonzero()[:, 0] + start)
    return torch.cat(places)


def _bound(scores: Sequence[Tensor], kept: Sequence[Tensor] | None, rank: int, parts: Parts | None) -> tuple[int, int]:
    """The key below which all are pruned, and how many that equal it are pruned too."""
    if rank == 0:
        return 0, 0
    ints = _types(scores)[1]
    # Scores of another prefix are counted in bins of their own, which nobody reads. There are many, in turn, as the
    # processor waits where it counts twice in a row in the same bin.
    bins, largest = 1 << _DIGIT, max(score.numel() for score in scores)
    sinks = {
        device: torch.arange(min(_room(device), largest), dtype=ints, device=device) % _SINKS + bins
        for device in {score.device for score in scores}
    }
    key = 0
    for shift in reversed(range(0, torch.iinfo(ints).bits - 1, _DIGIT)):
        histogram = torch.zeros(bins + _SINKS, dtype=torch.int64, device="cpu")
        for _, keys, _ in _keys(scores, kept, scores):
            digits = keys.bitwise_xor_(key).bitwise_right_shift_(shift)  # below `bins` where the prefix is the same
            torch.minimum(digits, sinks[keys.device][: len(keys)], out=digits)
            histogram += torch.bincount(digits, minlength=len(histogram)).cpu()
        if parts is not None:
            histogram = parts.total(histogram[:bins])
        upto = histogram[:bins].cumsum(0)
        digit = int(torch.searchsorted(upto, rank))
        ties = int(histogram[digit])
        rank -= int(upto[digit]) - ties
        key |= digit << shift
    return (key + 1, 0) if rank == ties else (key, rank)


def _own_ties(
    scores: Sequence[Tensor], kept: Sequence[Tensor] | None, bound: int, ties: int, parts: Parts
) -> list[int]:
    """How many entries of each tensor that equal the bound are pruned in this process."""
    found = [0] * len(scores)
    for index, keys, _ in _keys(scores, kept, scores):
        found[index] += int((keys == bound).sum())
    everywhere = torch.zeros(len(scores), parts.ranks, dtype=torch.int64)
    everywhere[:, parts.rank] = torch.tensor(found)
    everywhere = parts.total(everywhere)
    before = everywhere.flatten().cumsum(0).view(everywhere.shape) - everywhere
    return (ties - before[:, parts.rank]).clamp(min=0).tolist()


def _keys(
    scores: Sequence[Tensor], kept: Sequence[Tensor] | None, masks: Sequence[Tensor]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield piece by piece, in row-major order: which tensor, integers in the order of the magnitudes, of ``masks``.

    The bits of a float without its sign are such an integer. What is pruned already has the key 0. The next piece
    overwrites the keys.
    """
    floats, ints = _types(scores)
    largest = torch.iinfo(ints).max
    infinity = torch.tensor(math.inf, dtype=floats, device="cpu")  # named, as the default may be another
    nan = int(infinity.view(ints)) + 1  # the bits of NaN are many, all beyond those of infinity
    for index, (score, mask) in enumerate(zip(scores, masks, strict=True)):
        room = _room(score.device)
        buffer = torch.empty(min(room, score.numel()), dtype=ints, device=score.device)
        tensors = (score, mask) if kept is None else (score, mask, kept[index])
        for part, mask_part, *kept_part in _pieces(tensors, room):
            keys = buffer[: part.numel()]
            torch.bitwise_and(part.to(floats).view(ints), largest, out=keys.view(part.shape)).clamp_(max=nan)
            if kept_part:
                keys.add_(1).view(part.shape).mul_(kept_part[0].to(keys.device))
            yield index, keys, mask_part


def _types(scores: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype]:
    """The float that holds all scores, and the integer of as many bits."""
    if any(score.dtype == torch.float64 for score in scores):
        return torch.float64, torch.int64
    return torch.float32, torch.int32


def _room(device: torch.device) -> int:
    return _PIECE if device.type == "cpu" else _DEVICE_PIECE


def _pieces(tensors: tuple[Tensor, ...], room: int) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape into the same pieces of at most ``room`` elements, in row-major order, as views."""
    first = tensors[0]
    if first.numel() <= room:
        if first.numel():
            yield tensors
    elif all(tensor.is_contiguous() for tensor in tensors):
        flat = [tensor.view(-1) for tensor in tensors]
        for start in range(0, first.numel(), room):
            yield tuple(tensor[start : start + room] for tensor in flat)
    else:
        rows = max(room * len(first) // first.numel(), 1)
        for start in range(0, len(first), rows):
            # a single row that is too long is cut within
            part = start if rows == 1 else slice(start, start + rows)
            yield from _pieces(tuple(tensor[part] for tensor in tensors), room)
