# SPDX-License-Identifier: BSD-3-Clause
"""The Criteo example's command: what it refuses, what it says, how it counts, how it ends."""

import json
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import Script, run_script

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES / "criteo_dlrm"))
sys.path.insert(0, str(EXAMPLES / "benchmark"))

from test_examples import read_figures, run_example, small_run, tsv, write_tsv  # noqa: E402, F401

from torchrec_scratchpipe import PoolStats, Stage, StageSpan  # noqa: E402

MAIN = EXAMPLES / "criteo_dlrm" / "main.py"
SHORT = [
    "--limit_train_batches", "6", "--limit_val_batches", "1", "--max_num_embeddings", "300", "--embedding_dim", "8",
    "--batch_size", "16", "--dense_arch_layer_sizes", "16,8", "--over_arch_layer_sizes", "16,1",
]  # fmt: skip

REFUSED = [
    (["--lookahead", "0"], r"argument --lookahead: got '0', needs a whole number of at least 1"),
    (["--batch_size", "0"], r"argument --batch_size: got '0', needs a whole number of at least 1"),
    (["--batch_size", "many"], r"argument --batch_size: got 'many', needs a whole number"),
    (["--epochs", "0"], r"argument --epochs: got '0'"),
    (["--limit_train_batches", "0"], r"argument --limit_train_batches: got '0'"),
    (["--num_embeddings", "0"], r"argument --num_embeddings: got '0'"),
    (["--seed", "-1"], r"argument --seed: got '-1', needs a whole number of at least 0"),
    (["--validation_freq_within_epoch", "0"], r"argument --validation_freq_within_epoch: got '0'"),
    (["--num_batches_seen_ahead", "501"], r"needs a whole number of at least 0 and below 501"),
    (["--load_factor", "0"], r"argument --load_factor: got '0', needs a number above 0, at most 1"),
    (["--load_factor", "1.5"], r"argument --load_factor: got '1.5', needs a number above 0, at most 1"),
    (["--scratchpad_budget_gb", "0"], r"argument --scratchpad_budget_gb: got '0', needs a number above 0"),
    (["--learning_rate", "nan"], r"argument --learning_rate: got 'nan', needs a number of at least 0"),
    (["--embedding_dim", "6"], r"--embedding_dim is 6, FBGEMM needs a multiple of 4"),
    (["--dense_arch_layer_sizes", "a,b"], r"got 'a,b', needs positive whole numbers"),
    (["--over_arch_layer_sizes", "8,2"], r"--over_arch_layer_sizes is 8,2, the last needs to be 1"),
    (["--num_embeddings_per_feature", "1,2"], r"--num_embeddings_per_feature: 2 numbers, needs 26"),
    (["--criteo_tsv", "none.tsv"], r"--criteo_tsv none.tsv: no such file"),
    (["--hbm_budget_gb", "1"], r"--hbm_budget_gb is for a GPU"),
    (
        ["--num_embeddings", "1000000000"],
        r"need 6,656.0 GB of RAM.* are free\. Cap .*--max_num_embeddings.*--table_dir",
    ),
    (["--plot", "DIR/out.foo"], r"--plot DIR/out.foo: a picture's name ends in one of .*\.png"),
    (["--plot", "DIR/out.png", "--embedding_cache", "fused"], r"--embedding_cache fused has none"),
    (["--plot", "DIR/file/out.png"], r"--plot DIR/file/out.png: cannot be written \((File exists|Not a directory)\)"),
    (["--json", "DIR/file/out.json"], r"--json DIR/file/out.json: cannot be written"),
    (["--json", "DIR"], r"--json DIR: cannot be written \(Is a directory\)"),
    (["--profile_trace", "DIR/file/trace.json"], r"--profile_trace DIR/file/trace.json: cannot be written"),
    (["--working_sets", "DIR/file/sets.json"], r"--working_sets DIR/file/sets.json: cannot be written"),
    (["--save_dir", "DIR/file"], r"--save_dir DIR/file: cannot be written"),
    (["--table_dir", "DIR/none"], r"--table_dir DIR/none: cannot be written \(No such file or directory\)"),
]


@pytest.mark.parametrize(
    ("flags", "message"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_cannot_be_done_is_one_line_before_any_work(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["main.py", *(flag.replace("DIR", str(tmp_path)) for flag in flags)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(MAIN), run_name="__main__")
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert re.fullmatch(f"main.py: error: .*{message.replace('DIR', re.escape(str(tmp_path)))}.*\n", err), err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def failing_run(*flags: str, is_forked: bool = True) -> tuple[int, list[str]]:
    command = [str(MAIN), *SHORT, *flags]
    result = (
        run_script(*command)
        if is_forked
        else subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=False)
    )
    return result.returncode, result.stderr.splitlines()


def test_errors_of_planning_and_of_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "sets.json").write_text("{")
    flags = ("--scratchpad_budget_gb", "0.01", "--working_sets", str(tmp_path / "sets.json"))
    status, lines = failing_run(*flags, is_forked=False)  # what it imports says nothing either
    assert (status, len(lines)) == (1, 1), lines
    assert "not a measurement of working sets" in lines[0]
    status, lines = failing_run("--scratchpad_budget_gb", "0.00001")
    assert (status, len(lines)) == (1, 1), lines
    assert re.match(
        r"main.py: error: .*Do (?:this|one of): set --scratchpad_budget_gb to at least [\d,]+ bytes", lines[0]
    )


def test_an_error_in_mid_training_is_one_line_with_the_place(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "bad.tsv", 100)
    lines = path.read_text().splitlines()
    lines[50] = "x" + lines[50]
    path.write_text("\n".join(lines))
    status, lines = failing_run("--criteo_tsv", str(path))
    assert status == 1
    assert [line for line in lines if not line.startswith("epoch") and line] == [
        f"main.py: error: {path}, line 51, column 1: the label is 'x{path.read_text().splitlines()[50][1]}', "
        "needs to be 0 or 1."
    ]


def test_help_shows_defaults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(MAIN), run_name="__main__")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for flag, default in (
        ("batch_size", "1024"),
        ("learning_rate", "0.02"),
        ("num_measured_batches", "200"),
        ("epochs", "1"),
    ):
        assert re.search(rf"--{flag} {flag.upper()}\s.*\(default: {default}\)", out)
    assert "None" not in out


def test_output_is_short_and_outputs_get_their_directories(tmp_path: Path) -> None:
    flags = [
        "--json",
        str(tmp_path / "a" / "b" / "out.json"),
        "--plot",
        str(tmp_path / "c" / "out.png"),
        "--load_factor",
        "0.5",
    ]
    out = run_example(str(MAIN), *SHORT, *flags, "--limit_val_batches", "0")
    first, *_, last = out.splitlines()
    assert re.match(r"tables: 5,606 rows x 8, 0\.2 MB in RAM, optimizer state included; --max_num_embeddings", first)
    assert last.startswith("summary: not validated | ")
    assert len(out.splitlines()) == 3
    figures = read_figures(tmp_path / "a" / "b" / "out.json")
    assert (figures["auroc"], figures["num_train_batches"]) == (None, 6)
    assert (tmp_path / "c" / "out.png").stat().st_size > 10_000


def test_ctrl_c_without_a_save_dir_is_one_line_and_130() -> None:
    job = Script(str(MAIN), *SHORT, "--limit_train_batches", "100000")
    while "1/100000" not in job.error():  # the progress bar
        assert job.is_running, job.error()
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    result = job.end()
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == "interrupted: nothing was saved"
    assert "Traceback" not in result.stderr


def test_a_finished_run_that_is_resumed_says_so(tsv: Path, tmp_path: Path) -> None:  # noqa: F811
    flags = small_run(tsv, "--save_dir", str(tmp_path / "saved"), "--json", str(tmp_path / "out.json"))
    run_example(*flags, "--limit_train_batches", "7")
    out = run_example(*flags, "--limit_train_batches", "7", "--resume")
    where = tmp_path / "saved" / "step_000000000007"
    assert f"resumed from {where}: nothing is left to train" in out.splitlines()
    assert "nothing was left to train" in out.splitlines()[-1]
    assert "nan" not in out
    assert read_figures(tmp_path / "out.json")["samples_per_second"] is None
    json.loads((tmp_path / "out.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    out = run_example(*flags, "--limit_train_batches", "9", "--resume")
    assert f"resumed from {where}: epoch 1 of 1, batch 8 of 9 is next" in out.splitlines()


def pool_stats(num_batches: int, num_unique_ids: int, num_unique_misses: int) -> PoolStats:
    names = PoolStats.__dataclass_fields__
    values: dict[str, Any] = {**dict.fromkeys(names, 0), "table_names": (), "tables": ()}
    counts = {"num_batches": num_batches, "num_unique_ids": num_unique_ids, "num_unique_misses": num_unique_misses}
    return PoolStats(**(values | counts))


def test_counts_are_of_the_batches_asked_for_and_without_validation() -> None:
    from report import ScratchpadCounts

    misses_of = [100 - step for step in range(20)]  # of training batches, from cold
    planned: list[int] = []
    counts = ScratchpadCounts(
        lambda: [pool_stats(len(planned), 2 * sum(planned), sum(planned))], ends=[10, 20, 4, 12], lookahead=2
    )
    for step in range(20):
        end = min(20, 15 * (step // 15 + 1))  # validation after the 15th and the last batch: nothing is planned beyond
        num_planned = min(step + 1 + 2, end)
        is_validated = step >= 15
        planned[:] = (
            misses_of[:num_planned] if not is_validated else [*misses_of[:15], 7, 7, 7, *misses_of[15:num_planned]]
        )
        counts.step_done(step + 1)
        if step == 14:
            with counts.validation():
                planned += [7, 7, 7]
    for first, last in ((10, 20), (4, 12)):
        expected = sum(misses_of[first:last]) / (last - first)
        part = {"first_batch": first + 1, "last_batch": last}
        assert counts.between(first, last) == {**part, "unique_ids": 2 * expected, "misses": expected}
    assert counts.between(4, 21) is None


def span(batch: int, stage: Stage, start_ms: float, width_ms: float) -> StageSpan:
    return StageSpan(batch, stage, start_ms / 1e3, (start_ms + width_ms) / 1e3, 1000)


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The picture of 40 batches of which the last 10 are validated, as Matplotlib has it."""
    import matplotlib.pyplot as plt
    import picture

    widths = {Stage.PLAN: 2.0, Stage.COLLECT: 0.3, Stage.EXCHANGE: 0.01, Stage.INSERT: 0.3, Stage.TRAIN: 10.0}
    spans = [
        span(batch, stage, 20 * batch + (30 if stage is Stage.TRAIN else -17 * (batch % 2)), width)
        for batch in range(1, 41)  # two at a time are planned
        for stage, width in widths.items()
    ]
    monkeypatch.setattr(plt, "close", lambda _: None)
    picture.plot([spans], [(0.02 * 31 + 0.02, 10.0)], str(tmp_path / "out.png"))
    figure = plt.gcf()
    yield figure
    monkeypatch.undo()
    plt.close(figure)


def test_numbers_of_the_picture_stand_inside_the_axes_and_apart(drawn: Any) -> None:
    timeline = drawn.axes[0]
    drawn.canvas.draw()
    inside = timeline.get_window_extent()
    boxes = [text.get_window_extent() for text in timeline.texts]
    assert 8 + 4 <= len(boxes) < 16  # all of Train; of those planned at once, one
    assert all(inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes)
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])


def test_every_stage_of_the_picture_can_be_seen(drawn: Any) -> None:
    import picture
    from matplotlib.colors import to_rgb

    timeline = drawn.axes[0]
    drawn.canvas.draw()
    assert len({round(bar.get_y(), 1) for bar in timeline.patches}) == len(picture.STAGES)
    for bar in timeline.patches:
        assert bar.get_window_extent().width > 2  # pixels
        assert sum(to_rgb(bar.get_facecolor())) < 2.4, "too pale"


def test_validation_is_marked_and_the_legend_covers_no_data(drawn: Any) -> None:
    drawn.canvas.draw()
    _, times, moved = drawn.axes
    marked = {round(patch.get_x() + 0.5) for patch in moved.patches if patch.get_height() == 1}
    assert marked == set(range(31, 41))
    legend = times.get_legend()
    assert [text.get_text() for text in legend.get_texts()].count("validation") == 1
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in drawn.axes)


def run_forked(command: list[str], **_: Any) -> None:
    """As subprocess.run with `check` does, of a script in Python."""
    assert command[0] == sys.executable
    run_example(*map(str, command[1:]))


def test_figures_of_the_readme_are_made_by_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import figures

    flags = figures.demo_flags()
    assert flags[:2] == ["--batch_size", "256"]
    assert "--json" not in flags
    path = write_tsv(tmp_path / "criteo.tsv", 3000)
    flags = ["--criteo_tsv", str(path), "--budgets_mb", "7", "--limit_train_batches", "40"]
    monkeypatch.setattr(sys, "argv", ["figures.py", *flags])
    monkeypatch.setattr(subprocess, "run", run_forked)
    figures.main()
    equality, planning = capsys.readouterr().out.splitlines()
    assert re.match(
        r"\| 3,000 real Criteo rows .* \| largest difference 0\.0 over 27\.6 M weights and 27\.6 M", equality
    )
    assert re.match(
        r"\| misses per batch, .* at 1 budgets, .* \| planned is \d\.\d % (less|more) to \d\.\d %", planning
    )
    readme = (EXAMPLES.parent / "README.md").read_text()
    for row in (equality, planning):  # what the row is called, and what its command is
        what = re.sub(r"at 1 budgets", "at four budgets", row.split("|")[1].replace("3,000", "10,000")).strip()
        (line,) = [line for line in readme.splitlines() if what in line]
        assert "`python examples/criteo_dlrm/figures.py --criteo_tsv FILE`" in line
