"""What producers and workers share: messages, errors, settings, broker and ledger.

Nothing here imports torch, numpy or Pillow, so a producer installs in seconds.
"""
