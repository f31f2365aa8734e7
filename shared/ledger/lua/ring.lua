-- No ARGV: what is due by now, for readers who find a job past its deadline while no node runs.
ring(now_ms())
return 1
