"""The checks of `imagemill doctor`, by subject. Each takes the settings and yields findings."""
