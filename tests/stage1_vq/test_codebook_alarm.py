"""The alarm of an idle codebook."""

from __future__ import annotations

import json

import pytest
import torch

from stage1_vq.codebook_alarm import CodebookAlarm, CodebookAlarmConfig, remedies
from stage1_vq.quantizers import FSQConfig, NearestConfig
from stage1_vq.train import train
from tests.conftest import TINY_MODEL, TINY_TRAINING, vq_config


def windows(alarm: CodebookAlarm, *used: int, cells: int = 1000) -> list[str | None]:
    """What the alarm says after each window in which so many codes share the cells."""
    said = []
    for number in used:
        for _ in range(alarm.config.window):
            counts = torch.zeros(len(alarm.counts), dtype=torch.int64)
            counts[:number] = cells // number
            alarm.count(counts)
            said.append(alarm.observe())
    return [text for index, text in enumerate(said, 1) if index % alarm.config.window == 0]


def alarm(size: int = 100) -> CodebookAlarm:
    return CodebookAlarm(CodebookAlarmConfig(window=2, share=0.1), size, ["kmeans_init: true"])


def test_a_collapse_is_told_once():
    said = windows(alarm(), 60, 30, 5, 4)
    assert said[:2] == [None, None]
    assert "5 of 100 codes were chosen in 2 steps, after 60% at best; try kmeans_init: true" in said[2]
    assert said[3] is None


def test_a_codebook_that_stays_tiny_is_told_after_some_patience():
    said = windows(alarm(), 2, 3, 3)
    assert said[:2] == [None, None]
    assert "3 of 100 codes" in said[2]
    assert "never many more" in said[2]


def test_a_slow_start_and_few_cells_are_no_alarm():
    assert windows(alarm(), 2, 5, 12, 40, 11) == [None] * 5
    assert windows(alarm(size=10000), 4, 4, 4, cells=4) == [None] * 3


def test_a_restored_alarm_does_not_repeat_itself():
    first, second = alarm(), alarm()
    windows(first, 60, 5)
    second.load_state_dict(first.state_dict())
    assert windows(second, 5) == [None]


def test_only_settings_that_the_quantizer_has_are_named():
    assert remedies(NearestConfig()) == [
        "model.quantizer.kmeans_init: true",
        "revive_after: 100",
        "l2_normalised: true",
        "code_dim: 8",
        "fewer codes",
    ]
    healthy = NearestConfig(kmeans_init=True, revive_after=50, l2_normalised=True, code_dim=8)
    assert remedies(healthy) == ["fewer codes"]
    assert remedies(FSQConfig()) == ["fewer levels"]


@pytest.mark.parametrize("heard", [True, False])
def test_it_is_in_the_log_and_the_result_of_a_run(tmp_path, heard: bool):
    model = TINY_MODEL | {"quantizer": {"kind": "nearest", "codebook_size": 256, "code_dim": 64}}
    setting = {"window": 2, "share": 0.1} if heard else None
    training = TINY_TRAINING | {"steps": 6, "evaluate_every": 6, "checkpoint_every": 6}
    config = vq_config(model=model, training=training, codebook_alarm=setting, discriminator=None)
    result = train(config, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    notes = [record for record in records if record["kind"] == "note"]
    assert len(notes) == len(result.notes) == int(heard)
    if heard:
        assert notes[0]["step"] == 6
        assert "kmeans_init: true, revive_after: 100" in notes[0]["text"]
