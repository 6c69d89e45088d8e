"""Text as a condition: words of a vocabulary, and frozen encoders that travel with their pipeline."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_vq import VQModel
from stage2_ar import ARPipeline
from stage2_ar.conditions import Condition, build_condition
from stage2_ar.conditions.from_data import fill_in
from stage2_ar.conditions.text import EncodedTextCondition, text_encoders
from stage2_ar.conditions.text_config import TextConditionConfig
from stage2_ar.conditions.words import WordsCondition, vocabulary_of, words_of
from stage2_ar.text_encoder import FrozenTextEncoder, open_encoder
from stage2_ar.transformer import build_transformer
from stage2_ar.transformer_config import GPTConfig, LlamaConfig
from taming.data.config import ScenesDataConfig
from taming.data.dataset import PictureDataset, open_dataset
from taming.errors import ArtifactError, ConfigError, UserError
from taming.types import Prefix
from tests.conftest import make_pipeline
from tests.stage2_ar.text_models import write_clip, write_t5

GRID, WIDTH = (3, 4), 16
VOCABULARY = ["a", "cat", "dog", "house", "houses", "red", "under"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("encoders") / "clip")


def text_condition(encoder: dict[str, Any], **options: Any) -> Any:
    config = TextConditionConfig.model_validate({"encoder": encoder, **options})
    filled = fill_in(config, lambda: pytest.fail("no data was needed"))
    torch.manual_seed(0)
    return build_condition(filled, width=WIDTH, downsample_factor=4).eval()


def words(**options: Any) -> WordsCondition:
    values = {"kind": "words", "vocabulary": VOCABULARY, "max_length": 5, "hidden_width": 8, **options}
    condition = text_condition(values)
    for parameter in condition.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert isinstance(condition, WordsCondition)
    return condition


def encoded(clip: Path, **options: Any) -> EncodedTextCondition:
    condition = text_condition({"kind": "transformers", "name": str(clip), "max_length": 12, **options})
    assert isinstance(condition, EncodedTextCondition)
    return condition


def say(condition: Condition, *texts: str) -> Prefix:
    return condition({"text": list(texts)}, GRID)


def test_words() -> None:
    assert words_of("A Cat's red-brown sea, 2 m!") == ["a", "cat's", "red-brown", "sea", "2", "m"]
    assert vocabulary_of(["B a", "a c"]) == ("a", "b", "c")


@pytest.mark.parametrize("context", ["attention", "convolution"])
def test_words_know_each_other_but_not_what_is_not_there(context: str) -> None:
    condition = words(context=context)
    prefix = say(condition, "a red cat", "A  RED, cat!", "dog", "unicorn")
    assert prefix.mask.tolist() == [[True] * 3 + [False] * 2 + [True]] * 2 + [
        [True] + [False] * 4 + [True],
        [False] * 5 + [True],
    ]
    assert torch.equal(prefix.embeddings[0], prefix.embeddings[1])
    assert not prefix.embeddings[~prefix.mask].any()
    other = say(condition, "a red dog")
    changed = (prefix.embeddings[0] - other.embeddings[0]).abs().amax(-1) > 1e-6
    assert changed[1:3].all()  # an earlier word knows of a later one
    assert not changed[3:].any()
    # More room behind a caption is nothing to its words.
    longer = words(context=context, max_length=9)
    with torch.no_grad():
        longer.positions[:5] = condition.positions
    state = {name: value for name, value in condition.state_dict().items() if name != "positions"}
    longer.load_state_dict({**state, "positions": longer.positions.detach()})
    assert torch.allclose(say(longer, "a red cat").embeddings[0, :3], prefix.embeddings[0, :3], atol=1e-6)


def test_long_captions_are_cut_in_training() -> None:
    condition = words()
    cut = say(condition, "a red cat under a red house")
    assert torch.equal(cut.embeddings, say(condition, "a red cat under a").embeddings)
    with pytest.raises(UserError, match="7 words, but the model takes at most 5; shorten it"):
        condition.read({"text": "a red cat under a red house"})


def test_unknown_words_are_refused_by_name() -> None:
    condition = words()
    with pytest.raises(UserError, match=r"'hause' is not one of the 7 .*; near it are house, houses"):
        condition.read({"text": ["a cat", "a hause"]})
    with pytest.raises(UserError, match=r"'xyz' is not one of the 7 .*; it knows a, cat, dog"):
        condition.read({"text": "xyz"})
    assert condition.read({"text": "A Cat."}) == {"text": ["A Cat."]}


def test_the_vocabulary_comes_from_the_training_captions() -> None:
    scenes = open_dataset(ScenesDataConfig(size=16, num_train=8), "train")
    config = fill_in(TextConditionConfig(), lambda: scenes)
    condition = build_condition(config, width=WIDTH, downsample_factor=4)
    assert isinstance(condition, WordsCondition)
    condition.check_data(scenes)
    for index in range(8):
        condition.check_text(scenes.sample(index, -1)["text"])
    words().check_data(scenes)  # some of its words
    with pytest.raises(UserError, match=r"\(a, an, .* no word in common with the vocabulary \(yes\)"):
        words(vocabulary=["yes"]).check_data(scenes)

    class Silent:
        provides = frozenset({"image"})

    silent: Any = Silent()
    assert isinstance(silent, PictureDataset) is False
    with pytest.raises(UserError, match=r"the data has none; set data\.text to a folder"):
        words().check_data(silent)


@pytest.mark.parametrize("kind", ["words", "clip"])
@pytest.mark.parametrize("transformer", ["gpt", "llama"])
def test_other_padding_same_logits(kind: str, transformer: str, clip: Path) -> None:
    condition: Condition = words() if kind == "words" else encoded(clip)
    config: GPTConfig | LlamaConfig = (
        GPTConfig(num_layers=2, num_heads=2, width=WIDTH, num_unmasked=4)
        if transformer == "gpt"
        else LlamaConfig(num_layers=2, num_heads=2, width=WIDTH)
    )
    model = build_transformer(
        config, vocabulary_size=9, grid=GRID, prefix_length=condition.prefix_length(GRID)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    codes = torch.randint(9, (2, 12))
    prefix = say(condition, "a cat", "red")
    assert not prefix.mask.all()
    noise = 100 * torch.randn_like(prefix.embeddings).masked_fill(prefix.mask[..., None], 0)
    with torch.no_grad():
        expected = model(codes, prefix, GRID)
        assert torch.allclose(
            model(codes, replace(prefix, embeddings=prefix.embeddings + noise), GRID), expected, atol=1e-5
        )
        loud = replace(prefix, embeddings=prefix.embeddings + noise, mask=torch.ones_like(prefix.mask))
        assert not torch.allclose(model(codes, loud, GRID), expected, atol=1e-2)


def test_features_are_those_of_the_library(clip: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(clip)
    library = CLIPTextModel.from_pretrained(clip).eval()
    texts = ["a cat", "a red house"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = library(**tokens).last_hidden_state
    condition = encoded(clip)
    found, mask = condition.encoder.padded(texts, torch.device("cpu"))
    assert mask.sum(1).tolist() == tokens["attention_mask"].sum(1).tolist()
    for row in range(2):
        length = int(mask[row].sum())
        assert torch.allclose(found[row, :length], expected[row, :length], atol=1e-5)
        assert not found[row, length:].any()
    prefix = say(condition, *texts)
    assert prefix.mask[:, -1].all()
    assert prefix.mask[:, :-1].equal(mask)


def test_the_encoder_is_no_part_of_the_weights(clip: Path) -> None:
    condition = encoded(clip)
    say(condition, "a cat")
    assert {name.split(".")[0] for name in condition.state_dict()} == {
        "start",
        "null_embedding",
        "norm",
        "out",
        "pooled_norm",
        "pooled_out",
    }
    assert not any(p.requires_grad for p in condition.encoder.opened.model.parameters())
    assert copy.deepcopy(condition).encoder is condition.encoder  # an average of weights does not double it
    for _ in range(8):
        prefix = condition.train()({"text": ["a cat", "a dog"]}, GRID)
        assert prefix.cells is not None
        (prefix.embeddings.pow(2).sum() + prefix.cells.pow(2).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in condition.parameters())


def test_features_are_computed_once(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    compute = FrozenTextEncoder._compute

    def counted(self: FrozenTextEncoder, text: str, device: torch.device) -> Tensor:
        computed.append(text)
        return compute(self, text, device)

    monkeypatch.setattr(FrozenTextEncoder, "_compute", counted)
    condition = encoded(clip, disk_cache=True)
    condition.encoder.disk_cache = tmp_path / "features"
    first = say(condition, "a cat", "a dog", "a cat")
    say(condition, "a dog")
    assert computed == ["a cat", "a dog"]
    fresh = encoded(clip)
    fresh.encoder.disk_cache = tmp_path / "features"
    assert torch.equal(say(fresh, "a cat", "a dog", "a cat").embeddings, first.embeddings)
    assert computed == ["a cat", "a dog"]
    (cut,) = list((tmp_path / "features").rglob("*.safetensors"))[:1]
    cut.write_bytes(b"cut off")
    fresh = encoded(clip)
    fresh.encoder.disk_cache = tmp_path / "features"
    assert torch.equal(say(fresh, "a cat", "a dog", "a cat").embeddings, first.embeddings)
    assert len(computed) == 3
    monkeypatch.setattr("stage2_ar.text_encoder.CACHE_BYTES", 1)
    small = encoded(clip)
    assert torch.equal(say(small, "a cat", "a dog", "a cat").embeddings, first.embeddings)
    assert len(small.encoder._kept) == 1


def test_texts_that_are_too_long(clip: Path) -> None:
    condition = encoded(clip)
    assert say(condition, "abcdefghijklmnopqrstuvwxyz").mask.all()
    with pytest.raises(UserError, match="more than the 12 tokens that the model takes; shorten it"):
        condition.read({"text": "abcdefghijklmnopqrstuvwxyz"})
    assert condition.read({"text": "abcdefghij"}) == {"text": ["abcdefghij"]}  # with its two ends
    with pytest.raises(UserError, match=r"max_length 30 is more than the 20 positions .* set it to 20"):
        encoded(clip, max_length=30)


def test_a_pipeline_takes_its_encoder_along(clip: Path, tokenizer: VQModel, tmp_path: Path) -> None:
    mine = shutil.copytree(clip, tmp_path / "mine")
    config = fill_in(
        TextConditionConfig.model_validate(
            {"encoder": {"kind": "transformers", "name": str(mine), "max_length": 8}}
        ),
        lambda: pytest.fail("no data was needed"),
    )
    pipe = make_pipeline(tokenizer, config.model_dump())
    assert isinstance(pipe.model.condition, EncodedTextCondition)
    with torch.no_grad():
        pipe.model.condition.out.weight.mul_(100)
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures, texts = picture.repeat(2, 1, 1, 1), {"text": ["a cat", "a dog"]}
    expected = pipe.log_likelihood(pictures, texts)
    assert expected[0] != expected[1]  # the same picture, told otherwise
    pipe.save_pretrained(tmp_path / "pipe")
    shutil.rmtree(mine)  # who loads the pipeline does not have it
    loaded = ARPipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(loaded.log_likelihood(pictures, texts), expected)
    stamp = (tmp_path / "pipe/text_encoder/model.safetensors").stat().st_mtime_ns
    pipe.save_pretrained(tmp_path / "pipe")  # as each checkpoint does
    assert (tmp_path / "pipe/text_encoder/model.safetensors").stat().st_mtime_ns == stamp
    loaded.save_pretrained(tmp_path / "again")
    assert len(text_encoders(ARPipeline.from_pretrained(tmp_path / "again").model)) == 1
    shutil.rmtree(tmp_path / "pipe/text_encoder")
    with pytest.raises(ArtifactError, match=r"holds no text_encoder, .* copy the whole pipeline folder"):
        ARPipeline.from_pretrained(tmp_path / "pipe")
    write_clip(tmp_path / "pipe/text_encoder", seed=1)
    with pytest.raises(ArtifactError, match=r"trained with .*: its features mean something else"):
        ARPipeline.from_pretrained(tmp_path / "pipe")({"text": "a cat"})


def test_of_t5_the_encoder_alone(clip: Path, tmp_path: Path) -> None:
    opened = open_encoder(write_t5(tmp_path / "t5", clip))
    assert type(opened.model).__name__ == "T5EncoderModel"
    assert opened.hidden_size == 12
    condition = encoded(tmp_path / "t5")
    assert say(condition, "a cat").embeddings.shape == (1, 13, WIDTH)


def test_encoders_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ArtifactError, match=r"no folder .*/none' with a text encoder, and it is not a hub id"
    ):
        open_encoder(tmp_path / "none")
    pickled = write_clip(tmp_path / "pickled", pickled=True)
    with pytest.raises(ArtifactError, match=r"cannot be opened: .*safetensors"):
        open_encoder(pickled)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot be opened: .*; give the folder or hub id"):
        open_encoder(tmp_path / "empty")
    foreign = write_clip(tmp_path / "foreign")
    (foreign / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}'
    )
    (foreign / "mine.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ArtifactError, match="cannot be opened"):
        open_encoder(foreign)
    unfilled = TextConditionConfig.model_validate({"encoder": {"kind": "transformers", "name": "x"}})
    with pytest.raises(ConfigError, match="no hidden_size and weights_hash"):
        build_condition(unfilled, width=WIDTH, downsample_factor=4)
