"""Polled while the trainers' own savers write, and killed half-way: no checkpoint is taken for whole before it is."""

import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISREG
from typing import Any

import pytest
from on_disk import assert_merges_to, copied, original
from savers import Order, Save, Savers, expected

from assayer import formats
from assayer.watch.ready import examine
from assayer.watch.scan import scan

# Each saver with the name that its checkpoint gets, and its number of ranks.
SAVERS = [
    ("dcp", "step_1", 1),
    ("dcp", "step_1", 2),
    ("dcp_async", "step_1", 2),
    ("dcp_rank_local", "step_1", 2),
    ("rank_files", "checkpoint-1", 2),
    ("single_file", "m_step1.pt", 1),
    ("lightning_file", "epoch=0-step=1.ckpt", 1),
    ("accelerate", "checkpoint_0", 1),
    ("accelerate_fsdp", "checkpoint_0", 2),
    ("deepspeed_2", "global_step30", 1),
    ("deepspeed_3", "global_step30", 1),
]
IDS = [f"{saver}-{ranks}" for saver, _, ranks in SAVERS]


@pytest.fixture(scope="module")
def savers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Savers]:
    made = Savers(tmp_path_factory.mktemp("savers") / "log.txt")
    yield made
    made.close()


def needs(saver: str) -> None:
    if saver == "lightning_file" and not find_spec("lightning"):
        pytest.skip("Lightning is not installed")


def whole(path: Path) -> str | None:
    """The identity of a checkpoint that is taken for whole without any quiet period; None while it is not."""
    try:
        found = formats.identify_path(str(path))
        if found is None or formats.of(found.checkpoint).unmarked(found.listing):
            return None
    except OSError:
        return None
    return examine(found, None, time.time(), first_look=True, quiet_period=0).identity


def polled(save: Save, path: Path) -> list[str]:
    """The identities under which the checkpoint was taken for whole, one after another, until the save has ended."""
    seen: list[str] = []
    while not save.ended(0.001):
        one = whole(path)
        if one and one not in seen[-1:]:
            seen.append(one)
    return seen


def fast(*savers: tuple[str, int]) -> list[Any]:
    """All savers; those that are not given are slow."""
    return [
        pytest.param(*one, marks=[] if one[::2] in savers else [pytest.mark.slow], id=name) for one, name in zip(SAVERS, IDS, strict=True)
    ]


@pytest.mark.parametrize(
    ("saver", "name", "ranks"),
    fast(
        *(("dcp", 2), ("dcp_async", 2), ("dcp_rank_local", 2), ("rank_files", 2), ("single_file", 1)),
        *(("accelerate", 1), ("accelerate_fsdp", 2), ("deepspeed_2", 1), ("deepspeed_3", 1)),
    ),
)
def test_what_is_taken_for_whole_during_a_save_is_what_the_save_leaves(
    savers: Savers, tmp_path: Path, saver: str, name: str, ranks: int
) -> None:
    needs(saver)
    order = Order(saver, str(tmp_path / name), 1, ranks)
    with savers.saving(order) as save:
        seen = polled(save, tmp_path / name)
    assert save.status == 0
    last = whole(tmp_path / name)
    assert last
    assert seen in ([], [last])
    assert_merges_to(tmp_path / name, expected(order), tmp_path / "out")


# Those whose ranks rewrite their files while no file tells of all are in the next test.
AGAIN = [
    one
    for one in fast(("dcp", 2), ("single_file", 1))
    if one.values[0] in ("dcp", "dcp_async", "single_file", "lightning_file", "accelerate")
]


@pytest.mark.parametrize(("saver", "name", "ranks"), AGAIN)
def test_a_save_over_an_older_one_is_the_old_the_new_or_not_whole(
    savers: Savers, tmp_path: Path, saver: str, name: str, ranks: int
) -> None:
    needs(saver)
    path = tmp_path / name
    savers.save(Order(saver, str(path), 1, ranks))
    old = whole(path)
    order = Order(saver, str(path), 2, ranks)
    with savers.saving(order) as save:
        seen = polled(save, path)
    new = whole(path)
    assert old
    assert new
    assert new != old
    assert seen in ([], [old], [new], [old, new])
    assert_merges_to(path, expected(order), tmp_path / "out")


@pytest.mark.parametrize(("saver", "name"), [("rank_files", "checkpoint-1"), ("dcp_rank_local", "step_1")])
def test_a_save_over_an_older_one_without_an_end_mark_is_never_a_mixture_of_ranks(
    savers: Savers, tmp_path: Path, saver: str, name: str
) -> None:
    """Each rank's files are whole at some moment while another's are still the old ones: no file says so, and only time can tell."""
    path = tmp_path / name
    savers.save(Order(saver, str(path), 1, 2))
    for file in path.rglob("*"):
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns - 60 * 10**9))
    old = whole(path)
    with savers.saving(Order(saver, str(path), 2, 2)) as save:
        seen = polled(save, path)
    assert set(seen) <= {old, whole(path)}


@pytest.mark.parametrize(("saver", "name"), [("rank_files", "checkpoint-1"), ("dcp_rank_local", "step_1"), ("dcp", "step_1")])
def test_other_values_saved_over_a_checkpoint_are_another_identity(savers: Savers, tmp_path: Path, saver: str, name: str) -> None:
    path = tmp_path / name
    seen = []
    for seed in (1, 2):
        order = Order(saver, str(path), seed, 2)
        savers.save(order)
        seen.append(whole(path))
    assert None not in seen
    assert seen[0] != seen[1]
    assert_merges_to(path, expected(order), tmp_path / "out")


def bytes_of(path: Path, before: dict[str, int] | None = None) -> int:
    """The bytes of a checkpoint on disk; with ``before``, of those files that have changed since."""
    total = 0
    for file in [path, *path.rglob("*")]:
        with suppress(FileNotFoundError):
            status = file.stat()
            if S_ISREG(status.st_mode) and (before is None or before.get(file.name) != status.st_mtime_ns):
                total += status.st_size
    return total


def killed(savers: Savers, order: Order, enough: float, before: dict[str, int] | None = None) -> None:
    """Saves, and ends all ranks without notice as soon as so many bytes are there."""
    with savers.saving(order) as save:
        while not save.ended(0.001) and bytes_of(Path(order.path), before) < enough:
            pass
        save.kill()


def moments(seed: str, total: int) -> list[float]:
    """Bytes after which a saver is killed: at its first, on its way, and before its last."""
    chance = random.Random(seed)
    return [1, *(total * chance.uniform(0.05, 0.95) for _ in range(3)), total - 1]


@pytest.mark.parametrize(("saver", "name", "ranks"), fast(("dcp", 2)))
def test_what_a_killed_saver_leaves_is_not_whole_or_is_all_there(savers: Savers, tmp_path: Path, saver: str, name: str, ranks: int) -> None:
    needs(saver)
    (tmp_path / "first").mkdir()
    savers.save(Order(saver, str(tmp_path / "first" / name), 1, ranks))
    for number, enough in enumerate(moments(f"{saver}-{ranks}", bytes_of(tmp_path / "first" / name))):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        order = Order(saver, str(folder / name), 2 + number, ranks)
        killed(savers, order, enough)
        if whole(folder / name):
            assert_merges_to(folder / name, expected(order), folder / "out")
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("saver", "ranks"), [("dcp", 2), pytest.param("dcp", 1, marks=pytest.mark.slow), pytest.param("dcp_async", 2, marks=pytest.mark.slow)]
)
def test_a_killed_save_over_an_older_one_leaves_no_mixture(savers: Savers, tmp_path: Path, saver: str, ranks: int) -> None:
    path = tmp_path / "step_1"
    old_order = Order(saver, str(path), 10, ranks)
    savers.save(old_order)
    total = bytes_of(path)
    for number, enough in enumerate(moments(f"again-{saver}-{ranks}", total)):
        savers.save(old_order)
        old = whole(path)
        times = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
        order = Order(saver, str(path), 20 + number, ranks)
        killed(savers, order, enough, times)
        changed = {file.name for file in path.iterdir() if times.get(file.name) != file.stat().st_mtime_ns}
        left = whole(path)
        assert changed, "nothing was saved yet"
        if ".metadata" not in changed:
            assert left is None
        if left:
            assert_merges_to(path, expected(old_order if left == old else order), tmp_path / f"out-{number}")


class Meddler:
    """Does something to the file that is about to be opened, at one of the times that a file below a directory is."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.meddle: Callable[[Path], None] | None = None
        self.opened, self.turn = 0, 0
        sys.addaudithook(self._see)

    def _see(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and self.root and isinstance(given[0], str | Path) and str(given[0]).startswith(self.root):
            self.opened += 1
            if self.meddle and self.opened == self.turn:
                before, self.root = self.root, None
                self.meddle(Path(given[0]))
                self.root = before

    @contextmanager
    def at(self, root: Path, turn: int, meddle: Callable[[Path], None] | None) -> Iterator[None]:
        """Within the block, the file that is opened ``turn``-th is meddled with."""
        self.root, self.meddle, self.opened, self.turn = f"{root}/", meddle, 0, turn
        try:
            yield
        finally:
            self.root = None


@pytest.fixture(scope="module")
def meddler() -> Meddler:
    # A hook stays until the process ends: one is enough.
    return Meddler()


def cut(file: Path) -> None:
    if file.is_file():
        os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    if file.is_file():
        os.truncate(file, 0)


def gone(file: Path) -> None:
    if file.is_file():
        file.unlink()


# One sample of each format.
EACH = [
    *(("two", name) for name in ("dcp_flat", "dcp_rank_local", "dcp_safetensors", "dcp_safetensors_consolidated", "lmms_engine_ema")),
    *(("two", name) for name in ("accelerate_fsdp2_sharded", "accelerate_fsdp2_full", "accelerate_fsdp1_ranks", "hf_trainer_fsdp2_full")),
    *(("two", name) for name in ("kempnerforge", "kempnerforge_pp", "torchtitan", "olmo_core", "optimus_dl", "lightning_fsdp")),
    *(("single", name) for name in ("lightning_file", "accelerate", "accelerate_bin", "deepspeed_zero2", "deepspeed_zero3", "megatron")),
]


@pytest.mark.parametrize("meddle", [emptied, gone, pytest.param(cut, marks=pytest.mark.slow)], ids=lambda made: made.__name__)
@pytest.mark.parametrize(("group", "name"), EACH, ids=[name for _, name in EACH])
def test_a_file_that_is_cut_at_any_moment_of_a_look_is_a_sentence_and_no_error(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, meddler: Meddler, group: str, name: str, meddle: Callable[[Path], None]
) -> None:
    path = copied(original(tmp_path_factory, group, name), tmp_path)
    run = tmp_path / path.relative_to(tmp_path).parts[0]

    def look() -> str | None:
        found = next((found for found in scan(str(run), 9).found if found.checkpoint.path in (str(path), str(path.parent))), None)
        return examine(found, None, time.time(), first_look=True, quiet_period=0).identity if found else None

    with meddler.at(run, 0, None):
        assert look()
    for turn in range(1, meddler.opened + 1):
        touched: list[tuple[Path, bytes, os.stat_result]] = []

        def remembered(file: Path, touched: list[tuple[Path, bytes, os.stat_result]] = touched) -> None:
            if file.is_file() and file.is_relative_to(path):
                touched.append((file, file.read_bytes(), file.stat()))
                meddle(file)

        with meddler.at(run, turn, remembered):
            identity = look()
        for file, content, status in touched:
            assert identity is None, f"{file.name} was {meddle.__name__} when it was opened as file {turn}"
            file.write_bytes(content)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert look()
