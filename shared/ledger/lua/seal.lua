-- ARGV job, size, total, duplicates, ttl in s, not before, until, ms after which low priority rises: a job is completely written.
-- `size` is its highest index + 1; times are in ms, 0 for none. Returns 'sealed'; 'before' if it was already, 'other' if that was
-- a longer or shorter list; 'gone' if Redis has forgotten the job.
local job, now = ARGV[1], now_ms()
local before = redis.call('HMGET', key(job), 'state', 'size', 'total', 'dup')
if not before[1] then return 'gone' end
if before[1] ~= 'submitting' then
  return before[2] == ARGV[2] and before[3] == ARGV[3] and before[4] == ARGV[4] and 'before' or 'other'
end
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
return 'sealed'
