-- ARGV lease in ms, ms after which low priority rises, then jobs: put back into the keys that jobs share what their own records
-- call for. Changes nothing of a ledger in which nothing is missing.
local now = now_ms()
local function alarm(what, job, time)
  if time and not redis.call('ZSCORE', ALARMS, what .. ' ' .. job) then redis.call('ZADD', ALARMS, time, what .. ' ' .. job) end
end
for place = 3, #ARGV do
  local job = ARGV[place]
  local j = read(job)
  if active(j) then
    for _, number in ipairs(redis.call('HKEYS', key(job, 'shares'))) do
      redis.call('ZADD', LEASED, 'NX', now + ARGV[1], job .. ':' .. number)
    end
    if not j.cancelled and not j.expired then
      alarm('begin', job, j.later)
      alarm('end', job, redis.call('HGET', key(job), 'until'))
      alarm('rise', job, j.priority == 'low' and now + ARGV[2])
    end
    if not finish_if_over(job) then enqueue(job) end
  elseif j.state == 'finishing' and not redis.call('ZSCORE', manifests(j.lane), job) then
    redis.call('ZADD', manifests(j.lane), now, job)
    open_lane(j.lane)
  end
end
return 1
