"""A self-organising cluster of agents on NATS."""
