"""Files that strangers made to harm: each ends in one line or is ignored, and none of their code ever runs.

Every payload would make a canary, a file outside of all folders that commands write to.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taming.data.config import ShardsDataConfig
from taming.data.dataset import open_dataset
from taming.data.shards.index import joined, parse_entries, parse_index
from tests.conftest import ar_values, vq_values
from tests.end_to_end.strangers import (
    Payload,
    pickles,
    picture,
    safetensors_header,
    sampled,
    tensor_header,
    write,
)
from tests.end_to_end.test_command_line import Done, refused, taming
from tests.stage1_vq.interop.published import published_yaml, small_model
from tests.stage2_ar.interop.published import container_yaml, gpt_yaml, random_gpt
from tests.taming.data.test_damaged_shards import vouch

DEEP = "[" * 200_000


# --- pickles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_pickles_given_to_every_importer(work: Path, canary: Path, models: Path, form: str) -> None:
    data = pickles(canary)[form]
    tokenizer, gpt = small_model(), random_gpt(24, 16)
    first = write(work / "model.yaml", published_yaml(tokenizer))
    bare = write(work / "gpt.yaml", {"model": gpt_yaml(gpt)})
    whole = write(work / "whole.yaml", container_yaml(gpt, tokenizer, "__is_unconditional__", "image"))
    write(work / "hf" / "config.json", {"_class_name": "VQModel"})
    write(work / "hf" / "diffusion_pytorch_model.bin", data)
    out = ("--out", work / "out")
    for suffix in ("ckpt", "pt", "bin", "safetensors") if form == "zip" else ("ckpt",):
        source = write(work / f"model.{suffix}", data)
        published = ("import", "taming-transformers", source, "--config")
        for arguments in (
            ("vq", *published, first),
            ("vq", *published, whole, "--part", "first_stage_model"),
            ("vq", "import", "llamagen", source),
            ("ar", *published, whole),
            ("ar", *published, bare, "--tokenizer", models / "vq"),
        ):
            assert f"checkpoint {source}" in refused(*arguments, *out)
    assert "diffusion_pytorch_model.bin" in refused("vq", "import", "diffusers", work / "hf", *out)
    assert not (work / "out").exists()


def test_pickles_in_the_place_of_weights(work: Path, canary: Path, models: Path) -> None:
    data = pickles(canary)["zip"]
    for part in ("vq", "ar/transformer", "ar/tokenizer"):
        shutil.copytree(models, work / "models", dirs_exist_ok=True)
        write(work / "models" / part / "model.safetensors", data)
        write(work / "models" / part / "pytorch_model.bin", data)  # beside it: never looked at
        name = part.split("/")[0]
        command = ("vq", "reconstruct") if name == "vq" else ("ar", "sample")
        what = (work / "models" / name, *(["scenes"] if name == "vq" else ["--class", "1"]))
        assert "cannot be read" in refused(*command, *what, "--out", work / "out")
    # As the start of a training, and as its discriminator.
    start = work / "start"
    shutil.copytree(models / "vq", start)
    arguments = ("vq", "train", write(work / "c.yaml", vq_values(init_from=str(start))), "-o")
    arguments = (*arguments, f"training.output={work / 'run'}")
    write(start / "discriminator" / "config.json", {"kind": "discriminator", "format": 1, "config": {}})
    write(start / "discriminator" / "model.safetensors", data)
    assert "discriminator" in refused(*arguments)
    write(start / "model.safetensors", data)
    assert "cannot be read" in refused(*arguments)


def test_pickles_as_the_weights_of_metrics(work: Path, canary: Path, models: Path) -> None:
    for form, data in pickles(canary).items():
        weights = write(work / f"{form}.pth", data)
        for arguments in (
            ("vq", "eval", models / "vq", "scenes", "--lpips", "--vgg-weights", weights),
            ("vq", "eval", models / "vq", "scenes", "--fid", "--inception-weights", weights),
        ):
            assert str(weights) in refused(*arguments)
        values = vq_values(loss={"perceptual_weight": 1, "vgg_weights": str(weights)})
        line = refused("vq", "train", write(work / "c.yaml", values), "-o", f"training.output={work / 'run'}")
        assert str(weights) in line


def test_a_checkpoint_of_pickles(work: Path, canary: Path) -> None:
    """Its manifest vouches for them."""
    run = write(work / "c.yaml", vq_values(training={"steps": 1, "batch_size": 4, "precision": "fp32"}))
    arguments = ("vq", "train", run, "-o", f"training.output={work / 'run'}")
    assert taming(*arguments).returncode == 0
    (checkpoint,) = (work / "run" / "checkpoints").iterdir()
    arguments = (*arguments, "-o", "training.steps=2", "--resume", checkpoint)
    for name, data in {
        "modules.safetensors": pickles(canary)["zip"],
        "optimizers.safetensors": safetensors_header(b"{}", 2**62),
        "progress.json": DEEP.encode(),
    }.items():
        kept, manifest = (
            (checkpoint / name).read_bytes(),
            json.loads((checkpoint / "manifest.json").read_text()),
        )
        said = json.loads(json.dumps(manifest))
        said["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write(checkpoint / name, data)
        write(checkpoint / "manifest.json", said)
        assert name in refused(*arguments)
        write(checkpoint / name, kept)
        said["files"] = {"../../../canary": {"size": 0, "sha256": ""}, "/dev/zero": {"size": 0, "sha256": ""}}
        write(checkpoint / "manifest.json", said)
        refused(*arguments)
        write(checkpoint / "manifest.json", DEEP)
        refused(*arguments)
        write(checkpoint / "manifest.json", manifest)


# --- configs -----------------------------------------------------------------------------------------------


def hostile_yaml(canary: Path) -> dict[str, str]:
    return {
        "apply": f"data: !!python/object/apply:os.system ['touch {canary}']",
        "new": f"data: !!python/object/new:os.system ['touch {canary}']",
        "name": "data: !!python/name:os.system",
        "module": "data: !!python/module:os",
        "deep": "data: " + DEEP[:1000],
        "aliases": "a0: &a0 [x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
        + "data: *a29\n",
        "date": "data: 2001-99-99",
        "number": "data: " + "9" * 10_000,
        "long": "data: {kind: folder, root: x, " + "k" * 100_000 + ": 1}",
        "controls": 'data: {kind: folder, root: x, "\\e]0;owned\\a\\n": 1}',
    }


@pytest.mark.parametrize("name", list(hostile_yaml(Path())))
def test_configs(work: Path, canary: Path, models: Path, name: str) -> None:
    text = hostile_yaml(canary)[name]
    config = write(work / "config.yaml", text)
    commands: list[tuple[object, ...]] = [
        ("vq", "train", config),
        ("ar", "train", config),
        ("data", "check", config),
        ("vq", "eval", models / "vq", config),
        ("vq", "import", "taming-transformers", config, "--config", config, "--out", work / "out"),
    ]
    if name not in ("aliases", "controls"):
        override = text.replace("data: ", "data=") if name != "long" else f"data.{'k' * 10**5}=1"
        commands.append(("vq", "train", write(work / "right.yaml", vq_values()), "-o", override))
    for arguments in commands:
        line = refused(*arguments)
        assert len(line) < 5000
        assert line.isprintable()


def test_targets_in_published_configs_are_never_imported(work: Path, canary: Path) -> None:
    write(work / "evil.py", f"open({str(canary)!r}, 'w')")
    checkpoint = work / "model.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, checkpoint)
    for target in ("os.system", "evil.Model", "subprocess.run", "taming.models.vqgan.VQModel; import os"):
        values = {"model": {"target": target, "params": {"command": f"touch {canary}", "n_embed": 16}}}
        config = write(work / "model.yaml", values)
        rest = ("import", "taming-transformers", checkpoint, "--config", config, "--out", work / "out")
        for group in ("vq", "ar"):
            line = refused(
                group, "import", "taming-transformers", checkpoint, "--config", config, "--out", work / "o"
            )
            assert target in line
        inner = {"target": "taming.models.cond_transformer.Net2NetTransformer"}
        inner["params"] = {"transformer_config": {"target": target}, "first_stage_config": {"target": target}}
        write(config, {"model": inner})
        refused("ar", *rest)


def test_a_saved_model_whose_config_lies(work: Path, canary: Path, models: Path) -> None:
    shutil.copytree(models, work / "models")
    path = work / "models" / "ar" / "transformer" / "config.json"
    right = json.loads(path.read_text())

    model = work / "models" / "ar"
    for config in (
        {"transformer": {"kind": "llama", "num_layers": 10**9, "num_heads": 2, "width": 16}},
        {"transformer": {"kind": "llama", "num_layers": 1, "num_heads": 2, "width": 2**40}},
        {"transformer": {"kind": "os.system", "command": f"touch {canary}"}},
        {"condition": {"kind": "class", "num_classes": 10**15}},
        {"condition": {"kind": "../../../../etc/passwd"}},
        {"condition": {"kind": "class", "class_names": ["x" * 10**6, "\x1b]0;owned\x07"]}},
        {"grid": [10**6, 10**6]},
        {"vocabulary_size": 10**12},
        {"tokenizer_hash": "../../tokenizer"},
        {"auto_map": {"AutoModel": "evil.Model"}},
    ):
        write(path, {**right, "config": {**right["config"], **config}})
        assert len(sampled(model, work)) < 5000
    for description in ({"kind": "x" * 10**6}, {"format": DEEP}, {"config": []}, {"config": {}}):
        write(path, {**right, **description})
        assert len(sampled(model, work)) < 5000
    write(path, DEEP)
    assert "cannot be read" in sampled(model, work)
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    assert "more than" in sampled(model, work)
    path.unlink()
    os.mkfifo(path)
    assert "config.json" in sampled(model, work)
    path.unlink()
    write(path, right)
    weights = path.with_name("model.safetensors")
    for data in (
        safetensors_header(b"{}", 2**63),
        safetensors_header(b"{}", 99_000_000),
        safetensors_header(DEEP.encode()),
        tensor_header([2**40, 1024], [0, 8]) + b"12345678",
        tensor_header([1], [-4, 4]) + b"1234",
        b"",
    ):
        write(weights, data)
        assert "cannot be read" in sampled(model, work)


def test_a_text_encoder_with_code(work: Path, canary: Path, models: Path) -> None:
    """As transformers would load it, if it were told to trust strangers."""
    folder = work / "encoder"
    code = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    write(folder / "config.json", {"model_type": "evil", "auto_map": code})
    write(folder / "evil.py", f"open({str(canary)!r}, 'w')")
    write(folder / "pytorch_model.bin", pickles(canary)["zip"])
    encoder = {"kind": "transformers", "name": str(folder), "max_length": 8}
    values = ar_values(tokenizer=str(models / "vq"), condition={"kind": "text", "encoder": encoder})
    output = ("-o", f"training.output={work / 'run'}")
    config = write(work / "c.yaml", values)
    assert "cannot be opened" in refused("ar", "train", config, *output)
    known = {"model_type": "t5", "d_model": 8, "num_layers": 1, "vocab_size": 9, "auto_map": code}
    write(folder / "config.json", known)
    assert "cannot be opened" in refused("ar", "train", config, *output)


# --- shards ------------------------------------------------------------------------------------------------


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **facts: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def hostile_members(canary: Path) -> dict[str, Callable[[tarfile.TarFile], None]]:
    up = "../" * 12
    return {
        "dots": lambda tar: add(tar, f"{up}{str(canary)[1:]}.png", b"x"),
        "inner dots": lambda tar: add(tar, f"a/{up}{str(canary)[1:]}.png", b"x"),
        "absolute": lambda tar: add(tar, f"{canary}.png", b"x"),
        "symbolic link": lambda tar: add(tar, "a.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "hard link": lambda tar: add(tar, "a.png", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        "device": lambda tar: add(tar, "a.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        "pipe": lambda tar: add(tar, "a.png", type=tarfile.FIFOTYPE),
        "control characters": lambda tar: add(tar, "\x1b]0;owned\x07.png", b"x"),
        "long name": lambda tar: add(tar, "n" * 200_000 + ".png", b"x"),
        "negative": lambda tar: add(tar, "a.json", DEEP.encode()),
        "huge label": lambda tar: add(tar, "a.cls", b"9" * 10_000),
    }


@pytest.mark.parametrize("name", list(hostile_members(Path())))
def test_members_of_tars(work: Path, canary: Path, models: Path, name: str) -> None:
    right = picture(work / "right.png").read_bytes()
    (work / "tars").mkdir()
    with tarfile.open(work / "tars" / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        hostile_members(canary)[name](tar)
        add(tar, "right.png", right)
    before = sorted(work.rglob("*"))
    checked = taming("data", "check", work / "tars")
    assert checked.returncode == 1, checked.stderr
    assert "Traceback" not in checked.stderr
    assert all(line.isprintable() for line in checked.stdout.splitlines())
    indexed = taming("data", "index", work / "tars")
    assert "Traceback" not in indexed.stderr
    assert indexed.returncode == 2
    assert sorted(work.rglob("*")) == before


def test_pickles_in_shards_are_not_looked_at(work: Path, canary: Path, models: Path) -> None:
    (work / "tars").mkdir()
    with tarfile.open(work / "tars" / "a.tar", "w") as tar:
        for number in range(4):
            add(tar, f"{number}.png", picture(work / f"{number}.png").read_bytes())
            for suffix in ("pkl", "pickle", "pyd", "pth", "npz", "sh"):
                add(tar, f"{number}.{suffix}", pickle.dumps(Payload(canary)))
    assert taming("data", "check", work / "tars").returncode == 0
    assert taming("data", "index", work / "tars").returncode == 0
    assert taming("data", "check", work / "tars").returncode == 0
    dataset = open_dataset(ShardsDataConfig(root=str(work / "tars"), size=16), "train")
    assert set(dataset.sample(0, -1)) == {"image", "key", "crop"}
    out = taming("vq", "reconstruct", models / "vq", work / "tars", "--out", work / "out")
    assert out.returncode == 0, out.stderr


def pack(work: Path) -> Path:
    for number in range(4):
        picture(work / "folder" / f"{number}.png")
    done = taming("data", "pack", work / "folder", "--out", work / "pack")
    assert done.returncode == 0, done.stderr
    return work / "pack"


def test_addresses_that_are_commands(work: Path, canary: Path) -> None:
    for root in (
        f"pipe:touch {canary}",
        f"pipe:touch {canary} |",
        f"file:touch {canary}",
        f"gopen:{canary}",
        f"s3://bucket/$(touch {canary})",
        "ftp://127.0.0.1/x",
        "data:text/plain,x",
        f"ssh://-oProxyCommand=touch%20{canary}/x",
    ):
        for kind in ("shards", "folder"):
            values = vq_values(data={"kind": kind, "root": root, "size": 16})
            config = write(work / "c.yaml", values)
            refused("vq", "train", config, "-o", f"training.output={work / 'run'}")
            refused("data", "check", config)
        refused("data", "check", root)


def test_indices_that_point_elsewhere(work: Path, canary: Path, models: Path) -> None:
    folder = pack(work)
    path = folder / "index.json"
    right = json.loads(path.read_text())
    write(work / "secret.tar", (folder / right["shards"][0]["file"]).read_bytes())

    def tried(*, shard: dict[str, Any] | None = None, **changes: Any) -> None:
        document = json.loads(json.dumps({**right, **changes}))
        document["shards"][0].update(shard or {})
        write(path, document)
        told(folder)

    def told(folder: Path) -> None:
        assert len(refused("vq", "reconstruct", models / "vq", folder, "--out", work / "out")) < 5000
        checked = taming("data", "check", folder)
        assert checked.returncode == 1, (checked.stdout, checked.stderr)
        assert "Traceback" not in checked.stderr

    pipe = f"pipe:touch {canary}"
    for name in ("../secret.tar", str(work / "secret.tar"), "a/../../secret.tar", pipe, "..", ""):
        tried(shard={"file": name})
    tried(shard={"entries": "../secret.tar"})
    tried(shard={"count": 2**62}, count=2**62)
    tried(shard={"entries_size": 2**62})
    tried(fields=["image", "pkl"])
    tried(fields=["image", "label"], class_names=["x" * 10**6, "\x1b]0;owned\x07"])
    tried(url=pipe)
    (folder / right["shards"][0]["file"]).unlink()
    (folder / right["shards"][0]["file"]).symlink_to("/dev/zero")
    tried()
    write(path, '{"format": "taming-shards/1", "x": ' + DEEP)
    told(folder)


def test_keys_that_leave_the_folder(work: Path, canary: Path, models: Path) -> None:
    """The index vouches for them, and results are named by keys."""
    folder = pack(work)
    index = parse_index((folder / "index.json").read_bytes(), "index")
    path = folder / index.shards[0].entries
    right = parse_entries(path.read_bytes(), index.shards[0], index, "entries")
    up = "../" * 12
    for key in (
        f"{up}{str(canary)[1:]}",
        str(canary),
        f"a/{up}canary",
        "..",
        "a//b",
        "a\\b",
        "\x1b]0;owned\x07",
    ):
        keys, ends = joined([key.encode(), *(right.key(row).encode() for row in range(1, len(right)))])
        path.write_bytes(replace(right, keys=keys, key_ends=ends).to_bytes())
        vouch(folder)
        refused("vq", "reconstruct", models / "vq", folder, "--out", work / "out")
        checked = taming("data", "check", folder)
        assert (checked.returncode, "Traceback" in checked.stderr) == (1, False), key
        assert all(line.isprintable() for line in checked.stdout.splitlines())
    assert not (work / "out").exists()


# --- pictures ----------------------------------------------------------------------------------------------


def hostile_pictures(canary: Path) -> dict[str, bytes]:
    objects = io.BytesIO()
    np.save(objects, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    several = io.BytesIO()
    np.savez(several, x=np.array([Payload(canary)], dtype=object))
    post_script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({canary}) (w) file closefile showpage\n"
    return {
        "print.png": post_script.encode(),
        "paper.png": b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch/F(/bin/sh)>>>>endobj\n",
        "drawing.png": f"<svg xmlns='x'><image href='file://{canary}'/><script>1</script></svg>".encode(),
        "script.jpg": f"push graphic-context\nimage over 0,0 0,0 '|touch {canary}'\n".encode(),
        "fetch.jpg": f'url(https://127.0.0.1/"|touch {canary}")'.encode(),
        "pickle.png": pickle.dumps(Payload(canary)),
        "objects.npy": objects.getvalue(),
        "several.npy": several.getvalue(),
        "pickle.npy": pickle.dumps(Payload(canary)),
    }


@pytest.mark.parametrize("name", list(hostile_pictures(Path())))
def test_pictures_that_are_programs(work: Path, canary: Path, models: Path, name: str) -> None:
    path = write(work / "data" / name, hostile_pictures(canary)[name])
    config = write(work / "c.yaml", vq_values(data={"kind": "folder", "root": str(path.parent), "size": 16}))
    refused("vq", "train", config, "-o", f"training.output={work / 'run'}")
    refused("vq", "reconstruct", models / "vq", path.parent, "--out", work / "out")
    refused("ar", "sample", models / "ar", "--class", 1, "--complete", path, "--out", work / "out")
    checked: Done = taming("data", "check", path.parent)
    assert checked.returncode == 1
    assert checked.stdout.startswith("unreadable: ")


def test_layouts_and_boxes_that_are_bombs(work: Path, canary: Path, models: Path) -> None:
    picture(work / "data" / "a.png")
    for content in (
        DEEP,
        '{"a":' * 100_000,
        '{"objects": ' + DEEP,
        '{"images": [], "categories": 9' + "9" * 9999,
    ):
        path = write(work / "data" / "boxes.json", content)
        refused("ar", "sample", models / "ar", "--objects", path, "--out", work / "out")
        values = vq_values(
            data={"kind": "folder", "root": str(work / "data"), "objects": "boxes.json", "size": 16}
        )
        refused("vq", "train", write(work / "c.yaml", values), "-o", f"training.output={work / 'run'}")
        assert taming("data", "check", work / "c.yaml").returncode == 1
