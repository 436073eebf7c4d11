"""Folders: the walk and the patterns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localmoe.config import CorpusConfig
from localmoe.errors import CorpusError
from localmoe.train.corpus_report import ReportBuilder
from localmoe.train.folder import access_of, matches, tags_of, walk


def fill(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def walked(root: Path, report: ReportBuilder | None = None, **config: object) -> list[str]:
    builder = ReportBuilder() if report is None else report
    return [file for _, file in walk(root, CorpusConfig(**config), builder)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "file", "expected"),
    [
        ("*.py", "a.py", True),
        ("*.py", "deep/down/a.py", True),
        ("*.py", "a.pyc", False),
        ("hr", "hr/a.txt", True),
        ("hr", "company/hr/2024/a.txt", True),
        ("hr", "hrx/a.txt", False),
        ("hr/*", "hr/a.txt", True),
        ("hr/*", "hr/2024/a.txt", True),
        ("hr/*", "company/hr/a.txt", False),
        ("hr/2024/", "hr/2024/05/a.txt", True),
        ("./hr/*", "hr/a.txt", True),
        ("/hr", "hr/a.txt", True),
        ("src/**/*.py", "src/a.py", True),
        ("src/**/*.py", "src/x/y/a.py", True),
        ("src/**/*.py", "a.py", False),
        ("**/secret.txt", "secret.txt", True),
        ("**/secret.txt", "a/b/secret.txt", True),
        ("**/a/**/b", "x/a/y/z/b", True),
        ("[ab].txt", "b.txt", True),
        ("HR", "hr/a.txt", False),
        ("", "a.txt", False),
    ],
)
def test_patterns_name_files_or_folders_that_they_are_in(pattern, file, expected):
    assert matches(file, pattern) is expected


def test_banks_are_no_corpus_and_a_folder_that_only_looks_like_one_is(tmp_path):
    fill(tmp_path, "a.txt", "done/build.lock", "done/manifest-000001.json", "done/texts-0123456789ab.parquet")
    fill(tmp_path, "begun/build.lock", "begun/work/key/documents.parquet", "mine/build.lock", "mine/work.txt")
    report = ReportBuilder()
    assert walked(tmp_path, report) == ["a.txt", "mine/build.lock", "mine/work.txt"]
    assert [(skip.source, skip.reason) for skip in report.finish().examples] == [
        ("begun/", "ignored"),
        ("done/", "ignored"),
    ]


def test_the_walk_is_sorted_files_before_folders(tmp_path):
    fill(tmp_path, "b.txt", "a/z.txt", "a/b/c.txt", "c/a.txt", "a.txt", "B.txt")
    assert walked(tmp_path) == ["B.txt", "a.txt", "b.txt", "a/z.txt", "a/b/c.txt", "c/a.txt"]


def test_hidden_and_installed_files_are_left_out_and_counted(tmp_path):
    fill(
        tmp_path,
        "a.txt",
        ".git/x",
        ".env",
        "node_modules/m/x.js",
        "p/__pycache__/y.pyc",
        "v/site-packages/z.py",
    )
    report = ReportBuilder()
    assert walked(tmp_path, report) == ["a.txt"]
    assert report.finish().skipped == {"ignored": 5}


def test_include_and_exclude_choose_files_and_count_the_others(tmp_path):
    fill(tmp_path, "a.py", "b.txt", "tests/c.py", "src/d.py")
    report = ReportBuilder()
    assert walked(tmp_path, report, include=("*.py",), exclude=("tests/*",)) == ["a.py", "src/d.py"]
    assert report.finish().skipped == {"excluded": 2}


def test_loops_of_links_end_and_links_to_files_are_followed(tmp_path):
    fill(tmp_path, "data/a.txt")
    (tmp_path / "data" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "data" / "link.txt").symlink_to(tmp_path / "data" / "a.txt")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data" / "self")
    report = ReportBuilder()
    assert walked(tmp_path, report) == ["data/a.txt", "data/link.txt", "data/self"]
    assert report.finish().skipped == {"ignored": 1}


def test_names_that_are_not_utf8_become_text(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    assert walked(tmp_path) == ["caf\\xe9.txt"]


def test_a_folder_without_permission_is_counted_and_as_the_root_an_error(tmp_path, monkeypatch):
    fill(tmp_path, "a.txt", "closed/b.txt")
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    report = ReportBuilder()
    assert walked(tmp_path, report) == ["a.txt"]
    assert report.finish().skipped == {"unreadable": 1}
    with pytest.raises(CorpusError, match="Permission denied"):
        walked(tmp_path / "closed")


def test_the_first_access_pattern_decides_and_all_tag_patterns_add():
    config = CorpusConfig(
        access_paths={"hr/open/*": (), "hr": ("hr",), "*.txt": ("staff",), "legal": ("legal",)},
        tags_paths={"hr": ("people", "hr"), "*.txt": ("text",)},
    )
    report = ReportBuilder()
    assert access_of("hr/a.txt", config, report) == ("hr",)
    assert access_of("hr/open/a.txt", config, report) == ()
    assert access_of("b.txt", config, report) == ("staff",)
    assert access_of("b.md", config, report) == ()
    assert report.matched == {"hr/open/*", "hr", "*.txt"}
    assert tags_of("hr/a.txt", config) == ("people", "hr", "text")
