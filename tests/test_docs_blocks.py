# SPDX-License-Identifier: BSD-3-Clause
"""Every block of Python in a document runs, in the order of its page, on a CPU.

A page is either a program of its own (the tutorial) or talks of a job that the reader has. For the latter a test has
the job. A block that does not run stands in SKIPPED, with the reason. Blocks of other kinds are text: what a program
prints, a drawing, or commands, whose options are compared with those that the commands have.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
import torch.distributed as dist
from helpers import NUM_DENSE, Setting, TinyModel, Trainer, is_embedding, make_batches
from processes import run_script
from pyarrow import parquet
from safetensors.torch import save_file
from test_command_lines import OPTIONS
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import CheckpointManager, scratchpad_stats, to_stock
from torchrec_scratchpipe.checkpoint.delta_chain import Chain
from torchrec_scratchpipe.checkpoint.files import Manifest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)

RUN_HERE = {
    "README.md",
    "docs/planning.md",
    "docs/monitoring.md",
    "docs/privacy.md",
    "docs/checkpointing.md",
    "docs/tutorial.md",
    "docs/data.md",
}

# By document and number of the block, from 0. Each with the reason.
SKIPPED = {
    ("docs/package_index.md", 0): "the block of README.md, which runs; test_packaging.py compares the two",
}
# What stands for a line that needs a GPU.
ON_A_CPU = ("working_sets=working_sets)", "working_sets=working_sets, scratchpad_bytes=SCRATCHPAD_BYTES)")

SETTING = Setting(num_rows=(2000, 1500, 3), dims=(32, 32, 32), num_batches=30, batch_size=16)


def blocks(document: str, language: str = "python") -> list[str]:
    found = FENCE.findall((ROOT / document).read_text())
    return [block for kind, block in found if kind == language]


def run(document: str, names: dict[str, Any], *, after: dict[int, Callable[[], None]] | None = None) -> None:
    """Run a page's blocks in order in one namespace; after some of them, do something."""
    for number, block in enumerate(blocks(document)):
        if (document, number) not in SKIPPED:
            exec(block.replace(*ON_A_CPU), names)
            (after or {}).get(number, lambda: None)()


def names_of_an_unsharded_job() -> dict[str, Any]:
    """What README.md and docs/planning.md take from the reader's job."""
    model = TinyModel(SETTING)
    names: dict[str, Any] = {
        "train_loader": make_batches(SETTING), "model": model, "B": SETTING.batch_size, "pg": dist.group.WORLD,
        "topology": Topology(world_size=1, compute_device="cpu"), "device": torch.device("cpu"), "optimizer": None,
        "SCRATCHPAD_BYTES": 120_000,
    }  # fmt: skip

    def shard(*args: Any, **kwargs: Any) -> nn.Module:
        """As DistributedModelParallel, and the optimizer that a job makes next."""
        sharded = DistributedModelParallel(*args, **kwargs)
        dense = {name: value for name, value in sharded.named_parameters() if not is_embedding(name)}
        wrapped = KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.SGD(parameters, lr=0.05))
        names["optimizer"] = CombinedOptimizer([sharded.fused_optimizer, wrapped])
        return sharded

    names["DistributedModelParallel"] = shard
    return names


def train(names: dict[str, Any]) -> None:
    """All batches; every row was there."""
    batches = iter(names["train_loader"])
    for _ in names["train_loader"]:
        names["pipeline"].progress(batches)
    pools = scratchpad_stats(names["model"])
    assert pools
    assert all(pool.num_misses_at_train == 0 < pool.num_batches for pool in pools)


def test_every_block_of_python_is_run_or_has_a_reason() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    with_blocks = {page for page in pages if blocks(page)}
    assert with_blocks == {*RUN_HERE, *(page for page, _ in SKIPPED)}
    for (page, number), reason in SKIPPED.items():
        assert len(blocks(page)) > number
        assert len(reason.split()) > 3


def test_a_block_says_what_it_is() -> None:
    """No other name for Python, by which a block would escape."""
    for path in DOCUMENTS:
        kinds = {kind for kind, _ in FENCE.findall(path.read_text())}
        assert kinds <= {"python", "text", "diff", ""}, path.name
        assert path.read_text().count("```") == 2 * len(FENCE.findall(path.read_text())), path.name
        for block in blocks(path.relative_to(ROOT).as_posix(), ""):
            assert not re.search(r"^(import|from) \w", block, flags=re.MULTILINE), f"{path.name}: {block}"


@pytest.mark.parametrize("document", ["README.md", "docs/planning.md"])
def test_the_blocks_about_a_budget(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of_an_unsharded_job()
    names |= {"CheckpointManager": CheckpointManager, "num_batches_trained": 30, "rank": 0, "world_size": 1}
    write_days()
    run(document, names, after={0: lambda: train(names)})
    assert names["planner"].report.lookahead == names["pipeline"].lookahead
    if document == "README.md":
        names["checkpoints"].wait()
        assert names["found"] is None
        assert names["checkpoints"].steps() == [30]
        assert type(names["sharders"][0]).__name__ == "ManagedCollisionEmbeddingBagCollectionSharder"
    else:
        assert (tmp_path / "working_sets.json").exists()
        assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_the_block_about_monitoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    setting = Setting(num_batches=101)
    ours = Trainer.scratchpipe(setting)
    names = {"model": ours.model, "pipeline": ours.pipeline(), "train_loader": make_batches(setting)}
    (block,) = blocks("docs/monitoring.md")
    before, after = block.split("# ... train as before ...\n")
    exec(before, names)
    train(names)
    exec(after, names)
    assert len((tmp_path / "windows.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert list((tmp_path / "runs").glob("events.*"))


@pytest.mark.usefixtures("process_group")
def test_the_blocks_about_privacy(tmp_path: Path) -> None:
    setting = replace(SETTING, optimizer=torch.optim.SGD, optimizer_kwargs=(("lr", 0.1),))
    trainer = Trainer.scratchpipe(setting)
    examples = make_batches(replace(setting, batch_size=1, num_batches=50))

    def collate(drawn: list[Batch]) -> Batch:
        """Examples as one batch, which may have none of them."""
        features = [example.sparse_features for example in drawn] or [examples[0].sparse_features]
        tables = range(len(features[0].keys()))
        ids = [[example[key].values() for example in features] for key in features[0].keys()]  # noqa: SIM118
        lengths = [[example.lengths()[table] for example in features if drawn] for table in tables]
        return Batch(
            torch.cat([example.dense_features for example in drawn]) if drawn else torch.zeros(0, NUM_DENSE),
            KeyedJaggedTensor(
                features[0].keys(),
                torch.cat([some for of_key in ids for some in of_key]) if drawn else torch.zeros(0, dtype=torch.int64),
                lengths=torch.tensor([some for of_key in lengths for some in of_key], dtype=torch.int64),
                stride=len(drawn),
            ),
            torch.cat([example.labels for example in drawn]) if drawn else torch.zeros(0),
        )

    def train_some(pipeline: Any, loader: Any) -> None:
        batches = itertools.islice(iter(loader), 12)
        for _ in range(12):
            pipeline.progress(batches)

    names = {
        "dataset": examples, "DataLoader": torch.utils.data.DataLoader, "collate": collate, "secret_number": 5,
        "model": trainer.model, "optimizer": trainer.optimizer, "device": torch.device("cpu"), "train": train_some,
    }  # fmt: skip
    block = blocks("docs/privacy.md")[0].replace("2048 / len(dataset)", "0.05")
    exec(block, names)
    assert names["pipeline"].epsilon(delta=1e-6) > 0
    names |= {"CheckpointManager": CheckpointManager, "directory": tmp_path, "step": 12, "final_step": 13}
    exec(blocks("docs/privacy.md")[1], names)
    pending = [Manifest.read(path).is_noise_pending for path in sorted(tmp_path.glob("step_*"))]
    assert pending == [True, False]


def test_every_block_of_checkpointing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    setting = Setting(num_batches=12)
    ours = Trainer.scratchpipe(setting)
    weights = torch.rand(150, 8)
    np.save("t0.npy", torch.rand(200, 8).numpy())
    save_file({"sparse.t2.weight": torch.full((3, 8), 0.5)}, "pretrained.safetensors")

    def make_model() -> TinyModel:
        return TinyModel(setting).to_empty(device="cpu")

    names: dict[str, Any] = {
        "itertools": itertools, "torch": torch, "model": ours.model, "optimizer": ours.optimizer,
        "pipeline": ours.pipeline(), "train_loader": make_batches(setting), "num_steps": 12, "save_every": 5,
        "schedule": 0.1, "batch": make_batches(setting)[0],
        "make_model": make_model, "weights": weights,
    }  # fmt: skip

    def as_of_the_latest() -> None:
        assert names["checkpoints"].steps() == [5, 10]
        names["step"] = 10

    def as_before() -> None:
        assert [one.step for one in Chain.read(tmp_path / "logged").sets] == [11]
        names["step"], names["checkpoints"] = 10, CheckpointManager("checkpoints")

    logging = Trainer.scratchpipe(setting)
    names["logged"] = CheckpointManager("followed", delta_every=1)
    pipeline, batches = logging.pipeline(), iter(make_batches(setting))
    for step in range(1, 9):
        pipeline.progress(batches)
        names["logged"].trained(step, logging.model, logging.optimizer)
    names["logged"].wait()

    assert len(blocks("docs/checkpointing.md")) == 8
    run("docs/checkpointing.md", names, after={0: as_of_the_latest, 1: as_before})
    assert names["lag"][:2] == (8, 0)
    for name, value in to_stock(logging.model).state_dict().items():
        assert torch.equal(value, names["served"].state_dict()[name]), name
    assert isinstance(names["plain"].ebc, EmbeddingBagCollection)
    state = to_stock(ours.model).state_dict()
    assert torch.equal(state["ebc.embedding_bags.t1.weight"], weights)
    assert torch.equal(state["ebc.embedding_bags.t2.weight"], torch.full((3, 8), 0.5))


def write_days() -> None:
    """Files for what README.md and docs/data.md say of Parquet."""
    Path("days").mkdir()
    columns = {"click": [0, 1] * 30, "age": [30] * 60, "price": [0.5] * 60, "user": list(range(60))}
    columns |= {"item": ["a", "b", None] * 20, "tags": [[1, 2], [], None] * 20}
    parquet.write_table(pyarrow.table(columns), "days/0.parquet")


def test_every_block_about_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_days()
    ours = Trainer.scratchpipe(Setting(num_batches=1))
    trained: list[Any] = []
    names: dict[str, Any] = {
        "rank": 0, "world_size": 1, "train": trained.append, "num_batches_trained": 3, "step": 1, "model": ours.model,
        "optimizer": ours.optimizer, "checkpoints": CheckpointManager(tmp_path / "checkpoints"),
    }  # fmt: skip
    run("docs/data.md", names)
    assert [batch.sparse_features.keys() for batch in trained] == [["user", "item", "tags"]] * 2
    assert names["batches"].state_dict(0)["epoch"] == 3


def shape_of(text: str) -> list[str]:
    """What was printed without its numbers and its spaces, which differ between machines."""
    return [" ".join(re.sub(r"\d[\d,.]*", "#", line).split()) for line in text.strip().splitlines()]


def test_the_tutorial_prints_what_it_says(tmp_path: Path) -> None:
    mark = "### the next block"
    script = tmp_path / "tutorial.py"
    program = f"\nprint('{mark}', flush=True)\n".join(blocks("docs/tutorial.md"))
    script.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{program}")
    result = run_script(str(script))
    assert result.returncode == 0, result.stderr[-3000:]
    printed = result.stdout.split(mark)
    expected = blocks("docs/tutorial.md", "text")
    assert len(printed) == len(expected) == 9
    for found, wanted in zip(printed, expected, strict=True):
        assert shape_of(found) == shape_of(wanted)
    assert result.stdout.count(": True") == 4
    assert "False" not in result.stdout
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_control_another_output_is_noticed() -> None:
    assert shape_of("loss 0.0896\n a  1,204.5 of 3") == shape_of("loss 0.1\na 7 of 2,000")
    assert shape_of("loss 0.0896") != shape_of("loss: 0.0896")
    assert shape_of("same: True") != shape_of("same: False")


COMMANDS = {
    "torchrec-scratchpipe plan": "torchrec_scratchpipe/plan.py",
    "scratchpipe-plan": "torchrec_scratchpipe/plan.py",
    "python -m torchrec_scratchpipe.plan": "torchrec_scratchpipe/plan.py",
    "torchrec-scratchpipe compact": "torchrec_scratchpipe/compact.py",
    "torchrec-scratchpipe disk": "torchrec_scratchpipe/disk.py",
    "python -m torchrec_scratchpipe.disk": "torchrec_scratchpipe/disk.py",
}


def unknown_options(text: str) -> list[str]:
    """Options in commands of a document, in blocks or between backticks, that the command does not have."""
    found = []
    for code in [*re.findall(r"`([^`\n]+)`", text), *(block for kind, block in FENCE.findall(text) if not kind)]:
        for line in code.replace("\\\n", " ").splitlines():
            script = re.search(r"examples/\w+/\w+\.py", line)
            known = {script[0]} if script else {file for command, file in COMMANDS.items() if line.startswith(command)}
            for command in known & OPTIONS.keys():
                options = [*OPTIONS[command].split(), "--help"]
                given = re.findall(r"(?<!\S)--\w+", line.split("#")[0].partition(command)[2] if script else line)
                found += [f"{command} {option}" for option in given if option not in options]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_option_of_a_command_exists(document: Path) -> None:
    if document.name != "CHANGELOG.md":  # which names what was taken away, too
        assert unknown_options(document.read_text()) == []


def test_control_an_unknown_option_is_noticed() -> None:
    text = "```\npython examples/criteo_dlrm/main.py --verify --wrong  # --not_this\n```\n`scratchpipe-plan --zip 1`"
    assert sorted(unknown_options(text)) == [
        "examples/criteo_dlrm/main.py --wrong",
        "torchrec_scratchpipe/plan.py --zip",
    ]
