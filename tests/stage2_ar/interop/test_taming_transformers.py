"""Import of published transformers of other sizes and settings than the reference's, and what is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.testing import assert_close

from stage1_vq import VQModel
from stage1_vq.inputs import one_hot
from stage2_ar import ARPipeline
from stage2_ar.interop.taming_transformers import import_gpt, import_transformer
from taming.errors import ArtifactError, ConfigError
from tests.end_to_end.test_command_line import refused, succeeds
from tests.stage1_vq.interop.published import published_yaml, small_model, write_published
from tests.stage2_ar.interop.published import (
    PublishedGPT,
    checkpoint_of,
    container_yaml,
    gpt_yaml,
    random_gpt,
)

GRID, FACTOR, TABLE, CODES = (4, 6), 4, 40, 24
SIZE = (GRID[0] * FACTOR, GRID[1] * FACTOR)
CELLS = GRID[0] * GRID[1]


@cache
def tokenizer_of() -> VQModel:
    return small_model()


@cache
def maps_tokenizer(codes: int = 16, key: str = "segmentation") -> VQModel:
    channels = 5 if key == "segmentation" else 1
    quantizer = {"kind": "nearest", "codebook_size": codes, "code_dim": 4}
    return small_model(input=key, in_channels=channels, quantizer=quantizer)


def stage(model: VQModel, **params: Any) -> dict[str, Any]:
    described = published_yaml(model, **params)["model"]
    return {"target": described["target"], "params": described["params"]}


def imported(folder: Path, state: dict[str, Any], description: dict[str, Any], **options: Any) -> ARPipeline:
    """Imported, saved and loaded again."""
    checkpoint, config = write_published(folder, state, description)
    result = import_transformer(checkpoint, config=config, **options)
    result.save(folder / "out")
    left = sum(map(len, result.left_out.values()))
    assert result.num_used + left == len(state)
    return ARPipeline.from_pretrained(folder / "out")


def agrees(
    pipe: ARPipeline,
    gpt: PublishedGPT,
    conditions: dict[str, Any],
    prefix: Tensor,
    order: Tensor | None = None,
) -> None:
    """Logits, likelihood and greedy codes against the plain transformer's, on prefix (2, P) tokens."""
    order = torch.arange(CELLS) if order is None else order
    assert pipe.model.config.grid == GRID
    assert torch.equal(pipe.model.transformer.sequence_cells(GRID), order)
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    codes, vocabulary = pipe.tokenizer.encode(images), pipe.model.config.vocabulary_size
    expected = gpt.teacher_forced(prefix, codes.flatten(1)[:, order], vocabulary)
    batch = pipe.model.condition.read(conditions) or {"key": ["a", "b"]}
    with torch.no_grad():
        logits = pipe.model(codes, batch)[:, order]
    assert_close(logits, expected, atol=1e-4, rtol=0)
    nats = -torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), codes.flatten(1)[:, order].flatten(), reduction="none"
    )
    assert_close(pipe.log_likelihood(images, conditions), nats.view(2, -1).sum(1), atol=1e-3, rtol=0)
    greedy = pipe(conditions, num_images=1 if conditions else 2, greedy=True).codes
    assert greedy.unique().numel() > 4
    assert torch.equal(greedy.flatten(1)[:, order], gpt.greedy(prefix, CELLS, vocabulary))


@pytest.mark.parametrize(("key", "codes"), [("segmentation", 16), ("depth", 32)])
def test_maps_on_a_wide_grid(tmp_path: Path, key: str, codes: int) -> None:
    """Other numbers of codes for pictures and maps, and a table larger than both."""
    gpt = random_gpt(TABLE, 2 * CELLS)
    first, second = tokenizer_of(), maps_tokenizer(codes, key)
    # As in the published S-FLCKR file: the condition stage is an ordinary model that says what it encodes.
    description = container_yaml(gpt, first, stage(second, image_key=key), key)
    pipe = imported(tmp_path, checkpoint_of(gpt, first, second), description, size=SIZE)
    maps = torch.randint(5, (2, *SIZE)) if key == "segmentation" else torch.rand(2, 1, *SIZE)
    tokens = second.encode(one_hot(maps, 5) if key == "segmentation" else maps * 2 - 1).flatten(1)
    assert tokens.unique().numel() > 4
    agrees(pipe, gpt, {key: maps}, tokens)
    # Four times the cells, by the published window.
    large = maps.repeat(*[1] * (maps.ndim - 2), 2, 2)[:1]
    whole = second.encode(one_hot(large, 5) if key == "segmentation" else large * 2 - 1)
    expected = gpt.greedy_sliding(whole, GRID, CODES)
    for schedule in ("serial", "wavefront"):
        options: dict[str, Any] = {"height": 2 * SIZE[0], "width": 2 * SIZE[1], "schedule": schedule}
        assert torch.equal(pipe({key: large}, greedy=True, **options).codes, expected)


def test_what_a_map_is_of_may_stand_in_the_transformers_key(tmp_path: Path) -> None:
    gpt, first, second = random_gpt(TABLE, 2 * CELLS), tokenizer_of(), maps_tokenizer(key="depth")
    description = container_yaml(gpt, first, stage(second), "depth")
    pipe = imported(tmp_path, checkpoint_of(gpt, first, second), description, size=SIZE)
    assert dict(pipe.model.condition.keys) == {"depth": "depth"}


ORDERS = {
    "Random": torch.randperm(CELLS, generator=torch.Generator().manual_seed(1)),
    "AlternateParsing": torch.cat(
        [row.flip(0) if number % 2 else row for number, row in enumerate(torch.arange(CELLS).view(GRID))]
    ),
}


@pytest.mark.parametrize(("kind", "masks"), [("Random", True), ("AlternateParsing", False)])
def test_orders_and_unmasked_prefixes(tmp_path: Path, kind: str, masks: bool) -> None:
    order = ORDERS[kind]
    gpt = random_gpt(TABLE, 64, num_unmasked=CELLS)
    first, second = tokenizer_of(), maps_tokenizer()
    permuter = {"target": f"taming.modules.transformer.permuter.{kind}", "params": {"H": 4, "W": 6}}
    description = container_yaml(gpt, first, stage(second, image_key="segmentation"), "segmentation")
    description["model"]["params"]["permuter_config"] = permuter
    state = checkpoint_of(gpt, first, second, order=order, masks=masks)
    pipe = imported(tmp_path, state, description)  # the permuter's grid tells the size
    assert pipe.model.config.order.kind == {"Random": "given", "AlternateParsing": "alternating"}[kind]
    maps = torch.randint(5, (2, *SIZE))
    agrees(pipe, gpt, {"segmentation": maps}, second.encode(maps).flatten(1), order)


def test_masks_decide_how_much_is_unmasked(tmp_path: Path) -> None:
    gpt, first, second = random_gpt(TABLE, 64, num_unmasked=10), tokenizer_of(), maps_tokenizer()
    description = container_yaml(gpt, first, stage(second, image_key="segmentation"), "segmentation")
    description["model"]["params"]["transformer_config"]["params"]["n_unmasked"] = 0
    pipe = imported(tmp_path, checkpoint_of(gpt, first, second), description, size=SIZE)
    assert "which decide" in (tmp_path / "out" / "import.json").read_text()
    maps = torch.randint(5, (2, *SIZE))
    agrees(pipe, gpt, {"segmentation": maps}, second.encode(maps).flatten(1))


def test_classes_with_the_shortest_block_and_a_gumbel_tokenizer(tmp_path: Path) -> None:
    """As the published class-conditional model: the last code's place is missing."""
    gpt = random_gpt(TABLE, CELLS)
    first = small_model(quantizer={"kind": "gumbel", "codebook_size": CODES, "code_dim": 8})
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 30}}
    description = container_yaml(gpt, first, labels, "class_label", "taming.models.vqgan.GumbelVQ")
    pipe = imported(tmp_path, checkpoint_of(gpt, first), description, size=SIZE)
    agrees(pipe, gpt, {"class": [3, 29]}, torch.tensor([[3], [29]]))


@pytest.mark.parametrize("stage", ["__is_unconditional__", "ignored"])
def test_a_start_token(tmp_path: Path, stage: Any) -> None:
    gpt, first = random_gpt(TABLE, 64), tokenizer_of()
    params: dict[str, Any] = {"sos_token": 7}
    if stage == "ignored":
        params["unconditional"] = True
    description = container_yaml(gpt, first, stage, "image", **params)
    pipe = imported(tmp_path, checkpoint_of(gpt, first), description, size=SIZE)
    agrees(pipe, gpt, {}, torch.full((2, 1), 7))


@pytest.mark.parametrize("levels", [TABLE - 1, TABLE])
def test_coordinates(tmp_path: Path, levels: int) -> None:
    gpt, first = random_gpt(TABLE, 2 * CELLS), tokenizer_of()
    params = {"n_embed": levels, "down_factor": FACTOR}
    coordinates = {"target": "taming.modules.misc.coord.CoordStage", "params": params}
    description = container_yaml(gpt, first, coordinates, "coord")
    pipe = imported(tmp_path, checkpoint_of(gpt, first), description, size=SIZE)

    def tokens(height: int, width: int) -> Tensor:
        places = torch.arange(height * width).view(1, 1, height, width) / (height * width)
        return (levels * torch.nn.functional.avg_pool2d(places, FACTOR)).round().long()[0]

    agrees(pipe, gpt, {}, tokens(*SIZE).flatten(1).expand(2, -1))
    expected = gpt.greedy_sliding(tokens(28, 40), GRID, CODES)
    assert torch.equal(pipe(height=28, width=40, greedy=True).codes, expected)


def test_the_first_stage_on_a_smaller_second_picture(tmp_path: Path) -> None:
    """__is_first_stage__ with downsample_cond_size: nearest pixels, encoded by the picture's tokenizer."""
    gpt, first = random_gpt(TABLE, 9 + CELLS), tokenizer_of()
    description = container_yaml(gpt, first, "__is_first_stage__", "image", downsample_cond_size=12)
    pipe = imported(tmp_path, checkpoint_of(gpt, first, first), description, size=SIZE)
    second = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = first.encode(torch.nn.functional.interpolate(second, size=(12, 12))).flatten(1)
    agrees(pipe, gpt, {"image": second}, tokens)


@pytest.mark.parametrize("key", ["objects_bbox", "objects_center_points"])
def test_layouts_of_objects(tmp_path: Path, key: str) -> None:
    """Class and corners (or centre) of each object, the rest padded, and the crop, which is all."""
    each = 3 if key == "objects_bbox" else 2
    gpt, first = random_gpt(TABLE, 4 * each + 2 + CELLS), tokenizer_of()
    objects = {
        "target": "taming.models.dummy_cond_stage.DummyCondStage",
        "params": {"conditional_key": key},
    }
    description = container_yaml(gpt, first, objects, key)
    made = {"no_tokens": 37, "max_objects_per_image": 4, "encode_crop": True, "split": "train"}
    description["data"] = {"target": "main.DataModuleFromConfig", "params": {"train": {"params": made}}}
    pipe = imported(tmp_path, checkpoint_of(gpt, first), description, size=SIZE)
    layout = [{"label": 5, "box": (0.0, 0.2, 1.0, 0.8)}, {"label": 2, "box": (0.2, 0.2, 0.4, 0.6)}]
    if each == 3:  # 6 sections a side: 0.2 is the first, 0.4 the second
        tokens = [5, 6, 29, 2, 7, 20, *[36] * 6, 0, 35]
    else:  # centres (0.5, 0.5) and (0.3, 0.4); halves go to even sections
        tokens = [5, 14, 2, 14, *[36] * 4, 0, 35]
    agrees(pipe, gpt, {"objects": [layout, layout]}, torch.tensor([tokens, tokens]))


@pytest.mark.parametrize(
    ("block", "condition", "side", "note"),
    [
        (17, "__is_unconditional__", 4, None),
        (64, "__is_unconditional__", 4, "it has 48 positions more"),
        (9, "__is_unconditional__", 3, "12x12, which fill its 9 positions"),
    ],
)
def test_the_size_that_is_taken(
    tmp_path: Path, block: int, condition: str, side: int, note: str | None
) -> None:
    gpt, first = random_gpt(TABLE, block), tokenizer_of()
    description = container_yaml(gpt, first, condition, "image")
    checkpoint, config = write_published(tmp_path, checkpoint_of(gpt, first), description)
    result = import_transformer(checkpoint, config=config)
    assert result.pipeline.model.config.grid == (side, side)
    assert any("taken to be trained" in said for said in result.notes) == (note is not None)
    assert note is None or any(note in said for said in result.notes)


def test_codes_that_are_kept(tmp_path: Path) -> None:
    """quantize.used: the transformer numbers the codes that are left."""
    gpt, first = random_gpt(CODES, 64), tokenizer_of()
    state = checkpoint_of(gpt, first)
    state["first_stage_model.quantize.used"] = torch.tensor([1, 4, 5, 9, 12, 20])
    description = container_yaml(gpt, first, "__is_unconditional__", "image")
    pipe = imported(tmp_path, state, description, size=SIZE)
    assert pipe.model.config.vocabulary_size == 6
    assert torch.equal(pipe.tokenizer.codebook[1], first.codebook[4])


def test_a_bare_transformer(tmp_path: Path) -> None:
    gpt, first, second = random_gpt(TABLE, 2 * CELLS), tokenizer_of(), maps_tokenizer(key="depth")
    checkpoint, config = write_published(tmp_path, gpt.state, {"model": gpt_yaml(gpt), "window": 4})
    transformer = import_gpt(checkpoint, config=config, grid=GRID, prefix_length=CELLS)
    assert transformer.vocabulary_size == TABLE
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    command = [
        "ar",
        "import",
        "taming-transformers",
        checkpoint,
        "--config",
        config,
        "--out",
        tmp_path / "out",
    ]
    tokenizers = ["--tokenizer", tmp_path / "first", "--condition-tokenizer", tmp_path / "second"]
    assert "condition: depth" in succeeds(*command, *tokenizers, "--size", "16x24")
    depth = torch.rand(2, 1, *SIZE)
    tokens = second.encode(depth * 2 - 1).flatten(1)
    agrees(ARPipeline.from_pretrained(tmp_path / "out"), gpt, {"depth": depth}, tokens)
    assert "give the pictures' one as --tokenizer" in refused(*command[:-1], tmp_path / "no")
    assert "--tokenizer too" in refused(*command[:-1], tmp_path / "no", *tokenizers[2:])
    assert not (tmp_path / "no").exists()
    start = import_transformer(checkpoint, config=config, tokenizer=first, size=SIZE)
    agrees(start.pipeline, gpt, {}, torch.zeros(2, 1, dtype=torch.int64))


def test_the_command_line_says_what_it_did(tmp_path: Path) -> None:
    gpt, first, second = random_gpt(TABLE, 2 * 16), tokenizer_of(), maps_tokenizer()
    description = container_yaml(gpt, first, stage(second, image_key="segmentation"), "segmentation")
    state = checkpoint_of(gpt, first, second) | {"loss.weight": torch.zeros(2)}
    state["cond_stage_model.colorize"] = torch.zeros(3, 5, 1, 1)
    checkpoint, config = write_published(tmp_path, state, description)
    said = succeeds(
        *("ar", "import", "taming-transformers", checkpoint, "--config", config, "--out", tmp_path / "out")
    )
    assert "pictures of 16x16, condition: segmentation, order: raster" in said
    account = json.loads((tmp_path / "out" / "import.json").read_text())
    assert account["left_out"]["no part of the transformer or its tokenizers"] == ["loss.weight"]
    assert len(account["origin"]["sha256"]) == 64
    folders = {path.name for path in (tmp_path / "out").iterdir()}
    assert folders == {"transformer", "tokenizer", "condition_tokenizer", "import.json"}


def spoiled(key: str, value: Any) -> Any:
    """A change of one key of the container's params, "a.b" for one inside."""

    def change(state: dict[str, Any], params: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            params = params[parent]
        if value is None:
            del params[last]
        else:
            params[last] = value

    return change


def without(prefix: str) -> Any:
    def change(state: dict[str, Any], params: dict[str, Any]) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]

    return change


def reshaped(key: str, *shape: int) -> Any:
    def change(state: dict[str, Any], params: dict[str, Any]) -> None:
        state[key] = torch.zeros(*shape)

    return change


GPT_PARAMS = "transformer_config.params"
PERMUTER = {"target": "taming.modules.transformer.permuter.Random", "params": {"H": 4, "W": 4}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoiled(f"{GPT_PARAMS}.n_head", None), "'n_head' is missing, and the number of heads"),
        (spoiled(f"{GPT_PARAMS}.n_head", 5), "n_head 5 does not divide the width 32"),
        (spoiled(f"{GPT_PARAMS}.n_head", 0), "n_head is 0"),
        (spoiled(f"{GPT_PARAMS}.n_head", "four"), "n_head is 'four', not a number"),
        (spoiled(f"{GPT_PARAMS}.n_layer", 7), "n_layer is 2 by its weights and 7 by the YAML"),
        (spoiled(f"{GPT_PARAMS}.rotary", True), "'rotary' is not one that can be imported"),
        (spoiled("transformer_config.target", "x.CodeGPT"), "transformer_config.target is 'x.CodeGPT'"),
        (spoiled("cond_stage_config.target", "os.system"), "cond_stage_config.target 'os.system'"),
        (spoiled("cond_stage_config", None), "cond_stage_config is None"),
        (spoiled("first_stage_config.target", "os.system"), "target 'os.system' is not an autoencoder"),
        (spoiled("first_stage_config", None), "key 'first_stage_config' is missing"),
        (spoiled("surprise", 1), "key 'surprise' is not one"),
        (spoiled("pkeep", 0.0), "pkeep is 0.0"),
        (spoiled("permuter_config", {"target": "x.Y"}), "permuter_config.target 'x.Y' is not known"),
        (spoiled("permuter_config", PERMUTER), "has no permuter.forward_shuffle_idx"),
        (without("first_stage_model."), "has no first_stage_model, which model.yaml describes"),
        (without("cond_stage_model."), "has no cond_stage_model"),
        (without("transformer."), r"has no transformer\.\* tensors"),
        (without("transformer.blocks.1.mlp.2.weight"), r"1 tensors are missing \(blocks.1.mlp.2.weight\)"),
        (without("transformer.head"), r"missing \(head.weight\)"),
        (without("first_stage_model.encoder.conv_in"), "2 keys are missing"),
        (reshaped("transformer.blocks.0.attn.proj.weight", 32, 31), r"\(32, 31\) and should be \(32, 32\)"),
        (reshaped("transformer.blocks.0.attn.extra", 3), "1 tensors are not expected"),
        (reshaped("transformer.blocks.0.attn.mask", 1, 1, 32, 32), "are not causal ones"),
        (reshaped("permuter.forward_shuffle_idx", 16), "are permuter.forward_shuffle_idx; known"),
    ],
)
def test_what_is_refused_in_one_line(tmp_path: Path, change: Any, message: str) -> None:
    gpt, first, second = random_gpt(TABLE, 32), tokenizer_of(), maps_tokenizer()
    description = container_yaml(gpt, first, stage(second, image_key="segmentation"), "segmentation")
    state: dict[str, Any] = checkpoint_of(gpt, first, second)
    change(state, description["model"]["params"])
    checkpoint, config = write_published(tmp_path, state, description)
    with pytest.raises((ArtifactError, ConfigError), match=message) as caught:
        import_transformer(checkpoint, config=config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16, 22), "does not divide into cells of 4x4 pixels; give 16x20"),
        ((32, 32), r"pictures of 32x32 pixels: block_size 32 is smaller .* as --size HxW"),
    ],
)
def test_a_size_that_cannot_be(tmp_path: Path, size: tuple[int, int], message: str) -> None:
    gpt, first, second = random_gpt(TABLE, 32), tokenizer_of(), maps_tokenizer()
    description = container_yaml(gpt, first, stage(second, image_key="segmentation"), "segmentation")
    checkpoint, config = write_published(tmp_path, checkpoint_of(gpt, first, second), description)
    with pytest.raises(ConfigError, match=message):
        import_transformer(checkpoint, config=config, size=size)


@pytest.mark.parametrize(
    ("table", "unmasked", "message"),
    [
        (20, 0, "the tokenizer has 24 codes and the transformer's table only 20"),
        (TABLE, 20, "n_unmasked 20 is more than the prefix of 16"),
    ],
)
def test_what_does_not_belong_together(tmp_path: Path, table: int, unmasked: int, message: str) -> None:
    gpt, first = random_gpt(table, 32, num_unmasked=unmasked), tokenizer_of()
    second = maps_tokenizer()
    description = container_yaml(gpt, first, stage(second, image_key="segmentation"), "segmentation")
    checkpoint, config = write_published(tmp_path, checkpoint_of(gpt, first, second), description)
    with pytest.raises(ConfigError, match=message):
        import_transformer(checkpoint, config=config)


def test_an_order_of_another_size(tmp_path: Path) -> None:
    gpt, first = random_gpt(TABLE, 32), tokenizer_of()
    state = checkpoint_of(gpt, first, order=torch.arange(20).flip(0))
    description = container_yaml(gpt, first, "__is_unconditional__", "image")
    checkpoint, config = write_published(tmp_path, state, description)
    with pytest.raises(ArtifactError, match="order has 20 cells, and a picture of 4x4 cells 16"):
        import_transformer(checkpoint, config=config)
    assert import_transformer(checkpoint, config=config, size=(16, 20)).pipeline.model.config.grid == (4, 5)


def test_mistakes_on_the_command_line_leave_nothing(tmp_path: Path) -> None:
    gpt, first = random_gpt(TABLE, 32), tokenizer_of()
    description = container_yaml(gpt, first, "__is_unconditional__", "image")
    checkpoint, config = write_published(tmp_path, checkpoint_of(gpt, first), description)
    out = tmp_path / "out"
    command = ["ar", "import", "taming-transformers", checkpoint, "--out", out]
    assert "give the YAML file that came with it as --config" in refused(*command)
    assert "does not exist" in refused(*command, "--config", tmp_path / "no.yaml")
    assert "no importer for 'dalle'" in refused("ar", "import", "dalle", checkpoint, "--out", out)
    first.save_pretrained(tmp_path / "first")
    assert "leave --tokenizer out" in refused(*command, "--config", config, "--tokenizer", tmp_path / "first")
    (tmp_path / "tokenizer.yaml").write_text(yaml.safe_dump(published_yaml(first)))
    said = refused(*command, "--config", tmp_path / "tokenizer.yaml")
    assert "a tokenizer alone is read by `taming vq import taming-transformers`" in said
    assert not out.exists()
