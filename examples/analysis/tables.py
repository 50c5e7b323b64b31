"""Describes CSV tables: types, ranges, correlations and groups."""

import csv
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import date
from itertools import combinations

from analysis.input_files import read_input
from loom.schemas.errors import AgentFailed

MAX_GROUPS = 12
"""A text column with more different values is not used for groups."""


class Column:
    """A column of a table, with its cells as text, and as numbers if all cells that are not empty are numbers."""

    def __init__(self, name: str, cells: Sequence[str]) -> None:
        self.name = name
        self.cells = cells
        self.filled = [cell for cell in cells if cell]
        self.missing = len(cells) - len(self.filled)
        numbers = [_number(cell) for cell in cells]
        self.numbers = numbers if len(self.filled) == sum(n is not None for n in numbers) > 0 else []
        self.is_date = bool(self.filled) and not self.numbers and all(_is_date(cell) for cell in self.filled)

    @property
    def values(self) -> list[float]:
        """The numbers of the cells that are not empty."""
        return [number for number in self.numbers if number is not None]

    @property
    def is_group(self) -> bool:
        """Whether the column is suitable for grouping rows."""
        return not self.numbers and not self.is_date and 1 < len(set(self.filled)) <= MAX_GROUPS

    def describe(self) -> str:
        """Return the type and the range of the column in one line."""
        values = self.values
        if values:
            facts = f"number  min {min(values):g}, mean {statistics.fmean(values):.2f}, max {max(values):g}"
        elif self.is_date:
            facts = f"date    {min(self.filled)} to {max(self.filled)}"
        else:
            counts = Counter(self.filled)
            common = ", ".join(f"{value} {count}" for value, count in counts.most_common(3) if count > 1)
            facts = f"text    {len(counts)} different" + (f": {common}" if common else "")
        return facts + (f", {self.missing} missing" if self.missing else "")


def read_table(file: str) -> list[Column]:
    """Return the columns of a CSV file with a header.

    Raises:
        AgentFailed: The file cannot be read, has no rows, or has a row of another length than the header.
    """
    header, *rows = list(csv.reader(read_input(file).splitlines())) or [[]]
    if not rows:
        raise AgentFailed(f"{file} has no rows")
    for line, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise AgentFailed(f"{file}, row {line}: {len(row)} cells instead of {len(header)}")
    return [Column(name, [row[index].strip() for row in rows]) for index, name in enumerate(header)]


def table_overview(file: str) -> str:
    """Describe every column of a CSV file: type, range, mean, common values, missing cells."""
    columns = read_table(file)
    width = max(len(column.name) for column in columns)
    lines = [f"{file}: {len(columns[0].cells)} rows, {len(columns)} columns"]
    return "\n".join([*lines, *(f"  {column.name:<{width}}  {column.describe()}" for column in columns)])


def table_report(file: str, measure: str = "") -> str:
    """Describe a CSV file with spread, correlations, and the groups with the most of `measure`.

    The default of `measure` is the number column with the largest total.
    """
    columns = read_table(file)
    numeric = [column for column in columns if column.numbers]
    lines = [table_overview(file)]
    if not numeric:
        return lines[0]
    lines += ["", "Spread (median, standard deviation)"]
    lines += [
        f"  {column.name}: {statistics.median(column.values):g}, {statistics.pstdev(column.values):.2f}"
        for column in numeric
    ]
    lines += ["", "Strongest correlations", *_correlations(numeric)]
    chosen = _choose(numeric, measure)
    for column in columns:
        if column.is_group:
            lines += ["", f"{chosen.name} by {column.name} (total, share, mean)", *_groups(column, chosen)]
    return "\n".join(lines)


def _choose(numeric: Sequence[Column], measure: str) -> Column:
    if not measure:
        return max(numeric, key=lambda column: sum(column.values))
    for column in numeric:
        if column.name == measure:
            return column
    raise AgentFailed(f"there is no number column {measure}; there are {', '.join(column.name for column in numeric)}")


def _correlations(numeric: Sequence[Column]) -> list[str]:
    correlations = []
    for first, second in combinations(numeric, 2):
        pairs = [(x, y) for x, y in zip(first.numbers, second.numbers, strict=True) if x is not None and y is not None]
        xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
        if len(set(xs)) > 1 and len(set(ys)) > 1:
            correlations.append((statistics.correlation(xs, ys), first.name, second.name))
    correlations.sort(key=lambda item: -abs(item[0]))
    return [f"  {first} and {second}: {r:+.2f}" for r, first, second in correlations[:3]] or ["  none"]


def _groups(by: Column, measure: Column) -> list[str]:
    members: dict[str, list[float]] = defaultdict(list)
    for group, number in zip(by.cells, measure.numbers, strict=True):
        if number is not None:
            members[group or "(missing)"].append(number)
    ranked = sorted(members.items(), key=lambda item: -sum(item[1]))
    whole = sum(measure.values)
    return [
        f"  {group}: {sum(numbers):,.2f}, {sum(numbers) / whole if whole else 0:.0%}, {statistics.fmean(numbers):,.2f}"
        for group, numbers in ranked[:4]
    ]


def _number(cell: str) -> float | None:
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_date(cell: str) -> bool:
    try:
        date.fromisoformat(cell)
    except ValueError:
        return False
    return True
