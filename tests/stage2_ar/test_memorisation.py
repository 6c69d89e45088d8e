"""A model that knows its pictures by heart is caught, in training and afterwards; a healthy one is not."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stage1_vq import VQModel
from stage1_vq.codes import write_codes
from stage1_vq.config import VQModelConfig
from stage2_ar import ARPipeline
from stage2_ar.cli import app
from stage2_ar.codes import CodeDataset
from stage2_ar.config import MemorisationConfig
from stage2_ar.evaluate import evaluate_pipeline, open_data
from stage2_ar.memorisation import FixedSample, MemorisationWatch, measure_memorisation, nearest_codes
from stage2_ar.train import train
from taming.config import build_config
from taming.data.config import ScenesDataConfig
from taming.data.dataset import open_dataset
from taming.errors import UserError
from taming.training.run import RunResult
from tests.conftest import TINY_MODEL, TINY_TRAINING, ar_config, make_pipeline


def test_the_watch_warns_once_where_the_gap_is_wide() -> None:
    watch = MemorisationWatch(MemorisationConfig(gap=0.2))
    assert watch.observe(8.0, 8.5) is None
    assert watch.observe(6.5, 8.0) is None
    said = watch.observe(6.0, 7.9)
    assert said is not None
    assert "they cost 6 bits a code, held-out ones 7.9" in said
    assert watch.observe(3.0, 9.0) is None


def test_the_watch_warns_where_held_out_pictures_cost_more_again() -> None:
    watch = MemorisationWatch(MemorisationConfig(gap=0.5, rise=0.01))
    assert watch.observe(6.0, 6.5) is None
    assert watch.observe(5.9, 6.0) is None
    assert watch.observe(5.8, 6.05) is None  # within a hundredth
    assert watch.observe(6.0, 6.2) is None  # both rise: it diverges, but learns nothing by heart
    again = MemorisationWatch(MemorisationConfig(gap=0.5, rise=0.01))
    again.load_state_dict(watch.state_dict())
    for one in (watch, again):
        said = one.observe(5.5, 6.1)
        assert said is not None
        assert "after 6 at best" in said


def test_nearest_codes_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (5, 12), generator=generator)
    training = torch.randint(4, (30, 12), generator=generator).int()
    training[17] = codes[3]
    shares, nearest = nearest_codes(codes, training, chunk=40)
    for n in range(5):
        counts = [(codes[n] == row).float().mean().item() for row in training]
        assert shares[n].item() == pytest.approx(max(counts))
        assert counts[int(nearest[n])] == max(counts)
    assert (shares[3], nearest[3]) == (1.0, 17)


def test_a_fixed_sample_is_spread_and_stays() -> None:
    data = open_dataset(ScenesDataConfig(size=16, num_train=100, num_validation=4), "train")
    sample, again = FixedSample(data, 10), FixedSample(data, 10)
    assert sample.indices == again.indices
    assert len(sample) == 10
    assert max(sample.indices) > 50
    assert sample.sample(3, -1)["key"] == data.sample(sample.indices[3], -1)["key"]
    assert len(FixedSample(data, 1000)) == 100
    assert FixedSample(data, 10, seed=1).indices != sample.indices


@cache
def fixed_tokenizer() -> VQModel:
    torch.manual_seed(0)
    return VQModel(build_config(VQModelConfig, TINY_MODEL)).eval()


def fitted(folder: Path, pictures: int, steps: int) -> RunResult:
    """A short training on so many scenes."""
    fixed_tokenizer().save_pretrained(folder / "tokenizer")
    training: dict[str, Any] = {"steps": steps, "batch_size": 8, "evaluate_every": 40, "log_every": 40}
    never = {"preview_every": 1000, "checkpoint_every": 1000, "ema_decay": None}
    config = ar_config(
        data={"kind": "scenes", "size": 16, "num_train": pictures, "num_validation": 16, "flip": False},
        tokenizer=str(folder / "tokenizer"),
        transformer={"kind": "llama", "num_layers": 1, "num_heads": 2, "width": 48},
        condition={"kind": "none"},
        optimizer={"learning_rate": 2e-2, "method": "muon"},
        training={**TINY_TRAINING, **training, **never},
    )
    return train(config, folder / "run")


@pytest.mark.parametrize("pictures", [8, 320])
def test_few_pictures_are_learned_by_heart_and_many_are_not(tmp_path: Path, pictures: int) -> None:
    result = fitted(tmp_path, pictures, 120 if pictures == 8 else 40)
    caught = pictures == 8
    assert any("by heart" in note for note in result.notes) == caught
    pipe = ARPipeline.from_pretrained(result.model)
    config = ScenesDataConfig(size=16, num_train=pictures, num_validation=16, flip=False)
    train_data, held_out = open_dataset(config, "train"), open_dataset(config, "validation")
    found = measure_memorisation(pipe, train_data, held_out, samples=6, limit=100)
    assert found.figures["memorised"] == caught
    assert found.verdict.startswith("learned by heart" if caught else "not learned by heart")
    assert (found.figures["excess"] > 0.1) == caught
    assert found.sheet.shape == (3, 2 * 18 + 2, 6 * 18 + 2)
    # The bits are those of `taming ar eval`, and of the training's own last look.
    assert found.figures["held_out_bits_per_code"] == pytest.approx(
        evaluate_pipeline(pipe, held_out)["bits_per_code"]
    )
    assert found.figures["held_out_bits_per_code"] == pytest.approx(result.figures["bits_per_code"], rel=1e-3)
    assert result.figures["train_bits_per_code"] == pytest.approx(
        found.figures["train_bits_per_code"], rel=1e-3
    )


def test_the_watch_can_be_left_out(tmp_path: Path) -> None:
    fixed_tokenizer().save_pretrained(tmp_path / "tokenizer")
    result = train(ar_config(tokenizer=str(tmp_path / "tokenizer"), memorisation=None), tmp_path / "run")
    assert "train_bits_per_code" not in result.figures


def test_codes_are_data_to_evaluate_on(tmp_path: Path) -> None:
    tokenizer = fixed_tokenizer()
    pipe = make_pipeline(tokenizer, {"kind": "class", "num_classes": 5})
    data = {"size": 8, "num_train": 6, "num_validation": 4}
    splits: Any = {
        name: open_dataset(ScenesDataConfig(**data, flip=True), name) for name in ("train", "validation")
    }
    write_codes(tokenizer, splits, tmp_path / "codes", views=3)
    codes = open_data(pipe, str(tmp_path / "codes"), "validation")
    assert isinstance(codes, CodeDataset)
    assert evaluate_pipeline(pipe, codes) == pytest.approx(evaluate_pipeline(pipe, splits["validation"]))
    assert len(open_data(pipe, str(tmp_path / "codes"), "all")) == 10
    # All stored views are searched.
    train_data = open_data(pipe, str(tmp_path / "codes"), "train")
    found = measure_memorisation(pipe, train_data, codes, samples=2)
    assert found.figures["training_pictures"] == 6
    with pytest.raises(UserError, match="choose all, train or validation"):
        open_data(pipe, str(tmp_path / "codes"), "test")
    with pytest.raises(UserError, match="holds codes, which -o size=16 cannot change"):
        open_data(pipe, str(tmp_path / "codes"), "all", overrides=["size=16"])
    other = make_pipeline(VQModel(build_config(VQModelConfig, TINY_MODEL)), {"kind": "none"})
    with pytest.raises(UserError, match="were made by the tokenizer"):
        open_data(other, str(tmp_path / "codes"), "all")


def test_a_data_set_without_held_out_pictures_is_refused(tmp_path: Path) -> None:
    pipe = make_pipeline(fixed_tokenizer(), {"kind": "none"})
    config = ScenesDataConfig(size=8, num_train=4, num_validation=0)
    with pytest.raises(UserError, match="no held-out pictures"):
        measure_memorisation(pipe, open_dataset(config, "train"), open_dataset(config, "validation"))


def test_the_command_line(tmp_path: Path) -> None:
    pipe = make_pipeline(fixed_tokenizer(), {"kind": "class", "num_classes": 5})
    pipe.save_pretrained(tmp_path / "pipe")
    data = ["scenes", "-o", "num_train=6", "-o", "num_validation=4", "-o", "size=8"]
    line = ["eval", str(tmp_path / "pipe"), *data, "--memorisation", "--num", "3"]
    told = CliRunner().invoke(app, [*line, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert "learned by heart: samples share" in told.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json", "memorisation.png"}
    facts = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (facts["samples"], facts["pictures"], facts["training_pictures"]) == (3, 4, 6)
    with pytest.raises(UserError, match="compares both splits"):
        CliRunner().invoke(app, [*line, "--split", "train"], catch_exceptions=False)
