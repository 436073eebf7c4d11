"""Summary of a bank: what `localmoe info` says of it, as plain data and at a glance."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmoe.errors import BankError, PartialError
from localmoe.quantities import bytes_text
from localmoe.terminal.screen import facts, plain, table

if TYPE_CHECKING:
    from rich.console import Console

    from localmoe.bank.manifest import Manifest, Outcome
    from localmoe.bank.store import Bank

_STYLES = {"good": "green", "unchecked": "yellow", "harmful": "red", "failed": "bold red"}


def open_for_info(path: Path, check: bool = False) -> Bank:
    """The bank at `path`; `check` reads every file. Raises BankError if it is damaged or not finished."""
    from localmoe.bank.integrity import damage
    from localmoe.bank.manifest import generations
    from localmoe.bank.store import Bank, verify

    state = unfinished(path)
    if state is not None and not generations(path):
        raise BankError(
            f"{path} holds no finished bank: {unfinished_text(state)}",
            f"go on with the command that began it: localmoe build SOURCE {path}",
        )
    bank = Bank.open(path)
    problems = verify(bank) if check else []
    if problems:
        raise damage(path, problems)
    return bank


def raise_for_failed(data: dict[str, Any]) -> None:
    """Raises PartialError if some experts of a bank failed."""
    failed = [expert for expert in data["experts"] if expert["status"] == "failed"]
    if failed:
        named = ", ".join(expert["id"] for expert in failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise PartialError(
            f"{len(failed)} of {len(data['experts'])} experts failed to train ({named}): {failed[0]['reason']}",
            "the others are in the bank; to train all again, more gently: --set train.learning_rate=...",
        )


def bank_data(bank: Bank) -> dict[str, Any]:
    """All that is shown of a finished bank."""
    manifest = bank.manifest
    return {
        "bank": str(bank.path),
        "generation": manifest.generation,
        "digest": manifest.digest,
        "recipe": manifest.recipe,
        "base": {"id": manifest.base.id, "revision": manifest.base.revision},
        "encoder": {"id": manifest.encoder.id, "dim": manifest.encoder.dim, "max_tokens": manifest.encoder.max_tokens},
        "router": _router_data(manifest),
        "trunk": None if manifest.trunk_outcome is None else _outcome_data(manifest.trunk_outcome),
        "training": _training_data(manifest),
        "experts": [
            {
                "id": expert.id,
                "label": expert.label,
                "documents": expert.documents,
                "tokens": expert.tokens,
                "access": list(expert.access),
                "tags": list(expert.tags),
            }
            | _outcome_data(expert.outcome)
            for expert in manifest.experts
        ],
        "corpus": {name: value for name, value in manifest.corpus.items() if name not in ("key", "examples")},
        "bytes": sum(record.bytes for record in manifest.named_files().values()),
        "bytes_on_disk": _folder_bytes(bank.path),
        "texts": "texts" in manifest.files,
        "created": manifest.created,
        "versions": manifest.versions,
        "unfinished": unfinished(bank.path),
    }


def unfinished(path: Path) -> dict[str, Any] | None:
    """How far the build got that was stopped in this folder last, or None: {"done": 3, "experts": 10 or None, ...}."""
    folders = [folder for folder in (path / "work").glob("*") if folder.is_dir()]
    if not folders:
        return None
    work = max(folders, key=lambda folder: folder.stat().st_mtime)
    clusters = work / "clusters.json"
    return {
        "done": sum(1 for _ in (work / "experts").glob("*.json")),
        "experts": len(json.loads(clusters.read_text(encoding="utf-8"))["access"]) if clusters.exists() else None,
        "embedded": (work / "embeddings.npy").exists(),
        "trunk": (work / "trunk.json").exists(),
        "joint": any(work.glob("joint-*.pt")),
    }


def unfinished_text(state: dict[str, Any]) -> str:
    """`unfinished`, as a sentence."""
    if state["experts"] is None:
        return "a build is not finished: its documents are read, no expert is trained"
    if state["joint"] and not state["trunk"] and not state["done"]:
        return f"a build is not finished: the trunk and {state['experts']} experts are in training, their state is kept"
    trunk = "" if state["done"] or not state["trunk"] else ", the trunk is"
    return f"a build is not finished: {state['done']} of {state['experts']} experts are done{trunk}"


def show_bank(console: Console, data: dict[str, Any]) -> None:
    """A bank at a glance."""
    console.print(facts(_head(data)))
    console.print()
    console.print(_experts(data))
    if data["unfinished"] is not None:
        console.print()
        console.print(
            plain(f"{unfinished_text(data['unfinished'])}; the same `localmoe build` command goes on", "yellow")
        )


def _head(data: dict[str, Any]) -> list[tuple[str, str]]:
    base, encoder, router = data["base"], data["encoder"], data["router"]
    states = Counter(expert["status"] for expert in data["experts"])
    revision = f" at {base['revision']}" if base["revision"] is not None else ""
    found = f"{router['active']:.1f} active on tune documents" if router["active"] else "not tuned"
    return [
        ("bank", f"{data['bank']}, generation {data['generation']}"),
        ("base", f"{base['id']}{revision}"),
        ("encoder", f"{encoder['id']} ({encoder['dim']} dimensions, {encoder['max_tokens']} tokens)"),
        ("experts", f"{len(data['experts'])}: " + ", ".join(f"{count} {state}" for state, count in states.items())),
        ("recipe", data["recipe"]),
        ("trunk", "none" if data["trunk"] is None else _outcome_text(data["trunk"], "the base")),
        ("training", _training_text(data["training"])),
        (
            "router",
            f"{router['name']}, β = {router['beta']:.3g}, τ = {router['tau']:g}; "
            f"{router['wanted']:g} experts wanted, {found}, {router['max_experts']} at most",
        ),
        ("corpus", _corpus_text(data["corpus"])),
        ("texts", "kept in the bank" if data["texts"] else "not kept"),
        ("size", f"{bytes_text(data['bytes'])} ({bytes_text(data['bytes_on_disk'])} on disk)"),
        ("created", " ".join(f"{data['created'][name]}" for name in ("time",) if name in data["created"])),
        ("versions", ", ".join(f"{name} {value}" for name, value in data["versions"].items())),
    ]


def _experts(data: dict[str, Any]) -> Any:
    experts = data["experts"]
    extra = [name for name in ("access", "tags") if any(expert[name] for expert in experts)]
    rows = table("expert", "label", "documents", "tokens", "outcome", *extra, right=("documents", "tokens"))
    for expert in experts:
        rows.add_row(
            expert["id"],
            plain(expert["label"]),
            f"{expert['documents']:,}",
            f"{expert['tokens']:,}",
            plain(_outcome_text(expert, _reference(data, expert)), _STYLES[expert["status"]]),
            *(plain(", ".join(expert[name])) for name in extra),
        )
    return rows


def _reference(data: dict[str, Any], expert: dict[str, Any]) -> str:
    """What an expert was compared with: the trunk, unless there is none or the expert, the only public one, is it."""
    others = sum(not other["access"] for other in data["experts"]) - 1
    is_trunk = data["recipe"] == "joint" and not expert["access"] and others == 0
    return "the base" if data["trunk"] is None or is_trunk else "the trunk"


def _outcome_data(outcome: Outcome) -> dict[str, Any]:
    gained = None
    if outcome.nll is not None and outcome.reference_nll is not None:
        gained = outcome.reference_nll - outcome.nll
    return {
        "status": outcome.status,
        "nats_gained": gained,
        "checked_on": outcome.documents,
        "reason": outcome.reason,
    }


def _outcome_text(outcome: dict[str, Any], reference: str) -> str:
    if outcome["nats_gained"] is None:
        return f"{outcome['status']}: {outcome['reason']}" if outcome["reason"] else str(outcome["status"])
    gained = outcome["nats_gained"]
    better = "better" if gained > 0 else "worse"
    documents = f"{outcome['checked_on']} documents"
    return f"{outcome['status']}: {abs(gained):.3f} nats a token {better} than {reference} on {documents}"


def _training_data(manifest: Manifest) -> dict[str, Any]:
    """Label tokens and peak rates: of the trunk (None without one), and of the experts, rate → how many have it.

    `with_trunk`: those of the experts' tokens that are the trunk's too; `kept`: the share of what set these apart.
    """
    trunk = None if manifest.trunk is None else manifest.trunk.training
    experts = [one.adapter.training for one in manifest.experts if one.adapter is not None]
    known = [training for training in experts if training is not None]
    rates = Counter(f"{training.learning_rate:.3g}" for training in known)
    return {
        "trunk": None if trunk is None else {"tokens": trunk.tokens, "rate": trunk.learning_rate},
        "experts": {
            "tokens": sum(training.tokens for training in known),
            "with_trunk": sum(training.tokens for training in known if training.with_trunk),
            "kept": next((training.kept for training in known if training.with_trunk), None),
            "rates": dict(rates.most_common()),
        },
    }


def _training_text(data: dict[str, Any]) -> str:
    trunk, experts = data["trunk"], data["experts"]
    parts = [] if trunk is None else [f"trunk {trunk['tokens']:,} tokens at {trunk['rate']:.3g}"]
    if experts["rates"]:
        rates = experts["rates"]
        told = next(iter(rates)) if len(rates) == 1 else ", ".join(f"{rate} ({count})" for rate, count in rates.items())
        parts.append(f"experts {experts['tokens']:,} tokens at {told}")
        if experts["with_trunk"]:
            kept = f"{experts['kept']:.0%} of what sets them apart kept"
            parts.append(f"{experts['with_trunk']:,} of them in the trunk's steps, {kept}")
    return "; ".join(parts) if parts else "not recorded"


def _router_data(manifest: Manifest) -> dict[str, Any]:
    router = manifest.router
    return {name: getattr(router, name) for name in ("name", "beta", "tau", "wanted", "active", "max_experts")}


def _corpus_text(corpus: dict[str, Any]) -> str:
    documents, tokens = corpus.get("split_documents", {}), corpus.get("split_tokens", {})
    parts = [f"{name} {count:,} documents, {tokens.get(name, 0):,} tokens" for name, count in documents.items()]
    return "; ".join(parts) if parts else "not recorded"


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
