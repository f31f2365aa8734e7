-- ARGV job, chunk, token, manifest's URL or '': finish a chunk. Returns 'lost', 'ok', or 'finishing' if it was the job's last.
local job, number = ARGV[1], ARGV[2]
if redis.call('HGET', key(job, 'leases'), number) ~= ARGV[3] then return 'lost' end
redis.call('HDEL', key(job, 'leases'), number)
redis.call('ZREM', LEASED, job .. ':' .. number)
if number == '-1' then
  if redis.call('HGET', key(job), 'state') ~= 'finishing' then return 'lost' end -- a retry has begun
  local state = redis.call('HEXISTS', key(job), 'cancelled') == 1 and 'cancelled' or 'done'
  redis.call('HSET', key(job), 'state', state, 'ended', now_ms())
  if ARGV[4] ~= '' then redis.call('HSET', key(job), 'manifest', ARGV[4]) end
  redis.call('XADD', key(job, 'events'), '*', 'end', state)
  expire(job)
  return 'ok'
end
local last = close_chunk(job, number)
if last then wait(job, -1, now_ms()) end
expire(job)
return last and 'finishing' or 'ok'
