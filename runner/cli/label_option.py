"""The option `--label NAME=VALUE` of commands."""

from collections.abc import Sequence
from typing import Annotated

import typer

LabelPairs = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="A label of the task; repeatable.")
]


def labels_of(pairs: Sequence[str] | None) -> dict[str, str]:
    """Return the labels that options name.

    Raises:
        typer.BadParameter: One of them is not NAME=VALUE.
    """
    labels: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{pair!r} is not a label; write it like tenant=acme", param_hint="--label")
        labels[name] = value
    return labels
