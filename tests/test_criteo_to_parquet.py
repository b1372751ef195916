# SPDX-License-Identifier: BSD-3-Clause
"""A Criteo TSV to Parquet: every cell, every bad line, and nothing half-written."""

import gzip
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from torchrec_scratchpipe import __main__ as command
from torchrec_scratchpipe.data import criteo
from torchrec_scratchpipe.data.criteo import criteo_to_parquet
from torchrec_scratchpipe.errors import DataError

Row = list[int | None]


def random_rows(num_rows: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    extremes = [0, -1, -(1 << 63), (1 << 63) - 1, 10**18, 10**18 - 1, -(10**17)]

    def integer() -> int | None:
        return rng.choice([None, rng.choice(extremes), rng.randint(-3, 70_000)])

    def value() -> int | None:
        return rng.choice([None, 0, (1 << 32) - 1, rng.getrandbits(32), rng.getrandbits(9)])

    return [
        [rng.randint(0, 1), *(integer() for _ in range(13)), *(value() for _ in range(26))] for _ in range(num_rows)
    ]


def line_of(row: Row, hexadecimal: str = "x") -> str:
    cells = [
        f"{cell:{'d' if index < 14 else hexadecimal}}" if cell is not None else "" for index, cell in enumerate(row)
    ]
    return "\t".join(cells)


def rows_of(path: Path) -> list[Row]:
    return [list(row) for row in zip(*(column.to_pylist() for column in parquet.read_table(path).columns), strict=True)]


@pytest.fixture(params=[1 << 12, 8 << 20], ids=["many blocks", "one block"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("kind", ["plain", "gzip", "header", "windows", "no end", "upper case", "padded"])
def test_every_cell_is_what_python_reads(tmp_path: Path, kind: str) -> None:
    rows = random_rows(200)
    end = "\r\n" if kind == "windows" else "\n"
    form = {"upper case": "X", "padded": "08x"}.get(kind, "x")
    lines = [line_of(row, form) for row in rows]
    if kind == "header":
        lines = ["\t".join(["label", *criteo.DENSE_NAMES, *criteo.SPARSE_NAMES]), *lines]
    content = (end.join(lines) + ("" if kind == "no end" else end)).encode()
    source, target = tmp_path / "train.txt", tmp_path / "train.parquet"
    source.write_bytes(gzip.compress(content) if kind == "gzip" else content)
    assert criteo_to_parquet(source, target, rows_per_group=64) == len(rows)
    assert rows == rows_of(target)
    metadata = parquet.read_metadata(target)
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [64, 64, 64, 8]
    kinds = [pyarrow.int32(), *[pyarrow.int64()] * 13, *[pyarrow.uint32()] * 26]
    assert parquet.read_schema(target).types == kinds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.parquet", "train.txt"]


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        (0, "2", r", column 1: the label is '2', needs to be 0 or 1\."),
        (0, "", r", column 1: the label is '', needs to be 0 or 1\."),
        (0, "10", ", column 1: the label is '10'"),
        (1, "1x", r", column 2: '1x' is not an integer of 64 bits\."),
        (13, "-", ", column 14: '-' is not an integer"),
        (5, "1-", ", column 6: '1-' is not an integer"),
        (5, "9223372036854775808", ", column 6: '9223372036854775808' is not an integer of 64 bits"),
        (5, "9" * 90, ", column 6: '9{40}...' is not an integer of 64 bits"),
        (14, "123456789", r", column 15: '123456789' is not at most 8 hexadecimal digits\."),
        (39, "0g", ", column 40: '0g' is not at most 8 hexadecimal digits"),
        (39, " 1", ", column 40: ' 1' is not at most"),
        (20, None, r": 39 columns, expected 40 \(label, 13 integers, 26 hexadecimal values\) separated by tabs\."),
        (20, "1\t2", ": 41 columns, expected 40"),
    ],
)
def test_a_bad_line_is_named_and_leaves_nothing_behind(
    tmp_path: Path, column: int, cell: str | None, message: str
) -> None:
    lines = [line_of(row).split("\t") for row in random_rows(90)]
    lines[77][column : column + 1] = [] if cell is None else [cell]
    source = tmp_path / "train.txt"
    source.write_text("".join("\t".join(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=f"train.txt, line 78{message}"):
        criteo_to_parquet(source, tmp_path / "train.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]


def test_line_numbers_count_the_line_of_names(tmp_path: Path) -> None:
    source = tmp_path / "train.txt"
    names = "\t".join(["label", *criteo.DENSE_NAMES, *criteo.SPARSE_NAMES])
    source.write_text(f"{names}\n{line_of(random_rows(1)[0])}\n\n")
    with pytest.raises(DataError, match="line 3: 1 columns, expected 40"):
        criteo_to_parquet(source, tmp_path / "train.parquet")


def test_sources_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo, "BLOCK_BYTES", 1000)
    row = line_of(random_rows(1)[0])
    names = "\t".join(["label", *criteo.DENSE_NAMES, *criteo.SPARSE_NAMES])
    for content, message in {
        b"": "no sample in it",
        f"{names}\n".encode(): "no sample in it",
        gzip.compress(row.encode())[:-9]: "cannot be decompressed",
        b"x" * 9000: "a line of more than 1,000 bytes",
    }.items():
        source = tmp_path / "train.txt"
        source.write_bytes(content)
        with pytest.raises(DataError, match=f"train.txt: {message}"):
            criteo_to_parquet(source, tmp_path / "train.parquet")
        assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]
    with pytest.raises(DataError, match="no such file"):
        criteo_to_parquet(tmp_path / "other.txt", tmp_path / "train.parquet")
    with pytest.raises(DataError, match="it is the source, too"):
        criteo_to_parquet(source, source)


def test_an_older_target_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    source, target = tmp_path / "train.txt", tmp_path / "train.parquet"
    source.write_text(f"{line_of(random_rows(1)[0])}\n")
    criteo_to_parquet(source, target)
    before = target.read_bytes()
    source.write_text("bad\n")
    with pytest.raises(DataError):
        criteo_to_parquet(source, target)
    assert target.read_bytes() == before


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["torchrec-scratchpipe", "data", *map(str, arguments)])
    try:
        return command.main()
    except SystemExit as end:
        return int(str(end.code))


def test_the_command_and_its_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "train.txt", tmp_path / "train.parquet"
    source.write_text("".join(f"{line_of(row)}\n" for row in random_rows(30)))
    assert run(monkeypatch, "criteo_to_parquet", source, target, "--rows_per_group", 20) == 0
    assert f"{target}: 30 samples\n" == capsys.readouterr().out
    assert parquet.read_metadata(target).num_row_groups == 2
    assert run(monkeypatch, "criteo_to_parquet", tmp_path / "no.txt", target) == 1
    assert "no.txt: no such file" in capsys.readouterr().err
    assert run(monkeypatch, "criteo_to_parquet", source, tmp_path / "no" / "train.parquet") == 1
    assert run(monkeypatch, "criteo_to_parquet", source, target, "--rows_per_group", 0) == 2
    assert run(monkeypatch, "avazu_to_parquet", source, target) == 2


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo, "BLOCK_BYTES", 1 << 16)
    peaks = []
    table = criteo._table
    before = pyarrow.total_allocated_bytes()

    def noted(lines: bytes) -> Any:
        peaks[-1] = max(peaks[-1], pyarrow.total_allocated_bytes() - before)
        return table(lines)

    monkeypatch.setattr(criteo, "_table", noted)
    content = "".join(f"{line_of(row)}\n" for row in random_rows(500))
    source = tmp_path / "train.txt"
    for num_copies in (10, 40):
        source.write_text(content * num_copies)
        peaks.append(0)
        criteo_to_parquet(source, tmp_path / "train.parquet", rows_per_group=1000)
    assert peaks[1] < 1.5 * peaks[0]
