"""`make bench-report`: README.md's performance section, docs/benchmarks/index.html and its pictures, of the committed results.

All is made of bench/results/heads.json and images.json (`make bench`), and of regression.json and soak.json where they are. With
--check nothing is written: what differs is shown, and is an error. Drawing needs matplotlib, the check does not: a picture carries
the digest of the results that it was drawn from.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import html
import importlib
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from disa_fast.files import written_aside

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- performance: made by make bench-report -->", "<!-- end of performance -->"
RESULTS, PAGES = Path("bench/results"), Path("docs/benchmarks")
SHOWN, SIZE = "MAR-L", "width 1280, depth 8"  # whose steps the README's table and the roofline are about
SYSTEMS = ("MAR", "Harmon", "FlowAR", "xAR")

PEERS = {"torch.compile": "`torch.compile`", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
FLOW_HEADS = PEERS | {"hoisted": "`hoisted`", "hoisted bfloat16": "`hoisted`, bfloat16"}
HEADS = FLOW_HEADS | {"cpu": "`cpu`, float32", "cpu bfloat16": "`cpu`, bfloat16 weights"}
IMAGES = {"torch.compile": "`torch.compile`", "disa_fast": "disa_fast", "disa_fast bfloat16": "disa_fast, bfloat16"}
PARTS = ("head", "backbone", "other")
PICTURES = {"speed_up": "heads", "roofline": "heads", "share_of_time": "images", "ar_steps": "images"}  # and of whose results

Entry = dict[str, Any]  # extra_info of a benchmark


# Results ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """A file of pytest-benchmark's: the extra_info of its benchmarks, and on what, when and of which commit they were measured.

    digest: of the file, to know by what was made of it.
    """

    path: Path
    machine: dict[str, Any]
    date: str
    commit: str
    entries: list[Entry]
    digest: str

    @property
    def source(self) -> str:
        return f"{machine_name(self.machine)}, PyTorch {self.machine['torch']}; {self.date}, commit {self.commit}; {self.path}"

    def of(self, kind: str, **wanted: object) -> list[Entry]:
        """Of that kind, and with these values."""
        wanted["kind"] = kind
        return [entry for entry in self.entries if all(entry.get(name) == value for name, value in wanted.items())]


@dataclass(frozen=True)
class Found:
    """regression, soak: what bench/regression.py and bench/soak.py recorded, if they did."""

    heads: Results
    images: Results
    regression: dict[str, Any] | None
    soak: dict[str, Any] | None

    @property
    def steps(self) -> dict[str, list[Entry]]:
        """Of the MLP heads, by model, from few rows to many."""
        by_model: dict[str, list[Entry]] = {}
        for step in sorted(self.heads.of("step", system="MAR"), key=lambda step: step["rows"]):
            by_model.setdefault(step["model"], []).append(step)
        return by_model

    @property
    def named_images(self) -> dict[str, Entry]:
        """By what the tables call them, system by system."""
        images = sorted(self.images.of("image"), key=lambda image: SYSTEMS.index(image["system"]))
        return {image["model"] + ("" if image["images"] == 1 else f", {image['images']} images"): image for image in images}

    @property
    def one_of_each_system(self) -> dict[str, Entry]:
        named = self.named_images
        first = {image["system"]: name for name, image in reversed(named.items())}
        return {name: named[name] for name in reversed(first.values())}


def read(root: Path) -> Found:
    """The committed results. FileNotFoundError where there are none, ValueError where they are others than those of bench/."""
    heads = read_results(root, "heads.json", ("step", "trajectory", "neighbours"))
    images = read_results(root, "images.json", ("image",))
    records = (root / RESULTS / name for name in ("regression.json", "soak.json"))
    found = Found(heads, images, *(json.loads(path.read_text()) if path.is_file() else None for path in records))
    if SHOWN not in found.steps:
        raise ValueError(f"{heads.path}: expected steps of {SHOWN}, found those of {listed(list(found.steps)) or 'no MAR'}")
    if len(found.named_images) < len(images.entries):
        raise ValueError(f"{images.path}: expected one result of each model and number of images, found more")
    for name, image in found.named_images.items():
        if not {"eager", "disa_fast"} <= image["results"].keys():
            raise ValueError(
                f"{images.path}: {name}: expected results of eager and disa_fast, found {listed(list(image['results']))}"
            )
    return found


def read_results(root: Path, name: str, kinds: Sequence[str]) -> Results:
    path = RESULTS / name
    if not (root / path).is_file():
        raise FileNotFoundError(f"{path}: not there; `make bench` measures it")
    text = (root / path).read_text()
    file = json.loads(text)
    entries = [benchmark["extra_info"] for benchmark in file["benchmarks"]]
    for entry in entries:
        if entry.get("kind") not in kinds:
            raise ValueError(f"{path}: expected benchmarks of kind {' or '.join(kinds)}, found {entry.get('kind')!r}")
    commit = file["commit_info"].get("id", "unknown")[:7] + (" with changes" if file["commit_info"].get("dirty") else "")
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Results(path, file["machine_info"], file["datetime"][:10], commit, entries, digest)


def machine_name(machine: dict[str, Any]) -> str:
    cpu, threads = machine["cpu"], machine["threads"]
    article = "an" if cpu[0] in "AEIOU" else "a"
    return f"{counted(threads, 'thread')} of {article} {cpu} ({machine['cpu_capability']})"


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("cpu", "threads", "cpu_capability"))


# Words -----------------------------------------------------------------------------------------------------------------


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def bottleneck(image: Entry) -> str:
    """What takes most of the time under disa_fast, and its share."""
    part, _, kind = image["next"].partition(": ")
    if part == "between":
        words = "the time between operators"
    else:
        words = {"": f"the {part}", "other": f"the rest of the {part}"}.get(kind, f"{kind} of the {part}")
    return f"{words}, {percent(image['operators'][image['next']])}"


def share_of_head(result: Entry) -> str:
    return percent(result["parts"]["head"] / sum(result["parts"].values()))


# Tables ----------------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Cells are Markdown of which only `code` is understood elsewhere; an empty one was not measured."""

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self._line(self.header), "|" + "---|" * len(self.header), *(self._line(row) for row in self.rows)]
        return "\n".join(lines)

    @staticmethod
    def _line(cells: list[str]) -> str:
        return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"

    def html(self) -> str:
        lines = ["<table>", "<tr>" + "".join(f"<th>{marked(cell)}</th>" for cell in self.header) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{marked(cell)}</td>" for cell in row) + "</tr>" for row in self.rows]
        return "\n".join([*lines, "</table>"])


def marked(text: str) -> str:
    """As HTML."""
    return re.sub("`(.+?)`", r"<code>\1</code>", html.escape(text, quote=False))


def over_eager(entry: Entry, columns: dict[str, str], quartiles: bool = False) -> list[str]:
    cells = []
    for name in columns:
        result = entry["results"].get(name)
        cells.append("" if result is None else times(result["over_eager"]))
        if result is not None and quartiles:
            low, high = result["quartiles"]
            cells[-1] += f" ({low:.2f}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high:.2f})"
    return cells


def of_floor(entry: Entry) -> str:
    """Of the C++ core in float32 and in bfloat16."""
    results = [entry["results"].get(name) for name in ("cpu", "cpu bfloat16")]
    return " and ".join("-" if result is None else percent(result["of_floor"]) for result in results) if any(results) else ""


def trajectory_name(entry: Entry) -> str:
    measured, whole = len(entry["iterations"]), entry["num_iter"]
    calls = f"all {whole}" if measured == whole else f"{measured} of the {whole}"
    return f"{calls} AR iterations of {counted(entry['images'], 'image')}"


def step_name(step: Entry) -> str:
    tokens = "" if step["system"] == "MAR" else f" of {counted(step['tokens_per_row'], 'token')}"
    return f"{step['model']}, {step['rows']} rows{tokens}"


def steps_table(found: Found, model: str, quartiles: bool = False) -> Table:
    """Of an MLP head: steps by rows, then trajectories."""
    whole = found.heads.of("trajectory", system="MAR", model=model)
    rows = [[str(step["rows"]), *over_eager(step, HEADS, quartiles), of_floor(step)] for step in found.steps[model]]
    rows += [[trajectory_name(entry), *over_eager(entry, HEADS, quartiles), ""] for entry in whole]
    return Table(["rows", *HEADS.values(), "of the floor"], rows)


def flow_table(found: Found, quartiles: bool = False) -> Table:
    """Of FlowAR's head."""
    rows = [[step_name(step), *over_eager(step, FLOW_HEADS, quartiles)] for step in found.heads.of("step", system="FlowAR")]
    return Table(["", *FLOW_HEADS.values()], rows)


def images_table(found: Found, quartiles: bool = False) -> Table:
    rows = [
        [
            name,
            *over_eager(image, IMAGES, quartiles),
            ", then ".join(share_of_head(image["results"][contestant]) for contestant in ("eager", "disa_fast")),
            bottleneck(image),
        ]
        for name, image in found.named_images.items()
    ]
    return Table(["", *IMAGES.values(), "head's share of the time", "what takes most then"], rows)


def limits_table(found: Found) -> Table:
    """What ours reach of what the machine does."""
    shares = ("of_bandwidth", "of_peak", "of_floor")
    rows = [
        [
            step_name(step),
            (HEADS | FLOW_HEADS)[name],
            f"{result['us_per_step']:.0f}",
            f"{result['GB/s']:.1f}",
            f"{result['GFLOP/s']:.0f}",
            *(percent(result[share]) if share in result else "" for share in shares),
        ]
        for step in itertools.chain(*found.steps.values(), found.heads.of("step", system="FlowAR"))
        for name, result in step["results"].items()
        if "of_bandwidth" in result
    ]
    return Table(["step", "", "us", "GB/s", "GFLOP/s", "of the bandwidth", "of the peak", "of the floor"], rows)


def parts_table(found: Found) -> Table:
    """Seconds of an image: for their proportions."""
    rows = [
        [name, IMAGES.get(contestant, contestant), f"{result['seconds']:.2f}", *(f"{result['parts'][part]:.2f}" for part in PARTS)]
        for name, image in found.named_images.items()
        for contestant, result in image["results"].items()
        if "parts" in result
    ]
    return Table(["", "", "seconds", *PARTS], rows)


def operators_table(found: Found) -> Table:
    rows = [
        [name, kind, percent(share)]
        for name, image in found.named_images.items()
        for kind, share in sorted(image["operators"].items(), key=lambda item: -item[1])
    ]
    return Table(["", "operators", "share of the time under disa_fast"], rows)


# README ----------------------------------------------------------------------------------------------------------------


def section(found: Found) -> str:
    """README's performance section, between the two marks."""
    heads, images, of_shown = found.heads, found.images, steps_table(found, SHOWN)
    return in_paragraphs(f"""
        ## How much faster the loop is

        A denoising step of the {SHOWN} head ({SIZE}) with guidance, as a multiple of the published loop's speed in eager PyTorch,
        float32, on {machine_name(heads.machine)}. All take turns in one process; medians of the ratios ({heads.path},
        {heads.date}, made by `make bench`{other_models(found)}). `torch.compile`, ONNX Runtime and OpenVINO run the network, the
        last two as torch.onnx exports it; the loop around it is the published one. {empty_cells(of_shown)}

        {of_shown.markdown()}

        The floor (last column: float32, then bfloat16) is the least time that the machine allows: for the products in the loop,
        and for those of the modulation before it, the longer of reading the weights once at the measured bandwidth and of
        multiplying them at the measured peak; the sum of both. {rows_of_an_image(found)}

        ![{speed_up_alt(found)}]({PAGES}/speed_up.png)

        Times of other machines mean nothing; ratios may differ too. {beside_neighbours(found)}

        {flow_block(found)}

        ### Whole images

        Images with random weights, everything but the VAE included, as a multiple of the speed of upstream's structure in eager
        PyTorch with the same annealed schedule, float32, on {machine_name(images.machine)}{other_machine(found)}; all take turns
        over one set of weights ({images.path}, {images.date}, made by `make bench`; upstream's structure is bench/mar_peers.py,
        bench/harmon_peers.py and bench/flow_peers.py). disa_fast is `disa_fast.accelerate` on that same object; disa_fast,
        bfloat16 is this package's own model with its weights in bfloat16. {smaller_than_published(found)}

        {images_table(found).markdown()}

        The head's share is that in eager PyTorch, then that under disa_fast. The last column is the next bottleneck.
        {shares_of_scales(found)}

        ![{share_of_time_alt(found)}]({PAGES}/share_of_time.png)

        Where that comes from: in a MAR or a Harmon only the head is replaced; the transformer around it stays the object's own.
        In FlowAR and xAR nothing unconditional is computed where nothing is guided (the whole first cell of xAR, a third of its
        evaluations; the first scale of FlowAR and the first steps of the others), modulations that depend on class and time alone
        and cross-attention's keys and values are made once, keys and values are written where they stay, and matrix products go
        to oneDNN over the weights as they lie (no copy of them); how much faster that is than `F.linear` depends on the processor
        (bench/NOTES.md).

        {regression_blocks(found)}

        {soak_block(found)}

        All tables, the time of every AR step and the roofline are in {PAGES}/index.html. `make bench` measures anew, `make
        bench-check` compares with the baseline, and `make bench-report` makes this section and that page of what lies in
        bench/results.
        """)


def in_paragraphs(text: str) -> str:
    """Blocks apart by one empty line, those that are prose filled; empty ones are left out."""
    blocks = [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
    return "\n\n".join(block if block[0] in "#|!" else filled(block) for block in blocks) + "\n"


def filled(text: str) -> str:
    """In lines of 140 characters, none of which ends within `code`."""
    held = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), " ".join(text.split()))
    return textwrap.fill(held, 140, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def other_models(found: Found) -> str:
    others = [model for model in found.steps if model != SHOWN]
    return f"; {listed(others)} {'is' if len(others) == 1 else 'are'} there too" if others else ""


def empty_cells(table: Table) -> str:
    """Of contestants: neither of the first column nor of the last."""
    return "An empty cell was not measured." if any(not cell for row in table.rows for cell in row[1:-1]) else ""


def rows_of_an_image(found: Found) -> str:
    for image in found.images.of("image", system="MAR", images=1):
        steps = image["ar_steps"]
        rows = span([step["rows"] for step in steps])
        return f"An image draws {rows} rows at a time, with {steps[0]['T']} steps at first and {steps[-1]['T']} at last."
    return ""


def speed_up_alt(found: Found) -> str:
    steps = found.steps[SHOWN]
    first = steps[0]["results"]
    best = max(first, key=lambda name: first[name]["over_eager"])
    ends = [f"{times(s['results'][best]['over_eager'])} at {s['rows']} rows" for s in (steps[0], steps[-1]) if best in s["results"]]
    models = listed(list(found.steps))
    return f"Speed of a denoising step over eager PyTorch by rows, for {models}; of {SHOWN} by {best} {listed(ends)}"


def beside_neighbours(found: Found) -> str:
    beside = sorted(found.heads.of("neighbours", model=SHOWN), key=lambda entry: entry["rows"])
    slower = [
        f"{listed([format(entry['slower'][backend]['median'], '.1f') for entry in beside])} times as long on `{backend}`"
        for backend in ("cpu", "hoisted")
        if beside and all(backend in entry["slower"] for entry in beside)
    ]
    if not slower:
        return ""
    rows = listed([str(entry["rows"]) for entry in beside])
    return f"With another program busy on every core, a call of {rows} rows takes {listed(slower)}; 2 times is its fair share."


def flow_block(found: Found) -> str:
    table = flow_table(found)
    return (
        f"""
        The same for FlowAR's head, which draws all tokens of a scale at once:

        {table.markdown()}
        """
        if table.rows
        else ""
    )


def other_machine(found: Found) -> str:
    return "" if same_machine(found.heads.machine, found.images.machine) else ", which is another machine than the one above"


def smaller_than_published(found: Found) -> str:
    """Harmon's images, where they have less than the published 512 x 512 pixels."""
    harmons = {name: image for name, image in found.named_images.items() if image["system"] == "Harmon"}
    smaller = [name for name, image in harmons.items() if image["image_size"] == [256, 256]]
    return (
        f"{listed(smaller)} {'draws' if len(smaller) == 1 else 'draw'} 256 x 256 pixels, a quarter of what is published."
        if smaller
        else ""
    )


def shares_of_scales(found: Found) -> str:
    shares = []
    for name, image in found.named_images.items():
        if image["system"] in ("FlowAR", "xAR") and image["images"] == 1:
            seconds = [sum(step["seconds"]["disa_fast"].values()) for step in image["ar_steps"]]
            shares.append(f"{name} {', '.join(percent(one / sum(seconds)) for one in seconds)}")
    return f"Of the time then, by scale of FlowAR and cell of xAR: {'; '.join(shares)}." if shares else ""


def share_of_time_alt(found: Found) -> str:
    after = [f"{name} {1 / image['results']['disa_fast']['over_eager']:.2f}" for name, image in found.named_images.items()]
    return f"Time of an image under disa_fast, with its parts head, backbone and other; of that of eager PyTorch: {listed(after)}"


def regression_blocks(found: Found) -> str:
    recorded = found.regression
    if recorded is None:
        return ""
    failures = recorded["unchanged_failures"]
    planted = [
        f"{plant['what']} ({'caught' if plant['caught'] else 'not caught'}, by {plant['cases_caught']} of {plant['cases']} ratios)"
        for plant in recorded["planted"]
    ]
    return f"""
        ### Holding the line

        `make bench-check` takes {counted(len(recorded["cases"]), "ratio")} of our speed to eager's, in pairs of calls, and fails
        where ours take more than {percent(recorded["bound"])} longer than at the time of the baseline (bench/baselines, one for
        each class of machine, by `make bench-baseline`). Of {counted(recorded["unchanged_runs"], "check")} of unchanged code
        {failures or "none"} failed. {f"Slowed down on purpose: {'; '.join(planted)}." if planted else ""}
        That was on {machine_name(recorded["machine"])}, {recorded["date"]} ({RESULTS}/regression.json). A change is best judged by
        `make bench-check AGAINST=main`: that builds the commit and measures both in turns, so the machine is the same.
        """


def soak_block(found: Found) -> str:
    soak = found.soak
    if soak is None:
        return ""
    failed = len(soak["failures"]) + sum(not verdict["holds"] for verdict in soak["verdicts"])
    (grown,) = (verdict["grew"] for verdict in soak["verdicts"] if verdict["what"].startswith("resident bytes, fitted"))
    return f"""
        `make soak` made {soak["calls"]:,} calls of random rows, steps, solvers, guidance, dtypes and backends,
        {soak["calls_beside_others"]:,} of them beside others: {failed or "none"} failed, {soak["repeats_compared"]:,} repeats were
        compared with the bits of their first run, and resident memory grew by {grown / 1e6:.0f} MB ({soak["date"]},
        {RESULTS}/soak.json).
        """


def of_readme(readme: str, found: Found) -> str:
    """`readme` with the section in place. ValueError unless it has both marks, once each and in that order."""
    before, begin, rest = readme.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"README.md: expected one line {BEGIN!r} and below it one line {END!r}")
    return f"{before}{begin}\n{section(found)}\n{end}{after}"


# The page --------------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; font-variant-numeric: tabular-nums }
td:last-child { white-space: nowrap }
img { max-width: 100%; height: auto }
figure { margin: 1.5rem 0 }
figcaption { color: #666; font-size: .85rem }
"""


def page(found: Found) -> str:
    """docs/benchmarks/index.html, which needs nothing but the pictures beside it."""
    heads, images = found.heads, found.images
    by_model = [f"<h3>{html.escape(model)}</h3>{steps_table(found, model, quartiles=True).html()}" for model in found.steps]
    flow = flow_table(found, quartiles=True)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>disa_fast: benchmarks</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Benchmarks of disa_fast</h1>
<p>Made by <code>make bench-report</code> of results in the repository. Ratios are medians, turn by turn within one process, with
their quartiles in brackets. Times are there for their proportions; those of other machines mean nothing.</p>
{sources_table(found).html()}

<h2>A denoising step of an MLP head</h2>
{figure("speed_up", speed_up_alt(found), heads)}
<p>Speed over the published loop in eager PyTorch, float32, guided. {peer_versions(found)}</p>
{"".join(by_model)}
{figure("roofline", f"Roofline of the {SHOWN} head: all contestants, and the bandwidth and the peak of the machine", heads)}
<p>All points are the hoisted loop's work over the time taken, whoever runs: what the others compute beyond that does not count.
In bfloat16 a byte of weights holds twice as many numbers. The peak is that of multiply-adds in float32; a library's products of
bfloat16 may go beyond it.</p>
{limits_table(found).html()}
<p>{marked(beside_neighbours(found))}</p>

{f"<h2>FlowAR's head</h2>{flow.html()}" if flow.rows else ""}

<h2>Whole images</h2>
{figure("share_of_time", share_of_time_alt(found), images)}
{images_table(found, quartiles=True).html()}
<p>Head's share: in eager PyTorch, then under disa_fast. The last column is the next bottleneck. {smaller_than_published(found)}</p>
{figure("ar_steps", "Seconds of head and backbone by AR step, eager and under disa_fast, and the schedule's steps T(k)", images)}
<h3>Settings</h3>
{settings_table(found).html()}
<h3>Parts</h3>
{parts_table(found).html()}
<h3>Operators, by torch.profiler</h3>
{operators_table(found).html()}

{regression_html(found)}
</body>
</html>
"""


def figure(name: str, alt: str, results: Results) -> str:
    alt, source = html.escape(alt), html.escape(results.source)
    return f'<figure><img src="{name}.png" width="800" alt="{alt}"><figcaption>{source}</figcaption></figure>'


def sources_table(found: Found) -> Table:
    rows = [
        [f"`{results.path}`", machine_name(results.machine) + other, str(results.machine["torch"]), results.date, results.commit]
        for results, other in ((found.heads, ""), (found.images, other_machine(found)))
    ]
    return Table(["results", "measured on", "PyTorch", "date", "commit"], rows)


def peer_versions(found: Found) -> str:
    versions = found.steps[SHOWN][0].get("versions", {})
    return f"{listed([f'{PEERS[name]} {version}' for name, version in versions.items()])}." if versions else ""


def settings_table(found: Found) -> Table:
    rows = [
        [name, image["schedule"], str(image["num_iter"] or len(image["ar_steps"])), f"{image['cfg']:g}", str(image["turns"])]
        for name, image in found.named_images.items()
    ]
    return Table(["", "schedule", "AR steps", "guidance", "turns"], rows)


def regression_html(found: Found) -> str:
    heading, _, paragraph = regression_blocks(found).strip().partition("\n")
    return f"<h2>{heading.lstrip('# ')}</h2>\n<p>{marked(' '.join(paragraph.split()))}</p>" if heading else ""


# The command -----------------------------------------------------------------------------------------------------------


def texts(root: Path, found: Found) -> dict[Path, str]:
    """What the text files made of the results should hold, by path under root."""
    return {Path("README.md"): of_readme((root / "README.md").read_text(), found), PAGES / "index.html": page(found)}


def disagreements(root: Path = ROOT) -> str:
    """What in README.md and docs/benchmarks is not what the results say, as a diff; empty where there is nothing."""
    found, lines = read(root), []
    for path, expected in texts(root, found).items():
        committed = (root / path).read_text() if (root / path).is_file() else ""
        sides = committed.splitlines(), expected.splitlines()
        lines += difflib.unified_diff(*sides, f"{path}, as it is", f"{path}, by the results", lineterm="")
    for name, whose in PICTURES.items():
        path, digest = PAGES / f"{name}.png", getattr(found, whose).digest.encode()
        if not (root / path).is_file() or digest not in (root / path).read_bytes():
            lines.append(f"{path}: not drawn from these results")
    return "\n".join(lines)


def write(root: Path = ROOT) -> list[Path]:
    """README.md's section, the page and the pictures; their paths under root. ModuleNotFoundError without matplotlib."""
    pictures = importlib.import_module(f"{__package__}.report_pictures" if __package__ else "report_pictures")
    found = read(root)
    heads, images = found.heads.source, found.images.source
    figures = {
        "speed_up": pictures.speed_up(found.steps, heads),
        "roofline": pictures.roofline(found.steps[SHOWN], heads),
        "share_of_time": pictures.share_of_time(found.named_images, images),
        "ar_steps": pictures.ar_steps(found.one_of_each_system, images),
    }
    made = texts(root, found)
    for path, text in made.items():
        with written_aside(root / path) as aside:
            aside.write_text(text)
    for name, whose in PICTURES.items():
        with written_aside(root / PAGES / f"{name}.png") as aside:
            figures[name].savefig(aside, metadata={"Description": f"of results {getattr(found, whose).digest}"})
    return [*made, *(PAGES / f"{name}.png" for name in PICTURES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the files are not what the results say")
    options = parser.parse_args()
    try:
        if not options.check:
            print("written:", *write(ROOT))
        elif found := disagreements(ROOT):
            print(found)
            sys.exit("README.md or docs/benchmarks is not what bench/results says: run `make bench-report`")
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f"bench.report: {error}")


if __name__ == "__main__":
    main()
