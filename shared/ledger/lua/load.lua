-- ARGV most jobs to look at: what waits and runs, for the metrics; changes nothing. Returns ms by which the oldest lease is overdue,
-- 0 without leases; the number of jobs; and rows of lane, priority, owner, images waiting, images running, ms since the
-- oldest job with waiting images was due. Jobs beyond the most are left out: nobody else can use Redis meanwhile.
local now, most, jobs, count = now_ms(), tonumber(ARGV[1]), {}, 0

local function look_at(job)
  if not jobs[job] and count < most then jobs[job], count = true, count + 1 end
end

local function members(name, type, ...)
  if redis.call('TYPE', name).ok ~= type then return {} end -- nodes repair what somebody else has damaged
  return redis.call(...)
end

for _, lane in ipairs(members(LANES, 'set', 'SMEMBERS', LANES)) do
  for _, priority in ipairs(PRIORITIES) do
    for _, owner in ipairs(members(turns(lane, priority), 'zset', 'ZRANGE', turns(lane, priority), 0, -1)) do
      local line = waiting({lane = lane, priority = priority, owner = owner})
      for _, job in ipairs(members(line, 'zset', 'ZRANGE', line, 0, most)) do look_at(job) end
    end
  end
end
local leases = members(LEASED, 'zset', 'ZRANGE', LEASED, 0, -1, 'WITHSCORES')
for place = 1, #leases, 2 do
  local job = string.match(leases[place], '^(.*):[^:]*$')
  if job then look_at(job) end
end

local places, rows = {}, {}
local COUNTS = {'state', 'lane', 'priority', 'owner', 'total', 'done', 'failed', 'size', 'next', 'back', 'suspects', 'due', 'created'}
for job in pairs(jobs) do
  local j, found = {}, members(key(job), 'hash', 'HMGET', key(job), unpack(COUNTS))
  for place, name in ipairs(COUNTS) do j[name] = found[place] or nil end
  if active(j) and j.lane and j.priority and j.owner then
    local left = figure(j.total, 0) - figure(j.done, 0) - figure(j.failed, 0)
    local line = waiting(j)
    local waits = redis.call('TYPE', line).ok == 'zset' and redis.call('ZSCORE', line, job)
    local to_come = figure(j.size, 0) - figure(j.next, 0) + figure(j.back, 0) + figure(j.suspects, 0)
    local shares = redis.call('TYPE', key(job, 'shares')).ok == 'hash'
    local open = shares and math.max(0, math.min(left, to_come)) or left
    local row = places[line]
    if not row then
      row = {j.lane, j.priority, j.owner, 0, 0, 0}
      places[line], rows[#rows + 1] = row, row
    end
    row[5] = row[5] + math.max(0, left - open)
    if waits then
      row[4] = row[4] + open
      row[6] = math.max(row[6], now - figure(j.due or j.created, now))
    end
  end
end
return {leases[2] and math.max(0, now - figure(leases[2], now)) or 0, count, rows}
