"""The configuration of a nats-server that is started here."""

import json
from typing import Final

FEATURE_FLAGS_VERSION: Final = (2, 14)
"""First release that knows `feature_flags`; an earlier one refuses the word."""
MAX_RESERVED_BYTES: Final = 2**50
"""No limit in practice: what the streams really take is bounded by each of them."""


def server_config(version: tuple[int, int], sync_interval: str | None, token: str) -> str:
    """Return the text of the server's configuration file: all that its command line does not contain."""
    # A bounded stream reserves its bound, used or not: by default three quarters of the free disk are there to give.
    jetstream = [f"max_file_store: {MAX_RESERVED_BYTES}"]
    if sync_interval is not None:
        jetstream.append(f"sync_interval: {json.dumps(sync_interval)}")
    lines = [f"jetstream {{ {', '.join(jetstream)} }}"]
    if version >= FEATURE_FLAGS_VERSION:
        # With the new flow-control subjects a KV watch of nats-py ends the connection's read loop.
        lines.append("feature_flags { js_ack_fc_v2: false }")
    if token:
        lines.append(f"authorization {{ token: {json.dumps(token)} }}")
    return "".join(f"{line}\n" for line in lines)
