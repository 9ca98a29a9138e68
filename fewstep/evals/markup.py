"""HTML as nested calls, and the page around them with the report's style and script.

Text is escaped unless it is `Html`, so data cannot become markup.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from importlib.resources import files
from string import Template

VOID = {"img", "br", "hr", "input", "meta"}


class Html(str):
    """Text that is markup already. Formatting one into an f-string gives plain text again."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def h(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element. `class_` is `class`, `data_x` is `data-x`; None and False leave one out."""
    shown = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        shown.append(f" {name}" if value is True else f' {name}="{html.escape(str(value))}"')
    opening = f"<{tag}{''.join(shown)}>"
    if tag in VOID:
        assert not children
        return Html(opening)
    return Html(f"{opening}{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Html:
    """The children one after the other."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, str | int | float):
            parts.append(html.escape(str(child)))
        else:
            parts.append(join(child))
    return Html("".join(parts))


def table(head: Sequence[Html], body: Sequence[Html]) -> Html:
    """A table of header cells and rows that scrolls where the window is narrower."""
    return h("div", h("table", h("thead", h("tr", head)), h("tbody", body)), class_="scroll")


def page(name: str, body: Html) -> str:
    """A whole document around `body`, with the report's style and script inside."""
    assets = files("fewstep.evals") / "report_assets"
    script = (assets / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template((assets / "report.html").read_text(encoding="utf-8")).substitute(
        title=join([f"{name} · fewstep report"]),
        style=(assets / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        body=body,
    )
