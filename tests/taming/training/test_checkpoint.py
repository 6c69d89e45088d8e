"""Checkpoints are whole or absent, and restore every state exactly."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from taming.errors import ArtifactError, FaultError
from taming.training import checkpoint
from taming.training.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    other_processes,
    save_checkpoint,
    verify_checkpoint,
)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    # The input comes from the global generator, so that its state is part of what must be restored.
    model(torch.randn(5, 3) * np.random.rand()).square().sum().backward()  # noqa: NPY002
    optimizer.step()
    optimizer.zero_grad()


def save(
    accelerator: Accelerator, root: Path, number: int, model: nn.Module, optimizer: object, keep: int = 2
) -> Path:
    return save_checkpoint(
        accelerator, root, number, {"model": model}, {"adam": optimizer}, {"pictures": 8 * number}, keep=keep
    )


def test_going_on_from_a_checkpoint_equals_never_stopping(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = make()
    step(model, optimizer)
    folder = save(accelerator, tmp_path, 1, model, optimizer)
    for _ in range(3):
        step(model, optimizer)
    other, other_optimizer = make()
    progress = load_checkpoint(accelerator, folder, {"model": other}, {"adam": other_optimizer})
    assert progress == {"step": 1, "pictures": 8}
    for _ in range(3):
        step(other, other_optimizer)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_moments_of_weights_that_lie_channels_last_stay_with_them(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def forward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = fresh()
    forward(model, optimizer)
    folder = save(accelerator, tmp_path, 1, model, optimizer)
    forward(model, optimizer)
    other, other_optimizer = fresh()
    load_checkpoint(accelerator, folder, {"model": other}, {"adam": other_optimizer})
    forward(other, other_optimizer)
    assert torch.equal(model.weight, other.weight)


def test_only_the_newest_are_kept(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = make()
    for number in range(4):
        save(accelerator, tmp_path, number, model, optimizer, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_a_kill_in_the_midst_of_a_save_leaves_the_one_before(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make()
    first = save(accelerator, tmp_path, 1, model, optimizer)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save(accelerator, tmp_path, 2, model, optimizer, keep=1)
    assert latest_checkpoint(tmp_path) == first
    monkeypatch.undo()
    assert save(accelerator, tmp_path, 2, model, optimizer, keep=1) == latest_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_found_and_the_one_before_is_used(
    accelerator: Accelerator, tmp_path: Path, damage: str
) -> None:
    model, optimizer = make()
    first = save(accelerator, tmp_path, 1, model, optimizer)
    second = save(accelerator, tmp_path, 2, model, optimizer)
    file = second / "modules.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    match damage:
        case "truncate":
            file.write_bytes(content[:-8])
        case "flip":
            file.write_bytes(content)
        case "remove":
            file.unlink()
    assert verify_checkpoint(second) is not None
    assert latest_checkpoint(tmp_path) == first
    with pytest.raises(ArtifactError, match=r"modules\.safetensors is (damaged|missing)"):
        load_checkpoint(accelerator, second, {"model": model}, {"adam": optimizer})


def test_another_architecture_is_refused_by_name(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = make()
    folder = save(accelerator, tmp_path, 1, model, optimizer)
    wider = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    with pytest.raises(ArtifactError, match=r"model/0\.weight is \(4, 3\) there and \(5, 3\) here"):
        load_checkpoint(accelerator, folder, {"model": wider}, {})
    with pytest.raises(ArtifactError, match=r"missing \(2\.weight"):
        load_checkpoint(accelerator, folder, {"model": nn.Sequential(*model, nn.PReLU())}, {})


def test_a_full_disk_is_said_with_its_need_and_keeps_the_last(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make()
    first = save(accelerator, tmp_path, 1, model, optimizer)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_json", full)
    with pytest.raises(
        FaultError, match=r"step-00000002 was not written \(No space left .* 136 B, and .* GiB"
    ):
        save(accelerator, tmp_path, 2, model, optimizer)
    assert latest_checkpoint(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_nothing_is_pickled(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = make()
    step(model, optimizer)
    folder = save(accelerator, tmp_path, 1, model, optimizer)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert "processes" in json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("damage", ["random-1.safetensors", "progress.json", "optimizers.safetensors"])
def test_missing_state_is_an_error_that_names_it(
    accelerator: Accelerator, tmp_path: Path, damage: str
) -> None:
    model, optimizer = make()
    folder = save(accelerator, tmp_path, 1, model, optimizer)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["processes"] = 2  # as if the second process had never written
    manifest["files"]["random-1.safetensors"] = manifest["files"]["random-0.safetensors"]
    (folder / "random-1.safetensors").write_bytes((folder / "random-0.safetensors").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify_checkpoint(folder) is None
    del manifest["files"][damage]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=f"{damage} is missing; resume from another"):
        load_checkpoint(accelerator, folder, {"model": model}, {"adam": optimizer})


def test_another_number_of_processes_is_said(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = make()
    folder = save(accelerator, tmp_path, 1, model, optimizer)
    assert other_processes(accelerator, folder) is None
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "processes": 4}))
    said = other_processes(accelerator, folder)
    assert said is not None
    assert "step-00000001 was saved by 4 process(es) and goes on with 1" in said


def test_what_is_passed_over_is_said(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = make()
    first = save(accelerator, tmp_path, 1, model, optimizer)
    second = save(accelerator, tmp_path, 2, model, optimizer)
    (second / "manifest.json").write_text("{}")
    said: list[str] = []
    assert latest_checkpoint(tmp_path, damaged=said) == first
    assert len(said) == 1
    assert said[0].startswith(f"{second} is passed over: its manifest.json cannot be read")


def test_a_part_that_is_not_on_this_disk_is_said(accelerator: Accelerator, tmp_path: Path) -> None:
    (tmp_path / "written-0.json").write_text("{}")
    with pytest.raises(FaultError, match=r"process 1 has written .* must share the folder"):
        checkpoint._merged(tmp_path, 2)
    model, optimizer = make()
    elsewhere = SimpleNamespace(is_main_process=False, process_index=1, num_processes=2)
    with pytest.raises(FaultError, match=r"process 1 does not see .*\.tmp, .* must share the folder"):
        save(elsewhere, tmp_path, 1, model, optimizer)  # type: ignore[arg-type]


def test_tensors_that_share_memory_are_saved_and_restored(accelerator: Accelerator, tmp_path: Path) -> None:
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    optimizer = torch.optim.Adam(tied.parameters())
    folder = save(accelerator, tmp_path, 1, tied, optimizer)
    wanted = tied[0].weight.detach().clone()
    nn.init.zeros_(tied[0].weight)
    load_checkpoint(accelerator, folder, {"model": tied}, {"adam": optimizer})
    assert torch.equal(tied[1].weight, wanted)


def test_what_a_killed_process_left_is_cleaned_up(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = make()
    save(accelerator, tmp_path, 1, model, optimizer)
    for left in ("step-00000002.tmp", "step-00000000.removing", "step-00000001.old"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / left)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003.old")
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000001.old", "step-00000001", "step-00000003.old",
    ]  # fmt: skip
    assert latest_checkpoint(tmp_path, up_to=2) == tmp_path / "step-00000001"
    checkpoint.tidy(tmp_path, 3, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000003"}
    checkpoint.tidy(tmp_path, 3, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003"}


def test_later_ones_do_not_drive_out_those_a_run_goes_on_from(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    model, optimizer = make()
    save(accelerator, tmp_path, 1, model, optimizer)
    damaged = save(accelerator, tmp_path, 9, model, optimizer)
    (damaged / "progress.json").write_text("{")
    for number in (2, 3):
        save(accelerator, tmp_path, number, model, optimizer)
    assert [checkpoint.checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [2, 3, 9]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003"


def test_the_newest_healthy_one_is_kept_besides(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = make()
    for number in range(1, 7):
        save_checkpoint(
            accelerator, tmp_path, number, {"model": model}, {"adam": optimizer}, {}, keep=2, healthy_step=3
        )
    assert [checkpoint.checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [3, 5, 6]
    assert latest_checkpoint(tmp_path, up_to=4) == tmp_path / "step-00000003"


@pytest.mark.parametrize("way", ["swapped", "moved aside"])
def test_a_kill_before_any_operation_leaves_a_whole_checkpoint(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What the disk holds before each operation is what a kill there would leave."""
    if way == "moved aside":
        monkeypatch.setattr("taming.atomic._swap", lambda first, second: False)
    root, allowed, looking = tmp_path / "checkpoints", {0}, False
    seen: list[tuple[int, list[str]]] = []

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal looking
        if not looking or not (event == "open" or event.startswith("os.")):
            return
        if not str(arguments[0]).startswith(str(root)) and event != "os.remove":
            return
        looking = False  # what is done here is no part of a save
        found = latest_checkpoint(root)
        step = checkpoint.checkpoint_step(found) if found is not None else 0
        assert step in allowed, f"step {step} before {event} {arguments}"
        if root.exists() and len(seen) % 3 == 0:  # and a start goes on from there
            copy = tmp_path / "copy"
            shutil.copytree(root, copy)
            checkpoint.tidy(copy, step, keep=2)
            assert sorted(path.name for path in copy.iterdir()) == [
                f"step-{number:08d}" for number in range(max(step - 1, 1), step + 1)
            ]
            assert verify_checkpoint(copy / f"step-{step:08d}") is None or not step
            shutil.rmtree(copy)
        seen.append((step, [event, *map(str, arguments[:2])]))
        looking = True

    model, optimizer = make()
    sys.addaudithook(look)  # for good: it sleeps after this test
    # The fourth is replaced, as after a rollback.
    for number, allowed in ((1, {0, 1}), (2, {1, 2}), (3, {2, 3}), (4, {3, 4}), (4, {4})):  # noqa: B007
        step(model, optimizer)
        looking = True
        save(accelerator, root, number, model, optimizer)
        looking = False
    assert len(seen) > 100
    assert [path.name for path in list_checkpoints(root)] == ["step-00000003", "step-00000004"]
