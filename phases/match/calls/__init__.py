"""Calls for bids: which hosts receive them, which offers arrive, and the bids of plain nodes."""
