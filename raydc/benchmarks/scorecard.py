"""The benchmarks' common result: ``scorecard.json``, and the model page's tables for a terminal or a README.

A number measured on part of an official set never stands in a table of the full set: it has a table of its own, headed
by the data it comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from raydc.benchmarks import published
from raydc.config import RunError, UsageError
from raydc.storage import Folder

SCORECARD = "scorecard.json"
FULL_SET = "published, on the full set"
SETS = {
    "svm": "VOC07",
    "lowshot": "VOC07",
    "linear_imagenet": "ImageNet",
    "linear_places205": "Places205",
    "linear_inat18": "iNaturalist2018",
    "semisup": "ImageNet",
    "knn": "ImageNet",
    "detection_voc0712": "VOC07+12",
    "detection_coco": "COCO 2017",
    "segmentation_voc12aug": "VOC12 with SBD",
    "segmentation_cityscapes": "Cityscapes",
    "segmentation_camvid": "CamVid",
}

# The page's order, by the first word of a benchmark's name; a column without any number is not printed.
LAYERS = ("feature1", "feature2", "feature3", "feature4", "feature5")
COLUMNS = {
    "svm": (*LAYERS, "best"),
    "lowshot": ("k=1", "k=2", "k=4", "k=8", "k=16", "k=32", "k=64", "k=96"),
    "linear": (*LAYERS, "AvgPool"),
    "semisup": ("Top-1", "Top-5"),
    "knn": ("k=10", "k=20", "k=100", "k=200"),
    "detection": ("AP", "AP50", "AP75", "mask AP", "mask AP50", "mask AP75", "VOC07 AP50", "VOC07 AP", "VOC07 AP75"),
    "segmentation": ("mIoU",),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number.

    ``value`` in percent; ``spread``: its standard deviation over ``seeds`` or samples, in points; ``data`` names the
    images truly used; ``full``: they are the whole official set; ``notes``: sentences on what differs from the protocol.
    """

    benchmark: str
    column: str
    value: float
    data: str
    backbone: str
    full: bool = False
    seeds: int = 1
    spread: float | None = None
    notes: tuple[str, ...] = ()


# --- the file -----------------------------------------------------------------------------------------------------------


def write(folder: Folder, rows: Iterable[Row]) -> None:
    """scorecard.json, whole or not at all; RunError that names the row whose value is no percentage."""
    rows = merge(rows)
    for wrong in filter(None, map(_wrong, rows)):
        raise RunError(f"{wrong}; no scorecard was written")
    folder.write_json(SCORECARD, {"rows": [_to_json(row) for row in rows]})


def read(folder: Folder) -> list[Row]:
    """The rows of scorecard.json; none where nothing has been measured yet. A file that is no scorecard is a UsageError."""
    if not folder.exists(SCORECARD):
        return []
    try:
        rows = [_from_json(row) for row in folder.read_json(SCORECARD)["rows"]]
        reason = next(filter(None, map(_wrong, rows)), "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise UsageError(f"{folder.uri}/{SCORECARD} is not a scorecard ({reason}); move it away and measure again")
    return rows


def merge(*lists: Iterable[Row]) -> list[Row]:
    """All rows in order of appearance; of the same benchmark, column, data and backbone the last one's value holds."""
    kept = {(row.benchmark, row.column, row.data, row.backbone): row for rows in lists for row in rows}
    return list(kept.values())


def noted(row: Row, note: str) -> Row:
    """The same row with one more note."""
    return dataclasses.replace(row, notes=(*row.notes, note))


def _to_json(row: Row) -> dict:
    known = published.rows(row.benchmark, row.column)
    values = dataclasses.asdict(row) | {"value": float(row.value), "notes": list(row.notes)}
    values["spread"] = None if row.spread is None else float(row.spread)
    values["published"] = [{"method": one.method, "value": one.value, "source": one.source} for one in known]
    if not row.notes:
        del values["notes"]
    return values


def _from_json(values: dict) -> Row:
    values = {name: value for name, value in values.items() if name != "published"}
    return Row(**values | {"notes": tuple(values.get("notes", ()))})


def _wrong(row: Row) -> str:
    """What is wrong with a row, and where to look, or nothing. NaN fails every comparison."""
    name = f"{row.benchmark} {row.column} of {row.backbone} on {row.data}"
    if not row.data.strip():
        return f"{row.benchmark} {row.column} of {row.backbone} does not say what data it was measured on: name them"
    if not 0 <= row.value <= 100:
        return f"{name} is {row.value}, not a percentage: look for NaN in the backbone's features"
    if row.spread is not None and not 0 <= row.spread <= 100:
        return f"{name} has a spread of {row.spread}, not points of a percentage: look for NaN in its samples"
    return ""


# --- the page's tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """One small table: its heading, cells with the header first, and sentences under it."""

    heading: str
    cells: list[list[str]]
    notes: list[str]


def tables(rows: Iterable[Row]) -> str:
    """The page's tables for a terminal, one benchmark after the other: ours, those on part of the data, the published."""
    return _render(rows, "{}", _text)


def markdown(rows: Iterable[Row]) -> str:
    """The same tables for a README."""
    return _render(rows, "### {}", _markdown)


def _render(rows: Iterable[Row], title: str, draw: Callable[[_Block], str]) -> str:
    rows = merge(rows)
    parts = []
    for benchmark in sorted({row.benchmark: None for row in rows}, key=_place):
        blocks = _blocks(benchmark, [row for row in rows if row.benchmark == benchmark])
        parts += [title.format(benchmark), *(draw(block) for block in blocks)]
        parts += [published.MISSING[benchmark]] if benchmark in published.MISSING else []
    return "\n\n".join(parts) + "\n" if parts else ""


def _family(benchmark: str) -> str:
    return benchmark.partition("_")[0]


def _place(benchmark: str) -> int:
    family = _family(benchmark)
    return list(COLUMNS).index(family) if family in COLUMNS else len(COLUMNS)


def _blocks(benchmark: str, rows: list[Row]) -> list[_Block]:
    """The full set's tables first, then one for each part of it that was used, then the published one."""
    known = published.rows(benchmark)
    columns = _columns(benchmark, [row.column for row in [*rows, *known]])
    data = {(row.full, row.data): None for row in rows}
    blocks = [
        _measured(full, name, columns, [row for row in rows if (row.full, row.data) == (full, name)])
        for full, name in sorted(data, key=lambda one: not one[0])
    ]
    name = SETS.get(benchmark) or SETS.get(_family(benchmark), "")
    return [*blocks, _published(f"{FULL_SET} ({name})" if name else FULL_SET, columns, known)] if known else blocks


def _columns(benchmark: str, present: list[str]) -> list[str]:
    """Columns with a number, in the page's order; those the page does not have come last."""
    page = COLUMNS.get(_family(benchmark), ())
    return [one for one in dict.fromkeys([*page, *present]) if one in present]


def _measured(full: bool, data: str, columns: list[str], rows: list[Row]) -> _Block:
    cells = [["backbone", *columns, "seeds"]]
    for backbone in dict.fromkeys(row.backbone for row in rows):
        mine = {row.column: row for row in rows if row.backbone == backbone}
        seeds = sorted({row.seeds for row in mine.values()})
        cells.append([backbone, *(_cell(mine.get(column)) for column in columns), ", ".join(map(str, seeds))])
    heading = f"measured, on the full set: {data}" if full else f"measured, on {data}"
    notes = dict.fromkeys(note for row in rows for note in row.notes)
    return _Block(heading, cells, [_attributed(note, rows, columns) for note in notes])


def _attributed(note: str, rows: list[Row], columns: list[str]) -> str:
    """A note that holds for some columns only names them."""
    holds = [column for column in columns if any(note in row.notes for row in rows if row.column == column)]
    everywhere = all(note in row.notes for row in rows)
    return note if everywhere else f"{', '.join(holds)}: {note}"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row.value:.2f}" if row.spread is None else f"{row.value:.2f} +- {row.spread:.2f}"


def _published(heading: str, columns: list[str], known: list[published.Published]) -> _Block:
    lines: dict[tuple, dict[str, float]] = {}
    for one in known:
        lines.setdefault((one.method, one.source, one.setting, one.note), {})[one.column] = one.value
    cells = [["method", *columns, "source"]]
    for (method, *origin), values in lines.items():
        numbers = (f"{values[column]:.2f}" if column in values else "-" for column in columns)
        cells.append([method, *numbers, "; ".join(filter(None, origin))])
    return _Block(heading, cells, [])


def _text(block: _Block) -> str:
    """Names to the left, numbers to the right, the source ragged."""
    widths = [max(map(len, column)) for column in zip(*block.cells, strict=True)]
    lines = [f"  {block.heading}"]
    for name, *numbers, last in block.cells:
        middle = (number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True))
        lines.append("    " + "  ".join([name.ljust(widths[0]), *middle, last]))
    return "\n".join([*lines, *(f"    ({note})" for note in block.notes)])


def _markdown(block: _Block) -> str:
    header, *lines = [["\\|".join(cell.split("|")) for cell in line] for line in block.cells]
    rule = ["---", *["---:"] * (len(header) - 2), "---"]
    table = [f"| {' | '.join(line)} |" for line in (header, rule, *lines)]
    notes = "\n".join(f"- {note}" for note in block.notes)
    return "\n\n".join(filter(None, [f"**{block.heading}**", "\n".join(table), notes]))
