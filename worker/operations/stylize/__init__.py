"""Change how an image looks: one module per engine."""
