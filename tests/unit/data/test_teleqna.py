"""TeleQnA's layout into records, on questions made up here."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ubsmoe.config import PartitionSettings
from ubsmoe.data.partition import partition
from ubsmoe.data.records import read_file
from ubsmoe.data.teleqna import build_teleqna
from ubsmoe.errors import UserError


def question(number: int, category: str, options: int, gold: int, text: str = "") -> dict[str, str]:
    texts = {f"option {i}": f"thing {number}-{i}" for i in range(1, options + 1)}
    said = {"answer": f"option {gold}: as written elsewhere", "explanation": "so it is", "category": category}
    return {"question": text or f"What is {number}?", **texts, **said}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text(json.dumps({f"question {i}": row for i, row in enumerate(rows)}))
    return path


def test_every_question_is_read_with_its_label_options_and_category(tmp_path: Path) -> None:
    rows = [question(0, "Lexicon", 5, 5), question(1, "Standards overview", 2, 1), question(0, "Lexicon", 4, 2)]
    out = tmp_path / "made" / "teleqna.jsonl.gz"
    assert build_teleqna(write(tmp_path / "TeleQnA.txt", rows), out) == {"Lexicon": 1, "Standards overview": 1}
    first, second = read_file(out, None)  # type: ignore[arg-type]
    assert (first.task, first.answer, first.completion) == ("Lexicon", "option5", "the correct answer is option5")
    assert first.candidates == ("option1", "option2", "option3", "option4", "option5")
    assert "What is 0?\n\nOption1: thing 0-1\n\nOption2: thing 0-2" in first.prompt and "thing 0-5" in first.prompt
    assert second.candidates == ("option1", "option2") and second.fields["category"] == "Standards overview"
    parts = partition([first, second], PartitionSettings(kind="natural", field="category"), 2, seed=0)
    assert sorted(parts) == [[0], [1]]


def test_equal_sources_give_equal_files(tmp_path: Path) -> None:
    source = write(tmp_path / "TeleQnA.txt", [question(0, "Lexicon", 3, 2)])
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        build_teleqna(source, tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_the_encrypted_archive_is_opened_with_its_public_password(tmp_path: Path) -> None:
    pyzipper: Any = pytest.importorskip("pyzipper")
    with pyzipper.AESZipFile(tmp_path / "T.zip", "w", encryption=pyzipper.WZ_AES) as archive:
        archive.setpassword(b"teleqnadataset")
        archive.writestr("TeleQnA.txt", json.dumps({"question 0": question(0, "Lexicon", 3, 2)}))
    assert build_teleqna(tmp_path / "T.zip", tmp_path / "out.jsonl.gz") == {"Lexicon": 1}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([question(0, "Lexicon", 3, 4)], "question 0 has the answer 'option 4: .*' but 3 options"),
        ([{"question": "What?"}], "not laid out as TeleQnA: KeyError"),
    ],
)
def test_another_layout_is_refused(rows: list[dict[str, str]], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        build_teleqna(write(tmp_path / "TeleQnA.txt", rows), tmp_path / "out.jsonl.gz")
    assert not (tmp_path / "out.jsonl.gz").exists()


def test_without_its_library_the_archive_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyzipper", None)
    with pytest.raises(UserError, match=r'^this needs pyzipper: pip install "ubsmoe\[teleqna\]"'):
        build_teleqna(tmp_path / "T.zip", tmp_path / "out.jsonl.gz")


def test_what_is_no_archive_or_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "T.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r'T.zip cannot be read|pip install "ubsmoe\[teleqna\]"'):
        build_teleqna(tmp_path / "T.zip", tmp_path / "out.jsonl.gz")
    source = write(tmp_path / "TeleQnA.txt", [question(0, "Lexicon", 3, 2)])
    (tmp_path / "taken.jsonl.gz").touch()
    for name in ("taken.jsonl.gz", "out.json"):
        with pytest.raises(UserError, match=r"new file ending in .jsonl.gz"):
            build_teleqna(source, tmp_path / name)
