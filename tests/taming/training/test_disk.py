"""What a run needs of its disk."""

from pathlib import Path

import pytest
import torch
from torch import nn

from taming import disk
from taming.errors import FaultError, UserError
from taming.training.checkpoint import save_checkpoint
from taming.training.disk import check_disk, checkpoint_bytes


def make() -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer]]:
    model = nn.Linear(1000, 100)
    return {"model": model, "ema": nn.Linear(1000, 100)}, {"adam": torch.optim.AdamW(model.parameters())}


def test_what_is_foreseen_is_what_is_written(tmp_path: Path) -> None:
    from accelerate import Accelerator

    modules, optimizers = make()
    foreseen = checkpoint_bytes(modules, optimizers)
    modules["model"](torch.randn(2, 1000)).sum().backward()
    optimizers["adam"].step()
    folder = save_checkpoint(Accelerator(cpu=True), tmp_path, 1, modules, optimizers, {})
    files = [folder / name for name in ("modules.safetensors", "optimizers.safetensors")]
    assert foreseen == pytest.approx(sum(path.stat().st_size for path in files), rel=0.01)
    assert foreseen == checkpoint_bytes(modules, optimizers)


def test_the_refusal_says_how_much_and_what_the_run_holds_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, optimizers = make()
    one, model = checkpoint_bytes(modules, optimizers), 4 * (1000 * 100 + 100)
    needed = 3 * one + 2 * model
    monkeypatch.setattr("taming.training.disk.free_bytes", lambda path: needed)
    check_disk(tmp_path / "run", modules, optimizers, 2)
    monkeypatch.setattr("taming.training.disk.free_bytes", lambda path: needed - 1000)
    with pytest.raises(
        UserError, match=r"needs about .* MiB .*3 checkpoints .* lower training\.keep_checkpoints"
    ):
        check_disk(tmp_path / "run", modules, optimizers, 2)
    held = tmp_path / "run/checkpoints/step-00000001"
    held.mkdir(parents=True)
    (held / "file").write_bytes(b"0" * 1000)
    check_disk(tmp_path / "run", modules, optimizers, 2)


def test_only_want_of_room_becomes_a_fault(tmp_path: Path) -> None:
    with (
        pytest.raises(FaultError, match=r"codes .* was not written \(No space left on device\): .* are free"),
        disk.room_for("codes", tmp_path / "not/there"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(PermissionError), disk.room_for("codes", tmp_path):
        raise PermissionError(13, "Permission denied")
