"""A corpus of Python source: the standard library and the installed packages of the running interpreter, as JSONL.

    python experiments/python_corpus.py FILE.jsonl [--files 6000] [--characters 4000]

One record a file (`id`, `text`), in a random order that is the same for the same files; equal files stand in it once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sysconfig
from pathlib import Path

LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "_vendor", "vendor", "localmoe"}
SHORTEST = 1_500
"""Characters that a file has at least."""


def sources(root: Path, left_out: set[str]) -> list[tuple[str, str]]:
    """Relative path and text of every Python file below a folder, by path."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if left_out & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= SHORTEST:
            found.append((str(relative), text))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--files", type=int, default=6_000)
    parser.add_argument("--characters", type=int, default=4_000, help="of each file, from its start")
    options = parser.parse_args()
    paths = sysconfig.get_paths()
    files = sources(Path(paths["stdlib"]), LEFT_OUT | {"site-packages"}) + sources(Path(paths["purelib"]), LEFT_OUT)
    unique = {hashlib.sha256(text.encode()).hexdigest(): (name, text) for name, text in reversed(files)}
    chosen = sorted(unique.values())
    random.Random(1).shuffle(chosen)
    with options.target.open("w", encoding="utf-8") as target:
        for name, text in chosen[: options.files]:
            target.write(json.dumps({"id": name, "text": text[: options.characters]}, ensure_ascii=False) + "\n")
    print(f"{min(options.files, len(chosen)):,} of {len(chosen):,} files in {options.target}")


if __name__ == "__main__":
    main()
