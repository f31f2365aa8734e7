"""The record of every job, in Redis: it outlives queues, workers and restarts.

A job's list is stored in packs of at most 32 items. A worker child that has room takes a share: images of the job whose turn
it is, leased while the child renews. What to hand out is decided in a Lua script when a child asks, because only then is it
clear how much is left, who is waiting and how fast the child is. A Celery message only wakes a child up: losing it costs a
second. Every change that must be atomic is a Lua script in `lua/`.

`submitting` is the producer's side, `leasing` the worker's; both build on `reading`.

All keys start with `imagemill:`. Those of a job are kept until it ends, and then expire together:

    job:{id}              hash    spec, state, counts; `next` is the lowest index that was never handed out
    job:{id}:packs        hash    number -> its items, as zlib-compressed JSON
    job:{id}:back         list    ranges of indexes that were given back, to be handed out first
    job:{id}:suspects     list    groups of images whose worker died, as `deaths:ranges`; each is run with nothing else
    job:{id}:shares       hash    number -> its child, owner and images, as JSON
    job:{id}:results      hash    index -> ItemResult, written once
    job:{id}:events       stream  one entry per result, to notify watchers
    job:{id}:wait         string  why its images wait on some worker; expires after 30 s
    job:{id}:duplicates   hash    index -> how many later rows share its result

Who is next: by priority, then by the owners' clocks (common.lua), then in the order of submission.

    turns:{lane}:{priority}             zset    owners with waiting jobs -> their clocks
    waiting:{lane}:{priority}:{owner}   zset    jobs with images to hand out -> place in the order of submission
    clocks:{priority}                   zset    owner -> virtual time
    latest                              hash    lane:priority -> virtual time of the latest turn
    weights                             hash    owner -> weight
    running                             hash    owner -> images in leased shares
    alarms                              zset    `begin`, `end` or `rise` and a job -> when
    manifests:{lane}                    zset    jobs whose manifest is due -> when a child may take it
    lanes                               set     lanes with work
    leased                              zset    share -> when its lease expires
    nodes:{lane}                        zset    node -> its latest report
    rates:{lane}                        hash    child -> images per second
    children, speed                     hash    lane -> number of children, their images per second
    jobs                                zset    job -> when it was submitted
    tender                              string  the node that does what has to be done every second
    tended                              string  when that was done last
"""
