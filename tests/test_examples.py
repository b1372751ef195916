# SPDX-License-Identifier: BSD-3-Clause
"""The examples run as their documentation says, and the Criteo reader says what is wrong with a file."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Script, run_script, run_script_on_ranks
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict

from torchrec_scratchpipe import load_checkpoint
from torchrec_scratchpipe.checkpoint.delta_chain import Chain
from torchrec_scratchpipe.checkpoint.files import Manifest
from torchrec_scratchpipe.privacy.accounting import epsilon

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES / "criteo_dlrm"))
sys.path.insert(0, str(EXAMPLES / "benchmark"))

import miss_rates  # noqa: E402
from data import NUM_SPARSE, CriteoFormatError, CriteoTsv, GeneratedCriteo, Share  # noqa: E402
from private_data import PoissonBatches, default_delta  # noqa: E402

ROWS = [50 + i for i in range(NUM_SPARSE)]
SMALL_LAYERS = ["--dense_arch_layer_sizes", "16,8", "--over_arch_layer_sizes", "16,1"]


def tsv_line(rng: random.Random, label: int | None = None) -> str:
    integers = [str(rng.randint(-1, 500)) if rng.random() < 0.8 else "" for _ in range(13)]
    values = [f"{rng.randint(0, 300) * 7919:08x}" if rng.random() < 0.9 else "" for _ in range(26)]
    return "\t".join([str(rng.randint(0, 1) if label is None else label), *integers, *values])


def write_tsv(path: Path, num_lines: int) -> Path:
    rng = random.Random(0)
    path.write_text("".join(tsv_line(rng) + "\n" for _ in range(num_lines)))
    return path


def run_example(*args: str, num_ranks: int = 1) -> str:
    result = run_script(*args) if num_ranks == 1 else run_script_on_ranks(num_ranks, *args)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def read_figures(path: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    return write_tsv(tmp_path / "criteo.tsv", 700)


@pytest.mark.parametrize("extra", [[], ["--table_dir", "TMP"], ["--interaction_type", "dcn", "--lr_warmup_steps", "5"]])
def test_criteo_dlrm_equals_stock_to_the_bit(extra: list[str], tsv: Path, tmp_path: Path) -> None:
    extra = [str(tmp_path) if arg == "TMP" else arg for arg in extra]
    out = run_example(
        str(EXAMPLES / "criteo_dlrm" / "main.py"), "--criteo_tsv", str(tsv), "--batch_size", "16", "--adagrad",
        "--embedding_dim", "16", "--num_embeddings", "400", "--load_factor", "0.2", "--verify",
        "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png"), *extra,
    )  # fmt: skip
    figures = read_figures(tmp_path / "out.json")
    assert figures["verify"]["max_abs_diff"] == 0.0
    assert figures["verify"]["num_batches"] == figures["num_train_batches"] == 40
    assert figures["scratchpad"][0]["num_victims"] > 0
    assert figures["scratchpad"][0]["num_misses_at_train"] == 0
    assert {"auroc", "logloss", "samples_per_second", "step_ms_p50", "step_ms_p90", "peak_rss_bytes"} <= set(figures)
    summary = out.splitlines()[-1]
    assert summary.startswith("summary: auroc")
    num_rows_read = figures["scratchpad"][0]["num_disk_rows_read"]
    assert (f"from the disk {num_rows_read:,} rows" in summary) == (num_rows_read > 0) == ("--table_dir" in extra)
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_criteo_dlrm_within_a_budget(tsv: Path, tmp_path: Path) -> None:
    arguments = [
        str(EXAMPLES / "criteo_dlrm" / "main.py"), "--criteo_tsv", str(tsv), "--batch_size", "8", "--adagrad",
        "--embedding_dim", "16", "--num_embeddings", "600", "--scratchpad_budget_gb", "0.0006", "--verify",
        "--num_batches_seen_ahead", "4", "--working_sets", str(tmp_path / "sets.json"),
        "--json", str(tmp_path / "out.json"),
    ]  # fmt: skip
    plans = []
    for flags in ([], ["--print_sharding_plan"]):  # measured, then from the file
        out = run_example(*arguments, *flags)
        plans.append(out[out.index("device memory per rank") : out.index("summary")])
        assert ("fused_uvm_caching" in out, len(out.splitlines()) > 2 * NUM_SPARSE) == (bool(flags), bool(flags))
        figures = read_figures(tmp_path / "out.json")
        assert figures["verify"]["max_abs_diff"] == 0.0
        assert figures["scratchpad"][0]["num_victims"] > 0
        misses = figures["misses_per_batch"]
        assert (misses["first_batch"], misses["last_batch"]) == (40, 79)
        assert misses["planned"] == pytest.approx(misses["counted"], rel=0.08)
        assert misses["counted"] == pytest.approx(figures["later_half"]["misses"], rel=1e-3)
        assert f"planned {misses['planned']:,.1f}, counted {misses['counted']:,.1f}" in out.splitlines()[-1]
    assert plans[0].splitlines()[:2] == plans[1].splitlines()[:2]
    assert (tmp_path / "sets.json").exists()


@pytest.mark.dist
def test_criteo_dlrm_within_a_budget_on_two_ranks(tmp_path: Path) -> None:
    run_example(
        str(EXAMPLES / "criteo_dlrm" / "main.py"), "--limit_train_batches", "60", "--limit_val_batches", "2",
        "--batch_size", "32", "--embedding_dim", "16", "--max_num_embeddings", "3000",
        "--scratchpad_budget_gb", "0.001", *SMALL_LAYERS,
        "--verify", "--json", str(tmp_path / "out.json"),
        num_ranks=2,
    )  # fmt: skip
    figures = read_figures(tmp_path / "out.json")
    assert figures["verify"]["max_abs_diff"] == 0.0
    assert figures["scratchpad"][0]["num_victims"] > 0


def test_orders_of_the_miss_rate_benchmark() -> None:
    trace = miss_rates.zipf_trace(1.05, num_rows=2000, num_ids=20, num_batches=100)
    one_set = miss_rates.count_set_associative(trace, 32)
    lru = miss_rates.count_lru(trace, 32)
    assert one_set.sum() == pytest.approx(lru.sum(), rel=0.02), "one set of 32 ways is a scratchpad of 32 slots"
    for num_slots in (64, 320):
        misses = {name: order(trace, num_slots).sum() for name, order in miss_rates.ORDERS.items()}
        assert misses["Belady"] == min(misses.values())
        assert misses["ours"] < misses["ours, nothing seen"] < misses["LRU"]


@pytest.mark.dist
def test_criteo_dlrm_on_two_ranks(tmp_path: Path) -> None:
    command = [
        "torch.distributed.run", "--nproc_per_node", "2",
        str(EXAMPLES / "criteo_dlrm" / "main.py"), "--limit_train_batches", "30", "--limit_val_batches", "3",
        "--batch_size", "64", "--embedding_dim", "16", "--max_num_embeddings", "3000", "--load_factor", "0.2",
        *SMALL_LAYERS, "--verify", "--json", str(tmp_path / "out.json"),
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", *command], capture_output=True, timeout=300, check=True)
    figures = read_figures(tmp_path / "out.json")
    assert figures["verify"]["max_abs_diff"] == 0.0
    assert figures["scratchpad"][0]["num_victims"] > 0


def test_criteo_dlrm_learns_the_planted_signal(tmp_path: Path) -> None:
    run_example(
        str(EXAMPLES / "criteo_dlrm" / "main.py"), "--limit_train_batches", "80", "--limit_val_batches", "20",
        "--batch_size", "256", "--embedding_dim", "16", "--max_num_embeddings", "5000", "--load_factor", "0.3",
        "--adagrad", "--dense_arch_layer_sizes", "64,16", "--over_arch_layer_sizes", "64,1",
        "--json", str(tmp_path / "out.json"),
    )  # fmt: skip
    assert read_figures(tmp_path / "out.json")["auroc"] > 0.7


def test_swap_sharder_is_short_and_runs() -> None:
    path = EXAMPLES / "swap_sharder.py"
    assert len(path.read_text().splitlines()) <= 100
    assert all(f"# {number}: was" in path.read_text() for number in (1, 2, 4))
    assert run_example(str(path)).splitlines()[-1].endswith("evicted, 0 missing at Train")


def test_train_step_benchmark(tmp_path: Path) -> None:
    output = run_example(
        str(EXAMPLES / "benchmark" / "train_step.py"), "--num_tables", "3", "--num_embeddings", "5000",
        "--embedding_dim", "8", "--batch_size", "64", "--ids_per_bag", "2", "--steps", "6", "--load_factor", "0.2",
        "--lookahead", "1,3", "--zipf", "0.8", "--profile_trace", str(tmp_path / "traces"), "--out", str(tmp_path),
        "--json", str(tmp_path / "new" / "by_contender.json"),
    )  # fmt: skip
    assert "ratio_to_fused" in output
    results = read_figures(tmp_path / "results.json")
    rows = {(row["cache"], row["lookahead"]): row for row in results["rows"]}
    assert {cache for cache, _ in rows} == {"fused", "static", "sequential", "scratchpipe"}
    for lookahead in (1, 3):
        ours = rows["scratchpipe", lookahead]
        assert ours["victims"] > 0
        assert ours["misses_at_train"] == 0
        assert ours["last_loss"] == rows["sequential", lookahead]["last_loss"]
        assert ours["floor_ms"] > 0
        assert ours["traced_ms"].keys() >= {"plan", "collect", "insert", "forward", "backward"}
    assert rows["scratchpipe", 3]["last_loss"] == rows["fused", None]["last_loss"]  # the later of two points
    assert rows["static", None]["last_loss"] == pytest.approx(rows["fused", None]["last_loss"], rel=1e-4)
    assert results["gb_per_s"]["plain copy"] > 0
    assert "| `scratchpipe` |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "criteo.png").stat().st_size > 0
    assert len(list((tmp_path / "traces").glob("*.png"))) == 4 * 2
    by_contender = read_figures(tmp_path / "new" / "by_contender.json")
    assert by_contender.keys() == {"args", "torch", "machine", "date", "points"}
    assert [point["lookahead"] for point in by_contender["points"]] == [1, 3]
    for point in by_contender["points"]:
        ours = rows["scratchpipe", point["lookahead"]]
        assert point["step_ms_p50"].keys() == {cache for cache, _ in rows}
        assert point["step_ms_p50"]["scratchpipe"] == ours["step_ms"]
        assert point["ratio_to_fused"]["scratchpipe"] == ours["ratio_to_fused"]


def test_train_step_benchmark_has_the_shape_of_upstreams_offloading_benchmark(tmp_path: Path) -> None:
    run_example(
        str(EXAMPLES / "benchmark" / "train_step.py"), "--model", "offload", "--caches", "fused,static,scratchpipe",
        "--num_embeddings", "3000", "--embedding_dim", "16", "--ids_per_bag", "3", "--batch_size", "32",
        "--num_device_tables", "3", "--zipf", "0", "--optimizer", "rowwise_adagrad", "--load_factor", "0.2",
        "--steps", "6", "--out", str(tmp_path),
    )  # fmt: skip
    rows = {row["cache"]: row for row in read_figures(tmp_path / "results.json")["rows"]}
    assert rows["scratchpipe"]["workload"]["num_device_tables"] == 3
    assert rows["scratchpipe"]["victims"] > 0
    assert rows["scratchpipe"]["last_loss"] == rows["fused"]["last_loss"]
    assert rows["static"]["last_loss"] == pytest.approx(rows["fused"]["last_loss"], rel=1e-4)


def test_train_step_benchmark_writes_what_scripts_read(tmp_path: Path) -> None:
    run_example(
        str(EXAMPLES / "benchmark" / "train_step.py"), "--caches", "fused,scratchpipe", "--num_tables", "2",
        "--num_embeddings", "2000", "--embedding_dim", "8", "--batch_size", "64", "--zipf", "1.05",
        "--load_factor", "0.2",
        "--steps", "6", "--no_overlap", "--json", str(tmp_path / "result.json"),
    )  # fmt: skip
    result = read_figures(tmp_path / "result.json")
    assert result["args"]["no_overlap"] is True
    assert set(result["machine"]) == {"cpu", "num_threads"}
    for name in ("step_ms_p50", "step_ms_p90", "step_ms"):
        assert set(result[name]) == {"fused", "scratchpipe"}
    assert result["ratio_to_fused"] == result["step_ms_p50"]["scratchpipe"] / result["step_ms_p50"]["fused"]
    (pool,) = result["scratchpad"]
    assert pool["num_victims"] > 0
    assert pool["num_misses_at_train"] == 0
    assert result["stage_ms"].keys() >= {"plan", "collect", "insert", "train"}
    num_ids = pool["num_ids"] / pool["num_batches"]
    assert result["plan_lookups_per_second"] == pytest.approx(1e3 * num_ids / result["stage_ms"]["plan"])
    assert {"torch", "date"} <= result.keys()


def test_train_step_benchmark_tries_its_outputs_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for flag in ("--json", "--out"):
        path = str(tmp_path / "file" / "result")
        result = run_script(str(EXAMPLES / "benchmark" / "train_step.py"), flag, path)
        assert result.returncode == 2
        assert "cannot be written" in result.stderr.splitlines()[-1]


def test_train_step_benchmark_names_what_a_cpu_has_not() -> None:
    script = str(EXAMPLES / "benchmark" / "train_step.py")
    for flags, message in (
        (["--caches", "uvm_caching"], "uvm_caching exists on CUDA only"),
        (["--optimizer", "adam"], "adam has no kernel on a CPU; choose from sgd, rowwise_adagrad, adagrad"),
        (["--caches", "fusd"], "fusd: choose from fused, fused_uvm"),
    ):
        result = run_script(script, *flags)
        assert result.returncode == 2
        assert message in result.stderr


def test_bandwidth_benchmark(tmp_path: Path) -> None:
    script = str(EXAMPLES / "benchmark" / "bandwidth.py")
    run_example(script, "--rows_per_batch", "500", "--num_rows", "3000", "--json", str(tmp_path / "out.json"))
    assert all(speed > 0 for speed in read_figures(tmp_path / "out.json")["gb_per_s"].values())


def test_example_writes_a_trace_of_stages_beside_training(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    run_example(
        str(EXAMPLES / "criteo_dlrm" / "main.py"), "--batch_size", "32", "--limit_train_batches", "16",
        "--limit_val_batches", "2", "--max_num_embeddings", "500", "--embedding_dim", "8",
        *SMALL_LAYERS, "--profile_trace", str(trace),
    )  # fmt: skip
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    names = ("## scratchpipe plan", "## forward")
    planning, training = ({event["tid"] for event in events if event["name"].startswith(name)} for name in names)
    assert planning
    assert training
    assert planning.isdisjoint(training)
    stages = [event["name"] for event in events if event["name"].startswith("## scratchpipe collect")]
    assert len(stages) >= 4  # with the number of their batch
    assert len(set(stages)) == len(stages)


def test_tsv_is_split_in_time_order_and_shared_between_ranks(tsv: Path) -> None:
    whole = CriteoTsv(str(tsv), ROWS, 10, Share())
    assert (whole.num_train_batches, whole.num_val_batches) == (63, 7)
    labels = [label for batch in [*whole.train(), *whole.validate()] for label in batch.labels.tolist()]
    assert labels == [int(line[0]) for line in tsv.read_text().splitlines()]
    shares = [CriteoTsv(str(tsv), ROWS, 10, Share(rank, 2)) for rank in range(2)]
    assert [share.num_train_batches for share in shares] == [31, 31]
    pairs = list(zip(shares[0].train(), shares[1].train(), strict=True))
    own = [batch.sparse_features.values().tolist() for pair in pairs for batch in pair]
    assert own == [batch.sparse_features.values().tolist() for batch in whole.train()][:62]


def test_tsv_ids_are_hashed_into_their_tables(tsv: Path) -> None:
    for batch in CriteoTsv(str(tsv), ROWS, 64, Share()).train():
        for rows, name in zip(ROWS, batch.sparse_features.keys(), strict=True):
            ids = batch.sparse_features[name].values()
            assert int(ids.min()) >= 0
            assert int(ids.max()) < rows


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (None, "1\t2\t3", r"line 5: 3 columns, expected 40"),
        (20, "xyz", r"line 5, column 21: 'xyz' is not at most 8 hexadecimal digits"),
        (20, "123456789", r"line 5, column 21: '123456789' is not at most 8"),
        (20, "12 34", r"line 5, column 21: '12 34' is not at most 8"),
        (3, "1.5", r"line 5, column 4: '1.5' is not an integer of 64 bits"),
        (3, "9" * 20, r"line 5, column 4: '9{20}' is not an integer"),
        (0, "yes", r"line 5, column 1: the label is 'yes', needs to be 0 or 1"),
        (0, "2", r"line 5, column 1: the label is '2'"),
        (0, "", r"line 5, column 1: the label is ''"),
    ],
)
def test_bad_tsv_names_line_and_column(column: int | None, value: str, message: str, tsv: Path) -> None:
    lines = tsv.read_text().splitlines()
    cells = lines[4].split("\t")
    if column is not None:
        cells[column] = value
    lines[4] = value if column is None else "\t".join(cells)
    tsv.write_text("\n".join(lines))
    with pytest.raises(CriteoFormatError, match=message):
        list(CriteoTsv(str(tsv), ROWS, 3, Share()).train())


def equal_batches(left: CriteoTsv, right: CriteoTsv) -> bool:
    pairs = zip([*left.train(), *left.validate()], [*right.train(), *right.validate()], strict=True)
    return all(
        torch.equal(a.labels, b.labels)
        and torch.equal(a.dense_features, b.dense_features)
        and torch.equal(a.sparse_features.values(), b.sparse_features.values())
        for a, b in pairs
    )


def test_a_compressed_tsv_and_one_with_names_are_read(tsv: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = CriteoTsv(str(tsv), ROWS, 10, Share())
    names = "\t".join(["label", *(f"I{i}" for i in range(13)), *(f"C{i}" for i in range(26))]) + "\n"
    with_names, compressed = tsv.with_name("names.tsv"), tsv.with_name("both.tsv.gz")
    with_names.write_text(names + tsv.read_text())
    compressed.write_bytes(gzip.compress(with_names.read_bytes()))
    for path in (with_names, compressed):
        caplog.clear()
        assert equal_batches(plain, CriteoTsv(str(path), ROWS, 10, Share()))
        assert [record.getMessage() for record in caplog.records] == [
            f"{path}: line 1 is taken for names of columns (label, I0, I1, ...) and left out"
        ]
    lines = with_names.read_text().splitlines()
    lines[4] = lines[4].replace("\t", ",")
    compressed.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(CriteoFormatError, match=r"both.tsv.gz, line 5: 1 columns, expected 40"):
        list(CriteoTsv(str(compressed), ROWS, 3, Share()).train())


def test_a_file_that_is_no_tsv_is_refused_before_training(tsv: Path) -> None:
    content = tsv.read_bytes()
    for bad, message in (
        (gzip.compress(content)[:5000], r"cannot be decompressed \(.*\)\. Get the file again"),
        (content.replace(b"\t", b","), r"line 1: 1 columns, expected 40"),
        (b"label\tI0\n" + content, r"line 1: 2 columns, expected 40"),
        (b"yes" + content, r"line 1, column 1: the label is 'yes[01]'"),
    ):
        tsv.write_bytes(bad)
        with pytest.raises(CriteoFormatError, match=message):
            CriteoTsv(str(tsv), ROWS, 10, Share())
    tsv.write_bytes(content)
    with pytest.raises(
        CriteoFormatError, match=r"700 samples, .* 2 ranks need 1,?000 for one batch each\. Lower --batch_size"
    ):
        CriteoTsv(str(tsv), ROWS, 500, Share(0, 2))


def test_missing_and_empty_tsv(tmp_path: Path) -> None:
    with pytest.raises(CriteoFormatError, match="no such file"):
        CriteoTsv(str(tmp_path / "none.tsv"), ROWS, 4, Share())
    (tmp_path / "empty.tsv").touch()
    with pytest.raises(CriteoFormatError, match="the file is empty"):
        CriteoTsv(str(tmp_path / "empty.tsv"), ROWS, 4, Share())


def test_generated_rows_follow_the_measured_head() -> None:
    rows = [20_000] * NUM_SPARSE
    source = GeneratedCriteo(rows, 5000, 2, 1, seed=0, share=Share())
    first, second = list(source.train()), list(source.train())
    assert all(a.sparse_features.values().equal(b.sparse_features.values()) for a, b in zip(first, second, strict=True))
    ids = np.concatenate([batch.sparse_features["cat_2"].values().numpy() for batch in first])
    counts = np.sort(np.unique(ids, return_counts=True)[1])[::-1] / ids.size
    assert abs(counts[0] - 0.047) < 0.01  # the column's hottest value
    assert abs(counts[:55].sum() - 0.315) < 0.02  # the top 1 % of the values seen
    assert 0.1 < float(np.concatenate([batch.labels.numpy() for batch in first]).mean()) < 0.4


SMALL = [
    "--criteo_tsv", "TSV", "--batch_size", "16", "--adagrad", "--embedding_dim", "8", "--num_embeddings", "400",
    *SMALL_LAYERS, "--lr_warmup_steps", "30",
]  # fmt: skip


def small_run(tsv: Path, *args: str) -> list[str]:
    return [str(EXAMPLES / "criteo_dlrm" / "main.py"), *(str(tsv) if arg == "TSV" else arg for arg in SMALL), *args]


def saved_tables(directory: Path, step: int) -> dict[str, Any]:
    """Every tensor of a checkpoint, by name, as stock TorchRec reads it."""
    path = directory / f"step_{step:012d}"
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items() if hasattr(m, "size")}
    load_state_dict(state, checkpoint_id=path, no_dist=True)
    return state


def assert_same_checkpoints(left: Path, right: Path, step: int, min_tensors: int = 61) -> None:
    expected, found = saved_tables(left, step), saved_tables(right, step)
    assert expected.keys() == found.keys()
    assert len(expected) >= min_tensors
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_criteo_dlrm_remaps_raw_values(tsv: Path, tmp_path: Path) -> None:
    """With each policy, the same bits as stock; planned in a budget; without a scratchpad."""
    common = ["--zch_size", "40", "--zch_eviction_interval", "5", "--json", str(tmp_path / "out.json")]
    for policy in ("lfu", "lru", "distance_lfu"):
        out = run_example(*small_run(tsv, *common, "--zch_policy", policy, "--verify", "--load_factor", "0.6"))
        assert "rows given to other values" in out
        figures = json.loads((tmp_path / "out.json").read_text())
        assert figures["verify"]["max_abs_diff"] == 0.0
        assert sum(pool["num_rows_reset"] for pool in figures["scratchpad"]) > 100
        assert sum(pool["num_victims"] for pool in figures["scratchpad"]) > 100
    run_example(*small_run(tsv, *common, "--scratchpad_budget_gb", "0.0001", "--evaluate_stock"))
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["stock_auroc"] == figures["auroc"]
    run_example(*small_run(tsv, *common, "--embedding_cache", "fused"))
    assert json.loads((tmp_path / "out.json").read_text())["scratchpad"] == []


def test_criteo_dlrm_is_resumed_in_mid_epoch(tsv: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    run_example(*small_run(tsv, "--save_dir", str(whole), "--epochs", "2"))
    run_example(
        *small_run(
            tsv, "--save_dir", str(part), "--save_every", "25", "--keep_last", "2", "--limit_train_batches", "40"
        )
    )
    assert [path.name for path in sorted(part.iterdir())] == ["step_000000000025", "step_000000000040"]
    shutil.rmtree(part / "step_000000000040")
    out = run_example(
        *small_run(tsv, "--save_dir", str(part), "--resume", "--epochs", "2", "--evaluate_stock", "--verify"),
        "--json",
        str(tmp_path / "out.json"),
    )
    assert f"resumed from {part}/step_000000000025: epoch 1 of 2, batch 26 of 40 is next" in out.splitlines()
    again = run_script(*small_run(tsv, "--save_dir", str(part)))
    assert again.returncode == 1
    assert "has checkpoints of another run; give --resume" in again.stderr
    figures = read_figures(tmp_path / "out.json")
    assert figures["num_train_batches"] == 55
    assert figures["verify"]["max_abs_diff"] == 0.0
    assert figures["auroc"] == figures["stock_auroc"]
    assert "plain TorchRec modules" in out
    assert_same_checkpoints(whole, part, 80)


# A job that is stopped must not end before; how long the other jobs train is known when it has stopped.
WITHOUT_END = ("--epochs", "10000")


def epochs_after(step: int) -> int:
    """Of a job that was stopped at a step, and resumed, and trained more than one whole epoch."""
    return step // 40 + 2


def test_criteo_dlrm_that_was_killed_goes_on_from_its_last_delta(tsv: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    logged = ("--save_dir", str(part), "--delta_every", "5")
    job = Script(*small_run(tsv, *logged, *WITHOUT_END))
    while not (chain := whole_deltas(part)) or chain[-1] < 40:
        assert job.is_running
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.end()
    step = whole_deltas(part)[-1]
    assert step >= 40
    num_epochs = epochs_after(step)
    run_example(*small_run(tsv, "--save_dir", str(whole), "--epochs", str(num_epochs)))
    flags = (*logged, "--epochs", str(num_epochs), "--resume", "--verify", "--json", str(tmp_path / "out.json"))
    out = run_example(*small_run(tsv, *flags))
    assert f"resumed from {part}, deltas up to step {step}: epoch {step // 40 + 1} of {num_epochs}" in out
    assert read_figures(tmp_path / "out.json")["verify"]["max_abs_diff"] == 0.0
    assert whole_deltas(part)[-1] >= 40 * num_epochs - 5
    assert_same_checkpoints(whole, part, 40 * num_epochs)


def whole_deltas(directory: Path) -> list[int]:
    """Steps that a killed job could go on from."""
    if not (directory / "deltas").is_dir() or not list(directory.glob("step_*")):
        return []
    chain = Chain.read(directory)
    chain.close()
    return [delta_set.step for delta_set in chain.sets]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_the_run(number: signal.Signals, status: int, tsv: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    job = Script(*small_run(tsv, "--save_dir", str(part), "--save_every", "7", *WITHOUT_END))
    while not list(part.glob("step_*")):
        assert job.is_running
        time.sleep(0.01)
    job.send_signal(number)
    result = job.end()
    assert result.returncode == status
    assert f"{number.name}: all is saved in {part}; go on with --resume" in result.stdout.splitlines()
    step = max(int(path.name[5:]) for path in part.glob("step_*"))
    assert step >= 7
    num_epochs = epochs_after(step)
    run_example(*small_run(tsv, "--save_dir", str(whole), "--epochs", str(num_epochs)))
    run_example(*small_run(tsv, "--save_dir", str(part), "--resume", "--epochs", str(num_epochs)))
    assert_same_checkpoints(whole, part, 40 * num_epochs)


@pytest.mark.dist
def test_criteo_dlrm_is_resumed_on_two_ranks(tsv: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    run_example(*small_run(tsv, "--save_dir", str(whole)), num_ranks=2)
    run_example(*small_run(tsv, "--save_dir", str(part), "--limit_train_batches", "8"), num_ranks=2)
    run_example(*small_run(tsv, "--save_dir", str(part), "--resume"), num_ranks=2)
    assert_same_checkpoints(whole, part, 19)


def test_checkpoint_flags_need_a_directory() -> None:
    result = run_script(*small_run(Path("x"), "--resume"))
    assert result.returncode == 2
    assert "need --save_dir" in result.stderr


def test_host_cost_is_within_what_a_step_can_bear() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = str(EXAMPLES / "benchmark" / "host_cost.py")
    result = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    figures = {line[:16].strip(): float(line[16:].split()[0]) for line in result.stdout.splitlines()}
    assert figures.keys() == {"one by one", "recorded", "training thread", "worker"}
    assert figures["recorded"] < figures["one by one"] / 3


def ratios_of(table: str, column: int) -> dict[tuple[str, ...], float]:
    """A column of a predicted table, by the row's first three cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {tuple(cells[:3]): float(cells[column].split()[0]) for cells in rows}


def test_predictions_agree_with_what_was_measured_and_with_the_bus() -> None:
    script = str(EXAMPLES / "benchmark" / "predict.py")
    by_machine = run_example(script)
    fast_bus, slow_bus = (ratios_of(by_machine, column) for column in (3, 5))  # H200, A100
    assert len(fast_bus) > 12
    assert all(1.0 <= ratio < 4.0 for ratio in (*fast_bus.values(), *slow_bus.values()))
    bound_by_bus = ("paper, adam", "0.8", "2%")
    assert slow_bus[bound_by_bus] > 1.3 * fast_bus[bound_by_bus] > 1.3
    measured = EXAMPLES.parent / "docs" / "benchmarks" / "h200" / "results.json"
    beside = [line for line in run_example(script, "--measured", str(measured)).splitlines() if "| fused |" in line]
    assert len(beside) == 2
    for line in beside:
        predicted, actual, quotient = map(float, line.strip("|").split("|")[4:7])
        assert quotient == pytest.approx(predicted / actual, abs=0.01)
        assert 0.85 < quotient < 1.15


def test_criteo_dlrm_trains_in_private(tsv: Path, tmp_path: Path) -> None:
    command = [
        str(EXAMPLES / "criteo_dlrm" / "main.py"), "--criteo_tsv", str(tsv), "--batch_size", "16", "--epochs", "2",
        "--embedding_dim", "16", "--num_embeddings", "400", "--dp_noise_multiplier", "1.2", "--dp_clip", "0.5",
        "--json", str(tmp_path / "out.json"),
    ]  # fmt: skip
    out = run_example(*command, "--dp_seed", "123456789")
    figures = read_figures(tmp_path / "out.json")
    # 630 training rows, 40 steps an epoch, of a 40th of the rows each
    privacy = figures["privacy"]
    assert privacy.pop("epsilon") == pytest.approx(
        epsilon(noise_multiplier=1.2, sample_rate=1 / 40, num_steps=80, delta=1e-4)
    )
    assert privacy == {"delta": 1e-4, "clip": 0.5, "noise_multiplier": 1.2, "sample_rate": 1 / 40}
    assert " at delta 0.0001" in out.splitlines()[-1]
    assert "123456789" not in (tmp_path / "out.json").read_text() + out


def test_criteo_dlrm_in_private_is_saved_for_release_and_goes_on(tsv: Path, tmp_path: Path) -> None:
    command = [
        str(EXAMPLES / "criteo_dlrm" / "main.py"), "--criteo_tsv", str(tsv), "--batch_size", "32",
        "--embedding_dim", "16", "--num_embeddings", "400", "--dp_noise_multiplier", "1.2", "--dp_seed", "12345",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_example(*command, "--epochs", "2", "--save_dir", str(whole), "--save_every", "10")
    pending = [Manifest.read(path).is_noise_pending for path in sorted(whole.glob("step_*"))]
    assert pending == [True] * (len(pending) - 1) + [False]
    assert len(pending) > 2
    # Killed after the first checkpoints, and resumed from one whose rows have not got all their noise.
    shutil.copytree(whole, parts)
    newest = sorted(parts.glob("step_*"))[-1]
    shutil.rmtree(newest)
    run_example(*command, "--epochs", "2", "--save_dir", str(parts), "--resume")
    assert load_whole(parts / newest.name).keys() == load_whole(whole / newest.name).keys()
    for name, value in load_whole(whole / newest.name).items():
        assert torch.equal(value, load_whole(parts / newest.name)[name]), name


def load_whole(path: Path) -> dict[str, torch.Tensor]:
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(tuple(info.size), dtype=info.properties.dtype)
        for name, info in found.items()
        if isinstance(info, TensorStorageMetadata)
    }
    load_checkpoint(path, state)
    return state


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dp_clip", "1"], "--dp_clip: for private training; give --dp_noise_multiplier, too"),
        (["--dp_noise_multiplier", "1", "--verify"], "stock trains without noise"),
        (["--dp_noise_multiplier", "1", "--adagrad"], "tables must have SGD"),
        (["--dp_noise_multiplier", "1", "--zch_size", "50"], "which value has which row"),
        (["--dp_noise_multiplier", "1", "--delta_every", "5", "--save_dir", "TMP"], "rows without their noise"),
        (["--dp_noise_multiplier", "1", "--embedding_cache", "fused"], "needs --embedding_cache scratchpipe"),
        (["--dp_noise_multiplier", "1", "--dp_delta", "1"], "--dp_delta is 1, needs to be below 1"),
        (["--dp_noise_multiplier", "1", "--save_dir", "TMP", "--resume"], "give --dp_seed"),
    ],
)
def test_criteo_dlrm_refuses_what_is_not_private(flags: list[str], message: str, tmp_path: Path) -> None:
    flags = [str(tmp_path) if flag == "TMP" else flag for flag in flags]
    result = run_script(str(EXAMPLES / "criteo_dlrm" / "main.py"), *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_poisson_batches_differ_from_epoch_to_epoch(tsv: Path) -> None:
    source = CriteoTsv(str(tsv), ROWS, 16, Share())
    batches = PoissonBatches(source, 0.05, 2, seed=3)
    whole = list(batches.train())
    assert (len(batches), len(whole)) == (630, 2 * source.num_train_batches)
    sizes = [batch.labels.numel() for batch in whole]
    assert pytest.approx(sum(sizes) / len(sizes), rel=0.1) == 0.05 * 630
    first, second = whole[0], whole[source.num_train_batches]
    assert not torch.equal(first.sparse_features.values(), second.sparse_features.values())
    for step, batch in enumerate(batches.train(70), 70):
        assert torch.equal(batch.sparse_features.values(), whole[step].sparse_features.values())
        assert torch.equal(batch.dense_features, whole[step].dense_features)
    samples = torch.cat([batch.dense_features for batch in source.train()])
    assert all((samples == each).all(dim=1).any() for each in first.dense_features)


def test_delta_is_below_one_over_the_samples() -> None:
    assert [default_delta(number) for number in (630, 10**7, 32_000_000)] == [1e-4, 1e-8, 3e-9]
