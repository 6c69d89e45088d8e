"""What a launcher asks for is done, or refused in one line."""

from __future__ import annotations

import os

import pytest
import torch

from stage1_vq.train import check
from taming.errors import ConfigError
from taming.training.distributed import check_launch, launch_notes, make_accelerator
from taming.training.sharding import Sharding, read_sharding
from tests.conftest import vq_config
from tests.ranks import run_ranks

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which is not supported; use distributed_type"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM, which is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "leave it out"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "compile=true"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "taming launch --cpu N"),
    ],
)
def test_other_launches_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    check_launch()
    set_all(monkeypatch, variables)
    with pytest.raises(ConfigError, match=says):
        check_launch()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "set it to false"),
        ({"FSDP_IGNORED_MODULES": "head"}, "leave it out"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"}, "use Block"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "HYBRID_SHARD"}, "true or false"),
    ],
)
def test_other_sharding_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    assert read_sharding() is None
    set_all(monkeypatch, {**FSDP, **variables})
    with pytest.raises(ConfigError, match=says):
        read_sharding()


def test_sharding_is_read_from_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, FSDP)
    assert read_sharding() == Sharding()
    set_all(
        monkeypatch,
        {
            "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "false",
            "FSDP_ACTIVATION_CHECKPOINTING": "true",
        },
    )
    assert read_sharding() == Sharding(reshard_after_forward=False, by_block=False, recompute=True)


def test_an_autoencoder_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    check(vq_config())
    set_all(monkeypatch, FSDP)
    with pytest.raises(ConfigError, match=r"an autoencoder is not trained with FSDP.*MULTI_GPU"):
        check(vq_config())


def test_the_training_config_decides_about_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_notes("fp32") == []
    for asked in ("fp16", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        assert make_accelerator("fp32").mixed_precision == "no"
        assert f"mixed_precision {asked}" in launch_notes("fp32")[0]
    assert launch_notes("bf16") == []


def test_losses_are_divided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    value = torch.ones((), requires_grad=True)
    make_accelerator("fp32").backward(value)
    assert value.grad == 1


def found(rank: int, on_cpu: bool) -> tuple[int, int, float]:
    if not on_cpu:
        del os.environ["ACCELERATE_USE_CPU"]  # torchrun does not set it
    accelerator = make_accelerator("fp32")
    total = accelerator.reduce(torch.tensor(float(rank + 1)))
    return accelerator.num_processes, accelerator.process_index, total.item()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there its processes would share a GPU")
def test_processes_of_any_launcher_find_each_other_without_a_gpu() -> None:
    for on_cpu in (True, False):
        outcomes = run_ranks(found, 2, on_cpu)
        assert [outcome.result for outcome in outcomes] == [(2, 0, 3.0), (2, 1, 3.0)]
