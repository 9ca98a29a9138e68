"""The report says what the rows say, escapes what it is given, and works with parts missing."""

import base64
import csv
import hashlib
import io
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fewstep.errors import DataError, FewstepError
from fewstep.evals import curves, findings, gallery
from fewstep.evals.findings import lede
from fewstep.evals.grid import grid
from fewstep.evals.markup import Html, h
from fewstep.evals.report import write_report
from fewstep.evals.rows import Row, RowWriter
from fewstep.evals.terminal import summary

MODELS = {"teacher-80nfe": (80, 0.4), "teacher-4nfe": (4, 0.02), "student-4nfe": (4, 0.021)}
CATEGORIES = [("t2i", "landscape"), ("t2i", "text"), ("edit", "style")]
FULL, CUT, STUDENT = MODELS


def score_of(model: str, i: int) -> float:
    return {FULL: 4.5, CUT: 2.5, STUDENT: 4.0}[model] + 0.1 * (i % 3)


def make_run(folder: Path, *, cases: int = 6, size: int = 32, change=None) -> Path:
    """A run folder with every part; `change` edits or drops (None) a row's fields."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    with RowWriter(folder / "eval" / "rows.jsonl") as log:
        for task, category in CATEGORIES:
            for i in range(cases):
                case = f"{task}-{category}-{i:04d}"
                given = {"source": None, "target": None}
                if task == "edit":
                    given = {name: f"images/{name}/{case}.png" for name in given}
                for model, (nfe, seconds) in MODELS.items():
                    fields = {
                        "model": model,
                        "nfe": nfe,
                        "task": task,
                        "category": category,
                        "case": case,
                        "prompt": f"prompt of {case}",
                        "seed": i,
                        "image": f"images/{model}/{case}.png",
                        "score": score_of(model, i),
                        "subscores": {"quality": 4.1},
                        "reasons": [f"reason for {model} on {case}"],
                        "status": "ok",
                        "seconds": seconds,
                        "judge": "oracle-1",
                        **given,
                    }
                    if change is not None:
                        fields = change(fields)
                    if fields is None:
                        continue
                    for path in {fields["image"], fields["source"], fields["target"]} - {None}:
                        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                        file = folder / "eval" / path
                        file.parent.mkdir(parents=True, exist_ok=True)
                        Image.fromarray(pixels).save(file)
                    log.write(Row(**fields))
    for step in (50, 100):
        Image.new("RGB", (300, 200), (step, 0, 0)).save(folder / f"images/step_{step:06d}.png")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 101):
            record = {
                "step": step,
                "loss/fake": 1 / step,
                "grad_norm/student": 2.0,
                "share/base": 0.75,
                "loss/student/t2i/text": 0.5 + step / 100,
                "phase": "distill",
            }
            file.write(json.dumps(record) + "\n")
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "date": "2026-11-23",
                "device": "2 CPU cores",
                "seconds": {"distill": 540.0, "evaluate": 12.0},
                "updates": 300,
            }
        )
    )
    (folder / "recipe.yaml").write_text("name: lab\nmixture: {t2i: 0.5}\n")
    (folder / "plan.json").write_text(
        json.dumps(
            {
                "name": "lab",
                "grid": [1.0, 0.75],
                "guidance": [{"task": "t2i", "weights": [{"base": 1.0}, {"text": 0.4}]}],
            }
        )
    )
    return folder


def all_editing(fields):
    """Spread the editing rows over all six categories of the paper."""
    if fields["task"] == "edit":
        names = ("scene", "enhance", "object", "text_edit", "identity", "style")
        fields["category"] = names[fields["seed"] % 6]
    return fields


class Page(HTMLParser):
    """Text by section and every start tag, as a browser's parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {"": ""}
        self._section, self._skip = "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        self._skip = tag in ("style", "script")
        if tag == "section":
            self._section = found["id"]
            self.sections[self._section] = ""

    def handle_endtag(self, tag):
        if tag in ("style", "script"):
            self._skip = False
        if tag == "section":
            self._section = ""
        if tag in ("td", "th", "tr", "p", "li", "div", "span", "dt", "dd", "h3", "strong", "em"):
            self.sections[self._section] += " "

    def handle_data(self, data):
        if not self._skip:
            self.sections[self._section] += data

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())


def read_page(run: Path) -> Page:
    return Page(write_report(run).html.read_text(encoding="utf-8"))


def read_csv(run: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with (run / "results.csv").open(newline="") as file:
        return {(r["model"], r["task"], r["category"]): r for r in csv.DictReader(file)}


def images_of(page: Page) -> list[dict[str, str]]:
    return [attributes for tag, attributes in page.tags if tag == "img"]


def decode(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/webp;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_numbers_of_all_three_forms_agree_with_hand_computation(tmp_path):
    run = make_run(tmp_path / "run")
    paths = write_report(run)
    page = Page(paths.html.read_text())
    # Every category has the scores s, s + 0.1, s + 0.2 twice over.
    student = read_csv(run)[STUDENT, "t2i", "all"]
    assert float(student["mean"]) == pytest.approx(4.1)
    assert float(student["ratio"]) == pytest.approx(4.1 / 4.6, abs=1e-4)
    assert float(student["difference"]) == pytest.approx(-0.5)
    assert (student["difference_low"], student["difference_high"]) == ("-0.5", "-0.5")
    assert [student[key] for key in ("wins", "ties", "losses", "pairs")] == ["0", "0", "12", "12"]
    assert (student["rank_best"], student["rank_worst"]) == ("2", "2")
    assert float(student["speed_up"]) == pytest.approx(0.4 / 0.021)
    headline = page.text("headline")
    assert re.search(
        r"student-4nfe 4 4\.10 \[4\.0\d, 4\.1\d\] 89\.1% ?\[89\.\d, 89\.\d\]", headline
    )
    assert "21 ms 19.0×" in headline and "400 ms 1.0×" in headline
    top = page.text("")
    assert "student-4nfe with 4 evaluations reaches 89.1% of the score of teacher-80nfe" in top
    assert "1.50 points above the teacher cut to 4" in top
    assert "75% of the gap to teacher-4nfe closed" in top  # (4.1 - 2.6) / (4.6 - 2.6)
    assert "9 min 12 s for the whole run" in top
    told = paths.markdown.read_text()
    assert "| student-4nfe | 4 | 4.10 [" in told and "89.1% [" in told and "19.0×" in told
    assert "total 9 min 12 s" in told


def test_the_terminal_shows_the_numbers_of_the_markdown_whole_in_80_columns(tmp_path):
    run = findings.read_run(make_run(tmp_path, change=all_editing))
    found = run.findings
    assert found is not None
    out = io.StringIO()
    Console(file=out, width=80).print(summary(run))
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    told = " ".join(shown.split())
    for sentence in lede(found):
        assert sentence in told
    lines = shown.splitlines()
    student = [i for i, line in enumerate(lines) if line.startswith(STUDENT)]
    t2i, edit = (found.groups[STUDENT, (task, None)].mean for task in ("t2i", "edit"))
    first, second = lines[student[0]], lines[student[0] + 1]
    assert findings.show_interval(t2i) in first and findings.show_interval(edit) in first
    ratio = found.versus[STUDENT, FULL, ("t2i", None)].ratio
    assert second.split()[0] == f"{ratio.value:.1%}" and second.split()[-1] == "19.0×"
    means = [found.groups[STUDENT, scope].mean for scope in found.scopes("edit")]
    assert lines[student[-1]].split()[1:-1] == [f"{mean.value:.2f}" for mean in means if mean]
    assert "Took 9 min 12 s: distill 9 min 00 s, evaluate 12 s." in told


def test_models_stand_in_the_order_of_the_paper(tmp_path):
    page = read_page(make_run(tmp_path / "run"))
    for section in ("headline", "categories"):
        rows = re.findall(r"(teacher-80nfe 80|teacher-4nfe 4|student-4nfe 4) ", page.text(section))
        assert rows[:3] == ["teacher-80nfe 80", "teacher-4nfe 4", "student-4nfe 4"]
    cells = [
        a["alt"].split(",")[0] for a in images_of(page) if "prompt of t2i-text-0001" in a["alt"]
    ]
    assert cells[:3] == [FULL, CUT, STUDENT]
    edit = [a["alt"] for a in images_of(page) if "prompt of edit-style-0001" in a["alt"]][:5]
    assert edit[0].startswith("source of") and edit[4].startswith("target of")


def test_the_cut_teacher_is_the_strongest_of_those_with_the_students_evaluations():
    def row(model: str, nfe: int, score: float | None) -> Row:
        return Row(
            model=model, nfe=nfe, task="t2i", category="text", case="x", prompt="", seed=0,
            image="x.png", score=score, status="ok" if score else "unscored: refused", judge="o",
        )  # fmt: skip

    rows = [row("student", 4, 3.0), row("full", 80, 4.0), row("a-cut", 4, 2.0)]
    assert findings.cast_models([*rows, row("b-cut", 4, 2.5)]).cut == "b-cut"
    assert findings.cast_models([*rows, row("b-cut", 4, 1.5)]).cut == "a-cut"
    assert findings.cast_models([*rows, row("b-cut", 4, None)]).cut == "a-cut"


def test_roles_follow_evaluations_and_names():
    def cast(**nfe):
        return findings.cast_models([_row(name.replace("_", "-"), n) for name, n in nfe.items()])

    def _row(model: str, nfe: int) -> Row:
        return Row(
            model=model, nfe=nfe, task="t2i", category="text", case="x", prompt="", seed=0,
            image="x.png", score=3.0, status="ok", judge="o",
        )  # fmt: skip

    found = cast(student_4=4, teacher_4=4, teacher_2=2, base_80=80, text_80=80, student_2=2)
    assert found.models == (
        "base-80",
        "text-80",
        "teacher-4",
        "teacher-2",
        "student-4",
        "student-2",
    )
    assert (found.reference, found.cut, found.student) == ("base-80", "teacher-2", "student-2")
    by_task = [_row("teacher", 80), _row("teacher", 120).model_copy(update={"task": "edit"})]
    assert findings.cast_models(by_task).show_nfe("teacher") == "80 / 120"
    assert findings.cast_models(by_task).show_nfe("teacher", "edit") == "120"
    only = cast(student_4=4)
    assert (only.reference, only.cut, only.student) == (None, None, "student-4")
    rows = [_row("ours", 4), _row("teacher", 80)]
    assert findings.cast_models(rows).student is None
    assert findings.cast_models(rows, student="ours").student == "ours"
    with pytest.raises(DataError, match="'mine' has no rows; models: ours, teacher"):
        findings.cast_models(rows, student="mine")


def test_the_page_needs_nothing_but_itself(tmp_path):
    run = make_run(tmp_path / "run")
    text = write_report(run).html.read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), "no inline handlers"
        for name in ("src", "href", "srcset", "data", "action"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/", "#")), (tag, attributes[name])
    assert "@import" not in text and "url(" not in text
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text, "the page's own script must be the allowed one"
    shutil.rmtree(run / "eval")


def test_tiny_images_are_inlined_pixel_for_pixel(tmp_path):
    run = make_run(tmp_path / "run", cases=2)
    page = read_page(run)
    (shown, *_) = [
        a for a in images_of(page)
        if a["alt"].startswith(STUDENT) and "t2i-text-0001" in a["alt"]
    ]  # fmt: skip
    original = Image.open(run / f"eval/images/{STUDENT}/t2i-text-0001.png")
    assert "tiny" in shown["class"]
    assert np.array_equal(np.asarray(decode(shown["src"])), np.asarray(original))


def test_large_images_become_thumbnails_linked_to_the_file(tmp_path):
    page = read_page(make_run(tmp_path / "run", cases=1, size=400))
    shown = [a for a in images_of(page) if a["alt"].startswith(STUDENT)]
    assert shown and all(decode(a["src"]).size == (256, 256) for a in shown)
    assert all(decode(a["src"]).format == "WEBP" for a in shown)
    links = {a["href"] for tag, a in page.tags if tag == "a" and not a["href"].startswith("#")}
    assert f"eval/images/{STUDENT}/t2i-text-0000.png" in links


HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)">\'"&| $name ${x}'


def test_everything_that_came_from_data_is_text(tmp_path):
    def poison(fields):
        return fields | {
            "prompt": HOSTILE + fields["case"],
            "reasons": [HOSTILE],
            "subscores": {HOSTILE: 4.0},
            "judge": HOSTILE,
            "category": HOSTILE if fields["category"] == "style" else fields["category"],
            "score": None if fields["seed"] == 0 else fields["score"],
            "status": f"unscored: {HOSTILE}" if fields["seed"] == 0 else "ok",
        }

    clean = read_page(make_run(tmp_path / "clean", change=lambda f: poison(f) | {
        "prompt": "p" + f["case"], "judge": "j", "reasons": ["r"], "subscores": {"s": 4.0},
        "category": f["category"], "status": "unscored: u" if f["seed"] == 0 else "ok",
    }))  # fmt: skip
    run = make_run(tmp_path / "run", change=poison)
    (run / "recipe.yaml").write_text(f"name: {HOSTILE}")
    (run / "plan.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}, "x": [{HOSTILE: 1}]}))
    (run / "summary.json").write_text(json.dumps({"device": HOSTILE, HOSTILE: 1, "seconds": 3}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, f"{HOSTILE}/{HOSTILE}": 1.0}))
    (run / f"eval/images/{FULL}/t2i-text-0001.png").unlink()
    page = read_page(run)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{}], "one script, the page's own"
    allowed = {tag for tag, _ in clean.tags}
    assert {tag for tag, _ in page.tags} <= allowed
    assert not [a for _, a in page.tags if "onerror" in a]
    for section in ("", "categories", "side-by-side", "failures", "curves", "recipe", "plan"):
        assert '<img src=x onerror="alert(1)">' in page.sections[section], section
    told = (run / "results.md").read_text()
    assert "<script>" not in told.replace("\\<", "")
    rows = [line for line in told.splitlines() if line.startswith("| ")]
    by_table: dict[int, set[int]] = {}
    for line in rows:
        pipes = len(re.findall(r"(?<!\\)\|", line))
        by_table.setdefault(pipes, set()).add(pipes)
    assert set(by_table) == {9, 7, 6}, "a pipe in a name breaks no table"


def test_unscored_images_are_shown_with_their_reason_and_in_no_mean(tmp_path):
    def refuse(fields):
        if fields["model"] == STUDENT and fields["case"] == "t2i-text-0002":
            return fields | {"score": None, "status": "unscored: judge timed out"}
        if fields["model"] == CUT and fields["case"] == "t2i-landscape-0000":
            return None
        return fields

    run = make_run(tmp_path / "run", change=refuse)
    page = read_page(run)
    assert "student-4nfe judge timed out 1" in page.text("failures")
    assert "teacher-4nfe: 1 of 12 in Text-to-image" in page.text("failures")
    assert "student-4nfe 17 of 18" in page.text("")
    line = read_csv(run)[STUDENT, "t2i", "text"]
    # Scores by case: 4.0, 4.1, (4.2 is not scored), 4.0, 4.1, 4.2.
    assert float(line["mean"]) == pytest.approx((4.0 + 4.1 + 4.0 + 4.1 + 4.2) / 5)
    assert (line["scored"], line["unscored"], line["pairs"], line["dropped"]) == (
        "5",
        "1",
        "5",
        "1",
    )
    assert read_csv(run)[CUT, "t2i", "landscape"]["missing"] == "1"
    assert "(5 of 6)" in (run / "results.md").read_text()
    assert "student-4nfe against teacher-80nfe, text-to-image: 11 pairs, 1 images dropped" in (
        page.text("headline")
    )


@pytest.mark.parametrize(
    ("part", "note", "lost"),
    [
        ("recipe.yaml", "recipe.yaml is missing", "recipe"),
        ("plan.json", "plan.json is missing", "plan"),
        ("metrics.jsonl", "metrics.jsonl is missing", "curves stability"),
        ("summary.json", "summary.json is missing", None),
        ("images", "images/step_*.png is missing", "training"),
        ("eval/rows.jsonl", "eval/rows.jsonl is missing", "headline"),
        ("eval/images", "images that could not be shown", None),
        ("eval", "eval/rows.jsonl is missing", "side-by-side"),
    ],
)
def test_a_missing_part_is_named_and_the_rest_stands(tmp_path, part, note, lost):
    run = make_run(tmp_path / "run", cases=2)
    whole = set(read_page(run).sections)
    target = run / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    page = read_page(run)
    assert note in page.text("")
    missing = set((lost or "").split())
    assert not missing & set(page.sections)
    if not part.startswith("eval"):
        assert set(page.sections) == whole - missing
        assert f"- {note}" in (run / "results.md").read_text().replace("\\", "")
    else:
        assert {"curves", "training", "recipe", "plan"} <= set(page.sections)


def test_an_empty_folder_still_gives_a_report(tmp_path):
    page = read_page(tmp_path)
    for part in ("recipe", "plan", "summary", "metrics", "images", "rows"):
        assert part in page.text("")
    assert tmp_path.name in page.text("")


def test_a_broken_image_is_named_and_leaves_a_box(tmp_path):
    run = make_run(tmp_path / "run", cases=2)
    bad = run / f"eval/images/{CUT}/t2i-text-0000.png"
    bad.write_bytes(bad.read_bytes()[:60])
    (run / f"eval/images/{CUT}/t2i-text-0001.png").write_text("not an image")
    page = read_page(run)
    assert f"could not be shown: eval/images/{CUT}/t2i-text-0000.png and 1 more" in page.text("")
    assert page.text("side-by-side").count("image cannot be read") == 2


def test_damaged_rows_stop_the_report_and_a_cut_last_line_does_not(tmp_path):
    run = make_run(tmp_path / "run", cases=2)
    rows = run / "eval" / "rows.jsonl"
    data = rows.read_bytes()
    rows.write_bytes(data[:-40])
    assert "the last line is cut off" in read_page(run).text("")
    rows.write_bytes(b"oops\n" + data)
    with pytest.raises(DataError, match="line 1"):
        write_report(run)


def test_only_one_judge_is_reported_and_the_others_are_named(tmp_path):
    run = make_run(tmp_path / "run", cases=2)
    with RowWriter(run / "eval" / "rows.jsonl") as log:
        for model in MODELS:
            row = findings.read_rows(log.path).rows[0].model_dump()
            log.write(Row(**row | {"model": model, "nfe": MODELS[model][0], "judge": "oracle-2",
                                   "score": 1.0}))  # fmt: skip
    page = read_page(run)
    assert "18 rows by another judge, oracle-1: not used" in page.text("")
    assert float(read_csv(run)[STUDENT, "t2i", "all"]["mean"]) == 1.0
    write_report(run, judge="oracle-1")
    assert float(read_csv(run)[STUDENT, "t2i", "all"]["mean"]) == pytest.approx(4.05)
    with pytest.raises(DataError, match="'oracle-3'; judges: oracle-1, oracle-2"):
        write_report(run, judge="oracle-3")


def test_metrics_after_a_resume_keep_the_later_value_and_tell_what_is_odd(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss/fake": 1.0}\n{"step": 2, "loss/fake": 2.0, "ok": true}\n'
        '{"step": 3, "loss\n'
        '{"step": 2, "loss/fake": 5.0}\n{"step": 3, "loss/fake": NaN}\n{"step": 4, "loss/fake": 4'
    )
    found = findings.read_run(tmp_path)
    assert found.metrics == {"loss/fake": [(1.0, 1.0), (2.0, 5.0)]}
    told = " ".join(found.notes)
    assert "no step could be read from line 3, 6" in told
    assert "loss/fake is not finite, first at step 3" in told


def test_curves_are_drawn_where_the_numbers_say():
    metrics = {
        "share/base": [(0.0, 1.0), (10.0, 0.5), (20.0, 0.0)],
        "loss/t2i/text": [(0.0, 1.0)],
        "loss/fake": [(0.0, 1e-3), (10.0, 1.0)],
        "lr": [(0.0, 0.1), (1.0, 0.1)],
    }
    found = curves.panels(metrics)
    assert [panel.title for panel in found] == ["loss", "loss/t2i", "share", "lr"]
    share = curves.draw(found[2])
    points = re.search(r'polyline points="([^"]*)"', share)
    assert points is not None
    xs, ys = zip(*(map(float, p.split(",")) for p in points[1].split()), strict=True)
    bottom, left = curves.HEIGHT - curves.BOTTOM, curves.LEFT
    assert ys == (curves.TOP, (curves.TOP + bottom) / 2, bottom)
    assert xs == (left, (left + curves.WIDTH - curves.RIGHT) / 2, curves.WIDTH - curves.RIGHT)
    assert "log scale" in curves.draw(found[0]) and "log scale" not in share
    assert "base from 1 to 0" in share
    for panel in found:
        assert "nan" not in curves.draw(panel).lower()


def test_nine_curves_of_a_panel_look_different():
    metrics = {f"gap/{name}": [(1.0, 0.1), (2.0, 0.2)] for name in "abcdefghi"}
    (panel,) = curves.panels(metrics)
    lines = re.findall(r'<polyline[^>]*class="([^"]*)"', curves.draw(panel))
    keys = re.findall(r'<i class="([^"]*)"', curves.draw(panel))
    assert len(set(lines)) == 9 and lines == keys


def test_long_curves_are_thinned_without_losing_their_mean():
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    panel = curves.Panel("loss", {"fake": points})
    drawn = curves.draw(panel)
    lines = re.findall(r'polyline points="([^"]*)"', drawn)
    assert len(lines) == 2 and all(len(line.split()) <= curves.MAX_POINTS for line in lines)
    middle = curves.TOP + (curves.HEIGHT - curves.BOTTOM - curves.TOP) * (1 - 0.5 / 1.04)
    heights = [float(point.split(",")[1]) for point in lines[1].split()][5:-5]
    assert heights == pytest.approx([middle] * len(heights), abs=1.0)


def test_the_gallery_carries_differences_and_takes_categories_in_turn(tmp_path):
    page = read_page(make_run(tmp_path / "run"))
    cases = [a for tag, a in page.tags if tag == "article" and a["data-place"]][: 3 * 6]
    assert [a["data-category"] for a in cases[:6]] == ["landscape", "text", "style"] * 2
    assert {a["data-difference"] for a in cases} == {"-0.5000"}
    text = page.text("side-by-side")
    assert f"reason for {STUDENT} on t2i-text-0003" in text and "−0.50 against" in text


def test_a_long_gallery_keeps_the_extremes_and_says_so(tmp_path):
    def spread(fields):
        if fields["model"] == STUDENT and fields["task"] == "t2i":
            number = fields["seed"] + 20 * (fields["category"] == "text")
            return fields | {"score": 1.0 + number / 10}
        return fields

    run = make_run(tmp_path / "run", cases=20, size=2, change=spread)
    found = findings.read_run(run).findings
    assert found is not None
    cases = gallery.collect_cases(found)
    kept = gallery.choose_cases(cases, found, limit=16)
    assert len(kept) == 16 and [c.place for c in kept] == sorted(c.place for c in kept)
    gaps = {case.place: case.difference(STUDENT, FULL) or 0.0 for case in cases}
    order = sorted(gaps, key=lambda place: (gaps[place], place))
    assert {*order[:8], *order[-4:]} <= {case.place for case in kept}
    pictures = gallery.Pictures(run / "eval")
    assert "16 of 60 cases are shown" in gallery.side_by_side(found, pictures, limit=16)


def test_the_worst_student_cases_are_on_the_failure_page(tmp_path):
    def fail_one(fields):
        bad = fields["model"] == STUDENT and fields["case"] == "edit-style-0004"
        return fields | {"score": 1.07} if bad else fields

    text = read_page(make_run(tmp_path / "run", change=fail_one)).text("failures")
    first = text.index("prompt of ")
    assert text[first:].startswith("prompt of edit-style-0004") and "1.07" in text[first:]


def test_source_four_models_and_target_stand_in_one_line(tmp_path):
    """On a page of full width; the slider starts at the size that the style begins with."""
    page = read_page(make_run(tmp_path))
    (slider,) = [a for tag, a in page.tags if tag == "input" and a.get("id") == "size"]
    style = (tmp_path / "report.html").read_text()
    number = {
        name: int(re.findall(pattern, style)[0])
        for name, pattern in {
            "page": r"main, \.top { max-width: (\d+)px",
            "padding": r"main, \.top {.*padding: 0 (\d+)px",
            "about": r"\.case {.*columns: (\d+)px 1fr",
            "beside": r"\.case {.*gap: \d+px (\d+)px",
            "between": r"\.cells { .*gap: (\d+)px;",
            "picture": r"--size: (\d+)px;",
        }.items()
    }
    room = number["page"] - 2 * number["padding"] - number["about"] - number["beside"]
    assert 6 * number["picture"] + 5 * number["between"] <= room
    assert int(slider["value"]) == number["picture"] >= 132


def test_training_samples_show_first_and_last_step(tmp_path):
    run = make_run(tmp_path / "run", cases=1)
    for step in range(150, 2001, 50):
        shutil.copy(run / "images/step_000100.png", run / f"images/step_{step:06d}.png")
    steps = re.findall(r"step (\d+)", read_page(run).text("training"))
    assert steps[0] == "50" and steps[-1] == "2000" and len(steps) == gallery.TRAINING_SHOWN


@pytest.mark.slow
def test_three_hundred_cases_stay_small_and_fast(tmp_path):
    """Random pixels are the worst case for PNG; real renders take about half."""
    run = make_run(
        tmp_path / "run", cases=100, change=lambda f: f | {"source": None, "target": None}
    )
    start = time.perf_counter()
    paths = write_report(run)
    assert time.perf_counter() - start < 20
    assert paths.html.stat().st_size < 5_000_000
    assert len(images_of(Page(paths.html.read_text()))) >= 900


def test_a_report_that_cannot_be_written_leaves_no_half_file(tmp_path):
    run = make_run(tmp_path / "run", cases=1)
    (run / "results.md").mkdir()
    with pytest.raises(FewstepError, match=r"cannot write .*results\.md"):
        write_report(run)
    assert not list(run.glob("*.part"))
    with pytest.raises(DataError, match="is not a run folder"):
        write_report(run / "nowhere")


def test_markup_escapes_text_and_formatted_markup():
    inner = h("b", "<&>", title='"x"')
    assert inner == '<b title="&quot;x&quot;">&lt;&amp;&gt;</b>'
    assert h("p", inner, None, [1, Html("<i>")]) == f"<p>{inner}1<i></p>"
    assert h("p", f"{inner}").startswith("<p>&lt;b")
    assert h("i", hidden=True, id=None, data_a_b=1) == '<i hidden data-a-b="1"></i>'


def test_grids_enlarge_without_blur_and_place_every_image():
    generator = np.random.default_rng(0)
    tiles = [
        [Image.fromarray(generator.integers(0, 200, (4, 5, 3), dtype=np.uint8)) for _ in range(3)]
        for _ in range(2)
    ]
    made = np.asarray(grid(tiles, scale=3))
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            top, left = 14 + i * (12 + 6), 14 + j * (15 + 6)
            expected = np.asarray(tile).repeat(3, 0).repeat(3, 1)
            assert np.array_equal(made[top : top + 12, left : left + 15], expected)
            made = made.copy()
            made[top : top + 12, left : left + 15] = 255
    assert (made == 255).all(), "white around the images"


def test_grid_labels_are_drawn_beside_and_above_the_images():
    tile = Image.new("RGB", (32, 32), (255, 255, 255))
    bare = grid([[tile, None], [tile]], scale=2)
    labelled = grid(
        [[tile, None], [tile]],
        scale=2,
        row_labels=["a long prompt that has to wrap " * 12, "b"],
        column_labels=["teacher 80 NFE", "student"],
    )
    dark = np.asarray(labelled).min(axis=2) < 120
    left, top = labelled.width - bare.width, labelled.height - bare.height
    assert left > 100 and top > 30
    assert dark[: top + 14].any() and dark[:, : left + 14].any()
    assert not dark[top + 14 :, left + 14 :].any(), "labels keep off the images"
    assert not dark[:, :14].any() and not dark[-14:].any(), "white margins"


def test_transparent_images_stand_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(grid([[clear]])).min() == 255
