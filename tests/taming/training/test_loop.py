"""The loop, with real tiny runs of both stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stage1_vq import VQModel
from stage1_vq.train import train as train_tokenizer
from stage2_ar import ARPipeline
from stage2_ar.train import train as train_transformer
from taming.errors import UserError
from taming.training import loop
from taming.training.checkpoint import list_checkpoints
from tests.conftest import TINY_TRAINING, ar_config, ar_values, vq_config


def last_state(run: Path) -> dict[str, torch.Tensor]:
    folder = list_checkpoints(run / "checkpoints")[-1]
    return {**load_file(folder / "modules.safetensors"), **load_file(folder / "optimizers.safetensors")}


def test_a_run_leaves_all_that_a_user_needs(tmp_path: Path) -> None:
    result = train_tokenizer(vq_config(), tmp_path / "run")
    assert {path.name for path in result.folder.iterdir()} == {
        ".lock", "checkpoints", "config.yaml", "log.jsonl", "model", "previews", "tensorboard",
    }  # fmt: skip
    records = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [2, 4]
    assert records[-1]["psnr"] == pytest.approx(result.figures["psnr"], rel=1e-5)
    assert records[3]["pictures"] == 8 + 4 * (records[3]["step"] - 2)
    assert yaml.safe_load((result.folder / "config.yaml").read_text())["training"]["steps"] == 4
    assert VQModel.from_pretrained(result.folder).spec.codebook_size == 16


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_equals_never_stopping(tmp_path: Path, accumulation: int) -> None:
    training = {**TINY_TRAINING, "accumulation": accumulation}
    whole = train_tokenizer(vq_config(training=training), tmp_path / "whole")
    short = {**training, "steps": 2}
    train_tokenizer(vq_config(training=short), tmp_path / "parts")
    train_tokenizer(vq_config(training=training), tmp_path / "parts")
    a, b = last_state(whole.folder), last_state(tmp_path / "parts")
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_stage_two_resumes_exactly_too(tmp_path: Path, tokenizer: VQModel) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    values = ar_values(tokenizer=str(tmp_path / "tokenizer"))
    values["transformer"] |= {"residual_dropout": 0.2}  # draws from the generator that must be restored
    train_transformer(ar_config(**values), tmp_path / "whole")
    train_transformer(ar_config(**{**values, "training": {**TINY_TRAINING, "steps": 2}}), tmp_path / "parts")
    train_transformer(ar_config(**values), tmp_path / "parts")
    a, b = last_state(tmp_path / "whole"), last_state(tmp_path / "parts")
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    assert ARPipeline.from_pretrained(tmp_path / "whole").model.config.grid == (8, 8)


def test_another_config_is_refused_with_its_difference(tmp_path: Path) -> None:
    train_tokenizer(vq_config(), tmp_path)
    changed = vq_config(optimizer={"learning_rate": 5e-4})
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.001 there, 0\.0005 here"):
        train_tokenizer(changed, tmp_path)


def test_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tokenizer(vq_config(), tmp_path)
    monkeypatch.setattr("taming.data.dataset.ScenesDataset.fingerprint", lambda self: "other")
    with pytest.raises(UserError, match="training data is not that of"):
        train_tokenizer(vq_config(training={**TINY_TRAINING, "steps": 5}), tmp_path)


def test_never_does_not_touch_an_earlier_run(tmp_path: Path) -> None:
    train_tokenizer(vq_config(), tmp_path)
    before = last_state(tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        train_tokenizer(vq_config(), tmp_path, resume="never")
    assert last_state(tmp_path).keys() == before.keys()


def test_a_signal_saves_and_the_run_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    real = loop._Sums.add

    def kill_in_step_three(self: loop._Sums, values: dict[str, torch.Tensor]) -> None:
        real(self, values)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    calls: list[int] = []
    monkeypatch.setattr(loop._Sums, "add", kill_in_step_three)
    with pytest.raises(loop.Interrupted) as stopped:
        train_tokenizer(vq_config(), tmp_path / "killed")
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert list_checkpoints(tmp_path / "killed/checkpoints")[-1].name == "step-00000003"
    monkeypatch.undo()
    train_tokenizer(vq_config(), tmp_path / "killed")
    train_tokenizer(vq_config(), tmp_path / "whole")
    a, b = last_state(tmp_path / "whole"), last_state(tmp_path / "killed")
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_a_batch_that_does_not_divide_names_what_does(tmp_path: Path) -> None:
    training = {**TINY_TRAINING, "batch_size": 6, "accumulation": 4}
    with pytest.raises(UserError, match="batch_size 6 is not divisible by accumulation 4"):
        vq_config(training=training)


def test_the_first_batch_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.to_device

    def without_maps(batch: dict, device: object) -> dict:
        return {key: value for key, value in real(batch, device).items() if key != "segmentation"}

    monkeypatch.setattr(loop, "to_device", without_maps)
    with pytest.raises(UserError, match="segmentation is needed too"):
        train_tokenizer(vq_config(), tmp_path)


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_tokenizer(vq_config(), tmp_path / "whole")
    train_tokenizer(vq_config(), tmp_path / "damaged")
    newest = list_checkpoints(tmp_path / "damaged/checkpoints")[-1]
    with (newest / "modules.safetensors").open("r+b") as file:
        file.truncate(100)
    capfd.readouterr()
    # A run's folder names its newest checkpoint, as `auto` does.
    train_tokenizer(vq_config(), Path("damaged"), resume=str(tmp_path / "damaged"))
    said = capfd.readouterr().err
    assert f"{newest} is passed over: modules.safetensors is damaged" in said
    assert "checkpoints/step-00000002 at step 2" in said
    a, b = last_state(tmp_path / "whole"), last_state(tmp_path / "damaged")
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert log_without_times(tmp_path / "whole") == log_without_times(tmp_path / "damaged")


def test_a_run_with_damaged_checkpoints_alone_is_never_begun_anew_unasked(tmp_path: Path) -> None:
    train_tokenizer(vq_config(), tmp_path)
    for folder in list_checkpoints(tmp_path / "checkpoints"):
        (folder / "progress.json").write_text("{}")
    for resume in ("auto", str(tmp_path)):
        with pytest.raises(UserError, match=r"all 3 checkpoints .* damaged \(.*progress\.json is damaged"):
            train_tokenizer(vq_config(), tmp_path, resume=resume)


def test_a_finished_run_that_is_started_again_only_saves_its_model(tmp_path: Path) -> None:
    whole = train_tokenizer(vq_config(), tmp_path)
    before, weights = log_without_times(tmp_path), (tmp_path / "model/model.safetensors").read_bytes()
    (tmp_path / "model/model.safetensors").unlink()  # as a kill before it was saved
    again = train_tokenizer(vq_config(), tmp_path)
    assert again.figures == whole.figures
    assert log_without_times(tmp_path) == before
    assert (tmp_path / "model/model.safetensors").read_bytes() == weights


def test_what_a_run_without_a_checkpoint_left_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(vq_config(discriminator=None), tmp_path)
    assert len(log_without_times(tmp_path)) == 3
    train_tokenizer(vq_config(discriminator=None), tmp_path)
    assert [(record["step"], record["kind"]) for record in log_without_times(tmp_path)] == [
        (1, "train"), (2, "train"), (2, "validation"), (3, "train"), (4, "train"), (4, "validation"),
    ]  # fmt: skip


def test_a_disk_that_is_too_small_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taming.training.disk.free_bytes", lambda path: 2**20)
    with pytest.raises(UserError, match=r"the run needs about .* MiB in .* 1\.0 MiB are to be had there"):
        train_tokenizer(vq_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def log_without_times(run: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    timing = ("pictures_per_second", "data_wait")
    return [{key: value for key, value in record.items() if key not in timing} for record in records]
