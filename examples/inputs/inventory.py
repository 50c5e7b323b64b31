"""Keep the stock of a small shop in a JSON file."""

import argparse
import json
import sys
from datetime import date
from pathlib import Path


class Inventory:
    """What is in stock: name -> quantity, price and reorder level."""

    def __init__(self, path):
        self.path = Path(path)
        self.items = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, name, quantity, price=None, reorder_at=0):
        """Put `quantity` pieces of `name` on the shelf."""
        item = self.items.setdefault(name, {"quantity": 0, "price": 0.0, "reorder_at": reorder_at})
        item["quantity"] += quantity
        if price is not None:
            item["price"] = price

    def remove(self, name, quantity):
        item = self.items.get(name)
        if item is None:
            raise KeyError(name)
        if item["quantity"] < quantity:
            raise ValueError(f"only {item['quantity']} of {name} left")
        item["quantity"] -= quantity

    def value(self):
        """Return what the stock is worth."""
        return sum(item["quantity"] * item["price"] for item in self.items.values())

    def to_reorder(self):
        return sorted(name for name, item in self.items.items() if item["quantity"] <= item["reorder_at"])

    def save(self):
        """Write the file in one step, so that a crash leaves the old one."""
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.items, indent=2))
        scratch.replace(self.path)


def report(inventory, today=None):
    """Return the stock as lines of text."""
    lines = [f"Stock on {today or date.today():%d %B %Y}"]
    for name, item in sorted(inventory.items.items()):
        flag = " (reorder)" if item["quantity"] <= item["reorder_at"] else ""
        lines.append(f"{name:<20}{item['quantity']:>6} x {item['price']:>8.2f}{flag}")
    lines.append(f"{'total':<20}{inventory.value():>17.2f}")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add")
    add.add_argument("name")
    add.add_argument("quantity", type=int)
    add.add_argument("--price", type=float)
    add.add_argument("--reorder-at", type=int, default=0)
    remove = commands.add_parser("remove")
    remove.add_argument("name")
    remove.add_argument("quantity", type=int)
    commands.add_parser("report")
    commands.add_parser("reorder")
    options = parser.parse_args(arguments)
    inventory = Inventory(options.file)
    try:
        if options.command == "add":
            inventory.add(options.name, options.quantity, options.price, options.reorder_at)
        elif options.command == "remove":
            inventory.remove(options.name, options.quantity)
        elif options.command == "report":
            print(report(inventory))
        elif options.command == "reorder":
            print("\n".join(inventory.to_reorder()) or "nothing to reorder")
    except KeyError as error:
        print(f"no such item: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    inventory.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
