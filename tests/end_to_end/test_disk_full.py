"""A disk that fills up while a run saves: the last checkpoint stays, and the error says what to do."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from taming.training.checkpoint import latest_checkpoint, list_checkpoints, verify_checkpoint
from tests.conftest import TINY_TRAINING, vq_values
from tests.end_to_end.test_command_line import ENVIRONMENT, taming

ROOT = Path(__file__).parents[2]


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Writing past `size` bytes of a file fails, as on a disk that is full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_does_not_fit_leaves_the_one_before_and_the_way_on(tmp_path: Path) -> None:
    config, run = tmp_path / "vq.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(vq_values(training={**TINY_TRAINING, "preview_every": 100})))
    command = ("vq", "train", config, "-o", f"training.output={run}")
    done = taming(*command, "-o", "training.steps=2")
    assert done.returncode == 0, done.stderr
    first = latest_checkpoint(run / "checkpoints")
    assert first is not None
    with no_file_larger_than((first / "modules.safetensors").stat().st_size // 2):
        done = taming(*command)
    assert done.returncode == 75
    error = done.stderr.splitlines()[-1]
    said = (
        r"checkpoint \S+step-00000004 was not written \(File too large\): it needs \S+ KiB, and \S+ \wiB are"
    )
    assert re.search(said, error), error
    assert "Traceback" not in done.stderr
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000001", first.name}
    assert verify_checkpoint(first) is None
    model = run / "model/model.safetensors"
    before, half = model.read_bytes(), model.stat().st_size // 2
    with no_file_larger_than(half):  # models that commands write, too
        done = taming("vq", "encode", run, config, "--out", tmp_path / "codes")
    assert done.returncode == 75, done.stderr
    assert re.search(r"error: model \S+tokenizer was not written \(File too large\): it needs", done.stderr)
    assert not (tmp_path / "codes/index.json").exists()
    done = taming(*command)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {first}" in done.stderr
    assert model.read_bytes() != before


SCRIPT = """
set -u
mount -t tmpfs -o size={size}k none {disk}
( for i in $(seq 1200); do [ -e {disk}/run/{sign} ] && break; sleep 0.05; done
  dd if=/dev/zero of={disk}/fill bs=1k count=$(( $(df -k --output=avail {disk} | tail -1) - {left} )) ) &
{launch} -m taming vq train {config} -o training.output={disk}/run {options} 2> {out}/stderr
echo $? > {out}/code
cp -r {disk}/run {out}/
rm {disk}/fill
{launch} -m taming vq train {config} -o training.output={disk}/run {options} -o training.steps=$(
  ls {disk}/run/checkpoints | tail -1 | sed 's/step-0*//' | awk '{{print $1 + 20}}') 2> {out}/again
echo $? > {out}/code_again
"""


def on_a_small_disk(
    folder: Path, *, size: int, left: int, sign: str, launch: str = "", options: str = ""
) -> tuple[int, str, int]:
    """Train on a tmpfs of `size` KiB, filled up to `left` KiB once `sign` is there, and again with room.

    Gives both exit codes and what the first one said; folder/run is what it left.
    """
    disk, out = folder / "disk", folder
    disk.mkdir()
    training = {**TINY_TRAINING, "steps": 100_000, "evaluate_every": 100_000, "preview_every": 100_000}
    (folder / "vq.yaml").write_text(yaml.safe_dump(vq_values(training={**training, "checkpoint_every": 20})))
    script = SCRIPT.format(
        size=size, left=left, disk=disk, sign=sign, out=out, options=options, config=folder / "vq.yaml",
        launch=launch or sys.executable,
    )  # fmt: skip
    subprocess.run(
        ["unshare", "-Urm", "bash", "-c", script],
        cwd=ROOT, env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, timeout=240,
        check=False,
    )  # fmt: skip
    if not (folder / "code").is_file():
        pytest.fail("the script ended early")
    code, again = (int((folder / name).read_text()) for name in ("code", "code_again"))
    return code, (folder / "stderr").read_text(), again


needs_tmpfs = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="this machine lets nobody mount a tmpfs of their own (unshare -Urm)",
)


@needs_tmpfs
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_on_a_full_disk(tmp_path: Path, processes: int) -> None:
    launch = "" if processes == 1 else f"{sys.executable} -m torch.distributed.run --nproc_per_node 2"
    code, said, again = on_a_small_disk(tmp_path, size=4000, left=100, sign="model", launch=launch)
    # torchrun turns its processes' codes into 1. Of several processes one may speak for all.
    assert code == (75 if processes == 1 else 1), said[-2000:]
    errors = [line for line in said.splitlines() if "error: " in line and " checkpoint /" in line]
    assert 1 <= len(errors) <= processes
    assert "died" not in said
    for error in errors:
        assert re.search(
            r"step-000000\d\d was not written \(No space left on device\): it needs \S+ KiB", error
        )
    if processes == 1:
        assert "Traceback" not in said
    checkpoints = tmp_path / "run/checkpoints"
    assert list_checkpoints(checkpoints)
    assert all(verify_checkpoint(folder) is None for folder in list_checkpoints(checkpoints))
    assert not [path for path in os.listdir(checkpoints) if not path.startswith("step-") or "." in path]
    assert again == 0, (tmp_path / "again").read_text()[-2000:]


@needs_tmpfs
@pytest.mark.slow
def test_a_log_on_a_full_disk(tmp_path: Path) -> None:
    code, said, again = on_a_small_disk(
        tmp_path, size=4000, left=0, sign="checkpoints/step-00000001",
        options="-o training.checkpoint_every=10000",
    )  # fmt: skip
    assert code == 75
    assert "Traceback" not in said
    assert re.search(r"error: .*run\S* .*No space left on device.*free some space", said.splitlines()[-1])
    assert again == 0
