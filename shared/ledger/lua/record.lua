-- ARGV job, index, state, result: record a result, once per image. Returns 0 if there is one or the job is over, else 1, or 2
-- if it was the job's last.
local job, index = ARGV[1], ARGV[2]
local state = redis.call('HGET', key(job), 'state')
if state ~= 'running' and state ~= 'queued' then return 0 end
if redis.call('HSETNX', key(job, 'results'), index, ARGV[4]) == 0 then return 0 end
redis.call('HINCRBY', key(job), ARGV[3], 1 + tonumber(redis.call('HGET', key(job, 'duplicates'), index) or 0))
redis.call('XADD', key(job, 'events'), '*', 'i', index)
if redis.call('HINCRBY', key(job), 'open', -1) > 0 then return 1 end
return finish_if_over(job) and 2 or 1
