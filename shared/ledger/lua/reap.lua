-- ARGV patience ms, most: returns overdue chunks as job:chunk, and marks them as published now.
-- A chunk is overdue when its lease has expired, or when it is missing from its queue although no worker took it:
-- the queue is empty, or newer chunks were taken from it (queues are first in, first out).
local now, patience, most = now_ms(), tonumber(ARGV[1]), tonumber(ARGV[2])
local overdue = {}

for _, member in ipairs(redis.call('ZRANGEBYSCORE', LEASED, '-inf', now, 'LIMIT', 0, most)) do
  local job, number = string.match(member, '^(.*):(-?%d+)$')
  redis.call('ZREM', LEASED, member)
  if redis.call('HDEL', key(job, 'leases'), number) == 1 and redis.call('EXISTS', key(job)) == 1 then
    redis.call('HINCRBY', key(job, 'lost'), number, 1)
    wait(job, number, now)
    expire(job)
    overdue[#overdue + 1] = member
  end
end

for _, queue in ipairs(redis.call('SMEMBERS', 'imagemill:queues')) do
  local before = now - patience
  if redis.call('LLEN', queue) > 0 then
    before = math.min(before, tonumber(redis.call('HGET', NEWEST, queue) or 0) - patience)
  end
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', WAITING .. queue, '-inf', before, 'LIMIT', 0, most)) do
    local job = string.match(member, '^(.*):')
    if redis.call('EXISTS', key(job)) == 1 then
      redis.call('ZADD', WAITING .. queue, now, member)
      overdue[#overdue + 1] = member
    else
      redis.call('ZREM', WAITING .. queue, member)
    end
  end
end
return overdue
