from __future__ import annotations

import numpy as np
import pytest

from globenc_lightning.report import canvas, ink

BLUE = (0, 122, 204)


def every_coverage() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).reshape(8, 32)


@pytest.mark.parametrize("colour", [ink.INK, BLUE, (255, 0, 0)])
def test_text_has_nine_shades_close_to_its_coverage(colour: tuple[int, int, int]) -> None:
    picture = canvas.blank(8, 32)
    ink.stamp(picture, every_coverage(), 0, 0, colour)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 9
    exact = 255 + (np.array(colour) - 255) * every_coverage()[..., None].astype(int) / 255
    assert np.abs(picture - exact).max() <= 17
    assert picture[0, 0].tolist() == [255, 255, 255]
    assert picture[-1, -1].tolist() == list(colour)


def test_paper_and_other_grounds_are_blended_alike() -> None:
    """What is all paper is looked up; one pixel beside it that is none changes nothing about the rest."""
    paper, other = canvas.blank(8, 32), canvas.blank(8, 32)
    other[0, 0] = 200
    for picture in (paper, other):
        ink.stamp(picture, every_coverage(), 0, 0, BLUE)
    assert other[0, 0].tolist() == [200, 200, 200]
    other[0, 0] = 255
    np.testing.assert_array_equal(paper, other)


def test_ink_on_a_ground_lies_between_the_two() -> None:
    picture = np.full((8, 32, 3), (0, 255, 100), dtype=np.uint8)
    ink.stamp(picture, every_coverage(), 0, 0, (200, 55, 100))
    assert picture[0, 0].tolist() == [0, 255, 100]
    assert picture[-1, -1].tolist() == [200, 55, 100]
    assert np.all(np.diff(picture[..., 0].ravel().astype(int)) >= 0)
    assert np.all(np.diff(picture[..., 1].ravel().astype(int)) <= 0)
    assert (picture[..., 2] == 100).all()


def test_texts_stamped_together_are_as_they_are_one_by_one() -> None:
    draw = np.random.default_rng(0)
    masks = [draw.integers(0, 256, shape, dtype=np.uint8) for shape in ((6, 9), (4, 4), (9, 5))]
    placed = [(masks[0], 3, 2), (masks[1], 13, 2), (masks[2], 20, 5)]
    together, single = canvas.blank(20, 30), canvas.blank(20, 30)
    ink.stamp_all(together, placed, BLUE)
    for mask, x, y in placed:
        ink.stamp(single, mask, x, y, BLUE)
    np.testing.assert_array_equal(together, single)
    ink.stamp_all(together, [])
    np.testing.assert_array_equal(together, single)


def test_empty_corners_that_overlap_cover_nothing() -> None:
    """Slanted labels: the box of each reaches into the next, its ink does not."""
    slanted = np.zeros((10, 10), dtype=np.uint8)
    slanted[np.arange(10), 9 - np.arange(10)] = 255
    picture = canvas.blank(12, 30)
    ink.stamp_all(picture, [(slanted, 0, 0), (slanted, 4, 0), (slanted, 8, 1)])
    assert ((picture == ink.INK).all(axis=2)).sum() == 30
    assert ((picture == 255).all(axis=2)).sum() == 12 * 30 - 30
