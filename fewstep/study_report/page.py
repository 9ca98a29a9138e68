"""The study's report as one HTML page that works from disk: no network, no other file."""

import io

from PIL import Image

from fewstep.evals.curves import Panel, draw
from fewstep.evals.gallery import data_uri
from fewstep.evals.markup import Html, h, join, page
from fewstep.study_report.curves import Curve, mean_curve, mismatch_curve
from fewstep.study_report.read import DONE, Study
from fewstep.study_report.story import Story
from fewstep.study_report.strips import Strip, strips
from fewstep.study_report.tables import Entry, Table

CURVES = {
    "probe/score/t2i": "score of the probes, text-to-image",
    "probe/score/edit": "score of the probes, editing",
    "probe/diversity_ratio": "diversity between seeds, of the teacher's",
    "probe/noise": "flat-background noise, above the teacher's",
    "loss/fake": "loss of the fake score",
    "grad_norm/student": "gradient norm of the student",
}
COLOURS = 8


def render(study: Study, story: Story) -> str:
    sections: list[tuple[str, str, Html | None]] = [
        ("verdicts", "Verdicts", _verdicts(story)),
        ("scores", "Scores", _scores(story)),
        ("strips", "Strips", _strips(strips(study))),
        ("curves", "Curves", _curves(study)),
        ("stability", "Stability", _table(story.stability) if story.stability else None),
        ("limits", "What this study does not show", _limits(story)),
        ("cost", "Cells and cost", _table(story.cost)),
    ]
    shown = [(name, title, body) for name, title, body in sections if body is not None]
    return page(
        study.name,
        join(
            [
                _header(study, story),
                h("nav", h("ul", [h("li", h("a", t, href=f"#{n}")) for n, t, _ in shown])),
                h(
                    "main",
                    [h("section", h("h2", t), body, id=n) for n, t, body in shown],
                    h("footer", "Written by fewstep report from ", study.path.resolve().name),
                ),
            ]
        ),
    )


def _header(study: Study, story: Story) -> Html:
    done = [cell for cell in study.cells if cell.status == DONE]
    prompts = sum(len(cases) for scores in study.scores.values() for cases in scores.cases.values())
    facts = [
        ("Cells", f"{len(done)} of {len(study.cells)} finished"),
        ("Variants", str(len(study.titles))),
        ("Training seeds", ", ".join(str(s) for s in sorted({c.seed for c in study.cells}))),
        ("Prompts", str(prompts)),
        ("Judge", study.judge or "–"),
        ("References", ", ".join(f"{n} ({nfe} NFE)" for n, nfe in study.references.items()) or "–"),
    ]
    notes = None
    if study.notes:
        lines = h("ul", [h("li", note) for note in study.notes])
        notes = h("div", h("b", "What this report leaves out"), lines, class_="notes", role="note")
    return h(
        "header",
        h("div", "fewstep study", class_="eyebrow"),
        h("h1", study.name),
        h("p", study.question, class_="lede"),
        h("p", " ".join(story.lede)),
        h("dl", [h("div", h("dt", name), h("dd", text)) for name, text in facts], class_="facts"),
        notes,
        class_="top",
    )


def _verdicts(story: Story) -> Html | None:
    if not story.takeaways:
        return None
    contrasts = [_table(table) for table in story.contrasts]
    return join([_table(story.verdicts, titled=False), contrasts])


def _scores(story: Story) -> Html | None:
    if not story.scores:
        return None
    base = [[_table(table), h("p", answer)] for table, answer in story.against_base]
    return join([[_table(table) for table in story.scores], base])


def _table(table: Table, *, titled: bool = True) -> Html:
    words = {i for i, _ in enumerate(table.head) if any(_wordy(row[i]) for row in table.rows)}
    head = [h("th", t, class_="words" if i in words else None) for i, t in enumerate(table.head)]
    body = [
        h("tr", [_cell(entry, wordy=i in words) for i, entry in enumerate(row)])
        for row in table.rows
    ]
    return join(
        [
            h("h3", table.title) if titled else None,
            h("p", table.caption, class_="hint"),
            h("div", h("table", h("thead", h("tr", head)), h("tbody", body)), class_="scroll"),
        ]
    )


def _wordy(entry: Entry) -> bool:
    return max(len(entry.text), len(entry.small)) > 40


def _cell(entry: Entry, *, wordy: bool) -> Html:
    classes = [name for name, on in (("best", entry.best), ("words", wordy)) if on]
    small = h("span", entry.small, class_="ci") if entry.small else None
    text = h("span", entry.text, class_="mean")
    return h("td", text, small, class_=" ".join(classes) or None)


def _strips(made: list[Strip]) -> Html | None:
    if not made:
        return None
    first = made[0].seed
    told = (
        "The same prompts and noises over the training of each variant, as in the paper's figure 3."
        " Columns are student updates. Prompts are of the training split."
    )
    others = [_strip(strip) for strip in made if strip.seed != first]
    return join(
        [
            h("p", told, class_="hint"),
            h("div", [_strip(s) for s in made if s.seed == first], class_="strip wide"),
            h(
                "details",
                h("summary", "Other training seeds"),
                h("div", others, class_="strip wide"),
            )
            if others
            else None,
        ]
    )


def _strip(strip: Strip) -> Html:
    caption = f"{strip.case}: {strip.prompt}" if strip.prompt else strip.case
    if strip.missing:
        caption += f" ({strip.missing} pictures missing)"
    return h(
        "figure",
        h("img", src=_png(strip.image), alt=f"{caption}, training seed {strip.seed}"),
        h("figcaption", caption, f" · training seed {strip.seed}"),
    )


def _png(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "png", optimize=True)
    return data_uri(data, "png")


def _curves(study: Study) -> Html | None:
    panels = []
    for key, title in CURVES.items():
        panels += _panels(title, {n: mean_curve(study, n, key) for n in study.titles}, study)
    mismatch = {n: mismatch_curve(study, n) for n in study.titles}
    panels += _panels("mismatch of teachers and student", mismatch, study)
    if not panels:
        return None
    return join(
        [
            h("p", "Means over the training seeds of finished cells.", class_="hint"),
            h("div", [draw(panel) for panel in panels], class_="curves"),
        ]
    )


def _panels(title: str, curves: dict[str, Curve], study: Study) -> list[Panel]:
    """As many curves a panel as it has colours."""
    found = [(study.titles[name], curve) for name, curve in curves.items() if curve]
    return [
        Panel(title, dict(found[start : start + COLOURS]))
        for start in range(0, len(found), COLOURS)
    ]


def _limits(story: Story) -> Html:
    return h("ul", [h("li", limit) for limit in story.limits])
