"""Options of operations: one module per operation, one model per engine."""
