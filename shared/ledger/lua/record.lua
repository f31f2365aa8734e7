-- ARGV job, index, state, result: record a result, once per image. Returns whether it is the first one, 0 if the job is over;
-- and whether nothing more of the job should be begun.
local job, index = ARGV[1], ARGV[2]
local j = redis.call('HMGET', key(job), 'state', 'cancelled', 'paused', 'expired')
local stop = (j[2] or j[3] or j[4]) and 1 or 0
if j[1] ~= 'running' and j[1] ~= 'queued' then return {0, 1} end
if redis.call('HSETNX', key(job, 'results'), index, ARGV[4]) == 0 then return {0, stop} end
redis.call('HINCRBY', key(job), ARGV[3], 1 + figure(redis.call('HGET', key(job, 'duplicates'), index), 0))
redis.call('XADD', key(job, 'events'), '*', 'i', index)
if redis.call('HINCRBY', key(job), 'open', -1) == 0 then finish_if_over(job) end
return {1, stop}
