"""From bytes to pixels and back."""
