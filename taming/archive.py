"""What torch.save writes, looked at before it is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

from taming.errors import ArtifactError


def check_stored(path: str | Path) -> None:
    """Raises ArtifactError for an archive with compressed parts, or parts larger than the file.

    torch.save compresses nothing: what it wrote takes no more memory than it takes on the disk, and a small
    file that would fill the memory is none of its.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return  # an older format, or damaged: reading it says so
    total = sum(part.file_size for part in parts)
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or total > Path(path).stat().st_size:
        raise ArtifactError(
            f"{path} is a compressed archive, which torch.save does not write: it is not unpacked; fetch the"
            " weights from their maker again"
        )
