"""Killed at any moment of writing, one whole checkpoint can be loaded, and nothing is left lying about."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmesh import checkpoint
from prefmesh.errors import InputError


class Killed(BaseException):
    """As kill -9 would: no `except Exception` sees it."""


def tensors(round_: int) -> dict[str, torch.Tensor]:
    """A state that tells its round."""
    return {"theta/a": torch.full((2, 3), float(round_)), "batches_drawn": torch.tensor([round_, -1])}


def save(directory: Path, round_: int, *, keep: int = 2, config: str = "c0ffee") -> None:
    checkpoint.save(
        directory, tensors(round_), round_=round_, config=config, log_bytes={"metrics.jsonl": 10 * round_},
        bytes_sent_total=round_**2, seconds=0.5, keep=keep,
    )  # fmt: skip


def load(directory: Path) -> tuple[checkpoint.Checkpoint, dict[str, torch.Tensor]]:
    found = checkpoint.load(directory, config="c0ffee")
    assert found is not None
    record, state = found
    for name, tensor in tensors(record.round).items():
        assert torch.equal(state[name], tensor)
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def both(*rounds: int) -> list[str]:
    """The files of whole checkpoints, and no others."""
    return sorted(f"round_{r:06d}.{kind}" for r in rounds for kind in ("json", "safetensors"))


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def test_what_is_saved_is_loaded(directory):
    save(directory, 7)
    record, _ = load(directory)
    assert record == checkpoint.Checkpoint(
        round=7, config="c0ffee", sha256=record.sha256, log_bytes={"metrics.jsonl": 70}, bytes_sent_total=49, seconds=0.5
    )  # fmt: skip
    # The hash that stands beside it is any other program's hash of the file.
    import hashlib

    assert record.sha256 == hashlib.sha256((directory / "round_000007.safetensors").read_bytes()).hexdigest()


def test_without_checkpoints_there_is_none(directory):
    assert checkpoint.load(directory, config="c0ffee") is None
    assert checkpoint.newest_round(directory) is None
    checkpoint.forget_newer(directory, than=3, keep=2)
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    assert checkpoint.load(directory, config="c0ffee") is None


@given(
    rounds=st.lists(st.integers(0, 2_000_000), min_size=1, max_size=8, unique=True), keep=st.integers(1, 4)
)
def test_the_newest_are_kept(tmp_path_factory, rounds, keep):
    directory = tmp_path_factory.mktemp("c") / "checkpoints"
    for round_ in sorted(rounds):
        save(directory, round_, keep=keep)
    assert names(directory) == both(*sorted(rounds)[-keep:])
    assert load(directory)[0].round == checkpoint.newest_round(directory) == max(rounds)


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name, 3)
    for file in both(3):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_shared_row_and_a_slice_are_stored_as_they_look(directory):
    row = torch.arange(3.0)
    whole = {
        "theta/a": row.expand(4, 3),
        "theta/b": torch.arange(12.0).view(3, 4).T,
        "grad": row.requires_grad_(),
    }
    checkpoint.save(
        directory, whole, round_=1, config="c", log_bytes={}, bytes_sent_total=0, seconds=0.0, keep=1
    )
    found = checkpoint.load(directory, config="c")
    assert found is not None
    for name, tensor in whole.items():
        assert torch.equal(found[1][name], tensor)


# ---- killed

CALLS = ["os.fsync", "os.replace", "prefmesh.checkpoint.save_file", "prefmesh.checkpoint.Path.unlink"]


class _KillAt:
    """Stands in for the calls that reach the disk, and kills before or after the n-th of them."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, *, after: bool):
        self.left, self.after, self.made = at, after, 0
        for name in CALLS:
            patch.setattr(name, self._wrapped(_resolve(name)))

    def _wrapped(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.made += 1
            if self.made == self.left and not self.after:
                raise Killed
            result = function(*args, **kwargs)
            if self.made == self.left and self.after:
                raise Killed
            return result

        return call


def _resolve(name: str) -> Any:
    return {"os.fsync": os.fsync, "os.replace": os.replace, "prefmesh.checkpoint.save_file": checkpoint.save_file,
            "prefmesh.checkpoint.Path.unlink": Path.unlink}[name]  # fmt: skip


CALLS_OF_A_SAVE = 7
"""Write, fsync and replace the tensors; fsync and replace the mark; unlink the oldest mark and its tensors."""


def test_a_save_reaches_the_disk_so_often(directory, monkeypatch):
    for round_ in (1, 2):
        save(directory, round_)
    with monkeypatch.context() as patch:
        counter = _KillAt(patch, -1, after=True)
        save(directory, 3)
    assert counter.made == CALLS_OF_A_SAVE


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(1, CALLS_OF_A_SAVE + 1))
@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_any_call_of_a_save(directory, monkeypatch, at, after, keep):
    for round_ in (1, 2):
        save(directory, round_, keep=2)
    with monkeypatch.context() as patch:
        _KillAt(patch, at, after=after)
        with pytest.raises(Killed):
            save(directory, 3, keep=2)
    # The fifth call puts the mark in place: from then on the new one counts.
    done = at > 5 or (at == 5 and after)
    assert load(directory)[0].round == (3 if done else 2)
    # Going on as a resumed run does: the same round again, and the next. No scrap is left, whatever is kept.
    checkpoint.forget_newer(directory, than=3 if done else 2, keep=2)
    # ... and what the killed writer did not come to drop is gone, also where no checkpoint follows.
    assert len(checkpoint._rounds(directory)) <= 2
    for round_ in (3, 4):
        save(directory, round_, keep=keep)
    assert names(directory) == both(*range(5 - keep, 5))


def test_scraps_of_a_round_that_is_not_saved_again_go(directory):
    """Ctrl-C saves between the usual rounds; killed in that, the resumed run does not save that round again."""
    save(directory, 10)
    for scrap in ("round_000013.part", ".round_000013.json.part", "round_000013.safetensors"):
        (directory / scrap).write_bytes(b"half")
    (directory / "notes.txt").write_text("mine")
    assert load(directory)[0].round == 10
    save(directory, 20)
    assert names(directory) == sorted([*both(10, 20), "notes.txt"])


# ---- damaged


def test_damage_is_passed_over_down_to_the_oldest(directory):
    for round_ in (1, 2, 3):
        save(directory, round_, keep=3)
    (directory / "round_000003.safetensors").write_bytes(b"")
    assert load(directory)[0].round == 2
    (directory / "round_000002.json").write_text("{}")
    assert load(directory)[0].round == 1
    (directory / "round_000001.safetensors").unlink()
    assert checkpoint.load(directory, config="c0ffee") is None


@settings(max_examples=60)
@given(data=st.data())
def test_any_flipped_bit_is_found(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("c") / "checkpoints"
    save(directory, 1)
    save(directory, 2)
    path = directory / f"round_000002.{data.draw(st.sampled_from(['json', 'safetensors']))}"
    raw = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    before = json.loads(raw) if path.suffix == ".json" else None
    raw[bit // 8] ^= 1 << bit % 8
    if before is not None and _says(bytes(raw)) == before:
        return  # blank space, or a capital in an escape
    path.write_bytes(raw)
    assert load(directory)[0].round == 1


def _says(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def test_a_checkpoint_under_another_name_does_not_count(directory):
    """A copied or renamed file is not taken for another round's."""
    save(directory, 1)
    for kind in ("json", "safetensors"):
        (directory / f"round_000001.{kind}").rename(directory / f"round_000009.{kind}")
    assert checkpoint.load(directory, config="c0ffee") is None


def test_scraps_of_safetensors_own_go(directory):
    save(directory, 1)
    for place in (directory, directory.parent):
        (place / ".tmpA1b2C3").write_bytes(b"half")
    (directory.parent / "notes.tmp").write_text("mine")
    checkpoint.forget_newer(directory, than=1, keep=2)
    assert names(directory) == both(1)
    assert not (directory.parent / ".tmpA1b2C3").exists()
    assert (directory.parent / "notes.tmp").exists()


def test_damaged_ones_do_not_push_good_ones_out(directory):
    for round_ in (20, 30):
        save(directory, round_)
        (directory / f"round_{round_:06d}.safetensors").write_bytes(b"")
    assert checkpoint.load(directory, config="c0ffee") is None
    checkpoint.forget_newer(directory, than=-1, keep=2)
    assert names(directory) == []
    save(directory, 0)
    assert load(directory)[0].round == 0


def test_another_config_is_refused(directory):
    save(directory, 1)
    with pytest.raises(InputError) as refused:
        checkpoint.load(directory, config="decaf")
    assert str(refused.value) == (
        f"{directory / 'round_000001.safetensors'}: found a checkpoint of another config (its hash is c0ffee, this "
        "config's decaf); allowed: the config that the run was started with"
    )
    # A damaged one of another config is damaged first of all.
    (directory / "round_000001.safetensors").write_bytes(b"")
    assert checkpoint.load(directory, config="decaf") is None


def test_the_mark_is_readable(directory):
    save(directory, 5)
    record = json.loads((directory / "round_000005.json").read_text())
    assert set(record) == {
        "round",
        "config",
        "sha256",
        "log_bytes",
        "bytes_sent_total",
        "seconds",
        "mark_sha256",
    }
