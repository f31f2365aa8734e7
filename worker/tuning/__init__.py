"""The `imagemill tune` command: how many images fit on a device at once."""
