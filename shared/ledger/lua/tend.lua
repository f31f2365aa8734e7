-- ARGV seconds after which a silent node is dead: what has to be done every second, whoever does it. Hands out the shares of
-- dead workers again, counts the children of each lane and their speed, and returns the number of lost shares, then lane and
-- number of children for each lane that needs wake-ups.
local now, lost = now_ms(), 0
ring(now)
for _, member in ipairs(redis.call('ZRANGEBYSCORE', LEASED, '-inf', now, 'LIMIT', 0, 1000)) do
  if bury(member) then lost = lost + 1 end
end

local answer = {lost}
for _, lane in ipairs(redis.call('SMEMBERS', LANES)) do
  local nodes, children, alive = 'imagemill:nodes:' .. lane, 0, {}
  redis.call('ZREMRANGEBYSCORE', nodes, '-inf', now - ARGV[1] * 1000)
  for _, node in ipairs(redis.call('ZRANGE', nodes, 0, -1)) do
    children, alive[node] = children + (redis.call('HGET', 'imagemill:node-children', node) or 0), true
  end
  local rates, known, speed = 'imagemill:rates:' .. lane, 0, 0
  local reports = redis.call('HGETALL', rates)
  for place = 1, #reports, 2 do
    if alive[string.match(reports[place], '^(.*)/')] then
      known, speed = known + 1, speed + reports[place + 1]
    else
      redis.call('HDEL', rates, reports[place])
    end
  end
  -- Children that have not computed an image yet are assumed to be as fast as the others.
  if known > 0 then speed = speed * math.max(1, children / known) end
  redis.call('HSET', 'imagemill:children', lane, children)
  redis.call('HSET', 'imagemill:speed', lane, string.format('%.6g', speed))

  local work = redis.call('EXISTS', manifests(lane)) == 1
  for _, priority in ipairs(PRIORITIES) do work = work or redis.call('EXISTS', turns(lane, priority)) == 1 end
  if not work then
    redis.call('SREM', LANES, lane)
  elseif redis.call('LLEN', 'imagemill.' .. lane) == 0 then
    answer[#answer + 1] = lane
    answer[#answer + 1] = children
  end
end

-- The clock of an owner who has left, once the latest turn has overtaken it, says nothing any more.
for _, priority in ipairs(PRIORITIES) do
  local latest = string.format('(%.17g', clock_of(priority, ''))
  local past = redis.call('ZCOUNT', clocks(priority), '-inf', latest)
  local offset = past > 20 and math.floor(now / 1000) % (past - 19) or 0
  for _, owner in ipairs(redis.call('ZRANGEBYSCORE', clocks(priority), '-inf', latest, 'LIMIT', offset, 20)) do
    local waits = false
    for _, lane in ipairs(redis.call('SMEMBERS', LANES)) do
      waits = waits or redis.call('ZSCORE', turns(lane, priority), owner)
    end
    if not waits then redis.call('ZREM', clocks(priority), owner) end
  end
end

for _, job in ipairs(redis.call('ZRANGE', 'imagemill:jobs', 0, 9)) do
  if redis.call('EXISTS', key(job)) == 0 then redis.call('ZREM', 'imagemill:jobs', job) end
end
return answer
