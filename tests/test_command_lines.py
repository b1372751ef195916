# SPDX-License-Identifier: BSD-3-Clause
"""Command lines are stable: an option that people script against does not go unnoticed."""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parent.parent

# By command. Change it together with an entry in CHANGELOG.md; what is taken away is also listed in REMOVED.
OPTIONS: dict[str, str] = {
    "examples/benchmark/bandwidth.py": """
        --embedding_dim --rows_per_batch --num_rows --json
    """,
    "examples/benchmark/checkpoint_memory.py": """
        --sizes_gb --dir --json --one
    """,
    "examples/benchmark/delta_log.py": """
        --blocks --deltas --dir --gb --interval --rounds
    """,
    "examples/benchmark/disk_tier.py": """
        --table_dir --cap_gb --ram_budget_gb --num_tables --num_embeddings --embedding_dim --batch_size --zipf
        --num_batches_seen_ahead --load_factor --warmup --steps --rounds --ways --json --way --group
    """,
    "examples/benchmark/expected_traffic.py": """
        --zipf --load_factor --lookahead --bus_gb_per_s
    """,
    "examples/benchmark/larger_than_ram.py": """
        --table_dir --stride --num_tables --num_embeddings --embedding_dim --batch_size --zipf --num_slots
        --ram_budget_gb --steps --json --size
    """,
    "examples/benchmark/miss_rates.py": """
        --criteo_tsv --budgets_mb --skip_training --json
    """,
    "examples/benchmark/monitor.py": """
        --blocks
    """,
    "examples/benchmark/parquet.py": """
        --num_rows --rows_per_group --batch_size --num_readers --rounds --json
    """,
    "examples/benchmark/plan_speed.py": """
        --num_batches_seen_ahead --num_batches
    """,
    "examples/benchmark/predict.py": """
        --machine --measured
    """,
    "examples/benchmark/private_training.py": """
        --rows --ids_per_bag --batch_size --num_tables --embedding_dim --zipf --rounds --eager_steps --apart
    """,
    "examples/benchmark/train_step.py": """
        --quick --caches --model --num_tables --num_embeddings --embedding_dim --ids_per_bag --batch_size
        --num_device_tables --zipf --load_factor --lookahead --optimizer --steps --block_steps --table_dir
        --no_overlap --profile_trace --seed --out --json --seconds --host_memory_gb
    """,
    "examples/criteo_dlrm/figures.py": """
        --criteo_tsv --budgets_mb --limit_train_batches
    """,
    "examples/criteo_dlrm/main.py": """
        --criteo_tsv --parquet --num_readers
        --epochs --batch_size --limit_train_batches --limit_val_batches --num_embeddings
        --num_embeddings_per_feature --max_num_embeddings --seed --embedding_dim --dense_arch_layer_sizes
        --over_arch_layer_sizes --interaction_type --interaction_branch1_layer_sizes --interaction_branch2_layer_sizes
        --dcn_num_layers --dcn_low_rank_dim --learning_rate --eps --adagrad --lr_warmup_steps --lr_decay_start
        --lr_decay_steps --embedding_cache --load_factor --hbm_budget_gb --scratchpad_budget_gb --working_sets
        --zch_size --zch_policy --zch_eviction_interval --num_measured_batches --lookahead
        --num_batches_seen_ahead --host_access --table_dir --ram_budget_gb
        --save_dir --save_every --delta_every
        --keep_last --resume --validation_freq_within_epoch --print_lr --print_sharding_plan --verify --evaluate_stock
        --profile_trace --json --plot --html --stats_every --tensorboard_dir --json_lines
        --dp_noise_multiplier --dp_clip --dp_delta --dp_seed
    """,
    "torchrec_scratchpipe/__main__.py": "",  # those of the command that it runs
    "torchrec_scratchpipe/compact.py": """
        --keep_last
    """,
    "torchrec_scratchpipe/data/__main__.py": """
        --rows_per_group
    """,
    "torchrec_scratchpipe/disk.py": """
        --seconds --file_gb --json
    """,
    "torchrec_scratchpipe/plan.py": """
        --tables --batches --working_sets --zipf --batch_size --max_batches --save_working_sets --world_size
        --local_world_size --hbm_gb --scratchpad_gb --ddr_gb --ram_budget_gb --disk_reads_per_s --lookahead
        --num_batches_seen_ahead --optimizer --plot --html --json
    """,
}
REMOVED: dict[str, list[str]] = {}


class _ParserKnownError(Exception):
    """Ends a command once its parser is known."""


def options_of(command: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def parse_args(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        found.extend(name for name in parser._option_string_actions if name not in ("-h", "--help"))
        raise _ParserKnownError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [command])
    monkeypatch.syspath_prepend(str((ROOT / command).parent))
    with pytest.raises(_ParserKnownError):
        runpy.run_path(str(ROOT / command), run_name="__main__")
    return found


def takes_options(text: str) -> bool:
    return "argparse" in text or "import main" in text


def commands() -> list[str]:
    paths = [*ROOT.glob("examples/**/*.py"), *ROOT.glob("torchrec_scratchpipe/**/*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    return sorted(name for name, text in texts.items() if '__name__ == "__main__"' in text and takes_options(text))


def test_every_command_is_listed() -> None:
    assert sorted(OPTIONS) == commands()


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_no_option_is_lost(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = options_of(command, monkeypatch)
    listed = OPTIONS[command].split()
    assert sorted(set(listed) - set(found)) == [], "lost; scripts use them"
    assert sorted(set(found) - set(listed)) == [], "new; list them above, and in CHANGELOG.md"


def test_what_was_removed_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    for command, options in REMOVED.items():
        for option in options:
            assert option not in OPTIONS.get(command, "").split(), command
            assert f"`{option}`" in changelog, command
