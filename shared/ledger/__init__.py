"""The record of every job, in Redis: it outlives queues, workers and restarts.

A chunk is recorded here before its message is published, and is leased while a worker has it. The reaper
republishes overdue chunks, so the queue is only a hint: Celery on Redis can lose a message under any setting.
Every change that must be atomic is a Lua script in `lua/`.

`submitting` is the producer's side, `leasing` the worker's; both build on `reading`.

All keys start with `imagemill:`. Those of a job expire together:

    job:{id}              hash    spec, state, counts, queue
    job:{id}:chunks       hash    number -> its items, as zlib-compressed JSON
    job:{id}:results      hash    index -> ItemResult, written once
    job:{id}:events       stream  one entry per result, to notify watchers
    job:{id}:duplicates   hash    index -> how many later rows share its result
    job:{id}:attempts     hash    index -> times it was tried alone after its chunk's worker died
    job:{id}:leases       hash    chunk -> token of the worker that has it
    job:{id}:lost         hash    chunk -> how often its worker was lost
    job:{id}:finished     bitmap  chunks with nothing left to do
    waiting:{queue}       zset    chunk -> when it was published
    leased                zset    chunk -> when its lease expires
    newest                hash    queue -> when the newest chunk taken from it was published
    queues                set     queues that have had chunks waiting
    jobs                  zset    job -> when it was submitted
    reaper                string  the node that is the reaper for the next seconds
"""
