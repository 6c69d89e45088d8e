"""The command line as a user meets it: the whole way on tiny models, and every mistake as one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import yaml
from PIL import Image

from stage1_vq import VQModel
from taming.cli import main
from tests.conftest import TINY_TRAINING, ar_values, vq_values

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def taming(*arguments: object, cwd: Path | None = None) -> Done:
    """Run the command in this process, which saves seconds of imports each time."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["taming", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        contextlib.chdir(cwd or "."),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        except BaseException:
            traceback.print_exc()  # what a user would see
            code = 1
    return Done(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())


def taming_process(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "taming", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=300, check=False
    )


def succeeds(*arguments: object, cwd: Path | None = None) -> str:
    done = taming(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments: object) -> str:
    """The single line that a mistake gets."""
    done = taming(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def write_config(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        colour = number * 7 % 256 if mode == "L" else (number * 9 % 256, 40, 200)
        Image.new(mode, size, colour).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained tokenizer's run."""
    folder = tmp_path_factory.mktemp("vq")
    config = write_config(folder / "tiny.yaml", vq_values())
    succeeds("vq", "train", config, "-o", f"training.output={folder / 'run'}")
    return folder / "run"


def processor_seconds() -> float:
    """Of all processes that ended: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_imports_no_torch() -> None:
    times = []
    for _ in range(3):
        begin = processor_seconds()
        done = taming_process("--help")
        times.append(processor_seconds() - begin)
    assert all(name in done.stdout for name in ("data", "vq", "ar", "demo", "doctor"))
    assert "codebook" in done.stdout
    assert min(times) < 0.5
    code = (
        "import sys\nfrom taming.cli import main\nsys.argv = ['taming', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_mistake_in_a_real_process_is_one_line() -> None:
    done = taming_process("vq", "train", "photos_64", "-o", "data.root=/nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.root /nowhere does not exist")
    assert len(done.stderr.splitlines()) == 1


def test_the_whole_way_of_a_picture(run: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", 3)
    succeeds("vq", "reconstruct", run, tmp_path / "photos", "--out", tmp_path / "painted")
    with Image.open(tmp_path / "painted/000.png") as image:
        assert image.size == (24, 20)
    assert (tmp_path / "painted/sheet.png").is_file()

    succeeds("vq", "eval", run, run / "config.yaml", "--out", tmp_path / "measured")
    metrics = json.loads((tmp_path / "measured/metrics.json").read_text())
    assert metrics["pictures"] == 6
    assert metrics["split"] == "all"
    assert 0 < metrics["code_usage"] <= 1
    assert len((tmp_path / "measured/pictures.csv").read_text().splitlines()) == 7

    codes = tmp_path / "codes"
    said = succeeds("vq", "encode", run, run / "config.yaml", "--out", codes, "--views", 2)
    assert "12 train, 6 validation pictures x 2 view(s) as 8x8 codes" in said

    config = write_config(
        tmp_path / "ar.yaml", ar_values(data={"kind": "codes", "root": str(codes)}, tokenizer=None)
    )
    said = succeeds("ar", "train", config, "--dry-run")
    assert "64: 1 of the condition, 64 codes of 16" in said
    succeeds("ar", "train", config, "-o", f"training.output={tmp_path / 'ar'}")

    write_pictures(tmp_path / "maps", 1, size=(32, 16), mode="L")
    sampled = ("--segmentation", tmp_path / "maps/000.png", "--num", 2, "--top-k", 8)
    succeeds("ar", "sample", tmp_path / "ar", "--out", tmp_path / "samples", *sampled)
    with Image.open(tmp_path / "samples/0001.png") as image:
        assert image.size == (32, 16)  # wider than trained on: a sliding window
    facts = json.loads((tmp_path / "samples/0001.json").read_text())
    assert (facts["seed"], facts["top_k"], facts["picture"], facts["width"]) == (0, 8, 1, 32)

    succeeds("ar", "eval", tmp_path / "ar", run / "config.yaml", "--out", tmp_path / "likely")
    likely = json.loads((tmp_path / "likely/metrics.json").read_text())
    assert 0 < likely["bits_per_code"] < 8


def test_classes_from_sub_folders_to_samples(run: Path, tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        write_pictures(tmp_path / "pets" / name, 10)
    values = ar_values(tokenizer=str(run), condition={"kind": "class", "num_classes": 1})
    values["data"] = {"kind": "folder", "root": str(tmp_path / "pets"), "size": 16, "class_labels": True}
    config = write_config(tmp_path / "c.yaml", values)
    assert "set condition.num_classes=2" in refused("ar", "train", config)
    model = tmp_path / "ar"
    succeeds("ar", "train", config, "-o", "condition.num_classes=2", "-o", f"training.output={model}")
    asked = ("--class", 1, "--class", 0, "--num", 2, "--guidance", 2.0)
    succeeds("ar", "sample", model, "--out", tmp_path / "out", *asked)
    facts = [json.loads((tmp_path / f"out/000{number}.json").read_text()) for number in range(4)]
    assert [fact["conditions"]["class"] for fact in facts] == [1, 1, 0, 0]
    assert "class 2 is not one of the 2 classes" in refused(
        "ar", "sample", model, "--out", tmp_path / "other", "--class", 2
    )


def test_a_dry_run_trains_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", vq_values())
    said = succeeds(
        "vq", "train", config, "--dry-run", "-o", "model.quantizer.codebook_size=24", cwd=tmp_path
    )
    assert "codebook_size: 24" in said
    assert "8x8 (f2)" in said
    assert "64 codes of 24" in said
    assert "memory" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


def test_shipped_configs_work_by_name_outside_a_checkout(tmp_path: Path) -> None:
    assert "photos_64" in succeeds("vq", "configs", cwd=tmp_path)
    assert "segmentation_64" in succeeds("ar", "configs", cwd=tmp_path)
    write_pictures(tmp_path / "photos", 12, size=(80, 70))
    said = succeeds("vq", "train", "photos_64", "-o", "data.root=photos", "--dry-run", cwd=tmp_path)
    assert "16x16 (f4)" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.kind=folder", "data.root=/nowhere"], "/nowhere does not exist"),
        (["training.step=3"], "unknown key training.step; did you mean steps?"),
        (["training.steps=many"], "training.steps"),
        (["data.size=18", "model.channel_multipliers=[1,2,2]"], "height 18 is not divisible"),
        (["loss.perceptual_weight=1", "loss.vgg_weights=/nowhere.pth"], "/nowhere.pth"),
        (["init_from=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_in_a_config_are_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    values = vq_values()
    if overrides[0].startswith("data.kind"):
        values["data"] = {"size": 16}
    config = write_config(tmp_path / "tiny.yaml", values)
    options = [part for override in overrides for part in ("-o", override)]
    assert message in refused("vq", "train", config, *options, "-o", f"training.output={tmp_path / 'run'}")
    assert not (tmp_path / "run/checkpoints").exists()


def folder_values(root: Path, **data: object) -> dict:
    return vq_values(data={"kind": "folder", "root": str(root), "size": 16, **data})


def test_pictures_smaller_than_the_crop(tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", 4, size=(24, 12))
    config = write_config(tmp_path / "c.yaml", folder_values(tmp_path / "photos"))
    said = refused("vq", "train", config)
    assert "smaller than the crop 16x16" in said
    assert "data.upscale=true" in said


def test_a_map_without_its_picture_and_a_label_too_many(tmp_path: Path, run: Path) -> None:
    write_pictures(tmp_path / "d/images", 6)
    write_pictures(tmp_path / "d/labels", 6, mode="L")
    values = ar_values(tokenizer=str(run))
    values["data"] = {"kind": "folder", "root": str(tmp_path / "d"), "size": 16, "segmentation": "labels"}
    values["data"]["num_labels"] = 20
    config = write_config(tmp_path / "c.yaml", values)
    said = refused("ar", "train", config)
    assert "label 21" in said
    assert "data.num_labels=36" in said
    said = refused("ar", "train", config, "-o", "data.num_labels=36")
    assert "condition.num_labels=36" in said
    Image.new("L", (24, 20)).save(tmp_path / "d/labels/999.png")
    assert "999.png" in refused("ar", "train", config, "-o", "data.num_labels=36")


def test_a_checkpoint_of_another_architecture(run: Path, tmp_path: Path) -> None:
    values = vq_values()
    values["model"] = {**values["model"], "channels": 16}
    config = write_config(tmp_path / "wider.yaml", values)
    checkpoint = run / "checkpoints/step-00000004"
    said = refused("vq", "train", config, "-o", f"training.output={tmp_path / 'run'}", "--resume", checkpoint)
    assert "model.channels: 8 there, 16 here" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ar", "sample", "RUN", "--out", "OUT"), "RUN"),
        (("vq", "reconstruct", "RUN", "/nowhere", "--out", "OUT"), "no data at '/nowhere'"),
        (("vq", "eval", "RUN", "scenes", "--size", "64by64"), "neither a number nor HxW"),
        (("vq", "eval", "RUN", "scenes", "--split", "test"), "choose all, train or validation"),
        (("vq", "eval", "RUN", "scenes", "--size", "15"), "not divisible by the downsample factor 2"),
        (("vq", "eval", "/nowhere", "scenes"), "/nowhere"),
        (("vq", "eval", "RUN", "scenes", "--device", "warp"), "no device 'warp'"),
        (("ar", "train", "unconditional_64"), "data.root is missing"),
        (("ar", "train", "unconditional_64", "-o", "data.root=RUN"), "taming vq encode"),
    ],
)
def test_mistakes_on_the_line_are_one_line(run: Path, tmp_path: Path, arguments: tuple, message: str) -> None:
    names = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    line = [part.replace("RUN", names["RUN"]).replace("OUT", names["OUT"]) for part in arguments]
    assert message.replace("RUN", names["RUN"]) in refused(*line)
    assert not (tmp_path / "out").exists()


def test_results_never_go_over_others(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert "not an empty folder" in refused("vq", "reconstruct", run, "scenes", "--out", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_model_folder_is_all_that_others_need(run: Path, tmp_path: Path) -> None:
    VQModel.from_pretrained(run).save_pretrained(tmp_path / "model")
    succeeds("vq", "eval", tmp_path / "model", run / "config.yaml")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same global batches on 1 and 2 processes: the same losses."""
    training = {**TINY_TRAINING, "steps": 6, "clip_norm": None}
    values = vq_values(training=training)
    values["discriminator"]["network"]["norm"] = "group"  # batch statistics are those of a process
    config = write_config(tmp_path / "tiny.yaml", values)
    losses = []
    for processes in (1, 2):
        out = tmp_path / f"run{processes}"
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "taming"]
        command = [sys.executable, *launch, "vq", "train", str(config), "-o", f"training.output={out}"]
        done = subprocess.run(
            command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([[r["nll"], r["adaptive_weight"]] for r in records if "adaptive_weight" in r])
    assert len(losses[0]) >= 3
    for one, two in zip(*losses, strict=True):
        assert one == pytest.approx(two, rel=1e-3)
