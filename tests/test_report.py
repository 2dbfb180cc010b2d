"""`make bench-report` on made-up results: what is written carries their numbers, and what disagrees with them is found."""

import copy
import html.parser
import itertools
import json
import re
import sys

import pytest
import report

MACHINE = {"cpu": "AMD Test", "threads": 2, "cpu_capability": "AVX512", "python": "3.11.7", "torch": "2.13.0+cpu"}
README = f"# before\n\n{report.BEGIN}\nold\n{report.END}\n\n## after\n"


def step(model, rows, ratios, system="MAR", tokens=1, **floors):
    """ratios: over eager by contestant; floors: share of the floor, likewise, with _ for a space."""
    results = {
        name: {
            "us_per_step": 1000 / ratio,
            "over_eager": ratio,
            "quartiles": [0.9 * ratio, 1.1 * ratio],
            "GB/s": 2.0 * ratio,
            "GFLOP/s": rows * ratio,
            "flops_per_byte": rows / (1 if "bfloat16" in name else 2),
        }
        for name, ratio in ratios.items()
    }
    for name, share in floors.items():
        results[name.replace("_", " ")] |= {"of_bandwidth": 0.9 * share, "of_peak": 0.5 * share, "floor_us": 1.0, "of_floor": share}
    limits = {"float32": 40e9, "bfloat16": 60e9, "multiply-add": 500e9}
    return {"kind": "step", "system": system, "model": model, "images": 1, "rows": rows, "tokens_per_row": tokens, "steps": 10} | {
        "turns": 7, "isa": "avx512", "limits": limits, "versions": {"openvino": "2026.4"}, "results": results,
    }  # fmt: skip


def trajectory(images, iterations, ratios):
    results = {name: {"seconds": 10 / r, "over_eager": r, "quartiles": [r, r]} for name, r in ratios.items()}
    about = {"kind": "trajectory", "system": "MAR", "model": "MAR-L", "images": images, "iterations": iterations}
    return about | {"num_iter": 4, "turns": 3, "results": results}


def image(system, model, ratios, parts, steps, operators, images=1, side=256):
    """parts: (head, backbone, other) of eager and of disa_fast, seconds; steps: (T, rows) of each AR step."""
    both = dict(zip(("eager", "disa_fast"), parts, strict=True))
    results = {name: {"seconds": 8 / r, "over_eager": r, "quartiles": [0.9 * r, 1.1 * r]} for name, r in ratios.items()}
    for name, of_it in both.items():
        results[name]["parts"] = dict(zip(("head", "backbone", "other"), of_it, strict=True))
    ar_steps = [
        {"k": k, "T": T, "rows": rows}
        | {"seconds": {name: {"head": p[0] * T / 10, "backbone": p[1] / len(steps)} for name, p in both.items()}}
        for k, (T, rows) in enumerate(steps)
    ]
    return {"kind": "image", "system": system, "model": model, "images": images, "dtype": "float32", "schedule": "linear:5-2"} | {
        "num_iter": 3, "cfg": 3.0, "image_size": [side, side], "turns": 2, "results": results, "ar_steps": ar_steps,
        "operators": operators, "next": max(operators, key=operators.get),
    }  # fmt: skip


HEADS = [
    step(
        "MAR-B", 2, {"eager": 1.0, "torch.compile": 1.02, "onnxruntime": 2.0, "openvino": 2.5, "hoisted": 5.0, "cpu": 9.0}, cpu=0.9
    ),
    # Not in the order of the table.
    step(
        "MAR-L",
        8,
        {
            "eager": 1.0,
            "torch.compile": 1.06,
            "onnxruntime": 1.91,
            "openvino": 2.59,
            "hoisted": 4.67,
            "hoisted bfloat16": 6.05,
            "cpu": 6.21,
            "cpu bfloat16": 8.47,
        },
        cpu=0.883,
        cpu_bfloat16=0.754,
    ),
    step(
        "MAR-L",
        2,
        {
            "eager": 1.0,
            "torch.compile": 1.01,
            "onnxruntime": 2.2,
            "openvino": 3.1,
            "hoisted": 8.45,
            "hoisted bfloat16": 13.0,
            "cpu": 12.51,
            "cpu bfloat16": 22.0,
        },
        cpu=0.931,
        cpu_bfloat16=0.82,
    ),
    step(
        "FlowAR-S", 2, {"eager": 1.0, "torch.compile": 1.03, "hoisted": 2.51, "hoisted bfloat16": 3.76}, "FlowAR", 16, hoisted=0.7
    ),
    trajectory(1, [0, 1, 2, 3], {"eager": 1.0, "hoisted": 6.46, "cpu": 9.4, "cpu bfloat16": 11.68}),
    trajectory(256, [0, 3], {"eager": 1.0, "hoisted": 2.11, "cpu": 2.31, "cpu bfloat16": 2.22}),
    *(
        {"kind": "neighbours", "model": "MAR-L", "rows": rows}
        | {"slower": {"cpu": {"median": cpu, "worst": 9.0}, "hoisted": {"median": hoisted, "worst": 50.0}}}
        for rows, cpu, hoisted in ((2, 2.43, 4.05), (32, 2.08, 2.97))
    ),
]
BACKBONE = {"head": 0.2, "backbone: matrix products": 0.61, "backbone: attention": 0.09, "backbone: other": 0.06, "between": 0.04}
ONLY_HEAD = {"head: matrix products": 0.7, "head: attention": 0.15, "head: other": 0.1, "between": 0.05}
OURS = {"eager": 1.0, "disa_fast": 2.0, "disa_fast bfloat16": 3.5}
STEPS = [(5, 2), (3, 6), (2, 14)]
IMAGES = [
    image("xAR", "xAR-B", {**OURS, "disa_fast": 2.89}, [(9.8, 0, 0.2), (3.2, 0, 0.2)], [(5, 128), (2, 128)], ONLY_HEAD),
    image("MAR", "MAR-B", {**OURS, "torch.compile": 1.04}, [(7.0, 2.9, 0.1), (2.0, 2.9, 0.1)], STEPS, BACKBONE),
    image("FlowAR", "FlowAR-S", OURS, [(9.0, 0.9, 0.1), (4.0, 0.9, 0.1)], [(5, 2), (5, 512)], {**ONLY_HEAD, "head: other": 0.75}),
    image(
        "FlowAR",
        "FlowAR-S",
        OURS,
        [(9.0, 0.9, 0.1), (4.0, 0.9, 0.1)],
        [(5, 16), (5, 4096)],
        {"between": 0.6, "head": 0.4},
        images=8,
    ),
    image("Harmon", "Harmon-0.5b", OURS, [(5.0, 4.9, 0.1), (1.0, 3.9, 0.1)], STEPS, BACKBONE),
]
REGRESSION = {
    "machine": {**MACHINE, "cpu": "Neoverse", "threads": 1},
    "date": "2026-11-26",
    "bound": 0.1,
    "cases": ["a", "b", "c"],
    "unchanged_runs": 10,
    "unchanged_failures": 0,
    "planted": [
        {"caught": True, "cases_caught": 2, "cases": 3, "what": "our calls take 15% longer"},
        {"caught": False, "cases_caught": 0, "cases": 3, "what": "no packing"},
    ],
}


SOAK = {
    "date": "2026-11-27",
    "calls": 100_000,
    "calls_beside_others": 39_000,
    "repeats_compared": 49_000,
    "failures": [],
    "verdicts": [
        {"what": "resident bytes, fitted over the run", "grew": 9.6e6, "allowed": 2e7, "holds": True},
        {"what": "threads, last tenth over first", "grew": 0, "allowed": 0, "holds": True},
    ],
}


def lay_out(root, heads=HEADS, images=IMAGES, regression=None, soak=None, machine_of_images=MACHINE, readme=README):
    """A repository with these results."""
    folder = root / "bench" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries, machine, day, dirty in (
        ("heads", heads, MACHINE, 24, False),
        ("images", images, machine_of_images, 25, True),
    ):
        file = {
            "machine_info": machine,
            "commit_info": {"id": f"{name}0123456789", "dirty": dirty},
            "datetime": f"2026-11-{day}T22:28:09.704589+00:00",
            "benchmarks": [{"name": f"test_{i}", "extra_info": entry} for i, entry in enumerate(entries)],
        }
        (folder / f"{name}.json").write_text(json.dumps(file))
    for name, record in (("regression", regression), ("soak", soak)):
        if record is not None:
            (folder / f"{name}.json").write_text(json.dumps(record))
    (root / "README.md").write_text(readme)
    return root


def section_of(root, **how):
    return report.section(report.read(lay_out(root, **how)))


def prose(text):
    """In one line."""
    return " ".join(text.split())


def without(entries, *contestants):
    entries = copy.deepcopy(entries)
    for entry in entries:
        for name in contestants:
            entry.get("results", {}).pop(name, None)
    return entries


# README ----------------------------------------------------------------------------------------------------------------


def test_tables_carry_the_numbers(tmp_path):
    section = section_of(tmp_path)
    assert re.findall(r"^\|.*", section, re.MULTILINE) == [
        "| rows | `torch.compile` | ONNX Runtime | OpenVINO | `hoisted` | `hoisted`, bfloat16 | `cpu`, float32 |"
        " `cpu`, bfloat16 weights | of the floor |",
        "|---|---|---|---|---|---|---|---|---|",
        "| 2 | 1.01x | 2.20x | 3.10x | 8.45x | 13.00x | 12.51x | 22.00x | 93 % and 82 % |",
        "| 8 | 1.06x | 1.91x | 2.59x | 4.67x | 6.05x | 6.21x | 8.47x | 88 % and 75 % |",
        "| all 4 AR iterations of 1 image | | | | 6.46x | | 9.40x | 11.68x | |",
        "| 2 of the 4 AR iterations of 256 images | | | | 2.11x | | 2.31x | 2.22x | |",
        "| | `torch.compile` | ONNX Runtime | OpenVINO | `hoisted` | `hoisted`, bfloat16 |",
        "|---|---|---|---|---|---|",
        "| FlowAR-S, 2 rows of 16 tokens | 1.03x | | | 2.51x | 3.76x |",
        "| | `torch.compile` | disa_fast | disa_fast, bfloat16 | head's share of the time | what takes most then |",
        "|---|---|---|---|---|---|",
        "| MAR-B | 1.04x | 2.00x | 3.50x | 70 %, then 40 % | matrix products of the backbone, 61 % |",
        "| Harmon-0.5b | | 2.00x | 3.50x | 50 %, then 20 % | matrix products of the backbone, 61 % |",
        "| FlowAR-S | | 2.00x | 3.50x | 90 %, then 80 % | the rest of the head, 75 % |",
        "| FlowAR-S, 8 images | | 2.00x | 3.50x | 90 %, then 80 % | the time between operators, 60 % |",
        "| xAR-B | | 2.89x | 3.50x | 98 %, then 94 % | matrix products of the head, 70 % |",
    ]


def test_prose_carries_the_numbers(tmp_path):
    section = section_of(tmp_path, regression=REGRESSION, soak=SOAK)
    assert max(len(line) for line in section.splitlines() if line[:1] not in "|!") <= 140
    section = prose(section)
    for sentence in (
        "float32, on 2 threads of an AMD Test (AVX512). All take turns",
        "(bench/results/heads.json, 2026-11-24, made by `make bench`; MAR-B is there too)",
        "(bench/results/images.json, 2026-11-25, made by `make bench`;",
        "An empty cell was not measured.",
        "An image draws 2 to 14 rows at a time, with 5 steps at first and 2 at last.",
        "a call of 2 and 32 rows takes 2.4 and 2.1 times as long on `cpu` and 4.0 and 3.0 times as long on `hoisted`;",
        "Harmon-0.5b draws 256 x 256 pixels, a quarter of what is published.",
        "by scale of FlowAR and cell of xAR: FlowAR-S 50 %, 50 %; xAR-B 71 %, 29 %.",
        "of MAR-L by cpu bfloat16 22.00x at 2 rows and 8.47x at 8 rows](docs/benchmarks/speed_up.png)",
        "of that of eager PyTorch: MAR-B 0.50, Harmon-0.5b 0.50, FlowAR-S 0.50, FlowAR-S, 8 images 0.50 and xAR-B 0.35]"
        "(docs/benchmarks/share_of_time.png)",
        "`make bench-check` takes 3 ratios of our speed to eager's",
        "where ours take more than 10 % longer than",
        "Of 10 checks of unchanged code none failed. Slowed down on purpose: our calls take 15% longer (caught, by 2 of 3 "
        "ratios); no packing (not caught, by 0 of 3 ratios). That was on 1 thread of a Neoverse (AVX512), 2026-11-26",
        "`make soak` made 100,000 calls of random rows, steps, solvers, guidance, dtypes and backends, 39,000 of them beside "
        "others: none failed, 49,000 repeats were compared with the bits of their first run, and resident memory grew by 10 MB "
        "(2026-11-27, bench/results/soak.json).",
    ):
        assert sentence in section


def test_nothing_is_said_of_what_was_not_measured(tmp_path):
    heads = [entry for entry in HEADS if entry["model"] == "MAR-L" and entry["kind"] == "step"]
    images = [entry | {"image_size": [512, 512]} for entry in IMAGES if entry["system"] == "Harmon"]
    section = section_of(tmp_path, heads=heads, images=images)
    for word in (
        "there too",
        "empty cell",
        "AR iterations",
        "An image draws",
        "busy",
        "FlowAR's head",
        "256 x 256",
        "Of the time then",
    ):
        assert word not in section
    assert "Holding the line" not in section
    assert "soak" not in section
    assert "\n\n\n" not in section
    assert "  " not in section


def test_another_share_of_failures(tmp_path):
    section = section_of(tmp_path, regression=REGRESSION | {"unchanged_failures": 2, "planted": []})
    assert "Of 10 checks of unchanged code 2 failed. That was on" in prose(section)


def test_missing_contestants_leave_their_cells_empty(tmp_path):
    heads = without(HEADS, "openvino", "torch.compile", "cpu bfloat16")
    section = section_of(tmp_path, heads=heads, images=without(IMAGES, "torch.compile", "disa_fast bfloat16"))
    assert "| 2 | | 2.20x | | 8.45x | 13.00x | 12.51x | | 93 % and - |\n" in section
    assert "| MAR-B | | 2.00x | | 70 %, then 40 % |" in section
    heads = without(heads, "cpu", "onnxruntime", "hoisted", "hoisted bfloat16")
    assert "| 8 | | | | | | | | |\n" in section_of(tmp_path, heads=heads)


def test_another_machine_is_named_as_such(tmp_path):
    assert "another machine" not in report.page(report.read(lay_out(tmp_path)))
    other = MACHINE | {"torch": "2.14.0"}
    assert "another machine" not in section_of(tmp_path, machine_of_images=other)
    for change in ({"cpu": "Intel Test"}, {"threads": 16}, {"cpu_capability": "AVX2"}):
        found = report.read(lay_out(tmp_path, machine_of_images=MACHINE | change))
        for text in (report.section(found), report.page(found)):
            assert f"{report.machine_name(MACHINE | change)}, which is another machine than the one above" in prose(text)
    assert report.machine_name(MACHINE) == "2 threads of an AMD Test (AVX512)"


# What is written -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A repository in which the report was made."""
    pytest.importorskip("matplotlib")
    root = lay_out(tmp_path_factory.mktemp("repository"), regression=REGRESSION)
    paths = report.write(root)
    assert sorted(map(str, paths)) == sorted(["README.md", "docs/benchmarks/index.html", *pictures_of(root)])
    return root


def pictures_of(root):
    return [str(path.relative_to(root)) for path in (root / "docs" / "benchmarks").glob("*.png")]


class Page(html.parser.HTMLParser):
    """Which elements a page has, and that it closes them in order."""

    VOID = ("meta", "img", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.cells = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.cells += [""] * (tag in ("td", "th"))
        self.open += [tag] * (tag not in self.VOID)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["td"], ["th"]) or self.open[-2:-1] in (["td"], ["th"]):
            self.cells[-1] += data


def test_only_the_section_is_replaced(written):
    readme = (written / "README.md").read_text()
    before, section, after = re.split(f"{report.BEGIN}\n\n|\n{report.END}\n", readme)
    assert (before, after) == ("# before\n\n", "\n## after\n")
    assert section == report.section(report.read(written))
    found = report.read(written)
    assert report.of_readme(readme, found) == readme


def test_the_page_stands_alone(written):
    text = (written / "docs" / "benchmarks" / "index.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
    assert "http" not in text
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert sorted(f"docs/benchmarks/{source}" for source in sources) == sorted(pictures_of(written))
    assert all(attributes["alt"] for tag, attributes in page.elements if tag == "img")
    for cell in (
        "12.51x (11.26\xa0to\xa013.76)",  # a ratio and its quartiles, which stay in one line
        "`cpu`, bfloat16 weights".replace("`", ""),
        "MAR-L, 2 rows",
        "84 %",  # of the bandwidth: 0.9 * 0.931
        "3.50x (3.15\xa0to\xa03.85)",
        "backbone: attention",
        "2 threads of an AMD Test (AVX512)",
        "2026-11-24",
        "heads01",
        "images0 with changes",
        "linear:5-2",
    ):
        assert cell in page.cells, cell
    assert "2 threads of an AMD Test (AVX512), PyTorch 2.13.0+cpu; 2026-11-24, commit heads01; bench/results/heads.json" in text
    assert "OpenVINO 2026.4." in text
    assert "<h2>Holding the line</h2>" in text


def test_pictures_are_drawn(written):
    image = pytest.importorskip("PIL.Image")
    pictures = pictures_of(written)
    assert len(pictures) == 4
    for path in pictures:
        with image.open(written / path) as picture:
            assert picture.width == 1600, path
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50, path


def test_missing_contestants_are_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    heads = without(HEADS, "openvino", "torch.compile", "onnxruntime", "hoisted", "cpu bfloat16")
    report.write(lay_out(tmp_path, heads=heads, images=without(IMAGES[:2], "torch.compile", "disa_fast bfloat16")))
    assert report.disagreements(tmp_path) == ""


# The check -------------------------------------------------------------------------------------------------------------


def test_a_digit_is_noticed(written, monkeypatch, capsys):
    monkeypatch.setattr(report, "ROOT", written)
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    assert report.disagreements(written) == ""
    report.main()
    assert capsys.readouterr().out == ""
    for path, digits in (("README.md", "| 12.51x |"), ("docs/benchmarks/index.html", "12.51x (11.26")):
        text = (written / path).read_text()
        assert digits in text
        (written / path).write_text(text.replace(digits, digits.replace("12.51", "12.61")))
        with pytest.raises(SystemExit, match="make bench-report"):
            report.main()
        difference = capsys.readouterr().out
        assert "12.61x" in re.search(r"^-(?!--).*", difference, re.MULTILINE)[0]
        assert "12.51x" in re.search(r"^\+(?!\+\+).*", difference, re.MULTILINE)[0]
        (written / path).write_text(text)
    assert report.disagreements(written) == ""


def test_pictures_of_other_results_are_noticed(written, tmp_path):
    for path in ["README.md", "docs/benchmarks/index.html", *pictures_of(written)]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((written / path).read_bytes())
    readme = (written / "README.md").read_text()
    images = copy.deepcopy(IMAGES)
    images[0]["ar_steps"][0]["seconds"]["eager"]["head"] *= 1.01
    lay_out(tmp_path, images=images, regression=REGRESSION, readme=readme)
    stale = {f"docs/benchmarks/{name}.png: not drawn from these results" for name in ("share_of_time", "ar_steps")}
    assert set(report.disagreements(tmp_path).splitlines()) == stale
    lay_out(tmp_path, regression=REGRESSION, readme=readme)
    assert report.disagreements(tmp_path) == ""
    (tmp_path / "docs" / "benchmarks" / "roofline.png").unlink()
    assert report.disagreements(tmp_path) == "docs/benchmarks/roofline.png: not drawn from these results"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"readme": "# none\n"}, "README.md: expected one line"),
        ({"readme": f"{report.END}\n{report.BEGIN}\n"}, "README.md: expected one line"),
        ({"readme": README + README}, "README.md: expected one line"),
        ({"heads": HEADS[:1]}, "expected steps of MAR-L, found those of MAR-B"),
        ({"heads": IMAGES}, "expected benchmarks of kind step or trajectory or neighbours, found 'image'"),
        ({"images": HEADS}, "expected benchmarks of kind image, found 'step'"),
        ({"images": without(IMAGES, "disa_fast")}, "MAR-B: expected results of eager and disa_fast, found eager"),
        ({"images": IMAGES[:2] * 2}, "expected one result of each model and number of images, found more"),
    ],
)
def test_what_cannot_be_reported_is_told(tmp_path, monkeypatch, how, message):
    monkeypatch.setattr(report, "ROOT", lay_out(tmp_path, **how))
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    with pytest.raises(SystemExit, match=re.escape(message)):
        report.main()


@pytest.mark.parametrize("name", ["heads", "images"])
def test_results_that_are_not_there_are_told(tmp_path, name):
    (lay_out(tmp_path) / "bench" / "results" / f"{name}.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"bench/results/{name}.json: not there; `make bench` measures it"):
        report.disagreements(tmp_path)


# Pictures --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """The pictures before they are written, by name."""
    pytest.importorskip("matplotlib")
    import report_pictures

    found = report.read(lay_out(tmp_path_factory.mktemp("repository")))
    drawn = {
        "speed_up": report_pictures.speed_up(found.steps, "the source"),
        "roofline": report_pictures.roofline(found.steps["MAR-L"], "the source"),
        "share_of_time": report_pictures.share_of_time(found.named_images, "the source"),
        "ar_steps": report_pictures.ar_steps(found.one_of_each_system, "the source"),
    }
    assert drawn.keys() == report.PICTURES.keys()
    for figure in drawn.values():
        figure.draw_without_rendering()
    return drawn


def lines(axes):
    """(x, y) of each, by colour and style."""
    drawn = axes.get_lines()
    return {(line.get_color(), line.get_linestyle()): [tuple(map(float, xs)) for xs in line.get_data()] for line in drawn}


@pytest.mark.parametrize("name", report.PICTURES)
def test_nothing_written_lies_over_something_else_written(figures, name):
    from matplotlib.text import Text

    figure = figures[name]
    ticks = [label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels(which="both")]
    texts = {text for text in figure.findobj(Text) if text.get_text() and text.get_visible()} - set(ticks)
    upright = [text for text in texts if text.get_rotation() % 90 == 0]
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in upright]  # of a label without the line that leads to it
    assert len(boxes) >= 8
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.padded(-2).overlaps(b), (one, other)
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in boxes:
        assert box.x0 >= 0 and box.x1 <= width + 1 and box.y0 >= 0 and box.y1 <= height + 1, text
    assert figure.get_supxlabel() == "the source"


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([], []),
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.0, 0.01, 0.1, 0.8], [0.0, 0.1, 0.2, 0.8]),
        ([0.2, 0.97, 0.98, 0.99], [0.2, 0.8, 0.9, 1.0]),
    ],
)
def test_labels_are_moved_apart(heights, expected):
    pytest.importorskip("matplotlib")
    from report_pictures import apart

    assert apart(heights, 0.1) == pytest.approx(expected)


def test_speed_up_has_a_line_of_each_contestant(figures):
    by_model = {axes.get_title(): lines(axes) for axes in figures["speed_up"].axes}
    assert by_model.keys() == {"MAR-B", "MAR-L"}
    assert list(by_model["MAR-L"].values()) == [
        [(2, 8), (HEADS[2]["results"][name]["over_eager"], HEADS[1]["results"][name]["over_eager"])] for name in HEADS[1]["results"]
    ]
    assert len(by_model["MAR-B"]) == 6


def test_roofline_has_the_roofs_of_the_machine(figures):
    axes = figures["roofline"].axes[0]
    drawn = [[tuple(map(float, values)) for values in line.get_data()] for line in axes.get_lines()]
    *points, float32, bfloat16 = drawn
    assert points[0] == [(1, 4), (2, 8)]  # eager
    assert points[-1] == [(2, 8), (44, 8 * 8.47)]  # bfloat16: twice as much of a byte
    for (x, y), bandwidth in ((float32, 40), (bfloat16, 60)):
        assert y[0] / x[0] == pytest.approx(bandwidth)
        assert (x[1], y[1], y[2]) == pytest.approx((500 / bandwidth, 500, 500))
        assert all(axes.get_xlim()[0] <= at <= axes.get_xlim()[1] for at in x)
    assert {"2 rows", "8", "500 GFLOP/s"} <= {text.get_text() for text in axes.texts}


def test_bars_are_as_long_as_their_time(figures):
    axes = figures["share_of_time"].axes[0]
    bars: dict[float, list[float]] = {}
    for bar in axes.patches:
        bars.setdefault(bar.get_y(), []).append(bar.get_width())
    lengths = [sum(widths) for _, widths in sorted(bars.items())]
    assert lengths == pytest.approx([1, 1 / 2, 1, 1 / 2, 1, 1 / 2, 1, 1 / 2, 1, 1 / 2.89])
    assert bars[min(bars)] == pytest.approx([0.7, 0.29, 0.01])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:3] == ["MAR-B, eager", "disa_fast", "Harmon-0.5b, eager"]
    assert "2.89x" in {text.get_text() for text in axes.texts}


def test_ar_steps_have_their_times_and_their_schedule(figures):
    upper = {axes.get_title(): axes for axes in figures["ar_steps"].axes if axes.get_title()}
    assert list(upper) == ["MAR-B, 2 to 14 rows", "Harmon-0.5b, 2 to 14 rows", "FlowAR-S, 2 to 512 rows", "xAR-B, 128 rows"]
    of_mar, of_xar = (list(lines(upper[title]).values()) for title in ("MAR-B, 2 to 14 rows", "xAR-B, 128 rows"))
    third = 2.9 / 3
    assert [y for _, y in of_mar] == [
        pytest.approx(y) for y in ((3.5, 2.1, 1.4), (third,) * 3, (1.0, 0.6, 0.4), (third,) * 3)
    ]  # fmt: skip
    assert [y for _, y in of_xar] == [pytest.approx(y) for y in ((4.9, 1.96), (1.6, 0.64))]  # it has no backbone
    lower = [axes for axes in figures["ar_steps"].axes if axes.get_ylabel() == "T(k)"]
    assert [list(axes.get_lines()[0].get_ydata()) for axes in lower] == [[5, 3, 2], [5, 3, 2], [5, 5], [5, 2]]
