"""What must be the same on all ranks, compared before they train together."""

import hashlib
import platform
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tuner
from tuner.dataset.build import PackedDataset, StreamedDataset
from tuner.engine.together import gather_objects
from tuner.engine.world import World, in_ranges
from tuner.errors import UserError

PACKAGES = ("torch", "transformers", "tokenizers", "deepspeed")
MANY = 4  # kinds of values that are shown of what differs


def own_facts(source: str, dataset: PackedDataset | StreamedDataset) -> dict[str, str]:
    """What this rank runs: the config's text, its data, tuner's code, versions of what that stands on."""
    return {
        "config": hashlib.sha256(source.encode()).hexdigest()[:12],
        "data": data_digest(dataset)[:12],
        "tuner's code": package_digest(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
    }


def data_digest(dataset: PackedDataset | StreamedDataset) -> str:
    """A hash of all documents; of a stream, whose documents are yet to come, of its settings."""
    if isinstance(dataset, StreamedDataset):
        return dataset.shards.directory.name.removeprefix("stream-")
    return dataset.shards.fingerprint


def package_digest() -> str:
    """Hash over the source of every module of tuner."""
    root = Path(tuner.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def version_of(package: str) -> str:
    """The version of an installed package; `none` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def compare_ranks(world: World, facts: Mapping[str, str]) -> None:
    """Raise one UserError, the same on all ranks, where a fact differs between ranks; all ranks must call it.

    Args:
        world: of the ranks, joined to a process group where there are several.
        facts: what each is called and, short enough to be shown, what it is on this rank.
    """
    if world.size == 1:
        return
    gathered = gather_objects((socket.gethostname(), dict(facts)), world)
    problems = differences([host for host, _ in gathered], [facts for _, facts in gathered])
    if problems:
        raise UserError(
            "The ranks do not run the same thing:\n"
            + "".join(f"  - {problem}\n" for problem in problems)
            + "Give all nodes the same config, data and installation, and start again."
        )


def differences(hosts: list[str], facts: list[dict[str, str]]) -> list[str]:
    """A line for each fact that is not the same on all ranks; both lists are in the order of the ranks."""
    problems = []
    for name in dict.fromkeys(name for own in facts for name in own):
        ranks: dict[str, list[int]] = {}
        for rank, own in enumerate(facts):
            ranks.setdefault(own.get(name, "unknown"), []).append(rank)
        if len(ranks) > 1:
            kinds = [f"{value} on {whose(members, hosts)}" for value, members in list(ranks.items())[:MANY]]
            more = f"; {len(ranks) - MANY} other kinds" if len(ranks) > MANY else ""
            problems.append(f"{name}: {'; '.join(kinds)}{more}")
    return problems


def whose(ranks: list[int], hosts: list[str]) -> str:
    """[0, 1, 2] -> ranks 0-2 (node-a, node-b)."""
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    shown = ", ".join(names[:MANY]) + (f" and {len(names) - MANY} more" if len(names) > MANY else "")
    return f"rank{'s' * (len(ranks) > 1)} {in_ranges(ranks)} ({shown})"
