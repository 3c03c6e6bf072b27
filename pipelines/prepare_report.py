"""What `prepare` says about its work: the table at its end and prepared/report.html, both from the manifest alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.plots import COLOURS, SIZE, Plot, cut, page, plain, plot, short, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Manifest = Mapping[str, Any]

WIDTH = 100  # columns of a terminal
MOST_BARS = 120
MOST_VIEWS = 8  # of the plot of missing values; the table has all
SPLITS = ("train", "valid", "test")


def lines(manifest: Manifest) -> list[str]:
    """The table at the end of `prepare`: plain text of at most 100 columns, CJK characters counted as two."""
    rows = [("", "in", "kept", "rejected")]
    for key, count in manifest["rows"].items():
        rows.append((key, *(f"{count[name]:,}" for name in ("in", "kept", "rejected"))))
        rows += [(f"  {plain(reason)}", "", "", f"{n:,}") for reason, n in _reasons(manifest, key)]
    events = manifest["events"]
    totals = {"users": manifest["users"], "items": manifest["items"], "events": sum(events.values())} | events
    views = [("view", "kind", "level", "values", "missing", "unreadable")]
    for name, view in manifest["views"].items():
        missing = share(view["missing"], view["values"] + view["missing"])
        views.append(
            (plain(name), view["kind"], view["level"], f"{view['values']:,}", missing, f"{view['unreadable']:,}")
        )
    parts = [
        [cut(f"{plain(manifest['name'])}, prepared in {manifest['seconds']:.1f} s", WIDTH)],
        _grid(rows, left=1),
        [*_grid([tuple(totals), tuple(f"{n:,}" for n in totals.values())], left=0), _span(manifest)],
        _grid(views, left=3),
    ]
    for title, counts in (("conflicts, in ids", _conflicts(manifest)), ("notes", _notes(manifest))):
        if counts:
            parts.append(_grid([(title, ""), *((plain(what), f"{n:,}") for what, n in counts)], left=1))
    parts.append([f"content hash {manifest['content_hash']}"])
    return [line for part in parts for line in ["", *part]][1:]


def html(manifest: Manifest) -> str:
    """The same as one page with plots, which needs no network, no other file and no JavaScript.

    The same manifest gives the same text.
    """

    def shown(name: str, title: str, draw: Callable[[Axes, Manifest], str], there: Any, **options: Any) -> list[Plot]:
        return [plot(name, title, lambda ax: draw(ax, manifest), **options)] if there else []

    plots = [
        *shown("time", "Events a day", _draw_days, manifest["days"], legend={split: split for split in SPLITS}),
        *shown("history", "History lengths", _draw_lengths, manifest["history_lengths"]),
        *shown("popularity", "Item popularity", _draw_popularity, any(manifest["popularity"])),
        *shown("missing", "Missing values", _draw_missing, manifest["views"]),
    ]
    return page(
        "prepare.html.j2",
        manifest=manifest,
        reasons={key: _reasons(manifest, key) for key in manifest["rows"]},
        span=_span(manifest),
        share=share,
        conflicts=_conflicts(manifest),
        notes=_notes(manifest),
        plots=plots,
        splits=SPLITS,
    )


# what both say


def _reasons(manifest: Manifest, key: str) -> list[tuple[str, int]]:
    return sorted(manifest["rejected"].get(key, {}).items(), key=lambda pair: (-pair[1], pair[0]))


def _conflicts(manifest: Manifest) -> list[tuple[str, int]]:
    return [(f"{key}.{name}", n) for key, counts in manifest["conflicts"].items() for name, n in counts.items() if n]


def _notes(manifest: Manifest) -> list[tuple[str, int]]:
    counts = (
        ("users with too few events to be split: all train, none is tested", manifest["short_users"]),
        ("items without text: their text view is masked", manifest["items_without_text"]),
        ("items of the log that the items file lacks", manifest["unknown_items"]),
    )
    return [(what, n) for what, n in counts if n]


def _span(manifest: Manifest) -> str:
    first, last = (datetime.fromisoformat(text).replace(tzinfo=None) for text in manifest["span"])
    days = (last.date() - first.date()).days + 1
    shown = [moment.isoformat(" ", "seconds") for moment in (first, last)]
    return f"{shown[0]} to {shown[1]} UTC, {days:,} day{'s' if days > 1 else ''}"


def share(part: int, whole: int) -> str:
    """A percentage that says 0% and 100% only of none and all."""
    if not whole:
        return "-"
    if part in (0, whole):
        return "100%" if part else "0%"
    return "<0.1%" if part / whole < 0.001 else ">99.9%" if part / whole > 0.999 else f"{part / whole:.1%}"


# text in columns


def _grid(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows as aligned lines, the first `left` columns to the left; the first gives way where a line is too long."""
    widths = [max(map(text_width, column)) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    found = []
    for row in rows:
        cells = []
        for place, (text, width) in enumerate(zip(row, widths, strict=True)):
            text = cut(text, width)
            space = " " * (width - text_width(text))
            cells.append(text + space if place < left else space + text)
        found.append("  ".join(cells).rstrip())
    return found


# plots


def binned(days: Mapping[str, Sequence[int]]) -> tuple[date, list[int], np.ndarray]:
    """The first day, edges of at most 120 bins in days since then, mean events a day in each by split: [bins, 3].

    Where a bar a day is too many, bins are whole weeks, so that no rhythm of the week shows as a wave. The last may
    be shorter, and is a mean all the same.
    """
    found = {date.fromisoformat(day): counts for day, counts in days.items()}
    first, total = min(found), (max(found) - min(found)).days + 1
    step = 1 if total <= MOST_BARS else 7 * math.ceil(total / 7 / MOST_BARS)
    edges = [*range(0, total, step), total]
    sums = np.zeros((len(edges) - 1, len(SPLITS)))
    for day, counts in found.items():
        sums[(day - first).days // step] += counts
    return first, edges, sums / np.diff(edges)[:, None]


def _draw_days(ax: Axes, manifest: Manifest) -> str:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    first, edges, heights = binned(manifest["days"])
    below = np.zeros(len(heights))
    for split, name in enumerate(SPLITS):
        above = below + heights[:, split]
        ax.stairs(above, edges, baseline=below, fill=True, color=COLOURS[name], linewidth=0)
        below = above
    labelled = edges[: -1 : math.ceil(len(heights) / 4)]
    step = edges[1]
    middle = 0.5 if step == 1 else 0  # of a day; a longer bin is named by its first day
    ax.set_xticks([edge + middle for edge in labelled], [str(first + timedelta(days=edge)) for edge in labelled])
    ax.set_xlabel("day, UTC")
    ax.set_xlim(0, edges[-1])
    ax.set_ylim(0, below.max() * 1.05)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
    busiest = max(manifest["days"], key=lambda day: sum(manifest["days"][day]))
    caption = f"The busiest day, {busiest}, has {sum(manifest['days'][busiest]):,} events."
    return caption if step == 1 else f"{caption} Each step is the mean of {step} days."


def _draw_lengths(ax: Axes, manifest: Manifest) -> str:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    bins = manifest["history_lengths"]
    counts = list(bins.values())
    ax.bar(range(len(bins)), counts, width=0.8, color=COLOURS["main"])
    labelled = range(0, len(bins), 1 if len(bins) < 12 else math.ceil(len(bins) / 8))
    ax.set_xticks(labelled, [short(int(list(bins)[place].split("-")[0])) for place in labelled])
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel("events in the history, this many or more")
    ax.set_xlim(-0.6, max(len(bins), 4) - 0.4)
    ax.set_ylim(0, max(counts) * 1.05)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
    middle = list(bins)[int(np.searchsorted(np.cumsum(counts), sum(counts) / 2))]
    events = "1 event" if middle == "1" else f"{middle} events"
    return f"Users by the number of their events; the median user has {events}."


def _draw_popularity(ax: Axes, manifest: Manifest) -> str:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points = [p for p in zip(manifest["popularity_ranks"], manifest["popularity"], strict=True) if p[1] > 0]
    ranks, counts = zip(*points, strict=True)
    marker = "o" if len(points) < 20 else None
    ax.loglog(ranks, counts, color=COLOURS["main"], linewidth=1.8, marker=marker, markersize=4, clip_on=False)
    for axis, limit, most in ((ax.xaxis, ax.set_xlim, ranks[-1]), (ax.yaxis, ax.set_ylim, counts[0])):
        limit(1, 10 ** max(1, math.ceil(math.log10(most))))
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("rank of the item; both scales are logarithmic")
    part = share(counts[0], sum(manifest["events"].values()))
    caption = f"Events of an item by its rank. The most popular has {counts[0]:,} ({part} of all events)"
    return f"{caption}, rank {ranks[-1]:,} has {counts[-1]:,}." if len(points) > 1 else f"{caption}."


def _draw_missing(ax: Axes, manifest: Manifest) -> str:
    shares = {
        name: view["missing"] / max(1, view["values"] + view["missing"]) for name, view in manifest["views"].items()
    }
    shown = sorted(shares, key=lambda name: -shares[name])[:MOST_VIEWS]
    width, row_height = SIZE[0], SIZE[1] / MOST_VIEWS
    ax.set_position((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set_xlim(0, width)
    ax.set_ylim(SIZE[1], 0)
    for row, name in enumerate(shown):
        view, y = manifest["views"][name], row_height * row
        part = share(view["missing"], view["values"] + view["missing"])
        ax.text(0, y + 12, cut(plain(name), 40), va="baseline", parse_math=False)
        ax.text(width, y + 12, part, va="baseline", ha="right", color=COLOURS["quiet"])
        ax.barh(y + 19, width, 5, color=COLOURS["line"])
        if view["missing"]:
            ax.barh(y + 19, max(1, width * shares[name]), 5, color=COLOURS["valid"])
    most = f"; the {len(shown)} that miss most are shown" if len(shown) < len(shares) else ""
    incomplete = sum(part > 0 for part in shares.values())
    return f"Views that miss values: {incomplete} of {len(shares)}{most}. What is missing is masked, never filled in."
