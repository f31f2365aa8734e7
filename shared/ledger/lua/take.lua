-- ARGV the request as JSON, the size of a pack: hand out a share, or a manifest to write. The request holds
--   child, lease: who asks, and the lease in ms;   empty, drains: whether the child has nothing at hand, now or soon;
--   lanes: the lanes that the child can work on;   room, rate: by lane, images it wants and images per second it computes;
--   held: by job, images it already has at hand;   avoid: jobs that it can't work on at the moment;
--   siblings: how many children share its device.
-- Returns {'none'}; {'drain'}: come back when nothing is at hand, for suspects; {'damaged', job, why}: its record can't be used;
-- {'manifest', job, number of its lease, run, ms since it was first handed out}; or {'share', job, number, processes that died
-- with these images, rank of its priority, 1 if its owner had nothing running, its ranges, those of them that are recorded
-- already, then packs as number, items}.
local ask, pack = cjson.decode(ARGV[1]), tonumber(ARGV[2])
ring(now_ms())
local now, drain, least = now_ms(), false, 0

local avoid = {}
for _, job in ipairs(ask.avoid) do avoid[job] = true end

for _, lane in ipairs(ask.lanes) do
  for _, job in ipairs(redis.call('ZRANGEBYSCORE', manifests(lane), '-inf', now, 'LIMIT', 0, 10 + #ask.avoid)) do
    if avoid[job] then -- a node that can will write it
    elseif redis.call('EXISTS', key(job)) == 1 then
      redis.call('ZADD', manifests(lane), now + ask.lease, job)
      redis.call('HSETNX', key(job), 'manifest_since', now)
      local since = figure(redis.call('HGET', key(job), 'manifest_since'), now)
      return {'manifest', job, redis.call('HINCRBY', key(job), 'manifest_leases', 1), redis.call('HGET', key(job), 'order'), now - since}
    else
      redis.call('ZREM', manifests(lane), job)
    end
  end
end

-- Lease `images` images, which are no longer waiting.
local function share(job, j, ranges, images, deaths)
  -- With the time, a number never returns when Redis has forgotten its last writes: the share that had it may live on.
  local number = string.format('%.0f%04d', now, redis.call('HINCRBY', key(job), 'shares', 1) % 10000)
  local held = {child = ask.child, owner = j.owner, lane = j.lane, priority = j.priority, images = images, ranges = ranges,
    deaths = deaths}
  redis.call('HSET', key(job, 'shares'), number, cjson.encode(held))
  redis.call('ZADD', LEASED, now + ask.lease, job .. ':' .. number)
  local fresh = redis.call('HEXISTS', RUNNING, j.owner) == 0 and 1 or 0
  count_running(j.owner, images)
  local clock = math.max(clock_of(j.priority, j.owner), least)
  local latest = math.max(clock, latest_turn(j.lane, j.priority))
  redis.call('HSET', 'imagemill:latest', j.lane .. ':' .. j.priority, string.format('%.17g', latest))
  set_clock(j.priority, j.owner, clock)
  move_clock(j.priority, j.owner, images)
  if j.state == 'queued' then redis.call('HSET', key(job), 'state', 'running', 'started', now) end
  if read(job).left == 0 and redis.call('EXISTS', key(job, 'suspects')) == 0 then dequeue(job) end
  local answer, seen, recorded = {'share', job, number, tostring(deaths), RANK[j.priority], fresh, ranges, ''}, {}, {}
  for _, range in ipairs(pairs_of(ranges)) do
    for index = range[1], range[2] - 1 do -- by a worker that was thought to be dead
      if redis.call('HEXISTS', key(job, 'results'), index) == 1 then recorded[#recorded + 1] = index .. '-' .. index + 1 end
    end
    for place = math.floor(range[1] / pack), math.floor((range[2] - 1) / pack) do
      if not seen[place] then
        answer[#answer + 1] = place
        answer[#answer + 1] = redis.call('HGET', key(job, 'packs'), place) or ''
        seen[place] = true
      end
    end
  end
  answer[8] = table.concat(recorded, ',')
  return answer
end

-- Images whose worker died, to be run with nothing else in the process.
local function suspects(job, j)
  local deaths, open = take_group(job)
  while deaths and #open == 0 do deaths, open = take_group(job) end
  if not deaths then
    dequeue(job)
    return nil
  end
  redis.call('DEL', 'imagemill:draining:' .. job)
  return share(job, j, text_of(open), #open, deaths)
end

-- Guided self-scheduling (Polychronopoulos and Kuck 1987), weighted by speed: at most half of the child's part of what is left.
-- If all children can finish that within a second, each gets its whole part, so that a small job takes one round. Children of
-- the only device need no parts: whoever computes the end, small batches would only hold the device up.
local function part(job, j, mine)
  local rate = ask.rate[j.lane] or 0
  local speed = tonumber(redis.call('HGET', 'imagemill:speed', j.lane) or 0)
  local children = math.max(1, tonumber(redis.call('HGET', 'imagemill:children', j.lane) or 1))
  if children <= (ask.siblings or 1) then return j.left end
  local its = rate > 0 and speed > 0 and math.min(1, rate / speed) or 1 / children
  local others = children - redis.call('HLEN', key(job, 'shares')) -- who have not got theirs yet, this one included
  if others > 0 and mine == 0 and j.left * its <= rate then
    return math.min(math.ceil(j.left * math.min(1, its * children / others)), math.max(1, math.floor(rate)))
  end
  return math.ceil((j.left + mine) * its / (children > 1 and 2 or 1)) - mine
end

local function grant(job, line)
  if avoid[job] then return nil end
  local j = read(job)
  if not j.state then -- somebody has deleted it
    leave(line, job)
    return nil
  end
  if j.left == 0 then
    if ask.empty then return suspects(job, j) end
    if not ask.drains then return nil end
    local mark = 'imagemill:draining:' .. job -- one child at a time
    drain = drain or redis.call('SET', mark, ask.child, 'NX', 'PX', 10000) or redis.call('GET', mark) == ask.child
    return nil
  end
  local mine = ask.held[job] or 0
  local images = math.min(ask.room[j.lane] or 0, j.left, math.max(part(job, j, mine), mine == 0 and 1 or 0))
  if images < 1 then return nil end
  local ranges, needed = {}, images
  while needed > 0 do
    local first, last
    local back = redis.call('LPOP', key(job, 'back'))
    if back then
      first, last = string.match(back, '(%d+)-(%d+)')
      first, last = tonumber(first), tonumber(last)
      if last - first > needed then
        redis.call('LPUSH', key(job, 'back'), string.format('%d-%d', first + needed, last))
        last = first + needed
      end
      redis.call('HINCRBY', key(job), 'back', first - last)
    else
      first, last = j.next, math.min(j.next + needed, j.size)
      if first >= last then break end
      redis.call('HSET', key(job), 'next', last)
      j.next = last
    end
    ranges[#ranges + 1] = string.format('%d-%d', first, last)
    needed = needed - (last - first)
  end
  return share(job, j, table.concat(ranges, ','), images - needed, 0)
end

for _, priority in ipairs(PRIORITIES) do
  local owners
  owners, least = order(ask.lanes, priority, 16)
  for place, owner in ipairs(owners) do
    if place > 16 then break end
    local line = {lane = owner[2], priority = priority, owner = owner[3]}
    for _, job in ipairs(redis.call('ZRANGE', waiting(line), 0, 7 + #ask.avoid)) do
      local fine, answer = pcall(grant, job, line)
      if not fine then return {'damaged', job, damage(answer)} end
      if answer then return answer end
      if drain then return {'drain'} end
    end
  end
end
return {'none'}
