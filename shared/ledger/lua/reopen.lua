-- ARGV job, ms after which low priority rises: put an ended job with open images back in line. Returns how many are open.
local job = ARGV[1]
local j = read(job)
if not ended(j) then return 0 end
local open = tonumber(redis.call('HGET', key(job), 'open'))
if open == 0 then return 0 end
-- Shares that were not given back yet when the last image was recorded.
local shares = redis.call('HGETALL', key(job, 'shares'))
for place = 1, #shares, 2 do
  local share = share_of(job, shares[place])
  count_running(share.owner, -share.images)
  redis.call('ZREM', LEASED, job .. ':' .. shares[place])
end
redis.call('DEL', key(job, 'shares'))
redis.call('HINCRBY', key(job), 'failed', 0 - tonumber(redis.call('HGET', key(job), 'lapsed') or 0)) -- never '-0'
redis.call('HDEL', key(job), 'paused', 'later', 'cancelled', 'expired', 'lapsed', 'damaged', 'until', 'ended', 'manifest',
  'manifest_since')
redis.call('HSET', key(job), 'state', 'queued', 'order', redis.call('INCR', 'imagemill:sequence'), 'due', now_ms())
redis.call('ZREM', manifests(j.lane), job)
if j.priority == 'low' then redis.call('ZADD', ALARMS, now_ms() + ARGV[2], 'rise ' .. job) end
persist(job)
if not finish_if_over(job) then enqueue(job) end
return open
