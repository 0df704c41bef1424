"""Masks of tensors that lie over processes, here threads, equal those of a stable sort of the whole."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from lightning_compress.functional._selection import Parts
from lightning_compress.functional.masks import n_m_masks, smallest_masks

SHAPES = [(7, 5), (2, 3, 3), (1, 11), (16, 4)]  # that 2 and 3 processes cannot share evenly, or at all


class Meeting:
    """Sums tensors over threads, and counts how often they have met."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.given, self.meetings = threading.Barrier(ranks), [torch.empty(0)] * ranks, 0

    def parts(self, rank: int) -> Parts:
        def total(tensor: Tensor) -> Tensor:
            self.given[rank] = tensor
            if self.barrier.wait(30) == 0:
                self.meetings += 1
            found = torch.stack(self.given).sum(dim=0)
            self.barrier.wait(30)
            return found

        return Parts(rank, len(self.given), total)


def rows(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """Those of a rank, as FSDP2 shares them out."""
    each = math.ceil(len(tensor) / ranks)
    return tensor[rank * each : (rank + 1) * each]


def together(ranks, work):
    """What each thread finds, joined again, and how often they have met."""
    meeting = Meeting(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(lambda rank: work(rank, meeting.parts(rank)), range(ranks)))
    return [torch.cat(parts) for parts in zip(*found, strict=True)], meeting.meetings


def by_sorting(scores, pruned):
    """The independent reference."""
    values = torch.cat([score.flatten() for score in scores]).abs().double()
    masks = torch.ones_like(values, dtype=torch.bool)
    masks[values.sort(stable=True).indices[:pruned]] = False
    parts = torch.split(masks, [score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def kinds():
    generator = torch.Generator().manual_seed(3)
    gaussian = [torch.randn(shape, generator=generator) for shape in SHAPES]
    rounded = [(own * 4).round() / 4 for own in gaussian]
    zeros = [torch.where(own > 0, -0.0, own) for own in gaussian]
    wide = [torch.exp2(own * 60).clamp(max=math.inf) * 2.0**-30 for own in gaussian]  # some are denormal
    wide[0][0, 0], wide[3][15, 3] = math.inf, 2.0**-149
    return {
        "gaussian": gaussian,
        "rounded": rounded,
        "equal": [torch.ones(shape) for shape in SHAPES],
        "zeros": zeros,
        "wide": wide,
        "bfloat16": [own.bfloat16() for own in gaussian],
        "float64": [own.double() for own in gaussian],
    }


FAST = ("rounded", "zeros")
KINDS = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds()]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_equal_those_of_a_stable_sort(kind, ranks):
    scores = kinds()[kind]
    size = sum(score.numel() for score in scores)
    for pruned in (0, 1, size // 10, size // 2, size * 9 // 10, size):
        own = [[rows(score, rank, ranks) for score in scores] for rank in range(ranks)]
        found, meetings = together(
            ranks, lambda rank, parts, own=own, n=pruned: smallest_masks(own[rank], n, parts=parts)
        )
        assert all(map(torch.equal, found, by_sorting(scores, pruned)))
        histograms = 0 if pruned == 0 else 6 if kind == "float64" else 3
        assert histograms + 1 <= meetings <= histograms + 2  # sizes first, and what is equal to the bound last


@pytest.mark.parametrize("ranks", [2, 3])
def test_limits_and_masks_of_before_are_kept(ranks):
    scores = [own * scale for own, scale in zip(kinds()["rounded"], (0.1, 1.0, 1.0, 2.0), strict=True)]
    limits = [score.numel() - 3 for score in scores]
    kept = smallest_masks(scores, 20, limits=limits)
    alone = smallest_masks(scores, 70, kept=kept, limits=limits)

    def work(rank: int, parts: Parts) -> list[Tensor]:
        own, old = ([rows(tensor, rank, ranks) for tensor in tensors] for tensors in (scores, kept))
        return smallest_masks(own, 70, kept=old, limits=limits, parts=parts)

    found, _ = together(ranks, work)
    assert all(map(torch.equal, found, alone))
    assert int((~found[0]).sum()) == limits[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_groups_of_n_of_m_are_those_of_one_process(ranks):
    scores = [own.round(decimals=1) for own in (torch.randn(5, 8), torch.randn(2, 4, 3))]
    first = n_m_masks(scores, 2, 4, 3)
    alone = n_m_masks(scores, 2, 4, 9, kept=first)

    def work(rank: int, parts: Parts) -> list[Tensor]:
        own, old = ([rows(tensor, rank, ranks) for tensor in tensors] for tensors in (scores, first))
        return n_m_masks(own, 2, 4, 9, kept=old, parts=parts)

    found, _ = together(ranks, work)
    assert all(map(torch.equal, found, alone))


def test_numbers_of_the_whole_are_checked():
    scores = [torch.arange(6.0).view(3, 2)]

    def refused(pruned: int, **settings) -> str:
        def work(rank: int, parts: Parts) -> list[Tensor]:
            own = {name: [rows(value, rank, 2) for value in values] for name, values in settings.items()}
            with pytest.raises(ValueError, match="pruned must be") as caught:
                smallest_masks([rows(scores[0], rank, 2)], pruned, parts=parts, **own)
            messages.append(str(caught.value))
            return []

        messages: list[str] = []
        together(2, work)
        assert len(set(messages)) == 1
        return messages[0]

    assert "in [0, 6], the number of scores, got 7" in refused(7)
    assert "at least 3, what kept has pruned" in refused(
        2, kept=[torch.tensor([[True, False], [True, False], [True, False]])]
    )
