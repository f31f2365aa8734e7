-- ARGV job, URL of the manifest or '', the run that it is of or '': the manifest is written, or never will be. Returns 0 if a
-- retry has begun.
local job = ARGV[1]
local j = read(job)
if ARGV[3] ~= '' and ARGV[3] ~= j.order then return 0 end
if not j.lane or redis.call('ZREM', manifests(j.lane), job) == 0 then return 0 end
if ARGV[2] ~= '' then redis.call('HSET', key(job), 'manifest', ARGV[2]) end
if j.state == 'finishing' then
  local state = tonumber(redis.call('HGET', key(job), 'done') or 0) > 0 and 'done' or 'failed'
  redis.call('HSET', key(job), 'state', state, 'ended', now_ms())
  redis.call('XADD', key(job, 'events'), '*', 'end', state)
end
expire(job)
return 1
