"""`disa-fast profile`: run a command under Nsight Systems or torch.profiler, and say where its time went.

Two readers, of what either tool leaves, give the same small model: the ranges of this package on the threads that opened them, and
activities on timelines, each with the thread and the time of its launch. On a GPU those are kernels, copies and, where kernels in
them are not traced, whole CUDA graphs, and belong to the range that they were launched in; on a CPU, PyTorch's outermost operators
and calls of the C++ core. One analysis divides each timeline's time among head, backbone and the rest, and each of these into
computing, copying and gaps in which nothing ran.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import profiling
from .files import check_folder, written_aside

TOOLS = ("auto", "nsys", "torch")
PARTS = {"head": "head", "backbone": "backbone", "captures": "graph captures", "outside": "between AR steps"}
KINDS = ("compute", "copies", "gaps")
OPERATORS_SHOWN = 15

_AR_STEP = re.compile(r"AR step k=(\d+) K=(\d+) T=(\d+) rows=(\d+)( head alone)?")
_DENOISE = re.compile(r"denoise T=\d+ rows=\d+ backend=(\w+)")
_PARTS_OF_RANGES = {
    text.split("{")[0]: part
    for text, part in (
        (profiling.AR_STEP, "backbone"),
        (profiling.NOISE, "head"),
        (profiling.DENOISE, "head"),
        (profiling.CAPTURE, "captures"),
    )
}
_OURS = re.compile("|".join(text.split("{")[0] for text in profiling.RANGES))
_COPY = re.compile(
    r"aten::(copy_|_to_copy|to|clone|contiguous|cat|concat|stack|repeat|pad|constant_pad_nd)$"
    r"|memcpy|memset|direct_copy_kernel|CatArrayBatchedCopy",
    re.IGNORECASE,
)


class Range(NamedTuple):
    """Times are integer nanoseconds."""

    thread: Hashable
    start: int
    end: int
    text: str


class Activity(NamedTuple):
    """Something that ran on `timeline`, launched by `thread` at the time `launched`."""

    start: int
    end: int
    name: str
    copies: bool
    timeline: Hashable
    thread: Hashable
    launched: int


class Trace(NamedTuple):
    """Of one process, or several. device: "cpu" or "gpu"."""

    device: str
    ranges: list[Range]
    activities: list[Activity]


# Analysis --------------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """One AR step of one image."""

    number: int
    k: int
    K: int
    T: int
    rows: int


Owner = tuple[_Call | None, str]  # and the part


class Totals:
    """What was added up over traces, in nanoseconds."""

    def __init__(self) -> None:
        self.devices: set[str] = set()
        self.parts: dict[str, dict[str, int]] = {part: dict.fromkeys(KINDS, 0) for part in PARTS}
        self.calls: dict[_Call, dict[str, int]] = {}
        self.backends: dict[_Call, str] = {}
        self.without_backbone: set[_Call] = set()
        self.operators: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def add(self, trace: Trace) -> None:
        """Divide the time of each timeline from the first to the last AR step, every instant once: it belongs to the activity
        that runs, of several to that which began first, and where none runs to the gap before the next."""
        self.devices.add(trace.device)
        owners = self._owners(trace.ranges)
        timelines: dict[Hashable, list[Activity]] = defaultdict(list)
        for activity in [*trace.activities, *(_marks(owners) if trace.device == "cpu" else ())]:
            timelines[activity.timeline].append(activity)
        for activities in timelines.values():
            activities.sort(key=lambda activity: (activity.start, activity.launched))
            owned = [_owner(owners, activity) for activity in activities]
            inside = [i for i, owner in enumerate(owned) if owner is not None and owner[0] is not None]
            if not inside:
                continue
            now = activities[inside[0]].start
            for activity, owner in list(zip(activities, owned, strict=True))[inside[0] : inside[-1] + 1]:
                self._spend(owner, "gaps", max(0, activity.start - now))
                ran = max(0, activity.end - max(now, activity.start))
                self._spend(owner, "copies" if activity.copies else "compute", ran)
                now = max(now, activity.end)
                if activity.name:
                    entry = self.operators[_part(owner), activity.name]
                    entry[0] += 1
                    entry[1] += ran

    def _spend(self, owner: Owner | None, kind: str, time: int) -> None:
        part = _part(owner)
        self.parts[part][kind] += time
        if owner is not None and owner[0] is not None:
            self.calls[owner[0]][part] += time

    def _owners(self, ranges: Iterable[Range]) -> dict[Hashable, tuple[list[int], list[Owner | None]]]:
        """For each thread the times at which the owner of what is launched changes, and to whom."""
        of_threads: dict[Hashable, list[Range]] = defaultdict(list)
        for each in ranges:
            of_threads[each.thread].append(each)
        return {thread: self._changes(some) for thread, some in of_threads.items()}

    def _changes(self, ranges: list[Range]) -> tuple[list[int], list[Owner | None]]:
        # start, end, part and call, which are as around it if None, and backend
        spans: list[tuple[int, int, str | None, _Call | None, str | None]] = []
        before = None
        for each in sorted(ranges):
            step = _AR_STEP.fullmatch(each.text)
            start, part, call = each.start, _part_of(each.text), None
            if step:
                k, K, T, rows = (int(number) for number in step.groups()[:4])
                call = _Call(len(self.calls), k, K, T, rows)
                self.calls[call] = dict.fromkeys(PARTS, 0)
                if step[5] and before is not None and before[1:] == (k - 1, K):
                    start = before[0]  # since when the model's own loop was at it
                elif step[5]:
                    self.without_backbone.add(call)
                before = each.end, k, K
            loop = _DENOISE.fullmatch(each.text)
            spans.append((start, each.end, part, call, loop and loop[1]))

        changes: list[tuple[int, Owner | None]] = []
        stack: list[tuple[int, Owner | None]] = []  # end and owner of the spans that are open
        for start, end, part, call, backend in sorted(spans, key=lambda span: (span[0], -span[1])):
            _close(stack, changes, start)
            around = stack[-1][1] if stack else None
            owner = (call or (around and around[0]), part) if part else around
            if backend and owner[0]:
                self.backends[owner[0]] = backend
            stack.append((end, owner))
            changes.append((start, owner))
        _close(stack, changes, sys.maxsize)
        return [time for time, _ in changes], [owner for _, owner in changes]


def _part_of(text: str) -> str | None:
    """Which part of the time a range opens, if any."""
    return next((part for beginning, part in _PARTS_OF_RANGES.items() if text.startswith(beginning)), None)


def _close(stack: list[tuple[int, Owner | None]], changes: list[tuple[int, Owner | None]], until: int) -> None:
    while stack and stack[-1][0] <= until:
        end, _ = stack.pop()
        changes.append((end, stack[-1][1] if stack else None))


def _part(owner: Owner | None) -> str:
    return "outside" if owner is None else owner[1]


def _owner(owners: dict[Hashable, tuple[list[int], list[Owner | None]]], activity: Activity) -> Owner | None:
    times, changed = owners.get(activity.thread, ([], []))
    at = bisect_right(times, activity.launched) - 1
    return changed[at] if at >= 0 else None


def _marks(owners: dict[Hashable, tuple[list[int], list[Owner | None]]]) -> Iterator[Activity]:
    """Where the owner changes, a gap ends with the old one and another begins with the new one: activities of no length."""
    for thread, (times, _) in owners.items():
        for time in times:
            for launched in (time - 1, time):
                yield Activity(time, time, "", False, thread, thread, launched)


def summarise(totals: Totals) -> dict[str, Any]:
    """Seconds and shares of head, backbone and the rest; AR steps of all images put together by (k, K, T, rows, backend), with
    medians in milliseconds; operators or kernels, the longest first."""
    total = sum(sum(kinds.values()) for kinds in totals.parts.values())
    share = {part: sum(kinds.values()) / total for part, kinds in totals.parts.items()}
    share |= {kind: sum(kinds[kind] for kinds in totals.parts.values()) / total for kind in KINDS}
    together = defaultdict(list)
    for call, spent in totals.calls.items():
        together[call.K, call.k, call.T, call.rows, totals.backends.get(call, "none")].append((call, spent))
    steps = []
    for (K, k, T, rows, backend), calls in sorted(together.items()):
        backbones = [spent["backbone"] for call, spent in calls if call not in totals.without_backbone]
        steps.append(
            {
                "k": k,
                "K": K,
                "T": T,
                "rows": rows,
                "backend": backend,
                "calls": len(calls),
                "head_ms": statistics.median(spent["head"] for _, spent in calls) / 1e6,
                "backbone_ms": statistics.median(backbones) / 1e6 if backbones else None,
                "share": sum(sum(spent.values()) for _, spent in calls) / total,
            }
        )
    operators = [
        {"part": part, "name": name, "calls": calls, "ms": time / 1e6, "share": time / total}
        for (part, name), (calls, time) in sorted(totals.operators.items(), key=lambda item: -item[1][1])
    ]
    return {
        "device": "gpu" if "gpu" in totals.devices else "cpu",
        "seconds": total / 1e9,
        "parts": {part: {kind: time / 1e9 for kind, time in kinds.items()} for part, kinds in totals.parts.items()},
        "share": share,
        "ar_steps": steps,
        "operators": operators,
    }


def report(summary: dict[str, Any]) -> str:
    """The summary as text."""
    total, processes = summary["seconds"], summary["processes"]
    of_whom = f"{len(processes)} processes" if len(processes) > 1 else "one process"
    lines = [f"{total:.3g} s of AR steps in {of_whom}, on the {summary['device'].upper()}, by {summary['tool']}"]
    if summary["skipped"]:
        lines.append(f"not recorded: {summary['skipped']} AR steps that came after; see --seconds")
    lines += ["", f"{'':16s}{'share':>8s}{'compute':>10s}{'copies':>8s}{'gaps':>8s}"]
    shown = {name: summary["parts"][part] for part, name in PARTS.items() if summary["share"][part] >= 0.0005}
    shown["all"] = {kind: total * summary["share"][kind] for kind in KINDS}
    for name, kinds in shown.items():
        cells = [kinds[kind] / total for kind in KINDS]
        lines.append(f"{name:16s}{sum(cells):8.1%}{cells[0]:10.1%}{cells[1]:8.1%}{cells[2]:8.1%}")
    lines += [
        "",
        f"{'k':>4s}{'K':>4s}{'T':>5s}{'rows':>7s}  {'backend':9s}{'calls':>6s}{'head ms':>10s}{'backbone ms':>13s}{'share':>8s}",
    ]
    for step in summary["ar_steps"]:
        backbone = "unknown" if step["backbone_ms"] is None else f"{step['backbone_ms']:.3f}"
        counts = f"{step['k']:4d}{step['K']:4d}{step['T']:5d}{step['rows']:7d}  {step['backend']:9s}{step['calls']:6d}"
        lines.append(f"{counts}{step['head_ms']:10.3f}{backbone:>13s}{step['share']:8.1%}")
    lines += ["", f"{'share':>7s}{'calls':>9s}{'ms':>11s}  the longest {'kernels' if summary['device'] == 'gpu' else 'operators'}"]
    for each in summary["operators"][:OPERATORS_SHOWN]:
        lines.append(f"{each['share']:7.1%}{each['calls']:9d}{each['ms']:11.2f}  {each['name']} ({PARTS[each['part']]})")
    return "\n".join(lines)


# torch.profiler --------------------------------------------------------------------------------------------------------


def read_torch(path: Path) -> Trace:
    """A trace that torch.profiler exported for chrome://tracing."""
    loaded = json.loads(path.read_bytes(), object_hook=_compact)
    events = defaultdict(list)
    for event in loaded["traceEvents"]:
        if event is not None:
            events[event[0]].append(event[1:])
    ranges = [Range((pid, tid), *span, name) for name, pid, tid, span, _ in events["user_annotation"] if _OURS.match(name)]
    starts = defaultdict(list)
    for each in ranges:
        starts[each.thread].append(each.start)
    for some in starts.values():
        some.sort()
    kernels = [event for kind in ("kernel", "gpu_memcpy", "gpu_memset") for event in events[kind]]
    if not kernels:
        return Trace("cpu", ranges, list(_outermost(events["cpu_op"], ranges)))
    launches = {
        args["correlation"]: ((pid, tid), span[0])
        for kind in ("cuda_runtime", "cuda_driver")
        for _, pid, tid, span, args in events[kind]
        if "correlation" in args
    }
    activities = []
    for name, _, _, span, args in kernels:
        thread, launched = launches.get(args.get("correlation"), (None, 0))
        activities.append(Activity(*span, _shortened(name), bool(_COPY.search(name)), args.get("device"), thread, launched))
    return Trace("gpu", ranges, activities)


def _compact(event: dict[str, Any]) -> Any:
    """An event as (category, name, pid, tid, (start, end), arguments), None if nothing is made of it; other objects as they are."""
    if "ph" not in event:
        return event
    if event["ph"] != "X" or "cat" not in event:
        return None
    start = round(1000 * event["ts"])
    args = event.get("args", {}) if event["cat"] != "cpu_op" else {}
    name = sys.intern(event["name"])
    return sys.intern(event["cat"]), name, event["pid"], event["tid"], (start, start + round(1000 * event["dur"])), args


def _outermost(operators: Sequence[tuple], ranges: Sequence[Range]) -> Iterator[Activity]:
    """Operators within no other, and calls of the C++ core. Operators that a range of ours is within count as nothing, since what
    is within them counts. An operator copies if its name says so, or if more than half of it is within operators that do."""
    ours = defaultdict(list)
    for each in ranges:
        if each.text != profiling.CPU_CORE:
            ours[each.thread].append(each.start)
    for some in ours.values():
        some.sort()
    found = [((pid, tid), *span, name) for name, pid, tid, span, _ in operators]
    found += [(each.thread, each.start, each.end, each.text) for each in ranges if each.text == profiling.CPU_CORE]
    found.sort(key=lambda op: (op[0], op[1], -op[2]))
    open_: tuple | None = None
    copied = copied_until = 0

    def closed() -> Iterator[Activity]:
        if open_ is not None:
            thread, start, end, name = open_
            yield Activity(start, end, name, bool(_COPY.search(name)) or 2 * copied > end - start, thread, thread, start)

    for thread, start, end, name in found:
        if open_ is not None and thread == open_[0] and start < open_[2]:
            if start >= copied_until and _COPY.search(name):
                copied, copied_until = copied + end - start, end
            continue
        starts = ours[thread]
        within = bisect_left(starts, start)
        if within < len(starts) and starts[within] < end:
            continue
        yield from closed()
        open_, copied, copied_until = (thread, start, end, name), 0, 0
    yield from closed()


def _shortened(name: str) -> str:
    """A kernel's name without types, template arguments and parameters."""
    return name if name.lower().startswith("mem") else re.split(r"[<(]", name.removeprefix("void "))[0].strip() or name


# Nsight Systems --------------------------------------------------------------------------------------------------------

PUSH_POP, DOMAIN_CREATE = 59, 75  # eventType in NVTX_EVENTS
_PROCESS = ~0xFFFFFF  # of a globalTid, which is then the process's globalPid

_RANGES = f"""
    SELECT nvtx.globalTid, nvtx.start, nvtx.end, COALESCE(nvtx.text, named.value) FROM NVTX_EVENTS AS nvtx
    JOIN (SELECT domainId, globalTid & {_PROCESS} AS process, COALESCE(text, value) AS name
          FROM NVTX_EVENTS LEFT JOIN StringIds ON id = textId WHERE eventType = {DOMAIN_CREATE}) AS domain
        ON domain.domainId = nvtx.domainId AND domain.process = nvtx.globalTid & {_PROCESS} AND domain.name = ?
    LEFT JOIN StringIds AS named ON named.id = nvtx.textId
    WHERE nvtx.eventType = {PUSH_POP} AND nvtx.end IS NOT NULL"""
_ACTIVITIES = {  # table: name to show, name that tells whether it copies, joined tables
    "CUPTI_ACTIVITY_KIND_KERNEL": (
        "short.value",
        "whole.value",
        "JOIN StringIds AS short ON short.id = ran.shortName JOIN StringIds AS whole ON whole.id = ran.demangledName",
    ),
    "CUPTI_ACTIVITY_KIND_MEMCPY": (
        "'memcpy ' || kind.label",
        "'memcpy'",
        "JOIN ENUM_CUDA_MEMCPY_OPER AS kind ON kind.id = ran.copyKind",
    ),
    "CUPTI_ACTIVITY_KIND_MEMSET": ("'memset'", "'memset'", ""),
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": ("'CUDA graph'", "''", ""),
}


def read_nsys(path: Path) -> Trace:
    """A report that `nsys export --type=sqlite` wrote; see "SQLite Schema Reference" in the user guide of Nsight Systems, schema 3.

    Tables are there only if something was recorded for them.
    """
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        ranges, activities = [], []
        if "NVTX_EVENTS" in tables:
            ranges = [Range(*row) for row in database.execute(_RANGES, (profiling.DOMAIN,))]
        for table, (name, whole, joined) in _ACTIVITIES.items():
            if not {table, "CUPTI_ACTIVITY_KIND_RUNTIME"} <= tables:
                continue
            rows = database.execute(
                f"""SELECT ran.start, ran.end, {name}, {whole}, ran.globalPid, ran.deviceId, call.globalTid, call.start
                FROM {table} AS ran {joined} LEFT JOIN CUPTI_ACTIVITY_KIND_RUNTIME AS call
                ON call.correlationId = ran.correlationId AND call.globalTid & {_PROCESS} = ran.globalPid & {_PROCESS}
                WHERE ran.end > ran.start"""
            )
            for start, end, shown, telling, process, device, thread, launched in rows:
                activities.append(
                    Activity(start, end, shown, bool(_COPY.search(telling)), (process, device), thread, launched or 0)
                )
    return Trace("gpu", ranges, activities)


# The command -----------------------------------------------------------------------------------------------------------


def profile(
    command: Sequence[str],
    out: Path,
    tool: str = "auto",
    seconds: float | None = None,
    graph_kernels: bool = False,
) -> tuple[int, dict[str, Any] | None]:
    """Run `command` under a profiler; (its exit status, the summary, or None where the command failed and there is none).

    Leaves OUT/raw, a folder of what the tool recorded, and OUT/summary.json. tool: one of TOOLS. seconds: how long torch.profiler
    records, DEFAULT_SECONDS if None. graph_kernels: have nsys trace the kernels within CUDA graphs. ValueError for options that the
    tool does not have, a tool that is not there, a folder that cannot be written to, or a command that succeeded but of which there
    is nothing to say.
    """
    if shutil.which(command[0]) is None:
        raise ValueError(f"command: {command[0]!r} is not on the path")
    there = shutil.which("nsys") is not None
    if tool == "auto":
        tool = "nsys" if there and torch.cuda.is_available() else "torch"
    if tool == "nsys" and not there:
        raise ValueError("--tool: nsys, of Nsight Systems, is not on the path; torch needs nothing")
    if tool == "nsys" and seconds is not None:
        raise ValueError("--seconds: only torch.profiler stops recording; nsys records all of the command")
    if tool == "torch" and graph_kernels:
        raise ValueError("--graph-kernels: torch.profiler does so anyway; this is an option for nsys")
    check_folder(out, ["summary.json"])
    aside = out.resolve() / f".raw.{secrets.token_hex(4)}"
    aside.mkdir(parents=True)
    try:
        if tool == "torch":
            status = _run(
                command, DISA_FAST_PROFILE=str(aside), DISA_FAST_PROFILE_SECONDS=str(seconds or profiling.DEFAULT_SECONDS)
            )
        else:
            status = _run_nsys(command, aside, graph_kernels)
        totals, skipped, processes = _read(tool, aside)
        reason = _nothing(totals, tool)
        if reason and status:
            print(f"disa-fast profile: {reason}", file=sys.stderr)
            return status, None
        if reason:
            raise ValueError(reason)
        summary = {
            "command": shlex.join(command),
            "status": status,
            "tool": {"torch": "torch.profiler", "nsys": "nsys"}[tool],
            "versions": {"disa_fast": version("disa-fast"), "torch": torch.__version__},
            "date": datetime.date.today().isoformat(),
            "processes": processes,
            "skipped": skipped,
            **summarise(totals),
        }
        shutil.rmtree(out / "raw", ignore_errors=True)
        aside.rename(out / "raw")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    with written_aside(out / "summary.json") as file:
        file.write_text(json.dumps(summary, indent=1) + "\n")
    return status, summary


def _read(tool: str, folder: Path) -> tuple[Totals, int, list[dict[str, Any]]]:
    """(totals, AR steps not recorded, processes) of what a tool left."""
    totals = Totals()
    if tool == "nsys":
        database = folder / "profile.sqlite"
        if not database.exists():
            return totals, 0, []
        trace = read_nsys(database)
        totals.add(trace)
        steps = [each for each in trace.ranges if _AR_STEP.fullmatch(each.text)]
        pids = sorted({each.thread >> 24 & 0xFFFFFF for each in steps})
        return totals, 0, [{"pid": pid, "rank": None} for pid in pids]
    for path in sorted(folder.glob("trace-*.json")):
        totals.add(read_torch(path))
    recorded = [json.loads(path.read_text()) for path in sorted(folder.glob("process-*.json"))]
    skipped = sum(process["skipped"] for process in recorded)
    return totals, skipped, [{name: process[name] for name in ("pid", "rank")} for process in recorded if process["recorded"]]


def _nothing(totals: Totals, tool: str) -> str | None:
    """Why there is nothing to summarise, or None."""
    if not totals.calls:
        needs = (
            "no range of the domain disa_fast was recorded; is the package nvtx there"
            if tool == "nsys"
            else "no AR step was recorded"
        )
        return f"{needs}: does the command draw images with this package?"
    if not any(any(kinds.values()) for kinds in totals.parts.values()):
        return "nothing ran on a GPU in any AR step; for a command that runs on the CPU take --tool torch"
    return None


def _run_nsys(command: Sequence[str], folder: Path, graph_kernels: bool) -> int:
    """The command under `nsys profile`, and the report exported."""
    status = folder / "status"
    wrapped = ["sh", "-c", '"$@"; echo $? > "$0"', str(status), *command]  # nsys need not pass it on
    options = [
        "--trace=cuda,nvtx",
        "--sample=none",
        "--cpuctxsw=none",
        f"--cuda-graph-trace={'node' if graph_kernels else 'graph'}",
    ]
    of_nsys = _run(["nsys", "profile", *options, f"--output={folder / 'profile'}", *wrapped], DISA_FAST_NVTX="1")
    if (folder / "profile.nsys-rep").exists():
        export = ["nsys", "export", "--type=sqlite", f"--output={folder / 'profile.sqlite'}", str(folder / "profile.nsys-rep")]
        _run(export)
    if not status.exists():
        return of_nsys or 1
    found = int(status.read_text())
    status.unlink()
    return found


def _run(command: Sequence[str], **environment: str) -> int:
    """The exit status as a shell gives it. An interrupt is the command's to heed."""
    quiet = {"KINETO_LOG_LEVEL": os.environ.get("KINETO_LOG_LEVEL", "99")}  # it tells of every start and stop
    with _deaf_to_interrupts():
        status = subprocess.run(command, env=os.environ | quiet | environment).returncode
    return status if status >= 0 else 128 - status


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which the command would inherit
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
