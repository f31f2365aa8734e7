-- ARGV job, reason, ttl in s, the size of a pack, then lane, priority and owner of each line that has it: end a job whose record is damaged; what has
-- no result counts as failed. The caller has seen to the types of the keys that jobs share. Returns 0 if it was over.
local job = ARGV[1]
local TYPES = {packs = 'hash', results = 'hash', events = 'stream', duplicates = 'hash', shares = 'hash',
  back = 'list', suspects = 'list'}
for _, part in ipairs({'', unpack(PARTS, 2)}) do
  local name = part == '' and key(job) or key(job, part)
  local found = redis.call('TYPE', name).ok
  if found ~= 'none' and found ~= (TYPES[part] or 'hash') then
    put_aside(name, 'a key of another type', found)
    redis.call('UNLINK', name)
  end
end
for place = 5, #ARGV, 3 do leave({lane = ARGV[place], priority = ARGV[place + 1], owner = ARGV[place + 2]}, job) end
local j = read(job)
if ended(j) then return 0 end
if not RANK[j.priority] then
  j.priority = 'normal'
  redis.call('HSET', key(job), 'priority', j.priority)
end
if j.lane and j.owner then leave(j, job) end
if j.lane then redis.call('ZREM', manifests(j.lane), job) end
drop_alarms(job)

local shares = redis.call('HGETALL', key(job, 'shares'))
for place = 1, #shares, 2 do
  redis.call('ZREM', LEASED, job .. ':' .. shares[place])
  local fine, share = pcall(share_of, job, shares[place])
  if fine then count_running(share.owner, -share.images) end
end
redis.call('DEL', key(job, 'shares'), key(job, 'back'), key(job, 'suspects'))

local counts = redis.call('HMGET', key(job), 'total', 'done', 'failed', 'open')
for place = 1, 4 do counts[place] = math.floor(math.min(figure(counts[place], 0), 1e12)) end
local last = -1
for _, name in ipairs(redis.call('HKEYS', key(job, 'packs'))) do last = math.max(last, figure(name, -1)) end
local size = string.format('%d', math.min(j.size, (last + 1) * ARGV[4]))
local total, done, failed, open = unpack(counts)
local lapsed = math.max(0, total - done - failed)
local function number(value) return string.format('%d', value) end
redis.call('HSET', key(job), 'state', done > 0 and 'done' or 'failed', 'damaged', ARGV[2], 'total', number(total), 'done', number(done),
  'failed', number(failed + lapsed), 'lapsed', number(lapsed), 'open', number(open), 'size', size, 'next', size, 'back', '0', 'suspects', '0', 'ended', now_ms())
redis.call('HSETNX', key(job), 'created', now_ms())
redis.call('HDEL', key(job), 'paused', 'later', 'cancelled', 'expired', 'until')
for _, field in ipairs({'created', 'started', 'dup', 'ttl', 'manifest_since', 'manifest_leases'}) do
  local value = redis.call('HGET', key(job), field)
  if value and figure(value, 1e15) >= 1e15 then redis.call('HDEL', key(job), field) end
end
if figure(redis.call('HGET', key(job), 'ttl'), 0) == 0 then redis.call('HSET', key(job), 'ttl', ARGV[3]) end
redis.call('XADD', key(job, 'events'), '*', 'end', 'failed')
expire(job)
put_aside(key(job), ARGV[2], 'the job was ended')
return 1
