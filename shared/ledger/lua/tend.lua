-- ARGV seconds after which a silent node is dead, lease in ms: what has to be done every second, whoever does it. Hands out the shares of
-- dead workers again, counts the children of each lane and their speed, and returns the number of lost shares, the job of each, then lane and
-- number of children for each lane that needs wake-ups.
local OUTAGE = 5000
local now, lost = now_ms(), {}
ring(now)

-- If nobody has been here for a while, Redis was down or unreachable and nobody could renew. That does not make workers dead:
-- each gets the time of one more lease.
local before = tonumber(redis.call('GET', 'imagemill:tended') or now)
redis.call('SET', 'imagemill:tended', now)
if now - before > OUTAGE then
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', LEASED, '-inf', now)) do redis.call('ZADD', LEASED, now + ARGV[2], member) end
end

local images = 0
for _, member in ipairs(redis.call('ZRANGEBYSCORE', LEASED, '-inf', now, 'LIMIT', 0, 1000)) do
  local size = bury(member)
  if size then lost[#lost + 1], images = string.match(member, '^(.*):'), images + size end
  if images > 10000 then break end -- the rest in a second: nobody else can use Redis meanwhile
end

local answer = {#lost}
for _, job in ipairs(lost) do answer[#answer + 1] = job end
for _, lane in ipairs(redis.call('SMEMBERS', LANES)) do
  redis.call('ZREMRANGEBYSCORE', 'imagemill:nodes:' .. lane, '-inf', now - ARGV[1] * 1000)
  local children = count_children(lane)
  local work = redis.call('ZCOUNT', manifests(lane), '-inf', now_ms()) > 0
  for _, priority in ipairs(PRIORITIES) do work = work or redis.call('EXISTS', turns(lane, priority)) == 1 end
  if not work and redis.call('EXISTS', manifests(lane)) == 0 then
    redis.call('SREM', LANES, lane)
  elseif work and redis.call('LLEN', 'imagemill.' .. lane) == 0 then
    answer[#answer + 1] = lane
    answer[#answer + 1] = children
  end
end

-- The clock of an owner who has left, once the latest turns have overtaken it, says nothing any more.
local latest = redis.call('HGETALL', 'imagemill:latest')
for _, priority in ipairs(PRIORITIES) do
  local least = math.huge
  for place = 1, #latest, 2 do
    if string.match(latest[place], '[^:]*$') == priority then least = math.min(least, tonumber(latest[place + 1])) end
  end
  if least < math.huge then
    local past = string.format('%.17g', least)
    local count = redis.call('ZCOUNT', clocks(priority), '-inf', past)
    local offset = count > 20 and math.floor(now / 1000) % (count - 19) or 0
    for _, owner in ipairs(redis.call('ZRANGEBYSCORE', clocks(priority), '-inf', past, 'LIMIT', offset, 20)) do
      if not waits(priority, owner) then redis.call('ZREM', clocks(priority), owner) end
    end
  end
end

for _, job in ipairs(redis.call('ZRANGE', 'imagemill:jobs', 0, 9)) do
  if redis.call('EXISTS', key(job)) == 0 then redis.call('ZREM', 'imagemill:jobs', job) end
end
return answer
