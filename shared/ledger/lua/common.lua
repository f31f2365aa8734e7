-- Prepended to every script. Times are in milliseconds by Redis' clock.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function key(job, part)
  return 'imagemill:job:' .. job .. (part and (':' .. part) or '')
end

local WAITING = 'imagemill:waiting:' -- + queue: chunk -> when it was published
local LEASED = 'imagemill:leased'    -- chunk -> when its lease expires
local NEWEST = 'imagemill:newest'    -- queue -> when the newest chunk taken from it was published

-- A manifest has a different queue than its job's other chunks.
local function queue_of(job, number)
  return redis.call('HGET', key(job), tostring(number) == '-1' and 'manifest_queue' or 'queue')
end

local function wait(job, number, now)
  local queue = queue_of(job, number)
  redis.call('ZADD', WAITING .. queue, now, job .. ':' .. number)
  redis.call('SADD', 'imagemill:queues', queue)
end

local function close_chunk(job, number)
  redis.call('SETBIT', key(job, 'finished'), number, 1)
  if redis.call('HINCRBY', key(job), 'open', -1) == 0 then
    redis.call('HSET', key(job), 'state', 'finishing')
    return true
  end
  return false
end

local function expire(job)
  local seconds = redis.call('HGET', key(job), 'ttl')
  for _, part in ipairs({false, 'chunks', 'results', 'events', 'duplicates', 'attempts', 'leases', 'lost', 'finished'}) do
    redis.call('EXPIRE', key(job, part), seconds)
  end
end
