"""A model on disk: a folder with config.json and model.safetensors, or the same files in a hub repository.

config.json   {"kind": "vq_model", "format": 1, "config": {...}, "facts": {...}, "content_hash": "..."}

Nothing is pickled: reading a folder that somebody else made runs none of its code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from taming.atomic import standing, whole_file, write_text
from taming.config import Config, read_small_text
from taming.disk import NO_ROOM, full_disk
from taming.errors import ArtifactError
from taming.tensor_file import tensor_bytes, write_tensors

FORMAT = 1
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


def save_artifact(
    folder: str | Path,
    kind: str,
    config: Config,
    modules_state: Mapping[str, Tensor],
    *,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a model of `kind` into `folder`, which is made where it is missing.

    `facts` are plain values for other readers (downsample factor, pixel range): nothing reads them back.
    Each file is replaced whole, the weights first, so that a folder with a config.json is whole; what else
    is in the folder stays. Raises FaultError where the disk is full, ArtifactError where it cannot be
    written for another reason.
    """
    folder = Path(folder)
    description = {
        "kind": kind,
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "facts": dict(facts or {}),
        "content_hash": content_hash(modules_state),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / WEIGHTS_NAME) as aside:
            write_tensors(aside, modules_state, metadata={"format": "pt"})
        write_text(folder / CONFIG_NAME, json.dumps(description, indent=2) + "\n")
    except OSError as error:
        if error.errno in NO_ROOM:
            raise full_disk(error, "model", folder, tensor_bytes(modules_state)) from error
        raise ArtifactError(f"{folder} cannot be written ({error}); choose another folder") from error


def load_artifact(
    source: str | Path, kind: str, *, subfolder: str = ""
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, state) of a saved model, from a folder or, where there is none, the hub id "owner/name".

    `subfolder` names a part of a larger artifact ("tokenizer").
    Raises ArtifactError where it is missing, damaged, or of another kind.
    """
    folder = find_artifact(source, subfolder)
    try:
        description = json.loads(read_small_text(folder / CONFIG_NAME))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder / CONFIG_NAME} cannot be read: {error}") from None
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise ArtifactError(
            f"{folder / CONFIG_NAME} does not describe a model of this toolkit (no kind and config); "
            "models of other programs are read by the import commands"
        )
    if description.get("kind") != kind:
        raise ArtifactError(f"{folder} holds a model of kind {description.get('kind')!r}, not {kind!r}")
    if description.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder} has format {description.get('format')!r}, this version reads {FORMAT}; "
            "update the toolkit"
        )
    try:
        state = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS_NAME} cannot be read: {error}") from None
    return description["config"], state


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Load all of `state` into `module`. Raises ArtifactError naming what is missing, extra or misshapen."""
    wanted = module.state_dict()
    problems = []
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing:
        problems.append(f"{len(missing)} keys are missing ({_few(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} keys are not expected ({_few(unexpected)})")
    for key in sorted(wanted.keys() & state.keys()):
        if wanted[key].shape != state[key].shape:
            there, here = tuple(state[key].shape), tuple(wanted[key].shape)
            problems.append(f"{key} is {there} there and {here} by the config")
    if problems:
        raise ArtifactError(f"{source} does not fit its config: {'; '.join(problems[:4])}")
    module.load_state_dict(dict(state))


def push_artifact(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a saved model to the hub with the user's own login; returns the commit's address."""
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(folder_path=str(folder), repo_id=repo_id)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ArtifactError(
            f"cannot push to {repo_id}: {_first_line(error)}; log in with `hf auth login` and give OWNER/NAME"
        ) from error
    return str(commit.commit_url)


def content_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes in the order of names: what makes two models the same."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_artifact(source: str | Path, subfolder: str = "") -> Path:
    """The folder with a saved model's files: `source`, the model of the run `source`, or a hub download."""
    folder = standing(Path(source))
    if folder.is_dir():
        for candidate in (folder / subfolder, standing(folder / "model") / subfolder):
            if (candidate / CONFIG_NAME).is_file():
                return candidate
        raise ArtifactError(
            f"{folder / subfolder} holds no {CONFIG_NAME}, nor does its folder model: "
            "give a saved model or a run that has saved one"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith((".", "/")):
        raise ArtifactError(
            f"no folder {str(source)!r}, and it is not a hub id of the form owner/name; check the path"
        )
    try:
        names = [f"{subfolder}/{name}" if subfolder else name for name in (WEIGHTS_NAME, CONFIG_NAME)]
        paths = [hf_hub_download(str(source), name) for name in names]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"{source} is neither a folder here nor to be had from the hub: {_first_line(error)}"
        ) from None
    return Path(paths[-1]).parent


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
