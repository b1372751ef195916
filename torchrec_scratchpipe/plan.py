# SPDX-License-Identifier: BSD-3-Clause
"""What would I need? Plans on a machine without a GPU and without a process group.

    python -m torchrec_scratchpipe.plan --tables tables.json --batches trace.npz --batch_size 4096 --hbm_gb 8
    python -m torchrec_scratchpipe.plan --tables tables.json --zipf 1.05 --batch_size 8192 --world_size 8 --hbm_gb 40

`tables.json` is a list: `[{"name": "t0", "num_embeddings": 1000000, "embedding_dim": 128, "feature_names": ["f0"]}, ...]`;
`feature_names` may be left out for the table's name, `ids_per_sample` is for `--zipf`.
"""

import argparse
import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError

from torchrec_scratchpipe.errors import ConfigError, MeasurementError, ScratchPipeError
from torchrec_scratchpipe.plan_report import GB, PlanReport, plot_plan
from torchrec_scratchpipe.sharder import ScratchPipeEmbeddingBagCollectionSharder
from torchrec_scratchpipe.sharding_planner import ScratchPipeShardingPlanner
from torchrec_scratchpipe.trace import read_trace
from torchrec_scratchpipe.working_set import WorkingSets, measure_working_set, zipf_working_sets

__all__ = ["main"]

OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "adam": EmbOptimType.ADAM,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a plan, or why there is none.

    Args:
        arguments: As on the command line, which is the default.

    Returns:
        The exit status: 0 for a plan, 1 for none, 2 for input that cannot be used.
    """
    args = _parse(arguments)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torchrec")
    try:
        report = _plan(args)
    except PlannerError as error:
        print(f"no plan: {error}", file=sys.stderr)
        return 1
    except ScratchPipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    if args.json:
        Path(args.json).write_text(json.dumps(_as_json(report), indent=2))
    if args.plot:
        plot_plan(report, args.plot)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m torchrec_scratchpipe.plan",
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
    parser.add_argument("--local_world_size", type=int, help="ranks per host; default: all, up to 8")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--hbm_gb", type=float, help="device memory of each GPU for embeddings")
    budget.add_argument("--scratchpad_gb", type=float, help="on a CPU: RAM of each rank for scratchpads")
    parser.add_argument("--ddr_gb", type=float, default=1024, help="host memory of each rank")
    parser.add_argument("--lookahead", type=int, help="default: 2, or 1 where no more fits")
    parser.add_argument("--num_batches_seen_ahead", type=int, default=0)
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
    parser.add_argument("--plot", help="write a picture there (needs matplotlib)")
    parser.add_argument("--json", help="write the plan's figures there")
    return parser.parse_args(arguments)


def _plan(args: argparse.Namespace) -> PlanReport:
    tables, ids_per_sample = _read_tables(args.tables)
    working_sets = _working_sets(args, tables, ids_per_sample)
    if args.save_working_sets:
        working_sets.save(args.save_working_sets)
    is_cpu = args.scratchpad_gb is not None
    planner = ScratchPipeShardingPlanner(
        topology=Topology(
            world_size=args.world_size,
            local_world_size=args.local_world_size or min(8, args.world_size),
            compute_device="cpu" if is_cpu else "cuda",
            hbm_cap=None if is_cpu else int(args.hbm_gb * GB),
            ddr_cap=int(args.ddr_gb * GB),
        ),
        batch_size=args.batch_size,
        working_sets=working_sets,
        lookahead=args.lookahead,
        scratchpad_bytes=int(args.scratchpad_gb * GB) if is_cpu else None,
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
        return WorkingSets.load(args.working_sets)
    lookahead = args.lookahead if args.lookahead is not None else 2
    if args.zipf is not None:
        return zipf_working_sets(
            tables,
            {name: number * args.batch_size for name, number in ids_per_sample.items()},
            args.zipf,
            lookahead,
            args.num_batches_seen_ahead,
            args.world_size,
        )
    return measure_working_set(
        read_trace(args.batches, tables, args.batch_size),
        tables,
        lookahead,
        num_batches_seen_ahead=args.num_batches_seen_ahead,
        max_batches=args.max_batches,
    )


def _read_tables(path: str) -> tuple[list[EmbeddingBagConfig], dict[str, float]]:
    """Configs, and ids per sample by table."""
    try:
        content = json.loads(Path(path).read_text())
        entries: list[dict[str, Any]] = [dict(entry) for entry in content]
    except (OSError, ValueError, TypeError) as error:
        raise MeasurementError(f"{path}: not a JSON list of tables ({error}).") from error
    configs, ids_per_sample = [], {}
    for index, entry in enumerate(entries):
        try:
            name = str(entry.pop("name"))
            ids_per_sample[name] = float(entry.pop("ids_per_sample", 1.0))
            features = [str(feature) for feature in entry.pop("feature_names", [name])]
            num_embeddings, embedding_dim = int(entry.pop("num_embeddings")), int(entry.pop("embedding_dim"))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}, table {index}: {error} is missing or is not what it should be.") from error
        if entry:
            raise ConfigError(f"{path}, table {name}: {', '.join(entry)} is not known here. Leave it out.")
        if num_embeddings < 1 or embedding_dim < 4 or embedding_dim % 4:
            raise ConfigError(
                f"{path}, table {name}: {num_embeddings} rows of {embedding_dim}; FBGEMM needs a row and a multiple of 4."
            )
        configs.append(
            EmbeddingBagConfig(
                name=name, num_embeddings=num_embeddings, embedding_dim=embedding_dim, feature_names=features
            )
        )
    return configs, ids_per_sample


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
        "ranks": [{name: float(value) for name, value in dataclasses.asdict(rank).items()} for rank in report.ranks],
    }


if __name__ == "__main__":
    sys.exit(main())
