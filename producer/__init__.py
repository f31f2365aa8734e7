"""What submits jobs and follows them. Imports of imagemill's own packages: only `shared`."""
