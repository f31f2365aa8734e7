-- Prepended to every script. Times are in milliseconds by Redis' clock; the keys are explained in ledger/__init__.py.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function key(job, part)
  return 'imagemill:job:' .. job .. (part and (':' .. part) or '')
end

-- A figure that somebody else may have damaged: finite and not negative, or else the default.
local function figure(value, default)
  local number = tonumber(value)
  return number and number >= 0 and number < math.huge and number or default
end

-- Set aside what can't be read, as dead.py does; the caller removes it.
local function put_aside(where, reason, content)
  local t = redis.call('TIME')
  local text = string.gsub(string.sub(content, 1, 2048), '[^\32-\126]', '?')
  local entry = {time = t[1] + t[2] / 1e6, where = where, reason = reason, content = text}
  if redis.call('TYPE', DEAD).ok ~= 'list' then redis.call('DEL', DEAD) end
  redis.call('LPUSH', DEAD, cjson.encode(entry))
  redis.call('LTRIM', DEAD, 0, 999)
  redis.call('EXPIRE', DEAD, DEAD_SECONDS)
end

local LEASED, ALARMS, LANES, RUNNING = 'imagemill:leased', 'imagemill:alarms', 'imagemill:lanes', 'imagemill:running'
local PRIORITIES = {'high', 'normal', 'low'}
local RANK = {high = 1, normal = 2, low = 3}

local function turns(lane, priority) return 'imagemill:turns:' .. lane .. ':' .. priority end
local function waiting(j) return 'imagemill:waiting:' .. j.lane .. ':' .. j.priority .. ':' .. j.owner end
local function clocks(priority) return 'imagemill:clocks:' .. priority end
local function manifests(lane) return 'imagemill:manifests:' .. lane end

local FIELDS = {'state', 'lane', 'priority', 'owner', 'attempts', 'order', 'size', 'next', 'back', 'paused', 'later', 'cancelled',
  'expired'}
local function read(job)
  local j = {}
  for place, value in ipairs(redis.call('HMGET', key(job), unpack(FIELDS))) do j[FIELDS[place]] = value or nil end
  j.attempts, j.size, j.next, j.back = figure(j.attempts, 3), figure(j.size, 0), figure(j.next, 0), figure(j.back, 0)
  j.left = j.size - j.next + j.back -- images that no share holds
  return j
end

local function active(j) return j.state == 'queued' or j.state == 'running' end
local function ended(j) return j.state == 'done' or j.state == 'failed' or j.state == 'cancelled' end

-- Virtual time (start-time fair queueing: Goyal, Vin and Cheng 1996): each image that an owner is given moves the owner's
-- clock by 1 / weight, and the owner whose clock is lowest is next. An owner who returns to a lane starts at the lane's latest
-- turn, so nobody saves up turns.
local function clock_of(priority, owner)
  return figure(redis.call('ZSCORE', clocks(priority), owner), 0)
end

local function latest_turn(lane, priority)
  return figure(redis.call('HGET', 'imagemill:latest', lane .. ':' .. priority), 0)
end

-- Owners share their clock between lanes, but lanes differ in speed. So nobody is more than this ahead or behind for what
-- happened in other lanes.
local function minute(lane)
  return math.max(100, 60 * figure(redis.call('HGET', 'imagemill:speed', lane), 0))
end

local function waits(priority, owner)
  for _, lane in ipairs(redis.call('SMEMBERS', LANES)) do
    if redis.call('ZSCORE', turns(lane, priority), owner) then return true end
  end
  return false
end

local function set_clock(priority, owner, clock)
  local score = string.format('%.17g', clock)
  redis.call('ZADD', clocks(priority), score, owner)
  for _, lane in ipairs(redis.call('SMEMBERS', LANES)) do redis.call('ZADD', turns(lane, priority), 'XX', score, owner) end
end

local function move_clock(priority, owner, images)
  local weight = math.max(1e-6, figure(redis.call('HGET', 'imagemill:weights', owner), 1))
  set_clock(priority, owner, math.max(0, clock_of(priority, owner) + images / weight))
end

local function count_running(owner, images)
  if redis.call('HINCRBY', RUNNING, owner, images) <= 0 then redis.call('HDEL', RUNNING, owner) end
end

-- Count a lane's children, and how many images per second they compute.
local function count_children(lane)
  local children, alive = 0, {}
  for _, node in ipairs(redis.call('ZRANGE', 'imagemill:nodes:' .. lane, 0, -1)) do
    children, alive[node] = children + figure(redis.call('HGET', 'imagemill:node-children', node), 0), true
  end
  local rates, known, speed = 'imagemill:rates:' .. lane, 0, 0
  local reports = redis.call('HGETALL', rates)
  for place = 1, #reports, 2 do
    if alive[string.match(reports[place], '^(.*)/')] then
      known, speed = known + 1, speed + figure(reports[place + 1], 0)
    else
      redis.call('HDEL', rates, reports[place])
    end
  end
  -- Children that have not computed an image yet are assumed to be as fast as the others.
  if known > 0 then speed = speed * math.max(1, children / known) end
  redis.call('HSET', 'imagemill:children', lane, children)
  redis.call('HSET', 'imagemill:speed', lane, string.format('%.6g', speed))
  return children
end

local function open_lane(lane)
  if redis.call('SADD', LANES, lane) == 1 then count_children(lane) end
end

-- Put a job in line if there is something of it to hand out.
local function enqueue(job)
  local j = read(job)
  if not active(j) or j.paused or j.later or j.cancelled or j.expired then return end
  if j.left == 0 and redis.call('EXISTS', key(job, 'suspects')) == 0 then return end
  open_lane(j.lane)
  redis.call('ZADD', waiting(j), j.order, job)
  if not redis.call('ZSCORE', turns(j.lane, j.priority), j.owner) then
    local clock, latest = clock_of(j.priority, j.owner), latest_turn(j.lane, j.priority)
    if clock > latest and not waits(j.priority, j.owner) then clock = math.min(clock, latest + minute(j.lane)) end
    clock = math.max(clock, latest)
    redis.call('ZADD', turns(j.lane, j.priority), string.format('%.17g', clock), j.owner)
    set_clock(j.priority, j.owner, clock)
  end
end

local function leave(line, job)
  if redis.call('ZREM', waiting(line), job) == 1 and redis.call('EXISTS', waiting(line)) == 0 then
    redis.call('ZREM', turns(line.lane, line.priority), line.owner)
  end
end

local function dequeue(job)
  local j = read(job)
  if j.lane then leave(j, job) end
end

-- The first `most` owners of each lane in the order of their turns, as {clock, lane, owner}; and the least clock that the next
-- of them should have.
local function order(lanes, priority, most)
  local owners, least = {}, 0
  for _, lane in ipairs(lanes) do
    local found = redis.call('ZRANGE', turns(lane, priority), 0, most - 1, 'WITHSCORES')
    for place = 1, #found, 2 do owners[#owners + 1] = {tonumber(found[place + 1]), lane, found[place]} end
    if #found > 0 then least = math.max(least, found[2] - minute(lane)) end
  end
  table.sort(owners, function(a, b) if a[1] ~= b[1] then return a[1] < b[1] end return a[2] .. a[3] < b[2] .. b[3] end)
  return owners, least
end

-- Keys live until their job ends, and then as long as the settings say.
local PARTS = {false, 'packs', 'results', 'events', 'duplicates', 'shares', 'back', 'suspects'}
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

-- No share is as large as this: a damaged one must not keep Redis busy for minutes.
local MOST_IMAGES = 1000000
local function pairs_of(ranges)
  local list, images = {}, 0
  for first, last in string.gmatch(ranges, '(%d+)-(%d+)') do
    list[#list + 1] = {tonumber(first), tonumber(last)}
    images = images + last - first
  end
  if images > MOST_IMAGES then error('damaged ranges: ' .. string.sub(ranges, 1, 100)) end
  return list
end

-- A share, or nil if it has ended. An error, before anything is changed, if it is damaged.
local function share_of(job, number)
  local raw = redis.call('HGET', key(job, 'shares'), number)
  if not raw then return nil end
  local share = cjson.decode(raw)
  if type(share) ~= 'table' or type(share.owner) ~= 'string' or type(share.images) ~= 'number' then error('damaged share') end
  share.pairs = pairs_of(share.ranges)
  return share
end

-- The text of an error that a damaged key caused; one of Redis itself, such as being out of memory, goes on.
local function damage(fault)
  local text = type(fault) == 'table' and tostring(fault.err) or tostring(fault)
  for _, code in ipairs({'OOM', 'MISCONF', 'READONLY', 'NOREPLICAS', 'NOPERM', 'MASTERDOWN'}) do
    if string.find(text, code .. ' ', 1, true) then error(fault) end
  end
  return text
end

local function text_of(indexes)
  local ranges, first = {}, 1
  for place, index in ipairs(indexes) do
    if indexes[place + 1] ~= index + 1 then
      ranges[#ranges + 1] = string.format('%d-%d', indexes[first], index + 1)
      first = place + 1
    end
  end
  return table.concat(ranges, ',')
end

-- The indexes in these ranges that have no result.
local function open_in(job, ranges)
  local indexes = {}
  for _, range in ipairs(pairs_of(ranges)) do
    for index = range[1], range[2] - 1 do
      if redis.call('HEXISTS', key(job, 'results'), index) == 0 then indexes[#indexes + 1] = index end
    end
  end
  return indexes
end

-- Groups of suspects: images that were together in each of the `deaths` processes that died with them, as 'deaths:ranges'.
local function add_group(job, command, deaths, indexes)
  redis.call(command, key(job, 'suspects'), string.format('%g:%s', deaths, text_of(indexes)))
  redis.call('HINCRBY', key(job), 'suspects', #indexes)
end

-- Take the first group; returns its deaths and those of its images that have no result, or nil if there is no group.
local function take_group(job)
  local group = redis.call('LPOP', key(job, 'suspects'))
  if not group then return nil end
  local deaths, ranges = string.match(group, '^([%d.]+):([%d,-]+)$')
  if not deaths then
    put_aside(key(job, 'suspects'), 'not a group of images', group)
    return 0, {}
  end
  local images = 0
  for _, range in ipairs(pairs_of(ranges)) do images = images + range[2] - range[1] end
  redis.call('HINCRBY', key(job), 'suspects', -images)
  return tonumber(deaths), open_in(job, ranges)
end

-- Keep open images only: a retry hands out the others anew.
local function drop_recorded_suspects(job)
  for _ = 1, redis.call('LLEN', key(job, 'suspects')) do
    local deaths, open = take_group(job)
    if #open > 0 then add_group(job, 'RPUSH', deaths, open) end
  end
end

local function finish(job, state)
  dequeue(job)
  drop_recorded_suspects(job)
  drop_alarms(job)
  local j = read(job)
  redis.call('HSET', key(job), 'state', state)
  redis.call('ZADD', manifests(j.lane), now_ms(), job)
  open_lane(j.lane)
  if string.sub(j.owner, 1, 1) == '~' then -- this job was all that it had
    for _, priority in ipairs(PRIORITIES) do redis.call('ZREM', clocks(priority), j.owner) end
  end
  if state ~= 'finishing' then
    redis.call('HSET', key(job), 'ended', now_ms())
    redis.call('XADD', key(job, 'events'), '*', 'end', state)
    expire(job)
  end
end

-- End a job of which nothing runs and nothing will: it is complete, cancelled or past its deadline, or damage to its record has
-- cost it the images that are left.
local function finish_if_over(job)
  local j = read(job)
  if not active(j) then return false end
  local open = tonumber(redis.call('HGET', key(job), 'open'))
  if redis.call('EXISTS', key(job, 'shares')) == 1 and (open > 0 or j.cancelled) then return false end
  local lost = open > 0 and j.left == 0 and redis.call('EXISTS', key(job, 'suspects')) == 0
  if j.cancelled then
    finish(job, 'cancelled')
  elseif open == 0 then
    finish(job, 'finishing')
  elseif j.expired or lost then
    if lost then redis.call('HSETNX', key(job), 'damaged', 'the record of these images in Redis is damaged') end
    local counts = redis.call('HMGET', key(job), 'total', 'done', 'failed')
    local lapsed = counts[1] - (counts[2] or 0) - (counts[3] or 0)
    redis.call('HSET', key(job), 'lapsed', lapsed)
    redis.call('HINCRBY', key(job), 'failed', lapsed)
    finish(job, tonumber(counts[2] or 0) > 0 and 'done' or 'failed')
  else
    return false
  end
  return true
end

-- What a silent child's death counts: half if its node's main process has ended or fallen silent, too, because images seldom take
-- a whole node down; operators, power cuts and networks do. A child's name is NODE/NUMBER/its parent's process ID.its own.
local function weight_of(child)
  local node, parent = string.match(tostring(child), '^(.*)/%d+/(%d+)%.%d+$')
  local fine, report = pcall(cjson.decode, node and redis.call('HGET', 'imagemill:nodes', node) or '')
  if not fine or type(report) ~= 'table' then return 0.5 end
  local lives = tostring(report.pid) == parent and now_ms() - 1000 * figure(report.seen, 0) < 10000
  return lives and 1 or 0.5
end

-- The worker of a share is dead: what it did not record is handed out again after everything else, in two halves; but each
-- image alone for its last attempt, so that none is given up for a neighbour's sake. `weight` is what this death counts, if known.
-- Returns the number of images of the share, or nil if it has ended.
local function bury(member, weight)
  local job, number = string.match(member, '^(.*):(%d+)$')
  redis.call('ZREM', LEASED, member)
  if not job then
    put_aside(LEASED, 'not a share', member)
    return nil
  end
  local share = share_of(job, number)
  if not share then return nil end
  redis.call('HDEL', key(job, 'shares'), number)
  count_running(share.owner, -share.images)
  local j = read(job)
  if active(j) then
    local open, deaths, group = open_in(job, share.ranges), figure(share.deaths, 0) + (weight or weight_of(share.child)), {}
    table.sort(open)
    local most = deaths < j.attempts - 1 and math.ceil(#open / 2) or 1
    for place, index in ipairs(open) do
      group[#group + 1] = index
      if #group == most or place == #open then
        add_group(job, 'RPUSH', deaths, group)
        group = {}
      end
    end
    if not finish_if_over(job) then enqueue(job) end
  end
  return share.images
end

-- What is due by now: jobs that may begin, jobs whose deadline has passed, and jobs that have waited long enough to move up.
local function ring(now)
  for _, alarm in ipairs(redis.call('ZRANGEBYSCORE', ALARMS, '-inf', now, 'LIMIT', 0, 100)) do
    local what, job = string.match(alarm, '^(%a+) (.*)$')
    redis.call('ZREM', ALARMS, alarm)
    if not job then
      put_aside(ALARMS, 'not an alarm', alarm)
    elseif active(read(job)) then
      if what == 'begin' then
        redis.call('HDEL', key(job), 'later')
        redis.call('HSET', key(job), 'due', now)
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
