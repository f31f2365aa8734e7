"""A worker node: its processes, tasks and leases, and what it offers."""
