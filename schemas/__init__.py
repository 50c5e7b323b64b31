"""What crosses the wire, and pure values: no I/O, no NATS, no clock."""
