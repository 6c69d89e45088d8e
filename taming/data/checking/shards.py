"""Everything that is wrong with shards, with or without an index, in one pass.

The index and its entries say where files lie; the headers of a tar say it too. Both are read and compared, so
that damage to one does not hide what the other still knows.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from taming.data.checking.findings import Finding, Findings, Progress, duplicates, in_threads
from taming.data.checking.samples import Sample, SampleCheck
from taming.data.config import PicturesConfig, ShardsDataConfig
from taming.data.shards.index import INDEX, Entries, Kind, ShardFacts, ShardIndex, parse_entries
from taming.data.shards.store import LocalStore, OpenFiles, Store, open_store
from taming.data.shards.tar import Member, key_of_member, kind_of, read_members

TAR = ".tar"


def check_shards(
    config: ShardsDataConfig,
    *,
    workers: int | None = None,
    decode: bool = True,
    progress: Progress | None = None,
) -> Iterator[Finding]:
    """All findings: of the index, shard by shard and sample by sample, then equal keys and pictures.

    With `decode` every file is decoded in full; without, sizes and hashes of shards, their headers and what
    the index says of them are compared. Raises DataError for an address that gives no index.
    """
    store, findings = open_store(config), Findings()
    if not isinstance(store, LocalStore):
        index = store.index()
        yield from _check(_named(store, index), config, index, workers, decode, progress, local=False)
        return
    folder = store.folder
    with findings.catch(folder / INDEX, "unreadable"):
        index = store.index()
        named = {shard.file for shard in index.shards}
        for path in sorted(folder.glob(f"*{TAR}")):
            if path.name not in named:
                detail = f"{path} lies beside an index that does not name it; remove it or index it"
                findings.add(path, "mismatched", detail)
        yield from findings.found
        yield from _check(_named(store, index), config, index, workers, decode, progress)
        return
    yield from findings.found
    yield from check_tars(sorted(folder.glob(f"*{TAR}")), config, workers=workers, decode=decode)


def check_tars(
    paths: Sequence[Path],
    config: PicturesConfig,
    *,
    workers: int | None = None,
    decode: bool = True,
    progress: Progress | None = None,
) -> Iterator[Finding]:
    """All findings of tars that have no index: what their headers and files say by themselves."""
    shards = [_Shard(str(path), partial(_same, path)) for path in paths]
    yield from _check(shards, config, None, workers, decode, progress)


@dataclass(frozen=True)
class _Shard:
    name: str
    path: Callable[[], Path]
    """Gets it here. Raises DataError."""
    facts: ShardFacts | None = None
    entries: Callable[[], bytes] | None = None


@dataclass
class _Looked:
    """What a shard holds, as far as it can be told."""

    findings: Findings = field(default_factory=Findings)
    samples: list[Sample] = field(default_factory=list)


def _same(path: Path) -> Path:
    return path


def _named(store: Store, index: ShardIndex) -> list[_Shard]:
    return [
        _Shard(f"{store.name}/{facts.file}", partial(store.path, facts), facts, partial(store.entries, facts))
        for facts in index.shards
    ]


def _check(
    shards: Sequence[_Shard],
    config: PicturesConfig,
    index: ShardIndex | None,
    workers: int | None,
    decode: bool,
    progress: Progress | None,
    *,
    local: bool = True,
) -> Iterator[Finding]:
    files, done, expected = OpenFiles(), 0, 0 if index is None else index.count
    keys: defaultdict[str, list[str]] = defaultdict(list)
    pictures: defaultdict[tuple[int, bytes], list[str]] = defaultdict(list)
    look = partial(_look, index=index, decode=decode)
    # Those from elsewhere come one by one, for a cache may hold few of them.
    lookers = workers if local else 1
    for shard, looked in zip(shards, in_threads(look, shards, lookers), strict=True):
        yield from looked.findings.found
        for sample in looked.samples:
            keys[sample.key].append(f"{shard.name}:{sample.key}")
        if decode:
            check = SampleCheck(config, index, files, shard.path, shard.name)
            results = in_threads(check, looked.samples, workers)
            for sample, result in zip(looked.samples, results, strict=True):
                yield from result.found
                if result.picture is not None:
                    pictures[result.picture].append(f"{shard.name}:{sample.key}")
                done += 1
                if progress is not None:
                    progress(done, max(done, expected))
        elif progress is not None:
            done += len(looked.samples)
            progress(done, max(done, expected))
    twice = Findings()
    for key, places in keys.items():
        if len(places) > 1:
            detail = f"the key {key!r} is there {len(places)} times: {places[0]}, {places[1]}; rename one"
            twice.add(places[0], "duplicate", detail, places[1:])
    yield from twice.found
    yield from duplicates(pictures.values())


def _look(shard: _Shard, index: ShardIndex | None, decode: bool) -> _Looked:
    """Size, hash, headers and entries of one shard, and what of it can be read."""
    looked = _Looked()
    findings, facts = looked.findings, shard.facts
    entries: Entries | None = None
    if facts is not None and index is not None and shard.entries is not None:
        place = shard.name.removesuffix(facts.file) + facts.entries
        with findings.catch(place, "unreadable"):
            data = shard.entries()
            if hashlib.sha256(data).hexdigest() != facts.entries_sha256:
                findings.add(place, "checksum", f"{place} holds other bytes than {INDEX} says; get it again")
            entries = parse_entries(data, facts, index, place)
    path = None
    with findings.catch(shard.name, "unreadable"):
        path = shard.path()
    if path is None or not path.is_file():
        if path is not None:
            findings.add(shard.name, "missing", f"shard {shard.name} is not there; get it")
        return looked
    as_indexed = facts is not None and _check_bytes(shard.name, path, facts, findings)
    members = _members(shard.name, path, findings)
    told = _samples_of_members(shard.name, members.found, findings if entries is None else Findings())
    if entries is None:
        looked.samples = told
        return looked
    looked.samples = samples_of_entries(entries)
    if members.whole:
        _compare(shard.name, looked.samples, told, findings, as_indexed)
    return looked


def _check_bytes(name: str, path: Path, facts: ShardFacts, findings: Findings) -> bool:
    """Whether the shard has the bytes that were indexed."""
    size = path.stat().st_size
    if size != facts.size:
        detail = f"shard {name} has {size} bytes, and {INDEX} says {facts.size}; get it again"
        findings.add(name, "truncated" if size < facts.size else "mismatched", detail)
        return False
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == facts.sha256:
            return True
    detail = f"shard {name} holds other bytes than {INDEX} says (sha256); get it again"
    findings.add(name, "checksum", detail)
    return False


@dataclass(frozen=True)
class _Members:
    found: list[Member]
    whole: bool
    """Whether the headers could be followed to the end."""


def _members(name: str, path: Path, findings: Findings) -> _Members:
    found: list[Member] = []
    with findings.catch(name), path.open("rb") as file:
        for member in read_members(file, name):
            found.append(member)
        return _Members(found, True)
    return _Members(found, False)


def samples_of_entries(entries: Entries) -> list[Sample]:
    """What the index says that a shard holds."""
    samples = []
    for row in range(len(entries)):
        sample = Sample(entries.key(row))
        for kind, places in entries.places.items():
            offset, size, crc32 = (int(column[row]) for column in (places.offset, places.size, places.crc32))
            sample.files[kind] = (offset, size)
            sample.crc32[kind] = crc32
            sample.suffixes[kind] = entries.suffixes[places.suffix[row]]
        height, width = entries.sizes[row].tolist()
        sample.size = height, width
        sample.label = None if entries.labels is None else int(entries.labels[row])
        sample.caption = None if entries.caption_ends is None else entries.caption(row)
        samples.append(sample)
    return samples


def _samples_of_members(name: str, members: Sequence[Member], findings: Findings) -> list[Sample]:
    """What the headers say that a shard holds: files of one key follow each other, each kind once."""
    samples: list[Sample] = []
    ended: set[str] = set()
    for member in members:
        split = key_of_member(member.name)
        kind = None if split is None else kind_of(split[1])
        if split is None or kind is None:
            continue  # of no use to this toolkit: it is not read
        key, extension = split
        if not samples or samples[-1].key != key:
            ended.update(sample.key for sample in samples[-1:])
            if key in ended:
                detail = f"shard {name} holds files of {key!r} in two places, as if of two samples; mend it"
                findings.add(f"{name}:{member.name}", "duplicate", detail)
            samples.append(Sample(key))
        sample = samples[-1]
        if kind in sample.files:
            detail = f"shard {name} holds {member.name!r} twice, or two files of that kind; remove one"
            findings.add(f"{name}:{member.name}", "duplicate", detail)
            continue
        sample.files[kind] = (member.offset, member.size)
        sample.suffixes[kind] = f".{extension.rpartition('.')[2]}"
    usual: set[Kind] = {"image"}
    usual.update(*(sample.files for sample in samples[:1]))
    for sample in samples:
        for kind in sorted(usual - set(sample.files)):
            detail = f"shard {name}: the sample {sample.key!r} has no {kind}, as others have; get it again"
            findings.add(f"{name}:{sample.key}", "missing", detail)
    return samples


def _compare(
    name: str, indexed: Sequence[Sample], told: Sequence[Sample], findings: Findings, as_indexed: bool
) -> None:
    """What the index says against what the headers say.

    An index may leave samples out of the bytes that it was made of (`as_indexed`), but not of others.
    """
    by_key: dict[str, Sample] = {}
    for sample in told:
        if by_key.setdefault(sample.key, sample) is not sample:
            detail = f"shard {name} holds {sample.key!r} twice, and the index once; index it again"
            findings.add(f"{name}:{sample.key}", "duplicate", detail)
    keys = Counter(sample.key for sample in indexed)
    for sample in indexed:
        there = by_key.get(sample.key)
        if there is None:
            detail = f"shard {name} does not hold the sample {sample.key!r} of the index; get it again"
            findings.add(f"{name}:{sample.key}", "missing", detail)
            continue
        wanted: set[Kind] = set(sample.files) | ({"label"} if sample.label is not None else set())
        for kind in sorted(wanted - set(there.files)):
            detail = f"shard {name}: the sample {sample.key!r} lacks its {kind}; get it again"
            findings.add(f"{name}:{sample.key}", "missing", detail)
        wrong = [kind for kind, place in sample.files.items() if there.files.get(kind, place) != place]
        if wrong:
            detail = (
                f"shard {name}: the {wrong[0]} of {sample.key!r} lies at bytes {there.files[wrong[0]][0]} and"
                f" not where the index says ({sample.files[wrong[0]][0]}); index the tars again"
            )
            findings.add(f"{name}:{sample.key}", "mismatched", detail)
        if sample.label is not None and "label" in there.files:
            sample.files["label"] = there.files["label"]
    unknown = [sample.key for sample in told if not keys[sample.key]]
    if unknown and not as_indexed:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        detail = f"shard {name} holds {unknown[0]!r}{more}, of which the index knows nothing; index it again"
        findings.add(name, "mismatched", detail)
    order = [key for key in by_key if keys[key]]
    if order != [sample.key for sample in indexed if sample.key in by_key]:
        detail = f"shard {name} holds its samples in another order than the index; index it again"
        findings.add(name, "mismatched", detail)
