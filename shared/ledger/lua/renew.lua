-- ARGV child, lease in ms, its lanes and the jobs that it can't work on as JSON, then job, share number or 'manifest NUMBER', ...:
-- extend leases. Returns the job whose turn it is, or '', its lane, and for each lease 'ok'; 'yield': give back what is not fetched
-- yet, for the sake of that job; 'stop': begin nothing more of this job; or 'lost'.
local child, ends, ask = ARGV[1], now_ms() + ARGV[2], cjson.decode(ARGV[3])
local lanes, avoid = ask.lanes, {}
for _, job in ipairs(ask.avoid) do avoid[job] = true end
ring(now_ms())

local function first_of(line)
  for _, job in ipairs(redis.call('ZRANGE', waiting(line), 0, #ask.avoid)) do
    if not avoid[job] then return job end
  end
end

local function find_urgent()
  for rank, priority in ipairs(PRIORITIES) do
    for _, owner in ipairs(order(lanes, priority, 4 + #ask.avoid)) do
      local job = first_of({lane = owner[2], priority = priority, owner = owner[3]})
      if job and read(job).left > 0 then
        -- An owner who already has images at work waits for the next share.
        return {job = job, lane = owner[2], rank = rank, owner = owner[3], served = redis.call('HEXISTS', RUNNING, owner[3]) == 1}
      end
    end
  end
end

local urgent = find_urgent()
local answer = {urgent and urgent.job or '', urgent and urgent.lane or ''}
for place = 4, #ARGV, 2 do
  local job, number = ARGV[place], ARGV[place + 1]
  local verdict = 'lost'
  local lease = string.match(number, '^manifest (%d+)$')
  if lease then
    local lane = redis.call('HGET', key(job), 'lane')
    if lane and redis.call('HGET', key(job), 'manifest_leases') == lease and redis.call('ZSCORE', manifests(lane), job) then
      redis.call('ZADD', manifests(lane), ends, job)
      verdict = 'ok'
    end
  else
    local share = share_of(job, number)
    local j = read(job)
    if share and share.child == child and j.state then
      redis.call('ZADD', LEASED, ends, job .. ':' .. number)
      local rank = RANK[j.priority]
      if j.cancelled or j.expired or j.paused then
        verdict = 'stop'
      elseif urgent and (urgent.rank < rank or (urgent.rank == rank and urgent.owner ~= share.owner and not urgent.served)) then
        verdict = 'yield'
      else
        verdict = 'ok'
      end
    end
  end
  answer[#answer + 1] = verdict
end
return answer
