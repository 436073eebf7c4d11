"""Figures 4 left and middle of the paper, from the JSON of `overhead.py`: latency by stage, and time against N.

    python benchmarks/plots.py overhead.json [answers.json ...] [-o figure.svg] [--rank 64] [--new-tokens 100]

Left: what a prompt waits for until its first token, stage by stage, for N = 10 (or the largest N there is). Middle:
`--new-tokens` tokens by the base model and by both sides against N: the first token as measured, the others at the
pace of part `answers`, of which the nearest N is taken.
Parts may lie in several files of one machine; the first one's name is that of the figure.
Needs matplotlib (`pip install 'localmoe[benchmarks]'`).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

STAGES = ("select", "load", "merge", "rest of the first token", "restore")
SIDES = {"localmoe": "LocalMoE", "ttmerge": "ttmerge 0.0.4"}


def bars(row: dict[str, float]) -> dict[str, float]:
    """Stage → milliseconds; they add up to the call for one token."""
    rest = row["first_token"] - row["embed"] - row["select"] - row["load"] - row["merge"]
    spent = {"rest of the first token": rest} | {stage: row[stage] for stage in STAGES if stage in row}
    return {stage: spent[stage] * 1e3 for stage in STAGES}


def against_experts(report: dict[str, Any], rank: int, new_tokens: int) -> dict[str, list[tuple[int, float]]]:
    """Side → (N, seconds of `new_tokens` tokens), for every N that was measured at this rank."""
    pace = _pace(report, rank)
    found: dict[str, list[tuple[int, float]]] = {"base": [], **{side: [] for side in SIDES}}
    for active in _active(report["first"], rank):
        medians = report["first"][f"N={active} r={rank}"]["medians"]
        for side, points in found.items():
            nearest = min(pace[side], key=lambda known: abs(known - active))
            points.append((active, medians[side]["first_token"] + (new_tokens - 1) * pace[side][nearest]))
    return found


def _pace(report: dict[str, Any], rank: int) -> dict[str, dict[int, float]]:
    """Side → N → seconds a token after the first, of the longest answers there are."""
    found: dict[str, dict[int, float]] = {"base": {}, **{side: {} for side in SIDES}}
    for name, part in report["answers"].items():
        match = re.fullmatch(rf"N=(\d+) r={rank} (\d+) tokens", name)
        if match is not None:
            for side, paces in found.items():
                row = part["medians"][side]
                paces[int(match[1])] = (row["total"] - row["first_token"]) / (int(match[2]) - 1)
    return found


def _active(part: dict[str, Any], rank: int) -> list[int]:
    matches = (re.fullmatch(rf"N=(\d+) r={rank}", name) for name in part)
    return sorted(int(match[1]) for match in matches if match is not None)


def draw(report: dict[str, Any], rank: int, new_tokens: int, target: Path) -> None:
    """Both figures in one file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    active = _active(report["first"], rank)
    shown = 10 if 10 in active else active[-1]
    part = report["first"][f"N={shown} r={rank}"]
    figure, (left, middle) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    heights = {side: bars(part["medians"][side]) for side in SIDES}
    bottom = dict.fromkeys(SIDES, 0.0)
    for stage in STAGES:
        values = [heights[side][stage] for side in SIDES]
        left.bar(list(SIDES.values()), values, bottom=list(bottom.values()), label=stage, width=0.6)
        bottom = {side: bottom[side] + heights[side][stage] for side in SIDES}
    left.axhline(part["medians"]["base"]["first_token"] * 1e3, color="black", linestyle="--", label="base, first token")
    left.set(title=f"One token, N = {shown}, r = {rank}, without encoder", ylabel="ms")
    left.legend()
    for side, points in against_experts(report, rank, new_tokens).items():
        middle.plot(*zip(*points, strict=True), marker="o", label=SIDES.get(side, "base model"))
    middle.set(
        title=f"{new_tokens} new tokens, r = {rank}", xlabel="active experts N", ylabel="s", xscale="log", ylim=0
    )
    middle.set_xticks(active, [str(count) for count in active])
    middle.set_xticks([], minor=True)
    middle.legend()
    machine = report["machine"]
    figure.suptitle(
        f"{report['settings']['shape'] or report['settings']['base']} on {machine.get('gpu', machine['cpu'])}"
    )
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, help="default: beside the report, as SVG")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=100)
    arguments = parser.parse_args()
    first, *others = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.reports]
    if any(other["machine"] != first["machine"] for other in others):
        raise SystemExit("the reports are of different machines or versions: measure them together")
    report = {name: part for one in (*reversed(others), first) for name, part in one.items()}
    target = arguments.output if arguments.output is not None else arguments.reports[0].with_suffix(".svg")
    draw(report, arguments.rank, arguments.new_tokens, target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
