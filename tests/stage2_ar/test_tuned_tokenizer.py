"""A transformer goes on with a tokenizer whose decoder was tuned, and with no other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from stage1_vq import VQModel
from stage1_vq.codes import read_index, write_codes
from stage2_ar import ARPipeline
from stage2_ar.task import model_config
from stage2_ar.train import load_tokenizer
from taming.data.dataset import open_dataset
from taming.errors import ArtifactError, UserError
from tests.conftest import ar_config, make_pipeline


def changed(tokenizer: VQModel, part: str) -> VQModel:
    other = copy.deepcopy(tokenizer)
    with torch.no_grad():
        next(other.get_submodule(part).parameters()).add_(0.5)
    return other


def test_another_decoder_paints_the_same_codes(tokenizer: VQModel) -> None:
    pipe = make_pipeline(tokenizer, {"kind": "none"})
    tuned = changed(tokenizer, "decoder")
    again = ARPipeline(pipe.model, tuned)
    one, other = (p(height=8, width=8, seed=3) for p in (pipe, again))
    assert torch.equal(one.codes, other.codes)
    assert not torch.equal(one.images, other.images)
    for part in ("encoder", "quant_conv", "quantize"):
        with pytest.raises(ArtifactError, match="codes mean something else"):
            ARPipeline(pipe.model, changed(tokenizer, part))


def test_stored_codes_are_those_of_every_decoder(tokenizer: VQModel, tmp_path: Path) -> None:
    config = ar_config(data={"kind": "codes", "root": str(tmp_path / "codes")}, tokenizer=str(tmp_path / "t"))
    scenes = open_dataset(ar_config(tokenizer="x").data, "train")
    write_codes(tokenizer, {"train": scenes}, tmp_path / "codes")
    tuned = changed(tokenizer, "decoder")
    tuned.save_pretrained(tmp_path / "t")
    assert load_tokenizer(config).content_hash() == tuned.content_hash()
    assert (
        model_config(config, tuned, (16, 16)).tokenizer_hash == read_index(tmp_path / "codes").tokenizer_hash
    )
    changed(tokenizer, "encoder").save_pretrained(tmp_path / "t")
    with pytest.raises(UserError, match="were made by the tokenizer"):
        load_tokenizer(config)
