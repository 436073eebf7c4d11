"""A heterogeneous corpus: as many records of each of several files, as JSONL.

    python experiments/mixed_corpus.py TARGET.jsonl FILE:FIELD[+FIELD] ... [--each 1500] [--characters 4000]

FILE is JSONL, plain or gzip; the fields of a record are joined by a line end. The tag of a record is its file's name.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

SHORTEST = 100
"""Characters that a record has at least."""


def records(file: Path, fields: list[str], characters: int) -> list[str]:
    """The texts of a file's records."""
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")
    with opened as lines:
        texts = ["\n".join(json.loads(line)[field] for field in fields)[:characters] for line in lines if line.strip()]
    return [text for text in texts if len(text) >= SHORTEST]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("sources", nargs="+", metavar="FILE:FIELD[+FIELD]")
    parser.add_argument("--each", type=int, default=1_500)
    parser.add_argument("--characters", type=int, default=4_000, help="of each record, from its start")
    options = parser.parse_args()
    shuffle = random.Random(1)
    found = []
    for source in options.sources:
        name, _, fields = source.rpartition(":")
        texts = records(Path(name), fields.split("+"), options.characters)
        chosen = shuffle.sample(texts, min(options.each, len(texts)))
        kind = Path(name).name.partition(".")[0]
        found += [{"id": f"{kind}/{number}", "tag": kind, "text": text} for number, text in enumerate(chosen)]
        print(f"{len(chosen):,} of {len(texts):,} records of {kind}")
    shuffle.shuffle(found)
    with options.target.open("w", encoding="utf-8") as target:
        target.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in found)


if __name__ == "__main__":
    main()
