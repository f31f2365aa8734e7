"""What producers and workers both speak: messages, errors, settings, broker and ledger.

Imports neither torch, numpy nor Pillow, so that a producer installs in seconds.
"""
