"""ONNX Runtime computes what the model does, at batches and sizes that were not traced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from stage1_vq.interop.exported import comparison_inputs
from stage1_vq.interop.onnx import export_onnx, other_shape
from stage1_vq.model import VQModel
from taming.errors import UserError
from tests.stage1_vq.interop.published import small_model

TINY = {"channel_multipliers": [1, 1], "attention_resolutions": [8]}


def run(folder: Path, name: str, values: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    (result,) = session.run(None, {entry.name: values.numpy()})
    return torch.from_numpy(result)


def check_export(model: VQModel, folder: Path, inputs: torch.Tensor) -> None:
    """Export, and run both graphs on several shapes."""
    labels = model.config.input == "segmentation"
    report = export_onnx(model, folder, [inputs[:1]])
    assert report.equal_codes is not None
    assert report.equal_codes >= 0.999
    cell = model.config.downsample_factor
    for values in (inputs, inputs[:1, :, :cell], inputs[..., :cell], inputs[:1, :, :8]):
        codes = run(folder, "encoder.onnx", values.argmax(1) if labels else values)
        assert codes.dtype == torch.int64
        expected = model.encode(values)
        assert (codes == expected).float().mean() >= 0.999
        torch.testing.assert_close(
            run(folder, "decoder.onnx", expected), model.decode(expected), rtol=0, atol=1e-3
        )


def test_both_graphs_at_any_shape(tmp_path: Path):
    model = small_model(**TINY)
    torch.manual_seed(3)
    check_export(model, tmp_path / "out", torch.rand(3, 3, 16, 24) * 2 - 1)
    for name in ("encoder.onnx", "decoder.onnx"):
        graph = onnx.load(tmp_path / "out" / name)
        onnx.checker.check_model(graph)
        assert min(entry.version for entry in graph.opset_import if not entry.domain) >= 17
    facts = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert (facts["encoder"], facts["downsample_factor"]) == ("encoder.onnx", 2)
    assert facts["comparison"]["equal_codes"] == 1


TABLE = {"codebook_size": 40, "code_dim": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"quantizer": {"kind": "nearest", "l2_normalised": True, **TABLE}},
        {"quantizer": {"kind": "ema", **TABLE}},
        {"quantizer": {"kind": "simvq", **TABLE}},
        {"quantizer": {"kind": "fsq", "levels": [5, 4, 3]}},
        {"quantizer": {"kind": "lfq", "num_bits": 5}},
        {"quantizer": {"kind": "bsq", "num_bits": 5}},
        {"quantizer": {"kind": "ibq", **TABLE}},
        {"quantizer": {"kind": "gumbel", **TABLE}},
        {"quantizer": {"kind": "residual", "codes_per_stage": 8, "code_dim": 4}},
        {"patch_size": 2, "resolution": 32},
        {"input": "depth", "in_channels": 1},
        {"channels": 64},
    ],
    ids=str,
)
def test_every_quantizer_and_option(tmp_path: Path, change: dict[str, Any]):
    model = small_model(**TINY | change)
    torch.manual_seed(3)
    check_export(model, tmp_path / "out", torch.rand(2, model.config.in_channels, 16, 24) * 2 - 1)


@pytest.mark.slow
def test_labels(tmp_path: Path):
    model = small_model(**TINY, input="segmentation", in_channels=5)
    labels = torch.randint(5, (2, 16, 24), generator=torch.Generator().manual_seed(0))
    maps = torch.nn.functional.one_hot(labels, 5).permute(0, 3, 1, 2).float()
    check_export(model, tmp_path / "out", maps)


def test_the_second_comparison_is_of_another_batch_and_size():
    inputs = [torch.zeros(1, 3, 16, 24), torch.zeros(1, 3, 8, 8)]
    assert other_shape(inputs, 4).shape == (3, 3, 12, 24)
    assert other_shape([torch.zeros(1, 3, 4, 8)], 4).shape == (3, 3, 4, 8)


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({}, (1, 3, 64, 96)),
        ({"input": "depth", "in_channels": 1}, (1, 1, 64, 96)),
        ({"input": "edges", "in_channels": 1}, (1, 1, 64, 96)),
        ({"input": "segmentation", "in_channels": 7}, (1, 7, 64, 96)),
    ],
)
def test_the_scenes_are_what_is_compared_on(change: dict[str, Any], shape: tuple[int, ...]):
    inputs = comparison_inputs(small_model(**TINY | change), limit=2)
    assert [values.shape for values in inputs] == [shape, shape]


def test_scenes_that_do_not_suit_are_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"scenes do not suit .* 7 labels.*; give --pictures a folder"):
        comparison_inputs(small_model(**TINY, input="segmentation", in_channels=12))
