"""The judge of classes: it learns them, names generated ones, and says what it cannot judge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taming.data.config import ScenesDataConfig
from taming.data.dataset import PictureDataset, open_dataset
from taming.errors import UserError
from taming.metrics.told_apart import PictureClassifier, told_apart, train_classifier


class Stripes(PictureDataset):
    """Three classes of 8x8 pictures that a few steps tell apart: stripes across, down, and none."""

    size, num_labels = (8, 8), 0
    provides = frozenset({"image", "label"})

    def __init__(self, seed: int = 0) -> None:
        self.class_names = ["across", "down", "none"]
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(3, (96,), generator=generator)
        stripes = torch.zeros(3, 3, 8, 8)
        stripes[0, :, ::2] = stripes[1, :, :, ::2] = 120
        noise = 60 * torch.rand(96, 3, 8, 8, generator=generator)
        self.images = (stripes[self.labels] + noise + 20).to(torch.uint8)

    def __len__(self) -> int:
        return 96

    def sample(self, index: int, epoch: int, *, seed: int = 0) -> dict[str, Tensor | int]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def fingerprint(self) -> str:
        return "stripes"

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.images.float() / 127.5 - 1, self.labels)]


def test_a_judge_learns_classes_and_is_the_same_again() -> None:
    train, unseen = Stripes(), Stripes(1)
    judge = train_classifier(train, steps=40, batch_size=32)
    images, labels = unseen.pairs()[0]
    found = told_apart(judge, unseen.pairs(), [(images[:40], labels[:40]), (images[40:], labels[40:])])
    assert found.class_accuracy_real == found.class_accuracy > 0.95
    assert found.class_accuracy_chance == pytest.approx(1 / 3)
    assert set(found.figures()) == {"class_accuracy_real", "class_accuracy", "class_accuracy_chance"}
    wrong = told_apart(judge, unseen.pairs(), [(images, (labels + 1) % 3)])
    assert wrong.class_accuracy < 0.05
    one = told_apart(
        judge, unseen.pairs(), [(images[labels == 0], torch.ones(int((labels == 0).sum())).long())]
    )
    assert one.of_class == (0, 0, 0)
    state = torch.random.get_rng_state()
    again = train_classifier(train, steps=3, batch_size=32)
    other = train_classifier(train, steps=3, batch_size=32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_cannot_be_judged_says_so() -> None:
    unlabelled = Stripes()
    unlabelled.provides = frozenset({"image"})
    with pytest.raises(UserError, match="no classes to be told apart"):
        train_classifier(unlabelled, steps=1)
    judge = PictureClassifier(3)
    assert judge(torch.zeros(1, 3, 100, 70)).shape == (1, 3)
    with pytest.raises(UserError, match=r"takes \(B, 3, H, W\)"):
        judge(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match="no generated pictures"):
        told_apart(judge, Stripes().pairs(), [])


@pytest.mark.slow
def test_the_scenes_are_told_apart() -> None:
    config = ScenesDataConfig(size=32, num_train=2000, num_validation=200)
    train, validation = open_dataset(config, "train"), open_dataset(config, "validation")
    batch = validation.batch(range(200), [-1] * 200)
    images, labels = batch["image"].float() / 127.5 - 1, batch["label"]
    found = told_apart(train_classifier(train, steps=200), [(images, labels)], [(0 * images, labels)])
    assert found.class_accuracy_real > 0.9
    assert found.class_accuracy < 0.4
