"""Flower for imagemill: password-protected, and in terms of images and jobs."""
