"""Fill holes: one module per engine, and what they share."""
