-- ARGV most jobs to look at: what waits and runs, for the metrics; changes nothing. Returns JSON, which clients read faster than many
-- values: `overdue`, ms by which the oldest lease is overdue; `jobs`, how many there are; `lanes` with work; `rows` of lane, priority, owner, images waiting,
-- images running, ms since the oldest job with waiting images was due; `rates` of lane, child, images per second.
-- Jobs beyond the most are left out: nobody else can use Redis meanwhile.
local now, most, jobs, count = now_ms(), tonumber(ARGV[1]), {}, 0

-- Nodes repair keys that somebody else has damaged; here they count as empty.
local function list(...)
  local found = redis.pcall(...)
  return type(found) == 'table' and not found.err and found or {}
end

local function look_at(job, in_line)
  if jobs[job] == nil and count < most then jobs[job], count = in_line, count + 1 end
end

local lanes, rates = list('SMEMBERS', LANES), {}
for _, lane in ipairs(lanes) do
  for _, priority in ipairs(PRIORITIES) do
    for _, owner in ipairs(list('ZRANGE', turns(lane, priority), 0, -1)) do
      for _, job in ipairs(list('ZRANGE', waiting({lane = lane, priority = priority, owner = owner}), 0, most)) do
        look_at(job, true)
      end
    end
  end
  local reports = list('HGETALL', 'imagemill:rates:' .. lane)
  for place = 1, #reports, 2 do
    local rate = figure(reports[place + 1])
    if rate then rates[#rates + 1] = {lane, reports[place], rate} end
  end
end
local leases = list('ZRANGE', LEASED, 0, -1, 'WITHSCORES')
for place = 1, #leases, 2 do
  local job = string.match(leases[place], '^(.*):[^:]*$')
  if job then look_at(job, false) end
end

local places, rows = {}, {}
local COUNTS = {'state', 'lane', 'priority', 'owner', 'total', 'done', 'failed', 'size', 'next', 'back', 'suspects', 'due', 'created'}
for job, in_line in pairs(jobs) do
  local j, found = {}, list('HMGET', key(job), unpack(COUNTS))
  for place, name in ipairs(COUNTS) do j[name] = found[place] or nil end
  if active(j) and j.lane and j.priority and j.owner then
    local left = figure(j.total, 0) - figure(j.done, 0) - figure(j.failed, 0)
    local to_come = figure(j.size, 0) - figure(j.next, 0) + figure(j.back, 0) + figure(j.suspects, 0)
    local shares = redis.call('EXISTS', key(job, 'shares')) == 1
    local open = shares and math.max(0, math.min(left, to_come)) or left
    local place = waiting(j)
    local row = places[place]
    if not row then
      row = {j.lane, j.priority, j.owner, 0, 0, 0}
      places[place], rows[#rows + 1] = row, row
    end
    row[5] = row[5] + math.max(0, left - open)
    if in_line then
      row[4] = row[4] + open
      row[6] = math.max(row[6], now - figure(j.due or j.created, now))
    end
  end
end
local overdue = leases[2] and math.max(0, now - figure(leases[2], now)) or 0
return cjson.encode({overdue = overdue, jobs = count, lanes = lanes, rows = rows, rates = rates})
