"""A codebook without the codes that a data set never uses, and the map by which others follow it.

    DIR/config.json, model.safetensors   the tokenizer with the codes that are left
    DIR/code_map.safetensors             old_to_new (K,) int64, -1 for a code that is gone, and
                                         new_to_old (K',) int64
    DIR/compact.json                     what was measured on what

Axes: K codes before, K' codes left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stage1_vq.codes import FORMAT, INDEX, CodeIndex, read_index, read_shards
from stage1_vq.inputs import model_input
from stage1_vq.model import VQModel
from taming.atomic import write_text
from taming.data.batch import to_device
from taming.data.dataset import PictureDataset
from taming.data.loader import evaluation_batches
from taming.disk import room_for
from taming.errors import ArtifactError, DataError, UserError
from taming.metrics.codebook import count_codes
from taming.tensor_file import write_tensors

CODE_MAP = "code_map.safetensors"
FEWER_CODES = {
    "fsq": "train with fewer or smaller model.quantizer.levels",
    "lfq": "train with a smaller model.quantizer.num_bits",
    "bsq": "train with a smaller model.quantizer.num_bits",
    "residual": "train with fewer model.quantizer.codes_per_stage or num_stages",
}


@dataclass(frozen=True)
class CodeMap:
    """Old codes to new ones and back."""

    old_to_new: Tensor
    """(K,) int64, -1 where a code is gone."""
    new_to_old: Tensor
    """(K',) int64, ascending."""

    @classmethod
    def keeping(cls, kept: Tensor) -> CodeMap:
        """The map that keeps the codes where `kept` (K,) bool is set, in their order."""
        new_to_old = kept.nonzero().flatten()
        old_to_new = torch.full((len(kept),), -1, dtype=torch.int64)
        old_to_new[new_to_old] = torch.arange(len(new_to_old))
        return cls(old_to_new, new_to_old)

    @classmethod
    def load(cls, folder: Path) -> CodeMap:
        """The map of a folder written by `taming vq compact`. Raises ArtifactError."""
        path = folder / CODE_MAP
        try:
            tensors = load_file(path)
            return cls(tensors["old_to_new"], tensors["new_to_old"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ArtifactError(
                f"{path} is no map of codes ({error}); give a folder that `taming vq compact` wrote"
            ) from None

    def save(self, folder: Path) -> None:
        save_file({"old_to_new": self.old_to_new, "new_to_old": self.new_to_old}, folder / CODE_MAP)

    def codes(self, old: Tensor) -> Tensor:
        """Old codes of any shape as new ones, int64. Raises DataError where one of them is gone."""
        new = self.old_to_new[old.long()]
        if (new < 0).any():
            gone = old[new < 0].unique()
            raise DataError(
                f"{len(gone)} of these codes are not in the compacted codebook (code {int(gone[0])}, for "
                "one); compact again on data that has them, or with --codes"
            )
        return new

    def rows(self, table: Tensor, dim: int = 0) -> Tensor:
        """What is left of a tensor with one row a code along `dim`: an embedding or a head of stage two."""
        if table.shape[dim] != len(self.old_to_new):
            raise UserError(
                f"the tensor has {table.shape[dim]} rows along axis {dim}, the map is of "
                f"{len(self.old_to_new)} codes; give the rows of the codes alone"
            )
        return table.index_select(dim, self.new_to_old.to(table.device))


def check_compactable(model: VQModel) -> None:
    """Raises UserError where codes are no rows of a table, so that none can be taken out."""
    kind = model.config.quantizer.kind
    if not model.quantize.row_tensors:
        raise UserError(
            f"the codes of a {kind} quantizer are combinations, not rows of a table: none can be dropped; "
            f"{FEWER_CODES[kind]}"
        )


@torch.no_grad()
def count_used_codes(
    model: VQModel,
    dataset: PictureDataset,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """How often each code (K,) is used on the centre crops of a data set. Raises UserError."""
    if not len(dataset):
        raise UserError("there are no pictures to look at; choose another --split or more data")
    model = model.to(device).eval()
    counts = torch.zeros(model.spec.codebook_size, dtype=torch.int64, device=device)
    done = 0
    for batch in evaluation_batches(dataset, batch_size=batch_size):
        codes = model.encode(model_input(to_device(batch, device), model.config))
        counts += count_codes(codes, len(counts))
        done += len(codes)
        if progress is not None:
            progress(done, len(dataset))
    return counts.cpu()


def count_written_codes(folder: Path, model: VQModel) -> Tensor:
    """How often each code (K,) is used in a folder of codes, which `model` made. Raises DataError."""
    index = read_index(folder)
    if not model.makes_codes_of(index.tokenizer_hash):
        raise DataError(
            f"the codes in {folder} are of another tokenizer; give the model in {folder / 'tokenizer'}, or "
            "encode again"
        )
    counts = torch.zeros(model.spec.codebook_size, dtype=torch.int64)
    for split in ("train", "validation"):
        for tensors, _ in read_shards(folder, index, split):
            counts += count_codes(tensors["codes"].long(), len(counts))
    return counts


def compact_model(model: VQModel, code_map: CodeMap) -> VQModel:
    """A model with the codes of the map alone; it paints old_to_new[c] as `model` painted c. In eval mode.

    Raises UserError where codes cannot be taken out, or fewer than two are left.
    """
    check_compactable(model)
    left = len(code_map.new_to_old)
    if left < 2:
        raise UserError(f"{left} code is in use; a codebook has at least 2: give more pictures")
    quantizer = model.config.quantizer.model_copy(update={"codebook_size": left})
    compact = VQModel(model.config.model_copy(update={"quantizer": quantizer}))
    state = model.state_dict()
    for name in model.quantize.row_tensors:
        key = f"quantize.{name}"
        if key in state:  # the state of an option that is off is not there
            state[key] = code_map.rows(state[key])
    compact.load_state_dict(state)
    return compact.eval()


def rewrite_codes(source: Path, target: Path, model: VQModel, code_map: CodeMap) -> CodeIndex:
    """Write the folder of codes `source` in the numbering of the compacted `model` to the new `target`."""
    index = read_index(source)
    target.mkdir(parents=True)
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in index.splits}
    for split in ("train", "validation"):
        for tensors, entry in read_shards(source, index, split):
            tensors["codes"] = code_map.codes(tensors["codes"]).int()
            with room_for("codes", target):
                written = write_tensors(target / entry["file"], tensors)
            splits[split].append({**entry, **written._asdict()})
    values = vars(index) | {
        "tokenizer_hash": model.codes_hash(),
        "codebook_size": model.spec.codebook_size,
        "splits": splits,
    }
    model.save_pretrained(target / "tokenizer")
    # Last, so that a folder with an index is whole.
    write_text(target / INDEX, json.dumps({"format": FORMAT, **values}, indent=1))
    return CodeIndex(**values)
