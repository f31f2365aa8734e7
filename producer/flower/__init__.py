"""Flower for imagemill: with a password everywhere, and with the words of an operator who thinks in images and jobs."""
