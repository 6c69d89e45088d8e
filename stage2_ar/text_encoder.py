"""A frozen text encoder of the transformers library: opened when it is first asked, its features kept.

Only safetensors are read and no code of a repository is run.

Axes: B texts, n tokens of one text, L tokens at most, E features.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taming.artifact import content_hash
from taming.errors import ArtifactError, UserError

FOLDER, HASH_FILE = "text_encoder", "taming.json"
CACHE_BYTES = 256 * 2**20
"""What is kept in memory of features; those that were not asked for longest go first."""

_BROKEN = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError)
"""What the library raises on folders that are not what they should be."""

_TEXT_PARTS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""Kinds of models of which the text encoder is a part; of all others, the whole is taken."""


@dataclass(frozen=True)
class OpenedEncoder:
    """An encoder and its tokenizer, of transformers' classes."""

    model: nn.Module
    tokenizer: Any
    content_hash: str

    @property
    def hidden_size(self) -> int:
        config: Any = self.model.config
        return int(getattr(config, "hidden_size", None) or config.d_model)


def open_encoder(name: str | Path) -> OpenedEncoder:
    """The text encoder and the tokenizer of a folder or hub id; of CLIP and T5 their text part alone.

    What the hub's cache holds is opened without the network. Raises ArtifactError where they are not there,
    hold pickled weights only, or want their own code run.
    """
    found = Path(name).is_dir()
    if not found and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
        raise ArtifactError(
            f"no folder {str(name)!r} with a text encoder, and it is not a hub id of the form owner/name; "
            "check the path"
        )
    reason = ""
    with _quiet_libraries():
        for local in (True,) if found else (True, False):
            try:
                model, tokenizer = _load(name, local)
            except _BROKEN as error:
                reason = _first_line(error)
                continue
            model.eval().requires_grad_(False)
            digest = hashlib.sha256(content_hash(model.state_dict()).encode())
            digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
            return OpenedEncoder(model, tokenizer, digest.hexdigest())
    raise ArtifactError(
        f"the text encoder {str(name)!r} cannot be opened: {reason.rstrip('.')}; give the folder or hub id "
        "of a transformers text model with its tokenizer and its weights as safetensors"
    )


def _load(name: str | Path, local: bool) -> tuple[nn.Module, Any]:
    import transformers

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    config = transformers.AutoConfig.from_pretrained(name, **options)
    # By its name, for transformers imports a model's code when its class is asked for.
    kind = getattr(transformers, _TEXT_PARTS.get(config.model_type, "AutoModel"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    return kind.from_pretrained(name, use_safetensors=True, dtype=torch.float32, **options), tokenizer


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without their progress bars and notes: that CLIP's picture part is left out is as it should be."""
    import huggingface_hub
    import transformers

    verbosity = transformers.logging.get_verbosity(), huggingface_hub.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity[0])
        huggingface_hub.logging.set_verbosity(verbosity[1])
        if bars:
            transformers.logging.enable_progress_bar()


class FrozenTextEncoder:
    """Features of texts, from memory, from the disk, or from the encoder.

    No module, so that it is neither trained, nor saved, nor moved with one: copies of a model share it.
    """

    def __init__(self, name: str, *, max_length: int, expected_hash: str) -> None:
        self.source: str | Path = name
        self.max_length = max_length
        self.expected_hash = expected_hash
        self.disk_cache: Path | None = None
        self._opened: OpenedEncoder | None = None
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTextEncoder:
        return self

    @property
    def opened(self) -> OpenedEncoder:
        """The encoder itself. Raises ArtifactError where it is missing or not the one trained with."""
        if self._opened is None:
            found = open_encoder(self.source)
            if found.content_hash != self.expected_hash:
                raise ArtifactError(
                    f"the text encoder {str(self.source)!r} is {found.content_hash[:12]}, the model was "
                    f"trained with {self.expected_hash[:12]}: its features mean something else; use the one "
                    "of that training"
                )
            check_positions(found, self.max_length)
            self._opened = found
        return self._opened

    def padded(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """(B, L, E) float32 with zeros after each text's end, and (B, L) bool of what is there."""
        features = self.features(texts, device)
        out = torch.zeros(len(texts), self.max_length, features[0].shape[-1])
        mask = torch.zeros(len(texts), self.max_length, dtype=torch.bool)
        for row, feature in enumerate(features):
            out[row, : len(feature)] = feature
            mask[row, : len(feature)] = True
        return out.to(device), mask.to(device)

    def features(self, texts: Sequence[str], device: torch.device) -> list[Tensor]:
        """(n, E) float32 of each text on the CPU, n <= max_length; computed on `device` where not kept."""
        found: dict[str, Tensor] = {}
        for text in dict.fromkeys(texts):
            known = self._kept.get(text)
            if known is None:
                known = self._from_disk(text)
            if known is None:
                known = self._compute(text, device)
                self._to_disk(text, known)
            found[text] = known
            self._keep(text, known)
        return [found[text] for text in texts]

    def check_length(self, text: str) -> None:
        """Raises UserError for a text of more tokens than there are positions."""
        longer = self.max_length + 1  # cut there, for the library warns of lengths that it finds too long
        tokens = self.opened.tokenizer(text, truncation=True, max_length=longer)["input_ids"]
        if len(tokens) > self.max_length:
            raise UserError(
                f"a text has more than the {self.max_length} tokens that the model takes; shorten it"
            )

    def save(self, folder: Path) -> None:
        """Write the encoder and its tokenizer, unless they lie there already. Raises ArtifactError."""
        note = folder / HASH_FILE
        try:
            if note.is_file() and json.loads(note.read_text())["content_hash"] == self.expected_hash:
                return
            opened = self.opened
            model: Any = opened.model
            with _quiet_libraries():
                model.save_pretrained(folder)
            opened.tokenizer.save_pretrained(folder)
            note.write_text(json.dumps({"content_hash": self.expected_hash}) + "\n")
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{folder} cannot be written ({error}); choose another folder") from error

    def move_to_copy(self, source: str | Path) -> None:
        """Use the copy in a saved pipeline, a folder or hub id. Raises ArtifactError where it has none."""
        self.source = find_copy(source)
        self._opened = None

    @torch.no_grad()
    def _compute(self, text: str, device: torch.device) -> Tensor:
        """One text by itself: what it says cannot depend on the texts that it came with."""
        opened = self.opened
        model = opened.model.to(device)
        tokens = opened.tokenizer(text, truncation=True, max_length=self.max_length, return_tensors="pt")
        if not tokens["input_ids"].shape[1]:
            raise UserError(f"the text {text!r} has no tokens; say what to paint")
        with torch.autocast(device.type, enabled=False):
            out = model(input_ids=tokens["input_ids"].to(device))
        hidden: Tensor = out.last_hidden_state[0]
        return hidden.float().cpu().clone()

    def _keep(self, text: str, features: Tensor) -> None:
        if text in self._kept:
            self._kept.move_to_end(text)
            return
        self._kept[text] = features
        self._bytes += features.nbytes
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def _file(self, text: str) -> Path | None:
        if self.disk_cache is None:
            return None
        name = hashlib.sha256(f"{self.expected_hash}/{self.max_length}/{text}".encode()).hexdigest()
        return self.disk_cache / name[:2] / f"{name}.safetensors"

    def _from_disk(self, text: str) -> Tensor | None:
        path = self._file(text)
        if path is None or not path.is_file():
            return None
        try:
            return load_file(path)["features"]
        except (OSError, SafetensorError, KeyError):
            return None  # cut off by a crash: it is computed and written again

    def _to_disk(self, text: str, features: Tensor) -> None:
        path = self._file(text)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole: another process may be reading.
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({"features": features.contiguous()}, part)
        part.replace(path)


def check_positions(encoder: OpenedEncoder, max_length: int) -> None:
    """Raises UserError where an encoder with learned positions has fewer of them."""
    limit = getattr(encoder.model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and max_length > limit:
        raise UserError(
            f"condition.encoder.max_length {max_length} is more than the {limit} positions of the text "
            f"encoder; set it to {limit} or less"
        )


def find_copy(source: str | Path) -> Path:
    """The folder text_encoder of a saved pipeline, of the model of a run, or of the hub."""
    folder = Path(source)
    if folder.is_dir():
        for candidate in (folder / FOLDER, folder / "model" / FOLDER):
            if candidate.is_dir():
                return candidate
        raise ArtifactError(
            f"{folder} holds no {FOLDER}, which its text condition needs; copy the whole pipeline folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(str(source), allow_patterns=f"{FOLDER}/*")) / FOLDER
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(f"{FOLDER} of {source} cannot be had: {_first_line(error)}") from None
    if not found.is_dir():
        raise ArtifactError(f"{source} holds no {FOLDER}, which its text condition needs; push it again")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
