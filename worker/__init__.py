"""The worker node. Only `main` wires its objects together."""
