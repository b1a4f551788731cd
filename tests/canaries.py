"""Looks for secrets that were planted on purpose, in files of any kind and in what they hold compressed or encoded."""

import base64
import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import wandb_file


def forms(canary: str) -> dict[str, bytes]:
    """How the same secret may be written: in each of the three phases of base64 the part that no neighbour changes."""
    raw = canary.encode()
    found = {"plain": raw, "hex": raw.hex().encode(), "UTF-16": canary.encode("utf-16-le")}
    for phase in range(3):
        whole = base64.b64encode(b"\0" * phase + raw)
        found[f"base64, phase {phase}"] = whole[-(-phase * 8 // 6) : (phase + len(raw)) * 8 // 6]
    return found


def layers(data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """The bytes themselves, then what is packed in them, and in that."""
    yield name, data
    try:
        inner = list(_unpacked(data, name))
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, pa.ArrowException):  # it only began like one
        return
    for what, part in inner:
        yield from layers(part, what)


def _unpacked(data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    if data[:2] == b"\x1f\x8b":
        yield f"{name} (gzip)", gzip.decompress(data)
    elif data[:4] == b"\x28\xb5\x2f\xfd":
        yield f"{name} (zstd)", pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
    elif data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as pack:
            yield from ((f"{name}: {member}", pack.read(member)) for member in pack.namelist())
    elif data[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(data)) as pack:
            yield from ((f"{name}: {m.name}", pack.extractfile(m).read()) for m in pack.getmembers() if m.isfile())
    elif data[:4] == b"PAR1":
        table = pyarrow.parquet.read_table(pa.BufferReader(data))
        yield f"{name} (metadata)", repr(table.schema.metadata).encode()
        for column in table.column_names:
            yield f"{name} (column {column})", repr(table[column].to_pylist()).encode()
    elif data[:4] == b":W&B":  # its records are cut at the ends of blocks
        for record in wandb_file.records_of(data):
            yield f"{name} (record {record.num})", record.SerializeToString()


def hits(canaries: dict[str, str], texts: Iterable[tuple[str, bytes]]) -> list[str]:
    """`secret in place (form)` for each canary in texts given as (place, bytes)."""
    wanted = {(name, form): raw for name, canary in canaries.items() for form, raw in forms(canary).items()}
    found = []
    for place, data in texts:
        for where, layer in layers(data, place):
            found += [f"{name} in {where} ({form})" for (name, form), raw in wanted.items() if raw in layer]
    return found


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every regular file below, hidden ones too; links lead to others that are there, or out."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()
