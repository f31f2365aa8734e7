-- ARGV job, 1 to pause or 0 to resume. Returns 0 if the job is over or about to be.
local job = ARGV[1]
local j = read(job)
if not active(j) or j.cancelled or j.expired then return 0 end
if ARGV[2] == '1' then
  dequeue(job)
  redis.call('HSET', key(job), 'paused', now_ms())
else
  redis.call('HDEL', key(job), 'paused')
  enqueue(job)
end
redis.call('XADD', key(job, 'events'), '*', 'paused', ARGV[2])
return 1
