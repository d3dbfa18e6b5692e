"""Maps: colours of tokens on their grid, and pictures of them."""

import numpy as np
import pytest
from hypothesis import given
from support import generators

from selfalign import diagnostics

pytestmark = pytest.mark.only("torch")  # NumPy and scikit-learn alone: once


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (6, 1), (2, 3, 4)])
def test_maps_have_the_grids_shape_and_lie_in_0_1(grid):
    @given(generators)
    def law(rng):
        tokens = rng.normal(size=(3, int(np.prod(grid)), 5))
        maps = diagnostics.pca_maps(tokens, grid)
        assert maps.shape == (3, *grid, 3)
        assert maps.min() == 0
        assert maps.max() == 1
        np.testing.assert_allclose(diagnostics.pca_maps(7 * tokens + 3, grid), maps, atol=1e-6)

    law()


def test_a_map_shows_where_the_features_differ():
    """The first component of an image whose left half has other features is its left half."""
    rng = np.random.default_rng(0)
    left = np.tile(np.arange(6) < 3, 4)  # a grid of 4 rows and 6 columns
    direction = np.array([0.0, -5, 0, 1, 0, 0, 0, 0])
    tokens = 0.01 * rng.normal(size=(2, 24, 8)) + left[:, None] * direction
    first = diagnostics.pca_maps(tokens, (4, 6))[..., 0]
    assert (first[:, :, :3] < 0.2).all()  # the largest weight, -5's, counts as positive
    assert (first[:, :, 3:] > 0.8).all()


def test_equal_colours_mean_alike_features_in_all_samples():
    tokens = np.random.default_rng(0).normal(size=(2, 6, 5))
    tokens[1, 4] = tokens[0, 1]
    maps = diagnostics.pca_maps(tokens, (2, 3))
    np.testing.assert_allclose(maps[1].reshape(6, 3)[4], maps[0].reshape(6, 3)[1], atol=1e-12)


def test_maps_of_constant_tokens_are_grey():
    assert (diagnostics.pca_maps(np.full((2, 6, 4), 3.0), (2, 3)) == 0.5).all()


def test_pictures(tmp_path):
    from matplotlib.image import imread

    image, video = np.zeros((3, 4, 8, 3)), np.ones((2, 3, 4, 8, 3))
    diagnostics.draw_maps(image, tmp_path / "image.png")
    diagnostics.draw_maps({"block 1": video, "block 2": 0.5 * video}, tmp_path / "video.png")
    image_shape, video_shape = (
        imread(tmp_path / f"{name}.png").shape[:2] for name in ("image", "video")
    )
    assert video_shape[0] == 2 * image_shape[0]
    # six frames of two videos in a row, against three images
    assert video_shape[1] > 1.5 * image_shape[1]
