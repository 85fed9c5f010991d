"""Files that are almost what they should be: good ones with something wrong, by a seed."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from phalanx.data.chunks import encode_csr, encode_dense

TOKENS = (
    *(
        b"",
        b"\0",
        b"\n",
        b"\r\n",
        b",",
        b";",
        b"\t",
        b'"',
        b"'",
        b"#",
        b":",
        b"{",
        b"}",
        b"[",
        b"]",
    ),
    *(b"nan", b"inf", b"-inf", b"1e999", b"-1", b"9" * 400, b"18446744073709551616", b"0x10"),
    *(b"\xff\xfe", b"\xc3", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"&a", b"*a", b"!!python/object:x"),
    *(b"<<: *a", b"- ", b"  ", b"|", b"---", b"%YAML 9", b"null", b"~", b"true", b"\x1b[31m"),
    *(b"x" * 3000, b"[" * 2000, b"- " * 500, b"../../etc/passwd"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, float("nan"), float("inf")),
    *("", "a", "\0", "../../x", "x" * 2000, "F32", "\ud800", [], [[]], {}, [0, 2**62], [-1, 4]),
    *({"a": None}, [None] * 50, [2**32, 2**32]),
)


def damaged(chance: Random, content: bytes) -> bytes:
    """Return the content with one to four things wrong in it."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        _harm(chance, data)
    return bytes(data)


def _harm(chance: Random, data: bytearray) -> None:
    at = chance.randrange(len(data) + 1)
    length = min(chance.choice((1, 1, 2, 8, 40)), len(data) - at)
    kind = chance.randrange(7)
    if kind == 0 and length:
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[at : at + length]
    elif kind == 2:
        data[at:at] = chance.choice(TOKENS)
    elif kind == 3:
        data[at : at + length] = chance.choice(TOKENS)
    elif kind == 4:
        data[at:at] = data[at : at + length] * chance.choice((1, 2, 30))
    elif kind == 5:
        del data[at:]
    elif length:
        data[at : at + length] = bytes(chance.choices((0, 1, 0x7F, 0x80, 0xFF), k=length))


def changed_json(chance: Random, content: bytes) -> bytes:
    """Return JSON with another value somewhere, or damaged JSON."""
    if chance.random() < 0.2:
        return damaged(chance, content)
    document = json.loads(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        document = _changed(chance, document)
    return json.dumps(document).encode()


def _changed(chance: Random, value: Any) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice([*value])
        changed = dict(value)
        if chance.random() < 0.15:
            del changed[key]
        elif chance.random() < 0.1:
            changed["odd"] = chance.choice(VALUES)
        else:
            changed[key] = _changed(chance, value[key])
        return changed
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], _changed(chance, value[at]), *value[at + 1 :]]
    return chance.choice(VALUES)


def changed_tensors(chance: Random, content: bytes) -> bytes:
    """Return a safetensors file with another header, or a damaged one."""
    if chance.random() < 0.3:
        return damaged(chance, content)
    length = int.from_bytes(content[:8], "little")
    header = changed_json(chance, content[8 : 8 + length])
    size = len(header) if chance.random() < 0.9 else chance.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    return size.to_bytes(8, "little") + header + content[8 + length :]


def changed_archive(chance: Random, content: bytes) -> bytes:
    """Return a ZIP archive of which one file is damaged or called otherwise, or a damaged one."""
    if chance.random() < 0.4:
        return damaged(chance, content)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        odd = chance.choice(names)
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
            for name in names:
                data = archive.read(name)
                called = name
                if name == odd:
                    data = damaged(chance, data[:200]) + data[200:]
                    odd_names = ("../" + name, name + "\0x", "a/" * 90)
                    called = chance.choice((name, name, name, *odd_names))
                target.writestr(called, data)
    return made.getvalue()


Change = Callable[[Random, bytes], bytes]


def good_files() -> Iterator[tuple[str, bytes, Change]]:
    """The name of a file of data of each format, what is in it, and how it is changed."""
    features = np.arange(24, dtype=np.float32).reshape(8, 3)
    targets = np.arange(8) % 2
    rows = "\n".join(f"{x},{'red' if x % 2 else 'blue'},{x},{x % 2}" for x in range(9))
    yield "a.csv", f"x,colour,y,label\n{rows}\n".encode(), damaged
    yield "quoted.csv", b'"a ""b""",c\n"1,5",2\n"x\ny",3\nz,4\n', damaged
    yield "a.tsv", b"1\t2\t0\n3\t4\t1\n5\t6\t0\n", damaged
    yield "a.libsvm", b"1 1:0.5 3:2 # note\n-1 2:1e3\n1 1:1 2:2 3:3\n", damaged
    arrays = io.BytesIO()
    np.savez(arrays, X=features, y=targets)
    yield "a.npz", arrays.getvalue(), changed_archive
    yield "a.safetensors", encode_dense(features, targets), changed_tensors
    parquet = io.BytesIO()
    words = pa.array(["a", "b"] * 4)
    pq.write_table(pa.table({"x": features[:, 0], "w": words, "y": targets}), parquet)
    yield "a.parquet", parquet.getvalue(), damaged
    images = bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 2]) + bytes(range(16))
    yield "a-images-idx3-ubyte", images, damaged


def good_chunks() -> Iterator[bytes]:
    """A chunk of each kind."""
    features = np.arange(24, dtype=np.float32).reshape(8, 3)
    targets = np.arange(8)
    yield encode_dense(features, targets)
    values, columns = np.ones(4, np.float32), np.array([0, 2, 1, 2], np.int32)
    yield encode_csr(values, columns, np.array([0, 2, 2, 4]), targets[:3])


def beside(path: Path) -> None:
    """Write the labels that belong to a file of images."""
    if path.name.startswith("a-images"):
        labels = bytes([0, 0, 8, 1, 0, 0, 0, 4, 0, 1, 0, 1])
        path.with_name("a-labels-idx1-ubyte").write_bytes(labels)


WHEEL = b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def good_wheel() -> bytes:
    """A wheel that may travel with a job."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("nets/__init__.py", "x = 1\n")
        archive.writestr("nets-1.dist-info/WHEEL", WHEEL)
        archive.writestr("nets-1.dist-info/METADATA", "Name: nets\nVersion: 1\n")
    return made.getvalue()


JOB = b"""# a job
name: fuzz
namespace: default
data: {name: blobs, shards: 4}
train:
  model: {mlp: {hidden: &a [128, 64], activation: relu}}
  optimizer: {adam: {learning_rate: 0.003}}
  synchronous: {}
  batch_size: 2048
  stop: {epochs: 20, thresholds: [{metric: test/accuracy, at_least: 0.86}]}
  checkpoints: {every_steps: 20}
code:
  files:
    net.py: |
      x = 1
"""
