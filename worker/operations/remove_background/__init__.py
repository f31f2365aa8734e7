"""Cut the subject out: one module per engine, and what they share."""
