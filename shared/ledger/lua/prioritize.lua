-- ARGV job, priority, ms after which low priority rises: move a job to another priority. Returns 0 if the job is over.
local job = ARGV[1]
if not active(read(job)) then return 0 end
dequeue(job)
redis.call('HSET', key(job), 'priority', ARGV[2])
redis.call('ZREM', ALARMS, 'rise ' .. job)
if ARGV[2] == 'low' then redis.call('ZADD', ALARMS, now_ms() + ARGV[3], 'rise ' .. job) end
enqueue(job)
return 1
