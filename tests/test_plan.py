# SPDX-License-Identifier: BSD-3-Clause
"""The command line: what would I need?"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagConfig

from torchrec_scratchpipe.errors import MeasurementError
from torchrec_scratchpipe.plan import main
from torchrec_scratchpipe.trace import read_trace

TABLES = [
    {"name": "big", "num_embeddings": 50_000, "embedding_dim": 16, "feature_names": ["clicked", "bought"]},
    {"name": "small", "num_embeddings": 20, "embedding_dim": 16},
]
CONFIGS = [
    EmbeddingBagConfig(name="big", num_embeddings=50_000, embedding_dim=16, feature_names=["clicked", "bought"]),
    EmbeddingBagConfig(name="small", num_embeddings=20, embedding_dim=16, feature_names=["small"]),
]
NUM_SAMPLES = 5000


@pytest.fixture
def tables(tmp_path: Path) -> str:
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(TABLES))
    return str(path)


@pytest.fixture
def ids() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, NUM_SAMPLES)
    return {
        "clicked": (rng.random(int(lengths.sum())) ** 3 * 50_000).astype(np.int64),
        "clicked_lengths": lengths,
        "bought": rng.integers(0, 50_000, NUM_SAMPLES),
        "small": rng.integers(0, 20, NUM_SAMPLES),
    }


@pytest.fixture
def npz(tmp_path: Path, ids: dict[str, np.ndarray]) -> str:
    np.savez(tmp_path / "trace.npz", **ids)
    return str(tmp_path / "trace.npz")


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def test_from_ids_to_a_plan(tables: str, npz: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, figures = tmp_path / "sets.json", tmp_path / "plan.json"
    measured = ("--tables", tables, "--batch_size", 100, "--scratchpad_gb", 0.002)
    assert run(*measured, "--batches", npz, "--save_working_sets", saved, "--json", figures) == 0
    first = capsys.readouterr().out
    plan = json.loads(figures.read_text())
    assert [table["compute_kernel"] for table in plan["tables"]] == ["fused_uvm_caching", "fused"]
    assert 10**6 < plan["ranks"][0]["device_bytes"] <= 0.002 * 1024**3
    assert run(*measured, "--working_sets", saved) == 0
    assert capsys.readouterr().out.splitlines()[0] == first.splitlines()[0]


def test_without_data_and_for_gpus_that_are_not_there(tables: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--tables", tables, "--zipf", 1.05, "--batch_size", 512, "--world_size", 4, "--hbm_gb", 0.005)
    assert run(*arguments, "--optimizer", "adam") == 0
    assert "4 ranks, batch 512" in capsys.readouterr().out


def test_a_budget_that_is_too_small_says_what_would_do(tables: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tables", tables, "--zipf", 1.05, "--batch_size", 512, "--scratchpad_gb", 0.0001) == 1
    assert "set scratchpad_bytes to at least" in capsys.readouterr().err


def test_formats_give_the_same_batches(npz: str, tmp_path: Path, ids: dict[str, np.ndarray]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read with pyarrow")
    from pyarrow import parquet

    ends = np.cumsum(ids["clicked_lengths"])
    clicked = [part.tolist() for part in np.split(ids["clicked"], ends[:-1])]
    table = pyarrow.table({"bought": ids["bought"], "clicked": clicked, "small": ids["small"].astype(np.int32)})
    parquet.write_table(table, tmp_path / "trace.parquet", row_group_size=700)
    from_npz = list(read_trace([npz], CONFIGS, 128))
    from_parquet = list(read_trace([tmp_path / "trace.parquet"], CONFIGS, 128))
    assert len(from_npz) == len(from_parquet) == NUM_SAMPLES // 128
    for a, b in zip(from_npz, from_parquet, strict=True):
        assert a.keys() == b.keys() == ["clicked", "bought", "small"]
        assert torch.equal(a.values(), b.values())
        assert torch.equal(a.lengths(), b.lengths())
    assert torch.equal(from_npz[0]["bought"].values(), torch.from_numpy(ids["bought"][:128]))


def test_a_column_with_missing_values_has_fewer_ids(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read with pyarrow")
    from pyarrow import parquet

    columns = {"clicked": [[1, 2], None, []], "bought": [3, None, 5], "small": [1, 1, 1]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "trace.parquet")
    (batch,) = read_trace([tmp_path / "trace.parquet"], CONFIGS, 3)
    assert batch.lengths().tolist() == [2, 0, 0, 1, 0, 1, 1, 1, 1]
    assert batch.values().tolist() == [1, 2, 3, 5, 1, 1, 1]


def test_criteo_columns_go_to_features_in_order(tmp_path: Path) -> None:
    line = "\t".join(["0", *["1"] * 13, "ff", "", "15", *["0"] * 23])
    (tmp_path / "train.tsv").write_text(f"{line}\n" * 5)
    batches = list(read_trace([tmp_path / "train.tsv"], CONFIGS, 2))
    assert len(batches) == 2
    assert batches[0].values().tolist() == [255, 255, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.npz", None, "no such file"),
        ("a.csv", b"1", "cannot tell what it is"),
        ("a.npz", b"no zip", "cannot be read"),
        ("a.tsv", b"1\t2\n", "line 1: 2 columns, expected 40"),
    ],
)
def test_bad_traces_are_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MeasurementError, match=message):
        list(read_trace([tmp_path / name], CONFIGS, 1))


def test_bad_arrays_are_refused(tmp_path: Path) -> None:
    good = {"clicked": np.arange(4), "bought": np.arange(4), "small": np.arange(4)}
    for changed, message in (
        ({"clicked": np.arange(4.0)}, "clicked is 1-dimensional float64"),
        ({"clicked_lengths": np.arange(4)}, "clicked_lengths sum up to 6, clicked has 4"),
        ({"small": np.arange(3)}, r"have \[3, 4\] samples"),
        ({"clicked": np.array([{}, {}, {}, {}], dtype=object)}, "cannot be read"),  # needs pickle, which runs code
    ):
        np.savez(tmp_path / "bad.npz", **{**good, **changed})
        with pytest.raises(MeasurementError, match=message):
            list(read_trace([tmp_path / "bad.npz"], CONFIGS, 2))
    np.savez(tmp_path / "bad.npz", clicked=np.arange(4))
    with pytest.raises(MeasurementError, match="no array bought, it has clicked"):
        list(read_trace([tmp_path / "bad.npz"], CONFIGS, 2))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ("{", "not a JSON list of tables"),
        ("[1]", "not a JSON list of tables"),
        ('[{"name": "a", "embedding_dim": 4}]', "'num_embeddings' is missing"),
        ('[{"name": "a", "embedding_dim": 5, "num_embeddings": 1}]', "a multiple of 4"),
        ('[{"name": "a", "embedding_dim": 4, "num_embeddings": 1, "rows": 3}]', "rows is not known here"),
        ("[]", "no embedding table"),
    ],
)
def test_bad_tables_are_refused(tables: str, message: str, npz: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "bad.json"
    path.write_text(tables)
    assert run("--tables", path, "--batches", npz, "--batch_size", 100, "--hbm_gb", 1) == 2
    assert message in capsys.readouterr().err


def test_ids_out_of_range_and_too_few_batches_are_said(
    tables: str, npz: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--tables", tables, "--batches", npz, "--batch_size", 10_000, "--hbm_gb", 1) == 2
    assert "0 batches were given" in capsys.readouterr().err
    np.savez(tmp_path / "bad.npz", clicked=np.array([50_000]), bought=np.array([0]), small=np.array([0]))
    assert run("--tables", tables, "--batches", tmp_path / "bad.npz", "--batch_size", 1, "--hbm_gb", 1) == 2
    assert "table big, feature clicked: id 50000 is not in [0, 50000)" in capsys.readouterr().err


def test_it_runs_as_a_module(tables: str) -> None:
    command = [sys.executable, "-m", "torchrec_scratchpipe.plan", "--tables", tables, "--zipf", "1.05"]
    done = subprocess.run(
        [*command, "--batch_size", "256", "--hbm_gb", "1"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "big" in done.stdout
    assert not done.stderr.strip()
