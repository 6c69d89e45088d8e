from __future__ import annotations

import pytest
import torch

from taming.data.batch import to_device
from taming.data.config import ScenesDataConfig
from taming.data.dataset import ScenesDataset
from taming.metrics.adherence import adherence, interior

PROTOTYPES = (((255, 0, 0), (200, 60, 0)), ((0, 0, 255),))


def painted(segmentation: torch.Tensor) -> torch.Tensor:
    """Red where the map says 0, blue where it says 1."""
    red, blue = (segmentation == 0).float(), (segmentation == 1).float()
    return torch.stack([red, torch.zeros_like(red), blue], dim=1) * 2 - 1


def test_interior_keeps_pixels_off_borders() -> None:
    segmentation = torch.zeros(1, 5, 9, dtype=torch.int64)
    segmentation[:, :, 5:] = 1
    assert (
        interior(segmentation, 2)[0].tolist()
        == [[True, True, True, False, False, False, False, True, True]] * 5
    )
    assert interior(segmentation, 0).all()
    # A diagonal neighbour counts as near.
    corner = torch.zeros(1, 4, 4, dtype=torch.int64)
    corner[0, 0, 0] = 1
    assert interior(corner, 1)[0].tolist() == [[False, False, True, True]] * 2 + [[True] * 4] * 2


def test_by_hand() -> None:
    segmentation = torch.zeros(1, 8, 8, dtype=torch.int64)
    segmentation[:, :, 4:] = 1
    assert adherence(painted(segmentation), segmentation, PROTOTYPES) == 1.0
    assert adherence(painted(1 - segmentation), segmentation, PROTOTYPES) == 0.0
    wrong_corner = painted(segmentation)
    wrong_corner[0, :, :4, :1] = torch.tensor([-1.0, -1.0, 1.0])[:, None, None]
    # 2 x 8 columns on each side count, of which 4 pixels are wrong.
    assert adherence(wrong_corner, segmentation, PROTOTYPES) == pytest.approx(1 - 4 / 32)
    # Wrong colours beside the border are forgiven.
    beside = painted(segmentation)
    beside[0, :, :, 2:6] = beside[0, :, :, 2:6].flip(-1)
    assert adherence(beside, segmentation, PROTOTYPES) == 1.0


def test_any_typical_colour_of_a_label_will_do() -> None:
    segmentation = torch.zeros(1, 4, 4, dtype=torch.int64)
    orange = torch.tensor([0.5, -0.6, -1.0])[None, :, None, None].expand(1, 3, 4, 4)
    assert adherence(orange, segmentation, PROTOTYPES) == 1.0


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="maps"):
        adherence(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 5, dtype=torch.int64), PROTOTYPES)
    checkers = (torch.arange(16).reshape(1, 4, 4) + torch.arange(4)[:, None]) % 2
    with pytest.raises(ValueError, match="lower the border"):
        adherence(torch.zeros(1, 3, 4, 4), checkers, PROTOTYPES)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_real_scenes_follow_their_maps_and_shuffled_maps_do_not(split: str) -> None:
    dataset = ScenesDataset(ScenesDataConfig(seed=1, num_train=160, num_validation=160), split)  # type: ignore[arg-type]
    batch = to_device(dataset.batch(range(160), [-1] * 160), "cpu")
    images, maps = batch["image"], batch["segmentation"]
    assert adherence(images, maps, dataset.prototypes) >= 0.97
    assert adherence(images, maps.roll(1, dims=0), dataset.prototypes) <= 0.45
