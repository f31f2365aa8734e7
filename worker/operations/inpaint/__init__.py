"""Fill holes in images: one module per engine, plus the code they share."""
