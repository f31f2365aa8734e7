"""What each operation can be told: one module per operation, one model per engine."""
