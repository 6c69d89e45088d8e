"""ONNX: encoder.onnx (picture to codes) and decoder.onnx (codes to picture), for any runtime.

Axes: B pictures, C channels, H W pixels, h w cells, L labels.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.export import Dim

from stage1_vq.interop.exported import (
    ExportReport,
    check,
    compare,
    new_folder,
    optional,
    write_description,
)
from stage1_vq.model import VQModel
from taming.errors import ArtifactError

OPSET = 18
CONVOLUTIONAL = ("cnn", "sagan")
"""Kinds of decoders whose graph holds for any batch and grid."""
ENCODER, DECODER, DESCRIPTION = "encoder.onnx", "decoder.onnx", "tokenizer.json"


def export_onnx(model: VQModel, out: Path, inputs: Sequence[Tensor]) -> ExportReport:
    """Write both graphs in fp32, with any batch size and any size that divides into cells.

    images (B, C, H, W) float, of segmentation labels (B, H, W) int64 -> codes (B, h, w) int64
    codes (B, h, w) int64 -> images (B, C, H, W) float, not clamped; of segmentation logits

    Loads them into ONNX Runtime and compares on `inputs`, (1, C, H, W) each, and on a batch of another size.
    Raises ArtifactError where they differ, and for decoders that are transformers; UserError where onnx or
    onnxruntime is not installed.
    """
    if model.config.decoder.kind not in CONVOLUTIONAL:
        raise ArtifactError(
            f"a decoder of kind {model.config.decoder.kind} has no onnx export: its graph would hold for one "
            f"size of batch or grid; kinds that have one are {' and '.join(CONVOLUTIONAL)}, and --format "
            "codebook exports the codes of any"
        )
    runtime = optional("onnxruntime")
    optional("onnxscript")
    labels = model.config.input == "segmentation"
    factor = model.config.downsample_factor
    with new_folder(out):
        _write_graphs(model, out)
        sessions = {
            name: runtime.InferenceSession(str(out / name), providers=["CPUExecutionProvider"])
            for name in (ENCODER, DECODER)
        }

        def encode(values: Tensor) -> Tensor:
            given = values.argmax(1) if labels else values
            (codes,) = sessions[ENCODER].run(None, {"images": given.contiguous().numpy()})
            return torch.from_numpy(codes)

        def decode(codes: Tensor) -> Tensor:
            (images,) = sessions[DECODER].run(None, {"codes": codes.contiguous().numpy()})
            return torch.from_numpy(images)

        report = compare("onnx", model, [*inputs, other_shape(inputs, factor)], encode, decode)
        check(report)
        facts = {"encoder": ENCODER, "decoder": DECODER, "opset": OPSET}
        write_description(out / DESCRIPTION, model, report, facts)
    return report


def other_shape(inputs: Sequence[Tensor], factor: int) -> Tensor:
    """Three of the inputs (repeated where there are fewer) as one batch, a cell less high if they can."""
    alike = [values for values in inputs if values.shape == inputs[0].shape]
    batch = torch.cat([alike[index % len(alike)] for index in range(3)])
    height = batch.shape[2]
    return batch[:, :, : height - factor if height > factor else height]


def _write_graphs(model: VQModel, out: Path) -> None:
    config = model.config
    cells = {"height": Dim("rows", min=1, max=4096), "width": Dim("columns", min=1, max=4096)}
    batch = Dim("batch", min=1, max=4096)
    # Sizes that are all different and not 1, so that the exporter takes none of them for fixed.
    rows, columns = 3, 5
    height, width = rows * config.downsample_factor, columns * config.downsample_factor
    pixels = [config.downsample_factor * size for size in cells.values()]
    if config.input == "segmentation":
        images = torch.zeros(2, height, width, dtype=torch.int64)
        image_axes = {0: batch, 1: pixels[0], 2: pixels[1]}
    else:
        images = torch.zeros(2, config.in_channels, height, width)
        image_axes = {0: batch, 2: pixels[0], 3: pixels[1]}
    codes = torch.zeros(2, rows, columns, dtype=torch.int64)
    code_axes = {0: batch, 1: cells["height"], 2: cells["width"]}
    for module, name, example, axes, names in (
        (_Encode(model), ENCODER, images, image_axes, ("images", "codes")),
        (_Decode(model), DECODER, codes, code_axes, ("codes", "images")),
    ):
        with _quiet():
            torch.onnx.export(
                module.eval(),
                (example,),
                out / name,
                dynamo=True,
                opset_version=OPSET,
                input_names=[names[0]],
                output_names=[names[1]],
                dynamic_shapes=(axes,),
                external_data=False,
                verbose=False,
            )


class _Encode(nn.Module):
    def __init__(self, model: VQModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        if self.model.config.input == "segmentation":
            maps = F.one_hot(images, self.model.config.in_channels)
            images = rearrange(maps, "b h w l -> b l h w").float()
        return self.model.quantize.encode(self.model.latents(images))


class _Decode(nn.Module):
    def __init__(self, model: VQModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor) -> Tensor:
        images: Tensor = self.model.decoder(
            self.model.post_quant_conv(self.model.quantize.lookup(codes))
        ).images
        return images


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes to its own authors; its errors still come."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
