-- ARGV job, chunk, token: a chunk is finished. 'lost', 'ok', or 'finishing' when it was the job's last.
local job, number = ARGV[1], ARGV[2]
if redis.call('HGET', key(job, 'leases'), number) ~= ARGV[3] then return 'lost' end
redis.call('HDEL', key(job, 'leases'), number)
redis.call('ZREM', LEASED, job .. ':' .. number)
if number == '-1' then
  local state = redis.call('HEXISTS', key(job), 'cancelled') == 1 and 'cancelled' or 'done'
  redis.call('HSET', key(job), 'state', state, 'ended', now_ms())
  redis.call('XADD', key(job, 'events'), '*', 'end', state)
  expire(job)
  return 'ok'
end
if close_chunk(job, number) then
  wait(job, -1, now_ms())
  return 'finishing'
end
return 'ok'
