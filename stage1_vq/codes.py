"""A data set as codes on disk: written by `taming vq encode`, read by stage two and by others.

    DIR/index.json                 format, tokenizer hash, grid, downsample factor, views, splits and keys
    DIR/tokenizer/                 the model that made the codes, so that they can be painted again
    DIR/train-00000.safetensors    codes (n, V, h, w) int32 and, where the data has them, label (n,),
                                   segmentation (n, V, H, W) int32, depth (n, V, 1, H, W) float32,
                                   crop (n, V, 4) float32, and, where they are kept, image and
                                   condition_image (n, V, C, H, W) uint8; text and objects as JSON in the
                                   index, once a view
    DIR/validation-00000.safetensors

n samples, V views of each: the same picture under other crops and flips, made at extraction.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stage1_vq.inputs import model_input
from stage1_vq.model import VQModel
from taming.atomic import whole_folder, write_text
from taming.data.batch import collate, to_device
from taming.data.checking.codes import read_code_index
from taming.data.dataset import PictureDataset
from taming.data.left_out import LeftOut, attempt
from taming.data.picture import to_uint8
from taming.disk import room_for
from taming.errors import BadSample, DataError, DataWarning, UserError
from taming.tensor_file import write_tensors
from taming.types import Batch

FORMAT = "taming-codes/1"
INDEX = "index.json"
Split = Literal["train", "validation"]
TENSOR_KEYS = ("label", "segmentation", "depth", "crop")
KEPT_KEYS = ("image", "condition_image")
"""Pictures, stored beside the codes only where they are asked for: conditions are made of them."""
PLAIN_KEYS = ("text", "objects")


@dataclass(frozen=True)
class CodeIndex:
    """What a folder of codes says of itself."""

    tokenizer_hash: str
    """`VQModel.codes_hash` of what made the codes."""
    grid: tuple[int, int]
    downsample_factor: int
    codebook_size: int
    views: int
    class_names: list[str]
    num_labels: int
    provides: list[str]
    splits: dict[str, list[dict[str, Any]]]
    """Split -> shards, each {"file", "keys", "size" in bytes, "sha256", and text or objects where the data
    has them}; shards of earlier folders have no size and hash."""
    object_names: list[str] = field(default_factory=list)
    told_by_view: bool = False
    """Whether each sample has a list of its views' text and objects, else those of view 0 alone: boxes are
    those of a crop, so folders of random crops that were written without it tell wrong ones."""


def write_codes(
    model: VQModel,
    datasets: dict[Split, PictureDataset],
    folder: Path,
    *,
    views: int = 1,
    keep: Collection[str] = (),
    batch_size: int = 16,
    shard_size: int = 4096,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> CodeIndex:
    """Encode data sets into `folder`; view 0 is the centre crop, further views are random crops and flips.

    `keep` names pictures ("image", "condition_image") that are stored too, for conditions that are made of
    them: low resolution, edges, second pictures. `progress` is called with the number of pictures just
    done. Samples that cannot be read are left out within their data's skip budget, with a DataWarning.
    `folder` is whole or absent. Raises UserError where it is in use, or the data has not what shall be kept.
    """
    for dataset in datasets.values():
        _check_kept(keep, dataset)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give --out another folder or empty this one")
    for dataset in datasets.values():
        model.check_size(*dataset.size)
    model = model.to(device).eval()
    with room_for("codes", folder), whole_folder(folder) as place:
        splits: dict[str, list[dict[str, Any]]] = {}
        for split, dataset in datasets.items():
            splits[split] = []
            left_out = LeftOut(split, len(dataset), dataset.skip_budget)
            for start in range(0, len(dataset), shard_size):
                rows = range(start, min(start + shard_size, len(dataset)))
                made = _encode_rows(model, dataset, rows, views, keep, batch_size, device, progress, left_out)
                if made is None:
                    continue
                tensors, entry = made
                entry["file"] = f"{split}-{len(splits[split]):05d}.safetensors"
                entry.update(write_tensors(place / entry["file"], tensors)._asdict())
                splits[split].append(entry)
            for note in left_out.notes():
                warnings.warn(note, DataWarning, stacklevel=2)
        index = _index(model, next(iter(datasets.values())), views, keep, splits)
        model.save_pretrained(place / "tokenizer")
        write_text(place / INDEX, json.dumps({"format": FORMAT, **vars(index)}, indent=1))
    return index


def _index(
    model: VQModel,
    reference: PictureDataset,
    views: int,
    keep: Collection[str],
    splits: dict[str, list[dict[str, Any]]],
) -> CodeIndex:
    factor = model.spec.downsample_factor
    return CodeIndex(
        tokenizer_hash=model.codes_hash(),
        grid=(reference.size[0] // factor, reference.size[1] // factor),
        downsample_factor=factor,
        codebook_size=model.spec.codebook_size,
        views=views,
        class_names=list(reference.class_names),
        num_labels=reference.num_labels,
        provides=sorted(reference.provides & {*TENSOR_KEYS, *PLAIN_KEYS, *keep}),
        splits=splits,
        object_names=list(reference.object_names),
        told_by_view=True,
    )


def read_index(folder: Path) -> CodeIndex:
    """The index of a folder of codes. Raises DataError."""
    path = folder / INDEX
    if not path.is_file():
        raise DataError(
            f"{folder} holds no {INDEX}: it is no folder of codes; make one with `taming vq encode`"
        )
    values = read_code_index(folder)
    try:
        del values["format"]
        values["grid"] = tuple(values["grid"])
        return CodeIndex(**values)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); encode again with `taming vq encode`") from None


def read_shards(
    folder: Path, index: CodeIndex, split: Split
) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Each shard of a split as (tensors, its entry in the index). Raises DataError."""
    for entry in index.splits.get(split, []):
        path = folder / entry["file"]
        # A name from a file never leaves its folder.
        if path.parent != folder or not path.is_file():
            raise DataError(
                f"{folder / INDEX} names the shard {entry['file']!r}, which is not there; encode again"
            )
        _check_bytes(path, entry)
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise DataError(f"{path} cannot be read ({error}); encode again") from None
        count = len(entry["keys"])
        told = {name: entry[name] for name in PLAIN_KEYS if name in entry}
        wrong = [name for name, value in {**tensors, **told}.items() if len(value) != count]
        if "codes" not in tensors or wrong:
            raise DataError(f"{path} does not hold the {count} samples that {INDEX} says; encode again")
        codes = tensors["codes"]
        if ((codes < 0) | (codes >= index.codebook_size)).any():
            raise DataError(f"{path} holds codes outside [0, {index.codebook_size}); encode again")
        yield tensors, entry


def _check_bytes(path: Path, entry: dict[str, Any]) -> None:
    """Raises DataError where a shard is not the file that its entry speaks of."""
    size = path.stat().st_size
    if entry.get("size", size) != size:
        raise DataError(f"{path} has {size} bytes, not the {entry['size']} that {INDEX} says; encode again")
    if "sha256" in entry:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise DataError(f"{path} holds other bytes than {INDEX} says; encode again")


def _check_kept(keep: Collection[str], dataset: PictureDataset) -> None:
    for name in keep:
        if name not in KEPT_KEYS:
            raise UserError(
                f"{name!r} cannot be kept beside codes; pictures that can are {', '.join(KEPT_KEYS)}"
            )
        if name not in dataset.provides:
            raise UserError(
                f"{name} shall be kept, but the data gives {', '.join(sorted(dataset.provides))}; set "
                f"data.{name} to the folder of it, or leave it out"
            )


@torch.no_grad()
def _encode_rows(
    model: VQModel,
    dataset: PictureDataset,
    rows: range,
    views: int,
    keep: Collection[str],
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[int], None] | None,
    left_out: LeftOut,
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors of a shard and its entry in the index; None where no row can be read."""
    columns: dict[str, list[Tensor]] = {}
    entry: dict[str, Any] = {"keys": []}
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        per_view: dict[str, list[Tensor]] = {}
        told: dict[str, list[list[Any]]] = {}
        for view, read in enumerate(_read_views(dataset, chunk, views, left_out)):
            batch = to_device(read, device)
            per_view.setdefault("codes", []).append(
                model.encode(model_input(batch, model.config)).int().cpu()
            )
            for key in ("segmentation", "depth", "crop"):
                if key in batch:
                    value = batch[key].cpu()
                    per_view.setdefault(key, []).append(value.int() if key == "segmentation" else value)
            for key in keep:
                per_view.setdefault(key, []).append(to_uint8(batch[key]).cpu())
            for key in PLAIN_KEYS:
                if key in batch:
                    told.setdefault(key, []).append(batch[key])
            if view == 0:
                entry["keys"] += batch["key"]
                if "label" in batch:
                    columns.setdefault("label", []).append(batch["label"].cpu())
        for key, views_of in told.items():
            entry.setdefault(key, []).extend(map(list, zip(*views_of, strict=True)))
        for key, values in per_view.items():
            columns.setdefault(key, []).append(torch.stack(values, dim=1))
        if progress is not None:
            progress(len(chunk))
    if not columns:
        return None
    return {key: torch.cat(values).contiguous() for key, values in columns.items()}, entry


def _read_views(dataset: PictureDataset, rows: range, views: int, left_out: LeftOut) -> list[Batch]:
    """A batch a view of the rows that can be read; nothing where none can."""
    # Epoch -1 is the centre crop; the random views are those of epochs 0, 1, ...
    epochs = range(-1, views - 1)
    try:
        return [dataset.batch(rows, [epoch] * len(rows)) for epoch in epochs]
    except BadSample:
        pass  # sample by sample, then
    found = [attempt(lambda row=row: [dataset.sample(row, epoch) for epoch in epochs]) for row in rows]  # type: ignore[misc]
    _, samples = left_out.sift(rows, found)
    return [collate(list(view)) for view in zip(*samples, strict=True)]
