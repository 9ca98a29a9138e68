"""HTML as nested calls. Text is escaped unless it is `Html`, so data cannot become markup."""

import html
from collections.abc import Iterable

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
