# SPDX-License-Identifier: BSD-3-Clause
"""The example's command line: what it takes, and what it refuses before any work is done."""

import argparse
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from data import KAGGLE_CARDINALITIES, NUM_SPARSE

from torchrec_scratchpipe.core.slot_ops import MAX_BATCHES_SEEN_AHEAD


class UsageError(ValueError):
    """The command line asks for what cannot be done."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default wherever there is one and the text does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of so many flags would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def whole(least: int, below: int | None = None) -> Callable[[str], int]:
    """A type of argument: a whole number in a range."""
    need = f"a whole number of at least {least}" + (f" and below {below}" if below is not None else "")

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (below is not None and number >= below):
            raise argparse.ArgumentTypeError(f"got {text!r}, needs {need}. Change it, or leave it out.")
        return number

    return parse


def real(above: float | None = None, most: float = math.inf) -> Callable[[str], float]:
    """A type of argument: a finite number above one (default: at least 0) and not above another."""
    need = ("a number of at least 0" if above is None else f"a number above {above:g}") + (
        f", at most {most:g}" if most < math.inf else ""
    )

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        is_low = number < 0 if above is None else number <= above
        if not math.isfinite(number) or is_low or number > most:
            raise argparse.ArgumentTypeError(f"got {text!r}, needs {need}. Change it, or leave it out.")
        return number

    return parse


def whole_numbers(text: str) -> str:
    """A type of argument: positive whole numbers with commas between them; it stays text."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"got {text!r}, needs positive whole numbers, e.g. 512,256,1. Change it.")
    return text


def numbers_of(text: str) -> list[int]:
    """What :func:`whole_numbers` let pass."""
    return [int(part) for part in text.split(",")]


def parse_args(description: str) -> argparse.Namespace:
    """Read the command line, and refuse what cannot be done.

    Args:
        description: For `--help`.

    Returns:
        The arguments.
    """
    parser = _make_parser(description)
    args = parser.parse_args()
    args.budget_gb = args.hbm_budget_gb if torch.cuda.is_available() else args.scratchpad_budget_gb
    try:
        _check(args)
        if int(os.environ.get("RANK", 0)) == 0:  # which alone writes
            _check_outputs(args)
    except UsageError as error:
        parser.error(str(error))
    return args


def _make_parser(description: str) -> argparse.ArgumentParser:
    parser = _Parser(description=description, formatter_class=_HelpFormatter)
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    _add_optimizer(parser.add_argument_group("optimizer"))
    _add_privacy(parser.add_argument_group("private training"))
    _add_cache(parser.add_argument_group("embedding cache"))
    _add_saving(parser.add_argument_group("checkpoints"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--criteo_tsv", help="raw Criteo TSV, as it is or gzip'd; default: generated Criteo-shaped rows"
    )
    source.add_argument("--parquet", nargs="+", help="the same in Parquet: files, directories, globs or URLs")
    add("--num_readers", type=whole(1), help="threads that read --parquet ahead; default: 1")
    add("--epochs", type=whole(1), default=1, help="times that the training rows are gone through")
    add("--batch_size", type=whole(1), default=1024, help="samples per rank")
    add("--limit_train_batches", type=whole(1), help="per rank; default: all of a file, 100 of generated rows")
    add("--limit_val_batches", type=whole(0), help="per rank; default: all of a file, 20 of generated rows")
    add("--num_embeddings", type=whole(1), help="rows of every table; default: Criteo Kaggle's, 33.8 million in all")
    add("--num_embeddings_per_feature", type=whole_numbers, help=f"{NUM_SPARSE} numbers of rows, comma-separated")
    add("--max_num_embeddings", type=whole(1), help="cap on the rows of every table; default: none")
    add("--zch_size", type=whole(2), help="rows of every table, to which raw values are remapped; default: hash them")
    add("--zch_policy", choices=["lfu", "lru", "distance_lfu"], default="distance_lfu", help="whose row is taken")
    add("--zch_eviction_interval", type=whole(1), default=100, help="steps from one taking of rows to the next")
    add("--seed", type=whole(0), default=0, help="of weights and generated rows")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--embedding_dim", type=whole(4), default=64, help="width of a row; a multiple of 4")
    add("--dense_arch_layer_sizes", type=whole_numbers, default="512,256,64", help="the last becomes embedding_dim")
    add("--over_arch_layer_sizes", type=whole_numbers, default="512,512,256,1", help="the last is 1")
    add("--interaction_type", choices=["original", "dcn", "projection"], default="original", help="of the features")
    of_projection = "of projection; the last becomes 8 x embedding_dim"
    add("--interaction_branch1_layer_sizes", type=whole_numbers, default="512,256", help=of_projection)
    add("--interaction_branch2_layer_sizes", type=whole_numbers, default="512,256", help=of_projection)
    add("--dcn_num_layers", type=whole(1), default=3, help="of dcn")
    add("--dcn_low_rank_dim", type=whole(1), default=64, help="of dcn")


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--learning_rate", type=real(), default=0.02, help="of embeddings and dense layers")
    add("--eps", type=real(), default=1e-8, help="of Adagrad")
    add("--adagrad", action="store_true", help="Adagrad for embeddings and dense layers; default: SGD")
    add("--lr_warmup_steps", type=whole(0), default=0, help="steps from a tenth of the learning rate to all of it")
    add("--lr_decay_start", type=whole(0), default=0, help="step at which decay begins")
    add("--lr_decay_steps", type=whole(0), default=0, help="steps of decay; 0 is none")


def _add_privacy(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--dp_noise_multiplier",
        type=real(),
        help="train with differential privacy: standard deviation of the noise, in units of --dp_clip",
    )
    add("--dp_clip", type=real(0), help="largest norm of a sample's gradient; default: 1.0")
    add("--dp_delta", type=real(0, 1), help="of epsilon; default: a tenth of 1 / training samples")
    add(
        "--dp_seed",
        type=whole(0, 2**63),
        help="of noise and samples, to be kept secret; --resume needs the same; default: drawn from the system",
    )


def _add_cache(group: argparse._ArgumentGroup) -> None:
    kinds = ["scratchpipe", "fused"]
    add = group.add_argument
    add("--embedding_cache", choices=kinds, default="scratchpipe", help="fused: stock, all tables in memory")
    size = group.add_mutually_exclusive_group()
    size.add_argument("--load_factor", type=real(0, 1), help="slots per row of every table, in (0, 1]; default: 0.1")
    size.add_argument("--hbm_budget_gb", type=real(0), help="on a GPU: GiB of device memory per rank for embeddings")
    size.add_argument("--scratchpad_budget_gb", type=real(0), help="on a CPU: GiB of RAM per rank for scratchpads")
    add("--working_sets", help="saved measurement of the data; measured and written there if missing")
    add("--num_measured_batches", type=whole(1), default=200, help="of the first batches, for a budget")
    add("--lookahead", type=whole(1), help="batches planned ahead of Train; default: 2, or what the budget allows")
    add(
        "--num_batches_seen_ahead",
        type=whole(0, MAX_BATCHES_SEEN_AHEAD + 1),
        default=0,
        help="known beyond those, to evict less",
    )
    add("--host_access", choices=["direct", "staged"], default="direct", help="how a GPU reaches tables")
    add("--table_dir", help="existing directory for memory-mapped tables; default: RAM")
    add("--ram_budget_gb", type=real(0), default=0.5, help="with --table_dir: GiB of RAM per rank for their rows")


def _add_saving(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--save_dir",
        help="directory that all ranks share; saves at the end, and on SIGTERM or Ctrl-C, which end the run",
    )
    add("--save_every", type=whole(1), help="save after so many training batches too, while training goes on")
    add(
        "--delta_every",
        type=whole(1),
        help="log the rows that were trained after so many training batches, while training goes on; --resume goes on "
        "from there",
    )
    add("--keep_last", type=whole(1), help="keep so many checkpoints; default: all")
    add("--resume", action="store_true", help="go on from the latest checkpoint, if there is one")


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--validation_freq_within_epoch", type=whole(1), help="validate every so many training batches too")
    add("--print_lr", action="store_true", help="print the learning rate of every step")
    add(
        "--print_sharding_plan",
        action="store_true",
        help="print where every table went, and the planner's report of them",
    )
    add("--verify", action="store_true", help="train a stock twin and compare every bit")
    add("--evaluate_stock", action="store_true", help="evaluate plain TorchRec modules in the end, too")
    add("--profile_trace", help="write a trace of a few steps there, a JSON file for Perfetto")
    add("--json", help="write all figures there")
    add(
        "--stats_every",
        type=whole(1),
        default=100,
        help="batches of a window of live figures; validated ones count, too",
    )
    add("--tensorboard_dir", help="live figures go there, for TensorBoard (needs tensorboard)")
    add("--json_lines", help="live figures go to this file, one line of JSON per window")
    add("--html", help="write a report of the run there, one file to be read offline (needs matplotlib)")
    add("--plot", help="write a picture of the stages there (needs matplotlib)")


def rows_per_table(args: argparse.Namespace) -> list[int]:
    """Rows of each of the 26 tables."""
    return values_per_table(args) if args.zch_size is None else [args.zch_size] * NUM_SPARSE


def values_per_table(args: argparse.Namespace) -> list[int]:
    """Values that the data has for each of the 26 tables: its rows, unless values are remapped."""
    if args.num_embeddings_per_feature is not None:
        rows = numbers_of(args.num_embeddings_per_feature)
    else:
        rows = KAGGLE_CARDINALITIES if args.num_embeddings is None else [args.num_embeddings] * NUM_SPARSE
    return rows if args.max_num_embeddings is None else [min(number, args.max_num_embeddings) for number in rows]


def table_bytes(args: argparse.Namespace) -> int:
    """All tables with their optimizer state."""
    return sum(rows_per_table(args)) * args.embedding_dim * 4 * (2 if args.adagrad else 1)


def ram_bytes(args: argparse.Namespace) -> int:
    """What the tables take of this host's RAM, those of a stock twin included."""
    on_host = not torch.cuda.is_available()
    copies = int((args.embedding_cache == "scratchpipe" or on_host) and args.table_dir is None)
    copies += int(args.verify and on_host)
    share = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / int(
        os.environ.get("WORLD_SIZE", 1)
    )  # of all ranks, those here
    return int(copies * table_bytes(args) * share)


def available_ram_bytes() -> int | None:
    """RAM that a process can get now, swap included; None where the system does not tell."""
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.exists():
        return None
    values = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = sum(1024 * int(values[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        available = min(available, int(text))
    return available


def _check(args: argparse.Namespace) -> None:
    """What flags ask for together."""
    if args.budget_gb is None and (args.hbm_budget_gb is not None or args.scratchpad_budget_gb is not None):
        raise UsageError("--hbm_budget_gb is for a GPU, --scratchpad_budget_gb for a CPU; give the other one")
    about_scratchpads = [
        f"--{name}"
        for name in ("verify", "plot", "html", "tensorboard_dir", "json_lines")
        if getattr(args, name) not in (None, False)
    ]
    if args.embedding_cache == "fused" and about_scratchpads:
        raise UsageError(
            f"{' and '.join(about_scratchpads)}: about a scratchpad, --embedding_cache fused has none; use "
            "--embedding_cache scratchpipe"
        )
    _check_privacy(args)
    if args.save_dir is None and (args.save_every or args.delta_every or args.keep_last or args.resume):
        raise UsageError("--save_every, --delta_every, --keep_last and --resume need --save_dir")
    if args.evaluate_stock and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("--evaluate_stock is for one process: only rank 0 gets the plain modules")
    if args.embedding_dim % 4:
        raise UsageError(f"--embedding_dim is {args.embedding_dim}, FBGEMM needs a multiple of 4. Change it.")
    if numbers_of(args.over_arch_layer_sizes)[-1] != 1:
        raise UsageError(
            f"--over_arch_layer_sizes is {args.over_arch_layer_sizes}, the last needs to be 1, the logit. Add ,1"
        )
    if len(values_per_table(args)) != NUM_SPARSE:
        raise UsageError(f"--num_embeddings_per_feature: {len(values_per_table(args))} numbers, needs {NUM_SPARSE}")
    if args.criteo_tsv is not None and not Path(args.criteo_tsv).is_file():
        raise UsageError(f"--criteo_tsv {args.criteo_tsv}: no such file. Give the path of a raw Criteo TSV.")
    if args.num_readers is not None and args.parquet is None:
        raise UsageError("--num_readers is for --parquet; give that, or leave it out")
    needed, available = ram_bytes(args), available_ram_bytes()
    if available is not None and needed > available:
        raise UsageError(
            f"the tables need {as_size(needed)} of RAM, optimizer state included, and {as_size(available)} are free. "
            "Cap their rows with --max_num_embeddings, or keep them in files with --table_dir."
        )


def _check_privacy(args: argparse.Namespace) -> None:
    if args.dp_noise_multiplier is None:
        given = [f"--{name}" for name in ("dp_clip", "dp_delta", "dp_seed") if getattr(args, name) is not None]
        if given:
            raise UsageError(f"{' and '.join(given)}: for private training; give --dp_noise_multiplier, too")
        return
    reasons = {
        "adagrad": "tables must have SGD in private training; leave it out",
        "verify": "stock trains without noise, so that no bit would be equal; leave one of the two out",
        "delta_every": "deltas have rows without their noise; leave it out, and take --save_every",
        "zch_size": "which value has which row would tell of samples; leave it out, so that values are hashed",
    }
    for name, reason in reasons.items():
        if getattr(args, name):
            raise UsageError(f"--{name} and --dp_noise_multiplier: {reason}")
    if args.embedding_cache == "fused":
        raise UsageError("--dp_noise_multiplier needs --embedding_cache scratchpipe; stock TorchRec adds no noise")
    if args.dp_delta == 1:
        raise UsageError("--dp_delta is 1, needs to be below 1. Take less than 1 / training samples.")
    if args.resume and args.dp_seed is None:
        raise UsageError("--resume goes on with the same noise: give --dp_seed, as in the run before")


def as_size(num_bytes: float) -> str:
    """For people; decimal units."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _check_outputs(args: argparse.Namespace) -> None:
    """Whether all that is written in the end, or on the way, can be; makes missing directories."""
    if args.plot is not None:
        _check_picture(args.plot)
    if args.html is not None:
        _check_installed("--html", args.html, "matplotlib")
    if args.tensorboard_dir is not None:
        _check_installed("--tensorboard_dir", args.tensorboard_dir, "tensorboard")
        _check_directory("--tensorboard_dir", args.tensorboard_dir, may_make=True)
    for name in ("json", "plot", "html", "json_lines", "profile_trace", "working_sets"):
        path = getattr(args, name)
        if path is not None and not (name == "working_sets" and os.path.exists(path)):  # which is read then
            _check_file(f"--{name}", path)
    if args.save_dir is not None:
        _check_directory("--save_dir", args.save_dir, may_make=True)
    if args.table_dir is not None:
        _check_directory("--table_dir", args.table_dir, may_make=False)


def _check_installed(flag: str, path: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{flag} {path}: needs {package}. Install it, or leave {flag} out.")


def _check_picture(path: str) -> None:
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UsageError(f"--plot {path}: needs matplotlib. Install it, or leave --plot out.") from None
    endings = sorted(f".{ending}" for ending in FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix.lower() not in endings:
        raise UsageError(f"--plot {path}: a picture's name ends in one of {', '.join(endings)}. Rename it.")


def _check_file(flag: str, path: str) -> None:
    existed = os.path.exists(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab"):
            pass
        if not existed:
            os.unlink(path)
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise UsageError(f"{flag} {path}: cannot be written ({_reason(error)}). Give a file that can be.") from None


def _check_directory(flag: str, path: str, *, may_make: bool) -> None:
    try:
        if may_make:
            Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{flag} {path}: cannot be written ({_reason(error)}). Give a directory that can be."
        ) from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
