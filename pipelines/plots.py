"""Plots and pages of the reports: inline SVG in the page's own colours and fonts, one file that needs no other."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE, MARGINS = (360, 200), (40, 12, 38, 8)  # points of a plot; left, right, bottom, top of its axes
COLOURS = {  # CSS variable of the page -> the colour that stands for it while matplotlib draws
    "ink": "#1b1e28", "quiet": "#5c6375", "line": "#e1e4ee", "main": "#4252c8",
    "train": "#4353c9", "valid": "#e0803a", "test": "#2f9e78",
    "view-1": "#4454c7", "view-2": "#e1813b", "view-3": "#309f79", "view-4": "#c2568f", "view-5": "#8a6bd1",
    "view-6": "#3d9cc4", "view-7": "#b09a2f", "view-8": "#7d8496",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    svg: Markup
    legend: Mapping[str, str] = field(default_factory=dict)  # label -> CSS variable


def page(template: str, **values: Any) -> str:
    """A template of pipelines/templates as text. Names are text in it, never markup."""
    environment = Environment(
        loader=PackageLoader("pipelines"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": "{:,}".format, "size": file_size}
    return environment.get_template(template).render(**values)


def plot(
    name: str,
    title: str,
    draw: Callable[[Axes], str],
    legend: Mapping[str, str] | None = None,
    height: int = SIZE[1],
) -> Plot:
    """`draw` draws in the given axes and returns the caption. `name` is unique in the page; height in points."""
    import matplotlib
    from matplotlib.figure import Figure

    width, (left, right, bottom, top) = SIZE[0], MARGINS
    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "DejaVu Sans", "font.size": 10.5,
        "text.color": COLOURS["ink"], "axes.edgecolor": COLOURS["quiet"], "axes.labelcolor": COLOURS["quiet"],
        "xtick.color": COLOURS["quiet"], "ytick.color": COLOURS["quiet"], "grid.color": COLOURS["line"],
        "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.spines.left": False,
        "axes.spines.top": False, "axes.spines.right": False, "ytick.major.size": 0, "xtick.minor.size": 0,
        "ytick.minor.size": 0,
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # matplotlib measures in its own font, which has no Chinese; the browser draws in one that has
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width / 72, height / 72))
        box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
        caption = draw(figure.add_axes(box))
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    drawn = out.getvalue().split("</defs>", 1)[1]  # what stands before is for a file of its own
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn).replace("xlink:href", "href")  # a page's ids are unique
    for variable, colour in COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    head = Markup(
        '<svg viewBox="0 0 {0} {1}" role="img" aria-labelledby="{2}-title {2}-desc">'
        '<title id="{2}-title">{3}</title><desc id="{2}-desc">{4}</desc>'
    )
    return Plot(title, caption, head.format(width, height, name, title, caption) + Markup(drawn), legend or {})


def text_width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def cut(text: str, width: int) -> str:
    if text_width(text) <= width:
        return text
    while text_width(text) > width - 1:
        text = text[:-1]
    return text + "…"


def plain(text: str) -> str:
    """Without characters that would move a terminal's cursor: a name comes from a file of the user's."""
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)


def short(number: float) -> str:
    """A number of an axis: 0.5, 20, 1.5k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def file_size(count: int) -> str:
    """Bytes for people: 512 B, 1.9 MB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
