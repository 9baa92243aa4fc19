import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefmesh.errors import InputError
from prefmesh.preferences.rows import RowProblem, file_rows, hub_rows


def contents(path: Path) -> list[tuple[int, object]]:
    return [
        (
            row.number,
            (row.content.kind, str(row.content)) if isinstance(row.content, RowProblem) else row.content,
        )
        for row in file_rows(path)
    ]


def test_jsonl_numbers_are_lines_and_a_bad_line_does_not_hide_the_next(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n\n{"a": 1\n[1]\n{"a": "\xff"}\n{"a": null}')
    assert contents(path) == [
        (1, {"a": "é"}),
        (3, ("not JSON", "not JSON: Expecting ',' delimiter at character 9 of the line")),
        (4, ("wrong type", "a list; allowed: a JSON object per line")),
        (5, ("not UTF-8", "not UTF-8: byte 0xff at byte 8 of the line")),
        (6, {"a": None}),
    ]


def test_jsonl_nested_beyond_reading_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("[" * 200_000 + "\n" + '{"a": 1}\n')
    (first, problem), second = contents(path)
    assert first == 1
    assert isinstance(problem, tuple)
    assert problem[0] == "not JSON"
    assert second == (2, {"a": 1})


@pytest.mark.parametrize("name", ["p.jsonl.gz", "P.JSONL.GZ"])
def test_gzip(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert contents(path) == [(1, {"a": 1}), (2, {"a": 2})]


def test_csv_rows_keep_line_breaks_and_count_the_header(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n"one\ntwo",\xc3\xa9\r\n1,2,3\r\n\xe9,x\r\n4,5\r\n')
    assert contents(path) == [
        (2, {"a": "one\ntwo", "b": "é"}),
        (3, ("wrong number of fields", "3 fields, but the header has 2")),
        (4, ("not UTF-8", "not UTF-8: byte 0xe9 in column 'a'")),
        (5, {"a": "4", "b": "5"}),
    ]


def test_csv_gz(tmp_path: Path) -> None:
    path = tmp_path / "p.csv.gz"
    path.write_bytes(gzip.compress(b"a\nx\n"))
    assert contents(path) == [(2, {"a": "x"})]


def test_parquet_keeps_messages(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    rows = [{"a": [{"role": "user", "content": "hi"}], "b": 1}, {"a": None, "b": 2}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert contents(path) == [(1, rows[0]), (2, rows[1])]


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    array = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"ok"], pa.binary()).buffers())
    pq.write_table(pa.table({"a": array}), path)
    (number, problem), second = contents(path)
    assert number == 1
    assert isinstance(problem, tuple)
    assert problem[0] == "not UTF-8"
    assert second == (2, {"a": "ok"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.parquet", b"no", "damaged or no Parquet file"),
        ("p.jsonl.gz", b'{"a": 1}', "damaged or no gzip file"),
        ("p.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-9], "damaged or no gzip file"),
        ("p.csv.gz", b"a,b", "damaged or no gzip file"),
        ("p.csv", b"a,a\n1,2\n", "names a column twice: a, a"),
        ("p.csv", b"a\n" + b"x" * 200_000, r":2: not CSV that can be read \(field larger"),
        ("p.json", b"[]", r"unknown kind of file; allowed: \.jsonl"),
        ("p", b"", "unknown kind of file"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        list(file_rows(path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a directory"):
        list(file_rows(tmp_path))


def test_a_hub_that_cannot_be_reached_is_an_input_error() -> None:
    with pytest.raises(
        InputError, match=r"^preferences.source: 'no/such' is no file here.*split 'train'"
    ) as error:
        list(hub_rows("no/such", name=None, data_dir=None, split="train"))
    assert "\n" not in str(error.value)


def test_hub_rows_are_asked_for_by_name_directory_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    messages = [{"role": "user", "content": "hi"}]
    found = datasets.Dataset.from_list([{"chosen": messages, "n": 1}, {"chosen": messages, "n": 2}])

    def load_dataset(
        path: str, name: str | None = None, data_dir: str | None = None, *, split: str
    ) -> datasets.Dataset:
        assert (path, name, data_dir, split) == ("some/set", None, "harmless-base", "test")
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(hub_rows("some/set", name=None, data_dir="harmless-base", split="test"))
    assert [(row.number, row.content) for row in rows] == [
        (1, {"chosen": messages, "n": 1}),
        (2, {"chosen": messages, "n": 2}),
    ]
