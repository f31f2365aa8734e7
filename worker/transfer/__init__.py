"""Where images come from and where results go."""
