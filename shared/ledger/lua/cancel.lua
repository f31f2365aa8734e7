-- ARGV job: cancel a job. Returns 0: not cancellable; 1: cancelled, but workers still have chunks; 2: cancelled, none has.
local job = ARGV[1]
local state = redis.call('HGET', key(job), 'state')
if state ~= 'queued' and state ~= 'running' then return 0 end
local queue = redis.call('HGET', key(job), 'queue')
redis.call('HSET', key(job), 'cancelled', now_ms())
local rest = false
for number = 0, tonumber(redis.call('HGET', key(job), 'chunks')) - 1 do
  if redis.call('ZREM', WAITING .. queue, job .. ':' .. number) == 1 then
    rest = close_chunk(job, number)
  end
end
redis.call('XADD', key(job, 'events'), '*', 'cancelled', '1')
expire(job)
if rest then wait(job, -1, now_ms()) end
return rest and 2 or 1
