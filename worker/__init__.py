"""What runs on a worker node. Only `main` wires objects together."""
