-- ARGV job, priority, ms after which low priority rises: move a job to another priority. Returns 0 if the job is over or about
-- to be.
local job = ARGV[1]
local j = read(job)
if not active(j) or j.cancelled or j.expired then return 0 end
dequeue(job)
redis.call('HSET', key(job), 'priority', ARGV[2])
redis.call('ZREM', ALARMS, 'rise ' .. job)
if ARGV[2] == 'low' then redis.call('ZADD', ALARMS, math.max(now_ms(), j.later or 0) + ARGV[3], 'rise ' .. job) end
enqueue(job)
return 1
