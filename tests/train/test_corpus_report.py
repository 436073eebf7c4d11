"""The account of a reading."""

from __future__ import annotations

import json

from localmoe.train.corpus_report import EXAMPLES, FIELDS, ReportBuilder


def test_examples_and_fields_are_bounded_while_counts_go_on():
    report = ReportBuilder()
    for number in range(1000):
        report.skip(f"a:{number}", "duplicate")
        report.saw_fields({f"field {number}": "x"})
    report.skip("b", "binary", "y" * 10_000)
    found = report.finish()
    assert found.skipped == {"duplicate": 1000, "binary": 1}
    assert len(found.examples) == EXAMPLES + 1
    assert len(found.examples[-1].detail) < 1000
    assert len(report.fields) == FIELDS


def test_the_lines_name_counts_sources_and_reasons_and_escape_control_characters():
    report = ReportBuilder()
    report.files, report.records, report.unmatched = 2, 1234, ("hr/*",)
    report.count(10, False)
    report.count(5, True)
    report.skip("\x1b[2J.png", "binary")
    report.skip("a.jsonl:7", "malformed", "not JSON")
    report.skip("a.jsonl:9", "malformed", "not JSON")
    lines = report.finish().lines()
    assert lines[0].startswith("2 documents (1 with restricted access, 15 characters in all) from 2 files and 1,234")
    assert "'hr/*'" in lines[1]
    assert lines[2] == "2 malformed: e.g. a.jsonl:7 (not JSON)"
    assert lines[3] == "1 binary: '\\x1b[2J.png'"


def test_the_report_goes_through_json():
    report = ReportBuilder()
    report.skip("a", "empty", "why")
    report.count(3, False)
    plain = report.finish().to_dict()
    assert json.loads(json.dumps(plain))["examples"] == [{"source": "a", "reason": "empty", "detail": "why"}]
    assert plain["documents"] == 1
