from __future__ import annotations

import hashlib
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from taming.data.config import FolderDataConfig, ShardsDataConfig
from taming.data.dataset import open_dataset
from taming.data.loader import train_batches
from taming.data.shards import remote
from taming.data.shards.index import parse_index
from taming.data.shards.pack import pack_folder
from taming.data.shards.remote import FileCache, fetch, join_address, shown
from taming.data.source import data_from, is_pack
from taming.errors import DataError
from tests.taming.data.shard_data import assert_equal_samples, of_shards, write_everything


class Server:
    """A folder behind an address, which counts what it is asked for, and fails where a test wants it."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.fail: dict[str, list[Any]] = {}
        """Name of a file -> what its next answers are: a status, bytes, or where to look instead."""
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.partition("?")[0].rpartition("/")[2]
                outer.asked.append(self.path)
                answers = outer.fail.get(name)
                match answers.pop(0) if answers else None:
                    case None:
                        super().do_GET()
                    case int(status):
                        self.send_error(status)
                    case bytes(data):
                        self.send_response(200)
                        self.send_header("Content-Length", str(len(data)))
                        self.end_headers()
                        self.wfile.write(data)
                    case str(place):
                        self.send_response(302)
                        self.send_header("Location", place)
                        self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=partial(self.http.serve_forever, poll_interval=0.01), daemon=True).start()

    def count(self, suffix: str) -> int:
        return sum(path.partition("?")[0].endswith(suffix) for path in self.asked)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> FolderDataConfig:
    config = write_everything(tmp_path_factory.mktemp("data") / "folder")
    pack_folder(config, config.root.parent / "pack", shard_samples=3)
    return config


@pytest.fixture
def server(folder: FolderDataConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 5.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(folder.root.parent / "pack")
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_remote_pack_is_its_folder(folder: FolderDataConfig, server: Server, tmp_path: Path) -> None:
    config = of_shards(folder, server.address + "/?token=secret", cache=tmp_path / "cache")
    data = open_dataset(config, "train")
    assert server.count(".tar") == 0
    assert_equal_samples(open_dataset(folder, "train"), data)
    assert all("?token=secret" in path for path in server.asked)
    open_dataset(config, "validation").sample(0, -1)
    # Each file came once, and the index for each opening.
    assert server.count(".tar") == server.count(".entries.safetensors") == 3
    assert server.count("index.json") == 2
    kept = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert kept == sorted(hashlib.sha256(p.read_bytes()).hexdigest() for p in _files(folder))
    assert is_pack(server.address)
    found = data_from(server.address, size=16)
    assert isinstance(found, ShardsDataConfig)
    assert found.gives == folder.gives


def test_workers_share_a_cache(folder: FolderDataConfig, server: Server, tmp_path: Path) -> None:
    config = of_shards(folder, server.address, cache=tmp_path, validation_fraction=0.0)
    here = open_dataset(of_shards(folder, _pack(folder), validation_fraction=0.0), "train")
    expected = next(train_batches(here, batch_size=8, seed=0))
    batches = train_batches(open_dataset(config, "train"), batch_size=8, seed=0, workers=2)
    assert next(batches)[0]["key"] == expected[0]["key"]
    next(batches)
    assert server.count(".tar") == 3
    # Many at once ask for one file, which comes once.
    shard, cache = _index(folder).shards[0], FileCache(tmp_path / "other", 2**20)
    get = partial(cache.get, join_address(server.address, shard.file), shard.size, shard.sha256)
    with ThreadPoolExecutor(8) as pool:
        assert len({future.result() for future in [pool.submit(get) for _ in range(8)]}) == 1
    assert server.count(".tar") == 4
    assert [path.name for path in (tmp_path / "other").iterdir()] == [shard.sha256]


def test_the_least_recently_used_make_room(folder: FolderDataConfig, server: Server, tmp_path: Path) -> None:
    shards = _index(folder).shards
    cache = FileCache(tmp_path, shards[0].size + shards[1].size + 10)
    paths = [cache.get(join_address(server.address, s.file), s.size, s.sha256) for s in shards[:2]]
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / f"{'0' * 64}.tmp").write_bytes(b"x" * 100)  # of a process that was killed
    cache.get(join_address(server.address, shards[0].file), shards[0].size, shards[0].sha256)
    open_file = paths[1].open("rb")
    third = cache.get(join_address(server.address, shards[2].file), shards[2].size, shards[2].sha256)
    assert sorted(tmp_path.iterdir()) == sorted([paths[0], third, tmp_path / "mine.txt"])
    with open_file:
        assert len(open_file.read()) == shards[1].size
    with pytest.raises(DataError, match=r"data\.cache_size .* is less than the .* of 2 shards"):
        open_dataset(
            of_shards(folder, server.address, cache=tmp_path, cache_size=shards[0].size, shuffle_shards=2),
            "train",
        )


def test_an_evicted_shard_is_fetched_again(folder: FolderDataConfig, server: Server, tmp_path: Path) -> None:
    data = open_dataset(of_shards(folder, server.address, cache=tmp_path), "train")
    for path in tmp_path.iterdir():
        path.unlink()
    assert data.sample(0, -1)["key"]
    assert server.count(".tar") == 1


def test_the_next_block_is_fetched_before_it_is_read(
    folder: FolderDataConfig, server: Server, tmp_path: Path
) -> None:
    config = of_shards(folder, server.address, cache=tmp_path, shuffle_shards=1, validation_fraction=0.0)
    data = pickle.loads(pickle.dumps(open_dataset(config, "train")))
    order = data.order(0, 0)
    data.sample(int(order[0]), 0)
    for _ in range(500):
        if server.count(".tar") == 2 and not list(tmp_path.glob("*.tmp")):
            break
        time.sleep(0.01)
    taken = [path.rpartition("/")[2] for path in server.asked if path.endswith(".tar")]
    firsts = [int(order[0]) // 3, int(next(n for n in order if n // 3 != order[0] // 3)) // 3]
    assert taken == [f"pictures-{number:06d}.tar" for number in firsts]
    for number in order:
        data.sample(int(number), 0)
    assert server.count(".tar") == 3
    # Where there is no room for two blocks at once, one is there at a time.
    small = FileCache(tmp_path / "small", sum(path.stat().st_size for path in _files(folder)) // 2)
    tight = open_dataset(
        of_shards(config, server.address, cache=small.folder, cache_size=small.size), "train"
    )
    for number in tight.order(0, 0):
        assert tight.sample(int(number), 0)["image"].shape == (3, 16, 16)


def test_passing_trouble_passes(folder: FolderDataConfig, server: Server, tmp_path: Path) -> None:
    shard = _index(folder).shards[0]
    whole = (_pack(folder) / shard.file).read_bytes()
    server.fail = {"index.json": [503, 429], shard.file: [500, whole[:-1], b"x" + whole[1:]]}
    data = open_dataset(of_shards(folder, server.address, cache=tmp_path), "train")
    assert data.sample(0, 0)["image"].shape == (3, 16, 16)
    assert server.count(shard.file) == 4


def test_lasting_trouble_is_one_line_with_the_address(
    folder: FolderDataConfig, server: Server, tmp_path: Path
) -> None:
    shard = _index(folder).shards[0]
    whole = (_pack(folder) / shard.file).read_bytes()
    address = join_address(server.address, shard.file)
    lasting: dict[str, tuple[Any, int]] = {
        "404 Not Found": (404, 1),
        "503 Service Unavailable": (503, 4),
        "other bytes than the index says": (b"x" + whole[1:], 4),
        "less than the": (whole[:9], 4),
        "more than the": (whole + b"x", 4),
        "unknown url type: file|file:": ("file:///etc/passwd", 1),
        "ftp": ("ftp://127.0.0.1/x", 1),
    }
    for message, (answer, asked) in lasting.items():
        server.fail, server.asked = {shard.file: [answer] * 9}, []
        with pytest.raises(DataError, match=rf"{address} cannot be fetched \(.*({message})") as error:
            FileCache(tmp_path, 2**20).get(address + "?key=secret", shard.size, shard.sha256)
        assert "secret" not in str(error.value)
        assert "\n" not in str(error.value)
        assert len(server.asked) in (asked, 4)
        assert not list(tmp_path.glob("[0-9a-f]" * 64))
    with pytest.raises(DataError, match="has more than 9 B"):
        fetch(join_address(server.address, "index.json"), limit=9)
    closed = Server(tmp_path)
    closed.http.shutdown()
    closed.http.server_close()
    with pytest.raises(DataError, match=r"cannot be fetched \(.*refused"):
        open_dataset(of_shards(folder, closed.address, cache=tmp_path), "train")


def test_a_cache_that_cannot_be_written_is_told(
    folder: FolderDataConfig, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be kept in .*set data\.cache to another disk"):
        open_dataset(of_shards(folder, server.address, cache=tmp_path / "file"), "train")


def test_addresses() -> None:
    assert join_address("http://a/b/", "x y.tar") == "http://a/b/x%20y.tar"
    assert join_address("https://a?k=1#f", "x.tar") == "https://a/x.tar?k=1"
    assert shown("https://me:word@a:8/b?k=1") == "https://a:8/b"


def _pack(folder: FolderDataConfig) -> Path:
    return folder.root.parent / "pack"


def _index(folder: FolderDataConfig) -> Any:
    return parse_index((_pack(folder) / "index.json").read_bytes(), "index")


def _files(folder: FolderDataConfig) -> list[Path]:
    return [path for path in _pack(folder).iterdir() if path.name != "index.json"]
