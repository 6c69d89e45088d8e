"""The codebook alone: codebook.safetensors and codebook.npy, with a json that says what they are.

Axes: K codes, D code width, h w cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from stage1_vq.interop.exported import ExportReport, check, compare, new_folder, write_description
from stage1_vq.interop.nearest_form import nearest_form
from stage1_vq.model import VQModel
from stage1_vq.quantizers.search import nearest_codes
from taming.errors import ArtifactError

SAFETENSORS, NUMPY, DESCRIPTION = "codebook.safetensors", "codebook.npy", "codebook.json"


def export_codebook(model: VQModel, out: Path, inputs: Sequence[Tensor]) -> ExportReport:
    """Write the (K, D) rows that codes decode to, fp32; of l2-normalised codebooks rows of length one.

    Loads both files again and, on `inputs` (1, C, H, W), decodes the model's codes with their rows; where a
    code is the nearest row, finds the codes with them as well. Raises ArtifactError where something differs.
    """
    with new_folder(out):
        rows = model.codebook.float().contiguous().cpu()
        save_file({"codebook": rows}, out / SAFETENSORS)
        np.save(out / NUMPY, rows.numpy())
        loaded = load_file(out / SAFETENSORS)["codebook"]
        if not np.array_equal(loaded.numpy(), np.load(out / NUMPY, allow_pickle=False)):
            raise ArtifactError(
                f"{out / NUMPY} and {out / SAFETENSORS} do not read back alike; check the disk"
            )
        search = code_search(model)

        def encode(values: Tensor) -> Tensor:
            latents = model.latents(values)
            if search == "cosine":
                latents = torch.nn.functional.normalize(latents, dim=1)
            batch, _, height, width = latents.shape
            indices = nearest_codes(rearrange(latents, "b d h w -> (b h w) d"), loaded)
            return rearrange(indices, "(b h w) -> b h w", b=batch, h=height, w=width)

        def decode(codes: Tensor) -> Tensor:
            z = rearrange(loaded[codes], "b h w d -> b d h w")
            images: Tensor = model.decoder(model.post_quant_conv(z)).images
            return images

        notes = (
            () if search else ("the nearest row is not the code: encode with the model or its onnx export",)
        )
        report = compare("codebook", model, inputs, encode if search else None, decode, notes)
        check(report)
        normalised = bool(getattr(model.config.quantizer, "l2_normalised", False))
        facts = {"tensor": "codebook", "search": search, "l2_normalised": normalised}
        write_description(out / DESCRIPTION, model, report, facts)
    return report


def code_search(model: VQModel) -> str | None:
    """How a latent finds its code among the rows: euclidean, cosine, or None where the rows do not tell."""
    try:
        form = nearest_form(model.quantize)
    except ArtifactError:
        return None
    if not form.one_table:
        return None
    return "cosine" if form.directions_only else "euclidean"
