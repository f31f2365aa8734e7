-- ARGV job: cancel a job; it is over as soon as nothing of it runs. Returns 0 if there is nothing to cancel.
local job = ARGV[1]
local j = read(job)
if not active(j) or j.cancelled then return 0 end
dequeue(job)
drop_alarms(job)
redis.call('HSET', key(job), 'cancelled', now_ms())
redis.call('HDEL', key(job), 'paused', 'later')
redis.call('XADD', key(job, 'events'), '*', 'cancelled', '1')
finish_if_over(job)
return 1
