-- ARGV job, chunk, task, token, lease ms: lease a chunk.
-- Returns 'gone': nothing left to do; 'held': another worker has it; or 'ok', how often it was lost, and its items.
local job, number, task, token = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local state = redis.call('HGET', key(job), 'state')
if number == '-1' then
  if state ~= 'finishing' then return {'gone'} end
elseif (state ~= 'queued' and state ~= 'running')
  or tonumber(number) >= tonumber(redis.call('HGET', key(job), 'chunks'))
  or redis.call('GETBIT', key(job, 'finished'), number) == 1 then
  return {'gone'}
end
local now = now_ms()
local member = job .. ':' .. number
local holder = redis.call('HGET', key(job, 'leases'), number)
if holder then
  -- The same task again means that its message was redelivered: the process that had it is lost.
  local again = string.sub(holder, 1, #task + 1) == task .. '/'
  local ends = tonumber(redis.call('ZSCORE', LEASED, member) or 0)
  if ends > now and not again then return {'held'} end
  redis.call('HINCRBY', key(job, 'lost'), number, 1)
end
local queue = queue_of(job, number)
local published = redis.call('ZSCORE', WAITING .. queue, member)
if published then
  redis.call('ZREM', WAITING .. queue, member)
  -- A manifest usually comes from its job's last worker rather than the queue, so it says nothing about older messages.
  if number ~= '-1' and tonumber(published) > tonumber(redis.call('HGET', NEWEST, queue) or 0) then
    redis.call('HSET', NEWEST, queue, published)
  end
end
redis.call('HSET', key(job, 'leases'), number, token)
redis.call('ZADD', LEASED, now + ARGV[5], member)
if state == 'queued' then redis.call('HSET', key(job), 'state', 'running', 'started', now) end
expire(job)
return {'ok', tonumber(redis.call('HGET', key(job, 'lost'), number) or 0),
  redis.call('HGET', key(job, 'chunks'), number) or ''}
