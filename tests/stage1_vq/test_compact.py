"""Codebooks without their unused codes: the same pictures, and a map that others can follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from stage1_vq import VQModel
from stage1_vq.codes import read_index, read_shards, write_codes
from stage1_vq.compact import (
    CodeMap,
    check_compactable,
    compact_model,
    count_used_codes,
    count_written_codes,
)
from stage1_vq.compact_cli import compact
from stage1_vq.config import VQModelConfig
from taming.data.config import ScenesDataConfig
from taming.data.dataset import PictureDataset, open_dataset
from taming.errors import ArtifactError, DataError, UserError

TABLES = [
    {"kind": "nearest"},
    {"kind": "nearest", "l2_normalised": True, "revive_after": 5, "revive_below": 0.5},
    {"kind": "ema"},
    {"kind": "gumbel"},
    {"kind": "simvq"},
    {"kind": "ibq", "kmeans_init": True},
]
FIXED = [
    {"kind": "fsq", "levels": [3, 3]},
    {"kind": "lfq", "num_bits": 4},
    {"kind": "bsq", "num_bits": 4},
    {"kind": "residual", "codes_per_stage": 4, "code_dim": 4},
]


def scenes(pictures: int = 6) -> PictureDataset:
    return open_dataset(ScenesDataConfig(size=16, num_validation=pictures), "validation")


def small_model(quantizer: dict) -> VQModel:
    torch.manual_seed(0)
    table = {} if quantizer in FIXED else {"codebook_size": 200, "code_dim": 4}
    model = VQModel(
        VQModelConfig(
            resolution=16,
            channels=8,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(),
            z_channels=8,
            norm_num_groups=4,
            quantizer=quantizer | table,
        )
    )
    return model.eval()


def pictures(dataset: PictureDataset) -> torch.Tensor:
    batch = dataset.batch(range(len(dataset)), [-1] * len(dataset))
    images: torch.Tensor = batch["image"].float() / 127.5 - 1
    return images


@pytest.mark.parametrize("quantizer", TABLES, ids=lambda q: q["kind"])
def test_what_is_left_encodes_and_paints_the_same(quantizer: dict):
    model, dataset = small_model(quantizer), scenes()
    counts = count_used_codes(model, dataset)
    images = pictures(dataset)
    assert torch.equal(counts, torch.bincount(model.encode(images).flatten(), minlength=200))
    code_map = CodeMap.keeping(counts > 0)
    smaller = compact_model(model, code_map)
    assert 2 <= smaller.spec.codebook_size == int((counts > 0).sum()) < 200
    old, new = model.encode(images), smaller.encode(images)
    assert torch.equal(new, code_map.codes(old))
    assert torch.equal(code_map.new_to_old[new], old)
    assert torch.equal(smaller.decode(new), model.decode(old))
    assert torch.equal(code_map.rows(model.codebook), smaller.codebook)
    assert smaller.quantize.state_dict().keys() == model.quantize.state_dict().keys()


@pytest.mark.parametrize("quantizer", FIXED, ids=lambda q: q["kind"])
def test_fixed_grids_of_codes_are_refused_by_name(quantizer: dict):
    with pytest.raises(UserError, match=f"a {quantizer['kind']} quantizer are combinations.*; train with"):
        check_compactable(small_model(quantizer))


def test_a_map_refuses_codes_that_are_gone_and_tables_of_another_size():
    code_map = CodeMap.keeping(torch.tensor([True, False, True]))
    assert code_map.codes(torch.tensor([[2, 0]])).tolist() == [[1, 0]]
    with pytest.raises(DataError, match=r"1 of these codes are not in the compacted codebook \(code 1"):
        code_map.codes(torch.tensor([0, 1, 1]))
    head = torch.arange(6.0).view(2, 3)
    assert code_map.rows(head, dim=1).tolist() == [[0.0, 2.0], [3.0, 5.0]]
    with pytest.raises(UserError, match="has 2 rows along axis 0, the map is of 3 codes"):
        code_map.rows(head)


def test_a_single_code_is_no_codebook():
    kept = torch.zeros(200, dtype=torch.bool)
    kept[7] = True
    with pytest.raises(UserError, match="at least 2"):
        compact_model(small_model({"kind": "nearest"}), CodeMap.keeping(kept))


def test_command_writes_model_map_and_codes(tmp_path: Path):
    app = typer.Typer()
    app.command()(compact)
    model, dataset = small_model({"kind": "nearest"}), scenes(3)
    model.save_pretrained(tmp_path / "model")
    # More pictures than DATA has: what their codes use is kept as well.
    write_codes(model, {"train": scenes(8)}, tmp_path / "codes")
    arguments = [str(tmp_path / "model"), "scenes", "--out", str(tmp_path / "out"), "-o", "num_validation=3"]
    result = CliRunner().invoke(app, [*arguments, "--codes", str(tmp_path / "codes"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    smaller, code_map = VQModel.from_pretrained(tmp_path / "out"), CodeMap.load(tmp_path / "out")
    assert f"{smaller.spec.codebook_size} of 200 codes are left" in result.output
    images = pictures(dataset)
    assert torch.equal(smaller.encode(images), code_map.codes(model.encode(images)))

    index = read_index(tmp_path / "out" / "codes")
    assert index.tokenizer_hash == smaller.codes_hash()
    assert VQModel.from_pretrained(tmp_path / "out" / "codes" / "tokenizer").codebook.shape[0] == len(
        code_map.new_to_old
    )
    (shard,) = [tensors for tensors, _ in read_shards(tmp_path / "out" / "codes", index, "train")]
    assert torch.equal(shard["codes"][:, 0].long(), smaller.encode(pictures(scenes(8))))
    facts = json.loads((tmp_path / "out" / "compact.json").read_text(encoding="utf-8"))
    assert facts["codebook_size"] == smaller.spec.codebook_size > facts["used_on_data"]
    assert facts["source_hash"] == model.codes_hash()


def test_codes_of_another_model_and_folders_without_a_map_are_refused(tmp_path: Path):
    model = small_model({"kind": "nearest"})
    write_codes(model, {"train": scenes(2)}, tmp_path / "codes")
    with pytest.raises(DataError, match="of another tokenizer"):
        count_written_codes(tmp_path / "codes", small_model({"kind": "ema"}))
    with pytest.raises(ArtifactError, match="is no map of codes"):
        CodeMap.load(tmp_path / "codes")
