# SPDX-License-Identifier: BSD-3-Clause
"""The command line: what would I need?"""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagConfig

from torchrec_scratchpipe.errors import MeasurementError
from torchrec_scratchpipe.planning.command import main
from torchrec_scratchpipe.planning.id_files import read_trace

TABLES = [
    {"name": "big", "num_embeddings": 50_000, "embedding_dim": 16, "feature_names": ["clicked", "bought"]},
    {"name": "small", "num_embeddings": 20, "embedding_dim": 16},
]
CONFIGS = [
    EmbeddingBagConfig(name="big", num_embeddings=50_000, embedding_dim=16, feature_names=["clicked", "bought"]),
    EmbeddingBagConfig(name="small", num_embeddings=20, embedding_dim=16, feature_names=["small"]),
]
NUM_SAMPLES = 5000
NAN, INF = float("nan"), float("inf")


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


def test_tables_in_files(tables: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "plan.json"
    arguments = ("--tables", tables, "--zipf", 1.05, "--batch_size", 512, "--scratchpad_gb", 0.002, "--json", figures)
    found = []
    for ram_budget_gb in (1e-3, 2e-3, 1.0):
        assert run(*arguments, "--ram_budget_gb", ram_budget_gb, "--disk_reads_per_s", 30_000) == 0
        disk = json.loads(figures.read_text())["disk"]
        found.append(disk["rows_read"])
        assert disk["floor_ms"] == pytest.approx(disk["rows_read"] / 30)
        assert f"disk per rank and step: {disk['rows_read']:,.0f} rows read" in capsys.readouterr().out
    assert found[0] > found[1] > found[2]
    assert found[2] < 0.02 * found[0]  # a law without an end: no row is used for the first time
    assert run(*arguments) == 0
    assert json.loads(figures.read_text())["disk"] is None
    assert run(*arguments, "--disk_reads_per_s", 1) == 2
    assert "Give --ram_budget_gb, too." in capsys.readouterr().err


def test_without_data_and_for_gpus_that_are_not_there(tables: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--tables", tables, "--zipf", 1.05, "--batch_size", 512, "--world_size", 4, "--hbm_gb", 0.005)
    assert run(*arguments, "--optimizer", "adam") == 0
    assert "4 ranks, batch 512" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        (("--scratchpad_gb", 0.0001), "--scratchpad_gb"),
        (("--hbm_gb", 0.0001), "--hbm_gb"),
        (("--hbm_gb", 0.001, "--ddr_gb", 0.001), "--ddr_gb"),
        (("--scratchpad_gb", 0.001, "--ddr_gb", 0.001, "--world_size", 2), "--ddr_gb"),
    ],
    ids=str,
)
def test_a_budget_that_is_too_small_says_which_flag_would_do(
    given: tuple[Any, ...], flag: str, tables: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--tables", tables, "--zipf", 1.05, "--batch_size", 512, *given)
    assert run(*common) == 1
    said = capsys.readouterr().err
    for name in ("scratchpad_bytes", "hbm_cap", "ddr_cap", "constrain", "load_factor", "row_wise"):
        assert name not in said
    (enough,) = re.findall(rf"set {flag} to at least (\d+\.\d+) \(\d+\.\d+ [GM]iB\)", said)
    assert run(*common, flag, enough) == 0


def test_memory_is_in_gib_everywhere(tables: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--tables", tables, "--zipf", 1.05, "--batch_size", 512)
    assert run(*common, "--hbm_gb", 0.002, "--json", tmp_path / "plan.json") == 0
    (rank,) = json.loads((tmp_path / "plan.json").read_text())["ranks"]
    report = capsys.readouterr().out
    assert rank["budget_bytes"] == int(0.002 * 1024**3)
    assert f"of a budget of {0.002 * 1024:.3f} MiB" in report
    assert f"{rank['bus_bytes'] / 1024**2:.2f} MiB" in report
    assert run(*common, "--hbm_gb", 0.0001) == 1
    said = capsys.readouterr().err
    assert "the budget is 0.102 MiB" in said
    refused_as_too_large = refused(capsys, *common, "--hbm_gb", 1e300)
    with pytest.raises(SystemExit):
        run("--help")
    spoken = report + said + refused_as_too_large + capsys.readouterr().out
    assert not re.findall(r"\b[GM]B\b|[Gg]igabyte", spoken)
    assert spoken.count("in GiB") >= 3


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


def test_a_trace_stays_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "trace.npz", clicked=[1, 2], bought=[3, 4], small=[5, 6])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    batches = read_trace(["trace.npz"], CONFIGS, 2)
    monkeypatch.chdir("elsewhere")
    assert len(list(batches)) == 1


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
        ('[{"name": "a", "embedding_dim": 4}]', "num_embeddings is missing"),
        ('[{"name": "a", "embedding_dim": 5, "num_embeddings": 1}]', "a multiple of 4"),
        ('[{"name": "a", "embedding_dim": 4, "num_embeddings": 1, "rows": 3}]', "rows is not known"),
        (
            '[{"name": "a", "embedding_dim": 4, "num_embedding": 1}]',
            "num_embeddings is missing and num_embedding is not known. Did you mean num_embeddings for num_embedding?",
        ),
        (
            '[{"name": "a", "embedding_dim": 4, "num_embeddings": 1, "features": []}]',
            "features is not known. Did you mean feature_names for features?",
        ),
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
    assert "5,000 samples were read, one batch takes 10,000" in capsys.readouterr().err
    np.savez(tmp_path / "bad.npz", clicked=np.array([50_000]), bought=np.array([0]), small=np.array([0]))
    assert run("--tables", tables, "--batches", tmp_path / "bad.npz", "--batch_size", 1, "--hbm_gb", 1) == 2
    assert "table big, feature clicked: id 50000 is not in [0, 50000)" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What it says when it cannot use its input."""
    try:
        status = run(*arguments)
    except SystemExit as end:  # argparse
        status = end.code
    captured = capsys.readouterr()
    assert status == 2, captured
    assert not captured.out
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hbm_gb", "0"), "--hbm_gb is 0.0, it must be a finite number above 0"),
        (("--hbm_gb", "nan"), "--hbm_gb is nan"),
        (("--hbm_gb", "inf"), "--hbm_gb is inf"),
        (("--hbm_gb", "-1"), "--hbm_gb is -1.0"),
        (("--hbm_gb", "1e300"), "--hbm_gb is 1e+300, it must be below"),
        (("--scratchpad_gb", "nan"), "--scratchpad_gb is nan"),
        (("--scratchpad_gb", "inf"), "--scratchpad_gb is inf"),
        (("--hbm_gb", "1", "--ddr_gb", "nan"), "--ddr_gb is nan"),
        (("--hbm_gb", "1", "--world_size", "0"), "--world_size is 0, it must be an integer of at least 1"),
        (("--hbm_gb", "1", "--world_size", "-1"), "--world_size is -1"),
        (("--hbm_gb", "1", "--batch_size", "-5"), "--batch_size is -5"),
        (("--hbm_gb", "1", "--batch_size", "0"), "--batch_size is 0"),
        (("--hbm_gb", "1", "--world_size", "4", "--local_world_size", "3"), "--local_world_size is 3, which does not"),
        (("--hbm_gb", "1", "--world_size", "4", "--local_world_size", "0"), "--local_world_size is 0"),
        (("--hbm_gb", "1", "--max_batches", "0"), "--max_batches is 0"),
        (("--hbm_gb", "1", "--lookahead", "0"), "--lookahead is 0"),
        (("--hbm_gb", "1", "--num_batches_seen_ahead", "501"), "--num_batches_seen_ahead is 501"),
        (("--hbm_gb", "1", "--zipf", "nan"), "--zipf is nan"),
        (("--hbm_gb", "1", "--zipf", "-1"), "--zipf is -1.0"),
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused(
    arguments: tuple[str, ...], message: str, tables: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--tables", tables, "--batch_size", 256, "--zipf", 1.05)
    assert message in refused(capsys, *common, *arguments)


def test_ranks_of_a_host_divide_all_ranks(tables: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--tables", tables, "--batch_size", 256, "--zipf", 1.05, "--hbm_gb", 1)
    assert run(*common, "--world_size", 12) == 0
    assert "12 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_embeddings": INF}, "num_embeddings is inf, it must be an integer"),
        ({"num_embeddings": 1.9}, "num_embeddings is 1.9"),
        ({"num_embeddings": "9"}, "num_embeddings is '9'"),
        ({"num_embeddings": 10**30}, "num_embeddings is 1000"),
        ({"embedding_dim": 4.5}, "embedding_dim is 4.5"),
        ({"embedding_dim": 6}, "a multiple of 4"),
        ({"name": "small"}, "table small is in config 0 and in config 1"),
        ({"name": ""}, "name is ''"),
        ({"name": "a.b"}, "name is 'a.b'"),
        ({"name": None}, "name is None"),
        ({"name": "keys"}, "name is 'keys'"),
        ({"ids_per_sample": NAN}, "ids_per_sample is nan, it must be a finite number"),
        ({"ids_per_sample": INF}, "ids_per_sample is inf"),
        ({"ids_per_sample": -1}, "ids_per_sample is -1"),
        ({"ids_per_sample": "2"}, "ids_per_sample is '2'"),
        ({"feature_names": "f0"}, "feature_names is 'f0', it must be a list of names"),
        ({"feature_names": []}, "feature_names is []"),
        ({"feature_names": [1]}, "feature_names is [1]"),
        ({"feature_names": None}, "feature_names is None"),
    ],
    ids=str,
)
def test_a_table_that_makes_no_sense_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tables.json"
    path.write_text(json.dumps([{"name": "big", "num_embeddings": 50_000, "embedding_dim": 16, **change}, TABLES[1]]))
    said = refused(capsys, "--tables", path, "--zipf", 1.05, "--batch_size", 256, "--hbm_gb", 1)
    assert message in said
    assert str(path) in said


@pytest.mark.parametrize("data", [("--zipf", "1.05"), ("--batches", "none.npz")])
def test_no_table_at_all_is_refused(data: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (*data, "--batch_size", 256, "--hbm_gb", 1)
    for content, message in (("[]", "no embedding table"), ("{}", "not a JSON list"), ("[" * 10**5, "not a JSON list")):
        (tmp_path / "tables.json").write_text(content)
        assert message in refused(capsys, "--tables", tmp_path / "tables.json", *common)
    said = refused(capsys, "--tables", tmp_path / "none.json", *common)
    assert "cannot be read" in said
    assert "JSON list" not in said
    assert "cannot be read" in refused(capsys, "--tables", tmp_path, *common)


def test_archives_that_are_none_are_refused(
    tables: str, npz: str, ids: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Path(npz).read_bytes()
    np.save(tmp_path / "array.npy", np.arange(4))
    for content, message in (
        (b"", "cannot be read"),
        (whole[: len(whole) // 2], "cannot be read"),
        (whole[:1000] + b"x" * 5000 + whole[6000:], "cannot be read"),
        ((tmp_path / "array.npy").read_bytes(), "one array without a name, a .npy file"),
    ):
        (tmp_path / "bad.npz").write_bytes(content)
        said = refused(
            capsys, "--tables", tables, "--batches", tmp_path / "bad.npz", "--batch_size", 100, "--hbm_gb", 1
        )
        assert message in said
        assert "bad.npz" in said


def test_numbers_of_ids_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    good = {"clicked": np.arange(4), "bought": np.arange(4), "small": np.arange(4)}
    for lengths, message in (
        ([2, -1, 3, 0], "clicked_lengths has -1"),
        ([0.5, 1.5, 1.0, 1.0], "clicked_lengths is 1-dimensional float64"),
        ([[1, 1], [1, 1]], "clicked_lengths is 2-dimensional"),
    ):
        np.savez(tmp_path / "bad.npz", **good, clicked_lengths=np.array(lengths))
        with pytest.raises(MeasurementError, match=message):
            list(read_trace([tmp_path / "bad.npz"], CONFIGS, 2))


def test_unsigned_ids_are_reported_as_they_are(tmp_path: Path) -> None:
    good = {"clicked": np.arange(4), "bought": np.arange(4), "small": np.arange(4)}
    np.savez(tmp_path / "bad.npz", **{**good, "bought": np.array([1, 2, 2**63 + 5, 4], dtype=np.uint64)})
    with pytest.raises(MeasurementError, match="bought has 9223372036854775813, which no table has"):
        list(read_trace([tmp_path / "bad.npz"], CONFIGS, 2))
    np.savez(tmp_path / "good.npz", **{**good, "bought": np.array([1, 2, 3, 4], dtype=np.uint64)})
    assert len(list(read_trace([tmp_path / "good.npz"], CONFIGS, 2))) == 2


def test_a_missing_value_inside_a_list_has_no_id(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read with pyarrow")
    from pyarrow import parquet

    columns = {"clicked": [[1, None, 2], None, [None], [4]], "bought": [3, None, 5, 6], "small": [[], [], [], []]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "trace.parquet")
    (batch,) = read_trace([tmp_path / "trace.parquet"], CONFIGS, 4)
    assert batch.lengths().tolist() == [2, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    assert batch.values().tolist() == [1, 2, 4, 3, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", "no/such/plan.json"), "plan.json: cannot be written"),
        (("--json", "."), "cannot be written"),
        (("--save_working_sets", "."), "cannot be written"),
        (("--plot", "no/such/plan.png"), "plan.png: cannot be written"),
        (("--plot", "plan.xyz"), "plan.xyz: pictures end in"),
        (("--plot", "plan"), "plan: pictures end in"),
        (("--html", "no/such/plan.html"), "plan.html: cannot be written"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_said_before_anything_is_measured(
    arguments: tuple[str, str], message: str, tables: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    common = ("--tables", tables, "--batches", "none.npz", "--batch_size", 256, "--hbm_gb", 1)
    said = refused(capsys, *common, *arguments)
    assert message in said
    assert "none.npz" not in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_measurement_is_used_with_the_settings_that_it_was_made_with(
    tables: str, npz: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "sets.json"
    common = ("--tables", tables, "--scratchpad_gb", 0.004)
    measured = ("--batches", npz, "--batch_size", 100, "--num_batches_seen_ahead", 3, "--save_working_sets", saved)
    assert run(*common, *measured) == 0
    assert "3 batches seen beyond" in capsys.readouterr().out
    said = refused(capsys, *common, "--working_sets", saved, "--batch_size", 100_000)
    assert "working_sets are of batches of 100 samples a rank, batch_size is 100,000" in said
    said = refused(capsys, *common, "--working_sets", saved, "--batch_size", 100, "--num_batches_seen_ahead", 4)
    assert "were measured with 3 batches seen ahead, --num_batches_seen_ahead is 4" in said
    for given in ((), ("--num_batches_seen_ahead", 3)):
        assert run(*common, "--working_sets", saved, "--batch_size", 100, *given) == 0
        assert "3 batches seen beyond" in capsys.readouterr().out


def test_a_measurement_without_a_table_asks_for_nothing_that_a_command_cannot_have(
    tables: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_one = tmp_path / "one.json"
    of_one.write_text(json.dumps(TABLES[:1]))
    common = ("--batch_size", 256, "--hbm_gb", 1)
    assert run("--tables", of_one, *common, "--zipf", 1, "--save_working_sets", tmp_path / "sets.json") == 0
    capsys.readouterr()
    said = refused(capsys, "--tables", tables, *common, "--working_sets", tmp_path / "sets.json")
    assert said.endswith("table small: working_sets say nothing of it. Measure all tables.\n")


@pytest.mark.parametrize(
    "change", [{"num_ids": NAN}, {"num_rows": "many"}, {"lookahead": "2"}, {"windows": []}], ids=str
)
def test_an_edited_measurement_is_refused(
    change: dict[str, Any], tables: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "sets.json"
    common = ("--tables", tables, "--batch_size", 256, "--hbm_gb", 1)
    assert run(*common, "--zipf", 1.05, "--save_working_sets", saved) == 0
    capsys.readouterr()
    content = json.loads(saved.read_text())
    content["tables"]["big"].update(change)
    saved.write_text(json.dumps(content))
    assert "not a measurement of working sets" in refused(capsys, *common, "--working_sets", saved)


def test_it_runs_as_a_module(tables: str) -> None:
    command = [sys.executable, "-m", "torchrec_scratchpipe.plan", "--tables", tables, "--zipf", "1.05"]
    done = subprocess.run(
        [*command, "--batch_size", "256", "--hbm_gb", "1"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "big" in done.stdout
    assert not done.stderr.strip()


class RunsCode:
    """What a hostile array of objects holds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.fault("a measurement or trace file that would run code")
def test_code_in_a_trace_is_not_run(tmp_path: Path, tables: str) -> None:
    proof = tmp_path / "code_was_run"
    np.savez(tmp_path / "trace.npz", small=np.array([RunsCode(proof)], dtype=object), allow_pickle=True)
    (tmp_path / "sets.json").write_bytes(pickle.dumps(RunsCode(proof)))
    proof.unlink(missing_ok=True)
    assert run("--tables", tables, "--batches", tmp_path / "trace.npz", "--batch_size", 1, "--hbm_gb", 1) == 2
    assert run("--tables", tables, "--working_sets", tmp_path / "sets.json", "--batch_size", 1, "--hbm_gb", 1) == 2
    assert not proof.exists()
    pickle.loads((tmp_path / "sets.json").read_bytes())
    assert proof.exists()
