"""`taming vq compact`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taming.options import (
    BatchSize,
    Data,
    DataOverride,
    Device,
    Split,
    empty_folder,
    parse_size,
    progress_bar,
)


def compact(
    model: Annotated[str, typer.Argument(help="A saved tokenizer: a folder, a run, or a hub id.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="A new or empty folder for the smaller tokenizer and the map.")],
    codes: Annotated[
        Path | None,
        typer.Option(help="Codes of this tokenizer: rewritten to OUT/codes; what they use is kept."),
    ] = None,
    split: Split = "all",
    size: Annotated[str | None, typer.Option(help="Pixels: 64, or HxW; default: as trained.")] = None,
    override: DataOverride = None,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """Drop the codes that a data set never uses, and write the map from old codes to new ones."""
    import json

    from stage1_vq import VQModel
    from stage1_vq.compact import (
        CODE_MAP,
        CodeMap,
        check_compactable,
        compact_model,
        count_used_codes,
        count_written_codes,
        rewrite_codes,
    )
    from stage1_vq.inputs import data_for
    from taming.data.source import open_split
    from taming.metrics.codebook import perplexity
    from taming.training.distributed import pick_device

    tokenizer = VQModel.from_pretrained(model)
    check_compactable(tokenizer)
    frame = tokenizer.config.resolution if size is None else parse_size(size)
    dataset = open_split(data_for(tokenizer.config, data, size=frame, overrides=override or []), split)
    tokenizer.check_size(*dataset.size)
    written = None if codes is None else count_written_codes(codes, tokenizer)
    empty_folder(out)
    with progress_bar("compact") as report:
        counts = count_used_codes(
            tokenizer, dataset, batch_size=batch_size, device=pick_device(device), progress=report
        )
    kept = counts > 0 if written is None else counts + written > 0
    code_map = CodeMap.keeping(kept)
    tokenizer.cpu()
    smaller = compact_model(tokenizer, code_map)
    code_map.save(out)
    if codes is not None:
        rewrite_codes(codes, out / "codes", smaller, code_map)
    facts = {
        "source": model,
        "source_hash": tokenizer.codes_hash(),
        "tokenizer_hash": smaller.codes_hash(),
        "codebook_size_before": len(kept),
        "codebook_size": smaller.spec.codebook_size,
        "data": data,
        "split": split,
        "size": list(dataset.size),
        "pictures": len(dataset),
        "used_on_data": int((counts > 0).sum()),
        "perplexity": float(perplexity(counts)),
        "codes": None if codes is None else str(codes),
    }
    (out / "compact.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    smaller.save_pretrained(out)
    typer.echo(f"{smaller.spec.codebook_size} of {len(kept)} codes are left in {out}; map: {out / CODE_MAP}")
    if codes is not None:
        typer.echo(f"the codes in the new numbering: {out / 'codes'}")
    typer.echo("a stage two on the old codes has to follow the map, or be trained anew")
