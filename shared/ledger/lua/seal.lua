-- ARGV job, size, total, duplicates, ttl in s, not before, until, ms after which low priority rises: a job is completely written.
-- `size` is its highest index + 1; times are in ms, 0 for none. Returns 0 if Redis has forgotten the job.
local job, now = ARGV[1], now_ms()
-- With an order it has been sealed: this is a second attempt, after a repair.
if redis.call('HGET', key(job), 'state') ~= 'submitting' then return redis.call('HEXISTS', key(job), 'order') end
redis.call('HSET', key(job), 'state', 'queued', 'size', ARGV[2], 'total', ARGV[3], 'dup', ARGV[4], 'ttl', ARGV[5],
  'open', ARGV[3] - ARGV[4], 'order', redis.call('INCR', 'imagemill:sequence'))
persist(job)
redis.call('ZADD', 'imagemill:jobs', now, job)
local begins, ends = tonumber(ARGV[6]), tonumber(ARGV[7])
if begins > now then
  redis.call('HSET', key(job), 'later', begins)
  redis.call('ZADD', ALARMS, begins, 'begin ' .. job)
end
if ends > 0 then
  redis.call('HSET', key(job), 'until', ends)
  redis.call('ZADD', ALARMS, ends, 'end ' .. job)
end
if redis.call('HGET', key(job), 'priority') == 'low' then
  redis.call('ZADD', ALARMS, math.max(now, begins) + ARGV[8], 'rise ' .. job)
end
if not finish_if_over(job) then enqueue(job) end
return 1
