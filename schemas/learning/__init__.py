"""Messages and values of learning: rewards, profiles, calibrations, leases and lifecycle events."""
