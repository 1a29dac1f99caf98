"""The verb doctor: are all machines of a cluster there, alike and fast, and do they share the storage?"""

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import (
    DataCorruptError,
    EnvironmentMismatchError,
    ExitCode,
    MaskwrightError,
    StorageError,
    StorageUnreachableError,
    UnreachableError,
)
from data_pipeline.storage import Location
from launcher.cluster_config import Cluster as ClusterConfig
from launcher.config import load_cluster_config
from launcher.doctor import diagnose, rates_of, share_of_others
from launcher.links import between_machines
from launcher.measurements import Diagnosis, Measurements, NodeMeasurements, best_rates, machines_of
from launcher.options import Cluster, Json, Storage, command, next_command, print_json, print_table, say
from launcher.runs import resolve_storage

if TYPE_CHECKING:
    from launcher.answers.machines import DoctorAnswer, FindingAnswer, NodeAnswer

_ERRORS: dict[ExitCode, type[MaskwrightError]] = {
    ExitCode.STORAGE: StorageError,
    ExitCode.UNREACHABLE: UnreachableError,
    ExitCode.DATA_CORRUPT: DataCorruptError,
    ExitCode.ENVIRONMENT: EnvironmentMismatchError,
}

_MANIFEST_S = 60.0
"""For the manifest of a corpus to be read here."""
_NAMED = 8
"""Nodes that the last line names, whatever goes on in a cluster; the table and --json have all."""


def doctor(
    cluster: Cluster = None,
    storage: Storage = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", metavar="FOLDER|URL", help="A prepared corpus, whose shards every node is to reach.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at every machine of a cluster: is it there, alike and fast, and does it share the storage? Names those to leave out (exit code 6).

    Every part is bounded in time. The storage of runs is tried with some small files, which are removed again.

    Example: maskwright doctor --cluster ray
    """
    where = load_cluster_config(cluster or "local")
    found = _measure(where, resolve_storage(storage), Location.at(corpus) if corpus else None, quiet=as_json)
    diagnosis = diagnose(found)
    again = command("doctor", storage=storage, cluster=cluster)
    if as_json:
        print_json(as_record(where.kind, found, diagnosis))
    else:
        show(found, diagnosis)
    if diagnosis.faults:
        raise error_of(found, diagnosis, again)
    if not as_json:
        next_command(command("run", "CONFIG", storage=storage, cluster=cluster))


def _measure(where: ClusterConfig, storage: Location, corpus: Location | None, *, quiet: bool) -> Measurements:
    from launcher.clusters.local import this_machine
    from launcher.clusters.opening import open_cluster, workers_of
    from launcher.examination import Subject, examine
    from launcher.supervision import never, nothing_left

    shards = shards_within(corpus, _MANIFEST_S) if corpus else []
    machine = this_machine()
    with open_cluster(where, workers_of(where, machine), machine, nothing_left, never):
        from launcher.clusters.probing import known_nodes, probing

        nodes = known_nodes() if where.use_gpu is not False else [replace(node, num_gpus=0.0) for node in known_nodes()]
        with probing([node.id for node in nodes if not node.gone and not node.is_leaving]) as probes:
            return examine(Subject(nodes, storage, corpus, shards), probes, (lambda _: None) if quiet else say)


def shards_within(corpus: Location, within_s: float) -> list[tuple[str, int]]:
    """The shards that the manifest of a corpus names, asked for before anything is started: a dead mount would hang for ever.

    Raises:
        StorageUnreachableError: it is not read in time. NotFoundError, DataCorruptError: see `node_storage.shards_of`.
    """
    from launcher.aside import Aside
    from launcher.node_storage import shards_of

    try:
        return Aside(lambda: shards_of(corpus)).ask(within_s)
    except TimeoutError as error:
        raise StorageUnreachableError(f"corpus {corpus} cannot be read here: {error}", "Look at its mount, or at the way to its store.") from error


def show(found: Measurements, diagnosis: Diagnosis) -> None:
    """A row for each node, then what is wrong, and what would only cost something."""
    links = best_rates(between_machines(found.links, machines_of(found.nodes)))
    say("")
    columns = ("node", "matmul", "of others", "exchange", "write", "read", "clock", "/dev/shm", "verdict")
    print_table(columns, (_row(each, found, links.get(each.node.id), diagnosis) for each in found.nodes))
    say("")
    if found.all_reduce and found.all_reduce.bytes_per_s:
        say(f"all-reduce over {found.all_reduce.num_nodes} nodes: {found.all_reduce.bytes_per_s / 1e6:,.0f} MB/s")
    if found.corpus:
        say(f"shards of {found.corpus.folder}: {found.corpus.num_checked:,} of {found.corpus.num_shards:,} looked at")
    names = {each.node.id: each.node.name for each in found.nodes}
    for finding in diagnosis.findings:
        about = f"{names[finding.node]} " if finding.node else ""
        say(f"{'fault' if finding.is_fault else 'warning'}: {about}{finding.what}\n         {finding.remedy}")
    if not diagnosis.faults:
        say(f"all {len(found.nodes)} nodes are well" if len(found.nodes) > 1 else "this machine is well")


def _row(each: NodeMeasurements, found: Measurements, bytes_per_s: float | None, diagnosis: Diagnosis) -> tuple[str, ...]:
    share = share_of_others(each.node.id, rates_of(found)) if each.rate else None
    return (
        each.node.name,
        f"{each.rate.flops / 1e9:,.0f} GFLOP/s" if each.rate else "",
        "" if share is None else f"{share:.0%}",
        "" if bytes_per_s is None else f"{bytes_per_s / 1e6:,.0f} MB/s",
        f"{1000 * each.written.seconds:,.1f} ms" if each.written else "",
        f"{1000 * each.read.seconds:,.1f} ms" if each.read else "",
        f"{1000 * each.clock.offset_s:+,.1f} ±{1000 * each.clock.error_s:,.1f} ms" if each.clock else "",
        f"{each.facts.shm_bytes / 2**30:,.1f} GiB" if each.facts else "",
        "leave out" if each.node.id in diagnosis.excluded else "",
    )


def error_of(found: Measurements, diagnosis: Diagnosis, again: str) -> MaskwrightError:
    """The verdict as the error that the command ends with: whom to leave out and why, or what else is wrong, and what to do."""
    names = {each.node.id: each.node.name for each in found.nodes}
    reasons: dict[str, list[str]] = {}
    for fault in diagnosis.faults:
        reasons.setdefault(names[fault.node] if fault.node else "", []).append(fault.what)
    general = reasons.pop("", [])
    named = [f"{name}: {why[0]}" for name, why in list(reasons.items())[:_NAMED]]
    more = [f"and {len(reasons) - _NAMED} more"] if len(reasons) > _NAMED else []
    texts = [*general[:_NAMED], *([f"leave out {'; '.join([*named, *more])}"] if named else [])]
    kind = _ERRORS.get(diagnosis.code, EnvironmentMismatchError)
    return kind("; ".join(texts), _remedy(found, diagnosis, again))


def _remedy(found: Measurements, diagnosis: Diagnosis, again: str) -> str:
    """Ray has one way to keep work from a node that lives: to drain it."""
    living = [each.node.id for each in found.nodes if each.node.id in diagnosis.excluded and each.answers and not each.node.is_here]
    if not living:
        return f"{diagnosis.faults[0].remedy} Then: {again}"
    drain = ["ray", "drain-node", "--node-id", living[0], "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "doctor"]
    return f"{diagnosis.faults[0].remedy} A node is left out with `{shlex.join(drain)}`. Then: {again}"


def as_record(kind: str, found: Measurements, diagnosis: Diagnosis) -> "DoctorAnswer":
    """What `--json` prints."""
    links = best_rates(between_machines(found.links, machines_of(found.nodes)))
    findings: list[FindingAnswer] = [
        {"node": it.node, "what": it.what, "remedy": it.remedy, "severity": "fault" if it.is_fault else "warning"} for it in diagnosis.findings
    ]
    together, corpus = found.all_reduce, found.corpus
    return {
        "cluster": kind,
        "healthy": not diagnosis.faults,
        "exit_code": int(diagnosis.code),
        "exclude": list(diagnosis.excluded),
        "nodes": [_node_record(each, found, links.get(each.node.id), diagnosis) for each in found.nodes],
        "all_reduce": together and {"nodes": together.num_nodes, "bytes_per_s": together.bytes_per_s, "error": together.error or None},
        "links": [{"nodes": list(link.nodes), "bytes_per_s": link.bytes_per_s, "error": link.error or None} for link in found.links],
        "storage": found.storage,
        "corpus": corpus and {"folder": corpus.folder, "shards": corpus.num_shards, "checked": corpus.num_checked, "damaged": dict(corpus.damaged)},
        "findings": findings,
    }


def _node_record(each: NodeMeasurements, found: Measurements, bytes_per_s: float | None, diagnosis: Diagnosis) -> "NodeAnswer":
    return {
        "id": each.node.id,
        "address": each.node.address,
        "host": each.node.host,
        "answers": each.answers,
        "exclude": each.node.id in diagnosis.excluded,
        "device": each.rate and each.rate.device,
        "threads": each.rate and each.rate.threads,
        "flops": each.rate and each.rate.flops,
        "share_of_others": share_of_others(each.node.id, rates_of(found)) if each.rate else None,
        "bytes_per_s": bytes_per_s,
        "write_s": each.written and each.written.seconds,
        "read_s": each.read and each.read.seconds,
        "clock_offset_s": each.clock and each.clock.offset_s,
        "clock_error_s": each.clock and each.clock.error_s,
        "shm_bytes": each.facts and each.facts.shm_bytes,
        "versions": dict(each.facts.versions) if each.facts else None,
        "open_ports": list(each.facts.open_ports) if each.facts else None,
        "unsure_ports": list(each.facts.unsure_ports) if each.facts else None,
        "shards_checked": each.shards and each.shards.checked,
    }


VERBS = (doctor,)
