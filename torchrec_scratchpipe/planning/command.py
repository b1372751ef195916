# SPDX-License-Identifier: BSD-3-Clause
"""What would I need? Plans on a machine without a GPU and without a process group.

Installed, it is `torchrec-scratchpipe plan`, and `scratchpipe-plan`.

    python -m torchrec_scratchpipe.plan --tables tables.json --batches trace.npz --batch_size 4096 --hbm_gb 8
    python -m torchrec_scratchpipe.plan --tables tables.json --zipf 1.05 --batch_size 8192 --world_size 8 --hbm_gb 40

`tables.json` is a list: `[{"name": "t0", "num_embeddings": 1000000, "embedding_dim": 128, "feature_names": ["f0"]},
...]`; `feature_names` may be left out for the table's name, `ids_per_sample` is for `--zipf`. Memory is given and
printed in GiB (1,073,741,824 bytes), as TorchRec has it.
"""

import argparse
import dataclasses
import json
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError

from torchrec_scratchpipe.core.slot_ops import MAX_BATCHES_SEEN_AHEAD
from torchrec_scratchpipe.errors import ConfigError, MeasurementError, ScratchPipeError
from torchrec_scratchpipe.planning.checks import check_count, check_number, did_you_mean, few
from torchrec_scratchpipe.planning.id_files import read_trace
from torchrec_scratchpipe.planning.page import check_page
from torchrec_scratchpipe.planning.plan_page import save_plan_page
from torchrec_scratchpipe.planning.planner import ScratchPipeShardingPlanner, WaysOut
from torchrec_scratchpipe.planning.plot import plot_plan
from torchrec_scratchpipe.planning.report import GIB, PlanReport, as_size
from torchrec_scratchpipe.planning.working_set import WorkingSets, measure_working_set, table_configs, zipf_working_sets
from torchrec_scratchpipe.sharding.sharder import ScratchPipeEmbeddingBagCollectionSharder

__all__ = ["main"]

NAMES = {"scratchpipe-plan": "scratchpipe-plan", "torchrec-scratchpipe": "torchrec-scratchpipe plan"}
MAX_RANKS_OF_HOST = 8
MAX_GIB, MAX_ROWS, MAX_WIDTH = 1 << 30, 1 << 40, 1 << 20  # what cannot be meant
TABLE_FIELDS = ("name", "num_embeddings", "embedding_dim", "feature_names", "ids_per_sample")

OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "adam": EmbOptimType.ADAM,
}


FLAGS = {"scratchpad_bytes": "--scratchpad_gb", "hbm_cap": "--hbm_gb", "ddr_cap": "--ddr_gb"}


class _FlagsAsWaysOut(WaysOut):
    """Names flags."""

    can_constrain = False

    def budget(self, setting: str, num_bytes: int) -> str:
        """As :class:`WaysOut`."""
        size = math.ceil(num_bytes / GIB * 1e6 + 1e-3) / 1e6  # what is printed must do
        return f"set {FLAGS[setting]} to at least {size:.6f} ({as_size(num_bytes)})"


class _PlannerOfCommand(ScratchPipeShardingPlanner):
    """The planner, whose messages name flags."""

    ways_out = _FlagsAsWaysOut()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a plan, or why there is none."""
    args = _parse(arguments)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torchrec")
    try:
        _check(args)
        report = _plan(args)
        if args.json:
            Path(args.json).write_text(json.dumps(_as_json(report), indent=2))
        if args.plot:
            plot_plan(report, args.plot)
        if args.html:
            save_plan_page(report, args.html)
    except PlannerError as error:
        print(f"no plan: {error}", file=sys.stderr)
        return 1
    except (ScratchPipeError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be used, before anything is read."""
    for name, least, below in (
        ("batch_size", 1, None),
        ("max_batches", 1, None),
        ("world_size", 1, None),
        ("local_world_size", 1, None),
        ("lookahead", 1, None),
        ("num_batches_seen_ahead", 0, MAX_BATCHES_SEEN_AHEAD + 1),
    ):
        if getattr(args, name) is not None:
            check_count(f"--{name}", getattr(args, name), least, below)
    for name in ("hbm_gb", "scratchpad_gb", "ddr_gb"):
        if getattr(args, name) is not None:
            size = check_number(f"--{name}", getattr(args, name), is_positive=True)
            if size >= MAX_GIB:
                raise ConfigError(f"--{name} is {size:g}, it must be below {MAX_GIB:,}. Give GiB, not bytes.")
    if args.zipf is not None:
        check_number("--zipf", args.zipf)
    for name in ("ram_budget_gb", "disk_reads_per_s"):
        if getattr(args, name) is not None:
            check_number(f"--{name}", getattr(args, name), is_positive=True)
    if args.disk_reads_per_s is not None and args.ram_budget_gb is None:
        raise ConfigError("--disk_reads_per_s is of the disk that has the tables. Give --ram_budget_gb, too.")
    if args.local_world_size is None:
        args.local_world_size = max(n for n in range(1, MAX_RANKS_OF_HOST + 1) if args.world_size % n == 0)
    if args.world_size % args.local_world_size:
        raise ConfigError(
            f"--local_world_size is {args.local_world_size}, which does not divide --world_size {args.world_size}. "
            "Give the ranks of one host; all hosts have as many."
        )
    for path in (args.json, args.save_working_sets, args.plot, args.html):
        if path is not None:
            _check_writable(Path(path), may_make_folder=path == args.save_working_sets)
    if args.plot is not None:
        _check_picture(Path(args.plot))
    if args.html is not None:
        check_page(args.html)


def _check_writable(path: Path, *, may_make_folder: bool) -> None:
    existed = path.exists()
    try:
        if may_make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        raise ConfigError(f"{path}: cannot be written ({error}). Give a path in a folder that exists.") from error


def _check_picture(path: Path) -> None:
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ConfigError(f"{path}: --plot needs matplotlib. Install torchrec-scratchpipe[plan].") from error
    endings = [f".{ending}" for ending in sorted(FigureCanvasBase.get_supported_filetypes())]
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{path}: pictures end in one of {', '.join(endings)}. Rename it.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=NAMES.get(Path(sys.argv[0]).stem, "python -m torchrec_scratchpipe.plan"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tables", required=True, help="JSON list of tables")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--batches", nargs="+", help="ids of past batches: .npz, .parquet or Criteo .tsv files")
    data.add_argument("--working_sets", help="a measurement that --save_working_sets wrote")
    data.add_argument("--zipf", type=float, help="no data: assume that ids follow a Zipf law with this exponent")
    parser.add_argument("--batch_size", type=int, required=True, help="samples per rank")
    parser.add_argument("--max_batches", type=int, default=300, help="steps to measure")
    parser.add_argument("--save_working_sets", help="write the measurement there")
    parser.add_argument("--world_size", type=int, default=1)
    parser.add_argument("--local_world_size", type=int, help="ranks per host; default: as many as divide all, up to 8")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--hbm_gb", type=float, help="device memory of each GPU for embeddings, in GiB")
    budget.add_argument("--scratchpad_gb", type=float, help="on a CPU: RAM of each rank for scratchpads, in GiB")
    parser.add_argument("--ddr_gb", type=float, default=1024, help="host memory of each rank, in GiB; default: 1024")
    parser.add_argument("--ram_budget_gb", type=float, help="for tables in files: RAM of each rank for rows, in GiB")
    parser.add_argument("--disk_reads_per_s", type=float, help="of their disk; torchrec-scratchpipe disk measures it")
    parser.add_argument("--lookahead", type=int, help="default: 2, or 1 where no more fits")
    parser.add_argument("--num_batches_seen_ahead", type=int, help="default: 0, or as measured")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
    parser.add_argument("--plot", help="write a picture there (needs matplotlib)")
    parser.add_argument("--html", help="write a report there, one file to be read offline (needs matplotlib)")
    parser.add_argument("--json", help="write the plan's figures there")
    return parser.parse_args(arguments)


def _plan(args: argparse.Namespace) -> PlanReport:
    tables, ids_per_sample = _read_tables(args.tables)
    working_sets = _working_sets(args, tables, ids_per_sample)
    if args.save_working_sets:
        working_sets.save(args.save_working_sets)
    is_cpu = args.scratchpad_gb is not None
    planner = _PlannerOfCommand(
        topology=Topology(
            world_size=args.world_size,
            local_world_size=args.local_world_size,
            compute_device="cpu" if is_cpu else "cuda",
            hbm_cap=None if is_cpu else int(args.hbm_gb * GIB),
            ddr_cap=int(args.ddr_gb * GIB),
        ),
        batch_size=args.batch_size,
        working_sets=working_sets,
        lookahead=args.lookahead,
        scratchpad_bytes=int(args.scratchpad_gb * GIB) if is_cpu else None,
        ram_budget_gb=args.ram_budget_gb,
        disk_reads_per_s=args.disk_reads_per_s,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        debug=False,
    )
    model = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    sharder = ScratchPipeEmbeddingBagCollectionSharder(fused_params={"optimizer": OPTIMIZERS[args.optimizer]})
    planner.plan(model, [sharder])
    assert planner.report is not None
    return planner.report


def _working_sets(
    args: argparse.Namespace, tables: list[EmbeddingBagConfig], ids_per_sample: dict[str, float]
) -> WorkingSets:
    if args.working_sets:
        working_sets = WorkingSets.load(args.working_sets)
        measured = working_sets.num_batches_seen_ahead
        if args.num_batches_seen_ahead not in (None, measured):
            raise MeasurementError(
                f"{args.working_sets}: working sets were measured with {measured} batches seen ahead, "
                f"--num_batches_seen_ahead is {args.num_batches_seen_ahead}. Measure with that, or leave it out."
            )
        return working_sets
    num_batches_seen_ahead = args.num_batches_seen_ahead or 0
    lookahead = args.lookahead if args.lookahead is not None else 2
    if args.zipf is not None:
        return zipf_working_sets(
            tables,
            {name: number * args.batch_size for name, number in ids_per_sample.items()},
            args.zipf,
            lookahead,
            num_batches_seen_ahead,
            args.world_size,
            args.batch_size,
        )
    return measure_working_set(
        read_trace(args.batches, tables, args.batch_size),
        tables,
        lookahead,
        num_batches_seen_ahead=num_batches_seen_ahead,
        max_batches=args.max_batches,
    )


def _read_tables(path: str) -> tuple[list[EmbeddingBagConfig], dict[str, float]]:
    """Configs, and ids per sample by table."""
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, list):
            raise TypeError(f"it is a {type(content).__name__}")
        entries: list[dict[str, Any]] = [dict(entry) for entry in content]
    except OSError as error:
        raise MeasurementError(f"{path}: cannot be read ({error}). Give the path of a list of tables.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise MeasurementError(f"{path}: not a JSON list of tables ({error}).") from error
    try:
        tables = [_read_table(f"table {index}", entry) for index, entry in enumerate(entries)]
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from error
    try:
        configs = table_configs([config for config, _ in tables])
    except MeasurementError as error:
        raise MeasurementError(f"{path}: {error}") from error
    return configs, {config.name: ids_per_sample for config, ids_per_sample in tables}


def _read_table(place: str, entry: dict[str, Any]) -> tuple[EmbeddingBagConfig, float]:
    """A config, and ids per sample."""
    missing = [name for name in TABLE_FIELDS[:3] if name not in entry]
    unknown = [str(name) for name in entry if name not in TABLE_FIELDS]
    if missing or unknown:
        hints = "".join(did_you_mean(name, TABLE_FIELDS) for name in unknown)
        faults = [f"{few(missing)} is missing"] * bool(missing) + [f"{few(unknown)} is not known"] * bool(unknown)
        raise ConfigError(
            f"{place}: {' and '.join(faults)}.{hints} A table has {', '.join(TABLE_FIELDS)}; the last two may be "
            "left out."
        )
    name = entry["name"]
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"{place}: name is {name!r}. Give a text without dots that PyTorch takes for a module's name."
        )
    features = entry.get("feature_names", [name])
    if not isinstance(features, list) or not features or not all(isinstance(it, str) and it for it in features):
        raise ConfigError(f"{place}: feature_names is {features!r}, it must be a list of names. Write [{name!r}].")
    num_embeddings, embedding_dim = (
        check_count(f"{place}: {field}", _whole(entry[field]), 1, below)
        for field, below in (("num_embeddings", MAX_ROWS), ("embedding_dim", MAX_WIDTH))
    )
    if embedding_dim % 4:
        raise ConfigError(f"{place}: embedding_dim is {embedding_dim}, FBGEMM needs a multiple of 4. Pad it.")
    ids_per_sample = check_number(f"{place}: ids_per_sample", entry.get("ids_per_sample", 1.0))
    config = EmbeddingBagConfig(
        name=name, num_embeddings=num_embeddings, embedding_dim=embedding_dim, feature_names=features
    )
    return config, ids_per_sample


def _whole(value: Any) -> Any:
    """1e6 is a float in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_json(report: PlanReport) -> dict[str, Any]:
    tables = [
        {
            "name": table.name,
            "compute_kernel": "fused" if table.sized.is_whole else "fused_uvm_caching",
            **{field.name: getattr(table, field.name) for field in dataclasses.fields(table) if field.name != "sized"},
        }
        for table in report.tables
    ]
    return {
        "lookahead": report.lookahead,
        "num_batches_seen_ahead": report.num_batches_seen_ahead,
        "tables": tables,
        "disk": None if report.disk is None else dataclasses.asdict(report.disk) | {"floor_ms": report.disk.floor_ms},
        "ranks": [{name: float(value) for name, value in dataclasses.asdict(rank).items()} for rank in report.ranks],
    }
