"""Layouts: their order, their padding, their windows, and the published tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stage1_vq import VQModel
from stage2_ar.conditions import Condition, build_condition
from stage2_ar.conditions.from_data import fill_in
from stage2_ar.conditions.object_tokens import ObjectTokensCondition
from stage2_ar.conditions.objects import centre_cells, coverage
from stage2_ar.conditions.objects_config import ObjectsConditionConfig, ObjectTokensConfig
from stage2_ar.model import ARModel
from stage2_ar.transformer import Transformer, build_transformer
from stage2_ar.transformer_config import GPTConfig, LlamaConfig
from taming.data.config import ScenesDataConfig
from taming.data.dataset import open_dataset
from taming.data.layout_picture import paint_layout, paint_text
from taming.data.scenes import SceneObject
from taming.errors import ConfigError, UserError
from taming.types import Prefix
from tests.conftest import make_pipeline

GRID, WIDTH, TOKENS = (4, 4), 16, 70


def built(
    transformer: GPTConfig | LlamaConfig | None = None, **options: Any
) -> tuple[Condition, Transformer]:
    torch.manual_seed(0)
    config = ObjectsConditionConfig.model_validate({"num_classes": 5, "max_objects": 6, **options})
    condition = build_condition(config, width=WIDTH, downsample_factor=4).eval()
    for parameter in condition.parameters():  # a position that is wrong must be seen
        torch.nn.init.normal_(parameter, std=0.5)
    values = transformer or LlamaConfig(num_layers=2, num_heads=2, width=WIDTH)
    model = build_transformer(
        values, vocabulary_size=TOKENS, grid=GRID, prefix_length=condition.prefix_length(GRID)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    condition.attach(model.token_embedding)
    return condition, model


def layout(count: int, seed: int = 0) -> list[dict[str, Any]]:
    source = random.Random(seed)
    objects = []
    for _ in range(count):
        x, y = source.random() * 0.6, source.random() * 0.6
        w, h = 0.1 + 0.3 * source.random(), 0.1 + 0.3 * source.random()
        objects.append({"label": source.randrange(5), "box": (x, y, x + w, y + h)})
    return objects


def same(a: Prefix, b: Prefix) -> bool:
    cells = a.cells is None or b.cells is None or torch.equal(a.cells, b.cells)
    return cells and torch.equal(a.embeddings, b.embeddings) and torch.equal(a.mask, b.mask)


FORMS: dict[str, dict[str, Any]] = {
    "features": {},
    "centres": {"place": "centre"},
    "alone": {"encoding": {"kind": "features", "aligned": False}},
    "tokens": {"encoding": {"kind": "tokens", "num_tokens": TOKENS}},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_objects_says_nothing(form: str) -> None:
    condition, _ = built(**FORMS[form])
    objects = layout(5)
    expected = condition({"objects": [objects]}, GRID)
    shuffled = list(objects)
    random.Random(1).shuffle(shuffled)
    assert shuffled != objects
    assert same(condition({"objects": [shuffled]}, GRID), expected)
    assert not same(condition({"objects": [objects[:4]]}, GRID), expected)
    relabelled = [{**objects[0], "label": (objects[0]["label"] + 1) % 5}, *objects[1:]]
    assert not same(condition({"objects": [relabelled]}, GRID), expected)


@pytest.mark.parametrize("transformer", ["gpt", "gpt_unmasked", "llama"])
def test_what_is_not_there_changes_no_logit(transformer: str) -> None:
    configs: dict[str, GPTConfig | LlamaConfig] = {
        "gpt": GPTConfig(num_layers=2, num_heads=2, width=WIDTH),
        "gpt_unmasked": GPTConfig(num_layers=2, num_heads=2, width=WIDTH, num_unmasked=7),
        "llama": LlamaConfig(num_layers=2, num_heads=2, width=WIDTH),
    }
    condition, model = built(configs[transformer])
    codes = torch.randint(TOKENS, (2, 16))
    prefix = condition({"objects": [layout(3), []]}, GRID)
    assert prefix.mask.tolist() == [[True] * 3 + [False] * 3 + [True], [False] * 6 + [True]]
    noise = torch.randn_like(prefix.embeddings).masked_fill(prefix.mask[..., None], 0)
    other = Prefix(prefix.embeddings + 100 * noise, prefix.mask, prefix.cells)
    with torch.no_grad():
        expected, found = model(codes, prefix, GRID), model(codes, other, GRID)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(model.prefill(other, codes[:, :5], GRID)[0], expected[:, 5], atol=1e-4)
        told = Prefix(other.embeddings, torch.ones_like(prefix.mask), prefix.cells)
        assert not torch.allclose(model(codes, told, GRID), expected, atol=1e-2)


def test_training_keeps_the_largest_and_sampling_refuses_more() -> None:
    condition, _ = built()
    objects = layout(9)

    def area(item: dict[str, Any]) -> float:
        x0, y0, x1, y1 = item["box"]
        return (x1 - x0) * (y1 - y0)

    largest = sorted(objects, key=area)[-6:]
    kept = condition({"objects": [objects]}, GRID)
    assert torch.equal(kept.embeddings, condition({"objects": [largest]}, GRID).embeddings)
    with pytest.raises(UserError, match="9 objects, but the model takes at most 6; leave out the smallest"):
        condition.read({"objects": objects})


def test_names_are_resolved() -> None:
    condition, _ = built(names=["cat", "dog", "house", "tree", "car"])
    box = [0, 0, 1, 1]
    read = condition.read({"objects": [[{"label": "house", "box": box}, {"label": "3", "box": box}], []]})
    assert [[item["label"] for item in objects] for objects in read["objects"]] == [[2, 3], []]
    with pytest.raises(UserError, match=r"'hause' is not one of the model's 5; near it, .* house"):
        condition.read({"objects": [{"label": "hause", "box": box}]})
    with pytest.raises(UserError, match=r"the label 1\.0 is not one"):
        condition.read({"objects": [{"label": 1.0, "box": box}]})
    with pytest.raises(UserError, match="the label True is not one"):
        condition.read({"objects": [{"label": True, "box": box}]})


def test_coverage_is_the_share_of_each_cell() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 0.375, 0.5], [0.25, 0.0, 0.5, 0.25], [0.9, 0.9, 1.0, 1.0]]])
    labels, mask = torch.tensor([[1, 1, 0]]), torch.tensor([[True, True, False]])
    covered = coverage(labels, boxes, mask, 2, (2, 4))
    assert not covered[..., 0].any()  # what is masked covers nothing
    # Columns are 0.25 wide and rows 0.5 high; the second box covers half of the cell that it shares.
    assert covered[0, ..., 1].tolist() == [[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    marked = centre_cells(labels, boxes, mask, 2, (2, 4))
    assert marked[0, ..., 1].tolist() == [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("form", ["features", "centres", "alone"])
def test_a_windows_layout_is_clipped_and_relative(form: str) -> None:
    condition, _ = built(**FORMS[form])
    grid, size = (8, 8), (4, 4)
    objects = [
        {"label": 0, "box": (0.25, 0.25, 0.75, 0.5)},  # reaches over the window's right edge
        {"label": 1, "box": (0.125, 0.125, 0.25, 0.25)},  # inside
        {"label": 2, "box": (0.7, 0.7, 0.9, 0.9)},  # outside
        {"label": 3, "box": (0.5, 0.0, 0.625, 1.0)},  # touches the edge from outside
    ]
    window = condition.windows({"objects": [objects]}, grid, size)(0, 0)
    expected = [
        {"label": 0, "box": (0.5, 0.5, 1.0, 1.0)},
        {"label": 1, "box": (0.25, 0.25, 0.5, 0.5)},
    ]
    assert same(window, condition({"objects": [expected]}, size))
    assert int(window.mask.sum()) == 3


def test_published_tokens() -> None:
    """By hand, from the facts in object_tokens: 70 tokens are 8 sections a side."""
    config = ObjectsConditionConfig(
        num_classes=5, max_objects=3, encoding=ObjectTokensConfig(num_tokens=TOKENS), dropout=0
    )
    condition = build_condition(config, width=WIDTH, downsample_factor=4)
    assert isinstance(condition, ObjectTokensCondition)
    assert condition.prefix_length(GRID) == 3 * 3 + 2
    objects: list[SceneObject] = [
        {"label": 4, "box": (0.5, 0.0, 1.0, 0.25)},
        {"label": 2, "box": (0.0, 0.0, 1.0, 1.0)},
    ]
    tokens = condition.tokens(objects, (0.0, 0.0, 1.0, 0.5))
    # 0.5 * 7 = 3.5 rounds to 4 and 0.25 * 7 = 1.75 to 2; the largest object comes first.
    assert tokens == [2, 0, 63, 4, 4, 2 * 8 + 7, 69, 69, 69, 0, 4 * 8 + 7]
    centres = ObjectTokensCondition(
        config.model_copy(update={"place": "centre"}), ObjectTokensConfig(num_tokens=TOKENS, crop=False)
    )
    assert centres.tokens(objects, (0.0, 0.0, 1.0, 1.0)) == [2, 36, 4, 1 * 8 + 5, 69, 69]
    assert condition.point(0.5 / 7, 1.5 / 7) == 2 * 8 + 0  # halves go to the even neighbour


def test_published_tokens_of_a_crop() -> None:
    """With a crop, boxes are the whole picture's; without, they are cut off on both sides of the frame."""
    objects: list[SceneObject] = [
        {"label": 1, "box": (0.0, 0.0, 0.75, 0.5)},
        {"label": 3, "box": (0.9, 0.0, 1.0, 0.1)},
    ]
    for crop in (True, False):
        condition, model = built(encoding={"kind": "tokens", "num_tokens": TOKENS, "crop": crop})
        assert isinstance(condition, ObjectTokensCondition)
        window = condition.windows({"objects": [objects]}, (8, 8), (4, 4))(0, 4)  # the right half's top
        if crop:
            told = condition.tokens(objects, (0.5, 0.0, 1.0, 0.5))
        else:
            told = condition.tokens(
                [{"label": 1, "box": (0.0, 0.0, 0.5, 1.0)}, {"label": 3, "box": (0.8, 0.0, 1.0, 0.2)}],
                (0.0, 0.0, 1.0, 1.0),
            )
        assert torch.equal(window.embeddings[0], model.token_embedding.weight[torch.tensor(told)])
        left = condition.windows({"objects": [objects]}, (8, 8), (4, 4))(0, 0)
        numbers = [
            int((model.token_embedding.weight == row).all(-1).nonzero()[0]) for row in left.embeddings[0]
        ]
        assert numbers.count(3) == 0  # the second object is outside of the left half
    condition, model = built(encoding={"kind": "tokens", "num_tokens": TOKENS})
    cropped = condition(
        {
            "objects": [[{"label": 1, "box": (0.0, 0.0, 0.5, 1.0)}]],
            "crop": torch.tensor([[0.5, 0.0, 1.0, 0.5]]),
        },
        GRID,
    )
    assert isinstance(condition, ObjectTokensCondition)
    told = condition.tokens([{"label": 1, "box": (0.5, 0.0, 0.75, 0.5)}], (0.5, 0.0, 1.0, 0.5))
    assert torch.equal(cropped.embeddings[0], model.token_embedding.weight[torch.tensor(told)])


def test_a_table_that_is_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_tokens 71 is more than the transformer's table of 70"):
        built(encoding={"kind": "tokens", "num_tokens": TOKENS + 1})


def test_a_pipeline_paints_a_layout_of_any_size(tokenizer: VQModel) -> None:
    pipe = make_pipeline(tokenizer, {"kind": "objects", "num_classes": 5, "max_objects": 6})
    layouts = [layout(3), layout(2, seed=1)]
    painted = pipe({"objects": layouts}, num_images=2, guidance_scale=1.5).codes
    assert painted.shape == (4, 4, 4)
    assert torch.equal(pipe({"objects": layouts[:1]}, guidance_scale=1.5).codes[0], painted[0])
    assert not torch.equal(pipe({"objects": layouts[1:]}, guidance_scale=1.5).codes[0], painted[0])
    wide = pipe({"objects": layouts}, height=8, width=16).codes
    assert wide.shape == (2, 4, 8)
    assert torch.equal(pipe({"objects": layouts}, height=8, width=16, schedule="wavefront").codes, wide)
    # What lies at the far right is not told where the first cells are painted.
    far = [*layouts[0], {"label": 1, "box": (0.9, 0.1, 1.0, 0.9)}]
    other = pipe({"objects": [far]}, height=8, width=16).codes
    assert torch.equal(other[0, 0, :2], wide[0, 0, :2])
    assert not torch.equal(other[0], wide[0])


def test_names_come_from_the_data() -> None:
    scenes = open_dataset(ScenesDataConfig(size=16, num_train=2), "train")
    config = fill_in(ObjectsConditionConfig(num_classes=5), lambda: scenes)
    assert isinstance(config, ObjectsConditionConfig)
    assert config.names == ("house", "pine", "ball", "boulder", "haystack")
    assert fill_in(config, lambda: pytest.fail("asked again")) == config
    condition = build_condition(config, width=WIDTH, downsample_factor=4)
    condition.check_data(scenes)
    few = fill_in(ObjectsConditionConfig(num_classes=3), lambda: scenes)
    with pytest.raises(UserError, match=r"5 classes of objects, .* set condition\.num_classes=5"):
        build_condition(few, width=WIDTH, downsample_factor=4).check_data(scenes)
    others = ObjectsConditionConfig(num_classes=5, names=("cat", *config.names[1:]))
    with pytest.raises(UserError, match=r"begin with 'cat', those of the data with 'house'"):
        build_condition(others, width=WIDTH, downsample_factor=4).check_data(scenes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_classes": 1, "names": ["a", "b"]}, "2 names are more than num_classes 1"),
        ({"num_classes": 2, "names": ["a", "a"]}, "two classes have the name 'a'"),
        ({"num_classes": 9, "encoding": {"kind": "tokens", "num_tokens": 9}}, "must be less than"),
    ],
)
def test_configs_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ObjectsConditionConfig.model_validate(values)


def test_models_keep_their_names(tokenizer: VQModel, tmp_path: Any) -> None:
    pipe = make_pipeline(tokenizer, {"kind": "objects", "num_classes": 2, "names": ["cat", "dog"]})
    pipe.save_pretrained(tmp_path)
    loaded = ARModel.from_pretrained(tmp_path, subfolder="transformer")
    read = loaded.condition.read({"objects": [{"label": "dog", "box": [0, 0, 1, 1]}]})
    assert read["objects"][0][0]["label"] == 1


def test_pictures_of_layouts_and_texts() -> None:
    objects: list[SceneObject] = [{"label": 1, "box": (0.25, 0.25, 0.75, 1.0)}]
    picture = paint_layout(objects, (64, 64))
    assert picture.shape == (3, 64, 64)
    drawn = (picture < 1).any(0).nonzero()
    assert drawn.min(0).values.tolist() == [16, 16]
    assert drawn.max(0).values.tolist() == [63, 47]
    assert not torch.equal(paint_layout(objects, (64, 64), ["cat", "dog"]), picture)
    assert torch.equal(paint_layout([], (8, 12)), torch.ones(3, 8, 12))
    assert (paint_text("a cat on a mat", (32, 40)) < 0).any()
