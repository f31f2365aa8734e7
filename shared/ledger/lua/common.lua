-- Prepended to every script. Times are in milliseconds by Redis' clock; the keys are explained in ledger/__init__.py.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function key(job, part)
  return 'imagemill:job:' .. job .. (part and (':' .. part) or '')
end

local LEASED, ALARMS, LANES, RUNNING = 'imagemill:leased', 'imagemill:alarms', 'imagemill:lanes', 'imagemill:running'
local PRIORITIES = {'high', 'normal', 'low'}
local RANK = {high = 1, normal = 2, low = 3}

local function turns(lane, priority) return 'imagemill:turns:' .. lane .. ':' .. priority end
local function waiting(j) return 'imagemill:waiting:' .. j.lane .. ':' .. j.priority .. ':' .. j.owner end
local function clocks(priority) return 'imagemill:clocks:' .. priority end
local function manifests(lane) return 'imagemill:manifests:' .. lane end

local FIELDS = {'state', 'lane', 'priority', 'owner', 'order', 'size', 'next', 'back', 'paused', 'later', 'cancelled', 'expired'}
local function read(job)
  local j = {}
  for place, value in ipairs(redis.call('HMGET', key(job), unpack(FIELDS))) do j[FIELDS[place]] = value or nil end
  j.size, j.next, j.back = tonumber(j.size or 0), tonumber(j.next or 0), tonumber(j.back or 0)
  j.left = j.size - j.next + j.back -- images that no share holds
  return j
end

local function active(j) return j.state == 'queued' or j.state == 'running' end

-- Virtual time (start-time fair queueing: Goyal, Vin and Cheng 1996): each image that an owner is given moves the owner's
-- clock by 1 / weight, and the owner whose clock is lowest is next. '' holds the clock of the latest turn: an owner who
-- returns starts there, so nobody saves up turns.
local function clock_of(priority, owner)
  return tonumber(redis.call('ZSCORE', clocks(priority), owner) or 0)
end

local function set_clock(priority, owner, clock)
  redis.call('ZADD', clocks(priority), string.format('%.17g', clock), owner)
end

local function move_clock(lane, priority, owner, images)
  local weight = tonumber(redis.call('HGET', 'imagemill:weights', owner) or 1)
  local clock = math.max(0, clock_of(priority, owner) + images / weight)
  set_clock(priority, owner, clock)
  redis.call('ZADD', turns(lane, priority), 'XX', string.format('%.17g', clock), owner)
end

local function count_running(owner, images)
  if redis.call('HINCRBY', RUNNING, owner, images) <= 0 then redis.call('HDEL', RUNNING, owner) end
end

-- Put a job in line if there is something of it to hand out.
local function enqueue(job)
  local j = read(job)
  if not active(j) or j.paused or j.later or j.cancelled or j.expired then return end
  if j.left == 0 and redis.call('EXISTS', key(job, 'suspects')) == 0 then return end
  redis.call('SADD', LANES, j.lane)
  redis.call('ZADD', waiting(j), j.order, job)
  if not redis.call('ZSCORE', turns(j.lane, j.priority), j.owner) then
    local clock = math.max(clock_of(j.priority, j.owner), clock_of(j.priority, ''))
    set_clock(j.priority, j.owner, clock)
    redis.call('ZADD', turns(j.lane, j.priority), string.format('%.17g', clock), j.owner)
  end
end

local function dequeue(job)
  local j = read(job)
  if j.lane and redis.call('ZREM', waiting(j), job) == 1 and redis.call('EXISTS', waiting(j)) == 0 then
    redis.call('ZREM', turns(j.lane, j.priority), j.owner)
  end
end

-- The first `most` owners of a lane, as {clock, lane, owner}. Scores in other lanes than that of an owner's latest turn are
-- out of date until they come to the front.
local function heads(lane, priority, most)
  for _ = 1, most do
    local found, fresh = redis.call('ZRANGE', turns(lane, priority), 0, most - 1, 'WITHSCORES'), true
    local owners = {}
    for place = 1, #found, 2 do
      local clock = clock_of(priority, found[place])
      if clock > tonumber(found[place + 1]) then
        redis.call('ZADD', turns(lane, priority), string.format('%.17g', clock), found[place])
        fresh = false
      end
      owners[#owners + 1] = {clock, lane, found[place]}
    end
    if fresh then return owners end
  end
  return {}
end

-- Owners in the order of their turns, over several lanes.
local function order(lanes, priority, most)
  local owners = {}
  for _, lane in ipairs(lanes) do
    for _, owner in ipairs(heads(lane, priority, most)) do owners[#owners + 1] = owner end
  end
  table.sort(owners, function(a, b) if a[1] ~= b[1] then return a[1] < b[1] end return a[2] .. a[3] < b[2] .. b[3] end)
  return owners
end

-- Keys live until their job ends, and then as long as the settings say.
local PARTS = {false, 'packs', 'results', 'events', 'duplicates', 'attempts', 'shares', 'back', 'suspects'}
local function expire(job)
  local seconds = redis.call('HGET', key(job), 'ttl')
  for _, part in ipairs(PARTS) do redis.call('EXPIRE', key(job, part), seconds) end
end

local function persist(job)
  for _, part in ipairs(PARTS) do redis.call('PERSIST', key(job, part)) end
end

local function drop_alarms(job)
  redis.call('ZREM', ALARMS, 'begin ' .. job, 'end ' .. job, 'rise ' .. job)
end

local function finish(job, state)
  dequeue(job)
  drop_alarms(job)
  local lane = redis.call('HGET', key(job), 'lane')
  redis.call('HSET', key(job), 'state', state)
  redis.call('ZADD', manifests(lane), now_ms(), job)
  redis.call('SADD', LANES, lane)
  if state ~= 'finishing' then
    redis.call('HSET', key(job), 'ended', now_ms())
    redis.call('XADD', key(job, 'events'), '*', 'end', state)
    expire(job)
  end
end

-- End a job of which nothing runs and nothing will: it is complete, cancelled or past its deadline.
local function finish_if_over(job)
  local j = read(job)
  if not active(j) then return false end
  local open = tonumber(redis.call('HGET', key(job), 'open'))
  if redis.call('EXISTS', key(job, 'shares')) == 1 and (open > 0 or j.cancelled) then return false end
  if j.cancelled then
    finish(job, 'cancelled')
  elseif open == 0 then
    finish(job, 'finishing')
  elseif j.expired then
    local counts = redis.call('HMGET', key(job), 'total', 'done', 'failed')
    local lapsed = counts[1] - (counts[2] or 0) - (counts[3] or 0)
    redis.call('HSET', key(job), 'lapsed', lapsed)
    redis.call('HINCRBY', key(job), 'failed', lapsed)
    finish(job, 'finishing')
  else
    return false
  end
  return true
end

local function pairs_of(ranges)
  local list = {}
  for first, last in string.gmatch(ranges, '(%d+)-(%d+)') do list[#list + 1] = {tonumber(first), tonumber(last)} end
  return list
end

-- The worker of a share is dead: what it did not record is handed out again, one image at a time, after everything else.
local function bury(member)
  local job, number = string.match(member, '^(.*):(%d+)$')
  redis.call('ZREM', LEASED, member)
  local raw = redis.call('HGET', key(job, 'shares'), number)
  if not raw then return false end
  local share = cjson.decode(raw)
  redis.call('HDEL', key(job, 'shares'), number)
  count_running(share.owner, -share.images)
  for _, range in ipairs(pairs_of(share.ranges)) do
    for index = range[1], range[2] - 1 do
      if redis.call('HEXISTS', key(job, 'results'), index) == 0 then redis.call('RPUSH', key(job, 'suspects'), index) end
    end
  end
  if not finish_if_over(job) then enqueue(job) end
  return true
end

-- What is due by now: jobs that may begin, jobs whose deadline has passed, and jobs that have waited long enough to move up.
local function ring(now)
  for _, alarm in ipairs(redis.call('ZRANGEBYSCORE', ALARMS, '-inf', now, 'LIMIT', 0, 100)) do
    local what, job = string.match(alarm, '^(%a+) (.*)$')
    redis.call('ZREM', ALARMS, alarm)
    if active(read(job)) then
      if what == 'begin' then
        redis.call('HDEL', key(job), 'later')
      elseif what == 'end' then
        dequeue(job)
        redis.call('HSET', key(job), 'expired', now)
        redis.call('XADD', key(job, 'events'), '*', 'expired', '1')
        finish_if_over(job)
      elseif redis.call('HGET', key(job), 'priority') == 'low' then
        dequeue(job)
        redis.call('HSET', key(job), 'priority', 'normal')
      end
      enqueue(job)
    end
  end
end
