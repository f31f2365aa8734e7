-- ARGV job, chunks, total, duplicates, ttl: mark a job as completely written; its chunks may be published.
local job = ARGV[1]
if redis.call('HGET', key(job), 'state') ~= 'submitting' then return 0 end
local now = now_ms()
redis.call('HSET', key(job), 'state', 'queued', 'chunks', ARGV[2], 'open', ARGV[2], 'total', ARGV[3],
  'dup', ARGV[4], 'ttl', ARGV[5])
for number = 0, tonumber(ARGV[2]) - 1 do wait(job, number, now) end
redis.call('ZADD', 'imagemill:jobs', now, job)
expire(job)
return 1
